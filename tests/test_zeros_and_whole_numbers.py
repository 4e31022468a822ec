"""Starts as users write them: hard zeros, whole numbers, and data of two precisions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jitted import e_step

from jaxem import (
    EM,
    HMM,
    Categorical,
    CategoricalParams,
    Fixed,
    HMMParams,
    Mixture,
    MixtureParams,
    Normal,
    Poisson,
    PoissonParams,
    Product,
    anderson,
    em_fit,
    fit_restarts,
    generalized_em,
    numerics,
    squarem,
)

RNG = np.random.default_rng(0)
COUNTS = RNG.poisson(np.repeat([2.0, 12.0], 30))[:, None]


@pytest.mark.parametrize("zeros", [(0,), (2,), (0, 2), (1, 2), (0, 1)])
def test_coordinates_of_the_boundary(zeros):
    """They lead back exactly, have finite slopes, and no move of a coordinate brings a zero back."""
    inside = jnp.ones(3).at[jnp.array(zeros)].set(0)
    probability = inside * jnp.array([0.2, 0.5, 0.3])
    probability = probability / jnp.sum(probability)
    theta = numerics.simplex_to_real(probability)
    np.testing.assert_allclose(numerics.real_to_simplex(theta), probability, rtol=1e-6)
    moved = numerics.real_to_simplex(theta + jnp.array([3.0, -2.0]))
    np.testing.assert_array_equal(moved == 0, inside == 0)
    assert np.all(np.isfinite(jax.jacrev(numerics.real_to_simplex)(theta)))
    assert np.all(np.isfinite(jax.jacrev(numerics.simplex_to_real)(probability)))
    # A support holds for every theta.
    np.testing.assert_array_equal(numerics.real_to_simplex(jnp.array([1.0, -1.0]), inside) == 0, inside == 0)


ALGORITHMS = [EM(), squarem(EM()), anderson(EM()), generalized_em()]


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=["em", "squarem", "anderson", "gradient"])
def test_zeros_stay_zeros(algorithm):
    symbols = RNG.integers(0, 3, (6, 10, 1)) % 2 * 2  # the value in the middle is never seen
    table = jnp.array([[[0.4, 0.3, 0.3]], [[0.6, 0.0, 0.4]], [[0.5, 0.5, 0.0]]])
    chain = HMMParams(
        initial=jnp.array([0.0, 0.4, 0.6]),
        transition=jnp.array([[0.6, 0.4, 0.0], [0.0, 0.5, 0.5], [0.3, 0.3, 0.4]]),
        emissions=CategoricalParams(probability=table),
    )
    found = em_fit(HMM(Categorical(3), 3), chain, symbols, algorithm=algorithm, max_steps=15, tol=-1.0).params
    for before, after in zip(jax.tree.leaves(chain), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(after[before == 0], 0)
    assert not np.allclose(found.transition, chain.transition, atol=1e-3)
    rates = PoissonParams(rate=jnp.array([[2.0], [10.0], [5.0]]))
    start = MixtureParams(weights=jnp.array([0.5, 0.5, 0.0]), components=rates)
    fit = em_fit(Mixture(Poisson(), 3), start, COUNTS.astype(np.float32), algorithm=algorithm, max_steps=20)
    assert fit.params.weights[2] == 0
    two = jax.tree.map(lambda leaf: leaf[:2], start)
    alone = em_fit(Mixture(Poisson(), 2), two, COUNTS.astype(np.float32), algorithm=algorithm, max_steps=20)
    np.testing.assert_allclose(fit.objective, alone.objective, rtol=1e-5)


def whole():
    rates = PoissonParams(rate=jnp.array([[2], [12]]))
    weights = jnp.array([0.5, 0.5])
    chain = HMMParams(initial=jnp.array([1, 0]), transition=jnp.array([[0.8, 0.2], [0.3, 0.7]]), emissions=rates)
    return {
        "mixture": (Mixture(Poisson(), 2), MixtureParams(weights=weights, components=rates), COUNTS),
        "hmm": (HMM(Poisson(), 2), chain, COUNTS.reshape(6, 10, 1)),
    }


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("name", ["mixture", "hmm"])
def test_whole_numbers_in_a_start(name, wide):
    """They are the same numbers as floats of the data's dtype, in fits and in direct calls; data are whole too."""
    with jax.enable_x64(wide):
        model, params, x = whole()[name]
        dtype = jnp.result_type(float)
        floats = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
        one, other = (em_fit(model, at, x, algorithm=squarem(EM()), max_steps=2, tol=-1.0) for at in (params, floats))
        np.testing.assert_array_equal(one.objective, other.objective)
        single = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
        narrow = em_fit(model, single, x, algorithm=squarem(EM()), max_steps=2, tol=-1.0)
        np.testing.assert_allclose(narrow.objective, one.objective, rtol=1e-6)
        assert {leaf.dtype for leaf in jax.tree.leaves(one.params)} == {jnp.dtype(dtype)}
        for call in (model.log_prob, model.posterior, model.predict, lambda *both: e_step(model, *both).loglik):
            np.testing.assert_array_equal(call(params, x), call(floats, x))
        key = jax.random.key(0)
        np.testing.assert_array_equal(model.sample(key, params, 3), model.sample(key, floats, 3))
        if name == "mixture":
            runs = fit_restarts(model, None, x, init=jax.tree.map(lambda leaf: leaf[None], params), max_steps=2)
            np.testing.assert_allclose(runs.best.history[0], e_step(model, floats, x).loglik, rtol=1e-5)


