"""The loop: when it stops, what it reports, and every way that JAX users call it."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import zoo

import jaxem
from jaxem import (
    EM,
    Blocks,
    EMError,
    Mixture,
    Normal,
    Status,
    default_prior,
    em_fit,
    fit_restarts,
    from_functions,
)
from jaxem import fit as fit_module


@pytest.fixture(scope="module")
def case():
    with jax.enable_x64(True):
        model, x = Mixture(Normal("diag"), 3), jnp.asarray(zoo()["full"][1])
        params = model.init(jax.random.key(0), x)
        return model, params, x, em_fit(model, params, x)


def geometric(ratio, scale=1.0, sign=1.0):
    """A model whose objective climbs to 0 by gains of one exact ratio: theta -> ratio theta."""

    def e_step(theta, x, weights=None):
        total = jnp.sum(x if weights is None else weights)
        return theta, -sign * scale * total * theta

    return from_functions(e_step, lambda theta: ratio * theta)


@pytest.mark.parametrize("ratio", [0.3, 0.9, 0.99, 0.9957])
def test_tol_is_the_distance_to_the_limit(ratio, x64):
    """A slow fit must not stop early: what is left per row is what tol says, not 1 / (1 - ratio) times that."""
    x = jnp.ones(50)
    for tol in (1e-3, 1e-6):
        result = em_fit(geometric(ratio), jnp.array(1.0), x, tol=tol, max_steps=20_000)
        left = -float(result.objective) / 50
        assert result.status == Status.CONVERGED
        assert 0.5 * ratio * tol < left <= tol * (1 + 1e-6)


def test_weights_are_the_unit_of_tol(x64):
    model = geometric(0.9)
    rows = em_fit(model, jnp.array(1.0), jnp.ones(6))
    weighted = em_fit(model, jnp.array(1.0), jnp.ones(2), jnp.array([2.0, 4.0]))
    assert rows.num_steps == weighted.num_steps


def test_float32_stops_at_its_resolution():
    """Gains fall below an ulp of the objective long before tol is met."""

    def e_step(theta, x):
        return theta, -jnp.sum(x) * (4 + theta)

    slow = from_functions(e_step, lambda theta: 0.99 * theta)
    result = em_fit(slow, jnp.float32(1.0), jnp.ones(1000, jnp.float32), tol=0.0, max_steps=10_000)
    assert result.status == Status.CONVERGED
    assert result.num_steps < 2500
    assert abs(float(result.objective) + 4000) < 0.1


def test_a_fit_that_starts_at_its_limit_ends_at_once(case, x64):
    model, _, x, result = case
    limit = em_fit(model, result.params, x, tol=0.0, max_steps=5000)
    again = em_fit(model, limit.params, x)
    assert again.status == Status.CONVERGED
    assert again.num_steps <= 10


def test_the_objective_belongs_to_the_params(case, x64):
    model, _, x, result = case
    np.testing.assert_allclose(result.loglik, jnp.sum(model.log_prob(result.params, x)), rtol=1e-13)
    steps = int(result.num_steps)
    assert result.history.shape == (1001,)
    assert result.history[steps] == result.objective
    assert np.all(np.isnan(result.history[steps + 1 :]))
    assert np.all(np.diff(result.history[: steps + 1]) > 0)
    assert result.largest_decrease == 0


def test_max_steps(case, x64):
    model, params, x, _ = case
    none = em_fit(model, params, x, max_steps=0)
    assert (none.num_steps, none.status) == (0, Status.MAX_STEPS)
    chex.assert_trees_all_close(none.params, params)
    three = em_fit(model, params, x, max_steps=3, tol=-1.0)
    assert (three.num_steps, three.status) == (3, Status.MAX_STEPS)
    assert not bool(three.converged)
    with pytest.raises(EMError, match="max_steps") as error:
        three.check()
    assert error.value.status == Status.MAX_STEPS
    long = em_fit(model, params, x, max_steps=1500, tol=-1.0)
    assert long.num_steps == 1500
    assert long.history.shape == (1501,)
    assert np.all(np.isfinite(long.history))


def test_a_nonfinite_step_keeps_the_last_finite_state(x64):
    def m_step(theta):
        return jnp.where(theta < 0.5, jnp.nan, 0.8 * theta)

    model = from_functions(lambda theta, x: (theta, -jnp.sum(x) * theta), m_step)
    result = em_fit(model, jnp.array(1.0), jnp.ones(3))
    assert result.status == Status.NONFINITE
    assert not bool(result.converged)
    assert result.num_steps == 4
    np.testing.assert_allclose(result.params, 0.8**4)
    np.testing.assert_allclose(result.objective, -3 * 0.8**4)
    with pytest.raises(EMError, match="NaN or infinity"):
        result.check()


def test_a_nonfinite_start_is_never_converged():
    model = Mixture(Normal(), 2)
    x = jnp.arange(10.0)[:, None]
    params = model.init(jax.random.key(0), x)
    result = em_fit(model, jax.tree.map(lambda leaf: leaf * jnp.nan, params), x)
    assert result.status == Status.NONFINITE
    assert not bool(result.converged)


def test_a_decrease_is_reported_and_undone(x64):
    model = from_functions(lambda theta, x: (theta, -jnp.sum(x) * jnp.abs(theta - 0.55)), lambda theta: 0.8 * theta)
    result = em_fit(model, jnp.array(1.0), jnp.ones(3))
    assert result.status == Status.DECREASED
    assert result.num_steps == 3
    np.testing.assert_allclose(result.params, 0.8**3)
    np.testing.assert_allclose(result.largest_decrease, 3 * (0.55 - 0.8**4 - abs(0.8**3 - 0.55)), rtol=1e-9)
    with pytest.raises(EMError, match="fell"):
        result.check()


def test_without_a_likelihood_the_parameters_are_watched(x64):
    model = from_functions(lambda theta, x: theta, lambda theta: 0.9 * theta + 0.1)
    result = em_fit(model, jnp.array(5.0), jnp.ones(3), tol=1e-8)
    assert bool(result.converged)
    assert bool(jnp.isnan(result.objective))
    assert abs(float(result.params) - 1) < 1e-7


def test_jit_with_nothing_static(case, x64):
    model, params, x, result = case
    fit = jax.jit(chex.assert_max_traces(em_fit, n=1))
    short = fit(model, params, x, tol=1e-4, max_steps=50)
    assert short.num_steps <= 50
    full = fit(Mixture(Normal("diag"), 3), params, x, tol=1e-6, max_steps=1000)
    np.testing.assert_allclose(full.objective, result.objective, rtol=1e-12)
    assert full.num_steps == result.num_steps


def test_eager_calls_compile_once(case, x64):
    model, params, x, _ = case
    em_fit(model, params, x)
    before = fit_module._fit._cache_size()
    em_fit(Mixture(Normal("diag"), 3), model.init(jax.random.key(9), x), x + 1, tol=1e-3, max_steps=77)
    assert fit_module._fit._cache_size() == before


def test_a_compiled_fit_holds_its_e_step_once():
    """The E-step at the start is a round of the loop, in which no M-step counts: its statistics are nothing yet."""
    traced = []

    def e_step(theta, x):
        traced.append(theta)
        return theta, jnp.sum(jax.lax.erf_inv(0.5 * theta * x))

    halved = from_functions(e_step, lambda theta: 0.5 * theta * theta / theta)  # NaN at 0
    x = -jnp.ones(4)
    program = jax.jit(em_fit).lower(halved, jnp.float32(1), x).as_text()
    assert program.count("chlo.erf_inv ") == 1
    assert len(traced) == 1
    expected = 4 * jax.lax.erf_inv(-(0.5 ** jnp.arange(1.0, 5)))
    for steps in (0, 3):
        result = em_fit(halved, jnp.float32(1), x, tol=-1.0, max_steps=steps)
        np.testing.assert_allclose(result.history, expected[: steps + 1], rtol=1e-6)
        assert (result.num_steps, result.num_passes, result.status) == (steps, steps + 1, Status.MAX_STEPS)
        runs = fit_restarts(halved, None, x, init=jnp.array([1.0, 0.5, jnp.nan]), tol=-1.0, max_steps=steps)
        np.testing.assert_allclose(runs.objective[0], expected[steps], rtol=1e-6)
        np.testing.assert_array_equal(runs.status, [Status.MAX_STEPS, Status.MAX_STEPS, Status.NONFINITE])
        np.testing.assert_array_equal(runs.num_steps, [steps, steps, 0])
        np.testing.assert_array_equal(runs.num_passes, [steps + 1, steps + 1, 1])


def test_vmap_over_params_is_a_loop_over_params(case, x64):
    model, _, x, _ = case
    starts = jax.vmap(lambda key: model.init(key, x))(jax.random.split(jax.random.key(5), 4))
    many = jax.vmap(lambda params: em_fit(model, params, x, max_steps=40))(starts)
    for i in range(4):
        one = em_fit(model, jax.tree.map(lambda leaf: leaf[i], starts), x, max_steps=40)  # noqa: B023
        assert (one.num_steps, one.status) == (many.num_steps[i], many.status[i])
        np.testing.assert_allclose(many.objective[i], one.objective, rtol=1e-10)
    assert many.history.shape == (4, 41)


def test_vmap_over_data_and_weights(case, x64):
    model, params, x, result = case
    moved = jax.vmap(lambda shift: em_fit(model, model.init(jax.random.key(0), x + shift), x + shift))(
        jnp.array([0.0, 10.0])
    )
    np.testing.assert_allclose(moved.objective, result.objective, rtol=1e-6)
    counts = jnp.stack([jnp.ones(len(x)), jnp.arange(len(x)) % 2 + 0.0, 1.0 + (jnp.arange(len(x)) < 5)])
    weighted = jax.vmap(lambda w: em_fit(model, params, x, w))(counts)
    for i, w in enumerate(np.asarray(counts).astype(int)):
        repeated = em_fit(model, params, jnp.repeat(x, w, axis=0))
        assert repeated.num_steps == weighted.num_steps[i]
        np.testing.assert_allclose(weighted.objective[i], repeated.objective, rtol=1e-9)


def test_vmap_over_a_priors_strength(case, x64):
    _, params, x, _ = case
    prior = default_prior(x, 3, "diag")

    def fitted(shrinkage):
        strong = dataclasses.replace(prior, shrinkage=shrinkage)
        return em_fit(Mixture(Normal("diag", prior=strong), 3), params, x).params.components.mean

    means = jax.vmap(fitted)(jnp.array([0.01, 1e6]))
    assert np.ptp(np.asarray(means[0])[:, 0]) > 1
    np.testing.assert_allclose(means[1], jnp.broadcast_to(prior.mean, (3, 2)), atol=1e-3)


def test_under_scan_and_with_old_style_keys(case, x64):
    model, _, x, _ = case

    def body(carry, key):
        result = em_fit(model, model.init(key, x), x, key=key, max_steps=5)
        return jnp.maximum(carry, result.objective), result.num_steps

    keys = jax.random.split(jax.random.PRNGKey(0), 3)
    best, steps = jax.jit(lambda: jax.lax.scan(body, -jnp.inf, keys))()
    assert np.isfinite(best)
    assert np.all(np.asarray(steps) <= 5)


def test_the_loop_can_be_driven_by_hand(case, x64):
    model, params, x, _ = case
    algorithm = EM()
    state = algorithm.init(model, params, x)
    for _ in range(3):
        state = jax.jit(algorithm.step)(model, state, x)
    three = em_fit(model, params, x, max_steps=3, tol=-1.0)
    chex.assert_trees_all_close(state.params, three.params, rtol=1e-10)
    np.testing.assert_allclose(state.loglik, three.loglik, rtol=1e-12)


def test_blocks_are_the_whole_through_the_fit(case, x64):
    model, params, x, result = case
    blocked = em_fit(model, params, x, algorithm=EM(gather=Blocks(7)))
    assert blocked.num_steps == result.num_steps
    np.testing.assert_allclose(blocked.objective, result.objective, rtol=1e-12)


def test_large_data_are_blocked_by_themselves():
    """The compiled step holds no array of components x rows."""
    rows, count = 200_000, 32
    model = Mixture(Normal("full"), count)
    shape = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((rows, 8), jnp.float32))
    step = jax.jit(lambda params, x: EM().init(model, params, x).stats)
    compiled = step.lower(shape, jax.ShapeDtypeStruct((rows, 8), jnp.float32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < rows * count * 4


def test_a_start_in_another_precision_takes_the_datas(case, x64):
    model, params, x, result = case
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    fitted = em_fit(model, single, x)
    assert fitted.params.components.mean.dtype == jnp.float64
    assert abs(float(fitted.objective - result.objective)) < 1e-4 * len(x)


def test_a_start_of_the_wrong_shape_is_named(case, x64):
    model, params, x, _ = case
    with pytest.raises(ValueError, match=r"params.components.mean must have shape \(3, 1\)"):
        em_fit(model, params, x[:, :1])
    wrong = dataclasses.replace(params, weights=jnp.full(1, 1.0))
    with pytest.raises(ValueError, match="weights"):
        em_fit(model, wrong, x)


def test_models_of_different_families_never_share_a_program():
    """Their fields are the same, and so may be the shapes of their data: only their classes tell them apart."""
    families = (jaxem.Bernoulli(), jaxem.Poisson(), jaxem.Exponential())
    structures = [jax.tree.structure(jaxem.Mixture(family, 2)) for family in families]
    assert all((a == b) == (a is b) for a in structures for b in structures)
    assert structures[0] == jax.tree.structure(jaxem.Mixture(jaxem.Bernoulli(), 2))


def test_histories_are_bounded():
    assert fit_module.history_capacity(5000) == 8192
    assert fit_module.history_capacity(5000, 256) == 8192
    assert fit_module.history_capacity(2**31 - 1) == 2**24
    assert fit_module.history_capacity(2**31 - 1, 256) == 2**16
