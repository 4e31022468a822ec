"""Markov chains that start from their stationary distribution: that distribution, and their M-step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ... import capabilities, numerics, parameters
from ...parts import Probabilities
from ...record import record

# Newton steps at most, and the largest change of a log-probability in one of them.
_STEPS, _LONGEST = 100, 4.0


@capabilities.completed("part")
@record(kw_only=False)
class StationaryTransitions:
    """Transitions A (K, K) of chains that start from their stationary distribution pi(A); a part with two statistics.

    table: the part of transitions alone, with their prior.

    Statistics: (starts (K,), moves (K, K)), expected numbers.
    """

    table: Probabilities

    supports = staticmethod(parameters.simplex)

    def m_step(self, stats: tuple[jax.Array, jax.Array]) -> jax.Array:
        """argmax of `q_function` + `log_prior`; see `stationary_maximum`."""
        starts, moves = stats
        return stationary_maximum(self.table.with_prior(moves), starts)

    def q_function(self, transition: jax.Array, stats: tuple[jax.Array, jax.Array]) -> jax.Array:
        """sum starts log pi(A) + sum moves log A."""
        starts, moves = stats
        start = Probabilities().q_function(stationary_distribution(transition), starts)
        return start + self.table.q_function(transition, moves)

    def log_prior(self, transition: jax.Array) -> jax.Array:
        return self.table.log_prior(transition)

    def degenerate(self, stats: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.zeros(0, bool)

    def num_parameters(self, transition: jax.Array) -> int:
        return self.table.num_parameters(transition)

    def unconstrain(self, transition: jax.Array) -> jax.Array:
        return self.table.unconstrain(transition)

    def constrain(self, theta: jax.Array) -> jax.Array:
        return self.table.constrain(theta)

    def check_value(self, name: str, value: Any) -> None:
        self.table.check_value(name, value)


def stationary_distribution(transition: jax.Array) -> jax.Array:
    """The distribution (K,) that transitions (K, K) leave as it is; where there are several, one of these.

    States are eliminated one by one, the quickest to leave first. Nothing is subtracted, so that every entry is
    exact up to rounding, however small it is (Grassmann, Taksar & Heyman 1985, Operations Research 33).
    """
    rounds, last = _eliminate(transition)

    def back(mass: jax.Array, one: "_Round") -> tuple[jax.Array, None]:
        return mass.at[one.state].set(mass @ one.into), None

    mass, _ = jax.lax.scan(back, last.astype(transition.dtype), rounds, reverse=True)
    return mass / jnp.sum(mass)


def stationary_maximum(moves: jax.Array, starts: jax.Array) -> jax.Array:
    """argmax over transitions A (K, K) of sum moves log A + sum starts log pi(A), pi(A) the stationary distribution.

    moves (K, K): a count of 0 is a transition that cannot be; starts (K,). The sum is concave in the flows
    pi_i A_ij where no state has more moves than starts, and may have several maxima otherwise: Newton's method in
    the logarithms of A, within a trust region (Steihaug 1983, SIAM J. Numerical Analysis 20), starts from the moves,
    from the moves plus the same counts in every row, and from the symmetrised moves, each with rows normalised; the
    highest of the three maxima is returned.
    """
    count, support = len(starts), moves > 0
    total = jnp.sum(starts)
    even = jnp.full_like(moves, total / count**2)
    forgetful = jnp.broadcast_to((starts + total / count) / (2 * count), moves.shape)
    guesses = jnp.stack([moves + 0.01 * even, moves + forgetful, 0.5 * (moves + moves.T) + 0.01 * even])
    found, height = jax.vmap(lambda guess: _climb(_shares(jnp.where(support, guess, 0)), moves, starts))(guesses)
    return found[jnp.argmax(height)]


class _Round(NamedTuple):
    """The elimination of one state.

    state (): its number
    into (K,): its stationary mass per unit of mass of each remaining state
    onward (K,): its transition probabilities to the remaining states
    leave (): the sum of these
    right (L,): its right-hand sides
    """

    state: jax.Array
    into: jax.Array
    onward: jax.Array
    leave: jax.Array
    right: jax.Array


def _eliminate(transition: jax.Array, right: jax.Array | None = None) -> tuple[_Round, jax.Array]:
    """All states but one, eliminated from (I - transition) x = right (K, L), and which one (K,) is left."""
    count = len(transition)
    right = jnp.zeros((count, 0), transition.dtype) if right is None else right

    def step(carry: tuple[jax.Array, jax.Array, jax.Array], _: None) -> tuple[tuple, _Round]:
        chain, right, left = carry
        others = left[None] & left[:, None] & ~jnp.eye(count, dtype=bool)
        chain = jnp.where(others, chain, 0)
        exits = jnp.sum(chain, axis=1)
        state = jnp.argmax(jnp.where(left, exits, -1))
        one = _Round(
            state=state,
            into=numerics.safe_divide(chain[:, state], exits[state]),
            onward=chain[state],
            leave=exits[state],
            right=right[state],
        )
        chain, right = chain + one.into[:, None] * one.onward[None], right + one.into[:, None] * one.right[None]
        return (chain, right, left.at[state].set(False)), one

    (_, _, left), rounds = jax.lax.scan(step, (transition, right, jnp.ones(count, bool)), length=count - 1)
    return rounds, left


def _inverse(transition: jax.Array, stationary: jax.Array) -> jax.Array:
    """X (K, K) with (I - transition) X = I - 1 stationary, unique up to a constant in every column."""
    rounds, _ = _eliminate(transition, jnp.eye(len(stationary), dtype=stationary.dtype) - stationary[None])

    def back(found: jax.Array, one: _Round) -> tuple[jax.Array, None]:
        return found.at[one.state].set(numerics.safe_divide(one.right + one.onward @ found, one.leave)), None

    return jax.lax.scan(back, jnp.zeros_like(transition), rounds, reverse=True)[0]


class _Point(NamedTuple):
    """A chain on the way up.

    transition (K, K): its transitions
    radius (): of the trust region
    steps (): how many were made
    done (): whether the climb is over
    """

    transition: jax.Array
    radius: jax.Array
    steps: jax.Array
    done: jax.Array


def _climb(transition: jax.Array, moves: jax.Array, starts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The transitions (K, K) that Newton's method reaches from a start, and the objective there, the height."""
    eps = jnp.finfo(moves.dtype).eps
    size = jnp.sum(moves) + jnp.sum(starts)

    def step(at: _Point) -> _Point:
        chain = at.transition
        stationary = stationary_distribution(chain)
        slope, bend, weight = _model(chain, stationary, moves, starts)
        move = _trust_region_step(slope, bend, weight, at.radius, size)
        move = move * jnp.minimum(1, _LONGEST / jnp.maximum(jnp.max(jnp.abs(move)), _LONGEST))
        hoped = jnp.sum(move * (slope + 0.5 * bend(move)))
        after = _after(chain, move)
        gained = _gain(chain, after, stationary, move, moves, starts)
        # A predicted gain within rounding cannot be compared with the actual one: that step is taken, as the last.
        last = hoped <= 4 * eps * (
            len(starts) * jnp.sum(starts) + jnp.sum(jnp.where(moves > 0, moves * jnp.abs(move), 0))
        )
        agreement = gained / hoped
        taken = last | (agreement > 1e-3)
        radius = jnp.where(agreement > 0.75, 2 * at.radius, jnp.where(agreement > 0.25, at.radius, 0.25 * at.radius))
        return _Point(
            transition=jnp.where(taken, after, chain),
            radius=radius,
            steps=at.steps + 1,
            done=last | ~jnp.isfinite(hoped) | (radius < eps * jnp.sqrt(size)),
        )

    start = _Point(transition, jnp.sqrt(size), jnp.zeros((), jnp.int32), jnp.zeros((), bool))
    end = jax.lax.while_loop(lambda at: ~at.done & (at.steps < _STEPS), step, start).transition
    logs = jnp.log(jnp.where(end > 0, end, 1))
    stationary = stationary_distribution(end)
    return end, jnp.sum(moves * logs) + jnp.sum(starts * jnp.log(jnp.where(stationary > 0, stationary, 1)))


