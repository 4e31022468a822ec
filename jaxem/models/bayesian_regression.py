"""Bayesian linear regression: the precisions of prior and noise by maximising the evidence.

Letters: Z (N, P) features, y (N,) response, w (P,) weights, A = diag(weight_precision), b = noise_precision.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from .. import checks, numerics, parameters, tree
from ..capabilities import complete
from ..families import design
from ..latents import Exact, lanewise
from ..latents.linear_gaussian.weights import Predictive, WeightsPosterior, weights_given
from ..protocols import Data
from ..record import record, static
from ..slots import Expect

METHODS = ("EM", "MacKay")


@record
class BayesianRegressionParams:
    """The precisions, and the weights' posterior N(mean, covariance) under them, which follows from the data.

    mean: (P,).
    covariance: (P, P).
    weight_precision: (), or (P,) where each feature has its own (ARD).
    noise_precision: ().
    """

    mean: jax.Array
    covariance: jax.Array
    weight_precision: jax.Array
    noise_precision: jax.Array


@record
class TriangularRows:
    """The triangular factor of the rows (Z, y), which has the same ZᵀZ, Zᵀy and yᵀy, as one unit.

    features: (1, P + 1, P).
    response: (1, P + 1).
    count: (1,), the weight of the rows.
    """

    features: jax.Array
    response: jax.Array
    count: jax.Array


@record
class BayesianRegressionStats:
    """Expected sufficient statistics, with what the weights' posterior is made of.

    count: (), N, the weight of the rows.
    gram, cross, energy: ZᵀZ (P, P), Zᵀy (P,), yᵀy ().
    squares, variances: (P,), mean² and the diagonal of covariance: E[w²] is their sum.
    residual, spread: (), |y - Z mean|² and tr(Z covariance Zᵀ): E|y - Z w|² is their sum.
    current: (P,), weight_precision at the E-step.
    loglik: (), log p(y).
    """

    count: jax.Array
    gram: jax.Array
    cross: jax.Array
    energy: jax.Array
    squares: jax.Array
    variances: jax.Array
    residual: jax.Array
    spread: jax.Array
    current: jax.Array
    loglik: jax.Array


@record(kw_only=False)
class BayesianLinearRegression:
    """y ~ N(Z w, 1/b), w ~ N(0, A⁻¹): A and b maximise the evidence log p(y), with w integrated out.

    ard: whether every feature has a precision of its own (automatic relevance determination): those of irrelevant
        features grow without bound, and their weights vanish.
    method: "EM", which never lowers the evidence; or MacKay's fixed point, which takes fewer steps where features are
        many, and may overshoot: a fit then ends as DECREASED.

    Data: pairs (features (N, P) or (N,), response (N,)); there is no intercept: centre the response, or add a column of
    ones, which is then shrunk as the others are. The weights are one latent of the whole data, which is one unit: the
    log-likelihood is no sum over rows, a fit reduces the rows to P + 1 of them once, and `tol` is for all rows at once.
    Row weights count rows. A noise that vanishes, as where features are as many as rows, is DEGENERATE.
    Source: Bishop, PRML, sections 3.5, 9.3.4 and 7.2; MacKay (1992), Bayesian interpolation, Neural Computation 4.
    """

    ard: bool = static(default=False)
    method: str = static(default="EM", kw_only=True)

    supports: ClassVar[parameters.Supports] = {
        "covariance": parameters.covariances,
        "weight_precision": parameters.at_least_zero,
        "noise_precision": parameters.at_least_zero,
    }

    def __post_init__(self) -> None:
        checks.choice("method", self.method, METHODS)

    def init(self, key: jax.Array | None, x: Data, weights: jax.Array | None = None) -> BayesianRegressionParams:
        """A deterministic start: noise and weights explain half of yᵀy each."""
        x, weights = checks.native((x, weights))
        self.check(x, weights)
        return self._init(self.reduced(x, weights)[0])

    @jax.jit
    def _init(self, x: TriangularRows) -> BayesianRegressionParams:
        features, response = x.features[0], x.response[0]
        energy, scale = jnp.sum(jnp.square(response)), jnp.sum(jnp.square(features), axis=0)
        energy = jnp.where(energy > 0, energy, 1)
        prior = 2 * len(scale) * scale / energy
        return self._params(x, prior if self.ard else jnp.mean(prior), 2 * x.count[0] / energy)

    def infer(self, params: BayesianRegressionParams, x: Data, expect: Expect = Exact()) -> WeightsPosterior:
        """The weights given all rows; its `evidence` is log p(y), (1,)."""
        if not isinstance(expect, Exact) or expect.temperature is not None:
            raise TypeError(f"expect must be Exact() for Bayesian regression; got {expect!r}")
        x = self.units(x)
        features, response = x.features[0], x.response[0]
        prior, noise = self._prior(params, features), params.noise_precision
        gram = numerics.product(features, features, "np,nq->pq")
        cross = numerics.product(features, response, "np,n->p")
        mean, covariance, half_logdet = weights_given(noise * gram, noise * cross, prior)
        left = response - numerics.product(features, mean, "np,p->n")
        # A step of iterative refinement, since the normal equations square the condition number.
        slope = noise * numerics.product(features, left, "np,n->p") - prior * mean
        mean = mean + numerics.product(covariance, slope, "pq,q->p")
        left = response - numerics.product(features, mean, "np,p->n")
        logs = jnp.sum(jnp.log(prior)) + x.count[0] * jnp.log(noise / (2 * math.pi))
        squares = noise * jnp.sum(jnp.square(left)) + jnp.sum(prior * jnp.square(mean))
        return WeightsPosterior(mean=mean, covariance=covariance, evidence=(0.5 * (logs - squares) - half_logdet)[None])

    def statistics(
        self,
        params: BayesianRegressionParams,
        x: Data,
        posterior: WeightsPosterior,
        weights: jax.Array | None = None,
    ) -> BayesianRegressionStats:
        """Statistics expected under any posterior of the weights."""
        x = self.reduced(x, weights)[0]
        features, response = x.features[0], x.response[0]
        left = response - numerics.product(features, posterior.mean, "np,p->n")
        gram = numerics.product(features, features, "np,nq->pq")
        return BayesianRegressionStats(
            count=x.count[0],
            gram=gram,
            cross=numerics.product(features, response, "np,n->p"),
            energy=jnp.sum(jnp.square(response)),
            squares=jnp.square(posterior.mean),
            variances=jnp.diagonal(posterior.covariance),
            residual=jnp.sum(jnp.square(left)),
            spread=jnp.sum(gram * posterior.covariance),
            current=self._prior(params, features),
            loglik=posterior.evidence[0],
        )

    def e_step(
        self,
        params: BayesianRegressionParams,
        x: Data,
        weights: jax.Array | None = None,
        expect: Expect = Exact(),
    ) -> BayesianRegressionStats:
        """The weights' moments, and log p(y); see `infer` and `statistics`."""
        parameters.shapes("params", self, params, x)
        x = self.reduced(x, weights)[0]
        return self.statistics(params, x, complete("expect", expect).posterior(self, params, x))

    def m_step(self, stats: BayesianRegressionStats) -> BayesianRegressionParams:
        """1 / weight_precision = E[w²], averaged without ARD, and 1 / noise_precision = E|y - Z w|² / N; by MacKay's
        rule mean² / g and |y - Z mean|² / (N - sum g), g = 1 - A variance the well-determined share of a weight."""
        count, squares, left = stats.count, stats.squares + stats.variances, stats.residual + stats.spread
        ones = jnp.ones_like(squares)
        if self.method == "MacKay":
            ones = jnp.clip(1 - stats.current * stats.variances, jnp.finfo(squares.dtype).eps, 1)
            squares, left, count = stats.squares, stats.residual, count - jnp.sum(ones)
        eps = jnp.finfo(squares.dtype).eps
        lowest = eps**2 * stats.energy / jnp.where(jnp.diagonal(stats.gram) > 0, jnp.diagonal(stats.gram), 1)
        if not self.ard:
            squares, ones, lowest = jnp.sum(squares), jnp.sum(ones), jnp.sum(lowest)
        lowest = jnp.where(lowest > 0, lowest, eps**2)
        variance = jnp.maximum(left / jnp.maximum(count, 1e-3), _floor(stats))
        prior, noise = ones / jnp.maximum(squares, lowest), 1 / variance
        every = jnp.broadcast_to(prior, stats.cross.shape)
        mean, covariance, _ = weights_given(noise * stats.gram, noise * stats.cross, every)
        return BayesianRegressionParams(mean=mean, covariance=covariance, weight_precision=prior, noise_precision=noise)

    def q_function(self, params: BayesianRegressionParams, stats: BayesianRegressionStats) -> jax.Array:
        """E[log p(y | w) + log p(w)]."""
        prior = jnp.broadcast_to(params.weight_precision, stats.squares.shape)
        of_weights = jnp.log(prior / (2 * math.pi)) - prior * (stats.squares + stats.variances)
        of_noise = stats.count * jnp.log(params.noise_precision / (2 * math.pi))
        return 0.5 * (jnp.sum(of_weights) + of_noise - params.noise_precision * (stats.residual + stats.spread))

    def log_prior(self, params: BayesianRegressionParams) -> jax.Array:
        """0: the precisions have no prior."""
        return jnp.zeros((), params.mean.dtype)

    def degenerate(self, stats: BayesianRegressionStats) -> jax.Array:
        """(1,): whether the noise has vanished."""
        return (stats.residual + stats.spread <= 4 * stats.count * _floor(stats))[None]

    def unconstrain(self, params: BayesianRegressionParams) -> BayesianRegressionParams:
        """Precisions in logarithms. The posterior stays as it is: the next M-step makes it anew."""
        return dataclasses.replace(
            params,
            weight_precision=jnp.log(params.weight_precision),
            noise_precision=jnp.log(params.noise_precision),
        )

    def constrain(self, theta: BayesianRegressionParams) -> BayesianRegressionParams:
        """Inverse of `unconstrain`."""
        return dataclasses.replace(
            theta,
            weight_precision=jnp.exp(theta.weight_precision),
            noise_precision=jnp.exp(theta.noise_precision),
        )

    def posterior(
        self, params: BayesianRegressionParams, x: Data, weights: jax.Array | None = None
    ) -> WeightsPosterior:
        """The weights given these rows, under the precisions of the parameters alone."""
        x, weights = checks.native((x, weights))
        self.check(x, weights)
        parameters.check("params", self, params, x)
        return self.infer(params, self.reduced(x, weights)[0])

    def predict(self, params: BayesianRegressionParams, features: jax.Array) -> Predictive:
        """The predictive distribution N(z · mean, 1/b + zᵀ covariance z) of responses to features (N, P) or (N,)."""
        rows = checks.columns("features", features).astype(params.mean.dtype)
        if rows.shape[1] != len(params.mean):
            raise ValueError(f"features must have {len(params.mean)} columns, as the weights are; got {rows.shape[1]}")
        spread = jnp.sum(numerics.product(rows, params.covariance, "np,pq->nq") * rows, axis=1)
        return Predictive(
            mean=numerics.product(rows, params.mean, "np,p->n"), variance=spread + 1 / params.noise_precision
        )

    def log_prob(self, params: BayesianRegressionParams, x: Data) -> jax.Array:
        """log p(y), the whole data being one unit: (1,)."""
        self.check(x)
        parameters.check("params", self, params, x)
        return self.infer(params, x).evidence

    def num_parameters(self, params: BayesianRegressionParams) -> int:
        """The precisions, which are all that is estimated."""
        return tree.size((params.weight_precision, params.noise_precision))

    def sample_size(self, x: Data, weights: jax.Array | None = None) -> jax.Array:
        """The weight of the rows."""
        return x.count[0] if isinstance(x, TriangularRows) else tree.total_weight(x, weights)

    def check(self, x: Data, weights: jax.Array | None = None) -> None:
        """Raise ValueError or TypeError for bad data, by name. Under jit only shapes are looked at."""
        if not isinstance(x, TriangularRows):
            design.check(checks.present(x, weights))
            checks.row_weights(weights, tree.num_rows(x))

    def params_like(self, x: Data) -> BayesianRegressionParams:
        """The shapes that parameters have for such data."""
        features = x.features if isinstance(x, TriangularRows) else checks.columns("x[0]", x[0])
        size, dtype = features.shape[-1], tree.float_dtype(x)
        shapes = ((size,), (size, size), (size,) if self.ard else (), ())
        return BayesianRegressionParams(
            **{
                field.name: parameters.like(shape, dtype)
                for field, shape in zip(dataclasses.fields(BayesianRegressionParams), shapes, strict=True)
            }
        )

    def units(self, x: Data) -> TriangularRows:
        """The data as one unit."""
        return self.reduced(x)[0]

    def reduced(self, x: Data, weights: jax.Array | None = None) -> tuple[TriangularRows, None]:
        """The data as one unit, of P + 1 rows with the same sums of products."""
        return (x if isinstance(x, TriangularRows) else _triangle(*x, weights)), None

    def floats_per_row(self, params: BayesianRegressionParams, x: Data) -> int:
        """Temporaries of an E-step, in numbers a unit."""
        return 6 * len(params.mean) ** 2

    def _prior(self, params: BayesianRegressionParams, features: jax.Array) -> jax.Array:
        return jnp.broadcast_to(params.weight_precision, features.shape[-1:])

    def _params(self, x: TriangularRows, prior: jax.Array, noise: jax.Array) -> BayesianRegressionParams:
        size, dtype = x.features.shape[-1], x.features.dtype
        some = BayesianRegressionParams(
            mean=jnp.zeros(size, dtype),
            covariance=jnp.zeros((size, size), dtype),
            weight_precision=prior,
            noise_precision=noise,
        )
        found = self.infer(some, x)
        return dataclasses.replace(some, mean=found.mean, covariance=found.covariance)


@jax.jit
def _triangle(features: jax.Array, response: jax.Array, weights: jax.Array | None) -> TriangularRows:
    """By modified Gram-Schmidt: a Cholesky factor of the normal equations would square the condition number."""
    matrix, response = design.read((features, response))
    rows = jnp.concatenate([matrix[1:], response[None]])
    count = jnp.asarray(rows.shape[1], rows.dtype)
    if weights is not None:
        weights = weights.astype(rows.dtype)
        rows = jnp.where(weights[None] > 0, rows, 0) * jnp.sqrt(weights)[None]
        count = jnp.sum(weights)
    root = lanewise.triangular(rows.T[:, :, None])[:, :, 0]
    return TriangularRows(features=root[None, :, :-1], response=root[None, :, -1], count=count[None])


def _floor(stats: BayesianRegressionStats) -> jax.Array:
    """The least variance of the noise: that of rounding errors of the response."""
    eps = jnp.finfo(stats.energy.dtype).eps
    return jnp.where(stats.energy > 0, eps**2 * stats.energy / stats.count, eps**2)
