"""One step of a linear-Gaussian chain: its moments, its update by Bayes' rule, and its link with the next step.

Square-root forms throughout: a covariance is carried as a root U with UᵀU = P, and roots are combined by
orthogonalisation (modified Gram-Schmidt, in which a zero pivot stays zero), so that no covariance is ever a
difference. Kailath, Sayed & Hassibi (2000), Linear Estimation, chapter 12; Yaghoobi, Corenflos, Hassan & Särkkä (2022),
Parallel square-root statistical linear regression for inference in nonlinear state space models, arXiv:2207.00426.

Letters: T steps, S states, D columns, P pseudo-observations a step; time first and lanes (sequences) last, so that
arrays are (T, S, B). What sequences share has one lane, which broadcasts: covariances do not depend on the
values observed. A dot stands for B lanes or one.
"""

import jax
import jax.numpy as jnp

from ...record import record
from .. import lanewise


@record
class Transition:
    """z_1 ~ N(m, U0ᵀU0), z_t = A z_(t-1) + b_t + w_t with process noise w_t ~ N(0, UᵀU).

    matrix       A    (S, S)
    root         U    (S, S)
    start_mean   m    (S,)
    start_root   U0   (S, S)
    shift        b    (T, S, ·), its first not used
    starts            (T, B), steps at which a sequence begins, the first among them; None where only that one is
    """

    matrix: jax.Array
    root: jax.Array
    start_mean: jax.Array
    start_root: jax.Array
    shift: jax.Array
    starts: jax.Array | None = None


@record
class Evidence:
    """What is observed, whitened and compressed to what the state can explain: y_t = H_t z_t + N(0, I).

    matrix     H   (T, P, S, ·), zero rows where nothing is seen
    values     y   (T, P, B)
    constant       (T, B), the log-density of what the state has no part in, normalisers included
    """

    matrix: jax.Array
    values: jax.Array
    constant: jax.Array


@record
class Filtered:
    """The distribution of z_t given the steps up to t.

    means        E(z_t | y_1..t)                   (T, S, B)
    roots        of cov(z_t | y_1..t)              (T, S, S, ·)
    predicted    E(z_t | y_1..t-1)                 (T, S, B)
    log_prob     log p(y_t | y_1..t-1)             (T, B)
    half_logdet  log det cov(y_t | y_1..t-1) / 2   (T, ·)
    """

    means: jax.Array
    roots: jax.Array
    predicted: jax.Array
    log_prob: jax.Array
    half_logdet: jax.Array


@record
class Link:
    """z_t, t = 1 .. T - 1, given z_(t+1) and the steps up to t; and the process noise w in z_(t+1), given the same.

    gain               G   (S, S, ·), E z_t = G z_(t+1) + offset
    covariance             (S, S, ·), cov(z_t)
    noise_gain             (S, S, ·), E w = noise_gain (z_(t+1) - its prediction)
    cross_covariance       (S, S, ·), cov(z_t, w)
    noise_covariance       (S, S, ·), cov(w)

    Where a sequence ends gain is 0 and noise_gain I: z_t and z_(t+1) are independent.
    """

    gain: jax.Array
    covariance: jax.Array
    noise_gain: jax.Array
    cross_covariance: jax.Array
    noise_covariance: jax.Array


@record
class Smoothed:
    """The distribution, given all steps, of z_t, and of the process noise w_t in it, t = 2 .. T.

    means               E z_t               (T, S, B)
    covariances         cov(z_t)            (T, S, S, ·)
    process_noise       E w_t               (T - 1, S, B)
    cross_covariances   cov(z_(t-1), w_t)   (T - 1, S, S, ·)
    noise_covariances   cov(w_t)            (T - 1, S, S, ·)

    Where a sequence starts the last three mean nothing.
    """

    means: jax.Array
    covariances: jax.Array
    process_noise: jax.Array
    cross_covariances: jax.Array
    noise_covariances: jax.Array


