"""Mixing weights broken off a stick: those of a truncated Dirichlet process."""

from typing import Any

import jax
import jax.numpy as jnp

from .. import capabilities, numerics, parameters, tree
from ..priors import Beta
from ..protocols import Data
from ..record import record, static
from .conjugacy import draw


@capabilities.completed("part")
@record
class Sticks:
    """Weights w_k = v_k prod_j<k (1 - v_j), (K,), with v_K = 1; their statistics are expected counts (K,).

    prior: a Beta on every v_k, k < K; Beta(1, concentration) is a Dirichlet process, truncated at K.
    shape: (K,).

    As a gate it looks at no row. Under `Variational` its hyperparameters are a Beta of a, b (K - 1,).
    Blei & Jordan (2006), Variational inference for Dirichlet process mixtures, Bayesian Analysis 1; Ishwaran & James
    (2001), Gibbs sampling methods for stick-breaking priors, JASA 96.
    """

    prior: Beta
    shape: tuple[int, ...] | None = static(default=None)

    supports = staticmethod(parameters.simplex)

    def m_step(self, counts: jax.Array) -> jax.Array:
        """Weights of the v that are likeliest."""
        return self.given(self.prior.posterior_mode(_broken(counts)))

    def q_function(self, p: jax.Array, counts: jax.Array) -> jax.Array:
        """sum counts log p."""
        return _expectation(counts, numerics.safe_log(p))

    def log_prior(self, p: jax.Array) -> jax.Array:
        """Log-density of the v that the weights are made of."""
        here, later = _broken(p)
        return self.prior.log_prob(numerics.safe_divide(here, here + later))

    def degenerate(self, counts: jax.Array) -> jax.Array:
        """Nothing (0,) collapses."""
        return jnp.zeros(0, bool)

    def num_parameters(self, p: jax.Array) -> int:
        return p.size - 1

    def unconstrain(self, p: jax.Array) -> jax.Array:
        """Logits of v, (K - 1,)."""
        return numerics.simplex_to_real(p)

    def constrain(self, theta: jax.Array) -> jax.Array:
        """Inverse of `unconstrain`."""
        return numerics.real_to_simplex(theta)

    # A gate that looks at no row.

    def log_prob(self, p: jax.Array, x: Data) -> jax.Array:
        """log p(component k), the same for every row: (K, 1)."""
        return numerics.safe_log(p)[:, None]

    def stats(self, p: jax.Array, x: Data, responsibilities: jax.Array) -> jax.Array:
        """Expected rows of every component: responsibilities (K, N) -> (K,)."""
        return jnp.sum(responsibilities, axis=1)

    def pooled(self, x: Data, weights: jax.Array | None, num_components: int) -> jax.Array:
        """All components alike: (K,)."""
        return jnp.full(num_components, 1 / num_components, tree.float_dtype(x))

    def floats_per_row(self, p: jax.Array) -> int:
        return 0

    # What follows from the conjugate prior.

    def conjugate_of(self) -> Beta:
        """The prior."""
        return self.prior

    def posterior(self, counts: jax.Array) -> Beta:
        """a and b (K - 1,): what came off the stick at each place, and what was left of it then."""
        return self.prior.posterior(_broken(counts))

    def pooled_posterior(self, x: Data, weights: jax.Array | None, num_components: int) -> Beta:
        """All components alike."""
        return self.posterior(tree.total_weight(x, weights) * self.pooled(x, None, num_components))

    draw = draw

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
        return _expectation(counts, _expected_logs(q))

    def log_expected_prob(self, q: Beta, x: Data) -> jax.Array:
        """log E[w]: (K, 1)."""
        return self.log_prob(self.plugged(q), x)


def _broken(counts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of counts (K,), those of all but the last, and for each of these the sum of the later ones: (K - 1,)."""
    later = jnp.flip(jnp.cumsum(jnp.flip(counts)))[1:]
    return counts[:-1], later


def _expected_logs(q: Beta) -> jax.Array:
    off, left = q.expected_logs()
    none = jnp.zeros_like(off[:1])
    return jnp.concatenate([off, none]) + jnp.concatenate([none, jnp.cumsum(left)])


def _expectation(counts: jax.Array, logs: jax.Array) -> Any:
    used = counts != 0
    return jnp.sum(jnp.where(used, counts * jnp.where(used, logs, 0), 0))
