"""Linear dynamical systems with Gaussian noise, their data sequences."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import checks, numerics, parameters, sequences, tree
from ..families import covariance, linear_equation
from ..families.linear_equation import EquationStats
from ..latents import Exact, Sample, lanewise, linear_gaussian, steady, whitening
from ..latents.linear_gaussian import Transition
from ..protocols import Data
from ..record import record, static
from ..sequences import Sequences

_SHAPES: dict[str, covariance.Full | covariance.Diagonal] = {"full": covariance.Full(), "diag": covariance.Diagonal()}
_DYNAMICS = ("dynamics", "dynamics_bias", "dynamics_inputs")
_EMISSION = ("emission", "emission_bias", "emission_inputs")
_COVARIANCES = ("initial_covariance", "dynamics_covariance", "emission_covariance")


@record
class LinearGaussianSSMParams:
    """z_1 ~ N(initial_mean, initial_covariance); z_t = dynamics z_(t-1) + dynamics_bias + dynamics_inputs u_t + w_t;
    y_t = emission z_t + emission_bias + emission_inputs u_t + v_t.

    initial_mean (S,); initial_covariance, dynamics, dynamics_covariance (S, S); emission (D, S); emission_covariance
    (D, D), or (D,) where it is diagonal; dynamics_bias (S,), emission_bias (D,), dynamics_inputs (S, U),
    emission_inputs (D, U): None where the model does not have them.
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
    """Of the first states (their one feature is 1), of the dynamics (features z_(t-1), 1, u_t) and of the observations
    (features z_t, 1, u_t); and the log-likelihood. All add."""

    initial: EquationStats
    dynamics: EquationStats
    emission: EquationStats
    loglik: jax.Array


@record
class StateMoments:
    """Means (T, S) and covariances (T, S, S) of the states of one sequence, (B, T, ...) of several; 0 in padding."""

    means: jax.Array
    covariances: jax.Array


@record
class SteadyState:
    """In the long run: covariances (S, S) of the state before (predicted) and after (filtered) it is observed, and the
    gain (S, D) that observations then have."""

    predicted: jax.Array
    filtered: jax.Array
    gain: jax.Array


@record
class Forecast:
    """Steps after the end: means (H, S) and covariances (H, S, S) of the states, observation_means (H, D) and
    observation_covariances (H, D, D) of one sequence; (B, H, ...) of several."""

    means: jax.Array
    covariances: jax.Array
    observation_means: jax.Array
    observation_covariances: jax.Array


