"""What a user can get wrong is refused by name, with a remedy; what data can get wrong ends in a status."""

import dataclasses
import re
import traceback
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxem import (
    HMM,
    EMError,
    Hard,
    Mixture,
    MixtureParams,
    Normal,
    NormalParams,
    Screen,
    Status,
    datasets,
    default_prior,
    em_fit,
    fit_restarts,
    from_functions,
    params_from_responsibilities,
    squarem,
)
from jaxem.em import EM, Blocks

X = np.random.default_rng(0).normal(size=(30, 2)).astype(np.float32) + 4 * (np.arange(30) % 2)[:, None]
X = X.astype(np.float32)
KEY = jax.random.key(0)
MODEL = Mixture(Normal("full", missing=False), 2)
START = MixtureParams(
    weights=jnp.array([0.5, 0.5]),
    components=NormalParams(mean=jnp.array([[0.0, 0.0], [4.0, 4.0]]), covariance=jnp.stack([jnp.eye(2)] * 2)),
)


def changed(value, row=3, column=1):
    x = X.copy()
    x[row, column] = value
    return x


def row_weights(row=None, value=0.0):
    weights = np.ones(30, np.float32)
    if row is not None:
        weights[row] = value
    return weights


# name -> (data, exception, the argument, what came, what to do or what was expected)
BAD_ROWS = {
    "NaN": (changed(np.nan), ValueError, "x", "nan in row 3, column 1", "drop such rows"),
    "infinity": (changed(np.inf), ValueError, "x", "inf in row 3, column 1", "drop such rows"),
    "minus infinity": (changed(-np.inf), ValueError, "x", "-inf in row 3, column 1", "drop such rows"),
    "three axes": (X[None], ValueError, "x", "(1, 30, 2)", "(N, D)"),
    "a scalar": (np.float32(1.0), ValueError, "x", "()", "(N, D)"),
    "no columns": (X[:, :0], ValueError, "x", "(30, 0)", "at least one row and one column"),
    "no rows": (X[:0], ValueError, "x", "(0, 2)", "at least one row and one column"),
    "a list": (X.tolist(), TypeError, "x", "list", "jax.numpy.asarray"),
    "text": (np.array([["a", "b"]] * 30), TypeError, "x", "<U1", "numeric"),
    "objects": (X.astype(object), TypeError, "x", "object", "numeric"),
    "fields": (X.view([("a", "f4"), ("b", "f4")])[:, 0], TypeError, "x", "the fields a, b", "as columns"),
    "masked entries": (np.ma.masked_less(X, 0), TypeError, "x", "masked", "x.filled(numpy.nan)"),
    "complex numbers": (X + 1j, TypeError, "x", "complex64", "real and imaginary parts as columns"),
}
# name -> (rows, weights, exception, the argument, what came, what to do or what was expected)
BAD_WEIGHTS = {
    "negative": (X, row_weights(5, -1.0), ValueError, "weights", "-1.0 in row 5", "at least 0"),
    "NaN": (X, row_weights(5, np.nan), ValueError, "weights", "nan in row 5", "finite"),
    "infinite": (X, row_weights(5, np.inf), ValueError, "weights", "inf in row 5", "finite"),
    "all zero": (X, np.zeros(30, np.float32), ValueError, "weights", "all 0", "no row is left"),
    "too short": (X, row_weights()[:29], ValueError, "weights", "(29,)", "(30,)"),
    "a column": (X, row_weights()[:, None], ValueError, "weights", "(30, 1)", "(30,)"),
    "a list": (X, row_weights().tolist(), TypeError, "weights", "list", "jax.numpy.asarray"),
    "complex": (X, row_weights() + 0j, TypeError, "weights", "complex64", "real"),
    "one positive": (X, np.eye(30, dtype=np.float32)[0], ValueError, "x", "1 rows", "fewer components"),
    "fewer rows than components": (X[:1], None, ValueError, "x", "1 rows", "fewer components"),
}
DOORS = {
    "em_fit": lambda x, weights: em_fit(MODEL, START, x, weights),
    "fit_restarts": lambda x, weights: fit_restarts(MODEL, KEY, x, weights, num_restarts=2),
    "init": lambda x, weights: MODEL.init(KEY, x, weights),
    "params_from_responsibilities": lambda x, weights: params_from_responsibilities(
        MODEL, x, np.full((30, 2), 0.5, np.float32), weights
    ),
}


