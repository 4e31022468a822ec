"""How sure the parameters of a fit are: information matrices, and the standard errors that follow from them."""

import functools
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from .. import checks, numerics
from ..em import EM, surrogate
from ..em.maps import along, coordinates, em_map, height_map
from ..latents import Exact
from ..protocols import AnyModel, Data, Params, Problem
from ..record import record
from .prepared import posed

METHODS = ("observed", "oakes", "sem", "sandwich", "complete")

# Information on a nonlinear coordinate, a logarithm or a log-odds, below which its parameter is on the boundary: a
# standard error of 1000 there spans all that floating-point numbers can hold.
_AT_ITS_END = 1e-6


class ErrorFlag(IntEnum):
    """Why a standard error is NaN, or that it is not."""

    FINE = 0
    BOUNDARY = 1
    SINGULAR = 2
    NO_MAXIMUM = 3
    NONFINITE = 4


_REASONS = {
    ErrorFlag.BOUNDARY: "rest on a boundary, where the likelihood is not level",
    ErrorFlag.SINGULAR: "are not identified: the likelihood does not change along some direction that moves them",
    ErrorFlag.NO_MAXIMUM: "are not at a maximum: the likelihood rises along some direction that moves them",
    ErrorFlag.NONFINITE: "have information that is not finite",
}


def information(
    model: AnyModel, params: Params, x: Data, weights: jax.Array | None = None, method: str = "observed"
) -> jax.Array:
    """The information (P, P) on the unconstrained coordinates of `params`, the maximum that a fit has come to.

    Coordinates are those of `model.unconstrain(params)`, one array after the other, as
    `jax.flatten_util.ravel_pytree` lines them up. A prior counts as data.

    method:
        "observed": minus the Hessian of log-likelihood + log-prior, by derivatives of the E-step.
        "oakes": the same by Q + log-prior alone: -(∂²Q/∂θ'² + ∂²Q/∂θ∂θ') at θ' = θ (Oakes 1999, JRSS B 61). Derivatives
            go forward through the E-step, so that memory does not grow with the rows.
        "sem": complete information times I - J, J the Jacobian of the EM map (Meng & Rubin 1991, JASA 86), by exact
            derivatives where SEM takes differences. At a limit only.
        "sandwich": A B⁻¹ A, with A the observed information and B the sum of s sᵀ over the scores s of all units; its
            inverse is the covariance of estimates where the model is misspecified (Huber 1967; White 1982).
        "complete": of data with their latents, minus the Hessian of Q + log-prior. It exceeds the observed information
            by the missing information (Louis 1982, JRSS B 44).
    Raises ValueError for another method, TypeError for a model that has no log-likelihood, or, where Q is needed, no
    `q_function`; and for bad input when called eagerly.
    """
    problem, params = _asked(model, params, x, weights, method)
    return _information(problem, params, method)


def standard_errors(
    model: AnyModel, params: Params, x: Data, weights: jax.Array | None = None, method: str = "observed"
) -> Params:
    """Standard errors of `params`, the maximum that a fit has come to: a record like them.

    The inverse of the `information` by this method, carried from unconstrained coordinates to the parameters by their
    derivative (the delta method; Efron & Tibshirani 1993, section 21.5); under "complete" they are those of data whose
    latents are known. What is held has the standard error 0.

    NaN, with a warning that names them where values can be looked at, for parameters on a boundary, and for those that
    the data do not identify; `error_flags` says which and why. Others are as if the former were held where they are.
    Raises as `information` does.
    """
    problem, params = _asked(model, params, x, weights, method)
    found, flags = _errors(problem, params, method)
    if checks.is_concrete(flags):
        _warn_of(flags)
    return found


def error_flags(
    model: AnyModel, params: Params, x: Data, weights: jax.Array | None = None, method: str = "observed"
) -> Params:
    """Why standard errors are NaN: a record like `params` of whole numbers, an `ErrorFlag` for every entry.

    BOUNDARY: the entry rests on the edge of its domain, as a probability of 0. SINGULAR: the data do not identify it.
    NO_MAXIMUM: there is a direction along which the objective rises. NONFINITE: the information is not finite.
    Raises as `information` does.
    """
    problem, params = _asked(model, params, x, weights, method)
    return _errors(problem, params, method)[1]


