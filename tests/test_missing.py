"""Missing values of correlated columns, by textbook EM in NumPy, closed forms, published numbers and scipy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats as st

from jaxem import (
    HMM,
    Fixed,
    Mixture,
    MixtureParams,
    Moments,
    MultivariateNormal,
    MultivariateNormalParams,
    Normal,
    NormalParams,
    Poisson,
    Sequences,
    Status,
    default_prior,
    em_fit,
    fit_restarts,
)
from jaxem.capabilities import complete, informed, original
from jaxem.families import conditional

RNG = np.random.default_rng(11)

pytestmark = pytest.mark.usefixtures("x64")


def holes(x, share=0.2, seed=0):
    """Entries missing at random, and one row without any."""
    x = np.where(np.random.default_rng(seed).random(x.shape) < share, np.nan, x)
    x[3] = np.nan
    return x


def normal_rows(rows, columns, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, columns)) @ rng.normal(size=(columns, columns)) + 3 * rng.normal(size=columns)


def given_observed(x, mean, covariance):
    """Conditional means, covariances and log-densities of rows, pattern by pattern (Little & Rubin 2002, section 11.2).

    Rows that share what is observed of them share the regressions of the rest on it.
    """
    mean, covariance = np.asarray(mean), np.asarray(covariance)
    found, spread, logs = np.empty_like(x), np.zeros((*x.shape, x.shape[1])), np.zeros(len(x))
    seen = ~np.isnan(x)
    for pattern in np.unique(seen, axis=0):
        rows, o, m = np.flatnonzero(np.all(seen == pattern, axis=1)), np.flatnonzero(pattern), np.flatnonzero(~pattern)
        slopes = np.linalg.solve(covariance[np.ix_(o, o)], covariance[np.ix_(o, m)])
        residual = x[np.ix_(rows, o)] - mean[o]
        found[np.ix_(rows, o)], found[np.ix_(rows, m)] = x[np.ix_(rows, o)], mean[m] + residual @ slopes
        spread[np.ix_(rows, m, m)] = covariance[np.ix_(m, m)] - covariance[np.ix_(m, o)] @ slopes
        if len(o):
            logs[rows] = st.multivariate_normal(mean[o], covariance[np.ix_(o, o)]).logpdf(x[np.ix_(rows, o)])
    return found, spread, logs


def textbook_step(x, weights, means, covariances, tied=False):
    """One EM step of a mixture and its log-likelihood; rows without an observed entry count in the weights alone."""
    each = [given_observed(x, m, c) for m, c in zip(means, covariances, strict=True)]
    means = np.asarray(means)
    joint = np.log(weights) + np.stack([logs for _, _, logs in each], axis=1)
    total = np.logaddexp.reduce(joint, axis=1)
    share = np.exp(joint - total[:, None])
    counted = share * ~np.all(np.isnan(x), axis=1)[:, None]
    rows = counted.sum(axis=0)
    new_means = np.stack([r @ found / n for (found, _, _), r, n in zip(each, counted.T, rows, strict=True)])
    scatters = np.stack(
        [
            np.einsum("n,ni,nj->ij", r, found - m, found - m) + np.einsum("n,nij->ij", r, spread)
            for (found, spread, _), r, m in zip(each, counted.T, new_means, strict=True)
        ]
    )
    new = scatters / rows[:, None, None]
    if tied:
        new = np.broadcast_to(scatters.sum(axis=0) / rows.sum(), new.shape)
    return share.mean(axis=0), new_means, new, total.sum()


def two_clusters(columns=3):
    x = normal_rows(80, columns, seed=2)
    x[40:] = normal_rows(40, columns, seed=3) + 4
    return holes(x)


@pytest.mark.parametrize("covariance", ["full", "tied"])
@pytest.mark.parametrize("columns", [3, 7])
def test_a_mixture_follows_textbook_em_iterate_by_iterate(covariance, columns):
    x = two_clusters(columns)
    model = Mixture(Normal(covariance), 2)
    params = model.init(jax.random.key(1), x)
    step = jax.jit(lambda params: (model.m_step(stats := model.e_step(params, x)), stats.loglik))
    for _ in range(12):
        c = params.components
        each = np.broadcast_to(c.covariance, (2, columns, columns))
        weights, means, covariances, loglik = textbook_step(x, params.weights, c.mean, each, covariance == "tied")
        params, own = step(params)
        np.testing.assert_allclose(own, loglik, rtol=1e-12)
        np.testing.assert_allclose(params.weights, weights, rtol=1e-9)
        np.testing.assert_allclose(params.components.mean, means, rtol=1e-9, atol=1e-9)
        found = np.broadcast_to(params.components.covariance, covariances.shape)
        np.testing.assert_allclose(found, covariances, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("columns", [1, 2, 5])
def test_densities_are_those_of_what_is_observed(columns):
    """A row of which nothing is observed has density 1, and the posterior of the weights."""
    x = holes(normal_rows(30, columns), 0.4)
    model = Mixture(Normal(), 2)
    params = model.init(jax.random.key(0), x)
    c = params.components
    logs = [given_observed(x, *each)[2] for each in zip(c.mean, c.covariance, strict=True)]
    joint = np.log(params.weights) + np.stack(logs, axis=1)
    found = model.log_prob(params, x)
    np.testing.assert_allclose(found, np.logaddexp.reduce(joint, axis=1), rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(found[3], 0, atol=1e-14)
    np.testing.assert_allclose(model.posterior(params, x)[3], params.weights, rtol=1e-12)


# Murray's rows (1977, discussion of Dempster, Laird & Rubin), and the maxima as he gives them.
NONE = np.nan
MURRAY = np.array(
    [[1, 1], [1, -1], [-1, 1], [-1, -1]]
    + [[2, NONE]] * 2 + [[-2, NONE]] * 2 + [[NONE, 2]] * 2 + [[NONE, -2]] * 2
)  # fmt: skip


def murray_fit(rho, **options):
    model = Mixture(Fixed(Normal(), {"mean": jnp.zeros(2)}), 1)
    covariance = jnp.array([[[2.0, 2.0 * rho], [2.0 * rho, 2.0]]])
    start = MixtureParams(weights=jnp.ones(1), components=NormalParams(mean=jnp.zeros((1, 2)), covariance=covariance))
    return em_fit(model, start, MURRAY, tol=1e-12, **options)


@pytest.mark.parametrize("sign", [1, -1])
def test_murrays_two_maxima(sign):
    fit = murray_fit(0.3 * sign)
    assert fit.converged
    np.testing.assert_allclose(fit.loglik, -29.9742864, atol=5e-8)
    expected = 8 / 3 * np.array([[1, sign / 2], [sign / 2, 1]])
    np.testing.assert_allclose(fit.params.components.covariance[0], expected, rtol=1e-5)


def test_murrays_saddle_holds_em_that_starts_on_it():
    """With no correlation EM stays without one, at 5/2, the variance there; a nudge leaves for a maximum."""
    fit = murray_fit(0.0)
    assert fit.converged
    np.testing.assert_allclose(fit.params.components.covariance[0], 2.5 * np.eye(2), rtol=1e-5, atol=1e-12)
    assert murray_fit(1e-3).loglik > fit.loglik + 0.05


def monotone(rows=60, gone=25):
    """Two columns, a part of the second missing: the maximum is a regression (Anderson 1957, JASA 52)."""
    x = normal_rows(rows, 2, seed=8)
    x[:gone, 1] = np.nan
    first, both = x[:, 0], x[gone:]
    slope = np.cov(both.T, bias=True)[0, 1] / both[:, 0].var()
    residual = (both[:, 1] - slope * both[:, 0]).var()
    mean = [first.mean(), both[:, 1].mean() + slope * (first.mean() - both[:, 0].mean())]
    v = first.var()
    return x, np.array(mean), np.array([[v, slope * v], [slope * v, slope**2 * v + residual]])


def test_monotone_missing_values_have_andersons_maximum():
    x, mean, covariance = monotone()
    model = Mixture(Normal(), 1)
    fit = em_fit(model, model.init(jax.random.key(0), x), x, tol=1e-13)
    np.testing.assert_allclose(fit.params.components.mean[0], mean, rtol=1e-5)
    np.testing.assert_allclose(fit.params.components.covariance[0], covariance, rtol=1e-5)


def test_the_rate_of_convergence_is_the_fraction_of_missing_information():
    """Of means, the covariance known: EM's Jacobian is 1 - (complete information)⁻¹ (observed information), exactly."""
    x, mean, covariance = monotone()
    model = Mixture(Fixed(Normal(), {"covariance": jnp.asarray(covariance)[None]}), 1)
    rows, complete_rows = len(x), int(np.sum(~np.isnan(x[:, 1])))
    precision = np.linalg.inv(covariance)
    alone = np.diag([1 / covariance[0, 0], 0])
    observed = complete_rows * precision + (rows - complete_rows) * alone
    fraction = np.eye(2) - np.linalg.solve(rows * precision, observed)

    def step(mean):
        components = NormalParams(mean=mean[None], covariance=jnp.asarray(covariance)[None])
        params = MixtureParams(weights=jnp.ones(1), components=components)
        return model.m_step(model.e_step(params, jnp.asarray(x))).components.mean[0]

    jacobian = jax.jit(jax.jacfwd(step))(jnp.asarray(mean))
    np.testing.assert_allclose(jacobian, fraction, atol=1e-10)
    np.testing.assert_allclose(np.max(np.abs(np.linalg.eigvals(jacobian))), 1 - complete_rows / rows, rtol=1e-9)


