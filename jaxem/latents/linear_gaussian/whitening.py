"""Observations of linear-Gaussian states, in coordinates in which their noise is white."""

import jax
import jax.numpy as jnp

from ... import numerics
from ...numerics import tuning
from ...record import record
from .. import lanewise
from .affine import apply
from .elements import Evidence


@record
class Whitened:
    """Complete observations, in coordinates in which their noise is white: y_t = C z_t + N(0, I).

    emission    C   (D, S)
    values      y   (T, D, B)
    normaliser      (), the constant of the log-density of a step
    directions      (D, P), P = min(D, S), orthonormal, spanning the range of C; None for all of them, P = D
    matrix          (P, S), directionsᵀ C, so that no step of a recursion has anything of size D
    """

    emission: jax.Array
    values: jax.Array
    normaliser: jax.Array
    directions: jax.Array | None
    matrix: jax.Array

    @property
    def compressed(self) -> jax.Array:
        """directionsᵀ y, the part of y that depends on the state: (T, P, B)."""
        return self.values if self.directions is None else apply(self.directions.T, self.values)

    def constant(self) -> jax.Array:
        """The log-density of the rest of y, with the normaliser of all of it: (T, B)."""
        total = jnp.broadcast_to(self.normaliser, (len(self.values), self.values.shape[2]))
        if self.directions is None:
            return total
        rest = self.values - apply(self.directions, self.compressed)
        return total - 0.5 * jnp.sum(jnp.square(rest), axis=1)


def whiten(emission: jax.Array, covariance: jax.Array, residuals: jax.Array) -> Whitened:
    """From residuals (T, D, B) = emission z_t + N(0, covariance), with emission (D, S), covariance (D, D) or (D,)."""
    columns, states = emission.shape
    if covariance.ndim == 1:
        scale = jax.lax.rsqrt(covariance)
        half_logdet = -jnp.sum(jnp.log(scale))
        white, values = scale[:, None] * emission, scale[None, :, None] * residuals
    else:
        factor = numerics.cholesky(covariance)
        inverse, half_logdet = numerics.inverse_lower(factor), jnp.sum(jnp.log(jnp.diagonal(factor)))
        white, values = numerics.product(inverse, emission, "ij,js->is"), apply(inverse, residuals)
    normaliser = -half_logdet - 0.5 * columns * jnp.log(jnp.asarray(2 * jnp.pi, white.dtype))
    directions, matrix = None, white
    if columns > states:
        first, upper, _, _ = lanewise.orthogonalize(white[:, :, None], white[:, :0, None])
        # Twice: directions are then orthogonal to the last bit.
        again, more, _, _ = lanewise.orthogonalize(first, first[:, :0])
        directions, matrix = again[..., 0], numerics.product(more[..., 0], upper[..., 0], "ij,jk->ik")
    return Whitened(emission=white, values=values, normaliser=normaliser, directions=directions, matrix=matrix)


@record
class Completed:
    """The observations' noise given a state z, where missing entries are latent: their noise is expected given that of
    the entries seen.

    filled      (T, D, B)             the expected noise is filled - loadings z
    loadings    (T, D, S, B)          rows of the emission where an entry is seen, else their regressions on those
    observed    (T, B)                whether any entry of a step is seen
    covariance  (D, D, B), or (D, B)  of the noise given the state, summed over the steps that are observed
    """

    filled: jax.Array
    loadings: jax.Array
    observed: jax.Array
    covariance: jax.Array


