"""Records of data: what rows can carry beside their values, and what can stand in place of rows."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import checks, numerics, parameters, tree
from .record import record


@record(kw_only=False)
class Labelled:
    """Rows of which some are known to come from one component: semi-supervised data.

    x: N rows as the family takes them; labels (N,): whole numbers 0..K-1, or -1 where unknown.
    A labelled row counts in its own component only; its likelihood is p(x_n, label_n). With all
    rows labelled a fit is the supervised one.
    """

    x: Any
    labels: jax.Array


def split(x: Any) -> tuple[Any, jax.Array | None]:
    """The rows, and their labels (None where they carry none)."""
    return (x.x, x.labels) if isinstance(x, Labelled) else (x, None)


def allowed(labels: jax.Array, count: int) -> jax.Array:
    """Components that rows with these labels (N,) may come from: (K, N)."""
    return (labels[None] < 0) | (labels[None] == jnp.arange(count)[:, None])


def as_labelled(responsibilities: jax.Array, x: Any) -> jax.Array:
    """Responsibilities (K, N), those of labelled rows all in their own component."""
    labels = split(x)[1]
    if labels is None:
        return responsibilities
    own = labels[None] == jnp.arange(responsibilities.shape[0])[:, None]
    return jnp.where(labels[None] < 0, responsibilities, own.astype(responsibilities.dtype))


@record(kw_only=False)
class Gated:
    """Rows with features that their components depend on: concomitant variables, for models with a gate.

    x: N rows as the family takes them; features (N, P) or (N,).
    """

    x: Any
    features: jax.Array


def seen_by(part: str, rows: Any) -> Any:
    """The rows as the mixture's `part` takes them: features of a gate go to the gate ("weights") alone."""
    return rows.x if isinstance(rows, Gated) and part != "weights" else rows


@record(kw_only=False)
class Moments:
    """First and second moments in place of complete rows: the sufficient statistics of a normal likelihood.

    mean: (D,).
    covariance: (D, D), about the mean, with divisor count.
    count: how many rows, a number.

    For models whose statistics are first and second moments (`FactorAnalysis`, `PPCA`, `MultivariateNormal`).
    Likelihoods, fits and criteria are those of the rows. Moments of G groups of rows have a leading axis on all three,
    (G, D), (G, D, D) and (G,), and row weights then count groups.
    Entries of a covariance are rounded relative to the variances of their columns: in float32 the variance of a column
    given the others is resolved only down to some 1e-6 of its own variance, where rows would resolve more.
    """

    mean: jax.Array
    covariance: jax.Array
    count: Any


@record(kw_only=False)
class GroupedRows:
    """Rows of G groups, those of a group one after the other; groups are the independent units, and have the weights.

    values: arrays (N, ...), or a pytree of such.
    sizes: (G,), how many rows every group has.
    """

    values: Any
    sizes: jax.Array

    def numbers(self) -> jax.Array:
        """The group (N,) of every row."""
        count = tree.num_rows(self.values)
        return jnp.repeat(jnp.arange(len(self.sizes)), self.sizes, total_repeat_length=count)


def group_rows(values: Any, groups: Any) -> GroupedRows:
    """Rows (N, ...), or a pytree of arrays that share them, of groups of any sizes: nothing is padded.

    groups: (N,), the group of every row: numbers or text, in any order. Groups come in the order of their sorted names,
    `numpy.unique(groups)`; weights (G,) and results for groups follow it. Rows of a group keep their own order.
    Raises ValueError or TypeError where groups are not one name a row.
    """
    names = np.asarray(groups)
    rows = tree.num_rows(values)
    if names.shape != (rows,):
        raise ValueError(f"groups must have shape ({rows},), one name a row of values; got {names.shape}")
    if names.dtype.kind == "O":
        names = names.astype(str)
    if names.dtype.kind == "f" and np.any(np.isnan(names)):
        raise ValueError(f"groups must name every row; row {int(np.argmax(np.isnan(names)))} is NaN: drop such rows")
    _, which, sizes = np.unique(names, return_inverse=True, return_counts=True)
    which = which.ravel()
    if np.any(np.diff(which) < 0):
        order = np.argsort(which, kind="stable")
        values = jax.tree.map(lambda leaf: np.asarray(leaf)[order], values)
    return GroupedRows(values, jnp.asarray(sizes, jnp.int32))


def units_and_columns(x: Any) -> tuple[int, int]:
    """How many units data are, groups or rows, and of how many columns: of `Moments`, or of rows (N, D) or (N,)."""
    if not isinstance(x, Moments):
        return checks.row_shape("x", x)
    shape = (1, *jnp.shape(x.mean))
    return shape[-2], shape[-1]


