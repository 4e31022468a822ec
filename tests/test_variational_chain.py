"""Variational hidden Markov models: every iterate against NumPy and all paths, and evidence in closed form."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import digamma, gammaln, logsumexp

from jaxem import (
    HMM,
    Dirichlet,
    GammaPrior,
    HMMParams,
    Poisson,
    Sequences,
    Status,
    Variational,
    em_fit,
    fit_restarts,
    trajectory,
)

KEY = jax.random.key(0)
STATES = 3
_rng = np.random.default_rng(8)
_counts = _rng.poisson([[[1.0], [1.0], [6.0], [6.0], [15.0]]] * 2).astype(float)
_counts[0, 1] = np.nan
X, LENGTHS = _counts, np.array([5, 3])
SHAPE, RATE = 2.0, 0.5
STICKY, START = 1 + 2 * np.eye(STATES), np.array([0.5, 1.0, 2.0])
SUPPORT = np.triu(np.ones((STATES, STATES))) > 0
FAMILY = Variational(Poisson(prior=GammaPrior(SHAPE, RATE)))
MODEL = HMM(
    FAMILY, STATES, initial_prior=Dirichlet(START), transition_prior=Dirichlet(STICKY), transition_support=SUPPORT
)
PARAMS = HMMParams(
    initial=Dirichlet(np.array([1.0, 1.5, 2.0])),
    transition=Dirichlet(np.where(SUPPORT, STICKY + 0.3, 0)),
    emissions=GammaPrior(np.array([[4.0], [9.0], [20.0]]), np.array([[2.0], [1.5], [1.5]])),
)


def _divergence(one, other):
    """KL of Dirichlet distributions, Bishop's (B.16) and (B.21)."""
    logs = digamma(one) - digamma(one.sum())
    size = gammaln(one.sum()) - gammaln(one).sum() - gammaln(other.sum()) + gammaln(other).sum()
    return size + (one - other) @ logs


def _step(initial, transition, a, b):
    """The bound at these hyperparameters, and those of the next step: the sum over all paths of every sequence."""
    log_initial = digamma(initial) - digamma(initial.sum())
    log_moves = np.full((STATES, STATES), -np.inf)
    for i in range(STATES):
        log_moves[i, i:] = digamma(transition[i, i:]) - digamma(transition[i, i:].sum())
    new = [START.copy(), np.where(SUPPORT, STICKY, 0), np.full(STATES, SHAPE), np.full(STATES, RATE)]
    bound = 0.0
    for x, length in zip(X[..., 0], LENGTHS, strict=True):
        paths = np.array(list(itertools.product(range(STATES), repeat=length)))
        seen = np.flatnonzero(~np.isnan(x[:length]))
        score = log_initial[paths[:, 0]] + log_moves[paths[:, :-1], paths[:, 1:]].sum(axis=1)
        for t in seen:
            each = x[t] * (digamma(a) - np.log(b)) - a / b - gammaln(x[t] + 1)
            score = score + each[paths[:, t]]
        bound += logsumexp(score)
        mass = np.exp(score - logsumexp(score))
        np.add.at(new[0], paths[:, 0], mass)
        np.add.at(new[1], (paths[:, :-1], paths[:, 1:]), np.repeat(mass[:, None], length - 1, axis=1))
        for t in seen:
            np.add.at(new[2], paths[:, t], x[t] * mass)
            np.add.at(new[3], paths[:, t], mass)
    gammas = (a - SHAPE) * digamma(a) - gammaln(a) + gammaln(SHAPE) + SHAPE * np.log(b / RATE) + a * (RATE / b - 1)
    bound -= gammas.sum() + _divergence(initial, START)
    return bound - sum(_divergence(transition[i, i:], STICKY[i, i:]) for i in range(STATES)), new


def _shares(concentration):
    return concentration / concentration.sum(axis=-1, keepdims=True)


