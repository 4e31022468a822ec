"""One categorical latent a row: the posterior over components."""

import jax

from .. import numerics
from ..record import record


@record
class Exact:
    """Take the exact posterior of the latents (the E-step of Dempster, Laird & Rubin 1977)."""


@record
class Hard:
    """Give every row to its likeliest latents whole: classification EM (Celeux & Govaert 1992).

    The objective is then the classification likelihood, sum_n max_z log p(x_n, z). Of equally
    likely components the first is taken.
    """


def infer(log_joint: jax.Array, expect: Exact | Hard) -> tuple[jax.Array, jax.Array]:
    """log p(z = k, x_n) (K, N) -> responsibilities p(z = k | x_n) (K, N), log p(x_n) (N,).

    Under Hard() the responsibilities are 0 or 1, and in place of log p(x_n) stands max_k log p(k, x_n).
    Raises TypeError for an `expect` that a categorical latent does not know.
    """
    if isinstance(expect, Exact):
        return numerics.normalize(log_joint)
    if isinstance(expect, Hard):
        return numerics.first_largest(log_joint)
    raise TypeError(f"expect must be Exact() or Hard() for a categorical latent; got {expect!r}")
