"""Parameters that are held, or shared by all components."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxem import (
    HMM,
    Bernoulli,
    BernoulliParams,
    Beta,
    Binomial,
    Categorical,
    Fixed,
    Gamma,
    HMMParams,
    LinearRegression,
    Mixture,
    MixtureParams,
    Normal,
    NormalParams,
    Poisson,
    Status,
    StudentT,
    Tied,
    VonMisesFisher,
    VonMisesFisherParams,
    ZeroInflated,
    em_fit,
    fit_restarts,
)

pytestmark = pytest.mark.usefixtures("x64")

RNG = np.random.default_rng(4)
X = RNG.normal(size=(80, 2)) * [1.0, 2.0] + 5.0 * RNG.integers(0, 2, 80)[:, None]
HEADS = np.array([5.0, 9.0, 8.0, 4.0, 7.0])


def test_held_weights_stay_and_do_not_count_as_free():
    model = Fixed(Mixture(Binomial(10), 2), {"weights": jnp.array([0.5, 0.5])})
    params = model.init(jax.random.key(0), HEADS)
    np.testing.assert_array_equal(params.weights, [0.5, 0.5])
    assert model.num_parameters(params) == 2
    np.testing.assert_array_equal(em_fit(model, params, HEADS).params.weights, [0.5, 0.5])
    runs = fit_restarts(model, jax.random.key(0), HEADS, num_restarts=4, tol=1e-14, certify=False)
    np.testing.assert_allclose(np.sort(runs.best.params.components.probability[:, 0]), [0.5195831, 0.796789], atol=1e-5)


def test_a_start_elsewhere_is_moved_to_the_held_values():
    model = Fixed(Mixture(Binomial(10), 2), {"weights": jnp.array([0.5, 0.5])})
    start = MixtureParams(
        weights=jnp.array([0.1, 0.9]), components=BernoulliParams(probability=jnp.array([[0.6], [0.5]]))
    )
    step = em_fit(model, start, HEADS, tol=-1.0, max_steps=1)
    np.testing.assert_allclose(step.params.components.probability[:, 0], [0.71301224, 0.58133931], atol=1e-8)
    assert step.largest_decrease == 0


def test_held_means_give_covariances_about_them():
    centres = jnp.array([[0.0, 0.5], [4.0, 6.0]])
    model = Mixture(Fixed(Normal("full"), {"mean": centres}), 2)
    fit = em_fit(model, model.init(jax.random.key(0), X), X, tol=1e-12)
    share = np.asarray(model.posterior(fit.params, X))
    for k in range(2):
        deviations = X - np.asarray(centres[k])
        expected = (share[:, k, None] * deviations).T @ deviations / share[:, k].sum()
        np.testing.assert_allclose(fit.params.components.covariance[k], expected, rtol=1e-5)


def test_held_values_may_be_traced_and_vmapped():
    start = MixtureParams(
        weights=jnp.array([0.5, 0.5]), components=BernoulliParams(probability=jnp.array([[0.6], [0.5]]))
    )

    def fit(weight):
        model = Fixed(Mixture(Binomial(10), 2), {"weights": jnp.stack([weight, 1 - weight])})
        return em_fit(model, start, HEADS, tol=-1.0, max_steps=5).objective

    many = jax.vmap(fit)(jnp.array([0.5, 0.4]))
    np.testing.assert_allclose(many, [fit(jnp.array(0.5)), fit(jnp.array(0.4))])


def test_shared_rates_are_the_rate_of_all_rows():
    counts = RNG.poisson(4.0, (50, 1))
    model = Mixture(Tied(Poisson(), "rate"), 2)
    fit = em_fit(model, model.init(jax.random.key(0), counts), counts, max_steps=3, tol=-1.0)
    np.testing.assert_allclose(fit.params.components.rate, counts.mean(), rtol=1e-12)
    assert model.num_parameters(fit.params) == 2


def test_shared_degrees_of_freedom_are_one_number():
    model = Mixture(Tied(StudentT(), "degrees_of_freedom"), 2)
    fit = em_fit(model, model.init(jax.random.key(0), X), X, max_steps=30)
    nu = fit.params.components.degrees_of_freedom
    assert nu[0] == nu[1]
    assert model.num_parameters(fit.params) == Mixture(StudentT(), 2).num_parameters(fit.params) - 1
    theta = model.unconstrain(fit.params)
    assert sum(leaf.size for leaf in jax.tree.leaves(theta)) == model.num_parameters(fit.params)


def test_statements_compose():
    model = Fixed(Mixture(Tied(LinearRegression(), "variance"), 2), {"weights": jnp.array([0.3, 0.7])})
    x = (X[:, :1], X[:, 1])
    fit = em_fit(model, model.init(jax.random.key(0), x), x, max_steps=20)
    assert fit.params.components.variance[0] == fit.params.components.variance[1]
    np.testing.assert_array_equal(fit.params.weights, [0.3, 0.7])
    assert model.num_parameters(fit.params) == 5


def test_a_statement_around_another_forgets_neither():
    means = jnp.array([[0.0, 0.0], [5.0, 5.0]])
    model = Mixture(Fixed(Tied(StudentT(), "degrees_of_freedom"), {"mean": means}), 2)
    fit = em_fit(model, model.init(jax.random.key(0), X), X, max_steps=5)
    np.testing.assert_array_equal(fit.params.components.mean, means)
    assert fit.params.components.degrees_of_freedom[0] == fit.params.components.degrees_of_freedom[1]
    assert fit.largest_decrease == 0
    model = Mixture(Fixed(Fixed(Gamma(), {"shape": 2.0}), {"rate": 0.5}), 2)
    positive = np.abs(X) + 0.1
    components = em_fit(model, model.init(jax.random.key(0), positive), positive, max_steps=3).params.components
    np.testing.assert_array_equal(components.shape, np.full((2, 2), 2.0))
    np.testing.assert_array_equal(components.rate, np.full((2, 2), 0.5))


def test_fixed_and_shared_inflation():
    counts = np.where(RNG.random(200) < 0.4, 0, RNG.poisson(5.0, 200))
    held = Mixture(Fixed(ZeroInflated(Poisson()), {"inflation": 0.4}), 1)
    fit = em_fit(held, held.init(jax.random.key(0), counts), counts)
    assert float(fit.params.components.inflation[0]) == 0.4
    shared = Mixture(Tied(ZeroInflated(Poisson()), "inflation"), 2)
    fit = em_fit(shared, shared.init(jax.random.key(0), counts), counts, max_steps=20)
    assert fit.params.components.inflation[0] == fit.params.components.inflation[1]


@pytest.mark.parametrize(
    ("statement", "error", "message"),
    [
        (
            lambda: Fixed(LinearRegression(), {"intercept": 0.0}),
            TypeError,
            "'intercept' of LinearRegression cannot be held",
        ),
        (lambda: Fixed(Normal(), {"variance": 1.0}), TypeError, "'variance' of Normal.*covariance"),
        (lambda: Fixed(Mixture(Normal(), 2), {}), TypeError, "values must be a dict"),
        (lambda: Fixed(Mixture(Normal(), 2), {"weights": np.array([0.5, 0.6])}), ValueError, "weights must sum to 1"),
        (
            lambda: Fixed(Mixture(Normal(), 2), {"weights": np.array([1.0])}),
            ValueError,
            r"weights must have shape \(2,\)",
        ),
        (lambda: Tied(Normal(), "mean"), TypeError, "'mean' of Normal cannot be shared"),
        (lambda: Tied(Mixture(Normal(), 2), "weights"), TypeError, "nothing can be shared"),
        (lambda: Tied(Bernoulli(prior=Beta(2.0, 2.0)), "probability"), TypeError, "with a prior cannot be shared"),
        (lambda: Fixed(Tied(Poisson(), "rate"), {"rate": 1.0}), TypeError, "'rate' of Tied cannot be held"),
        (lambda: Tied(Fixed(Poisson(), {"rate": 1.0}), "rate"), TypeError, "'rate' of Fixed cannot be shared"),
        (lambda: Fixed("Normal", {"mean": 0.0}), TypeError, "inner must be a model or a family"),
    ],
)
def test_what_cannot_be_honoured_is_refused(statement, error, message):
    with pytest.raises(error, match=message):
        statement()


def test_a_fixed_covariance_leaves_the_means_free():
    model = Mixture(Fixed(Normal("spherical"), {"covariance": jnp.array([1.0, 1.0])}), 2)
    fit = em_fit(model, model.init(jax.random.key(0), X), X, tol=-1.0, max_steps=100)
    share = np.asarray(model.posterior(fit.params, X))
    np.testing.assert_allclose(fit.params.components.mean, share.T @ X / share.sum(axis=0)[:, None], rtol=1e-9)
    assert isinstance(fit.params.components, NormalParams)


def _two_groups(kind):
    """Ordinary rows, and rows that coincide (or lie on one line)."""
    rng = np.random.default_rng(3)
    spread, along = rng.normal(size=(40, 2)), np.linspace(-1, 1, 20)
    if kind == "points":
        return np.concatenate([spread, np.full((20, 2), 20.0)])
    if kind == "positive":
        return np.concatenate([np.exp(0.3 * spread), np.full((20, 2), 40.0)])
    if kind == "directions":
        rows = np.concatenate([spread - [3.0, 0.0], np.tile([1.0, 0.0], (20, 1))])
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)
    features = np.concatenate([spread[:, :1], along[:, None]])
    return features, np.concatenate([spread[:, 1], 50 + 3 * along])


@pytest.mark.parametrize(
    ("family", "held", "kind"),
    [
        (Normal("full"), {"covariance": np.eye(2)}, "points"),
        (Normal("tied"), None, "points"),  # the other rows keep it up
        (Normal("diag"), {"mean": np.array([[0.0, 0.0], [19.0, 19.0]])}, "points"),
        (StudentT("diag"), {"scale": 1.0}, "points"),
        (Gamma(), {"shape": 3.0}, "positive"),
        (VonMisesFisher(), {"concentration": 5.0}, "directions"),
        (LinearRegression(), {"variance": 1.0}, "line"),
    ],
)
def test_what_is_held_cannot_collapse(family, held, kind):
    """Rows that coincide leave a free width no maximum; one that is held they do not touch."""
    x = _two_groups(kind)
    share = np.repeat([0, 1], [40, 20])

    def ending(family):
        model = Mixture(family, 2)
        return em_fit(model, model.params_from_responsibilities(x, share), x, max_steps=3000).status

    assert ending(family if held is None else Fixed(family, held)) == Status.CONVERGED
    if held is not None:
        assert ending(family) == Status.DEGENERATE
        free = Mixture(family, 2)
        params = free.params_from_responsibilities(x, share)
        assert em_fit(Fixed(free, {"components": params.components}), params, x).status == Status.CONVERGED


DIRECTIONS = X / np.linalg.norm(X, axis=1, keepdims=True)
NORTH = np.eye(2)


@pytest.mark.parametrize(
    ("family", "x"),
    [
        (Fixed(Tied(VonMisesFisher(), "concentration"), {"mean_direction": NORTH}), DIRECTIONS),
        (Tied(Fixed(VonMisesFisher(), {"mean_direction": NORTH}), "concentration"), DIRECTIONS),
        (Fixed(Tied(StudentT("diag"), "degrees_of_freedom"), {"mean": 4 * NORTH, "scale": 1 + NORTH}), X),
        (Tied(Fixed(StudentT("diag"), {"mean": 4 * NORTH}), "degrees_of_freedom"), X),
        (Tied(ZeroInflated(Fixed(Poisson(), {"rate": 1 + NORTH})), "inflation"), np.floor(np.abs(X))),
    ],
    ids=["held then shared", "shared then held", "t, all but one", "t, mean held", "zeros"],
)
def test_what_is_free_is_at_its_maximum_beside_what_is_held_and_shared(family, x):
    """The slope of Q along all that is free is 0 at the M-step."""
    share = jnp.asarray(np.random.default_rng(5).dirichlet(np.ones(2), len(x)).T)

    @jax.jit
    def slope(x):
        stats = family.stats(family.pooled(x, None, 2), x, share)
        theta = family.unconstrain(family.m_step(stats))
        return jax.grad(lambda theta: family.q_function(family.constrain(theta), stats))(theta)

    for leaf in jax.tree.leaves(slope(jnp.asarray(x))):
        np.testing.assert_allclose(leaf, 0, atol=1e-7 * len(x))


def test_a_concentration_shared_by_held_directions_is_that_of_the_cosines():
    """A(c) = I_1(c) / I_0(c) is the mean of the cosines with the directions that are held (Mardia & Jupp, 10.3.1)."""
    family = Fixed(Tied(VonMisesFisher(), "concentration"), {"mean_direction": NORTH})
    share = RNG.dirichlet(np.ones(2), len(DIRECTIONS)).T
    start = VonMisesFisherParams(mean_direction=NORTH, concentration=jnp.ones(2))
    stats = jax.jit(family.stats)(start, DIRECTIONS, jnp.asarray(share))
    concentration = float(jax.jit(family.m_step)(stats).concentration[0])
    cosines = np.sum(share * (np.asarray(NORTH) @ DIRECTIONS.T)) / len(DIRECTIONS)
    assert scipy.special.i1(concentration) / scipy.special.i0(concentration) == pytest.approx(cosines, rel=1e-10)


RAGGED = np.stack([RNG.integers(0, n, 30) for n in (3, 2, 4)], axis=1)
CHAIN = np.triu(np.ones((3, 3), bool))


def _chain(family):
    return HMM(family, 3, initial_support=np.array([True, True, False]), transition_support=CHAIN)


# Free numbers by hand: categorical columns of 3, 2 and 4 values have 2 + 1 + 3 a component; the chain's start has 1,
# its rows of transitions 2 + 1 + 0.
@pytest.mark.parametrize(
    ("model", "x", "free"),
    [
        (lambda: _held(Mixture(Categorical((3, 2, 4)), 2), "components"), RAGGED, 1),
        (lambda: _held(Mixture(Categorical((3, 2, 4)), 2), "weights"), RAGGED, 12),
        (lambda: Mixture(Tied(Categorical((3, 2, 4)), "probability"), 2), RAGGED, 1 + 6),
        (lambda: _held(Mixture(Tied(Categorical((3, 2, 4)), "probability"), 2), "weights"), RAGGED, 6),
        (lambda: Mixture(Fixed(Categorical((3, 2, 4)), {"probability": UNIFORM}), 2), RAGGED, 1),
        (lambda: _held(_chain(Categorical((3, 2, 4))), "emissions"), RAGGED, 4),
        (lambda: _held(_chain(Categorical((3, 2, 4))), "transition"), RAGGED, 1 + 18),
        (lambda: _held(_chain(Categorical((3, 2, 4))), "initial", "transition"), RAGGED, 18),
        (lambda: _held(_held(_chain(Normal("diag")), "initial"), "transition"), X, 3 * 4),
        (lambda: _held(HMM(Poisson(), 2, stationary=True), "transition"), np.floor(np.abs(X)), 4),
    ],
)
def test_free_parameters_are_counted_beside_supports_and_ragged_columns(model, x, free):
    model = model()
    params = _start(model, x)
    assert model.num_parameters(params) == free

    # As many directions do the parameters move in.
    @jax.jit
    def slopes(params):
        flat, back = jax.flatten_util.ravel_pytree(model.unconstrain(params))
        return jax.jacfwd(lambda theta: jax.flatten_util.ravel_pytree(model.constrain(back(theta)))[0])(flat)

    assert np.linalg.matrix_rank(np.asarray(slopes(params)), tol=1e-9) == free


UNIFORM = (np.arange(4) < np.array([3, 2, 4])[:, None]) / np.array([[3.0], [2.0], [4.0]])


def _held(model, *names):
    """The model with these held where a start has them."""
    start = _start(model, RAGGED if "Categorical" in repr(model) else np.floor(np.abs(X)))
    return Fixed(model, {name: getattr(start, name) for name in names})


def _start(model, x):
    """Some parameters inside, without the work of a start by seeds."""
    inner = model
    while isinstance(inner, Fixed):
        inner = inner.inner
    many = inner.num_states if isinstance(inner, HMM) else inner.num_components
    components = inner.family.pooled(jnp.asarray(x), None, many)
    if isinstance(inner, Mixture):
        return MixtureParams(weights=jnp.full(many, 1 / many), components=components)
    support = np.ones((many, many)) if inner.transition_support is None else np.asarray(inner.transition_support)
    first = np.ones(many) if inner.initial_support is None else np.asarray(inner.initial_support)
    return HMMParams(
        initial=jnp.asarray(first / first.sum()),
        transition=jnp.asarray(support / support.sum(axis=1, keepdims=True)),
        emissions=components,
    )
