"""Many starts, one program: restarts share lanes, and a lane that is done takes the next restart."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import checks, parameters, stopping, tree
from .capabilities import fitted_model, fitting_algorithm
from .em import EM, pose
from .fit import Result, advance, begin, ended, history_capacity
from .implicit import refuse_derivatives
from .protocols import Data, Params
from .record import record, static
from .status import EMError, Status
from .stopping import Progress

# Temporaries of one step over all lanes, in numbers: what the second-level cache of a CPU core holds.
_LANE_BUDGET = 1 << 21
_LANE_BUDGET_ELSEWHERE = 1 << 28

# Restarts x rows x temporaries from which a coarse bulk repays its compilation.
_COARSE_WORK = 1 << 23


@record(kw_only=False)
class Screen:
    """Run every restart for `steps` EM steps, and only the best share `keep` of them to convergence.

    A screen trades the certainty of finding the best optimum for time: too few steps lose it.
    Restarts that are screened out end as MAX_STEPS, with the objective that they had.
    Raises ValueError unless steps >= 1 and 0 < keep <= 1.
    """

    steps: int = static(default=20)
    keep: float = static(default=0.25)

    def __post_init__(self) -> None:
        checks.positive_integer("steps", self.steps)
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must be a share in (0, 1]; got {self.keep}")


@record
class Restarts:
    """Every restart's ending, and the best in full.

    best: the Result of the restart with the highest objective among those that converged or ran out
    of steps (if all failed, the highest of the failed: look at its status), and that were not screened out; index:
    which it is;
    params, objective, status, num_steps, num_passes, largest_decrease: of all R restarts, leading axis R;
    total_weight: what objectives are divided by to compare them per row.
    """

    best: Result
    index: jax.Array
    params: Params
    objective: jax.Array
    status: jax.Array
    num_steps: jax.Array
    num_passes: jax.Array
    largest_decrease: jax.Array
    total_weight: jax.Array

    @property
    def failed(self) -> jax.Array:
        """Restarts (R,) that may not win: degenerate, non-finite or decreased."""
        return ~_eligible(self.status)

    def hits(self, tol: float = 1e-4) -> jax.Array:
        """How many restarts reached the best objective, to within `tol` nats per unit of weight."""
        near = self.objective >= self.best.objective - tol * self.total_weight
        return jnp.sum(near & ~self.failed)

    def count(self, status: Status) -> jax.Array:
        """How many restarts ended with this status."""
        return jnp.sum(self.status == status)

    def check(self) -> "Restarts":
        """These restarts if the best converged; else raises EMError with the remedy."""
        try:
            self.best.check()
        except EMError as error:
            raise EMError(error.status, f" (the best of {self.status.shape[0]} restarts)") from None
        return self


@record
class _Jobs:
    """All restarts, as they wait or have ended: leading axis R.

    history: of as many steps as a screen takes; key may be left out.
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


def _eligible(status: jax.Array) -> jax.Array:
    return (status == Status.CONVERGED) | (status == Status.MAX_STEPS) | (status == Status.STALLED)


def _best_of(numbers: jax.Array, objective: jax.Array, eligible: jax.Array) -> jax.Array:
    """Which of some restarts is the best: of the eligible, if there is one, the highest; of equals the first."""
    objective = jnp.where(jnp.isnan(objective), -jnp.inf, objective)
    among = eligible | ~jnp.any(eligible)
    top = among & (objective >= jnp.max(jnp.where(among, objective, -jnp.inf)))
    return jnp.argmin(jnp.where(top, numbers, jnp.iinfo(numbers.dtype).max))


@functools.partial(jax.jit, static_argnames=("lanes", "capacity"))
def _drive(
    model: Any,
    jobs: _Jobs,
    x: Data,
    weights: jax.Array | None,
    algorithm: Any,
    tol: jax.Array | float,
    max_steps: jax.Array | int,
    lanes: int,
    capacity: int,
) -> tuple[_Jobs, tuple[jax.Array, jax.Array]]:
    """Run every waiting restart to its end, `lanes` at a time; also number and history of the best of those that ran.

    The inner loop steps all lanes until a quarter of them has ended; the outer one then writes
    those away and refills them, so that no restart waits for the slowest of its batch.
    """
    run = refuse_derivatives(functools.partial(_all_ended, lanes=lanes, capacity=capacity))
    return run(model, jobs, x, weights, algorithm, tol, max_steps)


