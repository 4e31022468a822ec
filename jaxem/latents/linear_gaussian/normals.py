"""Normal distributions of latents, one a lane, lanes last: entropies, divergences, and those that users write down."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ... import checks
from .. import lanewise
from .system import StateMoments


def entropy(covariance: jax.Array) -> jax.Array:
    """Entropies (B,) in nats of normal distributions with covariances (S, S, B)."""
    return 0.5 * len(covariance) * (1 + math.log(2 * math.pi)) + lanewise.inverse(covariance)[1]


def kl(away: jax.Array, covariance: jax.Array, other: jax.Array) -> jax.Array:
    """KL(N(m + away, covariance) ‖ N(m, other)) in nats: (S, B), (S, S, B), (S, S, B) -> (B,)."""
    precision, half_logdet = lanewise.inverse(other)
    square = jnp.sum(away * lanewise.times(precision, away), axis=0)
    spread = jnp.sum(precision * covariance, axis=(0, 1)) - len(away)
    return 0.5 * (square + spread) + half_logdet - lanewise.inverse(covariance)[1]


def written(q: Any, like: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Means (S, B), with shape and dtype of `like`, and covariances (S, S, B) of a distribution that a user gave.

    Raises TypeError for anything but `StateMoments`, ValueError for other shapes, or for concrete covariances that
    are not positive definite.
    """
    if not isinstance(q, StateMoments):
        raise TypeError(
            "q must be a StateMoments(means, covariances), as the model's posterior(params, x) gives it, or what its "
            f"infer(params, x) returned at any parameters; got {checks.told(q)}"
        )
    means, covariances = jnp.asarray(q.means), jnp.asarray(q.covariances)
    (size, units), dtype = like.shape, like.dtype
    for name, value, shape in (
        ("means", means, (units, size)),
        ("covariances", covariances, (units, size, size)),
    ):
        if value.shape != shape:
            raise ValueError(f"q.{name} must have shape {shape}; got {value.shape}")
    if checks.is_concrete(covariances):
        lowest = np.min(np.linalg.eigvalsh(np.asarray(covariances, float)))
        if not lowest > 0:
            raise ValueError(f"q.covariances must be positive definite; got an eigenvalue of {lowest:.6g}")
    return means.T.astype(dtype), jnp.moveaxis(covariances, 0, -1).astype(dtype)
