"""What the rooms promise each other. Nothing here is inherited; anything of this shape fits."""

from typing import Any, Protocol

import jax

Params = Any
Stats = Any
Data = Any


class Model(Protocol):
    """A latent-variable model, as the algorithms see it.

    `e_step` gives expected sufficient statistics that add over rows, with the log-likelihood at
    `params` as their leaf `loglik`; `m_step` maximises `q_function + log_prior` given them (a model
    without an `m_step` has its Q climbed by gradients).

    A model may also have (each is used where present): `init(key, x, weights)`,
    `check(x, weights)` and `check_params(params)` to refuse bad input eagerly, `params_like(x)`, the shapes that
    parameters have for such data, and `supports`, where their values lie (see `parameters.py`), by both of which
    starts are refused; `degenerate(stats) -> bool array` for components that died or collapsed (`collapses` if it
    takes `held` too, names of parameters that are held, which cannot collapse),
    `floats_per_row(params, x) -> int` for the size
    of blocks, `floats_per_restart` for how many restarts fit side by side, `coarse()`
    for a cheaper model with the same parameters that does the bulk of many restarts, `partial()` for
    the model as it sees a part of the rows (where an E-step on all of them does more), `rebase`,
    `units(x)`: the data with a leading axis of independent units, where other forms are taken too,
    `likelihood = False` where the objective is none and has no unit of its own,
    `blocks(params)` and `m_step_for(params, stats, names)`, an M-step over some of the parameters;
    `sample_size(x, weights)`: the n of information criteria, where it is not the rows;
    `unconstrain` and `constrain`, `num_parameters`, and by name `degrees`; `log_prob`, `posterior`, `predict`,
    `sample`.
    """

    def infer(self, params: Params, x: Data, expect: Any = ...) -> Any:
        """The posterior of the latents; its `evidence` has log p(x_n) of every unit (row, sequence)."""
        ...

    def statistics(self, params: Params, x: Data, posterior: Any, weights: jax.Array | None = None) -> Stats:
        """Additive statistics expected under any posterior of that kind."""
        ...

    def e_step(self, params: Params, x: Data, weights: jax.Array | None = None, expect: Any = ...) -> Stats: ...

    def m_step(self, stats: Stats) -> Params: ...

    def q_function(self, params: Params, stats: Stats) -> jax.Array: ...

    def log_prior(self, params: Params) -> jax.Array: ...


class Part(Protocol):
    """A named piece of the parameters, independent of the others given the statistics.

    What a part may leave out, and what then takes its place, stands in `capabilities`.
    """

    def m_step(self, stats: Stats) -> Params:
        """argmax of q_function + log_prior."""
        ...

    def q_function(self, params: Params, stats: Stats) -> jax.Array:
        """Expected complete-data log-likelihood, linear in the statistics."""
        ...

    def log_prior(self, params: Params) -> jax.Array: ...

    def rebase(self, stats: Stats, params: Params) -> Stats:
        """The same statistics about the reference of other parameters, exactly."""
        ...

    def degenerate(self, stats: Stats) -> jax.Array:
        """Components (K,) that died or collapsed; (0,) where there are none that could."""
        ...

    def num_parameters(self, params: Params) -> int: ...

    def unconstrain(self, params: Params) -> Any: ...

    def constrain(self, theta: Any) -> Params: ...

    def check_value(self, name: str, value: Any) -> None:
        """Raise ValueError for a value, to be held fixed, that cannot be."""
        ...

    @property
    def supports(self) -> Any:
        """Where values lie: name -> a check of `parameters`, or one check where the parameter is an array."""
        ...


class Gate(Part, Protocol):
    """p(component | row): a part that weighs the components of a mixture, as `Probabilities` or a softmax does."""

    def pooled(self, x: Data, weights: jax.Array | None, num_components: int) -> Params:
        """All components alike: where a start begins."""
        ...

    def log_prob(self, params: Params, x: Data) -> jax.Array:
        """log p(component k | row n): (K, N), or (K, 1) where rows have no part in it."""
        ...

    def stats(self, params: Params, x: Data, responsibilities: jax.Array) -> Stats:
        """Additive statistics from responsibilities (K, N)."""
        ...


