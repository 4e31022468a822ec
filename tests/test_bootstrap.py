"""Bootstraps against closed forms: what resampling does is known exactly where a fit is one."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxem import (
    HMM,
    Bernoulli,
    Mixture,
    MixtureParams,
    MultivariateNormal,
    Normal,
    Poisson,
    Status,
    bootstrap,
    em_fit,
)

pytestmark = pytest.mark.usefixtures("x64")

RNG = np.random.default_rng(0)


def test_one_normal_has_the_errors_of_the_ideal_bootstrap():
    """The mean of N rows drawn with replacement has the variance (N - 1) s² / N² (Efron & Tibshirani, section 5.3)."""
    x = RNG.normal(size=(60, 1)) * 3 + 1
    model = Mixture(Normal("spherical", missing=False), 1)
    params = em_fit(model, model.init(jax.random.key(0), x), x).params
    found = bootstrap(model, params, jax.random.key(1), x, num_samples=2000)
    expected = np.std(x) / np.sqrt(60)
    # A standard deviation of 2000 draws is known to 1 / sqrt(4000) of itself.
    np.testing.assert_allclose(found.standard_errors.components.mean, expected, rtol=3.5 / np.sqrt(4000))
    assert np.all(found.kept)
    lower, upper = found.intervals(0.9)
    draws = np.asarray(found.params.components.mean).ravel()
    np.testing.assert_allclose(lower.components.mean.ravel(), np.quantile(draws, 0.05), rtol=1e-12)
    np.testing.assert_allclose(upper.components.mean.ravel(), np.quantile(draws, 0.95), rtol=1e-12)
    # Weights are how many rows a row stands for: so many are drawn, each in proportion.
    counts = np.tile([0.0, 1.0, 2.0], 20)
    params = em_fit(model, params, x, counts).params
    found = bootstrap(model, params, jax.random.key(2), x, counts, num_samples=2000)
    expected = np.std(np.repeat(x[:, 0], counts.astype(int))) / np.sqrt(60)
    np.testing.assert_allclose(found.standard_errors.components.mean, expected, rtol=3.5 / np.sqrt(4000))


@pytest.fixture(scope="module")
def clusters():
    with jax.enable_x64(True):
        x = np.concatenate([RNG.normal(size=(80, 2)), RNG.normal(size=(120, 2)) + np.array([6.0, 0.0])])
        model = Mixture(Normal("diag", missing=False), 2)
        start = model.params_from_responsibilities(x, np.repeat([0, 1], [80, 120]))
        return model, em_fit(model, start, x).params, x


def test_parametric_draws_come_from_the_model(clusters):
    """The share of one cluster, far from the other, is binomial; the mean of 80 rows is normal."""
    model, params, x = clusters
    found = bootstrap(model, params, jax.random.key(1), x, num_samples=1000, parametric=True).standard_errors
    np.testing.assert_allclose(found.weights, np.sqrt(0.4 * 0.6 / 200), rtol=0.1)
    expected = np.sqrt(params.components.covariance / (200 * params.weights)[:, None])
    np.testing.assert_allclose(found.components.mean, expected, rtol=0.1)


def test_components_that_change_places_are_put_back(clusters, monkeypatch):
    """A fit whose components are exchanged on the way is matched, and its parameters stay what they were."""
    module = sys.modules["jaxem.diagnostics.bootstrap"]
    model, params, x = clusters
    expected = bootstrap(model, params, jax.random.key(1), x, num_samples=64)

    def exchanged(*arguments, **options):
        fit = em_fit(*arguments, **options)
        first = fit.params.components.mean[0, 1] > params.components.mean[0, 1]  # in some of the replicates
        other = jax.tree.map(lambda leaf: jnp.where(first, leaf[::-1], leaf), fit.params)
        return dataclasses.replace(fit, params=other)

    monkeypatch.setattr(module, "em_fit", exchanged)
    anew = jax.jit(module._refits.__wrapped__, static_argnames=("max_steps", "num_samples", "lanes"))
    monkeypatch.setattr(module, "_refits", anew)
    found = bootstrap(model, params, jax.random.key(1), x, num_samples=64)
    assert np.all(found.matched)
    assert np.all(found.confidence > 0.9)
    for got, plain in zip(*map(jax.tree.leaves, (found.params, expected.params)), strict=True):
        np.testing.assert_allclose(got, plain, rtol=1e-4, atol=1e-6)


def test_what_cannot_be_matched_or_fails_is_counted_and_left_out():
    x = (RNG.random((50, 3)) < 0.5).astype(float)
    model = Mixture(Bernoulli(), 2)
    alike = MixtureParams(weights=jnp.full(2, 0.5), components=model.family.pooled(jnp.asarray(x), None, 2))
    found = bootstrap(model, alike, jax.random.key(0), x, num_samples=8)
    assert int(found.num_unmatched) == 8
    assert np.all(np.isnan(found.standard_errors.weights))
    # One row far out: where it is not drawn, its component dies.
    y = np.append(RNG.normal(size=40), 50.0)[:, None]
    normal = Mixture(Normal("EII", missing=False), 2)
    fit = em_fit(normal, normal.params_from_responsibilities(y, (y[:, 0] > 10).astype(np.int32)), y)
    found = bootstrap(normal, fit.params, jax.random.key(1), y, num_samples=200)
    failed = np.asarray(found.status) != Status.CONVERGED
    assert int(found.num_failed) == failed.sum()
    assert 0.2 < failed.mean() < 0.55
    assert np.all(np.isfinite(found.standard_errors.components.mean))


def test_a_single_sequence_is_bootstrapped_from_the_model():
    """States that are seen as they are: rates have nearly the errors of a Poisson mean of as many steps."""
    states = np.cumsum(RNG.random(200) < 0.3) % 2
    x = RNG.poisson(np.where(states == 0, 1.0, 30.0))[:, None]
    model = HMM(Poisson(), 2)
    params = em_fit(model, model.init(jax.random.key(0), x), x).params
    found = bootstrap(model, params, jax.random.key(1), x, num_samples=64, parametric=True).standard_errors
    rough = np.sort(np.sqrt(np.array([1.0, 30.0]) / np.bincount(states)))
    np.testing.assert_allclose(np.sort(found.emissions.rate[:, 0]), rough, rtol=0.35)


def test_bad_requests_are_named():
    x = RNG.normal(size=(30, 2))
    model = MultivariateNormal()
    params = model.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="weights"):
        bootstrap(model, params, jax.random.key(0), x, np.ones(30), parametric=True)
    with pytest.raises(TypeError, match="num_samples"):
        bootstrap(model, params, jax.random.key(0), x, num_samples=2.5)
    with pytest.raises(ValueError, match="level"):
        bootstrap(model, params, jax.random.key(0), x, num_samples=2).intervals(95)
