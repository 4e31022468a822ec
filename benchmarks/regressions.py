"""Regression on what is not seen, against peers: whole fits, to their likelihood or better.

    python benchmarks/regressions.py [--only a,b,c] [--quick] [--repeats N]

a  item response, two parameters: 20k persons, 50 items, 61 nodes, against theta-irt (the same method in JAX, float64),
   and girth once
   Its floor: 4 N J Q multiplications and additions a step, of two products (244 M, 2.4 ms at 100 GFLOP/s), and N Q
   exponentials (1.2 M, 0.7 ms).
b  a linear mixed model: 100k rows in 5k groups, 4 features and 2 with random effects, against statsmodels' MixedLM and
   mixedlm-rs (lme4's method in Rust)
   Its floor: one look at the rows, N (P + Q + 1)² multiply-adds (5 M), and steps of G groups (some 300 operations
   each), a fraction of a millisecond.
c  a mixture of experts: N = 50k, 8 features, 4 experts, a step beside one in NumPy, written for large products
   Its floor: 2 N K (P + 1)² multiplications and additions for the experts' normal equations, as much again for the
   predictors, and N K exponentials for the gate and the posterior each (32 M and 0.4 M, some 1 ms).

How it is measured. One process; the contestants take turns; medians over the repeats, compilation apart. jaxem starts
from a start of its own, made outside of what is timed, and is asked for the last 1e-7 nats a row or group; of b rows
are grouped, reduced to products and fitted within what is timed. The log-likelihoods reached are printed, and a fit
that ends below its peer's stops the script. Peers that are not installed are left out; scipy stands beside both of
b's, and minimises lme4's profiled deviance from the same products.
"""

import functools
import importlib.util
import time
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from timing import Row, measure, take_turns

from jaxem import ItemResponse, LinearMixedModel, LinearRegression, MixtureOfExperts, em_fit, group_rows


def peer(name: str) -> types.ModuleType | None:
    """A peer, None where it is not installed."""
    if importlib.util.find_spec(name.split(".")[0]) is None:
        print(f"  {name} is not installed")
        return None
    return importlib.import_module(name)


def item_response(quick: bool, repeats: int) -> list[Row]:
    persons, items = (500, 10) if quick else (20_000, 50)
    rng = np.random.default_rng(0)
    slope, difficulty = rng.uniform(0.6, 2.0, items), rng.normal(size=items)
    chance = 1 / (1 + np.exp(-slope * (rng.normal(size=(persons, 1)) - difficulty)))
    answers = (rng.random((persons, items)) < chance).astype(int)
    model, found = ItemResponse("2PL"), []
    girth = peer("girth")
    seconds = None
    if girth is not None:
        begin = time.perf_counter()
        theirs = girth.twopl_mml(answers.T)
        seconds = time.perf_counter() - begin
    for dtype in ("float64", "float32"):
        with jax.enable_x64(dtype == "float64"):
            x = jax.block_until_ready(jnp.asarray(answers, dtype))
            start = model.init(jax.random.key(0), x)
            name = f"2PL, {persons:,} persons, {items} items, {dtype}"
            print(name)
            tasks = {"jaxem": functools.partial(em_fit, model, start, x, tol=1e-7)}
            theta = peer("theta")  # which enables float64 as it is imported
            if theta is not None and dtype == "float64":
                tasks["theta-irt"] = functools.partial(theta.fit, answers.astype(float), "2PL")
            timings, fits = take_turns(tasks, repeats)
            fit = fits["jaxem"].check()
            told = f"  log-likelihood per row: jaxem {float(fit.objective) / persons:.7f}, {int(fit.num_steps)} steps"
            ours = timings["jaxem"].median
            if "theta-irt" in fits:
                rival, reached = timings["theta-irt"].median, fits["theta-irt"].loglik
                told += f"; theta-irt {reached / persons:.7f}, {fits['theta-irt'].n_iter} steps"
                assert float(fit.objective) >= reached - 1e-6 * persons, "the fit ends below its peer's"
            print(told)
            if seconds is not None:
                apart = np.max(np.abs(theirs["Discrimination"] - np.asarray(fit.params.discrimination)))
                print(f"  girth: {seconds:.2f} s, slopes {apart:.3f} apart at most")
            if theta is not None:
                found.append(
                    Row(name, f"{1e3 * ours:.0f} ms", f"theta-irt, {1e3 * rival:.0f} ms", f"{rival / ours:.1f}x", "1x")
                )
            if seconds is not None:
                found.append(Row(name, f"{1e3 * ours:.0f} ms", f"girth, {seconds:.1f} s", f"{seconds / ours:.0f}x", ""))
    return found


