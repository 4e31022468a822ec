"""Hidden Markov models: brute force, published numbers, a peer, and what may not matter."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jitted import begin, e_step, m_step
from scipy.special import logsumexp

from jaxem import (
    EM,
    HMM,
    Bernoulli,
    Categorical,
    CategoricalParams,
    ChainPosterior,
    Dirichlet,
    Exact,
    Fixed,
    Hard,
    HMMParams,
    LinearRegression,
    LinearRegressionParams,
    Mixture,
    MixtureParams,
    Normal,
    NormalParams,
    Poisson,
    PoissonParams,
    Sample,
    Sequences,
    Status,
    aic,
    bic,
    datasets,
    ecm,
    em_fit,
    fit_restarts,
    free_energy,
    hard_em,
    monte_carlo_em,
    pack_sequences,
    pad_sequences,
    squarem,
    stepwise_em,
)
from jaxem.numerics import tuning

pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
FORMS = [dict(form="scaled"), dict(form="log"), dict(parallel=True)]


def chain(count=3, seed=0):
    """Random probabilities of a chain."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.dirichlet(np.ones(count))), jnp.asarray(rng.dirichlet(np.ones(count), count))


def counts():
    """A model of counts with three states, its parameters, and five sequences of six steps, two of them missing."""
    initial, transition = chain()
    params = HMMParams(
        initial=initial, transition=transition, emissions=PoissonParams(rate=jnp.array([[1.0], [4.0], [9.0]]))
    )
    x = np.random.default_rng(1).poisson(4, (5, 6, 1)).astype(float)
    x[1, 2] = x[3, 0] = np.nan
    return HMM(Poisson(), 3), params, x


def brute(model, params, x, temperature=1.0):
    """Log-joint of every path of one sequence (T, ...): paths (K^T, T), and log p(x, z) of each."""
    scores = np.asarray(model.family.log_prob(params.emissions, jnp.asarray(x)))
    with np.errstate(divide="ignore"):
        initial, transition = np.log(params.initial), np.log(params.transition)
    paths = np.array(list(itertools.product(range(len(initial)), repeat=len(x))))
    joint = initial[paths[:, 0]] + transition[paths[:, :-1], paths[:, 1:]].sum(axis=1)
    return paths, (joint + scores[paths, np.arange(len(x))].sum(axis=1)) / temperature


def expected(paths, share, count):
    """States (T, K) and moves (K, K) that paths with these shares lead to."""
    one = np.eye(count)[paths]
    return np.einsum("p,ptk->tk", share, one), np.einsum("p,pti,ptj->ij", share, one[:, :-1], one[:, 1:])


@pytest.mark.parametrize("options", FORMS)
def test_all_paths(options):
    model, params, x = counts()
    model = dataclasses.replace(model, **options)
    joint = [brute(model, params, row) for row in x]
    evidence = np.array([logsumexp(scores) for _, scores in joint])
    np.testing.assert_allclose(model.log_prob(params, x), evidence, rtol=1e-11)
    stats = e_step(model, params, x)
    np.testing.assert_allclose(stats.loglik, evidence.sum(), rtol=1e-11)
    sums = [expected(paths, np.exp(scores - total), 3) for (paths, scores), total in zip(joint, evidence, strict=True)]
    np.testing.assert_allclose(model.smooth(params, x), [states for states, _ in sums], atol=1e-11)
    np.testing.assert_allclose(stats.transitions, sum(moves for _, moves in sums), rtol=1e-10)
    np.testing.assert_allclose(stats.initial, sum(states[0] for states, _ in sums), rtol=1e-10)
    # The filter of the first t steps is their posterior's end; the forecast its continuation.
    for t in (1, 4):
        paths, scores = brute(model, params, x[1, :t])
        end = expected(paths, np.exp(scores - logsumexp(scores)), 3)[0][-1]
        np.testing.assert_allclose(model.filter(params, x[1])[t - 1], end, atol=1e-11)
    ahead = model.forecast(params, x[1, :4], 3)
    np.testing.assert_allclose(ahead[2], end @ np.linalg.matrix_power(params.transition, 3), atol=1e-11)
    # One sequence, without the axis.
    np.testing.assert_allclose(model.smooth(params, x[2]), sums[2][0], atol=1e-11)
    np.testing.assert_allclose(model.log_prob(params, x[2]), evidence[2:3], rtol=1e-11)


def test_the_likeliest_path_and_its_statistics():
    model, params, x = counts()
    best = [(paths[np.argmax(scores)], np.max(scores)) for paths, scores in (brute(model, params, row) for row in x)]
    np.testing.assert_array_equal(model.viterbi(params, x), [path for path, _ in best])
    stats = e_step(model, params, x, expect=Hard())
    np.testing.assert_allclose(stats.loglik, sum(score for _, score in best), rtol=1e-12)
    moves = sum(expected(path[None], np.ones(1), 3)[1] for path, _ in best)
    np.testing.assert_allclose(stats.transitions, moves, atol=1e-12)
    fit = em_fit(model, params, x, algorithm=hard_em(), tol=1e-9)
    assert np.all(np.diff(np.asarray(fit.history)[: int(fit.num_steps) + 1]) >= -1e-9)


@pytest.mark.parametrize("options", FORMS)
def test_a_tempered_posterior(options):
    model, params, x = counts()
    model = dataclasses.replace(model, **options)
    lengths = jnp.array([6, 3, 5, 6, 2])
    stats = e_step(model, params, Sequences(x, lengths), expect=Exact(temperature=2.5))
    every = [brute(model, params, row[:length], 2.5) for row, length in zip(x, lengths, strict=True)]
    np.testing.assert_allclose(stats.loglik, 2.5 * sum(logsumexp(scores) for _, scores in every), rtol=1e-11)
    moves = sum(expected(paths, np.exp(scores - logsumexp(scores)), 3)[1] for paths, scores in every)
    np.testing.assert_allclose(stats.transitions, moves, rtol=1e-9)


