"""Densities and statistics of observations along sequences: for the family every step is a row of its own."""

import jax
import jax.numpy as jnp
import numpy as np

from ... import capabilities, checks, numerics, parameters, seeding, sequences, tree
from ...numerics import tuning
from ...protocols import Data, Family, Params, Stats
from ...sequences import Sequences


def log_likelihood(family: Family, emissions: Params, x: Sequences, num_states: int) -> jax.Array:
    """log p(x_t | z_t = k) (T, K[, B]), 0 where nothing is observed."""
    rows, seen = x.rows()
    part = capabilities.complete("part", family)
    # Families of uncorrelated columns keep their branch on missing entries: without it XLA would compute the densities
    # anew for each use.
    family = part.without_missing() if x.complete and part.correlated else family
    size = _rows_at_a_time(family, emissions, rows, num_states)
    scores = tree.map_over_blocks(lambda rows: family.log_prob(emissions, rows).T, rows, size)
    scores = jnp.where(seen, scores.T, 0)
    return scores.T if x.num_rows == 1 else jnp.moveaxis(scores.reshape(-1, x.num_steps, x.num_rows), 0, 1)


def statistics(family: Family, emissions: Params, x: Sequences, states: jax.Array) -> Stats:
    """The family's statistics, every observed step counted by its states (T, K, B)."""
    rows, seen = x.rows()
    num_states = states.shape[1]
    responsibilities = jnp.moveaxis(states, 1, 0).reshape(num_states, -1) * seen[None]
    family = capabilities.complete("part", family).without_missing() if x.complete else family
    size = _rows_at_a_time(family, emissions, rows, num_states)
    if size >= tree.num_rows(rows):
        return family.stats(emissions, rows, responsibilities)
    return tree.sum_over_blocks(
        lambda rows, _: family.stats(emissions, rows[0], rows[1].T), (rows, responsibilities.T), None, size
    )


def start(
    key: jax.Array, family: Family, x: Sequences, weights: jax.Array | None, num_states: int, method: str
) -> tuple[jax.Array, jax.Array, Params]:
    """Counts of a random start: sequences that start in each state (K,), moves (K, K); and the family's parameters.

    Steps are given to states as rows are to components, whatever their order.
    """
    rows, seen = x.rows()
    dtype = tree.float_dtype(x.values)
    each = seen.astype(dtype)
    if weights is not None:
        each = each * jnp.tile(weights.astype(dtype), x.num_steps)
    membership = seeding.membership(key, family, rows, each, num_states, method)
    parts, counts = {"emissions": capabilities.complete("part", family)}, {"emissions": num_states}
    emissions = seeding.estimates(parts, counts, rows, membership, each, seeding.SMOOTHING)["emissions"]
    states = seeding.responsibilities(membership, num_states, seeding.SMOOTHING, dtype)
    states = (states * each[None]).reshape(num_states, x.num_steps, x.num_rows)
    links = x.links(dtype)
    before = states[:, :-1] * (jnp.ones((), dtype) if links is None else links[None])
    moves = numerics.product(before, states[:, 1:], "itb,jtb->ij")
    return jnp.sum(states * x.starts().T[None], axis=(1, 2)), moves, emissions


def check(family: Family, x: Sequences, num_states: int) -> None:
    """Raise for observed steps that the family refuses, or fewer of them than states; under jit only by shapes."""
    if not checks.is_concrete(x):
        family.check(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), x.values))
        return
    with jax.ensure_compile_time_eval():  # concrete data can be looked at while something else is traced
        inside = np.asarray(x.inside())
        rows = jax.tree.map(lambda leaf: np.asarray(leaf)[inside], x.values)
        missing = sequences.missing(rows, np)
        if np.all(missing):
            checks.some_observed("x must have an observed step; all are missing")
            return
        family.check(jax.tree.map(lambda leaf: leaf[~missing], rows) if np.any(missing) else rows)
        checks.enough_rows(int(np.sum(~missing)), None, num_states, "states")


def params_like(family: Family, x: Sequences, num_states: int) -> Params:
    """The shapes that the family's parameters have for such data."""
    steps = jax.tree.map(lambda leaf: parameters.like(leaf.shape[1:], leaf.dtype), x.values)
    return seeding.params_like(family, steps, num_states)


def _rows_at_a_time(family: Family, emissions: Params, rows: Data, num_states: int) -> int:
    """Rows in a block: all, or, where the temporaries of all would be large, as many as fit fast memory."""
    floats = 2 * num_states + family.floats_per_row(emissions)
    count, dtype = tree.num_rows(rows), tree.float_dtype(rows)
    large = count * floats * jnp.dtype(dtype).itemsize > tuning.BLOCKS_OF_STEPS_FROM
    return tree.rows_per_block(floats, dtype) if large else count