def test_every_iterate_is_that_of_a_sum_over_all_paths(x64):
    """Sequences of two lengths, a missing step, a sticky prior, and transitions that cannot be."""
    path = trajectory(MODEL, PARAMS, Sequences(X, LENGTHS), num_steps=6)
    now = (
        PARAMS.initial.concentration,
        PARAMS.transition.concentration,
        *np.squeeze([PARAMS.emissions.shape, PARAMS.emissions.rate], axis=2),
    )
    for step in range(7):
        bound, new = _step(*now)
        at = jax.tree.map(lambda leaf, step=step: leaf[step], path.params)
        np.testing.assert_allclose(path.objective[step], bound, rtol=1e-10)
        found = at.initial.concentration, at.transition.concentration, at.emissions.shape[:, 0], at.emissions.rate[:, 0]
        for a, b in zip(found, now, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
        now = new
    assert np.all(np.diff(path.objective) > -1e-10)
    # The plain model's parameters, and what the next state is expected to be.
    plain = MODEL.expected(at)
    np.testing.assert_allclose(plain.transition, _shares(at.transition.concentration), rtol=1e-12)
    np.testing.assert_allclose(plain.initial, _shares(at.initial.concentration), rtol=1e-12)
    ahead = MODEL.forecast(at, X[0], 2)
    np.testing.assert_allclose(ahead[0], MODEL.filter(at, X[0])[-1] @ plain.transition, rtol=1e-10)
    np.testing.assert_allclose(ahead.sum(axis=1), 1.0)


def test_the_bound_of_one_state_is_the_evidence(x64):
    """Of all paths there is one, so that nothing is lost."""
    model = HMM(FAMILY, 1)
    one = HMMParams(
        initial=Dirichlet(np.ones(1)), transition=Dirichlet(np.ones((1, 1))), emissions=GammaPrior(*np.ones((2, 1, 1)))
    )

    @jax.jit
    def bound(params):
        params = model.m_step(model.e_step(params, X[1:]))
        return model.e_step(params, X[1:]).loglik + model.log_prior(params)

    events, steps = X[1].sum(), 5
    evidence = (
        gammaln(SHAPE + events) - gammaln(SHAPE) + SHAPE * np.log(RATE) - (SHAPE + events) * np.log(RATE + steps)
    ) - gammaln(X[1] + 1).sum()
    np.testing.assert_allclose(bound(one), evidence, rtol=1e-12)


# Counts of two regimes that take turns every six steps. Of a CategoricalMarkovChain with Dirichlet rows (3, 1), (1, 3),
# and Poisson rates of Gamma(2, 1/2), bayespy 0.6.6 has this lower bound and these distributions, from the first of the
# starts. `benchmarks/variational.py` runs it side by side, step by step.
COUNTS = np.array(
    [
        *(2, 0, 7, 1, 1, 3, 10, 11, 10, 6, 8, 18, 3, 3, 4, 3, 2, 2, 7, 9, 14, 5, 8, 13, 7, 1, 1, 3, 1, 1),
        *(7, 9, 9, 7, 10, 14, 1, 4, 1, 2, 1, 2, 17, 11, 12, 10, 7, 9, 0, 2, 3, 1, 3, 2, 4, 9, 6, 14, 4, 17),
    ]
)
BOUND = -163.17667790783617
RATES = GammaPrior(np.array([62.94612776, 303.05387224]), np.array([29.96456864, 31.03543136]))
MOVES = np.array([[26.66589926, 6.79866937], [5.79943906, 27.73599231]])


def test_restarts_in_float32_find_bayespys_distributions():
    """And draws are of parameters that are drawn first."""
    x, sticky = COUNTS.astype(np.float32)[:, None], 1 + 2 * jnp.eye(2)
    model = HMM(Variational(Poisson(prior=GammaPrior(2.0, 0.5))), 2, transition_prior=Dirichlet(sticky))
    starts = HMMParams(
        initial=Dirichlet(jnp.ones((2, 2))),
        transition=Dirichlet(jnp.stack([sticky, 2 * sticky])),
        emissions=GammaPrior(jnp.array([[[4.0], [18.0]], [[5.0], [9.0]]]), jnp.full((2, 2, 1), 2.0)),
    )
    runs = fit_restarts(model, None, x, init=starts, tol=1e-6)
    assert runs.best.status == Status.CONVERGED
    assert runs.objective.dtype == jnp.float32
    np.testing.assert_allclose(runs.objective, BOUND, rtol=5e-6)
    params = runs.best.params
    np.testing.assert_allclose(params.transition.concentration, MOVES, rtol=2e-3)
    np.testing.assert_allclose(params.emissions.shape[:, 0], RATES.shape, rtol=2e-3)
    np.testing.assert_allclose(params.emissions.rate[:, 0], RATES.rate, rtol=2e-3)
    initial, transition = ([2 / 3, 1 / 3], MOVES / MOVES.sum(axis=1, keepdims=True))
    keys = jax.random.split(KEY, 4000)
    drawn, path = jax.jit(jax.vmap(lambda key: model.sample_with_states(key, params, 2)))(keys)
    assert drawn.shape == (4000, 2, 1)
    np.testing.assert_allclose(path[:, 0].mean(), initial[1], atol=0.03)
    np.testing.assert_allclose(np.mean(path[:, 1] == path[:, 0]), initial @ np.diagonal(transition), atol=0.03)


def test_a_stationary_start_leaves_transitions_values():
    model = HMM(FAMILY, 2, stationary=True)
    assert isinstance(model.params_like(X).transition, jax.ShapeDtypeStruct)


def test_values_in_the_place_of_distributions_are_refused():
    params = HMMParams(initial=np.full(3, 1 / 3), transition=np.full((3, 3), 1 / 3), emissions=PARAMS.emissions)
    with pytest.raises((TypeError, ValueError), match=r"params.initial"):
        em_fit(MODEL, params, X)
    with pytest.raises((TypeError, ValueError), match=r"params.initial"):
        MODEL.num_parameters(params)
