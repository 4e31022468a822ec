"""k-means against scikit-learn's Lloyd: the speed that the README claims.

    python benchmarks/kmeans.py [--only a,b,c] [--quick] [--repeats 7]

Claims, each a row of the table printed at the end; ratios are scikit-learn's time over jaxem's:

a   one fit, N = 131072, D = 16, K = 64, float32, exactly 10 steps from one start: at least 0.6x
b   one fit, N = 131072, D = 4, K = 8, float32, exactly 10 steps from one start: at least 0.9x
c   64 restarts, N = 5000, D = 8, K = 10, float32, each run to its own fixed point: at least 0.7x

How it is measured. One process; the contestants take turns, so that a slow spell of the machine hits all; the
ratio is the median of the ratios within a turn. Compilation is shown apart: first call minus median of the later
ones. Both sides get the same data, dtype and starts, and whatever threads they take by default: scikit-learn uses
all cores through OpenMP, which suffers where other programs want them too, so its time on one thread is shown as
well. Everything that scikit-learn's `fit` does is counted on its side, as is all of `em_fit` on jaxem's. A fit of
S steps is S assignments and S means, and one more assignment at the end, on both sides.

Many restarts: scikit-learn runs them one by one, as n_init would. Both sides run every restart until nothing
changes. scikit-learn knows so from labels that repeat; jaxem's stopping rule sees only the objective, waits a few
more steps, and those count in "total". "Per restart and step" divides each side's time by the steps that it took.

Before a ratio is printed, both sides' inertias from the same start are compared: a disagreement ends the script.
"""

import statistics
import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from sklearn.cluster import KMeans as SklearnKMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits
from timing import Row, Timing, measure, take_turns

from jaxem import KMeans, KMeansParams, em_fit, fit_restarts

STEPS = 10
MAX_STEPS = 500
# Largest relative difference of inertias after the same steps from the same start: ties and near ties differ.
AGREEMENT = 1e-4


def ratio(timings: dict[str, Timing], peer: str) -> float:
    """How many times longer the peer took: the median over the turns."""
    return statistics.median(p / o for p, o in zip(timings[peer].later, timings["jaxem"].later, strict=True))


def clusters(rows: int, columns: int, count: int, seed: int = 0) -> np.ndarray:
    """Rows from overlapping spherical clusters, float32."""
    rng = np.random.default_rng(seed)
    centers = 2 * rng.standard_normal((count, columns))
    return (centers[rng.integers(count, size=rows)] + rng.standard_normal((rows, columns))).astype("float32")


def starts(x: np.ndarray, count: int, restarts: int, seed: int = 1) -> np.ndarray:
    """Distinct rows as centres: (R, K, D)."""
    rng = np.random.default_rng(seed)
    return np.stack([x[rng.choice(len(x), count, replace=False)] for _ in range(restarts)])


def fit_sklearn(x: np.ndarray, start: np.ndarray, max_steps: int) -> SklearnKMeans:
    """Lloyd from exactly this start, until nothing changes."""
    model = SklearnKMeans(len(start), init=start, n_init=1, max_iter=max_steps, tol=0, algorithm="lloyd")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(x)


def on_one_thread(task: Callable[[], Any]) -> Callable[[], Any]:
    def limited() -> Any:
        with threadpool_limits(1):
            return task()

    return limited


def agree(ours: float, theirs: float) -> None:
    print(f"  inertia: jaxem {ours:.6g}, scikit-learn {theirs:.6g}")
    if abs(ours - theirs) > AGREEMENT * abs(theirs):
        sys.exit("not the same result: no ratio is told")


