"""One linear-Gaussian latent a row: factors z ~ N(0, I_Q), and x = mean + loadings z + noise, noise ~ N(0, diag).

Woodbury's identity all through: of D columns and Q factors nothing of size D x D is made.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ... import numerics
from ...record import record
from .. import lanewise
from . import normals


@record
class Factors:
    """The posterior of the factors of complete rows: z | x ~ N(projection (x - mean), covariance).

    projection: (..., Q, D), covariance loadingsᵀ noise⁻¹.
    covariance: (..., Q, Q), (I + loadingsᵀ noise⁻¹ loadings)⁻¹, the same for all rows.
    half_logdet: (...), log det(loadings loadingsᵀ + noise) / 2.
    """

    projection: jax.Array
    covariance: jax.Array
    half_logdet: jax.Array


def factors(loadings: jax.Array, noise: jax.Array) -> Factors:
    """From loadings (..., D, Q) and noise variances (..., D)."""
    scale = jnp.sqrt(noise)
    whitened = loadings / scale[..., None]
    eye = jnp.eye(loadings.shape[-1], dtype=loadings.dtype)
    gram = numerics.product(whitened, whitened, "...dq,...dr->...qr")
    # Pivots are at least 1 but for rounding, which is large where one factor is far above the noise and another is not.
    factor, _ = numerics.floored_cholesky(gram + numerics.to_rank(eye, gram.ndim), jnp.ones_like(gram[..., 0]))
    inverse = numerics.inverse_lower(factor)
    covariance = numerics.product(inverse, inverse, "...kq,...kr->...qr")
    projection = numerics.product(covariance, whitened / scale[..., None], "...qr,...dr->...qd")
    logs = jnp.log(jnp.diagonal(factor, axis1=-2, axis2=-1))
    return Factors(
        projection=projection,
        covariance=covariance,
        half_logdet=jnp.sum(jnp.log(scale), axis=-1) + jnp.sum(logs, axis=-1),
    )


def square(loadings: jax.Array, noise: jax.Array, means: jax.Array, deviations: jax.Array) -> jax.Array:
    """(x - mean)ᵀ (loadings loadingsᵀ + noise)⁻¹ (x - mean) of rows (..., D, N) with posterior means (..., Q, N).

    As |noise^(-1/2) (x - mean - loadings m)|² + |m|², a sum of squares: a difference would cancel
    where loadings are far above the noise.
    """
    left = deviations - numerics.product(loadings, means, "...dq,...qn->...dn")
    return jnp.sum(jnp.square(left) / noise[..., None], axis=-2) + jnp.sum(jnp.square(means), axis=-2)


@record
class Cases:
    """Rows about the mean, or vectors with the second moments of rows: N of them, equally many a unit of the data.

    deviations: (D, N), x - mean, 0 where an entry is missing.
    observed: (D, N), which entries are not missing; None where none is missing.
    ones: (N,), 1 for a row, 0 for a row without any entry, or for a vector that adds to second moments alone; None
        where all are 1.
    counts: (N,), how many of its kind a case stands for; None where each stands for itself.
    """

    deviations: jax.Array
    observed: jax.Array | None = None
    ones: jax.Array | None = None
    counts: jax.Array | None = None

    def weights(self, weights: jax.Array | None) -> jax.Array:
        """Weights (N,) of the cases from those of the units."""
        cases, dtype = self.deviations.shape[1], self.deviations.dtype
        each = jnp.ones(cases, dtype) if self.counts is None else self.counts
        return each if weights is None else each * jnp.repeat(weights.astype(dtype), cases // len(weights))

    def feature(self) -> jax.Array:
        """What multiplies the mean: (N,)."""
        return jnp.ones_like(self.deviations[0]) if self.ones is None else self.ones

    def there(self) -> jax.Array | None:
        """1 where an entry is observed, 0 where it is missing: (D, N); None where none is missing."""
        return None if self.observed is None else self.observed.astype(self.deviations.dtype)


@record
class FactorPosterior:
    """A normal distribution of the factors of every case.

    means: (Q, N).
    covariance: (Q, Q, N), or (Q, Q, 1) where all rows have the same.
    evidence: (units,), log p(x) at the parameters that it was inferred with.
    half_logdet: (N,) or (1,), log det covariance / 2.
    hidden: (N,), entropy of missing entries given the factors, at the same parameters; None where there are none.
    cases: what it was inferred from.
    """

    means: jax.Array
    covariance: jax.Array
    evidence: jax.Array
    half_logdet: jax.Array
    hidden: jax.Array | None
    cases: Cases

    def entropy(self, weights: jax.Array | None = None) -> jax.Array:
        """Entropy in nats of factors and missing entries, summed over units x weights."""
        each = 0.5 * len(self.means) * (1 + math.log(2 * math.pi)) + self.half_logdet
        each = self.cases.feature() * each + (0 if self.hidden is None else self.hidden)
        return jnp.sum(self.cases.weights(weights) * each)

    def kl(self, q: "FactorPosterior", weights: jax.Array | None = None) -> jax.Array:
        """KL(q ‖ this) in nats, summed over units x weights; missing entries follow from the factors."""
        precision, _ = lanewise.inverse(self.covariance)
        apart = q.means - self.means
        square = jnp.sum(apart * lanewise.times(precision, apart), axis=0)
        spread = jnp.sum(precision * q.covariance, axis=(0, 1)) - len(apart)
        each = square + self.cases.feature() * (spread + 2 * (self.half_logdet - q.half_logdet))
        return 0.5 * jnp.sum(self.cases.weights(weights) * each)

    def given(self, q: Any) -> "FactorPosterior":
        """A distribution of the same factors that a user gave: `StateMoments` of rows, or a posterior of the model.

        Raises TypeError or ValueError for what is none.
        """
        if not isinstance(q, FactorPosterior):
            means, covariance = normals.written(q, self.means)
            half_logdet = lanewise.inverse(covariance)[1]
            return dataclasses.replace(self, means=means, covariance=covariance, half_logdet=half_logdet)
        if q.means.shape != self.means.shape:
            raise ValueError(f"q must be of {self.means.shape[1]} rows, as x is; got one of {q.means.shape[1]}")
        return dataclasses.replace(q, evidence=self.evidence, hidden=self.hidden, cases=self.cases)


def infer(loadings: jax.Array, noise: jax.Array, cases: Cases, units: int) -> FactorPosterior:
    """The posterior of the factors given loadings (D, Q) and noise variances (D,), and the evidence of `units` units.

    A complete row costs D Q multiplications, all in matrix products. A row with missing entries has a covariance of its
    own: D Q² in matrix products, and Q³ for its inversion, with rows as lanes.
    """
    there = cases.there()
    scaled = loadings / noise[:, None]
    if there is None:
        of = factors(loadings, noise)
        means = numerics.product(of.projection, cases.deviations, "qd,dn->qn")
        covariance, half_logdet = of.covariance[..., None], of.half_logdet[None]
        size, hidden = 0.5 * len(noise) * math.log(2 * math.pi) + half_logdet, None
        half_logdet = 0.5 * jnp.sum(jnp.log(noise)) - half_logdet
        noise_square = square(loadings, noise, means, cases.deviations)
    else:
        i, j = np.tril_indices(loadings.shape[1])
        precision = numerics.product(scaled[:, i] * loadings[:, j], there, "dp,dn->pn")[_entries(i, j)]
        eye = jnp.eye(loadings.shape[1], dtype=loadings.dtype)
        covariance, half_logdet = lanewise.inverse(precision + eye[..., None])
        means = lanewise.times(covariance, numerics.product(scaled, cases.deviations, "dq,dn->qn"))
        logs = 0.5 * (math.log(2 * math.pi) + jnp.log(noise))
        size, half_logdet = numerics.product(logs, there, "d,dn->n") + half_logdet, -half_logdet
        hidden = cases.feature() * numerics.product(0.5 + logs, 1 - there, "d,dn->n")
        left = cases.deviations - there * numerics.product(loadings, means, "dq,qn->dn")
        noise_square = jnp.sum(jnp.square(left) / noise[:, None], axis=0) + jnp.sum(jnp.square(means), axis=0)
    each = -cases.feature() * size - 0.5 * noise_square
    each = each if cases.counts is None else cases.counts * each
    return FactorPosterior(
        means=means,
        covariance=covariance,
        evidence=jnp.sum(each.reshape(units, -1), axis=1),
        half_logdet=half_logdet,
        hidden=hidden,
        cases=cases,
    )


@record
class Sums:
    """Expected sums over rows of features f = (factors, 1) and noise e = x - mean - loadings · factors.

    gram: (Q + 1, Q + 1), of ffᵀ; its last entry counts the rows.
    cross: (Q + 1, D), of f eᵀ.
    square: (D,), of e².
    """

    gram: jax.Array
    cross: jax.Array
    square: jax.Array


def sums(
    loadings: jax.Array, noise: jax.Array, cases: Cases, posterior: FactorPosterior, weights: jax.Array | None
) -> Sums:
    """The sums under any posterior of the factors, with missing entries from p(missing | factors)."""
    there, each, one, latents = cases.there(), cases.weights(weights), cases.feature(), loadings.shape[1]
    left = cases.deviations - _masked(there, numerics.product(loadings, posterior.means, "dq,qn->dn"))
    features = jnp.concatenate([posterior.means, one[None]])
    weighted, rows = each[None] * features, each * one
    covariance = posterior.covariance
    if covariance.shape[-1] == 1:
        spread = jnp.sum(rows) * covariance
        by_column = spread
    else:
        i, j = np.tril_indices(latents)
        packed = rows[None] * covariance[i, j]
        spread = jnp.sum(packed, axis=1, keepdims=True)[_entries(i, j)]
        by_column = spread if there is None else numerics.product(packed, there, "pn,dn->pd")[_entries(i, j)]
    carried = lanewise.times(by_column, loadings.T)
    square = numerics.product(jnp.square(left), each, "dn,n->d") + jnp.sum(loadings.T * carried, axis=0)
    if there is not None:
        square = square + noise * numerics.product(1 - there, rows, "dn,n->d")
    gram = numerics.product(weighted, features, "fn,gn->fg")
    return Sums(
        gram=gram.at[:latents, :latents].add(spread[..., 0]),
        cross=numerics.product(weighted, left, "fn,dn->fd").at[:latents].add(-carried),
        square=square,
    )


def _entries(i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Where the entries of symmetric matrices stand among those of their lower triangles."""
    where = np.zeros((i[-1] + 1,) * 2, int)
    where[i, j] = where[j, i] = np.arange(len(i))
    return where


def _masked(there: jax.Array | None, values: jax.Array) -> jax.Array:
    return values if there is None else there * values
