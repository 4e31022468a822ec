"""The random effects of groups given their rows, and the statistics of a linear mixed model, groups last.

Letters: G groups; P features; Q features with random effects.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from .. import numerics
from ..families import columns
from ..families.linear_equation import EquationStats
from ..latents import lanewise
from ..latents.linear_gaussian import normals
from ..record import record
from .mixed_data import GroupProducts


@record
class LinearMixedModelParams:
    """coefficients (P,); random_covariance (Q, Q), of the random effects; variance (), of the noise."""

    coefficients: jax.Array
    random_covariance: jax.Array
    variance: jax.Array


@record
class LinearMixedModelStats:
    """Expected statistics; all add.

    equation: normal equations of the response on the features (X, z ⊗ b); coefficients of z ⊗ b are vec(I).
    groups: (), the weight of the groups.
    effects: (Q, Q), sum E bbᵀ.
    random: (Q, Q), groups times the current covariance of effects.
    designs: (Q, Q), sum ZᵀZ.
    noise: (), rows times the current variance.
    loglik: (), log-likelihood, restricted for "REML".
    """

    equation: EquationStats
    groups: jax.Array
    effects: jax.Array
    random: jax.Array
    designs: jax.Array
    noise: jax.Array
    loglik: jax.Array


@record
class EffectsPosterior:
    """The posterior of the random effects b of G groups.

    coefficients: (P,), at which the means hold: those of params, or their posterior mean if they are integrated out.
    means: (Q, G).
    covariances: (Q, Q, G).
    evidence: (G,), log p(y_i).
    uncertainty: (P, P), the posterior covariance of the coefficients, where these are integrated out; else None.
    lean: (Q, P, G), minus the derivative of E b in the coefficients; likewise.
    lost: (), what integrating coefficients out adds to the summed evidence; likewise.
    """

    coefficients: jax.Array
    means: jax.Array
    covariances: jax.Array
    evidence: jax.Array
    uncertainty: jax.Array | None = None
    lean: jax.Array | None = None
    lost: jax.Array | None = None

    def entropy(self, weights: jax.Array | None = None) -> jax.Array:
        """Entropy in nats, summed over groups x weights (G,)."""
        return numerics.weighted_sum(normals.entropy(self.covariances), weights)

    def kl(self, q: "EffectsPosterior", weights: jax.Array | None = None) -> jax.Array:
        """KL(q ‖ this) in nats, summed over groups x weights (G,)."""
        return numerics.weighted_sum(normals.kl(q.means - self.means, q.covariances, self.covariances), weights)

    def given(self, q: Any) -> "EffectsPosterior":
        """A distribution of the same effects that a user gave: `StateMoments` of groups, or a posterior of the model.

        Raises TypeError or ValueError for anything else, and TypeError where coefficients are integrated out: they are
        then latent too, together with the effects of all groups.
        """
        if self.uncertainty is not None:
            raise TypeError('a distribution of the effects alone is one of LinearMixedModel("ML"), not of "REML"')
        own = isinstance(q, EffectsPosterior)
        means, covariances = (q.means, q.covariances) if own else normals.written(q, self.means)
        if means.shape != self.means.shape:
            raise ValueError(f"q must be of {self.means.shape[1]} groups, as x is; got one of {means.shape[1]}")
        return dataclasses.replace(self, means=means, covariances=covariances)


@record
class Residuals:
    """Products of the residuals r of a line, groups last.

    xr: (P, G), Xᵀr.
    zr: (Q, G), Zᵀr.
    rr: (G,), rᵀr.
    """

    xr: jax.Array
    zr: jax.Array
    rr: jax.Array


def split(line: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Coefficients of X (P,), and of z ⊗ b (Q²,), from a line (1, P + Q²)."""
    return line[0, : -(size**2)], line[0, -(size**2) :]


def residuals(coefficients: jax.Array, x: GroupProducts) -> Residuals:
    """Products of the residuals of these coefficients (P,), from products with groups last."""
    away = coefficients[:, None] - x.line
    moved = x.xr - lanewise.times(x.xx, away)
    return Residuals(
        xr=moved,
        zr=x.zr - lanewise.times(x.zx, away),
        rr=x.rr - jnp.sum(away * (x.xr + moved), axis=0),
    )


