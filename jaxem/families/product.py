"""Mixed data: a dict of blocks of columns, each with a family of its own, independent given the component."""

import functools
import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .. import capabilities, tree
from ..parts import assembly, conjugacy
from ..protocols import Data, Family, Params, Stats
from ..record import record


@record
class ProductStats:
    """Statistics of all blocks.

    count: (K,), sum r.
    families: name -> the statistics of that family.
    """

    count: jax.Array
    families: dict[str, Stats]


@capabilities.completed("part")
@record(kw_only=False)
class Product:
    """log p(x|k) = sum over blocks of log p(x[name]|k): blocks are independent given the component.

    families: name -> family, as in `Product({"age": Normal("diag"), "smoker": Bernoulli()})`.

    Data are a dict with these names, each block's rows as its family takes them, missing entries too. Parameters are a
    dict of the families' own. In a mixture this clusters mixed data (latent class analysis); with `Labelled` data it is
    naive Bayes.
    Raises TypeError for families that are no dict or add components of their own, ValueError for an empty dict.
    Hunt & Jorgensen (1999), Mixture model clustering using the MULTIMIX program, ANZ J. Statistics 41.
    """

    families: dict[str, Family]

    def __post_init__(self) -> None:
        if not isinstance(self.families, Mapping):
            raise TypeError(f"families must be a dict of name -> family; got {type(self.families).__name__}")
        if not self.families:
            raise ValueError("families must name at least one family; got an empty dict")
        extra = [name for name, family in self.parts.items() if family.extra_components]
        if extra:
            raise TypeError(
                f"families must not add components of their own, as {extra[0]!r} does: wrap the Product in it"
            )
        object.__setattr__(self, "families", dict(self.families))

    @property
    def parts(self) -> dict[str, Any]:
        """The families of the blocks."""
        return {name: capabilities.complete("part", family) for name, family in self.families.items()}

    def part_statistics(self, stats: ProductStats) -> dict[str, Any]:
        """The statistics of every block."""
        return stats.families

    def with_part_statistics(self, stats: ProductStats, of: dict[str, Any]) -> ProductStats:
        """Statistics with these in place of the blocks'."""
        return ProductStats(count=stats.count, families=of)

    params_type = dict
    part_params, params_of = assembly.part_params, assembly.params_of
    m_step, q_function, log_prior, rebase = assembly.surrogate
    expands, expanded = property(assembly.expands), assembly.expanded
    unconstrain, constrain = assembly.coordinates
    degenerate = assembly.degenerate
    supports = property(assembly.supports)

    @property
    def start_passes(self) -> int:
        """As many as the block that takes most."""
        return max(family.start_passes for family in self.parts.values())

    def pooled(self, x: Data, weights: jax.Array | None, num_components: int) -> Params:
        return {name: f.pooled(rows, weights, num_components) for name, f, rows in self._split(x)}

    def features(self, x: Data) -> jax.Array:
        return jnp.concatenate([f.features(rows) for _, f, rows in self._split(x)], axis=1)

    def log_prob(self, params: Params, x: Data) -> jax.Array:
        """Log-density of every row under every component: (K, N)."""
        return _sum(f.log_prob(params[name], rows) for name, f, rows in self._split(x))

    def stats(self, params: Params, x: Data, responsibilities: jax.Array) -> ProductStats:
        """Every block's expected statistics: responsibilities (K, N)."""
        found = {name: f.stats(params[name], rows, responsibilities) for name, f, rows in self._split(x)}
        return ProductStats(count=next(iter(found.values())).count, families=found)

    def kl(self, p: Params, q: Params) -> jax.Array:
        """KL(p ‖ q) of a row, under every component: (K,)."""
        lacking = [name for name, family in self.parts.items() if family.kl is None]
        if lacking:
            raise TypeError(f"{type(self.families[lacking[0]]).__name__} has no divergence in closed form")
        return _sum(f.kl(p[name], q[name]) for name, f in self.parts.items())

    # What follows from the families' conjugate priors; see `protocols.Conjugate`.

    def conjugate_of(self) -> dict[str, Any]:
        """The priors of all blocks."""
        lacking = [name for name, family in self.parts.items() if family.conjugate_of is None]
        if lacking:
            raise TypeError(f"{type(self.families[lacking[0]]).__name__}, of {lacking[0]!r}, has no conjugate prior")
        return {name: family.conjugate_of() for name, family in self.parts.items()}

    def posterior(self, stats: ProductStats) -> dict[str, Any]:
        """The posteriors of all blocks."""
        return {name: f.posterior(stats.families[name]) for name, f in self.parts.items()}

    def pooled_posterior(self, x: Data, weights: jax.Array | None, num_components: int) -> dict[str, Any]:
        return {name: f.pooled_posterior(rows, weights, num_components) for name, f, rows in self._split(x)}

    draw = conjugacy.draw_parts

    def given(self, values: dict[str, Any]) -> Params:
        return {name: f.given(values[name]) for name, f in self.parts.items()}

    def plugged(self, q: dict[str, Any]) -> Params:
        return {name: f.plugged(q[name]) for name, f in self.parts.items()}

    def expected_log_prob(self, q: dict[str, Any], x: Data) -> jax.Array:
        """E_q[log p(x)]: (K, N)."""
        return _sum(f.expected_log_prob(q[name], rows) for name, f, rows in self._split(x))

    def log_expected_prob(self, q: dict[str, Any], x: Data) -> jax.Array:
        """log E_q[p(x)]: (K, N)."""
        return _sum(f.log_expected_prob(q[name], rows) for name, f, rows in self._split(x))

    def expected_q(self, q: dict[str, Any], stats: ProductStats) -> jax.Array:
        """E_q of Q."""
        return _sum(f.expected_q(q[name], stats.families[name]) for name, f in self.parts.items())

    # Where families of blocks are variational themselves.

    expected = assembly.expected

    def predictive(self, params: Params, x: Data) -> jax.Array:
        """Predictive log-density of every row under every component: (K, N)."""
        return _sum(f.predictive(params[name], rows) for name, f, rows in self._split(x))

    def sample(self, key: jax.Array, params: Params, labels: jax.Array) -> Data:
        """A dict of rows, each from the component that its label (N,) names."""
        keys = jax.random.split(key, len(self.families))
        return {
            name: f.sample(k, params[name], labels) for k, (name, f) in zip(keys, self.families.items(), strict=True)
        }

    def num_parameters(self, params: Params) -> int:
        return sum(f.num_parameters(params[name]) for name, f in self.families.items())

    def floats_per_row(self, params: Params) -> int:
        return sum(f.floats_per_row(params[name]) for name, f in self.families.items())

    def check(self, x: Data, name: str = "x") -> None:
        for block, family, rows in self._split(x, name):
            family.check(rows, f"{name}[{block!r}]")
        tree.num_rows(x)

    def coarse(self) -> "Product":
        """Every family in its cheapest arithmetic."""
        forms = {name: capabilities.original(family.coarse()) for name, family in self.parts.items()}
        return self if all(forms[name] is family for name, family in self.families.items()) else Product(forms)

    def without_missing(self) -> "Product":
        """Every family in its form for rows without missing entries."""
        forms = {name: capabilities.original(family.without_missing()) for name, family in self.parts.items()}
        return self if all(forms[name] is family for name, family in self.families.items()) else Product(forms)

    def _split(self, x: Data, name: str = "x") -> list[tuple[str, Any, Data]]:
        """Name, family and rows of every block; TypeError or ValueError for data that are no such dict."""
        if not isinstance(x, Mapping):
            raise TypeError(f"{name} must be a dict with {sorted(self.families)}; got {type(x).__name__}")
        if set(x) != set(self.families):
            raise ValueError(
                f"{name} must be a dict with {sorted(self.families)}, no more and no less; got {sorted(x)}"
            )
        return [(name, family, x[name]) for name, family in self.parts.items()]


def _sum(terms: object) -> jax.Array:
    return functools.reduce(operator.add, terms)  # type: ignore[call-overload]
