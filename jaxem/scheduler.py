"""Many independent iterations (jobs) in a fixed number of lanes; a lane takes the next job when its own has ended.

Nothing here knows what is iterated. Letters: R jobs, each with a slot of its own where it waits and where its end is
written; L lanes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from . import tree
from .numerics import tuning
from .record import record


@dataclasses.dataclass(frozen=True)
class Iteration:
    """What a lane does with a job. `jobs` is one pytree of all jobs, those that wait and those that have ended.

    empty: a lane without a job, which does not run.
    load: (jobs, slot) -> a lane with that job before its first step.
    step: lane -> the lane after one step; one that does not run stays as it is.
    is_running: lane -> whether it has steps to do.
    store: (jobs, slots, lanes) -> jobs with the lanes (L, ...) written to these slots (L,), of which R stands for none.
    """

    empty: Any
    load: Callable[[Any, jax.Array], Any]
    step: Callable[[Any], Any]
    is_running: Callable[[Any], jax.Array]
    store: Callable[[Any, jax.Array, Any], Any]


@record
class _Desk:
    """Where all jobs stand.

    jobs: all of them, as they wait or have ended.
    slots: (L,), the slot of the job that each lane holds, R for none.
    lanes: the states of the lanes, leading axis L.
    head: how many jobs lanes have taken so far.
    """

    jobs: Any
    slots: jax.Array
    lanes: Any
    head: jax.Array


def run(iteration: Iteration, jobs: Any, waiting: jax.Array, lanes: int) -> Any:
    """All jobs, once those that wait (R,) have run to their end, `lanes` at a time, in the order of their slots.

    The inner loop steps all lanes until enough of them are idle; the outer one then stores their jobs and loads the
    next, so that no job waits for the slowest of a batch.
    """
    total, count = waiting.shape[0], jnp.sum(waiting)
    order = jnp.argsort(~waiting, stable=True)
    are_running = jax.vmap(iteration.is_running)

    def most_run(desk: _Desk) -> jax.Array:
        running = jnp.sum(are_running(desk.lanes))
        return jnp.where(desk.head < count, running > lanes - max(1, lanes // tuning.LANES_PER_IDLE_LANE), running > 0)

    def step(desk: _Desk) -> _Desk:
        return dataclasses.replace(desk, lanes=jax.vmap(iteration.step)(desk.lanes))

    def refill(desk: _Desk) -> _Desk:
        idle = ~are_running(desk.lanes)
        jobs = iteration.store(desk.jobs, jnp.where(idle, desk.slots, total), desk.lanes)
        ticket = desk.head + jnp.cumsum(idle) - 1
        taken = idle & (ticket < count)
        slots = jnp.where(taken, order[jnp.minimum(ticket, total - 1)], total)
        fresh = jax.vmap(iteration.load, (None, 0))(jobs, jnp.minimum(slots, total - 1))
        return _Desk(
            jobs=jobs,
            slots=jnp.where(idle, slots, desk.slots),
            lanes=tree.where(taken, fresh, desk.lanes),
            head=desk.head + jnp.sum(taken),
        )

    start = _Desk(
        jobs=jobs,
        slots=jnp.full(lanes, total),
        lanes=jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (lanes, *leaf.shape)), iteration.empty),
        head=jnp.zeros_like(count),
    )
    # The last refill stores jobs and loads none.
    return jax.lax.while_loop(
        lambda desk: (desk.head < count) | jnp.any(desk.slots < total),
        lambda desk: jax.lax.while_loop(most_run, step, refill(desk)),
        start,
    ).jobs


def lanes_for(work: int) -> int:
    """How many jobs side by side, of `work` temporary numbers each, stay in fast memory: a power of two."""
    budget = tuning.LANE_NUMBERS if jax.default_backend() == "cpu" else tuning.LANE_NUMBERS_ON_ACCELERATORS
    return min(tuning.MOST_LANES, 1 << max(0, (budget // max(1, work)).bit_length() - 1))
