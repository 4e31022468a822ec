"""One linear equation with Gaussian noise, its responses and features expected: statistics, score and estimate.

A linear dynamical system is three of these. `shape`: of the noise covariance, as in `covariance.py`.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import numerics
from ..numerics import tuning
from ..record import record
from . import columns, design


@record
class EquationStats:
    """Expected normal equations of one linear equation, response = line features + noise, about the current line.

    O responses, F features, e = response - current line features: count (); reference (O, F) = count · line;
    gram (F, F) = sum E ffᵀ; cross (F, O) = sum E f eᵀ; square (O, O), or (O,) of a diagonal noise, = sum E eeᵀ.
    """

    count: jax.Array
    reference: jax.Array
    gram: jax.Array
    cross: jax.Array
    square: jax.Array


def collect(
    shape: Any,
    count: jax.Array,
    line: jax.Array,
    noise: jax.Array,
    moments: jax.Array,
    root: jax.Array | None,
    spread: jax.Array,
    before: jax.Array | None,
    across: jax.Array | None,
) -> EquationStats:
    """Statistics from moments (F + O, F + O) of features and noise at the means, the noise in the coordinates of its
    root where there is one, and the covariances' sums. An equation that nothing is seen of keeps what it had."""
    size = line.shape[1]
    gram, cross, square = moments[:size, :size], moments[:size, size:], moments[size:, size:]
    if root is not None:
        cross = numerics.product(cross, root, "fk,ko->fo")
        square = numerics.product(numerics.product(square, root, "kl,lo->ko"), root, "ko,kp->po")
    if before is not None and across is not None:
        states = before.shape[0]
        gram = gram.at[:states, :states].add(before)
        cross = cross.at[:states].add(across)
    count = count + columns.PSEUDO_COUNT
    return EquationStats(
        count=count,
        reference=count * line,
        gram=gram + columns.PSEUDO_COUNT * jnp.eye(size, dtype=gram.dtype),
        cross=cross,
        square=shape.from_matrix(square) + spread + columns.PSEUDO_COUNT * noise,
    )


def moments(a: jax.Array, b: jax.Array) -> jax.Array:
    """sum a bᵀ: (T, I, B), (T, J, B) -> (I, J); in parts first, which is quicker, and rounds less."""
    parts = "tib,tjb->bij" if a.shape[2] < tuning.MANY_SEQUENCES else "tib,tjb->tij"
    return jnp.sum(numerics.product(a, b, parts), axis=0)


def about(stats: EquationStats, line: jax.Array) -> EquationStats:
    """The same statistics about another line, exactly."""
    delta = line - stats.reference / stats.count
    moved = numerics.product(stats.gram, delta, "fg,ig->fi")
    twice = stats.cross - 0.5 * moved
    if stats.square.ndim == 2:
        half = numerics.product(delta, twice, "if,fj->ij")
        change = half + half.T
    else:
        change = 2 * jnp.sum(delta.T * twice, axis=0)
    return dataclasses.replace(
        stats, reference=stats.count * line, cross=stats.cross - moved, square=stats.square - change
    )


def score(shape: Any, line: jax.Array, noise: jax.Array, stats: EquationStats) -> jax.Array:
    """Expected log-density of the responses of one equation."""
    rows = line.shape[0]
    whitener, half_logdet = shape.whitener(noise, rows)
    square = about(stats, line).square
    normaliser = rows * math.log(2 * math.pi) + 2 * half_logdet
    return -0.5 * (stats.count * normaliser + shape.trace(shape.precision(whitener), square))


def estimate(
    shape: Any, stats: EquationStats, groups: list[tuple[int, jax.Array | None]], prior: EquationStats | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The line (O, F) and the covariance of the noise, by least squares, and whether that needed its floor; prior:
    pseudo-statistics.

    groups: of features, how many, and their line (O, ·) where it is held.
    """
    line = stats.reference / stats.count
    if prior is not None:
        stats = jax.tree.map(jnp.add, stats, about(prior, line))
    free = np.concatenate([np.full(width, value is None) for width, value in groups])
    if not np.all(free):
        start, pieces = 0, []
        for width, value in groups:
            pieces.append(line[:, start : start + width] if value is None else value)
            start += width
        stats = about(stats, line := jnp.concatenate(pieces, axis=1))
    index = np.flatnonzero(free)
    rows = line.shape[0]
    if len(index):
        gram = jnp.broadcast_to(stats.gram[index][:, index], (rows, len(index), len(index)))
        delta = jnp.zeros_like(line).at[:, index].set(design.solve(gram, stats.cross[index].T))
        line = line + delta
        best = about(stats, line)
    else:
        best = stats
    noise = best.square / stats.count
    eps = jnp.finfo(noise.dtype).eps
    deep = shape.columns_of(stats.square, rows) / stats.count
    energy = deep + jnp.sum(line * numerics.product(line, best.gram, "if,fg->ig"), axis=1) / stats.count
    # What rounding hides: of the responses, and of the residuals that the estimate is taken from.
    lowest = jnp.maximum(jnp.where(energy > 0, eps**2 * energy, eps**2), 64 * line.shape[1] * eps * deep)
    return line, *shape.floor(noise, lowest)
