"""Statements about parameters: held fixed, or shared by all components.

Both wrap a model or a family and are one themselves, so they compose. An M-step under them is still
an exact conditional maximisation; what cannot be honoured exactly is refused when it is stated.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from . import parameters, tree
from .protocols import Params, Stats
from .record import record, static

# Methods whose first argument is parameters: they see these as the statement has them.
_AT_PARAMS = ("log_prior", "m_step_for", "q_function")
# Those whose second argument is data.
_AT_DATA = ("e_step", "infer", "statistics", "log_prob", "posterior", "predict", "stats")
# Methods that give another form of the model: the statement holds for that one too.
_FORMS = ("coarse", "partial")


def _delegate(self: Any, name: str) -> Any:
    """What the wrapped model has, and nothing else, so that `hasattr` tells the truth."""
    if name.startswith("__") or "inner" not in self.__dict__:
        raise AttributeError(name)
    found = getattr(self.inner, name)
    if name in _AT_DATA:
        return lambda params, x, *rest, **options: found(_fitting(self, params, x), x, *rest, **options)
    if name in _AT_PARAMS:
        return lambda params, *rest, **options: found(self.apply(params), *rest, **options)
    if name == "blocks":
        return lambda params: tuple(block for block in found(params) if block not in _stated(self))
    if name == "degenerate" and isinstance(self, Fixed) and hasattr(self.inner, "collapses"):
        return lambda stats, held=(): found(stats, held=(*held, *self.values))
    if name in _FORMS:
        return lambda: self if found() is self.inner else dataclasses.replace(self, inner=found())
    return found


def _fitting(self: Any, params: Params, x: Any) -> Params:
    """Parameters as the statement has them, once it is known that they are a model's for these data."""
    parameters.shapes("params", self, params, x)
    return self.apply(params)


def _replace(params: Params, **values: Any) -> Params:
    return dataclasses.replace(params, **values)


def _given_names(inner: Any) -> tuple[str, ...]:
    """Parameters that the M-step can be given."""
    if isinstance(inner, (Fixed, Tied)):
        return _given_names(inner.inner)
    function = getattr(inner, "m_step_given", None)
    return () if function is None else tuple(inspect.signature(function).parameters)[1:]


def _stated(inner: Any) -> tuple[str, ...]:
    """Parameters that a statement further inside is about: a second one could only contradict it."""
    if not isinstance(inner, (Fixed, Tied)):
        return ()
    return (*(inner.values if isinstance(inner, Fixed) else inner.names), *_stated(inner.inner))


def _holdable(inner: Any) -> tuple[str, ...]:
    """Parameters that an exact M-step can hold."""
    return (*getattr(inner, "separable", ()), *_given_names(inner))


def blocks(inner: Any, params: Params) -> tuple[str, ...]:
    """Names of parameters over each of which there is an exact conditional M-step, all others held where they are.

    None where one of the parameters has no such M-step: blocks cover all that is free.
    """
    if not dataclasses.is_dataclass(params):
        return ()
    stated, holdable = _stated(inner), set(_holdable(inner))
    names = [field.name for field in dataclasses.fields(params) if field.name not in stated]
    return tuple(names) if all(set(names) - {name} <= holdable for name in names) else ()


def m_step_for(inner: Any, params: Params, stats: Stats, names: tuple[str, ...]) -> Params:
    """The M-step over these parameters alone, all others held where they are."""
    held = {
        field.name: getattr(params, field.name)
        for field in dataclasses.fields(params)
        if field.name not in (*names, *_stated(inner))
    }
    return Fixed(inner, held).m_step(stats) if held else inner.m_step(stats)


def _degrees(inner: Any, params: Params) -> dict[str, int]:
    """Free parameters by name: as `inner` tells, else as many as each has coordinates."""
    if hasattr(inner, "degrees"):
        return inner.degrees(params)
    names = [field.name for field in dataclasses.fields(params)]
    if len(names) == 1:
        return {names[0]: inner.num_parameters(params)}
    theta = jax.eval_shape(inner.unconstrain, params)
    return {name: tree.size(getattr(theta, name)) for name in names}


