"""A chain with its observations."""

import jax
import jax.numpy as jnp

from ... import numerics
from ...record import record


@record
class Chain:
    """Chains with their observations.

    initial (K,): p(z_1 = k)
    transition (K, K): p(z_t+1 = j | z_t = i), row i, column j
    log_likelihood (T, K[, L]): log p(x_t | z_t = k), 0 where nothing is observed
    linked (T - 1[, L]): whether step t + 1 goes on from step t; None where all do

    Lanes with a chain of their own each: initial (K, L), transition (K, K, L).
    """

    initial: jax.Array
    transition: jax.Array
    log_likelihood: jax.Array
    linked: jax.Array | None = None

    @property
    def num_states(self) -> int:
        """K."""
        return self.initial.shape[0]

    @property
    def log_initial(self) -> jax.Array:
        """log p(z_1 = k), in a shape that broadcasts against (K[, L])."""
        return self._beside_lanes(numerics.safe_log(self.initial), 1)

    @property
    def log_transition(self) -> jax.Array:
        """log p(z_t+1 = j | z_t = i), in a shape that broadcasts against (K, K[, L])."""
        return self._beside_lanes(numerics.safe_log(self.transition), 2)

    def _beside_lanes(self, values: jax.Array, axes: int) -> jax.Array:
        """Values with this many axes of states, and one for the lanes if the chain has them."""
        lanes = self.log_likelihood.ndim - 2
        return values if values.ndim > axes else values.reshape(*values.shape, *(1,) * lanes)

    def tempered(self, temperature: jax.Array) -> "Chain":
        """p(z, x)^(1/T), which is no distribution: rows of transitions do not sum to 1."""

        def power(probability: jax.Array) -> jax.Array:
            return jnp.exp(numerics.safe_log(probability) / temperature)

        return Chain(
            initial=power(self.initial),
            transition=power(self.transition),
            log_likelihood=self.log_likelihood / temperature,
            linked=self.linked,
        )
