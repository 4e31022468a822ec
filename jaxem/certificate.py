"""The certificate of the best of many restarts: a look around it, and the fit that goes on where there is more.

The restarts themselves run without one: of a thousand, all but one would be looked at for nothing, and what most of
them have left is less than what they are behind.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from .capabilities import complete
from .em import certified, pose
from .em.certified import PASSES, Verdict, climbs, verdict
from .fit import Result, em_fit
from .progress import allowance
from .protocols import Params
from .restart_jobs import Fitting
from .status import Status


def possible(fitting: Fitting) -> bool:
    """Whether fits of this kind can be looked at: they climb a likelihood, by a map with a Jacobian."""
    model = fitting.model
    return model.likelihood and model.m_step is not None and climbs(fitting.algorithm, model)


def looked_at(fitting: Fitting, best: Result, tol: jax.Array | float) -> tuple[Result, Verdict]:
    """A fit with what a verdict says of it, and that verdict, which it has paid for."""
    problem = pose(fitting.model, fitting.x, fitting.weights)
    allowed = allowance(best.objective, fitting.model, problem.total.astype(best.objective.dtype), tol)
    found = verdict(problem, complete("algorithm", fitting.algorithm), best.params, best.objective, allowed)
    sure = (best.status == Status.CONVERGED) & found.certified
    return dataclasses.replace(best, certified=sure, num_passes=best.num_passes + PASSES), found


def gone_on(fitting: Fitting, best: Result, params: Params, tol: jax.Array | float, max_steps: Any) -> Result:
    """The fit that goes on from higher `params` until it is certified, with all that it did before."""
    rest = max(int(max_steps) - int(best.num_steps), 0)
    algorithm = certified(fitting.algorithm)
    more = em_fit(fitting.model, params, fitting.x, fitting.weights, algorithm=algorithm, tol=tol, max_steps=rest)
    return _joined(best, more)


@jax.jit
def _joined(before: Result, after: Result) -> Result:
    steps = before.num_steps + jnp.arange(len(after.history))
    return dataclasses.replace(
        after,
        num_steps=before.num_steps + after.num_steps,
        num_passes=before.num_passes + after.num_passes,
        history=before.history.at[steps].set(after.history, mode="drop"),
        largest_decrease=jnp.maximum(before.largest_decrease, after.largest_decrease),
    )
