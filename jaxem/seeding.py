"""Where fits start: at rows drawn as seeds. Starts are functions of a random key, weighted, and traceable."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from . import capabilities, checks, numerics, parameters, tree
from .data import as_labelled, seen_by, split
from .protocols import Data, Params, Stats

METHODS = ("k-means++", "random_rows", "random_responsibilities")

# The fraction of every row that a start spreads over all components, so that no component starts singular.
SMOOTHING = 0.1

# Random responsibilities are drawn for so many groups of rows a component.
_GROUPS = 4


def start(*methods: str) -> Callable:
    """A decorator of a model's `init(key, x, weights, ...)`: its arguments are checked before anything is traced.

    methods: what its `method` may be, the default first.

    The function itself is given a new-style key, and data with a leading axis of units. Starts have no derivatives: a
    fit's limit does not depend on where it began.
    """

    def with_checks(init: Callable) -> Any:
        @functools.wraps(init)
        def checked(self: Any, key: jax.Array, x: Data, weights: jax.Array | None = None, **options: Any) -> Params:
            if methods:
                # Always passed on, so that the default, given or left out, is one compiled program.
                options = {"method": methods[0], **options}
                checks.choice("method", options["method"], methods)
            self, x, weights = tree.constants((self, *checks.native((x, weights))))
            self.check(x, weights)
            known = capabilities.informed(capabilities.complete("model", self), x)
            return init(capabilities.original(known), checks.random_key(key), known.units(x), weights, **options)

        return checked

    return with_checks


def membership(
    key: jax.Array,
    family: Any,
    x: Data,
    weights: jax.Array | None,
    num_components: int,
    method: str,
) -> jax.Array:
    """Which component every row starts in: its number (N,), or responsibilities (N, K).

    Of the METHODS, "k-means++" and "random_rows" give every row to its nearest seed, columns standardised, and
    "random_responsibilities" draws them from the simplex, rows near to each other alike. A component with labelled rows
    is seeded by one of them.
    """
    family, (rows, labels) = capabilities.complete("part", family), split(x)
    rows = seen_by("components", rows)
    points = standardize(family.features(rows), weights)
    if method == "random_responsibilities":
        return random_responsibilities(
            key, points, weights, num_components + family.extra_components, tree.float_dtype(rows)
        )
    seed = kmeans_plusplus if method == "k-means++" else random_rows
    seeds, nearest = seed(key, points, weights, num_components)
    return nearest if labels is None else nearest_known(key, points, labels, weights, seeds)


def responsibilities(membership: jax.Array, count: int, smoothing: float, dtype: Any) -> jax.Array:
    """Responsibilities (K, N) from numbers (N,) or responsibilities (N, K), the part `smoothing` spread evenly."""
    given = membership[None] == jnp.arange(count)[:, None] if membership.ndim == 1 else membership.T
    return (1 - smoothing) * given.astype(dtype) + smoothing / count


def params_like(part: Any, x: Data, num_components: int) -> Params:
    """The shapes that a part's parameters have for such data, as `jax.ShapeDtypeStruct`s."""
    # Shapes do not depend on the number of rows: one trace serves whole data and their blocks.
    return _pooled.eval_shape(part, parameters.rows_like(x), num_components=num_components)


@functools.partial(jax.jit, static_argnames="num_components")
def _pooled(part: Any, x: Data, num_components: int) -> Params:
    """The whole data as one component, K times over; jitted, so that its trace is cached."""
    return capabilities.complete("part", part).pooled(x, None, num_components)


def estimates(
    parts: dict[str, Any],
    counts: dict[str, int],
    x: Data,
    membership: jax.Array,
    weights: jax.Array | None,
    smoothing: float,
) -> dict[str, Params]:
    """Parameters of parts that look at rows, from numbers (N,) or responsibilities (N, K), in blocks of rows.

    counts: the number of components that every part starts with, all of them alike. The largest is K: some families
    add components by themselves. M-steps are taken as often as the part that needs most says (`start_passes`), which is
    twice by default: the first centres statistics on the components' own means. One loop, so that a program holds them
    once.
    """
    dtype, count = tree.float_dtype(x), max(counts.values())
    pooled = {name: part.pooled(seen_by(name, x), weights, counts[name]) for name, part in parts.items()}
    floats = sum(part.floats_per_row(pooled[name]) for name, part in parts.items())
    size = tree.rows_per_block(2 * count + floats, dtype)

    def of_block(values: dict[str, Params], rows: tuple[Data, jax.Array], inside: jax.Array | None) -> dict[str, Stats]:
        x, membership = rows
        given = responsibilities(membership, count, smoothing, dtype)
        given = given if inside is None else given * inside.astype(dtype)[None]
        return {name: part.stats(values[name], seen_by(name, x), given) for name, part in parts.items()}

    def again(_: int, values: dict[str, Params]) -> dict[str, Params]:
        of = tree.sum_over_blocks(functools.partial(of_block, values), (x, membership), weights, size)
        return {name: part.expanded(part.m_step(of[name]), of[name]) for name, part in parts.items()}

    return jax.lax.fori_loop(0, max(part.start_passes for part in parts.values()), again, pooled)


