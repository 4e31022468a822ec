"""Step by step the same as scikit-learn's GaussianMixture without its ridge, and as the formulas of a prior."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from jaxem import (
    Dirichlet,
    Mixture,
    MixtureParams,
    Normal,
    NormalInverseWishart,
    NormalParams,
    aic,
    bic,
    default_prior,
    em_fit,
)

pytestmark = pytest.mark.usefixtures("x64")

SHAPES = ("full", "diag", "tied", "spherical")
N, D, K = 120, 3, 3

_rng = np.random.default_rng(0)
LABELS = _rng.integers(0, K, N)
X = _rng.normal(size=(N, D)) @ np.array([[1.0, 0.3, 0.0], [0.0, 0.8, -0.4], [0.0, 0.0, 1.2]])
X = X + np.array([[0.0, 0.0, 0.0], [3.0, 1.0, -1.0], [-1.0, 2.5, 2.0]])[LABELS]
COUNTS = _rng.integers(0, 4, N)

WEIGHTS = np.array([0.2, 0.3, 0.5])
MEANS = X[[3, 40, 77]]
# A start that no symmetry makes special, in every shape's storage.
COVARIANCES = {
    "full": np.array([np.diag([1.0, 2.0, 1.5]) + 0.2 * k for k in range(K)]),
    "tied": np.diag([1.0, 2.0, 1.5]) + 0.2,
    "diag": np.array([[1.0, 2.0, 1.5], [2.0, 1.0, 1.0], [0.5, 3.0, 2.0]]),
    "spherical": np.array([1.0, 2.0, 1.5]),
}


def start(shape):
    return MixtureParams(
        weights=jnp.asarray(WEIGHTS),
        components=NormalParams(mean=jnp.asarray(MEANS), covariance=jnp.asarray(COVARIANCES[shape])),
    )


def sklearn_fit(shape, rows, count):
    """scikit-learn after `count` steps from the same start."""
    covariance = COVARIANCES[shape]
    precision = np.linalg.inv(covariance) if shape in ("full", "tied") else 1 / covariance
    peer = GaussianMixture(
        K,
        covariance_type=shape,
        tol=0,
        reg_covar=0,
        max_iter=count,
        weights_init=WEIGHTS,
        means_init=MEANS,
        precisions_init=precision,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return peer.fit(rows)


def assert_same_params(params, peer):
    np.testing.assert_allclose(params.weights, peer.weights_, rtol=1e-10)
    # Entries near zero are compared with the size of their neighbours.
    np.testing.assert_allclose(params.components.mean, peer.means_, rtol=1e-10, atol=1e-10 * abs(MEANS).max())
    largest = abs(peer.covariances_).max()
    np.testing.assert_allclose(params.components.covariance, peer.covariances_, rtol=1e-10, atol=1e-10 * largest)


@pytest.fixture(scope="module", params=SHAPES)
def fitted(request):
    """A shape, its model, and ours and scikit-learn's fit after ten steps."""
    shape = request.param
    model = Mixture(Normal(shape), K)
    with jax.enable_x64(True):
        fit = em_fit(model, start(shape), jnp.asarray(X), tol=-1.0, max_steps=10)
    return model, fit.params, sklearn_fit(shape, X, 10)


@pytest.mark.parametrize(("shape", "form"), [*((shape, "auto") for shape in SHAPES), ("full", "expanded")])
def test_every_step_is_scikit_learns(shape, form):
    model = Mixture(Normal(shape, form=form), K)
    for count in (1, 2, 5, 10):
        fit = em_fit(model, start(shape), X, tol=-1.0, max_steps=count)
        assert fit.num_steps == count
        assert_same_params(fit.params, sklearn_fit(shape, X, count))


def test_densities_are_scikit_learns(fitted):
    model, params, peer = fitted
    np.testing.assert_allclose(model.log_prob(params, X), peer.score_samples(X), rtol=1e-9)
    assert model.posterior(params, X).shape == (N, K)
    np.testing.assert_allclose(model.posterior(params, X), peer.predict_proba(X), rtol=1e-8, atol=1e-12)
    np.testing.assert_array_equal(model.predict(params, X), peer.predict(X))


def test_criteria_are_scikit_learns(fitted):
    model, params, peer = fitted
    assert float(aic(model, params, X)) == pytest.approx(peer.aic(X), rel=1e-10)
    assert float(bic(model, params, X)) == pytest.approx(peer.bic(X), rel=1e-10)
    assert model.num_parameters(params) == peer._n_parameters()


