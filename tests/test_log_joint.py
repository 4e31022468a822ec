"""EM from a joint density alone: ten textbook models, each against a published optimum or one found in another way."""

import dataclasses
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
from jax.nn import log_sigmoid, log_softmax
from jax.scipy.special import gammaln
from jax.scipy.stats import norm
from jitted import e_step, free_energy, q_function

from jaxem import (
    EM,
    Blocks,
    Conditional,
    Exact,
    Full,
    Hard,
    Incremental,
    Mixture,
    MixtureParams,
    Poisson,
    PoissonParams,
    Sample,
    Stepwise,
    VarianceReduced,
    averaged,
    bic,
    datasets,
    em_fit,
    fit_restarts,
    from_log_joint,
    squarem,
)

HEADS = np.array([5.0, 9.0, 8.0, 4.0, 7.0])
DEATHS, DAYS = np.arange(10.0), np.array([162.0, 267, 271, 185, 111, 61, 27, 8, 3, 1])
WAITING = datasets.faithful()[:, 1].astype(float)

# LSAT, section 6: answers of 1000 persons to five questions, patterns 00000 to 11111 (Bock & Lieberman 1970).
ANSWERS = (np.arange(32)[:, None] >> np.arange(5)[::-1] & 1).astype(float)
PERSONS = np.array(
    [
        3,
        6,
        2,
        11,
        1,
        1,
        3,
        4,
        1,
        8,
        0,
        16,
        0,
        3,
        2,
        15,
        10,
        29,
        14,
        81,
        3,
        28,
        15,
        80,
        16,
        56,
        21,
        173,
        11,
        61,
        28,
        298.0,
    ]
)
VISITS, PEOPLE = np.arange(7.0), np.array([61.0, 8, 14, 12, 7, 3, 1])  # more zeros than a Poisson has
BLOOD = np.array([186.0, 38.0, 13.0, 284.0])  # A, B, AB, O (Clarke et al. 1959)
CAUSES = (np.arange(8)[:, None] >> np.arange(3) & 1).astype(float)
_rng = np.random.default_rng(5)
U = _rng.uniform(-2, 2, 60)
LINES = np.stack([U, np.where(np.arange(60) < 35, 1 + 2 * U, -1 - U) + 0.4 * _rng.normal(size=60)], axis=1)
TAILS = scipy.stats.t.rvs(3, loc=1.0, scale=2.0, size=80, random_state=np.random.default_rng(2))
SCALES = scipy.stats.gamma.ppf((np.arange(40) + 0.5) / 40, 1.5, scale=1 / 1.5)  # of a t with 3 degrees of freedom


def coins(theta, heads):
    each = log_sigmoid(theta)[:, None] * heads[None] + log_sigmoid(-theta)[:, None] * (10 - heads)[None]
    return jnp.log(0.5) + each


def bernoullis(params, x):
    share, theta = params
    each = log_sigmoid(theta) @ x.T + log_sigmoid(-theta) @ (1 - x).T
    return log_softmax(share)[:, None] + each


def poissons(params, x):
    share, log_rate = params
    rate = jnp.exp(log_rate)[:, None]
    return log_softmax(share)[:, None] + x[None] * jnp.log(rate) - rate - gammaln(x + 1)[None]


def gaussians(params, x):
    share, mean, log_sd = params
    return log_softmax(share)[:, None] + norm.logpdf(x[None], mean[:, None], jnp.exp(log_sd)[:, None])


def zero_inflated(params, x):
    share, log_rate = params
    zero = jnp.where(x == 0, log_sigmoid(share), -jnp.inf)
    return jnp.stack([zero, log_sigmoid(-share) + x * log_rate - jnp.exp(log_rate) - gammaln(x + 1)])


def lines(params, xy):
    share, intercept, slope, log_sd = params
    mean = intercept[:, None] + slope[:, None] * xy[:, 0][None]
    return log_softmax(share)[:, None] + norm.logpdf(xy[:, 1][None], mean, jnp.exp(log_sd)[:, None])


def noisy_or(params, x):
    prior = CAUSES @ log_sigmoid(params["prior"]) + (1 - CAUSES) @ log_sigmoid(-params["prior"])
    log_off = CAUSES @ log_sigmoid(params["fails"]) + log_sigmoid(params["leak"])[None]
    return prior[:, None] + log_off @ (1 - x).T + jnp.log1p(-jnp.exp(log_off)) @ x.T


