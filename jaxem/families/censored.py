"""Responses of which some are known only to lie in an interval: normal components, and lines with normal noise.

A component is a line with normal noise for both families, which say what differs: `_read`, `_as_line` and `_from_line`;
without features the line is its intercept. Letters: K components, N rows, P features; z = (1, features).
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from .. import capabilities, checks, numerics, parameters, tree
from ..protocols import Data, Params
from ..record import record
from . import bounds, columns, design
from .bounds import Bounds
from .linear_equation import EquationStats
from .linear_regression import LinearRegression, LinearRegressionParams, expected_stats


@record
class CensoredNormalParams:
    """Parameters of K normal components.

    mean: (K,), m.
    variance: (K,), s².
    """

    mean: jax.Array
    variance: jax.Array


@record
class CensoredStats:
    """Expected normal equations of the latent responses, additive over rows.

    count: (K,), sum r.
    kinds: (K, 3), sum r over rows that are bounded from below, bounded from above, and observed exactly.
    certainty: (K,), sum r log p over rows that are censored.
    base: (K,), sum r times the entropy of the response given its interval, by which E[log p] falls short of log p.
    equations: of all rows with a finite bound, about the current line.
    """

    count: jax.Array
    kinds: jax.Array
    certainty: jax.Array
    base: jax.Array
    equations: EquationStats


@record
class _Expected:
    """Conditional moments of every row under every component, (K, N) each; e = response - line.

    log_prob: log p.
    residual: E[e].
    square: E[e²].
    energy: E[response²].
    base: entropy of the response given its interval, by which E[log p] falls short of log p.
    """

    log_prob: jax.Array
    residual: jax.Array
    square: jax.Array
    energy: jax.Array
    base: jax.Array


def _expected(line: LinearRegressionParams, matrix: jax.Array, response: Bounds) -> _Expected:
    predicted, exact = design.predict(line, matrix), response.exact[None]
    variance = line.variance[:, None]
    deviation = jnp.sqrt(variance)
    below, above = response.below & ~response.exact, response.above & ~response.exact

    def bound(values: jax.Array, known: jax.Array, instead: float) -> jax.Array:
        return jnp.where(known[None], (jnp.where(known, values, 0)[None] - predicted) / deviation, instead)

    finite = below & above
    width = jnp.where(finite, jnp.where(finite, response.upper, 0) - jnp.where(finite, response.lower, 0), 1)[None]
    inside = numerics.truncated_normal(
        bound(response.lower, below, -jnp.inf),
        bound(response.upper, above, jnp.inf),
        # The width of a narrow interval is more accurate than the difference of its standardised bounds.
        jnp.where(finite[None], width / deviation, jnp.inf),
    )
    off = jnp.where(exact, response.points[None] - predicted, 0)
    density = -0.5 * (jnp.log(2 * math.pi * variance) + jnp.square(off) / variance)
    censored = (below | above)[None]
    residual = jnp.where(censored, deviation * inside.mean, off)
    square = jnp.where(censored, variance * (jnp.square(inside.mean) + inside.variance), jnp.square(off))
    return _Expected(
        log_prob=jnp.where(exact, density, jnp.where(censored, inside.log_mass, 0)),
        residual=residual,
        square=square,
        energy=jnp.square(predicted) + 2 * predicted * residual + square,
        base=jnp.where(censored, inside.entropy + 0.5 * jnp.log(variance), 0),
    )


def _pooled(family: "_Censored", x: Data, weights: jax.Array | None, num_components: int) -> Params:
    """Least squares through the points that stand for the responses, in every component."""
    matrix, response = family._read(x)
    points, one = response.points, jnp.ones(1, matrix.dtype)
    weights = jnp.where(response.tell, one if weights is None else weights.astype(one.dtype), 0)[None]
    none = jnp.zeros((1, len(matrix) - 1), one.dtype)
    line = LinearRegressionParams(coefficients=none, intercept=0 * one, variance=one)
    plain = LinearRegression()
    energy = columns.sums(weights, jnp.square(points)[None])
    for _ in range(2):
        off = points[None] - design.predict(line, matrix)
        stats = expected_stats(line, matrix, weights, off, jnp.square(off), energy)
        line = plain.m_step(stats)
    # Where no point lies off the line, the responses' own size is the only scale that there is.
    size = energy[:, 0] / stats.count
    some = jnp.where(size > 0, 0.01 * size, 1)
    line = dataclasses.replace(line, variance=jnp.where(plain.degenerate(stats), some, line.variance))
    return family._from_line(jax.tree.map(lambda leaf: jnp.repeat(leaf, num_components, axis=0), line))


def _log_prob(family: "_Censored", params: Params, x: Data) -> jax.Array:
    """Log-density of rows that are observed exactly, log-probability of all others, under every component: (K, N)."""
    return _expected(family._as_line(params), *family._read(x)).log_prob


def _stats(family: "_Censored", params: Params, x: Data, responsibilities: jax.Array) -> CensoredStats:
    """Expected normal equations: responsibilities (K, N)."""
    line, (matrix, response) = family._as_line(params), family._read(x)
    found = _expected(line, matrix, response)
    kinds = [jnp.where(kind[None], responsibilities, 0) for kind in (response.below, response.above, response.exact)]
    telling = jnp.where(response.tell[None], responsibilities, 0)
    censored = jnp.where(response.exact[None], 0, telling)
    energy = jnp.sum(telling * found.energy, axis=1, keepdims=True)
    return CensoredStats(
        count=jnp.sum(responsibilities, axis=1) + columns.PSEUDO_COUNT,
        kinds=jnp.stack([jnp.sum(kind, axis=1) for kind in kinds], axis=1),
        certainty=jnp.sum(censored * found.log_prob, axis=1),
        base=jnp.sum(responsibilities * found.base, axis=1),
        equations=expected_stats(line, matrix, telling, found.residual, found.square, energy),
    )


def _regression(family: "_Censored") -> LinearRegression:
    """The family of the latent responses."""
    return LinearRegression(prior=None if family.prior is None else family.prior.equations)


def _m_step(family: "_Censored", stats: CensoredStats) -> Params:
    """Least squares, and the mean squared residual, both expected."""
    return family._from_line(_regression(family).m_step(stats.equations))


def _share(family: "_Censored", stats: CensoredStats, name: str, params: Params) -> jax.Array:
    """The mean squared residual of all rows, each about its own component's line."""
    return _regression(family).share(stats.equations, name, family._as_line(params))


