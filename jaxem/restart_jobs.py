"""A restart as a job of the scheduler: how it is drawn, loaded, stepped, and stored."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from . import parameters, scheduler, stopping, tree, watch
from .progress import advance, begin, ended
from .protocols import Data, Model, Params
from .record import record
from .slots import Algorithm
from .status import Status
from .stopping import Progress


@record
class Fitting:
    """What all restarts share.

    model: complete.
    algorithm: complete.
    x: the data, with a leading axis of independent units.
    weights: (N,), or None.
    """

    model: Model
    algorithm: Algorithm
    x: Data
    weights: jax.Array | None


@record
class Jobs:
    """All restarts, as they wait or have ended: leading axis R. Most fields are those of a `Result`.

    key: (R,), what the algorithm draws from.
    watch: what the stopping rule remembers.
    history: (R, S + 1), the objectives of the S steps of a screen.
    """

    params: Params
    key: Any
    objective: jax.Array
    loglik: jax.Array
    status: jax.Array
    num_steps: jax.Array
    num_passes: jax.Array
    largest_decrease: jax.Array
    watch: Any
    history: jax.Array


@record
class Leader:
    """The whole history of one restart, the best of those that have ended in one call of `drive`.

    number: which restart it is, R for none.
    history: the objective after each step.
    """

    number: jax.Array
    history: jax.Array


@record
class _Lane:
    """A restart that is running.

    fit: how far it has come.
    history: the objective after each step so far.
    """

    fit: Progress
    history: jax.Array


def eligible(status: jax.Array) -> jax.Array:
    """Whether restarts with this status may win."""
    return (status == Status.CONVERGED) | (status == Status.MAX_STEPS) | (status == Status.STALLED)


def best_of(numbers: jax.Array, objective: jax.Array, eligible: jax.Array) -> jax.Array:
    """The place of the best of some restarts: the highest of the eligible, or of all if none is; of equals the first.

    numbers: what they go by; objective, eligible: of each.
    """
    objective = jnp.where(jnp.isnan(objective), -jnp.inf, objective)
    among = eligible | ~jnp.any(eligible)
    top = among & (objective >= jnp.max(jnp.where(among, objective, -jnp.inf)))
    return jnp.argmin(jnp.where(top, numbers, jnp.iinfo(numbers.dtype).max))


def start_key(key: jax.Array, number: jax.Array) -> jax.Array:
    """What the start of a restart is drawn from."""
    return jax.random.fold_in(jax.random.fold_in(key, number), 0)


@functools.partial(jax.jit, static_argnames="function", inline=True)
def draw(model: Model, function: Callable | None, key: jax.Array, x: Data, weights: jax.Array | None) -> Params:
    """A start by `function`, or by the model's own `init`; jitted, so that its trace is cached."""
    return (model.init if function is None else function)(key, x, weights)


@functools.partial(jax.jit, static_argnames=("num_restarts", "function", "lanes", "kept_steps"))
def prepare(
    fitting: Fitting,
    key: jax.Array,
    starts: Params | None,
    num_restarts: int,
    function: Callable | None,
    lanes: int,
    kept_steps: int,
) -> Jobs:
    """Every restart before its first step, from `starts`, or from what `function` draws, `lanes` at a time.

    Restart i draws from `fold_in(key, i)` alone. kept_steps: how many steps the histories of all have room for.
    """

    def prepared(fitting: Fitting, key: jax.Array, starts: Params | None) -> Jobs:
        model, algorithm, x, weights = fitting.model, fitting.algorithm, fitting.x, fitting.weights
        numbers = jnp.arange(num_restarts)
        if starts is None:
            starts = jax.lax.map(
                lambda number: draw(model, function, start_key(key, number), x, weights), numbers, batch_size=lanes
            )
        run_keys = jax.vmap(lambda number: jax.random.fold_in(jax.random.fold_in(key, number), 1))(numbers)
        starts = jax.vmap(lambda params, key: parameters.as_steps_return(model, algorithm, params, x, weights, key))(
            starts, run_keys
        )
        unknown = jnp.zeros(num_restarts, tree.float_dtype(x))
        return Jobs(
            params=starts,
            key=run_keys,
            objective=unknown,
            loglik=unknown,
            status=jnp.full(num_restarts, Status.RUNNING, jnp.int32),
            num_steps=jnp.zeros(num_restarts, jnp.int32),
            num_passes=jnp.zeros_like(unknown),
            largest_decrease=jnp.zeros_like(unknown),
            watch=jax.vmap(watch.begun)(unknown, starts),
            history=jnp.zeros((num_restarts, kept_steps + 1), unknown.dtype),
        )

    return prepared(fitting, key, starts)


