"""Every family against scipy: densities and their edges, missing entries, samplers, M-steps, float32.

A new family is one line in `cases`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.special
import scipy.stats as st

from jaxem import (
    Bernoulli,
    BernoulliParams,
    Binomial,
    Categorical,
    CategoricalParams,
    CensoredNormal,
    CensoredNormalParams,
    Exponential,
    Gamma,
    GammaParams,
    LinearRegression,
    LinearRegressionParams,
    LogisticRegression,
    LowRankNormal,
    LowRankNormalParams,
    Mixture,
    Multinomial,
    MultinomialParams,
    NegativeBinomial,
    NegativeBinomialParams,
    Normal,
    NormalParams,
    Poisson,
    PoissonParams,
    PoissonRegression,
    RegressionParams,
    StudentT,
    StudentTParams,
    VonMisesFisher,
    VonMisesFisherParams,
    ZeroInflated,
    ZeroInflatedParams,
    em_fit,
)
from jaxem.families import GammaStats, VonMisesFisherStats
from jaxem.families.bessel import bessel_odds, log_bessel


@dataclasses.dataclass(frozen=True)
class Case:
    """A family, parameters of two components, rows, and scipy's distributions of the two.

    reference: columns (K, 1, D) as one frozen distribution, or else log-densities of rows and a test of them.
    edges: parameters on the boundary. missing: whether missing entries are taken.
    """

    family: Any
    params: Any
    x: Any
    reference: Callable
    edges: Any = None
    missing: bool = True


@dataclasses.dataclass(frozen=True)
class Values:
    """Independent columns of values 0..V-1, probabilities (K, 1, D, V), in the manner of scipy."""

    probability: np.ndarray

    def logpmf(self, x):
        wide = np.broadcast_to(self.probability, (len(self.probability), *x.shape, self.probability.shape[-1]))
        index = np.broadcast_to(x, wide.shape[:-1]).astype(int)
        with np.errstate(divide="ignore"):
            return np.log(np.take_along_axis(wide, index[..., None], -1)[..., 0])

    def cdf(self, x):
        return np.sum(self.probability * (np.arange(self.probability.shape[-1]) <= x[..., None]), axis=-1)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Distributions of whole rows: log-densities (K, N), and the p-value of rows drawn from the first."""

    logpdf: Callable
    p_value: Callable


def p_value(law, rows):
    """The smallest of the columns' p-values: the (for whole numbers randomised) distribution function is uniform."""
    at = law.cdf(rows)[0]
    if hasattr(law, "logpmf"):
        before = law.cdf(rows - 1)[0]
        at = before + np.random.default_rng(1).random(at.shape) * (at - before)
    return min(st.kstest(column, "uniform").pvalue for column in at.T)


def _multinomial(params, _):
    p = np.asarray(params.probability)
    return Rows(
        lambda x: np.stack([st.multinomial(12, q).logpmf(x) for q in p]),
        lambda rows: p_value(st.binom(12, p[:, None]), rows),
    )


def _von_mises_fisher(params, _):
    kappa, m = np.asarray(params.concentration), np.asarray(params.mean_direction)
    dimension = m.shape[1]

    def logpdf(x):
        # scipy's has no limit at a concentration of 0: there it is 1 over the sphere's area.
        uniform = scipy.special.gammaln(dimension / 2) - np.log(2) - dimension / 2 * np.log(np.pi)
        pairs = zip(m, kappa, strict=True)
        return np.stack([st.vonmises_fisher(a, c).logpdf(x) if c else np.full(len(x), uniform) for a, c in pairs])

    def p_value(rows):
        """Of the angles from the pole, and of the sides that rows lie on."""
        angles = np.linspace(0, np.pi, 20001)
        density = np.exp(kappa[0] * (np.cos(angles) - 1)) * np.sin(angles) ** (dimension - 2)
        mass = scipy.integrate.cumulative_simpson(density, x=angles, initial=0)
        drawn = np.arccos(np.clip(rows @ m[0], -1, 1))
        height = st.kstest(drawn, lambda t: np.interp(t, angles, mass / mass[-1])).pvalue
        side = rows @ np.linalg.svd(m[:1])[2][1:].T
        # On a circle both sides are as likely; elsewhere the angle in the first plane across is uniform.
        if dimension == 2:
            return min(height, st.binomtest(int(np.sum(side > 0)), len(rows)).pvalue)
        turn = np.arctan2(side[:, 1], side[:, 0])
        return min(height, st.kstest(turn, st.uniform(-np.pi, 2 * np.pi).cdf).pvalue)

    return Rows(logpdf, p_value)


