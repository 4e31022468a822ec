"""An extra uniform component for outliers beside the components of any family."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import capabilities, checks, numerics, parameters
from ..protocols import Data, Family, Params, Stats
from ..record import record


@record
class BackgroundStats:
    """Statistics of the family and of the background.

    count: (K + 1,), sum r, the background's last.
    components: the family's statistics.
    """

    count: jax.Array
    components: Stats


@capabilities.completed("part")
@record(kw_only=False)
class Background:
    """The family's K components, and one more that is uniform over a region: log p(x|K) = -log volume.

    volume: of the region that outliers come from, in the data's units, as `bounding_volume(x)` takes it
    from the data. The background is the last component of a mixture's weights, posterior and labels
    (mclust's noise component). It cannot be sampled from: a volume does not say where it lies.
    Raises ValueError for a volume that is not positive.
    Banfield & Raftery (1993), Model-based Gaussian and non-Gaussian clustering, Biometrics 49.
    """

    family: Family
    volume: jax.Array | float

    extra_components = 1

    def __post_init__(self) -> None:
        given = self.volume
        if checks.is_known(given) and not (np.all(np.asarray(given) > 0) and np.all(np.isfinite(np.asarray(given)))):
            raise ValueError(f"volume must be above 0 and finite, as bounding_volume(x) gives it; got {given}")

    @property
    def _inside(self) -> Any:
        return capabilities.complete("part", self.family)

    @property
    def supports(self) -> parameters.Supports:
        return self._inside.supports

    @property
    def start_passes(self) -> int:
        return self._inside.start_passes

    def pooled(self, x: Data, weights: jax.Array | None, num_components: int) -> Params:
        return self._inside.pooled(x, weights, num_components)

    def features(self, x: Data) -> jax.Array:
        return self.family.features(x)

    def log_prob(self, params: Params, x: Data) -> jax.Array:
        """Log-density of every row under every component, the background's last: (K + 1, N)."""
        inside = self.family.log_prob(params, x)
        outside = -jnp.log(jnp.asarray(self.volume, inside.dtype))
        return jnp.concatenate([inside, jnp.broadcast_to(outside, inside[:1].shape)])

    def stats(self, params: Params, x: Data, responsibilities: jax.Array) -> BackgroundStats:
        """The family's statistics from its own responsibilities; of the background, only how many rows it has."""
        components = self.family.stats(params, x, responsibilities[:-1])
        outside = jnp.sum(responsibilities[-1:], axis=1)
        return BackgroundStats(count=jnp.concatenate([components.count, outside]), components=components)

    def m_step(self, stats: BackgroundStats) -> Params:
        """The family's own: the background has nothing to estimate but its weight."""
        return self.family.m_step(stats.components)

    @property
    def expands(self) -> bool:
        return self._inside.expands

    def expanded(self, params: Params, stats: BackgroundStats) -> Params:
        """The family's own expanded M-step."""
        return self._inside.expanded(params, stats.components)

    def q_function(self, params: Params, stats: BackgroundStats) -> jax.Array:
        outside = stats.count[-1] * jnp.log(jnp.asarray(self.volume, stats.count.dtype))
        return self.family.q_function(params, stats.components) - outside

    def log_prior(self, params: Params) -> jax.Array:
        return self.family.log_prior(params)

    def rebase(self, stats: BackgroundStats, params: Params) -> BackgroundStats:
        """The same statistics about the reference of `params`, where the family has one."""
        return dataclasses.replace(stats, components=self._inside.rebase(stats.components, params))

    def degenerate(self, stats: BackgroundStats) -> jax.Array:
        """Components (K + 1,) that died or collapsed; a background without rows is none of these."""
        return jnp.append(self.family.degenerate(stats.components), False)

    def sample(self, key: jax.Array, params: Params, labels: jax.Array) -> Data:
        raise TypeError("a Background cannot be sampled from: its volume does not say where it lies; sample its family")

    def num_parameters(self, params: Params) -> int:
        return self.family.num_parameters(params)

    def floats_per_row(self, params: Params) -> int:
        return self.family.floats_per_row(params)

    def unconstrain(self, params: Params) -> Params:
        return self.family.unconstrain(params)

    def constrain(self, theta: Params) -> Params:
        return self.family.constrain(theta)

    def check(self, x: Data, name: str = "x") -> None:
        self.family.check(x, name)

    def coarse(self) -> "Background":
        family = capabilities.original(self._inside.coarse())
        return self if family is self.family else dataclasses.replace(self, family=family)

    def without_missing(self) -> "Background":
        family = capabilities.original(self._inside.without_missing())
        return self if family is self.family else dataclasses.replace(self, family=family)


def bounding_volume(x: jax.Array) -> jax.Array:
    """Volume of a box around the rows (N, D) or (N,), along the axes or the principal ones, whichever is smaller.

    Missing entries (NaN) are left out, and then only the box along the axes is taken. A scalar.
    Raises ValueError for rows that fill no volume. Scrucca et al. (2016), The R Journal 8(1) (hypvol).
    """
    rows = checks.matrix("x", x)
    axes = jnp.prod(jnp.nanmax(rows, axis=0) - jnp.nanmin(rows, axis=0))
    centred = rows - jnp.mean(rows, axis=0)[None]
    _, vectors = jnp.linalg.eigh(numerics.product(centred, centred, "ni,nj->ij"))
    turned = numerics.product(centred, vectors, "ni,ij->nj")
    principal = jnp.prod(jnp.max(turned, axis=0) - jnp.min(turned, axis=0))
    volume = jnp.fmin(axes, principal)
    if checks.is_concrete(volume) and not volume > 0:
        raise ValueError("x must fill a volume: a column is constant, or a combination of others; leave it out")
    return volume
