"""Families beside their peers: hand-written NumPy EM, scikit-learn, scipy, in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from sklearn import linear_model

from jaxem import (
    Background,
    Bernoulli,
    BernoulliParams,
    Categorical,
    CategoricalParams,
    LinearRegression,
    LogisticRegression,
    Mixture,
    MixtureParams,
    Normal,
    NormalParams,
    Poisson,
    PoissonParams,
    PoissonRegression,
    Product,
    RegressionParams,
    StudentT,
    bounding_volume,
    datasets,
    em_fit,
    fit_restarts,
)

pytestmark = pytest.mark.usefixtures("x64")

RNG = np.random.default_rng(21)


def history(fit):
    return np.asarray(fit.history)[: int(fit.num_steps) + 1]


# One NumPy EM for mixtures of independent columns with missing entries, by the textbook: log p(x_nd | k) is a table
# function of the family, and its M-step a weighted mean over observed entries.
def reference_em(log_density, x, weights, means, steps):
    observed = ~np.isnan(x)
    filled = np.where(observed, x, 0)
    trace = []
    for _ in range(steps + 1):
        joint = np.log(weights) + np.stack(
            [np.sum(np.where(observed, log_density(filled, mean), 0), axis=1) for mean in means], axis=1
        )
        evidence = np.logaddexp.reduce(joint, axis=1)
        trace.append(evidence.sum())
        share = np.exp(joint - evidence[:, None])
        final = weights, means
        weights = share.mean(axis=0)
        means = (share.T @ filled) / (share.T @ observed)
    return np.array(trace), final


def holes(x, share=0.15):
    missing = RNG.random(x.shape) < share
    return np.where(missing, np.nan, x)


COUNTS = holes(RNG.poisson(np.array([[1.0, 7.0, 3.0], [6.0, 2.0, 3.0]])[RNG.integers(0, 2, 120)]).astype(float))
YES = holes((RNG.random((150, 6)) < np.array([[0.8], [0.3]])[RNG.integers(0, 2, 150)]).astype(float))


def test_poisson_mixture_with_missing_counts_iterate_by_iterate():
    weights, rates = np.array([0.4, 0.6]), np.array([[2.0, 5.0, 3.0], [5.0, 3.0, 2.5]])
    trace, (last_weights, last_rates) = reference_em(scipy.stats.poisson.logpmf, COUNTS, weights, rates, 25)
    start = MixtureParams(weights=jnp.asarray(weights), components=PoissonParams(rate=jnp.asarray(rates)))
    fit = em_fit(Mixture(Poisson(), 2), start, COUNTS, tol=-1.0, max_steps=25)
    np.testing.assert_allclose(history(fit), trace, rtol=1e-12)
    np.testing.assert_allclose(fit.params.weights, last_weights, rtol=1e-10)
    np.testing.assert_allclose(fit.params.components.rate, last_rates, rtol=1e-10)


def test_bernoulli_mixture_with_missing_answers_iterate_by_iterate():
    weights, probability = np.array([0.5, 0.5]), RNG.uniform(0.3, 0.7, (2, 6))
    trace, (last_weights, last) = reference_em(scipy.stats.bernoulli.logpmf, YES, weights, probability, 25)
    start = MixtureParams(
        weights=jnp.asarray(weights), components=BernoulliParams(probability=jnp.asarray(probability))
    )
    as_marked = np.where(np.isnan(YES), -1, YES).astype(np.int32)
    for x in (YES, as_marked):  # NaN among floats, -1 among whole numbers
        fit = em_fit(Mixture(Bernoulli(), 2), start, x, tol=-1.0, max_steps=25)
        np.testing.assert_allclose(history(fit), trace, rtol=1e-12)
        np.testing.assert_allclose(fit.params.weights, last_weights, rtol=1e-10)
        np.testing.assert_allclose(fit.params.components.probability, last, rtol=1e-9)


@pytest.mark.parametrize("covariance", ["diag", "spherical", "EEI", "EII"])
def test_normals_with_missing_entries_have_the_likelihood_of_what_is_observed(covariance):
    labels = RNG.integers(0, 2, 90)
    x = holes(RNG.normal(size=(90, 3)) * [1.0, 2.0, 0.5] + np.array([[0.0, 0.0, 5.0], [4.0, 3.0, 5.0]])[labels])
    model = Mixture(Normal(covariance), 2)
    fit = em_fit(model, model.init(jax.random.key(0), x), x, tol=-1.0, max_steps=200)
    assert np.all(np.diff(history(fit)) >= -1e-9)
    params = fit.params
    mean = np.asarray(params.components.mean)
    variance = np.asarray(jnp.diagonal(model.family.covariance_matrix(params.components), axis1=1, axis2=2))
    observed = ~np.isnan(x)
    logs = scipy.stats.norm.logpdf(np.where(observed, x, 0)[:, None], mean, np.sqrt(variance))
    joint = np.log(np.asarray(params.weights)) + np.sum(np.where(observed[:, None], logs, 0), axis=2)
    np.testing.assert_allclose(fit.loglik, np.logaddexp.reduce(joint, axis=1).sum(), rtol=1e-12)
    # At the maximum, means and variances are those of the observed entries, shared by their responsibilities.
    share = np.exp(joint - np.logaddexp.reduce(joint, axis=1)[:, None])
    entries = share.T @ observed
    np.testing.assert_allclose(mean, share.T @ np.where(observed, x, 0) / entries, rtol=1e-6)
    squares = np.einsum("nk,nkd->kd", share, np.where(observed[:, None], (x[:, None] - mean) ** 2, 0))
    pooled = {
        "diag": squares / entries,
        "spherical": (squares.sum(axis=1) / entries.sum(axis=1))[:, None],
        "EEI": squares.sum(axis=0) / entries.sum(axis=0),
        "EII": squares.sum() / entries.sum(),
    }
    np.testing.assert_allclose(variance, np.broadcast_to(pooled[covariance], variance.shape), rtol=1e-6)


def test_gradients_through_missing_entries_are_finite():
    x = holes(RNG.normal(size=(30, 3)))
    for family in (Normal("diag"), Normal("spherical")):
        model = Mixture(family, 2)
        params = model.init(jax.random.key(0), x)
        slope = jax.grad(lambda params, model=model: jnp.sum(model.log_prob(params, jnp.asarray(x))))(params)
        assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(slope))
        # Also where the rows themselves are mapped over, so that no branch can be taken for all.
        slopes = jax.vmap(lambda row, model=model, params=params: jax.grad(
            lambda params: jnp.sum(model.log_prob(params, row[None])))(params))(jnp.asarray(x))  # fmt: skip
        assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(slopes))


FEATURES = RNG.normal(size=(200, 3))
LINE = np.array([0.7, -1.1, 0.4])


def single(family, x, tol=1e-14):
    model = Mixture(family, 1)
    return em_fit(model, model.init(jax.random.key(0), x), x, WEIGHTS, tol=tol, max_steps=2000).check()


WEIGHTS = RNG.uniform(0.5, 2.0, 200)


def test_one_linear_regression_is_weighted_least_squares():
    y = FEATURES @ LINE + 2.0 + RNG.normal(size=200)
    found = single(LinearRegression(), (FEATURES, y)).params.components
    peer = linear_model.LinearRegression().fit(FEATURES, y, sample_weight=WEIGHTS)
    np.testing.assert_allclose(found.coefficients[0], peer.coef_, rtol=1e-9)
    np.testing.assert_allclose(found.intercept[0], peer.intercept_, rtol=1e-9)
    residual = y - peer.predict(FEATURES)
    np.testing.assert_allclose(found.variance[0], np.average(residual**2, weights=WEIGHTS), rtol=1e-9)


def test_one_logistic_regression_is_scikit_learns():
    y = (RNG.random(200) < 1 / (1 + np.exp(-FEATURES @ LINE - 0.3))).astype(int)
    found = single(LogisticRegression(ridge=0.5), (FEATURES, y)).params.components
    peer = linear_model.LogisticRegression(C=2.0, tol=1e-12, max_iter=10_000)
    peer.fit(FEATURES, y, sample_weight=WEIGHTS)
    np.testing.assert_allclose(found.coefficients[0], peer.coef_[0], rtol=1e-5)
    np.testing.assert_allclose(found.intercept[0], peer.intercept_[0], rtol=1e-5)


def test_one_poisson_regression_is_scikit_learns():
    y = RNG.poisson(np.exp(FEATURES @ (0.5 * LINE) + 1.0))
    found = single(PoissonRegression(), (FEATURES, y)).params.components
    peer = linear_model.PoissonRegressor(alpha=0.0, tol=1e-12, max_iter=10_000)
    peer.fit(FEATURES, y, sample_weight=WEIGHTS)
    np.testing.assert_allclose(found.coefficients[0], peer.coef_, rtol=1e-5)
    np.testing.assert_allclose(found.intercept[0], peer.intercept_, rtol=1e-5)


def test_poisson_regression_is_monotone_from_a_wild_start():
    y = RNG.poisson(np.exp(FEATURES @ (0.5 * LINE) + 1.0))
    model = Mixture(PoissonRegression(), 1)
    start = model.init(jax.random.key(0), (FEATURES, y))
    wild = MixtureParams(
        weights=start.weights,
        components=RegressionParams(coefficients=jnp.array([[-2.0, 2.0, 1.0]]), intercept=jnp.array([-4.0])),
    )
    fit = em_fit(model, wild, (FEATURES, y), tol=1e-10, max_steps=2000).check()
    assert np.all(np.diff(history(fit)) >= -1e-9 * abs(history(fit)[0]))
    calm = em_fit(model, start, (FEATURES, y), tol=1e-12).objective
    np.testing.assert_allclose(fit.objective, calm, rtol=1e-9)


def test_mixture_of_regressions_finds_both_lines():
    which = RNG.integers(0, 2, 200)
    y = np.where(which, FEATURES @ LINE + 3, FEATURES @ -LINE - 3) + 0.3 * RNG.normal(size=200)
    model = Mixture(LinearRegression(), 2)
    runs = fit_restarts(model, jax.random.key(0), (FEATURES, y), num_restarts=8, certify=False)
    found = runs.best.params.components
    order = np.argsort(found.intercept)
    np.testing.assert_allclose(found.coefficients[order], [-LINE, LINE], atol=0.1)
    np.testing.assert_allclose(found.intercept[order], [-3, 3], atol=0.1)


def test_one_student_t_is_the_maximum_likelihood_fit():
    x = scipy.stats.t.rvs(3.0, loc=1.0, scale=2.0, size=300, random_state=5)
    model = Mixture(StudentT(), 1)
    fit = em_fit(model, model.init(jax.random.key(0), x), x, tol=1e-12, max_steps=5000).check()
    nu, loc, scale = scipy.stats.t.fit(x)
    assert float(fit.objective) >= scipy.stats.t.logpdf(x, nu, loc, scale).sum() - 1e-6
    np.testing.assert_allclose(fit.params.components.degrees_of_freedom[0], nu, rtol=2e-3)
    np.testing.assert_allclose(fit.params.components.mean[0, 0], loc, atol=2e-3)
    np.testing.assert_allclose(fit.params.components.scale[0, 0, 0], scale**2, rtol=4e-3)


def test_student_t_degrees_of_freedom_of_normal_data_end_at_the_cap():
    x = np.linspace(-1, 1, 200)
    model = Mixture(StudentT(), 1)
    fit = em_fit(model, model.init(jax.random.key(0), x), x, tol=1e-12, max_steps=3000)
    assert np.all(np.isfinite(history(fit)))
    assert 100 < float(fit.params.components.degrees_of_freedom[0]) <= 1000.001


def test_a_background_takes_the_outliers():
    labels = RNG.integers(0, 2, 200)
    clusters = RNG.normal(size=(200, 2)) + np.array([[0.0, 0.0], [8.0, 8.0]])[labels]
    x = np.vstack([clusters, RNG.uniform(-40, 40, (20, 2))])
    model = Mixture(Background(Normal("full"), bounding_volume(x)), 2)
    fit = fit_restarts(model, jax.random.key(0), x, num_restarts=8, certify=False).best
    assert fit.params.weights.shape == (3,)
    np.testing.assert_allclose(fit.params.weights[2], 20 / 220, atol=0.03)
    assert np.mean(np.asarray(model.predict(fit.params, x))[200:] == 2) > 0.8
    # By hand: two normal densities and 1 / volume.
    part = fit.params.components
    density = sum(
        float(fit.params.weights[k])
        * scipy.stats.multivariate_normal.pdf(x, np.asarray(part.mean[k]), np.asarray(part.covariance[k]))
        for k in range(2)
    )
    density += float(fit.params.weights[2]) / float(bounding_volume(x))
    np.testing.assert_allclose(model.log_prob(fit.params, x), np.log(density), rtol=1e-9)
    assert model.num_parameters(fit.params) == 2 + 2 * 5


# mclust 6, hypvol: the smaller of the box along the axes and the box along the principal ones.
def test_bounding_volume_is_the_smaller_box():
    turned = RNG.uniform(-1, 1, (500, 2)) * [10, 1] @ np.array([[1, 1], [-1, 1]]) / math.sqrt(2)
    assert float(bounding_volume(turned)) == pytest.approx(40, rel=0.1)
    assert float(bounding_volume(RNG.uniform(0, 3, (500, 2)))) == pytest.approx(9, rel=0.1)
    with pytest.raises(ValueError, match="must fill a volume"):
        bounding_volume(np.column_stack([np.arange(5.0), np.ones(5)]))


def test_boundary_optima_end_without_nan():
    yes = np.array([[0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1], [0, 1, 0, 1]] * 5)
    for family, x in (
        (Bernoulli(), yes),
        (Categorical(3), yes),
        (Poisson(), np.where(yes, 0, 4)),
    ):
        runs = fit_restarts(Mixture(family, 2), jax.random.key(0), x, num_restarts=4, certify=False)
        assert not np.any(np.isnan(runs.objective))
        for leaf in jax.tree.leaves(runs.params):
            assert not np.any(np.isnan(leaf))
        runs.check()


def test_probabilities_of_exactly_zero_and_one_stay_there():
    x = np.array([[0, 1], [0, 1], [0, 0], [0, 1]])
    start = MixtureParams(
        weights=jnp.array([0.5, 0.5]), components=BernoulliParams(probability=jnp.array([[0.0, 1.0], [0.0, 0.4]]))
    )
    model = Mixture(Bernoulli(), 2)
    fit = em_fit(model, start, x).check()
    # The third row is impossible under the first component.
    assert float(model.posterior(fit.params, x)[2, 0]) == 0
    np.testing.assert_array_equal(fit.params.components.probability[:, 0], [0.0, 0.0])
    slope = jax.grad(lambda p: jnp.sum(model.log_prob(p, jnp.asarray(x))))(fit.params)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(slope))


def test_an_impossible_row_has_no_component_and_no_density():
    model = Mixture(Categorical(3), 2)
    probability = jnp.array([[[0.5, 0.5, 0.0]], [[1.0, 0.0, 0.0]]])
    params = MixtureParams(weights=jnp.array([0.5, 0.5]), components=CategoricalParams(probability=probability))
    x = np.array([[0], [1], [2]])
    np.testing.assert_allclose(model.log_prob(params, x), [math.log(0.75), math.log(0.25), -np.inf])
    np.testing.assert_allclose(model.posterior(params, x), [[1 / 3, 2 / 3], [1, 0], [0, 0]])


def test_a_mixed_table_with_missing_values_is_clustered():
    labels = RNG.integers(0, 3, 300)
    table = {
        "size": holes(RNG.normal(size=(300, 2)) + 3.0 * labels[:, None]),
        "smoker": np.where(RNG.random(300) < 0.1, -1, RNG.random(300) < np.array([0.1, 0.5, 0.9])[labels]).astype(int),
        "visits": RNG.poisson(np.array([1.0, 4.0, 9.0])[labels]),
        "region": RNG.integers(0, 4, 300),
    }
    model = Mixture(
        Product({"size": Normal("diag"), "smoker": Bernoulli(), "visits": Poisson(), "region": Categorical(4)}), 3
    )
    runs = fit_restarts(model, jax.random.key(0), table, num_restarts=8, certify=False)
    found = np.asarray(model.predict(runs.best.params, table))
    agreement = max(np.mean(np.array(order)[found] == labels) for order in ([0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0],
                                                                            [2, 0, 1], [2, 1, 0]))  # fmt: skip
    assert agreement > 0.9
    # 2 weights, and a component: 2 means and 2 variances, 1, 1 and 3 probabilities and rates.
    assert model.num_parameters(runs.best.params) == 2 + 3 * (4 + 1 + 1 + 3)
    drawn = model.sample(jax.random.key(1), runs.best.params, 7)
    assert {name: part.shape for name, part in drawn.items()} == {
        "size": (7, 2), "smoker": (7, 1), "visits": (7, 1), "region": (7, 1)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("mclust", "name"),
    [
        ("VVV", "full"),
        ("VVI", "diag"),
        ("VII", "spherical"),
        ("EEE", "tied"),
        ("EEI", "tied_diag"),
        ("EII", "tied_spherical"),
    ],
)
def test_mclusts_names_are_the_same_models(mclust, name):
    assert Normal(mclust) == Normal(name)
    assert Normal(mclust).covariance == name


def test_tied_shapes_are_the_pooled_estimates():
    x, species = datasets.iris()
    deviations = x - np.stack([x[species == k].mean(axis=0) for k in range(3)])[species]
    for name, expected, free in (
        ("EEI", np.mean(deviations**2, axis=0), 2 + 12 + 4),
        ("EII", np.mean(deviations**2), 2 + 12 + 1),
    ):
        model = Mixture(Normal(name), 3)
        params = model.params_from_responsibilities(x, species)
        np.testing.assert_allclose(params.components.covariance, expected, rtol=1e-10)
        assert model.num_parameters(params) == free
        assert isinstance(params.components, NormalParams)
