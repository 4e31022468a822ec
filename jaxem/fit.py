"""Fitting: the loop over EM steps, when it stops, and what it reports."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import checks, implicit, parameters, stopping, tree
from .arguments import chosen, data_of, sees_all_rows
from .capabilities import complete, fitted_model, informed
from .em import objective
from .protocols import Algorithm, Data, Model, Params
from .record import record
from .status import EMError, Status
from .stopping import Progress

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
    certified: whether it converged, and no direction was found in which more than tol is left (see `certified`).
    """

    params: Params
    objective: jax.Array
    loglik: jax.Array
    num_steps: jax.Array
    num_passes: jax.Array
    status: jax.Array
    history: jax.Array
    largest_decrease: jax.Array
    certified: jax.Array

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


def begin(
    model: Model,
    algorithm: Algorithm,
    params: Params,
    x: Data,
    weights: jax.Array | None,
    key: jax.Array | None,
    max_steps: jax.Array | int,
) -> Progress:
    """A fit before its first step; where its state is waiting, before the E-step at its start too."""
    state = algorithm.begin(model, params, x, weights, key)
    value = jnp.full((), -jnp.inf, tree.float_dtype(x))
    status = jnp.full((), Status.RUNNING, jnp.int32)
    if complete("state", state).waiting is None:
        value = objective(model, state)
        sound = tree.all_finite(state.params) & (jnp.isfinite(value) | (state.loglik is None))
        going_on = jnp.where(max_steps <= 0, Status.MAX_STEPS, Status.RUNNING)
        status = jnp.where(sound, going_on, Status.NONFINITE).astype(jnp.int32)
    return Progress(
        state=state,
        objective=value,
        watch=stopping.watch(value, params),
        num_steps=jnp.zeros((), jnp.int32),
        status=status,
        largest_decrease=jnp.zeros_like(value),
    )


def advance(
    model: Model,
    algorithm: Algorithm,
    fit: Progress,
    x: Data,
    weights: jax.Array | None,
    tol: jax.Array | float,
    max_steps: jax.Array | int,
) -> Progress:
    """One EM step of a fit that is running, and whether it was the last."""
    state = algorithm.step(model, fit.state, x, weights)
    total = tree.total_weight(x, weights).astype(fit.objective.dtype)
    terms = stopping.Terms(algorithm.nature(model), model.likelihood, total, tol, max_steps)
    after = stopping.judged(fit, state, objective(model, state), terms)
    return after if algorithm.certify is None else _certified(model, algorithm, after, x, weights, terms)


def allowance(value: jax.Array, model: Model, total: jax.Array, tol: jax.Array | float) -> jax.Array:
    """What may be left to gain, in nats, where the objective is `value`, but no less than its rounding."""
    size = jnp.maximum(jnp.abs(value), total if model.likelihood else 0)
    return jnp.maximum(tol * total, 4 * jnp.finfo(size.dtype).eps * size)


def _certified(
    model: Model,
    algorithm: Algorithm,
    fit: Progress,
    x: Data,
    weights: jax.Array | None,
    terms: stopping.Terms,
) -> Progress:
    """A fit that seems to have ended, after the algorithm's own verdict: it has converged, or goes on elsewhere."""
    at_rest = (fit.status == Status.CONVERGED) | (fit.status == Status.STALLED)
    allowed = allowance(fit.objective, model, terms.total, terms.tol)

    def verdict(_: jax.Array, fit: Progress) -> Progress:
        state, better = algorithm.certify(model, fit.state, x, weights, allowed)
        # A state that waits for its first E-step has no objective yet.
        waiting = complete("state", state).waiting
        value = jnp.where(False if waiting is None else waiting, -jnp.inf, objective(model, state))
        going_on = fit.num_steps < terms.max_steps
        moved = dataclasses.replace(
            fit,
            state=state,
            objective=jnp.where(better, value, fit.objective),
            watch=tree.where(better, stopping.watch(value, state.params), fit.watch),
            status=jnp.where(better, Status.RUNNING, Status.CONVERGED).astype(jnp.int32),
        )
        ended = dataclasses.replace(fit, status=jnp.full_like(fit.status, Status.MAX_STEPS))
        return tree.where(better & ~going_on, ended, moved)

    # A loop of one round or none: side by side with other fits it runs only where one of them asks for it.
    return jax.lax.fori_loop(0, at_rest.astype(jnp.int32), verdict, fit)


def ended(model: Model, algorithm: Algorithm, fit: Progress, x: Data, weights: jax.Array | None) -> Progress:
    """The fit as it is reported: the objective of all rows at its parameters, and the final status.

    A fit that rests on a dead or collapsed component is DEGENERATE, however it ended.
    """
    status = jnp.where(fit.status == Status.RUNNING, Status.MAX_STEPS, fit.status)
    state, value = algorithm.evaluated(model, fit.state, x, weights), fit.objective
    if state is not fit.state:
        value = objective(model, state)
        unsound = ~jnp.isfinite(value) if state.loglik is not None else False
        status = jnp.where(unsound & (status != Status.NONFINITE), Status.NONFINITE, status)
    collapsed = jnp.any(model.degenerate(state.stats)) & tree.all_finite(state.params)
    status = jnp.where(collapsed, Status.DEGENERATE, status)
    return dataclasses.replace(fit, state=state, objective=value, status=status.astype(jnp.int32))


