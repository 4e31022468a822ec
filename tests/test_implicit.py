"""Derivatives of fits: those of refits, in both modes; NaN where a fit has no limit; of steps where these are fixed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from zoo import first_of_kinds, zoo

from jaxem import (
    EM,
    Blocks,
    Conditional,
    Dirichlet,
    Exact,
    Fixed,
    Gradient,
    Mixture,
    MixtureParams,
    Normal,
    NormalInverseWishart,
    NormalParams,
    Status,
    anderson,
    annealed_em,
    ecm,
    em_fit,
    fit_restarts,
    from_functions,
    squarem,
    stochastic_em,
)
from jaxem.capabilities import complete, states
from jaxem.numerics import gmres, gmres_in_range

pytestmark = pytest.mark.usefixtures("x64")


# Kinds whose first model has no limit on so few rows: it collapses, or its likelihood rises along a ridge for ever; and
# another model of the kind that has one.
RIDGES = {
    "linear system": "linear system, held, prior, missing",
    "factor analysers": "ppca, shared noise",
    "factor analysis": "ppca, missing",
    "noisy normal": "noisy normal, diag, correlated noise",
    "logistic regression": None,
}


def _flat(result):
    return jnp.concatenate([ravel_pytree(result.params)[0], jnp.stack([result.objective, result.loglik])])


def _densities(model, x):
    """What a fit says of every row: parameters that are not unique, as factors that turn, go where their start led."""
    return lambda result: jnp.append(model.log_prob(result.params, x), result.objective)


def _covector(found):
    return jnp.cos(1.7 * jnp.arange(found.size))


def _agrees(fit, at, direction, *, refit=None, told=_flat, forward=False, step=3e-3, rtol=2e-5):
    """The slope of `fit(value) -> Result` along a direction is Richardson's difference of refits.

    In reverse mode, of one combination of all that has a slope; in forward mode of each. refit: the fits that are
    compared, where they are to come nearer to the limit than `fit` itself; told: what of results is looked at.
    """
    refit = fit if refit is None else refit
    found, pull = jax.vjp(lambda value: told(fit(value)), at)
    (pulled,) = pull(_covector(found))
    along = sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), pulled, direction)))

    def difference(step):
        there, back = (
            told(refit(jax.tree.map(lambda a, d, s=sign: a + s * step * d, at, direction))) for sign in (1.0, -1.0)
        )
        return (there - back) / (2 * step)

    expected = (4 * difference(step / 2) - difference(step)) / 3
    scale = 1 + np.max(np.abs(expected))
    np.testing.assert_allclose(along, _covector(found) @ expected, rtol=rtol, atol=rtol * scale)
    if forward:
        _, slopes = jax.jvp(lambda value: told(fit(value)), (at,), (direction,))
        np.testing.assert_allclose(slopes, expected, rtol=0, atol=rtol * scale)
        np.testing.assert_allclose(_covector(found) @ slopes, along, rtol=1e-7, atol=1e-7 * scale)


@pytest.mark.parametrize("name", sorted(first_of_kinds() - set(RIDGES)) + sorted(filter(None, RIDGES.values())))
def test_every_kind_of_model(name):
    """Law 15, along weights of rows, which every model knows; refits take more steps than their limit needs."""
    model, x = zoo()[name]
    x = jax.tree.map(jnp.asarray, x)
    rows = jax.tree.leaves(complete("model", model).units(x))[0].shape[0]
    random = np.random.default_rng(0)
    weights, direction = jnp.asarray(random.uniform(0.5, 1.5, rows)), jnp.asarray(random.normal(size=rows))

    def fit(weights, start, tol):
        return em_fit(model, start, x, weights, tol=tol, max_steps=5000)

    starts = (model.init(jax.random.key(seed), x) for seed in range(4))
    start = next(start for start in starts if fit(weights, start, 1e-13).status == Status.CONVERGED)
    told = _densities(model, x) if states(model, "log_prob") else _flat
    _agrees(lambda w: fit(w, start, 1e-13), weights, direction, refit=lambda w: fit(w, start, -1.0), told=told)


RNG = np.random.default_rng(3)
X = np.concatenate([RNG.normal(size=(30, 2)), RNG.normal(size=(25, 2)) * [0.8, 1.3] + [3, 1]])
MODEL = Mixture(Normal("full"), 2)
START = MixtureParams(
    weights=np.array([0.5, 0.5]),
    components=NormalParams(mean=np.array([[0.0, 0.0], [3.0, 1.0]]), covariance=np.stack([np.eye(2)] * 2)),
)
PRECISE = {"tol": 1e-13, "max_steps": 20_000}


def _mean(result):
    return result.params.components.mean[0, 1]


def _prior(strength):
    scale = strength["scale"] * jnp.eye(2)
    inverse_wishart = NormalInverseWishart(
        mean=jnp.zeros(2), shrinkage=strength["shrinkage"], degrees_of_freedom=5.0, scale=scale
    )
    return Mixture(Normal("full", prior=inverse_wishart), 2, prior=Dirichlet(strength["weights"]))


def _held(mean):
    return Mixture(Fixed(Normal("full"), {"mean": mean}), 2)


@pytest.mark.parametrize(
    ("fit", "at"),
    [
        (lambda x: em_fit(MODEL, START, x, **PRECISE), X),
        (lambda s: em_fit(_prior(s), START, X, **PRECISE), {"scale": 0.7, "shrinkage": 1.5, "weights": 3.0}),
        (lambda mean: em_fit(_held(mean), START, X, **PRECISE), np.array([[0.1, -0.2], [3.1, 1.2]])),
        (lambda t: em_fit(MODEL, START, X, algorithm=EM(expect=Exact(t)), **PRECISE), 0.8),
    ],
    ids=["data", "priors", "held values", "temperature"],
)
def test_all_that_is_given_counts(fit, at):
    """In both modes; the objective moves with a held value as the likelihood does, with no M-step between them."""
    at = jax.tree.map(jnp.asarray, at)
    direction = jax.tree.map(lambda leaf: jnp.asarray(np.cos(1 + np.arange(leaf.size)).reshape(leaf.shape)), at)
    _agrees(fit, at, direction, forward=True)


@pytest.mark.parametrize(
    "algorithm",
    [squarem(), anderson(), annealed_em([2.0, 1.5]), EM(gather=Blocks(10)), EM(maximize=Gradient()), ecm()],
    ids=lambda algorithm: type(algorithm).__name__,
)
def test_a_limit_does_not_know_what_led_there(algorithm):
    def slope(algorithm):
        return jax.grad(lambda x: _mean(em_fit(MODEL, START, x, algorithm=algorithm, **PRECISE)))(X)

    plain = slope(EM())
    np.testing.assert_allclose(slope(algorithm), plain, rtol=0, atol=1e-5 * np.max(np.abs(plain)))


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
    fit = lambda heads: em_fit(model, jnp.array([0.4, 0.0]), heads, **PRECISE)  # noqa: E731
    assert fit(heads).status == Status.CONVERGED
    _agrees(fit, heads, jnp.array([1.0, -0.5, 0.3, 0.2, 0.7]), forward=True)


def test_a_block_that_is_frozen_does_not_move():
    algorithm = EM(maximize=Conditional(("components.mean", "components.covariance")))
    fit = lambda x: em_fit(MODEL, START, x, algorithm=algorithm, **PRECISE)  # noqa: E731
    _agrees(fit, X, jnp.asarray(RNG.normal(size=X.shape)))
    assert np.all(jax.grad(lambda x: fit(x).params.weights[0])(X) == 0)


def test_the_start_and_the_limits_of_a_fit_do_not_matter():
    slope = jax.grad(lambda start, tol: _mean(em_fit(MODEL, start, X, tol=tol, max_steps=5000)), argnums=(0, 1))
    for leaf in jax.tree.leaves(slope(START, 1e-12)):
        assert np.all(leaf == 0)


def test_derivatives_of_higher_order():
    direction = jnp.asarray(RNG.normal(size=X.shape))
    along = lambda t: _mean(em_fit(MODEL, START, X + t * direction, **PRECISE))  # noqa: E731
    slope = jax.jit(jax.grad(along))
    wide, narrow = ((slope(h) - slope(-h)) / (2 * h) for h in (1e-2, 5e-3))
    np.testing.assert_allclose(jax.jit(jax.hessian(along))(0.0), (4 * narrow - wide) / 3, rtol=1e-4)


def test_restarts_have_the_derivative_of_the_best():
    def best(x):
        return fit_restarts(MODEL, jax.random.key(0), x, num_restarts=3, **PRECISE)

    runs = best(X)
    alone = jax.grad(lambda x: _mean(em_fit(MODEL, runs.best.params, x, **PRECISE)))(X)
    found = jax.jit(jax.grad(lambda x: _mean(best(x).best)))(X)
    np.testing.assert_allclose(found, alone, rtol=0, atol=1e-5 * np.max(np.abs(alone)))
    assert np.all(np.isnan(jax.grad(lambda x: jnp.sum(best(x).objective))(X)))


def test_no_limit_no_derivative():
    """Of two fits side by side, one is cut off: its derivative is NaN, its neighbour's is what it is alone."""

    def slope(max_steps):
        return jax.grad(lambda x: _mean(em_fit(MODEL, START, x, tol=1e-13, max_steps=max_steps)))(X)

    cut, whole = jax.jit(jax.vmap(slope))(jnp.array([3, 5000]))
    assert np.all(np.isnan(cut))
    np.testing.assert_allclose(whole, slope(5000), rtol=1e-9, atol=1e-12)
    with pytest.raises(TypeError, match="random to the end"):
        jax.grad(
            lambda x: em_fit(MODEL, START, x, key=jax.random.key(0), algorithm=stochastic_em(), max_steps=3).objective
        )(X)


def test_a_fixed_number_of_steps_is_unrolled():
    def loop(x, start):
        state = EM().init(MODEL, start, x)
        for _ in range(3):
            state = EM().step(MODEL, state, x)
        return state.params.components.mean[0, 1] + state.loglik

    def fit(x, start):
        result = em_fit(MODEL, start, x, tol=-1.0, max_steps=3)
        return _mean(result) + result.objective

    found, expected = (jax.jit(jax.grad(each, argnums=(0, 1)))(X, START) for each in (fit, loop))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10), found, expected)


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
