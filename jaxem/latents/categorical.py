"""One categorical latent a row: the posterior over components."""

from typing import Any

import jax
import jax.numpy as jnp

from .. import numerics
from ..record import record
from .expect import Exact, Hard, Sample


@record
class CategoricalPosterior:
    """A distribution over the components for every row.

    responsibilities r (K, N): p(z_n = k | x_n), or any other q(z_n = k).
    evidence (N,): log p(x_n) at the parameters that they were inferred with.
    """

    responsibilities: jax.Array
    evidence: jax.Array


def infer(log_joint: jax.Array, expect: Any) -> CategoricalPosterior:
    """The posterior from log p(z = k, x_n) (K, N), by Bayes' rule.

    Under Hard() the responsibilities are 0 or 1, and in place of log p(x_n) stands max_k log p(k, x_n);
    under Exact(T) they are tempered, and there stands T log sum_k p(k, x_n)^(1/T); under Sample(n)
    they are shares of n draws. Raises TypeError for an `expect` that a categorical latent does not know.
    """
    if isinstance(expect, Exact):
        if expect.temperature is None:
            return _posterior(*numerics.normalize(log_joint))
        temperature = jnp.asarray(expect.temperature, log_joint.dtype)
        tempered, evidence = numerics.normalize(log_joint / temperature)
        return _posterior(tempered, temperature * evidence)
    if isinstance(expect, Hard):
        return _posterior(*numerics.first_largest(log_joint))
    if isinstance(expect, Sample):
        exact, evidence = numerics.normalize(log_joint)
        return _posterior(_draw(exact, expect), evidence)
    raise TypeError(f"expect must be Exact(), Hard() or Sample() for a categorical latent; got {expect!r}")


def _posterior(responsibilities: jax.Array, evidence: jax.Array) -> CategoricalPosterior:
    return CategoricalPosterior(responsibilities=responsibilities, evidence=evidence)


def _draw(responsibilities: jax.Array, expect: Sample) -> jax.Array:
    """Shares of the components (K, N) among draws from responsibilities (K, N); an impossible row stays 0."""
    key = expect.random_key()
    upto = jnp.cumsum(responsibilities, axis=0)
    total = upto[-1]

    def draw(index: jax.Array, below: jax.Array) -> jax.Array:
        level = total * jax.random.uniform(jax.random.fold_in(key, index), total.shape, total.dtype)
        return below + (level[None] < upto)

    used = expect.num_samples if expect.used is None else expect.used
    # Of each row, its draws up to component k; their differences over k are the draws of each.
    below = jax.lax.fori_loop(0, used, draw, jnp.zeros_like(upto))
    return jnp.diff(below, axis=0, prepend=0) / jnp.asarray(used, total.dtype)