# The same rows refused where they are only looked at.
LOOKS = {
    "log_prob": lambda x: MODEL.log_prob(START, x),
    "posterior": lambda x: MODEL.posterior(START, x),
    "predict": lambda x: MODEL.predict(START, x),
}


def refused(call, exception, *parts):
    """The call raises exactly this, and its message holds every part."""
    with pytest.raises(exception) as caught:
        call()
    assert caught.type is exception
    message = str(caught.value)
    assert re.match(rf"{re.escape(parts[0])}\b", message), message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_refused(case, door):
    x, exception, *parts = BAD_ROWS[case]
    refused(lambda: DOORS[door](x, None), exception, *parts)


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("case", BAD_ROWS)
def test_rows_to_predict_are_refused_in_the_same_words(case, look):
    x, exception, *parts = BAD_ROWS[case]
    refused(lambda: LOOKS[look](x), exception, *parts)
    with pytest.raises(exception) as fitting:
        em_fit(MODEL, START, x)
    with pytest.raises(exception, match=rf"^{re.escape(str(fitting.value))}$"):
        LOOKS[look](x)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_weights_are_refused(case, door):
    x, weights, exception, *parts = BAD_WEIGHTS[case]
    refused(lambda: DOORS[door](x, weights), exception, *parts)


@pytest.mark.parametrize("case", sorted(set(BAD_ROWS) - {"NaN"}))
def test_a_prior_refuses_bad_rows(case):
    """Missing entries are none of them."""
    x, exception, *parts = BAD_ROWS[case]
    refused(lambda: default_prior(x, 2), exception, *parts)


class Unregistered:
    """A model in all but that JAX does not know it."""

    def e_step(self, params, x, weights=None, expect=None):
        return None

    def m_step(self, stats):
        return None


def with_mean(mean):
    return dataclasses.replace(START, components=dataclasses.replace(START.components, mean=jnp.asarray(mean)))


