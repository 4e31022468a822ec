"""Rotations of factors: a model has the same likelihood under all of them."""

import jax
import jax.numpy as jnp
import numpy as np

from ... import checks, numerics

# Sweeps over all pairs of factors. They converge as Jacobi's method for eigenvalues does: a few are enough.
_SWEEPS = 30


def canonical(loadings: jax.Array, noise: jax.Array) -> jax.Array:
    """Loadings (D, Q) so turned that loadingsᵀ noise⁻¹ loadings is diagonal, decreasing, and no column has a sum below
    0; noise: variances (D,)."""
    left, sizes, _ = numerics.singular_values(loadings / jnp.sqrt(noise)[:, None])
    turned = jnp.sqrt(noise)[:, None] * left * sizes[None]
    turned = jnp.where(jnp.sum(turned, axis=0) < 0, -1, 1)[None] * turned
    return jnp.pad(turned, ((0, 0), (0, loadings.shape[1] - turned.shape[1])))


def varimax(loadings: jax.Array, *, normalize: bool = True) -> jax.Array:
    """Loadings (D, Q) rotated to the largest sum over factors of the variance of their squares: few of them are large.

    normalize: rotate rows of unit length, so that columns of the data with small communality count as much as others.
    Factors come in decreasing sums of squares, each with a sum of loadings of at least 0. A model with these loadings
    has the same likelihood: `dataclasses.replace(params, loadings=varimax(params.loadings))`.
    Planar rotations in turn, each to its own maximum (Kaiser 1958, The varimax criterion for analytic rotation in
    factor analysis, Psychometrika 23).
    """
    loadings = checks.matrix("loadings", loadings)
    return _varimax(loadings, normalize)


@jax.jit
def _varimax(loadings: jax.Array, normalize: bool) -> jax.Array:
    rows, count = loadings.shape
    length = jnp.sqrt(jnp.sum(jnp.square(loadings), axis=1, keepdims=True))
    length = jnp.where(jnp.asarray(normalize) & (length > 0), length, 1)
    first, second = np.triu_indices(count, 1)

    def turn(columns: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        i, j = pair
        a, b = columns[i], columns[j]
        u, v = a * a - b * b, 2 * a * b
        across = 2 * (jnp.sum(u * v) - jnp.sum(u) * jnp.sum(v) / rows)
        along = jnp.sum(u * u - v * v) - (jnp.sum(u) ** 2 - jnp.sum(v) ** 2) / rows
        angle = 0.25 * jnp.arctan2(across, along)
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        return columns.at[i].set(cos * a + sin * b).at[j].set(cos * b - sin * a), None

    def sweep(_: int, columns: jax.Array) -> jax.Array:
        return jax.lax.scan(turn, columns, (jnp.asarray(first), jnp.asarray(second)))[0]

    columns = (loadings / length).T
    columns = (jax.lax.fori_loop(0, _SWEEPS, sweep, columns) if count > 1 else columns) * length.T
    columns = columns[jnp.argsort(-jnp.sum(jnp.square(columns), axis=1))]
    return (jnp.where(jnp.sum(columns, axis=1) < 0, -1, 1)[:, None] * columns).T
