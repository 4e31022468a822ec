"""Row weights: any real dtype will do, and a row of weight 0 is absent, whatever it holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import quick_start, zoo

from jaxem import KMeans, Mixture, Normal, Status, aic, bic, datasets, em_fit, fit_restarts, icl

# One entry for every way to take statistics of floating-point rows.
FLOATS = (
    "full",
    "full, expanded",
    "diag, missing",
    "student t",
    "linear regression",
    "gamma",
    "directions",
    "kmeans",
    "hmm",
)


# 1e20, and what NetCDF puts where nothing was measured.
FILLS = (1e20, 9.96921e36)


@pytest.mark.parametrize("name", FLOATS)
def test_a_row_of_weight_0_is_absent_whatever_it_holds(name):
    """Starts and fits are those with an ordinary row of weight 0, which the laws take for no row."""
    model, x = zoo()[name]
    x = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32 if leaf.dtype.kind == "f" else None), x)
    weights = jnp.ones(jax.tree.leaves(x)[0].shape[0]).at[jnp.array([0, 5])].set(0)

    @jax.jit
    def everything(x):
        start = model.init(jax.random.key(1), x, weights, method="random_rows")
        return start, em_fit(model, start, x, weights, tol=-1.0, max_steps=3)

    def filled(fill):
        return jax.tree.map(lambda leaf: leaf.at[jnp.array([0, 5])].set(fill) if leaf.dtype == jnp.float32 else leaf, x)

    expected = everything(x)
    model.check(filled(FILLS[0]), weights)
    for fill in FILLS:
        got = everything(filled(fill))
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
            a, b = np.asarray(a, float), np.asarray(b, float)
            assert np.all(np.isfinite(b)), path
            # "auto" may choose another arithmetic where a row seems far away: the rounding of float32.
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * (1 + np.max(np.abs(b))), err_msg=str(path))


def test_statistics_do_not_see_rows_of_weight_0():
    model, x = zoo()["linear regression"]
    x = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32 if leaf.dtype.kind == "f" else None), x)
    weights = jnp.ones(jax.tree.leaves(x)[0].shape[0]).at[5].set(0)
    start = model.init(jax.random.key(1), x, weights, method="random_rows")
    filled = jax.tree.map(lambda leaf: leaf.at[5].set(FILLS[1]) if leaf.dtype == jnp.float32 else leaf, x)
    expected, got = (model.e_step(start, rows, weights) for rows in (x, filled))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.max(np.abs(b)))


# One for every door: rows of a mixture, pairs, sequences, tables without and with holes, answers.
DOORS = (
    "full, expanded",
    "student t regression",
    "multivariate normal, missing",
    "factor analysis",
    "kmeans",
    "hmm",
    "linear system, diag, biases",
)


@pytest.mark.parametrize("name", DOORS)
def test_statistics_under_a_jit_of_the_users_own_do_not_see_rows_of_weight_0(name):
    model, x = zoo()[name]
    x = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32) if leaf.dtype.kind == "f" else leaf, x)
    rows = len(jax.tree.leaves(x)[0])
    weights = np.where(np.arange(rows) == 5, 0, 1)
    start = model.init(jax.random.key(1), x, weights, **quick_start(model))

    def filled(fill):
        def of(leaf):
            at = np.expand_dims(weights == 0, tuple(range(1, leaf.ndim)))
            return np.where(at, np.float32(fill), leaf) if leaf.dtype == np.float32 else leaf

        return jax.tree.map(of, x)

    e_step = jax.jit(lambda params, x, weights: model.e_step(params, x, weights))
    expected = e_step(start, x, weights)
    for fill in (FILLS[1], np.nan, np.inf):
        for a, b in zip(jax.tree.leaves(e_step(start, filled(fill), weights)), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.max(np.abs(b), initial=0))


@pytest.mark.parametrize("method", ["k-means++", "greedy-k-means++", "k-means||", "random_rows"])
def test_seeds_do_not_see_rows_of_weight_0(method):
    rows = np.asarray(datasets.faithful(), np.float32)
    weights = (np.arange(len(rows)) % 7 > 0).astype(np.float32)
    filled = np.where(weights[:, None] > 0, rows, np.float32(FILLS[1]))
    centers = KMeans(3).init(jax.random.key(2), filled, weights, method=method).centers
    assert all(np.any(np.all(rows[weights > 0] == center, axis=1)) for center in np.asarray(centers))
    if method in ("k-means++", "random_rows"):
        params = Mixture(Normal(), 3).init(jax.random.key(2), filled, weights, method=method)
        expected = Mixture(Normal(), 3).init(jax.random.key(2), rows, weights, method=method)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), params, expected)


def test_restarts_do_not_see_rows_of_weight_0():
    rows = np.asarray(datasets.faithful(), np.float32)
    weights = (np.arange(len(rows)) % 7 > 0).astype(np.float32)
    filled = np.where(weights[:, None] > 0, rows, np.float32(FILLS[1]))
    model = Mixture(Normal(), 2)
    best = [
        fit_restarts(model, jax.random.key(0), x, weights, num_restarts=4, certify=False).best for x in (filled, rows)
    ]
    assert best[0].status == Status.CONVERGED
    np.testing.assert_allclose(best[0].objective, best[1].objective, rtol=1e-6)


def test_kmeans_far_from_the_origin_with_every_fourth_row_held_out(x64):
    """4096 rows, of which every fourth is one that the distances' origin is taken from."""
    random = np.random.default_rng(0)
    x = 1e4 + random.integers(0, 4, 4096)[:, None] + 0.05 * random.normal(size=(4096, 2))
    weights = (np.arange(4096) % 4 > 0).astype(float)
    start = {"centers": np.array([[1e4, 1e4], [1e4 + 1, 1e4 + 1], [1e4 + 2, 1e4 + 2], [1e4 + 3, 1e4 + 3]]) + 0.2}
    single, double = (np.asarray(x, dtype) for dtype in (np.float32, np.float64))
    double = single.astype(float)
    model, found = KMeans(4), []
    for rows in (single, double):
        params = model.init(jax.random.key(0), rows[:8])
        params = type(params)(centers=jnp.asarray(start["centers"], rows.dtype))
        fit = em_fit(model, params, rows, weights.astype(rows.dtype), tol=0.0).check()
        found.append(np.asarray(fit.params.centers, float))
    np.testing.assert_allclose(found[0], found[1], atol=2e-3)