def _asked(model: AnyModel, params: Params, x: Data, weights: jax.Array | None, method: str) -> tuple[Problem, Params]:
    checks.choice("method", method, METHODS)
    problem, params = posed(model, params, x, weights, by_unit=method == "sandwich")
    name = type(model).__name__
    if method in ("oakes", "sem", "complete") and problem.model.q_function is None:
        raise TypeError(f"information by {method!r} needs Q, and {name} has no q_function(params, stats)")
    if method == "sem" and problem.model.m_step is None:
        raise TypeError(f"information by 'sem' needs the EM map, and {name} has no m_step(stats)")
    return problem, params


def _columns(times: Callable[[jax.Array], jax.Array], theta: jax.Array) -> jax.Array:
    """The matrix of a linear map that is symmetric up to rounding, one product at a time; symmetrised."""
    matrix = jax.lax.map(times, jnp.eye(len(theta), dtype=theta.dtype))
    return 0.5 * (matrix + matrix.T)


@functools.partial(jax.jit, static_argnames="method")
def _information(problem: Problem, params: Params, method: str) -> jax.Array:
    theta, params_of = coordinates(problem.model, params)
    if method in ("oakes", "sem", "complete"):
        return _through_q(problem, theta, params_of, method)
    height = height_map(problem, params_of)
    observed = -_columns(along(jax.grad(height), theta), theta)
    if method == "observed":
        return observed
    scores = jax.lax.map(along(_by_unit(problem, params_of), theta), jnp.eye(len(theta), dtype=theta.dtype))
    squares = scores if problem.weights is None else scores * problem.weights[None]
    spread = numerics.product(squares, scores, "in,jn->ij")
    # Where there are fewer units than parameters, or a coordinate is at its end, the squares are singular.
    values, vectors = numerics.symmetric_eigen(spread)
    good = values > jnp.finfo(theta.dtype).eps * len(theta) * jnp.max(jnp.abs(values))
    inside = numerics.product(vectors, observed, "ij,ik->jk") / jnp.sqrt(jnp.where(good, values, 1))[:, None]
    return numerics.product(inside, jnp.where(good[:, None], inside, 0), "ij,ik->jk")


def _through_q(problem: Problem, theta: jax.Array, params_of: Callable, method: str) -> jax.Array:
    """The methods that look at the data through Q alone."""
    model = problem.model

    def slope(at: jax.Array, stats: Any) -> jax.Array:
        return jax.grad(lambda theta: jnp.asarray(surrogate(model, params_of(theta), stats), theta.dtype))(at)

    def stats_at(theta: jax.Array) -> Any:
        return EM().init(model, params_of(theta), problem.x, problem.weights).stats

    if method == "oakes":
        return -_columns(along(lambda theta: slope(theta, stats_at(theta)), theta), theta)
    stats = stats_at(theta)
    complete = -_columns(along(lambda theta: slope(theta, stats), theta), theta)
    if method == "complete":
        return complete
    moved = along(em_map(problem, EM(), params_of), theta)
    return _columns(lambda vector: numerics.product(complete, vector - moved(vector), "ij,j->i"), theta)


def _by_unit(problem: Problem, params_of: Callable) -> Callable:
    """θ -> log-likelihood of every unit (N,)."""
    part = problem.model.partial()

    def terms(theta: jax.Array) -> jax.Array:
        params = params_of(theta)

        def one(unit: Data) -> jax.Array:
            return part.e_step(params, jax.tree.map(lambda leaf: leaf[None], unit), None, Exact()).loglik

        return jax.vmap(one)(problem.x).astype(theta.dtype)

    return terms


@record
class _Directions:
    """Directions of coordinates whose errors are infinite, by reason.

    ends: (P,), coordinates at their end.
    vectors: (P, P), the eigenvectors of the scaled information, in columns.
    flat: (P,), which eigenvectors have no information above the noise.
    rising: (P,), which of them have negative information, below the noise.
    """

    ends: jax.Array
    vectors: jax.Array
    flat: jax.Array
    rising: jax.Array


