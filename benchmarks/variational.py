"""Variational Gaussian mixtures against scikit-learn's BayesianGaussianMixture, variational HMMs against bayespy.

    python benchmarks/variational.py [--only a,b,c] [--quick] [--repeats 5]

Claims, each a row of the table printed at the end:

a   one fit, N = 100k, D = 16, K = 16, full covariances, a Dirichlet on the weights, exactly 20 steps from one start:
    at least 6x scikit-learn in float32, 4x in float64
b   64 restarts, N = 2000, D = 4, K = 8 overlapping clusters, full, float32, exactly 50 steps each: at least 20x less
    time per restart and step
c   a variational HMM, Poisson observations of 4 states, T = 2000, float64, exactly 20 steps from one start, against
    bayespy where it is installed: every step's lower bound, which is complete on both sides, is the same

How it is measured. One process; the contestants take turns, so that a slow spell of the machine hits all; medians over
the repeats. Both sides have the same data, dtype, priors and starts: scikit-learn takes none, so that its state after
one step of its own, which is not timed, is where both begin, it by warm_start. What is counted: a fit of S steps is S
M-steps and S + 1 E-steps on both sides (jaxem's extra E-step makes the reported bound that of the returned parameters;
scikit-learn's makes the labels). Of the restarts scikit-learn runs the first few one by one, with its default threads
and with one, and the faster counts. Before a ratio is printed, both sides' means after equally many steps are compared:
a disagreement ends the script. In (c) every turn begins with an untimed call of both sides, since bayespy leaves
threads that still spin.

Floor of a step in (a): the two products over rows, whitening and second moments, are 4 N K D² operations, 1.6 G, 16 ms
in float32 on the two cores that the README's figures are from; beside these are N K exponentials, 1 ms. What
variational Bayes adds to the plain mixture is of the size of its hyperparameters, K D² numbers: nothing beside that.
"""

import copy
import importlib.util
import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gaussian_mixture import clusters
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import BayesianGaussianMixture
from threadpoolctl import threadpool_limits
from timing import Row, measure, take_turns

from jaxem import (
    HMM,
    Dirichlet,
    GammaPrior,
    HMMParams,
    MixtureParams,
    Normal,
    NormalInverseWishart,
    Poisson,
    Variational,
    VariationalMixture,
    default_prior,
    em_fit,
    fit_restarts,
)

# Largest difference of means, after the same steps from the same start, in standard deviations of the data.
AGREEMENT = {"float32": 1e-2, "float64": 1e-7}


def contestants(x: np.ndarray, count: int, seeds: int) -> tuple[VariationalMixture, list[BayesianGaussianMixture]]:
    """The model, and scikit-learn's after one step from random rows, of the same priors: one a seed."""
    prior = default_prior(jnp.asarray(x), count)
    model = VariationalMixture(Normal("full", prior=prior), count, 1 / count)
    theirs = [
        BayesianGaussianMixture(
            n_components=count,
            covariance_type="full",
            weight_concentration_prior_type="dirichlet_distribution",
            weight_concentration_prior=1 / count,
            mean_prior=np.asarray(prior.mean),
            mean_precision_prior=prior.shrinkage,
            degrees_of_freedom_prior=prior.degrees_of_freedom,
            covariance_prior=np.asarray(prior.scale),
            reg_covar=0.0,
            tol=0.0,
            max_iter=1,
            warm_start=True,
            init_params="random_from_data",
            random_state=seed,
        )
        for seed in range(seeds)
    ]
    return model, [run(each, x, 1) for each in theirs]


def run(model: BayesianGaussianMixture, x: np.ndarray, steps: int) -> BayesianGaussianMixture:
    """The model so many steps further."""
    model = copy.copy(model)
    model.max_iter = steps
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(x)


def state(model: BayesianGaussianMixture, dtype: str) -> MixtureParams:
    """Where it stands, as jaxem has it."""
    degrees = model.degrees_of_freedom_
    return jax.tree.map(
        lambda leaf: np.asarray(leaf, dtype),
        MixtureParams(
            weights=Dirichlet(model.weight_concentration_),
            components=NormalInverseWishart(
                mean=model.means_,
                shrinkage=model.mean_precision_,
                degrees_of_freedom=degrees,
                scale=degrees[:, None, None] * model.covariances_,
            ),
        ),
    )


