"""Normal equations: least squares from sums of products."""

import jax
import jax.numpy as jnp

from .elementary import product
from .factorisations import floored_cholesky, inverse_lower


def least_squares(gram: jax.Array, cross: jax.Array) -> jax.Array:
    """gram⁻¹ cross (..., P), by columns scaled to unit length; one that depends on those before it gets about 0."""
    scale, inverse = _whitening(gram)
    whitened = jnp.sum(inverse * (scale * cross)[..., None, :], axis=-1)
    return scale * jnp.sum(inverse * whitened[..., :, None], axis=-2)


def least_squares_together(gram: jax.Array, cross: jax.Array) -> jax.Array:
    """`least_squares` of many responses on the same features: gram (..., P, P), cross (..., O, P) -> (..., O, P)."""
    scale, inverse = _whitening(gram)
    whitened = product(scale[..., None, :] * cross, inverse, "...oq,...pq->...op")
    return scale[..., None, :] * product(whitened, inverse, "...op,...pq->...oq")


def _whitening(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The scale (..., P) of columns, and the inverse of the Cholesky factor (..., P, P) of the matrix so scaled."""
    scale = jax.lax.rsqrt(jnp.diagonal(gram, axis1=-2, axis2=-1))
    floor = jnp.full_like(scale, 16 * gram.shape[-1] * jnp.finfo(gram.dtype).eps)
    factor, _ = floored_cholesky(gram * scale[..., :, None] * scale[..., None, :], floor)
    return scale, inverse_lower(factor)
