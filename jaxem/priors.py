"""Named conjugate priors. Each is pseudo-statistics: what an M-step adds to the statistics of the data."""

import jax
import jax.numpy as jnp

from . import numerics, special
from .record import record


def _times_log(exponent: jax.Array, value: jax.Array) -> jax.Array:
    """exponent x log(value), 0 wherever the exponent is 0."""
    used = exponent != 0
    return jnp.where(used, exponent * numerics.safe_log(jnp.where(used, value, 1)), 0)


@record(kw_only=False)
class Dirichlet:
    """Dirichlet prior on probabilities.

    concentration: a scalar or (K,). 1 is flat, so that the M-step is maximum likelihood; below 1 the density has no
        mode in the interior.

    Its log-density is normalised.
    """

    concentration: jax.Array | float

    def pseudo_counts(self, counts: jax.Array) -> jax.Array:
        """concentration - 1, in the shape of the counts."""
        return jnp.broadcast_to(jnp.asarray(self.concentration, counts.dtype) - 1, counts.shape)

    @jax.jit
    def log_prob(self, probabilities: jax.Array) -> jax.Array:
        """Log-density of one distribution (K,); 0 log 0 = 0."""
        extra = self.pseudo_counts(probabilities)
        normaliser = jax.lax.lgamma(jnp.sum(extra + 1)) - jnp.sum(jax.lax.lgamma(extra + 1))
        return jnp.sum(_times_log(extra, probabilities)) + normaliser


@record(kw_only=False)
class Beta:
    """Beta prior on every probability, as if a - 1 successes and b - 1 failures had been seen before.

    a, b: scalars, or (D,).
    """

    a: jax.Array | float
    b: jax.Array | float

    def pseudo_counts(self, probability: jax.Array) -> tuple[jax.Array, jax.Array]:
        """a - 1 and b - 1, in the shape of the probabilities."""
        one, two = (jnp.asarray(value, probability.dtype) - 1 for value in (self.a, self.b))
        return jnp.broadcast_to(one, probability.shape), jnp.broadcast_to(two, probability.shape)

    def log_prob(self, probability: jax.Array) -> jax.Array:
        """Log-density, summed over all probabilities."""
        successes, failures = self.pseudo_counts(probability)
        normaliser = special.log_beta(successes + 1, failures + 1)
        return jnp.sum(_times_log(successes, probability) + _times_log(failures, 1 - probability) - normaliser)


@record(kw_only=False)
class GammaPrior:
    """Gamma prior on every rate, as if shape - 1 events had been seen in an exposure (or time) of `rate`.

    shape, rate: scalars, or (D,).
    """

    shape: jax.Array | float
    rate: jax.Array | float

    def pseudo_counts(self, values: jax.Array) -> tuple[jax.Array, jax.Array]:
        """shape - 1 events and an exposure of rate, in the shape of the rates."""
        events, exposure = jnp.asarray(self.shape, values.dtype) - 1, jnp.asarray(self.rate, values.dtype)
        return jnp.broadcast_to(events, values.shape), jnp.broadcast_to(exposure, values.shape)

    def log_prob(self, values: jax.Array) -> jax.Array:
        """Log-density, summed over all rates."""
        events, exposure = self.pseudo_counts(values)
        normaliser = (events + 1) * jnp.log(exposure) - jax.lax.lgamma(events + 1)
        return jnp.sum(_times_log(events, values) - exposure * values + normaliser)
