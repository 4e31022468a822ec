"""One EM step: maximize after gather after expect, as data."""

import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp

from .. import tree
from ..capabilities import complete, completed, original
from ..latents import Exact
from ..protocols import AnyModel, Data, Model, Nature, Params, Problem, Stats
from ..record import record, static
from ..slots import Expect, Gather, Maximize, State
from .gather import Full, e_step_on_all, pose
from .maximize import ClosedForm


@completed("state")
@record
class EMState:
    """Parameters, and the statistics and log-likelihood at exactly these parameters.

    Where a gather uses a part of the rows at a time, statistics and log-likelihood are its running estimates.

    params: the parameters.
    stats: expected statistics at these.
    loglik: the log-likelihood at these; None where the model tells none.
    gather, maximize: what those slots remember.
    key: what the draws of the steps to come are made from.
    num_steps: steps so far.
    num_passes: E-steps so far, counted in passes over the data.
    deferred: whether the E-step at the start was left to the first step (see `EM.begin`).
    """

    params: Params
    stats: Stats
    loglik: jax.Array | None
    gather: Any
    maximize: Any
    key: jax.Array | None
    num_steps: jax.Array
    num_passes: jax.Array
    deferred: bool = static(default=False)

    @property
    def waiting(self) -> jax.Array | None:
        """Whether the E-step at the start is yet to be made; None where that is never left to a step."""
        return self.num_passes == 0 if self.deferred else None

    @property
    def missed(self) -> jax.Array | float:
        """By how much the last M-step is known to be below the maximum of Q + log-prior."""
        return complete("state", self.maximize).missed


def of_inner(name: str) -> Any:
    """A property of a wrapper's state, which has the value of this field of the EM state inside it."""
    return property(operator.attrgetter(f"inner.{name}"))


