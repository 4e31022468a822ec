"""Records: frozen dataclasses that are pytrees.

A field made by `static` belongs to the pytree's structure (it enters the jit key by value); every
other field holds arrays, or records of arrays, that can be traced, vmapped and differentiated.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, dataclass_transform, overload

import jax
import numpy as np

T = TypeVar("T")

_SHOWN_ELEMENTS = 12


def static(**options: Any) -> Any:
    """A dataclass field that is part of the structure: hashable, compared by value, never traced."""
    return dataclasses.field(metadata={"static": True}, **options)


def fields(record: Any) -> dict[str, Any]:
    """The fields of a record, or the entries of a dict, by name; of anything else none."""
    if isinstance(record, Mapping):
        return dict(record)
    if not dataclasses.is_dataclass(record):
        return {}
    return {field.name: vars(record)[field.name] for field in dataclasses.fields(record)}


def replace(record: Any, **values: Any) -> Any:
    """The record, or the dict, with other values in some of its fields."""
    return {**record, **values} if isinstance(record, Mapping) else dataclasses.replace(record, **values)


def _show(value: Any) -> str:
    if isinstance(value, (jax.Array, np.ndarray)) and not isinstance(value, jax.core.Tracer):
        if value.size <= _SHOWN_ELEMENTS:
            return np.array2string(np.asarray(value), precision=6, separator=", ").replace("\n", "")
        return f"{value.dtype}[{', '.join(map(str, value.shape))}]"
    return repr(value)


def _repr(self: Any) -> str:
    shown = [field.name for field in dataclasses.fields(self) if field.repr]
    inside = ", ".join(f"{name}={_show(value)}" for name, value in fields(self).items() if name in shown)
    return f"{type(self).__name__}({inside})"


def _eq(self: Any, other: Any) -> bool:
    if type(self) is not type(other):
        return NotImplemented
    mine, structure = jax.tree.flatten(self)
    theirs, other_structure = jax.tree.flatten(other)
    if not _same(structure, other_structure):
        return False
    return all(a is b or np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))


def _same(a: Any, b: Any) -> bool:
    return bool(a == b)


def _hash(self: Any) -> int:
    return hash(jax.tree.structure(self))


@overload
def record(cls: type[T]) -> type[T]: ...
@overload
def record(*, kw_only: bool = True) -> Callable[[type[T]], type[T]]: ...


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(static,))
def record(cls: Any = None, *, kw_only: bool = True) -> Any:
    """Make a class a frozen, keyword-only dataclass that JAX sees as a pytree.

    Two records are equal when their structures and their arrays are. `kw_only=False` is for the
    few records that users build by position, such as `Normal("full")`.
    """

    def wrap(cls: type[T]) -> type[T]:
        cls = dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=kw_only)(cls)
        known = dataclasses.fields(cls)  # type: ignore[arg-type]
        meta = [field.name for field in known if field.metadata.get("static")]
        data = [field.name for field in known if not field.metadata.get("static")]
        for name, method in (("__repr__", _repr), ("__eq__", _eq), ("__hash__", _hash)):
            if name not in cls.__dict__ or cls.__dict__[name] is None:
                setattr(cls, name, method)

        # `jax.tree_util.register_dataclass` compares fields but not classes, so that two model classes could share an
        # entry of the jit cache. The class is therefore one of the static values.
        def flatten(record: T) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
            values = vars(record)
            return tuple(values[name] for name in data), (cls, *(values[name] for name in meta))

        def flatten_with_keys(record: T) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
            values, statics = flatten(record)
            return tuple(zip(map(jax.tree_util.GetAttrKey, data), values, strict=True)), statics

        def unflatten(statics: tuple[Any, ...], values: Iterable[Any]) -> T:
            return cls(**dict(zip(meta, statics[1:], strict=True)), **dict(zip(data, values, strict=True)))

        jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
        return cls

    return wrap if cls is None else wrap(cls)
