"""One categorical latent a row: the posterior over components, and densities, labels and samples at given parameters.

The latter are methods of a `LabelModel`, or of a `MixtureModel`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from .. import checks, numerics, parameters, tree
from ..data import Gated, seen_by, split
from ..protocols import Data, Family, Gate, Model, Params, Stats
from ..record import record
from ..slots import Expect
from .expect import Exact, Hard, Sample


class LabelModel(Model, Protocol):
    """A model whose latent is one label a row."""

    def log_joint(self, params: Params, x: Data) -> jax.Array:
        """log p(z_n = k, x_n): (K, N)."""
        ...


class MixtureModel(LabelModel, Protocol):
    """A label model whose labels are the components of a family."""

    @property
    def family(self) -> Family: ...

    @property
    def gate(self) -> Gate | None:
        """The model of the weights given a row's features; None where all rows have the same weights."""
        ...

    @property
    def parts(self) -> Mapping[str, Any]: ...

    def check_count(self, params: Params) -> None:
        """Raise for parameters of another number of components."""
        ...

    def sample_with_labels(self, key: jax.Array, params: Params, n: int, **features: Any) -> tuple[Data, jax.Array]: ...


@record
class CategoricalPosterior:
    """A distribution over the components for every row.

    responsibilities r (K, N): p(z_n = k | x_n), or any other q(z_n = k).
    evidence (N,): log p(x_n) at the parameters that they were inferred with.
    """

    responsibilities: jax.Array
    evidence: jax.Array

    @property
    def shares(self) -> jax.Array:
        """The responsibilities, labels last: (N, K)."""
        return self.responsibilities.T

    def relabelled(self, order: jax.Array) -> "CategoricalPosterior":
        """The same with its component order[k] as component k."""
        return dataclasses.replace(self, responsibilities=self.responsibilities[order])

    def entropy(self, weights: jax.Array | None = None) -> jax.Array:
        """Entropy in nats, summed over rows x weights (N,)."""
        return -self._expected_log(self, weights)

    def kl(self, q: "CategoricalPosterior", weights: jax.Array | None = None) -> jax.Array:
        """KL(q ‖ this) in nats, summed over rows x weights (N,)."""
        return q._expected_log(q, weights) - self._expected_log(q, weights)

    def given(self, q: Any) -> "CategoricalPosterior":
        """What a user gave as distribution of the same latents: an array (N, K), or a posterior of the model.

        Raises ValueError where it is none.
        """
        count, rows = self.responsibilities.shape
        if not isinstance(q, CategoricalPosterior):
            q = checks.array("q", q)
            if q.ndim != 2 or q.shape[0] != rows:
                raise ValueError(
                    f"q must have shape (N, K), a distribution over latents for each of {rows} rows; got {q.shape}"
                )
            if checks.is_concrete(q):
                checks.distributions("q", np.asarray(q))
            q = CategoricalPosterior(responsibilities=q.T, evidence=self.evidence)
        if q.responsibilities.shape != (count, rows):
            raise ValueError(
                f"q must have shape {(rows, count)}, as the posterior has; got {q.responsibilities.T.shape}"
            )
        return dataclasses.replace(q, evidence=self.evidence)

    def _expected_log(self, q: "CategoricalPosterior", weights: jax.Array | None) -> jax.Array:
        """E_q[log r], 0 log 0 = 0."""
        used = q.responsibilities > 0
        logs = numerics.safe_log(jnp.where(used, self.responsibilities, 1))
        return numerics.weighted_sum(jnp.sum(jnp.where(used, q.responsibilities * logs, 0), axis=0), weights)


def infer(log_joint: jax.Array, expect: Expect) -> CategoricalPosterior:
    """The posterior from log p(z = k, x_n) (K, N), by Bayes' rule.

    Under Hard() the responsibilities are 0 or 1, and in place of log p(x_n) stands max_k log p(k, x_n);
    under Exact(T) they are tempered, and there stands T log sum_k p(k, x_n)^(1/T); under Sample(n)
    they are shares of n draws. Raises TypeError for an `expect` that a categorical latent does not know.
    """
    if isinstance(expect, Exact):
        if expect.temperature is None:
            return _posterior(*numerics.normalize(log_joint))
        temperature = jnp.asarray(expect.temperature, log_joint.dtype)
        tempered, evidence = numerics.normalize(log_joint / temperature)
        return _posterior(tempered, temperature * evidence)
    if isinstance(expect, Hard):
        return _posterior(*numerics.first_largest(log_joint))
    if isinstance(expect, Sample):
        exact, evidence = numerics.normalize(log_joint)
        return _posterior(_draw(exact, expect), evidence)
    raise TypeError(f"expect must be Exact(), Hard() or Sample() for a categorical latent; got {expect!r}")


def _posterior(responsibilities: jax.Array, evidence: jax.Array) -> CategoricalPosterior:
    return CategoricalPosterior(responsibilities=responsibilities, evidence=evidence)


