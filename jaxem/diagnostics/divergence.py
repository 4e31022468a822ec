"""The Kullback-Leibler divergence, where it has a closed form."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import checks, numerics
from ..capabilities import complete, states
from ..protocols import Family


def kl(p: Any, q: Any, family: Family | None = None) -> jax.Array:
    """KL(p ‖ q) = E_p[log p - log q] in nats: at least 0, 0 where the two are the same, and no distance.

    p, q: tables of probabilities (..., K), each a distribution along its last axis, which give (...); two records of
        one conjugate prior, such as Beta or NormalInverseWishart, which give the sum over all that they hold; or
        parameters of a family, which give (K,), one a component.
    family: whose parameters they are, as in `kl(p, q, Poisson())`: parameters alone do not tell, since several families
        have them under the same names.

    Infinite where p has mass and q has none. To minimise KL(p ‖ q) makes q cover p, to minimise KL(q ‖ p) makes it keep
    to one of p's modes; EM's bound is KL(q ‖ posterior) below the log-likelihood, see `free_energy`.
    Kullback & Leibler (1951), On information and sufficiency; Bishop (2006), sections 1.6.1 and 10.1.2.
    Raises TypeError for what has no closed form, such as mixtures, and ValueError for tables that are no distributions.
    """
    if family is not None:
        part = complete("part", family)
        if part.kl is None:
            raise TypeError(f"{type(family).__name__} has no divergence in closed form")
        return part.kl(p, q)
    if isinstance(p, (*checks.ARRAYS, list, tuple)):
        return _of_tables(_table("p", p), _table("q", q))
    if not states(p, "kl") or type(p) is not type(q):
        raise TypeError(
            "p and q must be tables of probabilities, records of one conjugate prior, or with family=... parameters of "
            f"a family; got {type(p).__name__} and {type(q).__name__}"
        )
    return p.kl(q)


def _table(name: str, given: Any) -> jax.Array:
    table = jnp.asarray(given)
    table = table if jnp.issubdtype(table.dtype, jnp.floating) else table.astype(float)
    if checks.is_concrete(table):
        checks.distributions(name, np.asarray(table).reshape(-1, table.shape[-1]))
    return table


def _of_tables(p: jax.Array, q: jax.Array) -> jax.Array:
    shape = jnp.broadcast_shapes(p.shape, q.shape)
    p, q = jnp.broadcast_to(p, shape), jnp.broadcast_to(q, shape)
    return numerics.divergence(p, q)
