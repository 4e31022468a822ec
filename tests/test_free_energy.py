"""The lower bound under normal distributions of the latents, against dense joint normal distributions in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal

from jaxem import (
    EM,
    PPCA,
    FactorAnalysis,
    LinearGaussianSSM,
    LinearMixedModel,
    LinearMixedModelParams,
    MultivariateNormal,
    MultivariateNormalParams,
    PPCAParams,
    Recognition,
    Sequences,
    StateMoments,
    em_fit,
    free_energy,
    group_rows,
)
from jaxem.latents.linear_gaussian import normals
from jaxem.models import FactorAnalysisParams, LinearGaussianSSMParams

pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(0)
RNG = np.random.default_rng(4)
BOUND = jax.jit(free_energy)


def _divergence(mean, covariance, other_mean, other):
    """KL of two normal distributions."""
    away, size = mean - other_mean, len(mean)
    solved = np.linalg.solve(other, np.column_stack([covariance, away]))
    logdets = np.linalg.slogdet(other)[1] - np.linalg.slogdet(covariance)[1]
    return 0.5 * (np.trace(solved[:, :-1]) - size + away @ solved[:, -1] + logdets)


def _conditional(mean, covariance, x, seen):
    """Of a joint normal distribution the mean and covariance of what is not seen, and the log-density of what is."""
    gain = np.linalg.solve(covariance[np.ix_(seen, seen)], covariance[np.ix_(seen, ~seen)]).T
    rest = covariance[np.ix_(~seen, ~seen)] - gain @ covariance[np.ix_(seen, ~seen)]
    density = multivariate_normal.logpdf(x[seen], mean[seen], covariance[np.ix_(seen, seen)])
    return mean[~seen] + gain @ (x - mean)[seen], rest, density


def _chain(seed, columns=2):
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(columns, columns))
    return LinearGaussianSSMParams(
        initial_mean=rng.normal(size=2),
        initial_covariance=1.5 * np.eye(2) + 0.2,
        dynamics=0.8 * np.linalg.qr(rng.normal(size=(2, 2)))[0],
        dynamics_covariance=0.3 * np.eye(2) + 0.1,
        emission=rng.normal(size=(columns, 2)),
        emission_covariance=0.4 * np.eye(columns) + 0.1 * mixed @ mixed.T,
        dynamics_bias=rng.normal(size=2),
    )


def _joint(p, steps):
    """Mean and covariance of all states, and then of all observations."""
    size = 2 * steps
    lag = np.eye(size) - np.kron(np.eye(steps, k=-1), p.dynamics)
    noise = np.kron(np.eye(steps), p.dynamics_covariance)
    noise[:2, :2] = p.initial_covariance
    pull = np.tile(p.dynamics_bias, steps)
    pull[:2] = p.initial_mean
    inverse, look = np.linalg.inv(lag), np.kron(np.eye(steps), p.emission)
    states, mean = inverse @ noise @ inverse.T, inverse @ pull
    cross = states @ look.T
    observed = look @ cross + np.kron(np.eye(steps), p.emission_covariance)
    return np.concatenate([mean, look @ mean]), np.block([[states, cross], [cross.T, observed]])


@pytest.mark.parametrize("missing", [False, True])
def test_linear_gaussian_chains(missing):
    """Under the posterior at other parameters; a step without entries has no latents but its state."""
    x, lengths = RNG.normal(size=(3, 4, 2)), np.array([4, 4, 4])
    if missing:
        x[0, 1, 0] = x[1, 2, 1] = np.nan
        x[2, 1] = np.nan
        lengths = np.array([4, 3, 4])
    model, weights = LinearGaussianSSM(2, dynamics_bias=True), np.array([1.0, 2.0, 0.5])
    params, other = _chain(1), _chain(2)
    data = Sequences(jnp.asarray(x), lengths) if missing else jnp.asarray(x)
    logliks, gaps = np.zeros(3), np.zeros(3)
    for row, length in enumerate(lengths):
        values, seen = x[row, :length].ravel(), ~np.isnan(x[row, :length])
        partly = np.repeat(np.any(seen, axis=1), 2)
        kept = np.concatenate([np.ones(2 * length, bool), partly])
        seen = np.concatenate([np.zeros(2 * length, bool), seen.ravel()])[kept]
        row_x = np.concatenate([np.zeros(2 * length), values])[kept]
        found = []
        for p in (params, other):
            mean, covariance = _joint(p, length)
            found.append(_conditional(mean[kept], covariance[np.ix_(kept, kept)], row_x, seen))
        logliks[row], gaps[row] = found[0][2], _divergence(*found[1][:2], *found[0][:2])
    bound, gap = jax.jit(lambda at, w: free_energy(model, params, data, model.infer(at, data), w))(other, weights)
    np.testing.assert_allclose(gap, weights @ gaps, rtol=1e-8)
    np.testing.assert_allclose(bound, weights @ (logliks - gaps), rtol=1e-10)


def _moments(rows, size):
    root = RNG.normal(size=(rows, size, size))
    return StateMoments(
        means=RNG.normal(size=(rows, size)), covariances=root @ root.swapaxes(1, 2) + 0.1 * np.eye(size)
    )


def test_factors_under_moments_that_are_written_down():
    """Rows with missing entries, which are latent with the factors: they follow from these as the model has it."""
    params = FactorAnalysisParams(
        mean=RNG.normal(size=3), loadings=RNG.normal(size=(3, 2)), uniquenesses=np.array([0.3, 0.5, 0.8])
    )
    x = RNG.normal(size=(5, 3))
    x[1, 0] = x[3, 2] = np.nan
    q, weights = _moments(5, 2), np.array([1.0, 0.0, 2.0, 1.0, 1.0])
    expected = np.zeros((5, 2))
    loadings = params.loadings
    joint = np.block([[np.eye(2), loadings.T], [loadings, loadings @ loadings.T + np.diag(params.uniquenesses)]])
    for n, row in enumerate(x):
        kept = np.concatenate([[True, True], ~np.isnan(row)])
        mean = np.concatenate([np.zeros(2), params.mean])[kept]
        seen = np.arange(len(mean)) > 1
        found = _conditional(mean, joint[np.ix_(kept, kept)], np.concatenate([np.zeros(2), row])[kept], seen)
        expected[n] = found[2], _divergence(q.means[n], q.covariances[n], *found[:2])
    bound, gap = BOUND(FactorAnalysis(2), params, x, q, weights)
    np.testing.assert_allclose(gap, weights @ expected[:, 1], rtol=1e-10)
    np.testing.assert_allclose(bound, weights @ (expected[:, 0] - expected[:, 1]), rtol=1e-10)


def test_a_network_of_normal_distributions_climbs_its_bound():
    """In the place of the E-step: of one q there is one maximum over parameters, where the M-step leads."""
    x = RNG.normal(size=(40, 1)) @ [[1.0, -0.5, 2.0]] + 0.5 * RNG.normal(size=(40, 3))

    def network(slope, x):
        return StateMoments(means=(x @ slope)[:, None], covariances=jnp.full((len(x), 1, 1), 0.2))

    model, slope = PPCA(1, missing=False), jnp.array([0.3, 0.0, 0.3])
    start = PPCAParams(mean=np.zeros(3), loadings=np.ones((3, 1)), noise_variance=np.array(1.0))
    bounds, params = [], start
    for _ in range(3):
        bound, gap = BOUND(model, params, x, network(slope, x))
        np.testing.assert_allclose(bound + gap, model.log_prob(params, x).sum(), rtol=1e-12)
        assert gap > 0
        bounds.append(float(bound))
        params = em_fit(model, params, x, algorithm=EM(expect=Recognition(network, slope)), max_steps=1).params
    assert bounds[1] > bounds[0]
    np.testing.assert_allclose(bounds[2], bounds[1], rtol=1e-12)


def test_random_effects_under_moments_that_are_written_down():
    numbers = np.repeat(np.arange(6), [1, 2, 3, 4, 2, 3])
    features = np.column_stack([np.ones(15), RNG.normal(size=15)])
    response = features @ [1.0, 2.0] + RNG.normal(size=15)
    x, model = group_rows((features, features, response), numbers), LinearMixedModel()
    params = LinearMixedModelParams(
        coefficients=np.array([0.5, 1.5]),
        random_covariance=np.array([[1.2, 0.3], [0.3, 0.5]]),
        variance=np.array(0.9),
    )
    q, logliks, gaps = _moments(6, 2), np.zeros(6), np.zeros(6)
    for n in range(6):
        z = features[numbers == n]
        left = response[numbers == n] - z @ params.coefficients
        cross = params.random_covariance @ z.T
        joint = np.block([[params.random_covariance, cross], [cross.T, z @ cross + 0.9 * np.eye(len(z))]])
        seen = np.arange(2 + len(z)) > 1
        found = _conditional(np.zeros(len(seen)), joint, np.concatenate([np.zeros(2), left]), seen)
        logliks[n], gaps[n] = found[2], _divergence(q.means[n], q.covariances[n], *found[:2])
    bound, gap = BOUND(model, params, x, q)
    np.testing.assert_allclose(gap, gaps.sum(), rtol=1e-8)
    np.testing.assert_allclose(bound, (logliks - gaps).sum(), rtol=1e-10)
    assert abs(BOUND(model, params, x, model.posterior(params, x)).gap) < 1e-9
    with pytest.raises(TypeError, match='of LinearMixedModel\\("ML"\\)'):
        BOUND(LinearMixedModel("REML"), params, x, q)


def test_missing_values():
    """A row without entries tells nothing, and has no latents."""
    x = RNG.normal(size=(5, 3))
    x[0, 1] = x[2, 0] = x[2, 2] = np.nan
    x[4] = np.nan
    one, other = (
        MultivariateNormalParams(mean=RNG.normal(size=3), covariance=np.cov(RNG.normal(size=(3, 9)))) for _ in range(2)
    )
    logliks, gaps = np.zeros(5), np.zeros(5)
    for n in range(4):
        seen = ~np.isnan(x[n])
        mine, theirs = (_conditional(p.mean, p.covariance, x[n], seen) for p in (one, other))
        logliks[n], gaps[n] = mine[2], _divergence(*theirs[:2], *mine[:2])
    model = MultivariateNormal()
    bound, gap = BOUND(model, one, x, jax.jit(model.infer)(other, x))
    np.testing.assert_allclose(gap, gaps.sum(), rtol=1e-8)
    np.testing.assert_allclose(bound, (logliks - gaps).sum(), rtol=1e-10)


def test_what_is_no_distribution_is_named():
    model, x = PPCA(1), RNG.normal(size=(4, 2))
    params = PPCAParams(mean=np.zeros(2), loadings=np.ones((2, 1)), noise_variance=np.array(1.0))
    q = StateMoments(means=np.zeros((4, 1)), covariances=np.ones((4, 1, 1)))
    for wrong, error, says in (
        (np.ones((4, 1)), TypeError, "q must be a StateMoments"),
        (dataclasses.replace(q, means=np.zeros((3, 1))), ValueError, r"q.means must have shape \(4, 1\); got \(3, 1\)"),
        (jax.jit(model.infer)(params, x[:3]), ValueError, "q must be of 4 rows"),
    ):
        with pytest.raises(error, match=says):
            BOUND(model, params, x, wrong)
    with pytest.raises(ValueError, match="positive definite; got an eigenvalue of -1"):
        normals.written(dataclasses.replace(q, covariances=-q.covariances), np.zeros((1, 4)))
    chain = LinearGaussianSSM(2, dynamics_bias=True)
    with pytest.raises(TypeError, match="q must be what the model's infer"):
        BOUND(chain, _chain(1), RNG.normal(size=(4, 2)), q)
