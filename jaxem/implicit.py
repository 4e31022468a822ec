"""The derivative of a fit: that of its limit, whatever steps led there; or of a fixed number of steps, unrolled.

A limit is a fixed point θ = T(θ, φ) of the EM map T, which depends on all that is given: data, weights, priors, held
values, φ. By the implicit function theorem dθ = (I - J)⁻¹ dT, with J = ∂T/∂θ and dT = ∂T/∂φ dφ. That is one linear
system, solved by products with J, of which each costs about an E-step: the loop itself is not differentiated, and
memory does not grow with the number of its steps. The objective f needs no solution: at a maximum in θ its derivative
is ∂f/∂φ dφ (the envelope theorem); where held parameters move, ∂f/∂θ dT is added.
(Krantz & Parks, The Implicit Function Theorem, section 3.3; for EM's J, Dempster, Laird & Rubin 1977, section 3.)
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.flatten_util import ravel_pytree

from . import checks, numerics, tree
from .capabilities import complete
from .em import EM, objective
from .protocols import Data, Model, Params
from .record import fields, record
from .slots import Algorithm
from .status import Status

Values = list[jax.Array]


@record
class Given:
    """All that a limit depends on.

    model, algorithm, x, weights: those of the fit.
    start: the start, where it is known; the limit depends on those of its leaves that no step moves.
    """

    model: Model
    algorithm: Algorithm
    x: Data
    weights: jax.Array | None
    start: Params | None = None


@record
class Limit:
    """The fields of a fit that have derivatives."""

    params: Params
    objective: jax.Array
    loglik: jax.Array


def differentiable(result: Any, given: Given, fixed: tuple[Params, jax.Array | None, int] | None) -> Any:
    """The result of a loop on constants, with derivatives of its params, objective and loglik.

    They are those of its limit; or, where `fixed` is (start, key, number of steps), those of these steps. The path of
    the loop counts as a constant.
    """
    found = Limit(params=result.params, objective=result.objective, loglik=result.loglik)
    if fixed is None:
        found = of_limit(given, found, result.status)
    else:
        params, key, num_steps = fixed
        found = of_steps(given, params, key, found, result.status, num_steps)
    return dataclasses.replace(result, **fields(found))


def of_limit(given: Given, found: Limit, status: jax.Array) -> Limit:
    """What a loop on constants has `found`, with the derivatives of the limit of `given`: NaN unless CONVERGED.

    Raises TypeError, where it is differentiated, for an algorithm that is random to the end.
    """
    return _limit(given, found, status) if not checks.is_concrete(given, found) else found


def of_steps(
    given: Given, params: Params, key: jax.Array | None, found: Limit, status: jax.Array, num_steps: int
) -> Limit:
    """The same with the derivatives of `num_steps` steps from `params`: NaN unless it ended as MAX_STEPS."""
    start = (given, params, key)
    return _steps(start, found, status, num_steps) if not checks.is_concrete(start, found) else found


def equation(given: Given, params: Params) -> tuple[jax.Array, Callable, Callable]:
    """The equation r(θ) = 0 that defines the limit: θ (P,) at `params`, the function that unravels it, and r.

    r(θ) is what a step moves parameters by, or, without an M-step, the gradient of the objective per unit of weight.
    """
    given = _present(given)
    theta, unravel = ravel_pytree(complete("model", given.model).unconstrain(params) if _climbs(given) else params)
    system = (_stationary if _climbs(given) else _fixed_point)(lambda _: given, params, [])
    unit = tree.total_weight(given.x, given.weights) if _climbs(given) else 1.0
    return theta, unravel, lambda theta: system.at(theta, [])[0] / unit


def unknown(given: Given, found: Any) -> Any:
    """What a loop on constants has found, with derivatives that are NaN, since they are unknown and not 0."""
    return _unknown(given, found) if not checks.is_concrete(given) else found


def _moving(tangents: Any) -> tuple[tuple[int, ...], list[jax.Array]]:
    """The numbers of the leaves whose tangents are not symbolic zeros, and these tangents."""
    moves = jax.tree.leaves(tangents, is_leaf=lambda leaf: isinstance(leaf, SymbolicZero))
    places = tuple(place for place, move in enumerate(moves) if not isinstance(move, SymbolicZero))
    return places, [moves[place] for place in places]


def _known_to_move(tangent: Limit) -> None:
    """Raise TypeError where a loop's result has a tangent: its arguments were constants, so it is from a closure."""
    if _moving(tangent)[0]:
        raise TypeError(
            "a fit is differentiated with respect to something that its model's functions close over: it cannot know. "
            "Hand it over in the data, or in a field of the model"
        )


def _with(leaves: list[Any], places: tuple[int, ...], values: list[jax.Array], structure: Any) -> Any:
    """What is given, with other values of the leaves that move."""
    after = list(leaves)
    for place, value in zip(places, values, strict=True):
        after[place] = value
    return jax.tree.unflatten(structure, after)


