"""The posterior of a linear-Gaussian system: moments of its states, and of the noise in each of its three equations.

Noise is carried beside the states, since it is found as sums of squares where a difference of their moments would
lose most of its digits. What covariances contribute is summed over the steps of every sequence, and so serves any
weights.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ... import numerics, tree
from ...record import record
from ...sequences import Sequences
from .. import lanewise
from ..expect import Exact, Sample
from .affine import apply
from .shared import shared_moments
from .smoothing import BackwardChain, backward_chain, draw_path, smoothed
from .system import System, filtered_per_sequence, seen_entries, shared_or_per_sequence, whitened
from .whitening import Completed


@record
class Noise:
    """The noise e of one equation, response = coefficients · features + e, at the T' steps that the equation is about.

    means             E e              (T', O, B), or of what is white where there is a root: e = rootᵀ white
    root                               (O, O), None where noise is as it is
    counted                            (T', B), whether a step counts; None where all do
    covariance        of e             (O, O, ·), or (O, ·) of its columns alone; a dot is B or 1
    state_covariance  of the states among the features (S, S, ·), None where there are none
    cross_covariance  cov(state, e)    (S, O, ·), likewise

    Covariances are sums over the steps that count.
    """

    means: jax.Array
    root: jax.Array | None
    counted: jax.Array | None
    covariance: jax.Array
    state_covariance: jax.Array | None
    cross_covariance: jax.Array | None


@record
class Posterior:
    """All that statistics need of p(states, missing entries | x).

    states     E z_t   (T, S, B)
    initial    noise z_1 - m            of first states, T' = 1; where sequences are packed, at all steps
    dynamics   process noise w_t        T' = T - 1, from the second step on
    emission   observation noise v_t    T' = T
    evidence   log p(x)                 (B,), or (num_sequences,) where they are packed
    at_rest    ()                       log p(x) of a sequence whose white noise is 0, less half the sum of its squares
                                        for any other; None where noise is not white
    params     whose noise this is
    """

    states: jax.Array
    initial: Noise
    dynamics: Noise
    emission: Noise
    evidence: jax.Array
    at_rest: jax.Array | None
    params: Any = None

    def average(self, function: Callable) -> Any:
        """The expectation of statistics, a function of moments."""
        return function(self)


def infer(params: Any, system: System, x: Sequences, expect: Any, parallel: bool) -> Any:
    """The posterior under `expect`: moments under Exact(), paths under Sample(n); TypeError for any other.

    params: what the system was made of, which the posterior carries.
    """
    if isinstance(expect, Sample):
        return _drawn(params, system, x, expect, parallel)
    if not isinstance(expect, Exact) or expect.temperature is not None:
        raise TypeError(f"expect must be Exact() or Sample(n) for linear-Gaussian states; got {expect!r}")

    def shared(system: System, x: Sequences) -> Posterior:
        return _shared(system, x, parallel)

    def per_sequence(system: System, x: Sequences) -> Posterior:
        return _per_sequence(system, x, parallel)

    if x.complete is None:  # either may be found as the program runs: in one form
        found = shared_or_per_sequence(lambda *at: _as_per_sequence(shared(*at)), per_sequence, system, x)
    else:
        found = shared_or_per_sequence(shared, per_sequence, system, x)
    return dataclasses.replace(found, params=params)


def _shared(system: System, x: Sequences, parallel: bool) -> Posterior:
    """Of sequences that share their covariances.

    In coordinates in which noise is white, log p(x) is the sum of its squares at the smoothed means, and
    log-determinants.
    """
    transition, white = whitened(system, x)
    found = shared_moments(transition, white.matrix, white.compressed, parallel=parallel)
    whiten_start, whiten_process = (
        lanewise.generalized_inverse(root).T for root in (transition.start_root, transition.root)
    )
    loaded = numerics.product(system.emission, found.all_states, "ds,sr->dr")
    noise = numerics.product(loaded, system.emission, "ds,es->de")
    diagonal = system.emission_covariance.ndim == 1
    if diagonal:
        noise, colour = jnp.diagonal(noise), jnp.diag(jnp.sqrt(system.emission_covariance))
    else:
        colour = numerics.cholesky(system.emission_covariance).T
    initial = Noise(
        means=apply(whiten_start, found.means[:1] - system.initial_mean[:, None]),
        root=transition.start_root,
        counted=None,
        covariance=found.initial[..., None],
        state_covariance=None,
        cross_covariance=None,
    )
    dynamics = Noise(
        means=apply(whiten_process, found.process_noise),
        root=transition.root,
        counted=None,
        covariance=found.noise_covariance[..., None],
        state_covariance=found.all_but_last[..., None],
        cross_covariance=found.cross_covariance[..., None],
    )
    emission = Noise(
        means=white.values - apply(white.emission, found.means),
        root=colour,
        counted=None,
        covariance=noise[..., None],
        state_covariance=found.all_states[..., None],
        cross_covariance=-loaded.T[..., None],
    )
    at_rest = len(found.means) * white.normaliser - found.half_logdet
    squares = sum(jnp.sum(jnp.square(part.means), axis=(0, 1)) for part in (initial, dynamics, emission))
    return Posterior(
        states=found.means,
        initial=initial,
        dynamics=dynamics,
        emission=emission,
        evidence=at_rest - 0.5 * squares,
        at_rest=at_rest,
    )


def _as_per_sequence(posterior: Posterior) -> Posterior:
    """A shared posterior in the form of those that are not."""
    lanes = posterior.states.shape[-1]

    def coloured(noise: Noise) -> Noise:
        each = jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf, (*leaf.shape[:-1], lanes)),
            (noise.covariance, noise.state_covariance, noise.cross_covariance),
        )
        return Noise(
            means=noise.means if noise.root is None else apply(noise.root.T, noise.means),
            root=None,
            counted=noise.counted,
            covariance=each[0],
            state_covariance=each[1],
            cross_covariance=each[2],
        )

    emission = coloured(posterior.emission)
    return dataclasses.replace(
        posterior,
        initial=coloured(posterior.initial),
        dynamics=coloured(posterior.dynamics),
        emission=dataclasses.replace(emission, counted=jnp.ones_like(emission.means[:, 0], bool)),
        at_rest=None,
    )


@record
class _Counted:
    """Steps at which the equations hold, None where at all: of first states (T, B), of neighbours in one sequence
    (T - 1, B), and of observations (T, B)."""

    initial: jax.Array | None
    dynamics: jax.Array | None
    emission: jax.Array | None


def _counted(x: Sequences) -> _Counted:
    observed = None if x.lengths is None and x.complete else jnp.any(seen_entries(x), axis=-1).T
    if x.lengths is None and x.ids is None:
        return _Counted(initial=None, dynamics=None, emission=observed)
    starts, inside = x.starts().T, x.inside().T
    return _Counted(initial=starts & inside, dynamics=inside[1:] & ~starts[1:], emission=observed)


def _sum(values: jax.Array, counted: jax.Array | None) -> jax.Array:
    """The sum of values (T, ..., B) over the steps that count."""
    if counted is not None:
        values = jnp.where(counted.reshape(len(counted), *(1,) * (values.ndim - 2), -1), values, 0)
    return lanewise.sum_steps(values)


def _per_sequence(system: System, x: Sequences, parallel: bool) -> Posterior:
    """Of sequences whose covariances differ."""
    transition, completed, filtered = filtered_per_sequence(system, x, parallel)
    found = smoothed(transition, filtered, parallel)
    counted = _counted(x)
    everywhere = jnp.ones_like(found.means[:, 0], bool) if counted.emission is None else counted.emission
    diagonal = system.emission_covariance.ndim == 1

    def observed(at: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        filled, loadings, mean, covariance, count = at
        loaded = lanewise.matmul(loadings, covariance)
        weighted = count * loadings
        if diagonal:
            noise = jnp.sum(weighted * loaded, axis=1)
        else:
            noise = lanewise.matmul(weighted, lanewise.transposed(loaded))
        return filled - lanewise.times(loadings, mean), (count * loaded, noise)

    left, (loaded, noise) = lanewise.over_steps(
        observed,
        (completed.filled, completed.loadings, found.means, found.covariances, everywhere.astype(found.means.dtype)),
    )
    first = slice(1) if counted.initial is None else slice(None)
    return Posterior(
        states=found.means,
        initial=Noise(
            means=found.means[first] - system.initial_mean[:, None],
            root=None,
            counted=counted.initial,
            covariance=_sum(found.covariances[first], counted.initial),
            state_covariance=None,
            cross_covariance=None,
        ),
        dynamics=Noise(
            means=found.process_noise,
            root=None,
            counted=counted.dynamics,
            covariance=_sum(found.noise_covariances, counted.dynamics),
            state_covariance=_sum(found.covariances[:-1], counted.dynamics),
            cross_covariance=_sum(found.cross_covariances, counted.dynamics),
        ),
        emission=Noise(
            means=left,
            root=None,
            counted=counted.emission,
            covariance=noise + completed.covariance,
            state_covariance=_sum(found.covariances, counted.emission),
            cross_covariance=-lanewise.transposed(loaded),
        ),
        evidence=x.per_sequence(filtered.log_prob.T),
        at_rest=None,
    )


@record
class DrawnPaths:
    """Paths of states drawn from the posterior, each from its number.

    chain         what paths are drawn with
    completed     the observations' noise, given the states
    counted       steps at which the equations hold
    initial_mean  m   (S,)
    key           of the draws
    num_paths     ()
    evidence      log p(x)   (B,), or (num_sequences,) where they are packed
    params        whose noise this is
    """

    chain: BackwardChain
    completed: Completed
    counted: _Counted
    initial_mean: jax.Array
    key: jax.Array
    num_paths: jax.Array
    evidence: jax.Array
    params: Any = None

    def path(self, number: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        """One path of states (T, S, B), and the process noise (T - 1, S, B) in it."""
        return draw_path(jax.random.fold_in(self.key, number), self.chain)

    def moments(self, number: jax.Array | int) -> Posterior:
        """One path as a posterior: all of it there."""
        states, process_noise = self.path(number)
        size = states.shape[1]
        columns = len(self.completed.covariance)
        none = jnp.zeros((size, size, 1), states.dtype)
        nothing_across = jnp.zeros((size, columns, 1), states.dtype)
        first = slice(1) if self.counted.initial is None else slice(None)

        def noise(means: jax.Array, counted: jax.Array | None, covariance: jax.Array, cross: Any) -> Noise:
            return Noise(
                means=means,
                root=None,
                counted=counted,
                covariance=covariance,
                state_covariance=None if cross is None else none,
                cross_covariance=cross,
            )

        left = self.completed.filled - lanewise.times(self.completed.loadings, states)
        start = states[first] - self.initial_mean[:, None]
        return Posterior(
            states=states,
            initial=noise(start, self.counted.initial, none, None),
            dynamics=noise(process_noise, self.counted.dynamics, none, none),
            emission=noise(left, self.counted.emission, self.completed.covariance, nothing_across),
            evidence=self.evidence,
            at_rest=None,
            params=self.params,
        )

    def average(self, function: Callable) -> Any:
        """The mean of statistics, a function of moments, over the paths."""

        def add(number: jax.Array, total: Any) -> Any:
            return tree.add(total, function(self.moments(number)))

        zero = tree.zeros_like(jax.eval_shape(lambda: function(self.moments(jnp.asarray(0)))))
        total = jax.lax.fori_loop(0, self.num_paths, add, zero)
        return tree.scale(1 / jnp.asarray(self.num_paths, self.chain.means.dtype), total)


def _drawn(params: Any, system: System, x: Sequences, expect: Sample, parallel: bool) -> DrawnPaths:
    key = expect.random_key()
    transition, completed, filtered = filtered_per_sequence(system, x, parallel)
    return DrawnPaths(
        chain=backward_chain(transition, filtered),
        completed=completed,
        counted=_counted(x),
        initial_mean=system.initial_mean,
        key=key,
        num_paths=jnp.asarray(expect.num_samples if expect.used is None else expect.used),
        evidence=x.per_sequence(filtered.log_prob.T),
        params=params,
    )
