"""Mixtures of experts, and gates in other mixtures: against scikit-learn, scipy, NumPy, and what they are limits of."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import optimize
from scipy import stats as scipy_stats
from sklearn.linear_model import LogisticRegression as Multinomial

from jaxem import (
    EM,
    Bernoulli,
    Gated,
    GateParams,
    Gradient,
    Labelled,
    LinearRegression,
    Mixture,
    MixtureOfExperts,
    Normal,
    PoissonRegression,
    SoftmaxGate,
    Status,
    TopicMixture,
    TwoLevelGate,
    anderson,
    em_fit,
)
from jaxem.parts import TwoLevelParams

pytestmark = pytest.mark.usefixtures("x64")

RNG = np.random.default_rng(2)
N = 120
FEATURE = np.sort(RNG.uniform(-2, 2, N))
CHANCE = 1 / (1 + np.exp(-3 * FEATURE))
COMPONENT = (RNG.random(N) < CHANCE).astype(int)
RESPONSE = np.where(COMPONENT == 1, 1 - FEATURE, 2 * FEATURE) + 0.3 * RNG.normal(size=N)
DATA = (FEATURE, RESPONSE)


@pytest.fixture(scope="module")
def fitted():
    with jax.enable_x64(True):
        model = MixtureOfExperts(LinearRegression(), 2)
        start = model.init(jax.random.key(1), DATA)
        return model, em_fit(model, start, DATA, algorithm=anderson(EM()), tol=1e-12, max_steps=3000).check()


def test_a_fit_is_the_maximum_of_the_likelihood(fitted):
    """scipy's own maximisation of sum_n log sum_k p(k | x_n) N(y_n | line_k, v_k), written in NumPy."""
    fit = fitted[1]

    def joint(theta):
        gate, lines, logs = theta[:2], theta[2:6].reshape(2, 2), theta[6:]
        eta = gate[0] + gate[1] * FEATURE
        log_gate = np.stack([-np.logaddexp(0, -eta), -np.logaddexp(0, eta)])
        return log_gate + np.stack(
            [
                scipy_stats.norm.logpdf(RESPONSE, a + b * FEATURE, np.exp(s))
                for (a, b), s in zip(lines, logs, strict=True)
            ]
        )

    def minus(theta):
        return -np.sum(np.logaddexp(*joint(theta)))

    params = fit.params
    lines = np.stack([params.components.intercept, params.components.coefficients[:, 0]], axis=1)
    gate = [params.weights.intercept[0], params.weights.coefficients[0, 0]]
    ours = np.concatenate([gate, lines.ravel(), 0.5 * np.log(params.components.variance)])
    assert -minus(ours) == pytest.approx(float(fit.loglik), rel=1e-12)
    best = optimize.minimize(minus, ours + 0.05, method="BFGS", options={"gtol": 1e-7})
    assert -best.fun == pytest.approx(float(fit.loglik), abs=1e-6)
    np.testing.assert_allclose(best.x, ours, atol=2e-4)


def test_the_gate_and_the_mean_are_read_from_features_alone(fitted):
    model, fit = fitted
    at = np.array([-1.0, 0.5])
    gate, lines = fit.params.weights, fit.params.components
    eta = gate.intercept[0] + gate.coefficients[0, 0] * at
    weights = np.stack([1 / (1 + np.exp(-eta)), 1 / (1 + np.exp(eta))], axis=1)
    np.testing.assert_allclose(model.gate_probabilities(fit.params, at), weights, rtol=1e-12)
    each = lines.intercept[None] + at[:, None] * lines.coefficients[:, 0][None]
    np.testing.assert_allclose(model.mean(fit.params, at), (weights * each).sum(axis=1), rtol=1e-12)

    features = np.repeat(at, 20_000)
    (_, drawn), labels = model.sample_with_labels(jax.random.key(0), fit.params, 40_000, features=features)
    error = np.asarray(drawn).reshape(2, -1).std(axis=1) / np.sqrt(20_000)
    assert np.all(np.abs(np.asarray(drawn).reshape(2, -1).mean(axis=1) - (weights * each).sum(axis=1)) < 4 * error)
    np.testing.assert_allclose(np.asarray(labels).reshape(2, -1).mean(axis=1), weights[:, 1], atol=0.015)


