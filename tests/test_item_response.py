"""Item response models against published figures, direct optimisation, and integrals by brute force."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
from jitted import e_step

from jaxem import ItemResponse, ItemResponseParams, Status, bic, datasets, em_fit

pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(0)
RNG = np.random.default_rng(4)
PATTERNS, COUNTS = datasets.lsat6()
PEOPLE = RNG.normal(size=80)
ANSWERS = (RNG.random((80, 4)) < scipy.special.expit(1.5 * (PEOPLE[:, None] - [-1.0, 0.0, 0.3, 1.0]))).astype(float)
HOLES = np.where(RNG.random(ANSWERS.shape) < 0.15, np.nan, ANSWERS)
HOLES[5] = np.nan
SOME = ItemResponseParams(
    discrimination=np.array([0.8, 1.5, 1.2, 2.0]),
    difficulty=np.array([-1.0, 0.2, 1.5, 0.0]),
    guessing=np.array([0.2, 0.1, 0.25, 0.05]),
)
# A fine grid for integrals over the ability, far beyond where anybody is.
GRID = np.linspace(-8, 8, 801)


def curve(params, abilities):
    """p(right): (T, J)."""
    params = jax.tree.map(np.asarray, params)
    p = scipy.special.expit(params.discrimination * (abilities[:, None] - params.difficulty))
    return p if params.guessing is None else params.guessing + (1 - params.guessing) * p


def joint(params, x):
    """p(answers, ability) on the grid, (N, T), times its spacing."""
    p = curve(params, GRID)
    with np.errstate(divide="ignore"):
        each = np.where(np.isnan(x)[:, None], 0, np.where(x[:, None] == 1, np.log(p), np.log1p(-p)))
    density = np.exp(-0.5 * GRID**2) / np.sqrt(2 * np.pi) * (GRID[1] - GRID[0])
    return np.exp(each.sum(axis=2)) * density


def loglik(params, x, weights=1.0):
    return float(np.sum(weights * np.log(joint(params, x).sum(axis=1))))


def of_vector(model, vector, items):
    """Parameters from free numbers: slopes, difficulties, logits of guessing."""
    slopes = {"rasch": 0, "1PL": 1}.get(model, items)
    slope = np.broadcast_to(vector[:slopes] if slopes else 1.0, items)
    rest = vector[slopes:]
    guessing = scipy.special.expit(rest[items:]) if model == "3PL" else None
    return ItemResponseParams(discrimination=slope, difficulty=rest[:items], guessing=guessing)


def to_vector(model, params):
    slopes = {"rasch": 0, "1PL": 1}.get(model, len(params.difficulty))
    return np.concatenate([params.discrimination[:slopes], params.difficulty])


# Bock & Aitkin (1981), and R's ltm and mirt: the log-likelihood of two parameters is -2466.653. Rizopoulos (2006), ltm:
# An R package for latent variable modelling and item response theory analyses, J. Statistical Software 17, section 3.1:
# of one slope -2466.938, with slope 0.755 and the difficulties below; of slopes of 1 -2473.054.
LSAT6 = {
    "2PL": (-2466.653, None, None, 10),
    "1PL": (-2466.938, [0.755] * 5, [-3.615, -1.322, -0.318, -1.730, -2.780], 6),
    "rasch": (-2473.054, [1.0] * 5, [-2.872, -1.063, -0.258, -1.388, -2.219], 5),
}


@pytest.mark.parametrize("name", LSAT6)
def test_lsat6_has_the_published_likelihoods(name):
    model = ItemResponse(name)
    value, slope, difficulty, free = LSAT6[name]
    fit = em_fit(model, model.init(KEY, PATTERNS, COUNTS), PATTERNS, COUNTS, tol=1e-9)
    assert fit.status == Status.CONVERGED
    assert fit.objective == pytest.approx(value, abs=6e-4)
    assert model.num_parameters(fit.params) == free
    if slope is not None:
        np.testing.assert_allclose(fit.params.discrimination, slope, atol=6e-4)
        np.testing.assert_allclose(fit.params.difficulty, difficulty, atol=6e-4)
    whole = np.repeat(PATTERNS, COUNTS, axis=0)
    assert bic(model, fit.params, whole) == pytest.approx(-2 * float(fit.objective) + free * np.log(1000), abs=1e-6)


def test_rows_one_by_one_are_the_patterns_and_their_numbers():
    model, whole = ItemResponse("rasch"), np.repeat(PATTERNS, COUNTS, axis=0)
    few, weights = model.reduced(whole)
    assert len(few) == 30
    assert weights.sum() == 1000
    fit = em_fit(model, model.init(KEY, whole), whole, tol=1e-9)
    assert fit.objective == pytest.approx(LSAT6["rasch"][0], abs=6e-4)


@pytest.mark.parametrize("name", ["2PL", "1PL", "rasch"])
def test_a_fit_is_the_maximum_of_the_marginal_likelihood(name):
    """Direct optimisation by scipy, the ability integrated out by brute force; answers are missing."""
    x = HOLES if name != "rasch" else ANSWERS
    model = ItemResponse(name)
    fit = em_fit(model, model.init(KEY, x), x, tol=1e-13, max_steps=5000)
    ours = to_vector(name, fit.params)

    def loss(vector):
        return -loglik(of_vector(name, vector, 4), x)

    best = scipy.optimize.minimize(loss, ours + 0.1 * RNG.normal(size=ours.size), jac="3-point", options={"gtol": 1e-7})
    assert float(fit.objective) == pytest.approx(-best.fun, abs=1e-6)
    np.testing.assert_allclose(ours, best.x, rtol=1e-4, atol=1e-4)
    assert loss(ours) <= best.fun + 1e-8


def test_guessing_is_fitted_to_the_maximum():
    """Of many answers from a model that guesses; no direct optimisation from there finds more."""
    model = ItemResponse("3PL")
    x = np.asarray(model.sample(KEY, jax.tree.map(jnp.asarray, SOME), 3000))
    fit = em_fit(model, model.init(KEY, x), x, tol=1e-10, max_steps=3000)
    assert fit.converged
    patterns, counts = np.unique(x, axis=0, return_counts=True)
    assert loglik(fit.params, patterns, counts) == pytest.approx(float(fit.objective), abs=1e-6)
    start = np.concatenate([to_vector("3PL", fit.params), scipy.special.logit(np.clip(fit.params.guessing, 1e-6, 1))])
    best = scipy.optimize.minimize(
        lambda vector: -loglik(of_vector("3PL", vector, 4), patterns, counts), start, method="BFGS"
    )
    assert -best.fun - float(fit.objective) < 1e-3
    assert float(fit.objective) > loglik(SOME, patterns, counts)


def test_counts_at_nodes_are_bocks_and_aitkins():
    """Their equations 11 and 12: expected rows and right answers at every node, by Bayes' rule pattern by pattern."""
    model, params = ItemResponse(num_nodes=5), dataclasses.replace(SOME, guessing=None)
    stats = e_step(model, params, ANSWERS[:6])
    nodes = np.linspace(-6, 6, 5)
    prior = np.exp(-0.5 * nodes**2)
    rows, right = np.zeros(5), np.zeros((4, 5))
    p = curve(params, nodes)
    for answers in ANSWERS[:6]:
        share = prior * np.prod(np.where(answers == 1, p, 1 - p), axis=1)
        share /= share.sum()
        rows, right = rows + share, right + answers[:, None] * share
    np.testing.assert_allclose(stats.nodes, rows, atol=1e-12)
    np.testing.assert_allclose(stats.total, np.tile(rows, (4, 1)), atol=1e-12)
    np.testing.assert_allclose(stats.correct, right, atol=1e-12)


