"""Regressions: the distribution of a response given features, a regression a component.

A row is a pair (features, response). Statistics are taken about the current coefficients, so that an
M-step solves for a correction: what rounding a solution carries, the next step removes.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from .. import checks, numerics, tree
from ..protocols import Data
from ..record import record
from . import columns


@record
class LinearRegressionParams:
    """coefficients (K, P); intercept (K,); variance (K,) of the response about its line."""

    coefficients: jax.Array
    intercept: jax.Array
    variance: jax.Array


@record
class LinearRegressionStats:
    """Normal equations about the current line, with z = (1, features), e = response - prediction; additive.

    count (K,) = sum r; reference (K, P + 1) = count (intercept, coefficients); gram (K, P + 1, P + 1)
    = sum r zzᵀ; cross (K, P + 1) = sum r z e; square (K,) = sum r e²; energy (K,) = sum r response².
    """

    count: jax.Array
    reference: jax.Array
    gram: jax.Array
    cross: jax.Array
    square: jax.Array
    energy: jax.Array


@record(kw_only=False)
class LinearRegression:
    """log p(y|f,k) = -(log 2 pi v_k + (y - b_k - f·c_k)² / v_k) / 2: least squares, weighted.

    Data: a pair (features (N, P) or (N,), response (N,)), nothing missing. prior: pseudo-statistics, as
    `pseudo_rows` makes them. DeSarbo & Cron (1988), A maximum likelihood methodology for clusterwise
    linear regression, J. Classification 5.
    """

    prior: LinearRegressionStats | None = dataclasses.field(default=None, kw_only=True)

    separable = shareable = ("variance",)

    def init(self, x: Data, weights: jax.Array | None, num_components: int) -> LinearRegressionParams:
        design, _ = _read(x)
        one = jnp.ones(1, design.dtype)
        flat = LinearRegressionParams(
            coefficients=jnp.zeros((1, design.shape[0] - 1), design.dtype), intercept=0 * one, variance=one
        )
        return columns.pooled(self, flat, x, weights, num_components)

    def features(self, x: Data) -> jax.Array:
        return _points(x)

    def log_prob(self, params: LinearRegressionParams, x: Data) -> jax.Array:
        """Log-density of every response under every component: (K, N)."""
        design, response = _read(x)
        residual = response - _predict(params, design)
        variance = params.variance[:, None]
        return -0.5 * (jnp.log(2 * math.pi * variance) + jnp.square(residual) / variance)

    def stats(self, params: LinearRegressionParams, x: Data, responsibilities: jax.Array) -> LinearRegressionStats:
        """Weighted normal equations: responsibilities (K, N)."""
        design, response = _read(x)
        residual = response - _predict(params, design)
        count = jnp.sum(responsibilities, axis=1) + columns.PSEUDO_COUNT
        weighted = responsibilities * residual
        return LinearRegressionStats(
            count=count,
            reference=count[:, None] * _line(params),
            gram=_gram(responsibilities, design),
            cross=columns.sums(weighted, design),
            square=jnp.sum(weighted * residual, axis=1) + columns.PSEUDO_COUNT * params.variance,
            energy=columns.sums(responsibilities, jnp.square(response)[None])[:, 0],
        )

    def m_step(self, stats: LinearRegressionStats) -> LinearRegressionParams:
        """Weighted least squares, and the mean squared residual."""
        return self._estimate(stats)[0]

    def share(self, stats: LinearRegressionStats, name: str) -> jax.Array:
        """The mean squared residual of all rows, each about its own component's line."""
        return jnp.sum(stats.count * self.m_step(stats).variance) / jnp.sum(stats.count)

    def q_function(self, params: LinearRegressionParams, stats: LinearRegressionStats) -> jax.Array:
        """Expected complete-data log-likelihood of the responses."""
        square = self.rebase(stats, params).square
        return -0.5 * jnp.sum(stats.count * jnp.log(2 * math.pi * params.variance) + square / params.variance)

    def log_prior(self, params: LinearRegressionParams) -> jax.Array:
        """Q of the pseudo-statistics; up to a constant."""
        return jnp.zeros((), params.variance.dtype) if self.prior is None else self.q_function(params, self.prior)

    def rebase(self, stats: LinearRegressionStats, params: LinearRegressionParams) -> LinearRegressionStats:
        """The same statistics about the lines of `params`, exactly."""
        delta = _line(params) - stats.reference / stats.count[:, None]
        moved = jnp.sum(stats.gram * delta[:, None, :], axis=-1)
        return dataclasses.replace(
            stats,
            reference=stats.count[:, None] * _line(params),
            cross=stats.cross - moved,
            square=stats.square - jnp.sum((2 * stats.cross - moved) * delta, axis=-1),
        )

    def degenerate(self, stats: LinearRegressionStats) -> jax.Array:
        """Components (K,) without rows, or whose line passes through all of them."""
        return columns.empty(stats.count) | self._estimate(stats)[1]

    def sample(
        self, key: jax.Array, params: LinearRegressionParams, labels: jax.Array, features: jax.Array | None = None
    ) -> Data:
        """Responses for given features (N, P), from the components that the labels (N,) name: (features, response)."""
        design = _given(features, params.variance.dtype)
        mean = _at(params, design, labels)
        noise = jax.random.normal(key, mean.shape, mean.dtype)
        return features, mean + jnp.sqrt(params.variance)[labels] * noise

    def num_parameters(self, params: LinearRegressionParams) -> int:
        return tree.size(params)

    def floats_per_row(self, params: LinearRegressionParams) -> int:
        return 3 * params.variance.size + (params.coefficients.shape[1] + 1) ** 2

    def unconstrain(self, params: LinearRegressionParams) -> LinearRegressionParams:
        return dataclasses.replace(params, variance=jnp.log(params.variance))

    def constrain(self, theta: LinearRegressionParams) -> LinearRegressionParams:
        return dataclasses.replace(theta, variance=jnp.exp(theta.variance))

    def check(self, x: Data, name: str = "x") -> None:
        _check(x, name)

    def _estimate(self, stats: LinearRegressionStats) -> tuple[LinearRegressionParams, jax.Array]:
        """M-step, and which components (K,) needed the variance's floor."""
        line = stats.reference / stats.count[:, None]
        if self.prior is not None:
            at = LinearRegressionParams(coefficients=line[:, 1:], intercept=line[:, 0], variance=stats.square)
            stats = columns.with_prior(self.rebase(self.prior, at), stats)
        delta = _solve(stats.gram, stats.cross)
        moved = jnp.sum(stats.gram * delta[:, None, :], axis=-1)
        variance = (stats.square - jnp.sum((2 * stats.cross - moved) * delta, axis=-1)) / stats.count
        eps = jnp.finfo(variance.dtype).eps
        energy = jnp.sum(stats.energy) / jnp.sum(stats.count)
        # What rounding hides: of the responses, and of the residuals that the estimate is taken from.
        lowest = jnp.maximum(
            jnp.where(energy > 0, eps**2 * energy, eps**2), 64 * delta.shape[1] * eps * stats.square / stats.count
        )
        line = line + delta
        estimate = LinearRegressionParams(
            coefficients=line[:, 1:], intercept=line[:, 0], variance=jnp.maximum(variance, lowest)
        )
        return estimate, variance < lowest


