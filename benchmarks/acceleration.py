"""Accelerated EM against EM: fewer E-steps, and less time.

    python benchmarks/acceleration.py [--only a,b,c,d] [--quick] [--repeats N]

a  latent classes: 50k rows, 8 yes/no items, K = 4 classes that overlap
b  a Gaussian mixture: N = 50k, D = 2, K = 5 clusters that overlap, full covariances
c  deaths in The Times (Hasselblad 1969): 10 rows, 2 Poissons: the overhead of a step shows
d  galaxies (Roeder 1990), 5 components, 24 starts by k-means++: passes only, EM being quick from most of them

How it is measured. One process; EM and its accelerators take turns from one start, each to convergence: EM at tol, a
distance to the limit in nats a row, and the accelerators at a tenth of it, so that they end no lower; medians over the
repeats, compilation apart. Passes are E-steps over all rows, the first included. The objectives reached are printed,
and an accelerated fit that ends lower than EM by more than a tenth of tol a row stops the script.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from timing import Row, measure, take_turns

from jaxem import (
    EM,
    Bernoulli,
    Mixture,
    MixtureParams,
    Normal,
    Poisson,
    PoissonParams,
    anderson,
    datasets,
    em_fit,
    squarem,
)

ALGORITHMS = {"EM": EM(), "SQUAREM": squarem(EM()), "Anderson": anderson(EM())}


def race(claim, model, params, x, weights, tol, repeats) -> list[Row]:
    total = len(x) if weights is None else float(np.sum(weights))
    print(f"{claim}, tol {tol:g}")
    fit = functools.partial(em_fit, model, params, x, weights, max_steps=50_000)
    tasks = {
        name: functools.partial(fit, algorithm=algorithm, tol=tol if name == "EM" else tol / 10)
        for name, algorithm in ALGORITHMS.items()
    }
    timings, fits = take_turns(tasks, repeats)
    plain = fits["EM"]
    rows = []
    for name, found in fits.items():
        short = float(plain.objective - found.objective) / total
        print(f"  {name}: {float(found.num_passes):.0f} passes, objective {float(found.objective):.6f}")
        if name == "EM":
            continue
        assert short <= tol / 10, f"{name} ends {short:.1e} a row below EM"
        fewer = float(plain.num_passes / found.num_passes)
        rows.append(
            Row(
                f"{claim}: {name}, {fewer:.1f}x fewer passes",
                f"{timings[name].median:.3g} s, {float(found.num_passes):.0f} passes",
                f"EM, {timings['EM'].median:.3g} s, {float(plain.num_passes):.0f} passes",
                f"{timings['EM'].median / timings[name].median:.1f}x",
                "less time",
            )
        )
    return rows


def classes(quick: bool, repeats: int) -> list[Row]:
    rows = 2000 if quick else 50_000
    rng = np.random.default_rng(0)
    chances = rng.uniform(0.2, 0.8, (4, 8))
    x = (rng.random((rows, 8)) < chances[rng.integers(0, 4, rows)]).astype(np.int32)
    model = Mixture(Bernoulli(), 4)
    return race(f"latent classes, N = {rows:,}", model, model.init(jax.random.key(0), x), x, None, 1e-7, repeats)


def clusters(quick: bool, repeats: int) -> list[Row]:
    rows = 2000 if quick else 50_000
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 2)) + rng.normal(scale=3.0, size=(5, 2))[rng.integers(0, 5, rows)]
    model = Mixture(Normal(), 5)
    return race(f"Gaussian mixture, N = {rows:,}", model, model.init(jax.random.key(0), x), x, None, 1e-7, repeats)


def deaths(quick: bool, repeats: int) -> list[Row]:
    days = np.array([162, 267, 271, 185, 111, 61, 27, 8, 3, 1.0])
    start = MixtureParams(weights=jnp.array([0.3, 0.7]), components=PoissonParams(rate=jnp.array([[1.0], [2.5]])))
    return race("The Times deaths", Mixture(Poisson(), 2), start, np.arange(10.0), days, 1e-9, repeats)


def starts(quick: bool, repeats: int) -> list[Row]:
    x, model, tol = datasets.galaxies(), Mixture(Normal(), 5), 1e-7
    keys = jax.random.split(jax.random.key(0), 4 if quick else 24)
    params = jax.jit(jax.vmap(lambda key: model.init(key, x)))(keys)
    print(f"galaxies, {len(keys)} starts, tol {tol:g}")
    passes, objective = {}, {}
    for name, algorithm in ALGORITHMS.items():
        fit = functools.partial(em_fit, model, x=x, algorithm=algorithm, tol=tol if name == "EM" else tol / 10)
        found = jax.jit(jax.vmap(lambda start, fit=fit: fit(params=start, max_steps=50_000)))(params)
        passes[name], objective[name] = np.asarray(found.num_passes), np.asarray(found.objective)
        worse = np.sum(objective[name] < objective["EM"] - 1e-3)
        print(f"  {name}: {np.median(passes[name]):.0f} passes at the median; ends {worse} times lower than EM")
    rows = []
    for name in list(ALGORITHMS)[1:]:
        low, middle, high = np.quantile(passes["EM"] / passes[name], [0, 0.5, 1])
        ours, theirs = (f"{np.min(passes[n]):.0f} to {np.max(passes[n]):.0f} passes" for n in (name, "EM"))
        ratio = f"{low:.1f}x to {high:.1f}x, median {middle:.1f}x"
        rows.append(Row(f"galaxies, {len(keys)} starts: {name}", ours, f"EM, {theirs}", ratio, "fewer passes"))
    return rows


if __name__ == "__main__":
    with jax.enable_x64(True):
        measure(
            __doc__.splitlines()[0],
            {"a": classes, "b": clusters, "c": deaths, "d": starts},
            ("jax", "numpy"),
            repeats=3,
        )
