"""Sequences of different lengths as one array: padded, with one sequence a row, or packed, with several."""

import dataclasses
import functools
import heapq
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import checks, tree
from .record import record, static


@record(kw_only=False)
class Sequences:
    """Independent sequences, side by side in B rows of T steps.

    values: arrays (B, T, ...), or a pytree of such.
    lengths: (B,), how many steps of each row count; None where all do. What stands behind them is never looked at.
    ids: (B, T), the number of the sequence that every step belongs to, -1 behind a row's length, where rows are packed:
        they then hold several sequences, one after the other. None where every row is one sequence.
    num_sequences: how many sequences there are, where rows are packed.
    complete: whether no entry is NaN; None where that is not known, and both cases have to be compiled.

    Row weights count rows: sequences, or where they are packed all sequences of a row.
    """

    values: Any
    lengths: jax.Array | None = None
    ids: jax.Array | None = None
    num_sequences: int | None = static(default=None)
    complete: bool | None = static(default=None)

    @property
    def num_steps(self) -> int:
        """T: steps of every row, padding included."""
        return jax.tree.leaves(self.values)[0].shape[1]

    @property
    def num_rows(self) -> int:
        """B: rows."""
        return jax.tree.leaves(self.values)[0].shape[0]

    def inside(self) -> jax.Array:
        """Which steps (B, T) count: those that are no padding."""
        shape = (self.num_rows, self.num_steps)
        if self.lengths is None:
            return jnp.ones(shape, bool)
        return jnp.arange(shape[1])[None] < self.lengths[:, None]

    def starts(self) -> jax.Array:
        """Which steps (B, T) are the first of a sequence."""
        if self.ids is None:
            return jnp.broadcast_to(jnp.arange(self.num_steps) == 0, (self.num_rows, self.num_steps))
        before = jnp.concatenate([jnp.full_like(self.ids[:, :1], -1), self.ids[:, :-1]], axis=1)
        return (self.ids != before) & (self.ids >= 0)

    def follows(self) -> jax.Array:
        """Whether step t + 1 goes on from step t: (B, T - 1)."""
        return self.inside()[:, 1:] & ~self.starts()[:, 1:]

    def links(self, dtype: Any = jnp.bool_) -> jax.Array | None:
        """`follows`, time first (T - 1, B), in this dtype; None where every step goes on from the one before."""
        return None if self.lengths is None and self.ids is None else self.follows().T.astype(dtype)

    def lanes(self, values: jax.Array) -> jax.Array:
        """Values (..., B), or (...) where there is one row: recursions compile to tighter loops without that axis."""
        return values if self.num_rows > 1 else values[..., 0]

    def holding(self, values: jax.Array) -> "Sequences":
        """Sequences laid out as these are, with values (T[, B]), time first, in place of theirs."""
        return dataclasses.replace(self, values=values.reshape(self.num_steps, self.num_rows).T, complete=None)

    def in_layout(self, values: jax.Array, padding: int, alone: bool) -> jax.Array:
        """Values (T, ...[, B]), time first, in the layout of the data: (B, T, ...), or (T, ...) of one sequence.

        padding: what stands where no step counts; alone: whether the data are one sequence without an axis of them.
        """
        values = jnp.moveaxis(values, -1, 0) if self.num_rows > 1 else values[None]
        inside = self.inside().reshape(self.num_rows, self.num_steps, *(1,) * (values.ndim - 2))
        values = jnp.where(inside, values, padding)
        return values[0] if alone else values

    def at_ends(self, values: jax.Array) -> jax.Array:
        """Values (T, K, B) at the last step of every sequence: (B, K), or (num_sequences, K) where they are packed."""
        if self.ids is None:
            last = jnp.full(self.num_rows, self.num_steps) if self.lengths is None else self.lengths
            return values[last - 1, :, jnp.arange(self.num_rows)]
        ends, count = self.inside() & ~jnp.pad(self.follows(), ((0, 0), (0, 1))), int(self.num_sequences or 0)
        places = jnp.where(ends, self.ids, count).T.ravel()
        flat = jnp.moveaxis(values, 1, 2).reshape(-1, values.shape[1])
        return jnp.zeros((count + 1, values.shape[1]), flat.dtype).at[places].set(flat)[:-1]

    def rows(self) -> tuple[Any, jax.Array]:
        """All steps as rows (T B, ...), time first, and which of them (T B,) are observed.

        Unobserved steps repeat an observed one, so that a family which takes no missing entries is given none.
        """

        def flat(leaf: jax.Array) -> jax.Array:
            return jnp.moveaxis(leaf, 0, 1).reshape(-1, *leaf.shape[2:])

        rows = jax.tree.map(flat, self.values)
        inside = self.inside().T.ravel()
        seen = inside if self.complete else inside & ~missing(rows)
        floats = any(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(rows))
        if self.lengths is None and (self.complete or not floats):
            return rows, seen
        some = jnp.argmax(seen)

        def stand_in(leaf: jax.Array) -> jax.Array:
            return jnp.where(seen.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, leaf[some])

        return jax.tree.map(stand_in, rows), seen

    def per_sequence(self, steps: jax.Array) -> jax.Array:
        """Sums over the steps (B, T) of every sequence: (B,), or (num_sequences,) where they are packed."""
        steps = jnp.where(self.inside(), steps, 0)
        if self.ids is None or self.num_sequences is None:
            return jnp.sum(steps, axis=1)
        # Steps of no sequence are added to one more, which is left out.
        places = jnp.where(self.ids >= 0, self.ids, self.num_sequences).ravel()
        return jnp.zeros(self.num_sequences + 1, steps.dtype).at[places].add(steps.ravel())[:-1]

    def split(self, values: Any = None) -> list[Any]:
        """The sequences (T_i, ...) one by one, without padding, in the order in which they were given.

        values: arrays (B, T, ...) that go with the steps, such as a posterior; None for the data themselves.
        Lengths must be concrete: it cannot be called under jit.
        """
        values = self.values if values is None else values
        lengths = np.full(self.num_rows, self.num_steps) if self.lengths is None else np.asarray(self.lengths)
        if self.ids is None:
            return [jax.tree.map(lambda leaf: leaf[row, :length], values) for row, length in enumerate(lengths)]  # noqa: B023
        ids = np.asarray(self.ids)
        found = []
        for number in range(int(self.num_sequences or 0)):
            row, start = np.argwhere(ids == number)[0]
            stop = start + np.sum(ids[row] == number)
            found.append(jax.tree.map(lambda leaf: leaf[row, start:stop], values))  # noqa: B023
        return found


