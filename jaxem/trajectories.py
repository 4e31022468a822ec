"""The path of an algorithm: every state's parameters and objective, stacked."""

import functools
from typing import Any

import jax

from . import checks, parameters, tree
from .arguments import chosen, data_of, sees_all_rows
from .capabilities import fitted_model, informed
from .em import objective
from .protocols import Data, Model, Params
from .record import record
from .slots import Algorithm


@record
class Trajectory:
    """States of an algorithm, leading axis S = 1 + num_steps // thin: the start, and every thin-th after it.

    params: the parameters.
    objective: (S,), log-likelihood + log-prior of exactly these; the algorithm's running estimate, where it uses a part
        of the rows at a time, or a tempered posterior.
    """

    params: Params
    objective: jax.Array


def trajectory(
    model: Model | Any,
    params: Params,
    x: Data,
    weights: jax.Array | None = None,
    *,
    algorithm: Algorithm | Any | None = None,
    num_steps: int,
    key: jax.Array | None = None,
    thin: int = 1,
) -> Trajectory:
    """Run an algorithm for `num_steps` steps, and keep the states: a trace of EM, a sample by `gibbs()`.

    algorithm: None for the default of `em_fit`. key: drives algorithms that are random. thin: how many steps there are
    between the states that are kept; steps after the last of these are not taken. It never stops early, and does not
    check for failures. It is one `lax.scan`, and so goes under `jit`, `vmap` and `grad` over params, data and key.
    Raises TypeError or ValueError for bad input when called eagerly.
    """
    model = fitted_model(model)
    algorithm = chosen(model, algorithm)
    checks.positive_integer("num_steps", num_steps)
    checks.positive_integer("thin", thin)
    x, weights = data_of(model, x, weights, sees_all=sees_all_rows(model, algorithm))
    model = informed(model, x)
    parameters.check("params", model, params, x)
    key = None if key is None else checks.random_key(key)
    params = checks.native(params)
    return _run(model, params, x, weights, key, algorithm, steps=int(num_steps) // int(thin), thin=int(thin))


@functools.partial(jax.jit, static_argnames=("steps", "thin"))
def _run(
    model: Model,
    params: Params,
    x: Data,
    weights: jax.Array | None,
    key: jax.Array | None,
    algorithm: Algorithm,
    *,
    steps: int,
    thin: int,
) -> Trajectory:
    x, weights = tree.present(x, weights)
    params = parameters.as_steps_return(model, algorithm, params, x, weights, key)

    def one(state: Any, _: None) -> tuple[Any, Trajectory]:
        def step(_: int, state: Any) -> Any:
            return algorithm.step(model, state, x, weights)

        state = step(0, state) if thin == 1 else jax.lax.fori_loop(0, thin, step, state)
        return state, seen(state)

    def seen(state: Any) -> Trajectory:
        return Trajectory(params=state.params, objective=objective(model, state))

    start = algorithm.init(model, params, x, weights, key)
    start = tree.varying(start, params, x, weights, key, model, algorithm)
    _, later = jax.lax.scan(one, start, None, length=steps)
    return jax.tree.map(lambda first, rest: jax.numpy.concatenate([first[None], rest]), seen(start), later)