class Family(Protocol):
    """p(observation | component): K components at once, component axis first.

    A family may also have (each is used where present): `rebase(stats, params)` where statistics
    have a reference; `supports`, where the values of its parameters lie; `coarse()`;
    `extra_components`, how many components it adds by itself, after
    the K; `shared_floats_per_row(params)`, of `floats_per_row` what does not depend on the
    parameters; `start_passes`, how many M-steps make a start (2); `separable`, the names of parameters
    whose being held or shared leaves the M-step of the others as it is, and
    `m_step_given(stats, **held)` for others that can be held; `shareable`, and
    `share(stats, name, params)`, a shared parameter given the M-step of all others (see `Fixed` and `Tied`).
    """

    def pooled(self, x: Data, weights: jax.Array | None, num_components: int) -> Params:
        """The whole data as one component, K times over: where statistics are first centred."""
        ...

    def features(self, x: Data) -> jax.Array:
        """Rows as points (N, F), for seeding."""
        ...

    def log_prob(self, params: Params, x: Data) -> jax.Array: ...

    def stats(self, params: Params, x: Data, responsibilities: jax.Array) -> Stats:
        """Additive statistics; their `count` (K,) is the sum of the responsibilities."""
        ...

    def m_step(self, stats: Stats) -> Params: ...

    def q_function(self, params: Params, stats: Stats) -> jax.Array: ...

    def log_prior(self, params: Params) -> jax.Array: ...

    def degenerate(self, stats: Stats) -> jax.Array: ...

    def sample(self, key: jax.Array, params: Params, labels: jax.Array) -> Data: ...

    def num_parameters(self, params: Params) -> int: ...

    def floats_per_row(self, params: Params) -> int: ...

    def unconstrain(self, params: Params) -> Any: ...

    def constrain(self, theta: Any) -> Params: ...

    def check(self, x: Data, name: str = ...) -> None: ...


class Expect(Protocol):
    """How the posterior of the latents is come by."""

    def posterior(self, model: Any, params: Params, x: Data) -> Any:
        """A posterior that the model's `statistics` take."""
        ...


class Gather(Protocol):
    """How statistics are summed over the data; `state` is what the slot remembers between steps.

    A gather may also have (each is used where present): `parts(x) -> int`, how many M-steps and `step`s
    make one turn (1), `part` counts them; `passes(x) -> float`, passes over the data in a turn (1);
    `complete = False` where statistics are not those of all rows at the parameters; `stateless = True` where
    `init` does no more than `step`, and nothing is remembered;
    `stochastic = True` where they stay random; `monotone = False` where the objective may fall.
    """

    def init(
        self, model: Any, params: Params, x: Data, weights: jax.Array | None, expect: Any, key: jax.Array | None
    ) -> tuple[Stats, Any]: ...

    def step(
        self,
        model: Any,
        params: Params,
        stats: Stats,
        state: Any,
        x: Data,
        weights: jax.Array | None,
        expect: Any,
        part: jax.Array | int,
    ) -> tuple[Stats, Any]:
        """Statistics at `params`, given those of the step before."""
        ...


class Maximize(Protocol):
    """How parameters are made from statistics; `state` is what the slot remembers between steps.

    It may also have `parts(model, params) -> int`: how many E-steps and `step`s make one turn (1).
    """

    def init(self, model: Any, params: Params, total: jax.Array) -> Any:
        """total: the weight of all rows."""
        ...

    def step(
        self, model: Any, params: Params, stats: Stats, state: Any, part: jax.Array | int
    ) -> tuple[Params, Any]: ...


class State(Protocol):
    """What every algorithm's state shows: parameters, and the log-likelihood at exactly these.

    It may also have `left`, its own estimate of what is still to be gained, in place of the loop's; `missed`, what its
    M-steps are known to have left of Q; and `settled`, False while the objective itself is still being changed.
    """

    @property
    def params(self) -> Params: ...

    @property
    def stats(self) -> Stats: ...

    @property
    def loglik(self) -> jax.Array | None: ...

    @property
    def num_passes(self) -> jax.Array: ...


class Algorithm(Protocol):
    """An EM step, and whether exact arithmetic would let it lower the objective.

    It may also have `stochastic = True`, where a fit never settles by itself; `inexact(model)`, True where gains
    are irregular; `evaluated(model, state, x, weights) -> state`: the state with the log-likelihood of
    all rows at its parameters; and `waits = True` with `waiting(model, params, x, weights, key) -> state`, a state
    before the E-step at its start (num_steps -1), and `go_on(model, state, x, weights)`, that E-step or a `step`:
    a compiled fit then holds one E-step, not two.
    """

    @property
    def monotone(self) -> bool: ...

    def init(
        self, model: Any, params: Params, x: Data, weights: jax.Array | None = None, key: jax.Array | None = None
    ) -> Any: ...

    def step(self, model: Any, state: Any, x: Data, weights: jax.Array | None = None) -> Any: ...
