"""A linear-Gaussian system and its observations, as recursions take them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ... import numerics
from ...record import record
from ...sequences import Sequences
from .. import lanewise
from . import whitening
from .elements import Filtered, Transition
from .filtering import filtered
from .shared import shared_filter, shared_log_prob, shared_smoother
from .smoothing import smoothed


@record
class System:
    """z_1 ~ N(m, P), z_t = A z_(t-1) + b_t + w_t, y_t = C z_t + d_t + v_t, with process noise w_t ~ N(0, Q) and
    observation noise v_t ~ N(0, R). P and Q may be singular.

    initial_mean         m   (S,)
    initial_covariance   P   (S, S)
    dynamics             A   (S, S)
    dynamics_covariance  Q   (S, S)
    dynamics_shift       b   (B or 1, T, S), the first of a sequence not used
    emission             C   (D, S)
    emission_covariance  R   (D, D), or (D,) where it is diagonal
    emission_shift       d   (B or 1, T, D), None for 0
    """

    initial_mean: jax.Array
    initial_covariance: jax.Array
    dynamics: jax.Array
    dynamics_covariance: jax.Array
    dynamics_shift: jax.Array
    emission: jax.Array
    emission_covariance: jax.Array
    emission_shift: jax.Array | None


def shared_or_per_sequence(shared: Callable, per_sequence: Callable, system: System, x: Sequences) -> Any:
    """One recursion of covariances for all sequences, or one for each, whichever the observations x allow.

    shared, per_sequence: functions of (system, x) whose results have the same shapes.
    """
    if x.lengths is not None or x.ids is not None or x.complete is False:
        return per_sequence(system, x)
    if x.complete:
        return shared(system, x)

    def attempt(system: System, x: Sequences) -> tuple[Any, jax.Array]:
        missing = jnp.isnan(x.values)
        # With missing entries this result is discarded, but its gradient is multiplied by 0 and must be finite.
        known = dataclasses.replace(x, values=jnp.where(missing, 0, x.values), complete=True)
        return shared(system, known), jnp.any(missing)

    return numerics.repaired(attempt, per_sequence, system, x)


def transition_of(system: System, x: Sequences) -> Transition:
    """The chain of states."""
    whole = x.lengths is None and x.ids is None
    return Transition(
        matrix=system.dynamics,
        root=root_of(system.dynamics_covariance),
        start_mean=system.initial_mean,
        start_root=root_of(system.initial_covariance),
        shift=jnp.moveaxis(system.dynamics_shift, 0, -1),
        # Every step of the padding is a start, so that nothing can grow there.
        starts=None if whole else (x.starts() | ~x.inside()).T,
    )


def whitened(system: System, x: Sequences) -> tuple[Transition, whitening.Whitened]:
    """For complete data: the chain, and observations in coordinates in which their noise is white."""
    residuals = x.values if system.emission_shift is None else x.values - system.emission_shift
    white = whitening.whiten(system.emission, system.emission_covariance, jnp.moveaxis(residuals, 0, -1))
    return transition_of(system, x), white


def seen_entries(x: Sequences) -> jax.Array:
    """Which entries (B, T, D) are observed."""
    inside = jnp.broadcast_to(x.inside()[..., None], x.values.shape)
    return inside if x.complete else inside & ~jnp.isnan(x.values)


def filtered_per_sequence(
    system: System, x: Sequences, parallel: bool
) -> tuple[Transition, whitening.Completed, Filtered]:
    """For missing entries or different lengths: the chain, the observations' noise, and the filtered states."""
    seen = seen_entries(x)
    residuals = jnp.where(seen, x.values, 0)
    if system.emission_shift is not None:
        residuals = jnp.where(seen, residuals - system.emission_shift, 0)
    residuals, seen = (jnp.moveaxis(leaf, 0, -1) for leaf in (residuals, seen))
    evidence, completed = whitening.compress(system.emission, system.emission_covariance, residuals, seen)
    transition = transition_of(system, x)
    return transition, completed, filtered(transition, evidence, parallel)


def log_prob(system: System, x: Sequences, parallel: bool) -> jax.Array:
    """log p(x) of every sequence: (B,), or (num_sequences,) where they are packed."""

    def shared(system: System, x: Sequences) -> jax.Array:
        transition, white = whitened(system, x)
        return shared_log_prob(transition, white.matrix, white.compressed, white.constant(), parallel=parallel).T

    def per_sequence(system: System, x: Sequences) -> jax.Array:
        return filtered_per_sequence(system, x, parallel)[2].log_prob.T

    return x.per_sequence(shared_or_per_sequence(shared, per_sequence, system, x))


def filtered_moments(system: System, x: Sequences, parallel: bool) -> tuple[jax.Array, jax.Array]:
    """Means (T, S, B) and covariances (T, S, S, B) of the states given the steps so far."""

    def shared(system: System, x: Sequences) -> tuple[jax.Array, jax.Array]:
        transition, white = whitened(system, x)
        means, roots = shared_filter(transition, white.matrix, white.compressed, parallel=parallel)
        return _for_all_lanes(means, lanewise.square(roots))

    def per_sequence(system: System, x: Sequences) -> tuple[jax.Array, jax.Array]:
        found = filtered_per_sequence(system, x, parallel)[2]
        return found.means, lanewise.square(found.roots)

    return shared_or_per_sequence(shared, per_sequence, system, x)


def smoothed_moments(system: System, x: Sequences, parallel: bool) -> tuple[jax.Array, jax.Array]:
    """Means (T, S, B) and covariances (T, S, S, B) of the states given all steps."""

    def shared(system: System, x: Sequences) -> tuple[jax.Array, jax.Array]:
        transition, white = whitened(system, x)
        return _for_all_lanes(*shared_smoother(transition, white.matrix, white.compressed, parallel=parallel))

    def per_sequence(system: System, x: Sequences) -> tuple[jax.Array, jax.Array]:
        transition, _, found = filtered_per_sequence(system, x, parallel)
        states = smoothed(transition, found, parallel)
        return states.means, states.covariances

    return shared_or_per_sequence(shared, per_sequence, system, x)


@record
class StateMoments:
    """Means (T, S) and covariances (T, S, S) of the states of one sequence, (B, T, ...) of several; 0 in padding."""

    means: jax.Array
    covariances: jax.Array


def by_sequence(x: Sequences, means: jax.Array, covariances: jax.Array) -> StateMoments:
    """Moments (T, ..., B) with sequences first."""
    return StateMoments(
        means=jnp.where(x.inside()[..., None], jnp.moveaxis(means, -1, 0), 0),
        covariances=jnp.where(x.inside()[..., None, None], jnp.moveaxis(covariances, -1, 0), 0),
    )


def _for_all_lanes(means: jax.Array, covariances: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Covariances (T, S, S, 1) repeated for all lanes of means (T, S, B)."""
    return means, jnp.broadcast_to(covariances, (*covariances.shape[:-1], means.shape[-1]))


def root_of(matrix: jax.Array) -> jax.Array:
    """U (S, S) with UᵀU the covariance, which may be singular: a variance of 0 gives a row of zeros."""
    states = matrix.shape[0]
    index = jnp.arange(states)
    rest, rows = 0.5 * (matrix + matrix.T), []
    for j in range(states):
        pivot = rest[j, j]
        used = pivot > 4 * jnp.finfo(matrix.dtype).eps * matrix[j, j]
        row = jnp.where(used & (index >= j), rest[j] * jax.lax.rsqrt(jnp.where(used, pivot, 1)), 0)
        rest = rest - row[:, None] * row[None]
        rows.append(row)
    return jnp.stack(rows)