def test_drawn_paths():
    """Averages of n draws are within five standard errors of the posterior."""
    model, params, x = counts()
    exact, n = e_step(model, params, x), 4000
    drawn = e_step(model, params, x, expect=Sample(n, key=KEY))
    np.testing.assert_allclose(drawn.loglik, exact.loglik, rtol=1e-11)
    np.testing.assert_allclose(np.sum(drawn.transitions), 25, rtol=1e-9)
    assert np.all(np.abs(drawn.transitions - exact.transitions) < 5 * np.sqrt(25 * exact.transitions / n) + 1e-9)
    assert np.all(np.abs(drawn.initial - exact.initial) < 5 * np.sqrt(exact.initial / n) + 1e-9)
    # Sequences of a batch are drawn independently, and so are steps: no two agree all along.
    one = e_step(model, params, np.repeat(x[:1], 2, axis=0), expect=Sample(1, key=KEY))
    np.testing.assert_allclose(one.transitions, np.round(one.transitions), atol=1e-12)
    fit = em_fit(model, params, x, algorithm=monte_carlo_em(20), key=KEY, max_steps=5, tol=-1.0)
    assert np.all(np.isfinite(fit.history))
    assert fit.objective > fit.history[0]


def random_chain(lengths, steps, count, seed=3):
    """Markov chains with other transitions at every step: states (B, T, K), pairs (B, T - 1, K, K)."""
    rng = np.random.default_rng(seed)
    states, pairs = np.full((len(lengths), steps, count), np.nan), np.full((len(lengths), steps - 1, count, count), 7.0)
    for number, length in enumerate(lengths):
        states[number, 0] = rng.dirichlet(np.ones(count))
        for t in range(length - 1):
            pairs[number, t] = states[number, t, :, None] * rng.dirichlet(np.ones(count), count)
            states[number, t + 1] = pairs[number, t].sum(axis=0)
    return states, pairs


def all_shares(paths, states, pairs):
    """q of every path of one sequence, from its states and pairs."""
    steps = np.arange(paths.shape[1] - 1)
    moves = pairs[steps, paths[:, :-1], paths[:, 1:]] / states[steps, paths[:, :-1]]
    return states[0, paths[:, 0]] * np.prod(moves, axis=1)


@pytest.mark.parametrize("kind", ["batch", "weighted", "packed", "one"])
def test_free_energy_of_any_chain_against_all_paths(kind):
    """Bound and gap by their definitions, path by path; what stands in the padding does not matter."""
    model, params, x = counts()
    lengths = [6, 4, 5, 6, 3]
    states, pairs = random_chain(lengths, 6, 3)
    bounds, gaps = [], []
    for row, length, of_states, of_pairs in zip(x, lengths, states, pairs, strict=True):
        paths, joint = brute(model, params, row[:length])
        share = all_shares(paths, of_states, of_pairs)
        bounds.append(np.sum(share * (joint - np.log(share))))
        gaps.append(np.sum(share * (np.log(share) - joint + logsumexp(joint))))
    weights, data, q = np.ones(5), Sequences(x, jnp.asarray(lengths)), ChainPosterior(states, pairs)
    given = None
    if kind == "weighted":
        weights = given = np.array([2.0, 0.0, 1.0, 0.5, 3.0])
    if kind == "one":
        weights, data, q = np.eye(5)[0], x[0], ChainPosterior(states[0], pairs[0])
    if kind == "packed":
        data = pack_sequences([row[:length] for row, length in zip(x, lengths, strict=True)], 2)
        ids = np.asarray(data.ids)
        wide = np.full((*ids.shape, 3), np.nan), np.full((2, ids.shape[1] - 1, 3, 3), 9.0)
        for number, length in enumerate(lengths):
            row, start = np.argwhere(ids == number)[0]
            wide[0][row, start : start + length] = states[number, :length]
            wide[1][row, start : start + length - 1] = pairs[number, : length - 1]
        q = ChainPosterior(*wide)
    for function in (free_energy, jax.jit(free_energy)):
        bound, gap = function(model, params, data, q, given)
        np.testing.assert_allclose(bound, np.sum(weights * bounds), rtol=1e-10)
        np.testing.assert_allclose(gap, np.sum(weights * gaps), rtol=1e-10)
    stats = jax.jit(model.statistics)(params, data, q, given)
    np.testing.assert_allclose(stats.loglik, e_step(model, params, data, given).loglik, rtol=1e-11)
    moves = sum(w * p[: n - 1].sum(axis=0) for w, p, n in zip(weights, pairs, lengths, strict=True))
    np.testing.assert_allclose(stats.transitions, moves, rtol=1e-10)


