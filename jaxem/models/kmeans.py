"""k-means: hard EM in the limit of small, equal, spherical clusters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from .. import checks, latents, numerics, parameters, seeding, tree
from ..capabilities import completed
from ..latents import Exact, Hard
from ..numerics import tuning
from ..protocols import Data
from ..record import record, static
from ..slots import Expect

INITS = ("k-means++", "greedy-k-means++", "k-means||", "random_rows")

# A power of two, so that an empty cluster keeps its centre to the last bit.
_PSEUDO_COUNT = 2.0**-60

# Rounds of k-means||, each drawing twice as many candidates as there are clusters.
_ROUNDS = 5


@record
class KMeansParams:
    """centers: (K, D)."""

    centers: jax.Array


@record
class KMeansStats:
    """Sums over the rows x of each cluster, about the centres c of the E-step.

    count: (K,), the weight of the rows.
    reference: (K, D), count times c.
    first: (K, D), the sum of x - c.
    scatter: (), the sum of |x - c|² over all clusters.
    loglik: (), minus the inertia at the centres of the E-step.
    """

    count: jax.Array
    reference: jax.Array
    first: jax.Array
    scatter: jax.Array
    loglik: jax.Array


@record
class NearestCentre:
    """The posterior of k-means: every row's cluster.

    label (N,): the first nearest centre c.
    score (N,): c·x - |c|²/2, with both about the anchor; larger is nearer.
    points (N, D): the rows x.
    anchor (D,): a point amid them.
    """

    label: jax.Array
    score: jax.Array
    points: jax.Array
    anchor: jax.Array

    @property
    def evidence(self) -> jax.Array:
        """Minus the squared distance to the centre, (N,)."""
        return 2 * self.score - jnp.sum(jnp.square(self.points - self.anchor[None]), axis=1)


@completed("model")
@record(kw_only=False)
class KMeans:
    """Lloyd's algorithm: rows go to the nearest centre whole, centres go to the mean of their rows.

    num_clusters: K.
    refill: whether an empty cluster is given one of the farthest rows, as by scikit-learn.

    Data are (N, D), or (N,) for one column. Columns are taken as they are, so that their units matter. Row weights
    count rows: 2 is the row twice.

    It is hard EM for a mixture of spherical normals of equal weight, whose common variance goes to 0: of likelihood and
    posterior, only distances are left. The objective, `loglik`, is minus the inertia, the sum of squared distances to
    the nearest centre: the classification log-likelihood up to scale and constant. So `tol` is in squared units of x
    per row, and `tol=0` runs to the fixed point. The only posterior is hard, so that Exact() and Hard() are the same
    here. Of equally near centres the first is taken. A row that refills a cluster leaves its own, so that the inertia
    never rises; statistics add over parts of the data only where no part has an empty cluster, or without `refill`.
    Source: Lloyd, Least squares quantization in PCM (1982); Bishop, PRML, sections 9.1 and 9.3.2.
    Raises TypeError or ValueError for a num_clusters that is not a whole number of at least 1.
    """

    num_clusters: int = static()
    refill: bool = static(default=True, kw_only=True)

    likelihood = False

    def __post_init__(self) -> None:
        checks.positive_integer("num_clusters", self.num_clusters)

    @seeding.start(*INITS)
    @functools.partial(jax.jit, static_argnames="method")
    def init(
        self, key: jax.Array, x: Data, weights: jax.Array | None = None, *, method: str = "k-means++"
    ) -> KMeansParams:
        """Centres at rows of x (pure in `key`, so `vmap` over keys gives many). Rows of weight 0 are never seeds.

        method: "k-means++" (Arthur & Vassilvitskii 2007), "greedy-k-means++" (the same, the best of
        2 + log K candidates for every seed), "k-means||" (Bahmani et al. 2012: candidates drawn
        many at a time, then k-means++ among them) or "random_rows".
        """
        x, weights = tree.present(x, weights)
        rows, count = checks.matrix("x", x), self.num_clusters
        if method == "k-means||":
            return KMeansParams(centers=_kmeans_parallel(key, rows, weights, count))
        seed = {
            "k-means++": seeding.kmeans_plusplus,
            "greedy-k-means++": seeding.greedy_kmeans_plusplus,
            "random_rows": seeding.random_rows,
        }[method]
        return KMeansParams(centers=rows[seed(key, rows, weights, count)[0]])

    def infer(self, params: KMeansParams, x: Data, expect: Expect = Exact()) -> NearestCentre:
        """The nearest centre of every row; its `evidence` is minus the squared distance to it, (N,)."""
        if not isinstance(expect, Hard) and not (isinstance(expect, Exact) and expect.temperature is None):
            raise TypeError(
                f"expect must be Exact() or Hard() for k-means, whose only posterior is hard; got {expect!r}"
            )
        parameters.shapes("params", self, params, x)
        return self._infer(params, x)

    @jax.jit
    def _infer(self, params: KMeansParams, x: Data) -> NearestCentre:
        rows = checks.matrix("x", x)
        anchor = _anchor(rows)
        label, score = _nearest(params.centers, rows, anchor)
        return NearestCentre(label=label, score=score, points=rows, anchor=anchor)

    @jax.jit
    def statistics(
        self, params: KMeansParams, x: Data, posterior: NearestCentre, weights: jax.Array | None = None
    ) -> KMeansStats:
        """Counts and moments of the rows of each cluster, about its centre, and minus the inertia.

        Goes over the rows in blocks by itself: an empty cluster is known only after all of them.
        """
        rows, centers = checks.matrix("x", x), params.centers
        stats = tree.sum_over_blocks(
            lambda block, inside: _moments(centers, block[0], block[1], inside),
            (rows, posterior.label),
            weights,
            _block_size(centers, rows),
        )
        stats = dataclasses.replace(
            stats,
            count=stats.count + _PSEUDO_COUNT,
            reference=stats.reference + _PSEUDO_COUNT * centers,
        )
        if not self.refill or self.num_clusters == 1:
            return stats

        def refilled(stats: KMeansStats) -> KMeansStats:
            return _refill(stats, self.degenerate(stats), centers, rows, weights, posterior.label, -posterior.evidence)

        return jax.lax.cond(jnp.any(self.degenerate(stats)), refilled, lambda stats: stats, stats)

    e_step = latents.e_step

    def m_step(self, stats: KMeansStats) -> KMeansParams:
        """The mean of each cluster's rows; an empty cluster keeps its centre."""
        count = stats.count[:, None]
        return KMeansParams(centers=stats.reference / count + stats.first / count)

    def q_function(self, params: KMeansParams, stats: KMeansStats) -> jax.Array:
        """Minus the squared distances of rows to their clusters' centres, summed; linear in stats of one reference."""
        return -self.rebase(stats, params).scatter

    def log_prior(self, params: KMeansParams) -> jax.Array:
        """0: there is no prior."""
        return jnp.zeros((), params.centers.dtype)

    def rebase(self, stats: KMeansStats, params: KMeansParams) -> KMeansStats:
        """The same statistics about the centres of `params`, exactly."""
        count = stats.count[:, None]
        delta = stats.reference / count - params.centers
        first = stats.first + count * delta
        return dataclasses.replace(
            stats,
            reference=count * params.centers,
            first=first,
            scatter=stats.scatter + jnp.sum(delta * (stats.first + first)),
        )

    def degenerate(self, stats: KMeansStats) -> jax.Array:
        """Clusters (K,) that are empty."""
        # Every block of rows adds a pseudo-count: up to a million of them still count as empty.
        return stats.count <= 2**20 * _PSEUDO_COUNT

    @parameters.at_rows
    @jax.jit
    def predict(self, params: KMeansParams, x: Data) -> jax.Array:
        """The nearest centre of each row: (N,), whole numbers."""
        rows = checks.matrix("x", x)
        return _nearest(params.centers, rows, _anchor(rows))[0]

    @parameters.at_rows
    @jax.jit
    def transform(self, params: KMeansParams, x: Data) -> jax.Array:
        """Distance of each row to each centre: (N, K)."""
        rows, centers = checks.matrix("x", x), params.centers

        def distances(rows: jax.Array) -> jax.Array:
            square = jnp.sum(jnp.square(rows[:, None] - centers[None]), axis=-1)
            return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)

        return tree.map_over_blocks(distances, rows, _block_size(centers, rows))

    def inertia(self, params: KMeansParams, x: Data, weights: jax.Array | None = None) -> jax.Array:
        """Sum over rows of weight x squared distance to the nearest centre."""
        return -self.partial().e_step(params, x, weights).loglik

    def num_parameters(self, params: KMeansParams) -> int:
        """Free parameters: K D."""
        centers = params.centers if isinstance(params, KMeansParams) else None
        parameters.count_of("params.centers", centers, self.num_clusters)
        return int(jnp.size(params.centers))

    def unconstrain(self, params: KMeansParams) -> KMeansParams:
        """Centres are free as they are."""
        return params

    def constrain(self, theta: KMeansParams) -> KMeansParams:
        """Inverse of `unconstrain`."""
        return theta

    def check(self, x: Data, weights: jax.Array | None = None) -> None:
        """Raise ValueError or TypeError for bad data, by name. Under jit only shapes are looked at."""
        checks.finite_matrix("x", checks.present(x, weights))
        rows = tree.num_rows(x)
        checks.row_weights(weights, rows)
        checks.enough_rows(rows, weights, self.num_clusters, "clusters")

    def params_like(self, x: Data) -> KMeansParams:
        """The shapes that parameters have for such data."""
        shape = (self.num_clusters, checks.row_shape("x", x)[1])
        return KMeansParams(centers=parameters.like(shape, tree.float_dtype(x)))

    def partial(self) -> "KMeans":
        """The model for a part of the rows, where an empty cluster may have rows elsewhere: without refilling."""
        return dataclasses.replace(self, refill=False)


