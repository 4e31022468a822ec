"""Gaussian mixtures against scikit-learn (and gmmx): the speed and memory that the README claims.

    python benchmarks/gaussian_mixture.py [--only a,b,c,d,e] [--quick] [--repeats 5]

Claims, each a row of the table printed at the end:

a   one fit, N = 100k, D = 16, K = 16, full covariances, exactly 20 EM steps from one start:
    at least 6x scikit-learn in float32, 4x in float64
b   256 restarts, N = 2000, D = 4, K = 8 overlapping clusters, full, random-row starts, every restart run to
    its own convergence: at least 20x less time per restart and EM step; with a screen at least 60x less time
    per restart, and a best objective per row at most 1e-3 below the unscreened one
c   4096 restarts on Old Faithful (272 x 2, raw units), K = 3, full, unscreened: at least 50x less time per
    restart and step
d   a fit with N = 2M, D = 8, K = 32, float32, `model.init` and compilation included: its peak memory stays
    under the data plus 300 MB
e   one fit in many columns, N = 10k, D = 50 and D = 100, K = 8, full covariances, exactly 20 EM steps from one
    start, float32: at least 3x scikit-learn

How it is measured. One process; the contestants take turns, so that a slow spell of the machine hits all;
medians over the repeats. Compilation is shown apart: first call minus median of the later ones. Both sides
get the same data, dtype and starts, and whatever threads they take by default. scikit-learn is given
weights_init, means_init and precisions_init, all three, and then skips its own initialisation: no k-means is
timed. What is counted: a fit of S steps is S M-steps and S + 1 E-steps on both sides (jaxem's extra E-step
makes the reported log-likelihood that of the returned parameters; scikit-learn's, after its loop, makes the
labels); gmmx does S of each. Time per step is the time of the whole fit over S.

Many restarts: scikit-learn runs the first few starts one by one, as a loop or n_init would, and its mean is
taken for all. On such small problems BLAS threads can cost more than they bring, so it runs both with its
default and with one thread, and the faster counts. The two sides stop by different rules (jaxem: what is left
to gain per row is at most 1e-6; scikit-learn: the last gain per row was below 1e-6), so "per restart and step"
divides each side's time by the steps that it took itself, and "per restart" takes each as it stops.

Before a ratio is printed, both sides' log-likelihoods after equally many steps from the same start are
compared: a disagreement ends the script.
"""

import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from threadpoolctl import threadpool_limits
from timing import Row, Timing, measure, take_turns

from jaxem import Mixture, MixtureParams, Normal, NormalParams, Screen, em_fit, fit_restarts
from jaxem.datasets import faithful

STEPS = 20
TOL = 1e-6
MAX_STEPS = 1000
SCREEN = Screen(steps=30, keep=0.125)
# Largest difference of log-likelihoods per row, after the same steps from the same start.
AGREEMENT = {"float32": 1e-4, "float64": 1e-9}
MB = 1e6
# Float32 operations a second of matrix products on the two cores that the README's figures are from.
PEAK = 1e11


def clusters(rows: int, columns: int, count: int, spread: float, dtype: str, seed: int = 0) -> np.ndarray:
    """Rows from `count` Gaussian clusters of width about 1, their centres `spread` wide; made block by block."""
    rng = np.random.default_rng(seed)
    centres = spread * rng.standard_normal((count, columns))
    factors = np.eye(columns) + 0.4 / np.sqrt(columns) * rng.standard_normal((count, columns, columns))
    x = np.empty((rows, columns), dtype)
    for start in range(0, rows, 1 << 14):
        block = x[start : start + (1 << 14)]
        label = rng.integers(count, size=len(block))
        noise = rng.standard_normal(block.shape)
        block[:] = centres[label] + np.einsum("nij,nj->ni", factors[label], noise)
    return x


def random_row_starts(x: np.ndarray, count: int, restarts: int, seed: int = 1) -> MixtureParams:
    """Stacked starts: equal weights, `count` distinct rows as means, the data's covariance; leading axis R."""
    rng = np.random.default_rng(seed)
    rows = np.stack([rng.choice(len(x), count, replace=False) for _ in range(restarts)])
    covariance = np.cov(x.T, bias=True).astype(x.dtype)
    return MixtureParams(
        weights=np.full((restarts, count), 1 / count, x.dtype),
        components=NormalParams(mean=x[rows], covariance=np.tile(covariance, (restarts, count, 1, 1))),
    )


