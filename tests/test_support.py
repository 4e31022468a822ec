"""Rows that a family cannot have produced are refused by name, column and row; what it takes is not."""

import jax
import numpy as np
import pytest

from jaxem import (
    Background,
    Bernoulli,
    Binomial,
    Categorical,
    Exponential,
    LinearRegression,
    LogisticRegression,
    Mixture,
    MixtureParams,
    Multinomial,
    Normal,
    Poisson,
    PoissonRegression,
    Product,
    StudentT,
    ZeroInflated,
    em_fit,
    params_from_responsibilities,
)

COUNTS = np.random.default_rng(0).integers(0, 2, (12, 2))
WAITS = np.random.default_rng(0).exponential(size=(12, 2)).astype(np.float32)


def put(x, value, row=7, column=1):
    x = np.array(x, float if isinstance(value, float) else None)
    x[row, column] = value
    return x


HALF = np.full(12, 0.5, np.float32)
# name -> (family, data, what the message must say)
OUTSIDE = {
    "bernoulli": (Bernoulli(), put(COUNTS, 2), ("x must hold 0 or 1", "got 2", "row 7, column 1")),
    "bernoulli, half": (Bernoulli(), put(COUNTS, 0.5), ("0 or 1", "0.5", "row 7, column 1")),
    "negative": (Bernoulli(), put(COUNTS, -3), ("0 or 1", "-3")),
    "binomial": (Binomial(3), put(COUNTS, 4), ("at most trials", "got 4", "row 7, column 1")),
    "binomial, by row": (Binomial(), (put(COUNTS, 2), np.ones(12)), ("at most trials", "got 2", "row 7, column 1")),
    "binomial, no trials": (Binomial(), COUNTS, ("trials must be given once",)),
    "binomial, twice": (Binomial(3), (COUNTS, np.full(12, 3)), ("trials must be given once",)),
    "binomial, trials a row": (Binomial(np.full(12, 3)), COUNTS, ("one a column (2,)", "(successes, trials)")),
    "categorical": (Categorical(2), put(COUNTS, 2), ("from 0 to 1", "got 2", "row 7, column 1")),
    "categorical, by column": (Categorical((3, 2)), put(COUNTS, 2), ("below [3 2]", "got 2", "row 7, column 1")),
    "categorical, columns": (Categorical((3, 2, 2)), COUNTS, ("num_values must be one number, or one a column",)),
    "multinomial": (Multinomial(), put(COUNTS, -1), ("whole numbers, at least 0", "got -1", "row 7, column 1")),
    "multinomial, sum": (Multinomial(5), COUNTS, ("sum to trials=5", "row 0")),
    "poisson": (Poisson(), put(COUNTS, -2), ("whole numbers, at least 0", "got -2", "row 7, column 1")),
    "poisson, fraction": (Poisson(), put(COUNTS, 1.5), ("whole numbers", "got 1.5")),
    "poisson, exposure": (Poisson(), (COUNTS, put(WAITS, 0.0)), ("x[1] must hold exposures above 0", "got 0")),
    "exponential": (Exponential(), put(WAITS, -0.5), ("waiting times, at least 0", "-0.5", "row 7, column 1")),
    "infinite": (Exponential(), put(WAITS, np.inf), ("finite waiting times", "inf")),
    "empty column": (Poisson(), np.where([True, False], COUNTS, -1), ("an observed entry in every column", "column 1")),
    "normal, infinite": (Normal("diag"), put(WAITS, np.inf), ("x must be finite", "inf in row 7, column 1", "NaN")),
    "normal, empty column": (Normal("diag"), np.where([True, False], WAITS, np.nan), ("column 1 has none",)),
    "student t": (StudentT(), put(WAITS, np.nan), ("x must be finite", "row 7, column 1", "no missing values")),
    "zero-inflated": (ZeroInflated(Poisson()), put(COUNTS, -2), ("whole numbers", "got -2")),
    "background": (Background(Poisson(), 1.0), put(COUNTS, -2), ("whole numbers", "got -2")),
    "regression, response": (LinearRegression(), (WAITS, WAITS), ("x[1], the response, must have shape (12,)",)),
    "regression, missing": (LinearRegression(), (put(WAITS, np.nan), HALF), ("x[0] must be finite", "row 7")),
    "logistic": (LogisticRegression(), (WAITS, HALF), ("x[1] must hold 0 or 1", "got 0.5 in row 0")),
    "poisson regression": (PoissonRegression(), (WAITS, HALF), ("x[1] must hold whole numbers", "0.5 in row 0")),
    "product": (
        Product({"a": Poisson(), "b": Bernoulli()}),
        {"a": COUNTS, "b": put(COUNTS, 2)},
        ("x['b'] must hold 0 or 1", "row 7, column 1"),
    ),
    "product, names": (Product({"a": Poisson()}), {"b": COUNTS}, ("x must be a dict with ['a']", "got ['b']")),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_what_lies_outside_the_support_is_refused(case):
    family, x, parts = OUTSIDE[case]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is looked at below)
        Mixture(family, 2).check(x)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("family", "x", "message"),
    [
        (LinearRegression(), WAITS, "must be a pair"),
        (Product({"a": Poisson()}), COUNTS, "must be a dict"),
    ],
)
def test_data_of_another_form_are_refused(family, x, message):
    with pytest.raises(TypeError, match=message):
        Mixture(family, 2).check(x)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Categorical(0), ValueError, "num_values must be at least 1"),
        (lambda: Categorical(2.5), TypeError, "num_values must be a Python integer"),
        (lambda: Multinomial(0), ValueError, "trials must be at least 1"),
        (lambda: StudentT("round"), ValueError, "covariance must be one of"),
        (lambda: StudentT(degrees_of_freedom=0.0), ValueError, "degrees_of_freedom must be above 0"),
        (lambda: Background(Normal(), 0.0), ValueError, "volume must be above 0"),
        (lambda: Product({}), ValueError, "families must name at least one"),
        (lambda: Product([Normal()]), TypeError, "families must be a dict"),
        (lambda: Product({"a": Background(Normal(), 1.0)}), TypeError, "must not add components"),
    ],
)
def test_settings_are_refused(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_proportions_must_sum_to_one():
    share = np.full((12, 2), 0.5)
    share[4] = 0.4
    with pytest.raises(ValueError, match=r"responsibilities must sum to 1; row 4 sums to 0\.8"):
        params_from_responsibilities(Mixture(Poisson(), 2), COUNTS, share)
    model = Mixture(Poisson(), 2)
    start = model.init(jax.random.key(0), COUNTS)
    with pytest.raises(ValueError, match=r"params\.weights must sum to 1; got a sum of 2"):
        em_fit(model, MixtureParams(weights=2 * start.weights, components=start.components), COUNTS)


def test_families_that_cannot_be_sampled_say_why():
    model = Mixture(Binomial(), 2)
    x = (COUNTS, np.ones(12, int))
    with pytest.raises(ValueError, match="trials must be given to sample"):
        model.sample(jax.random.key(0), model.init(jax.random.key(0), x), 3)
    regression = Mixture(LinearRegression(), 2)
    x = (WAITS, HALF)
    with pytest.raises(TypeError, match="cannot sample features"):
        regression.sample(jax.random.key(0), regression.init(jax.random.key(0), x), 3)