def agree(ours: Any, theirs: BayesianGaussianMixture, x: np.ndarray) -> None:
    """Print how far means are apart; end the script if they are not the same."""
    gap = np.max(np.abs(np.asarray(ours) - theirs.means_) / x.std(axis=0))
    print(f"  largest difference of means: {gap:.1e} standard deviations")
    if not gap <= AGREEMENT[x.dtype.name]:
        sys.exit(f"jaxem and scikit-learn disagree by more than {AGREEMENT[x.dtype.name]:g}: no ratio means anything")


def one_fit(quick: bool, repeats: int) -> list[Row]:
    """Claim a."""
    table = []
    for dtype, target in (("float32", "6x"), ("float64", "4x")):
        x = clusters(10_000 if quick else 100_000, 16, 16, spread=1.0, dtype=dtype)
        with jax.enable_x64(dtype == "float64"):
            table.append(_one_fit(x, 16, 20, target, repeats))
    return table


def _one_fit(x: np.ndarray, count: int, steps: int, target: str, repeats: int) -> Row:
    (rows, columns), dtype = x.shape, x.dtype.name
    print(f"\n(a) one fit, N = {rows}, D = {columns}, K = {count}, full, {steps} steps, {dtype}")
    model, (peer,) = contestants(x, count, 1)
    start, on_device = jax.device_put(state(peer, dtype)), jnp.asarray(x)
    tasks: dict[str, Callable[[], Any]] = {
        "jaxem": lambda: em_fit(model, start, on_device, tol=-1.0, max_steps=steps),
        "scikit-learn": lambda: run(peer, x, steps),
    }
    timings, results = take_turns(tasks, repeats)
    taken = {"jaxem": int(results["jaxem"].num_steps), "scikit-learn": results["scikit-learn"].n_iter_}
    if set(taken.values()) != {steps}:
        sys.exit(f"not the same work: steps taken {taken}, {steps} asked for")
    agree(results["jaxem"].params.components.mean, results["scikit-learn"], x)
    ratio = timings["scikit-learn"].median / timings["jaxem"].median
    print(f"  ratio: {ratio:.1f}x")
    return Row(
        claim=f"(a) one variational fit, N = {rows}, D = {columns}, K = {count}, {dtype}",
        ours=f"{1e3 * timings['jaxem'].median / steps:.1f} ms a step",
        peer=f"scikit-learn, {1e3 * timings['scikit-learn'].median / steps:.1f} ms a step",
        ratio=f"{ratio:.1f}x",
        target=target,
    )


def restarts(quick: bool, repeats: int) -> list[Row]:
    """Claim b."""
    many, rows, peers, steps, count = (8, 500, 2, 20, 8) if quick else (64, 2000, 6, 50, 8)
    print(f"\n(b) {many} restarts, N = {rows}, D = 4, K = {count}, full, float32, {steps} steps each")
    x = clusters(rows, 4, count, spread=1.5, dtype="float32")
    model, begun = contestants(x, count, many)
    starts = jax.device_put(jax.tree.map(lambda *leaves: np.stack(leaves), *(state(one, "float32") for one in begun)))
    on_device = jnp.asarray(x)

    def theirs() -> list[BayesianGaussianMixture]:
        return [run(one, x, steps) for one in begun[:peers]]

    def theirs_unthreaded() -> list[BayesianGaussianMixture]:
        with threadpool_limits(1):
            return theirs()

    tasks: dict[str, Callable[[], Any]] = {
        "jaxem": lambda: fit_restarts(model, None, on_device, init=starts, tol=-1.0, max_steps=steps),
        "scikit-learn": theirs,
        "scikit-learn, one thread": theirs_unthreaded,
    }
    timings, results = take_turns(tasks, repeats)
    for index in range(peers):
        agree(results["jaxem"].params.components.mean[index], results["scikit-learn"][index], x)
    peer = min((name for name in tasks if name != "jaxem"), key=lambda name: timings[name].median)
    ours = timings["jaxem"].median / (many * steps)
    other = timings[peer].median / (peers * steps)
    print(f"  per restart and step: {1e6 * ours:.2f} us against {1e6 * other:.1f} us ({peer}): {other / ours:.1f}x")
    return [
        Row(
            claim=f"(b) {many} variational restarts, N = {rows}, D = 4, K = {count}, float32, per restart and step",
            ours=f"{1e6 * ours:.1f} us",
            peer=f"{peer}, {1e6 * other:.0f} us",
            ratio=f"{other / ours:.1f}x",
            target="20x",
        )
    ]


