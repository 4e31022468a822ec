"""Item response models: abilities of persons, difficulty and discrimination of items, from answers alone."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import capabilities, checks, latents, numerics, parameters, seeding, tree
from ..families import columns
from ..latents import Exact, categorical
from ..latents.categorical import CategoricalPosterior
from ..protocols import Data
from ..record import record, static
from ..slots import Expect
from . import item_curves
from .item_curves import ItemResponseParams as ItemResponseParams
from .item_curves import ItemResponseStats as ItemResponseStats

# How many slopes are estimated: none (all are 1), one for all items, or one an item.
MODELS = {"rasch": "one", "1PL": "common", "2PL": "own", "3PL": "own"}

# Nodes of the quadrature reach so many standard deviations of the ability.
_REACH = 6.0

# Number of nodes from which on likelihoods do not depend noticeably on where the nodes lie.
_FINE = 41

# Difference of logits at neighbouring nodes above which a curve is a step, and its slope goes to infinity.
_STEP = 5.0

# Most items for which a row of answers is coded as one 64-bit number, in base 3, to find equal rows.
_CODED = 39

# Where guessing starts, and how much slopes of starts differ, in logarithms.
_GUESSING, _SPREAD = 0.15, 0.2

# Fisher scoring steps to the posterior mode of an ability, from the likeliest node.
_ABILITY_STEPS = 20


@record
class Abilities:
    """Estimated abilities; see `ItemResponse.abilities`.

    estimate: (N,).
    standard_error: (N,).
    """

    estimate: jax.Array
    standard_error: jax.Array


@capabilities.completed("model")
@record(kw_only=False)
class ItemResponse:
    """logit p(answer j right | ability) = discrimination_j (ability - difficulty_j), with ability ~ N(0, 1).

    model: "rasch", slopes of 1; "1PL", one slope for all items, which is a Rasch model with abilities of any variance;
        "2PL", a slope an item; or "3PL", in which who does not know an answer guesses it, as likely as the item says.
    num_nodes: Q, nodes of the quadrature over abilities, evenly from -6 to 6. Its error falls exponentially with Q: by
        61 nodes to 1e-8 for slopes up to 5, steeper ones need more.
    missing: False promises that no floating-point entry is NaN, and saves compiling for it.

    Data: answers (N, J), 1 right and 0 wrong; NaN, or -1 among whole numbers, is a question that was not put, or whose
    answer is missing at random. A pattern that comes more than once may be one row, weighted by its count: a fit finds
    these by itself where items are few.
    Marginal maximum likelihood: the posterior over nodes gives expected counts of right answers at every node, and the
    M-step is a logistic regression an item on them (Bock & Aitkin 1981, Marginal maximum likelihood estimation of item
    parameters, Psychometrika 46). Where no algorithm is named, M-steps are parameter-expanded (`Expanded`): abilities
    get a mean and variance, which items absorb. In "3PL" it is latent too which answers are guessed: EM crawls, and is
    accelerated by `anderson`.
    Raises ValueError for another model, TypeError or ValueError for a num_nodes that is no whole number above 0.
    """

    model: str = static(default="2PL")
    num_nodes: int = static(default=61, kw_only=True)
    missing: bool = static(default=True, kw_only=True)

    @property
    def expands(self) -> bool:
        """Whether nodes are dense enough that shifting or scaling abilities and items together keeps the likelihood, as
        parameter expansion requires."""
        return self.num_nodes >= _FINE

    def __post_init__(self) -> None:
        checks.choice("model", self.model, MODELS)
        checks.positive_integer("num_nodes", self.num_nodes)

    @property
    def crawls(self) -> bool:
        return self.model == "3PL"

    @property
    def supports(self) -> parameters.Supports:
        return {"guessing": parameters.between_zero_and_one} if self.model == "3PL" else {}

    def nodes(self, dtype: Any = None) -> jax.Array:
        """Abilities (Q,) at which likelihoods are taken."""
        return jnp.asarray(self._quadrature()[0], dtype)

    @seeding.start()
    @jax.jit
    def init(self, key: jax.Array, x: Data, weights: jax.Array | None = None) -> ItemResponseParams:
        """A start: difficulties from the shares of right answers, slopes about 1 drawn at random."""
        x, weights = tree.present(x, weights)
        values, observed = self._answers(x, tree.float_dtype(x))
        every = jnp.ones(len(values), values.dtype) if weights is None else weights.astype(values.dtype)
        right = numerics.product(every, values, "n,nj->j")
        total = jnp.sum(every) if observed is None else numerics.product(every, observed, "n,nj->j")
        logit = jnp.log(right + 0.5) - jnp.log(total - right + 0.5)
        shape = (values.shape[1] if MODELS[self.model] == "own" else 1,)
        slope = jnp.exp(_SPREAD * jax.random.normal(key, shape, values.dtype))
        slope = jnp.broadcast_to(jnp.ones_like(slope) if self.model == "rasch" else slope, logit.shape)
        # A logistic curve is nearly a normal distribution function of variance 2.9, to which abilities add slope².
        intercept = logit * jnp.sqrt(1 + jnp.square(slope) / 2.9)
        guessing = jnp.full_like(slope, _GUESSING) if self.model == "3PL" else None
        return ItemResponseParams(discrimination=slope, difficulty=-intercept / slope, guessing=guessing)

    def log_joint(self, params: ItemResponseParams, x: Data) -> jax.Array:
        """log p(ability at node q, answers n): (Q, N)."""
        parameters.shapes("params", self, params, x)
        params = tree.no_whole_numbers(params, x)
        values, observed = self._answers(x, params.difficulty.dtype)
        nodes, log_weights = (jnp.asarray(part, values.dtype) for part in self._quadrature())
        found = item_curves.curves(params, nodes)
        joint = numerics.product(found.right - found.wrong, values, "jq,nj->qn") + log_weights[:, None]
        if observed is None:
            return joint + jnp.sum(found.wrong, axis=0)[:, None]
        return joint + numerics.product(found.wrong, observed, "jq,nj->qn")

    def infer(self, params: ItemResponseParams, x: Data, expect: Expect = Exact()) -> CategoricalPosterior:
        """The posterior over nodes of the ability of every row; its `evidence` is log p(x_n), (N,)."""
        return categorical.infer(self.log_joint(params, x), expect)

    def statistics(
        self,
        params: ItemResponseParams,
        x: Data,
        posterior: CategoricalPosterior,
        weights: jax.Array | None = None,
    ) -> ItemResponseStats:
        """Expected answers at every node under any posterior over nodes; loglik is the sum of its evidence.

        A vanishing pseudo-answer keeps the parameters of items without any answer.
        """
        params = tree.no_whole_numbers(params, x)
        values, observed = self._answers(x, params.difficulty.dtype)
        share = posterior.responsibilities
        if weights is not None:
            weights = weights.astype(share.dtype)
            share = jnp.where(weights[None] > 0, share * weights[None], 0)
        rows, pseudo = jnp.sum(share, axis=1), columns.PSEUDO_COUNT
        found = item_curves.curves(params, self.nodes(share.dtype))
        correct = numerics.product(values, share, "nj,qn->jq") + pseudo * jnp.exp(found.right)
        if observed is None:
            total = jnp.broadcast_to(rows[None], correct.shape) + pseudo
        else:
            total = numerics.product(observed, share, "nj,qn->jq") + pseudo
        known, entropy = correct, jnp.zeros((), share.dtype)
        if self.model == "3PL":
            known, entropy = item_curves.known(found, correct)
        return ItemResponseStats(
            nodes=rows,
            total=total,
            correct=correct,
            known=known,
            entropy=entropy,
            reference=(jnp.sum(rows) + pseudo) * jnp.stack(item_curves.line_of(params)),
            loglik=numerics.weighted_sum(posterior.evidence, weights),
        )

    e_step = latents.e_step
    stats = categorical.stats
    log_prob = categorical.log_prob
    posterior = categorical.responsibilities

    def m_step(self, stats: ItemResponseStats) -> ItemResponseParams:
        """A logistic regression an item on the nodes, of expected counts."""
        nodes = self.nodes(stats.known.dtype)
        slope, intercept = item_curves.steepest(stats.known, stats.total, stats.line, nodes, MODELS[self.model])
        # Difficulty = -intercept / slope is infinite at slope 0: a tiny slope keeps it finite.
        least = jnp.finfo(slope.dtype).eps ** 0.5
        slope = jnp.where(jnp.abs(slope) < least, jnp.where(slope < 0, -least, least), slope)
        guessing = None
        if self.model == "3PL":
            guessed, unknown = stats.correct - stats.known, stats.total - stats.known
            guessing = numerics.safe_divide(jnp.sum(guessed, axis=1), jnp.sum(unknown, axis=1))
        return ItemResponseParams(discrimination=slope, difficulty=-intercept / slope, guessing=guessing)

    def expanded(
        self, params: ItemResponseParams, stats: ItemResponseStats, held: tuple[str, ...] = ()
    ) -> ItemResponseParams:
        """The M-step with abilities of any mean and variance, which items then absorb, unless one of them is held."""
        if held:
            return params
        nodes, count = self.nodes(stats.nodes.dtype), jnp.sum(stats.nodes)
        mean = jnp.sum(stats.nodes * nodes) / count
        if self.model == "rasch":
            return dataclasses.replace(params, difficulty=params.difficulty - mean)
        spread = jnp.sqrt(jnp.sum(stats.nodes * jnp.square(nodes - mean)) / count)
        slope, difficulty = params.discrimination * spread, (params.difficulty - mean) / spread
        return dataclasses.replace(params, discrimination=slope, difficulty=difficulty)

    def q_function(self, params: ItemResponseParams, stats: ItemResponseStats) -> jax.Array:
        """Expected log-probability of abilities and answers, for "3PL" a lower bound of it."""
        nodes, log_weights = (jnp.asarray(part, stats.nodes.dtype) for part in self._quadrature())
        found = item_curves.curves(params, nodes)
        answers = jnp.sum(stats.known * found.knows + (stats.total - stats.known) * found.fails)
        total = answers + jnp.sum(stats.nodes * log_weights) + stats.entropy
        if params.guessing is None:
            return total
        guessed, wrong = (
            jnp.sum(a - b, axis=1) for a, b in ((stats.correct, stats.known), (stats.total, stats.correct))
        )
        guesses = jax.scipy.special.xlogy(guessed, params.guessing) + jax.scipy.special.xlog1py(wrong, -params.guessing)
        return total + jnp.sum(guesses)

    def log_prior(self, params: ItemResponseParams) -> jax.Array:
        """0: there is no prior."""
        return jnp.zeros((), params.difficulty.dtype)

    def rebase(self, stats: ItemResponseStats, params: ItemResponseParams) -> ItemResponseStats:
        """The same statistics, with the M-step's Newton iteration to begin at `params`."""
        count = jnp.sum(stats.nodes) + columns.PSEUDO_COUNT
        return dataclasses.replace(stats, reference=count * jnp.stack(item_curves.line_of(params)))

    def degenerate(self, stats: ItemResponseStats) -> jax.Array:
        """Items (J,) that all answered alike, or whose curve became a step between two abilities."""
        right, total = jnp.sum(stats.correct, axis=1), jnp.sum(stats.total, axis=1)
        least = 8 * jnp.finfo(total.dtype).eps * total
        steep = jnp.abs(stats.line[0]) * (2 * _REACH / max(1, self.num_nodes - 1)) > _STEP
        return (right <= least) | (total - right <= least) | steep

    def unconstrain(self, params: ItemResponseParams) -> ItemResponseParams:
        """The free slopes, (J,), (1,) or (0,), and difficulties as they are, and logits of guessing."""
        free = {"one": 0, "common": 1, "own": None}[MODELS[self.model]]
        guessing = None if params.guessing is None else jax.scipy.special.logit(params.guessing)
        return dataclasses.replace(params, discrimination=params.discrimination[:free], guessing=guessing)

    def constrain(self, theta: ItemResponseParams) -> ItemResponseParams:
        """Inverse of `unconstrain`."""
        slope = jnp.ones(1, theta.difficulty.dtype) if self.model == "rasch" else theta.discrimination
        guessing = None if theta.guessing is None else jax.nn.sigmoid(theta.guessing)
        slope = jnp.broadcast_to(slope, theta.difficulty.shape)
        return dataclasses.replace(theta, discrimination=slope, guessing=guessing)

    def abilities(self, params: ItemResponseParams, x: Data, *, method: str = "EAP") -> Abilities:
        """Abilities (N,) of all rows with standard errors: posterior mean and standard deviation ("EAP"), or posterior
        mode and 1 / sqrt(I + 1), I the test information there and 1 that of the prior ("MAP").

        Both are finite for rows that are all right or all wrong. Bock & Mislevy (1982), Applied Psychological
        Measurement 6.
        """
        checks.choice("method", method, ("EAP", "MAP"))
        return self._abilities(params, x, method=method)

    @parameters.at_rows
    @functools.partial(jax.jit, static_argnames="method")
    def _abilities(self, params: ItemResponseParams, x: Data, method: str) -> Abilities:
        size = tree.rows_per_block(self.floats_per_row(params, x), tree.float_dtype(x))
        params = tree.no_whole_numbers(params, x)
        return tree.map_over_blocks(lambda rows: (self._mean if method == "EAP" else self._mode)(params, rows), x, size)

    def _mean(self, params: ItemResponseParams, x: Data) -> Abilities:
        share = self.infer(params, x).responsibilities
        nodes = self.nodes(share.dtype)
        mean = numerics.product(nodes, share, "q,qn->n")
        spread = jnp.sum(share * jnp.square(nodes[:, None] - mean[None]), axis=0)
        return Abilities(estimate=mean, standard_error=jnp.sqrt(spread))

    def _mode(self, params: ItemResponseParams, x: Data) -> Abilities:
        values, observed = self._answers(x, params.difficulty.dtype)
        there = jnp.ones_like(values) if observed is None else observed
        nodes = self.nodes(values.dtype)

        def score(ability: jax.Array) -> tuple[jax.Array, jax.Array]:
            """Slope of the log-posterior, and the information."""
            found = item_curves.curves(params, ability)
            p, told = jnp.exp(found.right), item_curves.information(params, ability)
            rise = jnp.exp(found.knows - found.right) * params.discrimination[:, None]
            return jnp.sum(rise.T * (values - there * p.T), axis=1) - ability, jnp.sum(there * told.T, axis=1) + 1

        def climb(_: int, ability: jax.Array) -> jax.Array:
            slope, information = score(ability)
            reach = 2 * _REACH / self.num_nodes
            return ability + jnp.clip(slope / information, -reach, reach)

        start = nodes[jnp.argmax(self.log_joint(params, x), axis=0)]
        ability = jax.lax.fori_loop(0, _ABILITY_STEPS, climb, start)
        return Abilities(estimate=ability, standard_error=jax.lax.rsqrt(score(ability)[1]))

    def curves(self, params: ItemResponseParams, abilities: jax.Array) -> jax.Array:
        """p(answer right) of every item at abilities (T,): (T, J)."""
        return jnp.exp(item_curves.curves(params, checks.array("abilities", abilities)).right).T

    def information(self, params: ItemResponseParams, abilities: jax.Array) -> jax.Array:
        """Fisher's information on the ability that every item gives, at abilities (T,): (T, J); the test's is the sum
        over items."""
        return item_curves.information(params, checks.array("abilities", abilities)).T

    def sample(self, key: jax.Array, params: ItemResponseParams, n: int) -> jax.Array:
        """Answers (n, J), 0 or 1, of n persons; see `sample_with_abilities`."""
        return self.sample_with_abilities(key, params, n)[0]

    def sample_with_abilities(self, key: jax.Array, params: ItemResponseParams, n: int) -> tuple[jax.Array, jax.Array]:
        """Answers (n, J), 0 or 1, of n persons, and their abilities (n,)."""
        checks.positive_integer("n", n)
        key_abilities, key_answers = jax.random.split(checks.random_key(key))
        dtype = params.difficulty.dtype
        abilities = jax.random.normal(key_abilities, (n,), dtype)
        return jax.random.bernoulli(key_answers, self.curves(params, abilities)).astype(dtype), abilities

    def num_parameters(self, params: ItemResponseParams) -> int:
        """Free parameters."""
        return sum(self.degrees(params).values())

    def degrees(self, params: ItemResponseParams) -> dict[str, int]:
        """Free parameters by name."""
        items = len(params.difficulty)
        slopes = {"one": 0, "common": 1, "own": items}[MODELS[self.model]]
        found = {"discrimination": slopes, "difficulty": items}
        return {**found, "guessing": items} if self.model == "3PL" else found

    def check(self, x: Data, weights: jax.Array | None = None) -> None:
        """Raise ValueError or TypeError for bad data, by name. Under jit only shapes are looked at."""
        columns.check("x", x, lambda values: (values == 0) | (values == 1), "answers, 1 right and 0 wrong")
        rows = checks.row_shape("x", x)[0]
        checks.row_weights(weights, rows)
        if not checks.is_concrete((x, weights)):
            return
        given = np.asarray(x).reshape(rows, -1)
        given = given if weights is None else given[np.asarray(weights) > 0]
        right, wrong = np.any(given == 1, axis=0), np.any(given == 0, axis=0)
        if not np.all(right & wrong):
            item = int(np.argmin(right & wrong))
            alike = "only" if right[item] else "no"
            checks.some_observed(
                f"x must have right and wrong answers to every item; item {item} has {alike} right ones, which put its "
                "difficulty at infinity: drop it"
            )

    def params_like(self, x: Data) -> ItemResponseParams:
        """The shapes that parameters have for such data."""
        like = parameters.like((checks.row_shape("x", x)[1],), tree.float_dtype(x))
        return ItemResponseParams(discrimination=like, difficulty=like, guessing=like if self.model == "3PL" else None)

    def reduced(self, x: Data, weights: jax.Array | None = None) -> tuple[Data, jax.Array | None]:
        """Patterns of answers and how many rows have each, where they are few; else the answers as floating-point
        numbers, in which missing ones are NaN."""
        if not checks.is_concrete((x, weights)):
            return x, weights
        rows, dtype = np.asarray(x).reshape(checks.row_shape("x", x)), tree.float_dtype(x)
        rows = np.where((rows == 0) | (rows == 1), rows, np.nan).astype(dtype)
        if rows.shape[1] > _CODED:
            return checks.on_device(rows), weights
        digits = np.where(np.isnan(rows), 2, rows).astype(np.int64)
        _, first, which = np.unique(digits @ 3 ** np.arange(rows.shape[1]), return_index=True, return_inverse=True)
        if 2 * len(first) > len(rows):
            return checks.on_device(rows), weights
        counts = np.bincount(which.ravel(), None if weights is None else np.asarray(weights, float))
        return checks.on_device(rows[first]), jnp.asarray(counts, dtype)

    def without_missing(self) -> "ItemResponse":
        """The form for rows in which no floating-point entry is missing."""
        return dataclasses.replace(self, missing=False) if self.missing else self

    def floats_per_row(self, params: ItemResponseParams, x: Data) -> int:
        """Temporaries of an E-step, in numbers a row."""
        return 3 * self.num_nodes + 2 * len(params.difficulty)

    def _quadrature(self) -> tuple[np.ndarray, np.ndarray]:
        """Nodes (Q,) and the logarithms of their weights."""
        nodes = np.linspace(-_REACH, _REACH, self.num_nodes) if self.num_nodes > 1 else np.zeros(1)
        density = -0.5 * np.square(nodes)
        return nodes, density - np.log(np.sum(np.exp(density)))

    def _answers(self, x: Data, dtype: Any) -> tuple[jax.Array, jax.Array | None]:
        """Answers (N, J) as floating-point numbers, 0 where missing; 1 where observed, or None if none is missing."""
        rows = checks.columns("x", x)
        whole = jnp.issubdtype(rows.dtype, jnp.signedinteger)
        if not whole and not (self.missing and jnp.issubdtype(rows.dtype, jnp.floating)):
            return rows.astype(dtype), None
        values, observed = columns.read(rows, dtype)
        return values, observed.astype(dtype)
