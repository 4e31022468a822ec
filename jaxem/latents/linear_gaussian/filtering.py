"""The Kalman filter."""

import jax
import jax.numpy as jnp

from .. import lanewise
from . import parallel as side_by_side
from .elements import Evidence, Filtered, Transition, predicted_mean, predicted_rows, update


def filtered(transition: Transition, evidence: Evidence, parallel: bool) -> Filtered:
    """The moments of every state given the steps up to its own; parallel: by an associative scan over the steps."""
    return side_by_side.filter_steps(transition, evidence) if parallel else filter_steps(transition, evidence)[0]


def filter_steps(transition: Transition, evidence: Evidence) -> tuple[Filtered, tuple[jax.Array, jax.Array]]:
    """The same, step by step; also the root and the mean predicted for the step after the last."""
    lanes, states = evidence.values.shape[-1], transition.matrix.shape[0]
    start = (
        jnp.broadcast_to(transition.start_root[:, :, None], (states, states, evidence.matrix.shape[-1])),
        jnp.broadcast_to(transition.start_mean[:, None], (states, lanes)),
    )

    def step(carry: tuple[jax.Array, jax.Array], at: tuple) -> tuple[tuple[jax.Array, jax.Array], tuple]:
        root, mean = carry
        matrix, values, shift, begins = at
        posterior, after, log_prob, half_logdet = update(root, mean, matrix, values)
        following = lanewise.triangular(jnp.concatenate(predicted_rows(transition, posterior, begins)))
        found = (after, posterior, mean, log_prob, half_logdet)
        return (following, predicted_mean(transition, after, shift, begins)), found

    ahead = (_next(transition.shift), _next(transition.starts))
    last, found = jax.lax.scan(step, start, (evidence.matrix, evidence.values, *ahead))
    means, roots, predicted, log_prob, half_logdet = found
    return Filtered(
        means=means, roots=roots, predicted=predicted, log_prob=log_prob + evidence.constant, half_logdet=half_logdet
    ), last


def _next(x: jax.Array | None) -> jax.Array | None:
    """What belongs to the next step; of the last, anything."""
    return None if x is None else jnp.roll(x, -1, axis=0)
