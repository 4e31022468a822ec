"""Information criteria. Lower is better, as in scikit-learn (mclust's BIC and ICL are minus these)."""

import jax
import jax.numpy as jnp

from .. import numerics
from ..capabilities import complete
from ..protocols import AnyModel, Data, Params


def _deviance(model: AnyModel, params: Params, x: Data, weights: jax.Array | None) -> jax.Array:
    return -2 * numerics.weighted_sum(model.log_prob(params, x), weights)


def aic(model: AnyModel, params: Params, x: Data, weights: jax.Array | None = None) -> jax.Array:
    """-2 loglik + 2 p, p free parameters (Akaike 1974). Scalar."""
    return _deviance(model, params, x, weights) + 2 * model.num_parameters(params)


def bic(model: AnyModel, params: Params, x: Data, weights: jax.Array | None = None) -> jax.Array:
    """-2 loglik + p log n, n the total weight of the rows, or steps of sequences (Schwarz 1978). Scalar."""
    size = complete("model", model).sample_size(x, weights)
    return _deviance(model, params, x, weights) + model.num_parameters(params) * jnp.log(size)


def icl(model: AnyModel, params: Params, x: Data, weights: jax.Array | None = None) -> jax.Array:
    """BIC - 2 sum_n log max_k p(k | x_n): BIC of the data completed by their likeliest components.

    Biernacki, Celeux & Govaert (2000), Assessing a mixture model for clustering with the
    integrated completed likelihood, IEEE PAMI 22. Scalar.
    """
    certainty = jnp.log(jnp.max(model.posterior(params, x), axis=-1))
    return bic(model, params, x, weights) - 2 * numerics.weighted_sum(certainty, weights)