def by_scipy(features, random, response, numbers) -> types.SimpleNamespace:
    """lme4's profiled deviance (Bates et al. 2015, section 3.4) of products of columns, minimised by scipy."""
    every = np.column_stack([random, features, response])
    q, p = random.shape[1], features.shape[1]
    order = np.argsort(numbers, kind="stable")
    starts = np.flatnonzero(np.diff(numbers[order], prepend=-1))
    sums = np.add.reduceat(every[order][:, :, None] * every[order][:, None], starts)
    rows, lower = len(response), np.tril_indices(q)

    def deviance(theta):
        root = np.zeros((q, q))
        root[lower] = theta
        factor = np.linalg.cholesky(np.eye(q) + root.T @ sums[:, :q, :q] @ root)
        inner = np.linalg.solve(factor, root.T @ sums[:, :q, q:])
        rest = sums[:, q:, q:].sum(axis=0) - np.einsum("gki,gkj->ij", inner, inner)
        square = rest[p, p] - rest[p, :p] @ np.linalg.solve(rest[:p, :p], rest[:p, p])
        logdet = 2 * np.log(np.diagonal(factor, axis1=1, axis2=2)).sum()
        return logdet + rows * (1 + np.log(2 * np.pi * square / rows))

    best = scipy.optimize.minimize(deviance, np.eye(q)[lower], method="L-BFGS-B")
    return types.SimpleNamespace(llf=-0.5 * best.fun)


def mixed_model(quick: bool, repeats: int) -> list[Row]:
    rows, groups = (2000, 100) if quick else (100_000, 5000)
    rng = np.random.default_rng(1)
    numbers = np.sort(np.concatenate([np.arange(groups), rng.integers(0, groups, rows - groups)]))
    features = np.column_stack([np.ones(rows), rng.normal(size=(rows, 3))])
    random = features[:, :2]
    effects = (rng.normal(size=(groups, 2)) @ [[1.0, 0.3], [0.0, 0.6]])[numbers]
    response = features @ [1.0, 2.0, -1.0, 0.5] + np.sum(random * effects, axis=1) + rng.normal(size=rows)
    name = f"mixed model, {rows:,} rows, {groups:,} groups"
    print(f"\n{name}, float64")
    with jax.enable_x64(True):
        model = LinearMixedModel()
        start = model.init(jax.random.key(0), group_rows((features, random, response), numbers))

        def ours():
            return em_fit(model, start, group_rows((features, random, response), numbers), tol=1e-7)

        tasks = {"jaxem": ours}
        statsmodels, rival = peer("statsmodels.api"), peer("mixedlm_rs")
        if statsmodels is not None:
            of = statsmodels.MixedLM(response, features, numbers, exog_re=random)
            tasks["statsmodels"] = functools.partial(of.fit, reml=False)
        if rival is not None:
            of_rust = rival.MixedLM(response, features, numbers, exog_re=random)
            tasks["mixedlm-rs"] = functools.partial(of_rust.fit, reml=False)
        tasks["scipy"] = functools.partial(by_scipy, features, random, response, numbers)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            timings, fits = take_turns(tasks, repeats)
    fit = fits.pop("jaxem").check()
    print(f"  log-likelihood: jaxem {float(fit.objective):.6f} after {int(fit.num_steps)} steps", end="")
    print("".join(f"; {other} {found.llf:.6f}" for other, found in fits.items()))
    assert all(float(fit.objective) >= found.llf - 1e-6 * groups for found in fits.values()), "a peer's is higher"
    taken = timings["jaxem"].median
    return [
        Row(
            name,
            f"{1e3 * taken:.0f} ms",
            f"{other}, {timings[other].median:.2f} s",
            f"{timings[other].median / taken:.1f}x",
            "10x" if other == "statsmodels" else "",
        )
        for other in fits
    ]


