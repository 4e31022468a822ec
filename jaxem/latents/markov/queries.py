"""What is asked of sequences once parameters are known: their likelihood, their states, what comes next, and draws.

Methods of a `ChainModel`.
"""

import functools
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from ... import checks, numerics, parameters, sequences, tree
from ...priors import Dirichlet
from ...protocols import Data, Family, Params
from ...sequences import Sequences
from .chain import Chain
from .infer import log_filter
from .paths import decode
from .posterior import Posterior


class ChainModel(Protocol):
    """What these functions need of a model whose latents are a Markov chain over states.

    form, parallel: the arithmetic of the recursions, as in `HMM`.
    """

    @property
    def family(self) -> Family: ...

    @property
    def form(self) -> str: ...

    @property
    def parallel(self) -> bool: ...

    def units(self, x: Data) -> Sequences: ...

    def infer(self, params: Params, x: Data) -> Posterior: ...

    def smooth(self, params: Params, x: Data) -> jax.Array: ...

    def chain(self, params: Params, x: Sequences) -> Chain:
        """The chain with the likelihoods of the observations in sequences x."""
        ...

    def tables(self, params: Params, read: Callable[[Dirichlet], jax.Array] = ...) -> tuple[jax.Array, jax.Array]:
        """Initial probabilities (K,) and transitions (K, K); of Dirichlet distributions, what `read` gives."""
        ...

    def check_count(self, params: Params) -> None:
        """Raise for parameters of another number of states."""
        ...

    def sample_with_states(
        self, key: jax.Array, params: Params, n: int, num_sequences: int | None = None
    ) -> tuple[Data, jax.Array]: ...


def evidence(model: ChainModel, params: Params, x: Sequences) -> Sequences:
    """log p(x_t | x_1..t-1) of every step (B, T)."""
    return x.holding(log_filter(model.chain(params, x), model.form, model.parallel)[1])


@parameters.at_rows
@jax.jit
def log_prob(model: ChainModel, params: Params, x: Data) -> jax.Array:
    """Log-likelihood log p(x) of every sequence: (B,), or (num_sequences,) where they are packed."""
    terms = evidence(model, params, model.units(x))
    return terms.per_sequence(terms.values)


@parameters.at_rows
@jax.jit
def filtered(model: ChainModel, params: Params, x: Data) -> jax.Array:
    """p(z_t = k | x_1..t): (T, K) for one sequence, (B, T, K) for several; 0 in the padding."""
    return model.units(x).in_layout(_filtered(model, params, x), 0, sequences.is_one(x))


@parameters.at_rows
@jax.jit
def smoothed(model: ChainModel, params: Params, x: Data) -> jax.Array:
    """p(z_t = k | x_1..T): (T, K) for one sequence, (B, T, K) for several; 0 in the padding."""
    return model.infer(params, x).states


@parameters.at_rows
@jax.jit
def likeliest(model: ChainModel, params: Params, x: Data) -> jax.Array:
    """The likeliest path of states: (T,) for one sequence, (B, T) for several; -1 in the padding."""
    path, _ = decode(model.chain(params, model.units(x)))
    return model.units(x).in_layout(path, -1, sequences.is_one(x))


@parameters.at_rows
@functools.partial(jax.jit, static_argnames="steps")
def forecast(model: ChainModel, params: Params, x: Data, steps: int) -> jax.Array:
    """p(z_T+h = k | x_1..T) for h = 1..steps after the end: (steps, K) for one sequence, (B, steps, K) for several.

    A forecast of observations is the mixture of the emissions with these weights. Packed sequences are taken
    one by one: (num_sequences, steps, K).
    """
    checks.positive_integer("steps", steps)
    every = model.units(x)
    at_end = every.at_ends(_filtered(model, params, x).reshape(every.num_steps, -1, every.num_rows))

    transition = jnp.asarray(model.tables(params, Dirichlet.expected)[1], at_end.dtype)

    def step(state: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        state = numerics.product(state, transition, "bi,ij->bj")
        return state, state

    _, ahead = jax.lax.scan(step, at_end, length=steps)
    return ahead[:, 0] if sequences.is_one(x) else jnp.moveaxis(ahead, 0, 1)


def sample(model: ChainModel, key: jax.Array, params: Params, n: int, num_sequences: int | None = None) -> Data:
    """A sequence of n steps (n, ...), or num_sequences of them (B, n, ...); states come with `sample_with_states`."""
    return sample_with_states(model, key, params, n, num_sequences)[0]


def sample_with_states(
    model: ChainModel, key: jax.Array, params: Params, n: int, num_sequences: int | None = None
) -> tuple[Data, jax.Array]:
    """Sequences, and the states (n,), or (B, n), that they went through."""
    checks.positive_integer("n", n)
    count = 1 if num_sequences is None else num_sequences
    checks.positive_integer("num_sequences", count)
    model.check_count(params)
    params = tree.no_whole_numbers(params, params)
    key = checks.random_key(key)
    key_start, key_moves, key_rows = jax.random.split(key, 3)
    initial, _ = model.tables(params, lambda q: q.sample(jax.random.fold_in(key, 3)))
    _, transition = model.tables(params, lambda q: q.sample(jax.random.fold_in(key, 4)))
    moves = numerics.safe_log(transition)

    def step(state: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        state = jax.random.categorical(key, moves[state])
        return state, state

    start = jax.random.categorical(key_start, numerics.safe_log(initial), shape=(count,))
    _, states = jax.lax.scan(step, start, jax.random.split(key_moves, n - 1))
    states = jnp.concatenate([start[None], states]).T
    rows = model.family.sample(key_rows, params.emissions, states.ravel())
    x = jax.tree.map(lambda leaf: leaf.reshape(count, n, *leaf.shape[1:]), rows)
    return (x, states) if num_sequences is not None else jax.tree.map(lambda leaf: leaf[0], (x, states))


def _filtered(model: ChainModel, params: Params, x: Data) -> jax.Array:
    """p(z_t = k | x_1..t) (T, K[, B])."""
    return jnp.exp(log_filter(model.chain(params, model.units(x)), model.form, model.parallel)[0])
