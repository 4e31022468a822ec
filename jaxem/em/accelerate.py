"""Accelerators: wrappers that see several EM steps as a map and guess where it leads."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from .. import checks, numerics, tree
from ..capabilities import completed
from ..protocols import Data, Model, Nature, Params, Problem
from ..record import record, static
from .gather import pose
from .maximize import surrogate
from .step import EM, EMState, objective, of_inner

# How fast the memory of a slow mode fades: the distance of its rate from 1 grows by this a step.
_FADING = 1.3

# The rate that is believed before any is seen.
_SLOW = 0.999

# What a refusal divides the cap on step lengths by: by more than this, long steps that are right are missed.
_SHRINK = 1.5


@completed("state")
@record
class SquaremState:
    """inner: the EM state where the last cycle ended; longest: the cap on step lengths.

    rate: that of EM's slowest mode in sight; left: an upper estimate of what is still to be gained.
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

    From p1, p2, p3, each the EM map of the one before: r = p2 - p1, v = (p3 - p2) - r, step length
    a = -|r| / |v|, proposal p1 - 2 a r + a^2 v, in the parameters' own coordinates. The step is capped,
    the cap times `growth` after a step that reached it, and lowered after a refusal. What of a proposal
    is outside of the domain is taken from p3; and it is refused where the objective is not at least that
    of p2: no cycle ends below the two EM steps that it made.
    Varadhan & Roland (2008), Simple and globally convergent methods for accelerating the convergence
    of any EM algorithm, Scandinavian J. Statistics 35.
    """

    inner: EM
    growth: float = static(default=4.0)

    def nature(self, model: Model | Any) -> Nature:
        return Nature()

    @property
    def limit(self) -> EM:
        """The EM map that it accelerates."""
        return self.inner.limit

    def init(
        self,
        model: Model | Any,
        params: Params,
        x: Data,
        weights: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> SquaremState:
        inner = _start(self.inner, pose(model, x, weights), params, key)
        one = jnp.ones((), inner.num_passes.dtype)
        return SquaremState(inner=inner, longest=one, rate=_SLOW * one, left=jnp.inf * one)

    def step(self, model: Model | Any, state: SquaremState, x: Data, weights: jax.Array | None = None) -> SquaremState:
        start, problem = state, pose(model, x, weights)
        model = problem.model

        def turn(index: jax.Array, carry: tuple[SquaremState, Params, Params, jax.Array]) -> tuple:
            """Two EM steps, and a third that is extrapolated: one program for all, since E-steps are long ones."""
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
        """The proposal from three points, and what they tell of the map."""
        along = _difference(second, first)
        bend = _difference(_difference(third, second), along)
        size, curve = _dot(along, along), _dot(bend, bend)
        length = jnp.sqrt(size / jnp.where(curve > 0, curve, 1))
        length = jnp.clip(jnp.where(curve > 0, length, state.longest), 1, state.longest)

        aim = jax.tree.map(lambda p, r, v: p + 2 * length * r + length**2 * v, first, along, bend)
        rate = _rate(state.rate, _dot(along, bend), size)
        sure = _sure_gain(model, state.inner, third)
        state = dataclasses.replace(
            state,
            # A cap that was reached is raised.
            longest=jnp.where(length >= state.longest, self.growth * state.longest, state.longest),
            rate=rate,
            left=_left(_seen(objective(model, state.inner), gain) if sure is None else sure, rate, state.rate),
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
    """inner: the EM state; steps and residuals (memory, P): differences of parameters, and of EM's moves, so far.

    point, move: parameters (P,) as one vector, and where EM moves them, of the step before; used: differences in
    memory, -1 before the first step; accepted: extrapolations that were taken (less damping the more there are);
    refused: whether the last extrapolation was; plain: whether the last step was EM's own; rate, left: as in
    `SquaremState`.
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
    """Anderson acceleration, damped, restarted and gated. A step is one E-step.

    The last EM moves f are combined so that the combination is as small as a damped least-squares
    problem allows, and the step goes where that combination points: p + f - (S + F)ᵀ g, g = argmin
    |f - Fᵀ g|^2 + damping |g|^2, over at most `memory` differences S of parameters and F of moves (default: half
    the number of parameters, at most 10), which are forgotten once there are so many. Damping starts strong
    and fades as steps are taken. What of a step leads outside of the domain is taken from EM's; one that raises the
    objective by less than EM is bound to (by Q) is refused: the state stays, and the next step is EM's.
    After Henderson & Varadhan (2019), Damped Anderson acceleration with restarts and monotonicity
    control for accelerating EM and EM-like algorithms, J. Computational and Graphical Statistics 28.
    """

    inner: EM
    memory: int | None = static(default=None)

    def nature(self, model: Model | Any) -> Nature:
        return Nature()

    @property
    def limit(self) -> EM:
        """The EM map that it accelerates."""
        return self.inner.limit

    def init(
        self,
        model: Model | Any,
        params: Params,
        x: Data,
        weights: jax.Array | None = None,
        key: jax.Array | None = None,
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

    def step(
        self, model: Model | Any, state: AndersonState, x: Data, weights: jax.Array | None = None
    ) -> AndersonState:
        problem, inner = pose(model, x, weights), state.inner
        model = problem.model
        mapped, remembering = self.inner.maximized(problem, inner)
        point, unravel = ravel_pytree(inner.params)
        move = ravel_pytree(mapped)[0] - point

        # After a refusal nothing has moved: there is no difference to learn from.
        new = (state.used >= 0) & jnp.any(point != state.point)
        slot = jnp.where(new, state.used, len(state.steps))
        steps = state.steps.at[slot].set(point - state.point, mode="drop")
        residuals = state.residuals.at[slot].set(move - state.move, mode="drop")
        used = jnp.maximum(state.used, 0) + new
        full = used == len(steps)

        correction = _combination(residuals, move, used, state.accepted) @ (steps + residuals)
        # After a refusal come EM's own steps for as long as its moves grow: they lead away from a saddle, which is a
        # fixed point too.
        last = jnp.where(new, slot, 0)
        bend, size = steps[last] @ residuals[last], steps[last] @ steps[last]
        plain = state.refused | (state.plain & (bend > 0))

        params = tree.where(plain, mapped, _into_domain(model, unravel(point + move - correction), mapped))
        after = _proposed(self.inner, problem, remembering, params)
        sure = _sure_gain(model, inner, mapped)
        before, gain = objective(model, inner), objective(model, after) - objective(model, inner)
        slack = 8 * jnp.finfo(before.dtype).eps * jnp.abs(before)
        better = gain >= (0 if sure is None else jnp.maximum(sure - slack, 0))
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
            left=_left(_seen(before, gain) if sure is None else sure, rate, state.rate),
        )


