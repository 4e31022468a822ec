"""Annealing: EM with a tempered posterior that cools to the exact one."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import tree
from ..capabilities import complete, completed
from ..latents import Exact
from ..protocols import AnyModel, Data, Nature, Params, Problem, Stats
from ..record import record, static
from ..slots import Maximize
from .gather import pose
from .step import EM, EMState, of_inner

# Steps at which a schedule is looked at before it is used; the last stands for the end.
_PROBED = (0, 1, 2, 5, 10, 100, 10**6)

# The fraction of the way back to the start by which a step above temperature 1 pulls the parameters.
_DRAW = 0.1


@completed("maximize")
@record(kw_only=False)
class _Drawn:
    """An M-step whose parameters are pulled towards a start.

    inner: the M-step itself.
    start: the unconstrained coordinates of the start.
    hot: whether they are pulled; else the M-step is taken as it is.
    """

    inner: Maximize
    start: Any
    hot: jax.Array

    @property
    def nature(self) -> Nature:
        return self.inner.nature

    def init(self, problem: Problem, params: Params) -> Any:
        return self.inner.init(problem, params)

    def rounds(self, problem: Problem, params: Params) -> int:
        return self.inner.rounds(problem, params)

    def step(
        self, problem: Problem, params: Params, stats: Stats, state: Any, index: jax.Array | int, key: jax.Array | None
    ) -> tuple[Params, Any]:
        found, state = self.inner.step(problem, params, stats, state, index, key)
        theta = problem.model.unconstrain(found)
        drawn = problem.model.constrain(
            jax.tree.map(lambda here, there: here + _DRAW * (there - here), theta, self.start)
        )
        return tree.where(self.hot, drawn, found), state


@completed("state")
@record
class AnnealedState:
    """What annealing remembers.

    inner: the EM state.
    start: the unconstrained coordinates of the parameters that the fit began with.
    settled: whether the objective of this state and that before it are both of temperature 1.
    """

    inner: EMState
    start: Any
    settled: jax.Array

    params, stats, loglik, num_passes = map(of_inner, ("params", "stats", "loglik", "num_passes"))
    missed = of_inner("missed")


@completed("algorithm")
@record
class Annealed:
    """Deterministic annealing: step k works with the posterior tempered by schedule(k), which ends at 1.

    inner: the EM algorithm.
    schedule: temperatures, one a step from the start on, then 1; or a function of the step.

    High temperatures blur the likelihood until it has one optimum, which is followed as it sharpens. Temperatures below
    1 on the way, as in anti-annealing, are allowed. The objective is the tempered one until temperature 1 is reached
    (see `Exact`), and a fit does not converge before. It works best where the width of components is held, or has a
    prior. Components that have merged at high temperatures are parted again: every step above temperature 1 pulls the
    parameters a tenth of the way back to the start, in unconstrained coordinates. Where the EM map attracts, the next
    step undoes that; where it repels, components that were pulled apart go on to part.
    Ueda & Nakano (1998), Deterministic annealing EM algorithm, Neural Networks 11.
    """

    inner: EM
    schedule: Any = static()

    def nature(self, model: AnyModel) -> Nature:
        return Nature(stochastic=self.inner.nature(model).stochastic, monotone=False, complete=False)

    def limit(self, *given: Any) -> tuple[Params, EMState]:
        """The EM map of temperature 1, which it ends with."""
        return dataclasses.replace(self.inner, expect=Exact()).limit(*given)

    def temperature(self, step: jax.Array) -> jax.Array:
        """The temperature of a step, counted from 0, the start."""
        if callable(self.schedule):
            return jnp.asarray(self.schedule(step))
        return jnp.asarray((*self.schedule, 1.0))[jnp.minimum(step, len(self.schedule))]

    def init(
        self, model: AnyModel, params: Params, x: Data, weights: jax.Array | None = None, key: jax.Array | None = None
    ) -> AnnealedState:
        problem = pose(model, x, weights)
        inner = self._at(jnp.zeros((), jnp.int32)).started(problem, params, key)
        return AnnealedState(inner=inner, start=problem.model.unconstrain(params), settled=jnp.array(False))

    def step(self, model: AnyModel, state: AnnealedState, x: Data, weights: jax.Array | None = None) -> AnnealedState:
        before = state.inner.num_steps
        hot = self.temperature(before) > 1
        drawn = _Drawn(complete("maximize", self.inner.maximize), state.start, hot)
        parted = dataclasses.replace(self, inner=dataclasses.replace(self.inner, maximize=drawn))
        inner = parted._at(before + 1).step(model, state.inner, x, weights)
        settled = (self.temperature(before) == 1) & (self.temperature(before + 1) == 1)
        return AnnealedState(inner=inner, start=state.start, settled=settled)

    def evaluated(
        self, model: AnyModel, state: AnnealedState, x: Data, weights: jax.Array | None = None
    ) -> AnnealedState:
        """The state with the log-likelihood itself, of all rows."""
        inner = dataclasses.replace(self.inner, expect=Exact()).exactly(pose(model, x, weights), state.inner)
        return dataclasses.replace(state, inner=inner)

    def _at(self, step: jax.Array) -> EM:
        """The algorithm at the temperature of a step."""
        return dataclasses.replace(self.inner, expect=Exact(self.temperature(step)))


def annealed(algorithm: EM, schedule: Sequence[float] | np.ndarray | jax.Array | Callable) -> Annealed:
    """EM whose posterior is tempered by a schedule; see `Annealed`.

    schedule: temperatures, one a step from the start on, then 1; or a function of the step that comes to 1, as optax's
        schedules are.
    Raises TypeError or ValueError for a schedule that is empty, not positive, or does not end at 1.
    """
    if not isinstance(algorithm, EM) or not isinstance(algorithm.expect, Exact):
        raise TypeError(f"annealed tempers the posterior of an EM(expect=Exact(), ...); got {algorithm!r}")
    if not callable(schedule):
        listed = isinstance(schedule, (Sequence, np.ndarray, jax.Array)) and not isinstance(schedule, jax.core.Tracer)
        if isinstance(schedule, str) or not listed or np.ndim(schedule) != 1:
            raise TypeError(
                f"schedule must be temperatures, one a step, or a function step -> temperature; got {schedule!r}"
            )
        schedule = tuple(float(value) for value in schedule)
    _check(schedule)
    return Annealed(inner=algorithm, schedule=schedule)


def _check(schedule: Callable | tuple[float, ...]) -> None:
    """Raise ValueError for temperatures that are not positive and finite, or that do not end at 1."""
    if callable(schedule):
        steps: tuple[int, ...] = _PROBED
        with jax.ensure_compile_time_eval():
            values = tuple(float(schedule(jnp.asarray(step, jnp.int32))) for step in steps)
    else:
        steps, values = tuple(range(len(schedule))), schedule
    if not values:
        raise ValueError("schedule must have at least one temperature; got none. Without annealing, use EM()")
    for step, value in zip(steps, values, strict=True):
        if not (np.isfinite(value) and value > 0):
            raise ValueError(f"schedule must be finite temperatures above 0; got {value:g} at step {step}")
    if callable(schedule) and values[-1] != 1:
        raise ValueError(
            f"schedule must come to temperature 1 and stay there; got {values[-1]:g} at step {steps[-1]}. "
            "For a temperature that stays, use EM(expect=Exact(temperature))"
        )