def _refuse(inner: Any, what: str, names: Any, known: tuple[str, ...]) -> None:
    """Raise TypeError for names of parameters that an exact M-step cannot treat so."""
    known = tuple(name for name in known if name not in _stated(inner))
    unknown = [name for name in names if name not in known]
    if unknown:
        possible = f"can be {what}: {', '.join(known)}" if known else f"nothing can be {what}"
        raise TypeError(
            f"{unknown[0]!r} of {type(inner).__name__} cannot be {what} by an exact M-step; of it, {possible}"
        )


@record(kw_only=False)
class Fixed:
    """A model or family with some of its parameters held at given values.

    inner: the model or family; values: name -> value, broadcast to the parameter's shape, as in
    `Fixed(Mixture(Binomial(10), 2), {"weights": jnp.array([0.5, 0.5])})` or
    `Mixture(Fixed(Normal("diag"), {"mean": centres}), 3)`. Starts take the values too, and held
    parameters do not count as free. Values may be traced.
    Raises TypeError for a parameter that the M-step cannot hold exactly, or that `inner` states already.
    """

    inner: Any
    values: dict[str, Any]

    __getattr__ = _delegate

    def __post_init__(self) -> None:
        if not hasattr(self.inner, "m_step"):
            if isinstance(self.inner, (str, int, float, Mapping)):
                raise TypeError(f"inner must be a model or a family; got {self.inner!r}")
            return
        if not isinstance(self.values, Mapping) or not self.values:
            raise TypeError(f"values must be a dict of name -> value; got {self.values!r}")
        _refuse(self.inner, "held", self.values, _holdable(self.inner))
        if hasattr(self.inner, "check_held"):
            self.inner.check_held(self.values)

    def init(self, *arguments: Any, **options: Any) -> Params:
        """The inner start, with the values in their places."""
        return self.apply(self.inner.init(*arguments, **options))

    def apply(self, params: Params) -> Params:
        """These parameters, with the values in their places."""

        def held(name: str, value: Any, old: Any) -> jax.Array:
            if not _broadcasts(jnp.shape(value), jnp.shape(old)):
                raise ValueError(
                    f"{name} is held at values of shape {jnp.shape(value)}, but the model has it in shape "
                    f"{jnp.shape(old)} for these data"
                )
            return jnp.broadcast_to(jnp.asarray(value, jnp.result_type(old)), jnp.shape(old))

        return _replace(
            params,
            **{
                name: jax.tree.map(functools.partial(held, name), value, getattr(params, name))
                for name, value in self.values.items()
            },
        )

    def m_step(self, stats: Stats) -> Params:
        """The maximum over all other parameters."""
        return self.m_step_given(stats)

    def m_step_given(self, stats: Stats, **held: Any) -> Params:
        """The same, with more parameters held by a statement around this one."""
        separable = getattr(self.inner, "separable", ())
        # In the precision of the statistics, whatever that of the values is.
        own = {name: value for name, value in self.values.items() if name not in separable}
        own = jax.tree.map(lambda value: jnp.asarray(value, tree.float_dtype(stats)), own)
        given = {**own, **held}
        return self.apply(self.inner.m_step_given(stats, **given) if given else self.inner.m_step(stats))

    def num_parameters(self, params: Params) -> int:
        """Free parameters: those that are not held."""
        each = _degrees(self.inner, params)
        return self.inner.num_parameters(params) - sum(each[name] for name in self.values)

    def degrees(self, params: Params) -> dict[str, int]:
        """Free parameters by name, 0 where held."""
        return {**_degrees(self.inner, params), **dict.fromkeys(self.values, 0)}

    def unconstrain(self, params: Params) -> Any:
        """The inner coordinates of what is free; a held parameter has none."""
        theta = self.inner.unconstrain(params)
        # An empty array keeps the shape that `constrain` has to hand on.
        return _replace(theta, **{name: jax.tree.map(_emptied, getattr(theta, name)) for name in self.values})

    def constrain(self, theta: Any) -> Params:
        """Inverse of `unconstrain`."""
        full = _replace(theta, **{name: jax.tree.map(_refilled, getattr(theta, name)) for name in self.values})
        return self.apply(self.inner.constrain(full))


