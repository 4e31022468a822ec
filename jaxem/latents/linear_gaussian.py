"""One linear-Gaussian latent a step: the Kalman filter, the Rauch-Tung-Striebel smoother, and draws of paths.

Square-root forms throughout: a covariance is carried as a root U with UᵀU = P, and roots are combined by
orthogonalisation (modified Gram-Schmidt, in which a zero pivot stays zero), so that nothing positive is ever a
difference. Kailath, Sayed & Hassibi (2000), Linear Estimation, chapter 12; Yaghoobi, Corenflos, Hassan & Särkkä (2022),
Parallel square-root statistical linear regression for inference in nonlinear state space models, arXiv:2207.00426.

Letters: T steps, S states, P pseudo-observations a step; time first and lanes (sequences) last, so that arrays are
(T, S, B). What sequences share has one lane, which broadcasts: a covariance recursion never sees observations.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from .. import numerics
from ..record import record

# Up to here columns are orthogonalised one by one in straight-line code: far quicker than a loop, in XLA.
_UNROLLED_COLUMNS = 16

# Steps that one product with a triangular block of powers covers.
_CHUNK = 16

# Numbers side by side up to which steps are grouped for a product.
_GROUPED_WIDTH = 64

# Of how many times its rounding a covariance may still move and count as settled.
_SETTLED = 32


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
class Backward:
    """z_t given z_(t+1) and the steps up to t: gain z_(t+1) + offset + N(0, noiseᵀnoise), for t = 1 .. T - 1.

    gain (T - 1, S, S, ·); noise (T - 1, 2S, S, ·); of the transition's own noise given z_(t+1): part (T - 1, S, S, ·),
    its gain, and rest (T - 1, 2S, S, ·), its root, against the same directions as `noise`. Where a sequence ends
    gain and part are 0 and 1: the neighbours do not know of each other.
    """

    gain: jax.Array
    noise: jax.Array
    part: jax.Array
    rest: jax.Array


def _contract(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """sum over one axis of each of their products, written out where it is short: a reduction over an axis that is
    not the last runs at a fraction of the speed of sums of whole slices."""
    count = a.shape[axis_a]
    if not 0 < count <= _UNROLLED_COLUMNS:
        return jnp.sum(jnp.moveaxis(a, axis_a, 0) * jnp.moveaxis(b, axis_b, 0), axis=0)
    parts = (
        jax.lax.index_in_dim(a, j, axis_a, keepdims=False) * jax.lax.index_in_dim(b, j, axis_b, keepdims=False)
        for j in range(count)
    )
    return functools.reduce(jnp.add, parts)


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """(..., I, J, B) times (..., J, K, B), lane by lane."""
    return _contract(a[..., :, :, None, :], b[..., None, :, :, :], -3, -3)


def times(a: jax.Array, v: jax.Array) -> jax.Array:
    """(..., I, J, B) times (..., J, B), lane by lane."""
    return _contract(a, v[..., None, :, :], -2, -2)


def transposed(a: jax.Array) -> jax.Array:
    """(..., I, J, B) -> (..., J, I, B)."""
    return jnp.swapaxes(a, -3, -2)


def _cross(a: jax.Array, b: jax.Array) -> jax.Array:
    """aᵀb: (..., N, I, B), (..., N, J, B) -> (..., I, J, B)."""
    return _contract(a[..., :, :, None, :], b[..., :, None, :, :], -4, -4)


def square(root: jax.Array) -> jax.Array:
    """UᵀU: (..., N, S, B) -> (..., S, S, B)."""
    return _cross(root, root)


def orthogonalize(columns: jax.Array, others: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Modified Gram-Schmidt: columns (N, K, B) = Q R, and others (N, L, B) = Q R' + rest.

    Returns Q (N, K, B), R (K, K, B) upper triangular, R' (K, L, B), rest (N, L, B). A column that the ones before
    it explain up to rounding has a zero in Q and a zero row in R. The errors of R, R' and rest are those of a
    Householder factorisation (Björck 1967, Solving linear least squares problems by Gram-Schmidt, BIT 7).
    """
    count = columns.shape[1]
    lowest = (4 * jnp.finfo(columns.dtype).eps) ** 2 * jnp.sum(jnp.square(columns), axis=0)

    def eliminate(whole: jax.Array, column: jax.Array, least: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        size = jnp.sum(jnp.square(column), axis=0)
        used = size > least
        direction = jnp.where(used, column * jax.lax.rsqrt(jnp.where(used, size, 1)), 0)
        along = jnp.sum(direction[:, None] * whole, axis=0)
        return whole - direction[:, None] * along, direction, along

    if count <= _UNROLLED_COLUMNS:
        # What is behind is dropped as it goes: half the work.
        rest, directions, rows = jnp.concatenate([columns, others], axis=1), [], []
        for j in range(count):
            rest, direction, along = eliminate(rest, rest[:, 0], lowest[j])
            rest = rest[:, 1:]
            directions.append(direction)
            rows.append(jnp.concatenate([jnp.zeros_like(along[:1])] * j + [along], axis=0))
        every = jnp.stack(rows)
        return jnp.stack(directions, axis=1), every[:, :count], every[:, count:], rest

    whole = jnp.concatenate([columns, others], axis=1)
    index = jnp.arange(whole.shape[1])[:, None]

    def body(carry: jax.Array, j: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        left, direction, along = eliminate(carry, jnp.take(carry, j, axis=1), jnp.take(lowest, j, axis=0))
        return left, (direction, jnp.where(index >= j, along, 0))

    rest, (directions_, every) = jax.lax.scan(body, whole, jnp.arange(count))
    return jnp.moveaxis(directions_, 0, 1), every[:, :count], every[:, count:], rest[:, count:]


def triangular(rows: jax.Array) -> jax.Array:
    """The upper triangular root (S, S, B) of the same matrix as rows (N, S, B)."""
    return orthogonalize(rows, rows[:, :0])[1]


def _back_substitute(upper: jax.Array, right: jax.Array) -> jax.Array:
    """upper⁻¹ right: (..., S, S, B), (..., S, K, B); rows of a zero pivot are 0."""
    count = upper.shape[-2]
    diagonal = jnp.diagonal(upper, axis1=-3, axis2=-2)
    used = diagonal > 0
    inverse = jnp.where(used, 1 / jnp.where(used, diagonal, 1), 0)
    solution: list[jax.Array] = []
    for i in reversed(range(count)):
        value = right[..., i, :, :]
        for done, j in enumerate(range(count - 1, i, -1)):
            value = value - upper[..., i, j, None, :] * solution[done]
        solution.append(value * inverse[..., None, :, i])
    return jnp.stack(solution[::-1], axis=-3)


def generalized_inverse(root: jax.Array) -> jax.Array:
    """Of an upper triangular root (S, S), zero rows left out: w = Uᵀ a gives a = (U⁻)ᵀ w."""
    eye = jnp.eye(len(root), dtype=root.dtype)
    return _back_substitute(root[:, :, None], eye[:, :, None])[:, :, 0]


def _update(
    root: jax.Array, mean: jax.Array, matrix: jax.Array, values: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Bayes' rule for one step: the posterior's root and mean, the log-density of the values, less a constant, and of
    it the half log-determinant.

    root (S, S, ·), mean (S, B), matrix (P, S, ·), values (P, B). Of [I; matrix Uᵀ] = Q R the first rows of Q are
    R⁻¹: the posterior's root is R⁻ᵀU. The quadratic form is that of ridge regression, a sum of squares.
    """
    small, step, factor = _gain(root, matrix)
    error = values - times(matrix, mean)
    correction = times(step, error)
    after = mean + times(transposed(root), correction)
    left = error - times(matrix, times(transposed(root), correction))
    quadratic = jnp.sum(jnp.square(correction), axis=0) + jnp.sum(jnp.square(left), axis=0)
    return small, after, -0.5 * quadratic - factor, factor


def _gain(root: jax.Array, matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of the update: the posterior's root (S, S, ·), the correction's gain (S, P, ·), half the log-determinant (·)."""
    states, seen = root.shape[0], _matmul(matrix, transposed(root))
    lanes = seen.shape[-1]
    eye = jnp.broadcast_to(jnp.eye(states, dtype=root.dtype)[:, :, None], (states, states, lanes))
    # The gain comes from the values as columns of their own: from Q it would carry the rounding of the start's size.
    values = jnp.broadcast_to(jnp.eye(len(seen), dtype=root.dtype)[:, :, None], (len(seen), len(seen), lanes))
    others = jnp.concatenate([jnp.zeros_like(eye, shape=(states, len(seen), lanes)), values])
    directions, upper, along, _ = orthogonalize(jnp.concatenate([eye, seen]), others)
    inverse = directions[:states]
    small = _matmul(transposed(inverse), root)
    step = _matmul(inverse, along)
    return small, step, jnp.sum(jnp.log(jnp.diagonal(upper)), axis=-1)


def _next_rows(transition: Transition, root: jax.Array, start: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Rows (S, S, ·) that z_t and that the noise bring to the root of z_(t+1)."""
    carried = _matmul(root, transition.matrix.T[:, :, None])
    fresh = jnp.broadcast_to(transition.root[:, :, None], carried.shape)
    if start is None:
        return carried, fresh
    return jnp.where(start, 0, carried), jnp.where(start, transition.start_root[:, :, None], fresh)


def _predict_mean(transition: Transition, mean: jax.Array, shift: jax.Array, start: jax.Array | None) -> jax.Array:
    carried = times(transition.matrix[:, :, None], mean) + shift
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
        following = triangular(jnp.concatenate(_next_rows(transition, small, begins)))
        return (following, _predict_mean(transition, after, shift, begins)), (after, small, mean, log_prob, factor)

    ahead = (_ahead(transition.shift), _ahead(transition.starts))
    last, found = jax.lax.scan(step, start, (evidence.matrix, evidence.values, *ahead))
    means, roots, predicted, log_prob, half_logdet = found
    return Filtered(
        means=means, roots=roots, predicted=predicted, log_prob=log_prob + evidence.constant, half_logdet=half_logdet
    ), last


def _backward(transition: Transition, root: jax.Array, start: jax.Array | None) -> Backward:
    """One step back in time, from the filtered root (S, S, ·)."""
    carried, fresh = _next_rows(transition, root, start)
    states, zeros = len(root), jnp.zeros_like(carried)
    others = jnp.concatenate([jnp.concatenate([root, zeros], axis=1), jnp.concatenate([zeros, fresh], axis=1)])
    _, upper, along, rest = orthogonalize(jnp.concatenate([carried, fresh]), others)
    gains = transposed(_back_substitute(upper, along))
    return Backward(
        gain=gains[..., :states, :, :], part=gains[..., states:, :, :],
        noise=rest[:, :states], rest=rest[:, states:],
    )  # fmt: skip


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


def _pair(back: Backward, covariance: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cov(z_(t-1), w_t) and cov(w_t), from the covariance of z_t: a sum of squares, no difference of large ones."""
    tail = _matmul(covariance, transposed(back.part))
    return _matmul(back.gain, tail) + _cross(back.noise, back.rest), _matmul(back.part, tail) + square(back.rest)


def _join(back: Backward, covariance: jax.Array) -> jax.Array:
    """The covariance of z_t from that of z_(t+1)."""
    joined = _matmul(_matmul(back.gain, covariance), transposed(back.gain)) + square(back.noise)
    return 0.5 * (joined + transposed(joined))


def smooth_steps(
    transition: Transition, filtered: Filtered, last: tuple[jax.Array, jax.Array, jax.Array] | None = None
) -> Smoothed:
    """The Rauch-Tung-Striebel smoother, step by step, back from the last filtered one.

    last: the mean (S, B), covariance (S, S, ·), and predicted mean (S, B) of one more step, to come back from there;
    the results then have that step as well.
    """
    if last is None:
        final = (filtered.means[-1], square(filtered.roots[-1]))
        means, roots = filtered.means[:-1], filtered.roots[:-1]
        predicted = filtered.predicted[1:]
        starts = None if transition.starts is None else transition.starts[1:]
    else:
        final, means, roots = last[:2], filtered.means, filtered.roots
        predicted = jnp.concatenate([filtered.predicted[1:], last[2][None]])
        starts = None

    def step(carry: tuple[jax.Array, jax.Array], at: tuple) -> tuple[tuple[jax.Array, jax.Array], tuple]:
        after, covariance = carry
        mean, root, forecast, begins = at
        back = _backward(transition, root, begins)
        gap = after - forecast
        pair = _pair(back, covariance)
        new = (mean + times(back.gain, gap), _join(back, covariance))
        return new, (*new, times(back.part, gap), *pair)

    _, (before, covariances, moves, cross, spread) = jax.lax.scan(
        step, final, (means, roots, predicted, starts), reverse=True
    )
    return Smoothed(
        means=jnp.concatenate([before, final[0][None]]),
        covariances=jnp.concatenate([covariances, final[1][None]]),
        moves=moves, cross=cross, spread=spread,
    )  # fmt: skip


def draw_path(key: jax.Array, transition: Transition, filtered: Filtered) -> tuple[jax.Array, jax.Array]:
    """One path (T, S, B) from the posterior, and the noise (T - 1, S, B) in it: filter forward, sample backward.

    Frühwirth-Schnatter (1994), Data augmentation and dynamic linear models, J. Time Series Analysis 15.
    """
    steps, states, lanes = filtered.means.shape
    draws = jax.random.normal(key, (steps, 2 * states, lanes), filtered.means.dtype)
    last = filtered.means[-1] + times(transposed(filtered.roots[-1]), draws[-1, :states])
    starts = None if transition.starts is None else transition.starts[1:]

    def step(after: jax.Array, at: tuple) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        mean, root, forecast, begins, draw = at
        back = _backward(transition, root, begins)
        gap = after - forecast
        state = mean + times(back.gain, gap) + times(transposed(back.noise), draw)
        return state, (state, times(back.part, gap) + times(transposed(back.rest), draw))

    _, (states_, moves) = jax.lax.scan(
        step, last, (filtered.means[:-1], filtered.roots[:-1], filtered.predicted[1:], starts, draws[:-1]), reverse=True
    )
    return jnp.concatenate([states_, last[None]]), moves


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
    inside = _matmul(second.seen, transposed(first.root))
    eye = jnp.broadcast_to(jnp.eye(states, dtype=inside.dtype)[:, :, None], inside.shape)
    others = jnp.concatenate([second.seen, jnp.zeros_like(inside)])
    directions, _, _, rest = orthogonalize(jnp.concatenate([inside, eye]), others)
    inverse = directions[states:]
    small = _matmul(transposed(inverse), first.root)
    information = square(second.seen)
    # What the second span says of the first one's end, taken in.
    update = _matmul(square(small), information)
    end = first.offset + times(square(small), second.eta - times(information, first.offset))
    kept = jnp.eye(states, dtype=inside.dtype)[:, :, None] - update
    back = _matmul(second.carry, kept)
    returned = second.eta - times(information, first.offset)
    returned = times(transposed(kept), returned)
    return _Span(
        carry=_matmul(back, first.carry),
        offset=times(second.carry, end) + second.offset,
        root=triangular(jnp.concatenate([_matmul(small, transposed(second.carry)), second.root])),
        eta=times(transposed(first.carry), returned) + first.eta,
        seen=triangular(jnp.concatenate([_matmul(rest, first.carry), first.seen])),
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
        _, step, _ = _gain(root, matrix)
        kept = jnp.eye(states, dtype=root.dtype)[:, :, None] - _matmul(_matmul(transposed(root), step), matrix)
        # The likelihood of the state before: values = matrix (A z + mean) + N(0, I + matrix UᵀU matrixᵀ).
        seen = _matmul(matrix, transposed(root))
        count = len(matrix)
        eye = jnp.broadcast_to(jnp.eye(count, dtype=root.dtype)[:, :, None], (count, count, lanes))
        rows = jnp.concatenate([eye, transposed(seen)])
        directions, _, _, _ = orthogonalize(rows, rows[:, :0])
        white = transposed(directions[:count])
        through = _matmul(_matmul(white, matrix), jnp.broadcast_to(move, (states, states, lanes)))
        error = times(white, values - times(matrix, mean))
        padded = jnp.concatenate([through, jnp.zeros_like(through, shape=(states, states, lanes))])
        return _Span(
            carry=_matmul(kept, jnp.broadcast_to(move, (states, states, lanes))),
            offset=after,
            root=small,
            eta=times(transposed(through), error),
            seen=triangular(padded),
        )

    shift = jnp.broadcast_to(transition.shift, (len(evidence.values), *transition.shift.shape[1:]))
    return jax.vmap(span)(evidence.matrix, evidence.values, shift, starts)


def filter_side_by_side(transition: Transition, evidence: Evidence) -> Filtered:
    """The same as `filter_steps`, all steps at once: a scan of an associative operation, log T deep."""
    ends = jax.lax.associative_scan(jax.vmap(_follow), _spans(transition, evidence))
    starts = transition.starts

    def predict(root: jax.Array, mean: jax.Array, shift: jax.Array, begins: jax.Array | None) -> tuple:
        rows = jnp.concatenate(_next_rows(transition, root, begins))
        return triangular(rows), _predict_mean(transition, mean, shift, begins)

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
    backward = jax.vmap(lambda root, begins: _backward(transition, root, begins))(filtered.roots[:-1], starts)
    offset = filtered.means[:-1] - times(backward.gain, filtered.predicted[1:])
    last = (filtered.means[-1:], square(filtered.roots[-1:]))
    links = (
        jnp.concatenate([backward.gain, jnp.zeros_like(backward.gain[:1], shape=(1, *filtered.roots.shape[1:]))]),
        jnp.concatenate([offset, last[0]]),
        jnp.concatenate([square(backward.noise), last[1]]),
    )

    def join(later: tuple, earlier: tuple) -> tuple:
        gain, mean, covariance = earlier
        far, there, spread = later
        return (
            _matmul(gain, far),
            times(gain, there) + mean,
            _matmul(_matmul(gain, spread), transposed(gain)) + covariance,
        )

    _, means, covariances = jax.lax.associative_scan(join, links, reverse=True)
    cross, spread = _pair(backward, covariances[1:])
    moves = times(backward.part, means[1:] - filtered.predicted[1:])
    return Smoothed(means=means, covariances=covariances, moves=moves, cross=cross, spread=spread)


# The steady state.


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


def sum_steps(x: jax.Array) -> jax.Array:
    """Sum over the first axis, in two stages: rounding grows with the root of its length."""
    steps = len(x)
    size = max(1, int(steps**0.5))
    whole = steps // size * size
    parts = jnp.sum(x[:whole].reshape(-1, size, *x.shape[1:]), axis=1)
    return jnp.sum(parts, axis=0) + jnp.sum(x[whole:], axis=0)


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
            filtered = filter_side_by_side(transition, evidence)
            return _gathered(filtered, smooth_side_by_side(transition, filtered))
        filtered = filter_steps(transition, evidence)[0]
        return _gathered(filtered, smooth_steps(transition, filtered))

    head = _head(steps)
    if parallel or head is None:
        return plainly()
    start = _start(transition, evidence, head)
    back = _backward(transition, start.small, None)

    def join(covariance: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        return (following := _join(back, covariance)), following

    end = square(start.small)
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
        early = smooth_steps(transition, start.filtered, last)
        count = steps - head
        middle = jnp.sum(ends, axis=0) + (count - head - 2) * ends[-1]
        paired = (end + middle)[..., 0]
        mixed = numerics.product(back.noise[..., 0], back.rest[..., 0], "ki,kj->ij")
        spread = numerics.product(back.rest[..., 0], back.rest[..., 0], "ki,kj->ij")
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
            + (count - 1) * mixed,
            spread=jnp.sum(early.spread, axis=0)[..., 0]
            + numerics.product(part, across, "ij,jk->ik")
            + (count - 1) * spread,
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
            return filter_side_by_side(transition, evidence).log_prob.T
        return filter_steps(transition, evidence)[0].log_prob.T

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
    before = sum_steps(smoothed.covariances[:-1, :, :, 0])
    return SharedMoments(
        means=_lanes_first(smoothed.means),
        moves=_lanes_first(smoothed.moves),
        half_logdet=sum_steps(filtered.half_logdet[:, 0]),
        first=smoothed.covariances[0, :, :, 0],
        every=before + smoothed.covariances[-1, :, :, 0],
        before=before,
        cross=sum_steps(smoothed.cross[..., 0]),
        spread=sum_steps(smoothed.spread[..., 0]),
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
    filtered, (root, _) = filter_steps(early, few)
    small, step, half_logdet = _gain(root, evidence.matrix[0])
    settled = _at_rest(square(filtered.roots[head - head // 4 - 1]), square(filtered.roots[-1]))
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


# What is observed.


@record
class Seen:
    """Evidence of steps that may lack entries, and what these entries are worth given the state and the others.

    Expected noise at a state z is filled - loadings z: filled (B, T, D), loadings (B, T, D, S), rows of the data and of
    the emission where an entry is seen; extra (B, T, D, D), or (B, T, D): the noise that is left besides.
    """

    evidence: Evidence
    filled: jax.Array
    loadings: jax.Array
    extra: jax.Array


@record
class Whitened:
    """Observations that are all there, in coordinates in which their noise is white: emission (D, S), values (B, T, D),
    and the normaliser, the constant of the log-density of a step. Of these the state can explain `directions` (D, P)
    alone, P = min(D, S): it sees `matrix` (P, S), so that no step meets anything of the observations' size."""

    emission: jax.Array
    values: jax.Array
    normaliser: jax.Array
    directions: jax.Array | None
    matrix: jax.Array

    @property
    def compressed(self) -> jax.Array:
        """What the state sees: (B, T, P)."""
        return self.values if self.directions is None else apply(self.directions.T, self.values)

    def constant(self) -> jax.Array:
        """The log-density of what it does not see: (B, T)."""
        total = jnp.broadcast_to(self.normaliser, self.values.shape[:2])
        if self.directions is None:
            return total
        rest = self.values - apply(self.directions, self.compressed)
        return total - 0.5 * jnp.sum(jnp.square(rest), axis=-1)


def whiten(emission: jax.Array, covariance: jax.Array, residuals: jax.Array) -> Whitened:
    """Of residuals (B, T, D) = emission z_t + N(0, covariance): emission (D, S), covariance (D, D) or (D,)."""
    columns, states = emission.shape
    if covariance.ndim == 1:
        scale = jax.lax.rsqrt(covariance)
        half_logdet = -jnp.sum(jnp.log(scale))
        white, values = scale[:, None] * emission, scale * residuals
    else:
        factor = numerics.cholesky(covariance)
        inverse, half_logdet = numerics.inverse_lower(factor), jnp.sum(jnp.log(jnp.diagonal(factor)))
        white, values = numerics.product(inverse, emission, "ij,js->is"), apply(inverse, residuals)
    normaliser = -half_logdet - 0.5 * columns * jnp.log(jnp.asarray(2 * jnp.pi, white.dtype))
    directions, matrix = None, white
    if columns > states:
        first, upper, _, _ = orthogonalize(white[:, :, None], white[:, :0, None])
        # Twice: directions are then orthogonal to the last bit.
        again, more, _, _ = orthogonalize(first, first[:, :0])
        directions, matrix = again[..., 0], numerics.product(more[..., 0], upper[..., 0], "ij,jk->ik")
    return Whitened(emission=white, values=values, normaliser=normaliser, directions=directions, matrix=matrix)


def compress_seen(emission: jax.Array, covariance: jax.Array, residuals: jax.Array, seen: jax.Array) -> Seen:
    """The same for observations of which only the entries `seen` (B, T, D) are there; residuals are 0 elsewhere."""
    columns, states = emission.shape
    dtype = residuals.dtype

    def step(at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        residual, known = at[0].T, at[1].T
        there = known.astype(dtype)
        if covariance.ndim == 1:
            scale = there * jax.lax.rsqrt(covariance)[:, None]
            white, values = scale[:, None] * emission[:, :, None], scale * residual
            half_logdet = 0.5 * jnp.sum(there * jnp.log(covariance)[:, None], axis=0)
            filled, loadings = residual, there[:, None] * emission[:, :, None]
            extra = (1 - there) * covariance[:, None]
        else:
            white, values, across, half_logdet = _eliminate(emission, covariance, residual, there)
            filled = jnp.where(known, residual, times(transposed(across), values))
            loadings = jnp.where(known[:, None], emission[:, :, None], _cross(across, white))
            left = covariance[:, :, None] - square(across)
            extra = (1 - there)[:, None] * (1 - there) * left
        constant = -half_logdet - 0.5 * jnp.sum(there, axis=0) * jnp.log(jnp.asarray(2 * jnp.pi, dtype))
        if columns > states:
            _, white, along, rest = orthogonalize(white, values[:, None])
            values, constant = along[:, 0], constant - 0.5 * jnp.sum(jnp.square(rest[:, 0]), axis=0)
        return white, values, constant, filled, loadings, extra

    # One step at a time: its lanes stay in fast memory.
    found = jax.lax.map(step, (jnp.swapaxes(residuals, 0, 1), jnp.swapaxes(seen, 0, 1)))
    white, values, constant, *rest = found
    filled, loadings, extra = (jnp.moveaxis(leaf, -1, 0) for leaf in rest)
    return Seen(
        evidence=Evidence(matrix=white, values=values, constant=constant),
        filled=filled, loadings=loadings, extra=extra,
    )  # fmt: skip


def _eliminate(
    emission: jax.Array, covariance: jax.Array, residual: jax.Array, there: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Of the seen entries' covariance L Lᵀ: L⁻¹ times their emission (D, S, B), residual (D, B) and covariance with all
    (D, D, B), and log det L (B,); rows that are not seen are 0."""
    columns, states = emission.shape
    eye = jnp.eye(columns, dtype=there.dtype)[:, :, None]
    whole = jnp.concatenate(
        [
            there[:, None] * there * covariance[:, :, None] + (1 - there)[:, None] * eye,
            there[:, None] * emission[:, :, None],
            residual[:, None],
            there[:, None] * covariance[:, :, None],
        ],
        axis=1,
    )

    def eliminate(rest: jax.Array, at: jax.Array, column: jax.Array, pivot: jax.Array) -> tuple[jax.Array, jax.Array]:
        inverse = jax.lax.rsqrt(pivot)
        row = at * inverse
        # A barrier: fused with the columns that follow, every one would be computed again for each of these.
        return jax.lax.optimization_barrier((rest - (column * inverse)[:, None] * row, row))

    if columns <= _UNROLLED_COLUMNS:
        rows, pivots = [], []
        for j in range(columns):
            pivots.append(whole[0, 0])
            whole, row = eliminate(whole[1:], whole[0], whole[1:, 0], whole[0, 0])
            whole = whole[:, 1:]
            rows.append(row[columns - j :])
        every, log_pivots = jnp.stack(rows), jnp.log(jnp.stack(pivots))
    else:
        index = jnp.arange(columns)[:, None]

        def body(rest: jax.Array, j: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            at, column = jnp.take(rest, j, axis=0), jnp.take(rest, j, axis=1)
            pivot = jnp.take(at, j, axis=0)
            rest, row = eliminate(rest, at, jnp.where(index > j, column, 0), pivot)
            return rest, (row, pivot)

        _, (every, diagonal) = jax.lax.scan(body, whole, jnp.arange(columns))
        every, log_pivots = every[:, columns:], jnp.log(diagonal)
    half_logdet = 0.5 * jnp.sum(log_pivots, axis=0)
    return every[:, :states], every[:, states], every[:, states + 1 :], half_logdet
