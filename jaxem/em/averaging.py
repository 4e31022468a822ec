"""Averaging: parameters from the mean of the statistics that a stochastic algorithm wanders through."""

import dataclasses

import jax
import jax.numpy as jnp

from ..capabilities import complete, completed
from ..protocols import AnyModel, Data, Nature, Params, Stats
from ..record import record, static
from .gather import pose
from .maximize import ClosedForm
from .minibatch import mix, rate_at
from .step import EM, EMState, of_inner

# Averages are compared once their statistics have been renewed so many times over.
_FEWEST_RENEWALS = 8


@completed("state")
@record
class AveragedState:
    """What averaging remembers.

    inner: the EM state.
    mean: statistics averaged over the steps since `start`, later ones with more weight.
    params: the M-step of `mean`.
    anchor: params when the number of averaged steps was last a power of two.
    rise: how much Q rose between the last two anchors.
    renewed: the sum of the rates of the averaged steps: how many times over they have replaced the statistics.
    left: an estimate of what is still to be gained, from how much Q changed between anchors.
    """

    inner: EMState
    mean: Stats
    params: Params
    anchor: Params
    rise: jax.Array
    renewed: jax.Array
    left: jax.Array

    stats, loglik, num_passes = map(of_inner, ("stats", "loglik", "num_passes"))


@completed("algorithm")
@record
class Averaged:
    """Polyak-Ruppert averaging: parameters from the mean of the statistics of all steps after the first `start`.

    inner: the algorithm that is averaged, which goes on from its own parameters.
    start: how many steps are left out.

    Statistics are averaged, not parameters, so that the result is in the domain. Their weights grow with the step, so
    that early steps are soon forgotten (Shamir & Zhang 2013, with eta = 1). Whenever the number of steps has doubled,
    the average is compared with the one before. The rise of Q between them shrinks from one doubling to the next once
    the average has settled, and grows while it still drifts. The series of rises therefore estimates what is left to
    gain, and a fit has converged when that is at most `tol` per unit of weight. Statistics that small rates have hardly
    renewed are not compared.
    Polyak & Juditsky (1992), Acceleration of stochastic approximation by averaging; Cappé & Moulines (2009).
    """

    inner: EM
    start: int = static(default=0)

    def nature(self, model: AnyModel) -> Nature:
        return Nature(stochastic=True, monotone=False, complete=False)

    def init(
        self, model: AnyModel, params: Params, x: Data, weights: jax.Array | None = None, key: jax.Array | None = None
    ) -> AveragedState:
        problem = pose(model, x, weights)
        if problem.model.m_step is None:
            raise TypeError("averaged needs a model with an m_step of its own, for the mean of its statistics")
        inner = self.inner.started(problem, params, key)
        far = jnp.full((), jnp.inf, inner.num_passes.dtype)
        return AveragedState(
            inner=inner,
            mean=inner.stats,
            params=params,
            anchor=params,
            rise=far,
            renewed=jnp.zeros_like(far),
            left=far,
        )

    def step(self, model: AnyModel, state: AveragedState, x: Data, weights: jax.Array | None = None) -> AveragedState:
        inner = self.inner.step(model, state.inner, x, weights)
        model = complete("model", model)
        count = jnp.maximum(inner.num_steps - self.start, 1)
        mean = mix(model, inner.params, state.mean, inner.stats, 2 / (count + 1))
        params = model.m_step(mean)
        rate = rate_at(complete("gather", self.inner.gather).rate, inner.num_steps)
        renewed = jnp.where(count > 1, state.renewed, 0) + jnp.asarray(rate, state.left.dtype)
        doubled = (count & (count - 1) == 0) & (count > 1)
        rise, left = state.rise, state.left
        if model.q_function is not None:

            def compared() -> tuple[jax.Array, jax.Array]:
                rise = jnp.abs(model.q_function(params, mean) - model.q_function(state.anchor, mean))
                ratio = rise / state.rise
                return rise, jnp.where(ratio < 1, rise / jnp.where(ratio < 1, 1 - ratio, 1), jnp.inf)

            comparable = doubled & (renewed >= _FEWEST_RENEWALS)
            rise, left = jax.lax.cond(comparable, compared, lambda: (rise, left))
            # The first rise has no rise before it to be compared with.
            left = jnp.where(jnp.isinf(state.rise), jnp.inf, left)
        anchor = jax.tree.map(lambda new, old: jnp.where(doubled | (count == 1), new, old), params, state.anchor)
        return AveragedState(
            inner=inner, mean=mean, params=params, anchor=anchor, rise=rise, renewed=renewed, left=left
        )

    def evaluated(
        self, model: AnyModel, state: AveragedState, x: Data, weights: jax.Array | None = None
    ) -> AveragedState:
        """The state with the log-likelihood of all rows at the averaged parameters."""
        whole = dataclasses.replace(state.inner, params=state.params)
        inner = self.inner.exactly(pose(model, x, weights), whole)
        return dataclasses.replace(state, inner=dataclasses.replace(inner, params=state.params))


def averaged(algorithm: EM, *, start: int = 0) -> Averaged:
    """A stochastic algorithm whose result is the average of its steps after the first `start`; see `Averaged`.

    Raises TypeError or ValueError for what is no EM(...) with the model's own M-step, or a negative start.
    """
    if not isinstance(algorithm, EM) or not isinstance(algorithm.maximize, ClosedForm):
        raise TypeError(f"averaged takes an EM(...) with the model's own M-step; got {algorithm!r}")
    if isinstance(start, bool) or not isinstance(start, int) or start < 0:
        raise ValueError(f"start must be a whole number of steps, at least 0; got {start!r}")
    return Averaged(inner=algorithm, start=start)