def experts_by_numpy(z, y, gate, lines, variance, steps: int):
    """EM in NumPy, the gate by its bound: z (P + 1, N); gate and lines (K, P + 1)."""
    inverse = np.linalg.inv(z @ z.T)
    for _ in range(steps + 1):
        eta = gate @ z
        eta -= np.max(eta, axis=0)
        prior = np.exp(eta)
        prior /= prior.sum(axis=0)
        residual = y - lines @ z
        joint = prior * np.exp(-0.5 * residual**2 / variance[:, None]) / np.sqrt(2 * np.pi * variance)[:, None]
        evidence = joint.sum(axis=0)
        share = joint / evidence
        loglik = np.log(evidence).sum()
        gate = gate + 2 * ((share - prior) @ z.T) @ inverse
        lines = np.stack([np.linalg.solve((r * z) @ z.T, (r * z) @ y) for r in share])
        variance = (share * (y - lines @ z) ** 2).sum(axis=1) / share.sum(axis=1)
    return loglik


def experts(quick: bool, repeats: int) -> list[Row]:
    rows, features, count, steps = (1000, 3, 2, 5) if quick else (50_000, 8, 4, 10)
    rng = np.random.default_rng(2)
    x = rng.normal(size=(rows, features))
    labels = np.argmax(x @ rng.normal(size=(features, count)) + rng.gumbel(size=(rows, count)), axis=1)
    y = np.sum(x * rng.normal(size=(count, features))[labels], axis=1) + 0.5 * rng.normal(size=rows)
    model, found = MixtureOfExperts(LinearRegression(), count), []
    for dtype in ("float64", "float32"):
        with jax.enable_x64(dtype == "float64"):
            data = jax.block_until_ready((jnp.asarray(x, dtype), jnp.asarray(y, dtype)))
            start = model.init(jax.random.key(0), data)
            name = f"mixture of {count} experts, N = {rows:,}, {features} features, {dtype}, a step"
            print(f"\n{name}")
            z = np.concatenate([np.ones((1, rows)), x.T])
            gate, parts = np.asarray(start.weights.line, float), start.components
            lines = np.concatenate([parts.intercept[:, None], parts.coefficients], axis=1, dtype=float)
            tasks = {
                "jaxem": functools.partial(em_fit, model, start, data, tol=-1.0, max_steps=steps),
                "NumPy": functools.partial(
                    experts_by_numpy, z, y, gate, lines, np.asarray(parts.variance, float), steps
                ),
            }
            timings, fits = take_turns(tasks, repeats)
            apart = abs(float(fits["jaxem"].loglik) - fits["NumPy"]) / rows
            print(f"  log-likelihoods after {steps} steps differ by {apart:.1e} nats a row")
            assert apart < (1e-9 if dtype == "float64" else 1e-4), "the steps are not the peer's"
            ours, other = (timing.median / (steps + 1) for timing in timings.values())
            found.append(Row(name, f"{1e3 * ours:.1f} ms", f"NumPy, {1e3 * other:.1f} ms", f"{other / ours:.1f}x", ""))
    return found


if __name__ == "__main__":
    claims = {"a": item_response, "b": mixed_model, "c": experts}
    packages = ("jax", "numpy", "scipy", "theta-irt", "girth", "statsmodels", "mixedlm-rs")
    measure(__doc__.splitlines()[0], claims, packages, repeats=3)
