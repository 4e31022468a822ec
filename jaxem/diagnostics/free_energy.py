"""The lower bound that all of EM climbs, and how far it is below the log-likelihood."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import checks, numerics, tree
from ..capabilities import states
from ..data import as_labelled
from ..protocols import Data, Params


class FreeEnergy(NamedTuple):
    """bound: E_q[log p(x, z)] + entropy of q, at most the log-likelihood; gap: KL(q ‖ posterior), what it lacks."""

    bound: jax.Array
    gap: jax.Array


def free_energy(model: Any, params: Params, x: Data, q: Any, weights: jax.Array | None = None) -> FreeEnergy:
    """log p(x) = bound + gap for any distribution q of the latents; both in nats, summed over rows x weights (N,).

    q: an array (N, K) of responsibilities for one latent a row; for chains along sequences a `ChainPosterior`; or
    what the model's `infer` returned, at other parameters or under another `expect`.

    The E-step makes the gap 0 by q = posterior(params, x), the M-step raises the bound over params: so EM
    climbs one function of two arguments. The gap is infinite where q gives room to latents that are impossible.
    Labelled rows keep their label, whatever q says. Neal & Hinton (1998), section 2.
    Raises TypeError for a model without a discrete posterior, ValueError for a q that is no distribution.
    """
    if not dataclasses.is_dataclass(q):
        return _of_rows(model, params, x, q, weights)
    _needs(model, ("infer", "statistics", "q_function"))
    posterior = model.infer(params, x)
    q = posterior.given(q)
    expected = model.q_function(params, model.statistics(params, x, q, weights))
    return FreeEnergy(bound=expected + q.entropy(weights), gap=posterior.kl(q, weights))


def _needs(model: Any, names: tuple[str, ...]) -> None:
    """Raise TypeError for a model that lacks one of these methods."""
    for name in names:
        if not states(model, name):
            raise TypeError(
                f"free_energy needs a model with a discrete posterior; {type(model).__name__} has no {name}"
            )


def _of_rows(model: Any, params: Params, x: Data, q: jax.Array, weights: jax.Array | None) -> FreeEnergy:
    """The same for responsibilities (N, K) of one latent a row."""
    _needs(model, ("posterior", "stats", "q_function"))
    rows = tree.num_rows(x)
    q = checks.array("q", q)
    if q.ndim != 2 or q.shape[0] != rows:
        raise ValueError(
            f"q must have shape (N, K), a distribution over latents for each of {rows} rows; got {q.shape}"
        )
    if checks.is_concrete(q):
        checks.distributions("q", np.asarray(q))
    posterior = model.posterior(params, x)
    if posterior.shape != q.shape:
        raise ValueError(f"q must have shape {posterior.shape}, as the posterior has; got {q.shape}")
    q = as_labelled(q.T, x).T
    used = q > 0
    logs = jnp.log(jnp.where(used, q, 1))
    entropy = -jnp.sum(q * logs, axis=1)
    gap = jnp.sum(jnp.where(used, q * (logs - numerics.safe_log(posterior)), 0), axis=1)
    expected = model.q_function(params, model.stats(params, x, q, weights))
    return FreeEnergy(bound=expected + numerics.weighted_sum(entropy, weights), gap=numerics.weighted_sum(gap, weights))
