"""Values behind known noise: the plain mixture where there is none, Bovy's equations, quadrature and scipy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats as st

from jaxem import HMM, Mixture, NoisyNormal, Normal, NormalParams, Sequences, em_fit, fit_restarts

pytestmark = pytest.mark.usefixtures("x64")


def clusters(rows=90, columns=2, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, rows)
    return rng.normal(size=(rows, columns)) * np.array([[1.0], [0.6]])[labels] + 3.0 * labels[:, None]


def correlated_noise(rows, columns, seed=1, rank=None):
    factor = np.random.default_rng(seed).normal(size=(rows, columns, rank or columns))
    return 0.5 * factor @ factor.transpose(0, 2, 1)


def params_of(model, x):
    return model.init(jax.random.key(2), x)


@pytest.mark.parametrize("kind", ["variances", "covariances"])
@pytest.mark.parametrize("columns", [1, 2, 6])
def test_densities_are_those_of_values_and_noise_together(kind, columns):
    """N(m, C + S) of the observed columns; of the noise of the others nothing is known, not even that it is finite."""
    x = clusters(30, columns)
    noise = correlated_noise(30, columns)
    gone = np.random.default_rng(3).random(x.shape) < 0.2
    gone[4] = True
    holed = np.where(gone, np.nan, x)
    given = np.einsum("nii->ni", noise) if kind == "variances" else noise
    full = np.where(np.eye(columns, dtype=bool), noise, 0) if kind == "variances" else noise
    unknown = gone if kind == "variances" else gone[:, :, None] | gone[:, None]
    model = Mixture(NoisyNormal(), 2)
    params = params_of(model, (x, given))
    expected = np.zeros((2, 30))
    for k, (mean, covariance) in enumerate(zip(params.components.mean, params.components.covariance, strict=True)):
        for n, seen in enumerate(~gone):
            if np.any(seen):
                law = st.multivariate_normal(np.asarray(mean)[seen], (covariance + full[n])[np.ix_(seen, seen)])
                expected[k, n] = law.logpdf(x[n, seen])
    found = model.family.log_prob(params.components, (jnp.asarray(holed), jnp.where(unknown, np.nan, given)))
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("covariance", ["full", "tied", "diag", "EII"])
@pytest.mark.parametrize("kind", ["variances", "covariances"])
def test_without_noise_it_is_the_plain_mixture_iterate_by_iterate(covariance, kind):
    x = clusters()
    noise = np.zeros((90, 2) if kind == "variances" else (90, 2, 2))
    noisy, plain = Mixture(NoisyNormal(covariance), 2), Mixture(Normal(covariance), 2)
    start = params_of(plain, x)
    cases = ((noisy, (x, noise)), (plain, x))
    found, expected = (em_fit(model, start, data, tol=-1.0, max_steps=15) for model, data in cases)
    np.testing.assert_allclose(found.history, expected.history, rtol=1e-11)
    for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def test_with_equal_noise_it_is_the_mixture_of_the_sums():
    """The maximum of N(m, C + S) over C is that of the plain mixture, less S, where that leaves a covariance."""
    x, noise = clusters(200), np.array([[0.2, 0.05], [0.05, 0.1]])
    plain = Mixture(Normal(), 2)
    best = em_fit(plain, params_of(plain, x), x, tol=1e-12, max_steps=5000)
    model = Mixture(NoisyNormal(), 2)
    start = dataclasses.replace(best.params, weights=jnp.array([0.5, 0.5]))
    fit = em_fit(model, start, (x, np.broadcast_to(noise, (200, 2, 2))), tol=1e-12, max_steps=5000)
    assert fit.converged
    np.testing.assert_allclose(fit.loglik, best.loglik, rtol=1e-9)
    np.testing.assert_allclose(
        np.asarray(fit.params.components.covariance) + noise, best.params.components.covariance, atol=1e-4
    )
    np.testing.assert_allclose(fit.params.components.mean, best.params.components.mean, atol=1e-4)


def bovy_step(x, noise, weights, means, covariances):
    """Equations 13 to 16 of Bovy, Hogg & Roweis (2011), with the identity as projection."""
    total = covariances[:, None] + noise[None]
    logs = np.stack([[st.multivariate_normal(m, t).logpdf(row) for row, t in zip(x, each, strict=True)]
                     for m, each in zip(means, total, strict=True)])  # fmt: skip
    joint = np.log(weights)[:, None] + logs
    q = np.exp(joint - np.logaddexp.reduce(joint, axis=0))
    gain = np.einsum("kij,knjl->knil", covariances, np.linalg.inv(total))
    b = means[:, None] + np.einsum("knij,knj->kni", gain, x[None] - means[:, None])
    spread = covariances[:, None] - np.einsum("knij,kjl->knil", gain, covariances)
    rows = q.sum(axis=1)
    new = np.einsum("kn,kni->ki", q, b) / rows[:, None]
    away = b - new[:, None]
    square = np.einsum("kn,kni,knj->kij", q, away, away) + np.einsum("kn,knij->kij", q, spread)
    return q.mean(axis=1), new, square / rows[:, None, None], np.logaddexp.reduce(joint, axis=0).sum()


@pytest.mark.parametrize("rank", [None, 1])
def test_it_follows_bovys_equations_iterate_by_iterate(rank):
    """Also where the noise has no inverse."""
    x, noise = clusters(60, 3), correlated_noise(60, 3, rank=rank)
    model = Mixture(NoisyNormal(), 2)
    params = params_of(model, (x, noise))
    step = jax.jit(lambda params: (model.m_step(stats := model.e_step(params, (x, noise))), stats.loglik))
    for _ in range(8):
        c = params.components
        weights, means, covariances, loglik = bovy_step(
            x, noise, np.asarray(params.weights), np.asarray(c.mean), np.asarray(c.covariance)
        )
        params, own = step(params)
        np.testing.assert_allclose(own, loglik, rtol=1e-12)
        np.testing.assert_allclose(params.weights, weights, rtol=1e-9)
        np.testing.assert_allclose(params.components.mean, means, rtol=1e-8)
        np.testing.assert_allclose(params.components.covariance, covariances, rtol=1e-7, atol=1e-9)


def test_moments_and_evidence_by_quadrature():
    """Two columns, one of a row missing: sums over a fine grid of the values."""
    mean, covariance = np.array([0.3, -0.2]), np.array([[1.0, 0.6], [0.6, 0.8]])
    noise = np.array([[[0.5, 0.2], [0.2, 0.4]], [[0.3, 0.0], [0.0, 0.3]]])
    x = np.array([[1.0, -0.5], [0.4, np.nan]])
    side = np.linspace(-7, 7, 561)
    grid = np.stack(np.meshgrid(side, side, indexing="ij"), axis=-1)
    prior = st.multivariate_normal(mean, covariance).pdf(grid) * (side[1] - side[0]) ** 2
    params = NormalParams(mean=jnp.asarray(mean)[None], covariance=jnp.asarray(covariance)[None])
    family = NoisyNormal()
    for n, seen in enumerate(~np.isnan(x)):
        law = st.multivariate_normal(x[n, seen], noise[n][np.ix_(seen, seen)])
        mass = prior * law.pdf(grid[..., seen])
        evidence = mass.sum()
        away = grid - mean
        first = np.einsum("ab,abi->i", mass, away) / evidence
        second = np.einsum("ab,abi,abj->ij", mass, away, away) / evidence
        row = (x[n : n + 1], noise[n : n + 1])
        stats = family.stats(params, row, jnp.ones((1, 1)))
        np.testing.assert_allclose(family.log_prob(params, row)[0, 0], np.log(evidence), rtol=1e-8)
        np.testing.assert_allclose(stats.first[0], first, rtol=1e-7)
        np.testing.assert_allclose(stats.second[0], second, rtol=1e-7)


def test_a_chain_behind_noise_and_restarts():
    x = clusters(40)
    noise = np.full_like(x, 0.3)
    values = Sequences((x.reshape(4, 10, 2), 0 * noise.reshape(4, 10, 2)))
    plain, noisy = HMM(Normal(), 2), HMM(NoisyNormal(), 2)
    params = plain.init(jax.random.key(0), x.reshape(4, 10, 2))
    np.testing.assert_allclose(noisy.log_prob(params, values), plain.log_prob(params, x.reshape(4, 10, 2)), rtol=1e-11)
    one = noisy.init(jax.random.key(0), (x, noise))
    fit = em_fit(noisy, one, (x, noise), tol=-1.0, max_steps=20)
    assert np.all(np.diff(fit.history) > -1e-9)
    model = Mixture(NoisyNormal("tied"), 2)
    runs = fit_restarts(model, jax.random.key(0), (x, noise), num_restarts=4, certify=False)
    assert runs.best.objective >= em_fit(model, params_of(model, (x, noise)), (x, noise)).objective - 1e-3


def test_the_noise_is_taken_out():
    """Rows seen through noise three times as wide as the values: the spread found is that of the values."""
    rng = np.random.default_rng(6)
    truth = np.array([[1.0, 0.7], [0.7, 1.0]])
    scale = rng.uniform(0.5, 3.0, 4000)
    x = rng.multivariate_normal([1.0, -1.0], truth, 4000) + scale[:, None] * rng.normal(size=(4000, 2))
    data = (x, np.tile(scale[:, None] ** 2, (1, 2)))
    model = Mixture(NoisyNormal(), 1)
    fit = em_fit(model, params_of(model, data), data)
    np.testing.assert_allclose(fit.params.components.covariance[0], truth, atol=0.15)
    at = dataclasses.replace(
        fit.params, components=NormalParams(mean=jnp.array([[1.0, -1.0]]), covariance=jnp.asarray(truth)[None])
    )
    ratio = 2 * float(fit.loglik - jnp.sum(model.log_prob(at, data)))
    assert st.chi2(5).sf(ratio) > 1e-3


X = clusters(12)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (X, ("x must be a pair (x, noise)",)),
        ((X, np.ones((12, 3))), ("x[1] must have shape (12, 2), variances, or (12, 2, 2)", "got (12, 3)")),
        ((X, np.where(np.arange(24).reshape(12, 2) == 5, -1.0, 1.0)), ("x[1] must be at least 0", "got -1", "(2, 1)")),
        ((X, np.tile([[1.0, 2.0], [2.0, 1.0]], (12, 1, 1))), ("x[1] must be positive semi-definite", "-1")),
        ((X, np.full((12, 2), np.nan)), ("x[1] must be finite where x is observed", "got nan at index (0, 0)")),
        ((np.where([True, False], X, np.nan), np.ones((12, 2))), ("column 1 has none",)),
        (
            (np.where(np.arange(24).reshape(12, 2) == 14, np.inf, X), np.ones((12, 2))),
            ("x[0] must be finite", "row 7, column 0"),
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(data, told):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        Mixture(NoisyNormal(), 2).init(jax.random.key(0), data)
    for words in told:
        assert words in str(refusal.value)
