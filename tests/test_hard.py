"""Classification EM: every row whole to its likeliest component."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jitted import begin
from zoo import NAMES, zoo

from jaxem import EM, Blocks, Hard, Mixture, Normal, Poisson, datasets, em_fit, fit_restarts, hard_em, numerics

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("name", ["full", "bernoulli", "poisson", "student t", "product", "linear regression"])
def test_the_classification_likelihood_never_falls(name):
    assert name in NAMES
    model, x = zoo()[name]
    fit = em_fit(model, model.init(jax.random.key(1), x), x, algorithm=hard_em(), max_steps=30)
    history = np.asarray(fit.history)[: int(fit.num_steps) + 1]
    assert np.all(np.diff(history) >= -1e-9 * abs(history[0]))


def test_the_objective_is_the_classification_likelihood():
    x, _ = datasets.iris()
    model = Mixture(Normal("diag"), 3)
    fit = em_fit(model, model.init(jax.random.key(0), x), x, algorithm=EM(expect=Hard()))
    highest = jnp.log(jnp.max(model.posterior(fit.params, x), axis=1)) + model.log_prob(fit.params, x)
    np.testing.assert_allclose(fit.objective, jnp.sum(highest), rtol=1e-12)
    # A fixed point: the parameters are those of the rows that each component has.
    labels = np.asarray(model.predict(fit.params, x))
    for k in range(3):
        np.testing.assert_allclose(fit.params.components.mean[k], x[labels == k].mean(axis=0), rtol=1e-9)
        np.testing.assert_allclose(fit.params.weights[k], np.mean(labels == k))


def test_ties_go_to_the_first_component_in_every_layout():
    scores = jnp.array([[1.0, 2.0, -jnp.inf, 0.0], [1.0, 2.0, -jnp.inf, 3.0], [0.0, 2.0, -jnp.inf, 3.0]])
    first, top = numerics.first_largest(scores)
    np.testing.assert_array_equal(first, [[1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
    np.testing.assert_array_equal(top, [1, 2, -np.inf, 3])
    counts = np.array([2, 4, 2, 4, 3, 3, 3])
    model = Mixture(Poisson(), 2)
    params = model.params_from_responsibilities(counts, np.full((7, 2), 0.5))
    whole = begin(model, EM(expect=Hard()), params, counts).stats
    blocks = begin(model, EM(expect=Hard(), gather=Blocks(2)), params, counts).stats
    np.testing.assert_allclose(whole.counts, [7, 0], atol=1e-15)
    np.testing.assert_allclose(blocks.counts, [7, 0], atol=1e-15)


def test_restarts_of_hard_em():
    x, _ = datasets.iris()
    model = Mixture(Normal("spherical"), 3)
    runs = fit_restarts(model, jax.random.key(0), x, num_restarts=16, algorithm=hard_em(), certify=False)
    soft = em_fit(model, runs.best.params, x)
    # The classification likelihood is below the likelihood, at the same parameters as at the maximum.
    assert runs.best.objective < soft.history[0] < soft.objective


def test_an_unknown_expectation_is_refused():
    model = Mixture(Poisson(), 2)
    counts = np.array([1, 2, 5, 6])
    with pytest.raises(TypeError, match=r"expect must be Exact\(\), Hard\(\), Sample\(n\), or an object with"):
        em_fit(model, model.init(jax.random.key(0), counts), counts, algorithm=EM(expect=Blocks(2)))
