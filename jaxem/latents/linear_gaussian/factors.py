"""One linear-Gaussian latent a row: factors z ~ N(0, I_Q), and x = mean + loadings z + noise, noise ~ N(0, diag).

Woodbury's identity all through: of D columns and Q factors nothing of size D x D is made.
"""

import jax
import jax.numpy as jnp

from ... import numerics
from ...record import record


@record
class Factors:
    """What complete rows tell of their factors: z | x ~ N(projection (x - mean), covariance).

    projection: (..., Q, D), covariance loadingsᵀ noise⁻¹.
    covariance: (..., Q, Q), (I + loadingsᵀ noise⁻¹ loadings)⁻¹, the same for all rows.
    half_logdet: (...), log det(loadings loadingsᵀ + noise) / 2.
    """

    projection: jax.Array
    covariance: jax.Array
    half_logdet: jax.Array


def factors(loadings: jax.Array, noise: jax.Array) -> Factors:
    """From loadings (..., D, Q) and noise variances (..., D)."""
    scale = jnp.sqrt(noise)
    whitened = loadings / scale[..., None]
    eye = jnp.eye(loadings.shape[-1], dtype=loadings.dtype)
    gram = numerics.product(whitened, whitened, "...dq,...dr->...qr")
    # Pivots are at least 1 but for rounding, which is large where one factor is far above the noise and another is not.
    factor, _ = numerics.floored_cholesky(gram + numerics.to_rank(eye, gram.ndim), jnp.ones_like(gram[..., 0]))
    inverse = numerics.inverse_lower(factor)
    covariance = numerics.product(inverse, inverse, "...kq,...kr->...qr")
    projection = numerics.product(covariance, whitened / scale[..., None], "...qr,...dr->...qd")
    logs = jnp.log(jnp.diagonal(factor, axis1=-2, axis2=-1))
    return Factors(
        projection=projection,
        covariance=covariance,
        half_logdet=jnp.sum(jnp.log(scale), axis=-1) + jnp.sum(logs, axis=-1),
    )


def square(loadings: jax.Array, noise: jax.Array, means: jax.Array, deviations: jax.Array) -> jax.Array:
    """(x - mean)ᵀ (loadings loadingsᵀ + noise)⁻¹ (x - mean) of rows (..., D, N) with posterior means (..., Q, N).

    As |noise^(-1/2) (x - mean - loadings m)|² + |m|², whose terms all add: a difference of squares would lose what
    loadings far above the noise leave of it.
    """
    left = deviations - numerics.product(loadings, means, "...dq,...qn->...dn")
    return jnp.sum(jnp.square(left) / noise[..., None], axis=-2) + jnp.sum(jnp.square(means), axis=-2)
