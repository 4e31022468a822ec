"""Programs that stand still for ever: on a CPU, batched LAPACK calls wait for each other in the thread pool."""

import functools
import math
import os
import re
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import NAMES, zoo

from jaxem import (
    EM,
    HMM,
    FactorAnalysis,
    LinearGaussianSSM,
    LinearRegression,
    LogisticRegression,
    Mixture,
    Normal,
    StudentT,
    anderson,
    default_prior,
    fit_restarts,
    numerics,
)

RNG = np.random.default_rng(3)
WIDE = RNG.normal(size=(60, 12)).astype(np.float32)
SERIES = WIDE.reshape(3, 20, 12)


def batched_calls(lowered) -> set[str]:
    """LAPACK and BLAS calls of a lowered program that take more than one matrix."""
    found = set()
    for line in lowered.as_text().splitlines():
        call = re.search(r"custom_call @(\w*(?:lapack|blas)\w*)\(", line)
        if call is None:
            continue
        shapes = [
            [int(size) for size in re.findall(r"(\d+)x", shape)] for shape in re.findall(r"tensor<([^>]*)>", line)
        ]
        if any(math.prod(shape[:-2]) > 1 for shape in shapes):
            found.add(call.group(1))
    return found


def test_the_detector_sees_a_batched_call_and_passes_a_single_one():
    stack = jnp.broadcast_to(jnp.eye(9), (4, 9, 9))
    for function in (jnp.linalg.cholesky, jnp.linalg.inv, jnp.linalg.eigh, jnp.linalg.svd, jnp.linalg.qr):
        assert batched_calls(jax.jit(function).lower(stack)), function
        assert batched_calls(jax.jit(jax.vmap(function)).lower(stack)), function
        assert not batched_calls(jax.jit(function).lower(stack[0])), function
        assert "custom_call" in jax.jit(function).lower(stack[0]).as_text(), function


def _many(tree):
    """Three of the same, as restarts are."""
    return jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), tree)


def _start(model, x):
    """Some parameters of the right shapes: nothing is compiled for them."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes)


def _steps(algorithm, model, x):
    """One step of many restarts, and their endings."""

    def run(params):
        state = algorithm.step(model, algorithm.init(model, params, x), x)
        return state.params, model.degenerate(getattr(state, "inner", state).stats)

    return jax.vmap(run)


@pytest.mark.parametrize("name", NAMES)
def test_restarts_of_every_model_make_no_batched_call(name):
    model, x = zoo()[name]
    x = jax.tree.map(jnp.asarray, x)
    x = model.units(x) if hasattr(model, "units") else x
    assert not batched_calls(jax.jit(_steps(EM(), model, x)).lower(_many(_start(model, x))))


def _gradient(model, x):
    """Of likelihood, Q and prior along the bijection."""

    def objective(theta):
        params = model.constrain(theta)
        stats = model.e_step(params, x)
        return stats.loglik + model.q_function(params, stats) + model.log_prior(params)

    return lambda params: jax.grad(objective)(model.unconstrain(params))


MANY_COLUMNS = {
    "full": lambda: (Mixture(Normal("full"), 3), WIDE),
    "tied, prior": lambda: (Mixture(Normal("tied", prior=default_prior(jnp.asarray(WIDE), 3)), 3), WIDE),
    "student t": lambda: (Mixture(StudentT("full", 4.0), 2), WIDE),
    "linear regression": lambda: (Mixture(LinearRegression(), 2), (WIDE[:, 1:], WIDE[:, 0])),
    "logistic regression": lambda: (Mixture(LogisticRegression(ridge=0.5), 2), (WIDE[:, 1:], (WIDE[:, 0] > 0) * 1)),
    "hmm": lambda: (HMM(Normal("full"), 2), SERIES),
    "linear system": lambda: (LinearGaussianSSM(9, missing=False, dynamics_bias=True), SERIES),
    "linear system, missing": lambda: (LinearGaussianSSM(2), SERIES),
    "factor analysis": lambda: (FactorAnalysis(3), WIDE),
}


@pytest.mark.parametrize("name", MANY_COLUMNS)
def test_nor_do_many_columns(name):
    """Steps of many restarts, plain and accelerated, derivatives, `fit_restarts` as one program, and draws."""
    model, x = MANY_COLUMNS[name]()
    x = jax.tree.map(jnp.asarray, x)
    x = model.units(x) if hasattr(model, "units") else x
    params = _start(model, x)
    assert not batched_calls(jax.jit(_steps(EM(), model, x)).lower(_many(params)))
    if name != "linear system":
        assert not batched_calls(jax.jit(jax.vmap(_gradient(model, x))).lower(_many(params)))
    if name in ("full", "linear system", "factor analysis"):
        assert not batched_calls(jax.jit(_steps(anderson(memory=3), model, x)).lower(_many(params)))
        restarts = jax.jit(functools.partial(fit_restarts, model, num_restarts=4, block_size=3))
        assert not batched_calls(restarts.lower(jax.random.key(0), x))
    if isinstance(model, Mixture) and name in ("full", "student t"):
        draw = jax.jit(lambda key, params: model.sample(key, params, 50))
        assert not batched_calls(draw.lower(jax.random.key(0), params))


def _run(script: str) -> str:
    """What a script prints that has two cores, and so two threads in XLA's pool; it ends within the limit, or fails.

    Compiled as for users: under the suite's cheaper code independent calls of one program come one after another.
    """
    two_cores = """
        import os
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
        import threading
        import jax, jax.numpy as jnp
    """
    source = textwrap.dedent(two_cores) + textwrap.dedent(script)
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_independent_factorisations_of_one_program_come_to_an_end():
    """Sixteen stacks of 48 matrices, 50 x 50: one program in one thread stood still within the first few runs."""
    out = _run("""
        from jaxem import numerics

        stacks = [(1 + i) * jnp.broadcast_to(jnp.eye(50), (48, 50, 50)) for i in range(16)]
        run = jax.jit(lambda stacks: [numerics.cholesky(stack) for stack in stacks])
        for _ in range(100):
            factors = jax.block_until_ready(run(stacks))
        print(float(factors[3][5, 7, 7]))
    """)
    np.testing.assert_allclose(float(out), 2, rtol=1e-6)


def test_programs_on_two_threads_come_to_an_end():
    """The whiteners of a mixture of eight normals in 40 columns, each thread for itself."""
    out = _run("""
        from jaxem import numerics

        stack = 4 * jnp.broadcast_to(jnp.eye(40), (8, 40, 40))
        run = jax.jit(lambda stack: numerics.inverse_lower(numerics.cholesky(stack)))
        jax.block_until_ready(run(stack))

        def often():
            for _ in range(300):
                jax.block_until_ready(run(stack))

        threads = [threading.Thread(target=often) for _ in range(2)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        print(float(run(stack)[3, 7, 7]))
    """)
    np.testing.assert_allclose(float(out), 0.5, rtol=1e-6)


def test_factors_of_stacks_equal_those_of_each_matrix():
    """Under any nesting of stacks and vmap."""
    stack = jnp.asarray([w.T @ w for w in RNG.normal(size=(6, 20, 11))], jnp.float32)
    each = [numerics.cholesky(matrix) for matrix in stack]
    np.testing.assert_allclose(numerics.cholesky(stack), each, rtol=1e-6)
    nested = jax.jit(jax.vmap(numerics.cholesky))(stack.reshape(2, 3, 11, 11))
    np.testing.assert_allclose(nested.reshape(6, 11, 11), each, rtol=1e-6)
