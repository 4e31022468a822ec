"""Independent columns of Bernoulli observations (yes or no), or of binomial ones (successes among trials)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from .. import capabilities, checks, numerics, parameters, special, tree
from ..parts import conjugacy
from ..priors import Beta
from ..protocols import Data
from ..record import record
from . import columns


@record
class BernoulliParams:
    """probability: (K, D), of a 1, or of a success, in each column."""

    probability: jax.Array


@record
class BernoulliStats:
    """Sums over rows with responsibilities r; of entries, only the observed ones count.

    count: (K,), sum r.
    successes: (K, D), sum r x.
    failures: (K, D), sum r (trials - x), where a Bernoulli observation is one trial.
    base: (K,), sum r h(x), where h is the part of the log-probability that holds no parameter.
    """

    count: jax.Array
    successes: jax.Array
    failures: jax.Array
    base: jax.Array


def _pooled(
    family: "Bernoulli | Binomial", x: Data, num_columns: int, weights: jax.Array | None, num_components: int
) -> BernoulliParams:
    """The M-step from all rows in one component, K times over."""
    neutral = BernoulliParams(probability=jnp.full((1, num_columns), 0.5, tree.float_dtype(x)))
    return columns.pooled(family, neutral, x, weights, num_components)


def _stats(
    params: BernoulliParams, responsibilities: jax.Array, outcomes: jax.Array, base: jax.Array
) -> BernoulliStats:
    """Statistics from successes and failures (2 D, N); a vanishing pseudo-count keeps a component without rows."""
    totals = columns.sums(responsibilities, outcomes)
    half = totals.shape[1] // 2
    return BernoulliStats(
        count=jnp.sum(responsibilities, axis=1) + columns.PSEUDO_COUNT,
        successes=totals[:, :half] + columns.PSEUDO_COUNT * params.probability,
        failures=totals[:, half:] + columns.PSEUDO_COUNT * (1 - params.probability),
        base=base,
    )


def _natural(params: BernoulliParams) -> jax.Array:
    """The coefficients of successes and failures in log p(x): log p and log(1 - p), (K, 2 D)."""
    p = params.probability
    return jnp.concatenate([numerics.safe_log(p), numerics.safe_log(1 - p)], axis=1)


def _divergence(p: BernoulliParams, q: BernoulliParams) -> jax.Array:
    """KL(p ‖ q) of one trial in every column: (K, D)."""
    pairs = (jnp.stack([each.probability, 1 - each.probability], axis=-1) for each in (p, q))
    return numerics.divergence(*pairs)


def _m_step(family: "Bernoulli | Binomial", stats: BernoulliStats) -> BernoulliParams:
    """Successes / (successes + failures); with a prior, the posterior mode."""
    outcomes = stats.successes, stats.failures
    if family.prior is not None:
        return BernoulliParams(probability=family.prior.posterior_mode(outcomes))
    return BernoulliParams(probability=numerics.safe_divide(outcomes[0], outcomes[0] + outcomes[1]))


def _q_function(family: "Bernoulli | Binomial", params: BernoulliParams, stats: BernoulliStats) -> jax.Array:
    """sum successes log p + failures log(1 - p) + base."""
    return _total_score(_natural(params), stats)


def _total_score(natural: jax.Array, stats: BernoulliStats) -> jax.Array:
    totals = jnp.concatenate([stats.successes, stats.failures], axis=1)
    return columns.expected_score(natural, totals) + jnp.sum(stats.base)


def _log_prior(family: "Bernoulli | Binomial", params: BernoulliParams) -> jax.Array:
    probability = params.probability
    return jnp.zeros((), probability.dtype) if family.prior is None else family.prior.log_prob(probability)


def _degenerate(family: "Bernoulli | Binomial", stats: BernoulliStats) -> jax.Array:
    return columns.empty(stats.count)


def _num_parameters(family: "Bernoulli | Binomial", params: BernoulliParams) -> int:
    return params.probability.size


def _unconstrain(family: "Bernoulli | Binomial", params: BernoulliParams) -> BernoulliParams:
    return BernoulliParams(probability=jax.scipy.special.logit(params.probability))


def _constrain(family: "Bernoulli | Binomial", theta: BernoulliParams) -> BernoulliParams:
    return BernoulliParams(probability=jax.nn.sigmoid(theta.probability))


# The methods that both families have, in the order in which they take them.
_COMMON = _m_step, _q_function, _log_prior, _degenerate, _num_parameters, _unconstrain, _constrain


def _conjugate_of(family: "Bernoulli | Binomial") -> Beta:
    """The prior; without one, that whose density is flat."""
    return Beta(1.0, 1.0) if family.prior is None else family.prior


def _posterior(family: "Bernoulli | Binomial", stats: BernoulliStats) -> Beta:
    return family.conjugate_of().posterior((stats.successes, stats.failures))


def _given(family: "Bernoulli | Binomial", probability: jax.Array) -> BernoulliParams:
    return BernoulliParams(probability=probability)


def _plugged(family: "Bernoulli | Binomial", q: Beta) -> BernoulliParams:
    return BernoulliParams(probability=q.expected())


def _expected_log_prob(family: "Bernoulli | Binomial", q: Beta, x: Data) -> jax.Array:
    return family.score(jnp.concatenate(q.expected_logs(), axis=1), x)


def _expected_q(family: "Bernoulli | Binomial", q: Beta, stats: BernoulliStats) -> jax.Array:
    return _total_score(jnp.concatenate(q.expected_logs(), axis=1), stats)


# The same, of what follows from the conjugate prior.
_CONJUGATE = _conjugate_of, _posterior, _given, _plugged, _expected_log_prob, _expected_q


@capabilities.completed("part")
@record(kw_only=False)
class Bernoulli:
    """Independent yes/no columns: log p(x|k) = sum_d x_d log p_kd + (1 - x_d) log(1 - p_kd).

    prior: a Beta on every probability; the M-step is then the posterior mode.

    Data are (N, D) or (N,), entries 0 or 1 (or booleans). Missing entries, NaN, or -1 among whole numbers, are
    integrated out.
    Bishop, PRML, section 9.3.3.
    """

    prior: Beta | None = dataclasses.field(default=None, kw_only=True)

    separable = shareable = ("probability",)
    supports: ClassVar[parameters.Supports] = {"probability": parameters.between_zero_and_one}

    def pooled(self, x: jax.Array, weights: jax.Array | None, num_components: int) -> BernoulliParams:
        return _pooled(self, x, checks.columns("x", x).shape[1], weights, num_components)

    def features(self, x: jax.Array) -> jax.Array:
        return columns.filled(x, tree.float_dtype(x))

    def log_prob(self, params: BernoulliParams, x: jax.Array) -> jax.Array:
        """Log-probability of every row under every component: (N, D) -> (K, N)."""
        return self.score(_natural(params), x)

    def score(self, natural: jax.Array, x: jax.Array) -> jax.Array:
        """Log-probabilities (K, N) from the coefficients of successes and failures (K, 2 D)."""
        return columns.score(natural, self._outcomes(x, natural.dtype))

    def stats(self, params: BernoulliParams, x: jax.Array, responsibilities: jax.Array) -> BernoulliStats:
        """Expected successes and failures: x (N, D), responsibilities (K, N)."""
        outcomes = self._outcomes(x, params.probability.dtype)
        return _stats(params, responsibilities, outcomes, jnp.zeros(responsibilities.shape[0], outcomes.dtype))

    m_step, q_function, log_prior, degenerate, num_parameters, unconstrain, constrain = _COMMON
    conjugate_of, posterior, given, plugged, expected_log_prob, expected_q = _CONJUGATE
    draw, pooled_posterior = conjugacy.common

    def kl(self, p: BernoulliParams, q: BernoulliParams) -> jax.Array:
        """KL(p ‖ q) of a row, under every component: (K,)."""
        return jnp.sum(_divergence(p, q), axis=1)

    def log_expected_prob(self, q: Beta, x: jax.Array) -> jax.Array:
        """log E_q[p(x)] (K, N): the log-probability at the mean."""
        return self.log_prob(self.plugged(q), x)

    def sample(self, key: jax.Array, params: BernoulliParams, labels: jax.Array) -> jax.Array:
        """One row (N, D) of 0 and 1 from the component that each label (N,) names."""
        return jax.random.bernoulli(key, params.probability[labels]).astype(params.probability.dtype)

    def floats_per_row(self, params: BernoulliParams) -> int:
        return 2 * params.probability.shape[1]

    shared_floats_per_row = floats_per_row

    def check(self, x: jax.Array, name: str = "x") -> None:
        columns.check(name, x, lambda values: (values == 0) | (values == 1), "0 or 1")

    def _outcomes(self, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Successes and failures of every entry: (2 D, N)."""
        values, observed = columns.read(x, dtype)
        return jnp.concatenate([values, observed - values], axis=1).T