@record(kw_only=False)
class LinearGaussianSSM:
    """Linear dynamics of a hidden state of `state_size` numbers, observed linearly, Gaussian noise in both.

    covariance: of the observations' noise, "full" or "diag"; dynamics_bias, emission_bias: whether there are constant
    terms; dynamics_inputs, emission_inputs: whether known inputs u_t enter the state and the observation of their own
    step; missing: False promises that no observation is NaN, and saves compiling for it; parallel: all time steps at
    once, by an associative scan of log T depth, for accelerators: the same result up to some ten times the rounding
    of the sequential recursions; prior: pseudo-statistics, as `pseudo_steps` makes them.
    Data: observations (T,) or (T, D) of one sequence, (B, T, D) of several, or `Sequences` of any lengths; with inputs
    a pair (observations, inputs (T, U) or (B, T, U)). NaN is a missing observation, by entry or of whole steps. Row
    weights count sequences: 2 is the sequence twice.
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

    separable = _COVARIANCES
    collapses = True

    def __post_init__(self) -> None:
        checks.positive_integer("state_size", self.state_size)
        checks.choice("covariance", self.covariance, _SHAPES)

    def units(self, x: Data) -> Sequences:
        """The data as `Sequences`: an axis of independent sequences first."""
        return sequences.as_sequences(x)

    def init(self, key: jax.Array, x: Data, weights: jax.Array | None = None) -> LinearGaussianSSMParams:
        """A random start (pure in `key`, so `vmap` over keys gives many).

        Independent states of unit variance that decay at different rates, and random emissions that explain half of
        the observations' variance (of their mean square, where there is no emission bias to take the mean).
        """
        x, weights = checks.native((x, weights))
        self.check(x, weights)
        return self._init(checks.random_key(key), self.units(x), weights)

    @jax.jit
    def _init(self, key: jax.Array, x: Sequences, weights: jax.Array | None) -> LinearGaussianSSMParams:
        data = self._read(x, weights).masked()
        there = data.entries().astype(data.values.dtype)
        if data.weights is not None:
            there = there * data.weights[:, None, None]
        count = jnp.maximum(jnp.sum(there, axis=(0, 1)), 1)
        mean = jnp.sum(there * data.values, axis=(0, 1)) / count
        centre = mean if self.emission_bias else jnp.zeros_like(mean)
        variance = jnp.sum(there * jnp.square(data.values - centre), axis=(0, 1)) / count
        variance = jnp.where(variance > 0, variance, 1)
        states, width, dtype = self.state_size, mean.shape[0], mean.dtype
        key_decay, key_emission = jax.random.split(key)
        decay = jax.random.uniform(key_decay, (states,), dtype, 0.3, 0.95)
        loadings = jax.random.normal(key_emission, (width, states), dtype)
        size = jnp.sqrt(jnp.sum(jnp.square(loadings), axis=1, keepdims=True))
        inputs = 0 if data.inputs is None else data.inputs.shape[-1]
        noise = jnp.diag(variance / 2) if self.covariance == "full" else variance / 2
        return LinearGaussianSSMParams(
            initial_mean=jnp.zeros(states, dtype),
            initial_covariance=jnp.eye(states, dtype=dtype),
            dynamics=jnp.diag(decay),
            dynamics_covariance=jnp.diag(1 - jnp.square(decay)),
            emission=loadings / size * jnp.sqrt(variance / 2)[:, None],
            emission_covariance=noise,
            dynamics_bias=jnp.zeros(states, dtype) if self.dynamics_bias else None,
            emission_bias=mean if self.emission_bias else None,
            dynamics_inputs=jnp.zeros((states, inputs), dtype) if self.dynamics_inputs else None,
            emission_inputs=jnp.zeros((width, inputs), dtype) if self.emission_inputs else None,
        )

    def e_step(
        self,
        params: LinearGaussianSSMParams,
        x: Data,
        weights: jax.Array | None = None,
        expect: Any = Exact(),
    ) -> LinearGaussianSSMStats:
        """Expected normal equations of the three parts, and the sum of log p(x) over the sequences.

        Missing entries of a step that is partly observed are latent, and expected with it; a step without any
        adds to the dynamics alone. Under Sample(n) states are drawn, n paths, in place of their moments.
        """
        parameters.shapes("params", self, params, x)
        data = self._read(self.units(x), weights)
        if isinstance(expect, Exact) and expect.temperature is None:
            return self._either(self._together, self._separately, params, data)
        if not isinstance(expect, Sample):
            raise TypeError(f"expect must be Exact() or Sample(n) for linear-Gaussian states; got {expect!r}")
        return self._sampled(params, data.masked(), expect)

    def m_step(self, stats: LinearGaussianSSMStats) -> LinearGaussianSSMParams:
        """Least squares in each of the three parts, and the mean outer product of what is left."""
        return self.m_step_given(stats)

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
        states, width = stats.dynamics.square.shape[0], stats.emission.square.shape[0]
        first = None if initial_mean is None else jnp.reshape(initial_mean, (-1, 1))
        line, initial_covariance, _ = self._estimate("initial", stats.initial, [(1, first)])
        names, given = _DYNAMICS, (dynamics, dynamics_bias, dynamics_inputs)
        moves, dynamics_covariance, _ = self._estimate(
            "dynamics", stats.dynamics, self._held(names, given, stats.dynamics, states)
        )
        names, given = _EMISSION, (emission, emission_bias, emission_inputs)
        looks, emission_covariance, _ = self._estimate(
            "emission", stats.emission, self._held(names, given, stats.emission, width)
        )
        return LinearGaussianSSMParams(
            initial_mean=line[:, 0],
            initial_covariance=initial_covariance,
            dynamics_covariance=dynamics_covariance,
            emission_covariance=emission_covariance,
            **self._parted(_DYNAMICS, moves),
            **self._parted(_EMISSION, looks),
        )

    def blocks(self, params: LinearGaussianSSMParams) -> tuple[str, ...]:
        """Names of parameters with a conditional M-step of their own: all that there are."""
        names = (field.name for field in dataclasses.fields(params))
        return tuple(name for name in names if getattr(params, name) is not None)

    def m_step_for(
        self, params: LinearGaussianSSMParams, stats: LinearGaussianSSMStats, names: tuple[str, ...]
    ) -> LinearGaussianSSMParams:
        """The M-step over the named blocks alone, all other parameters held where they are."""
        held = {name: getattr(params, name) for name in self.blocks(params) if name not in names}
        lines = {name: value for name, value in held.items() if name not in _COVARIANCES}
        covariances = {name: value for name, value in held.items() if name in _COVARIANCES}
        return dataclasses.replace(self.m_step_given(stats, **lines), **covariances)

    def degenerate(self, stats: LinearGaussianSSMStats, held: tuple[str, ...] = ()) -> jax.Array:
        """Whether (1,) the observations' noise collapsed: some combination of columns is predicted without error."""
        if "emission_covariance" in held:
            return jnp.zeros(1, bool)
        current = self._parted(_EMISSION, stats.emission.reference / stats.emission.count)
        given = tuple(current[name] if name in held else None for name in _EMISSION)
        groups = self._held(_EMISSION, given, stats.emission, stats.emission.square.shape[0])
        return self._estimate("emission", stats.emission, groups)[2].reshape(1)

    def q_function(self, params: LinearGaussianSSMParams, stats: LinearGaussianSSMStats) -> jax.Array:
        """Expected log-density of states and observations; covariances must be positive definite."""
        full, noise = _SHAPES["full"], _SHAPES[self.covariance]
        return (
            linear_equation.score(full, params.initial_mean[:, None], params.initial_covariance, stats.initial)
            + linear_equation.score(full, self._line(_DYNAMICS, params), params.dynamics_covariance, stats.dynamics)
            + linear_equation.score(noise, self._line(_EMISSION, params), params.emission_covariance, stats.emission)
        )

    def log_prior(self, params: LinearGaussianSSMParams) -> jax.Array:
        """Q of the pseudo-statistics, up to a constant; 0 without any."""
        zero = jnp.zeros((), params.dynamics.dtype)
        return zero if self.prior is None else self.q_function(params, self.prior)

    def pseudo_steps(
        self,
        params: LinearGaussianSSMParams,
        num_steps: jax.Array | float = 1.0,
        num_sequences: jax.Array | float = 1.0,
    ) -> LinearGaussianSSMStats:
        """Pseudo-statistics, as `prior` takes them: so many steps and sequences of which `params` is the best fit.

        Their states spread as the first state does, and their inputs are of unit variance. Matrix normal
        inverse-Wishart priors of the three parts, with the mode at `params`.
        """
        checks_ = {"num_steps": num_steps, "num_sequences": num_sequences}
        for name, value in checks_.items():
            if checks.is_known(value) and not np.all(np.asarray(value) > 0):
                raise ValueError(f"{name} must be above 0; got {value}")
        mean = params.initial_mean
        moment = params.initial_covariance + mean[:, None] * mean

        def equation(line: jax.Array, noise: jax.Array, names: tuple[str, ...], count: Any) -> EquationStats:
            count = jnp.asarray(count, mean.dtype)
            size = line.shape[1]
            gram = jnp.eye(size, dtype=mean.dtype)
            if names:
                states = self.state_size
                gram = gram.at[:states, :states].set(moment)
                if getattr(self, names[1]):
                    gram = gram.at[states, :states].set(mean).at[:states, states].set(mean)
            return EquationStats(
                count=count, reference=count * line, gram=count * gram,
                cross=jnp.zeros((size, line.shape[0]), mean.dtype), square=count * noise,
            )  # fmt: skip

        return LinearGaussianSSMStats(
            initial=equation(mean[:, None], params.initial_covariance, (), num_sequences),
            dynamics=equation(self._line(_DYNAMICS, params), params.dynamics_covariance, _DYNAMICS, num_steps),
            emission=equation(self._line(_EMISSION, params), params.emission_covariance, _EMISSION, num_steps),
            loglik=jnp.zeros((), mean.dtype),
        )

    def rebase(self, stats: LinearGaussianSSMStats, params: LinearGaussianSSMParams) -> LinearGaussianSSMStats:
        """The same statistics about the lines of `params`, exactly."""
        return dataclasses.replace(
            stats,
            initial=linear_equation.about(stats.initial, params.initial_mean[:, None]),
            dynamics=linear_equation.about(stats.dynamics, self._line(_DYNAMICS, params)),
            emission=linear_equation.about(stats.emission, self._line(_EMISSION, params)),
        )

    @parameters.at_rows
    def log_prob(self, params: LinearGaussianSSMParams, x: Data) -> jax.Array:
        """Log-likelihood log p(x) of every sequence: (B,), or (num_sequences,) where they are packed."""
        # Units are read outside of what is compiled: of concrete data they tell whether anything is missing.
        return self._log_prob(params, self.units(x))

    @jax.jit
    def _log_prob(self, params: LinearGaussianSSMParams, x: Sequences) -> jax.Array:
        def shared(params: LinearGaussianSSMParams, data: _Data) -> jax.Array:
            transition, white = self._white(params, data)
            return steady.shared_log_prob(
                transition, white.matrix, white.compressed, white.constant(), parallel=self.parallel
            ).T

        def apart(params: LinearGaussianSSMParams, data: _Data) -> jax.Array:
            return self._apart(params, data)[2].log_prob.T

        return x.per_sequence(self._either(shared, apart, params, self._read(x, None)))

    @parameters.at_rows
    def filter(self, params: LinearGaussianSSMParams, x: Data) -> StateMoments:
        """p(z_t | x_1..t): means (T, S), covariances (T, S, S) of one sequence, (B, T, ...) of several."""
        return self._filter(params, self.units(x), one=sequences.is_one(x))

    @functools.partial(jax.jit, static_argnames="one")
    def _filter(self, params: LinearGaussianSSMParams, x: Sequences, one: bool) -> StateMoments:
        data = self._read(x, None)
        return _by_step(data, one, *self._filtered_moments(params, data))

    @parameters.at_rows
    def smooth(self, params: LinearGaussianSSMParams, x: Data) -> StateMoments:
        """p(z_t | x_1..T): means (T, S), covariances (T, S, S) of one sequence, (B, T, ...) of several."""
        return self._smooth(params, self.units(x), one=sequences.is_one(x))

    @functools.partial(jax.jit, static_argnames="one")
    def _smooth(self, params: LinearGaussianSSMParams, x: Sequences, one: bool) -> StateMoments:
        data = self._read(x, None)

        def shared(params: LinearGaussianSSMParams, data: _Data) -> tuple[jax.Array, jax.Array]:
            transition, white = self._white(params, data)
            return _alike(*steady.shared_smoother(transition, white.matrix, white.compressed, parallel=self.parallel))

        def apart(params: LinearGaussianSSMParams, data: _Data) -> tuple[jax.Array, jax.Array]:
            transition, _, filtered = self._apart(params, data)
            smoothed = linear_gaussian.smoothed(transition, filtered, self.parallel)
            return smoothed.means, smoothed.covariances

        return _by_step(data, one, *self._either(shared, apart, params, data))

    posterior = smooth

    @parameters.at_rows
    def forecast(
        self, params: LinearGaussianSSMParams, x: Data, steps: int, inputs: jax.Array | None = None
    ) -> Forecast:
        """States and observations of the next `steps` steps after the end of every sequence.

        inputs (steps, U), or (B, steps, U): those of the steps ahead, where the model has inputs. Packed sequences are
        told apart: the leading axis is num_sequences.
        """
        checks.positive_integer("steps", steps)
        return self._forecast(params, self.units(x), inputs, steps=steps, one=sequences.is_one(x))

    @functools.partial(jax.jit, static_argnames=("steps", "one"))
    def _forecast(
        self, params: LinearGaussianSSMParams, x: Sequences, inputs: jax.Array | None, steps: int, one: bool
    ) -> Forecast:
        means, covariances = _ends(x, *self._filtered_moments(params, self._read(x, None)))
        lanes = means.shape[0]
        shifts, offsets = self._ahead(params, inputs, lanes, steps, means.dtype)

        def step(carry: tuple[jax.Array, jax.Array], shift: jax.Array) -> tuple[tuple[jax.Array, jax.Array], tuple]:
            mean, covariance = carry
            mean = numerics.product(mean, params.dynamics, "bj,ij->bi") + shift
            half = numerics.product(params.dynamics, covariance, "ij,bjk->bik")
            covariance = numerics.product(half, params.dynamics, "bik,lk->bil") + params.dynamics_covariance
            return (mean, covariance), (mean, covariance)

        _, (ahead, spread) = jax.lax.scan(step, (means, covariances), shifts)
        ahead, spread = jnp.moveaxis(ahead, 0, 1), jnp.moveaxis(spread, 0, 1)
        half = numerics.product(params.emission, spread, "ds,btsr->btdr")
        noise = _SHAPES[self.covariance].matrix(params.emission_covariance, params.emission.shape[0])
        result = Forecast(
            means=ahead,
            covariances=spread,
            observation_means=numerics.product(ahead, params.emission, "bts,ds->btd") + offsets,
            observation_covariances=numerics.product(half, params.emission, "btdr,er->btde") + noise,
        )
        return jax.tree.map(lambda leaf: leaf[0], result) if one else result

    def sample(
        self,
        key: jax.Array,
        params: LinearGaussianSSMParams,
        num_steps: int,
        num_sequences: int | None = None,
        inputs: jax.Array | None = None,
    ) -> jax.Array:
        """Observations (num_steps, D) of one sequence, or (num_sequences, num_steps, D). `sample_with_states` tells
        the states too. inputs (num_steps, U), or one set a sequence, where the model has inputs."""
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
        width, states = params.emission.shape
        dtype = params.emission.dtype
        shifts, offsets = self._ahead(params, inputs, count, num_steps, dtype)
        key_start, key_moves, key_noise = jax.random.split(checks.random_key(key), 3)
        start = params.initial_mean + _coloured(key_start, params.initial_covariance, (count, states))
        moves = _coloured(key_moves, params.dynamics_covariance, (num_steps, count, states)) + shifts

        def step(state: jax.Array, move: jax.Array) -> tuple[jax.Array, jax.Array]:
            state = numerics.product(state, params.dynamics, "bj,ij->bi") + move
            return state, state

        _, path = jax.lax.scan(step, start, moves[1:])
        path = jnp.moveaxis(jnp.concatenate([start[None], path]), 0, 1)
        noise = _SHAPES[self.covariance].matrix(params.emission_covariance, width)
        x = numerics.product(path, params.emission, "bts,ds->btd") + offsets
        x = x + _coloured(key_noise, noise, (count, num_steps, width))
        return (x, path) if num_sequences is not None else (x[0], path[0])

    @jax.jit
    def steady_state(self, params: LinearGaussianSSMParams) -> SteadyState:
        """Where the filter's covariances come to rest: the solution of the discrete algebraic Riccati equation.

        Meaningless where a state that grows is not seen: then there is no such place.
        """
        flat = jnp.zeros((1, params.emission.shape[0], 1), params.emission.dtype)
        matrix = whitening.whiten(params.emission, params.emission_covariance, flat).matrix
        transition = Transition(
            matrix=params.dynamics, root=_root(params.dynamics_covariance), start_mean=params.initial_mean,
            start_root=_root(params.initial_covariance), shift=jnp.zeros((1, self.state_size, 1), flat.dtype),
        )  # fmt: skip
        filtered = lanewise.square(linear_gaussian.steady_root(transition, matrix[:, :, None]))[:, :, 0]
        half = numerics.product(params.dynamics, filtered, "ij,jk->ik")
        shape = _SHAPES[self.covariance]
        precision = shape.precision(shape.whitener(params.emission_covariance, params.emission.shape[0])[0])
        precision = shape.matrix(precision, params.emission.shape[0])
        weight = numerics.product(params.emission, precision, "ds,de->se")
        return SteadyState(
            predicted=numerics.product(half, params.dynamics, "ij,kj->ik") + params.dynamics_covariance,
            filtered=filtered,
            gain=numerics.product(filtered, weight, "ij,jd->id"),
        )

    def num_parameters(self, params: LinearGaussianSSMParams) -> int:
        """Free numbers in the parameters; state_size² of them only choose the state's coordinates, unless held."""
        return tree.size(jax.eval_shape(self.unconstrain, params))

    def sample_size(self, x: Data, weights: jax.Array | None = None) -> jax.Array:
        """What information criteria count: the steps of all sequences."""
        x = self.units(x)
        steps = jnp.sum(x.inside(), axis=1).astype(tree.float_dtype(x.values))
        return numerics.weighted_sum(steps, weights)

    def unconstrain(self, params: LinearGaussianSSMParams) -> LinearGaussianSSMParams:
        """Covariances by the logarithms of their Cholesky factors, or of their variances; the rest as it is."""
        return dataclasses.replace(
            params,
            initial_covariance=numerics.covariance_to_real(params.initial_covariance),
            dynamics_covariance=numerics.covariance_to_real(params.dynamics_covariance),
            emission_covariance=_SHAPES[self.covariance].unconstrain(params.emission_covariance),
        )

    def constrain(self, theta: LinearGaussianSSMParams) -> LinearGaussianSSMParams:
        """Inverse of `unconstrain`."""
        states, width = theta.dynamics.shape[-1], theta.emission.shape[-2]
        return dataclasses.replace(
            theta,
            initial_covariance=numerics.real_to_covariance(theta.initial_covariance, states),
            dynamics_covariance=numerics.real_to_covariance(theta.dynamics_covariance, states),
            emission_covariance=_SHAPES[self.covariance].constrain(theta.emission_covariance, width),
        )

    def check(self, x: Data, weights: jax.Array | None = None) -> None:
        """Raise ValueError or TypeError for bad data, by name. Under jit only shapes are looked at."""
        x = sequences.check(x, weights)
        given, inputs = self._split(x)
        if not checks.is_concrete(x):
            return
        with jax.ensure_compile_time_eval():  # concrete data can be looked at while something else is traced
            inside = np.asarray(x.inside())
        for name, leaf in (("observations", given), ("inputs", inputs)):
            if leaf is None or not jnp.issubdtype(leaf.dtype, jnp.floating):
                continue
            values = np.asarray(leaf)
            bad = np.isinf(values) if name == "observations" and self.missing else ~np.isfinite(values)
            bad = bad & inside[..., None]
            if np.any(bad):
                row, step, column = np.argwhere(bad)[0]
                remedy = "A missing observation is NaN: mark it so" if name == "observations" else "Fill it in"
                if name == "observations" and not self.missing:
                    remedy = "Leave missing=False out, to have NaN taken as missing"
                raise ValueError(
                    f"x: {name} must be finite; got {values[row, step, column]} in sequence {row}, step {step}, "
                    f"column {column}. {remedy}"
                )
        checks.observed_columns("x", np.isnan(np.asarray(given, float)[inside]))

    def params_like(self, x: Data) -> LinearGaussianSSMParams:
        """The shapes that parameters have for such data."""
        x = self.units(x)
        given, inputs = self._split(x)
        width, states, dtype = given.shape[2], self.state_size, tree.float_dtype(x.values)
        inputs_width = 0 if inputs is None else inputs.shape[2]

        def like(*shape: int, there: bool = True) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype) if there else None

        return LinearGaussianSSMParams(
            initial_mean=like(states),
            initial_covariance=like(states, states),
            dynamics=like(states, states),
            dynamics_covariance=like(states, states),
            emission=like(width, states),
            emission_covariance=like(*(width,) * _SHAPES[self.covariance].trailing),
            dynamics_bias=like(states, there=self.dynamics_bias),
            emission_bias=like(width, there=self.emission_bias),
            dynamics_inputs=like(states, inputs_width, there=self.dynamics_inputs),
            emission_inputs=like(width, inputs_width, there=self.emission_inputs),
        )

    @property
    def supports(self) -> parameters.Supports:
        """Where the values of parameters lie."""
        return {name: self._shape_of(name).support for name in _COVARIANCES}

    def check_held(self, values: dict[str, Any]) -> None:
        """Raise ValueError for values to be held fixed that the model has none of, or that cannot be."""
        for name in values:
            if name in (*_DYNAMICS[1:], *_EMISSION[1:]) and not getattr(self, name):
                raise ValueError(f"{name} cannot be held: the model has none. Set {name}=True")
        self._check_values(values)

    def floats_per_row(self, params: LinearGaussianSSMParams, x: Data) -> int:
        """Temporaries of an E-step, in numbers a sequence."""
        x = self.units(x)
        width, states = params.emission.shape
        share = 4 * (width + states)
        missing = self.missing and not x.complete
        if missing or x.lengths is not None:
            share += 8 * states**2 + (3 * width**2 if self.covariance == "full" and missing else 0)
        return x.num_steps * share

    # Reading the data.

    def _split(self, x: Sequences) -> tuple[jax.Array, jax.Array | None]:
        """Observations (B, T, D), and inputs (B, T, U) or None; TypeError or ValueError where they cannot be."""
        uses = self.dynamics_inputs or self.emission_inputs
        pair = isinstance(x.values, (tuple, list))
        if uses and not (pair and len(x.values) == 2):
            raise TypeError("x must be a pair (observations, inputs), since the model has inputs")
        if pair and not uses:
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
        return parts[0], (parts[1] if uses else None)

    def _read(self, x: Sequences, weights: jax.Array | None) -> "_Data":
        given, inputs = self._split(x)
        dtype = tree.float_dtype(x.values)
        counted = x.inside() if weights is None else x.inside() & (weights > 0)[:, None]
        values = given.astype(dtype)
        if weights is not None:
            values = jnp.where(counted[..., None], values, 0)
        return _Data(
            values=values,
            seen=None,
            inputs=None if inputs is None else jnp.where(x.inside()[..., None], inputs.astype(dtype), 0),
            weights=None if weights is None else weights.astype(dtype),
            counted=counted,
            starts=x.starts(),
            whole=x.lengths is None and x.ids is None,
            missing=(None if x.complete is None else not x.complete) if self.missing else False,
        )

    def _either(self, shared: Any, apart: Any, params: LinearGaussianSSMParams, data: "_Data") -> Any:
        """One recursion of covariances for all sequences, or one for each, whichever the data allow."""
        if not data.whole or data.missing:
            return apart(params, data.masked())
        if data.missing is False:
            return shared(params, data)

        def attempt(params: LinearGaussianSSMParams, data: "_Data") -> tuple[Any, jax.Array]:
            missing = jnp.isnan(data.values)
            # Whatever is found then, its gradient must be finite: 0 of it counts.
            known = dataclasses.replace(data, values=jnp.where(missing, 0, data.values))
            return shared(params, known), jnp.any(missing)

        return numerics.repaired(attempt, lambda params, data: apart(params, data.masked()), params, data)

    def _line(self, names: tuple[str, ...], params: LinearGaussianSSMParams) -> jax.Array:
        """Coefficients of all features side by side: (O, F)."""
        parts = [getattr(params, name) for name in names]
        parts = [part if part is None or part.ndim > 1 else part[:, None] for part in parts]
        return jnp.concatenate([part for part in parts if part is not None], axis=1)

    def _parted(self, names: tuple[str, ...], line: jax.Array) -> dict[str, Any]:
        """Inverse of `_line`."""
        whole, bias, inputs = names
        states = self.state_size
        after = states + getattr(self, bias)
        return {
            whole: line[:, :states],
            bias: line[:, states] if getattr(self, bias) else None,
            inputs: line[:, after:] if getattr(self, inputs) else None,
        }

    def _features(self, names: tuple[str, ...], states: jax.Array, inputs: jax.Array | None) -> jax.Array:
        """(z, 1, u) of every step: (T, F, B), from states (T, S, B) and inputs (T, U, B)."""
        parts = [states]
        if getattr(self, names[1]):
            parts.append(jnp.ones_like(states[:, :1]))
        if getattr(self, names[2]) and inputs is not None:
            parts.append(inputs)
        return jnp.concatenate(parts, axis=1)

    def _terms(
        self, names: tuple[str, ...], params: LinearGaussianSSMParams, inputs: jax.Array | None, like: jax.Array
    ) -> jax.Array:
        """Bias and inputs' part of an equation: (B or 1, T, O)."""
        bias, weights = (getattr(params, name) for name in names[1:])
        total = jnp.zeros((1, like.shape[-2], getattr(params, names[0]).shape[0]), like.dtype)
        if bias is not None:
            total = total + bias
        if weights is not None and inputs is not None:
            total = total + numerics.product(inputs, weights, "btu,iu->bti")
        return total

    def _ahead(
        self, params: LinearGaussianSSMParams, inputs: jax.Array | None, lanes: int, steps: int, dtype: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Bias and inputs' part of future steps: of states (steps, B, S), of observations (B or 1, steps, D)."""
        if self.dynamics_inputs or self.emission_inputs:
            if inputs is None:
                raise TypeError(f"inputs must be given for the {steps} steps, since the model has inputs")
            inputs = checks.array("inputs", inputs).astype(dtype)
            inputs = inputs[None] if inputs.ndim == 2 else inputs
            if inputs.ndim != 3 or inputs.shape[0] not in (1, lanes) or inputs.shape[1] != steps:
                raise ValueError(f"inputs must have shape ({steps}, U) or ({lanes}, {steps}, U); got {inputs.shape}")
        elif inputs is not None:
            raise TypeError("inputs must be left out, since the model has none")
        like = jnp.zeros((1, steps, 1), dtype)
        shifts = self._terms(_DYNAMICS, params, inputs, like)
        shifts = jnp.broadcast_to(jnp.moveaxis(shifts, 0, 1), (steps, lanes, shifts.shape[-1]))
        return shifts, self._terms(_EMISSION, params, inputs, like)

    def _transition(self, params: LinearGaussianSSMParams, data: "_Data") -> Transition:
        shift = self._terms(_DYNAMICS, params, data.inputs, data.values)
        return Transition(
            matrix=params.dynamics,
            root=_root(params.dynamics_covariance),
            start_mean=params.initial_mean,
            start_root=_root(params.initial_covariance),
            shift=jnp.moveaxis(shift, 0, -1),
            # What is behind a sequence starts anew at every step: there nothing can grow.
            starts=None if data.whole else (data.starts | ~data.counted).T,
        )

    def _residuals(self, params: LinearGaussianSSMParams, data: "_Data") -> jax.Array:
        """Observations less all but the state's part, 0 where not seen: (B, T, D)."""
        if params.emission_bias is None and params.emission_inputs is None:
            return data.values
        residuals = data.values - self._terms(_EMISSION, params, data.inputs, data.values)
        return residuals if data.seen is None else jnp.where(data.seen, residuals, 0)

    def _seen(self, params: LinearGaussianSSMParams, data: "_Data", residuals: jax.Array) -> whitening.Seen:
        residuals, seen = (jnp.moveaxis(leaf, 0, -1) for leaf in (residuals, data.entries()))
        used = _weights(data)[2]
        return whitening.compress_seen(params.emission, params.emission_covariance, residuals, seen, used)

    def _apart(
        self, params: LinearGaussianSSMParams, data: "_Data"
    ) -> tuple[Transition, whitening.Seen, linear_gaussian.Filtered]:
        transition = self._transition(params, data)
        seen = self._seen(params, data, self._residuals(params, data))
        return transition, seen, linear_gaussian.filtered(transition, seen.evidence, self.parallel)

    def _white(self, params: LinearGaussianSSMParams, data: "_Data") -> tuple[Transition, whitening.Whitened]:
        """Where all is seen: the dynamics, and observations in coordinates in which their noise is white."""
        residuals = jnp.moveaxis(self._residuals(params, data), 0, -1)
        white = whitening.whiten(params.emission, params.emission_covariance, residuals)
        return self._transition(params, data), white

    def _filtered_moments(self, params: LinearGaussianSSMParams, data: "_Data") -> tuple[jax.Array, jax.Array]:
        """Means (T, S, B) and covariances (T, S, S, B) given the steps so far."""

        def shared(params: LinearGaussianSSMParams, data: _Data) -> tuple[jax.Array, jax.Array]:
            transition, white = self._white(params, data)
            means, roots = steady.shared_filter(transition, white.matrix, white.compressed, parallel=self.parallel)
            return _alike(means, lanewise.square(roots))

        def apart(params: LinearGaussianSSMParams, data: _Data) -> tuple[jax.Array, jax.Array]:
            filtered = self._apart(params, data)[2]
            return filtered.means, lanewise.square(filtered.roots)

        return self._either(shared, apart, params, data)

    # Statistics.

    def _separately(self, params: LinearGaussianSSMParams, data: "_Data") -> LinearGaussianSSMStats:
        """Statistics of sequences that do not share their covariances."""
        transition, seen, filtered = self._apart(params, data)
        smoothed = linear_gaussian.smoothed(transition, filtered, self.parallel)
        return self._stats(params, data, self._lane_by_lane(params, data, seen, filtered.log_prob, smoothed))

    def _together(self, params: LinearGaussianSSMParams, data: "_Data") -> LinearGaussianSSMStats:
        """Statistics of sequences that share their covariances.

        Noise is summed in coordinates in which it is white: the log-likelihood then is the sum of its squares at the
        smoothed means, and log-determinants.
        """
        transition, white = self._white(params, data)
        found = steady.shared_moments(transition, white.matrix, white.compressed, parallel=self.parallel)
        lanes, steps, _ = data.values.shape
        total = jnp.asarray(lanes, data.values.dtype) if data.weights is None else jnp.sum(data.weights)
        start, moves = (lanewise.generalized_inverse(root) for root in (transition.start_root, transition.root))
        looked = numerics.product(params.emission, found.every, "ds,sr->dr")
        expected = _Expected(
            loglik=total * (steps * white.normaliser - found.half_logdet),
            means=found.means,
            start=steady.apply(start.T, found.means[:1] - params.initial_mean[:, None]),
            moves=steady.apply(moves.T, found.moves),
            residuals=white.values - steady.apply(white.emission, found.means),
            first=total * found.first,
            before=total * found.before,
            cross=total * found.cross,
            spread=total * found.spread,
            every=total * found.every,
            looks=-total * looked.T,
            noise=total * _outer(_SHAPES[self.covariance], looked, params.emission),
        )
        return self._stats(params, data, expected, transition)

    def _lane_by_lane(
        self,
        params: LinearGaussianSSMParams,
        data: "_Data",
        seen: whitening.Seen,
        log_prob: jax.Array,
        smoothed: linear_gaussian.Smoothed,
    ) -> "_Expected":
        """Sums over sequences whose covariances differ."""
        shape = _SHAPES[self.covariance]
        begins, linked, used = _weights(data)

        def total(weights: jax.Array, values: jax.Array) -> jax.Array:
            # values (T, I, J, B), one lane standing for all where they are the same
            return lanewise.sum_steps(jnp.sum(weights[:, None, None] * values, axis=-1))

        def observed(at: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            filled, loadings, mean, covariance, weight = at
            looked = lanewise.matmul(loadings, covariance)
            weighted = weight * loadings
            if shape.trailing == 2:
                noise = numerics.product(weighted, looked, "dsl,esl->de")
            else:
                noise = jnp.sum(weighted * looked, axis=(1, 2))
            return filled - lanewise.times(loadings, mean), (jnp.sum(weight * looked, axis=-1), noise)

        covariances = smoothed.covariances
        left, (looks, noise) = lanewise.over_steps(
            observed, (seen.filled, seen.loadings, smoothed.means, covariances, used)
        )
        steps = jnp.sum(jnp.where(data.counted, log_prob.T, 0), axis=1)
        return _Expected(
            loglik=numerics.weighted_sum(steps, data.weights),
            means=smoothed.means,
            start=smoothed.means - params.initial_mean[:, None],
            moves=smoothed.moves,
            residuals=left,
            first=total(begins, covariances),
            before=total(linked, covariances[:-1]),
            cross=total(linked, smoothed.cross),
            spread=total(linked, smoothed.spread),
            every=total(used, covariances),
            looks=-looks.T,
            noise=noise + seen.extra,
        )

    def _sampled(self, params: LinearGaussianSSMParams, data: "_Data", expect: Sample) -> LinearGaussianSSMStats:
        """Statistics of drawn paths, averaged."""
        transition, seen, filtered = self._apart(params, data)
        key = expect.random_key()
        states, steps = self.state_size, data.values.shape[1]
        none = jnp.zeros((steps, states, states, 1), data.values.dtype)
        returns = linear_gaussian.returns(transition, filtered)

        def draw(number: jax.Array) -> LinearGaussianSSMStats:
            path, moves = linear_gaussian.draw_path(jax.random.fold_in(key, number), filtered, returns)
            known = linear_gaussian.Smoothed(means=path, covariances=none, moves=moves, cross=none[1:], spread=none[1:])
            return self._stats(params, data, self._lane_by_lane(params, data, seen, filtered.log_prob, known))

        used = expect.num_samples if expect.used is None else expect.used
        zero = tree.zeros_like(jax.eval_shape(draw, jnp.asarray(0)))
        total = jax.lax.fori_loop(0, used, lambda i, sums: tree.add(sums, draw(i)), zero)
        return tree.scale(1 / jnp.asarray(used, data.values.dtype), total)

    def _stats(
        self,
        params: LinearGaussianSSMParams,
        data: "_Data",
        expected: "_Expected",
        white: Transition | None = None,
    ) -> LinearGaussianSSMStats:
        """What the means add to the covariances' sums.

        white: given where all steps count and the noise is in white coordinates.
        """
        noise = _SHAPES[self.covariance]
        inputs = None if data.inputs is None else jnp.moveaxis(data.inputs, 0, -1)
        features = (
            jnp.ones_like(expected.start[:, :1]),
            self._features(_DYNAMICS, expected.means[:-1], None if inputs is None else inputs[1:]),
            self._features(_EMISSION, expected.means, inputs),
        )
        left = (expected.start, expected.moves, expected.residuals)
        counts, moments = [], []
        for weight, feature, residual in zip(_weights(data), features, left, strict=True):
            both = jnp.concatenate([feature, residual], axis=1)
            if white is not None and data.weights is None:
                counts.append(jnp.asarray(both.shape[0] * both.shape[2], both.dtype))
                moments.append(linear_equation.moments(both, both))
                continue
            each = weight[: len(both)]
            counts.append(jnp.sum(each))
            moments.append(linear_equation.moments(each[:, None] * both, both))

        loglik = expected.loglik
        roots: tuple[jax.Array | None, ...] = (None, None, None)
        if white is not None:
            scale = params.emission_covariance
            colour = numerics.cholesky(scale).T if noise.trailing == 2 else jnp.diag(jnp.sqrt(scale))
            roots = (white.start_root, white.root, colour)
            squares = [
                jnp.trace(moment[feature.shape[1] :, feature.shape[1] :])
                for moment, feature in zip(moments, features, strict=True)
            ]
            loglik = loglik - 0.5 * sum(squares[1:], squares[0])

        full = _SHAPES["full"]
        return LinearGaussianSSMStats(
            initial=linear_equation.collect(
                full, counts[0], params.initial_mean[:, None], params.initial_covariance, moments[0], roots[0],
                expected.first, None, None,
            ),
            dynamics=linear_equation.collect(
                full, counts[1], self._line(_DYNAMICS, params), params.dynamics_covariance, moments[1], roots[1],
                expected.spread, expected.before, expected.cross,
            ),
            emission=linear_equation.collect(
                noise, counts[2], self._line(_EMISSION, params), params.emission_covariance, moments[2], roots[2],
                expected.noise, expected.every, expected.looks,
            ),
            loglik=loglik,
        )  # fmt: skip

    # The M-step.

    def _held(
        self, names: tuple[str, ...], given: tuple[Any, ...], stats: EquationStats, rows: int
    ) -> list[tuple[int, jax.Array | None]]:
        """Columns of each group of features, and the values they are held at, if they are."""
        states, bias = self.state_size, int(getattr(self, names[1]))
        widths = (states, bias, stats.gram.shape[0] - states - bias)
        dtype = stats.gram.dtype
        found = []
        for width, value in zip(widths, given, strict=True):
            if value is not None and width:
                value = jnp.asarray(value, dtype)
                value = jnp.broadcast_to(value[:, None] if value.ndim == 1 and width == 1 else value, (rows, width))
            found.append((width, value))
        return found

    def _estimate(
        self, part: str, stats: EquationStats, groups: list[tuple[int, jax.Array | None]]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        shape = _SHAPES[self.covariance] if part == "emission" else _SHAPES["full"]
        prior = None if self.prior is None else getattr(self.prior, part)
        return linear_equation.estimate(shape, stats, groups, prior)

    def _shape_of(self, covariance: str) -> Any:
        """The shape that a covariance of this name is stored in."""
        return _SHAPES[self.covariance if covariance == "emission_covariance" else "full"]

    def _check_values(self, values: dict[str, Any]) -> None:
        states = self.state_size
        shapes: dict[str, tuple[int | None, ...]] = {
            "initial_mean": (states,),
            "initial_covariance": (states, states),
            "dynamics": (states, states),
            "dynamics_covariance": (states, states),
            "emission": (None, states),
            "emission_covariance": (None, None) if self.covariance == "full" else (None,),
            "dynamics_bias": (states,),
            "emission_bias": (None,),
            "dynamics_inputs": (states, None),
            "emission_inputs": (None, None),
        }
        for name, value in values.items():
            if not isinstance(value, (int, float, np.ndarray, np.generic, jax.Array)):
                continue
            got, expected = jnp.shape(value), shapes[name]
            fits = len(got) == len(expected) and all(e in (None, g) for g, e in zip(got, expected, strict=True))
            if not fits and len(got) > 0:
                told = str(tuple("..." if size is None else size for size in expected)).replace("'", "")
                raise ValueError(f"{name} must have shape {told}; got {got}")
            if name not in _COVARIANCES or not checks.is_concrete(value):
                continue
            if len(got) == 2 and got[0] != got[1]:
                raise ValueError(f"{name} must be square; got shape {got}")
            support = self._shape_of(name).support if got else parameters.at_least_zero
            support(name, np.asarray(value))


@record
class _Data:
    """Sequences as an E-step reads them: values (B, T, D); seen (B, T, D), None before what is not seen is told apart,
    and 0 in the values; inputs (B, T, U); weights (B,); counted (B, T), steps of sequences of positive weight; starts
    (B, T); whole: all rows are one full sequence; missing: whether there are entries that are not seen, None where that
    is not known."""

    values: jax.Array
    seen: jax.Array | None
    inputs: jax.Array | None
    weights: jax.Array | None
    counted: jax.Array
    starts: jax.Array
    whole: bool = static()
    missing: bool | None = static()

    def entries(self) -> jax.Array:
        return jnp.broadcast_to(self.counted[..., None], self.values.shape) if self.seen is None else self.seen

    def masked(self) -> "_Data":
        seen = self.entries()
        if self.missing is not False:
            seen = seen & ~jnp.isnan(self.values)
        return dataclasses.replace(self, values=jnp.where(seen, self.values, 0), seen=seen)


@record
class _Expected:
    """The log-likelihood, or of it what does not depend on noise; posterior means (T, S, B); noise of the first states
    (T or 1, S, B), of moves (T - 1, S, B) and of the observations (T, D, B); and sums of covariances over all that
    counts: of first states, of states before another, of these with the noise that comes next and of this noise, of
    observed states, of these with the observations' noise, and of this noise."""

    loglik: jax.Array
    means: jax.Array
    start: jax.Array
    moves: jax.Array
    residuals: jax.Array
    first: jax.Array
    before: jax.Array
    cross: jax.Array
    spread: jax.Array
    every: jax.Array
    looks: jax.Array
    noise: jax.Array


def _masks(data: _Data) -> tuple[jax.Array, jax.Array, jax.Array]:
    """First steps of sequences (T, B), pairs (T - 1, B) of neighbours in one, and steps (T, B) with an observation."""
    starts, counted = data.starts.T, data.counted.T
    observed = counted if data.seen is None else jnp.any(data.seen, axis=-1).T
    return starts & counted, counted[1:] & ~starts[1:], observed


def _weights(data: _Data) -> list[jax.Array]:
    """The same as what they count."""
    masks = [mask.astype(data.values.dtype) for mask in _masks(data)]
    return masks if data.weights is None else [mask * data.weights for mask in masks]


def _root(matrix: jax.Array) -> jax.Array:
    """U (S, S) with UᵀU the covariance, which may be singular: a variance of 0 gives a row of zeros."""
    states = matrix.shape[0]
    index = jnp.arange(states)
    rest, rows = 0.5 * (matrix + matrix.T), []
    for j in range(states):
        pivot = rest[j, j]
        used = pivot > 4 * jnp.finfo(matrix.dtype).eps * matrix[j, j]
        row = jnp.where(used & (index >= j), rest[j] * jax.lax.rsqrt(jnp.where(used, pivot, 1)), 0)
        rest = rest - row[:, None] * row
        rows.append(row)
    return jnp.stack(rows)


def _outer(shape: Any, a: jax.Array, b: jax.Array) -> jax.Array:
    """a bᵀ, as the shape keeps it."""
    return shape.from_matrix(numerics.product(a, b, "is,js->ij"))


def _coloured(key: jax.Array, matrix: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draws (..., S) of N(0, matrix)."""
    return numerics.product(jax.random.normal(key, shape, matrix.dtype), _root(matrix), "...k,ks->...s")


def _alike(means: jax.Array, covariances: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Covariances (T, S, S, 1) repeated for all lanes of means (T, S, B)."""
    return means, jnp.broadcast_to(covariances, (*covariances.shape[:-1], means.shape[-1]))


def _by_step(data: _Data, one: bool, means: jax.Array, covariances: jax.Array) -> StateMoments:
    """Moments (T, ..., B) with sequences first, 0 in the padding; without their axis for `one` plain sequence."""
    found = StateMoments(
        means=jnp.where(data.counted[..., None], jnp.moveaxis(means, -1, 0), 0),
        covariances=jnp.where(data.counted[..., None, None], jnp.moveaxis(covariances, -1, 0), 0),
    )
    return jax.tree.map(lambda leaf: leaf[0], found) if one else found


def _ends(x: Sequences, *moments: jax.Array) -> list[jax.Array]:
    """Of moments (T, ..., B) those at the last step of every sequence: (B, ...), or (num_sequences, ...)."""
    if x.ids is None:
        last = jnp.full(x.num_rows, x.num_steps) if x.lengths is None else x.lengths
        lanes = jnp.arange(x.num_rows)
        return [jnp.moveaxis(moment, -1, 1)[last - 1, lanes] for moment in moments]
    following = jnp.concatenate([x.ids[:, 1:], jnp.full_like(x.ids[:, :1], -1)], axis=1)
    ends = x.inside() & (x.ids != following) & (x.ids >= 0)
    count = int(x.num_sequences or 0)
    places = jnp.where(ends, x.ids, count).T.ravel()

    def pick(moment: jax.Array) -> jax.Array:
        flat = jnp.moveaxis(moment, -1, 1).reshape(-1, *moment.shape[1:-1])
        return jnp.zeros((count + 1, *flat.shape[1:]), flat.dtype).at[places].set(flat)[:-1]

    return [pick(moment) for moment in moments]