def test_more_nodes_change_nothing():
    few, many = ItemResponse(), ItemResponse(num_nodes=122)
    params = dataclasses.replace(SOME, guessing=None)
    np.testing.assert_allclose(few.log_prob(params, HOLES), many.log_prob(params, HOLES), atol=1e-8)
    np.testing.assert_allclose(few.log_prob(params, HOLES), np.log(joint(params, HOLES).sum(axis=1)), atol=1e-7)
    assert few.log_prob(params, HOLES)[5] == pytest.approx(0, abs=1e-12)
    whole = np.where(np.isnan(HOLES), -1, HOLES).astype(int)
    np.testing.assert_allclose(few.log_prob(params, whole), few.log_prob(params, HOLES), rtol=1e-12)


@pytest.mark.parametrize("name", ["2PL", "3PL"])
def test_abilities_are_the_means_and_modes_of_the_posterior(name):
    model, params = ItemResponse(name), SOME if name == "3PL" else dataclasses.replace(SOME, guessing=None)
    x = np.array([[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, np.nan], [np.nan] * 4])
    density = joint(params, x)
    density /= density.sum(axis=1, keepdims=True)
    mean = density @ GRID
    found = model.abilities(params, x)
    np.testing.assert_allclose(found.estimate, mean, atol=1e-7)
    np.testing.assert_allclose(found.standard_error, np.sqrt(density @ GRID**2 - mean**2), atol=1e-7)
    mode = model.abilities(params, x, method="MAP")
    # A parabola through the highest point of the grid and its neighbours.
    for logs, top, estimate in zip(np.log(density), density.argmax(axis=1), mode.estimate, strict=True):
        a, b, c = logs[top - 1 : top + 2]
        peak = GRID[top] + 0.5 * (GRID[1] - GRID[0]) * (a - c) / (a - 2 * b + c)
        assert estimate == pytest.approx(peak, abs=5e-5)
    told = np.where(np.isnan(x), 0, model.information(params, np.asarray(mode.estimate))).sum(axis=1)
    np.testing.assert_allclose(mode.standard_error, 1 / np.sqrt(1 + told), rtol=1e-9)
    assert mode.estimate[3] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("guessing", [True, False])
