"""One multivariate normal distribution, from rows with missing values."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from .. import checks, numerics, parameters, tree
from ..capabilities import complete
from ..data import Moments, check_moments
from ..families import Normal, NormalParams, NormalStats, columns, conditional
from ..families.normal_prior import NormalInverseWishart
from ..latents import Exact
from ..latents.linear_gaussian import StateMoments, normals
from ..parts import assembly
from ..protocols import Data
from ..record import record, static
from ..slots import Expect
from . import factor_data as data
from .imputation import filled_in


@record
class MultivariateNormalParams:
    """mean (D,); covariance (D, D)."""

    mean: jax.Array
    covariance: jax.Array


@record
class MultivariateNormalStats:
    """Expected statistics.

    moments: those of a normal family, of one component.
    loglik: (), at the parameters of the E-step.
    """

    moments: NormalStats
    loglik: jax.Array


@record
class ValuesPosterior:
    """The posterior of rows given their observed entries; of `Moments`, G groups of rows in place of N rows.

    means: (N, D).
    covariances: (D, D, N), 0 for observed entries; None where all are observed. Of groups, those of their rows.
    counts: (N,), 1 for a row, 0 where nothing is observed; of groups the count of their moments.
    evidence: (N,), log p of the observed entries.
    observed: (D, N), which entries are observed, and so not latent; None where all are.
    """

    means: jax.Array
    covariances: jax.Array | None
    counts: jax.Array
    evidence: jax.Array
    observed: jax.Array | None = None

    def entropy(self, weights: jax.Array | None = None) -> jax.Array:
        """Entropy in nats of the missing values of rows of which something is observed, summed over rows x weights."""
        if self.observed is None or self.covariances is None:
            return jnp.zeros((), self.means.dtype)
        size = jnp.sum(self.observed, axis=0) * 0.5 * (1 + math.log(2 * math.pi))
        return numerics.weighted_sum(self.counts * (normals.entropy(self._whole(self.covariances)) - size), weights)

    def kl(self, q: "ValuesPosterior", weights: jax.Array | None = None) -> jax.Array:
        """KL(q ‖ this) in nats, summed over the same rows x weights."""
        if self.observed is None or self.covariances is None or q.covariances is None:
            return jnp.zeros((), self.means.dtype)
        away, mine, other = (q.means - self.means).T, self._whole(self.covariances), self._whole(q.covariances)
        return numerics.weighted_sum(self.counts * normals.kl(away, other, mine), weights)

    def given(self, q: Any) -> "ValuesPosterior":
        """A distribution of the same values that a user gave: what the model's infer returned at any parameters.

        Raises TypeError or ValueError for what is none.
        """
        if not isinstance(q, ValuesPosterior):
            raise TypeError(f"q must be what the model's infer(params, x) returned; got {checks.told(q)}")
        if q.means.shape != self.means.shape:
            raise ValueError(f"q must be of {len(self.means)} rows, as x is; got one of {len(q.means)}")
        return dataclasses.replace(q, evidence=self.evidence)

    def _whole(self, covariances: jax.Array) -> jax.Array:
        """Covariances (D, D, N) with 1 on the diagonal of observed entries: the determinant is that of missing ones."""
        assert self.observed is not None
        eye = jnp.eye(len(covariances), dtype=covariances.dtype)[..., None]
        return covariances + eye * self.observed[None]


@record(kw_only=False)
class MultivariateNormal:
    """x ~ N(mean, covariance), where any entry of a row may be missing.

    prior: a NormalInverseWishart.
    missing: False promises that no entry is NaN, and saves compiling for it.

    Data: rows (N, D), or (N,) for one column, in which NaN is a missing entry, or `Moments`. Of complete rows one step
    is the maximum. Else EM takes the moments of every row given its observed entries, which is right where entries are
    missing at random; its rate of convergence is the largest fraction of missing information (these fractions are the
    eigenvalues of the Jacobian of the EM map). A row without any observed entry adds nothing.
    Source: Little & Rubin (2002), Statistical Analysis with Missing Data, section 11.2.
    """

    prior: NormalInverseWishart | None = dataclasses.field(default=None, kw_only=True)
    missing: bool = static(default=True, kw_only=True)

    separable = ("covariance",)

    @property
    def family(self) -> Normal:
        """The distribution as a family, of one component."""
        return Normal(prior=self.prior, form="whitened", missing=self.missing)

    @property
    def supports(self) -> parameters.Supports:
        return self.family.supports

    @property
    def parts(self) -> dict[str, Any]:
        """The family alone, with one component."""
        return {"values": self.family}

    def part_params(self, params: MultivariateNormalParams) -> dict[str, NormalParams]:
        return {"values": _family_params(params)}

    def params_of(self, values: dict[str, NormalParams]) -> MultivariateNormalParams:
        return _alone(values["values"])

    def part_statistics(self, stats: MultivariateNormalStats) -> dict[str, NormalStats]:
        return {"values": stats.moments}

    def with_part_statistics(
        self, stats: MultivariateNormalStats, of: dict[str, NormalStats]
    ) -> MultivariateNormalStats:
        return dataclasses.replace(stats, moments=of["values"])

    m_step, q_function, log_prior, rebase = assembly.surrogate

    def init(self, key: jax.Array, x: Data, weights: jax.Array | None = None) -> MultivariateNormalParams:
        """Means and covariances, missing entries taken as uncorrelated; nothing is drawn."""
        x, weights = checks.native((x, weights))
        self.check(x, weights)
        return self._init(*self.reduced(x, weights))

    @jax.jit
    def _init(self, x: Data, weights: jax.Array | None) -> MultivariateNormalParams:
        x, weights = tree.present(x, weights)
        x = data.read(x)
        if not isinstance(x, data.Roots):
            return _alone(self.family.pooled(x, weights, 1))
        mean, _ = data.column_moments(x, weights)
        start = MultivariateNormalParams(mean=mean, covariance=jnp.eye(len(mean), dtype=mean.dtype))
        free = dataclasses.replace(self, prior=None)
        return free.m_step(free.e_step(start, x, weights))

    def infer(self, params: MultivariateNormalParams, x: Data, expect: Expect = Exact()) -> ValuesPosterior:
        """The posterior of all entries; its `evidence` is log p(x_n), (N,), of groups the sum over their rows, (G,)."""
        if not isinstance(expect, Exact) or expect.temperature is not None:
            raise TypeError(f"expect must be Exact() for a MultivariateNormal; got {expect!r}")
        parameters.shapes("params", self, params, x)
        x = data.read(x)
        if isinstance(x, data.Roots):
            return self._of_groups(params, x)
        if not self.missing:
            evidence = self.family.log_prob(_family_params(params), x)[0]
            return ValuesPosterior(means=x, covariances=None, counts=jnp.ones_like(evidence), evidence=evidence)
        observed = ~jnp.isnan(x)
        rows = conditional.Measured(values=jnp.where(observed, x, 0), observed=observed)
        found = conditional.conditional(params.mean, params.covariance, rows)
        return ValuesPosterior(
            means=params.mean[None] + found.shift.T,
            covariances=found.covariance,
            counts=jnp.any(observed, axis=1).astype(x.dtype),
            evidence=found.log_density,
            observed=observed.T,
        )

    def _of_groups(self, params: MultivariateNormalParams, x: data.Roots) -> ValuesPosterior:
        parts = self.family.components(_family_params(params))
        away = jnp.concatenate([(x.mean - params.mean[None])[:, None], jnp.swapaxes(x.root, 1, 2)], axis=1)
        square = jnp.sum(jnp.square(numerics.product(parts.whitener[0], away, "ij,gkj->gki")), axis=(1, 2))
        return ValuesPosterior(
            means=x.mean,
            covariances=numerics.product(x.root, x.root, "gik,gjk->ijg"),
            counts=x.count,
            evidence=x.count * (parts.constant - 0.5 * square),
        )

    def statistics(
        self,
        params: MultivariateNormalParams,
        x: Data,
        posterior: ValuesPosterior,
        weights: jax.Array | None = None,
    ) -> MultivariateNormalStats:
        """Moments about the current mean under any posterior of the values; loglik is the sum of its evidence.

        A pseudo-row of vanishing weight has the current mean and covariance.
        """
        r = posterior.counts if weights is None else posterior.counts * weights.astype(posterior.counts.dtype)
        shift = posterior.means - params.mean[None]
        second = numerics.product(r[:, None] * shift, shift, "ni,nj->ij")
        if posterior.covariances is not None:
            second = second + numerics.product(posterior.covariances, r, "ijn,n->ij")
        count = jnp.sum(r, keepdims=True) + columns.PSEUDO_COUNT
        moments = NormalStats(
            count=count,
            reference=count[:, None] * params.mean[None],
            first=numerics.product(r, shift, "n,nd->d")[None],
            second=(second + columns.PSEUDO_COUNT * params.covariance)[None],
        )
        return MultivariateNormalStats(moments=moments, loglik=numerics.weighted_sum(posterior.evidence, weights))

    def e_step(
        self, params: MultivariateNormalParams, x: Data, weights: jax.Array | None = None, expect: Expect = Exact()
    ) -> MultivariateNormalStats:
        """Expected moments, and sum_n w_n log p(x_n); see `infer` and `statistics`."""
        x = data.read(checks.present(data.units(x), weights))

        def given(model: MultivariateNormal) -> MultivariateNormalStats:
            return model.statistics(params, x, complete("expect", expect).posterior(model, params, x), weights)

        if not self.missing or isinstance(x, data.Roots):
            return given(self)
        some = numerics.in_any_lane(jnp.any(jnp.isnan(x)))
        return jax.lax.cond(some, lambda: given(self), lambda: given(self.without_missing()))

    def m_step_given(self, stats: MultivariateNormalStats, *, mean: jax.Array) -> MultivariateNormalParams:
        """The M-step with the mean held at (D,), or one number: the covariance about it."""
        held = jnp.broadcast_to(mean, stats.moments.first.shape[1:])
        return _alone(self.family.m_step_given(stats.moments, mean=held[None]))

    def degenerate(self, stats: MultivariateNormalStats, held: tuple[str, ...] = ()) -> jax.Array:
        """(1,): whether the covariance rests on its floor."""
        return self.family.degenerate(stats.moments, held)

    def unconstrain(self, params: MultivariateNormalParams) -> MultivariateNormalParams:
        """The mean as it is, the covariance in log-Cholesky coordinates."""
        return _alone(self.family.unconstrain(_family_params(params)))

    def constrain(self, theta: MultivariateNormalParams) -> MultivariateNormalParams:
        """Inverse of `unconstrain`."""
        return _alone(self.family.constrain(_family_params(theta)))

    @parameters.at_rows
    def log_prob(self, params: MultivariateNormalParams, x: Data) -> jax.Array:
        """log p of what is observed of every row: (N,); of moments the sum over the rows of every group: (G,)."""
        return self._in_blocks(params, x, "evidence")

    @parameters.at_rows
    def posterior(self, params: MultivariateNormalParams, x: jax.Array) -> StateMoments:
        """p(row n | its observed entries): means (N, D), and covariances (N, D, D), 0 for observed entries."""
        return dataclasses.replace(self, missing=True)._in_blocks(params, checks.matrix("x", x), "moments")

    @parameters.at_rows
    def impute(
        self,
        params: MultivariateNormalParams,
        x: jax.Array,
        *,
        key: jax.Array | None = None,
        num_draws: int | None = None,
    ) -> jax.Array:
        """The rows with missing entries filled in; observed ones stay as they are.

        Without a key by conditional means, (N, D); with one by joint draws of all missing entries of a row,
        (num_draws, N, D), for multiple imputation (Rubin 1987).
        """
        shares = jnp.ones((tree.num_rows(x), 1), params.mean.dtype)
        return filled_in(self.family, _family_params(params), x, shares, key, num_draws)

    def sample(self, key: jax.Array, params: MultivariateNormalParams, n: int) -> jax.Array:
        """n rows (n, D)."""
        checks.positive_integer("n", n)
        return self.family.sample(checks.random_key(key), _family_params(params), jnp.zeros(n, jnp.int32))

    def num_parameters(self, params: MultivariateNormalParams) -> int:
        """Free parameters."""
        return sum(self.degrees(params).values())

    def degrees(self, params: MultivariateNormalParams) -> dict[str, int]:
        """Free parameters by name."""
        entries = len(params.mean)
        return {"mean": entries, "covariance": entries * (entries + 1) // 2}

    def check(self, x: Data, weights: jax.Array | None = None) -> None:
        """Raise ValueError or TypeError for bad data, by name. Under jit only shapes are looked at."""
        if isinstance(x, data.Roots):
            return
        if isinstance(x, Moments):
            check_moments(x, weights)
            return
        self.family.check(checks.present(x, weights))
        checks.row_weights(weights, data.shape(x)[0])

    def params_like(self, x: Data) -> MultivariateNormalParams:
        """The shapes that parameters have for such data."""
        entries, dtype = data.shape(x)[1], tree.float_dtype(x)
        like = functools.partial(parameters.like, dtype=dtype)
        return MultivariateNormalParams(mean=like((entries,)), covariance=like((entries, entries)))

    units = staticmethod(data.units)
    sample_size = staticmethod(data.num_rows)

    def reduced(self, x: Data, weights: jax.Array | None = None) -> tuple[Data, jax.Array | None]:
        """Moments in place of the rows, where the rows are complete and more than their columns."""
        return data.reduced(x, weights, self.missing)

    def without_missing(self) -> "MultivariateNormal":
        """The model for rows without missing entries."""
        return dataclasses.replace(self, missing=False) if self.missing else self

    def floats_per_row(self, params: MultivariateNormalParams, x: Data) -> int:
        """Temporaries of an E-step, in numbers a row."""
        entries = len(params.mean)
        return 8 * entries**2 if self.missing or isinstance(x, data.Roots) else 4 * entries

    @functools.partial(jax.jit, static_argnames="what")
    def _in_blocks(self, params: MultivariateNormalParams, x: Data, what: str) -> Any:
        x = data.read(x)

        def block(rows: Data) -> Any:
            found = self.infer(params, rows)
            if what == "evidence" or found.covariances is None:
                return found.evidence
            return StateMoments(means=found.means, covariances=jnp.moveaxis(found.covariances, -1, 0))

        return tree.map_over_blocks(block, x, tree.rows_per_block(self.floats_per_row(params, x), params.mean.dtype))


def _family_params(params: MultivariateNormalParams) -> NormalParams:
    return NormalParams(mean=params.mean[None], covariance=params.covariance[None])


def _alone(params: NormalParams) -> MultivariateNormalParams:
    return MultivariateNormalParams(mean=params.mean[0], covariance=params.covariance[0])