def _q_function(family: "_Censored", params: Params, stats: CensoredStats) -> jax.Array:
    """E[log p(response)] + entropy: a bound of log p, tight at the parameters that the statistics were made with."""
    return _regression(family).q_function(family._as_line(params), stats.equations) + jnp.sum(stats.base)


def _log_prior(family: "_Censored", params: Params) -> jax.Array:
    """Q of the pseudo-statistics; up to a constant."""
    return _regression(family).log_prior(family._as_line(params))


def _rebase(family: "_Censored", stats: CensoredStats, params: Params) -> CensoredStats:
    """The same statistics about the lines of `params`, exactly."""
    equations = _regression(family).rebase(stats.equations, family._as_line(params))
    return dataclasses.replace(stats, equations=equations)


def _degenerate(family: "_Censored", stats: CensoredStats, held: tuple[str, ...] = ()) -> jax.Array:
    """Components (K,) without rows that have a finite bound, or whose likelihood has no finite maximum.

    Without a prior it has none in three cases. All rows are open on the same side: the mean diverges to that side. All
    exact rows lie on one line. No row is exact, and every interval contains its component's line: the smaller the
    variance, the larger all probabilities. This last case is found by log-probabilities that sum to more than -log 2,
    as each probability is then above one half.
    """
    dead = _regression(family).degenerate(stats.equations, held)
    if family.prior is not None:
        return dead
    below, above, exact = stats.kinds.T
    nothing = jnp.finfo(stats.count.dtype).eps * stats.equations.count
    dead = dead | (below <= nothing) | (above <= nothing)
    return dead if "variance" in held else dead | (exact <= nothing) & (stats.certainty > -math.log(2))


def _num_parameters(family: "_Censored", params: Params) -> int:
    return tree.size(params)


