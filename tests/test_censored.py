"""Values known to lie in an interval: moments against quadrature, fits against the likelihood's own maximum."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats as st
from jitted import e_step

from jaxem import (
    HMM,
    CensoredNormal,
    CensoredNormalParams,
    CensoredRegression,
    Fixed,
    HMMParams,
    LinearRegression,
    LinearRegressionParams,
    Mixture,
    MixtureParams,
    Normal,
    NormalParams,
    Status,
    em_fit,
    squarem,
)
from jaxem.numerics import truncated_normal

INF = np.inf


def integrals(lower, width):
    """log mass, mean, variance and entropy by composite quadrature in extended precision, and the mode; lower > -inf.

    lower + width >= |lower|, as symmetry allows.
    """
    mode = max(lower, 0)
    reach = 120 / (mode + np.sqrt(mode**2 + 120))
    left = max(min(lower, 0), -reach)
    right = min(width if lower > 0 else lower + width, reach)
    nodes, weights = (a.astype(np.longdouble) for a in np.polynomial.legendre.leggauss(20))
    half = (np.longdouble(right) - left) / 128
    t = left + half * (1 + 2 * np.arange(64)[:, None] + nodes[None])
    density = half * weights * np.exp(-t * (np.longdouble(mode) + t / 2))
    total = np.sum(density)
    mean = np.sum(density * t) / total
    variance = np.sum(density * (t - mean) ** 2) / total
    log_mass = np.log(total) - np.longdouble(mode) ** 2 / 2 - np.log(2 * np.pi) / 2
    entropy = np.log(total) + mode * mean + (mean**2 + variance) / 2
    return np.array([log_mass, mode + mean, variance, entropy], float), mode


ENDS = [0.0, 1e-3, 0.1, 0.5, 1, 2, 3, 5, 8, 12, 20, 30, 40, 100, 1e3]
WIDTHS = [1e-8, 1e-4, 1e-2, 0.1, 0.5, 1, 2, 4, 6, 9, 15, 40, INF]
ACROSS = [(-b * share, b * (1 + share)) for b in (1e-6, 0.01, 0.3, 1, 2, 4, 6, 9) for share in (1e-6, 0.1, 0.5, 1)]
OPEN = [(-a, INF) for a in (1e-3, 0.1, 1, 2, 3, 5, 7, 9, 20)]
INTERVALS = [*itertools.product(ENDS, WIDTHS), *ACROSS, *OPEN]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 3e-13), ("float32", 1e-5)])
def test_truncated_moments_are_quadratures(dtype, tolerance):
    """From the middle to a thousand standard deviations off, from intervals of 1e-8 to open ones, on both sides."""
    with jax.enable_x64(dtype == "float64"):
        lower, width = np.array(INTERVALS, dtype).T
        upper = lower + width
        right = jax.jit(truncated_normal)(*map(jnp.asarray, (lower, upper, width)))
        left = jax.jit(truncated_normal)(*map(jnp.asarray, (-upper, -lower, width)))
    exact, mode = zip(*(integrals(float(a), float(w)) for a, w in zip(lower, width, strict=True)), strict=True)
    (log_mass, mean, variance, entropy), mode = np.array(exact).T, np.array(mode)
    for found, sign in ((right, 1), (left, -1)):
        assert all(leaf.dtype == dtype for leaf in found)
        found = [np.asarray(leaf, float) for leaf in found]
        errors = {
            "log mass": (found[0] - log_mass) / (1 + np.abs(log_mass)),
            "mean": (sign * found[1] - mean) / np.maximum(np.abs(mean), np.sqrt(variance)),
            "variance": found[2] / variance - 1,
            "entropy": (found[3] - entropy) / (1 + np.abs(entropy)),
        }
        worst = {name: float(np.max(np.abs(error))) for name, error in errors.items()}
        assert max(worst.values()) < tolerance, worst


def test_excess_over_a_far_bound_is_not_rounded_away(x64):
    """About 1/a - 2/a³ for an open interval, half the width of a narrow one: what a mean of 40 would hide."""
    a = np.array([10.0, 40.0, 1e3, 1e6])
    open_ = truncated_normal(jnp.asarray(a), jnp.full(4, INF), jnp.full(4, INF))
    series = 1 / a - 2 / a**3 + 10 / a**5 - 74 / a**7
    np.testing.assert_allclose(open_.mean - a, series, rtol=1e-5, atol=3e-16 * a.max())
    np.testing.assert_allclose(open_.variance, 1 / a**2 - 6 / a**4 + 50 / a**6, rtol=1e-3)
    # A relative width of 1e-6 at 30 standard deviations.
    narrow = truncated_normal(*(jnp.asarray([value]) for value in (30.0, 30 * (1 + 1e-6), 3e-5)))
    density = st.norm.logpdf(30 * (1 + 5e-7))
    np.testing.assert_allclose(narrow.log_mass, density + np.log(3e-5), rtol=1e-9)
    np.testing.assert_allclose(narrow.variance, 3e-5**2 / 12, rtol=1e-6)


def test_derivatives_of_truncated_moments(x64):
    """Along both bounds: -mean of the log mass, 1 - variance of the mean. Along the width: the density at its end."""
    lower, width = np.array(INTERVALS[::3]).T
    finite = width < INF
    base = jnp.asarray(np.where(finite, width, 1))

    def at(lower, width):
        upper = jnp.where(finite, lower + width, INF)
        found = truncated_normal(lower, upper, jnp.where(finite, width, INF))
        return jnp.sum(found.log_mass), found

    (slope, along), found = jax.grad(at, argnums=(0, 1), has_aux=True)(jnp.asarray(lower), base)
    np.testing.assert_allclose(slope, -found.mean, rtol=1e-11, atol=1e-13)
    upper = lower + width
    share = np.exp(np.where(finite, st.norm.logpdf(upper) - found.log_mass, -INF))
    np.testing.assert_allclose(along, share, rtol=1e-6, atol=1e-9)
    bent = jax.grad(lambda a: jnp.sum(at(a, base)[1].mean))(jnp.asarray(lower))
    np.testing.assert_allclose(bent, 1 - found.variance, rtol=1e-9, atol=1e-10)


def log_density(mean, deviation, lower, upper):
    """log p of every row, by the error function, on the side where that does not cancel."""
    a, b = (lower - mean) / deviation, (upper - mean) / deviation
    a, b = np.where(a + b > 0, -b, a), np.where(a + b > 0, -a, b)
    high, low = scipy.special.log_ndtr(b), scipy.special.log_ndtr(a)
    with np.errstate(divide="ignore", invalid="ignore"):
        mass = high + np.log1p(-np.exp(low - high))
        return np.where(lower == upper, st.norm.logpdf(lower, mean, deviation), mass)


def directly(matrix, lower, upper, start):
    """The largest log-likelihood, and the line and variance there, by BFGS on the marginal likelihood itself."""

    def lost(theta):
        return -np.sum(log_density(matrix @ theta[:-1], np.exp(theta[-1]), lower, upper))

    found = scipy.optimize.minimize(lost, start, method="BFGS", options=dict(gtol=1e-7))
    found = scipy.optimize.minimize(lost, found.x, method="Nelder-Mead", options=dict(xatol=1e-10, fatol=1e-13))
    return -found.fun, found.x[:-1], np.exp(2 * found.x[-1])


def censored(y, kind, rng):
    """Bounds of values that are cut from the right, from the left, read off to an interval, or all of it."""
    ceiling, floor = np.quantile(y, [0.6, 0.3])
    width = 0.5 * rng.exponential(size=len(y))
    interval = y - width * rng.random(len(y))
    if kind == "right":
        return np.minimum(y, ceiling), np.where(y > ceiling, INF, y)
    if kind == "left":
        return np.where(y < floor, -INF, y), np.maximum(y, floor)
    if kind == "interval":
        return interval, interval + width
    which = rng.integers(0, 4, len(y))
    off = rng.exponential(size=len(y))
    lower = np.select([which == 0, which == 1, which == 2], [y, y - off, -INF], interval)
    return lower, np.select([which == 0, which == 1, which == 2], [y, INF, y + off], interval + width)


@pytest.mark.parametrize("kind", ["right", "left", "interval", "all"])
def test_fits_end_at_the_maximum_of_the_likelihood(kind, x64):
    rng = np.random.default_rng(4)
    features = rng.normal(size=(60, 2))
    y = 5 + features @ [1.0, -2.0] + 0.7 * rng.normal(size=60)
    lower, upper = censored(y, kind, rng)
    matrix = np.column_stack([np.ones(60), features])
    for model, x, columns in (
        (Mixture(CensoredNormal(), 1), (lower, upper), matrix[:, :1]),
        (Mixture(CensoredRegression(), 1), (features, lower, upper), matrix),
    ):
        fit = em_fit(model, model.init(jax.random.key(0), x), x, tol=1e-12, max_steps=5000)
        assert fit.converged
        found = fit.params.components
        line = found.mean if columns.shape[1] == 1 else np.concatenate([found.intercept, found.coefficients[0]])
        best, peer, variance = directly(columns, lower, upper, np.r_[5, np.zeros(columns.shape[1] - 1), 0.5])
        np.testing.assert_allclose(fit.objective / 60, best / 60, atol=1e-10)
        np.testing.assert_allclose(line, peer, atol=1e-5)
        np.testing.assert_allclose(found.variance[0], variance, rtol=1e-5)


def test_simulated_failure_times_give_back_the_line(x64):
    """Log-normal lives at four temperatures, each test stopped at its time, as of Schmee & Hahn's motorettes."""
    rng = np.random.default_rng(1)
    inverse = np.repeat(1000 / (np.array([150.0, 170.0, 190.0, 220.0]) + 273.2), 100)
    life = -6.0 + 4.3 * inverse + 0.26 * rng.normal(size=400)
    stop = np.repeat(np.log10([8064.0, 5448.0, 1680.0, 528.0]), 100)
    x = (inverse[:, None], np.minimum(life, stop), np.where(life > stop, INF, life))
    assert 0.3 < np.mean(life > stop) < 0.8
    model = Mixture(CensoredRegression(), 1)
    fit = em_fit(model, model.init(jax.random.key(0), x), x, algorithm=squarem(), tol=1e-10)
    found = fit.params.components
    assert fit.converged
    np.testing.assert_allclose(found.coefficients[0, 0], 4.3, atol=0.6)
    np.testing.assert_allclose(found.variance[0], 0.26**2, rtol=0.3)
    plain = em_fit(LINE, LINE.init(jax.random.key(0), x[:2]), x[:2]).params.components
    assert plain.variance[0] < found.variance[0]
    assert plain.coefficients[0, 0] < found.coefficients[0, 0] - 0.3