def _model(transition: jax.Array, stationary: jax.Array, moves: jax.Array, starts: jax.Array) -> tuple:
    """Gradient (K, K) of the height in logarithms of transitions, and its Hessian as a function from (K, K) to (K, K).

    And weights (K, K) of a metric in which the Hessian is near -I: transitions times the row sums of the moves and of
    `pull`, what starts add to the moves in the gradient.
    """
    inverse = _inverse(transition, stationary)
    ratio = numerics.safe_divide(starts, stationary)
    value = inverse @ ratio
    value = value - jnp.min(value)
    pull = stationary[:, None] * transition * value[None]
    counts = moves + pull
    leaving = jnp.sum(counts, axis=1, keepdims=True)

    def bend(move: jax.Array) -> jax.Array:
        changed = transition * move
        changed = changed - transition * jnp.sum(changed, axis=1, keepdims=True)
        drift = (stationary @ changed) @ inverse
        values = inverse @ (changed @ value - numerics.safe_divide(ratio * drift, stationary))
        pulled = stationary[:, None] * (changed * value[None] + transition * values[None])
        pulled = pulled + transition * drift[:, None] * value[None]
        return pulled - changed * leaving - transition * jnp.sum(pulled, axis=1, keepdims=True)

    slope = counts - transition * leaving
    return slope, bend, transition * jnp.maximum(leaving, jnp.finfo(moves.dtype).eps * jnp.sum(starts))


