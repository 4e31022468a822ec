"""Shapes of a covariance matrix, and the bilinear algebra that is all a normal family needs of them.

A shape says how a D x D covariance is stored: `Full` (..., D, D), `Diagonal` (..., D), `Spherical`
(...). Second moments sum r x xᵀ are stored the same way: the matrix, its diagonal, or its trace.
Letters: K components, D columns, N rows; P is the inverse covariance, W with P = WᵀW the whitener.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from .. import checks, numerics, parameters
from ..numerics import tuning
from ..record import record


@record
class Full:
    """Any positive definite matrix: (..., D, D)."""

    trailing = 2
    name = "full"
    support = staticmethod(parameters.covariances)

    def degrees(self, columns: int) -> int:
        """Free numbers in one covariance."""
        return columns * (columns + 1) // 2

    def repeats(self, columns: int) -> int:
        """Squared deviations that one row adds to one stored number."""
        return 1

    def prior_exponent(self, degrees_of_freedom: jax.Array | float, columns: int) -> jax.Array | float:
        """Power of det(covariance)^(-1/2) in the prior's density."""
        return degrees_of_freedom + columns + 1

    def from_matrix(self, matrix: jax.Array) -> jax.Array:
        """Store a (..., D, D) matrix of second moments in this shape."""
        return matrix

    def cross(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """(abᵀ + baᵀ) / 2 of vectors (..., D), in this shape."""
        outer = a[..., :, None] * b[..., None, :]
        return 0.5 * (outer + jnp.swapaxes(outer, -1, -2))

    def moments(self, responsibilities: jax.Array, deviations: jax.Array) -> jax.Array:
        """sum_n r ddᵀ: (K, N), (K, D, N) -> (K, D, D)."""
        return numerics.product(responsibilities[:, None] * deviations, deviations, "kin,kjn->kij")

    def whitener(self, covariance: jax.Array, columns: int) -> tuple[jax.Array, jax.Array]:
        """W (..., D, D) and log det(covariance) / 2 (...)."""
        covariance = _mean_of_triangles(covariance)
        factor = numerics.cholesky(covariance)
        logs = jnp.log(jnp.diagonal(factor, axis1=-2, axis2=-1))
        return numerics.inverse_lower(factor), jnp.sum(logs, axis=-1)

    def whiten(self, whitener: jax.Array, deviations: jax.Array) -> jax.Array:
        """W d: (K, D, D), (K, D, N) -> (K, D, N)."""
        return numerics.product(whitener, deviations, "kij,kjn->kin")

    def square(self, whitener: jax.Array, deviations: jax.Array) -> jax.Array:
        """dᵀ P d: (K, D, D), (K, D, N) -> (K, N)."""
        columns = deviations.shape[1]
        if columns > tuning.UNROLLED_SQUARES:
            return jnp.sum(jnp.square(self.whiten(whitener, deviations)), axis=1)
        total = jnp.zeros_like(deviations[:, 0])
        for i in range(columns):
            residual = whitener[:, i, 0, None] * deviations[:, 0]
            for j in range(1, i + 1):
                residual = residual + whitener[:, i, j, None] * deviations[:, j]
            total = total + residual * residual
        return total

    def features(self, centred: jax.Array) -> jax.Array:
        """Monomials y_i y_j, i >= j: (D, N) -> (D(D+1)/2, N)."""
        i, j = np.tril_indices(centred.shape[0])
        return centred[i] * centred[j]

    def from_features(self, sums: jax.Array, columns: int) -> jax.Array:
        """Sums of the features (K, F) as second moments (K, D, D)."""
        i, j = np.tril_indices(columns)
        where = np.zeros((columns, columns), int)
        where[i, j] = where[j, i] = np.arange(len(i))
        return sums[:, where]

    def to_features(self, precision: jax.Array) -> jax.Array:
        """Coefficients (K, F) of the features in -yᵀPy / 2."""
        i, j = np.tril_indices(precision.shape[-1])
        return jnp.asarray(np.where(i == j, -0.5, -1.0), precision.dtype)[None] * precision[:, i, j]

    def precision(self, whitener: jax.Array) -> jax.Array:
        """P = WᵀW."""
        if whitener.shape[-1] > tuning.UNROLLED_SQUARES:
            return numerics.product(whitener, whitener, "...ki,...kj->...ij")
        return jnp.sum(whitener[..., :, :, None] * whitener[..., :, None, :], axis=-3)

    def precision_times(self, precision: jax.Array, vectors: jax.Array) -> jax.Array:
        """P v: (K, D, D), (K, D) -> (K, D)."""
        return jnp.sum(precision * vectors[..., None, :], axis=-1)

    def trace(self, precision: jax.Array, moments: jax.Array) -> jax.Array:
        """tr(P S): (...)."""
        rank = max(precision.ndim, moments.ndim)
        return jnp.sum(numerics.to_rank(precision, rank) * numerics.to_rank(moments, rank), axis=(-1, -2))

    def columns_of(self, moments: jax.Array, columns: int) -> jax.Array:
        """Second moment of each column: (..., D)."""
        return jnp.diagonal(moments, axis1=-2, axis2=-1)

    def log_scales(self, covariance: jax.Array, columns: int) -> jax.Array:
        """Each column's part of log det(covariance) / 2, equal parts where columns are correlated: (..., D)."""
        half_logdet = self.whitener(covariance, columns)[1]
        return jnp.broadcast_to(half_logdet[..., None] / columns, (*half_logdet.shape, columns))

    def entries(self, rows: jax.Array) -> jax.Array:
        """Observed entries behind each stored number, from those of each column (..., D), or of all alike (..., 1)."""
        return rows[..., None]

    def floor(self, covariance: jax.Array, lowest: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Lift a covariance whose conditional variances fall below `lowest` (..., D).

        Returns the covariance, made symmetric and otherwise unchanged to the bit where nothing was lifted, and whether
        it was lifted (...).
        """
        covariance = _mean_of_triangles(covariance)  # fused multiply-adds round its triangles apart
        # The lift needs no derivatives: it is 0 in a sound fit, and one that rests on its floor, DEGENERATE, has none.
        _, lift = numerics.floored_cholesky(*jax.lax.stop_gradient((covariance, lowest)))
        eye = jnp.eye(covariance.shape[-1], dtype=covariance.dtype)
        return covariance + lift[..., :, None] * numerics.to_rank(eye, covariance.ndim), jnp.any(lift > 0, axis=-1)

    def log_prior(self, covariance: jax.Array, degrees_of_freedom: jax.Array, scale: jax.Array) -> jax.Array:
        """Inverse-Wishart log-density, normalised (Gelman et al., Bayesian Data Analysis, appendix A)."""
        columns = covariance.shape[-1]
        scale = _mean_of_triangles(scale)
        whitener, half_logdet = self.whitener(covariance, columns)
        half_logdet_scale = jnp.sum(jnp.log(jnp.diagonal(numerics.cholesky(scale), axis1=-2, axis2=-1)))
        normaliser = (
            degrees_of_freedom * half_logdet_scale
            - degrees_of_freedom * columns / 2 * math.log(2)
            - jax.scipy.special.multigammaln(degrees_of_freedom / 2, columns)
        )
        power = self.prior_exponent(degrees_of_freedom, columns)
        return normaliser - power * half_logdet - 0.5 * self.trace(self.precision(whitener), scale)

    def unconstrain(self, covariance: jax.Array) -> jax.Array:
        return numerics.covariance_to_real(_mean_of_triangles(covariance))

    def constrain(self, theta: jax.Array, columns: int) -> jax.Array:
        return numerics.real_to_covariance(theta, columns)

    def colour(self, covariance: jax.Array, noise: jax.Array) -> jax.Array:
        """White noise (N, D) with these covariances (N, D, D) given to its rows."""
        return numerics.product(numerics.cholesky(covariance), noise, "nij,nj->ni")

    def matrix(self, covariance: jax.Array, columns: int) -> jax.Array:
        """The covariance as (..., D, D)."""
        return covariance


def _mean_of_triangles(matrix: jax.Array) -> jax.Array:
    """(A + Aᵀ) / 2: A to the bit where A is symmetric.

    A factorisation reads one triangle only: derivatives would be 0 in the other, and twice too large in this one.
    """
    return 0.5 * (matrix + jnp.swapaxes(matrix, -1, -2))


def _log_inverse_gamma(variance: jax.Array, degrees_of_freedom: jax.Array, scale: jax.Array) -> jax.Array:
    """Inverse-gamma(nu/2, scale/2) log-density of a variance, normalised, elementwise."""
    shape = degrees_of_freedom / 2
    normaliser = shape * jnp.log(scale / 2) - jax.lax.lgamma(jnp.asarray(shape, variance.dtype))
    normaliser, scale = (numerics.to_rank(part, variance.ndim) for part in (normaliser, scale))
    return normaliser - (shape + 1) * jnp.log(variance) - scale / (2 * variance)


@record
class Diagonal:
    """Independent columns: variances (..., D)."""

    trailing = 1
    name = "diag"
    support = staticmethod(parameters.at_least_zero)

    def degrees(self, columns: int) -> int:
        return columns

    def repeats(self, columns: int) -> int:
        return 1

    def prior_exponent(self, degrees_of_freedom: jax.Array | float, columns: int) -> jax.Array | float:
        return degrees_of_freedom + 2

    def from_matrix(self, matrix: jax.Array) -> jax.Array:
        return jnp.diagonal(matrix, axis1=-2, axis2=-1)

    def cross(self, a: jax.Array, b: jax.Array) -> jax.Array:
        return a * b

    def moments(self, responsibilities: jax.Array, deviations: jax.Array) -> jax.Array:
        return jnp.sum(responsibilities[:, None] * jnp.square(deviations), axis=-1)

    def whitener(self, covariance: jax.Array, columns: int) -> tuple[jax.Array, jax.Array]:
        return 1 / jnp.sqrt(covariance), 0.5 * jnp.sum(jnp.log(covariance), axis=-1)

    def whiten(self, whitener: jax.Array, deviations: jax.Array) -> jax.Array:
        return whitener[..., None] * deviations

    def square(self, whitener: jax.Array, deviations: jax.Array) -> jax.Array:
        columns = deviations.shape[1]
        if columns > tuning.UNROLLED_SQUARES:
            return jnp.sum(jnp.square(self.whiten(whitener, deviations)), axis=1)
        # Column by column the sum fuses with what comes before; as a reduction it runs many times slower.
        squares = [jnp.square(whitener[:, d, None] * deviations[:, d]) for d in range(columns)]
        return functools.reduce(jnp.add, squares)

    def features(self, centred: jax.Array) -> jax.Array:
        return jnp.square(centred)

    def from_features(self, sums: jax.Array, columns: int) -> jax.Array:
        return sums

    def to_features(self, precision: jax.Array) -> jax.Array:
        return -0.5 * precision

    def precision(self, whitener: jax.Array) -> jax.Array:
        return jnp.square(whitener)

    def precision_times(self, precision: jax.Array, vectors: jax.Array) -> jax.Array:
        return precision * vectors

    def trace(self, precision: jax.Array, moments: jax.Array) -> jax.Array:
        return jnp.sum(precision * moments, axis=-1)

    def columns_of(self, moments: jax.Array, columns: int) -> jax.Array:
        return moments

    def floor(self, covariance: jax.Array, lowest: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.maximum(covariance, lowest), jnp.any(covariance < lowest, axis=-1)

    def log_prior(self, covariance: jax.Array, degrees_of_freedom: jax.Array, scale: jax.Array) -> jax.Array:
        return jnp.sum(_log_inverse_gamma(covariance, degrees_of_freedom, scale), axis=-1)

    def unconstrain(self, covariance: jax.Array) -> jax.Array:
        return jnp.log(covariance)

    def constrain(self, theta: jax.Array, columns: int) -> jax.Array:
        return jnp.exp(theta)

    def colour(self, covariance: jax.Array, noise: jax.Array) -> jax.Array:
        return jnp.sqrt(covariance) * noise

    def matrix(self, covariance: jax.Array, columns: int) -> jax.Array:
        eye = jnp.eye(columns, dtype=covariance.dtype)
        return covariance[..., None] * numerics.to_rank(eye, covariance.ndim + 1)

    def log_scales(self, covariance: jax.Array, columns: int) -> jax.Array:
        return 0.5 * jnp.log(covariance)

    def entries(self, rows: jax.Array) -> jax.Array:
        return rows


@record
class Spherical:
    """One variance for all columns: (...)."""

    trailing = 0
    name = "spherical"
    support = staticmethod(parameters.at_least_zero)

    def degrees(self, columns: int) -> int:
        return 1

    def repeats(self, columns: int) -> int:
        return columns

    def prior_exponent(self, degrees_of_freedom: jax.Array | float, columns: int) -> jax.Array | float:
        return degrees_of_freedom + 2

    def from_matrix(self, matrix: jax.Array) -> jax.Array:
        return jnp.trace(matrix, axis1=-2, axis2=-1)

    def cross(self, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.sum(a * b, axis=-1)

    def moments(self, responsibilities: jax.Array, deviations: jax.Array) -> jax.Array:
        return jnp.sum(responsibilities * jnp.sum(jnp.square(deviations), axis=1), axis=-1)

    def whitener(self, covariance: jax.Array, columns: int) -> tuple[jax.Array, jax.Array]:
        return 1 / jnp.sqrt(covariance), 0.5 * columns * jnp.log(covariance)

    def whiten(self, whitener: jax.Array, deviations: jax.Array) -> jax.Array:
        return whitener[..., None, None] * deviations

    def square(self, whitener: jax.Array, deviations: jax.Array) -> jax.Array:
        return jnp.square(whitener)[:, None] * jnp.sum(jnp.square(deviations), axis=1)

    def features(self, centred: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(centred), axis=0, keepdims=True)

    def from_features(self, sums: jax.Array, columns: int) -> jax.Array:
        return sums[:, 0]

    def to_features(self, precision: jax.Array) -> jax.Array:
        return -0.5 * precision[:, None]

    def precision(self, whitener: jax.Array) -> jax.Array:
        return jnp.square(whitener)

    def precision_times(self, precision: jax.Array, vectors: jax.Array) -> jax.Array:
        return precision[..., None] * vectors

    def trace(self, precision: jax.Array, moments: jax.Array) -> jax.Array:
        return precision * moments

    def columns_of(self, moments: jax.Array, columns: int) -> jax.Array:
        return jnp.repeat(moments[..., None] / columns, columns, axis=-1)

    def floor(self, covariance: jax.Array, lowest: jax.Array) -> tuple[jax.Array, jax.Array]:
        least = jnp.mean(lowest, axis=-1)
        return jnp.maximum(covariance, least), covariance < least

    def log_prior(self, covariance: jax.Array, degrees_of_freedom: jax.Array, scale: jax.Array) -> jax.Array:
        return _log_inverse_gamma(covariance, degrees_of_freedom, scale)

    def unconstrain(self, covariance: jax.Array) -> jax.Array:
        return jnp.log(covariance)

    def constrain(self, theta: jax.Array, columns: int) -> jax.Array:
        return jnp.exp(theta)

    def colour(self, covariance: jax.Array, noise: jax.Array) -> jax.Array:
        return jnp.sqrt(covariance)[..., None] * noise

    def matrix(self, covariance: jax.Array, columns: int) -> jax.Array:
        return covariance[..., None, None] * numerics.to_rank(
            jnp.eye(columns, dtype=covariance.dtype), covariance.ndim + 2
        )

    def log_scales(self, covariance: jax.Array, columns: int) -> jax.Array:
        return jnp.broadcast_to(0.5 * jnp.log(covariance)[..., None], (*covariance.shape, columns))

    def entries(self, rows: jax.Array) -> jax.Array:
        return jnp.sum(rows, axis=-1)


Shape = Full | Diagonal | Spherical

# name -> (shape, one covariance for all components). mclust's other eight models, which share volume, shape or
# orientation but not all three, would be shapes of their own here.
NAMES: dict[str, tuple[Shape, bool]] = {
    "full": (Full(), False),
    "diag": (Diagonal(), False),
    "spherical": (Spherical(), False),
    "tied": (Full(), True),
    "tied_diag": (Diagonal(), True),
    "tied_spherical": (Spherical(), True),
}

# mclust's names of the same models (Scrucca et al. 2016, The R Journal 8(1), table 3).
MCLUST = {
    "VVV": "full",
    "VVI": "diag",
    "VII": "spherical",
    "EEE": "tied",
    "EEI": "tied_diag",
    "EII": "tied_spherical",
}


def canonical(name: str) -> str:
    """The name of a covariance, mclust's translated; ValueError for an unknown one."""
    checks.choice("covariance", name, (*NAMES, *MCLUST))
    return MCLUST.get(name, name)
