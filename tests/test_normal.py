"""What is particular to normal components: references, floors, dead components, forms, records."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jitted import e_step
from zoo import zoo

from jaxem import EM, Mixture, Normal, NormalParams, Status, em_fit, fit_restarts
from jaxem.families import covariance as shapes

COVARIANCES = ("full", "tied", "diag", "spherical")


def start(name):
    model, x = zoo()[name]
    x = jnp.asarray(x)
    return model, model.init(jax.random.key(2), x), x


@pytest.mark.parametrize("name", COVARIANCES)
def test_rebase_moves_the_reference_and_nothing_else(name, x64):
    model, params, x = start(name)
    stats = jax.jit(model.e_step)(params, x)
    elsewhere = jax.tree.map(lambda leaf: leaf + 0.5, params)
    moved = jax.jit(model.rebase)(stats, elsewhere)
    np.testing.assert_allclose(
        moved.components.reference / moved.counts[:, None], elsewhere.components.mean, rtol=1e-12
    )
    m_step, q = jax.jit(model.m_step), jax.jit(model.q_function)
    for a, b in zip(jax.tree.leaves(m_step(moved)), jax.tree.leaves(m_step(stats)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)
    np.testing.assert_allclose(q(params, moved), q(params, stats), rtol=1e-12)
    back = jax.jit(model.rebase)(moved, params)
    np.testing.assert_allclose(back.components.second, stats.components.second, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", COVARIANCES)
def test_a_dead_component_keeps_what_it_had_and_is_reported(name, dtype, x64):
    model, params, x = start(name)
    x, params = x.astype(dtype), jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    far = params.components.mean.at[1].set(1e3)
    covariance = params.components.covariance
    params = dataclasses.replace(params, components=NormalParams(mean=far, covariance=covariance))
    result = em_fit(model, params, x, max_steps=20, tol=-1.0)
    assert result.status == Status.DEGENERATE
    np.testing.assert_allclose(result.params.components.mean[1], 1e3, rtol=1e-5)
    if name != "tied":
        np.testing.assert_allclose(result.params.components.covariance[1], covariance[1], rtol=1e-4)
    stats = jax.jit(model.e_step)(result.params, x)
    np.testing.assert_array_equal(jax.jit(model.degenerate)(stats), [False, True, False])
    assert float(stats.counts[1]) < 1e-6
    others = np.array([0, 2])
    alone = Mixture(model.family, 2)
    two = jax.tree.map(lambda leaf: leaf, params)
    two = dataclasses.replace(
        two,
        weights=params.weights[others] / jnp.sum(params.weights[others]),
        components=NormalParams(mean=far[others], covariance=covariance if name == "tied" else covariance[others]),
    )
    without = em_fit(alone, two, x, max_steps=20, tol=-1.0)
    rtol = 1e-3 if dtype == "float32" else 1e-9
    np.testing.assert_allclose(result.params.components.mean[others], without.params.components.mean, rtol=rtol)


@pytest.mark.parametrize("name", COVARIANCES)
def test_the_floor_does_not_touch_a_good_estimate(name, x64, monkeypatch):
    model, params, x = start(name)
    stats = e_step(model, params, x)
    floored = model.m_step(stats).components.covariance
    for shape in (shapes.Full, shapes.Diagonal, shapes.Spherical):
        monkeypatch.setattr(shape, "floor", lambda self, covariance, lowest: (covariance, jnp.array(False)))
    np.testing.assert_array_equal(floored, model.m_step(stats).components.covariance)


@pytest.mark.parametrize("name", COVARIANCES)
def test_whitened_and_expanded_are_the_same_numbers(name, x64):
    model, _, x = start(name)
    for columns in (x, jnp.concatenate([x, x**2, x[:, :1] ** 3], axis=1)):
        at = model.init(jax.random.key(0), columns)
        forms = [Mixture(Normal(name, form=form), 3) for form in ("whitened", "expanded", "auto")]
        one, two, three = (jax.jit(form.e_step)(at, columns) for form in forms)
        for a, b, c in zip(*map(jax.tree.leaves, (one, two, three)), strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-7, atol=1e-7)
            np.testing.assert_allclose(c, a, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("columns", [2, 6])
def test_auto_leaves_the_expanded_form_when_clusters_are_tight(columns):
    """Float32, clusters 1e-4 of their distance wide: the expanded form is lost there."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(np.repeat([[-1.0], [1.0]], 60, axis=0) + 1e-4 * rng.normal(size=(120, columns)), jnp.float32)
    labels = np.repeat([0, 1], 60)
    truth = np.stack([np.cov(np.asarray(x[labels == k], float).T, bias=True) for k in (0, 1)])

    def error(form):
        model = Mixture(Normal(form=form), 2)
        params = model.params_from_responsibilities(x, labels)
        params = jax.jit(lambda params: model.m_step(model.e_step(params, x)))(params)
        return np.max(np.abs(params.components.covariance - truth)) / np.max(truth)

    assert error("auto") < 1e-3
    assert not error("expanded") < 1e-3


