"""The conjugate prior of normal components, as pseudo-statistics.

Fraley & Raftery (2007), Bayesian regularization for normal mixture estimation and model-based
clustering, Journal of Classification 24, table 1: the modes for every covariance shape.
"""

import math

import jax
import jax.numpy as jnp

from .. import checks, numerics
from ..record import record
from . import covariance as shapes
from .columns import available_moments


@record
class NormalInverseWishart:
    """mean | covariance ~ N(mean, covariance / shrinkage), covariance ~ inverse-Wishart(degrees_of_freedom, scale).

    mean: (D,).
    shrinkage: kappa, the number of pseudo-rows that the mean is worth.
    degrees_of_freedom: nu.
    scale: (D, D) for full and tied covariances. For diagonal ones it is (D,), every variance inverse-gamma(nu / 2,
        scale_j / 2); for spherical ones a number, the variance inverse-gamma(nu / 2, scale / 2).

    Every field can be traced and vmapped.
    """

    mean: jax.Array
    shrinkage: jax.Array | float
    degrees_of_freedom: jax.Array | float
    scale: jax.Array

    def log_prob(self, shape: shapes.Shape, mean: jax.Array, covariance: jax.Array, tied: bool) -> jax.Array:
        """Log-density, summed over K components: mean (K, D), covariance in the shape's storage."""
        columns = mean.shape[-1]
        whitener, half_logdet = shape.whitener(covariance, columns)
        deviation = mean - numerics.to_rank(self.mean, mean.ndim)
        square = shape.trace(shape.precision(whitener), shape.cross(deviation, deviation))
        kappa = jnp.asarray(self.shrinkage, mean.dtype)
        # A shrinkage of 0 is the flat prior on the means: improper, so it has no normaliser.
        log_kappa = jnp.where(kappa > 0, jnp.log(jnp.where(kappa > 0, kappa, 1)), 0)
        normaliser = 0.5 * columns * (log_kappa - math.log(2 * math.pi))
        means = jnp.sum(normaliser - half_logdet - 0.5 * kappa * square)
        degrees = jnp.asarray(self.degrees_of_freedom, mean.dtype)
        covariances = shape.log_prior(covariance, degrees, jnp.asarray(self.scale, mean.dtype))
        return means + (covariances[0] if tied else jnp.sum(covariances))


def default_prior(x: jax.Array, num_components: int, covariance: str = "full") -> NormalInverseWishart:
    """A weakly informative prior scaled to the data (Fraley & Raftery 2007, section 3.3).

    x: (N, D) or (N,), NaN where an entry is missing.
    The prior's mean is that of the data, its shrinkage 0.01, its degrees of freedom D + 2, its scale cov(x) / K^(2/D),
    of which diagonal covariances keep the diagonal, and spherical ones the mean of that.
    Raises ValueError for an unknown covariance or bad data.
    """
    covariance = shapes.canonical(covariance)
    checks.positive_integer("num_components", num_components)
    checks.finite_matrix("x", x, missing=True)
    rows = checks.matrix("x", x)
    count, columns = rows.shape
    if checks.is_concrete(rows) and checks.has_nan(rows):
        mean, total = available_moments(rows, jnp.ones(count, rows.dtype))
        total = total * count / (count - 1)
    else:
        mean = jnp.mean(rows, axis=0)
        deviations = rows - mean[None]
        total = numerics.product(deviations, deviations, "ni,nj->ij") / (count - 1)
    scale = total / num_components ** (2 / columns)
    if covariance.endswith("diag"):
        scale = jnp.diagonal(scale)
    elif covariance.endswith("spherical"):
        scale = jnp.mean(jnp.diagonal(scale))
    return NormalInverseWishart(mean=mean, shrinkage=0.01, degrees_of_freedom=columns + 2.0, scale=scale)
