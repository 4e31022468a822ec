"""Starts of models with few factors: PPCA's closed form, with all data as one component."""

import jax
import jax.numpy as jnp

from .. import numerics

# At a start, the noise has at least this share of every column's variance, and a factor's variance is at least this
# share of the noise: EM does not move loadings of 0.
_LEAST = 0.05

# Rounds of orthogonal iteration.
_ROUNDS = 4


def principal_start(
    x: jax.Array, weights: jax.Array | None, num_latents: int, by_column: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean (D,), loadings (D, Q) and noise, (D,) by column or else (), of rows (N, D) without a D x D matrix.

    Tipping & Bishop (1999), equations 7 and 8, columns standardised where noise is by column. The leading directions
    are those of a few orthogonal iterations from a fixed draw: near to the exact ones, which is enough for a start.
    """
    each = jnp.ones(x.shape[0], x.dtype) if weights is None else weights.astype(x.dtype)
    each = (each / jnp.sum(each))[:, None]
    mean = jnp.sum(each * x, axis=0)
    centred = x - mean[None]
    variance = jnp.sum(each * jnp.square(centred), axis=0)
    eps, energy = jnp.finfo(x.dtype).eps, variance + jnp.square(mean)
    variance = jnp.maximum(variance, jnp.where(energy > 0, eps**2 * energy, eps**2))
    scale = jnp.sqrt(variance) if by_column else jnp.ones_like(variance)
    spread = variance / jnp.square(scale)
    basis, moments = _leading(centred / scale[None], each, num_latents)
    rest = jnp.maximum(jnp.sum(spread) - jnp.trace(moments), 0) / (len(mean) - num_latents)
    eye = jnp.eye(num_latents, dtype=x.dtype)
    root, _ = numerics.floored_cholesky(moments - rest * eye, jnp.full(num_latents, _LEAST * rest))
    loadings = numerics.product(basis, root, "dq,qr->dr")
    left = jnp.maximum(spread - jnp.sum(jnp.square(loadings), axis=1), _LEAST * spread) * jnp.square(scale)
    return mean, scale[:, None] * loadings, left if by_column else jnp.mean(left)


def _leading(points: jax.Array, shares: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Leading directions (D, Q) of centred points (N, D) of shares (N, 1), and second moments (Q, Q) along them."""
    basis = jax.random.normal(jax.random.key(0), (points.shape[1], count), points.dtype)
    for _ in range(_ROUNDS):
        along = numerics.product(points, _orthonormal(basis), "nd,dq->nq")
        basis = numerics.product(points, shares * along, "nd,nq->dq")
    basis = _orthonormal(basis)
    along = numerics.product(points, basis, "nd,dq->nq")
    return basis, numerics.product(shares * along, along, "nq,nr->qr")


def _orthonormal(basis: jax.Array) -> jax.Array:
    """An orthonormal basis (D, Q) of the same directions; linearly dependent ones become small instead."""
    basis = basis / jnp.maximum(jnp.sqrt(jnp.sum(jnp.square(basis), axis=0)), jnp.finfo(basis.dtype).tiny)[None]
    gram = numerics.product(basis, basis, "dq,dr->qr")
    floor = jnp.full(len(gram), 16 * len(gram) * jnp.finfo(basis.dtype).eps, basis.dtype)
    factor, _ = numerics.floored_cholesky(gram, floor)
    return numerics.product(basis, numerics.inverse_lower(factor), "dq,rq->dr")
