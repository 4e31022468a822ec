"""Fitting every number of components with every covariance, one configuration at a time."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np

from .. import Mixture, MixtureParams, Normal, Result, Status, aic, bic, certified, em_fit, fit_restarts, icl

# Nats a row by which fits may differ and be the same one, as in `Restarts.hits`.
_SAME = 1e-4


@dataclasses.dataclass(frozen=True)
class Entry:
    """One configuration: its best fit, its criteria, and how its restarts ended.

    components: K.
    covariance: the name of its shape.
    covariances: (K, D, D), for any shape.
    status, objective, loglik, steps: of the best fit.
    hits: restarts that reached the best objective (`Restarts.hits`); 1 where certification has raised it.
    endings: number of restarts by status.
    seconds: wall time, with compilation.
    """

    components: int
    covariance: str
    params: MixtureParams
    covariances: np.ndarray
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
        """Whether the fit is a candidate for the best: not ended as DEGENERATE, NONFINITE or DECREASED."""
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

    Each is `fit_restarts(Mixture(Normal(covariance), K), jax.random.key(seed), x, num_restarts=restarts)` without a
    certificate. Only the entry of lowest BIC is certified, as that compiles one more program as long as the fit's.
    """
    entries = []
    # One program at a time: two could wait for each other in XLA's thread pool, and share the cores in any case.
    for covariance, num_components in itertools.product(covariances, components):
        entries.append(_fit(x, num_components, covariance, restarts, seed))
        finished()
    best = best_entry(entries)
    return [_certified(entry, x) if entry is best else entry for entry in entries]


def _model(x: np.ndarray, num_components: int, covariance: str) -> Mixture:
    # Rows are concrete: where none has a missing entry, nothing is compiled for missing ones.
    return Mixture(Normal(covariance, missing=bool(np.isnan(x).any())), num_components)


def _fit(x: np.ndarray, num_components: int, covariance: str, restarts: int, seed: int) -> Entry:
    start = time.perf_counter()
    model = _model(x, num_components, covariance)
    with _precision(x):
        runs = fit_restarts(model, jax.random.key(seed), x, num_restarts=restarts, certify=False)
        return Entry(
            components=num_components,
            covariance=covariance,
            **_told(model, runs.best, x),
            steps=int(runs.best.num_steps),
            num_parameters=model.num_parameters(runs.best.params),
            hits=int(runs.hits()),
            endings={status: int(runs.count(status)) for status in Status if status >= 0},
            seconds=time.perf_counter() - start,
        )


def _certified(entry: Entry, x: np.ndarray) -> Entry:
    """The entry with its fit continued, where certification found a direction of higher objective; else as it was."""
    start = time.perf_counter()
    model = _model(x, entry.components, entry.covariance)
    told: dict[str, Any] = {}
    with _precision(x):
        fit = em_fit(model, entry.params, x, algorithm=certified())
        if float(fit.objective) > entry.objective + _SAME * len(x):
            told = {**_told(model, fit, x), "steps": entry.steps + int(fit.num_steps), "hits": 1}
    return dataclasses.replace(entry, **told, seconds=entry.seconds + time.perf_counter() - start)


def _told(model: Mixture, fit: Result, x: np.ndarray) -> dict[str, Any]:
    """The fields of an entry that follow from its fit."""
    family: Any = model.family
    return {
        "params": fit.params,
        "covariances": np.asarray(family.covariance_matrix(fit.params.components)),
        "status": Status(int(fit.status)),
        "objective": float(fit.objective),
        "loglik": float(fit.loglik),
        **{name: float(value) for name, value in _criteria(model, fit.params, x).items()},
    }


@jax.jit
def _criteria(model: Mixture, params: MixtureParams, x: np.ndarray) -> dict[str, jax.Array]:
    """AIC, BIC and ICL in one compiled program."""
    return {criterion.__name__: criterion(model, params, x) for criterion in (aic, bic, icl)}


def responsibilities(entry: Entry, x: np.ndarray) -> np.ndarray:
    """Posterior of the components for each row under a configuration's best fit: (N, K)."""
    with _precision(x):
        return np.asarray(Mixture(Normal(entry.covariance), entry.components).posterior(entry.params, x))


def best_entry(entries: Sequence[Entry]) -> Entry | None:
    """The entry of lowest BIC among the sound ones; None where none is sound."""
    return min((entry for entry in entries if entry.sound), key=lambda entry: entry.bic, default=None)


def _precision(x: np.ndarray) -> AbstractContextManager[Any]:
    """The context in which JAX keeps the dtype of x. It holds for one thread, so every thread enters it."""
    return jax.enable_x64(x.dtype == np.float64)
