"""Hidden Markov models with observations of any family."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import checks, numerics, parameters, seeding, sequences, tree
from ..latents import Exact, markov
from ..latents.stationary import stationary_distribution, stationary_maximum
from ..parts import statements as constraints
from ..priors import Dirichlet
from ..protocols import Data, Family, Params, Stats
from ..record import record, static
from ..sequences import Sequences

# Small enough to vanish beside any real count: a state that is never left keeps the transitions that it had.
_PSEUDO_COUNT = 1e-18

# Bytes of temporaries beyond which observations are looked at in blocks.
_LARGE = 1 << 26


@record
class HMMParams:
    """initial (K,): p(z_1); transition (K, K): p(z_t+1 = j | z_t = i), rows from; emissions: the family's."""

    initial: jax.Array
    transition: jax.Array
    emissions: Params


@record
class HMMStats:
    """initial (K,): expected sequences that start in each state; transitions (K, K): expected moves from i to j;
    emissions: the family's statistics, their `count` (K,) the expected steps in each state; loglik."""

    initial: jax.Array
    transitions: jax.Array
    emissions: Stats
    loglik: jax.Array


@record(kw_only=False)
class HMM:
    """p(x, z) = initial_z1 prod_t transition_z(t-1),z(t) prod_t p(x_t | z_t), for any family of observations.

    family: of the observations, as in `HMM(Normal("diag"), 3)`; regressions with lagged responses among their
    features are autoregressive, with inputs an input-driven HMM. num_states: K.
    initial_prior, transition_prior: a Dirichlet, its concentration a scalar, (K,), or for transitions (K, K):
    1 + kappa on the diagonal is a sticky prior. transition_support (K, K), initial_support (K,): where False (0),
    starts put a hard zero. Zeros stay zero through EM, wherever they come from.
    stationary: the initial distribution is the transitions' stationary one, and no parameter of its own: what
    parameters hold in its place is not looked at.
    parallel: whether the E-step works by products of whole transition matrices, in log T rounds, K times the work:
    for long sequences on accelerators. Sums of logarithms then carry the rounding of the whole sequence's.
    form: "scaled", "log" or "auto", the arithmetic of the recursions; see `jaxem/latents/markov.py`.

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
        for name, shape in (("initial_support", (self.num_states,)), ("transition_support", (self.num_states,) * 2)):
            value = getattr(self, name)
            if value is None or not checks.is_known(value):
                continue
            if np.shape(value) != shape or not np.all(np.any(np.asarray(value) != 0, axis=-1)):
                raise ValueError(f"{name} must have shape {shape}, with a nonzero entry in every row; got {value}")

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
        rows, seen = _rows(x)
        dtype = tree.float_dtype(x.values)
        each = seen.astype(dtype)
        if weights is not None:
            each = each * jnp.tile(weights.astype(dtype), x.num_steps)
        share = seeding.shares(key, self.family, rows, each, self.num_states, method)
        emissions = seeding.family_stats(self.family, rows, share, each, self.num_states, seeding.SMOOTHING)
        states = seeding.responsibilities(share, self.num_states, seeding.SMOOTHING, dtype)
        states = (states * each).reshape(self.num_states, x.num_steps, x.num_rows)
        moves = _linked(x, dtype)
        moves = jnp.ones((), dtype) if moves is None else moves
        stats = HMMStats(
            initial=jnp.sum(states * x.starts().T, axis=(1, 2)) + 1,
            transitions=numerics.product(states[:, :-1] * moves, states[:, 1:], "itb,jtb->ij") + 1,
            emissions=emissions,
            loglik=jnp.zeros((), dtype),
        )
        if self.initial_support is not None:
            stats = dataclasses.replace(stats, initial=jnp.where(self.initial_support, stats.initial, 0))
        if self.transition_support is not None:
            stats = dataclasses.replace(stats, transitions=jnp.where(self.transition_support, stats.transitions, 0))
        return self.m_step(stats)

    def e_step(self, params: HMMParams, x: Data, weights: jax.Array | None = None, expect: Any = Exact()) -> HMMStats:
        """Expected starts, moves and observation statistics, and the sum of log p(x) over the sequences."""
        x = checks.present(self.units(x), weights)
        params = tree.no_whole_numbers(params, x.values)
        rows, seen = _rows(x)
        chain = self._chain(params, x, rows, seen)
        dtype = chain.log_likelihood.dtype
        weights = None if weights is None else weights.astype(dtype)

        counted = _linked(x, dtype)
        if weights is not None:
            moving = jnp.broadcast_to(weights, (x.num_steps - 1, x.num_rows))
            counted = moving if counted is None else counted * moving
        posterior = markov.infer(chain, expect, _lanes(counted, x), self.form, self.parallel)
        states = posterior.states.reshape(x.num_steps, self.num_states, x.num_rows)
        if weights is not None:
            states = jnp.where(weights > 0, states * weights, 0)
        begins = jnp.sum(states[0] if x.ids is None else jnp.sum(states * x.starts().T[:, None], axis=0), axis=-1)
        responsibilities = jnp.moveaxis(states, 1, 0).reshape(self.num_states, -1) * seen
        evidence = posterior.evidence.reshape(x.num_steps, x.num_rows)
        evidence = jnp.sum(jnp.where(x.inside().T, evidence, 0), axis=0)
        return HMMStats(
            initial=begins + _PSEUDO_COUNT * chain.initial,
            transitions=posterior.transitions + _PSEUDO_COUNT * params.transition,
            emissions=self._family_stats(x, params.emissions, rows, responsibilities),
            loglik=numerics.weighted_sum(evidence, weights),
        )

    def m_step(self, stats: HMMStats) -> HMMParams:
        """Shares of the starts and of the moves from every state (with priors: their modes); the family's M-step."""
        moves = _with_prior(stats.transitions, self.transition_prior, self.transition_support)
        if self.stationary:
            return self.m_step_given(stats, transition=stationary_maximum(moves, stats.initial))
        transition = _shares(moves)
        initial = _shares(_with_prior(stats.initial, self.initial_prior, self.initial_support))
        return HMMParams(initial=initial, transition=transition, emissions=self.family.m_step(stats.emissions))

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
            _expected_log(stats.initial, self._start(params))
            + _expected_log(stats.transitions, params.transition)
            + self.family.q_function(params.emissions, stats.emissions)
        )

    def log_prior(self, params: HMMParams) -> jax.Array:
        """Log-density of the priors on chain and emissions; 0 without any."""
        total = self.family.log_prior(params.emissions)
        if self.initial_prior is not None:
            total += _log_dirichlet(self.initial_prior, params.initial, self.initial_support)
        if self.transition_prior is not None:
            total += _log_dirichlet(self.transition_prior, params.transition, self.transition_support)
        return total

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
        x = self.units(x)
        _, evidence = markov.log_filter(self._read(params, x), self.form, self.parallel)
        return x.per_sequence(evidence.reshape(x.num_steps, x.num_rows).T)

    @parameters.at_rows
    @jax.jit
    def filter(self, params: HMMParams, x: Data) -> jax.Array:
        """p(z_t = k | x_1..t): (T, K) for one sequence, (B, T, K) for several; 0 in the padding."""
        return _by_step(x, jnp.exp(self._filtered(self._read(params, x))), 0)

    @parameters.at_rows
    @jax.jit
    def smooth(self, params: HMMParams, x: Data) -> jax.Array:
        """p(z_t = k | x_1..T): (T, K) for one sequence, (B, T, K) for several; 0 in the padding."""
        states = markov.infer(self._read(params, x), Exact(), None, self.form, self.parallel).states
        return _by_step(x, states, 0)

    posterior = smooth

    @parameters.at_rows
    @jax.jit
    def viterbi(self, params: HMMParams, x: Data) -> jax.Array:
        """The likeliest path of states: (T,) for one sequence, (B, T) for several; -1 in the padding."""
        return _by_step(x, markov.decode(self._read(params, x))[0], -1)

    predict = viterbi

    @parameters.at_rows
    @functools.partial(jax.jit, static_argnames="steps")
    def forecast(self, params: HMMParams, x: Data, steps: int) -> jax.Array:
        """p(z_T+h = k | x_1..T) for h = 1..steps after the end: (steps, K) for one sequence, (B, steps, K) for several.

        A forecast of observations is the mixture of the emissions with these weights. Packed sequences are taken
        one by one: (num_sequences, steps, K).
        """
        checks.positive_integer("steps", steps)
        given, x = x, self.units(x)
        filtered = jnp.exp(self._filtered(self._read(params, x)))
        filtered = filtered.reshape(x.num_steps, self.num_states, x.num_rows)
        if x.ids is None:
            last = jnp.full(x.num_rows, x.num_steps) if x.lengths is None else x.lengths
            end = filtered[last - 1, :, jnp.arange(x.num_rows)]
        else:
            ends = x.inside() & ~jnp.pad(_follows(x), ((0, 0), (0, 1)))
            places = jnp.where(ends, x.ids, x.num_sequences).T.ravel()
            flat = jnp.moveaxis(filtered, 1, 2).reshape(-1, self.num_states)
            end = jnp.zeros((int(x.num_sequences or 0) + 1, self.num_states), flat.dtype).at[places].set(flat)[:-1]

        def step(state: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            state = numerics.product(state, jnp.asarray(params.transition, state.dtype), "bi,ij->bj")
            return state, state

        _, ahead = jax.lax.scan(step, end, length=steps)
        return ahead[:, 0] if sequences.is_one(given) else jnp.moveaxis(ahead, 0, 1)

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
        parameters.count_of("params.initial", getattr(params, "initial", None), self.num_states)
        params = tree.no_whole_numbers(params, params)
        key_start, key_moves, key_rows = jax.random.split(checks.random_key(key), 3)
        moves = numerics.safe_log(params.transition)

        def step(state: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            state = jax.random.categorical(key, moves[state])
            return state, state

        start = jax.random.categorical(key_start, numerics.safe_log(self._start(params)), shape=(count,))
        _, states = jax.lax.scan(step, start, jax.random.split(key_moves, n - 1))
        states = jnp.concatenate([start[None], states]).T
        rows = self.family.sample(key_rows, params.emissions, states.ravel())
        x = jax.tree.map(lambda leaf: leaf.reshape(count, n, *leaf.shape[1:]), rows)
        return (x, states) if num_sequences is not None else jax.tree.map(lambda leaf: leaf[0], (x, states))

    def num_parameters(self, params: HMMParams) -> int:
        """Free parameters: of the start, of every row of transitions, and the emissions'. Supports count, and
        without one no entry is taken for a hard zero."""
        parameters.count_of("params.initial", getattr(params, "initial", None), self.num_states)
        return sum(self.degrees(params).values())

    def degrees(self, params: HMMParams) -> dict[str, int]:
        """Free parameters by name."""
        initial = np.ones(self.num_states) if self.initial_support is None else np.asarray(self.initial_support)
        shape = (self.num_states,) * 2
        moves = np.ones(shape) if self.transition_support is None else np.asarray(self.transition_support)
        return {
            "initial": 0 if self.stationary else int(np.sum(initial != 0)) - 1,
            "transition": int(np.sum(moves != 0)) - self.num_states,
            "emissions": self.family.num_parameters(params.emissions),
        }

    def sample_size(self, x: Data, weights: jax.Array | None = None) -> jax.Array:
        """What information criteria count: the steps of all sequences."""
        x = self.units(x)
        steps = jnp.sum(x.inside(), axis=1).astype(tree.float_dtype(x.values))
        return numerics.weighted_sum(steps, weights)

    def unconstrain(self, params: HMMParams) -> HMMParams:
        """Continuation ratios of the chain's probabilities, the family's own coordinates for the emissions."""
        initial = (
            jnp.zeros((0,), params.initial.dtype)
            if self.stationary
            else numerics.simplex_to_real(params.initial, self.initial_support)
        )
        return HMMParams(
            initial=initial,
            transition=numerics.simplex_to_real(params.transition, self.transition_support),
            emissions=self.family.unconstrain(params.emissions),
        )

    def constrain(self, theta: HMMParams) -> HMMParams:
        """Inverse of `unconstrain`."""
        transition = numerics.real_to_simplex(theta.transition, self.transition_support)
        return HMMParams(
            initial=stationary_distribution(transition)
            if self.stationary
            else numerics.real_to_simplex(theta.initial, self.initial_support),
            transition=transition,
            emissions=self.family.constrain(theta.emissions),
        )

    def check(self, x: Data, weights: jax.Array | None = None) -> None:
        """Raise ValueError or TypeError for bad data, by name. Under jit only shapes are looked at."""
        checks.complete_family(self.family)
        x = checks.present(sequences.check(x, weights), weights)
        if checks.is_concrete(x):
            with jax.ensure_compile_time_eval():  # concrete data can be looked at while something else is traced
                self._check_steps(x)
        else:
            self.family.check(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), x.values))

    def _check_steps(self, x: Sequences) -> None:
        """Raise for observed steps of concrete data that the family refuses, or for fewer of them than states."""
        inside = np.asarray(x.inside())
        rows = jax.tree.map(lambda leaf: np.asarray(leaf)[inside], x.values)
        missing = _missing(rows, np)
        if np.all(missing):
            checks.some_observed("x must have an observed step; all are missing")
            return
        self.family.check(jax.tree.map(lambda leaf: leaf[~missing], rows) if np.any(missing) else rows)
        checks.enough_rows(int(np.sum(~missing)), None, self.num_states, "states")

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
        for name, shape in (("initial", (self.num_states,)), ("transition", (self.num_states,) * 2)):
            value = values.get(name)
            if value is None or not checks.is_known(value):
                continue
            if jnp.shape(value) != shape:
                raise ValueError(f"{name} must have shape {shape}; got {jnp.shape(value)}")
            if np.all(np.isfinite(value)):
                checks.distributions(name, np.atleast_2d(np.asarray(value)))

    def floats_per_row(self, params: HMMParams, x: Data) -> int:
        """Temporaries of an E-step, in numbers a sequence."""
        states = self.num_states**2 if self.parallel else self.num_states
        return self.units(x).num_steps * (6 * states + self.family.floats_per_row(params.emissions))

    def coarse(self) -> "HMM":
        """The same model in its cheapest arithmetic, for the bulk of many restarts."""
        family = self.family.coarse() if hasattr(self.family, "coarse") else self.family
        form = "scaled" if self.form == "auto" else self.form
        return (
            self if family is self.family and form == self.form else dataclasses.replace(self, family=family, form=form)
        )

    def _start(self, params: HMMParams) -> jax.Array:
        """p(z_1) (K,)."""
        return stationary_distribution(params.transition) if self.stationary else params.initial

    def _chain(self, params: HMMParams, x: Sequences, rows: Data, seen: jax.Array) -> markov.Chain:
        parameters.shapes("params", self, params, x)
        # Not by `_family`: the branch on missing entries keeps XLA from computing densities anew for each use.
        size = self._rows_at_a_time(params.emissions, rows)
        scores = tree.map_over_blocks(lambda rows: self.family.log_prob(params.emissions, rows).T, rows, size)
        scores = jnp.where(seen, scores.T, 0)
        scores = scores.T if x.num_rows == 1 else jnp.moveaxis(scores.reshape(-1, x.num_steps, x.num_rows), 0, 1)
        linked = _linked(x, jnp.bool_)
        return markov.Chain(
            initial=self._start(params),
            transition=params.transition,
            log_likelihood=scores,
            linked=_lanes(linked, x),
        )

    def _family_stats(self, x: Sequences, emissions: Params, rows: Data, responsibilities: jax.Array) -> Stats:
        family, size = self._family(x), self._rows_at_a_time(emissions, rows)
        if size >= tree.num_rows(rows):
            return family.stats(emissions, rows, responsibilities)
        return tree.sum_over_blocks(
            lambda rows, _: family.stats(emissions, rows[0], rows[1].T), (rows, responsibilities.T), None, size
        )

    def _family(self, x: Sequences) -> Family:
        """The family, told so where it is known that no entry is missing."""
        return _complete(self.family) if x.complete else self.family

    def _rows_at_a_time(self, emissions: Params, rows: Data) -> int:
        """All, or as many as fit fast memory once the temporaries of all would be large."""
        floats = 2 * self.num_states + self.family.floats_per_row(emissions)
        count, dtype = tree.num_rows(rows), tree.float_dtype(rows)
        large = count * floats * jnp.dtype(dtype).itemsize > _LARGE
        return tree.rows_per_block(floats, dtype) if large else count

    def _filtered(self, chain: markov.Chain) -> jax.Array:
        return markov.log_filter(chain, self.form, self.parallel)[0]

    def _read(self, params: HMMParams, x: Data) -> markov.Chain:
        x = self.units(x)
        return self._chain(tree.no_whole_numbers(params, x.values), x, *_rows(x))


