"""Where fits start: seeds drawn by the law that is promised, weights respected, all of it key by key."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxem import Mixture, Normal, params_from_responsibilities
from jaxem.seeding import METHODS, kmeans_plusplus, random_rows

RNG = np.random.default_rng(4)
X = (RNG.normal(size=(40, 2)) + 5 * RNG.integers(0, 3, 40)[:, None]).astype(np.float32)
WEIGHTS = RNG.integers(0, 3, 40).astype(np.float32)
LABELS = RNG.integers(0, 3, 40)
MODEL = Mixture(Normal("full"), 3)
DRAWS = 20_000
# Five points in line, one of them without weight.
POINTS = jnp.array([[0.0], [1.0], [3.0], [7.0], [4.0]])
MASS = np.array([1.0, 2.0, 1.0, 0.5, 0.0])
# Chance of a false alarm, which fixed keys turn into never or always.
LEVEL = 1e-3


def draw_many(seeding, num_seeds):
    """Seeds (DRAWS, num_seeds) among the five points."""
    keys = jax.random.split(jax.random.key(11), DRAWS)
    weights = jnp.asarray(MASS, jnp.float32)
    return np.asarray(jax.jit(jax.vmap(lambda key: seeding(key, POINTS, weights, num_seeds)[0]))(keys))


def assert_drawn_from(counts, probabilities):
    """Pearson's chi-square test; what is impossible never came."""
    possible = probabilities > 0
    assert np.all(counts[~possible] == 0)
    assert stats.chisquare(counts[possible], counts.sum() * probabilities[possible]).pvalue > LEVEL


def pairs_of(seeds):
    return np.bincount(5 * seeds[:, 0] + seeds[:, 1], minlength=25).reshape(5, 5)


def test_kmeans_plusplus_draws_by_weight_times_squared_distance():
    positions = np.asarray(POINTS)[:, 0]
    first = MASS / MASS.sum()
    gap = MASS * (positions[:, None] - positions) ** 2
    expected = first[:, None] * gap / gap.sum(axis=1, keepdims=True)
    assert_drawn_from(pairs_of(draw_many(kmeans_plusplus, 2)).ravel(), expected.ravel())


def test_the_third_seed_counts_the_distance_to_the_nearest_of_two():
    seeds = draw_many(kmeans_plusplus, 3)
    after = seeds[(seeds[:, 0] == 1) & (seeds[:, 1] == 3)][:, 2]
    positions = np.asarray(POINTS)[:, 0]
    mass = MASS * np.minimum((positions - 1.0) ** 2, (positions - 7.0) ** 2)
    assert len(after) > 1000
    assert_drawn_from(np.bincount(after, minlength=5), mass / mass.sum())


def test_random_rows_draws_by_weight_without_replacement():
    first = MASS / MASS.sum()
    expected = first[:, None] * first / (1 - first)[:, None]
    np.fill_diagonal(expected, 0)
    assert_drawn_from(pairs_of(draw_many(random_rows, 2)).ravel(), expected.ravel())


