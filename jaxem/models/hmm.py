"""Hidden Markov models with observations of any family."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .. import capabilities, checks, latents, numerics, parameters, seeding, sequences, tree
from ..latents import Exact, markov
from ..latents.markov import observations, queries
from ..parts import Probabilities, Variational, assembly
from ..priors import Dirichlet
from ..protocols import Data, Family, Params, Stats
from ..record import fields, record, static
from ..sequences import Sequences
from ..slots import Expect
from .imputation import impute_steps

# Small enough to vanish beside any real count: a state that is never left keeps the transitions that it had.
_PSEUDO_COUNT = 1e-18


@record
class HMMParams:
    """initial (K,): p(z_1 = k)
    transition (K, K): p(z_(t+1) = j | z_t = i), in row i and column j
    emissions: the family's parameters

    For an `HMM(Variational(family), K)`, initial and transition are the `Dirichlet` posteriors of these.
    """

    initial: Any
    transition: Any
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


@capabilities.completed("model")
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
    stationary: the initial distribution is the transitions' stationary one, and no parameter of its own: `initial` of
        given parameters is ignored.
    parallel: whether the E-step is an associative scan over products of transition matrices, of depth log T and K times
        the work: for long sequences on accelerators. Evidence of a step is then a difference of
        log-likelihoods of all steps so far, with their rounding.
    form: "scaled", "log" or "auto", the arithmetic of the recursions; see `jaxem/latents/markov`.

    Data: one sequence, the family's rows in order (T, ...); a batch (B, T, ...), its arrays of three axes; or
    `Sequences` of any lengths. A step of which every entry is NaN is missing and integrated out for any family,
    and so are single entries where the family takes them. Weights (B,) count sequences.

    `HMM(Variational(family), K)` is variational Bayesian EM: the initial distribution and every row of transitions have
    Dirichlet posteriors too, under flat priors where none are given, and enter recursions as exp(E[log p]). The
    objective is the complete bound of log p(x); `expected(params)` gives parameters of the plain HMM. A stationary
    start has no conjugate prior: transitions are then point estimates. MacKay (1997), Ensemble learning for hidden
    Markov models; Beal (2003), Variational algorithms for approximate Bayesian inference, chapter 3.
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
        if capabilities.complete("part", self.family).extra_components:
            raise TypeError(f"{type(self.family).__name__} adds a component of its own, which a chain has no state for")
        if self.stationary and (self.initial_prior is not None or self.initial_support is not None):
            raise ValueError("stationary leaves no initial distribution to put a prior or a support on: leave it out")
        initial, transition = self._tables
        initial.check_support("initial_support")
        transition.check_support("transition_support")

    @property
    def _tables(self) -> tuple[Probabilities, Probabilities]:
        """The initial distribution (K,), and the rows of transitions (K, K), as parts."""
        count = self.num_states
        initial = Probabilities(prior=self.initial_prior, support=self.initial_support, shape=(count,))
        return initial, Probabilities(
            prior=self.transition_prior, support=self.transition_support, shape=(count, count)
        )

    @property
    def parts(self) -> dict[str, Any]:
        """The start, the transitions, and the emissions; a stationary start is no part of its own."""
        initial, transition = self._tables
        emissions = {"emissions": capabilities.complete("part", self.family)}
        if self.stationary:
            return {"transition": markov.StationaryTransitions(transition), **emissions}
        tables = {"initial": initial, "transition": transition}
        if self._distributed:
            return {**{name: Variational(table) for name, table in tables.items()}, **emissions}
        return {**tables, **emissions}

    @property
    def _distributed(self) -> bool:
        """Whether initial distribution and transitions have posteriors, as the parameters of the emissions have."""
        return not self.stationary and capabilities.complete("part", self.family).distributed

    def params_of(self, values: dict[str, Any]) -> HMMParams:
        """Parameters from those of every part."""
        if self.stationary:
            values = {**values, "initial": markov.stationary_distribution(values["transition"])}
        return HMMParams(**values)

    def part_statistics(self, stats: HMMStats) -> dict[str, Any]:
        """The statistics that every part is estimated from."""
        if self.stationary:
            return {"transition": (stats.initial, stats.transitions), "emissions": stats.emissions}
        return {"initial": stats.initial, "transition": stats.transitions, "emissions": stats.emissions}

    def with_part_statistics(self, stats: HMMStats, of: dict[str, Any]) -> HMMStats:
        """Statistics with these of the emissions; counts of the chain have no reference, so `rebase` leaves them."""
        return dataclasses.replace(stats, emissions=of["emissions"])

    part_params = assembly.part_params
    m_step, q_function, log_prior, rebase = assembly.surrogate
    expands, expanded = property(assembly.expands), assembly.expanded
    expected = assembly.expected
    unconstrain, constrain = assembly.coordinates
    blocks, m_step_for, degenerate, degrees, num_parameters, check_held = assembly.pieces

    @property
    def supports(self) -> parameters.Supports:
        """Where the values of parameters lie."""
        return {"initial": parameters.simplex, **assembly.supports(self)}

    @property
    def separable(self) -> tuple[str, ...]:
        return ("emissions",) if self.stationary else ("initial", "transition", "emissions")

    def units(self, x: Data) -> Sequences:
        """The data as `Sequences`: an axis of independent sequences first."""
        return sequences.as_sequences(x)

    @seeding.start(*seeding.METHODS)
    @functools.partial(jax.jit, static_argnames="method")
    def init(self, key: jax.Array, x: Data, weights: jax.Array | None = None, *, method: str = "k-means++") -> Params:
        """A random start (pure in `key`, so `vmap` over keys gives many).

        method: as for `Mixture`: steps are assigned to states as rows are to components, whatever their order. Starts
        and transitions are then counted, each with 1 added.
        """
        x, weights = tree.present(tree.one_precision(x), weights)
        initial, transition = self._tables
        starts, moves, emissions = observations.start(key, self.family, x, weights, self.num_states, method)
        stats = HMMStats(
            initial=initial.on_support(starts + 1),
            transitions=transition.on_support(moves + 1),
            emissions=None,
            loglik=jnp.zeros((), starts.dtype),
        )
        of = self.part_statistics(stats)
        tables = {name: part.m_step(of[name]) for name, part in self.parts.items() if name != "emissions"}
        return self.params_of({**tables, "emissions": emissions})

    def infer(self, params: HMMParams, x: Data, expect: Expect = Exact()) -> markov.Posterior:
        """The posterior of the states: its `states`, `pairs`, and `evidence`, log p(x) of every sequence."""
        every = self.units(x)
        form, evidence = markov.infer(self.chain(params, every), expect, self.form, self.parallel)
        return markov.Posterior(form=form, terms=every.holding(evidence), alone=sequences.is_one(x))

    def statistics(
        self, params: HMMParams, x: Data, posterior: markov.Distribution, weights: jax.Array | None = None
    ) -> HMMStats:
        """Expected starts, moves and observation statistics under any distribution of the states; loglik is the
        sum of its evidence, or of log p(x) at `params` where it has none."""
        x = self.units(x)
        form, terms = posterior.along(x)
        x = checks.present(x, weights)
        params = tree.no_whole_numbers(params, x.values)
        terms = queries.evidence(self, params, x) if terms is None else terms
        weights = None if weights is None else weights.astype(form.states.dtype)
        starts, moves, states = markov.expected_counts(form, x, weights)
        initial, transition = self.tables(params)
        evidence = jnp.sum(jnp.where(x.inside(), terms.values, 0), axis=1)
        return HMMStats(
            initial=starts + _PSEUDO_COUNT * initial,
            transitions=moves + _PSEUDO_COUNT * transition,
            emissions=observations.statistics(self.family, params.emissions, x, states),
            loglik=numerics.weighted_sum(evidence, weights),
        )

    e_step = latents.e_step

    def m_step_given(self, stats: HMMStats, *, transition: jax.Array) -> HMMParams:
        """The M-step of a stationary chain with the transitions held; the initial distribution follows from them."""
        transition = jnp.broadcast_to(transition, stats.transitions.shape)
        emissions = self.parts["emissions"].m_step(stats.emissions)
        return self.params_of({"transition": transition, "emissions": emissions})

    log_prob = queries.log_prob
    filter = queries.filtered
    smooth = posterior = queries.smoothed
    viterbi = predict = queries.likeliest
    forecast = queries.forecast
    sample = queries.sample
    sample_with_states = queries.sample_with_states
    impute = impute_steps

    def sample_size(self, x: Data, weights: jax.Array | None = None) -> jax.Array:
        """What information criteria count: the steps of all sequences."""
        x = self.units(x)
        steps = jnp.sum(x.inside(), axis=1).astype(tree.float_dtype(x.values))
        return numerics.weighted_sum(steps, weights)

    def check(self, x: Data, weights: jax.Array | None = None) -> None:
        """Raise ValueError or TypeError for bad data, by name. Under jit only shapes are looked at."""
        checks.complete_family(self.family)
        observations.check(self.family, checks.present(sequences.check(x, weights), weights), self.num_states)

    def params_like(self, x: Data) -> HMMParams:
        """The shapes that parameters have for such data."""
        x, count = self.units(x), self.num_states
        dtype = tree.float_dtype(x.values)
        initial, transition = (parameters.like((count,) * axes, dtype) for axes in (1, 2))
        return HMMParams(
            initial=Dirichlet(initial) if self._distributed else initial,
            transition=Dirichlet(transition) if self._distributed else transition,
            emissions=observations.params_like(self.family, x, count),
        )

    def floats_per_row(self, params: HMMParams, x: Data) -> int:
        """Temporaries of an E-step, in numbers a sequence."""
        states = self.num_states**2 if self.parallel else self.num_states
        return self.units(x).num_steps * (6 * states + self.family.floats_per_row(params.emissions))

    def coarse(self) -> "HMM":
        """The same model in its cheapest arithmetic, for the bulk of many restarts."""
        family = capabilities.original(self.parts["emissions"].coarse())
        form = "scaled" if self.form == "auto" else self.form
        found = dataclasses.replace(self, family=family, form=form)
        return self if family is self.family and form == self.form else found

    def without_missing(self) -> "HMM":
        """The model for steps without missing entries; itself unless columns of the family are correlated."""
        emissions = self.parts["emissions"]
        family = capabilities.original(emissions.without_missing()) if emissions.correlated else self.family
        return self if family is self.family else dataclasses.replace(self, family=family)

    def tables(
        self, params: HMMParams, read: Callable[[Dirichlet], jax.Array] = Dirichlet.weighed
    ) -> tuple[jax.Array, jax.Array]:
        """p(z_1 = k) (K,), and the rows of transitions (K, K); of Dirichlet posteriors what `read` gives,
        exp(E[log p]) by default."""
        if self._distributed:
            return read(params.initial), read(params.transition)
        initial = markov.stationary_distribution(params.transition) if self.stationary else params.initial
        return initial, params.transition

    def check_count(self, params: HMMParams) -> None:
        """Raise unless parameters are an HMM's, with as many states."""
        initial = fields(params).get("initial")
        initial = fields(initial).get("concentration") if self._distributed else initial
        parameters.count_of("params.initial", initial, self.num_states)

    def chain(self, params: HMMParams, x: Sequences) -> markov.Chain:
        """The chain with the likelihoods of the observations."""
        params = tree.no_whole_numbers(params, x.values)
        parameters.shapes("params", self, params, x)
        links = x.links()
        initial, transition = self.tables(params)
        return markov.Chain(
            initial=initial,
            transition=transition,
            log_likelihood=observations.log_likelihood(self.family, params.emissions, x, self.num_states),
            linked=None if links is None else x.lanes(links),
        )
