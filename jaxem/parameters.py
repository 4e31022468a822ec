"""What parameters may be: their shapes, and where their values lie (supports). Other starts are refused by name.

A support is a function (name, values) that raises ValueError for the first value outside of it. NaN is let through,
since a start that holds one ends as NONFINITE, and so are boundaries: a probability of 0 is no mistake.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import checks, tree
from .capabilities import complete, informed, original
from .protocols import AnyModel, Data, Model, Params
from .record import fields
from .slots import Algorithm

# How far below 0 an eigenvalue may lie, in units of the largest entry of its matrix.
_EIGENVALUE_ROUNDING = 1e-4


def at_least_zero(name: str, values: np.ndarray) -> None:
    """Numbers from 0 up."""
    _inside(name, values, ~(values < 0), "must be at least 0")


def between_zero_and_one(name: str, values: np.ndarray) -> None:
    """Probabilities, one by one."""
    _inside(name, values, ~((values < 0) | (values > 1)), "must be between 0 and 1")


def simplex(name: str, values: np.ndarray) -> None:
    """Distributions (..., K) along the last axis."""
    at_least_zero(name, values)
    total = values.sum(axis=-1, dtype=float)
    remedy = "Divide them by their sum"
    _inside(name, total, ~(np.abs(total - 1) > checks.SUM_ROUNDING), "must sum to 1", remedy, "a sum of ")


def unit_vectors(name: str, values: np.ndarray) -> None:
    """Directions (..., D) of length 1."""
    length = np.linalg.norm(np.asarray(values, float), axis=-1)
    remedy = "Divide them by their length"
    _inside(name, length, ~(np.abs(length - 1) > checks.SUM_ROUNDING), "must have length 1", remedy, "a length of ")


def covariances(name: str, values: np.ndarray) -> None:
    """Symmetric matrices (..., D, D) without a negative eigenvalue, up to rounding."""
    matrices = np.asarray(values, float)
    matrices = np.where(np.all(np.isfinite(matrices), axis=(-2, -1), keepdims=True), matrices, 0)
    scale = np.max(np.abs(matrices), axis=(-2, -1)) + np.finfo(float).tiny
    skew = np.max(np.abs(matrices - np.swapaxes(matrices, -2, -1)), axis=(-2, -1))
    _inside(name, skew, skew <= 1e-3 * scale, "must be symmetric", "(C + C.T) / 2 makes a matrix so that nearly is")
    allowed = _EIGENVALUE_ROUNDING * scale
    with contextlib.suppress(np.linalg.LinAlgError):
        np.linalg.cholesky(matrices + allowed[..., None, None] * np.eye(matrices.shape[-1]))
        return
    lowest = np.min(np.linalg.eigvalsh(matrices), axis=-1)
    _inside(name, lowest, lowest >= -allowed, "must be positive semi-definite", what="an eigenvalue of ")


def spreads(name: str, values: np.ndarray) -> None:
    """Covariance matrices (K, D, D), or variances (K, D) or (K,)."""
    (covariances if values.ndim > 2 else at_least_zero)(name, values)


def _inside(name: str, values: np.ndarray, inside: np.ndarray, must: str, remedy: str = "", what: str = "") -> None:
    """Raise ValueError with the first of the values that are not inside; what: what to call it, as "a sum of "."""
    if np.all(inside):
        return
    place = tuple(np.argwhere(~inside)[0].tolist())
    where = f" at index {place[0] if len(place) == 1 else place}" if place else ""
    raise ValueError(f"{name} {must}; got {what}{values[place]:.6g}{where}" + (f". {remedy}" if remedy else ""))


Supports = Mapping[str, "Callable[[str, np.ndarray], None] | Supports"]


def _supported(name: str, params: Any, supports: Supports) -> None:
    """Raise ValueError for values outside of the supports that a model or family declares; eager only."""
    for key, support in supports.items():
        named = isinstance(params, Mapping)
        value, place = fields(params)[key], f"{name}[{key!r}]" if named else f"{name}.{key}"
        if isinstance(support, Mapping):
            _supported(place, value, support)
        elif checks.is_known(value):
            support(place, np.asarray(value))


def shapes(name: str, model: AnyModel, params: Params, x: Data, lead: tuple[int, ...] = ()) -> None:
    """Raise for parameters of another structure or shape than the model's own for these data.

    lead: axes that all of them have in front, such as one of restarts.
    Raises TypeError for another record, a missing key, or what is no array, and ValueError for another shape, by name.
    Values are not read. Parameters of a model without `params_like` are not looked at.
    """
    expected = complete("model", model).params_like(x)
    if expected is not None:
        told = isinstance(x, (*checks.ARRAYS, jax.ShapeDtypeStruct))
        _alike(name, params, expected, lead, f"x of shape {x.shape}" if told else "these data")


def _alike(name: str, given: Any, expected: Any, lead: tuple[int, ...], data: str) -> None:
    """Raise unless `given` has the structure and shapes of `expected`; data: what a message calls the data."""
    if expected is None:
        if given is not None:
            raise TypeError(f"{name} must be None, since the model has no such parameter; got {checks.told(given)}")
    elif dataclasses.is_dataclass(expected):
        if type(given) is not type(expected):
            raise TypeError(
                f"{name} must be {type(expected).__name__}, as the model's own start has it; got {checks.told(given)}"
            )
        own = fields(given)
        for field in dataclasses.fields(expected):
            if not field.metadata.get("static"):
                _alike(f"{name}.{field.name}", own[field.name], fields(expected)[field.name], lead, data)
    elif isinstance(expected, Mapping):
        if not isinstance(given, Mapping) or set(given) != set(expected):
            raise TypeError(f"{name} must be a dict with {sorted(expected)}; got {checks.told(given)}")
        for key in expected:
            _alike(f"{name}[{key!r}]", given[key], expected[key], lead, data)
    elif isinstance(expected, tuple):
        if not isinstance(given, tuple) or len(given) != len(expected):
            raise TypeError(f"{name} must be a tuple of {len(expected)}; got {checks.told(given)}")
        for index, each in enumerate(expected):
            _alike(f"{name}[{index}]", given[index], each, lead, data)
    else:
        _shape(name, given, (*lead, *expected.shape), data)


def _shape(name: str, given: Any, shape: tuple[int, ...], data: str) -> None:
    """Raise unless `given` is an array of this shape (or a number, where that is ())."""
    if not isinstance(given, jax.ShapeDtypeStruct) and not (isinstance(given, (int, float)) and shape == ()):
        if not isinstance(given, checks.ARRAYS):
            raise TypeError(
                f"{name} must be a JAX or NumPy array of shape {shape}; got {checks.told(given)}. Convert it first, as "
                "in jax.numpy.asarray(...)"
            )
        checks.real(name, given)
    if jnp.shape(given) != shape:
        raise ValueError(
            f"{name} must have shape {shape} for this model and {data}; got {jnp.shape(given)}. Parameters belong to "
            "one model and one number of columns: model.init(key, x) makes a start of the right shapes"
        )


def count_of(name: str, given: Any, count: int) -> None:
    """Raise unless `given` has a leading axis of this length: what can be told without data."""
    if not isinstance(given, (*checks.ARRAYS, jax.ShapeDtypeStruct)):
        raise TypeError(f"{name} must be a JAX or NumPy array of length {count}; got {checks.told(given)}")
    if jnp.shape(given)[:1] != (count,):
        raise ValueError(
            f"{name} must have length {count} for this model; got shape {jnp.shape(given)}. Parameters belong to one "
            "number of components"
        )


def like(shape: tuple[int, ...], dtype: Any) -> Any:
    """An array's shape and dtype, which stand in its place where only these are known."""
    return jax.ShapeDtypeStruct(shape, dtype)