@record
class RegressionParams:
    """coefficients (K, P) and intercept (K,) of the linear predictor."""

    coefficients: jax.Array
    intercept: jax.Array


@record
class RegressionStats:
    """A quadratic lower bound of the expected log-likelihood about the current line; additive.

    count (K,) = sum r; reference (K, P + 1) = count (intercept, coefficients); gram (K, P + 1, P + 1):
    its curvature; cross (K, P + 1): the score; base (K,): the log-likelihood at the current line;
    reach (P + 1,): sum over rows of z⁸, which bounds the largest z.
    """

    count: jax.Array
    reference: jax.Array
    gram: jax.Array
    cross: jax.Array
    base: jax.Array
    reach: jax.Array


@record(kw_only=False)
class LogisticRegression:
    """log p(y|f,k) = y eta - log(1 + exp(eta)), eta = b_k + f·c_k: binary responses.

    M-step: one iteratively reweighted least-squares solution with the weights tanh(eta/2) / (2 eta) of
    the Polya-Gamma latents, whose quadratic bound touches the log-likelihood at the current line, so
    that every step is monotone. ridge: precision of a normal prior, mean 0, on the coefficients (not on
    the intercept). Data: a pair (features (N, P) or (N,), response (N,) of 0 and 1), nothing missing.
    Jaakkola & Jordan (2000), Statistics and Computing 10; Polson, Scott & Windle (2013), JASA 108.
    """

    ridge: jax.Array | float = dataclasses.field(default=0.0, kw_only=True)

    separable = ()
    # A start is an M-step carried on: one solution of a quadratic bound is not yet the maximum.
    start_passes = 15

    def init(self, x: Data, weights: jax.Array | None, num_components: int) -> RegressionParams:
        return _start(self, x, weights, num_components, jax.scipy.special.logit)

    def features(self, x: Data) -> jax.Array:
        return _points(x)

    def log_prob(self, params: RegressionParams, x: Data) -> jax.Array:
        """Log-probability of every response under every component: (K, N)."""
        design, response = _read(x)
        return _log_logistic(_predict(params, design), response)

    def stats(self, params: RegressionParams, x: Data, responsibilities: jax.Array) -> RegressionStats:
        """Score and curvature: responsibilities (K, N)."""
        design, response = _read(x)
        eta = _predict(params, design)
        small = jnp.abs(eta) < 1e-3
        weight = jnp.where(small, 0.25 - eta**2 / 48, jnp.tanh(eta / 2) / (2 * jnp.where(small, 1, eta)))
        score = response - 0.5 - weight * eta
        return _bound(params, design, responsibilities, score, weight, _log_logistic(eta, response))

    def m_step(self, stats: RegressionStats) -> RegressionParams:
        """The maximum of the bound: gram⁻¹ cross from the current line."""
        line, delta = _newton(stats, self.ridge)
        return _from_line(line + delta)

    def q_function(self, params: RegressionParams, stats: RegressionStats) -> jax.Array:
        """The bound: base + cross·delta - delta·gram·delta / 2, delta from the line it was made at."""
        return _quadratic(params, stats)

    def log_prior(self, params: RegressionParams) -> jax.Array:
        return _ridge(params, self.ridge)

    def degenerate(self, stats: RegressionStats) -> jax.Array:
        return columns.empty(stats.count)

    def sample(
        self, key: jax.Array, params: RegressionParams, labels: jax.Array, features: jax.Array | None = None
    ) -> Data:
        """Responses for given features (N, P), from the components that the labels (N,) name: (features, response)."""
        eta = _at(params, _given(features, params.intercept.dtype), labels)
        return features, jax.random.bernoulli(key, jax.nn.sigmoid(eta)).astype(eta.dtype)

    def num_parameters(self, params: RegressionParams) -> int:
        return tree.size(params)

    def floats_per_row(self, params: RegressionParams) -> int:
        return 5 * params.intercept.size + (params.coefficients.shape[1] + 1) ** 2

    def unconstrain(self, params: RegressionParams) -> RegressionParams:
        return params

    def constrain(self, theta: RegressionParams) -> RegressionParams:
        return theta

    def check(self, x: Data, name: str = "x") -> None:
        _check(x, name)
        columns.check(f"{name}[1]", x[1], lambda v: (v == 0) | (v == 1), "0 or 1", missing=False)


