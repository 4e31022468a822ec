"""What follows from a conjugate prior: parts whose posterior, given the statistics, is of the prior's own kind.

A conjugate part (`protocols.Conjugate`) has distributions q of its parameters: records of `priors`, component axis
first, or a dict of such. What is written here once serves all of them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .. import tree
from ..capabilities import original
from ..protocols import Data, Params, Stats


def each(function: Callable, q: Any, *others: Any) -> Any:
    """`function` of a record of hyperparameters, or of every one in a dict of them."""
    if isinstance(q, Mapping):
        return {name: each(function, value, *(other[name] for other in others)) for name, value in q.items()}
    return function(q, *others)


def expected(self: Any, q: Any) -> Params:
    """Parameters at their means under q."""
    return self.given(each(lambda record: record.expected(), q))


def sample(self: Any, key: jax.Array, q: Any) -> Params:
    """Parameters drawn from q."""
    if not isinstance(q, Mapping):
        return self.given(q.sample(key))
    parts, keys = self.parts, jax.random.split(key, len(q))
    return {name: sample(parts[name], k, q[name]) for k, name in zip(keys, q, strict=True)}


def draw(self: Any, key: jax.Array, stats: Stats) -> Params:
    """Parameters drawn from their posterior given the statistics: the M-step of Gibbs sampling."""
    return sample(self, key, self.posterior(stats))


def draw_parts(self: Any, key: jax.Array, stats: Stats) -> Params:
    """Parameters drawn part by part: given the statistics they are independent. TypeError for a part without a draw."""
    of, parts = self.part_statistics(stats), self.parts
    for name, part in parts.items():
        if part.draw is None:
            raise TypeError(
                f"{name} of {type(original(self)).__name__} cannot be drawn: {type(original(part)).__name__} has no "
                "draw(key, stats), as parts with a conjugate prior have"
            )
    keys = jax.random.split(key, len(parts))
    return self.params_of({name: part.draw(k, of[name]) for k, (name, part) in zip(keys, parts.items(), strict=True)})


def drawn(model: Any, key: jax.Array, stats: Stats) -> Params:
    """A complete model's parameters, drawn from their posterior given the statistics."""
    if model.draw is not None:
        return model.draw(key, stats)
    if model.parts is None:
        raise TypeError(f"{type(original(model)).__name__} has no draw(key, stats), nor parts that could be drawn")
    return draw_parts(model, key, stats)


def pooled(self: Any, x: Data, weights: jax.Array | None, num_components: int) -> Any:
    """The posterior given all rows, in every component."""
    params = self.pooled(x, weights, 1)
    rows, dtype = tree.num_rows(x), tree.float_dtype(params)
    every = jnp.ones((1, rows), dtype) if weights is None else weights.astype(dtype)[None]
    found = self.posterior(self.stats(params, x, every))
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, num_components, axis=0), found)


common = draw, pooled
