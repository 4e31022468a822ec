"""Distributions of the states along sequences: the posterior, and any other that is a Markov chain.

`Smoothed`, `Paths` and `Dense` hold time-major arrays and follow one protocol, `Form`. `Posterior` gives any of them in
the layout of the data, and `ChainPosterior` is one that a user writes down.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ... import checks, numerics, tree
from ...record import record, static
from ...sequences import Sequences
from . import logs, scaled


class Form(Protocol):
    """A distribution of the states, however the joint distributions of neighbours (pairs) are stored."""

    @property
    def states(self) -> jax.Array:
        """q(z_t = k): (T, K[, L])."""
        ...

    def pairs(self) -> jax.Array:
        """q(z_t = i, z_t+1 = j) (T - 1, K, K[, L]), 0 where step t + 1 does not go on from step t. Mind the memory."""
        ...

    def moves(self, weights: jax.Array | None = None) -> jax.Array:
        """Expected numbers of moves from i to j (K, K), summed over steps and lanes x weights ([L])."""
        ...

    def expected_log(self, other: "Form", masks: "Masks", weights: jax.Array | None = None) -> jax.Array:
        """sum over lanes x weights ([L]) of E_other[log of this distribution]."""
        ...


class Distribution(Protocol):
    """A distribution of the states under which a model can take expected statistics."""

    def along(self, x: Sequences) -> tuple[Form, Sequences | None]:
        """Its `Form` for these sequences, and the evidence of every step (B, T), None where it is unknown."""
        ...


@record
class Masks:
    """Where sequences begin and go on.

    first (T[, L]): which steps begin a sequence
    linked (T - 1[, L]): whether step t + 1 goes on from step t
    """

    first: jax.Array
    linked: jax.Array


@record
class Smoothed:
    """The posterior that recursions find, its pairs in factored form.

    p(z_t = i, z_t+1 = j | x) = come_t(i) transition(i, j) arrive_t(j): all pairs of all steps would outgrow memory,
    and their sum over steps is one product of matrices.

    states (T, K[, L]): p(z_t = k | x)
    come (T - 1, K[, L]): p(z_t = i | x_1..t), divided by a factor that normalises the pairs of the step; 0 where the
        next step does not go on
    arrive (T - 1, K[, L]): p(x_t+1.. | z_t+1 = j), up to a factor for every step, which that of come cancels
    total (K, K): the expected moves, all lanes with weight 1. XLA drops what is not used: come and arrive are for
        lanes with weights, and for pairs, entropies and divergences
    transition (K, K): the chain's, tempered where the posterior is
    in_logs (): 1 where come and arrive had to be logarithms, 0 where not; None where `logarithmic` says so for all
    logarithmic: whether come and arrive are logarithms
    """

    states: jax.Array
    come: jax.Array
    arrive: jax.Array
    total: jax.Array
    transition: jax.Array
    in_logs: jax.Array | None = None
    logarithmic: bool = static(default=False)

    def moves(self, weights: jax.Array | None = None) -> jax.Array:
        """As `Form` says."""
        if weights is None or self.states.ndim == 2:
            return scaled.weighted(self.total, weights)
        factors = self.transition, self.come, self.arrive, weights
        if self.in_logs is not None:
            return numerics.repaired(_unless_in_logs, lambda *given: logs.moves(*given[:-1]), *factors, self.in_logs)
        return (logs if self.logarithmic else scaled).moves(*factors)

    def pairs(self) -> jax.Array:
        """As `Form` says."""
        come, arrive = self._log_factors()
        moves = numerics.safe_log(self.transition)
        return jnp.exp(come[:, :, None] + moves.reshape(1, *moves.shape, *(1,) * (come.ndim - 2)) + arrive[:, None])

    def expected_log(self, other: Form, masks: Masks, weights: jax.Array | None = None) -> jax.Array:
        """As `Form` says: log p(z_t+1 = j | z_t = i) is a term of i, plus log transition(i, j), plus a term of j."""
        come, arrive = self._log_factors()
        own, states = numerics.safe_log(self.states), scaled.weighted(other.states, weights)
        leave = logs.less(come, own[:-1])
        here, there = (jnp.where(masks.linked[:, None], part, 0) for part in (states[:-1], states[1:]))
        return (
            _expected(jnp.where(masks.first[:, None], states, 0), own)
            + _expected(here, leave)
            + _expected(there, arrive)
            + _expected(other.moves(weights), numerics.safe_log(self.transition))
        )

    def _log_factors(self) -> tuple[jax.Array, jax.Array]:
        """log come and log arrive (T - 1, K[, L])."""
        come, arrive = (jnp.where(part > logs.lowest(part), part, -jnp.inf) for part in (self.come, self.arrive))
        if self.logarithmic:
            return come, arrive
        of_scaled = numerics.safe_log(self.come), numerics.safe_log(self.arrive)
        if self.in_logs is None:
            return of_scaled
        return jnp.where(self.in_logs > 0, come, of_scaled[0]), jnp.where(self.in_logs > 0, arrive, of_scaled[1])


def _unless_in_logs(*arguments: Any) -> tuple[jax.Array, jax.Array]:
    *factors, in_logs = arguments
    return scaled.moves(*factors), in_logs > 0


@record
class Paths:
    """An average over whole paths: the likeliest one, or draws.

    path (T[, L], n): states; -1 where none is possible
    mass (n,): the probability of each path; they sum to 1
    linked (T - 1[, L]): as in `Chain`
    num_states: K
    """

    path: jax.Array
    mass: jax.Array
    linked: jax.Array | None
    num_states: int = static()

    @property
    def states(self) -> jax.Array:
        """As `Form` says."""
        states = self._indicators(self.path, 1)
        return jnp.sum(states * numerics.to_rank(self.mass, states.ndim), axis=-1)

    def moves(self, weights: jax.Array | None = None) -> jax.Array:
        """As `Form` says."""

        def add(total: jax.Array, step: Any) -> tuple[jax.Array, None]:
            before, after, linked = step
            each = numerics.to_rank(self.mass, before.ndim)
            each = each if linked is None else each * linked[..., None]
            each = each if weights is None else each * weights[..., None]
            before, after = self._indicators(before, 0) * each[None], self._indicators(after, 0)
            flat = self.num_states, -1
            return total + numerics.product(before.reshape(flat), after.reshape(flat), "in,jn->ij"), None

        start = tree.varying(jnp.zeros((self.num_states, self.num_states), self.mass.dtype), self.path)
        return jax.lax.scan(add, start, (self.path[:-1], self.path[1:], self.linked))[0]

    def pairs(self) -> jax.Array:
        """As `Form` says."""
        states = self._indicators(self.path, 1)
        both = states[:-1, :, None] * states[1:, None]
        pairs = jnp.sum(both * numerics.to_rank(self.mass, both.ndim), axis=-1)
        return pairs if self.linked is None else jnp.where(self.linked[:, None, None], pairs, 0)

    def expected_log(self, other: Form, masks: Masks, weights: jax.Array | None = None) -> jax.Array:
        """As `Form` says."""
        return Dense(self.states, self.pairs()).expected_log(other, masks, weights)

    def _indicators(self, path: jax.Array, axis: int) -> jax.Array:
        """1 where the path is, states along one more axis."""
        states = jnp.arange(self.num_states).reshape(*(1,) * axis, -1, *(1,) * (path.ndim - axis))
        return (jnp.expand_dims(path, axis) == states).astype(self.mass.dtype)


@record(kw_only=False)
class Dense:
    """A distribution with all its pairs.

    states (T, K[, L]): q(z_t = k)
    joint (T - 1, K, K[, L]): q(z_t = i, z_t+1 = j), 0 where step t + 1 does not go on from step t
    """

    states: jax.Array
    joint: jax.Array

    def moves(self, weights: jax.Array | None = None) -> jax.Array:
        """As `Form` says."""
        total = scaled.weighted(jnp.sum(self.joint, axis=0), weights)
        return total if total.ndim == 2 else jnp.sum(total, axis=-1)

    def pairs(self) -> jax.Array:
        """As `Form` says."""
        return self.joint

    def expected_log(self, other: Form, masks: Masks, weights: jax.Array | None = None) -> jax.Array:
        """As `Form` says."""
        own, states = numerics.safe_log(self.states), scaled.weighted(other.states, weights)
        conditional = logs.less(numerics.safe_log(self.joint), own[:-1, :, None])
        pairs = jnp.where(masks.linked[:, None, None], scaled.weighted(other.pairs(), weights), 0)
        return _expected(jnp.where(masks.first[:, None], states, 0), own) + _expected(pairs, conditional)


def expected_counts(form: Form, x: Sequences, weights: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Expected starts (K,) and moves (K, K), and states (T, K, B), rows of sequences counted by weights (B,)."""
    states = form.states.reshape(x.num_steps, -1, x.num_rows)
    moves = form.moves(None if weights is None else x.lanes(weights))
    states = scaled.weighted(states, weights)
    starts = states[0] if x.ids is None else jnp.sum(states * x.starts().T[:, None], axis=0)
    return jnp.sum(starts, axis=-1), moves, states


