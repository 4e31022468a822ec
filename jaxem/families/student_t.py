"""The multivariate t distribution: normal components with a latent scale a row, robust to outliers."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from .. import capabilities, checks, parameters, special
from ..record import record, static
from . import columns
from . import covariance as shapes
from .normal import Normal, NormalParams, NormalStats

# The limits of estimated degrees of freedom: at the upper one the density is the normal one to a tenth of a percent, at
# the lower one its tails are so heavy that a scale means little.
_MOST, _LEAST = 1e3, 1e-1


@record
class StudentTParams:
    """Parameters of K multivariate t components.

    mean: (K, D), m.
    scale: S, stored as a `Normal`'s covariance of that shape is.
    degrees_of_freedom: (K,), nu.
    """

    mean: jax.Array
    scale: jax.Array
    degrees_of_freedom: jax.Array


@record
class StudentTStats:
    """Expected statistics of the rows and of their latent scales u, additive over rows.

    count: (K,), sum r.
    moments: those of a normal, every row counted r E[u] times.
    log_scales: (K,), sum r (E[log u] - E[u] + 1).
    base: (K,), sum r h(x), where h makes Q equal to the log-density at the current parameters.
    """

    count: jax.Array
    moments: NormalStats
    log_scales: jax.Array
    base: jax.Array


@capabilities.completed("part")
@record(kw_only=False)
class StudentT:
    """Multivariate t components: x | u ~ Normal(mean, scale / u), u ~ Gamma(nu / 2, nu / 2).

    log p(x|k) = log G((nu+D)/2) - log G(nu/2) - (D log(nu pi) + log det S + (nu+D) log(1 + d/nu)) / 2
    with d = (x - m)ᵀ S⁻¹ (x - m).

    scale: the shape of S, by any name that `Normal` has for covariances.
    degrees_of_freedom: held at this number, or estimated (None, the default) between 0.1 and 1000.
    prior: pseudo-statistics, as `pseudo_rows` makes them.

    Data are (N, D) or (N,), nothing missing. One pass over the rows gives the statistics of all parameters, degrees of
    freedom included. (ECME of Liu & Rubin takes a second pass for the degrees of freedom, at the new mean and scale,
    and needs fewer steps; where degrees of freedom are held, the two are the same.)
    Raises ValueError for an unknown scale or degrees of freedom that are not positive.
    Liu & Rubin (1995), ML estimation of the t distribution using EM and its extensions, Statistica
    Sinica 5; McLachlan & Peel, Finite Mixture Models, section 7.5.
    """

    scale: str = static(default="full")
    degrees_of_freedom: jax.Array | float | None = None
    prior: StudentTStats | None = dataclasses.field(default=None, kw_only=True)

    separable = ("scale", "degrees_of_freedom")
    shareable = ("degrees_of_freedom",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", shapes.canonical(self.scale))
        given = self.degrees_of_freedom
        if checks.is_known(given) and not np.all(np.asarray(given) > 0):
            raise ValueError(f"degrees_of_freedom must be above 0, or None to estimate them; got {given}")

    @property
    def supports(self) -> parameters.Supports:
        return {"scale": self._normal.shape.support, "degrees_of_freedom": parameters.at_least_zero}

    @property
    def _normal(self) -> Normal:
        # Residuals about each component's own mean: outliers are what this family is for.
        return Normal(self.scale, form="whitened", missing=False)

    def pooled(self, x: jax.Array, weights: jax.Array | None, num_components: int) -> StudentTParams:
        normal = self._normal.pooled(x, weights, num_components)
        nu = 10.0 if self.degrees_of_freedom is None else self.degrees_of_freedom
        nu = jnp.broadcast_to(jnp.asarray(nu, normal.mean.dtype), (num_components,))
        return StudentTParams(mean=normal.mean, scale=normal.covariance, degrees_of_freedom=nu)

    def features(self, x: jax.Array) -> jax.Array:
        return checks.matrix("x", x)

    def log_prob(self, params: StudentTParams, x: jax.Array) -> jax.Array:
        """Log-density of every row under every component: (N, D) -> (K, N)."""
        constant, square = self._parts(params, x)
        nu = params.degrees_of_freedom[:, None]
        return constant[:, None] - 0.5 * (nu + params.mean.shape[-1]) * jnp.log1p(square / nu)

    def stats(self, params: StudentTParams, x: jax.Array, responsibilities: jax.Array) -> StudentTStats:
        """Expected statistics: x (N, D), responsibilities (K, N); E[u] = (nu + D) / (nu + d)."""
        _, square = self._parts(params, x)
        mean, gap, base = scale_moments(params.degrees_of_freedom[:, None], square, params.mean.shape[-1])
        normal = NormalParams(mean=params.mean, covariance=params.scale)
        # A vanishing pseudo-row, whose u has the moments of the current parameters, keeps a component without rows.
        own = -special.log_minus_digamma(0.5 * params.degrees_of_freedom)
        return StudentTStats(
            count=jnp.sum(responsibilities, axis=1) + columns.PSEUDO_COUNT,
            moments=self._normal.stats(normal, x, responsibilities * mean),
            log_scales=jnp.sum(responsibilities * gap, axis=1) + columns.PSEUDO_COUNT * own,
            base=jnp.sum(responsibilities * base, axis=1),
        )

    def m_step(self, stats: StudentTStats) -> StudentTParams:
        """Means and scales of the rows weighted by E[u], and degrees of freedom from `log_scales`."""
        stats = self._with_prior(stats)
        return self._with_normal(stats, self._normal.m_step(stats.moments))

    def m_step_given(self, stats: StudentTStats, *, mean: jax.Array) -> StudentTParams:
        """The M-step with the means held."""
        stats = self._with_prior(stats)
        return self._with_normal(stats, self._normal.m_step_given(stats.moments, mean=mean))

    def share(self, stats: StudentTStats, name: str, params: StudentTParams) -> jax.Array:
        """The degrees of freedom that all components share, from the sum of their `log_scales`."""
        return degrees_told(jnp.sum(stats.log_scales) / jnp.sum(stats.count))

    def q_function(self, params: StudentTParams, stats: StudentTStats) -> jax.Array:
        """E[log Normal(x; m, S/u) + log Gamma(u; nu/2, nu/2)] + base.

        A lower bound of sum r log p(x), tight at the parameters that the statistics were made with.
        """
        columns_here = params.mean.shape[-1]
        moments = stats.moments
        normal = self._normal.q_function(NormalParams(mean=params.mean, covariance=params.scale), moments)
        # The Q of a normal counts a log-determinant for each unit of E[u]; here there is one for each row.
        each = jnp.broadcast_to(params.scale, self._each_shape(params))
        scales = self._normal.shape.log_scales(each, columns_here) + 0.5 * math.log(2 * math.pi)
        surplus = jnp.sum((moments.rows - stats.count[:, None]) * scales)
        return (
            normal
            + surplus
            + jnp.sum(log_gammas(params.degrees_of_freedom, stats.count, stats.log_scales) + stats.base)
        )

    def log_prior(self, params: StudentTParams) -> jax.Array:
        """Q of the pseudo-statistics: the log-density of the prior up to a constant."""
        return jnp.zeros((), params.mean.dtype) if self.prior is None else self.q_function(params, self.prior)

    def rebase(self, stats: StudentTStats, params: StudentTParams) -> StudentTStats:
        """The same statistics about the means of `params`."""
        normal = NormalParams(mean=params.mean, covariance=params.scale)
        return dataclasses.replace(stats, moments=self._normal.rebase(stats.moments, normal))

    def degenerate(self, stats: StudentTStats, held: tuple[str, ...] = ()) -> jax.Array:
        """Components (K,) that are empty, or whose scale rests on its floor."""
        inside = tuple("covariance" if name == "scale" else name for name in held)
        return columns.empty(stats.count) | self._normal.degenerate(stats.moments, inside)

    def sample(self, key: jax.Array, params: StudentTParams, labels: jax.Array) -> jax.Array:
        """One row (N, D) from the component that each label (N,) names."""
        key_scale, key_noise = jax.random.split(key)
        nu = params.degrees_of_freedom[labels]
        scale = jax.random.gamma(key_scale, 0.5 * nu) / (0.5 * nu)
        mean = params.mean[labels]
        noise = jax.random.normal(key_noise, mean.shape, mean.dtype)
        each = jnp.broadcast_to(params.scale, self._each_shape(params))[labels]
        return mean + self._normal.shape.colour(each, noise) / jnp.sqrt(scale)[:, None]

    def num_parameters(self, params: StudentTParams) -> int:
        normal = NormalParams(mean=params.mean, covariance=params.scale)
        estimated = params.mean.shape[0] if self.degrees_of_freedom is None else 0
        return self._normal.num_parameters(normal) + estimated

    def floats_per_row(self, params: StudentTParams) -> int:
        normal = NormalParams(mean=params.mean, covariance=params.scale)
        return 4 * params.mean.shape[0] + self._normal.floats_per_row(normal)

    def unconstrain(self, params: StudentTParams) -> StudentTParams:
        """Means, scales in a normal's coordinates, log degrees of freedom (none where they are held)."""
        normal = self._normal.unconstrain(NormalParams(mean=params.mean, covariance=params.scale))
        nu = jnp.log(params.degrees_of_freedom) if self.degrees_of_freedom is None else jnp.zeros((0,))
        return StudentTParams(mean=normal.mean, scale=normal.covariance, degrees_of_freedom=nu)

    def constrain(self, theta: StudentTParams) -> StudentTParams:
        """Inverse of `unconstrain`, within the limits of estimated degrees of freedom."""
        normal = self._normal.constrain(NormalParams(mean=theta.mean, covariance=theta.scale))
        estimated = within_limits(jnp.exp(theta.degrees_of_freedom))
        nu = estimated if self.degrees_of_freedom is None else self._held(theta.mean)
        return StudentTParams(mean=normal.mean, scale=normal.covariance, degrees_of_freedom=nu)

    def check(self, x: jax.Array, name: str = "x") -> None:
        checks.finite_matrix(name, x)

    def _with_prior(self, stats: StudentTStats) -> StudentTStats:
        """Statistics and pseudo-statistics together, about the reference of the former."""
        if self.prior is None:
            return stats
        mean = stats.moments.reference / stats.moments.rows
        nothing = StudentTParams(mean=mean, scale=stats.moments.second, degrees_of_freedom=stats.count)
        return columns.with_prior(self.rebase(self.prior, nothing), stats)

    def _held(self, mean: jax.Array) -> jax.Array:
        """The degrees of freedom that are held, (K,)."""
        return jnp.broadcast_to(jnp.asarray(self.degrees_of_freedom, mean.dtype), mean.shape[:1])

    def _each_shape(self, params: StudentTParams) -> tuple[int, ...]:
        """The shape of one scale a component, tied ones repeated."""
        shape = params.scale.shape
        return (params.mean.shape[0], *shape) if self._normal.tied else shape

    def _with_normal(self, stats: StudentTStats, normal: NormalParams) -> StudentTParams:
        """Parameters from the M-step of the normal, which divides by sum r E[u] where a scale is divided by sum r."""
        weighted, rows = stats.moments.count, stats.count
        ratio = jnp.sum(weighted) / jnp.sum(rows) if self._normal.tied else weighted / rows
        ratio = ratio.reshape(ratio.shape + (1,) * (normal.covariance.ndim - ratio.ndim))
        nu = degrees_told(stats.log_scales / rows) if self.degrees_of_freedom is None else self._held(normal.mean)
        return StudentTParams(mean=normal.mean, scale=normal.covariance * ratio, degrees_of_freedom=nu)

    def _parts(self, params: StudentTParams, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The terms of log p without rows (K,), and squared Mahalanobis distances (K, N)."""
        columns_here = params.mean.shape[-1]
        rows = checks.matrix("x", x)
        if rows.shape[1] != columns_here:
            raise ValueError(f"x must have {columns_here} columns, as the parameters have; got shape {jnp.shape(x)}")
        each = jnp.broadcast_to(params.scale, self._each_shape(params))
        whitener, half_logdet = self._normal.shape.whitener(each, columns_here)
        square = self._normal.shape.square(whitener, rows.T[None] - params.mean[:, :, None])
        return normaliser(params.degrees_of_freedom, columns_here) - half_logdet, square


def normaliser(nu: jax.Array, columns_here: int) -> jax.Array:
    """The constant (K,) of a log-density of unit scale in so many columns."""
    # log G(a + h) - log G(a) - h log(2 pi a), a = nu / 2, h = D / 2, by Stirling's series, which does not cancel.
    a, h = 0.5 * nu, 0.5 * columns_here
    errors = special.stirling_error(a + h) - special.stirling_error(a)
    gammas = (h - 0.5) * jnp.log1p(h / a) - a * special.log1p_gap(h / a) + errors
    return gammas - h * math.log(2 * math.pi)


def scale_moments(nu: jax.Array, square: jax.Array, columns_here: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """E[u], E[log u] - E[u] + 1, and the part of `base`, of latent scales given squared distances (K, N); nu (K, 1)."""
    shape = 0.5 * (nu + columns_here)
    mean = (nu + columns_here) / (nu + square)
    # 1 / E[u] = 1 + surplus. For large nu all u are nearly 1, and nu follows from their small differences from 1.
    surplus = (square - columns_here) / (nu + columns_here)
    log_mean, short = -jnp.log1p(surplus), special.log_minus_digamma(shape)
    logs = log_mean - short
    # E[log p(x, u)] at these parameters falls short of log p(x) by the entropy of u given x.
    entropy = log_mean + shape - jnp.log(shape) + jax.lax.lgamma(shape) + (1 - shape) * jax.lax.digamma(shape)
    return mean, (log_mean + surplus * mean) - short, entropy + (0.5 * columns_here - 1) * logs


def log_gammas(nu: jax.Array, count: jax.Array, log_scales: jax.Array) -> jax.Array:
    """sum r E[log Gamma(u; nu/2, nu/2)], without the terms that hold no nu: (K,)."""
    half = 0.5 * nu
    return count * (0.5 * jnp.log(half / (2 * math.pi)) - special.stirling_error(half)) + half * log_scales


def degrees_told(mean_log: jax.Array) -> jax.Array:
    """The nu, within its limits, with log(nu/2) - digamma(nu/2) = -mean_log, where mean_log = E[log u] - E[u] + 1."""
    # The left side is about 1 / nu for large nu: below half its value at the upper limit, nu is clipped in any case.
    half = special.inverse_log_minus_digamma(jnp.maximum(-mean_log, 0.5 / _MOST))
    return within_limits(2 * half)


def within_limits(nu: jax.Array) -> jax.Array:
    """Degrees of freedom, clipped to their limits."""
    return jnp.clip(nu, _LEAST, _MOST)
