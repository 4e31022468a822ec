"""Statistics as vectors: pytrees of arrays that add, scale, and are summed over blocks of rows."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from . import checks
from .numerics import tuning

Tree = Any


def add(a: Tree, b: Tree) -> Tree:
    """Sum of two pytrees of one structure, leaf by leaf."""
    return jax.tree.map(jnp.add, a, b)


def scale(factor: jax.Array | float, a: Tree) -> Tree:
    """Every leaf times a scalar."""
    return jax.tree.map(lambda leaf: factor * leaf, a)


def zeros_like(shapes: Tree, impl: Any = None) -> Tree:
    """Zeros of these shapes and dtypes; where they are of random keys, some key of the implementation `impl`."""

    def zero(leaf: Any) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.broadcast_to(jax.random.key(0, impl=impl), leaf.shape)
        return jnp.zeros(leaf.shape, leaf.dtype)

    return jax.tree.map(zero, shapes)


def where(condition: jax.Array, a: Tree, b: Tree) -> Tree:
    """`a` where the condition holds, else `b`; the condition covers each leaf's leading axes."""

    def select(x: jax.Array, y: jax.Array) -> jax.Array:
        if x is y:
            return x  # both are one array, which a step has handed on: no copy is made
        if jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key):
            return jax.random.wrap_key_data(
                select(jax.random.key_data(x), jax.random.key_data(y)), impl=jax.random.key_impl(x)
            )
        axes = tuple(range(jnp.ndim(condition), jnp.ndim(x)))
        return jnp.where(jnp.expand_dims(condition, axes), x, y)

    return jax.tree.map(select, a, b)


def constants(a: Tree) -> Tree:
    """The same values without derivatives: what a loop is run on, and where it starts."""
    if checks.is_concrete(a):
        return a
    traced = jax.core.Tracer
    return jax.tree.map(lambda leaf: jax.lax.stop_gradient(leaf) if isinstance(leaf, traced) else leaf, a)


def varying(a: Tree, *like: Tree) -> Tree:
    """The start `a` of a loop over data `like`, marked as varying from shard to shard as these do.

    Inside of a `shard_map` the carry of a loop has to do so; elsewhere it is returned as it is.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return a

    def never(leaf: Any) -> jax.Array:
        leaf = jax.random.key_data(leaf) if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key) else leaf
        return jnp.any(jnp.ravel(leaf)[:1] == 0) & False

    condition = jnp.any(jnp.stack([never(leaf) for leaf in jax.tree.leaves(like)]))

    def cast(leaf: Any) -> Any:
        # A key comes from the user, and is no constant of the program.
        is_key = jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)
        return leaf if is_key else jnp.where(condition, jnp.zeros_like(leaf), leaf)

    return jax.tree.map(cast, a)


def all_finite(a: Tree) -> jax.Array:
    """Whether every entry of every floating-point leaf is finite; a scalar boolean."""
    floats = [leaf for leaf in jax.tree.leaves(a) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in floats])) if floats else jnp.array(True)


def nothing_missing(x: Tree) -> bool:
    """Whether it can be seen that no floating-point entry of the data is NaN."""
    floats = [leaf for leaf in jax.tree.leaves(x) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)]
    return checks.is_concrete(x) and not any(checks.has_nan(leaf) for leaf in floats)


def num_rows(x: Tree) -> int:
    """Length of the leading axis that all leaves of the data share."""
    leaves = jax.tree.leaves(x)
    if not leaves or any(jnp.ndim(leaf) == 0 for leaf in leaves):
        raise ValueError("x must hold arrays with a leading axis of rows; got a scalar or nothing")
    rows = {leaf.shape[0] for leaf in leaves}
    if len(rows) > 1:
        raise ValueError(f"all arrays of x must share one leading axis of rows; got lengths {sorted(rows)}")
    return rows.pop()


def total_weight(x: Tree, weights: jax.Array | None) -> jax.Array:
    """Number of rows that the data stand for: the sum of the weights, or N without them."""
    dtype = float_dtype(x)
    # Sums of half-precision or whole-number weights overflow.
    return jnp.asarray(num_rows(x), dtype) if weights is None else jnp.sum(weights.astype(dtype))


@jax.jit
def present(x: Tree, weights: jax.Array | None) -> tuple[Tree, jax.Array | None]:
    """The data, rows of weight 0 replaced by one of positive weight, and the weights in the data's floating dtype.

    A row of weight 0 is absent: what it holds, a fill value of 1e20 say, must not enter a mean or give 0 x inf.
    """
    if weights is None:
        return x, None
    if any(jnp.shape(leaf)[:1] != weights.shape for leaf in jax.tree.leaves(x)):
        return x, weights  # a user's model may have data of its own kind
    counts = weights > 0
    some = jnp.argmax(counts)
    return where(counts, x, jax.tree.map(lambda leaf: leaf[some], x)), weights.astype(float_dtype(x))


def float_dtype(x: Tree) -> Any:
    """The floating-point dtype in which statistics of these data are kept."""
    dtype = jnp.result_type(*jax.tree.leaves(x))
    return dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.result_type(float)


def in_precision(params: Tree, dtype: Any) -> Tree:
    """Parameters in a floating-point dtype, those that are whole numbers too."""

    def convert(leaf: Any) -> Any:
        plain = jnp.issubdtype(jnp.result_type(leaf), jnp.number)
        return jnp.asarray(leaf, dtype) if plain and jnp.result_type(leaf) != dtype else leaf

    return jax.tree.map(convert, params)


def no_whole_numbers(params: Tree, x: Tree) -> Tree:
    """Parameters without whole numbers: these take the dtype of the data, or, where data are whole, of the others."""

    def whole(leaf: Any) -> bool:
        return jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.integer)

    if not any(map(whole, jax.tree.leaves(params))):
        return params
    dtype = float_dtype(params if all(map(whole, jax.tree.leaves(x))) else x)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype) if whole(leaf) else leaf, params)


def one_precision(x: Tree) -> Tree:
    """The data, all floating-point arrays in the dtype of the widest; whole numbers stay as they are."""
    dtype = float_dtype(x)

    def convert(leaf: Any) -> jax.Array:
        leaf = jnp.asarray(leaf)
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(convert, x)


def size(a: Tree) -> int:
    """Number of scalars in a pytree of arrays (or of shapes)."""
    return sum(leaf.size for leaf in jax.tree.leaves(a))


def rows_from(x: Tree, start: jax.Array | int, length: int) -> Tree:
    """`length` rows of every leaf, from `start` on."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, length, axis=0), x)


