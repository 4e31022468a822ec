"""What CONVERGED is worth, with and without a certificate: small random problems, judged by much longer fits.

    python benchmarks/certified.py [--only normal,...] [--quick] [--problems N]

Of every kind (mixtures of normals in four shapes, of Bernoullis, Poissons, Student's t and negative binomials, and
hidden Markov models) `--problems` data sets of 120 rows are drawn, with components that overlap more or less. Half of
the fits start from k-means++, half from random responsibilities; each stops by its own rule, `tol` being 1e-6 nats a
row. Where it says CONVERGED, accelerated EM goes on in float64, from its parameters and from a point near by, which a
saddle lets go: what that gains is what was left. Printed are the verdicts with more than 10 tol left, and with more
than a thousandth of a nat a row, as a saddle has it.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
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

TOL, ROWS = 1e-6, 120


def _clusters(rng, columns, count=2):
    """Rows of components that are 0.5 to 4 apart."""
    means = rng.normal(size=(count, columns))
    means *= rng.uniform(0.5, 4) / np.linalg.norm(means[0] - means[1])
    labels = rng.choice(count, ROWS, p=rng.dirichlet(np.full(count, 5.0)))
    return means[labels] + rng.normal(size=(ROWS, columns)) * rng.uniform(0.5, 1.5, (count, columns))[labels]


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
    "student t": (Mixture(StudentT("diag"), 2), functools.partial(_clusters, columns=2)),
    "negative binomial": (Mixture(NegativeBinomial(), 2), _overdispersed),
    "hmm": (HMM(Poisson(), 2), _chains),
}


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


@functools.partial(jax.jit, static_argnames="max_steps")
def fits(model, params, x, algorithm, tol, max_steps):
    return jax.vmap(lambda p, x: em_fit(model, p, x, algorithm=algorithm, tol=tol, max_steps=max_steps))(params, x)


@jax.jit
def left(model, params, x, objective):
    """Nats a row that longer fits gain: from these parameters, and from a point near by."""

    def one(params, x, objective):
        def end(number):
            theta = model.unconstrain(params)
            leaves, structure = jax.tree.flatten(theta)
            keys = jax.random.split(jax.random.fold_in(jax.random.key(5), number), len(leaves))
            size = jnp.where(number == 0, 0.0, 0.01)
            moved = [
                leaf + size * (1 + jnp.abs(leaf)) * jax.random.normal(key, leaf.shape)
                for key, leaf in zip(keys, leaves, strict=True)
            ]
            start = jax.tree.map(
                lambda a, b: jnp.where(number == 0, a, b), params, model.constrain(jax.tree.unflatten(structure, moved))
            )
            fit = em_fit(model, start, x, algorithm=squarem(EM()), tol=1e-9, max_steps=400)
            return jnp.where(fit.status == Status.DEGENERATE, -jnp.inf, fit.objective)

        return (jnp.max(jax.vmap(end)(jnp.arange(2))) - objective) / ROWS

    return jax.vmap(one)(params, x, objective)


def judged(name, count):
    """Of plain and certified fits of a kind: how many said CONVERGED, left more than 10 tol, and left a saddle."""
    model, x, starts = problems(name, count)
    found = {}
    for label, algorithm in (("plain", EM()), ("certified", certified())):
        fit = fits(model, starts, x, algorithm, TOL, 3000)
        sure = np.asarray(fit.certified if label == "certified" else fit.converged)
        rest = np.asarray(left(model, fit.params, x, fit.objective))[sure]
        found[label] = np.array([sure.sum(), np.sum(rest > 10 * TOL), np.sum(rest > 1e-3)])
        told = f"{sure.sum()} of {count} CONVERGED, {found[label][1]} with more than 10 tol left"
        print(
            f"{name}, {label}: {told}, {found[label][2]} more than 1e-3; {np.mean(fit.num_passes):.0f} passes",
            flush=True,
        )
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(KINDS), help="kinds")
    parser.add_argument("--quick", action="store_true", help="few problems: does the script run?")
    parser.add_argument("--problems", type=int, default=112, help="data sets of every kind")
    options = parser.parse_args()
    chosen, count = options.only.split(","), 8 if options.quick else options.problems
    print(machine(("jax", "numpy")))
    with jax.enable_x64(True):
        found = [judged(name, count) for name in KINDS if name in chosen]
    for label in ("plain", "certified") if found else ():
        sure, more, saddles = sum(each[label] for each in found)
        print(
            f"{label}: {sure} of {count * len(found)} CONVERGED; more than 10 tol left in {more} ({more / sure:.2%}),",
            end=" ",
        )
        print(f"more than 1e-3 nats a row in {saddles}")


if __name__ == "__main__":
    main()
