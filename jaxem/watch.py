"""What the stopping rule remembers of a fit, and how a step changes that."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .protocols import Params

# A gain stands out of the rounding of the objective from so many units of that on.
SEEN = 2

# Squared moves of up to so many times their rounding are nothing but that.
ROUNDED = 64


@dataclasses.dataclass(frozen=True)
class Watch:
    """What the stopping rule remembers of a fit; what is not known yet is infinite.

    A fit under way holds these numbers as one vector: as separate arrays each would need kernels of its own, to be
    selected where fits run side by side, and to be stored.

    Moves are squared, relative to the parameters, and kept as logarithms: ratios are then differences, and fewer
    functions have to be computed and compiled.

    gain: the last gain of the objective, a bound on it where M-steps stop short of their maximum.
    ratio: of the last two gains.
    record: the objective when it last rose by more than its rounding.
    stalled: steps since then.
    mark: the move that later ones are compared with.
    since: steps since the mark.
    pace: steps in which moves shrank by a factor of e, when they last halved; inf where they grew.
    move: the last move.
    shrink: the ratio of the last two gains, as moves tell it.
    turn: the last change of `shrink`.
    rough: by how much such changes differ from step to step, on average: the noise of a ratio.
    seen: logarithm of the last gain above its rounding, of those at a new mark and the first.
    seen_move: the move that made it.
    power: gains go with this power of squared moves, 1 in the interior of the domain and 1/2 towards its boundary.
    near: steps in a row that found little enough left.
    rounding: squared length of a move by the rounding of the parameters, not its logarithm.
    scale (A,): of every array of the parameters, the largest entry that it has had.
    """

    gain: jax.Array
    ratio: jax.Array
    record: jax.Array
    stalled: jax.Array
    mark: jax.Array
    since: jax.Array
    pace: jax.Array
    move: jax.Array
    shrink: jax.Array
    turn: jax.Array
    rough: jax.Array
    seen: jax.Array
    seen_move: jax.Array
    power: jax.Array
    near: jax.Array
    rounding: jax.Array
    scale: jax.Array

    @classmethod
    def of(cls, numbers: jax.Array) -> "Watch":
        """The watch that a vector of `numbers` holds."""
        names = [field.name for field in dataclasses.fields(cls)][:-1]
        return cls(**dict(zip(names, numbers[: len(names)], strict=True)), scale=numbers[len(names) :])

    @property
    def numbers(self) -> jax.Array:
        """As one vector."""
        *numbers, scale = vars(self).values()
        vector = jnp.pad(scale, (len(numbers), 0))
        place = np.arange(len(vector))
        for index, number in enumerate(numbers):
            vector = jnp.where(place == index, number.astype(scale.dtype), vector)
        return vector


def begun(value: jax.Array, params: Params) -> jax.Array:
    """The watch, as a vector, of a fit at its start, with this objective, a scalar, and these parameters."""
    zero = jnp.zeros_like(value)
    names = ("gain", "ratio", "mark", "pace", "move", "shrink", "seen", "seen_move")
    return Watch(
        **dict.fromkeys(names, jnp.full_like(value, jnp.inf)),
        record=value,
        stalled=zero,
        since=zero,
        turn=zero,
        rough=zero,
        power=jnp.ones_like(value),
        near=zero,
        rounding=zero,
        scale=_scale(params, value.dtype),
    ).numbers


def _floats(params: Params) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.size]


def _scale(params: Params, dtype: Any) -> jax.Array:
    """The largest entry of every array: (A,)."""
    sizes = [jnp.max(jnp.abs(leaf)).astype(dtype) for leaf in _floats(params)]
    return jnp.stack(sizes) if sizes else jnp.zeros(0, dtype)


def moved(watch: Watch, before: Params, after: Params) -> tuple[Watch, jax.Array]:
    """The squared length of a move, every array relative to the largest entry that it has had; at least its rounding.

    Returns the watch with these entries and that rounding as they are now, and the length, a scalar.
    """
    dtype = watch.record.dtype
    now = _scale(after, dtype)
    scale = jnp.maximum(watch.scale, now)
    per_unit = 1 / jnp.where(scale > jnp.finfo(dtype).tiny, scale, 1)
    rounding = jnp.finfo(dtype).tiny + jnp.sum(jnp.square(jnp.finfo(dtype).eps * now * per_unit))
    total = jnp.zeros((), dtype)
    for a, b, factor in zip(_floats(before), _floats(after), per_unit, strict=True):
        total += jnp.sum(jnp.square((b - a).astype(dtype) * factor))
    return dataclasses.replace(watch, scale=scale, rounding=rounding), jnp.maximum(total, rounding)


def _ratio(new: jax.Array, old: jax.Array) -> jax.Array:
    usable = jnp.isfinite(old) & (old != 0)
    return jnp.where(usable, new / jnp.where(usable, old, 1), jnp.inf)


def observe(watch: Watch, value: jax.Array, gain: jax.Array, move: jax.Array, resolution: jax.Array) -> Watch:
    """The watch after a step that brought the objective to `value`, by `gain`, and moved parameters by `move`."""
    progress = value > watch.record + resolution
    seen = (gain > SEEN * resolution) & (move > ROUNDED * watch.rounding)
    move, log_gain = jnp.log(move), jnp.log(jnp.where(seen, gain, 1))
    first = ~jnp.isfinite(watch.mark)
    since = jnp.where(first, 0, watch.since + 1)
    folds = watch.mark - move
    halved, grown = folds >= math.log(2), folds < -math.log(2)
    pace = jnp.where(halved & ~first, since / folds, jnp.where(grown, jnp.inf, watch.pace))
    anew = first | halved | grown
    # The power is taken anew whenever moves have halved, and averaged, since a single ratio of gains is noisy.
    apart = watch.seen_move - move
    compared = seen & anew & jnp.isfinite(apart) & (apart > math.log(1.5))
    power = jnp.clip((watch.seen - log_gain) / jnp.where(compared, apart, 1), 0.5, 1)
    power = jnp.where(compared, 0.5 * (watch.power + power), watch.power)
    marked = seen & (anew | jnp.isinf(watch.seen))
    shrink = jnp.where(jnp.isinf(watch.move), jnp.inf, jnp.exp(power * (move - watch.move)))
    turn = jnp.where(jnp.isfinite(watch.shrink), shrink - watch.shrink, 0)
    return Watch(
        gain=gain,
        ratio=_ratio(gain, watch.gain),
        record=jnp.where(progress, value, watch.record),
        stalled=jnp.where(progress, 0, watch.stalled + 1),
        mark=jnp.where(anew, move, watch.mark),
        since=jnp.where(anew, 0, since),
        pace=pace,
        move=move,
        shrink=shrink,
        turn=turn,
        rough=0.5 * (watch.rough + jnp.abs(turn - watch.turn)),
        seen=jnp.where(marked, log_gain, watch.seen),
        seen_move=jnp.where(marked, move, watch.seen_move),
        power=power,
        near=watch.near,
        rounding=watch.rounding,
        scale=watch.scale,
    )


def changed(numbers: jax.Array, **values: jax.Array) -> jax.Array:
    """The vector of a watch with one of its fields set, in one elementwise kernel; to take it apart needs many."""
    ((name, value),) = values.items()
    names = [field.name for field in dataclasses.fields(Watch)]
    return jnp.where(np.arange(len(numbers)) == names.index(name), value.astype(numbers.dtype), numbers)


def resumed(numbers: jax.Array) -> jax.Array:
    """The watch of a fit that is resumed: its count of steps near the limit is kept as 1 at most, to be confirmed."""
    return changed(numbers, near=jnp.minimum(Watch.of(numbers).near, 1))