@functools.partial(jax.jit, static_argnames=("lanes", "capacity"))
def drive(
    fitting: Fitting,
    jobs: Jobs,
    tol: jax.Array | float,
    max_steps: jax.Array | int,
    lanes: int,
    capacity: int,
) -> tuple[Jobs, Leader]:
    """Run every waiting restart to its end, `lanes` at a time; capacity: how many steps a history has room for."""

    def driven(fitting: Fitting, jobs: Jobs, tol: jax.Array | float, max_steps: jax.Array | int) -> tuple[Jobs, Leader]:
        none = Leader(number=jnp.asarray(jobs.status.shape[0]), history=jnp.zeros(capacity + 1, jobs.history.dtype))
        iteration = _iteration(fitting, jobs, tol, max_steps, capacity)
        return scheduler.run(iteration, (jobs, none), jobs.status == Status.RUNNING, lanes)

    return driven(fitting, jobs, tol, max_steps)


def _iteration(
    fitting: Fitting, jobs: Jobs, tol: jax.Array | float, max_steps: jax.Array | int, capacity: int
) -> scheduler.Iteration:
    """The fit of one restart, as an `Iteration` of the scheduler."""
    model, algorithm, x, weights = fitting.model, fitting.algorithm, fitting.x, fitting.weights

    def load(every: tuple[Jobs, Leader], slot: jax.Array) -> _Lane:
        """A restart where it was left, which goes on counting its steps from there."""
        job = jax.tree.map(lambda leaf: leaf[slot], every[0])
        fit = begin(model, algorithm, job.params, x, weights, job.key, max_steps - job.num_steps)
        fit = dataclasses.replace(
            fit,
            num_steps=job.num_steps,
            largest_decrease=job.largest_decrease,
            watch=watch.resumed(job.watch),
        )
        return _noted(fit, jnp.pad(job.history, (0, capacity + 1 - len(job.history))))

    def step(lane: _Lane) -> _Lane:
        fit = lane.fit
        after = stopping.kept(fit, advance(model, algorithm, fit, x, weights, tol, max_steps))
        return _noted(tree.where(fit.status == Status.RUNNING, after, fit), lane.history)

    shape = jax.eval_shape(load, (jobs, None), jnp.zeros((), jnp.int32))
    empty = tree.zeros_like(shape, jax.random.key_impl(jobs.key))
    fit = dataclasses.replace(empty.fit, status=jnp.full((), Status.MAX_STEPS, jnp.int32))
    return scheduler.Iteration(
        empty=dataclasses.replace(empty, fit=fit),
        load=load,
        step=step,
        is_running=lambda lane: lane.fit.status == Status.RUNNING,
        store=functools.partial(_store, fitting),
    )


def _noted(fit: Progress, history: jax.Array) -> _Lane:
    """A fit, and its history with the objective that it has now."""
    return _Lane(fit=fit, history=history.at[fit.num_steps].set(fit.objective, mode="drop"))


def _store(fitting: Fitting, every: tuple[Jobs, Leader], slots: jax.Array, lanes: _Lane) -> tuple[Jobs, Leader]:
    """All restarts with those of some lanes stored, and the leader with the best of these taken into account."""
    jobs, leader = every
    fits = jax.vmap(lambda fit: ended(fitting.model, fitting.algorithm, fit, fitting.x, fitting.weights))(lanes.fit)
    histories = jax.vmap(_noted)(fits, lanes.history).history
    endings = Jobs(
        params=fits.state.params,
        key=None,
        objective=fits.objective,
        loglik=fits.objective if fits.state.loglik is None else fits.state.loglik,
        status=fits.status,
        num_steps=fits.num_steps,
        num_passes=jobs.num_passes.at[slots].get(mode="fill", fill_value=0) + fits.state.num_passes,
        largest_decrease=fits.largest_decrease,
        watch=fits.watch,
        history=histories[:, : jobs.history.shape[1]],
    )
    before = dataclasses.replace(jobs, key=None)
    after = jax.tree.map(lambda all_, some: all_.at[slots].set(some, mode="drop"), before, endings)
    numbers = jnp.append(slots, leader.number)
    objective = after.objective.at[numbers].get(mode="fill", fill_value=-jnp.inf)
    may_win = eligible(after.status.at[numbers].get(mode="fill", fill_value=Status.NONFINITE))
    place = best_of(numbers, objective, may_win)
    kept = Leader(number=numbers[place], history=jnp.concatenate([histories, leader.history[None]])[place])
    return dataclasses.replace(after, key=jobs.key), kept
