"""One categorical latent a row: the posterior over components."""

import jax

from .. import numerics
from ..record import record


@record
class Exact:
    """Take the exact posterior of the latents (the E-step of Dempster, Laird & Rubin 1977)."""


def infer(log_joint: jax.Array, expect: Exact) -> tuple[jax.Array, jax.Array]:
    """log p(z = k, x_n) (K, N) -> responsibilities p(z = k | x_n) (K, N), log p(x_n) (N,).

    Raises TypeError for an `expect` that a categorical latent does not know.
    """
    if not isinstance(expect, Exact):
        raise TypeError(f"expect must be Exact() for a categorical latent; got {expect!r}")
    return numerics.normalize(log_joint)
