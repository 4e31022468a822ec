"""What regressions share: rows that are pairs (features, response), and weighted normal equations.

Statistics are taken about the current coefficients, so that an M-step solves for a correction: the
next step removes the rounding errors of this one. z = (1, features); a line is (intercept, coefficients).
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np

from .. import checks, numerics, tree
from ..protocols import Data, Params, Stats
from . import columns

# Means of features, in standard deviations, up to which float32 gives their slopes to about a thousandth.
_FAR = 1e3


def read(x: Data) -> tuple[jax.Array, jax.Array]:
    """The design, a row of ones above the features (P + 1, N), and the response (N,), in one floating dtype."""
    features, response = _both(x)
    dtype = tree.float_dtype((features, response))
    return matrix(features, dtype), jnp.asarray(response, dtype).reshape(-1)


def matrix(features: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The design (P + 1, N), z of every row, from features (N, P) or (N,)."""
    rows = checks.columns("x[0]", features).T.astype(dtype)
    return jnp.concatenate([jnp.ones_like(rows[:1]), rows])


def _both(x: Data, name: str = "x") -> tuple[jax.Array, jax.Array]:
    if not isinstance(x, (tuple, list)) or len(x) != 2:
        raise TypeError(f"{name} must be a pair (features, response); got {type(x).__name__}")
    return x[0], x[1]


def check(x: Data, name: str = "x") -> None:
    """Refuse eagerly what is not a pair of finite features (N, P) or (N,) and responses (N,)."""
    features, response = _both(x, name)
    rows = checks.columns(f"{name}[0]", features).shape[0]
    if checks.columns(f"{name}[1]", response).shape != (rows, 1):
        raise ValueError(
            f"{name}[1], the response, must have shape ({rows},), one a row of features; got {response.shape}"
        )
    check_features(f"{name}[0]", features, tree.float_dtype((features, response)))
    if jnp.issubdtype(response.dtype, jnp.floating):
        checks.finite_matrix(f"{name}[1]", response)


def check_features(name: str, features: jax.Array, dtype: jnp.dtype) -> None:
    """Refuse features (N, P) or (N,) that are not finite, and warn of those that are far from 0 in this dtype."""
    if jnp.issubdtype(features.dtype, jnp.floating):
        checks.finite_matrix(name, features)
    if checks.is_concrete(features) and dtype == jnp.float32:
        exact = np.asarray(features, np.float64).reshape(len(features), -1)
        mean, spread = np.mean(exact, axis=0), np.std(exact, axis=0)
        # A constant column has no slope that could be lost.
        far = (spread > 0) & (np.abs(mean) > _FAR * spread)
        if np.any(far):
            column = np.argmax(far)
            warnings.warn(
                f"{name}, the features, lie too far from 0 for float32: column {column} has mean {mean[column]:.3g} "
                f"and standard deviation {spread[column]:.3g}. Subtract the mean from it, or enable float64",
                stacklevel=5,
            )


def points(x: Data) -> jax.Array:
    """Features and response side by side (N, P + 1): points for seeding."""
    design, response = read(x)
    return jnp.concatenate([design[1:], response[None]]).T


def line(params: Params) -> jax.Array:
    """(intercept, coefficients): (K, P + 1)."""
    return jnp.concatenate([params.intercept[:, None], params.coefficients], axis=1)


def current(stats: Stats) -> jax.Array:
    """The line (K, P + 1) that statistics were taken about."""
    return stats.reference / stats.count[:, None]


def predict(params: Params, design: jax.Array) -> jax.Array:
    """The linear predictor of every row under every component: (P + 1, N) -> (K, N)."""
    if params.coefficients.shape[1] + 1 != design.shape[0]:
        raise ValueError(
            f"x[0] must have {params.coefficients.shape[1]} features, as the parameters have; got {design.shape[0] - 1}"
        )
    return numerics.product(line(params), design, "kp,pn->kn")


def given(params: Params, labels: jax.Array, features: jax.Array | None) -> jax.Array:
    """The linear predictor (N,) of given features (N, P), each row under the component that its label names."""
    if features is None:
        raise TypeError(
            "a regression cannot sample features: call family.sample(key, params.components, labels, features=...)"
        )
    lines = line(params)[labels]
    rows = checks.columns("features", features).astype(lines.dtype)
    return jnp.sum(lines * jnp.concatenate([jnp.ones_like(rows[:, :1]), rows], axis=1), axis=1)


def gram(weights: jax.Array, design: jax.Array) -> jax.Array:
    """sum_n w zzᵀ + a vanishing multiple of I: (K, N), (P, N) -> (K, P, P), by one product with the monomials of z."""
    i, j = np.tril_indices(design.shape[0])
    entries = np.zeros((design.shape[0],) * 2, int)
    entries[i, j] = entries[j, i] = np.arange(len(i))
    sums = columns.sums(weights, design[i] * design[j])[:, entries]
    return sums + columns.PSEUDO_COUNT * jnp.eye(design.shape[0], dtype=design.dtype)[None]


def times(gram: jax.Array, delta: jax.Array) -> jax.Array:
    """gram delta: (..., P, P), (..., P) -> (..., P)."""
    return jnp.sum(gram * delta[..., None, :], axis=-1)
