"""Filter and smoother with all steps side by side: scans of associative operations, log T deep, for accelerators.

Särkkä & García-Fernández (2021), Temporal parallelization of Bayesian smoothers, IEEE Transactions on Automatic Control
66; here in square-root form.
"""

import jax
import jax.numpy as jnp

from ...record import record
from .. import lanewise
from .elements import (
    Evidence,
    Filtered,
    Smoothed,
    Transition,
    link,
    predicted_mean,
    predicted_rows,
    update,
    update_root,
    with_process_noise,
)


@record
class _Span:
    """Some steps as one. Given the state z before them and their observations, the last state is A z + b + N(0, UᵀU);
    the likelihood of z is proportional to exp(zᵀη - |H z|² / 2).

    carry         A   (S, S, ·)
    offset        b   (S, B)
    root          U   (S, S, ·)
    information   η   (S, B)
    seen          H   (S, S, ·)
    """

    carry: jax.Array
    offset: jax.Array
    root: jax.Array
    information: jax.Array
    seen: jax.Array


def _follow(first: _Span, second: _Span) -> _Span:
    """Two spans, one after the other, as one."""
    states = len(first.carry)
    inside = lanewise.matmul(second.seen, lanewise.transposed(first.root))
    eye = jnp.broadcast_to(jnp.eye(states, dtype=inside.dtype)[:, :, None], inside.shape)
    others = jnp.concatenate([second.seen, jnp.zeros_like(inside)])
    directions, _, _, rest = lanewise.orthogonalize(jnp.concatenate([inside, eye]), others)
    inverse = directions[states:]
    posterior = lanewise.matmul(lanewise.transposed(inverse), first.root)
    precision = lanewise.square(second.seen)
    # Bayes' rule for the first span's last state, by the likelihood of the second span.
    update = lanewise.matmul(lanewise.square(posterior), precision)
    news = second.information - lanewise.times(precision, first.offset)
    end = first.offset + lanewise.times(lanewise.square(posterior), news)
    kept = jnp.eye(states, dtype=inside.dtype)[:, :, None] - update
    back = lanewise.matmul(second.carry, kept)
    returned = lanewise.times(lanewise.transposed(kept), news)
    return _Span(
        carry=lanewise.matmul(back, first.carry),
        offset=lanewise.times(second.carry, end) + second.offset,
        root=lanewise.triangular(
            jnp.concatenate([lanewise.matmul(posterior, lanewise.transposed(second.carry)), second.root])
        ),
        information=lanewise.times(lanewise.transposed(first.carry), returned) + first.information,
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
        carry = jnp.broadcast_to(jnp.where(start, 0, transition.matrix[:, :, None]), (states, states, lanes))
        mean = jnp.where(start, transition.start_mean[:, None], shift)
        mean = jnp.broadcast_to(mean, (states, values.shape[-1]))
        posterior, after, _, _ = update(root, mean, matrix, values)
        _, gain, _ = update_root(root, matrix)
        kept = jnp.eye(states, dtype=root.dtype)[:, :, None] - lanewise.matmul(
            lanewise.matmul(lanewise.transposed(root), gain), matrix
        )
        # The likelihood of the state before: values = matrix (A z + mean) + N(0, I + matrix UᵀU matrixᵀ).
        seen = lanewise.matmul(matrix, lanewise.transposed(root))
        count = len(matrix)
        eye = jnp.broadcast_to(jnp.eye(count, dtype=root.dtype)[:, :, None], (count, count, lanes))
        rows = jnp.concatenate([eye, lanewise.transposed(seen)])
        directions, _, _, _ = lanewise.orthogonalize(rows, rows[:, :0])
        white = lanewise.transposed(directions[:count])
        through = lanewise.matmul(lanewise.matmul(white, matrix), carry)
        error = lanewise.times(white, values - lanewise.times(matrix, mean))
        padded = jnp.concatenate([through, jnp.zeros_like(through, shape=(states, states, lanes))])
        return _Span(
            carry=lanewise.matmul(kept, carry),
            offset=after,
            root=posterior,
            information=lanewise.times(lanewise.transposed(through), error),
            seen=lanewise.triangular(padded),
        )

    shift = jnp.broadcast_to(transition.shift, (len(evidence.values), *transition.shift.shape[1:]))
    return jax.vmap(span)(evidence.matrix, evidence.values, shift, starts)


def filter_steps(transition: Transition, evidence: Evidence) -> Filtered:
    """The Kalman filter."""
    ends = jax.lax.associative_scan(jax.vmap(_follow), _spans(transition, evidence))
    starts = transition.starts

    def predict(root: jax.Array, mean: jax.Array, shift: jax.Array, begins: jax.Array | None) -> tuple:
        rows = jnp.concatenate(predicted_rows(transition, root, begins))
        return lanewise.triangular(rows), predicted_mean(transition, mean, shift, begins)

    roots, means = jax.vmap(predict)(
        ends.root[:-1], ends.offset[:-1], transition.shift[1:], None if starts is None else starts[1:]
    )
    lanes = evidence.values.shape[-1]
    first = jnp.broadcast_to(transition.start_root[:, :, None], ends.root.shape[1:])
    roots = jnp.concatenate([first[None], roots])
    means = jnp.concatenate([jnp.broadcast_to(transition.start_mean[:, None], (len(first), lanes))[None], means])
    # One more update of every prediction: its rounding is that of one step, and it gives the log-densities.
    posterior, after, log_prob, half_logdet = jax.vmap(update)(roots, means, evidence.matrix, evidence.values)
    return Filtered(
        means=after,
        roots=posterior,
        predicted=means,
        log_prob=log_prob + evidence.constant,
        half_logdet=half_logdet,
    )


def smooth_steps(transition: Transition, filtered: Filtered) -> Smoothed:
    """The Rauch-Tung-Striebel smoother."""
    starts = None if transition.starts is None else transition.starts[1:]
    links = jax.vmap(lambda root, begins: link(transition, root, begins))(filtered.roots[:-1], starts)
    predicted = filtered.predicted[1:]
    offset = filtered.means[:-1] - lanewise.times(links.gain, predicted)
    maps = (
        jnp.concatenate([links.gain, jnp.zeros_like(links.gain[:1], shape=(1, *filtered.roots.shape[1:]))]),
        jnp.concatenate([offset, filtered.means[-1:]]),
        jnp.concatenate([links.covariance, lanewise.square(filtered.roots[-1:])]),
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
    return with_process_noise(means, covariances, predicted, links)


def steady_root(transition: Transition, matrix: jax.Array) -> jax.Array:
    """The root (S, S, 1) of the filtered covariance in the long run, for one matrix (P, S, 1) at all steps.

    By doubling: after k turns a span stands for 2^k steps. Anderson & Moore (1979), Optimal Filtering, section 6.7.
    """
    states = len(transition.matrix)
    constant = Evidence(
        matrix=matrix[None],
        values=jnp.zeros_like(matrix, shape=(1, len(matrix), 1)),
        constant=jnp.zeros_like(matrix, shape=(1, 1)),
    )
    never = Transition(
        matrix=transition.matrix,
        root=transition.root,
        start_mean=transition.start_mean,
        start_root=transition.start_root,
        shift=jnp.zeros_like(matrix, shape=(1, states, 1)),
        starts=jnp.zeros((1, 1), bool),
    )
    span = jax.tree.map(lambda leaf: leaf[0], _spans(never, constant))
    return jax.lax.fori_loop(0, 30, lambda _, span: _follow(span, span), span).root
