"""Modified Bessel functions of any order, as directional distributions need them."""

import functools
import math
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp

# At orders from _HIGH_ORDER on, Debye's expansion with _TERMS terms is exact to rounding.
_HIGH_ORDER = 24
_TERMS = 11


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def log_bessel(order: float, kappa: jax.Array) -> jax.Array:
    """log(kappa^-order I_order(kappa)) - kappa, for kappa >= 0: smooth at 0, and without overflow.

    With n the order plus a whole number, and a_v as in `bessel_odds`,
    I_order / kappa^order = I_n / kappa^n prod_{v = order .. n-1} (a_v + kappa).
    """
    steps, high, w = _above(order, kappa)

    def down(step: jax.Array | int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        a, ratios = carry
        a = _lower(a, high - 1 - step, kappa)
        return a, ratios * (a + kappa) / (high + w)

    start = (_high_odds(high, w, kappa), jnp.ones_like(kappa))
    _, ratios = jax.lax.fori_loop(0, steps, down, start)
    rest = jnp.log(_debye(high, high / w)) + jnp.log(ratios)
    return high**2 / (w + kappa) - order * jnp.log(high + w) - 0.5 * jnp.log(2 * math.pi * w) + rest


@log_bessel.defjvp
def _log_bessel_jvp(order: float, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    # The slope is A - 1.
    (kappa,), (tangent,) = primals, tangents
    a = bessel_odds(order, kappa)
    return log_bessel(order, kappa), -a / (kappa + a) * tangent


def bessel_odds(order: float, kappa: jax.Array) -> jax.Array:
    """a = kappa (1 - A) / A, where A = I_{order+1}(kappa) / I_order(kappa), for kappa >= 0.

    a falls from 2 order + 2 at kappa = 0 to order + 1/2 at infinity, so that A = kappa / (kappa + a) and 1 - A are
    both exact. The recurrence 1/A_v = 2 (v + 1) / kappa + A_{v+1}, which is
    a_v = 2 (v + 1) - kappa a_{v+1} / (kappa + a_{v+1}), is run downwards from a high order. DLMF 10.29.1.
    """
    steps, high, w = _above(order, kappa)
    start = _high_odds(high, w, kappa)
    return jax.lax.fori_loop(0, steps, lambda step, a: _lower(a, high - 1 - step, kappa), start)


def _above(order: float, kappa: jax.Array) -> tuple[int, float, jax.Array]:
    """How far above this order a high order n is, n itself, and sqrt(n^2 + kappa^2)."""
    steps = max(0, math.ceil(_HIGH_ORDER - order))
    high = float(order + steps)
    return steps, high, jnp.sqrt(high**2 + kappa**2)


def _lower(a: jax.Array, order: Any, kappa: jax.Array) -> jax.Array:
    """a at an order, from that at the next one."""
    return 2 * (order + 1) - kappa * a / (kappa + a)


def _high_odds(order: float, w: jax.Array, kappa: jax.Array) -> jax.Array:
    """a at a high order n, from A / kappa and 1 - A, each by itself: A is the slope of log(kappa^-n I_n)."""
    series, slope = jax.jvp(functools.partial(_debye, order), (order / w,), (order / w**3,))
    slope = slope / series
    ratio = 1 / (order + w) - 0.5 / w**2 - slope
    rest = (order + order**2 / (w + kappa)) / (order + w) + kappa * (0.5 / w**2 + slope)
    return rest / ratio


def _debye(order: float, p: jax.Array) -> jax.Array:
    """sum_k U_k(p) / order^k, p = order / sqrt(order^2 + kappa^2). DLMF 10.41.3."""
    coefficients = [0.0] * (3 * _TERMS + 1)
    for k, polynomial in enumerate(_debye_polynomials()):
        for j, exact in enumerate(polynomial):
            coefficients[j] += float(exact) / order**k
    total = jnp.zeros_like(p)
    for c in reversed(coefficients):
        total = total * p + c
    return total


@functools.cache
def _debye_polynomials() -> tuple[tuple[Fraction, ...], ...]:
    """U_0, U_1, ..., lowest power first: U_{k+1} = p^2 (1 - p^2) U_k' / 2 + int (1 - 5 p^2) U_k / 8. DLMF 10.41.9."""
    found: list[tuple[Fraction, ...]] = [(Fraction(1),)]
    for _ in range(_TERMS):
        following = [Fraction(0)] * (len(found[-1]) + 3)
        for j, c in enumerate(found[-1]):
            following[j + 1] += c * j / 2 + c / (8 * (j + 1))
            following[j + 3] -= c * j / 2 + 5 * c / (8 * (j + 3))
        found.append(tuple(following))
    return tuple(found)