LINE = Mixture(LinearRegression(), 1)


def test_exact_rows_are_the_plain_families_step_by_step(x64):
    rng = np.random.default_rng(2)
    features, y = rng.normal(size=(40, 2)), rng.normal(size=40) + 3 * (np.arange(40) % 2)
    weights, mean, variance = jnp.array([0.4, 0.6]), jnp.array([0.0, 2.0]), jnp.array([1.0, 2.0])
    line = LinearRegressionParams(coefficients=jnp.ones((2, 2)), intercept=mean, variance=variance)
    for family, own, x, plain, params, data in (
        (
            *(CensoredNormal(), CensoredNormalParams(mean=mean, variance=variance), (y, y)),
            *(Normal("diag"), NormalParams(mean=mean[:, None], covariance=variance[:, None]), y[:, None]),
        ),
        (CensoredRegression(), line, (features, y, y), LinearRegression(), line, (features, y)),
    ):
        fits = [
            em_fit(Mixture(each, 2), MixtureParams(weights=weights, components=start), rows, tol=-1.0, max_steps=12)
            for each, start, rows in ((family, own, x), (plain, params, data))
        ]
        np.testing.assert_allclose(fits[0].history, fits[1].history, rtol=1e-12)
        for a, b in zip(*(jax.tree.leaves(fit.params) for fit in fits), strict=True):
            np.testing.assert_allclose(a, np.reshape(b, a.shape), rtol=1e-10)


