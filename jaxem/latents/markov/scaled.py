"""The recursions in scaled probabilities. A state whose probability underflows beside a likelier one is lost; where
that may change the posterior, the chain is called lossy.

Rabiner (1989), A tutorial on hidden Markov models, Proc. IEEE 77.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from ... import numerics, tree
from ...numerics import tuning
from .chain import Chain

_HIGHEST = jax.lax.Precision.HIGHEST

# states, come, arrive and total as in `Smoothed`, and the evidence (T[, L]) of every step.
Found = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


def filtered(chain: Chain) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """log p(z_t = k | x_1..t) (T, K[, L]), and the evidence (T[, L]) of every step; and whether the chain is lossy."""
    joint, peak, lossy = _forward(chain, *_relative(chain.log_likelihood))
    total = jnp.sum(joint, axis=1, keepdims=True)
    logs = numerics.safe_log(numerics.safe_divide(joint, total))
    return (logs, jnp.squeeze(numerics.safe_log(total) + peak, 1)), lossy


def smoothed(chain: Chain) -> tuple[Found, jax.Array]:
    """The posterior's parts, and whether the chain is lossy."""
    return _smoothed(chain) if chain.log_likelihood.ndim > 2 else _smoothed_alone(chain)


def moves(transition: jax.Array, come: jax.Array, arrive: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """sum over steps, and over lanes x weights ([L]), of come_t(i) transition(i, j) arrive_t(j): (K, K).

    Lanes with a chain of their own each are not summed: (K, K, L).
    """
    if come.ndim == 2:
        return weighted(transition * jnp.dot(come.T, arrive, precision=_HIGHEST), weights)
    apart = transition.ndim > 2

    # One product over all steps and lanes would transpose both factors first.
    def add(total: jax.Array, both: Any) -> tuple[jax.Array, None]:
        come, arrive = both
        if weights is not None:  # what a lane of weight 0 holds may be NaN
            come, arrive = weighted(come, weights), jnp.where(weights > 0, arrive, 0)
        return total + (come[:, None] * arrive[None] if apart else jnp.dot(come, arrive.T, precision=_HIGHEST)), None

    start = tree.varying(jnp.zeros(transition.shape, come.dtype), come, arrive)
    return transition * jax.lax.scan(add, start, (come, arrive))[0]


def weighted(values: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Values ([..., L]) x weights ([L]), 0 where those are 0."""
    if weights is None:
        return values
    return jnp.where(weights > 0, numerics.to_rank(weights, values.ndim) * values, 0)


def _smoothed(chain: Chain) -> tuple[Found, jax.Array]:
    likelihood, peak = _relative(chain.log_likelihood)
    joint, peak, lossy = _forward(chain, likelihood, peak)
    after = _backward(chain, likelihood)
    evidence = jnp.sum(joint, axis=1, keepdims=True)
    filtered = numerics.safe_divide(joint, evidence)
    both = filtered * after
    scale = jnp.sum(both, axis=1, keepdims=True)
    come = numerics.safe_divide(filtered[:-1], scale[:-1])
    if chain.linked is not None:
        come = jnp.where(chain.linked[:, None], come, 0)
    arrive = after[1:] * likelihood[1:]
    arrive = numerics.safe_divide(arrive, jnp.sum(arrive, axis=1, keepdims=True))
    states = numerics.safe_divide(both, scale)
    total = moves(chain.transition, come, arrive)
    return (states, come, arrive, total, jnp.squeeze(numerics.safe_log(evidence) + peak, 1)), lossy


def _relative(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """exp(scores - peak) (T, K[, L]), and the largest score of every step, peak (T, 1[, L])."""
    peak = jax.lax.stop_gradient(jnp.max(scores, axis=1, keepdims=True))
    peak = jnp.where(jnp.isneginf(peak), 0, peak)
    return jnp.exp(scores - peak), peak


def _forward(chain: Chain, likelihood: jax.Array, peak: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """p(z_t = k, x_t | x_1..t-1) (T, K[, L]) relative to peaks (T, 1[, L]), and whether a path may have been lost.

    A state that underflows beside a likelier one is lost. This is negligible as long as the likelier ones lead to every
    state: a path may have been lost where a state is predicted with probability 0, or near the least normal number.
    """
    onto, scores, linked = jnp.swapaxes(chain.transition, 0, 1), chain.log_likelihood, chain.linked
    # Where a sequence starts, the peak is that of p(z_t = k, x_t): the likeliest state may be impossible as the first.
    begun, height = _relative(chain.log_initial[None] + (scores[:1] if linked is None else scores))
    if linked is None:
        peak = jnp.concatenate([height, peak[1:]])
    else:
        peak = jnp.concatenate([height[:1], jnp.where(linked[:, None], peak[1:], height[1:])])

    def step(joint: jax.Array, inputs: Any) -> tuple[jax.Array, jax.Array]:
        likelihood, begin = inputs
        predicted = _moved(onto, joint)
        joint = predicted * likelihood
        return (joint if begin is None else jnp.where(begin[0], joint, begin[1])), predicted

    begin = None if linked is None else (linked, begun[1:])
    _, predicted = jax.lax.scan(step, begun[0], (likelihood[1:], begin))
    joint = predicted * likelihood[1:]
    if linked is not None:
        joint = jnp.where(linked[:, None], joint, begun[1:])
        predicted = jnp.where(linked[:, None], predicted, 1)
    limits = jnp.finfo(likelihood.dtype)
    lossy = jnp.min(predicted, axis=(0, 1) if onto.ndim > 2 else None, initial=1) < limits.tiny / limits.eps
    return jnp.concatenate([begun[:1], joint]), peak, lossy


def _backward(chain: Chain, likelihood: jax.Array) -> jax.Array:
    """p(x_t+1.. | z_t = k) (T, K[, L]), up to a factor for every step."""

    def step(after: jax.Array, inputs: Any) -> tuple[jax.Array, jax.Array]:
        likelihood, linked = inputs
        before = _moved(chain.transition, after * likelihood)
        before = before if linked is None else jnp.where(linked, before, 1)
        return before, before

    last = jnp.ones_like(likelihood[0])
    _, before = jax.lax.scan(step, last, (likelihood[1:], chain.linked), reverse=True)
    return jnp.concatenate([before, last[None]])


def _moved(matrix: jax.Array, mass: jax.Array) -> jax.Array:
    """matrix (K, K[, L]) times mass (K[, L]) / sum of mass: the sum is computed beside the product, not before it."""
    total = jnp.sum(mass, axis=0)
    if matrix.ndim > 2 and matrix.size > tuning.WIDE_TRANSITIONS:
        moved = functools.reduce(jnp.add, [matrix[:, i] * mass[None, i] for i in range(len(mass))])
        total = functools.reduce(jnp.add, list(mass))
    elif matrix.ndim > 2 or (mass.ndim == 1 and len(matrix) <= tuning.UNROLLED_STATES):
        moved = jnp.sum(matrix * mass[None], axis=1)
    else:
        moved = jnp.dot(matrix, mass, precision=_HIGHEST)
    # Without the barrier it would be computed twice, for the carry and for the stored result.
    return jax.lax.optimization_barrier(numerics.safe_divide(moved, total))


@jax.custom_jvp
def _smoothed_alone(chain: Chain) -> tuple[Found, jax.Array]:
    """`_smoothed` of one sequence."""
    return _one_or_many(chain)


@_smoothed_alone.defjvp
def _slope(primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    return jax.jvp(_smoothed, primals, tangents)  # `custom_vmap` has no reverse mode


@jax.custom_batching.custom_vmap
def _one_or_many(chain: Chain) -> tuple[Found, jax.Array]:
    return _smoothed(chain)


@_one_or_many.def_vmap
def _many(size: int, batched: Any, chain: Chain) -> tuple[Any, Any]:
    """Chains of few states, with transitions of their own, as lanes, the last axis; `vmap` would put them first."""
    (is_batched,) = batched
    if chain.log_likelihood.shape[-1] > tuning.STATES_OF_LANES or not is_batched.transition:
        leaves, structure = jax.tree.flatten(chain)
        axes = [0 if of_leaf else None for of_leaf in jax.tree.leaves(is_batched)]
        found = jax.vmap(lambda leaves: _smoothed(jax.tree.unflatten(structure, leaves)), (axes,))(leaves)
        return found, jax.tree.map(lambda _: True, found)

    def lanes(leaf: jax.Array, of_leaf: bool) -> jax.Array:
        return jnp.moveaxis(leaf, 0, -1) if of_leaf else leaf[..., None]

    chain = jax.tree.map(lanes, chain, is_batched)
    steps, states, _ = chain.log_likelihood.shape
    whole = jnp.broadcast_to(chain.log_likelihood, (steps, states, size))
    found = _smoothed(dataclasses.replace(chain, log_likelihood=whole))
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, -1, 0), found), jax.tree.map(lambda _: True, found)
