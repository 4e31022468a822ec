"""Linear-Gaussian latents of sequences that share their covariances: one recursion of covariances serves all, and once
it has come to rest, what is left is a recursion of means with constant gains.

Letters and axes as in `linear_gaussian`: time first, lanes last.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .. import numerics
from ..record import record
from . import lanewise, linear_gaussian
from .linear_gaussian import Evidence, Filtered, Link, Smoothed, Transition

# Lanes that a recursion of means should have: on a CPU, and on an accelerator, where a step costs far more than a lane.
_LANES, _LANES_OF_ACCELERATORS = 64, 4096

# Numbers side by side up to which steps of one lane are grouped for a product.
_GROUPED_WIDTH = 64

# Entries of a matrix up to which its product with vectors is written out, lane by lane.
_WRITTEN_OUT = 64

# Of how many times its rounding a covariance may still move and count as settled.
_SETTLED = 32


def affine_scan(matrix: jax.Array, inputs: jax.Array, start: jax.Array, *, reverse: bool = False) -> jax.Array:
    """m_t = matrix m_(t-1) + inputs_t from m_0 = start, for all t: (S, S), (T, S, B), (S, B) -> (T, S, B).

    Where lanes are few, time is cut into pieces that stand side by side as lanes: a first run tells where each of them
    ends when it starts from nothing, and so where the next one starts. reverse: m_t from m_(t+1), and `start` follows
    the last.
    """
    steps, states, lanes = inputs.shape

    def run(matrix: jax.Array, start: jax.Array, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        def step(mean: jax.Array, more: jax.Array) -> tuple[jax.Array, jax.Array]:
            mean = lanewise.times(matrix[:, :, None], mean) + more
            return mean, mean

        return jax.lax.scan(step, start, inputs, reverse=reverse)

    wanted = _LANES if jax.default_backend() == "cpu" else _LANES_OF_ACCELERATORS
    pieces = min(wanted // lanes, math.isqrt(2 * steps))
    if pieces < 2:
        return run(matrix, start, inputs)[1]
    size = -(-steps // pieces)
    room = pieces * size - steps
    padded = jnp.pad(inputs, ((room, 0) if reverse else (0, room), (0, 0), (0, 0)))
    apart = jnp.moveaxis(padded.reshape(pieces, size, states, lanes), 0, 2).reshape(size, states, pieces * lanes)
    ends, _ = run(matrix, jnp.zeros_like(apart[0]), apart)
    ends = jnp.moveaxis(ends.reshape(states, pieces, lanes), 1, 0)
    with jax.default_matmul_precision("highest"):
        across = jnp.linalg.matrix_power(matrix, size)
    _, reached = run(across, start, ends)
    begins = jnp.concatenate([reached[1:], start[None]] if reverse else [start[None], reached[:-1]])
    _, found = run(matrix, jnp.moveaxis(begins, 0, 1).reshape(states, pieces * lanes), apart)
    whole = jnp.moveaxis(found.reshape(size, states, pieces, lanes), 2, 0).reshape(pieces * size, states, lanes)
    return whole[room:] if reverse else whole[:steps]


@record
class SharedMoments:
    """Posterior of sequences of one length with nothing missing: means (T, S, B) and moves (T - 1, S, B) as in
    `Smoothed`; and what all sequences share: the sum of half_logdet, as in `Filtered`, and covariances,
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

    matrix (P, S) and values (T, P, B) as in `Evidence`. A recursion that has come to rest, as it does after some tens
    of steps, is not carried on: from there means obey recursions with constant gains.
    """
    evidence = _evidence(matrix, values)

    def plainly() -> SharedMoments:
        filtered = linear_gaussian.filtered(transition, evidence, parallel)
        return _gathered(filtered, linear_gaussian.smoothed(transition, filtered, parallel))

    def steadily(start: _Start, back: _Back) -> SharedMoments:
        tail = _tail(transition, start, matrix, values)
        means, early = _late_and_early(transition, start, back, tail)
        gain, part, ends = back.link.gain[:, :, 0], back.link.part[:, :, 0], back.ends
        moves = apply(part, means[1:] - tail.predicted[1:])
        count = len(means)
        middle = jnp.sum(ends[1:], axis=0) + (count - len(ends) - 1) * ends[-1]
        paired = (ends[0] + middle)[..., 0]
        across = numerics.product(paired, part, "ij,kj->ik")
        first = jnp.sum(early.covariances, axis=0)[..., 0]
        return SharedMoments(
            means=jnp.concatenate([early.means[:-1], means]),
            moves=jnp.concatenate([early.moves, moves]),
            half_logdet=jnp.sum(start.filtered.half_logdet) + count * start.half_logdet[0],
            first=early.covariances[0, :, :, 0],
            every=first + paired,
            before=first + middle[..., 0],
            cross=jnp.sum(early.cross, axis=0)[..., 0]
            + numerics.product(gain, across, "ij,jk->ik")
            + (count - 1) * back.link.mixed[:, :, 0],
            spread=jnp.sum(early.spread, axis=0)[..., 0]
            + numerics.product(part, across, "ij,jk->ik")
            + (count - 1) * back.link.spread[:, :, 0],
        )

    return _at_rest_or_not(transition, evidence, parallel, plainly, steadily, back=True)


def shared_filter(
    transition: Transition, matrix: jax.Array, values: jax.Array, *, parallel: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Of the same, filtered means (T, S, B) and roots (T, S, S, 1)."""
    evidence = _evidence(matrix, values)

    def plainly() -> tuple[jax.Array, jax.Array]:
        filtered = linear_gaussian.filtered(transition, evidence, parallel)
        return filtered.means, filtered.roots

    def steadily(start: _Start) -> tuple[jax.Array, jax.Array]:
        tail = _tail(transition, start, matrix, values)
        return (
            jnp.concatenate([start.filtered.means, tail.means]),
            jnp.concatenate([start.filtered.roots, _repeated(start.small, len(tail.means))]),
        )

    return _at_rest_or_not(transition, evidence, parallel, plainly, steadily)


