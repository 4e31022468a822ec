"""One EM step: maximize after gather after expect, as data."""

from typing import Any

import jax

from .. import protocols
from ..latents import Exact
from ..protocols import Data, Params, Stats
from ..record import record
from .gather import Full
from .maximize import ClosedForm


@record
class EMState:
    """Parameters, and the statistics and log-likelihood at exactly these parameters.

    `gather` and `maximize` hold what those slots remember; `key` drives what is random in them.
    """

    params: Params
    stats: Stats
    loglik: jax.Array | None
    gather: Any
    maximize: Any
    key: jax.Array | None


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
    def monotone(self) -> bool:
        """Whether exact arithmetic would never lower the objective."""
        return True

    def init(
        self, model: Any, params: Params, x: Data, weights: jax.Array | None = None, key: jax.Array | None = None
    ) -> EMState:
        """The state at a start: one E-step."""
        stats, gather = self.gather.init(model, params, x, weights, self.expect, key)
        return EMState(
            params=params,
            stats=stats,
            loglik=stats.loglik,
            gather=gather,
            maximize=self.maximize.init(model, params),
            key=key,
        )

    def step(self, model: Any, state: EMState, x: Data, weights: jax.Array | None = None) -> EMState:
        """M-step from the statistics at hand, then the E-step at the new parameters."""
        params, maximize = self.maximize.step(model, state.params, state.stats, state.maximize)
        stats, gather = self.gather.step(model, params, state.gather, x, weights, self.expect)
        return EMState(params=params, stats=stats, loglik=stats.loglik, gather=gather, maximize=maximize, key=state.key)