def test_blocks_of_two_precisions(x64):
    model = Mixture(Product({"size": Normal("diag"), "visits": Poisson()}), 2)
    x = {"size": RNG.normal(size=(40, 1)).astype(np.float32), "visits": RNG.poisson(3.0, (40, 1)).astype(np.float64)}
    same = {name: value.astype(np.float64) for name, value in x.items()}
    params = model.init(jax.random.key(0), x)
    one, other = (em_fit(model, params, data, algorithm=squarem(EM()), max_steps=3) for data in (x, same))
    np.testing.assert_allclose(one.objective, other.objective, rtol=1e-12)
    rates = {"components": jax.tree.map(lambda leaf: leaf.dtype, params.components)}
    assert set(jax.tree.leaves(rates)) == {jnp.dtype(jnp.float64)}


def test_held_emissions_on_complete_data():
    """Statements about a family that takes missing entries, in a chain that knows of none."""
    x = RNG.normal(size=(4, 5, 2)).astype(np.float32)
    means = jnp.array([[0.0, 0.0], [1.0, 1.0]])
    model = HMM(Fixed(Normal("diag"), {"mean": means}), 2)
    fit = em_fit(model, model.init(jax.random.key(0), x), x, max_steps=3)
    np.testing.assert_array_equal(fit.params.emissions.mean, means)
    free = HMM(Normal("diag", missing=False), 2)
    np.testing.assert_allclose(model.log_prob(fit.params, x), free.log_prob(fit.params, x), rtol=1e-5)


@pytest.mark.parametrize("form", ["plain", "padded", "packed"])
def test_sequences_of_one_step(form):
    """A chain that never moves is a mixture of its emissions, weighted by where it starts."""
    from jaxem import Sequences, pack_sequences, pad_sequences

    model, params, _ = whole()["hmm"]
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    params = dataclasses.replace(params, initial=jnp.array([0.3, 0.7]))
    rows = COUNTS[:5].astype(np.float32)
    x = dict(plain=np.stack, padded=pad_sequences, packed=pack_sequences)[form](list(rows[:, None]))
    same = Mixture(Poisson(), 2)
    start = MixtureParams(weights=params.initial, components=params.emissions)
    np.testing.assert_allclose(model.log_prob(params, x), same.log_prob(start, rows), rtol=1e-5)
    fit, other = em_fit(model, params, x, max_steps=3, tol=-1.0), em_fit(same, start, rows, max_steps=3, tol=-1.0)
    np.testing.assert_allclose(fit.history, other.history, rtol=1e-5)
    np.testing.assert_allclose(fit.params.initial, other.params.weights, rtol=1e-4)
    np.testing.assert_allclose(fit.params.transition, params.transition, rtol=1e-6)  # never left: as it was
    states, path = model.posterior(params, x), model.viterbi(params, x)
    if isinstance(x, Sequences):
        states, path = np.concatenate(x.split(states)), np.concatenate(x.split(path))
    np.testing.assert_allclose(np.reshape(states, (5, 2)), same.posterior(start, rows), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(np.ravel(path), same.predict(start, rows))
    ahead = model.forecast(params, x, 1)[:, 0]
    np.testing.assert_allclose(ahead, same.posterior(start, rows) @ params.transition, rtol=1e-4)
    assert model.sample(jax.random.key(0), params, 1, 5).shape == (5, 1, 1)