@record(kw_only=False)
class PoissonRegression:
    """log p(y|f,k) = y eta - exp(eta) - log y!, eta = b_k + f·c_k: counts.

    M-step: a Newton step (weighted least squares with weights exp(eta)) with its curvature raised by
    2 (e - 2) = 1.44, which bounds the log-likelihood from below while no row's eta moves by more than
    1; a longer step is shortened to that, so that every step is monotone. ridge: precision of a normal
    prior, mean 0, on the coefficients (not on the intercept). Data: a pair (features (N, P) or (N,),
    response (N,) of whole numbers), nothing missing. Features of about unit scale converge fastest.
    McCullagh & Nelder, Generalized Linear Models, section 2.5; Wedel et al. (1993), J. Applied Econometrics 8.
    """

    ridge: jax.Array | float = dataclasses.field(default=0.0, kw_only=True)

    separable = ()
    start_passes = 15

    def init(self, x: Data, weights: jax.Array | None, num_components: int) -> RegressionParams:
        return _start(self, x, weights, num_components, jnp.log)

    def features(self, x: Data) -> jax.Array:
        design, response = _read(x)
        return jnp.concatenate([design[1:], jnp.log1p(response)[None]]).T

    def log_prob(self, params: RegressionParams, x: Data) -> jax.Array:
        """Log-probability of every response under every component: (K, N)."""
        design, response = _read(x)
        return _log_poisson(_predict(params, design), response)

    def stats(self, params: RegressionParams, x: Data, responsibilities: jax.Array) -> RegressionStats:
        """Score and curvature: responsibilities (K, N)."""
        design, response = _read(x)
        eta = _predict(params, design)
        rate = jnp.exp(eta)
        raised = 2 * (math.e - 2) * rate
        return _bound(params, design, responsibilities, response - rate, raised, _log_poisson(eta, response))

    def m_step(self, stats: RegressionStats) -> RegressionParams:
        """The maximum of the bound, gram⁻¹ cross from the current line, no row's eta moved by more than 1."""
        line, delta = _newton(stats, self.ridge)
        # The eighth root of a sum of eighth powers is at least the largest.
        move = jnp.sum(jnp.abs(delta) * stats.reach ** (1 / 8), axis=-1, keepdims=True)
        return _from_line(line + delta / jnp.maximum(move, 1))

    def q_function(self, params: RegressionParams, stats: RegressionStats) -> jax.Array:
        """The bound: base + cross·delta - delta·gram·delta / 2, delta from the line it was made at."""
        return _quadratic(params, stats)

    def log_prior(self, params: RegressionParams) -> jax.Array:
        return _ridge(params, self.ridge)

    def degenerate(self, stats: RegressionStats) -> jax.Array:
        return columns.empty(stats.count)

    def sample(
        self, key: jax.Array, params: RegressionParams, labels: jax.Array, features: jax.Array | None = None
    ) -> Data:
        """Responses for given features (N, P), from the components that the labels (N,) name: (features, response)."""
        eta = _at(params, _given(features, params.intercept.dtype), labels)
        return features, columns.poisson(key, jnp.exp(eta))

    def num_parameters(self, params: RegressionParams) -> int:
        return tree.size(params)

    def floats_per_row(self, params: RegressionParams) -> int:
        return 5 * params.intercept.size + (params.coefficients.shape[1] + 1) ** 2

    def unconstrain(self, params: RegressionParams) -> RegressionParams:
        return params

    def constrain(self, theta: RegressionParams) -> RegressionParams:
        return theta

    def check(self, x: Data, name: str = "x") -> None:
        _check(x, name)
        columns.check(
            f"{name}[1]", x[1], lambda v: (v >= 0) & (v == np.floor(v)), "whole numbers, at least 0", missing=False
        )


