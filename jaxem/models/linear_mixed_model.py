"""Linear mixed models: rows of groups, of which each has effects of its own, drawn from one distribution."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from .. import capabilities, checks, numerics, parameters, seeding, tree
from ..data import GroupedRows
from ..families.covariance import Spherical
from ..families.linear_equation import EquationParams, LinearEquation
from ..latents import Exact, lanewise
from ..latents.linear_gaussian import StateMoments
from ..protocols import Data
from ..record import record, static
from ..slots import Expect
from . import mixed_data as data
from . import mixed_effects
from .mixed_data import GroupProducts
from .mixed_effects import EffectsPosterior
from .mixed_effects import LinearMixedModelParams as LinearMixedModelParams
from .mixed_effects import LinearMixedModelStats as LinearMixedModelStats

METHODS = ("ML", "REML")

# A direction of the random effects has vanished once its variance is below _UNSEEN times the sampling variance of a
# group's effects, and an expanded M-step multiplies it by _SHRUNK at most.
_UNSEEN, _SHRUNK = 1e-3, 0.95


@capabilities.completed("model")
@record(kw_only=False)
class LinearMixedModel:
    """y = X coefficients + Z b + e in every group, b ~ N(0, random_covariance), e ~ N(0, variance).

    method: "ML", or "REML": the restricted likelihood, with the coefficients integrated out under a flat prior;
        params have their posterior mean. It is no sum over groups: statistics are those of all groups together.
        `log_prob`, and so `aic` and `bic`, have the unrestricted likelihood at the params; the objective compares
        models of the same features.

    Data: `group_rows((features, random_features, response), groups)`, features (N, P) and random features (N, Q); a
    column of ones among them is an intercept. Groups are the units, and weights count groups. Rows are read
    once: products of every group's columns are sufficient, and a step of "ML" costs G (P² + P Q² + Q⁴), however many
    rows there are. EM crawls where groups say little about their effects; its coefficients crawl where groups say much.
    Where no algorithm is named, M-steps are parameter-expanded (`Expanded`, effects of any scale), which mends the
    first, and `anderson` around them mends the second; coefficients that are integrated out never crawl. A singular
    random covariance is reached in some ten steps, and ends as DEGENERATE; `degenerate` tells whether it is that (its
    second entry), or a noise variance of 0 (its first).
    Source: Laird & Ware (1982), Random-effects models for longitudinal data, Biometrics 38; Liu, Rubin & Wu (1998),
    Parameter expansion to accelerate EM, Biometrika 85, section 5.
    Raises ValueError for another method.
    """

    method: str = static(default="ML")

    expands = True
    supports = {"random_covariance": parameters.covariances, "variance": parameters.at_least_zero}  # noqa: RUF012

    def __post_init__(self) -> None:
        checks.choice("method", self.method, METHODS)

    @property
    def crawls(self) -> bool:
        return self.method == "ML"

    @seeding.start()
    @jax.jit
    def init(self, key: jax.Array, x: Data, weights: jax.Array | None = None) -> LinearMixedModelParams:
        """Least squares; half of the residual variance to the noise, half to the effects in equal parts; no draws."""
        x, weights = tree.present(x, weights)
        sums = jax.tree.map(lambda leaf: numerics.weighted_sum(jnp.moveaxis(leaf, 0, -1), weights), x)
        line, move = x.line[0], numerics.least_squares(sums.xx, sums.xr)
        left = jnp.maximum(sums.rr - jnp.sum(move * sums.xr), jnp.finfo(line.dtype).eps ** 2 * sums.count)
        each = numerics.safe_divide(left, jnp.diagonal(sums.zz))
        half = jnp.where(each > 0, each, 1) / (2 * len(each))
        return LinearMixedModelParams(
            coefficients=line + move, random_covariance=jnp.diag(half), variance=0.5 * left / sums.count
        )

    def infer(self, params: LinearMixedModelParams, x: Data, expect: Expect = Exact()) -> EffectsPosterior:
        """The posterior of the random effects of every group; its `evidence` is log p(y_i), (G,)."""
        if not isinstance(expect, Exact) or expect.temperature is not None:
            raise TypeError(f"expect must be Exact() for a LinearMixedModel; got {expect!r}")
        parameters.shapes("params", self, params, x)
        return self._posterior(params, data.units(x), None)

    @jax.jit
    def _posterior(
        self, params: LinearMixedModelParams, x: GroupProducts, weights: jax.Array | None
    ) -> EffectsPosterior:
        """The posterior; the weights of groups enter where coefficients are integrated out."""
        x = x.lanes()
        found = mixed_effects.effects_of(params, x)
        if self.method == "ML":
            return found
        # Generalised least squares: gram = variance · sum XᵀV⁻¹X, and likewise cross.
        lean = lanewise.matmul(found.covariances, x.zx) / params.variance
        gram = numerics.weighted_sum(x.xx - lanewise.cross(lean, x.zx), weights)
        left = mixed_effects.residuals(params.coefficients, x)
        cross = numerics.weighted_sum(left.xr - lanewise.times(lanewise.transposed(x.zx), found.means), weights)
        at = params.coefficients + numerics.least_squares(gram, cross)
        scale = jax.lax.rsqrt(jnp.diagonal(gram))
        floor = jnp.full_like(scale, 16 * len(at) * jnp.finfo(scale.dtype).eps)
        factor, _ = numerics.floored_cholesky(gram * scale[:, None] * scale[None], floor)
        inverse = numerics.inverse_lower(factor) * scale[None]
        logdet = 2 * jnp.sum(jnp.log(jnp.diagonal(factor)) - jnp.log(scale)) - len(at) * jnp.log(params.variance)
        return dataclasses.replace(
            mixed_effects.effects_of(dataclasses.replace(params, coefficients=at), x),
            uncertainty=params.variance * numerics.product(inverse, inverse, "ki,kj->ij"),
            lean=lean,
            lost=0.5 * (len(at) * math.log(2 * math.pi) - logdet),
        )

    def statistics(
        self, params: LinearMixedModelParams, x: Data, posterior: EffectsPosterior, weights: jax.Array | None = None
    ) -> LinearMixedModelStats:
        """Normal equations under any posterior of the effects; loglik is the sum of its evidence.

        A vanishing pseudo-row keeps parameters about which the data say nothing.
        """
        return mixed_effects.expected(params, data.units(x), posterior, weights)

    def e_step(
        self, params: LinearMixedModelParams, x: Data, weights: jax.Array | None = None, expect: Expect = Exact()
    ) -> LinearMixedModelStats:
        """Expected statistics, and sum_i w_i log p(y_i), or the restricted likelihood; see `infer` and `statistics`."""
        x = checks.present(data.units(x), weights)
        posterior = capabilities.complete("expect", expect).posterior(self, params, x)
        if self.method == "REML" and weights is not None:
            posterior = self._posterior(params, x, weights)
        return self.statistics(params, x, posterior, weights)

    @jax.jit
    def m_step(self, stats: LinearMixedModelStats) -> LinearMixedModelParams:
        """Least squares, and the expected mean squares of residuals and of effects."""
        return self._params(stats, self._equation(stats), stats.effects / stats.groups)

    def expanded(
        self, params: LinearMixedModelParams, stats: LinearMixedModelStats, held: tuple[str, ...] = ()
    ) -> LinearMixedModelParams:
        """The M-step with effects A b, A (Q, Q) free, which their covariance then absorbs, unless something is held."""
        return params if held else self._expanded(stats)

    def _expanded(self, stats: LinearMixedModelStats) -> LinearMixedModelParams:
        equation, size = self._equation(stats, free=True), len(stats.effects)
        turn = mixed_effects.split(equation.line, size)[1].reshape(size, size)
        scaled = numerics.product(turn, stats.effects / stats.groups, "ij,jk->ik")
        return self._params(stats, equation, numerics.product(scaled, turn, "ik,jk->ij"))

    def q_function(self, params: LinearMixedModelParams, stats: LinearMixedModelStats) -> jax.Array:
        """Expected log-density of responses and effects."""
        size, dtype = len(stats.effects), params.coefficients.dtype
        at = params.coefficients if self.method == "ML" else mixed_effects.split(stats.equation.line, size)[0]
        equation = EquationParams(
            coefficients=(at[None], jnp.eye(size, dtype=dtype).reshape(1, -1)), covariance=params.variance
        )
        factor = numerics.cholesky(params.random_covariance)
        inverse = numerics.inverse_lower(factor)
        whitened = numerics.product(numerics.product(inverse, stats.effects, "ij,jk->ik"), inverse, "ik,ik->")
        logdet = size * math.log(2 * math.pi) + 2 * jnp.sum(jnp.log(jnp.diagonal(factor)))
        return self._of(stats).q_function(equation, stats.equation) - 0.5 * (whitened + stats.groups * logdet)

    def log_prior(self, params: LinearMixedModelParams) -> jax.Array:
        """0: there is no prior."""
        return jnp.zeros((), params.variance.dtype)

    def rebase(self, stats: LinearMixedModelStats, params: LinearMixedModelParams) -> LinearMixedModelStats:
        """The same statistics about the coefficients of `params`, exactly; those of "REML" as they are."""
        if self.method == "REML":
            return stats
        eye = jnp.eye(len(stats.effects), dtype=params.coefficients.dtype).reshape(1, -1)
        at = EquationParams(coefficients=(params.coefficients[None], eye), covariance=params.variance)
        return dataclasses.replace(stats, equation=self._of(stats).rebase(stats.equation, at))

    def degenerate(self, stats: LinearMixedModelStats) -> jax.Array:
        """(2,): whether the noise vanished, and whether a direction of the random effects did."""
        collapsed = self._of(stats).degenerate(stats.equation, self._held(stats, free=False))
        scale = jnp.sqrt(jnp.diagonal(stats.designs) / stats.groups / (stats.noise / stats.equation.count))

        def least(covariance: jax.Array) -> jax.Array:
            """The least pivot of the covariance, in units of the sampling variances of effects."""
            whole = covariance * scale[:, None] * scale[None]
            floor = jnp.full_like(scale, jnp.finfo(scale.dtype).tiny)
            return jnp.min(jnp.square(jnp.diagonal(numerics.floored_cholesky(whole, floor)[0])))

        now, after = least(stats.random / stats.groups), least(self._expanded(stats).random_covariance)
        gone = now <= jnp.finfo(scale.dtype).eps
        return jnp.stack([collapsed, gone | ((now < _UNSEEN) & (after <= _SHRUNK * now))])

    def unconstrain(self, params: LinearMixedModelParams) -> LinearMixedModelParams:
        """Coefficients as they are, the covariance in log-Cholesky coordinates, the variance in logarithms."""
        return dataclasses.replace(
            params,
            random_covariance=numerics.covariance_to_real(params.random_covariance),
            variance=jnp.log(params.variance),
        )

    def constrain(self, theta: LinearMixedModelParams) -> LinearMixedModelParams:
        """Inverse of `unconstrain`."""
        size = math.isqrt(2 * theta.random_covariance.shape[-1])
        return dataclasses.replace(
            theta,
            random_covariance=numerics.real_to_covariance(theta.random_covariance, size),
            variance=jnp.exp(theta.variance),
        )

    @parameters.at_rows
    @jax.jit
    def log_prob(self, params: LinearMixedModelParams, x: Data) -> jax.Array:
        """log p(y_i) of every group: (G,)."""
        return mixed_effects.effects_of(tree.no_whole_numbers(params, x), data.units(x).lanes()).evidence

    @parameters.at_rows
    @jax.jit
    def posterior(self, params: LinearMixedModelParams, x: Data) -> StateMoments:
        """The random effects of every group given its rows: means (G, Q), the best linear predictions, and covariances
        (G, Q, Q)."""
        found = mixed_effects.effects_of(tree.no_whole_numbers(params, x), data.units(x).lanes())
        return StateMoments(means=found.means.T, covariances=jnp.moveaxis(found.covariances, -1, 0))

    @parameters.at_rows
    def predict(self, params: LinearMixedModelParams, x: GroupedRows) -> jax.Array:
        """The expected response (N,) of every row, with the posterior means of its group's effects."""
        features, random, _ = data.columns(_rows(x))
        effects = self.posterior(params, x).means[x.numbers()]
        return numerics.product(features, params.coefficients, "np,p->n") + jnp.sum(random * effects, axis=1)

    @parameters.at_rows
    @jax.jit
    def standard_errors(self, params: LinearMixedModelParams, x: Data, weights: jax.Array | None = None) -> jax.Array:
        """Of the coefficients (P,), in closed form, the covariances known: roots of the diagonal of (Σ XᵀV⁻¹X)⁻¹."""
        restricted = dataclasses.replace(self, method="REML")
        found = restricted._posterior(tree.no_whole_numbers(params, x), data.units(x), weights)
        assert found.uncertainty is not None
        return jnp.sqrt(jnp.diagonal(found.uncertainty))

    def sample(self, key: jax.Array, params: LinearMixedModelParams, x: GroupedRows) -> jax.Array:
        """Responses (N,) of new groups with the features of these."""
        self.check(x)
        parameters.check("params", self, params, x)
        features, random, _ = data.columns(_rows(x))
        key_effects, key_noise = jax.random.split(checks.random_key(key))
        factor = numerics.cholesky(params.random_covariance)
        drawn = jax.random.normal(key_effects, (len(x.sizes), len(factor)), factor.dtype)
        effects = numerics.product(drawn, factor, "gj,ij->gi")[x.numbers()]
        noise = jnp.sqrt(params.variance) * jax.random.normal(key_noise, (len(features),), factor.dtype)
        return numerics.product(features, params.coefficients, "np,p->n") + jnp.sum(random * effects, axis=1) + noise

    def num_parameters(self, params: LinearMixedModelParams) -> int:
        """Free parameters."""
        return sum(self.degrees(params).values())

    def degrees(self, params: LinearMixedModelParams) -> dict[str, int]:
        """Free parameters by name."""
        size = len(params.random_covariance)
        return {"coefficients": len(params.coefficients), "random_covariance": size * (size + 1) // 2, "variance": 1}

    check = staticmethod(data.check)
    units = staticmethod(data.units)
    sample_size = staticmethod(data.num_rows)

    def params_like(self, x: Data) -> LinearMixedModelParams:
        """The shapes that parameters have for such data."""
        (_, p, q), dtype = data.shape(x), tree.float_dtype(x)
        shapes = ((p,), (q, q), ())
        coefficients, random, variance = (parameters.like(shape, dtype) for shape in shapes)
        return LinearMixedModelParams(coefficients=coefficients, random_covariance=random, variance=variance)

    def _of(self, stats: LinearMixedModelStats) -> LinearEquation:
        """The equation of the response on X and z ⊗ b."""
        return LinearEquation(noise=Spherical(), widths=(None, stats.effects.size))

    def _held(self, stats: LinearMixedModelStats, free: bool) -> tuple[jax.Array | None, jax.Array | None]:
        """Coefficients that an M-step holds: of X for "REML", as they are no parameters; of z ⊗ b, unless `free`."""
        at, eye = mixed_effects.split(stats.equation.line, len(stats.effects))
        return (at[None] if self.method == "REML" else None), (None if free else eye[None])

    def _equation(self, stats: LinearMixedModelStats, free: bool = False) -> EquationParams:
        return self._of(stats).m_step(stats.equation, self._held(stats, free))

    def _params(
        self, stats: LinearMixedModelStats, equation: EquationParams, random: jax.Array
    ) -> LinearMixedModelParams:
        at = equation.coefficients[0]
        assert at is not None
        return LinearMixedModelParams(coefficients=at[0], random_covariance=random, variance=equation.covariance)


def _rows(x: Any) -> GroupedRows:
    """Rows of groups; TypeError for their products, which do not determine single rows."""
    if not isinstance(x, GroupedRows):
        raise TypeError(f"x must be group_rows((features, random_features, response), groups); got {checks.told(x)}")
    return x
