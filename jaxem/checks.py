"""Refusing bad input, eagerly, by name: what was expected, what came, what to do.

Values are looked at only when they are concrete; under jit only shapes and dtypes are.
"""

import contextlib
import contextvars
import functools
import inspect
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# What a leaf of data or of parameters may be.
ARRAYS = (jax.Array, np.ndarray, np.generic)

# How far from 1 probabilities may sum.
SUM_ROUNDING = 1e-3

# Whether data are checked for estimating parameters from them, or only for applying known parameters to them.
_ESTIMATING = contextvars.ContextVar("estimating", default=True)

# Whether rows of weight 0 have been replaced already, once for all E-steps.
_PRESENT = contextvars.ContextVar("present", default=False)


def is_concrete(*values: Any) -> bool:
    """Whether no leaf is traced, so that values can be looked at."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))


def is_known(value: Any) -> bool:
    """Whether a setting is a number or an array whose values can be looked at (a pytree may hold anything)."""
    return isinstance(value, (int, float, np.ndarray, np.generic, jax.Array)) and is_concrete(value)


def nans_are_debugged() -> bool:
    """Whether JAX stops at the first NaN, so that none may stand for what is not there."""
    return bool(jax.config.jax_debug_nans)  # type: ignore[attr-defined]


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


def real(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is an array of real numbers."""
    if not isinstance(value, ARRAYS):
        raise TypeError(
            f"{name} must be a JAX or NumPy array; got {type(value).__name__}. Convert it first, "
            "as in jax.numpy.asarray(...) or data_frame.to_numpy()"
        )
    dtype = value.dtype
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(f"{name} must be real; got dtype {dtype}. Stack its real and imaginary parts as columns")
    if isinstance(value, np.ndarray) and dtype.names:
        raise TypeError(
            f"{name} must be a plain numeric array; got the fields {', '.join(dtype.names)}. "
            "Stack them as columns, as numpy.lib.recfunctions.structured_to_unstructured does"
        )
    if not (jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)):
        raise TypeError(f"{name} must be numeric; got dtype {dtype}")
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{name} must be a plain array; got a masked one. {name}.filled(numpy.nan) marks its masked entries as "
            "missing, for what takes missing values"
        )


def native(values: Any) -> Any:
    """The same pytree, with NumPy arrays of another byte order, or of long doubles, in a form that JAX takes."""

    def leaf(value: Any) -> Any:
        if not isinstance(value, (np.ndarray, np.generic)) or isinstance(value, np.ma.MaskedArray):
            return value
        if value.dtype.kind == "f" and value.dtype.itemsize > 8:
            return value.astype(np.float64)
        return value if value.dtype.isnative else value.astype(value.dtype.newbyteorder("="))

    return jax.tree.map(leaf, values)


def array(name: str, value: Any) -> jax.Array:
    """A real array; TypeError for anything that is not one."""
    real(name, value)
    return on_device(native(value))


def on_device(value: Any) -> jax.Array:
    """The value as a JAX array. (Where JAX is told to stop at NaN, `jnp.asarray` would stop at a missing value.)"""
    if not (isinstance(value, np.ndarray) and value.dtype.kind == "f"):
        return jnp.asarray(value)
    with np.errstate(over="ignore"):
        return jax.device_put(value.astype(jax.dtypes.canonicalize_dtype(value.dtype)))


def row_shape(name: str, value: Any) -> tuple[int, int]:
    """The shape (N, D) of rows (N, D) or (N,); TypeError or ValueError for what are none. Values are not read."""
    real(name, value)
    shape = jnp.shape(value)
    if len(shape) not in (1, 2):
        raise ValueError(f"{name} must have shape (N, D), or (N,) for one column; got shape {shape}")
    if 0 in shape:
        raise ValueError(f"{name} must have at least one row and one column; got shape {shape}")
    return shape if len(shape) == 2 else (shape[0], 1)


def columns(name: str, value: Any) -> jax.Array:
    """Rows (N, D) in their own dtype, from (N, D) or (N,)."""
    return array(name, value).reshape(row_shape(name, value))


def matrix(name: str, value: Any) -> jax.Array:
    """Floating-point rows (N, D), from (N, D) or (N,); whole numbers are converted."""
    rows = columns(name, value)
    return rows if jnp.issubdtype(rows.dtype, jnp.floating) else rows.astype(jnp.result_type(float))


