"""The derivative of a fit."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero


def refuse_derivatives(function: Callable) -> Callable:
    """`function` of pytrees of arrays, and of statics by keyword, whose derivative along an array raises TypeError.

    Differentiated step by step, a loop that stops by its parameters gives the derivative of where it stopped, which
    is not that of the limit, and not even close at usual tolerances.
    """

    @functools.wraps(function)
    def refusing(*arguments: Any, **statics: Any) -> Any:
        run = jax.custom_jvp(functools.partial(function, **statics))

        def rule(primals: tuple, tangents: tuple) -> tuple[Any, Any]:
            if not all(isinstance(tangent, SymbolicZero) for tangent in jax.tree.leaves(tangents)):
                raise TypeError(
                    "the derivative of a fit is not there yet: em_fit and fit_restarts cannot be differentiated. "
                    "Take a fixed number of steps instead, algorithm.init(...) and then algorithm.step(...) in a "
                    "jax.lax.scan, whose derivatives are exact for that many steps; or put jax.lax.stop_gradient "
                    "around the arguments, where the fit is to count as a constant"
                )
            found = function(*primals, **statics)
            return found, jax.tree.map(_no_tangent, found)

        run.defjvp(rule, symbolic_zeros=True)
        return run(*arguments)

    return refusing


def _no_tangent(value: jax.Array) -> Any:
    if jnp.issubdtype(value.dtype, jnp.inexact):
        return jnp.zeros_like(value)
    return np.zeros(value.shape, jax.dtypes.float0)
