"""A model from plain functions: a researcher's own E-step and M-step."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..capabilities import complete
from ..latents import Exact
from ..protocols import Data, Params, Stats
from ..record import record, static


@record
class FunctionStats:
    """The user's statistics, with the log-likelihood at the parameters (None where it is unknown)."""

    stats: Stats
    loglik: jax.Array | None


@record
class FunctionModel:
    """A Model whose parts are plain functions; built by `from_functions`."""

    e_step_function: Callable = static()
    optional: tuple[tuple[str, Callable], ...] = static(default=())

    def e_step(
        self, params: Params, x: Data, weights: jax.Array | None = None, expect: Exact = Exact()
    ) -> FunctionStats:
        if not isinstance(expect, Exact) or expect.temperature is not None:
            raise TypeError(f"a model from functions takes its E-step as it is; expect must be Exact(), got {expect!r}")
        if weights is None:
            result = self.e_step_function(params, x)
        elif "weights" in inspect.signature(self.e_step_function).parameters:
            result = self.e_step_function(params, x, weights=weights)
        else:
            raise TypeError(
                "weights were given, but e_step(params, x) takes none: write e_step(params, x, weights=None), "
                "each row's statistics counted weights[n] times"
            )
        stats, loglik = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
        if loglik is None:
            loglik = stats.get("loglik") if isinstance(stats, dict) else complete("statistics", stats).loglik
        if loglik is None and "log_prob" in dict(self.optional):
            each = self.log_prob(params, x)
            loglik = jnp.sum(each if weights is None else weights * each)
        return FunctionStats(stats=stats, loglik=loglik)

    def __getattr__(self, name: str) -> Any:
        # A function that was not given is an absent attribute, for which `capabilities` puts its default.
        function = dict(self.__dict__.get("optional", ())).get(name)
        if function is None:
            raise AttributeError(f"this model has no {name}: pass {name}=... to from_functions")
        return _OF_STATS[name](function) if name in _OF_STATS else function


# The user's functions take the user's statistics; the library passes them with the log-likelihood.
_OF_STATS: dict[str, Callable[[Callable], Callable]] = {
    "m_step": lambda function: lambda stats: function(stats.stats),
    "m_step_for": lambda function: lambda params, stats, names: function(params, stats.stats, names),
    "q_function": lambda function: lambda params, stats: function(params, stats.stats),
    "draw": lambda function: lambda key, stats: function(key, stats.stats),
    "rebase": lambda function: (
        lambda stats, params: FunctionStats(stats=function(stats.stats, params), loglik=stats.loglik)
    ),
}


def from_functions(e_step: Callable, m_step: Callable | None = None, **optional: Callable) -> FunctionModel:
    """A model from `e_step(params, x) -> stats` or `-> (stats, loglik)` and `m_step(stats) -> params`.

    Statistics are any pytree that adds over rows; `e_step` may take `weights=None` as well. The
    log-likelihood may also be `stats.loglik`, `stats["loglik"]`, or come from `log_prob(params, x) -> (N,)`;
    without any, the objective is NaN and convergence is judged by the parameters. Without an m_step,
    `Gradient()` climbs `q_function(params, stats)`. Other optional functions are the methods of the Model
    protocol: `init`, `log_prior`, `unconstrain` and `constrain`, `posterior`, `predict`, `sample`, `rebase`,
    `blocks` and `m_step_for`, ... The functions are part of the jit key: define them once, outside of loops.
    Raises TypeError for anything that cannot be called, or with neither m_step nor q_function.
    """
    if m_step is not None:
        optional["m_step"] = m_step
    for name, function in {"e_step": e_step, **optional}.items():
        if not callable(function):
            raise TypeError(f"{name} must be a function; got {type(function).__name__}")
    if "m_step" not in optional and "q_function" not in optional:
        raise TypeError("m_step(stats) is needed, or q_function(params, stats) for a gradient M-step to climb")
    return FunctionModel(e_step_function=e_step, optional=tuple(sorted(optional.items(), key=lambda f: f[0])))
