"""What comes into a fit: the algorithm, where none is named, and the data in the form that its steps go over."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding

from . import checks, tree
from .capabilities import fitting_algorithm
from .em import EM, Expanded, anderson
from .protocols import Data, Model
from .slots import Algorithm


def chosen(model: Model, algorithm: Algorithm | Any | None) -> Algorithm:
    """The algorithm, complete; where none is named, EM, or an accelerator for a model with slow EM (`crawls`)."""
    if algorithm is None:
        step = EM(maximize=Expanded()) if model.expands else EM()
        algorithm = anderson(step) if model.crawls else step
    return fitting_algorithm(algorithm)


def sees_all_rows(model: Model, algorithm: Algorithm) -> bool:
    """Whether all that an algorithm asks of the data are statistics of all rows together, without draws."""
    nature = algorithm.nature(model)
    return nature.complete and not nature.stochastic and not nature.by_row


def data_of(model: Model, x: Data, weights: jax.Array | None, sees_all: bool) -> tuple[Data, jax.Array | None]:
    """Checked data in one precision and their weights: the model's `units`, or, with `sees_all`, its `reduced` data.
    Raises by name."""
    x, weights = checks.native((x, weights))
    model.check(x, weights)
    _plain_axes("x", x)
    _plain_axes("weights", weights)
    x, weights = model.reduced(x, weights) if sees_all else (model.units(x), weights)
    return tree.one_precision(x), None if weights is None else jnp.asarray(weights)


def limits(tol: Any, max_steps: Any) -> None:
    """Raise TypeError or ValueError for a `tol` or `max_steps` that is no single number, or is out of range."""
    _number("tol", tol, "a finite number, nats per unit of weight")
    if checks.is_concrete(tol) and not np.isfinite(tol):
        raise ValueError(f"tol must be a finite number, nats per unit of weight; got {tol}")
    _number("max_steps", max_steps, "a whole number", whole=True)
    if checks.is_concrete(max_steps) and not 0 <= int(max_steps) < 2**31:
        raise ValueError(f"max_steps must be at least 0 and below 2**31, as int32 counts steps; got {max_steps}")


def _plain_axes(name: str, value: Any) -> None:
    """Raise ValueError for arrays spread over a mesh whose axes have explicit types."""
    for leaf in jax.tree.leaves(value):
        sharding = leaf.sharding if isinstance(leaf, jax.Array) and checks.is_concrete(leaf) else None
        if isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types and any(sharding.spec):
            raise ValueError(
                f"{name} is spread over mesh axes {sharding.mesh.axis_names} of explicit type, along which rows cannot "
                "be summed; make the mesh with jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto, "
                "...)), one for every axis, and put the data there"
            )


def _number(name: str, value: Any, what: str, *, whole: bool = False) -> None:
    """Raise TypeError or ValueError unless this is one real number, or an array () that holds one."""
    kinds = (jnp.integer,) if whole else (jnp.integer, jnp.floating)
    if isinstance(value, checks.ARRAYS):
        fits = any(jnp.issubdtype(value.dtype, kind) for kind in kinds)
    else:
        fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not fits:
        raise TypeError(f"{name} must be {what}; got {checks.told(value)}")
    if jnp.ndim(value):
        raise ValueError(f"{name} must be {what}; got an array of shape {jnp.shape(value)}")
