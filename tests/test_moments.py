"""Moments in place of rows: what models are handed, and that it stands for the rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxem import EM, Mixture, Moments, Normal, anderson, data, em_fit, fit_restarts, stepwise_em, stochastic_em
from jaxem.capabilities import complete
from jaxem.record import record, static

pytestmark = pytest.mark.usefixtures("x64")

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 3)) @ RNG.normal(size=(3, 3)) + [5.0, -2.0, 100.0]
WEIGHTS = RNG.integers(0, 3, 60).astype(float)


def _close(found, x, weights):
    repeated = np.repeat(x, weights.astype(int), axis=0)
    np.testing.assert_allclose(found.mean[0], repeated.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(found.covariance[0], np.cov(repeated.T, bias=True), rtol=1e-11, atol=1e-12)


def test_moments_of_rows_are_numpys():
    found = data.moments_of(X, WEIGHTS)
    _close(found, X, WEIGHTS)
    assert found.count[0] == WEIGHTS.sum()
    _close(data.moments_of(X), X, np.ones(60))


def test_moments_of_many_rows_are_taken_block_by_block(monkeypatch):
    monkeypatch.setattr("jaxem.numerics.tuning.BLOCK_BYTES", 1)
    monkeypatch.setattr("jaxem.numerics.tuning.FEWEST_BLOCK_ROWS", 16)
    x = np.concatenate([X, X[:7] + 1])
    _close(data.moments_of(x), x, np.ones(67))


def test_far_from_zero_they_keep_their_digits_in_float32():
    x = np.float32(1e3) + RNG.normal(size=(20_000, 2)).astype(np.float32)
    found = data.moments_of(x)
    np.testing.assert_allclose(found.covariance[0], np.cov(x.T.astype(float), bias=True), rtol=1e-5, atol=1e-5)


def test_groups_pool_to_the_moments_of_all_their_rows():
    parts = [X[:10], X[10:25], X[25:]]
    each = [data.moments_of(part) for part in parts]
    groups = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *each)
    weights = np.array([2.0, 0.0, 1.0])
    found = data.pooled(groups, weights)
    _close(found, np.concatenate(parts), np.repeat(weights, [10, 15, 35]))
    assert found.count[0] == data.total_count(groups, weights) == 55


@pytest.mark.parametrize("missing", [False, True])
def test_rows_become_one_group_where_they_may(missing):
    found, weights = data.as_moments(X, None, missing)
    assert weights == 60
    assert found.count == 1
    holes = np.where(RNG.random(X.shape) < 0.1, np.nan, X)
    assert data.as_moments(holes, None, missing=True)[0] is holes
    few = X[:3]
    assert data.as_moments(few, WEIGHTS[:3], missing)[0] is few
    # Under jit nobody can look for missing entries.
    kept = []
    jax.jit(lambda x: kept.append(data.as_moments(x, None, missing)[0]) or x)(X)
    assert isinstance(kept[0], Moments) is not missing


SEEN = []


@record
class MeanStats:
    count: jax.Array
    first: jax.Array
    loglik: jax.Array


@record
class NormalMean:
    """The mean of a normal distribution of unit covariance, by statistics that moments suffice for."""

    name: str = static(default="")  # so that a test compiles steps of its own

    def check(self, x, weights=None):
        if isinstance(x, Moments):
            data.check_moments(x, weights)

    def units(self, x):
        return data.grouped(x) if isinstance(x, Moments) else x

    def reduced(self, x, weights=None):
        return data.as_moments(x, weights, missing=False)

    def init(self, key, x, weights=None):
        return jnp.zeros(3)

    def e_step(self, params, x, weights=None, expect=None):
        SEEN.append(data.units_and_columns(x)[0])
        seen = data.pooled(x, weights) if isinstance(x, Moments) else data.moments_of(x, weights)
        apart, count = seen.mean[0] - params, seen.count[0]
        square = jnp.trace(seen.covariance[0]) + jnp.sum(apart**2)
        return MeanStats(count=count, first=count * seen.mean[0], loglik=-0.5 * count * square)

    def m_step(self, stats):
        return stats.first / stats.count


@record
class Crawling(NormalMean):
    crawls = True


def _units_seen(algorithm):
    SEEN.clear()
    em_fit(NormalMean(name=repr(algorithm)), jnp.ones(3), X, algorithm=algorithm, key=jax.random.key(0), max_steps=2)
    return set(SEEN)


def test_steps_see_moments_where_they_are_on_all_rows():
    assert _units_seen(None) == _units_seen(anderson()) == {1}
    assert _units_seen(stepwise_em(20)) == {20, 60}
    assert _units_seen(stochastic_em()) == {60}


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_a_fit_from_moments_is_that_from_rows(weights):
    known = data.moments_of(X, weights)
    single = jax.tree.map(lambda leaf: leaf[0], known)
    start = jnp.ones(3)
    rows = em_fit(NormalMean(), start, X, weights)
    for moments in (single, dataclasses.replace(single, count=int(single.count)), known):
        fit = em_fit(NormalMean(), start, moments)
        np.testing.assert_allclose(fit.objective, rows.objective, rtol=1e-12)
        np.testing.assert_allclose(fit.params, rows.params, rtol=1e-12)
        assert (fit.status, fit.num_steps) == (rows.status, rows.num_steps)
    runs = fit_restarts(NormalMean(), jax.random.key(0), X, weights, num_restarts=2, certify=False)
    np.testing.assert_allclose(runs.objective, rows.objective, rtol=1e-12)
    assert runs.total_weight == (60 if weights is None else WEIGHTS.sum())


def test_starts_of_a_users_own_are_drawn_from_rows():
    def start(key, x, weights=None):
        return x[jax.random.randint(key, (), 0, 60)]

    runs = fit_restarts(NormalMean(), jax.random.key(0), X, num_restarts=2, init=start, certify=False)
    np.testing.assert_allclose(runs.best.params, X.mean(axis=0))


def test_other_models_see_their_rows():
    model = complete("model", Mixture(Normal(), 2))
    x, weights = model.reduced(X, WEIGHTS)
    assert x is X
    assert weights is WEIGHTS
    assert not model.crawls


def test_where_em_crawls_a_fit_is_accelerated_by_itself():
    def passes(model, algorithm):
        fit = em_fit(model, jnp.ones(3), X, algorithm=algorithm, tol=-1.0, max_steps=3)
        return fit.history

    np.testing.assert_array_equal(passes(NormalMean(), None), passes(NormalMean(), EM()))
    np.testing.assert_array_equal(passes(Crawling(), None), passes(Crawling(), anderson()))


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, r"x.mean must have shape \(D,\)", {"mean": np.zeros((1, 2, 3))}),
        (ValueError, r"x.covariance must have shape \(3, 3\)", {"covariance": np.eye(2)}),
        (ValueError, "x.covariance must be positive semi-definite", {"covariance": -np.eye(3)}),
        (ValueError, "must be finite", {"mean": np.full(3, np.nan)}),
        (ValueError, "x.count must be above 0", {"count": 0}),
        (ValueError, r"x.count must have shape \(\)", {"count": np.ones(3)}),
        (TypeError, "x.mean must be a JAX or NumPy array", {"mean": [0.0, 0.0, 0.0]}),
    ],
)
def test_what_are_no_moments_is_refused_by_name(error, message, change):
    moments = dataclasses.replace(Moments(np.zeros(3), np.eye(3), 10), **change)
    with pytest.raises(error, match=message):
        em_fit(NormalMean(), jnp.zeros(3), moments)


def test_moments_of_one_group_carry_their_own_weight():
    with pytest.raises(TypeError, match="weights must be None"):
        em_fit(NormalMean(), jnp.zeros(3), Moments(np.zeros(3), np.eye(3), 10), np.ones(1))
