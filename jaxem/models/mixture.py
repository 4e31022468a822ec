"""Finite mixtures of any family."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from .. import capabilities, checks, numerics, parameters, seeding, tree
from ..data import allowed, as_labelled, split
from ..latents import Exact, ask, categorical
from ..latents.categorical import CategoricalPosterior
from ..parts import Probabilities, assembly
from ..priors import Dirichlet
from ..protocols import Data, Expect, Family, Gate, Params, Stats
from ..record import fields, record, static
from .imputation import filled_in


@record
class MixtureParams:
    """weights (K,), on the simplex; components: the family's parameters, component axis first.

    A family with a component of its own, as `Background`, has its weight last: (K + 1,).
    """

    weights: jax.Array
    components: Params


@record
class MixtureStats:
    """Expected sufficient statistics of a mixture.

    weights: those of the mixing weights, the expected number of rows of each component (K,), or of another gate.
    components: the family's, their `count` (K,) the expected rows of each.
    loglik: sum_n w_n log p(x_n), at the parameters of the E-step.
    """

    weights: Stats
    components: Stats
    loglik: jax.Array

    @property
    def counts(self) -> jax.Array:
        """Expected number of rows of each component: (K,)."""
        return self.components.count


@record(kw_only=False)
class Mixture:
    """p(x) = sum_k weights_k p(x | component k), for any family of components.

    family: the components, as in `Normal("full")`; num_components: K; prior: a Dirichlet on the weights; gate: a part
    that gives log p(component k | x_n) (`protocols.Gate`), in place of constant weights: a mixture of experts. Data:
    what the family takes, N rows, or these as `Labelled(x, labels)` where the components of some rows are known. Row
    weights count rows: 2 is the row twice.
    Source: McLachlan & Peel, Finite Mixture Models, section 2.8; Bishop, PRML, section 9.2.
    Raises TypeError or ValueError for a num_components that is not a whole number of at least 1.
    """

    family: Family
    num_components: int = static()
    prior: Dirichlet | None = dataclasses.field(default=None, kw_only=True)
    gate: Gate | None = dataclasses.field(default=None, kw_only=True)

    separable = ("weights", "components")
    collapses = True

    def __post_init__(self) -> None:
        checks.component_family(self.family)
        checks.positive_integer("num_components", self.num_components)
        if self.prior is not None and self.gate is not None:
            raise ValueError("prior is one on constant weights, and a gate has none: give the gate its own prior")

    @property
    def parts(self) -> dict[str, Any]:
        """The mixing weights, and the components."""
        family = capabilities.complete("part", self.family)
        weights = Probabilities(prior=self.prior, shape=(self.num_components + family.extra_components,))
        return {
            "weights": weights if self.gate is None else capabilities.complete("part", self.gate),
            "components": family,
        }

    params_type = MixtureParams
    params_of = assembly.params_of
    part_statistics = assembly.part_statistics
    with_part_statistics = assembly.with_part_statistics
    m_step = assembly.m_step
    blocks = assembly.blocks
    m_step_for = assembly.m_step_for
    q_function = assembly.q_function
    log_prior = assembly.log_prior
    rebase = assembly.rebase
    degenerate = assembly.degenerate
    degrees = assembly.degrees
    check_held = assembly.check_held
    unconstrain = assembly.unconstrain
    constrain = assembly.constrain
    supports = property(assembly.supports)

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
        return self._informed(x)._init(checks.random_key(key), x, weights, method)

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
        given = checks.responsibilities("responsibilities", responsibilities, tree.num_rows(x), self.num_weights)
        return self._informed(x)._from_responsibilities(x, given, weights, 0.0)

    def infer(self, params: MixtureParams, x: Data, expect: Expect = Exact()) -> CategoricalPosterior:
        """The posterior over components of every row; its `evidence` is log p(x_n), (N,)."""
        return categorical.infer(self.log_joint(params, x), expect)

    def statistics(
        self, params: MixtureParams, x: Data, posterior: CategoricalPosterior, weights: jax.Array | None = None
    ) -> MixtureStats:
        """Statistics sum_n w_n r_kn t(x_n) under any posterior r; loglik is the sum of its evidence."""
        rows = split(x)[0]
        params = tree.no_whole_numbers(params, rows)
        responsibilities, evidence = as_labelled(posterior.responsibilities, x), posterior.evidence
        if weights is not None:
            weights = weights.astype(evidence.dtype)
            # What a row of weight 0 holds may leave its responsibilities NaN.
            responsibilities = jnp.where(weights[None] > 0, responsibilities * weights[None], 0)
        parts = self.parts
        return MixtureStats(
            weights=parts["weights"].stats(params.weights, rows, responsibilities),
            components=parts["components"].stats(params.components, rows, responsibilities),
            loglik=numerics.weighted_sum(evidence, weights),
        )

    def e_step(
        self, params: MixtureParams, x: Data, weights: jax.Array | None = None, expect: Expect = Exact()
    ) -> MixtureStats:
        """Expected counts and component statistics, sum_n w_n r_kn t(x_n), and sum_n w_n log p(x_n)."""
        x = checks.present(x, weights)
        return self.statistics(params, x, ask(expect, self, params, x), weights)

    def stats(
        self, params: MixtureParams, x: Data, responsibilities: jax.Array, weights: jax.Array | None = None
    ) -> MixtureStats:
        """The statistics under any responsibilities q (N, K); loglik stays that of `params`.

        q_function of them plus the entropy of q is the lower bound of Neal & Hinton (1998).
        """
        x = checks.present(x, weights)
        exact = self.infer(params, x)
        return self.statistics(params, x, dataclasses.replace(exact, responsibilities=responsibilities.T), weights)

    log_prob = categorical.log_prob
    posterior = categorical.responsibilities
    predict = categorical.likeliest
    sample = categorical.sample
    sample_with_labels = categorical.sample_with_labels

    @parameters.at_rows
    def impute(
        self, params: MixtureParams, x: Data, *, key: jax.Array | None = None, num_draws: int | None = None
    ) -> jax.Array:
        """The rows with what is missing of them filled in; what is observed stays as it is.

        Without a key by conditional means, (N, D); with one by draws from the components' posterior and all that is
        missing of a row together, (num_draws, N, D), for multiple imputation (Rubin 1987). Of a `NoisyNormal` these are
        the values behind the noise.
        """
        shares = self.posterior(params, x)
        return filled_in(self.family, tree.no_whole_numbers(params, x).components, split(x)[0], shares, key, num_draws)

    def num_parameters(self, params: MixtureParams) -> int:
        """Free parameters: K - 1 weights and the components'."""
        self.check_count(params)
        return assembly.num_parameters(self, params)

    def check(self, x: Data, weights: jax.Array | None = None) -> None:
        """Raise ValueError or TypeError for bad data, by name. Under jit only shapes are looked at."""
        checks.complete_family(self.family)
        inside, labels = split(checks.present(x, weights))
        self.family.check(inside)
        rows = tree.num_rows(x)
        checks.row_weights(weights, rows)
        checks.enough_rows(rows, weights, self.num_components)
        if labels is not None:
            checks.labels("labels", labels, rows, self.num_weights)

    def params_like(self, x: Data) -> MixtureParams:
        """The shapes that parameters have for such data."""
        rows, parts = split(x)[0], self.parts
        return MixtureParams(
            weights=seeding.params_like(parts["weights"], rows, self.num_weights),
            components=seeding.params_like(parts["components"], rows, self.num_components),
        )

    def floats_per_row(self, params: MixtureParams, x: Data) -> int:
        """Temporaries of an E-step, in numbers a row."""
        parts = self.parts
        own = parts["weights"].floats_per_row(params.weights) + parts["components"].floats_per_row(params.components)
        return 2 * self.num_weights + own

    def floats_per_restart(self, params: MixtureParams, x: Data) -> int:
        """The part of these that every restart has for itself, where several are run on the same rows."""
        return self.floats_per_row(params, x) - self.parts["components"].shared_floats_per_row(params.components)

    def coarse(self) -> "Mixture":
        """The same model in its cheapest arithmetic, for the bulk of many restarts; itself where there is none."""
        family = capabilities.original(self.parts["components"].coarse())
        return self if family is self.family else dataclasses.replace(self, family=family)

    def without_missing(self) -> "Mixture":
        """The form for rows in which no entry is missing."""
        family = capabilities.original(self.parts["components"].without_missing())
        return self if family is self.family else dataclasses.replace(self, family=family)

    @property
    def num_weights(self) -> int:
        """Components, and those that the family adds by itself."""
        return self.num_components + self.parts["components"].extra_components

    def check_count(self, params: MixtureParams) -> None:
        """Raise unless parameters are a mixture's, with as many weights as it has components."""
        if self.gate is None:
            parameters.count_of("params.weights", fields(params).get("weights"), self.num_weights)

    def log_joint(self, params: MixtureParams, x: Data) -> jax.Array:
        """log p(component k, x_n): (K, N); -inf for all components but its own where a row is labelled."""
        parameters.shapes("params", self, params, x)
        rows, labels = split(x)
        params, parts = tree.no_whole_numbers(params, rows), self.parts
        joint = parts["weights"].log_prob(params.weights, rows)
        joint = joint + parts["components"].log_prob(params.components, rows)
        return joint if labels is None else jnp.where(allowed(labels, joint.shape[0]), joint, -jnp.inf)

    def _informed(self, x: Data) -> "Mixture":
        return capabilities.original(capabilities.informed(capabilities.complete("model", self), x))

    @functools.partial(jax.jit, static_argnames="smoothing")
    def _from_responsibilities(
        self, x: Data, share: jax.Array, weights: jax.Array | None, smoothing: float
    ) -> MixtureParams:
        """M-step from labels (N,) or responsibilities (N, K)."""
        x, weights = tree.present(x, weights)
        rows, labels = split(x)
        if labels is not None:
            share = jnp.where(labels < 0, share, labels) if share.ndim == 1 else as_labelled(share.T, x).T
        parts, counts = self.parts, {"weights": self.num_weights, "components": self.num_components}
        pooled = {name: part.pooled(rows, weights, counts[name]) for name, part in parts.items()}
        of = seeding.statistics(parts, pooled, rows, share, weights, self.num_weights, smoothing)
        return self.params_of({name: part.m_step(of[name]) for name, part in parts.items()})


def params_from_responsibilities(
    model: Mixture, x: Data, responsibilities: jax.Array, weights: jax.Array | None = None
) -> MixtureParams:
    """The parameters that responsibilities (N, K), or whole-number labels (N,), lead to: one M-step."""
    return model.params_from_responsibilities(x, responsibilities, weights)
