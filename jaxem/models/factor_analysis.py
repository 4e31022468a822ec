"""Factor analysis and probabilistic PCA: one linear-Gaussian latent a row."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .. import checks, numerics, parameters, tree
from ..data import Moments, check_moments
from ..families import columns
from ..families.linear_equation import EquationParams, EquationStats, LinearEquation
from ..latents import Exact
from ..latents.linear_gaussian import StateMoments, factors, rotations
from ..latents.linear_gaussian.factors import FactorPosterior
from ..protocols import Data
from ..record import fields, record, static
from ..slots import Expect
from . import factor_data as data
from .factor_params import NOISE, FactorParams, freedom, heywood, hidden, likelihood_ratio_test
from .factor_params import FactorAnalysisParams as FactorAnalysisParams
from .factor_params import FactorStats as FactorStats
from .factor_params import FitTest as FitTest
from .factor_params import PPCAParams as PPCAParams

INITS = ("random", "principal")

# The least uniqueness of a principal start, as a share of its column's variance.
_LEAST = 0.05


@record(kw_only=False)
class FactorAnalysis:
    """x = mean + loadings z + noise, with factors z ~ N(0, I_Q) and independent noise.

    num_latents: Q.
    noise: "diag", a variance a column, its uniqueness; or "isotropic", one for all columns (`PPCA`).
    missing: False promises that no entry is NaN, and saves compiling for it.
    Data: rows (N, D), in which NaN is a missing entry, integrated out exactly, or `Moments`. Where complete rows
    outnumber columns, a fit that uses all rows in every step reduces them to moments once: a step then costs D² Q.
    Loadings are determined up to a rotation of the factors: see `canonical` and `jaxem.varimax`.

    Plain EM crawls here, so that a fit takes `anderson(EM(maximize=Expanded()))` where no algorithm is named: on the
    six tests of ability.cov, two factors, that comes within 1e-6 nats a row of the maximum in 33 steps, EM in 817; with
    noise far below the loadings it takes 60, and EM more than 5000.
    A Heywood case, a uniqueness that the likelihood sends to 0, ends as DEGENERATE; `degenerate` tells which columns.
    Source: Rubin & Thayer (1982), EM algorithms for ML factor analysis, Psychometrika 47; Tipping & Bishop (1999),
    Probabilistic principal component analysis, J. Royal Statistical Society B 61.
    Raises TypeError or ValueError for a num_latents that is not a whole number of at least 1, or another noise.
    """

    num_latents: int = static()
    noise: str = static(default="diag")
    missing: bool = static(default=True, kw_only=True)

    crawls = expands = True

    def __post_init__(self) -> None:
        checks.positive_integer("num_latents", self.num_latents)
        checks.choice("noise", self.noise, NOISE)

    @property
    def separable(self) -> tuple[str, ...]:
        return (self._noise_name,)

    @property
    def supports(self) -> parameters.Supports:
        """Where the values of parameters lie."""
        return {self._noise_name: parameters.at_least_zero}

    @property
    def equation(self) -> LinearEquation:
        """x on (z, 1)."""
        return LinearEquation(noise=NOISE[self.noise][0], widths=(self.num_latents, 1))

    def init(
        self, key: jax.Array, x: Data, weights: jax.Array | None = None, *, method: str = "random"
    ) -> FactorParams:
        """A start; both have the columns' means and explain part of their variances.

        method: "random" loadings that explain half (pure in `key`, so `vmap` over keys gives many); or "principal",
        deterministic: leading principal components, of standardised columns where noise is "diag". Of complete rows
        with isotropic noise that is the maximum likelihood estimate (Tipping & Bishop 1999, equations 7 and 8).
        """
        checks.choice("method", method, INITS)
        x, weights = checks.native((x, weights))
        self.check(x, weights)
        return self._init(checks.random_key(key), x, weights, method)

    @functools.partial(jax.jit, static_argnames="method")
    def _init(self, key: jax.Array, x: Data, weights: jax.Array | None, method: str) -> FactorParams:
        x, weights = tree.present(data.units(x), weights)
        x, latents = data.read(x), self.num_latents
        mean, variance = data.column_moments(x, weights)
        variance = jnp.maximum(variance, _rounding(variance + jnp.square(mean)))
        shared = jnp.mean(variance)
        isotropic = self.noise == "isotropic"
        if method == "random":
            draws = jax.random.normal(key, (len(mean), latents), mean.dtype)
            scale = jnp.broadcast_to(shared, variance.shape) if isotropic else variance
            loadings = jnp.sqrt(scale / (2 * latents))[:, None] * draws
            return self._params(mean, loadings, 0.5 * (shared if isotropic else variance))
        scale = jnp.ones_like(variance) if isotropic else jnp.sqrt(variance)
        spread = variance / jnp.square(scale)
        directions, along = data.leading(x, weights, mean, scale, latents)
        rest = jnp.sum(spread) - jnp.sum(along)
        rest = jnp.maximum(rest / max(1, len(mean) - latents), jnp.finfo(mean.dtype).eps * jnp.mean(spread))
        loadings = scale[:, None] * directions * jnp.sqrt(jnp.maximum(along - rest, 0))[None]
        left = jnp.maximum(variance - jnp.sum(jnp.square(loadings), axis=1), _LEAST * variance)
        return self._params(mean, loadings, rest if isotropic else left)

    def infer(self, params: FactorParams, x: Data, expect: Expect = Exact()) -> FactorPosterior:
        """The posterior of the factors of every row; its `evidence` is log p(x_n), (N,)."""
        if not isinstance(expect, Exact) or expect.temperature is not None:
            raise TypeError(f"expect must be Exact() for a factor model; got {expect!r}")
        parameters.shapes("params", self, params, x)
        x = data.read(x)
        cases = data.cases(params.mean, x, self.missing)
        return factors.infer(params.loadings, self._variances(params), cases, tree.num_rows(x))

    def statistics(
        self, params: FactorParams, x: Data, posterior: FactorPosterior, weights: jax.Array | None = None
    ) -> FactorStats:
        """Normal equations under any posterior of the factors, and the sum of its evidence; missing entries have
        their moments given the factors, at `params`. A vanishing pseudo-row keeps parameters that no data bear on.
        """
        cases = data.cases(params.mean, data.read(x), self.missing)
        if weights is not None:
            weights = weights.astype(params.mean.dtype)
        noise, pseudo = self._noise(params), columns.PSEUDO_COUNT
        found = factors.sums(params.loadings, self._variances(params), cases, posterior, weights)
        square = found.square if self.noise == "diag" else jnp.sum(found.square)
        count = found.gram[-1, -1] + pseudo
        equation = EquationStats(
            count=count,
            reference=count * self._split(params).line,
            gram=found.gram + pseudo * jnp.eye(self.num_latents + 1, dtype=square.dtype),
            cross=found.cross,
            square=square + pseudo * self.equation.noise.repeats(len(params.mean)) * noise,
        )
        loglik = numerics.weighted_sum(posterior.evidence, weights)
        return FactorStats(equation=equation, noise=count * noise, loglik=loglik)

    def e_step(
        self, params: FactorParams, x: Data, weights: jax.Array | None = None, expect: Expect = Exact()
    ) -> FactorStats:
        """Expected normal equations, and sum_n w_n log p(x_n); see `infer` and `statistics`."""
        x = data.read(checks.present(data.units(x), weights))

        def given(model: Any) -> FactorStats:
            return model.statistics(params, x, expect.posterior(model, params, x), weights)

        if not self.missing or isinstance(x, data.Roots):
            return given(self)
        # A real branch, since most blocks of rows have no missing entries.
        return jax.lax.cond(jnp.any(jnp.isnan(x)), lambda: given(self), lambda: given(self.without_missing()))

    def m_step(self, stats: FactorStats) -> FactorParams:
        """Least squares of x on the factors and 1, and the expected mean squares of the residuals."""
        return self.m_step_given(stats)

    def m_step_given(
        self, stats: FactorStats, *, mean: jax.Array | None = None, loadings: jax.Array | None = None
    ) -> FactorParams:
        """The M-step where some parameters are held at these values."""
        return self._join(self.equation.m_step(stats.equation, _groups(mean, loadings)))

    def expanded(self, params: FactorParams, stats: FactorStats, held: tuple[str, ...] = ()) -> FactorParams:
        """The M-step with factors of any mean and covariance, which mean and loadings then absorb, if both are free."""
        if {"mean", "loadings"} & {*held}:
            return params
        gram, count = stats.equation.gram, stats.equation.count
        centre = gram[:-1, -1] / count
        root = numerics.cholesky(gram[:-1, :-1] / count - centre[:, None] * centre[None])
        mean = params.mean + numerics.product(params.loadings, centre, "dq,q->d")
        loadings = numerics.product(params.loadings, root, "dq,qr->dr")
        return dataclasses.replace(params, mean=mean, loadings=loadings)

    def blocks(self, params: FactorParams) -> tuple[str, ...]:
        """Names of parameters with a conditional M-step of their own: all of them."""
        return tuple(fields(params))

    def m_step_for(self, params: FactorParams, stats: FactorStats, names: tuple[str, ...]) -> FactorParams:
        """The M-step over the named blocks alone, all other parameters held where they are."""
        held = {name: value for name, value in fields(params).items() if name not in names}
        noise = {name: held.pop(name) for name in self.separable if name in held}
        return dataclasses.replace(self.m_step_given(stats, **held), **noise)

    def q_function(self, params: FactorParams, stats: FactorStats) -> jax.Array:
        """Expected log-density of rows and factors, E[log p(x | z) + log p(z)]."""
        factors_square = jnp.trace(stats.equation.gram) - stats.equation.gram[-1, -1]
        size = stats.equation.count * self.num_latents * math.log(2 * math.pi)
        return self.equation.q_function(self._split(params), stats.equation) - 0.5 * (factors_square + size)

    def log_prior(self, params: FactorParams) -> jax.Array:
        """0: there is no prior."""
        return jnp.zeros((), params.mean.dtype)

    def rebase(self, stats: FactorStats, params: FactorParams) -> FactorStats:
        """The same statistics about the mean and loadings of `params`, exactly."""
        equation = self.equation.rebase(stats.equation, self._split(params))
        return dataclasses.replace(stats, equation=equation, noise=equation.count * self._noise(params))

    def degenerate(self, stats: FactorStats, held: tuple[str, ...] = ()) -> jax.Array:
        """Heywood cases: columns (D,) whose uniqueness the likelihood sends to 0; (1,): a common noise at its floor."""
        current = stats.noise / stats.equation.count
        if self._noise_name in held:
            return jnp.zeros(current.size, bool)
        loadings: Any
        loadings, mean = self.equation.coefficients(stats.equation.line)
        kept = (loadings if "loadings" in held else None, mean if "mean" in held else None)
        floored = self.equation.degenerate(stats.equation, kept)
        spread = jnp.sum(jnp.square(loadings), axis=1) + current
        if self.noise == "isotropic":
            return (floored | hidden(current, jnp.mean(spread), len(spread))).reshape(1)
        mapped = stats.equation.square / stats.equation.count
        return floored | hidden(current, spread, len(spread)) | heywood(loadings, current, mapped)

    def unconstrain(self, params: FactorParams) -> FactorParams:
        """Noise in logarithms; the rest is free as it is."""
        return self._join(self.equation.unconstrain(self._split(params)))

    def constrain(self, theta: FactorParams) -> FactorParams:
        """Inverse of `unconstrain`."""
        return self._join(self.equation.constrain(self._split(theta)))

    @parameters.at_rows
    def log_prob(self, params: FactorParams, x: Data) -> jax.Array:
        """log p(x_n) of every row: (N,); of moments the sum over the rows of every group: (G,)."""
        return self._by_rows(params, x, "evidence")

    @parameters.at_rows
    def posterior(self, params: FactorParams, x: jax.Array) -> StateMoments:
        """p(z_n | x_n): means (N, Q) and covariances (N, Q, Q)."""
        return self._by_rows(params, _rows(x), "moments")

    @parameters.at_rows
    def project(self, params: FactorParams, x: jax.Array) -> jax.Array:
        """E[z_n | x_n], factor scores: (N, Q)."""
        return self._by_rows(params, _rows(x), "means")

    def reconstruct(self, params: FactorParams, x: jax.Array) -> jax.Array:
        """mean + loadings E[z_n | x_n]: (N, D), also for missing entries."""
        scores = self.project(params, x)
        return jnp.asarray(params.mean)[None] + numerics.product(scores, params.loadings, "nq,dq->nd")

    def sample(self, key: jax.Array, params: FactorParams, n: int) -> jax.Array:
        """n rows (n, D)."""
        checks.positive_integer("n", n)
        key_factors, key_noise = jax.random.split(checks.random_key(key))
        shape, dtype = params.loadings.shape, params.loadings.dtype
        drawn = jax.random.normal(key_factors, (n, shape[1]), dtype)
        noise = jnp.sqrt(self._variances(params))[None] * jax.random.normal(key_noise, (n, shape[0]), dtype)
        return params.mean[None] + numerics.product(drawn, params.loadings, "nq,dq->nd") + noise

    def canonical(self, params: FactorParams) -> FactorParams:
        """The same model with factors so turned that loadingsᵀ noise⁻¹ loadings is diagonal, decreasing, and every
        column of the loadings has a sum of at least 0."""
        return dataclasses.replace(params, loadings=rotations.canonical(params.loadings, self._variances(params)))

    def num_parameters(self, params: FactorParams) -> int:
        """Free parameters, without Q (Q - 1) / 2 of the loadings, which only rotate the factors."""
        return sum(self.degrees(params).values())

    def degrees(self, params: FactorParams) -> dict[str, int]:
        """Free parameters by name."""
        entries, latents = params.loadings.shape
        noise = self.equation.noise.degrees(entries)
        turned = min(latents, entries)
        loadings = entries * turned - turned * (turned - 1) // 2
        return {"mean": entries, "loadings": loadings, self._noise_name: noise}

    def sample_size(self, x: Data, weights: jax.Array | None = None) -> jax.Array:
        """What information criteria count: rows of which something is observed."""
        return data.num_rows(x, weights)

    def check(self, x: Data, weights: jax.Array | None = None) -> None:
        """Raise ValueError or TypeError for bad data, by name. Under jit only shapes are looked at.

        Warns of more factors than the covariance of so many columns determines (Ledermann's bound).
        """
        if isinstance(x, data.Roots):
            return
        if isinstance(x, Moments):
            check_moments(x, weights)
        else:
            checks.finite_matrix("x", checks.present(x, weights), missing=self.missing)
            checks.row_weights(weights, data.shape(x)[0])
        entries, latents = data.shape(x)[1], self.num_latents
        most = max((q for q in range(entries) if freedom(self.equation.noise, entries, q) >= 0), default=0)
        if latents > most:
            checks.warn_of_fit(
                f"num_latents={latents} is more than the covariance of {entries} columns can tell ({most} at most): "
                "such factors are not determined, beyond their rotation"
            )

    def params_like(self, x: Data) -> FactorParams:
        """The shapes that parameters have for such data."""
        entries, dtype = data.shape(x)[1], tree.float_dtype(x)
        noise = (entries,) if self.noise == "diag" else ()
        found = ((entries,), (entries, self.num_latents), noise)
        return self._params(*(parameters.like(shape, dtype) for shape in found))

    likelihood_ratio_test = likelihood_ratio_test
    units = staticmethod(data.units)

    def reduced(self, x: Data, weights: jax.Array | None = None) -> tuple[Data, jax.Array | None]:
        """Moments in place of the rows, where the rows are complete and more than their columns."""
        return data.reduced(x, weights, self.missing)

    def without_missing(self) -> "FactorAnalysis":
        """The model for rows without missing entries."""
        return dataclasses.replace(self, missing=False) if self.missing else self

    def floats_per_row(self, params: FactorParams, x: Data) -> int:
        """Temporaries of an E-step, in numbers a row."""
        entries, latents = params.loadings.shape
        own = 4 * latents**2 if self.missing and not isinstance(x, data.Roots) else 0
        return (3 * (entries + latents) + own) * (entries + 1 if isinstance(x, data.Roots) else 1)

    @property
    def _noise_name(self) -> str:
        return NOISE[self.noise][2]

    def _noise(self, params: FactorParams) -> jax.Array:
        """Variances of the noise: (D,), or () where it is isotropic."""
        return vars(params)[self._noise_name]

    def _variances(self, params: FactorParams) -> jax.Array:
        """The variance of every column's noise: (D,)."""
        return jnp.broadcast_to(self._noise(params), params.mean.shape)

    def _params(self, mean: Any, loadings: Any, noise: Any) -> FactorParams:
        return NOISE[self.noise][1](mean=mean, loadings=loadings, **{self._noise_name: noise})

    def _split(self, params: FactorParams) -> EquationParams:
        return EquationParams(coefficients=_groups(params.mean, params.loadings), covariance=self._noise(params))

    def _join(self, equation: EquationParams) -> FactorParams:
        loadings, mean = equation.coefficients
        assert mean is not None
        return self._params(mean[..., 0], loadings, equation.covariance)

    def _by_rows(self, params: FactorParams, x: Data, what: str) -> Any:
        """One of _ASKED of every row; concrete rows without NaN go by the faster program for complete rows."""
        known = not isinstance(x, (Moments, data.Roots)) and checks.is_concrete(x) and not checks.has_nan(x)
        return (self.without_missing() if known else self)._in_blocks(params, x, what)

    @functools.partial(jax.jit, static_argnames="what")
    def _in_blocks(self, params: FactorParams, x: Data, what: str) -> Any:
        x = data.read(x)
        size = tree.rows_per_block(self.floats_per_row(params, x), params.mean.dtype)
        return tree.map_over_blocks(lambda rows: _ASKED[what](self.infer(params, rows)), x, size)


def PPCA(num_latents: int, *, missing: bool = True) -> FactorAnalysis:
    """Probabilistic PCA: factor analysis whose noise has one variance for all columns; params are `PPCAParams`.

    Its maximum is in closed form where no entry is missing: `model.init(key, x, method="principal")`. As the noise goes
    to 0 its EM becomes that of PCA (Roweis 1998, EM algorithms for PCA and SPCA, NIPS 10).
    """
    return FactorAnalysis(num_latents, "isotropic", missing=missing)


def _moments_of(posterior: FactorPosterior) -> StateMoments:
    covariances = jnp.moveaxis(posterior.covariance, -1, 0)
    shape = (posterior.means.shape[1], *covariances.shape[1:])
    return StateMoments(means=posterior.means.T, covariances=jnp.broadcast_to(covariances, shape))


# Functions of the posterior of rows, by name.
_ASKED: dict[str, Callable[[FactorPosterior], Any]] = {
    "evidence": lambda posterior: posterior.evidence,
    "means": lambda posterior: posterior.means.T,
    "moments": _moments_of,
}


def _groups(mean: Any, loadings: Any) -> tuple[Any, Any]:
    """Coefficients (D, Q) of the factors and (D, 1) of 1; a mean of one number stays as it is."""
    return loadings, mean if mean is None or jnp.ndim(mean) == 0 else mean[..., None]


def _rounding(energy: jax.Array) -> jax.Array:
    """Variances of the size of rounding errors, for columns of this mean square."""
    eps = jnp.finfo(energy.dtype).eps
    return jnp.where(energy > 0, eps**2 * energy, eps**2)


def _rows(x: Any) -> Any:
    """Rows; TypeError for moments, which have no factors of their own."""
    if isinstance(x, (Moments, data.Roots)):
        raise TypeError("x must be rows (N, D): moments do not tell the factors of single rows")
    return x
