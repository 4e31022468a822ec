"""What families of independent columns share: missing entries, linear statistics, pooled starts.

Most of these families are exponential: log p(x | k) = sum_f natural_kf features_fn. Their densities
are then one matrix product, and their statistics another.
"""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import capabilities, checks, numerics, tree
from ..protocols import Data, Family, Params, Stats

# Small enough to vanish beside any real count, large enough not to underflow when it multiplies a parameter.
PSEUDO_COUNT = 1e-18

# Stands for log 0 inside a product, where -inf would turn into NaN beside a zero.
_NEVER = 1e15


def read(x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Rows (N, D) in a floating dtype, missing entries 0, and which entries are observed (N, D).

    Missing is NaN in a float array and -1 in an integer array.
    """
    rows = checks.columns("x", x)
    observed = rows != -1 if jnp.issubdtype(rows.dtype, jnp.signedinteger) else ~jnp.isnan(rows.astype(dtype))
    return jnp.where(observed, rows, 0).astype(dtype), observed


def pair(x: Data) -> tuple[jax.Array, jax.Array | None]:
    """The values of data that may be a pair, as (counts, exposure), and its second array, (N, D) or (N, 1), or None."""
    if not isinstance(x, (tuple, list)):
        return x, None
    if len(x) != 2:
        raise ValueError(f"x must be an array, or a pair of arrays; got {len(x)} of them")
    return x[0], checks.columns("x[1]", x[1])


def score(natural: jax.Array, features: jax.Array) -> jax.Array:
    """sum_f natural_kf features_fn, 0 x -inf = 0: (K, F), (F, N) -> (K, N)."""
    total = numerics.product(jnp.where(natural == -jnp.inf, -_NEVER, natural), features, "kf,fn->kn")
    return jnp.where(total < -_NEVER / 4, -jnp.inf, total)


def sums(responsibilities: jax.Array, features: jax.Array) -> jax.Array:
    """sum_n r_kn features_fn: (K, N), (F, N) -> (K, F)."""
    return numerics.product(responsibilities, features, "kn,fn->kf")


def expected_score(natural: jax.Array, totals: jax.Array) -> jax.Array:
    """sum natural x totals over everything, 0 x -inf = 0: a Q function."""
    used = totals != 0
    return jnp.sum(jnp.where(used, totals * jnp.where(used, natural, 0), 0))


def pooled(family: Family, neutral: Params, x: Data, weights: jax.Array | None, num_components: int) -> Params:
    """The M-step from all rows in one component, K times over. `neutral`: parameters of one component."""
    dtype = jax.tree.leaves(neutral)[0].dtype
    rows = jax.tree.leaves(x)[0].shape[0]
    every = jnp.ones((1, rows), dtype) if weights is None else weights.astype(dtype)[None]
    params = family.m_step(family.stats(neutral, x, every))
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, num_components, axis=0), params)


def empty(count: jax.Array) -> jax.Array:
    """Components (K,) without rows."""
    return count <= jnp.finfo(count.dtype).eps * jnp.sum(count)


def filled(x: jax.Array, dtype: Any) -> jax.Array:
    """Rows (N, D) with missing entries at their column's mean: points for seeding."""
    values, observed = read(x, dtype)
    mean = numerics.safe_divide(jnp.sum(values, axis=0), jnp.sum(observed, axis=0).astype(dtype))
    return jnp.where(observed, values, mean)


def available_moments(x: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean (D,) and covariance (D, D) of what is observed of rows (N, D), positive semi-definite.

    A missing entry counts with its column's mean and variance, and without correlations.
    """
    values, observed = read(x, x.dtype)
    share = weights[:, None] * observed
    total = jnp.sum(share, axis=0)
    mean = jnp.sum(share * values, axis=0) / total
    deviations = jnp.where(observed, values - mean[None], 0)
    sums = numerics.product(weights[:, None] * deviations, deviations, "ni,nj->ij")
    unseen = jnp.diagonal(sums) * (jnp.sum(weights) - total) / total
    return mean, (sums + jnp.diag(unseen)) / jnp.sum(weights)


def pseudo_rows(family: Family, x: Data, num_rows: float = 1.0) -> Stats:
    """Pseudo-statistics: `num_rows` rows spread over the data, as a family's `prior` takes them.

    Every component is shrunk towards the fit of all rows, with the weight of `num_rows`. The family is
    one without a prior, as in `Gamma(prior=pseudo_rows(Gamma(), x, 2.0))`.
    """
    family.check(x)
    params = capabilities.complete("part", family).pooled(x, None, 1)
    rows = jax.tree.leaves(x)[0].shape[0]
    dtype = jax.tree.leaves(params)[0].dtype
    return family.stats(params, x, jnp.full((1, rows), num_rows / rows, dtype))


def with_prior(prior: Stats | None, stats: Stats) -> Stats:
    """Statistics and pseudo-statistics together."""
    return stats if prior is None else jax.tree.map(jnp.add, stats, prior)


def poisson(key: jax.Array, rate: jax.Array) -> jax.Array:
    """Poisson draws in the rates' shape and dtype, from a key of any implementation."""
    # jax.random.poisson takes threefry keys only.
    threefry = jax.random.wrap_key_data(jax.random.bits(key, (2,), jnp.uint32), impl="threefry2x32")
    return jax.random.poisson(threefry, rate).astype(rate.dtype)


def warn_of_large(name: str, x: Any) -> None:
    """Eagerly warn of counts (N, D) whose log-probabilities float32 rounds by more than a tenth of a nat."""
    if not checks.is_concrete(x) or tree.float_dtype(x) != jnp.float32:
        return
    largest = float(np.nanmax(np.asarray(x)))
    error = largest * np.log(max(largest, 1)) * float(jnp.finfo(jnp.float32).eps)
    if error > 0.1:
        warnings.warn(
            f"{name} holds counts up to {largest:.3g}, whose log-probabilities float32 rounds by about {error:.1g} "
            "nats a row: a fit may stop early, or with a falling objective. Enable float64: jax.enable_x64(True)",
            stacklevel=4,
        )


def check(name: str, x: Any, valid: Callable[[np.ndarray], np.ndarray], expected: str, *, missing: bool = True) -> None:
    """Eagerly refuse rows outside the support, naming the first entry; `valid` sees an array of floats (N, D)."""
    shape = checks.row_shape(name, x)
    if not checks.is_concrete(x):
        return
    values = np.asarray(x).astype(float).reshape(shape)
    absent = values == -1 if np.issubdtype(x.dtype, np.signedinteger) else np.isnan(values)
    good = np.broadcast_to(valid(np.where(np.isnan(values), 0, values)), values.shape)
    good = good | absent if missing else good & ~absent
    if not np.all(good):
        row, column = np.argwhere(~good)[0]
        hint = (
            "(a missing entry is NaN, or -1 among whole numbers)" if missing else "Missing entries are not taken here"
        )
        raise ValueError(
            f"{name} must hold {expected}; got {values[row, column]:g} in row {row}, column {column}. {hint}"
        )
    checks.observed_columns(name, absent)
