"""Independent columns of gamma observations: positive quantities of any skewness."""

import dataclasses
import warnings
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from .. import capabilities, checks, numerics, parameters, special, tree
from ..record import record
from . import columns

# For larger shapes float32 rounds log mean - mean log, which determines the shape, by more than a thousandth.
_LARGEST_IN_FLOAT32 = 300


@record
class GammaParams:
    """The mean of a column is shape / rate, its variance shape / rate².

    shape: (K, D), a.
    rate: (K, D), b.
    """

    shape: jax.Array
    rate: jax.Array


@record
class GammaStats:
    """Sums over rows with responsibilities r.

    count: (K,), sum r.
    observed: (K, D), sum r over observed entries, as the two that follow.
    total: (K, D), sum r x.
    logs: (K, D), sum r log x.
    """

    count: jax.Array
    observed: jax.Array
    total: jax.Array
    logs: jax.Array


@capabilities.completed("part")
@record(kw_only=False)
class Gamma:
    """Independent gamma columns: log p(x|k) = sum_d a log b - lgamma(a) + (a - 1) log x_d - b x_d, (a, b) of (k, d).

    prior: pseudo-statistics, a GammaStats of arrays (D,) or (K, D) with count 0, as if such rows had been seen before.
        `log_prior` is then Q at these, the log-density of the conjugate prior up to a constant. The prior is proper
        where logs are below observed log(total / observed).

    Data are above 0, (N, D) or (N,). Missing entries, NaN, are integrated out. A shape stays below 1/sqrt(eps): 7e7,
    or 3e3 in float32; a component that gets there is degenerate. In float32 shapes beyond about 300 are rounded by
    more than a thousandth, and a fit may end with a falling objective: such data need float64, and a check warns where
    a whole column spreads so little.
    Minka (2002), Estimating a Gamma distribution; Dempster, Laird & Rubin (1977), section 4.2.
    """

    prior: GammaStats | None = dataclasses.field(default=None, kw_only=True)

    # Nothing is separable: either parameter, held, changes the M-step of the other.
    supports: ClassVar[parameters.Supports] = {"shape": parameters.at_least_zero, "rate": parameters.at_least_zero}

    def pooled(self, x: jax.Array, weights: jax.Array | None, num_components: int) -> GammaParams:
        one = jnp.ones((1, checks.columns("x", x).shape[1]), tree.float_dtype(x))
        return columns.pooled(self, GammaParams(shape=one, rate=one), x, weights, num_components)

    def features(self, x: jax.Array) -> jax.Array:
        # The cube root of a gamma variable is nearly normal, whatever its shape (Wilson & Hilferty 1931).
        return columns.filled(jnp.cbrt(checks.matrix("x", x)), tree.float_dtype(x))

    def log_prob(self, params: GammaParams, x: jax.Array) -> jax.Array:
        """Log-density of every row under every component: (N, D) -> (K, N)."""
        natural = jnp.concatenate([_log_normalizer(params), -params.rate, params.shape - 1], axis=1)
        return numerics.product(natural, self._read(x, params.rate.dtype), "kf,fn->kn")

    def stats(self, params: GammaParams, x: jax.Array, responsibilities: jax.Array) -> GammaStats:
        """Expected numbers, sums and sums of logarithms: x (N, D), responsibilities (K, N)."""
        sums = columns.sums(responsibilities, self._read(x, params.rate.dtype))
        observed, total, logs = jnp.split(sums, 3, axis=1)
        # A vanishing pseudo-observation, its moments those of the current parameters, keeps a component without rows.
        log_mean = jnp.log(params.shape) - jnp.log(params.rate)
        return GammaStats(
            count=jnp.sum(responsibilities, axis=1) + columns.PSEUDO_COUNT,
            observed=observed + columns.PSEUDO_COUNT,
            total=total + columns.PSEUDO_COUNT * jnp.exp(log_mean),
            logs=logs + columns.PSEUDO_COUNT * (log_mean - special.log_minus_digamma(params.shape)),
        )

    def m_step(self, stats: GammaStats) -> GammaParams:
        """The root a of log a - digamma(a) = log mean - mean log, and a / mean; with a prior, the posterior mode."""
        return self.m_step_given(stats)

    def m_step_given(
        self, stats: GammaStats, *, shape: jax.Array | None = None, rate: jax.Array | None = None
    ) -> GammaParams:
        """The M-step of one parameter with the other held, at (K, D) or what broadcasts to it; of both if none is."""
        stats = columns.with_prior(self.prior, stats)
        mean, mean_log = stats.total / stats.observed, stats.logs / stats.observed
        if shape is None and rate is not None:
            shape = _inverse_digamma(jnp.log(rate) + mean_log)
        elif shape is None:
            shape = _shape_of_gap(jnp.log(mean) - mean_log)
        shape = jnp.broadcast_to(shape, mean.shape)
        return GammaParams(shape=shape, rate=shape / mean if rate is None else jnp.broadcast_to(rate, mean.shape))

    def q_function(self, params: GammaParams, stats: GammaStats) -> jax.Array:
        """sum observed (a log b - lgamma(a)) + (a - 1) logs - b total."""
        return jnp.sum(
            stats.observed * _log_normalizer(params) + (params.shape - 1) * stats.logs - params.rate * stats.total
        )

    def log_prior(self, params: GammaParams) -> jax.Array:
        return jnp.zeros((), params.rate.dtype) if self.prior is None else self.q_function(params, self.prior)

    def degenerate(self, stats: GammaStats, held: tuple[str, ...] = ()) -> jax.Array:
        """Components (K,) without rows, or whose entries in a column are all but equal."""
        empty = columns.empty(stats.count)
        if held:  # one parameter alone cannot collapse
            return empty
        stuck = self.m_step(stats).shape >= 0.99 * _largest_shape(stats.total.dtype)
        return empty | jnp.any(stuck, axis=1)

    def kl(self, p: GammaParams, q: GammaParams) -> jax.Array:
        """KL(p ‖ q) of a row, under every component: (K,)."""
        logs = special.digamma(p.shape) - jnp.log(p.rate / q.rate)
        gaps = special.gamma_entropy_gap(p.shape) + jax.lax.lgamma(q.shape)
        return jnp.sum(gaps - q.shape * logs + p.shape * (q.rate / p.rate), axis=1)

    def sample(self, key: jax.Array, params: GammaParams, labels: jax.Array) -> jax.Array:
        """Rows (N, D), above 0, from the component that each label (N,) names."""
        logs = jax.random.loggamma(key, params.shape[labels]) - jnp.log(params.rate[labels])
        return jnp.maximum(jnp.exp(logs), jnp.finfo(logs.dtype).tiny)

    def num_parameters(self, params: GammaParams) -> int:
        return params.shape.size + params.rate.size

    def floats_per_row(self, params: GammaParams) -> int:
        return 4 * params.shape.shape[1]

    def unconstrain(self, params: GammaParams) -> GammaParams:
        return GammaParams(shape=jnp.log(params.shape), rate=jnp.log(params.rate))

    def constrain(self, theta: GammaParams) -> GammaParams:
        return GammaParams(shape=jnp.exp(theta.shape), rate=jnp.exp(theta.rate))

    def check(self, x: jax.Array, name: str = "x") -> None:
        columns.check(name, x, lambda v: (v > 0) & (v < np.inf), "finite numbers above 0")
        if not checks.is_concrete(x) or tree.float_dtype(x) != jnp.float32:
            return
        exact = np.asarray(x, np.float64).reshape(len(x), -1)
        # Components spread less than all data do: their shapes are not below this one.
        shape = np.nanmean(exact, axis=0) ** 2 / np.maximum(np.nanvar(exact, axis=0), np.finfo(float).tiny)
        if np.max(shape) > _LARGEST_IN_FLOAT32:
            warnings.warn(
                f"{name} spreads so little that column {np.argmax(shape)} has a gamma shape of {np.max(shape):.3g} or "
                "more, which float32 rounds: a fit may end with a falling objective. Enable float64, as by "
                "jax.enable_x64(True)",
                stacklevel=4,
            )

    def _read(self, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Which entries are observed, their values, and the logarithms of these: (3 D, N)."""
        values, observed = columns.read(x, dtype)
        logs = jnp.log(jnp.where(observed, values, 1))
        return jnp.concatenate([observed.astype(dtype), values, logs], axis=1).T


def _log_normalizer(params: GammaParams) -> jax.Array:
    """a log b - lgamma(a): (K, D)."""
    return params.shape * jnp.log(params.rate) - jax.lax.lgamma(params.shape)


def _largest_shape(dtype: jnp.dtype) -> float:
    """The shape at which log mean - mean log, about 1 / (2 a), has lost half of its digits to rounding."""
    return float(jnp.finfo(dtype).eps) ** -0.5


def _shape_of_gap(gap: jax.Array) -> jax.Array:
    """The a with log a - digamma(a) = gap, or the largest shape where it is beyond that."""
    gap = jnp.maximum(gap, 0.5 / _largest_shape(gap.dtype))
    return special.inverse_log_minus_digamma(gap)


def _inverse_digamma(y: jax.Array) -> jax.Array:
    """The a with digamma(a) = y. Minka (2000), Estimating a Dirichlet distribution, appendix C."""

    def step(_: int, a: jax.Array) -> jax.Array:
        value, slope = jax.jvp(jax.lax.digamma, (a,), (jnp.ones_like(a),))
        return a - (value - y) / slope

    start = jnp.where(y > -2.22, jnp.exp(y) + 0.5, -1 / (jnp.minimum(y, -2.22) + np.euler_gamma))
    return jax.lax.fori_loop(0, 6, step, start)
