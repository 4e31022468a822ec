"""Records of data: what rows can carry beside their values."""

from typing import Any

import jax
import jax.numpy as jnp

from .record import record


@record(kw_only=False)
class Labelled:
    """Rows of which some are known to come from one component: semi-supervised data.

    x: N rows as the family takes them; labels (N,): whole numbers 0..K-1, or -1 where unknown.
    A labelled row counts in its own component only; its likelihood is p(x_n, label_n). With all
    rows labelled a fit is the supervised one.
    """

    x: Any
    labels: jax.Array


def split(x: Any) -> tuple[Any, jax.Array | None]:
    """The rows, and their labels (None where they carry none)."""
    return (x.x, x.labels) if isinstance(x, Labelled) else (x, None)


def allowed(labels: jax.Array, count: int) -> jax.Array:
    """Components that rows with these labels (N,) may come from: (K, N)."""
    return (labels[None] < 0) | (labels[None] == jnp.arange(count)[:, None])


def as_labelled(responsibilities: jax.Array, x: Any) -> jax.Array:
    """Responsibilities (K, N), those of labelled rows all in their own component."""
    labels = split(x)[1]
    if labels is None:
        return responsibilities
    own = labels[None] == jnp.arange(responsibilities.shape[0])[:, None]
    return jnp.where(labels[None] < 0, responsibilities, own.astype(responsibilities.dtype))
