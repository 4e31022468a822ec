"""Krylov spaces of matrices of which only products with vectors are known, and linear systems solved in them."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import tuning
from .elementary import product

Product = Callable[[jax.Array], jax.Array]


class Arnoldi(NamedTuple):
    """An orthonormal basis of a Krylov space as it grows, of M directions in the end.

    number: of directions whose image is known.
    directions: V (M + 1, P), rows of 0 where there is none yet.
    hessenberg: H (M, M + 1), A V_j = sum_i H_ji V_i.
    """

    number: jax.Array
    directions: jax.Array
    hessenberg: jax.Array

    @property
    def vector(self) -> jax.Array:
        """The direction (P,) whose image is needed next."""
        return self.directions[self.number]

    @property
    def basis(self) -> jax.Array:
        """V (M, P), but for the last one, whose image is never known."""
        return self.directions[:-1]

    @property
    def image(self) -> jax.Array:
        """V A Vᵀ (M, M)."""
        return self.hessenberg[:, :-1].T

    @property
    def left(self) -> jax.Array:
        """The norm of the part of A v outside of the basis, v its last vector."""
        return self.hessenberg[-1, -1]

    def grown(self, number: jax.Array, image: jax.Array, *, on: bool = True) -> "Arnoldi":
        """With the image (P,) of direction `number`.

        on: continue an exhausted space in an arbitrary direction, so that a basis of all P directions is complete,
            multiple eigenvalues included.
        Saad, Numerical Methods for Large Eigenvalue Problems, section 6.2.
        """
        directions, (width, _) = self.directions, self.hessenberg.shape
        if on:
            tiny = jnp.finfo(image.dtype).eps ** 0.75
            random = np.random.default_rng(0).normal(size=(width, len(image)))
            anywhere = jnp.asarray(random, image.dtype)[number]
            image = image + tiny * jnp.linalg.norm(image) * anywhere + jnp.finfo(image.dtype).tiny * anywhere

        def clear(_: int, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            rest, length, along = carry
            inside = product(directions, rest, "mp,p->m")
            rest = rest - product(inside, directions, "m,mp->p")
            size = jnp.linalg.norm(rest)
            return rest / jnp.where(size > 0, size, 1), length * size, along + length * inside

        # Orthogonalised three times: once is not enough for an image that lies within the space up to rounding.
        start = image, jnp.ones((), image.dtype), jnp.zeros(width + 1, image.dtype)
        direction, left, along = jax.lax.fori_loop(0, 3, clear, start)
        return Arnoldi(
            number=jnp.asarray(number + 1, jnp.int32),
            directions=directions.at[number + 1].set(direction),
            hessenberg=self.hessenberg.at[number].set(along.at[number + 1].set(left)),
        )


def krylov_space(start: jax.Array, width: int) -> Arnoldi:
    """The space of `start` (P,), not yet grown, up to `width` directions, or P where that is less."""
    width, size = min(width, len(start)), jnp.linalg.norm(start)
    return Arnoldi(
        number=jnp.zeros((), jnp.int32),
        directions=jnp.zeros((width + 1, len(start)), start.dtype).at[0].set(start / jnp.where(size > 0, size, 1)),
        hessenberg=jnp.zeros((width, width + 1), start.dtype),
    )


class Krylov(NamedTuple):
    """The Krylov space of the residual r of a linear system, M directions at most, and the least-squares problem in it.

    number: of directions so far, -1 before the residual is known.
    process: their basis, and its image.
    triangle: R (M, M), Hᵀ after the Givens rotations that make it triangular.
    turns: (M, 2), the cosine and sine of each rotation.
    target: (M + 1,), |r| e_1 after the rotations; the size of its entry `number` is the smallest residual.
    size: |r|.
    """

    number: jax.Array
    process: Arnoldi
    triangle: jax.Array
    turns: jax.Array
    target: jax.Array
    size: jax.Array

    @property
    def open(self) -> jax.Array:
        """Whether there is room for one more direction."""
        return self.number < len(self.turns)

    @property
    def left(self) -> jax.Array:
        """The smallest residual that a combination of the directions so far has."""
        return jnp.abs(self.target[self.number])

    def nearest(self) -> jax.Array:
        """The combination (P,) of the directions with the smallest residual, `left`."""
        width = len(self.turns)

        def substitute(number: jax.Array, found: jax.Array) -> jax.Array:
            row = width - 1 - number
            pivot = self.triangle[row, row]
            value = (self.target[row] - product(self.triangle[row], found, "m,m->")) / jnp.where(pivot != 0, pivot, 1)
            return found.at[row].set(jnp.where((row < self.number) & (pivot != 0), value, 0))

        found = jax.lax.fori_loop(0, width, substitute, jnp.zeros_like(self.target[1:]))
        return product(found, self.process.basis, "m,mp->p")


def krylov(rest: jax.Array) -> Krylov:
    """The space of one residual (P,), without a direction yet."""
    process, size = krylov_space(rest, tuning.KRYLOV), jnp.linalg.norm(rest)
    width = len(process.hessenberg)
    return Krylov(
        number=jnp.zeros((), jnp.int32),
        process=process,
        triangle=jnp.zeros((width, width), rest.dtype),
        turns=jnp.zeros((width, 2), rest.dtype),
        target=jnp.zeros(width + 1, rest.dtype).at[0].set(size),
        size=size,
    )


def grown(space: Krylov, image: jax.Array) -> Krylov:
    """The space with one more direction, from the image (P,) of `process.vector`."""
    count = space.number
    process = space.process.grown(count, image, on=False)
    column = process.hessenberg[count]
    turned = jax.lax.fori_loop(0, count, lambda row, column: _turned(space.turns[row], row, column), column)
    both = jnp.hypot(turned[count], turned[count + 1])
    turn = jnp.stack([turned[count], turned[count + 1]]) / jnp.where(both > 0, both, 1)
    return Krylov(
        number=count + 1,
        process=process,
        triangle=space.triangle.at[:, count].set(_turned(turn, count, turned)[:-1]),
        turns=space.turns.at[count].set(turn),
        target=_turned(turn, count, space.target),
        size=space.size,
    )


def _turned(turn: jax.Array, row: jax.Array, column: jax.Array) -> jax.Array:
    """A column with its entries `row` and the next one rotated."""
    cosine, sine = turn
    upper, lower = column[row], column[row + 1]
    return column.at[row].set(cosine * upper + sine * lower).at[row + 1].set(cosine * lower - sine * upper)


def explored(times: Product, right: jax.Array) -> Krylov:
    """The Krylov space of `times` from `right` (P,), all of it or as much as there is room for.

    The eigenvalues of its H are those of `times` within it, or near the outermost of these.
    """
    enough = jnp.finfo(right.dtype).eps ** 0.75 * jnp.linalg.norm(right)
    return jax.lax.while_loop(
        lambda space: space.open & (space.left > enough),
        lambda space: grown(space, times(space.process.vector)),
        krylov(right),
    )


def gmres(times: Product, right: jax.Array) -> jax.Array:
    """The solution x (P,) of `times(x) = right`; NaN where its relative residual exceeds sqrt(eps)."""
    return _good(*solved(times, right)[:2])


def _good(found: jax.Array, residual: jax.Array) -> jax.Array:
    return jnp.where(residual <= jnp.sqrt(jnp.finfo(found.dtype).eps), found, jnp.nan)


def solved(times: Product, right: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The x (P,) of restarted GMRES for `times(x) = right`, and its residual relative to `right`; and `times(right)`, a
    by-product of the first cycle.

    It starts from 0, so that components which a singular but consistent system leaves open stay 0. Each cycle builds an
    orthonormal basis of at most `tuning.KRYLOV` directions and takes the combination with the smallest residual; cycles
    go on while the residual at least halves. As exact as elimination where P is no larger than the basis. A program
    holds `times`, which may be large, once.
    Saad & Schultz (1986), GMRES, SIAM J. Scientific and Statistical Computing 7.
    """
    eps = jnp.finfo(right.dtype).eps
    fresh = krylov(right)
    enough = 10 * eps * fresh.size

    def cycle(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        found, before, image, first, _ = carry

        def useful(space: Krylov) -> jax.Array:
            return (space.number < 0) | ((space.size < 0.5 * before) & (space.left > enough))

        def grow(space: Krylov) -> Krylov:
            known = space.number < 0
            image = times(jnp.where(known, found, space.process.vector))
            return jax.lax.cond(known, lambda: krylov(right - image), lambda: grown(space, image))

        start = fresh._replace(number=-jnp.logical_not(first).astype(jnp.int32))  # the residual of x = 0 is known
        space = jax.lax.while_loop(lambda space: space.open & useful(space), grow, start)
        better = (space.size < 0.5 * before) & (space.size > enough)
        along = space.size * product(space.process.hessenberg[0], space.process.directions, "m,mp->p")
        found = found + jnp.where(better, space.nearest(), 0)
        return found, space.size, jnp.where(first, along, image), jnp.array(False), better

    unknown, nothing = jnp.full_like(fresh.size, jnp.inf), jnp.zeros_like(right)
    start: tuple[jax.Array, ...] = (nothing, unknown, nothing, jnp.array(True), jnp.array(True))
    found, size, image, _, _ = jax.lax.while_loop(lambda carry: carry[-1], cycle, start)
    return found, size / jnp.where(fresh.size > 0, fresh.size, 1), image


def gmres_in_range(times: Product, right: jax.Array) -> jax.Array:
    """`gmres` for a singular A where `right` may have a part in the null space: the x in the range of A that solves for
    the part in the range.

    The transpose of `gmres` has to be this: a singular A with rank A² = rank A has one inverse within its range, and
    its transpose is that of Aᵀ. The x solves A² x = A right, in which the part in the null space is 0. That system is
    solved only where A x = right has no solution, since squaring a matrix costs digits.
    (The group inverse; Ben-Israel & Greville, Generalized Inverses, section 4.4.)
    """

    def power(number: jax.Array, vector: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, number, lambda _, vector: times(vector), vector)

    def attempt(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        number, _, right = carry
        found, residual, image = solved(lambda vector: power(number, vector), right)
        return number + 1, _good(found, residual), image

    def unsolved(carry: tuple[jax.Array, ...]) -> jax.Array:
        number, found, _ = carry
        return (number <= 2) & ~jnp.all(jnp.isfinite(found))

    start: tuple[jax.Array, ...] = (jnp.ones((), jnp.int32), jnp.full_like(right, jnp.nan), right)
    return jax.lax.while_loop(unsolved, attempt, start)[1]
