"""The multivariate normal distribution, K components at once, in every covariance shape."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from .. import capabilities, checks, numerics, parameters
from ..numerics import tuning
from ..parts import conjugacy
from ..record import record, static
from . import columns as columns_of
from . import conditional, normal_moments
from . import covariance as shapes
from .normal_prior import NormalInverseWishart, log_predictive


@record
class NormalParams:
    """Parameters of K normal components.

    mean: (K, D).
    covariance: (K, D, D) full, (K, D) diag, (K,) spherical; tied shapes, one for all components, have no K axis.
    """

    mean: jax.Array
    covariance: jax.Array


@record
class NormalStats:
    """Moments about the components' current means c, additive over rows.

    count: (K,), sum r.
    reference: (K, D), c times `rows`.
    first: (K, D), sum r (x - c).
    second: stored as the covariance is, sum r (x - c)(x - c)ᵀ.
    observed: (K, D), sum r over observed entries, for uncorrelated columns. For correlated ones it is None: their
        moments are expected ones, missing entries included.
    base: (K,), for correlated columns: sum r log p(x) - Q of these moments, at the parameters that they were made with.
    """

    count: jax.Array
    reference: jax.Array
    first: jax.Array
    second: jax.Array
    observed: jax.Array | None = None
    base: jax.Array | None = None

    @property
    def rows(self) -> jax.Array:
        """sum r behind the moments of each column: (K, D), or (K, 1) where it is the same for all."""
        return self.count[:, None] if self.observed is None else self.observed


@capabilities.completed("part")
@record(kw_only=False)
class Normal:
    """Normal components: log p(x|k) = -(D log 2 pi + log det C_k + (x - m_k)ᵀ C_k⁻¹ (x - m_k)) / 2.

    covariance: "full", "diag" or "spherical", one a component; "tied", "tied_diag" or "tied_spherical", one for all;
        mclust's VVV, VVI, VII, EEE, EEI and EII are the same six.
    prior: a NormalInverseWishart; the M-step is then the posterior mode.
    form: how quadratic forms and second moments are computed. "whitened" uses deviations from each component's own
        mean, exact however tight the clusters are; "expanded" uses moments about one common point, two matrix products
        in all, which loses (spread / width)² units of rounding; "auto" (default) takes the expanded form while that
        loss is small, judged at every step. With few columns its densities are always whitened.
    missing: whether to look for missing entries, NaN, which are integrated out exactly: where columns are correlated,
        by the moments of each row given its observed entries. Where data cannot be looked at, as under jit, code for
        both cases is compiled; False says that no entry is missing.

    Data are (N, D), or (N,) for one column. A row of which nothing is observed counts in a mixture's weights alone.
    Raises ValueError for an unknown covariance or form.
    Bishop, Pattern Recognition and Machine Learning, section 9.2; Little & Rubin (2002), Statistical Analysis with
    Missing Data, section 11.2; Ghahramani & Jordan (1994), Supervised learning from incomplete data via an EM approach.
    """

    covariance: str = static(default="full")
    prior: NormalInverseWishart | None = dataclasses.field(default=None, kw_only=True)
    form: str = static(default="auto", kw_only=True)
    missing: bool = static(default=True, kw_only=True)

    separable = ("covariance",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "covariance", shapes.canonical(self.covariance))
        checks.choice("form", self.form, normal_moments.FORMS)

    @property
    def shape(self) -> shapes.Shape:
        return shapes.NAMES[self.covariance][0]

    @property
    def supports(self) -> parameters.Supports:
        return {"covariance": self.shape.support}

    @property
    def tied(self) -> bool:
        return shapes.NAMES[self.covariance][1]

    @property
    def correlated(self) -> bool:
        """Whether columns are correlated given the component."""
        return isinstance(self.shape, shapes.Full)

    def pooled(self, x: jax.Array, weights: jax.Array | None, num_components: int) -> NormalParams:
        """The data's mean and covariance, in every component."""
        x = checks.matrix("x", x)
        weights = jnp.ones(x.shape[0], x.dtype) if weights is None else weights.astype(x.dtype)
        if not self.correlated:
            values, observed = columns_of.read(x, x.dtype)
            share = weights[:, None] * observed
            total = jnp.sum(share, axis=0)
            mean = jnp.sum(share * values, axis=0) / total
            matrix = jnp.diag(jnp.sum(share * jnp.square(values - mean[None]), axis=0) / total)
        elif self.missing:
            mean, matrix = columns_of.available_moments(x, weights)
        else:
            total = jnp.sum(weights)
            mean = numerics.product(weights, x, "n,nd->d") / total
            deviations = x - mean[None]
            matrix = numerics.product(weights[:, None] * deviations, deviations, "ni,nj->ij") / total
        pooled = self.shape.from_matrix(matrix) / self.shape.repeats(x.shape[1])
        variances = jnp.diagonal(matrix)
        pooled, _ = self.shape.floor(pooled, _lowest(variances + jnp.square(mean), variances))
        return NormalParams(
            mean=jnp.tile(mean, (num_components, 1)),
            covariance=pooled if self.tied else jnp.tile(pooled, (num_components,) + (1,) * pooled.ndim),
        )

    def features(self, x: jax.Array) -> jax.Array:
        rows = checks.matrix("x", x)
        return columns_of.filled(rows, rows.dtype) if self.missing or not self.correlated else rows

    def log_prob(self, params: NormalParams, x: jax.Array) -> jax.Array:
        """Log-density of every row under every component: (N, D) -> (K, N)."""
        x, observed = self._rows(params, x)
        return normal_moments.log_prob(self.components(params), x, observed, self.form)

    def stats(self, params: NormalParams, x: jax.Array, responsibilities: jax.Array) -> NormalStats:
        """Expected sufficient statistics: x (N, D), responsibilities (K, N), row weights included.

        A vanishing pseudo-count of the current parameters keeps a component without rows as it is.
        """
        x, observed = self._rows(params, x)
        parts = self.components(params)
        return self.stats_of(parts, normal_moments.moments(parts, x, observed, responsibilities, self.form))

    def stats_of(self, parts: normal_moments.Components, sums: normal_moments.Sums) -> NormalStats:
        """Statistics from moments about the components' means."""
        pseudo = columns_of.PSEUDO_COUNT
        entries = sums.entries + pseudo
        second = sums.second + pseudo * self.shape.repeats(parts.mean.shape[1]) * parts.covariance
        return NormalStats(
            count=sums.count + pseudo,
            observed=None if self.correlated else entries,
            reference=entries * parts.mean,
            first=sums.first,
            second=jnp.sum(second, axis=0) if self.tied else second,
            base=sums.base,
        )

    def expected_values(self, params: NormalParams, x: jax.Array) -> jax.Array:
        """Conditional mean of every row given its observed entries, under every component: (N, K, D)."""
        return conditional.means(params.mean, self.covariance_matrix(params), self._measured(params, x))

    def drawn_values(self, key: jax.Array, params: NormalParams, x: jax.Array, labels: jax.Array) -> jax.Array:
        """Joint draws given what is observed, from the components of labels (N, M): (N, M, D)."""
        rows = self._measured(params, x)
        return conditional.draws(key, params.mean, self.covariance_matrix(params), rows, labels)

    def completed(self, x: jax.Array, values: jax.Array) -> jax.Array:
        """The rows, in their own shape, with `values` (N, D) in place of missing entries."""
        rows = checks.matrix("x", x)
        return jnp.where(jnp.isnan(rows), values, rows).reshape(jnp.shape(x))

    def m_step(self, stats: NormalStats) -> NormalParams:
        """Weighted means and covariances; with a prior, the posterior mode."""
        return self._estimate(stats)[0]

    def m_step_given(self, stats: NormalStats, *, mean: jax.Array) -> NormalParams:
        """The M-step with the means held: covariances about these."""
        about = NormalParams(mean=jnp.broadcast_to(mean, stats.first.shape), covariance=stats.second)
        held = _at_reference(self.rebase(stats, about))
        return dataclasses.replace(self._estimate(held, moves=False)[0], mean=about.mean)

    def degenerate(self, stats: NormalStats, held: tuple[str, ...] = ()) -> jax.Array:
        """Components (K,) that are empty, or whose covariance rests on its floor."""
        empty = columns_of.empty(stats.count)
        if "covariance" in held:
            return empty
        if "mean" in held:
            return empty | self._estimate(_at_reference(stats), moves=False)[1]
        return empty | self._estimate(stats)[1]

    def q_function(self, params: NormalParams, stats: NormalStats) -> jax.Array:
        """Expected complete-data log-likelihood; linear in stats of one reference.

        With missing entries it is a lower bound of sum r log p(x), tight at the parameters that stats were made with.
        """
        columns = params.mean.shape[-1]
        moved = self.rebase(stats, params)
        precision = self.shape.precision(self.shape.whitener(params.covariance, columns)[0])
        scales = self.shape.log_scales(self._each(params), columns) + 0.5 * math.log(2 * math.pi)
        q = -jnp.sum(stats.rows * scales) - 0.5 * jnp.sum(self.shape.trace(precision, moved.second))
        return q if stats.base is None else q + jnp.sum(stats.base)

    def log_prior(self, params: NormalParams) -> jax.Array:
        """Log-density of the prior, 0 without one."""
        if self.prior is None:
            return jnp.zeros((), params.mean.dtype)
        return self.prior.log_prob(params.mean, self._each(params), self.shape, self.tied)

    def rebase(self, stats: NormalStats, params: NormalParams) -> NormalStats:
        """The same statistics about the means of `params`, exactly."""
        delta = stats.reference / stats.rows - params.mean
        first = stats.first + stats.rows * delta
        change = self.shape.cross(delta, stats.first + first)
        return dataclasses.replace(
            stats,
            reference=stats.rows * params.mean,
            first=first,
            second=stats.second + (jnp.sum(change, axis=0) if self.tied else change),
        )

    def kl(self, p: NormalParams, q: NormalParams) -> jax.Array:
        """KL(p ‖ q) of a row, under every component: (K,)."""
        return normal_moments.divergence(self.components(p), self.components(q))

    # What follows from the conjugate prior; see `protocols.Conjugate`.

    def conjugate_of(self) -> NormalInverseWishart:
        """The prior."""
        if self.prior is None:
            raise ValueError(
                f'Normal needs a prior here, as Normal("{self.covariance}", prior=jaxem.default_prior(x, '
                f'num_components, "{self.covariance}"))'
            )
        return self.prior

    def posterior(self, stats: NormalStats) -> NormalInverseWishart:
        """Hyperparameters, component axis first."""
        lead, columns, dtype = stats.count.shape, stats.first.shape[-1], stats.first.dtype
        return self.conjugate_of().over(self.shape, lead, columns, dtype, self.tied).posterior(stats, self.tied)

    def pooled_posterior(self, x: jax.Array, weights: jax.Array | None, num_components: int) -> NormalInverseWishart:
        """The posterior given all rows, in every component."""
        q = conjugacy.pooled(self, x, weights, num_components)
        return q.shared() if self.tied else q

    def draw(self, key: jax.Array, stats: NormalStats) -> NormalParams:
        """Means and covariances from their posterior given the statistics."""
        if self.missing and self.correlated:
            raise TypeError(
                "missing entries are expected and not drawn where columns are correlated: draws of Normal need "
                "complete rows, and where that cannot be seen, as under jit, Normal(missing=False)"
            )
        return conjugacy.draw(self, key, stats)

    def given(self, values: tuple[jax.Array, jax.Array]) -> NormalParams:
        """Parameters from means and covariances."""
        return NormalParams(mean=values[0], covariance=values[1][0] if self.tied else values[1])

    def plugged(self, q: NormalInverseWishart) -> NormalParams:
        """The means, and the inverses of the expected precisions."""
        return self.given(q.plugged())

    def expected_log_prob(self, q: NormalInverseWishart, x: jax.Array) -> jax.Array:
        """E_q[log p(x)] (K, N): the log-density at `plugged`, plus the slack of q; missing entries are latent."""
        params = self.plugged(q)
        rows, observed = self._rows(params, x)
        density = normal_moments.log_prob(self.components(params), rows, observed, self.form)
        if observed is None:
            return density + jnp.sum(q.slack, axis=1, keepdims=True)
        if self.correlated:  # missing entries are latent; a row without observed entries has log-density 0
            return density + q.slack * jnp.max(observed, axis=0, keepdims=True)
        return density + numerics.product(q.slack, observed, "kd,dn->kn")

    def expected_q(self, q: NormalInverseWishart, stats: NormalStats) -> jax.Array:
        """E_q of Q."""
        return self.q_function(self.plugged(q), stats) + jnp.sum(stats.rows * q.slack)

    def log_expected_prob(self, q: NormalInverseWishart, x: jax.Array) -> jax.Array:
        """log E_q[p(x)] (K, N): Student's t."""
        rows, observed = self._rows(self.plugged(q), x)
        return log_predictive(q, rows, observed)

    def sample(self, key: jax.Array, params: NormalParams, labels: jax.Array) -> jax.Array:
        """One row (N, D) from the component that each label (N,) names."""
        columns = params.mean.shape[-1]
        noise = jax.random.normal(key, (labels.shape[0], columns), params.mean.dtype)
        return params.mean[labels] + self.shape.colour(self._each(params)[labels], noise)

    def num_parameters(self, params: NormalParams) -> int:
        """Free parameters of all components together."""
        count, columns = params.mean.shape
        return count * columns + (1 if self.tied else count) * self.shape.degrees(columns)

    def floats_per_row(self, params: NormalParams) -> int:
        """Temporaries of an E-step, in numbers a row."""
        count, columns = params.mean.shape
        if self.shape.name == "full" and columns > tuning.UNROLLED_SQUARES:
            return count * columns + self.shape.degrees(columns)
        return 4 * count + columns

    def unconstrain(self, params: NormalParams) -> NormalParams:
        """Means as they are, covariances in log-Cholesky or log coordinates."""
        return NormalParams(mean=params.mean, covariance=self.shape.unconstrain(params.covariance))

    def constrain(self, theta: NormalParams) -> NormalParams:
        """Inverse of `unconstrain`."""
        columns = theta.mean.shape[-1]
        return NormalParams(mean=theta.mean, covariance=self.shape.constrain(theta.covariance, columns))

    def check(self, x: jax.Array, name: str = "x") -> None:
        """Raise for data that no normal component can have produced: eager only."""
        checks.finite_matrix(name, x, missing=self.missing)

    def coarse(self) -> "Normal":
        """The cheapest form, for the bulk of many restarts."""
        return dataclasses.replace(self, form="expanded")

    def without_missing(self) -> "Normal":
        """The form for rows in which no entry is missing."""
        return dataclasses.replace(self, missing=False) if self.missing else self

    def covariance_matrix(self, params: NormalParams) -> jax.Array:
        """Every component's covariance as (K, D, D), whatever its shape."""
        return self.shape.matrix(self._each(params), params.mean.shape[-1])

    def _estimate(self, stats: NormalStats, moves: bool = True) -> tuple[NormalParams, jax.Array]:
        """M-step, and which components (K,) needed the floor; unless it `moves`, the mean stays at the reference."""
        shape, prior = self.shape, self.prior
        columns = stats.first.shape[-1]
        centre = stats.reference / stats.rows

        def pool(each: jax.Array) -> jax.Array:
            return jnp.sum(each, axis=0) if self.tied else each

        if prior is None:
            shift = stats.first / stats.rows
            scatter = stats.second - pool(shape.cross(shift, stats.first))
            rows = pool(shape.entries(stats.rows))
        else:
            full = prior.over(shape, stats.count.shape, columns, centre.dtype)
            shift, scatter = full.moved(shape, stats, self.tied, moves)
            rows = pool(shape.entries(stats.rows + 1)) + shape.prior_exponent(prior.degrees_of_freedom, columns)
        estimate = scatter / rows
        second = stats.second if self.tied else jnp.sum(stats.second, axis=0)
        spread = shape.columns_of(second, columns) + jnp.sum((2 * stats.first + stats.reference) * centre, axis=0)
        about = shape.columns_of(stats.second, columns) / pool(stats.rows)
        lifted, low = shape.floor(estimate, _lowest(spread / jnp.sum(stats.rows, axis=0), about))
        return NormalParams(mean=centre + shift, covariance=lifted), jnp.broadcast_to(low, stats.count.shape)

    def _each(self, params: NormalParams) -> jax.Array:
        """One covariance a component, tied ones repeated."""
        if not self.tied:
            return params.covariance
        return jnp.broadcast_to(params.covariance, (params.mean.shape[0], *params.covariance.shape))

    def components(self, params: NormalParams) -> normal_moments.Components:
        """The parameters with whiteners and normalisers, for densities and moments."""
        return normal_moments.components(self.shape, params.mean, self._each(params), self.tied)

    def _measured(self, params: NormalParams, x: jax.Array) -> conditional.Measured:
        rows, observed = dataclasses.replace(self, missing=True)._rows(params, x)
        assert observed is not None
        return conditional.Measured(values=rows, observed=observed.T > 0)

    def _rows(self, params: NormalParams, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Rows (N, D) with finite numbers in place of missing entries, and which entries are observed.

        The latter is (D, N), 1 where an entry is observed and 0 where it is missing; None where `missing` is False.
        """
        rows = checks.matrix("x", x)
        if rows.shape[1] != params.mean.shape[-1]:
            raise ValueError(f"x must have {params.mean.shape[-1]} columns, as params have; got shape {jnp.shape(x)}")
        if not self.missing:
            return rows, None
        observed = ~jnp.isnan(rows)
        # No result depends on the number filled in: derivatives need not go through it.
        finite = jax.lax.stop_gradient(jnp.mean(params.mean, axis=0))
        return jnp.where(observed, rows, finite), observed.T.astype(rows.dtype)


def _at_reference(stats: NormalStats) -> NormalStats:
    """Statistics of means that stay at the reference."""
    return dataclasses.replace(stats, first=jnp.zeros_like(stats.first))


def _lowest(mean_square: jax.Array, about: jax.Array) -> jax.Array:
    """Variances (..., D) below which rounding dominates, of the data and of the moments behind the estimate.

    mean_square (D,): of the columns about 0; about (..., D): of the columns about the statistics' reference.
    """
    eps = jnp.finfo(mean_square.dtype).eps
    data = jnp.where(mean_square > 0, eps**2 * mean_square, eps**2)
    # A Cholesky factor loses about D units of rounding a pivot: below this, a pivot has less than two digits left.
    return jnp.maximum(numerics.to_rank(data, about.ndim), 64 * mean_square.shape[-1] * eps * about)
