"""Tables of probabilities: where a chain starts, and the rows of its transitions."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ... import checks, numerics
from ...priors import Dirichlet
from ...record import record


@record(kw_only=False)
class Probabilities:
    """Distributions along the last axis of a table (..., K), with what is said of all of them beforehand.

    prior: of every row; None for none
    support (..., K): where False (0), an entry is no parameter: starts put a zero there, which EM keeps
    """

    prior: Dirichlet | None = None
    support: Any = None

    def within(self, counts: jax.Array) -> jax.Array:
        """Counts of what the support allows."""
        return counts if self.support is None else jnp.where(self.support, counts, 0)

    def counted(self, counts: jax.Array) -> jax.Array:
        """Counts with the prior's pseudo-counts."""
        return counts if self.prior is None else jnp.maximum(counts + self.within(self.prior.pseudo_counts(counts)), 0)

    def maximum(self, counts: jax.Array) -> jax.Array:
        """argmax of `expected_log` + `log_prior`: shares of the counts."""
        counts = self.counted(counts)
        return numerics.safe_divide(counts, jnp.sum(counts, axis=-1, keepdims=True))

    def expected_log(self, probability: jax.Array, counts: jax.Array) -> jax.Array:
        """sum counts log p, 0 log 0 = 0."""
        used = counts != 0
        return jnp.sum(jnp.where(used, counts * numerics.safe_log(jnp.where(used, probability, 1)), 0))

    def log_prior(self, probability: jax.Array) -> jax.Array:
        """Log-density of the prior on the rows, each a distribution on its support; 0 without any."""
        if self.prior is None:
            return jnp.zeros((), probability.dtype)
        extra = self.prior.pseudo_counts(probability)
        inside = jnp.ones(probability.shape, bool) if self.support is None else jnp.asarray(self.support) != 0
        total = jnp.sum(jnp.where(inside, extra + 1, 0), axis=-1)
        normaliser = jax.lax.lgamma(total) - jnp.sum(jnp.where(inside, jax.lax.lgamma(extra + 1), 0), axis=-1)
        return self.expected_log(probability, jnp.where(inside, extra, 0)) + jnp.sum(normaliser)

    def unconstrain(self, probability: jax.Array) -> jax.Array:
        """Continuation ratios: the simplex (..., K) to R^(K-1)."""
        return numerics.simplex_to_real(probability, self.support)

    def constrain(self, theta: jax.Array) -> jax.Array:
        """Inverse of `unconstrain`."""
        return numerics.real_to_simplex(theta, self.support)

    def degrees(self, shape: tuple[int, ...]) -> int:
        """Free parameters of a table of this shape. Without a support no entry is taken for a hard zero."""
        support = np.ones(shape) if self.support is None else np.asarray(self.support)
        return int(np.sum(support != 0)) - int(np.prod(shape[:-1]))


def check_support(name: str, support: Any, shape: tuple[int, ...]) -> None:
    """Raise ValueError for a support of another shape, or one that leaves a row nothing."""
    if support is None or not checks.is_known(support):
        return
    if np.shape(support) != shape or not np.all(np.any(np.asarray(support) != 0, axis=-1)):
        raise ValueError(f"{name} must have shape {shape}, with a nonzero entry in every row; got {support}")


def check_held(name: str, value: Any, shape: tuple[int, ...]) -> None:
    """Raise ValueError for probabilities, to be held fixed, that are no distributions."""
    if value is None or not checks.is_known(value):
        return
    if jnp.shape(value) != shape:
        raise ValueError(f"{name} must have shape {shape}; got {jnp.shape(value)}")
    if np.all(np.isfinite(value)):
        checks.distributions(name, np.atleast_2d(np.asarray(value)))