def _elliptic(params, matrices, laws, law_of_square):
    """Whole rows: Mahalanobis distances squared, and the first column, tell a wrong scale and a wrong mean."""

    def p_value(rows):
        deviations = rows - np.asarray(params.mean[0])
        square = np.einsum("ni,ij,nj->n", deviations, np.linalg.inv(matrices[0]), deviations)
        return min(st.kstest(square, law_of_square.cdf).pvalue, 2 * st.binom(len(rows), 0.5).cdf(
            min(np.sum(deviations[:, 0] > 0), np.sum(deviations[:, 0] < 0))))  # fmt: skip

    return Rows(lambda x: np.stack([law.logpdf(x) for law in laws]), p_value)


@dataclasses.dataclass(frozen=True)
class _Observed:
    """A normal distribution of what is observed of rows."""

    mean: np.ndarray
    covariance: np.ndarray

    def logpdf(self, x):
        def one(row, seen):
            law = st.multivariate_normal(self.mean[seen], self.covariance[np.ix_(seen, seen)]) if np.any(seen) else None
            return law.logpdf(row[seen]) if law else 0.0

        return np.array([one(row, seen) for row, seen in zip(x, ~np.isnan(x), strict=True)])


def _normal(params, _, matrices=None):
    matrices = np.asarray(params.covariance) if matrices is None else matrices
    laws = [_Observed(np.asarray(m), c) for m, c in zip(params.mean, matrices, strict=True)]
    return _elliptic(params, matrices, laws, st.chi2(matrices.shape[-1]))


def _low_rank(params, _):
    loadings, own = np.asarray(params.loadings), np.asarray(params.uniquenesses)
    return _normal(params, None, loadings @ np.swapaxes(loadings, 1, 2) + own[:, :, None] * np.eye(own.shape[1]))


def _censored(params, upper):
    """Rows whose upper bounds stand beside: probabilities where these differ from the lower ones."""
    law = st.norm(np.asarray(params.mean)[:, None], np.sqrt(params.variance)[:, None])

    def logpdf(lower):
        with np.errstate(divide="ignore"):
            mass = np.log(np.where(lower > 0, law.sf(lower) - law.sf(upper), law.cdf(upper) - law.cdf(lower)))
        return np.where(lower == upper, law.logpdf(np.clip(lower, -9, 9)), mass)

    return Rows(logpdf, lambda rows: st.kstest(rows, st.norm(law.mean()[0, 0], law.std()[0, 0]).cdf).pvalue)


def _student_t(params, _):
    matrices, nu = np.asarray(params.scale), np.asarray(params.degrees_of_freedom)
    laws = [st.multivariate_t(np.asarray(m), c, df) for m, c, df in zip(params.mean, matrices, nu, strict=True)]
    return _elliptic(params, matrices, laws, st.f(2, nu[0], scale=2))


@dataclasses.dataclass(frozen=True)
class Inflated:
    """A distribution of counts with more zeros, in the manner of scipy."""

    zero: np.ndarray
    law: Any

    def logpmf(self, x):
        with np.errstate(divide="ignore"):
            return np.log(self.zero * (x == 0) + (1 - self.zero) * self.law.pmf(x))

    def cdf(self, x):
        return self.zero * (x >= 0) + (1 - self.zero) * self.law.cdf(x)


def _zero_inflated(params, _):
    zero = np.asarray(params.inflation)[:, None, None]
    return Inflated(zero, st.poisson(params.components.rate[:, None]))


