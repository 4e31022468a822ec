"""Leading eigenvalues of a matrix of which only products with vectors are known."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import tuning
from .elementary import product
from .factorisations import one_at_a_time

# Squarings of a small matrix: eigenvalues that differ by 1e-8 of their size are told apart.
_SQUARINGS = 34

# Cycles at most: each of them brings the residual down by some orders of magnitude.
_CYCLES = 30

symmetric_eigen: Callable[[jax.Array], Any] = one_at_a_time(lambda matrix: tuple(jnp.linalg.eigh(matrix)))
symmetric_eigen.__doc__ = "Eigenvalues (P,), ascending, and eigenvectors (P, P), in columns, of a symmetric matrix."


class Krylov(NamedTuple):
    """An orthonormal basis of a Krylov space as it grows, of M directions in the end.

    basis: V (M, P), rows of 0 where there is none yet.
    image: H (M, M) = V A Vᵀ.
    vector: (P,), the direction that A is asked about next.
    left: how far the image of the last direction reaches out of the basis.
    """

    basis: jax.Array
    image: jax.Array
    vector: jax.Array
    left: jax.Array

    def grown(self, number: jax.Array, moved: jax.Array) -> "Krylov":
        """With direction `number`, whose image under A is `moved` (P,).

        Where the space is exhausted it is gone on with anywhere, so that a basis of all P directions is complete,
        eigenvalues that occur several times included.
        Saad, Numerical Methods for Large Eigenvalue Problems, section 6.2.
        """
        basis = self.basis.at[number].set(self.vector)
        width, size = basis.shape
        anywhere = jnp.asarray(np.random.default_rng(0).normal(size=(width, size)), basis.dtype)[number]
        both, along = _cleared(jnp.stack([moved, anywhere]), basis)
        length, other = jnp.linalg.norm(both, axis=1)
        ended = length <= 10 * jnp.finfo(basis.dtype).eps * (1 + jnp.linalg.norm(moved))
        left = jnp.where(ended, 0, length)
        return Krylov(
            basis=basis,
            image=self.image.at[:, number].set(along[0]).at[number + 1, number].set(left, mode="drop"),
            vector=jnp.where(ended, both[1] / jnp.where(other > 0, other, 1), both[0] / jnp.where(ended, 1, length)),
            left=left,
        )


def _cleared(vectors: jax.Array, basis: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What of vectors (2, P) is outside of a basis (M, P), and their coefficients inside."""
    total = jnp.zeros((len(vectors), len(basis)), basis.dtype)
    for _ in range(2):  # once loses orthogonality, twice is enough
        along = product(vectors, basis, "vp,mp->vm")
        vectors, total = vectors - product(along, basis, "vm,mp->vp"), total + along
    return vectors, total


def krylov_space(start: jax.Array, width: int) -> Krylov:
    """The space of `start` (P,), not yet grown, up to `width` directions, or P where that is less."""
    width, size = min(width, len(start)), jnp.linalg.norm(start)
    return Krylov(
        basis=jnp.zeros((width, len(start)), start.dtype),
        image=jnp.zeros((width, width), start.dtype),
        vector=start / jnp.where(size > 0, size, 1),
        left=size,
    )


def scattered(theta: jax.Array) -> jax.Array:
    """A vector (P,) without any pattern, always the same, every entry of about the size of 1 + |theta|."""
    return jnp.asarray(np.random.default_rng(1).normal(size=theta.shape), theta.dtype) * (1 + jnp.abs(theta))


def leading_pairs(matrix: jax.Array, count: int) -> tuple[jax.Array, ...]:
    """The `count` eigenvalues largest in size of a small matrix (M, M), if real, and eigenvectors (count, M).

    Those from the right have length 1, and those from the left the product 1 with these. By squaring the matrix until
    one direction is left, and taking that one out (Hotelling's deflation): products alone, which stand still under no
    `vmap`.
    """

    def one(matrix: jax.Array, _: None) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        def square(_: int, power: jax.Array) -> jax.Array:
            power = product(power, power, "ij,jk->ik")
            largest = jnp.max(jnp.abs(power))
            return power / jnp.where(largest > 0, largest, 1)

        largest = jnp.max(jnp.abs(matrix))
        power = jax.lax.fori_loop(0, _SQUARINGS, square, matrix / jnp.where(largest > 0, largest, 1))
        place = jnp.argmax(jnp.abs(jnp.diagonal(power)))
        right, left = power[:, place], power[place]
        size = jnp.linalg.norm(right)
        right = right / jnp.where(size > 0, size, 1)
        both = product(left, right, "i,i->")
        left = left / jnp.where(both != 0, both, 1)
        value = product(left, product(matrix, right, "ij,j->i"), "i,i->")
        return matrix - value * right[:, None] * left[None], (value, right, left)

    return jax.lax.scan(one, matrix, length=count)[1]


def leading_eigenvalues(
    times: Callable[[jax.Array], jax.Array], start: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """The `count` eigenvalues largest in size of a matrix with real ones, descending, and eigenvectors (count, P).

    By Arnoldi's method, restarted from the sum of what it found until its residual is at most sqrt(eps); up to
    `tuning.SPECTRUM` parameters its basis is complete, and the first cycle exact.
    """
    width, tolerance = max(tuning.SPECTRUM, 2 * count), jnp.sqrt(jnp.finfo(start.dtype).eps)

    def cycle(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        number, start, *_ = carry
        space = krylov_space(start, width)
        space = jax.lax.fori_loop(
            0, len(space.basis), lambda number, space: space.grown(number, times(space.vector)), space
        )
        values, inside, _ = leading_pairs(space.image, count)
        vectors = product(inside, space.basis, "km,mp->kp")
        return number + 1, jnp.sum(vectors, axis=0), values, vectors, space.left * jnp.max(jnp.abs(inside[:, -1]))

    unknown = jnp.zeros(count, start.dtype), jnp.zeros((count, len(start)), start.dtype)
    begin: tuple[jax.Array, ...] = (jnp.zeros((), jnp.int32), start, *unknown, jnp.full((), jnp.inf, start.dtype))
    found = jax.lax.while_loop(lambda carry: (carry[0] < _CYCLES) & (carry[-1] > tolerance), cycle, begin)
    values, vectors = found[2:4]
    order = jnp.argsort(-values)
    return values[order], vectors[order]
