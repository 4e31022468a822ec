"""Independent columns of counts, or of waiting times, at a constant rate: Poisson or exponential observations."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from .. import capabilities, checks, numerics, parameters, tree
from ..parts import conjugacy
from ..priors import GammaPrior
from ..protocols import Data
from ..record import record
from . import columns


@record
class RateParams:
    """rate: (K, D), events per unit of exposure, or of time, in each column."""

    rate: jax.Array


@record
class RateStats:
    """Sums over rows with responsibilities r; of entries, only the observed ones count.

    count: (K,), sum r.
    events: (K, D), sum r x; for waiting times sum r, as each ends with one event.
    exposure: (K, D), sum r e, what the events are counted over; for waiting times sum r x.
    base: (K,), sum r h(x), where h is the part of the log-probability that holds no parameter.
    """

    count: jax.Array
    events: jax.Array
    exposure: jax.Array
    base: jax.Array


def _natural(params: RateParams) -> jax.Array:
    """The coefficients of events and exposures in log p(x): log rate and -rate, (K, 2 D)."""
    return jnp.concatenate([numerics.safe_log(params.rate), -params.rate], axis=1)


def _pooled(
    family: "Poisson | Exponential", x: Data, values: jax.Array, weights: jax.Array | None, num_components: int
) -> RateParams:
    """The M-step from all rows in one component, K times over."""
    neutral = RateParams(rate=jnp.ones((1, checks.columns("x", values).shape[1]), tree.float_dtype(x)))
    return columns.pooled(family, neutral, x, weights, num_components)


def _stats(params: RateParams, responsibilities: jax.Array, features: jax.Array, base: jax.Array) -> RateStats:
    """Statistics from events and exposures (2 D, N)."""
    totals = columns.sums(responsibilities, features)
    half = totals.shape[1] // 2
    # A vanishing pseudo-observation at the current rate, whatever the rate is, keeps a component without rows as it is.
    scale = columns.PSEUDO_COUNT / (1 + params.rate)
    return RateStats(
        count=jnp.sum(responsibilities, axis=1) + columns.PSEUDO_COUNT,
        events=totals[:, :half] + scale * params.rate,
        exposure=totals[:, half:] + scale,
        base=base,
    )


def _m_step(family: "Poisson | Exponential", stats: RateStats) -> RateParams:
    """Events / exposure; with a prior, the posterior mode."""
    seen = stats.events, stats.exposure
    return RateParams(rate=seen[0] / seen[1] if family.prior is None else family.prior.posterior_mode(seen))


def _q_function(family: "Poisson | Exponential", params: RateParams, stats: RateStats) -> jax.Array:
    """sum events log(rate) - exposure rate + base."""
    return _total_score(_natural(params), stats)


def _total_score(natural: jax.Array, stats: RateStats) -> jax.Array:
    totals = jnp.concatenate([stats.events, stats.exposure], axis=1)
    return columns.expected_score(natural, totals) + jnp.sum(stats.base)


def _log_prior(family: "Poisson | Exponential", params: RateParams) -> jax.Array:
    return jnp.zeros((), params.rate.dtype) if family.prior is None else family.prior.log_prob(params.rate)


def _num_parameters(family: "Poisson | Exponential", params: RateParams) -> int:
    return params.rate.size


def _unconstrain(family: "Poisson | Exponential", params: RateParams) -> RateParams:
    return RateParams(rate=jnp.log(params.rate))


def _constrain(family: "Poisson | Exponential", theta: RateParams) -> RateParams:
    return RateParams(rate=jnp.exp(theta.rate))


# The methods that both families have, in the order in which they take them.
_COMMON = _m_step, _q_function, _log_prior, _num_parameters, _unconstrain, _constrain


def _conjugate_of(family: "Poisson | Exponential") -> GammaPrior:
    """The prior."""
    if family.prior is None:
        name = type(family).__name__
        raise ValueError(
            f"{name} needs a prior here, as {name}(prior=GammaPrior(shape, rate)): none is no distribution"
        )
    return family.prior


def _posterior(family: "Poisson | Exponential", stats: RateStats) -> GammaPrior:
    return family.conjugate_of().posterior((stats.events, stats.exposure))


def _given(family: "Poisson | Exponential", rate: jax.Array) -> RateParams:
    return RateParams(rate=rate)


def _plugged(family: "Poisson | Exponential", q: GammaPrior) -> RateParams:
    return RateParams(rate=q.expected())


def _expected_natural(q: GammaPrior) -> jax.Array:
    """The expected coefficients of events and exposures: (K, 2 D)."""
    return jnp.concatenate([q.expected_log(), -q.expected()], axis=1)


def _expected_log_prob(family: "Poisson | Exponential", q: GammaPrior, x: Data) -> jax.Array:
    return family.score(_expected_natural(q), x)


def _expected_q(family: "Poisson | Exponential", q: GammaPrior, stats: RateStats) -> jax.Array:
    return _total_score(_expected_natural(q), stats)


def _log_expected(q: GammaPrior, features: jax.Array) -> jax.Array:
    """log E_q[rate^events exp(-rate exposure)] (K, N), from events and exposures (2 D, N)."""
    shape, rate = (jnp.asarray(value)[..., None] for value in (q.shape, q.rate))
    half = features.shape[0] // 2
    events, exposure = features[None, :half], features[None, half:]
    gammas = jax.lax.lgamma(shape + events) - jax.lax.lgamma(shape)
    return jnp.sum(gammas - shape * jnp.log1p(exposure / rate) - events * jnp.log(rate + exposure), axis=1)


# The same, of what follows from the conjugate prior.
_CONJUGATE = _conjugate_of, _posterior, _given, _plugged, _expected_log_prob, _expected_q


@capabilities.completed("part")
@record(kw_only=False)
class Poisson:
    """Independent counts: log p(x|k) = sum_d x_d log(e_d rate_kd) - e_d rate_kd - log x_d!, with e_d = 1 by default.

    prior: a GammaPrior on every rate; the M-step is then the posterior mode.

    Data are whole numbers (N, D) or (N,), or a pair (counts, exposure) with a positive exposure e of shape (N, D) or
    (N,). Missing counts, NaN, or -1 among whole numbers, are integrated out. Counts above 1e5 need float64; in float32
    a check warns of them.
    McLachlan & Peel, Finite Mixture Models, section 5.2.
    """

    prior: GammaPrior | None = dataclasses.field(default=None, kw_only=True)

    separable = shareable = ("rate",)
    supports: ClassVar[parameters.Supports] = {"rate": parameters.at_least_zero}

    def pooled(self, x: Data, weights: jax.Array | None, num_components: int) -> RateParams:
        return _pooled(self, x, columns.pair(x)[0], weights, num_components)

    def features(self, x: Data) -> jax.Array:
        counts, exposure = columns.pair(x)
        dtype = tree.float_dtype(x)
        values, observed = columns.read(counts, dtype)
        rate = values if exposure is None else values / exposure
        return columns.filled(jnp.where(observed, rate, jnp.nan), dtype)

    def log_prob(self, params: RateParams, x: Data) -> jax.Array:
        """Log-probability of every row under every component: (N, D) -> (K, N)."""
        return self.score(_natural(params), x)

    def score(self, natural: jax.Array, x: Data) -> jax.Array:
        """Log-probabilities (K, N) from the coefficients of events and exposures (K, 2 D)."""
        features, base = self._read(x, natural.dtype)
        return columns.score(natural, features) + base[None]

    def stats(self, params: RateParams, x: Data, responsibilities: jax.Array) -> RateStats:
        """Expected events and exposure: x (N, D), responsibilities (K, N)."""
        features, base = self._read(x, params.rate.dtype)
        return _stats(params, responsibilities, features, columns.sums(responsibilities, base[None])[:, 0])

    m_step, q_function, log_prior, num_parameters, unconstrain, constrain = _COMMON
    conjugate_of, posterior, given, plugged, expected_log_prob, expected_q = _CONJUGATE
    draw, pooled_posterior = conjugacy.common

    def kl(self, p: RateParams, q: RateParams) -> jax.Array:
        """KL(p ‖ q) of a row of exposure 1, under every component: (K,)."""
        logs = numerics.safe_log(jnp.where(p.rate > 0, p.rate, 1)) - numerics.safe_log(jnp.where(p.rate > 0, q.rate, 1))
        return jnp.sum(q.rate - p.rate + p.rate * logs, axis=1)

    def log_expected_prob(self, q: GammaPrior, x: Data) -> jax.Array:
        """log E_q[p(x)] (K, N): negative binomial."""
        features, base = self._read(x, jnp.result_type(q.rate))
        return _log_expected(q, features) + base[None]

    def degenerate(self, stats: RateStats) -> jax.Array:
        return columns.empty(stats.count)

    def sample(self, key: jax.Array, params: RateParams, labels: jax.Array) -> jax.Array:
        """Counts (N, D), of exposure 1, from the component that each label (N,) names."""
        return columns.poisson(key, params.rate[labels])

    def floats_per_row(self, params: RateParams) -> int:
        return 4 * params.rate.shape[1]

    shared_floats_per_row = floats_per_row

    def check(self, x: Data, name: str = "x") -> None:
        counts, exposure = columns.pair(x)
        columns.check(name, counts, lambda v: (v >= 0) & (v == np.floor(v)), "whole numbers, at least 0")
        columns.warn_of_large(name, counts)
        if exposure is not None:
            columns.check(f"{name}[1]", x[1], lambda v: (v > 0) & (v < np.inf), "exposures above 0", missing=False)
            rows = checks.columns(name, counts).shape
            if exposure.shape not in (rows, (rows[0], 1)):
                raise ValueError(f"{name}[1], the exposure, must have shape {rows} or ({rows[0]},); got {x[1].shape}")

    def _read(self, x: Data, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """Counts and exposures (2 D, N), and the terms that hold no parameter (N,)."""
        counts, exposure = columns.pair(x)
        values, observed = columns.read(counts, dtype)
        base = -jax.lax.lgamma(values + 1)
        if exposure is None:
            exposed = observed.astype(dtype)
        else:
            exposed = jnp.where(observed, exposure.astype(dtype), 0)
            base = base + values * jnp.log(jnp.where(observed, exposed, 1))
        return jnp.concatenate([values, exposed], axis=1).T, jnp.sum(base, axis=1)


@capabilities.completed("part")
@record(kw_only=False)
class Exponential:
    """Independent waiting times: log p(x|k) = sum_d log rate_kd - rate_kd x_d.

    prior: a GammaPrior on every rate; the M-step is then the posterior mode.

    Data are times (N, D) or (N,), at least 0. Missing entries, NaN, are integrated out.
    McLachlan & Peel, Finite Mixture Models, section 10.3.
    """

    prior: GammaPrior | None = dataclasses.field(default=None, kw_only=True)

    separable = shareable = ("rate",)
    supports: ClassVar[parameters.Supports] = {"rate": parameters.at_least_zero}

    def pooled(self, x: jax.Array, weights: jax.Array | None, num_components: int) -> RateParams:
        return _pooled(self, x, x, weights, num_components)

    def features(self, x: jax.Array) -> jax.Array:
        return columns.filled(x, tree.float_dtype(x))

    def log_prob(self, params: RateParams, x: jax.Array) -> jax.Array:
        """Log-density of every row under every component: (N, D) -> (K, N)."""
        return self.score(_natural(params), x)

    def score(self, natural: jax.Array, x: jax.Array) -> jax.Array:
        """Log-densities (K, N) from the coefficients of events and times (K, 2 D)."""
        return columns.score(natural, self._read(x, natural.dtype))

    def stats(self, params: RateParams, x: jax.Array, responsibilities: jax.Array) -> RateStats:
        """Expected numbers and sums of waiting times: x (N, D), responsibilities (K, N)."""
        features = self._read(x, params.rate.dtype)
        return _stats(params, responsibilities, features, jnp.zeros(responsibilities.shape[0], features.dtype))

    m_step, q_function, log_prior, num_parameters, unconstrain, constrain = _COMMON
    conjugate_of, posterior, given, plugged, expected_log_prob, expected_q = _CONJUGATE
    draw, pooled_posterior = conjugacy.common

    def kl(self, p: RateParams, q: RateParams) -> jax.Array:
        """KL(p ‖ q) of a row, under every component: (K,)."""
        ratio = q.rate / p.rate
        return jnp.sum(ratio - 1 - jnp.log(ratio), axis=1)

    def log_expected_prob(self, q: GammaPrior, x: jax.Array) -> jax.Array:
        """log E_q[p(x)] (K, N): Lomax, a Pareto distribution from 0."""
        return _log_expected(q, self._read(x, jnp.result_type(q.rate)))

    def degenerate(self, stats: RateStats) -> jax.Array:
        """Components (K,) without rows, or whose waiting times are all 0."""
        return columns.empty(stats.count) | jnp.any(~jnp.isfinite(self.m_step(stats).rate), axis=1)

    def sample(self, key: jax.Array, params: RateParams, labels: jax.Array) -> jax.Array:
        """Waiting times (N, D) from the component that each label (N,) names."""
        rate = params.rate[labels]
        return jax.random.exponential(key, rate.shape, rate.dtype) / rate

    def floats_per_row(self, params: RateParams) -> int:
        return 3 * params.rate.shape[1]

    shared_floats_per_row = floats_per_row

    def check(self, x: jax.Array, name: str = "x") -> None:
        columns.check(name, x, lambda v: (v >= 0) & (v < np.inf), "finite waiting times, at least 0")

    def _read(self, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Events, one for every time that is observed, and the times themselves: (2 D, N)."""
        values, observed = columns.read(x, dtype)
        return jnp.concatenate([observed.astype(dtype), values], axis=1).T


PoissonParams = ExponentialParams = RateParams
