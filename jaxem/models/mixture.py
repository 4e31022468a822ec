"""Finite mixtures of any family."""

import dataclasses
from typing import Any

from .. import capabilities, checks, parameters
from ..families import Categorical
from ..latents import categorical
from ..parts import Probabilities, SoftmaxGate, TableGate, assembly
from ..priors import Dirichlet
from ..protocols import Family, Gate
from ..record import fields, record, static
from . import components, prediction
from .components import MixtureParams as MixtureParams
from .components import MixtureStats as MixtureStats
from .imputation import impute


@capabilities.completed("model")
@record(kw_only=False)
class Mixture:
    """p(x) = sum_k weights_k p(x | component k), for any family of components.

    family: the components, as in `Normal("full")`.
    num_components: K.
    prior: a Dirichlet on the weights.
    gate: a part that gives log p(component k | x_n) in place of constant weights (`protocols.Gate`): a mixture of
        experts.

    Data are N rows x as the family takes them, or `Gated(x, features)` for a gate with features of its own; either may
    be inside `Labelled(..., labels)`, where the components of some rows are known. Row weights count rows: 2 is the row
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

    init, params_from_responsibilities = components.start
    infer, statistics, e_step, log_joint, stats = components.posteriors
    log_prob, predictive, posterior, predict = components.questions
    check, params_like = components.data
    floats_per_row, shared_floats_per_row, num_weights, counts = components.sizes
    sample, sample_with_labels = categorical.sample, categorical.sample_with_labels
    mean, gate_probabilities = prediction.mean, prediction.gate_probabilities
    impute = impute

    def coarse(self) -> "Mixture":
        """The same model in its cheapest arithmetic, for the bulk of many restarts; itself where there is none."""
        family = capabilities.original(self.parts["components"].coarse())
        return self if family is self.family else dataclasses.replace(self, family=family)

    def without_missing(self) -> "Mixture":
        """The form for rows in which no entry is missing."""
        family = capabilities.original(self.parts["components"].without_missing())
        return self if family is self.family else dataclasses.replace(self, family=family)

    def check_count(self, params: MixtureParams) -> None:
        """Raise unless parameters are a mixture's, with as many weights as it has components."""
        if self.gate is None:
            parameters.count_of("params.weights", fields(params).get("weights"), self.num_weights)


def MixtureOfExperts(expert: Family, num_components: int, *, gate: Gate = SoftmaxGate()) -> Mixture:
    """p(y | features) = sum_k p(k | features) p(y | features, expert k): `Mixture(expert, num_components, gate=gate)`.

    expert: a regression family, as LinearRegression(), LogisticRegression() or PoissonRegression().
    num_components: K.
    gate: by default a softmax; `TwoLevelGate(num_groups=G)` makes the hierarchical mixture of experts.

    Data: pairs (features (N, P) or (N,), response (N,)), which the gate uses as the experts do, or
    `Gated((features, response), gate_features)`, for a gate with its own. Params: `.weights`, the gate's, with
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


def TopicMixture(num_topics: int, num_documents: int, num_words: int, *, prior: Dirichlet | None = None) -> Mixture:
    """p(word | document) = sum_k p(topic k | document) p(word | topic k): probabilistic latent semantic analysis.

    It is `Mixture(Categorical(num_words), num_topics, gate=TableGate(num_documents))`. Data are sparse counts, a row
    for each that is not 0: `Gated(words, documents)`, numbers (N,) of both, their counts (N,) as row weights. Params:
    `.weights` (documents, topics), `.components.probability` (topics, 1, words). No array is documents times words.
    prior: a Dirichlet on the topics of every document, and on the words of every topic.
    Source: Hofmann (2001), Unsupervised learning by probabilistic latent semantic analysis, Machine Learning 42.
    """
    for name, value in (("num_documents", num_documents), ("num_words", num_words)):
        checks.positive_integer(name, value)
    return Mixture(Categorical(num_words, prior=prior), num_topics, gate=TableGate(num_documents, prior=prior))
