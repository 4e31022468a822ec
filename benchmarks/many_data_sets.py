"""Many small data sets of different length, each fitted by itself, in one program.

    python benchmarks/many_data_sets.py [--quick] [--repeats 3]

10,000 data sets of 20 to 60 rows, padded by rows of weight 0; two normals with one variance, at most 200 steps. Under
`vmap` all of them go on until the slowest has ended, so that most steps are for nothing, and all that a fit carries
passes through memory at every step. `lax.map(fit, data, batch_size=16)` is `vmap` over few at a time: it waits for the
slowest of these, in the nearest cache. The peer is scikit-learn in a Python loop, over the first 200 of them.

How it is measured. One process, contestants in turn, medians over the repeats, compilation apart. float32; the peer
has its own precision, tolerance and start.
"""

import functools
import warnings

import jax
import numpy as np
from timing import Row, measure, take_turns

from jaxem import Mixture, Normal, em_fit

MODEL, ROWS, PEERS = Mixture(Normal("tied", missing=False), 2), 60, 200


def data_sets(count):
    """Rows (count, ROWS, 1), 0 where there is none, and which there are (count, ROWS)."""
    rng = np.random.default_rng(0)
    inside = np.arange(ROWS)[None] < rng.integers(20, ROWS + 1, count)[:, None]
    labels = rng.random((count, ROWS)) < 0.4
    x = np.where(inside, rng.normal(size=(count, ROWS)) + 4 * labels, 0.0)[..., None]
    return x.astype(np.float32), inside


def fit(key, x, weights):
    return em_fit(MODEL, MODEL.init(key, x, weights), x, weights, max_steps=200)


@jax.jit
def all_at_once(*data):
    return jax.vmap(fit)(*data)


@functools.partial(jax.jit, static_argnames="size")
def few_at_a_time(*data, size):
    return jax.lax.map(lambda each: fit(*each), data, batch_size=size)


def one_by_one(x, inside):
    """scikit-learn on every data set."""
    from sklearn.mixture import GaussianMixture

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [
            GaussianMixture(2, covariance_type="tied", max_iter=200, random_state=0).fit(rows[there]).lower_bound_
            for rows, there in zip(x, inside, strict=True)
        ]


def many(quick, repeats):
    count = PEERS if quick else 10_000
    x, inside = data_sets(count)
    data = jax.random.split(jax.random.key(0), count), x, inside.astype(np.float32)
    tasks = {
        "at once": lambda: all_at_once(*data),
        "16 at a time": lambda: few_at_a_time(*data, size=16),
        "scikit-learn": lambda: one_by_one(x[:PEERS], inside[:PEERS]),
    }
    timings, found = take_turns(tasks, repeats)
    steps = found["16 at a time"].num_steps
    print(
        f"  CONVERGED: {np.mean(found['16 at a time'].converged):.1%}; steps: median {np.median(steps):.0f}", end=", "
    )
    print(f"mean {np.mean(steps):.1f}, most {np.max(steps)}")
    few, once = (timings[name].per(count).median for name in ("16 at a time", "at once"))
    peer = timings["scikit-learn"].per(PEERS).median
    return [
        Row(
            f"{count:,} data sets of 20 to 60 rows",
            f"lax.map, 16 at a time, {1e6 * few:.0f} µs each",
            f"{name}, {1e6 * seconds:.0f} µs each",
            f"{seconds / few:.1f}x",
            "",
        )
        for name, seconds in (("vmap over all", once), ("scikit-learn in a loop", peer))
    ]


if __name__ == "__main__":
    measure(__doc__.splitlines()[0], {"a": many}, ("jax", "numpy", "scikit-learn"), repeats=3)
