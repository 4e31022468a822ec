"""The weights of a regression as one Gaussian latent of the whole data, w ~ N(0, diag(prior)⁻¹)."""

import jax
import jax.numpy as jnp

from ... import numerics
from ...record import record


@record
class WeightsPosterior:
    """w | y ~ N(mean (P,), covariance (P, P)); evidence: (1,), log p(y) of the whole data, or a bound of it."""

    mean: jax.Array
    covariance: jax.Array
    evidence: jax.Array


@record
class Predictive:
    """Distribution of new responses: mean (N,), and variance (N,), noise included."""

    mean: jax.Array
    variance: jax.Array


def weights_given(gram: jax.Array, cross: jax.Array, prior: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean and covariance of weights with log-likelihood cross · w - w · gram · w / 2, and half the log-determinant of
    their precision gram + diag(prior): gram (P, P), cross (P,), prior (P,)."""
    precision = gram + jnp.diag(prior)
    scale = jax.lax.rsqrt(jnp.diagonal(precision))
    factor = numerics.cholesky(precision * scale[:, None] * scale[None])
    inverse = numerics.inverse_lower(factor) * scale[None]
    covariance = numerics.product(inverse, inverse, "kp,kq->pq")
    half_logdet = jnp.sum(jnp.log(jnp.diagonal(factor)) - jnp.log(scale))
    return numerics.product(covariance, cross, "pq,q->p"), covariance, half_logdet
