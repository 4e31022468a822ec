"""Hidden Markov models with observations of any family."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from .. import checks, numerics, parameters, seeding, sequences, tree
from ..latents import Exact, markov
from ..latents.markov import emissions as observations
from ..latents.markov import probabilities
from ..latents.markov.stationary import stationary_distribution, stationary_maximum
from ..parts import statements as constraints
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
    Raises TypeError or ValueError for a num_states below 1, a support that leaves a state no way on, or an unknown
    form.
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
        if self.stationary and (self.initial_prior is not None or self.initial_support is not None):
            raise ValueError("stationary leaves no initial distribution to put a prior or a support on: leave it out")
        count = self.num_states
        probabilities.check_support("initial_support", self.initial_support, (count,))
        probabilities.check_support("transition_support", self.transition_support, (count, count))

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
        rows, seen = x.rows()
        dtype = tree.float_dtype(x.values)
        each = seen.astype(dtype)
        if weights is not None:
            each = each * jnp.tile(weights.astype(dtype), x.num_steps)
        share = seeding.shares(key, self.family, rows, each, self.num_states, method)
        emissions = seeding.family_stats(self.family, rows, share, each, self.num_states, seeding.SMOOTHING)
        states = seeding.responsibilities(share, self.num_states, seeding.SMOOTHING, dtype)
        states = (states * each).reshape(self.num_states, x.num_steps, x.num_rows)
        links = x.links(dtype)
        before = states[:, :-1] * (jnp.ones((), dtype) if links is None else links)
        starts = jnp.sum(states * x.starts().T, axis=(1, 2))
        stats = HMMStats(
            initial=self._initial.within(starts + 1),
            transitions=self._transition.within(numerics.product(before, states[:, 1:], "itb,jtb->ij") + 1),
            emissions=emissions,
            loglik=jnp.zeros((), dtype),
        )
        return self.m_step(stats)

    def infer(self, params: HMMParams, x: Data, expect: Any = Exact()) -> markov.Posterior:
        """The posterior of the states: its `states`, `pairs`, and `evidence`, log p(x) of every sequence."""
        given, x = x, self.units(x)
        form, evidence = markov.infer(self._chain(params, x), expect, self.form, self.parallel)
        alone = sequences.is_one(given)
        return markov.Posterior(form=form, terms=_along(x, evidence), alone=alone)

    def statistics(
        self,
        params: HMMParams,
        x: Data,
        posterior: markov.Posterior | markov.ChainPosterior,
        weights: jax.Array | None = None,
    ) -> HMMStats:
        """Expected starts, moves and observation statistics under any distribution of the states.

        loglik is the sum of the posterior's evidence, and that of `params` where it has none.
        """
        x = self.units(x)
        form, terms = posterior.along(x)
        x = checks.present(x, weights)
        params = tree.no_whole_numbers(params, x.values)
        terms = self._evidence(params, x) if terms is None else terms
        states = form.states.reshape(x.num_steps, self.num_states, x.num_rows)
        weights = None if weights is None else weights.astype(states.dtype)
        moves = form.moves(None if weights is None else x.lanes(weights))
        if weights is not None:
            states = jnp.where(weights > 0, states * weights, 0)
        begins = jnp.sum(states[0] if x.ids is None else jnp.sum(states * x.starts().T[:, None], axis=0), axis=-1)
        evidence = jnp.sum(jnp.where(x.inside(), terms.values, 0), axis=1)
        return HMMStats(
            initial=begins + _PSEUDO_COUNT * self._start(params),
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
        if self.stationary:
            moves = self._transition.counted(stats.transitions)
            return self.m_step_given(stats, transition=stationary_maximum(moves, stats.initial))
        return HMMParams(
            initial=self._initial.maximum(stats.initial),
            transition=self._transition.maximum(stats.transitions),
            emissions=self.family.m_step(stats.emissions),
        )

    def m_step_given(self, stats: HMMStats, *, transition: jax.Array) -> HMMParams:
        """The M-step with the transitions held, where the initial distribution follows from them."""
        transition = jnp.broadcast_to(transition, stats.transitions.shape)
        return HMMParams(
            initial=stationary_distribution(transition),
            transition=transition,
            emissions=self.family.m_step(stats.emissions),
        )

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
        new = self.m_step(stats)
        moved = "transition" in names
        return HMMParams(
            initial=new.initial if "initial" in names or (self.stationary and moved) else params.initial,
            transition=new.transition if moved else params.transition,
            emissions=emissions,
        )

    def q_function(self, params: HMMParams, stats: HMMStats) -> jax.Array:
        """sum initial log initial + sum transitions log transition + the family's Q."""
        return (
            self._initial.expected_log(self._start(params), stats.initial)
            + self._transition.expected_log(params.transition, stats.transitions)
            + self.family.q_function(params.emissions, stats.emissions)
        )

    def log_prior(self, params: HMMParams) -> jax.Array:
        """Log-density of the priors on chain and emissions; 0 without any."""
        chain = self._initial.log_prior(params.initial) + self._transition.log_prior(params.transition)
        return self.family.log_prior(params.emissions) + chain

    def rebase(self, stats: HMMStats, params: HMMParams) -> HMMStats:
        """The same statistics about the reference of `params`, where the family has one."""
        if not hasattr(self.family, "rebase"):
            return stats
        return dataclasses.replace(stats, emissions=self.family.rebase(stats.emissions, params.emissions))

    def degenerate(self, stats: HMMStats, held: tuple[str, ...] = ()) -> jax.Array:
        """States (K,) that are never visited, or whose observations collapsed; none where emissions are held."""
        found = self.family.degenerate(stats.emissions)
        return jnp.zeros_like(found) if "emissions" in held else found

    @parameters.at_rows
    @jax.jit
    def log_prob(self, params: HMMParams, x: Data) -> jax.Array:
        """Log-likelihood log p(x) of every sequence: (B,), or (num_sequences,) where they are packed."""
        terms = self._evidence(params, self.units(x))
        return terms.per_sequence(terms.values)

    @parameters.at_rows
    @jax.jit
    def filter(self, params: HMMParams, x: Data) -> jax.Array:
        """p(z_t = k | x_1..t): (T, K) for one sequence, (B, T, K) for several; 0 in the padding."""
        return self.units(x).in_layout(self._filtered(params, x), 0, sequences.is_one(x))

    @parameters.at_rows
    @jax.jit
    def smooth(self, params: HMMParams, x: Data) -> jax.Array:
        """p(z_t = k | x_1..T): (T, K) for one sequence, (B, T, K) for several; 0 in the padding."""
        return self.infer(params, x).states

    posterior = smooth

    @parameters.at_rows
    @jax.jit
    def viterbi(self, params: HMMParams, x: Data) -> jax.Array:
        """The likeliest path of states: (T,) for one sequence, (B, T) for several; -1 in the padding."""
        path, _ = markov.decode(self._chain(params, self.units(x)))
        return self.units(x).in_layout(path, -1, sequences.is_one(x))

    predict = viterbi

    @parameters.at_rows
    @functools.partial(jax.jit, static_argnames="steps")
    def forecast(self, params: HMMParams, x: Data, steps: int) -> jax.Array:
        """p(z_T+h = k | x_1..T) for h = 1..steps after the end: (steps, K) for one sequence, (B, steps, K) for several.

        A forecast of observations is the mixture of the emissions with these weights. Packed sequences are taken
        one by one: (num_sequences, steps, K).
        """
        checks.positive_integer("steps", steps)
        every = self.units(x)
        filtered = self._filtered(params, x).reshape(every.num_steps, self.num_states, every.num_rows)
        ahead = markov.ahead(every.at_ends(filtered), params.transition, steps)
        return ahead[:, 0] if sequences.is_one(x) else jnp.moveaxis(ahead, 0, 1)

    def sample(self, key: jax.Array, params: HMMParams, n: int, num_sequences: int | None = None) -> Data:
        """A sequence of n steps (n, ...), or num_sequences of them (B, n, ...). `sample_with_states` tells states."""
        return self.sample_with_states(key, params, n, num_sequences)[0]

    def sample_with_states(
        self, key: jax.Array, params: HMMParams, n: int, num_sequences: int | None = None
    ) -> tuple[Data, jax.Array]:
        """Sequences, and the states (n,), or (B, n), that they went through."""
        checks.positive_integer("n", n)
        count = 1 if num_sequences is None else num_sequences
        checks.positive_integer("num_sequences", count)
        self._count(params)
        params = tree.no_whole_numbers(params, params)
        key_start, key_moves, key_rows = jax.random.split(checks.random_key(key), 3)
        states = markov.walk(key_start, key_moves, self._start(params), params.transition, (count, n))
        rows = self.family.sample(key_rows, params.emissions, states.ravel())
        x = jax.tree.map(lambda leaf: leaf.reshape(count, n, *leaf.shape[1:]), rows)
        return (x, states) if num_sequences is not None else jax.tree.map(lambda leaf: leaf[0], (x, states))

    def num_parameters(self, params: HMMParams) -> int:
        """Free parameters: of the start, of every row of transitions, and the emissions'. Supports count, and
        without one no entry is taken for a hard zero."""
        self._count(params)
        return sum(self.degrees(params).values())

    def degrees(self, params: HMMParams) -> dict[str, int]:
        """Free parameters by name."""
        count = self.num_states
        return {
            "initial": 0 if self.stationary else self._initial.degrees((count,)),
            "transition": self._transition.degrees((count, count)),
            "emissions": self.family.num_parameters(params.emissions),
        }

    def sample_size(self, x: Data, weights: jax.Array | None = None) -> jax.Array:
        """What information criteria count: the steps of all sequences."""
        x = self.units(x)
        steps = jnp.sum(x.inside(), axis=1).astype(tree.float_dtype(x.values))
        return numerics.weighted_sum(steps, weights)

    def unconstrain(self, params: HMMParams) -> HMMParams:
        """Continuation ratios of the chain's probabilities, the family's own coordinates for the emissions."""
        free = not self.stationary
        return HMMParams(
            initial=self._initial.unconstrain(params.initial) if free else jnp.zeros((0,), params.initial.dtype),
            transition=self._transition.unconstrain(params.transition),
            emissions=self.family.unconstrain(params.emissions),
        )

    def constrain(self, theta: HMMParams) -> HMMParams:
        """Inverse of `unconstrain`."""
        transition = self._transition.constrain(theta.transition)
        return HMMParams(
            initial=stationary_distribution(transition) if self.stationary else self._initial.constrain(theta.initial),
            transition=transition,
            emissions=self.family.constrain(theta.emissions),
        )

    def check(self, x: Data, weights: jax.Array | None = None) -> None:
        """Raise ValueError or TypeError for bad data, by name. Under jit only shapes are looked at."""
        checks.complete_family(self.family)
        x = checks.present(sequences.check(x, weights), weights)
        if checks.is_concrete(x):
            with jax.ensure_compile_time_eval():  # concrete data can be looked at while something else is traced
                observations.check(self.family, x, self.num_states)
        else:
            self.family.check(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), x.values))

    def params_like(self, x: Data) -> HMMParams:
        """The shapes that parameters have for such data."""
        x = self.units(x)
        count, dtype = self.num_states, tree.float_dtype(x.values)
        steps = jax.tree.map(lambda leaf: parameters.like(leaf.shape[1:], leaf.dtype), x.values)
        return HMMParams(
            initial=parameters.like((count,), dtype),
            transition=parameters.like((count, count), dtype),
            emissions=seeding.params_like(self.family, steps, count),
        )

    @property
    def supports(self) -> parameters.Supports:
        """Where the values of parameters lie."""
        emissions = getattr(self.family, "supports", {})
        return {"initial": parameters.simplex, "transition": parameters.simplex, "emissions": emissions}

    def check_held(self, values: dict[str, Any]) -> None:
        """Raise ValueError for chain probabilities, to be held fixed, that are no distributions."""
        count = self.num_states
        probabilities.check_held("initial", values.get("initial"), (count,))
        probabilities.check_held("transition", values.get("transition"), (count, count))

    def floats_per_row(self, params: HMMParams, x: Data) -> int:
        """Temporaries of an E-step, in numbers a sequence."""
        states = self.num_states**2 if self.parallel else self.num_states
        return self.units(x).num_steps * (6 * states + self.family.floats_per_row(params.emissions))

    def coarse(self) -> "HMM":
        """The same model in its cheapest arithmetic, for the bulk of many restarts."""
        family = self.family.coarse() if hasattr(self.family, "coarse") else self.family
        form = "scaled" if self.form == "auto" else self.form
        same = family is self.family and form == self.form
        return self if same else dataclasses.replace(self, family=family, form=form)

    @property
    def _initial(self) -> markov.Probabilities:
        return markov.Probabilities(self.initial_prior, self.initial_support)

    @property
    def _transition(self) -> markov.Probabilities:
        return markov.Probabilities(self.transition_prior, self.transition_support)

    def _start(self, params: HMMParams) -> jax.Array:
        """p(z_1 = k) (K,)."""
        return stationary_distribution(params.transition) if self.stationary else params.initial

    def _count(self, params: HMMParams) -> None:
        """Raise unless parameters are an HMM's, with as many states."""
        initial = params.initial if isinstance(params, HMMParams) else None
        parameters.count_of("params.initial", initial, self.num_states)

    def _chain(self, params: HMMParams, x: Sequences) -> markov.Chain:
        params = tree.no_whole_numbers(params, x.values)
        parameters.shapes("params", self, params, x)
        links = x.links()
        return markov.Chain(
            initial=self._start(params),
            transition=params.transition,
            log_likelihood=observations.log_likelihood(self.family, params.emissions, x, self.num_states),
            linked=None if links is None else x.lanes(links),
        )

    def _filtered(self, params: HMMParams, x: Data) -> jax.Array:
        """p(z_t = k | x_1..t) (T, K[, B])."""
        return jnp.exp(markov.log_filter(self._chain(params, self.units(x)), self.form, self.parallel)[0])

    def _evidence(self, params: HMMParams, x: Sequences) -> Sequences:
        """log p(x_t | x_1..t-1) of every step (B, T)."""
        return _along(x, markov.log_filter(self._chain(params, x), self.form, self.parallel)[1])


def _along(x: Sequences, evidence: jax.Array) -> Sequences:
    """Terms (T[, B]) of evidence, as sequences like the data's."""
    return dataclasses.replace(x, values=evidence.reshape(x.num_steps, x.num_rows).T, complete=None)