def test_missing_and_open_rows_add_nothing(x64):
    rng = np.random.default_rng(3)
    lower, upper = censored(rng.normal(size=30), "all", rng)
    model = Mixture(CensoredNormal(), 1)
    params = MixtureParams(
        weights=jnp.ones(1), components=CensoredNormalParams(mean=jnp.array([0.3]), variance=jnp.array([2.0]))
    )
    alone = e_step(model, params, (lower, upper))
    more = (np.r_[lower, np.nan, -INF], np.r_[upper, np.nan, INF])
    found = e_step(model, params, more)
    np.testing.assert_allclose(found.components.count, 32)
    for a, b in zip(
        jax.tree.leaves(found.components.equations), jax.tree.leaves(alone.components.equations), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-13)
    np.testing.assert_allclose(found.loglik, alone.loglik, rtol=1e-14)
    np.testing.assert_allclose(model.log_prob(params, more)[30:], 0)
    assert np.all(np.isfinite(CensoredNormal().features(more)))
    slope = jax.jit(jax.grad(lambda params: jnp.sum(model.log_prob(params, more))))(params)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(slope))


ONE = Mixture(CensoredNormal(), 1)


@pytest.mark.parametrize(
    ("lower", "upper"),
    [
        (np.linspace(0, 3, 20), np.full(20, INF)),
        (np.full(20, -INF), np.linspace(0, 3, 20)),
        (np.linspace(0, 0.9, 20), np.linspace(1, 2, 20)),
        (np.array([10.0, 10.0]), np.array([INF, INF])),
        (np.array([2.0, 2.0]), np.array([2.0, 2.0])),
    ],
    ids=["right", "left", "a common point", "two rows, right", "two rows, equal"],
)
def test_likelihoods_without_a_maximum_are_degenerate(lower, upper, x64):
    """All open on one side: the mean runs off. A point inside of all intervals, none exact: the variance vanishes."""
    x = (lower, upper)
    fit = em_fit(ONE, ONE.init(jax.random.key(0), x), x)
    assert Status(int(fit.status)) is Status.DEGENERATE
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(fit.params))


