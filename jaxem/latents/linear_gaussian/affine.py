"""One matrix for all steps and lanes: its products with vectors, and the recursion that it drives."""

import math

import jax
import jax.numpy as jnp

from ... import numerics
from ...numerics import tuning
from .. import lanewise


def apply(matrix: jax.Array, vectors: jax.Array) -> jax.Array:
    """matrix v for all steps and lanes: (I, J), (T, J, B) -> (T, I, B)."""
    steps, width, lanes = vectors.shape
    height = len(matrix)
    if lanes > 1 and height * width <= tuning.UNROLLED_PRODUCT:
        return lanewise.times(matrix[:, :, None], vectors)
    if lanes >= width > 1:
        # One product a step, whose result is stored: written out, it would be computed anew inside each of its uses.
        same = jnp.broadcast_to(matrix, (steps, height, width))
        return numerics.product(same, vectors, "tij,tjb->tib")
    if lanes > 1:
        return numerics.product(matrix, vectors, "ij,tjb->tib")
    # Products with a short inner axis run far below a CPU's speed: several steps are taken together, as one vector.
    group = next(
        g for g in (8, 4, 2, 1) if g == 1 or (steps % g == 0 and g * max(width, height) <= tuning.GROUPED_WIDTH)
    )
    block = jnp.kron(jnp.eye(group, dtype=matrix.dtype), matrix) if group > 1 else matrix
    grouped = numerics.product(vectors.reshape(steps // group, group * width), block, "nj,ij->ni")
    return grouped.reshape(steps, height, 1)


def affine_scan(matrix: jax.Array, inputs: jax.Array, start: jax.Array, *, reverse: bool = False) -> jax.Array:
    """m_t = matrix m_(t-1) + inputs_t from m_0 = start, for all t: (S, S), (T, S, B), (S, B) -> (T, S, B).

    Where lanes are few, time is cut into pieces that run side by side as lanes: a first run finds where each piece ends
    if it starts from 0, and so where the next one starts. reverse: m_t from m_(t+1), and `start` is the vector after
    the last step.
    """
    steps, states, lanes = inputs.shape

    def run(matrix: jax.Array, start: jax.Array, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        def step(mean: jax.Array, more: jax.Array) -> tuple[jax.Array, jax.Array]:
            mean = lanewise.times(matrix[:, :, None], mean) + more
            return mean, mean

        return jax.lax.scan(step, start, inputs, reverse=reverse)

    on_cpu = jax.default_backend() == "cpu"
    wanted = tuning.LANES_OF_MEANS if on_cpu else tuning.LANES_OF_MEANS_ON_ACCELERATORS
    pieces = min(wanted // lanes, math.isqrt(2 * steps))
    if pieces < 2:
        return run(matrix, start, inputs)[1]
    size = -(-steps // pieces)
    room = pieces * size - steps
    padded = jnp.pad(inputs, ((room, 0) if reverse else (0, room), (0, 0), (0, 0)))
    pieced = jnp.moveaxis(padded.reshape(pieces, size, states, lanes), 0, 2).reshape(size, states, pieces * lanes)
    ends, _ = run(matrix, jnp.zeros_like(pieced[0]), pieced)
    ends = jnp.moveaxis(ends.reshape(states, pieces, lanes), 1, 0)
    with jax.default_matmul_precision("highest"):
        across = jnp.linalg.matrix_power(matrix, size)
    _, reached = run(across, start, ends)
    begins = jnp.concatenate([reached[1:], start[None]] if reverse else [start[None], reached[:-1]])
    _, found = run(matrix, jnp.moveaxis(begins, 0, 1).reshape(states, pieces * lanes), pieced)
    whole = jnp.moveaxis(found.reshape(size, states, pieces, lanes), 2, 0).reshape(pieces * size, states, lanes)
    return whole[room:] if reverse else whole[:steps]