def test_one_column_in_either_layout(x64):
    x = jnp.asarray(zoo()["full"][1][:, 0])
    model = Mixture(Normal(), 2)
    params = model.init(jax.random.key(0), x)
    assert params.components.mean.shape == (2, 1)
    flat, column = em_fit(model, params, x), em_fit(model, params, x[:, None])
    assert flat.objective == column.objective
    np.testing.assert_array_equal(model.posterior(params, x), model.posterior(params, x[:, None]))


@pytest.mark.parametrize("name", COVARIANCES)
def test_samples_have_the_mixtures_moments(name, x64):
    model, params, x = start(name)
    params = em_fit(model, params, x).params
    rows, labels = model.sample_with_labels(jax.random.key(0), params, 40_000)
    share = np.bincount(labels, minlength=3) / len(labels)
    np.testing.assert_allclose(share, params.weights, atol=0.01)
    matrices = model.family.covariance_matrix(params.components)
    for k in range(3):
        inside = np.asarray(rows)[np.asarray(labels) == k]
        np.testing.assert_allclose(inside.mean(0), params.components.mean[k], atol=0.05)
        np.testing.assert_allclose(np.cov(inside.T), matrices[k], atol=0.08)
    assert model.sample(jax.random.key(0), params, 5).shape == (5, 2)


def test_a_refit_of_samples_finds_the_parameters(x64):
    model, params, x = start("tied")
    params = em_fit(model, params, x).params
    rows = model.sample(jax.random.key(1), params, 20_000)
    again = fit_restarts(model, jax.random.key(0), rows, num_restarts=4, certify=False).best
    truth = float(jnp.sum(model.log_prob(params, rows)))
    assert again.objective > truth
    assert again.objective - truth < 2 * model.num_parameters(params)


def test_records_compare_by_value_and_are_readable():
    assert Normal("diag") == Normal("diag") != Normal("full")
    assert Mixture(Normal(), 2) == Mixture(Normal(), 2) != Mixture(Normal(), 3)
    assert hash(Mixture(Normal(), 2)) == hash(Mixture(Normal(), 2))
    assert EM() == EM()
    params = NormalParams(mean=jnp.zeros((2, 1)), covariance=jnp.ones((2, 30, 30)))
    assert repr(params) == "NormalParams(mean=[[0.], [0.]], covariance=float32[2, 30, 30])"
    assert params != dataclasses.replace(params, mean=jnp.ones((2, 1)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.mean = 0
    with pytest.raises(TypeError):
        NormalParams(jnp.zeros(1), jnp.ones(1))


@pytest.mark.parametrize("columns", [3, 12])
def test_estimated_covariances_are_symmetric_to_the_bit(columns):
    """However sums were rounded: a start is refused that is not."""
    shape = shapes.NAMES["full"][0]
    factor = np.random.default_rng(0).normal(size=(2, columns, columns)).astype(np.float32)
    uneven = factor @ factor.transpose(0, 2, 1) + 1e-6 * factor
    found, _ = shape.floor(jnp.asarray(uneven), jnp.full((2, columns), 1e-6))
    np.testing.assert_array_equal(found, jnp.swapaxes(found, -1, -2))
