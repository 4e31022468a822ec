"""Bayesian logistic regression: the weights' precision by maximising a bound of the evidence.

Letters: Z (N, P) features, y (N,) responses, w (P,) weights, A = diag(weight_precision), xi (N,) the linear
predictors at which the bound of each row touches its log-likelihood.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from .. import checks, numerics, parameters, tree
from ..capabilities import complete
from ..families import LogisticRegression, design
from ..latents import Exact
from ..latents.linear_gaussian.weights import WeightsPosterior, weights_given
from ..protocols import Data
from ..record import record, static
from ..slots import Expect

# Gauss-Hermite quadrature over the posterior of a linear predictor.
_NODES, _SHARES = np.polynomial.hermite_e.hermegauss(32)


@record
class BayesianLogisticParams:
    """The weights' posterior N(mean, covariance), and the precisions of their prior.

    mean: (P,).
    covariance: (P, P).
    weight_precision: (), or (P,) where each feature has its own (ARD).
    """

    mean: jax.Array
    covariance: jax.Array
    weight_precision: jax.Array


@record
class WholeRows:
    """All rows as one unit: features (1, N, P), response (1, N), and the weight of each row (1, N)."""

    features: jax.Array
    response: jax.Array
    weights: jax.Array


@record
class BayesianLogisticStats:
    """Moments of the weights' posterior under the bound.

    mean: (P,).
    covariance: (P, P).
    floor: (P,), the least E[w²] that rounding leaves distinct from 0.
    loglik: (), the bound of log p(y).
    """

    mean: jax.Array
    covariance: jax.Array
    floor: jax.Array
    loglik: jax.Array


@record(kw_only=False)
class BayesianLogisticRegression:
    """p(y = 1) = 1 / (1 + exp(-Z w)), w ~ N(0, A⁻¹): A maximises a lower bound of the evidence.

    ard: whether every feature has a precision of its own.

    The log-likelihood of every row is bounded by a quadratic that touches it at ±xi, which makes the posterior of the
    weights normal; an E-step takes xi² = E[(z · w)²] from the posterior at hand, and an M-step 1/A = E[w²]. The
    objective is the bound, and no step lowers it. Data: pairs (features (N, P) or (N,), response (N,) of 0 and 1), one
    unit, without an intercept, as for `BayesianLinearRegression`. Row weights count rows.
    Source: Jaakkola & Jordan (2000), Bayesian parameter estimation via variational methods, Statistics and Computing
    10; Bishop, PRML, section 10.6.
    """

    ard: bool = static(default=False)

    supports: ClassVar[parameters.Supports] = {
        "covariance": parameters.covariances,
        "weight_precision": parameters.at_least_zero,
    }

    def init(self, key: jax.Array | None, x: Data, weights: jax.Array | None = None) -> BayesianLogisticParams:
        """A deterministic start: the prior under which a linear predictor has variance 1."""
        x, weights = checks.native((x, weights))
        self.check(x, weights)
        return self._init(self.reduced(x, weights)[0])

    @jax.jit
    def _init(self, x: WholeRows) -> BayesianLogisticParams:
        square = numerics.product(x.weights[0], jnp.square(x.features[0]), "n,np->p") / jnp.sum(x.weights)
        square = jnp.where(square > 0, square, 1)
        prior = len(square) * square
        prior = prior if self.ard else jnp.mean(prior)
        covariance = jnp.diag(1 / jnp.broadcast_to(prior, square.shape))
        return BayesianLogisticParams(mean=jnp.zeros_like(square), covariance=covariance, weight_precision=prior)

    def infer(self, params: BayesianLogisticParams, x: Data, expect: Expect = Exact()) -> WeightsPosterior:
        """The weights given all rows under the bound at the parameters' xi; its `evidence` is that bound, (1,)."""
        if not isinstance(expect, Exact) or expect.temperature is not None:
            raise TypeError(f"expect must be Exact() for Bayesian regression; got {expect!r}")
        x = self.units(x)
        features, response, weights = x.features[0], x.response[0], x.weights[0]
        prior = jnp.broadcast_to(params.weight_precision, params.mean.shape)
        second = params.covariance + params.mean[:, None] * params.mean[None]
        touching = jnp.sqrt(jnp.sum(numerics.product(features, second, "np,pq->nq") * features, axis=1))
        # The quadratic lower bound of the family's log-likelihood, which touches it at ±xi.
        curvature = LogisticRegression()._surrogate(touching, jnp.zeros_like(touching))[1]
        gram = numerics.product((weights * curvature)[:, None] * features, features, "np,nq->pq")
        cross = numerics.product(weights * (response - 0.5), features, "n,np->p")
        mean, covariance, half_logdet = weights_given(gram, cross, prior)
        base = -jnp.logaddexp(0, -touching) - 0.5 * touching + 0.5 * curvature * jnp.square(touching)
        bound = jnp.sum(weights * base) + 0.5 * (jnp.sum(cross * mean) + jnp.sum(jnp.log(prior))) - half_logdet
        return WeightsPosterior(mean=mean, covariance=covariance, evidence=bound[None])

    def statistics(
        self,
        params: BayesianLogisticParams,
        x: Data,
        posterior: WeightsPosterior,
        weights: jax.Array | None = None,
    ) -> BayesianLogisticStats:
        """The weights' moments under any posterior of them."""
        x = self.reduced(x, weights)[0]
        energy = numerics.product(x.weights[0], jnp.square(x.features[0]), "n,np->p")
        eps = jnp.finfo(energy.dtype).eps
        return BayesianLogisticStats(
            mean=posterior.mean,
            covariance=posterior.covariance,
            floor=eps**2 / jnp.where(energy > 0, energy, 1),
            loglik=posterior.evidence[0],
        )

    def e_step(
        self, params: BayesianLogisticParams, x: Data, weights: jax.Array | None = None, expect: Expect = Exact()
    ) -> BayesianLogisticStats:
        """The weights' moments, and the bound of log p(y); see `infer` and `statistics`."""
        parameters.shapes("params", self, params, x)
        x = self.reduced(x, weights)[0]
        return self.statistics(params, x, complete("expect", expect).posterior(self, params, x))

    def m_step(self, stats: BayesianLogisticStats) -> BayesianLogisticParams:
        """1 / weight_precision = E[w²], averaged over features without ARD; the posterior gives the next xi."""
        second = jnp.maximum(jnp.square(stats.mean) + jnp.diagonal(stats.covariance), stats.floor)
        precision = 1 / (second if self.ard else jnp.mean(second))
        return BayesianLogisticParams(mean=stats.mean, covariance=stats.covariance, weight_precision=precision)

    def unconstrain(self, params: BayesianLogisticParams) -> BayesianLogisticParams:
        """Precisions in logarithms, the covariance by log-Cholesky."""
        return dataclasses.replace(
            params,
            covariance=numerics.covariance_to_real(params.covariance),
            weight_precision=jnp.log(params.weight_precision),
        )

    def constrain(self, theta: BayesianLogisticParams) -> BayesianLogisticParams:
        """Inverse of `unconstrain`."""
        return dataclasses.replace(
            theta,
            covariance=numerics.real_to_covariance(theta.covariance, len(theta.mean)),
            weight_precision=jnp.exp(theta.weight_precision),
        )

    def predict(self, params: BayesianLogisticParams, features: jax.Array) -> jax.Array:
        """p(y = 1 | features), the weights integrated out: features (N, P) or (N,) -> (N,)."""
        rows = checks.columns("features", features).astype(params.mean.dtype)
        if rows.shape[1] != len(params.mean):
            raise ValueError(f"features must have {len(params.mean)} columns, as the weights are; got {rows.shape[1]}")
        width = jnp.sqrt(jnp.sum(numerics.product(rows, params.covariance, "np,pq->nq") * rows, axis=1))
        nodes, shares = jnp.asarray(_NODES, rows.dtype), jnp.asarray(_SHARES / _SHARES.sum(), rows.dtype)
        eta = numerics.product(rows, params.mean, "np,p->n")[:, None] + width[:, None] * nodes[None]
        return numerics.product(jax.nn.sigmoid(eta), shares, "nk,k->n")

    def log_prob(self, params: BayesianLogisticParams, x: Data) -> jax.Array:
        """The bound of log p(y), the whole data being one unit: (1,)."""
        self.check(x)
        parameters.check("params", self, params, x)
        return self.infer(params, x).evidence

    def num_parameters(self, params: BayesianLogisticParams) -> int:
        """The precisions, which are all that is estimated."""
        return tree.size(params.weight_precision)

    def sample_size(self, x: Data, weights: jax.Array | None = None) -> jax.Array:
        """The weight of the rows."""
        return jnp.sum(x.weights) if isinstance(x, WholeRows) else tree.total_weight(x, weights)

    def check(self, x: Data, weights: jax.Array | None = None) -> None:
        """Raise ValueError or TypeError for bad data, by name. Under jit only shapes are looked at."""
        if not isinstance(x, WholeRows):
            LogisticRegression().check(checks.present(x, weights))
            checks.row_weights(weights, tree.num_rows(x))

    def params_like(self, x: Data) -> BayesianLogisticParams:
        """The shapes that parameters have for such data."""
        features = x.features if isinstance(x, WholeRows) else checks.columns("x[0]", x[0])
        size, dtype = features.shape[-1], tree.float_dtype(x)
        return BayesianLogisticParams(
            mean=parameters.like((size,), dtype),
            covariance=parameters.like((size, size), dtype),
            weight_precision=parameters.like((size,) if self.ard else (), dtype),
        )

    def units(self, x: Data) -> WholeRows:
        """The data as one unit."""
        return self.reduced(x)[0]

    def reduced(self, x: Data, weights: jax.Array | None = None) -> tuple[WholeRows, None]:
        """The data as one unit, which holds the weights of its rows."""
        return (x if isinstance(x, WholeRows) else _whole(x, weights)), None

    def floats_per_row(self, params: BayesianLogisticParams, x: Data) -> int:
        """Temporaries of an E-step, in numbers a unit."""
        return 3 * tree.size(self.units(x).features)


def _whole(x: Data, weights: jax.Array | None) -> WholeRows:
    matrix, response = design.read(x)
    each = jnp.ones_like(response) if weights is None else weights.astype(response.dtype)
    present = each > 0
    return WholeRows(
        features=jnp.where(present[:, None], matrix[1:].T, 0)[None],
        response=jnp.where(present, response, 0)[None],
        weights=each[None],
    )