def test_a_row_without_observed_entries_changes_nothing():
    """And complete data are the limit: through the branch for missing values their steps are the same."""
    x = normal_rows(50, 4)
    more = np.concatenate([x, np.full((2, 4), np.nan)])
    model = Mixture(Normal(), 1)
    params = model.init(jax.random.key(0), x)
    params = dataclasses.replace(
        params, components=jax.tree.map(lambda leaf: leaf + 0.1 * jnp.ones_like(leaf), params.components)
    )
    for _ in range(3):
        one, two = (jax.jit(lambda p, x=x: model.m_step(model.e_step(p, x)))(params) for x in (x, more))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-11, atol=1e-12), one, two)
        params = one
    mixture = Mixture(Normal("tied"), 2)
    start = mixture.init(jax.random.key(3), x)
    fits = [em_fit(mixture, start, rows, tol=1e-11, max_steps=5000) for rows in (x, more)]
    np.testing.assert_allclose(fits[1].loglik, fits[0].loglik, rtol=1e-8)


def test_the_default_prior_is_that_of_what_is_observed():
    """Without a hole it is the one of complete rows; holes leave the variances of the columns."""
    x = two_clusters()
    prior = default_prior(jnp.asarray(x), 1)
    np.testing.assert_allclose(prior.mean, np.nanmean(x, axis=0), rtol=1e-12)
    np.testing.assert_allclose(np.diag(prior.scale), np.nanvar(x, axis=0) * 80 / 79, rtol=1e-12)
    assert np.all(np.linalg.eigvalsh(np.asarray(prior.scale)) > 0)
    model = Mixture(Normal(prior=prior), 2)
    fit = em_fit(model, model.init(jax.random.key(0), x), x)
    assert fit.converged