def _trust_region_step(
    slope: jax.Array, bend: Callable, weight: jax.Array, radius: jax.Array, size: jax.Array
) -> jax.Array:
    """The move m (K, K) within a radius that maximises slope · m + m · bend(m) / 2, by conjugate gradients."""

    def dot(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.sum(a * b)

    def eased(rest: jax.Array) -> jax.Array:
        return numerics.safe_divide(rest, weight)

    first = dot(slope, eased(slope))
    goal = first * jnp.clip(first / size, jnp.finfo(slope.dtype).eps ** 2, 0.01)

    def step(carry: tuple) -> tuple:
        move, rest, along, height, number, _ = carry
        bent = -bend(along)
        curve = dot(along, bent)
        length = height / jnp.where(curve > 0, curve, 1)
        longer = move + length * along
        out = (curve <= 0) | (dot(longer, weight * longer) >= radius**2)
        a, b, c = dot(along, weight * along), dot(move, weight * along), dot(move, weight * move) - radius**2
        edge = (jnp.sqrt(jnp.maximum(b**2 - a * c, 0)) - b) / a
        move = jnp.where(out, move + edge * along, longer)
        rest = rest - length * bent
        after = dot(rest, eased(rest))
        return move, rest, eased(rest) + after / height * along, after, number + 1, out

    start = (jnp.zeros_like(slope), slope, eased(slope), first, jnp.zeros((), jnp.int32), jnp.zeros((), bool))
    limit = slope.size
    return jax.lax.while_loop(lambda c: (c[3] > goal) & (c[4] < limit) & ~c[5], step, start)[0]


def _after(transition: jax.Array, move: jax.Array) -> jax.Array:
    """Transitions after a move of their logarithms, rows normalised."""
    return _shares(transition * jnp.exp(move))


def _gain(
    before: jax.Array, after: jax.Array, stationary: jax.Array, move: jax.Array, moves: jax.Array, starts: jax.Array
) -> jax.Array:
    """The rise of the height by a move, without the rounding of the two heights."""
    rise = move - jnp.log1p(jnp.sum(before * jnp.expm1(move), axis=1, keepdims=True))
    new = stationary_distribution(after)
    used = (starts > 0) & (stationary > 0)
    ratio = jnp.where(used, (new - stationary) / jnp.where(used, stationary, 1), 0)
    return jnp.sum(jnp.where(moves > 0, moves * rise, 0)) + jnp.sum(starts * jnp.log1p(ratio))


def _shares(counts: jax.Array) -> jax.Array:
    """Rows over their sums."""
    return numerics.safe_divide(counts, jnp.sum(counts, axis=-1, keepdims=True))
