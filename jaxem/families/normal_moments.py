"""Densities and second moments of K normal components, in four ways that give the same numbers.

whitened: deviations of every row from each component's own mean. Exact, however tight the clusters are.
expanded: monomials of the rows about one common point. All densities are one matrix product and all moments another,
    which lose (spread / width)² units of rounding.
masked: deviations that are 0 where an entry is missing. Where columns are independent given the component, this
    integrates missing entries out exactly.
conditional: for columns that are not, moments of every row given what is observed of it; see `conditional.py`.

Letters: K components, D columns, N rows; F features, which are 1, the columns, and the shape's monomials of them.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .. import checks, numerics
from ..numerics import tuning
from ..record import record, static
from . import conditional
from . import covariance as shapes

FORMS = ("auto", "whitened", "expanded")


@record
class Components:
    """The parameters of K components, each with a covariance of its own, and what densities make of them.

    shape: how covariances are stored, and their algebra.
    mean: (K, D).
    covariance: (K, ...), in the storage of the shape.
    whitener: (K, ...), W with WᵀW the inverse covariance, in the same storage.
    constant: (K,), -(D log 2 pi + log det covariance) / 2.
    tied: whether the covariances are all the same.
    """

    shape: shapes.Shape
    mean: jax.Array
    covariance: jax.Array
    whitener: jax.Array
    constant: jax.Array
    tied: bool = static()


@record
class Rows:
    """Complete rows, as they are and about one common point.

    values: (N, D).
    centre: (D,), the mean row.
    centred: (D, N), the rows about it, column-major.
    """

    values: jax.Array
    centre: jax.Array
    centred: jax.Array


@record
class Sums:
    """Moments about the components' means c, summed over rows with responsibilities r.

    count: (K,), sum r.
    entries: (K, D), sum r over observed entries.
    first: (K, D), sum r (x - c).
    second: (K, ...), sum r (x - c)(x - c)ᵀ, in the storage of the shape.
    base: (K,), sum r (log p(x) - E[log p(complete row)]); None where moments are of observed entries alone.
    """

    count: jax.Array
    entries: jax.Array
    first: jax.Array
    second: jax.Array
    base: jax.Array | None = None


def components(shape: shapes.Shape, mean: jax.Array, covariance: jax.Array, tied: bool) -> Components:
    """Components from means (K, D) and covariances (K, ...), all the same where they are tied."""
    columns = mean.shape[-1]
    whitener, half_logdet = shape.whitener(covariance, columns)
    constant = -half_logdet - 0.5 * columns * math.log(2 * math.pi)
    return Components(shape=shape, mean=mean, covariance=covariance, whitener=whitener, constant=constant, tied=tied)


def log_prob(parts: Components, x: jax.Array, observed: jax.Array | None, form: str) -> jax.Array:
    """Log-density of every row under every component: (N, D) -> (K, N).

    observed: (D, N), 1 where an entry is observed and 0 where it is missing; None where all are observed.
    form: one of FORMS, for complete rows.
    """
    rows = _about_their_mean(x)

    def complete() -> jax.Array:
        # In few columns the squares are written out, and fused with what follows: nothing is quicker.
        if form == "auto" and x.shape[1] <= tuning.UNROLLED_SQUARES:
            return _whitened_log_prob(parts, rows)
        return _choose(form, _is_far(parts, rows), _expanded_log_prob, _whitened_log_prob, parts, rows)

    correlated = _correlated(parts)
    masked = functools.partial(_conditional_log_prob if correlated else _masked_log_prob, parts, x)
    return _complete_or_not(correlated, observed, complete, masked)


def moments(parts: Components, x: jax.Array, observed: jax.Array | None, r: jax.Array, form: str) -> Sums:
    """Moments of rows (N, D) with responsibilities r (K, N); observed, form: as in `log_prob`."""
    rows, correlated = _about_their_mean(x), _correlated(parts)

    def complete() -> Sums:
        whitened = functools.partial(_whitened_moments, parts.shape)
        expanded = functools.partial(_expanded_moments, parts.shape)
        far, arguments = _is_far(parts, rows), (parts.mean, rows, r)
        if form == "auto" and x.shape[1] <= tuning.UNROLLED_SQUARES:
            # In few columns the product of the expanded form costs next to nothing: it is computed in any case.
            found = numerics.repaired(
                lambda far, *rest: (expanded(*rest), far), lambda _, *rest: whitened(*rest), far, *arguments
            )
        else:
            found = _choose(form, far, expanded, whitened, *arguments)
        count, first, second = found
        base = jnp.zeros_like(count) if correlated else None
        entries = jnp.broadcast_to(count[:, None], first.shape)
        return Sums(count=count, entries=entries, first=first, second=second, base=base)

    masked = functools.partial(_conditional_moments if correlated else _masked_moments, parts, x, r)
    return _complete_or_not(correlated, observed, complete, masked)


def expected(parts: Components, found: conditional.Sums) -> Sums:
    """Moments of rows observed in part or through noise, in the storage of the shape."""
    second = parts.shape.from_matrix(found.second)
    square = parts.shape.trace(parts.shape.precision(parts.whitener), second)
    return Sums(
        count=found.count,
        entries=jnp.broadcast_to(found.count[:, None], found.first.shape),
        first=found.first,
        second=second,
        base=found.loglik - (parts.constant * found.count - 0.5 * square),
    )


def divergence(p: Components, q: Components) -> jax.Array:
    """KL(p ‖ q) under every component: (K,)."""
    shape, away = q.shape, p.mean - q.mean
    spread = p.covariance * shape.repeats(away.shape[-1]) + shape.cross(away, away)
    square = shape.trace(shape.precision(q.whitener), spread)
    return p.constant - q.constant + 0.5 * (square - away.shape[-1])


def _whitened_log_prob(parts: Components, rows: Rows) -> jax.Array:
    return parts.constant[:, None] - 0.5 * parts.shape.square(parts.whitener, _deviations(parts.mean, rows.values))


def _whitened_moments(
    shape: shapes.Shape, mean: jax.Array, rows: Rows, r: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """count, first and second of `Sums`."""
    deviations = _deviations(mean, rows.values)
    first = numerics.product(r, deviations, "kn,kdn->kd")
    return jnp.sum(r, axis=-1), first, shape.moments(r, deviations)


def _expanded_log_prob(parts: Components, rows: Rows) -> jax.Array:
    shape, offset = parts.shape, parts.mean - rows.centre[None]
    precision = shape.precision(parts.whitener)
    linear = shape.precision_times(precision, offset)
    base = parts.constant - 0.5 * jnp.sum(linear * offset, axis=-1)
    natural = jnp.concatenate([base[:, None], linear, shape.to_features(precision)], axis=1)
    return numerics.product(natural, _features(shape, rows.centred), "kf,fn->kn")


def _expanded_moments(
    shape: shapes.Shape, mean: jax.Array, rows: Rows, r: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """count, first and second of `Sums`."""
    columns, offset = mean.shape[-1], mean - rows.centre[None]
    sums = numerics.product(r, _features(shape, rows.centred), "kn,fn->kf")
    count, first = sums[:, 0], sums[:, 1 : 1 + columns]
    second = shape.from_features(sums[:, 1 + columns :], columns)
    moved = first - count[:, None] * offset
    return count, moved, second - shape.cross(offset, first + moved)


def _features(shape: shapes.Shape, centred: jax.Array) -> jax.Array:
    """1, the columns, and the shape's monomials of them: (D, N) -> (F, N)."""
    return jnp.concatenate([jnp.ones_like(centred[:1]), centred, shape.features(centred)])


