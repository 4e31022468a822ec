"""What mixtures share: a categorical latent a row; mixing weights and components are their two parts.

The functions of this file are methods of models with `parts` ("weights" and "components"), `family` and
`num_components`, which take them in groups, each in the order in which it stands at the end of this file.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from .. import checks, latents, numerics, parameters, seeding, tree
from ..data import allowed, as_labelled, seen_by, split
from ..latents import Exact, categorical
from ..latents.categorical import CategoricalPosterior
from ..protocols import Data, Params, Stats
from ..record import record
from ..slots import Expect


@record
class MixtureParams:
    """Parameters of a mixture of K components.

    weights: (K,), on the simplex; (K + 1,) where the family adds a component of its own, as `Background` does, whose
        weight comes last. Of a gate: its parameters.
    components: the family's parameters, component axis first.
    """

    weights: jax.Array
    components: Params


@record
class MixtureStats:
    """Expected sufficient statistics of a mixture.

    weights: those of the mixing weights, the expected number of rows of each component (K,), or those of a gate.
    components: those of the family, whose `count` (K,) is the expected number of rows too.
    loglik: sum_n w_n log p(x_n), at the parameters of the E-step.
    """

    weights: Stats
    components: Stats
    loglik: jax.Array

    @property
    def counts(self) -> jax.Array:
        """Expected number of rows of each component: (K,)."""
        return self.components.count


@seeding.start(*seeding.METHODS)
@functools.partial(jax.jit, static_argnames="method")
def init(self: Any, key: jax.Array, x: Data, weights: jax.Array | None = None, *, method: str = "k-means++") -> Params:
    """A random start (pure in `key`, so `vmap` over keys gives many).

    method: "k-means++" and "random_rows" give every row to its nearest seed, columns standardised;
        "random_responsibilities" draws them uniformly from the simplex, the same for rows near to each other. A tenth
        of every row is then spread over all components.

    Rows of weight 0 are never seeds; a component with labelled rows is seeded by one of them.
    """
    x, weights = tree.present(tree.one_precision(x), weights)
    members = seeding.membership(key, self.family, x, weights, self.num_components, method)
    return seeding.estimated(self, x, members, weights, seeding.SMOOTHING)


def infer(self: Any, params: MixtureParams, x: Data, expect: Expect = Exact()) -> CategoricalPosterior:
    """The posterior over components of every row; its `evidence` is log p(x_n), (N,)."""
    return categorical.infer(self.log_joint(params, x), expect)


def statistics(
    self: Any, params: MixtureParams, x: Data, posterior: CategoricalPosterior, weights: jax.Array | None = None
) -> MixtureStats:
    """Statistics sum_n w_n r_kn t(x_n) under any posterior r; loglik is the sum of its evidence."""
    rows = split(x)[0]
    params = tree.no_whole_numbers(params, rows)
    responsibilities, evidence = as_labelled(posterior.responsibilities, x), posterior.evidence
    if weights is not None:
        weights = weights.astype(evidence.dtype)
        # What a row of weight 0 holds may leave its responsibilities NaN.
        responsibilities = jnp.where(weights[None] > 0, responsibilities * weights[None], 0)
    parts = self.parts
    return MixtureStats(
        weights=parts["weights"].stats(params.weights, rows, responsibilities),
        components=parts["components"].stats(params.components, seen_by("components", rows), responsibilities),
        loglik=numerics.weighted_sum(evidence, weights),
    )


def log_joint(self: Any, params: MixtureParams, x: Data) -> jax.Array:
    """log p(component k, x_n): (K, N); -inf for all components but its own where a row is labelled."""
    parameters.shapes("params", self, params, x)
    rows, labels = split(x)
    params, parts = tree.no_whole_numbers(params, rows), self.parts
    joint = parts["weights"].log_prob(params.weights, rows)
    joint = joint + parts["components"].log_prob(params.components, seen_by("components", rows))
    return joint if labels is None else jnp.where(allowed(labels, joint.shape[0]), joint, -jnp.inf)


def check(self: Any, x: Data, weights: jax.Array | None = None) -> None:
    """Raise ValueError or TypeError for bad data, by name. Under jit only shapes are looked at."""
    checks.complete_family(self.family)
    inside, labels = split(checks.present(x, weights))
    self.parts["weights"].check(inside)
    self.family.check(seen_by("components", inside))
    rows = tree.num_rows(x)
    checks.row_weights(weights, rows)
    checks.enough_rows(rows, weights, self.num_components)
    if labels is not None:
        checks.labels("labels", labels, rows, self.num_weights)


def params_like(self: Any, x: Data) -> MixtureParams:
    """The shapes that parameters have for such data."""
    rows, counts = split(x)[0], self.counts
    return self.params_of(
        {name: seeding.params_like(part, seen_by(name, rows), counts[name]) for name, part in self.parts.items()}
    )


def floats_per_row(self: Any, params: MixtureParams, x: Data) -> int:
    """Temporaries of an E-step, in numbers a row."""
    parts = self.parts
    own = parts["weights"].floats_per_row(params.weights) + parts["components"].floats_per_row(params.components)
    return 2 * self.num_weights + own


def shared_floats_per_row(self: Any, params: MixtureParams, x: Data) -> int:
    """The part of `floats_per_row` that restarts on the same rows share."""
    return self.parts["components"].shared_floats_per_row(params.components)


def num_weights(self: Any) -> int:
    """Components, and those that the family adds by itself."""
    return self.num_components + self.parts["components"].extra_components


def counts(self: Any) -> dict[str, int]:
    """The number of components of every part."""
    return {"weights": self.num_weights, "components": self.num_components}


start = init, seeding.params_from_responsibilities
posteriors = infer, statistics, latents.e_step, log_joint, categorical.stats
questions = (
    categorical.log_prob,
    categorical.predictive,
    categorical.responsibilities,
    categorical.likeliest,
)
data = check, params_like
sizes = floats_per_row, shared_floats_per_row, property(num_weights), property(counts)
