"""The recursions in logarithms: nothing is lost, at K² exponentials a step."""

from typing import Any

import jax
import jax.numpy as jnp

from ... import numerics
from .chain import Chain
from .scaled import Found, weighted


def filtered(chain: Chain) -> tuple[jax.Array, jax.Array]:
    """log p(z_t = k | x_1..t) (T, K[, L]), and the evidence (T[, L]) of every step."""
    joint = _forward(chain)
    total = log_sum(joint, 1)
    return less(joint, total), jnp.squeeze(total, 1)


def smoothed(chain: Chain) -> Found:
    """The posterior's parts, come and arrive in logarithms."""
    return joined(chain, _forward(chain), *_backward(chain))


def joined(chain: Chain, joint: jax.Array, after: jax.Array, arrive: jax.Array) -> Found:
    """The posterior's parts from `joint` of a forward recursion, and `after` and `arrive` of a backward one."""
    evidence = log_sum(joint, 1)
    filtered = less(joint, evidence)
    both = filtered + after
    scale = log_sum(both, 1)
    come = less(filtered[:-1], scale[:-1])
    if chain.linked is not None:
        come = jnp.where(chain.linked[:, None], come, -jnp.inf)
    come, arrive = _finite(come), _finite(arrive)
    total = moves(chain.transition, come, arrive)
    return jnp.exp(less(both, scale)), come, arrive, total, jnp.squeeze(evidence, 1)


def moves(transition: jax.Array, come: jax.Array, arrive: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """sum over steps, and over lanes x weights ([L]), of exp(come_t(i) + arrive_t(j)) transition(i, j): (K, K)."""
    logs, lanes = numerics.safe_log(transition), (1,) * (come.ndim - 2)

    # One state at a time: all pairs of states at every step would outgrow memory.
    def onto(j: jax.Array) -> jax.Array:
        pairs = jnp.exp(come + logs[:, j].reshape(1, -1, *lanes) + jnp.take(arrive, j, axis=1)[:, None])
        return jnp.sum(jnp.moveaxis(weighted(pairs, weights), 1, 0).reshape(len(logs), -1), axis=1)

    return jax.lax.map(onto, jnp.arange(len(logs))).T


def log_sum(logs: jax.Array, axis: int) -> jax.Array:
    """log sum exp over an axis, which is kept; -inf where all are -inf, with a zero gradient."""
    top = jax.lax.stop_gradient(jnp.max(logs, axis=axis, keepdims=True))
    top = jnp.where(jnp.isneginf(top), 0, top)
    return top + numerics.safe_log(jnp.sum(jnp.exp(logs - top), axis=axis, keepdims=True))


def less(logs: jax.Array, total: jax.Array) -> jax.Array:
    """logs - total, and -inf where the total is."""
    none = jnp.isneginf(total)
    return jnp.where(none, -jnp.inf, logs - jnp.where(none, 0, total))


def lowest(logs: jax.Array) -> float:
    """Finite stand-in for -inf in come and arrive: where they are not used, derivatives multiply them by 0."""
    return -(float(jnp.finfo(logs.dtype).max) ** 0.5)


def _finite(logs: jax.Array) -> jax.Array:
    return jnp.maximum(logs, lowest(logs))


def _forward(chain: Chain) -> jax.Array:
    """log p(z_t = k, x_t | x_1..t-1): (T, K[, L])."""
    moves, start, scores = chain.log_transition, chain.log_initial, chain.log_likelihood

    def step(joint: jax.Array, inputs: Any) -> tuple[jax.Array, jax.Array]:
        scores, linked = inputs
        filtered = less(joint, log_sum(joint, 0))
        predicted = jnp.squeeze(log_sum(moves + filtered[:, None], 0), 0)
        joint = (predicted if linked is None else jnp.where(linked, predicted, start)) + scores
        return joint, joint

    first = start + scores[0]
    _, joint = jax.lax.scan(step, first, (scores[1:], chain.linked))
    return jnp.concatenate([first[None], joint])


def _backward(chain: Chain) -> tuple[jax.Array, jax.Array]:
    """log p(x_t+1.. | z_t = k) (T, K[, L]), up to a constant for every step, and log p(x_t.. | z_t = k)
    (T - 1, K[, L]) from the second step on, up to the constant of the step before."""
    moves = chain.log_transition

    def step(after: jax.Array, inputs: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        scores, linked = inputs
        arrive = after + scores
        arrive = less(arrive, log_sum(arrive, 0))
        before = jnp.squeeze(log_sum(moves + arrive[None], 1), 1)
        before = before if linked is None else jnp.where(linked, before, 0)
        return before, (before, arrive)

    last = jnp.zeros_like(chain.log_likelihood[0])
    _, (before, arrive) = jax.lax.scan(step, last, (chain.log_likelihood[1:], chain.linked), reverse=True)
    return jnp.concatenate([before, last[None]]), arrive