def test_a_column_without_observed_entries_is_refused_by_name():
    x = two_clusters()
    x[:, 1] = np.nan
    for covariance in ("full", "tied"):
        with pytest.raises(ValueError, match="column 1 has none: drop it"):
            Mixture(Normal(covariance), 2).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="no missing values"):
        Mixture(Normal(missing=False), 2).check(two_clusters())


def test_the_truth_is_covered_with_a_fifth_missing_at_random():
    """Twice the log-likelihood ratio of the estimate to the truth is χ² with the number of parameters."""
    rng = np.random.default_rng(4)
    factor = rng.normal(size=(4, 4))
    mean, covariance = rng.normal(size=4), factor @ factor.T + 0.2 * np.eye(4)
    model = Mixture(Normal(), 1)
    truth = MixtureParams(weights=jnp.ones(1), components=NormalParams(mean=mean[None], covariance=covariance[None]))
    ratios = []
    for seed in range(20):
        x = holes(np.random.default_rng(100 + seed).multivariate_normal(mean, covariance, 400), seed=seed)
        fit = em_fit(model, truth, x, tol=1e-9)
        ratios.append(2 * float(fit.loglik - jnp.sum(model.log_prob(truth, x))))
    assert st.kstest(ratios, st.chi2(14).cdf).pvalue > 1e-2


