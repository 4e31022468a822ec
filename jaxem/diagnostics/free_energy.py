"""The lower bound that all of EM climbs, and how far it is below the log-likelihood."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import checks, tree
from ..data import split
from ..protocols import Data, Params


class FreeEnergy(NamedTuple):
    """bound: E_q[log p(x, z)] + entropy of q, at most the log-likelihood; gap: KL(q ‖ posterior), what it lacks."""

    bound: jax.Array
    gap: jax.Array


def free_energy(model: Any, params: Params, x: Data, q: jax.Array, weights: jax.Array | None = None) -> FreeEnergy:
    """log p(x) = bound + gap for any posterior q (N, K) of the latents; both in nats, summed over the rows.

    The E-step makes the gap 0 by q = posterior(params, x), the M-step raises the bound over params: so EM
    climbs one function of two arguments. The gap is infinite where q gives room to latents that are impossible.
    Labelled rows keep their label, whatever q says. Neal & Hinton (1998), section 2.
    Raises TypeError for a model without a discrete posterior, ValueError for a q that is no distribution.
    """
    for name in ("posterior", "stats", "q_function"):
        if not hasattr(model, name):
            raise TypeError(
                f"free_energy needs a model with a discrete posterior; {type(model).__name__} has no {name}"
            )
    rows = tree.num_rows(x)
    q = checks.array("q", q)
    if q.ndim != 2 or q.shape[0] != rows:
        raise ValueError(
            f"q must have shape (N, K), a distribution over latents for each of {rows} rows; got {q.shape}"
        )
    if checks.is_concrete(q):
        values = np.asarray(q)
        if not (np.all(values >= 0) and np.allclose(values.sum(axis=1), 1, atol=1e-3)):
            raise ValueError("q must be at least 0, and every row of it must sum to 1")
    posterior = model.posterior(params, x)
    if posterior.shape != q.shape:
        raise ValueError(f"q must have shape {posterior.shape}, as the posterior has; got {q.shape}")
    labels = split(x)[1]
    if labels is not None:
        q = jnp.where((labels < 0)[:, None], q, jax.nn.one_hot(labels, q.shape[1], dtype=q.dtype))
    used = q > 0
    logs = jnp.log(jnp.where(used, q, 1))
    entropy = -jnp.sum(q * logs, axis=1)
    possible = posterior > 0
    against = jnp.where(possible, jnp.log(jnp.where(possible, posterior, 1)), -jnp.inf)
    gap = jnp.sum(jnp.where(used, q * (logs - against), 0), axis=1)
    each = jnp.ones(rows, q.dtype) if weights is None else weights.astype(q.dtype)
    stats = model.stats(params, x, q, weights)
    return FreeEnergy(
        bound=model.q_function(params, stats) + jnp.sum(each * entropy),
        gap=jnp.sum(jnp.where(each > 0, each * gap, 0)),
    )
