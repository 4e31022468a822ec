"""Gates: probabilities of components that depend on a row's features, by a softmax of linear predictors, or a table.

Data are pairs (features (N, P) or (N,), ...), as regressions take them, or `Gated(x, features)`. Letters: z = (1,
features); a line is (intercept, coefficients); eta_kn = line_k · z_n.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from .. import capabilities, checks, numerics, parameters, tree
from ..data import Gated
from ..priors import Dirichlet
from ..protocols import Data
from ..record import record, static
from .probabilities import Probabilities

# Vanishes beside any real count, and multiplies parameters without underflow.
_PSEUDO = 1e-18

# A gate counts as a step function where fewer rows than this are expected outside of its likeliest components.
_MISSED = 1e-3


@record
class GateParams:
    """log p(component k | features) = intercept_k + coefficients_k · features - log of the sum over components.

    coefficients: (K, P), those of the last component 0.
    intercept: (K,), likewise.
    """

    coefficients: jax.Array
    intercept: jax.Array

    @property
    def line(self) -> jax.Array:
        """(intercept, coefficients) about their mean over components, which no probability depends on: (K, P + 1)."""
        line = jnp.concatenate([self.intercept[..., None], self.coefficients], axis=-1)
        return line - jnp.mean(line, axis=-2, keepdims=True)


@record
class GateStats:
    """A quadratic lower bound of the expected log-probability of components about the current line, additive over rows.

    total: the weight of the rows.
    reference: (K, P + 1), total times the current line.
    gram: (P + 1, P + 1), sum zzᵀ.
    cross: (K, P + 1), sum (r - p) z, the score.
    base: the expected log-probability at the current line.
    missed: the expected number of rows that come from another component than the gate's likeliest.
    """

    total: jax.Array
    reference: jax.Array
    gram: jax.Array
    cross: jax.Array
    base: jax.Array
    missed: jax.Array


@capabilities.completed("part")
@record
class SoftmaxGate:
    """p(component k | features) = softmax_k(intercept_k + coefficients_k · features): a gate of a mixture.

    ridge: the precision of a normal prior on the coefficients' distances from their mean over components, or None.

    The M-step maximises a quadratic that lies below the expected log-probability and touches it at the current line:
    the curvature of a softmax is at most (I - 11ᵀ/K) / 2. So every step is monotone, and is one least-squares solution
    for all components. Without features (P = 0) the weights are constants, and their M-step is exact.
    Without a ridge the likelihood has no maximum where features separate the components of all rows: the gate would
    become a step function. It is then left as it is, and the fit ends as DEGENERATE.
    Böhning (1992), Multinomial logistic regression algorithm, Ann. Inst. Statist. Math. 44; Jordan & Jacobs (1994),
    Hierarchical mixtures of experts and the EM algorithm, Neural Computation 6.
    """

    ridge: jax.Array | float | None = None

    # One solution of a bound is not yet the maximum of Q.
    start_passes = 15

    def pooled(self, x: Data, weights: jax.Array | None, num_components: int) -> GateParams:
        """All components alike."""
        design = _design(x)
        zero = jnp.zeros((num_components, design.shape[0]), design.dtype)
        return _params(zero)

    def log_prob(self, params: GateParams, x: Data) -> jax.Array:
        """log p(component k | features): (K, N)."""
        return jax.nn.log_softmax(numerics.product(params.line, _design(x), "kp,pn->kn"), axis=0)

    def stats(self, params: GateParams, x: Data, responsibilities: jax.Array) -> GateStats:
        """The bound from responsibilities (K, N), which sum to the rows' weights."""
        design, line = _design(x), params.line
        log_p = self.log_prob(params, x)
        each = jnp.sum(responsibilities, axis=0)
        likeliest = jnp.argmax(log_p, axis=0)[None] == jnp.arange(len(log_p))[:, None]
        used = responsibilities > 0
        total = jnp.sum(each) + _PSEUDO
        return GateStats(
            total=total,
            reference=total * line,
            gram=numerics.product(each[None] * design, design, "in,jn->ij")
            + _PSEUDO * jnp.eye(len(design), dtype=design.dtype),
            cross=numerics.product(responsibilities - each[None] * jnp.exp(log_p), design, "kn,pn->kp"),
            base=jnp.sum(jnp.where(used, responsibilities * jnp.where(used, log_p, 0), 0)),
            missed=jnp.sum(jnp.where(likeliest, 0, responsibilities)),
        )

    def m_step(self, stats: GateStats) -> GateParams:
        """The maximum of the bound and the prior."""
        line = stats.reference / stats.total
        if line.shape[-1] == 1:
            return _params(numerics.safe_log(_shares(stats))[:, None])
        penalty = self._penalty(line)
        curvature = 0.5 * stats.gram + jnp.diag(penalty)
        delta = numerics.least_squares_together(curvature, stats.cross - penalty[None] * line)
        return _params(line + jnp.where(self._is_a_step(stats), 0, delta))

    def q_function(self, params: GateParams, stats: GateStats) -> jax.Array:
        """The bound, base + sum_k (cross_k · delta_k - delta_k · gram · delta_k / 4), delta = change of the line."""
        if stats.reference.shape[-1] == 1:
            return jnp.sum(_counts(stats) * jax.nn.log_softmax(params.intercept))
        delta = params.line - stats.reference / stats.total
        bent = numerics.product(delta, stats.gram, "kp,pq->kq")
        return stats.base + jnp.sum((stats.cross - 0.25 * bent) * delta)

    def log_prior(self, params: GateParams) -> jax.Array:
        """-ridge |coefficients|² / 2, about their mean over components, up to a constant; 0 without a ridge."""
        line = params.line
        return -0.5 * jnp.sum(self._penalty(line)[None] * jnp.square(line))

    def rebase(self, stats: GateStats, params: GateParams) -> GateStats:
        """The same bound about the line of `params`, exactly."""
        delta = params.line - stats.reference / stats.total
        bent = numerics.product(delta, stats.gram, "kp,pq->kq")
        return dataclasses.replace(
            stats,
            reference=stats.total * params.line,
            cross=stats.cross - 0.5 * bent,
            base=stats.base + jnp.sum((stats.cross - 0.25 * bent) * delta),
        )

    def degenerate(self, stats: GateStats) -> jax.Array:
        """(K,): whether the gate has become a step function, which separates the components of all rows."""
        return jnp.broadcast_to(self._is_a_step(stats), stats.cross.shape[:1])

    def _is_a_step(self, stats: GateStats) -> jax.Array:
        """Whether features separate the components of all rows, and no prior keeps the coefficients finite."""
        count, size = stats.cross.shape
        bound = size == 1 or count == 1 or self.ridge is not None
        return jnp.array(False) if bound else stats.missed < _MISSED

    def num_parameters(self, params: GateParams) -> int:
        """(K - 1) (P + 1)."""
        count, size = params.coefficients.shape
        return (count - 1) * (size + 1)

    def floats_per_row(self, params: GateParams) -> int:
        count, size = params.coefficients.shape
        return 4 * count + 2 * size

    def unconstrain(self, params: GateParams) -> GateParams:
        """Distances from the last component's: one component fewer."""
        return jax.tree.map(lambda leaf: leaf[:-1] - leaf[-1:], params)

    def constrain(self, theta: GateParams) -> GateParams:
        """Inverse of `unconstrain`."""
        return jax.tree.map(lambda leaf: jnp.concatenate([leaf, jnp.zeros_like(leaf[:1])]), theta)

    def check(self, x: Data) -> None:
        """Refuse eagerly what has no finite features."""
        features = _features(x)
        if features.size:
            checks.finite_matrix("x.features" if isinstance(x, Gated) else "x[0]", features)

    def _penalty(self, line: jax.Array) -> jax.Array:
        """The ridge of every coefficient, 0 for the intercept: (P + 1,)."""
        ridge = jnp.asarray(0.0 if self.ridge is None else self.ridge, line.dtype)
        return jnp.concatenate([jnp.zeros(1, line.dtype), jnp.broadcast_to(ridge, (line.shape[-1] - 1,))])