def rows_like(x: Any) -> Any:
    """The shapes of data (N, ...) whatever N is: it stands as 2, so that data of any length share a trace."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((2, *jnp.shape(leaf)[1:]), jnp.result_type(leaf)), x)


def check(name: str, model: AnyModel, params: Params, x: Data, lead: tuple[int, ...] = ()) -> None:
    """Raise for parameters that do not fit a model and its data, by name: shapes everywhere, values eagerly."""
    shapes(name, model, params, x, lead)
    _supported(name, params, complete("model", model).supports)


def as_steps_return(
    model: Model, algorithm: Algorithm, params: Params, x: Data, weights: jax.Array | None, key: jax.Array | None
) -> Params:
    """The start, in the dtypes that a step returns; ValueError where a step changes its structure or shapes."""

    def step(params: Params) -> Params:
        return algorithm.step(model, algorithm.init(model, params, x, weights, key), x, weights).params

    given, params = params, tree.in_precision(params, tree.float_dtype(x))
    try:
        after = jax.eval_shape(step, params)
    except TypeError:
        # A model of the user's own may hold whole numbers that are meant as such, as an index.
        after = jax.eval_shape(step, given)
    structure: Any = jax.tree.structure(params)
    if structure != jax.tree.structure(after):
        raise ValueError(
            f"m_step must return the structure that params have; got {jax.tree.structure(after)} for {structure}"
        )
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(after), strict=True):
        if jnp.shape(old) != new.shape:
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} has shape {jnp.shape(old)}, but a step makes it {new.shape}: "
                "the start does not fit the model or the data"
            )
    return jax.tree.map(lambda new, old: jnp.asarray(old, new.dtype), after, params)


def at_rows(method: Callable) -> Any:
    """A decorator of a model's method `(params, x, ...)`: its arguments are checked before anything is traced."""

    @functools.wraps(method)
    def checked(self: Any, params: Any, x: Any, *rest: Any, **options: Any) -> Any:
        x = checks.native(x)
        with checks.without_estimation():
            self.check(x)
        check("params", self, params, x)
        model = original(informed(complete("model", self), x))
        return method(model, checks.native(params), x, *rest, **options)

    return checked
