"""The Helmholtz machine: layers of yes/no units, with a recognition network that runs the other way."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from .. import capabilities, checks, numerics, parameters, seeding, tree
from ..families import columns
from ..latents import categorical, tangent
from ..latents.categorical import CategoricalPosterior
from ..latents.expect import Exact
from ..protocols import Data
from ..record import record, static
from ..slots import Expect

# Latent units whose configurations are enumerated: 2^16 numbers a row.
_MOST_ENUMERATED = 16


@record
class SigmoidLayer:
    """Yes/no units given those of a layer before: p(unit = 1) = sigmoid(before @ weights + biases).

    weights: (units before, units); None in the top layer, which has none before it.
    biases: (units,).
    """

    weights: jax.Array | None
    biases: jax.Array

    def logits(self, before: jax.Array) -> jax.Array:
        """(..., units before) -> (..., units)."""
        alone = jnp.broadcast_to(self.biases, (*before.shape[:-1], *self.biases.shape))
        return alone if self.weights is None else alone + before @ self.weights

    def log_prob(self, before: jax.Array, units: jax.Array) -> jax.Array:
        """log p(units | before): (...,)."""
        logits = self.logits(before)
        return jnp.sum(units * logits - jax.nn.softplus(logits), axis=-1)

    def sample(self, key: jax.Array, before: jax.Array) -> jax.Array:
        """Units (..., units), 0 or 1."""
        logits = self.logits(before)
        return (jax.random.uniform(key, logits.shape, logits.dtype) < jax.nn.sigmoid(logits)).astype(logits.dtype)


@record
class HelmholtzParams:
    """Parameters of a Helmholtz machine of L hidden layers.

    generative: L + 1 layers, from the top one down to the data.
    recognition: L layers, from the one above the data up to the top one.
    """

    generative: tuple[SigmoidLayer, ...]
    recognition: tuple[SigmoidLayer, ...]


@record
class LayeredPosterior:
    """q(z | x_n), layer by layer from the data up.

    layers: those of the recognition network, from the one above the data up.
    x: (N, D), the data.
    """

    layers: tuple[SigmoidLayer, ...]
    x: jax.Array

    def sample(self, key: jax.Array) -> jax.Array:
        """Latent units (N, H) drawn from q, the top layer's first."""
        below, found = self.x, []
        for layer, own in zip(self.layers, jax.random.split(key, len(self.layers)), strict=True):
            below = layer.sample(own, below)
            found.append(below)
        return jnp.concatenate(found[::-1], axis=-1)

    def log_prob(self, z: jax.Array) -> jax.Array:
        """log q(z_n | x_n): (N,)."""
        above = _split(z, [layer.biases.shape[0] for layer in self.layers[::-1]])[::-1]
        below = (self.x, *above[:-1])
        return _log_prob(self.layers, below, above)


def _log_prob(layers: Sequence[SigmoidLayer], before: Sequence[jax.Array], units: Sequence[jax.Array]) -> jax.Array:
    """Sum over layers of log p(units | before): (...,)."""
    return functools.reduce(
        jnp.add, (layer.log_prob(*each) for layer, *each in zip(layers, before, units, strict=True))
    )


def _split(z: jax.Array, sizes: list[int] | tuple[int, ...]) -> list[jax.Array]:
    """Latent units (..., H) by layers."""
    return jnp.split(z, np.cumsum(sizes)[:-1].tolist(), axis=-1)