def update(
    root: jax.Array, mean: jax.Array, matrix: jax.Array, values: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Bayes' rule for one step: the posterior's root and mean, the log-density of the values without its constant, and
    log det of their covariance / 2.

    root (S, S, ·), mean (S, B), matrix (P, S, ·), values (P, B). Of [I; matrix Uᵀ] = Q R the first rows of Q are
    R⁻¹: the posterior's root is R⁻ᵀU. The quadratic form is that of ridge regression, a sum of squares.
    """
    posterior, gain, half_logdet = update_root(root, matrix)
    error = values - lanewise.times(matrix, mean)
    correction = lanewise.times(gain, error)
    after = mean + lanewise.times(lanewise.transposed(root), correction)
    left = error - lanewise.times(matrix, lanewise.times(lanewise.transposed(root), correction))
    quadratic = jnp.sum(jnp.square(correction), axis=0) + jnp.sum(jnp.square(left), axis=0)
    return posterior, after, -0.5 * quadratic - half_logdet, half_logdet


def update_root(root: jax.Array, matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`update` without values: the posterior's root (S, S, ·), G (S, P, ·) of gain rootᵀ G, and log det / 2 (·)."""
    states, seen = root.shape[0], lanewise.matmul(matrix, lanewise.transposed(root))
    lanes = seen.shape[-1]
    eye = jnp.broadcast_to(jnp.eye(states, dtype=root.dtype)[:, :, None], (states, states, lanes))
    # The gain comes from unit values as further columns: from Q it would carry the rounding of a wide initial root.
    values = jnp.broadcast_to(jnp.eye(len(seen), dtype=root.dtype)[:, :, None], (len(seen), len(seen), lanes))
    others = jnp.concatenate([jnp.zeros_like(eye, shape=(states, len(seen), lanes)), values])
    directions, upper, along, _ = lanewise.orthogonalize(jnp.concatenate([eye, seen]), others)
    inverse = directions[:states]
    posterior = lanewise.matmul(lanewise.transposed(inverse), root)
    gain = lanewise.matmul(inverse, along)
    return posterior, gain, jnp.sum(jnp.log(jnp.diagonal(upper)), axis=-1)


def predicted_rows(transition: Transition, root: jax.Array, start: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Rows (S, S, ·) of z_t, and of the process noise, in a root of the predicted covariance of z_(t+1)."""
    carried = lanewise.matmul(root, transition.matrix.T[:, :, None])
    fresh = jnp.broadcast_to(transition.root[:, :, None], carried.shape)
    if start is None:
        return carried, fresh
    return jnp.where(start, 0, carried), jnp.where(start, transition.start_root[:, :, None], fresh)


def predicted_mean(transition: Transition, mean: jax.Array, shift: jax.Array, start: jax.Array | None) -> jax.Array:
    """The mean (S, B) of z_(t+1) from that of z_t."""
    carried = lanewise.times(transition.matrix[:, :, None], mean) + shift
    return carried if start is None else jnp.where(start, transition.start_mean[:, None], carried)


def backward(
    transition: Transition, root: jax.Array, start: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """One step back in time, from the filtered root (S, S, ·): gain and noise_gain of the link, and roots (2S, S, ·) of
    its covariance and noise_covariance against the same directions."""
    carried, fresh = predicted_rows(transition, root, start)
    states, zeros = len(root), jnp.zeros_like(carried)
    others = jnp.concatenate([jnp.concatenate([root, zeros], axis=1), jnp.concatenate([zeros, fresh], axis=1)])
    _, upper, along, rest = lanewise.orthogonalize(jnp.concatenate([carried, fresh]), others)
    gains = lanewise.transposed(lanewise.back_substitute(upper, along))
    return gains[:states], gains[states:], rest[:, :states], rest[:, states:]


def link(transition: Transition, root: jax.Array, start: jax.Array | None) -> Link:
    """The link of one step with the next, from the filtered root (S, S, ·)."""
    gain, noise_gain, state_root, noise_root = backward(transition, root, start)
    return Link(
        gain=gain,
        covariance=lanewise.square(state_root),
        noise_gain=noise_gain,
        cross_covariance=lanewise.cross(state_root, noise_root),
        noise_covariance=lanewise.square(noise_root),
    )


def smoothed_covariance(link: Link, following: jax.Array) -> jax.Array:
    """cov(z_t) from cov(z_(t+1)), given all steps."""
    joined = lanewise.matmul(lanewise.matmul(link.gain, following), lanewise.transposed(link.gain)) + link.covariance
    return 0.5 * (joined + lanewise.transposed(joined))


def with_process_noise(means: jax.Array, covariances: jax.Array, predicted: jax.Array, links: Link) -> Smoothed:
    """Smoothed states, and the process noise between them; predicted (T - 1, S, B) from the second step on."""

    def moments(at: tuple[Link, jax.Array]) -> tuple[tuple[jax.Array, jax.Array], None]:
        # Sums of squares, no difference of large ones.
        link, following = at
        tail = lanewise.matmul(following, lanewise.transposed(link.noise_gain))
        cross = lanewise.matmul(link.gain, tail) + link.cross_covariance
        return (cross, lanewise.matmul(link.noise_gain, tail) + link.noise_covariance), None

    (cross, noise), _ = lanewise.over_steps(moments, (links, covariances[1:]))
    return Smoothed(
        means=means,
        covariances=covariances,
        process_noise=lanewise.times(links.noise_gain, means[1:] - predicted),
        cross_covariances=cross,
        noise_covariances=noise,
    )
