"""Continuous latents against peers: whole fits, to their likelihood or better.

    python benchmarks/latents.py [--only a] [--quick] [--repeats N]

a  factor analysis: N = 50k, D = 100, 10 factors, from rows, against scikit-learn's FactorAnalysis
   Its floor: N D² multiplications for the covariance (10 ms at 100 GFLOP/s, two passes over 40 MB another 4), and
   some 20 steps of 8 D² Q (a tenth of a millisecond each).

How it is measured. One process; the contestants take turns; medians over the repeats, compilation apart. Starts are
drawn outside of what is timed, and jaxem is asked for the last 1e-7 nats a row. The log-likelihoods reached are
printed, and a fit that ends below its peer stops the script. scikit-learn knows float64 alone, and one start.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import sklearn.decomposition
from timing import Row, measure, take_turns

from jaxem import FactorAnalysis, em_fit


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


if __name__ == "__main__":
    measure(__doc__.splitlines()[0], {"a": factors}, ("jax", "numpy", "scikit-learn"), repeats=3)