def _binomial(params, trials):
    return st.binom(trials, params.probability[:, None])


def _unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def cases() -> dict[str, Case]:
    """Built under the precision that is enabled."""
    rng = np.random.default_rng(5)
    yes, counts, values = rng.integers(0, 2, (12, 3)), rng.integers(0, 9, (12, 3)), rng.integers(0, 4, (12, 2))
    waits, exposure = rng.exponential(2.0, (12, 3)), rng.uniform(0.5, 2, (12, 1))
    words = rng.multinomial(12, [0.4, 0.3, 0.3], 12)
    directions = {d: _unit(rng.normal(size=(12, d))) for d in (2, 3, 5)}
    share = jnp.array([[0.2, 0.5, 0.7], [0.9, 0.35, 0.4]])
    edge = jnp.array([[0.0, 1.0, 0.3], [1.0, 0.5, 0.0]])
    rate = jnp.array([[0.5, 3.0, 7.0], [4.0, 1.0, 0.8]])
    none = rate.at[0, 0].set(0.0)
    four = jnp.array([[[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]], [[0.25, 0.3, 0.25, 0.2], [0.1, 0.5, 0.3, 0.1]]])
    three = jnp.array([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]])
    scarce = jnp.array([[0.3, 2.0, 40.0], [5.0, 0.7, 1.5]])

    plane = rng.normal(size=(12, 2))
    mean = jnp.array([[0.0, 1.0], [3.0, -1.0]])
    covariance = jnp.array([[[1.0, 0.6], [0.6, 2.0]], [[0.5, -0.2], [-0.2, 0.3]]])

    def bernoulli(params, _):
        return st.bernoulli(params.probability[:, None])

    def poisson(params, exposure):
        return st.poisson(np.asarray(params.rate)[:, None] * (1 if exposure is None else exposure))

    def negative_binomial(params, _):
        m, c = np.asarray(params.mean)[:, None], np.asarray(params.concentration)[:, None]
        return st.nbinom(c, c / (m + c))

    def directional(d, x):
        m = jnp.asarray(_unit(rng.normal(size=(2, d))))
        return Case(
            VonMisesFisher(),
            VonMisesFisherParams(mean_direction=m, concentration=jnp.array([1.5, 12.0])),
            x,
            _von_mises_fisher,
            edges=VonMisesFisherParams(mean_direction=m, concentration=jnp.array([0.0, 600.0])),
            missing=False,
        )

    return {
        "bernoulli": Case(
            Bernoulli(), BernoulliParams(probability=share), yes, bernoulli, BernoulliParams(probability=edge)
        ),
        "binomial": Case(
            Binomial(9),
            BernoulliParams(probability=share),
            counts,
            lambda p, _: _binomial(p, 9),
            BernoulliParams(probability=edge),
        ),
        "binomial, trials by row": Case(
            Binomial(),
            BernoulliParams(probability=share),
            (counts, counts + yes),
            _binomial,
            BernoulliParams(probability=edge),
        ),
        "categorical": Case(
            Categorical(4),
            CategoricalParams(probability=four),
            values,
            lambda p, _: Values(np.asarray(p.probability)[:, None]),
            CategoricalParams(probability=four.at[0, 0].set(jnp.array([0.0, 0.0, 1.0, 0.0]))),
        ),
        "multinomial": Case(
            Multinomial(12),
            MultinomialParams(probability=three),
            words,
            _multinomial,
            MultinomialParams(probability=three.at[0].set(jnp.array([0.5, 0.5, 0.0]))),
            missing=False,
        ),
        "poisson": Case(Poisson(), PoissonParams(rate=rate), counts, poisson, PoissonParams(rate=none)),
        "poisson, exposure": Case(
            Poisson(), PoissonParams(rate=rate), (counts, exposure), poisson, PoissonParams(rate=none)
        ),
        "exponential": Case(
            Exponential(), PoissonParams(rate=rate), waits, lambda p, _: st.expon(scale=1 / p.rate[:, None])
        ),
        "gamma": Case(
            Gamma(),
            GammaParams(shape=scarce, rate=rate),
            waits,
            lambda p, _: st.gamma(p.shape[:, None], scale=1 / p.rate[:, None]),
            GammaParams(
                shape=scarce.at[0].set(jnp.array([1e-3, 1.0, 1e5])), rate=rate.at[0].set(jnp.array([1e-3, 1.0, 1e5]))
            ),
        ),
        "negative binomial": Case(
            NegativeBinomial(),
            NegativeBinomialParams(mean=rate, concentration=scarce),
            counts,
            negative_binomial,
            NegativeBinomialParams(mean=none, concentration=scarce.at[1].set(jnp.array([1e-3, 1e2, 1e5]))),
        ),
        "normal": Case(Normal("full"), NormalParams(mean=mean, covariance=covariance), plane, _normal),
        "normal, diag": Case(
            Normal("diag"),
            NormalParams(mean=rate, covariance=scarce),
            waits,
            lambda p, _: st.norm(p.mean[:, None], np.sqrt(p.covariance[:, None])),
        ),
        "censored normal": Case(
            CensoredNormal(),
            CensoredNormalParams(mean=jnp.array([0.5, -1.0]), variance=jnp.array([1.0, 4.0])),
            (np.r_[plane[:9, 0], -np.inf, 1.0, -np.inf], np.r_[plane[:6, 0], plane[6:9, 0] + 1, -1.0, np.inf, np.inf]),
            _censored,
            CensoredNormalParams(mean=jnp.array([0.5, 3.0]), variance=jnp.array([100.0, 0.25])),
            missing=False,
        ),
        "low rank": Case(
            LowRankNormal(1),
            LowRankNormalParams(mean=rate, loadings=(2 * edge - share)[..., None], uniquenesses=scarce),
            waits,
            _low_rank,
            missing=False,
        ),
        "student t": Case(
            StudentT(),
            StudentTParams(mean=mean, scale=covariance, degrees_of_freedom=jnp.array([2.5, 30.0])),
            plane,
            _student_t,
            missing=False,
        ),
        "zero-inflated": Case(
            ZeroInflated(Poisson()),
            ZeroInflatedParams(inflation=jnp.array([0.4, 0.1]), components=PoissonParams(rate=rate[:, 1:2])),
            counts[:, :1],
            _zero_inflated,
            ZeroInflatedParams(inflation=jnp.array([0.0, 1.0]), components=PoissonParams(rate=rate[:, 1:2])),
        ),
        "directions, 2": directional(2, directions[2]),
        "directions, 3": directional(3, directions[3]),
        "directions, 5": directional(5, directions[5]),
    }


