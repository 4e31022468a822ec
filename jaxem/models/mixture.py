"""Finite mixtures of any family."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import capabilities, checks, latents, numerics, parameters, seeding, tree
from ..data import allowed, as_labelled, seen_by, split
from ..latents import Exact, categorical
from ..latents.categorical import CategoricalPosterior
from ..parts import Probabilities, Sticks, Variational, assembly
from ..parts.gates import SoftmaxGate
from ..priors import Beta, Dirichlet
from ..protocols import Data, Expect, Family, Gate, Params, Stats
from ..record import fields, record, static
from . import prediction
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

    Data are N rows as the family takes them, these as `Gated(x, features)` for a gate with features of its own, and
    either as `Labelled(x, labels)` where the components of some rows are known. Row weights count rows: 2 is the row
    twice.
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
    expected = assembly.expected
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
            components=parts["components"].stats(params.components, seen_by("components", rows), responsibilities),
            loglik=numerics.weighted_sum(evidence, weights),
        )

    e_step = latents.e_step
    stats = categorical.stats
    log_prob = categorical.log_prob
    predictive = categorical.predictive
    posterior = categorical.responsibilities
    predict = categorical.likeliest
    sample = categorical.sample
    sample_with_labels = categorical.sample_with_labels
    mean, gate_probabilities = prediction.mean, prediction.gate_probabilities
    impute = impute

    def check(self, x: Data, weights: jax.Array | None = None) -> None:
        """Raise ValueError or TypeError for bad data, by name. Under jit only shapes are looked at."""
        checks.complete_family(self.family)
        inside, labels = split(checks.present(x, weights))
        self.parts["weights"].check(inside)
        self.family.check(seen_by("components", inside))
        rows = tree.num_rows(x)
        checks.row_weights(weights, rows)
        checks.enough_rows(rows, weights, self.num_components)
        if labels is not None:
            checks.labels("labels", labels, rows, self.num_weights)

    def params_like(self, x: Data) -> MixtureParams:
        """The shapes that parameters have for such data."""
        rows, counts = split(x)[0], self.counts
        return self.params_of(
            {name: seeding.params_like(part, seen_by(name, rows), counts[name]) for name, part in self.parts.items()}
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
        joint = joint + parts["components"].log_prob(params.components, seen_by("components", rows))
        return joint if labels is None else jnp.where(allowed(labels, joint.shape[0]), joint, -jnp.inf)


@capabilities.completed("model")
@record(kw_only=False)
class VariationalMixture:
    """A mixture whose weights and components have distributions in place of values: variational Bayesian EM.

    family: of the components, with a conjugate prior, as in `Normal(prior=jaxem.default_prior(x, 10))`.
    num_components: K, at the most: components that the data do not need empty themselves where concentration is small.
    concentration: of the weights' Dirichlet prior, a number or one a component (K,); 1 / K where it is None. Of a
        process: the expected size of a stick's rest, 1 where it is None.
    process: whether weights are those of a Dirichlet process, truncated at K (Blei & Jordan 2006). Components then
        have an order: what is early on the stick is expected to be larger.

    Parameters are a `MixtureParams` of hyperparameters: a Dirichlet of the weights, of a process a Beta of its K - 1
    sticks, and of the components the record that their prior is, component axis first. A fit's objective is the lower
    bound of the log-evidence log p(x), log-likelihood (of densities in expectation) + log-prior (-KL of all
    distributions to their priors), with all constants: it never falls, and compares numbers of components.
    `expected(params)` are parameters of `Mixture(family, K)`; `predictive(params, x)` is the predictive log-density, in
    closed form. `log_prob`, `posterior` and `predict` are those of the bound: densities in expectation.
    Starts are as a mixture's. `stepwise_em(batch_size)` of it is stochastic variational inference (Hoffman et al.
    2013, JMLR 14).
    Attias (2000), A variational Bayesian framework for graphical models; Bishop (2006), section 10.2.
    Raises TypeError or ValueError for a family without a conjugate prior, or a concentration that is not above 0.
    """

    family: Family
    num_components: int = static()
    concentration: Any = None
    process: bool = static(default=False, kw_only=True)

    def __post_init__(self) -> None:
        checks.component_family(self.family)
        checks.positive_integer("num_components", self.num_components)
        given = self.concentration
        if checks.is_known(given) and not np.all(np.asarray(given) > 0):
            raise ValueError(f"concentration must be above 0, or None for the default; got {given}")
        Variational(self.family)  # refuses what has no conjugate prior

    @property
    def parts(self) -> dict[str, Any]:
        """The weights, and the components, both under distributions."""
        given, shape = self.concentration, (self.num_components,)
        if self.process:
            weights: Any = Sticks(prior=Beta(1.0, 1.0 if given is None else given), shape=shape)
        else:
            prior = Dirichlet(1 / self.num_components if given is None else given)
            weights = Probabilities(prior=prior, shape=shape)
        return {"weights": Variational(weights), "components": Variational(self.family)}

    @property
    def plain(self) -> Mixture:
        """The mixture that `expected(params)` are parameters of."""
        return Mixture(self.family, self.num_components)

    params_type = MixtureParams
    part_params, params_of, part_statistics, with_part_statistics = assembly.by_name
    m_step, q_function, log_prior, rebase = assembly.surrogate
    expected = assembly.expected
    unconstrain, constrain = assembly.coordinates
    blocks, m_step_for, degenerate, degrees, num_parameters, check_held = assembly.pieces
    supports = property(assembly.supports)
    separable = ("weights", "components")

    init, params_from_responsibilities = Mixture.init, seeding.params_from_responsibilities
    infer, statistics, e_step, log_joint = Mixture.infer, Mixture.statistics, latents.e_step, Mixture.log_joint
    stats, log_prob, predictive = categorical.stats, categorical.log_prob, categorical.predictive
    posterior, predict = categorical.responsibilities, categorical.likeliest
    check, params_like, counts, num_weights = Mixture.check, Mixture.params_like, Mixture.counts, Mixture.num_weights
    floats_per_row, shared_floats_per_row = Mixture.floats_per_row, Mixture.shared_floats_per_row

    def sample(self, key: jax.Array, params: MixtureParams, n: int) -> Data:
        """n rows of one mixture that is drawn from the parameters' distributions."""
        return self.sample_with_labels(key, params, n)[0]

    def sample_with_labels(self, key: jax.Array, params: MixtureParams, n: int) -> tuple[Data, jax.Array]:
        """The same, and the component (n,) that each came from."""
        of_parts, of_rows = jax.random.split(checks.random_key(key))
        return self.plain.sample_with_labels(of_rows, self.sample_parameters(of_parts, params), n)

    def sample_parameters(self, key: jax.Array, params: MixtureParams) -> MixtureParams:
        """Parameters of `plain`, drawn from their distributions."""
        values, keys = self.part_params(params), jax.random.split(key)
        drawn = {
            name: part.sample_parameters(k, values[name])
            for k, (name, part) in zip(keys, self.parts.items(), strict=True)
        }
        return self.params_of(drawn)

    def check_count(self, params: MixtureParams) -> None:
        """Raise unless parameters are a variational mixture's, with as many weights as it has components."""
        first = next(iter(fields(fields(params).get("weights")).values()), None)
        parameters.count_of("params.weights", first, self.num_components - self.process)

    def coarse(self) -> "VariationalMixture":
        """The same model in its cheapest arithmetic, for the bulk of many restarts; itself where there is none."""
        return self._of(self.parts["components"].coarse().family)

    def without_missing(self) -> "VariationalMixture":
        """The form for rows in which no entry is missing."""
        return self._of(self.parts["components"].without_missing().family)

    def _of(self, family: Family) -> "VariationalMixture":
        return self if family is self.family else dataclasses.replace(self, family=family)


