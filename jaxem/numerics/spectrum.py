"""Leading eigenvalues of a matrix of which only products with vectors are known."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import tuning
from .elementary import product
from .factorisations import one_at_a_time
from .krylov import krylov_space

# Squarings of a small matrix: eigenvalues that differ by 1e-8 of their size are told apart.
_SQUARINGS = 34

# Cycles at most: each of them brings the residual down by some orders of magnitude.
_CYCLES = 30

symmetric_eigen: Callable[[jax.Array], Any] = one_at_a_time(lambda matrix: tuple(jnp.linalg.eigh(matrix)))
symmetric_eigen.__doc__ = "Eigenvalues (P,), ascending, and eigenvectors (P, P), in columns, of a symmetric matrix."


def scattered(theta: jax.Array) -> jax.Array:
    """A vector (P,) without any pattern, always the same, every entry of about the size of 1 + |theta|."""
    return jnp.asarray(np.random.default_rng(1).normal(size=theta.shape), theta.dtype) * (1 + jnp.abs(theta))


def leading_pairs(matrix: jax.Array, count: int) -> tuple[jax.Array, ...]:
    """The `count` eigenvalues largest in size of a small matrix (M, M), if real, and unit eigenvectors (count, M).

    By squaring the matrix until one direction dominates, and deflating by it (Hotelling): products alone, since LAPACK
    calls can deadlock under `vmap` (see `factorisations`).
    """

    def one(matrix: jax.Array, _: None) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        power = power_of(matrix, _SQUARINGS)
        place = jnp.argmax(jnp.abs(jnp.diagonal(power)))
        right, left = power[:, place], power[place]
        size = jnp.linalg.norm(right)
        right = right / jnp.where(size > 0, size, 1)
        both = product(left, right, "i,i->")
        left = left / jnp.where(both != 0, both, 1)
        value = product(left, product(matrix, right, "ij,j->i"), "i,i->")
        return matrix - value * right[:, None] * left[None], (value, right)

    return jax.lax.scan(one, matrix, length=count)[1]


def power_of(matrix: jax.Array, doublings: int) -> jax.Array:
    """The power 2 ** doublings of a small matrix (M, M), up to a positive factor."""

    def square(_: int, power: jax.Array) -> jax.Array:
        power = power / jnp.maximum(jnp.max(jnp.abs(power)), jnp.finfo(matrix.dtype).tiny)
        return product(power, power, "ij,jk->ik")

    return jax.lax.fori_loop(0, doublings, square, matrix)


def leading_direction(matrix: jax.Array) -> jax.Array:
    """The eigenvector (M,) of the eigenvalue largest in size of a small matrix (M, M), if that is real."""
    power = power_of(matrix, _SQUARINGS)
    return power[:, jnp.argmax(jnp.abs(jnp.diagonal(power)))]


def series(matrix: jax.Array, vector: jax.Array, doublings: int) -> jax.Array:
    """(I + A + A² + ...) v, 2 ** doublings terms, for a small matrix A (M, M) and v (M,)."""

    def double(_: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        power, total = carry
        return product(power, power, "ij,jk->ik"), total + product(power, total, "ij,j->i")

    return jax.lax.fori_loop(0, doublings, double, (matrix, vector))[1]


def leading_eigenvalues(
    times: Callable[[jax.Array], jax.Array], start: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """The `count` eigenvalues largest in size of a matrix with real ones, descending, and eigenvectors (count, P).

    By Arnoldi's method, restarted from the sum of the eigenvectors until its residual is at most sqrt(eps); up to
    `tuning.SPECTRUM` parameters its basis is complete, and the first cycle exact.
    """
    width, tolerance = max(tuning.SPECTRUM, 2 * count), jnp.sqrt(jnp.finfo(start.dtype).eps)

    def cycle(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        number, start, *_ = carry
        space = krylov_space(start, width)
        space = jax.lax.fori_loop(
            0, len(space.basis), lambda number, space: space.grown(number, times(space.vector)), space
        )
        values, inside = leading_pairs(space.image, count)
        vectors = product(inside, space.basis, "km,mp->kp")
        return number + 1, jnp.sum(vectors, axis=0), values, vectors, space.left * jnp.max(jnp.abs(inside[:, -1]))

    unknown = jnp.zeros(count, start.dtype), jnp.zeros((count, len(start)), start.dtype)
    begin: tuple[jax.Array, ...] = (jnp.zeros((), jnp.int32), start, *unknown, jnp.full((), jnp.inf, start.dtype))
    found = jax.lax.while_loop(lambda carry: (carry[0] < _CYCLES) & (carry[-1] > tolerance), cycle, begin)
    values, vectors = found[2:4]
    order = jnp.argsort(-values)
    return values[order], vectors[order]
