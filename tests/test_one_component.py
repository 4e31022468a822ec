"""Regressions by themselves: probit and Student's t, against scipy and by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize
from scipy import stats as scipy_stats

from jaxem import EM, Expanded, ProbitRegression, Status, StudentTRegression, em_fit

pytestmark = pytest.mark.usefixtures("x64")

RNG = np.random.default_rng(4)
FEATURES = RNG.normal(size=(80, 2))
Z = np.column_stack([np.ones(80), FEATURES])
CHOICE = (Z @ [0.3, 1.0, -0.5] + RNG.normal(size=80) > 0).astype(int)
RESPONSE = Z @ [1.0, 2.0, -1.0] + 0.5 * RNG.standard_t(3, size=80)
KEY = jax.random.key(0)


def line(params):
    return np.concatenate([[params.intercept], params.coefficients])


def test_probit_is_the_maximum_of_its_likelihood():
    model, data = ProbitRegression(), (FEATURES, CHOICE)
    fit = em_fit(model, model.init(KEY, data), data, tol=1e-11).check()
    sign = 2 * CHOICE - 1
    best = optimize.minimize(lambda b: -np.sum(scipy_stats.norm.logcdf(sign * (Z @ b))), np.zeros(3), tol=1e-10)
    assert float(fit.loglik) == pytest.approx(-best.fun, abs=1e-6)
    np.testing.assert_allclose(line(fit.params), best.x, atol=1e-4)
    np.testing.assert_allclose(model.mean(fit.params, FEATURES), scipy_stats.norm.cdf(Z @ line(fit.params)), rtol=1e-9)
    _, drawn = model.sample(KEY, fit.params, 20_000, features=np.repeat(FEATURES[:2], 10_000, axis=0))
    chance = scipy_stats.norm.cdf(Z[:2] @ line(fit.params))
    np.testing.assert_allclose(np.asarray(drawn).reshape(2, -1).mean(axis=1), chance, atol=0.02)


def test_a_step_of_probit_is_least_squares_of_the_expected_latent_response():
    model, data = ProbitRegression(), (FEATURES, CHOICE)
    start = jax.tree.map(jnp.zeros_like, model.init(KEY, data))
    step = em_fit(model, start, data, tol=-1.0, max_steps=1).params
    # From 0 the latent response is expected at ±sqrt(2 / pi).
    expected = np.linalg.lstsq(Z, (2 * CHOICE - 1) * np.sqrt(2 / np.pi), rcond=None)[0]
    np.testing.assert_allclose(line(step), expected, rtol=1e-9)


def test_responses_that_features_tell_apart_stay_finite_and_a_ridge_bounds_them():
    data = (FEATURES, (FEATURES[:, 0] > 0).astype(int))
    alone = ProbitRegression()
    fit = em_fit(alone, alone.init(KEY, data), data)
    assert np.all(np.isfinite(line(fit.params)))
    assert np.isfinite(fit.loglik)
    model = ProbitRegression(ridge=1.0)
    assert em_fit(model, model.init(KEY, data), data).converged
    with jax.enable_x64(False):
        far = dataclasses.replace(fit.params, coefficients=jnp.array([-40.0, 0.0]), intercept=jnp.array(0.0))
        assert np.all(np.isfinite(alone.log_prob(jax.tree.map(jnp.float32, far), jax.tree.map(jnp.asarray, data))))


@pytest.mark.parametrize("held", [None, 4.0])
def test_student_t_is_the_maximum_of_its_likelihood_and_expansion_takes_fewer_steps(held):
    model, data = StudentTRegression(held), (FEATURES, RESPONSE)
    start = model.init(KEY, data)
    fit = em_fit(model, start, data, tol=1e-11, max_steps=5000).check()
    plain = em_fit(model, start, data, algorithm=EM(), tol=1e-11, max_steps=5000).check()
    assert int(fit.num_steps) < int(plain.num_steps)
    expanded = em_fit(model, start, data, algorithm=EM(maximize=Expanded()), tol=1e-11, max_steps=5000)
    assert int(expanded.num_steps) == int(fit.num_steps)

    def minus(theta):
        nu = np.exp(theta[4]) if held is None else held
        return -np.sum(scipy_stats.t.logpdf(RESPONSE, nu, Z @ theta[:3], np.exp(theta[3])))

    theta = np.zeros(5 if held is None else 4)
    best = optimize.minimize(minus, theta, tol=1e-12)
    assert float(fit.loglik) == pytest.approx(-best.fun, abs=1e-6)
    np.testing.assert_allclose(line(fit.params), best.x[:3], atol=1e-4)
    assert float(fit.params.variance) == pytest.approx(np.exp(2 * best.x[3]), rel=1e-3)
    assert model.num_parameters(fit.params) == len(theta)


def test_a_step_of_student_t_weighs_rows_by_their_latent_scales():
    model, data = StudentTRegression(4.0), (FEATURES, RESPONSE)
    start = model.init(KEY, data)
    step = em_fit(model, start, data, tol=-1.0, max_steps=1).params
    residual = RESPONSE - Z @ line(start)
    weight = 5 / (4 + residual**2 / float(start.variance))
    expected = np.linalg.solve(Z.T @ (weight[:, None] * Z), Z.T @ (weight * RESPONSE))
    np.testing.assert_allclose(line(step), expected, rtol=1e-9)
    left = RESPONSE - Z @ expected
    assert float(step.variance) == pytest.approx(np.sum(weight * left**2) / np.sum(weight), rel=1e-9)


def test_an_outlier_moves_a_line_by_little():
    spoilt = RESPONSE.copy()
    spoilt[3] += 1e3
    model = StudentTRegression(3.0)
    clean, other = (em_fit(model, model.init(KEY, (FEATURES, y)), (FEATURES, y)) for y in (RESPONSE, spoilt))
    assert np.max(np.abs(line(clean.params) - line(other.params))) < 0.1
    assert Status(int(other.status)) == Status.CONVERGED


def test_what_is_asked_wrongly_is_refused_by_name():
    with pytest.raises(ValueError, match="degrees_of_freedom must be above 0"):
        StudentTRegression(-1.0)
    with pytest.raises(ValueError, match=r"x\[1\] must"):
        ProbitRegression().init(KEY, (FEATURES, RESPONSE))
