"""Many starts in one program: restarts run side by side, and where one has ended the next takes its place."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import certificate, checks, implicit, parameters, tree, watch
from .arguments import chosen, data_of, limits, sees_all_rows
from .capabilities import fitted_model, informed
from .em.certified import Verdict
from .fit import Result, history_capacity
from .numerics import tuning
from .protocols import AnyModel, Data, Model, Params
from .record import fields, record, static
from .restart_jobs import Fitting, Jobs, Leader, best_of, draw, drive, eligible, prepare, start_key
from .scheduler import lanes_for
from .slots import Algorithm
from .status import EMError, Status


@record(kw_only=False)
class Screen:
    """Run every restart for a few EM steps, and only the best of them to convergence.

    steps: how many steps every restart takes.
    keep: the fraction of the restarts that go on.

    A screen trades the certainty of finding the best optimum for time: with too few steps it may be lost. Restarts that
    are screened out end as MAX_STEPS, with the objective that they had.
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
    """How every restart ended, and the best of them in full.

    best: the Result of the restart with the highest objective among those that converged, stalled or ran out of steps,
        and were not screened out (if there is none, the highest of all: look at its status); certified, where that was
        asked for.
    index: which restart that is.
    total_weight: what objectives are divided by to compare them per row.

    Of every restart, leading axis R, with the meaning that they have in a `Result`:
    params: the fitted parameters.
    objective: (R,).
    status: (R,).
    num_steps: (R,).
    num_passes: (R,).
    largest_decrease: (R,).
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
        return ~eligible(self.status)

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


@functools.partial(jax.jit, static_argnames="screen")
def _survivors(jobs: Jobs, screen: Screen) -> tuple[Jobs, jax.Array]:
    """All restarts, the best of them set to run on if they ran out of steps; and which are among the best (R,)."""
    total = jobs.status.shape[0]
    rank = jnp.argsort(jnp.argsort(-jnp.where(eligible(jobs.status), jobs.objective, -jnp.inf)))
    kept = rank < max(1, round(screen.keep * total))
    on = kept & (jobs.status == Status.MAX_STEPS)
    return dataclasses.replace(jobs, status=jnp.where(on, Status.RUNNING, jobs.status)), kept


@jax.jit
def _handed_over(jobs: Jobs, kept: jax.Array | None) -> Jobs:
    """Restarts after a run in coarse arithmetic, those kept (all by default) set to run anew from where it led."""
    again = jnp.ones_like(jobs.status, bool) if kept is None else kept
    # The gains and moves of a run in coarse arithmetic are trusted only where it has converged.
    fresh = jax.vmap(watch.begun)(jnp.zeros_like(jobs.objective), jobs.params)
    return dataclasses.replace(
        jobs,
        status=jnp.where(again, Status.RUNNING, jobs.status),
        watch=tree.where(jobs.status == Status.CONVERGED, jobs.watch, fresh),
        num_steps=jnp.where(again, 0, jobs.num_steps),
        largest_decrease=jnp.where(again, 0, jobs.largest_decrease),
    )


@functools.partial(jax.jit, static_argnames="finite")
def _finish(
    jobs: Jobs, leader: Leader, kept: jax.Array | None, x: Data, weights: jax.Array | None, finite: bool
) -> Restarts:
    """All restarts as they are reported.

    leader: the best of those that ran last, with its history.
    kept: (R,), which restarts were not screened out; None without a screen.
    finite: whether histories must be finite past their end.
    """
    may_win = eligible(jobs.status)
    index = best_of(jnp.arange(len(may_win)), jobs.objective, may_win if kept is None else may_win & kept)
    best = jax.tree.map(lambda leaf: leaf[index], dataclasses.replace(jobs, key=None))
    history = leader.history
    # The best restart, if it did not run last, ended during the screen, and has its history from there.
    history = jnp.where(leader.number == index, history, jnp.pad(best.history, (0, len(history) - len(best.history))))
    past = best.objective if finite else jnp.nan
    best = dataclasses.replace(best, history=jnp.where(jnp.arange(len(history)) <= best.num_steps, history, past))
    shown = {name: value for name, value in fields(best).items() if name not in ("key", "watch")}
    return Restarts(
        best=Result(**shown, certified=jnp.array(False)),
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
    model: AnyModel,
    key: jax.Array | None,
    x: Data,
    weights: jax.Array | None = None,
    *,
    num_restarts: int | None = None,
    init: Callable | Params | None = None,
    algorithm: Algorithm | Any | None = None,
    tol: jax.Array | float = 1e-6,
    max_steps: jax.Array | int = 1000,
    screen: Screen | None = None,
    block_size: int | None = None,
    certify: bool = True,
) -> Restarts:
    """Fit a model by EM from many starts and keep the best.

    num_restarts: R.
    init: a function `(key, x, weights) -> params` (default: `model.init`), or params with a leading axis R.
    algorithm, tol, max_steps: as in `em_fit`, for every restart by itself.
    screen: short runs first, and only the best of them to convergence.
    block_size: how many restarts run side by side; chosen from shapes and backend when None.
    certify: whether the best, if it converged, is certified, in up to 30 E-steps (see `certified`). From a higher point
        that is found the fit goes on; a traced call only reports it, by `best.certified`. Not certified are
        models without a likelihood or an M-step, and algorithms whose steps do not climb the likelihood of all rows.

    Restart i draws from `jax.random.fold_in(key, i)` alone, whatever R and block_size are. A restart that fails ends
    with its own status, never wins, and does not touch its neighbours. Where the model has a `coarse()` form, a large
    job of a monotone algorithm runs with it first, screen included, and then the restarts that are kept run to
    convergence with the model itself. What is reported of these is that second run, but num_passes counts both.

    `best` has the derivatives of its limit, as those of `em_fit`; those of all else are NaN.

    Raises ValueError or TypeError for bad input when called eagerly.
    """
    model = fitted_model(model)
    algorithm = chosen(model, algorithm)
    limits(tol, max_steps)
    _options(block_size, screen)
    # A start of the user's own is drawn from the rows as they are.
    sees_all = sees_all_rows(model, algorithm) and not callable(init)
    x, weights = tree.present(*data_of(model, x, weights, sees_all))
    model = informed(model, tree.constants(x))
    starts, function, num_restarts = _starts(model, init, num_restarts)
    if starts is not None:
        parameters.check("init", model, starts, x, lead=(num_restarts,))
    key = checks.random_key(jax.random.key(0) if key is None and starts is not None else key)

    given = implicit.Given(model=model, algorithm=algorithm, x=x, weights=weights, start=starts)
    fitting = Fitting(model=model, algorithm=algorithm, x=x, weights=weights)
    fitting, first, tol, max_steps = tree.constants((fitting, starts, tol, max_steps))
    work = _work(fitting, first, function, key)
    lanes = min(num_restarts, block_size or lanes_for(work))
    capacity = history_capacity(max_steps, lanes)
    jobs = prepare(fitting, key, first, num_restarts, function, lanes, _steps_kept(screen, capacity))
    runs = _all_phases(fitting, jobs, screen, num_restarts * work, tol, max_steps, lanes, capacity)
    if certify:
        runs = _certified(fitting, runs, tol, max_steps)
    best = implicit.differentiable(_shown(runs.best, max_steps), _of_one(runs.index, given, function, key), None)
    return dataclasses.replace(implicit.unknown(given, runs), best=best)


def _of_one(index: jax.Array, given: implicit.Given, function: Callable | None, key: jax.Array) -> implicit.Given:
    """All that the limit of one restart depends on, with its own start where this may have a derivative."""
    if checks.is_concrete(given) or (given.start is None and function is None):
        return dataclasses.replace(given, start=None)  # a model's own starts are constants
    if given.start is None:
        start = draw(given.model, function, start_key(key, index), given.x, given.weights)
    else:
        start = jax.tree.map(lambda leaf: leaf[index], given.start)
    return dataclasses.replace(given, start=start)


def _options(block_size: Any, screen: Any) -> None:
    """Raise ValueError or TypeError for what cannot be one of these."""
    if block_size is not None:
        checks.positive_integer("block_size", block_size)
    if screen is not None and not isinstance(screen, Screen):
        raise TypeError(f"screen must be a Screen, as in Screen(steps=20, keep=0.25), or None; got {screen!r}")


def _steps_kept(screen: Screen | None, capacity: int) -> int:
    """Steps of a screen that all restarts have a history of."""
    return 0 if screen is None else min(screen.steps, capacity)


def _shown(best: Result, max_steps: Any) -> Result:
    """A fit with a history of just the steps that it might have taken, where their number is known."""
    known = isinstance(max_steps, (int, np.integer))
    return dataclasses.replace(best, history=best.history[: max_steps + 1]) if known else best


def _certified(fitting: Fitting, runs: Restarts, tol: jax.Array | float, max_steps: jax.Array | int) -> Restarts:
    """The restarts, with a verdict on the best, which goes on where a concrete verdict found a higher point."""
    known = checks.is_concrete(runs.best.status)
    if not certificate.possible(fitting) or (known and int(runs.best.status) != Status.CONVERGED):
        return runs
    runs, found = _looked_at(fitting, runs, tol)
    if known and found.better:
        return _with_best(runs, certificate.gone_on(fitting, runs.best, found.params, tol, max_steps))
    return runs


@functools.partial(jax.jit, inline=True)
def _looked_at(fitting: Fitting, runs: Restarts, tol: jax.Array | float) -> tuple[Restarts, Verdict]:
    best, found = certificate.looked_at(fitting, runs.best, tol)
    return _with_best(runs, best), found


@jax.jit
def _with_best(runs: Restarts, best: Result) -> Restarts:
    """Restarts whose best is this, also where it stands among all."""
    changed = {name: fields(best)[name] for name in ("params", "objective", "status", "num_steps", "num_passes")}
    changed["largest_decrease"] = best.largest_decrease
    every = {
        name: jax.tree.map(lambda all_, one: all_.at[runs.index].set(one), fields(runs)[name], value)
        for name, value in changed.items()
    }
    return dataclasses.replace(runs, best=best, **every)


def _all_phases(
    fitting: Fitting,
    jobs: Jobs,
    screen: Screen | None,
    work: int,
    tol: jax.Array | float,
    max_steps: jax.Array | int,
    lanes: int,
    capacity: int,
) -> Restarts:
    """A screen where one is asked for; a coarse run where there is enough work to repay it; and then the fits.

    work: temporaries of one E-step of all restarts, in numbers.
    """
    model, algorithm = fitting.model, fitting.algorithm
    # Parameters alone are enough to go on from where an algorithm has no draws, batches or schedule.
    resumable = algorithm.nature(model).monotone
    if screen is not None and not resumable:
        raise ValueError(
            "screen needs an algorithm that can go on from parameters alone, without draws, batches or a schedule; "
            f"got {algorithm!r}. Leave screen out"
        )
    # With a negative tol every restart takes all its steps, so that a coarse run before them saves none.
    large = work >= tuning.COARSE_WORK and not (checks.is_known(tol) and np.all(np.asarray(tol) < 0))
    bulk = model.coarse() if resumable and large else model
    coarse = bulk is not model  # `coarse` of a model without a cheaper form is the model itself
    run = functools.partial(drive, tol=tol, lanes=lanes, capacity=capacity)
    cheap, kept = dataclasses.replace(fitting, model=bulk), None
    if screen is not None:
        jobs, _ = run(cheap, jobs, max_steps=jnp.minimum(screen.steps, max_steps))
        jobs, kept = _survivors(jobs, screen)
    jobs, leader = run(cheap, jobs, max_steps=max_steps)
    if coarse:
        jobs, leader = run(fitting, _handed_over(jobs, kept), max_steps=max_steps)
    return _finish(jobs, leader, kept, fitting.x, fitting.weights, checks.nans_are_debugged())


def _starts(model: Model, init: Any, num_restarts: int | None) -> tuple[Params | None, Callable | None, int]:
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


def _work(fitting: Fitting, starts: Params | None, function: Callable | None, key: jax.Array) -> int:
    """Temporaries of one E-step of one restart, in numbers."""
    model, x, weights = fitting.model, fitting.x, fitting.weights
    rows = tree.num_rows(x)
    if starts is None:
        params = draw.eval_shape(model, function, key, x, weights)
        if function is not None:
            parameters.shapes("init(key, x, weights)", model, params, x)
    else:
        params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), starts)
    if model.floats_per_row is None:
        return tree.size(x) + rows + tree.size(params)
    return rows * (model.floats_per_row(params, x) - model.shared_floats_per_row(params, x))