@pytest.mark.parametrize("options", [*FORMS, dict()])
def test_the_posterior_is_what_all_paths_say(options):
    """Its states, pairs and evidence; given back in full it is the same; its bound and gap at other parameters."""
    model, params, x = counts()
    model = dataclasses.replace(model, **options)
    lengths, weights = [6, 4, 5, 6, 3], np.array([2.0, 1.0, 1.0, 0.5, 3.0])
    data = Sequences(x, jnp.asarray(lengths))
    infer, split = jax.jit(model.infer), jax.jit(functools.partial(free_energy, model))
    posterior, stats = infer(params, data), e_step(model, params, data, weights)
    for number, length in enumerate(lengths):
        paths, joint = brute(model, params, x[number, :length])
        np.testing.assert_allclose(posterior.evidence[number], logsumexp(joint), rtol=1e-11)
        share, one = np.exp(joint - logsumexp(joint)), np.eye(3)[paths]
        pairs = np.einsum("p,pti,ptj->tij", share, one[:, :-1], one[:, 1:])
        np.testing.assert_allclose(posterior.pairs[number, : length - 1], pairs, atol=1e-11)
        assert np.all(posterior.pairs[number, length - 1 :] == 0)
    again = jax.jit(model.statistics)(params, data, ChainPosterior(posterior.states, posterior.pairs), weights)
    for got, want in zip(jax.tree.leaves(again), jax.tree.leaves(stats), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11)
    bound, gap = split(params, data, posterior, weights)
    np.testing.assert_allclose(gap, 0, atol=1e-10)
    np.testing.assert_allclose(bound, stats.loglik, rtol=1e-11)
    other = infer(m_step(model, stats), data)
    ours = split(params, data, other, weights)
    in_full = split(params, data, ChainPosterior(other.states, other.pairs), weights)
    np.testing.assert_allclose(ours, in_full, rtol=1e-9)
    np.testing.assert_allclose(sum(ours), stats.loglik, rtol=1e-11)
    for expect in (Hard(), Sample(3, key=KEY), Exact(2.5)):
        q = infer(params, data, expect)
        ours = split(params, data, q, weights)
        np.testing.assert_allclose(sum(ours), stats.loglik, rtol=1e-10)
        assert ours.gap > 1e-3
        np.testing.assert_allclose(ours, split(params, data, ChainPosterior(q.states, q.pairs), weights))