def _read(x: Data) -> tuple[jax.Array, jax.Array]:
    """The design, a row of ones above the features (P + 1, N), and the response (N,), in one floating dtype."""
    features, response = _both(x)
    dtype = tree.float_dtype((features, response))
    rows = checks.columns("x[0]", features).T.astype(dtype)
    return jnp.concatenate([jnp.ones_like(rows[:1]), rows]), jnp.asarray(response, dtype).reshape(-1)


def _both(x: Data, name: str = "x") -> tuple[jax.Array, jax.Array]:
    if not isinstance(x, (tuple, list)) or len(x) != 2:
        raise TypeError(f"{name} must be a pair (features, response); got {type(x).__name__}")
    return x[0], x[1]


def _check(x: Data, name: str) -> None:
    features, response = _both(x, name)
    rows = checks.columns(f"{name}[0]", features).shape[0]
    if checks.columns(f"{name}[1]", response).shape != (rows, 1):
        raise ValueError(
            f"{name}[1], the response, must have shape ({rows},), one a row of features; got {response.shape}"
        )
    for part, values in (("[0]", features), ("[1]", response)):
        if jnp.issubdtype(values.dtype, jnp.floating):
            checks.finite_matrix(name + part, values)


def _points(x: Data) -> jax.Array:
    design, response = _read(x)
    return jnp.concatenate([design[1:], response[None]]).T


def _line(params: LinearRegressionParams | RegressionParams) -> jax.Array:
    """(intercept, coefficients): (K, P + 1)."""
    return jnp.concatenate([params.intercept[:, None], params.coefficients], axis=1)


def _from_line(line: jax.Array) -> RegressionParams:
    return RegressionParams(coefficients=line[:, 1:], intercept=line[:, 0])


def _predict(params: LinearRegressionParams | RegressionParams, design: jax.Array) -> jax.Array:
    if params.coefficients.shape[1] + 1 != design.shape[0]:
        raise ValueError(
            f"x[0] must have {params.coefficients.shape[1]} features, as the parameters have; got {design.shape[0] - 1}"
        )
    return numerics.product(_line(params), design, "kp,pn->kn")