def blood_groups(alleles, group):
    a, b, o = log_softmax(alleles)
    genotypes = jnp.stack([2 * a, a + o + jnp.log(2), 2 * b, b + o + jnp.log(2), a + b + jnp.log(2), 2 * o])
    looks = jnp.array([0, 0, 1, 1, 2, 3])  # AA, AO, BB, BO, AB, OO
    return jnp.where(looks[:, None] == group[None], genotypes[:, None], -jnp.inf)


def rasch(params, x):
    share, ability, difficulty = params
    theta = ability[:, None] - difficulty[None]
    return log_softmax(share)[:, None] + log_sigmoid(theta) @ x.T + log_sigmoid(-theta) @ (1 - x).T


def student_t(params, x):
    mean, log_sd = params
    return norm.logpdf(x[None], mean, jnp.exp(log_sd) / jnp.sqrt(SCALES)[:, None]) - jnp.log(len(SCALES))


def _maximum(loglik, start):
    """By scipy, from the same start."""
    found = scipy.optimize.minimize(lambda flat: -loglik(flat), start, method="BFGS", options={"gtol": 1e-6})
    return -found.fun


def _of_coins():
    p = np.array([0.79678907, 0.51958312])  # Do & Batzoglou (2008), to convergence
    return np.sum(np.log(0.5 * np.sum(p ** HEADS[:, None] * (1 - p) ** (10 - HEADS[:, None]), axis=1)))


def _of_zeros():
    """In closed form: zeros as many as there are, and the mean of all others."""
    none, total = PEOPLE[0], PEOPLE.sum()
    mean = PEOPLE @ VISITS / (total - none)
    rate = scipy.optimize.brentq(lambda rate: rate / -np.expm1(-rate) - mean, 1e-6, 20, xtol=1e-14)
    others = np.log((1 - none / total) / -np.expm1(-rate)) + scipy.stats.poisson.logpmf(VISITS[1:], rate)
    return none * np.log(none / total) + PEOPLE[1:] @ others


def _of_lines(start, steps=4000):
    """EM written by hand."""
    design, y = np.stack([np.ones(60), LINES[:, 0]], axis=1), LINES[:, 1]
    weight, beta, sd = np.full(2, 0.5), np.stack([start[1], start[2]], axis=1), np.exp(start[3])
    for _ in range(steps):
        joint = weight[:, None] * scipy.stats.norm.pdf(y, beta @ design.T, sd[:, None])
        r = joint / joint.sum(axis=0)
        beta = np.stack([np.linalg.solve(design.T * w @ design, design.T @ (w * y)) for w in r])
        sd = np.sqrt(np.sum(r * (y - beta @ design.T) ** 2, axis=1) / r.sum(axis=1))
        weight = r.mean(axis=1)
    return np.sum(np.log(joint.sum(axis=0)))


_NOISE = {
    "prior": np.array([-0.5, 0.3, -1.0]),
    "fails": scipy.special.logit(np.where(np.eye(3).repeat(2, axis=1) > 0, 0.2, 0.9)),
    "leak": scipy.special.logit(np.array([0.95, 0.9, 0.97, 0.92, 0.9, 0.95])),
}
FINDINGS = (np.arange(64)[:, None] >> np.arange(6) & 1).astype(float)


def _causes():
    """How often each of 64 patterns of six findings is expected among 1000: then nothing is likelier than the truth."""
    sigmoid = scipy.special.expit
    prior = np.prod(np.where(CAUSES > 0, sigmoid(_NOISE["prior"]), 1 - sigmoid(_NOISE["prior"])), axis=1)
    off = sigmoid(_NOISE["leak"]) * np.prod(sigmoid(_NOISE["fails"])[None] ** CAUSES[:, :, None], axis=1)
    probability = prior @ np.prod(np.where(FINDINGS[None] > 0, 1 - off[:, None], off[:, None]), axis=2)
    return 1000 * probability, 1000 * probability @ np.log(probability)


def _of_blood():
    a, b, o = 0.2136, 0.0501, 0.7363  # published to four digits (Lange, Applied Probability), which move little here
    return BLOOD @ np.log([a * a + 2 * a * o, b * b + 2 * b * o, 2 * a * b, o * o])


def _of_rasch(flat):
    solved = scipy.special.expit(flat[:2, None] - flat[2:7])
    share = scipy.special.expit(flat[7])
    each = np.prod(np.where(ANSWERS[:, None] > 0, solved, 1 - solved), axis=2) @ [1 - share, share]
    return PERSONS @ np.log(each)


