"""What an object may leave out, and that nobody is slower or otherwise told for it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxem import (
    EM,
    HMM,
    Blocks,
    ClosedForm,
    Conditional,
    Exact,
    Full,
    Gradient,
    HelmholtzMachine,
    Incremental,
    KMeans,
    LinearGaussianSSM,
    Mixture,
    Poisson,
    Screen,
    Status,
    Stepwise,
    VarianceReduced,
    anderson,
    annealed_em,
    averaged,
    em_fit,
    fit_restarts,
    squarem,
    stochastic_em,
)
from jaxem.capabilities import complete, original, states
from jaxem.protocols import Nature
from jaxem.record import record
from jaxem.testing import check_model

MODEL = Mixture(Poisson(), 2)
X = np.random.default_rng(0).poisson(np.where(np.arange(60) < 30, 2.0, 7.0)).astype(float)
KEY = jax.random.key(3)

pytestmark = pytest.mark.usefixtures("x64")


@record
class MeanStats:
    total: jax.Array
    weight: jax.Array
    loglik: jax.Array


@record
class Mean:
    """The mean of rows with known spread: nothing but an E-step and an M-step, and a method that is only its own."""

    spread: Any = 1.0

    def e_step(self, params, x, weights=None, expect=None):
        weights = jnp.ones_like(x) if weights is None else weights
        near = 1 / (1 + jnp.square(x - params) / self.spread)  # a weight that shrinks with the distance
        loglik = -jnp.sum(weights * jnp.log1p(jnp.square(x - params) / self.spread))
        return MeanStats(total=jnp.sum(weights * near * x), weight=jnp.sum(weights * near), loglik=loglik)

    def m_step(self, stats):
        return stats.total / stats.weight


@pytest.mark.parametrize(
    ("kind", "thing"),
    [
        *(
            ("model", model)
            for model in (KMeans(2), MODEL, HMM(Poisson(), 2), LinearGaussianSSM(2), HelmholtzMachine(2))
        ),
        *(("gather", gather) for gather in (Full(), Blocks(3), Stepwise(3), VarianceReduced(3), Incremental(3))),
        *(("maximize", maximize) for maximize in (ClosedForm(), Gradient(), Conditional())),
        *(
            ("algorithm", algorithm)
            for algorithm in (EM(), squarem(), anderson(), averaged(EM()), annealed_em([2.0, 1.0]))
        ),
        ("state", EM().init(MODEL, MODEL.init(KEY, X), X)),
    ],
    ids=lambda thing: type(thing).__name__,
)
def test_what_the_library_has_is_complete(kind, thing):
    assert complete(kind, thing) is thing


def test_what_comes_in_is_completed_once_and_goes_by_its_own_name():
    model = Mean()
    whole = complete("model", model)
    assert complete("model", whole) is whole
    assert original(whole) is model
    assert repr(whole) == repr(model)
    assert whole.q_function is None
    assert whole.coarse() is whole.partial() is whole
    assert states(whole, "e_step", "m_step")
    assert not states(whole, "m_step", "rebase")
    assert not states(complete("model", KMeans(2)), "units")
    with pytest.raises(AttributeError, match="no attribute 'predict'"):
        _ = whole.predict


def test_one_of_a_pair_alone_counts_for_nothing():
    @record
    class Half(Mean):
        def unconstrain(self, params):
            raise AssertionError("there is no way back")

    assert complete("model", Half()).unconstrain(3.0) == 3.0


def test_a_model_with_an_e_step_and_an_m_step_alone_is_fitted():
    x = jnp.concatenate([X, jnp.array([1000.0])])
    traces = []

    @jax.jit
    def fit(model, start):
        traces.append(None)
        return em_fit(model, start, x, tol=1e-9)

    results = [fit(Mean(), jnp.array(start)) for start in (1.0, 8.0)]
    assert len(traces) == 1
    runs = fit_restarts(Mean(), None, x, init=jnp.array([1.0, 8.0]), tol=1e-9)
    for result, objective in zip(results, runs.objective, strict=True):
        assert result.status == Status.CONVERGED
        np.testing.assert_allclose(result.objective, objective, rtol=1e-9)
    assert {"additive", "monotone", "one compilation"} <= set(check_model(Mean(), jnp.asarray(np.array(4.0)), X))
    with pytest.raises(TypeError, match="Mean declares no blocks"):
        em_fit(Mean(), jnp.array(1.0), x, algorithm=EM(maximize=Conditional()))


def test_slots_that_state_little_are_given_the_rest():
    """A gather without `init`, and an M-step that goes half of the way and says so."""

    @record
    class Plain:
        def step(self, problem, params, stats, state, expect, part):
            return problem.model.e_step(params, problem.x, problem.weights, expect), None

    @record
    class Halfway:
        inexact = True

        def step(self, problem, params, stats, state, part, key):
            assert key is None
            return jax.tree.map(lambda a, b: (a + b) / 2, params, problem.model.m_step(stats)), None

    params = MODEL.init(KEY, X)
    expected = em_fit(MODEL, params, X, tol=1e-8, max_steps=5000)
    algorithm = EM(gather=Plain(), maximize=Halfway())
    assert algorithm.nature(MODEL) == Nature(inexact=True)
    found = em_fit(MODEL, params, X, algorithm=algorithm, tol=1e-8, max_steps=5000)
    assert found.status == Status.CONVERGED
    np.testing.assert_allclose(found.objective, expected.objective, atol=1e-5)
    stepped = em_fit(MODEL, params, X, algorithm=EM(gather=Plain()), tol=1e-8, max_steps=5000)
    for a, b in zip(jax.tree.leaves(stepped), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


@record
class Noisy:
    """An M-step with a draw around it."""

    stochastic = True

    def step(self, problem, params, stats, state, part, key):
        found = problem.model.m_step(stats)
        rate = found.components.rate
        noise = 1 + 0.01 * jax.random.normal(key, rate.shape)
        return dataclasses.replace(found, components=dataclasses.replace(found.components, rate=rate * noise)), None


def test_an_m_step_that_draws_has_a_key_of_its_own():
    params = MODEL.init(KEY, X)
    algorithm = EM(maximize=Noisy())
    assert algorithm.nature(MODEL) == Nature(stochastic=True, monotone=False)
    fits = [em_fit(MODEL, params, X, key=key, algorithm=algorithm, max_steps=30) for key in (KEY, KEY)]
    np.testing.assert_array_equal(fits[0].history, fits[1].history)
    assert fits[0].status == Status.MAX_STEPS
    assert np.any(np.diff(np.asarray(fits[0].history)) < 0)
    # By hand, step for step: a compiled fit draws what `init` and `step` draw.
    state = algorithm.init(MODEL, params, X, key=KEY)
    step = jax.jit(lambda state: algorithm.step(MODEL, state, X))
    for _ in range(30):
        state = step(state)
    np.testing.assert_allclose(state.loglik, fits[0].objective, rtol=1e-10)


def test_an_algorithm_of_plain_attributes_is_what_it_says():
    @record
    class Twice:
        """Two steps of EM for one."""

        inner: EM = EM()
        monotone = True

        def init(self, model, params, x, weights=None, key=None):
            return self.inner.init(model, params, x, weights, key)

        def step(self, model, state, x, weights=None):
            return self.inner.step(model, self.inner.step(model, state, x, weights), x, weights)

    @record
    class Restless(Twice):
        stochastic = True
        monotone = False

    params = MODEL.init(KEY, X)
    twice, once = (
        em_fit(MODEL, params, X, algorithm=algorithm, tol=-1.0, max_steps=steps)
        for algorithm, steps in ((Twice(), 5), (EM(), 10))
    )
    np.testing.assert_allclose(twice.objective, once.objective, rtol=1e-12)
    assert em_fit(MODEL, params, X, algorithm=Twice(), max_steps=5000).status == Status.CONVERGED
    assert em_fit(MODEL, params, X, algorithm=Restless(), max_steps=50).status == Status.MAX_STEPS
    with pytest.raises(ValueError, match=r"screen needs .*got .*Restless"):
        fit_restarts(MODEL, KEY, X, num_restarts=2, algorithm=Restless(), screen=Screen(1))


def test_natures_compose():
    assert EM().nature(MODEL) == Nature()
    assert stochastic_em().nature(MODEL) == Nature(stochastic=True, monotone=False)
    assert EM(gather=Stepwise()).nature(MODEL) == Nature(stochastic=True, monotone=False, complete=False)
    assert EM(gather=Stepwise(rate=1.0)).nature(MODEL) == Nature()
    assert EM(gather=Incremental(2)).nature(MODEL) == Nature(complete=False)
    assert EM(maximize=Gradient()).nature(MODEL) == Nature(inexact=True)
    assert EM(expect=Exact(2.0)).nature(MODEL) == Nature()
