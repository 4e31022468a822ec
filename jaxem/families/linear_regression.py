"""Linear regression: the distribution of a response given features, a line a component."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from .. import capabilities, parameters, tree
from ..parts import conjugacy
from ..protocols import Data
from ..record import record
from . import columns, design
from .covariance import Spherical
from .linear_equation import EquationParams, EquationStats, LinearEquation
from .linear_prior import NormalInverseGamma


@record
class LinearRegressionParams:
    """Parameters of K lines with normal noise.

    coefficients: (K, P), c.
    intercept: (K,), b.
    variance: (K,), v, of the response about its line.
    """

    coefficients: jax.Array
    intercept: jax.Array
    variance: jax.Array


@capabilities.completed("part")
@record(kw_only=False)
class LinearRegression:
    """log p(y|f,k) = -(log 2 pi v_k + (y - b_k - f·c_k)² / v_k) / 2: least squares, weighted.

    Data: a pair (features (N, P) or (N,), response (N,)), nothing missing. prior: a `NormalInverseGamma`, or
    pseudo-statistics, as `pseudo_rows` makes them; the M-step is then the posterior mode. In float32 the normal
    equations lose the slope of features that lie further from 0 than a thousand times their spread: centre these, as a
    warning says.
    DeSarbo & Cron (1988), A maximum likelihood methodology for clusterwise linear regression, J. Classification 5.
    """

    prior: NormalInverseGamma | EquationStats | None = dataclasses.field(default=None, kw_only=True)

    separable = shareable = ("variance",)
    supports: ClassVar[parameters.Supports] = {"variance": parameters.at_least_zero}

    def pooled(self, x: Data, weights: jax.Array | None, num_components: int) -> LinearRegressionParams:
        matrix, _ = design.read(x)
        one = jnp.ones(1, matrix.dtype)
        flat = LinearRegressionParams(
            coefficients=jnp.zeros((1, matrix.shape[0] - 1), matrix.dtype), intercept=0 * one, variance=one
        )
        return columns.pooled(self, flat, x, weights, num_components)

    features = staticmethod(design.points)
    check = staticmethod(design.check)

    def _equation(self, count: int, size: int, dtype: Any) -> LinearEquation:
        """All lines at once: a leading axis of `count` components, one response, and z (of `size` entries)."""
        prior = self.prior
        if isinstance(prior, NormalInverseGamma):
            prior = prior.pseudo_stats((count,), size, dtype)
        return LinearEquation(noise=Spherical(), widths=(None,), prior=prior)

    def _equation_of(self, stats: EquationStats) -> LinearEquation:
        return self._equation(stats.count.shape[0], stats.gram.shape[-1], stats.gram.dtype)

    def mean(self, params: LinearRegressionParams, features: jax.Array) -> jax.Array:
        """E[y | features] under every component: (K, N)."""
        return design.predict(params, design.matrix(features, params.intercept.dtype))

    def log_prob(self, params: LinearRegressionParams, x: Data) -> jax.Array:
        """Log-density of every response under every component: (K, N)."""
        matrix, response = design.read(x)
        residual = response[None] - design.predict(params, matrix)
        variance = params.variance[:, None]
        return -0.5 * (jnp.log(2 * math.pi * variance) + jnp.square(residual) / variance)

    def stats(self, params: LinearRegressionParams, x: Data, responsibilities: jax.Array) -> EquationStats:
        """Weighted normal equations, each of one response, K in front: responsibilities (K, N)."""
        matrix, response = design.read(x)
        residual = response[None] - design.predict(params, matrix)
        energy = columns.sums(responsibilities, jnp.square(response)[None])
        return expected_stats(params, matrix, responsibilities, residual, jnp.square(residual), energy)

    def m_step(self, stats: EquationStats) -> LinearRegressionParams:
        """Weighted least squares, and the mean squared residual."""
        params = self._equation_of(stats).m_step(stats)
        line = params.line[:, 0]
        return LinearRegressionParams(coefficients=line[:, 1:], intercept=line[:, 0], variance=params.covariance)

    def share(self, stats: EquationStats, name: str, params: LinearRegressionParams) -> jax.Array:
        """The mean squared residual of all rows, each about its own component's line."""
        return jnp.sum(stats.count * params.variance) / jnp.sum(stats.count)

    def q_function(self, params: LinearRegressionParams, stats: EquationStats) -> jax.Array:
        """Expected complete-data log-likelihood of the responses."""
        return self._equation_of(stats).q_function(_as_equation(params), stats)

    def log_prior(self, params: LinearRegressionParams) -> jax.Array:
        """Log-density of the prior: of pseudo-statistics up to a constant, as their Q; 0 without a prior."""
        if isinstance(self.prior, NormalInverseGamma):
            return self.prior.log_prob(design.line(params), params.variance)
        count, columns_here = params.coefficients.shape
        return self._equation(count, columns_here + 1, params.variance.dtype).log_prior(_as_equation(params))

    def rebase(self, stats: EquationStats, params: LinearRegressionParams) -> EquationStats:
        """The same statistics about the lines of `params`, exactly."""
        return self._equation_of(stats).rebase(stats, _as_equation(params))

    def degenerate(self, stats: EquationStats, held: tuple[str, ...] = ()) -> jax.Array:
        """Components (K,) without rows, or whose line passes through all of them."""
        empty = columns.empty(stats.count)
        return empty if "variance" in held else empty | self._equation_of(stats).degenerate(stats)

    # What follows from the conjugate prior; see `protocols.Conjugate`.

    def conjugate_of(self) -> NormalInverseGamma:
        """The prior; pseudo-statistics are none, since they need not have a density."""
        if not isinstance(self.prior, NormalInverseGamma):
            raise ValueError(
                "LinearRegression needs a prior here, as LinearRegression(prior=NormalInverseGamma(mean=..., "
                f"precision=..., shape=..., rate=...)); got {type(self.prior).__name__}"
            )
        return self.prior

    def posterior(self, stats: EquationStats) -> NormalInverseGamma:
        """Hyperparameters, component axis first."""
        return self.conjugate_of().posterior(stats)

    draw, pooled_posterior = conjugacy.common

    def given(self, values: tuple[jax.Array, jax.Array]) -> LinearRegressionParams:
        """Parameters from lines and variances."""
        line, variance = values
        return LinearRegressionParams(coefficients=line[:, 1:], intercept=line[:, 0], variance=variance)

    def plugged(self, q: NormalInverseGamma) -> LinearRegressionParams:
        """The mean lines, and the inverses of the expected precisions."""
        return self.given(q.plugged())

    def expected_log_prob(self, q: NormalInverseGamma, x: Data) -> jax.Array:
        """E_q[log p(response)]: (K, N)."""
        return self.log_prob(self.plugged(q), x) + q.slack(design.read(x)[0])

    def expected_q(self, q: NormalInverseGamma, stats: EquationStats) -> jax.Array:
        """E_q of Q."""
        return self.q_function(self.plugged(q), stats) + q.expected_slack(stats)

    def log_expected_prob(self, q: NormalInverseGamma, x: Data) -> jax.Array:
        """log E_q[p(response)] (K, N): Student's t."""
        return q.log_predictive(*design.read(x))

    def sample(
        self, key: jax.Array, params: LinearRegressionParams, labels: jax.Array, features: jax.Array | None = None
    ) -> Data:
        """Responses for given features (N, P), from the components that the labels (N,) name: (features, response)."""
        mean = design.given(params, labels, features)
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


def _as_equation(params: LinearRegressionParams) -> EquationParams:
    return EquationParams(coefficients=(design.line(params)[:, None],), covariance=params.variance)


def expected_stats(
    params: LinearRegressionParams,
    matrix: jax.Array,
    responsibilities: jax.Array,
    residual: jax.Array,
    square: jax.Array,
    energy: jax.Array,
) -> EquationStats:
    """Normal equations about the current lines, from expected residuals e of the rows under the current parameters.

    matrix: (P + 1, N), z of every row.
    responsibilities: (K, N), r.
    residual, square: (K, N), E[e] and E[e²].
    energy: (K, 1), sum r E[response²].

    A vanishing pseudo-row keeps a component without rows as it is.
    """
    count = jnp.sum(responsibilities, axis=1) + columns.PSEUDO_COUNT
    return EquationStats(
        count=count,
        reference=(count[:, None] * design.line(params))[:, None],
        gram=design.gram(responsibilities, matrix),
        cross=columns.sums(responsibilities * residual, matrix)[..., None],
        square=jnp.sum(responsibilities * square, axis=1) + columns.PSEUDO_COUNT * params.variance,
        energy=energy,
    )
