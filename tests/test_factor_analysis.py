"""Factor analysis and probabilistic PCA against closed forms, published figures, quadrature and scikit-learn."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import sklearn.decomposition
from jitted import e_step, m_step

from jaxem import (
    EM,
    PPCA,
    ClosedForm,
    EMError,
    Expanded,
    FactorAnalysis,
    Fixed,
    Hard,
    Mixture,
    Moments,
    Normal,
    Status,
    bic,
    em_fit,
    fit_restarts,
    stepwise_em,
    varimax,
)

RNG = np.random.default_rng(10)
KEY = jax.random.key(0)
TRUE = RNG.normal(size=(6, 2))
X = RNG.normal(size=(80, 2)) @ TRUE.T + RNG.normal(size=(80, 6)) * np.sqrt(RNG.uniform(0.3, 1.5, 6)) + np.arange(6.0)
HOLES = np.where(RNG.random(X.shape) < 0.2, np.nan, X)
HOLES[3] = np.nan

# Covariances of six tests of 112 people: R's ability.cov (Bartholomew 1987, Latent Variable Models and Factor Analysis;
# the tests are Smith & Stanley's, 1983): general, picture, blocks, maze, reading, vocabulary.
ABILITY = np.zeros((6, 6))
ABILITY[np.tril_indices(6)] = [
    *(24.641,),
    *(5.991, 6.7),
    *(33.52, 18.137, 149.831),
    *(6.023, 1.782, 19.424, 12.711),
    *(20.755, 4.936, 31.43, 4.757, 52.604),
    *(29.701, 7.204, 50.753, 9.075, 66.762, 135.292),
]
ABILITY = ABILITY + np.tril(ABILITY, -1).T


@pytest.fixture(autouse=True)
def _precision(request):
    """Float64, but where a test is about float32."""
    with jax.enable_x64("float32" not in request.node.name):
        yield


def covariance(params):
    noise = getattr(params, "uniquenesses", None)
    noise = np.full(len(params.mean), params.noise_variance) if noise is None else np.asarray(noise)
    loadings = np.asarray(params.loadings)
    return loadings @ loadings.T + np.diag(noise)


def densities(params, x):
    """log p of what is observed of every row, each by its own dense covariance."""
    mean, whole = np.asarray(params.mean), covariance(params)
    found = np.zeros(len(x))
    for n, row in enumerate(x):
        seen = ~np.isnan(row)
        if np.any(seen):
            found[n] = scipy.stats.multivariate_normal.logpdf(row[seen], mean[seen], whole[np.ix_(seen, seen)])
    return found


def start(model, x=X, seed=1):
    return model.init(jax.random.key(seed), x)


@pytest.mark.parametrize("scale", ["covariance", "correlation"])
@pytest.mark.parametrize(
    ("latents", "uniquenesses", "statistic", "freedom"),
    [
        (1, [0.535, 0.853, 0.748, 0.910, 0.232, 0.280], 75.18, 9),
        (2, [0.455, 0.589, 0.218, 0.769, 0.052, 0.334], 6.11, 4),
    ],
)
def test_six_tests_of_ability_are_as_r_has_them(latents, uniquenesses, statistic, freedom, scale):
    variances = np.diag(ABILITY)
    matrix = ABILITY if scale == "covariance" else ABILITY / np.sqrt(np.outer(variances, variances))
    x, model = Moments(np.zeros(6), matrix, 112), FactorAnalysis(latents)
    fit = em_fit(model, model.init(KEY, x), x, tol=1e-10).check()
    np.testing.assert_allclose(fit.params.uniquenesses / np.diag(matrix), uniquenesses, atol=6e-4)
    found = model.likelihood_ratio_test(fit.params, x)
    assert round(float(found.statistic), 2) == statistic
    assert found.degrees_of_freedom == freedom
    np.testing.assert_allclose(found.p_value, scipy.stats.chi2.sf(statistic, freedom), rtol=0.02)


def test_at_the_default_tolerance_too_and_in_a_few_dozen_steps():
    x = Moments(np.zeros(6), ABILITY, 112)
    model = FactorAnalysis(2)
    fit = em_fit(model, model.init(KEY, x), x).check()
    plain = em_fit(model, model.init(KEY, x), x, algorithm=EM(), max_steps=5000).check()
    assert round(float(model.likelihood_ratio_test(fit.params, x).statistic), 2) == 6.11
    assert 8 * fit.num_passes < plain.num_passes


def closed_form(x, latents):
    """Tipping & Bishop (1999), equations 7 and 8: covariance, noise, and the log-likelihood."""
    matrix = np.cov(x.T, bias=True)
    values, vectors = np.linalg.eigh(matrix)
    noise = np.mean(values[:-latents])
    top, along = vectors[:, -latents:], values[-latents:]
    whole = top @ np.diag(along - noise) @ top.T + noise * np.eye(len(matrix))
    size = len(matrix) * math.log(2 * math.pi) + np.linalg.slogdet(whole)[1]
    return whole, noise, -0.5 * len(x) * (size + np.trace(np.linalg.solve(whole, matrix)))


@pytest.mark.parametrize("method", ["random", "principal"])
@pytest.mark.parametrize("wide", [False, True], ids=["tall", "wide"])
def test_ppca_is_its_closed_form(method, wide):
    x = X if not wide else RNG.normal(size=(8, 3)) @ RNG.normal(size=(3, 12)) + 0.3 * RNG.normal(size=(8, 12))
    whole, noise, loglik = closed_form(x, 2)
    model = PPCA(2)
    params = model.init(KEY, x, method=method)
    if method == "random":
        params = em_fit(model, params, x, tol=1e-12).check().params
    np.testing.assert_allclose(params.mean, x.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(params.noise_variance, noise, rtol=1e-5)
    np.testing.assert_allclose(covariance(params), whole, atol=1e-4)
    np.testing.assert_allclose(jnp.sum(model.log_prob(params, x)), loglik, rtol=1e-9)


def test_factor_analysis_ends_where_scikit_learn_does():
    peer = sklearn.decomposition.FactorAnalysis(2, tol=1e-12, max_iter=5000, svd_method="lapack").fit(X)
    model = FactorAnalysis(2)
    fit = em_fit(model, start(model), X, tol=1e-10).check()
    assert fit.objective >= peer.loglike_[-1] - 1e-7
    np.testing.assert_allclose(fit.params.uniquenesses, peer.noise_variance_, rtol=1e-3)
    np.testing.assert_allclose(covariance(fit.params), peer.get_covariance(), atol=1e-3)
    np.testing.assert_allclose(model.log_prob(fit.params, X), peer.score_samples(X), atol=1e-3)
    plain = em_fit(model, start(model), X, tol=1e-10, algorithm=EM(), max_steps=5000).check()
    np.testing.assert_allclose(plain.objective, fit.objective, rtol=1e-9)


@pytest.mark.parametrize("model", [FactorAnalysis(2), PPCA(2)], ids=["diag", "isotropic"])
def test_rows_with_missing_entries_have_the_densities_of_what_is_observed(model):
    params = start(model, HOLES)
    np.testing.assert_allclose(model.log_prob(params, HOLES), densities(params, HOLES), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(e_step(model, params, HOLES).loglik, densities(params, HOLES).sum(), rtol=1e-12)
    np.testing.assert_allclose(model.log_prob(params, X), densities(params, X), rtol=1e-11)
    weights = RNG.integers(0, 3, 80).astype(float)
    np.testing.assert_allclose(e_step(model, params, HOLES, weights).loglik, weights @ densities(params, HOLES))


def test_the_posterior_is_that_of_a_joint_normal_distribution():
    model = FactorAnalysis(2)
    params = start(model, HOLES)
    found, scores = model.posterior(params, HOLES), model.project(params, HOLES)
    loadings, noise = np.asarray(params.loadings), np.asarray(params.uniquenesses)
    for n, row in enumerate(HOLES[:12]):
        seen = ~np.isnan(row)
        gain = loadings[seen].T @ np.linalg.inv(loadings[seen] @ loadings[seen].T + np.diag(noise[seen]))
        np.testing.assert_allclose(found.means[n], gain @ (row - np.asarray(params.mean))[seen], atol=1e-12)
        np.testing.assert_allclose(found.covariances[n], np.eye(2) - gain @ loadings[seen], atol=1e-12)
    np.testing.assert_array_equal(scores, found.means)
    np.testing.assert_allclose(
        model.reconstruct(params, HOLES), np.asarray(params.mean) + np.asarray(scores) @ loadings.T
    )
    complete = model.posterior(params, X)
    assert complete.covariances.shape == (80, 2, 2)
    np.testing.assert_allclose(complete.covariances, np.broadcast_to(complete.covariances[0], (80, 2, 2)))


@pytest.mark.parametrize("latents", [1, 2])
def test_likelihoods_are_the_integrals_over_the_factors(latents):
    model = FactorAnalysis(latents)
    x = HOLES[:4, : 2 * latents + 1]
    params = start(model, HOLES[:, : 2 * latents + 1])
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    weights = weights / math.sqrt(2 * math.pi)
    total = np.zeros(len(x))
    for places in itertools.product(range(80), repeat=latents):
        centre = np.asarray(params.mean + params.loadings @ nodes[list(places)])
        density = scipy.stats.norm.pdf(x, centre, np.sqrt(params.uniquenesses))
        total += np.prod(weights[list(places)]) * np.prod(np.where(np.isnan(x), 1, density), axis=1)
    np.testing.assert_allclose(model.log_prob(params, x), np.log(total), rtol=1e-7, atol=1e-10)


def test_a_row_without_entries_adds_nothing_and_does_no_harm():
    model = FactorAnalysis(2)
    params = start(model, HOLES)
    more = np.concatenate([HOLES, np.full((5, 6), np.nan)])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12),
        e_step(model, params, more),
        e_step(model, params, HOLES),
    )
    assert model.sample_size(more) == model.sample_size(HOLES) == 79
    fits = [em_fit(model, params, x, tol=1e-9).check() for x in (HOLES, more)]
    np.testing.assert_allclose(fits[0].objective, fits[1].objective, rtol=1e-8)
    np.testing.assert_allclose(model.project(params, more)[-5:], 0)


def test_missing_entries_are_fitted_to_the_maximum_of_what_is_observed():
    model = FactorAnalysis(2)
    fit = em_fit(model, start(model, HOLES), HOLES, tol=1e-12, max_steps=3000).check()

    def lack(params):
        return -jnp.sum(model.log_prob(params, HOLES))

    slope = jax.jit(jax.grad(lambda theta: -model.e_step(model.constrain(theta), HOLES).loglik))(
        model.unconstrain(fit.params)
    )
    assert max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(slope)) < 1e-3
    for seed in range(3):
        assert lack(start(model, HOLES, seed)) > lack(fit.params)


def test_complete_data_are_the_limit_of_few_missing():
    """The code for rows with missing entries takes complete rows where they can be, too."""
    model = FactorAnalysis(2)
    params = start(model)
    masked = jax.jit(lambda x: model.statistics(params, x, model.infer(params, x)))(X)
    complete = e_step(FactorAnalysis(2, missing=False), params, X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11), masked, complete)
    one = X.copy()
    one[0, 0] = np.nan
    steps = dict(tol=-1.0, max_steps=5, algorithm=EM())
    near, whole = em_fit(model, params, one, **steps), em_fit(model, params, X, **steps)
    np.testing.assert_allclose(near.params.loadings, whole.params.loadings, atol=0.1)


def test_moments_lead_along_the_same_path_as_rows():
    moments = Moments(X.mean(axis=0), np.cov(X.T, bias=True), len(X))
    steps = dict(tol=-1.0, max_steps=10, algorithm=EM())
    for model in (FactorAnalysis(2), PPCA(1)):
        params = start(model)
        fit = em_fit(model, params, moments, **steps)
        # Eagerly rows are reduced; under jit nobody sees that they are complete, and every step goes over them.
        for rows in (em_fit(model, params, X, **steps), jax.jit(functools.partial(em_fit, **steps))(model, params, X)):
            np.testing.assert_allclose(rows.history, fit.history, rtol=1e-11)
        np.testing.assert_allclose(bic(model, params, moments), bic(model, params, X), rtol=1e-11)
    online = em_fit(model, params, X, algorithm=stepwise_em(20), key=KEY, max_steps=2)
    assert jnp.isfinite(online.objective)


def test_weights_are_repeats_in_a_fit():
    weights = RNG.integers(0, 3, 80).astype(float)
    model = FactorAnalysis(1)
    params = start(model)
    spoiled = np.where(weights[:, None] > 0, X, np.nan)
    weighted = em_fit(model, params, spoiled, weights, tol=1e-10)
    repeated = em_fit(model, params, np.repeat(X, weights.astype(int), axis=0), tol=1e-10)
    np.testing.assert_allclose(weighted.objective, repeated.objective, rtol=1e-10)


@pytest.mark.parametrize("x", [X, HOLES], ids=["complete", "missing"])
def test_nothing_depends_on_how_factors_are_turned(x):
    model = FactorAnalysis(2)
    params = start(model, x)
    turn, _ = np.linalg.qr(RNG.normal(size=(2, 2)))
    other = dataclasses.replace(params, loadings=params.loadings @ turn)
    steps = dict(tol=-1.0, max_steps=8, algorithm=EM())
    fit, turned = em_fit(model, params, x, **steps), em_fit(model, other, x, **steps)
    np.testing.assert_allclose(turned.history, fit.history, rtol=1e-11)
    np.testing.assert_allclose(turned.params.loadings, fit.params.loadings @ turn, atol=1e-9)


def test_canonical_factors_are_in_order_and_have_the_same_likelihood():
    for model in (FactorAnalysis(3), PPCA(2)):
        params = start(model)
        found = model.canonical(params)
        noise = getattr(params, "uniquenesses", None)
        noise = params.noise_variance if noise is None else noise[:, None]
        gram = np.asarray(found.loadings.T @ (found.loadings / noise))
        np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-10)
        assert np.all(np.diff(np.diag(gram)) < 0)
        assert np.all(np.sum(found.loadings, axis=0) >= 0)
        np.testing.assert_allclose(covariance(found), covariance(params), atol=1e-12)


def r_varimax(loadings):
    """Kaiser's criterion climbed by singular value decompositions, as R's varimax does."""
    lengths = np.sqrt(np.sum(loadings**2, axis=1, keepdims=True))
    rows = loadings / lengths
    turn = np.eye(rows.shape[1])
    for _ in range(2000):
        turned = rows @ turn
        u, _, v = np.linalg.svd(rows.T @ (turned**3 - turned * np.mean(turned**2, axis=0)))
        turn = u @ v
    return rows @ turn * lengths


def test_varimax_is_rs():
    simple = np.kron(np.eye(3), np.array([[0.9], [0.8], [0.7], [0.6]])) + 0.1 * RNG.normal(size=(12, 3))
    turn, _ = np.linalg.qr(RNG.normal(size=(3, 3)))
    found = np.asarray(varimax(simple @ turn))
    expected = r_varimax(simple @ turn)
    expected = expected[:, np.argsort(-np.sum(expected**2, axis=0))]
    np.testing.assert_allclose(found, expected * np.sign(np.sum(expected, axis=0)), atol=1e-8)
    np.testing.assert_allclose(found @ found.T, simple @ simple.T, atol=1e-12)
    one = varimax(simple[:, :1])
    np.testing.assert_allclose(np.abs(one), np.abs(simple[:, :1]), atol=1e-12)
    raw = np.asarray(varimax(simple @ turn, normalize=False))

    def criterion(a):
        return np.sum(np.var(a**2, axis=0))

    for _ in range(20):
        small = np.linalg.qr(np.eye(3) + 0.05 * RNG.normal(size=(3, 3)))[0]
        assert criterion(raw @ small) <= criterion(raw)


def test_a_heywood_case_is_reported_by_its_column():
    """Correlations .6, .6 and .25 of one factor ask for a loading of √1.44 = 1.2, and a uniqueness of -0.44."""
    x = Moments(np.zeros(3), np.array([[1, 0.6, 0.6], [0.6, 1, 0.25], [0.6, 0.25, 1]]), 200)
    model = FactorAnalysis(1)
    fit = em_fit(model, model.init(KEY, x), x)
    assert fit.status == Status.DEGENERATE
    np.testing.assert_array_equal(model.degenerate(model.e_step(fit.params, x)), [True, False, False])
    with pytest.raises(EMError, match="Heywood"):
        fit.check()
    held = Fixed(model, {"uniquenesses": jnp.array([0.1, 0.6, 0.6])})
    assert em_fit(held, fit.params, x).converged
    # Small uniquenesses alone are none.
    loadings = np.array([[1.0], [1.0], [1.0]])
    sharp = Moments(np.zeros(3), loadings @ loadings.T + 1e-4 * np.diag([1.0, 2.0, 3.0]), 200)
    assert em_fit(model, model.init(KEY, sharp), sharp, tol=1e-9, max_steps=5000).converged


def test_a_plane_that_holds_all_rows_is_reported():
    flat = RNG.normal(size=(30, 2)) @ RNG.normal(size=(2, 5))
    fit = em_fit(PPCA(2), start(PPCA(2), flat), flat, max_steps=5000)
    assert fit.status == Status.DEGENERATE


def test_more_factors_than_columns_can_tell_are_warned_about():
    with pytest.warns(UserWarning, match="num_latents=3 is more than the covariance of 5 columns can tell"):
        params = FactorAnalysis(3).init(KEY, X[:, :5])
    assert params.loadings.shape == (5, 3)
    FactorAnalysis(3).log_prob(params, X[:, :5])  # no warning: nothing is estimated
    with pytest.warns(UserWarning, match="num_latents=6"):
        PPCA(6).init(KEY, X)


def test_more_columns_than_rows():
    x = RNG.normal(size=(15, 2)) @ RNG.normal(size=(2, 40)) + RNG.normal(size=(15, 40))
    model = FactorAnalysis(2)
    for method in ("random", "principal"):
        params = model.init(KEY, x, method=method)
        np.testing.assert_allclose(model.log_prob(params, x), densities(params, x), rtol=1e-10)
        fit = em_fit(model, params, x, max_steps=50, algorithm=EM(), tol=-1.0)
        assert np.all(np.diff(fit.history) > 0)
    np.testing.assert_allclose(model.log_prob(fit.params, x), densities(fit.params, x), rtol=1e-8)


def test_pca_by_em_is_the_limit_without_noise():
    """Roweis (1998): the loadings then span the leading principal components."""
    model = Fixed(PPCA(2), {"noise_variance": jnp.asarray(1e-8)})
    fit = em_fit(model, start(model), X, algorithm=EM(), tol=-1.0, max_steps=60)
    expected = sklearn.decomposition.PCA(2).fit(X).components_
    basis, _ = np.linalg.qr(fit.params.loadings)
    np.testing.assert_allclose(np.linalg.svd(basis.T @ expected.T)[1], 1, atol=1e-7)


def test_samples_have_the_models_moments():
    model = FactorAnalysis(2)
    params = start(model)
    x = model.sample(KEY, params, 200_000)
    np.testing.assert_allclose(x.mean(axis=0), params.mean, atol=0.03)
    np.testing.assert_allclose(np.cov(np.asarray(x).T), covariance(params), atol=0.06)


def test_free_parameters_are_counted_up_to_rotation():
    for model, count in ((FactorAnalysis(2), 6 + 12 + 6 - 1), (PPCA(3), 6 + 18 + 1 - 3)):
        assert model.num_parameters(start(model)) == count
    held = Fixed(FactorAnalysis(2), {"loadings": jnp.asarray(TRUE)})
    assert held.num_parameters(start(held)) == 12


def test_restarts_go_over_moments_and_agree():
    runs = fit_restarts(FactorAnalysis(2), KEY, X, num_restarts=4, tol=1e-9, certify=False)
    assert runs.hits() == 4
    assert runs.total_weight == 80


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "num_latents must be a Python integer", lambda: FactorAnalysis(1.5)),
        (ValueError, "noise must be one of 'diag', 'isotropic'", lambda: FactorAnalysis(1, "full")),
        (ValueError, "method must be one of", lambda: FactorAnalysis(1).init(KEY, X, method="pca")),
        (
            ValueError,
            "observed entry in every column; column 2 has none",
            lambda: FactorAnalysis(1).init(KEY, np.where(np.arange(6) == 2, np.nan, X)),
        ),
        (ValueError, "no missing values", lambda: FactorAnalysis(1, missing=False).init(KEY, HOLES)),
        (
            ValueError,
            "params.mean must have shape",
            lambda: FactorAnalysis(1).log_prob(start(FactorAnalysis(1)), X[:, 1:]),
        ),
        (
            TypeError,
            "x must be rows",
            lambda: PPCA(1).project(start(PPCA(1)), Moments(np.zeros(6), np.eye(6), 9)),
        ),
        (
            ValueError,
            "more complete rows than columns",
            lambda: PPCA(1).likelihood_ratio_test(start(PPCA(1)), HOLES),
        ),
        (
            TypeError,
            "expect must be Exact",
            lambda: em_fit(PPCA(1), start(PPCA(1)), X, algorithm=EM(expect=Hard())),
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_float32_keeps_ability_and_digits_of_small_noise():
    x = Moments(np.zeros(6, np.float32), ABILITY.astype(np.float32), 112)
    model = FactorAnalysis(2)
    fit = em_fit(model, model.init(KEY, x), x).check()
    assert fit.params.loadings.dtype == jnp.float32
    assert abs(float(model.likelihood_ratio_test(fit.params, x).statistic) - 6.11) < 0.02


@pytest.mark.parametrize("missing", [False, True], ids=["complete", "missing"])
def test_float32_survives_sharp_rows_far_from_zero(missing):
    rng = np.random.default_rng(4)
    noise = np.array([1e-5, 2e-5, 3e-5, 1e-3, 1e-3, 1e-2])
    x = rng.normal(size=(400, 2)) @ TRUE.T + np.sqrt(noise) * rng.normal(size=(400, 6)) + 30
    x = np.where(rng.random(x.shape) < 0.05, np.nan, x) if missing else x
    model = FactorAnalysis(2)
    fits = []
    for dtype in (np.float32, np.float64):
        with jax.enable_x64(dtype == np.float64):
            fits.append(em_fit(model, model.init(KEY, x.astype(dtype)), x.astype(dtype)).check())
    single, double = fits
    # The first two uniquenesses hardly tell which of them is larger.
    np.testing.assert_allclose(single.params.uniquenesses[2:], double.params.uniquenesses[2:], rtol=0.1)
    np.testing.assert_allclose(single.params.uniquenesses[:2], double.params.uniquenesses[:2], rtol=4)
    np.testing.assert_allclose(single.objective, double.objective, atol=1e-3 * len(x))


def test_expanded_steps_climb_and_are_not_held_up_by_the_scale_of_the_factors():
    x = RNG.normal(size=(60, 2)) @ TRUE.T + 0.01 * RNG.normal(size=(60, 6))
    model = FactorAnalysis(2)
    plain = em_fit(model, start(model, x), x, algorithm=EM(), tol=-1.0, max_steps=200)
    expanded = em_fit(model, start(model, x), x, algorithm=EM(maximize=Expanded()), tol=-1.0, max_steps=200)
    assert np.all(np.diff(expanded.history) > -1e-9)
    assert expanded.objective > plain.objective + 1
    # At the maximum factors have the spread that the model says: both steps stay there.
    fit = em_fit(model, start(model), X, tol=1e-12).check()
    stats = e_step(model, fit.params, X)
    best = m_step(model, stats)
    expanded = jax.jit(lambda params, stats: model.expanded(params, stats))(best, stats)
    np.testing.assert_allclose(expanded.loadings, best.loadings, atol=1e-4)


def test_expanded_steps_of_other_models_are_their_own():
    model, x = Mixture(Normal("diag"), 2), X[:, :2]
    params = model.init(KEY, x)
    steps = [em_fit(model, params, x, algorithm=EM(maximize=slot), max_steps=3) for slot in (Expanded(), ClosedForm())]
    np.testing.assert_array_equal(*(fit.history for fit in steps))
