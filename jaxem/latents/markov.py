"""A Markov chain of discrete states along every sequence: the posterior over its paths.

Arrays are time-major, states before lanes: (T, K, L) for L sequences side by side, or (T, K) for one. One
sequence without the axis compiles to a far tighter loop.

Two arithmetics. Scaled probabilities: a step is one matrix product, but what underflows beside a likelier state is
lost, which only matters where no transition leads back to it. Logarithms: nothing is lost, at K² exponentials a step.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .. import numerics, tree
from ..record import record
from .expect import Exact, Hard, Sample

FORMS = ("auto", "scaled", "log")

# States up to which a product with one vector is a sum: no call of a matrix library at every step.
_WRITTEN_OUT = 12

# States up to which chains side by side are lanes, and numbers in their transitions from which on sums over states are
# written out: XLA sums so many on a CPU by a library call a step, up to ten times slower.
_FEW, _WIDE = 6, 4000

_HIGHEST = jax.lax.Precision.HIGHEST


@record
class Chain:
    """Chains with their observations.

    initial (K,); transition (K, K), rows from; log_likelihood (T, K) or (T, K, L) of every state's observation, 0
    where there is none; linked (T - 1,) or (T - 1, L): whether step t + 1 goes on from step t, None where all do.
    Lanes with a chain of their own each: initial (K, L), transition (K, K, L).
    """

    initial: jax.Array
    transition: jax.Array
    log_likelihood: jax.Array
    linked: jax.Array | None = None

    @property
    def num_states(self) -> int:
        return self.initial.shape[0]


class Posterior(NamedTuple):
    """states (T, K[, L]): p(z_t = k | x); transitions (K, K): expected numbers of moves from i to j;
    evidence (T[, L]): terms whose sum over a sequence is its log-likelihood."""

    states: jax.Array
    transitions: jax.Array
    evidence: jax.Array


def infer(chain: Chain, expect: Any, counted: jax.Array | None, form: str, parallel: bool) -> Posterior:
    """The posterior of the states; moves from step t to t + 1 are counted by counted (T - 1[, L]), None for 1.

    Under Hard() the states are those of the likeliest path (Viterbi), whose log-probability the evidence sums to;
    under Exact(T) p(z | x)^(1/T), normalised, and T log sum_z p(x, z)^(1/T); under Sample(n) averages over n paths
    drawn backwards from the filter. form: "scaled", "log", or "auto", which takes scaled probabilities unless they
    may have lost a path. parallel: by products of whole transition matrices, in
    log T rounds and K times the work.
    Rabiner (1989), A tutorial on hidden Markov models, Proc. IEEE 77; Chib (1996), J. Econometrics 75.
    Raises TypeError for an `expect` that a chain does not know.
    """
    if isinstance(expect, Hard):
        path, evidence = decode(chain)
        states = _indicators(path, chain)
        return Posterior(states, _moves(states, counted), evidence)
    if isinstance(expect, Sample):
        forward, evidence = log_filter(chain, form, parallel)
        states, transitions = _draw(chain, forward, expect, counted)
        return Posterior(states, transitions, evidence)
    if not isinstance(expect, Exact):
        raise TypeError(f"expect must be Exact(), Hard() or Sample() for a Markov chain; got {expect!r}")
    if expect.temperature is None:
        return _exact(chain, counted, form, parallel)
    temperature = jnp.asarray(expect.temperature, chain.log_likelihood.dtype)
    posterior = _exact(_tempered(chain, temperature), counted, form, parallel)
    return posterior._replace(evidence=temperature * posterior.evidence)


def log_filter(chain: Chain, form: str, parallel: bool) -> tuple[jax.Array, jax.Array]:
    """log p(z_t = k | x_1..t) (T, K[, L]), and the evidence (T[, L]) of every step given those before it."""
    if parallel:
        # Prefix products know no step's own evidence: it is the rise of the whole.
        joint, running = _log_forward_parallel(chain)
        return joint, _rises(running)
    return _choose(form, _scaled_filter, _log_filter, chain, None)


def decode(chain: Chain) -> tuple[jax.Array, jax.Array]:
    """The likeliest path (T[, L]) of states, and terms (T[, L]) that sum to its log-probability with the data.

    Of equally likely states the first is taken. Viterbi (1967).
    """
    moves = _like(numerics.safe_log(chain.transition), chain)
    start = _column(numerics.safe_log(chain.initial), chain)

    def forward(best: jax.Array, step: Any) -> tuple[jax.Array, Any]:
        scores, linked = step
        through = moves + best[:, None]
        came, reached = jnp.argmax(through, axis=0), jnp.max(through, axis=0)
        reached = (reached if linked is None else jnp.where(linked, reached, start)) + scores
        top = jnp.max(reached, axis=0)
        level = jnp.where(top > -jnp.inf, top, 0)
        # Where a sequence ends, its last state is its best one.
        return reached - level, (came, jnp.argmax(reached, axis=0), top)

    scores = chain.log_likelihood
    first = start + scores[0]
    top = jnp.max(first, axis=0)
    _, (came, last, rises) = jax.lax.scan(
        forward, first - jnp.where(top > -jnp.inf, top, 0), (scores[1:], chain.linked)
    )
    ends = jnp.concatenate([jnp.argmax(first, axis=0)[None], last])

    def backward(state: jax.Array, step: Any) -> tuple[jax.Array, jax.Array]:
        came, end, linked = step
        before = jnp.take_along_axis(came, state[None], axis=0)[0]
        before = before if linked is None else jnp.where(linked, before, end)
        return before, before

    _, path = jax.lax.scan(backward, ends[-1], (came, ends[:-1], chain.linked), reverse=True)
    return jnp.concatenate([path, ends[-1:]]), jnp.concatenate([top[None], rises])


def _exact(chain: Chain, counted: jax.Array | None, form: str, parallel: bool) -> Posterior:
    if parallel:
        forward, running = _log_forward_parallel(chain)
        after = _log_backward_parallel(chain)
        arrive = after[1:] + chain.log_likelihood[1:]
        return _joined(chain, forward, after, arrive, counted)._replace(evidence=_rises(running))
    scaled = _scaled_posterior if chain.log_likelihood.ndim > 2 else _scaled_posterior_of_one
    return _choose(form, scaled, _log_posterior, chain, counted)


def _choose(form: str, scaled: Callable, logs: Callable, chain: Chain, counted: jax.Array | None) -> Any:
    """What `scaled` finds, unless it says that it may have lost a path: then what `logs` does."""
    if form == "scaled":
        return scaled(chain, counted)[0]
    if form == "log":
        return logs(chain, counted)

    return numerics.repaired(scaled, logs, chain, counted)


# Scaled probabilities.


def _likelihood(chain: Chain) -> tuple[jax.Array, jax.Array]:
    """Likelihoods (T, K[, L]) relative to the best state's, and its logarithm (T, 1[, L])."""
    return _exp(chain.log_likelihood)


