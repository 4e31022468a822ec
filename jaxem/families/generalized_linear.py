"""Logistic, probit and Poisson regression: the distribution of a response given features, by a linear predictor.

Their M-step maximises a quadratic lower bound of the expected log-likelihood, made at the current line. Letters: P
features, z = (1, features), eta = line · z the linear predictor. The functions of this file are the methods of all
families, which say themselves what differs:

_link: the eta of a mean response, and _mean_of its inverse.
_log_density: log p(response | eta).
_surrogate: slope and curvature of the quadratic in eta that bounds it.
local: whether the bound holds only while no row's eta moves by more than 1.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from .. import capabilities, numerics, special, tree
from ..protocols import Data
from ..record import record
from . import columns, design

# Eighth powers of features from 0.005 to 1e7, measured in this unit, are inside the range of float32.
_UNIT = 256.0


@record
class RegressionParams:
    """The linear predictor eta = intercept + coefficients · features.

    coefficients: (K, P).
    intercept: (K,).
    """

    coefficients: jax.Array
    intercept: jax.Array


@record
class RegressionStats:
    """A quadratic lower bound of the expected log-likelihood about the current line, additive over rows.

    count: (K,), sum r.
    reference: (K, P + 1), count times the current line (intercept, coefficients).
    gram: (K, P + 1, P + 1), sum r curvature zzᵀ.
    cross: (K, P + 1), sum r slope z, the score.
    base: (K,), the expected log-likelihood at the current line.
    reach: (P + 1,), sum over rows and components of r (z / _UNIT)⁸, which bounds the largest |z| for row weights of
        at least 1; None where the bound holds everywhere.
    """

    count: jax.Array
    reference: jax.Array
    gram: jax.Array
    cross: jax.Array
    base: jax.Array
    reach: jax.Array | None


def _pooled(family: "_Regression", x: Data, weights: jax.Array | None, num_components: int) -> RegressionParams:
    """The regression of all rows in every component: some M-steps from a constant line, the mean response."""
    matrix, response = design.read(x)
    weights = jnp.ones_like(response) if weights is None else weights.astype(response.dtype)
    # Half of a row, whose response is 1/2, keeps the link finite where all responses are 0 or 1.
    mean = (jnp.sum(weights * response) + 0.25) / (jnp.sum(weights) + 0.5)
    flat = RegressionParams(
        coefficients=jnp.zeros((1, matrix.shape[0] - 1), matrix.dtype), intercept=family._link(mean).reshape(1)
    )

    def body(_: int, params: RegressionParams) -> RegressionParams:
        return family.m_step(family.stats(params, x, weights[None]))

    params = jax.lax.fori_loop(0, family.start_passes, body, flat)
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, num_components, axis=0), params)


def _mean(family: "_Regression", params: RegressionParams, features: jax.Array) -> jax.Array:
    """E[y | features] under every component: (K, N)."""
    return family._mean_of(design.predict(params, design.matrix(features, params.intercept.dtype)))


def _log_prob(family: "_Regression", params: RegressionParams, x: Data) -> jax.Array:
    """Log-probability of every response under every component: (K, N)."""
    matrix, response = design.read(x)
    return family._log_density(design.predict(params, matrix), response[None])


def _stats(family: "_Regression", params: RegressionParams, x: Data, responsibilities: jax.Array) -> RegressionStats:
    """The bound's slope and curvature at the current line: responsibilities (K, N)."""
    matrix, response = design.read(x)
    eta = design.predict(params, matrix)
    score, curvature = family._surrogate(eta, response[None])
    logs = family._log_density(eta, response[None])
    count = jnp.sum(responsibilities, axis=1) + columns.PSEUDO_COUNT
    return RegressionStats(
        count=count,
        reference=count[:, None] * design.line(params),
        gram=design.gram(responsibilities * curvature, matrix),
        cross=columns.sums(responsibilities * score, matrix),
        base=jnp.sum(jnp.where(responsibilities > 0, responsibilities * logs, 0), axis=1),
        reach=columns.sums(jnp.sum(responsibilities, axis=0)[None], (matrix / _UNIT) ** 8)[0] if family.local else None,
    )


def _m_step(family: "_Regression", stats: RegressionStats) -> RegressionParams:
    """The maximum of bound and prior; where the bound is local, shortened so that no row's eta moves by more than 1."""
    line = design.current(stats)
    penalty = _penalty(family, line)
    gram = stats.gram + (jnp.eye(line.shape[1], dtype=line.dtype) * penalty[None])[None]
    delta = numerics.least_squares(gram, stats.cross - penalty[None] * line)
    if stats.reach is not None:
        # The eighth root of a sum of eighth powers is at least the largest of the numbers.
        reach = _UNIT * jnp.maximum(stats.reach, jnp.finfo(delta.dtype).tiny) ** (1 / 8)
        move = jnp.sum(jnp.abs(delta) * reach[None], axis=-1, keepdims=True)
        delta = delta / jnp.maximum(move, 1)
    line = line + delta
    return RegressionParams(coefficients=line[:, 1:], intercept=line[:, 0])