def anderson(algorithm: EM | None = None, *, memory: int | None = None) -> Anderson:
    """An EM algorithm under damped Anderson acceleration (after Henderson & Varadhan 2019); see `Anderson`.

    Raises TypeError or ValueError for an algorithm whose steps are no deterministic map of the parameters.
    """
    if memory is not None:
        checks.positive_integer("memory", memory)
    return Anderson(inner=_checked("anderson", algorithm), memory=memory)


def _combination(residuals: jax.Array, move: jax.Array, used: jax.Array, accepted: jax.Array) -> jax.Array:
    """Damped least-squares coefficients (memory,) of the move on the differences of moves (memory, P).

    The damping is what brings the squared length of the coefficients to the share
    1 / (1 + 1.2^(25 - accepted)) of their undamped one.
    """
    dtype = move.dtype
    filled = (jnp.arange(len(residuals)) < used)[:, None]
    left, sizes, right = numerics.singular_values(jnp.where(filled, residuals, 0))
    along = right @ move
    good = sizes > 8 * jnp.finfo(dtype).eps * len(residuals) * sizes[0]
    sizes = jnp.where(good, sizes, 1)
    # 1.2^25 and more would overflow nothing, but what has been accepted is not bounded.
    share = 1 / (1 + 1.2 ** (25 - jnp.minimum(accepted, 100)).astype(dtype))

    def coefficients(damping: jax.Array) -> jax.Array:
        return jnp.where(good, sizes * along / (jnp.square(sizes) + damping), 0)

    goal = share * jnp.sum(jnp.square(coefficients(jnp.zeros((), dtype))))
    scale = jnp.square(jnp.max(jnp.where(good, sizes, 0)))
    low, high = jnp.log(jnp.finfo(dtype).eps) * 2, -jnp.log(jnp.finfo(dtype).eps)

    def halve(_: int, between: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = between
        middle = 0.5 * (low + high)
        long = jnp.sum(jnp.square(coefficients(scale * jnp.exp(middle)))) > goal
        return jnp.where(long, middle, low), jnp.where(long, high, middle)

    low, _ = jax.lax.fori_loop(0, 30, halve, (low, high))
    return coefficients(scale * jnp.exp(low)) @ left.T


def _checked(name: str, inner: Any) -> EM:
    """The algorithm, if its steps are a deterministic map of the parameters alone."""
    inner = EM() if inner is None else inner
    if not isinstance(inner, EM):
        raise TypeError(f"{name} accelerates an EM(...) itself, not a wrapper around one; got {inner!r}")
    nature = Nature.of(slot.nature for slot in inner.slots)
    if not (nature.monotone and nature.complete) or nature.inexact or inner.slots[2].multicycle:
        raise ValueError(
            f"{name} needs steps that are one deterministic E-step on all rows and one M-step; "
            f"got expect={inner.expect!r}, gather={inner.gather!r}, maximize={inner.maximize!r}"
        )
    return inner


def _start(inner: EM, problem: Problem, params: Params, key: jax.Array | None) -> EMState:
    if inner.nature(problem.model).inexact:
        raise TypeError(
            "an accelerator needs a model with an m_step of its own: gradient steps are no map of parameters"
        )
    state = inner.started(problem, params, key)
    if state.loglik is None:
        raise TypeError(
            "an accelerator looks at the log-likelihood before it takes a step, and this model tells none: "
            "let e_step return (stats, loglik)"
        )
    return state


def _proposed(inner: EM, problem: Problem, state: EMState, params: Params) -> EMState:
    """The state at proposed parameters."""
    state = inner.moved(problem, state, params)
    return dataclasses.replace(state, num_steps=state.num_steps + 1, num_passes=state.num_passes + 1)


def _into_domain(model: Model, aim: Params, safe: Params) -> Params:
    """The parameters aimed at, with what is outside of the domain taken from others, that are inside.

    The bijection tells: coordinates of what is outside are NaN, and the way back puts what has drifted (a sum
    of probabilities, the length of a direction) on the domain again. Boundaries, a probability of 0, are inside.
    """
    theta, inside = model.unconstrain(aim), model.unconstrain(safe)
    back = model.constrain(jax.tree.map(lambda there, here: jnp.where(jnp.isnan(there), here, there), theta, inside))
    return tree.where(tree.all_finite(back), back, safe)


def _sure_gain(model: Model, state: EMState, mapped: Params) -> jax.Array | None:
    """What an EM step raises Q + log-prior by, and so the objective by at least; None for models without Q.

    Where that is hidden by the rounding of Q, half the slope along the move: Q is level at the step's end, and so, for
    short moves, the mean slope is half of the first.
    """
    if model.q_function is None:
        return None
    before, slope = jax.value_and_grad(lambda params: surrogate(model, params, state.stats))(state.params)
    rise = surrogate(model, mapped, state.stats) - before
    terms = jax.tree.map(lambda g, d: jnp.sum(jnp.where(d == 0, 0, g * d)), slope, _difference(mapped, state.params))
    half = 0.5 * sum(jax.tree.leaves(terms))
    rounding = jnp.finfo(before.dtype).eps * jnp.abs(before)
    hidden = (rise < 64 * rounding) & jnp.isfinite(half)
    return jnp.where(hidden, jnp.maximum(half, 0), jnp.maximum(rise, rounding))


def _left(gain: jax.Array, rate: jax.Array, before: jax.Array) -> jax.Array:
    """An upper estimate of what is still to be gained above an objective, from what one EM step gains there.

    A mode of rate r that is d away from the maximum has d^2 h / 2 to gain, h its curvature; Q's is h / (1 - r),
    so that the rise of Q over an EM step is (1 - r) d^2 h / 2. A rate that rises tells of slower modes to come: it
    is carried on as in the loop's own rule.
    """
    slow = rate + jnp.where(rate < 1, jnp.maximum(rate - before, 0) / jnp.where(rate < 1, 1 - rate, 1) ** 2, 0)
    return jnp.where(slow < 1, gain / jnp.where(slow < 1, 1 - slow, 1), jnp.inf)


def _seen(value: jax.Array, gain: jax.Array) -> jax.Array:
    """A gain of an objective, or the rounding of that: a gain below it tells nothing of what is left."""
    return jnp.maximum(gain, jnp.finfo(value.dtype).eps * jnp.abs(value))


def _rate(before: jax.Array, cross: jax.Array, size: jax.Array) -> jax.Array:
    """The rate of EM's slowest mode in sight: that along the last differences, or the slowest before, fading.

    Where moves grow, away from a saddle, it is 1; what is remembered of that is a slow mode, as at the start.
    """
    now = jnp.where(size > 0, 1 + cross / jnp.where(size > 0, size, 1), 0)
    return jnp.clip(jnp.maximum(now, 1 - _FADING * (1 - jnp.minimum(before, _SLOW))), 0, 1)


def _difference(a: Params, b: Params) -> Params:
    return jax.tree.map(jnp.subtract, a, b)


def _dot(a: Params, b: Params) -> jax.Array:
    return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))  # type: ignore[return-value]
