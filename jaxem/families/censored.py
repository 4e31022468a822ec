"""Responses of which some are known only to lie in an interval: normal components, and lines with normal noise.

A component is a line with normal noise for both families, which say what differs: `_read`, `_as_line` and `_from_line`;
without features the line is its intercept. Letters: K components, N rows, P features; z = (1, features).
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from .. import capabilities, checks, numerics, parameters, tree
from ..protocols import Data, Params
from ..record import record
from . import columns, design
from .linear_regression import LinearRegression, LinearRegressionParams, LinearRegressionStats, expected_stats


@record
class CensoredNormalParams:
    """mean (K,) and variance (K,)."""

    mean: jax.Array
    variance: jax.Array


@record
class CensoredStats:
    """Expected normal equations of the responses, were they seen; additive.

    count: (K,), sum r.
    kinds: (K, 3), sum r over rows that are bounded from below, bounded from above, and observed exactly.
    certainty: (K,), sum r log p over rows that are censored.
    base: (K,), sum r times the entropy of the response given its interval, by which E[log p] falls short of log p.
    equations: of all rows that tell anything, about the current line.
    """

    count: jax.Array
    kinds: jax.Array
    certainty: jax.Array
    base: jax.Array
    equations: LinearRegressionStats


@record
class _Rows:
    """z of the rows, (P + 1, N), and bounds of their responses (N,), infinite where open and where one is missing."""

    matrix: jax.Array
    lower: jax.Array
    upper: jax.Array

    @property
    def exact(self) -> jax.Array:
        """Which rows (N,) are observed exactly."""
        return self.lower == self.upper

    @property
    def known(self) -> jax.Array:
        """Of all rows, whether they are bounded from below, and from above: (2, N)."""
        return jnp.stack([self.lower > -jnp.inf, self.upper < jnp.inf])

    @property
    def tell(self) -> jax.Array:
        """Which rows (N,) say anything of their response."""
        return jnp.any(self.known, axis=0)

    @property
    def points(self) -> jax.Array:
        """What may stand for the responses (N,): the middle of the interval, its one end, or 0."""
        lower, upper = jnp.where(self.known, jnp.stack([self.lower, self.upper]), 0)
        return (lower + upper) * jnp.where(jnp.all(self.known, axis=0), 0.5, 1)


@record
class _Expected:
    """Of every row under every component (K, N): log p, E[e], E[e²], E[response²], and what E[log p] falls short by."""

    log_prob: jax.Array
    residual: jax.Array
    square: jax.Array
    energy: jax.Array
    base: jax.Array


def _expected(line: LinearRegressionParams, rows: _Rows) -> _Expected:
    predicted, exact = design.predict(line, rows.matrix), rows.exact[None]
    variance = line.variance[:, None]
    deviation = jnp.sqrt(variance)
    below, above = rows.known & ~exact

    def bound(values: jax.Array, known: jax.Array, instead: float) -> jax.Array:
        return jnp.where(known[None], (jnp.where(known, values, 0)[None] - predicted) / deviation, instead)

    finite = below & above
    width = jnp.where(finite, jnp.where(finite, rows.upper, 0) - jnp.where(finite, rows.lower, 0), 1)[None]
    inside = numerics.truncated_normal(
        bound(rows.lower, below, -jnp.inf),
        bound(rows.upper, above, jnp.inf),
        # Of close bounds the difference is known better than are both in standard deviations.
        jnp.where(finite[None], width / deviation, jnp.inf),
    )
    off = jnp.where(exact, rows.points[None] - predicted, 0)
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
    rows = family._read(x)
    points, one = rows.points, jnp.ones(1, rows.lower.dtype)
    weights = jnp.where(rows.tell, one if weights is None else weights.astype(one.dtype), 0)[None]
    none = jnp.zeros((1, len(rows.matrix) - 1), one.dtype)
    line = LinearRegressionParams(coefficients=none, intercept=0 * one, variance=one)
    plain = LinearRegression()
    for _ in range(2):
        off = points[None] - design.predict(line, rows.matrix)
        stats = expected_stats(line, rows.matrix, weights, off, jnp.square(off), jnp.square(points)[None])
        line = plain.m_step(stats)
    # Where no point lies off the line, the responses' own size is the only scale that there is.
    size = stats.energy / stats.count
    some = jnp.where(size > 0, 0.01 * size, 1)
    line = dataclasses.replace(line, variance=jnp.where(plain.degenerate(stats), some, line.variance))
    return family._from_line(jax.tree.map(lambda leaf: jnp.repeat(leaf, num_components, axis=0), line))


def _log_prob(family: "_Censored", params: Params, x: Data) -> jax.Array:
    """Log-density of rows that are observed exactly, log-probability of all others, under every component: (K, N)."""
    return _expected(family._as_line(params), family._read(x)).log_prob


def _stats(family: "_Censored", params: Params, x: Data, responsibilities: jax.Array) -> CensoredStats:
    """Expected normal equations: responsibilities (K, N)."""
    line, rows = family._as_line(params), family._read(x)
    found = _expected(line, rows)
    kinds = jnp.concatenate([rows.known, rows.exact[None]]).astype(responsibilities.dtype)
    telling = jnp.where(rows.tell[None], responsibilities, 0)
    censored = jnp.where(rows.exact[None], 0, telling)
    return CensoredStats(
        count=jnp.sum(responsibilities, axis=1) + columns.PSEUDO_COUNT,
        kinds=columns.sums(responsibilities, kinds),
        certainty=jnp.sum(censored * found.log_prob, axis=1),
        base=jnp.sum(responsibilities * found.base, axis=1),
        equations=expected_stats(line, rows.matrix, telling, found.residual, found.square, found.energy),
    )


def _regression(family: "_Censored") -> LinearRegression:
    """The family of the responses, were they seen."""
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
    """Components (K,) without rows that tell anything, or whose likelihood has no finite maximum.

    Such is that of rows which are all open on the same side; of rows which all lie on their component's line; and of
    rows of which none is exact and each has its component's line in its interval: these are the surer, the smaller
    the variance. So they are if their log-probabilities sum to more than -log 2: all are then above one half.
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
    helps. Rows that do not tell of a maximum, as if all are open on the same side, make a fit DEGENERATE.
    Dempster, Laird & Rubin (1977), section 4.2; Wolynetz (1979), Algorithm AS 138, Applied Statistics 28.
    """

    prior: CensoredStats | None = dataclasses.field(default=None, kw_only=True)

    separable = shareable = ("variance",)
    supports: ClassVar[parameters.Supports] = {"variance": parameters.at_least_zero}
    collapses = True

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
        return _stand_ins(self._read(x))

    def sample(self, key: jax.Array, params: CensoredNormalParams, labels: jax.Array) -> Data:
        """Values from the component that each label (N,) names, observed exactly: (lower (N,), upper (N,))."""
        noise = jax.random.normal(key, labels.shape, params.mean.dtype)
        values = params.mean[labels] + jnp.sqrt(params.variance)[labels] * noise
        return values, values

    def check(self, x: Data, name: str = "x") -> None:
        lower, upper = _named(x, ("lower", "upper"), name)
        _check_bounds(lower, upper)

    def _read(self, x: Data) -> _Rows:
        (_, lower), (_, upper) = _named(x, ("lower", "upper"))
        lower, upper = _bounds(lower, upper, tree.float_dtype(x))
        return _Rows(matrix=jnp.ones_like(lower)[None], lower=lower, upper=upper)

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
    collapses = True

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
        rows = self._read(x)
        return jnp.concatenate([rows.matrix[1:].T, _stand_ins(rows)], axis=1)

    def sample(
        self, key: jax.Array, params: LinearRegressionParams, labels: jax.Array, features: jax.Array | None = None
    ) -> Data:
        """Responses for given features (N, P), from the components that the labels (N,) name, observed exactly."""
        features, response = LinearRegression().sample(key, params, labels, features)
        return features, response, response

    def check(self, x: Data, name: str = "x") -> None:
        (of, features), lower, upper = _named(x, ("features", "lower", "upper"), name)
        rows = checks.columns(of, features).shape[0]
        design.check_features(of, features, tree.float_dtype(x))
        _check_bounds(lower, upper, rows)

    def _read(self, x: Data) -> _Rows:
        (_, features), (_, lower), (_, upper) = _named(x, ("features", "lower", "upper"))
        dtype = tree.float_dtype(x)
        lower, upper = _bounds(lower, upper, dtype)
        return _Rows(matrix=design.matrix(features, dtype), lower=lower, upper=upper)

    def _as_line(self, params: LinearRegressionParams) -> LinearRegressionParams:
        return params

    _from_line = _as_line


_Censored = CensoredNormal | CensoredRegression


def _named(x: Data, parts: tuple[str, ...], name: str = "x") -> list[tuple[str, jax.Array]]:
    """The arrays of the data, each with how it is called in messages; TypeError where the data are of another form."""
    if not isinstance(x, (tuple, list)) or len(x) != len(parts):
        raise TypeError(f"{name} must be ({', '.join(parts)}), {len(parts)} arrays; got {checks.told(x)}")
    return [(f"{name}[{place}]", array) for place, array in enumerate(x)]


def _bounds(lower: jax.Array, upper: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Bounds (N,) in a floating dtype, infinite where a row is missing."""
    lower, upper = jnp.asarray(lower, dtype).reshape(-1), jnp.asarray(upper, dtype).reshape(-1)
    missing = jnp.isnan(lower) | jnp.isnan(upper)
    return jnp.where(missing, -jnp.inf, lower), jnp.where(missing, jnp.inf, upper)


