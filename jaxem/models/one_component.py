"""A family as a model: one component, whose parameters have no axis of components."""

from typing import Any

import jax
import jax.numpy as jnp

from .. import capabilities, checks, latents, numerics, parameters, seeding, tree
from ..families import Probit, StudentTLinear
from ..latents import Exact
from ..parts import assembly
from ..protocols import Data, Family, Params, Stats
from ..record import record
from ..slots import Expect


@record
class RowsPosterior:
    """Stands for the posterior of rows' latents: the family computes its moments itself. evidence: (N,), log p(x_n)."""

    evidence: jax.Array


@record
class OneComponentStats:
    """Expected statistics.

    family: the family's statistics, of one component.
    loglik: (), sum_n w_n log p(x_n).
    """

    family: Stats
    loglik: jax.Array


@capabilities.completed("model")
@record(kw_only=False)
class OneComponent:
    """p(x | params) of a family, which is fitted by itself: `ProbitRegression()`, `StudentTRegression()`.

    Parameters are the family's record, without the axis of components that they have in a mixture.
    """

    family: Family

    def __post_init__(self) -> None:
        checks.component_family(self.family)

    @property
    def _part(self) -> Any:
        return capabilities.complete("part", self.family)

    @property
    def parts(self) -> dict[str, Any]:
        """The family alone, with an axis of one component."""
        return {"family": self._part}

    def part_params(self, params: Params) -> dict[str, Params]:
        return {"family": _with_axis(params)}

    def params_of(self, values: dict[str, Params]) -> Params:
        return jax.tree.map(lambda leaf: leaf[0], values["family"])

    part_statistics, with_part_statistics = assembly.by_name[2:]
    m_step, q_function, log_prior, rebase = assembly.surrogate

    @property
    def expands(self) -> bool:
        return self._part.expands

    @property
    def supports(self) -> parameters.Supports:
        return self._part.supports

    def expanded(self, params: Params, stats: OneComponentStats, held: tuple[str, ...] = ()) -> Params:
        """The family's parameter-expanded M-step, from the parameters of its M-step."""
        return self.params_of({"family": self._part.expanded(_with_axis(params), stats.family, held=held)})

    @seeding.start()
    @jax.jit
    def init(self, key: jax.Array, x: Data, weights: jax.Array | None = None) -> Params:
        """The family's pooled start from all rows; nothing is drawn."""
        x, weights = tree.present(tree.one_precision(x), weights)
        return self.params_of({"family": self._part.pooled(x, weights, 1)})

    def infer(self, params: Params, x: Data, expect: Expect = Exact()) -> RowsPosterior:
        """The posterior of the rows' latents; its `evidence` is log p(x_n), (N,)."""
        if not isinstance(expect, Exact) or expect.temperature is not None:
            raise TypeError(f"expect must be Exact() for a family by itself; got {expect!r}")
        parameters.shapes("params", self, params, x)
        return RowsPosterior(evidence=self.family.log_prob(_with_axis(params), x)[0])

    def statistics(
        self, params: Params, x: Data, posterior: RowsPosterior, weights: jax.Array | None = None
    ) -> OneComponentStats:
        """The family's statistics, rows counted by their weights."""
        evidence = posterior.evidence
        each = jnp.ones_like(evidence) if weights is None else jnp.where(weights > 0, weights, 0)
        stats = self.family.stats(_with_axis(params), x, each.astype(evidence.dtype)[None])
        return OneComponentStats(family=stats, loglik=numerics.weighted_sum(evidence, weights))

    e_step = latents.e_step

    def degenerate(self, stats: OneComponentStats, held: tuple[str, ...] = ()) -> jax.Array:
        """(1,): whether the family's component is degenerate."""
        return capabilities.degenerate(self._part, stats.family, held)

    def unconstrain(self, params: Params) -> Any:
        """The family's coordinates, of one component."""
        return self.family.unconstrain(_with_axis(params))

    def constrain(self, theta: Any) -> Params:
        """Inverse of `unconstrain`."""
        return self.params_of({"family": self.family.constrain(theta)})

    @parameters.at_rows
    @jax.jit
    def log_prob(self, params: Params, x: Data) -> jax.Array:
        """log p(x_n): (N,)."""
        return self.infer(params, x).evidence

    def mean(self, params: Params, features: jax.Array) -> jax.Array:
        """E[y | features], of a regression: features (N, P) or (N,) -> (N,)."""
        return self._part.mean(_with_axis(params), checks.columns("features", features))[0]

    def sample(self, key: jax.Array, params: Params, n: int, *, features: jax.Array | None = None) -> Data:
        """n rows; of a regression for given features (n, P)."""
        checks.positive_integer("n", n)
        given = {} if features is None else {"features": features}
        labels = jnp.zeros(n, jnp.int32)
        return self.family.sample(checks.random_key(key), _with_axis(params), labels, **given)

    def num_parameters(self, params: Params) -> int:
        """Free parameters of the family."""
        return self.family.num_parameters(_with_axis(params))

    def check(self, x: Data, weights: jax.Array | None = None) -> None:
        """Raise ValueError or TypeError for bad data, by name. Under jit only shapes are looked at."""
        self.family.check(checks.present(x, weights))
        checks.row_weights(weights, tree.num_rows(x))

    def params_like(self, x: Data) -> Params:
        """The shapes that parameters have for such data."""
        found = seeding.params_like(self.family, x, 1)
        return jax.tree.map(lambda leaf: parameters.like(leaf.shape[1:], leaf.dtype), found)

    def floats_per_row(self, params: Params, x: Data) -> int:
        """Temporaries of an E-step, in numbers a row."""
        return self.family.floats_per_row(_with_axis(params))


def ProbitRegression(*, ridge: jax.Array | float = 0.0) -> OneComponent:
    """p(y = 1 | features) = Phi(intercept + coefficients · features), by EM over the latent normal response.

    ridge: the precision of a normal prior with mean 0 on the coefficients, not on the intercept. Without one, the
    likelihood has no maximum where features separate the responses: coefficients grow until gains are below `tol`.
    Data: a pair (features (N, P) or (N,), response (N,) of 0 and 1). Params: `.coefficients` (P,), `.intercept` ().
    In mixtures and as an expert it is the family `Probit()`. Source: McCulloch (1994), JASA 89.
    """
    return OneComponent(Probit(ridge=ridge))


def StudentTRegression(degrees_of_freedom: jax.Array | float | None = None) -> OneComponent:
    """y = intercept + coefficients · features + noise, noise Student's t: a regression robust to outliers.

    degrees_of_freedom: held at this number, or estimated (None, the default) between 0.1 and 1000.
    Data: a pair (features (N, P) or (N,), response (N,)). Params: `.coefficients` (P,), `.intercept` (), `.variance`
    (), the squared scale of the noise, and `.degrees_of_freedom` (). M-steps are parameter-expanded where no algorithm
    is named. In mixtures and as an expert it is the family `StudentTLinear()`.
    Source: Lange, Little & Taylor (1989), JASA 84; Liu, Rubin & Wu (1998), Biometrika 85.
    """
    return OneComponent(StudentTLinear(degrees_of_freedom))


def _with_axis(params: Params) -> Params:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], params)