NAMES = tuple(cases())


def _unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def expected(case, params, x):
    """Log-densities (K, N) by scipy, of the observed columns only."""
    x, extra = x if isinstance(x, tuple) else (x, None)
    law = case.reference(params, extra)
    if isinstance(law, Rows):
        return law.logpdf(x)
    observed = ~np.isnan(x)
    log_density = law.logpmf if hasattr(law, "logpmf") else law.logpdf
    return np.sum(np.where(observed, log_density(np.where(observed, x, 1)), 0), axis=-1)


def gapped(x):
    """Every fifth entry missing, and one whole row."""
    if isinstance(x, tuple):
        return gapped(x[0]), x[1]
    gone = (np.arange(x.size) % 5 == 0).reshape(x.shape)
    gone[3] = True
    return np.where(gone, np.nan, x)


def whole(x):
    """The same rows as whole numbers, -1 where missing."""
    return (whole(x[0]), x[1]) if isinstance(x, tuple) else np.where(np.isnan(x), -1, x).astype(np.int32)


@pytest.mark.parametrize("name", NAMES)
def test_densities_are_scipys(name, x64):
    """Also at the edges of the parameters and with entries missing; and gradients are finite there."""
    case = cases()[name]

    @jax.jit
    def evaluate(params, x):
        def total(params):
            logs = case.family.log_prob(params, x)
            return jnp.sum(jnp.where(jnp.isfinite(logs), logs, 0)), logs

        return jax.grad(total, has_aux=True)(params)

    x = jax.tree.map(lambda leaf: np.asarray(leaf, float), case.x)
    tables = [x, gapped(x)] if case.missing else [x]
    for params in filter(None, (case.params, case.edges)):
        for rows in tables:
            slope, logs = evaluate(params, rows)
            np.testing.assert_allclose(logs, expected(case, params, rows), rtol=1e-10, atol=1e-11)
            assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(slope))
    if case.missing and hasattr(case.reference(case.params, 1), "logpmf"):
        logs = jax.jit(case.family.log_prob)(case.params, whole(tables[1]))
        np.testing.assert_allclose(logs, expected(case, case.params, tables[1]), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", [name for name in NAMES if "by row" not in name and "exposure" not in name])
def test_samplers_draw_from_the_density(name, x64):
    case = cases()[name]
    drawn = jax.jit(case.family.sample)(jax.random.key(3), case.params, jnp.arange(4000) % 2)
    case.family.check(drawn)
    for component in (0, 1):
        rows = np.asarray(jax.tree.leaves(drawn)[0])[component::2]
        laws = [case.reference(jax.tree.map(lambda leaf: leaf[k : k + 1], case.params), None) for k in (0, 1)]  # noqa: B023
        right, wrong = (law.p_value(rows) if isinstance(law, Rows) else p_value(law, rows) for law in laws)
        right, wrong = (right, wrong) if component == 0 else (wrong, right)
        assert right > 1e-3
        assert wrong < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_a_component_without_rows_keeps_its_parameters(name, x64):
    case = cases()[name]
    x = jax.tree.map(jnp.asarray, case.x)
    kept, dead = step(case.family, case.params, x, jnp.zeros((2, 12)).at[0].set(1))
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(case.params), strict=True):
        np.testing.assert_allclose(a[1], b[1], rtol=1e-9)
    assert dead.tolist() == [False, True]


