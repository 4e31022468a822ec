"""Fits inside of transformations that they do not see: derivatives, debugging, shards; and large restart jobs."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxem import EM, HMM, Mixture, Normal, Poisson, em_fit, fit_restarts
from jaxem.numerics import tuning

RNG = np.random.default_rng(0)
X = jnp.asarray(np.concatenate([RNG.normal(-3, 1, (30, 1)), RNG.normal(3, 1, (30, 1))]), jnp.float32)
MODEL = Mixture(Normal(), 2)


def test_what_stands_beside_a_fit_can_be_differentiated():
    """Whatever the fit itself has come to."""
    params = MODEL.init(jax.random.key(0), X)

    def beside(scale):
        return scale * em_fit(MODEL, params, X, max_steps=5).objective

    expected = em_fit(MODEL, params, X, max_steps=5).objective
    np.testing.assert_allclose(jax.grad(beside)(2.0), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.jacfwd(beside))(2.0), expected, rtol=1e-6)

    def stopped(x):
        return em_fit(MODEL, params, jax.lax.stop_gradient(x), max_steps=5).objective * jnp.sum(x)

    np.testing.assert_allclose(jax.grad(stopped)(X), jnp.full_like(X, expected), rtol=1e-5)

    # A fit that failed, and that a loss leaves out, spoils no other term.
    def left_out(x):
        fit = em_fit(MODEL, params, x, max_steps=1)
        return jnp.sum(x**2) + jnp.where(fit.converged, fit.objective, 0.0)

    np.testing.assert_allclose(jax.grad(left_out)(X), 2 * X, rtol=1e-6)

    # An algorithm's own steps, against differences.
    algorithm = EM()

    def after_steps(shift):
        state = algorithm.init(MODEL, params, X * shift)
        step = lambda state, _: (algorithm.step(MODEL, state, X * shift), None)  # noqa: E731
        return jnp.sum(jax.lax.scan(step, state, length=3)[0].params.components.mean)

    rise = (after_steps(1.01) - after_steps(0.99)) / 0.02
    np.testing.assert_allclose(jax.grad(after_steps)(1.0), rise, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("eager", [True, False])
def test_nans_are_debugged(eager):
    params = MODEL.init(jax.random.key(0), X)
    plain = em_fit(MODEL, params, X, max_steps=7)
    assert np.all(np.isnan(plain.history[int(plain.num_steps) + 1 :]))
    with jax.debug_nans(True):
        fit = (em_fit if eager else jax.jit(em_fit, static_argnames="max_steps"))(MODEL, params, X, max_steps=7)
        runs = fit_restarts(MODEL, jax.random.key(0), X, num_restarts=3, max_steps=7)
    steps = int(fit.num_steps)
    np.testing.assert_allclose(fit.history[: steps + 1], plain.history[: steps + 1], rtol=1e-6)
    np.testing.assert_array_equal(fit.history[steps:], fit.objective)
    assert np.all(np.isfinite(runs.best.history))


def test_missing_values_are_no_nans_to_debug():
    x = np.where(np.arange(60).reshape(2, 30, 1) % 7 == 0, np.nan, RNG.normal(size=(2, 30, 2)))
    model = HMM(Normal("diag"), 2)
    with jax.debug_nans(True):
        fit = em_fit(model, model.init(jax.random.key(0), x), x, max_steps=3)
    assert np.all(np.diff(fit.history) > 0)


def test_a_coarse_bulk_is_not_what_is_reported(monkeypatch):
    """Tight clusters far apart: in float32 moments about one point are useless, and such steps fall by far."""
    x = jnp.asarray(np.repeat([[0.0], [1e4]], 50, axis=0) + RNG.normal(size=(100, 1)), jnp.float32)
    monkeypatch.setattr(tuning, "COARSE_WORK", 0)
    runs = fit_restarts(MODEL, jax.random.key(0), x, num_restarts=8)
    good = ~np.asarray(runs.failed)
    assert np.all(np.asarray(runs.largest_decrease)[good] <= 1e-4 * len(x))
    best, steps = runs.best, int(runs.best.num_steps)
    history = np.asarray(best.history)
    assert history[steps] == best.objective
    assert np.all(np.diff(history[: steps + 1]) >= -1e-4 * len(x))
    assert np.all(np.isnan(history[steps + 1 :]))
    # The first entry is the model's own objective, too: no step of the model falls from it to the end.
    assert best.largest_decrease == max(0, np.max(-np.diff(history[: steps + 1]), initial=0))


def test_the_history_has_all_steps_however_many_restarts():
    runs = fit_restarts(MODEL, jax.random.key(0), X, num_restarts=40_000, block_size=4096, tol=1e-2, certify=False)
    history, steps = np.asarray(runs.best.history), int(runs.best.num_steps)
    assert history.shape == (1001,)
    assert np.all(np.isfinite(history[: steps + 1]))
    assert np.all(np.isnan(history[steps + 1 :]))
    assert history[steps] == runs.best.objective == np.max(runs.objective[~runs.failed])


_SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxem import HMM, Mixture, Normal, Poisson, em_fit, fit_restarts
random = np.random.default_rng(0)
def checked(model, x):
    keys = jax.random.split(jax.random.key(0), 2)
    starts = jax.vmap(lambda key: model.init(key, x[0]))(keys)
    one = lambda params, x: em_fit(model, params, x, max_steps=5, tol=-1.0).objective
    whole = jax.vmap(one)(starts, x)
    mesh = jax.make_mesh((2,), ("i",), axis_types=(AxisType.Auto,))
    def local(params, x):
        return one(jax.tree.map(lambda leaf: leaf[0], params), x[0])[None]
    found = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P("i"), P("i")), out_specs=P("i")))(starts, x)
    np.testing.assert_allclose(found, whole, rtol=1e-5)
    shared = lambda params: one(jax.tree.map(lambda leaf: leaf[0], params), x[0])[None]
    found = jax.jit(jax.shard_map(shared, mesh=mesh, in_specs=P("i"), out_specs=P("i")))(starts)
    np.testing.assert_allclose(found[0], whole[0], rtol=1e-5)
x = jnp.asarray(random.normal(size=(2, 40, 2)), jnp.float32)
checked(Mixture(Normal("diag"), 2), x)
checked(HMM(Poisson(), 2), jnp.asarray(random.poisson(4, (2, 4, 10, 1)), jnp.float32))
mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Explicit,))
rows = jax.device_put(x[0], NamedSharding(mesh, P("rows")))
model = Mixture(Normal("diag"), 2)
params = model.init(jax.random.key(0), x[0])
counts = jax.device_put(jnp.ones(40), NamedSharding(mesh, P("rows")))
for call in (
    lambda: em_fit(model, params, rows),
    lambda: em_fit(model, params, x[0], counts),
    lambda: fit_restarts(model, jax.random.key(0), rows, num_restarts=2),
    lambda: fit_restarts(model, jax.random.key(0), x[0], counts, num_restarts=2),
):
    try:
        call()
    except ValueError as error:
        assert "AxisType.Auto" in str(error), error
    else:
        raise AssertionError("explicit axes must be refused")
print("sharded")
"""


def test_inside_of_shard_map():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    environment = {**os.environ, "XLA_FLAGS": flags}
    found = subprocess.run([sys.executable, "-c", _SHARDED], env=environment, capture_output=True, text=True)
    assert "sharded" in found.stdout, found.stderr[-3000:]


def test_a_gradient_of_many_chains_side_by_side():
    """As that of each alone, also where one of them has to be done again in logarithms."""
    model = HMM(Poisson(), 2)
    x = jnp.asarray([[3.0], [5.0], [400.0], [2.0]])
    params = HMM(Poisson(), 2).init(jax.random.key(0), x)
    stuck = jax.tree.map(jnp.asarray, params)
    stuck = type(params)(
        initial=jnp.array([1.0, 0.0]), transition=jnp.array([[0.5, 0.5], [0.0, 1.0]]), emissions=params.emissions
    )
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), params, stuck)

    def value(params):
        return jnp.sum(model.log_prob(params, x)) + model.e_step(params, x).loglik

    together = jax.jit(jax.grad(lambda both: jnp.sum(jax.vmap(value)(both))))(both)
    alone = jax.jit(jax.vmap(jax.grad(value)))(both)
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        assert np.all(np.isfinite(a))
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
