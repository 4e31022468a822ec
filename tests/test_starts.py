"""A start that cannot be is refused by name, for every model, at every door, and never by a frame inside of JAX."""

import dataclasses
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import NAMES, zoo

import jaxem
from jaxem import (
    HMM,
    Bernoulli,
    Categorical,
    Fixed,
    Gamma,
    KMeans,
    LinearRegression,
    Mixture,
    Normal,
    Poisson,
    Product,
    Sequences,
    StudentT,
    VonMisesFisher,
    bic,
    em_fit,
    fit_restarts,
    from_functions,
    parameters,
)

PACKAGE = str(Path(jaxem.__file__).parent)
KEY = jax.random.key(0)
# Parameters that may be any numbers.
FREE = {"mean", "coefficients", "intercept", "centers", "initial_mean", "dynamics", "emission", "loadings"}
FREE |= {"share", "log_rate"}  # of the zoo's own joint density
FREE |= {"weights", "biases"}  # of layers
FREE |= {"discrimination", "difficulty"}


def refusal(call) -> str:
    """The message of the ValueError or TypeError that the package itself raises."""
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    last = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert last.filename.startswith(PACKAGE), f"raised in {last.filename}: {caught.value}"
    return str(caught.value)


MODELS = {name: lambda name=name: zoo()[name] for name in NAMES}

# support -> values of a shape inside of it, and outside
INSIDE_AND_OUTSIDE = {
    parameters.at_least_zero: (np.ones, lambda shape: np.full(shape, -0.5)),
    parameters.between_zero_and_one: (lambda shape: np.full(shape, 0.5), lambda shape: np.full(shape, 1.5)),
    parameters.simplex: (lambda shape: np.full(shape, 1 / shape[-1]), lambda shape: np.full(shape, 0.9)),
    parameters.unit_vectors: (lambda shape: np.broadcast_to(np.eye(shape[-1])[0], shape), np.zeros),
    parameters.covariances: (
        lambda shape: np.broadcast_to(np.eye(shape[-1]), shape),
        lambda shape: np.broadcast_to(np.eye(shape[-1]) - 1.5, shape),
    ),
    parameters.spreads: (
        lambda shape: np.broadcast_to(np.eye(shape[-1]) if len(shape) > 2 else 1.0, shape),
        lambda shape: np.full(shape, -0.5),
    ),
}


def support_of(supports, path):
    """The support of the leaf at a path, None where it may be any number."""
    for step in path:
        supports = supports.get(getattr(step, "name", getattr(step, "key", None)), {})
    return supports or None


def start(model, x):
    """Parameters of the right shapes, inside of their supports."""
    supports = getattr(model, "supports", {})

    def fill(path, leaf):
        support = support_of(supports, path)
        inside = np.ones if support is None else INSIDE_AND_OUTSIDE[support][0]
        return np.asarray(inside(leaf.shape), np.float32)

    return jax.tree_util.tree_map_with_path(fill, model.params_like(x))


def with_leaf(params, path, leaf):
    """Parameters with another leaf at a path."""
    return jax.tree_util.tree_map_with_path(lambda at, old: leaf if at == path else old, params)


def doors(model, x, *, stacked=True):
    """What a model's parameters go into."""
    yield "em_fit", lambda params: em_fit(model, params, x)
    yield "jitted em_fit", lambda params: jax.jit(em_fit)(model, params, x)
    for name in ("e_step", "log_prob", "posterior", "predict"):
        if hasattr(model, name):
            yield name, lambda params, name=name: getattr(model, name)(params, x)


SPOILT = {
    "one more of the first axis": lambda leaf: np.concatenate([leaf, leaf[:1]]) if leaf.ndim else leaf[None],
    "one more of the last axis": lambda leaf: np.concatenate([leaf, leaf[..., :1]], axis=-1) if leaf.ndim else None,
    "without its first axis": lambda leaf: leaf[0] if leaf.ndim else leaf[None],
    "one more axis": lambda leaf: leaf[None],
    "a list": lambda leaf: np.atleast_1d(leaf).tolist(),
    "None": lambda leaf: None,
    "text": lambda leaf: np.full(leaf.shape, "a"),
    "complex": lambda leaf: leaf + 1j,
}