def start_at(starts: MixtureParams, index: int) -> MixtureParams:
    return jax.tree.map(lambda leaf: leaf[index], starts)


def fit_sklearn(x: np.ndarray, start: MixtureParams, tol: float, max_steps: int, reg_covar: float) -> GaussianMixture:
    """scikit-learn from exactly this start, in the dtype of x."""
    model = GaussianMixture(
        n_components=len(start.weights),
        covariance_type="full",
        tol=tol,
        max_iter=max_steps,
        reg_covar=reg_covar,
        weights_init=start.weights,
        means_init=start.components.mean,
        precisions_init=np.linalg.inv(start.components.covariance),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(x)


def agree(name: str, ours: float, theirs: float, tolerance: float) -> None:
    """Print two log-likelihoods per row; end the script if they are not the same."""
    print(f"  log-likelihood per row: jaxem {ours:.8f}, {name} {theirs:.8f}, difference {abs(ours - theirs):.1e}")
    if not abs(ours - theirs) <= tolerance:
        sys.exit(f"jaxem and {name} disagree by more than {tolerance:g} per row: no ratio means anything")


def agree_step_by_step(x: np.ndarray, starts: MixtureParams, fits: int = 3) -> None:
    """jaxem and scikit-learn reach the same log-likelihood in the same number of steps, from the first starts."""
    model = Mixture(Normal("full"), starts.weights.shape[1])
    for index in range(fits):
        start = start_at(starts, index)
        ours = em_fit(model, start, jnp.asarray(x), tol=-1.0, max_steps=STEPS)
        theirs = fit_sklearn(x, start, tol=0.0, max_steps=STEPS, reg_covar=0.0)
        agree("scikit-learn", float(ours.loglik) / len(x), float(theirs.score(x)), AGREEMENT[x.dtype.name])


def gmmx_task(x: jax.Array, start: MixtureParams) -> Callable[[], Any] | None:
    """The same fit by gmmx; None, and one line why, where it cannot do it."""
    try:
        from gmmx import EMFitter, GaussianMixtureModelJax

        components = start.components
        mixture = GaussianMixtureModelJax.from_squeezed(
            means=components.mean, covariances=components.covariance, weights=start.weights
        )
        fitter = EMFitter(max_iter=STEPS, tol=-1.0, reg_covar=0.0)
        jax.block_until_ready(fitter.fit(x, mixture).log_likelihood)
    except Exception as error:
        print(f"  gmmx is left out in {x.dtype}: {type(error).__name__}: {str(error).splitlines()[0]}")
        return None
    return lambda: fitter.fit(x, mixture).gmm


def one_fit(quick: bool, repeats: int) -> list[Row]:
    """Claim a."""
    rows, columns, count = (20_000, 16, 16) if quick else (100_000, 16, 16)
    table: list[Row] = []
    for dtype, target in (("float32", 6), ("float64", 4)):
        print(f"\n(a) one fit, N = {rows}, D = {columns}, K = {count}, full, {STEPS} steps, {dtype}")
        x = clusters(rows, columns, count, spread=1.0, dtype=dtype)
        start = start_at(random_row_starts(x, count, 1), 0)
        with jax.enable_x64(dtype == "float64"):
            table += _one_fit(x, start, f"{target}x", repeats)
    return table


def _one_fit(x: np.ndarray, start: MixtureParams, target: str, repeats: int, claim: str = "a") -> list[Row]:
    model, on_device, device_start = Mixture(Normal("full"), len(start.weights)), jnp.asarray(x), jax.device_put(start)
    tasks: dict[str, Callable[[], Any]] = {
        "jaxem": lambda: em_fit(model, device_start, on_device, tol=-1.0, max_steps=STEPS),
        "scikit-learn": lambda: fit_sklearn(x, start, tol=0.0, max_steps=STEPS, reg_covar=0.0),
    }
    # Its batched LAPACK calls can wait for each other for ever in so many columns.
    gmmx = gmmx_task(on_device, device_start) if claim == "a" else None
    if gmmx is not None:
        tasks["gmmx"] = gmmx
    timings, results = take_turns(tasks, repeats)

    ours = results["jaxem"]
    steps = {"jaxem": int(ours.num_steps), "scikit-learn": results["scikit-learn"].n_iter_}
    if set(steps.values()) != {STEPS}:
        sys.exit(f"not the same work: steps taken {steps}, {STEPS} asked for")
    loglik = float(ours.loglik) / len(x)
    agree("scikit-learn", loglik, float(results["scikit-learn"].score(x)), AGREEMENT[x.dtype.name])
    if gmmx is not None:
        agree("gmmx", loglik, float(results["gmmx"].score(on_device)), AGREEMENT[x.dtype.name])

    table = []
    for peer in tasks:
        if peer == "jaxem":
            continue
        ratio = timings[peer].median / timings["jaxem"].median
        print(f"  ratio to {peer}: {ratio:.1f}x")
        table.append(
            Row(
                claim=f"({claim}) one fit, N = {len(x)}, D = {x.shape[1]}, K = {len(start.weights)}, {x.dtype.name}",
                ours=f"{1e3 * timings['jaxem'].median / STEPS:.1f} ms a step",
                peer=f"{peer}, {1e3 * timings[peer].median / STEPS:.1f} ms a step",
                ratio=f"{ratio:.1f}x",
                target=target if peer == "scikit-learn" else "",
            )
        )
    return table


@dataclass(frozen=True)
class ManyRestarts:
    """What claims b and c share: the timings, and the ratio per restart and step."""

    timings: dict[str, Timing]
    results: dict[str, Any]
    row: Row
    peer: str
    peer_per_restart: float


def many_restarts(
    claim: str, x: np.ndarray, count: int, restarts: int, peers: int, target: str, repeats: int, **screened: Screen
) -> ManyRestarts:
    """All restarts by jaxem, as they are and under each screen; the first `peers` of them by scikit-learn."""
    starts = random_row_starts(x, count, restarts)
    agree_step_by_step(x, starts)
    model, on_device, device_starts = Mixture(Normal("full"), count), jnp.asarray(x), jax.device_put(starts)

    def ours(screen: Screen | None) -> Any:
        return fit_restarts(model, None, on_device, init=device_starts, tol=TOL, max_steps=MAX_STEPS, screen=screen)

    def theirs() -> list[GaussianMixture]:
        # The default reg_covar, without which one collapsing start would raise.
        return [fit_sklearn(x, start_at(starts, i), TOL, MAX_STEPS, reg_covar=1e-6) for i in range(peers)]

    def theirs_unthreaded() -> list[GaussianMixture]:
        with threadpool_limits(1):
            return theirs()

    tasks = {"jaxem": lambda: ours(None), "scikit-learn": theirs, "scikit-learn, one thread": theirs_unthreaded}
    tasks |= {name: (lambda screen=screen: ours(screen)) for name, screen in screened.items()}
    timings, results = take_turns(tasks, repeats)

    peer = min((name for name in tasks if name.startswith("scikit-learn")), key=lambda name: timings[name].median)
    print(f"  the faster of the two ways to run scikit-learn counts: {peer}")
    runs, fitted = results["jaxem"], results[peer]
    # Passes, as they count the steps of a coarse bulk too.
    our_steps, their_steps = int(jnp.sum(runs.num_passes)), sum(model.n_iter_ for model in fitted)
    per_step = timings["jaxem"].median / our_steps
    peer_per_step = timings[peer].median / their_steps
    per_restart, peer_per_restart = timings["jaxem"].median / restarts, timings[peer].median / peers
    ended = ", ".join(f"{int(n)} {name}" for name, n in _endings(runs.status).items())
    print(
        f"  jaxem: {restarts} restarts ({ended}), {our_steps / restarts:.1f} steps each, {int(runs.hits())} at the best"
    )
    print(f"  scikit-learn: {peers} restarts, {their_steps / peers:.1f} steps each")
    _compare_endings(runs, fitted, x)
    ratio = peer_per_step / per_step
    print(f"  per restart and step: {1e6 * per_step:.2f} us against {1e6 * peer_per_step:.1f} us: {ratio:.1f}x")
    print(f"  per restart: {1e3 * per_restart:.3f} ms against {1e3 * peer_per_restart:.2f} ms: ", end="")
    print(f"{peer_per_restart / per_restart:.1f}x")
    row = Row(
        claim=f"{claim}, per restart and step",
        ours=f"{1e6 * per_step:.2f} us",
        peer=f"{peer}, {1e6 * peer_per_step:.0f} us",
        ratio=f"{ratio:.1f}x",
        target=target,
    )
    return ManyRestarts(timings, results, row, peer, peer_per_restart)


def _endings(status: jax.Array) -> dict[str, int]:
    from jaxem import Status

    values, counts = np.unique(np.asarray(status), return_counts=True)
    return {Status(int(value)).name: int(n) for value, n in zip(values, counts, strict=True)}


def _compare_endings(runs: Any, fitted: Sequence[GaussianMixture], x: np.ndarray) -> None:
    """Where the same starts ended: close calls may part ways, so this is told and not asserted."""
    ours = np.asarray(runs.objective)[: len(fitted)] / len(x)
    theirs = np.array([model.score(x) for model in fitted])
    same = int(np.sum(np.abs(ours - theirs) <= 1e-3))
    print(f"  endings within 1e-3 per row of each other: {same} of {len(fitted)}; ", end="")
    print(f"best of these: jaxem {ours.max():.5f}, scikit-learn {theirs.max():.5f}; ", end="")
    print(f"jaxem ahead by {np.median(ours - theirs):.1e} (median)")


def overlapping_restarts(quick: bool, repeats: int) -> list[Row]:
    """Claim b."""
    restarts, rows, peers = (16, 500, 3) if quick else (256, 2000, 12)
    print(f"\n(b) {restarts} restarts, N = {rows}, D = 4, K = 8 overlapping clusters, full, float32, {SCREEN}")
    x = clusters(rows, 4, 8, spread=1.5, dtype="float32")
    claim = f"(b) {restarts} restarts, N = {rows}, D = 4, K = 8"
    many = many_restarts(claim, x, 8, restarts, peers, "20x", repeats, screened=SCREEN)

    per_restart = many.timings["screened"].median / restarts
    ratio = many.peer_per_restart / per_restart
    best, screened_best = (float(many.results[name].best.objective) / rows for name in ("jaxem", "screened"))
    print(f"  screened, per restart: {1e3 * per_restart:.3f} ms against {1e3 * many.peer_per_restart:.2f} ms: ", end="")
    print(f"{ratio:.1f}x; steps {int(jnp.sum(many.results['screened'].num_steps))}")
    print(f"  best objective per row: unscreened {best:.6f}, screened {screened_best:.6f}, ", end="")
    print(f"lost by the screen {best - screened_best:.1e} (allowed 1e-3)")
    screened = Row(
        claim=f"{claim}, screened ({SCREEN.steps} steps, best {SCREEN.keep:.1%}), per restart",
        ours=f"{1e3 * per_restart:.2f} ms, best objective per row lower by {best - screened_best:.0e}",
        peer=f"{many.peer}, {1e3 * many.peer_per_restart:.0f} ms",
        ratio=f"{ratio:.1f}x",
        target="60x, at most 1e-3 lower",
    )
    return [many.row, screened]


def faithful_restarts(quick: bool, repeats: int) -> list[Row]:
    """Claim c."""
    restarts, peers = (64, 6) if quick else (4096, 48)
    print(f"\n(c) {restarts} restarts, Old Faithful (272 x 2, raw units), K = 3, full, float32, unscreened")
    x = np.asarray(faithful(), "float32")
    return [many_restarts(f"(c) {restarts} restarts, Old Faithful, K = 3", x, 3, restarts, peers, "50x", repeats).row]


def resident(field: str) -> int:
    """Bytes resident now ("VmRSS") or at most since the last reset ("VmHWM"); Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def measure_memory(who: str, rows: int, columns: int, count: int, steps: int) -> dict[str, float]:
    """In a process of its own: resident MB before the data, with them, and the peak of one fit."""

    def fit(x: np.ndarray | jax.Array, max_steps: int) -> None:
        if who == "jaxem":
            model = Mixture(Normal("full"), count)
            start = model.init(jax.random.key(0), x)
            jax.block_until_ready(em_fit(model, start, x, tol=-1.0, max_steps=max_steps))
        else:
            fit_sklearn(x, start_at(random_row_starts(x, count, 1), 0), tol=0.0, max_steps=max_steps, reg_covar=1e-6)

    def data(rows: int) -> np.ndarray | jax.Array:
        x = clusters(rows, columns, count, spread=2.0, dtype="float32")
        return jax.block_until_ready(jnp.asarray(x)) if who == "jaxem" else x

    fit(data(1000), 1)  # loads what any fit loads
    empty = resident("VmRSS")
    x = data(rows)
    with_data = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to what is resident now
    fit(x, steps)
    peak = resident("VmHWM")
    return {"data": x.nbytes / MB, "empty": empty / MB, "with_data": with_data / MB, "peak": peak / MB}


def peak_memory(quick: bool, repeats: int) -> list[Row]:
    """Claim d, and the same for scikit-learn (two steps from a given start, no initialisation)."""
    rows, columns, count = (200_000 if quick else 2_000_000), 8, 32
    print(f"\n(d) peak memory, N = {rows}, D = {columns}, K = {count}, full, float32")
    if not Path("/proc/self/clear_refs").exists():
        print("  left out: needs Linux's /proc")
        return []
    above: dict[str, float] = {}
    for who, steps in (("jaxem", 3), ("scikit-learn", 2)):
        command = [sys.executable, __file__, "--memory", json.dumps([who, rows, columns, count, steps])]
        child = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        data = child["data"]
        # Against the process before it held the data, so that a hidden copy of them would count.
        above[who] = child["peak"] - child["empty"] - data
        print(f"  {who}: data {data:.0f} MB; resident {child['empty']:.0f} MB before them, ", end="")
        print(f"{child['with_data']:.0f} MB with them, peak of the fit {child['peak']:.0f} MB: ", end="")
        print(f"the data plus {above[who]:.0f} MB")
    return [
        Row(
            claim=f"(d) peak memory of a fit, N = {rows}, D = {columns}, K = {count}, float32 ({data:.0f} MB of data)",
            ours=f"data + {above['jaxem']:.0f} MB",
            peer=f"scikit-learn, data + {above['scikit-learn']:.0f} MB",
            ratio=f"{above['scikit-learn'] / above['jaxem']:.1f}x",
            target="data + 300 MB",
        )
    ]


def many_columns(quick: bool, repeats: int) -> list[Row]:
    """Claim e. Floor: the two products of a step, whitening and second moments, are 4 N K D² operations."""
    table: list[Row] = []
    for columns in (50, 100):
        rows, count = (1000 if quick else 10_000), 8
        work = 4 * rows * count * columns**2
        print(f"\n(e) one fit, N = {rows}, D = {columns}, K = {count}, full, {STEPS} steps, float32; ", end="")
        print(f"{work / 1e9:.2f} G operations a step, {1e3 * work / PEAK:.0f} ms at {PEAK / 1e9:.0f} G a second")
        x = clusters(rows, columns, count, spread=1.0, dtype="float32")
        start = start_at(random_row_starts(x, count, 1), 0)
        # A row in so many columns is near few others, and scikit-learn raises for a component without D of them:
        # means of random tenths of the rows are a start from which none is ever lost.
        chosen = np.random.default_rng(1).permutation(rows).reshape(10, -1)[:count]
        start.components.mean[:] = x[chosen].mean(axis=1)
        table += _one_fit(x, start, "3x", repeats, claim="e")
    return table


CLAIMS: dict[str, Callable[[bool, int], list[Row]]] = {
    "a": one_fit,
    "b": overlapping_restarts,
    "c": faithful_restarts,
    "d": peak_memory,
    "e": many_columns,
}


PACKAGES = ("jaxem", "jax", "scikit-learn", "gmmx", "numpy")

if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        print(json.dumps(measure_memory(*json.loads(sys.argv[2]))))
    else:
        measure(__doc__.splitlines()[0], CLAIMS, PACKAGES, repeats=5)