def params_from_responsibilities(
    model: Any, x: Data, responsibilities: jax.Array, weights: jax.Array | None = None
) -> Params:
    """The parameters of a mixture by M-steps at given responsibilities (N, K), or whole-number labels (N,)."""
    x, weights = checks.native((x, weights))
    model.check(x, weights)
    given = checks.responsibilities("responsibilities", responsibilities, tree.num_rows(x), model.num_weights)
    known = capabilities.original(capabilities.informed(capabilities.complete("model", model), x))
    return estimated(known, x, given, weights, 0.0)


@functools.partial(jax.jit, static_argnames="smoothing")
def estimated(model: Any, x: Data, membership: jax.Array, weights: jax.Array | None, smoothing: float) -> Params:
    """The parameters of a mixture by M-steps at given components of its rows; those of labelled rows are known.

    membership: numbers (N,) or responsibilities (N, K); smoothing: the part of every row that is spread over all.
    """
    x, weights = tree.present(x, weights)
    rows, labels = split(x)
    if labels is not None:
        numbered = membership.ndim == 1
        membership = jnp.where(labels < 0, membership, labels) if numbered else as_labelled(membership.T, x).T
    return model.params_of(estimates(model.parts, model.counts, rows, membership, weights, smoothing))


def standardize(points: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Columns (N, F) centred and scaled to unit (weighted) variance, so that seeds do not depend on units."""
    total = tree.total_weight(points, weights)
    mean = numerics.weighted_sum(points.T, weights) / total
    variance = numerics.weighted_sum(jnp.square(points - mean[None]).T, weights) / total
    scale = jnp.where(variance > 0, jax.lax.rsqrt(jnp.where(variance > 0, variance, 1)), 0)
    return (points - mean[None]) * scale[None]


def _draw(key: jax.Array, mass: jax.Array) -> jax.Array:
    """An index drawn in proportion to mass (N,), by inversion; never one of mass 0."""
    cumulated = jnp.cumsum(mass)
    total = cumulated[-1]
    height = jax.random.uniform(key, (), mass.dtype) * total
    return jnp.searchsorted(cumulated, jnp.minimum(height, jnp.nextafter(total, 0)), side="right")


def _first(key: jax.Array, weights: jax.Array | None, points: jax.Array) -> jax.Array:
    """The first seed: a row drawn in proportion to its weight, without a sum over rows where all count the same."""
    if weights is not None:
        return _draw(key, weights)
    # The compiler would fold a sum over constant rows, which took 14 s on a GPU with a million of them.
    rows = points.shape[0]
    height = jax.random.uniform(key, (), points.dtype) * rows
    return jnp.minimum(height.astype(jnp.int32), rows - 1)


def _one_seed(
    key: jax.Array, weights: jax.Array | None, points: jax.Array, num_seeds: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """With the first seed drawn: squared distances to the nearest seed (N,), its number (N,), and the seeds (K,)."""
    first = _first(jax.random.fold_in(key, 0), weights, points)
    return (
        _distances(points, first),
        jnp.zeros(points.shape[0], jnp.int32),
        jnp.zeros(num_seeds, jnp.int32).at[0].set(first.astype(jnp.int32)),
    )


def _distances(points: jax.Array, seed: jax.Array) -> jax.Array:
    """Squared distances (N,) of all rows to one of them."""
    return jnp.sum(jnp.square(points - points[seed][None]), axis=-1)


def kmeans_plusplus(
    key: jax.Array, points: jax.Array, weights: jax.Array | None, num_seeds: int
) -> tuple[jax.Array, jax.Array]:
    """k-means++ (Arthur & Vassilvitskii 2007): seeds (K,) among the rows (N, F), and each row's nearest seed (N,).

    Each seed is drawn in proportion to weight x squared distance to the nearest of the seeds before it.
    """
    weights = None if weights is None else weights.astype(points.dtype)
    each: jax.Array | float = 1.0 if weights is None else weights

    def body(k: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        distance, nearest, seeds = carry
        mass = each * distance
        # Once every row coincides with a seed there is no distance left to draw by.
        mass = jnp.where(jnp.sum(mass) > 0, mass, each)
        seed = _draw(jax.random.fold_in(key, k), mass)
        to_seed = _distances(points, seed)
        closer = to_seed < distance
        return jnp.minimum(distance, to_seed), jnp.where(closer, k, nearest), seeds.at[k].set(seed)

    _, nearest, seeds = jax.lax.fori_loop(1, num_seeds, body, _one_seed(key, weights, points, num_seeds))
    return seeds, nearest


def greedy_kmeans_plusplus(
    key: jax.Array, points: jax.Array, weights: jax.Array | None, num_seeds: int
) -> tuple[jax.Array, jax.Array]:
    """`kmeans_plusplus` with 2 + log K candidates for every seed, of which the one with the smallest cost is taken.

    This is the variant that Arthur & Vassilvitskii recommend, and scikit-learn's default.
    """
    weights = None if weights is None else weights.astype(points.dtype)
    each: jax.Array | float = 1.0 if weights is None else weights
    candidates = 2 + int(math.log(num_seeds))

    def body(k: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        distance, nearest, seeds = carry
        mass = each * distance
        # As above, once there is no distance left to draw by.
        mass = jnp.where(jnp.sum(mass) > 0, mass, each)
        keys = jax.random.split(jax.random.fold_in(key, k), candidates)
        drawn = jax.vmap(_draw, in_axes=(0, None))(keys, mass)
        to_drawn = jax.vmap(_distances, in_axes=(None, 0))(points, drawn)
        best = jnp.argmin(numerics.weighted_sum(jnp.minimum(to_drawn, distance[None]), weights))
        closer = to_drawn[best] < distance
        distance = jnp.minimum(distance, to_drawn[best])
        return distance, jnp.where(closer, k, nearest), seeds.at[k].set(drawn[best].astype(jnp.int32))

    _, nearest, seeds = jax.lax.fori_loop(1, num_seeds, body, _one_seed(key, weights, points, num_seeds))
    return seeds, nearest


def random_rows(
    key: jax.Array, points: jax.Array, weights: jax.Array | None, num_seeds: int
) -> tuple[jax.Array, jax.Array]:
    """Distinct rows drawn in proportion to their weight: seeds (K,), and each row's nearest seed (N,)."""
    scores = jax.random.gumbel(key, (points.shape[0],), points.dtype)
    if weights is not None:
        scores = scores + numerics.safe_log(weights.astype(points.dtype))
    _, seeds = jax.lax.top_k(scores, num_seeds)

    def body(k: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        distance, nearest = carry
        to_seed = _distances(points, seeds[k])
        return jnp.minimum(distance, to_seed), jnp.where(to_seed < distance, k, nearest)

    rows = points.shape[0]
    start = (jnp.full(rows, jnp.inf, points.dtype), jnp.zeros(rows, jnp.int32))
    _, nearest = jax.lax.fori_loop(0, num_seeds, body, start)
    return seeds, nearest


def random_responsibilities(
    key: jax.Array, points: jax.Array, weights: jax.Array | None, count: int, dtype: Any
) -> jax.Array:
    """Responsibilities (N, K), uniform on the simplex, the same for rows (N, F) that are near to each other.

    With draws of its own for every row, components would differ by 1 / sqrt(N) only: at large N that is a start next to
    the saddle where all components are alike. Rows are therefore grouped around a few of them, drawn at random.
    """
    groups = min(points.shape[0], _GROUPS * count)
    key_groups, key_draws = jax.random.split(key)
    _, nearest = random_rows(key_groups, points, weights, groups)
    draws = jax.random.exponential(key_draws, (groups, count), dtype)
    return (draws / jnp.sum(draws, axis=1, keepdims=True))[nearest]


def nearest_known(
    key: jax.Array, points: jax.Array, labels: jax.Array, weights: jax.Array | None, seeds: jax.Array
) -> jax.Array:
    """The nearest seed (N,) of each row, where seed k is a row labelled k wherever there is one.

    points: (N, F).
    labels: (N,), -1 for unknown.
    seeds: (K,), row numbers, for the components without labelled rows.
    """
    own = labels[None] == jnp.arange(seeds.shape[0])[:, None]
    scores = jax.random.gumbel(jax.random.fold_in(key, 2**31), own.shape, points.dtype)
    scores = jnp.where(own if weights is None else own & (weights > 0)[None], scores, -jnp.inf)
    known = jnp.max(scores, axis=1) > -jnp.inf
    centres = points[jnp.where(known, jnp.argmax(scores, axis=1), seeds)]
    cross = numerics.product(points, centres, "nf,kf->nk")
    return jnp.argmin(jnp.sum(jnp.square(centres), axis=1)[None] - 2 * cross, axis=1)
