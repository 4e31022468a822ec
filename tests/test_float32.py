"""Float32, JAX's default, is safe: close to float64 on hard data, and it stops at its resolution."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxem import (
    Binomial,
    Exponential,
    ExponentialParams,
    Gamma,
    LinearRegression,
    Mixture,
    MixtureParams,
    Multinomial,
    NegativeBinomial,
    Normal,
    NormalParams,
    Poisson,
    PoissonRegression,
    Status,
    StudentT,
    StudentTParams,
    StudentTRegression,
    datasets,
    em_fit,
)

STEPS = 30
# Four corners, no two of them in line, about one unit apart: the spread of the data is of order 1.
CORNERS = np.array([[0.0, 0.0, 0.0, 0.0], [1.0, 0.5, -0.5, 1.0], [-0.5, 1.0, 1.0, 0.5], [0.5, -1.0, 1.0, -0.5]])
MIX = np.array([[1.0, 0.4, 0.0, 0.0], [0.0, 1.0, -0.3, 0.0], [0.0, 0.0, 1.0, 0.5], [0.0, 0.0, 0.0, 0.7]])


def clusters(width, corners, rows=100):
    """Rows of float32 about the corners, and the perturbed start that both precisions take."""
    rng = np.random.default_rng(1)
    count, columns = corners.shape
    noise = rng.normal(size=(count, rows, columns)) @ MIX[:columns, :columns]
    x = (corners[:, None] + width * noise).reshape(-1, columns).astype(np.float32)
    start = (
        np.full(count, 1 / count, np.float32),
        (corners + 0.3 * width).astype(np.float32),
        np.tile(2 * width**2 * np.eye(columns), (count, 1, 1)).astype(np.float32),
    )
    return x, start


def steps(model, x, start, dtype):
    """Exactly 30 steps in this precision, from data and a start that float32 can hold."""
    weights, mean, covariance = (jnp.asarray(part, dtype) for part in start)
    params = MixtureParams(weights=weights, components=NormalParams(mean=mean, covariance=covariance))
    return em_fit(model, params, jnp.asarray(x, dtype), tol=-1.0, max_steps=STEPS)


def relative_error(found, expected):
    """Largest error of a component's covariance, relative to that covariance in the Frobenius norm."""
    found, expected = np.asarray(found, float), np.asarray(expected, float)
    return np.max(np.linalg.norm(found - expected, axis=(1, 2)) / np.linalg.norm(expected, axis=(1, 2)))


def covariance_error(model, x, start):
    single = steps(model, x, start, jnp.float32)
    with jax.enable_x64(True):
        double = steps(model, x, start, jnp.float64)
        assert double.params.components.covariance.dtype == jnp.float64
    assert single.params.components.covariance.dtype == jnp.float32
    assert single.num_steps == double.num_steps == STEPS
    return relative_error(single.params.components.covariance, double.params.components.covariance)


# With moments about the origin, in place of the component's mean, the errors are 4e-3, 0.17 and NaN from 1e-2 down.
@pytest.mark.parametrize("width", [1e-1, 1e-2, 1e-3, 3e-4])
def test_tight_clusters_keep_their_covariances(width):
    x, start = clusters(width, CORNERS)
    assert covariance_error(Mixture(Normal("full"), 4), x, start) < 1e-3


@pytest.mark.parametrize("width", [1e-1, 1e-2, 1e-3, 3e-4])
def test_tight_clusters_keep_their_covariances_with_many_columns(width):
    # More columns than are written out: here the form of the arithmetic is chosen by the data, step by step.
    x, start = clusters(width, CORNERS)
    wide = np.hstack([x, np.random.default_rng(2).normal(size=(len(x), 2)).astype(np.float32) * np.float32(width)])
    weights, mean, _ = start
    mean = np.hstack([mean, np.zeros((4, 2), np.float32)])
    covariance = np.tile(2 * width**2 * np.eye(6), (4, 1, 1)).astype(np.float32)
    assert covariance_error(Mixture(Normal("full"), 4), wide, (weights, mean, covariance)) < 1e-3


def test_data_far_from_the_origin_keep_their_covariances():
    width = 0.05
    x, start = clusters(width, CORNERS + 1e4 * width)
    assert covariance_error(Mixture(Normal("full"), 4), x, start) < 1e-3


# At 5e5 widths from the origin a unit of float32 rounding is 0.03 widths: the data themselves are rounded to that, the
# same in both precisions. The mean is then known to half a unit, and a mean that is off by d adds d^2 to the covariance
# about it, which the statistics about the current mean take out again: what is left is the rounding of sums.
def test_two_clusters_a_million_widths_apart():
    x, start = clusters(1.0, np.array([[-5e5, 0.0], [5e5, 1.0]]))
    single = steps(Mixture(Normal("full"), 2), x, start, jnp.float32)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(single.params))
    assert np.isfinite(single.objective)
    np.testing.assert_allclose(single.params.weights, 0.5, rtol=1e-6)
    assert covariance_error(Mixture(Normal("full"), 2), x, start) < 1e-3