SETTINGS = {
    "covariance of Normal": (lambda: Normal("round"), ValueError, "covariance", "'round'", "'full'", "'spherical'"),
    "all choices": (lambda: Normal("round"), ValueError, "covariance", "'full'", "'diag'", "'tied'", "'spherical'"),
    "covariance of default_prior": (
        lambda: default_prior(X, 2, "round"),
        ValueError,
        "covariance",
        "'round'",
        "'full'",
    ),
    "covariance that is no text": (lambda: Normal(3), ValueError, "covariance", "3", "'full'"),
    "form of Normal": (lambda: Normal(form="fast"), ValueError, "form", "'fast'", "'whitened'"),
    "components of default_prior": (lambda: default_prior(X, 0), ValueError, "num_components", "0", "at least 1"),
    "no components": (lambda: Mixture(Normal(), 0), ValueError, "num_components", "0", "at least 1"),
    "components in halves": (lambda: Mixture(Normal(), 2.5), TypeError, "num_components", "float 2.5", "integer"),
    "components true": (lambda: Mixture(Normal(), True), TypeError, "num_components", "bool True", "integer"),
    "method of init": (lambda: MODEL.init(KEY, X, method="pca"), ValueError, "method", "'pca'", "'k-means++'"),
    "no screen steps": (lambda: Screen(steps=0), ValueError, "steps", "0", "at least 1"),
    "half a screen step": (lambda: Screen(steps=0.5), TypeError, "steps", "float 0.5", "integer"),
    "a screen that keeps none": (lambda: Screen(keep=0.0), ValueError, "keep", "0.0", "(0, 1]"),
    "a screen that keeps too many": (lambda: Screen(keep=1.5), ValueError, "keep", "1.5", "(0, 1]"),
    "a screen that keeps NaN": (lambda: Screen(keep=float("nan")), ValueError, "keep", "nan", "(0, 1]"),
    "empty blocks": (lambda: Blocks(0), ValueError, "block_size", "0", "at least 1"),
    "blocks in halves": (lambda: Blocks(0.5), TypeError, "block_size", "float 0.5", "integer"),
    "no restarts": (lambda: fit_restarts(MODEL, KEY, X, num_restarts=0), ValueError, "num_restarts", "0", "at least 1"),
    "restarts unsaid": (lambda: fit_restarts(MODEL, KEY, X), TypeError, "num_restarts", "needed", "how many"),
    "empty lanes": (
        lambda: fit_restarts(MODEL, KEY, X, num_restarts=2, block_size=0),
        *(ValueError, "block_size", "0", "at least 1"),
    ),
    "two numbers of restarts": (
        lambda: fit_restarts(MODEL, KEY, X, num_restarts=3, init=jax.tree.map(lambda a: jnp.stack([a, a]), START)),
        *(ValueError, "num_restarts", "3", "2 starts", "leave num_restarts out"),
    ),
    "starts that are not stacked alike": (
        lambda: fit_restarts(MODEL, KEY, X, init=dataclasses.replace(START, weights=jnp.ones((3, 2)))),
        *(ValueError, "init", "[(2,), (3,)]", "leading axis"),
    ),
    "NaN as tol": (lambda: em_fit(MODEL, START, X, tol=float("nan")), ValueError, "tol", "nan", "finite"),
    "negative max_steps": (lambda: em_fit(MODEL, START, X, max_steps=-1), ValueError, "max_steps", "-1", "at least 0"),
    "max_steps in halves": (lambda: em_fit(MODEL, START, X, max_steps=2.5), TypeError, "max_steps", "2.5", "whole"),
    "a start with other columns": (
        lambda: em_fit(MODEL, with_mean(jnp.zeros((2, 3))), X),
        *(ValueError, "params.components.mean", "(2, 3)", "(2, 2)", "x of shape (30, 2)", "model.init"),
    ),
    "a start with other components": (
        lambda: em_fit(Mixture(Normal("full"), 2), dataclasses.replace(START, weights=jnp.ones(1)), X),
        *(ValueError, "params.weights", "(1,)", "(2,)", "start"),
    ),
    "labels out of range": (
        lambda: MODEL.params_from_responsibilities(X, np.arange(30) % 3),
        *(ValueError, "labels", "0..2", "0..1"),
    ),
    "responsibilities the wrong way round": (
        lambda: MODEL.params_from_responsibilities(X, np.full((2, 30), 0.5, np.float32)),
        *(ValueError, "responsibilities", "(2, 30)", "(30, 2)"),
    ),
    "negative responsibilities": (
        lambda: MODEL.params_from_responsibilities(X, np.full((30, 2), -0.5, np.float32)),
        *(ValueError, "responsibilities", "at least 0"),
    ),
    "NaN among responsibilities": (
        lambda: MODEL.params_from_responsibilities(X, np.full((30, 2), np.nan, np.float32)),
        *(ValueError, "responsibilities", "finite"),
    ),
    "an e_step that is no function": (
        lambda: from_functions(3, lambda stats: stats),
        *(TypeError, "e_step", "int", "function"),
    ),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_bad_settings_are_refused(case):
    call, exception, *parts = SETTINGS[case]
    refused(call, exception, *parts)


@pytest.mark.parametrize("key", [None, 0, np.zeros(3, np.float32), jax.random.split(KEY, 2)], ids=type)
@pytest.mark.parametrize(
    "door",
    [
        lambda key: MODEL.init(key, X),
        lambda key: fit_restarts(MODEL, key, X, num_restarts=2),
        lambda key: MODEL.sample(key, START, 3),
    ],
    ids=["init", "fit_restarts", "sample"],
)
def test_what_is_no_key_is_refused(door, key):
    came = f"shape {key.shape}" if hasattr(key, "shape") else type(key).__name__
    refused(lambda: door(key), TypeError, "key", came, "random key")


# The settings that both loops take: name -> values that are none
BAD_ARGUMENTS = {
    "tol": ("1e-6", None, 1j, [1e-6], np.array([1e-6, 1e-7]), np.float32("inf"), True, KEY),
    "max_steps": ("5", None, 5j, [5], np.array([5, 6]), np.float32(5), 2**31, 2**70, -1, True),
    "algorithm": ("em", EM, squarem, 3.0, MODEL, EM(expect=Hard), EM(gather=Blocks)),
    "model": (Mixture, Normal(), "mixture", None, lambda: MODEL, 3.0, Unregistered()),
}
# Those of restarts alone.
BAD_RESTARTS = {
    "num_restarts": ("2", 2.0, [2], 0, True, 2j),
    "block_size": ("2", 2.0, [2], 0, np.float32(2), 2j),
    "screen": ("fast", 20, Screen, [20]),
    "init": ("k-means++", 3, [X]),
    "key": ("0", 0.5, [0]),
}
# What a family may not be.
BAD_FAMILIES = (Normal, "normal", np.mean, lambda x: x)


def named_by_us(call, name):
    """The call raises a ValueError or TypeError of this package, in a sentence that begins with the argument's name."""
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    last = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert "jaxem" in Path(last.filename).parts, f"raised in {last.filename}: {caught.value}"
    assert re.match(rf"{name}\b", str(caught.value)), str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_arguments_of_the_loops_are_refused_by_name(name):
    for value in BAD_ARGUMENTS[name]:
        model = value if name == "model" else MODEL
        options = {} if name == "model" else {name: value}
        named_by_us(lambda model=model, options=options: em_fit(model, START, X, **options), name)
        named_by_us(lambda model=model, options=options: fit_restarts(model, KEY, X, num_restarts=2, **options), name)


@pytest.mark.parametrize("name", BAD_RESTARTS)
def test_arguments_of_restarts_are_refused_by_name(name):
    for value in BAD_RESTARTS[name]:
        options = {"key": KEY, "num_restarts": None if name == "init" else 2, name: value}
        named_by_us(lambda options=options: fit_restarts(MODEL, x=X, **options), name)


def test_a_class_or_a_name_in_the_place_of_a_family_is_refused():
    for family in BAD_FAMILIES:
        named_by_us(lambda family=family: Mixture(family, 2), "family")
        named_by_us(lambda family=family: HMM(family, 2), "family")
    for family in ([Normal()], 3, None):
        named_by_us(lambda family=family: Mixture(family, 2).init(KEY, X), "family")
        named_by_us(lambda family=family: HMM(family, 2).init(KEY, X), "family")
        named_by_us(lambda family=family: em_fit(Mixture(family, 2), START, X), "family")


FOREIGN = {
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "longer floats": lambda a: a.astype(np.longdouble),
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
    "not contiguous": lambda a: np.repeat(a, 2, axis=0)[::2],
    "backwards": lambda a: a[::-1].copy()[::-1],
    "columns first": np.asfortranarray,
}


@pytest.mark.parametrize("layout", FOREIGN)
def test_arrays_of_any_layout_mean_the_same(layout):
    change = FOREIGN[layout]
    x, weights, start = change(X), change(row_weights()), jax.tree.map(lambda leaf: change(np.asarray(leaf)), START)
    assert same(
        em_fit(MODEL, start, x, weights, max_steps=2).params, em_fit(MODEL, START, X, row_weights(), max_steps=2).params
    )
    assert same(MODEL.init(KEY, x, weights), MODEL.init(KEY, X, row_weights()))
    stacked = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), START)
    foreign = jax.tree.map(change, stacked)
    runs = [fit_restarts(MODEL, KEY, rows, init=starts, max_steps=2) for rows, starts in ((x, foreign), (X, stacked))]
    assert same(runs[0].params, runs[1].params)
    for look in ("log_prob", "posterior", "predict"):
        assert same(getattr(MODEL, look)(start, x), getattr(MODEL, look)(START, X))


