"""How expected statistics are summed over the rows, all of them in every step."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from .. import checks, tree
from ..protocols import Data, Params, Stats
from ..record import record, static


@functools.partial(jax.jit, inline=True)
def _e_step(model: Any, params: Params, x: Data, weights: jax.Array | None, expect: Any) -> Stats:
    """Traced once for all the places of a program, and programs, that it stands in."""
    return model.e_step(params, x, weights, expect)


def e_step_in_blocks(
    model: Any, params: Params, x: Data, weights: jax.Array | None, expect: Any, block_size: int
) -> Stats:
    """The E-step on all rows, `block_size` of them in memory at a time."""
    rows = tree.num_rows(x)
    if block_size >= rows:
        return _e_step(model, params, x, weights, expect)
    part = as_part(model)
    if not expect.stochastic:
        return tree.sum_over_blocks(
            lambda x, weights: _e_step(part, params, x, weights, expect), x, weights, block_size
        )

    def block(numbered: tuple[Data, jax.Array], inside: jax.Array | None) -> Stats:
        x, number = numbered
        return _e_step(part, params, x, inside, expect.fold(number[0]))  # every block has draws of its own

    return tree.sum_over_blocks(block, (x, jnp.arange(rows)), weights, block_size)


def e_step_on_all(model: Any, params: Params, x: Data, weights: jax.Array | None, expect: Any) -> Stats:
    """The E-step on all rows, in blocks where their temporaries outgrow fast memory."""
    if not hasattr(model, "floats_per_row"):
        return _e_step(model, params, x, weights, expect)
    size = tree.rows_per_block(model.floats_per_row(params, x), tree.float_dtype(x))
    return e_step_in_blocks(model, params, x, weights, expect, size)


def units(model: Any, x: Data) -> Data:
    """The data with a leading axis of independent units, where the model takes them in other forms as well."""
    return model.units(x) if hasattr(model, "units") else x


def as_part(model: Any) -> Any:
    """The model as it sees a part of the rows."""
    return model.partial() if hasattr(model, "partial") else model


@record
class Full:
    """Every row in every step; in blocks, by itself, once the temporaries of an E-step outgrow fast memory.

    The block size follows from the shapes and the backend, where the model tells `floats_per_row`.
    """

    stateless = True

    def init(
        self, model: Any, params: Params, x: Data, weights: jax.Array | None, expect: Any, key: jax.Array | None
    ) -> tuple[Stats, None]:
        return e_step_on_all(model, params, x, weights, expect), None

    def step(
        self,
        model: Any,
        params: Params,
        stats: Stats,
        state: None,
        x: Data,
        weights: jax.Array | None,
        expect: Any,
        part: jax.Array | int,
    ) -> tuple[Stats, None]:
        return e_step_on_all(model, params, x, weights, expect), None


@record(kw_only=False)
class Blocks:
    """Every row in every step, `block_size` rows in memory at a time.

    The same statistics as `Full()`, up to rounding. Raises ValueError for a size below 1.
    """

    block_size: int = static()

    stateless = True

    def __post_init__(self) -> None:
        checks.positive_integer("block_size", self.block_size)

    def init(
        self, model: Any, params: Params, x: Data, weights: jax.Array | None, expect: Any, key: jax.Array | None
    ) -> tuple[Stats, None]:
        return e_step_in_blocks(model, params, x, weights, expect, self.block_size), None

    def step(
        self,
        model: Any,
        params: Params,
        stats: Stats,
        state: None,
        x: Data,
        weights: jax.Array | None,
        expect: Any,
        part: jax.Array | int,
    ) -> tuple[Stats, None]:
        return e_step_in_blocks(model, params, x, weights, expect, self.block_size), None