def _all_ended(
    model: Any,
    jobs: _Jobs,
    x: Data,
    weights: jax.Array | None,
    algorithm: Any,
    tol: jax.Array | float,
    max_steps: jax.Array | int,
    lanes: int,
    capacity: int,
) -> tuple[_Jobs, tuple[jax.Array, jax.Array]]:
    total = jobs.status.shape[0]
    waiting = jnp.sum(jobs.status == Status.RUNNING)
    order = jnp.argsort(jobs.status != Status.RUNNING, stable=True)

    def load(jobs: _Jobs, slot: jax.Array) -> Progress:
        """A restart taken up where it was left, with its own count of steps."""
        job = jax.tree.map(lambda leaf: leaf[slot], dataclasses.replace(jobs, history=jobs.status))
        fit = begin(model, algorithm, job.params, x, weights, job.key, max_steps - job.num_steps)
        return dataclasses.replace(
            fit,
            num_steps=job.num_steps,
            largest_decrease=job.largest_decrease,
            watch=stopping.resumed(job.watch),
        )

    def noted(histories: jax.Array, fits: Progress) -> jax.Array:
        """Histories (lanes, capacity + 1) with the objectives at hand."""
        return histories.at[jnp.arange(lanes), fits.num_steps].set(fits.objective, mode="drop")

    def put(jobs: _Jobs, slots: jax.Array, fits: Progress, histories: jax.Array, best: tuple) -> tuple[_Jobs, tuple]:
        """Write restarts back, and keep the history of the best; slot R stands for none."""
        fits = jax.vmap(lambda fit: ended(model, algorithm, fit, x, weights))(fits)
        loglik = fits.objective if fits.state.loglik is None else fits.state.loglik
        endings = dict(
            params=fits.state.params,
            objective=fits.objective,
            loglik=loglik,
            status=fits.status,
            num_steps=fits.num_steps,
            num_passes=jobs.num_passes.at[slots].get(mode="fill", fill_value=0) + fits.state.num_passes,
            largest_decrease=fits.largest_decrease,
            watch=fits.watch,
        )
        before = {name: getattr(jobs, name) for name in endings}
        histories = noted(histories, fits)
        before["history"], endings["history"] = jobs.history, histories[:, : jobs.history.shape[1]]
        after = jax.tree.map(lambda all_, some: all_.at[slots].set(some, mode="drop"), before, endings)
        jobs = dataclasses.replace(jobs, **after)
        numbers = jnp.append(slots, best[0])
        objective = jobs.objective.at[numbers].get(mode="fill", fill_value=-jnp.inf)
        eligible = _eligible(jobs.status.at[numbers].get(mode="fill", fill_value=Status.NONFINITE))
        place = _best_of(numbers, objective, eligible)
        return jobs, (numbers[place], jnp.concatenate([histories, best[1][None]])[place])

    def go_on(carry: tuple) -> jax.Array:
        _, _, fits, head, _, _ = carry
        running = jnp.sum(fits.status == Status.RUNNING)
        return jnp.where(head < waiting, running > lanes - max(1, lanes // 4), running > 0)

    def step(carry: tuple) -> tuple:
        def on(fit: Progress) -> Progress:
            after = stopping.kept(fit, advance(model, algorithm, fit, x, weights, tol, max_steps))
            return tree.where(fit.status == Status.RUNNING, after, fit)

        jobs, slots, fits, head, histories, best = carry
        fits = jax.vmap(on)(fits)
        return jobs, slots, fits, head, noted(histories, fits), best

    def refill(carry: tuple) -> tuple:
        jobs, slots, fits, head, histories, best = carry
        idle = fits.status != Status.RUNNING
        jobs, best = put(jobs, jnp.where(idle, slots, total), fits, histories, best)
        ticket = head + jnp.cumsum(idle) - 1
        taken = idle & (ticket < waiting)
        new = jnp.where(taken, order[jnp.minimum(ticket, total - 1)], total)
        fresh = jax.vmap(load, (None, 0))(jobs, jnp.minimum(new, total - 1))
        fits, slots = tree.where(taken, fresh, fits), jnp.where(idle, new, slots)
        before = jobs.history.at[new].get(mode="fill", fill_value=0)
        histories = jnp.where(taken[:, None], jnp.pad(before, ((0, 0), (0, capacity + 1 - before.shape[1]))), histories)
        return jobs, slots, fits, head + jnp.sum(taken), noted(histories, fits), best

    shapes = jax.eval_shape(jax.vmap(load, (None, 0)), jobs, jnp.zeros(lanes, jnp.int32))
    empty = tree.zeros_like(shapes, jax.random.key_impl(jobs.key))
    fits = dataclasses.replace(empty, status=jnp.full(lanes, Status.MAX_STEPS, jnp.int32))
    # The last refill only writes away.
    histories = jnp.zeros((lanes, capacity + 1), jobs.history.dtype)
    jobs, *_, best = jax.lax.while_loop(
        lambda carry: (carry[3] < waiting) | jnp.any(carry[1] < total),
        lambda carry: jax.lax.while_loop(go_on, step, refill(carry)),
        (jobs, jnp.full(lanes, total), fits, jnp.zeros_like(waiting), histories, (jnp.asarray(total), histories[0])),
    )
    return jobs, best


@functools.partial(jax.jit, static_argnames=("num_restarts", "init", "lanes", "kept_steps"))
def _prepare(
    model: Any,
    key: jax.Array,
    x: Data,
    weights: jax.Array | None,
    starts: Params | None,
    algorithm: Any,
    num_restarts: int,
    init: Callable | None,
    lanes: int,
    kept_steps: int,
) -> _Jobs:
    run = functools.partial(_started, num_restarts=num_restarts, init=init, lanes=lanes, kept_steps=kept_steps)
    return refuse_derivatives(run)(model, key, x, weights, starts, algorithm)


def _started(
    model: Any,
    key: jax.Array,
    x: Data,
    weights: jax.Array | None,
    starts: Params | None,
    algorithm: Any,
    num_restarts: int,
    init: Callable | None,
    lanes: int,
    kept_steps: int,
) -> _Jobs:
    """Every restart before its first step. Restart i draws from `fold_in(key, i)` alone."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_restarts))
    if starts is None:
        starts = jax.lax.map(
            lambda key: _draw(model, init, jax.random.fold_in(key, 0), x, weights), keys, batch_size=lanes
        )
    run_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
    starts = jax.vmap(lambda params, key: parameters.as_steps_return(model, algorithm, params, x, weights, key))(
        starts, run_keys
    )
    unknown = jnp.zeros(num_restarts, tree.float_dtype(x))
    return _Jobs(
        params=starts,
        key=run_keys,
        objective=unknown,
        loglik=unknown,
        status=jnp.full(num_restarts, Status.RUNNING, jnp.int32),
        num_steps=jnp.zeros(num_restarts, jnp.int32),
        num_passes=jnp.zeros_like(unknown),
        largest_decrease=jnp.zeros_like(unknown),
        watch=jax.vmap(stopping.watch)(unknown, starts),
        history=jnp.zeros((num_restarts, kept_steps + 1), unknown.dtype),
    )


@functools.partial(jax.jit, static_argnames="screen")
def _survivors(jobs: _Jobs, screen: Screen) -> tuple[_Jobs, jax.Array]:
    """The best share of the restarts, those among them that are not done set to run on."""
    total = jobs.status.shape[0]
    rank = jnp.argsort(jnp.argsort(-jnp.where(_eligible(jobs.status), jobs.objective, -jnp.inf)))
    kept = rank < max(1, round(screen.keep * total))
    on = kept & (jobs.status == Status.MAX_STEPS)
    return dataclasses.replace(jobs, status=jnp.where(on, Status.RUNNING, jobs.status)), kept


@jax.jit
def _handed_over(jobs: _Jobs, kept: jax.Array | None) -> _Jobs:
    """Restarts after a coarse bulk, all or those kept set to run on, without what coarse arithmetic told of them."""
    again = jnp.ones_like(jobs.status, bool) if kept is None else kept
    # Where the coarse arithmetic came to no end, what its moves were worth is not to be believed either.
    fresh = jax.vmap(stopping.watch)(jnp.zeros_like(jobs.objective), jobs.params)
    watch = tree.where(jobs.status == Status.CONVERGED, jobs.watch, fresh)
    return dataclasses.replace(
        jobs,
        status=jnp.where(again, Status.RUNNING, jobs.status),
        watch=watch,
        num_steps=jnp.where(again, 0, jobs.num_steps),
        largest_decrease=jnp.where(again, 0, jobs.largest_decrease),
    )


@functools.partial(jax.jit, static_argnames="finite")
def _finish(
    jobs: _Jobs,
    last: tuple[jax.Array, jax.Array],
    kept: jax.Array | None,
    x: Data,
    weights: jax.Array | None,
    finite: bool,
) -> Restarts:
    """All restarts as they are reported; `last` is number and history of the best in the last drive."""
    eligible = _eligible(jobs.status)
    index = _best_of(jnp.arange(len(eligible)), jobs.objective, eligible if kept is None else eligible & kept)
    best = jax.tree.map(lambda leaf: leaf[index], dataclasses.replace(jobs, key=None))
    number, history = last
    # Who is the best and did not run last has ended in its screen.
    history = jnp.where(number == index, history, jnp.pad(best.history, (0, len(history) - len(best.history))))
    past = best.objective if finite else jnp.nan
    best = dataclasses.replace(best, history=jnp.where(jnp.arange(len(history)) <= best.num_steps, history, past))
    return Restarts(
        best=Result(**{field.name: getattr(best, field.name) for field in dataclasses.fields(Result)}),
        index=index,
        params=jobs.params,
        objective=jobs.objective,
        status=jobs.status,
        num_steps=jobs.num_steps,
        num_passes=jobs.num_passes,
        largest_decrease=jobs.largest_decrease,
        total_weight=tree.total_weight(x, weights),
    )


def fit_restarts(
    model: Any,
    key: jax.Array | None,
    x: Data,
    weights: jax.Array | None = None,
    *,
    num_restarts: int | None = None,
    init: Callable | Params | None = None,
    algorithm: Any = EM(),
    tol: jax.Array | float = 1e-6,
    max_steps: jax.Array | int = 1000,
    screen: Screen | None = None,
    block_size: int | None = None,
) -> Restarts:
    """Fit a model by EM from many starts and keep the best.

    num_restarts: R; init: a function `(key, x, weights) -> params` (default: `model.init`), or
    params with a leading axis R; tol, max_steps: as in `em_fit`, for every restart by itself;
    screen: short runs first, and only the best of them to convergence; block_size: restarts that
    run side by side, chosen from shapes and backend when None.

    Restart i draws from `jax.random.fold_in(key, i)` alone, whatever R and block_size are. A restart
    that fails ends with its own status, never wins, and does not touch its neighbours. Where the
    model has a `coarse()` form, large jobs do their bulk with it, and every restart is then run on
    to convergence by the model itself: what is reported is that run, from where the bulk led, but num_passes
    counts both.

    Raises ValueError or TypeError for bad input when called eagerly.
    """
    model, algorithm = fitted_model(model), fitting_algorithm(algorithm)
    checks.limits(tol, max_steps)
    if block_size is not None:
        checks.positive_integer("block_size", block_size)
    if screen is not None and not isinstance(screen, Screen):
        raise TypeError(f"screen must be a Screen, as in Screen(steps=20, keep=0.25), or None; got {screen!r}")
    x, weights = checks.native((x, weights))
    model.check(x, weights)
    checks.plain_axes("x", x)
    checks.plain_axes("weights", weights)
    x = tree.one_precision(pose(model, x, weights).x)
    x, weights = tree.present(x, None if weights is None else jnp.asarray(weights))
    starts, function, num_restarts = _starts(model, init, num_restarts)
    if starts is not None:
        parameters.check("init", model, starts, x, lead=(num_restarts,))
    key = checks.random_key(jax.random.key(0) if key is None and starts is not None else key)

    work = _work(model, starts, function, key, x, weights)
    lanes = min(num_restarts, _lanes(work) if block_size is None else block_size)
    capacity = history_capacity(max_steps, lanes)
    kept_steps = 0 if screen is None else min(screen.steps, capacity)
    jobs = _prepare(model, key, x, weights, starts, algorithm, num_restarts, function, lanes, kept_steps)

    run = functools.partial(_drive, x=x, weights=weights, algorithm=algorithm, tol=tol, lanes=lanes, capacity=capacity)
    # What only parameters tell of a restart is enough to go on from where nothing is random or scheduled.
    resumable = algorithm.nature(model).monotone
    if screen is not None and not resumable:
        raise ValueError(
            "screen needs an algorithm that can go on from parameters alone, without draws, batches or a schedule; "
            f"got {algorithm!r}. Leave screen out"
        )
    # Where every restart takes all its steps, a bulk before them saves none.
    large = num_restarts * work >= _COARSE_WORK and not (checks.is_known(tol) and np.all(np.asarray(tol) < 0))
    bulk = model.coarse() if resumable and large else model
    coarse = bulk is not model  # a model without a cheaper form gives itself
    kept = None
    if screen is not None:
        jobs, _ = run(bulk, jobs, max_steps=jnp.minimum(screen.steps, max_steps))
        jobs, kept = _survivors(jobs, screen)
    jobs, last = run(bulk, jobs, max_steps=max_steps)
    if coarse:
        jobs, last = run(model, _handed_over(jobs, kept), max_steps=max_steps)
    runs = _finish(jobs, last, kept, x, weights, checks.nans_are_debugged())
    if isinstance(max_steps, (int, np.integer)):
        best = dataclasses.replace(runs.best, history=runs.best.history[: max_steps + 1])
        runs = dataclasses.replace(runs, best=best)
    return runs


def _starts(model: Any, init: Any, num_restarts: int | None) -> tuple[Params | None, Callable | None, int]:
    """Stacked starts or a function that draws one, and how many restarts there are."""
    if init is None and model.init is None:
        raise TypeError("this model has no init: pass init=..., a function (key, x, weights) or stacked params")
    if init is None or callable(init):
        if num_restarts is None:
            raise TypeError("num_restarts is needed: how many starts to draw")
        checks.positive_integer("num_restarts", num_restarts)
        return None, init, int(num_restarts)
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(init)}
    if len(lengths) != 1 or lengths == {()}:
        raise ValueError(
            "init must be a function (key, x, weights) -> params, or params whose arrays share a leading axis of "
            f"restarts; got leading axes {sorted(lengths)}"
        )
    ((stacked,),) = lengths
    if num_restarts not in (None, stacked):
        raise ValueError(f"num_restarts is {num_restarts}, but init holds {stacked} starts: leave num_restarts out")
    return jax.tree.map(jnp.asarray, checks.native(init)), None, stacked


@functools.partial(jax.jit, static_argnames="function", inline=True)
def _draw(model: Any, function: Callable | None, key: jax.Array, x: Data, weights: jax.Array | None) -> Params:
    """A start; under jit for its trace to be remembered."""
    return (model.init if function is None else function)(key, x, weights)


def _work(
    model: Any, starts: Params | None, function: Callable | None, key: jax.Array, x: Data, weights: jax.Array | None
) -> int:
    """Temporaries of one E-step of one restart, in numbers."""
    rows = tree.num_rows(x)
    if starts is None:
        params = _draw.eval_shape(model, function, key, x, weights)
        if function is not None:
            parameters.shapes("init(key, x, weights)", model, params, x)
    else:
        params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), starts)
    if model.floats_per_restart is None:
        return tree.size(x) + rows + tree.size(params)
    return rows * model.floats_per_restart(params, x)


def _lanes(work: int) -> int:
    """Restarts side by side whose temporaries stay in fast memory: a power of two."""
    budget = _LANE_BUDGET if jax.default_backend() == "cpu" else _LANE_BUDGET_ELSEWHERE
    return 1 << min(12, max(0, (budget // max(1, work)).bit_length() - 1))