@functools.cache
def million_rows():
    """A million rows in three clusters that hardly overlap, fitted in float32 from a start beside the truth."""
    rng = np.random.default_rng(3)
    centres = np.array([[0.0, 0.0], [8.0, 0.0], [0.0, 8.0]])
    x = (centres[rng.integers(0, 3, 1_000_000)] + rng.normal(size=(1_000_000, 2))).astype(np.float32)
    start = MixtureParams(
        weights=jnp.array([0.2, 0.3, 0.5]),
        components=NormalParams(
            mean=jnp.asarray(centres + 1.0, jnp.float32), covariance=jnp.tile(4 * jnp.eye(2), (3, 1, 1))
        ),
    )
    return x, em_fit(Mixture(Normal("full"), 3), start, jnp.asarray(x), max_steps=200)


def test_a_million_rows_converge():
    _, fit = million_rows()
    assert fit.objective.dtype == jnp.float32
    assert fit.status == Status.CONVERGED
    assert fit.num_steps < 50


# Resolution: the objective is a sum of about -4e6, of which float32 keeps a unit of 0.5; each row's density carries a
# rounding error of its own, and these average out over a million rows. So a fall counts from eps |objective| on, here
# 0.5, and twice that is allowed: the rounding of the two values that are subtracted.
def test_a_million_rows_never_lower_the_objective_by_more_than_resolution():
    _, fit = million_rows()
    history = np.asarray(fit.history, float)[: int(fit.num_steps) + 1]
    resolution = np.finfo(np.float32).eps * np.abs(history).max()
    assert np.diff(history).min() >= -2 * resolution
    assert history[-1] > history[0] + 1e3 * resolution
    assert fit.largest_decrease <= 2 * resolution


def test_a_million_rows_end_at_the_means_of_their_clusters():
    # The clusters hardly overlap: the fitted means are those of the nearest rows, to their common edges' few rows.
    x, fit = million_rows()
    rows = x.astype(float)
    nearest = np.argmin([np.sum((rows - centre) ** 2, axis=1) for centre in [(0, 0), (8, 0), (0, 8)]], axis=0)
    expected = [rows[nearest == k].mean(axis=0) for k in range(3)]
    np.testing.assert_allclose(fit.params.components.mean, expected, atol=2e-3)
    np.testing.assert_allclose(fit.params.weights, np.bincount(nearest) / len(rows), atol=2e-4)


@pytest.mark.parametrize("shape", ["full", "diag", "tied", "spherical"])
def test_old_faithful_stops_at_the_resolution_of_float32(shape):
    x = datasets.faithful().astype(np.float32)
    model = Mixture(Normal(shape), 2)
    labels = (x[:, 1] > 68).astype(int)
    start = model.params_from_responsibilities(x, labels)
    # A tol of 0 leaves the decision to the resolution alone.
    fits = {tol: em_fit(model, start, x, tol=tol) for tol in (1e-6, 0.0)}
    for fit in fits.values():
        assert fit.objective.dtype == jnp.float32
        assert fit.status == Status.CONVERGED
        assert fit.num_steps < 300
    with jax.enable_x64(True):
        exact = em_fit(model, start, x.astype(float), tol=1e-12, max_steps=5000).check()
    # What tol or the resolution (a unit of 2^-13 at 1130 nats, twice over) leaves, and rounding of 272 densities.
    assert float(fits[1e-6].objective) == pytest.approx(float(exact.objective), rel=0, abs=5e-3)
    assert float(fits[0.0].objective) == pytest.approx(float(exact.objective), rel=0, abs=5e-3)


@pytest.mark.usefixtures("x64")
def test_float32_data_give_float32_results_where_x64_is_enabled():
    x = datasets.faithful().astype(np.float32)
    model = Mixture(Normal("full"), 2)
    params = model.init(jax.random.key(0), x)
    fit = em_fit(model, params, x, max_steps=5)
    assert jnp.ones(1).dtype == jnp.float64
    dtypes = {leaf.dtype for leaf in jax.tree.leaves((params, fit)) if jnp.issubdtype(leaf.dtype, jnp.floating)}
    assert dtypes == {jnp.dtype(jnp.float32)}
    assert model.log_prob(fit.params, x).dtype == jnp.float32
    assert model.posterior(fit.params, x).dtype == jnp.float32


@pytest.mark.usefixtures("x64")
def test_a_start_in_float64_takes_the_precision_of_the_data():
    x = datasets.faithful().astype(np.float32)
    model = Mixture(Normal("diag"), 2)
    start = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), model.init(jax.random.key(0), x))
    assert start.weights.dtype == jnp.float64
    fit = em_fit(model, start, x, max_steps=5)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(dataclasses.asdict(fit.params)))


