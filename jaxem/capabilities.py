"""What a model, a part or a slot may leave out, and what then stands in its place.

Everything behind this file meets complete objects. The library's own classes are completed where they are defined
(`completed`), a user's objects once, where they come in (`complete`); nobody else asks what an object has.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from . import tree
from .record import fields, record, static

C = TypeVar("C", bound=type)


# Of each kind of object: name -> the attribute that an object without it has.
_DEFAULTS: dict[str, dict[str, Callable[[Any], Any]]] = {
    # A family of observations, or another part of the parameters; see `protocols.Part` and `protocols.Family`.
    "part": {
        # Its start from all rows, under the name that it had before.
        "pooled": lambda part: part.init,
        # Its statistics have no reference to be moved.
        "rebase": lambda part: lambda stats, params: stats,
        # Its values may lie anywhere.
        "supports": lambda part: {},
        # Any value may be held.
        "check_value": lambda part: lambda name, value: None,
        # There is no cheaper arithmetic.
        "coarse": lambda part: lambda: part,
        # To know that no entry is missing saves nothing.
        "without_missing": lambda part: lambda: part,
        # It adds no component by itself.
        "extra_components": lambda part: 0,
        # Two M-steps make a start: the first centres statistics on the components' own means.
        "start_passes": lambda part: 2,
        # Restarts on the same rows share none of its temporaries.
        "shared_floats_per_row": lambda part: lambda params: 0,
    },
    # What statements about parameters (`Fixed`, `Tied`) ask of the model or part that they are about.
    "stated": {
        "m_step": lambda inner: None,
        "prior": lambda inner: None,
        # Parameters that no statement inside of it is about.
        "stated": lambda inner: (),
        # Parameters whose being held leaves the M-step of all others as it is: there are none.
        "separable": lambda inner: (),
        # Those that its M-step can hold: the separable ones, and those that it can be given.
        "holdable": lambda inner: (*getattr(inner, "separable", ()), *_given_names(inner)),
        "check_held": lambda inner: lambda values: None,
        # Those that all components can share, and the common value, None where it is that of the pooled statistics.
        "shareable": lambda inner: (),
        "share": lambda inner: None,
        # Whether `degenerate` takes the names of what is held, which cannot collapse.
        "collapses": lambda inner: False,
        # Free parameters by name: as many as each has coordinates.
        "degrees": lambda inner: functools.partial(_degrees, inner),
        # Other forms of it.
        "coarse": lambda inner: lambda: inner,
        "partial": lambda inner: lambda: inner,
        "without_missing": lambda inner: lambda: inner,
    },
}


def _given_names(inner: Any) -> tuple[str, ...]:
    """Parameters that a conditional M-step takes by name."""
    function = getattr(inner, "m_step_given", None)
    return () if function is None else tuple(inspect.signature(function).parameters)[1:]


def _degrees(inner: Any, params: Any) -> dict[str, int]:
    names = list(fields(params))
    if len(names) == 1:
        return {names[0]: inner.num_parameters(params)}
    theta = fields(jax.eval_shape(inner.unconstrain, params))
    return {name: tree.size(theta[name]) for name in names}


def completed(kind: str) -> Callable[[C], C]:
    """A class decorator: what the class leaves out of a kind's attributes is added to it."""

    def complete_class(cls: C) -> C:
        for name, default in _DEFAULTS[kind].items():
            if not hasattr(cls, name) and name not in getattr(cls, "__dataclass_fields__", {}):
                setattr(cls, name, property(default))
        return cls

    return complete_class


@record(kw_only=False)
class Completed:
    """An object of a user's own, with defaults for what it leaves out."""

    inner: Any
    kind: str = static()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "inner" not in self.__dict__:
            raise AttributeError(name)
        if name in _DEFAULTS[self.kind] and not hasattr(self.inner, name):
            return _DEFAULTS[self.kind][name](self.inner)
        return getattr(self.inner, name)


def complete(kind: str, given: Any) -> Any:
    """The object itself if it has all that its kind may ask for, else one that has."""
    return given if all(hasattr(given, name) for name in _DEFAULTS[kind]) else Completed(given, kind)
