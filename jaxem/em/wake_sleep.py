"""Learning the recognition network with the model: wake-sleep, its reweighted form, and amortised variational EM."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .. import checks, numerics, tree
from ..capabilities import complete, completed
from ..latents import Exact
from ..protocols import AnyModel, Data, Model, Nature, Params, Problem
from ..record import record, static
from .gather import e_step_on_all, pose

_ADAM = optax.adam(1e-2)


@completed("state")
@record
class WakeSleepState:
    """What `WakeSleep` remembers.

    params: of the model and its network.
    optimizer: the optimiser's state.
    loglik: an estimate from the samples of the last step; exact once it is evaluated.
    key: what the draws of the steps to come are made from.
    num_steps: steps so far.
    num_passes: passes over the data so far.
    stats: none, until the state is evaluated.
    """

    params: Params
    optimizer: Any
    loglik: jax.Array
    key: jax.Array
    num_steps: jax.Array
    num_passes: jax.Array
    stats: Any = None


@completed("algorithm")
@record
class WakeSleep:
    """Gradient steps in both factors, p(x, z) and q(z | x), from samples; see `wake_sleep` and `amortised_em`.

    learns: by "dreams", as wake-sleep; "reweighted", as its reweighted form; or by the "bound", as amortised EM.
    Other fields are as in `wake_sleep`.
    """

    optimizer: Any = static(default=_ADAM)
    learns: str = static(default="dreams")
    num_samples: int = static(default=1)
    m_step: bool = static(default=False)
    num_dreams: int | None = static(default=None)
    batch_size: int | None = static(default=None)
    exact: bool = static(default=True)

    def nature(self, model: AnyModel) -> Nature:
        return Nature(stochastic=True, monotone=False, complete=False)

    def init(
        self, model: AnyModel, params: Params, x: Data, weights: jax.Array | None = None, key: jax.Array | None = None
    ) -> WakeSleepState:
        problem = pose(model, x, weights)
        if problem.model.recognise is None:
            raise TypeError(
                "wake_sleep and amortised_em need a model with a recognition network: HelmholtzMachine(layers), or "
                f"Amortised(model, network) of any other; got {model!r}"
            )
        if key is None:
            raise TypeError("this algorithm draws latents at random: pass key=jax.random.key(...) to em_fit")
        key, own = jax.random.split(key)
        theta = problem.model.unconstrain(params)
        _, loglik = self._descent(problem, problem, theta, own)
        return WakeSleepState(
            params=params,
            optimizer=self.optimizer.init(theta),
            loglik=loglik,
            key=key,
            num_steps=jnp.zeros((), jnp.int32),
            num_passes=jnp.zeros((), tree.float_dtype(problem.x)),
        )

    def step(self, model: AnyModel, state: WakeSleepState, x: Data, weights: jax.Array | None = None) -> WakeSleepState:
        problem = pose(model, x, weights)
        key, own, place = jax.random.split(state.key, 3)
        rows, theta = self._batch(problem, place), problem.model.unconstrain(state.params)
        (_, loglik), slope = jax.value_and_grad(lambda theta: self._descent(problem, rows, theta, own), has_aux=True)(
            theta
        )
        move, optimizer = self.optimizer.update(slope, state.optimizer, theta)
        params = problem.model.constrain(optax.apply_updates(theta, move))
        if self.m_step:
            if problem.model.wake is None:
                raise TypeError("m_step=True needs Amortised(model, network) of a model with an m_step: leave it out")
            params = problem.model.wake(params, rows.x, rows.weights)
        return dataclasses.replace(
            state,
            params=params,
            optimizer=optimizer,
            loglik=loglik,
            key=key,
            num_steps=state.num_steps + 1,
            num_passes=state.num_passes + rows.rows / problem.rows,
        )

    def evaluated(
        self, model: AnyModel, state: WakeSleepState, x: Data, weights: jax.Array | None = None
    ) -> WakeSleepState:
        """The state with the exact log-likelihood of all rows, where that is asked for."""
        if not self.exact:
            return state
        stats = e_step_on_all(pose(model, x, weights), state.params, Exact())
        return dataclasses.replace(state, stats=stats, loglik=stats.loglik, num_passes=state.num_passes + 1)

    def _batch(self, problem: Problem, key: jax.Array) -> Problem:
        """The rows of one step, drawn in proportion to their weights, which are 1 then."""
        if self.batch_size is None:
            return problem
        share = None if problem.weights is None else problem.weights / problem.total
        chosen = jax.random.choice(key, problem.rows, (self.batch_size,), p=share)
        return dataclasses.replace(problem, x=jax.tree.map(lambda leaf: leaf[chosen], problem.x), weights=None)

    def _descent(self, problem: Problem, rows: Problem, theta: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The loss of a step, per unit of weight, and an estimate of the log-likelihood of all rows.

        Only its gradients in p and q have a meaning; its value has one for "bound" alone.
        """
        model, x = problem.model, rows.x
        params = model.constrain(theta)
        waking, dreaming = jax.random.split(key)
        q = model.recognise(params, x)
        z = jax.vmap(q.sample)(jax.random.split(waking, self.num_samples))
        z = z if self.learns == "bound" else jax.lax.stop_gradient(z)
        log_p = jax.vmap(lambda z: model.complete_log_prob(params, x, z))(z)
        log_q = jax.vmap(q.log_prob)(z)
        ratio = log_p - log_q
        evidence = jnp.mean(ratio, axis=0)
        if self.m_step:
            log_p = jax.lax.stop_gradient(log_p)
        if self.learns == "bound":
            gain = evidence
        elif self.learns == "reweighted":
            share, evidence = numerics.normalize(jax.lax.stop_gradient(ratio))
            evidence = evidence - jnp.log(self.num_samples)
            gain = jnp.sum(share * (log_p + log_q), axis=0)
        else:
            gain = jnp.mean(log_p, axis=0)
        total = numerics.weighted_sum(gain, rows.weights) / rows.total + model.log_prior(params) / problem.total
        if self.learns != "bound" and self.num_dreams != 0:
            dreamt, latents = _dreams(model, params, x, self.num_dreams or rows.rows, dreaming)
            total = total + jnp.mean(model.recognise(params, dreamt).log_prob(latents))
        seen = numerics.weighted_sum(jax.lax.stop_gradient(evidence), rows.weights) / rows.total
        return -total, seen * problem.total


