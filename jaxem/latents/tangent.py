"""Statistics of a model of which nothing is known but log p(x_n, z_n = k), a function of any parameters.

Such a model has no sufficient statistics of finite size. What adds over rows is the tangent of Q: its value and slope
at the parameters of the E-step, under any posterior. Fisher's identity, the lower bound and the log-likelihood need no
more. M-steps, which move away from these parameters, go back to the rows (`q_on_rows`) and compute the posterior again.
So they need statistics of all rows at the same parameters, which `Full()` and `Blocks(size)` give, and a posterior that
is a function of parameters alone.
"""

import dataclasses
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp

from .. import numerics, tree
from ..protocols import Data, Params, Stats
from ..record import record
from ..slots import Expect
from .categorical import CategoricalPosterior, LabelModel
from .expect import Exact, temperature
from .expect import e_step as e_step_of


@record
class TangentStats:
    """The tangent of Q at the parameters of an E-step.

    level: Q there, less slope · params, so that the tangent, level + slope · params, is linear in the statistics.
    slope: dQ/dparams there, arrays like the parameters; the score, where the posterior is exact.
    temperature: of the posterior, times the total weight of the rows; 0 under `Hard()`.
    loglik: sum_n w_n log p(x_n), there.
    """

    level: jax.Array
    slope: Params
    temperature: jax.Array
    loglik: jax.Array


def e_step(
    model: LabelModel, params: Params, x: Data, weights: jax.Array | None = None, expect: Expect = Exact()
) -> Stats:
    """The tangent of Q under a posterior that M-steps can compute again; TypeError for any other `expect`."""
    degrees = temperature(expect)
    stats = e_step_of(model, params, x, weights, expect)
    return dataclasses.replace(stats, temperature=jnp.asarray(degrees, stats.temperature.dtype) * stats.temperature)


def statistics(
    model: LabelModel, params: Params, x: Data, posterior: CategoricalPosterior, weights: jax.Array | None = None
) -> TangentStats:
    """The tangent of Q at `params` under any posterior; loglik is the sum of its evidence."""
    params = tree.no_whole_numbers(params, x)
    value, slope = jax.value_and_grad(
        lambda params: _expected(posterior.responsibilities, model.log_joint(params, x), weights)
    )(params)
    return TangentStats(
        level=value - _dot(slope, params),
        slope=slope,
        temperature=tree.total_weight(x, weights),
        loglik=numerics.weighted_sum(posterior.evidence, weights),
    )


def q_function(model: LabelModel, params: Params, stats: TangentStats) -> jax.Array:
    """The tangent at these parameters: Q itself where the statistics were taken."""
    return stats.level + _dot(stats.slope, params)


def q_on_rows(
    model: LabelModel, params: Params, stats: TangentStats, x: Data, weights: jax.Array | None
) -> Callable[[Params], jax.Array]:
    """Q as a function of parameters, under the posterior at `params`; every call is a pass over the rows.

    Along directions that no density depends on, such as a shift of all logits of a softmax, an optimiser meets rounding
    errors alone, and can drift far away. A penalty on the squared distance from `params`, far below the curvature of Q
    in other directions, prevents this. Value and gradient at `params` stay those of Q, and the penalty is nowhere
    below 0, so that a step which raises the function does not lower the likelihood.
    """
    degrees = stats.temperature / tree.total_weight(x, weights)
    size = tree.rows_per_block(model.floats_per_row(params, x), tree.float_dtype(x))

    def of(new: Params) -> jax.Array:
        def of_block(rows: Data, inside: jax.Array | None) -> jax.Array:
            return _expected(_tempered(model.log_joint(params, rows), degrees), model.log_joint(new, rows), inside)

        # Derivatives compute every block again, in place of storing its intermediate values.
        value = tree.sum_over_blocks(jax.checkpoint(of_block), x, weights, size)
        return value - tree.total_weight(x, weights) * _distance(params, new)

    return of


def _tempered(log_joint: jax.Array, degrees: jax.Array) -> jax.Array:
    """Responsibilities (K, N) at a temperature, or, at 0, of the likeliest latents."""
    warm = degrees > 0
    soft, _ = numerics.normalize(log_joint / jnp.where(warm, degrees, 1).astype(log_joint.dtype))
    return jnp.where(warm, soft, numerics.first_largest(log_joint)[0])


def _expected(responsibilities: jax.Array, log_joint: jax.Array, weights: jax.Array | None) -> jax.Array:
    """sum_n w_n sum_k r_kn log p(x_n, k), where a latent without responsibility may be impossible."""
    used = responsibilities > 0
    each = jnp.sum(jnp.where(used, responsibilities * jnp.where(used, log_joint, 0), 0), axis=0)
    return numerics.weighted_sum(each, weights)


def _distance(params: Params, new: Params) -> jax.Array:
    """The penalty of `q_on_rows` for a unit of weight: sum of sqrt(eps) / 2 (new - old)² / (1 + old²)."""

    def each(old: jax.Array, new: jax.Array) -> jax.Array:
        return 0.5 * jnp.finfo(new.dtype).eps ** 0.5 * jnp.sum(jnp.square(new - old) / (1 + jnp.square(old)))

    return jax.tree.reduce(operator.add, jax.tree.map(each, params, new))


def _dot(a: Params, b: Params) -> jax.Array:
    return jax.tree.reduce(operator.add, jax.tree.map(lambda a, b: jnp.sum(a * b), a, b))