ROW_WEIGHTS = np.random.default_rng(2).integers(0, 4, 30).astype(float)


@jax.jit
def step(family, params, x, responsibilities):
    """The M-step after the statistics, and which components are degenerate."""
    stats = family.stats(params, x, responsibilities)
    return family.m_step(stats), family.degenerate(stats)


def maximum(log_density, start):
    """Where the weighted sum of log-densities is largest, in logarithms of the parameters."""
    found = scipy.optimize.minimize(
        lambda t: -np.sum(ROW_WEIGHTS * log_density(*np.exp(t))), np.log(start), method="Nelder-Mead",
        options=dict(xatol=1e-9, fatol=1e-13, maxiter=4000),
    )  # fmt: skip
    return np.exp(found.x)


@pytest.mark.parametrize("shape", [0.05, 1.0, 30.0])
def test_gamma_m_step_is_the_maximum(shape, x64):
    x = np.random.default_rng(1).gamma(shape, 2.0, (30, 1))
    at = GammaParams(shape=jnp.ones((1, 1)), rate=jnp.ones((1, 1)))
    found = step(Gamma(), at, jnp.asarray(x), jnp.asarray(ROW_WEIGHTS[None]))[0]
    best = maximum(lambda a, b: st.gamma(a, scale=1 / b).logpdf(x[:, 0]), (shape, 0.5))
    np.testing.assert_allclose([found.shape[0, 0], found.rate[0, 0]], best, rtol=1e-6)
    again, _, scale = st.gamma.fit(np.repeat(x[:, 0], ROW_WEIGHTS.astype(int)), floc=0)
    np.testing.assert_allclose([found.shape[0, 0], found.rate[0, 0]], [again, 1 / scale], rtol=1e-6)


