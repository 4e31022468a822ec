"""A model's M-step, Q, prior, coordinates and all else that follows from its parts: written once, for all models.

The functions of this file are the methods of what is `Assembled`: of models, and of families that consist of others.
A class takes them in groups, each in the order in which it stands at the end of this file:
`m_step, q_function, log_prior, rebase = assembly.surrogate`.
"""

import functools
import operator
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from ..protocols import Params, Stats
from ..record import fields, replace
from . import statements


class Assembled(Protocol):
    """What the methods of this file ask for."""

    @property
    def parts(self) -> dict[str, Any]:
        """name -> `Part`, complete."""
        ...

    def part_params(self, params: Params) -> dict[str, Params]:
        """The parameters of every part."""
        ...

    def params_of(self, values: dict[str, Any]) -> Params:
        """Parameters from those of every part."""
        ...

    def part_statistics(self, stats: Stats) -> dict[str, Any]:
        """The statistics that every part is estimated from."""
        ...

    def with_part_statistics(self, stats: Stats, of: dict[str, Any]) -> Stats:
        """Statistics with these in place of the parts'."""
        ...


def part_params(self: Any, params: Params) -> dict[str, Params]:
    """The parameters of every part, where they go by the parts' names."""
    return fields(params)


def params_of(self: Any, values: dict[str, Any]) -> Params:
    """Parameters from those of every part, in the record `params_type`."""
    return self.params_type(**values)


def part_statistics(self: Assembled, stats: Stats) -> dict[str, Any]:
    """The statistics that every part is estimated from, where they go by the parts' names."""
    named = fields(stats)
    return {name: named[name] for name in self.parts}


def with_part_statistics(self: Assembled, stats: Stats, of: dict[str, Any]) -> Stats:
    """Statistics with these in place of the parts', where they go by the parts' names."""
    return replace(stats, **of)


def m_step(self: Assembled, stats: Stats) -> Params:
    """Each part's own M-step: argmax of Q + log-prior."""
    of = self.part_statistics(stats)
    return self.params_of({name: part.m_step(of[name]) for name, part in self.parts.items()})


def expands(self: Assembled) -> bool:
    """Whether some part has an expanded M-step."""
    return any(part.expands for part in self.parts.values())


def expanded(self: Assembled, params: Params, stats: Stats, held: tuple[str, ...] = ()) -> Params:
    """The parts' expanded M-steps, where params have the parts' names; see `protocols.Model`."""
    of, values = self.part_statistics(stats), fields(params)
    free = {name: part for name, part in self.parts.items() if name not in held}
    return replace(params, **{name: part.expanded(values[name], of[name]) for name, part in free.items()})


def q_function(self: Assembled, params: Params, stats: Stats) -> jax.Array:
    """The sum of the parts' Q: the expected complete-data log-likelihood, linear in the statistics."""
    of, values = self.part_statistics(stats), self.part_params(params)
    return _total(part.q_function(values[name], of[name]) for name, part in self.parts.items())


def log_prior(self: Assembled, params: Params) -> jax.Array:
    """The sum of the parts' log-densities of their priors; 0 without any."""
    values = self.part_params(params)
    return _total(part.log_prior(values[name]) for name, part in self.parts.items())


def expected(self: Assembled, params: Params) -> Params:
    """Parameters at their means where parts have distributions of them (`Variational`), the others as they are."""
    values = self.part_params(params)
    return self.params_of({name: part.expected(values[name]) for name, part in self.parts.items()})


def rebase(self: Assembled, stats: Stats, params: Params) -> Stats:
    """The same statistics about the reference of `params`, exactly, where parts have one."""
    of, values = self.part_statistics(stats), self.part_params(params)
    moved = {name: part.rebase(of[name], values[name]) for name, part in self.parts.items()}
    return self.with_part_statistics(stats, moved)


def unconstrain(self: Assembled, params: Params) -> Any:
    """The parts' own unconstrained coordinates, in a record of the same kind; derived values have none."""
    values = self.part_params(params)
    theta = {name: value[:0] for name, value in values.items() if name not in self.parts}
    return replace(params, **theta, **{name: part.unconstrain(values[name]) for name, part in self.parts.items()})


def constrain(self: Assembled, theta: Any) -> Params:
    """Inverse of `unconstrain`."""
    values = self.part_params(theta)
    return self.params_of({name: part.constrain(values[name]) for name, part in self.parts.items()})


def degenerate(self: Assembled, stats: Stats, held: tuple[str, ...] = ()) -> jax.Array:
    """Components (K,) that died or collapsed in one of the parts; what is held does neither."""
    of = self.part_statistics(stats)
    found = {name: part.degenerate(of[name]) for name, part in self.parts.items()}
    kept = [jnp.zeros_like(each) if name in held else each for name, each in found.items() if each.size]
    return functools.reduce(operator.or_, kept) if kept else jnp.zeros(0, bool)


def blocks(self: Assembled, params: Params) -> tuple[str, ...]:
    """Names of parameters with a conditional M-step of their own: parts, or "part.name" within one that has such."""
    values = self.part_params(params)
    names: list[str] = []
    for name, part in self.parts.items():
        inside = statements.blocks(part, values[name])
        names += [f"{name}.{block}" for block in inside] if inside else [name]
    return tuple(names)


def m_step_for(self: Assembled, params: Params, stats: Stats, names: tuple[str, ...]) -> Params:
    """The M-step over the named blocks alone, all other parameters held where they are."""
    of, values = self.part_statistics(stats), self.part_params(params)
    for name, part in self.parts.items():
        inside = tuple(block.removeprefix(f"{name}.") for block in names if block.startswith(f"{name}."))
        if inside:
            values[name] = statements.m_step_for(part, values[name], of[name], inside)
        elif name in names:
            values[name] = part.m_step(of[name])
    return self.params_of(values)


def degrees(self: Assembled, params: Params) -> dict[str, int]:
    """Free parameters by name of the part."""
    values = self.part_params(params)
    return {name: part.num_parameters(values[name]) for name, part in self.parts.items()}


def num_parameters(self: Any, params: Params) -> int:
    """Free parameters of all parts. A probability counts as one unless a support rules it out."""
    self.check_count(params)
    return sum(self.degrees(params).values())


def check_held(self: Assembled, values: dict[str, Any]) -> None:
    """Raise ValueError for parts, to be held fixed, whose values cannot be."""
    for name, value in values.items():
        self.parts[name].check_value(name, value)


def supports(self: Assembled) -> dict[str, Any]:
    """Where the values of the parts' parameters lie."""
    return {name: part.supports for name, part in self.parts.items()}


def _total(terms: Any) -> jax.Array:
    return functools.reduce(operator.add, terms)


by_name = part_params, params_of, part_statistics, with_part_statistics
surrogate = m_step, q_function, log_prior, rebase
coordinates = unconstrain, constrain
pieces = blocks, m_step_for, degenerate, degrees, num_parameters, check_held
