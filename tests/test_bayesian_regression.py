"""Bayesian regressions: the evidence in closed form and by quadrature, scikit-learn, and EM by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special
from scipy.stats import multivariate_normal
from sklearn.linear_model import ARDRegression, BayesianRidge

from jaxem import BayesianLinearRegression, BayesianLogisticRegression, Status, bic, em_fit
from jaxem.testing import check_model

pytestmark = pytest.mark.usefixtures("x64")

RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(40, 5))
RESPONSE = FEATURES @ [2.0, 0.0, -1.0, 0.0, 0.5] + 0.5 * RNG.normal(size=40)
DATA = (FEATURES, RESPONSE)
CHOICE = (FEATURES @ [1.5, 0.0, -1.0, 0.0, 0.0] + RNG.logistic(size=40) > 0).astype(int)

# The evidence is no sum over rows: the weights are one latent of all of them.
NOT_BY_ROWS = ["additive", "q is linear", "blocks are the whole"]


def log_evidence(precision, noise, x=DATA):
    """log N(y; 0, I/b + Z A⁻¹ Zᵀ)."""
    features, response = x
    prior = np.broadcast_to(precision, features.shape[1])
    covariance = np.eye(len(response)) / noise + (features / prior) @ features.T
    return multivariate_normal.logpdf(response, np.zeros(len(response)), covariance)


@pytest.fixture(scope="module")
def fits():
    with jax.enable_x64(True):
        found = {}
        for ard in (False, True):
            for method in ("EM", "MacKay"):
                model = BayesianLinearRegression(ard, method=method)
                found[ard, method] = em_fit(model, model.init(None, DATA), DATA, tol=1e-10, max_steps=2000).check()
        return found


@pytest.mark.parametrize("ard", [False, True])
def test_a_fit_is_scikit_learns_without_hyperpriors_and_its_objective_the_evidence(fits, ard):
    kind = ARDRegression if ard else BayesianRidge
    extra = {"threshold_lambda": 1e12} if ard else {}
    flat = {"alpha_1": 0, "alpha_2": 0, "lambda_1": 0, "lambda_2": 0, "fit_intercept": False}
    peer = kind(**flat, tol=1e-12, max_iter=10_000, **extra).fit(*DATA)
    for method in ("EM", "MacKay"):
        params = fits[ard, method].params
        np.testing.assert_allclose(params.weight_precision, peer.lambda_, rtol=1e-3)
        np.testing.assert_allclose(params.noise_precision, peer.alpha_, rtol=1e-4)
        np.testing.assert_allclose(params.mean, peer.coef_, atol=1e-4)
        assert float(fits[ard, method].loglik) == pytest.approx(
            log_evidence(params.weight_precision, params.noise_precision), rel=1e-10
        )
    assert int(fits[ard, "MacKay"].num_steps) < int(fits[ard, "EM"].num_steps)


def test_one_step_by_hand():
    """One feature, two rows: z = (1, 2), y = (1, 3), both precisions 1."""
    data = (np.array([1.0, 2.0]), np.array([1.0, 3.0]))
    model = BayesianLinearRegression()
    start = jax.tree.map(jnp.ones_like, model.init(None, data))
    step = em_fit(model, start, data, tol=-1.0, max_steps=1).params
    # w | y has precision 1 + 1 + 4 = 6 and mean 7/6; E[w²] = 49/36 + 1/6, E|y - zw|² = 1/36 + 16/36 + 5/6.
    assert float(step.weight_precision) == pytest.approx(36 / 55, rel=1e-12)
    assert float(step.noise_precision) == pytest.approx(2 / (17 / 36 + 5 / 6), rel=1e-12)
    precision = 36 / 55 + 5 * float(step.noise_precision)
    assert float(step.mean[0]) == pytest.approx(7 * float(step.noise_precision) / precision, rel=1e-12)
    assert float(step.covariance[0, 0]) == pytest.approx(1 / precision, rel=1e-12)


def test_the_predictive_distribution_integrates_the_weights_out(fits):
    params, model = fits[True, "EM"].params, BayesianLinearRegression(True)
    at = RNG.normal(size=(3, 5))
    found = model.predict(params, at)
    prior, noise = np.asarray(params.weight_precision), float(params.noise_precision)
    covariance = np.linalg.inv(np.diag(prior) + noise * FEATURES.T @ FEATURES)
    np.testing.assert_allclose(found.mean, at @ covariance @ FEATURES.T @ RESPONSE * noise, rtol=1e-8)
    np.testing.assert_allclose(found.variance, 1 / noise + np.sum(at @ covariance * at, axis=1), rtol=1e-8)
    again = model.posterior(params, DATA)
    np.testing.assert_allclose(again.mean, params.mean, rtol=1e-8)


def test_the_laws_that_one_unit_can_obey():
    model = BayesianLinearRegression(True)
    checked = check_model(model, model.init(None, DATA), DATA, skip=NOT_BY_ROWS)
    assert {"Fisher's identity", "m_step maximises", "monotone", "weights are repeats", "float32"} <= set(checked)


def test_the_evidence_chooses_the_degree_of_a_polynomial():
    at = np.linspace(-1, 1, 40)
    y = 1 - 2 * at + 3 * at**3 + 0.2 * np.random.default_rng(1).normal(size=40)
    found = []
    for degree in range(1, 7):
        data = (at[:, None] ** np.arange(degree + 1)[None], y)
        model = BayesianLinearRegression()
        fit = em_fit(model, model.init(None, data), data, max_steps=3000).check()
        found.append(float(fit.loglik))
        assert found[-1] == pytest.approx(log_evidence(fit.params.weight_precision, fit.params.noise_precision, data))
        assert bic(model, fit.params, data) == pytest.approx(-2 * found[-1] + 2 * np.log(40), rel=1e-6)
    assert 1 + int(np.argmax(found)) == 3


def test_a_noise_that_vanishes_is_told_and_collinear_features_are_none():
    model = BayesianLinearRegression()
    through = (FEATURES, FEATURES @ [1.0, 2.0, 0.0, 0.0, 0.0])
    assert Status(int(em_fit(model, model.init(None, through), through).status)) == Status.DEGENERATE
    twice = (np.concatenate([FEATURES, FEATURES], axis=1), RESPONSE)
    fit = em_fit(model, model.init(None, twice), twice, max_steps=3000).check()
    np.testing.assert_allclose(fit.params.mean[:5], fit.params.mean[5:], rtol=1e-6)
    with jax.enable_x64(False):
        small = jax.tree.map(jnp.float32, DATA)
        alone = em_fit(model, model.init(None, small), small).check()
        assert float(alone.loglik) == pytest.approx(
            log_evidence(alone.params.weight_precision, alone.params.noise_precision), abs=1e-3
        )


def by_hand(features, y, steps):
    """Jaakkola & Jordan's updates in NumPy, from a linear predictor of variance 1: the precision, and every bound."""
    precision = features.shape[1] * np.mean(np.mean(features**2, axis=0))
    mean, covariance, bounds = np.zeros(features.shape[1]), np.eye(features.shape[1]) / precision, []
    for _ in range(steps + 1):
        xi = np.sqrt(np.einsum("np,pq,nq->n", features, covariance + np.outer(mean, mean), features))
        rate = np.tanh(xi / 2) / (4 * xi)
        inverse = precision * np.eye(len(mean)) + 2 * (features * rate[:, None]).T @ features
        covariance = np.linalg.inv(inverse)
        mean = covariance @ features.T @ (y - 0.5)
        bounds.append(
            np.sum(np.log(special.expit(xi)) - xi / 2 + rate * xi**2)
            + 0.5 * (mean @ inverse @ mean + len(mean) * np.log(precision) - np.linalg.slogdet(inverse)[1])
        )
        kept, precision = precision, len(mean) / np.sum(mean**2 + np.diag(covariance))
    return kept, bounds