@pytest.mark.parametrize("name", MODELS)
def test_the_shapes_that_are_asked_for_are_those_of_the_models_own_start(name):
    model, x = MODELS[name]()
    own = jax.eval_shape(lambda key: model.init(key, x), KEY)
    asked = model.params_like(x)
    assert jax.tree.structure(own) == jax.tree.structure(asked)
    assert [leaf.shape for leaf in jax.tree.leaves(own)] == [leaf.shape for leaf in jax.tree.leaves(asked)]


@pytest.mark.parametrize("name", MODELS)
def test_a_start_with_a_spoilt_leaf_is_refused_by_the_leafs_name(name):
    model, x = MODELS[name]()
    good = start(model, x)
    for path, leaf in jax.tree_util.tree_leaves_with_path(good):
        for how, spoil in SPOILT.items():
            params = with_leaf(good, path, spoil(leaf))
            for door, call in doors(model, x):
                if "jitted" in door and how in ("a list", "text", "None"):
                    continue  # jit itself refuses these, or flattens them
                message = refusal(lambda call=call, params=params: call(params))
                place = f"params{jax.tree_util.keystr(path)}"
                assert message.startswith(place), (how, door, place, message)


@pytest.mark.parametrize("name", MODELS)
def test_stacked_starts_are_refused_by_the_leafs_name(name):
    model, x = MODELS[name]()
    good = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), start(model, x))
    for path, leaf in jax.tree_util.tree_leaves_with_path(good):
        params = with_leaf(good, path, np.concatenate([leaf, leaf[:, :1]], axis=1) if leaf.ndim > 1 else leaf[:, None])
        message = refusal(lambda params=params: fit_restarts(model, KEY, x, init=params))
        assert message.startswith(f"init{jax.tree_util.keystr(path)}"), message


@pytest.mark.parametrize("name", MODELS)
def test_a_value_outside_of_its_support_is_refused_by_name(name):
    model, x = MODELS[name]()
    good = start(model, x)
    parameters.check("params", model, good, x)
    for path, leaf in jax.tree_util.tree_leaves_with_path(good):
        support = support_of(getattr(model, "supports", {}), path)
        if support is None:
            assert path[-1].name in FREE or path[-1].name.endswith(("_inputs", "_bias")), path
            continue
        outside = np.asarray(INSIDE_AND_OUTSIDE[support][1](leaf.shape), np.float32)
        if support is parameters.simplex and leaf.shape[-1] == 1:
            outside = np.full(leaf.shape, -1.0, np.float32)
        place = f"params{jax.tree_util.keystr(path)}"
        for door in ("em_fit", "log_prob", "posterior", "predict"):
            call = dict(doors(model, x)).get(door)
            if call is not None and not (isinstance(model, Fixed) and door != "em_fit"):  # held values count there
                message = refusal(lambda call=call, path=path, to=outside: call(with_leaf(good, path, to)))
                assert message.startswith(place), (door, message)
        two = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), with_leaf(good, path, outside))
        message = refusal(lambda two=two: fit_restarts(model, KEY, x, init=two))
        assert message.startswith(place.replace("params", "init", 1)), message


@pytest.mark.parametrize("name", MODELS)
def test_other_records_and_data_of_other_columns_are_refused(name):
    model, x = MODELS[name]()
    good = start(model, x)
    for other in (None, [good], {"weights": 1.0}, good.__class__, 3.0):
        for door, call in doors(model, x):
            if door != "jitted em_fit":
                assert refusal(lambda call=call, other=other: call(other)).startswith("params must be"), (door, other)
    if isinstance(x, np.ndarray) and x.ndim > 1 and not isinstance(getattr(model, "family", None), Categorical):
        wide = np.concatenate([x, x[..., :1]], axis=-1)
        if "directions" in name:
            wide = wide / np.linalg.norm(wide, axis=1, keepdims=True)
        for door in ("em_fit", "posterior", "predict", "log_prob"):
            call = dict(doors(model, wide)).get(door)
            if call is not None:
                assert refusal(lambda call=call: call(good)).startswith(("params.", "mean is held at", "a prior")), door


