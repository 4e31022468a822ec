"""A model from a joint density alone: EM for whoever can write log p(x, z) down."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .. import capabilities, checks, parameters, tree
from ..latents import categorical, tangent
from ..latents.categorical import CategoricalPosterior
from ..latents.expect import Exact
from ..protocols import Data, Params
from ..record import record, static
from ..slots import Expect


@capabilities.completed("model")
@record
class LogJointModel:
    """A Model whose joint density is a plain function; built by `from_log_joint`."""

    function: Callable = static()
    num_latents: int = static()
    init: Callable | None = static(default=None)
    prior: Callable | None = static(default=None)
    to_free: Callable | None = static(default=None)
    from_free: Callable | None = static(default=None)
    sampler: Callable | None = static(default=None)

    e_step, statistics = tangent.e_step, tangent.statistics
    q_function, q_on_rows = tangent.q_function, tangent.q_on_rows
    stats = categorical.stats
    log_prob = categorical.log_prob
    posterior = categorical.responsibilities
    predict = categorical.likeliest

    def log_joint(self, params: Params, x: Data) -> jax.Array:
        """log p(x_n, z_n = k): (K, N)."""
        parameters.shapes("params", self, params, x)
        joint = self.function(tree.no_whole_numbers(params, x), x)
        shape = (self.num_latents, tree.num_rows(x))
        if jnp.shape(joint) != shape:
            raise ValueError(
                f"log_joint(params, x) must return (num_latents, N) = {shape}, log p(x_n, z_n = k); got "
                f"{checks.told(joint)}"
            )
        return joint

    def infer(self, params: Params, x: Data, expect: Expect = Exact()) -> CategoricalPosterior:
        """The posterior over the latents of every row, by enumeration; its `evidence` is log p(x_n), (N,)."""
        return categorical.infer(self.log_joint(params, x), expect)

    def log_prior(self, params: Params) -> jax.Array | float:
        """The user's, or 0."""
        return 0.0 if self.prior is None else self.prior(params)

    def unconstrain(self, params: Params) -> Any:
        """The user's coordinates, or the parameters as they are."""
        return params if self.to_free is None else self.to_free(params)

    def constrain(self, theta: Any) -> Params:
        """Inverse of `unconstrain`."""
        return theta if self.from_free is None else self.from_free(theta)

    def num_parameters(self, params: Params) -> int:
        """As many as there are coordinates."""
        return tree.size(jax.eval_shape(self.unconstrain, params))

    def params_like(self, x: Data) -> Params | None:
        """The shapes that the user's `init` gives; None without it, when any parameters are taken."""
        return None if self.init is None else _drawn.eval_shape(self.init, parameters.rows_like(x))

    def floats_per_row(self, params: Params, x: Data) -> int:
        """Temporaries of an E-step, in numbers a row, as far as they can be known."""
        return 8 * self.num_latents

    def sample_with_labels(self, key: jax.Array, params: Params, n: int) -> tuple[Data, jax.Array]:
        """n rows, and the latent (n,) that each came from, where the user said how."""
        if self.sampler is None:
            raise TypeError("this model does not know how to sample: pass sample_with_labels=... to from_log_joint")
        return self.sampler(checks.random_key(key), params, n)

    def sample(self, key: jax.Array, params: Params, n: int) -> Data:
        """n rows."""
        return self.sample_with_labels(key, params, n)[0]


@functools.partial(jax.jit, static_argnames="init")
def _drawn(init: Callable, x: Data) -> Params:
    """A start from a fixed key, for its shapes; under jit, whose trace is cached."""
    return init(jax.random.key(0), x, None)


def from_log_joint(
    log_joint: Callable,
    num_latents: int,
    *,
    init: Callable | None = None,
    log_prior: Callable | None = None,
    unconstrain: Callable | None = None,
    constrain: Callable | None = None,
    sample_with_labels: Callable | None = None,
) -> LogJointModel:
    """A model from `log_joint(params, x) -> (K, N)`, log p(x_n, z_n = k | params), alone.

    num_latents: K, how many values the latent of a row has; several discrete latents are enumerated by the user.
    init: (key, x, weights=None) -> params, a random start, for `fit_restarts`; starts of another shape are refused.
    log_prior: (params) -> scalar.
    unconstrain, constrain: to coordinates that may take any real value and back, in which M-steps climb; without them
        the parameters are such coordinates (logits, logarithms).
    sample_with_labels: (key, params, n) -> (x, labels), for `sample` and `wake_sleep`.

    Parameters are any pytree of floating-point arrays. The posterior is exact, by enumeration; the M-step is one of
    generalised EM (Dempster, Laird & Rubin 1977, section 3; Neal & Hinton 1998): `Gradient()` climbs
    Q(params) = sum_n w_n sum_k r_kn log p(x_n, k | params) and never goes down. Restarts, weights, blocks of rows,
    hard and annealed EM, and `free_energy` under any q work as for all models. Q has no sufficient statistics of fixed
    size: each of its values is a pass over the rows. So gathers that see some rows at a time or mix steps (`Stepwise`,
    `Incremental`, `VarianceReduced`), posteriors that do not follow from parameters (`Sample`, `Recognition`),
    accelerators and ECM are refused. Statistics are the tangent of Q (`latents/tangent.py`); all laws but those about
    an `m_step` hold.
    The functions are part of the jit key: define them once, outside of loops.
    Raises TypeError for what cannot be called and for one of unconstrain and constrain alone, and ValueError where
    log_joint returns another shape.
    """
    checks.positive_integer("num_latents", num_latents)
    given = {
        "init": init,
        "log_prior": log_prior,
        "unconstrain": unconstrain,
        "constrain": constrain,
        "sample_with_labels": sample_with_labels,
    }
    for name, function in {"log_joint": log_joint, **given}.items():
        if not callable(function) and (function is not None or name == "log_joint"):
            raise TypeError(f"{name} must be a function; got {checks.told(function)}")
    if (unconstrain is None) != (constrain is None):
        raise TypeError("unconstrain and constrain go together: pass both, or neither where parameters are free")
    return LogJointModel(
        function=log_joint,
        num_latents=num_latents,
        init=init,
        prior=log_prior,
        to_free=unconstrain,
        from_free=constrain,
        sampler=sample_with_labels,
    )
