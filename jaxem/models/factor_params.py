"""Parameters and statistics of factor models, their Heywood cases, and a test of fit."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .. import checks, numerics, parameters
from ..families.covariance import Diagonal, Spherical
from ..families.linear_equation import EquationStats
from ..protocols import Data
from ..record import record
from . import factor_data as data

# Only uniquenesses below this share of their column's variance are tested for going to 0.
_SMALL = 3e-2


@record
class FactorAnalysisParams:
    """x = mean + loadings z + noise.

    mean          (D,)
    loadings      (D, Q)
    uniquenesses  (D,), variances of the noise
    """

    mean: jax.Array
    loadings: jax.Array
    uniquenesses: jax.Array


@record
class PPCAParams:
    """x = mean + loadings z + noise.

    mean            (D,)
    loadings        (D, Q)
    noise_variance  (), of the noise in every column
    """

    mean: jax.Array
    loadings: jax.Array
    noise_variance: jax.Array


FactorParams = FactorAnalysisParams | PPCAParams


@record
class FactorStats:
    """Expected statistics of rows and factors, additive over rows.

    equation  normal equations of x on (z, 1), about the current mean and loadings
    noise     (D,), or (): count times the current noise
    loglik    (), at the parameters of the E-step
    """

    equation: EquationStats
    noise: jax.Array
    loglik: jax.Array


class FitTest(NamedTuple):
    """A likelihood ratio test.

    statistic: (), χ².
    degrees_of_freedom: of χ² under the model.
    p_value: (), the probability under the model of a statistic at least as large.
    """

    statistic: jax.Array
    degrees_of_freedom: int
    p_value: jax.Array


# The shape of the noise, the record of parameters, and its name there.
NOISE: dict[str, tuple[Diagonal | Spherical, Any, str]] = {
    "diag": (Diagonal(), FactorAnalysisParams, "uniquenesses"),
    "isotropic": (Spherical(), PPCAParams, "noise_variance"),
}


def hidden(noise: jax.Array, variances: jax.Array, columns: int) -> jax.Array:
    """Whether noise is within the rounding errors of a covariance of `columns` columns with these variances."""
    return noise <= 4 * columns * jnp.finfo(noise.dtype).eps * variances


def heywood(loadings: jax.Array, noise: jax.Array, mapped: jax.Array) -> jax.Array:
    """Columns (D,) whose uniqueness, now `noise`, the likelihood sends to 0; mapped: its M-step at these loadings.

    Along one uniqueness ψ, all else held, the likelihood is highest at ψ + (u - ψ) / r², with u its M-step and
    r = ψ [Σ⁻¹]_dd (Zhao, Yu & Jiang 2008, ML estimation for factor analysis: EM or non-EM?, Statistics and Computing
    18). Where loadings are maximised over too, as here, r = 1 - [W (WᵀW)⁻¹ Wᵀ]_dd, W = noise^(-1/2) loadings: r² is
    then the diagonal of the curvature that Lawley & Maxwell (1971, Factor Analysis as a Statistical Method) use for
    uniquenesses alone.
    A Heywood case has its maximum at 0 or below, and is below a few hundredths of its column's variance already.
    """
    whitened = loadings / jnp.sqrt(noise)[:, None]
    gram = numerics.product(whitened, whitened, "dq,dr->qr")
    ridge = jnp.finfo(gram.dtype).eps * jnp.maximum(jnp.trace(gram), 1)
    inverse = numerics.inverse_lower(numerics.cholesky(gram + ridge * jnp.eye(len(gram), dtype=gram.dtype)))
    outside = 1 - jnp.sum(jnp.square(numerics.product(whitened, inverse, "dq,rq->dr")), axis=1)
    small = noise < _SMALL * (jnp.sum(jnp.square(loadings), axis=1) + noise)
    return small & (noise - mapped >= jnp.square(outside) * noise)


def likelihood_ratio_test(self: Any, params: FactorParams, x: Data, weights: jax.Array | None = None) -> FitTest:
    """Likelihood ratio test of the fitted factors against an unrestricted covariance.

    (n - 1 - (2 D + 5) / 6 - 2 Q / 3) (log det Σ - log det S + tr Σ⁻¹ S - D), with Bartlett's correction (1951, The
    effect of standardization on a χ² approximation in factor analysis, Biometrika 38), against χ² with the
    entries of S less the parameters of Σ as degrees of freedom; S is the covariance of n rows, Σ that of the model.
    Raises ValueError for rows that are no more than columns, or have missing entries, and for no degrees of freedom.
    """
    x, weights = checks.native((x, weights))
    with checks.without_estimation():
        self.check(x, weights)
    parameters.check("params", self, params, x)
    size, each = data.reduced(x, weights, missing=False)
    if not isinstance(size, data.Roots):
        raise ValueError(
            "x must be Moments, or more complete rows than columns, for a test against the covariance of the rows; "
            f"got {checks.told(x)}. Criteria (jaxem.bic) compare models on any data"
        )
    latents, entries = self.num_latents, len(params.mean)
    freedom = entries * (entries + 3) // 2 - self.num_parameters(params)
    if freedom < 1:
        raise ValueError(f"{latents} factors of {entries} columns leave no degrees of freedom to test: take fewer")
    count = size.count[0] if each is None else size.count[0] * each[0]
    free = entries * (1 + math.log(2 * math.pi)) + 2 * jnp.sum(jnp.log(jnp.diagonal(size.root[0])))
    lack = -2 * jnp.sum(self.log_prob(params, size)) / size.count[0] - free
    statistic = (count - 1 - (2 * entries + 5) / 6 - 2 * latents / 3) * lack
    p_value = jax.scipy.special.gammaincc(0.5 * freedom, 0.5 * jnp.maximum(statistic, 0))
    return FitTest(statistic=statistic, degrees_of_freedom=freedom, p_value=p_value)


def freedom(noise: Any, entries: int, latents: int) -> int:
    """Entries of a covariance less the parameters of one with so many factors."""
    return entries * (entries + 1) // 2 - noise.degrees(entries) - entries * latents + latents * (latents - 1) // 2
