"""Derivatives of fits: those of refits, in both modes; NaN where a fit has no limit; of steps where these are fixed."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from zoo import firsts_of_classes, quick_start, zoo

from jaxem import (
    EM,
    Blocks,
    Conditional,
    Dirichlet,
    Exact,
    Fixed,
    Gradient,
    HelmholtzMachine,
    LinearRegression,
    LogisticRegression,
    Mixture,
    MixtureOfExperts,
    MixtureParams,
    Normal,
    NormalInverseWishart,
    NormalParams,
    SoftmaxGate,
    Status,
    TwoLevelGate,
    anderson,
    annealed_em,
    ecm,
    em_fit,
    fit_restarts,
    from_functions,
    squarem,
    stepwise_em,
    stochastic_em,
)
from jaxem.capabilities import complete
from jaxem.numerics import gmres, gmres_in_range

pytestmark = pytest.mark.usefixtures("x64")


# --- Law 15. What a fit tells moves, on a path through what it is given, by the integral of its slope along the path:
# by refits at both ends, and derivatives at the three points of Simpson's rule, so that refits may lie far enough apart
# for their own rounding, of some 1e-8, to count for little.

NODES, SHARES = np.array([0, 0.5, 1]), np.array([1, 4, 1]) / 6
PRECISE = {"tol": 0.0, "max_steps": 5000}


def _flat(result):
    return jnp.concatenate([ravel_pytree(result.params)[0], jnp.stack([result.objective, result.loglik])])


def _covector(found):
    return jnp.cos(1.7 * jnp.arange(found.size))


def _along(fit, told, first, toward, *, reverse=False):
    """At every point of a path from `first`, what is told of fits, and its slope; in reverse mode of a combination."""

    def look(at):
        result = fit(at)
        return told(result), result.status

    def one(share):
        at = jax.tree.map(lambda a, b: a + share * b, first, toward)
        if not reverse:
            return jax.jvp(look, (at,), (toward,), has_aux=True)
        found, pull, status = jax.vjp(look, at, has_aux=True)
        slope = sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), *pull(_covector(found)), toward)))
        return _covector(found) @ found, slope, status

    return jax.lax.map(one, jnp.asarray(NODES))


def _integrates(found, slopes, rtol=1e-4):
    moved = found[-1] - found[0]
    np.testing.assert_allclose(np.einsum("t,t...->...", SHARES, slopes), moved, rtol=0, atol=rtol * np.max(abs(moved)))


# Kinds whose first model has no limit on so few rows: it collapses, or its likelihood rises along a ridge for ever; and
# another model of the kind that has one.
RIDGES = {
    "hmm": "hmm, priors",  # which has one, and is quicker
    "linear system": "linear system, held, prior, missing",
    "factor analysers": "ppca, shared noise",
    "factor analysis": "ppca, missing",
    "noisy normal": "noisy normal, diag, correlated noise",
    "item response, missing": "item response, rasch",
}


def _crossing_odds():
    """Answers whose odds rise with the features in one class and fall in the other."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(200, 2))
    odds = np.where(rng.random(200) < 0.5, features @ [2.0, 0.0] + 1.0, features @ [-2.0, 0.5])
    answers = rng.binomial(1, jax.nn.sigmoid(odds))
    return Mixture(LogisticRegression(ridge=0.5), 2), (features, answers), np.ones(200)


def _four_lines():
    """A line in each of four intervals, which overlap."""
    rng = np.random.default_rng(1)
    at = rng.uniform(-2, 2, 200)
    interval = np.clip(np.floor(at + 2 + 0.5 * rng.normal(size=200)), 0, 3).astype(int)
    slope, level = np.array([[2.0, -2.0, 2.0, -1.0], [0.0, 3.0, -3.0, 0.0]])[:, interval]
    gate = TwoLevelGate(num_groups=2, gate=SoftmaxGate(ridge=0.5))
    response = slope * at + level + 0.3 * rng.normal(size=200)
    return MixtureOfExperts(LinearRegression(), 4, gate=gate), (at[:, None], response), np.ones(200)


def _all_patterns():
    """Four units, as often as two classes have each of their patterns."""
    patterns = np.arange(16)[:, None] >> np.arange(4) & 1
    rates = np.array([[[0.2, 0.3, 0.25, 0.2]], [[0.8, 0.7, 0.7, 0.85]]])
    first, second = np.prod(np.where(patterns[None], rates, 1 - rates), axis=2)
    return HelmholtzMachine(1), patterns, 300 * (0.4 * first + 0.6 * second)


