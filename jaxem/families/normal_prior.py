"""The conjugate prior of normal components, and the posteriors that are of its kind.

Fraley & Raftery (2007), Bayesian regularization for normal mixture estimation and model-based
clustering, Journal of Classification 24, table 1: the modes for every covariance shape.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from .. import checks, numerics, special
from ..priors import GammaPrior, like
from ..record import record
from . import conditional
from . import covariance as shapes
from .columns import available_moments

# Shapes by the number of axes that a scale has after those of the components.
_SHAPES: dict[int, shapes.Shape] = {shape.trailing: shape for shape, _ in shapes.NAMES.values()}


@record
class NormalInverseWishart:
    """mean | covariance ~ N(mean, covariance / shrinkage), covariance ~ inverse-Wishart(degrees_of_freedom, scale).

    mean: (D,).
    shrinkage: kappa, the number of pseudo-rows that the mean is worth.
    degrees_of_freedom: nu.
    scale: (D, D) for full and tied covariances. For diagonal ones it is (D,), every variance inverse-gamma(nu / 2,
        scale_j / 2); for spherical ones a number, the variance inverse-gamma(nu / 2, scale / 2).

    Every field can be traced and vmapped. Posteriors of K components have mean (K, D) and scale (K, ...). For full
    covariances, shrinkage and degrees of freedom are (K,). Others count observed entries: shrinkage is (K, D), degrees
    of freedom (K, D) for diagonal, (K,) for spherical covariances. A tied covariance has one distribution for all
    components: scale and degrees of freedom have a leading axis of 1.
    """

    mean: jax.Array
    shrinkage: jax.Array | float
    degrees_of_freedom: jax.Array | float
    scale: jax.Array

    positive = ("shrinkage", "degrees_of_freedom")
    spreads = ("scale",)

    @property
    def shape(self) -> shapes.Shape:
        """The shape of the covariances, from the axes of the scale: a number belongs to a spherical one."""
        return _SHAPES[jnp.ndim(self.scale) - jnp.ndim(self.mean) + 1]

    def over(
        self, shape: shapes.Shape, lead: tuple[int, ...], columns: int, dtype: Any, tied: bool = False
    ) -> "NormalInverseWishart":
        """The same for components of shape `lead`, every field in its full shape; tied: with one covariance for all."""
        wide, full, each = (*lead, columns), shape.trailing == 2, (1,) * len(lead) if tied else lead
        return NormalInverseWishart(
            mean=like(self.mean, wide, dtype),
            shrinkage=like(self.shrinkage, lead if full else wide, dtype),
            degrees_of_freedom=like(self.degrees_of_freedom, (*each, columns) if shape.trailing == 1 else each, dtype),
            scale=like(self.scale, (*each, *(columns,) * shape.trailing), dtype),
        )

    @property
    def tied(self) -> bool:
        """Whether there is one covariance for all components."""
        lead, each = jnp.shape(self.mean)[:-1], jnp.shape(self.scale)[: jnp.ndim(self.mean) - 1]
        return each != lead

    def shared(self) -> "NormalInverseWishart":
        """The first component's covariance as that of all."""
        degrees = jnp.asarray(self.degrees_of_freedom)[:1]
        return dataclasses.replace(self, degrees_of_freedom=degrees, scale=self.scale[:1])

    @property
    def pseudo_rows(self) -> jax.Array:
        """The shrinkage of every column (..., D), or (..., 1) where all columns have the same."""
        shrinkage = jnp.asarray(self.shrinkage)
        return shrinkage[..., None] if shrinkage.ndim < jnp.ndim(self.mean) else shrinkage

    def moved(
        self, shape: shapes.Shape, stats: Any, tied: bool = False, moves: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """Given `NormalStats`: the posterior mean minus their reference mean, and the posterior scale.

        tied: whether all components have one scale; moves: whether the mean leaves the reference.
        """
        kappa, towards = self.pseudo_rows, self.mean - stats.reference / stats.rows
        pulled = stats.first + kappa * towards
        shift = pulled / (stats.rows + kappa) if moves else jnp.zeros_like(pulled)
        pull = shape.cross(kappa * towards, towards) - shape.cross(shift, pulled)
        scale = self.scale[0] if tied else self.scale
        return shift, stats.second + (jnp.sum(pull, axis=0) if tied else pull) + scale

    def posterior(self, stats: Any, tied: bool = False) -> "NormalInverseWishart":
        """Given `NormalStats` of K components, each with a covariance of its own, or all with the same."""
        shape, (*lead, columns) = self.shape, stats.first.shape
        prior = self.over(shape, tuple(lead), columns, stats.first.dtype, tied)
        shift, scale = prior.moved(shape, stats, tied)
        rows = stats.rows if shape.trailing < 2 else stats.rows[..., 0]
        more = rows if shape.trailing == 2 else shape.entries(rows)
        return NormalInverseWishart(
            mean=stats.reference / stats.rows + shift,
            shrinkage=prior.shrinkage + rows,
            degrees_of_freedom=prior.degrees_of_freedom + (jnp.sum(more, axis=0, keepdims=True) if tied else more),
            scale=scale[None] if tied else scale,
        )

    def mode(self) -> tuple[jax.Array, jax.Array]:
        """The joint mode of mean and covariance."""
        columns = self.mean.shape[-1]
        exponent = self.shape.prior_exponent(self._degrees, columns) + self.shape.repeats(columns)
        return self.mean, self.scale / exponent

    def expected(self) -> tuple[jax.Array, jax.Array]:
        """The means of mean and covariance; where the covariance has none, `plugged` in place of it."""
        lost = self.mean.shape[-1] + 1 if self.shape.trailing == 2 else 2
        degrees = self._degrees
        return self.mean, self.scale / jnp.where(degrees > lost, degrees - lost, degrees)

    def plugged(self) -> tuple[jax.Array, jax.Array]:
        """The mean, and the inverse of the expected precision."""
        return self.mean, self.scale / self._degrees

    @property
    def slack(self) -> jax.Array:
        """E[log N(x | mean, covariance)] minus the log-density at `plugged`: at most 0.

        (..., D), for every entry of a row; for full covariances (..., 1), for the whole row.
        """
        degrees, kappa = jnp.asarray(self.degrees_of_freedom), self.pseudo_rows
        if self.shape.trailing == 2:
            halves, columns = self._halves, self.mean.shape[-1]
            # E[log det precision] - log det E[precision].
            logs = jnp.log(2 * halves / degrees[..., None]) - special.log_minus_digamma(halves)
            return 0.5 * jnp.sum(logs, axis=-1, keepdims=True) - 0.5 * columns / kappa
        degrees = degrees[..., None] if self.shape.trailing == 0 else degrees
        return -0.5 * special.log_minus_digamma(0.5 * degrees) - 0.5 / kappa

    def kl(self, other: "NormalInverseWishart") -> jax.Array:
        """KL(this ‖ other), summed over components. Written so that no two large terms cancel."""
        whole = self._whole()
        shape, lead, columns = whole.shape, whole.mean.shape[:-1], whole.mean.shape[-1]
        # Factored before `over`: once, where all components have the same prior.
        other_logdet = 2 * shape.whitener(0.5 * jnp.asarray(other.scale, whole.mean.dtype), columns)[1]
        other = other.over(shape, lead, columns, whole.mean.dtype, whole.tied)
        whitener, half_logdet = shape.whitener(whole.plugged()[1], columns)
        precision, away = shape.precision(whitener), whole.mean - other.mean
        ratio = other.pseudo_rows / whole.pseudo_rows
        square = jnp.sum(shape.trace(precision, shape.cross(other.pseudo_rows * away, away)))
        spread = jnp.sum(jnp.broadcast_to(ratio - 1 - jnp.log(ratio), whole.mean.shape))
        means = 0.5 * (square + spread)
        if shape.trailing < 2:
            inverses = [GammaPrior(0.5 * q.degrees_of_freedom, 0.5 * q.scale) for q in (whole, other)]
            return means + inverses[0].kl(inverses[1])
        halves, others, step = whole._halves, other._halves, 0.5 * jnp.arange(columns, dtype=whole.mean.dtype)
        logs = special.digamma(halves)
        lost = jnp.sum(special.gamma_entropy_gap(halves) + numerics.to_rank(step, logs.ndim) * (logs - 1), axis=-1)
        degrees = jnp.asarray(whole.degrees_of_freedom)
        # E[log det precision] + log det(scale of the other / 2).
        logdet = jnp.sum(logs - jnp.log(0.5 * degrees)[..., None], axis=-1) - 2 * half_logdet + other_logdet
        before = jnp.sum(jax.lax.lgamma(others), axis=-1) - 0.5 * jnp.asarray(other.degrees_of_freedom) * logdet
        return means + jnp.sum(lost + before + 0.5 * shape.trace(precision, other.scale))

    def sample(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Means and covariances, of Wishart precisions by Bartlett's decomposition."""
        whole = self._whole()
        shape, columns = whole.shape, whole.mean.shape[-1]
        of_scale, of_corner, of_mean = jax.random.split(key, 3)
        noise = jax.random.normal(of_mean, whole.mean.shape, whole.mean.dtype) / jnp.sqrt(whole.pseudo_rows)
        if shape.trailing < 2:
            rate = jnp.exp(special.draw_log_gamma(of_scale, 0.5 * jnp.asarray(whole.degrees_of_freedom)))
            covariance = 0.5 * whole.scale / rate
            root = jnp.sqrt(covariance)
            return whole.mean + (root[..., None] if shape.trailing == 0 else root) * noise, covariance
        diagonal = jnp.sqrt(2 * jnp.exp(special.draw_log_gamma(of_scale, whole._halves)))
        eye = numerics.to_rank(jnp.eye(columns, dtype=whole.mean.dtype), whole.scale.ndim)
        corner = jnp.tril(jax.random.normal(of_corner, whole.scale.shape, whole.mean.dtype), -1)
        inverse = numerics.inverse_lower(corner + diagonal[..., None] * eye)
        root = numerics.product(numerics.cholesky(whole.scale), inverse, "...ij,...kj->...ik")
        covariance = numerics.product(root, root, "...ik,...jk->...ij")
        return whole.mean + numerics.product(root, noise, "...ij,...j->...i"), covariance

    def log_prob(
        self, mean: jax.Array, covariance: jax.Array, shape: shapes.Shape | None = None, tied: bool = False
    ) -> jax.Array:
        """Log-density, summed over K components: mean (K, D), covariance in the storage of the shape.

        shape: None for that of the scale; tied: whether all components have the same covariance.
        """
        shape, columns = self.shape if shape is None else shape, mean.shape[-1]
        whitener, half_logdet = shape.whitener(covariance, columns)
        whole = self.over(shape, mean.shape[:-1], columns, mean.dtype)
        deviation, kappa = mean - whole.mean, jnp.broadcast_to(whole.pseudo_rows, mean.shape)
        square = shape.trace(shape.precision(whitener), shape.cross(kappa * deviation, deviation))
        # A shrinkage of 0 is the flat prior on the means: improper, so it has no normaliser.
        log_kappa = jnp.where(kappa > 0, jnp.log(jnp.where(kappa > 0, kappa, 1)), 0)
        normaliser = 0.5 * jnp.sum(log_kappa - math.log(2 * math.pi), axis=-1)
        means = jnp.sum(normaliser - half_logdet - 0.5 * square)
        degrees = jnp.asarray(self.degrees_of_freedom, mean.dtype)
        covariances = shape.log_prior(covariance, degrees, jnp.asarray(self.scale, mean.dtype))
        return means + (covariances[0] if tied else jnp.sum(covariances))

    def unconstrain(self) -> "NormalInverseWishart":
        """The mean as it is, logarithms of what is positive, the scale in coordinates of the shape."""
        least = self.mean.shape[-1] - 1 if self.shape.trailing == 2 else 0
        return NormalInverseWishart(
            mean=self.mean,
            shrinkage=jnp.log(self.shrinkage),
            degrees_of_freedom=jnp.log(jnp.asarray(self.degrees_of_freedom) - least),
            scale=self.shape.unconstrain(self.scale),
        )

    def constrain(self) -> "NormalInverseWishart":
        """Inverse of `unconstrain`."""
        # Full and diagonal scales both have one axis of coordinates; with the latter, degrees of freedom have one too.
        wide, coordinates = jnp.ndim(self.degrees_of_freedom) == self.mean.ndim, jnp.ndim(self.scale)
        full = not wide and coordinates == self.mean.ndim
        shape = _SHAPES[2 if full else 1 if wide else 0]
        columns = self.mean.shape[-1]
        return NormalInverseWishart(
            mean=self.mean,
            shrinkage=jnp.exp(self.shrinkage),
            degrees_of_freedom=jnp.exp(self.degrees_of_freedom) + (columns - 1 if full else 0),
            scale=shape.constrain(self.scale, columns),
        )

    def _whole(self) -> "NormalInverseWishart":
        """The same, every field in its full shape."""
        mean = jnp.asarray(self.mean)
        dtype = jnp.result_type(mean, jnp.asarray(self.scale), float(0))
        return self.over(self.shape, mean.shape[:-1], mean.shape[-1], dtype, self.tied)

    @property
    def _degrees(self) -> jax.Array:
        """Degrees of freedom beside every number of the scale."""
        degrees = jnp.asarray(self.degrees_of_freedom)
        return degrees[..., None, None] if self.shape.trailing == 2 else degrees

    @property
    def _halves(self) -> jax.Array:
        """(nu - i) / 2 for i < D, the shapes of the gamma variables that a Wishart determinant is made of: (..., D)."""
        degrees, columns = jnp.asarray(self.degrees_of_freedom), self.mean.shape[-1]
        return 0.5 * (degrees[..., None] - numerics.to_rank(jnp.arange(columns, dtype=degrees.dtype), degrees.ndim + 1))


def log_predictive(q: NormalInverseWishart, x: jax.Array, observed: jax.Array | None) -> jax.Array:
    """log E_q[N(x | mean, covariance)] of K components, Student's t: (N, D) -> (K, N).

    observed: (D, N), 1 where an entry is observed and 0 where it is missing; None where all are.
    Murphy (2012), Machine Learning: A Probabilistic Perspective, section 4.6.3.9.
    """
    shape, columns = q.shape, q.mean.shape[-1]
    deviations = x.T[None] - q.mean[:, :, None]
    size = jnp.full((1, x.shape[0]), float(columns), x.dtype)
    if observed is not None:
        deviations, size = deviations * observed[None], jnp.sum(observed, axis=0)[None]
    widening = 1 + 1 / q.pseudo_rows
    if shape.trailing == 2:
        degrees = (jnp.asarray(q.degrees_of_freedom) - columns + 1)[:, None]
        spread = q.scale * (widening / degrees)[..., None]
        if observed is not None:
            return _log_t(degrees, *_observed_square(q.mean, spread, x, observed, size), size)
        whitener, half_logdet = shape.whitener(spread, columns)
        return _log_t(degrees, shape.square(whitener, deviations), half_logdet[:, None], size)
    scale, degrees = q.plugged()[1], jnp.asarray(q.degrees_of_freedom)
    squares = jnp.square(deviations)
    each = scale if shape.trailing == 1 else scale[:, None]
    variance = (widening * each)[..., None]
    scales = 0.5 * jnp.log(variance) * (1 if observed is None else observed[None])
    if shape.trailing == 0:
        total = jnp.sum(jnp.broadcast_to(scales, squares.shape), axis=1)
        return _log_t(degrees[:, None], jnp.sum(squares / variance, axis=1), total, size)
    seen = jnp.ones_like(squares[:1]) if observed is None else observed[None]
    return jnp.sum(_log_t(degrees[..., None], squares / variance, scales, seen), axis=1)


def _observed_square(
    mean: jax.Array, spread: jax.Array, x: jax.Array, observed: jax.Array, size: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Squared distances and log det / 2 (K, N) of observed entries, from normal densities of spread and 2 spread."""
    rows = conditional.Measured(values=x, observed=observed.T > 0)
    once, twice = (conditional.log_prob(mean, factor * spread, rows) for factor in (1.0, 2.0))
    square = 4 * (twice - once) + 2 * size * math.log(2)
    return square, -once - 0.5 * (size * math.log(2 * math.pi) + square)


def _log_t(degrees: jax.Array, square: jax.Array, log_scale: jax.Array, size: jax.Array) -> jax.Array:
    """Student's t log-density in `size` dimensions (0 of them: 0), from its square and log-scale."""
    some = jnp.where(size > 0, 0.5 * size, 0.5)
    ratio = jax.lax.lgamma(some) - special.log_beta(*_broadcast(0.5 * degrees, some))
    density = ratio - 0.5 * size * jnp.log(degrees * math.pi) - log_scale
    density = density - 0.5 * (degrees + size) * jnp.log1p(square / degrees)
    return jnp.where(size > 0, density, 0)


def _broadcast(*values: jax.Array) -> list[jax.Array]:
    shape = jnp.broadcast_shapes(*(value.shape for value in values))
    return [jnp.broadcast_to(value, shape) for value in values]


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
