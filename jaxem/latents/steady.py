"""Linear-Gaussian latents of sequences that share their covariances: one recursion of covariances serves all, and once
it has come to rest, what is left is a recursion of means with constant gains.

Letters as in `linear_gaussian`; here lanes come first: (B, T, S).
"""

import dataclasses

import jax
import jax.numpy as jnp

from .. import numerics
from ..record import record
from . import lanewise, linear_gaussian
from .linear_gaussian import Evidence, Filtered, Smoothed, Transition

# Steps that one product with a triangular block of powers covers.
_CHUNK = 16

# Numbers side by side up to which steps are grouped for a product.
_GROUPED_WIDTH = 64

# Of how many times its rounding a covariance may still move and count as settled.
_SETTLED = 32


def affine_scan(matrix: jax.Array, inputs: jax.Array, start: jax.Array, *, reverse: bool = False) -> jax.Array:
    """m_t = matrix m_(t-1) + inputs_t from m_0 = start, for all t: (S, S), (B, T, S), (B, S) -> (B, T, S).

    In chunks, side by side: inside of one by a product with a triangular block of powers, and from one to the next
    by the same, with the power of a whole chunk: log T products in place of T steps. reverse: m_t from m_(t+1), and
    `start` follows the last.
    """
    lanes, steps, states = inputs.shape
    size = min(_CHUNK, steps)
    powers, top = jnp.eye(states, dtype=matrix.dtype)[None], matrix
    while len(powers) < size + 1:
        powers = jnp.concatenate([powers, numerics.product(powers, top, "kij,jl->kil")])
        top = numerics.product(top, top, "ij,jl->il")
    lag = jnp.arange(size)[:, None] - jnp.arange(size)[None, :]
    lag, reach = (-lag, powers[size:0:-1]) if reverse else (lag, powers[1 : size + 1])
    block = jnp.where((lag >= 0)[:, :, None, None], powers[jnp.maximum(lag, 0)], 0)
    block = jnp.swapaxes(block, 1, 2).reshape(size * states, size * states)
    chunks = -(-steps // size)
    room = (chunks * size - steps, 0) if reverse else (0, chunks * size - steps)
    padded = inputs if chunks * size == steps else jnp.pad(inputs, ((0, 0), room, (0, 0)))
    inside = numerics.product(padded.reshape(lanes, chunks, size * states), block, "bnj,ij->bni")
    begins = start[:, None]
    if chunks > 1:
        ends = inside[:, 1:, :states] if reverse else inside[:, :-1, -states:]
        between = affine_scan(powers[size], ends, start, reverse=reverse)
        begins = jnp.concatenate([between, begins] if reverse else [begins, between], axis=1)
    carried = numerics.product(begins, reach.reshape(size * states, states), "bnj,ij->bni")
    whole = (inside + carried).reshape(lanes, chunks * size, states)
    return whole[:, -steps:] if reverse else whole[:, :steps]


@record
class SharedMoments:
    """Posterior of sequences of one length with nothing missing: means (B, T, S) and moves (B, T - 1, S) as in
    `Smoothed`, lanes first; and what all sequences share: the sum of half_logdet, as in `Filtered`, and covariances,
    of the first state (S, S), and summed over time, of all states, of all but the last, and the pairs' cross and
    spread."""

    means: jax.Array
    moves: jax.Array
    half_logdet: jax.Array
    first: jax.Array
    every: jax.Array
    before: jax.Array
    cross: jax.Array
    spread: jax.Array


def shared_moments(
    transition: Transition, matrix: jax.Array, values: jax.Array, *, parallel: bool = False
) -> SharedMoments:
    """Smoothed moments where one covariance recursion, of any length, serves all sequences.

    matrix (P, S) and values (B, T, P) as in `Evidence`. A recursion that has come to rest, as it does after some tens
    of steps, is not carried on: from there means obey recursions with constant gains.
    """
    steps = values.shape[1]
    evidence = _evidence(matrix, values, jnp.zeros((1, steps), values.dtype))

    def plainly() -> SharedMoments:
        if parallel:
            filtered = linear_gaussian.filter_side_by_side(transition, evidence)
            return _gathered(filtered, linear_gaussian.smooth_side_by_side(transition, filtered))
        filtered = linear_gaussian.filter_steps(transition, evidence)[0]
        return _gathered(filtered, linear_gaussian.smooth_steps(transition, filtered))

    head = _head(steps)
    if parallel or head is None:
        return plainly()
    start = _start(transition, evidence, head)
    back = linear_gaussian.link(transition, start.small, None)

    def join(covariance: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        return (following := linear_gaussian.join(back, covariance)), following

    end = lanewise.square(start.small)
    _, ends = jax.lax.scan(join, end, None, length=head)

    def steadily() -> SharedMoments:
        tail = _tail(transition, start, matrix, values, head)
        gain, part = back.gain[:, :, 0], back.part[:, :, 0]
        offset = tail.means[:, :-1] - apply(gain, tail.predicted[:, 1:])
        later = affine_scan(gain, offset, tail.means[:, -1], reverse=True)
        means = jnp.concatenate([later, tail.means[:, -1:]], axis=1)
        moves = apply(part, means[:, 1:] - tail.predicted[:, 1:])
        # From the far end covariances come to rest, stay so, and meet the first steps.
        last = (means[:, 0].T, ends[-1], tail.predicted[:, 0].T)
        early = linear_gaussian.smooth_steps(transition, start.filtered, last)
        count = steps - head
        middle = jnp.sum(ends, axis=0) + (count - head - 2) * ends[-1]
        paired = (end + middle)[..., 0]
        across = numerics.product(paired, part, "ij,kj->ik")
        first = jnp.sum(early.covariances, axis=0)[..., 0]
        return SharedMoments(
            means=jnp.concatenate([_lanes_first(early.means[:-1]), means], axis=1),
            moves=jnp.concatenate([_lanes_first(early.moves), moves], axis=1),
            half_logdet=jnp.sum(start.filtered.half_logdet) + count * start.half_logdet[0],
            first=early.covariances[0, :, :, 0],
            every=first + paired,
            before=first + middle[..., 0],
            cross=jnp.sum(early.cross, axis=0)[..., 0]
            + numerics.product(gain, across, "ij,jk->ik")
            + (count - 1) * back.mixed[:, :, 0],
            spread=jnp.sum(early.spread, axis=0)[..., 0]
            + numerics.product(part, across, "ij,jk->ik")
            + (count - 1) * back.spread[:, :, 0],
        )

    settled = start.settled & _at_rest(ends[head - head // 4 - 1], ends[-1])
    return jax.lax.cond(settled, steadily, plainly)


def shared_log_prob(
    transition: Transition, matrix: jax.Array, values: jax.Array, constant: jax.Array, *, parallel: bool = False
) -> jax.Array:
    """Of the same, the log-density (B, T) of every step given those before it."""
    evidence = _evidence(matrix, values, constant)

    def plainly() -> jax.Array:
        if parallel:
            return linear_gaussian.filter_side_by_side(transition, evidence).log_prob.T
        return linear_gaussian.filter_steps(transition, evidence)[0].log_prob.T

    head = _head(values.shape[1])
    if parallel or head is None:
        return plainly()
    start = _start(transition, evidence, head)

    def steadily() -> jax.Array:
        tail = _tail(transition, start, matrix, values, head)
        late = values[:, head:]
        correction = apply(start.step[:, :, 0], late - apply(matrix, tail.predicted))
        left = late - apply(matrix, tail.means)
        quadratic = jnp.sum(jnp.square(correction), axis=-1) + jnp.sum(jnp.square(left), axis=-1)
        log_prob = constant[:, head:] - 0.5 * quadratic - start.half_logdet[0]
        return jnp.concatenate([start.filtered.log_prob.T, log_prob], axis=1)

    return jax.lax.cond(start.settled, steadily, plainly)


def _head(steps: int) -> int | None:
    """Steps after which a covariance recursion is looked at whether it is at rest; None where that does not pay."""
    head = min(max(64, steps // 32), 256)
    return head if steps >= 4 * head else None


def _evidence(matrix: jax.Array, values: jax.Array, constant: jax.Array) -> Evidence:
    steps = values.shape[1]
    return Evidence(
        matrix=jnp.broadcast_to(matrix[None, :, :, None], (steps, *matrix.shape, 1)),
        values=jnp.moveaxis(values, 0, -1),
        constant=constant.T,
    )


def _lanes_first(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x, -1, 0)


def apply(matrix: jax.Array, vectors: jax.Array) -> jax.Array:
    """matrix v: (I, J), (B, T, J) -> (B, T, I).

    Products with a short inner axis run far below a CPU's speed: several steps are taken together, as one vector.
    """
    lanes, steps, width = vectors.shape
    rows, height = lanes * steps, len(matrix)
    group = next(g for g in (8, 4, 2, 1) if g == 1 or (rows % g == 0 and g * max(width, height) <= _GROUPED_WIDTH))
    block = jnp.kron(jnp.eye(group, dtype=matrix.dtype), matrix) if group > 1 else matrix
    grouped = numerics.product(vectors.reshape(rows // group, group * width), block, "nj,ij->ni")
    return grouped.reshape(lanes, steps, height)


def _gathered(filtered: Filtered, smoothed: Smoothed) -> SharedMoments:
    before = lanewise.sum_steps(smoothed.covariances[:-1, :, :, 0])
    return SharedMoments(
        means=_lanes_first(smoothed.means),
        moves=_lanes_first(smoothed.moves),
        half_logdet=lanewise.sum_steps(filtered.half_logdet[:, 0]),
        first=smoothed.covariances[0, :, :, 0],
        every=before + smoothed.covariances[-1, :, :, 0],
        before=before,
        cross=lanewise.sum_steps(smoothed.cross[..., 0]),
        spread=lanewise.sum_steps(smoothed.spread[..., 0]),
    )


def _at_rest(before: jax.Array, after: jax.Array) -> jax.Array:
    """Whether a covariance (S, S, 1) has stopped moving."""
    scale = jnp.sqrt(jnp.abs(jnp.diagonal(after)))[0]
    allowed = _SETTLED * jnp.finfo(after.dtype).eps * scale[:, None] * scale
    return jnp.all(jnp.abs(after - before)[..., 0] <= allowed)


@record
class _Start:
    """The first steps, and the constants at which the covariance recursion has arrived after them."""

    filtered: Filtered
    settled: jax.Array
    root: jax.Array
    small: jax.Array
    step: jax.Array
    half_logdet: jax.Array


def _start(transition: Transition, evidence: Evidence, head: int) -> _Start:
    few = jax.tree.map(lambda leaf: leaf[:head], evidence)
    early = dataclasses.replace(transition, shift=transition.shift[:head])
    # Of what is predicted after the last of them only the root is right: the shift there is another's.
    filtered, (root, _) = linear_gaussian.filter_steps(early, few)
    small, step, half_logdet = linear_gaussian.gain(root, evidence.matrix[0])
    settled = _at_rest(lanewise.square(filtered.roots[head - head // 4 - 1]), lanewise.square(filtered.roots[-1]))
    return _Start(filtered=filtered, settled=settled, root=root, small=small, step=step, half_logdet=half_logdet)


@record
class _Tail:
    """Means of what follows the first steps, filtered with constant gains, and predicted: (B, T - head, S)."""

    means: jax.Array
    predicted: jax.Array


def _tail(transition: Transition, start: _Start, matrix: jax.Array, values: jax.Array, head: int) -> _Tail:
    gain = numerics.product(start.root[:, :, 0], start.step[:, :, 0], "ki,kp->ip")
    kept = jnp.eye(len(gain), dtype=gain.dtype) - numerics.product(gain, matrix, "ip,pj->ij")
    shift = _lanes_first(transition.shift[head:])
    inputs = apply(gain, values[:, head:]) + apply(kept, shift)
    first = start.filtered.means[-1].T
    carry = numerics.product(kept, transition.matrix, "ij,jk->ik")
    means = affine_scan(carry, inputs, first)
    previous = jnp.concatenate([first[:, None], means[:, :-1]], axis=1)
    return _Tail(means=means, predicted=apply(transition.matrix, previous) + shift)
