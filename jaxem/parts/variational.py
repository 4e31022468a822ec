"""Variational Bayes as a part: a distribution of the parameters in the place of one value of them."""

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp

from .. import capabilities, checks, parameters
from ..protocols import Data, Params, Stats
from ..record import record
from . import conjugacy


@capabilities.completed("part")
@record(kw_only=False)
class Variational:
    """A family whose parameters have a distribution q, of their conjugate prior's kind, in place of values.

    family: one with a conjugate prior, as in `Variational(Normal(prior=default_prior(x, 3)))`, or a `Product` of such.

    Its parameters are hyperparameters: the record that the prior is, component axis first. Densities are taken in
    expectation, E_q[log p(x | parameters)]; the M-step is the posterior given the family's own statistics; and in the
    place of the prior's log-density stands -KL(q ‖ prior). So EM of `Mixture(Variational(family), K)`, or of an HMM of
    it, is variational Bayesian EM: its objective, log-likelihood + log-prior, is the lower bound of the log-evidence,
    with all its constants. A component without rows goes back to the prior, and does no harm. The initial and
    transition probabilities of an HMM then have Dirichlet distributions. The weights of a `Mixture` keep values
    that maximise the bound, which empties components that the data do not need (Corduneanu & Bishop 2001, Variational
    Bayesian model selection for mixture distributions); with a distribution of them it is `VariationalMixture`.

    `expected(params)` gives the family's parameters at their means, `predictive(params, x)` the logarithm of the
    expected density.
    Attias (2000), A variational Bayesian framework for graphical models; Beal (2003), Variational algorithms for
    approximate Bayesian inference, chapter 2; Bishop (2006), section 10.2.
    Raises TypeError for a family without a conjugate prior, or about which `Fixed` or `Tied` says something.
    """

    family: Any

    distributed = True

    def __post_init__(self) -> None:
        stated = capabilities.complete("stated", self.family)
        if stated.m_step is None:
            return  # JAX rebuilds records around objects of its own
        name = type(self.family).__name__
        if stated.stated:
            raise TypeError(f"{name} states something about parameters, which have a distribution here: leave it out")
        if self._part.conjugate_of is None:
            raise TypeError(f"{name} has no conjugate prior, which Variational needs: Normal, Poisson and others have")
        self._part.conjugate_of()

    @property
    def _part(self) -> Any:
        return capabilities.complete("part", self.family)

    @property
    def supports(self) -> parameters.Supports:
        """Hyperparameters that are not below 0, and matrices without negative eigenvalues."""

        def of(prior: Any) -> parameters.Supports:
            positive = dict.fromkeys(prior.positive, parameters.at_least_zero)
            return {**positive, **dict.fromkeys(prior.spreads, parameters.spreads)}

        return conjugacy.each(of, self._part.conjugate_of())

    @property
    def start_passes(self) -> int:
        return self._part.start_passes

    @property
    def correlated(self) -> bool:
        return self._part.correlated

    def check_value(self, name: str, value: Any) -> None:
        """Raise TypeError for an array, to be held fixed in the place of a distribution."""
        prior = self._part.conjugate_of()
        if isinstance(value, checks.ARRAYS):
            kind = type(prior).__name__
            raise TypeError(f"{name} has a distribution here: hold it at a {kind} of hyperparameters, not at an array")

    def pooled(self, x: Data, weights: jax.Array | None, num_components: int) -> Any:
        """The posterior given all rows, in every component."""
        return self._part.pooled_posterior(x, weights, num_components)

    def features(self, x: Data) -> jax.Array:
        return self.family.features(x)

    def log_prob(self, q: Any, x: Data) -> jax.Array:
        """E_q[log p(x_n | component k)]: (K, N)."""
        return self.family.expected_log_prob(q, x)

    def stats(self, q: Any, x: Data, responsibilities: jax.Array) -> Stats:
        """The family's statistics: responsibilities (K, N)."""
        return self.family.stats(self.family.plugged(q), x, responsibilities)

    def m_step(self, stats: Stats) -> Any:
        """The posterior: argmax over q of Q - KL(q ‖ prior)."""
        return self.family.posterior(stats)

    def q_function(self, q: Any, stats: Stats) -> jax.Array:
        """E_q of the family's Q; linear in the statistics."""
        return self.family.expected_q(q, stats)

    def log_prior(self, q: Any) -> jax.Array:
        """-KL(q ‖ prior), over all components."""
        divergences = conjugacy.each(lambda one, other: one.kl(other), q, self._part.conjugate_of())
        return -functools.reduce(operator.add, jax.tree.leaves(divergences))

    def rebase(self, stats: Stats, q: Any) -> Stats:
        """The same statistics about the reference of q."""
        return self._part.rebase(stats, self.family.plugged(q))

    def degenerate(self, stats: Stats) -> jax.Array:
        """Nothing (0,) collapses: a component without rows has its prior."""
        return jnp.zeros(0, bool)

    def expected(self, q: Any) -> Params:
        """The family's parameters at their means under q."""
        return conjugacy.expected(self._part, q)

    def predictive(self, q: Any, x: Data) -> jax.Array:
        """log E_q[p(x_n | component k)], the predictive log-density: (K, N)."""
        return self.family.log_expected_prob(q, x)

    def sample(self, key: jax.Array, q: Any, labels: jax.Array) -> Data:
        """One row from the component that each label (N,) names, of parameters that are drawn from q first."""
        of_parameters, rows = jax.random.split(key)
        return self.family.sample(rows, self.sample_parameters(of_parameters, q), labels)

    def sample_parameters(self, key: jax.Array, q: Any) -> Params:
        """The family's parameters, drawn from q."""
        return conjugacy.sample(self._part, key, q)

    def num_parameters(self, q: Any) -> int:
        """Free parameters of the family, of all components together."""
        return self.family.num_parameters(self._like(q))

    def floats_per_row(self, q: Any) -> int:
        """Temporaries of an E-step, in numbers a row."""
        return self.family.floats_per_row(self._like(q))

    def shared_floats_per_row(self, q: Any) -> int:
        """The part of `floats_per_row` that restarts on the same rows share."""
        return self._part.shared_floats_per_row(self._like(q))

    def unconstrain(self, q: Any) -> Any:
        """Hyperparameters in coordinates that may be any numbers."""
        return conjugacy.each(lambda record: record.unconstrain(), q)

    def constrain(self, theta: Any) -> Any:
        """Inverse of `unconstrain`."""
        return conjugacy.each(lambda record: record.constrain(), theta)

    def check(self, x: Data, name: str = "x") -> None:
        self.family.check(x, name)

    def coarse(self) -> "Variational":
        """The cheapest form, for the bulk of many restarts."""
        return self._about(self._part.coarse())

    def without_missing(self) -> "Variational":
        """The form for rows in which no entry is missing."""
        return self._about(self._part.without_missing())

    def _about(self, form: Any) -> "Variational":
        form = capabilities.original(form)
        return self if form is self.family else dataclasses.replace(self, family=form)

    def _like(self, q: Any) -> Params:
        """The shapes of the family's parameters."""
        return jax.eval_shape(self.family.plugged, q)