@pytest.mark.parametrize("shape", SHAPES)
def test_whole_number_weights_are_repeated_rows_in_scikit_learn(shape):
    assert set(COUNTS) == {0, 1, 2, 3}
    model, repeated = Mixture(Normal(shape), K), np.repeat(X, COUNTS, axis=0)
    weights = COUNTS.astype(float)
    fit = em_fit(model, start(shape), X, weights, tol=-1.0, max_steps=5)
    peer = sklearn_fit(shape, repeated, 5)
    assert_same_params(fit.params, peer)
    assert float(fit.objective) == pytest.approx(peer.score(repeated) * len(repeated), rel=1e-10)
    assert float(bic(model, fit.params, X, weights)) == pytest.approx(peer.bic(repeated), rel=1e-10)
    assert float(aic(model, fit.params, X, weights)) == pytest.approx(peer.aic(repeated), rel=1e-10)


def posterior_mode(shape, responsibilities, prior):
    """Fraley & Raftery (2007), table 1, written out: weights, means, covariances; w the rows' responsibilities."""
    n = responsibilities.sum(axis=0)
    average = (responsibilities.T @ X) / n[:, None]
    kappa, nu, towards = prior.shrinkage, prior.degrees_of_freedom, np.asarray(prior.mean)
    mean = (n[:, None] * average + kappa * towards) / (n + kappa)[:, None]
    scale = np.asarray(prior.scale)
    scatter = []
    for k in range(K):
        deviations = X - average[k]
        within = (responsibilities[:, k, None] * deviations).T @ deviations
        pull = average[k] - towards
        scatter.append(within + kappa * n[k] / (kappa + n[k]) * np.outer(pull, pull))
    scatter = np.array(scatter)
    if shape == "full":
        covariance = (scale + scatter) / (nu + n + D + 2)[:, None, None]
    elif shape == "tied":
        covariance = (scale + scatter.sum(axis=0)) / (nu + N + K + D + 1)
    elif shape == "diag":
        covariance = (scale + np.array([np.diag(s) for s in scatter])) / (nu + n + 3)[:, None]
    else:
        covariance = (scale + np.array([np.trace(s) for s in scatter])) / (nu + 2 + (n + 1) * D)
    return n / N, mean, covariance


# The default shrinkage of 0.01 is nearly none; a strong one shows a wrong power of it.
@pytest.mark.parametrize("shrinkage", [0.01, 7.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_m_step_with_a_prior_is_the_posterior_mode(shape, shrinkage):
    prior = dataclasses.replace(default_prior(X, K, shape), shrinkage=shrinkage)
    model = Mixture(Normal(shape, prior=prior), K)
    responsibilities = np.asarray(Mixture(Normal(shape), K).posterior(start(shape), X))
    found = jax.jit(lambda params: model.m_step(model.e_step(params, jnp.asarray(X))))(start(shape))
    weights, mean, covariance = posterior_mode(shape, responsibilities, prior)
    np.testing.assert_allclose(found.weights, weights, rtol=1e-10)
    np.testing.assert_allclose(found.components.mean, mean, rtol=1e-10)
    np.testing.assert_allclose(found.components.covariance, covariance, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_default_prior_is_fraley_and_rafterys(shape):
    prior = default_prior(X, K, shape)
    scale = np.cov(X.T) / K ** (2 / D)
    kept = {"full": scale, "tied": scale, "diag": np.diag(scale), "spherical": np.trace(scale) / D}[shape]
    assert isinstance(prior, NormalInverseWishart)
    np.testing.assert_allclose(prior.mean, X.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(prior.scale, kept, rtol=1e-12)
    assert (prior.shrinkage, prior.degrees_of_freedom) == (0.01, D + 2)


def test_a_dirichlet_adds_its_pseudo_counts():
    concentration = np.array([1.0, 2.5, 11.0])
    model = Mixture(Normal("full"), K, prior=Dirichlet(jnp.asarray(concentration)))
    found = jax.jit(lambda params: model.m_step(model.e_step(params, jnp.asarray(X))))(start("full"))
    counts = np.asarray(Mixture(Normal("full"), K).posterior(start("full"), X)).sum(axis=0)
    expected = (counts + concentration - 1) / (N + (concentration - 1).sum())
    np.testing.assert_allclose(found.weights, expected, rtol=1e-12)
