"""k-means: known answers, scikit-learn from the same start, empty clusters, ties, seeds."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import KMeans as SklearnKMeans

from jaxem import EM, Blocks, Hard, KMeans, KMeansParams, Status, em_fit, fit_restarts
from jaxem.datasets import iris
from jaxem.models.kmeans import INITS
from jaxem.testing import LAWS, check_model

RNG = np.random.default_rng(11)
LABELS = RNG.integers(0, 5, 300)
X = 6 * RNG.normal(size=(5, 3))[LABELS] + RNG.normal(size=(300, 3))


def peer(x, start, weights=None, steps=300):
    """scikit-learn's Lloyd from exactly this start."""
    model = SklearnKMeans(len(start), init=np.asarray(start), n_init=1, max_iter=steps, tol=0, algorithm="lloyd")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.fit(np.asarray(x), sample_weight=weights)


def exact_inertia(x, centers):
    x, centers = np.asarray(x, float), np.asarray(centers, float)
    return np.sum(np.min(np.sum((x[:, None] - centers) ** 2, axis=2), axis=1))


def at(rows):
    return KMeansParams(centers=jnp.asarray(rows))


# K = 1 is the total sum of squares; the others are the best known, which any package finds from many starts.
@pytest.mark.parametrize(("count", "inertia"), [(1, 681.3706), (2, 152.3480), (3, 78.85144), (4, 57.22847)])
def test_iris(count, inertia, x64):
    runs = fit_restarts(KMeans(count), jax.random.key(0), jnp.asarray(iris()[0]), num_restarts=16, tol=0.0).check()
    assert -float(runs.best.objective) == pytest.approx(inertia, rel=1e-6)


