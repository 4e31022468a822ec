"""CONVERGED means it: what is left at the end of a fit, told by a longer fit in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxem import (
    Bernoulli,
    EMError,
    Mixture,
    Normal,
    Poisson,
    Status,
    annealed_em,
    datasets,
    em_fit,
    generalized_em,
    squarem,
    stepwise_em,
)
from jaxem.em import EM

# One form and no missing entries: a third of the code to compile.
NORMAL = Normal("diag", form="whitened", missing=False)
TOL = 1e-6
ROWS = 200
FITS = 96


def _data(name, seed):
    rng = np.random.default_rng(seed)
    if name == "normal":
        label = rng.integers(0, 2, ROWS)
        return np.where(label == 0, rng.normal(0, 1, ROWS), rng.normal(rng.uniform(0.5, 3), 1, ROWS))[:, None]
    if name == "bernoulli":
        probability = rng.uniform(0.1, 0.9, (2, 6))
        return (rng.random((ROWS, 6)) < probability[rng.integers(0, 2, ROWS)]).astype(float)
    return rng.poisson(rng.uniform(1, 15, 4)[rng.integers(0, 4, ROWS)])[:, None].astype(float)


MODELS = {
    "normal": Mixture(NORMAL, 2),
    "bernoulli": Mixture(Bernoulli(), 2),
    "poisson": Mixture(Poisson(), 4),
}


@functools.partial(jax.jit, static_argnames=("max_steps", "algorithm"))
def _fits(model, params, x, tol, max_steps, algorithm=EM()):
    return jax.vmap(lambda p, x: em_fit(model, p, x, tol=tol, max_steps=max_steps, algorithm=algorithm))(params, x)


def _left(model, params, x):
    """Nats a row that a fit in float64 goes on to gain from these parameters."""
    with jax.enable_x64(True):
        start = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), params)
        more = _fits(model, start, jnp.asarray(x, jnp.float64), 1e-9, 10_000, squarem())
        return np.asarray(more.objective - more.history[:, 0]) / x.shape[1]


@pytest.mark.parametrize("name", MODELS)
def test_converged_in_float32_leaves_little(name):
    """Slow fits, whose gains drown in the rounding of the objective long before they are done."""
    model = MODELS[name]
    x = np.stack([_data(name, seed) for seed in range(FITS)]).astype(np.float32)
    starts = jax.jit(jax.vmap(model.init))(jax.random.split(jax.random.key(0), FITS), x)
    result = _fits(model, starts, x, TOL, 3000)
    status = np.asarray(result.status)
    converged = status == Status.CONVERGED
    assert np.mean(converged) > 0.8
    left = _left(model, result.params, x)
    # A few fits cross a plateau, where nothing but a certificate could tell.
    assert np.sum(left[converged] > 10 * TOL) <= 3
    assert np.mean(left[converged] > 2 * TOL) < 0.1


def test_a_million_rows_in_float32_see_a_thousandth_of_a_nat():
    rng = np.random.default_rng(0)
    label = rng.random(1_000_000) < 0.4
    x = np.where(label, rng.normal(0, 1, label.size), rng.normal(3.6, 1, label.size)).astype(np.float32)[:, None]
    model = Mixture(NORMAL, 2)
    start = model.params_from_responsibilities(x, (x[:, 0] > 1.5).astype(np.int32))
    result = em_fit(model, start, x, tol=1e-9)
    assert result.converged
    with jax.enable_x64(True):
        wide = jnp.asarray(x, jnp.float64)
        params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), result.params)
        # Weights of float32 sum to 1 up to 3e-8: in a million rows that alone would be 0.03 nats.
        params = dataclasses.replace(params, weights=params.weights / jnp.sum(params.weights))
        more = em_fit(model, params, wide, algorithm=squarem(), tol=-1.0, max_steps=3)
        assert more.objective - more.history[0] < 1e-3


@pytest.mark.parametrize("optimizer", [optax.sgd(1e-8), optax.scale(float("nan"))], ids=["tiny", "nan"])
def test_refused_gradient_steps_are_no_convergence(optimizer):
    x = _data("poisson", 0).astype(np.float32)
    model = Mixture(Poisson(), 2)
    start = model.init(jax.random.key(1), x)
    result = em_fit(model, start, x, algorithm=generalized_em(optimizer), max_steps=300)
    assert result.status == Status.STALLED
    assert jnp.isfinite(result.objective)
    with pytest.raises(EMError, match="optimiser"):
        result.check()


def test_gradient_steps_in_float32_say_converged_at_the_optimum_only():
    x = datasets.faithful()
    model = Mixture(NORMAL, 2)
    start = model.init(jax.random.key(1), x)
    exact = em_fit(model, start, x)
    result = em_fit(model, start, x, algorithm=generalized_em())
    assert result.status in (Status.CONVERGED, Status.STALLED)
    assert not result.converged or result.objective > exact.objective - 272 * 10 * TOL


def test_annealing_parts_what_it_merged():
    """The README's schedule; 64 starts of a model whose components all merge at temperature 4."""
    x = datasets.faithful()
    model = Mixture(Normal("tied"), 3)
    keys = jnp.concatenate([jax.random.key(0)[None], jax.random.split(jax.random.key(0), 63)])  # the README's is first
    starts = jax.vmap(lambda key: model.init(key, x))(keys)

    def fits(algorithm):
        return jax.jit(jax.vmap(lambda start: em_fit(model, start, x, algorithm=algorithm, max_steps=2000)))(starts)

    annealed = fits(annealed_em(jnp.geomspace(4.0, 1.0, 30)))
    plain = fits(EM())
    best = -1126.315928  # many starts; 11 free parameters
    hits = np.sum(np.asarray(annealed.objective) > best - 0.01)
    assert hits >= np.sum(np.asarray(plain.objective) > best - 0.01)
    means = np.asarray(annealed.params.components.mean)
    apart = np.abs(means[:, :, None] - means[:, None]).max(axis=-1) + 1e9 * np.eye(3)
    assert apart.min() > 0.1
    assert annealed.objective[0] >= plain.objective[0] - 0.01


@pytest.mark.parametrize("rate", [0.001, 0.01])
def test_averages_of_small_rates_wait_until_they_have_learned(rate):
    x = datasets.faithful()
    model = Mixture(NORMAL, 2)
    start = model.init(jax.random.key(1), x)
    best = em_fit(model, start, x).objective
    algorithm = stepwise_em(batch_size=32, rate=rate, average=True)
    result = em_fit(model, start, x, key=jax.random.key(0), algorithm=algorithm, max_steps=4000)
    assert not result.converged or result.objective > best - 272 * 10 * TOL


@pytest.mark.parametrize("rows", [1000, 100_000])
def test_random_responsibilities_differ_at_every_size(rows):
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, rows)
    x = jnp.asarray(np.stack([rng.normal(4 * label, 1), rng.normal(size=rows)], axis=1), jnp.float32)
    model = Mixture(NORMAL, 2)
    keys = jax.random.split(jax.random.key(0), 8)
    means = jax.vmap(lambda key: model.init(key, x, method="random_responsibilities").components.mean)(keys)
    apart = jnp.max(jnp.abs(means[:, 0] - means[:, 1]) / jnp.std(x, axis=0)[None], axis=-1)
    assert jnp.median(apart) > 0.1
