"""Parameters of linear-Gaussian state space models: their shapes, what they may be, and where they start."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import checks, parameters
from ..families.covariance import Diagonal, Full
from ..families.linear_equation import EquationStats
from ..record import record, static

SHAPES: dict[str, Full | Diagonal] = {"full": Full(), "diag": Diagonal()}
COVARIANCES = ("initial_covariance", "dynamics_covariance", "emission_covariance")


@record
class LinearGaussianSSMParams:
    """z_1 ~ N(initial_mean, initial_covariance); z_t = dynamics z_(t-1) + dynamics_bias + dynamics_inputs u_t + w_t;
    y_t = emission z_t + emission_bias + emission_inputs u_t + v_t. The last four are None where the model has none.

    initial_mean          (S,)
    initial_covariance    (S, S)
    dynamics              (S, S)
    dynamics_covariance   (S, S), of the process noise w_t
    emission              (D, S)
    emission_covariance   (D, D), of the observation noise v_t; (D,) where it is diagonal
    dynamics_bias         (S,)
    emission_bias         (D,)
    dynamics_inputs       (S, U)
    emission_inputs       (D, U)
    """

    initial_mean: jax.Array
    initial_covariance: jax.Array
    dynamics: jax.Array
    dynamics_covariance: jax.Array
    emission: jax.Array
    emission_covariance: jax.Array
    dynamics_bias: jax.Array | None = None
    emission_bias: jax.Array | None = None
    dynamics_inputs: jax.Array | None = None
    emission_inputs: jax.Array | None = None


@record
class LinearGaussianSSMStats:
    """Statistics of the three equations, and the log-likelihood. All add.

    initial    of z_1, on the feature 1
    dynamics   of z_t, t > 1, on z_(t-1), 1, u_t
    emission   of the observations y_t, on z_t, 1, u_t
    loglik     ()
    """

    initial: EquationStats
    dynamics: EquationStats
    emission: EquationStats
    loglik: jax.Array


@record
class Terms:
    """Terms of an equation beside that of the states.

    bias: whether it has a constant term.
    inputs: whether it has coefficients of inputs.
    """

    bias: bool = static()
    inputs: bool = static()


@record
class Layout:
    """What a system consists of.

    states: S.
    dynamics, emission: the terms of these equations.
    noise: the shape of the observation noise's covariance.
    """

    states: int = static()
    dynamics: Terms = static()
    emission: Terms = static()
    noise: Full | Diagonal = static()

    @property
    def uses_inputs(self) -> bool:
        """Whether data are pairs (observations, inputs)."""
        return self.dynamics.inputs or self.emission.inputs


def params_like(layout: Layout, observations: Any, inputs: Any) -> LinearGaussianSSMParams:
    """The shapes of parameters for observations (B, T, D) and inputs (B, T, U), or None."""
    states, width, num_inputs = layout.states, observations.shape[2], 0 if inputs is None else inputs.shape[2]

    def like(*shape: int, there: bool = True) -> Any:
        return parameters.like(shape, observations.dtype) if there else None

    return LinearGaussianSSMParams(
        initial_mean=like(states),
        initial_covariance=like(states, states),
        dynamics=like(states, states),
        dynamics_covariance=like(states, states),
        emission=like(width, states),
        emission_covariance=like(*(width,) * layout.noise.trailing),
        dynamics_bias=like(states, there=layout.dynamics.bias),
        emission_bias=like(width, there=layout.emission.bias),
        dynamics_inputs=like(states, num_inputs, there=layout.dynamics.inputs),
        emission_inputs=like(width, num_inputs, there=layout.emission.inputs),
    )


def random_start(
    key: jax.Array, like: LinearGaussianSSMParams, mean: jax.Array, variance: jax.Array
) -> LinearGaussianSSMParams:
    """Parameters of these shapes: states explain half of the columns' variances (D,), a bias is their mean (D,)."""
    width, states = like.emission.shape
    dtype = mean.dtype
    key_decay, key_emission = jax.random.split(key)
    decay = jax.random.uniform(key_decay, (states,), dtype, 0.3, 0.95)
    loadings = jax.random.normal(key_emission, (width, states), dtype)
    size = jnp.sqrt(jnp.sum(jnp.square(loadings), axis=1, keepdims=True))

    def zeros(leaf: Any) -> jax.Array | None:
        return None if leaf is None else jnp.zeros(leaf.shape, dtype)

    return LinearGaussianSSMParams(
        initial_mean=jnp.zeros(states, dtype),
        initial_covariance=jnp.eye(states, dtype=dtype),
        dynamics=jnp.diag(decay),
        dynamics_covariance=jnp.diag(1 - jnp.square(decay)),
        emission=loadings / size * jnp.sqrt(variance / 2)[:, None],
        emission_covariance=jnp.diag(variance / 2) if len(like.emission_covariance.shape) == 2 else variance / 2,
        dynamics_bias=zeros(like.dynamics_bias),
        emission_bias=None if like.emission_bias is None else mean,
        dynamics_inputs=zeros(like.dynamics_inputs),
        emission_inputs=zeros(like.emission_inputs),
    )


def check_held(values: Mapping[str, Any], layout: Layout) -> None:
    """Raise ValueError for values, to be held fixed, that the model has none of, or that cannot be."""
    there = {
        "dynamics_bias": layout.dynamics.bias,
        "emission_bias": layout.emission.bias,
        "dynamics_inputs": layout.dynamics.inputs,
        "emission_inputs": layout.emission.inputs,
    }
    for name in values:
        if not there.get(name, True):
            raise ValueError(f"{name} cannot be held: the model has none. Set {name}=True")
    states = layout.states
    shapes: dict[str, tuple[int | None, ...]] = {
        "initial_mean": (states,),
        "initial_covariance": (states, states),
        "dynamics": (states, states),
        "dynamics_covariance": (states, states),
        "emission": (None, states),
        "emission_covariance": (None,) * layout.noise.trailing,
        "dynamics_bias": (states,),
        "emission_bias": (None,),
        "dynamics_inputs": (states, None),
        "emission_inputs": (None, None),
    }
    for name, value in values.items():
        if not isinstance(value, (int, float, *checks.ARRAYS)):
            continue
        got, expected = np.shape(value), shapes[name]
        fits = len(got) == len(expected) and all(e in (None, g) for g, e in zip(got, expected, strict=True))
        if not fits and len(got) > 0:
            told = str(tuple("..." if size is None else size for size in expected)).replace("'", "")
            raise ValueError(f"{name} must have shape {told}; got {got}")
        if name not in COVARIANCES or not checks.is_concrete(value):
            continue
        if len(got) == 2 and got[0] != got[1]:
            raise ValueError(f"{name} must be square; got shape {got}")
        (parameters.covariances if len(got) == 2 else parameters.at_least_zero)(name, np.asarray(value))