@pytest.mark.parametrize("columns", [3, 12])
def test_float32_is_near_float64_far_from_the_origin_and_near_singular(columns):
    """Columns that all but repeat each other, a thousand widths from 0."""
    rng = np.random.default_rng(5)
    common = rng.normal(size=(300, 1))
    x = holes((1e3 + common + 1e-2 * rng.normal(size=(300, columns))).astype(np.float32)).astype(np.float32)
    model = Mixture(Normal(), 1)
    fits = [em_fit(model, model.init(jax.random.key(0), x), x, tol=-1.0, max_steps=8) for x in (x, x.astype(float))]
    single, double = (fit.params.components for fit in fits)
    assert single.covariance.dtype == jnp.float32
    np.testing.assert_allclose(single.mean, double.mean, atol=1e-3)
    np.testing.assert_allclose(single.covariance, double.covariance, rtol=2e-3, atol=2e-5)
    assert np.all(np.linalg.eigvalsh(np.asarray(single.covariance, float)) > 0)


def test_forty_columns_with_as_many_patterns_as_rows():
    x = holes(normal_rows(120, 40), 0.1)
    model = Mixture(Normal(), 1)
    params = model.init(jax.random.key(0), x)
    c = params.components
    _, means, covariances, loglik = textbook_step(x, params.weights, c.mean, np.asarray(c.covariance))
    fit = em_fit(model, params, x, tol=-1.0, max_steps=1)
    np.testing.assert_allclose(fit.history[0], loglik, rtol=1e-11)
    np.testing.assert_allclose(fit.params.components.mean, means, rtol=1e-8)
    np.testing.assert_allclose(fit.params.components.covariance, covariances, rtol=1e-7, atol=1e-8)


def test_data_sets_side_by_side_and_restarts():
    """Under `vmap` complete data beside others take the same branch, to the same numbers."""
    x = two_clusters()
    full = np.where(np.isnan(x), np.nanmean(x, axis=0), x)
    model = Mixture(Normal(), 2)
    params = model.init(jax.random.key(1), x)
    both = jnp.stack([jnp.asarray(x), jnp.asarray(full)])
    fits = jax.jit(jax.vmap(lambda x: em_fit(model, params, x, max_steps=20, tol=-1.0)))(both)
    for number, rows in enumerate((x, full)):
        alone = em_fit(model, params, rows, max_steps=20, tol=-1.0)
        np.testing.assert_allclose(fits.objective[number], alone.objective, rtol=1e-9)
    runs = fit_restarts(model, jax.random.key(0), x, num_restarts=6, max_steps=2000, certify=False)
    assert runs.best.objective >= em_fit(model, params, x).objective - 1e-3
    again = em_fit(model, runs.best.params, x, tol=-1.0, max_steps=1)
    np.testing.assert_allclose(again.history[0], runs.best.objective, rtol=1e-10)


def test_where_nothing_is_missing_less_is_compiled():
    """Data that can be looked at choose the model's form; a program that has to look holds both branches."""
    x = two_clusters()
    full = np.where(np.isnan(x), 0.0, x)
    model = complete("model", Mixture(Normal("tied"), 2))
    assert original(informed(model, full)) == Mixture(Normal("tied", missing=False), 2)
    assert informed(model, x) is model
    held = complete("model", Fixed(Mixture(Normal(), 2), {"weights": jnp.array([0.5, 0.5])}))
    assert informed(held, full).family == Normal(missing=False)
    seen = []
    jax.jit(lambda x: seen.append(informed(model, x) is model))(full)
    assert seen == [True]


