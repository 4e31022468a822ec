"""How fast EM converges, which is how much of the information is missing."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from .. import checks, numerics
from ..em import EM
from ..em.maps import along, coordinates, em_map
from ..protocols import AnyModel, Data, Params, Problem
from ..record import record
from .prepared import posed


@record
class MissingInformation:
    """The leading spectrum of the EM map at parameters, Q eigenvalues of it.

    fractions: (Q,), descending: the fraction of the information that is missing along each direction.
    directions: a record like the parameters with a leading axis (Q, ...): how they move along each, of length 1 where
        all arrays are taken together.
    """

    fractions: jax.Array
    directions: Params


def convergence_rate(model: AnyModel, params: Params, x: Data, weights: jax.Array | None = None) -> jax.Array:
    """The factor by which the distance to the limit shrinks in a step of EM near it: the largest eigenvalue of the
    Jacobian of the EM map at `params`, the end of a fit. A scalar.

    Above 1 the parameters are a saddle, near which EM only seems to have come to its end. It is the largest fraction of
    missing information too: at a limit the Jacobian is I - complete⁻¹ observed.
    Products with the Jacobian alone are made, each about two E-steps, by Arnoldi's method.
    Dempster, Laird & Rubin (1977), JRSS B 39, section 3; Meng & Rubin (1991), JASA 86.
    Raises TypeError or ValueError for bad input when called eagerly, and for a model without an M-step of its own.
    """
    return missing_information(model, params, x, weights, num_directions=1).fractions[0]


def missing_information(
    model: AnyModel,
    params: Params,
    x: Data,
    weights: jax.Array | None = None,
    *,
    num_directions: int | None = None,
) -> MissingInformation:
    """The largest fractions of missing information at `params`, the end of a fit, and their directions.

    num_directions: how many, Q; by default 5, or as many as there are unconstrained coordinates. Where these are more
        than 40, fractions after the first are known less exactly.

    A direction with the fraction 1, whose information is all missing, is one that the likelihood does not depend on: a
    rotation of factors, say. Parameters on a boundary do not move, and have the fraction 0.
    Raises as `convergence_rate` does.
    """
    if num_directions is not None:
        checks.positive_integer("num_directions", num_directions)
    problem, params = posed(model, params, x, weights)
    if problem.model.m_step is None:
        raise TypeError("the rate of EM is that of a model with an m_step of its own: gradient steps have none")
    return _spectrum(problem, params, num_directions)


@functools.partial(jax.jit, static_argnames="count")
def _spectrum(problem: Problem, params: Params, count: int | None) -> MissingInformation:
    theta, params_of = coordinates(problem.model, params)
    count = min(len(theta), count or 5)
    mapped = em_map(problem, EM(), params_of)
    values, vectors = numerics.leading_eigenvalues(along(mapped, theta), numerics.scattered(theta), count)

    def readable(vector: jax.Array) -> Any:
        move = jax.jvp(params_of, (theta,), (vector,))[1]
        size = jnp.linalg.norm(ravel_pytree(move)[0])
        return jax.tree.map(lambda leaf: leaf / jnp.where(size > 0, size, 1), move)

    return MissingInformation(fractions=values, directions=jax.lax.map(readable, vectors))