def _of_classes(start, steps=4000):
    """EM of two latent classes written by hand; mirt, which stops earlier, tells -2467.408."""
    solved, weight = scipy.special.expit(start), np.full(2, 0.5)
    for _ in range(steps):
        joint = weight[:, None] * np.exp(np.log(solved) @ ANSWERS.T + np.log1p(-solved) @ (1 - ANSWERS).T)
        r = PERSONS * joint / joint.sum(axis=0)
        weight, solved = r.sum(axis=1) / 1000, r @ ANSWERS / r.sum(axis=1)[:, None]
    return PERSONS @ np.log(joint.sum(axis=0))


def _of_tails(flat):
    each = scipy.stats.norm.pdf(TAILS[:, None], flat[0], np.exp(flat[1]) / np.sqrt(SCALES))
    return np.sum(np.log(each.mean(axis=1)))


CLASS_START = np.array([[1.0] * 5, [-1.0] * 5])
LINE_START = np.array([[0.0, 0.0], [0.0, 0.0], [1.0, -1.0], [0.0, 0.0]])
RASCH_START = (np.zeros(2), np.array([-0.5, 0.5]), np.array([-2.0, -1.0, 0.0, -1.0, -2.0]))


@dataclasses.dataclass(frozen=True)
class Case:
    model: Any
    start: Any
    x: Any
    weights: Any
    optimum: Any  # a function without arguments


def start_of_poissons(key, x, weights=None):
    """Two rates near the mean."""
    mean = jnp.average(jnp.asarray(x), weights=weights)
    return jnp.stack([jnp.zeros(2, mean.dtype), jnp.log(mean) + 0.5 * jax.random.normal(key, (2,), mean.dtype)])


POISSONS = from_log_joint(poissons, 2, init=start_of_poissons)
START = np.array([[-0.4, 0.4], np.log([1.0, 2.5])])


