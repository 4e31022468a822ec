"""Mixtures whose weights and components have distributions: variational Bayesian EM."""

import dataclasses
from typing import Any

import jax
import numpy as np

from .. import capabilities, checks, numerics, parameters
from ..latents import categorical
from ..parts import Probabilities, Sticks, Variational, assembly
from ..priors import Beta, Dirichlet
from ..protocols import Data, Family
from ..record import fields, record, static
from . import components
from .components import MixtureParams


@capabilities.completed("model")
@record(kw_only=False)
class VariationalMixture:
    """A mixture whose weights and components have distributions in place of values: variational Bayesian EM.

    family: of the components, with a conjugate prior, as in `Normal(prior=jaxem.default_prior(x, 10))`.
    num_components: K, at the most: components that the data do not need empty themselves where concentration is small.
    concentration: of the weights' Dirichlet prior, a number or one a component (K,); 1 / K where it is None. Of a
        process: alpha, for sticks v ~ Beta(1, alpha), a number or (K - 1,); 1 where it is None.
    process: whether weights are those of a Dirichlet process, truncated at K (Blei & Jordan 2006). Components then
        have an order: what is early on the stick is expected to be larger.

    Parameters are a `MixtureParams` of hyperparameters: for the weights a Dirichlet, or a Beta of the K - 1 sticks of a
    process; for the components a record of the type of their prior, component axis first. A fit's objective is the
    lower bound of the log-evidence log p(x), log-likelihood (of densities in expectation) + log-prior (-KL of all
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

    params_type = MixtureParams
    part_params, params_of, part_statistics, with_part_statistics = assembly.by_name
    m_step, q_function, log_prior, rebase = assembly.surrogate
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

    def sample(self, key: jax.Array, params: MixtureParams, n: int) -> Data:
        """n rows of one mixture that is drawn from the parameters' distributions."""
        return self.sample_with_labels(key, params, n)[0]

    def sample_with_labels(self, key: jax.Array, params: MixtureParams, n: int) -> tuple[Data, jax.Array]:
        """The same, and the component (n,) that each came from."""
        of_parts, of_rows = jax.random.split(checks.random_key(key))
        checks.positive_integer("n", n)
        drawn = self.sample_parameters(of_parts, params)
        return categorical.drawn_rows(self.family, of_rows, numerics.safe_log(drawn.weights), drawn.components, n)

    def sample_parameters(self, key: jax.Array, params: MixtureParams) -> MixtureParams:
        """Parameters of `Mixture(family, K)`, drawn from their distributions."""
        values, keys = self.part_params(params), jax.random.split(key)
        drawn = {
            name: part.sample_parameters(k, values[name])
            for k, (name, part) in zip(keys, self.parts.items(), strict=True)
        }
        return self.params_of(drawn)

    def check_count(self, params: MixtureParams) -> None:
        """Raise unless parameters are a variational mixture's, with weights of K components or K - 1 sticks."""
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
