"""Published answers: fits must end where the literature says that they end. All in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxem import (
    EM,
    Binomial,
    BinomialParams,
    Fixed,
    Mixture,
    MixtureParams,
    Normal,
    NormalParams,
    Poisson,
    PoissonParams,
    Status,
    datasets,
    default_prior,
    em_fit,
    fit_restarts,
    from_functions,
)

pytestmark = pytest.mark.usefixtures("x64")


def normals(weights, means, covariances):
    """Mixture parameters by hand."""
    return MixtureParams(
        weights=jnp.asarray(weights),
        components=NormalParams(mean=jnp.asarray(means), covariance=jnp.asarray(covariances)),
    )


def steps(model, params, x, count):
    """The parameters after exactly `count` EM steps."""
    return em_fit(model, params, x, tol=-1.0, max_steps=count).params


# Old Faithful, waiting times. Source: R 4, mixtools::normalmixEM(faithful$waiting, lambda = .4, mu = c(55, 80),
# sigma = sqrt(30)), run to a step below 1e-12; Benaglia et al. (2009), JSS 32(6), section 2, prints the same fit.
def test_two_normals_on_the_waiting_times_of_old_faithful():
    waiting = datasets.faithful()[:, 1]
    start = normals([0.4, 0.6], [[55.0], [80.0]], [[[30.0]], [[30.0]]])
    fit = em_fit(Mixture(Normal("full"), 2), start, waiting, tol=1e-14).check()
    found = fit.params
    np.testing.assert_allclose(found.weights, [0.36088607, 1 - 0.36088607], rtol=0, atol=2e-7)
    np.testing.assert_allclose(found.components.mean[:, 0], [54.614856, 80.091069], rtol=0, atol=5e-6)
    np.testing.assert_allclose(found.components.covariance[:, 0, 0], [34.47122, 34.43031], rtol=0, atol=5e-5)
    np.testing.assert_allclose(fit.objective, -1034.0017498, rtol=0, atol=5e-8)


# Source: R's mclust 6, Mclust(faithful, G = 3, modelNames = "EEE"): the fit in its vignette, log-likelihood
# -1126.316 with 11 free parameters (Scrucca et al. 2016, The R Journal 8(1)).
def test_three_tied_covariances_on_old_faithful():
    x, model = datasets.faithful(), Mixture(Normal("tied"), 3)
    runs = fit_restarts(model, jax.random.key(0), x, num_restarts=16, tol=1e-10, max_steps=5000, certify=False).check()
    np.testing.assert_allclose(runs.best.objective, -1126.315928, rtol=0, atol=1e-6)
    assert model.num_parameters(runs.best.params) == 11


# Source: R's mclust 6, Mclust(iris[, 1:4], G = 3, modelNames = "VVV"): log-likelihood -180.185477, 44 free parameters.
# The likelihood of full covariances has no maximum: restarts that collapse onto a few flowers climb past any number,
# and there may be higher proper maxima that nobody reports. What is claimed here is what mclust's number can mean: it
# is a maximum that fits converge to, from the true species as from many random starts, and no restart that converged
# here is above it. (The species are only a start: mclust, too, starts from a clustering of its own.)
def test_three_full_covariances_on_iris():
    x, species = datasets.iris()
    model = Mixture(Normal("full"), 3)
    from_species = em_fit(model, model.params_from_responsibilities(x, species), x, tol=1e-12).check()
    np.testing.assert_allclose(from_species.objective, -180.185477, rtol=0, atol=1e-6)
    assert model.num_parameters(from_species.params) == 44

    runs = fit_restarts(model, jax.random.key(0), x, num_restarts=64, tol=1e-9, certify=False).check()
    np.testing.assert_allclose(runs.best.objective, -180.185477, rtol=0, atol=2e-6)
    assert runs.hits(1e-7) >= 16


# Source: Do & Batzoglou (2008), What is the expectation maximization algorithm?, Nature Biotechnology 26, figure 1;
# the later digits are theirs continued. Five sets of ten tosses, each of one of two coins, the coins equally likely.
COIN_HEADS = np.array([5.0, 9.0, 8.0, 4.0, 7.0])


def coins_e_step(bias, heads):
    joint = bias[:, None] ** heads[None] * (1 - bias[:, None]) ** (10 - heads)[None]
    posterior = joint / jnp.sum(joint, axis=0, keepdims=True)
    binomials = jax.scipy.special.gammaln(11) - jax.scipy.special.gammaln(heads + 1)
    binomials = binomials - jax.scipy.special.gammaln(11 - heads)
    return (posterior @ heads, posterior @ (10 - heads)), jnp.sum(binomials + jnp.log(jnp.mean(joint, axis=0)))


def coins_m_step(stats):
    heads, tails = stats
    return heads / (heads + tails)


COINS = from_functions(coins_e_step, coins_m_step)


@pytest.mark.parametrize(("count", "biases"), [(1, (0.7130, 0.5813)), (2, (0.7453, 0.5693)), (10, (0.7967, 0.5197))])
def test_two_coins_step_by_step(count, biases):
    # The published figures carry two decimals, the table of steps that they come from four.
    np.testing.assert_allclose(steps(COINS, jnp.array([0.6, 0.5]), COIN_HEADS, count), biases, rtol=0, atol=5.01e-5)


def test_two_coins_in_the_limit():
    fit = em_fit(COINS, jnp.array([0.6, 0.5]), COIN_HEADS, tol=1e-15).check()
    np.testing.assert_allclose(fit.params, [0.79678907, 0.51958312], rtol=0, atol=2e-8)


def test_two_coins_as_a_mixture_with_its_weights_held():
    model = Fixed(Mixture(Binomial(10), 2), {"weights": jnp.array([0.5, 0.5])})
    start = MixtureParams(
        weights=jnp.array([0.5, 0.5]), components=BinomialParams(probability=jnp.array([[0.6], [0.5]]))
    )
    own = em_fit(model, start, COIN_HEADS, tol=-1.0, max_steps=10)
    plain = em_fit(COINS, jnp.array([0.6, 0.5]), COIN_HEADS, tol=-1.0, max_steps=10)
    np.testing.assert_allclose(own.history, plain.history, rtol=1e-13)
    np.testing.assert_allclose(own.params.components.probability[:, 0], plain.params, rtol=1e-13)
    np.testing.assert_allclose(plain.params, [0.7967, 0.5197], rtol=0, atol=5.01e-5)
    limit = em_fit(model, start, COIN_HEADS.astype(int), tol=1e-15).check()
    np.testing.assert_allclose(limit.params.components.probability[:, 0], [0.79678907, 0.51958312], rtol=0, atol=2e-8)


# Source: Dempster, Laird & Rubin (1977), Maximum likelihood from incomplete data via the EM algorithm, JRSS B 39,
# section 1, with Rao's counts as in Tanner's Tools for Statistical Inference: 197 animals in four cells, of
# probabilities 1/2 + t/4, (1-t)/4, (1-t)/4, t/4. The maximum solves 197 t^2 - 15 t - 68 = 0; the rate of convergence is
# the share of the information that is missing, 1 - 377.51690 / 435.31785.
LINKAGE_COUNTS = np.array([125.0, 18.0, 20.0, 34.0])
LINKAGE_LIMIT = (15 + math.sqrt(53809)) / 394


def linkage_e_step(theta, cell, weights=None):
    counts = jnp.ones(cell.shape[0]) if weights is None else weights
    cells = jnp.stack([0.5 + theta / 4, (1 - theta) / 4, (1 - theta) / 4, theta / 4])
    linked = jnp.stack([(theta / 4) / (0.5 + theta / 4), 0.0, 0.0, 1.0])
    unlinked = jnp.array([0.0, 1.0, 1.0, 0.0])
    return (counts @ linked[cell], counts @ unlinked[cell]), counts @ jnp.log(cells[cell])


def linkage_m_step(stats):
    linked, unlinked = stats
    return linked / (linked + unlinked)


LINKAGE = from_functions(linkage_e_step, linkage_m_step)


def linkage_steps(count):
    fit = em_fit(LINKAGE, jnp.asarray(0.5), np.arange(4), LINKAGE_COUNTS, tol=-1.0, max_steps=count)
    return float(fit.params)


@pytest.mark.parametrize(("count", "theta"), [(1, 0.6082474), (2, 0.6243211), (3, 0.6264889)])
def test_genetic_linkage_step_by_step(count, theta):
    assert linkage_steps(count) == pytest.approx(theta, rel=0, abs=5.01e-8)


def test_genetic_linkage_converges_to_the_root_at_the_rate_of_the_missing_information():
    fit = em_fit(LINKAGE, jnp.asarray(0.5), np.arange(4), LINKAGE_COUNTS, tol=1e-15).check()
    # What rounding hides of the objective, 4 eps x 197 animals, hides sqrt(2 hidden / observed information) of t.
    hidden = math.sqrt(2 * 4 * np.finfo(float).eps * LINKAGE_COUNTS.sum() / 377.51690)
    assert float(fit.params) == pytest.approx(LINKAGE_LIMIT, rel=0, abs=hidden)
    assert linkage_steps(30) == pytest.approx(LINKAGE_LIMIT, rel=0, abs=1e-14)
    errors = [linkage_steps(count) - LINKAGE_LIMIT for count in (6, 7)]
    assert errors[1] / errors[0] == pytest.approx(0.13277873, rel=0, abs=1e-6)


# Source: Hasselblad (1969), Estimation of finite mixtures of distributions from the exponential family, JASA 64: deaths
# of women of 80 years and over reported by The Times on each day of 1910-12, two Poissons. Start and limit as in
# Varadhan & Roland (2008), Simple and globally convergent methods for accelerating the convergence of any EM algorithm,
# Scandinavian Journal of Statistics 35, where EM is as slow as here.
DEATHS = np.arange(10.0)
DAYS = np.array([162.0, 267.0, 271.0, 185.0, 111.0, 61.0, 27.0, 8.0, 3.0, 1.0])
DEATHS_START = (jnp.array(0.3), jnp.array([1.0, 2.5]))
DEATHS_LIMIT = (0.3598854, 1.2560951, 2.6634044)
DEATHS_LOGLIK = -1989.945859883


def deaths_e_step(params, deaths, weights=None):
    share, rate = params
    days = jnp.ones(deaths.shape[0]) if weights is None else weights
    prior = jnp.log(jnp.stack([share, 1 - share]))
    joint = prior[:, None] + deaths[None] * jnp.log(rate)[:, None] - rate[:, None]
    joint = joint - jax.scipy.special.gammaln(deaths + 1)[None]
    evidence = jax.scipy.special.logsumexp(joint, axis=0)
    posterior = jnp.exp(joint - evidence[None])
    return (posterior @ days, posterior @ (days * deaths)), days @ evidence


def deaths_m_step(stats):
    counts, sums = stats
    return counts[0] / jnp.sum(counts), sums / counts


MIXED_POISSONS = from_functions(deaths_e_step, deaths_m_step)


def as_vector(params):
    return jnp.concatenate([params[0][None], params[1]])


def deaths_map(theta):
    """One EM step in the three numbers (share, rate 1, rate 2), by the library's own step."""
    state = EM().init(MIXED_POISSONS, (theta[0], theta[1:]), DEATHS, DAYS)
    return as_vector(EM().step(MIXED_POISSONS, state, DEATHS, DAYS).params)


