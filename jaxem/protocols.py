"""The interfaces of models, posteriors and parts. Nothing here is inherited; any object with these members fits.

What an object may leave out, and what then stands in its place, is written down in `capabilities.py`.
"""

from typing import Any, Protocol

import jax

from . import tree
from .nature import Nature as Nature
from .record import record

Params = Any
Stats = Any
Data = Any


class Model(Protocol):
    """A latent-variable model, as the algorithms see it.

    `e_step` gives expected sufficient statistics that add over rows, with the log-likelihood at
    `params` as their leaf `loglik`; `m_step` maximises `q_function + log_prior` given them. A model states `e_step`,
    and `m_step` or `q_function` (which is then climbed by gradients), and may leave out the rest; `infer` and
    `statistics` are what its `e_step` is made of. For users it may also have `log_prob`, `posterior`, `predict`,
    `sample`, `num_parameters`, and by name `degrees`.
    """

    @property
    def m_step(self) -> Any:
        """(stats) -> params; None where there is none."""
        ...

    @property
    def q_function(self) -> Any:
        """(params, stats) -> scalar, linear in the statistics; None where there is none."""
        ...

    @property
    def q_on_rows(self) -> Any:
        """(params, stats, x, weights) -> Q as a function of parameters, where `q_function` is only its tangent at
        `params`, the parameters of the E-step; None where statistics determine Q at all parameters."""
        ...

    @property
    def recognise(self) -> Any:
        """(params, x) -> q(z | x_n), a distribution with `sample(key)` and `log_prob(z)`; None without a network."""
        ...

    @property
    def wake(self) -> Any:
        """(params, x, weights) -> params, the M-step under the q of `recognise`; None where there is none."""
        ...

    def complete_log_prob(self, params: Params, x: Data, z: Any) -> jax.Array:
        """log p(x_n, z_n): (N,)."""
        ...

    def sample_with_latents(self, key: jax.Array, params: Params, n: int) -> tuple[Data, Any]:
        """n rows, and the latents that they came from."""
        ...

    @property
    def init(self) -> Any:
        """(key, x, weights) -> params, a random start; None where there is none."""
        ...

    @property
    def blocks(self) -> Any:
        """(params) -> names of parameters with an M-step of their own; None where there are none."""
        ...

    @property
    def m_step_for(self) -> Any:
        """(params, stats, names) -> params, the M-step over some of the parameters; None where there is none."""
        ...

    @property
    def floats_per_row(self) -> Any:
        """(params, x) -> int, temporaries of an E-step, by which blocks are sized; None where it is not known."""
        ...

    @property
    def crawls(self) -> bool:
        """Whether plain EM takes thousands of steps: a fit is then accelerated where no algorithm is named."""
        ...

    @property
    def expands(self) -> bool:
        """Whether it is part of a larger model with the same likelihoods, as PX-EM needs it; see `expanded`."""
        ...

    def expanded(self, params: Params, stats: Stats, held: tuple[str, ...] = ()) -> Params:
        """The larger model's M-step, reduced to this one, from the own M-step's params; as they are where `held`."""
        ...

    @property
    def likelihood(self) -> bool:
        """Whether the objective is a log-likelihood (+ log-prior), in nats; else it has no unit of its own."""
        ...

    @property
    def supports(self) -> Any:
        """Where the values of parameters lie (see `parameters.py`): a start outside is refused."""
        ...

    def infer(self, params: Params, x: Data, expect: Any = ...) -> Any:
        """The posterior of the latents; its `evidence` has log p(x_n) of every unit (row, sequence)."""
        ...

    def statistics(self, params: Params, x: Data, posterior: Any, weights: jax.Array | None = None) -> Stats:
        """Additive statistics expected under any posterior of that kind."""
        ...

    def e_step(self, params: Params, x: Data, weights: jax.Array | None = None, expect: Any = ...) -> Stats: ...

    def log_prior(self, params: Params) -> jax.Array: ...

    def log_prob(self, params: Params, x: Data) -> jax.Array: ...

    def posterior(self, params: Params, x: Data) -> jax.Array: ...

    def num_parameters(self, params: Params) -> int: ...

    def rebase(self, stats: Stats, params: Params) -> Stats:
        """The same statistics about the reference of these parameters."""
        ...

    def unconstrain(self, params: Params) -> Any: ...

    def constrain(self, theta: Any) -> Params: ...

    def degenerate(self, stats: Stats) -> jax.Array:
        """Components (K,) that died or collapsed. A further argument `held=()` names parameters that are held, if any
        of these can collapse."""
        ...

    def check(self, x: Data, weights: jax.Array | None = None) -> None:
        """Refuse bad data by name, eagerly."""
        ...

    def params_like(self, x: Data) -> Params:
        """The shapes that parameters have for such data; None where nothing is known of them."""
        ...

    def units(self, x: Data) -> Data:
        """The data with a leading axis of independent units, where other forms are taken too."""
        ...

    def partial(self) -> "Model":
        """The model as it sees a part of the rows, where an E-step on all of them does more."""
        ...

    def reduced(self, x: Data, weights: jax.Array | None = None) -> tuple[Data, jax.Array | None]:
        """Units and weights of the same total with the same statistics, and fewer of them: what a fit whose every step
        is on all rows can go over in place of the rows."""
        ...

    def shared_floats_per_row(self, params: Params, x: Data) -> int:
        """The part of `floats_per_row` that restarts on the same rows share."""
        ...

    def coarse(self) -> "Model":
        """A cheaper model with the same parameters, for the bulk of many restarts; itself where there is none."""
        ...

    def sample_size(self, x: Data, weights: jax.Array | None = None) -> jax.Array:
        """The n of information criteria."""
        ...


