"""Hidden Markov models against hmmlearn and dynamax: time of an EM step.

    python benchmarks/hmm.py [--only a,b,c,d] [--quick] [--repeats N]

a  256 sequences of 200 steps, 5 states, 2 columns, diagonal covariances
b  one sequence of 10,000 steps, the same model
c  128 restarts of a 3-state Poisson HMM on the earthquakes (107 steps); hmmlearn makes them one by one
d  memory and time of one sequence of 1,000,000 steps, 8 states: no peer

How it is measured. One process, a fixed number of EM steps from the same start, contestants in turn, medians over the
repeats, compilation apart. hmmlearn works in float64, by its "scaling" implementation, the faster of its two; dynamax
(the step of its `fit_em`, compiled once) and jaxem in float32 and in float64. The log-likelihoods reached must agree.
"""

import functools
import resource
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from timing import Row, measure, take_turns

from jaxem import HMM, HMMParams, Normal, NormalParams, Poisson, PoissonParams, datasets, em_fit, fit_restarts

STATES, COLUMNS, STEPS = 5, 2, 25


def simulated(sequences: int, length: int):
    """Sequences (B, T, D), the chain and the means that they come from."""
    rng = np.random.default_rng(0)
    transition = np.full((STATES, STATES), 0.05) + (1 - 0.05 * STATES) * np.eye(STATES)
    means = 3 * rng.normal(size=(STATES, COLUMNS))
    states = np.zeros((sequences, length), int)
    states[:, 0] = rng.integers(0, STATES, sequences)
    for t in range(1, length):
        draw = rng.random(sequences)
        states[:, t] = np.sum(np.cumsum(transition[states[:, t - 1]], axis=1) < draw[:, None], axis=1)
    return means[states] + rng.normal(size=(sequences, length, COLUMNS)), transition, means + 0.5


def ours(x, transition, means, dtype):
    """A function that makes the fixed number of steps."""
    params = HMMParams(
        initial=jnp.full(STATES, 1 / STATES, dtype),
        transition=jnp.asarray(transition, dtype),
        emissions=NormalParams(mean=jnp.asarray(means, dtype), covariance=jnp.full(means.shape, 2, dtype)),
    )
    return functools.partial(
        em_fit, HMM(Normal("diag"), STATES), params, jnp.asarray(x, dtype), tol=-1.0, max_steps=STEPS
    )


def hmmlearn(x, transition, means):
    from hmmlearn.hmm import GaussianHMM

    rows, lengths = x.reshape(-1, COLUMNS), [x.shape[1]] * x.shape[0]

    def fit():
        model = GaussianHMM(
            STATES, "diag", n_iter=STEPS, tol=-np.inf, init_params="", implementation="scaling", min_covar=0,
            covars_prior=0, covars_weight=1,
        )  # fmt: skip
        model.startprob_, model.transmat_ = np.full(STATES, 1 / STATES), transition
        model.means_, model.covars_ = means, np.full(means.shape, 2.0)
        return model.fit(rows, lengths)

    return fit


def dynamax(x, transition, means, dtype):
    from dynamax.hidden_markov_model import DiagonalGaussianHMM

    # Its priors take the default precision.
    precision = functools.partial(jax.enable_x64, dtype == jnp.float64)
    with precision():
        model = DiagonalGaussianHMM(STATES, COLUMNS, emission_prior_scale=1e-6)
        start, properties = model.initialize(
            jax.random.key(0),
            initial_probs=jnp.full(STATES, 1 / STATES, dtype),
            transition_matrix=jnp.asarray(transition, dtype),
            emission_means=jnp.asarray(means, dtype),
            emission_scale_diags=jnp.full(means.shape, np.sqrt(2), dtype),
        )
        data = jnp.asarray(x, dtype)

    # Its fit_em compiles this step anew in every call; here it is compiled once.
    @jax.jit
    def em_step(params, memory):
        stats, _ = jax.vmap(functools.partial(model.e_step, params))(data)
        return model.m_step(params, properties, stats, memory)

    def fit():
        with precision():
            params, memory = start, model.initialize_m_step_state(start, properties)
            for _ in range(STEPS):
                params, memory = em_step(params, memory)
            return params

    return fit


