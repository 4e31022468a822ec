"""Parts of a user's own: a family and a gate, written as the contributing guide says, under the laws of all models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats as scipy_stats

from jaxem import EM, HMM, Dirichlet, Fixed, LinearGaussianSSM, Mixture, Poisson, Product, em_fit
from jaxem.parameters import simplex
from jaxem.parts import Probabilities, assembly
from jaxem.record import record, static
from jaxem.testing import LAWS, check_model

pytestmark = pytest.mark.usefixtures("x64")

RNG = np.random.default_rng(6)
GROUP = RNG.integers(0, 3, 150)
COMPONENT = (RNG.random(150) < np.array([0.2, 0.5, 0.9])[GROUP]).astype(int)
LENGTH = RNG.rayleigh(np.array([1.0, 4.0])[COMPONENT])
X = (GROUP, LENGTH)


@record
class RayleighParams:
    scale: jax.Array


@record
class RayleighStats:
    count: jax.Array
    square: jax.Array
    base: jax.Array


@record
class Rayleigh:
    """log p(x|k) = log x - 2 log s_k - x² / (2 s_k²), of the second of a pair (group, length)."""

    def pooled(self, x, weights, num_components):
        mean = jnp.average(jnp.square(x[1]), weights=weights)
        return RayleighParams(scale=jnp.full(num_components, jnp.sqrt(mean / 2)))

    def features(self, x):
        return x[1][:, None]

    def log_prob(self, params, x):
        scale, length = params.scale[:, None], x[1][None]
        return jnp.log(length) - 2 * jnp.log(scale) - 0.5 * jnp.square(length / scale)

    def stats(self, params, x, responsibilities):
        return RayleighStats(
            count=jnp.sum(responsibilities, axis=1),
            square=responsibilities @ jnp.square(x[1]),
            base=responsibilities @ jnp.log(x[1]),
        )

    def m_step(self, stats):
        return RayleighParams(scale=jnp.sqrt(stats.square / (2 * stats.count)))

    def q_function(self, params, stats):
        logs = stats.base - 2 * stats.count * jnp.log(params.scale)
        return jnp.sum(logs - 0.5 * stats.square / jnp.square(params.scale))

    def log_prior(self, params):
        return jnp.zeros(())

    def degenerate(self, stats):
        return stats.count <= 0

    def num_parameters(self, params):
        return params.scale.size

    def floats_per_row(self, params):
        return params.scale.size

    def unconstrain(self, params):
        return RayleighParams(scale=jnp.log(params.scale))

    def constrain(self, theta):
        return RayleighParams(scale=jnp.exp(theta.scale))

    def check(self, x, name="x"):
        pass


@record(kw_only=False)
class ByGroup:
    """log p(k | group) = log p_group,k, of the first of a pair (group, length): rows of a table (G, K)."""

    num_groups: int = static()

    _table = Probabilities()
    m_step, q_function, log_prior = _table.m_step, _table.q_function, _table.log_prior
    unconstrain, constrain, num_parameters = _table.unconstrain, _table.constrain, _table.num_parameters
    degenerate, supports = _table.degenerate, staticmethod(simplex)

    def pooled(self, x, weights, num_components):
        return jnp.full((self.num_groups, num_components), 1 / num_components)

    def log_prob(self, params, x):
        return jnp.log(params)[x[0]].T

    def stats(self, params, x, responsibilities):
        return jnp.zeros_like(params).at[x[0]].add(responsibilities.T)

    def floats_per_row(self, params):
        return params.shape[1]


def test_the_laws_hold_for_a_family_and_a_gate_of_a_users_own():
    model = Mixture(Rayleigh(), 2, gate=ByGroup(3))
    params = model.init(jax.random.key(0), X)
    checked = check_model(model, params, X, skip=["eager, jit and vmap agree"])
    assert set(checked) == set(LAWS) - {"eager, jit and vmap agree"}
    assert model.num_parameters(params) == 3 + 2


def test_a_gate_by_groups_is_mixing_weights_for_every_group():
    """EM by hand, with NumPy and scipy, from the same start."""
    model = Mixture(Rayleigh(), 2, gate=ByGroup(3))
    start = model.init(jax.random.key(0), X)
    fit = em_fit(model, start, X, tol=-1.0, max_steps=25)
    weights, scale = np.asarray(start.weights), np.asarray(start.components.scale)
    for _ in range(25):
        joint = weights[GROUP] * scipy_stats.rayleigh.pdf(LENGTH[:, None], scale=scale)
        share = joint / joint.sum(axis=1, keepdims=True)
        weights = np.stack([share[g == GROUP].mean(axis=0) for g in range(3)])
        scale = np.sqrt(LENGTH**2 @ share / (2 * share.sum(axis=0)))
    np.testing.assert_allclose(fit.params.weights, weights, rtol=1e-9)
    np.testing.assert_allclose(fit.params.components.scale, scale, rtol=1e-9)
    joint = weights[GROUP] * scipy_stats.rayleigh.pdf(LENGTH[:, None], scale=scale)
    assert float(fit.loglik) == pytest.approx(np.log(joint.sum(axis=1)).sum(), rel=1e-12)
    np.testing.assert_allclose(model.posterior(fit.params, X), joint / joint.sum(axis=1, keepdims=True), rtol=1e-9)


def test_a_gate_can_be_held_and_has_blocks():
    table = np.array([[0.8, 0.2], [0.5, 0.5], [0.1, 0.9]])
    model = Fixed(Mixture(Rayleigh(), 2, gate=ByGroup(3)), {"weights": table})
    fit = em_fit(model, model.init(jax.random.key(0), X), X, max_steps=5)
    np.testing.assert_array_equal(fit.params.weights, table)
    assert model.blocks(fit.params) == ("components.scale",)


def test_a_gate_that_says_the_same_of_every_row_is_constant_weights():
    counts = RNG.poisson(np.array([2.0, 9.0])[COMPONENT])
    plain, gated = Mixture(Poisson(), 2), Mixture(Poisson(), 2, gate=Probabilities())
    start = plain.init(jax.random.key(1), counts)
    one, other = (em_fit(model, start, counts, tol=-1.0, max_steps=10) for model in (plain, gated))
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_array_equal(a, b)


@record
class Blurred:
    """An E-step of a user's own: the model's posterior, a share of every row spread over all components."""

    share: jax.Array

    monotone = False

    def posterior(self, model, params, x):
        exact = model.infer(params, x)
        q = (1 - self.share) * exact.responsibilities + self.share / exact.responsibilities.shape[0]
        return dataclasses.replace(exact, responsibilities=q)


def test_a_posterior_of_a_users_own_stands_in_the_e_step():
    counts = RNG.poisson(np.array([2.0, 9.0])[COMPONENT])
    model = Mixture(Poisson(), 2)
    start = model.init(jax.random.key(1), counts)
    step = em_fit(model, start, counts, algorithm=EM(expect=Blurred(share=jnp.array(0.3))), tol=-1.0, max_steps=1)
    q = 0.7 * model.posterior(start, counts) + 0.15
    expected = jax.jit(lambda: model.m_step(model.stats(start, counts, q)))()
    for a, b in zip(jax.tree.leaves(step.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    assert float(step.objective) == pytest.approx(float(jnp.sum(model.log_prob(step.params, counts))), rel=1e-12)


def test_a_gate_and_a_prior_on_constant_weights_are_refused_together():
    with pytest.raises(ValueError, match="gate its own prior"):
        Mixture(Rayleigh(), 2, gate=ByGroup(3), prior=Dirichlet(2.0))
    model = Mixture(Rayleigh(), 2, gate=ByGroup(3))
    with pytest.raises(TypeError, match="cannot be sampled from"):
        model.sample(jax.random.key(0), model.init(jax.random.key(0), X), 3)


@pytest.mark.parametrize("model", [Mixture, HMM, LinearGaussianSSM, Product])
def test_methods_that_are_taken_from_parts_in_groups_go_by_their_own_names(model):
    groups = (assembly.by_name, assembly.surrogate, assembly.coordinates, assembly.pieces)
    taken = {name: value for name, value in vars(model).items() if any(value in group for group in groups)}
    assert taken == {name: vars(assembly)[name] for name in taken}
