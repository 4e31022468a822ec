"""A fit step by step: its beginning, one step, its end."""

import dataclasses

import jax
import jax.numpy as jnp

from . import stopping, tree, watch
from .capabilities import complete
from .em import objective
from .protocols import Data, Model, Params
from .slots import Algorithm
from .status import Status
from .stopping import Progress

# Steps without a visible gain after which an algorithm that gives verdicts is asked for one.
_QUIET = 16


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
        watch=watch.begun(value, params),
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
    """A fit that seems to have ended, after the algorithm's verdict: converged, or to go on from a higher point."""
    at_rest = (fit.status == Status.CONVERGED) | (fit.status == Status.STALLED)
    # A fit that begins at a maximum has gains and moves of rounding alone, which no stopping rule can use.
    quiet = (fit.status == Status.RUNNING) & (watch.Watch.of(fit.watch).stalled >= _QUIET)
    at_rest = at_rest | (quiet & (terms.tol >= 0) & complete("state", fit.state).settled)
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
            watch=tree.where(better, watch.begun(value, state.params), fit.watch),
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