def test_a_chain_of_full_covariances_takes_single_missing_entries():
    """Against the chain of a family without correlations, where these are 0: the same likelihood and posterior."""
    x = holes(normal_rows(40, 2)).reshape(4, 10, 2)
    mean, variance = jnp.array([[0.0, 0.0], [2.0, 1.0]]), jnp.array([[1.0, 2.0], [3.0, 0.5]])
    diagonal = HMM(Normal("diag"), 2)
    params = diagonal.init(jax.random.key(0), x)
    params = dataclasses.replace(params, emissions=NormalParams(mean=mean, covariance=variance))
    wide = dataclasses.replace(params, emissions=NormalParams(mean=mean, covariance=jax.vmap(jnp.diag)(variance)))
    full = HMM(Normal(), 2)
    np.testing.assert_allclose(full.log_prob(wide, x), diagonal.log_prob(params, x), rtol=1e-11)
    np.testing.assert_allclose(full.smooth(wide, x), diagonal.smooth(params, x), rtol=1e-9)
    # Where columns are independent given the state, what is expected of an entry is the states' means, smoothed.
    expected = np.where(np.isnan(x), np.asarray(full.smooth(wide, x)) @ np.asarray(mean), x)
    np.testing.assert_allclose(full.impute(wide, x), expected, rtol=1e-10)
    fit = em_fit(full, wide, Sequences(x), max_steps=30, tol=-1.0)
    assert np.all(np.diff(fit.history) > -1e-9)
    assert fit.status == Status.MAX_STEPS


def test_conditional_covariances_vanish_where_entries_are_observed():
    """Exactly, and are the textbook's elsewhere."""
    x = holes(normal_rows(40, 6))
    mean, covariance = np.ones(6), np.cov(normal_rows(100, 6, seed=5).T)
    seen = ~np.isnan(x)
    rows = conditional.Measured(values=jnp.where(seen, x, 0), observed=jnp.asarray(seen))
    found = jax.jit(conditional.conditional)(jnp.asarray(mean), jnp.asarray(covariance), rows)
    means, spread, logs = given_observed(x, mean, covariance)
    own = np.moveaxis(np.asarray(found.covariance), -1, 0)
    assert np.all(own[seen[:, :, None] | seen[:, None]] == 0)
    np.testing.assert_allclose(own, spread, atol=1e-10)
    np.testing.assert_allclose(mean + np.asarray(found.shift).T, means, atol=1e-10)
    np.testing.assert_allclose(found.log_density, logs, atol=1e-10)


def drawn_moments(x, mean, covariance, draws):
    """How far draws are from the conditional moments of the textbook, in standard errors of both."""
    means, spread, _ = given_observed(x, mean, covariance)
    gone, m = np.isnan(x), len(draws)
    away = draws - means
    variances = np.einsum("nii->ni", spread)[gone]
    in_mean = away.mean(axis=0)[gone] / np.sqrt(variances / m)
    products = np.einsum("mni,mnj->nij", away, away) / m
    both = gone[:, :, None] & gone[:, None]
    size = np.einsum("nii,njj->nij", spread, spread) + spread**2
    return in_mean, ((products - spread) / np.sqrt(size / m + ~both))[both]