def _dreams(model: Model, params: Params, x: Data, count: int, key: jax.Array) -> tuple[Data, Any]:
    """Rows that the model makes up, in the form of the data, and their latents."""
    dreamt, latents = model.sample_with_latents(key, params, count)
    dreamt = jax.tree.map(lambda new, leaf: new.reshape(count, *leaf.shape[1:]).astype(leaf.dtype), dreamt, x)
    return jax.lax.stop_gradient((dreamt, latents))


def _checked(optimizer: Any, num_samples: int, batch_size: int | None) -> Any:
    """The optimiser, or the default one. Raises TypeError or ValueError by name."""
    optimizer = _ADAM if optimizer is None else optimizer
    found = complete("optimizer", optimizer)
    if not (callable(found.init) and callable(found.update)):
        raise TypeError(f"optimizer must be an optax GradientTransformation, as optax.adam(1e-2); got {optimizer!r}")
    checks.positive_integer("num_samples", num_samples)
    if batch_size is not None:
        checks.positive_integer("batch_size", batch_size)
    return optimizer


def wake_sleep(
    optimizer: Any = None,
    *,
    reweighted: bool = False,
    num_samples: int | None = None,
    m_step: bool = False,
    num_dreams: int | None = None,
    batch_size: int | None = None,
    exact: bool = True,
) -> WakeSleep:
    """The wake-sleep algorithm, for models with a recognition network: `HelmholtzMachine`, `Amortised(model, network)`.

    Awake, latents are drawn from q(z | x) of the data, and the model's log p(x, z) rises by a gradient step; asleep,
    the model dreams up rows with their latents, and the network's log q(z | x) rises on these. That lowers
    KL(p(z | x) ‖ q(z | x)) in place of the KL(q ‖ p) of the lower bound: no objective rises from step to step, and none
    is claimed to. Hinton, Dayan, Frey & Neal (1995), The wake-sleep algorithm for unsupervised neural networks.

    optimizer: any optax GradientTransformation, `optax.adam(1e-2)` by default; build it once.
    reweighted: reweighted wake-sleep: samples count by p(x, z) / q(z | x), normalised a row, for the model, and for
        the network awake too. The model follows the likelihood, and the network KL(p(z | x) ‖ q(z | x)) on the data,
        with a bias that vanishes with more samples (Bornschein & Bengio 2015).
    num_samples: draws of the latents of every row in a step; 1, or 10 where they are reweighted.
    m_step: whether, awake, the model's own M-step takes the place of the gradient step, given statistics under q.
    num_dreams: rows dreamt in a step, by default as many as data rows in a step; 0 for none, where reweighted.
    batch_size: rows in a step, drawn at random; None for all of them.
    exact: whether the fit ends with an exact E-step, for its log-likelihood; False where latents are too many for it.
        The log-likelihood is then an estimate from samples: of the bound, or, where reweighted, of the likelihood.

    A fit takes max_steps steps, and needs a key.
    Raises TypeError or ValueError for bad arguments, and for models without a recognition network.
    """
    samples = (10 if reweighted else 1) if num_samples is None else num_samples
    optimizer = _checked(optimizer, samples, batch_size)
    if num_dreams != 0 or not reweighted:
        checks.positive_integer("num_dreams", 1 if num_dreams is None else num_dreams)
    return WakeSleep(
        optimizer=optimizer,
        learns="reweighted" if reweighted else "dreams",
        num_samples=samples,
        m_step=m_step,
        num_dreams=num_dreams,
        batch_size=batch_size,
        exact=exact,
    )


def amortised_em(
    optimizer: Any = None, *, num_samples: int = 1, batch_size: int | None = None, exact: bool = True
) -> WakeSleep:
    """Amortised variational EM: gradient steps up the lower bound in both factors, p(x, z) and q(z | x), together.

    The bound is a mean of log p(x, z) - log q(z | x) over draws z of q, and is differentiated through z: the network's
    `sample(key)` has to be a differentiable function of its parameters (reparametrised), as mean + sd * normal is. With
    neural networks in both places it is a variational autoencoder.
    Kingma & Welling (2014), Auto-encoding variational Bayes; Neal & Hinton (1998), the same bound.

    optimizer, num_samples, batch_size, exact: as in `wake_sleep`; the log-likelihood of `exact=False` is an estimate of
        the bound.
    """
    optimizer = _checked(optimizer, num_samples, batch_size)
    return WakeSleep(optimizer=optimizer, learns="bound", num_samples=num_samples, batch_size=batch_size, exact=exact)