def test_what_a_sequence_of_weight_zero_holds_does_not_matter():
    model, params, x = counts()
    weights = np.array([1.0, 0.0, 2.0, 1.0, 0.0])
    wild = np.where(weights[:, None, None] > 0, x, 1e30)
    posterior = jax.jit(model.infer)(params, wild)
    stats = jax.jit(model.statistics)(params, wild, posterior, weights)
    for got, want in zip(jax.tree.leaves(stats), jax.tree.leaves(e_step(model, params, x, weights)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-11)


def test_a_chain_that_cannot_be_and_one_that_is_none():
    model, params, x = counts()
    states, pairs = random_chain([6] * 5, 6, 3)
    dead = dataclasses.replace(params, transition=jnp.array([[1.0, 0, 0], [0.2, 0.4, 0.4], [0.3, 0.3, 0.4]]))
    bound, gap = free_energy(model, dead, x, ChainPosterior(states, pairs))
    assert (bound, gap) == (-np.inf, np.inf)
    for q, message in (
        (ChainPosterior(states[:2], pairs[:2]), r"q.states must have shape \(5, 6, 3\); got \(2, 6, 3\)"),
        (ChainPosterior(states, pairs[:, 1:]), r"q.pairs must have shape \(5, 5, 3, 3\); got \(5, 4, 3, 3\)"),
        (ChainPosterior(2 * states, pairs), "q.states must sum to 1; row 0 sums to 2"),
        (ChainPosterior(states, pairs.swapaxes(2, 3)), "q.pairs must be at least 0 and sum to q.states over j"),
        (ChainPosterior(states[..., :2] / states[..., :2].sum(axis=-1, keepdims=True), None), "pairs"),
        (model.infer(params, x[:2]), "a posterior of 2 sequences of 6 steps was given with 5 of 6"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            free_energy(model, params, x, q)
    with pytest.raises(TypeError, match=r"q must be a ChainPosterior.*an array of shape"):
        free_energy(model, params, x, states)


def test_earthquakes():
    """Zucchini, MacDonald & Langrock, Hidden Markov Models for Time Series: two Poisson states."""
    params = HMMParams(
        initial=jnp.array([0.5, 0.5]),
        transition=jnp.array([[0.9, 0.1], [0.1, 0.9]]),
        emissions=PoissonParams(rate=jnp.array([[10.0], [30.0]])),
    )
    model, x = HMM(Poisson(), 2), datasets.earthquakes()
    fit = em_fit(model, params, x, tol=1e-9)
    np.testing.assert_allclose(fit.history[:3], [-413.27542, -343.76023, -343.13618], atol=6e-6)
    np.testing.assert_allclose(fit.objective, -341.878701, atol=1e-6)
    assert fit.converged
    assert model.num_parameters(fit.params) == 1 + 2 + 2
    np.testing.assert_allclose(bic(model, fit.params, x), 2 * 341.878701 + 5 * np.log(107), atol=1e-5)
    np.testing.assert_allclose(bic(model, fit.params, x[None, :, None]), bic(model, fit.params, x))
    np.testing.assert_allclose(aic(model, fit.params, x[None, :, None]), 2 * 341.878701 + 10, atol=1e-5)
    # A stationary start: the same chain with one parameter less, which cannot fit better.
    still = HMM(Poisson(), 2, stationary=True)
    held = em_fit(still, params, x, tol=1e-9)
    assert held.converged
    assert held.objective < fit.objective
    np.testing.assert_allclose(held.params.initial @ held.params.transition, held.params.initial, rtol=1e-9)
    assert still.num_parameters(held.params) == 4


def same_as_hmmlearn(peer, model, params, x, lengths, emissions, names):
    """Ten steps from the same start, both libraries in float64."""
    peer.startprob_, peer.transmat_ = np.asarray(params.initial), np.asarray(params.transition)
    for name, value in emissions.items():
        setattr(peer, name, np.asarray(value))
    assert np.isclose(peer.score(x, lengths), model.log_prob(params, pad(x, lengths)).sum(), rtol=1e-10)
    peer.fit(x, lengths)
    fit = em_fit(model, params, pad(x, lengths), tol=-1.0, max_steps=10)
    np.testing.assert_allclose(fit.params.initial, peer.startprob_, atol=1e-6)
    np.testing.assert_allclose(fit.params.transition, peer.transmat_, atol=1e-6)
    for ours, theirs in names.items():
        value = np.asarray(getattr(fit.params.emissions, ours))
        np.testing.assert_allclose(value.reshape(3, -1), theirs(peer).reshape(3, -1), atol=1e-6)
    path = np.concatenate(pad(x, lengths).split(model.viterbi(fit.params, pad(x, lengths))))
    np.testing.assert_array_equal(path, peer.predict(x, lengths))


def pad(x, lengths):
    return pad_sequences(np.split(x, np.cumsum(lengths)[:-1]))


LENGTHS = [30, 17, 41, 8]


@pytest.mark.parametrize("kind", ["diag", "full"])
def test_gaussian_like_hmmlearn(kind):
    hmm = pytest.importorskip("hmmlearn.hmm")
    x = RNG.normal(size=(96, 2)) + 3 * RNG.integers(0, 3, 96)[:, None]
    initial, transition = chain()
    mean, each = jnp.array([[0.0, 0.0], [3.0, 2.0], [6.0, 7.0]]), 1.5 * np.ones((3, 2))
    covariance = jnp.asarray(each if kind == "diag" else np.stack([np.diag(row) for row in each]))
    params = HMMParams(initial=initial, transition=transition, emissions=NormalParams(mean=mean, covariance=covariance))
    peer = hmm.GaussianHMM(
        3, kind, min_covar=0, means_prior=0, covars_prior=0, covars_weight=-1 if kind == "diag" else 0,
        n_iter=10, tol=-np.inf, init_params="",
    )  # fmt: skip
    peer.covars_weight = 1 if kind == "diag" else -(2 + 0)  # maximum likelihood: no pseudo-rows
    peer.n_features = 2
    same_as_hmmlearn(
        peer, HMM(Normal(kind), 3), params, x, LENGTHS, {"means_": mean, "covars_": covariance},
        {"mean": lambda h: h.means_, "covariance": lambda h: h._covars_},
    )  # fmt: skip


def test_poisson_like_hmmlearn():
    hmm = pytest.importorskip("hmmlearn.hmm")
    x = RNG.poisson(np.array([1.0, 5.0, 12.0])[RNG.integers(0, 3, 96)])[:, None]
    _, params, _ = counts()
    peer = hmm.PoissonHMM(3, n_iter=10, tol=-np.inf, init_params="", lambdas_prior=0, lambdas_weight=0)
    same_as_hmmlearn(
        peer, HMM(Poisson(), 3), params, x, LENGTHS, {"lambdas_": params.emissions.rate},
        {"rate": lambda h: h.lambdas_},
    )  # fmt: skip


def test_categorical_like_hmmlearn():
    hmm = pytest.importorskip("hmmlearn.hmm")
    x = RNG.integers(0, 4, 96)[:, None]
    initial, transition = chain()
    table = np.random.default_rng(2).dirichlet(np.ones(4), 3)
    params = HMMParams(
        initial=initial, transition=transition, emissions=CategoricalParams(probability=jnp.asarray(table)[:, None])
    )
    peer = hmm.CategoricalHMM(3, n_iter=10, tol=-np.inf, init_params="", n_features=4)
    same_as_hmmlearn(
        peer, HMM(Categorical(4), 3), params, x, LENGTHS, {"emissionprob_": table},
        {"probability": lambda h: h.emissionprob_},
    )  # fmt: skip


def test_categorical_like_dynamax():
    peer = pytest.importorskip("dynamax.hidden_markov_model")
    x = RNG.integers(0, 4, (5, 20, 1))
    initial, transition = chain()
    table = jnp.asarray(np.random.default_rng(2).dirichlet(np.ones(4), 3))[:, None]
    flat = dict(initial_probs_concentration=1.0, transition_matrix_concentration=1.0, emission_prior_concentration=1.0)
    theirs = peer.CategoricalHMM(3, 1, 4, **flat)
    with jax.numpy_rank_promotion("allow"):  # the peer's own code relies on it
        start, properties = theirs.initialize(
            KEY, initial_probs=initial, transition_matrix=transition, emission_probs=table
        )
        end, _ = theirs.fit_em(start, properties, jnp.asarray(x), num_iters=10, verbose=False)
    params = HMMParams(initial=initial, transition=transition, emissions=CategoricalParams(probability=table))
    fit = em_fit(HMM(Categorical(4), 3), params, x, tol=-1.0, max_steps=10)
    np.testing.assert_allclose(fit.params.initial, end.initial.probs, atol=1e-6)
    np.testing.assert_allclose(fit.params.transition, end.transitions.transition_matrix, atol=1e-6)
    np.testing.assert_allclose(fit.params.emissions.probability, end.emissions.probs, atol=1e-6)


@pytest.mark.parametrize("name", ["initial", "transition", "emissions"])
@pytest.mark.parametrize("options", FORMS)
def test_gradients_with_missing_steps_and_hard_zeros(name, options):
    """Against central differences in unconstrained coordinates; and zeros give no NaN."""
    model, params, x = counts()
    model = dataclasses.replace(model, **options)
    data = Sequences(x, jnp.array([6, 4, 5, 6, 3]))
    theta = model.unconstrain(params)

    def value(part):
        return jnp.sum(model.log_prob(model.constrain(dataclasses.replace(theta, **{name: part})), data))

    at = getattr(theta, name)
    flat, back = jax.flatten_util.ravel_pytree(at)
    slope = jax.flatten_util.ravel_pytree(jax.jit(jax.grad(value))(at))[0]
    rise = jax.jit(jax.vmap(lambda e: value(back(flat + 1e-5 * e)) - value(back(flat - 1e-5 * e))))(np.eye(flat.size))
    np.testing.assert_allclose(slope, rise / 2e-5, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", [*FORMS, dict()])
def test_hard_zeros_stay_and_give_no_nan(options):
    model = HMM(Normal("diag"), 3, **options)
    x = RNG.normal(size=(4, 9, 2)) + np.repeat([0.0, 3.0, 6.0], 3)[:, None]
    transition = jnp.array([[0.6, 0.4, 0.0], [0.0, 0.7, 0.3], [0.0, 0.0, 1.0]])
    emissions = NormalParams(mean=jnp.array([[0.0] * 2, [3.0] * 2, [6.0] * 2]), covariance=jnp.ones((3, 2)))
    params = HMMParams(initial=jnp.array([1.0, 0.0, 0.0]), transition=transition, emissions=emissions)
    slopes = jax.jit(jax.grad(lambda params: jnp.sum(model.log_prob(params, x))))(params)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(slopes))
    fit = em_fit(model, params, x, tol=1e-8)
    assert fit.converged
    np.testing.assert_array_equal(fit.params.transition == 0, transition == 0)
    np.testing.assert_array_equal(fit.params.initial, [1, 0, 0])
    assert np.all(np.diff(np.asarray(model.viterbi(fit.params, x)), axis=1) >= 0)


def test_support_makes_starts_of_that_structure():
    left_to_right = HMM(Normal("diag"), 3, initial_support=[1, 0, 0], transition_support=np.triu(np.ones((3, 3))))
    left_to_right = dataclasses.replace(left_to_right, initial_support=np.array([1, 0, 0]))
    x = RNG.normal(size=(4, 9, 2)) + np.repeat([0.0, 3.0, 6.0], 3)[:, None]
    runs = fit_restarts(left_to_right, KEY, x, num_restarts=6, certify=False)
    assert np.all(np.tril(runs.best.params.transition, -1) == 0)
    assert left_to_right.num_parameters(runs.best.params) == 0 + 2 + 1 + 12


def test_float32_does_not_lose_a_path_that_only_the_end_reveals():
    """An absorbing state fits by 150 nats better until the end, which it cannot explain at all.

    Scaled probabilities lose the other state in float32; logarithms, which "auto" takes here, do not.
    """
    emissions = NormalParams(mean=jnp.array([[0.0], [17.0]], jnp.float32), covariance=jnp.ones((2, 1), jnp.float32))
    params = HMMParams(
        initial=jnp.array([0.5, 0.5], jnp.float32),
        transition=jnp.array([[1.0, 0.0], [0.5, 0.5]], jnp.float32),
        emissions=emissions,
    )
    x = jnp.array([[0.0], [60.0]], jnp.float32)
    model = HMM(Normal("diag"), 2)
    double = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
    truth = model.log_prob(double, x.astype(jnp.float64))
    np.testing.assert_allclose(model.log_prob(params, x), truth, rtol=1e-5)
    lost = dataclasses.replace(model, form="scaled").log_prob(params, x)
    assert not np.isclose(lost, truth, rtol=1e-5)
    # A rare transition as well as none at all.
    rare = dataclasses.replace(params, transition=jnp.array([[1 - 1e-37, 1e-37], [0.5, 0.5]], jnp.float32))
    np.testing.assert_allclose(model.log_prob(rare, x), model.log_prob(
        dataclasses.replace(double, transition=rare.transition.astype(jnp.float64)), x.astype(jnp.float64)
    ), rtol=1e-5)  # fmt: skip


def test_where_scaled_probabilities_fail_moves_are_counted_in_logarithms():
    """Beside a chain that loses a path, one that does not; both as in float64, and so are slopes of the moves."""
    params = HMMParams(
        initial=jnp.array([0.5, 0.5]),
        transition=jnp.array([[[1 - 1e-37, 1e-37], [0.5, 0.5]], [[0.6, 0.4], [0.5, 0.5]]]),
        emissions=NormalParams(mean=jnp.array([[0.0], [17.0]]), covariance=jnp.ones((2, 1))),
    )
    x, axes = jnp.array([[0.0], [60.0], [1.0]]), (HMMParams(initial=None, transition=0, emissions=None), None, None)
    model = HMM(Normal("diag"), 2)

    def moved(params, x, weights):
        return model.e_step(params, x, weights).transitions

    def slope(params, x, weights):
        def at(share):
            table = params.transition * (1 + share * jnp.array([[1, -2]], share.dtype))
            return moved(dataclasses.replace(params, transition=table), x, weights)

        return jax.jacfwd(at)(jnp.zeros((), x.dtype))

    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (params, x, jnp.array([2.0])))
    in_logs = jax.jit(jax.vmap(lambda params, x: model.infer(params, x).form.in_logs, axes[:2]))(*single[:2])
    np.testing.assert_array_equal(in_logs, [1, 0])
    for function in (moved, slope):
        got = jax.jit(jax.vmap(function, axes))(*single)
        want = jax.jit(jax.vmap(function, axes))(params, x, jnp.array([2.0]))
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-4)


def test_what_does_not_matter():
    """The order of sequences, more padding and what is in it, packing, and how a batch is split."""
    model, params, x = counts()
    lengths = np.array([6, 4, 4, 6, 3])
    parts = [row[:length] for row, length in zip(x, lengths, strict=True)]
    whole = e_step(model, params, pad_sequences(parts))
    longer = np.concatenate(
        [np.where(np.arange(6)[:, None] < lengths[:, None, None], x, -7.0), np.full((5, 3, 1), np.inf)], 1
    )
    packed = pack_sequences(parts, 2)
    for other in (
        e_step(model, params, pad_sequences(parts[::-1])),
        e_step(model, params, Sequences(jnp.asarray(longer), jnp.asarray(lengths))),
        e_step(model, params, packed),
        jax.tree.map(jnp.add, *(e_step(model, params, pad_sequences(half)) for half in (parts[:2], parts[2:]))),
        e_step(model, params, pad_sequences(parts), jnp.ones(5)),
        begin(model, EM(), params, pad_sequences(parts)).stats,
    ):
        for got, want in zip(jax.tree.leaves(other), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)
    each = model.log_prob(params, pad_sequences(parts))
    np.testing.assert_allclose(model.log_prob(params, packed), each, rtol=1e-11)
    for ours, alone in zip(packed.split(model.smooth(params, packed)), parts, strict=True):
        np.testing.assert_allclose(ours, model.smooth(params, alone), atol=1e-11)
    for ours, alone in zip(packed.split(model.viterbi(params, packed)), parts, strict=True):
        np.testing.assert_array_equal(ours, model.viterbi(params, alone))
    for data in (packed, pad_sequences(parts)):
        np.testing.assert_allclose(
            model.forecast(params, data, 2), [model.forecast(params, alone, 2) for alone in parts], atol=1e-11
        )
    drawn = [e_step(model, params, data, expect=Sample(2, key=KEY)) for data in (packed, pad_sequences(parts))]
    np.testing.assert_allclose([np.sum(one.transitions) for one in drawn], sum(lengths) - 5, rtol=1e-9)
    assert np.all(np.asarray(model.smooth(params, pad_sequences(parts)))[1, 4:] == 0)
    assert np.all(np.asarray(model.viterbi(params, pad_sequences(parts)))[1, 4:] == -1)


@pytest.mark.parametrize("shape", [(1, 40, 2), (3, 30, 2)])
def test_data_known_to_be_complete_give_the_same_statistics(shape):
    model = HMM(Normal("diag"), 3)
    x = jnp.asarray(RNG.normal(size=shape))
    params = model.init(KEY, x)
    known, unknown = model.units(x), Sequences(values=x)
    assert known.complete
    assert not unknown.complete
    e_step = jax.jit(model.e_step)
    for ours, theirs in zip(*(jax.tree.leaves(e_step(params, data)) for data in (known, unknown)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["plain", "weighted", "packed", "hard zeros", "wide", "many states"])
def test_many_chains_side_by_side_are_each_what_they_are_alone(kind, monkeypatch):
    """vmap makes lanes of them: over parameters, over data too, twice, and of slopes."""
    monkeypatch.setattr(tuning, "WIDE_TRANSITIONS", 0 if kind == "wide" else tuning.WIDE_TRANSITIONS)
    monkeypatch.setattr(tuning, "STATES_OF_LANES", 2 if kind == "many states" else tuning.STATES_OF_LANES)
    support = np.tril(np.ones((3, 3)))[::-1, ::-1] if kind == "hard zeros" else None
    model = HMM(Poisson(), 3, transition_support=support)
    x = jnp.asarray(RNG.poisson(6.0, size=(4, 30)).astype(float))
    data = pack_sequences([x[0, :12], x[0, 12:19], x[0, 19:]], num_rows=1) if kind == "packed" else x[0]
    weights = jnp.array([2.5]) if kind == "weighted" else None
    params = jax.vmap(lambda key: model.init(key, x[0]))(jax.random.split(KEY, 4))

    def statistics(params, data):
        return model.e_step(params, data, weights)

    def slope(params, data):
        return jax.grad(lambda params: statistics(params, data).loglik)(params)

    def each(function, *arguments):
        alone = [jax.jit(function)(*(jax.tree.map(lambda leaf: leaf[i], a) for a in arguments)) for i in range(4)]  # noqa: B023
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)

    def same(ours, theirs):
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)

    for function in (statistics, slope) if kind in ("plain", "hard zeros", "many states") else (statistics,):
        over_params = jax.jit(jax.vmap(function, (0, None)))
        alone = each(lambda params: function(params, data), params)  # noqa: B023
        same(over_params(params, data), alone)
        halves = jax.tree.map(lambda leaf: leaf.reshape(2, 2, *leaf.shape[1:]), params)
        twice = jax.jit(jax.vmap(jax.vmap(function, (0, None)), (0, None)))(halves, data)
        same(jax.tree.map(lambda leaf: leaf.reshape(4, *leaf.shape[2:]), twice), alone)
        if kind != "packed":
            same(jax.jit(jax.vmap(function))(params, x), each(function, params, x))
            same(jax.jit(jax.vmap(function, (None, 0)))(jax.tree.map(lambda leaf: leaf[0], params), x),
                 each(lambda x: function(jax.tree.map(lambda leaf: leaf[0], params), x), x))  # fmt: skip  # noqa: B023