def _complete(family: Any) -> Any:
    """A family, or a statement about one, for rows without missing entries."""
    if hasattr(family, "inner"):
        return dataclasses.replace(family, inner=_complete(family.inner))
    return dataclasses.replace(family, missing=False) if getattr(family, "missing", False) else family


def _shares(counts: jax.Array) -> jax.Array:
    """Rows over their sums."""
    return numerics.safe_divide(counts, jnp.sum(counts, axis=-1, keepdims=True))


def _with_prior(counts: jax.Array, prior: Dirichlet | None, support: Any) -> jax.Array:
    """Counts with a prior's pseudo-counts, on its support."""
    if prior is None:
        return counts
    pseudo = prior.pseudo_counts(counts)
    return jnp.maximum(counts + (pseudo if support is None else jnp.where(support, pseudo, 0)), 0)


def _log_dirichlet(prior: Dirichlet, probability: jax.Array, support: Any) -> jax.Array:
    """Log-density of a prior on the rows of probabilities, each a distribution on its support."""
    extra = prior.pseudo_counts(probability)
    inside = jnp.ones(probability.shape, bool) if support is None else jnp.asarray(support) != 0
    total = jnp.sum(jnp.where(inside, extra + 1, 0), axis=-1)
    normaliser = jax.lax.lgamma(total) - jnp.sum(jnp.where(inside, jax.lax.lgamma(extra + 1), 0), axis=-1)
    return _expected_log(jnp.where(inside, extra, 0), probability) + jnp.sum(normaliser)


