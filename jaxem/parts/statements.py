"""Statements about parameters: that they are held fixed, or shared by all components.

Both wrap a model or a part and are one themselves, so that they compose. An M-step under them is still an exact
conditional maximisation; a statement that the M-step cannot keep exactly is refused when it is made.
"""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .. import capabilities, parameters, tree
from ..protocols import Data, Family, Model, Params, Part, Stats
from ..record import fields, record, replace, static
from . import conjugacy


def _inner(statement: Any) -> Any:
    """The wrapped model or part, completed with all that statements ask of it."""
    return capabilities.complete("stated", statement.inner)


def _delegate(statement: Any, name: str) -> Any:
    """An attribute of the wrapped model that the statement does not change; methods get `apply(params)`."""
    if name.startswith("__") or "inner" not in statement.__dict__:
        raise AttributeError(name)
    found = getattr(statement.inner, name)
    names = _argument_names(name, found)
    if "params" not in names:
        return found

    @functools.wraps(found)
    def with_values(*given: Any, **options: Any) -> Any:
        bound = {**dict(zip(names, given, strict=False)), **options}
        if "x" in bound:
            parameters.shapes("params", statement, bound["params"], bound["x"])
        place, params = names.index("params"), statement.apply(bound["params"])
        if "params" in options:
            return found(*given, **{**options, "params": params})
        return found(*given[:place], params, *given[place + 1 :], **options)

    return with_values


def _argument_names(name: str, found: Any) -> list[str]:
    """The names of a method's arguments: as in the protocols if these define it, else its own."""
    if not inspect.isroutine(found) and not isinstance(found, functools.partial):
        return []
    for protocol in (Model, Family):
        if inspect.isfunction(protocol.__dict__.get(name)):
            return list(inspect.signature(protocol.__dict__[name]).parameters)[1:]
    return list(inspect.signature(found).parameters)


def blocks(inner: Part | Model, params: Params) -> tuple[str, ...]:
    """Names of parameters over each of which there is an exact conditional M-step, all others held where they are.

    Empty where one of the parameters has no such M-step: blocks cover all that is free.
    """
    part = capabilities.complete("stated", inner)
    names = [name for name, value in fields(params).items() if name not in part.stated and value is not None]
    holdable = set(part.holdable)
    return tuple(names) if all(set(names) - {name} <= holdable for name in names) else ()


def m_step_for(inner: Part | Model, params: Params, stats: Stats, names: tuple[str, ...]) -> Params:
    """The M-step over these parameters alone, all others held where they are."""
    stated = capabilities.complete("stated", inner).stated
    kept = {name: value for name, value in fields(params).items() if name not in (*names, *stated)}
    held = {name: value for name, value in kept.items() if value is not None}
    return Fixed(inner, held).m_step(stats) if held else inner.m_step(stats)


def _refuse(inner: Part | Model, what: str, names: Any, known: tuple[str, ...]) -> None:
    """Raise TypeError for names of parameters that an exact M-step cannot treat so."""
    stated = capabilities.complete("stated", inner).stated
    known = tuple(name for name in known if name not in stated)
    unknown = [name for name in names if name not in known]
    if unknown:
        possible = f"can be {what}: {', '.join(known)}" if known else f"nothing can be {what}"
        raise TypeError(
            f"{unknown[0]!r} of {type(inner).__name__} cannot be {what} by an exact M-step; of it, {possible}"
        )


