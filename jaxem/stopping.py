"""When a fit stops, and with which status.

What is left to gain is a geometric series, given by the last gain and the rate at which gains shrink. Both are taken
from the objective for as long as its gains exceed its rounding. An objective is a long sum, so that its rounding hides
gains long before a slow fit is done, above all in float32. Parameters are resolved far better: near a maximum a
gain goes as the square of its move, and a move of 1e-7 is visible where a gain of 1e-14 is not. Moves then replace
gains.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from . import tree
from .capabilities import complete
from .protocols import Nature, Params
from .record import record
from .slots import State
from .status import Status
from .watch import ROUNDED, SEEN, Watch, begun, changed, moved, observe

# Steps without visible progress after which an objective that is no long sum, whose moves are not used, is at its
# resolution; half of them where it is no likelihood.
PATIENCE = 4

# A ratio of moves is used where it differs from 1 by more than so many units of its rounding.
_MOVED = 8

# So many steps in a row have to find that little is left: after a fast mode has died out, a slow one may appear.
_CONFIRMED = 3

# The safety factor on what is extrapolated from moves.
_CAUTION = 4

# The fewest steps over which moves give a rate; the fewest steps without shrinking after which moves are at rest; the
# scatter of their ratios above which moves are nothing but rounding.
_FEWEST = 4
_REST = 64
_SCATTER = 0.25

# The most that a squared relative move of 1 may gain, in nats per unit of weight, as long as no gain has been seen.
_DEAREST = 1e4


@record
class Progress:
    """A fit under way.

    state: the algorithm's.
    objective: its objective, -inf while the state waits for its first E-step.
    watch: the numbers of a `Watch`, what the stopping rule remembers.
    num_steps: steps so far.
    status: RUNNING, or why it ended.
    largest_decrease: the largest fall of the objective in one step so far.
    """

    state: Any
    objective: jax.Array
    watch: jax.Array
    num_steps: jax.Array
    status: jax.Array
    largest_decrease: jax.Array


@dataclasses.dataclass(frozen=True)
class Terms:
    """What a fit is judged by.

    nature: that of its algorithm.
    likelihood: whether its objective is a log-likelihood, a long sum with a unit of its own.
    total: the weight of all rows.
    tol, max_steps: its limits, as in `em_fit`.
    """

    nature: Nature
    likelihood: bool
    total: jax.Array
    tol: jax.Array | float
    max_steps: jax.Array | int


@dataclasses.dataclass(frozen=True)
class _Step:
    """What one step did.

    height: the objective; where it is not known, the largest relative move of a parameter.
    gain: by how much the objective rose; where it is not known, the same move.
    resolution: the part of a gain that may be rounding.
    allowed: how much may be left to gain.
    summed: whether the objective is a long sum, whose rounding hides progress that parameters still show.
    fell: whether the objective fell by more than rounding, under an algorithm that never lowers it.
    drop: by how much it fell, 0 if it rose.
    """

    height: jax.Array
    gain: jax.Array
    resolution: jax.Array
    allowed: jax.Array
    summed: bool
    fell: jax.Array | bool
    drop: jax.Array


def _series(ratio: jax.Array, before: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sum of the geometric series that follows a term, relative to it, and the ratio that it was taken at.

    Aitken's estimate, ratio / (1 - ratio) (McLachlan & Krishnan, The EM Algorithm and Extensions, section 4.9). Taken
    is the slower of the last two ratios, so that one lucky ratio does not stop a slow fit. A ratio that rises by more
    than its noise is a sign of a slower mode taking over: the rise is extrapolated over the steps that the fit has to
    go, 1 / (1 - ratio), and grows by the same factor.
    """
    slow = jnp.maximum(ratio, before)
    rise = jnp.where(jnp.isfinite(before), jnp.maximum(ratio - before - noise, 0), 0)
    slow = slow + jnp.where(slow < 1, rise / (1 - slow) ** 2, 0)
    return jnp.where((slow >= 0) & (slow < 1), slow / (1 - slow), jnp.inf), slow


