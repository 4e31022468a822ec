"""One linear-Gaussian latent a step: the Kalman filter, the Rauch-Tung-Striebel smoother, and draws of paths.

Square-root forms throughout: a covariance is carried as a root U with UᵀU = P, and roots are combined by
orthogonalisation (modified Gram-Schmidt, in which a zero pivot stays zero), so that nothing positive is ever a
difference. Kailath, Sayed & Hassibi (2000), Linear Estimation, chapter 12; Yaghoobi, Corenflos, Hassan & Särkkä (2022),
Parallel square-root statistical linear regression for inference in nonlinear state space models, arXiv:2207.00426.

Letters: T steps, S states, P pseudo-observations a step; time first and lanes (sequences) last, so that arrays are
(T, S, B). What sequences share has one lane, which broadcasts: a covariance recursion never sees observations.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..record import record
from . import lanewise


@record
class Transition:
    """z_1 ~ N(mean, U0ᵀU0), z_t = matrix z_(t-1) + shift_t + N(0, UᵀU).

    matrix (S, S); root U (S, S); start_mean (S,); start_root U0 (S, S); shift (T, S, B or 1), its first not used;
    starts (T, B), the steps at which a new sequence begins (the first is one), None where there is only the first.
    """

    matrix: jax.Array
    root: jax.Array
    start_mean: jax.Array
    start_root: jax.Array
    shift: jax.Array
    starts: jax.Array | None = None


@record
class Evidence:
    """What is observed, whitened and compressed to what the state can explain: values_t = matrix_t z_t + N(0, I).

    matrix (T, P, S, B or 1), zero rows where nothing is seen; values (T, P, B); constant (T, B): the log-density of
    what the state has no part in, normalisers included.
    """

    matrix: jax.Array
    values: jax.Array
    constant: jax.Array


@record
class Filtered:
    """means (T, S, B) and roots (T, S, S, B or 1) of z_t given steps up to t; predicted (T, S, B): means given steps
    before t; log_prob (T, B): log-density of step t given those before it; half_logdet (T, B or 1): the part of it
    that does not depend on the values, less constants."""

    means: jax.Array
    roots: jax.Array
    predicted: jax.Array
    log_prob: jax.Array
    half_logdet: jax.Array


@record
class Link:
    """z_t given z_(t+1) and the steps up to t: gain z_(t+1) + offset + N(0, noise), for t = 1 .. T - 1; of the noise w
    that brings z_(t+1) about the gain `part` and the covariance `spread`, and `mixed` = cov(z_t, w): all (S, S, ·).

    Where a sequence ends gain and part are 0 and 1: the neighbours do not know of each other.
    """

    gain: jax.Array
    noise: jax.Array
    part: jax.Array
    mixed: jax.Array
    spread: jax.Array


def _update(
    root: jax.Array, mean: jax.Array, matrix: jax.Array, values: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Bayes' rule for one step: the posterior's root and mean, the log-density of the values, less a constant, and of
    it the half log-determinant.

    root (S, S, ·), mean (S, B), matrix (P, S, ·), values (P, B). Of [I; matrix Uᵀ] = Q R the first rows of Q are
    R⁻¹: the posterior's root is R⁻ᵀU. The quadratic form is that of ridge regression, a sum of squares.
    """
    small, step, factor = gain(root, matrix)
    error = values - lanewise.times(matrix, mean)
    correction = lanewise.times(step, error)
    after = mean + lanewise.times(lanewise.transposed(root), correction)
    left = error - lanewise.times(matrix, lanewise.times(lanewise.transposed(root), correction))
    quadratic = jnp.sum(jnp.square(correction), axis=0) + jnp.sum(jnp.square(left), axis=0)
    return small, after, -0.5 * quadratic - factor, factor


