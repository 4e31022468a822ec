"""Statistics from a part of the rows at a time: stepwise, incremental and variance-reduced EM."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import checks, tree
from ..capabilities import complete, completed, original
from ..protocols import Model, Nature, Params, Problem, Stats
from ..record import record, static
from ..slots import Expect
from .gather import e_step_on_all, some_rows


@record(kw_only=False)
class PowerRate:
    """rate(k) = (k + delay)^-power for the k-th update, k = 1, 2, ...: a step size that lets stochastic EM settle.

    power: in (1/2, 1], the conditions of Robbins & Monro; near 1/2 it learns fast, at 1 it averages.
    delay: how many updates the rate is ahead, so that the first ones are not much larger than those that follow.
    Raises ValueError for another power, or a negative delay.
    """

    power: float = static(default=0.6)
    delay: float = static(default=2.0)

    def __post_init__(self) -> None:
        if not 0.5 < self.power <= 1:
            raise ValueError(
                f"power must be above 1/2 and at most 1, or the noise never averages out; got {self.power}"
            )
        if not self.delay >= 0:
            raise ValueError(f"delay must be at least 0; got {self.delay}")

    def __call__(self, update: jax.Array) -> jax.Array:
        return (update + self.delay) ** -self.power


@record
class Turn:
    """Where a pass over batches stands.

    update: how many updates have been made.
    rows: (N,), row numbers in the order in which batches take them; None for that of the data.
    first: where in this order the pass begins, so that in every pass other rows are left over.
    batches: batch numbers in the order of this pass.
    key: what orders are drawn from; None where all rows are one batch.
    """

    update: jax.Array
    rows: jax.Array | None
    first: jax.Array
    batches: jax.Array
    key: jax.Array | None


@completed("gather")
@record(kw_only=False)
class Stepwise:
    """Stepwise EM: a step takes one batch of rows, whose statistics are mixed into a running average.

    s <- (1 - rate) s + rate (N / batch_size) s(batch), both about the current parameters.

    batch_size: rows a step, or None for all of them; with `Sample()` that is SAEM.
    rate: a number in (0, 1], or a function of the number k = 1, 2, ... of the update, `PowerRate()` by default.
    shuffle: rows are put into random batches once, and batches into a new random order in every pass. Without it the
        batches are consecutive rows, still in a new order.

    Rows that fill no batch are left over, others in every pass. A rate of 1 with all rows is batch EM. Until the end of
    a fit its log-likelihood is a running estimate.
    Cappé & Moulines (2009), On-line EM algorithm for latent data models, JRSS B 71; Liang & Klein
    (2009), Online EM for unsupervised models. With `Sample`: Delyon, Lavielle & Moulines (1999).
    Raises TypeError or ValueError for a batch_size below 1 or above the number of rows, or a rate
    outside (0, 1].
    """

    batch_size: int | None = static(default=None)
    rate: Callable | float = static(default=PowerRate())
    shuffle: bool = static(default=True)

    def __post_init__(self) -> None:
        if self.batch_size is not None:
            checks.positive_integer("batch_size", self.batch_size)
        check_rate(self.rate)

    @property
    def nature(self) -> Nature:
        batch_em = self.batch_size is None and self.rate == 1
        return Nature(stochastic=not batch_em, complete=batch_em)

    def passes(self, problem: Problem) -> float:
        """The fraction of the rows that a step looks at."""
        return self._size(problem) / problem.rows

    def init(self, problem: Problem, params: Params, expect: Expect, key: jax.Array | None) -> tuple[Stats, Turn]:
        turn = start_turn(self._size(problem), self.shuffle, problem.rows, key)
        return batch_stats(problem, params, turn, self._size(problem), expect), next_batch(turn, problem.rows)

    def step(
        self, problem: Problem, params: Params, stats: Stats, state: Turn, expect: Expect, index: jax.Array | int
    ) -> tuple[Stats, Turn]:
        fresh = batch_stats(problem, params, state, self._size(problem), expect)
        mixed = mix(problem.model, params, stats, fresh, rate_at(self.rate, state.update))
        return mixed, next_batch(state, problem.rows)

    def _size(self, problem: Problem) -> int:
        return self.batch_size or problem.rows


@record
class Anchored:
    """What variance-reduced EM remembers.

    turn: where the pass over batches stands.
    params: the anchor, the parameters that the pass began with.
    stats: the statistics of all rows at the anchor.
    """

    turn: Turn
    params: Params
    stats: Stats


@completed("gather")
@record(kw_only=False)
class VarianceReduced:
    """Stepwise EM whose noise vanishes at the maximum: it converges linearly with a constant `rate`.

    A step is a pass over the batches, and then a full E-step at the parameters p0 that it has led to, the anchor of the
    next pass. The statistics S0 there correct every batch of that pass:
    s <- (1 - rate) s + rate (S0 + (N / batch_size) (s(batch, p) - s(batch, p0))).
    So after each step statistics and log-likelihood are exact, and a fit can converge. A step costs three passes over
    the data.

    batch_size: rows a batch.
    rate: a number in (0, 1], or a function of the number of the update.
    shuffle: as in `Stepwise`.
    Chen, Zhu, Teh & Zhang (2018), Stochastic expectation maximization with variance reduction.
    Raises as `Stepwise` does.
    """

    batch_size: int = static()
    rate: Callable | float = static(default=0.1)
    shuffle: bool = static(default=True)

    nature = Nature(monotone=False)

    def __post_init__(self) -> None:
        checks.positive_integer("batch_size", self.batch_size)
        check_rate(self.rate)

    def rounds(self, problem: Problem) -> int:
        """The batches, and the full E-step at the end."""
        return problem.rows // self.batch_size + 1

    def passes(self, problem: Problem) -> float:
        """Passes over the rows that a step makes."""
        return 1 + 2 * (self.rounds(problem) - 1) * self.batch_size / problem.rows

    def init(self, problem: Problem, params: Params, expect: Expect, key: jax.Array | None) -> tuple[Stats, Anchored]:
        turn = start_turn(self.batch_size, self.shuffle, problem.rows, key)
        stats = e_step_on_all(problem, params, expect)
        return stats, Anchored(turn=turn, params=params, stats=stats)

    def step(
        self, problem: Problem, params: Params, stats: Stats, state: Anchored, expect: Expect, index: jax.Array | int
    ) -> tuple[Stats, Anchored]:
        model = problem.model

        def batch(_: None) -> tuple[Stats, Anchored]:
            here, there = (
                batch_stats(problem, at, state.turn, self.batch_size, expect) for at in (params, state.params)
            )
            # First the difference of the two batches, which is small where both are about one reference.
            corrected = jax.tree.map(
                lambda anchor, new, old: anchor + (new - old),
                model.rebase(state.stats, params),
                here,
                model.rebase(there, params),
            )
            mixed = mix(model, params, stats, corrected, rate_at(self.rate, state.turn.update + 1))
            return mixed, dataclasses.replace(state, turn=next_batch(state.turn, problem.rows))

        def everything(_: None) -> tuple[Stats, Anchored]:
            exact = e_step_on_all(problem, params, expect)
            return exact, dataclasses.replace(state, params=params, stats=exact)

        return jax.lax.cond(index == self.rounds(problem) - 1, everything, batch, None)


@record
class Pieces:
    """What incremental EM remembers of every piece of the data, leading axis one a piece.

    stats: its statistics.
    slack: its log-likelihood minus its Q, both at the parameters of its posterior: the entropy of that posterior.
    """

    stats: Stats
    slack: jax.Array


@completed("gather")
@record(kw_only=False)
class Incremental:
    """Incremental EM: the E-step on one piece of the data at a time, an M-step after each.

    num_blocks: how many pieces.

    A step goes once through all pieces, and remembers the statistics of each: the posterior of a piece is renewed while
    those of the others stay. What rises, and what is reported as log-likelihood until the end of a fit, is the free
    energy: the lower bound of the log-likelihood under these posteriors.
    Neal & Hinton (1998), A view of the EM algorithm that justifies incremental, sparse, and other variants.
    Raises TypeError or ValueError for a num_blocks below 1, or above the number of rows.
    """

    num_blocks: int = static()

    nature = Nature(complete=False)

    def __post_init__(self) -> None:
        checks.positive_integer("num_blocks", self.num_blocks)

    def rounds(self, problem: Problem) -> int:
        return self.num_blocks

    def init(self, problem: Problem, params: Params, expect: Expect, key: jax.Array | None) -> tuple[Stats, Pieces]:
        def piece(index: jax.Array) -> tuple[Stats, jax.Array]:
            return self._piece(problem, params, expect, index)

        stats, slack = jax.lax.map(piece, jnp.arange(self.num_blocks))
        return self._together(problem.model, params, stats, slack), Pieces(stats=stats, slack=slack)

    def step(
        self, problem: Problem, params: Params, stats: Stats, state: Pieces, expect: Expect, index: jax.Array | int
    ) -> tuple[Stats, Pieces]:
        fresh, slack = self._piece(problem, params, expect, index)
        every = jax.vmap(lambda old: problem.model.rebase(old, params))(state.stats)
        every = jax.tree.map(lambda old, new: old.at[index].set(new), every, fresh)
        slacks = state.slack.at[index].set(slack)
        return self._together(problem.model, params, every, slacks), Pieces(stats=every, slack=slacks)

    def _piece(
        self, problem: Problem, params: Params, expect: Expect, index: jax.Array | int
    ) -> tuple[Stats, jax.Array]:
        """Statistics of one piece, and the entropy of its posterior: its free energy is Q plus this entropy."""
        model, x, weights, rows = problem.model, problem.x, problem.weights, problem.rows
        if self.num_blocks > rows:
            raise ValueError(f"num_blocks must be at most the number of rows, {rows}; got {self.num_blocks}")
        # All slices have the length of the longest piece; what they hold of a neighbour gets weight 0.
        bounds = np.arange(self.num_blocks + 1) * rows // self.num_blocks
        size = int(np.max(np.diff(bounds)))
        first, last = jnp.asarray(bounds)[index], jnp.asarray(bounds)[index + 1]
        start = jnp.minimum(first, rows - size)
        inside = None if weights is None else tree.rows_from(weights, start, size)
        if rows % self.num_blocks:
            number = start + jnp.arange(size)
            inside = jnp.ones(size, tree.float_dtype(x)) if inside is None else inside
            inside = jnp.where((number >= first) & (number < last), inside, 0)
        expect = complete("expect", expect)
        now = expect.fold(index) if expect.nature.stochastic else original(expect)
        with checks.all_present():
            stats = model.partial().e_step(params, tree.rows_from(x, start, size), inside, now)
        if stats.loglik is None or model.q_function is None:
            return stats, jnp.full((), jnp.nan, tree.float_dtype(x))
        return stats, stats.loglik - model.q_function(params, stats)

    def _together(self, model: Model, params: Params, stats: Stats, slack: jax.Array) -> Stats:
        """The sum of the pieces' statistics, with the free energy in place of the log-likelihood."""
        total = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), stats)
        if total.loglik is None or model.q_function is None:
            return dataclasses.replace(total, loglik=None)
        return dataclasses.replace(total, loglik=model.q_function(params, total) + jnp.sum(slack))