def test_packing_wastes_next_to_nothing():
    lengths = np.random.default_rng(0).geometric(0.02, 300)
    parts = [np.full((length, 1), number) for number, length in enumerate(lengths)]
    packed = jax.tree.map(np.asarray, pack_sequences(parts))  # every length would be a program
    assert packed.num_rows * packed.num_steps < 1.1 * lengths.sum()
    assert len(parts) * max(lengths) > 4 * lengths.sum()
    for number, part in enumerate(packed.split()):
        np.testing.assert_array_equal(part, parts[number])
    np.testing.assert_array_equal(packed.per_sequence(packed.inside()), lengths)


def test_one_state_for_every_step_is_a_mixture():
    """Transitions that do not remember: each step is a row of a mixture."""
    weights = jnp.array([0.2, 0.5, 0.3])
    emissions = NormalParams(mean=jnp.array([[0.0], [2.0], [5.0]]), covariance=jnp.ones((3, 1)))
    x = RNG.normal(size=(40, 1)) * 3
    params = HMMParams(initial=weights, transition=jnp.tile(weights, (3, 1)), emissions=emissions)
    mixture = Mixture(Normal("diag"), 3)
    of_rows = MixtureParams(weights=weights, components=emissions)
    np.testing.assert_allclose(
        HMM(Normal("diag"), 3).smooth(params, x), mixture.posterior(of_rows, x), rtol=1e-9, atol=1e-12
    )
    np.testing.assert_allclose(
        HMM(Normal("diag"), 3).log_prob(params, x)[0], jnp.sum(mixture.log_prob(of_rows, x)), rtol=1e-11
    )


