"""Normal components with covariances of low rank plus noise: mixtures of factor analysers, and of PPCA."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from .. import capabilities, checks, numerics, parameters
from ..latents.linear_gaussian.factors import Factors, factors
from ..record import record, static
from . import columns
from .covariance import Diagonal, Spherical
from .linear_equation import EquationParams, EquationStats, LinearEquation
from .principal_start import principal_start

# The shape of the noise, and the name of its parameter.
_NOISE: dict[str, tuple[Diagonal | Spherical, str]] = {
    "diag": (Diagonal(), "uniquenesses"),
    "isotropic": (Spherical(), "noise_variance"),
}

# Rounds of an M-step whose loadings are shared and whose noise is not. Each gains several digits.
_ROUNDS = 12


@record
class LowRankNormalParams:
    """x = mean + loadings z + noise of K components, with factors z ~ N(0, I_Q).

    mean            (K, D)
    loadings        (K, D, Q)
    uniquenesses    (K, D), variances of the noise where it is "diag"; else None
    noise_variance  (K,), where it is "isotropic"; else None
    """

    mean: jax.Array
    loadings: jax.Array
    uniquenesses: jax.Array | None = None
    noise_variance: jax.Array | None = None


@record
class LowRankNormalStats:
    """Expected statistics of rows and factors, additive over rows.

    equation  normal equations of x on (z, 1), component axis first
    base      (K,), -sum r KL(p(z | x) ‖ N(0, I)), which makes Q equal to sum r log p(x) at the current parameters
    """

    equation: EquationStats
    base: jax.Array

    @property
    def count(self) -> jax.Array:
        """Expected number of rows of each component: (K,)."""
        return self.equation.count


@record
class _Told:
    """Posterior means of the factors given the rows, and residuals, for every component.

    means   (K, N, Q), E[z | x]
    left    (K, N, D), x - mean - loadings · means
    square  (K, N), squared Mahalanobis distances of x
    """

    means: jax.Array
    left: jax.Array
    square: jax.Array


@capabilities.completed("part")
@record(kw_only=False)
class LowRankNormal:
    """Normal components of covariance loadings loadingsᵀ + noise: x | z ~ N(mean + loadings z, noise), z ~ N(0, I_Q).

    num_latents: Q, below the number of columns; noise: "diag", a variance a column (mixtures of factor analysers), or
    "isotropic", one for all (mixtures of PPCA). Loadings are determined up to a rotation of the factors, and
    `num_parameters` counts them so. Data (N, D), nothing missing. `Tied(LowRankNormal(2), "loadings")` and the like
    share loadings, noise or both among components: the eight models of McNicholas & Murphy.
    Densities and statistics use Woodbury's identity: nothing of size D x D is made. Distances are sums of squares of
    residuals, in which nothing cancels. The M-step is that of Ghahramani & Hinton, slow where loadings are large beside
    the noise; fits for which no algorithm is named take `EM(maximize=Expanded())`, a few steps in place of hundreds.
    Raises TypeError or ValueError for a num_latents that is not a whole number of at least 1, or another noise.
    Ghahramani & Hinton (1996), The EM algorithm for mixtures of factor analyzers, CRG-TR-96-1; Tipping & Bishop (1999),
    Mixtures of probabilistic principal component analyzers, Neural Computation 11; McLachlan & Peel, Finite Mixture
    Models, chapter 8; McNicholas & Murphy (2008), Parsimonious Gaussian mixture models, Statistics and Computing 18.
    """

    num_latents: int = static()
    noise: str = static(default="diag")

    shares_jointly = expands = True

    def __post_init__(self) -> None:
        checks.positive_integer("num_latents", self.num_latents)
        checks.choice("noise", self.noise, _NOISE)

    @property
    def supports(self) -> parameters.Supports:
        return {self._noise_name: parameters.at_least_zero}

    @property
    def shareable(self) -> tuple[str, ...]:
        return ("loadings", self._noise_name)

    @property
    def holdable(self) -> tuple[str, ...]:
        return ("mean", *self.shareable)

    @property
    def _noise_name(self) -> str:
        return _NOISE[self.noise][1]

    @property
    def _equation(self) -> LinearEquation:
        return LinearEquation(noise=_NOISE[self.noise][0], widths=(self.num_latents, 1))

    def pooled(self, x: jax.Array, weights: jax.Array | None, num_components: int) -> LowRankNormalParams:
        """The data's mean and leading directions, in every component: EM does not move loadings of 0.

        PPCA's closed form (Tipping & Bishop 1999, equations 7 and 8) with these directions, columns standardised where
        noise is "diag". The directions are those of a few orthogonal iterations, from a fixed draw.
        """
        start = self._params(*principal_start(self._rows(x), weights, self.num_latents, self.noise == "diag"))
        return jax.tree.map(lambda leaf: jnp.tile(leaf, (num_components,) + (1,) * leaf.ndim), start)

    def features(self, x: jax.Array) -> jax.Array:
        return checks.matrix("x", x)

    def log_prob(self, params: LowRankNormalParams, x: jax.Array) -> jax.Array:
        """Log-density of every row under every component: (N, D) -> (K, N)."""
        of, told = self._told(params, x)
        constant = of.half_logdet + 0.5 * params.mean.shape[-1] * math.log(2 * math.pi)
        return -constant[:, None] - 0.5 * told.square

    def stats(self, params: LowRankNormalParams, x: jax.Array, responsibilities: jax.Array) -> LowRankNormalStats:
        """Expected statistics: x (N, D), responsibilities (K, N).

        A vanishing pseudo-row, with factors as their prior has them, keeps a component without rows as it is.
        """
        of, told = self._told(params, x)
        noise, pseudo = self._variances(params), columns.PSEUDO_COUNT
        rows = jnp.sum(responsibilities, axis=1)
        features = jnp.concatenate([told.means, jnp.ones_like(told.means[..., :1])], axis=-1)
        weighted = responsibilities[..., None] * features
        spread = rows[:, None, None] * of.covariance
        carried = numerics.product(params.loadings, spread, "kdq,kqr->kdr")
        latents = self.num_latents
        gram = numerics.product(weighted, features, "knf,kng->kfg")
        gram = gram.at[:, :latents, :latents].add(spread) + pseudo * jnp.eye(latents + 1, dtype=gram.dtype)[None]
        cross = numerics.product(weighted, told.left, "knf,knd->kfd")
        cross = cross.at[:, :latents].add(-jnp.swapaxes(carried, 1, 2))
        square = numerics.product(responsibilities, jnp.square(told.left), "kn,knd->kd")
        square = square + jnp.sum(params.loadings * carried, axis=-1) + pseudo * noise
        # -KL(factors || N(0, I)) = (Q - tr C - |m|² + log det C) / 2 of every row.
        half_logdet = of.half_logdet - 0.5 * jnp.sum(jnp.log(noise), axis=1)
        constant = 0.5 * (latents - jnp.trace(of.covariance, axis1=1, axis2=2)) - half_logdet
        lengths = jnp.sum(weighted[..., :latents] * told.means, axis=(1, 2))
        count = rows + pseudo
        return LowRankNormalStats(
            equation=EquationStats(
                count=count,
                reference=count[:, None, None] * self._split(params).line,
                gram=gram,
                cross=cross,
                square=square if self.noise == "diag" else jnp.sum(square, axis=1),
            ),
            base=rows * constant - 0.5 * lengths,
        )

    def m_step(self, stats: LowRankNormalStats) -> LowRankNormalParams:
        """Least squares of the rows on the factors and 1, and the mean squares of the residuals."""
        return self.m_step_given(stats)

    def m_step_given(
        self, stats: LowRankNormalStats, *, shared: tuple[str, ...] = (), **held: jax.Array
    ) -> LowRankNormalParams:
        """The M-step with parameters held at these values, or shared by all components."""
        if "loadings" not in shared:
            return self._given(stats.equation, shared, held)
        line = stats.equation.line
        mean = jnp.broadcast_to(held["mean"], line.shape[:-1]) if "mean" in held else line[..., -1]
        common = jnp.broadcast_to(jnp.mean(line[..., :-1], axis=0), line[..., :-1].shape)
        about = self._split(self._params(mean, common, jnp.ones_like(mean)))
        equation = self._equation.rebase(stats.equation, about)

        # A round is an exact conditional M-step over the loadings, and one over all else.
        def once(_: int, params: LowRankNormalParams) -> LowRankNormalParams:
            change = _shared_correction(equation, 1 / self._variances(params), "mean" in held)
            return self._given(equation, shared, {**held, "loadings": common + change[None]})

        # With noise that is shared or held, one round is exact; else loadings and noise depend on each other.
        rounds = _ROUNDS if self._noise_name not in (*shared, *held) else 1
        return jax.lax.fori_loop(0, rounds, once, self._given(equation, shared, {**held, "loadings": common}))

    def expanded(
        self,
        params: LowRankNormalParams,
        stats: LowRankNormalStats,
        held: tuple[str, ...] = (),
        shared: tuple[str, ...] = (),
    ) -> LowRankNormalParams:
        """The M-step of factors with a free mean and covariance, which are then absorbed into mean and loadings.

        The mean becomes that of the component's rows. Without this step EM moves the less along the loadings, the
        larger they are beside the noise: hundreds of steps in place of ten.
        """
        count, latents = stats.equation.count, self.num_latents
        moments = stats.equation.gram / count[:, None, None]
        mean, second = moments[:, :latents, latents], moments[:, :latents, :latents]
        if "mean" in held:
            mean = jnp.zeros_like(mean)
        shifted = params.mean + numerics.product(params.loadings, mean, "kdq,kq->kd")
        if "loadings" in held:
            return dataclasses.replace(params, mean=shifted)
        spread = second - mean[:, :, None] * mean[:, None]
        if "loadings" in shared:
            share = (count / jnp.sum(count))[:, None, None]
            spread = jnp.broadcast_to(jnp.sum(share * spread, axis=0), spread.shape)
        lowest = 16 * latents * jnp.finfo(spread.dtype).eps * jnp.diagonal(second, axis1=1, axis2=2)
        root, _ = numerics.floored_cholesky(spread, lowest)
        loadings = numerics.product(params.loadings, root, "kdq,kqr->kdr")
        return dataclasses.replace(params, mean=shifted, loadings=loadings)

    def q_function(self, params: LowRankNormalParams, stats: LowRankNormalStats) -> jax.Array:
        """E[log p(x | z)] + base: a lower bound of log p(x), tight at the parameters that stats were made with."""
        return self._equation.q_function(self._split(params), stats.equation) + jnp.sum(stats.base)

    def log_prior(self, params: LowRankNormalParams) -> jax.Array:
        return jnp.zeros((), params.mean.dtype)

    def rebase(self, stats: LowRankNormalStats, params: LowRankNormalParams) -> LowRankNormalStats:
        """The same statistics about the means and loadings of `params`, exactly."""
        return dataclasses.replace(stats, equation=self._equation.rebase(stats.equation, self._split(params)))

    def degenerate(self, stats: LowRankNormalStats, held: tuple[str, ...] = ()) -> jax.Array:
        """Components (K,) without rows, or with noise at its floor: for "diag", in some column (a Heywood case)."""
        empty = columns.empty(stats.count)
        if self._noise_name in held:
            return empty
        loadings, mean = self._equation.coefficients(stats.equation.line)
        kept = (loadings if "loadings" in held else None, mean if "mean" in held else None)
        return empty | self._equation.degenerate(stats.equation, kept)

    def sample(self, key: jax.Array, params: LowRankNormalParams, labels: jax.Array) -> jax.Array:
        """One row (N, D) from the component that each label (N,) names."""
        key_factors, key_noise = jax.random.split(key)
        count, columns_here, latents = params.loadings.shape
        drawn = jax.random.normal(key_factors, (labels.shape[0], latents), params.mean.dtype)
        noise = jax.random.normal(key_noise, (labels.shape[0], columns_here), params.mean.dtype)
        own = jax.nn.one_hot(labels, count, dtype=drawn.dtype)
        common = numerics.product(own[:, :, None] * drawn[:, None], params.loadings, "nkq,kdq->nd")
        return params.mean[labels] + common + jnp.sqrt(self._variances(params))[labels] * noise

    def num_parameters(self, params: LowRankNormalParams) -> int:
        """Free parameters of all components together, loadings up to a rotation."""
        return sum(self.degrees(params).values())

    def degrees(self, params: LowRankNormalParams) -> dict[str, int]:
        """Free parameters by name; never more in a covariance than a full one has."""
        count, columns_here, latents = params.loadings.shape
        noise = self._equation.noise.degrees(columns_here)
        most = columns_here * (columns_here + 1) // 2 - noise
        loadings = min(columns_here * latents - latents * (latents - 1) // 2, most)
        return {"mean": count * columns_here, "loadings": count * loadings, self._noise_name: count * noise}

    def floats_per_row(self, params: LowRankNormalParams) -> int:
        """Temporaries of an E-step, in numbers a row."""
        count, columns_here, latents = params.loadings.shape
        return count * (2 * columns_here + 3 * latents) + columns_here

    def unconstrain(self, params: LowRankNormalParams) -> LowRankNormalParams:
        """Means and loadings as they are, noise in logarithms."""
        return self._params(params.mean, params.loadings, jnp.log(self._noise(params)))

    def constrain(self, theta: LowRankNormalParams) -> LowRankNormalParams:
        """Inverse of `unconstrain`."""
        return self._params(theta.mean, theta.loadings, jnp.exp(self._noise(theta)))

    def check(self, x: jax.Array, name: str = "x") -> None:
        """Raise for data that no component can have produced, values eagerly."""
        checks.finite_matrix(name, x)
        self._rows(x, name)

    def covariance_matrix(self, params: LowRankNormalParams) -> jax.Array:
        """Every component's covariance as (K, D, D): for few columns."""
        common = numerics.product(params.loadings, params.loadings, "kdq,keq->kde")
        return common + Diagonal().matrix(self._variances(params), params.mean.shape[-1])

    def _given(self, stats: EquationStats, shared: tuple[str, ...], held: dict[str, jax.Array]) -> LowRankNormalParams:
        """The M-step with loadings that are held, if any, or each component's own."""
        lead = stats.reference.shape[:-1]
        mean = jnp.broadcast_to(held["mean"], lead)[..., None] if "mean" in held else None
        found = self._equation.m_step(stats, (held.get("loadings"), mean))
        line, noise = found.line, found.covariance
        if self._noise_name in held:
            noise = jnp.broadcast_to(held[self._noise_name], noise.shape)
        elif self._noise_name in shared:
            share = (stats.count / jnp.sum(stats.count)).reshape((-1,) + (1,) * (noise.ndim - 1))
            noise = jnp.broadcast_to(jnp.sum(share * noise, axis=0), noise.shape)
        return self._params(line[..., -1], line[..., :-1], noise)

    def _params(self, mean: jax.Array, loadings: jax.Array, noise: jax.Array) -> LowRankNormalParams:
        return LowRankNormalParams(mean=mean, loadings=loadings, **{self._noise_name: noise})

    def _noise(self, params: LowRankNormalParams) -> Any:
        return params.uniquenesses if self.noise == "diag" else params.noise_variance

    def _variances(self, params: LowRankNormalParams) -> jax.Array:
        """Variances of the noise, (K, D)."""
        noise = self._noise(params)
        return jnp.broadcast_to(noise if self.noise == "diag" else noise[:, None], params.mean.shape)

    def _split(self, params: LowRankNormalParams) -> EquationParams:
        return EquationParams(coefficients=(params.loadings, params.mean[..., None]), covariance=self._noise(params))

    def _rows(self, x: jax.Array, name: str = "x", expected: int | None = None) -> jax.Array:
        rows = checks.matrix(name, x)
        if expected is not None and rows.shape[1] != expected:
            raise ValueError(f"{name} must have {expected} columns, as the parameters have; got shape {jnp.shape(x)}")
        if rows.shape[1] <= self.num_latents:
            raise ValueError(
                f"num_latents must be below the number of columns of {name}; got {self.num_latents} latents for shape "
                f"{jnp.shape(x)}. Take fewer of them, or Normal('full')"
            )
        return rows

    def _told(self, params: LowRankNormalParams, x: jax.Array) -> tuple[Factors, _Told]:
        """Projections on the factors, and posterior means and residuals of the rows.

        Rows are centred at the mean of the components' means, so that the projections of all components are one matrix
        product. Its error is at most the rounding of the rows themselves, at their distance from that centre; squared
        distances come from residuals about each component's own mean.
        """
        rows = self._rows(x, expected=params.mean.shape[-1])
        centre = jnp.mean(params.mean, axis=0)
        about, offset = rows - centre[None], params.mean - centre[None]
        variances = self._variances(params)
        of = factors(params.loadings, variances)
        means = numerics.product(about, of.projection, "nd,kqd->knq")
        means = means - numerics.product(of.projection, offset, "kqd,kd->kq")[:, None]
        left = about[None] - offset[:, None] - numerics.product(means, params.loadings, "knq,kdq->knd")
        square = numerics.product(jnp.square(left), 1 / variances, "knd,kd->kn")
        square = square + jnp.sum(jnp.square(means), axis=-1)
        return of, _Told(means=means, left=left, square=square)


def _shared_correction(stats: EquationStats, precisions: jax.Array, mean_held: bool) -> jax.Array:
    """What least squares, rows weighed by precisions (K, D), adds to loadings (D, Q) that all components share."""
    latents = stats.gram.shape[-1] - 1
    gram, cross = stats.gram[:, :latents, :latents], stats.cross[:, :latents]
    if not mean_held:  # intercepts follow from the loadings
        slope = stats.gram[:, :latents, latents] / stats.gram[:, latents, latents, None]
        gram = gram - slope[:, :, None] * stats.gram[:, None, latents, :latents]
        cross = cross - slope[:, :, None] * stats.cross[:, None, latents]
    total = numerics.product(precisions, gram, "kd,kqr->dqr")
    return numerics.least_squares(total, numerics.product(precisions, cross, "kd,kqd->dq"))
