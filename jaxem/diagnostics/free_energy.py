"""The lower bound that all of EM climbs, and how far it is below the log-likelihood."""

import dataclasses
from typing import Any, NamedTuple

import jax

from ..capabilities import states
from ..data import Labelled, as_labelled
from ..protocols import AnyModel, Data, Params

_NEEDS = "free_energy needs a model with a discrete or normal posterior"


class FreeEnergy(NamedTuple):
    """bound: E_q[log p(x, z)] + entropy of q, at most the log-likelihood; gap: KL(q ‖ posterior), what it lacks."""

    bound: jax.Array
    gap: jax.Array


def free_energy(model: AnyModel, params: Params, x: Data, q: Any, weights: jax.Array | None = None) -> FreeEnergy:
    """log p(x) = bound + gap for any distribution q of the latents; both in nats, summed over rows x weights (N,).

    q: an array (N, K) of responsibilities for one latent a row; for chains along sequences a `ChainPosterior`; for
    normal latents of rows or groups `StateMoments(means, covariances)`; or what the model's `infer` returned, at other
    parameters or under another `expect`, which is the only form for linear-Gaussian chains and missing values.

    The E-step makes the gap 0 by q = posterior(params, x), the M-step raises the bound over params: so EM
    climbs one function of two arguments. The gap is infinite where q gives mass to latents that are impossible.
    Labelled rows keep their label, whatever q says. Neal & Hinton (1998), section 2.
    Raises TypeError for a model without a discrete or normal posterior, ValueError for a q that is no distribution.
    """
    for name in ("infer", "statistics", "q_function"):
        if not states(model, name):
            raise TypeError(f"{_NEEDS}; {type(model).__name__} has no {name}")
    posterior = model.infer(params, x)
    if not states(posterior, "given", "entropy"):
        raise TypeError(f"{_NEEDS}; {type(model).__name__} has none")
    q = posterior.given(q)
    if isinstance(x, Labelled):
        q = dataclasses.replace(q, responsibilities=as_labelled(q.responsibilities, x))
    bound = model.q_function(params, model.statistics(params, x, q, weights)) + q.entropy(weights)
    if states(posterior, "kl"):
        return FreeEnergy(bound=bound, gap=posterior.kl(q, weights))
    return FreeEnergy(bound=bound, gap=model.statistics(params, x, posterior, weights).loglik - bound)
