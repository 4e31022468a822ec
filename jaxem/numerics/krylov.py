"""Linear systems of which only products with vectors are known."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from . import tuning


def gmres(times: Callable[[jax.Array], jax.Array], right: jax.Array) -> jax.Array:
    """The solution x (P,) of `times(x) = right` by restarted GMRES; NaN where none is found.

    From nothing, so that what a singular but consistent system leaves open stays 0. Each cycle builds an orthonormal
    basis of at most `tuning.KRYLOV` directions and takes the combination with the smallest residual; cycles go on while
    that at least halves. As exact as elimination where P is no larger than the basis. A residual above sqrt(eps) of
    the right-hand side is no solution.
    Saad & Schultz (1986), GMRES, SIAM J. Scientific and Statistical Computing 7.
    """
    eps = jnp.finfo(right.dtype).eps
    length = jnp.linalg.norm(right)

    def cycle(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        found, rest, size, _ = carry
        found = found + _nearest(times, rest, 10 * eps * length)
        rest = right - times(found)
        after = jnp.linalg.norm(rest)
        return found, rest, after, (after < 0.5 * size) & (after > 20 * eps * length)

    start: tuple[jax.Array, ...] = (jnp.zeros_like(right), right, length, length > 0)
    found, _, size, _ = jax.lax.while_loop(lambda carry: carry[3], cycle, start)
    return jnp.where(size <= jnp.sqrt(eps) * length, found, jnp.nan)


def gmres_in_range(times: Callable[[jax.Array], jax.Array], right: jax.Array) -> jax.Array:
    """The same where only a part of `right` can be reached: the solution for that part, which is an image itself.

    It is what the transpose of `gmres` has to be: a matrix A that is singular, but none of whose powers lose more, has
    one inverse within its range, whose transpose is that of Aᵀ. It solves A² x = A right, the rest of which is 0, and
    is asked for only where A x = right has no solution: the square of a matrix costs digits.
    (The group inverse; Ben-Israel & Greville, Generalized Inverses, section 4.4.)
    """
    found = gmres(times, right)
    solved = jnp.all(jnp.isfinite(found))

    def of_square(_: jax.Array, found: jax.Array) -> jax.Array:
        return gmres(lambda vector: times(times(vector)), times(right))

    return jax.lax.fori_loop(0, jnp.where(solved, 0, 1), of_square, found)


def _nearest(times: Callable[[jax.Array], jax.Array], rest: jax.Array, enough: jax.Array) -> jax.Array:
    """One cycle: of the Krylov space of `rest`, the vector whose image is nearest to it, or no further than `enough`.

    basis V (m + 1, P): times(V_j) = sum_i H_ij V_i. triangle R (m, m): H after the rotations `turns` (m, 2), a cosine
    and a sine each, that make it triangular. target (m + 1,): the length of `rest` after these; its last entry so far
    is the residual.
    """
    width = min(tuning.KRYLOV, len(rest))
    size = jnp.linalg.norm(rest)

    def grow(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        count, basis, triangle, turns, target = carry
        image = times(basis[count])
        column = jnp.zeros(width + 1, rest.dtype)
        for _ in range(2):  # once loses orthogonality, twice is enough
            along = basis @ image
            image, column = image - along @ basis, column + along
        left = jnp.linalg.norm(image)
        basis = basis.at[count + 1].set(image / jnp.where(left > 0, left, 1))
        column = column.at[count + 1].set(left)
        column = jax.lax.fori_loop(0, count, lambda number, column: _turned(turns[number], number, column), column)
        upper, lower = column[count], column[count + 1]
        both = jnp.hypot(upper, lower)
        turn = jnp.stack([upper, lower]) / jnp.where(both > 0, both, 1)
        column, target = _turned(turn, count, column), _turned(turn, count, target)
        return count + 1, basis, triangle.at[:, count].set(column[:width]), turns.at[count].set(turn), target

    start: tuple[jax.Array, ...] = (
        jnp.zeros((), jnp.int32),
        jnp.zeros((width + 1, len(rest)), rest.dtype).at[0].set(rest / jnp.where(size > 0, size, 1)),
        jnp.zeros((width, width), rest.dtype),
        jnp.zeros((width, 2), rest.dtype),
        jnp.zeros(width + 1, rest.dtype).at[0].set(size),
    )
    count, basis, triangle, _, target = jax.lax.while_loop(
        lambda carry: (carry[0] < width) & (jnp.abs(carry[-1][carry[0]]) > enough), grow, start
    )

    def substitute(number: jax.Array, found: jax.Array) -> jax.Array:
        row = width - 1 - number
        pivot = triangle[row, row]
        value = (target[row] - triangle[row] @ found) / jnp.where(pivot != 0, pivot, 1)
        return found.at[row].set(jnp.where((row < count) & (pivot != 0), value, 0))

    return jax.lax.fori_loop(0, width, substitute, jnp.zeros(width, rest.dtype)) @ basis[:width]


def _turned(turn: jax.Array, row: jax.Array, column: jax.Array) -> jax.Array:
    """A column with its entries `row` and the next one rotated."""
    cosine, sine = turn
    upper, lower = column[row], column[row + 1]
    return column.at[row].set(cosine * upper + sine * lower).at[row + 1].set(cosine * lower - sine * upper)
