"""Hidden Markov models with observations of any family."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from .. import checks, numerics, parameters, seeding, sequences, tree
from ..latents import Exact, markov
from ..latents.markov import observations, queries
from ..latents.markov.stationary import stationary_distribution
from ..priors import Dirichlet
from ..protocols import Data, Family, Params, Stats
from ..record import record, static
from ..sequences import Sequences

# Small enough to vanish beside any real count: a state that is never left keeps the transitions that it had.
_PSEUDO_COUNT = 1e-18


@record
class HMMParams:
    """initial (K,): p(z_1 = k)
    transition (K, K): p(z_t+1 = j | z_t = i), rows from
    emissions: the family's parameters
    """

    initial: jax.Array
    transition: jax.Array
    emissions: Params


@record
class HMMStats:
    """initial (K,): expected number of sequences that start in each state
    transitions (K, K): expected number of moves from i to j
    emissions: the family's statistics, their `count` (K,) the expected number of observed steps in each state
    loglik (): log-likelihood
    """

    initial: jax.Array
    transitions: jax.Array
    emissions: Stats
    loglik: jax.Array


@record(kw_only=False)
class HMM:
    """p(x, z) = initial_z1 prod_t transition_z(t-1),z(t) prod_t p(x_t | z_t), for any family of observations.

    family: of the observations, as in `HMM(Normal("diag"), 3)`; regressions with lagged responses among their
        features are autoregressive, with inputs an input-driven HMM.
    num_states: K.
    initial_prior, transition_prior: a Dirichlet, its concentration a scalar, (K,), or for transitions (K, K):
        1 + kappa on the diagonal is a sticky prior.
    initial_support (K,), transition_support (K, K): where False (0), starts put a hard zero. Zeros stay zero through
        EM, wherever they come from.
    stationary: the initial distribution is the transitions' stationary one, and no parameter of its own: what
        parameters hold in its place is not looked at.
    parallel: whether the E-step works by products of whole transition matrices, in log T rounds, K times the work:
        for long sequences on accelerators. Sums of logarithms then carry the rounding of the whole sequence's.
    form: "scaled", "log" or "auto", the arithmetic of the recursions; see `jaxem/latents/markov`.

    Data: one sequence, the family's rows in order (T, ...); a batch (B, T, ...), its arrays of three axes; or
    `Sequences` of any lengths. A step of which every entry is NaN is missing and integrated out for any family,
    and so are single entries where the family takes them. Weights (B,) count sequences.
    Rabiner (1989), A tutorial on hidden Markov models, Proc. IEEE 77; Bishop, PRML, section 13.2.
    Raises TypeError or ValueError for a num_states below 1, an unknown form, or a support with an empty row.
    """

    family: Family
    num_states: int = static()
    initial_prior: Dirichlet | None = dataclasses.field(default=None, kw_only=True)
    transition_prior: Dirichlet | None = dataclasses.field(default=None, kw_only=True)
    initial_support: Any = dataclasses.field(default=None, kw_only=True)
    transition_support: Any = dataclasses.field(default=None, kw_only=True)
    stationary: bool = static(default=False, kw_only=True)
    parallel: bool = static(default=False, kw_only=True)
    form: str = static(default="auto", kw_only=True)

    def __post_init__(self) -> None:
        checks.component_family(self.family)
        checks.positive_integer("num_states", self.num_states)
        checks.choice("form", self.form, markov.FORMS)
        if getattr(self.family, "extra_components", 0):
            raise TypeError(f"{type(self.family).__name__} adds a component of its own, which a chain has no state for")
        self._tables.check(self.num_states)

    collapses = True

    @property
    def separable(self) -> tuple[str, ...]:
        return ("emissions",) if self.stationary else ("initial", "transition", "emissions")

    def units(self, x: Data) -> Sequences:
        """The data as `Sequences`: an axis of independent sequences first."""
        return sequences.as_sequences(x)

    def init(self, key: jax.Array, x: Data, weights: jax.Array | None = None, *, method: str = "k-means++") -> Params:
        """A random start (pure in `key`, so `vmap` over keys gives many).

        method: as for `Mixture`; steps are given to states as rows are to components, whatever their order, and
        their moves counted, each kind of move once more than it is seen.
        """
        checks.choice("method", method, seeding.METHODS)
        x, weights = checks.native((x, weights))
        self.check(x, weights)
        return self._init(checks.random_key(key), self.units(x), weights, method)

    @functools.partial(jax.jit, static_argnames="method")
    def _init(self, key: jax.Array, x: Sequences, weights: jax.Array | None, method: str) -> HMMParams:
        x, weights = tree.present(tree.one_precision(x), weights)
        starts, moves, emissions = observations.start(key, self.family, x, weights, self.num_states, method)
        stats = HMMStats(
            initial=self._tables.initial.within(starts + 1),
            transitions=self._tables.transition.within(moves + 1),
            emissions=emissions,
            loglik=jnp.zeros((), starts.dtype),
        )
        return self.m_step(stats)

    def infer(self, params: HMMParams, x: Data, expect: Any = Exact()) -> markov.Posterior:
        """The posterior of the states: its `states`, `pairs`, and `evidence`, log p(x) of every sequence."""
        every = self.units(x)
        form, evidence = markov.infer(self.chain(params, every), expect, self.form, self.parallel)
        return markov.Posterior(form=form, terms=every.holding(evidence), alone=sequences.is_one(x))

    def statistics(
        self, params: HMMParams, x: Data, posterior: markov.Distribution, weights: jax.Array | None = None
    ) -> HMMStats:
        """Expected starts, moves and observation statistics under any distribution of the states; its evidence, or
        where it has none that of `params`, is their loglik."""
        x = self.units(x)
        form, terms = posterior.along(x)
        x = checks.present(x, weights)
        params = tree.no_whole_numbers(params, x.values)
        terms = queries.evidence(self, params, x) if terms is None else terms
        weights = None if weights is None else weights.astype(form.states.dtype)
        starts, moves, states = markov.expected_counts(form, x, weights)
        evidence = jnp.sum(jnp.where(x.inside(), terms.values, 0), axis=1)
        return HMMStats(
            initial=starts + _PSEUDO_COUNT * self.start(params),
            transitions=moves + _PSEUDO_COUNT * params.transition,
            emissions=observations.statistics(self.family, params.emissions, x, states),
            loglik=numerics.weighted_sum(evidence, weights),
        )

    def e_step(self, params: HMMParams, x: Data, weights: jax.Array | None = None, expect: Any = Exact()) -> HMMStats:
        """Expected starts, moves and observation statistics, and the sum of log p(x) over the sequences."""
        x = checks.present(self.units(x), weights)
        return self.statistics(params, x, markov.ask(expect)(self, params, x), weights)

    def m_step(self, stats: HMMStats) -> HMMParams:
        """Shares of the starts and of the moves from every state (with priors: their modes); the family's M-step."""
        initial, transition = self._tables.maximum(stats.initial, stats.transitions)
        return HMMParams(initial=initial, transition=transition, emissions=self.family.m_step(stats.emissions))

    def m_step_given(self, stats: HMMStats, *, transition: jax.Array) -> HMMParams:
        """The M-step with the transitions held, where the initial distribution follows from them."""
        transition = jnp.broadcast_to(transition, stats.transitions.shape)
        initial = stationary_distribution(transition)
        return HMMParams(initial=initial, transition=transition, emissions=self.family.m_step(stats.emissions))

    def blocks(self, params: HMMParams) -> tuple[str, ...]:
        """Names of parameters with a conditional M-step of their own: "transition", "emissions.mean", ..."""
        inside = tuple(f"emissions.{name}" for name in constraints.blocks(self.family, params.emissions))
        chain = ("transition",) if self.stationary else ("initial", "transition")
        return (*chain, *(inside or ("emissions",)))

    def m_step_for(self, params: HMMParams, stats: HMMStats, names: tuple[str, ...]) -> HMMParams:
        """The M-step over the named blocks alone, all other parameters held where they are."""
        inside = tuple(name.removeprefix("emissions.") for name in names if name.startswith("emissions."))
        if inside:
            emissions = constraints.m_step_for(self.family, params.emissions, stats.emissions, inside)
        else:
            emissions = self.family.m_step(stats.emissions) if "emissions" in names else params.emissions
        new, moved = self.m_step(stats), "transition" in names
        begun = "initial" in names or (self.stationary and moved)
        return HMMParams(
            initial=new.initial if begun else params.initial,
            transition=new.transition if moved else params.transition,
            emissions=emissions,
        )

    def q_function(self, params: HMMParams, stats: HMMStats) -> jax.Array:
        """sum initial log initial + sum transitions log transition + the family's Q."""
        chain = self._tables.expected_log(params.initial, params.transition, stats.initial, stats.transitions)
        return chain + self.family.q_function(params.emissions, stats.emissions)

    def log_prior(self, params: HMMParams) -> jax.Array:
        """Log-density of the priors on chain and emissions; 0 without any."""
        return self.family.log_prior(params.emissions) + self._tables.log_prior(params.initial, params.transition)

    def rebase(self, stats: HMMStats, params: HMMParams) -> HMMStats:
        """The same statistics about the reference of `params`, where the family has one."""
        if not hasattr(self.family, "rebase"):
            return stats
        return dataclasses.replace(stats, emissions=self.family.rebase(stats.emissions, params.emissions))

    def degenerate(self, stats: HMMStats, held: tuple[str, ...] = ()) -> jax.Array:
        """States (K,) that are never visited, or whose observations collapsed; none where emissions are held."""
        found = self.family.degenerate(stats.emissions)
        return jnp.zeros_like(found) if "emissions" in held else found

    log_prob = queries.log_prob
    filter = queries.filtered
    smooth = posterior = queries.smoothed
    viterbi = predict = queries.likeliest
    forecast = queries.forecast
    sample = queries.sample
    sample_with_states = queries.sample_with_states

    def num_parameters(self, params: HMMParams) -> int:
        """Free parameters; without a support no probability is taken for a hard zero."""
        self.check_count(params)
        return sum(self.degrees(params).values())

    def degrees(self, params: HMMParams) -> dict[str, int]:
        """Free parameters by name."""
        return {**self._tables.degrees(self.num_states), "emissions": self.family.num_parameters(params.emissions)}

    def sample_size(self, x: Data, weights: jax.Array | None = None) -> jax.Array:
        """What information criteria count: the steps of all sequences."""
        x = self.units(x)
        steps = jnp.sum(x.inside(), axis=1).astype(tree.float_dtype(x.values))
        return numerics.weighted_sum(steps, weights)

    def unconstrain(self, params: HMMParams) -> HMMParams:
        """Continuation ratios of the chain's probabilities, the family's own coordinates for the emissions."""
        initial, transition = self._tables.unconstrain(params.initial, params.transition)
        return HMMParams(initial=initial, transition=transition, emissions=self.family.unconstrain(params.emissions))

    def constrain(self, theta: HMMParams) -> HMMParams:
        """Inverse of `unconstrain`."""
        initial, transition = self._tables.constrain(theta.initial, theta.transition)
        return HMMParams(initial=initial, transition=transition, emissions=self.family.constrain(theta.emissions))

    def check(self, x: Data, weights: jax.Array | None = None) -> None:
        """Raise ValueError or TypeError for bad data, by name. Under jit only shapes are looked at."""
        checks.complete_family(self.family)
        observations.check(self.family, checks.present(sequences.check(x, weights), weights), self.num_states)

    def params_like(self, x: Data) -> HMMParams:
        """The shapes that parameters have for such data."""
        x = self.units(x)
        initial, transition = self._tables.params_like(self.num_states, tree.float_dtype(x.values))
        emissions = observations.params_like(self.family, x, self.num_states)
        return HMMParams(initial=initial, transition=transition, emissions=emissions)

    @property
    def supports(self) -> parameters.Supports:
        """Where the values of parameters lie."""
        emissions = getattr(self.family, "supports", {})
        return {"initial": parameters.simplex, "transition": parameters.simplex, "emissions": emissions}

    def check_held(self, values: dict[str, Any]) -> None:
        """Raise ValueError for chain probabilities, to be held fixed, that are no distributions."""
        self._tables.check_held(self.num_states, values)

    def floats_per_row(self, params: HMMParams, x: Data) -> int:
        """Temporaries of an E-step, in numbers a sequence."""
        states = self.num_states**2 if self.parallel else self.num_states
        return self.units(x).num_steps * (6 * states + self.family.floats_per_row(params.emissions))

    def coarse(self) -> "HMM":
        """The same model in its cheapest arithmetic, for the bulk of many restarts."""
        family = self.family.coarse() if hasattr(self.family, "coarse") else self.family
        form = "scaled" if self.form == "auto" else self.form
        found = dataclasses.replace(self, family=family, form=form)
        return self if family is self.family and form == self.form else found

    @property
    def _tables(self) -> markov.Tables:
        initial = markov.Probabilities(self.initial_prior, self.initial_support)
        transition = markov.Probabilities(self.transition_prior, self.transition_support)
        return markov.Tables(initial, transition, self.stationary)

    def start(self, params: HMMParams) -> jax.Array:
        """p(z_1 = k) (K,)."""
        return self._tables.start(params.initial, params.transition)

    def check_count(self, params: HMMParams) -> None:
        """Raise unless parameters are an HMM's, with as many states."""
        initial = params.initial if isinstance(params, HMMParams) else None
        parameters.count_of("params.initial", initial, self.num_states)

    def chain(self, params: HMMParams, x: Sequences) -> markov.Chain:
        """The chain with the likelihoods of the observations."""
        params = tree.no_whole_numbers(params, x.values)
        parameters.shapes("params", self, params, x)
        links = x.links()
        return markov.Chain(
            initial=self.start(params),
            transition=params.transition,
            log_likelihood=observations.log_likelihood(self.family, params.emissions, x, self.num_states),
            linked=None if links is None else x.lanes(links),
        )
