"""Linear dynamical systems with Gaussian noise; data are sequences."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import checks, numerics, parameters, seeding, sequences, tree
from ..capabilities import complete, completed
from ..latents import Exact, linear_gaussian
from ..latents.linear_gaussian import Forecast, StateMoments, SteadyState
from ..parts import assembly
from ..protocols import Data
from ..record import record, static
from ..sequences import Sequences
from ..slots import Expect
from . import linear_gaussian_data as data
from .linear_gaussian_equations import equations_of, expected_stats, groups, join, pseudo_stats, split, system
from .linear_gaussian_params import COVARIANCES, SHAPES, Layout, Terms, check_held, params_like, random_start
from .linear_gaussian_params import LinearGaussianSSMParams as LinearGaussianSSMParams
from .linear_gaussian_params import LinearGaussianSSMStats as LinearGaussianSSMStats


@completed("model")
@record(kw_only=False)
class LinearGaussianSSM:
    """Linear dynamics of a hidden state, observed linearly, with Gaussian noise in both.

    state_size: S, how many numbers the state has.
    covariance: the shape of the observation noise, "full" or "diag".
    dynamics_bias, emission_bias: whether there are constant terms.
    dynamics_inputs, emission_inputs: whether known inputs u_t enter the state and the observation of their own step.
    missing: False promises that no observation is NaN, and saves compiling for it.
    parallel: whether all time steps are taken at once, by an associative scan of depth log T, for accelerators. The
        result is the same up to some ten times the rounding of the sequential recursions.
    prior: pseudo-statistics, as `pseudo_steps` makes them.

    Data are observations (T,) or (T, D) of one sequence, (B, T, D) of several, or `Sequences` of any lengths; with
    inputs they are a pair (observations, inputs (T, U) or (B, T, U)). NaN is a missing observation, by entry or of
    whole steps. Row weights count sequences: 2 is the sequence twice.
    Parameters are determined up to an invertible change of the state's coordinates, unless some are held by `Fixed`.
    Source: Shumway & Stoffer (1982), An approach to time series smoothing and forecasting using the EM algorithm, J.
    Time Series Analysis 3; Ghahramani & Hinton (1996), Parameter estimation for linear dynamical systems.
    Raises TypeError or ValueError for a state_size that is not a whole number of at least 1, or an unknown covariance.
    """

    state_size: int = static()
    covariance: str = static(default="full", kw_only=True)
    dynamics_bias: bool = static(default=False, kw_only=True)
    emission_bias: bool = static(default=False, kw_only=True)
    dynamics_inputs: bool = static(default=False, kw_only=True)
    emission_inputs: bool = static(default=False, kw_only=True)
    missing: bool = static(default=True, kw_only=True)
    parallel: bool = static(default=False, kw_only=True)
    prior: LinearGaussianSSMStats | None = dataclasses.field(default=None, kw_only=True)

    separable = COVARIANCES

    def __post_init__(self) -> None:
        checks.positive_integer("state_size", self.state_size)
        checks.choice("covariance", self.covariance, SHAPES)

    @property
    def layout(self) -> Layout:
        """What the system consists of."""
        return Layout(
            states=self.state_size,
            dynamics=Terms(bias=self.dynamics_bias, inputs=self.dynamics_inputs),
            emission=Terms(bias=self.emission_bias, inputs=self.emission_inputs),
            noise=SHAPES[self.covariance],
        )

    @property
    def parts(self) -> dict[str, Any]:
        """The linear equations of the first state, of the dynamics and of the observations."""
        return equations_of(self.layout, self.prior)

    def part_params(self, params: LinearGaussianSSMParams) -> dict[str, Any]:
        """The parameters of every equation."""
        return split(params)

    def params_of(self, values: dict[str, Any]) -> LinearGaussianSSMParams:
        """Parameters from those of every equation."""
        return join(**values)

    part_statistics, with_part_statistics = assembly.part_statistics, assembly.with_part_statistics
    m_step, q_function, log_prior, rebase = assembly.surrogate
    constrain = assembly.constrain

    def units(self, x: Data) -> Sequences:
        """The data as `Sequences`: an axis of independent sequences first."""
        return sequences.as_sequences(x)

    @seeding.start()
    @jax.jit
    def init(self, key: jax.Array, x: Data, weights: jax.Array | None = None) -> LinearGaussianSSMParams:
        """A random start (pure in `key`, so `vmap` over keys gives many).

        Independent states of unit variance that decay at different rates, and random emissions that explain half of
        the observations' variance (of their mean square, where there is no emission bias to take the mean).
        """
        x, inputs = self._read(data.without_absent(x, weights))
        mean, variance = data.column_moments(x, weights, centred=self.emission_bias)
        return random_start(key, params_like(self.layout, x.values, inputs), mean, variance)

    def infer(self, params: LinearGaussianSSMParams, x: Data, expect: Expect = Exact()) -> Any:
        """The posterior of states and missing entries, in moments (`latents.linear_gaussian.Posterior`), or under
        Sample(n) n paths of states drawn from it (`DrawnPaths`).

        Missing entries of a partly observed step are latent too, and the posterior has their moments; a step without
        any observed entry adds to the statistics of the dynamics alone.
        """
        x = self.units(x)
        parameters.shapes("params", self, params, x)
        x, inputs = self._read(x)
        at = system(params, inputs, x.num_steps)
        return linear_gaussian.infer(params, at, x, expect, self.parallel)

    def statistics(
        self, params: LinearGaussianSSMParams, x: Data, posterior: Any, weights: jax.Array | None = None
    ) -> LinearGaussianSSMStats:
        """Normal equations of the three equations, expected under a posterior, and the sum of its evidence."""
        x, inputs = self._read(self.units(x))
        if weights is not None:
            weights = weights.astype(x.values.dtype)
        # These statistics are about the parameters that the posterior was inferred at, not always `params`.
        stats = posterior.average(lambda moments: expected_stats(self.parts, x, inputs, moments, weights))
        return stats if posterior.params is params else self.rebase(stats, params)

    def e_step(
        self, params: LinearGaussianSSMParams, x: Data, weights: jax.Array | None = None, expect: Expect = Exact()
    ) -> LinearGaussianSSMStats:
        """Expected statistics, with the sum of log p(x) over the sequences; see `infer` and `statistics`."""
        x = data.without_absent(self.units(x), weights)
        return self.statistics(params, x, complete("expect", expect).posterior(self, params, x), weights)

    def m_step_given(
        self,
        stats: LinearGaussianSSMStats,
        *,
        initial_mean: jax.Array | None = None,
        dynamics: jax.Array | None = None,
        dynamics_bias: jax.Array | None = None,
        dynamics_inputs: jax.Array | None = None,
        emission: jax.Array | None = None,
        emission_bias: jax.Array | None = None,
        emission_inputs: jax.Array | None = None,
    ) -> LinearGaussianSSMParams:
        """The M-step over all others, where some coefficients are held at these values."""
        held = groups(
            initial_mean=initial_mean,
            dynamics=dynamics,
            dynamics_bias=dynamics_bias,
            dynamics_inputs=dynamics_inputs,
            emission=emission,
            emission_bias=emission_bias,
            emission_inputs=emission_inputs,
        )
        of = self.part_statistics(stats)
        return self.params_of({name: part.m_step(of[name], held[name]) for name, part in self.parts.items()})

    def blocks(self, params: LinearGaussianSSMParams) -> tuple[str, ...]:
        """Names of parameters with a conditional M-step of their own: all that there are."""
        return tuple(name for name, value in vars(params).items() if value is not None)

    def m_step_for(
        self, params: LinearGaussianSSMParams, stats: LinearGaussianSSMStats, names: tuple[str, ...]
    ) -> LinearGaussianSSMParams:
        """The M-step over the named blocks alone, all other parameters held where they are."""
        held = {name: value for name, value in vars(params).items() if value is not None and name not in names}
        covariances = {name: held.pop(name) for name in self.separable if name in held}
        return dataclasses.replace(self.m_step_given(stats, **held), **covariances)

    def degenerate(self, stats: LinearGaussianSSMStats, held: tuple[str, ...] = ()) -> jax.Array:
        """Whether (1,) the observations' noise collapsed: some combination of columns is predicted without error."""
        if "emission_covariance" in held:
            return jnp.zeros(1, bool)
        emission, names = self.parts["emission"], ("emission", "emission_bias", "emission_inputs")
        current = zip(names, emission.coefficients(stats.emission.line), strict=True)
        lines = [part if name in held else None for name, part in current]
        return emission.degenerate(stats.emission, lines).reshape(1)

    def pseudo_steps(
        self, params: LinearGaussianSSMParams, num_steps: Any = 1.0, num_sequences: Any = 1.0
    ) -> LinearGaussianSSMStats:
        """Pseudo-statistics for `prior`: of num_steps steps and num_sequences sequences that `params` fit best.

        Their states have the moments of the first state, and their inputs mean 0 and unit variance. As a prior: a
        matrix normal inverse-Wishart of each equation, with its mode at `params`.
        """
        for name, value in {"num_steps": num_steps, "num_sequences": num_sequences}.items():
            if checks.is_known(value) and not np.all(np.asarray(value) > 0):
                raise ValueError(f"{name} must be above 0; got {value}")
        return pseudo_stats(self.parts, params, num_steps, num_sequences)

    @parameters.at_rows
    def log_prob(self, params: LinearGaussianSSMParams, x: Data) -> jax.Array:
        """Log-likelihood log p(x) of every sequence: (B,), or (num_sequences,) where they are packed."""
        # `units` is called outside jit, where it finds out of concrete data whether any entry is missing.
        return self._log_prob(params, self.units(x))

    @jax.jit
    def _log_prob(self, params: LinearGaussianSSMParams, x: Sequences) -> jax.Array:
        x, inputs = self._read(x)
        return linear_gaussian.log_prob(system(params, inputs, x.num_steps), x, self.parallel)

    @parameters.at_rows
    def filter(self, params: LinearGaussianSSMParams, x: Data) -> StateMoments:
        """p(z_t | x_1..t): means (T, S), covariances (T, S, S) of one sequence, (B, T, ...) of several."""
        return self._moments(params, self.units(x), smooth=False, one=sequences.is_one(x))

    @parameters.at_rows
    def smooth(self, params: LinearGaussianSSMParams, x: Data) -> StateMoments:
        """p(z_t | x_1..T): means (T, S), covariances (T, S, S) of one sequence, (B, T, ...) of several."""
        return self._moments(params, self.units(x), smooth=True, one=sequences.is_one(x))

    posterior = smooth

    @functools.partial(jax.jit, static_argnames=("smooth", "one"))
    def _moments(self, params: LinearGaussianSSMParams, x: Sequences, smooth: bool, one: bool) -> StateMoments:
        x, inputs = self._read(x)
        moments = linear_gaussian.smoothed_moments if smooth else linear_gaussian.filtered_moments
        means, covariances = moments(system(params, inputs, x.num_steps), x, self.parallel)
        found = linear_gaussian.by_sequence(x, means, covariances)
        return jax.tree.map(lambda leaf: leaf[0], found) if one else found

    @parameters.at_rows
    def forecast(
        self, params: LinearGaussianSSMParams, x: Data, steps: int, inputs: jax.Array | None = None
    ) -> Forecast:
        """States and observations of the next `steps` steps after the end of every sequence.

        inputs (steps, U), or (B, steps, U): those of the steps ahead, where the model has inputs. Of packed
        sequences every one has its own forecast: the leading axis is num_sequences.
        """
        checks.positive_integer("steps", steps)
        return self._forecast(params, self.units(x), inputs, steps=steps, one=sequences.is_one(x))

    @functools.partial(jax.jit, static_argnames=("steps", "one"))
    def _forecast(
        self, params: LinearGaussianSSMParams, x: Sequences, inputs: jax.Array | None, steps: int, one: bool
    ) -> Forecast:
        x, past = self._read(x)
        moments = linear_gaussian.filtered_moments(system(params, past, x.num_steps), x, self.parallel)
        means, covariances = linear_gaussian.last_moments(x, *moments)
        inputs = data.future_inputs(inputs, self.layout.uses_inputs, len(means), steps, means.dtype)
        found = linear_gaussian.forecast(system(params, inputs, steps), means, covariances)
        return jax.tree.map(lambda leaf: leaf[0], found) if one else found

    def sample(
        self,
        key: jax.Array,
        params: LinearGaussianSSMParams,
        num_steps: int,
        num_sequences: int | None = None,
        inputs: jax.Array | None = None,
    ) -> jax.Array:
        """Observations (num_steps, D) of one sequence, or (num_sequences, num_steps, D). `sample_with_states`
        returns the states too. inputs (num_steps, U), or (num_sequences, num_steps, U), where the model has inputs."""
        return self.sample_with_states(key, params, num_steps, num_sequences, inputs)[0]

    def sample_with_states(
        self,
        key: jax.Array,
        params: LinearGaussianSSMParams,
        num_steps: int,
        num_sequences: int | None = None,
        inputs: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Observations, and the states (num_steps, S), or (num_sequences, num_steps, S), behind them."""
        checks.positive_integer("num_steps", num_steps)
        count = 1 if num_sequences is None else num_sequences
        checks.positive_integer("num_sequences", count)
        inputs = data.future_inputs(inputs, self.layout.uses_inputs, count, num_steps, params.emission.dtype)
        x, path = linear_gaussian.sample(system(params, inputs, num_steps), checks.random_key(key), count)
        return (x, path) if num_sequences is not None else (x[0], path[0])

    @jax.jit
    def steady_state(self, params: LinearGaussianSSMParams) -> SteadyState:
        """The limit of the filter's covariances: the solution of the discrete algebraic Riccati equation.

        Meaningless where an unstable state is not observed (not detectable): then there is no limit.
        """
        return linear_gaussian.steady_state(system(params, None, 1))

    def num_parameters(self, params: LinearGaussianSSMParams) -> int:
        """Free numbers in the parameters, with the state_size² that only choose the state's coordinates."""
        return tree.size(jax.eval_shape(self.unconstrain, params))

    def sample_size(self, x: Data, weights: jax.Array | None = None) -> jax.Array:
        """What information criteria count: the steps of all sequences."""
        x = self.units(x)
        steps = jnp.sum(x.inside(), axis=1).astype(tree.float_dtype(x.values))
        return numerics.weighted_sum(steps, weights)

    def unconstrain(self, params: LinearGaussianSSMParams) -> LinearGaussianSSMParams:
        """Covariances in log-Cholesky coordinates, diagonal ones by logarithms; the rest as it is."""
        values = split(params)
        return join(**{name: part.unconstrain(values[name]) for name, part in self.parts.items()})

    def check(self, x: Data, weights: jax.Array | None = None) -> None:
        """Raise ValueError or TypeError for bad data, by name. Under jit only shapes are looked at."""
        data.check(sequences.check(x, weights), self.layout.uses_inputs, self.missing)

    def params_like(self, x: Data) -> LinearGaussianSSMParams:
        """The shapes that parameters have for such data."""
        x = self.units(x)
        observations, inputs = data.split(x, self.layout.uses_inputs)
        return params_like(self.layout, parameters.like(observations.shape, tree.float_dtype(x.values)), inputs)

    @property
    def supports(self) -> parameters.Supports:
        """Where the values of parameters lie."""
        return {f"{name}_covariance": part.noise.support for name, part in self.parts.items()}

    def check_held(self, values: dict[str, Any]) -> None:
        """Raise ValueError for values to be held fixed that the model has none of, or that cannot be."""
        check_held(values, self.layout)

    def floats_per_row(self, params: LinearGaussianSSMParams, x: Data) -> int:
        """Temporaries of an E-step, in numbers a sequence."""
        x = self.units(x)
        width, states = params.emission.shape
        a_step = 4 * (width + states)
        missing = self.missing and not x.complete
        if missing or x.lengths is not None:
            a_step += 8 * states**2 + (3 * width**2 if self.covariance == "full" and missing else 0)
        return x.num_steps * a_step

    def _read(self, x: Sequences) -> tuple[Sequences, jax.Array | None]:
        """Observations alone as sequences, in one floating dtype, and inputs (B, T, U)."""
        observations, inputs = data.split(x, self.layout.uses_inputs)
        dtype = tree.float_dtype(x.values)
        if inputs is not None:
            inputs = jnp.where(x.inside()[..., None], inputs.astype(dtype), 0)
        complete = x.complete if self.missing else True
        return dataclasses.replace(x, values=observations.astype(dtype), complete=complete), inputs