# Kinds no model of which has a limit on the zoo's rows: the model, its data, and how often each row occurs.
OF_THEIR_OWN = {
    "logistic regression": _crossing_odds,
    "experts, two levels, own features": _four_lines,
    "helmholtz machine": _all_patterns,
}
# Kinds that are parts of another that is looked at: "product", and experts in two levels.
INSIDE = {"bernoulli", "linear regression", "experts"}
KINDS = sorted(set(firsts_of_classes()) - set(RIDGES) - INSIDE) + sorted(RIDGES.values())
# Factors may be turned, and components that are one may share their weight as they like: parameters end where their
# start led them, densities do not.
NOT_UNIQUE = {"ppca, shared noise", "ppca, missing", "exponential"}
# Looked at in reverse mode, the others in forward mode.
REVERSE = NOT_UNIQUE | {"categorical", "student t", "zero-inflated poisson"}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_model(name):
    """Law 15, along weights of rows, which every model knows."""
    model, x, *often = OF_THEIR_OWN[name]() if name in OF_THEIR_OWN else zoo()[name]
    x = jax.tree.map(jnp.asarray, x)
    rows = jax.tree.leaves(complete("model", model).units(x))[0].shape[0]
    random, often = np.random.default_rng(0), jnp.asarray(often[0] if often else np.ones(rows))
    weights, toward = often * random.uniform(0.5, 1.5, rows), often * random.uniform(-0.02, 0.02, rows)

    def densities(result):
        return jnp.append(model.log_prob(result.params, x), result.objective)

    @jax.jit
    def path(key, tol):
        start = model.init(key, x, **quick_start(model))
        fit = functools.partial(em_fit, model, start, x, tol=tol, max_steps=5000)
        told = densities if name in NOT_UNIQUE else _flat
        return _along(fit, told, weights, toward, reverse=name in REVERSE)

    # Some never come to rest within the resolution of float64, for the rounding of M-steps that iterate.
    tried = itertools.starmap(path, itertools.product(jax.random.split(jax.random.key(0), 8), (0.0, 1e-14)))
    found, slopes, _ = next(path for path in tried if np.all(path[2] == Status.CONVERGED))
    _integrates(found, slopes)


RNG = np.random.default_rng(3)
X = np.concatenate([RNG.normal(size=(24, 1)), 0.8 * RNG.normal(size=(16, 1)) + 3])
MODEL = Mixture(Normal("diag"), 2)
START = MixtureParams(
    weights=np.array([0.5, 0.5]),
    components=NormalParams(mean=np.array([[0.0], [3.0]]), covariance=np.ones((2, 1))),
)


def _mean(result):
    return result.params.components.mean[0, 0]


def _of(given):
    """A fit of all that may be given: data, weights, priors, a held value, a temperature."""
    prior = NormalInverseWishart(
        mean=jnp.ones(1), shrinkage=given["shrinkage"], degrees_of_freedom=5.0, scale=given["scale"] * jnp.eye(1)
    )
    family = Fixed(Normal("diag", prior=prior), {"covariance": given["covariance"]})
    model, algorithm = Mixture(family, 2, prior=Dirichlet(given["counts"])), EM(expect=Exact(given["temperature"]))
    return em_fit(model, START, given["x"], given["weights"], algorithm=algorithm, **PRECISE)


GIVEN = {
    "x": X,
    "weights": RNG.uniform(0.5, 1.5, 40),
    "shrinkage": 1.5,
    "scale": 0.7,
    "counts": 3.0,
    "covariance": np.array([[1.2], [0.8]]),
    "temperature": 0.9,
}


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_all_that_is_given_counts(reverse):
    """The objective moves with a held value as the likelihood does, with no M-step between them."""
    first = jax.tree.map(jnp.asarray, GIVEN)
    toward = jax.tree.map(lambda leaf: 0.03 * jnp.cos(1 + jnp.arange(leaf.size)).reshape(leaf.shape), first)
    found, slopes, status = jax.jit(lambda: _along(_of, _flat, first, toward, reverse=reverse))()
    assert np.all(status == Status.CONVERGED)
    _integrates(found, slopes)


def _with_share(share):
    return dataclasses.replace(START, weights=jnp.stack([share, 1 - share]))


def _fit_from(given, blocks):
    return em_fit(MODEL, _with_share(given["share"]), given["x"], algorithm=EM(maximize=blocks), **PRECISE)


