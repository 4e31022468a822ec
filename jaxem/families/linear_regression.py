"""Linear regression: the distribution of a response given features, a line a component."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from .. import capabilities, parameters, tree
from ..protocols import Data
from ..record import record
from . import columns, design
from .covariance import Spherical
from .linear_equation import EquationParams, EquationStats, LinearEquation


@record
class LinearRegressionParams:
    """coefficients (K, P); intercept (K,); variance (K,) of the response about its line."""

    coefficients: jax.Array
    intercept: jax.Array
    variance: jax.Array


@capabilities.completed("part")
@record(kw_only=False)
class LinearRegression:
    """log p(y|f,k) = -(log 2 pi v_k + (y - b_k - f·c_k)² / v_k) / 2: least squares, weighted.

    Data: a pair (features (N, P) or (N,), response (N,)), nothing missing. prior: pseudo-statistics, as
    `pseudo_rows` makes them. In float32 the normal equations lose the slope of features that lie further
    from 0 than a thousand times their spread: centre these, as a warning says.
    DeSarbo & Cron (1988), A maximum likelihood methodology for clusterwise linear regression, J. Classification 5.
    """

    prior: EquationStats | None = dataclasses.field(default=None, kw_only=True)

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

    @property
    def _equation(self) -> LinearEquation:
        """All lines at once: a leading axis of components, one response, and z for features."""
        return LinearEquation(noise=Spherical(), widths=(None,), prior=self.prior)

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
        params = self._equation.m_step(stats)
        line = params.line[:, 0]
        return LinearRegressionParams(coefficients=line[:, 1:], intercept=line[:, 0], variance=params.covariance)

    def share(self, stats: EquationStats, name: str, params: LinearRegressionParams) -> jax.Array:
        """The mean squared residual of all rows, each about its own component's line."""
        return jnp.sum(stats.count * params.variance) / jnp.sum(stats.count)

    def q_function(self, params: LinearRegressionParams, stats: EquationStats) -> jax.Array:
        """Expected complete-data log-likelihood of the responses."""
        return self._equation.q_function(_as_equation(params), stats)

    def log_prior(self, params: LinearRegressionParams) -> jax.Array:
        """Q of the pseudo-statistics; up to a constant."""
        return self._equation.log_prior(_as_equation(params))

    def rebase(self, stats: EquationStats, params: LinearRegressionParams) -> EquationStats:
        """The same statistics about the lines of `params`, exactly."""
        return self._equation.rebase(stats, _as_equation(params))

    def degenerate(self, stats: EquationStats, held: tuple[str, ...] = ()) -> jax.Array:
        """Components (K,) without rows, or whose line passes through all of them."""
        empty = columns.empty(stats.count)
        return empty if "variance" in held else empty | self._equation.degenerate(stats)

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
    """Normal equations from the rows' z (P + 1, N), responsibilities (K, N), and expectations of what is seen of rows.

    These are E[e] and E[e²] (K, N), and E[response²] summed over the rows (K, 1), under the current parameters.
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