def _exp(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """exp(scores - peak) and peak, the largest score of every step."""
    peak = jax.lax.stop_gradient(jnp.max(scores, axis=1, keepdims=True))
    peak = jnp.where(jnp.isneginf(peak), 0, peak)
    return jnp.exp(scores - peak), peak


def _forward(chain: Chain, likelihood: jax.Array, peak: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """p(z_t = k, x_t | x_1..t-1) (T, K[, L]) relative to peaks (T, 1[, L]), and whether a path may have been lost.

    What underflows beside a likelier state is lost, and counts for nothing as long as every state stays in reach
    of the likelier ones: none is predicted with a probability near the least number, or 0.
    """
    onto, start = jnp.swapaxes(chain.transition, 0, 1), _column(numerics.safe_log(chain.initial), chain)
    scores, linked = chain.log_likelihood, chain.linked
    # Where a sequence starts, likelihoods count relative to those of states that it can start in.
    begun, height = _exp(start + (scores[:1] if linked is None else scores))
    if linked is None:
        peak = jnp.concatenate([height, peak[1:]])
    else:
        peak = jnp.concatenate([height[:1], jnp.where(linked[:, None], peak[1:], height[1:])])

    def step(joint: jax.Array, inputs: Any) -> tuple[jax.Array, jax.Array]:
        likelihood, begin = inputs
        predicted = _onward(onto, joint)
        joint = predicted * likelihood
        return (joint if begin is None else jnp.where(begin[0], joint, begin[1])), predicted

    begin = None if linked is None else (linked, begun[1:])
    _, predicted = jax.lax.scan(step, begun[0], (likelihood[1:], begin))
    joint = predicted * likelihood[1:]
    if linked is not None:
        joint = jnp.where(linked[:, None], joint, begun[1:])
        predicted = jnp.where(linked[:, None], predicted, 1)
    limits = jnp.finfo(likelihood.dtype)
    lossy = jnp.min(predicted, axis=(0, 1) if onto.ndim > 2 else None, initial=1) < limits.tiny / limits.eps
    return jnp.concatenate([begun[:1], joint]), peak, lossy


def _backward(chain: Chain, likelihood: jax.Array) -> jax.Array:
    """p(x_t+1.. | z_t = k) (T, K[, L]), up to a factor for every step."""

    def step(after: jax.Array, inputs: Any) -> tuple[jax.Array, jax.Array]:
        likelihood, linked = inputs
        before = _onward(chain.transition, after * likelihood)
        before = before if linked is None else jnp.where(linked, before, 1)
        return before, before

    last = jnp.ones_like(likelihood[0])
    _, before = jax.lax.scan(step, last, (likelihood[1:], chain.linked), reverse=True)
    return jnp.concatenate([before, last[None]])


def _scaled_filter(chain: Chain, _: None) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    joint, peak, lossy = _forward(chain, *_likelihood(chain))
    total = jnp.sum(joint, axis=1, keepdims=True)
    filtered = numerics.safe_log(numerics.safe_divide(joint, total))
    return (filtered, jnp.squeeze(numerics.safe_log(total) + peak, 1)), lossy


def _scaled_posterior(chain: Chain, counted: jax.Array | None) -> tuple[Posterior, jax.Array]:
    likelihood, peak = _likelihood(chain)
    joint, peak, lossy = _forward(chain, likelihood, peak)
    after = _backward(chain, likelihood)
    evidence = jnp.sum(joint, axis=1, keepdims=True)
    filtered = numerics.safe_divide(joint, evidence)
    both = filtered * after
    scale = jnp.sum(both, axis=1, keepdims=True)
    come = numerics.safe_divide(filtered[:-1], scale[:-1])
    if counted is not None:
        come = come * counted[:, None]
    arrive = _distribution(after[1:] * likelihood[1:], axis=1)
    posterior = Posterior(
        states=numerics.safe_divide(both, scale),
        transitions=chain.transition * _pairs(come, arrive, chain.transition.ndim > 2),
        evidence=jnp.squeeze(numerics.safe_log(evidence) + peak, 1),
    )
    return posterior, lossy


@jax.custom_batching.custom_vmap
def _one_or_many(chain: Chain, counted: jax.Array | None) -> tuple[Posterior, jax.Array]:
    return _scaled_posterior(chain, counted)


@_one_or_many.def_vmap
def _many(size: int, batched: Any, chain: Chain, counted: jax.Array | None) -> tuple[Any, Any]:
    """Chains of few states side by side as lanes, the last axis: `vmap` would put them first, and the states last."""
    if chain.log_likelihood.shape[-1] > _FEW or not batched[0].transition:
        leaves, structure = jax.tree.flatten((chain, counted))
        axes = [0 if is_batched else None for is_batched in jax.tree.leaves(tuple(batched))]
        found = jax.vmap(lambda leaves: _scaled_posterior(*jax.tree.unflatten(structure, leaves)), (axes,))(leaves)
        return found, jax.tree.map(lambda _: True, found)

    def lanes(leaf: jax.Array, is_batched: bool) -> jax.Array:
        return jnp.moveaxis(leaf, 0, -1) if is_batched else leaf[..., None]

    chain, counted = jax.tree.map(lanes, (chain, counted), tuple(batched))
    steps, states, _ = chain.log_likelihood.shape
    whole = jnp.broadcast_to(chain.log_likelihood, (steps, states, size))
    found = _scaled_posterior(dataclasses.replace(chain, log_likelihood=whole), counted)
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, -1, 0), found), jax.tree.map(lambda _: True, found)


