"""Fitting: the loop over EM steps, when it stops, and what it reports."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import checks, parameters, stopping, tree
from .em import EM, objective, units
from .implicit import refuse_derivatives
from .protocols import Data, Params
from .record import record
from .status import EMError, Status

# Steps of history kept when max_steps is traced, and the size that all shorter fits share one compilation at.
HISTORY = 1000

# Numbers of history at most, of all fits that run at a time: 64 MB in float32.
_LONGEST_HISTORY = 1 << 24


@record
class Result:
    """A fit. Under vmap every field has a leading axis.

    params: the fitted parameters.
    objective: log-likelihood + log-prior of exactly these params.
    loglik: the first of the two.
    num_steps: EM steps taken.
    num_passes: E-steps, counted in passes over the data, that of the start included, and one for the last objective
        where an algorithm has not seen all rows.
    status: a `Status` as an int32 array.
    history: (max_steps + 1,), the objective after i steps: the first 1001 where max_steps is traced, and 2**24 at the
        most, of all restarts that run side by side. Past the end it is NaN, or the last objective again where
        `jax_debug_nans` would stop at a NaN. Before the last step it is the algorithm's own account of it, where that
        sees a part of the rows at a time, or a tempered posterior.
    largest_decrease: the largest fall of the objective in one step, 0 if it never fell.
    """

    params: Params
    objective: jax.Array
    loglik: jax.Array
    num_steps: jax.Array
    num_passes: jax.Array
    status: jax.Array
    history: jax.Array
    largest_decrease: jax.Array

    @property
    def converged(self) -> jax.Array:
        """Whether what is left to gain is at most tol; False for every other ending."""
        return self.status == Status.CONVERGED

    def check(self) -> "Result":
        """This result if all of it converged; else raises EMError with the remedy."""
        if not checks.is_concrete(self.status):
            raise TypeError("check() needs a finished fit: call it outside of jit, or look at .status inside")
        statuses = np.atleast_1d(np.asarray(self.status))
        failed = statuses[statuses != Status.CONVERGED]
        if failed.size:
            detail = f" ({failed.size} of {statuses.size} fits did not converge)" if statuses.size > 1 else ""
            raise EMError(Status(int(np.bincount(failed - Status.RUNNING).argmax() + Status.RUNNING)), detail)
        return self


@record
class Progress:
    """A fit under way: the algorithm's state, its objective, and what the stopping rule remembers."""

    state: Any
    objective: jax.Array
    watch: stopping.Watch
    num_steps: jax.Array
    status: jax.Array
    largest_decrease: jax.Array


def begin(
    model: Any,
    algorithm: Any,
    params: Params,
    x: Data,
    weights: jax.Array | None,
    key: jax.Array | None,
    max_steps: jax.Array | int,
) -> Progress:
    """A fit before its first step; where the algorithm can wait, before the E-step at its start too."""
    waits = getattr(algorithm, "waits", False)
    state = (algorithm.waiting if waits else algorithm.init)(model, params, x, weights, key)
    unknown = jnp.full((), -jnp.inf, tree.float_dtype(x))
    fit = Progress(
        state=state,
        objective=unknown,
        watch=stopping.watch(unknown, params),
        num_steps=jnp.zeros((), jnp.int32),
        status=jnp.full((), Status.RUNNING, jnp.int32),
        largest_decrease=jnp.zeros_like(unknown),
    )
    if waits:
        return fit
    value = objective(model, state)
    sound = tree.all_finite(state.params) & (jnp.isfinite(value) | (state.loglik is None))
    status = jnp.where(fit.num_steps >= max_steps, Status.MAX_STEPS, Status.RUNNING)
    return dataclasses.replace(
        fit,
        objective=value,
        watch=dataclasses.replace(fit.watch, record=value),
        status=jnp.where(sound, status, Status.NONFINITE).astype(jnp.int32),
    )