@capabilities.completed("part")
@record(kw_only=False)
class Binomial:
    """Successes among trials: log p(x|k) = sum_d log C(t_d, x_d) + x_d log p_kd + (t_d - x_d) log(1 - p_kd).

    trials: a whole number, or one a column (D,). Where trials vary by row, leave it out.
    prior: a Beta on every probability; the M-step is then the posterior mode.

    Data are successes (N, D) or (N,), or where trials vary by row a pair (successes, trials), of shapes (N, D) and
    (N, D) or (N,). Missing entries, NaN, or -1 among whole numbers, are integrated out. Successes above 1e5 need
    float64; in float32 a check warns of them.
    Do & Batzoglou (2008), What is the expectation maximization algorithm?, Nature Biotechnology 26.
    """

    trials: jax.Array | int | None = None
    prior: Beta | None = dataclasses.field(default=None, kw_only=True)

    separable = shareable = ("probability",)
    supports: ClassVar[parameters.Supports] = {"probability": parameters.between_zero_and_one}

    def pooled(self, x: Data, weights: jax.Array | None, num_components: int) -> BernoulliParams:
        return _pooled(self, x, checks.columns("x", columns.pair(x)[0]).shape[1], weights, num_components)

    def features(self, x: Data) -> jax.Array:
        successes, _ = columns.pair(x)
        if not isinstance(x, (tuple, list)):
            return columns.filled(successes, tree.float_dtype(x))
        values, trials, observed = self._read(x, tree.float_dtype(x))
        rate = jnp.where(observed & (trials > 0), values / jnp.where(trials > 0, trials, 1), jnp.nan)
        return columns.filled(rate, rate.dtype)

    def log_prob(self, params: BernoulliParams, x: Data) -> jax.Array:
        """Log-probability of every row under every component: (N, D) -> (K, N)."""
        return self.score(_natural(params), x)

    def score(self, natural: jax.Array, x: Data) -> jax.Array:
        """Log-probabilities (K, N) from the coefficients of successes and failures (K, 2 D)."""
        outcomes, base = self._outcomes(x, natural.dtype)
        return columns.score(natural, outcomes) + base[None]

    def stats(self, params: BernoulliParams, x: Data, responsibilities: jax.Array) -> BernoulliStats:
        """Expected successes and failures: x (N, D), responsibilities (K, N)."""
        outcomes, base = self._outcomes(x, params.probability.dtype)
        return _stats(params, responsibilities, outcomes, columns.sums(responsibilities, base[None])[:, 0])

    m_step, q_function, log_prior, degenerate, num_parameters, unconstrain, constrain = _COMMON
    conjugate_of, posterior, given, plugged, expected_log_prob, expected_q = _CONJUGATE
    draw, pooled_posterior = conjugacy.common

    def kl(self, p: BernoulliParams, q: BernoulliParams) -> jax.Array:
        """KL(p ‖ q) of a row, under every component: (K,); of one trial where `trials` is not given."""
        each = _divergence(p, q)
        trials = jnp.asarray(1 if self.trials is None else self.trials, each.dtype)
        return jnp.sum(jnp.broadcast_to(trials, each.shape) * each, axis=1)

    def log_expected_prob(self, q: Beta, x: Data) -> jax.Array:
        """log E_q[p(x)] (K, N): beta-binomial."""
        outcomes, base = self._outcomes(x, jnp.result_type(q.a))
        half = outcomes.shape[0] // 2
        a, b = (jnp.asarray(value)[..., None] for value in (q.a, q.b))
        seen = special.log_beta(a + outcomes[None, :half], b + outcomes[None, half:]) - special.log_beta(a, b)
        return jnp.sum(seen, axis=1) + base[None]

    def sample(self, key: jax.Array, params: BernoulliParams, labels: jax.Array) -> jax.Array:
        """Successes (N, D) from the component that each label (N,) names; needs `trials`."""
        if self.trials is None:
            raise ValueError("trials must be given to sample: Binomial(trials=...), a number or one a column")
        probability = params.probability[labels]
        trials = jnp.asarray(self.trials, probability.dtype)
        return jax.random.binomial(key, trials, probability, shape=probability.shape, dtype=probability.dtype)

    def floats_per_row(self, params: BernoulliParams) -> int:
        return 4 * params.probability.shape[1]

    shared_floats_per_row = floats_per_row

    def check(self, x: Data, name: str = "x") -> None:
        successes, given = columns.pair(x)
        rows = checks.columns(name, successes)
        trials = self._trials(given, rows.shape)
        if given is not None:
            columns.check(f"{name}[1]", x[1], _whole, "whole numbers of trials, at least 0", missing=False)
        columns.warn_of_large(name, successes)
        if not checks.is_concrete(trials):
            columns.check(name, successes, _whole, "whole numbers of successes, at least 0")
            return
        most = np.broadcast_to(np.asarray(trials), rows.shape)
        columns.check(
            name,
            successes,
            lambda v: _whole(v) & (v <= most),
            "whole numbers of successes, at least 0 and at most trials",
        )

    def _trials(self, given: jax.Array | None, shape: tuple[int, ...]) -> jax.Array:
        """Trials that broadcast to successes of this shape: those given with the data, or the family's own."""
        if (given is None) == (self.trials is None):
            raise ValueError(
                "trials must be given once: Binomial(trials) with a number (or one a column), or Binomial() with data "
                "(successes, trials) where trials vary by row"
            )
        trials = jnp.asarray(self.trials) if given is None else given
        if given is None and trials.shape not in ((), (shape[1],)):
            raise ValueError(
                f"trials must be a number, or one a column ({shape[1]},); got shape {trials.shape}. Where trials vary "
                "by row, give the data as (successes, trials) to Binomial()"
            )
        return trials

    def _read(self, x: Data, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Successes and trials, both 0 where missing, and which entries are observed: (N, D) each."""
        successes, given = columns.pair(x)
        values, observed = columns.read(successes, dtype)
        trials = jnp.broadcast_to(self._trials(given, values.shape).astype(dtype), values.shape)
        return values, jnp.where(observed, trials, 0), observed

    def _outcomes(self, x: Data, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """Successes and failures of every entry (2 D, N), and sum_d log C(t_d, x_d) (N,)."""
        values, trials, _ = self._read(x, dtype)
        ways = -jnp.log1p(trials) - special.log_beta(trials - values + 1, values + 1)
        return jnp.concatenate([values, trials - values], axis=1).T, jnp.sum(ways, axis=1)


def _whole(values: np.ndarray) -> np.ndarray:
    return (values >= 0) & (values == np.floor(values))


BinomialParams = BernoulliParams
