"""Continuous latents against peers: whole fits, to their likelihood or better.

    python benchmarks/latents.py [--only a,b] [--quick] [--repeats N]

a  factor analysis: N = 50k, D = 100, 10 factors, from rows, against scikit-learn's FactorAnalysis
   Its floor: N D² multiplications for the covariance (10 ms at 100 GFLOP/s, two passes over 40 MB another 4), and
   some 20 steps of 8 D² Q (a tenth of a millisecond each).
b  a multivariate normal with missing values: N = 20k, D = 20, a fifth of the entries missing, 11 thousand patterns,
   against EM in NumPy, pattern by pattern, from the same start
   Its floor: N D³ multiply-adds a step, of matrices in fast memory: 160 M, some 20 ms of one core.

How it is measured. One process; the contestants take turns; medians over the repeats, compilation apart. Starts are
drawn outside of what is timed, and jaxem is asked for the last 1e-7 nats a row. The log-likelihoods reached are
printed, and a fit that ends below its peer stops the script. scikit-learn knows float64 alone, and one start.
Of b the peer takes two steps, in float64, the patterns sorted out before; what these lead to is compared.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import sklearn.decomposition
from timing import Row, measure, take_turns

from jaxem import FactorAnalysis, MultivariateNormal, em_fit


def factors(quick: bool, repeats: int) -> list[Row]:
    rows, columns, latents = (2000, 20, 3) if quick else (50_000, 100, 10)
    rng = np.random.default_rng(0)
    loadings, noise = rng.normal(size=(columns, latents)), rng.uniform(0.5, 3.0, columns)
    x = rng.normal(size=(rows, latents)) @ loadings.T + np.sqrt(noise) * rng.normal(size=(rows, columns))
    model, found = FactorAnalysis(latents), []
    for dtype in ("float64", "float32"):
        with jax.enable_x64(dtype == "float64"):
            ours = jax.block_until_ready(jnp.asarray(x, dtype))
            start = model.init(jax.random.key(0), ours)
            print(f"factor analysis, N = {rows:,}, D = {columns}, {latents} factors, {dtype}")
            tasks = {
                "jaxem": functools.partial(em_fit, model, start, ours, tol=1e-7),
                "scikit-learn": lambda: sklearn.decomposition.FactorAnalysis(latents).fit(x),
            }
            timings, fits = take_turns(tasks, repeats)
            fit, peer = fits["jaxem"].check(), fits["scikit-learn"]
            reached, theirs = float(fit.objective) / rows, peer.loglike_[-1] / rows
            print(f"  log-likelihood per row: jaxem {reached:.7f} after {int(fit.num_steps)} steps, ", end="")
            print(f"scikit-learn {theirs:.7f} after {peer.n_iter_}")
            assert reached >= theirs - (1e-7 if dtype == "float64" else 1e-4), "the fit ends below its peer's"
            ratio = timings["scikit-learn"].median / timings["jaxem"].median
            found.append(
                Row(
                    f"factor analysis, N = {rows:,}, D = {columns}, {latents} factors, {dtype}",
                    f"{1e3 * timings['jaxem'].median:.1f} ms",
                    f"scikit-learn, {timings['scikit-learn'].median:.2f} s",
                    f"{ratio:.0f}x",
                    "50x",
                )
            )
    return found


def patterns(x) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Rows that share what is observed of them: their numbers, the columns that are, and those that are not."""
    seen = ~np.isnan(x)
    kinds, which = np.unique(seen, axis=0, return_inverse=True)
    order, ends = np.argsort(which.ravel(), kind="stable"), np.cumsum(np.bincount(which.ravel()))
    rows = np.split(order, ends[:-1])
    return [(own, np.flatnonzero(kind), np.flatnonzero(~kind)) for own, kind in zip(rows, kinds, strict=True)]


def by_patterns(x, groups, mean, covariance, steps: int):
    """EM in NumPy, pattern by pattern (Little & Rubin 2002, section 11.2)."""
    for _ in range(steps):
        away, spread = np.zeros_like(x), np.zeros_like(covariance)
        for rows, seen, gone in groups:
            away[np.ix_(rows, seen)] = x[np.ix_(rows, seen)] - mean[seen]
            slopes = np.linalg.solve(covariance[np.ix_(seen, seen)], covariance[np.ix_(seen, gone)])
            away[np.ix_(rows, gone)] = away[np.ix_(rows, seen)] @ slopes
            left = covariance[np.ix_(gone, gone)] - covariance[np.ix_(gone, seen)] @ slopes
            spread[np.ix_(gone, gone)] += len(rows) * left
        shift = away.mean(axis=0)
        mean = mean + shift
        covariance = (away.T @ away + spread) / len(x) - np.outer(shift, shift)
    return mean, covariance


def missing(quick: bool, repeats: int) -> list[Row]:
    rows, columns, steps = (500, 6, 2) if quick else (20_000, 20, 2)
    rng = np.random.default_rng(0)
    loadings, noise = rng.normal(size=(columns, 3)), rng.uniform(0.5, 2.0, columns)
    x = rng.normal(size=(rows, 3)) @ loadings.T + np.sqrt(noise) * rng.normal(size=(rows, columns)) + 5
    x[rng.random(x.shape) < 0.2] = np.nan
    groups, model, found = patterns(x), MultivariateNormal(), []
    for dtype in ("float64", "float32"):
        with jax.enable_x64(dtype == "float64"):
            ours = jax.block_until_ready(jnp.asarray(x, dtype))
            start = model.init(jax.random.key(0), ours)
            name = f"normal with missing values, N = {rows:,}, D = {columns}, {dtype}"
            print(f"{name}, {len(groups):,} patterns")
            first = (np.asarray(start.mean, float), np.asarray(start.covariance, float))
            tasks = {
                "jaxem, to convergence": functools.partial(em_fit, model, start, ours),
                f"jaxem, {steps} steps": functools.partial(em_fit, model, start, ours, tol=-1.0, max_steps=steps),
                f"NumPy, {steps} steps": functools.partial(by_patterns, x, groups, *first, steps),
            }
            timings, results = take_turns(tasks, repeats)
            fit, some, peer = results.values()
            gap = np.max(np.abs(np.asarray(some.params.covariance) - peer[1])) / np.max(np.abs(peer[1]))
            print(f"  {int(fit.num_steps)} steps to convergence; after {steps} the covariances differ by {gap:.1e}")
            assert gap < (1e-9 if dtype == "float64" else 1e-4), "the steps are not the peer's"
            whole, _, theirs = (timing.median for timing in timings.values())
            step, other = whole / (int(fit.num_steps) + 1), theirs / steps
            claim, target = f"{name}: a step of {int(fit.num_steps)}", "a fit under 15 s"
            ours_told = f"{1e3 * step:.1f} ms, the fit {whole:.2f} s"
            found.append(Row(claim, ours_told, f"NumPy by patterns, {other:.2f} s", f"{other / step:.0f}x", target))
    return found


if __name__ == "__main__":
    measure(__doc__.splitlines()[0], {"a": factors, "b": missing}, ("jax", "numpy", "scikit-learn"), repeats=3)
