"""Predictions of a mixture from features alone: methods of mixtures of regressions, with a gate or without."""

from typing import Any

import jax
import jax.numpy as jnp

from .. import capabilities, checks, tree
from ..data import Gated
from ..protocols import Params


def gate_probabilities(self: Any, params: Params, features: jax.Array) -> jax.Array:
    """p(component k | features), before any response is seen: (N, K).

    features (N, P) or (N,): those of the gate; without a gate any, which do not enter.
    """
    return jnp.exp(_log_weights(self, params, features)).T


def mean(self: Any, params: Params, features: jax.Array, gate_features: jax.Array | None = None) -> jax.Array:
    """E[y | features] = sum_k p(k | features) E[y | features, k], the predictive mean: (N,).

    gate_features: those of the gate, where it has its own.
    Raises TypeError for components that are no regressions.
    """
    if not capabilities.states(self.family, "mean"):
        raise TypeError(f"a mean given features is one of regressions; the components are {self.family!r}")
    of_gate = features if gate_features is None else gate_features
    return jnp.sum(jnp.exp(_log_weights(self, params, of_gate)) * self.family.mean(params.components, features), axis=0)


def _log_weights(self: Any, params: Params, features: jax.Array) -> jax.Array:
    """log p(component k | features): (K, N)."""
    features = checks.columns("features", features)
    weights = self.parts["weights"].log_prob(params.weights, Gated(None, features))
    return jnp.broadcast_to(weights, (weights.shape[0], tree.num_rows(features)))