def check_rate(rate: Any) -> None:
    """Raise TypeError or ValueError for a rate that is neither a number in (0, 1] nor a function into it."""
    if callable(rate):
        for update, value in zip(_PROBED, _probe(rate), strict=True):
            if not 0 < value <= 1:
                raise ValueError(f"rate must be in (0, 1]; got {value:g} in update {update}")
    elif isinstance(rate, (bool, str)) or not isinstance(rate, (int, float)):
        raise TypeError(f"rate must be a number in (0, 1], or a function of the update's number; got {rate!r}")
    elif not 0 < rate <= 1:
        raise ValueError(f"rate must be in (0, 1]; got {rate}. At 0 nothing is learned")


# Updates at which a rate is looked at before it is used.
_PROBED = (1, 2, 10, 1000)


@functools.lru_cache
def _probe(rate: Callable) -> tuple[float, ...]:
    """The values of a rate at these updates."""
    with jax.ensure_compile_time_eval():
        return tuple(float(rate(jnp.asarray(update, jnp.int32))) for update in _PROBED)


def rate_at(rate: Callable | float, update: jax.Array) -> jax.Array | float:
    """The rate of an update, by its number."""
    return rate(update) if callable(rate) else rate


def mix(model: Model, params: Params, old: Stats, new: Stats, rate: jax.Array | float) -> Stats:
    """(1 - rate) old + rate new, where `old` is first moved to the reference of `params`, which `new` is about."""

    def between(a: jax.Array, b: jax.Array) -> jax.Array:
        way = jnp.asarray(rate, b.dtype)
        # At a rate of 1 nothing of the old is left, not even its rounding.
        return jnp.where(way == 1, b, a + way * (b - a))

    return jax.tree.map(between, model.rebase(old, params), new)


