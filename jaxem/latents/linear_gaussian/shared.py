"""Sequences of one length with nothing missing share their covariances: one recursion of covariances serves all.

Once the covariances are steady, as after some tens of steps, they are not computed any more: from there means obey
recursions with constant gains. `steady` functions use these after the first steps; `general` ones do not.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ... import numerics
from ...record import record
from .. import lanewise
from .affine import affine_scan, apply
from .elements import Evidence, Filtered, Link, Smoothed, Transition, link, smoothed_covariance, update_root
from .filtering import filter_steps, filtered
from .smoothing import smooth_steps, smoothed

# A covariance counts as settled if it changes by at most this multiple of its rounding error.
_SETTLED = 32


@record
class SharedMoments:
    """The posterior of all sequences: means of each, and the covariances that they share, summed over time.

    means             E z_t                                  (T, S, B)
    process_noise     E w_t, w_t = z_t - E(z_t | z_(t-1))    (T - 1, S, B)
    half_logdet       sum of `Filtered.half_logdet`          ()
    initial           cov(z_1)                               (S, S)
    all_states        sum of cov(z_t), t = 1 .. T            (S, S)
    all_but_last      sum of cov(z_t), t = 1 .. T - 1        (S, S)
    cross_covariance  sum of cov(z_(t-1), w_t)               (S, S)
    noise_covariance  sum of cov(w_t)                        (S, S)
    """

    means: jax.Array
    process_noise: jax.Array
    half_logdet: jax.Array
    initial: jax.Array
    all_states: jax.Array
    all_but_last: jax.Array
    cross_covariance: jax.Array
    noise_covariance: jax.Array


def shared_moments(
    transition: Transition, matrix: jax.Array, values: jax.Array, *, parallel: bool = False
) -> SharedMoments:
    """Smoothed moments, summed; matrix (P, S) and values (T, P, B) as in `Evidence`."""
    evidence = _evidence(matrix, values)

    def general() -> SharedMoments:
        filter_ = filtered(transition, evidence, parallel)
        return _summed(filter_, smoothed(transition, filter_, parallel))

    def steady(start: _Start, back: _Back) -> SharedMoments:
        tail = _tail(transition, start, matrix, values)
        means, early = _late_and_early(transition, start, back, tail)
        gain, noise_gain, ends = back.link.gain[:, :, 0], back.link.noise_gain[:, :, 0], back.ends
        count = len(means)
        middle = jnp.sum(ends[1:], axis=0) + (count - len(ends) - 1) * ends[-1]
        late = (ends[0] + middle)[..., 0]
        across = numerics.product(late, noise_gain, "ij,kj->ik")
        first = jnp.sum(early.covariances, axis=0)[..., 0]
        return SharedMoments(
            means=jnp.concatenate([early.means[:-1], means]),
            process_noise=jnp.concatenate([early.process_noise, apply(noise_gain, means[1:] - tail.predicted[1:])]),
            half_logdet=jnp.sum(start.filtered.half_logdet) + count * start.half_logdet[0],
            initial=early.covariances[0, :, :, 0],
            all_states=first + late,
            all_but_last=first + middle[..., 0],
            cross_covariance=jnp.sum(early.cross_covariances, axis=0)[..., 0]
            + numerics.product(gain, across, "ij,jk->ik")
            + (count - 1) * back.link.cross_covariance[:, :, 0],
            noise_covariance=jnp.sum(early.noise_covariances, axis=0)[..., 0]
            + numerics.product(noise_gain, across, "ij,jk->ik")
            + (count - 1) * back.link.noise_covariance[:, :, 0],
        )

    return _steady_or_general(transition, evidence, parallel, steady, general, back=True)


def shared_filter(
    transition: Transition, matrix: jax.Array, values: jax.Array, *, parallel: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Filtered means (T, S, B) and roots (T, S, S, 1); arguments as in `shared_moments`."""
    evidence = _evidence(matrix, values)

    def general() -> tuple[jax.Array, jax.Array]:
        filter_ = filtered(transition, evidence, parallel)
        return filter_.means, filter_.roots

    def steady(start: _Start) -> tuple[jax.Array, jax.Array]:
        tail = _tail(transition, start, matrix, values)
        return (
            jnp.concatenate([start.filtered.means, tail.means]),
            jnp.concatenate([start.filtered.roots, _repeated(start.posterior, len(tail.means))]),
        )

    return _steady_or_general(transition, evidence, parallel, steady, general)


