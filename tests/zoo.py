"""Every model of the library, one line each: name -> (model, data). All laws run over all of them."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxem import (
    HMM,
    PPCA,
    Background,
    Bernoulli,
    Beta,
    Binomial,
    Categorical,
    CensoredNormal,
    CensoredRegression,
    Dirichlet,
    Exponential,
    FactorAnalysis,
    Fixed,
    Gamma,
    GammaPrior,
    Gated,
    GroupedRows,
    HelmholtzMachine,
    ItemResponse,
    KMeans,
    Labelled,
    LinearGaussianSSM,
    LinearMixedModel,
    LinearRegression,
    LogisticRegression,
    LowRankNormal,
    Mixture,
    MixtureOfExperts,
    Moments,
    Multinomial,
    MultivariateNormal,
    NegativeBinomial,
    NoisyNormal,
    Normal,
    NormalInverseGamma,
    NormalInverseWishart,
    Poisson,
    PoissonRegression,
    ProbitRegression,
    Product,
    Sequences,
    SoftmaxGate,
    StudentT,
    StudentTLinear,
    StudentTRegression,
    Tied,
    TwoLevelGate,
    Variational,
    VariationalMixture,
    VonMisesFisher,
    ZeroInflated,
    bounding_volume,
    default_prior,
    from_log_joint,
    group_rows,
    pack_sequences,
    pseudo_rows,
)
from jaxem.capabilities import states
from jaxem.record import fields, record

_rng = np.random.default_rng(7)
_labels = _rng.integers(0, 3, 40)
_points = np.array([[0.0, 0.0], [4.0, 1.0], [1.0, 5.0]])[_labels] + _rng.normal(size=(40, 2)) @ [[1.0, 0.4], [0.0, 0.7]]
_many = np.hstack([_points, _rng.normal(size=(40, 3)) + _labels[:, None]])
_yes = (_rng.random((40, 4)) < np.array([[0.2], [0.5], [0.8]])[_labels]).astype(np.int32)
_trials = _rng.integers(3, 12, (40, 2))
_successes = _rng.binomial(_trials, np.array([0.2, 0.5, 0.8])[_labels][:, None])
_values = np.stack([(_rng.random(40) * n * (1 + _labels) / 3).astype(np.int32) for n in (3, 2, 4)], axis=1)
_counts = _rng.poisson(np.array([[1.0, 6.0], [4.0, 2.0], [9.0, 5.0]])[_labels])
_words = _rng.multinomial(12, np.array([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0.1, 0.7, 0.2]])[_labels])
_waits = _rng.exponential(np.array([[1.0, 6.0], [4.0, 2.0], [9.0, 0.5]])[_labels])
_exposure = _rng.uniform(0.5, 2.0, 40)


_shapes, _scales = np.array([[2.0, 9.0], [5.0, 1.0], [0.6, 4.0]]), np.array([[1.0, 0.5], [2.0, 3.0], [1.0, 4.0]])
_sizes = _rng.gamma(_shapes[_labels], _scales[_labels])
_visits = _rng.negative_binomial(_shapes[_labels], np.array([[0.3, 0.5], [0.6, 0.2], [0.5, 0.1]])[_labels])
_directions = np.eye(3)[_labels] + 0.4 * _rng.normal(size=(40, 3))
_directions /= np.linalg.norm(_directions, axis=1, keepdims=True)
_circle = np.array([[1.0, 0.0], [-1.0, 0.5], [0.0, -2.0]])[_labels] + 0.5 * _rng.normal(size=(40, 2))
_circle /= np.linalg.norm(_circle, axis=1, keepdims=True)


def _holes(x: np.ndarray) -> np.ndarray:
    """The data with an entry in eight missing, and one row without any."""
    holes = np.random.default_rng(3).random(x.shape) < 0.125
    holes[2] = True
    return np.where(holes, np.nan if x.dtype.kind == "f" else -1, x)


def _known(x: np.ndarray) -> Labelled:
    """The data with every third label known."""
    return Labelled(x, np.where(np.arange(40) % 3 == 0, _labels, -1))


_zeros = np.where(_rng.random(40) < 0.3, 0, _counts[:, 1])
_design = _rng.normal(size=(40, 2))
_response = np.where(_labels == 0, 1.0, -1.0) * (_design @ [2.0, 1.0]) + 0.5 * _rng.normal(size=40)
_binary = (_response + _rng.normal(size=40) > 0).astype(np.int32)


def _bounds(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What may be known of values: two in five exactly, others from one side or to a whole number, and one missing."""
    kind = np.arange(40) % 5
    lower = np.select([kind < 2, kind == 2, kind == 3], [y, -np.inf, y - 0.3], np.floor(y))
    upper = np.select([kind < 2, kind == 2, kind == 3], [y, y + 0.3, np.inf], np.floor(y) + 1)
    lower[6] = upper[6] = np.nan
    return lower, upper