@completed("algorithm")
@record
class EM:
    """The EM algorithm (Dempster, Laird & Rubin 1977) in three slots.

    expect: how the posterior of the latents enters the statistics.
    gather: how statistics are summed over the data.
    maximize: how parameters are made from them.

    A state is always consistent: its statistics and log-likelihood belong to its parameters, so that an objective is
    never one step behind.
    """

    expect: Expect = Exact()
    gather: Gather | Any = Full()
    maximize: Maximize | Any = ClosedForm()

    @property
    def slots(self) -> tuple[Expect, Gather, Maximize]:
        """The three of them, complete."""
        return complete("expect", self.expect), complete("gather", self.gather), complete("maximize", self.maximize)

    def nature(self, model: AnyModel) -> Nature:
        """The nature of its slots together; it is inexact also where the model has no m_step."""
        own = Nature.of(slot.nature for slot in self.slots)
        climbs = complete("model", model).m_step is None
        return dataclasses.replace(own, inexact=own.inexact or climbs)

    def limit(
        self, model: AnyModel, params: Params, x: Data, weights: jax.Array | None = None
    ) -> tuple[Params, EMState]:
        """T(params), for the EM map T whose fixed points are its limits, and the state at `params`.

        T uses all rows in every step, and the model's own M-step in place of an inexact one.
        """
        _, gather, maximize = self.slots
        whole = dataclasses.replace(
            self,
            gather=self.gather if gather.nature.complete else Full(),
            maximize=ClosedForm() if maximize.nature.inexact else self.maximize,
        )
        problem = pose(model, x, weights)
        start = state = whole.started(problem, params, None)
        # Unrolled: leaves that no round moves are then returned as the same objects, which `implicit` looks for.
        for index in range(whole.slots[2].rounds(problem, params)):
            state = state if index == 0 else whole.moved(problem, state, params)
            params, state = whole.maximized(problem, state, index)
        return params, start

    def init(
        self, model: AnyModel, params: Params, x: Data, weights: jax.Array | None = None, key: jax.Array | None = None
    ) -> EMState:
        """The state at a start: one E-step. Raises TypeError where a random algorithm gets no key."""
        return self.started(pose(model, x, weights), params, key)

    def begin(
        self, model: AnyModel, params: Params, x: Data, weights: jax.Array | None = None, key: jax.Array | None = None
    ) -> EMState:
        """A state whose E-step is left to the next `step`, where a start is no more than that E-step; else `init`.

        A compiled fit then holds its E-step once. Raises as `init` does.
        """
        problem = pose(model, x, weights)
        _, gather, maximize = self.slots
        plain = gather.init is None and gather.rounds(problem) == gather.passes(problem) == 1
        if not plain or maximize.rounds(problem, params) > 1:
            return self.started(problem, params, key)

        def shapes(params: Params, key: jax.Array | None) -> EMState:
            state = self.started(problem, params, key)
            return dataclasses.replace(state, key=None, params=None, maximize=None)

        return dataclasses.replace(
            tree.zeros_like(jax.eval_shape(shapes, params, key)),
            params=params,
            maximize=maximize.init(problem, params),
            key=None if key is None else jax.random.split(key)[0],
            deferred=True,
        )

    def step(self, model: AnyModel, state: EMState, x: Data, weights: jax.Array | None = None) -> EMState:
        """M-step from the statistics at hand, then the E-step at the new parameters.

        Where slots work in rounds, on pieces of the data or blocks of parameters, a step goes through all of them. From
        a state that is waiting it makes the E-step alone, and is not counted.
        """
        problem = pose(model, x, weights)
        _, gather, maximize = self.slots
        pieces, blocks = gather.rounds(problem), maximize.rounds(problem, state.params)

        def one_round(index: jax.Array | int, state: EMState) -> EMState:
            params, after = self.maximized(problem, state, index // pieces)
            if state.waiting is not None:
                # There are no statistics yet: what the M-step makes of their zeros is discarded.
                params, after = tree.where(state.waiting, (state.params, state), (params, after))
            return self.moved(problem, after, params, index % pieces)

        total = pieces * blocks
        after = one_round(0, state) if total == 1 else jax.lax.fori_loop(0, total, one_round, state)
        return dataclasses.replace(
            after,
            num_steps=_next(state),
            num_passes=state.num_passes + blocks * gather.passes(problem),
        )

    def started(self, problem: Problem, params: Params, key: jax.Array | None) -> EMState:
        """`init` of a posed problem."""
        expect, gather, maximize = self.slots
        _fits(problem, gather)
        step = jnp.zeros((), jnp.int32)
        key, gathers = (None, None) if key is None else jax.random.split(key)
        key, own = _split(key, expect)
        now = expect.at(step, own)
        if gather.init is None:
            stats, memory = gather.step(problem, params, None, None, now, 0)
        else:
            stats, memory = gather.init(problem, params, now, gathers)
        return EMState(
            params=params,
            stats=stats,
            loglik=stats.loglik,
            gather=memory,
            maximize=maximize.init(problem, params),
            key=key,
            num_steps=step,
            num_passes=jnp.asarray(min(1.0, gather.passes(problem)), tree.float_dtype(problem.x)),
        )

    def maximized(self, problem: Problem, state: EMState, index: jax.Array | int = 0) -> tuple[Params, EMState]:
        """The parameters that a state's statistics lead to, and the state with what the slot remembers then."""
        maximize = self.slots[2]
        key, own = _split(state.key, maximize)
        params, memory = maximize.step(problem, state.params, state.stats, state.maximize, index, own)
        return params, dataclasses.replace(state, maximize=memory, key=key)

    def moved(self, problem: Problem, state: EMState, params: Params, index: jax.Array | int = 0) -> EMState:
        """The state at other parameters: the E-step there."""
        expect, gather, _ = self.slots
        key, own = _split(state.key, expect)
        stats, memory = gather.step(problem, params, state.stats, state.gather, expect.at(_next(state), own), index)
        return dataclasses.replace(state, params=params, stats=stats, loglik=stats.loglik, gather=memory, key=key)

    def evaluated(self, model: AnyModel, state: EMState, x: Data, weights: jax.Array | None = None) -> EMState:
        """The state with the log-likelihood of all rows at its parameters; itself where that is what it has."""
        return state if self.nature(model).complete else self.exactly(pose(model, x, weights), state)

    def exactly(self, problem: Problem, state: EMState) -> EMState:
        """The state after an E-step on all rows, without draws."""
        expect: Expect = Exact() if self.slots[0].nature.stochastic else self.expect
        stats = e_step_on_all(problem, state.params, expect)
        return dataclasses.replace(state, stats=stats, loglik=stats.loglik, num_passes=state.num_passes + 1)


def _fits(problem: Problem, gather: Gather) -> None:
    """Raise TypeError where M-steps go back to the rows, and the gather does not renew all statistics in every step."""
    whole = gather.rounds(problem) == gather.passes(problem) == 1 and gather.rate == 1
    if problem.model.q_on_rows is not None and not whole:
        raise TypeError(
            "M-steps of this model go back to all rows, at the parameters that statistics were taken at: gather must "
            f"be Full() or Blocks(size), which renew all of these in every step; got {original(gather)!r}"
        )


def _next(state: EMState) -> jax.Array:
    """The number of the next step; the E-step at the start is none."""
    return state.num_steps + (1 if state.waiting is None else ~state.waiting)


def _split(key: jax.Array | None, slot: Expect | Maximize) -> tuple[jax.Array | None, jax.Array | None]:
    """The key of the steps to come and that of a slot's draws, where it makes any."""
    if key is None or not slot.nature.stochastic:
        return key, None
    key, own = jax.random.split(key)
    return key, own


def objective(model: Model, state: State | Any) -> jax.Array:
    """log-likelihood + log-prior at a state's parameters; NaN where the model tells no log-likelihood."""
    if state.loglik is None:
        return jnp.full_like(state.num_passes, jnp.nan)
    return jnp.asarray(state.loglik + model.log_prior(state.params), state.num_passes.dtype)
