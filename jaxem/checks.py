"""Refusing bad input, eagerly, by name: what was expected, what came, what to do.

Values are looked at only when they are concrete; under jit only shapes and dtypes are.
"""

import warnings
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding


def is_concrete(*values: Any) -> bool:
    """Whether no leaf is being traced, so that values can be looked at."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))


def is_known(value: Any) -> bool:
    """Whether a setting is a number or an array whose values can be looked at (a pytree may hold anything)."""
    return isinstance(value, (int, float, np.ndarray, np.generic, jax.Array)) and is_concrete(value)


def choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raise ValueError unless `value` is one of the choices."""
    known = tuple(choices)
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}")


def positive_integer(name: str, value: Any) -> None:
    """Raise TypeError or ValueError unless `value` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be a Python integer, since it sets shapes; got {type(value).__name__} {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1; got {value}")


def array(name: str, value: Any) -> jax.Array:
    """A real array; TypeError for anything that is not one."""
    if not isinstance(value, (jax.Array, np.ndarray, np.generic)):
        raise TypeError(
            f"{name} must be a JAX or NumPy array; got {type(value).__name__}. Convert it first, "
            "as in jax.numpy.asarray(...) or data_frame.to_numpy()"
        )
    dtype = value.dtype
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(f"{name} must be real; got dtype {dtype}. Stack its real and imaginary parts as columns")
    if not (jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)):
        raise TypeError(f"{name} must be numeric; got dtype {dtype}")
    return jnp.asarray(value)


def plain_axes(name: str, value: Any) -> None:
    """Raise ValueError for arrays spread over a mesh whose axes have explicit types."""
    for leaf in jax.tree.leaves(value):
        sharding = getattr(leaf, "sharding", None) if is_concrete(leaf) else None
        if isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types and any(sharding.spec):
            raise ValueError(
                f"{name} is spread over mesh axes {sharding.mesh.axis_names} of explicit type, along which rows cannot "
                "be summed; make the mesh with jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto, "
                "...)), one for every axis, and put the data there"
            )


def columns(name: str, value: Any) -> jax.Array:
    """Rows (N, D) in their own dtype, from (N, D) or (N,)."""
    rows = array(name, value)
    if rows.ndim == 1:
        rows = rows[:, None]
    if rows.ndim != 2:
        raise ValueError(f"{name} must have shape (N, D), or (N,) for one column; got shape {value.shape}")
    if 0 in rows.shape:
        raise ValueError(f"{name} must have at least one row and one column; got shape {value.shape}")
    return rows


def matrix(name: str, value: Any) -> jax.Array:
    """Floating-point rows (N, D), from (N, D) or (N,); whole numbers are converted."""
    rows = columns(name, value)
    return rows if jnp.issubdtype(rows.dtype, jnp.floating) else rows.astype(jnp.result_type(float))


def finite_matrix(name: str, value: Any, *, missing: bool = False) -> None:
    """Eager check of rows: numeric, (N, D) or (N,), finite (or NaN, where missing entries are taken).

    Warns where whole numbers are converted.
    """
    rows = matrix(name, value)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        warnings.warn(f"{name} has dtype {value.dtype} and is converted to {rows.dtype}", stacklevel=4)
    if not is_concrete(value):
        return
    with jax.ensure_compile_time_eval():  # concrete data can be looked at while something else is traced
        finite = bool(jnp.all(jnp.isfinite(value)))
    if finite:
        return
    values = np.asarray(value, float).reshape(len(value), -1)
    bad = np.isinf(values) if missing else ~np.isfinite(values)
    if np.any(bad):
        row, column = np.argwhere(bad)[0]
        remedy = (
            "A missing entry is NaN: mark it so, or drop such rows"
            if missing
            else "This model takes no missing values: drop such rows, or fill them in"
        )
        raise ValueError(f"{name} must be finite; got {values[row, column]} in row {row}, column {column}. {remedy}")
    absent = np.all(np.isnan(values), axis=0)
    if np.any(absent):
        raise ValueError(
            f"{name} must have an observed entry in every column; column {np.argmax(absent)} has none: drop it"
        )


def row_weights(weights: Any, rows: int) -> None:
    """Raise unless weights are None or N finite numbers >= 0, not all 0."""
    if weights is None:
        return
    if array("weights", weights).shape != (rows,):
        raise ValueError(f"weights must have shape ({rows},), one a row of x; got {weights.shape}")
    if not is_concrete(weights):
        return
    values = np.asarray(weights)
    if not np.all(np.isfinite(values)) or np.any(values < 0):
        row = np.argwhere(~(np.isfinite(values) & (values >= 0)))[0, 0]
        raise ValueError(f"weights must be finite and at least 0; got {values[row]} in row {row}")
    if not np.any(values > 0):
        raise ValueError("weights are all 0: no row is left to fit")


def distributions(name: str, values: np.ndarray) -> None:
    """Raise ValueError unless every row (N, K) is a distribution."""
    if not np.all((values >= 0) & np.isfinite(values)):
        row, column = np.argwhere(~((values >= 0) & np.isfinite(values)))[0]
        raise ValueError(
            f"{name} must be finite and at least 0; got {values[row, column]} in row {row}, column {column}"
        )
    total = values.sum(axis=1)
    if np.any(np.abs(total - 1) > 1e-3):
        row = np.argmax(np.abs(total - 1) > 1e-3)
        raise ValueError(f"{name} must sum to 1; row {row} sums to {total[row]:.6g}. Divide it by its sum")


def labels(name: str, value: Any, rows: int, count: int) -> None:
    """Raise unless labels are N whole numbers in 0..count-1, or -1 for unknown."""
    given = array(name, value)
    if not jnp.issubdtype(given.dtype, jnp.signedinteger):
        raise TypeError(f"{name} must be signed whole numbers, -1 where unknown; got dtype {given.dtype}")
    if given.shape != (rows,):
        raise ValueError(f"{name} must have shape ({rows},), one a row of x; got {given.shape}")
    if not is_concrete(value):
        return
    values = np.asarray(value)
    if np.any((values < -1) | (values >= count)):
        row = np.argmax((values < -1) | (values >= count))
        raise ValueError(f"{name} must be in 0..{count - 1}, or -1 where unknown; got {values[row]} in row {row}")


def enough_rows(rows: int, weights: Any, count: int, what: str = "components") -> None:
    """Raise unless there are as many rows (of positive weight) as components (or clusters, or ...)."""
    if weights is not None and is_concrete(weights):
        rows = int(np.sum(np.asarray(weights) > 0))
    if rows < count:
        raise ValueError(
            f"x must have at least as many rows as {what}; got {rows} rows for num_{what}={count}. Use fewer {what}"
        )


def random_key(key: Any) -> jax.Array:
    """A usable random key, new-style or old-style; TypeError with the remedy otherwise."""
    if isinstance(key, (jax.Array, np.ndarray)):
        key = jnp.asarray(key)
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            if key.ndim == 0:
                return key
        elif key.dtype == jnp.uint32 and key.ndim == 1:
            return jax.random.wrap_key_data(key)
        raise TypeError(f"key must be one random key; got an array of shape {key.shape} and dtype {key.dtype}")
    raise TypeError(f"key must be a random key, as in jax.random.key(0); got {type(key).__name__}")
