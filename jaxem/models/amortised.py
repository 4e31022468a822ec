"""A generative model and a recognition network in one: what wake-sleep and amortised variational EM fit."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from .. import capabilities
from ..latents.expect import Exact
from ..latents.recognition import Recognition, recognised
from ..protocols import Data, Model, Params, Stats
from ..record import record, static
from ..slots import Expect


@record
class AmortisedParams:
    """Parameters of an `Amortised` model.

    generative: those of the generative model.
    recognition: those of the recognition network.
    """

    generative: Params
    recognition: Params


@capabilities.completed("model")
@record(kw_only=False)
class Amortised:
    """p(x, z) of a model, and q(z | x) of a network; `wake_sleep` and `amortised_em` learn both.

    model: any that samples its latents with its data, as mixtures and `from_log_joint(..., sample_with_labels=...)` do;
        or one with `sample_with_latents(key, params, n) -> (x, z)` and `complete_log_prob(params, x, z) -> (N,)`.
    network: (params, x) -> scores (N, K), logarithms of probabilities of a categorical latent up to a constant a row;
        for other latents an object with `sample(key) -> z` and `log_prob(z) -> (N,)`.
    start: (key, x) -> parameters of the network, for `init`.

    Likelihood, posterior and predictions are those of the generative model. `approximate(params, x)` is the network's
    posterior, as `free_energy` takes it.
    """

    model: Model
    network: Callable = static()
    start: Callable | None = static(default=None)

    @property
    def generative(self) -> Model:
        """The generative model, complete."""
        return capabilities.complete("model", self.model)

    def init(self, key: jax.Array, x: Data, weights: jax.Array | None = None) -> AmortisedParams:
        """A start of model and network; TypeError where the model has no init, or `start` is None."""
        if self.start is None or self.generative.init is None:
            raise TypeError("a start needs the init of the model and start=..., (key, x) -> parameters of the network")
        one, other = jax.random.split(key)
        return AmortisedParams(generative=self.generative.init(one, x, weights), recognition=self.start(other, x))

    def recognise(self, params: AmortisedParams, x: Data) -> Any:
        """q(z | x_n), a distribution with `sample(key)` and `log_prob(z)`."""
        return recognised(self.network, params.recognition, x)

    def approximate(self, params: AmortisedParams, x: Data) -> Any:
        """q(z | x_n) as a posterior of the model's kind."""
        return Recognition(self.network, params.recognition).posterior(self.generative, params.generative, x)

    def wake(self, params: AmortisedParams, x: Data, weights: jax.Array | None = None) -> AmortisedParams:
        """The model's M-step on statistics under the network's posterior; TypeError for a model without M-step."""
        model = self.generative
        if model.m_step is None:
            raise TypeError("m_step=True needs a model with an m_step of its own: leave it out, for gradient steps")
        stats = model.statistics(params.generative, x, self.approximate(params, x), weights)
        return dataclasses.replace(params, generative=model.m_step(stats))

    def infer(self, params: AmortisedParams, x: Data, expect: Expect = Exact()) -> Any:
        """The posterior of the generative model itself."""
        return self.generative.infer(params.generative, x, expect)

    def statistics(self, params: AmortisedParams, x: Data, posterior: Any, weights: jax.Array | None = None) -> Stats:
        """The generative model's statistics under any posterior."""
        return self.generative.statistics(params.generative, x, posterior, weights)

    def e_step(
        self, params: AmortisedParams, x: Data, weights: jax.Array | None = None, expect: Expect = Exact()
    ) -> Stats:
        """The generative model's E-step."""
        return self.generative.e_step(params.generative, x, weights, expect)

    def q_function(self, params: AmortisedParams, stats: Stats) -> jax.Array:
        """The generative model's."""
        return self.generative.q_function(params.generative, stats)

    @property
    def q_on_rows(self) -> Any:
        """The generative model's, where it has one."""
        inner = self.generative.q_on_rows
        if inner is None:
            return None

        def on_rows(params: AmortisedParams, stats: Stats, x: Data, weights: jax.Array | None) -> Callable:
            of = inner(params.generative, stats, x, weights)
            return lambda new: of(new.generative)

        return on_rows

    def complete_log_prob(self, params: AmortisedParams, x: Data, z: Any) -> jax.Array:
        """log p(x_n, z_n): (N,)."""
        return self.generative.complete_log_prob(params.generative, x, z)

    def sample_with_latents(self, key: jax.Array, params: AmortisedParams, n: int) -> tuple[Data, Any]:
        """n dreams: rows of the generative model, and their latents."""
        return self.generative.sample_with_latents(key, params.generative, n)

    def log_prior(self, params: AmortisedParams) -> jax.Array:
        """The generative model's."""
        return self.generative.log_prior(params.generative)

    def log_prob(self, params: AmortisedParams, x: Data) -> jax.Array:
        """log p(x_n): (N,)."""
        return self.generative.log_prob(params.generative, x)

    def posterior(self, params: AmortisedParams, x: Data) -> jax.Array:
        """The generative model's."""
        return self.generative.posterior(params.generative, x)

    def num_parameters(self, params: AmortisedParams) -> int:
        """Free parameters of the generative model, which alone has a likelihood."""
        return self.generative.num_parameters(params.generative)

    def unconstrain(self, params: AmortisedParams) -> AmortisedParams:
        """Coordinates of the model's parameters; the network's are free."""
        return dataclasses.replace(params, generative=self.generative.unconstrain(params.generative))

    def constrain(self, theta: AmortisedParams) -> AmortisedParams:
        """Inverse of `unconstrain`."""
        return dataclasses.replace(theta, generative=self.generative.constrain(theta.generative))

    def degenerate(self, stats: Stats) -> jax.Array:
        """The generative model's."""
        return self.generative.degenerate(stats)

    def check(self, x: Data, weights: jax.Array | None = None) -> None:
        """Raise ValueError or TypeError for data that the generative model does not take."""
        self.generative.check(x, weights)

    def units(self, x: Data) -> Data:
        """The data as the generative model's units."""
        return self.generative.units(x)
