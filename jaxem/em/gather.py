"""How expected statistics are summed over the rows, all of them in every step."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from .. import checks, tree
from ..capabilities import complete, completed, informed
from ..protocols import Data, Model, Params, Problem, Stats
from ..record import record, static
from ..slots import Expect


def pose(model: Model | Any, x: Data, weights: jax.Array | None) -> Problem:
    """The problem as the steps take it: the model complete, its data with a leading axis of independent units."""
    model = complete("model", model)
    return Problem(model=informed(model, x), x=model.units(x), weights=weights)


def some_rows(problem: Problem, x: Data, weights: jax.Array | None) -> Problem:
    """The problem of a part of the rows."""
    return dataclasses.replace(problem, model=problem.model.partial(), x=x, weights=weights)


@functools.partial(jax.jit, static_argnames="block_size", inline=True)
def e_step_on_all(problem: Problem, params: Params, expect: Expect, block_size: int | None = None) -> Stats:
    """The E-step on all rows, `block_size` of them in memory at a time.

    None: in blocks where the temporaries of an E-step outgrow fast memory, if the model has `floats_per_row`.
    Jitted, so that it is traced once for all its calls, in one program and in several.
    """
    model, x = problem.model, problem.x
    if block_size is None and model.floats_per_row is not None:
        block_size = tree.rows_per_block(model.floats_per_row(params, x), tree.float_dtype(x))
    if block_size is None or block_size >= problem.rows:
        with checks.all_present():
            return model.e_step(params, x, problem.weights, expect)
    whole = complete("expect", expect)

    def block(numbered: tuple[Data, jax.Array], inside: jax.Array | None) -> Stats:
        rows, number = numbered
        own = whole.fold(number[0])  # every block has draws of its own
        return e_step_on_all(some_rows(problem, rows, inside), params, own, block_size)

    return tree.sum_over_blocks(block, (x, jnp.arange(problem.rows)), problem.weights, block_size)


@completed("gather")
@record
class Full:
    """Every row in every step; in blocks, by itself, once the temporaries of an E-step outgrow fast memory.

    The block size follows from the shapes and the backend, where the model tells `floats_per_row`.
    """

    def step(
        self, problem: Problem, params: Params, stats: Stats, state: None, expect: Expect, index: jax.Array | int
    ) -> tuple[Stats, None]:
        return e_step_on_all(problem, params, expect), None


@completed("gather")
@record(kw_only=False)
class Blocks:
    """Every row in every step, `block_size` rows in memory at a time.

    The same statistics as `Full()`, up to rounding. Raises ValueError for a size below 1.
    """

    block_size: int = static()

    def __post_init__(self) -> None:
        checks.positive_integer("block_size", self.block_size)

    def step(
        self, problem: Problem, params: Params, stats: Stats, state: None, expect: Expect, index: jax.Array | int
    ) -> tuple[Stats, None]:
        return e_step_on_all(problem, params, expect, self.block_size), None