def test_information_is_fishers(guessing):
    params = SOME if guessing else dataclasses.replace(SOME, guessing=None)
    model, at, step = ItemResponse("3PL" if guessing else "2PL"), np.array([-2.0, 0.1, 1.7]), 1e-5
    p = curve(params, at)
    np.testing.assert_allclose(model.curves(params, at), p, rtol=1e-12)
    slope = (curve(params, at + step) - curve(params, at - step)) / (2 * step)
    np.testing.assert_allclose(model.information(params, at), slope**2 / (p * (1 - p)), rtol=1e-7)


def test_samples_have_the_marginal_shares():
    model = ItemResponse("3PL")
    answers, abilities = model.sample_with_abilities(KEY, jax.tree.map(jnp.asarray, SOME), 40_000)
    density = np.exp(-0.5 * GRID**2) / np.sqrt(2 * np.pi) * (GRID[1] - GRID[0])
    np.testing.assert_allclose(answers.mean(axis=0), density @ curve(SOME, GRID), atol=0.01)
    # What every item tells of the ability that came with it: the covariance of the two.
    np.testing.assert_allclose(abilities @ answers / len(answers), (density * GRID) @ curve(SOME, GRID), atol=0.015)


def test_items_that_all_answered_alike_are_refused_and_under_jit_degenerate():
    x = np.concatenate([ANSWERS, np.ones((80, 1))], axis=1)
    with pytest.raises(ValueError, match="item 4 has only right ones"):
        ItemResponse().init(KEY, x)
    weights = np.where(ANSWERS[:, 2] == 1, 0, 1)
    with pytest.raises(ValueError, match="item 2 has no right ones"):
        ItemResponse().init(KEY, ANSWERS, weights)
    assert np.all(np.isfinite(ItemResponse().log_prob(dataclasses.replace(SOME, guessing=None), ANSWERS[:1])))
    with pytest.raises(ValueError, match=r"1 right and 0 wrong; got 2 in row 0, column 1"):
        ItemResponse().init(KEY, np.array([[1, 2], [0, 1]]))
    with pytest.raises(ValueError, match="model must be one of 'rasch', '1PL', '2PL', '3PL'; got 'graded'"):
        ItemResponse("graded")
    start = ItemResponse().init(KEY, np.concatenate([ANSWERS, ANSWERS[:, :1]], axis=1))
    fit = jax.jit(em_fit)(ItemResponse(), start, x)
    assert fit.status == Status.DEGENERATE
    assert np.isfinite(fit.objective)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(fit.params))


def test_an_item_that_is_a_step_is_degenerate():
    """Rows of which nobody answers a hard question and misses an easy one (Guttman): slopes go to infinity."""
    x = np.repeat(np.tril(np.ones((5, 5)), -1)[:, :4], 20, axis=0)
    fit = em_fit(ItemResponse(), ItemResponse().init(KEY, x), x, max_steps=2000)
    assert fit.status == Status.DEGENERATE
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(fit.params))
