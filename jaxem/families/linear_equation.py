"""A linear equation with Gaussian noise, fitted to expected responses and features: a part of linear-Gaussian models.

A linear dynamical system is three of these. Letters: O responses; F features, in groups of F_g; T steps of B sequences,
the lanes. Arrays may have more axes in front, such as one of components.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from .. import numerics
from ..numerics import tuning
from ..record import record, static
from . import columns, design
from .covariance import Diagonal, Full, Spherical

# Coefficients (O, F_g) of each group of features; None where a group is not there, or not held.
Groups = Sequence[jax.Array | None]


@record
class EquationParams:
    """response = sum over groups of coefficients · features + noise.

    coefficients   (O, F_g) of each group of features, None for a group that is not there
    covariance     (O, O) of the noise, (O,) where it is diagonal, or () where it is spherical
    """

    coefficients: tuple[jax.Array | None, ...]
    covariance: jax.Array

    @property
    def line(self) -> jax.Array:
        """The coefficients of all features, side by side: (O, F)."""
        return jnp.concatenate([part for part in self.coefficients if part is not None], axis=-1)


@record
class EquationStats:
    """Expected normal equations about the current line; e = response - current line · features. Additive.

    count       ()
    reference   count · line   (O, F)
    gram        sum E ffᵀ      (F, F)
    cross       sum E f eᵀ     (F, O)
    square      sum E eeᵀ      (O, O), (O,) where noise is diagonal, or its trace () where noise is spherical
    energy      sum of squared responses (O,); None where it is to be computed from the other fields
    """

    count: jax.Array
    reference: jax.Array
    gram: jax.Array
    cross: jax.Array
    square: jax.Array
    energy: jax.Array | None = None

    @property
    def line(self) -> jax.Array:
        """The line (O, F) that the statistics are about."""
        return self.reference / self.count[..., None, None]


class ExpectedNoise(Protocol):
    """The noise of an equation under a posterior, as `latents.linear_gaussian.noise.Noise` explains it."""

    @property
    def means(self) -> jax.Array: ...
    @property
    def root(self) -> jax.Array | None: ...
    @property
    def counted(self) -> jax.Array | None: ...
    @property
    def covariance(self) -> jax.Array: ...
    @property
    def state_covariance(self) -> jax.Array | None: ...
    @property
    def cross_covariance(self) -> jax.Array | None: ...


@record
class LinearEquation:
    """response = line · features + noise.

    noise: the shape of the noise's covariance.
    widths: the number of features in each group; None for the group that has all the rest.
    prior: pseudo-statistics, as `pseudo_stats` makes them.
    """

    noise: Full | Diagonal | Spherical = static()
    widths: tuple[int | None, ...] = static()
    prior: EquationStats | None = None

    def m_step(self, stats: EquationStats, held: Groups | None = None) -> EquationParams:
        """Least squares, and the mean outer product of the residuals; held: coefficients that stay at these values."""
        return self._estimate(stats, held)[0]

    def degenerate(self, stats: EquationStats, held: Groups | None = None) -> jax.Array:
        """Whether the noise collapsed: some combination of responses is predicted without error."""
        return self._estimate(stats, held)[1]

    def q_function(self, params: EquationParams, stats: EquationStats) -> jax.Array:
        """Expected log-density of the responses."""
        rows = params.line.shape[-2]
        whitener, half_logdet = self.noise.whitener(params.covariance, rows)
        normaliser = rows * math.log(2 * math.pi) + 2 * half_logdet
        square = self.noise.trace(self.noise.precision(whitener), _about(stats, params.line).square)
        return -0.5 * jnp.sum(stats.count * normaliser + square)

    def log_prior(self, params: EquationParams) -> jax.Array:
        """Q of the pseudo-statistics, up to a constant; 0 without any."""
        return jnp.zeros((), params.covariance.dtype) if self.prior is None else self.q_function(params, self.prior)

    def rebase(self, stats: EquationStats, params: EquationParams) -> EquationStats:
        """The same statistics about the line of `params`, exactly."""
        return _about(stats, params.line)

    def unconstrain(self, params: EquationParams) -> EquationParams:
        """The covariance in coordinates that may be any numbers."""
        return dataclasses.replace(params, covariance=self.noise.unconstrain(params.covariance))

    def constrain(self, theta: EquationParams) -> EquationParams:
        """Inverse of `unconstrain`."""
        return dataclasses.replace(theta, covariance=self.noise.constrain(theta.covariance, theta.line.shape[-2]))

    def pseudo_stats(self, params: EquationParams, gram: jax.Array, count: jax.Array) -> EquationStats:
        """Pseudo-statistics with the maximum at `params`, and features whose mean square is `gram` (F, F)."""
        line = params.line
        return EquationStats(
            count=count,
            reference=count * line,
            gram=count * gram,
            cross=jnp.zeros_like(line.T),
            square=count * params.covariance,
        )

    @staticmethod
    def combined(stats: EquationStats, prior: EquationStats) -> EquationStats:
        """Statistics and pseudo-statistics together, about the line that is likeliest given both."""
        both = jax.tree.map(jnp.add, stats, _about(prior, stats.line))
        line = both.line + _correction(both, np.arange(both.gram.shape[-1]))
        return _about(both, line)

    def features(self, groups: Groups) -> jax.Array:
        """Groups of features (T, F_g, B) side by side, those that the equation has."""
        parts = zip(groups, self.widths, strict=True)
        return jnp.concatenate([group for group, width in parts if group is not None and width != 0], axis=1)

    def stats(
        self,
        params: EquationParams,
        features: jax.Array,
        noise: ExpectedNoise,
        weights: jax.Array | None,
    ) -> tuple[EquationStats, jax.Array]:
        """Statistics about `params`, and the weighted sum of squares of `noise.means`.

        features: (T, F, B), expected features, states first.
        weights: (B,), of the sequences.

        A vanishing pseudo-step keeps the parameters of an equation without data.
        """
        count, moments = _moments(jnp.concatenate([features, noise.means], axis=1), noise.counted, weights)
        size, lanes = features.shape[1:]
        gram, cross, square = moments[:size, :size], moments[:size, size:], moments[size:, size:]
        squares = jnp.trace(square)
        if noise.root is not None:
            cross = numerics.product(cross, noise.root, "fk,ko->fo")
            square = numerics.product(numerics.product(square, noise.root, "kl,lo->ko"), noise.root, "ko,kp->po")
        if noise.state_covariance is not None and noise.cross_covariance is not None:
            states = len(noise.state_covariance)
            gram = gram.at[:states, :states].add(over_lanes(noise.state_covariance, weights, lanes))
            cross = cross.at[:states].add(over_lanes(noise.cross_covariance, weights, lanes))
        covariance = over_lanes(noise.covariance, weights, lanes)
        count = count + columns.PSEUDO_COUNT
        return EquationStats(
            count=count,
            reference=count * params.line,
            gram=gram + columns.PSEUDO_COUNT * jnp.eye(size, dtype=gram.dtype),
            cross=cross,
            square=self.noise.from_matrix(square) + covariance + columns.PSEUDO_COUNT * params.covariance,
        ), squares

    def _sizes(self, features: int) -> list[int]:
        """How many features each group has, of so many in all."""
        rest = features - sum(width for width in self.widths if width is not None)
        return [rest if width is None else width for width in self.widths]

    def coefficients(self, line: jax.Array) -> tuple[jax.Array | None, ...]:
        """A line (O, F) as the coefficients of each group."""
        sizes = self._sizes(line.shape[-1])
        ends = np.cumsum(sizes)
        return tuple(
            line[..., end - size : end] if size else None for size, end in zip(sizes, ends.tolist(), strict=True)
        )

    def _estimate(self, stats: EquationStats, held: Groups | None) -> tuple[EquationParams, jax.Array]:
        """The M-step, and whether the covariance needed its floor."""
        line = stats.line
        if self.prior is not None:
            stats = jax.tree.map(jnp.add, stats, _about(self.prior, line))
        held = [None] * len(self.widths) if held is None else held
        current = self.coefficients(line)
        free = np.concatenate(
            [np.full(size, value is None) for size, value in zip(self._sizes(line.shape[-1]), held, strict=True)]
        )
        if not np.all(free):
            pieces = [
                part if value is None else jnp.broadcast_to(jnp.asarray(value, part.dtype), part.shape)
                for part, value in zip(current, held, strict=True)
                if part is not None
            ]
            line = jnp.concatenate(pieces, axis=-1)
            stats = _about(stats, line)
        square = stats.square
        if np.any(free):
            delta = _correction(stats, np.flatnonzero(free))
            line, square = line + delta, _moved(stats, delta)[1]
        rows = line.shape[-2]
        count = stats.count[..., None]
        covariance = square / (
            self.noise.repeats(rows) * jnp.expand_dims(stats.count, tuple(range(-self.noise.trailing, 0)))
        )
        eps = jnp.finfo(covariance.dtype).eps
        deep = self.noise.columns_of(stats.square, rows) / count
        if stats.energy is None:
            energy = deep + jnp.sum(line * numerics.product(line, stats.gram, "...if,...fg->...ig"), axis=-1) / count
        else:
            energy = jnp.sum(stats.energy) / jnp.sum(stats.count)
        # Variances below which rounding dominates, of the responses and of the residuals behind the estimate.
        lowest = jnp.maximum(jnp.where(energy > 0, eps**2 * energy, eps**2), 64 * line.shape[-1] * eps * deep)
        covariance, lifted = self.noise.floor(covariance, lowest)
        return EquationParams(coefficients=self.coefficients(line), covariance=covariance), lifted


def _correction(stats: EquationStats, free: np.ndarray) -> jax.Array:
    """What least squares adds to the line (O, F), in its free columns."""
    every = len(free) == stats.reference.shape[-1]
    gram, cross = stats.gram, jnp.swapaxes(stats.cross, -1, -2)
    if not every:
        gram, cross = gram[..., free, :][..., free], cross[..., free]
    if cross.shape[-2] == 1:  # fused with what follows
        delta = numerics.least_squares(gram, cross[..., 0, :])[..., None, :]
    else:
        delta = numerics.least_squares_together(gram, cross)
    return delta if every else jnp.zeros_like(stats.reference).at[..., free].set(delta)


def _about(stats: EquationStats, line: jax.Array) -> EquationStats:
    """The same statistics about another line, exactly."""
    cross, square = _moved(stats, line - stats.line)
    return dataclasses.replace(stats, reference=stats.count[..., None, None] * line, cross=cross, square=square)


def _moved(stats: EquationStats, delta: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`cross` and `square` about the line of the statistics + delta (O, F)."""
    if delta.shape[-2] == 1:  # fused with what follows
        moved = design.times(stats.gram, delta[..., 0, :])[..., None]
    else:
        moved = numerics.product(stats.gram, delta, "...fg,...ig->...fi")
    twice = stats.cross - 0.5 * moved
    if stats.square.ndim == stats.gram.ndim:
        half = numerics.product(delta, twice, "...if,...fj->...ij")
        change = half + jnp.swapaxes(half, -1, -2)
    else:
        change = 2 * jnp.sum(jnp.swapaxes(delta, -1, -2) * twice, axis=-2)
        change = change if stats.square.ndim > stats.count.ndim else jnp.sum(change, axis=-1)
    return stats.cross - moved, stats.square - change


