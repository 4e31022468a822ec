"""Many starts in one program: each restart is the fit that it would be alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import zoo

from jaxem import (
    Background,
    EMError,
    Fixed,
    Mixture,
    Normal,
    Poisson,
    Product,
    Screen,
    Status,
    em_fit,
    fit_restarts,
)
from jaxem import restarts as restarts_module
from jaxem.numerics import tuning

R = 12


@pytest.fixture(scope="module")
def case():
    with jax.enable_x64(True):
        model, x = Mixture(Normal("diag"), 3), jnp.asarray(zoo()["full"][1])
        return model, x, fit_restarts(model, jax.random.key(3), x, num_restarts=R, block_size=4)


def test_every_restart_is_em_fit_from_its_own_start(case, x64):
    model, x, runs = case
    for i in range(0, R, 3):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), i), 0)
        alone = em_fit(model, model.init(key, x), x)
        assert alone.status == runs.status[i]
        assert alone.num_steps == runs.num_steps[i]
        np.testing.assert_allclose(runs.objective[i], alone.objective, rtol=1e-10)
        np.testing.assert_allclose(runs.params.components.mean[i], alone.params.components.mean, rtol=1e-6)


def test_a_restart_depends_on_its_own_key_alone(case, x64):
    model, x, runs = case
    more = fit_restarts(model, jax.random.key(3), x, num_restarts=R + 3, block_size=5)
    np.testing.assert_allclose(more.objective[:R], runs.objective, rtol=1e-10)
    np.testing.assert_array_equal(more.num_steps[:R], runs.num_steps)


def test_the_best_is_the_highest_and_complete(case, x64):
    model, x, runs = case
    best, index = runs.best, int(runs.index)
    assert best.objective == jnp.max(runs.objective[~runs.failed]) == runs.objective[index]
    np.testing.assert_allclose(best.loglik, jnp.sum(model.log_prob(best.params, x)), rtol=1e-12)
    history = np.asarray(best.history)
    steps = int(best.num_steps)
    assert np.all(np.diff(history[: steps + 1]) > -1e-9)
    assert history[steps] == best.objective
    assert np.all(np.isnan(history[steps + 1 :]))
    np.testing.assert_allclose(history[0], em_fit(model, *_start(model, x, index), max_steps=0).objective, rtol=1e-12)
    assert runs.check() is runs


def _start(model, x, index):
    return model.init(jax.random.fold_in(jax.random.fold_in(jax.random.key(3), index), 0), x), x


def test_hits_count_the_restarts_at_the_best(case, x64):
    _, x, runs = case
    near = np.sum(np.asarray(runs.objective) >= float(runs.best.objective) - 1e-4 * len(x))
    assert 1 <= int(runs.hits()) == near
    assert int(runs.hits(tol=1e9)) == R


def test_stacked_params_are_starts(case, x64):
    model, x, runs = case
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(jax.random.key(3), i), 0))(jnp.arange(R))
    starts = jax.vmap(lambda key: model.init(key, x))(keys)
    again = fit_restarts(model, None, x, init=starts)
    np.testing.assert_allclose(again.objective, runs.objective, rtol=1e-10)
    with pytest.raises(ValueError, match="num_restarts is 5, but init holds 12"):
        fit_restarts(model, None, x, init=starts, num_restarts=5)


def test_a_failing_restart_never_wins_and_spares_its_neighbours(case, x64):
    model, x, runs = case
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(jax.random.key(3), i), 0))(jnp.arange(R))
    starts = jax.vmap(lambda key: model.init(key, x))(keys)
    bad = starts.components.mean.at[2].set(jnp.nan)
    # A component on one single row collapses: its likelihood grows without bound.
    bad = bad.at[7, 0].set(x[0])
    covariance = starts.components.covariance.at[7, 0].set(1e-6)
    starts = dataclasses.replace(starts, components=type(starts.components)(mean=bad, covariance=covariance))
    mixed = fit_restarts(model, None, x, init=starts, block_size=6)
    assert mixed.status[2] == Status.NONFINITE
    assert mixed.status[7] == Status.DEGENERATE
    assert mixed.objective[7] > runs.best.objective
    assert mixed.best.status == Status.CONVERGED
    assert int(mixed.count(Status.NONFINITE)) == 1
    others = np.setdiff1d(np.arange(R), [2, 7])
    np.testing.assert_allclose(mixed.objective[others], runs.objective[others], rtol=1e-10)


def test_when_all_fail_the_best_says_so(x64):
    model = Mixture(Normal(), 3)
    x = jnp.repeat(jnp.array([[0.0, 0.0], [1.0, 1.0], [5.0, 2.0]]), 4, axis=0)
    runs = fit_restarts(model, jax.random.key(0), x, num_restarts=6)
    assert bool(jnp.all(runs.failed))
    assert runs.best.status == Status.DEGENERATE
    assert not bool(runs.best.converged)
    with pytest.raises(EMError, match="prior"):
        runs.check()


def test_a_screen_keeps_the_promising_share(case, x64):
    model, x, runs = case
    screened = fit_restarts(model, jax.random.key(3), x, num_restarts=R, screen=Screen(3, keep=0.25), block_size=4)
    finished = np.asarray(screened.num_steps) > 3
    assert finished.sum() == 3
    short = np.array([em_fit(model, *_start(model, x, i), max_steps=3).objective for i in range(R)])
    assert np.min(short[finished]) >= np.max(short[~finished]) - 1e-9
    np.testing.assert_allclose(screened.objective[finished], runs.objective[finished], rtol=1e-7)
    assert np.all(np.asarray(screened.status)[~finished] == Status.MAX_STEPS)


def test_the_coarse_bulk_ends_where_the_model_does(case, x64, monkeypatch):
    model, x, runs = case
    monkeypatch.setattr(tuning, "COARSE_WORK", 0)
    assert model.coarse() != model
    bulk = fit_restarts(model, jax.random.key(3), x, num_restarts=R, block_size=4)
    # A few steps more, never fewer: a restart on a plateau may be carried over its edge, not below it.
    assert np.all(np.asarray(bulk.objective) >= np.asarray(runs.objective) - 1e-9)
    assert np.sum(np.abs(bulk.objective - runs.objective) < 2e-6 * len(x)) >= R - 1
    np.testing.assert_array_equal(bulk.status, runs.status)
    screened = fit_restarts(model, jax.random.key(3), x, num_restarts=R, screen=Screen(2), block_size=4)
    # The start and the two steps of the screen are three passes.
    assert np.sum(np.asarray(screened.num_passes) > 3) == 3


def test_coarse_arithmetic_that_fails_is_mended_by_the_model(monkeypatch):
    """Clusters 1e4 times tighter than their distance: float32 moments about one point are useless."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(np.repeat([[0.0], [1e4]], 50, axis=0) + rng.normal(size=(100, 1)), jnp.float32)
    model = Mixture(Normal(), 2)
    monkeypatch.setattr(tuning, "COARSE_WORK", 0)
    runs = fit_restarts(model, jax.random.key(0), x, num_restarts=8, certify=False)
    assert runs.best.status == Status.CONVERGED
    exact = np.sort([np.var(np.asarray(x[:50], float)), np.var(np.asarray(x[50:], float))])
    np.testing.assert_allclose(np.sort(np.ravel(runs.best.params.components.covariance)), exact, rtol=1e-3)