def _draw(responsibilities: jax.Array, expect: Sample) -> jax.Array:
    """Shares of the components (K, N) among draws from responsibilities (K, N); an impossible row stays 0."""
    key = expect.random_key()
    upto = jnp.cumsum(responsibilities, axis=0)
    total = upto[-1]

    def draw(index: jax.Array, below: jax.Array) -> jax.Array:
        level = total * jax.random.uniform(jax.random.fold_in(key, index), total.shape, total.dtype)
        return below + (level[None] < upto)

    used = expect.num_samples if expect.used is None else expect.used
    # below[k, n] counts the draws of row n in components 0 to k.
    below = jax.lax.fori_loop(0, used, draw, jnp.zeros_like(upto))
    return jnp.diff(below, axis=0, prepend=0) / jnp.asarray(used, total.dtype)


def stats(
    model: LabelModel, params: Params, x: Data, responsibilities: jax.Array, weights: jax.Array | None = None
) -> Stats:
    """The statistics under any responsibilities q (N, K); loglik stays that of `params`.

    q_function of them plus the entropy of q is the lower bound of Neal & Hinton (1998).
    """
    x = checks.present(x, weights)
    q = dataclasses.replace(model.infer(params, x), responsibilities=responsibilities.T)
    return model.statistics(params, x, q, weights)


@parameters.at_rows
@jax.jit
def log_prob(model: LabelModel, params: Params, x: Data) -> jax.Array:
    """Marginal log-density log p(x_n) of each row, log p(x_n, label_n) of labelled ones: (N,)."""
    return _by_rows(model, params, x, lambda rows: numerics.normalize(model.log_joint(params, rows))[1])


@parameters.at_rows
@jax.jit
def predictive(model: MixtureModel, params: Params, x: Data) -> jax.Array:
    """Log-density (N,) of every row, expected over the distributions of the parameters where these have some."""
    weights, components = model.parts["weights"], model.parts["components"]

    def of(x: Data) -> jax.Array:
        rows = split(x)[0]
        joint = weights.predictive(params.weights, rows) + components.predictive(
            params.components, seen_by("components", rows)
        )
        return numerics.normalize(joint)[1]

    return _by_rows(model, params, x, of)


@parameters.at_rows
@jax.jit
def responsibilities(model: LabelModel, params: Params, x: Data) -> jax.Array:
    """Responsibilities p(component k | x_n): (N, K)."""
    return _by_rows(model, params, x, lambda rows: numerics.normalize(model.log_joint(params, rows))[0].T)


@parameters.at_rows
@jax.jit
def likeliest(model: LabelModel, params: Params, x: Data) -> jax.Array:
    """The most probable component of each row: (N,), whole numbers."""
    return _by_rows(model, params, x, lambda rows: jnp.argmax(model.log_joint(params, rows), axis=0))


def _by_rows(model: LabelModel, params: Params, x: Data, function: Callable) -> jax.Array:
    size = tree.rows_per_block(model.floats_per_row(params, x), tree.float_dtype(x))
    return tree.map_over_blocks(function, x, size)


def sample(
    model: MixtureModel,
    key: jax.Array,
    params: Params,
    n: int,
    *,
    features: jax.Array | None = None,
    gate_features: jax.Array | None = None,
) -> Data:
    """n rows from the mixture. `sample_with_labels` also returns their components, and explains the features."""
    return model.sample_with_labels(key, params, n, features=features, gate_features=gate_features)[0]


def sample_with_labels(
    model: MixtureModel,
    key: jax.Array,
    params: Params,
    n: int,
    *,
    features: jax.Array | None = None,
    gate_features: jax.Array | None = None,
) -> tuple[Data, jax.Array]:
    """n rows from the mixture, and the component (n,) that each came from.

    features: (n, P), the regressors of components that are regressions, and the features of a gate.
    gate_features: those of a gate that has its own.
    """
    checks.positive_integer("n", n)
    model.check_count(params)
    params = tree.no_whole_numbers(params, params)
    key = checks.random_key(key)
    of_gate = features if gate_features is None else gate_features
    if model.gate is None:
        log_weights = numerics.safe_log(params.weights)
    elif of_gate is None:
        raise TypeError(
            "a mixture with a gate has components that depend on the row: it cannot be sampled from without features; "
            "call sample(key, params, n, features=...), or gate_features=... where the gate has its own"
        )
    else:
        log_weights = model.gate.log_prob(params.weights, Gated(None, checks.columns("features", of_gate))).T
    given = {} if features is None else {"features": features}
    return drawn_rows(model.family, key, log_weights, params.components, n, **given)


def drawn_rows(
    family: Family, key: jax.Array, log_weights: jax.Array, params: Params, n: int, **given: Any
) -> tuple[Data, jax.Array]:
    """n rows and their components, from log-weights (K,) or of every row (n, K), and the components' parameters."""
    key_labels, key_rows = jax.random.split(key)
    labels = jax.random.categorical(key_labels, log_weights, shape=(n,))
    return family.sample(key_rows, params, labels, **given), labels