@jax.jit
def plain_em_on_the_deaths(theta):
    """EM until a step moves the parameters by less than 1e-8: where it ends, and the number of steps."""

    def go_on(carry):
        before, after, _ = carry
        return jnp.linalg.norm(after - before) >= 1e-8

    def step(carry):
        _, theta, count = carry
        return theta, deaths_map(theta), count + 1

    _, theta, count = jax.lax.while_loop(go_on, step, (theta, deaths_map(theta), 1))
    return theta, count


def test_slow_poisson_mixture_ends_at_the_published_limit():
    fit = em_fit(MIXED_POISSONS, DEATHS_START, DEATHS, DAYS, tol=-1.0, max_steps=6000)
    np.testing.assert_allclose(as_vector(fit.params), DEATHS_LIMIT, rtol=0, atol=1e-7)
    assert float(fit.objective) == pytest.approx(DEATHS_LOGLIK, rel=0, abs=2e-9)


def test_slow_poisson_mixture_takes_plain_em_over_two_thousand_steps():
    theta, count = plain_em_on_the_deaths(jnp.array([0.3, 1.0, 2.5]))
    assert count > 2000
    np.testing.assert_allclose(theta, DEATHS_LIMIT, rtol=0, atol=5e-6)
    # The largest eigenvalue of the EM map at its fixed point is its rate of convergence.
    eigenvalues = np.linalg.eigvals(jax.jit(jax.jacfwd(deaths_map))(theta))
    assert max(abs(eigenvalues)) == pytest.approx(0.995666, rel=0, abs=1e-6)