def test_only_a_cheaper_form_is_another_model():
    assert Mixture(Normal("diag"), 2).coarse() != Mixture(Normal("diag"), 2)
    weights = {"weights": jnp.array([0.5, 0.5])}
    for model in (
        Mixture(Poisson(), 2),
        Mixture(Product({"a": Poisson()}), 2),
        Mixture(Background(Poisson(), 1.0), 2),
        Fixed(Mixture(Poisson(), 2), weights),
    ):
        assert model.coarse() is model
    assert Fixed(Mixture(Normal(), 2), weights).coarse().inner.family.form == "expanded"


def test_restarts_under_jit_and_compiled_once(case, x64):
    model, x, runs = case

    @jax.jit
    def best(key, x):
        return fit_restarts(model, key, x, num_restarts=R, block_size=4).best.objective

    np.testing.assert_allclose(best(jax.random.key(3), x), runs.best.objective, rtol=1e-10)
    before = restarts_module.drive._cache_size(), restarts_module.prepare._cache_size()
    fit_restarts(Mixture(Normal("diag"), 3), jax.random.key(4), x + 1, num_restarts=R, block_size=4, tol=1e-5)
    assert before == (restarts_module.drive._cache_size(), restarts_module.prepare._cache_size())


def test_max_steps_holds_for_every_restart(case, x64):
    model, x, _ = case
    runs = fit_restarts(model, jax.random.key(3), x, num_restarts=R, max_steps=2, tol=-1.0, block_size=4)
    assert np.all(np.asarray(runs.num_steps) == 2)
    assert np.all(np.asarray(runs.status) == Status.MAX_STEPS)
    assert runs.best.history.shape == (3,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(), "num_restarts is needed"),
        (dict(num_restarts=0), "num_restarts must be at least 1"),
        (dict(num_restarts=2.0), "num_restarts must be a Python integer"),
        (dict(num_restarts=2, block_size=0), "block_size must be at least 1"),
        (dict(init=jnp.zeros(()), num_restarts=2), "init must be a function"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        fit_restarts(Mixture(Normal(), 2), jax.random.key(0), jnp.arange(8.0)[:, None], **arguments)
