"""Linear regression whose noise is Student's t: robust to responses far from the line."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from .. import capabilities, checks, parameters, special, tree
from ..protocols import Data
from ..record import record
from . import columns, design
from .linear_equation import EquationStats
from .linear_regression import LinearRegression, LinearRegressionParams, expected_stats
from .student_t import degrees_told, log_gammas, normaliser, scale_moments, within_limits


@record
class StudentTLinearParams:
    """Parameters of K lines with Student's t noise.

    coefficients: (K, P), c.
    intercept: (K,), b.
    variance: (K,), the squared scale of the noise, whose variance is nu / (nu - 2) times as large.
    degrees_of_freedom: (K,), nu.
    """

    coefficients: jax.Array
    intercept: jax.Array
    variance: jax.Array
    degrees_of_freedom: jax.Array

    @property
    def line(self) -> LinearRegressionParams:
        """Parameters of the normal regression given the latent scales."""
        return LinearRegressionParams(coefficients=self.coefficients, intercept=self.intercept, variance=self.variance)


@record
class StudentTLinearStats:
    """Expected statistics of the rows and of their latent scales u, additive over rows.

    count: (K,), sum r.
    equation: those of a normal regression, every row counted r E[u] times.
    log_scales: (K,), sum r (E[log u] - E[u] + 1).
    base: (K,), sum r h, where h makes Q equal to the log-density at the current parameters.
    """

    count: jax.Array
    equation: EquationStats
    log_scales: jax.Array
    base: jax.Array


@capabilities.completed("part")
@record(kw_only=False)
class StudentTLinear:
    """y | f, u ~ Normal(b + f · c, variance / u), u ~ Gamma(nu / 2, nu / 2): a family of components.

    degrees_of_freedom: held at this number, or estimated (None, the default) between 0.1 and 1000.

    Data are a pair (features (N, P) or (N,), response (N,)), nothing missing. Where no algorithm is named, M-steps are
    parameter-expanded: squares are divided by sum r E[u] in place of sum r, which is as safe and takes fewer steps.
    Lange, Little & Taylor (1989), Robust statistical modeling using the t distribution, JASA 84; Liu, Rubin & Wu
    (1998), Parameter expansion to accelerate EM, Biometrika 85, section 4.
    Raises ValueError for degrees of freedom that are not positive.
    """

    degrees_of_freedom: jax.Array | float | None = None

    separable = ("variance", "degrees_of_freedom")
    expands = True
    supports: ClassVar[parameters.Supports] = {
        "variance": parameters.at_least_zero,
        "degrees_of_freedom": parameters.at_least_zero,
    }
    features = staticmethod(design.points)
    check = staticmethod(design.check)

    def __post_init__(self) -> None:
        given = self.degrees_of_freedom
        if checks.is_known(given) and not np.all(np.asarray(given) > 0):
            raise ValueError(f"degrees_of_freedom must be above 0, or None to estimate them; got {given}")

    def pooled(self, x: Data, weights: jax.Array | None, num_components: int) -> StudentTLinearParams:
        return self._from(LinearRegression().pooled(x, weights, num_components), None)

    def mean(self, params: StudentTLinearParams, features: jax.Array) -> jax.Array:
        """E[y | features] under every component, its median where nu <= 1: (K, N)."""
        return LinearRegression().mean(params.line, features)

    def log_prob(self, params: StudentTLinearParams, x: Data) -> jax.Array:
        """Log-density of every response under every component: (K, N)."""
        matrix, response = design.read(x)
        square = jnp.square(response[None] - design.predict(params.line, matrix)) / params.variance[:, None]
        nu = params.degrees_of_freedom
        constant = normaliser(nu, 1) - 0.5 * jnp.log(params.variance)
        return constant[:, None] - 0.5 * (nu[:, None] + 1) * jnp.log1p(square / nu[:, None])

    def stats(self, params: StudentTLinearParams, x: Data, responsibilities: jax.Array) -> StudentTLinearStats:
        """Expected statistics: responsibilities (K, N); E[u] = (nu + 1) / (nu + e² / variance)."""
        matrix, response = design.read(x)
        residual = response[None] - design.predict(params.line, matrix)
        square = jnp.square(residual)
        mean, gap, base = scale_moments(params.degrees_of_freedom[:, None], square / params.variance[:, None], 1)
        counted = responsibilities * mean
        energy = columns.sums(counted, jnp.square(response)[None])
        own = -special.log_minus_digamma(0.5 * params.degrees_of_freedom)
        return StudentTLinearStats(
            count=jnp.sum(responsibilities, axis=1) + columns.PSEUDO_COUNT,
            equation=expected_stats(params.line, matrix, counted, residual, square, energy),
            log_scales=jnp.sum(responsibilities * gap, axis=1) + columns.PSEUDO_COUNT * own,
            base=jnp.sum(responsibilities * base, axis=1),
        )

    def m_step(self, stats: StudentTLinearStats) -> StudentTLinearParams:
        """Least squares of the rows weighted by E[u], and degrees of freedom from `log_scales`."""
        line = LinearRegression().m_step(stats.equation)
        ratio = stats.equation.count / stats.count
        return self._from(dataclasses.replace(line, variance=line.variance * ratio), stats)

    def expanded(
        self, params: StudentTLinearParams, stats: StudentTLinearStats, held: tuple[str, ...] = ()
    ) -> StudentTLinearParams:
        """The M-step with latent scales of any mean, which the variance then absorbs, where it is free."""
        if "variance" in held:
            return params
        return dataclasses.replace(params, variance=params.variance * stats.count / stats.equation.count)

    def q_function(self, params: StudentTLinearParams, stats: StudentTLinearStats) -> jax.Array:
        """E[log Normal(y; line, variance / u) + log Gamma(u; nu/2, nu/2)] + base."""
        normal = LinearRegression().q_function(params.line, stats.equation)
        # The Q of a normal counts a logarithm of the variance for each unit of E[u]; here there is one for each row.
        surplus = 0.5 * (stats.equation.count - stats.count) * jnp.log(2 * math.pi * params.variance)
        logs = log_gammas(params.degrees_of_freedom, stats.count, stats.log_scales)
        return normal + jnp.sum(surplus + logs + stats.base)

    def log_prior(self, params: StudentTLinearParams) -> jax.Array:
        """0: there is no prior."""
        return jnp.zeros((), params.variance.dtype)

    def rebase(self, stats: StudentTLinearStats, params: StudentTLinearParams) -> StudentTLinearStats:
        """The same statistics about the lines of `params`."""
        return dataclasses.replace(stats, equation=LinearRegression().rebase(stats.equation, params.line))

    def degenerate(self, stats: StudentTLinearStats, held: tuple[str, ...] = ()) -> jax.Array:
        """Components (K,) without rows, or whose line passes through all rows but those of vanishing weight E[u]."""
        return columns.empty(stats.count) | LinearRegression().degenerate(stats.equation, held)

    def sample(
        self, key: jax.Array, params: StudentTLinearParams, labels: jax.Array, features: jax.Array | None = None
    ) -> Data:
        """Responses for given features (N, P), from the components that the labels (N,) name: (features, response)."""
        mean, nu = design.given(params.line, labels, features), params.degrees_of_freedom[labels]
        noise = jax.random.t(key, nu, mean.shape, mean.dtype)
        return features, mean + jnp.sqrt(params.variance)[labels] * noise

    def num_parameters(self, params: StudentTLinearParams) -> int:
        held = 0 if self.degrees_of_freedom is None else params.degrees_of_freedom.size
        return tree.size(params) - held

    def floats_per_row(self, params: StudentTLinearParams) -> int:
        return 8 * params.variance.size + LinearRegression().floats_per_row(params.line)

    def unconstrain(self, params: StudentTLinearParams) -> StudentTLinearParams:
        """Variances and degrees of freedom in logarithms (none of these where they are held)."""
        nu = params.degrees_of_freedom
        nu = jnp.log(nu) if self.degrees_of_freedom is None else nu[:0]
        return dataclasses.replace(params, variance=jnp.log(params.variance), degrees_of_freedom=nu)

    def constrain(self, theta: StudentTLinearParams) -> StudentTLinearParams:
        """Inverse of `unconstrain`."""
        estimated = within_limits(jnp.exp(theta.degrees_of_freedom))
        nu = estimated if self.degrees_of_freedom is None else self._held(theta.intercept)
        return dataclasses.replace(theta, variance=jnp.exp(theta.variance), degrees_of_freedom=nu)

    def _held(self, like: jax.Array) -> jax.Array:
        return jnp.broadcast_to(jnp.asarray(self.degrees_of_freedom, like.dtype), like.shape)

    def _from(self, line: LinearRegressionParams, stats: StudentTLinearStats | None) -> StudentTLinearParams:
        """A normal regression's parameters, with degrees of freedom."""
        if self.degrees_of_freedom is not None:
            nu = self._held(line.intercept)
        else:
            nu = jnp.full_like(line.intercept, 10) if stats is None else degrees_told(stats.log_scales / stats.count)
        return StudentTLinearParams(
            coefficients=line.coefficients,
            intercept=line.intercept,
            variance=line.variance,
            degrees_of_freedom=nu,
        )