@record(kw_only=False)
class Fixed:
    """A model or family with some of its parameters held at given values.

    inner: the model or family.
    values: name -> value, broadcast to the parameter's shape, as in
        `Fixed(Mixture(Binomial(10), 2), {"weights": jnp.array([0.5, 0.5])})` or
        `Mixture(Fixed(Normal("diag"), {"mean": centres}), 3)`. They may be traced.

    Starts take the values too, and held parameters do not count as free.
    Raises TypeError for a parameter that the M-step cannot hold exactly, or that `inner` states already.
    """

    inner: Any
    values: dict[str, Any]

    __getattr__ = _delegate

    def __post_init__(self) -> None:
        if isinstance(self.inner, (str, int, float, Mapping)):
            raise TypeError(f"inner must be a model or a family; got {self.inner!r}")
        inner = _inner(self)
        if inner.m_step is None:
            return  # JAX rebuilds records around objects of its own
        if not isinstance(self.values, Mapping) or not self.values:
            raise TypeError(f"values must be a dict of name -> value; got {self.values!r}")
        _refuse(self.inner, "held", self.values, inner.holdable)
        inner.check_held(self.values)

    @property
    def stated(self) -> tuple[str, ...]:
        """Parameters that this statement, or one inside it, is about: another one could only contradict it."""
        return (*self.values, *_inner(self).stated)

    @property
    def holdable(self) -> tuple[str, ...]:
        """Parameters that an exact M-step can hold."""
        return _inner(self).holdable

    def init(self, *arguments: Any, **options: Any) -> Params:
        """The inner start, with the values in their places."""
        return self.apply(self.inner.init(*arguments, **options))

    def pooled(self, x: Data, weights: jax.Array | None, num_components: int) -> Params:
        """All rows as one component, with the values in their places."""
        return self.apply(capabilities.complete("part", self.inner).pooled(x, weights, num_components))

    def apply(self, params: Params) -> Params:
        """These parameters, with the values in their places."""

        def held(name: str, value: Any, old: Any) -> jax.Array:
            if not _broadcasts(jnp.shape(value), jnp.shape(old)):
                raise ValueError(
                    f"{name} is held at values of shape {jnp.shape(value)}, but the model has it in shape "
                    f"{jnp.shape(old)} for these data"
                )
            return jnp.broadcast_to(jnp.asarray(value, jnp.result_type(old)), jnp.shape(old))

        return _changed(
            params, self.values, lambda name, old: jax.tree.map(functools.partial(held, name), self.values[name], old)
        )

    def m_step(self, stats: Stats) -> Params:
        """The maximum over all other parameters."""
        return self.m_step_given(stats)

    def m_step_given(self, stats: Stats, **held: Any) -> Params:
        """The same, with more parameters held by a statement around this one."""
        separable = _inner(self).separable
        # In the precision of the statistics, whatever that of the values is.
        own = {name: value for name, value in self.values.items() if name not in separable}
        own = jax.tree.map(lambda value: jnp.asarray(value, tree.float_dtype(stats)), own)
        given = {**own, **held}
        return self.apply(self.inner.m_step_given(stats, **given) if given else self.inner.m_step(stats))

    def draw(self, key: jax.Array, stats: Stats) -> Params:
        """All other parameters drawn given the statistics; TypeError unless what is held is independent of them."""
        inner = capabilities.complete("model", self.inner)
        if inner.parts is None or not set(self.values) <= set(inner.parts):
            raise TypeError(
                f"{', '.join(self.values)} of {type(self.inner).__name__} cannot be held where parameters are drawn: "
                "whole parts of a model can, such as a mixture's weights"
            )
        return self.apply(conjugacy.drawn(inner, key, stats))

    def expanded(self, params: Params, stats: Stats, held: tuple[str, ...] = (), **shared: Any) -> Params:
        """The inner expanded M-step, with the values held."""
        return _inner(self).expanded(params, stats, held=(*held, *self.values), **shared)

    def degenerate(self, stats: Stats, held: tuple[str, ...] = ()) -> jax.Array:
        """Components that died or collapsed: what is held does not."""
        return capabilities.degenerate(self.inner, stats, (*held, *self.values))

    def blocks(self, params: Params) -> tuple[str, ...]:
        """The model's blocks, but for those that are held."""
        return tuple(block for block in self.inner.blocks(params) if block not in self.stated)

    def coarse(self) -> "Fixed":
        """The statement about the cheapest form."""
        return _about(self, _inner(self).coarse())

    def partial(self) -> "Fixed":
        """The statement about the model as it sees a part of the rows."""
        return _about(self, _inner(self).partial())

    def without_missing(self) -> "Fixed":
        """The statement about the form for rows without missing entries."""
        return _about(self, _inner(self).without_missing())

    def num_parameters(self, params: Params) -> int:
        """Free parameters: those that are not held."""
        each = _inner(self).degrees(params)
        return self.inner.num_parameters(params) - sum(each[name] for name in self.values)

    def degrees(self, params: Params) -> dict[str, int]:
        """Free parameters by name, 0 where held."""
        return {**_inner(self).degrees(params), **dict.fromkeys(self.values, 0)}

    def unconstrain(self, params: Params) -> Any:
        """The inner coordinates of what is free; a held parameter has none."""
        # An empty array keeps the shape that `constrain` has to hand on.
        return _changed(self.inner.unconstrain(params), self.values, lambda _, theta: jax.tree.map(_emptied, theta))

    def constrain(self, theta: Any) -> Params:
        """Inverse of `unconstrain`."""
        full = _changed(theta, self.values, lambda _, empty: jax.tree.map(_refilled, empty))
        return self.apply(self.inner.constrain(full))


