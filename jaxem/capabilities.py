"""What a model, a part, a slot, an algorithm or a state may leave out, and what then stands in its place.

All other code works with complete objects. The library's own classes are completed where they are defined
(`completed`), a user's objects once, where they come in (`complete`); no other code asks what an object has.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from . import checks, tree
from .protocols import Model, Nature, Stats
from .record import fields, record, static
from .slots import Algorithm

C = TypeVar("C", bound=type)


def _nature(slot: Any) -> Nature:
    """The nature of a slot, from its plain attributes."""
    return Nature(
        stochastic=getattr(slot, "stochastic", False),
        monotone=getattr(slot, "monotone", True),
        complete=getattr(slot, "complete", True),
        inexact=getattr(slot, "inexact", False),
        by_row=getattr(slot, "by_row", False),
    )


def _nature_of_algorithm(algorithm: Any) -> Callable[[Model], Nature]:
    """The nature of an algorithm, whose `inexact` is a function of the model; not monotone unless it says so."""
    return lambda model: Nature(
        stochastic=getattr(algorithm, "stochastic", False),
        monotone=getattr(algorithm, "monotone", False),
        complete=getattr(algorithm, "complete", True),
        inexact=getattr(algorithm, "inexact", lambda model: False)(model),
    )


def _by_label(model: Any, method: str, name: str) -> Callable:
    """A method of models whose latent is one label a row; TypeError where there is none to take the place of `name`."""
    found = getattr(model, method, None)
    if found is None:
        raise TypeError(
            f"{type(original(model)).__name__} must have {name}, or {method} if its latent is a label a row"
        )
    return found


def _log_joint_of(model: Any, params: Any, x: Any, labels: jax.Array) -> jax.Array:
    """log p(x_n, label_n), (N,), of a model whose latent is one label a row."""
    joint = _by_label(model, "log_joint", "complete_log_prob(params, x, z)")(params, x)
    return jnp.take_along_axis(joint, labels[None], axis=0)[0]


def _sample_by_label(model: Any, key: jax.Array, params: Any, n: int) -> Any:
    """n rows, and the labels that they came from."""
    return _by_label(model, "sample_with_labels", "sample_with_latents(key, params, n)")(key, params, n)


def _one_step(
    algorithm: Algorithm, model: Model, params: Any, x: Any, weights: jax.Array | None = None
) -> tuple[Any, Any]:
    """The parameters after one step from `params`, and the state at `params`."""
    state = algorithm.init(model, params, x, weights)
    return algorithm.step(model, state, x, weights).params, state


def _no_posterior(expect: Any) -> Any:
    """Raises TypeError: without a posterior there is no E-step."""
    raise TypeError(
        "expect must be Exact(), Hard(), Sample(n), or an object with a method posterior(model, params, x); got "
        f"{original(expect)!r}"
    )


def _none(_: Any) -> None:
    """None, where there is no default: the caller has to check for it."""
    return None


# Of each kind of object: name -> the attribute that an object without it has.
_DEFAULTS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "model": {
        # It takes any data, and any parameters of whatever shapes and values.
        "check": lambda model: lambda x, weights=None: None,
        "params_like": lambda model: lambda x: None,
        "supports": lambda model: {},
        # Rows are the units, information criteria count them, and an E-step on all of them does no more than on a part.
        "units": lambda model: lambda x: x,
        "sample_size": lambda model: tree.total_weight,
        "partial": lambda model: lambda: model,
        # Every step needs every row, and plain EM is fast enough where no algorithm is named.
        "reduced": lambda model: lambda x, weights=None: (model.units(x), weights),
        "crawls": lambda model: False,
        # It is part of no larger model with the same likelihoods: M-steps are taken as they are.
        "expands": lambda model: False,
        "expanded": lambda model: lambda params, stats, **statements: params,
        # No component can die or collapse, there is no prior, and the objective is a log-likelihood.
        "degenerate": lambda model: lambda stats: jnp.zeros(0, bool),
        "log_prior": lambda model: lambda params: 0.0,
        "likelihood": lambda model: True,
        # Parameters are free as they are, and statistics have no reference to be moved.
        "unconstrain": lambda model: lambda params: params,
        "constrain": lambda model: lambda theta: theta,
        "rebase": lambda model: lambda stats, params: stats,
        # To know that no entry is missing saves nothing.
        "without_missing": lambda model: lambda: model,
        # There is no cheaper arithmetic, how many temporaries there are is not known, and restarts share none of them.
        "coarse": lambda model: lambda: model,
        "floats_per_row": _none,
        "shared_floats_per_row": lambda model: lambda params, x: 0,
        # It draws no starts; it has no M-step, and Q is climbed; or it has no Q, and its M-step is enough.
        "init": _none,
        "m_step": _none,
        "q_function": _none,
        # Statistics determine Q at all parameters: no M-step goes back to the rows.
        "q_on_rows": _none,
        # It has no recognition network, and no M-step under the posterior of one.
        "recognise": _none,
        "wake": _none,
        # The latent of a row is one label, the index into `log_joint`.
        "complete_log_prob": lambda model: functools.partial(_log_joint_of, model),
        "sample_with_latents": lambda model: functools.partial(_sample_by_label, model),
        # There is one M-step for all parameters, and none for blocks of them.
        "blocks": _none,
        "m_step_for": _none,
        # It does not draw parameters itself; a model with `parts` has them drawn part by part.
        "draw": _none,
        "parts": _none,
    },
    # A family of observations, or another part of the parameters; see `protocols.Part` and `protocols.Family`.
    "part": {
        # Its parameters from all rows; an older part calls this method `init`.
        "pooled": lambda part: part.init,
        # Its statistics have no reference to be moved.
        "rebase": lambda part: lambda stats, params: stats,
        # It takes any data. (A gate; families say what they take.)
        "check": lambda part: lambda x, name="x": None,
        # Its values may lie anywhere.
        "supports": lambda part: {},
        # Any value may be held.
        "check_value": lambda part: lambda name, value: None,
        # There is no cheaper arithmetic.
        "coarse": lambda part: lambda: part,
        # Its M-steps are taken as they are.
        "expands": lambda part: False,
        "expanded": lambda part: lambda params, stats, **statements: params,
        # To know that no entry is missing saves nothing.
        "without_missing": lambda part: lambda: part,
        # It adds no component by itself.
        "extra_components": lambda part: 0,
        # Two M-steps make a start: the first centres statistics on the components' own means.
        "start_passes": lambda part: 2,
        # Its columns are not correlated given the component: to integrate missing entries out takes next to nothing.
        "correlated": lambda part: False,
        # Its parameters are values, not distributions: each is its own expectation, and `log_prob` is predictive.
        "distributed": lambda part: False,
        "expected": lambda part: lambda params: params,
        "predictive": lambda part: part.log_prob,
        # It has no conjugate prior, and nothing to draw its parameters from.
        "conjugate_of": _none,
        "draw": _none,
        # The divergence of two of its distributions has no closed form.
        "kl": _none,
        # There are no values to put in place of missing ones.
        "expected_values": _none,
        "drawn_values": _none,
        "completed": _none,
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
        # Those that all components can share, and their common value; None: the M-step of the pooled statistics.
        "shareable": lambda inner: (),
        "share": lambda inner: None,
        # Whether sharing some changes the M-step of others: these names are then passed on, as `shared`.
        "shares_jointly": lambda inner: False,
        # Its M-steps are taken as they are.
        "expanded": lambda inner: lambda params, stats, **statements: params,
        # Free parameters by name: as many as each has coordinates.
        "degrees": lambda inner: functools.partial(_degrees, inner),
        # Other forms of it.
        "coarse": lambda inner: lambda: inner,
        "partial": lambda inner: lambda: inner,
        "without_missing": lambda inner: lambda: inner,
    },
    "expect": {
        "nature": _nature,
        "posterior": _no_posterior,
        # It is the same in every step and for every part of the rows.
        "at": lambda expect: lambda step, key: original(expect),
        "fold": lambda expect: lambda number: original(expect),
    },
    "gather": {
        "nature": _nature,
        # A turn is one step over all rows, which renews all statistics.
        "rounds": lambda gather: lambda problem: 1,
        "passes": lambda gather: lambda problem: 1.0,
        "rate": lambda gather: 1.0,
        # It remembers nothing, and its first statistics are made as all others are.
        "init": _none,
    },
    "maximize": {
        "nature": _nature,
        # It remembers nothing, and a turn is one step after one E-step.
        "init": lambda maximize: lambda problem, params: None,
        "rounds": lambda maximize: lambda problem, params: 1,
    },
    "algorithm": {
        "nature": _nature_of_algorithm,
        "begin": lambda algorithm: algorithm.init,
        # Its own step is a map whose fixed points are its limits.
        "limit": lambda algorithm: functools.partial(_one_step, algorithm),
        # Where a fit seems to have ended, no further check is made.
        "certify": _none,
        # The log-likelihood that its states show is that of all rows at their parameters.
        "evaluated": lambda algorithm: lambda model, state, x, weights=None: state,
    },
    # A state of an algorithm, or what a slot remembers.
    "state": {
        # Its first E-step is made, its M-steps reach the maximum of Q, and its objective does not change.
        "waiting": _none,
        "missed": lambda state: 0.0,
        "settled": lambda state: True,
        # No direction of further ascent has been looked for.
        "certified": lambda state: False,
        # The loop estimates what is still to be gained.
        "left": _none,
    },
    "statistics": {
        # The log-likelihood is not known.
        "loglik": _none,
    },
    "optimizer": {
        # An object without these is no optimiser.
        "init": _none,
        "update": _none,
    },
}

# Each of these attributes is of use only together with another.
_PAIRS = {"unconstrain": "constrain", "constrain": "unconstrain", "blocks": "m_step_for", "m_step_for": "blocks"}

# Methods that give another form of an object, which is as complete.
_FORMS = ("coarse", "partial", "without_missing")


class _Default(property):
    """An attribute that a class has by default."""


def _given_names(inner: Any) -> tuple[str, ...]:
    """Parameters that a conditional M-step takes by name."""
    function = getattr(inner, "m_step_given", None)
    return () if function is None else tuple(inspect.signature(function).parameters)[1:]


def degenerate(inner: Any, stats: Stats, held: tuple[str, ...]) -> jax.Array:
    """Components that died or collapsed where these parameters are held, if `degenerate` takes their names."""
    takes_names = "held" in inspect.signature(inner.degenerate).parameters
    return inner.degenerate(stats, held=held) if takes_names else inner.degenerate(stats)


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
                setattr(cls, name, _Default(default))
        return cls

    return complete_class


@record(kw_only=False)
class Completed:
    """An object with defaults for what it leaves out."""

    inner: Any
    kind: str = static()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "inner" not in self.__dict__:
            raise AttributeError(name)
        defaults = _DEFAULTS[self.kind]
        if name in defaults and not states(self.inner, name, _PAIRS.get(name, name)):
            return defaults[name](self)
        found = getattr(self.inner, name)
        return (lambda: self._form(found())) if name in _FORMS else found

    def _form(self, other: Any) -> Any:
        return self if other is self.inner else complete(self.kind, other)

    def __repr__(self) -> str:
        return repr(self.inner)


def complete(kind: str, given: Any) -> Any:
    """The object itself if it has all that its kind may ask for, else one that has."""
    if isinstance(given, Completed) and given.kind == kind:
        return given
    return given if all(hasattr(given, name) for name in _DEFAULTS[kind]) else Completed(given, kind)


def original(completed: Any) -> Any:
    """The object as it came in."""
    return completed.inner if isinstance(completed, Completed) else completed


def states(completed: Any, *names: str) -> bool:
    """Whether an object has all of these by itself, and none by default."""
    inner = original(completed)
    return all(hasattr(inner, name) and not isinstance(getattr(type(inner), name, None), _Default) for name in names)


def informed(model: Any, x: Any) -> Any:
    """The complete model in its form for such data: where these are known to be complete, less is compiled."""
    if not tree.nothing_missing(x):
        return model
    form = model.without_missing()
    # A user's wrapper that delegates unknown attributes would give the form of the inner model, without the wrapper.
    return form if type(original(form)) is type(original(model)) else model


def fitted_model(model: Any) -> Model:
    """The model, complete. Raises TypeError unless it can be one: with an E-step, and something to maximise."""
    known = states(model, "e_step") and (states(model, "m_step") or states(model, "q_function"))
    wrap = f": it is fitted inside of one, as Mixture({model!r}, 2)" if states(model, "log_prob") else ""
    checks.made("model", model, known, "a model, as Mixture(Normal(), num_components=2)", wrap)
    return complete("model", model)


def fitting_algorithm(algorithm: Any) -> Algorithm:
    """The algorithm, complete. Raises TypeError unless it can be one: an instance, with `init` and `step`."""
    checks.made("algorithm", algorithm, states(algorithm, "init", "step"), "an algorithm, as EM() or squarem()")
    return complete("algorithm", algorithm)
