"""Linear-Gaussian systems on their own: steps ahead, samples, and where the filter comes to rest."""

import jax
import jax.numpy as jnp

from ... import numerics
from ...record import record
from ...sequences import Sequences
from .. import lanewise
from . import parallel, whitening
from .elements import Transition
from .system import System, root_of


@record
class Forecast:
    """Steps after the end, (H, ...) of one sequence and (B, H, ...) of several.

    means                     of the states         (H, S)
    covariances               of the states         (H, S, S)
    observation_means         of the observations   (H, D)
    observation_covariances   of the observations   (H, D, D)
    """

    means: jax.Array
    covariances: jax.Array
    observation_means: jax.Array
    observation_covariances: jax.Array


@record
class SteadyState:
    """The limit of the Kalman filter after many steps.

    predicted   (S, S), covariance of the state before it is observed
    filtered    (S, S), covariance of the state after that
    gain        (S, D), the Kalman gain
    """

    predicted: jax.Array
    filtered: jax.Array
    gain: jax.Array


def forecast(system: System, means: jax.Array, covariances: jax.Array) -> Forecast:
    """The steps after states of means (B, S) and covariances (B, S, S); the system's shifts are of the steps ahead."""
    lanes, steps = means.shape[0], system.dynamics_shift.shape[1]
    shifts = jnp.broadcast_to(system.dynamics_shift, (lanes, steps, means.shape[1]))

    def step(carry: tuple[jax.Array, jax.Array], shift: jax.Array) -> tuple[tuple[jax.Array, jax.Array], tuple]:
        mean, covariance = carry
        mean = numerics.product(mean, system.dynamics, "bj,ij->bi") + shift
        half = numerics.product(system.dynamics, covariance, "ij,bjk->bik")
        covariance = numerics.product(half, system.dynamics, "bik,lk->bil") + system.dynamics_covariance[None]
        return (mean, covariance), (mean, covariance)

    _, found = jax.lax.scan(step, (means, covariances), jnp.moveaxis(shifts, 0, 1))
    ahead, spread = (jnp.moveaxis(leaf, 0, 1) for leaf in found)
    half = numerics.product(system.emission, spread, "ds,btsr->btdr")
    return Forecast(
        means=ahead,
        covariances=spread,
        observation_means=_observed(system, ahead),
        observation_covariances=numerics.product(half, system.emission, "btdr,er->btde")
        + _emission_noise(system)[None, None],
    )


def sample(system: System, key: jax.Array, lanes: int) -> tuple[jax.Array, jax.Array]:
    """Observations (B, T, D) and states (B, T, S) of B sequences, as many steps as the system has shifts."""
    states, steps = len(system.initial_mean), system.dynamics_shift.shape[1]
    shifts = jnp.broadcast_to(system.dynamics_shift, (lanes, steps, states))
    key_start, key_process, key_observation = jax.random.split(key, 3)
    start = system.initial_mean[None] + _coloured(key_start, system.initial_covariance, (lanes, states))
    moves = _coloured(key_process, system.dynamics_covariance, (steps, lanes, states)) + jnp.moveaxis(shifts, 0, 1)

    def step(state: jax.Array, move: jax.Array) -> tuple[jax.Array, jax.Array]:
        state = numerics.product(state, system.dynamics, "bj,ij->bi") + move
        return state, state

    _, path = jax.lax.scan(step, start, moves[1:])
    path = jnp.moveaxis(jnp.concatenate([start[None], path]), 0, 1)
    noise = _coloured(key_observation, _emission_noise(system), (lanes, steps, len(system.emission)))
    return _observed(system, path) + noise, path


def steady_state(system: System) -> SteadyState:
    """The solution of the discrete algebraic Riccati equation."""
    nothing = jnp.zeros((1, len(system.emission), 1), system.emission.dtype)
    matrix = whitening.whiten(system.emission, system.emission_covariance, nothing).matrix
    transition = Transition(
        matrix=system.dynamics,
        root=root_of(system.dynamics_covariance),
        start_mean=system.initial_mean,
        start_root=root_of(system.initial_covariance),
        shift=jnp.zeros((1, len(system.dynamics), 1), nothing.dtype),
    )
    filtered = lanewise.square(parallel.steady_root(transition, matrix[:, :, None]))[:, :, 0]
    half = numerics.product(system.dynamics, filtered, "ij,jk->ik")
    if system.emission_covariance.ndim == 1:
        weighted = system.emission / system.emission_covariance[:, None]
    else:
        whitener = numerics.inverse_lower(numerics.cholesky(system.emission_covariance))
        weighted = numerics.product(whitener, numerics.product(whitener, system.emission, "ij,js->is"), "ij,is->js")
    return SteadyState(
        predicted=numerics.product(half, system.dynamics, "ij,kj->ik") + system.dynamics_covariance,
        filtered=filtered,
        gain=numerics.product(filtered, weighted, "ij,dj->id"),
    )


def last_moments(x: Sequences, *moments: jax.Array) -> list[jax.Array]:
    """Of moments (T, ..., B) those at the last step of every sequence: (B, ...), or (num_sequences, ...)."""
    if x.ids is None:
        last = jnp.full(x.num_rows, x.num_steps) if x.lengths is None else x.lengths
        lanes = jnp.arange(x.num_rows)
        return [jnp.moveaxis(moment, -1, 1)[last - 1, lanes] for moment in moments]
    following = jnp.concatenate([x.ids[:, 1:], jnp.full_like(x.ids[:, :1], -1)], axis=1)
    ends = x.inside() & (x.ids != following) & (x.ids >= 0)
    count = int(x.num_sequences or 0)
    places = jnp.where(ends, x.ids, count).T.ravel()

    def pick(moment: jax.Array) -> jax.Array:
        flat = jnp.moveaxis(moment, -1, 1).reshape(-1, *moment.shape[1:-1])
        return jnp.zeros((count + 1, *flat.shape[1:]), flat.dtype).at[places].set(flat)[:-1]

    return [pick(moment) for moment in moments]


def _observed(system: System, states: jax.Array) -> jax.Array:
    """Means (B, T, D) of the observations of states (B, T, S)."""
    means = numerics.product(states, system.emission, "bts,ds->btd")
    return means if system.emission_shift is None else means + system.emission_shift


def _emission_noise(system: System) -> jax.Array:
    """The covariance of the observation noise as a matrix (D, D)."""
    covariance = system.emission_covariance
    return covariance if covariance.ndim == 2 else jnp.diag(covariance)


def _coloured(key: jax.Array, covariance: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draws (..., S) of N(0, covariance)."""
    return numerics.product(jax.random.normal(key, shape, covariance.dtype), root_of(covariance), "...k,ks->...s")