def _q_function(family: "_Regression", params: RegressionParams, stats: RegressionStats) -> jax.Array:
    """The bound, base + cross·delta - delta·gram·delta / 2, with delta = line - current line."""
    delta = design.line(params) - design.current(stats)
    return jnp.sum(stats.base) + jnp.sum((stats.cross - 0.5 * design.times(stats.gram, delta)) * delta)


def _log_prior(family: "_Regression", params: RegressionParams) -> jax.Array:
    """-ridge |coefficients|² / 2: the log-density of the prior up to a constant."""
    line = design.line(params)
    return -0.5 * jnp.sum(_penalty(family, line)[None] * jnp.square(line))


def _penalty(family: "_Regression", line: jax.Array) -> jax.Array:
    """The ridge of every coefficient, 0 for the intercept: (P + 1,)."""
    return jnp.asarray(family.ridge, line.dtype) * (np.arange(line.shape[-1]) > 0)


def _degenerate(family: "_Regression", stats: RegressionStats) -> jax.Array:
    return columns.empty(stats.count)


def _num_parameters(family: "_Regression", params: RegressionParams) -> int:
    return tree.size(params)


def _floats_per_row(family: "_Regression", params: RegressionParams) -> int:
    return 5 * params.intercept.size + (params.coefficients.shape[1] + 1) ** 2


def _unchanged(family: "_Regression", params: RegressionParams) -> RegressionParams:
    return params


# The methods that all of them have, in the order in which they take them.
_COMMON = (
    _pooled,
    _mean,
    _log_prob,
    _stats,
    _m_step,
    _q_function,
    _log_prior,
    _degenerate,
    _num_parameters,
    _floats_per_row,
)