@pytest.mark.parametrize("freedom", [0.2, 3.0, 1e3, 1e5, 1e7])
@pytest.mark.parametrize("columns", [1, 4])
def test_student_densities_at_any_degrees_of_freedom(freedom, columns):
    """Of a standard multivariate t: scipy's in float64."""
    x = np.random.default_rng(0).normal(size=(6, columns)).astype(np.float32)
    params = StudentTParams(
        mean=jnp.zeros((1, columns)),
        scale=jnp.ones((1, columns)),
        degrees_of_freedom=jnp.array([freedom], jnp.float32),
    )
    expected = scipy.stats.multivariate_t.logpdf(x.astype(float), np.zeros(columns), np.eye(columns), freedom)
    np.testing.assert_allclose(StudentT("diag").log_prob(params, x)[0], expected, rtol=2e-6, atol=2e-6)


def test_student_fits_of_many_rows_take_as_many_steps_as_in_float64():
    """About a mean of nearly 0, whose moves are rounding in the end, with degrees of freedom that are told slowly."""
    x = np.random.default_rng(3).standard_t(5, size=(100_000, 1)).astype(np.float32)
    model = Mixture(StudentT("diag"), 1)
    start = model.init(jax.random.key(0), x)
    single = em_fit(model, start, x).check()
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), start)
        double = em_fit(model, wide, x.astype(float)).check()
    assert single.num_steps < 2 * double.num_steps
    # One unit of 2^-6 at 163,000 nats, and what tol leaves.
    np.testing.assert_allclose(single.objective, double.objective, rtol=0, atol=0.1)


@pytest.mark.filterwarnings("ignore:.*the features, lie too far from 0:UserWarning")
def test_a_fit_whose_moves_are_rounding_rests():
    """An intercept a thousand widths of the features away, whose moves never get smaller."""
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(200, 2)) + 1e3).astype(np.float32)
    response = (features @ [1.0, 2.0] - 3e3 + rng.standard_t(4, size=200)).astype(np.float32)
    model, data = StudentTRegression(4.0), (features, response)
    start = model.init(jax.random.key(2), data)
    single = em_fit(model, start, data).check()
    assert single.num_steps < 300
    with jax.enable_x64(True):
        start, data = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), (start, data))
        double = em_fit(model, start, data).check()
    np.testing.assert_allclose(single.objective, double.objective, rtol=0, atol=5e-3)


@pytest.mark.parametrize("scale", [1e-12, 1e-15, 1e-20, 1e-28])
def test_exponential_densities_at_any_scale(scale):
    x = (scale * np.random.default_rng(0).exponential(size=8)).astype(np.float32)
    params = ExponentialParams(rate=jnp.full((1, 1), 1 / scale, jnp.float32))
    got = Exponential().log_prob(params, x)[0]
    np.testing.assert_allclose(got, scipy.stats.expon.logpdf(x.astype(float), scale=scale), rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("large", ["responses", "features"])
def test_poisson_regression_with_numbers_of_1e5(large):
    """Responses of 1e5, whose log-factorials are 1e6; and features whose eighth powers float32 does not hold."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 300)
    unit = 1e5 if large == "features" else 1.0
    features = (unit * rng.uniform(0.5, 1.5, size=(300, 2))).astype(np.float32)
    eta = (11.0 if large == "responses" else 2.0) + np.where(labels == 0, 1, -1) * (features @ [0.3, 0.1]) / unit
    response = rng.poisson(np.exp(eta)).astype(np.float32)
    model = Mixture(PoissonRegression(), 2)
    single = em_fit(model, model.params_from_responsibilities((features, response), labels), (features, response))
    with jax.enable_x64(True):
        x = features.astype(float), response.astype(float)
        double = em_fit(model, model.params_from_responsibilities(x, labels), x, tol=1e-10, max_steps=3000).check()
        best = float(double.objective)
        e_step = jax.jit(lambda params: model.e_step(params, x).loglik)
        at_single = float(e_step(jax.tree.map(lambda leaf: jnp.asarray(leaf, float), single.params)))
    assert single.status == Status.CONVERGED
    # The likelihood of what float32 found, in float64, against the best: tol, a row.
    assert abs(best - at_single) < 300 * 1e-5
    np.testing.assert_allclose(single.objective, best, atol=0.05)


def test_what_float32_cannot_hold_is_said():
    counts = np.random.default_rng(0).poisson(1e6, (20, 1))
    for family in (Poisson(), NegativeBinomial(), Binomial(10_000_000), Multinomial()):
        with pytest.warns(UserWarning, match="x holds counts up to 1e.06, whose log-probabilities float32 rounds"):
            family.check(counts)
    features = np.random.default_rng(0).normal(size=(20, 1)).astype(np.float32) + np.float32(1e4)
    with pytest.warns(UserWarning, match=r"x\[0\], the features, lie too far from 0 .* column 0 has mean 1e"):
        LinearRegression().check((features, features[:, 0]))
    narrow = np.random.default_rng(0).gamma(2000, 1, (200, 1))
    with pytest.warns(UserWarning, match=r"column 0 has a gamma shape of [12].* or more, which float32 rounds"):
        Gamma().check(narrow.astype(np.float32))
    with jax.enable_x64(True):
        Gamma().check(narrow)
        Poisson().check(counts)
        LinearRegression().check((features.astype(float), features[:, 0].astype(float)))
