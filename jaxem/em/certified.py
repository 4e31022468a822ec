"""A certificate for where a fit would stop: that no direction of further ascent is found around it."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from .. import numerics, tree
from ..capabilities import complete, completed
from ..protocols import AnyModel, Data, Nature, Params, Problem
from ..record import record
from ..slots import Algorithm, State
from .gather import pose
from .maps import coordinates
from .step import EM, objective

# Products with the Jacobian of the EM map that look for its slowest modes.
_PRODUCTS = 8

# Steps of EM that are extrapolated ahead, as doublings: 16,384.
_DOUBLINGS = 14

# Points that are tried: at these fractions of the way to where thousands of EM steps would lead (_AHEAD), and at these
# lengths along the slowest mode (_ALONG). Where that mode grows, most are along it, as the way off a saddle may be a
# narrow curve. Lengths are relative to the coordinate that moves most, and none is above 1.
_AHEAD, _ALONG = (1.0, 0.5, 0.125), (0.1, -0.1, 0.02, -0.02)
_AHEAD_OF_SADDLES, _ALONG_SADDLES = (1.0,), (0.02, -0.02, 0.004, -0.004, 0.1, -0.1)

# A mode with rate - 1 in _LEVEL hardly grows or shrinks, as where components of one covariance are nearly alike. A way
# up is then a curve that bends away from any straight line, and an EM step leads back to it: so the image under EM of
# each of the last two points is tried too, in the places _SETTLED, which have the length 0. There are several such
# modes, and the way is along a mixture of them: what 2 ** _MIXED products leave of a random vector.
_LEVEL, _MIXED = (-3e-5, 5e-3), 6
_ALONG_LEVELS, _ALONG_MIXED, _SETTLED = (0.02, -0.02), (0.3, 0.0, -0.1, 0.0), (4, 6)

# Points that are tried.
_POINTS = len(_AHEAD) + len(_ALONG)

# E-steps of a verdict, at most: two for a product, or for a point with the product that goes with it.
PASSES = 2 * (_PRODUCTS + _POINTS)

# A gain of this part of what is allowed is followed, as the beginning of more; along a mode that grows it is enough.
_BEGINNING = 1 / 16


@completed("state")
@record
class CertifiedState:
    """What certification remembers.

    inner: the state of the algorithm that is certified.
    spent: passes over the data of the verdicts so far, and of the states that were left for a higher point.
    certified: whether the last verdict found no direction of further ascent.
    """

    inner: State
    spent: jax.Array
    certified: jax.Array

    @property
    def _told(self) -> State:
        return complete("state", self.inner)

    params = property(lambda self: self.inner.params)
    stats = property(lambda self: self.inner.stats)
    loglik = property(lambda self: self.inner.loglik)
    num_passes = property(lambda self: self.inner.num_passes + self.spent)
    waiting = property(lambda self: self._told.waiting)
    left = property(lambda self: self._told.left)
    missed = property(lambda self: self._told.missed)
    settled = property(lambda self: self._told.settled)


@completed("algorithm")
@record
class Certified:
    """An algorithm that is CONVERGED only after a verdict on the point where it would stop.

    inner: the algorithm.

    Gains and moves show nothing of a direction in which a fit has not moved yet: off a saddle, or along the slowest
    mode. Where the inner algorithm would stop, the slowest modes of the EM map are found by Arnoldi's method, in
    products with its Jacobian from a random vector. Points are then tried where thousands of more steps would lead, and
    on both sides along the slowest mode, or along a mixture of those that hardly move; a way up is followed. Where the
    best of them is higher by more than `tol` per unit of weight, or by a part of that where a mode grows, the fit
    goes on from there, and else it has converged. Every verdict counts as 30 E-steps in `num_passes`; of fewer than 8
    coordinates it takes fewer.
    """

    inner: Algorithm | Any

    def nature(self, model: AnyModel) -> Nature:
        return complete("algorithm", self.inner).nature(model)

    def limit(self, *given: Any) -> tuple[Params, Any]:
        """The EM map whose fixed points are its limits."""
        return complete("algorithm", self.inner).limit(*given)

    def init(
        self, model: AnyModel, params: Params, x: Data, weights: jax.Array | None = None, key: jax.Array | None = None
    ) -> CertifiedState:
        return self._around(model, self.inner.init(model, params, x, weights, key))

    def begin(
        self, model: AnyModel, params: Params, x: Data, weights: jax.Array | None = None, key: jax.Array | None = None
    ) -> CertifiedState:
        return self._around(model, complete("algorithm", self.inner).begin(model, params, x, weights, key))

    def step(self, model: AnyModel, state: CertifiedState, x: Data, weights: jax.Array | None = None) -> CertifiedState:
        return dataclasses.replace(state, inner=self.inner.step(model, state.inner, x, weights))

    def evaluated(
        self, model: AnyModel, state: CertifiedState, x: Data, weights: jax.Array | None = None
    ) -> CertifiedState:
        inner = complete("algorithm", self.inner).evaluated(model, state.inner, x, weights)
        return state if inner is state.inner else dataclasses.replace(state, inner=inner)

    def certify(
        self,
        model: AnyModel,
        state: CertifiedState,
        x: Data,
        weights: jax.Array | None,
        allowed: jax.Array,
    ) -> tuple[CertifiedState, jax.Array]:
        """The state at the highest point that was tried, and whether that is higher by more than `allowed` nats.

        Where it is not, the state is the one that was given, certified.
        """
        problem = pose(model, x, weights)
        found = verdict(problem, self, state.params, objective(problem.model, state), allowed)
        fresh = complete("algorithm", self.inner).begin(model, found.params, x, weights)
        # A state that was begun without its first E-step has another structure, of the same arrays.
        fresh = jax.tree.unflatten(jax.tree.structure(state.inner), jax.tree.leaves(fresh))
        inner = tree.where(found.better, fresh, state.inner)
        spent = state.num_passes + PASSES - jnp.where(found.better, 0, state.inner.num_passes)
        return CertifiedState(inner=inner, spent=spent, certified=found.certified), found.better

    def _around(self, model: AnyModel, inner: State) -> CertifiedState:
        if not climbs(self.inner, model):
            raise ValueError(
                "certified needs an algorithm whose every step climbs the log-likelihood of all rows, without draws, "
                f"batches or a schedule; got {self.inner!r}. Certify what follows it: em_fit(model, result.params, x, "
                "algorithm=certified())"
            )
        if inner.loglik is None:
            raise TypeError(
                "certified looks at the log-likelihood around the end of a fit, and this model tells none: "
                "let e_step return (stats, loglik)"
            )
        if complete("model", model).m_step is None:
            raise TypeError("certified needs a model with an m_step of its own: gradient steps are no map")
        return CertifiedState(inner=inner, spent=jnp.zeros_like(inner.num_passes), certified=jnp.array(False))


def certified(algorithm: Algorithm | Any | None = None) -> Certified:
    """An algorithm, `EM()` by default, that is CONVERGED only where no ascent is found around; see `Certified`.

    Raises TypeError for one that is certified already; its fits raise TypeError or ValueError where steps are random or
    do not climb the log-likelihood of all rows, and for a model without a log-likelihood or an M-step.
    """
    algorithm = EM() if algorithm is None else algorithm
    if isinstance(algorithm, Certified):
        raise TypeError("certified takes an algorithm that is not certified yet; got certified(...)")
    return Certified(inner=algorithm)


def climbs(algorithm: Algorithm | Any, model: AnyModel) -> bool:
    """Whether every step of an algorithm climbs the log-likelihood of all rows, without draws."""
    nature = complete("algorithm", algorithm).nature(model)
    return nature.monotone and nature.complete and not nature.stochastic


@record
class Verdict:
    """The result of the search around parameters.

    params: the highest point that was tried, the parameters themselves included.
    better: whether it is higher than the parameters by more than was allowed.
    certified: whether it is not, and the Jacobian and the objective are finite.
    rate: of the slowest mode.
    """

    params: Params
    better: jax.Array
    certified: jax.Array
    rate: jax.Array


class _Walk(NamedTuple):
    """A way up from parameters, as far as it is known.

    base: (P,), where an EM step led from the last point of the way; the parameters, before there is one.
    step: (P,), from there to the point that is tried next.
    found: whether there is a way.
    highest: the objective of the highest point that was tried.
    top: that point.
    """

    base: jax.Array
    step: jax.Array
    found: jax.Array
    highest: jax.Array
    top: Params


def verdict(
    problem: Problem, algorithm: Algorithm | Any, params: Params, height: jax.Array, allowed: jax.Array
) -> Verdict:
    """Search around parameters, where the objective is `height`, for a point that is more than `allowed` nats higher.

    One loop, so that a program holds the E-step once: first products with the Jacobian, whose basis grows, and then
    the points that follow from it. After a higher point the next one is further on. It starts from the image of that
    point under EM, back on the curve that slow modes follow, and goes along the Jacobian there times the last step.
    """
    model, height = problem.model, jnp.asarray(height)
    theta, params_of = coordinates(model, params)
    width, visible = min(_PRODUCTS, len(theta)), 4 * jnp.finfo(height.dtype).eps * jnp.abs(height)
    beginning = jnp.minimum(jnp.maximum(_BEGINNING * allowed, visible), allowed)

    def stepped(theta: jax.Array) -> tuple[jax.Array, tuple[jax.Array, Params]]:
        at = params_of(theta)
        after, state = algorithm.limit(model, at, problem.x, problem.weights)
        return ravel_pytree(model.unconstrain(after))[0], (objective(model, state), at)

    def look(number: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        space, steps, rate, walk = carry
        looking = number < width
        point = jnp.where(looking, theta, walk.base + walk.step)
        along = jnp.where(looking, space.vector, walk.step)
        after, moved, (here, at) = jax.jvp(stepped, (point,), (along,), has_aux=True)
        space = tree.where(looking, space.grown(number, moved), space)
        steps, rate = jax.lax.cond(
            number == width - 1,
            lambda: _steps(theta, after - theta, space.basis, space.image),
            lambda: (steps, rate),
        )
        higher = here > walk.highest
        # Ahead of most fits a little can be gained, so that more is asked for there; unless no mode grows and the way
        # is of full length, as from a boundary that repels: then any visible gain is followed.
        count = jnp.where(_grows(rate) | _level(rate), len(_AHEAD_OF_SADDLES), len(_AHEAD))
        ahead = (number < width + count) & (_grows(rate) | (_size(theta, steps[0]) < 0.99))
        on = jnp.where(ahead, here - height > beginning, here - walk.highest > visible)
        following = jnp.maximum(number - width + 1, 0)
        settled = _level(rate) & jnp.any(following == np.array(_SETTLED))
        elsewhere = jnp.where(settled, after - theta, steps[following])
        elsewhere = jnp.where(walk.found, walk.step / 4, elsewhere)
        step = jnp.where(~looking & on, _shortened(theta, 2 * moved), elsewhere)
        walked = _Walk(
            base=jnp.where(on, after, walk.base),
            step=step,
            found=walk.found | on,
            highest=jnp.where(higher, here, walk.highest),
            top=tree.where(higher, at, walk.top),
        )
        return space, steps, rate, tree.where(looking, walk._replace(step=step), walked)

    nothing = jnp.zeros_like(theta)
    start = _Walk(base=theta, step=nothing, found=jnp.array(False), highest=height, top=params)
    space = numerics.krylov_space(numerics.scattered(theta), width)
    begin = space, jnp.zeros((_POINTS, len(theta)), theta.dtype), jnp.zeros((), theta.dtype), start
    _, _, rate, walk = jax.lax.fori_loop(0, width + _POINTS, look, begin)
    enough = jnp.where(_grows(rate), beginning, allowed)
    better = walk.highest - height > enough
    sure = ~better & jnp.isfinite(rate) & jnp.isfinite(height)
    return Verdict(params=walk.top, better=better, certified=sure, rate=rate)


def _steps(theta: jax.Array, move: jax.Array, basis: jax.Array, image: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Steps (T, P) from theta (P,) to where the objective may be higher, and the rate of the slowest mode.

    move: (P,), of an EM step; basis (M, P) and image (M, M): the Jacobian as far as it is known.
    """
    inside = numerics.leading_direction(image)
    square = jnp.sum(jnp.square(inside))
    rate = jnp.sum(numerics.product(inside, image, "m,mk->k") * inside) / jnp.where(square > 0, square, 1)
    # Where so many more steps lead, if the map is linear: nearly Newton's step, and bounded where I - J is singular.
    inward = numerics.product(basis, move, "mp,p->m")
    onward = numerics.product(numerics.series(image, inward, _DOUBLINGS), basis, "m,mp->p")
    mode, mixed = (_along(theta, onward, way, basis) for way in (inside, numerics.power_of(image, _MIXED)[:, 0]))
    # The series of a mode that grows may overflow.
    onward = jnp.where(jnp.all(jnp.isfinite(onward)), _shortened(theta, onward), mode)

    def points(*ways: tuple[jax.Array, tuple[float, ...]]) -> jax.Array:
        return jnp.concatenate([np.array(lengths, theta.dtype)[:, None] * way[None] for way, lengths in ways])

    steps = points((onward, _AHEAD), (mode, _ALONG))
    steps = jnp.where(_grows(rate), points((onward, _AHEAD_OF_SADDLES), (mode, _ALONG_SADDLES)), steps)
    level = points((onward, _AHEAD_OF_SADDLES), (mode, _ALONG_LEVELS), (mixed, _ALONG_MIXED))
    return jnp.where(_level(rate), level, steps), rate


def _along(theta: jax.Array, onward: jax.Array, inside: jax.Array, basis: jax.Array) -> jax.Array:
    """A direction (P,) given in a basis (M, P), of length 1, on the side of the way onward."""
    way = numerics.product(inside, basis, "m,mp->p")
    size = _size(theta, way)
    return way * jnp.where(jnp.sum(onward * way) < 0, -1, 1) / jnp.where(size > 0, size, 1)


def _grows(rate: jax.Array) -> jax.Array:
    """Whether a mode of this rate grows, as far as rounding tells."""
    return rate > 1 + jnp.sqrt(jnp.finfo(rate.dtype).eps)


def _level(rate: jax.Array) -> jax.Array:
    """Whether a mode of this rate hardly grows nor shrinks."""
    return (rate - 1 >= _LEVEL[0]) & (rate - 1 <= _LEVEL[1])


def _size(theta: jax.Array, step: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(step) / (1 + jnp.abs(theta)))


def _shortened(theta: jax.Array, step: jax.Array) -> jax.Array:
    """A step (P,) from theta (P,), shortened to a `_size` of 1 at most."""
    return step / jnp.maximum(_size(theta, step), 1)