def test_slow_poisson_mixture_by_its_family():
    start = MixtureParams(weights=jnp.array([0.3, 0.7]), components=PoissonParams(rate=jnp.array([[1.0], [2.5]])))
    own = em_fit(Mixture(Poisson(), 2), start, DEATHS.astype(int), DAYS, tol=-1.0, max_steps=6000)
    by_hand = (jnp.array(0.3), jnp.array([1.0, 2.5]))  # in the precision that is enabled here
    plain = em_fit(MIXED_POISSONS, by_hand, DEATHS, DAYS, tol=-1.0, max_steps=6000)
    np.testing.assert_allclose(own.history[:2500], plain.history[:2500], rtol=1e-13)
    rates = own.params.components.rate[:, 0]
    np.testing.assert_allclose([own.params.weights[0], *rates], DEATHS_LIMIT, rtol=0, atol=1e-7)
    assert float(own.objective) == pytest.approx(DEATHS_LOGLIK, rel=0, abs=2e-9)


@pytest.mark.parametrize("tol", [1e-5, 1e-6, 1e-8, 1e-10])
def test_a_slow_fit_leaves_at_most_tol_per_row_to_gain(tol):
    fit = em_fit(MIXED_POISSONS, DEATHS_START, DEATHS, DAYS, tol=tol, max_steps=20_000).check()
    left = DEATHS_LOGLIK - float(fit.objective)
    # The published number is rounded to its last digit.
    assert left <= tol * DAYS.sum() + 1e-9


