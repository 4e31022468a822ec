"""Mixing weights (K,) that are the same for all rows, and their posterior: what `Probabilities` and `Sticks` share.

The functions of this file are their methods, taken in groups, each in the order in which it stands at the end.
"""

from typing import Any

import jax
import jax.numpy as jnp

from .. import numerics, tree
from ..protocols import Data
from .conjugacy import draw


def degenerate(self: Any, counts: jax.Array) -> jax.Array:
    """Nothing (0,) here collapses: a probability of 0 is as good as another."""
    return jnp.zeros(0, bool)


def q_function(self: Any, p: jax.Array, counts: jax.Array) -> jax.Array:
    """sum counts log p."""
    return expectation(counts, numerics.safe_log(jnp.where(counts != 0, p, 1)))


def log_prob(self: Any, p: jax.Array, x: Data) -> jax.Array:
    """log p(component k), the same for every row: (K, 1)."""
    return numerics.safe_log(p)[:, None]


def stats(self: Any, p: jax.Array, x: Data, responsibilities: jax.Array) -> jax.Array:
    """Expected rows of every component: responsibilities (K, N) -> (K,)."""
    # As a product, which reads many rows at a time where a sum along them does not.
    return numerics.product(responsibilities, jnp.ones_like(responsibilities[0]), "kn,n->k")


def pooled(self: Any, x: Data, weights: jax.Array | None, num_components: int) -> jax.Array:
    """All components alike: (K,)."""
    return jnp.full(num_components, 1 / num_components, tree.float_dtype(x))


def floats_per_row(self: Any, p: jax.Array) -> int:
    """No temporaries."""
    return 0


def pooled_posterior(self: Any, x: Data, weights: jax.Array | None, num_components: int) -> Any:
    """The posterior where all components are alike."""
    return self.posterior(tree.total_weight(x, weights) * self.pooled(x, None, num_components))


def log_expected_prob(self: Any, q: Any, x: Data) -> jax.Array:
    """log E[p(component k)]: (K, 1)."""
    return self.log_prob(self.plugged(q), x)


def expectation(counts: jax.Array, logs: jax.Array) -> jax.Array:
    """sum counts logs, where a count of 0 adds nothing, whatever its logarithm."""
    used = counts != 0
    return jnp.sum(jnp.where(used, counts * jnp.where(used, logs, 0), 0))


table = degenerate, q_function
gate = log_prob, stats, pooled, floats_per_row
posteriors = pooled_posterior, log_expected_prob, draw
