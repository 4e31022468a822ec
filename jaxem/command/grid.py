"""Fitting every number of components with every covariance, one configuration at a time."""

import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from .. import Mixture, MixtureParams, Normal, Status, aic, bic, fit_restarts, icl


@dataclass(frozen=True)
class Entry:
    """One configuration: its best fit, its criteria, and how its restarts ended."""

    components: int
    covariance: str
    params: MixtureParams
    covariances: np.ndarray  # (K, D, D), whatever the shape
    status: Status
    objective: float
    loglik: float
    steps: int
    num_parameters: int
    aic: float
    bic: float
    icl: float
    hits: int
    endings: dict[Status, int]
    seconds: float

    @property
    def sound(self) -> bool:
        """Whether the best fit is an optimum, so that its criteria mean something."""
        return self.status in (Status.CONVERGED, Status.MAX_STEPS, Status.STALLED)


def fit_grid(
    x: np.ndarray,
    components: Sequence[int],
    covariances: Sequence[str],
    restarts: int,
    seed: int,
    finished: Callable[[], object],
) -> list[Entry]:
    """Fit all configurations in the dtype of x; `finished` is called after each. In order, covariances outermost.

    Each is `fit_restarts(Mixture(Normal(covariance), K), jax.random.key(seed), x, num_restarts=restarts)`.
    """
    entries = []
    # One program at a time: two could wait for each other in XLA's thread pool, and share the cores in any case.
    for covariance, num_components in itertools.product(covariances, components):
        entries.append(_fit(x, num_components, covariance, restarts, seed))
        finished()
    return entries


def _fit(x: np.ndarray, num_components: int, covariance: str, restarts: int, seed: int) -> Entry:
    start = time.perf_counter()
    # The file has been looked through: where nothing is missing there is one case less to compile.
    family = Normal(covariance, missing=bool(np.isnan(x).any()))
    model = Mixture(family, num_components)
    with _precision(x):
        runs = fit_restarts(model, jax.random.key(seed), x, num_restarts=restarts)
        params = runs.best.params
        return Entry(
            components=num_components,
            covariance=covariance,
            params=params,
            covariances=np.asarray(family.covariance_matrix(params.components)),
            status=Status(int(runs.best.status)),
            objective=float(runs.best.objective),
            loglik=float(runs.best.loglik),
            steps=int(runs.best.num_steps),
            num_parameters=model.num_parameters(params),
            **{name: float(value) for name, value in _criteria(model, params, x).items()},
            hits=int(runs.hits()),
            endings={status: int(runs.count(status)) for status in Status if status >= 0},
            seconds=time.perf_counter() - start,
        )


@jax.jit
def _criteria(model: Mixture, params: MixtureParams, x: np.ndarray) -> dict[str, jax.Array]:
    """All at once, for one compilation."""
    return {criterion.__name__: criterion(model, params, x) for criterion in (aic, bic, icl)}


def responsibilities(entry: Entry, x: np.ndarray) -> np.ndarray:
    """Posterior of the components for each row under a configuration's best fit: (N, K)."""
    with _precision(x):
        return np.asarray(Mixture(Normal(entry.covariance), entry.components).posterior(entry.params, x))


def best_entry(entries: Sequence[Entry]) -> Entry | None:
    """The lowest BIC among the fits that are optima; None if none is."""
    return min((entry for entry in entries if entry.sound), key=lambda entry: entry.bic, default=None)


def _precision(x: np.ndarray) -> AbstractContextManager[Any]:
    """The context in which JAX keeps the dtype of x. It holds for one thread, so every thread enters it."""
    return jax.enable_x64(x.dtype == np.float64)