def test_gamma_m_step_is_exact_from_tiny_to_huge_shapes(x64):
    shape = np.logspace(-3, 6, 60)[None]
    rate = np.logspace(2, -2, 60)[None]
    one = jnp.ones_like(shape)
    exact = GammaStats(
        count=jnp.ones(1), observed=one, total=shape / rate, logs=scipy.special.digamma(shape) - np.log(rate)
    )
    found = jax.jit(Gamma().m_step)(exact)
    # log mean - mean log is about 1/(2 shape), of numbers of the size of log shape.
    allowed = 1e-14 + 4e-15 * shape * np.abs(exact.logs)
    assert np.all(np.abs(found.shape / shape - 1) < allowed)
    np.testing.assert_allclose(found.shape / found.rate, shape / rate, rtol=1e-14)
    given = jax.jit(lambda stats: Gamma().m_step_given(stats, rate=jnp.asarray(rate)))(exact)
    np.testing.assert_allclose(given.shape, shape, rtol=1e-13)
    given = Gamma().m_step_given(exact, shape=2.0)
    np.testing.assert_allclose(given.rate, 2 * rate / shape, rtol=1e-14)


def test_gamma_caps_a_column_of_equal_entries(x64):
    at = GammaParams(shape=jnp.ones((1, 1)), rate=jnp.ones((1, 1)))
    found, capped = step(Gamma(), at, jnp.full((30, 1), 3.7), jnp.ones((1, 30)))
    assert found.shape[0, 0] > 1e7
    np.testing.assert_allclose(found.shape / found.rate, 3.7)
    assert capped[0]


def test_negative_binomial_em_ends_at_the_maximum(x64):
    x = np.random.default_rng(1).negative_binomial(2.0, 0.3, (30, 1))
    model, rows = Mixture(NegativeBinomial(), 1), jnp.asarray(x)
    start = model.init(jax.random.key(0), rows, jnp.asarray(ROW_WEIGHTS))
    found = em_fit(model, start, rows, jnp.asarray(ROW_WEIGHTS), tol=1e-13, max_steps=5000).params.components
    best = maximum(lambda m, c: st.nbinom(c, c / (m + c)).logpmf(x[:, 0]), (4.0, 2.0))
    np.testing.assert_allclose([found.mean[0, 0], found.concentration[0, 0]], best, rtol=1e-5)
    np.testing.assert_allclose(found.mean[0, 0], np.average(x[:, 0], weights=ROW_WEIGHTS), rtol=1e-12)
    stats = jax.jit(model.e_step)(start, rows)
    held = NegativeBinomial().m_step_given(stats.components, concentration=3.0)
    assert held.concentration[0, 0] == 3
    np.testing.assert_allclose(held.mean[0, 0], x.mean(), rtol=1e-12)


@pytest.mark.parametrize(
    "counts", [np.zeros(30), np.full(30, 6.0), np.r_[np.zeros(29), 5000.0], np.r_[np.zeros(29), 1.0]]
)
def test_negative_binomial_survives_extreme_counts(counts):
    model, x = Mixture(NegativeBinomial(), 1), jnp.asarray(counts, jnp.float32)[:, None]
    result = em_fit(model, model.init(jax.random.key(0), x), x, max_steps=300)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(result.params))
    np.testing.assert_allclose(result.params.components.mean[0, 0], counts.mean(), rtol=1e-5, atol=1e-15)
    assert np.isfinite(result.objective)


@pytest.mark.parametrize(("dimension", "concentration"), [(2, 0.3), (2, 30.0), (3, 4.0), (8, 500.0)])
def test_von_mises_fisher_m_step_is_the_maximum(dimension, concentration, x64):
    x = st.vonmises_fisher(np.eye(dimension)[0], concentration).rvs(30, random_state=3)
    at = VonMisesFisherParams(mean_direction=jnp.eye(dimension)[:1], concentration=jnp.ones(1))
    found = step(VonMisesFisher(), at, jnp.asarray(x), jnp.asarray(ROW_WEIGHTS[None]))[0]
    direction, best = st.vonmises_fisher.fit(np.repeat(x, ROW_WEIGHTS.astype(int), axis=0))
    np.testing.assert_allclose(found.mean_direction[0], direction, atol=1e-12)
    np.testing.assert_allclose(found.concentration[0], best, rtol=1e-7)