def advance(
    model: Any,
    algorithm: Any,
    fit: Progress,
    x: Data,
    weights: jax.Array | None,
    tol: jax.Array | float,
    max_steps: jax.Array | int,
) -> Progress:
    """One EM step of a fit that is running, and whether it was the last.

    It has converged when what is left to gain is estimated to be at most tol x total weight (see `stopping`).
    """
    dtype = fit.objective.dtype
    eps = jnp.finfo(dtype).eps
    total = tree.total_weight(x, weights).astype(dtype)
    # A log-likelihood is rounded in units of one nat a row; another objective has no unit of its own.
    likelihood = getattr(model, "likelihood", True)
    rounded = total if likelihood else jnp.zeros_like(total)
    waits = getattr(algorithm, "waits", False)
    state = (algorithm.go_on if waits else algorithm.step)(model, fit.state, x, weights)
    value = objective(model, state)
    known = state.loglik is not None
    # The E-step at the start is no step: its gain and its move are not known.
    waiting = fit.state.num_steps < 0 if waits else jnp.array(False)
    num_steps = fit.num_steps + ~waiting
    moving, move = stopping.moved(fit.watch, fit.state.params, state.params)
    finite = jnp.isfinite(move)  # where all parameters are
    move = jnp.where(waiting, jnp.inf, move)

    if known:
        gain = value - fit.objective
        resolution = 2 * eps * jnp.maximum(jnp.abs(value), rounded)
        allowed = tol * total
        finite = finite & jnp.isfinite(value)
        fell = -gain > jnp.sqrt(eps) * jnp.maximum(jnp.abs(value), rounded) if algorithm.monotone else False
        drop = jnp.maximum(-gain, 0)
        before, height = moving, value
    else:
        # Without an objective the parameters themselves are watched: their moves shrink like its gains.
        gain = height = jnp.where(waiting, jnp.inf, _largest_move(fit.state.params, state.params, dtype))
        resolution, allowed = jnp.asarray(4 * eps, dtype), jnp.asarray(tol, dtype)
        fell, drop = False, jnp.zeros((), dtype)
        before = dataclasses.replace(moving, record=jnp.zeros((), dtype))

    if getattr(algorithm, "inexact", lambda _: False)(model):
        # One poor M-step does not end a fit: gains count by their envelope, which may halve in a step.
        gain = jnp.fmax(gain, jnp.where(jnp.isfinite(fit.watch.gain), 0.5 * fit.watch.gain, -jnp.inf))
    settled = getattr(state, "settled", True)
    watch = stopping.observe(before, height, gain, move, resolution)
    summed = known and likelihood  # a long sum, whose rounding hides what parameters still show
    if hasattr(state, "left"):  # some algorithms know better
        left, visible = state.left, jnp.array(True)
    else:
        left, credible = stopping.left_by_gains(before, watch, resolution)
        visible = gain > resolution
        if summed:
            left = jnp.where(credible, left, stopping.left_by_moves(before, watch, resolution, total))
            visible = visible | ~credible
    if hasattr(state, "missed"):  # what M-steps are known to have left of Q
        left = jnp.maximum(left, state.missed)
    # Rounding errors of rows average out in all that parameters see of them.
    floor = resolution / jnp.sqrt(jnp.maximum(total, 1)) if summed else resolution
    near = (left <= jnp.maximum(allowed, floor)) & visible
    if getattr(algorithm, "stochastic", False):
        # Gains are noise, and say nothing.
        converged, stalled = near & hasattr(state, "left"), jnp.array(False)
    elif summed:
        watch, confirmed = stopping.confirm(before, watch, near)
        stalled = stopping.rests(watch)
        # A fit that rests has come as far as its dtype lets it: tol is floored at the resolution of the objective.
        converged = (near if hasattr(state, "left") else confirmed) | (stalled & (left <= resolution))
    else:
        patience = stopping.PATIENCE if likelihood else stopping.PATIENCE // 2
        converged, stalled = near | (watch.stalled >= patience), jnp.array(False)
    going_on = jnp.where(num_steps >= max_steps, Status.MAX_STEPS, Status.RUNNING)
    may_end = settled & (tol >= 0)
    bad = ~finite | fell
    status = jnp.where(
        bad,
        jnp.where(finite, Status.DECREASED, Status.NONFINITE),
        jnp.where(converged & may_end, Status.CONVERGED, jnp.where(stalled & may_end, Status.STALLED, going_on)),
    ).astype(jnp.int32)
    undone = bad & ~waiting
    return Progress(
        state=tree.where(undone, fit.state, state),
        objective=jnp.where(undone, fit.objective, value),
        watch=stopping.forget(watch, height, state.params, settled),
        num_steps=jnp.where(undone, fit.num_steps, num_steps),
        status=status,
        largest_decrease=jnp.where(finite, jnp.maximum(fit.largest_decrease, drop), fit.largest_decrease),
    )


