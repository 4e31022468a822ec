"""Gibbs sampling: posteriors in closed form, Geweke's joint-distribution test, and paths of any algorithm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from jaxem import (
    EM,
    HMM,
    Bernoulli,
    BernoulliParams,
    Beta,
    Categorical,
    Dirichlet,
    Draw,
    Fixed,
    GammaPrior,
    KMeans,
    KMeansParams,
    LinearRegression,
    Mixture,
    MixtureParams,
    Normal,
    NormalInverseGamma,
    NormalInverseWishart,
    NormalParams,
    Poisson,
    PoissonParams,
    Product,
    Tied,
    em_fit,
    from_functions,
    gibbs,
    squarem,
    trajectory,
)
from jaxem.capabilities import complete, informed
from jaxem.latents import Sample
from jaxem.parts import conjugacy

pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(0)
_rng = np.random.default_rng(3)
_points = _rng.normal(size=(12, 2)) @ [[1.0, 0.5], [0.0, 0.6]] + [1.0, -2.0]
_prior = NormalInverseWishart(
    mean=np.array([0.5, -1.0]), shrinkage=0.7, degrees_of_freedom=9.0, scale=np.array([[1.2, 0.3], [0.3, 0.8]])
)


START = MixtureParams(weights=np.array([0.4, 0.6]), components=PoissonParams(rate=np.array([[1.0], [5.0]])))


def _chain(model, x, steps):
    return trajectory(model, START, x, algorithm=gibbs(), num_steps=steps, key=KEY).params


def test_draws_have_the_posteriors_moments():
    """Given complete data that is in closed form."""
    features = _rng.normal(size=(12, 1))
    y = 0.3 + features[:, 0] + 0.5 * _rng.normal(size=12)
    counts = _rng.poisson(3.0, (12, 1))
    family = Product(
        {
            "size": Normal(prior=_prior, missing=False),
            "line": LinearRegression(prior=NormalInverseGamma(mean=np.zeros(2), precision=0.5, shape=3.0, rate=1.0)),
            "n": Poisson(prior=GammaPrior(2.0, 1.0)),
            "class": Categorical(3, prior=Dirichlet(1.5)),
            "yes": Bernoulli(prior=Beta(2.0, 1.5)),
        }
    )
    kinds = _rng.integers(0, 3, (12, 1))
    x = {"size": _points, "line": (features, y), "n": counts, "class": kinds, "yes": kinds % 2}

    @jax.jit
    def drawn(x):
        stats = family.stats(family.pooled(x, None, 1), x, jnp.ones((1, 12)))
        return jax.vmap(lambda key: family.draw(key, stats))(jax.random.split(KEY, 8000))

    draws = jax.tree.map(lambda leaf: np.asarray(leaf[:, 0]), drawn(x))

    mean, kappa = _points.mean(axis=0), 0.7 + 12
    away = mean - np.array([0.5, -1.0])
    about = (_points - mean).T @ (_points - mean) + 0.7 * 12 / kappa * np.outer(away, away)
    covariance = scipy.stats.invwishart(9 + 12, np.array([[1.2, 0.3], [0.3, 0.8]]) + about)
    np.testing.assert_allclose(draws["size"].covariance.mean(axis=0), covariance.mean(), rtol=0.03, atol=3e-3)
    np.testing.assert_allclose(draws["size"].covariance.var(axis=0), covariance.var(), rtol=0.2)
    np.testing.assert_allclose(draws["size"].mean.mean(axis=0), mean - 0.7 / kappa * away, atol=0.01)
    np.testing.assert_allclose(np.cov(draws["size"].mean.T), covariance.mean() / kappa, rtol=0.08, atol=1e-3)

    z = np.column_stack([np.ones(12), features])
    precision = z.T @ z + 0.5 * np.eye(2)
    line = np.linalg.solve(precision, z.T @ y)
    variance = scipy.stats.invgamma(3 + 6, scale=1 + 0.5 * (y @ y - line @ precision @ line))
    np.testing.assert_allclose(draws["line"].variance.mean(), variance.mean(), rtol=0.03)
    np.testing.assert_allclose(draws["line"].variance.var(), variance.var(), rtol=0.2)
    lines = np.column_stack([draws["line"].intercept, draws["line"].coefficients[:, 0]])
    np.testing.assert_allclose(lines.mean(axis=0), line, atol=0.01)
    np.testing.assert_allclose(np.cov(lines.T), variance.mean() * np.linalg.inv(precision), rtol=0.08, atol=2e-3)

    np.testing.assert_allclose(draws["n"].rate.mean(), (2 + counts.sum()) / 13, rtol=0.01)
    np.testing.assert_allclose(draws["n"].rate.var(), (2 + counts.sum()) / 13**2, rtol=0.08)

    shares, table = scipy.stats.dirichlet(1.5 + np.bincount(kinds[:, 0], minlength=3)), draws["class"].probability[:, 0]
    np.testing.assert_allclose(table.mean(axis=0), shares.mean(), atol=0.006)
    np.testing.assert_allclose(table.var(axis=0), shares.var(), rtol=0.08)
    chance, ones = draws["yes"].probability[:, 0], np.sum(kinds % 2)
    chances = scipy.stats.beta(2 + ones, 1.5 + 12 - ones)
    np.testing.assert_allclose([chance.mean(), chance.var()], [chances.mean(), chances.var()], rtol=0.06)


def test_two_components_agree_with_enumeration():
    """Counts whose posterior over the labels is summed out: the expected weight, and the rates in either order."""
    x, prior = np.array([0, 1, 1, 5, 7, 4]), (2.0, 0.7)
    model = Mixture(Poisson(prior=GammaPrior(*prior)), 2, prior=Dirichlet(1.5))
    draws = _chain(model, x, 10_000)
    labels = np.array(np.meshgrid(*[[0, 1]] * 6)).reshape(6, -1).T
    counts = np.stack([6 - labels.sum(axis=1), labels.sum(axis=1)])
    events = np.stack([(1 - labels) @ x, labels @ x])
    a, b = prior[0] + events, prior[1] + counts
    log_weight = scipy.special.gammaln(1.5 + counts) + scipy.special.gammaln(a) - a * np.log(b)
    weight = scipy.special.softmax(log_weight.sum(axis=0))
    # Of symmetric functions, since the labels switch.
    product = np.prod(a / b, axis=0) @ weight
    highest = (1.5 + counts[0]) * (1.5 + counts[1]) / (9 * 10) @ weight
    rates, weights = np.asarray(draws.components.rate[1:, :, 0]), np.asarray(draws.weights[1:])
    np.testing.assert_allclose(rates.prod(axis=1).mean(), product, rtol=0.04)
    np.testing.assert_allclose(weights.prod(axis=1).mean(), highest, rtol=0.04)


def _mixture():
    return Mixture(Poisson(prior=GammaPrior(4.0, 2.0)), 2, prior=Dirichlet(2.0)), (4, 1)


def _classes():
    prior = NormalInverseWishart(mean=np.zeros(1), shrinkage=1.0, degrees_of_freedom=14.0, scale=12 * np.eye(1))
    return Mixture(Normal(prior=prior, missing=False), 2, prior=Dirichlet(2.0)), (4, 1)


def _hidden_markov():
    model = HMM(Bernoulli(prior=Beta(2.0, 1.5)), 2, initial_prior=Dirichlet(1.5), transition_prior=Dirichlet(2.0))
    return model, (2, 3, 1)


GEWEKE = {"poisson mixture": _mixture, "normal mixture": _classes, "hidden markov": _hidden_markov}


def _data(model, key, params, shape):
    if isinstance(model, HMM):
        return jnp.asarray(model.sample(key, params, shape[1], shape[0]))
    return model.sample(key, params, shape[0])


@pytest.mark.parametrize("name", GEWEKE)
def test_geweke(name):
    """Two ways to draw parameters and data together: data given parameters drawn from the prior; and, in turn, one step
    of Gibbs sampling given data, and data given parameters. Geweke (2004), Getting it right, JASA 99."""
    model, shape = GEWEKE[name]()
    nothing = _nothing(model, shape)

    def look(params, x):
        flat = jnp.concatenate([jnp.ravel(leaf) for leaf in (params, x) for leaf in jax.tree.leaves(leaf)])
        return jnp.concatenate([flat, jnp.square(flat), jnp.outer(flat, flat)[0]])

    def prior(key):
        one, two = jax.random.split(key)
        params = conjugacy.drawn(complete("model", model), one, nothing)
        return params, _data(model, two, params, shape)

    @jax.jit
    def direct(key):
        return jax.vmap(lambda key: look(*prior(key)))(jax.random.split(key, 10_000))

    @jax.jit
    def successive(key):
        def step(carry, key):
            params, x = carry
            one, two, three = jax.random.split(key, 3)
            stats = model.e_step(params, x, expect=Sample(1, key=one))
            params = conjugacy.drawn(complete("model", model), two, stats)
            x = _data(model, three, params, shape)
            return (params, x), look(params, x)

        def lane(key):
            return jax.lax.scan(step, prior(key), jax.random.split(jax.random.fold_in(key, 1), 200))[1].mean(axis=0)

        return jax.vmap(lane)(jax.random.split(key, 60))

    one, many = np.asarray(direct(jax.random.key(1))), np.asarray(successive(jax.random.key(2)))
    errors = np.sqrt(one.var(axis=0) / len(one) + many.var(axis=0, ddof=1) / len(many))
    scores = (one.mean(axis=0) - many.mean(axis=0)) / np.where(errors > 0, errors, 1)
    print(
        f"{name}: {scores.size} moments, largest |z| {np.abs(scores).max():.2f}, mean square {np.mean(scores**2):.2f}"
    )
    assert np.abs(scores).max() < 4
    assert np.mean(scores**2) < 2


def _nothing(model, shape):
    """Statistics of no rows, given which the posterior is the prior."""
    x = np.zeros(shape)
    start = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), model.params_like(x))
    return jax.jit(model.e_step)(start, x, jnp.zeros(shape[0]))


def test_a_path_of_em_is_its_history():
    model = Mixture(Poisson(), 2)
    x = np.concatenate([_rng.poisson(2.0, 20), _rng.poisson(8.0, 20)])
    start = START
    fit = em_fit(model, start, x, tol=-1.0, max_steps=12)
    path = trajectory(model, start, x, num_steps=12)
    np.testing.assert_allclose(path.objective, fit.history, rtol=1e-12)
    np.testing.assert_allclose(path.params.weights[-1], fit.params.weights, rtol=1e-12)
    np.testing.assert_array_equal(path.params.components.rate[0], start.components.rate)
    # Every fourth state, under jit and over seeds, of an algorithm that wraps another.
    thin = jax.jit(
        jax.vmap(lambda key: trajectory(model, start, x, algorithm=squarem(EM()), num_steps=12, thin=4, key=key))
    )(jax.random.split(KEY, 2))
    whole = trajectory(model, start, x, algorithm=squarem(EM()), num_steps=12)
    assert thin.objective.shape == (2, 4)
    np.testing.assert_allclose(thin.objective[0], whole.objective[::4], rtol=1e-10)


def test_parts_that_are_held_stay_so():
    """Under jit, over two seeds at once, and in float32."""
    weights = jnp.array([0.3, 0.7], jnp.float32)
    model = Fixed(Mixture(Poisson(prior=GammaPrior(2.0, 1.0)), 2), {"weights": weights})
    x, start = np.array([0, 1, 1, 5, 7, 4], np.float32), jax.tree.map(np.float32, START)
    chain = jax.vmap(lambda key: trajectory(model, start, x, algorithm=gibbs(), num_steps=5, key=key))
    draws = jax.jit(chain)(jax.random.split(KEY, 2)).params
    np.testing.assert_array_equal(draws.weights[:, 1:], np.broadcast_to(weights, (2, 5, 2)))
    assert draws.components.rate.dtype == jnp.float32
    assert np.all(np.diff(draws.components.rate[..., 0, 0], axis=1) != 0)
    assert np.all(draws.components.rate[0, 1:] != draws.components.rate[1, 1:])


X = np.array([0, 1, 1, 5, 7, 4])
_NORMALS = MixtureParams(
    weights=np.array([0.4, 0.6]),
    components=NormalParams(mean=np.zeros((2, 2)), covariance=np.tile(np.eye(2), (2, 1, 1))),
)
_CLASSES = MixtureParams(weights=np.array([0.4, 0.6]), components=BernoulliParams(probability=np.array([[0.2], [0.7]])))


@pytest.mark.parametrize(
    ("model", "start", "x", "error", "says"),
    [
        (KMeans(2), KMeansParams(centers=np.array([[1.0], [5.0]])), X + 0.0, TypeError, "KMeans has no draw"),
        (Mixture(Poisson(), 2), START, X, ValueError, "Poisson needs a prior here"),
        (Mixture(Tied(Bernoulli(), "probability"), 2), _CLASSES, X % 2, TypeError, "shared by all components"),
        (
            Mixture(Fixed(Normal(prior=_prior), {"mean": np.zeros((2, 2))}), 2),
            _NORMALS,
            _points,
            TypeError,
            "cannot be held where parameters are drawn",
        ),
        (
            Mixture(Normal(prior=_prior), 2),
            _NORMALS,
            np.where(np.eye(12, 2) > 0, np.nan, _points),
            TypeError,
            "need complete rows",
        ),
    ],
)
def test_what_cannot_be_drawn_says_so(model, start, x, error, says):
    with pytest.raises(error, match=says):
        trajectory(model, start, x, algorithm=EM(maximize=Draw()), num_steps=2, key=KEY)


def test_chains_know_that_nothing_is_missing():
    """So that complete steps of correlated columns are drawn from without a word about it."""
    model = complete("model", HMM(Normal(prior=_prior), 2))
    assert not informed(model, model.units(_points)).family.missing
    assert informed(model, model.units(np.where(np.eye(12, 2) > 0, np.nan, _points))).family.missing


def test_draws_need_a_key():
    model = Mixture(Poisson(prior=GammaPrior(2.0, 1.0)), 2)
    with pytest.raises(TypeError, match="pass key="):
        trajectory(model, START, X, algorithm=EM(maximize=Draw()), num_steps=2)


def test_functions_of_a_users_own_draw():
    model = from_functions(
        lambda mean, x: (jnp.stack([jnp.sum(x), 1.0 * len(x)]), -0.5 * jnp.sum(jnp.square(x - mean))),
        lambda stats: stats[0] / stats[1],
        draw=lambda key, stats: stats[0] / stats[1] + jax.random.normal(key) / jnp.sqrt(stats[1]),
    )
    path = trajectory(model, jnp.zeros(()), X.astype(float), algorithm=EM(maximize=Draw()), num_steps=4000, key=KEY)
    np.testing.assert_allclose(path.params[1:].mean(), X.mean(), atol=0.03)
    np.testing.assert_allclose(path.params[1:].var(), 1 / 6, rtol=0.1)
