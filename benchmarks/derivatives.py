"""Derivatives of fits: the cost of a gradient beside that of its fit, and beside differentiating every step.

    python benchmarks/derivatives.py [--only a,b] [--quick] [--repeats 5]

a   N = 10,000, D = 20, K = 10, full covariances: the gradient of one mean in all rows, the fit included, against the
    fit alone, to convergence at the default tolerance: at most twice the fit, that is, no more than the fit on top
b   the same with D = 4, K = 4, against the gradient of as many steps unrolled: time, and temporaries of the program

How it is measured. One process, contestants in turn, medians over the repeats, compilation apart. Temporaries are what
the compiler sets aside for a program, which does not count arguments and results. float32.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from timing import Row, measure, take_turns

from jaxem import Mixture, Normal, em_fit


def problem(rows: int, columns: int, components: int):
    """A mixture with overlap, its start and its rows."""
    rng = np.random.default_rng(0)
    centres = 2 * rng.normal(size=(components, columns)) / np.sqrt(columns / 4)
    x = centres[rng.integers(components, size=rows)] + rng.normal(size=(rows, columns))
    x = jnp.asarray(x, jnp.float32)
    model = Mixture(Normal("full"), components)
    return model, model.init(jax.random.key(0), x), x


def one_mean(x, model, start, **limits):
    """A number that the whole fit has a part in."""
    return em_fit(model, start, x, **limits).params.components.mean[0, 0]


def beside_the_fit(quick: bool, repeats: int) -> list[Row]:
    rows, columns, components = (500, 4, 3) if quick else (10_000, 20, 10)
    model, start, x = problem(rows, columns, components)
    fit = jax.jit(lambda x: em_fit(model, start, x))
    slope = jax.jit(jax.grad(functools.partial(one_mean, model=model, start=start)))
    result = fit(x)
    print(f"{rows} x {columns}, {components} components: {int(result.num_steps)} steps, {result.status}")
    timings, found = take_turns({"fit": lambda: fit(x), "gradient": lambda: slope(x)}, repeats)
    assert np.all(np.isfinite(found["gradient"])), "the fit has not converged"
    ratio = timings["gradient"].median / timings["fit"].median
    return [
        Row(
            f"gradient of a fit, its fit included, N = {rows:,}, D = {columns}, K = {components}",
            f"{1e3 * timings['gradient'].median:.0f} ms",
            f"the fit alone, {1e3 * timings['fit'].median:.0f} ms",
            f"{ratio:.2f}x",
            "at most 2x",
        )
    ]


def beside_all_steps(quick: bool, repeats: int) -> list[Row]:
    _, start, x = problem(500 if quick else 10_000, 4, 4)
    # Rows are complete, and that is said: else room is set aside for what is expected of missing entries.
    model = Mixture(Normal("full", missing=False), 4)
    steps = int(em_fit(model, start, x).num_steps)
    of_limit = jax.jit(jax.grad(functools.partial(one_mean, model=model, start=start))).lower(x).compile()
    of_steps = functools.partial(one_mean, model=model, start=start, tol=-1.0, max_steps=steps)
    unrolled = jax.jit(jax.grad(of_steps)).lower(x).compile()
    print(f"{len(x)} x 4, 4 components, {steps} steps")
    timings, _ = take_turns({"limit": lambda: of_limit(x), "unrolled": lambda: unrolled(x)}, repeats)
    memory = [each.memory_analysis().temp_size_in_bytes / 2**20 for each in (of_limit, unrolled)]
    return [
        Row(
            f"gradient of a limit, N = {len(x):,}, D = 4, K = 4, {steps} steps",
            f"{1e3 * timings['limit'].median:.0f} ms, {memory[0]:.1f} MiB",
            f"unrolled, {1e3 * timings['unrolled'].median:.0f} ms, {memory[1]:.1f} MiB",
            f"{timings['unrolled'].median / timings['limit'].median:.1f}x; {memory[1] / memory[0]:.1f}x",
            "",
        )
    ]


if __name__ == "__main__":
    measure(__doc__.splitlines()[0], {"a": beside_the_fit, "b": beside_all_steps}, ("jax", "numpy"), repeats=5)