@capabilities.completed("part")
@record(kw_only=False)
class LogisticRegression:
    """log p(y|f,k) = y eta - log(1 + exp(eta)), eta = b_k + f·c_k: binary responses.

    ridge: the precision of a normal prior with mean 0 on the coefficients, not on the intercept.

    The M-step is one iteratively reweighted least-squares solution, with the weights tanh(eta/2) / (2 eta) of the
    Polya-Gamma latents. Their quadratic bound touches the log-likelihood at the current line, so that every step is
    monotone. Data are a pair (features (N, P) or (N,), response (N,) of 0 and 1), nothing missing.
    Jaakkola & Jordan (2000), Statistics and Computing 10; Polson, Scott & Windle (2013), JASA 108.
    """

    ridge: jax.Array | float = dataclasses.field(default=0.0, kw_only=True)

    # A start takes many M-steps from the same responsibilities: one solution of a bound is not yet the maximum of Q.
    start_passes = 15
    local = False
    _link, _mean_of = staticmethod(jax.scipy.special.logit), staticmethod(jax.nn.sigmoid)

    features = staticmethod(design.points)
    pooled, mean, log_prob, stats, m_step, q_function, log_prior, degenerate, num_parameters, floats_per_row = _COMMON
    unconstrain = constrain = _unchanged

    def sample(
        self, key: jax.Array, params: RegressionParams, labels: jax.Array, features: jax.Array | None = None
    ) -> Data:
        """Responses for given features (N, P), from the components that the labels (N,) name: (features, response)."""
        eta = design.given(params, labels, features)
        return features, jax.random.bernoulli(key, jax.nn.sigmoid(eta)).astype(eta.dtype)

    def check(self, x: Data, name: str = "x") -> None:
        design.check(x, name)
        columns.check(f"{name}[1]", x[1], lambda v: (v == 0) | (v == 1), "0 or 1", missing=False)

    def _log_density(self, eta: jax.Array, response: jax.Array) -> jax.Array:
        return response * eta - jnp.logaddexp(eta, 0)

    def _surrogate(self, eta: jax.Array, response: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Slope and curvature of a quadratic in eta that lies below the log-density and touches it at eta."""
        small = jnp.abs(eta) < 1e-3
        weight = jnp.where(small, 0.25 - eta**2 / 48, jnp.tanh(eta / 2) / (2 * jnp.where(small, 1, eta)))
        return response - 0.5 - weight * eta, weight


@capabilities.completed("part")
@record(kw_only=False)
class Probit:
    """p(y = 1 | f, k) = Phi(b_k + f·c_k): binary responses, which are signs of a latent normal response.

    ridge: the precision of a normal prior with mean 0 on the coefficients, not on the intercept.

    The M-step is least squares on the expected latent responses: data augmentation, whose quadratic has curvature 1
    everywhere. Data are a pair (features (N, P) or (N,), response (N,) of 0 and 1), nothing missing.
    Albert & Chib (1993), Bayesian analysis of binary and polychotomous response data, JASA 88; McCulloch (1994),
    Maximum likelihood variance components estimation for binary data, JASA 89, on its EM.
    """

    ridge: jax.Array | float = dataclasses.field(default=0.0, kw_only=True)

    start_passes = 15
    local = False
    _link, _mean_of = staticmethod(jax.scipy.special.ndtri), staticmethod(jax.scipy.special.ndtr)

    features = staticmethod(design.points)
    pooled, mean, log_prob, stats, m_step, q_function, log_prior, degenerate, num_parameters, floats_per_row = _COMMON
    unconstrain = constrain = _unchanged

    def sample(
        self, key: jax.Array, params: RegressionParams, labels: jax.Array, features: jax.Array | None = None
    ) -> Data:
        """Responses for given features (N, P), from the components that the labels (N,) name: (features, response)."""
        eta = design.given(params, labels, features)
        return features, (eta + jax.random.normal(key, eta.shape, eta.dtype) > 0).astype(eta.dtype)

    check = LogisticRegression.check

    def _log_density(self, eta: jax.Array, response: jax.Array) -> jax.Array:
        return jax.scipy.special.log_ndtr((2 * response - 1) * eta)

    def _surrogate(self, eta: jax.Array, response: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Slope and curvature of the quadratic: E[latent response] - eta, and 1."""
        sign = 2 * response - 1
        logs = -0.5 * (jnp.square(eta) + math.log(2 * math.pi)) - jax.scipy.special.log_ndtr(sign * eta)
        return sign * jnp.exp(logs), jnp.ones_like(sign * eta)


@capabilities.completed("part")
@record(kw_only=False)
class PoissonRegression:
    """log p(y|f,k) = y eta - exp(eta) - log y!, eta = b_k + f·c_k: counts.

    ridge: the precision of a normal prior with mean 0 on the coefficients, not on the intercept.

    The M-step is a Newton step, weighted least squares with weights exp(eta), whose curvature is raised by the factor
    2 (e - 2) = 1.44. That bounds the log-likelihood from below while no row's eta moves by more than 1; a longer step
    is shortened to that, so that every step is monotone where row weights are at least 1. Data are a pair (features
    (N, P) or (N,), response (N,) of whole numbers), nothing missing. Features of about unit scale converge fastest.
    McCullagh & Nelder, Generalized Linear Models, section 2.5; Wedel et al. (1993), J. Applied Econometrics 8.
    """

    ridge: jax.Array | float = dataclasses.field(default=0.0, kw_only=True)

    start_passes = 15
    local = True
    _link, _mean_of = staticmethod(jnp.log), staticmethod(jnp.exp)

    pooled, mean, log_prob, stats, m_step, q_function, log_prior, degenerate, num_parameters, floats_per_row = _COMMON
    unconstrain = constrain = _unchanged

    def features(self, x: Data) -> jax.Array:
        """Features and the logarithm of 1 + response, side by side (N, P + 1): points for seeding."""
        matrix, response = design.read(x)
        return jnp.concatenate([matrix[1:], jnp.log1p(response)[None]]).T

    def sample(
        self, key: jax.Array, params: RegressionParams, labels: jax.Array, features: jax.Array | None = None
    ) -> Data:
        """Responses for given features (N, P), from the components that the labels (N,) name: (features, response)."""
        return features, columns.poisson(key, jnp.exp(design.given(params, labels, features)))

    def check(self, x: Data, name: str = "x") -> None:
        design.check(x, name)
        columns.check(
            f"{name}[1]", x[1], lambda v: (v >= 0) & (v == np.floor(v)), "whole numbers, at least 0", missing=False
        )

    def _log_density(self, eta: jax.Array, response: jax.Array) -> jax.Array:
        # Written about its maximum over eta, since the terms of the usual form cancel for large counts.
        some = response > 0
        count = jnp.where(some, response, 1)
        off = eta - jnp.log(count)
        top = -0.5 * jnp.log(2 * math.pi * count) - special.stirling_error(count)
        return jnp.where(some, top - count * (jnp.expm1(off) - off), -jnp.exp(eta))

    def _surrogate(self, eta: jax.Array, response: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Slope and raised curvature: a quadratic below the log-density while eta moves by at most 1."""
        rate = jnp.exp(eta)
        return response - rate, 2 * (math.e - 2) * rate


_Regression = LogisticRegression | PoissonRegression | Probit