class Posterior(Protocol):
    """A distribution of a model's latents: what its `infer` returns and its `statistics` take.

    Only `free_energy` and the law "lower bound" need more than the evidence; a posterior may leave it out. The gap
    between log-likelihood and bound is `kl(q, weights)`, KL(q ‖ this), where there is one, and else their difference.
    """

    @property
    def evidence(self) -> jax.Array:
        """log p(x) of every unit, at the parameters that it was inferred with."""
        ...

    def entropy(self, weights: jax.Array | None = None) -> jax.Array:
        """In nats, summed over units x weights; of all that `q_function` takes the expectation of."""
        ...

    def given(self, q: Any) -> "Posterior":
        """A user's distribution q of the same latents, in this form and with this evidence."""
        ...


# A model as it comes in: it may leave out what `capabilities` knows.
AnyModel = Model | Any


@record
class Problem:
    """What is to be fitted; see `pose`.

    model: complete.
    x: its data, with a leading axis of independent units.
    weights: (N,), or None.
    """

    model: Model
    x: Data
    weights: jax.Array | None

    @property
    def total(self) -> jax.Array:
        """The weight of all rows."""
        return tree.total_weight(self.x, self.weights)

    @property
    def rows(self) -> int:
        return tree.num_rows(self.x)


class Part(Protocol):
    """A named piece of the parameters, independent of the others given the statistics.

    Its optional members, and their defaults, stand in `capabilities`: `rebase`, where statistics have a reference;
    `supports`, where values lie (name -> a check of `parameters`, or the check itself for an array); and others.
    """

    def m_step(self, stats: Stats) -> Params:
        """argmax of q_function + log_prior."""
        ...

    def q_function(self, params: Params, stats: Stats) -> jax.Array:
        """Expected complete-data log-likelihood, linear in the statistics."""
        ...

    def log_prior(self, params: Params) -> jax.Array: ...

    def degenerate(self, stats: Stats) -> jax.Array:
        """Components (K,) that died or collapsed, (0,) where there are none that could; `held` as in `Model`."""
        ...

    def num_parameters(self, params: Params) -> int: ...

    def unconstrain(self, params: Params) -> Any: ...

    def constrain(self, theta: Any) -> Params: ...