def test_von_mises_fisher_at_its_limits():
    family, circle = VonMisesFisher(), np.stack([[1, 0], [0, 1], [-1, 0], [0, -1]]).astype(np.float32)
    at = VonMisesFisherParams(mean_direction=jnp.array([[0.6, 0.8]]), concentration=jnp.zeros(1))
    even, collapsed = step(family, at, jnp.asarray(circle), jnp.ones((1, 4)))
    assert even.concentration[0] == 0
    assert not collapsed[0]
    np.testing.assert_allclose(np.linalg.norm(even.mean_direction[0]), 1, rtol=1e-6)
    same, collapsed = step(family, at, jnp.tile(jnp.array([[0.6, 0.8]]), (4, 1)), jnp.ones((1, 4)))
    assert 1e4 < same.concentration[0] < 1e7
    assert collapsed[0]


def test_von_mises_fisher_with_a_parameter_held_or_shared():
    family = VonMisesFisher()
    stats = VonMisesFisherStats(count=jnp.array([4.0, 6.0]), resultant=jnp.array([[1.8, 2.4], [5.0, 0.0]]))
    held = family.m_step_given(stats, mean_direction=jnp.array([[1.0, 0.0], [0.0, 1.0]]))
    length = scipy.special.ive(1, held.concentration) / scipy.special.ive(0, held.concentration)
    np.testing.assert_allclose(length, [1.8 / 4, 0], rtol=1e-5)
    held = family.m_step_given(stats, concentration=2.0)
    np.testing.assert_allclose(held.mean_direction, [[0.6, 0.8], [1, 0]], rtol=1e-6)
    assert held.concentration.tolist() == [2, 2]
    shared = family.share(stats, "concentration", family.m_step(stats))
    np.testing.assert_allclose(scipy.special.ive(1, shared) / scipy.special.ive(0, shared), 8 / 10, rtol=1e-5)


@pytest.mark.parametrize("order", [0, 0.5, 3.5, 30])
def test_bessel_functions(order, x64):
    kappa = np.r_[0, np.logspace(-2, 2, 30), 1e3, 1e5]

    @jax.jit
    def evaluate(kappa):
        slope, curve = jax.jvp(jax.vmap(jax.grad(lambda k: log_bessel(order, k))), (kappa,), (jnp.ones_like(kappa),))
        return log_bessel(order, kappa), bessel_odds(order, kappa), slope, curve

    log, odds, slope, curve = evaluate(jnp.asarray(kappa))
    assert odds[0] == 2 * order + 2
    np.testing.assert_allclose([slope[0], curve[0]], [-1, 1 / (2 * order + 2)], rtol=1e-12)
    usual = scipy.special.ive(order, kappa) * kappa > 1e-290
    k, low, high = kappa[usual], *scipy.special.ive([[order], [order + 1]], kappa[usual])
    np.testing.assert_allclose(log[usual], np.log(low) - order * np.log(k), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(k / (k + odds[usual]), high / low, rtol=1e-12)
    np.testing.assert_allclose(slope[usual], high / low - 1, rtol=1e-9, atol=1e-12)
    # d/dk A = 1 - A^2 - (2 order + 1) A / k
    bent = 1 - (high / low) ** 2 - (2 * order + 1) * (high / low) / k
    np.testing.assert_allclose(curve[usual], bent, rtol=1e-8, atol=1e-11)


EXTREMES = {
    "gamma": (
        Gamma(),
        GammaParams(shape=jnp.array([[1e-3], [1e3], [2.0]]), rate=jnp.array([[1e-3], [1e4], [1e-6]])),
        np.array([[1e-30], [1e-3], [0.1], [1e6]]),
    ),
    "negative binomial": (
        NegativeBinomial(),
        NegativeBinomialParams(
            mean=jnp.array([[3.0], [3.0], [1e3], [1e-6]]), concentration=jnp.array([[1e7], [1e-6], [1e5], [1.0]])
        ),
        np.array([[0.0], [1.0], [4.0], [1000.0]]),
    ),
    "directions": (
        VonMisesFisher(),
        VonMisesFisherParams(mean_direction=jnp.eye(3)[:2], concentration=jnp.array([1e-9, 1e4])),
        np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]]),
    ),
}