@record
class TwoLevelStats:
    """Statistics of all gates.

    outer: of the gate between groups.
    inner: of the gates inside the groups, with a leading axis (G,).
    """

    outer: GateStats
    inner: GateStats


@record
class TwoLevelParams:
    """Parameters of all gates.

    outer: of the gate between G groups.
    inner: of the gates inside the groups, (G, K / G, P) and (G, K / G).
    """

    outer: GateParams
    inner: GateParams


@capabilities.completed("part")
@record
class TwoLevelGate:
    """p(k | features) = p(group of k | features) p(k | its group, features): gates in a tree of two levels.

    num_groups: G; components are numbered group by group, K / G in each.
    gate: the form of all of these gates.
    Jordan & Jacobs (1994), Hierarchical mixtures of experts and the EM algorithm, Neural Computation 6, section 3.
    Raises ValueError, once K is known, where the groups do not divide it.
    """

    num_groups: int = static()
    gate: SoftmaxGate = SoftmaxGate()

    start_passes = SoftmaxGate.start_passes

    def pooled(self, x: Data, weights: jax.Array | None, num_components: int) -> TwoLevelParams:
        """All components alike."""
        size, rest = divmod(num_components, self.num_groups)
        if rest:
            raise ValueError(
                f"num_components must be a multiple of num_groups={self.num_groups}, as groups are of one size; "
                f"got {num_components}"
            )
        inner = self.gate.pooled(x, weights, size)
        return TwoLevelParams(
            outer=self.gate.pooled(x, weights, self.num_groups),
            inner=jax.tree.map(lambda leaf: jnp.repeat(leaf[None], self.num_groups, axis=0), inner),
        )

    def log_prob(self, params: TwoLevelParams, x: Data) -> jax.Array:
        """log p(component k | features): (K, N)."""
        inner = jax.vmap(self.gate.log_prob, in_axes=(0, None))(params.inner, x)
        return (self.gate.log_prob(params.outer, x)[:, None] + inner).reshape(-1, inner.shape[-1])

    def stats(self, params: TwoLevelParams, x: Data, responsibilities: jax.Array) -> TwoLevelStats:
        """The bounds of all gates; one inside of a group counts the rows that come from it."""
        grouped = responsibilities.reshape(self.num_groups, -1, responsibilities.shape[-1])
        return TwoLevelStats(
            outer=self.gate.stats(params.outer, x, jnp.sum(grouped, axis=1)),
            inner=jax.vmap(self.gate.stats, in_axes=(0, None, 0))(params.inner, x, grouped),
        )

    def m_step(self, stats: TwoLevelStats) -> TwoLevelParams:
        return TwoLevelParams(outer=self.gate.m_step(stats.outer), inner=jax.vmap(self.gate.m_step)(stats.inner))

    def q_function(self, params: TwoLevelParams, stats: TwoLevelStats) -> jax.Array:
        inner = jax.vmap(self.gate.q_function)(params.inner, stats.inner)
        return self.gate.q_function(params.outer, stats.outer) + jnp.sum(inner)

    def log_prior(self, params: TwoLevelParams) -> jax.Array:
        return self.gate.log_prior(params.outer) + jnp.sum(jax.vmap(self.gate.log_prior)(params.inner))

    def rebase(self, stats: TwoLevelStats, params: TwoLevelParams) -> TwoLevelStats:
        return TwoLevelStats(
            outer=self.gate.rebase(stats.outer, params.outer),
            inner=jax.vmap(self.gate.rebase)(stats.inner, params.inner),
        )

    def degenerate(self, stats: TwoLevelStats) -> jax.Array:
        """(K,): whether the gate above a component, or that between the groups, has become a step."""
        inner = jax.vmap(self.gate.degenerate)(stats.inner)
        return (self.gate.degenerate(stats.outer)[:, None] | inner).reshape(-1)

    def num_parameters(self, params: TwoLevelParams) -> int:
        count, size = params.inner.coefficients.shape[1:]
        return self.gate.num_parameters(params.outer) + self.num_groups * (count - 1) * (size + 1)

    def floats_per_row(self, params: TwoLevelParams) -> int:
        return 2 * self.num_groups * (4 * params.inner.coefficients.shape[1] + 2)

    def unconstrain(self, params: TwoLevelParams) -> TwoLevelParams:
        return TwoLevelParams(
            outer=self.gate.unconstrain(params.outer), inner=jax.vmap(self.gate.unconstrain)(params.inner)
        )

    def constrain(self, theta: TwoLevelParams) -> TwoLevelParams:
        return TwoLevelParams(outer=self.gate.constrain(theta.outer), inner=jax.vmap(self.gate.constrain)(theta.inner))

    def check(self, x: Data) -> None:
        self.gate.check(x)