def test_known_states_and_priors():
    """Where the observations tell the states, the M-step counts them; priors add to the counts."""
    states = np.array([[0, 0, 1, 1, 1, 0], [1, 0, 0, 0, 1, 1]])
    x = 10.0 * states[..., None]
    emissions = NormalParams(mean=jnp.array([[0.0], [10.0]]), covariance=jnp.ones((2, 1)))
    params = HMMParams(initial=jnp.full(2, 0.5), transition=jnp.full((2, 2), 0.5), emissions=emissions)
    moves = np.array([[3, 2], [2, 3.0]])
    model = HMM(Normal("diag"), 2)
    stats = e_step(model, params, x)
    np.testing.assert_allclose(stats.transitions, moves, atol=1e-12)
    plain = m_step(model, stats)
    np.testing.assert_allclose(plain.transition, moves / 5, rtol=1e-9)
    sticky = dataclasses.replace(
        model, transition_prior=Dirichlet(1 + 5 * jnp.eye(2)), initial_prior=Dirichlet(jnp.array([3.0, 1.0]))
    )
    found = m_step(sticky, e_step(sticky, params, x))
    np.testing.assert_allclose(found.transition, (moves + 5 * np.eye(2)) / 10, rtol=1e-9)
    np.testing.assert_allclose(found.initial, [3 / 4, 1 / 4], rtol=1e-9)


