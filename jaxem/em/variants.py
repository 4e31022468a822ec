"""Named variants of EM: each fills a slot, or wraps a step."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from ..latents import Hard, Sample
from .annealing import Annealed, annealed
from .averaging import Averaged, averaged
from .maximize import Conditional, Draw, Gradient
from .minibatch import Incremental, PowerRate, Stepwise
from .step import EM


def hard_em() -> EM:
    """Classification EM: every row goes whole to its likeliest component (Celeux & Govaert 1992)."""
    return EM(expect=Hard())


def stochastic_em() -> EM:
    """Stochastic EM: one draw of the latents in place of their posterior (Celeux & Diebolt 1985)."""
    return EM(expect=Sample(1))


def monte_carlo_em(num_samples: int, schedule: Callable | None = None) -> EM:
    """Monte Carlo EM: `num_samples` draws of the latents (Wei & Tanner 1990), or as a schedule says."""
    return EM(expect=Sample(num_samples, schedule))


def gibbs() -> EM:
    """Gibbs sampling: latents drawn given the parameters, and parameters given the latents (Tanner & Wong 1987).

    `trajectory` gives the parameters of every step, which are what is of use; see `Draw`.
    """
    return EM(expect=Sample(1), maximize=Draw())


def generalized_em(optimizer: Any = None, num_steps: int = 5) -> EM:
    """Generalised EM: `num_steps` steps of an optax optimiser (default: L-BFGS) in each M-step; see `Gradient`."""
    return EM(maximize=Gradient(num_steps=num_steps) if optimizer is None else Gradient(optimizer, num_steps))


def ecm(*blocks: str | tuple[str, ...], multicycle: bool = False) -> EM:
    """ECM: one block of parameters after the other (Meng & Rubin 1993); see `Conditional`."""
    return EM(maximize=Conditional(blocks, multicycle))


def stepwise_em(
    batch_size: int | None = None, rate: Callable | float = PowerRate(), *, average: bool | int = False
) -> EM | Averaged:
    """Stepwise (online) EM: a batch of rows a step (Cappé & Moulines 2009); see `Stepwise`.

    average: True for the average of all steps, or the number of steps to leave out of it (see `averaged`); it
    allows a rate that does not fall, such as 0.1, which forgets the start sooner.
    """
    algorithm = EM(gather=Stepwise(batch_size, rate))
    return averaged(algorithm, start=int(average) if average is not True else 0) if average is not False else algorithm


def incremental_em(num_blocks: int) -> EM:
    """Incremental EM: an M-step after every piece of the data (Neal & Hinton 1998); see `Incremental`."""
    return EM(gather=Incremental(num_blocks))


def annealed_em(schedule: Sequence[float] | np.ndarray | jax.Array | Callable) -> Annealed:
    """EM with deterministic annealing (Ueda & Nakano 1998); see `Annealed`."""
    return annealed(EM(), schedule)
