"""What a model, a part or a slot may leave out, and what then stands in its place.

Everything behind this file meets complete objects. The library's own classes are completed where they are defined
(`completed`), a user's objects once, where they come in (`complete`); nobody else asks what an object has.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from .record import record, static

C = TypeVar("C", bound=type)


# Of each kind of object: name -> the attribute that an object without it has.
_DEFAULTS: dict[str, dict[str, Callable[[Any], Any]]] = {
    # A family of observations, or another part of the parameters; see `protocols.Part` and `protocols.Family`.
    "part": {
        # Its statistics have no reference to be moved.
        "rebase": lambda part: lambda stats, params: stats,
        # Its values may lie anywhere.
        "supports": lambda part: {},
        # There is no cheaper arithmetic.
        "coarse": lambda part: lambda: part,
        # It takes no missing entries apart, so that knowing of none saves nothing.
        "complete": lambda part: lambda: part,
        # It adds no component by itself.
        "extra_components": lambda part: 0,
        # Two M-steps make a start: the first centres statistics on the components' own means.
        "start_passes": lambda part: 2,
        # Restarts on the same rows share none of its temporaries.
        "shared_floats_per_row": lambda part: lambda params: 0,
        # None of its parameters can be held while the others are maximised, or be shared by all components.
        "separable": lambda part: (),
        "holdable": lambda part: (),
        "shareable": lambda part: (),
        "check_held": lambda part: lambda values: None,
    },
}


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
