"""The bootstrap: how the parameters of a fit vary over resampled data."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .. import checks, numerics, tree
from ..arguments import chosen, limits
from ..capabilities import states
from ..em import EM, objective
from ..fit import em_fit
from ..protocols import AnyModel, Data, Params, Problem
from ..record import record
from ..scheduler import lanes_for
from ..slots import Algorithm
from ..status import Status
from .prepared import posed

# The confidence above which a match is clear: in a tie two components cannot be told apart.
_CLEARLY = 0.1


@record
class Bootstrap:
    """Refits of resampled data, R of them, their components in the order of the fit's.

    estimate: the parameters that were given.
    params: the refitted ones, leading axis R.
    status: (R,), a `Status` each.
    confidence: (R,), of the match of components: 1 - its cost / the cost of the best match with two of them exchanged,
        from 0, a tie, to 1. 1 where the model has no labels to match.
    matched: (R,), whether the match is clear, and could be made.
    """

    estimate: Params
    params: Params
    status: jax.Array
    confidence: jax.Array
    matched: jax.Array

    @property
    def kept(self) -> jax.Array:
        """Replicates (R,) that count: those that converged and were matched."""
        return (self.status == Status.CONVERGED) & self.matched

    @property
    def num_failed(self) -> jax.Array:
        """How many refits did not converge."""
        return jnp.sum(self.status != Status.CONVERGED)

    @property
    def num_unmatched(self) -> jax.Array:
        """How many refits converged, but to components that cannot be told from each other."""
        return jnp.sum((self.status == Status.CONVERGED) & ~self.matched)

    @property
    def standard_errors(self) -> Params:
        """The standard deviation of the replicates that count, a record like the parameters."""
        kept = self.kept
        count = jnp.sum(kept)

        def spread(leaf: jax.Array) -> jax.Array:
            among = kept.reshape(-1, *[1] * (leaf.ndim - 1))
            mean = jnp.sum(jnp.where(among, leaf, 0), axis=0, keepdims=True) / jnp.maximum(count, 1)
            square = jnp.sum(jnp.where(among, jnp.square(leaf - mean), 0), axis=0)
            return jnp.where(count > 1, jnp.sqrt(square / jnp.maximum(count - 1, 1)), jnp.nan)

        return jax.tree.map(spread, self.params)

    def intervals(self, level: float = 0.95) -> tuple[Params, Params]:
        """Percentile intervals at this level: the lower and the upper ends, records like the parameters.

        Efron & Tibshirani (1993), An Introduction to the Bootstrap, section 13.3.
        """
        if not 0 < level < 1:
            raise ValueError(f"level must be in (0, 1), as 0.95; got {level}")
        kept, last = self.kept, jnp.maximum(jnp.sum(self.kept) - 1, 0)

        def end(share: float, leaf: jax.Array) -> jax.Array:
            # Those that do not count are behind all others.
            ordered = jnp.sort(jnp.where(kept.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, jnp.inf), axis=0)
            place = share * last
            low = jnp.floor(place).astype(jnp.int32)
            below, above = ordered[low], ordered[jnp.minimum(low + 1, last)]
            found = below + (place - low).astype(leaf.dtype) * (above - below)
            return jnp.where(jnp.any(kept), found, jnp.nan)

        tail = (1 - level) / 2
        ends = (jax.tree.map(functools.partial(end, share), self.params) for share in (tail, 1 - tail))
        lower, upper = ends
        return lower, upper


def bootstrap(
    model: AnyModel,
    params: Params,
    key: jax.Array,
    x: Data,
    weights: jax.Array | None = None,
    num_samples: int = 1000,
    parametric: bool = False,
    *,
    algorithm: Algorithm | Any | None = None,
    tol: jax.Array | float = 1e-6,
    max_steps: int = 1000,
) -> Bootstrap:
    """Refit `params`, the end of a fit, to `num_samples` resamples of the data, all in one compiled program.

    A resample is the same units (rows, sequences, groups), weighted by how often each was drawn; data with weights are
    drawn from in proportion to these, as often as they sum to. parametric: it is drawn from the model at `params`
    instead, by its `sample(key, params, n)`, with the entries missing that are missing in x.
    algorithm, tol, max_steps: as in `em_fit`. Every refit starts at `params`.

    Labels: a refit's components are matched to those of the fit by their responsibilities for the original rows, at
    the least cost, and its parameters are put in that order by one EM step under the posterior so ordered.
    Refits that fail, or whose components cannot be told apart, are counted and left out of standard errors and
    intervals. Factors may rotate from refit to refit: only errors of what a rotation leaves as it is have a meaning.
    Efron (1979), Annals of Statistics 7; for mixtures McLachlan & Peel (2000), Finite Mixture Models, section 2.16.
    Raises ValueError or TypeError for bad input, and for a parametric bootstrap of what the model does not sample.
    """
    checks.positive_integer("num_samples", num_samples)
    limits(tol, max_steps)
    key = checks.random_key(key)
    problem, params = posed(model, params, x, weights, by_unit=True)
    algorithm = chosen(problem.model, algorithm)
    if parametric:
        _check_sample(model, params, x, weights)
    rows, model_ = problem.rows, problem.model
    numbers = tree.size(problem.x) + rows
    if model_.floats_per_row is not None:
        numbers = rows * (model_.floats_per_row(params, problem.x) - model_.shared_floats_per_row(params, problem.x))
    # Few enough that one slow refit does not keep all others waiting.
    lanes = max(1, min(num_samples // 32, lanes_for(numbers)))
    given = x if parametric else None
    return _refits(problem, params, given, key, algorithm, tol, max_steps, num_samples=num_samples, lanes=lanes)


def _check_sample(model: Any, params: Params, x: Data, weights: jax.Array | None) -> None:
    """Raise unless the model draws data of the shapes that these have."""
    if weights is not None:
        raise ValueError("parametric bootstraps draw rows of weight 1: leave weights out, and repeat rows")
    if not states(model, "sample"):
        raise TypeError(f"a parametric bootstrap draws from the model, and {type(model).__name__} has no sample")
    expected = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, x))
    try:
        drawn = jax.eval_shape(lambda: model.sample(jax.random.key(0), params, tree.num_rows(x)))
    except TypeError:
        drawn = None
    made: Any = jax.tree.structure(drawn)
    same = made == jax.tree.structure(expected) and all(
        a.size == b.size for a, b in zip(jax.tree.leaves(drawn), jax.tree.leaves(expected), strict=True)
    )
    if not same:
        raise TypeError(
            f"a parametric bootstrap needs data as model.sample(key, params, n) draws them, and "
            f"{type(model).__name__} draws no such: resample the units themselves, parametric=False"
        )


@functools.partial(jax.jit, static_argnames=("max_steps", "num_samples", "lanes"))
def _refits(
    problem: Problem,
    params: Params,
    given: Data | None,
    key: jax.Array,
    algorithm: Algorithm,
    tol: jax.Array | float,
    max_steps: int,
    *,
    num_samples: int,
    lanes: int,
) -> Bootstrap:
    """The bootstrap, `lanes` refits at a time; given: the data as they came in, for a parametric one, or None."""
    model = problem.model

    def one(key: jax.Array) -> tuple[Params, jax.Array, jax.Array, jax.Array]:
        own, run = jax.random.split(key)
        drawn = _resampled(problem, own) if given is None else _drawn(problem, params, given, own)
        fit = em_fit(model, params, drawn.x, drawn.weights, key=run, algorithm=algorithm, tol=tol, max_steps=max_steps)
        return fit.status, *_matched(problem, params, drawn, fit.params)

    status, found, confidence, matched = jax.lax.map(one, jax.random.split(key, num_samples), batch_size=lanes)
    return Bootstrap(estimate=params, params=found, status=status, confidence=confidence, matched=matched)


def _resampled(problem: Problem, key: jax.Array) -> Problem:
    """The same units, each as often as it was drawn."""
    rows, weights, dtype = problem.rows, problem.weights, tree.float_dtype(problem.x)
    if weights is None:
        places = jax.random.randint(key, (rows,), 0, rows)
        counts = jnp.zeros(rows, dtype).at[places].add(1)
    else:
        total = jnp.sum(weights)
        counts = jax.random.multinomial(key, jnp.round(total), weights / total).astype(dtype)
    return dataclasses.replace(problem, weights=counts)


def _drawn(problem: Problem, params: Params, given: Data, key: jax.Array) -> Problem:
    """Data drawn from the model, with the missing entries (NaN, or -1 of whole numbers) of those given."""

    def holed(new: jax.Array, old: jax.Array) -> jax.Array:
        old = jnp.asarray(old)
        whole = not jnp.issubdtype(old.dtype, jnp.inexact)
        new = new.reshape(old.shape).astype(old.dtype)
        return jnp.where(old == -1 if whole else jnp.isnan(old), old, new)

    model: Any = problem.model
    drawn = jax.tree.map(holed, model.sample(key, params, tree.num_rows(given)), given)
    return dataclasses.replace(problem, x=model.units(drawn))


def _matched(problem: Problem, params: Params, drawn: Problem, found: Params) -> tuple[Params, jax.Array, jax.Array]:
    """Refitted parameters in the order of the fit's components; the confidence of that match, and if it is clear."""
    model = problem.model
    sure = jnp.ones((), tree.float_dtype(problem.x)), jnp.array(True)
    if not states(model, "infer", "statistics"):
        return found, *sure
    posteriors = [model.infer(each, problem.x) for each in (params, found)]
    if not states(posteriors[0], "relabelled"):
        return found, *sure
    fitted, refitted = (_shares(each.shares, problem.weights) for each in posteriors)
    both = numerics.product(fitted[0], refitted[1], "nk,nj->kj")
    own, other = (jnp.sum(weighted * plain, axis=0) for weighted, plain in (fitted, refitted))
    cost = own[:, None] + other[None] - 2 * both
    cost = jnp.where(jnp.isfinite(cost), cost, jnp.finfo(cost.dtype).max / 1e3)
    rows, columns = optax.assignment.hungarian_algorithm(cost)
    order = jnp.zeros_like(columns).at[rows].set(columns)
    confidence = _confidence(cost, order)
    same = jnp.all(order == jnp.arange(len(order)))

    def ordered(_: jax.Array, before: tuple[Params, jax.Array]) -> tuple[Params, jax.Array]:
        """One EM step of the resample under the ordered posterior; a fit's end stays where it is by that."""
        known, _ = before
        q = model.infer(known, drawn.x).relabelled(order)
        after = model.m_step(model.statistics(known, drawn.x, q, drawn.weights))
        heights = [objective(model, EM().init(model, each, drawn.x, drawn.weights)) for each in (known, after)]
        near = jnp.abs(heights[1] - heights[0]) <= 1e-3 * jnp.maximum(drawn.total, 1)
        return after, near

    if model.m_step is None:
        return found, confidence, same & (confidence > _CLEARLY)
    # A loop of one round or none: under vmap it runs only where some replicate needs it.
    start = found, jnp.array(True)
    found, near = jax.lax.fori_loop(0, jnp.where(same, 0, 1), ordered, start)
    return found, confidence, near & (confidence > _CLEARLY)


def _shares(shares: jax.Array, weights: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Shares of the labels (..., K), times weights and plain, as rows (N, K) each."""
    weighted = shares
    if weights is not None:
        weighted = shares * weights.reshape(-1, *[1] * (shares.ndim - 1))
    return weighted.reshape(-1, shares.shape[-1]), shares.reshape(-1, shares.shape[-1])


def _confidence(cost: jax.Array, order: jax.Array) -> jax.Array:
    """1 - cost / that of the best assignment with two labels exchanged; 1 for one label."""
    count = len(order)
    if count == 1:
        return jnp.ones((), cost.dtype)
    chosen_cost = cost[:, order]  # [k, k']: the cost of matching k with the refit's component that k' is matched with
    alone = jnp.diagonal(chosen_cost)
    best = jnp.sum(alone)
    swapped = best - alone[:, None] - alone[None] + chosen_cost + chosen_cost.T
    next_best = jnp.min(jnp.where(jnp.eye(count, dtype=bool), jnp.inf, swapped))
    return jnp.where(next_best > 0, 1 - best / jnp.where(next_best > 0, next_best, 1), 0)
