"""Directions: unit vectors around a mean direction, in any dimension. Angles are the case of two columns."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from .. import capabilities, checks, numerics, parameters, special
from ..record import record
from . import columns
from .bessel import bessel_odds, log_bessel

# A proposal is accepted with a probability of about 0.66 or more: that all of so many fail happens once in 10^15 rows.
_TRIES = 32


@record
class VonMisesFisherParams:
    """Parameters of K distributions of unit vectors.

    mean_direction: (K, D), m, of unit length.
    concentration: (K,), c, 0 for the uniform distribution.
    """

    mean_direction: jax.Array
    concentration: jax.Array


@record
class VonMisesFisherStats:
    """Sums over rows with responsibilities r.

    count: (K,), sum r.
    resultant: (K, D), sum r x.
    """

    count: jax.Array
    resultant: jax.Array


@capabilities.completed("part")
@record(kw_only=False)
class VonMisesFisher:
    """Unit vectors: log p(x|k) = c m'x + log(c^v / ((2 pi)^(D/2) I_v(c))), v = D/2 - 1, (m, c) those of k.

    prior: pseudo-statistics, a VonMisesFisherStats of count () or (K,), and of a resultant (D,) or (K, D) that is
        shorter than count. `log_prior` is then Q at these, the log-density of the conjugate prior up to a constant.

    Data are rows of unit length (N, D), D at least 2, which are scaled to it exactly; an angle t is the row
    (cos t, sin t). Missing entries are not taken. A concentration stays below D / (2 eps^(3/4)), and a component that
    gets there is degenerate. In float32, concentrations above 1e4 lose digits.
    Banerjee, Dhillon, Ghosh & Sra (2005), Clustering on the unit hypersphere using von Mises-Fisher
    distributions, JMLR 6; Mardia & Jupp, Directional Statistics, section 10.3.
    Raises ValueError for rows that are not within 1e-3 of unit length.
    """

    prior: VonMisesFisherStats | None = dataclasses.field(default=None, kw_only=True)

    separable = shareable = ("concentration",)
    supports: ClassVar[parameters.Supports] = {
        "mean_direction": parameters.unit_vectors,
        "concentration": parameters.at_least_zero,
    }

    def pooled(self, x: jax.Array, weights: jax.Array | None, num_components: int) -> VonMisesFisherParams:
        rows = _unit(x)
        north = jnp.zeros((1, rows.shape[1]), rows.dtype).at[0, 0].set(1)
        neutral = VonMisesFisherParams(mean_direction=north, concentration=jnp.zeros(1, rows.dtype))
        return columns.pooled(self, neutral, x, weights, num_components)

    def features(self, x: jax.Array) -> jax.Array:
        return _unit(x)

    def log_prob(self, params: VonMisesFisherParams, x: jax.Array) -> jax.Array:
        """Log-density of every row under every component, with respect to area on the sphere: (N, D) -> (K, N)."""
        direction, concentration = params.mean_direction, params.concentration
        cosines = numerics.product(direction, _unit(x).astype(direction.dtype), "kd,nd->kn")
        return concentration[:, None] * (cosines - 1) + _log_peak(params)[:, None]

    def stats(self, params: VonMisesFisherParams, x: jax.Array, responsibilities: jax.Array) -> VonMisesFisherStats:
        """Expected resultants: x (N, D), responsibilities (K, N)."""
        direction, concentration = params.mean_direction, params.concentration
        # A vanishing pseudo-observation, its mean that of the current parameters, keeps a component without rows.
        length = concentration / (concentration + bessel_odds(direction.shape[1] / 2 - 1, concentration))
        return VonMisesFisherStats(
            count=jnp.sum(responsibilities, axis=1) + columns.PSEUDO_COUNT,
            resultant=columns.sums(responsibilities, _unit(x).astype(direction.dtype).T)
            + columns.PSEUDO_COUNT * length[:, None] * direction,
        )

    def m_step(self, stats: VonMisesFisherStats) -> VonMisesFisherParams:
        """resultant / |resultant|, and the c with A(c) = |resultant| / count; with a prior, the posterior mode."""
        return self.m_step_given(stats)

    def m_step_given(
        self,
        stats: VonMisesFisherStats,
        *,
        mean_direction: jax.Array | None = None,
        concentration: jax.Array | None = None,
    ) -> VonMisesFisherParams:
        """The M-step of one parameter with the other held, at what broadcasts to its shape; of both if none is."""
        stats = columns.with_prior(self.prior, stats)
        if mean_direction is None:
            length = _norm(stats.resultant)
            # Where the resultant is 0, any direction will do.
            north = jnp.zeros_like(stats.resultant).at[:, 0].set(1)
            mean_direction = jnp.where(length > 0, numerics.safe_divide(stats.resultant, length), north)
        mean_direction = jnp.broadcast_to(mean_direction, stats.resultant.shape)
        if concentration is None:
            along = jnp.sum(mean_direction * stats.resultant, axis=1)
            concentration = _concentration(jnp.maximum(along / stats.count, 0), mean_direction.shape[1])
        return VonMisesFisherParams(
            mean_direction=mean_direction, concentration=jnp.broadcast_to(concentration, stats.count.shape)
        )

    def share(self, stats: VonMisesFisherStats, name: str, params: VonMisesFisherParams) -> jax.Array:
        """The concentration that all components share: A(c) = sum_k m_k'resultant_k / sum_k count_k."""
        length = jnp.sum(params.mean_direction * stats.resultant) / jnp.sum(stats.count)
        return _concentration(jnp.maximum(length, 0), stats.resultant.shape[1])

    def q_function(self, params: VonMisesFisherParams, stats: VonMisesFisherStats) -> jax.Array:
        """sum c m'resultant + count log C(c)."""
        along = jnp.sum(params.mean_direction * stats.resultant, axis=1)
        return jnp.sum(params.concentration * (along - stats.count) + stats.count * _log_peak(params))

    def log_prior(self, params: VonMisesFisherParams) -> jax.Array:
        return jnp.zeros((), params.concentration.dtype) if self.prior is None else self.q_function(params, self.prior)

    def degenerate(self, stats: VonMisesFisherStats, held: tuple[str, ...] = ()) -> jax.Array:
        """Components (K,) without rows, or whose rows all but coincide."""
        stats = columns.with_prior(self.prior, stats)
        empty = columns.empty(stats.count)
        if "concentration" in held:
            return empty
        spread = 1 - _norm(stats.resultant)[:, 0] / stats.count
        return empty | (spread <= _least_spread(stats.count.dtype))

    def sample(self, key: jax.Array, params: VonMisesFisherParams, labels: jax.Array) -> jax.Array:
        """Unit rows (N, D) from the component that each label (N,) names. Wood (1994), Comm. Statist. Simul. 23."""
        key_height, key_side = jax.random.split(key)
        direction, concentration = params.mean_direction[labels], params.concentration[labels]
        drop = _sample_drop(key_height, concentration, direction.shape[1])[:, None]
        side = jax.random.normal(key_side, direction.shape, direction.dtype)
        side = side - jnp.sum(side * direction, axis=1, keepdims=True) * direction
        side = numerics.safe_divide(side, _norm(side))
        return _unit((1 - drop) * direction + jnp.sqrt(drop * (2 - drop)) * side)

    def num_parameters(self, params: VonMisesFisherParams) -> int:
        return params.mean_direction.size

    def floats_per_row(self, params: VonMisesFisherParams) -> int:
        return params.mean_direction.shape[1]

    def unconstrain(self, params: VonMisesFisherParams) -> VonMisesFisherParams:
        """The direction's stereographic projection (K, D - 1), and the logarithm of the concentration."""
        turned = _reflect(params.mean_direction)
        plane = turned[:, 1:] / (1 - turned[:, :1])
        return VonMisesFisherParams(mean_direction=plane, concentration=jnp.log(params.concentration))

    def constrain(self, theta: VonMisesFisherParams) -> VonMisesFisherParams:
        """Inverse of `unconstrain`."""
        square = jnp.sum(theta.mean_direction**2, axis=1, keepdims=True)
        turned = jnp.concatenate([square - 1, 2 * theta.mean_direction], axis=1) / (square + 1)
        return VonMisesFisherParams(mean_direction=_reflect(turned), concentration=jnp.exp(theta.concentration))

    def check(self, x: jax.Array, name: str = "x") -> None:
        checks.finite_matrix(name, x)
        if checks.row_shape(name, x)[1] < 2:
            raise ValueError(
                f"{name} must have at least two columns, unit vectors; got shape {x.shape}. Give angles as "
                "jax.numpy.stack([jax.numpy.cos(angles), jax.numpy.sin(angles)], axis=1)"
            )
        if not checks.is_concrete(x):
            return
        lengths = np.linalg.norm(np.asarray(x, float), axis=1)
        if np.any(np.abs(lengths - 1) > 1e-3):
            row = np.argmax(np.abs(lengths - 1) > 1e-3)
            raise ValueError(
                f"{name} must have rows of unit length; row {row} has length {lengths[row]:.6g}. Divide every row by "
                "its length"
            )