def test_counts_as_weights_equal_counted_rows():
    expanded = np.repeat(DEATHS, DAYS.astype(int))
    assert expanded.shape == (1096,)
    by_weight = em_fit(MIXED_POISSONS, DEATHS_START, DEATHS, DAYS, tol=-1.0, max_steps=200)
    by_row = em_fit(MIXED_POISSONS, DEATHS_START, expanded, tol=-1.0, max_steps=200)
    np.testing.assert_allclose(as_vector(by_weight.params), as_vector(by_row.params), rtol=1e-11)
    np.testing.assert_allclose(by_weight.history, by_row.history, rtol=1e-12)


# Source: Fraley & Raftery (2007), Bayesian regularization for normal mixture estimation and model-based clustering,
# Journal of Classification 24, section 4.1: on the galaxies, components of unequal variance collapse onto a few of them
# without a prior and do not with the default one. The starts are six galaxies, each with a spread of 100 km/s.
@pytest.fixture(scope="module")
def galaxies():
    velocities = datasets.galaxies() / 1000

    def narrow(key, x, weights):
        mean = jax.random.choice(key, x, (6, 1), replace=False)
        return normals(jnp.full(6, 1 / 6), mean, jnp.full((6, 1, 1), 0.01))

    with jax.enable_x64(True):
        return {
            prior is not None: fit_restarts(
                Mixture(Normal("full", prior=prior), 6),
                jax.random.key(1),
                velocities,
                num_restarts=64,
                init=narrow,
                max_steps=3000,
                certify=False,
            )
            for prior in (None, default_prior(velocities, 6))
        }


def test_six_components_on_the_galaxies_collapse_without_a_prior(galaxies):
    runs = galaxies[False]
    assert runs.count(Status.DEGENERATE) > 0
    # What collapsed is above what did not, and does not win.
    assert jnp.max(runs.objective) > runs.best.objective + 1
    assert runs.best.status != Status.DEGENERATE


def test_the_default_prior_keeps_six_components_on_the_galaxies_from_collapsing(galaxies):
    runs = galaxies[True]
    assert jnp.all(runs.status == Status.CONVERGED)
    # The prior's scale bounds every variance from below: scale / (dof + N + D + 2), whatever the rows.
    velocities = datasets.galaxies() / 1000
    least = np.var(velocities, ddof=1) / 36 / (3 + 82 + 3)
    assert jnp.min(runs.params.components.covariance) > least
