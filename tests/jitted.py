"""E- and M-steps under jit, for all tests: op by op each of them is a hundred programs to compile."""

import functools

import jax

import jaxem
from jaxem import Exact


@jax.jit
def e_step(model, params, x, weights=None, expect=Exact()):
    return model.e_step(params, x, weights, expect)


@jax.jit
def m_step(model, stats):
    return model.m_step(stats)


@functools.partial(jax.jit, static_argnames="block")
def m_step_for(model, params, stats, block):
    return model.m_step_for(params, stats, block)


@jax.jit
def rebase(model, stats, params):
    return model.rebase(stats, params)


@jax.jit
def q_function(model, params, stats):
    return model.q_function(params, stats)


@jax.jit
def there_and_back(model, params):
    """The parameters, by way of their unconstrained coordinates."""
    return model.constrain(model.unconstrain(params))


@jax.jit
def free_energy(model, params, x, q, weights=None):
    return jaxem.free_energy(model, params, x, q, weights)


@jax.jit
def begin(model, algorithm, params, x, weights=None, key=None):
    """The state that an algorithm begins with."""
    return algorithm.init(model, params, x, weights, key)
