"""A posterior from a function of the data: recognition networks, and the distributions that they give."""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from .. import checks
from ..protocols import Data, Model, Nature, Params
from ..record import record, static


@record(kw_only=False)
class Recognition:
    """Take the posterior of the latents from a function of the data alone: amortised inference.

    network: (params, x) -> scores (N, K), logarithms of probabilities up to a constant a row; or a posterior of the
        model's own kind, as `free_energy` takes it: `StateMoments(means, covariances)` for factors.
    params: those of the network, any pytree.

    With a q that is not the posterior, EM raises the lower bound of `free_energy`, not the likelihood: the objective
    may fall. The network is the same in every step; `wake_sleep` and `amortised_em` learn it.
    Hinton, Dayan, Frey & Neal (1995); Neal & Hinton (1998), section 2.
    """

    network: Callable = static()
    params: Params = None

    nature: ClassVar = Nature(monotone=False, by_row=True)

    def posterior(self, model: Model, params: Params, x: Data) -> Any:
        """The posterior that the network gives, with the evidence of the exact one."""
        found = recognised(self.network, self.params, x)
        q = jax.nn.softmax(found.scores, axis=-1) if isinstance(found, Scored) else found
        return model.infer(params, x).given(q)


@record
class Scored:
    """A categorical distribution for every row.

    scores: (N, K), logarithms of probabilities up to a constant a row.
    """

    scores: jax.Array

    def log_prob(self, labels: jax.Array) -> jax.Array:
        """log q(label_n): (N,)."""
        return jnp.take_along_axis(jax.nn.log_softmax(self.scores, axis=-1), labels[:, None], axis=-1)[:, 0]

    def sample(self, key: jax.Array) -> jax.Array:
        """A label for every row: (N,)."""
        return jax.random.categorical(key, self.scores, axis=-1)


def recognised(network: Callable, params: Params, x: Data) -> Any:
    """The output of a network, as a distribution of the latents with `log_prob(z)` and `sample(key)`."""
    found = network(params, x)
    return Scored(scores=jnp.asarray(found)) if isinstance(found, checks.ARRAYS) else found