@record(kw_only=False)
class Tied:
    """A family some of whose parameters all components share.

    inner: the family.
    names: of its parameters, one or several, as in `Mixture(Tied(StudentT(), "degrees_of_freedom"), 3)`.

    Shared parameters keep their shape, component axis first, with all components equal: the maximum given the sum of
    the components' statistics. For covariances there are the tied shapes of `Normal` itself.
    Raises TypeError for a parameter that the M-step cannot share exactly, or that `inner` states already.
    """

    inner: Any
    names: tuple[str, ...] = static()

    __getattr__ = _delegate

    def __post_init__(self) -> None:
        names = (self.names,) if isinstance(self.names, str) else tuple(self.names)
        object.__setattr__(self, "names", names)
        inner = _inner(self)
        if inner.m_step is None:
            return  # JAX rebuilds records around objects of its own
        _refuse(self.inner, "shared", names, inner.shareable)
        if inner.prior is not None:
            raise TypeError(f"parameters of {type(self.inner).__name__} with a prior cannot be shared: leave one out")

    @property
    def stated(self) -> tuple[str, ...]:
        """Parameters that this statement, or one inside it, is about."""
        return (*self.names, *_inner(self).stated)

    @property
    def holdable(self) -> tuple[str, ...]:
        """Parameters that an exact M-step can hold."""
        return _inner(self).holdable

    def apply(self, params: Params) -> Params:
        """These parameters, the shared ones all as the first component has them."""
        return _changed(params, self.names, lambda _, value: jax.tree.map(_first_everywhere, value))

    def m_step(self, stats: Stats) -> Params:
        """The maximum under the statement: shared parameters from the pooled statistics."""
        return self.m_step_given(stats)

    def m_step_given(self, stats: Stats, **held: Any) -> Params:
        """The same, with parameters held by a statement around this one."""
        if _inner(self).shares_jointly:
            return self.inner.m_step_given(stats, **{**held, "shared": (*self.names, *held.get("shared", ()))})
        params = self.inner.m_step_given(stats, **held) if held else self.inner.m_step(stats)
        share = _inner(self).share

        def shared(name: str, value: jax.Array) -> jax.Array:
            found = self._pooled(stats, name) if share is None else share(stats, name, params)
            return jnp.broadcast_to(found, value.shape)

        return _changed(params, self.names, shared)

    def draw(self, key: jax.Array, stats: Stats) -> Params:
        """TypeError: there is no draw of what components share."""
        raise TypeError(f"{', '.join(self.names)} are shared by all components, and cannot be drawn")

    def expanded(self, params: Params, stats: Stats, shared: tuple[str, ...] = (), **held: Any) -> Params:
        """The inner expanded M-step; shared parameters stay shared."""
        return _inner(self).expanded(params, stats, shared=(*shared, *self.names), **held)

    def blocks(self, params: Params) -> tuple[str, ...]:
        """The model's blocks, but for those that are shared."""
        return tuple(block for block in self.inner.blocks(params) if block not in self.stated)

    def coarse(self) -> "Tied":
        """The statement about the cheapest form."""
        return _about(self, _inner(self).coarse())

    def without_missing(self) -> "Tied":
        """The statement about the form for rows without missing entries."""
        return _about(self, _inner(self).without_missing())

    def num_parameters(self, params: Params) -> int:
        """Free parameters, shared ones counted once."""
        each, shared = _inner(self).degrees(params), self.degrees(params)
        return self.inner.num_parameters(params) - sum(each[name] - shared[name] for name in self.names)

    def degrees(self, params: Params) -> dict[str, int]:
        """Free parameters by name, shared ones counted once."""
        each, values = _inner(self).degrees(params), fields(params)
        return {**each, **{name: each[name] // values[name].shape[0] for name in self.names}}

    def unconstrain(self, params: Params) -> Any:
        """The inner coordinates, shared ones once."""
        return _changed(self.inner.unconstrain(params), self.names, lambda _, theta: (theta[:1], _emptied(theta)))

    def constrain(self, theta: Any) -> Params:
        """Inverse of `unconstrain`."""
        return self.inner.constrain(_changed(theta, self.names, lambda _, once: once[0] + _refilled(once[1])))

    def _pooled(self, stats: Stats, name: str) -> jax.Array:
        """The M-step from the statistics summed over components, which are their leading axis."""
        together = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0, keepdims=True), stats)
        return fields(self.inner.m_step(together))[name]


def _about(statement: Any, form: Any) -> Any:
    """The statement about another form of its model or part; itself where the form is the same."""
    form = capabilities.original(form)
    return statement if form is statement.inner else replace(statement, inner=form)


def _changed(params: Params, names: Any, change: Any) -> Params:
    """Parameters, those of these names replaced by change(name, value)."""
    values = fields(params)
    return replace(params, **{name: change(name, values[name]) for name in names})


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