_censored = (_design, *_bounds(_response))
_mixed = {"size": _holes(_points), "smoker": _holes(_yes)}
_noise = np.random.default_rng(9).uniform(0.2, 1.0, (40, 2))


def _strict(columns: int) -> NormalInverseWishart:
    return NormalInverseWishart(
        mean=jnp.full(columns, 0.5), shrinkage=2.0, degrees_of_freedom=columns + 4.0, scale=jnp.eye(columns)
    )


_diagonal = NormalInverseWishart(mean=np.full(2, 0.5), shrinkage=2.0, degrees_of_freedom=3.0, scale=np.ones(2))
_line = NormalInverseGamma(mean=np.zeros(3), precision=0.5, shape=2.0, rate=1.0)

# Eight sequences of six steps, an even number so that halves have one shape; two states that take turns.
_states = (np.arange(6) // 2 + _rng.integers(0, 2, (8, 1))) % 2
_paths = np.array([[0.0, 0.0], [2.0, 1.0]])[_states] + _rng.normal(size=(8, 6, 2))
_events = _rng.poisson(np.array([2.0, 7.0])[_states])[..., None]
_lengths = _rng.integers(3, 7, 8)


def _gaps(x: np.ndarray) -> np.ndarray:
    """The data with whole steps missing, the first of a sequence among them."""
    return np.where(np.random.default_rng(5).random(x.shape[:2])[..., None] < 0.2, np.nan, x)


def _level(columns: int) -> np.ndarray:
    """Eight sequences of six steps that follow one slow state."""
    return np.cumsum(_rng.normal(size=(8, 6, 1)), axis=1) / 2 + _rng.normal(size=(8, 6, columns))


@record
class _Rates:
    share: jax.Array
    log_rate: jax.Array


def _poissons(params: _Rates, x: jax.Array) -> jax.Array:
    """log p(x_n, z_n = k) of a mixture of Poisson distributions, up to what does not depend on parameters."""
    share, log_rate = jax.nn.log_softmax(params.share)[:, None], params.log_rate[:, None]
    return share + log_rate * x[None] - jnp.exp(log_rate)


def _rates_drawn(key: jax.Array, x: jax.Array, weights: jax.Array | None = None) -> _Rates:
    return _Rates(share=jnp.zeros(2), log_rate=1.0 + jax.random.normal(key, (2,)))


_series, _inputs = _level(3), _rng.normal(size=(8, 6, 2))


def _held_system() -> Fixed:
    """A local level, its start known, with a prior."""
    params = LinearGaussianSSM(1).init(jax.random.key(0), _series)
    prior = LinearGaussianSSM(1).pseudo_steps(params, 5.0, 2.0)
    held = {"dynamics": 1.0, "emission": np.ones((3, 1)), "initial_mean": 0.0, "initial_covariance": 10.0}
    return Fixed(LinearGaussianSSM(1, prior=prior), jax.tree.map(jnp.asarray, held))


def _packed(x: np.ndarray) -> Sequences:
    """Sixteen sequences, two in every row."""
    parts = [part for row, length in zip(x, _lengths, strict=True) for part in (row[:length], row[length - 3 :])]
    return pack_sequences(parts, 8)


def _grouped(x: np.ndarray) -> Moments:
    """Moments of forty groups of eight rows."""
    groups = x[np.random.default_rng(9).integers(0, 40, (40, 8))]
    apart = groups - groups.mean(axis=1, keepdims=True)
    return Moments(groups.mean(axis=1), np.einsum("gni,gnj->gij", apart, apart) / 8, np.full(40, 8.0))


# Op by op it would be a hundred programs.
_pseudo_rows = jax.jit(pseudo_rows)


def _families() -> GroupedRows:
    """Rows of forty groups, of one to four rows each, with intercepts and slopes of their own."""
    rng = np.random.default_rng(11)
    numbers = np.repeat(np.arange(40), rng.integers(1, 5, 40))
    features = np.column_stack([np.ones(len(numbers)), rng.normal(size=len(numbers))])
    effects = rng.normal(size=(40, 2))[numbers]
    response = features @ [1.0, 2.0] + np.sum(features * effects, axis=1) + rng.normal(size=len(numbers))
    return group_rows((features, features, response), numbers)


class _Lazy(dict):
    """A dict of functions that gives what they return."""

    def __getitem__(self, name: str) -> tuple:
        return super().__getitem__(name)()


def zoo() -> dict:
    """Each entry is built when it is asked for, so that the arrays inside have the precision that is enabled."""
    return _Lazy(
        {
            "full": lambda: (Mixture(Normal("full"), 3), _points),
            "tied": lambda: (Mixture(Normal("tied"), 3), _points),
            "diag": lambda: (Mixture(Normal("diag"), 3), _points),
            "spherical": lambda: (Mixture(Normal("spherical"), 3), _points),
            "full, expanded": lambda: (Mixture(Normal("full", form="expanded"), 3), _points),
            "diag, expanded": lambda: (Mixture(Normal("diag", form="expanded"), 3), _points),
            "full, five columns": lambda: (Mixture(Normal("full"), 2), _many),
            "diag, five columns": lambda: (Mixture(Normal("diag"), 2), _many),
            "one column": lambda: (Mixture(Normal(), 2), _points[:, 0]),
            "one component": lambda: (Mixture(Normal(), 1), _points),
            "full, prior": lambda: (Mixture(Normal(prior=_strict(2)), 3, prior=Dirichlet(2.0)), _points),
            "tied, prior": lambda: (Mixture(Normal("tied", prior=_strict(2)), 3), _points),
            "diag, prior": lambda: (
                Mixture(Normal("diag", prior=default_prior(jnp.asarray(_points), 3, "diag")), 3),
                _points,
            ),
            "tied diagonal": lambda: (Mixture(Normal("EEI"), 3), _points),
            "tied spherical, missing": lambda: (Mixture(Normal("EII"), 2), _holes(_points)),
            "diag, missing": lambda: (Mixture(Normal("diag"), 2), _holes(_many)),
            "spherical, prior, missing": lambda: (
                Mixture(Normal("spherical", prior=default_prior(jnp.asarray(_points), 2, "spherical")), 2),
                _holes(_points),
            ),
            "full, missing": lambda: (Mixture(Normal("full"), 2), _holes(_many)),
            "tied, prior, missing": lambda: (Mixture(Normal("tied", prior=_strict(2)), 3), _holes(_points)),
            "noisy normal": lambda: (Mixture(NoisyNormal(), 2), (_holes(_points), _noise)),
            "noisy normal, diag, correlated noise": lambda: (
                Mixture(NoisyNormal("diag"), 2),
                (_points, _noise[:, :, None] * np.array([[1.0, 0.5], [0.5, 1.0]]) * _noise[:, None]),
            ),
            "labelled": lambda: (Mixture(Normal("full"), 3), _known(_points)),
            "bernoulli": lambda: (Mixture(Bernoulli(), 3), _yes),
            "bernoulli, prior, missing": lambda: (Mixture(Bernoulli(prior=Beta(2.0, 3.0)), 2), _holes(_yes)),
            "binomial": lambda: (Mixture(Binomial(12), 3), _successes),
            "binomial, trials by row": lambda: (Mixture(Binomial(), 2), (_holes(_successes), _trials)),
            "categorical": lambda: (Mixture(Categorical((3, 2, 4)), 3), _values),
            "categorical, prior, missing": lambda: (Mixture(Categorical(4, prior=Dirichlet(1.5)), 2), _holes(_values)),
            "multinomial": lambda: (Mixture(Multinomial(), 3), _words),
            "poisson": lambda: (Mixture(Poisson(), 3), _counts),
            "poisson, exposure, prior": lambda: (
                Mixture(Poisson(prior=GammaPrior(2.0, 1.0)), 2),
                (_holes(_counts), _exposure),
            ),
            "student t": lambda: (Mixture(StudentT(), 2), _points),
            "student t, held, tied": lambda: (Mixture(StudentT("tied", 4.0), 2), _points),
            "student t, diag, prior": lambda: (
                Mixture(StudentT("diag", prior=_pseudo_rows(StudentT("diag"), jnp.asarray(_points), 3.0)), 2),
                _points,
            ),
            "zero-inflated poisson": lambda: (Mixture(ZeroInflated(Poisson(), prior=Beta(2.0, 3.0)), 2), _zeros),
            "linear regression": lambda: (Mixture(LinearRegression(), 2), (_design, _response)),
            "linear regression, prior": lambda: (
                Mixture(LinearRegression(prior=_pseudo_rows(LinearRegression(), (_design, _response), 3.0)), 2),
                (_design, _response),
            ),
            "censored normal": lambda: (Mixture(CensoredNormal(), 2), _bounds(_points[:, 0])),
            "censored regression, prior": lambda: (
                Mixture(CensoredRegression(prior=_pseudo_rows(CensoredRegression(), _censored, 3.0)), 2),
                _censored,
            ),
            "censored regression, shared": lambda: (Mixture(Tied(CensoredRegression(), "variance"), 2), _censored),
            "logistic regression": lambda: (Mixture(LogisticRegression(ridge=0.5), 2), (_design, _binary)),
            "poisson regression": lambda: (Mixture(PoissonRegression(ridge=0.5), 2), (_design, _counts[:, 0])),
            "probit regression": lambda: (ProbitRegression(ridge=0.5), (_design, _binary)),
            "student t regression": lambda: (StudentTRegression(), (_design, _response)),
            "student t regression, held, mixture": lambda: (Mixture(StudentTLinear(4.0), 2), (_design, _response)),
            "experts": lambda: (MixtureOfExperts(LinearRegression(), 2), (_design, _response)),
            "experts, two levels, own features": lambda: (
                MixtureOfExperts(
                    LogisticRegression(ridge=0.5), 4, gate=TwoLevelGate(num_groups=2, gate=SoftmaxGate(ridge=0.5))
                ),
                Gated((_design, _binary), _points),
            ),
            "bernoulli, concomitant": lambda: (
                Mixture(Bernoulli(), 2, gate=SoftmaxGate(ridge=0.1)),
                Gated(_yes, _points[:, 0]),
            ),
            "product": lambda: (Mixture(Product({"size": Normal("diag"), "smoker": Bernoulli()}), 2), _mixed),
            "background": lambda: (
                Mixture(Background(Normal("full"), bounding_volume(jnp.asarray(_points))), 2),
                _points,
            ),
            "binomial, weights held": lambda: (
                Fixed(Mixture(Binomial(12), 3), {"weights": jnp.array([0.2, 0.3, 0.5])}),
                _successes,
            ),
            "fixed means": lambda: (
                Mixture(Fixed(Normal(), {"mean": jnp.array([[0.0, 0.0], [3.0, 3.0]])}), 2),
                _points,
            ),
            "student t, shared": lambda: (Mixture(Tied(StudentT(), "degrees_of_freedom"), 2), _points),
            "linear regression, shared": lambda: (
                Mixture(Tied(LinearRegression(), "variance"), 2),
                (_design, _response),
            ),
            "gamma": lambda: (Mixture(Gamma(), 3), _sizes),
            "gamma, shape held, missing": lambda: (
                Mixture(Fixed(Gamma(), {"shape": jnp.asarray(2.0)}), 2),
                _holes(_sizes),
            ),
            "negative binomial": lambda: (Mixture(NegativeBinomial(), 2), _holes(_visits)),
            "directions": lambda: (Mixture(VonMisesFisher(), 3), _directions),
            "directions, circle, shared": lambda: (Mixture(Tied(VonMisesFisher(), "concentration"), 3), _circle),
            "factor analysers": lambda: (Mixture(LowRankNormal(2), 2), _many),
            "ppca, shared noise": lambda: (
                Mixture(Tied(LowRankNormal(1, noise="isotropic"), "noise_variance"), 3),
                _points,
            ),
            "factor analysers, shared loadings": lambda: (Mixture(Tied(LowRankNormal(1), "loadings"), 2), _many[:, :4]),
            "variational": lambda: (VariationalMixture(Normal(prior=_strict(2)), 3, 0.5), _holes(_points)),
            "variational, process": lambda: (
                VariationalMixture(
                    Product({"size": Normal("diag", prior=_diagonal), "line": LinearRegression(prior=_line)}),
                    2,
                    process=True,
                ),
                {"size": _holes(_points), "line": (_design, _response)},
            ),
            "kmeans": lambda: (KMeans(3), _points),
            "exponential": lambda: (Mixture(Exponential(), 3), _holes(_waits)),
            "hmm": lambda: (HMM(Normal(), 2), Sequences(_gaps(_paths), _lengths)),
            "hmm, factor analysers": lambda: (HMM(LowRankNormal(1), 2), Sequences(_gaps(_paths), _lengths)),
            "hmm, logarithms": lambda: (HMM(Normal("diag"), 2, form="log"), Sequences(_gaps(_paths), _lengths)),
            "hmm, parallel": lambda: (HMM(Normal("tied"), 2, parallel=True), Sequences(_paths, _lengths)),
            "hmm, missing entries": lambda: (HMM(Normal(), 2), Sequences(_holes(_paths), _lengths)),
            "hmm, packed": lambda: (HMM(Normal("diag"), 2, form="scaled"), _packed(_paths)),
            "hmm, variational": lambda: (
                HMM(Variational(Poisson(prior=GammaPrior(2.0, 1.0))), 2, transition_prior=Dirichlet(2.0)),
                _events,
            ),
            "hmm, priors": lambda: (
                HMM(Poisson(), 2, initial_prior=Dirichlet(2.0), transition_prior=Dirichlet(1 + 3 * jnp.eye(2))),
                _events,
            ),
            "hmm, left to right": lambda: (
                HMM(
                    Normal("spherical"),
                    3,
                    initial_support=np.array([True, True, False]),
                    transition_support=np.triu(np.ones((3, 3), bool)),
                ),
                _paths,
            ),
            "hmm, stationary": lambda: (HMM(Poisson(), 2, stationary=True), _events),
            "linear system": lambda: (LinearGaussianSSM(2, missing=False), _series),
            "linear system, diag, biases": lambda: (
                LinearGaussianSSM(2, covariance="diag", dynamics_bias=True, emission_bias=True, missing=False),
                _series[..., :2],
            ),
            "linear system, inputs, padded": lambda: (
                LinearGaussianSSM(2, covariance="diag", dynamics_inputs=True, emission_inputs=True, emission_bias=True),
                Sequences((_gaps(_series[..., :2]), _inputs), _lengths),
            ),
            "linear system, missing, packed": lambda: (LinearGaussianSSM(2), _packed(_holes(_series))),
            "linear system, held, prior, missing": lambda: (_held_system(), _holes(_series)),
            "multivariate normal, missing": lambda: (MultivariateNormal(), _holes(_many)),
            "multivariate normal, prior, moments": lambda: (MultivariateNormal(prior=_strict(5)), _grouped(_many)),
            "helmholtz machine": lambda: (HelmholtzMachine((1, 1)), _yes),
            "log joint": lambda: (from_log_joint(_poissons, 2, init=_rates_drawn), _counts[:, 0]),
            "factor analysis": lambda: (FactorAnalysis(2, missing=False), _many),
            "factor analysis, missing": lambda: (FactorAnalysis(1), _holes(_many)),
            "factor analysis, moments": lambda: (FactorAnalysis(2), _grouped(_many)),
            "ppca, missing": lambda: (PPCA(2), _holes(_many)),
            "linear mixed model": lambda: (LinearMixedModel(), LinearMixedModel().units(_families())),
            "item response, missing": lambda: (ItemResponse(num_nodes=9), _holes(_yes)),
            "item response, rasch": lambda: (ItemResponse("rasch", num_nodes=9), _yes),
            "item response, one slope": lambda: (ItemResponse("1PL", num_nodes=9), _yes),
            "item response, guessing": lambda: (ItemResponse("3PL", num_nodes=9), _yes),
        }
    )


NAMES = tuple(zoo())


def _kind(model: Any) -> tuple:
    """The classes that a model is made of, statements about it left aside."""
    if isinstance(model, (Fixed, Tied)):
        return _kind(model.inner)
    inside = [value for value in fields(model).values() if isinstance(value, dict) or states(value, "m_step")]
    return (type(model), *map(_kind, inside))


@functools.cache
def first_of_kinds() -> set[str]:
    """The first model of every kind."""
    names: dict[tuple, str] = {}
    for name in NAMES:
        names.setdefault(_kind(zoo()[name][0]), name)
    return set(names.values())


@functools.cache
def firsts_of_classes() -> tuple[str, ...]:
    """Models by which every class of the library is in one: each brings in one more."""
    seen: set[type] = set()
    names = []
    for name in NAMES:
        classes = set(_classes(_kind(zoo()[name][0])))
        if classes - seen:
            names.append(name)
        seen |= classes
    return tuple(names)


def _classes(kind: tuple) -> list[type]:
    return [kind[0], *(each for inside in kind[1:] for each in _classes(inside))]


def quick_start(model: Any) -> dict[str, str]:
    """Where a model has several kinds of starts, the arguments of its `init` for one that is quick to compile."""
    known = inspect.signature(getattr(model, "inner", model).init).parameters
    of = {"family": "random_responsibilities", "num_clusters": "random_rows"}
    quick = [method for name, method in of.items() if states(model, name) and "method" in known]
    return {"method": quick[0]} if quick else {}