def gain(root: jax.Array, matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of the update: the posterior's root (S, S, ·), the correction's gain (S, P, ·), half the log-determinant (·)."""
    states, seen = root.shape[0], lanewise.matmul(matrix, lanewise.transposed(root))
    lanes = seen.shape[-1]
    eye = jnp.broadcast_to(jnp.eye(states, dtype=root.dtype)[:, :, None], (states, states, lanes))
    # The gain comes from the values as columns of their own: from Q it would carry the rounding of the start's size.
    values = jnp.broadcast_to(jnp.eye(len(seen), dtype=root.dtype)[:, :, None], (len(seen), len(seen), lanes))
    others = jnp.concatenate([jnp.zeros_like(eye, shape=(states, len(seen), lanes)), values])
    directions, upper, along, _ = lanewise.orthogonalize(jnp.concatenate([eye, seen]), others)
    inverse = directions[:states]
    small = lanewise.matmul(lanewise.transposed(inverse), root)
    step = lanewise.matmul(inverse, along)
    return small, step, jnp.sum(jnp.log(jnp.diagonal(upper)), axis=-1)


def _next_rows(transition: Transition, root: jax.Array, start: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Rows (S, S, ·) that z_t and that the noise bring to the root of z_(t+1)."""
    carried = lanewise.matmul(root, transition.matrix.T[:, :, None])
    fresh = jnp.broadcast_to(transition.root[:, :, None], carried.shape)
    if start is None:
        return carried, fresh
    return jnp.where(start, 0, carried), jnp.where(start, transition.start_root[:, :, None], fresh)


def _predict_mean(transition: Transition, mean: jax.Array, shift: jax.Array, start: jax.Array | None) -> jax.Array:
    carried = lanewise.times(transition.matrix[:, :, None], mean) + shift
    return carried if start is None else jnp.where(start, transition.start_mean[:, None], carried)


def _ahead(x: jax.Array | None) -> jax.Array | None:
    """What belongs to the next step; of the last, anything."""
    return None if x is None else jnp.roll(x, -1, axis=0)


def filter_steps(transition: Transition, evidence: Evidence) -> tuple[Filtered, tuple[jax.Array, jax.Array]]:
    """The Kalman filter, step by step; also the root and the mean predicted for the step after the last."""
    lanes, states = evidence.values.shape[-1], transition.matrix.shape[0]
    start = (
        jnp.broadcast_to(transition.start_root[:, :, None], (states, states, evidence.matrix.shape[-1])),
        jnp.broadcast_to(transition.start_mean[:, None], (states, lanes)),
    )

    def step(carry: tuple[jax.Array, jax.Array], at: tuple) -> tuple[tuple[jax.Array, jax.Array], tuple]:
        root, mean = carry
        matrix, values, shift, begins = at
        small, after, log_prob, factor = _update(root, mean, matrix, values)
        following = lanewise.triangular(jnp.concatenate(_next_rows(transition, small, begins)))
        return (following, _predict_mean(transition, after, shift, begins)), (after, small, mean, log_prob, factor)

    ahead = (_ahead(transition.shift), _ahead(transition.starts))
    last, found = jax.lax.scan(step, start, (evidence.matrix, evidence.values, *ahead))
    means, roots, predicted, log_prob, half_logdet = found
    return Filtered(
        means=means, roots=roots, predicted=predicted, log_prob=log_prob + evidence.constant, half_logdet=half_logdet
    ), last


def _backward(
    transition: Transition, root: jax.Array, start: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """One step back in time, from the filtered root (S, S, ·): `gain` and `part` of the link, and roots (2S, S, ·) of
    noise and spread against the same directions."""
    carried, fresh = _next_rows(transition, root, start)
    states, zeros = len(root), jnp.zeros_like(carried)
    others = jnp.concatenate([jnp.concatenate([root, zeros], axis=1), jnp.concatenate([zeros, fresh], axis=1)])
    _, upper, along, rest = lanewise.orthogonalize(jnp.concatenate([carried, fresh]), others)
    gains = lanewise.transposed(lanewise.back_substitute(upper, along))
    return gains[:states], gains[states:], rest[:, :states], rest[:, states:]


def link(transition: Transition, root: jax.Array, start: jax.Array | None) -> Link:
    """The link of one step with the next, from the filtered root (S, S, ·)."""
    gain, part, noise, rest = _backward(transition, root, start)
    return Link(
        gain=gain, part=part, noise=lanewise.square(noise), mixed=lanewise.cross(noise, rest),
        spread=lanewise.square(rest),
    )  # fmt: skip


def _links(transition: Transition, roots: jax.Array, starts: jax.Array | None) -> Link:
    """The links of many steps, from filtered roots (T, S, S, ·): they need no recursion."""
    return lanewise.over_steps(lambda at: (link(transition, *at), None), (roots, starts))[0]


@record
class Smoothed:
    """Given all steps: means (T, S, B) and covariances (T, S, S, ·) of z_t; of the noise w_t = z_t - E(z_t | z_(t-1))
    that brought z_t about, t = 2 .. T: moves (T - 1, S, B) its mean, cross (T - 1, S, S, ·) = cov(z_(t-1), w_t),
    spread (T - 1, S, S, ·) = cov(w_t). Where a sequence starts these mean nothing."""

    means: jax.Array
    covariances: jax.Array
    moves: jax.Array
    cross: jax.Array
    spread: jax.Array


def _pair(link: Link, covariance: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cov(z_(t-1), w_t) and cov(w_t), from the covariance of z_t: a sum of squares, no difference of large ones."""
    tail = lanewise.matmul(covariance, lanewise.transposed(link.part))
    return lanewise.matmul(link.gain, tail) + link.mixed, lanewise.matmul(link.part, tail) + link.spread


def join(link: Link, covariance: jax.Array) -> jax.Array:
    """The covariance of z_t from that of z_(t+1)."""
    joined = lanewise.matmul(lanewise.matmul(link.gain, covariance), lanewise.transposed(link.gain)) + link.noise
    return 0.5 * (joined + lanewise.transposed(joined))


def smooth_steps(
    transition: Transition, filtered: Filtered, last: tuple[jax.Array, jax.Array, jax.Array] | None = None
) -> Smoothed:
    """The Rauch-Tung-Striebel smoother, step by step, back from the last filtered one.

    last: the mean (S, B), covariance (S, S, ·), and predicted mean (S, B) of one more step, to come back from there;
    the results then have that step as well.
    """
    if last is None:
        final = (filtered.means[-1], lanewise.square(filtered.roots[-1]))
        means, roots = filtered.means[:-1], filtered.roots[:-1]
        predicted = filtered.predicted[1:]
        starts = None if transition.starts is None else transition.starts[1:]
    else:
        final, means, roots = last[:2], filtered.means, filtered.roots
        predicted = jnp.concatenate([filtered.predicted[1:], last[2][None]])
        starts = None
    links = _links(transition, roots, starts)

    def step(carry: tuple[jax.Array, jax.Array], at: tuple) -> tuple[tuple[jax.Array, jax.Array], tuple]:
        after, covariance = carry
        mean, forecast, link = at
        new = (mean + lanewise.times(link.gain, after - forecast), join(link, covariance))
        return new, new

    _, (means, covariances) = jax.lax.scan(step, final, (means, predicted, links), reverse=True)
    means, covariances = (jnp.concatenate([x, end[None]]) for x, end in zip((means, covariances), final, strict=True))
    return _with_pairs(means, covariances, predicted, links)


def _with_pairs(means: jax.Array, covariances: jax.Array, predicted: jax.Array, links: Link) -> Smoothed:
    (cross, spread), _ = lanewise.over_steps(lambda at: (_pair(*at), None), (links, covariances[1:]))
    moves = lanewise.times(links.part, means[1:] - predicted)
    return Smoothed(means=means, covariances=covariances, moves=moves, cross=cross, spread=spread)


class Returns(NamedTuple):
    """`gain` and `part` of the links of all steps, and roots (T - 1, 2S, S, ·) of their noise and spread."""

    gain: jax.Array
    part: jax.Array
    noise: jax.Array
    rest: jax.Array


def returns(transition: Transition, filtered: Filtered) -> Returns:
    """What paths are drawn with, backward in time: the same for every one of them."""
    starts = None if transition.starts is None else transition.starts[1:]
    found, _ = lanewise.over_steps(lambda at: (_backward(transition, *at), None), (filtered.roots[:-1], starts))
    return Returns(*found)


def draw_path(key: jax.Array, filtered: Filtered, returns: Returns) -> tuple[jax.Array, jax.Array]:
    """One path (T, S, B) from the posterior, and the noise (T - 1, S, B) in it: filter forward, sample backward.

    Frühwirth-Schnatter (1994), Data augmentation and dynamic linear models, J. Time Series Analysis 15.
    """
    steps, states, lanes = filtered.means.shape
    draws = jax.random.normal(key, (steps, 2 * states, lanes), filtered.means.dtype)
    last = filtered.means[-1] + lanewise.times(lanewise.transposed(filtered.roots[-1]), draws[-1, :states])
    noise, rest = (lanewise.times(lanewise.transposed(root), draws[:-1]) for root in (returns.noise, returns.rest))
    predicted = filtered.predicted[1:]

    def step(after: jax.Array, at: tuple) -> tuple[jax.Array, jax.Array]:
        mean, forecast, gain, noise = at
        state = mean + lanewise.times(gain, after - forecast) + noise
        return state, state

    _, path = jax.lax.scan(step, last, (filtered.means[:-1], predicted, returns.gain, noise), reverse=True)
    path = jnp.concatenate([path, last[None]])
    return path, lanewise.times(returns.part, path[1:] - predicted) + rest


# Side by side in time.


@record
class _Span:
    """Some steps as one: given the state before, the last state is A z + b + N(0, UᵀU), and what was seen says of the
    state before exp(zᵀ eta - |Z z|² / 2). The filter's elements of Särkkä & García-Fernández (2021), in roots."""

    carry: jax.Array
    offset: jax.Array
    root: jax.Array
    eta: jax.Array
    seen: jax.Array


def _follow(first: _Span, second: _Span) -> _Span:
    """Two spans, one after the other, as one."""
    states = len(first.carry)
    inside = lanewise.matmul(second.seen, lanewise.transposed(first.root))
    eye = jnp.broadcast_to(jnp.eye(states, dtype=inside.dtype)[:, :, None], inside.shape)
    others = jnp.concatenate([second.seen, jnp.zeros_like(inside)])
    directions, _, _, rest = lanewise.orthogonalize(jnp.concatenate([inside, eye]), others)
    inverse = directions[states:]
    small = lanewise.matmul(lanewise.transposed(inverse), first.root)
    information = lanewise.square(second.seen)
    # What the second span says of the first one's end, taken in.
    update = lanewise.matmul(lanewise.square(small), information)
    end = first.offset + lanewise.times(lanewise.square(small), second.eta - lanewise.times(information, first.offset))
    kept = jnp.eye(states, dtype=inside.dtype)[:, :, None] - update
    back = lanewise.matmul(second.carry, kept)
    returned = second.eta - lanewise.times(information, first.offset)
    returned = lanewise.times(lanewise.transposed(kept), returned)
    return _Span(
        carry=lanewise.matmul(back, first.carry),
        offset=lanewise.times(second.carry, end) + second.offset,
        root=lanewise.triangular(
            jnp.concatenate([lanewise.matmul(small, lanewise.transposed(second.carry)), second.root])
        ),
        eta=lanewise.times(lanewise.transposed(first.carry), returned) + first.eta,
        seen=lanewise.triangular(jnp.concatenate([lanewise.matmul(rest, first.carry), first.seen])),
    )


def _spans(transition: Transition, evidence: Evidence) -> _Span:
    """Every step as a span."""
    states = transition.matrix.shape[0]
    first = jnp.arange(len(evidence.values)) == 0
    starts = first[:, None] if transition.starts is None else transition.starts

    def span(matrix: jax.Array, values: jax.Array, shift: jax.Array, start: jax.Array) -> _Span:
        lanes = matrix.shape[-1]
        where = jnp.where(start, transition.start_root[:, :, None], transition.root[:, :, None])
        root = jnp.broadcast_to(where, (states, states, lanes))
        move = jnp.where(start, 0, transition.matrix[:, :, None])
        mean = jnp.where(start, transition.start_mean[:, None], shift)
        mean = jnp.broadcast_to(mean, (states, values.shape[-1]))
        small, after, _, _ = _update(root, mean, matrix, values)
        _, step, _ = gain(root, matrix)
        kept = jnp.eye(states, dtype=root.dtype)[:, :, None] - lanewise.matmul(
            lanewise.matmul(lanewise.transposed(root), step), matrix
        )
        # The likelihood of the state before: values = matrix (A z + mean) + N(0, I + matrix UᵀU matrixᵀ).
        seen = lanewise.matmul(matrix, lanewise.transposed(root))
        count = len(matrix)
        eye = jnp.broadcast_to(jnp.eye(count, dtype=root.dtype)[:, :, None], (count, count, lanes))
        rows = jnp.concatenate([eye, lanewise.transposed(seen)])
        directions, _, _, _ = lanewise.orthogonalize(rows, rows[:, :0])
        white = lanewise.transposed(directions[:count])
        through = lanewise.matmul(lanewise.matmul(white, matrix), jnp.broadcast_to(move, (states, states, lanes)))
        error = lanewise.times(white, values - lanewise.times(matrix, mean))
        padded = jnp.concatenate([through, jnp.zeros_like(through, shape=(states, states, lanes))])
        return _Span(
            carry=lanewise.matmul(kept, jnp.broadcast_to(move, (states, states, lanes))),
            offset=after,
            root=small,
            eta=lanewise.times(lanewise.transposed(through), error),
            seen=lanewise.triangular(padded),
        )

    shift = jnp.broadcast_to(transition.shift, (len(evidence.values), *transition.shift.shape[1:]))
    return jax.vmap(span)(evidence.matrix, evidence.values, shift, starts)


def filter_side_by_side(transition: Transition, evidence: Evidence) -> Filtered:
    """The same as `filter_steps`, all steps at once: a scan of an associative operation, log T deep."""
    ends = jax.lax.associative_scan(jax.vmap(_follow), _spans(transition, evidence))
    starts = transition.starts

    def predict(root: jax.Array, mean: jax.Array, shift: jax.Array, begins: jax.Array | None) -> tuple:
        rows = jnp.concatenate(_next_rows(transition, root, begins))
        return lanewise.triangular(rows), _predict_mean(transition, mean, shift, begins)

    roots, means = jax.vmap(predict)(
        ends.root[:-1], ends.offset[:-1], transition.shift[1:], None if starts is None else starts[1:]
    )
    lanes = evidence.values.shape[-1]
    first = jnp.broadcast_to(transition.start_root[:, :, None], ends.root.shape[1:])
    roots = jnp.concatenate([first[None], roots])
    means = jnp.concatenate([jnp.broadcast_to(transition.start_mean[:, None], (len(first), lanes))[None], means])
    # One more update of every prediction: its rounding is that of one step, and it tells the densities.
    small, after, log_prob, half_logdet = jax.vmap(_update)(roots, means, evidence.matrix, evidence.values)
    return Filtered(
        means=after, roots=small, predicted=means, log_prob=log_prob + evidence.constant, half_logdet=half_logdet
    )


def smooth_side_by_side(transition: Transition, filtered: Filtered) -> Smoothed:
    """The same as `smooth_steps`, all steps at once."""
    starts = None if transition.starts is None else transition.starts[1:]
    links = jax.vmap(lambda root, begins: link(transition, root, begins))(filtered.roots[:-1], starts)
    predicted = filtered.predicted[1:]
    offset = filtered.means[:-1] - lanewise.times(links.gain, predicted)
    maps = (
        jnp.concatenate([links.gain, jnp.zeros_like(links.gain[:1], shape=(1, *filtered.roots.shape[1:]))]),
        jnp.concatenate([offset, filtered.means[-1:]]),
        jnp.concatenate([links.noise, lanewise.square(filtered.roots[-1:])]),
    )

    def follow(later: tuple, earlier: tuple) -> tuple:
        gain, mean, covariance = earlier
        far, there, spread = later
        return (
            lanewise.matmul(gain, far),
            lanewise.times(gain, there) + mean,
            lanewise.matmul(lanewise.matmul(gain, spread), lanewise.transposed(gain)) + covariance,
        )

    _, means, covariances = jax.lax.associative_scan(follow, maps, reverse=True)
    return _with_pairs(means, covariances, predicted, links)


def steady_root(transition: Transition, matrix: jax.Array) -> jax.Array:
    """The root (S, S, 1) of the filtered covariance in the long run, for one matrix (P, S, 1) at all steps.

    By doubling: after k turns a span stands for 2^k steps. Anderson & Moore (1979), Optimal Filtering, section 6.7.
    """
    states = len(transition.matrix)
    constant = Evidence(
        matrix=matrix[None], values=jnp.zeros_like(matrix, shape=(1, len(matrix), 1)),
        constant=jnp.zeros_like(matrix, shape=(1, 1)),
    )  # fmt: skip
    never = Transition(
        matrix=transition.matrix, root=transition.root, start_mean=transition.start_mean,
        start_root=transition.start_root, shift=jnp.zeros_like(matrix, shape=(1, states, 1)),
        starts=jnp.zeros((1, 1), bool),
    )  # fmt: skip
    span = jax.tree.map(lambda leaf: leaf[0], _spans(never, constant))
    return jax.lax.fori_loop(0, 30, lambda _, span: _follow(span, span), span).root


# Either way.


def filtered(transition: Transition, evidence: Evidence, parallel: bool) -> Filtered:
    """The Kalman filter, step by step or side by side in time."""
    return filter_side_by_side(transition, evidence) if parallel else filter_steps(transition, evidence)[0]


def smoothed(transition: Transition, filtered: Filtered, parallel: bool) -> Smoothed:
    """The smoother, likewise."""
    return (smooth_side_by_side if parallel else smooth_steps)(transition, filtered)
