"""Rates, information and standard errors against published figures, brute force, and simulation. All in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import zoo

from jaxem import (
    EM,
    Binomial,
    ErrorFlag,
    FactorAnalysis,
    Fixed,
    ItemResponse,
    LinearMixedModel,
    Mixture,
    MixtureParams,
    Normal,
    NormalParams,
    Poisson,
    PoissonParams,
    convergence_rate,
    datasets,
    em_fit,
    error_flags,
    from_functions,
    group_rows,
    information,
    missing_information,
    squarem,
    standard_errors,
)

pytestmark = pytest.mark.usefixtures("x64")

METHODS = ("observed", "oakes", "sem")


# Dempster, Laird & Rubin (1977); the figures of information as in Tanner, Tools for Statistical Inference, section 4.4.
COUNTS = np.array([125.0, 18.0, 20.0, 34.0])
LIMIT = (15 + math.sqrt(53809)) / 394


def linkage_e_step(theta, cell, weights=None):
    counts = jnp.ones(cell.shape[0]) if weights is None else weights
    cells = jnp.stack([0.5 + theta / 4, (1 - theta) / 4, (1 - theta) / 4, theta / 4])
    linked = jnp.stack([(theta / 4) / (0.5 + theta / 4), 0.0, 0.0, 1.0])
    unlinked = jnp.array([0.0, 1.0, 1.0, 0.0])
    return (counts @ linked[cell], counts @ unlinked[cell]), counts @ jnp.log(cells[cell])


LINKAGE = from_functions(
    linkage_e_step,
    lambda stats: stats[0] / (stats[0] + stats[1]),
    q_function=lambda theta, stats: stats[0] * jnp.log(theta) + stats[1] * jnp.log1p(-theta),
)


def test_genetic_linkage():
    given = LINKAGE, jnp.asarray(LIMIT), np.arange(4), COUNTS
    assert float(convergence_rate(*given)) == pytest.approx(0.13277873, abs=5e-9)
    for method in METHODS:
        np.testing.assert_allclose(information(*given, method), [[377.51690]], atol=6e-6)
        np.testing.assert_allclose(standard_errors(*given, method), 377.51690**-0.5, rtol=1e-8)
    np.testing.assert_allclose(information(*given, "complete"), [[435.31785]], atol=6e-6)
    # The sandwich by hand: the multinomial scores of the four cells.
    cells = np.array([0.5 + LIMIT / 4, (1 - LIMIT) / 4, (1 - LIMIT) / 4, LIMIT / 4])
    squares = COUNTS @ (np.array([0.25, -0.25, -0.25, 0.25]) / cells) ** 2
    np.testing.assert_allclose(information(*given, "sandwich"), [[377.51690**2 / squares]], rtol=1e-7)


# Hasselblad (1969), with the eigenvalue of Varadhan & Roland (2008).
DAYS = np.array([162.0, 267.0, 271.0, 185.0, 111.0, 61.0, 27.0, 8.0, 3.0, 1.0])
POISSONS = Mixture(Poisson(), 2)


@pytest.fixture(scope="module")
def times():
    with jax.enable_x64(True):
        start = MixtureParams(
            weights=jnp.array([0.36, 0.64]), components=PoissonParams(rate=jnp.array([[1.26], [2.66]]))
        )
        fit = em_fit(POISSONS, start, np.arange(10.0), DAYS, algorithm=squarem(EM()), tol=1e-15, max_steps=5000)
        return POISSONS, fit.params, np.arange(10.0), DAYS


def test_deaths_in_the_times(times):
    assert float(convergence_rate(*times)) == pytest.approx(0.995666, abs=5e-7)
    # The logarithm of the mixture's density in (share, rate, rate), differentiated by hand.
    _, params, x, _ = times
    share, rates = params.weights, params.components.rate[:, 0]

    def loglik(read):
        density = jax.scipy.stats.poisson.pmf(x[:, None], read[1:][None])
        return DAYS @ jnp.log(density[:, 0] * read[0] + density[:, 1] * (1 - read[0]))

    covariance = np.linalg.inv(-jax.hessian(loglik)(jnp.stack([share[0], *rates])))
    expected = np.sqrt(np.diag(covariance))
    for method in METHODS:
        found = standard_errors(*times, method)
        np.testing.assert_allclose(found.weights, expected[[0, 0]], rtol=1e-5)
        np.testing.assert_allclose(found.components.rate[:, 0], expected[1:], rtol=1e-5)


def test_fractions_of_missing_information_are_those_of_the_two_informations(times):
    observed, complete = information(*times), information(*times, "complete")
    expected = np.sort(np.linalg.eigvals(np.eye(3) - np.linalg.solve(complete, observed)).real)[::-1]
    found = missing_information(*times)
    np.testing.assert_allclose(found.fractions, expected, atol=1e-8)
    # Along its own direction a fit comes nearer by that factor in a step.
    _, params, x, weights = times
    first = jax.tree.map(lambda leaf: leaf[0], found.directions)
    away = jax.tree.map(lambda at, move: at + 1e-5 * move, params, first)
    after = em_fit(POISSONS, away, x, weights, algorithm=EM(), tol=-1.0, max_steps=1).params
    for at, move, new in zip(*map(jax.tree.leaves, (params, first, after)), strict=True):
        np.testing.assert_allclose(new - at, 0.995666e-5 * move, atol=1e-9)


# Do & Batzoglou (2008): information on the log-odds of two coins, by the binomial mixture's second derivatives.
def test_two_coins():
    heads = np.array([5, 9, 8, 4, 7])
    coins = Fixed(Mixture(Binomial(10), 2), {"weights": jnp.array([0.5, 0.5])})
    start = coins.init(jax.random.key(0), heads)
    params = em_fit(coins, start, heads, tol=1e-15, max_steps=5000).params
    chances = params.components.probability[:, 0]
    np.testing.assert_allclose(np.sort(chances), [0.51958312, 0.79678907], atol=1e-7)

    def loglik(chances):
        odds = chances[:, None] ** heads[None] * (1 - chances[:, None]) ** (10 - heads)[None]
        return jnp.sum(jnp.log(jnp.sum(odds, axis=0)))

    expected = np.sqrt(np.diag(np.linalg.inv(-jax.hessian(loglik)(chances))))
    found = standard_errors(coins, params, heads, None, "sem")
    np.testing.assert_allclose(found.components.probability[:, 0], expected, rtol=1e-6)
    np.testing.assert_array_equal(found.weights, 0)


def test_errors_are_those_that_other_programs_print():
    """R's ltm for LSAT6 (two parameters; its gradient there is .024 and not 0), lme4 for Davies' Dyestuff (ML)."""
    answers, counts = datasets.lsat6()
    model, counts = ItemResponse("2PL"), jnp.asarray(counts, float)
    fit = em_fit(model, model.init(jax.random.key(0), answers, counts), answers, counts, tol=1e-10)
    errors = standard_errors(model, fit.params, answers, counts)
    np.testing.assert_allclose(errors.difficulty, [0.8669, 0.3073, 0.0997, 0.4341, 0.8700], rtol=2e-3)
    np.testing.assert_allclose(errors.discrimination, [0.2581, 0.1867, 0.2326, 0.1852, 0.2100], rtol=2e-3)

    response, batches = datasets.dyestuff()
    ones = np.ones((30, 1))
    groups = group_rows((ones, ones, np.asarray(response, float)), batches)
    mixed = LinearMixedModel()
    fit = em_fit(mixed, mixed.init(jax.random.key(0), groups), groups, tol=1e-10)
    np.testing.assert_allclose(standard_errors(mixed, fit.params, groups).coefficients, 17.69, atol=0.005)


@pytest.mark.parametrize("name", ["student t, held, tied", "hmm, priors"])
def test_methods_agree_with_differences_of_the_objective(name):
    """Second differences of log-likelihood + log-prior in the coordinates of the bijection."""
    model, x = zoo()[name]
    x = jax.tree.map(jnp.asarray, x)
    start = model.init(jax.random.key(3), x)
    params = em_fit(model, start, x, algorithm=squarem(EM()), tol=1e-14, max_steps=3000).params
    theta, unravel = jax.flatten_util.ravel_pytree(model.unconstrain(params))

    @jax.jit
    def heights(points):
        def height(theta):
            at = model.constrain(unravel(theta))
            return model.e_step(at, x).loglik + model.log_prior(at)

        return jax.lax.map(height, points)

    size, step = len(theta), 1e-3
    signs = np.array([(1, 1), (1, -1), (-1, 1), (-1, -1)])
    pairs = np.array([(i, j) for i in range(size) for j in range(i + 1)])
    moves = np.zeros((len(pairs), 4, size))
    for each, (i, j) in enumerate(pairs):
        moves[each, :, i] += signs[:, 0] * step
        moves[each, :, j] += signs[:, 1] * step
    values = np.asarray(heights(np.asarray(theta) + moves.reshape(-1, size))).reshape(-1, 4)
    expected = np.zeros((size, size))
    expected[pairs[:, 0], pairs[:, 1]] = -(values @ [1, -1, -1, 1]) / (4 * step**2)
    expected = np.maximum(np.abs(expected), np.abs(expected.T)) * np.sign(expected + expected.T)
    scale = np.sqrt(np.abs(np.diag(expected)))
    for method in METHODS:
        gap = (np.asarray(information(model, params, x, None, method)) - expected) / np.outer(scale, scale)
        np.testing.assert_allclose(gap, 0, atol=2e-4)


def test_what_rests_on_a_boundary_is_told(times):
    _, params, x, weights = times
    rates = PoissonParams(rate=jnp.concatenate([params.components.rate, jnp.array([[9.0]])]))
    model, three = Mixture(Poisson(), 3), MixtureParams(weights=jnp.append(params.weights, 0.0), components=rates)
    with pytest.warns(UserWarning, match=r"weights\[2\], components.rate\[2, 0\] rest on a boundary"):
        found = standard_errors(model, three, x, weights)
    expected = standard_errors(*times)
    np.testing.assert_allclose(found.weights, [*expected.weights, np.nan], rtol=1e-6)
    np.testing.assert_allclose(found.components.rate[:, 0], [*expected.components.rate[:, 0], np.nan], rtol=1e-6)
    flags = error_flags(model, three, x, weights)
    np.testing.assert_array_equal(flags.weights, [ErrorFlag.FINE, ErrorFlag.FINE, ErrorFlag.BOUNDARY])


def test_factors_that_turn_are_not_identified_and_their_noise_is():
    x = np.random.default_rng(0).normal(size=(300, 2)) @ np.random.default_rng(1).normal(size=(2, 6))
    x += np.random.default_rng(2).normal(size=x.shape)
    model = FactorAnalysis(2, missing=False)
    params = em_fit(model, model.init(jax.random.key(0), x), x, tol=1e-12).params
    with pytest.warns(UserWarning, match="loadings are not identified"):
        found = standard_errors(model, params, x)
    assert np.all(np.isnan(found.loadings))
    assert np.all((found.uniquenesses > 0) & (found.uniquenesses < 1))
    flags = error_flags(model, params, x)
    np.testing.assert_array_equal(flags.loadings, ErrorFlag.SINGULAR)


# Murray (1977, discussion of Dempster, Laird & Rubin): a saddle at correlation 0, variances 5/2.
def test_a_saddle_has_a_rate_above_one_and_no_errors():
    open_ended = [[2, np.nan]] * 2 + [[-2, np.nan]] * 2 + [[np.nan, 2]] * 2 + [[np.nan, -2]] * 2
    x = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1], *open_ended])
    model = Mixture(Fixed(Normal(), {"mean": jnp.zeros(2)}), 1)
    components = NormalParams(mean=jnp.zeros((1, 2)), covariance=2.5 * jnp.eye(2)[None])
    params = MixtureParams(weights=jnp.ones(1), components=components)
    assert convergence_rate(model, params, x) > 1
    with pytest.warns(UserWarning, match="not at a maximum"):
        found = standard_errors(model, params, x)
    assert np.all(np.isnan(found.components.covariance[0, [0, 1], [1, 0]]))
    np.testing.assert_array_equal(found.components.mean, 0)


def test_information_of_what_has_no_q_is_refused():
    plain = from_functions(linkage_e_step, lambda stats: stats[0] / (stats[0] + stats[1]))
    np.testing.assert_allclose(information(plain, jnp.asarray(LIMIT), np.arange(4), COUNTS), 377.51690, atol=6e-6)
    with pytest.raises(TypeError, match="q_function"):
        information(plain, jnp.asarray(LIMIT), np.arange(4), COUNTS, "oakes")
    with pytest.raises(ValueError, match="method must be one of"):
        information(plain, jnp.asarray(LIMIT), np.arange(4), COUNTS, "fisher")


def test_intervals_of_simulated_data_cover_the_truth():
    """Two normals of one variance, 1, at three distances, each 500 data sets of 500 rows; intervals of 95 %."""
    model, count, rows = Mixture(Normal("EII", missing=False, form="whitened"), 2), 500, 500
    distances = np.array([2.25, 3.0, 4.0])

    def simulated(apart, key):
        means = jnp.stack([jnp.zeros(1), apart * jnp.ones(1)])
        components = NormalParams(mean=means, covariance=jnp.ones(()))
        truth = MixtureParams(weights=jnp.array([0.4, 0.6]), components=components)
        x = model.sample(key, truth, rows)
        fit = em_fit(model, truth, x, algorithm=squarem(EM()), tol=1e-8, max_steps=2000)
        errors = standard_errors(model, fit.params, x, None, "oakes")
        inside = jax.tree.map(lambda at, true, error: jnp.abs(at - true) < 1.959964 * error, fit.params, truth, errors)
        found = [inside.weights[0], *inside.components.mean[:, 0], inside.components.covariance]
        return jnp.stack(found), fit.converged

    keys = jax.random.split(jax.random.key(0), count)
    every = jax.vmap(jax.vmap(simulated, (None, 0)), (0, None))
    inside, converged = jax.jit(every)(distances, keys)
    assert np.mean(converged) > 0.99
    share = np.mean(np.asarray(inside), axis=1)
    # Twelve shares, each within three standard errors of a simulation.
    np.testing.assert_allclose(share, 0.95, atol=3 * np.sqrt(0.95 * 0.05 / count))