def ended(model: Any, algorithm: Any, fit: Progress, x: Data, weights: jax.Array | None) -> Progress:
    """The fit as it is reported: the objective of all rows at its parameters, and the final status.

    A fit that rests on a dead or collapsed component is DEGENERATE, however it ended.
    """
    status = jnp.where(fit.status == Status.RUNNING, Status.MAX_STEPS, fit.status)
    state, value = fit.state, fit.objective
    if hasattr(algorithm, "evaluated"):
        state = algorithm.evaluated(model, fit.state, x, weights)
    if state is not fit.state:
        value = objective(model, state)
        unsound = ~jnp.isfinite(value) if state.loglik is not None else False
        status = jnp.where(unsound & (status != Status.NONFINITE), Status.NONFINITE, status)
    if hasattr(model, "degenerate"):
        collapsed = jnp.any(model.degenerate(state.stats)) & tree.all_finite(state.params)
        status = jnp.where(collapsed, Status.DEGENERATE, status)
    return dataclasses.replace(fit, state=state, objective=value, status=status.astype(jnp.int32))


def like_step(model: Any, algorithm: Any, params: Params, x: Data, weights: jax.Array | None, key: Any) -> Params:
    """The start, in the dtypes that a step returns; ValueError where a step changes its structure or shapes."""

    def step(params: Params) -> Params:
        return algorithm.step(model, algorithm.init(model, params, x, weights, key), x, weights).params

    given, params = params, tree.in_precision(params, tree.float_dtype(x))
    try:
        after = jax.eval_shape(step, params)
    except TypeError:
        # A model of the user's own may hold whole numbers that are meant as such, as an index.
        after = jax.eval_shape(step, given)
    structure: Any = jax.tree.structure(params)
    if structure != jax.tree.structure(after):
        raise ValueError(
            f"m_step must return the structure that params have; got {jax.tree.structure(after)} for {structure}"
        )
    for path, (new, old) in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda new, old: _Pair(new, old), after, params), is_leaf=lambda leaf: isinstance(leaf, _Pair)
    ):
        if jnp.shape(old) != new.shape:
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} has shape {jnp.shape(old)}, but a step makes it {new.shape}: "
                "the start does not fit the model or the data"
            )
    return jax.tree.map(lambda new, old: jnp.asarray(old, new.dtype), after, params)


class _Pair(tuple):
    """Two leaves that travel as one."""

    def __new__(cls, *both: Any) -> "_Pair":
        return super().__new__(cls, both)


def _largest_move(before: Params, after: Params, dtype: Any) -> jax.Array:
    moves = [
        jnp.max(jnp.abs(b - a) / (1 + jnp.abs(a))) if jnp.size(a) else 0.0
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    ]
    return jnp.max(jnp.stack([jnp.asarray(move, dtype) for move in moves]))


@functools.partial(jax.jit, static_argnames=("capacity", "finite"))
def _fit(
    model: Any,
    params: Params,
    x: Data,
    weights: jax.Array | None,
    key: jax.Array | None,
    algorithm: Any,
    tol: jax.Array,
    max_steps: jax.Array,
    capacity: int,
    finite: bool,
) -> Result:
    run = refuse_derivatives(functools.partial(_run, capacity=capacity, finite=finite))
    return run(model, params, x, weights, key, algorithm, tol, max_steps)


