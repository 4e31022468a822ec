"""Data of a linear mixed model: rows of groups, and products of their columns, which are sufficient statistics.

Letters: G groups; P features, whose coefficients all groups share; Q features with random effects.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import checks, numerics, tree
from ..data import GroupedRows
from ..families import design
from ..numerics import tuning
from ..protocols import Data
from ..record import record


@record
class GroupProducts:
    """Products of the columns of every group: X (n, P), Z (n, Q) and r (n,), the residuals of a line.

    count: (G,), n.
    line: (G, P), coefficients of X, by least squares over all rows: products of residuals cancel less than of y.
    xx: (G, P, P); zx: (G, Q, P); zz: (G, Q, Q); xr: (G, P); zr: (G, Q); rr: (G,).
    """

    count: jax.Array
    line: jax.Array
    xx: jax.Array
    zx: jax.Array
    zz: jax.Array
    xr: jax.Array
    zr: jax.Array
    rr: jax.Array

    def lanes(self) -> "GroupProducts":
        """The same with groups last."""
        return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, -1), self)


def columns(x: GroupedRows) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Features (N, P), those with random effects (N, Q), and the response (N,), in one floating dtype."""
    features, random, response = x.values
    dtype = tree.float_dtype(x.values)
    return (
        checks.columns("x[0]", features).astype(dtype),
        checks.columns("x[1]", random).astype(dtype),
        checks.columns("x[2]", response).astype(dtype)[:, 0],
    )


def units(x: Data) -> GroupProducts:
    """The products of the columns of every group."""
    return x if isinstance(x, GroupProducts) else _products(x)


@jax.jit
def _products(x: GroupedRows) -> GroupProducts:
    features, random, response = columns(x)
    p, q = features.shape[1], random.shape[1]
    gram = numerics.product(features, features, "ni,nj->ij")
    line = numerics.least_squares(gram, numerics.product(features, response, "ni,n->i"))
    every = jnp.concatenate(
        [features, random, (response - numerics.product(features, line, "np,p->n"))[:, None]], axis=1
    )
    found, groups = _by_group(every, x), len(x.sizes)
    return GroupProducts(
        count=jnp.asarray(x.sizes, every.dtype),
        line=jnp.broadcast_to(line[None], (groups, p)),
        xx=found[:, :p, :p],
        zx=found[:, p : p + q, :p],
        zz=found[:, p : p + q, p : p + q],
        xr=found[:, -1, :p],
        zr=found[:, -1, p : p + q],
        rr=found[:, -1, -1],
    )


def _by_group(every: jax.Array, x: GroupedRows) -> jax.Array:
    """Products of columns (N, M), summed over the rows of every group: (G, M, M).

    A segment sum costs as much for one product of columns as for several, so a chunk of products is summed at once;
    chunks are small, to need little more memory than the rows.
    """
    numbers, groups, width = x.numbers(), len(x.sizes), every.shape[1]
    i, j = np.tril_indices(width)
    chunks = -(-len(i) // tuning.PRODUCTS_AT_A_TIME)
    pairs = np.zeros((2, chunks * min(tuning.PRODUCTS_AT_A_TIME, len(i))), int)
    pairs[:, : len(i)] = i, j

    def sums(pair: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(every[:, pair[0]] * every[:, pair[1]], numbers, groups, indices_are_sorted=True)

    found = jax.lax.map(sums, jnp.moveaxis(pairs.reshape(2, chunks, -1), 0, 1))
    found = jnp.moveaxis(found, 0, 1).reshape(groups, -1)
    places = np.zeros((width, width), int)
    places[i, j] = places[j, i] = np.arange(len(i))
    return found[:, places]


def shape(x: Data) -> tuple[int, int, int]:
    """G, P and Q."""
    if isinstance(x, GroupProducts):
        return jnp.shape(x.zx)[0], jnp.shape(x.zx)[2], jnp.shape(x.zx)[1]
    if not isinstance(x, GroupedRows) or not isinstance(x.values, (tuple, list)) or len(x.values) != 3:
        raise TypeError(
            "x must be group_rows((features, random_features, response), groups); got "
            f"{checks.told(x.values if isinstance(x, GroupedRows) else x)}"
        )
    return len(x.sizes), *(checks.row_shape(f"x[{place}]", x.values[place])[1] for place in (0, 1))  # type: ignore[return-value]


def check(x: Data, weights: jax.Array | None = None) -> None:
    """Raise ValueError or TypeError for bad data, by name."""
    groups = shape(x)[0]
    checks.row_weights(weights, groups)
    if isinstance(x, GroupProducts):
        if checks.is_concrete(x) and not all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(x)):
            raise ValueError("x must be products of finite rows; got some that are NaN or infinite")
        return
    rows = [checks.row_shape(f"x[{place}]", part) for place, part in enumerate(x.values)]
    if rows[2][1] != 1 or len({count for count, _ in rows}) > 1:
        raise ValueError(
            f"x must hold features (N, P), random_features (N, Q) and a response (N,); got rows and columns {rows}"
        )
    for place in (0, 1):
        design.check_features(f"x[{place}]", x.values[place], tree.float_dtype(x.values))
    if jnp.issubdtype(x.values[2].dtype, jnp.floating):
        checks.finite_matrix("x[2]", x.values[2])


def num_rows(x: Data, weights: jax.Array | None = None) -> jax.Array:
    """The number of rows, those of a group counted by its weight."""
    count: Any = x.count if isinstance(x, GroupProducts) else np.asarray(x.sizes)
    return numerics.weighted_sum(jnp.asarray(count, tree.float_dtype(x)), weights)