def chain(quick: bool, repeats: int) -> list[Row]:
    """Claim c."""
    if importlib.util.find_spec("bayespy") is None:
        print("\n(c) bayespy is not installed: left out")
        return []
    with jax.enable_x64(True):
        return _chain(200 if quick else 2000, 4, 5 if quick else 20, repeats)


def _chain(length: int, count: int, steps: int, repeats: int) -> list[Row]:
    print(f"\n(c) a variational HMM, Poisson observations, T = {length}, K = {count}, {steps} steps, float64")
    rng = np.random.default_rng(0)
    states = (np.arange(length) // 10) % count
    x = rng.poisson(np.array([1.0, 4.0, 10.0, 20.0])[states])
    sticky, shape = 1.0 + 3.0 * np.eye(count), np.array([2.0, 5.0, 9.0, 16.0])
    model = HMM(Variational(Poisson(prior=GammaPrior(2.0, 0.5))), count, transition_prior=Dirichlet(sticky))
    start = HMMParams(
        initial=Dirichlet(np.ones(count)),
        transition=Dirichlet(sticky),
        emissions=GammaPrior(2 * shape[:, None], np.full((count, 1), 2.0)),
    )
    on_device = jnp.asarray(x, float)[:, None]

    def theirs() -> np.ndarray:
        from bayespy.inference import VB
        from bayespy.nodes import CategoricalMarkovChain, Gamma, Mixture
        from bayespy.nodes import Dirichlet as Concentrations
        from bayespy.nodes import Poisson as Counts

        initial, moves = Concentrations(np.ones(count)), Concentrations(sticky)
        path, rate = CategoricalMarkovChain(initial, moves, states=length), Gamma(2.0, 0.5, plates=(count,))
        seen = Mixture(path, Counts, rate)
        seen.observe(x)
        rate.initialize_from_parameters(2 * shape, np.full(count, 2.0))
        inference = VB(seen, path, rate, moves, initial)
        path.update()
        bounds = []
        for _ in range(steps):
            for node in (rate, moves, initial, path):
                node.update()
            bounds.append(inference.compute_lowerbound())
        return np.array(bounds)

    tasks: dict[str, Callable[[], Any]] = {
        "jaxem": lambda: em_fit(model, start, on_device, tol=-1.0, max_steps=steps),
        "bayespy": theirs,
    }
    timings, results = take_turns(tasks, repeats, untimed=1)
    ours = np.asarray(results["jaxem"].history[1 : steps + 1])
    gap = np.max(np.abs(ours - results["bayespy"]))
    print(f"  bounds {ours[0]:.6f} ... {ours[-1]:.6f}, {gap:.1e} nats apart at most")
    if not gap < 1e-6:
        sys.exit("jaxem and bayespy disagree about the bound: no ratio means anything")
    ratio = timings["bayespy"].median / timings["jaxem"].median
    return [
        Row(
            claim=f"(c) a variational HMM, T = {length}, K = {count}, float64, same bounds",
            ours=f"{1e3 * timings['jaxem'].median / steps:.2f} ms a step",
            peer=f"bayespy, {1e3 * timings['bayespy'].median / steps:.2f} ms a step",
            ratio=f"{ratio:.1f}x",
            target="",
        )
    ]


if __name__ == "__main__":
    measure(
        __doc__.splitlines()[0],
        {"a": one_fit, "b": restarts, "c": chain},
        ("jaxem", "jax", "scikit-learn", "bayespy", "numpy"),
        repeats=5,
    )