def left_by_gains(before: Watch, now: Watch, resolution: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What is left to gain, by the last gain and its ratio, and whether rounding leaves that credible."""
    series, slow = _series(now.ratio, before.ratio, 4 * resolution / jnp.abs(before.gain))
    # The error of a ratio must be small against its distance from 1.
    return now.gain * series, now.gain * jnp.minimum(1 - slow, 1) > SEEN * resolution


def left_by_moves(before: Watch, now: Watch, resolution: jax.Array, total: jax.Array) -> jax.Array:
    """What is left to gain where gains drown in rounding: the gain that belongs to the last move, and to those to come.

    The rate of moves is their last ratio, where that exceeds its own rounding, and no faster than the pace at which
    they last halved: over many steps the rounding of slow moves averages out.
    """
    unseen = jnp.isinf(now.seen)
    worth = jnp.exp(jnp.where(unseen, now.move, now.seen + now.power * (now.move - now.seen_move)))
    gain = jnp.where(unseen, _DEAREST * total, 1) * worth
    gain = jnp.minimum(gain, jnp.maximum(now.gain, 0) + SEEN * resolution)  # more would have been seen
    per_length = jnp.exp(-0.5 * now.move)
    # Moves of the size of their rounding shrink no more, however near the limit is: a little shrinking is assumed.
    folds = jnp.maximum(now.mark - now.move, jnp.where(ROUNDED * now.rounding * per_length**2 >= 1, 0.1, 0))
    direct = jnp.where((now.since >= _FEWEST) & (folds > 0), now.since / jnp.where(folds > 0, folds, 1), jnp.inf)
    # Moves that have not halved in so many steps are at least that slow.
    pace = jnp.where(jnp.isinf(now.pace), direct, jnp.maximum(now.pace, now.since / math.log(2)))
    # The sum 1 / (e^y - 1) of a geometric series of ratio e^-y, with e^y - 1 by three terms: no less than the sum.
    y = now.power / jnp.where(pace > 0, pace, 1)
    slowest = jnp.where(jnp.isinf(pace), jnp.inf, 1 / (y * (1 + y * (0.5 + y / 6))))
    noise = _MOVED * jnp.finfo(per_length.dtype).eps * per_length
    series, _ = _series(now.shrink, before.shrink, noise)
    # The rounding of parameters may be far above that of their own size, as for a mean near 0: hence `rough`.
    told = jnp.abs(1 - now.shrink) > jnp.maximum(noise, 2 * now.rough)
    return _CAUTION * gain * jnp.maximum(slowest, jnp.where(told, series, 0))


def confirm(before: Watch, now: Watch, near: jax.Array) -> tuple[Watch, jax.Array]:
    """Whether a fit that seems near its limit is: at once where gains shrink steadily, else after _CONFIRMED steps."""
    change = jnp.abs(now.ratio - before.ratio)
    steady = change < 0.1 * jnp.minimum(jnp.abs(now.ratio), jnp.abs(1 - now.ratio))
    count = jnp.where(near, jnp.where(steady, _CONFIRMED, now.near + 1), 0)
    return dataclasses.replace(now, near=count), count >= _CONFIRMED


def kept(before: Progress, after: Progress) -> Progress:
    """A resumed fit after a step. The E-step at its start is no step, and leaves its watch as it was but the record."""
    waiting = complete("state", before.state).waiting
    if waiting is None:
        return after
    seen = changed(before.watch, record=after.objective)
    return dataclasses.replace(after, watch=jnp.where(waiting, seen, after.watch))


def rests(now: Watch) -> jax.Array:
    """Whether neither the objective nor the moves have shown progress for long enough."""
    patience = jnp.maximum(_REST, 8 * jnp.where(jnp.isinf(now.pace), 0, now.pace))
    return ((now.since >= patience) | (now.rough > _SCATTER)) & (now.stalled >= patience)


def forget(now: Watch, value: jax.Array, params: Params, settled: jax.Array | bool) -> jax.Array:
    """The watch, or one that starts anew where the objective itself is still being changed."""
    return now.numbers if settled is True else jnp.where(settled, now.numbers, begun(value, params))


def judged(fit: Progress, state: State, value: jax.Array, terms: Terms) -> Progress:
    """A fit after a step to `state`, where the objective is `value`; its status says whether that was the last.

    It has converged when what is left to gain is estimated to be at most tol x total weight.
    """
    told, waiting = complete("state", state), complete("state", fit.state).waiting
    # The E-step at the start is no step: its gain and its move are not known.
    first = jnp.array(False) if waiting is None else waiting
    num_steps = fit.num_steps + ~first
    before = Watch.of(fit.watch)
    moving, move = moved(before, fit.state.params, state.params)
    finite = jnp.isfinite(move)  # where all parameters are
    move = jnp.where(first, jnp.inf, move)
    step = _step(fit, before.gain, state, value, terms, first)
    if state.loglik is None:
        moving = dataclasses.replace(moving, record=jnp.zeros_like(value))
    else:
        finite = finite & jnp.isfinite(value)
    now = observe(moving, step.height, step.gain, move, step.resolution)
    now, converged, stalled = _at_rest(moving, now, step, told, terms)
    going_on = jnp.where(num_steps >= terms.max_steps, Status.MAX_STEPS, Status.RUNNING)
    may_end, bad = told.settled & (terms.tol >= 0), ~finite | step.fell
    status = jnp.where(
        bad,
        jnp.where(finite, Status.DECREASED, Status.NONFINITE),
        jnp.where(converged & may_end, Status.CONVERGED, jnp.where(stalled & may_end, Status.STALLED, going_on)),
    ).astype(jnp.int32)
    undone = bad & ~first
    return Progress(
        state=tree.where(undone, fit.state, state),
        objective=jnp.where(undone, fit.objective, value),
        watch=forget(now, step.height, state.params, told.settled),
        num_steps=jnp.where(undone, fit.num_steps, num_steps),
        status=status,
        largest_decrease=jnp.where(finite, jnp.maximum(fit.largest_decrease, step.drop), fit.largest_decrease),
    )


def _step(fit: Progress, last_gain: jax.Array, state: State, value: jax.Array, terms: Terms, first: jax.Array) -> _Step:
    dtype = fit.objective.dtype
    eps = jnp.finfo(dtype).eps
    if state.loglik is None:
        # Without an objective moves of the parameters take the place of gains: both shrink geometrically.
        gain = height = jnp.where(first, jnp.inf, _largest_move(fit.state.params, state.params, dtype))
        resolution, allowed = jnp.asarray(4 * eps, dtype), jnp.asarray(terms.tol, dtype)
        fell, drop = jnp.array(False), jnp.zeros((), dtype)
    else:
        # The rounding of a log-likelihood is that of one nat a row at least; another objective has no unit of its own.
        size = jnp.maximum(jnp.abs(value), terms.total if terms.likelihood else 0)
        height, gain = value, value - fit.objective
        resolution, allowed = 2 * eps * size, terms.tol * terms.total
        fell = -gain > jnp.sqrt(eps) * size if terms.nature.monotone else jnp.array(False)
        drop = jnp.maximum(-gain, 0)
    if terms.nature.inexact:
        # One poor M-step does not end a fit: gains count by their envelope, which may halve in a step.
        gain = jnp.fmax(gain, jnp.where(jnp.isfinite(last_gain), 0.5 * last_gain, -jnp.inf))
    summed = terms.likelihood and state.loglik is not None
    return _Step(height, gain, resolution, allowed, summed, fell, drop)


def _at_rest(before: Watch, now: Watch, step: _Step, told: State, terms: Terms) -> tuple[Watch, jax.Array, jax.Array]:
    """Whether a fit has converged, and whether it no longer moves."""
    resolution = step.resolution
    if told.left is not None:  # some algorithms know better
        left, visible = told.left, jnp.array(True)
    else:
        left, credible = left_by_gains(before, now, resolution)
        visible = step.gain > resolution
        if step.summed:
            left = jnp.where(credible, left, left_by_moves(before, now, resolution, terms.total))
            visible = visible | ~credible
    left = jnp.maximum(left, told.missed)
    # Rounding errors of rows average out in the statistics, on which alone parameters depend.
    floor = resolution / jnp.sqrt(jnp.maximum(terms.total, 1)) if step.summed else resolution
    near = (left <= jnp.maximum(step.allowed, floor)) & visible
    if terms.nature.stochastic:  # gains are noise, and say nothing
        return now, near & (told.left is not None), jnp.array(False)
    if step.summed:
        now, confirmed = confirm(before, now, near)
        stalled = rests(now)
        # A fit that rests has come as far as its dtype lets it: tol is floored at the resolution of the objective.
        done = stalled & ((left <= resolution) | (now.rough > _SCATTER))
        return now, (confirmed if told.left is None else near) | done, stalled
    patience = PATIENCE if terms.likelihood else PATIENCE // 2
    return now, near | (now.stalled >= patience), jnp.array(False)


def _largest_move(before: Params, after: Params, dtype: Any) -> jax.Array:
    moves = [
        jnp.max(jnp.abs(b - a) / (1 + jnp.abs(a))) if jnp.size(a) else 0.0
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    ]
    return jnp.max(jnp.stack([jnp.asarray(move, dtype) for move in moves]))