def _floats_per_row(family: "_Censored", params: Params) -> int:
    # The nodes of the integrals take most of the room.
    count = params.variance.size
    return 30 * count + (tree.size(params) // count - 1) ** 2


def _unconstrain(family: "_Censored", params: Params) -> Params:
    return dataclasses.replace(params, variance=jnp.log(params.variance))


def _constrain(family: "_Censored", theta: Params) -> Params:
    return dataclasses.replace(theta, variance=jnp.exp(theta.variance))


@capabilities.completed("part")
@record(kw_only=False)
class CensoredNormal:
    """Normal components of values that may be known only to lie in an interval.

    log p(x|k) = log normal density at x where lower = upper = x, and else log(Phi((upper - m_k) / s_k) -
    Phi((lower - m_k) / s_k)): a likelihood of densities for exact rows, and of probabilities for censored ones.
    Data: a pair (lower (N,), upper (N,)), equal where observed exactly; -inf or inf where open: (c, inf) is
    right-censored at c. (-inf, inf), or NaN in both, is a missing row, which adds nothing. prior: pseudo-statistics, as
    `pseudo_rows` makes them. For several columns put one of these a column into a `Product`.

    The E-step is exact: moments of truncated normal distributions. The more is censored, the slower EM is: `squarem`
    helps. Where the likelihood has no maximum, as where all rows are open on the same side, a fit is DEGENERATE.
    Dempster, Laird & Rubin (1977), section 4.2; Wolynetz (1979), Algorithm AS 138, Applied Statistics 28.
    """

    prior: CensoredStats | None = dataclasses.field(default=None, kw_only=True)

    separable = shareable = ("variance",)
    supports: ClassVar[parameters.Supports] = {"variance": parameters.at_least_zero}

    pooled = _pooled
    log_prob = _log_prob
    stats = _stats
    m_step = _m_step
    share = _share
    q_function = _q_function
    log_prior = _log_prior
    rebase = _rebase
    degenerate = _degenerate
    num_parameters = _num_parameters
    floats_per_row = _floats_per_row
    unconstrain = _unconstrain
    constrain = _constrain

    def features(self, x: Data) -> jax.Array:
        """Middles of the intervals, or their finite ends (N, 1): points for seeding."""
        return self._read(x)[1].features

    def sample(self, key: jax.Array, params: CensoredNormalParams, labels: jax.Array) -> Data:
        """Values from the component that each label (N,) names, observed exactly: (lower (N,), upper (N,))."""
        noise = jax.random.normal(key, labels.shape, params.mean.dtype)
        values = params.mean[labels] + jnp.sqrt(params.variance)[labels] * noise
        return values, values

    def check(self, x: Data, name: str = "x") -> None:
        lower, upper = bounds.named(x, ("lower", "upper"), name)
        bounds.check(lower, upper)

    def _read(self, x: Data) -> tuple[jax.Array, Bounds]:
        (_, lower), (_, upper) = bounds.named(x, ("lower", "upper"))
        values = bounds.read(lower, upper, tree.float_dtype(x))
        return jnp.ones_like(values.lower)[None], values

    def _as_line(self, params: CensoredNormalParams) -> LinearRegressionParams:
        none = jnp.zeros((*params.mean.shape, 0), params.mean.dtype)
        return LinearRegressionParams(coefficients=none, intercept=params.mean, variance=params.variance)

    def _from_line(self, line: LinearRegressionParams) -> CensoredNormalParams:
        return CensoredNormalParams(mean=line.intercept, variance=line.variance)


@capabilities.completed("part")
@record(kw_only=False)
class CensoredRegression:
    """A line a component, with normal noise, of responses that may be known only to lie in an interval.

    log p(y|f,k) as for a `CensoredNormal` with the mean b_k + f·c_k. Data: a triple (features (N, P) or (N,), lower
    (N,), upper (N,)), nothing missing among the features; the bounds, and prior, as there. Parameters are
    `LinearRegressionParams`.
    The tobit model of econometrics, and the log-normal model of failure times once these are in logarithms.
    Tobin (1958), Econometrica 26; Schmee & Hahn (1979), Technometrics 21; Aitkin (1981), Technometrics 23, where it is
    EM; Wolynetz (1979), Algorithm AS 139, Applied Statistics 28.
    """

    prior: CensoredStats | None = dataclasses.field(default=None, kw_only=True)

    separable = shareable = ("variance",)
    supports: ClassVar[parameters.Supports] = {"variance": parameters.at_least_zero}

    pooled = _pooled
    log_prob = _log_prob
    stats = _stats
    m_step = _m_step
    share = _share
    q_function = _q_function
    log_prior = _log_prior
    rebase = _rebase
    degenerate = _degenerate
    num_parameters = _num_parameters
    floats_per_row = _floats_per_row
    unconstrain = _unconstrain
    constrain = _constrain

    def features(self, x: Data) -> jax.Array:
        """Features, and middles of the intervals or their finite ends, side by side (N, P + 1): points for seeding."""
        matrix, response = self._read(x)
        return jnp.concatenate([matrix[1:].T, response.features], axis=1)

    def sample(
        self, key: jax.Array, params: LinearRegressionParams, labels: jax.Array, features: jax.Array | None = None
    ) -> Data:
        """Responses for given features (N, P), from the components that the labels (N,) name, observed exactly."""
        features, response = LinearRegression().sample(key, params, labels, features)
        return features, response, response

    def check(self, x: Data, name: str = "x") -> None:
        (of, features), lower, upper = bounds.named(x, ("features", "lower", "upper"), name)
        rows = checks.columns(of, features).shape[0]
        design.check_features(of, features, tree.float_dtype(x))
        bounds.check(lower, upper, rows)

    def _read(self, x: Data) -> tuple[jax.Array, Bounds]:
        (_, features), (_, lower), (_, upper) = bounds.named(x, ("features", "lower", "upper"))
        dtype = tree.float_dtype(x)
        return design.matrix(features, dtype), bounds.read(lower, upper, dtype)

    def _as_line(self, params: LinearRegressionParams) -> LinearRegressionParams:
        return params

    _from_line = _as_line


_Censored = CensoredNormal | CensoredRegression