def _best_from(given, blocks):
    """Of two starts the second is the better one, and stays it."""
    starts = jax.vmap(_with_share)(jnp.stack([0.1 * given["share"], given["share"]]))
    limits = PRECISE | {"certify": False}
    return fit_restarts(MODEL, None, given["x"], init=starts, algorithm=EM(maximize=blocks), **limits).best


def _best_drawn(given, blocks):
    """Starts that look at the rows, and that the path moves with these."""

    def init(key, x, _):
        return _with_share(jnp.mean(jnp.tanh(2 * x)) - 0.05 * jax.random.uniform(key))

    limits = {"num_restarts": 2, "init": init, "certify": False}
    key, algorithm = jax.random.key(0), EM(maximize=blocks)
    return fit_restarts(MODEL, key, given["x"], algorithm=algorithm, **limits, **PRECISE).best


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize(
    ("fit", "multicycle"), [(_fit_from, False), (_fit_from, True), (_best_from, True), (_best_drawn, False)]
)
def test_a_block_that_is_frozen_stays_at_its_start(fit, multicycle, reverse):
    """It moves with the start, which moves the others' limits, and with nothing else."""
    fit = functools.partial(fit, blocks=Conditional(("components.mean", "components.covariance"), multicycle))
    first = {"x": jnp.asarray(X), "share": 0.5}
    toward = {"x": jnp.asarray(0.01 * np.random.default_rng(7).normal(size=X.shape)), "share": 0.02}
    found, slopes, status = jax.jit(lambda: _along(fit, _flat, first, toward, reverse=reverse))()
    assert np.all(status == Status.CONVERGED)
    _integrates(found, slopes)
    if not reverse and fit.func is not _best_drawn:
        np.testing.assert_allclose(slopes[:, :2], [[0.02, -0.02]] * 3, rtol=1e-12)  # the weights


@pytest.mark.parametrize(
    "algorithm",
    [squarem(), anderson(), annealed_em([2.0, 1.5]), EM(gather=Blocks(10)), EM(maximize=Gradient()), stepwise_em()],
    ids=lambda algorithm: type(algorithm).__name__,
)
def test_a_limit_does_not_know_what_led_there(algorithm):
    """The map that an algorithm's limits are fixed points of is that of plain EM."""
    after, state = jax.jit(algorithm.limit)(MODEL, START, X)
    expected = jax.jit(lambda x: MODEL.m_step(MODEL.e_step(START, x)))(X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), (after, state.params), (expected, START))


def test_the_limit_of_an_algorithm_in_rounds_is_that_of_its_rounds():
    after, _ = jax.jit(ecm(multicycle=True).limit)(MODEL, START, X)
    both = [("weights",), ("components.mean",), ("components.covariance",)]
    params = START
    for names in both:
        params = MODEL.m_step_for(params, MODEL.e_step(params, X), names)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), after, params)


def _shifted_coins():
    """Two coins, tossed ten times a row, without an M-step: Q is climbed."""

    def log_joint(theta, heads):
        odds = jax.nn.log_sigmoid(theta), jax.nn.log_sigmoid(-theta)
        return heads[:, None] * odds[0][None] + (10 - heads[:, None]) * odds[1][None]

    def e_step(theta, heads):
        joint = log_joint(theta, heads)
        evidence = jax.scipy.special.logsumexp(joint, axis=1)
        share = jnp.exp(joint - evidence[:, None])
        return {"heads": heads @ share, "tosses": 10 * jnp.sum(share, axis=0), "loglik": jnp.sum(evidence)}

    def q_function(theta, stats):
        tails = stats["tosses"] - stats["heads"]
        return jnp.sum(stats["heads"] * jax.nn.log_sigmoid(theta) + tails * jax.nn.log_sigmoid(-theta))

    return from_functions(e_step, q_function=q_function)


def test_where_q_is_climbed_the_objective_is_level():
    heads, model = jnp.array([5.0, 9.0, 8.0, 4.0, 7.0]), _shifted_coins()
    toward = jnp.array([0.3, -0.2, 0.1, 0.1, 0.3])
    fit = functools.partial(em_fit, model, jnp.array([0.4, 0.0]), tol=1e-13, max_steps=5000)
    found, slopes, status = jax.jit(lambda: _along(fit, _flat, heads, toward))()
    assert np.all(status == Status.CONVERGED)
    _integrates(found, slopes)


# --- Genetic linkage (Dempster, Laird & Rubin 1977, section 1), whose limit is the root of a quadratic equation: of it
# derivatives of every order are known.