def test_held_variance_leaves_a_maximum_in_common_intervals(x64):
    """With the variance held the mean of one interval is its middle; of open ones on one side there is none."""
    held = Mixture(Fixed(CensoredNormal(), {"variance": 1.0}), 1)
    for upper, status in ((3.0, Status.CONVERGED), (INF, Status.DEGENERATE)):
        x = (np.array([1.0, 1.0]), np.array([upper, upper]))
        fit = em_fit(held, held.init(jax.random.key(0), x), x, tol=1e-12)
        assert Status(int(fit.status)) is status
    x = (np.array([1.0, 1.0]), np.array([3.0, 3.0]))
    fit = em_fit(held, held.init(jax.random.key(0), x), x, tol=1e-13)
    np.testing.assert_allclose(fit.params.components.mean, 2, atol=1e-5)


def test_two_rows_are_enough(x64):
    """One exact at 0, one to the right of 1: the maximum, which is where scipy finds it."""
    lower, upper = np.array([0.0, 1.0]), np.array([0.0, INF])
    exact = (np.array([0.0, 1.0, -INF]), np.array([0.0, INF, -1.0]))
    fit = em_fit(ONE, ONE.init(jax.random.key(0), exact), exact, tol=1e-12, max_steps=5000)
    best, line, variance = directly(np.ones((3, 1)), *exact, np.zeros(2))
    np.testing.assert_allclose(fit.objective, best, rtol=1e-9)
    np.testing.assert_allclose(
        [fit.params.components.mean[0], fit.params.components.variance[0]], [line[0], variance], atol=1e-4
    )
    fit = em_fit(ONE, ONE.init(jax.random.key(0), (lower, upper)), (lower, upper), tol=1e-10, max_steps=5000)
    assert np.isfinite(fit.objective)


def test_rows_forty_deviations_away_in_float32():
    """Statistics and slopes are those of float64, and a fit from there comes back."""
    lower = np.array([40.0, -45.0, 38.0, 40.0, -INF, 1e4, 0.5], np.float32)
    upper = np.array([INF, -44.999, 38.5, 40.0, -40.0, INF, 0.5], np.float32)
    params = CensoredNormalParams(mean=jnp.zeros(1), variance=jnp.ones(1))

    @jax.jit
    def look(params, x):
        def total(params):
            logs = CensoredNormal().log_prob(params, x)
            return jnp.sum(logs), logs

        slope, logs = jax.grad(total, has_aux=True)(params)
        return slope, logs, CensoredNormal().stats(params, x, jnp.ones((1, len(lower)), logs.dtype))

    single = look(params, (jnp.asarray(lower), jnp.asarray(upper)))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), params)
        double = look(wide, (jnp.asarray(lower, float), jnp.asarray(upper, float)))
    for a, b in zip(jax.tree.leaves(single), jax.tree.leaves(double), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-5)
    x = (lower[[0, 2, 3, 6]], upper[[0, 2, 3, 6]])
    start = MixtureParams(weights=jnp.ones(1), components=params)
    fit = em_fit(ONE, start, x)
    assert fit.converged
    best, line, variance = directly(np.ones((4, 1)), *(np.asarray(part, float) for part in x), np.array([30.0, 2.0]))
    np.testing.assert_allclose(fit.objective, best, rtol=1e-5)
    np.testing.assert_allclose(fit.params.components.mean[0], line[0], rtol=1e-2)
    np.testing.assert_allclose(fit.params.components.variance[0], variance, rtol=3e-2)