@record(kw_only=False)
class Tied:
    """A family some of whose parameters all components share.

    inner: the family; names: of its parameters, one or several, as in
    `Mixture(Tied(StudentT(), "degrees_of_freedom"), 3)`. They keep their shape, component axis
    first, all components equal: the maximum given the sum of the components' statistics.
    For covariances there are the tied shapes of `Normal` itself.
    Raises TypeError for a parameter that the M-step cannot share exactly, or that `inner` states already.
    """

    inner: Any
    names: tuple[str, ...] = static()

    __getattr__ = _delegate

    def __post_init__(self) -> None:
        names = (self.names,) if isinstance(self.names, str) else tuple(self.names)
        object.__setattr__(self, "names", names)
        if not hasattr(self.inner, "m_step"):
            return
        _refuse(self.inner, "shared", names, getattr(self.inner, "shareable", ()))
        if getattr(self.inner, "prior", None) is not None:
            raise TypeError(f"parameters of {type(self.inner).__name__} with a prior cannot be shared: leave one out")

    def init(self, *arguments: Any, **options: Any) -> Params:
        return self.inner.init(*arguments, **options)

    def apply(self, params: Params) -> Params:
        """These parameters, the shared ones all as the first component has them."""
        first = {name: jax.tree.map(_first_everywhere, getattr(params, name)) for name in self.names}
        return _replace(params, **first)

    def m_step(self, stats: Stats) -> Params:
        """The maximum under the statement: shared parameters from the pooled statistics."""
        return self.m_step_given(stats)

    def m_step_given(self, stats: Stats, **held: Any) -> Params:
        """The same, with parameters held by a statement around this one."""
        params = self.inner.m_step_given(stats, **held) if held else self.inner.m_step(stats)
        share: Callable = getattr(self.inner, "share", self._pooled)
        values = {name: share(stats, name, params) for name in self.names}
        return _replace(
            params, **{name: jnp.broadcast_to(value, getattr(params, name).shape) for name, value in values.items()}
        )

    def num_parameters(self, params: Params) -> int:
        """Free parameters, shared ones counted once."""
        each, shared = _degrees(self.inner, params), self.degrees(params)
        return self.inner.num_parameters(params) - sum(each[name] - shared[name] for name in self.names)

    def degrees(self, params: Params) -> dict[str, int]:
        """Free parameters by name, shared ones counted once."""
        each = _degrees(self.inner, params)
        return {**each, **{name: each[name] // getattr(params, name).shape[0] for name in self.names}}

    def unconstrain(self, params: Params) -> Any:
        """The inner coordinates, shared ones once."""
        theta = self.inner.unconstrain(params)
        return _replace(
            theta, **{name: (getattr(theta, name)[:1], _emptied(getattr(theta, name))) for name in self.names}
        )

    def constrain(self, theta: Any) -> Params:
        """Inverse of `unconstrain`."""
        full = {name: getattr(theta, name)[0] + _refilled(getattr(theta, name)[1]) for name in self.names}
        return self.inner.constrain(_replace(theta, **full))

    def _pooled(self, stats: Stats, name: str, _: Params) -> jax.Array:
        """The M-step from the sum of the statistics, where these are one component's after the other."""
        together = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0, keepdims=True), stats)
        return getattr(self.inner.m_step(together), name)


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether an array of one shape is broadcast to the other as it is."""
    axes = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(size in (1, whole) for size, whole in axes)


def _emptied(leaf: jax.Array) -> jax.Array:
    return jnp.zeros((0, *leaf.shape), leaf.dtype)


def _refilled(leaf: jax.Array) -> jax.Array:
    return jnp.zeros(leaf.shape[1:], leaf.dtype)


def _first_everywhere(leaf: jax.Array) -> jax.Array:
    return jnp.broadcast_to(leaf[:1], leaf.shape)