@pytest.mark.parametrize("count", [5, 6])
def test_iris_against_the_best_of_scikit_learn(count, x64):
    runs = fit_restarts(KMeans(count), jax.random.key(0), jnp.asarray(iris()[0]), num_restarts=32, tol=0.0).check()
    best = SklearnKMeans(count, n_init=20, random_state=0, tol=0).fit(iris()[0]).inertia_
    assert -float(runs.best.objective) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("weights", [None, RNG.integers(0, 4, 300).astype(float)], ids=["", "weighted"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_scikit_learn_from_the_same_start(seed, weights, x64):
    start = X[np.random.default_rng(seed).choice(300, 5, replace=False)]
    theirs = peer(X, start, weights)
    model = KMeans(5)
    ours = em_fit(model, at(start), X, weights, tol=0.0).check()
    np.testing.assert_allclose(ours.params.centers, theirs.cluster_centers_, rtol=1e-10)
    assert -float(ours.objective) == pytest.approx(theirs.inertia_, rel=1e-10)
    assert float(model.inertia(ours.params, X, weights)) == pytest.approx(theirs.inertia_, rel=1e-10)
    np.testing.assert_array_equal(model.predict(ours.params, X), theirs.labels_)
    np.testing.assert_allclose(model.transform(ours.params, X), theirs.transform(X), rtol=1e-9)


def test_weights_are_repeats(x64):
    weights = RNG.integers(0, 3, 300)
    start = at(X[np.flatnonzero(weights)[:4]])
    weighted = em_fit(KMeans(4), start, X, weights.astype(float), tol=0.0)
    repeated = em_fit(KMeans(4), start, np.repeat(X, weights, axis=0), tol=0.0)
    np.testing.assert_allclose(weighted.params.centers, repeated.params.centers, rtol=1e-10)
    assert float(weighted.objective) == pytest.approx(float(repeated.objective), rel=1e-10)


@pytest.mark.parametrize("scale", [1e-12, 1e6])
def test_the_units_of_the_data_do_not_matter(scale):
    x = X.astype(np.float32)
    model = KMeans(5)
    start = at(x[:5])
    plain = em_fit(model, start, x, tol=0.0)
    scaled = em_fit(model, at(scale * start.centers), np.float32(scale) * x, tol=0.0)
    assert abs(int(scaled.num_steps) - int(plain.num_steps)) <= 1
    np.testing.assert_array_equal(model.predict(plain.params, x), model.predict(scaled.params, np.float32(scale) * x))


def test_without_refill_statistics_add_even_where_a_cluster_is_empty(x64):
    check_model(KMeans(3, refill=False), at([[0.0] * 3, [99.0] * 3, [1.0] * 3]), X[:20], skip=set(LAWS) - {"additive"})


def test_blocks_are_the_whole(x64):
    """More rows than the model's own blocks hold, their number not a multiple; Blocks(64) splits them otherwise."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(1301, 3)) + 5 * rng.integers(0, 3, 1301)[:, None]
    start = at(x[:6])
    whole = em_fit(KMeans(6), start, x, tol=-1.0, max_steps=5)
    parts = em_fit(KMeans(6), start, x, algorithm=EM(gather=Blocks(64)), tol=-1.0, max_steps=5)
    theirs = peer(x, x[:6], steps=5)
    np.testing.assert_allclose(parts.params.centers, whole.params.centers, rtol=1e-10)
    np.testing.assert_allclose(parts.history, whole.history, rtol=1e-10)
    np.testing.assert_allclose(whole.params.centers, theirs.cluster_centers_, rtol=1e-10)
    np.testing.assert_array_equal(KMeans(6).predict(whole.params, x), theirs.labels_)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shift", [0.0, 0.25, 1000.0])
def test_ties_go_to_the_first_centre_in_blocks_and_whole(dtype, shift, x64):
    grid = np.stack(np.meshgrid(np.arange(9.0), np.arange(7.0)), axis=-1).reshape(-1, 2) + shift
    x = jnp.asarray(np.tile(grid, (5, 1)), dtype)
    centers = np.array([[0.0, 0.0], [8.0, 0.0], [8.0, 0.0], [8.0, 6.0], [0.0, 6.0], [4.0, 3.0], [0.0, 0.0]]) + shift
    square = np.sum((np.asarray(x, float)[:, None] - centers) ** 2, axis=2)
    expected = np.argmin(square, axis=1)
    params, model = at(centers.astype(dtype)), KMeans(7, refill=False)
    assert np.any(np.sum(square == square.min(axis=1, keepdims=True), axis=1) > 2)
    np.testing.assert_array_equal(model.predict(params, x), expected)
    for size in (7, 50, 315):
        stats = EM(gather=Blocks(size)).init(model, params, x).stats
        np.testing.assert_allclose(stats.count, np.bincount(expected, minlength=7), atol=1e-9)


def test_empty_clusters_are_refilled_by_far_rows(x64):
    """All centres but one far away: afterwards every cluster has rows, and the inertia never rose."""
    start = np.concatenate([X[:1], 1e3 + 10 * RNG.normal(size=(4, 3))])
    result = em_fit(KMeans(5), at(start), X, tol=0.0).check()
    assert len(np.unique(KMeans(5).predict(result.params, X))) == 5
    history = np.asarray(result.history[: int(result.num_steps) + 1])
    assert np.all(np.diff(history) >= -1e-9 * np.abs(history[0]))
    without = em_fit(KMeans(5, refill=False), at(start), X, tol=0.0)
    assert int(without.status) == Status.DEGENERATE
    np.testing.assert_array_equal(without.params.centers[1:], start[1:])
    assert float(result.objective) > float(without.objective)


def test_a_refill_moves_the_farthest_row_and_only_that(x64):
    x = np.concatenate([np.zeros((40, 1)), np.ones((40, 1)), [[30.0], [50.0]]])
    weights = np.ones(82)
    params = at([[0.0], [1000.0], [1.0]])
    stats = KMeans(3).e_step(params, x, weights)
    np.testing.assert_allclose(stats.count, [40, 1, 41])
    np.testing.assert_allclose(KMeans(3).m_step(stats).centers, [[0], [50], [70 / 41]])
    assert float(stats.loglik) == -float(29**2 + 49**2)
    weights[81] = 0
    moved = KMeans(3).m_step(KMeans(3).e_step(params, x, weights))
    np.testing.assert_allclose(moved.centers, [[0], [30], [1]])
    occupied = KMeans(3, refill=True).e_step(at([[0.0], [40.0], [1.0]]), x)
    jax.tree.map(np.testing.assert_array_equal, occupied, KMeans(3, refill=False).e_step(at([[0.0], [40.0], [1.0]]), x))


def test_refills_in_many_lanes_and_in_float32():
    starts = at(jnp.asarray(1e2 * RNG.normal(size=(16, 12, 3)), jnp.float32))
    runs = fit_restarts(KMeans(12), None, jnp.asarray(X, jnp.float32), init=starts, tol=0.0)
    assert np.all(runs.status == Status.CONVERGED)
    labels = jax.vmap(KMeans(12).predict, in_axes=(0, None))(runs.params, jnp.asarray(X, jnp.float32))
    assert all(len(np.unique(row)) == 12 for row in labels)
    assert np.all(runs.largest_decrease <= 1e-5 * jnp.abs(runs.objective))


def test_fewer_distinct_rows_than_clusters_is_degenerate_and_finite():
    x = jnp.asarray(np.repeat([[0.1, 0.2], [3.3, 1e3], [5.7, 5.1]], 20, axis=0), jnp.float32)
    for method in ("k-means++", "k-means||"):
        model = KMeans(5)
        result = em_fit(model, model.init(jax.random.key(0), x, method=method), x)
        assert int(result.status) == Status.DEGENERATE
        assert np.all(np.isfinite(result.params.centers))
        assert float(-result.objective) < 1e-3


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_float32_far_from_the_origin(offset):
    rng = np.random.default_rng(3)
    x = (offset + rng.normal(size=(2000, 4)) + 3 * rng.integers(0, 4, 2000)[:, None]).astype(np.float32)
    start = at(x[:4])
    single = em_fit(KMeans(4), start, x, tol=-1.0, max_steps=30)
    with jax.enable_x64(True):
        double = em_fit(KMeans(4), at(x[:4].astype(float)), x.astype(float), tol=-1.0, max_steps=30)
        np.testing.assert_allclose(single.params.centers, double.params.centers, rtol=3e-7, atol=1e-4)
    assert -float(single.objective) == pytest.approx(exact_inertia(x, single.params.centers), rel=2e-6)


def test_float32_inertia_of_tight_clusters():
    """Widths of 1e-3 of the spread: expanded distances would have lost every digit."""
    rng = np.random.default_rng(4)
    x = (
        np.repeat([[0.0, 0.0], [50.0, 10.0], [20.0, 90.0]], 400, axis=0) + 0.03 * rng.normal(size=(1200, 2)) + 500
    ).astype(np.float32)
    result = em_fit(KMeans(3), at(x[[0, 400, 800]]), x)
    assert -float(result.objective) == pytest.approx(exact_inertia(x, result.params.centers), rel=1e-5)


def test_jit_vmap_and_hard_em_are_the_same(x64):
    model, start = KMeans(4), at(X[:4])
    plain = em_fit(model, start, X, max_steps=10)
    hard = jax.jit(em_fit)(model, start, X, algorithm=EM(expect=Hard()), max_steps=10)
    both = jax.vmap(lambda c: em_fit(model, KMeansParams(centers=c), X, max_steps=10))(jnp.stack([X[:4], X[9:13]]))
    for other in (hard.params, jax.tree.map(lambda leaf: leaf[0], both.params)):
        np.testing.assert_allclose(other.centers, plain.params.centers, rtol=1e-12)


def test_one_column_of_whole_numbers():
    with pytest.warns(UserWarning, match="int"):
        result = em_fit(KMeans(2), at([[0.0], [1.0]]), np.arange(10))
    np.testing.assert_allclose(result.params.centers, [[2.0], [7.0]])


WEIGHTS = np.where(np.arange(300) % 3 == 0, 0.0, 1.0 + np.arange(300) % 2).astype(np.float32)


@functools.cache
def seeds(method):
    """Numbers (100, 6) of the rows that are seeds."""
    x, weights = jnp.asarray(X, jnp.float32), jnp.asarray(WEIGHTS)
    keys = jax.random.split(jax.random.key(5), 100)
    centers = jax.vmap(lambda key: KMeans(6).init(key, x, weights, method=method).centers)(keys)
    index = np.argmin(np.sum((np.asarray(centers)[:, :, None] - np.asarray(x)) ** 2, axis=3), axis=2)
    np.testing.assert_array_equal(np.asarray(x)[index], centers)
    return index


@pytest.mark.parametrize("method", INITS)
def test_seeds_are_distinct_rows_of_positive_weight(method):
    index = seeds(method)
    assert all(len(set(row)) == 6 for row in index.tolist())
    assert np.all(WEIGHTS[index] > 0)
    assert len({tuple(sorted(row)) for row in index.tolist()}) > 50


def test_careful_seeding_is_worth_it():
    inertia = {method: np.mean([exact_inertia(X, X[row]) for row in seeds(method)]) for method in INITS}
    assert inertia["greedy-k-means++"] < inertia["k-means++"] < inertia["random_rows"]
    assert inertia["k-means||"] < inertia["random_rows"]


def test_rebase_moves_the_reference_exactly(x64):
    model, before, after = KMeans(4), at(X[:4]), at(X[4:8])
    stats = model.e_step(before, X)
    moved = model.rebase(stats, after)
    np.testing.assert_allclose(moved.reference, stats.count[:, None] * after.centers)
    np.testing.assert_allclose(model.m_step(moved).centers, model.m_step(stats).centers, rtol=1e-12)
    assert float(model.q_function(before, moved)) == pytest.approx(float(stats.loglik), rel=1e-12)


def test_bad_input_is_refused_by_name():
    model, start = KMeans(3), at(jnp.zeros((3, 3)))
    with pytest.raises(TypeError, match="num_clusters"):
        KMeans(2.0)
    with pytest.raises(ValueError, match="num_clusters"):
        KMeans(0)
    with pytest.raises(ValueError, match="method must be one of 'k-means"):
        model.init(jax.random.key(0), X, method="forgy")
    with pytest.raises(TypeError, match="key"):
        model.init(0, X)
    with pytest.raises(ValueError, match="num_clusters=3"):
        model.init(jax.random.key(0), X[:2])
    with pytest.raises(ValueError, match="weights must have shape"):
        em_fit(model, start, X, np.ones(3))
    with pytest.raises(ValueError, match="x must be finite"):
        em_fit(model, start, np.where(np.arange(900).reshape(300, 3) == 7, np.nan, X))
    with pytest.raises(ValueError, match=r"params\.centers must have shape"):
        em_fit(model, start, X[:, :2])
    with pytest.raises(ValueError, match="centers must have shape"):
        em_fit(model, at(jnp.zeros((4, 3))), X)
    with pytest.raises(TypeError, match="expect must be Exact"):
        model.e_step(start, jnp.asarray(X), expect="soft")


def test_parameters_are_counted_and_free(x64):
    model, params = KMeans(4), at(X[:4])
    assert model.num_parameters(params) == 12
    assert model.constrain(model.unconstrain(params)) == params
    assert dataclasses.replace(model, refill=False) == model.partial()
