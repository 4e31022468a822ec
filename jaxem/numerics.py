"""Safe elementary operations, factorisations and bijections; component axis first throughout."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_UNROLLED_COLUMNS = 8

# A logit beyond which probabilities are 0 and 1 in every precision.
_FAR_OUT = 1e4


def safe_log(x: jax.Array) -> jax.Array:
    """log(x), -inf at 0, with a zero (not NaN) gradient there."""
    positive = x > 0
    return jnp.where(positive, jnp.log(jnp.where(positive, x, 1)), -jnp.inf)


def safe_divide(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """numerator / denominator, and 0 wherever the denominator is 0, with finite gradients."""
    empty = denominator == 0
    return jnp.where(empty, 0, numerator / jnp.where(empty, 1, denominator))


def normalize(log_joint: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Bayes' rule over the component axis: (K, N) log-joint -> responsibilities (K, N), log-evidence (N,).

    A row that is impossible under every component has log-evidence -inf and responsibilities 0.
    """
    # Its slope cancels, and must not be taken: a maximum's is 0 / 0 where XLA computes the scores twice, rounded
    # in two ways, and none of them equals the largest.
    top = jax.lax.stop_gradient(jnp.maximum(jnp.max(log_joint, axis=0), jnp.finfo(log_joint.dtype).min))
    shifted = jnp.exp(log_joint - top)
    total = jnp.sum(shifted, axis=0)
    # 0 for an impossible row. No maximum with 1, which the total is at least else: its slope is half where they tie.
    return shifted * (1 / jnp.where(total > 0, total, 1)), top + safe_log(total)


def first_largest(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Indicators (K, N) of the first largest score of each column, in the scores' dtype, and that score (N,).

    A column of nothing but -inf has no largest score: its indicators are 0.
    """
    top, first = first_argmax(scores)
    index = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    return ((index == first) & (top > -jnp.inf)).astype(scores.dtype), top


def first_argmax(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest of each column of scores (K, N), and the first row number that has it: (N,), (N,).

    A tournament between slices of rows. XLA's argmax is slow on CPUs, and so is every reduction
    that it fuses with what comes before; comparing whole slices runs at full speed.
    """
    # Barriers, since rounds that are fused with what comes before compute it again for every slice.
    scores = jax.lax.optimization_barrier(scores)
    index, sorted_ = jnp.broadcast_to(jnp.arange(len(scores), dtype=jnp.int32)[:, None], scores.shape), True
    while len(scores) > 1:
        width = -(-len(scores) // 4) if len(scores) > 8 else 1
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

        # The work seems to depend on the round, or XLA would do it before the loop.
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

        return jax.lax.cond(_in_any_lane(failed), mended, lambda *_: (found, slope), primals, tangents)

    return run(*arguments)


@jax.custom_batching.custom_vmap
def _in_any_lane(condition: jax.Array) -> jax.Array:
    """Whether it holds in any lane of a `vmap`."""
    return condition


@_in_any_lane.def_vmap
def _over_lanes(size: int, batched: list[bool], condition: jax.Array) -> tuple[jax.Array, bool]:
    return _in_any_lane(jnp.any(condition)), False


def floored_cholesky(matrix: jax.Array, floor: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Cholesky factor of `matrix + diag(lift)`, with the smallest lift that keeps each pivot at its floor.

    matrix (..., D, D) symmetric, floor (..., D) -> factor (..., D, D) lower, lift (..., D).
    A pivot that needs no lift gets exactly 0, so a well-conditioned matrix is not changed by a bit.
    Without a floor nothing is lifted, and a matrix that is not positive definite gives NaN.
    (A modified Cholesky factorisation; Gill, Murray & Wright, Practical Optimization, section 4.4.)
    """
    columns = matrix.shape[-1]
    index = jnp.arange(columns)

    def eliminate(
        rest: jax.Array, at: jax.Array, pivot: jax.Array, lowest: jax.Array | None, j: jax.Array | int
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        lifted = pivot if lowest is None else jnp.where(pivot < lowest, lowest, pivot)
        lift, root = lifted - pivot, jnp.sqrt(lifted)
        below = jnp.where(index > j, at / root[..., None], jnp.where(index == j, root[..., None], 0))
        return rest - below[..., :, None] * below[..., None, :], below, lift

    if columns <= _UNROLLED_COLUMNS:
        rest, factor, lifts = matrix, [], []
        for j in range(columns):
            lowest = None if floor is None else floor[..., j]
            rest, below, lift = eliminate(rest, rest[..., j], rest[..., j, j], lowest, j)
            factor.append(below)
            lifts.append(lift)
        return jnp.stack(factor, axis=-1), jnp.stack(lifts, axis=-1)

    def body(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        rest, factor, lifts = carry
        at = jnp.take(rest, j, axis=-1)
        lowest = None if floor is None else jnp.take(floor, j, axis=-1)
        rest, below, lift = eliminate(rest, at, jnp.take(at, j, axis=-1), lowest, j)
        return rest, factor.at[..., j].set(below), lifts.at[..., j].set(lift)

    zeros = jnp.zeros_like(matrix)
    _, factor, lifts = jax.lax.fori_loop(0, columns, body, (matrix, zeros, zeros[..., 0]))
    return factor, lifts


def cholesky(matrix: jax.Array) -> jax.Array:
    """Lower Cholesky factor (..., D, D); NaN where the matrix is not positive definite."""
    if matrix.shape[-1] <= _UNROLLED_COLUMNS:
        return floored_cholesky(matrix)[0]
    return jnp.linalg.cholesky(matrix)


def inverse_lower(factor: jax.Array) -> jax.Array:
    """Inverse of a lower triangular matrix (..., D, D), by forward substitution."""
    columns = factor.shape[-1]
    if columns > _UNROLLED_COLUMNS:
        identity = jnp.broadcast_to(jnp.eye(columns, dtype=factor.dtype), factor.shape)
        return jax.scipy.linalg.solve_triangular(factor, identity, lower=True)
    rows: list[jax.Array] = []
    for i in range(columns):
        unit = jnp.zeros((*factor.shape[:-2], columns), factor.dtype).at[..., i].set(1)
        for j in range(i):
            unit = unit - factor[..., i, j, None] * rows[j]
        rows.append(unit / factor[..., i, i, None])
    return jnp.stack(rows, axis=-2)


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


def covariance_to_real(covariance: jax.Array) -> jax.Array:
    """Log-Cholesky: positive definite (..., D, D) to R^(D(D+1)/2) (Pinheiro & Bates 1996)."""
    factor = cholesky(covariance)
    rows, columns = np.tril_indices(covariance.shape[-1])
    entries = factor[..., rows, columns]
    return jnp.where(rows == columns, jnp.log(jnp.where(rows == columns, entries, 1)), entries)


def real_to_covariance(theta: jax.Array, columns: int) -> jax.Array:
    """Inverse of `covariance_to_real`."""
    i, j = np.tril_indices(columns)
    entries = jnp.where(i == j, jnp.exp(jnp.where(i == j, theta, 0)), theta)
    factor = jnp.zeros((*theta.shape[:-1], columns, columns), theta.dtype).at[..., i, j].set(entries)
    return product(factor, factor, "...ik,...jk->...ij")
