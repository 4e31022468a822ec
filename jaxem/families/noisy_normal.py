"""Normal components seen through noise whose covariance is known row by row: extreme deconvolution."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import capabilities, checks, parameters
from ..protocols import Data
from ..record import record, static
from . import conditional, normal_moments
from . import covariance as shapes
from .normal import Normal, NormalParams, NormalStats
from .normal_prior import NormalInverseWishart


@capabilities.completed("part")
@record(kw_only=False)
class NoisyNormal:
    """Normal components behind known noise: x = v + e, v ~ N(m_k, C_k), e ~ N(0, S_n); x|k is N(m_k, C_k + S_n).

    covariance: the shape of C, by any name that `Normal` has for it; prior: a NormalInverseWishart on m and C.

    Data are pairs (x, noise): x (N, D), or (N,) for one column, and noise (N, D), the variances of each row's noise, or
    (N, D, D), their covariances. Where x is NaN an entry is missing, whatever its noise. Parameters are a
    `NormalParams`, the mean and covariance of the values behind the noise. Samples are such values, with noise 0.
    In chains, noise (T, D, D) of one sequence needs an axis of sequences.
    Bovy, Hogg & Roweis (2011), Extreme deconvolution, Annals of Applied Statistics 5.
    """

    covariance: str = static(default="full")
    prior: NormalInverseWishart | None = dataclasses.field(default=None, kw_only=True)

    separable = ("covariance",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "covariance", shapes.canonical(self.covariance))

    @property
    def _values(self) -> Normal:
        """The family of the values behind the noise."""
        return Normal(self.covariance, prior=self.prior)

    @property
    def supports(self) -> parameters.Supports:
        return self._values.supports

    def pooled(self, x: Data, weights: jax.Array | None, num_components: int) -> NormalParams:
        """The data's mean and covariance, that of the noise included, in every component."""
        return self._values.pooled(_pair(x)[0], weights, num_components)

    def features(self, x: Data) -> jax.Array:
        return self._values.features(_pair(x)[0])

    def log_prob(self, params: NormalParams, x: Data) -> jax.Array:
        """Log-density of every row under every component: (K, N)."""
        return conditional.log_prob(params.mean, self._matrices(params), _measured(params, x))

    def stats(self, params: NormalParams, x: Data, responsibilities: jax.Array) -> NormalStats:
        """Expected statistics of the values behind the noise: responsibilities (K, N)."""
        rows = _measured(params, x)
        found = conditional.moments(params.mean, self._matrices(params), rows, responsibilities)
        parts = self._values.components(params)
        return self._values.stats_of(parts, normal_moments.expected(parts, found))

    def expected_values(self, params: NormalParams, x: Data) -> jax.Array:
        """Conditional means of the values behind the noise, under every component: (N, K, D)."""
        return conditional.means(params.mean, self._matrices(params), _measured(params, x))

    def drawn_values(self, key: jax.Array, params: NormalParams, x: Data, labels: jax.Array) -> jax.Array:
        """Joint draws of the values behind the noise, from the components of labels (N, M): (N, M, D)."""
        return conditional.draws(key, params.mean, self._matrices(params), _measured(params, x), labels)

    def completed(self, x: Data, values: jax.Array) -> jax.Array:
        """`values` (N, D) in the shape of the rows: with noise, no value is observed exactly."""
        return values.reshape(jnp.shape(_pair(x)[0]))

    def m_step(self, stats: NormalStats) -> NormalParams:
        return self._values.m_step(stats)

    def m_step_given(self, stats: NormalStats, *, mean: jax.Array) -> NormalParams:
        return self._values.m_step_given(stats, mean=mean)

    def degenerate(self, stats: NormalStats, held: tuple[str, ...] = ()) -> jax.Array:
        return self._values.degenerate(stats, held)

    def q_function(self, params: NormalParams, stats: NormalStats) -> jax.Array:
        """Expected log-density of the values + base, a lower bound of log p(x), tight where stats were made."""
        return self._values.q_function(params, stats)

    def log_prior(self, params: NormalParams) -> jax.Array:
        return self._values.log_prior(params)

    def rebase(self, stats: NormalStats, params: NormalParams) -> NormalStats:
        return self._values.rebase(stats, params)

    def sample(self, key: jax.Array, params: NormalParams, labels: jax.Array) -> Data:
        """One row (N, D) without noise from the component that each label (N,) names, and its noise, 0."""
        values = self._values.sample(key, params, labels)
        return values, jnp.zeros_like(values)

    def num_parameters(self, params: NormalParams) -> int:
        return self._values.num_parameters(params)

    def floats_per_row(self, params: NormalParams) -> int:
        count, columns = params.mean.shape
        return 4 * count + columns * (columns + 2)

    def unconstrain(self, params: NormalParams) -> NormalParams:
        return self._values.unconstrain(params)

    def constrain(self, theta: NormalParams) -> NormalParams:
        return self._values.constrain(theta)

    def check(self, x: Data, name: str = "x") -> None:
        """Raise for data that are no pair, or noise that cannot be."""
        values, noise = _pair(x, name)
        checks.finite_matrix(f"{name}[0]", values, missing=True)
        shape, place = checks.row_shape(f"{name}[0]", values), f"{name}[1]"
        _noise(place, noise, shape)
        if not checks.is_concrete(values, noise):
            return
        given = np.asarray(noise, float).reshape(shape + np.shape(noise)[2:])
        seen = ~np.isnan(np.asarray(values, float).reshape(shape))
        if given.ndim == 3:
            both = seen[:, :, None] & seen[:, None]
            given = np.where(both, given, np.eye(shape[1]))
        else:
            given = np.where(seen, given, 0)
        if not np.all(np.isfinite(given)):
            place_of = tuple(np.argwhere(~np.isfinite(given))[0].tolist())
            raise ValueError(
                f"{place} must be finite where x is observed; got {given[place_of]} at index {place_of}. An entry "
                "that was not measured is NaN in x"
            )
        (parameters.covariances if given.ndim == 3 else parameters.at_least_zero)(place, given)

    def _matrices(self, params: NormalParams) -> jax.Array:
        """The components' covariances (K, D, D), or (1, D, D) where they are tied."""
        values = self._values
        each = params.covariance[None] if values.tied else params.covariance
        return values.shape.matrix(each, params.mean.shape[-1])