def test_squarem_is_faster_where_most_rows_are_censored(x64):
    rng = np.random.default_rng(5)
    y = rng.normal(size=400)
    x = (np.minimum(y, -1.0), np.where(y > -1.0, INF, y))
    start = ONE.init(jax.random.key(0), x)
    slow = em_fit(ONE, start, x, tol=1e-10, max_steps=5000)
    fast = em_fit(ONE, start, x, tol=1e-10, algorithm=squarem())
    assert slow.converged
    assert fast.converged
    assert 3 * fast.num_passes < slow.num_passes
    np.testing.assert_allclose(fast.objective, slow.objective, atol=1e-7)
    best, line, variance = directly(np.ones((400, 1)), *x, np.array([-1.0, 0.0]))
    np.testing.assert_allclose(fast.objective, best, atol=1e-7)
    np.testing.assert_allclose(fast.params.components.mean[0], line[0], atol=1e-3)
    np.testing.assert_allclose(fast.params.components.variance[0], variance, rtol=1e-3)


def test_chains_of_censored_values(x64):
    """The log-likelihood of a sequence is the sum over all paths of its states."""
    lower, upper = np.array([0.0, 1.0, -INF, 2.0, np.nan, 3.0]), np.array([0.0, INF, 0.5, 2.5, np.nan, 3.0])
    emissions = CensoredNormalParams(mean=jnp.array([0.0, 2.5]), variance=jnp.array([1.0, 0.5]))
    start, moves = np.array([0.7, 0.3]), np.array([[0.8, 0.2], [0.4, 0.6]])
    model = HMM(CensoredNormal(), 2)
    params = HMMParams(initial=jnp.asarray(start), transition=jnp.asarray(moves), emissions=emissions)
    known = [0, 1, 2, 3, 5]
    logs = np.zeros((2, 6))
    for k, (mean, deviation) in enumerate([(0.0, 1.0), (2.5, np.sqrt(0.5))]):
        logs[k, known] = log_density(mean, deviation, lower[known], upper[known])
    paths = itertools.product(range(2), repeat=6)
    total = sum(
        start[path[0]] * np.prod(moves[path[:-1], path[1:]]) * np.exp(sum(logs[k, t] for t, k in enumerate(path)))
        for path in map(np.array, paths)
    )
    np.testing.assert_allclose(model.log_prob(params, (lower, upper)), np.log(total), rtol=1e-10)


def test_samples_are_exact_rows_of_the_components(x64):
    line = LinearRegressionParams(
        coefficients=jnp.array([[1.0], [-1.0]]), intercept=jnp.array([0.0, 5.0]), variance=jnp.array([0.25, 4.0])
    )
    labels = jnp.arange(4000) % 2
    features, lower, upper = CensoredRegression().sample(jax.random.key(0), line, labels, np.ones((4000, 1)))
    assert features.shape == (4000, 1)
    np.testing.assert_array_equal(lower, upper)
    assert st.kstest(np.asarray(lower)[::2], st.norm(1, 0.5).cdf).pvalue > 1e-3
    assert st.kstest(np.asarray(lower)[1::2], st.norm(4, 2).cdf).pvalue > 1e-3


GOOD = np.arange(12.0)


@pytest.mark.parametrize(
    ("family", "x", "error", "message"),
    [
        (CensoredNormal(), GOOD, TypeError, r"x must be \(lower, upper\), 2 arrays; got an array of shape"),
        (CensoredRegression(), (GOOD, GOOD), TypeError, r"x must be \(features, lower, upper\), 3 arrays"),
        (CensoredNormal(), (GOOD, GOOD[:5]), ValueError, r"x\[1\], bounds of the responses, must have shape \(12,\)"),
        (CensoredNormal(), (np.ones((12, 2)), GOOD), ValueError, r"x\[0\], bounds of the responses, must have shape"),
        (
            CensoredRegression(),
            (GOOD, GOOD, GOOD - (GOOD == 7)),
            ValueError,
            r"x\[1\] and x\[2\].*lower <= upper.*row 7",
        ),
        (CensoredNormal(), (np.full(12, INF), np.full(12, INF)), ValueError, "finite number between them"),
        (CensoredNormal(), (GOOD, np.where(GOOD == 3, np.nan, GOOD)), ValueError, "both be NaN.* row 3"),
        (CensoredNormal(), (np.full(12, -INF), np.full(12, INF)), ValueError, "must have a finite one in some row"),
        (CensoredRegression(), (np.where(GOOD == 3, np.nan, GOOD), GOOD, GOOD), ValueError, r"x\[0\] must be finite"),
    ],
)
def test_bad_bounds_are_refused_by_name(family, x, error, message):
    with pytest.raises(error, match=message):
        Mixture(family, 1).check(x)
