"""How expected statistics are summed over the rows."""

from typing import Any

import jax

from .. import checks, tree
from ..protocols import Data, Params, Stats
from ..record import record, static


def _sum(model: Any, params: Params, x: Data, weights: jax.Array | None, expect: Any, block_size: int) -> Stats:
    split = block_size < tree.num_rows(x)
    part = model.partial() if split and hasattr(model, "partial") else model

    def block(rows: Data, inside: jax.Array | None) -> Stats:
        return part.e_step(params, rows, inside, expect)

    return tree.sum_over_blocks(block, x, weights, block_size)


@record
class Full:
    """Every row in every step; in blocks, by itself, once the temporaries of an E-step outgrow fast memory.

    The block size follows from the shapes and the backend, where the model tells `floats_per_row`.
    """

    def init(
        self, model: Any, params: Params, x: Data, weights: jax.Array | None, expect: Any, key: jax.Array | None
    ) -> tuple[Stats, None]:
        return self.step(model, params, None, x, weights, expect)

    def step(
        self, model: Any, params: Params, state: None, x: Data, weights: jax.Array | None, expect: Any
    ) -> tuple[Stats, None]:
        if not hasattr(model, "floats_per_row"):
            return model.e_step(params, x, weights, expect), None
        size = tree.rows_per_block(model.floats_per_row(params, x), tree.float_dtype(x))
        return _sum(model, params, x, weights, expect, size), None


@record(kw_only=False)
class Blocks:
    """Every row in every step, `block_size` rows in memory at a time.

    The same statistics as `Full()`, up to rounding. Raises ValueError for a size below 1.
    """

    block_size: int = static()

    def __post_init__(self) -> None:
        checks.positive_integer("block_size", self.block_size)

    def init(
        self, model: Any, params: Params, x: Data, weights: jax.Array | None, expect: Any, key: jax.Array | None
    ) -> tuple[Stats, None]:
        return self.step(model, params, None, x, weights, expect)

    def step(
        self, model: Any, params: Params, state: None, x: Data, weights: jax.Array | None, expect: Any
    ) -> tuple[Stats, None]:
        return _sum(model, params, x, weights, expect, self.block_size), None
