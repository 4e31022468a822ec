"""Small matrices, one a lane: arrays (..., I, J, B), lanes last, so that every operation is one of whole rows of lanes.

What lanes share has one lane, which broadcasts. Letters: N, I, J, K, L sizes of matrices; S states; T steps; B lanes.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .. import numerics
from ..numerics import tuning


def _contract(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """The sum of a x b over axis_a of a and axis_b of b, written out where it is short: a reduction over an axis that
    is not the last runs at a fraction of the speed of sums of whole slices."""
    count, rank = a.shape[axis_a], max(a.ndim, b.ndim)
    a, b = numerics.to_rank(a, rank), numerics.to_rank(b, rank)
    if not 0 < count <= tuning.UNROLLED_COLUMNS:
        return jnp.sum(jnp.moveaxis(a, axis_a, 0) * jnp.moveaxis(b, axis_b, 0), axis=0)
    parts = (
        jax.lax.index_in_dim(a, j, axis_a, keepdims=False) * jax.lax.index_in_dim(b, j, axis_b, keepdims=False)
        for j in range(count)
    )
    return functools.reduce(jnp.add, parts)


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """(..., I, J, B) times (..., J, K, B), lane by lane."""
    return _contract(a[..., :, :, None, :], b[..., None, :, :, :], -3, -3)


def times(a: jax.Array, v: jax.Array) -> jax.Array:
    """(..., I, J, B) times (..., J, B), lane by lane."""
    return _contract(a, v[..., None, :, :], -2, -2)


def transposed(a: jax.Array) -> jax.Array:
    """(..., I, J, B) -> (..., J, I, B)."""
    return jnp.swapaxes(a, -3, -2)


def cross(a: jax.Array, b: jax.Array) -> jax.Array:
    """aᵀb: (..., N, I, B), (..., N, J, B) -> (..., I, J, B)."""
    return _contract(a[..., :, :, None, :], b[..., :, None, :, :], -4, -4)


def square(root: jax.Array) -> jax.Array:
    """UᵀU: (..., N, S, B) -> (..., S, S, B)."""
    return cross(root, root)


def outer(a: jax.Array, b: jax.Array) -> jax.Array:
    """a bᵀ, lane by lane: (I, N, B), (J, N, B) -> (I, J, B). Few rows I are taken one by one: much faster."""
    if len(a) > tuning.UNROLLED_COLUMNS:
        return matmul(a, transposed(b))
    return jnp.stack([times(b, a[i]) for i in range(len(a))])


def once(x: jax.Array) -> jax.Array:
    """A barrier: fused with a sum of products that follows, x would be computed again for every term."""
    return jax.lax.optimization_barrier(x)


def orthogonalize(columns: jax.Array, others: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Modified Gram-Schmidt: columns (N, K, B) = Q R, and others (N, L, B) = Q R' + rest.

    Returns Q (N, K, B), R (K, K, B) upper triangular, R' (K, L, B), rest (N, L, B). A column that depends on
    those before, up to rounding, gives a zero column of Q and a zero row of R. The errors of R, R' and rest are those
    of a Householder factorisation (Björck 1967, Solving linear least squares problems by Gram-Schmidt, BIT 7).
    """
    count = columns.shape[1]
    lowest = (4 * jnp.finfo(columns.dtype).eps) ** 2 * jnp.sum(jnp.square(columns), axis=0)

    def project(whole: jax.Array, column: jax.Array, least: jax.Array) -> tuple[jax.Array, jax.Array]:
        size = jnp.sum(jnp.square(column), axis=0)
        used = size > least
        direction = once(column * jnp.where(used, jax.lax.rsqrt(jnp.where(used, size, 1)), 0)[None])
        return direction, once(_contract(direction[:, None], whole, 0, 0))

    if count <= tuning.UNROLLED_COLUMNS:
        # Columns that are done are dropped: half the work.
        rest = once(jnp.concatenate([columns, others], axis=1))
        directions, rows = [], []
        for j in range(count):
            direction, along = project(rest, rest[:, 0], lowest[j])
            rest = once(rest[:, 1:] - direction[:, None] * along[None, 1:])
            directions.append(direction)
            rows.append(jnp.concatenate([jnp.zeros_like(along[:1])] * j + [along], axis=0))
        every = jnp.stack(rows)
        return jnp.stack(directions, axis=1), every[:, :count], every[:, count:], rest

    whole = jnp.concatenate([columns, others], axis=1)
    index = jnp.arange(whole.shape[1])[:, None]

    def body(carry: jax.Array, j: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        direction, along = project(carry, jnp.take(carry, j, axis=1), jnp.take(lowest, j, axis=0))
        return carry - direction[:, None] * along[None], (direction, jnp.where(index >= j, along, 0))

    rest, (directions_, every) = jax.lax.scan(body, whole, jnp.arange(count))
    return jnp.moveaxis(directions_, 0, 1), every[:, :count], every[:, count:], rest[:, count:]


def triangular(rows: jax.Array) -> jax.Array:
    """The upper triangular U (S, S, B) with UᵀU = rowsᵀ rows, for rows (N, S, B)."""
    return orthogonalize(rows, rows[:, :0])[1]


def back_substitute(upper: jax.Array, right: jax.Array) -> jax.Array:
    """upper⁻¹ right: (..., S, S, B), (..., S, K, B); rows of a zero pivot are 0."""
    count = upper.shape[-2]
    diagonal = jnp.diagonal(upper, axis1=-3, axis2=-2)
    used = diagonal > 0
    inverse = jnp.where(used, 1 / jnp.where(used, diagonal, 1), 0)
    solution: list[jax.Array] = []
    for i in reversed(range(count)):
        value = right[..., i, :, :]
        for done, j in enumerate(range(count - 1, i, -1)):
            value = value - upper[..., i, j, None, :] * solution[done]
        solution.append(value * inverse[..., None, :, i])
    return jnp.stack(solution[::-1], axis=-3)


def inverse(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Inverses of positive definite matrices (S, S, B), and log det a / 2 (B,): by the sweep operator, S³ an inverse.

    (Goodnight 1979, A tutorial on the SWEEP operator, The American Statistician 33.)
    """
    size = len(a)
    index = jnp.arange(size)

    def sweep(k: jax.Array | int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        a, half_logdet = carry
        row = jnp.take(a, k, axis=0)
        pivot = jnp.take(row, k, axis=0)
        here = (index == k)[:, None]
        # With a -1 in the place of the pivot, one outer product gives the pivot's row and column too.
        scaled = jnp.where(here, -1, row) / pivot[None]
        rest = jnp.where(here[:, None] | here[None], 0, a)
        swept = rest - jnp.where(here, -1, row)[:, None] * scaled[None]
        return once(swept), half_logdet + 0.5 * jnp.log(pivot)

    start = (a, jnp.zeros(a.shape[-1], a.dtype))
    if size > tuning.UNROLLED_COLUMNS:
        a, half_logdet = jax.lax.fori_loop(0, size, sweep, start)
    else:
        a, half_logdet = functools.reduce(lambda carry, k: sweep(k, carry), range(size), start)
    return -a, half_logdet


def generalized_inverse(root: jax.Array) -> jax.Array:
    """U⁻ (S, S) of an upper triangular root U, in which zero rows are left out: w = Uᵀ a gives a = (U⁻)ᵀ w."""
    eye = jnp.eye(len(root), dtype=root.dtype)
    return back_substitute(root[:, :, None], eye[:, :, None])[:, :, 0]


def sum_steps(x: jax.Array) -> jax.Array:
    """Sum over the first axis, in two stages: rounding grows with the root of its length."""
    steps = len(x)
    size = max(1, int(steps**0.5))
    whole = steps // size * size
    parts = jnp.sum(x[:whole].reshape(steps // size, size, *x.shape[1:]), axis=1)
    return jnp.sum(parts, axis=0) + jnp.sum(x[whole:], axis=0)


def over_steps(function: Callable, arrays: Any) -> tuple[Any, Any]:
    """Map `function` over the steps of arrays (T, ..., B), without recursion. It takes arrays (..., lanes) and returns
    a pair of trees of such arrays: results of single steps, returned as (T, ..., B), and terms, whose sums over the
    steps are returned as (..., B).

    Steps count as lanes, some hundred matrices at a time, so that they stay in fast memory. They are padded by steps of
    zeros, whose terms must be 0. Arrays of one lane broadcast; if all have one, so have the results. None stays None.
    """
    leaves = jax.tree.leaves(arrays)
    steps, width = len(leaves[0]), max(leaf.shape[-1] for leaf in leaves)
    # Sequences of one step have no pairs of neighbours: no steps at all.
    group = max(1, min(steps, tuning.LANES_AT_A_TIME // width))
    count = -(-steps // group)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.broadcast_to(x, (*x.shape[:-1], width))
        x = jnp.pad(x, ((0, count * group - steps), *((0, 0),) * (x.ndim - 1)))
        x = jnp.moveaxis(x.reshape(count, group, *x.shape[1:]), 1, -2)
        return x.reshape(*x.shape[:-2], group * width)

    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x.reshape(*x.shape[:-1], group, width), -2, 1)
        return x.reshape(count * group, *x.shape[2:])[:steps]

    def add(sums: Any, at: Any) -> tuple[Any, Any]:
        number, piece = at
        found, new = function(piece)
        new = jax.tree.map(lambda x: jnp.sum(x.reshape(*x.shape[:-1], group, width), axis=-2), new)
        return jax.tree.map(lambda total, x: total.at[number // size].add(x), sums, new), found

    pieces = jax.tree.map(split, arrays)
    piece = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), pieces)
    new = jax.eval_shape(lambda at: function(at)[1], piece)
    # About sqrt(count) partial sums of sqrt(count) pieces each: rounding grows with that root.
    size = max(1, int(count**0.5))
    zero = jax.tree.map(lambda x: jnp.zeros((-(-count // size), *x.shape[:-1], width), x.dtype), new)
    sums, found = jax.lax.scan(add, zero, (jnp.arange(count), pieces))
    return jax.tree.map(join, found), jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)