def _expected(probability: jax.Array, log: jax.Array) -> jax.Array:
    """sum probability log, where 0 times anything is 0."""
    used = probability > 0
    return jnp.sum(jnp.where(used, probability * jnp.where(used, log, 0), 0))


@record
class Posterior:
    """The distribution of the states of a model's sequences, in the layout of the data.

    form: the distribution, its arrays time-major
    terms: the evidence of every step (B, T), as sequences like the data's
    alone: whether the data are one sequence, without an axis of sequences
    """

    form: Any
    terms: Sequences
    alone: bool = static(default=False)

    @property
    def evidence(self) -> jax.Array:
        """log p(x) of every sequence: (B,), or (num_sequences,) where they are packed. Under `Hard()`, log p(path, x);
        at a temperature T, T log sum_z p(x, z)^(1/T)."""
        return self.terms.per_sequence(self.terms.values)

    @property
    def states(self) -> jax.Array:
        """p(z_t = k | x): (T, K) for one sequence, (B, T, K) for several; 0 in the padding."""
        return self.terms.in_layout(self.form.states, 0, self.alone)

    @property
    def pairs(self) -> jax.Array:
        """p(z_t = i, z_t+1 = j | x): (T - 1, K, K), or (B, T - 1, K, K), 0 where step t + 1 does not go on from step t.

        K times as large as the states, which is why no E-step computes it.
        """
        pairs = self.form.pairs()
        pairs = jnp.moveaxis(pairs, -1, 0) if self.terms.num_rows > 1 else pairs[None]
        pairs = jnp.where(self.terms.follows()[..., None, None], pairs, 0)
        return pairs[0] if self.alone else pairs

    @property
    def shares(self) -> jax.Array:
        """The states' probabilities, labels last."""
        return self.states

    def relabelled(self, order: jax.Array) -> "ChainPosterior":
        """The same with its state order[k] as state k."""
        return ChainPosterior(states=self.states[..., order], pairs=self.pairs[..., order, :][..., order])

    def entropy(self, weights: jax.Array | None = None) -> jax.Array:
        """Entropy in nats, summed over rows of sequences x weights (B,)."""
        return -self._expected_log(self, weights)

    def kl(self, q: "Posterior", weights: jax.Array | None = None) -> jax.Array:
        """KL(q ‖ this) in nats, summed over rows of sequences x weights (B,)."""
        return q._expected_log(q, weights) - self._expected_log(q, weights)

    def given(self, q: Any) -> "Posterior":
        """What a user gave as distribution of the same states: a `ChainPosterior`, or a posterior of the model.

        Raises TypeError or ValueError where it is none.
        """
        try:
            along = q.along
        except AttributeError:
            raise TypeError(
                f"q must be a ChainPosterior(states, pairs), or what the model's infer returned; got {checks.told(q)}"
            ) from None
        form, _ = along(self.terms)
        if form.states.shape != self.form.states.shape:
            raise ValueError(f"q must have {self.form.states.shape[1]} states; got {form.states.shape[1]}")
        return Posterior(form=form, terms=self.terms, alone=self.alone)

    def along(self, x: Sequences) -> tuple[Form, Sequences | None]:
        """The form, and the evidence of every step; ValueError for sequences of other numbers or lengths."""
        if (x.num_rows, x.num_steps) != self.terms.values.shape:
            raise ValueError(
                f"a posterior of {self.terms.num_rows} sequences of {self.terms.num_steps} steps was given with "
                f"{x.num_rows} of {x.num_steps}"
            )
        return self.form, self.terms

    def _expected_log(self, q: "Posterior", weights: jax.Array | None) -> jax.Array:
        """E_q of the logarithm of this distribution."""
        x, dtype = self.terms, self.form.states.dtype
        masks = Masks(first=x.lanes((x.starts() & x.inside()).T), linked=x.lanes(x.follows().T))
        weights = None if weights is None else x.lanes(jnp.asarray(weights, dtype))
        return self.form.expected_log(q.form, masks, weights)


