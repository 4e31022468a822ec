"""The recursions as products of whole transition matrices, in log T rounds and K times the work.

Hassan, Särkkä & García-Fernández (2021), Temporal parallelization of inference in hidden Markov models, IEEE Trans.
Signal Processing 69.
"""

import jax
import jax.numpy as jnp

from ... import numerics
from . import logs
from .chain import Chain
from .scaled import Found


def filtered(chain: Chain) -> tuple[jax.Array, jax.Array]:
    """log p(z_t = k | x_1..t) (T, K[, L]), and the evidence (T[, L]) of every step."""
    found, running = _forward(chain)
    return found, _rises(running)


def smoothed(chain: Chain) -> Found:
    """The posterior's parts, come and arrive in logarithms."""
    forward, running = _forward(chain)
    after = _backward(chain)
    *found, _ = logs.joined(chain, forward, after, after[1:] + chain.log_likelihood[1:])
    states, come, arrive, total = found
    return states, come, arrive, total, _rises(running)


def _matrices(chain: Chain) -> jax.Array:
    """log p(z_t = j, x_t | z_t-1 = i) of every step: (T, [L,] K, K); where a sequence starts, all rows i are equal."""
    scores = chain.log_likelihood
    scores = jnp.moveaxis(scores, 1, -1)[..., None, :]
    start = numerics.safe_log(chain.initial)
    moves = jnp.broadcast_to(numerics.safe_log(chain.transition), (*scores.shape[:-2], *chain.transition.shape))
    begins = jnp.zeros(scores.shape[:-2], bool).at[0].set(True)
    if chain.linked is not None:
        begins = begins.at[1:].set(~chain.linked)
    return jnp.where(begins[..., None, None], start, moves) + scores


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Matrix products of (..., K, K) in logarithms."""
    return jnp.squeeze(logs.log_sum(a[..., :, :, None] + b[..., None, :, :], -2), -2)


def _forward(chain: Chain) -> tuple[jax.Array, jax.Array]:
    """log p(z_t = k | x_1..t) (T, K[, L]), and the log-likelihood of all steps up to each (T, 1[, L])."""
    products = jax.lax.associative_scan(_product, _matrices(chain))
    joint = jnp.moveaxis(products[..., 0, :], -1, 1)
    running = logs.log_sum(joint, 1)
    return logs.less(joint, running), running


def _rises(running: jax.Array) -> jax.Array:
    """Evidence of single steps (T[, L]) from its running sums (T, 1[, L]), which go on across starts of sequences.

    Products of matrices give these sums alone.
    """
    running = jnp.squeeze(running, 1)
    never = jnp.isneginf(running)
    return jnp.where(never, -jnp.inf, jnp.diff(jnp.where(never, 0, running), axis=0, prepend=0))


def _backward(chain: Chain) -> jax.Array:
    """log p(x_t+1.. | z_t = k) (T, K[, L]), up to a constant for every step."""
    last = jnp.zeros_like(chain.log_likelihood[:1])
    products = jax.lax.associative_scan(lambda a, b: _product(b, a), _matrices(chain)[1:], reverse=True)
    before = jnp.moveaxis(jnp.squeeze(logs.log_sum(products, -1), -1), -1, 1)
    return jnp.concatenate([before, last])