def _expected_log(counts: jax.Array, probability: jax.Array) -> jax.Array:
    """sum counts log p, 0 log 0 = 0."""
    used = counts != 0
    return jnp.sum(jnp.where(used, counts * numerics.safe_log(jnp.where(used, probability, 1)), 0))


def _missing(values: Data, numpy: Any = jnp) -> Any:
    """Which rows (N,) hold nothing but NaN; whole numbers are never missing as a row, only one by one.

    numpy: the module that looks; NumPy itself where values are at hand, and nothing should be compiled.
    """

    def nothing(leaf: jax.Array) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return numpy.zeros(leaf.shape[:1], bool)
        return numpy.all(numpy.isnan(leaf).reshape(leaf.shape[0], -1), axis=1)

    return functools.reduce(numpy.logical_and, [nothing(leaf) for leaf in jax.tree.leaves(values)])


def _rows(x: Sequences) -> tuple[Data, jax.Array]:
    """All steps as rows (T B, ...), time first, and which of them (T B,) are observed; the others repeat a row that is.

    A family that takes no missing entries never sees one.
    """

    def flat(leaf: jax.Array) -> jax.Array:
        return jnp.moveaxis(leaf, 0, 1).reshape(-1, *leaf.shape[2:])

    rows = jax.tree.map(flat, x.values)
    inside = x.inside().T.ravel()
    seen = inside if x.complete else inside & ~_missing(rows)
    floats = any(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(rows))
    if x.lengths is None and (x.complete or not floats):
        return rows, seen
    some = jnp.argmax(seen)

    def stand_in(leaf: jax.Array) -> jax.Array:
        return jnp.where(seen.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, leaf[some])

    return jax.tree.map(stand_in, rows), seen


def _follows(x: Sequences) -> jax.Array:
    """Whether step t + 1 goes on from step t: (B, T - 1)."""
    return x.inside()[:, 1:] & ~x.starts()[:, 1:]


def _linked(x: Sequences, dtype: Any) -> jax.Array | None:
    """The same, time first (T - 1, B); None where every step does."""
    return None if x.lengths is None and x.ids is None else _follows(x).T.astype(dtype)


def _lanes(values: jax.Array | None, x: Sequences) -> jax.Array | None:
    """(..., B) without its last axis, for one sequence."""
    return values if values is None or x.num_rows > 1 else values[..., 0]


def _by_step(given: Data, values: jax.Array, padding: int) -> jax.Array:
    """Values (T, ...[, B]) in the form of the data: (T, ...) for one sequence, else (B, T, ...)."""
    x = sequences.as_sequences(given)
    values = jnp.moveaxis(values, -1, 0) if x.num_rows > 1 else values[None]
    inside = x.inside().reshape(x.num_rows, x.num_steps, *(1,) * (values.ndim - 2))
    values = jnp.where(inside, values, padding)
    return values[0] if sequences.is_one(given) else values
