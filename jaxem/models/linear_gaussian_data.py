"""Observations and inputs of linear-Gaussian state space models: reading, and refusing."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import checks
from ..latents import linear_gaussian
from ..sequences import Sequences


def split(x: Sequences, uses_inputs: bool) -> tuple[jax.Array, jax.Array | None]:
    """Observations (B, T, D), and inputs (B, T, U) or None; TypeError or ValueError for data of another form."""
    pair = isinstance(x.values, (tuple, list))
    if uses_inputs and not (pair and len(x.values) == 2):
        raise TypeError("x must be a pair (observations, inputs), since the model has inputs")
    if pair and not uses_inputs:
        raise TypeError(
            "x must be an array, since the model has no inputs; got a pair. Set dynamics_inputs=True or "
            "emission_inputs=True, or leave the inputs out"
        )
    parts = [leaf[..., None] if leaf.ndim == 2 else leaf for leaf in jax.tree.leaves(x.values)]
    for leaf in parts:
        if leaf.ndim != 3 or leaf.shape[2] == 0:
            raise ValueError(
                f"x must hold arrays (T,), (T, D) or (B, T, D), with at least one column; got shape {leaf.shape}"
            )
    return parts[0], (parts[1] if uses_inputs else None)


def check(x: Sequences, uses_inputs: bool, missing: bool) -> None:
    """Raise for observations and inputs that are not finite, but for NaN where it may mean a missing observation."""
    observations, inputs = split(x, uses_inputs)
    if not checks.is_concrete(x):
        return
    with jax.ensure_compile_time_eval():  # concrete data are read even while something else is traced
        inside = np.asarray(x.inside())
    remedy = (
        "A missing observation is NaN: mark it so"
        if missing
        else "Leave missing=False out, to have NaN taken as missing"
    )
    _finite("observations", observations, inside, missing, remedy)
    if inputs is not None:
        _finite("inputs", inputs, inside, False, "Fill it in")
    checks.observed_columns("x", np.isnan(np.asarray(observations, float)[inside]))


def _finite(name: str, values: Any, inside: np.ndarray, missing: bool, remedy: str) -> None:
    if not jnp.issubdtype(values.dtype, jnp.floating):
        return
    values = np.asarray(values)
    bad = (np.isinf(values) if missing else ~np.isfinite(values)) & inside[..., None]
    if np.any(bad):
        row, step, column = np.argwhere(bad)[0]
        raise ValueError(
            f"x: {name} must be finite; got {values[row, step, column]} in sequence {row}, step {step}, "
            f"column {column}. {remedy}"
        )


def column_moments(x: Sequences, weights: jax.Array | None, centred: bool) -> tuple[jax.Array, jax.Array]:
    """Means (D,) of the observations' columns, and variances (mean squares, if not `centred`); 1 in place of 0."""
    there = linear_gaussian.seen_entries(x).astype(x.values.dtype)
    values = jnp.where(there > 0, x.values, 0)
    if weights is not None:
        there = there * weights.astype(there.dtype)[:, None, None]
    count = jnp.maximum(jnp.sum(there, axis=(0, 1)), 1)
    mean = jnp.sum(there * values, axis=(0, 1)) / count
    centre = mean if centred else jnp.zeros_like(mean)
    variance = jnp.sum(there * jnp.square(values - centre[None, None]), axis=(0, 1)) / count
    return mean, jnp.where(variance > 0, variance, 1)


def future_inputs(inputs: Any, uses_inputs: bool, lanes: int, steps: int, dtype: Any) -> jax.Array | None:
    """Inputs (B or 1, steps, U) of steps without observations; TypeError or ValueError for another form."""
    if not uses_inputs:
        if inputs is not None:
            raise TypeError("inputs must be left out, since the model has none")
        return None
    if inputs is None:
        raise TypeError(f"inputs must be given for the {steps} steps, since the model has inputs")
    inputs = checks.array("inputs", inputs).astype(dtype)
    inputs = inputs[None] if inputs.ndim == 2 else inputs
    if inputs.ndim != 3 or inputs.shape[0] not in (1, lanes) or inputs.shape[1] != steps:
        raise ValueError(f"inputs must have shape ({steps}, U) or ({lanes}, {steps}, U); got {inputs.shape}")
    return inputs


def without_absent(x: Sequences, weights: jax.Array | None) -> Sequences:
    """The data with sequences of weight 0 filled with 0: these are absent, whatever they hold."""
    if weights is None:
        return x
    counts = weights > 0
    values = jax.tree.map(lambda leaf: jnp.where(counts.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, 0), x.values)
    return Sequences(values, x.lengths, x.ids, x.num_sequences, x.complete)
