"""Whole paths of states: the likeliest, and draws from the posterior."""

from typing import Any

import jax
import jax.numpy as jnp

from ... import numerics
from ..expect import Sample
from .chain import Chain


def decode(chain: Chain) -> tuple[jax.Array, jax.Array]:
    """The likeliest path (T[, L]) of states, and terms (T[, L]) that sum to log p(path, data).

    Of equally likely states the first is taken. Viterbi (1967).
    """
    moves, start = chain.log_transition, chain.log_initial

    def forward(best: jax.Array, step: Any) -> tuple[jax.Array, Any]:
        scores, linked = step
        through = moves + best[:, None]
        came, reached = jnp.argmax(through, axis=0), jnp.max(through, axis=0)
        reached = (reached if linked is None else jnp.where(linked, reached, start)) + scores
        top = jnp.max(reached, axis=0)
        level = jnp.where(top > -jnp.inf, top, 0)
        # Where a sequence ends, its last state is its best one.
        return reached - level[None], (came, jnp.argmax(reached, axis=0), top)

    scores = chain.log_likelihood
    first = start + scores[0]
    top = jnp.max(first, axis=0)
    _, (came, last, rises) = jax.lax.scan(
        forward, first - jnp.where(top > -jnp.inf, top, 0)[None], (scores[1:], chain.linked)
    )
    ends = jnp.concatenate([jnp.argmax(first, axis=0)[None], last])

    def backward(state: jax.Array, step: Any) -> tuple[jax.Array, jax.Array]:
        came, end, linked = step
        before = jnp.take_along_axis(came, state[None], axis=0)[0]
        before = before if linked is None else jnp.where(linked, before, end)
        return before, before

    _, path = jax.lax.scan(backward, ends[-1], (came, ends[:-1], chain.linked), reverse=True)
    return jnp.concatenate([path, ends[-1:]]), jnp.concatenate([top[None], rises])


def draw(chain: Chain, filtered: jax.Array, expect: Sample) -> tuple[jax.Array, jax.Array]:
    """Paths (T[, L], n) drawn backwards from log p(z_t | x_1..t) (T, K[, L]), and the mass (n,) of each.

    A state is -1 where none is possible. Chib (1996), Calculating posterior distributions and modal estimates in
    Markov mixture models, J. Econometrics 75.
    """
    key, lanes = expect.random_key(), filtered.shape[2:]
    used = expect.num_samples if expect.used is None else expect.used
    mass = (jnp.arange(expect.num_samples) < used) / jnp.asarray(used, filtered.dtype)
    moves = numerics.safe_log(chain.transition)

    def pick(number: jax.Array, logs: jax.Array) -> jax.Array:
        """A draw ([L], n) from exp(logs) (K[, L], n), by inversion; never a state of mass 0."""
        upto = jnp.cumsum(numerics.normalize(logs)[0], axis=0)
        level = jax.random.uniform(jax.random.fold_in(key, number), upto.shape[1:], upto.dtype) * upto[-1]
        reached = level[None] < upto
        return jnp.where(reached[-1], jnp.argmax(reached, axis=0), -1)

    def step(after: jax.Array, inputs: Any) -> tuple[jax.Array, jax.Array]:
        number, filtered, linked = inputs
        own = jnp.broadcast_to(filtered[..., None], (chain.num_states, *after.shape))
        towards = own + jnp.take(moves, jnp.maximum(after, 0), axis=1)
        here = pick(number, towards if linked is None else jnp.where(linked[..., None], towards, own))
        return here, here

    steps = jnp.arange(len(filtered))
    shape = (chain.num_states, *lanes, expect.num_samples)
    last = pick(steps[-1], jnp.broadcast_to(filtered[-1][..., None], shape))
    _, path = jax.lax.scan(step, last, (steps[:-1], filtered[:-1], chain.linked), reverse=True)
    return jnp.concatenate([path, last[None]]), mass
