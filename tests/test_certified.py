"""Certified fits: CONVERGED where nothing is left, on saddles and plateaus too. In float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from jaxem import (
    EM,
    Bernoulli,
    Fixed,
    Mixture,
    MixtureParams,
    Normal,
    NormalParams,
    Poisson,
    PoissonParams,
    Status,
    annealed_em,
    certified,
    convergence_rate,
    datasets,
    em_fit,
    fit_restarts,
    from_functions,
    squarem,
    stochastic_em,
)

pytestmark = pytest.mark.usefixtures("x64")

# Murray's rows (1977, discussion of Dempster, Laird & Rubin): maxima at correlation 1/2 and -1/2, a saddle at 0.
OPEN = [[2, np.nan]] * 2 + [[-2, np.nan]] * 2 + [[np.nan, 2]] * 2 + [[np.nan, -2]] * 2
MURRAY = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1], *OPEN])


@pytest.mark.parametrize("algorithm", [EM(), squarem(EM())], ids=["em", "squarem"])
def test_a_saddle_is_left(algorithm):
    model = Mixture(Fixed(Normal(), {"mean": jnp.zeros(2)}), 1)
    components = NormalParams(mean=jnp.zeros((1, 2)), covariance=2.0 * jnp.eye(2)[None])
    start = MixtureParams(weights=jnp.ones(1), components=components)
    fit = em_fit(model, start, MURRAY, algorithm=certified(algorithm), tol=1e-10).check()
    assert fit.certified
    np.testing.assert_allclose(fit.loglik, -29.9742864, atol=5e-8)
    found = np.asarray(fit.params.components.covariance[0])
    np.testing.assert_allclose(np.abs(found), 8 / 3 * np.array([[1, 0.5], [0.5, 1]]), rtol=1e-3)
    # A step limit that comes first is told, with the place that was reached.
    short = em_fit(model, start, MURRAY, algorithm=certified(algorithm), tol=1e-10, max_steps=int(fit.num_steps) // 2)
    assert short.status == Status.MAX_STEPS
    assert not short.certified


@pytest.fixture(scope="module")
def curve():
    """Three Poisson components, two of them nearly one; the height of the maximum is scipy's.

    The start has a mode that grows by 4e-5 a step. On a straight line along it nothing is higher by more than tol.
    """
    rng = np.random.default_rng([7, 46])
    x = rng.poisson(rng.uniform(1, 15, 3)[rng.integers(0, 3, 120)])[:, None].astype(float)

    def loss(theta):
        weights = np.append(np.exp(theta[:2]), 1)
        return -np.sum(np.log(scipy.stats.poisson.pmf(x, np.exp(theta[2:])) @ weights / weights.sum()))

    best = scipy.optimize.minimize(loss, np.append([-2, -0.5], np.log([3.5, 7, 13])), options={"gtol": 1e-6}).fun
    weights, rates = np.array([0.378976, 0.525796, 0.095228]), np.array([5.636354, 12.312665, 12.846459])
    start = MixtureParams(weights=weights / weights.sum(), components=PoissonParams(rate=rates[:, None]))
    return Mixture(Poisson(), 3), x, start, -best


def test_a_saddle_is_left_along_a_curve(curve):
    model, x, start, best = curve
    fit = em_fit(model, start, x, algorithm=certified(), max_steps=2000).check()
    assert fit.certified
    assert fit.history[0] < best - 0.4
    assert fit.objective > best - 10 * 1e-6 * len(x)


def test_the_best_of_restarts_leaves_a_saddle_too(curve):
    model, x, start, best = curve
    starts = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), start)
    options = {"init": starts, "max_steps": 2000}
    plain = fit_restarts(model, None, x, **options, certify=False)
    assert plain.best.converged
    assert not plain.best.certified
    assert plain.best.objective < best - 0.4
    runs = fit_restarts(model, None, x, **options)
    assert runs.best.certified
    assert runs.best.objective > best - 10 * 1e-6 * len(x)
    assert runs.objective[runs.index] == runs.best.objective
    # The history goes on where the first fit ended.
    steps = int(runs.best.num_steps)
    assert np.all(np.diff(runs.best.history[: steps + 1]) > -1e-9)
    assert runs.best.history[steps] == runs.best.objective
    assert runs.best.num_passes > plain.best.num_passes + 60


def test_components_that_are_alike_part():
    """Of one covariance they are one normal, wherever the weights lie: level to third order, and plain EM stays."""
    x, model = datasets.faithful(), Mixture(Normal("tied"), 2)
    alike = scipy.stats.multivariate_normal(x.mean(axis=0), np.cov(x.T, bias=True)).logpdf(x).sum()
    start = model.params_from_responsibilities(x, np.full((len(x), 2), 0.5))
    plain = em_fit(model, start, x).check()
    assert plain.loglik == pytest.approx(alike, abs=1e-6)
    fit = em_fit(model, start, x, algorithm=certified()).check()
    assert fit.certified
    assert fit.loglik > alike + 2
    assert convergence_rate(model, fit.params, x) < 0.99  # a maximum


@pytest.fixture(scope="module")
def yes_and_no():
    """Data sets of two Bernoulli classes, fits from random responsibilities, and what is left by much longer ones."""
    rng, rows, count = np.random.default_rng(0), 80, 24
    chances = rng.uniform(0.1, 0.9, (count, 2, 6))
    labels = rng.integers(0, 2, (count, rows))
    x = (rng.random((count, rows, 6)) < np.take_along_axis(chances, labels[..., None], axis=1)).astype(float)
    model = Mixture(Bernoulli(), 2)

    def both(key, x):
        start = model.init(key, x, method="random_responsibilities")
        fit = em_fit(model, start, x, algorithm=certified(), max_steps=1000)
        more = em_fit(model, fit.params, x, algorithm=squarem(EM()), tol=1e-9, max_steps=100)
        return fit, more.objective

    with jax.enable_x64(True):
        fits, best = jax.jit(jax.vmap(both))(jax.random.split(jax.random.key(0), count), x)
        return fits, (np.asarray(best) - np.asarray(fits.objective)) / rows


def test_certified_verdicts_leave_little(yes_and_no):
    fits, left = yes_and_no
    sure = np.asarray(fits.certified)
    np.testing.assert_array_equal(sure, np.asarray(fits.status) == Status.CONVERGED)
    assert np.mean(sure) > 0.9
    assert np.all(left[sure] <= 1e-5)


def test_verdicts_are_counted(yes_and_no):
    """Thirty E-steps each, and one where a fit goes on elsewhere; the E-step at the start, and one a step."""
    fits, _ = yes_and_no
    extra = np.asarray(fits.num_passes - fits.num_steps - 1)[np.asarray(fits.certified)]
    verdicts = np.round(extra / 31)
    np.testing.assert_array_equal(extra, 30 * verdicts + verdicts - 1)
    assert verdicts.min() == 1


def test_what_cannot_be_certified_is_refused():
    with pytest.raises(TypeError, match="certified yet"):
        certified(certified())
    x, model = np.arange(10.0)[:, None], Mixture(Normal(), 2)
    for algorithm in (stochastic_em(), annealed_em((2.0, 1.5))):
        with pytest.raises(ValueError, match="certified needs"):
            em_fit(model, model.init(jax.random.key(0), x), x, key=jax.random.key(0), algorithm=certified(algorithm))
    silent = from_functions(lambda theta, x: jnp.sum(x), lambda stats: stats)
    with pytest.raises(TypeError, match="log-likelihood"):
        em_fit(silent, jnp.asarray(1.0), np.ones(3), algorithm=certified())
