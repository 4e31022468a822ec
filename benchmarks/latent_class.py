"""Latent class analysis against StepMix: 20 categorical columns, a tenth of the entries missing, many restarts.

    python benchmarks/latent_class.py [--rows 20000] [--restarts 64] [--repeats 3]

N = 20k rows, 20 columns of 2 to 5 values, 10 % missing at random, K = 6 classes, float64 on both sides (StepMix
knows no other) and float32 beside it; jaxem is a mixture of `Categorical`, StepMix measures "categorical_nan".

How it is measured. One process; the contestants take turns; medians over the repeats; compilation is shown apart.
Every restart takes exactly STEPS EM steps on both sides, so that stopping rules do not enter. StepMix runs its
restarts one by one, as its n_init does: a few are timed, and their mean stands for all. Before a ratio is printed,
both sides' log-likelihoods after the same number of steps from the same start are compared.
"""

import argparse
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from stepmix.stepmix import StepMix
from timing import take_turns

from jaxem import Categorical, CategoricalParams, Mixture, MixtureParams, em_fit, fit_restarts

STEPS = 20
CLASSES = 6
NUM_VALUES = tuple(int(n) for n in np.resize([2, 3, 4, 5], 20))
PEER_RESTARTS = 2


def table(rows: int) -> np.ndarray:
    """Answers (N, 20) as whole numbers, -1 where missing."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, rows)
    columns = []
    for count in NUM_VALUES:
        cumulated = np.cumsum(rng.dirichlet(np.full(count, 0.7), CLASSES), axis=1)[labels]
        columns.append(np.minimum((rng.random(rows)[:, None] > cumulated).sum(axis=1), count - 1))
    x = np.stack(columns, axis=1)
    return np.where(rng.random(x.shape) < 0.1, -1, x).astype(np.int32)


def peer(x: np.ndarray, steps: int, seed: int, restarts: int = 1) -> StepMix:
    """A fit of StepMix that takes exactly so many steps."""
    model = StepMix(
        n_components=CLASSES,
        measurement="categorical_nan",
        max_iter=steps,
        abs_tol=0.0,
        n_init=restarts,
        random_state=seed,
        progress_bar=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.fit(x)


def as_params(fit: StepMix, dtype: str) -> MixtureParams:
    """StepMix's parameters as jaxem's."""
    found = fit.get_parameters()
    shape = (CLASSES, len(NUM_VALUES), max(NUM_VALUES))
    return MixtureParams(
        weights=jnp.asarray(found["weights"], dtype),
        components=CategoricalParams(probability=jnp.asarray(found["measurement"]["pis"], dtype).reshape(shape)),
    )


def compare(rows: int, restarts: int, repeats: int) -> None:
    x = table(rows)
    as_floats = np.where(x < 0, np.nan, x)
    model = Mixture(Categorical(NUM_VALUES), CLASSES)
    key, seeds = jax.random.key(0), itertools.count()

    for dtype in ("float64", "float32"):
        with jax.enable_x64(dtype == "float64"):
            start = as_params(peer(as_floats, 1, 0), dtype)
            ours = em_fit(model, start, x, tol=-1.0, max_steps=STEPS - 1)
            theirs = peer(as_floats, STEPS, 0).score(as_floats)
            gap = abs(float(ours.objective) / rows - theirs)
            print(f"{dtype}: log-likelihoods per row from one start, {STEPS} steps: they differ by {gap:.1e}")
            assert gap < (1e-9 if dtype == "float64" else 1e-4), "the two sides do not compute the same"

            tasks = {
                "jaxem": lambda: fit_restarts(model, key, x, num_restarts=restarts, tol=-1.0, max_steps=STEPS),
                "StepMix": lambda: peer(as_floats, STEPS, next(seeds), PEER_RESTARTS),
            }
            timings, _ = take_turns(tasks, repeats)
            ours_each = timings["jaxem"].median / restarts / STEPS
            theirs_each = timings["StepMix"].median / PEER_RESTARTS / STEPS
            print(f"  a restart and step: jaxem {1e3 * ours_each:.2f} ms, StepMix {1e3 * theirs_each:.2f} ms: ", end="")
            print(f"{theirs_each / ours_each:.1f}x")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--restarts", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    compare(given.rows, given.restarts, given.repeats)