def _moments(values: jax.Array, counted: jax.Array | None, weights: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The weight of all steps that count, and the weighted sum over these of v vᵀ (I, I); values (T, I, B)."""
    steps, _, lanes = values.shape
    each = None if weights is None else jnp.broadcast_to(weights, (steps, lanes))
    if counted is not None:
        values = jnp.where(counted[:, None], values, 0)
        each = counted.astype(values.dtype) if each is None else jnp.where(counted, each, 0)
    count = jnp.asarray(steps * lanes, values.dtype) if each is None else jnp.sum(each)
    weighted = values if weights is None else numerics.to_rank(weights, values.ndim) * values
    # Partial sums first, one a sequence or one a step: quicker, and with less rounding.
    parts = "tib,tjb->bij" if lanes < tuning.MANY_SEQUENCES else "tib,tjb->tij"
    return count, jnp.sum(numerics.product(weighted, values, parts), axis=0)


def over_lanes(sums: jax.Array, weights: jax.Array | None, lanes: int) -> jax.Array:
    """The weighted sum over lanes of what each has, (..., B), or of what all have, (..., 1)."""
    if sums.shape[-1] == 1:
        total = jnp.asarray(lanes, sums.dtype) if weights is None else jnp.sum(weights)
        return total * sums[..., 0]
    return numerics.weighted_sum(sums, weights)