def test_one_step_of_the_gate_by_hand():
    """Böhning's step: twice (sum zzᵀ)⁻¹ sum (r - p) z away from the line, for every component."""
    gate, r = SoftmaxGate(), RNG.dirichlet(np.ones(3), N).T
    line = np.array([[0.3, -0.5], [0.1, 0.8], [0.0, 0.0]])
    params = GateParams(coefficients=jnp.asarray(line[:, 1:]), intercept=jnp.asarray(line[:, 0]))
    moved = gate.m_step(gate.stats(params, DATA, jnp.asarray(r)))
    z = np.stack([np.ones(N), FEATURE])
    p = np.exp(line @ z) / np.exp(line @ z).sum(axis=0)
    expected = line + 2 * np.linalg.solve(z @ z.T, z @ (r - p).T).T
    expected -= expected[-1]
    np.testing.assert_allclose(moved.intercept, expected[:, 0], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(moved.coefficients[:, 0], expected[:, 1], rtol=1e-9, atol=1e-12)


def test_with_all_components_known_the_gate_is_multinomial_logistic_regression():
    features = RNG.normal(size=(N, 2))
    scores = features @ np.array([[1.0, -1.0, 0.0], [0.5, 0.0, -1.0]])
    labels = np.argmax(scores + RNG.gumbel(size=(N, 3)), axis=1)
    model = Mixture(Normal("spherical"), 3, gate=SoftmaxGate())
    data = Labelled(Gated(RNG.normal(size=(N, 2)) + labels[:, None], features), labels)
    fit = em_fit(model, model.init(jax.random.key(0), data), data, algorithm=anderson(EM()), tol=1e-13).check()
    peer = Multinomial(C=np.inf, tol=1e-10, max_iter=2000).fit(features, labels)
    np.testing.assert_allclose(fit.params.weights.coefficients, peer.coef_ - peer.coef_[-1:], atol=2e-4)
    np.testing.assert_allclose(fit.params.weights.intercept, peer.intercept_ - peer.intercept_[-1], atol=2e-4)


def test_a_gate_without_features_is_the_plain_mixture_step_by_step():
    plain, gated = Mixture(LinearRegression(), 2), MixtureOfExperts(LinearRegression(), 2)
    start = plain.init(jax.random.key(3), DATA)
    logs = jnp.log(start.weights)
    gate = GateParams(coefficients=jnp.zeros((2, 0)), intercept=logs - logs[-1])
    one = em_fit(plain, start, DATA, tol=-1.0, max_steps=20)
    data = Gated(DATA, np.zeros((N, 0)))
    other = em_fit(gated, dataclasses.replace(start, weights=gate), data, tol=-1.0, max_steps=20)
    np.testing.assert_allclose(other.history, one.history, rtol=1e-12)
    np.testing.assert_allclose(jax.nn.softmax(other.params.weights.intercept), one.params.weights, rtol=1e-9)
    assert gated.num_parameters(other.params) == plain.num_parameters(one.params)


def test_a_gate_that_becomes_a_step_is_told_and_a_ridge_keeps_it_from_that():
    feature = np.concatenate([np.linspace(-2, -1, 40), np.linspace(1, 2, 40)])
    response = np.where(feature < 0, 5.0 + feature, -5.0 - feature) + 0.1 * np.random.default_rng(0).normal(size=80)
    model = MixtureOfExperts(LinearRegression(), 2)
    start = model.init(jax.random.key(0), (feature, response))
    fit = em_fit(model, start, (feature, response))
    assert Status(int(fit.status)) == Status.DEGENERATE
    assert int(fit.num_steps) < 200
    ridged = MixtureOfExperts(LinearRegression(), 2, gate=SoftmaxGate(ridge=0.1))
    assert em_fit(ridged, start, (feature, response)).converged


def test_gates_in_two_levels_multiply():
    gate = TwoLevelGate(num_groups=2)
    line = RNG.normal(size=(3, 2, 2))
    outer, inner = line[0], line[1:]
    params = TwoLevelParams(
        outer=GateParams(coefficients=jnp.asarray(outer[:, 1:]), intercept=jnp.asarray(outer[:, 0])),
        inner=GateParams(coefficients=jnp.asarray(inner[..., 1:]), intercept=jnp.asarray(inner[..., 0])),
    )
    z = np.stack([np.ones(N), FEATURE])

    def softmax(a):
        return np.exp(a @ z) / np.exp(a @ z).sum(axis=0)

    expected = np.concatenate([softmax(outer)[g] * softmax(inner[g]) for g in range(2)])
    np.testing.assert_allclose(np.exp(gate.log_prob(params, DATA)), expected, rtol=1e-12)
    with pytest.raises(ValueError, match="num_components must be a multiple of num_groups=2"):
        MixtureOfExperts(LinearRegression(), 3, gate=gate).init(jax.random.key(0), DATA)


def test_optax_makes_the_gates_m_step_too(fitted):
    model, fit = fitted
    start = model.init(jax.random.key(1), DATA)
    climbed = em_fit(model, start, DATA, algorithm=EM(maximize=Gradient(optax.adam(0.05), num_steps=5)), max_steps=400)
    assert Status(int(climbed.status)) != Status.DECREASED
    assert float(climbed.objective) == pytest.approx(float(fit.objective), abs=0.05)


def test_what_a_gate_cannot_look_at_is_refused_by_name():
    with pytest.raises(TypeError, match=r"x must be a pair \(features, response\), or Gated\(x, features\)"):
        Mixture(Bernoulli(), 2, gate=SoftmaxGate()).init(jax.random.key(0), np.zeros((5, 2), int))
    with pytest.raises(TypeError, match="expert must be a regression family"):
        MixtureOfExperts(Normal(), 2)
    with pytest.raises(ValueError, match=r"x\.features must be finite"):
        MixtureOfExperts(LinearRegression(), 2).init(jax.random.key(0), Gated(DATA, np.full(N, np.nan)))
    model = MixtureOfExperts(PoissonRegression(), 2)
    counts = (FEATURE, RNG.poisson(2.0, N))
    with pytest.raises(TypeError, match="cannot be sampled from without features"):
        model.sample(jax.random.key(0), model.init(jax.random.key(0), counts), 3)
    with pytest.raises(TypeError, match="a mean given features is one of regressions"):
        Mixture(Normal(), 2).mean(Mixture(Normal(), 2).init(jax.random.key(0), RESPONSE), FEATURE)


def test_topics_of_sparse_counts_go_as_by_hand():
    """Hofmann's EM in NumPy, on the dense table of documents and words."""
    rng = np.random.default_rng(5)
    counts = rng.poisson(2.0 * rng.dirichlet(np.ones(9) / 2, 2)[rng.integers(0, 2, 12)] * 9 / 2)
    counts[np.arange(12), np.arange(12) % 9] += 1  # no document or word is without counts
    documents, words = np.nonzero(counts)
    each = counts[documents, words]
    model = TopicMixture(2, num_documents=12, num_words=9)
    start = model.init(jax.random.key(0), Gated(words, documents), each)
    fit = em_fit(model, start, Gated(words, documents), each, tol=-1.0, max_steps=15)
    topics, chance = np.asarray(start.weights), np.asarray(start.components.probability)[:, 0]
    for _ in range(15):
        joint = topics[:, :, None] * chance[None]
        expected = counts[:, None] * joint / joint.sum(axis=1, keepdims=True)
        topics = expected.sum(axis=2) / expected.sum(axis=(1, 2))[:, None]
        chance = expected.sum(axis=0) / expected.sum(axis=(0, 2))[:, None]
    np.testing.assert_allclose(fit.params.weights, topics, atol=1e-9)
    np.testing.assert_allclose(fit.params.components.probability[:, 0], chance, atol=1e-9)
    used = counts > 0
    assert float(fit.loglik) == pytest.approx(np.sum(counts[used] * np.log((topics @ chance)[used])), rel=1e-12)
    assert model.num_parameters(fit.params) == 12 + 2 * 8
    for moved, got in ((documents + 1, "12"), (documents - 1, "-1")):
        with pytest.raises(ValueError, match=rf"x\.features must be in 0\.\.11; got {got} in row"):
            em_fit(model, start, Gated(words, moved), each)
