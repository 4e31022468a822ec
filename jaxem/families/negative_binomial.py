"""Independent columns of negative binomial observations: counts that spread more than Poisson ones do."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from .. import capabilities, checks, numerics, parameters, special, tree
from ..record import record
from . import columns


@record
class NegativeBinomialParams:
    """The variance of a column is mean + mean² / concentration.

    mean: (K, D), m.
    concentration: (K, D), c.
    """

    mean: jax.Array
    concentration: jax.Array


@record
class NegativeBinomialStats:
    """Sums over rows with responsibilities r. The x events of an entry come in l clusters of one event or more.

    count: (K,), sum r.
    observed: (K, D), sum r over observed entries, as the two that follow.
    clusters: (K, D), sum r E[l | x].
    repeats: (K, D), sum r (x - E[l | x]), the events of a cluster beside its first.
    base: (K,), sum r h(x), where h makes Q equal to the log-probability at the current concentrations.
    """

    count: jax.Array
    observed: jax.Array
    clusters: jax.Array
    repeats: jax.Array
    base: jax.Array


@capabilities.completed("part")
@record(kw_only=False)
class NegativeBinomial:
    """Independent counts: log p(x|k) = sum_d log C(x_d + c - 1, x_d) + x_d log(m / (m + c)) + c log(c / (m + c)).

    m is the mean and c the concentration of (k, d): a Poisson distribution whose rate is gamma distributed.
    prior: pseudo-statistics, a NegativeBinomialStats as `pseudo_rows` makes it; `log_prior` is then Q at these.

    Data are whole numbers (N, D) or (N,). Missing entries, NaN, or -1 among whole numbers, are integrated out. A
    concentration stays below mean / sqrt(eps), where counts are as good as Poisson. Counts above 1e5 need float64; in
    float32 a check warns of them.

    The likelihood of c has no finite sufficient statistics. The data are therefore completed by the number l of
    clusters that the x events come in: l is Poisson(c log(1 + m/c)), the size of a cluster is logarithmic, and
    E[l | x] = c (digamma(x + c) - digamma(c)). EM in c may be slow where counts are near Poisson.
    Quenouille (1949), Biometrics 5; Zhou & Carin (2015), Negative binomial process count and mixture modeling.
    """

    prior: NegativeBinomialStats | None = dataclasses.field(default=None, kw_only=True)

    separable = ("concentration",)
    supports: ClassVar[parameters.Supports] = {
        "mean": parameters.at_least_zero,
        "concentration": parameters.at_least_zero,
    }

    def pooled(self, x: jax.Array, weights: jax.Array | None, num_components: int) -> NegativeBinomialParams:
        one = jnp.ones((1, checks.columns("x", x).shape[1]), tree.float_dtype(x))
        return columns.pooled(self, NegativeBinomialParams(mean=one, concentration=one), x, weights, num_components)

    def features(self, x: jax.Array) -> jax.Array:
        return columns.filled(x, tree.float_dtype(x))

    def log_prob(self, params: NegativeBinomialParams, x: jax.Array) -> jax.Array:
        """Log-probability of every row under every component: (N, D) -> (K, N)."""
        values, observed = self._read(x, params.mean.dtype)
        base, _ = _complete(params.concentration, values)
        features = jnp.concatenate([values, observed])
        return jnp.sum(base, axis=1) + columns.score(_natural(params), features)

    def stats(self, params: NegativeBinomialParams, x: jax.Array, responsibilities: jax.Array) -> NegativeBinomialStats:
        """Expected clusters and repeats at these concentrations: x (N, D), responsibilities (K, N)."""
        mean, concentration = params.mean, params.concentration
        values, observed = self._read(x, mean.dtype)
        base, repeats = _complete(concentration, values)
        terms = jnp.stack([values[None] - repeats, repeats, base + repeats * jnp.log(concentration)[..., None]])
        clusters, repeats, base = numerics.product(responsibilities, terms, "kn,tkdn->tkd")
        # A vanishing pseudo-observation, its moments those of the current parameters, keeps a component without rows.
        scale = columns.PSEUDO_COUNT * concentration
        return NegativeBinomialStats(
            count=jnp.sum(responsibilities, axis=1) + columns.PSEUDO_COUNT,
            observed=columns.sums(responsibilities, observed) + columns.PSEUDO_COUNT,
            clusters=clusters + scale * jnp.log1p(mean / concentration),
            repeats=repeats + scale * special.log1p_gap(mean / concentration),
            base=jnp.sum(base, axis=1),
        )

    def m_step(self, stats: NegativeBinomialStats) -> NegativeBinomialParams:
        """Means events / observed, and concentrations mean / u, u the root of u / log(1 + u) = events / clusters."""
        return self.m_step_given(stats)

    def m_step_given(
        self, stats: NegativeBinomialStats, *, concentration: jax.Array | None = None
    ) -> NegativeBinomialParams:
        """The M-step with the concentration held, at (K, D) or what broadcasts to it: that of the mean is the same."""
        stats = columns.with_prior(self.prior, stats)
        mean = (stats.clusters + stats.repeats) / stats.observed
        if concentration is None:
            concentration = _concentration(mean, numerics.safe_divide(stats.repeats, stats.clusters))
        return NegativeBinomialParams(mean=mean, concentration=jnp.broadcast_to(concentration, mean.shape))

    def q_function(self, params: NegativeBinomialParams, stats: NegativeBinomialStats) -> jax.Array:
        """sum events log(m / (m + c)) + clusters log c + observed c log(c / (m + c)) + base."""
        totals = jnp.concatenate([stats.clusters + stats.repeats, stats.observed], axis=1)
        repeats = jnp.sum(stats.repeats * jnp.log(params.concentration))
        return columns.expected_score(_natural(params), totals) - repeats + jnp.sum(stats.base)

    def log_prior(self, params: NegativeBinomialParams) -> jax.Array:
        return jnp.zeros((), params.mean.dtype) if self.prior is None else self.q_function(params, self.prior)

    def degenerate(self, stats: NegativeBinomialStats) -> jax.Array:
        return columns.empty(stats.count)

    def sample(self, key: jax.Array, params: NegativeBinomialParams, labels: jax.Array) -> jax.Array:
        """Counts (N, D) from the component that each label (N,) names."""
        key_rate, key_count = jax.random.split(key)
        concentration = params.concentration[labels]
        rate = jax.random.gamma(key_rate, concentration) * (params.mean[labels] / concentration)
        return columns.poisson(key_count, rate)

    def num_parameters(self, params: NegativeBinomialParams) -> int:
        return params.mean.size + params.concentration.size

    def floats_per_row(self, params: NegativeBinomialParams) -> int:
        return 2 * params.mean.shape[1] + 3 * params.mean.size

    def unconstrain(self, params: NegativeBinomialParams) -> NegativeBinomialParams:
        return NegativeBinomialParams(mean=jnp.log(params.mean), concentration=jnp.log(params.concentration))

    def constrain(self, theta: NegativeBinomialParams) -> NegativeBinomialParams:
        return NegativeBinomialParams(mean=jnp.exp(theta.mean), concentration=jnp.exp(theta.concentration))

    def check(self, x: jax.Array, name: str = "x") -> None:
        columns.check(name, x, lambda v: (v >= 0) & (v == np.floor(v)), "whole numbers, at least 0")
        columns.warn_of_large(name, x)

    def _read(self, x: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """Counts, 0 where missing, and which are observed: (D, N) each."""
        values, observed = columns.read(x, dtype)
        return values.T, observed.astype(dtype).T


def _natural(params: NegativeBinomialParams) -> jax.Array:
    """The coefficients of events and of observed entries in log p(x), (K, 2 D): log m - log(1 + m/c), -c log(1 + m/c).

    The first is log(m / (m + c)) + log c; the base has the factor c^-events.
    """
    gap = jnp.log1p(params.mean / params.concentration)
    return jnp.concatenate([numerics.safe_log(params.mean) - gap, -params.concentration * gap], axis=1)


def _complete(concentration: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log of c (c + 1) ... (c + x - 1) / (c^x x!), and the expected repeats x - E[l | x]: (K, D), (D, N) -> (K, D, N).

    Both differences are taken by Stirling's series, so that neither cancels for a large c.
    """
    c, values = concentration[..., None], values[None]
    ratio, total = values / c, values + c
    log_ratio, gap = jnp.log1p(ratio), c * special.log1p_gap(ratio)
    rest = special.stirling_error(total) - special.stirling_error(c)
    base = (values - 0.5) * log_ratio - gap + rest - jax.lax.lgamma(values + 1)
    slopes = 0.5 * values / total + c * (special.digamma_error(c) - special.digamma_error(total))
    return base, gap - slopes


def _concentration(mean: jax.Array, odds: jax.Array) -> jax.Array:
    """mean / u, where u / log(1 + u) - 1 = odds of a repeat: about u / 2 for small u, u / log u for large."""

    def of(u: jax.Array) -> jax.Array:
        return special.log1p_gap(u) / jnp.log1p(u)

    # Counts closer to Poisson are treated so. Counts that are all 0 do not determine a concentration: any will do.
    eps = float(jnp.finfo(mean.dtype).eps)
    odds = jnp.maximum(odds, 0.5 * eps**0.5)
    return jnp.maximum(mean / special.solve(of, odds, odds * (2 + jnp.log1p(odds))), eps)