def _stand_ins(rows: _Rows) -> jax.Array:
    """Points (N, 1) for the responses; where nothing is known of one, the mean of the others."""
    return columns.filled(jnp.where(rows.tell, rows.points, jnp.nan)[:, None], rows.lower.dtype)


def _check_bounds(lower: tuple[str, jax.Array], upper: tuple[str, jax.Array], rows: int | None = None) -> None:
    """Refuse eagerly bounds that are not (N,) each, out of order, or infinite on the wrong side."""
    for name, values in (lower, upper):
        shape = checks.row_shape(name, values)
        rows = shape[0] if rows is None else rows
        if shape != (rows, 1):
            raise ValueError(f"{name}, bounds of the responses, must have shape ({rows},); got {jnp.shape(values)}")
    if not checks.is_concrete(lower, upper):
        return
    (name, low), (_, high) = [(name, np.asarray(values, float).reshape(-1)) for name, values in (lower, upper)]
    half = np.isnan(low) != np.isnan(high)
    if np.any(half):
        raise ValueError(
            f"{name} and {upper[0]}, the bounds of a response, must both be NaN where it is missing; in row "
            f"{np.argmax(half)} one of them is. A bound that is not there is -inf or inf"
        )
    wrong = (low > high) | (low == np.inf) | (high == -np.inf)
    if np.any(wrong):
        row = np.argmax(wrong)
        raise ValueError(
            f"{name} and {upper[0]}, the bounds of a response, must be in order, lower <= upper, with a finite number "
            f"between them; got {low[row]:g} and {high[row]:g} in row {row}"
        )
    if not np.any(np.isfinite(low) | np.isfinite(high)):
        checks.some_observed(f"{name} and {upper[0]}, the bounds of responses, must have a finite one in some row")
