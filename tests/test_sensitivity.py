"""What derivatives of fits rest on: distances to limits, residuals, eigenvalues."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxem import (
    EM,
    PPCA,
    Mixture,
    MixtureParams,
    Normal,
    Poisson,
    PoissonParams,
    em_fit,
    from_functions,
    sensitivity,
)

pytestmark = pytest.mark.usefixtures("x64")

# Deaths per day, The Times 1910-12 (Hasselblad 1969).
DEATHS = np.repeat(np.arange(10.0), [162, 267, 271, 185, 111, 61, 27, 8, 3, 1])[:, None]


def test_the_rate_of_the_times():
    """The largest eigenvalue of its EM map is published, .995666; the smallest is 0, as the weights sum to one."""
    counts, days = np.unique(DEATHS, return_counts=True)
    start = MixtureParams(weights=np.array([0.3, 0.7]), components=PoissonParams(rate=np.array([[1.0], [2.5]])))
    model, x, days = Mixture(Poisson(), 2), counts[:, None], days.astype(float)
    result = em_fit(model, start, x, days, tol=0.0, max_steps=20_000)
    told = sensitivity(model, result.params, x, days)
    np.testing.assert_allclose(told.smallest, 1 - 0.995666, rtol=1e-3)
    np.testing.assert_allclose(told.condition, 1 / told.smallest, rtol=1e-6)
    assert told.residual < 1e-8
    assert told.distance < 1e-5
    # Well before its limit a fit is told how far that is.
    early = em_fit(model, start, x, days, tol=-1.0, max_steps=500).params
    apart = jax.tree.map(lambda a, b: np.max(np.abs(a - b)) / np.max(a), early, result.params)
    told = sensitivity(model, early, x, days)
    np.testing.assert_allclose(told.distance, max(jax.tree.leaves(apart)), rtol=0.5)


def test_the_rate_of_linkage():
    """Dempster, Laird & Rubin 1977: .13277873, for one parameter."""
    counts = np.array([125.0, 18.0, 20.0, 34.0])

    def e_step(theta, counts):
        return counts[0] * theta / (2 + theta) + counts[3], counts[1] + counts[2]

    model = from_functions(lambda theta, x: {"both": e_step(theta, x)}, lambda s: s["both"][0] / sum(s["both"]))
    told = sensitivity(model, (15 + np.sqrt(53809)) / 394, counts)
    np.testing.assert_allclose(told.smallest, 1 - 0.13277873, rtol=1e-7)
    np.testing.assert_allclose(told.condition, 1)
    assert told.distance < 1e-12


def test_factors_that_turn_are_left_out():
    """Of the eigenvalues of I - J, all of them, those that are not 0."""
    random = np.random.default_rng(0)
    x = random.normal(size=(60, 5)) @ random.normal(size=(5, 5)) * [3.0, 2.0, 1.0, 0.3, 0.2]
    model = PPCA(2, missing=False)
    start = model.init(jax.random.key(0), x)
    params = em_fit(model, start, x, algorithm=EM(), tol=0.0, max_steps=5000).params
    theta, unravel = ravel_pytree(params)
    steps = jax.jit(jax.jacfwd(lambda theta: ravel_pytree(model.m_step(model.e_step(unravel(theta), x)))[0]))(theta)
    sizes = np.sort(np.abs(1 - np.linalg.eigvals(steps)))
    assert sizes[0] < 1e-6 < 1e-3 < sizes[1]  # in the plane of two factors there is one turn
    told = sensitivity(model, params, x, algorithm=EM())
    np.testing.assert_allclose(told.smallest, sizes[1], rtol=1e-5)
    np.testing.assert_allclose(told.condition, sizes[-1] / sizes[1], rtol=1e-5)
    assert told.residual < 1e-8


def test_a_fit_is_told_by_name_what_it_needs():
    model, x = Mixture(Normal(), 2), np.zeros((5, 1))
    params = model.init(jax.random.key(0), jnp.arange(5.0)[:, None])
    with pytest.raises(TypeError, match="call it outside of jit"):
        jax.jit(lambda x: sensitivity(model, params, x))(x)