def test_weights_for_a_model_that_takes_none_are_refused():
    model = from_functions(lambda mean, x: (x.sum(), x.size), lambda stats: stats[0] / stats[1])
    with pytest.raises(TypeError, match=r"^weights were given.*write e_step\(params, x, weights=None\)"):
        em_fit(model, jnp.asarray(0.0), X[:, 0], row_weights())


def same(a, b):
    return all(
        np.array_equal(*pair, equal_nan=True) for pair in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_old_style_keys_draw_what_new_style_keys_draw():
    old, new = jax.random.PRNGKey(5), jax.random.key(5)
    assert same(MODEL.init(old, X), MODEL.init(new, X))
    assert same(MODEL.sample(old, START, 4), MODEL.sample(new, START, 4))
    runs = [fit_restarts(MODEL, key, X, num_restarts=2, max_steps=3) for key in (old, new)]
    assert same(runs[0].objective, runs[1].objective)


def test_whole_numbers_are_converted_and_it_is_said():
    whole = np.round(10 * X).astype(np.int32)
    start = MODEL.init(KEY, whole.astype(np.float32))
    with pytest.warns(UserWarning, match=r"x has dtype int32 and is converted to float32"):
        fit = em_fit(MODEL, start, whole, max_steps=5)
    converted = em_fit(MODEL, start, whole.astype(np.float32), max_steps=5)
    assert fit.objective.dtype == jnp.float32
    np.testing.assert_allclose(fit.objective, converted.objective, rtol=1e-6)
    np.testing.assert_allclose(fit.params.components.mean, converted.params.components.mean, rtol=1e-4, atol=1e-4)
    with pytest.warns(UserWarning, match="int32"):
        assert same(MODEL.init(KEY, whole), start)


def test_single_weights_of_zero_are_fine():
    fit = em_fit(MODEL, START, X, row_weights(4, 0.0))
    assert fit.check().status == Status.CONVERGED


# Data that are legal and awkward: name -> rows. One shape for all, so that each covariance compiles once.
AWKWARD = {
    "a constant column": np.column_stack([X[:, 0], np.full(30, 3.0)]),
    "a constant column at zero": np.column_stack([X[:, 0], np.zeros(30)]),
    "all rows the same": np.tile([[1.5, -2.0]], (30, 1)),
    "all rows zero": np.zeros((30, 2)),
    "two rows, many times": np.tile([[1.0, 2.0], [30.0, -4.0]], (15, 1)),
    "every row twice": np.tile(X[:15], (2, 1)),
    "columns that are the same": np.column_stack([X[:, 0], X[:, 0]]),
    "one row far away": np.vstack([X[:29], [[1e6, 1e6]]]),
    "columns of very different units": X * np.array([1e-12, 1e12]),
}
WELL_POSED = {"every row twice", "columns of very different units"}


@pytest.mark.parametrize("shape", ["full", "diag", "tied", "spherical"])
def test_awkward_data_end_in_a_status_and_finite_params(shape):
    model = Mixture(Normal(shape), 2)
    for case, rows in AWKWARD.items():
        x = rows.astype(np.float32)
        for seed in range(3):
            fit = em_fit(model, model.init(jax.random.key(seed), x), x, max_steps=500)
            assert fit.status in (Status.CONVERGED, Status.DEGENERATE), (case, seed, Status(int(fit.status)))
            assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(fit.params)), (case, seed)
            if case in WELL_POSED:
                assert fit.status == Status.CONVERGED, (case, seed)
            if case in ("all rows the same", "all rows zero"):
                assert fit.status == Status.DEGENERATE, (case, seed)


