"""How far the derivatives of a fit are to be trusted."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import checks, numerics
from ..arguments import chosen, data_of, sees_all_rows
from ..capabilities import fitted_model, informed
from ..implicit import Given, equation
from ..protocols import AnyModel, Data, Params
from ..record import record
from ..slots import Algorithm


@record
class Sensitivity:
    """Conditions of the linear system behind the derivatives of a fit, at its parameters; scalars.

    distance: how far the limit still is, to first order, (I - J)⁻¹ (T(θ) - θ) relative to the largest entry of each
        array of parameters. Derivatives are about as wrong as that; where it is not small, this is no limit.
    residual: |b - (I - J) v| / |b| of the solution v found for a b in the range of I - J. Where such a residual is
        above the square root of the dtype's eps, derivatives are NaN.
    smallest: the smallest |1 - eigenvalue of J|, 1 minus the rate at which EM ends. What moves one step by ε may move
        the limit by ε / smallest. Of models without an M-step the smallest curvature of the objective per unit of
        weight.
    condition: the largest of these over the smallest.

    Redundant directions, along which nothing is decided (as rotations of factors), are left out: those whose eigenvalue
    of I - J is at most eps^0.75, or 10 times the relative length of the step T(θ) - θ that is left.
    """

    distance: jax.Array
    residual: jax.Array
    smallest: jax.Array
    condition: jax.Array


def sensitivity(
    model: AnyModel,
    params: Params,
    x: Data,
    weights: jax.Array | None = None,
    *,
    algorithm: Algorithm | Any | None = None,
) -> Sensitivity:
    """Conditions of the linear system behind the derivatives of a fit that ended at `params`, as `em_fit(...).params`.

    weights (N,) and algorithm: those of the fit. It costs some tens of E-steps. Of more than `tuning.KRYLOV` parameters
    eigenvalues are estimates from a Krylov space, in which the outermost come first (Saad, Numerical Methods for Large
    Eigenvalue Problems, section 6.7).
    Raises ValueError or TypeError as `em_fit` does, and TypeError under jit.
    """
    model = fitted_model(model)
    algorithm = chosen(model, algorithm)
    x, weights = data_of(model, x, weights, sees_all=sees_all_rows(model, algorithm))
    given = Given(model=informed(model, x), algorithm=algorithm, x=x, weights=weights)
    params = jax.tree.map(jnp.asarray, checks.native(params))
    if not checks.is_concrete(given, params):
        raise TypeError("sensitivity looks at values: call it outside of jit, at the parameters of a finished fit")
    distance, residual, space, coarse = _looked_at(given, params)
    count = int(space.number)
    sizes = np.abs(np.linalg.eigvals(np.asarray(space.process.hessenberg, float)[:count, :count]))
    sizes = sizes[sizes > float(coarse)]
    smallest, largest = (np.min(sizes), np.max(sizes)) if sizes.size else (np.nan, np.nan)
    dtype = residual.dtype
    return Sensitivity(
        distance=distance,
        residual=residual,
        smallest=jnp.asarray(smallest, dtype),
        condition=jnp.asarray(largest / smallest, dtype),
    )


@jax.jit
def _looked_at(given: Given, params: Params) -> tuple[jax.Array, jax.Array, numerics.Krylov, jax.Array]:
    """Distance and residual of a limit, the Krylov space of its system, and the size below which eigenvalues are 0."""
    theta, unravel, rest = equation(given, params)
    left, change = jax.linearize(rest, theta)

    def times(move: jax.Array) -> jax.Array:
        return -change(move)

    def relative(move: jax.Array) -> jax.Array:
        shares = [
            jnp.max(jnp.abs(a)) / jnp.maximum(jnp.max(jnp.abs(b)), jnp.finfo(b.dtype).tiny)
            for a, b in zip(jax.tree.leaves(unravel(move)), jax.tree.leaves(unravel(theta)), strict=True)
        ]
        return jnp.max(jnp.stack(shares))

    # An image under I - J is within its range, and has no part along redundant directions.
    right = times(jax.random.normal(jax.random.key(0), theta.shape, theta.dtype))
    _, residual, _ = numerics.solved(times, right)
    to_limit, *_ = numerics.solved(times, left)
    eps = jnp.finfo(theta.dtype).eps
    coarse = jnp.maximum(eps**0.75, 10 * relative(left))
    return relative(to_limit), residual, numerics.explored(times, right), coarse