COUNTS = np.array([125.0, 18.0, 20.0, 34.0])


def _cells(theta):
    return jnp.stack([0.5 + theta / 4, (1 - theta) / 4, (1 - theta) / 4, theta / 4])


def _expected_counts(theta, counts):
    hidden = counts[0] * theta / (2 + theta)
    return {"success": hidden + counts[3], "failure": counts[1] + counts[2], "loglik": counts @ jnp.log(_cells(theta))}


def _successes(stats):
    return stats["success"] / (stats["success"] + stats["failure"])


LINKAGE = from_functions(_expected_counts, _successes)


def _root(counts):
    total, slope = jnp.sum(counts), counts[0] - 2 * (counts[1] + counts[2]) - counts[3]
    theta = (slope + jnp.sqrt(slope**2 + 8 * total * counts[3])) / (2 * total)
    return jnp.stack([theta, counts @ jnp.log(_cells(theta))])


def _of_linkage(counts, start=0.5, **options):
    result = em_fit(LINKAGE, jnp.asarray(start), counts, **(PRECISE | options))
    return jnp.stack([result.params, result.objective])


@pytest.mark.parametrize("order", [jax.jacfwd, jax.jacrev, jax.hessian])
def test_derivatives_of_every_order(order):
    np.testing.assert_allclose(jax.jit(order(_of_linkage))(COUNTS), jax.jit(order(_root))(COUNTS), rtol=1e-6)


@pytest.mark.parametrize("algorithm", [squarem(), anderson()], ids=lambda algorithm: type(algorithm).__name__)
def test_accelerators_have_the_derivative_of_their_limit(algorithm):
    found = jax.jacrev(functools.partial(_of_linkage, algorithm=algorithm))(COUNTS)
    np.testing.assert_allclose(found, jax.jacrev(_root)(COUNTS), rtol=1e-6)


def test_the_start_and_the_limits_of_a_fit_do_not_matter():
    slopes = jax.grad(lambda start, tol: _of_linkage(COUNTS, start, tol=tol)[0], argnums=(0, 1))(0.5, 1e-12)
    assert slopes == (0, 0)


def test_a_start_is_a_constant():
    _, slope = jax.jvp(lambda x: MODEL.init(jax.random.key(0), x), (jnp.asarray(X),), (jnp.ones_like(X),))
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(slope))


def test_restarts_have_the_derivative_of_the_best():
    @jax.jit
    def slopes(counts, max_steps):
        def told(counts):
            limits = {"tol": 0.0, "max_steps": max_steps}
            runs = fit_restarts(LINKAGE, None, counts, init=jnp.array([0.1, 0.5, 0.9]), **limits)
            return jnp.stack([runs.best.params, runs.best.objective, jnp.sum(runs.objective), jnp.sum(runs.params)])

        return jnp.split(jax.jacrev(told)(counts), 2)

    best, rest = slopes(COUNTS, 5000)
    np.testing.assert_allclose(best, jax.jacrev(_root)(COUNTS), rtol=1e-6)
    assert np.all(np.isnan(rest))
    assert np.all(np.isnan(slopes(COUNTS, 3)[0]))


def test_no_limit_no_derivative():
    """Of two fits side by side, one is cut off: its derivative is NaN, its neighbour's is what it is alone."""
    steps = jnp.array([3, 5000])

    def fits(counts):
        return jax.vmap(lambda max_steps: em_fit(LINKAGE, jnp.asarray(0.5), counts, tol=0.0, max_steps=max_steps))(
            steps
        )

    def objectives(counts):
        return fits(counts).objective

    def left_out(counts):
        result = fits(counts)
        return jnp.sum(jnp.where(result.converged, result.params, 0))

    (cut, whole), good = jax.jit(lambda counts: (jax.jacrev(objectives)(counts), jax.grad(left_out)(counts)))(COUNTS)
    of_root, of_height = jax.jacrev(_root)(COUNTS)
    assert np.all(np.isnan(cut))
    np.testing.assert_allclose(whole, of_height, rtol=1e-6)
    np.testing.assert_allclose(good, of_root, rtol=1e-6)  # what a loss leaves out spoils nothing
    with pytest.raises(TypeError, match="random to the end"):
        jax.grad(lambda x: em_fit(MODEL, START, x, key=jax.random.key(0), algorithm=stochastic_em()).objective)(X)