@functools.partial(jax.jit, static_argnames="method")
def _errors(problem: Problem, params: Params, method: str) -> tuple[Params, Params]:
    """Standard errors and flags, each a record like the parameters."""
    matrix = _information(problem, params, method)
    theta, params_of = coordinates(problem.model, params)
    values, unravel = ravel_pytree(params)

    def read(theta: jax.Array) -> jax.Array:
        return ravel_pytree(params_of(theta))[0].astype(theta.dtype)

    slopes = jax.jacfwd(read)(theta)  # (parameters, coordinates)
    steps = jnp.eye(len(theta), dtype=theta.dtype)
    bends = jax.vmap(lambda step: read(theta + step))(steps) - read(theta)[None] - slopes.T
    reach = jnp.max(jnp.abs(slopes), axis=0, initial=0)
    inert = reach == 0
    curved = jnp.max(jnp.abs(bends), axis=1, initial=0) > 1e-3 * reach
    diagonal = jnp.diagonal(matrix)
    ends = inert | (curved & (jnp.abs(diagonal) < _AT_ITS_END))

    # In units in which every coordinate has the information 1. What is at its end is left out.
    unit = jax.lax.rsqrt(jnp.where(ends | (diagonal <= 0), 1, diagonal))
    scaled = jnp.where(ends[:, None] | ends[None], 0, matrix * unit[:, None] * unit[None])
    spectrum, vectors = numerics.symmetric_eigen(scaled + jnp.diag(ends.astype(scaled.dtype)))
    slope = jax.grad(height_map(problem, params_of))(theta) * jnp.where(ends, 0, unit)
    # Along a curved direction that is not identified, a gradient that the fit has left appears as curvature.
    rounding = jnp.sqrt(jnp.finfo(theta.dtype).eps)
    noise = rounding + jnp.linalg.norm(slope) / jnp.sqrt(jnp.maximum(problem.total, 1))
    flat = spectrum <= noise
    found = _Directions(ends=ends, vectors=vectors, flat=flat, rising=spectrum < -noise)
    along_each = numerics.product(jnp.where(ends[None], 0, slopes * unit[None]), vectors, "mp,pq->mq")
    variance = jnp.sum(jnp.where(flat[None], 0, along_each**2 / jnp.where(flat, 1, spectrum)[None]), axis=1)
    # Parameters that would change if the inert coordinates were 0.
    back = jnp.abs(read(jnp.where(inert, 0, theta)) - read(theta)) > 0
    flags = _flags(found, slopes, along_each, back)
    flags = jnp.where(jnp.all(jnp.isfinite(matrix)), flags, ErrorFlag.NONFINITE)
    errors = jnp.where(flags == ErrorFlag.FINE, jnp.sqrt(variance), jnp.nan).astype(values.dtype)
    whole = jax.tree.map(lambda leaf: leaf.astype(jnp.int32), unravel(flags.astype(values.dtype)))
    return unravel(errors), whole


def _flags(found: _Directions, slopes: jax.Array, along_each: jax.Array, back: jax.Array) -> jax.Array:
    """An `ErrorFlag` for every parameter.

    slopes: (parameters, coordinates), the derivatives; along_each: those along the eigenvectors; back: whether the
    inert coordinates would move the parameter from elsewhere.
    """
    rounding = jnp.sqrt(jnp.finfo(slopes.dtype).eps)
    largest = jnp.max(jnp.abs(slopes), axis=1, initial=0)
    at_end = jnp.max(jnp.where(found.ends[None], jnp.abs(slopes), 0), axis=1, initial=0)
    total = jnp.sum(along_each**2, axis=1)

    def reaches(directions: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(directions[None], along_each**2, 0), axis=1) > rounding * total

    flags = jnp.where(reaches(found.flat), ErrorFlag.SINGULAR, ErrorFlag.FINE)
    flags = jnp.where(reaches(found.rising), ErrorFlag.NO_MAXIMUM, flags)
    boundary = jnp.where(largest > 0, at_end > 1e-3 * largest, back)
    return jnp.where(boundary, ErrorFlag.BOUNDARY, flags)


def _warn_of(flags: Params) -> None:
    """Name the parameters whose standard errors are NaN, and why."""
    for flag, reason in _REASONS.items():
        names = []
        for path, leaf in jax.tree_util.tree_leaves_with_path(flags):
            places = np.argwhere(np.asarray(leaf) == flag)
            if not len(places):
                continue
            name = jax.tree_util.keystr(path).lstrip(".") or "params"
            some = len(places) < np.size(leaf)
            names.append(name + (str(places[0].tolist()) + (" and others" if len(places) > 1 else "") if some else ""))
        if names:
            checks.warn_of_fit(f"standard errors are NaN: {', '.join(names)} {reason}")
