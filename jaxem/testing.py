"""The laws that every EM model obeys, for the library's models and for yours.

`check_model(model, params, x)` runs all that apply and raises AssertionError with the law's name
and numbers at the first that is broken. Use float64 data: in float32 the tolerances are wide.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from . import tree
from .capabilities import complete, informed, states
from .diagnostics.free_energy import free_energy
from .em import EM, Blocks
from .fit import em_fit
from .protocols import AnyModel, Data, Params

LAWS: dict[str, Callable[["_Case"], None]] = {}


@dataclasses.dataclass(frozen=True)
class _Case:
    model: Any
    params: Params
    x: Data
    seed: int
    rtol: float
    weighted: bool
    traces: list[None] = dataclasses.field(default_factory=list)

    @property
    def rows(self) -> int:
        return tree.num_rows(self.x)

    @property
    def random(self) -> np.random.Generator:
        """Random numbers of a law, the same in every run. (NumPy's, as all small arithmetic of the laws: it
        needs no compilation.)"""
        return np.random.default_rng(self.seed)

    @functools.cached_property
    def e_step(self) -> Callable:
        """The model's E-step, compiled once a shape: where it takes weights, with weights of 1 in place of none."""
        dtype, run = tree.float_dtype(self.x), jax.jit(lambda *given: self.model.e_step(*given))
        return lambda params, x, weights=None: run(
            params, x, np.ones(tree.num_rows(x), dtype) if weights is None and self.weighted else weights
        )

    @functools.cached_property
    def m_step(self) -> Callable:
        """The model's M-step, compiled; without one, the parameters stay."""
        return jax.jit(lambda stats: self.model.m_step(stats)) if self.has("m_step") else lambda _: self.params

    @functools.cached_property
    def stats(self) -> Any:
        return self.e_step(self.params, self.x)

    @functools.cached_property
    def halves(self) -> list[Any]:
        """Statistics of the first and of the second half of the rows."""
        half = self.rows // 2
        return [self.e_step(self.params, _rows(self.x, part)) for part in (slice(half), slice(half, None))]

    @functools.cached_property
    def unconstrain(self) -> Callable:
        return jax.jit(lambda params: self.model.unconstrain(params))

    @functools.cached_property
    def constrain(self) -> Callable:
        return jax.jit(lambda theta: self.model.constrain(theta))

    @functools.cached_property
    def posterior(self) -> np.ndarray:
        return np.asarray(self.model.posterior(self.params, self.x))

    @functools.cached_property
    def surrogate(self) -> Callable:
        """Values and gradients of Q and of the log-prior, in unconstrained coordinates; as NumPy arrays."""
        _, constrain = _coordinates(self, self.params)

        @jax.jit
        def both(theta: Any, stats: Any) -> Any:
            def prior(theta: Any) -> jax.Array:
                return jnp.asarray(self.model.log_prior(constrain(theta)))

            of_q = jax.value_and_grad(lambda theta: self.model.q_function(constrain(theta), stats))(theta)
            return of_q, jax.value_and_grad(prior)(theta)

        return lambda theta, stats: jax.tree.map(np.asarray, both(theta, stats))

    @functools.cached_property
    def fit(self) -> Callable:
        """em_fit as users jit it, its traces counted."""

        def counted(*arguments: Any, **options: Any) -> Any:
            self.traces.append(None)
            return em_fit(*arguments, algorithm=EM(), **options)

        return jax.jit(counted)

    def has(self, *names: str, of: Any = None) -> bool:
        return states(self.model if of is None else of, *names)

    def close(self, got: Any, expected: Any, what: str = "statistics", factor: float = 1.0) -> None:
        """Leaves equal, relative to the size of each leaf."""
        chex.assert_trees_all_equal_structs(got, expected)
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
            a, b = np.asarray(a, float), np.asarray(b, float)
            allowed = factor * self.rtol * (np.max(np.abs(b), initial=0) + 1)
            gap = np.max(np.abs(a - b), initial=0)
            assert gap <= allowed, f"{what}{jax.tree_util.keystr(path)} differ by {gap:.3g}, allowed {allowed:.3g}"


