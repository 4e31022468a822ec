"""The noise of a linear-Gaussian system's equations, as a posterior has it."""

import math

import jax
import jax.numpy as jnp

from ... import numerics
from ...record import record
from .. import lanewise
from .affine import apply


@record
class Noise:
    """The noise e of one equation, response = coefficients · features + e, at the T' steps that the equation is about.

    means             E e              (T', O, B), or E white where there is a root: e = rootᵀ white
    root                               (O, O), None where means are those of e itself
    counted                            (T', B), whether a step counts; None where all do
    covariance        of e             (O, O, ·), or (O, ·) of its columns alone; a dot is B or 1
    state_covariance  of the states among the features (S, S, ·), None where there are none
    cross_covariance  cov(state, e)    (S, O, ·), likewise

    Covariances are sums over the steps that count.
    """

    means: jax.Array
    root: jax.Array | None
    counted: jax.Array | None
    covariance: jax.Array
    state_covariance: jax.Array | None
    cross_covariance: jax.Array | None

    def surprise(self, covariance: jax.Array) -> jax.Array:
        """-E[log N(e; 0, covariance)], summed over the steps that count: (B,), or (1,) where all sequences have the
        same; covariance (O, O), or variances (O,). Where noise is white, less |E white|² / 2."""
        factor = numerics.cholesky(jnp.diag(covariance) if covariance.ndim == 1 else covariance)
        whitener = numerics.inverse_lower(factor)
        precision = numerics.product(whitener, whitener, "ki,kj->ij")
        steps = jnp.full(1, float(len(self.means)), factor.dtype)
        if self.counted is not None:
            steps = jnp.sum(self.counted, axis=0).astype(factor.dtype)
        size = len(factor) * math.log(2 * math.pi) + 2 * jnp.sum(jnp.log(jnp.diagonal(factor)))
        spread = jnp.diagonal(precision)[:, None] if self.covariance.ndim == 2 else precision[..., None]
        spread = jnp.sum(spread * self.covariance, axis=tuple(range(spread.ndim - 1)))
        if self.root is not None:
            return 0.5 * (steps * size + spread)
        squares = jnp.sum(jnp.square(apply(whitener, self.means)), axis=1)
        return 0.5 * (steps * size + spread + sum_counted(squares, self.counted))


def sum_counted(values: jax.Array, counted: jax.Array | None) -> jax.Array:
    """The sum of values (T, ..., B) over the steps that count."""
    if counted is not None:
        values = jnp.where(counted.reshape(len(counted), *(1,) * (values.ndim - 2), -1), values, 0)
    return lanewise.sum_steps(values)
