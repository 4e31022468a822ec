"""Many small data sets of different length, each fitted by itself: one call of `vmap(em_fit)`.

    python benchmarks/many_data_sets.py [--quick]

10,000 data sets of 20 to 60 rows, padded by rows of weight 0.
"""

import argparse
import time

import jax
import numpy as np
from timing import machine

from jaxem import Mixture, Normal, em_fit


def many(count):
    """`vmap(em_fit)` over data sets of different length, padded by rows of weight 0."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 61, count)
    inside = np.arange(60)[None] < lengths[:, None]
    labels = rng.random((count, 60)) < 0.4
    x = np.where(inside, rng.normal(size=(count, 60)) + 4 * labels, 0.0)[..., None].astype(np.float32)
    weights = inside.astype(np.float32)
    model = Mixture(Normal("tied", missing=False), 2)

    def one(key, x, weights):
        return em_fit(model, model.init(key, x, weights), x, weights, max_steps=200)

    run = jax.jit(jax.vmap(one))
    keys, seconds = jax.random.split(jax.random.key(0), count), []
    for _ in range(4):
        begin = time.perf_counter()
        fit = jax.block_until_ready(run(keys, x, weights))
        seconds.append(time.perf_counter() - begin)
    each = np.median(seconds[1:])
    print(f"{count:,} data sets of 20 to 60 rows: {each:.3f} s, {1e6 * each / count:.0f} µs each", end=", ")
    print(f"first call {seconds[0] - each:.1f} s more; {np.mean(fit.converged):.1%} CONVERGED")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few data sets: does the script run?")
    options = parser.parse_args()
    print(machine(("jax", "numpy")))
    many(200 if options.quick else 10_000)


if __name__ == "__main__":
    main()
