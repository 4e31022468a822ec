"""Safe elementary operations, and the bijection of probabilities. Scores (K, N) have components first, probabilities
as parameters (..., K) last."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from . import tuning

# A logit beyond which probabilities are 0 and 1 in every precision.
_FAR_OUT = 1e4


def safe_log(x: jax.Array) -> jax.Array:
    """log(x), -inf at 0, with a zero (not NaN) gradient there."""
    positive = x > 0
    return jnp.where(positive, jnp.log(jnp.where(positive, x, 1)), -jnp.inf)


def safe_divide(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """numerator / denominator, and 0 wherever the denominator is 0, with finite gradients."""
    rank = max(jnp.ndim(numerator), jnp.ndim(denominator))
    numerator, denominator = to_rank(numerator, rank), to_rank(denominator, rank)
    empty = denominator == 0
    return jnp.where(empty, 0, numerator / jnp.where(empty, 1, denominator))


def divergence(p: jax.Array, q: jax.Array) -> jax.Array:
    """sum p log(p / q) over the last axis; 0 log 0 = 0, and infinite where q alone is 0."""
    used = p > 0
    logs = safe_log(jnp.where(used, p, 1)) - safe_log(jnp.where(used, q, 1))
    return jnp.sum(jnp.where(used, p * logs, 0), axis=-1)


def to_rank(x: jax.Array, rank: int) -> jax.Array:
    """The array with axes of length 1 in front, as broadcasting would add them implicitly."""
    return jnp.expand_dims(x, tuple(range(rank - jnp.ndim(x))))


def normalize(log_joint: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Bayes' rule over the component axis: (K, N) log-joint -> responsibilities (K, N), log-evidence (N,).

    A row that is impossible under every component has log-evidence -inf and responsibilities 0.
    """
    # Its slope cancels, and must not be taken: a maximum's is 0 / 0 where XLA computes the scores twice, rounded
    # in two ways, and none of them equals the largest.
    top = jax.lax.stop_gradient(jnp.maximum(jnp.max(log_joint, axis=0), jnp.finfo(log_joint.dtype).min))
    shifted = jnp.exp(log_joint - top[None])
    total = jnp.sum(shifted, axis=0)
    # The largest term is exp(0): the total is at least 1, or else 0 for an impossible row. (A maximum of it and 1 would
    # halve the slope where all other terms vanish beside the largest: the two tie there.)
    return shifted * (1 / jnp.where(total > 0, total, 1))[None], top + safe_log(total)


