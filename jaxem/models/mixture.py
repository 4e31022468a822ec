"""Finite mixtures of any family."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from .. import capabilities, checks, latents, numerics, parameters, seeding, tree
from ..data import allowed, as_labelled, split
from ..latents import Exact, categorical
from ..latents.categorical import CategoricalPosterior
from ..parts import Probabilities, assembly
from ..priors import Dirichlet
from ..protocols import Data, Expect, Family, Gate, Params, Stats
from ..record import fields, record, static
from .imputation import impute


@record
class MixtureParams:
    """Parameters of a mixture of K components.

    weights: (K,), on the simplex; (K + 1,) where the family adds a component of its own, as `Background` does, whose
        weight comes last. Of a gate: its parameters.
    components: the family's parameters, component axis first.
    """

    weights: jax.Array
    components: Params


@record
class MixtureStats:
    """Expected sufficient statistics of a mixture.

    weights: those of the mixing weights, the expected number of rows of each component (K,), or those of a gate.
    components: those of the family, whose `count` (K,) is the expected number of rows too.
    loglik: sum_n w_n log p(x_n), at the parameters of the E-step.
    """

    weights: Stats
    components: Stats
    loglik: jax.Array

    @property
    def counts(self) -> jax.Array:
        """Expected number of rows of each component: (K,)."""
        return self.components.count


@capabilities.completed("model")
@record(kw_only=False)
class Mixture:
    """p(x) = sum_k weights_k p(x | component k), for any family of components.

    family: the components, as in `Normal("full")`.
    num_components: K.
    prior: a Dirichlet on the weights.
    gate: a part that gives log p(component k | x_n) in place of constant weights (`protocols.Gate`): a mixture of
        experts.

    Data are N rows as the family takes them, or these as `Labelled(x, labels)` where the components of some rows are
    known. Row weights count rows: 2 is the row twice.
    Source: McLachlan & Peel, Finite Mixture Models, section 2.8; Bishop, PRML, section 9.2.
    Raises TypeError or ValueError for a num_components that is not a whole number of at least 1.
    """

    family: Family
    num_components: int = static()
    prior: Dirichlet | None = dataclasses.field(default=None, kw_only=True)
    gate: Gate | None = dataclasses.field(default=None, kw_only=True)

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
    part_params, params_of, part_statistics, with_part_statistics = assembly.by_name
    m_step, q_function, log_prior, rebase = assembly.surrogate
    expands, expanded = property(assembly.expands), assembly.expanded
    unconstrain, constrain = assembly.coordinates
    blocks, m_step_for, degenerate, degrees, num_parameters, check_held = assembly.pieces
    supports = property(assembly.supports)
    separable = ("weights", "components")

    @seeding.start(*seeding.METHODS)
    @functools.partial(jax.jit, static_argnames="method")
    def init(self, key: jax.Array, x: Data, weights: jax.Array | None = None, *, method: str = "k-means++") -> Params:
        """A random start (pure in `key`, so `vmap` over keys gives many).

        method: "k-means++" and "random_rows" give every row to its nearest seed, columns standardised;
            "random_responsibilities" draws responsibilities uniformly from the simplex. A tenth of every row is then
            spread over all components.

        Rows of weight 0 are never seeds; a component with labelled rows is seeded by one of them.
        """
        x, weights = tree.present(tree.one_precision(x), weights)
        members = seeding.membership(key, self.family, x, weights, self.num_components, method)
        return seeding.estimated(self, x, members, weights, seeding.SMOOTHING)

    params_from_responsibilities = seeding.params_from_responsibilities

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

    e_step = latents.e_step
    stats = categorical.stats
    log_prob = categorical.log_prob
    posterior = categorical.responsibilities
    predict = categorical.likeliest
    sample = categorical.sample
    sample_with_labels = categorical.sample_with_labels
    impute = impute

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
        rows, counts = split(x)[0], self.counts
        return self.params_of(
            {name: seeding.params_like(part, rows, counts[name]) for name, part in self.parts.items()}
        )

    def floats_per_row(self, params: MixtureParams, x: Data) -> int:
        """Temporaries of an E-step, in numbers a row."""
        parts = self.parts
        own = parts["weights"].floats_per_row(params.weights) + parts["components"].floats_per_row(params.components)
        return 2 * self.num_weights + own

    def shared_floats_per_row(self, params: MixtureParams, x: Data) -> int:
        """The part of these that restarts on the same rows share."""
        return self.parts["components"].shared_floats_per_row(params.components)

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

    @property
    def counts(self) -> dict[str, int]:
        """How many components every part is told that there are."""
        return {"weights": self.num_weights, "components": self.num_components}

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