def pad_sequences(sequences: Sequence[Any]) -> Sequences:
    """Sequences (T_i, ...) of any lengths, padded at the end to the longest: values (B, T, ...), lengths (B,).

    Each may be a pytree of arrays that share their steps, such as (observations, inputs). Padding repeats a
    sequence's last step. Raises ValueError for no sequence at all, an empty one, or ones of different widths.
    """
    parts, lengths = _read(sequences)
    longest = int(lengths.max())

    def pad(*leaves: np.ndarray) -> jax.Array:
        whole = np.empty((len(leaves), longest, *leaves[0].shape[1:]), np.result_type(*leaves))
        for row, leaf in zip(whole, leaves, strict=True):
            row[: len(leaf)], row[len(leaf) :] = leaf, leaf[-1]
        return checks.on_device(whole)

    return Sequences(jax.tree.map(pad, *parts), jnp.asarray(lengths, jnp.int32))


def pack_sequences(sequences: Sequence[Any], num_rows: int | None = None) -> Sequences:
    """Sequences (T_i, ...) packed, several to a row: for lengths that differ much, with next to no padding.

    num_rows: B; None for as many rows as the longest sequence allows. Sequences go, the longest first, into the row
    that has the most room. Raises as `pad_sequences` does.
    """
    parts, lengths = _read(sequences)
    if num_rows is None:
        num_rows = max(1, int(lengths.sum()) // int(lengths.max()))
    checks.positive_integer("num_rows", num_rows)
    num_rows = min(num_rows, len(parts))
    used = [(0, row) for row in range(num_rows)]
    places = np.empty((len(parts), 2), int)
    for number in np.argsort(-lengths, kind="stable"):
        filled, row = heapq.heappop(used)
        places[number] = row, filled
        heapq.heappush(used, (filled + int(lengths[number]), row))
    room = max(filled for filled, _ in used)
    ids = np.full((num_rows, room), -1, np.int32)
    for number, (row, start) in enumerate(places):
        ids[row, start : start + lengths[number]] = number
    filled = (ids >= 0).sum(axis=1)

    def pack(*leaves: np.ndarray) -> jax.Array:
        whole = np.empty((num_rows, room, *leaves[0].shape[1:]), np.result_type(*leaves))
        for (row, start), leaf in zip(places, leaves, strict=True):
            whole[row, start : start + len(leaf)] = leaf
        for row, length in zip(whole, filled, strict=True):
            row[length:] = row[length - 1]
        return checks.on_device(whole)

    values = jax.tree.map(pack, *parts)
    return Sequences(values, jnp.asarray(filled, jnp.int32), jnp.asarray(ids), len(parts))


def as_sequences(x: Any) -> Sequences:
    """Data of a sequence model as `Sequences`: arrays of up to two axes are one sequence, of three a batch.

    Of a pytree the array with the most axes decides. Where values are at hand, lengths that all reach the end become
    None, and data are marked as complete or not: less is then compiled, and done.
    """
    if not isinstance(x, Sequences):
        leaves = jax.tree.leaves(x)
        if not leaves or any(jnp.ndim(leaf) == 0 for leaf in leaves):
            raise ValueError("x must hold arrays with an axis of steps; got a scalar or nothing")
        if is_one(x):
            x = jax.tree.map(lambda leaf: checks.on_device(leaf)[None], x)
        x = Sequences(jax.tree.map(checks.on_device, x))
    with jax.ensure_compile_time_eval():  # concrete data can be looked at while something else is traced
        if x.lengths is not None and x.ids is None and checks.is_concrete(x.lengths):
            full = bool(jnp.all(jnp.asarray(x.lengths) == x.num_steps))
            x = dataclasses.replace(x, lengths=None) if full else x
        if x.complete is None and checks.is_concrete(x.values):
            x = dataclasses.replace(x, complete=tree.nothing_missing(x.values))
    return x


def missing(rows: Any, numpy: Any = jnp) -> Any:
    """Which rows (N,) hold nothing but NaN; arrays of whole numbers have no rows that are missing as a whole.

    numpy: the module that computes it; NumPy itself where values are concrete and nothing should be compiled.
    """

    def nothing(leaf: jax.Array) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return numpy.zeros(leaf.shape[:1], bool)
        return numpy.all(numpy.isnan(leaf).reshape(leaf.shape[0], -1), axis=1)

    return functools.reduce(numpy.logical_and, [nothing(leaf) for leaf in jax.tree.leaves(rows)])


def is_one(x: Any) -> bool:
    """Whether data are one sequence, without an axis of sequences: no array has more than two axes."""
    return not isinstance(x, Sequences) and max(jnp.ndim(leaf) for leaf in jax.tree.leaves(x)) <= 2


def check(x: Any, weights: Any = None) -> Sequences:
    """Data as `Sequences`; raises ValueError or TypeError for impossible shapes or lengths. Values are not checked."""
    if isinstance(x, list) or (isinstance(x, tuple) and len(x) > 2):
        raise TypeError(
            f"x must be an array, a pair of arrays as a tuple, or Sequences; got a {type(x).__name__} of {len(x)}: "
            "pad_sequences(x) or pack_sequences(x) makes Sequences of a list of arrays"
        )
    given = x.values if isinstance(x, Sequences) else x
    for path, leaf in jax.tree_util.tree_leaves_with_path(given):
        checks.array(f"x{jax.tree_util.keystr(path)}", leaf)
    sequences = x if isinstance(x, Sequences) else as_sequences(x)
    shapes = {jnp.shape(leaf)[:2] for leaf in jax.tree.leaves(sequences.values)}
    if len(shapes) > 1 or any(len(shape) < 2 for shape in shapes):
        raise ValueError(f"all arrays of x must share their axes of sequences and of steps; got {sorted(shapes)}")
    rows, steps = shapes.pop()
    if rows == 0 or steps == 0:
        raise ValueError(f"x must hold at least one sequence of at least one step; got {rows} of {steps}")
    for name, value, shape in (("lengths", sequences.lengths, (rows,)), ("ids", sequences.ids, (rows, steps))):
        if value is not None and jnp.shape(value) != shape:
            raise ValueError(f"{name} must have shape {shape}; got {jnp.shape(value)}")
    if sequences.lengths is not None and checks.is_concrete(sequences.lengths):
        lengths = np.asarray(sequences.lengths)
        if not np.issubdtype(lengths.dtype, np.integer):
            raise TypeError(f"lengths must be whole numbers; got dtype {lengths.dtype}")
        if np.any((lengths < 1) | (lengths > steps)):
            row = int(np.argmax((lengths < 1) | (lengths > steps)))
            raise ValueError(
                f"lengths must be between 1 and the padded length {steps}; got {lengths[row]} for sequence {row}. "
                "Leave empty sequences out; pad_sequences sets lengths by itself"
            )
    checks.row_weights(weights, rows)
    return as_sequences(sequences)


def _read(sequences: Sequence[Any]) -> tuple[list[Any], np.ndarray]:
    """The sequences as NumPy arrays, and their lengths."""
    if not isinstance(sequences, (list, tuple)) or not sequences:
        raise ValueError(f"sequences must be a list of at least one array (T_i, ...); got {type(sequences).__name__}")
    parts: list[Any] = [jax.tree.map(np.asarray, part) for part in sequences]
    shape = jax.tree.map(lambda leaf: leaf.shape[1:], parts[0])
    for number, part in enumerate(parts):
        leaves = jax.tree.leaves(part)
        if any(leaf.ndim == 0 for leaf in leaves) or len({len(leaf) for leaf in leaves}) != 1:
            raise ValueError(f"sequence {number} must hold arrays that share their first axis, of steps")
        if len(leaves[0]) == 0:
            raise ValueError(f"sequence {number} is empty: leave it out")
        if jax.tree.map(lambda leaf: leaf.shape[1:], part) != shape:
            raise ValueError(
                f"all sequences must have the same columns; sequence {number} has "
                f"{jax.tree.map(lambda leaf: leaf.shape, part)} where the first has {jax.tree.map(np.shape, parts[0])}"
            )
    return parts, np.array([tree.num_rows(part) for part in parts])