def finite_matrix(name: str, value: Any, *, missing: bool = False) -> None:
    """Eager check of rows: numeric, (N, D) or (N,), finite (or NaN, where missing entries are taken).

    Warns where whole numbers are converted.
    """
    shape = row_shape(name, value)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        to = jnp.result_type(float)
        warnings.warn(f"{name} has dtype {value.dtype} and is converted to {to}", stacklevel=_users_frame())
    if not is_concrete(value) or _all_finite(value):
        return
    values = np.asarray(value, float).reshape(shape)
    bad = np.isinf(values) if missing else ~np.isfinite(values)
    if np.any(bad):
        row, column = np.argwhere(bad)[0]
        remedy = (
            "A missing entry is NaN: mark it so, or drop such rows"
            if missing
            else "This model takes no missing values: drop such rows, or fill them in"
        )
        raise ValueError(f"{name} must be finite; got {values[row, column]} in row {row}, column {column}. {remedy}")
    observed_columns(name, np.isnan(values))


def observed_columns(name: str, absent: np.ndarray) -> None:
    """Raise ValueError if nothing is observed in a column of rows (N, D) that parameters are estimated from."""
    nothing = np.all(absent, axis=0)
    if _ESTIMATING.get() and np.any(nothing):
        raise ValueError(
            f"{name} must have an observed entry in every column; column {np.argmax(nothing)} has none: drop it"
        )


def present(x: Any, weights: Any) -> Any:
    """The data, rows of weight 0 replaced by one of positive weight: such rows are absent, whatever they hold.

    Where weights are not one a row, the data are returned as they are, for later checks to refuse.
    """
    if weights is None or any(np.shape(leaf)[:1] != np.shape(weights) for leaf in jax.tree.leaves(x)):
        return x
    concrete = is_concrete(x, weights)
    array = np if concrete else jnp
    counts = array.asarray(weights) > 0
    if np.all(counts) if concrete else _PRESENT.get():
        return x
    some = array.argmax(counts)

    def of(leaf: Any) -> Any:
        leaf = array.asarray(leaf)
        return array.where(array.expand_dims(counts, tuple(range(1, leaf.ndim))), leaf, leaf[some][None])

    return jax.tree.map(of, x)


def some_observed(message: str) -> None:
    """Raise ValueError where parameters are to be estimated from rows of which nothing is observed."""
    if _ESTIMATING.get():
        raise ValueError(message)


def warn_of_fit(message: str) -> None:
    """Warn, in the user's own line, where parameters are to be estimated."""
    if _ESTIMATING.get():
        warnings.warn(message, stacklevel=_users_frame())


@contextlib.contextmanager
def _while(variable: contextvars.ContextVar, value: bool) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


# Within it data are checked as ones that known parameters are applied to: one row is enough, whatever it lacks.
without_estimation = functools.partial(_while, _ESTIMATING, False)

# Within it `present` takes traced data as they are: rows were replaced at the entry of a fit, by `tree.present`. To
# replace them again in every E-step would take a tenth of its time.
all_present = functools.partial(_while, _PRESENT, True)


def _all_finite(value: Any) -> bool:
    """Whether all numbers of an array are finite; False also where they are but their sum overflows."""
    if isinstance(value, jax.Array) and jax.default_backend() != "cpu":
        with jax.ensure_compile_time_eval():  # concrete data can be looked at while something else is traced
            return bool(jnp.isfinite(jnp.sum(value)))
    with np.errstate(over="ignore", invalid="ignore"):
        # A sum, not a dot product: the threads of BLAS would spin afterwards, on the cores that the fit needs next.
        return bool(np.isfinite(np.sum(np.asarray(value))))


def has_nan(value: Any) -> bool:
    """Whether a concrete array has a NaN; on a CPU NumPy looks, so that nothing is compiled for it."""
    if _all_finite(value):
        return False
    if isinstance(value, jax.Array) and jax.default_backend() != "cpu":
        return bool(jnp.any(jnp.isnan(value)))
    return bool(np.any(np.isnan(np.asarray(value))))


def _users_frame() -> int:
    """The stack level, as the caller of this function counts, of the first frame outside of this package."""
    package = str(Path(__file__).parent)
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(package):
        frame, level = frame.f_back, level + 1
    return level


def row_weights(weights: Any, rows: int) -> None:
    """Raise unless weights are None or N finite numbers >= 0, not all 0."""
    if weights is None:
        return
    real("weights", weights)
    if weights.shape != (rows,):
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
    if np.any(np.abs(total - 1) > SUM_ROUNDING):
        row = np.argmax(np.abs(total - 1) > SUM_ROUNDING)
        raise ValueError(f"{name} must sum to 1; row {row} sums to {total[row]:.6g}. Divide it by its sum")