def first_largest(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Indicators (K, N) of the first largest score of each column, in the scores' dtype, and that score (N,).

    A column of nothing but -inf has no largest score: its indicators are 0.
    """
    top, first = first_argmax(scores)
    index = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    return ((index == first[None]) & (top > -jnp.inf)[None]).astype(scores.dtype), top


def first_argmax(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest of each column of scores (K, N), and the first row number that has it: (N,), (N,).

    A tournament between slices of rows. XLA's argmax is slow on CPUs, and so is every reduction
    that it fuses with what comes before; comparing whole slices runs at full speed.
    """
    # Barriers, since rounds that are fused with what comes before compute it again for every slice.
    scores = jax.lax.optimization_barrier(scores)
    index, sorted_ = jnp.broadcast_to(jnp.arange(len(scores), dtype=jnp.int32)[:, None], scores.shape), True
    while len(scores) > 1:
        width = -(-len(scores) // tuning.TOURNAMENT_SLICES) if len(scores) > tuning.TOURNAMENT_ROWS else 1
        best, winner = scores[:width], index[:width]
        # The last slice may overlap the one before: no harm to a maximum.
        for start in (min(first, len(scores) - width) for first in range(width, len(scores), width)):
            other, name = scores[start : start + width], index[start : start + width]
            wins = other > best
            if not sorted_:
                wins |= (other == best) & (name < winner)
            best, winner = jnp.where(wins, other, best), jnp.where(wins, name, winner)
        (scores, index), sorted_ = jax.lax.optimization_barrier((best, winner)), False
    return scores[0], index[0]


def weighted_sum(values: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Sum over the last axis of weights x values; a weight of 0 removes even an infinite value."""
    if weights is None:
        return jnp.sum(values, axis=-1)
    weights = to_rank(weights, jnp.ndim(values))
    return jnp.sum(jnp.where(weights > 0, weights * jnp.where(weights > 0, values, 0), 0), axis=-1)


def product(a: jax.Array, b: jax.Array, subscripts: str) -> jax.Array:
    """einsum at full precision: accelerators round products to tf32 or bf16 unless told not to."""
    return jnp.einsum(subscripts, a, b, precision=jax.lax.Precision.HIGHEST)


def repaired(attempt: Callable, again: Callable, *arguments: Any) -> Any:
    """What `attempt(*arguments)` -> (found, failed) found, or, where it failed, what `again(*arguments)` finds.

    A loop of one round or none, and no branch: under vmap `again` runs only if some lane needs it, where a branch
    would always run both; and loops inside of a branch are compiled far worse.
    """

    @jax.custom_jvp
    def run(*arguments: Any) -> Any:
        found, failed = jax.lax.optimization_barrier(attempt(*arguments))

        # The barrier makes the work depend on the round: otherwise XLA would hoist it out of the loop.
        def once_more(number: jax.Array, _: Any) -> Any:
            return again(*jax.lax.optimization_barrier((arguments, number))[0])

        return jax.lax.fori_loop(0, failed.astype(jnp.int32), once_more, found)

    @run.defjvp
    def branch(primals: tuple, tangents: tuple) -> tuple[Any, Any]:
        # Such a loop has no reverse mode, and a branch has one only where all lanes take it together.
        (found, failed), (slope, _) = jax.jvp(attempt, primals, tangents)

        def mended(primals: tuple, tangents: tuple) -> tuple[Any, Any]:
            pairs = jax.jvp(again, primals, tangents), (found, slope)
            return jax.tree.map(lambda new, old: jnp.where(failed, new, old), *pairs)

        return jax.lax.cond(in_any_lane(failed), mended, lambda *_: (found, slope), primals, tangents)

    return run(*arguments)


@jax.custom_batching.custom_vmap
def in_any_lane(condition: jax.Array) -> jax.Array:
    """Whether the condition holds in any lane of a `vmap`."""
    return condition


@in_any_lane.def_vmap
def _over_lanes(size: int, batched: list[bool], condition: jax.Array) -> tuple[jax.Array, bool]:
    return in_any_lane(jnp.any(condition)), False


def simplex_to_real(probabilities: jax.Array, support: Any = None) -> jax.Array:
    """Continuation ratios: the simplex (..., K) to R^(K-1), log p_k / (p_k+1 + ... + p_K).

    support (..., K): entries that are False (0) count as 0. An entry of 0 has a coordinate so far out that it has no
    slope, and that no step of an optimiser brings back: zeros stay zeros, wherever they are.
    """
    if support is not None:
        probabilities = jnp.where(jnp.asarray(support) != 0, probabilities, 0)
    after = jnp.flip(jnp.cumsum(jnp.flip(probabilities, -1), axis=-1), -1)[..., 1:]
    here = probabilities[..., :-1]
    ratio = jnp.log(jnp.where(here == 0, 1, here)) - jnp.log(jnp.where(after == 0, 1, after))
    return jnp.where(here == 0, -_FAR_OUT, jnp.where(after == 0, _FAR_OUT, ratio))


def real_to_simplex(theta: jax.Array, support: Any = None) -> jax.Array:
    """Inverse of `simplex_to_real`; entries outside of the support are 0 for any theta."""
    here, after = jax.nn.sigmoid(theta), jax.nn.sigmoid(-theta)
    if support is not None:
        inside = jnp.asarray(support) != 0
        later = jnp.flip(jnp.cumsum(jnp.flip(inside, -1), axis=-1), -1)[..., 1:] > 0
        here = jnp.where(inside[..., :-1], jnp.where(later, here, 1), 0)
        after = jnp.where(inside[..., :-1], jnp.where(later, after, 0), 1)
    one = jnp.ones((*theta.shape[:-1], 1), theta.dtype)
    left = jnp.concatenate([one, jnp.cumprod(after, axis=-1)], axis=-1)
    return left * jnp.concatenate([here, one], axis=-1)
