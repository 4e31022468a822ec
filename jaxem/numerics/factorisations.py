"""Factorisations of stacks of small matrices (..., D, D), and the bijection of covariances that rests on them.

On a CPU, LAPACK calls with leading batch axes hand their batch to the thread pool and wait for it inside one of the
pool's threads: two of them in flight on two threads wait for each other for ever, and independent parts of one program
are enough for that. So no such call may be in any program. Small matrices are factored by straight-line code, all
of a stack side by side; triangular inverses are matrix products; and what is left to LAPACK on a CPU is called for one
matrix at a time, under `vmap` too.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import tuning
from .elementary import product, repaired, to_rank


def one_at_a_time(function: Callable) -> Callable:
    """A function of one matrix that calls LAPACK; under `vmap`, which is how it takes stacks, a loop on CPUs.

    Elsewhere a stack stays one batched call: no pool of threads is waited for there, and a loop would be slow.
    Reverse-mode derivatives are for its users to define.
    """
    alone = jax.custom_batching.sequential_vmap(function)
    return lambda *arrays: jax.lax.platform_dependent(*arrays, cpu=alone, default=function)


def _over_stack(function: Callable, *arrays: jax.Array) -> Any:
    """`function` of matrices, for arrays (..., I, J) that share their leading axes."""
    stack = arrays[0].shape[:-2]
    if not stack:
        return function(*arrays)
    flat = (array.reshape(-1, *array.shape[-2:]) for array in arrays)
    return jax.tree.map(lambda leaf: leaf.reshape(*stack, *leaf.shape[1:]), jax.vmap(function)(*flat))


_lapack_cholesky = one_at_a_time(jnp.linalg.cholesky)
_lapack_solve = one_at_a_time(jnp.linalg.solve)
_lapack_svd = one_at_a_time(lambda matrix: tuple(jnp.linalg.svd(matrix, full_matrices=False)))


@jax.custom_jvp
def cholesky(matrix: jax.Array) -> jax.Array:
    """Lower Cholesky factor (..., D, D) of symmetric matrices; NaN where one is not positive definite."""
    if matrix.shape[-1] <= tuning.UNROLLED_FACTOR:
        return _eliminated(matrix, None)[0]
    return _over_stack(_lapack_cholesky, matrix)


@cholesky.defjvp
def _cholesky_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """dL = L phi(L⁻¹ dA L⁻ᵀ), phi the lower triangle with its diagonal halved (Smith 1995, Differentiation of the
    Cholesky algorithm; Murray 2016, arXiv:1602.07527). The symmetric part of dA counts, so cotangents are symmetric."""
    factor, change = cholesky(*primals), tangents[0]
    inverse = inverse_lower(factor)
    symmetric = 0.5 * (change + jnp.swapaxes(change, -1, -2))
    inner = product(product(inverse, symmetric, "...ij,...jk->...ik"), inverse, "...ik,...lk->...il")
    columns = factor.shape[-1]
    phi = jnp.asarray(np.tril(np.ones((columns, columns))) - 0.5 * np.eye(columns), factor.dtype)
    return factor, product(factor, to_rank(phi, inner.ndim) * inner, "...ij,...jk->...ik")


def floored_cholesky(matrix: jax.Array, floor: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cholesky factor of `matrix + diag(lift)`, with the smallest lift that keeps each pivot at its floor or above.

    matrix (..., D, D) symmetric, floor (..., D) -> factor (..., D, D) lower, lift (..., D).
    A pivot that needs no lift gets exactly 0, so a well-conditioned matrix is not changed by a bit.
    (A modified Cholesky factorisation; Gill, Murray & Wright, Practical Optimization, section 4.4.)
    """
    if matrix.shape[-1] <= tuning.UNROLLED_FACTOR:
        return _eliminated(matrix, floor)

    def attempt(matrix: jax.Array, floor: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        factor = cholesky(matrix)
        # Up to the first pivot that is too low the two factorisations are the same. A comparison with NaN fails.
        sound = jnp.square(jnp.diagonal(factor, axis1=-2, axis2=-1)) >= floor
        return (factor, jnp.zeros_like(matrix[..., 0])), ~jnp.all(sound)

    return repaired(attempt, _eliminated, matrix, jnp.broadcast_to(floor, matrix.shape[:-1]))


def _eliminated(matrix: jax.Array, floor: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """`floored_cholesky` column by column; without a floor nothing is lifted."""
    columns = matrix.shape[-1]
    index = np.arange(columns)  # constants, by which XLA tells that two factorisations of one matrix are the same

    def eliminate(
        rest: jax.Array, at: jax.Array, pivot: jax.Array, lowest: jax.Array | None, j: jax.Array | int
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        lifted = pivot if lowest is None else jnp.where(pivot < lowest, lowest, pivot)
        lift, root = lifted - pivot, jnp.sqrt(lifted)
        below = jnp.where(index > j, at / root[..., None], jnp.where(index == j, root[..., None], 0))
        return rest - below[..., :, None] * below[..., None, :], below, lift

    if columns <= tuning.UNROLLED_FACTOR:
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


@jax.custom_jvp
def inverse_lower(factor: jax.Array) -> jax.Array:
    """Inverse of lower triangular matrices (..., D, D); what is above their diagonals is not looked at.

    Diagonal blocks by forward substitution, all of them at once; then pairs of neighbours are joined, over and over:
    the corner below two inverses A⁻¹ and B⁻¹ is -B⁻¹ C A⁻¹. (Higham 2002, Accuracy and Stability of Numerical
    Algorithms, section 14.2, on such block methods.) D³ / 3 multiplications, nearly all of them in matrix products.
    """
    columns = factor.shape[-1]
    levels = max(0, (columns - 1) // tuning.UNROLLED_FACTOR).bit_length()
    width = -(-columns >> levels)
    size = width << levels
    # Padded by a diagonal of ones. Barriers, since levels that are fused are computed again inside of one another.
    room = [(0, 0)] * (factor.ndim - 2) + [(0, size - columns)] * 2
    ones = to_rank(jnp.asarray(np.diag(np.arange(size) >= columns), factor.dtype), factor.ndim)
    padded = factor if size == columns else jnp.pad(factor, room) + ones
    inverse = _substituted(_diagonal_blocks(padded, width))
    for _ in range(levels):
        inverse, corner = jax.lax.optimization_barrier(
            (inverse, _diagonal_blocks(padded, 2 * width)[..., width:, :width])
        )
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        corner = product(product(second, corner, "...ij,...jk->...ik"), first, "...ij,...jk->...ik")
        above = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        inverse = jnp.concatenate([above, jnp.concatenate([-corner, second], axis=-1)], axis=-2)
        width *= 2
    return inverse[..., 0, :columns, :columns]


@inverse_lower.defjvp
def _inverse_lower_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """dW = -W dL W."""
    inverse = inverse_lower(*primals)
    moved = product(inverse, jnp.tril(tangents[0]), "...ij,...jk->...ik")
    return inverse, -product(moved, inverse, "...ij,...jk->...ik")


def _diagonal_blocks(matrix: jax.Array, width: int) -> jax.Array:
    """(..., D, D) -> (..., D / width, width, width)."""
    count = matrix.shape[-1] // width
    if count == 1:
        return matrix[..., None, :, :]
    blocks = matrix.reshape(*matrix.shape[:-2], count, width, count, width)
    return jnp.moveaxis(jnp.diagonal(blocks, axis1=-4, axis2=-2), -1, -3)


def _substituted(factor: jax.Array) -> jax.Array:
    """Inverse of small lower triangular matrices (..., D, D), by forward substitution."""
    columns = factor.shape[-1]
    rows: list[jax.Array] = []
    for i, unit in enumerate(np.eye(columns, dtype=factor.dtype)):
        row = jnp.broadcast_to(unit, (*factor.shape[:-2], columns))
        for j in range(i):
            row = row - factor[..., i, j, None] * rows[j]
        rows.append(row / factor[..., i, i, None])
    return jnp.stack(rows, axis=-2)


def solve(matrix: jax.Array, right: jax.Array) -> jax.Array:
    """matrix⁻¹ right of a general matrix (D, D) and a vector (D,); derivatives by the same solution."""

    def times(vector: jax.Array) -> jax.Array:
        return product(matrix, vector, "ij,j->i")

    return jax.lax.custom_linear_solve(
        times,
        right,
        lambda _, right: _lapack_solve(matrix, right),
        transpose_solve=lambda _, right: _lapack_solve(matrix.T, right),
    )


def singular_values(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Thin singular value decomposition U, s, Vᵀ of a matrix (I, J), without reverse-mode derivatives."""
    return _lapack_svd(matrix)


def damped_least_squares(rows: jax.Array, target: jax.Array, shrunk: jax.Array) -> jax.Array:
    """The g (M,) that minimises |target - rowsᵀ g|² + damping |g|², for rows (M, P) and a target (P,).

    shrunk: |g|² as a share of that of the undamped g, in (0, 1]; the damping is chosen to reach it.
    Directions that the rows lack, to rounding, are left out.
    """
    dtype = target.dtype
    left, sizes, right = singular_values(rows)
    along = right @ target
    good = sizes > 8 * jnp.finfo(dtype).eps * len(rows) * sizes[0]
    sizes = jnp.where(good, sizes, 1)

    def coefficients(damping: jax.Array) -> jax.Array:
        return jnp.where(good, sizes * along / (jnp.square(sizes) + damping), 0)

    goal = shrunk * jnp.sum(jnp.square(coefficients(jnp.zeros((), dtype))))
    scale = jnp.square(jnp.max(jnp.where(good, sizes, 0)))
    low, high = jnp.log(jnp.finfo(dtype).eps) * 2, -jnp.log(jnp.finfo(dtype).eps)

    def halve(_: int, between: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = between
        middle = 0.5 * (low + high)
        too_long = jnp.sum(jnp.square(coefficients(scale * jnp.exp(middle)))) > goal
        return jnp.where(too_long, middle, low), jnp.where(too_long, high, middle)

    low, _ = jax.lax.fori_loop(0, 30, halve, (low, high))
    return coefficients(scale * jnp.exp(low)) @ left.T


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