def effects_of(params: LinearMixedModelParams, x: GroupProducts) -> EffectsPosterior:
    """The posterior of the effects b = L u of every group, groups last: u ~ N(0, I) serves a singular LLᵀ too."""
    covariance, variance = params.random_covariance, params.variance
    lowest = jnp.finfo(covariance.dtype).eps ** 2 * jnp.diagonal(covariance) + jnp.finfo(covariance.dtype).tiny
    root = numerics.floored_cholesky(covariance, lowest)[0][:, :, None]
    left = residuals(params.coefficients, x)
    along = lanewise.times(lanewise.transposed(root), left.zr) / variance
    inside = lanewise.matmul(lanewise.transposed(root), lanewise.matmul(x.zz, root)) / variance
    eye = jnp.eye(len(covariance), dtype=inside.dtype)[:, :, None]
    inverse, half_logdet = lanewise.inverse(eye + inside)
    means = lanewise.times(inverse, along)
    size = x.count * jnp.log(2 * math.pi * variance)
    return EffectsPosterior(
        coefficients=params.coefficients,
        means=lanewise.times(root, means),
        covariances=lanewise.matmul(lanewise.matmul(root, inverse), lanewise.transposed(root)),
        evidence=-0.5 * (size + left.rr / variance - jnp.sum(along * means, axis=0)) - half_logdet,
    )


def normal_gram(x: GroupProducts, b: jax.Array, second: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Expected gram of the features (X, z ⊗ b), (P + Q², P + Q²), from E b (Q, G) and second, E bbᵀ (Q, Q, G)."""
    zx, zz = x.zx, x.zz
    if weights is not None:
        zx, zz = (jnp.where(weights[None, None] > 0, weights[None, None] * part, 0) for part in (zx, zz))
    squared = second.shape[0] ** 2
    corner = numerics.product(zx, b, "kpg,lg->pkl").reshape(-1, squared)
    below = numerics.product(zz, second, "kmg,lng->klmn").reshape(squared, squared)
    return jnp.block([[numerics.weighted_sum(x.xx, weights), corner], [corner.T, below]])


@jax.jit
def expected(
    params: LinearMixedModelParams,
    x: GroupProducts,
    posterior: EffectsPosterior,
    weights: jax.Array | None,
) -> LinearMixedModelStats:
    """Statistics under a posterior of the effects, with a vanishing pseudo-row; loglik is the sum of its evidence."""
    x, b, spread = x.lanes(), posterior.means, posterior.covariances
    if weights is not None:
        weights = weights.astype(b.dtype)
    left, pseudo, effects = residuals(posterior.coefficients, x), columns.PSEUDO_COUNT, len(b)
    free = left.zr - lanewise.times(x.zz, b)
    square = left.rr - jnp.sum(b * (left.zr + free), axis=0)
    noise_along = -lanewise.matmul(x.zz, spread)
    square = square - jnp.trace(noise_along)
    if posterior.lean is not None and posterior.uncertainty is not None:
        lean, around = posterior.lean, posterior.uncertainty[:, :, None]
        wide = lanewise.matmul(lean, around)
        apart = x.zx - lanewise.matmul(x.zz, lean)
        spread = spread + lanewise.matmul(wide, lanewise.transposed(lean))
        noise_along = noise_along + lanewise.matmul(apart, lanewise.transposed(wide))
        rest = x.xx - lanewise.cross(lean, x.zx) - lanewise.cross(apart, lean)
        square = square + jnp.sum(around * rest, axis=(0, 1))
    second = spread + b[:, None] * b[None]
    along = (free[:, None] * b[None] + noise_along).reshape(effects * effects, -1)
    cross = jnp.concatenate([left.xr - lanewise.times(lanewise.transposed(x.zx), b), along])
    count, groups = (
        numerics.weighted_sum(x.count, weights) + pseudo,
        numerics.weighted_sum(jnp.ones_like(x.count), weights) + pseudo,
    )
    line = jnp.concatenate([posterior.coefficients, jnp.eye(effects, dtype=b.dtype).ravel()])
    gram = normal_gram(x, b, second, weights)
    loglik = numerics.weighted_sum(posterior.evidence, weights)
    return LinearMixedModelStats(
        equation=EquationStats(
            count=count,
            reference=count * line[None],
            gram=gram + pseudo * jnp.eye(len(gram), dtype=gram.dtype),
            cross=numerics.weighted_sum(cross, weights)[:, None],
            square=numerics.weighted_sum(square, weights) + pseudo * params.variance,
        ),
        groups=groups,
        effects=numerics.weighted_sum(second, weights) + pseudo * params.random_covariance,
        random=groups * params.random_covariance,
        designs=numerics.weighted_sum(x.zz, weights),
        noise=count * params.variance,
        loglik=loglik if posterior.lost is None else loglik + posterior.lost,
    )