def _given(features: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    if features is None:
        raise TypeError(
            "a regression cannot sample features: call family.sample(key, params.components, labels, features=...)"
        )
    rows = checks.columns("features", features).astype(dtype)
    return jnp.concatenate([jnp.ones_like(rows[:, :1]), rows], axis=1)


def _at(params: LinearRegressionParams | RegressionParams, design: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.sum(_line(params)[labels] * design, axis=1)


def _gram(weights: jax.Array, design: jax.Array) -> jax.Array:
    """sum_n w zzᵀ: (K, N), (P, N) -> (K, P, P), by one product with the monomials of z; vanishingly regular."""
    i, j = np.tril_indices(design.shape[0])
    entries = np.zeros((design.shape[0],) * 2, int)
    entries[i, j] = entries[j, i] = np.arange(len(i))
    gram = columns.sums(weights, design[i] * design[j])[:, entries]
    return gram + columns.PSEUDO_COUNT * jnp.eye(design.shape[0], dtype=design.dtype)


def _solve(gram: jax.Array, cross: jax.Array) -> jax.Array:
    """gram⁻¹ cross (K, P), columns scaled to unit length; directions that the features lack stay where they are."""
    scale = jax.lax.rsqrt(jnp.diagonal(gram, axis1=-2, axis2=-1))
    eps = jnp.finfo(gram.dtype).eps
    floor = jnp.full_like(scale, 16 * gram.shape[-1] * eps)
    factor, _ = numerics.floored_cholesky(gram * scale[:, :, None] * scale[:, None, :], floor)
    inverse = numerics.inverse_lower(factor)
    whitened = jnp.sum(inverse * (scale * cross)[:, None, :], axis=-1)
    return scale * jnp.sum(inverse * whitened[:, :, None], axis=-2)


def _start(
    family: LogisticRegression | PoissonRegression,
    x: Data,
    weights: jax.Array | None,
    num_components: int,
    link: Callable[[jax.Array], jax.Array],
) -> RegressionParams:
    """The regression of all rows, every component: from the mean response, some M-steps."""
    design, response = _read(x)
    weights = jnp.ones_like(response) if weights is None else weights.astype(response.dtype)
    total = jnp.sum(weights)
    # Half a row of the other kind keeps the link finite.
    mean = (jnp.sum(weights * response) + 0.25) / (total + 0.5)
    flat = RegressionParams(
        coefficients=jnp.zeros((1, design.shape[0] - 1), design.dtype), intercept=link(mean).reshape(1)
    )

    def body(_: int, params: RegressionParams) -> RegressionParams:
        return family.m_step(family.stats(params, x, weights[None]))

    params = jax.lax.fori_loop(0, family.start_passes, body, flat)
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, num_components, axis=0), params)


def _bound(
    params: RegressionParams,
    design: jax.Array,
    responsibilities: jax.Array,
    score: jax.Array,
    curvature: jax.Array,
    logs: jax.Array,
) -> RegressionStats:
    count = jnp.sum(responsibilities, axis=1) + columns.PSEUDO_COUNT
    return RegressionStats(
        count=count,
        reference=count[:, None] * _line(params),
        gram=_gram(responsibilities * curvature, design),
        cross=columns.sums(responsibilities * score, design),
        base=jnp.sum(jnp.where(responsibilities > 0, responsibilities * logs, 0), axis=1),
        reach=columns.sums(jnp.sum(responsibilities, axis=0)[None], design**8)[0],
    )


def _newton(stats: RegressionStats, ridge: jax.Array | float) -> tuple[jax.Array, jax.Array]:
    """The current line, and the step to the maximum of bound and prior: (K, P + 1) each."""
    line = stats.reference / stats.count[:, None]
    penalty = _penalty(line, ridge)
    gram = stats.gram + jnp.eye(line.shape[1], dtype=line.dtype) * penalty
    return line, _solve(gram, stats.cross - penalty * line)


def _penalty(line: jax.Array, ridge: jax.Array | float) -> jax.Array:
    """The ridge, 0 for the intercept: (P + 1,)."""
    return jnp.asarray(ridge, line.dtype) * (np.arange(line.shape[-1]) > 0)


def _quadratic(params: RegressionParams, stats: RegressionStats) -> jax.Array:
    delta = _line(params) - stats.reference / stats.count[:, None]
    slope = stats.cross - 0.5 * jnp.sum(stats.gram * delta[:, None, :], axis=-1)
    return jnp.sum(stats.base) + jnp.sum(slope * delta)


def _ridge(params: RegressionParams, ridge: jax.Array | float) -> jax.Array:
    return -0.5 * jnp.sum(_penalty(_line(params), ridge) * jnp.square(_line(params)))


def _log_logistic(eta: jax.Array, response: jax.Array) -> jax.Array:
    return response * eta - jnp.logaddexp(eta, 0)


def _log_poisson(eta: jax.Array, response: jax.Array) -> jax.Array:
    return response * eta - jnp.exp(eta) - jax.lax.lgamma(response + 1)
