"""The scheduler of lanes, with jobs that have nothing to do with EM: how many steps a number takes to reach 1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxem.scheduler import Iteration, run

STARTS = np.array([27, 1, 6, 97, 12, 9, 2, 871, 15, 3, 7])


def steps_to_one(number):
    steps = 0
    while number != 1:
        number, steps = number // 2 if number % 2 == 0 else 3 * number + 1, steps + 1
    return steps


def collatz():
    """A lane is (number, steps so far); jobs are (starts, steps, how often each was written)."""

    def step(lane):
        number, steps = lane
        after = jnp.where(number % 2 == 0, number // 2, 3 * number + 1)
        running = number > 1
        return jnp.where(running, after, number), steps + running

    def store(jobs, slots, lanes):
        starts, steps, written = jobs
        return starts, steps.at[slots].set(lanes[1], mode="drop"), written.at[slots].add(1, mode="drop")

    return Iteration(
        empty=(jnp.asarray(1), jnp.asarray(0)),
        load=lambda jobs, slot: (jobs[0][slot], jnp.asarray(0)),
        step=step,
        is_running=lambda lane: lane[0] > 1,
        store=store,
    )


@pytest.mark.parametrize("lanes", [1, 2, 4, len(STARTS), len(STARTS) + 3])
def test_every_job_ends_as_it_would_alone_whatever_the_lanes(lanes):
    jobs = jnp.asarray(STARTS), jnp.full(len(STARTS), -1), jnp.zeros(len(STARTS), int)
    waiting = jnp.ones(len(STARTS), bool)
    _, steps, written = jax.jit(lambda jobs: run(collatz(), jobs, waiting, lanes))(jobs)
    np.testing.assert_array_equal(steps, [steps_to_one(int(start)) for start in STARTS])
    np.testing.assert_array_equal(written, 1)


@pytest.mark.parametrize("lanes", [1, 3, 8])
def test_only_jobs_that_wait_are_run(lanes):
    waiting = np.arange(len(STARTS)) % 3 == 1
    jobs = jnp.asarray(STARTS), jnp.full(len(STARTS), -1), jnp.zeros(len(STARTS), int)
    _, steps, written = run(collatz(), jobs, jnp.asarray(waiting), lanes)
    np.testing.assert_array_equal(written, waiting)
    expected = [steps_to_one(int(start)) if waits else -1 for start, waits in zip(STARTS, waiting, strict=True)]
    np.testing.assert_array_equal(steps, expected)


def test_without_a_job_nothing_is_done():
    jobs = jnp.asarray(STARTS), jnp.full(len(STARTS), -1), jnp.zeros(len(STARTS), int)
    _, steps, written = run(collatz(), jobs, jnp.zeros(len(STARTS), bool), 4)
    np.testing.assert_array_equal(steps, -1)
    np.testing.assert_array_equal(written, 0)
