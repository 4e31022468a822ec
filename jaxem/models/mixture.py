"""Finite mixtures of any family."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import checks, constraints, numerics, parameters, seeding, tree
from ..data import respect, split
from ..families.columns import PSEUDO_COUNT
from ..latents import Exact, categorical
from ..priors import Dirichlet
from ..protocols import Data, Family, Params, Stats
from ..record import record, static


@record
class MixtureParams:
    """weights (K,), on the simplex; components: the family's parameters, component axis first.

    A family with a component of its own, as `Background`, has its weight last: (K + 1,).
    """

    weights: jax.Array
    components: Params


@record
class MixtureStats:
    """components: the family's statistics, their `count` (K,) the expected rows of each; loglik."""

    components: Stats
    loglik: jax.Array

    @property
    def counts(self) -> jax.Array:
        """Expected number of rows of each component: (K,)."""
        return self.components.count


@record(kw_only=False)
class Mixture:
    """p(x) = sum_k weights_k p(x | component k), for any family of components.

    family: the components, as in `Normal("full")`; num_components: K; prior: a Dirichlet on the
    weights. Data: what the family takes, N rows, or these as `Labelled(x, labels)` where the
    components of some rows are known. Row weights count rows: 2 is the row twice.
    Source: McLachlan & Peel, Finite Mixture Models, section 2.8; Bishop, PRML, section 9.2.
    Raises TypeError or ValueError for a num_components that is not a whole number of at least 1.
    """

    family: Family
    num_components: int = static()
    prior: Dirichlet | None = dataclasses.field(default=None, kw_only=True)

    separable = ("weights", "components")
    collapses = True

    def __post_init__(self) -> None:
        checks.component_family(self.family)
        checks.positive_integer("num_components", self.num_components)

    def init(self, key: jax.Array, x: Data, weights: jax.Array | None = None, *, method: str = "k-means++") -> Params:
        """A random start (pure in `key`, so `vmap` over keys gives many).

        method: "k-means++" or "random_rows" give every row to its nearest seed, columns
        standardised, and "random_responsibilities" draws them uniformly from the simplex; a tenth
        of every row is then spread over all components. Rows of weight 0 are never seeds; a
        component with labelled rows is seeded by one of them.
        """
        checks.choice("method", method, seeding.METHODS)
        x, weights = checks.native((x, weights))
        self.check(x, weights)
        return self._init(checks.random_key(key), x, weights, method)

    @functools.partial(jax.jit, static_argnames="method")
    def _init(self, key: jax.Array, x: Data, weights: jax.Array | None, method: str) -> MixtureParams:
        x, weights = tree.present(tree.one_precision(x), weights)
        rows, labels = split(x)
        share = seeding.shares(key, self.family, rows, weights, self.num_components, method, labels)
        return self._from_responsibilities(x, share, weights, seeding.SMOOTHING)

    def params_from_responsibilities(
        self, x: Data, responsibilities: jax.Array, weights: jax.Array | None = None
    ) -> MixtureParams:
        """The M-step from given responsibilities (N, K), or labels (N,) of a whole-number dtype."""
        x, weights = checks.native((x, weights))
        self.check(x, weights)
        rows, count = tree.num_rows(x), self._total
        given = checks.array("responsibilities", responsibilities)
        labels = given.ndim == 1 and jnp.issubdtype(given.dtype, jnp.integer)
        if not labels and given.shape != (rows, count):
            raise ValueError(
                f"responsibilities must be ({rows}, {count}), or whole-number labels ({rows},); got shape {given.shape}"
            )
        if labels and given.shape != (rows,):
            raise ValueError(f"labels must have shape ({rows},), one a row of x; got {given.shape}")
        values = np.asarray(responsibilities) if checks.is_concrete(responsibilities) else None
        if labels and values is not None and not np.all((values >= 0) & (values < count)):
            raise ValueError(f"labels must be in 0..{count - 1}; got {values.min()}..{values.max()}")
        if not labels and values is not None:
            checks.distributions("responsibilities", values)
        return self._from_responsibilities(x, given, weights, 0.0)

    def e_step(
        self, params: MixtureParams, x: Data, weights: jax.Array | None = None, expect: Any = Exact()
    ) -> MixtureStats:
        """Expected counts and component statistics, sum_n w_n r_kn t(x_n), and sum_n w_n log p(x_n)."""
        x = checks.present(x, weights)
        params = tree.no_whole_numbers(params, split(x)[0])
        responsibilities, evidence = categorical.infer(self._log_joint(params, x), expect)
        return self._gather(params.components, x, responsibilities, weights, evidence)

    def stats(
        self, params: MixtureParams, x: Data, responsibilities: jax.Array, weights: jax.Array | None = None
    ) -> MixtureStats:
        """The statistics under any responsibilities q (N, K); loglik stays that of `params`.

        q_function of them plus the entropy of q is the lower bound of Neal & Hinton (1998).
        """
        x = checks.present(x, weights)
        params = tree.no_whole_numbers(params, split(x)[0])
        evidence = numerics.normalize(self._log_joint(params, x))[1]
        return self._gather(params.components, x, respect(responsibilities.T, x), weights, evidence)

    def m_step(self, stats: MixtureStats) -> MixtureParams:
        """weights = counts / their sum (with a prior: + concentration - 1); the family's own M-step."""
        return MixtureParams(weights=self._weights(stats), components=self.family.m_step(stats.components))

    def blocks(self, params: MixtureParams) -> tuple[str, ...]:
        """Names of parameters with a conditional M-step of their own: "weights", "components.mean", ..."""
        inside = constraints.blocks(self.family, params.components)
        return ("weights", *(f"components.{name}" for name in inside)) if inside else ("weights", "components")

    def m_step_for(self, params: MixtureParams, stats: MixtureStats, names: tuple[str, ...]) -> MixtureParams:
        """The M-step over the named blocks alone, all other parameters held where they are."""
        inside = tuple(name.removeprefix("components.") for name in names if name.startswith("components."))
        if inside:
            components = constraints.m_step_for(self.family, params.components, stats.components, inside)
        else:
            components = self.family.m_step(stats.components) if "components" in names else params.components
        weights = self._weights(stats) if "weights" in names else params.weights
        return MixtureParams(weights=weights, components=components)

    def q_function(self, params: MixtureParams, stats: MixtureStats) -> jax.Array:
        """sum_k counts_k log weights_k + the family's Q: expected complete-data log-likelihood."""
        used = ~_unused(stats.counts)
        logs = jnp.log(jnp.where(used, params.weights, 1))
        return jnp.sum(stats.counts * logs) + self.family.q_function(params.components, stats.components)

    def log_prior(self, params: MixtureParams) -> jax.Array:
        """Log-density of the priors on weights and components; 0 without any."""
        components = self.family.log_prior(params.components)
        return components if self.prior is None else components + self.prior.log_prob(params.weights)

    def rebase(self, stats: MixtureStats, params: MixtureParams) -> MixtureStats:
        """The same statistics about the reference of `params`, where the family has one."""
        if not hasattr(self.family, "rebase"):
            return stats
        return dataclasses.replace(stats, components=self.family.rebase(stats.components, params.components))

    def degenerate(self, stats: MixtureStats, held: tuple[str, ...] = ()) -> jax.Array:
        """Components (K,) that died or collapsed; held ones do neither."""
        found = self.family.degenerate(stats.components)
        return jnp.zeros_like(found) if "components" in held else found

    @parameters.at_rows
    @jax.jit
    def log_prob(self, params: MixtureParams, x: Data) -> jax.Array:
        """Marginal log-density log p(x_n) of each row, log p(x_n, label_n) of labelled ones: (N,)."""
        return self._by_rows(params, x, lambda rows: numerics.normalize(self._log_joint(params, rows))[1])

    @parameters.at_rows
    @jax.jit
    def posterior(self, params: MixtureParams, x: Data) -> jax.Array:
        """Responsibilities p(component k | x_n): (N, K)."""
        return self._by_rows(params, x, lambda rows: numerics.normalize(self._log_joint(params, rows))[0].T)

    @parameters.at_rows
    @jax.jit
    def predict(self, params: MixtureParams, x: Data) -> jax.Array:
        """The most probable component of each row: (N,), whole numbers."""
        return self._by_rows(params, x, lambda rows: jnp.argmax(self._log_joint(params, rows), axis=0))

    def sample(self, key: jax.Array, params: MixtureParams, n: int) -> Data:
        """n rows from the mixture. `sample_with_labels` also tells their components."""
        return self.sample_with_labels(key, params, n)[0]

    def sample_with_labels(self, key: jax.Array, params: MixtureParams, n: int) -> tuple[Data, jax.Array]:
        """n rows from the mixture, and the component (n,) that each came from."""
        checks.positive_integer("n", n)
        self._count(params)
        params = tree.no_whole_numbers(params, params)
        key_labels, key_rows = jax.random.split(checks.random_key(key))
        labels = jax.random.categorical(key_labels, numerics.safe_log(params.weights), shape=(n,))
        return self.family.sample(key_rows, params.components, labels), labels

    def num_parameters(self, params: MixtureParams) -> int:
        """Free parameters: K - 1 weights and the components'."""
        self._count(params)
        return sum(self.degrees(params).values())

    def degrees(self, params: MixtureParams) -> dict[str, int]:
        """Free parameters by name."""
        return {"weights": self._total - 1, "components": self.family.num_parameters(params.components)}

    def unconstrain(self, params: MixtureParams) -> MixtureParams:
        """Continuation ratios of the weights, the family's own coordinates for the components."""
        return MixtureParams(
            weights=numerics.simplex_to_real(params.weights), components=self.family.unconstrain(params.components)
        )

    def constrain(self, theta: MixtureParams) -> MixtureParams:
        """Inverse of `unconstrain`."""
        return MixtureParams(
            weights=numerics.real_to_simplex(theta.weights), components=self.family.constrain(theta.components)
        )

    def check(self, x: Data, weights: jax.Array | None = None) -> None:
        """Raise ValueError or TypeError for bad data, by name. Under jit only shapes are looked at."""
        checks.complete_family(self.family)
        inside, labels = split(checks.present(x, weights))
        self.family.check(inside)
        rows = tree.num_rows(x)
        checks.row_weights(weights, rows)
        checks.enough_rows(rows, weights, self.num_components)
        if labels is not None:
            checks.labels("labels", labels, rows, self._total)

    def params_like(self, x: Data) -> MixtureParams:
        """The shapes that parameters have for such data."""
        rows = split(x)[0]
        return MixtureParams(
            weights=parameters.like((self._total,), tree.float_dtype(rows)),
            components=seeding.params_like(self.family, rows, self.num_components),
        )

    @property
    def supports(self) -> parameters.Supports:
        """Where the values of parameters lie."""
        return {"weights": parameters.simplex, "components": getattr(self.family, "supports", {})}

    def check_held(self, values: dict[str, Any]) -> None:
        """Raise ValueError for mixing weights, to be held fixed, that are no distribution."""
        weights = values.get("weights", 0)
        if "weights" in values and checks.is_known(weights):
            if jnp.shape(weights) != (self._total,):
                raise ValueError(f"weights must have shape ({self._total},); got {jnp.shape(weights)}")
            checks.distributions("weights", np.asarray(weights)[None])

    def floats_per_row(self, params: MixtureParams, x: Data) -> int:
        """Temporaries of an E-step, in numbers a row."""
        return 2 * self._total + self.family.floats_per_row(params.components)

    def floats_per_restart(self, params: MixtureParams, x: Data) -> int:
        """The part of these that every restart has for itself, where several are run on the same rows."""
        shared = getattr(self.family, "shared_floats_per_row", lambda _: 0)(params.components)
        return self.floats_per_row(params, x) - shared

    def coarse(self) -> "Mixture":
        """The same model in its cheapest arithmetic, for the bulk of many restarts; itself where there is none."""
        family = self.family.coarse() if hasattr(self.family, "coarse") else self.family
        return self if family is self.family else dataclasses.replace(self, family=family)

    @property
    def _total(self) -> int:
        """Components, and those that the family adds by itself."""
        return self.num_components + getattr(self.family, "extra_components", 0)

    def _count(self, params: MixtureParams) -> None:
        """Raise unless parameters are a mixture's, with as many weights as it has components."""
        parameters.count_of("params.weights", getattr(params, "weights", None), self._total)

    def _weights(self, stats: MixtureStats) -> jax.Array:
        counts = jnp.where(_unused(stats.counts), 0, stats.counts)
        if self.prior is not None:
            counts = jnp.maximum(counts + self.prior.pseudo_counts(counts), 0)
        return numerics.safe_divide(counts, jnp.sum(counts))

    def _log_joint(self, params: MixtureParams, x: Data) -> jax.Array:
        """log p(component k, x_n): (K, N); -inf for all components but its own where a row is labelled."""
        parameters.shapes("params", self, params, x)
        rows, labels = split(x)
        params = tree.no_whole_numbers(params, rows)
        joint = numerics.safe_log(params.weights)[:, None] + self.family.log_prob(params.components, rows)
        return joint if labels is None else jnp.where(_allowed(labels, joint.shape[0]), joint, -jnp.inf)

    def _gather(
        self,
        components: Params,
        x: Data,
        responsibilities: jax.Array,
        weights: jax.Array | None,
        evidence: jax.Array,
    ) -> MixtureStats:
        """Statistics from responsibilities (K, N) and log-evidence (N,), every row counted by its weight."""
        if weights is not None:
            weights = weights.astype(evidence.dtype)
            # What a row of weight 0 holds may leave its responsibilities NaN.
            responsibilities = jnp.where(weights > 0, responsibilities * weights, 0)
        return MixtureStats(
            components=self.family.stats(components, split(x)[0], responsibilities),
            loglik=numerics.weighted_sum(evidence, weights),
        )

    def _by_rows(self, params: MixtureParams, x: Data, function: Any) -> jax.Array:
        size = tree.rows_per_block(self.floats_per_row(params, x), tree.float_dtype(x))
        return tree.map_over_blocks(function, x, size)

    @functools.partial(jax.jit, static_argnames="smoothing")
    def _from_responsibilities(
        self, x: Data, share: jax.Array, weights: jax.Array | None, smoothing: float
    ) -> MixtureParams:
        """M-step from labels (N,) or responsibilities (N, K)."""
        x, weights = tree.present(x, weights)
        rows, labels = split(x)
        if labels is not None:
            share = jnp.where(labels < 0, share, labels) if share.ndim == 1 else respect(share.T, x).T
        components = seeding.family_stats(self.family, rows, share, weights, self.num_components, smoothing)
        return self.m_step(MixtureStats(components=components, loglik=jnp.zeros((), tree.float_dtype(x))))


def _unused(counts: jax.Array) -> jax.Array:
    """Components (K,) with no rows but what families add to every count: a weight of 0 stays one."""
    return counts <= 2**20 * PSEUDO_COUNT


def _allowed(labels: jax.Array, count: int) -> jax.Array:
    """Components that a row may come from: (K, N)."""
    return (labels < 0) | (labels == jnp.arange(count)[:, None])


def params_from_responsibilities(
    model: Mixture, x: Data, responsibilities: jax.Array, weights: jax.Array | None = None
) -> MixtureParams:
    """The parameters that responsibilities (N, K), or whole-number labels (N,), lead to: one M-step."""
    return model.params_from_responsibilities(x, responsibilities, weights)