@capabilities.completed("model")
@record(kw_only=False)
class HelmholtzMachine:
    """A sigmoid belief network with its recognition network: p(x, z) = p(z_1) p(z_2 | z_1) ... p(x | z_L), q(z | x).

    layers: units of the L hidden layers, from the top one down; the data are the layer below.

    All units are 0 or 1, data (N, D) too. `wake_sleep()` learns both networks, `wake_sleep(reweighted=True)` better.
    Up to 16 latent units are enumerated: then there are the exact `log_prob`, the posterior over all 2^H
    configurations, `free_energy` of the recognition network (`approximate`), and generalised EM (`em_fit` as it is),
    whose M-steps go back to the rows, as those of `from_log_joint` do. With more, fits take `exact=False`.
    Hinton, Dayan, Frey & Neal (1995), The wake-sleep algorithm for unsupervised neural networks, Science 268; Dayan,
    Hinton, Neal & Zemel (1995), The Helmholtz machine.
    """

    layers: tuple[int, ...] = static()

    def __post_init__(self) -> None:
        layers = (self.layers,) if isinstance(self.layers, int) else tuple(self.layers)
        for count in layers or (0,):
            checks.positive_integer("layers", count)
        object.__setattr__(self, "layers", layers)

    e_step, statistics = tangent.e_step, tangent.statistics
    q_function, q_on_rows = tangent.q_function, tangent.q_on_rows
    stats = categorical.stats
    log_prob = categorical.log_prob
    posterior = categorical.responsibilities
    predict = categorical.likeliest

    @property
    def num_units(self) -> int:
        """H, latent units."""
        return sum(self.layers)

    @seeding.start()
    @functools.partial(jax.jit, static_argnames="scale")
    def init(
        self, key: jax.Array, x: jax.Array, weights: jax.Array | None = None, *, scale: float = 1.0
    ) -> HelmholtzParams:
        """A random start: weights ~ N(0, scale² / units before); biases 0, those of the data near the logits of their
        means."""
        x = checks.matrix("x", x)
        often = jnp.average(x, axis=0, weights=weights)
        own, other = jax.random.split(key)

        def drawn(key: jax.Array, before: int, units: int) -> SigmoidLayer:
            weights = scale / max(1, before) ** 0.5 * jax.random.normal(key, (before, units), x.dtype)
            return SigmoidLayer(weights=weights if before else None, biases=jnp.zeros(units, x.dtype))

        def network(key: jax.Array, sizes: tuple[int, ...]) -> tuple[SigmoidLayer, ...]:
            keys = jax.random.split(key, len(sizes) - 1)
            return tuple(drawn(key, *pair) for key, pair in zip(keys, itertools.pairwise(sizes), strict=True))

        *above, last = network(own, self._down(x.shape[1]))
        last = dataclasses.replace(last, biases=jax.scipy.special.logit(0.05 + 0.9 * often))
        return HelmholtzParams(generative=(*above, last), recognition=network(other, self._up(x.shape[1])))

    def complete_log_prob(self, params: HelmholtzParams, x: jax.Array, z: jax.Array) -> jax.Array:
        """log p(x_n, z_n), z latent units (N, H), the top layer's first: (N,)."""
        units = (*_split(z, self.layers), _floats(params, x))
        before = (z[..., :0], *units[:-1])
        return _log_prob(params.generative, before, units)

    def log_joint(self, params: HelmholtzParams, x: jax.Array) -> jax.Array:
        """log p(x_n, z) of all configurations z: (2^H, N)."""
        parameters.shapes("params", self, params, x)
        x, every = _floats(params, x), self._every(params)
        units = _split(every, self.layers)
        before = (every[:, :0], *units[:-1])
        prior = _log_prob(params.generative[:-1], before, units)
        logits = params.generative[-1].logits(units[-1])
        constant = prior - jnp.sum(jax.nn.softplus(logits), axis=-1)
        return constant[:, None] + numerics.product(logits, x, "kd,nd->kn")

    def infer(self, params: HelmholtzParams, x: jax.Array, expect: Expect = Exact()) -> CategoricalPosterior:
        """The exact posterior over all configurations; its `evidence` is log p(x_n), (N,)."""
        return categorical.infer(self.log_joint(params, x), expect)

    def recognise(self, params: HelmholtzParams, x: jax.Array) -> LayeredPosterior:
        """q(z | x_n) of the recognition network."""
        return LayeredPosterior(layers=params.recognition, x=_floats(params, x))

    def approximate(self, params: HelmholtzParams, x: jax.Array) -> CategoricalPosterior:
        """q(z | x_n) of the recognition network over all configurations, as `free_energy` takes it."""
        q, rows = self.recognise(params, x), tree.num_rows(x)
        every = self._every(params)
        scores = jax.vmap(lambda z: q.log_prob(jnp.broadcast_to(z[None], (rows, z.shape[0]))))(every)
        return self.infer(params, x).given(jnp.exp(scores).T)

    def sample_with_latents(self, key: jax.Array, params: HelmholtzParams, n: int) -> tuple[jax.Array, jax.Array]:
        """n rows (n, D), and the latent units (n, H) that they came from."""
        checks.positive_integer("n", n)
        units = jnp.zeros((n, 0), params.generative[0].biases.dtype)
        found = []
        for layer, own in zip(
            params.generative, jax.random.split(checks.random_key(key), len(params.generative)), strict=True
        ):
            units = layer.sample(own, units)
            found.append(units)
        return found[-1], jnp.concatenate(found[:-1], axis=-1)

    def sample(self, key: jax.Array, params: HelmholtzParams, n: int) -> jax.Array:
        """n rows (n, D)."""
        return self.sample_with_latents(key, params, n)[0]

    def num_parameters(self, params: HelmholtzParams) -> int:
        """Free parameters of the generative network, which alone has a likelihood."""
        return tree.size(params.generative)

    def params_like(self, x: Data) -> HelmholtzParams:
        """The shapes that parameters have for such data."""
        width, dtype = checks.row_shape("x", x)[1], tree.float_dtype(x)

        def network(sizes: tuple[int, ...]) -> tuple[SigmoidLayer, ...]:
            return tuple(
                SigmoidLayer(
                    weights=parameters.like((before, units), dtype) if before else None,
                    biases=parameters.like((units,), dtype),
                )
                for before, units in itertools.pairwise(sizes)
            )

        return HelmholtzParams(generative=network(self._down(width)), recognition=network(self._up(width)))

    def check(self, x: jax.Array, weights: jax.Array | None = None) -> None:
        """Raise ValueError or TypeError for bad data, by name."""
        columns.check("x", x, lambda values: (values == 0) | (values == 1), "0 or 1", missing=False)
        checks.row_weights(weights, tree.num_rows(x))

    def floats_per_row(self, params: HelmholtzParams, x: jax.Array) -> int:
        """Temporaries of an E-step, in numbers a row."""
        return 4 << self.num_units

    def _down(self, width: int) -> tuple[int, ...]:
        """Numbers of units of the generative network, from 0 above the top layer down to the data."""
        return (0, *self.layers, width)

    def _up(self, width: int) -> tuple[int, ...]:
        """Numbers of units of the recognition network, from the data up."""
        return (width, *self.layers[::-1])

    def _every(self, params: HelmholtzParams) -> jax.Array:
        """All configurations of the latent units: (2^H, H)."""
        if self.num_units > _MOST_ENUMERATED:
            raise ValueError(
                f"{self.num_units} latent units have too many configurations to be enumerated, at most "
                f"{_MOST_ENUMERATED} do: fit by wake_sleep(..., exact=False), whose log-likelihood is an estimate"
            )
        bits = np.arange(1 << self.num_units)[:, None] >> np.arange(self.num_units)[::-1] & 1
        return jnp.asarray(bits, params.generative[0].biases.dtype)


def _floats(params: HelmholtzParams, x: jax.Array) -> jax.Array:
    """Rows (N, D) in the dtype of the parameters."""
    x = jnp.asarray(x)
    return x.reshape(x.shape[0], -1).astype(params.generative[0].biases.dtype)