def compress(
    emission: jax.Array, covariance: jax.Array, residuals: jax.Array, seen: jax.Array
) -> tuple[Evidence, Completed]:
    """The evidence on the states, and the noise, where only entries `seen` (T, D, B) are observed; residuals (T, D, B)
    are 0 elsewhere."""
    columns, states = emission.shape
    dtype = residuals.dtype

    def step(at: tuple[jax.Array, jax.Array]) -> tuple[tuple[jax.Array, ...], jax.Array]:
        residual, known = at
        there = known.astype(dtype)
        if covariance.ndim == 1:
            scale = there * jax.lax.rsqrt(covariance)[:, None]
            white, values = scale[:, None] * emission[:, :, None], scale * residual
            half_logdet = 0.5 * jnp.sum(there * jnp.log(covariance)[:, None], axis=0)
            filled, loadings = residual, there[:, None] * emission[:, :, None]
            left = (1 - there) * covariance[:, None]
        else:
            white, values, across, half_logdet = _eliminate(emission, covariance, residual, there)
            filled = jnp.where(known, residual, lanewise.times(lanewise.transposed(across), values))
            loadings = jnp.where(known[:, None], emission[:, :, None], lanewise.cross(across, white))
            explained = lanewise.outer(lanewise.transposed(across), lanewise.transposed(across))
            left = (1 - there)[:, None] * (1 - there)[None] * (covariance[:, :, None] - explained)
        constant = -half_logdet - 0.5 * jnp.sum(there, axis=0) * jnp.log(jnp.asarray(2 * jnp.pi, dtype))
        if columns > states:
            _, white, along, rest = lanewise.orthogonalize(white, values[:, None])
            values, constant = along[:, 0], constant - 0.5 * jnp.sum(jnp.square(rest[:, 0]), axis=0)
        observed = jnp.any(known, axis=0)
        return (white, values, constant, filled, loadings, observed), numerics.to_rank(observed, left.ndim) * left

    found, left = lanewise.over_steps(step, (residuals, seen))
    white, values, constant, filled, loadings, observed = found
    evidence = Evidence(matrix=white, values=values, constant=constant)
    return evidence, Completed(filled=filled, loadings=loadings, observed=observed, covariance=left)


def _eliminate(
    emission: jax.Array, covariance: jax.Array, residual: jax.Array, there: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Of the seen entries' covariance L Lᵀ: L⁻¹ times their emission (D, S, B), residual (D, B) and covariance with all
    (D, D, B), and log det L (B,); rows that are not seen are 0."""
    columns, states = emission.shape
    eye = jnp.eye(columns, dtype=there.dtype)[:, :, None]
    whole = jnp.concatenate(
        [
            there[:, None] * there[None] * covariance[:, :, None] + (1 - there)[:, None] * eye,
            there[:, None] * emission[:, :, None],
            residual[:, None],
            there[:, None] * covariance[:, :, None],
        ],
        axis=1,
    )

    if columns <= tuning.UNROLLED_COLUMNS:
        rows, pivots, rest = [], [], lanewise.once(whole)
        for j in range(columns):
            pivots.append(rest[0, 0])
            row = lanewise.once(rest[0] * jax.lax.rsqrt(rest[0, 0])[None])
            rest = lanewise.once(rest[1:, 1:] - row[1 : columns - j, None] * row[None, 1:])
            rows.append(row[columns - j :])
        eliminated, log_pivots = jnp.stack(rows), jnp.log(jnp.stack(pivots))
    else:
        index = jnp.arange(columns)[:, None]

        def body(rest: jax.Array, j: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            at, column = jnp.take(rest, j, axis=0), jnp.take(rest, j, axis=1)
            pivot = jnp.take(at, j, axis=0)
            inverse = jax.lax.rsqrt(pivot)
            row = lanewise.once(at * inverse[None])
            return rest - (jnp.where(index > j, column, 0) * inverse[None])[:, None] * row[None], (row, pivot)

        _, (eliminated, diagonal) = jax.lax.scan(body, whole, jnp.arange(columns))
        eliminated, log_pivots = eliminated[:, columns:], jnp.log(diagonal)
    half_logdet = 0.5 * jnp.sum(log_pivots, axis=0)
    return eliminated[:, :states], eliminated[:, states], eliminated[:, states + 1 :], half_logdet