def fixed_steps(claim: str, sequences: int, length: int, repeats: int, targets: tuple[str, str]) -> list[Row]:
    x, transition, means = simulated(sequences, length)
    print(claim)
    tasks = {"hmmlearn": hmmlearn(x, transition, means)}
    for dtype in (jnp.float32, jnp.float64):
        tasks[f"jaxem {dtype.__name__}"] = ours(x, transition, means, dtype)
        tasks[f"dynamax {dtype.__name__}"] = dynamax(x, transition, means, dtype)
    timings, results = take_turns(tasks, repeats)
    peer = results["hmmlearn"].score(x.reshape(-1, COLUMNS), [length] * sequences)
    loglik = float(results["jaxem float64"].loglik)
    print(f"  log-likelihood: jaxem {loglik:.6f}, hmmlearn {peer:.6f}")
    assert abs(loglik - peer) < 1e-6 * abs(peer)
    rows = []
    for dtype in ("float32", "float64"):
        # The E-step at the start is a step's work too.
        mine = timings[f"jaxem {dtype}"].per(STEPS + 1).median
        for name, steps, target in (("hmmlearn", STEPS, targets[0]), (f"dynamax {dtype}", STEPS, targets[1])):
            theirs = timings[name].per(steps).median
            rows.append(
                Row(f"{claim}, {dtype}", f"{1e3 * mine:.2f} ms/step", f"{name}, {1e3 * theirs:.1f} ms/step",
                    f"{theirs / mine:.1f}x", target)
            )  # fmt: skip
    return rows


def batch(quick: bool, repeats: int) -> list[Row]:
    size = (16, 50) if quick else (256, 200)
    return fixed_steps(f"{size[0]} sequences of {size[1]}", *size, repeats, ("at least 4x", "at least 8x"))


def single(quick: bool, repeats: int) -> list[Row]:
    length = 500 if quick else 10_000
    return fixed_steps(f"one sequence of {length:,}", 1, length, repeats, ("at least 2.5x", "at least 8x"))


def restarts(quick: bool, repeats: int) -> list[Row]:
    from hmmlearn.hmm import PoissonHMM

    count, steps, x = (8 if quick else 128), 50, datasets.earthquakes()
    rng = np.random.default_rng(0)
    initial, transition = rng.dirichlet(np.ones(3), count), rng.dirichlet(np.ones(3), (count, 3))
    rate = np.sort(rng.uniform(8, 35, (count, 3, 1)), axis=1)
    print(f"{count} restarts on the earthquakes, {steps} steps each")

    def theirs():
        scores = []
        for number in range(count):
            model = PoissonHMM(
                3, n_iter=steps, tol=-np.inf, init_params="", implementation="scaling", lambdas_prior=0,
                lambdas_weight=0,
            )  # fmt: skip
            model.startprob_, model.transmat_, model.lambdas_ = initial[number], transition[number], rate[number]
            scores.append(model.fit(x[:, None]).monitor_.history[-1])
        return np.array(scores)

    tasks, rows = {"hmmlearn": theirs}, []
    for dtype in (jnp.float32, jnp.float64):
        starts = HMMParams(
            initial=jnp.asarray(initial, dtype),
            transition=jnp.asarray(transition, dtype),
            emissions=PoissonParams(rate=jnp.asarray(rate, dtype)),
        )
        data = jnp.asarray(x, dtype)
        tasks[dtype.__name__] = functools.partial(
            fit_restarts, HMM(Poisson(), 3), None, data, init=starts, tol=-1.0, max_steps=steps
        )
    timings, results = take_turns(tasks, repeats)
    best = results["hmmlearn"].max()
    for dtype in ("float32", "float64"):
        print(f"  best: hmmlearn {best:.4f}, jaxem {dtype} {float(results[dtype].best.objective):.4f}")
        mine, peer = timings[dtype].median, timings["hmmlearn"].median
        rows.append(
            Row(f"{count} restarts of a Poisson HMM, {dtype}", f"{1e3 * mine:.0f} ms", f"hmmlearn, {peer:.2f} s",
                f"{peer / mine:.0f}x", "at least 25x")
        )  # fmt: skip
    return rows


def long(quick: bool, repeats: int) -> list[Row]:
    length, states = (10_000 if quick else 1_000_000), 8
    rng = np.random.default_rng(0)
    x = rng.normal(size=(length, 1)) + 2.0 * ((np.arange(length) // 50) % states)[:, None]
    rows = []
    for dtype in (jnp.float32, jnp.float64):
        params = HMMParams(
            initial=jnp.full(states, 1 / states, dtype),
            transition=jnp.asarray(np.full((states, states), 0.02 / 7) + (0.98 - 0.02 / 7) * np.eye(states), dtype),
            emissions=NormalParams(
                mean=2 * jnp.arange(states, dtype=dtype)[:, None] + 0.3, covariance=jnp.full((states, 1), 2, dtype)
            ),
        )
        fit = functools.partial(
            em_fit, HMM(Normal("diag"), states), params, jnp.asarray(x, dtype), tol=-1.0, max_steps=3
        )
        timings, _ = take_turns({dtype.__name__: fit}, min(repeats, 3))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        rows.append(
            Row(f"one sequence of {length:,}, 8 states, {dtype.__name__}",
                f"{timings[dtype.__name__].per(4).median:.2f} s/step", "no peer",
                f"{peak:.2f} GiB, the peak of the process", "below 2 GB")
        )  # fmt: skip
    return rows


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    with jax.enable_x64(True):
        measure(
            __doc__.splitlines()[0],
            {"a": batch, "b": single, "c": restarts, "d": long},
            ("jax", "numpy", "hmmlearn", "dynamax"),
            repeats=5,
        )