def check_model(
    model: AnyModel, params: Params, x: Data, *, key: jax.Array | None = None, skip: Iterable[str] = ()
) -> tuple[str, ...]:
    """Check every law that applies to this model at these parameters and data.

    Give some tens of rows (the law "brute force" uses the first three) and parameters at which every
    component has rows. skip: names of laws that an approximate E-step does not keep.
    Returns the names of the laws that were checked. Raises AssertionError naming the broken law,
    ValueError for an unknown name in `skip`.
    """
    skip = set(skip)
    if unknown := skip - set(LAWS):
        raise ValueError(f"skip must name laws among {sorted(LAWS)}; got {sorted(unknown)}")
    x = jax.tree.map(lambda leaf: np.asarray(jnp.asarray(leaf)), x)
    rtol = 1e-9 if tree.float_dtype(x) == jnp.float64 else 2e-3
    seed = 0 if key is None else int(jax.random.bits(key))
    case = _Case(informed(complete("model", model), x), params, x, seed, rtol, "weights are repeats" not in skip)
    checked = []
    for name, law in LAWS.items():
        if name in skip:
            continue
        try:
            applied = law(case)
        except AssertionError as broken:
            raise AssertionError(f"law '{name}' is broken: {broken}") from broken
        if applied is not False:
            checked.append(name)
    return tuple(checked)


def _law(name: str) -> Callable:
    def register(function: Callable) -> Callable:
        LAWS[name] = function
        return function

    return register


def _rows(x: Data, index: Any) -> Data:
    return jax.tree.map(lambda leaf: leaf[index], x)


def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(np.add, a, b)


