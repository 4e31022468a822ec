"""Conjugate priors, a record each: given statistics, the posterior of the parameters is of the same kind.

A posterior is read in three ways. Its `mode` is what MAP-EM's M-step takes; expectations under it, and `kl`, how far
it is from the prior, are what variational Bayes is made of; and `sample` is the M-step of Gibbs sampling. Fields hold
one number for all distributions, or as many as there are; `log_prob` and `kl` are sums over all of them.

Bishop (2006), Pattern Recognition and Machine Learning, section 2.4.2 and appendix B.
"""

from typing import Any

import jax
import jax.numpy as jnp

from . import numerics, special
from .record import record

# Minus this stands for log(0): its exp() is 0 in every precision.
_FAR_OUT = 1e4


def _times_log(exponent: jax.Array, value: jax.Array) -> jax.Array:
    """exponent x log(value), 0 wherever the exponent is 0."""
    used = exponent != 0
    return jnp.where(used, exponent * numerics.safe_log(jnp.where(used, value, 1)), 0)


def like(value: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """A number, or an array, in this shape; ValueError for an array of another."""
    given = jnp.asarray(value, dtype)
    if given.shape != shape[len(shape) - given.ndim :] and any(
        size not in (1, wanted) for size, wanted in zip(given.shape[::-1], shape[::-1], strict=False)
    ):
        raise ValueError(
            f"a prior has a field of shape {given.shape} where data and components ask for {shape}: it was made for "
            "another number of columns or components"
        )
    return jnp.broadcast_to(given, shape)


def _together(*values: Any) -> list[jax.Array]:
    """Values in the one shape that they all broadcast to, and in one dtype."""
    shape = jnp.broadcast_shapes(*map(jnp.shape, values))
    dtype = jnp.result_type(float, *values) if all(map(_is_number, values)) else jnp.result_type(*values)
    return [like(value, shape, dtype) for value in values]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def positive_to_real(values: jax.Array) -> jax.Array:
    """Logarithms; what is 0 has a coordinate so far out that it stays 0."""
    return jnp.where(values > 0, jnp.log(jnp.where(values > 0, values, 1)), -_FAR_OUT)


@record(kw_only=False)
class Dirichlet:
    """Dirichlet prior on probabilities.

    concentration: a scalar or (K,); of a posterior (..., K), a distribution along the last axis. 1 is flat, so that the
        M-step is maximum likelihood; below 1 the density has no mode in the interior. Where it is 0, so is the
        probability.

    Its log-density is normalised.
    """

    concentration: jax.Array | float

    positive = ("concentration",)
    spreads = ()

    def pseudo_counts(self, counts: jax.Array) -> jax.Array:
        """concentration - 1, in the shape of the counts."""
        return like(self.concentration, counts.shape, counts.dtype) - 1

    def posterior(self, counts: jax.Array, support: Any = None) -> "Dirichlet":
        """The posterior given counts (..., K); where a support (..., K) is False (0), its concentration is 0."""
        total = like(self.concentration, counts.shape, counts.dtype) + counts
        return Dirichlet(total if support is None else jnp.where(jnp.asarray(support) != 0, total, 0))

    def posterior_mode(self, counts: jax.Array, support: Any = None) -> jax.Array:
        """The mode given counts (..., K), as counts + (concentration - 1), which does not lose tiny counts."""
        extra = self.pseudo_counts(counts)
        extra = extra if support is None else jnp.where(jnp.asarray(support) != 0, extra, 0)
        counts = jnp.maximum(counts + extra, 0)
        return numerics.safe_divide(counts, jnp.sum(counts, axis=-1, keepdims=True))

    def mode(self) -> jax.Array:
        """The likeliest probabilities; below 1 a concentration counts as 1, and where all do, they are all the same."""
        concentration = jnp.asarray(self.concentration)
        above = jnp.maximum(concentration - 1, 0)
        flat = jnp.sum(above, axis=-1, keepdims=True) == 0
        above = jnp.where(flat, jnp.where(concentration > 0, 1, above), above)
        return above / jnp.sum(above, axis=-1, keepdims=True)

    def expected(self) -> jax.Array:
        """The mean: shares of the concentration."""
        concentration = jnp.asarray(self.concentration)
        return concentration / jnp.sum(concentration, axis=-1, keepdims=True)

    def expected_log(self) -> jax.Array:
        """E[log p] = digamma(concentration) - digamma(their sum); -inf where p is 0."""
        concentration = jnp.asarray(self.concentration)
        inside = concentration > 0
        total = special.digamma(jnp.sum(concentration, axis=-1, keepdims=True))
        return jnp.where(inside, special.digamma(jnp.where(inside, concentration, 1)) - total, -jnp.inf)

    def weighed(self) -> jax.Array:
        """exp(E[log p]), which stands for p in variational responsibilities: its sum is below 1."""
        return jnp.exp(self.expected_log())

    def kl(self, other: "Dirichlet") -> jax.Array:
        """KL(this ‖ other). Written so that no two large terms cancel."""
        one, two = _together(self.concentration, other.concentration)
        inside = one > 0
        total, before = jnp.sum(one, axis=-1), jnp.sum(jnp.where(inside, two, 0), axis=-1)
        one, two = jnp.where(inside, one, 1), jnp.where(inside, two, 1)
        logs = special.digamma(one) - special.digamma(total)[..., None]
        each = special.gamma_entropy_gap(one) + jax.lax.lgamma(two) - two * logs
        each = jnp.sum(jnp.where(inside, each, 0), axis=-1)
        return jnp.sum(each - special.gamma_entropy_gap(total) - jax.lax.lgamma(before))

    def sample(self, key: jax.Array) -> jax.Array:
        """Probabilities in the shape of the concentration, drawn by their logarithms: none is lost to underflow."""
        concentration = jnp.asarray(self.concentration)
        inside = concentration > 0
        logs = special.draw_log_gamma(key, jnp.where(inside, concentration, 1))
        return jax.nn.softmax(jnp.where(inside, logs, -jnp.inf), axis=-1)

    @jax.jit
    def log_prob(self, probabilities: jax.Array, support: Any = None) -> jax.Array:
        """Log-density of distributions (..., K), normalised on the support of each; 0 log 0 = 0."""
        extra = self.pseudo_counts(probabilities)
        inside = jnp.broadcast_to(True if support is None else jnp.asarray(support) != 0, extra.shape)
        total = jnp.sum(jnp.where(inside, extra + 1, 0), axis=-1)
        normaliser = jax.lax.lgamma(total) - jnp.sum(jnp.where(inside, jax.lax.lgamma(extra + 1), 0), axis=-1)
        return jnp.sum(_times_log(jnp.where(inside, extra, 0), probabilities)) + jnp.sum(normaliser)

    def unconstrain(self) -> "Dirichlet":
        """Logarithms."""
        return Dirichlet(positive_to_real(jnp.asarray(self.concentration)))

    def constrain(self) -> "Dirichlet":
        """Inverse of `unconstrain`."""
        return Dirichlet(jnp.exp(self.concentration))


@record(kw_only=False)
class Beta:
    """Beta prior on every probability, as if a - 1 successes and b - 1 failures had been seen before.

    a, b: scalars, or (D,); of a posterior (K, D).
    """

    a: jax.Array | float
    b: jax.Array | float

    positive = ("a", "b")
    spreads = ()

    def pseudo_counts(self, probability: jax.Array) -> tuple[jax.Array, jax.Array]:
        """a - 1 and b - 1, in the shape of the probabilities."""
        shape, dtype = probability.shape, probability.dtype
        return like(self.a, shape, dtype) - 1, like(self.b, shape, dtype) - 1

    def posterior(self, outcomes: tuple[jax.Array, jax.Array]) -> "Beta":
        """The posterior given successes and failures."""
        successes, failures = outcomes
        shape, dtype = successes.shape, successes.dtype
        return Beta(like(self.a, shape, dtype) + successes, like(self.b, shape, dtype) + failures)

    def posterior_mode(self, outcomes: tuple[jax.Array, jax.Array]) -> jax.Array:
        """The mode given successes and failures, as successes + (a - 1) and so on, which does not lose tiny counts."""
        more, less = self.pseudo_counts(outcomes[0])
        successes, failures = jnp.maximum(outcomes[0] + more, 0), jnp.maximum(outcomes[1] + less, 0)
        return numerics.safe_divide(successes, successes + failures)

    def mode(self) -> jax.Array:
        """The likeliest probability; below 1, a and b count as 1, and where both do, it is 1/2."""
        return self._as_dirichlet().mode()[..., 0]

    def expected(self) -> jax.Array:
        """The mean, a / (a + b)."""
        return self._as_dirichlet().expected()[..., 0]

    def expected_logs(self) -> tuple[jax.Array, jax.Array]:
        """E[log p] and E[log(1 - p)]."""
        logs = self._as_dirichlet().expected_log()
        return logs[..., 0], logs[..., 1]

    def kl(self, other: "Beta") -> jax.Array:
        """KL(this ‖ other)."""
        return self._as_dirichlet().kl(Dirichlet(jnp.stack(_together(other.a, other.b, self.a)[:2], axis=-1)))

    def sample(self, key: jax.Array) -> jax.Array:
        """Probabilities in the shape of a and b."""
        return self._as_dirichlet().sample(key)[..., 0]

    def log_prob(self, probability: jax.Array) -> jax.Array:
        """Log-density, summed over all probabilities."""
        successes, failures = self.pseudo_counts(probability)
        normaliser = special.log_beta(successes + 1, failures + 1)
        return jnp.sum(_times_log(successes, probability) + _times_log(failures, 1 - probability) - normaliser)

    def unconstrain(self) -> "Beta":
        """Logarithms."""
        return Beta(jnp.log(self.a), jnp.log(self.b))

    def constrain(self) -> "Beta":
        """Inverse of `unconstrain`."""
        return Beta(jnp.exp(self.a), jnp.exp(self.b))

    def _as_dirichlet(self) -> Dirichlet:
        """The same distribution of the pair (p, 1 - p)."""
        return Dirichlet(jnp.stack(_together(self.a, self.b), axis=-1))


@record(kw_only=False)
class GammaPrior:
    """Gamma prior on every rate, as if shape - 1 events had been seen in an exposure (or time) of `rate`.

    shape, rate: scalars, or (D,); of a posterior (K, D).
    """

    shape: jax.Array | float
    rate: jax.Array | float

    positive = ("shape", "rate")
    spreads = ()

    def pseudo_counts(self, values: jax.Array) -> tuple[jax.Array, jax.Array]:
        """shape - 1 events and an exposure of rate, in the shape of the rates."""
        return like(self.shape, values.shape, values.dtype) - 1, like(self.rate, values.shape, values.dtype)

    def posterior(self, seen: tuple[jax.Array, jax.Array]) -> "GammaPrior":
        """The posterior given events, and the exposure that they were seen in."""
        events, exposure = seen
        shape, dtype = events.shape, events.dtype
        return GammaPrior(like(self.shape, shape, dtype) + events, like(self.rate, shape, dtype) + exposure)

    def posterior_mode(self, seen: tuple[jax.Array, jax.Array]) -> jax.Array:
        """The mode given events and exposure, with events + (shape - 1), which does not lose tiny counts."""
        more, longer = self.pseudo_counts(seen[0])
        return jnp.maximum(seen[0] + more, 0) / (seen[1] + longer)

    def mode(self) -> jax.Array:
        """The likeliest rate; below 1 the shape counts as 1."""
        shape, rate = _together(self.shape, self.rate)
        return jnp.maximum(shape - 1, 0) / rate

    def expected(self) -> jax.Array:
        """The mean, shape / rate."""
        shape, rate = _together(self.shape, self.rate)
        return shape / rate

    def expected_log(self) -> jax.Array:
        """E[log rate]."""
        shape, rate = _together(self.shape, self.rate)
        return special.digamma(shape) - jnp.log(rate)

    def kl(self, other: "GammaPrior") -> jax.Array:
        """KL(this ‖ other). Written so that no two large terms cancel."""
        shape, rate, other_shape, other_rate = _together(self.shape, self.rate, other.shape, other.rate)
        logs = special.digamma(shape) - jnp.log(rate / other_rate)
        gap = special.gamma_entropy_gap(shape) + jax.lax.lgamma(other_shape)
        return jnp.sum(gap - other_shape * logs + shape * (other_rate / rate))

    def sample(self, key: jax.Array) -> jax.Array:
        """Rates in the shape of the fields."""
        shape, rate = _together(self.shape, self.rate)
        return jnp.exp(special.draw_log_gamma(key, shape)) / rate

    def log_prob(self, values: jax.Array) -> jax.Array:
        """Log-density, summed over all rates."""
        events, exposure = self.pseudo_counts(values)
        normaliser = (events + 1) * jnp.log(exposure) - jax.lax.lgamma(events + 1)
        return jnp.sum(_times_log(events, values) - exposure * values + normaliser)

    def unconstrain(self) -> "GammaPrior":
        """Logarithms."""
        return GammaPrior(jnp.log(self.shape), jnp.log(self.rate))

    def constrain(self) -> "GammaPrior":
        """Inverse of `unconstrain`."""
        return GammaPrior(jnp.exp(self.shape), jnp.exp(self.rate))
