"""The conjugate prior of a linear regression, and the posteriors that are of its kind."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from .. import numerics, special
from ..priors import GammaPrior, like
from ..record import record
from .covariance import Full
from .linear_equation import EquationStats, LinearEquation


@record
class NormalInverseGamma:
    """line | variance ~ N(mean, variance precision⁻¹), variance ~ inverse-gamma(shape, rate); z = (1, features).

    mean: (P + 1,), of the intercept and the coefficients.
    precision: (P + 1, P + 1), or a number, that multiple of the identity.
    shape, rate: of the variance of the response about its line.

    Every field can be traced and vmapped. Posteriors of K components have them with K in front.
    Gelman et al., Bayesian Data Analysis, section 14.8; Bishop (2006), exercise 3.12.
    """

    mean: jax.Array
    precision: jax.Array | float
    shape: jax.Array | float
    rate: jax.Array | float

    positive = ("shape", "rate")
    spreads = ("precision",)

    def over(self, lead: tuple[int, ...], size: int, dtype: Any) -> "NormalInverseGamma":
        """The same for components of shape `lead` and lines of `size` numbers, every field in its full shape."""
        precision = jnp.asarray(self.precision, dtype)
        precision = precision * jnp.eye(size, dtype=dtype) if precision.ndim == 0 else precision
        return NormalInverseGamma(
            mean=like(self.mean, (*lead, size), dtype),
            precision=like(precision, (*lead, size, size), dtype),
            shape=like(self.shape, lead, dtype),
            rate=like(self.rate, lead, dtype),
        )

    def pseudo_stats(self, lead: tuple[int, ...], size: int, dtype: Any) -> EquationStats:
        """Statistics whose Q is the log-density, but for a constant."""
        full = self.over(lead, size, dtype)
        count = 2 * jnp.asarray(full.shape) + size + 2
        return EquationStats(
            count=count,
            reference=(count[..., None] * full.mean)[..., None, :],
            gram=jnp.asarray(full.precision),
            cross=jnp.zeros((*lead, size, 1), dtype),
            square=2 * jnp.asarray(full.rate),
            energy=jnp.zeros((*lead, 1), dtype),
        )

    def posterior(self, stats: EquationStats) -> "NormalInverseGamma":
        """Given the `EquationStats` of K regressions."""
        *lead, _, size = stats.reference.shape
        shape, dtype = tuple(lead), stats.reference.dtype
        prior = self.over(shape, size, dtype)
        found = LinearEquation.combined(stats, self.pseudo_stats(shape, size, dtype))
        return NormalInverseGamma(
            mean=found.line[..., 0, :],
            precision=found.gram,
            shape=prior.shape + 0.5 * stats.count,
            rate=0.5 * found.square,
        )

    def mode(self) -> tuple[jax.Array, jax.Array]:
        """The joint mode of line and variance."""
        return self.mean, self.rate / (jnp.asarray(self.shape) + 0.5 * self.mean.shape[-1] + 1)

    def expected(self) -> tuple[jax.Array, jax.Array]:
        """The means of line and variance; where the variance has none, `plugged` in place of it."""
        shape = jnp.asarray(self.shape)
        return self.mean, self.rate / jnp.where(shape > 1, shape - 1, shape)

    def plugged(self) -> tuple[jax.Array, jax.Array]:
        """The mean line, and the inverse of the expected precision of the response."""
        return self.mean, jnp.asarray(self.rate) / self.shape

    @property
    def whitener(self) -> jax.Array:
        """W (..., P + 1, P + 1) with WᵀW the inverse of the precision."""
        return numerics.inverse_lower(numerics.cholesky(jnp.asarray(self.precision)))

    def kl(self, other: "NormalInverseGamma") -> jax.Array:
        """KL(this ‖ other), summed over components."""
        lead, size, dtype = self.mean.shape[:-1], self.mean.shape[-1], self.mean.dtype
        whole = self.over(lead, size, dtype)
        other, shape = other.over(lead, size, dtype), Full()
        whitener, away = whole.whitener, whole.mean - other.mean
        covariance = shape.precision(whitener)
        logdet = -2 * jnp.sum(jnp.log(jnp.diagonal(whitener, axis1=-2, axis2=-1)), axis=-1)
        other_logdet = -2 * shape.whitener(jnp.asarray(other.precision), size)[1]
        square = jnp.sum(away * shape.precision_times(jnp.asarray(other.precision), away), axis=-1)
        spread = shape.trace(jnp.asarray(other.precision), covariance) - size + logdet + other_logdet
        lines = 0.5 * jnp.sum(spread + square / whole.plugged()[1])
        return lines + GammaPrior(whole.shape, whole.rate).kl(GammaPrior(other.shape, other.rate))

    def sample(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Lines and variances."""
        whole = self.over(self.mean.shape[:-1], self.mean.shape[-1], self.mean.dtype)
        of_variance, of_line = jax.random.split(key)
        variance = whole.rate / jnp.exp(special.draw_log_gamma(of_variance, jnp.asarray(whole.shape)))
        noise = jax.random.normal(of_line, whole.mean.shape, whole.mean.dtype)
        spread = numerics.product(whole.whitener, noise, "...ji,...j->...i")
        return whole.mean + jnp.sqrt(variance)[..., None] * spread, variance

    def log_prob(self, line: jax.Array, variance: jax.Array) -> jax.Array:
        """Log-density, summed over K components: lines (K, P + 1), variances (K,)."""
        size = line.shape[-1]
        full, shape = self.over(line.shape[:-1], size, line.dtype), Full()
        away = line - full.mean
        square = jnp.sum(away * shape.precision_times(jnp.asarray(full.precision), away), axis=-1)
        logdet = 2 * shape.whitener(jnp.asarray(full.precision), size)[1]
        lines = 0.5 * (logdet - size * jnp.log(2 * math.pi * variance) - square / variance)
        a, b = jnp.asarray(full.shape), jnp.asarray(full.rate)
        variances = a * jnp.log(b) - jax.lax.lgamma(a) - (a + 1) * jnp.log(variance) - b / variance
        return jnp.sum(lines + variances)

    def unconstrain(self) -> "NormalInverseGamma":
        """The mean as it is, the precision in log-Cholesky coordinates, logarithms of the rest."""
        return NormalInverseGamma(
            mean=self.mean,
            precision=numerics.covariance_to_real(jnp.asarray(self.precision)),
            shape=jnp.log(self.shape),
            rate=jnp.log(self.rate),
        )

    def constrain(self) -> "NormalInverseGamma":
        """Inverse of `unconstrain`."""
        return NormalInverseGamma(
            mean=self.mean,
            precision=numerics.real_to_covariance(jnp.asarray(self.precision), self.mean.shape[-1]),
            shape=jnp.exp(self.shape),
            rate=jnp.exp(self.rate),
        )

    # Of rows z (P + 1, N) and their responses (N,).

    def slack(self, matrix: jax.Array) -> jax.Array:
        """E[log p(response)] minus the log-density at `plugged`, at most 0: (K, N)."""
        return -0.5 * (special.log_minus_digamma(jnp.asarray(self.shape))[:, None] + self.leverage(matrix))

    def leverage(self, matrix: jax.Array) -> jax.Array:
        """zᵀ precision⁻¹ z of every row: (K, N)."""
        return jnp.sum(jnp.square(numerics.product(self.whitener, matrix, "kij,jn->kin")), axis=1)

    def expected_slack(self, stats: EquationStats) -> jax.Array:
        """sum r slack, over components and the rows behind the statistics."""
        square = Full().trace(Full().precision(self.whitener), stats.gram)
        return -0.5 * jnp.sum(stats.count * special.log_minus_digamma(jnp.asarray(self.shape)) + square)

    def log_predictive(self, matrix: jax.Array, response: jax.Array) -> jax.Array:
        """log E[p(response)], Student's t: (K, N)."""
        mean, variance = self.plugged()
        half = jnp.asarray(self.shape)[:, None]
        scale = variance[:, None] * (1 + self.leverage(matrix))
        square = jnp.square(response[None] - numerics.product(mean, matrix, "kp,pn->kn")) / scale
        gammas = 0.5 * math.log(math.pi) - special.log_beta(half, jnp.full_like(half, 0.5))
        return gammas - 0.5 * jnp.log(2 * math.pi * half * scale) - (half + 0.5) * jnp.log1p(0.5 * square / half)