def shared_smoother(
    transition: Transition, matrix: jax.Array, values: jax.Array, *, parallel: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Of the same, smoothed means (T, S, B) and covariances (T, S, S, 1)."""
    evidence = _evidence(matrix, values)

    def plainly() -> tuple[jax.Array, jax.Array]:
        smoothed = linear_gaussian.smoothed(
            transition, linear_gaussian.filtered(transition, evidence, parallel), parallel
        )
        return smoothed.means, smoothed.covariances

    def steadily(start: _Start, back: _Back) -> tuple[jax.Array, jax.Array]:
        tail = _tail(transition, start, matrix, values)
        means, early = _late_and_early(transition, start, back, tail)
        middle = _repeated(back.ends[-1], len(means) - len(back.ends))
        return (
            jnp.concatenate([early.means[:-1], means]),
            jnp.concatenate([early.covariances[:-1], middle, back.ends[::-1]]),
        )

    return _at_rest_or_not(transition, evidence, parallel, plainly, steadily, back=True)


def shared_log_prob(
    transition: Transition, matrix: jax.Array, values: jax.Array, constant: jax.Array, *, parallel: bool = False
) -> jax.Array:
    """Of the same, the log-density (T, B) of every step given those before it; constant (T, B) as in `Evidence`."""
    evidence = _evidence(matrix, values, constant)

    def plainly() -> jax.Array:
        return linear_gaussian.filtered(transition, evidence, parallel).log_prob

    def steadily(start: _Start) -> jax.Array:
        tail = _tail(transition, start, matrix, values)
        head = len(start.filtered.means)
        late = values[head:]
        correction = apply(start.step[:, :, 0], late - apply(matrix, tail.predicted))
        left = late - apply(matrix, tail.means)
        quadratic = jnp.sum(jnp.square(correction), axis=1) + jnp.sum(jnp.square(left), axis=1)
        log_prob = constant[head:] - 0.5 * quadratic - start.half_logdet
        return jnp.concatenate([start.filtered.log_prob, log_prob])

    return _at_rest_or_not(transition, evidence, parallel, plainly, steadily)


def _at_rest_or_not(
    transition: Transition,
    evidence: Evidence,
    parallel: bool,
    plainly: Callable[[], Any],
    steadily: Callable[..., Any],
    back: bool = False,
) -> Any:
    """What `steadily` finds from the first steps, and from the way back where it goes there, if the covariances come to
    rest on these; else what `plainly` does."""
    head = _head(len(evidence.values))
    if parallel or head is None:
        return plainly()
    start = _start(transition, evidence, head)
    known: tuple[Any, ...] = (start, _back(transition, start)) if back else (start,)
    return jax.lax.cond(known[-1].settled, lambda: steadily(*known), plainly)


def _head(steps: int) -> int | None:
    """Steps after which a covariance recursion is looked at whether it is at rest; None where that does not pay."""
    head = min(max(64, steps // 32), 256)
    return head if steps >= 4 * head else None


def _repeated(x: jax.Array, steps: int) -> jax.Array:
    return jnp.broadcast_to(x, (steps, *x.shape))


def _evidence(matrix: jax.Array, values: jax.Array, constant: jax.Array | None = None) -> Evidence:
    if constant is None:
        constant = jnp.zeros((len(values), 1), values.dtype)
    return Evidence(matrix=_repeated(matrix[:, :, None], len(values)), values=values, constant=constant)


def apply(matrix: jax.Array, vectors: jax.Array) -> jax.Array:
    """matrix v of one matrix for all steps and lanes: (I, J), (T, J, B) -> (T, I, B)."""
    steps, width, lanes = vectors.shape
    height = len(matrix)
    if lanes > 1 and height * width <= _WRITTEN_OUT:
        return lanewise.times(matrix[:, :, None], vectors)
    if lanes >= width > 1:
        # One product a step, whose result is stored: written out, it would be computed anew inside each of its uses.
        same = jnp.broadcast_to(matrix, (steps, height, width))
        return numerics.product(same, vectors, "tij,tjb->tib")
    if lanes > 1:
        return numerics.product(matrix, vectors, "ij,tjb->tib")
    # Products with a short inner axis run far below a CPU's speed: several steps are taken together, as one vector.
    group = next(g for g in (8, 4, 2, 1) if g == 1 or (steps % g == 0 and g * max(width, height) <= _GROUPED_WIDTH))
    block = jnp.kron(jnp.eye(group, dtype=matrix.dtype), matrix) if group > 1 else matrix
    grouped = numerics.product(vectors.reshape(steps // group, group * width), block, "nj,ij->ni")
    return grouped.reshape(steps, height, 1)


def _gathered(filtered: Filtered, smoothed: Smoothed) -> SharedMoments:
    before = lanewise.sum_steps(smoothed.covariances[:-1, :, :, 0])
    return SharedMoments(
        means=smoothed.means,
        moves=smoothed.moves,
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
    """Means of what follows the first steps, filtered with constant gains, and predicted: (T - head, S, B)."""

    means: jax.Array
    predicted: jax.Array


def _tail(transition: Transition, start: _Start, matrix: jax.Array, values: jax.Array) -> _Tail:
    head = len(start.filtered.means)
    gain = numerics.product(start.root[:, :, 0], start.step[:, :, 0], "ki,kp->ip")
    kept = jnp.eye(len(gain), dtype=gain.dtype) - numerics.product(gain, matrix, "ip,pj->ij")
    shift = transition.shift[head:]
    first = start.filtered.means[-1]
    carry = numerics.product(kept, transition.matrix, "ij,jk->ik")
    means = affine_scan(carry, apply(gain, values[head:]) + apply(kept, shift), first)
    previous = jnp.concatenate([first[None], means[:-1]])
    return _Tail(means=means, predicted=apply(transition.matrix, previous) + shift)


@record
class _Back:
    """The way back: the link of steps at rest; covariances (head + 1, S, S, 1) given all steps, of the last one and,
    in turn, of those before it; settled: whether these came to rest, and those of the way there."""

    link: Link
    ends: jax.Array
    settled: jax.Array


def _back(transition: Transition, start: _Start) -> _Back:
    head = len(start.filtered.means)
    link = linear_gaussian.link(transition, start.small, None)

    def join(covariance: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        return (following := linear_gaussian.join(link, covariance)), following

    end = lanewise.square(start.small)
    _, before = jax.lax.scan(join, end, None, length=head)
    settled = start.settled & _at_rest(before[head - head // 4 - 1], before[-1])
    return _Back(link=link, ends=jnp.concatenate([end[None], before]), settled=settled)


def _late_and_early(transition: Transition, start: _Start, back: _Back, tail: _Tail) -> tuple[jax.Array, Smoothed]:
    """Smoothed means of the steps after the first ones, and all of these with one more, the first after them.

    From the far end covariances come to rest, stay so, and meet the first steps.
    """
    gain = back.link.gain[:, :, 0]
    offset = tail.means[:-1] - apply(gain, tail.predicted[1:])
    later = affine_scan(gain, offset, tail.means[-1], reverse=True)
    means = jnp.concatenate([later, tail.means[-1:]])
    return means, linear_gaussian.smooth_steps(transition, start.filtered, (means[0], back.ends[-1], tail.predicted[0]))