def test_what_a_fit_is_not_given_has_no_derivative():
    """A function that closes over what moves: nobody could know."""

    def hidden(extra):
        model = from_functions(lambda theta, counts: _expected_counts(theta, counts + extra), _successes)
        return em_fit(model, jnp.asarray(0.5), COUNTS, max_steps=50).params

    for derivative in (jax.jacfwd, jax.grad):
        with pytest.raises(TypeError, match="close over"):
            derivative(hidden)(1.0)


def test_a_fixed_number_of_steps_is_unrolled():
    def steps(counts, start):
        theta = start
        for _ in range(3):
            theta = _successes(_expected_counts(theta, counts))
        return jnp.stack([theta, counts @ jnp.log(_cells(theta))])

    found, expected = (
        jax.jit(jax.jacrev(each, argnums=(0, 1)))(COUNTS, 0.3)
        for each in (functools.partial(_of_linkage, tol=-1.0, max_steps=3), steps)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), found, expected)


def test_memory_does_not_grow_with_the_number_of_steps():
    def temporaries(**options):
        slope = jax.jit(jax.grad(lambda counts: _of_linkage(counts, **options)[0]))
        return slope.lower(COUNTS).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(max_steps=10) == temporaries(max_steps=1000)
    assert temporaries(max_steps=10, tol=-1.0) < temporaries(max_steps=1000, tol=-1.0)


def test_rows_of_weight_0_are_absent():
    """Whatever they hold, and so is the slope in their weights."""

    @jax.jit
    def slopes(x, weights):
        return jax.grad(lambda x, weights: _mean(em_fit(MODEL, START, x, weights, **PRECISE)), (0, 1))(x, weights)

    weights = jnp.ones(len(X)).at[jnp.array([3, 7])].set(0)
    (filled, of_weights), plain = slopes(jnp.asarray(X).at[7].set(1e200), weights), slopes(X, weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), (filled, of_weights), plain)
    assert np.all(filled[weights == 0] == 0)
    assert np.all(of_weights[weights == 0] == 0)
    assert np.all(filled[weights == 1] != 0)


def test_float32_survives():
    single = jax.grad(lambda x: _mean(em_fit(MODEL, jax.tree.map(np.float32, START), x)))(X.astype(np.float32))
    double = jax.grad(lambda x: _mean(em_fit(MODEL, START, x, **PRECISE)))(X)
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, double, rtol=0, atol=5e-3 * np.max(np.abs(double)))


@pytest.mark.parametrize("size", [1, 7, 130])
def test_linear_systems(size):
    """Spectra like those of EM: most of it near 1, a few slow modes. Beyond a basis, cycles go on."""
    random = np.random.default_rng(size)
    vectors = np.eye(size) + 0.3 * random.normal(size=(size, size)) / np.sqrt(size)
    matrix = vectors @ np.diag(random.uniform(0.05, 1, size)) @ np.linalg.inv(vectors)
    right = random.normal(size=(2, size))
    solve = jax.jit(jax.vmap(lambda right: gmres(lambda v: matrix @ v, right)))
    found = solve(right)
    np.testing.assert_allclose(found, np.linalg.solve(matrix, right.T).T, rtol=1e-8, atol=1e-8)
    assert np.all(solve(0 * right) == 0)


def test_singular_linear_systems():
    """What is consistent is solved, and what is not is NaN."""
    matrix = jnp.diag(jnp.array([1.0, 0.5, 0.0]))
    solve = jax.jit(lambda right: gmres(lambda v: matrix @ v, right))
    np.testing.assert_allclose(solve(jnp.array([1.0, 1.0, 0.0])), [1, 2, 0], atol=1e-12)
    assert np.all(np.isnan(solve(jnp.array([1.0, 1.0, 1.0]))))
    # x = M b for consistent b; of the transpose nothing has to be consistent.
    random = np.random.default_rng(0)
    basis = np.eye(5) + 0.3 * random.normal(size=(5, 5))
    singular = basis @ np.diag([1.0, 0.6, 0.3, 0.1, 0.0]) @ np.linalg.inv(basis)
    inverse = basis @ np.diag([1.0, 1 / 0.6, 1 / 0.3, 10.0, 0.0]) @ np.linalg.inv(basis)
    right = random.normal(size=5)
    np.testing.assert_allclose(gmres(lambda v: singular @ v, singular @ right), inverse @ singular @ right, atol=1e-9)
    np.testing.assert_allclose(gmres_in_range(lambda v: singular.T @ v, right), inverse.T @ right, atol=1e-7)
