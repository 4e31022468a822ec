"""From a chain with its observations to the posterior of its states, in the arithmetic that is asked for."""

import jax
import jax.numpy as jnp

from ... import numerics, tree
from ...slots import Expect
from ..expect import Exact, Hard, Sample
from . import logs, parallel, paths, scaled
from .chain import Chain
from .posterior import Paths, Smoothed

FORMS = ("auto", "scaled", "log")


def infer(chain: Chain, expect: Expect, form: str, in_parallel: bool) -> tuple[Smoothed | Paths, jax.Array]:
    """The posterior of the states, and its evidence (T[, L]): terms whose sum over a sequence is its log-likelihood.

    Under Hard() all is given to the likeliest path (Viterbi), whose log-probability the evidence sums to;
    under Exact(T) it is p(z | x)^(1/T), normalised, and the evidence T log sum_z p(x, z)^(1/T); under Sample(n)
    an average over n paths drawn backwards from the filter. form: "scaled", "log", or "auto", which takes scaled
    probabilities unless they may have lost a path. in_parallel: by products of whole transition matrices, in log T
    rounds and K times the work. Raises TypeError for an `expect` that a chain does not know.
    """
    if isinstance(expect, Hard):
        path, evidence = paths.decode(chain)
        mass = jnp.ones(1, chain.log_likelihood.dtype)
        return Paths(path=path[..., None], mass=mass, linked=chain.linked, num_states=chain.num_states), evidence
    if isinstance(expect, Sample):
        filtered, evidence = log_filter(chain, form, in_parallel)
        path, mass = paths.draw(chain, filtered, expect)
        return Paths(path=path, mass=mass, linked=chain.linked, num_states=chain.num_states), evidence
    if not isinstance(expect, Exact):
        raise _unknown(expect)
    if expect.temperature is None:
        return _smoothed(chain, form, in_parallel)
    temperature = jnp.asarray(expect.temperature, chain.log_likelihood.dtype)
    posterior, evidence = _smoothed(chain.tempered(temperature), form, in_parallel)
    return posterior, temperature * evidence


def log_filter(chain: Chain, form: str, in_parallel: bool) -> tuple[jax.Array, jax.Array]:
    """log p(z_t = k | x_1..t) (T, K[, L]), and the evidence (T[, L]) of every step given those before it."""
    if in_parallel:
        return parallel.filtered(chain)
    if form == "log":
        return logs.filtered(chain)
    return scaled.filtered(chain)[0] if form == "scaled" else numerics.repaired(scaled.filtered, logs.filtered, chain)


def _smoothed(chain: Chain, form: str, in_parallel: bool) -> tuple[Smoothed, jax.Array]:
    if in_parallel or form == "log":
        found, in_logs = (parallel if in_parallel else logs).smoothed(chain), None
    elif form == "scaled":
        found, in_logs = scaled.smoothed(chain)[0], None
    else:
        found, in_logs = numerics.repaired(_attempted, _again, chain)
    states, come, arrive, total, evidence = found
    return Smoothed(
        states=states,
        come=come,
        arrive=arrive,
        total=total,
        transition=chain.transition,
        in_logs=in_logs,
        logarithmic=in_parallel or form == "log",
    ), evidence


def _attempted(chain: Chain) -> tuple[tuple[scaled.Found, jax.Array], jax.Array]:
    found, lossy = scaled.smoothed(chain)
    return (found, tree.varying(jnp.zeros((), chain.log_likelihood.dtype), chain)), lossy


def _again(chain: Chain) -> tuple[scaled.Found, jax.Array]:
    return logs.smoothed(chain), tree.varying(jnp.ones((), chain.log_likelihood.dtype), chain)


def _unknown(expect: Expect) -> TypeError:
    return TypeError(f"expect must be Exact(), Hard() or Sample() for a Markov chain; got {expect!r}")
