"""Categorical columns, each entry one of several values, and multinomial rows, which count such values."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from .. import capabilities, checks, numerics, parameters, tree
from ..parts import Probabilities, conjugacy
from ..priors import Dirichlet
from ..record import record, static
from . import columns


@record
class CategoricalParams:
    """probability: (K, D, V), of each value in each column; 0 for values that a column does not have."""

    probability: jax.Array


@record
class CategoricalStats:
    """Sums over rows with responsibilities r.

    count: (K,), sum r.
    values: (K, D, V), the expected number of times that each value was observed.
    """

    count: jax.Array
    values: jax.Array


@capabilities.completed("part")
@record(kw_only=False)
class Categorical:
    """Independent categorical columns: log p(x|k) = sum_d log p_k,d,x_d. With a mixture: latent class analysis.

    num_values: how many values every column has, or a tuple of one number a column.
    prior: a Dirichlet on every column's probabilities, with a scalar concentration; the M-step is then the posterior
        mode.

    Data are whole numbers 0..num_values-1, (N, D) or (N,). Missing entries, -1, or NaN in a float array, are
    integrated out.
    Raises TypeError or ValueError for a num_values that is not at least 1.
    Goodman (1974), Exploratory latent structure analysis, Biometrika 61.
    """

    num_values: int | tuple[int, ...] = static()
    prior: Dirichlet | None = dataclasses.field(default=None, kw_only=True)

    separable = shareable = ("probability",)
    supports: ClassVar[parameters.Supports] = {"probability": parameters.simplex}

    def __post_init__(self) -> None:
        if isinstance(self.num_values, Sequence):
            object.__setattr__(self, "num_values", tuple(int(value) for value in self.num_values))
        for value in self.num_values if isinstance(self.num_values, tuple) else (self.num_values,):
            checks.positive_integer("num_values", value)

    def pooled(self, x: jax.Array, weights: jax.Array | None, num_components: int) -> CategoricalParams:
        has = self._has(checks.columns("x", x).shape[1])
        flat = jnp.asarray(has / has.sum(axis=1, keepdims=True), tree.float_dtype(x))
        return columns.pooled(self, CategoricalParams(probability=flat[None]), x, weights, num_components)

    def features(self, x: jax.Array) -> jax.Array:
        return self._indicators(x, tree.float_dtype(x)).T

    def log_prob(self, params: CategoricalParams, x: jax.Array) -> jax.Array:
        """Log-probability of every row under every component: (N, D) -> (K, N)."""
        logs = numerics.safe_log(params.probability)
        return columns.score(logs.reshape(logs.shape[0], -1), self._indicators(x, logs.dtype))

    def stats(self, params: CategoricalParams, x: jax.Array, responsibilities: jax.Array) -> CategoricalStats:
        """Expected numbers of every value: x (N, D), responsibilities (K, N)."""
        totals = columns.sums(responsibilities, self._indicators(x, responsibilities.dtype))
        return CategoricalStats(
            count=jnp.sum(responsibilities, axis=1) + columns.PSEUDO_COUNT,
            values=totals.reshape(params.probability.shape) + columns.PSEUDO_COUNT * params.probability,
        )

    def m_step(self, stats: CategoricalStats) -> CategoricalParams:
        """Shares of the values; with a prior, the posterior mode."""
        return CategoricalParams(probability=self._table(stats.values.shape[1]).m_step(stats.values))

    def q_function(self, params: CategoricalParams, stats: CategoricalStats) -> jax.Array:
        """sum values log p."""
        return self._table(stats.values.shape[1]).q_function(params.probability, stats.values)

    def log_prior(self, params: CategoricalParams) -> jax.Array:
        return self._table(params.probability.shape[1]).log_prior(params.probability)

    # What follows from the conjugate prior; see `protocols.Conjugate`.

    def conjugate_of(self) -> Dirichlet:
        """The prior; without one, that whose density is flat."""
        return Probabilities(prior=self.prior).conjugate_of()

    def posterior(self, stats: CategoricalStats) -> Dirichlet:
        """Concentrations (K, D, V), 0 for values that a column does not have."""
        return self._table(stats.values.shape[1]).posterior(stats.values)

    draw, pooled_posterior = conjugacy.common

    def given(self, probability: jax.Array) -> CategoricalParams:
        """Parameters from probabilities."""
        return CategoricalParams(probability=probability)

    def plugged(self, q: Dirichlet) -> CategoricalParams:
        """The mean."""
        return self.given(q.expected())

    def kl(self, p: CategoricalParams, q: CategoricalParams) -> jax.Array:
        """KL(p ‖ q) of a row, under every component: (K,)."""
        return jnp.sum(numerics.divergence(p.probability, q.probability), axis=1)

    def expected_log_prob(self, q: Dirichlet, x: jax.Array) -> jax.Array:
        """E_q[log p(x)]: (K, N)."""
        return self.log_prob(self.given(jnp.exp(q.expected_log())), x)

    def expected_q(self, q: Dirichlet, stats: CategoricalStats) -> jax.Array:
        """sum values E[log p]."""
        return Probabilities().expected_q(q, stats.values)

    def log_expected_prob(self, q: Dirichlet, x: jax.Array) -> jax.Array:
        """log E_q[p(x)] (K, N): the log-probability at the mean."""
        return self.log_prob(self.plugged(q), x)

    def degenerate(self, stats: CategoricalStats) -> jax.Array:
        return columns.empty(stats.count)

    def sample(self, key: jax.Array, params: CategoricalParams, labels: jax.Array) -> jax.Array:
        """One row (N, D) of whole numbers from the component that each label (N,) names."""
        return jax.random.categorical(key, numerics.safe_log(params.probability)[labels], axis=-1)

    def num_parameters(self, params: CategoricalParams) -> int:
        return self._table(params.probability.shape[1]).num_parameters(params.probability)

    def floats_per_row(self, params: CategoricalParams) -> int:
        return params.probability.size // params.probability.shape[0]

    shared_floats_per_row = floats_per_row

    def unconstrain(self, params: CategoricalParams) -> CategoricalParams:
        """Log continuation ratios of the values, (K, D, V - 1)."""
        return CategoricalParams(probability=self._table(params.probability.shape[1]).unconstrain(params.probability))

    def constrain(self, theta: CategoricalParams) -> CategoricalParams:
        """Inverse of `unconstrain`."""
        return CategoricalParams(probability=self._table(theta.probability.shape[-2]).constrain(theta.probability))

    def check(self, x: jax.Array, name: str = "x") -> None:
        most = self._has(checks.row_shape(name, x)[1]).sum(axis=1)
        expected = f"whole numbers from 0 to {most[0] - 1}" if len(set(most)) == 1 else f"whole numbers below {most}"
        columns.check(name, x, lambda v: (v >= 0) & (v < most) & (v == np.floor(v)), f"{expected} (num_values - 1)")

    def _table(self, num_columns: int) -> Probabilities:
        """The probabilities (K, D, V) of the values that each column has."""
        return Probabilities(prior=self.prior, support=self._has(num_columns))

    def _has(self, num_columns: int) -> np.ndarray:
        """Which values each column has: (D, V)."""
        given = self.num_values
        most = np.array(given if isinstance(given, tuple) else (given,) * num_columns)
        if len(most) != num_columns:
            raise ValueError(
                f"num_values must be one number, or one a column; got {len(most)} for {num_columns} columns of x"
            )
        return np.arange(most.max()) < most[:, None]

    def _indicators(self, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """1 where a column has a value: (D V, N); a missing entry has none."""
        rows = checks.columns("x", x)
        values = np.arange(self._has(rows.shape[1]).shape[1])
        return (rows.T[:, None, :] == values[None, :, None]).astype(dtype).reshape(-1, rows.shape[0])


@record
class MultinomialParams:
    """probability: (K, V), of each value."""

    probability: jax.Array


@record
class MultinomialStats:
    """Sums over rows with responsibilities r.

    count: (K,), sum r.
    values: (K, V), sum r x, the expected number of times that each value was counted.
    base: (K,), sum r log(t! / prod_v x_v!), t the trials of a row.
    """

    count: jax.Array
    values: jax.Array
    base: jax.Array


@capabilities.completed("part")
@record(kw_only=False)
class Multinomial:
    """Rows of counts: log p(x|k) = log t! - sum_v log x_v! + sum_v x_v log p_kv, t = sum_v x_v.

    trials: t of every row, which sampling needs; None where it varies by row, as the lengths of documents do.
    prior: a Dirichlet on the probabilities; the M-step is then the posterior mode.

    Data are whole numbers (N, V). Missing entries are not taken. Counts above 1e5 need float64; in float32 a check
    warns of them.
    Raises ValueError for rows that do not sum to `trials` where it is given.
    Nigam et al. (2000), Text classification from labeled and unlabeled documents using EM, Machine Learning 39.
    """

    trials: int | None = static(default=None)
    prior: Dirichlet | None = dataclasses.field(default=None, kw_only=True)

    separable = shareable = ("probability",)
    supports: ClassVar[parameters.Supports] = {"probability": parameters.simplex}

    def __post_init__(self) -> None:
        if self.trials is not None:
            checks.positive_integer("trials", self.trials)

    def pooled(self, x: jax.Array, weights: jax.Array | None, num_components: int) -> MultinomialParams:
        values = checks.columns("x", x).shape[1]
        flat = jnp.full((1, values), 1 / values, tree.float_dtype(x))
        return columns.pooled(self, MultinomialParams(probability=flat), x, weights, num_components)

    def features(self, x: jax.Array) -> jax.Array:
        values = checks.matrix("x", x)
        return numerics.safe_divide(values, jnp.sum(values, axis=1, keepdims=True))

    def log_prob(self, params: MultinomialParams, x: jax.Array) -> jax.Array:
        """Log-probability of every row under every component: (N, V) -> (K, N)."""
        values, base = self._read(x, params.probability.dtype)
        return columns.score(numerics.safe_log(params.probability), values) + base[None]

    def stats(self, params: MultinomialParams, x: jax.Array, responsibilities: jax.Array) -> MultinomialStats:
        """Expected numbers of every value: x (N, V), responsibilities (K, N)."""
        values, base = self._read(x, params.probability.dtype)
        return MultinomialStats(
            count=jnp.sum(responsibilities, axis=1) + columns.PSEUDO_COUNT,
            values=columns.sums(responsibilities, values) + columns.PSEUDO_COUNT * params.probability,
            base=columns.sums(responsibilities, base[None])[:, 0],
        )

    def m_step(self, stats: MultinomialStats) -> MultinomialParams:
        """Shares of the values; with a prior, the posterior mode."""
        return MultinomialParams(probability=Probabilities(prior=self.prior).m_step(stats.values))

    def q_function(self, params: MultinomialParams, stats: MultinomialStats) -> jax.Array:
        """sum values log p + base."""
        return Probabilities().q_function(params.probability, stats.values) + jnp.sum(stats.base)

    def log_prior(self, params: MultinomialParams) -> jax.Array:
        return Probabilities(prior=self.prior).log_prior(params.probability)

    # What follows from the conjugate prior; see `protocols.Conjugate`.

    def conjugate_of(self) -> Dirichlet:
        """The prior; without one, that whose density is flat."""
        return Probabilities(prior=self.prior).conjugate_of()

    def posterior(self, stats: MultinomialStats) -> Dirichlet:
        """Concentrations (K, V)."""
        return self.conjugate_of().posterior(stats.values)

    draw, pooled_posterior = conjugacy.common

    def given(self, probability: jax.Array) -> MultinomialParams:
        """Parameters from probabilities."""
        return MultinomialParams(probability=probability)

    def plugged(self, q: Dirichlet) -> MultinomialParams:
        """The mean."""
        return self.given(q.expected())

    def kl(self, p: MultinomialParams, q: MultinomialParams) -> jax.Array:
        """KL(p ‖ q) of a row, under every component: (K,); of one trial where `trials` is not given."""
        return (self.trials or 1) * numerics.divergence(p.probability, q.probability)

    def expected_log_prob(self, q: Dirichlet, x: jax.Array) -> jax.Array:
        """E_q[log p(x)]: (K, N)."""
        return self.log_prob(self.given(jnp.exp(q.expected_log())), x)

    def expected_q(self, q: Dirichlet, stats: MultinomialStats) -> jax.Array:
        """sum values E[log p] + base."""
        return Probabilities().expected_q(q, stats.values) + jnp.sum(stats.base)

    def log_expected_prob(self, q: Dirichlet, x: jax.Array) -> jax.Array:
        """log E_q[p(x)] (K, N): Dirichlet-multinomial."""
        values, base = self._read(x, jnp.result_type(q.concentration))
        each = jnp.asarray(q.concentration)[..., None]
        total, trials = jnp.sum(each, axis=1), jnp.sum(values, axis=0)[None]
        seen = jnp.sum(jax.lax.lgamma(each + values[None]) - jax.lax.lgamma(each), axis=1)
        return seen + jax.lax.lgamma(total) - jax.lax.lgamma(total + trials) + base[None]

    def degenerate(self, stats: MultinomialStats) -> jax.Array:
        return columns.empty(stats.count)

    def sample(self, key: jax.Array, params: MultinomialParams, labels: jax.Array) -> jax.Array:
        """Counts (N, V) from the component that each label (N,) names; needs `trials`."""
        if self.trials is None:
            raise ValueError("trials must be given to sample: Multinomial(trials=...)")
        probability = params.probability[labels]
        return jax.random.multinomial(key, jnp.asarray(self.trials, probability.dtype), probability)

    def num_parameters(self, params: MultinomialParams) -> int:
        return Probabilities().num_parameters(params.probability)

    def floats_per_row(self, params: MultinomialParams) -> int:
        return 2 * params.probability.shape[1]

    shared_floats_per_row = floats_per_row

    def unconstrain(self, params: MultinomialParams) -> MultinomialParams:
        return MultinomialParams(probability=Probabilities().unconstrain(params.probability))

    def constrain(self, theta: MultinomialParams) -> MultinomialParams:
        return MultinomialParams(probability=Probabilities().constrain(theta.probability))

    def check(self, x: jax.Array, name: str = "x") -> None:
        columns.check(name, x, lambda v: (v >= 0) & (v == np.floor(v)), "whole numbers, at least 0", missing=False)
        columns.warn_of_large(name, x)
        if self.trials is not None and checks.is_concrete(x):
            totals = np.asarray(x, float).reshape(checks.row_shape(name, x)).sum(axis=1)
            if np.any(totals != self.trials):
                row = np.argmax(totals != self.trials)
                raise ValueError(
                    f"{name} must have rows that sum to trials={self.trials}; row {row} sums to {totals[row]:g}"
                )

    def _read(self, x: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """Counts (V, N), and log t! - sum_v log x_v! (N,)."""
        values = checks.columns("x", x).T.astype(dtype)
        ways = jax.lax.lgamma(jnp.sum(values, axis=0) + 1) - jnp.sum(jax.lax.lgamma(values + 1), axis=0)
        return values, ways
