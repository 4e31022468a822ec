"""E- and M-steps under jit, for all tests: op by op each of them is a hundred programs to compile."""

import jax

from jaxem import Exact


@jax.jit
def e_step(model, params, x, weights=None, expect=Exact()):
    return model.e_step(params, x, weights, expect)


@jax.jit
def m_step(model, stats):
    return model.m_step(stats)
