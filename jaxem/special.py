"""Relatives of the gamma function, written so that nothing cancels, and Newton's method for equations in them."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

# Bernoulli numbers B_2, B_4, ..., B_16, of which Stirling's series is made.
_BERNOULLI = (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6, -3617 / 510)

_NEWTON_STEPS = 4


def stirling_error(a: jax.Array) -> jax.Array:
    """lgamma(a) - (a - 1/2) log a + a - log(2 pi) / 2, a > 0: about 1/(12 a) for large a. DLMF 5.11.1."""
    count = _raises(a)
    small, large = _raised(a, count)
    series = large * _even_series([b / (2 * n * (2 * n - 1)) for n, b in enumerate(_BERNOULLI, 1)], large)
    rising, _ = _rising(small, count)
    ratio = jnp.log(rising / (small + count) ** count)
    return jnp.where(a < count, series + (small - 0.5) * jnp.log1p(count / small) - count - ratio, series)


def digamma_error(a: jax.Array) -> jax.Array:
    """log a - digamma(a) - 1/(2 a), a > 0: about 1/(12 a^2) for large a. DLMF 5.11.2."""
    count = _raises(a)
    small, large = _raised(a, count)
    series = _even_series([b / (2 * n) for n, b in enumerate(_BERNOULLI, 1)], large)
    rising, slope = _rising(small, count)
    reciprocals = slope / rising - 0.5 / small + 0.5 / large
    return jnp.where(a < count, series + reciprocals - jnp.log1p(count / small), series)


def log_minus_digamma(a: jax.Array) -> jax.Array:
    """log a - digamma(a), a > 0: about 1/(2 a) for large a, 1/a for small."""
    return 0.5 / a + digamma_error(a)


def digamma(a: jax.Array) -> jax.Array:
    """The slope of lgamma, a > 0; about -1/a for small a."""
    return jnp.log(a) - log_minus_digamma(a)


def gamma_entropy_gap(a: jax.Array) -> jax.Array:
    """a digamma(a) - lgamma(a) - a, a > 0, without these large terms: about (log(a / 2 pi) - 1) / 2 for large a."""
    return 0.5 * jnp.log(a / (2 * math.pi)) - stirling_error(a) - 0.5 - a * digamma_error(a)


def draw_log_gamma(key: jax.Array, shape: jax.Array) -> jax.Array:
    """Logarithms of gamma variates of these shapes and rate 1, in the dtype of `shape`, which is not JAX's default."""
    return jax.random.loggamma(key, shape, dtype=shape.dtype)


def log_beta(a: jax.Array, b: jax.Array) -> jax.Array:
    """log of the beta function, a and b > 0, by Stirling's formula: JAX's own is off by 1e-6 even in float64."""
    errors = stirling_error(a) + stirling_error(b) - stirling_error(a + b)
    logs = (0.5 - a) * jnp.log1p(b / a) + (0.5 - b) * jnp.log1p(a / b)
    return logs + errors + 0.5 * jnp.log(2 * math.pi / (a + b))


def log1p_gap(u: jax.Array) -> jax.Array:
    """u - log(1 + u) for u >= 0: about u^2 / 2 for small u."""
    # log(1 + u) = 2 artanh(z); its first term, 2 z, leaves u - 2 z = u z.
    z = u / (2 + u)
    tail = jnp.zeros_like(z)
    for odd in range(25, 1, -2):
        tail = tail * z * z + 2 / odd
    return jnp.where(u < 0.5, u * z - z * z * z * tail, u - jnp.log1p(u))


def solve(function: Callable[[jax.Array], jax.Array], target: jax.Array, start: jax.Array) -> jax.Array:
    """The u > 0, in the shape of `target` > 0, with function(u) = target, for a function that is close to a power law.

    Newton's method for log function(u) as a function of log u, where a power law is a straight line: a fixed, small
    number of steps is exact to rounding from a `start` of the right order of magnitude.
    """

    def step(_: int, u: jax.Array) -> jax.Array:
        value, slope = jax.jvp(function, (u,), (jnp.ones_like(u),))
        return u * jnp.exp(-jnp.log(value / target) * value / (u * slope))

    return jax.lax.fori_loop(0, _NEWTON_STEPS, step, start)


def _raises(a: jax.Array) -> int:
    """How often a small argument is raised by 1; from this number on Stirling's series is exact to rounding.

    The terms that undo the raises are of this size, and so is their rounding error: it is no larger than needed.
    """
    return 8 if jnp.finfo(jnp.result_type(a)).eps < 1e-9 else 4


def _raised(a: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Where recurrences lead back to, and where Stirling's series is taken: a and a + count, or 1 and a for large a."""
    return jnp.where(a < count, a, 1), jnp.where(a < count, a + count, a)


def _rising(a: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """a (a + 1) ... (a + count - 1), and its derivative."""
    value, slope = a, jnp.ones_like(a)
    for i in range(1, count):
        value, slope = value * (a + i), slope * (a + i) + value
    return value, slope


def _even_series(coefficients: list[float], a: jax.Array) -> jax.Array:
    """sum_n c_n / a^(2 n), n from 1."""
    square = 1 / a**2
    total = jnp.zeros_like(a)
    for c in reversed(coefficients):
        total = (total + c) * square
    return total


def inverse_log_minus_digamma(gap: jax.Array) -> jax.Array:
    """The a > 0 with log a - digamma(a) = gap > 0. Start: Minka (2002), Estimating a gamma distribution."""
    start = (3 - gap + jnp.sqrt((gap - 3) ** 2 + 24 * gap)) / (12 * gap)
    return solve(log_minus_digamma, gap, start)
