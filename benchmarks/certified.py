"""What CONVERGED is worth, with and without a certificate: small random problems, judged by much longer fits.

    python benchmarks/certified.py [--only normal,...] [--quick] [--problems N]

Of every kind (mixtures of normals in four shapes, of Bernoullis, Poissons, Student's t and negative binomials, and
hidden Markov models) `--problems` data sets of 120 rows are drawn, with components that overlap more or less. Half of
the fits start from k-means++, half from random responsibilities; each stops by its own rule, `tol` being 1e-6 nats a
row, with EM or, where EM takes thousands of steps, with SQUAREM. Where a fit says CONVERGED, accelerated EM goes on in
float64: from its parameters, and from two points near by, which a saddle lets go. What the best of these gains is what
was left. Printed are the verdicts with more than 10 tol left, each by its number, and with more than a thousandth of a
nat a row, as a saddle has it.

Problems are fitted one after the other: side by side each would wait for the slowest, and for everybody's verdicts.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from timing import machine

from jaxem import (
    EM,
    HMM,
    Bernoulli,
    Mixture,
    NegativeBinomial,
    Normal,
    Poisson,
    Status,
    StudentT,
    certified,
    em_fit,
    squarem,
)

TOL, ROWS, MAX_STEPS = 1e-6, 120, 2000

# How far from the parameters the judge starts, relative to 1 + |coordinate|.
NEAR = (0.0, 1e-4, 1e-2)


def _clusters(rng, columns, count=2):
    """Rows of components that are 0.5 to 4 apart."""
    means = rng.normal(size=(count, columns))
    means *= rng.uniform(0.5, 4) / np.linalg.norm(means[0] - means[1])
    labels = rng.choice(count, ROWS, p=rng.dirichlet(np.full(count, 5.0)))
    return means[labels] + rng.normal(size=(ROWS, columns)) * rng.uniform(0.5, 1.5, (count, columns))[labels]


def _heavy(rng):
    """The same with tails as those of 2 to 6 degrees of freedom."""
    degrees = rng.uniform(2, 6)
    return _clusters(rng, 2) * np.sqrt(degrees / rng.chisquare(degrees, (ROWS, 1)))


def _yes(rng):
    return (rng.random((ROWS, 6)) < rng.uniform(0.1, 0.9, (2, 6))[rng.integers(0, 2, ROWS)]).astype(float)


def _counts(rng):
    return rng.poisson(rng.uniform(1, 15, 3)[rng.integers(0, 3, ROWS)])[:, None].astype(float)


def _overdispersed(rng):
    labels = rng.integers(0, 2, ROWS)
    mean, size = rng.uniform(1, 15, 2)[labels], rng.uniform(0.5, 8, 2)[labels]
    return rng.poisson(rng.gamma(size, mean / size))[:, None].astype(float)


def _chains(rng):
    stay, rates = rng.uniform(0.5, 0.95), rng.uniform(1, 12, 2)
    states = np.cumsum(rng.random((5, ROWS // 5)) > stay, axis=1) % 2
    return rng.poisson(rates[states])[..., None].astype(float)


KINDS = {
    "full": (Mixture(Normal("full", missing=False), 2), functools.partial(_clusters, columns=2)),
    "tied": (Mixture(Normal("tied", missing=False), 3), functools.partial(_clusters, columns=2, count=3)),
    "diag": (Mixture(Normal("diag", missing=False), 2), functools.partial(_clusters, columns=3)),
    "spherical": (Mixture(Normal("spherical", missing=False), 3), functools.partial(_clusters, columns=2, count=3)),
    "bernoulli": (Mixture(Bernoulli(), 2), _yes),
    "poisson": (Mixture(Poisson(), 3), _counts),
    "student t": (Mixture(StudentT("diag"), 2), _heavy),
    "negative binomial": (Mixture(NegativeBinomial(), 2), _overdispersed),
    "hmm": (HMM(Poisson(), 2), _chains),
}

# Where plain EM takes thousands of steps.
SLOW = ("student t", "negative binomial")


def problems(name, count):
    """Data sets (count, ...) of a kind, and a start for each."""
    model, draw = KINDS[name]
    x = jnp.asarray(np.stack([draw(np.random.default_rng([7, seed])) for seed in range(count)]))
    keys = jax.random.split(jax.random.key(0), count)
    half = count // 2
    starts = [
        jax.jit(jax.vmap(functools.partial(model.init, method=method)))(keys[part], x[part])
        for method, part in (("k-means++", slice(half)), ("random_responsibilities", slice(half, None)))
    ]
    return model, x, jax.tree.map(lambda *both: jnp.concatenate(both), *starts)


@jax.jit
def fits(model, starts, x, algorithm):
    """The fit of every problem, without its history."""

    def one(problem):
        fit = em_fit(model, *problem, algorithm=algorithm, tol=TOL, max_steps=MAX_STEPS)
        return fit.params, fit.objective, fit.certified, fit.status == Status.CONVERGED, fit.num_passes

    return jax.lax.map(one, (starts, x))


@jax.jit
def left(model, params, x, objective, sure):
    """Nats a row that longer fits of those that are sure gain, from their parameters and from points near by."""

    def one(problem):
        params, x, objective, sure = problem
        theta, unravel = ravel_pytree(model.unconstrain(params))
        aside = (1 + jnp.abs(theta)) * jax.random.normal(jax.random.key(5), theta.shape)

        def end(size):
            near = model.constrain(unravel(theta + size * aside))
            start = jax.tree.map(lambda here, there: jnp.where(size == 0, here, there), params, near)
            fit = em_fit(model, start, x, algorithm=squarem(EM()), tol=1e-10, max_steps=600)
            return jnp.where(fit.status == Status.DEGENERATE, -jnp.inf, fit.objective - objective) / ROWS

        found = jax.lax.cond(sure, lambda: jax.vmap(end)(jnp.array(NEAR)), lambda: jnp.zeros(len(NEAR)))
        return jnp.max(found)

    return jax.lax.map(one, (params, x, objective, sure))


def judged(name, count):
    """Of plain and certified fits of a kind: how many said CONVERGED, left more than 10 tol, and left a saddle."""
    model, x, starts = problems(name, count)
    found, inner = {}, squarem(EM()) if name in SLOW else EM()
    for label, algorithm in (("plain", inner), ("certified", certified(inner))):
        params, objective, known, converged, passes = fits(model, starts, x, algorithm)
        asked = known if label == "certified" else converged
        rest = np.asarray(left(model, params, x, objective, asked))
        found[label] = np.array([np.sum(asked), np.sum(rest > 10 * TOL), np.sum(rest > 1e-3)])
        sure, more, saddles = found[label]
        told = f"{sure} of {count} CONVERGED, {more} with more than 10 tol left, {saddles} more than 1e-3"
        print(f"{name}, {label}: {told}; {np.mean(passes):.0f} passes", flush=True)
        for place in np.flatnonzero(rest > 10 * TOL):
            print(f"  number {place}: {rest[place]:.2g} a row", flush=True)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(KINDS), help="kinds")
    parser.add_argument("--quick", action="store_true", help="few problems: does the script run?")
    parser.add_argument("--problems", type=int, default=112, help="data sets of every kind")
    options = parser.parse_args()
    chosen, count = options.only.split(","), 8 if options.quick else options.problems
    print(machine(("jax", "numpy")))
    begin = time.perf_counter()
    with jax.enable_x64(True):
        found = [judged(name, count) for name in KINDS if name in chosen]
    for label in ("plain", "certified") if found else ():
        sure, more, saddles = sum(each[label] for each in found)
        print(
            f"{label}: {sure} of {count * len(found)} CONVERGED; more than 10 tol left in {more} ({more / sure:.2%}),",
            end=" ",
        )
        print(f"more than 1e-3 nats a row in {saddles}")
    print(f"{time.perf_counter() - begin:.0f} s with compilation")


if __name__ == "__main__":
    main()
