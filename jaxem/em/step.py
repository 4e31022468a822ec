"""One EM step: maximize after gather after expect, as data."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from .. import protocols, tree
from ..latents import Exact
from ..protocols import Data, Params, Stats
from ..record import record
from .gather import Full, e_step_on_all, units
from .maximize import ClosedForm


@record
class EMState:
    """Parameters, and the statistics and log-likelihood at exactly these parameters.

    `gather` and `maximize` hold what those slots remember; `key` drives what is random; num_passes:
    E-steps so far, counted in passes over the data. Where a gather sees a part of the rows at a time,
    statistics and log-likelihood are its running account of all of them.
    """

    params: Params
    stats: Stats
    loglik: jax.Array | None
    gather: Any
    maximize: Any
    key: jax.Array | None
    num_steps: jax.Array
    num_passes: jax.Array

    @property
    def missed(self) -> jax.Array | float:
        """What the last M-step is known to have left of Q + log-prior."""
        return getattr(self.maximize, "missed", 0.0)


def of_inner(name: str) -> Any:
    """What a wrapper's state shows of the EM state inside it."""
    return property(lambda self: getattr(self.inner, name))


@record
class EM:
    """The EM algorithm (Dempster, Laird & Rubin 1977) in three slots.

    expect: the posterior of the latents; gather: how statistics are summed over the data;
    maximize: how parameters are made from them. A state is always consistent: its statistics
    and log-likelihood belong to its parameters, so an objective is never one step stale.
    """

    expect: Any = Exact()
    gather: protocols.Gather = Full()
    maximize: protocols.Maximize = ClosedForm()

    @property
    def stochastic(self) -> bool:
        """Whether steps are random to the end, so that no fit can be told to have converged."""
        return getattr(self.expect, "stochastic", False) or getattr(self.gather, "stochastic", False)

    @property
    def monotone(self) -> bool:
        """Whether exact arithmetic would never lower the objective."""
        return not self.stochastic and getattr(self.gather, "monotone", True)

    def inexact(self, model: Any) -> bool:
        """Whether M-steps stop short of the maximum, some more than others."""
        return getattr(self.maximize, "inexact", False) or not hasattr(model, "m_step")

    @property
    def complete(self) -> bool:
        """Whether a state's statistics are those of all rows at its parameters."""
        return getattr(self.gather, "complete", True)

    @property
    def waits(self) -> bool:
        """Whether a start is one E-step and no more, so that it can be left to the program of the steps."""
        return getattr(self.gather, "stateless", False) and not getattr(self.maximize, "multicycle", False)

    def init(
        self, model: Any, params: Params, x: Data, weights: jax.Array | None = None, key: jax.Array | None = None
    ) -> EMState:
        """The state at a start: one E-step. Raises TypeError where a random algorithm gets no key."""
        x = units(model, x)
        step = jnp.zeros((), jnp.int32)
        key, gathers = (None, None) if key is None else jax.random.split(key)
        key, own = self._split(key)
        stats, gather = self.gather.init(model, params, x, weights, self._expect(step, own), gathers)
        return EMState(
            params=params,
            stats=stats,
            loglik=stats.loglik,
            gather=gather,
            maximize=self.maximize.init(model, params, tree.total_weight(x, weights)),
            key=key,
            num_steps=step,
            num_passes=jnp.asarray(min(1.0, self._passes(x)), tree.float_dtype(x)),
        )

    def waiting(
        self, model: Any, params: Params, x: Data, weights: jax.Array | None = None, key: jax.Array | None = None
    ) -> EMState:
        """A state before the E-step at its start, which `go_on` makes, where this algorithm `waits`.

        So that a compiled fit holds its E-step once. Raises as `init` does.
        """

        def start(params: Params, key: jax.Array | None) -> EMState:
            state = self.init(model, params, x, weights, key)
            return dataclasses.replace(state, key=None, params=None, maximize=None)

        blank = tree.zeros_like(jax.eval_shape(start, params, key))
        x = units(model, x)
        return dataclasses.replace(
            blank,
            params=params,
            maximize=self.maximize.init(model, params, tree.total_weight(x, weights)),
            key=None if key is None else jax.random.split(key)[0],
            num_steps=blank.num_steps - 1,
        )

    def go_on(self, model: Any, state: EMState, x: Data, weights: jax.Array | None = None) -> EMState:
        """`step`, or the E-step at its start where a state waits for that."""
        return self._step(model, state, x, weights, state.num_steps < 0)

    def step(self, model: Any, state: EMState, x: Data, weights: jax.Array | None = None) -> EMState:
        """M-step from the statistics at hand, then the E-step at the new parameters.

        Where slots work in parts, pieces of the data or blocks of parameters, a step is one turn of all.
        """
        return self._step(model, state, x, weights, None)

    def _step(self, model: Any, state: EMState, x: Data, weights: jax.Array | None, waits: jax.Array | None) -> EMState:
        x = units(model, x)
        pieces = self.gather.parts(x) if hasattr(self.gather, "parts") else 1
        blocks = self.maximize.parts(model, state.params) if hasattr(self.maximize, "parts") else 1

        def part(index: jax.Array | int, state: EMState) -> EMState:
            params, maximize = self.maximized(model, state, index // pieces)
            if waits is not None:
                # What the M-step makes of no statistics counts for nothing.
                params, maximize = tree.where(waits, (state.params, state.maximize), (params, maximize))
            state = dataclasses.replace(state, maximize=maximize)
            return self.moved(model, state, params, x, weights, index % pieces)

        total = pieces * blocks
        state = part(0, state) if total == 1 else jax.lax.fori_loop(0, total, part, state)
        return dataclasses.replace(
            state,
            num_steps=state.num_steps + 1,
            num_passes=state.num_passes + blocks * self._passes(x),
        )

    def maximized(self, model: Any, state: EMState, part: jax.Array | int = 0) -> tuple[Params, Any]:
        """The parameters that a state's statistics lead to, and what the slot remembers then."""
        return self.maximize.step(model, state.params, state.stats, state.maximize, part)

    def moved(
        self,
        model: Any,
        state: EMState,
        params: Params,
        x: Data,
        weights: jax.Array | None = None,
        part: jax.Array | int = 0,
    ) -> EMState:
        """The state at other parameters: the E-step there."""
        key, own = self._split(state.key)
        expect = self._expect(state.num_steps + 1, own)
        stats, gather = self.gather.step(model, params, state.stats, state.gather, x, weights, expect, part)
        return dataclasses.replace(state, params=params, stats=stats, loglik=stats.loglik, gather=gather, key=key)

    def evaluated(self, model: Any, state: EMState, x: Data, weights: jax.Array | None = None) -> EMState:
        """The state with the log-likelihood of all rows at its parameters; itself where that is what it has."""
        return state if self.complete else self.exactly(model, state, x, weights)

    def exactly(self, model: Any, state: EMState, x: Data, weights: jax.Array | None = None) -> EMState:
        """The state after an E-step on all rows, without draws."""
        expect = Exact() if getattr(self.expect, "stochastic", False) else self.expect
        x = units(model, x)
        stats = e_step_on_all(model, state.params, x, weights, expect)
        return dataclasses.replace(state, stats=stats, loglik=stats.loglik, num_passes=state.num_passes + 1)

    def _split(self, key: jax.Array | None) -> tuple[jax.Array | None, jax.Array | None]:
        """The key of the steps to come and that of this one's draws, where there are any."""
        if key is None or not getattr(self.expect, "stochastic", False):
            return key, None
        key, own = jax.random.split(key)
        return key, own

    def _expect(self, step: jax.Array, key: jax.Array | None) -> Any:
        """What the slot `expect` is in this step."""
        return self.expect.at(step, key) if hasattr(self.expect, "at") else self.expect

    def _passes(self, x: Data) -> float:
        """Passes over the data that a gather makes in a step."""
        return self.gather.passes(x) if hasattr(self.gather, "passes") else 1.0


def objective(model: Any, state: Any) -> jax.Array:
    """log-likelihood + log-prior at a state's parameters; NaN where the model tells no log-likelihood."""
    if state.loglik is None:
        return jnp.full_like(state.num_passes, jnp.nan)
    prior = model.log_prior(state.params) if hasattr(model, "log_prior") else 0
    return jnp.asarray(state.loglik + prior, state.num_passes.dtype)