def test_imputed_values_are_the_conditional_ones():
    """Means are the textbook's, draws have its means and covariances, and what is observed stays to the bit."""
    x = holes(normal_rows(40, 5), 0.3)
    model = MultivariateNormal()
    params = model.init(jax.random.key(0), x)
    means, spread, logs = given_observed(x, params.mean, params.covariance)
    seen = ~np.isnan(x)
    filled, draws = model.impute(params, x), model.impute(params, x, key=jax.random.key(1), num_draws=4000)
    np.testing.assert_allclose(filled, means, rtol=1e-9, atol=1e-10)
    for values in (filled, *draws[:3]):
        np.testing.assert_array_equal(np.asarray(values)[seen], x[seen])
    for errors in drawn_moments(x, params.mean, params.covariance, np.asarray(draws)):
        assert np.max(np.abs(errors)) < 5
        assert 0.8 < np.sqrt(np.mean(errors**2)) < 1.2
    posterior = model.posterior(params, x)
    np.testing.assert_allclose(posterior.covariances, spread, atol=1e-10)
    np.testing.assert_allclose(model.log_prob(params, x), logs, rtol=1e-10, atol=1e-12)
    assert model.impute(params, x, key=jax.random.key(1)).shape == (1, 40, 5)
    with pytest.raises(TypeError, match="num_draws needs a key"):
        model.impute(params, x, num_draws=3)


@pytest.mark.parametrize("covariance", ["full", "tied"])
def test_a_mixture_imputes_from_its_components(covariance):
    """Means shared by responsibilities; draws have the moments of that mixture."""
    x = two_clusters()[:, :2]
    model = Mixture(Normal(covariance), 2)
    params = model.init(jax.random.key(1), x)
    matrices = np.asarray(model.family.covariance_matrix(params.components))
    each = [given_observed(x, m, c) for m, c in zip(params.components.mean, matrices, strict=True)]
    share = np.asarray(model.posterior(params, x)).T
    means = sum(r[:, None] * found for r, (found, _, _) in zip(share, each, strict=True))
    np.testing.assert_allclose(model.impute(params, x), means, rtol=1e-9)
    draws = np.asarray(model.impute(params, x, key=jax.random.key(2), num_draws=3000))
    square = sum(
        r[:, None] * (np.einsum("nii->ni", spread) + (found - means) ** 2)
        for r, (found, spread, _) in zip(share, each, strict=True)
    )
    gone = np.isnan(x)
    np.testing.assert_array_equal(draws[:, ~gone], np.broadcast_to(x[~gone], (3000, np.sum(~gone))))
    errors = (draws.mean(axis=0) - means)[gone] / np.sqrt(square[gone] / 3000)
    assert np.max(np.abs(errors)) < 5
    np.testing.assert_allclose(draws.var(axis=0)[gone], square[gone], rtol=0.2)
    counts, other = np.arange(12.0).reshape(6, 2), Mixture(Poisson(), 1)
    of_counts = other.init(jax.random.key(0), counts)
    with pytest.raises(TypeError, match="Poisson has no values"):
        other.impute(of_counts, counts)


def test_one_multivariate_normal_is_the_mixture_of_one():
    """With missing values, with a known mean, and of complete rows and their moments, of which one step is all."""
    x = two_clusters()
    one, mixture = MultivariateNormal(), Mixture(Normal(), 1)
    fits = [em_fit(model, model.init(jax.random.key(0), x), x, tol=1e-11) for model in (one, mixture)]
    np.testing.assert_allclose(fits[0].loglik, fits[1].loglik, rtol=1e-9)
    np.testing.assert_allclose(fits[0].params.covariance, fits[1].params.components.covariance[0], rtol=1e-4)
    known = Fixed(one, {"mean": jnp.zeros(2)})
    start = MultivariateNormalParams(mean=jnp.zeros(2), covariance=2.0 * jnp.array([[1.0, 0.3], [0.3, 1.0]]))
    np.testing.assert_allclose(em_fit(known, start, MURRAY, tol=1e-12).loglik, -29.9742864, atol=5e-8)
    full = normal_rows(30, 2)
    moments = Moments(full.mean(axis=0), np.cov(full.T, bias=True), 30)
    law = st.multivariate_normal(full.mean(axis=0), np.cov(full.T, bias=True))
    for data in (full, moments):
        fit = em_fit(one, start, data, tol=-1.0, max_steps=1)
        np.testing.assert_allclose(fit.params.mean, full.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(fit.params.covariance, np.cov(full.T, bias=True), rtol=1e-11)
        np.testing.assert_allclose(fit.loglik, law.logpdf(full).sum(), rtol=1e-12)
