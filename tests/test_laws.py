"""Every law, for every model of the zoo; and laws that catch what they should."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import NAMES, first_of_kinds, quick_start, zoo

from jaxem import Mixture, Normal, from_functions
from jaxem.capabilities import states
from jaxem.testing import LAWS, check_model


def _dear(name: str) -> set[str]:
    """Op by op, an E-step compiles dozens of programs: one model of a kind has to do."""
    return set() if name in first_of_kinds() else {"eager, jit and vmap agree"}


@pytest.mark.parametrize("name", NAMES)
def test_laws_in_float64(name, x64):
    model, x = zoo()[name]
    x = jax.tree.map(jnp.asarray, x)
    params = model.init(jax.random.key(1), x, **quick_start(model))
    # Brute force is about one discrete latent a row, the lower bound about chains and normal latents too.
    one_a_row = states(model, "stats")
    absent = set() if one_a_row else {"brute force"}
    absent |= set() if one_a_row or states(jax.eval_shape(model.infer, params, x), "entropy") else {"lower bound"}
    # Where M-steps climb, by an optimiser that remembers, there is none of the model's own to hold to account.
    absent |= set() if states(model, "m_step") else {"m_step maximises", "rebase is exact", "steps compose", "float32"}
    absent |= set() if states(model, "unconstrain") else {"bijection"}
    absent |= set() if states(model, "m_step_for") else {"conditional M-steps"}
    assert set(check_model(model, params, x, skip=_dear(name))) == set(LAWS) - absent - _dear(name)


@pytest.mark.parametrize("name", ["diag", "full, five columns"])
def test_laws_survive_float32(name):
    model, x = zoo()[name]
    x = jnp.asarray(x, jnp.float32)
    params = model.init(jax.random.key(1), x, method="random_responsibilities")
    assert set(check_model(model, params, x, skip=_dear(name))) == set(LAWS) - {"float32"} - _dear(name)


class _Broken:
    """A right mixture with one wrong part."""

    def __init__(self, model, **wrong):
        self.__dict__.update(_model=model, **wrong)

    def __getattr__(self, name):
        return getattr(self.__dict__["_model"], name)


def _flipped(posterior):
    return dataclasses.replace(posterior, responsibilities=jnp.flip(posterior.responsibilities, 0))


def _half(tree):
    return jax.tree.map(lambda leaf: 0.5 * leaf, tree)


@pytest.mark.parametrize(
    ("law", "wrong"),
    [
        ("additive", lambda m: dict(e_step=lambda p, x, w=None, e=None: _mean_stats(m, p, x, w))),
        ("weights are repeats", lambda m: dict(e_step=lambda p, x, w=None, e=None: m.e_step(p, x))),
        ("Fisher's identity", lambda m: dict(q_function=lambda p, s: 2 * m.q_function(p, s))),
        ("m_step maximises", lambda m: dict(m_step=lambda s: _wide(m.m_step(s)))),
        ("bijection", lambda m: dict(constrain=lambda t: _half(m.constrain(t)))),
        ("lower bound", lambda m: dict(infer=lambda p, x: _flipped(m.infer(p, x)))),
    ],
)
def test_a_broken_model_breaks_its_law(law, wrong, x64):
    model = Mixture(Normal("diag"), 2)
    x = jnp.asarray(zoo()["full"][1])
    params = model.init(jax.random.key(0), x)
    others = set(LAWS) - {law}
    check_model(model, params, x, skip=others)
    with pytest.raises(AssertionError, match=f"law '{law}'"):
        check_model(_Broken(model, **wrong(model)), params, x, skip=others)


def _mean_stats(model, params, x, weights):
    stats = model.e_step(params, x, weights)
    return jax.tree.map(lambda leaf: leaf / len(x), stats)


def _wide(params):
    components = dataclasses.replace(params.components, covariance=1.5 * params.components.covariance)
    return dataclasses.replace(params, components=components)


def test_unknown_law_is_refused():
    with pytest.raises(ValueError, match="skip must name laws"):
        check_model(Mixture(Normal(), 2), None, np.ones((4, 1)), skip=["gravity"])


def test_laws_of_a_users_model(x64):
    heads = jnp.array([5.0, 9.0, 8.0, 4.0, 7.0])

    def e_step(theta, heads, weights=None):
        log_joint = heads[:, None] * jnp.log(theta)[None] + (10 - heads[:, None]) * jnp.log1p(-theta)[None]
        evidence = jax.scipy.special.logsumexp(log_joint, axis=1)
        share = jnp.exp(log_joint - evidence[:, None])
        weights = jnp.ones_like(heads) if weights is None else weights
        return (weights @ (share * heads[:, None]), weights @ share), weights @ evidence

    model = from_functions(e_step, lambda stats: stats[0] / (10 * stats[1]))
    checked = check_model(model, jnp.array([0.6, 0.5]), heads)
    assert {"additive", "weights are repeats", "monotone", "steps compose", "one compilation"} <= set(checked)
    assert "Fisher's identity" not in checked  # without q_function it cannot be