def test_the_logistic_bound_goes_as_by_hand_and_never_falls():
    data, model = (FEATURES, CHOICE), BayesianLogisticRegression()
    fit = em_fit(model, model.init(None, data), data, tol=-1.0, max_steps=8)
    precision, bounds = by_hand(FEATURES, CHOICE, 8)
    np.testing.assert_allclose(fit.history[:9], bounds, rtol=1e-10)
    assert float(fit.params.weight_precision) == pytest.approx(precision, rel=1e-9)
    assert np.all(np.diff(bounds) > 0)
    checked = check_model(model, model.init(None, data), data, skip=NOT_BY_ROWS)
    assert {"monotone", "weights are repeats", "order of rows", "float32"} <= set(checked)


def test_the_logistic_bound_lies_close_below_the_evidence():
    """One weight, by quadrature."""
    feature, y = FEATURES[:, 0], CHOICE
    model = BayesianLogisticRegression()
    fit = em_fit(model, model.init(None, (feature, y)), (feature, y), tol=1e-9, max_steps=3000).check()
    sign, precision = 2 * y - 1, float(fit.params.weight_precision)

    def joint(w):
        return np.exp(-np.sum(np.logaddexp(0, -sign * feature * w)) - 0.5 * precision * w**2)

    whole = integrate.quad(joint, -60, 60, points=[0, 1, 5])[0] * np.sqrt(precision / (2 * np.pi))
    assert np.log(whole) - 0.5 < float(fit.loglik) < np.log(whole)
    chance = model.predict(fit.params, np.array([2.0]))
    mean, width = float(fit.params.mean[0]), float(fit.params.covariance[0, 0]) ** 0.5
    expected = integrate.quad(
        lambda w: special.expit(2 * w) * np.exp(-0.5 * ((w - mean) / width) ** 2), mean - 9 * width, mean + 9 * width
    )[0] / (width * np.sqrt(2 * np.pi))
    assert float(chance[0]) == pytest.approx(expected, abs=1e-6)


def test_what_is_asked_wrongly_is_refused_by_name():
    with pytest.raises(ValueError, match="method must be one of"):
        BayesianLinearRegression(method="Newton")
    model = BayesianLinearRegression()
    with pytest.raises(TypeError, match=r"x must be a pair \(features, response\)"):
        model.init(None, FEATURES)
    params = model.init(None, DATA)
    with pytest.raises(ValueError, match="features must have 5 columns"):
        model.predict(params, FEATURES[:, :2])
    with pytest.raises(ValueError, match=r"x\[1\] must"):
        BayesianLogisticRegression().init(None, DATA)
