"""Tables of probabilities: mixing weights, initial and transition probabilities, values of categorical columns."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import capabilities, checks, numerics, parameters
from ..priors import Dirichlet
from ..protocols import Data
from ..record import record, static
from . import constant


@capabilities.completed("part")
@record
class Probabilities:
    """Distributions p (..., V), each over its last axis; their statistics are expected counts in the same shape.

    prior: a Dirichlet on each of them.
    support: (..., V); where it is False (0), p is 0 and stays so, and counts as no parameter.
    shape: that of the table, where it is known.

    0 log 0 = 0 throughout.
    """

    prior: Dirichlet | None = None
    support: Any = None
    shape: tuple[int, ...] | None = static(default=None)

    supports = staticmethod(parameters.simplex)

    def m_step(self, counts: jax.Array) -> jax.Array:
        """Shares of the counts; with a prior, of counts + concentration - 1: the posterior mode."""
        if self.prior is not None:
            return self.prior.posterior_mode(counts, self.support)
        return numerics.safe_divide(counts, jnp.sum(counts, axis=-1, keepdims=True))

    def with_prior(self, counts: jax.Array) -> jax.Array:
        """Counts with the prior's pseudo-counts."""
        if self.prior is None:
            return counts
        return jnp.maximum(counts + self.on_support(self.prior.pseudo_counts(counts)), 0)

    def on_support(self, counts: jax.Array) -> jax.Array:
        """Counts, those outside of the support struck out."""
        return counts if self.support is None else jnp.where(self.support, counts, 0)

    def log_prior(self, p: jax.Array) -> jax.Array:
        """Log-density of the prior, normalised on the support of each distribution; 0 without one."""
        return jnp.zeros((), p.dtype) if self.prior is None else self.prior.log_prob(p, self.support)

    def check_support(self, name: str) -> None:
        """Raise ValueError for a support of another shape than the table's, or one that leaves a row nothing."""
        if self.support is None or not checks.is_known(self.support):
            return
        if np.shape(self.support) != self.shape or not np.all(np.any(np.asarray(self.support) != 0, axis=-1)):
            raise ValueError(
                f"{name} must have shape {self.shape}, with a nonzero entry in every row; got {self.support}"
            )

    def unconstrain(self, p: jax.Array) -> jax.Array:
        """Log continuation ratios (..., V - 1)."""
        return numerics.simplex_to_real(p, self.support)

    def constrain(self, theta: jax.Array) -> jax.Array:
        """Inverse of `unconstrain`."""
        return numerics.real_to_simplex(theta, self.support)

    def num_parameters(self, p: jax.Array) -> int:
        """Free probabilities: of every distribution one fewer than its support has."""
        inside = np.broadcast_to(1 if self.support is None else np.asarray(self.support) != 0, p.shape)
        return int(np.sum(inside)) - int(np.prod(p.shape[:-1]))

    def check_value(self, name: str, value: Any) -> None:
        """Raise ValueError for probabilities, to be held fixed, that are no distributions of the table's shape."""
        if not checks.is_known(value):
            return
        if jnp.shape(value) != self.shape:
            raise ValueError(f"{name} must have shape {self.shape}; got {jnp.shape(value)}")
        if np.all(np.isfinite(value)):
            checks.distributions(name, np.atleast_2d(np.asarray(value)))

    degenerate, q_function = constant.table
    log_prob, stats, pooled, floats_per_row = constant.gate  # as mixing weights (K,)

    # What follows from the conjugate prior.

    def conjugate_of(self) -> Dirichlet:
        """The prior; without one, that whose density is flat."""
        return Dirichlet(1.0) if self.prior is None else self.prior

    def posterior(self, counts: jax.Array) -> Dirichlet:
        """Concentrations (..., V), 0 outside of the support."""
        return self.conjugate_of().posterior(counts, self.support)

    pooled_posterior, log_expected_prob, draw = constant.posteriors

    def given(self, p: jax.Array) -> jax.Array:
        """Probabilities are the parameters."""
        return p

    def plugged(self, q: Dirichlet) -> jax.Array:
        """The mean."""
        return q.expected()

    def expected_log_prob(self, q: Dirichlet, x: Data) -> jax.Array:
        """E[log p(component k)]: (K, 1)."""
        return q.expected_log()[:, None]

    def expected_q(self, q: Dirichlet, counts: jax.Array) -> jax.Array:
        """sum counts E[log p]."""
        return constant.expectation(counts, q.expected_log())