def _norm(vectors: jax.Array) -> jax.Array:
    """Lengths (N, 1), with a zero (not NaN) gradient at 0."""
    square = jnp.sum(vectors**2, axis=1, keepdims=True)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def _unit(x: jax.Array) -> jax.Array:
    rows = checks.matrix("x", x)
    return numerics.safe_divide(rows, _norm(rows))


def _reflect(rows: jax.Array) -> jax.Array:
    """Rows (N, D) reflected so that the first axis and another direction, the pole, change places; its own inverse.

    A stereographic projection leaves out the pole, which is therefore chosen where a mean direction is unlikely to be,
    unlike an axis.
    """
    num_columns = rows.shape[1]
    pole = np.cos(1.0 + np.arange(num_columns))
    normal = pole / np.linalg.norm(pole) - np.eye(num_columns)[0]
    normal = jnp.asarray(normal / np.linalg.norm(normal), rows.dtype)
    return rows - 2 * numerics.product(rows, normal, "nd,d->n")[:, None] * normal[None]


def _log_peak(params: VonMisesFisherParams) -> jax.Array:
    """Log-density at the mean direction: (K,)."""
    num_columns = params.mean_direction.shape[1]
    return -0.5 * num_columns * math.log(2 * math.pi) - log_bessel(num_columns / 2 - 1, params.concentration)