@pytest.mark.parametrize("dtype", ["float16", "int32", "float64"])
def test_weights_of_any_dtype_count_as_they_are(dtype, x64):
    """80,000 rows, which float16 cannot sum; and whole numbers that sum to more than an int32 holds."""
    rows = np.tile(np.asarray(datasets.faithful(), np.float32), (295, 1))[:80_000]
    each = 32_768 if dtype == "int32" else 1  # a power of two rounds as 1 does
    weights = np.full(len(rows), each, dtype)
    model = Mixture(Normal("diag"), 2)
    start = model.params_from_responsibilities(rows, (rows[:, 1] > 68).astype(int), weights)
    fit, plain = (em_fit(model, start, rows, w, max_steps=2, tol=-1.0) for w in (weights, None))
    assert fit.objective.dtype == jnp.float32
    np.testing.assert_allclose(fit.objective, each * plain.objective, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(fit.params), jax.tree.leaves(plain.params), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-5)
    free = model.num_parameters(start)
    deviance = -2 * float(fit.loglik)
    np.testing.assert_allclose(aic(model, fit.params, rows, weights), deviance + 2 * free, rtol=1e-5)
    size = np.log(float(each) * len(rows))
    np.testing.assert_allclose(bic(model, fit.params, rows, weights), deviance + free * size, rtol=1e-5)
    assert np.isfinite(icl(model, fit.params, rows, weights))
