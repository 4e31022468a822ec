"""The small numerical tools: exact where nothing is needed, safe where something is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from jaxem import numerics, tree
from jaxem.latents import lanewise
from jaxem.numerics import tuning


def psd(seed: int, columns: int, rank: int, spread: float) -> np.ndarray:
    """A positive semidefinite matrix of this rank, its columns in units that differ by `spread`."""
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(columns, rank)) * np.geomspace(1, spread, columns)[:, None]
    return factor @ factor.T


@settings(deadline=None, derandomize=True, max_examples=15)
@given(seed=st.integers(0, 10_000), columns=st.sampled_from([1, 3, 10]), spread=st.sampled_from([1.0, 1e-4, 1e6]))
def test_a_good_matrix_is_factored_as_it_is(seed, columns, spread):
    with jax.enable_x64(True):
        matrix = jnp.asarray(psd(seed, columns, 2 * columns + 2, spread))
        factor, lift = numerics.floored_cholesky(matrix, 1e-14 * jnp.diagonal(matrix))
        assert not np.any(lift)
        scale = np.sqrt(np.diagonal(matrix))[:, None]
        np.testing.assert_allclose(factor / scale, np.linalg.cholesky(matrix) / scale, rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose(numerics.cholesky(matrix), factor, rtol=1e-8, atol=1e-12 * scale.max())
        np.testing.assert_allclose(numerics.inverse_lower(factor) @ factor, np.eye(columns), atol=1e-7)


@settings(deadline=None, derandomize=True, max_examples=15)
@given(
    seed=st.integers(0, 10_000), columns=st.sampled_from([2, 3, 10, 40]), dtype=st.sampled_from(["float32", "float64"])
)
def test_a_singular_matrix_is_lifted_to_its_floor(seed, columns, dtype):
    with jax.enable_x64(True):
        matrix = jnp.asarray(psd(seed, columns, columns - 1, 1e-2), dtype)
        lowest = 64 * columns * jnp.finfo(dtype).eps * jnp.diagonal(matrix)
        factor, lift = numerics.floored_cholesky(matrix, lowest)
        assert np.all(np.isfinite(factor))
        pivots = np.diagonal(factor) ** 2
        assert np.all(pivots >= np.asarray(lowest) * (1 - 1e-5))
        assert np.all(lift >= 0)
        lifted = matrix + jnp.diag(lift)
        scale = np.max(np.abs(matrix))
        np.testing.assert_allclose(factor @ factor.T, lifted, atol=1e2 * jnp.finfo(dtype).eps * scale)
        # What was lifted can be factored again, with no floor: the next E-step will.
        assert np.all(np.isfinite(numerics.cholesky(lifted)))


@pytest.mark.parametrize("columns", [2, 9])
def test_without_a_floor_an_indefinite_matrix_is_nan(columns):
    assert np.any(np.isnan(numerics.cholesky(-jnp.eye(columns))))


@pytest.mark.parametrize("columns", [9, 50, 100])
def test_factors_are_as_exact_as_lapacks(columns):
    """Backward error of the factor and residual of its inverse, in float32, of a matrix of condition number 1e5."""
    rng = np.random.default_rng(columns)
    turn = np.linalg.qr(rng.normal(size=(4, columns, columns)))[0]
    exact = turn * np.geomspace(1, 1e-5, columns) @ np.swapaxes(turn, -1, -2)
    stack = jnp.asarray(0.5 * (exact + np.swapaxes(exact, -1, -2)), jnp.float32)
    factor = np.asarray(numerics.cholesky(stack), float)
    rounding = columns * np.finfo(np.float32).eps
    norm = np.linalg.norm(stack, axis=(1, 2))
    assert np.all(np.linalg.norm(factor @ np.swapaxes(factor, -1, -2) - stack, axis=(1, 2)) < rounding * norm)

    ours = np.asarray(numerics.inverse_lower(jnp.asarray(factor, jnp.float32)), float)
    solved = [
        jax.scipy.linalg.solve_triangular(jnp.asarray(f, jnp.float32), jnp.eye(columns), lower=True) for f in factor
    ]
    residual, theirs = (
        np.linalg.norm(np.asarray(inverse, float) @ factor - np.eye(columns), axis=(1, 2)) for inverse in (ours, solved)
    )
    assert np.all(residual < 4 * theirs)
    np.testing.assert_array_equal(np.triu(ours, 1), 0)


@pytest.mark.parametrize("columns", [3, 11])
def test_derivatives_of_factors(columns, x64):
    """In both modes and to second order, against finite differences; cotangents of symmetric matrices are symmetric."""
    rng = np.random.default_rng(columns)
    matrix = jnp.asarray([psd(seed, columns, 2 * columns, 2.0) for seed in range(2)])
    weight = jnp.asarray(rng.normal(size=matrix.shape))

    def value(change):
        factor = numerics.cholesky(matrix + change + jnp.swapaxes(change, -1, -2))
        return jnp.sum(jnp.tril(weight) * jnp.sin(factor)) + jnp.sum(weight * jnp.cos(numerics.inverse_lower(factor)))

    check_grads(jax.jit(value), (0.01 * weight,), order=2 if columns > 8 else 1, modes=("fwd", "rev"), rtol=1e-5)
    slope = jax.grad(lambda m: jnp.sum(weight * numerics.cholesky(m)))(matrix)
    np.testing.assert_allclose(slope, jnp.swapaxes(slope, -1, -2), rtol=1e-9, atol=1e-12)
    peer = jax.grad(lambda m: jnp.sum(jnp.tril(weight) * jnp.linalg.cholesky(m)))(matrix)
    np.testing.assert_allclose(slope, peer, rtol=1e-7, atol=1e-9)


def test_solutions_and_their_derivatives_under_vmap(x64):
    rng = np.random.default_rng(0)
    matrix, right = jnp.asarray(rng.normal(size=(3, 4, 4))), jnp.asarray(rng.normal(size=(3, 4)))
    solved = jax.vmap(numerics.solve)
    np.testing.assert_allclose(solved(matrix, right), np.linalg.solve(matrix, right[..., None])[..., 0], rtol=1e-9)
    check_grads(solved, (matrix, right), order=1, modes=("fwd", "rev"), rtol=1e-5)


@settings(deadline=None, derandomize=True, max_examples=20)
@given(values=st.lists(st.floats(-30, 30), min_size=2, max_size=6))
def test_simplex_bijection(values):
    with jax.enable_x64(True):
        theta = jnp.asarray(values)
        probabilities = numerics.real_to_simplex(theta)
        np.testing.assert_allclose(jnp.sum(probabilities), 1, rtol=1e-12)
        np.testing.assert_allclose(numerics.simplex_to_real(probabilities), theta, atol=1e-9)


@pytest.mark.parametrize("columns", [1, 3, 9])
def test_covariance_bijection(columns, x64):
    matrix = jnp.asarray(psd(0, columns, columns + 3, 10.0))
    theta = numerics.covariance_to_real(matrix)
    assert theta.shape == (columns * (columns + 1) // 2,)
    np.testing.assert_allclose(numerics.real_to_covariance(theta, columns), matrix, rtol=1e-10, atol=1e-10)


def test_normalize_is_bayes_rule_and_survives_impossible_rows(x64):
    joint = jnp.log(jnp.array([[0.1, 0.0, 0.0], [0.3, 0.2, 0.0]]))
    responsibilities, evidence = numerics.normalize(joint)
    np.testing.assert_allclose(responsibilities, [[0.25, 0, 0], [0.75, 1, 0]], atol=1e-15)
    np.testing.assert_allclose(evidence, [np.log(0.4), np.log(0.2), -np.inf])
    shifted, moved = numerics.normalize(joint + 5000)
    np.testing.assert_allclose(shifted, responsibilities, atol=1e-12)
    np.testing.assert_allclose(moved, evidence + 5000)


def test_gradients_at_zero_are_finite():
    assert jax.grad(lambda x: jnp.where(x > 0, numerics.safe_log(x), 0))(0.0) == 0
    assert jax.grad(lambda x: numerics.safe_divide(1.0, x))(0.0) == 0
    assert numerics.safe_log(0.0) == -jnp.inf
    assert numerics.safe_divide(3.0, 0.0) == 0
    gradient = jax.grad(lambda w: numerics.weighted_sum(jnp.array([1.0, -jnp.inf]), w))(jnp.array([1.0, 0.0]))
    assert np.all(np.isfinite(gradient))


@settings(deadline=None, derandomize=True, max_examples=12)
@given(rows=st.integers(1, 40), block=st.integers(1, 45), weighted=st.booleans())
def test_blocks_sum_every_row_once(rows, block, weighted):
    x = {"a": jnp.arange(rows, dtype=jnp.float32), "b": jnp.ones((rows, 2), jnp.float32)}
    weights = jnp.arange(rows, dtype=jnp.float32) % 3 if weighted else None

    def moments(x, weights):
        w = jnp.ones(len(x["a"])) if weights is None else weights
        return w @ x["a"], w @ x["b"], jnp.sum(w)

    got, whole = tree.sum_over_blocks(moments, x, weights, block), moments(x, weights)
    for a, b in zip(got, whole, strict=True):
        np.testing.assert_array_equal(a, b)
    doubled = tree.map_over_blocks(lambda x: 2 * x["a"], x, block)
    np.testing.assert_array_equal(doubled, 2 * x["a"])


def test_sums_over_many_blocks_keep_the_precision_of_one():
    """4096 blocks of about 0.1 in float32: a plain running sum loses three digits more."""
    x = jnp.full((4096, 1), 0.1, jnp.float32)
    total = tree.sum_over_blocks(lambda x, _: 1e4 * jnp.sum(x), x, None, 1)
    exact = 4096 * float(np.float32(1e4 * np.float32(0.1)))
    assert abs(float(total) - exact) <= 2 * np.spacing(np.float32(exact))


def test_what_failed_is_done_again_lane_by_lane(x64):
    """A shortcut that is wrong above 1: values, lanes and slopes are those of what is right."""

    def root(x):
        return numerics.repaired(lambda x: (jnp.where(x > 1, jnp.nan, jnp.sqrt(x)), x > 1), jnp.sqrt, x)

    x = jnp.array([0.25, 4.0, 0.5, 9.0])
    np.testing.assert_allclose(jax.jit(jax.vmap(root))(x), np.sqrt(x), rtol=1e-15)
    for value in x:
        np.testing.assert_allclose(jax.jit(jax.jvp, static_argnums=0)(root, (value,), (1.0,))[1], 0.5 / np.sqrt(value))

    def smooth(x):
        return numerics.repaired(lambda x: (2 * x, x > 1), jnp.square, x)

    np.testing.assert_allclose(jax.vmap(jax.grad(smooth))(x), np.where(x > 1, 2 * x, 2.0))


@settings(deadline=None, derandomize=True, max_examples=12)
@given(steps=st.integers(1, 30), lanes=st.integers(1, 5), shared=st.booleans())
def test_steps_as_lanes_are_the_steps(steps, lanes, shared):
    """In groups that do not fill up, with what all lanes share, and sums over what is there alone."""
    rng = np.random.default_rng(steps)
    a = jnp.asarray(rng.normal(size=(steps, 3, 2, 1 if shared else lanes)), jnp.float32)
    b = jnp.asarray(rng.normal(size=(steps, 3, lanes)), jnp.float32)
    at_a_time, tuning.LANES_AT_A_TIME = tuning.LANES_AT_A_TIME, 7
    try:
        found, total = lanewise.over_steps(
            lambda at: (lanewise.times(lanewise.transposed(at[0]), at[1]), at[1]), (a, b)
        )
    finally:
        tuning.LANES_AT_A_TIME = at_a_time
    np.testing.assert_allclose(
        found, np.einsum("tijb,tib->tjb", np.broadcast_to(a, (steps, 3, 2, lanes)), b), atol=1e-5
    )
    np.testing.assert_allclose(total, np.sum(b, axis=0), atol=1e-4)


def test_rows_must_agree():
    with pytest.raises(ValueError, match=r"share one leading axis.*\[2, 3\]"):
        tree.num_rows((jnp.ones(2), jnp.ones(3)))
