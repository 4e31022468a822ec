"""Item characteristic curves: their parameters and statistics, and the M-step, a logistic regression an item.

Letters: J items, Q nodes of the ability, at which curves are evaluated.
"""

import functools

import jax
import jax.numpy as jnp

from .. import numerics
from ..families import columns
from ..record import record

# Newton steps of an M-step. They begin at the previous curves, from which a few suffice.
_NEWTON_STEPS = 12

# Lengths at which a Newton step is tried; the first that does not lower the likelihood is taken.
_LENGTHS = (1.0, 0.3, 0.1, 0.03, 0.003, 0.0)


@record
class ItemResponseParams:
    """logit p(answer right) = discrimination (ability - difficulty), unless it is guessed.

    discrimination: (J,).
    difficulty: (J,).
    guessing: (J,), p(right | the answer is not known); None where nobody guesses.
    """

    discrimination: jax.Array
    difficulty: jax.Array
    guessing: jax.Array | None = None


@record
class ItemResponseStats:
    """Expected counts at every node of the ability; all add.

    nodes: (Q,), rows.
    total: (J, Q), answers.
    correct: (J, Q), right answers.
    known: (J, Q), right answers that are not guessed; equal to `correct` where nobody guesses.
    entropy: (), of which right answers are guessed: with it Q is a lower bound that touches the likelihood.
    reference: (2, J), rows times slopes, and times intercepts, of the E-step: the M-step begins there.
    loglik: ().
    """

    nodes: jax.Array
    total: jax.Array
    correct: jax.Array
    known: jax.Array
    entropy: jax.Array
    reference: jax.Array
    loglik: jax.Array

    @property
    def line(self) -> tuple[jax.Array, jax.Array]:
        """Slopes and intercepts (J,) of the E-step."""
        line = self.reference / (jnp.sum(self.nodes) + columns.PSEUDO_COUNT)
        return line[0], line[1]


@record
class Curves:
    """Curves at abilities, (J, Q) each.

    right, wrong: log p of a right and of a wrong answer.
    knows, fails: log p that the answer is known, and that it is not.
    """

    right: jax.Array
    wrong: jax.Array
    knows: jax.Array
    fails: jax.Array


@jax.jit
def curves(params: ItemResponseParams, abilities: jax.Array) -> Curves:
    """The curves of all items at abilities (Q,)."""
    eta = params.discrimination[:, None] * (abilities[None] - params.difficulty[:, None])
    knows, fails = -jax.nn.softplus(-eta), -jax.nn.softplus(eta)
    if params.guessing is None:
        return Curves(right=knows, wrong=fails, knows=knows, fails=fails)
    guessing = params.guessing[:, None]
    wrong = jnp.log1p(-guessing) + fails
    return Curves(
        right=jnp.logaddexp(knows, numerics.safe_log(guessing) + fails), wrong=wrong, knows=knows, fails=fails
    )


def information(params: ItemResponseParams, abilities: jax.Array) -> jax.Array:
    """(dp / d ability)² / (p (1 - p)), p that of a right answer, at abilities (Q,): (J, Q)."""
    found = curves(params, abilities)
    return jnp.square(params.discrimination)[:, None] * jnp.exp(2 * found.knows + found.wrong - found.right)


@jax.jit
def known(found: Curves, correct: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many of the right answers (J, Q) are expected to be known, and the entropy of which of them are, ()."""
    share = jnp.exp(found.knows - found.right)
    entropy = jax.scipy.special.entr(share) + jax.scipy.special.entr(1 - share)
    return correct * share, jnp.sum(correct * entropy)


def line_of(params: ItemResponseParams) -> tuple[jax.Array, jax.Array]:
    """Slopes and intercepts (J,)."""
    return params.discrimination, -params.discrimination * params.difficulty


@functools.partial(jax.jit, static_argnames="slopes")
def steepest(
    known: jax.Array, total: jax.Array, line: tuple[jax.Array, jax.Array], nodes: jax.Array, slopes: str
) -> tuple[jax.Array, jax.Array]:
    """Slopes and intercepts (J,) of the logistic regressions of known among total answers (J, Q) on nodes (Q,).

    slopes: "one" where all are 1, "common" where they are the same, or "own". By Newton's method from `line`, its steps
    shortened where they would lower the likelihood. Intercepts are eliminated: a slope's step is on centred nodes.
    """
    tiny = jnp.asarray(columns.PSEUDO_COUNT, known.dtype)

    def values(slope: jax.Array, intercept: jax.Array) -> jax.Array:
        eta = slope[:, None] * nodes[None] + intercept[:, None]
        every = jnp.sum(known * eta - total * jax.nn.softplus(eta), axis=1)
        return jnp.sum(every, keepdims=True) if slopes == "common" else every

    def climb(_: int, line: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        slope, intercept = line
        eta = slope[:, None] * nodes[None] + intercept[:, None]
        score = known - total * jax.nn.sigmoid(eta)
        curvature = total * jax.nn.sigmoid(eta) * jax.nn.sigmoid(-eta)
        weight = jnp.sum(curvature, axis=1) + tiny
        centre = jnp.sum(curvature * nodes[None], axis=1) / weight
        apart = nodes[None] - centre[:, None]
        up, bend = jnp.sum(score * apart, axis=1), jnp.sum(curvature * jnp.square(apart), axis=1)
        if slopes == "one":
            turn = jnp.zeros_like(slope)
        elif slopes == "common":
            turn = jnp.broadcast_to(jnp.sum(up) / (jnp.sum(bend) + tiny), slope.shape)
        else:
            turn = up / (bend + tiny)
        lift = jnp.sum(score, axis=1) / weight - centre * turn
        lengths = jnp.asarray(_LENGTHS, slope.dtype)
        tried = jax.vmap(lambda length: values(slope + length * turn, intercept + length * lift))(lengths)
        allowed = tried[-1] - 4 * jnp.finfo(slope.dtype).eps * jnp.abs(tried[-1])
        length = lengths[jnp.argmax(tried >= allowed[None], axis=0)]
        return slope + length * turn, intercept + length * lift

    return jax.lax.fori_loop(0, _NEWTON_STEPS, climb, line)
