"""Normal values behind rows that are observed in part, or through noise: their exact conditional moments.

A row's values v ~ N(m, C) are measured as x = v + e, e ~ N(0, S); a missing entry is not measured. Entries are taken
one after the other, as a Kalman filter takes scalar measurements (Durbin & Koopman 2012, Time Series Analysis by State
Space Methods, section 6.4), and each adds a term to log p(x). This is M² work an entry, as much as factoring the own
covariance of every row, whatever the patterns of missing entries. Entries are taken in the order of columns, so that
innovation variances of a row are at least those of a complete row: floors of covariances hold for them too.

Rows are lanes, the last axis, in blocks that stay in fast memory, and components come one after the other.

Letters: K components, D columns, N rows, B of them in a block; M values, D or with their noise 2D.
Little & Rubin (2002), Statistical Analysis with Missing Data, section 11.2; Ghahramani & Jordan (1994), Supervised
learning from incomplete data via an EM approach; Bovy, Hogg & Roweis (2011), Extreme deconvolution, Annals of Applied
Statistics 5.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .. import numerics, tree
from ..numerics import tuning
from ..record import record


@record
class Measured:
    """Rows as they were measured.

    values: (N, D), anything finite where an entry is missing.
    observed: (N, D), which entries are observed.
    noise: variances (N, D) or covariances (N, D, D) of their noise, 0 where an entry is missing; None without any.
    """

    values: jax.Array
    observed: jax.Array
    noise: jax.Array | None = None


@record
class Sums:
    """Expected moments about the means m, summed over rows with responsibilities r.

    count: (K,), sum r; rows of which nothing is observed are not counted, here and below: they tell nothing.
    first: (K, D), sum r E[v - m].
    second: (K, D, D), sum r E[(v - m)(v - m)ᵀ].
    loglik: (K,), sum r log p(x | k).
    """

    count: jax.Array
    first: jax.Array
    second: jax.Array
    loglik: jax.Array


@record
class Conditional:
    """Moments of values given what was measured of them, rows as lanes.

    shift: (D, B), E[v] - m.
    covariance: (D, D, B).
    log_density: (B,), log p(x).
    """

    shift: jax.Array
    covariance: jax.Array
    log_density: jax.Array


def log_prob(mean: jax.Array, covariance: jax.Array, rows: Measured) -> jax.Array:
    """Log-density of what is observed of every row: (K, D), (K, D, D) or one for all (1, D, D), rows -> (K, N)."""

    def block(rows: Measured) -> jax.Array:
        return _each(lambda m, c: conditional(m, c, rows).log_density, mean, covariance).T

    return tree.map_over_blocks(block, rows, _lanes(mean, rows)).T


def moments(mean: jax.Array, covariance: jax.Array, rows: Measured, r: jax.Array) -> Sums:
    """Expected moments of the values, with responsibilities r (K, N)."""

    def block(data: tuple[Measured, jax.Array], inside: jax.Array | None) -> Sums:
        rows, r = data
        counts = jnp.any(rows.observed, axis=1).astype(r.dtype)
        counts = counts if inside is None else counts * inside
        return _each(functools.partial(_sums, rows), mean, covariance, r.T * counts[None])

    return tree.sum_over_blocks(block, (rows, r.T), None, _lanes(mean, rows))


def means(mean: jax.Array, covariance: jax.Array, rows: Measured) -> jax.Array:
    """Conditional means of the values under every component: (N, K, D)."""

    def block(rows: Measured) -> jax.Array:
        found = _each(lambda m, c: m[:, None] + conditional(m, c, rows).shift, mean, covariance)
        return jnp.moveaxis(found, -1, 0)

    return tree.map_over_blocks(block, rows, _lanes(mean, rows))


def draws(key: jax.Array, mean: jax.Array, covariance: jax.Array, rows: Measured, labels: jax.Array) -> jax.Array:
    """Joint draws (N, M, D) of the values given what was measured of them, from the components of labels (N, M).

    Values and measurements are drawn from their joint distribution. The values are then corrected by their conditional
    mean given observed minus drawn measurements: exact, without a factorisation for every row (Matheron's rule;
    Durbin & Koopman 2002, Biometrika 89).
    """
    shape, dtype = (*labels.shape, mean.shape[1]), mean.dtype
    key_values, key_noise = jax.random.split(key)
    white, errors = jax.random.normal(key_values, shape, dtype), jnp.zeros(shape, dtype)
    if rows.noise is not None:
        errors = _coloured(rows.noise, jax.random.normal(key_noise, shape, dtype))
    factor = numerics.cholesky(covariance)

    def block(data: tuple[Measured, jax.Array, jax.Array, jax.Array]) -> jax.Array:
        rows, labels, white, errors = data

        def of(mean: jax.Array, covariance: jax.Array, factor: jax.Array) -> jax.Array:
            def one(white: jax.Array, error: jax.Array) -> jax.Array:
                free = mean[None] + numerics.product(white, factor, "bj,ij->bi")
                away = dataclasses.replace(rows, values=rows.values - free - error)
                return free + conditional(jnp.zeros_like(mean), covariance, away).shift.T

            return jax.vmap(one, (1, 1), 1)(white, errors)

        whole = jnp.broadcast_to(covariance, (mean.shape[0], *covariance.shape[1:]))
        each = jnp.broadcast_to(factor, whole.shape)
        drawn = jax.lax.map(lambda part: of(*part), (mean, whole, each))
        chosen = labels[None] == jnp.arange(mean.shape[0])[:, None, None]
        return jnp.sum(jnp.where(chosen[..., None], drawn, 0), axis=0)

    return tree.map_over_blocks(block, (rows, labels, white, errors), _lanes(mean, rows))


def _coloured(noise: jax.Array, white: jax.Array) -> jax.Array:
    """White noise (N, M, D) with variances (N, D) or covariances (N, D, D) given to its rows."""
    if noise.ndim == 2:
        return jnp.sqrt(noise)[:, None] * white
    variances = jnp.diagonal(noise, axis1=1, axis2=2)
    eps = jnp.finfo(noise.dtype).eps
    factor, _ = numerics.floored_cholesky(noise, eps * jnp.where(variances > 0, variances, 1))
    return numerics.product(factor, white, "nij,nmj->nmi")


def conditional(mean: jax.Array, covariance: jax.Array, rows: Measured) -> Conditional:
    """Moments of the values of one component: (D,), (D, D), rows (B, D)."""
    columns = mean.shape[0]
    observed = rows.observed.T
    deviations = jnp.where(observed, rows.values.T - mean[:, None], 0)
    start = jnp.broadcast_to(covariance[..., None], (columns, columns, rows.values.shape[0]))
    if rows.noise is None or rows.noise.ndim == 2:
        noise = jnp.zeros_like(deviations) if rows.noise is None else rows.noise.T
        return _measured(start, deviations, observed, noise)
    # Values and measurements together, of which the latter are measured exactly.
    own = start + jnp.moveaxis(rows.noise, 0, -1)
    joint = jnp.concatenate([jnp.concatenate([start, start], axis=1), jnp.concatenate([start, own], axis=1)], axis=0)
    found = _measured(joint, deviations, observed, jnp.zeros_like(deviations))
    return Conditional(
        shift=found.shift[:columns],
        covariance=found.covariance[:columns, :columns],
        log_density=found.log_density,
    )


def _measured(covariance: jax.Array, deviations: jax.Array, observed: jax.Array, noise: jax.Array) -> Conditional:
    """M values with covariances (M, M, B), the last D of which are measured: deviations, observed, noise (D, B)."""
    values, columns = covariance.shape[0], deviations.shape[0]

    def told(covariance: jax.Array, place: Any, step: jax.Array, kept: jax.Array) -> jax.Array:
        """Covariances after the entry at `place` was measured: its own are scaled by `kept`, 0 without noise."""
        own = jnp.arange(values) == place
        line = own[:, None] | own[None]
        return jnp.where(line[..., None], kept[None, None] * covariance, covariance - step[:, None] * step[None])

    def measure(j: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        # The covariances are updated for the entry before this one: computed from what the loop carries, and not from
        # what this round has computed, the update is one quick pass.
        covariance, step, kept, shift, log_scale, square = carry
        place = values - columns + j
        covariance = told(covariance, place - 1, step, kept)
        seen, deviation, own_noise, at = _at(observed, j), _at(deviations, j), _at(noise, j), _at(covariance, place)
        spread = jnp.where(seen, _at(at, place) + own_noise, 1)
        innovation = jnp.where(seen, deviation - _at(shift, place), 0)
        root = jnp.where(seen, jax.lax.rsqrt(spread), 0)
        step, kept = root[None] * at, jnp.where(seen, own_noise / spread, 1)
        own = (jnp.arange(values) == place)[:, None] & seen[None]
        shift = jnp.where(own, (deviation - kept * innovation)[None], shift + step * (root * innovation)[None])
        log_scale = log_scale + jnp.where(seen, jnp.log(spread) + math.log(2 * math.pi), 0)
        return covariance, step, kept, shift, log_scale, square + jnp.square(root * innovation)

    still, nothing = jnp.zeros_like(covariance[0]), jnp.zeros_like(covariance[0, 0])
    start = tree.varying((covariance, still, nothing + 1, still, nothing, nothing), covariance, deviations, observed)
    covariance, step, kept, shift, log_scale, square = jax.lax.fori_loop(0, columns, measure, start)
    covariance = told(covariance, values - 1, step, kept)
    return Conditional(shift=shift, covariance=covariance, log_density=-0.5 * (log_scale + square))


def _at(array: jax.Array, index: Any) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(array, index, axis=0, keepdims=False)


def _sums(rows: Measured, mean: jax.Array, covariance: jax.Array, r: jax.Array) -> Sums:
    """`Sums` of one component, with r (B,)."""
    found = conditional(mean, covariance, rows)
    weighted = r[None] * found.shift
    spread = numerics.product(found.covariance, r, "ijb,b->ij")
    return Sums(
        count=jnp.sum(r),
        first=jnp.sum(weighted, axis=1),
        second=numerics.product(weighted, found.shift, "ib,jb->ij") + spread,
        loglik=jnp.sum(r * found.log_density),
    )


def _each(function: Callable, mean: jax.Array, covariance: jax.Array, *rest: jax.Array) -> Any:
    """`function(mean, covariance, ...)` of every component; what depends on a common covariance alone is done once."""
    if covariance.shape[0] == 1:
        return jax.vmap(function, (0, None, *[0] * len(rest)))(mean, covariance[0], *rest)
    return jax.lax.map(lambda each: function(*each), (mean, covariance, *rest))


def _lanes(mean: jax.Array, rows: Measured) -> int:
    """The number of rows in a block: a power of two."""
    values = mean.shape[1] * (2 if rows.noise is not None and rows.noise.ndim == 3 else 1)
    fits = tuning.CONDITIONAL_NUMBERS // values**2
    return max(tuning.FEWEST_CONDITIONAL_LANES, 1 << max(0, fits.bit_length() - 1))
