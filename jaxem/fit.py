"""Fitting: the loop over EM steps, when it stops, and what it reports."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import checks, implicit, parameters, tree
from .arguments import chosen, data_of, limits, sees_all_rows
from .capabilities import complete, fitted_model, informed
from .progress import advance, begin, ended
from .protocols import Data, Model, Params
from .record import record
from .slots import Algorithm
from .status import EMError, Status
from .stopping import Progress

# Steps of history kept when max_steps is traced, and for all shorter fits, which so share one compilation.
HISTORY = 1000

# The most entries of history that all fits running side by side may have together: 64 MB in float32.
_LONGEST_HISTORY = 1 << 24


@record
class Result:
    """A fit. Under vmap every field has a leading axis.

    params: the fitted parameters.
    objective: log-likelihood + log-prior of exactly these params.
    loglik: the log-likelihood of these params.
    num_steps: EM steps taken.
    num_passes: E-steps, counted in passes over the data, that of the start included, and one for the last objective
        where an algorithm has not seen all rows.
    status: a `Status` as an int32 array.
    history: (max_steps + 1,), the objective after i steps: the first 1001 where max_steps is traced, and at most 2**24
        for all restarts that run side by side. Past the end it is NaN, or the last objective again where
        `jax_debug_nans` would stop at a NaN. Before the last step it is the algorithm's running estimate, where the
        algorithm uses a part of the rows at a time, or a tempered posterior.
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
        """Whether what is left to gain is estimated to be at most tol; False for every other ending."""
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
    any order, are those of the limit (see `jaxem.implicit`): nothing of the loop is kept, and where the fit has not
    CONVERGED they are NaN. The start enters only by what no step moves, as parameters in none of the blocks of
    `Conditional`. Where tol and max_steps are not traced and tol is negative, derivatives are those of max_steps steps
    from the start. A row of weight 0 is absent, and the derivative in its weight is 0.

    Raises ValueError or TypeError for bad input when called eagerly; under jit see `Result.status`. Raises TypeError
    for derivatives of the limit of an algorithm that is random to the end.
    """
    model = fitted_model(model)
    algorithm = chosen(model, algorithm)
    limits(tol, max_steps)
    x, weights = data_of(model, x, weights, sees_all=sees_all_rows(model, algorithm))
    model = informed(model, tree.constants(x))
    parameters.check("params", model, params, x)
    if key is not None:
        key = checks.random_key(key)
    params = checks.native(params)
    capacity, finite = history_capacity(max_steps), checks.nans_are_debugged()
    given = implicit.Given(model=model, algorithm=algorithm, x=x, weights=weights, start=params)
    arguments = tree.constants((model, params, x, weights, key, algorithm, tol, max_steps))
    result = _fit(*arguments, capacity=capacity, finite=finite)
    fixed = checks.is_known(tol) and checks.is_known(max_steps) and tol < 0
    result = implicit.differentiable(result, given, (params, key, int(max_steps)) if fixed else None)
    if isinstance(max_steps, (int, np.integer)):
        result = dataclasses.replace(result, history=result.history[..., : max_steps + 1])
    return result