def _integer_weights(case: _Case) -> np.ndarray:
    """Weights 0, 1 and 2 that sum to the number of rows, so that repeated rows are as many."""
    weights = np.ones(case.rows, int)
    moved = case.random.permutation(case.rows)[: 2 * (case.rows // 3)]
    weights[moved[::2]], weights[moved[1::2]] = 2, 0
    return weights


@_law("additive")
def _additive(case: _Case) -> None:
    """E(a ++ b) = E(a) + E(b)."""
    case.close(_add(*case.halves), case.stats)


@_law("weights are repeats")
def _weights(case: _Case) -> None:
    """Weight 2 is the row twice, weight 0 the row absent."""
    weights = _integer_weights(case)
    repeated = _rows(case.x, np.repeat(np.arange(case.rows), weights))
    weighted = case.e_step(case.params, case.x, weights.astype(tree.float_dtype(case.x)))
    case.close(weighted, case.e_step(case.params, repeated))


@_law("order of rows")
def _order(case: _Case) -> None:
    shuffled = _rows(case.x, case.random.permutation(case.rows))
    case.close(case.e_step(case.params, shuffled), case.stats)


@_law("q is linear")
def _linear(case: _Case) -> bool | None:
    """Q of a sum of statistics is the sum of the Qs."""
    if not case.has("q_function"):
        return False
    at, _ = _coordinates(case, case.m_step(case.stats))
    together, *apart = (case.surrogate(at, stats)[0][0] for stats in (_add(*case.halves), *case.halves))
    case.close(together, sum(apart), "Q")
    return None


@_law("rebase is exact")
def _rebase(case: _Case) -> bool | None:
    """Statistics moved to the reference of other parameters lead to the same M-step."""
    if not case.has("rebase", "m_step"):
        return False
    best = case.m_step(case.stats)
    moved = jax.jit(lambda stats, params: case.model.rebase(stats, params))(case.stats, best)
    case.close(case.m_step(moved), best, "params", 10)
    return None


def _coordinates(case: _Case, params: Params) -> tuple[Any, Callable[[Any], Params]]:
    return case.unconstrain(params), case.constrain


@_law("bijection")
def _bijection(case: _Case) -> bool | None:
    """constrain undoes unconstrain."""
    if not case.has("unconstrain", "constrain"):
        return False
    theta, constrain = _coordinates(case, case.params)
    case.close(constrain(theta), case.params, "params")
    return None


@_law("Fisher's identity")
def _fisher(case: _Case) -> bool | None:
    """The gradient of the log-likelihood is the gradient of Q at the same parameters."""
    if not case.has("q_function"):
        return False
    theta, constrain = _coordinates(case, case.params)
    score = jax.jit(jax.grad(lambda theta: case.model.e_step(constrain(theta), case.x).loglik))(theta)
    (_, slope), _ = case.surrogate(theta, case.stats)
    case.close(score, slope, "gradient", 10)
    return None


@_law("m_step maximises")
def _maximal(case: _Case) -> bool | None:
    """The gradient of Q + log-prior is 0 at the M-step, and no random direction improves it."""
    if not case.has("q_function", "m_step"):
        return False
    theta, _ = _coordinates(case, case.m_step(case.stats))

    def total(theta: Any) -> tuple[Any, Any]:
        return _add(*case.surrogate(theta, case.stats))

    top, slope = total(theta)
    slope = jax.tree.map(lambda leaf: leaf / case.rows, slope)
    case.close(slope, jax.tree.map(np.zeros_like, slope), "gradient per row", 100)
    random = case.random
    for _ in range(8):
        away = jax.tree.map(lambda leaf: leaf + (1e-2 * random.normal(size=leaf.shape)).astype(leaf.dtype), theta)
        other, _ = total(away)
        assert not other > top + case.rtol * (abs(top) + 1), f"a step from the M-step raises Q from {top} to {other}"
    return None


@_law("conditional M-steps")
def _conditional(case: _Case) -> bool | None:
    """Over all blocks at once it is the M-step; over one, Q + log-prior does not fall."""
    if not case.has("blocks", "m_step_for", "q_function"):
        return False
    names = case.model.blocks(case.params)
    together, *alone = jax.jit(
        lambda params, stats: [case.model.m_step_for(params, stats, block) for block in (names, *zip(names))]
    )(case.params, case.stats)
    case.close(together, case.m_step(case.stats), "params")

    def total(params: Params) -> Any:
        return sum(value for value, _ in case.surrogate(_coordinates(case, params)[0], case.stats))

    before = total(case.params)
    for name, params in zip(names, alone, strict=True):
        assert total(params) >= before - case.rtol * (abs(before) + 1), f"Q falls over {name}"
    return None


@_law("monotone")
def _monotone(case: _Case) -> None:
    """Exact EM never lowers the objective by more than rounding."""
    result = case.fit(case.model, case.params, case.x, tol=-1.0, max_steps=20)
    history = np.asarray(result.history[: int(result.num_steps) + 1])
    allowed = case.rtol * (np.max(np.abs(history)) + 1)
    assert np.all(np.isfinite(history)), f"the objective is not finite: {history}"
    assert np.all(np.diff(history) >= -allowed), f"the objective falls by {-np.min(np.diff(history)):.3g}"
    assert history[-1] > history[0] - allowed


@_law("steps compose")
def _compose(case: _Case) -> bool | None:
    """Two steps are one step, and one more from there; and the objective is that of the params returned."""
    if not case.has("m_step"):
        return False  # the steps of an optimiser remember
    two = case.fit(case.model, case.params, case.x, tol=-1.0, max_steps=2)
    one = case.fit(case.model, case.params, case.x, tol=-1.0, max_steps=1)
    again = case.fit(case.model, one.params, case.x, tol=-1.0, max_steps=1)
    case.close(again.params, two.params, "params")
    case.close(two.loglik, case.e_step(two.params, case.x).loglik, "loglik of the result")
    return None


@_law("eager, jit and vmap agree")
def _transforms(case: _Case) -> None:
    eager = case.model.e_step(case.params, case.x)
    other = case.model.m_step(eager) if case.has("m_step") else case.params
    case.close(case.stats, eager, "jitted statistics")
    case.close(case.m_step(eager), other, "jitted params")
    both = jax.tree.map(lambda a, b: np.stack([a, b]), case.params, other)
    many = jax.jit(jax.vmap(case.model.e_step, in_axes=(0, None)))(both, case.x)
    case.close(_rows(many, 0), eager, "vmapped statistics")
    case.close(_rows(many, 1), case.e_step(other, case.x), "vmapped statistics")


@_law("one compilation")
def _compilation(case: _Case) -> None:
    """A second call with an equal model, other parameters and another tolerance compiles nothing."""
    case.fit(case.model, case.params, case.x, tol=1e-3, max_steps=2)
    leaves, structure = jax.tree.flatten(case.model)
    rebuilt = jax.tree.unflatten(structure, leaves)
    case.fit(rebuilt, case.m_step(case.stats), case.x, tol=1e-5, max_steps=3)
    assert len(case.traces) == 1, f"em_fit was traced {len(case.traces)} times"


@_law("float32")
def _single(case: _Case) -> bool | None:
    """Float32 in, float32 out, and close to float64."""
    if tree.float_dtype(case.x) != jnp.float64 or not case.has("m_step"):
        return False

    def single(a: Any) -> Any:
        return jax.tree.map(lambda leaf: np.float32(leaf) if jnp.result_type(leaf) == jnp.float64 else leaf, a)

    model = single(case.model)
    got = jax.jit(lambda params, x: model.m_step(model.e_step(params, x)))(single(case.params), single(case.x))
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(got) if jnp.issubdtype(leaf.dtype, jnp.floating)}
    assert dtypes <= {jnp.dtype(jnp.float32)}, f"float32 data gave params of {dtypes}"
    dataclasses.replace(case, rtol=2e-3).close(got, case.m_step(case.stats), "params")
    return None


@_law("blocks are the whole")
def _blocks(case: _Case) -> None:
    """Statistics gathered in blocks, the last one ragged, are those of all rows at once."""
    size = max(1, case.rows // 3 - 1)
    gather = jax.jit(lambda weights: EM(gather=Blocks(size)).init(case.model, case.params, case.x, weights).stats)
    dtype = tree.float_dtype(case.x)
    case.close(gather(np.ones(case.rows, dtype)), case.stats)
    weights = _integer_weights(case).astype(dtype)
    case.close(gather(weights), case.e_step(case.params, case.x, weights))


@_law("lower bound")
def _bound(case: _Case) -> bool | None:
    """log p(x) = ELBO(q) + KL(q || posterior) for arbitrary q, where the posterior is discrete or normal."""
    if case.has("posterior", "stats", "q_function"):
        # Latents that cannot be (a label says so, or the support) have no place in a q with a finite bound.
        q = np.where(case.posterior > 0, case.random.exponential(size=case.posterior.shape), 0)
        q = q.astype(case.posterior.dtype) / np.sum(q, axis=1, keepdims=True)
        other = functools.partial(jnp.asarray, q)
    elif case.has("infer", "statistics", "q_function", "unconstrain", "constrain"):
        # The posterior at other parameters is a q like any other, and has no room for what cannot be.
        theta, random = case.unconstrain(case.params), case.random
        away = jax.tree.map(lambda leaf: leaf + (0.3 * random.normal(size=leaf.shape)).astype(leaf.dtype), theta)
        other = functools.partial(case.model.infer, case.constrain(away), case.x)
        if not case.has("entropy", of=jax.eval_shape(other)):
            return False
    else:
        return False
    weights = case.random.integers(0, 3, case.rows).astype(tree.float_dtype(case.x))
    bound, gap = map(float, jax.jit(lambda w: free_energy(case.model, case.params, case.x, other(), w))(weights))
    assert gap >= -case.rtol * (abs(bound) + 1), f"KL(q || posterior) is negative: {gap}"
    case.close(bound + gap, float(case.e_step(case.params, case.x, weights).loglik), "ELBO + KL")
    return None


@_law("brute force")
def _brute(case: _Case) -> bool | None:
    """The log-likelihood is the log of the sum over all latent configurations of exp(complete log-likelihood)."""
    if not case.has("posterior", "stats", "q_function"):
        return False
    few, possible = _rows(case.x, slice(3)), case.posterior[:3] > 0
    count = possible.shape[1]

    def complete(labels: jax.Array) -> jax.Array:
        sure = jax.nn.one_hot(labels, count, dtype=tree.float_dtype(few))
        return case.model.q_function(case.params, case.model.stats(case.params, few, sure))

    configurations = np.asarray(list(itertools.product(*(np.flatnonzero(row) for row in possible))))
    every = np.asarray(jax.jit(jax.vmap(complete))(configurations))
    total = np.max(every) + np.log(np.sum(np.exp(every - np.max(every))))
    only_few = (np.arange(case.rows) < 3).astype(tree.float_dtype(few))
    case.close(total, case.e_step(case.params, case.x, only_few).loglik, "log-likelihood")
    return None