def test_held_and_shared_parameters():
    model, params, x = counts()
    table = jnp.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]])
    fit = em_fit(Fixed(model, {"transition": table}), params, x, max_steps=5, tol=-1.0)
    np.testing.assert_array_equal(fit.params.transition, table)
    assert Fixed(model, {"transition": table}).num_parameters(params) == 2 + 3
    rates = Fixed(Poisson(), {"rate": jnp.array([[1.0], [4.0], [9.0]])})
    fit = em_fit(HMM(rates, 3), params, x, max_steps=5, tol=-1.0)
    np.testing.assert_array_equal(fit.params.emissions.rate[:, 0], [1, 4, 9])
    assert not np.allclose(fit.params.transition, params.transition)
    with pytest.raises(ValueError, match=r"transition must sum to 1; row 1 sums to 1\.8"):
        Fixed(model, {"transition": table.at[1].set([0.9, 0.8, 0.1])})
    still = dataclasses.replace(model, stationary=True)
    fit = em_fit(Fixed(still, {"transition": table}), params, x, max_steps=2, tol=-1.0)
    np.testing.assert_allclose(fit.params.initial, 1 / 3, rtol=1e-9)


def test_variants_come_for_free():
    model, params, x = counts()
    two, quakes = HMM(Poisson(), 2), datasets.earthquakes()
    start = HMMParams(
        initial=jnp.full(2, 0.5),
        transition=jnp.array([[0.7, 0.3], [0.3, 0.7]]),
        emissions=PoissonParams(rate=jnp.array([[17.0], [21.0]])),
    )
    slow, fast = (em_fit(two, start, quakes, algorithm=algorithm, tol=1e-7) for algorithm in (EM(), squarem(EM())))
    np.testing.assert_allclose(fast.objective, slow.objective, atol=1e-5)
    assert fast.num_passes < slow.num_passes
    plain = em_fit(model, params, x, tol=-1.0, max_steps=3)
    blocks = em_fit(model, params, x, algorithm=ecm(), max_steps=3, tol=-1.0)
    np.testing.assert_allclose(blocks.objective, plain.history[3], rtol=1e-9)
    online = em_fit(model, params, x, algorithm=stepwise_em(2), key=KEY, max_steps=20, tol=-1.0)
    assert online.objective > plain.history[0]