def shared_smoother(
    transition: Transition, matrix: jax.Array, values: jax.Array, *, parallel: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Smoothed means (T, S, B) and covariances (T, S, S, 1); arguments as in `shared_moments`."""
    evidence = _evidence(matrix, values)

    def general() -> tuple[jax.Array, jax.Array]:
        found = smoothed(transition, filtered(transition, evidence, parallel), parallel)
        return found.means, found.covariances

    def steady(start: _Start, back: _Back) -> tuple[jax.Array, jax.Array]:
        tail = _tail(transition, start, matrix, values)
        means, early = _late_and_early(transition, start, back, tail)
        middle = _repeated(back.ends[-1], len(means) - len(back.ends))
        return (
            jnp.concatenate([early.means[:-1], means]),
            jnp.concatenate([early.covariances[:-1], middle, back.ends[::-1]]),
        )

    return _steady_or_general(transition, evidence, parallel, steady, general, back=True)


def shared_log_prob(
    transition: Transition, matrix: jax.Array, values: jax.Array, constant: jax.Array, *, parallel: bool = False
) -> jax.Array:
    """The log-density (T, B) of every step given those before it; constant (T, B) as in `Evidence`."""
    evidence = _evidence(matrix, values, constant)

    def general() -> jax.Array:
        return filtered(transition, evidence, parallel).log_prob

    def steady(start: _Start) -> jax.Array:
        tail = _tail(transition, start, matrix, values)
        head = len(start.filtered.means)
        late = values[head:]
        correction = apply(start.gain[:, :, 0], late - apply(matrix, tail.predicted))
        left = late - apply(matrix, tail.means)
        quadratic = jnp.sum(jnp.square(correction), axis=1) + jnp.sum(jnp.square(left), axis=1)
        log_prob = constant[head:] - 0.5 * quadratic - start.half_logdet[None]
        return jnp.concatenate([start.filtered.log_prob, log_prob])

    return _steady_or_general(transition, evidence, parallel, steady, general)


def _steady_or_general(
    transition: Transition,
    evidence: Evidence,
    parallel: bool,
    steady: Callable[..., Any],
    general: Callable[[], Any],
    back: bool = False,
) -> Any:
    """`steady(start)`, or `steady(start, back)` with `back`, if the covariances become steady within the first steps,
    and on the way back; else `general()`."""
    head = _head(len(evidence.values))
    if parallel or head is None:
        return general()
    start = _start(transition, evidence, head)
    known: tuple[Any, ...] = (start, _back(transition, start)) if back else (start,)
    return jax.lax.cond(known[-1].settled, lambda: steady(*known), general)


def _head(steps: int) -> int | None:
    """The number of first steps, after which covariances should be steady; None where the shortcut does not pay."""
    head = min(max(64, steps // 32), 256)
    return head if steps >= 4 * head else None


def _repeated(x: jax.Array, steps: int) -> jax.Array:
    return jnp.broadcast_to(x, (steps, *x.shape))


def _evidence(matrix: jax.Array, values: jax.Array, constant: jax.Array | None = None) -> Evidence:
    if constant is None:
        constant = jnp.zeros((len(values), 1), values.dtype)
    return Evidence(matrix=_repeated(matrix[:, :, None], len(values)), values=values, constant=constant)


def _summed(filtered: Filtered, smoothed: Smoothed) -> SharedMoments:
    all_but_last = lanewise.sum_steps(smoothed.covariances[:-1, :, :, 0])
    return SharedMoments(
        means=smoothed.means,
        process_noise=smoothed.process_noise,
        half_logdet=lanewise.sum_steps(filtered.half_logdet[:, 0]),
        initial=smoothed.covariances[0, :, :, 0],
        all_states=all_but_last + smoothed.covariances[-1, :, :, 0],
        all_but_last=all_but_last,
        cross_covariance=lanewise.sum_steps(smoothed.cross_covariances[..., 0]),
        noise_covariance=lanewise.sum_steps(smoothed.noise_covariances[..., 0]),
    )


def _at_rest(before: jax.Array, after: jax.Array) -> jax.Array:
    """Whether a covariance (S, S, 1) has stopped moving."""
    scale = jnp.sqrt(jnp.abs(jnp.diagonal(after)))[0]
    allowed = _SETTLED * jnp.finfo(after.dtype).eps * scale[:, None] * scale[None]
    return jnp.all(jnp.abs(after - before)[..., 0] <= allowed)


@record
class _Start:
    """The first steps, and the constants at which the covariance recursion has arrived after them.

    filtered      the first steps
    settled       (), whether the covariances have become steady, so that what follows are constants
    predicted     (S, S, 1), root of the predicted covariance
    posterior     (S, S, 1), root of the filtered covariance
    gain          (S, P, 1), of `update_root`: the Kalman gain is predictedᵀ gain
    half_logdet   (1,), of a step, as in `Filtered`
    """

    filtered: Filtered
    settled: jax.Array
    predicted: jax.Array
    posterior: jax.Array
    gain: jax.Array
    half_logdet: jax.Array


def _start(transition: Transition, evidence: Evidence, head: int) -> _Start:
    few = jax.tree.map(lambda leaf: leaf[:head], evidence)
    early = dataclasses.replace(transition, shift=transition.shift[:head])
    # Of the prediction after the last of them only the root is valid: its mean has the shift of another step.
    filtered, (root, _) = filter_steps(early, few)
    posterior, gain, half_logdet = update_root(root, evidence.matrix[0])
    settled = _at_rest(lanewise.square(filtered.roots[head - head // 4 - 1]), lanewise.square(filtered.roots[-1]))
    return _Start(
        filtered=filtered, settled=settled, predicted=root, posterior=posterior, gain=gain, half_logdet=half_logdet
    )


@record
class _Tail:
    """What follows the first steps, filtered with constant gains: means and predicted (T - head, S, B)."""

    means: jax.Array
    predicted: jax.Array


def _tail(transition: Transition, start: _Start, matrix: jax.Array, values: jax.Array) -> _Tail:
    head = len(start.filtered.means)
    gain = numerics.product(start.predicted[:, :, 0], start.gain[:, :, 0], "ki,kp->ip")
    kept = jnp.eye(len(gain), dtype=gain.dtype) - numerics.product(gain, matrix, "ip,pj->ij")
    shift = transition.shift[head:]
    first = start.filtered.means[-1]
    carry = numerics.product(kept, transition.matrix, "ij,jk->ik")
    means = affine_scan(carry, apply(gain, values[head:]) + apply(kept, shift), first)
    previous = jnp.concatenate([first[None], means[:-1]])
    return _Tail(means=means, predicted=apply(transition.matrix, previous) + shift)


@record
class _Back:
    """The backward recursion of covariances, from the last step.

    link      of steps at which the filter is steady
    ends      (head + 1, S, S, 1), smoothed covariances of the last step and, in turn, of those before it
    settled   (), whether these become steady, and the filtered ones as well
    """

    link: Link
    ends: jax.Array
    settled: jax.Array


def _back(transition: Transition, start: _Start) -> _Back:
    head = len(start.filtered.means)
    at_rest = link(transition, start.posterior, None)

    def join(covariance: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        return (following := smoothed_covariance(at_rest, covariance)), following

    end = lanewise.square(start.posterior)
    _, before = jax.lax.scan(join, end, None, length=head)
    settled = start.settled & _at_rest(before[head - head // 4 - 1], before[-1])
    return _Back(link=at_rest, ends=jnp.concatenate([end[None], before]), settled=settled)


def _late_and_early(transition: Transition, start: _Start, back: _Back, tail: _Tail) -> tuple[jax.Array, Smoothed]:
    """Smoothed means of the steps after the first ones; and the first ones smoothed, with one step more.

    From the last step backwards covariances become steady, and remain so until the first steps.
    """
    gain = back.link.gain[:, :, 0]
    offset = tail.means[:-1] - apply(gain, tail.predicted[1:])
    later = affine_scan(gain, offset, tail.means[-1], reverse=True)
    means = jnp.concatenate([later, tail.means[-1:]])
    return means, smooth_steps(transition, start.filtered, (means[0], back.ends[-1], tail.predicted[0]))