def grouped(x: Moments) -> Moments:
    """Moments with a leading axis of groups, which one group may have left out, in floating-point numbers."""
    dtype = tree.float_dtype((x.mean, x.covariance))
    single = jnp.ndim(x.mean) == 1
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype)[None] if single else jnp.asarray(leaf, dtype), x)


def total_count(x: Moments, weights: jax.Array | None) -> jax.Array:
    """How many rows all groups stand for."""
    return numerics.weighted_sum(grouped(x).count, weights)


@jax.jit
def pooled(x: Moments, weights: jax.Array | None = None) -> Moments:
    """All groups as one: moments with a leading axis of length 1."""
    x = grouped(x)
    share = x.count if weights is None else jnp.where(weights > 0, weights * x.count, 0)
    total = jnp.sum(share)
    x = tree.where(share > 0, x, tree.zeros_like(x))
    mean = numerics.product(share, x.mean, "g,gd->d") / total
    apart = x.mean - mean[None]
    within = numerics.product(share, x.covariance, "g,gij->ij")
    between = numerics.product(share[:, None] * apart, apart, "gi,gj->ij")
    return Moments(mean[None], ((within + between) / total)[None], total[None])


@jax.jit
def moments_of(x: jax.Array, weights: jax.Array | None = None) -> Moments:
    """Moments of complete rows (N, D), as one group, block by block about a centre. A column with a NaN has the mean
    NaN.

    Without weights the centre is the mean of some thousand rows at regular intervals, which is near enough.
    """
    x, weights = tree.present(checks.matrix("x", x), weights)
    total = tree.total_weight(x, weights)
    some = x[:: max(1, len(x) // 1000)]
    centre = jnp.mean(some, axis=0) if weights is None else numerics.product(weights, x, "n,nd->d") / total

    def sums(rows: jax.Array, inside: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        apart = rows - centre[None]
        weighted = apart if inside is None else inside[:, None] * apart
        return jnp.sum(weighted, axis=0), numerics.product(weighted, apart, "ni,nj->ij")

    first, second = tree.sum_over_blocks(sums, x, weights, tree.rows_per_block(2 * x.shape[1], x.dtype))
    shift = first / total
    covariance = second / total - shift[:, None] * shift[None]
    return Moments((centre + shift)[None], covariance[None], total[None])


def as_moments(x: Any, weights: jax.Array | None, missing: bool) -> tuple[Any, jax.Array | None]:
    """Data with a leading axis of units, and their weights, as few as first and second moments allow.

    Moments, and complete rows that are more than their columns, become one group that counts once, whose weight is
    the number of rows behind it. Other rows stay as they are. missing: whether rows that cannot be looked at, since
    they are traced, may have missing entries.
    """
    if isinstance(x, Moments):
        found = pooled(x, weights)
    else:
        rows, columns = checks.row_shape("x", x)
        if rows <= columns or (missing and not checks.is_concrete(x)):
            return x, weights
        found = moments_of(x, weights)
        # Under an outer trace the moments of concrete rows may be traced: then the rows are searched for NaN.
        if checks.is_concrete(x) and checks.has_nan(found.mean if checks.is_concrete(found) else x):
            return x, weights
    return Moments(found.mean, found.covariance, jnp.ones_like(found.count)), found.count


def check_moments(x: Moments, weights: jax.Array | None = None) -> None:
    """Raise ValueError or TypeError, by name, for what are no moments."""
    checks.real("x.mean", x.mean)
    checks.real("x.covariance", x.covariance)
    shape = jnp.shape(x.mean)
    if len(shape) not in (1, 2) or 0 in shape:
        raise ValueError(f"x.mean must have shape (D,), or (G, D) for G groups of rows; got {shape}")
    own: dict[str, Any] = {"covariance": (*shape, shape[-1]), "count": shape[:-1]}
    for name, expected in own.items():
        value = vars(x)[name]
        if jnp.shape(value) != expected:
            raise ValueError(f"x.{name} must have shape {expected}, as x.mean is {shape}; got {jnp.shape(value)}")
    if weights is not None and len(shape) == 1:
        raise TypeError("weights must be None where x is Moments of one group: its count is their weight")
    checks.row_weights(weights, units_and_columns(x)[0])
    if not checks.is_concrete(x):
        return
    if not np.all(np.isfinite(np.asarray(x.mean))) or not np.all(np.isfinite(np.asarray(x.covariance))):
        raise ValueError("x.mean and x.covariance must be finite: moments are of complete rows")
    if not np.all((np.asarray(x.count) > 0) & np.isfinite(np.asarray(x.count))):
        raise ValueError(f"x.count must be above 0, the number of rows behind the moments; got {x.count}")
    parameters.covariances("x.covariance", np.asarray(x.covariance))
