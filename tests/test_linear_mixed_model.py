"""Linear mixed models against published figures, closed forms, and the dense marginal likelihood."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from jitted import e_step, m_step

from jaxem import LinearMixedModel, LinearMixedModelParams, Status, aic, bic, datasets, em_fit, group_rows
from jaxem.testing import LAWS, check_model

pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(0)
RNG = np.random.default_rng(8)
# Thirty groups of one to six rows, in no order.
NUMBERS = RNG.permutation(np.repeat(np.arange(30), RNG.integers(1, 7, 30)))
FEATURES = np.column_stack([np.ones(len(NUMBERS)), RNG.normal(size=(len(NUMBERS), 2))])
RANDOM = FEATURES[:, :2]
EFFECTS = (RNG.normal(size=(30, 2)) @ [[1.0, 0.5], [0.0, 0.7]])[NUMBERS]
RESPONSE = FEATURES @ [3.0, 1.0, -2.0] + np.sum(RANDOM * EFFECTS, axis=1) + 0.8 * RNG.normal(size=len(NUMBERS))
X = group_rows((FEATURES, RANDOM, RESPONSE), NUMBERS)
SOME = LinearMixedModelParams(
    coefficients=np.array([2.5, 1.2, -1.0]),
    random_covariance=np.array([[1.2, 0.3], [0.3, 0.5]]),
    variance=np.array(0.9),
)


def dense(params):
    """Of every group its rows, and the covariance of its responses."""
    for number in range(30):
        rows = number == NUMBERS
        z = RANDOM[rows]
        yield rows, z @ params.random_covariance @ z.T + params.variance * np.eye(rows.sum())


def log_densities(params):
    return np.array(
        [
            scipy.stats.multivariate_normal.logpdf(RESPONSE[rows], FEATURES[rows] @ params.coefficients, covariance)
            for rows, covariance in dense(params)
        ]
    )


def information(params, weights=None):
    """Of the coefficients: the sum of XᵀV⁻¹X; and the generalised least-squares coefficients."""
    gram, cross = np.zeros((3, 3)), np.zeros(3)
    for weight, (rows, covariance) in zip(np.ones(30) if weights is None else weights, dense(params), strict=True):
        scaled = weight * np.linalg.solve(covariance, FEATURES[rows])
        gram, cross = gram + FEATURES[rows].T @ scaled, cross + scaled.T @ RESPONSE[rows]
    return gram, np.linalg.solve(gram, cross)


def restricted(params):
    """The logarithm of the integral of the likelihood over the coefficients."""
    gram, best = information(params)
    peak = log_densities(dataclasses.replace(params, coefficients=best)).sum()
    return peak + 1.5 * np.log(2 * np.pi) - 0.5 * np.linalg.slogdet(gram)[1]


def of_vector(vector):
    factor = np.array([[np.exp(vector[0]), 0], [vector[1], np.exp(vector[2])]])
    return LinearMixedModelParams(
        coefficients=vector[4:], random_covariance=factor @ factor.T, variance=np.exp(vector[3])
    )


def one_way(response, batches, method="ML"):
    """A grand mean, and batches about it."""
    ones = np.ones((len(response), 1))
    x = group_rows((ones, ones, response), batches)
    model = LinearMixedModel(method)
    return em_fit(model, model.init(KEY, x), x, tol=1e-13)


@pytest.mark.parametrize(
    ("method", "deviance", "between", "within"),
    # Bates, Maechler, Bolker & Walker (2015), lme4, for Davies (1947); of REML see Bates, lme4: Mixed-effects modeling
    # with R, section 1.3: 319.65, 42.001 and 49.510.
    [("ML", 327.32705988, 37.26034, 49.51010), ("REML", 319.6543, 42.0006, 49.5101)],
)
def test_dyestuff_has_the_published_figures(method, deviance, between, within):
    fit = one_way(*datasets.dyestuff(), method)
    assert fit.converged
    assert fit.num_steps <= 20
    assert -2 * float(fit.objective) == pytest.approx(deviance, abs=1e-8 if method == "ML" else 5e-5)
    assert np.sqrt(fit.params.random_covariance[0, 0]) == pytest.approx(between, abs=5e-5 if method == "ML" else 6e-4)
    assert np.sqrt(fit.params.variance) == pytest.approx(within, abs=5e-5)
    assert fit.params.coefficients[0] == pytest.approx(1527.5)


@pytest.mark.parametrize("method", ["ML", "REML"])
def test_a_balanced_layout_has_its_closed_form(method):
    response, batches = datasets.dyestuff()
    fit = one_way(response, batches, method)
    means = response.reshape(6, 5).mean(axis=1)
    within = np.sum((response - means[batches]) ** 2) / 24
    between = 5 * np.sum((means - means.mean()) ** 2) / (6 if method == "ML" else 5)
    assert fit.params.variance == pytest.approx(within, rel=1e-5)
    assert fit.params.random_covariance[0, 0] == pytest.approx((between - within) / 5, rel=1e-4)


def test_a_step_is_the_one_derived_by_hand():
    """Batches of n about a mean m: effects have mean s (average - m), s = n psi / (n psi + variance), and variance
    (1 - s) psi; the step takes mean squares of these, and of what they leave."""
    response, batches = datasets.dyestuff()
    ones, model = np.ones((30, 1)), LinearMixedModel()
    start = LinearMixedModelParams(
        coefficients=np.array([1500.0]), random_covariance=np.array([[900.0]]), variance=np.array(3000.0)
    )
    found = m_step(model, e_step(model, start, group_rows((ones, ones, response), batches)))
    shrink = 5 * 900 / (5 * 900 + 3000)
    effects = shrink * (response.reshape(6, 5).mean(axis=1) - 1500)
    spread = (1 - shrink) * 900
    left = response - effects[batches]
    assert found.coefficients[0] == pytest.approx(left.mean(), rel=1e-12)
    assert found.random_covariance[0, 0] == pytest.approx(np.mean(effects**2) + spread, rel=1e-12)
    assert found.variance == pytest.approx(left.var() + spread, rel=1e-12)


def test_a_variance_of_0_is_reached_and_told():
    """Dyestuff2 (Box & Tiao 1973; lme4): no variance between batches, -2 log L 162.87303665."""
    fit = one_way(*datasets.dyestuff2())
    assert fit.status == Status.DEGENERATE
    assert fit.num_steps <= 20
    assert -2 * float(fit.objective) == pytest.approx(162.87303665, abs=1e-7)
    assert fit.params.random_covariance[0, 0] < 1e-7
    assert fit.params.variance == pytest.approx(np.var(datasets.dyestuff2()[0]), rel=1e-7)


@pytest.mark.parametrize("method", ["ML", "REML"])
def test_a_fit_is_the_maximum_of_the_dense_likelihood(method):
    model = LinearMixedModel(method)
    fit = em_fit(model, model.init(KEY, X), X, tol=1e-13)
    assert fit.converged

    def loss(vector):
        if method == "REML":
            return -restricted(of_vector(np.concatenate([vector, np.zeros(3)])))
        return -log_densities(of_vector(vector)).sum()

    theta = model.unconstrain(fit.params)
    # Of the covariance its Cholesky factor row by row, the diagonal in logarithms.
    ours = np.concatenate([theta.random_covariance, theta.variance[None], theta.coefficients])
    ours = ours[:4] if method == "REML" else ours
    assert -loss(ours) == pytest.approx(float(fit.objective), abs=1e-9)
    best = scipy.optimize.minimize(loss, ours + 0.1, method="BFGS", options={"gtol": 1e-6})
    assert float(fit.objective) == pytest.approx(-best.fun, abs=1e-6)
    np.testing.assert_allclose(ours, best.x, atol=2e-4)
    gram, at = information(fit.params)
    np.testing.assert_allclose(fit.params.coefficients, at, rtol=1e-6)
    np.testing.assert_allclose(model.standard_errors(fit.params, X), np.sqrt(np.diag(np.linalg.inv(gram))), rtol=1e-9)
    assert model.num_parameters(fit.params) == 7


def test_groups_have_the_density_and_the_effects_of_the_dense_model():
    model = LinearMixedModel()
    np.testing.assert_allclose(model.log_prob(SOME, X), log_densities(SOME), rtol=1e-10)
    found = model.posterior(SOME, X)
    means = np.zeros((30, 2))
    for number, (rows, covariance) in enumerate(dense(SOME)):
        gain = SOME.random_covariance @ np.linalg.solve(covariance, RANDOM[rows]).T
        means[number] = gain @ (RESPONSE[rows] - FEATURES[rows] @ SOME.coefficients)
        np.testing.assert_allclose(found.means[number], means[number], atol=1e-10)
        np.testing.assert_allclose(
            found.covariances[number], SOME.random_covariance - gain @ RANDOM[rows] @ SOME.random_covariance, atol=1e-10
        )
    order = np.argsort(NUMBERS, kind="stable")
    expected = FEATURES @ SOME.coefficients + np.sum(RANDOM * means[NUMBERS], axis=1)
    np.testing.assert_allclose(model.predict(SOME, X), expected[order], atol=1e-9)
    deviance = -2 * log_densities(SOME).sum()
    assert aic(model, SOME, X) == pytest.approx(deviance + 14)
    assert bic(model, SOME, X) == pytest.approx(deviance + 7 * np.log(len(NUMBERS)))


def test_restricted_steps_keep_the_laws_but_those_of_sums():
    """The restricted likelihood is none, so that statistics of parts do not add up to those of the whole."""
    model, x = LinearMixedModel("REML"), LinearMixedModel().units(X)
    sums = {"additive", "q is linear", "blocks are the whole", "lower bound", "brute force", "conditional M-steps"}
    dear = {"eager, jit and vmap agree"}
    start = dataclasses.replace(SOME, coefficients=np.array([2.5, 1.2, -1.0]))
    checked = check_model(model, jax.tree.map(jnp.asarray, start), x, skip=sums | dear)
    assert set(checked) == set(LAWS) - sums - dear
    assert e_step(model, SOME, x).loglik == pytest.approx(restricted(SOME), rel=1e-10)


def fitted(features, random, response, groups):
    x, model = group_rows((features, random, response), groups), LinearMixedModel()
    return em_fit(model, model.init(KEY, x), x)


def test_what_tells_nothing_stays_finite():
    """Features that repeat one another, and groups of one row."""
    repeated = FEATURES[:, [0, 1, 1]]
    for features, groups in ((repeated, NUMBERS), (FEATURES, np.arange(len(NUMBERS)))):
        fit = fitted(features, RANDOM, RESPONSE, groups)
        assert fit.status in (Status.CONVERGED, Status.DEGENERATE)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(fit.params))
    assert np.all(
        np.isfinite(LinearMixedModel().standard_errors(SOME, group_rows((repeated, RANDOM, RESPONSE), NUMBERS)))
    )


def test_noise_and_directions_that_vanish_are_told():
    """No noise; and intercepts alone, of which the slopes of groups vary less than noise accounts for."""
    assert fitted(FEATURES, RANDOM, FEATURES @ [1.0, 2.0, 3.0], NUMBERS).status == Status.DEGENERATE
    flat = FEATURES @ [3.0, 1.0, -2.0] + EFFECTS[:, 0] + np.random.default_rng(1).normal(size=len(NUMBERS))
    fit = fitted(FEATURES, RANDOM, flat, NUMBERS)
    assert fit.status == Status.DEGENERATE
    assert np.linalg.eigvalsh(fit.params.random_covariance)[0] < 1e-4


def test_float32_is_safe_far_from_0():
    """Responses of a million with noise of about 1: products are taken about a line, and do not cancel."""
    far = group_rows((FEATURES, RANDOM, RESPONSE + 1e6), NUMBERS)
    with jax.enable_x64(False):
        single = group_rows(jax.tree.map(lambda leaf: leaf.astype(np.float32), (FEATURES, RANDOM, RESPONSE)), NUMBERS)
        near = em_fit(LinearMixedModel(), LinearMixedModel().init(KEY, single), single).params
    exact = em_fit(LinearMixedModel(), LinearMixedModel().init(KEY, far), far).params
    np.testing.assert_allclose(near.random_covariance, exact.random_covariance, atol=5e-3)
    assert near.variance == pytest.approx(float(exact.variance), rel=2e-3)
    assert exact.coefficients[0] - 1e6 == pytest.approx(float(near.coefficients[0]), abs=2e-3)


def test_weights_repeat_groups():
    weights = RNG.integers(0, 3, 30).astype(float)
    found = e_step(LinearMixedModel("REML"), SOME, X, weights)
    rows = [np.flatnonzero(number == NUMBERS) for number in range(30) for _ in range(int(weights[number]))]
    again = np.concatenate([np.full(len(part), number) for number, part in enumerate(rows)])
    every = np.concatenate(rows)
    repeated = group_rows((FEATURES[every], RANDOM[every], RESPONSE[every]), again)
    expected = e_step(LinearMixedModel("REML"), SOME, repeated)
    assert found.loglik == pytest.approx(float(expected.loglik), rel=1e-10)
    np.testing.assert_allclose(found.effects, expected.effects, rtol=1e-8)
    errors = LinearMixedModel().standard_errors(SOME, X, weights)
    np.testing.assert_allclose(errors, np.sqrt(np.diag(np.linalg.inv(information(SOME, weights)[0]))), rtol=1e-9)


def test_samples_have_the_variances():
    groups, ones = np.repeat(np.arange(4000), 3), np.ones((12_000, 1))
    params = LinearMixedModelParams(
        coefficients=jnp.array([5.0]), random_covariance=jnp.array([[2.0]]), variance=jnp.array(0.5)
    )
    x = group_rows((ones, ones, np.zeros(12_000)), groups)
    drawn = np.asarray(LinearMixedModel().sample(KEY, params, x)).reshape(4000, 3)
    assert drawn.mean() == pytest.approx(5, abs=0.1)
    assert np.mean(drawn.var(axis=1, ddof=1)) == pytest.approx(0.5, abs=0.03)
    assert np.cov(drawn[:, 0], drawn[:, 1])[0, 1] == pytest.approx(2, abs=0.2)


def test_rows_are_grouped_by_names_in_order():
    x = group_rows(np.arange(5), ["b", "a", "b", "c", "a"])
    np.testing.assert_array_equal(x.values, [1, 4, 0, 2, 3])
    np.testing.assert_array_equal(x.sizes, [2, 2, 1])
    np.testing.assert_array_equal(x.numbers(), [0, 0, 1, 1, 2])


def test_what_is_no_grouped_rows_is_refused():
    with pytest.raises(ValueError, match=r"groups must have shape \(5,\), one name a row of values; got \(4,\)"):
        group_rows(np.arange(5), np.zeros(4))
    with pytest.raises(ValueError, match="groups must name every row; row 1 is NaN"):
        group_rows(np.arange(2), np.array([0, np.nan]))
    model = LinearMixedModel()
    with pytest.raises(TypeError, match=r"x must be group_rows\(\(features, random_features, response\), groups\)"):
        model.init(KEY, RESPONSE)
    with pytest.raises(ValueError, match=r"weights must have shape \(30,\)"):
        em_fit(model, SOME, X, np.ones(len(NUMBERS)))
    with pytest.raises(ValueError, match=r"x\[2\] must be finite"):
        model.init(KEY, group_rows((FEATURES, RANDOM, np.where(NUMBERS == 2, np.nan, RESPONSE)), NUMBERS))
    products = model.units(X)
    with pytest.raises(ValueError, match="x must be products of finite rows"):
        em_fit(model, SOME, dataclasses.replace(products, rr=products.rr.at[3].set(jnp.nan)))
    with pytest.raises(TypeError, match=r"x must be group_rows"):
        model.predict(SOME, products)
    with pytest.raises(ValueError, match="method must be one of 'ML', 'REML'"):
        LinearMixedModel("REML2")