@capabilities.completed("part")
@record(kw_only=False)
class TableGate:
    """p(component k | group of the row): mixing weights for every group, a table (G, K).

    num_groups: G; the feature that the gate looks at is the group's number, 0..G-1: `Gated(x, groups)`.
    prior: a Dirichlet on the weights of every group.
    """

    num_groups: int = static()
    prior: Dirichlet | None = dataclasses.field(default=None, kw_only=True)

    supports = staticmethod(parameters.simplex)

    @property
    def _table(self) -> Probabilities:
        return Probabilities(prior=self.prior)

    def pooled(self, x: Data, weights: jax.Array | None, num_components: int) -> jax.Array:
        """All components alike in every group."""
        return jnp.full((self.num_groups, num_components), 1 / num_components, jnp.result_type(float))

    def log_prob(self, p: jax.Array, x: Data) -> jax.Array:
        """log p(component k | group): (K, N)."""
        return numerics.safe_log(p)[_groups(x)].T

    def stats(self, p: jax.Array, x: Data, responsibilities: jax.Array) -> jax.Array:
        """Expected rows of every group and component: responsibilities (K, N) -> (G, K)."""
        return jax.ops.segment_sum(responsibilities.T, _groups(x), self.num_groups)

    def m_step(self, counts: jax.Array) -> jax.Array:
        """Shares of the counts in every group; a group without rows has all components alike."""
        counts = self._table.with_prior(counts)
        total = jnp.sum(counts, axis=1, keepdims=True)
        return jnp.where(total > 0, numerics.safe_divide(counts, total), 1 / counts.shape[1])

    def q_function(self, p: jax.Array, counts: jax.Array) -> jax.Array:
        """sum counts log p."""
        return self._table.q_function(p, counts)

    def log_prior(self, p: jax.Array) -> jax.Array:
        return self._table.log_prior(p)

    def degenerate(self, counts: jax.Array) -> jax.Array:
        """Nothing (0,) here collapses."""
        return self._table.degenerate(counts)

    def num_parameters(self, p: jax.Array) -> int:
        """G (K - 1)."""
        return self._table.num_parameters(p)

    def floats_per_row(self, p: jax.Array) -> int:
        return 2 * p.shape[1]

    def unconstrain(self, p: jax.Array) -> jax.Array:
        return self._table.unconstrain(p)

    def constrain(self, theta: jax.Array) -> jax.Array:
        return self._table.constrain(theta)

    def check(self, x: Data) -> None:
        """Refuse eagerly data without a group number in every row."""
        if not isinstance(x, Gated):
            raise TypeError(f"x must be Gated(x, groups), for a gate by groups to look at; got {type(x).__name__}")
        checks.labels("x.features", x.features, tree.num_rows(x), self.num_groups, unknown=False)