@pytest.mark.parametrize("seeding", [kmeans_plusplus, random_rows])
def test_seeds_are_different_rows_and_every_row_goes_to_its_nearest(seeding):
    points = jnp.asarray(X)
    keys = jax.random.split(jax.random.key(2), 50)
    seeds, nearest = jax.jit(jax.vmap(lambda key: seeding(key, points, None, 4)))(keys)
    for row in range(50):
        assert len(set(seeds[row].tolist())) == 4
        distance = np.sum((X[:, None] - X[np.asarray(seeds[row])]) ** 2, axis=2)
        np.testing.assert_allclose(distance[np.arange(40), nearest[row]], distance.min(axis=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seeding", [kmeans_plusplus, random_rows])
def test_rows_without_weight_are_never_seeds(seeding):
    keys = jax.random.split(jax.random.key(3), 500)
    draw = jax.jit(jax.vmap(lambda key: seeding(key, jnp.asarray(X), jnp.asarray(WEIGHTS), 4)[0]))
    seeds = np.asarray(draw(keys))
    assert np.all(WEIGHTS[seeds] > 0)
    assert set(np.unique(seeds)) == set(np.flatnonzero(WEIGHTS > 0))


def test_kmeans_plusplus_falls_back_on_weights_where_no_distance_is_left():
    points, weights = jnp.zeros((6, 1)), jnp.array([0.0, 1.0, 1.0, 0.0, 2.0, 0.0])
    keys = jax.random.split(jax.random.key(5), 200)
    seeds, _ = jax.jit(jax.vmap(lambda key: kmeans_plusplus(key, points, weights, 3)))(keys)
    assert set(np.unique(seeds)) == {1, 2, 4}


@functools.cache
def starts(method, weighted=False):
    """Eight starts, vmapped over keys."""
    keys = jax.random.split(jax.random.key(6), 8)
    weights = WEIGHTS if weighted else None
    return keys, jax.vmap(lambda key: MODEL.init(key, X, weights, method=method))(keys)


@pytest.mark.parametrize("method", METHODS)
def test_starts_are_proper_reproducible_and_different(method):
    keys, many = starts(method)
    np.testing.assert_allclose(np.sum(many.weights, axis=1), 1, rtol=1e-5)
    assert np.all(np.asarray(many.weights) > 0)
    assert np.all(np.linalg.eigvalsh(many.components.covariance) > 0)
    # k-means++ on clear clusters may well seed them alike under some keys, but not under all.
    assert len({tuple(row) for row in np.asarray(many.weights).tolist()}) > 1
    one = MODEL.init(keys[3], X, method=method)
    again = MODEL.init(keys[3], X, method=method)
    for mine, second, lane in zip(*(jax.tree.leaves(tree) for tree in (one, again, many)), strict=True):
        np.testing.assert_array_equal(mine, second)
        np.testing.assert_allclose(mine, lane[3], rtol=1e-3, atol=1e-4)


# The components of any start are shares of the rows: together they have the data's mean and second moments.
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_components_of_a_start_add_up_to_the_data(method, weighted):
    _, many = starts(method, weighted)
    rows = X.astype(float)
    weights = WEIGHTS.astype(float) if weighted else np.ones(40)
    mean = np.average(rows, axis=0, weights=weights)
    moments = np.einsum("n,ni,nj->ij", weights, rows, rows) / weights.sum()
    share, means = np.asarray(many.weights, float), np.asarray(many.components.mean, float)
    covariance = np.asarray(many.components.covariance, float)
    np.testing.assert_allclose(np.einsum("rk,rkd->rd", share, means), np.tile(mean, (8, 1)), rtol=1e-4)
    found = np.einsum("rk,rkij->rij", share, covariance + means[..., :, None] * means[..., None, :])
    np.testing.assert_allclose(found, np.tile(moments, (8, 1, 1)), rtol=1e-4)


def test_starts_do_not_depend_on_units():
    scale = np.array([1.0, 1024.0], np.float32)
    one, other = MODEL.init(jax.random.key(1), X), MODEL.init(jax.random.key(1), X * scale)
    np.testing.assert_allclose(one.weights, other.weights, rtol=1e-5)
    np.testing.assert_allclose(one.components.mean * scale[None], other.components.mean, rtol=1e-4)


def expected_params(shape, responsibilities):
    """One M-step in the words of a textbook (Bishop, Pattern Recognition and Machine Learning, 9.24 to 9.26)."""
    rows = X.astype(float)
    count = responsibilities.sum(axis=0)
    mean = responsibilities.T @ rows / count[:, None]
    scatter = np.array(
        [
            (responsibilities[:, k, None] * (rows - mean[k])).T @ (rows - mean[k])
            for k in range(responsibilities.shape[1])
        ]
    )
    full = scatter / count[:, None, None]
    covariance = {
        "full": full,
        "tied": scatter.sum(axis=0) / count.sum(),
        "diag": np.diagonal(full, axis1=1, axis2=2),
        "spherical": np.trace(full, axis1=1, axis2=2) / 2,
    }[shape]
    return count / count.sum(), mean, covariance


def assert_params(found, expected):
    weights, mean, covariance = expected
    np.testing.assert_allclose(found.weights, weights, rtol=1e-10)
    np.testing.assert_allclose(found.components.mean, mean, rtol=1e-10)
    np.testing.assert_allclose(found.components.covariance, covariance, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("weights", [None, WEIGHTS.astype(float)], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("shape", ["full", "diag", "tied", "spherical"])
def test_labels_give_the_means_and_covariances_of_their_classes(shape, weights):
    model = Mixture(Normal(shape), 3)
    found = params_from_responsibilities(model, X.astype(float), LABELS, weights)
    counted = np.eye(3)[LABELS] * (np.ones(40) if weights is None else weights)[:, None]
    assert_params(found, expected_params(shape, counted))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("weights", [None, WEIGHTS.astype(float)], ids=["unweighted", "weighted"])
def test_responsibilities_give_their_weighted_means_and_covariances(weights):
    responsibilities = np.random.default_rng(8).dirichlet(np.ones(3), 40)
    found = params_from_responsibilities(MODEL, X.astype(float), responsibilities, weights)
    counted = responsibilities * (np.ones(40) if weights is None else weights)[:, None]
    assert_params(found, expected_params("full", counted))


@pytest.mark.usefixtures("x64")
def test_labels_are_responsibilities_of_zero_and_one():
    x = X.astype(float)
    by_label = params_from_responsibilities(MODEL, x, LABELS)
    by_share = params_from_responsibilities(MODEL, x, np.eye(3)[LABELS])
    for mine, other in zip(jax.tree.leaves(by_label), jax.tree.leaves(by_share), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-12)
