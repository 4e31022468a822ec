"""The three equations of linear-Gaussian state space models: of first states, of the dynamics, of observations."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import capabilities, numerics
from ..families.linear_equation import EquationParams, Groups, LinearEquation, over_lanes
from ..latents import linear_gaussian
from ..latents.linear_gaussian import System
from ..record import fields
from ..sequences import Sequences
from .linear_gaussian_params import SHAPES, Layout, LinearGaussianSSMParams, LinearGaussianSSMStats, Terms

# name -> LinearEquation, of the initial states, the dynamics and the emissions; in this order.
Equations = dict[str, Any]


def equations_of(layout: Layout, prior: LinearGaussianSSMStats | None) -> Equations:
    """The equations as complete parts. Features: 1 of the initial states; z_(t-1), 1, u_t of the dynamics; z_t, 1, u_t
    of the emissions.

    prior: pseudo-statistics of all three, or None.
    """

    def widths(terms: Terms) -> tuple[int | None, ...]:
        return layout.states, int(terms.bias), None if terms.inputs else 0

    found = {
        "initial": LinearEquation(noise=SHAPES["full"], widths=(1,)),
        "dynamics": LinearEquation(noise=SHAPES["full"], widths=widths(layout.dynamics)),
        "emission": LinearEquation(noise=layout.noise, widths=widths(layout.emission)),
    }
    pseudo = dict.fromkeys(found) if prior is None else fields(prior)
    return {
        name: capabilities.complete("part", dataclasses.replace(equation, prior=pseudo[name]))
        for name, equation in found.items()
    }


def groups(
    *,
    initial_mean: Any = None,
    dynamics: Any = None,
    dynamics_bias: Any = None,
    dynamics_inputs: Any = None,
    emission: Any = None,
    emission_bias: Any = None,
    emission_inputs: Any = None,
) -> dict[str, Groups]:
    """The coefficients of every equation by groups of features, what is not given as None."""
    return {
        "initial": (_column(initial_mean),),
        "dynamics": (dynamics, _column(dynamics_bias), dynamics_inputs),
        "emission": (emission, _column(emission_bias), emission_inputs),
    }


def _column(vector: Any) -> Any:
    """A vector (O,) as coefficients (O, 1) of the feature 1; None and single numbers stay as they are."""
    return vector if vector is None or np.ndim(vector) == 0 else vector[..., None]


def split(params: LinearGaussianSSMParams) -> dict[str, EquationParams]:
    """The parameters of every equation."""
    values = fields(params)
    covariances = {name: values.pop(f"{name}_covariance") for name in ("initial", "dynamics", "emission")}
    return {
        name: EquationParams(coefficients=tuple(coefficients), covariance=covariances[name])
        for name, coefficients in groups(**values).items()
    }


def join(initial: EquationParams, dynamics: EquationParams, emission: EquationParams) -> LinearGaussianSSMParams:
    """Inverse of `split`."""

    def vector(column: Any) -> Any:
        return None if column is None else column[..., 0]

    mean: Any
    matrix: Any
    loadings: Any
    (mean,) = initial.coefficients
    (matrix, bias, inputs), (loadings, offset, direct) = dynamics.coefficients, emission.coefficients
    return LinearGaussianSSMParams(
        initial_mean=vector(mean),
        initial_covariance=initial.covariance,
        dynamics=matrix,
        dynamics_covariance=dynamics.covariance,
        emission=loadings,
        emission_covariance=emission.covariance,
        dynamics_bias=vector(bias),
        emission_bias=vector(offset),
        dynamics_inputs=inputs,
        emission_inputs=direct,
    )


def system(params: LinearGaussianSSMParams, inputs: jax.Array | None, steps: int) -> System:
    """The system over `steps` steps, with inputs (B or 1, T, U), or None."""

    def shift(bias: jax.Array | None, weights: jax.Array | None, like: jax.Array) -> jax.Array:
        total = jnp.zeros((1, steps, len(like)), like.dtype)
        if bias is not None:
            total = total + bias[None, None]
        if weights is not None and inputs is not None:
            total = total + numerics.product(inputs, weights, "btu,iu->bti")
        return total

    plain = params.emission_bias is None and params.emission_inputs is None
    return System(
        initial_mean=params.initial_mean,
        initial_covariance=params.initial_covariance,
        dynamics=params.dynamics,
        dynamics_covariance=params.dynamics_covariance,
        dynamics_shift=shift(params.dynamics_bias, params.dynamics_inputs, params.dynamics),
        emission=params.emission,
        emission_covariance=params.emission_covariance,
        emission_shift=None if plain else shift(params.emission_bias, params.emission_inputs, params.emission),
    )


def expected_stats(
    equations: Equations,
    x: Sequences,
    inputs: jax.Array | None,
    posterior: linear_gaussian.Posterior,
    weights: jax.Array | None,
) -> LinearGaussianSSMStats:
    """Expected statistics, about the parameters that the posterior was inferred at."""
    states = posterior.states
    ones = jnp.ones_like(states[:, :1])
    inputs = None if inputs is None else jnp.moveaxis(inputs, 0, -1)
    noises = (posterior.initial, posterior.dynamics, posterior.emission)
    features: tuple[Groups, ...] = (
        (ones[: len(posterior.initial.means)],),
        (states[:-1], ones[1:], None if inputs is None else inputs[1:]),
        (states, ones, inputs),
    )
    found = [
        equation.stats(at, equation.features(groups), noise, weights)
        for equation, at, groups, noise in zip(
            equations.values(), split(posterior.params).values(), features, noises, strict=True
        )
    ]
    loglik = over_lanes(posterior.log_prob, weights, x.num_rows)
    if posterior.white:  # then log_prob lacks -|noise|² / 2, which the statistics of the equations return
        loglik = loglik - 0.5 * (found[0][1] + found[1][1] + found[2][1])
    (initial, _), (dynamics, _), (emission, _) = found
    return LinearGaussianSSMStats(initial=initial, dynamics=dynamics, emission=emission, loglik=loglik)


def pseudo_stats(
    equations: Equations, params: LinearGaussianSSMParams, num_steps: Any, num_sequences: Any
) -> LinearGaussianSSMStats:
    """Pseudo-statistics of `num_steps` steps and `num_sequences` sequences, whose Q has its maximum at `params`."""
    mean, states = params.initial_mean, len(params.initial_mean)

    def gram(equation: LinearEquation, line: jax.Array) -> jax.Array:
        found = jnp.eye(line.shape[1], dtype=mean.dtype)
        found = found.at[:states, :states].set(params.initial_covariance + mean[:, None] * mean[None])
        if equation.widths[1]:
            found = found.at[states, :states].set(mean).at[:states, states].set(mean)
        return found

    steps, begins = (jnp.asarray(count, mean.dtype) for count in (num_steps, num_sequences))
    at = split(params)
    found = {
        name: equations[name].pseudo_stats(at[name], gram(equations[name], at[name].line), steps)
        for name in ("dynamics", "emission")
    }
    initial = equations["initial"].pseudo_stats(at["initial"], jnp.ones((1, 1), mean.dtype), begins)
    return LinearGaussianSSMStats(initial=initial, **found, loglik=jnp.zeros((), mean.dtype))
