"""Chains that start from their stationary distribution: against exact fractions, and a general optimiser."""

import dataclasses
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jitted import e_step
from scipy.optimize import minimize

from jaxem import HMM, Categorical, Status, em_fit, pad_sequences
from jaxem.latents.markov.stationary import stationary_distribution, stationary_maximum


def exact(transition):
    """The stationary distribution in fractions, by Gauss-Jordan elimination of pi (I - A) = 0, sum pi = 1."""
    table = [[Fraction(float(value)) for value in row] for row in np.asarray(transition)]
    count = len(table)
    table = [[value / sum(row) for value in row] for row in table]
    rows = [[(i == j) - table[i][j] for i in range(count)] + [Fraction(0)] for j in range(count - 1)]
    rows.append([Fraction(1)] * (count + 1))
    for i in range(count):
        pivot = next(row for row in rows[i:] if row[i] != 0)
        rows.remove(pivot)
        rows.insert(i, [value / pivot[i] for value in pivot])
        rows = [
            row if number == i else [a - row[i] * b for a, b in zip(row, rows[i], strict=True)]
            for number, row in enumerate(rows)
        ]
    return np.array([float(row[-1]) for row in rows])


@pytest.mark.parametrize(
    "transition",
    [
        [
            [1 - 1e-7, 1e-7, 0],
            [3e-9, 1 - 3e-9, 0],
            [0.5, 0.25, 0.25],
        ],  # nearly apart, and a state that is left for good
        [[0.5, 0.5, 0], [0, 0.5, 0.5], [0, 0, 1]],  # absorbed
        [[0, 1, 0], [0, 0, 1], [1, 0, 0]],  # a cycle
        [[0.2, 0.3, 0.5], [1e-20, 0.5, 0.5], [1e-30, 1, 1e-10]],
    ],
)
def test_every_entry_is_exact_in_float32(transition):
    transition = np.asarray(transition, np.float32)
    np.testing.assert_allclose(stationary_distribution(jnp.asarray(transition)), exact(transition), rtol=2e-6)


def height(transition, moves, starts):
    """sum moves log A + sum starts log pi(A), and its slope along logits."""
    count = len(starts)
    stationary = np.maximum(np.linalg.pinv((np.eye(count) - transition + 1).T) @ np.ones(count), 1e-99)
    value = np.linalg.pinv(np.eye(count) - transition + stationary) @ (starts / stationary)
    counts = moves + transition * stationary[:, None] * value
    top = np.sum(moves * np.log(np.where(moves > 0, transition, 1))) + np.sum(starts * np.log(stationary))
    return top, counts - transition * counts.sum(axis=1, keepdims=True)


def highest(moves, starts, random):
    """The best end of a general optimiser from several starts."""

    def loss(theta):
        theta = np.where(moves > 0, theta.reshape(moves.shape), -np.inf)
        table = np.exp(theta - theta.max(axis=1, keepdims=True))
        top, slope = height(table / table.sum(axis=1, keepdims=True), moves, starts)
        return -top, -np.where(moves > 0, slope, 0).ravel()

    starts_at = [np.log(np.maximum(moves, 1e-2)), *random.normal(size=(3, *moves.shape))]
    options = dict(maxiter=500, ftol=1e-15, gtol=1e-9)
    return max(
        -minimize(loss, at.ravel(), jac=True, method="L-BFGS-B", bounds=[(-25, 25)] * moves.size, options=options).fun
        for at in starts_at
    )


def two_steps(random):
    """100 sequences of two steps: as many moves from every state as starts there."""
    moves = 100 * random.dirichlet(np.full(9, 0.5)).reshape(3, 3)
    return moves, moves.sum(axis=1)


def one_step(random):
    """60 sequences of one step, and one of six."""
    return 5 * random.dirichlet(np.full(9, 0.5)).reshape(3, 3), 61 * random.dirichlet(np.ones(3))


def long(random):
    """Twenty long ones."""
    return 1000 * random.gamma(0.4, size=(3, 3)), 20 * random.dirichlet(np.ones(3))


def ring(random):
    """Some moves cannot be."""
    moves = random.gamma(0.5, size=(3, 3)) * 30 + 0.5
    moves[0, 2] = moves[1, 0] = 0
    return moves, 50 * random.dirichlet(np.ones(3))


climbed = jax.jit(jax.vmap(stationary_maximum))


@pytest.mark.parametrize("kind", [two_steps, one_step, long, ring])
def test_nothing_is_higher_than_the_m_step(kind, x64):
    random = np.random.default_rng(0)
    cases = [kind(random) for _ in range(4)]
    moves, starts = (np.stack(arrays) for arrays in zip(*cases, strict=True))
    best = np.array([highest(*case, random) for case in cases])
    for dtype, slack in ((jnp.float64, 1e-9), (jnp.float32, 3e-7)):
        tables = np.asarray(climbed(moves.astype(dtype), starts.astype(dtype)), float)
        tables = tables / tables.sum(axis=-1, keepdims=True)
        reached = np.array([height(*case)[0] for case in zip(tables, moves, starts, strict=True)])
        assert np.all(reached >= best - slack * np.abs(best)), best - reached
        np.testing.assert_array_equal(tables[moves == 0], 0)


def short(number):
    random = np.random.default_rng(number)
    lengths = [2] * 100 if number % 2 else [1] * 60 + [6]
    return pad_sequences([random.integers(0, 4, (length, 1)) for length in lengths])


@pytest.mark.parametrize(("number", "wide", "slack"), [(1, True, 1e-9), (2, False, 1e-4)])
def test_em_never_falls_on_short_sequences(number, wide, slack):
    with jax.enable_x64(wide):
        model, x = HMM(Categorical(4), 3, stationary=True), short(number)
        starts = jax.vmap(lambda key: HMM(Categorical(4), 3).init(key, x))(jax.random.split(jax.random.key(1), 5))
        fits = jax.vmap(lambda params: em_fit(model, params, x, max_steps=200))(starts)
        assert np.all(np.isin(fits.status, [Status.CONVERGED, Status.MAX_STEPS]))
        assert np.all(fits.largest_decrease <= slack)


def test_a_start_of_its_own_counts_for_nothing(x64):
    """The stationary distribution is a function of the transitions, whatever a start holds beside them."""
    model, x = HMM(Categorical(4), 3, stationary=True), short(2)
    params = model.init(jax.random.key(0), x)
    other = dataclasses.replace(params, initial=jnp.array([0.9, 0.1, 0.0]))
    np.testing.assert_allclose(model.log_prob(other, x), model.log_prob(params, x), rtol=1e-12)
    np.testing.assert_allclose(e_step(model, other, x).initial, e_step(model, params, x).initial, rtol=1e-12)
    stats = e_step(model, params, x)
    np.testing.assert_allclose(model.q_function(other, stats), model.q_function(params, stats), rtol=1e-12)
