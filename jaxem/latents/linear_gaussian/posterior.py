"""The posterior of a linear-Gaussian system: moments of its states, and of the noise in each of its three equations.

Moments of the noise are computed directly, as sums of squares: differences of moments of states would lose most of
their digits. Covariances are summed over the steps of every sequence, and so serve any weights of sequences.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ... import numerics, tree
from ...checks import told
from ...record import record
from ...sequences import Sequences
from ...slots import Expect
from .. import lanewise
from ..expect import Exact, Sample
from .affine import apply
from .elements import Filtered
from .noise import Noise, sum_counted
from .shared import shared_moments
from .smoothing import BackwardChain, backward_chain, draw_path, smoothed
from .system import System, filtered_per_sequence, root_of, shared_or_per_sequence, whitened
from .whitening import Completed


@record
class Posterior:
    """All that statistics need of p(states, missing entries | x).

    states     E z_t   (T, S, B)
    initial    noise z_1 - m            T' = 1; where lengths differ or rows are packed T' = T, and only starts count
    dynamics   process noise w_t        T' = T - 1, from the second step on
    emission   observation noise v_t    T' = T
    log_prob   log p(x) of every row    (B,); where noise is white, log p(x) + |noise|² / 2: (B,) or (1,)
    packed     log p(x)                 (num_sequences,), of every sequence where rows hold several; else None
    params     the parameters of this posterior, whose noise this is
    """

    states: jax.Array
    initial: Noise
    dynamics: Noise
    emission: Noise
    log_prob: jax.Array
    packed: jax.Array | None
    params: Any = None

    @property
    def white(self) -> bool:
        """Whether noise is in coordinates in which it is white."""
        return self.emission.root is not None

    @property
    def evidence(self) -> jax.Array:
        """log p(x) of every sequence: (B,), or (num_sequences,) where they are packed."""
        if self.white:
            return self.log_prob - 0.5 * self.squares
        return self.log_prob if self.packed is None else self.packed

    @property
    def squares(self) -> jax.Array:
        """The sum (B,) of the squares of all expected noise."""
        parts = (self.dynamics, self.emission)
        each = (jnp.sum(jnp.square(part.means), axis=(0, 1)) for part in parts)
        return sum(each, jnp.sum(jnp.square(self.initial.means), axis=(0, 1)))

    def average(self, function: Callable) -> Any:
        """The expectation of statistics, a function of moments."""
        return function(self)

    def entropy(self, weights: jax.Array | None = None) -> jax.Array:
        """Entropy in nats of states and missing entries, summed over rows of sequences x weights (B,).

        log p(x) - E[log p(x, states)], at the parameters that this is the posterior at; squares of white noise cancel.
        """
        noises, at = (self.initial, self.dynamics, self.emission), self.params
        covariances = at.initial_covariance, at.dynamics_covariance, at.emission_covariance
        each = sum((n.surprise(c) for n, c in zip(noises, covariances, strict=True)), self.log_prob)
        return numerics.weighted_sum(jnp.broadcast_to(each, self.states.shape[-1:]), weights)

    def given(self, q: Any) -> "Posterior":
        """The posterior of the same sequences at other parameters; TypeError or ValueError for what is none."""
        if not isinstance(q, Posterior):
            raise TypeError(f"q must be what the model's infer(params, x) returned at any parameters; got {told(q)}")
        if q.states.shape != self.states.shape:
            raise ValueError(f"q must have states of shape {self.states.shape} (T, S, B); got {q.states.shape}")
        return q


def infer(params: Any, system: System, x: Sequences, expect: Expect, parallel: bool) -> Any:
    """The posterior under `expect`: moments under Exact(), paths under Sample(n); TypeError for any other.

    params: what the system was made of, which the posterior carries.
    """
    if isinstance(expect, Sample):
        return _drawn(params, system, x, expect, parallel)
    if not isinstance(expect, Exact) or expect.temperature is not None:
        raise TypeError(f"expect must be Exact() or Sample(n) for linear-Gaussian states; got {expect!r}")

    def shared(system: System, known: Sequences) -> Posterior:
        found = _shared(system, known, parallel)
        return _for_every_lane(found) if x.complete is None else found

    def per_sequence(system: System, x: Sequences) -> Posterior:
        found = _per_sequence(system, x, parallel)
        return _white(system, found) if x.complete is None and x.lengths is None and x.ids is None else found

    return dataclasses.replace(shared_or_per_sequence(shared, per_sequence, system, x), params=params)


def _shared(system: System, x: Sequences, parallel: bool) -> Posterior:
    """Of sequences that share their covariances.

    In coordinates in which noise is white, log p(x) is -|noise|² / 2 at the smoothed means, plus normalisers and
    log-determinants.
    """
    transition, white = whitened(system, x)
    found = shared_moments(transition, white.matrix, white.compressed, parallel=parallel)
    (start_root, process_root, colour), (whiten_start, whiten_process, _) = _roots(system)
    loaded = numerics.product(system.emission, found.all_states, "ds,sr->dr")
    noise = numerics.product(loaded, system.emission, "ds,es->de")
    initial = Noise(
        means=apply(whiten_start, found.means[:1] - system.initial_mean[None, :, None]),
        root=start_root,
        counted=None,
        covariance=found.initial[..., None],
        state_covariance=None,
        cross_covariance=None,
    )
    dynamics = Noise(
        means=apply(whiten_process, found.process_noise),
        root=process_root,
        counted=None,
        covariance=found.noise_covariance[..., None],
        state_covariance=found.all_but_last[..., None],
        cross_covariance=found.cross_covariance[..., None],
    )
    emission = Noise(
        means=white.values - apply(white.emission, found.means),
        root=colour,
        counted=None,
        covariance=(noise if system.emission_covariance.ndim == 2 else jnp.diagonal(noise))[..., None],
        state_covariance=found.all_states[..., None],
        cross_covariance=-loaded.T[..., None],
    )
    return Posterior(
        states=found.means,
        initial=initial,
        dynamics=dynamics,
        emission=emission,
        packed=None,
        log_prob=(len(found.means) * white.normaliser - found.half_logdet)[None],
    )


def _roots(system: System) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """U with UᵀU the covariance of the noise in the three equations, and what makes it white, U⁻ᵀ."""
    start, process = root_of(system.initial_covariance), root_of(system.dynamics_covariance)
    covariance = system.emission_covariance
    if covariance.ndim == 1:
        colour, white = jnp.diag(jnp.sqrt(covariance)), jnp.diag(jax.lax.rsqrt(covariance))
    else:
        factor = numerics.cholesky(covariance)
        colour, white = factor.T, numerics.inverse_lower(factor)
    whiten_start, whiten_process = (lanewise.generalized_inverse(root).T for root in (start, process))
    return (start, process, colour), (whiten_start, whiten_process, white)


def _white(system: System, posterior: Posterior) -> Posterior:
    """A posterior in the form of those that are shared: noise in coordinates in which it is white."""
    noises = (posterior.initial, posterior.dynamics, posterior.emission)
    initial, dynamics, emission = (
        dataclasses.replace(noise, means=apply(whitener, noise.means), root=root)
        for noise, root, whitener in zip(noises, *_roots(system), strict=True)
    )
    found = dataclasses.replace(posterior, initial=initial, dynamics=dynamics, emission=emission)
    return dataclasses.replace(found, log_prob=posterior.log_prob + 0.5 * found.squares)


def _for_every_lane(posterior: Posterior) -> Posterior:
    """A shared posterior in the form of those in which every sequence has covariances of its own."""
    lanes = posterior.states.shape[-1]

    def repeated(noise: Noise, counted: jax.Array | None) -> Noise:
        def each(leaf: jax.Array) -> jax.Array:
            return jnp.broadcast_to(leaf, (*leaf.shape[:-1], lanes))

        return dataclasses.replace(
            noise,
            counted=counted,
            covariance=each(noise.covariance),
            state_covariance=jax.tree.map(each, noise.state_covariance),
            cross_covariance=jax.tree.map(each, noise.cross_covariance),
        )

    return dataclasses.replace(
        posterior,
        initial=repeated(posterior.initial, None),
        dynamics=repeated(posterior.dynamics, None),
        emission=repeated(posterior.emission, jnp.ones_like(posterior.states[:, 0], bool)),
        log_prob=jnp.broadcast_to(posterior.log_prob, lanes),
    )


@record
class _Counted:
    """Steps at which each equation holds; None where it holds at every step.

    initial    (T, B), first steps of sequences
    dynamics   (T - 1, B), from the second step on, those that go on from the one before
    emission   (T, B), steps that are observed
    """

    initial: jax.Array | None
    dynamics: jax.Array | None
    emission: jax.Array | None


def _counted(x: Sequences, completed: Completed) -> _Counted:
    observed = None if x.lengths is None and x.complete else completed.observed
    if x.lengths is None and x.ids is None:
        return _Counted(initial=None, dynamics=None, emission=observed)
    starts, inside = x.starts().T, x.inside().T
    return _Counted(initial=starts & inside, dynamics=inside[1:] & ~starts[1:], emission=observed)


def _of_rows(x: Sequences, filtered: Filtered) -> jax.Array:
    """log p(x) of the sequences of every row: (B,)."""
    return jnp.sum(jnp.where(x.inside(), filtered.log_prob.T, 0), axis=1)


def _of_packed(x: Sequences, filtered: Filtered) -> jax.Array | None:
    """log p(x) of every sequence, where rows hold several."""
    return None if x.ids is None else x.per_sequence(filtered.log_prob.T)


def _per_sequence(system: System, x: Sequences, parallel: bool) -> Posterior:
    """Of sequences whose covariances differ."""
    transition, completed, filtered = filtered_per_sequence(system, x, parallel)
    found = smoothed(transition, filtered, parallel)
    counted = _counted(x, completed)
    diagonal = system.emission_covariance.ndim == 1

    def observed(at: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        filled, loadings, mean, covariance, counts = at
        loaded = lanewise.once(lanewise.matmul(loadings, covariance))
        weighted = lanewise.once(jnp.where(counts[None, None], loadings, 0))
        noise = jnp.sum(weighted * loaded, axis=1) if diagonal else lanewise.outer(weighted, loaded)
        return filled - lanewise.times(loadings, mean), (jnp.where(counts[None, None], loaded, 0), noise)

    left, (loaded, noise) = lanewise.over_steps(
        observed,
        (completed.filled, completed.loadings, found.means, found.covariances, completed.observed),
    )
    first = slice(1) if counted.initial is None else slice(None)
    return Posterior(
        states=found.means,
        initial=Noise(
            means=found.means[first] - system.initial_mean[None, :, None],
            root=None,
            counted=counted.initial,
            covariance=sum_counted(found.covariances[first], counted.initial),
            state_covariance=None,
            cross_covariance=None,
        ),
        dynamics=Noise(
            means=found.process_noise,
            root=None,
            counted=counted.dynamics,
            covariance=sum_counted(found.noise_covariances, counted.dynamics),
            state_covariance=sum_counted(found.covariances[:-1], counted.dynamics),
            cross_covariance=sum_counted(found.cross_covariances, counted.dynamics),
        ),
        emission=Noise(
            means=left,
            root=None,
            counted=counted.emission,
            covariance=noise + completed.covariance,
            state_covariance=sum_counted(found.covariances, counted.emission),
            cross_covariance=-lanewise.transposed(loaded),
        ),
        log_prob=_of_rows(x, filtered),
        packed=_of_packed(x, filtered),
    )


@record
class DrawnPaths:
    """Paths of states drawn from the posterior, each determined by its number.

    chain         what paths are drawn with
    completed     the observations' noise, given the states
    counted       steps at which the equations hold
    initial_mean  m   (S,)
    key           of the draws
    num_paths     ()
    log_prob, packed, params   as in `Posterior`
    """

    chain: BackwardChain
    completed: Completed
    counted: _Counted
    initial_mean: jax.Array
    key: jax.Array
    num_paths: jax.Array
    log_prob: jax.Array
    packed: jax.Array | None
    params: Any = None

    @property
    def evidence(self) -> jax.Array:
        """log p(x) of every sequence, exactly: (B,), or (num_sequences,) where they are packed."""
        return self.log_prob if self.packed is None else self.packed

    def path(self, number: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        """One path of states (T, S, B), and the process noise (T - 1, S, B) in it."""
        return draw_path(jax.random.fold_in(self.key, number), self.chain)

    def moments(self, number: jax.Array | int) -> Posterior:
        """One path as a posterior, in which states have covariance 0."""
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
        start = states[first] - self.initial_mean[None, :, None]
        return Posterior(
            states=states,
            initial=noise(start, self.counted.initial, none, None),
            dynamics=noise(process_noise, self.counted.dynamics, none, none),
            emission=noise(left, self.counted.emission, self.completed.covariance, nothing_across),
            log_prob=self.log_prob,
            packed=self.packed,
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
        counted=_counted(x, completed),
        initial_mean=system.initial_mean,
        key=key,
        num_paths=jnp.asarray(expect.num_samples if expect.used is None else expect.used),
        log_prob=_of_rows(x, filtered),
        packed=_of_packed(x, filtered),
        params=params,
    )