def _pair(x: Data, name: str = "x") -> tuple[Any, Any]:
    """The rows and their noise; ValueError for what is no pair."""
    if not isinstance(x, (tuple, list)) or len(x) != 2:
        raise ValueError(
            f"{name} must be a pair (x, noise): rows (N, D), and variances (N, D) or covariances (N, D, D) of noise"
        )
    return x[0], x[1]


def _noise(name: str, noise: Any, shape: tuple[int, int]) -> jax.Array:
    """Variances (N, D) or covariances (N, D, D) of the noise of rows of this shape; ValueError for other shapes."""
    given, (rows, columns) = checks.array(name, noise), shape
    if given.ndim == 1:
        given = given[:, None]
    if given.shape not in ((rows, columns), (rows, columns, columns)):
        raise ValueError(
            f"{name} must have shape {(rows, columns)}, variances, or {(rows, columns, columns)}, covariances, as the "
            f"rows have shape {(rows, columns)}; got {jnp.shape(noise)}"
        )
    return given


def _measured(params: NormalParams, x: Data) -> conditional.Measured:
    """Rows and their noise, something finite in place of what is missing."""
    values, noise = _pair(x)
    rows, columns = checks.matrix("x[0]", values), params.mean.shape[-1]
    if rows.shape[1] != columns:
        raise ValueError(f"x[0] must have {columns} columns, as the parameters have; got shape {jnp.shape(values)}")
    observed = ~jnp.isnan(rows)
    noise = _noise("x[1]", noise, (rows.shape[0], columns)).astype(rows.dtype)
    known = observed if noise.ndim == 2 else observed[:, :, None] & observed[:, None]
    return conditional.Measured(
        values=jnp.where(observed, rows, 0), observed=observed, noise=jnp.where(known, noise, 0)
    )