def test_autoregressive_observations_by_composition():
    """Two regimes, x_t = +-0.9 x_t-1 + noise: a regression on the lagged series tells them apart."""
    rng, x = np.random.default_rng(0), [0.0]
    for t in range(400):
        x.append((0.9 if (t // 50) % 2 else -0.9) * x[-1] + rng.normal())
    x = np.array(x)
    data = (x[:-1, None], x[1:])
    model = HMM(LinearRegression(), 2, transition_prior=Dirichlet(1 + 10 * jnp.eye(2)))
    start = HMMParams(
        initial=jnp.full(2, 0.5),
        transition=jnp.array([[0.9, 0.1], [0.1, 0.9]]),
        emissions=LinearRegressionParams(
            coefficients=jnp.array([[-0.5], [0.5]]), intercept=jnp.zeros(2), variance=jnp.ones(2)
        ),
    )
    fit = em_fit(model, start, data)
    assert fit.converged
    np.testing.assert_allclose(fit.params.emissions.coefficients[:, 0], [-0.9, 0.9], atol=0.1)
    assert np.mean(model.viterbi(fit.params, data) == (np.arange(400) // 50) % 2) > 0.9
    with pytest.raises(TypeError, match="features"):
        model.sample(KEY, fit.params, 5)


def test_samples_come_from_the_model():
    model, params, _ = counts()
    x, states = model.sample_with_states(KEY, params, 200, 50)
    assert x.shape == (50, 200, 1)
    assert states.shape == (50, 200)
    moves = np.zeros((3, 3))
    np.add.at(moves, (states[:, :-1].ravel(), states[:, 1:].ravel()), 1)
    error = np.sqrt(np.asarray(params.transition) / moves.sum(axis=1, keepdims=True))
    assert np.all(np.abs(moves / moves.sum(axis=1, keepdims=True) - params.transition) < 5 * error)
    assert model.sample(KEY, params, 7).shape == (7, 1)
    fit = em_fit(model, params, x, max_steps=30)
    np.testing.assert_allclose(fit.params.transition, params.transition, atol=0.05)


def test_restarts_and_one_compilation():
    model, params, x = counts()
    runs = fit_restarts(
        model, KEY, Sequences(x, jnp.array([6, 4, 5, 6, 3])), num_restarts=12, max_steps=200, certify=False
    )
    assert runs.best.objective >= np.max(runs.objective) - 1e-9
    traces = []

    def counted(*arguments, **options):
        traces.append(None)
        return em_fit(*arguments, **options)

    fit = jax.jit(counted)
    for lengths in ([6, 4, 5, 6, 3], [2, 6, 6, 6, 1]):
        result = fit(HMM(Poisson(), 3), params, Sequences(jnp.asarray(x), jnp.asarray(lengths)), max_steps=3)
        assert np.isfinite(result.objective)
    assert len(traces) == 1


def test_a_sequence_that_cannot_be():
    """Nothing raises inside jit: the status tells, and other fits of the batch are not touched."""
    initial, transition = chain(2)
    table = jnp.array([[[0.8, 0.2, 0.0]], [[0.3, 0.7, 0.0]]])
    params = HMMParams(initial=initial, transition=transition, emissions=CategoricalParams(probability=table))
    model = HMM(Categorical(3), 2)
    x = np.array([[[0], [1], [0], [1], [1]], [[0], [1], [2], [0], [1]]])
    fits = jax.vmap(lambda x: em_fit(model, params, x[None], max_steps=5))(x)
    assert fits.status[0] == Status.MAX_STEPS
    assert fits.status[1] == Status.NONFINITE
    assert np.isneginf(model.log_prob(params, x)[1])
    assert not np.any(np.isnan(model.smooth(params, x)))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (
            lambda x: Sequences(x, np.array([6, 7, 6, 6, 6])),
            ValueError,
            "between 1 and the padded length 6; got 7 for",
        ),
        (
            lambda x: Sequences(x, np.array([6, 0, 6, 6, 6])),
            ValueError,
            r"got 0 for sequence 1. Leave empty sequences out",
        ),
        (lambda x: Sequences(x, np.array([6, 6])), ValueError, r"lengths must have shape \(5,\); got \(2,\)"),
        (lambda x: Sequences(x, np.ones(5)), TypeError, "lengths must be whole numbers"),
        (lambda x: list(x), TypeError, r"pad_sequences\(x\) or pack_sequences\(x\)"),
        (lambda x: [x[0], x[1, :4]], TypeError, r"got a list of 2: pad_sequences\(x\)"),
        (lambda x: x - 100, ValueError, "whole numbers, at least 0"),
        (lambda x: x[..., 0][:, :, None] + 0.5, ValueError, "whole numbers, at least 0"),
        (lambda x: np.full((2, 4, 1), np.nan), ValueError, "observed"),
        (lambda x: x[:1, :2], ValueError, "at least as many rows as states; got 2"),
        (lambda x: x[:0], ValueError, "at least one sequence of at least one step"),
    ],
)
def test_bad_data_is_named(x, error, message):
    model, params, data = counts()
    with pytest.raises(error, match=message):
        em_fit(model, params, x(np.nan_to_num(data, nan=3.0)))


def test_bad_parameters_and_lists_are_named():
    model, params, x = counts()
    with pytest.raises(ValueError, match=r"params\.transition must sum to 1; got a sum of 1\.5 at index 2"):
        em_fit(model, dataclasses.replace(params, transition=params.transition.at[2].mul(1.5)), x)
    with pytest.raises(ValueError, match=r"params\.initial must have shape \(3,\) .*; got \(2,\)"):
        em_fit(model, dataclasses.replace(params, initial=jnp.array([0.5, 0.5])), x)
    with pytest.raises(ValueError, match="sequence 1 has"):
        pad_sequences([np.ones((3, 2)), np.ones((4, 3))])
    with pytest.raises(ValueError, match="sequence 1 is empty: leave it out"):
        pack_sequences([np.ones(3), np.ones(0)])
    with pytest.raises(ValueError, match="a list of at least one array"):
        pad_sequences([])
    with pytest.raises(TypeError, match=r"expect must be Exact\(\), Hard\(\), Sample\(n\), or an object"):
        model.e_step(params, x, expect=3)
    with pytest.raises(ValueError, match="transition_support must have shape"):
        HMM(Poisson(), 2, transition_support=np.array([[1, 1], [0, 0]]))
    with pytest.raises(ValueError, match="stationary leaves no initial"):
        HMM(Poisson(), 2, stationary=True, initial_prior=Dirichlet(2.0))
    with pytest.raises(ValueError, match="form must be one of"):
        HMM(Bernoulli(), 2, form="fast")
