"""Missing values filled in: by what is expected of them, or by draws, for multiple imputation."""

import functools
from typing import Protocol

import jax
import jax.numpy as jnp

from .. import capabilities, checks, numerics, parameters, tree
from ..data import split
from ..latents.categorical import MixtureModel
from ..latents.markov.queries import ChainModel
from ..protocols import Data, Family, Params
from ..sequences import Sequences


class ValuedFamily(Family, Protocol):
    """A family that gives conditional means and draws of missing values."""

    def expected_values(self, params: Params, x: Data) -> jax.Array:
        """E[row n | its observed entries, component k]: (N, K, D)."""
        ...

    def drawn_values(self, key: jax.Array, params: Params, x: Data, labels: jax.Array) -> jax.Array:
        """Joint draws given what is observed, from the components of labels (N, M): (N, M, D)."""
        ...

    def completed(self, x: Data, values: jax.Array) -> jax.Array:
        """The rows with these values (N, D) where they are missing, in their own shape."""
        ...


@parameters.at_rows
def impute(
    model: MixtureModel, params: Params, x: Data, *, key: jax.Array | None = None, num_draws: int | None = None
) -> jax.Array:
    """The rows with missing entries filled in; observed ones stay as they are. A method of mixtures.

    Without a key by conditional means, (N, D); with one by joint draws of a row's component and all its missing
    entries, (num_draws, N, D), for multiple imputation (Rubin 1987). Of a `NoisyNormal` all entries, observed ones too,
    are replaced by the values behind the noise.
    """
    shares = model.posterior(params, x)
    return filled_in(model.family, tree.no_whole_numbers(params, x).components, split(x)[0], shares, key, num_draws)


@parameters.at_rows
def impute_steps(model: ChainModel, params: Params, x: Data) -> jax.Array:
    """The observations, missing entries filled in by their means given all observed entries.

    In the layout of the data; observed entries stay as they are, and steps beyond a sequence's end are meaningless.
    """
    every, given = model.units(x), x.values if isinstance(x, Sequences) else x
    rows = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), every.values)
    shares = model.smooth(params, every).reshape(tree.num_rows(rows), -1)
    found = filled_in(model.family, tree.no_whole_numbers(params, rows).emissions, rows, shares, None, None)
    return found.reshape(jnp.shape(jax.tree.leaves(given)[0]))


def filled_in(
    family: Family, params: Params, x: Data, shares: jax.Array, key: jax.Array | None, num_draws: int | None
) -> jax.Array:
    """The rows with missing entries filled in, from a family's components and their responsibilities (N, K), `shares`.

    Without a key by conditional means, in the shape of the rows; else by `num_draws` joint draws of all missing entries
    of a row, one where it is None, along a new first axis. Raises TypeError for a family that has no such values.
    """
    part = capabilities.complete("part", family)
    if part.expected_values is None or part.drawn_values is None:
        raise TypeError(f"{type(family).__name__} has no values to put in place of missing ones: Normal has")
    if key is None and num_draws is not None:
        raise TypeError("num_draws needs a key, as in impute(params, x, key=jax.random.key(0), num_draws=20)")
    if key is None:
        return _means(family, params, x, shares)
    checks.positive_integer("num_draws", 1 if num_draws is None else num_draws)
    return _draws(checks.random_key(key), family, params, x, shares, num_draws or 1)


@jax.jit
def _means(family: ValuedFamily, params: Params, x: Data, shares: jax.Array) -> jax.Array:
    def block(data: tuple[Data, jax.Array]) -> jax.Array:
        x, shares = data
        values = family.expected_values(params, x)
        return family.completed(x, numerics.product(shares, values, "nk,nkd->nd"))

    floats = family.floats_per_row(params) + tree.size(params.mean)
    return tree.map_over_blocks(block, (x, shares), tree.rows_per_block(floats, shares.dtype))


@functools.partial(jax.jit, static_argnames="num_draws")
def _draws(
    key: jax.Array, family: ValuedFamily, params: Params, x: Data, shares: jax.Array, num_draws: int
) -> jax.Array:
    key_labels, key_values = jax.random.split(key)
    upto = jnp.cumsum(shares, axis=1)
    level = upto[:, -1:] * jax.random.uniform(key_labels, (shares.shape[0], num_draws), shares.dtype)
    labels = jnp.sum(level[:, :, None] >= upto[:, None, :-1], axis=2)
    values = family.drawn_values(key_values, params, x, labels)
    return jax.vmap(lambda drawn: family.completed(x, drawn), in_axes=1)(values)
