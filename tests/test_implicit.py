"""Derivatives of fits: those of refits, in both modes; NaN where a fit has no limit; of steps where these are fixed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from zoo import NAMES, zoo

from jaxem import (
    EM,
    Blocks,
    Conditional,
    Dirichlet,
    Fixed,
    Gradient,
    Mixture,
    Normal,
    NormalInverseWishart,
    Poisson,
    Status,
    anderson,
    annealed_em,
    em_fit,
    fit_restarts,
    from_functions,
    squarem,
    stochastic_em,
)
from jaxem.capabilities import complete
from jaxem.numerics import gmres

pytestmark = pytest.mark.usefixtures("x64")


def _flat(result):
    return jnp.concatenate([ravel_pytree(result.params)[0], jnp.stack([result.objective, result.loglik])])


def _covector(found):
    return jnp.cos(1.7 * jnp.arange(found.size))


def _agrees(fit, at, direction, *, forward=False, step=1e-4, rtol=1e-5):
    """The slope of `fit(value) -> Result` along a direction is Richardson's difference of refits.

    In reverse mode, of one combination of all that has a slope; in forward mode of each.
    """
    found, pull = jax.vjp(lambda value: _flat(fit(value)), at)
    (pulled,) = pull(_covector(found))
    along = sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), pulled, direction)))

    def difference(step):
        there, back = (
            _flat(fit(jax.tree.map(lambda a, d, s=sign: a + s * step * d, at, direction))) for sign in (1.0, -1.0)
        )
        return (there - back) / (2 * step)

    expected = (4 * difference(step / 2) - difference(step)) / 3
    scale = 1 + np.max(np.abs(expected))
    np.testing.assert_allclose(along, _covector(found) @ expected, rtol=rtol, atol=rtol * scale)
    if forward:
        _, slopes = jax.jvp(lambda value: _flat(fit(value)), (at,), (direction,))
        np.testing.assert_allclose(slopes, expected, rtol=0, atol=rtol * scale)
        np.testing.assert_allclose(_covector(found) @ slopes, along, rtol=1e-7, atol=1e-7 * scale)


def _limit(model, x, weights):
    """A start at a maximum, none of whose components is like another."""
    for seed in range(8):
        result = em_fit(model, model.init(jax.random.key(seed), x), x, weights, tol=1e-13, max_steps=20_000)
        if result.status == Status.CONVERGED:
            return result.params
    raise AssertionError("no start led to a maximum")


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_zoo(name):
    """Law 15, along weights of rows: every model knows them."""
    model, x = zoo()[name]
    x = jax.tree.map(jnp.asarray, x)
    rows = jax.tree.leaves(complete("model", model).units(x))[0].shape[0]
    random = np.random.default_rng(0)
    weights, direction = jnp.asarray(random.uniform(0.5, 1.5, rows)), jnp.asarray(random.normal(size=rows))
    params = _limit(model, x, weights)
    _agrees(lambda weights: em_fit(model, params, x, weights, tol=1e-13, max_steps=20_000), weights, direction)