@jax.custom_jvp
def _unknown(given: Given, found: Any) -> Any:
    return found


@functools.partial(_unknown.defjvp, symbolic_zeros=True)
def _unknown_jvp(primals: tuple[Given, Any], tangents: tuple) -> tuple[Any, Any]:
    found, (_, moves) = _unknown(*primals), _moving(tangents[0])
    if not moves:
        return found, jax.tree.map(_no_tangent, found)
    nothing = jnp.sum(_where_known(jnp.array(False), jnp.concatenate([move.ravel() for move in moves])))

    def tangent(value: jax.Array) -> Any:
        exact = not jnp.issubdtype(value.dtype, jnp.inexact)
        return _no_tangent(value) if exact else jnp.broadcast_to(nothing, value.shape).astype(value.dtype)

    return found, jax.tree.map(tangent, found)


@jax.custom_jvp
def _limit(given: Given, found: Limit, status: jax.Array) -> Limit:
    return found


@functools.partial(_limit.defjvp, symbolic_zeros=True)
def _limit_jvp(primals: tuple[Given, Limit, jax.Array], tangents: tuple) -> tuple[Limit, Limit]:
    given, _, status = primals
    found = _limit(*primals)  # with its own derivative, for those of higher order
    places, moves = _moving(tangents[0])
    _known_to_move(tangents[1])
    if not places:
        return found, jax.tree.map(_no_tangent, found)
    if complete("algorithm", given.algorithm).nature(given.model).stochastic:
        raise TypeError(
            f"the limit of a fit is differentiated, and {given.algorithm!r} is random to the end: it has none. Put "
            "jax.lax.stop_gradient around the arguments, where the fit is to count as a constant"
        )
    leaves, structure = jax.tree.flatten(given)
    return found, _moves(leaves, moves, found, status, structure, places)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _steps(start: tuple, found: Limit, status: jax.Array, num_steps: int) -> Limit:
    return found


@functools.partial(_steps.defjvp, symbolic_zeros=True)
def _steps_jvp(num_steps: int, primals: tuple, tangents: tuple) -> tuple[Limit, Limit]:
    start, _, status = primals
    places, moves = _moving(tangents[0])
    _known_to_move(tangents[1])
    if not places:
        return _steps(*primals, num_steps), jax.tree.map(_no_tangent, primals[1])
    leaves, structure = jax.tree.flatten(start)
    return _unrolled(leaves, moves, status, structure, places, num_steps)


@functools.partial(jax.jit, static_argnames=("structure", "places", "num_steps"))
def _unrolled(
    leaves: list[Any],
    moves: list[jax.Array],
    status: jax.Array,
    structure: Any,
    places: tuple[int, ...],
    num_steps: int,
) -> tuple[Limit, Limit]:
    """The fit after `num_steps` steps, and its tangent; moves: the tangents of the leaves at `places`."""

    def run(values: Values) -> Limit:
        given, params, key = _with(leaves, places, values, structure)
        given = _present(given)
        algorithm, x, weights = complete("algorithm", given.algorithm), given.x, given.weights
        step = jax.checkpoint(lambda state: algorithm.step(given.model, state, x, weights))
        state = algorithm.init(given.model, params, x, weights, key)
        state, _ = jax.lax.scan(lambda state, _: (step(state), None), state, length=num_steps)
        state = algorithm.evaluated(given.model, state, x, weights)
        height = objective(complete("model", given.model), state)
        return Limit(params=state.params, objective=height, loglik=height if state.loglik is None else state.loglik)

    found, move = jax.jvp(run, ([leaves[place] for place in places],), (moves,))
    known = status == Status.MAX_STEPS
    return found, jax.tree.map(
        lambda leaf: leaf if leaf.dtype == jax.dtypes.float0 else _where_known(known, leaf), move
    )


@functools.partial(jax.jit, static_argnames=("structure", "places"))
def _moves(
    leaves: list[jax.Array],
    moves: list[jax.Array],
    found: Limit,
    status: jax.Array,
    structure: Any,
    places: tuple[int, ...],
) -> Limit:
    """The tangent of a limit; moves: the tangents of the leaves at `places` of what is given."""

    def given(values: Values) -> Given:
        return _present(_with(leaves, places, values, structure))

    values = [leaves[place] for place in places]
    system = (_stationary if _climbs(given(values)) else _fixed_point)(given, found.params, values)
    theta = system.theta
    _, (right, slope) = jax.jvp(lambda values: system.at(theta, values), (values,), (moves,))
    _, change = jax.linearize(lambda theta: system.at(theta, values), theta)
    along = jax.lax.custom_linear_solve(
        lambda move: -change(move)[0], right, solve=numerics.gmres, transpose_solve=numerics.gmres_in_range
    )
    model, *_, start = structure.children()
    if any(place < model.num_leaves or place >= len(leaves) - start.num_leaves for place in places):
        slope = slope + change(right)[1]  # held parameters move, and the objective is not stationary in them
    known = status == Status.CONVERGED
    along, slope = _where_known(known, along), _where_known(known, slope)
    params, params_move = jax.jvp(lambda theta: system.params(theta, values), (theta,), (along,))

    def log_prior(params: Params, values: Values) -> jax.Array:
        return jnp.asarray(complete("model", given(values).model).log_prior(params), slope.dtype)

    _, of_prior = jax.jvp(log_prior, (params, values), (params_move, moves))
    return Limit(params=params_move, objective=slope, loglik=slope - of_prior)