class Conjugate(Part, Protocol):
    """A part with a conjugate prior: distributions q of its parameters are of the prior's kind.

    q is a record of `priors`, component axis first, or a dict of such: what `Variational` has for parameters. Its
    records have `expected()`, `sample(key)`, `kl(other)`, `unconstrain()` and `constrain()`, and name in `positive` the
    fields that are not below 0, and in `spreads` those that are matrices without negative eigenvalues (or variances).
    """

    def conjugate_of(self) -> Any:
        """The prior, as q; TypeError or ValueError where the part has none."""
        ...

    def posterior(self, stats: Stats) -> Any:
        """q given the statistics."""
        ...

    def pooled_posterior(self, x: Data, weights: jax.Array | None, num_components: int) -> Any:
        """q given all rows, in every component."""
        ...

    def draw(self, key: jax.Array, stats: Stats) -> Params:
        """Parameters drawn from their posterior given the statistics."""
        ...

    def given(self, values: Any) -> Params:
        """Parameters from what q's `expected` and `sample` give."""
        ...

    def plugged(self, q: Any) -> Params:
        """The parameters that statistics are taken at."""
        ...

    def expected_log_prob(self, q: Any, x: Data) -> jax.Array:
        """E_q of `log_prob`: (K, N)."""
        ...

    def log_expected_prob(self, q: Any, x: Data) -> jax.Array:
        """The logarithm of the density's mean over q: (K, N)."""
        ...

    def expected_q(self, q: Any, stats: Stats) -> jax.Array:
        """E_q of `q_function`; linear in the statistics."""
        ...


class Gate(Part, Protocol):
    """p(component | row): a part that weighs the components of a mixture, as `Probabilities` or a softmax does."""

    def pooled(self, x: Data, weights: jax.Array | None, num_components: int) -> Params:
        """All components alike: where a start begins."""
        ...

    def log_prob(self, params: Params, x: Data) -> jax.Array:
        """log p(component k | row n): (K, N), or (K, 1) where it does not depend on the row."""
        ...

    def stats(self, params: Params, x: Data, responsibilities: jax.Array) -> Stats:
        """Additive statistics from responsibilities (K, N)."""
        ...


class Family(Part, Protocol):
    """p(observation | component), a part: K components at once, component axis first.

    Of its optional members, which stand in `capabilities`, some are about statements: `separable` names parameters
    whose being held or shared leaves the M-step of the others as it is, `m_step_given(stats, **held)` holds others,
    `shareable` names what components can share, and `share(stats, name, params)` is the common value given the M-step
    of all others (see `Fixed` and `Tied`). `expands` and `expanded(params, stats)` are as in `Model`.
    """

    def pooled(self, x: Data, weights: jax.Array | None, num_components: int) -> Params:
        """The whole data as one component, K times over: where statistics are first centred."""
        ...

    def features(self, x: Data) -> jax.Array:
        """Rows as points (N, F), for seeding."""
        ...

    def log_prob(self, params: Params, x: Data) -> jax.Array:
        """Log-density of every row under every component: (K, N)."""
        ...

    def stats(self, params: Params, x: Data, responsibilities: jax.Array) -> Stats:
        """Additive statistics; their `count` (K,) is the sum of the responsibilities."""
        ...

    def sample(self, key: jax.Array, params: Params, labels: jax.Array) -> Data:
        """One row from the component that each label (N,) names."""
        ...

    def floats_per_row(self, params: Params) -> int:
        """Temporaries of `log_prob` and `stats`, in numbers a row."""
        ...

    def check(self, x: Data, name: str = ...) -> None:
        """Raise ValueError or TypeError, by name, for data that no component can have produced."""
        ...