def one_fit(name: str, columns: int, count: int, target: str, quick: bool, repeats: int) -> Row:
    rows = 8192 if quick else 131072
    print(f"\n({name}) one fit of {STEPS} steps, N = {rows}, D = {columns}, K = {count}, float32")
    x = clusters(rows, columns, count)
    start = starts(x, count, 1)[0]
    on_device, params = jnp.asarray(x), KMeansParams(centers=jnp.asarray(start))
    tasks = {
        "jaxem": lambda: em_fit(KMeans(count), params, on_device, tol=-1.0, max_steps=STEPS),
        "scikit-learn": lambda: fit_sklearn(x, start, STEPS),
    }
    tasks["scikit-learn, one thread"] = on_one_thread(tasks["scikit-learn"])
    timings, results = take_turns(tasks, repeats)
    steps = {"jaxem": int(results["jaxem"].num_steps), "scikit-learn": results["scikit-learn"].n_iter_}
    if set(steps.values()) != {STEPS}:
        sys.exit(f"not the same work: steps taken {steps}, {STEPS} asked for")
    agree(-float(results["jaxem"].objective), results["scikit-learn"].inertia_)
    per_step = {who: timing.per(STEPS) for who, timing in timings.items()}
    return report(f"({name}) one fit, N = {rows}, D = {columns}, K = {count}", per_step, "ms a step", 1e3, target)


def report(claim: str, timings: dict[str, Timing], unit: str, scale: float, target: str) -> Row:
    both, alone = ratio(timings, "scikit-learn"), ratio(timings, "scikit-learn, one thread")
    print(f"  ratio to scikit-learn: {both:.2f}x; to scikit-learn on one thread: {alone:.2f}x")
    ours, theirs = (scale * timings[who].median for who in ("jaxem", "scikit-learn"))
    peer = f"scikit-learn, {theirs:.3g} {unit}"
    return Row(claim, f"{ours:.3g} {unit}", peer, f"{both:.2f}x (one thread: {alone:.2f}x)", target)


def many_restarts(quick: bool, repeats: int) -> list[Row]:
    restarts, rows = (8, 1000) if quick else (64, 5000)
    print(f"\n(c) {restarts} restarts to their fixed points, N = {rows}, D = 8, K = 10, float32")
    x = clusters(rows, 8, 10)
    centers = starts(x, 10, restarts)
    on_device, params = jnp.asarray(x), KMeansParams(centers=jnp.asarray(centers))
    tasks = {
        "jaxem": lambda: fit_restarts(KMeans(10), None, on_device, init=params, tol=0.0, max_steps=MAX_STEPS),
        "scikit-learn": lambda: [fit_sklearn(x, start, MAX_STEPS) for start in centers],
    }
    tasks["scikit-learn, one thread"] = on_one_thread(tasks["scikit-learn"])
    timings, results = take_turns(tasks, repeats)
    runs, fitted = results["jaxem"], results["scikit-learn"]
    agree(-float(runs.best.objective), min(model.inertia_ for model in fitted))
    same = np.isclose(-np.asarray(runs.objective), [model.inertia_ for model in fitted], rtol=1e-4)
    our_steps, their_steps = int(jnp.sum(runs.num_steps)), sum(model.n_iter_ for model in fitted)
    print(f"  steps each: jaxem {our_steps / restarts:.1f}, scikit-learn {their_steps / restarts:.1f}; ", end="")
    print(f"same ending: {int(np.sum(same))} of {restarts}")
    claim = f"(c) {restarts} restarts, N = {rows}, D = 8, K = 10"
    per_step = {who: timing.per(our_steps if who == "jaxem" else their_steps) for who, timing in timings.items()}
    return [
        report(f"{claim}, total", timings, "s", 1, "0.7x"),
        report(f"{claim}, per restart and step", per_step, "us", 1e6, "0.7x"),
    ]


CLAIMS: dict[str, Callable[[bool, int], list[Row]]] = {
    "a": lambda quick, repeats: [one_fit("a", 16, 64, "0.6x", quick, repeats)],
    "b": lambda quick, repeats: [one_fit("b", 4, 8, "0.9x", quick, repeats)],
    "c": many_restarts,
}


if __name__ == "__main__":
    measure(__doc__.splitlines()[0], CLAIMS, ("jaxem", "jax", "scikit-learn", "numpy"), repeats=7)
