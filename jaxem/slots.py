"""The interfaces of an algorithm's slots, of its states, and of algorithms; as `protocols` for models and parts.

What an object may leave out, and what then stands in its place, is written down in `capabilities.py`.
"""

from typing import Any, Protocol

import jax

from .nature import Nature
from .protocols import Data, Model, Params, Problem, Stats


class Expect(Protocol):
    """How the posterior of the latents enters the statistics; a model's E-step is handed it."""

    @property
    def nature(self) -> Nature: ...

    def posterior(self, model: Model, params: Params, x: Data) -> Any: ...

    def at(self, step: jax.Array, key: jax.Array | None) -> "Expect":
        """This slot in one step of an algorithm, as a schedule may change it, with the key of its draws."""
        ...

    def fold(self, number: jax.Array | int) -> "Expect":
        """The same with draws of its own for a part of the rows."""
        ...


class Gather(Protocol):
    """How statistics are summed over the data; `state` is what the slot remembers between steps.

    A gather that remembers nothing, and whose first statistics are made as all others are, leaves out `init`: a
    compiled fit then holds its E-step once.
    """

    @property
    def nature(self) -> Nature: ...

    @property
    def rate(self) -> Any:
        """The fraction of its statistics that an update renews: a number, or a function of the update's number."""
        ...

    @property
    def init(self) -> Any:
        """(problem, params, expect, key) -> statistics, state; None where `step` makes the first ones too."""
        ...

    def rounds(self, problem: Problem) -> int:
        """How many rounds, of an M-step and a `step` each, one EM step takes; `index` is the number of the round."""
        ...

    def passes(self, problem: Problem) -> float:
        """Passes over the data in these rounds."""
        ...

    def step(
        self, problem: Problem, params: Params, stats: Stats, state: Any, expect: Expect, index: jax.Array | int
    ) -> tuple[Stats, Any]:
        """Statistics at `params`, given those of the step before."""
        ...


class Maximize(Protocol):
    """How parameters are made from statistics; `state` is what the slot remembers between steps.

    Where M-steps are known to stay below the maximum of Q, their state shows by how much, as `missed`.
    """

    @property
    def nature(self) -> Nature: ...

    def init(self, problem: Problem, params: Params) -> Any: ...

    def rounds(self, problem: Problem, params: Params) -> int:
        """How many rounds, of a `step` and an E-step each, one EM step takes; `index` is the number of the round."""
        ...

    def step(
        self, problem: Problem, params: Params, stats: Stats, state: Any, index: jax.Array | int, key: jax.Array | None
    ) -> tuple[Params, Any]:
        """Parameters from statistics; key: for its draws, where its nature is stochastic and the algorithm has one."""
        ...


class State(Protocol):
    """What every algorithm's state shows: parameters, and the log-likelihood at exactly these."""

    @property
    def params(self) -> Params: ...

    @property
    def stats(self) -> Stats: ...

    @property
    def loglik(self) -> jax.Array | None: ...

    @property
    def num_passes(self) -> jax.Array: ...

    @property
    def waiting(self) -> jax.Array | None:
        """Whether the E-step at the start is yet to be made: the next step is that alone. None where it never waits."""
        ...

    @property
    def left(self) -> jax.Array | None:
        """Its own estimate of what is still to be gained, in place of the loop's; None where it has none."""
        ...

    @property
    def missed(self) -> jax.Array | float:
        """By how much the last M-step is known to be below the maximum of Q + log-prior, in nats."""
        ...

    @property
    def settled(self) -> jax.Array | bool:
        """False while a schedule still changes the objective itself."""
        ...

    @property
    def certified(self) -> jax.Array | bool:
        """Whether no direction was found in which more is left."""
        ...


class Algorithm(Protocol):
    """An EM step, or what is around one."""

    def nature(self, model: Model) -> Nature:
        """What it is where it fits this model."""
        ...

    def limit(self, model: Model, params: Params, x: Data, weights: jax.Array | None = None) -> tuple[Params, Any]:
        """T(params), for a smooth map T whose fixed points are this algorithm's limits, and the state at `params`."""
        ...

    @property
    def certify(self) -> Any:
        """(model, state, x, weights, allowed) -> the state to go on from and whether it is higher by more than
        `allowed` nats, asked where a fit seems to have ended; None where nothing is looked at again."""
        ...

    def init(
        self, model: Model, params: Params, x: Data, weights: jax.Array | None = None, key: jax.Array | None = None
    ) -> Any: ...

    def begin(
        self, model: Model, params: Params, x: Data, weights: jax.Array | None = None, key: jax.Array | None = None
    ) -> Any:
        """The state that a compiled fit begins with: `init`, or one that is `waiting`, to compile one E-step only."""
        ...

    def step(self, model: Model, state: Any, x: Data, weights: jax.Array | None = None) -> Any: ...

    def evaluated(self, model: Model, state: Any, x: Data, weights: jax.Array | None = None) -> Any:
        """The state with the log-likelihood of all rows at its parameters; itself where that is what it has."""
        ...