CASES = {
    "coins": Case(from_log_joint(coins, 2), np.array([0.4, 0.0]), HEADS, None, _of_coins),
    "bernoulli": Case(
        from_log_joint(bernoullis, 2), (np.zeros(2), CLASS_START), ANSWERS, PERSONS, lambda: _of_classes(CLASS_START)
    ),
    # Hasselblad (1969).
    "poisson": Case(POISSONS, START, DEATHS, DAYS, lambda: -1989.945859883),
    "gaussian": Case(
        from_log_joint(gaussians, 2), np.array([[0.0, 0.0], [55.0, 80.0], [1.7, 1.7]]), WAITING, None,
        lambda: -1034.0017498,
    ),
    "zero-inflated": Case(from_log_joint(zero_inflated, 2), np.zeros(2), VISITS, PEOPLE, _of_zeros),
    "lines": Case(from_log_joint(lines, 2), LINE_START, LINES, None, lambda: _of_lines(LINE_START)),
    "noisy or": Case(
        from_log_joint(noisy_or, 8), jax.tree.map(lambda a: 0.9 * a, _NOISE), FINDINGS, _causes()[0],
        lambda: _causes()[1],
    ),
    "blood": Case(from_log_joint(blood_groups, 6), np.zeros(3), np.arange(4.0), BLOOD, _of_blood),
    "rasch": Case(
        from_log_joint(rasch, 2), RASCH_START, ANSWERS, PERSONS,
        lambda: _maximum(_of_rasch, np.concatenate([*RASCH_START[1:], [0.0]])),
    ),
    "student t": Case(
        from_log_joint(student_t, 40), np.zeros(2), TAILS, None, lambda: _maximum(_of_tails, np.zeros(2))
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_textbook_models_in_ten_lines_reach_their_optimum(name, x64):
    case = CASES[name]
    assert len(inspect.getsource(case.model.function).splitlines()) <= 10
    gather = Blocks(3) if name == "poisson" else Full()
    total = len(case.x) if case.weights is None else np.sum(case.weights)
    fit = em_fit(case.model, case.start, case.x, case.weights, algorithm=EM(gather=gather), tol=1e-10, max_steps=3000)
    assert abs(fit.objective - case.optimum()) <= 1e-6 * total
    assert fit.converged
    assert fit.largest_decrease <= 1e-9 * total


MIXTURE = Mixture(Poisson(), 2)


def _as_mixture(params):
    return MixtureParams(weights=jax.nn.softmax(params[0]), components=PoissonParams(rate=jnp.exp(params[1])[:, None]))


def test_the_posterior_and_the_densities_are_those_of_the_mixture_that_it_is(x64):
    known = _as_mixture(START)
    np.testing.assert_allclose(POISSONS.posterior(START, DEATHS), MIXTURE.posterior(known, DEATHS), rtol=1e-12)
    np.testing.assert_allclose(POISSONS.log_prob(START, DEATHS), MIXTURE.log_prob(known, DEATHS), rtol=1e-12)
    np.testing.assert_allclose(bic(POISSONS, START, DEATHS, DAYS) - bic(MIXTURE, known, DEATHS, DAYS), np.log(1096))
    q, bound = np.random.default_rng(0).dirichlet([1.0, 1.0], len(DEATHS)), jax.jit(free_energy)
    np.testing.assert_allclose(
        bound(POISSONS, START, DEATHS, q, DAYS), bound(MIXTURE, known, DEATHS, q, DAYS), rtol=1e-12
    )


def test_restarts_in_one_program_find_the_optimum(x64):
    runs = fit_restarts(
        POISSONS, jax.random.key(0), DEATHS, DAYS, num_restarts=3, tol=1e-8, max_steps=1500, certify=False
    )
    assert abs(runs.best.objective + 1989.945859883) < 1e-3


@pytest.mark.parametrize("expect", [Exact(), Exact(2.5), Hard()], ids=["exact", "tempered", "hard"])
def test_m_steps_climb_q_under_the_posterior_of_the_e_step(expect, x64):
    stats = e_step(POISSONS, START, DEATHS, DAYS, expect)
    other = START + 0.01 * np.arange(4.0).reshape(2, 2)
    climbed = jax.jit(POISSONS.q_on_rows(START, stats, DEATHS, DAYS))
    peer = e_step(MIXTURE, _as_mixture(START), DEATHS, DAYS, expect)
    np.testing.assert_allclose(climbed(other), q_function(MIXTURE, _as_mixture(other), peer), rtol=1e-9)
    np.testing.assert_allclose(q_function(POISSONS, START, stats), climbed(jnp.asarray(START)), rtol=1e-12)
    np.testing.assert_allclose(stats.loglik, peer.loglik, rtol=1e-12)


def test_m_steps_on_many_rows_go_through_them_in_blocks(x64):
    many, each = np.tile(DEATHS, 400_000 // 10), np.full(10, 40_000.0)
    other = START + 0.01
    stats = e_step(POISSONS, START, DEATHS, each)

    @jax.jit
    def climbed(x, weights):
        return jax.value_and_grad(POISSONS.q_on_rows(START, stats, x, weights))(other)

    for got, expected in zip(climbed(many, None), climbed(DEATHS, each), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-5)


def test_a_prior_and_coordinates_of_the_users_own_in_float32():
    # Two heads and two tails beforehand: of one coin in closed form.
    model = from_log_joint(
        lambda theta, heads: (heads * jnp.log(theta) + (10 - heads) * jnp.log1p(-theta))[None],
        1,
        log_prior=lambda theta: 2 * jnp.log(theta) + 2 * jnp.log1p(-theta),
        unconstrain=jax.scipy.special.logit,
        constrain=jax.nn.sigmoid,
    )
    fit = jax.jit(em_fit)(model, jnp.array(0.9), HEADS.astype(np.float32), tol=1e-7)
    assert fit.params.dtype == fit.objective.dtype == jnp.float32
    np.testing.assert_allclose(fit.params, (HEADS.sum() + 2) / 54, rtol=1e-4)


@pytest.mark.parametrize(
    ("message", "algorithm"),
    [
        ("gather must be Full", EM(gather=Stepwise(3))),
        ("gather must be Full", EM(gather=Stepwise())),
        ("gather must be Full", EM(gather=Incremental(2))),
        ("gather must be Full", EM(gather=VarianceReduced(3))),
        ("expect must be Exact", EM(expect=Sample(1))),
        ("needs a model with an m_step", squarem(EM())),
        ("needs a model with an m_step", averaged(EM())),
        ("declares no blocks", EM(maximize=Conditional())),
    ],
)
def test_what_has_no_answer_is_refused_in_a_sentence(message, algorithm):
    with pytest.raises(TypeError, match=message):
        em_fit(POISSONS, START, DEATHS, DAYS, key=jax.random.key(0), algorithm=algorithm)


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match="unconstrain and constrain go together"):
        from_log_joint(poissons, 2, constrain=jnp.exp)
    with pytest.raises(TypeError, match="log_joint must be a function; got int 3"):
        from_log_joint(3, 2)
    with pytest.raises(ValueError, match="num_latents must be"):
        from_log_joint(poissons, 0)
    with pytest.raises(ValueError, match=r"must return \(num_latents, N\) = \(3, 10\)"):
        em_fit(from_log_joint(poissons, 3), START, DEATHS)
    with pytest.raises(TypeError, match="pass sample_with_labels"):
        POISSONS.sample(jax.random.key(0), START, 3)
    with pytest.raises(TypeError, match="this model has no init"):
        fit_restarts(CASES["coins"].model, jax.random.key(0), DEATHS, num_restarts=2)