def _where_known(known: jax.Array, move: jax.Array) -> jax.Array:
    """A tangent, or NaN where it is not known.

    In both modes a zero stays 0: a failed fit that a loss leaves out does not make the loss's gradient NaN.
    """

    def told(_: Any, move: jax.Array) -> jax.Array:
        return jnp.where(known | jnp.all(move == 0), move, jnp.nan)

    # The identity as a linear system: a linear function with a transpose of its own.
    return jax.lax.custom_linear_solve(lambda move: move, move, solve=told, symmetric=True)


def _present(given: Given) -> Given:
    """The arguments as a fit uses them: a row of weight 0 is absent, and the derivative in its weight is 0."""
    x, weights = tree.present(given.x, given.weights)
    weights = None if weights is None else jnp.where(weights > 0, weights, 0)
    return dataclasses.replace(given, x=x, weights=weights)


def _climbs(given: Given) -> bool:
    """Whether the model has no M-step, so that Q is climbed by gradients."""
    return complete("model", given.model).m_step is None


@dataclasses.dataclass(frozen=True)
class _System:
    """The equation of a limit, which makes it an implicit function of the values that move.

    theta: its coordinates (P,).
    params: parameters from (theta, values).
    at: (theta, values) -> the residual r (P,), 0 at the limit, and the objective f. At a limit f is stationary in all
        of theta that is not held, and what is held moves by dr: the derivative of f is ∂f/∂values + ∂f/∂θ dr.
    """

    theta: jax.Array
    params: Callable[[jax.Array, Values], Params]
    at: Callable[[jax.Array, Values], tuple[jax.Array, jax.Array]]


def _fixed_point(given: Callable[[Values], Given], params: Params, _: Values) -> _System:
    """A fixed point of the EM map: the residual is what a step moves parameters by."""
    theta, unravel = ravel_pytree(params)

    def at(theta: jax.Array, values: Values) -> tuple[jax.Array, jax.Array]:
        known = given(values)
        limit, params = complete("algorithm", known.algorithm).limit, unravel(theta)
        after, state = limit(known.model, params, known.x, known.weights)
        after = _held_at_start(after, params, known.start)
        return ravel_pytree(after)[0] - theta, objective(complete("model", known.model), state)

    return _System(theta=theta, params=lambda theta, values: unravel(theta), at=at)


def _held_at_start(after: Params, params: Params, start: Params | None) -> Params:
    """Leaves that a step returns as the same objects, as `Conditional` those in none of its blocks, are the start's."""
    leaves, structure = jax.tree.flatten(after)
    both = list(zip(jax.tree.leaves(params), jax.tree.leaves(start), strict=False))
    if len(both) != len(leaves):
        return after  # no start is known, or it is one of another kind
    held = [jnp.asarray(at, new.dtype) if new is old else new for new, (old, at) in zip(leaves, both, strict=True)]
    return jax.tree.unflatten(structure, held)


def _stationary(given: Callable[[Values], Given], params: Params, values: Values) -> _System:
    """A stationary point of the objective, in unconstrained coordinates: for models without an M-step of their own."""
    theta, unravel = ravel_pytree(complete("model", given(values).model).unconstrain(params))

    def params_of(theta: jax.Array, values: Values) -> Params:
        return complete("model", given(values).model).constrain(unravel(theta))

    def height(theta: jax.Array, values: Values) -> jax.Array:
        known = given(values)
        state = EM().init(known.model, params_of(theta, values), known.x, known.weights)
        return objective(complete("model", known.model), state)

    def at(theta: jax.Array, values: Values) -> tuple[jax.Array, jax.Array]:
        return jax.grad(height)(theta, values), height(jax.lax.stop_gradient(theta), values)

    return _System(theta=theta, params=params_of, at=at)


def _no_tangent(value: jax.Array) -> Any:
    if jnp.issubdtype(value.dtype, jnp.inexact):
        return jnp.zeros_like(value)
    return np.zeros(value.shape, jax.dtypes.float0)