@jax.custom_jvp
def _scaled_posterior_of_one(chain: Chain, counted: jax.Array | None) -> tuple[Posterior, jax.Array]:
    """`_scaled_posterior` of one sequence."""
    return _one_or_many(chain, counted)


@_scaled_posterior_of_one.defjvp
def _scaled_posterior_jvp(primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    return jax.jvp(_scaled_posterior, primals, tangents)  # a vmap of one's own has no reverse mode


def _onward(matrix: jax.Array, mass: jax.Array) -> jax.Array:
    """matrix (K, K[, L]) times the distribution of mass (K[, L]): the sum is found beside the product, not before."""
    total = jnp.sum(mass, axis=0)
    if matrix.ndim > 2 and matrix.size > _WIDE:
        moved = functools.reduce(jnp.add, [matrix[:, i] * mass[i] for i in range(len(mass))])
        total = functools.reduce(jnp.add, list(mass))
    elif matrix.ndim > 2 or (mass.ndim == 1 and len(matrix) <= _WRITTEN_OUT):
        moved = jnp.sum(matrix * mass, axis=1)
    else:
        moved = jnp.dot(matrix, mass, precision=_HIGHEST)
    # A barrier: what is carried on and what is stored would each be computed.
    return jax.lax.optimization_barrier(numerics.safe_divide(moved, total))


def _distribution(mass: jax.Array, axis: int = 0) -> jax.Array:
    """Mass over its sum; 0 where there is none."""
    return numerics.safe_divide(mass, jnp.sum(mass, axis=axis, keepdims=True))


def _pairs(before: jax.Array, after: jax.Array, apart: bool = False) -> jax.Array:
    """sum over steps and lanes of before_i after_j: (T, K[, L]) twice -> (K, K); (K, K, L) where lanes are apart."""
    if before.ndim == 2:
        return jnp.dot(before.T, after, precision=_HIGHEST)

    # As one product it would transpose both first.
    def add(total: jax.Array, both: Any) -> tuple[jax.Array, None]:
        before, after = both
        return total + (before[:, None] * after if apart else jnp.dot(before, after.T, precision=_HIGHEST)), None

    _, count, lanes = before.shape
    shape = (count, count, lanes) if apart else (count, count)
    return jax.lax.scan(add, tree.varying(jnp.zeros(shape, before.dtype), before, after), (before, after))[0]


# Logarithms.


def _log_sum(logs: jax.Array, axis: int) -> jax.Array:
    """log sum exp over an axis, which stays; -inf where there is nothing, with a zero gradient."""
    top = jax.lax.stop_gradient(jnp.max(logs, axis=axis, keepdims=True))
    top = jnp.where(jnp.isneginf(top), 0, top)
    return top + numerics.safe_log(jnp.sum(jnp.exp(logs - top), axis=axis, keepdims=True))


def _minus(logs: jax.Array, total: jax.Array) -> jax.Array:
    """logs - total, and -inf where the total is."""
    none = jnp.isneginf(total)
    return jnp.where(none, -jnp.inf, logs - jnp.where(none, 0, total))


def _log_forward(chain: Chain) -> jax.Array:
    """log p(z_t = k, x_t | x_1..t-1): (T, K[, L])."""
    moves = _like(numerics.safe_log(chain.transition), chain)
    start = _column(numerics.safe_log(chain.initial), chain)

    def step(joint: jax.Array, inputs: Any) -> tuple[jax.Array, jax.Array]:
        scores, linked = inputs
        filtered = _minus(joint, _log_sum(joint, 0))
        predicted = jnp.squeeze(_log_sum(moves + filtered[:, None], 0), 0)
        joint = (predicted if linked is None else jnp.where(linked, predicted, start)) + scores
        return joint, joint

    scores = chain.log_likelihood
    first = start + scores[0]
    _, joint = jax.lax.scan(step, first, (scores[1:], chain.linked))
    return jnp.concatenate([first[None], joint])


def _log_backward(chain: Chain) -> tuple[jax.Array, jax.Array]:
    """log p(x_t+1.. | z_t = k) (T, K[, L]), up to a constant for every step, and log p(x_t.. | z_t = k) for those
    after the first, up to the constant of the step before."""
    moves = _like(numerics.safe_log(chain.transition), chain)

    def step(after: jax.Array, inputs: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        scores, linked = inputs
        arrive = after + scores
        arrive = _minus(arrive, _log_sum(arrive, 0))
        before = jnp.squeeze(_log_sum(moves + arrive[None], 1), 1)
        before = before if linked is None else jnp.where(linked, before, 0)
        return before, (before, arrive)

    last = jnp.zeros_like(chain.log_likelihood[0])
    _, (before, arrive) = jax.lax.scan(step, last, (chain.log_likelihood[1:], chain.linked), reverse=True)
    return jnp.concatenate([before, last[None]]), arrive


def _log_filter(chain: Chain, _: None) -> tuple[jax.Array, jax.Array]:
    joint = _log_forward(chain)
    total = _log_sum(joint, 1)
    return _minus(joint, total), jnp.squeeze(total, 1)


def _log_posterior(chain: Chain, counted: jax.Array | None) -> Posterior:
    return _joined(chain, _log_forward(chain), *_log_backward(chain), counted)


def _joined(
    chain: Chain, joint: jax.Array, after: jax.Array, arrive: jax.Array, counted: jax.Array | None
) -> Posterior:
    """The posterior from forward and backward recursions in logarithms."""
    evidence = _log_sum(joint, 1)
    filtered = _minus(joint, evidence)
    both = filtered + after
    scale = _log_sum(both, 1)
    come = _minus(filtered[:-1], scale[:-1])
    if counted is not None:
        come = jnp.where(counted[:, None] > 0, come, -jnp.inf)
    # One state at a time: all pairs of states at every step would outgrow memory.
    moves = _like(numerics.safe_log(chain.transition), chain)

    def onto(j: jax.Array) -> jax.Array:
        pairs = jnp.exp(come + moves[:, j] + jnp.take(arrive, j, axis=1)[:, None])
        if counted is not None:
            pairs = pairs * counted[:, None]
        return jnp.sum(jnp.moveaxis(pairs, 1, 0).reshape(chain.num_states, -1), axis=1)

    return Posterior(
        states=jnp.exp(_minus(both, scale)),
        transitions=jax.lax.map(onto, jnp.arange(chain.num_states)).T,
        evidence=jnp.squeeze(evidence, 1),
    )


# Products of transition matrices, in log T rounds (Särkkä & García-Fernández 2021, IEEE Trans. Signal Processing 69).


def _log_matrices(chain: Chain) -> jax.Array:
    """log p(z_t = j, x_t | z_t-1 = i) of every step: (T, [L,] K, K); where one starts, the same from all."""
    scores = chain.log_likelihood
    scores = jnp.moveaxis(scores, 1, -1)[..., None, :]
    start = numerics.safe_log(chain.initial)
    moves = jnp.broadcast_to(numerics.safe_log(chain.transition), (*scores.shape[:-2], *chain.transition.shape))
    begins = jnp.zeros(scores.shape[:-2], bool).at[0].set(True)
    if chain.linked is not None:
        begins = begins.at[1:].set(~chain.linked)
    return jnp.where(begins[..., None, None], start, moves) + scores


def _log_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Matrix products of (..., K, K) in logarithms."""
    return jnp.squeeze(_log_sum(a[..., :, :, None] + b[..., None, :, :], -2), -2)


def _log_forward_parallel(chain: Chain) -> tuple[jax.Array, jax.Array]:
    """log p(z_t = k | x_1..t) (T, K[, L]), and the log-likelihood of all steps up to each (T, 1[, L])."""
    products = jax.lax.associative_scan(_log_product, _log_matrices(chain))
    joint = jnp.moveaxis(products[..., 0, :], -1, 1)
    running = _log_sum(joint, 1)
    return _minus(joint, running), running


def _rises(running: jax.Array) -> jax.Array:
    """Evidence of single steps (T[, L]) from that of all up to each (T, 1[, L]), which goes on over starts."""
    running = jnp.squeeze(running, 1)
    never = jnp.isneginf(running)
    return jnp.where(never, -jnp.inf, jnp.diff(jnp.where(never, 0, running), axis=0, prepend=0))


def _log_backward_parallel(chain: Chain) -> jax.Array:
    """As the first of `_log_backward`."""
    last = jnp.zeros_like(chain.log_likelihood[:1])
    products = jax.lax.associative_scan(lambda a, b: _log_product(b, a), _log_matrices(chain)[1:], reverse=True)
    before = jnp.moveaxis(jnp.squeeze(_log_sum(products, -1), -1), -1, 1)
    return jnp.concatenate([before, last])


# Paths.


def _draw(chain: Chain, filtered: jax.Array, expect: Sample, counted: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """States (T, K[, L]) and moves (K, K), averaged over paths drawn backwards from the filter."""
    key, lanes = expect.random_key(), filtered.shape[2:]
    used = expect.num_samples if expect.used is None else expect.used
    share = (jnp.arange(expect.num_samples) < used) / jnp.asarray(used, filtered.dtype)
    moves = numerics.safe_log(chain.transition)

    def pick(number: jax.Array, logs: jax.Array) -> jax.Array:
        """Indicators (K[, L], n) of a draw from exp(logs) (K[, L], n), by inversion; never a state of mass 0."""
        upto = jnp.cumsum(numerics.normalize(logs)[0], axis=0)
        level = jax.random.uniform(jax.random.fold_in(key, number), upto.shape[1:], upto.dtype) * upto[-1]
        return jnp.diff((level < upto).astype(upto.dtype), axis=0, prepend=0)

    def step(carry: Any, inputs: Any) -> tuple[Any, jax.Array]:
        after, total = carry
        number, filtered, linked, counted = inputs
        own = jnp.broadcast_to(filtered[..., None], after.shape)
        towards = own + jnp.take(moves, jnp.argmax(after, axis=0), axis=1)
        here = pick(number, towards if linked is None else jnp.where(linked[..., None], towards, own))
        each = share if counted is None else share * counted[..., None]
        flat = chain.num_states, -1
        total = total + jnp.dot((here * each).reshape(flat), after.reshape(flat).T, precision=_HIGHEST)
        return (here, total), jnp.sum(here * share, axis=-1)

    steps = jnp.arange(len(filtered))
    shape = (chain.num_states, *lanes, expect.num_samples)
    last = pick(steps[-1], jnp.broadcast_to(filtered[-1][..., None], shape))
    (_, total), states = jax.lax.scan(
        step,
        (last, jnp.zeros_like(chain.transition)),
        (steps[:-1], filtered[:-1], chain.linked, counted),
        reverse=True,
    )
    return jnp.concatenate([states, jnp.sum(last * share, axis=-1)[None]]), total


def _indicators(path: jax.Array, chain: Chain) -> jax.Array:
    """1 where the path is: (T[, L]) -> (T, K[, L])."""
    states = jnp.arange(chain.num_states).reshape(-1, *(1,) * (path.ndim - 1))
    return (path[:, None] == states).astype(chain.log_likelihood.dtype)


def _moves(states: jax.Array, counted: jax.Array | None) -> jax.Array:
    """Numbers of moves (K, K) along paths given as indicators."""
    return _pairs(states[:-1] if counted is None else states[:-1] * counted[:, None], states[1:])


def _tempered(chain: Chain, temperature: jax.Array) -> Chain:
    """p(z, x)^(1/T), which is no distribution: rows of transitions do not sum to 1."""

    def power(probability: jax.Array) -> jax.Array:
        return jnp.exp(numerics.safe_log(probability) / temperature)

    return Chain(
        initial=power(chain.initial),
        transition=power(chain.transition),
        log_likelihood=chain.log_likelihood / temperature,
        linked=chain.linked,
    )


def _column(values: jax.Array, chain: Chain) -> jax.Array:
    """(K,) against lanes: (K, 1), or as it is without them, or with its own."""
    return values if values.ndim > 1 else values.reshape(-1, *(1,) * (chain.log_likelihood.ndim - 2))


def _like(matrix: jax.Array, chain: Chain) -> jax.Array:
    """(K, K) against lanes: (K, K, 1), or as it is without them."""
    return matrix.reshape(*matrix.shape, *(1,) * (chain.log_likelihood.ndim - 2))