@record(kw_only=False)
class ChainPosterior:
    """Any distribution q of the states of sequences that is a Markov chain along each of them, written down in full.

    states (B, T, K): q(z_t = k), or (T, K) for one sequence, as a chain's `smooth` returns them
    pairs (B, T - 1, K, K): q(z_t = i, z_t+1 = j), or (T - 1, K, K); their sums over j, and over i, are the states

    What stands in the padding, and where one packed sequence ends and another begins, is not looked at.
    """

    states: jax.Array
    pairs: jax.Array

    def along(self, x: Sequences) -> tuple[Form, Sequences | None]:
        """The distribution as a `Form` for these sequences, and None in place of evidence.

        Raises TypeError or ValueError for arrays of another shape, or for concrete ones that are no distribution.
        """
        states, pairs = checks.array("q.states", self.states), checks.array("q.pairs", self.pairs)
        rows, steps, count = x.num_rows, x.num_steps, states.shape[-1] if states.ndim else 0
        one = rows == 1 and states.ndim == 2
        states, pairs = (states[None], pairs[None]) if one else (states, pairs)
        for name, value, shape in (
            ("states", states, (rows, steps, count)),
            ("pairs", pairs, (rows, steps - 1, count, count)),
        ):
            if value.shape != shape:
                raise ValueError(f"q.{name} must have shape {shape[one:]}; got {value.shape[one:]}")
        inside, follows = x.inside(), x.follows()
        if checks.is_concrete((states, pairs, inside, follows)):
            _check(*map(np.asarray, (states, pairs, inside, follows)))
        dtype = tree.float_dtype(x.values)
        states = jnp.where(inside[..., None], states, 0).astype(dtype)
        pairs = jnp.where(follows[..., None, None], pairs, 0).astype(dtype)
        by_time = (x.lanes(jnp.moveaxis(part, 0, -1)) for part in (states, pairs))
        return Dense(*by_time), None


def _check(states: np.ndarray, pairs: np.ndarray, inside: np.ndarray, follows: np.ndarray) -> None:
    """Raise ValueError for states or pairs that are no distributions, or that contradict each other."""
    checks.distributions("q.states", states[inside])
    inner = np.broadcast_to(follows[..., None], states[:, 1:].shape)
    for axis, part, what in ((3, states[:, :-1], "j"), (2, states[:, 1:], "i")):
        gap = np.abs(pairs.sum(axis=axis) - part)[inner]
        if np.any(pairs[follows] < 0) or not np.all(gap <= checks.SUM_ROUNDING):
            raise ValueError(
                f"q.pairs must be at least 0 and sum to q.states over {what}; the sum differs by {np.max(gap):.3g}"
            )