def MixtureOfExperts(expert: Family, num_components: int, *, gate: Gate = SoftmaxGate()) -> Mixture:
    """p(y | features) = sum_k p(k | features) p(y | features, expert k): `Mixture(expert, num_components, gate=gate)`.

    expert: a regression family, as LinearRegression(), LogisticRegression() or PoissonRegression().
    num_components: K.
    gate: by default a softmax; `TwoLevelGate(num_groups=G)` makes the hierarchical mixture of experts.

    Data: pairs (features (N, P) or (N,), response (N,)), the gate looking at the features of the experts, or
    `Gated((features, response), gate_features)`, which gives it its own. Params: `.weights`, the gate's, with
    `.coefficients` (K, P) and `.intercept` (K,), those of the last component 0; `.components`, the experts'.
    `log_prob(params, (features, response))` is the predictive density; `mean(params, features)`,
    `gate_probabilities(params, features)` and `sample(key, params, n, features=features)` ask of features alone.
    Source: Jacobs, Jordan, Nowlan & Hinton (1991), Adaptive mixtures of local experts, Neural Computation 3; Jordan &
    Jacobs (1994), Hierarchical mixtures of experts and the EM algorithm, Neural Computation 6.
    Raises TypeError or ValueError as `Mixture` does, and TypeError for a family that is no regression.
    """
    model = Mixture(expert, num_components, gate=gate)
    if not capabilities.states(expert, "mean"):
        raise TypeError(f"expert must be a regression family, as LinearRegression(); got {expert!r}")
    return model