def _least_spread(dtype: jnp.dtype) -> float:
    """Below this, 1 - |resultant| / count has few digits left above rounding."""
    return float(jnp.finfo(dtype).eps) ** 0.75


def _concentration(length: jax.Array, num_columns: int) -> jax.Array:
    """The c with A(c) = I_{D/2}(c) / I_{D/2-1}(c) = length. Start: Banerjee et al. (2005), eq. 4.4."""

    def odds(c: jax.Array) -> jax.Array:
        return c / bessel_odds(num_columns / 2 - 1, c)

    target = jnp.maximum(length / jnp.maximum(1 - length, _least_spread(length.dtype)), jnp.finfo(length.dtype).eps)
    start = target * (num_columns - length**2) / (1 + length)
    return jnp.where(length > 0, special.solve(odds, target, start), 0)


def _sample_drop(key: jax.Array, concentration: jax.Array, num_columns: int) -> jax.Array:
    """1 - m'x, by rejection from a transformed beta variable: (N,)."""
    d = num_columns - 1
    b = d / (2 * concentration + jnp.sqrt(4 * concentration**2 + d**2))
    top = 2 * b / (1 + b)  # 1 - x_0, where x_0 is Wood's

    def attempt(index: jax.Array | int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        drop, done = carry
        key_beta, key_accept = jax.random.split(jax.random.fold_in(key, index))
        z = jax.random.beta(key_beta, d / 2, d / 2, concentration.shape, concentration.dtype)
        proposal = 2 * b * z / (1 - (1 - b) * z)
        log_ratio = concentration * (top - proposal) + d * (jnp.log1p((1 - top) * proposal / top) - jnp.log(2 - top))
        accept = jnp.log(jax.random.uniform(key_accept, concentration.shape, concentration.dtype)) <= log_ratio
        return jnp.where(accept & ~done, proposal, drop), done | accept

    start = (jnp.zeros_like(concentration), jnp.zeros(concentration.shape, bool))
    return jax.lax.fori_loop(0, _TRIES, attempt, start)[0]