# By hand, beside the table: what came must be in the sentence. name -> (model, data, field, value, parts)
ROWS = np.random.default_rng(1).normal(size=(20, 2)).astype(np.float32)
COUNTS = np.arange(40, dtype=np.float32).reshape(20, 2) % 5
BY_HAND = {
    "a probability of 1.5": (
        *(Mixture(Bernoulli(), 2), np.float32(ROWS > 0), "components.probability", [[0.5, 1.5], [0.1, 0.2]]),
        *("between 0 and 1", "1.5", "(0, 1)"),
    ),
    "weights that sum to 0.9": (Mixture(Normal(), 2), ROWS, "weights", [0.5, 0.4], "sum to 1", "0.9"),
    "a covariance with a negative eigenvalue": (
        *(Mixture(Normal(), 2), ROWS, "components.covariance", [np.eye(2), [[1.0, 2.0], [2.0, 1.0]]]),
        *("positive semi-definite", "eigenvalue of -1", "index 1"),
    ),
    "a covariance that is not symmetric": (
        *(Mixture(Normal("tied"), 2), ROWS, "components.covariance", [[1.0, 0.5], [0.0, 1.0]], "symmetric"),
    ),
    "a negative variance": (
        *(Mixture(Normal("diag"), 2), ROWS, "components.covariance", [[1.0, 1.0], [-2.0, 1.0]]),
        *("at least 0", "-2", "(1, 0)"),
    ),
    "a negative rate": (Mixture(Poisson(), 2), COUNTS, "components.rate", [[1.0, 1.0], [-1.0, 1.0]], "at least 0"),
    "a negative shape": (Mixture(Gamma(), 2), COUNTS + 1, "components.shape", [[-1.0, 1.0], [1.0, 1.0]], "at least 0"),
    "moves that sum to 1.1": (HMM(Normal(), 2), ROWS, "transition", [[0.6, 0.5], [0.5, 0.5]], "sum to 1", "1.1"),
    "degrees of freedom of -1": (
        *(Mixture(StudentT(), 2), ROWS, "components.degrees_of_freedom", [4.0, -1.0], "at least 0", "-1", "index 1"),
    ),
    "a direction of length 2": (
        *(Mixture(VonMisesFisher(), 2), ROWS / np.linalg.norm(ROWS, axis=1)[:, None]),
        *("components.mean_direction", [[1.0, 0.0], [0.0, 2.0]], "length 1", "2"),
    ),
    "values that sum to 0.5": (
        *(Mixture(Categorical(5), 1), COUNTS, "components.probability", np.full((1, 2, 5), 0.1), "sum to 1", "0.5"),
    ),
    "a residual variance of -1": (
        *(Mixture(LinearRegression(), 2), (ROWS, ROWS[:, 0]), "components.variance", [1.0, -1.0], "at least 0"),
    ),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_values_that_cannot_be_are_refused_with_what_came(case):
    model, x, name, value, *parts = BY_HAND[case]
    *outer, last = name.split(".")
    params = start(model, x)
    inner = getattr(params, outer[0]) if outer else params
    inner = dataclasses.replace(inner, **{last: np.asarray(value, np.float32)})
    params = dataclasses.replace(params, **{outer[0]: inner}) if outer else inner
    message = refusal(lambda: em_fit(model, params, x))
    assert message.startswith(f"params.{name} must")
    for part in parts:
        assert part in message, message


def test_boundaries_are_inside():
    x = np.float32(ROWS > 0)
    model = Mixture(Bernoulli(), 2)
    good = start(model, x)
    edge = dataclasses.replace(good.components, probability=np.array([[0.0, 1.0], [0.5, 0.5]]))
    params = dataclasses.replace(good, weights=np.array([1.0, 0.0]), components=edge)
    parameters.check("params", model, params, x)
    singular = np.tile(np.ones((2, 2), np.float32), (2, 1, 1))
    normal = start(Mixture(Normal(), 2), ROWS)
    normal = dataclasses.replace(normal, components=dataclasses.replace(normal.components, covariance=singular))
    parameters.check("params", Mixture(Normal(), 2), normal, ROWS)


def test_another_number_of_components_is_refused_where_no_data_are_needed_too():
    three, two = start(Mixture(Normal(), 3), ROWS), Mixture(Normal(), 2)
    for call in (
        lambda: bic(two, three, ROWS),
        lambda: two.num_parameters(three),
        lambda: two.sample(KEY, three, 4),
        lambda: HMM(Normal(), 2).num_parameters(start(HMM(Normal(), 3), ROWS)),
        lambda: HMM(Normal(), 2).sample(KEY, start(HMM(Normal(), 3), ROWS), 4),
        lambda: KMeans(2).num_parameters(start(KMeans(3), ROWS)),
    ):
        assert refusal(call).startswith("params.")
    mixed = dataclasses.replace(start(two, ROWS), components=three.components)
    assert refusal(lambda: bic(two, mixed, ROWS)).startswith("params.components.mean must have shape (2, 2)")


def test_a_function_that_makes_starts_of_another_shape_is_refused():
    def init(key, x, weights):
        return Mixture(Normal(), 3).init(key, x, weights)

    message = refusal(lambda: fit_restarts(Mixture(Normal(), 2), KEY, ROWS, init=init, num_restarts=2))
    assert message.startswith("init(key, x, weights).weights must have shape (2,)")


def test_parameters_of_a_model_from_functions_are_its_own_affair():
    model = from_functions(lambda mean, x: {"sum": x.sum(), "rows": x.size}, lambda stats: stats["sum"] / stats["rows"])
    em_fit(model, jnp.asarray(0.0), ROWS[:, 0], max_steps=1)


def test_a_key_missing_from_a_dict_of_parameters_is_named():
    model = Mixture(Product({"a": Normal("diag"), "b": Bernoulli()}), 2)
    x = {"a": ROWS, "b": np.float32(ROWS > 0)}
    good = start(model, x)
    missing = dataclasses.replace(good, components={"a": good.components["a"]})
    assert refusal(lambda: em_fit(model, missing, x)).startswith("params.components must be a dict with ['a', 'b']")


def test_looking_at_a_start_compiles_nothing_and_is_traced_once(caplog):
    model = Mixture(Fixed(Normal(), {"mean": jnp.zeros((2, 2))}), 2)
    good = start(model, ROWS)
    parameters.check("params", model, good, ROWS)
    with jax.log_compiles():
        parameters.check("params", model, good, ROWS[:7])
    assert caplog.records == []


@pytest.mark.parametrize("name", ["full", "bernoulli", "poisson, exposure, prior", "kmeans", "hmm", "linear system"])
def test_rows_to_predict_are_refused_as_rows_to_fit_are(name):
    model, x = MODELS[name]()
    good = start(model, x)

    class DataFrame:
        pass

    for bad in (DataFrame(), "text", None):
        fit = refusal(lambda bad=bad: em_fit(model, good, bad))
        for door in ("log_prob", "posterior", "predict"):
            if hasattr(model, door):
                assert refusal(lambda bad=bad, door=door: getattr(model, door)(good, bad)) == fit


def test_one_row_with_a_missing_entry_can_be_predicted():
    model = Mixture(Normal("diag"), 2)
    good = start(model, ROWS)
    shares = model.posterior(good, np.array([[np.nan, 1.0]], np.float32))
    np.testing.assert_allclose(shares, 0.5)
    chain = HMM(Normal("diag"), 2)
    steps = Sequences(np.full((1, 3, 2), np.nan, np.float32))
    np.testing.assert_allclose(chain.posterior(start(chain, ROWS), steps)[0], 0.5)