def test_collapsing_onto_one_row_is_degenerate_and_nothing_else():
    # The second component starts at one flower with a thousandth of all others: many of these 150 starts collapse.
    with jax.enable_x64(True):
        x, species = datasets.iris()
        model = Mixture(Normal("full"), 3)

        def start(row):
            second = jnp.full(150, 1e-3).at[row].set(1.0)
            first = jnp.where(species > 0, 1 - second, 0)
            return model.params_from_responsibilities(x, jnp.stack([first, second, 1 - first - second], axis=1))

        fits = jax.vmap(lambda row: em_fit(model, start(row), x))(jnp.arange(150))
        endings = set(np.asarray(fits.status).tolist())
        assert Status.DEGENERATE in endings
        assert endings <= {Status.DEGENERATE, Status.CONVERGED, Status.MAX_STEPS}


@pytest.mark.parametrize("hole", ["weights", "mean", "covariance"])
def test_a_start_with_nan_ends_nonfinite(hole):
    if hole == "weights":
        start = dataclasses.replace(START, weights=jnp.array([0.5, jnp.nan]))
    else:
        broken = getattr(START.components, hole).at[0].set(jnp.nan)
        start = dataclasses.replace(START, components=dataclasses.replace(START.components, **{hole: broken}))
    fit = em_fit(MODEL, start, X)
    assert fit.status == Status.NONFINITE
    assert fit.num_steps == 0
    assert not fit.converged
    with pytest.raises(EMError, match=r"^NONFINITE: .*(standardise|float64)") as caught:
        fit.check()
    assert caught.value.status is Status.NONFINITE