@functools.partial(jax.jit, static_argnames=("capacity", "finite"))
def _fit(
    model: Model,
    params: Params,
    x: Data,
    weights: jax.Array | None,
    key: jax.Array | None,
    algorithm: Algorithm,
    tol: jax.Array,
    max_steps: jax.Array,
    *,
    capacity: int,
    finite: bool,
) -> Result:
    """The whole of a fit: `capacity` steps of history, past its end NaN only where that may be."""
    x, weights = tree.present(x, weights)
    params = parameters.as_steps_return(model, algorithm, params, x, weights, key)
    start = begin(model, algorithm, params, x, weights, key, max_steps)
    history = jnp.zeros(capacity + 1, start.objective.dtype).at[0].set(start.objective)

    def body(carry: tuple[Progress, jax.Array]) -> tuple[Progress, jax.Array]:
        fit, history = carry
        fit = advance(model, algorithm, fit, x, weights, tol, max_steps)
        return fit, history.at[fit.num_steps].set(fit.objective, mode="drop")

    start, history = tree.varying((start, history), params, x, weights, key, tol, max_steps, model, algorithm)
    fit, history = jax.lax.while_loop(lambda carry: carry[0].status == Status.RUNNING, body, (start, history))
    fit = ended(model, algorithm, fit, x, weights)
    history = history.at[fit.num_steps].set(fit.objective, mode="drop")
    history = jnp.where(jnp.arange(capacity + 1) <= fit.num_steps, history, fit.objective if finite else jnp.nan)
    return Result(
        params=fit.state.params,
        objective=fit.objective,
        loglik=fit.objective if fit.state.loglik is None else fit.state.loglik,
        num_steps=fit.num_steps,
        num_passes=fit.state.num_passes,
        status=fit.status,
        history=history,
        largest_decrease=fit.largest_decrease,
        certified=(fit.status == Status.CONVERGED) & complete("state", fit.state).certified,
    )


def history_capacity(max_steps: Any, fits: int = 1) -> int:
    """Steps of history to make room for: few distinct numbers, so that few programs are compiled."""
    if not isinstance(max_steps, (int, np.integer)) or max_steps <= HISTORY:
        return HISTORY
    return min(1 << (int(max_steps) - 1).bit_length(), max(HISTORY, _LONGEST_HISTORY // fits))


def em_fit(
    model: Model | Any,
    params: Params,
    x: Data,
    weights: jax.Array | None = None,
    *,
    key: jax.Array | None = None,
    algorithm: Algorithm | Any | None = None,
    tol: jax.Array | float = 1e-6,
    max_steps: jax.Array | int = 1000,
) -> Result:
    """Fit a model by EM from one start, in one compiled loop.

    x: N rows as the model takes them; weights (N,): how many rows each row counts for.
    algorithm: None is `EM()`, or `EM(maximize=Expanded())` for models that can be expanded, under `anderson(...)` for
    those that say that plain EM takes thousands of steps.
    tol: stop when what is left to gain, per unit of weight, is estimated to be at most this (nats;
    see `jaxem.stopping`). It is a distance to the limit, not a step size, and is floored at the
    dtype's resolution; a negative tol takes exactly max_steps steps.
    key: drives algorithms that are random. Every argument may be traced, so `jax.jit(em_fit)` works
    as it is, and so do `vmap` and `scan` over any of them.

    Derivatives of params, objective and loglik with respect to all that is given, in forward and reverse mode and of
    any order, are those of the limit (see `jaxem.implicit`): the start does not matter, nothing of the loop is kept,
    and where the fit has not CONVERGED they are NaN. Where tol and max_steps are plain numbers and tol is negative,
    they are those of so many steps from the start. A row of weight 0 is absent, and has no slope in its weight.

    Raises ValueError or TypeError for bad input when called eagerly; under jit see `Result.status`. Raises TypeError
    for derivatives of the limit of an algorithm that is random to the end.
    """
    model = fitted_model(model)
    algorithm = chosen(model, algorithm)
    checks.limits(tol, max_steps)
    x, weights = data_of(model, x, weights, sees_all=sees_all_rows(model, algorithm))
    model = informed(model, implicit.constants(x))
    parameters.check("params", model, params, x)
    if key is not None:
        key = checks.random_key(key)
    params = checks.native(params)
    capacity, finite = history_capacity(max_steps), checks.nans_are_debugged()
    given = implicit.Given(model=model, algorithm=algorithm, x=x, weights=weights)
    arguments = implicit.constants((model, params, x, weights, key, algorithm, tol, max_steps))
    result = _fit(*arguments, capacity=capacity, finite=finite)
    fixed = checks.is_known(tol) and checks.is_known(max_steps) and tol < 0
    result = implicit.differentiable(result, given, (params, key, int(max_steps)) if fixed else None)
    if isinstance(max_steps, (int, np.integer)):
        result = dataclasses.replace(result, history=result.history[..., : max_steps + 1])
    return result
