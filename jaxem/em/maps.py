"""The EM step and the objective as functions of unconstrained coordinates, and products with their Jacobians."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from ..latents import Exact
from ..protocols import Model, Params, Problem
from ..slots import Algorithm
from .gather import e_step_on_all

Coordinates = tuple[jax.Array, Callable[[jax.Array], Params]]


def coordinates(model: Model, params: Params) -> Coordinates:
    """Unconstrained coordinates (P,) of parameters, all of them in one vector, and the way back."""
    theta, unravel = ravel_pytree(model.unconstrain(params))
    return theta, lambda flat: model.constrain(unravel(flat))


def em_map(problem: Problem, algorithm: Algorithm | Any, params_of: Callable[[jax.Array], Params]) -> Callable:
    """θ (P,) -> the coordinates after a step of its map: M(θ) = unconstrain(m_step(e_step(constrain(θ))))."""

    def mapped(theta: jax.Array) -> jax.Array:
        after, _ = algorithm.limit(problem.model, params_of(theta), problem.x, problem.weights)
        return ravel_pytree(problem.model.unconstrain(after))[0]

    return mapped


def height_map(problem: Problem, params_of: Callable[[jax.Array], Params]) -> Callable:
    """θ (P,) -> the objective there: log-likelihood + log-prior."""

    def height(theta: jax.Array) -> jax.Array:
        params = params_of(theta)
        value = e_step_on_all(problem, params, Exact()).loglik + problem.model.log_prior(params)
        return jnp.asarray(value, theta.dtype)

    return height


def along(function: Callable[[jax.Array], jax.Array], theta: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """vector -> the Jacobian at theta of a function of coordinates, times the vector."""
    return lambda vector: jax.jvp(function, (theta,), (vector,))[1]
