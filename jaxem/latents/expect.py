"""How the posterior of the latents enters the statistics: what fills the slot `expect`.

An `expect` is anything whose `posterior(model, params, x)` gives a posterior that the model's `statistics` take. Those
of this file call the model's own `infer`; each latent structure documents what they mean for it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from .. import checks
from ..capabilities import complete
from ..protocols import Data, Model, Nature, Params, Stats
from ..record import record, static
from ..slots import Expect


@record(kw_only=False)
class Exact:
    """Take the exact posterior of the latents (the E-step of Dempster, Laird & Rubin 1977), or a tempered one.

    temperature: T, where the posterior is p(z | x)^(1/T), normalised; None for 1.

    The objective is then sum_n T log sum_z p(x_n, z)^(1/T): the log-likelihood at T = 1, the classification likelihood
    of `Hard()` as T goes to 0. A temperature above 1 blurs the posterior (Ueda & Nakano 1998).
    Raises ValueError for a temperature that is not above 0.
    """

    temperature: jax.Array | float | None = None

    nature: ClassVar = Nature()

    def __post_init__(self) -> None:
        temperature = np.asarray(self.temperature) if checks.is_known(self.temperature) else None
        if temperature is not None and not np.all((temperature > 0) & np.isfinite(temperature)):
            raise ValueError(f"temperature must be a finite number above 0, or None for 1; got {temperature}")

    def posterior(self, model: Model, params: Params, x: Data) -> Any:
        """The posterior of the model's latents, as the model infers it."""
        return model.infer(params, x, self)

    def at(self, step: jax.Array, key: jax.Array | None) -> "Exact":
        """The same in every step."""
        return self

    def fold(self, number: jax.Array | int) -> "Exact":
        """The same for every part of the rows."""
        return self


@record
class Hard:
    """Assign every row wholly to its likeliest latents: classification EM (Celeux & Govaert 1992).

    The objective is then the classification likelihood, sum_n max_z log p(x_n, z). Of equally
    likely components the first is taken.
    """

    nature: ClassVar = Nature()

    def posterior(self, model: Model, params: Params, x: Data) -> Any:
        """The posterior of the model's latents, as the model infers it."""
        return model.infer(params, x, self)

    def at(self, step: jax.Array, key: jax.Array | None) -> "Hard":
        """The same in every step."""
        return self

    def fold(self, number: jax.Array | int) -> "Hard":
        """The same for every part of the rows."""
        return self


@record(kw_only=False)
class Sample:
    """Draw the latents from their posterior, `num_samples` times, and average their statistics.

    num_samples: how many draws, at the most where there is a schedule.
    schedule: a function from the number of steps taken so far to the number of draws of the next, 1 to num_samples;
        build it once.
    key: what draws are made from; an algorithm gives a new one to every step (`at`).
    used: how many draws this step makes, where a schedule has set it.

    One draw is stochastic EM (Celeux & Diebolt 1985), more are Monte Carlo EM (Wei & Tanner 1990). The log-likelihood
    stays exact wherever the model can compute it.
    Raises TypeError or ValueError for a num_samples that is not a whole number of at least 1.
    """

    num_samples: int = static(default=1)
    schedule: Callable | None = static(default=None)
    key: jax.Array | None = dataclasses.field(default=None, kw_only=True)
    used: jax.Array | None = dataclasses.field(default=None, kw_only=True)

    nature: ClassVar = Nature(stochastic=True)

    def __post_init__(self) -> None:
        if isinstance(self.num_samples, (int, np.integer)) and self.num_samples == 0:
            raise ValueError(
                "num_samples must be at least 1; got 0: without draws there is no E-step. Exact() takes the posterior"
            )
        checks.positive_integer("num_samples", self.num_samples)
        if self.schedule is not None and not callable(self.schedule):
            raise TypeError(f"schedule must be a function step -> number of draws; got {self.schedule!r}")

    def posterior(self, model: Model, params: Params, x: Data) -> Any:
        """The posterior of the model's latents, as the model infers it."""
        return model.infer(params, x, self)

    def at(self, step: jax.Array, key: jax.Array | None) -> "Sample":
        """These draws for one step of an algorithm: with its key, and as many as the schedule says."""
        used = None
        if self.schedule is not None:
            used = jnp.clip(jnp.asarray(self.schedule(step)), 1, self.num_samples).astype(jnp.int32)
        return dataclasses.replace(self, key=key, used=used)

    def fold(self, number: jax.Array | int) -> "Sample":
        """The same with other draws, for another part of the rows."""
        return dataclasses.replace(self, key=jax.random.fold_in(self.random_key(), number))

    def random_key(self) -> jax.Array:
        """The key; TypeError where there is none."""
        if self.key is None:
            raise TypeError(
                "Sample() draws at random and has no key: pass key=... to em_fit, or use Sample(n, key=key)"
            )
        return checks.random_key(self.key)


def temperature(expect: Expect) -> jax.Array | float:
    """The temperature of the posterior that an `expect` takes, 0 for `Hard()`; TypeError where it has none."""
    if isinstance(expect, Hard):
        return 0.0
    if not isinstance(expect, Exact):
        raise TypeError(
            "M-steps of this model go back to the rows, and make the posterior there again: expect must be Exact(), "
            f"tempered or not, or Hard(); got {expect!r}"
        )
    return 1.0 if expect.temperature is None else expect.temperature


def e_step(model: Any, params: Params, x: Data, weights: jax.Array | None = None, expect: Expect = Exact()) -> Stats:
    """Statistics expected under the posterior that `expect` gives, and the sum of its evidence: a model's E-step."""
    x = checks.present(model.units(x), weights)
    return model.statistics(params, x, complete("expect", expect).posterior(model, params, x), weights)