def _block_size(centers: jax.Array, rows: jax.Array) -> int:
    """Rows a block, blocks about equally long: scores of its rows against all centres fit in cache.

    At least two blocks, since XLA keeps the results of a loop in memory: without a loop it would compute the
    nearest centres anew for every column that uses them.
    """
    largest = tree.rows_per_block(tuning.SCORES_PER_BLOCK * max(tuning.FEWEST_CENTRES, centers.shape[0]), rows.dtype)
    return -(-rows.shape[0] // max(2, -(-rows.shape[0] // largest)))


def _anchor(rows: jax.Array) -> jax.Array:
    """A point (D,) amid the rows: about it the terms of |x|² - 2 c·x + |c|² are small, and little cancels.

    The mean of some rows, each column rounded to a multiple of a power of two near its spread: rows of few
    binary digits are then subtracted exactly, and ties stay ties. (A mean of all rows would cost a good part
    of a step; with a mean of the centres, restarts could not share the anchor.)
    """
    some = rows[:: max(1, rows.shape[0] // tuning.ANCHOR_ROWS)]
    mean, variance = jnp.mean(some, axis=0), jnp.var(some, axis=0)
    grid = jnp.exp2(jnp.floor(0.5 * jnp.log2(jnp.where(variance > 0, variance, 1))))
    return jnp.where(variance > 0, jnp.round(mean / grid) * grid, mean)


def _nearest(centers: jax.Array, rows: jax.Array, anchor: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First nearest centre c of each row (N,), and c·x - |c|²/2 with both about the anchor: larger is nearer."""
    centers = jax.lax.stop_gradient(centers - anchor[None])
    half = 0.5 * jnp.sum(jnp.square(centers), axis=1, keepdims=True)

    def block(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        score, label = numerics.first_argmax(numerics.product(centers, rows - anchor[None], "kd,nd->kn") - half)
        return label, score

    return tree.map_over_blocks(block, rows, _block_size(centers, rows))


def _moments(centers: jax.Array, rows: jax.Array, label: jax.Array, weights: jax.Array | None) -> KMeansStats:
    """Statistics of rows with these clusters, `label` (N,), from residuals x - c that are not expanded."""
    residual = rows - centers.at[label].get(mode="promise_in_bounds")
    one = jnp.ones_like(rows[:, :1]) if weights is None else weights.astype(rows.dtype)[:, None]
    # A scatter of short rows is several times faster than a product with indicators.
    sums = jnp.zeros((len(centers), rows.shape[1] + 1), rows.dtype)
    sums = sums.at[label].add(jnp.concatenate([one * residual, one], axis=1), mode="promise_in_bounds")
    scatter = jnp.sum(jnp.where(one > 0, one * jnp.square(residual), 0))
    count = sums[:, -1]
    return KMeansStats(
        count=count, reference=count[:, None] * centers, first=sums[:, :-1], scatter=scatter, loglik=-scatter
    )


def _refill(
    stats: KMeansStats,
    empty: jax.Array,
    centers: jax.Array,
    rows: jax.Array,
    weights: jax.Array | None,
    label: jax.Array,
    distance: jax.Array,
) -> KMeansStats:
    """Statistics in which each empty cluster, a mask (K,), has one of the farthest rows, taken from its own cluster.

    Candidates are the farthest rows of residue classes of row numbers, K classes or a few more: no sort is needed.
    """
    count, eps = len(centers), jnp.finfo(rows.dtype).eps
    classes = tuning.CLASSES_MULTIPLE * -(-count // tuning.CLASSES_MULTIPLE)
    usable = distance if weights is None else jnp.where(weights > 0, distance, -jnp.inf)
    padded = jnp.pad(usable, (0, -len(rows) % classes), constant_values=-jnp.inf).reshape(-1, classes)
    top, lap = numerics.first_argmax(padded)
    candidate = jnp.minimum(lap * classes + jnp.arange(classes), len(rows) - 1)

    # Squared distances of candidates are computed without expansion; a row on its centre, up to rounding, is none.
    donor, point = label[candidate], rows[candidate]
    gap = point - centers[donor]
    far = (top > -jnp.inf) & jnp.any(jnp.abs(gap) > 8 * eps * jnp.abs(point), axis=1)
    square = jnp.where(far, jnp.sum(jnp.square(gap), axis=1), -1)
    index = jnp.arange(classes)
    first = index[None] < index[:, None]
    before = (square[None] > square[:, None]) | ((square[None] == square[:, None]) & first)
    rank = jnp.sum(before, axis=1)

    # The candidate of rank i goes to the i-th empty cluster; K stands for none.
    order = (
        jnp.full(classes, count)
        .at[jnp.where(empty, jnp.cumsum(empty) - 1, classes)]
        .set(jnp.arange(count), mode="drop")
    )
    target = jnp.where(far, order[rank], count)
    weight = jnp.ones(classes, rows.dtype) if weights is None else weights[candidate].astype(rows.dtype)
    given = jnp.where(target < count, weight, 0)

    def lost(values: jax.Array) -> jax.Array:
        return jnp.zeros((count, *values.shape[1:]), rows.dtype).at[donor].add(values)

    left = stats.count - lost(given)
    # A donor left with next to no weight would have rounding errors as moments: it counts as empty.
    bare = (left <= jnp.sqrt(eps) * stats.count) & ~empty
    left = jnp.where(bare, _PSEUDO_COUNT, left)
    first = jnp.where(bare[:, None], 0, stats.first - lost(given[:, None] * gap))
    return dataclasses.replace(
        stats,
        count=left.at[target].set(weight, mode="drop"),
        reference=(left[:, None] * centers).at[target].set(weight[:, None] * point, mode="drop"),
        first=first.at[target].set(0, mode="drop"),
        scatter=stats.scatter - jnp.sum(given[:, None] * jnp.square(gap)),
    )


def _kmeans_parallel(key: jax.Array, rows: jax.Array, weights: jax.Array | None, count: int) -> jax.Array:
    """k-means|| (Bahmani et al. 2012): centres (K, D) among the rows.

    Every round draws 2 K rows without replacement, in place of independent draws, so that shapes are static.
    """
    weights = jnp.ones(len(rows), rows.dtype) if weights is None else weights.astype(rows.dtype)
    many = min(2 * count, len(rows))
    first, _ = seeding.random_rows(key, rows, weights, 1)

    def go_to(candidates: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Which candidate (N,) is nearest, and the squared distance to it, exactly."""
        points = rows[candidates]
        label, _ = _nearest(points, rows, _anchor(rows))
        return label, jnp.sum(jnp.square(rows - points[label]), axis=1)

    def draw(carry: tuple[jax.Array, jax.Array], turn: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        distance, nearest = carry
        noise = jax.random.gumbel(jax.random.fold_in(key, turn), distance.shape, rows.dtype)
        score, drawn = jax.lax.top_k(numerics.safe_log(weights * distance) + noise, many)
        # Where fewer rows are left, the first candidate fills the places: it is no nearer to any row than before.
        drawn = jnp.where(score > -jnp.inf, drawn, first[0])
        label, fresh = go_to(drawn)
        closer = fresh < distance
        nearest = jnp.where(closer, 1 + (turn - 1) * many + label, nearest)
        return (jnp.minimum(fresh, distance), nearest), drawn

    start = (go_to(first)[1], jnp.zeros(len(rows), jnp.int32))
    (_, nearest), drawn = jax.lax.scan(draw, start, jnp.arange(1, _ROUNDS + 1, dtype=jnp.int32))
    candidates = jnp.concatenate([first, drawn.ravel()])
    mass = jnp.zeros(len(candidates), rows.dtype).at[nearest].add(weights)
    seeds, _ = seeding.kmeans_plusplus(jax.random.fold_in(key, 0), rows[candidates], mass, count)
    return rows[candidates[seeds]]
