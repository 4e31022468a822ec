"""More zeros than a family of counts explains: some rows are zero whatever the family says."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from .. import capabilities, checks, numerics, parameters
from ..priors import Beta
from ..protocols import Data, Family, Params, Stats
from ..record import record
from . import columns


@record
class ZeroInflatedParams:
    """Parameters of K zero-inflated components.

    inflation: (K,), share of structural zeros.
    components: the family's parameters, for all other rows.
    """

    inflation: jax.Array
    components: Params


@record
class ZeroInflatedStats:
    """Expected statistics, additive over rows.

    count: (K,), sum r.
    zeros: (K,), expected number of structural zeros.
    components: the family's statistics of all other rows.
    base: (K,), sum r times the entropy of whether a row is structurally zero, given x.
    """

    count: jax.Array
    zeros: jax.Array
    components: Stats
    base: jax.Array


@capabilities.completed("part")
@record(kw_only=False)
class ZeroInflated:
    """p(x|k) = inflation_k [x = 0] + (1 - inflation_k) f(x|k), for a family f of counts.

    A row of several columns is structurally zero as a whole; for columns that are so by themselves put
    each into a `Product`. Missing values as f takes them; a row with none observed tells nothing.
    prior: a Beta on the inflation; the family has its own.
    Lambert (1992), Zero-inflated Poisson regression, Technometrics 34.
    """

    family: Family
    prior: Beta | None = dataclasses.field(default=None, kw_only=True)

    separable = shareable = ("inflation",)

    @property
    def _others(self) -> Any:
        return capabilities.complete("part", self.family)

    @property
    def supports(self) -> parameters.Supports:
        return {"inflation": parameters.between_zero_and_one, "components": self._others.supports}

    def pooled(self, x: Data, weights: jax.Array | None, num_components: int) -> ZeroInflatedParams:
        components = self._others.pooled(x, weights, num_components)
        half = jnp.full(num_components, 0.5, jax.tree.leaves(components)[0].dtype)
        # Half of the zeros at a start: both kinds must be possible for EM to tell them apart.
        zero = jnp.mean(self._zero(x).astype(half.dtype))
        return ZeroInflatedParams(inflation=half * jnp.clip(zero, 0.05, 0.95), components=components)

    def features(self, x: Data) -> jax.Array:
        return self.family.features(x)

    def log_prob(self, params: ZeroInflatedParams, x: Data) -> jax.Array:
        """Log-probability of every row under every component: (K, N)."""
        return numerics.normalize(self._joint(params, x))[1]

    def stats(self, params: ZeroInflatedParams, x: Data, responsibilities: jax.Array) -> ZeroInflatedStats:
        """Expected statistics, structural zeros and others apart: responsibilities (K, N)."""
        share = numerics.normalize(self._joint(params, x))[0][0]
        entropy = _entropy(share) + _entropy(1 - share)
        return ZeroInflatedStats(
            count=jnp.sum(responsibilities, axis=1) + columns.PSEUDO_COUNT,
            zeros=jnp.sum(responsibilities * share, axis=1) + columns.PSEUDO_COUNT * params.inflation,
            components=self.family.stats(params.components, x, responsibilities * (1 - share)),
            base=jnp.sum(responsibilities * entropy, axis=1),
        )

    def m_step(self, stats: ZeroInflatedStats) -> ZeroInflatedParams:
        """inflation = structural zeros / rows, or the posterior mode; the family's own M-step for the others."""
        zeros, others = stats.zeros, jnp.maximum(stats.count - stats.zeros, 0)
        if self.prior is not None:
            more, less = self.prior.pseudo_counts(zeros)
            zeros, others = jnp.maximum(zeros + more, 0), jnp.maximum(others + less, 0)
        return ZeroInflatedParams(
            inflation=numerics.safe_divide(zeros, zeros + others), components=self.family.m_step(stats.components)
        )

    def share(self, stats: ZeroInflatedStats, name: str, params: ZeroInflatedParams) -> jax.Array:
        """The share of structural zeros in all components together."""
        return jnp.clip(jnp.sum(stats.zeros) / jnp.sum(stats.count), 0, 1)

    def q_function(self, params: ZeroInflatedParams, stats: ZeroInflatedStats) -> jax.Array:
        """zeros log(inflation) + others log(1 - inflation) + the family's Q + base."""
        logs = jnp.stack([numerics.safe_log(params.inflation), numerics.safe_log(1 - params.inflation)])
        others = jnp.maximum(stats.count - stats.zeros, 0)
        split = columns.expected_score(logs, jnp.stack([stats.zeros, others]))
        return split + self.family.q_function(params.components, stats.components) + jnp.sum(stats.base)

    def log_prior(self, params: ZeroInflatedParams) -> jax.Array:
        components = self.family.log_prior(params.components)
        return components if self.prior is None else components + self.prior.log_prob(params.inflation)

    def degenerate(self, stats: ZeroInflatedStats) -> jax.Array:
        """Components (K,) without rows; the family's own test is left out, as all rows may be structural zeros."""
        return columns.empty(stats.count)

    def rebase(self, stats: ZeroInflatedStats, params: ZeroInflatedParams) -> ZeroInflatedStats:
        """The same statistics about the reference of `params`, where the family has one."""
        return dataclasses.replace(stats, components=self._others.rebase(stats.components, params.components))

    def sample(self, key: jax.Array, params: ZeroInflatedParams, labels: jax.Array) -> jax.Array:
        """One row (N, D) from the component that each label (N,) names."""
        key_zero, key_rows = jax.random.split(key)
        rows = self.family.sample(key_rows, params.components, labels)
        zero = jax.random.bernoulli(key_zero, params.inflation[labels])
        return jnp.where(zero[:, None], 0, rows)

    def num_parameters(self, params: ZeroInflatedParams) -> int:
        return params.inflation.size + self.family.num_parameters(params.components)

    def floats_per_row(self, params: ZeroInflatedParams) -> int:
        return 4 * params.inflation.size + self.family.floats_per_row(params.components)

    def unconstrain(self, params: ZeroInflatedParams) -> ZeroInflatedParams:
        return ZeroInflatedParams(
            inflation=jax.scipy.special.logit(params.inflation), components=self.family.unconstrain(params.components)
        )

    def constrain(self, theta: ZeroInflatedParams) -> ZeroInflatedParams:
        return ZeroInflatedParams(
            inflation=jax.nn.sigmoid(theta.inflation), components=self.family.constrain(theta.components)
        )

    def check(self, x: Data, name: str = "x") -> None:
        self.family.check(x, name)

    def _zero(self, x: Data) -> jax.Array:
        """Rows (N,) whose observed entries are all 0."""
        rows = checks.columns("x", columns.pair(x)[0])
        values, _ = columns.read(rows, jnp.result_type(float) if rows.dtype.kind != "f" else rows.dtype)
        return jnp.all(values == 0, axis=1)

    def _joint(self, params: ZeroInflatedParams, x: Data) -> jax.Array:
        """log p(structural, x) and log p(not structural, x): (2, K, N)."""
        others = numerics.safe_log(1 - params.inflation)[:, None] + self.family.log_prob(params.components, x)
        structural = jnp.where(self._zero(x), numerics.safe_log(params.inflation)[:, None], -jnp.inf)
        return jnp.stack([structural.astype(others.dtype), others])


def _entropy(share: jax.Array) -> jax.Array:
    """-share log(share), 0 at 0. Its slope there, which is infinite, is taken for 0: a share of 0 stays 0."""
    return -share * jnp.log(jnp.where(share > 0, share, 1))
