"""Semi-supervised data: rows whose component is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.naive_bayes import BernoulliNB, CategoricalNB, GaussianNB

from jaxem import (
    Bernoulli,
    Categorical,
    Labelled,
    LinearRegression,
    Mixture,
    Normal,
    Product,
    Status,
    datasets,
    em_fit,
    fit_restarts,
    hard_em,
)

pytestmark = pytest.mark.usefixtures("x64")

RNG = np.random.default_rng(11)
LABELS = RNG.integers(0, 3, 60)
YES = (RNG.random((60, 5)) < np.array([[0.2], [0.5], [0.8]])[LABELS]).astype(np.int64)
VALUES = np.minimum(RNG.poisson(0.5 + LABELS[:, None], (60, 3)), 3)


def supervised(family, x):
    """The fit of fully labelled data, from a start that has nothing to do with it."""
    model = Mixture(family, 3)
    data = Labelled(x, LABELS)
    start = model.init(jax.random.key(5), x)
    fit = em_fit(model, start, data)
    assert fit.status == Status.CONVERGED
    np.testing.assert_allclose(fit.history[1], fit.objective, rtol=1e-12)  # one step is all that it takes
    return model, fit


def test_fully_labelled_bernoullis_are_naive_bayes():
    model, fit = supervised(Bernoulli(), YES)
    peer = BernoulliNB(alpha=1e-10, force_alpha=True).fit(YES, LABELS)
    np.testing.assert_allclose(fit.params.components.probability, np.exp(peer.feature_log_prob_), atol=1e-8)
    np.testing.assert_allclose(model.posterior(fit.params, YES), peer.predict_proba(YES), atol=1e-7)


def test_fully_labelled_categories_are_naive_bayes():
    model, fit = supervised(Categorical(4), VALUES)
    peer = CategoricalNB(alpha=1e-10, force_alpha=True, min_categories=4).fit(VALUES, LABELS)
    for d in range(3):
        np.testing.assert_allclose(
            fit.params.components.probability[:, d], np.exp(peer.feature_log_prob_[d]), atol=1e-8
        )
    np.testing.assert_allclose(model.posterior(fit.params, VALUES), peer.predict_proba(VALUES), atol=1e-6)


def test_a_labelled_product_is_naive_bayes_of_mixed_columns():
    x, species = datasets.iris()
    model = Mixture(Product({"sepal": Normal("diag"), "petal": Normal("diag")}), 3)
    data = {"sepal": x[:, :2], "petal": x[:, 2:]}
    fit = em_fit(model, model.init(jax.random.key(0), data), Labelled(data, species))
    peer = GaussianNB(var_smoothing=0).fit(x, species)
    np.testing.assert_allclose(fit.params.components["sepal"].covariance, peer.var_[:, :2], rtol=1e-8)
    np.testing.assert_allclose(model.posterior(fit.params, data), peer.predict_proba(x), atol=1e-8)


def test_labels_fix_the_numbering_and_only_help():
    x, species = datasets.iris()
    known = np.where(np.arange(150) % 5 == 0, species, -1)
    model = Mixture(Normal("full"), 3)
    runs = fit_restarts(model, jax.random.key(0), Labelled(x, known), num_restarts=4, certify=False)
    rises = np.diff(np.asarray(runs.best.history)[: int(runs.best.num_steps) + 1])
    assert np.all(rises >= -1e-9)
    assert np.mean(np.asarray(model.predict(runs.best.params, x)) == species) > 0.9


def test_a_labelled_row_keeps_its_label():
    data = Labelled(YES, np.where(np.arange(60) < 20, LABELS, -1))
    model = Mixture(Bernoulli(), 3)
    params = model.init(jax.random.key(0), data)
    posterior = np.asarray(model.posterior(params, data))
    np.testing.assert_array_equal(posterior[:20], np.eye(3)[LABELS[:20]])
    np.testing.assert_allclose(posterior[20:], model.posterior(params, YES)[20:])
    np.testing.assert_array_equal(np.asarray(model.predict(params, data))[:20], LABELS[:20])
    # The likelihood of a labelled row is the joint one.
    joint = model.log_prob(params, YES) + jnp.log(model.posterior(params, YES)[jnp.arange(60), LABELS])
    np.testing.assert_allclose(model.log_prob(params, data)[:20], joint[:20])


def test_no_labels_known_is_the_unsupervised_fit():
    model = Mixture(Bernoulli(), 3)
    start = model.init(jax.random.key(1), YES)
    plain = em_fit(model, start, YES, max_steps=20, tol=-1.0)
    unknown = em_fit(model, start, Labelled(YES, np.full(60, -1)), max_steps=20, tol=-1.0)
    np.testing.assert_allclose(plain.history, unknown.history, rtol=1e-12)


def test_hard_em_respects_labels():
    x = (YES[:, :2].astype(float), YES[:, 2] + 0.1 * RNG.normal(size=60))
    data = Labelled(x, np.where(np.arange(60) < 30, LABELS, -1))
    model = Mixture(LinearRegression(), 3)
    fit = em_fit(model, model.init(jax.random.key(0), data), data, algorithm=hard_em())
    assert np.all(np.diff(np.asarray(fit.history)[: int(fit.num_steps) + 1]) >= -1e-9)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (np.full(60, 3), ValueError, r"labels must be in 0\.\.2.*got 3 in row 0"),
        (np.full(60, -2), ValueError, r"labels must be in 0\.\.2, or -1.*got -2"),
        (np.zeros(59, int), ValueError, r"share one leading axis|labels must have shape \(60,\)"),
        (np.zeros(60), TypeError, "labels must be signed whole numbers"),
    ],
)
def test_bad_labels_are_refused(labels, error, message):
    model = Mixture(Bernoulli(), 3)
    with pytest.raises(error, match=message):
        model.init(jax.random.key(0), Labelled(YES, labels))