def start_turn(batch_size: int, shuffle: bool, rows: int, key: jax.Array | None) -> Turn:
    """The start of the first pass. Raises ValueError where no batch can be filled, TypeError without a key for it."""
    if batch_size > rows:
        raise ValueError(
            f"batch_size must be at most the number of rows, {rows}; got {batch_size}. None takes all rows"
        )
    nothing = jnp.zeros((), jnp.int32)
    if batch_size == rows:
        return Turn(update=nothing, rows=None, first=nothing, batches=jnp.zeros(1, jnp.int32), key=None)
    if key is None:
        raise TypeError("batches are drawn at random: pass key=jax.random.key(...) to em_fit")
    order = _shuffled(jax.random.fold_in(key, 0), rows) if shuffle else None
    batches = jnp.arange(rows // batch_size, dtype=jnp.int32)
    return Turn(update=nothing, rows=order, first=nothing, batches=batches, key=key)


def _shuffled(key: jax.Array, rows: int) -> jax.Array:
    """Row numbers (N,) in random order, by one sort of random numbers, few of which are equal."""
    numbers = jnp.arange(rows, dtype=jnp.int32)
    return jax.lax.sort((jax.random.bits(key, (rows,), jnp.uint32), numbers), num_keys=1, is_stable=False)[1]


def next_batch(turn: Turn, rows: int) -> Turn:
    """The turn of the next update; a new pass begins at another row, with its batches in a new order."""
    update = turn.update + 1
    if turn.key is None:
        return dataclasses.replace(turn, update=update)
    key, count = turn.key, turn.batches.shape[0]

    def fresh() -> tuple[jax.Array, jax.Array]:
        place, order = jax.random.split(jax.random.fold_in(key, update))
        return jax.random.randint(place, (), 0, rows, jnp.int32), jax.random.permutation(order, turn.batches)

    # A branch, since to order many batches takes longer than a step with one of them.
    first, batches = jax.lax.cond(update % count == 0, fresh, lambda: (turn.first, turn.batches))
    return dataclasses.replace(turn, update=update, first=first, batches=batches)


def batch_stats(problem: Problem, params: Params, turn: Turn, batch_size: int, expect: Expect) -> Stats:
    """Statistics of the batch whose turn it is, scaled up to all rows."""
    rows = problem.rows
    if batch_size == rows:
        return e_step_on_all(problem, params, expect)
    place = turn.first + turn.batches[turn.update % turn.batches.shape[0]] * batch_size + jnp.arange(batch_size)
    place = place % rows
    chosen = place if turn.rows is None else turn.rows[place]
    batch = jax.tree.map(lambda leaf: jnp.take(leaf, chosen, axis=0), (problem.x, problem.weights))
    return tree.scale(rows / batch_size, e_step_on_all(some_rows(problem, *batch), params, expect))