def test_the_step_limit_is_an_error_with_its_own_remedy():
    fit = em_fit(MODEL, START, X, max_steps=1)
    assert fit.status == Status.MAX_STEPS
    assert not fit.converged
    with pytest.raises(EMError, match=r"^MAX_STEPS: .*raise max_steps"):
        fit.check()


def test_degenerate_names_the_prior_as_its_remedy():
    x = np.tile(X[:1], (30, 1))
    fit = em_fit(MODEL, MODEL.init(KEY, x), x)
    with pytest.raises(EMError, match=r"^DEGENERATE: .*jaxem\.default_prior"):
        fit.check()


def test_a_start_by_hand_on_rows_that_are_all_the_same_is_degenerate():
    fit = em_fit(MODEL, START, np.tile(X[:1], (30, 1)))
    assert fit.status == Status.DEGENERATE


def test_a_nonfinite_restart_never_wins_and_leaves_its_neighbours_alone():
    keys = jax.random.split(KEY, 6)
    sound = jax.vmap(lambda key: MODEL.init(key, X))(keys)
    broken = jax.tree.map(lambda leaf: leaf.at[2].set(jnp.nan), sound)
    clean = fit_restarts(MODEL, KEY, X, init=sound, block_size=3)
    runs = fit_restarts(MODEL, KEY, X, init=broken, block_size=3)
    assert runs.status[2] == Status.NONFINITE
    assert runs.failed.tolist() == [False, False, True, False, False, False]
    assert runs.index != 2
    assert runs.count(Status.NONFINITE) == 1
    assert runs.best.status == Status.CONVERGED
    assert runs.best.objective == jnp.max(jnp.delete(clean.objective, 2))
    others = np.array([0, 1, 3, 4, 5])
    for name in ("params", "objective", "status", "num_steps"):
        mine, theirs = getattr(runs, name), getattr(clean, name)
        assert same(*(jax.tree.map(lambda leaf: leaf[others], part) for part in (mine, theirs))), name


def test_restarts_that_all_fail_say_so():
    broken = jax.tree.map(lambda leaf: jnp.full((3, *leaf.shape), jnp.nan), START)
    runs = fit_restarts(MODEL, KEY, X, init=broken)
    assert runs.count(Status.NONFINITE) == 3
    assert runs.hits() == 0
    with pytest.raises(EMError, match=r"^NONFINITE: .*best of 3 restarts"):
        runs.check()


def test_under_jit_shapes_are_refused_and_values_end_in_a_status():
    fit = jax.jit(em_fit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fit(MODEL, START, changed(np.nan)).status == Status.NONFINITE
    with pytest.raises(ValueError, match=r"weights must have shape \(30,\).*\(29,\)"):
        fit(MODEL, START, X, row_weights()[:29])


def test_blocks_meet_the_same_refusals():
    refused(
        lambda: em_fit(MODEL, START, changed(np.nan), algorithm=EM(gather=Blocks(8))),
        *(ValueError, "x", "nan in row 3, column 1", "drop such rows"),
    )
