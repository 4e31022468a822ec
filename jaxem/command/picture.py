"""The picture of a run: data shaded by responsibility with the best fit over them, and BIC by K beside."""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Ellipse
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from .grid import Entry
from .read import Sheet

# Okabe & Ito's colours: told apart with any colour vision.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933")
_LINES = {"full": ("#222222", "o", "-"), "tied": ("#6A3D9A", "s", "--"), "diag": ("#1B7837", "^", "-."),
          "spherical": ("#B35806", "D", ":"), "tied_diag": ("#8C510A", "v", "--"),
          "tied_spherical": ("#01665E", "P", "-.")}  # fmt: skip
_DRAWN_ROWS = 20_000


def draw(sheet: Sheet, entries: Sequence[Entry], best: Entry, responsibilities: np.ndarray) -> bytes:
    """A PNG: the best fit on the left, BIC by number of components on the right."""
    figure = Figure(figsize=(12.5, 5.4), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    if len(sheet.columns) == 1:
        _densities(left, sheet, best)
    else:
        _ellipses(left, sheet, best, responsibilities)
    plural = "s" if best.components > 1 else ""
    left.set_title(f"{sheet.name}: {best.components} component{plural}, {best.covariance} covariance", loc="left")
    _criteria(right, entries, best)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _colours(count: int) -> list[str]:
    return [_COLOURS[k % len(_COLOURS)] for k in range(count)]


def _ellipses(axes: Axes, sheet: Sheet, best: Entry, responsibilities: np.ndarray) -> None:
    """Rows coloured by the mix of their responsibilities, under 1- and 2-sigma ellipses."""
    centre, axis, labels = _plane(sheet)
    chosen = np.arange(len(sheet.rows))
    if len(chosen) > _DRAWN_ROWS:
        chosen = np.random.default_rng(0).choice(chosen, _DRAWN_ROWS, replace=False)
        axes.annotate(
            f"{_DRAWN_ROWS} of {len(sheet.rows)} rows drawn", (1, 1), xycoords="axes fraction", ha="right", va="top"
        )
    palette = _colours(best.components)
    rgb = np.array([[int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in palette])
    size = np.clip(6000 / len(chosen), 4, 20)
    across, up = ((sheet.rows[chosen] - centre) @ axis).T
    axes.scatter(across, up, c=np.clip(responsibilities[chosen] @ rgb, 0, 1), s=size, alpha=0.7, linewidths=0, zorder=1)
    halo = [withStroke(linewidth=3.5, foreground="white")]
    weights = np.asarray(best.params.weights, float)
    means = (np.asarray(best.params.components.mean, float) - centre) @ axis
    for weight, mean, covariance, colour in zip(weights, means, best.covariances, palette, strict=True):
        variances, directions = np.linalg.eigh(axis.T @ covariance.astype(float) @ axis)
        widths = np.sqrt(np.maximum(variances, 0))
        angle = np.degrees(np.arctan2(directions[1, 1], directions[0, 1]))
        for sigmas, style in ((1, "-"), (2, "--")):
            height, width = 2 * sigmas * widths
            outline = dict(fill=False, edgecolor=colour, linewidth=1.8, linestyle=style, path_effects=halo)
            axes.add_patch(Ellipse(mean, width, height, angle=angle, zorder=2, **outline))
        axes.annotate(
            f"{weight:.0%}", mean, ha="center", va="center", color=colour, weight="bold", size=11, zorder=3,
            path_effects=halo,
        )  # fmt: skip
    grey = "#444444"
    keys = [
        Line2D([], [], color=grey, marker="o", linestyle="", markersize=4, label="row, by responsibility"),
        Line2D([], [], color=grey, linestyle="-", label="1 sigma"),
        Line2D([], [], color=grey, linestyle="--", label="2 sigma"),
    ]
    axes.autoscale_view()
    axes.legend(handles=keys, loc="upper left", framealpha=0.85, edgecolor="none")
    axes.set(xlabel=labels[0], ylabel=labels[1])


def _plane(sheet: Sheet) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Centre (D,), axes (D, 2) and labels of the plane drawn: two columns, or the first two principal axes."""
    if len(sheet.columns) == 2:
        return np.zeros(2), np.eye(2), list(sheet.columns)
    centre, scale = np.nanmean(sheet.rows, axis=0), np.nanstd(sheet.rows, axis=0)
    scale = np.where(scale > 0, scale, 1)
    # A missing value stands at its column's mean here; rows that have one are not drawn.
    _, lengths, directions = np.linalg.svd(np.nan_to_num((sheet.rows - centre) / scale), full_matrices=False)
    if len(lengths) < 2:  # a single row has no second axis
        lengths, directions = np.append(lengths, 0), np.vstack([directions, np.zeros_like(directions)])
    share = lengths**2 / max(np.sum(lengths**2), np.finfo(float).tiny)
    labels = [f"principal axis {i + 1} of the standardised columns ({share[i]:.0%} of variance)" for i in range(2)]
    return centre, directions[:2].T / scale[:, None], labels


def _densities(axes: Axes, sheet: Sheet, best: Entry) -> None:
    """Histogram of one column, under the density of each component and of the mixture."""
    values = sheet.rows[~np.isnan(sheet.rows[:, 0]), 0]
    axes.hist(values, bins="auto", density=True, color="#D5D9DE", edgecolor="white", label="rows")
    margin = 0.05 * np.ptp(values)
    means = np.asarray(best.params.components.mean, float)[:, 0]
    deviations = np.sqrt(best.covariances[:, 0, 0].astype(float))
    # Narrow components need points of their own, or their peaks fall between two of an even grid.
    near = means[:, None] + deviations[:, None] * np.linspace(-4, 4, 161)
    grid = np.sort(np.append(np.linspace(values.min() - margin, values.max() + margin, 800), near))
    grid = grid[(grid >= values.min() - margin) & (grid <= values.max() + margin)]
    z = (grid - means[:, None]) / deviations[:, None]
    weights = np.asarray(best.params.weights, float)[:, None]
    each = weights * np.exp(-(z**2) / 2) / (np.sqrt(2 * np.pi) * deviations[:, None])
    palette = _colours(best.components)
    for k in np.argsort(means):
        density, weight, colour = each[k], weights[k, 0], palette[k]
        axes.fill_between(grid, density, color=colour, alpha=0.25, linewidth=0)
        axes.plot(grid, density, color=colour, linewidth=1.8, label=f"component ({weight:.0%})")
    axes.plot(grid, each.sum(0), color="#222222", linewidth=1.2, linestyle="--", label="mixture")
    axes.legend(frameon=False)
    axes.set(xlabel=sheet.columns[0], ylabel="density")


def _criteria(axes: Axes, entries: Sequence[Entry], best: Entry) -> None:
    """BIC above the best one, by number of components, one line a covariance; entries that are not sound leave a gap.

    The scale is logarithmic beyond 10, where evidence is already decisive: the worst would hide the good otherwise.
    """
    for covariance in dict.fromkeys(entry.covariance for entry in entries):
        mine = [entry for entry in entries if entry.covariance == covariance]
        colour, marker, style = _LINES[covariance]
        heights = [entry.bic - best.bic if entry.sound else np.nan for entry in mine]
        axes.plot(
            [entry.components for entry in mine], heights,
            color=colour, marker=marker, linestyle=style, linewidth=1.6, markersize=5.5, label=covariance,
        )  # fmt: skip
    axes.plot(
        best.components, 0, marker="o", markersize=15, markerfacecolor="none", markeredgecolor="#D55E00",
        markeredgewidth=2, linestyle="", label=f"best: {best.bic:.1f}",
    )  # fmt: skip
    axes.set_yscale("symlog", linthresh=10)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_ylim(-2, max(12, axes.get_ylim()[1]))
    axes.grid(axis="y", color="#E6E6E6")
    axes.set_axisbelow(True)
    numbers = [entry.components for entry in entries]
    axes.set_xlim(min(numbers) - 0.4, max(numbers) + 0.4)
    axes.legend(frameon=False, title="covariance")
    axes.set(xlabel="components", ylabel="BIC above the best (logarithmic beyond 10)")
    left_out = sum(not entry.sound for entry in entries)
    note = f" ({left_out} degenerate left out)" if left_out else ""
    axes.set_title(f"BIC, lower is better{note}", loc="left")