def _is_far(parts: Components, rows: Rows) -> jax.Array:
    """Whether a mean is so far from the centre, in widths, that an expanded square would lose too much."""
    offset = parts.mean - rows.centre[None]
    widths = parts.shape.whiten(parts.whitener, offset[..., None])
    return jnp.max(jnp.mean(jnp.square(widths), axis=1)) * jnp.finfo(offset.dtype).eps ** 0.25 > 1


def _masked_log_prob(parts: Components, x: jax.Array, observed: jax.Array) -> jax.Array:
    scales = parts.shape.log_scales(parts.covariance, x.shape[1]) + 0.5 * math.log(2 * math.pi)
    square = parts.shape.square(parts.whitener, _deviations(parts.mean, x) * observed[None])
    return -numerics.product(scales, observed, "kd,dn->kn") - 0.5 * square


def _masked_moments(parts: Components, x: jax.Array, r: jax.Array, observed: jax.Array) -> Sums:
    deviations = _deviations(parts.mean, x) * observed[None]
    return Sums(
        count=jnp.sum(r, axis=-1),
        entries=numerics.product(r, observed, "kn,dn->kd"),
        first=numerics.product(r, deviations, "kn,kdn->kd"),
        second=parts.shape.moments(r, deviations),
    )


def _correlated(parts: Components) -> bool:
    return isinstance(parts.shape, shapes.Full)


def _conditional_log_prob(parts: Components, x: jax.Array, observed: jax.Array) -> jax.Array:
    rows = conditional.Measured(values=x, observed=observed.T > 0)
    return conditional.log_prob(parts.mean, parts.covariance[:1] if parts.tied else parts.covariance, rows)


def _conditional_moments(parts: Components, x: jax.Array, r: jax.Array, observed: jax.Array) -> Sums:
    rows = conditional.Measured(values=x, observed=observed.T > 0)
    covariance = parts.covariance[:1] if parts.tied else parts.covariance
    return expected(parts, conditional.moments(parts.mean, covariance, rows, r))


def _choose(form: str, far: jax.Array, expanded: Callable, whitened: Callable, *arguments: Any) -> Any:
    """The form asked for; under "auto", expanded while the means are near the centre."""
    if form == "auto":
        # A branch, and not `repaired`: outside of a branch XLA gives the features one layout for densities and moments
        # alike, and one large fit takes nearly twice as long.
        # Without checkpoints, derivatives would reserve memory for the residuals of both forms.
        return jax.lax.cond(far, jax.checkpoint(whitened), jax.checkpoint(expanded), *arguments)
    return (whitened if form == "whitened" else expanded)(*arguments)


def _complete_or_not(correlated: bool, observed: jax.Array | None, complete: Callable, masked: Callable) -> Any:
    """`complete()` or `masked(observed)`, by a real branch, under `vmap` too: most data have no missing entries."""
    if observed is None or (correlated and checks.is_concrete(observed) and bool(jnp.all(observed == 1))):
        return complete()
    # Derivatives reserve memory for the residuals of both branches; conditional moments have D² of them an entry.
    masked = jax.checkpoint(masked) if correlated else masked
    return jax.lax.cond(numerics.in_any_lane(jnp.any(observed != 1)), masked, lambda _: complete(), observed)


def _about_their_mean(x: jax.Array) -> Rows:
    centre = jnp.mean(x, axis=0)
    return Rows(values=x, centre=centre, centred=(x - centre[None]).T)


def _deviations(mean: jax.Array, x: jax.Array) -> jax.Array:
    """x - mean of every component: (K, D), (N, D) -> (K, D, N)."""
    return x.T[None] - mean[:, :, None]
