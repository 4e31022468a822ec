"""Accelerators: wrappers that extrapolate EM, taken as a map of parameters, towards its fixed point."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from .. import checks, numerics, tree
from ..capabilities import completed
from ..protocols import AnyModel, Data, Model, Nature, Params, Problem
from ..record import record, static
from .gather import pose
from .maximize import Expanded, surrogate
from .step import EM, EMState, objective, of_inner

# How fast the rate of a slow mode is forgotten: its distance from 1 grows by this factor a step.
_FADING = 1.3

# The rate of EM's slowest mode that is assumed before any is seen.
_SLOW = 0.999

# A refusal divides the cap on step lengths by this. By a larger factor, long steps that were right would be missed.
_SHRINK = 1.5


@completed("state")
@record
class SquaremState:
    """What SQUAREM remembers.

    inner: the EM state where the last cycle ended.
    longest: the cap on step lengths.
    rate: the rate of convergence of EM's slowest mode that has been seen.
    left: an upper estimate of what is still to be gained.
    """

    inner: EMState
    longest: jax.Array
    rate: jax.Array
    left: jax.Array

    params, stats, loglik, num_passes = map(of_inner, ("params", "stats", "loglik", "num_passes"))


@completed("algorithm")
@record
class Squarem:
    """SQUAREM, scheme S3: squared extrapolation along three EM steps. A step is a cycle of three E-steps.

    inner: the EM algorithm.
    growth: the factor by which the cap on step lengths rises.

    From p1, p2, p3, each the EM map of the one before: r = p2 - p1, v = (p3 - p2) - r, step length a = -|r| / |v|,
    proposal p1 - 2 a r + a² v, in the parameters' own coordinates. Step lengths are capped; the cap is multiplied by
    `growth` after a step that reached it, and lowered after a refusal. What of a proposal is outside of the domain is
    taken from p3. A proposal is refused where the objective is not at least that of p2, so that no cycle ends below the
    two EM steps that it made.
    Varadhan & Roland (2008), Simple and globally convergent methods for accelerating the convergence
    of any EM algorithm, Scandinavian J. Statistics 35.
    """

    inner: EM
    growth: float = static(default=4.0)

    def nature(self, model: AnyModel) -> Nature:
        return Nature()

    def limit(self, *given: Any) -> tuple[Params, EMState]:
        """The EM map that it accelerates."""
        return self.inner.limit(*given)

    def init(
        self, model: AnyModel, params: Params, x: Data, weights: jax.Array | None = None, key: jax.Array | None = None
    ) -> SquaremState:
        inner = _start(self.inner, pose(model, x, weights), params, key)
        one = jnp.ones((), inner.num_passes.dtype)
        return SquaremState(inner=inner, longest=one, rate=_SLOW * one, left=jnp.inf * one)

    def step(self, model: AnyModel, state: SquaremState, x: Data, weights: jax.Array | None = None) -> SquaremState:
        start, problem = state, pose(model, x, weights)
        model = problem.model

        def turn(index: jax.Array, carry: tuple[SquaremState, Params, Params, jax.Array]) -> tuple:
            """An EM step; the third of a cycle is extrapolated. A loop, so that a program holds one E-step for all."""
            state, first, second, gain = carry
            inner = state.inner
            mapped, remembering = self.inner.maximized(problem, inner)
            last = index == 2
            aim, state = jax.lax.cond(
                last,
                lambda: self._extrapolated(model, state, first, second, mapped, gain),
                lambda: (mapped, state),
            )
            after = _proposed(self.inner, problem, remembering, aim)
            gain = objective(model, after) - objective(model, inner)
            taken = ~last | (gain >= 0)
            kept = dataclasses.replace(inner, num_passes=after.num_passes, key=after.key)
            state = dataclasses.replace(
                state,
                inner=tree.where(taken, after, kept),
                longest=jnp.where(taken, state.longest, jnp.maximum(1, start.longest / _SHRINK)),
            )
            return state, second, mapped, gain

        nowhere = state.params
        return jax.lax.fori_loop(0, 3, turn, (state, nowhere, nowhere, jnp.zeros_like(state.left)))[0]

    def _extrapolated(
        self, model: Model, state: SquaremState, first: Params, second: Params, third: Params, gain: jax.Array
    ) -> tuple[Params, SquaremState]:
        """The proposal from three points, and the state with the cap, rate and bound that follow from them."""
        along = _difference(second, first)
        bend = _difference(_difference(third, second), along)
        size, curve = _dot(along, along), _dot(bend, bend)
        length = jnp.sqrt(size / jnp.where(curve > 0, curve, 1))
        length = jnp.clip(jnp.where(curve > 0, length, state.longest), 1, state.longest)

        aim = jax.tree.map(lambda p, r, v: p + 2 * length * r + length**2 * v, first, along, bend)
        rate = _rate(state.rate, _dot(along, bend), size)
        bound = _least_gain(self.inner, model, state.inner, third)
        state = dataclasses.replace(
            state,
            # A cap that was reached is raised.
            longest=jnp.where(length >= state.longest, self.growth * state.longest, state.longest),
            rate=rate,
            left=_left(_visible(objective(model, state.inner), gain) if bound is None else bound, rate, state.rate),
        )
        return _into_domain(model, aim, third), state


def squarem(algorithm: EM | None = None, *, growth: float = 4.0) -> Squarem:
    """An EM algorithm accelerated by squared extrapolation (Varadhan & Roland 2008, scheme S3); see `Squarem`.

    Raises TypeError or ValueError for an algorithm whose steps are no deterministic map of the parameters.
    """
    if not growth > 1:
        raise ValueError(f"growth must be above 1; got {growth}")
    return Squarem(inner=_checked("squarem", algorithm), growth=growth)


@completed("state")
@record
class AndersonState:
    """What Anderson acceleration remembers. M differences are kept, of P parameters as one vector.

    inner: the EM state.
    steps: (M, P), differences of the parameters of successive steps.
    residuals: (M, P), differences of EM's moves M(p) - p at these.
    point: (P,), the parameters of the step before.
    move: (P,), EM's move M(p) - p there.
    used: how many differences are in memory, -1 before the first step.
    accepted: how many extrapolations have been taken; the more there are, the weaker is the damping.
    refused: whether the last extrapolation was refused.
    plain: whether the last step was EM's own.
    rate: the rate of convergence of EM's slowest mode that has been seen.
    left: an upper estimate of what is still to be gained.
    """

    inner: EMState
    steps: jax.Array
    residuals: jax.Array
    point: jax.Array
    move: jax.Array
    used: jax.Array
    accepted: jax.Array
    refused: jax.Array
    plain: jax.Array
    rate: jax.Array
    left: jax.Array

    params, stats, loglik, num_passes = map(of_inner, ("params", "stats", "loglik", "num_passes"))


@completed("algorithm")
@record
class Anderson:
    """Anderson acceleration, damped, restarted, and never below what EM gains. A step is one E-step.

    inner: the EM algorithm.
    memory: how many differences are kept; None for half the number of parameters, at most 10.

    The last moves f of EM are combined so that the combination is as small as a damped least-squares problem allows,
    and the step goes where that combination points: p + f - (S + F)ᵀ g, where g minimises |f - Fᵀ g|² + damping |g|²,
    over at most `memory` differences S of parameters and F of moves. Once there are so many, all are forgotten. Damping
    starts strong and fades as steps are taken. What of a step leads outside of the domain is taken from EM's. A step
    that raises the objective by less than the rise of Q under EM is refused: the state stays, and the next step is
    EM's.
    After Henderson & Varadhan (2019), Damped Anderson acceleration with restarts and monotonicity
    control for accelerating EM and EM-like algorithms, J. Computational and Graphical Statistics 28.
    """

    inner: EM
    memory: int | None = static(default=None)

    def nature(self, model: AnyModel) -> Nature:
        return Nature()

    def limit(self, *given: Any) -> tuple[Params, EMState]:
        """The EM map that it accelerates."""
        return self.inner.limit(*given)

    def init(
        self, model: AnyModel, params: Params, x: Data, weights: jax.Array | None = None, key: jax.Array | None = None
    ) -> AndersonState:
        inner = _start(self.inner, pose(model, x, weights), params, key)
        point, _ = ravel_pytree(params)
        memory = self.memory or min(10, max(1, math.ceil(point.size / 2)))
        one = jnp.ones((), inner.num_passes.dtype)
        return AndersonState(
            inner=inner,
            steps=jnp.zeros((memory, point.size), point.dtype),
            residuals=jnp.zeros((memory, point.size), point.dtype),
            point=jnp.zeros_like(point),
            move=jnp.zeros_like(point),
            used=jnp.full((), -1, jnp.int32),
            accepted=jnp.zeros((), jnp.int32),
            refused=jnp.array(True),
            plain=jnp.array(True),
            rate=_SLOW * one,
            left=jnp.inf * one,
        )

    def step(self, model: AnyModel, state: AndersonState, x: Data, weights: jax.Array | None = None) -> AndersonState:
        problem, inner = pose(model, x, weights), state.inner
        model = problem.model
        mapped, remembering = self.inner.maximized(problem, inner)
        point, unravel = ravel_pytree(inner.params)
        move = ravel_pytree(mapped)[0] - point

        # After a refusal nothing has moved, so that there is no difference to learn from.
        new = (state.used >= 0) & jnp.any(point != state.point)
        slot = jnp.where(new, state.used, len(state.steps))
        steps = state.steps.at[slot].set(point - state.point, mode="drop")
        residuals = state.residuals.at[slot].set(move - state.move, mode="drop")
        used = jnp.maximum(state.used, 0) + new
        full = used == len(steps)

        correction = _combination(residuals, move, used, state.accepted) @ (steps + residuals)
        # After a refusal come EM's own steps, for as long as its moves grow: these lead away from a saddle, which is a
        # fixed point of the map too.
        last = jnp.where(new, slot, 0)
        bend, size = steps[last] @ residuals[last], steps[last] @ steps[last]
        plain = state.refused | (state.plain & (bend > 0))

        params = tree.where(plain, mapped, _into_domain(model, unravel(point + move - correction), mapped))
        after = _proposed(self.inner, problem, remembering, params)
        bound = _least_gain(self.inner, model, inner, mapped)
        before, gain = objective(model, inner), objective(model, after) - objective(model, inner)
        slack = 8 * jnp.finfo(before.dtype).eps * jnp.abs(before)
        better = gain >= (0 if bound is None else jnp.maximum(bound - slack, 0))
        # EM's own step is taken as it is: where it is not finite, the fit has to see it.
        taken = better | plain

        rate = _rate(state.rate, bend, size)
        kept = dataclasses.replace(inner, num_passes=after.num_passes, key=after.key)
        return AndersonState(
            inner=tree.where(taken, after, kept),
            steps=jnp.where(full, 0, steps),
            residuals=jnp.where(full, 0, residuals),
            point=point,
            move=move,
            used=jnp.where(full, 0, used).astype(jnp.int32),
            accepted=state.accepted + (taken & ~plain),
            refused=~taken,
            plain=plain | ~taken,
            rate=rate,
            left=_left(_visible(before, gain) if bound is None else bound, rate, state.rate),
        )


def anderson(algorithm: EM | None = None, *, memory: int | None = None) -> Anderson:
    """An EM algorithm under damped Anderson acceleration (after Henderson & Varadhan 2019); see `Anderson`.

    Raises TypeError or ValueError for an algorithm whose steps are no deterministic map of the parameters.
    """
    if memory is not None:
        checks.positive_integer("memory", memory)
    return Anderson(inner=_checked("anderson", algorithm), memory=memory)


def _combination(residuals: jax.Array, move: jax.Array, used: jax.Array, accepted: jax.Array) -> jax.Array:
    """Damped least-squares coefficients (M,) of the move on the differences of moves (M, P), `used` of which are there.

    Damping shrinks their squared length by the factor 1 / (1 + 1.2^(25 - accepted)).
    """
    filled = (jnp.arange(len(residuals)) < used)[:, None]
    # The number of accepted steps has no bound, but beyond 100 of them there is no damping left to speak of.
    shrunk = 1 / (1 + 1.2 ** (25 - jnp.minimum(accepted, 100)).astype(move.dtype))
    return numerics.damped_least_squares(jnp.where(filled, residuals, 0), move, shrunk)


def _checked(name: str, inner: EM | None) -> EM:
    """The algorithm, if its steps are a deterministic map of the parameters alone."""
    inner = EM() if inner is None else inner
    if not isinstance(inner, EM):
        raise TypeError(f"{name} accelerates an EM(...) itself, not a wrapper around one; got {inner!r}")
    nature = Nature.of(slot.nature for slot in inner.slots)
    if not (nature.monotone and nature.complete) or nature.inexact:
        raise _no_map(name, inner)
    return inner


def _no_map(name: str, inner: EM) -> ValueError:
    return ValueError(
        f"{name} needs steps that are one deterministic E-step on all rows and one M-step; "
        f"got expect={inner.expect!r}, gather={inner.gather!r}, maximize={inner.maximize!r}"
    )


def _start(inner: EM, problem: Problem, params: Params, key: jax.Array | None) -> EMState:
    """The EM state at a start; TypeError for a model whose EM steps cannot be accelerated."""
    if inner.nature(problem.model).inexact:
        raise TypeError(
            "an accelerator needs a model with an m_step of its own: gradient steps are no map of parameters"
        )
    if inner.slots[2].rounds(problem, params) > 1:
        raise _no_map("an accelerator", inner)
    state = inner.started(problem, params, key)
    if state.loglik is None:
        raise TypeError(
            "an accelerator looks at the log-likelihood before it takes a step, and this model tells none: "
            "let e_step return (stats, loglik)"
        )
    return state


def _proposed(inner: EM, problem: Problem, state: EMState, params: Params) -> EMState:
    """The EM state at proposed parameters: the E-step there."""
    state = inner.moved(problem, state, params)
    return dataclasses.replace(state, num_steps=state.num_steps + 1, num_passes=state.num_passes + 1)


def _into_domain(model: Model, aim: Params, safe: Params) -> Params:
    """The parameters aimed at, with what is outside of the domain taken from `safe` ones, which are inside.

    What is outside has unconstrained coordinates that are NaN. `constrain` projects what has drifted, such as a sum of
    probabilities or the length of a direction, onto the domain. Boundaries, such as a probability of 0, are inside.
    """
    theta, inside = model.unconstrain(aim), model.unconstrain(safe)
    back = model.constrain(jax.tree.map(lambda there, here: jnp.where(jnp.isnan(there), here, there), theta, inside))
    return tree.where(tree.all_finite(back), back, safe)


def _least_gain(inner: EM, model: Model, state: EMState, mapped: Params) -> jax.Array | None:
    """The rise of Q + log-prior in an EM step, a lower bound on that of the objective; None for models without Q.

    Where the rounding of Q hides it, it is half the slope along the move: Q is stationary at the step's end, so that
    for short moves the mean slope is half of the first.
    """
    if model.q_function is None:
        return None
    if isinstance(inner.maximize, Expanded):
        mapped = model.m_step(state.stats)  # which gains no more
    before, slope = jax.value_and_grad(lambda params: surrogate(model, params, state.stats))(state.params)
    rise = surrogate(model, mapped, state.stats) - before
    terms = jax.tree.map(lambda g, d: jnp.sum(jnp.where(d == 0, 0, g * d)), slope, _difference(mapped, state.params))
    half = 0.5 * sum(jax.tree.leaves(terms))
    rounding = jnp.finfo(before.dtype).eps * jnp.abs(before)
    hidden = (rise < 64 * rounding) & jnp.isfinite(half)
    return jnp.where(hidden, jnp.maximum(half, 0), jnp.maximum(rise, rounding))


def _left(gain: jax.Array, rate: jax.Array, before: jax.Array) -> jax.Array:
    """An upper estimate of what is still to be gained, from what one EM step gains and the rate of the slowest mode.

    A mode of rate r at a distance d from the maximum has d² h / 2 to gain, where h is the curvature of the objective.
    That of Q is h / (1 - r), so that the rise of Q over an EM step is (1 - r) d² h / 2. A rate that rises is a sign of
    slower modes to come: it is extrapolated as in the loop's own rule (`stopping.py`). before: the rate a step ago.
    """
    slow = rate + jnp.where(rate < 1, jnp.maximum(rate - before, 0) / jnp.where(rate < 1, 1 - rate, 1) ** 2, 0)
    return jnp.where(slow < 1, gain / jnp.where(slow < 1, 1 - slow, 1), jnp.inf)


def _visible(value: jax.Array, gain: jax.Array) -> jax.Array:
    """A gain of an objective, or the rounding of the objective where the gain is smaller, and tells nothing."""
    return jnp.maximum(gain, jnp.finfo(value.dtype).eps * jnp.abs(value))


def _rate(before: jax.Array, cross: jax.Array, size: jax.Array) -> jax.Array:
    """The rate of EM's slowest mode: that of the last differences, or, if slower, that before, slowly forgotten.

    cross: the product of the last difference of parameters with that of moves; size: the first of them squared. Where
    moves grow, as they do away from a saddle, the rate is 1; it is remembered as that of a slow mode, as at the start.
    """
    now = jnp.where(size > 0, 1 + cross / jnp.where(size > 0, size, 1), 0)
    return jnp.clip(jnp.maximum(now, 1 - _FADING * (1 - jnp.minimum(before, _SLOW))), 0, 1)


def _difference(a: Params, b: Params) -> Params:
    return jax.tree.map(jnp.subtract, a, b)


def _dot(a: Params, b: Params) -> jax.Array:
    return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))  # type: ignore[return-value]
