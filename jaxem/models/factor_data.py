"""What factor models take: rows, with or without missing entries, and moments in their place."""

import jax
import jax.numpy as jnp

from .. import checks, data, numerics, tree
from ..data import Moments
from ..latents.linear_gaussian.factors import Cases
from ..protocols import Data
from ..record import record


@record
class Roots:
    """Moments of groups of rows, with Cholesky factors of their covariances: the form of moments in E-steps.

    The columns of a factor are rows whose second moments are the covariance. So an E-step treats them as rows, and
    squared residuals are sums of squares, where a difference of covariances would lose most digits.

    mean: (G, D).
    root: (G, D, D), lower triangular; covariance = root rootᵀ.
    count: (G,).
    """

    mean: jax.Array
    root: jax.Array
    count: jax.Array


@jax.jit
def roots(x: Moments) -> Roots:
    """Moments by Cholesky factors, whose pivots have a floor of the size of rounding errors."""
    x = data.grouped(x)
    eps, variances = jnp.finfo(x.mean.dtype).eps, jnp.diagonal(x.covariance, axis1=-2, axis2=-1)
    largest = jnp.max(variances, axis=-1, keepdims=True)
    floor = jnp.maximum(eps * x.mean.shape[-1] * variances, eps**2 * jnp.where(largest > 0, largest, 1))
    return Roots(mean=x.mean, root=numerics.floored_cholesky(x.covariance, floor)[0], count=x.count)


def read(x: Data) -> jax.Array | Roots:
    """Floating-point rows (N, D), or roots of moments."""
    if isinstance(x, Moments):
        return roots(x)
    return x if isinstance(x, Roots) else checks.matrix("x", x)


def units(x: Data) -> Data:
    """The data with a leading axis: rows, or groups of them."""
    return data.grouped(x) if isinstance(x, Moments) else x


def reduced(x: Data, weights: jax.Array | None, missing: bool) -> tuple[Data, jax.Array | None]:
    """As few units as have the same statistics, and their weights: one group of rows, or the rows themselves."""
    if isinstance(x, Roots):
        return x, weights
    x, weights = data.as_moments(x, weights, missing)
    return (roots(x) if isinstance(x, Moments) else x), weights


def shape(x: Data) -> tuple[int, int]:
    """How many units, and columns."""
    return x.mean.shape if isinstance(x, Roots) else data.units_and_columns(x)  # type: ignore[return-value]


def num_rows(x: Data, weights: jax.Array | None) -> jax.Array:
    """The weight of rows with an observed entry."""
    if isinstance(x, Moments):
        return data.total_count(x, weights)
    rows = checks.matrix("x", x)
    return numerics.weighted_sum(jnp.any(~jnp.isnan(rows), axis=1).astype(rows.dtype), weights)


def cases(mean: jax.Array, x: jax.Array | Roots, missing: bool) -> Cases:
    """Data about a mean (D,); missing: whether entries of rows may be missing."""
    if isinstance(x, Roots):
        columns = jnp.swapaxes(x.root, 1, 2)
        every = jnp.concatenate([(x.mean - mean[None])[:, None], columns], axis=1)
        first = jnp.zeros(every.shape[:2], mean.dtype).at[:, 0].set(1)
        return Cases(
            deviations=every.reshape(-1, len(mean)).T,
            ones=first.reshape(-1),
            counts=jnp.repeat(x.count, every.shape[1]),
        )
    if not missing:
        return Cases(deviations=(x - mean[None]).T)
    observed = ~jnp.isnan(x)
    deviations = jnp.where(observed, x, mean[None]) - mean[None]
    ones = jnp.any(observed, axis=1).astype(deviations.dtype)
    return Cases(deviations=deviations.T, observed=observed.T, ones=ones)


def column_moments(x: jax.Array | Roots, weights: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Mean (D,) and variance (D,) of the columns, over their observed entries."""
    if isinstance(x, Roots):
        share = x.count if weights is None else x.count * weights
        share = (share / jnp.sum(share))[:, None]
        mean = jnp.sum(share * x.mean, axis=0)
        own = jnp.sum(jnp.square(x.root), axis=2) + jnp.square(x.mean - mean[None])
        return mean, jnp.sum(share * own, axis=0)
    there = ~jnp.isnan(x)
    share = there.astype(x.dtype) if weights is None else jnp.where(there, weights[:, None], 0)
    share = share / jnp.sum(share, axis=0)[None]
    mean = jnp.sum(share * jnp.where(there, x, 0), axis=0)
    return mean, jnp.sum(share * jnp.square(jnp.where(there, x - mean[None], 0)), axis=0)


def leading(
    x: jax.Array | Roots, weights: jax.Array | None, mean: jax.Array, scale: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """Directions (D, count) along which the columns, standardised, vary most, and their variances (count,).

    A missing entry counts as the mean. Found from the covariance where there are more rows than columns, else from
    the rows.
    """
    if isinstance(x, Roots) or x.shape[0] > x.shape[1]:
        if isinstance(x, Roots):
            every = data.pooled(Moments(x.mean, numerics.product(x.root, x.root, "gik,gjk->gij"), x.count), weights)
        else:
            every = data.moments_of(jnp.where(jnp.isnan(x), mean[None], x), weights)
        found, variances, _ = numerics.singular_values(every.covariance[0] / (scale[:, None] * scale[None]))
    else:
        total = tree.total_weight(x, weights)
        share = jnp.ones(len(x), x.dtype) if weights is None else jnp.sqrt(weights)
        points = share[:, None] * jnp.where(jnp.isnan(x), 0, x - mean[None]) / scale[None]
        found, sizes, _ = numerics.singular_values(points.T)
        variances = jnp.square(sizes) / total
    short = max(0, count - len(variances))
    return jnp.pad(found[:, :count], ((0, 0), (0, short))), jnp.pad(variances[:count], (0, short))