def _run(
    model: Any,
    params: Params,
    x: Data,
    weights: jax.Array | None,
    key: jax.Array | None,
    algorithm: Any,
    tol: jax.Array,
    max_steps: jax.Array,
    capacity: int,
    finite: bool,
) -> Result:
    x, weights = tree.present(x, weights)
    params = like_step(model, algorithm, params, x, weights, key)
    start = begin(model, algorithm, params, x, weights, key, max_steps)
    history = jnp.zeros(capacity + 1, start.objective.dtype).at[0].set(start.objective)

    def running(carry: tuple[Progress, jax.Array]) -> jax.Array:
        return carry[0].status == Status.RUNNING

    def body(carry: tuple[Progress, jax.Array]) -> tuple[Progress, jax.Array]:
        fit, history = carry
        fit = advance(model, algorithm, fit, x, weights, tol, max_steps)
        return fit, history.at[fit.num_steps].set(fit.objective, mode="drop")

    start, history = tree.varying((start, history), params, x, weights, key, tol, max_steps, model, algorithm)
    fit, history = jax.lax.while_loop(running, body, (start, history))
    fit = ended(model, algorithm, fit, x, weights)
    history = history.at[fit.num_steps].set(fit.objective, mode="drop")
    past = fit.objective if finite else jnp.nan
    history = jnp.where(jnp.arange(capacity + 1) <= fit.num_steps, history, past)
    return Result(
        params=fit.state.params,
        objective=fit.objective,
        loglik=fit.objective if fit.state.loglik is None else fit.state.loglik,
        num_steps=fit.num_steps,
        num_passes=fit.state.num_passes,
        status=fit.status,
        history=history,
        largest_decrease=fit.largest_decrease,
    )


def history_capacity(max_steps: Any, fits: int = 1) -> int:
    """Steps of history to make room for: few distinct numbers, so that few programs are compiled."""
    if not isinstance(max_steps, (int, np.integer)) or max_steps <= HISTORY:
        return HISTORY
    return min(1 << (int(max_steps) - 1).bit_length(), max(HISTORY, _LONGEST_HISTORY // fits))


def em_fit(
    model: Any,
    params: Params,
    x: Data,
    weights: jax.Array | None = None,
    *,
    key: jax.Array | None = None,
    algorithm: Any = EM(),
    tol: jax.Array | float = 1e-6,
    max_steps: jax.Array | int = 1000,
) -> Result:
    """Fit a model by EM from one start, in one compiled loop.

    x: N rows as the model takes them; weights (N,): how many rows each row counts for.
    tol: stop when what is left to gain, per unit of weight, is estimated to be at most this (nats;
    see `jaxem.stopping`). It is a distance to the limit, not a step size, and is floored at the
    dtype's resolution; a negative tol takes exactly max_steps steps.
    key: drives algorithms that are random. Every argument may be traced, so `jax.jit(em_fit)` works
    as it is, and so do `vmap` and `scan` over any of them.

    Raises ValueError or TypeError for bad input when called eagerly; under jit see `Result.status`. Raises TypeError
    for derivatives through it, which a fit has none of yet.
    """
    checks.fitted_model(model)
    checks.algorithm(algorithm)
    check_limits(tol, max_steps)
    x, weights = checks.native((x, weights))
    if hasattr(model, "check"):
        model.check(x, weights)
    x = units(model, x)
    parameters.check("params", model, params, x)
    if key is not None:
        key = checks.random_key(key)
    checks.plain_axes("x", x)
    checks.plain_axes("weights", weights)
    x, params = tree.one_precision(x), checks.native(params)
    weights = None if weights is None else jnp.asarray(weights)
    capacity, finite = history_capacity(max_steps), nans_are_debugged()
    result = _fit(model, params, x, weights, key, algorithm, tol, max_steps, capacity, finite)
    if isinstance(max_steps, (int, np.integer)):
        result = dataclasses.replace(result, history=result.history[..., : max_steps + 1])
    return result


def nans_are_debugged() -> bool:
    """Whether JAX stops at the first NaN, so that none may stand for what is not there."""
    return bool(jax.config.jax_debug_nans)  # type: ignore[attr-defined]


def check_limits(tol: Any, max_steps: Any) -> None:
    """Raise TypeError or ValueError for limits that are no single numbers, or that no fit can have."""
    checks.number("tol", tol, "a finite number, nats per unit of weight")
    if checks.is_concrete(tol) and not np.isfinite(tol):
        raise ValueError(f"tol must be a finite number, nats per unit of weight; got {tol}")
    checks.number("max_steps", max_steps, "a whole number", whole=True)
    if checks.is_concrete(max_steps) and not 0 <= max_steps < 2**31:
        raise ValueError(f"max_steps must be at least 0 and below 2**31, as int32 counts steps; got {max_steps}")
