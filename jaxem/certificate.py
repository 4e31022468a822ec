"""The certificate of the best of many restarts: a verdict on it, and the fit that goes on from any higher point found.

The restarts themselves run without one: for all but the best it would be wasted, and most of them are further below the
best than a verdict could raise them.
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
    """Whether fits of this kind can be certified: they climb a likelihood, by a map with a Jacobian."""
    model = fitting.model
    return model.likelihood and model.m_step is not None and climbs(fitting.algorithm, model)


def looked_at(fitting: Fitting, best: Result, tol: jax.Array | float) -> tuple[Result, Verdict]:
    """The verdict on a fit, and the fit with it: `certified` is set, and its E-steps are added to `num_passes`."""
    problem = pose(fitting.model, fitting.x, fitting.weights)
    allowed = allowance(best.objective, fitting.model, problem.total.astype(best.objective.dtype), tol)
    found = verdict(problem, complete("algorithm", fitting.algorithm), best.params, best.objective, allowed)
    sure = (best.status == Status.CONVERGED) & found.certified
    return dataclasses.replace(best, certified=sure, num_passes=best.num_passes + PASSES), found


def gone_on(fitting: Fitting, best: Result, params: Params, tol: jax.Array | float, max_steps: Any) -> Result:
    """The fit that goes on from higher `params` until it is certified; its counts and history continue those before."""
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
