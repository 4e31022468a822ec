"""Mixing weights broken off a stick: those of a truncated Dirichlet process."""

import jax
import jax.numpy as jnp

from .. import capabilities, numerics, parameters
from ..priors import Beta
from ..protocols import Data
from ..record import record, static
from . import constant


@capabilities.completed("part")
@record
class Sticks:
    """Weights w_k = v_k prod_j<k (1 - v_j), (K,), with v_K = 1; their statistics are expected counts (K,).

    prior: a Beta on every v_k, k < K; Beta(1, concentration) is a Dirichlet process, truncated at K.
    shape: (K,).

    As a gate it is the same for all rows. Under `Variational` its hyperparameters are a Beta of a, b (K - 1,).
    Blei & Jordan (2006), Variational inference for Dirichlet process mixtures, Bayesian Analysis 1; Ishwaran & James
    (2001), Gibbs sampling methods for stick-breaking priors, JASA 96.
    """

    prior: Beta
    shape: tuple[int, ...] | None = static(default=None)

    supports = staticmethod(parameters.simplex)

    def m_step(self, counts: jax.Array) -> jax.Array:
        """Weights (K,) from the posterior mode of v."""
        return self.given(self.prior.posterior_mode(_broken(counts)))

    def log_prior(self, p: jax.Array) -> jax.Array:
        """Log-density of the v that the weights are made of."""
        here, later = _broken(p)
        return self.prior.log_prob(numerics.safe_divide(here, here + later))

    def num_parameters(self, p: jax.Array) -> int:
        return p.size - 1

    def unconstrain(self, p: jax.Array) -> jax.Array:
        """Logits of v, (K - 1,)."""
        return numerics.simplex_to_real(p)

    def constrain(self, theta: jax.Array) -> jax.Array:
        """Inverse of `unconstrain`."""
        return numerics.real_to_simplex(theta)

    degenerate, q_function = constant.table
    log_prob, stats, pooled, floats_per_row = constant.gate

    # What follows from the conjugate prior.

    def conjugate_of(self) -> Beta:
        """The prior."""
        return self.prior

    def posterior(self, counts: jax.Array) -> Beta:
        """a and b (K - 1,): the prior's, plus the counts of component k, and those of all later ones."""
        return self.prior.posterior(_broken(counts))

    pooled_posterior, log_expected_prob, draw = constant.posteriors

    def given(self, v: jax.Array) -> jax.Array:
        """Weights (K,) from v (K - 1,)."""
        one = jnp.ones_like(v[:1])
        left = jnp.concatenate([one, jnp.cumprod(1 - v)])
        return left * jnp.concatenate([v, one])

    def plugged(self, q: Beta) -> jax.Array:
        """The mean, since the v are independent."""
        return self.given(q.expected())

    def expected_log_prob(self, q: Beta, x: Data) -> jax.Array:
        """E[log w]: (K, 1)."""
        return _expected_logs(q)[:, None]

    def expected_q(self, q: Beta, counts: jax.Array) -> jax.Array:
        """sum counts E[log w]."""
        return constant.expectation(counts, _expected_logs(q))


def _broken(counts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of counts (K,), those of all but the last, and for each of these the sum of the later ones: (K - 1,)."""
    later = jnp.flip(jnp.cumsum(jnp.flip(counts)))[1:]
    return counts[:-1], later


def _expected_logs(q: Beta) -> jax.Array:
    off, left = q.expected_logs()
    none = jnp.zeros_like(off[:1])
    return jnp.concatenate([off, none]) + jnp.concatenate([none, jnp.cumsum(left)])