def _groups(x: Gated) -> jax.Array:
    return jnp.asarray(x.features).reshape(-1)


def _features(x: Data) -> Any:
    if isinstance(x, Gated):
        # No features at all are allowed: weights are then constants.
        none = jnp.ndim(x.features) == 2 and jnp.shape(x.features)[1] == 0
        return jnp.asarray(x.features) if none else checks.columns("x.features", x.features)
    if isinstance(x, (tuple, list)) and len(x) > 1:
        return checks.columns("x[0]", x[0])
    raise TypeError(
        f"x must be a pair (features, response), or Gated(x, features), for a gate to look at; got {type(x).__name__}"
    )


def _design(x: Data) -> jax.Array:
    """z of every row: (P + 1, N)."""
    rows = _features(x).T.astype(tree.float_dtype(x))
    return jnp.concatenate([jnp.ones((1, rows.shape[1]), rows.dtype), rows])


def _params(line: jax.Array) -> GateParams:
    """Parameters from lines (K, P + 1), which may all be shifted by one line."""
    line = line - line[-1:]
    return GateParams(coefficients=line[:, 1:], intercept=line[:, 0])


def _counts(stats: GateStats) -> jax.Array:
    """Expected rows of every component (K,), without features."""
    current = stats.reference[:, 0] / stats.total
    return jnp.maximum(stats.cross[:, 0] + stats.total * jax.nn.softmax(current), 0)


def _shares(stats: GateStats) -> jax.Array:
    counts = _counts(stats)
    return counts / jnp.sum(counts)
