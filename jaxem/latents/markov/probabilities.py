"""Tables of probabilities: where a chain starts, and the rows of its transitions."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ... import checks, numerics, parameters
from ...priors import Dirichlet
from ...record import record, static
from .stationary import stationary_distribution, stationary_maximum


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


@record(kw_only=False)
class Tables:
    """Where a chain starts (K,), and how it moves on (K, K), rows from.

    initial, transition: what is said of both beforehand
    stationary: whether the start is the stationary distribution of the transitions, and nothing of its own
    """

    initial: Probabilities
    transition: Probabilities
    stationary: bool = static(default=False)

    def start(self, initial: jax.Array, transition: jax.Array) -> jax.Array:
        """p(z_1 = k) (K,)."""
        return stationary_distribution(transition) if self.stationary else initial

    def maximum(self, starts: jax.Array, moves: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Both tables at the argmax of `expected_log` + `log_prior`."""
        if not self.stationary:
            return self.initial.maximum(starts), self.transition.maximum(moves)
        transition = stationary_maximum(self.transition.counted(moves), starts)
        return stationary_distribution(transition), transition

    def expected_log(self, initial: jax.Array, transition: jax.Array, starts: jax.Array, moves: jax.Array) -> jax.Array:
        """sum starts log p(start) + sum moves log p(move)."""
        start = self.start(initial, transition)
        return self.initial.expected_log(start, starts) + self.transition.expected_log(transition, moves)

    def log_prior(self, initial: jax.Array, transition: jax.Array) -> jax.Array:
        """Log-density of the priors on both."""
        return self.initial.log_prior(initial) + self.transition.log_prior(transition)

    def unconstrain(self, initial: jax.Array, transition: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Coordinates of both; a stationary start has none."""
        start = jnp.zeros((0,), initial.dtype) if self.stationary else self.initial.unconstrain(initial)
        return start, self.transition.unconstrain(transition)

    def constrain(self, initial: jax.Array, transition: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Inverse of `unconstrain`."""
        table = self.transition.constrain(transition)
        return stationary_distribution(table) if self.stationary else self.initial.constrain(initial), table

    def degrees(self, count: int) -> dict[str, int]:
        """Free parameters of both, of K states, by name."""
        start = 0 if self.stationary else self.initial.degrees((count,))
        return {"initial": start, "transition": self.transition.degrees((count, count))}

    def params_like(self, count: int, dtype: Any) -> tuple[Any, Any]:
        """The shapes of both, for K states."""
        return parameters.like((count,), dtype), parameters.like((count, count), dtype)

    def check(self, count: int) -> None:
        """Raise ValueError for what cannot be said of K states."""
        if self.stationary and (self.initial.prior is not None or self.initial.support is not None):
            raise ValueError("stationary leaves no initial distribution to put a prior or a support on: leave it out")
        for name, support, shape in (
            ("initial_support", self.initial.support, (count,)),
            ("transition_support", self.transition.support, (count, count)),
        ):
            if support is None or not checks.is_known(support):
                continue
            if np.shape(support) != shape or not np.all(np.any(np.asarray(support) != 0, axis=-1)):
                raise ValueError(f"{name} must have shape {shape}, with a nonzero entry in every row; got {support}")

    def check_held(self, count: int, values: dict[str, Any]) -> None:
        """Raise ValueError for probabilities, to be held fixed, that are no distributions of K states."""
        for name, shape in (("initial", (count,)), ("transition", (count, count))):
            value = values.get(name)
            if value is None or not checks.is_known(value):
                continue
            if jnp.shape(value) != shape:
                raise ValueError(f"{name} must have shape {shape}; got {jnp.shape(value)}")
            if np.all(np.isfinite(value)):
                checks.distributions(name, np.atleast_2d(np.asarray(value)))