def responsibilities(name: str, value: Any, rows: int, count: int) -> jax.Array:
    """Responsibilities (N, K), or labels (N,) of a whole-number dtype; raises ValueError for what is neither."""
    given = array(name, value)
    values = np.asarray(value) if is_concrete(value) else None
    if given.ndim == 1 and jnp.issubdtype(given.dtype, jnp.integer):
        if given.shape != (rows,):
            raise ValueError(f"labels must have shape ({rows},), one a row of x; got {given.shape}")
        if values is not None and not np.all((values >= 0) & (values < count)):
            raise ValueError(f"labels must be in 0..{count - 1}; got {values.min()}..{values.max()}")
        return given
    if given.shape != (rows, count):
        raise ValueError(f"{name} must be ({rows}, {count}), or whole-number labels ({rows},); got shape {given.shape}")
    if values is not None:
        distributions(name, values)
    return given


def told(value: Any) -> str:
    """What a value is, in a few words for a message."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if inspect.isroutine(value):
        return f"the function {value.__name__}"
    if isinstance(value, ARRAYS):
        return f"an array of shape {value.shape} and dtype {value.dtype}"
    if isinstance(value, (str, int, float, complex)):
        return f"{type(value).__name__} {value!r}"
    if value is None:
        return "None"
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, (list, tuple, dict)) else type(value).__name__


def component_family(value: Any) -> None:
    """Raise TypeError for a class, a name or a function in the place of a family."""
    # Nothing else is refused here, since JAX rebuilds records around objects of its own.
    if isinstance(value, (type, str)) or inspect.isroutine(value):
        call = f": write {value.__name__}()" if isinstance(value, type) else ""
        raise TypeError(f"family must be a family of components, as Normal() or Poisson(); got {told(value)}{call}")


def complete_family(value: Any) -> None:
    """Raise TypeError unless this can be a family, when it is first used."""
    component_family(value)
    if not all(hasattr(value, name) for name in ("log_prob", "stats", "m_step")):
        raise TypeError(f"family must be a family of components, as Normal() or Poisson(); got {told(value)}")


def made(name: str, value: Any, known: bool, what: str, remedy: str = "") -> None:
    """Raise TypeError unless the value is `known` to be `what`, is no class or function, and is a pytree."""
    if isinstance(value, type) or inspect.isroutine(value):
        raise TypeError(f"{name} must be {what}; got {told(value)}: call it, {value.__name__}(...)")
    if not known:
        raise TypeError(f"{name} must be {what}; got {told(value)}{remedy}")
    _arrays_inside(name, value)


def _arrays_inside(name: str, value: Any) -> None:
    """Raise TypeError for a record one of whose leaves is no array: a compiled program cannot take it."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(value):
        if isinstance(leaf, (*ARRAYS, int, float, complex)):
            continue
        place = name + jax.tree_util.keystr(path)
        if not path:
            raise TypeError(
                f"{name} must be a pytree, as a frozen dataclass made by jaxem.record.record is; got {told(leaf)}"
            )
        call = f": call it, {leaf.__name__}(...)" if isinstance(leaf, type) or inspect.isroutine(leaf) else ""
        raise TypeError(f"{place} must be an array, or a record of arrays; got {told(leaf)}{call}")


def labels(name: str, value: Any, rows: int, count: int, unknown: bool = True) -> None:
    """Raise unless labels are N whole numbers in 0..count-1, or -1 where they may be unknown."""
    real(name, value)
    lowest, exception = (-1, ", or -1 where unknown") if unknown else (0, "")
    if not jnp.issubdtype(value.dtype, jnp.signedinteger):
        raise TypeError(f"{name} must be signed whole numbers{exception}; got dtype {value.dtype}")
    if value.shape != (rows,):
        raise ValueError(f"{name} must have shape ({rows},), one a row of x; got {value.shape}")
    if not is_concrete(value):
        return
    values = np.asarray(value)
    outside = (values < lowest) | (values >= count)
    if np.any(outside):
        row = np.argmax(outside)
        raise ValueError(f"{name} must be in 0..{count - 1}{exception}; got {values[row]} in row {row}")


def enough_rows(rows: int, weights: Any, count: int, what: str = "components") -> None:
    """Raise unless there are as many rows (of positive weight) as components (or clusters, or ...)."""
    if not _ESTIMATING.get():
        return
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
