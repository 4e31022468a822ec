"""What comes into a fit: the algorithm, where none is named, and the data in the form that its steps go over."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import checks, tree
from .capabilities import fitting_algorithm
from .em import EM, Expanded, anderson
from .protocols import Data, Model
from .slots import Algorithm


def chosen(model: Model, algorithm: Algorithm | Any | None) -> Algorithm:
    """The algorithm, complete; where none is named, EM, or an accelerator where the model says that EM crawls."""
    if algorithm is None:
        step = EM(maximize=Expanded()) if model.expands else EM()
        algorithm = anderson(step) if model.crawls else step
    return fitting_algorithm(algorithm)


def sees_all_rows(model: Model, algorithm: Algorithm) -> bool:
    """Whether all that an algorithm asks of the data are statistics of all rows together, without draws."""
    nature = algorithm.nature(model)
    return nature.complete and not nature.stochastic and not nature.by_row


def data_of(model: Model, x: Data, weights: jax.Array | None, sees_all: bool) -> tuple[Data, jax.Array | None]:
    """Checked data in one precision and their weights: units, or, where all rows are seen together, what stands in
    their place. Raises by name."""
    x, weights = checks.native((x, weights))
    model.check(x, weights)
    checks.plain_axes("x", x)
    checks.plain_axes("weights", weights)
    x, weights = model.reduced(x, weights) if sees_all else (model.units(x), weights)
    return tree.one_precision(x), None if weights is None else jnp.asarray(weights)


def limits(tol: Any, max_steps: Any) -> None:
    """Raise TypeError or ValueError for a `tol` or `max_steps` that is no single number, or is out of range."""
    checks.number("tol", tol, "a finite number, nats per unit of weight")
    if checks.is_concrete(tol) and not np.isfinite(tol):
        raise ValueError(f"tol must be a finite number, nats per unit of weight; got {tol}")
    checks.number("max_steps", max_steps, "a whole number", whole=True)
    if checks.is_concrete(max_steps) and not 0 <= int(max_steps) < 2**31:
        raise ValueError(f"max_steps must be at least 0 and below 2**31, as int32 counts steps; got {max_steps}")
