"""The Rauch-Tung-Striebel smoother, and draws of paths."""

import jax
import jax.numpy as jnp

from ...record import record
from .. import lanewise
from . import parallel as side_by_side
from .elements import (
    Filtered,
    Link,
    Smoothed,
    Transition,
    backward,
    link,
    smoothed_covariance,
    with_process_noise,
)


def smoothed(transition: Transition, filtered: Filtered, parallel: bool) -> Smoothed:
    """The moments of every state given all steps; parallel: by an associative scan over the steps."""
    return (side_by_side.smooth_steps if parallel else smooth_steps)(transition, filtered)


def smooth_steps(
    transition: Transition, filtered: Filtered, last: tuple[jax.Array, jax.Array, jax.Array] | None = None
) -> Smoothed:
    """The same, step by step, back from the last filtered one.

    last: the smoothed mean (S, B), covariance (S, S, ·), and predicted mean (S, B) of one more step, to start from; the
    results then include that step.
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
    # Links need no recursion.
    links: Link = lanewise.over_steps(lambda at: (link(transition, *at), None), (roots, starts))[0]

    def step(carry: tuple[jax.Array, jax.Array], at: tuple) -> tuple[tuple[jax.Array, jax.Array], tuple]:
        after, covariance = carry
        mean, forecast, link = at
        new = (mean + lanewise.times(link.gain, after - forecast), smoothed_covariance(link, covariance))
        return new, new

    _, (means, covariances) = jax.lax.scan(step, final, (means, predicted, links), reverse=True)
    means, covariances = (jnp.concatenate([x, end[None]]) for x, end in zip((means, covariances), final, strict=True))
    return with_process_noise(means, covariances, predicted, links)


@record
class BackwardChain:
    """The posterior of all states as a Markov chain that runs back in time, from the last state filtered.

    means        E(z_t | y_1..t)     (T, S, B)
    predicted    E(z_t | y_1..t-1)   (T, S, B)
    last_root                        (S, S, ·), of the last filtered covariance
    gain         of the links        (T - 1, S, S, ·)
    noise_gain   of the links        (T - 1, S, S, ·)
    root                             (T - 1, 2S, S, ·), of the links' covariance
    noise_root                       (T - 1, 2S, S, ·), of their noise_covariance, against the same directions
    """

    means: jax.Array
    predicted: jax.Array
    last_root: jax.Array
    gain: jax.Array
    noise_gain: jax.Array
    root: jax.Array
    noise_root: jax.Array


def backward_chain(transition: Transition, filtered: Filtered) -> BackwardChain:
    """What paths are drawn with: the same for every one of them."""
    starts = None if transition.starts is None else transition.starts[1:]
    found, _ = lanewise.over_steps(lambda at: (backward(transition, *at), None), (filtered.roots[:-1], starts))
    gain, noise_gain, root, noise_root = found
    return BackwardChain(
        means=filtered.means,
        predicted=filtered.predicted,
        last_root=filtered.roots[-1],
        gain=gain,
        noise_gain=noise_gain,
        root=root,
        noise_root=noise_root,
    )


def draw_path(key: jax.Array, chain: BackwardChain) -> tuple[jax.Array, jax.Array]:
    """One path (T, S, B) from the posterior, and the process noise (T - 1, S, B) in it: filter forward, sample back.

    Frühwirth-Schnatter (1994), Data augmentation and dynamic linear models, J. Time Series Analysis 15.
    """
    steps, states, lanes = chain.means.shape
    draws = jax.random.normal(key, (steps, 2 * states, lanes), chain.means.dtype)
    last = chain.means[-1] + lanewise.times(lanewise.transposed(chain.last_root), draws[-1, :states])
    noise, rest = (lanewise.times(lanewise.transposed(root), draws[:-1]) for root in (chain.root, chain.noise_root))
    predicted = chain.predicted[1:]

    def step(after: jax.Array, at: tuple) -> tuple[jax.Array, jax.Array]:
        mean, forecast, gain, noise = at
        state = mean + lanewise.times(gain, after - forecast) + noise
        return state, state

    _, path = jax.lax.scan(step, last, (chain.means[:-1], predicted, chain.gain, noise), reverse=True)
    path = jnp.concatenate([path, last[None]])
    return path, lanewise.times(chain.noise_gain, path[1:] - predicted) + rest
