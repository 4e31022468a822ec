"""How parameters are made from expected statistics."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from .. import checks, tree
from ..capabilities import complete, completed, original
from ..parts import conjugacy
from ..protocols import Model, Nature, Params, Problem, Stats
from ..record import record, static

# Fractions of its length at which a gradient step is tried; the longest that does not lower Q is taken.
_SHORTER = tuple(2.0**-power for power in (0, 1, 2, 3, 5, 8, 12, 20))

# Steps of conjugate gradients by which what an M-step left of Q is estimated.
_CURVATURES = 10


@completed("maximize")
@record
class ClosedForm:
    """The model's own M-step; for a model without one, `Gradient()`. Where Q itself takes a pass over the rows, its
    L-BFGS has no line search: the lengths that `Gradient` tries side by side replace it."""

    def init(self, problem: Problem, params: Params) -> Any:
        return _climber(problem.model).init(problem, params) if problem.model.m_step is None else None

    def step(
        self, problem: Problem, params: Params, stats: Stats, state: Any, index: jax.Array | int, key: jax.Array | None
    ) -> tuple[Params, Any]:
        if problem.model.m_step is None:
            return _climber(problem.model).step(problem, params, stats, state, index, key)
        return problem.model.m_step(stats), None


@completed("maximize")
@record
class Expanded:
    """PX-EM: the M-step of a larger model with the same likelihoods, whose additional parameters are then absorbed.

    For models with `expanded`; for others it is their own M-step. Steps never lower the objective, as EM's, and are no
    longer slowed by the location and scale of the latents: a factor model's loadings absorb the estimated covariance of
    its factors at once, which in EM tends to I only slowly.
    Liu, Rubin & Wu (1998), Parameter expansion to accelerate EM: the PX-EM algorithm, Biometrika 85.
    """

    def step(
        self,
        problem: Problem,
        params: Params,
        stats: Stats,
        state: None,
        index: jax.Array | int,
        key: jax.Array | None,
    ) -> tuple[Params, None]:
        return problem.model.expanded(problem.model.m_step(stats), stats), None


@completed("maximize")
@record
class Draw:
    """Draw the parameters from their posterior given the statistics, in place of its mode: Gibbs sampling.

    With `Sample(1)` in the E-step that is data augmentation (Tanner & Wong 1987; Diebolt & Robert 1994): a state's
    parameters are a Markov chain whose distribution tends to the posterior, and which never settles; see `gibbs` and
    `trajectory`. With `Exact()` parameters are drawn as if expected latents had been seen, which is no such chain.
    For all models whose parts have conjugate priors; a part of probabilities without a prior has the flat one.
    Raises TypeError for models with a part that cannot be drawn, or without a key.
    """

    nature = Nature(stochastic=True)

    def step(
        self, problem: Problem, params: Params, stats: Stats, state: None, index: jax.Array | int, key: jax.Array | None
    ) -> tuple[Params, None]:
        if key is None:
            raise TypeError("Draw() draws at random and has no key: pass key=...")
        return conjugacy.drawn(problem.model, key, stats), None


@record
class Ascent:
    """What gradient steps remember.

    optimizer: the optimiser's state.
    total: the weight of all rows, which Q is divided by.
    missed: what the last M-step is known to have left of Q + log-prior, in nats.
    """

    optimizer: Any
    total: jax.Array
    missed: jax.Array


_LBFGS = optax.lbfgs(memory_size=8)
_WITHOUT_SEARCH = optax.lbfgs(memory_size=8, linesearch=None)


@completed("maximize")
@record(kw_only=False)
class Gradient:
    """Generalised EM: steps of an optax optimiser up Q + log-prior, per row, in unconstrained coordinates.

    optimizer: any optax GradientTransformation, L-BFGS by default; build it once, since it is part of the jit key.
    num_steps: its steps in one EM step.

    The optimiser's state is carried from one EM step to the next. A step that would lower Q is shortened, down to a
    millionth, or refused, and then the optimiser starts anew: so no EM step lowers the objective (Dempster, Laird &
    Rubin 1977, section 3: GEM). A gradient step uses the statistics at hand, and does not touch the data, unless the
    model has no statistics that determine Q (`from_log_joint`).
    Raises TypeError for what is no optax optimiser, for models without `q_function`, and for states of
    another optimiser; ValueError for num_steps below 1.
    """

    optimizer: Any = static(default=_LBFGS)
    num_steps: int = static(default=5)

    nature = Nature(inexact=True)

    def __post_init__(self) -> None:
        optimizer = complete("optimizer", self.optimizer)
        if not (callable(optimizer.init) and callable(optimizer.update)):
            raise TypeError(
                "optimizer must be an optax GradientTransformation, as optax.adam(1e-2) or optax.lbfgs(); "
                f"got {self.optimizer!r}"
            )
        checks.positive_integer("num_steps", self.num_steps)

    def init(self, problem: Problem, params: Params) -> Ascent:
        if problem.model.q_function is None:
            raise TypeError(
                "a gradient M-step climbs Q, and this model has no q_function(params, stats): give it one, or an m_step"
            )
        theta, total = problem.model.unconstrain(params), problem.total
        return Ascent(optimizer=self.optimizer.init(theta), total=total, missed=jnp.full_like(total, jnp.inf))

    def step(
        self,
        problem: Problem,
        params: Params,
        stats: Stats,
        state: Ascent,
        index: jax.Array | int,
        key: jax.Array | None,
    ) -> tuple[Params, Ascent]:
        model = problem.model
        theta = model.unconstrain(params)
        self._check_state(theta, state)
        climbed = _climbed(problem, params, stats)

        def descent(theta: Any) -> jax.Array:
            return -climbed(model.constrain(theta)) / state.total

        update = optax.with_extra_args_support(self.optimizer).update

        def one(_: int, carry: tuple[Any, Any, jax.Array, Any]) -> tuple[Any, Any, jax.Array, Any]:
            theta, optimizer, value, slope = carry
            move, remembered = update(slope, optimizer, theta, value=value, grad=slope, value_fn=descent)
            lengths = jnp.asarray(_SHORTER, value.dtype)
            tried = jax.vmap(lambda length: descent(_along(theta, move, length)))(lengths)
            good = tried <= value  # False for NaN
            length = lengths[jnp.argmax(good)]
            moved = tree.all_finite(move) & jnp.any(good)
            theta = tree.where(moved, _along(theta, move, length), theta)
            optimizer = tree.where(moved, remembered, self.optimizer.init(theta))
            return (theta, optimizer, *jax.value_and_grad(descent)(theta))

        start = (theta, state.optimizer, *jax.value_and_grad(descent)(theta))
        theta, optimizer, _, slope = jax.lax.fori_loop(0, self.num_steps, one, start)
        missed = state.total * _decrement(descent, theta, slope)
        return model.constrain(theta), dataclasses.replace(state, optimizer=optimizer, missed=missed)

    def _check_state(self, theta: Any, state: Any) -> None:
        expected = jax.eval_shape(self.optimizer.init, theta)
        given = state.optimizer if isinstance(state, Ascent) else state
        made: Any = jax.tree.structure(given)
        if made != jax.tree.structure(expected):
            raise TypeError(
                "this state was made by another optimiser: start from EM(...).init with the algorithm that steps it"
            )


@completed("maximize")
@record(kw_only=False)
class Conditional:
    """ECM: Q is maximised over one block of parameters after the other, the rest held where they are.

    blocks: names as the model's `blocks(params)` declares them, such as "weights" or "components.mean"; a tuple of
        names is one block. Without any, every declared name is a block. Parameters in no block stay as they are.
    multicycle: whether there is an E-step before every block; a step still goes through all of them.
    Meng & Rubin (1993), Maximum likelihood estimation via the ECM algorithm, Biometrika 80.
    Raises TypeError for models that declare no blocks, ValueError for names that they do not have.
    """

    blocks: tuple[Any, ...] = static(default=())
    multicycle: bool = static(default=False)

    def __post_init__(self) -> None:
        blocks = (self.blocks,) if isinstance(self.blocks, str) else tuple(self.blocks)
        blocks = tuple((block,) if isinstance(block, str) else tuple(block) for block in blocks)
        names = [name for block in blocks for name in block]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"blocks must name a parameter once; got {twice[0]!r} more than once")
        object.__setattr__(self, "blocks", blocks)

    def init(self, problem: Problem, params: Params) -> None:
        self._blocks(problem.model, params)

    def rounds(self, problem: Problem, params: Params) -> int:
        """How many E-steps a step has."""
        return len(self._blocks(problem.model, params)) if self.multicycle else 1

    def step(
        self, problem: Problem, params: Params, stats: Stats, state: None, index: jax.Array | int, key: jax.Array | None
    ) -> tuple[Params, None]:
        model = problem.model
        m_steps: list[Callable] = [
            functools.partial(model.m_step_for, stats=stats, names=block) for block in self._blocks(model, params)
        ]
        if self.multicycle:
            known = isinstance(index, int)
            return (m_steps[index](params) if known else jax.lax.switch(index, m_steps, params)), None
        for m_step in m_steps:
            params = m_step(params)
        return params, None

    def _blocks(self, model: Model, params: Params) -> tuple[tuple[str, ...], ...]:
        """The blocks, checked against those that the model declares."""
        if model.m_step_for is None:
            raise TypeError(
                f"{type(original(model)).__name__} declares no blocks of parameters (blocks and m_step_for)"
            )
        declared = tuple(model.blocks(params))
        names = [name for block in self.blocks for name in block]
        unknown = [name for name in names if name not in declared]
        if unknown:
            raise ValueError(f"blocks must be among {', '.join(map(repr, declared))}; got {unknown[0]!r}")
        return self.blocks or tuple((name,) for name in declared)


def _climber(model: Model) -> Gradient:
    """What climbs Q where the model has no M-step."""
    return Gradient() if model.q_on_rows is None else Gradient(_WITHOUT_SEARCH)


def surrogate(model: Model, params: Params, stats: Stats) -> jax.Array:
    """What an M-step maximises: Q + log-prior."""
    return model.q_function(params, stats) + model.log_prior(params)


def _climbed(problem: Problem, params: Params, stats: Stats) -> Callable[[Params], jax.Array]:
    """Q + log-prior as a function of the parameters, given statistics that were taken at `params`."""
    model = problem.model
    if model.q_on_rows is None:
        return lambda new: surrogate(model, new, stats)
    on_rows = model.q_on_rows(params, stats, problem.x, problem.weights)
    return lambda new: on_rows(new) + model.log_prior(new)


def _decrement(function: Callable[[Any], jax.Array], theta: Any, slope: Any) -> jax.Array:
    """What a Newton step from theta would lower a function by, gᵀH⁻¹g / 2; infinite where it is not convex.

    slope: its gradient g at theta.

    By conjugate gradients, whose every iterate is a lower bound (Nocedal & Wright, Numerical Optimization, section
    5.1): a step that an optimiser refused or made too small is not taken for the end of the ascent.
    """
    at, unravel = ravel_pytree(theta)
    start, _ = ravel_pytree(slope)

    def curved(direction: jax.Array) -> jax.Array:
        along = jax.jvp(jax.grad(lambda flat: function(unravel(flat))), (at,), (direction,))[1]
        return jnp.where(start != 0, along, 0)  # what cannot move does not count

    def improve(_: int, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        rest, direction, square, found = carry
        image = curved(direction)
        bend = direction @ image
        length = square / jnp.where(bend > 0, bend, 1)
        found = jnp.where(square > 0, found + jnp.where(bend > 0, 0.5 * length * square, jnp.inf), found)
        rest = rest - length * image
        after = rest @ rest
        return rest, rest + after / jnp.where(square > 0, square, 1) * direction, after, found

    square = start @ start
    first = (start, start, square, jnp.zeros_like(square))
    return jax.lax.fori_loop(0, min(at.size, _CURVATURES), improve, first)[-1]


def _along(theta: Any, move: Any, length: jax.Array) -> Any:
    return jax.tree.map(lambda at, step: at + length * step, theta, move)
