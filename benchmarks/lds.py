"""EM for linear dynamical systems, against dynamax and pykalman: the time of one EM step.

    python benchmarks/lds.py [--only a,b,c] [--quick] [--repeats N]

a  64 sequences of 500 steps: 4 states, 10 observations a step
b  one sequence of 5000 steps, the same sizes
c  the same data with a tenth of all entries missing: jaxem alone, as dynamax takes none

How it is measured. One process; everyone starts from the same parameters and takes turns; a call is an E-step and an
M-step in one compiled program, five times from the start, and times are a step's; medians over the repeats,
compilation apart. (Not each from the one before: from several sequences dynamax 1.0 takes the covariance of the first
state wrongly, and in float32 its next steps are NaN.) "jaxem" is given data that `units` has read, as `em_fit` reads
them, and knows that nothing is missing; "traced" are data of which a program learns that only as it runs.
dynamax's own functions are compiled together and vmapped over the sequences, which spares it the Python loop of its
`fit_em`. Both in float32, and both in float64.
pykalman is NumPy in float64: one iteration of its `em` on the 5000 steps, all parameters but the offsets.
The parameters that one step leads to are compared with dynamax's.
"""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from timing import Row, measure, take_turns

from jaxem import LinearGaussianSSM, LinearGaussianSSMParams

STATES, COLUMNS = 4, 10


def system(dtype) -> LinearGaussianSSMParams:
    rng = np.random.default_rng(0)
    params = LinearGaussianSSMParams(
        initial_mean=np.zeros(STATES),
        initial_covariance=np.eye(STATES),
        dynamics=0.95 * np.linalg.qr(rng.normal(size=(STATES, STATES)))[0],
        dynamics_covariance=0.3 * np.eye(STATES),
        emission=rng.normal(size=(COLUMNS, STATES)),
        emission_covariance=np.eye(COLUMNS),
    )
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)


def repeated(step, params, x, steps):
    """`steps` times one EM step from the start, as a function without arguments; one compilation."""
    compiled = jax.jit(step)

    def run():
        for _ in range(steps):
            after = jax.block_until_ready(compiled(params, x))
        return after

    return run


def ours(model, params, x, steps):
    return repeated(lambda params, x: model.m_step(model.e_step(params, x)), params, x, steps)


def dynamax(params, x, steps):
    from dynamax.linear_gaussian_ssm import LinearGaussianSSM as Peer

    peer = Peer(STATES, COLUMNS, has_dynamics_bias=False, has_emissions_bias=False)
    start, properties = peer.initialize(
        jax.random.key(0),
        initial_mean=params.initial_mean,
        initial_covariance=params.initial_covariance,
        dynamics_weights=params.dynamics,
        dynamics_covariance=params.dynamics_covariance,
        emission_weights=params.emission,
        emission_covariance=params.emission_covariance,
    )
    state = peer.initialize_m_step_state(start, properties)

    def step(params, x):
        stats, _ = jax.vmap(functools.partial(peer.e_step, params))(x)
        return peer.m_step(params, properties, stats, state)[0]

    return repeated(step, start, x, steps)


def pykalman(params, x):
    from pykalman import KalmanFilter

    def run():
        peer = KalmanFilter(
            transition_matrices=np.asarray(params.dynamics, float),
            observation_matrices=np.asarray(params.emission, float),
            transition_covariance=np.asarray(params.dynamics_covariance, float),
            observation_covariance=np.asarray(params.emission_covariance, float),
            initial_state_mean=np.asarray(params.initial_mean, float),
            initial_state_covariance=np.asarray(params.initial_covariance, float),
            em_vars=[
                "transition_matrices", "observation_matrices", "transition_covariance", "observation_covariance",
                "initial_state_mean", "initial_state_covariance",
            ],
        )  # fmt: skip
        return peer.em(np.asarray(x, float), n_iter=1).transition_matrices

    return run


def race(sequences: int, length: int, target: str, repeats: int, slow_peer: bool = False) -> list[Row]:
    rows, steps = [], 5
    for dtype in (jnp.float32, jnp.float64):
        with jax.enable_x64(dtype == jnp.float64):
            params = system(dtype)
            x = LinearGaussianSSM(STATES).sample(jax.random.key(0), params, length, sequences)
            name = f"{sequences} x {length}, {jnp.dtype(dtype).name}"
            print(name)
            tasks = {
                "jaxem": ours(LinearGaussianSSM(STATES), params, LinearGaussianSSM(STATES).units(x), steps),
                "jaxem, traced": ours(LinearGaussianSSM(STATES), params, x, steps),
                "dynamax": dynamax(params, x, steps),
            }
            timings, found = take_turns(tasks, repeats)
            gap = jnp.max(jnp.abs(found["jaxem"].dynamics - found["dynamax"].dynamics.weights))
            print(f"  after a step the dynamics differ by {float(gap):.1e}")
            theirs = timings["dynamax"].per(steps)
            for contestant in ("jaxem", "jaxem, traced"):
                mine = timings[contestant].per(steps)
                rows.append(
                    Row(
                        f"EM step, {name}: {contestant}", f"{1e3 * mine.median:.2f} ms",
                        f"dynamax, {1e3 * theirs.median:.1f} ms", f"{theirs.median / mine.median:.1f}x", target,
                    )
                )  # fmt: skip
            if slow_peer and dtype == jnp.float64:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    slow = take_turns({"pykalman": pykalman(params, x[0])}, 1)[0]["pykalman"]
                mine = timings["jaxem"].per(steps)
                rows.append(
                    Row(
                        f"EM step, {name}: jaxem", f"{1e3 * mine.median:.2f} ms", f"pykalman, {slow.median:.2f} s",
                        f"{slow.median / mine.median:.0f}x", "at least 50x",
                    )
                )  # fmt: skip
    return rows


def many(quick: bool, repeats: int) -> list[Row]:
    return race(4 if quick else 64, 300 if quick else 500, "at least 10x", repeats)


def long(quick: bool, repeats: int) -> list[Row]:
    return race(1, 300 if quick else 5000, "at least 2x", repeats, slow_peer=True)


def missing(quick: bool, repeats: int) -> list[Row]:
    rows, steps = [], 2
    for sequences, length in ((4, 100), (1, 100)) if quick else ((64, 500), (1, 5000)):
        params = system(jnp.float32)
        x = LinearGaussianSSM(STATES).sample(jax.random.key(0), params, length, sequences)
        x = jnp.where(jax.random.uniform(jax.random.key(1), x.shape) < 0.1, jnp.nan, x)
        print(f"{sequences} x {length}, a tenth missing, float32")
        timing = take_turns({"jaxem": ours(LinearGaussianSSM(STATES), params, x, steps)}, repeats)[0]["jaxem"]
        claim = f"EM step, {sequences} x {length}, a tenth missing, float32"
        rows.append(Row(claim, f"{1e3 * timing.per(steps).median:.1f} ms", "none takes it", "", ""))
    return rows


if __name__ == "__main__":
    measure(
        __doc__.splitlines()[0],
        {"a": many, "b": long, "c": missing},
        ("jax", "dynamax", "pykalman", "numpy"),
        repeats=15,
    )
