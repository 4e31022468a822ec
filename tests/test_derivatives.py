"""Derivatives of an E-step are those of central differences, in both modes; fits and their errors rest on them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import zoo

from jaxem import HMM, HMMParams, Mixture, MixtureParams, Normal, NormalParams

pytestmark = pytest.mark.usefixtures("x64")

# One entry for every family, and for every way to the posterior of a chain.
NAMES = (
    "full",
    "full, five columns",
    "diag, missing",
    "binomial, trials by row",
    "categorical",
    "poisson, exposure, prior",
    "student t",
    "zero-inflated poisson",
    "linear regression",
    "logistic regression",
    "poisson regression",
    "background",
    "gamma",
    "negative binomial",
    "directions",
    "exponential",
    "hmm, priors",
    "hmm, priors, log",
)


def _plain_and_sure(model, x):
    """Parameters at which components differ, and such that every row is surely of the first: its odds are 1e30."""
    random = np.random.default_rng(0)
    chain = isinstance(model, HMM)
    count = model.num_states if chain else model.num_components
    rows = x.reshape(-1, x.shape[-1]) if chain else x
    components = jax.jit(model.family.pooled, static_argnums=2)(jax.tree.map(jnp.asarray, rows), None, count)
    components = jax.tree.map(lambda leaf: np.asarray(leaf) * (1 + 0.1 * random.normal(size=leaf.shape)), components)
    if not chain:
        total = count + getattr(model.family, "extra_components", 0)
        shares = random.dirichlet(np.ones(total)), np.where(np.arange(total) == 0, 1, 1e-30)
        return [MixtureParams(weights=weights, components=components) for weights in shares]
    support = np.ones((count, count)) if model.transition_support is None else np.asarray(model.transition_support)
    stays = np.arange(count) == np.argmax(support, axis=1)[:, None]
    tables = support * random.uniform(0.2, 1, support.shape), support * np.where(stays, 1, 1e-30)
    return [HMMParams(initial=table[0], transition=table, emissions=components) for table in tables]


@pytest.mark.parametrize("name", NAMES)
def test_statistics_have_the_slopes_of_differences(name):
    model, x = zoo()[name.removesuffix(", log")]
    model = dataclasses.replace(model, form="log") if name.endswith(", log") else model
    x = jax.tree.map(jnp.asarray, x)

    def found(params):
        return model.e_step(params, x)

    def covector(leaf):
        return np.cos(1.7 * np.arange(leaf.size)).reshape(leaf.shape)

    @jax.jit
    def slopes(params, direction):
        value, forward = jax.jvp(found, (params,), (direction,))
        _, pull = jax.vjp(found, params)
        return value, forward, pull(jax.tree.map(covector, value))

    random, step = np.random.default_rng(1), 1e-5
    for params in _plain_and_sure(model, x):
        direction = jax.tree.map(lambda leaf: np.asarray(leaf) * random.normal(size=leaf.shape), params)

        def at(signed, params=params, direction=direction):
            return slopes(jax.tree.map(lambda p, d: p + signed * d, params, direction), direction)

        _, forward, backward = at(0.0)
        along, scale = 0.0, 1.0
        for got, up, down in zip(*map(jax.tree.leaves, (forward, at(step)[0], at(-step)[0])), strict=True):
            # Rounding of the values, over the step; and what is left of the third derivative.
            allowed = 1e-14 * np.max(np.abs(up), initial=0) / step + 1e-5 * (1 + np.max(np.abs(got), initial=0))
            np.testing.assert_allclose(got, (up - down) / (2 * step), rtol=0, atol=allowed)
            along += np.sum(covector(got) * got)
            scale += np.sum(np.abs(got))
        expected = sum(np.sum(a * b) for a, b in zip(*map(jax.tree.leaves, (backward, direction)), strict=True))
        assert along == pytest.approx(float(expected), abs=1e-9 * scale)


def test_a_saturated_posterior_does_not_move():
    """Two unit normals: p(2 | x) is a logistic function, of which the slope in the mean m is p (1 - p) (x - m)."""
    x = np.array([0.2, 5.1, 9.0, 12.0])

    def posterior(mean):
        components = NormalParams(mean=jnp.stack([0 * mean, mean])[:, None], covariance=jnp.ones((2, 1, 1)))
        return Mixture(Normal(), 2).posterior(MixtureParams(weights=jnp.full(2, 0.5), components=components), x)

    second = 1 / (1 + np.exp(50 - 10 * x))
    first = 1 / (1 + np.exp(10 * x - 50))
    slope = first * second * (x - 10)
    for mode in (jax.jacfwd, jax.jacrev):
        np.testing.assert_allclose(mode(posterior)(10.0), np.stack([-slope, slope], axis=1), rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("columns", [2, 6, 9])
@pytest.mark.parametrize("shape", ["full", "tied"])
def test_entries_of_a_covariance_count_as_those_of_its_symmetric_part(columns, shape):
    """f((A + A') / 2): the slope in an entry is half of that in the pair, and the same on both sides."""
    random = np.random.default_rng(2)
    x = jnp.asarray(random.normal(size=(8, columns)))
    factor = random.normal(size=(2, columns, 2 * columns))
    covariance = factor @ np.swapaxes(factor, 1, 2) / columns
    covariance = covariance[0] if shape == "tied" else covariance
    family, mean = Normal(shape), np.zeros((2, columns))

    @jax.jit
    def both(covariance):
        def density(covariance):
            return jnp.sum(family.log_prob(NormalParams(mean=mean, covariance=covariance), x) ** 2)

        return jax.value_and_grad(density)(covariance)

    slope = np.asarray(both(covariance)[1])
    for i, j in ((0, 1), (1, 0), (columns - 1, 0), (0, columns - 1), (1, 1)):
        away = np.zeros_like(covariance)
        away[..., i, j] = 1e-6
        expected = (both(covariance + away)[0] - both(covariance - away)[0]) / 2e-6
        np.testing.assert_allclose(np.sum(slope[..., i, j]), expected, rtol=1e-5)
    np.testing.assert_allclose(slope, np.swapaxes(slope, -1, -2), rtol=1e-9, atol=1e-9 * np.max(np.abs(slope)))