@pytest.mark.parametrize("name", EXTREMES)
def test_extremes_in_float32(name):
    family, params, x = EXTREMES[name]

    def evaluate(dtype):
        at, rows = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (params, x))
        return look(at, rows)

    @jax.jit
    def look(at, rows):
        (_, logs), slope = jax.value_and_grad(lambda p: total(family.log_prob(p, rows)), has_aux=True)(at)
        return logs, slope, family.stats(at, rows, jnp.ones_like(logs))

    def total(logs):
        return jnp.sum(logs), logs

    single = evaluate(jnp.float32)
    with jax.enable_x64(True):
        double = evaluate(jnp.float64)
    for a, b in zip(jax.tree.leaves(single), jax.tree.leaves(double), strict=True):
        assert a.dtype == jnp.float32
        assert np.all(np.isfinite(a))
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-3)


@pytest.mark.parametrize(
    ("family", "x", "message"),
    [
        (Gamma(), np.array([[1.0], [0.0]]), "x must hold finite numbers above 0; got 0 in row 1, column 0"),
        (NegativeBinomial(), np.array([[1.0], [2.5]]), "x must hold whole numbers, at least 0; got 2.5 in row 1"),
        (VonMisesFisher(), np.array([[1.0, 0.0], [3.0, 4.0]]), "unit length; row 1 has length 5"),
        (VonMisesFisher(), np.array([0.1, 0.2]), "at least two columns"),
        (VonMisesFisher(), np.array([[1.0, np.nan]]), "x must be finite; got nan in row 0, column 1"),
    ],
)
def test_rows_outside_the_support_are_refused(family, x, message):
    with pytest.raises(ValueError, match=message):
        family.check(x)


FEATURES = np.random.default_rng(3).normal(size=(2000, 2))
LINES = dict(coefficients=jnp.array([[1.0, -0.5], [0.2, 0.8]]), intercept=jnp.array([0.3, -1.0]))


@pytest.mark.parametrize(
    ("family", "params", "law"),
    [
        (
            LinearRegression(),
            LinearRegressionParams(**LINES, variance=jnp.array([0.5, 2.0])),
            lambda eta, k: st.norm(eta, np.sqrt([0.5, 2.0][k])),
        ),
        (LogisticRegression(), RegressionParams(**LINES), lambda eta, k: st.bernoulli(1 / (1 + np.exp(-eta)))),
        (PoissonRegression(), RegressionParams(**LINES), lambda eta, k: st.poisson(np.exp(eta))),
    ],
    ids=["linear", "logistic", "poisson"],
)
def test_regressions_are_scipys_given_the_features(family, params, law, x64):
    params = jax.tree.map(lambda leaf: leaf.astype(float), params)
    labels = jnp.arange(2000) % 2
    features, response = family.sample(jax.random.key(1), params, labels, FEATURES)
    family.check((features, response))
    eta = np.asarray(params.intercept)[:, None] + np.asarray(params.coefficients) @ FEATURES.T
    logs = family.log_prob(params, (features, response))
    for k in (0, 1):
        here = law(eta[k], k)
        log_density = here.logpmf if hasattr(here.dist, "logpmf") else here.logpdf
        np.testing.assert_allclose(logs[k], log_density(np.asarray(response)), rtol=1e-9, atol=1e-12)
        mine, other = (law(eta[j][k::2], j) for j in (k, 1 - k))
        drawn = np.asarray(response)[k::2]
        pvalues = []
        for candidate in (mine, other):
            at = candidate.cdf(drawn)
            if hasattr(here.dist, "logpmf"):
                before = candidate.cdf(drawn - 1)
                at = before + np.random.default_rng(1).random(at.shape) * (at - before)
            # Halves of low and of high prediction apart: a wrong line is wrong in one of them.
            low = candidate.mean() < np.median(candidate.mean())
            pvalues.append(min(st.kstest(part, "uniform").pvalue for part in (at[low], at[~low])))
        assert pvalues[0] > 1e-3
        assert pvalues[1] < 1e-6