def sum_over_blocks(
    function: Callable[[Tree, jax.Array | None], Tree],
    x: Tree,
    weights: jax.Array | None,
    block_size: int,
) -> Tree:
    """Sum of `function(rows, weights)` over blocks of rows, one block in memory at a time.

    The last block begins earlier where it would be shorter than the others; rows that an earlier block has counted then
    get weight 0. Partial sums are compensated (Neumaier), so that float32 statistics of a million rows keep the
    precision of one block.
    """
    rows = num_rows(x)
    if block_size >= rows:
        return function(x, weights)
    blocks = -(-rows // block_size)
    if weights is None and rows % block_size:
        weights = jnp.ones(rows, float_dtype(x))

    def one(index: jax.Array) -> Tree:
        first = index * block_size
        start = jnp.minimum(first, rows - block_size)
        inside = None
        if weights is not None:
            fresh = start + jnp.arange(block_size) >= first
            inside = jnp.where(fresh, rows_from(weights, start, block_size), 0)
        return function(rows_from(x, start, block_size), inside)

    def body(carry: tuple[Tree, Tree], index: jax.Array) -> tuple[tuple[Tree, Tree], None]:
        total, lost = carry
        part = one(index)
        new = add(total, part)
        lost = jax.tree.map(
            lambda c, s, p, t: c + jnp.where(jnp.abs(s) >= jnp.abs(p), (s - t) + p, (p - t) + s),
            lost, total, part, new,
        )  # fmt: skip
        return (new, lost), None

    shapes = jax.eval_shape(one, jnp.array(0))
    zero = varying(zeros_like(shapes), x, weights, shapes)
    (total, lost), _ = jax.lax.scan(body, (zero, zero), jnp.arange(blocks))
    return add(total, lost)


def map_over_blocks(function: Callable[[Tree], Tree], x: Tree, block_size: int) -> Tree:
    """`function` of one block of rows after the other, its results joined along their leading axis."""
    rows = num_rows(x)
    if block_size >= rows:
        return function(x)

    def write(index: jax.Array, out: Tree) -> Tree:
        start = jnp.minimum(index * block_size, rows - block_size)
        part = function(rows_from(x, start, block_size))
        return jax.tree.map(
            lambda whole, piece: jax.lax.dynamic_update_slice_in_dim(whole, piece, start, axis=0), out, part
        )

    shapes = jax.eval_shape(lambda: function(rows_from(x, jnp.array(0), block_size)))
    empty = varying(jax.tree.map(lambda s: jnp.zeros((rows, *s.shape[1:]), s.dtype), shapes), x, shapes)
    return jax.lax.fori_loop(0, -(-rows // block_size), write, empty)


def rows_per_block(floats_per_row: int, dtype: Any) -> int:
    """How many rows have E-step temporaries that fit the fast memory of the default backend: a power of two."""
    budget = tuning.BLOCK_BYTES if jax.default_backend() == "cpu" else tuning.BLOCK_BYTES_ON_ACCELERATORS
    rows = budget // max(1, floats_per_row * jnp.dtype(dtype).itemsize)
    return min(tuning.MOST_BLOCK_ROWS, max(tuning.FEWEST_BLOCK_ROWS, 1 << max(0, rows.bit_length() - 1)))
