"""The family of EM: what fills a slot, and what wraps a step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st
from jitted import begin, e_step, free_energy, m_step, m_step_for, there_and_back
from zoo import zoo

import jaxem
from jaxem import (
    EM,
    Bernoulli,
    Blocks,
    Conditional,
    Exact,
    Fixed,
    Gradient,
    Hard,
    Incremental,
    KMeans,
    Labelled,
    Mixture,
    MixtureParams,
    Normal,
    NormalParams,
    Poisson,
    PoissonParams,
    PowerRate,
    Sample,
    Screen,
    Status,
    Stepwise,
    StudentT,
    VarianceReduced,
    anderson,
    annealed,
    annealed_em,
    averaged,
    datasets,
    ecm,
    em_fit,
    fit_restarts,
    from_functions,
    generalized_em,
    incremental_em,
    monte_carlo_em,
    squarem,
    stepwise_em,
    stochastic_em,
)
from jaxem.em import minibatch, pose
from jaxem.testing import check_model

pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(3)
DEATHS, DAYS = np.arange(10.0), np.array([162, 267, 271, 185, 111, 61, 27, 8, 3, 1.0])
MODEL = Mixture(Poisson(), 2)


def deaths(first=0.3, rates=(1.0, 2.5)):
    """Hasselblad's start for The Times deaths."""
    return MixtureParams(
        weights=jnp.array([first, 1 - first]), components=PoissonParams(rate=jnp.array(rates)[:, None])
    )


def counts(rows=60, seed=5):
    """Rows from two Poissons that overlap, and a start for them."""
    rng = np.random.default_rng(seed)
    x = rng.poisson(np.where(rng.random(rows) < 0.4, 2.0, 6.0)).astype(float)
    return x, deaths(0.5, (3.0, 5.0))


def history(fit):
    return np.asarray(fit.history)[: int(fit.num_steps) + 1]


def assert_close(a, b, rtol=1e-10, atol=1e-12):
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(left, right, rtol=rtol, atol=atol)


# --- expect -----------------------------------------------------------------------------------------------------------


def test_a_tempered_posterior_is_the_posterior_to_a_power():
    x, params = counts()
    exact = np.asarray(MODEL.posterior(params, x))
    power = exact ** (1 / 1.7)
    power = power / np.sum(power, axis=1, keepdims=True)
    tempered = e_step(MODEL, params, x, expect=Exact(1.7))
    np.testing.assert_allclose(tempered.counts, np.sum(power, axis=0), rtol=1e-12)
    joint = np.asarray(MODEL.log_prob(params, x))[:, None] + np.log(exact)
    np.testing.assert_allclose(tempered.loglik, np.sum(1.7 * scipy.special.logsumexp(joint / 1.7, axis=1)), rtol=1e-12)


def test_temperatures_lead_from_soft_to_hard():
    x, params = counts()
    assert_close(e_step(MODEL, params, x, expect=Exact(1.0)), e_step(MODEL, params, x))
    cold, hard = (e_step(MODEL, params, x, expect=expect) for expect in (Exact(1e-4), Hard()))
    np.testing.assert_allclose(cold.counts, hard.counts, atol=1e-6)
    np.testing.assert_allclose(cold.loglik, hard.loglik, rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_em_at_one_temperature_climbs_the_tempered_objective(temperature):
    x, params = counts()
    fit = em_fit(MODEL, params, x, algorithm=EM(expect=Exact(temperature)), tol=1e-9)
    assert fit.converged
    assert np.all(np.diff(history(fit)) >= -1e-10)


def test_draws_average_to_the_posterior():
    x, params = counts()
    draws = 4000
    exact = e_step(MODEL, params, x)
    drawn = e_step(MODEL, params, x, expect=Sample(draws, key=KEY))
    posterior = np.asarray(MODEL.posterior(params, x))
    # Counts are sums of independent shares: five standard deviations of them.
    spread = np.sqrt(np.sum(posterior * (1 - posterior), axis=0) / draws)
    assert np.all(np.abs(drawn.counts - exact.counts) < 5 * spread)
    np.testing.assert_allclose(np.sum(drawn.counts), len(x), rtol=1e-12)
    np.testing.assert_allclose(drawn.loglik, exact.loglik, rtol=1e-12)


def test_one_draw_gives_every_row_to_one_component_and_labels_are_kept():
    x, params = counts()
    labels = np.where(np.arange(len(x)) % 2 == 0, 1, -1)

    @jax.jit
    @jax.vmap
    def each(row, label):
        return MODEL.e_step(params, Labelled(row[None], label[None]), expect=Sample(key=KEY))

    stats = each(x, labels)
    share = np.asarray(stats.counts)
    np.testing.assert_allclose(share, np.round(share), atol=1e-12)
    np.testing.assert_allclose(share[::2], np.tile([0, 1], (30, 1)), atol=1e-12)


def test_draws_follow_the_schedule_and_blocks_have_their_own():
    x = np.zeros(1)
    params = deaths(0.5, (1.0, 1.2))
    algorithm = monte_carlo_em(8, lambda step: 1 + step)
    state = begin(MODEL, algorithm, params, x, key=KEY)
    # Back to the same parameters, so that shares stay inside (0, 1).
    moved = jax.jit(lambda state: algorithm.moved(pose(MODEL, x, None), state, params))
    for draws in range(1, 12):
        assert state.num_steps == draws - 1
        share = float(state.stats.counts[0])
        used = min(draws, 8)
        assert abs(share * used - round(share * used)) < 1e-9
        state = dataclasses.replace(moved(state), num_steps=state.num_steps + 1)
    # The same row in every block, one draw each: not all of them fall alike.
    many = np.zeros(64)
    blocks = begin(MODEL, EM(expect=Sample(1), gather=Blocks(1)), params, many, key=KEY).stats
    assert 8 < float(blocks.counts[0]) < 56


def test_random_steps_are_new_every_step_and_the_same_for_a_key():
    x, params = counts()
    one, same = (em_fit(MODEL, params, x, key=KEY, algorithm=stochastic_em(), max_steps=30) for _ in range(2))
    other = em_fit(MODEL, params, x, key=jax.random.key(9), algorithm=stochastic_em(), max_steps=30)
    assert_close(one, same, 0, 0)
    assert not np.array_equal(one.history, other.history)
    assert len(np.unique(history(one))) > 20
    assert one.status == Status.MAX_STEPS


def test_monte_carlo_em_wanders_less_with_more_draws():
    x, params = counts(200)
    few, many = (em_fit(MODEL, params, x, key=KEY, algorithm=monte_carlo_em(draws), max_steps=80) for draws in (1, 64))
    assert np.std(history(many)[40:]) < 0.3 * np.std(history(few)[40:])


# --- gather -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gather", [Stepwise(None, 1.0), Stepwise(60, 1.0), Incremental(1)], ids=repr)
def test_one_batch_of_all_rows_is_batch_em(gather):
    x, params = counts()
    weights = np.random.default_rng(0).uniform(0, 2, 60)
    plain = em_fit(MODEL, params, x, weights, tol=-1.0, max_steps=5)
    fit = em_fit(MODEL, params, x, weights, key=KEY, algorithm=EM(gather=gather), tol=-1.0, max_steps=5)
    assert_close(fit.params, plain.params, 1e-12)
    np.testing.assert_allclose(fit.objective, plain.objective, rtol=1e-12)
    np.testing.assert_allclose(history(fit), history(plain), rtol=1e-12)


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_batches_of_a_pass_are_all_rows_once(shuffle):
    x, params = counts()
    weights = np.random.default_rng(0).integers(0, 3, 60).astype(float)
    problem = pose(MODEL, jnp.asarray(x), jnp.asarray(weights))
    turn = minibatch.start_turn(12, shuffle, 60, KEY)
    expected = e_step(MODEL, params, x, weights)
    orders = []

    @jax.jit
    def batch(turn):
        return minibatch.batch_stats(problem, params, turn, 12, Exact()), minibatch.next_batch(turn, 60)

    for _ in range(3):
        total = None
        orders.append(np.asarray(turn.batches))
        for _ in range(5):
            part, turn = batch(turn)
            part = jax.tree.map(lambda leaf: np.asarray(leaf) / 5, part)
            total = part if total is None else jax.tree.map(np.add, total, part)
        assert_close(total, expected, 1e-9, 1e-9)
    assert not all(np.array_equal(order, orders[0]) for order in orders)


@pytest.mark.parametrize("shuffle", [True, False])
def test_all_rows_take_part_in_the_long_run(shuffle):
    """Of ten rows two batches of four leave out two, and not the same two in every pass."""
    x, params = jnp.arange(10.0), deaths()
    eye = jnp.eye(10)

    def step(turn, _):
        # Row n as data of its own: which rows are in the batch.
        seen = jax.vmap(lambda w: is_in(turn, w))(eye)
        return minibatch.next_batch(turn, 10), seen

    def is_in(turn, weights):
        return jnp.sum(minibatch.batch_stats(pose(MODEL, x, weights), params, turn, 4, Exact()).counts) > 1

    _, seen = jax.jit(lambda key: jax.lax.scan(step, minibatch.start_turn(4, shuffle, 10, key), length=800))(KEY)
    seen = np.asarray(seen)
    assert np.all(seen.sum(axis=1) == 4)
    assert np.all(seen.reshape(400, 2, 10).sum(axis=1) <= 1)
    share = seen.mean(axis=0)  # 0.4 each, give or take five standard deviations
    assert np.all(np.abs(share - 0.4) < 5 * np.sqrt(0.4 * 0.6 / 800))


def test_statistics_of_two_steps_are_mixed_as_raw_moments_are():
    model, x = zoo()["full"]
    here = model.init(jax.random.key(0), x)
    there = m_step(model, e_step(model, here, x))
    old, new = e_step(model, here, x), e_step(model, there, x)
    mixed = jax.jit(lambda: minibatch.mix(model, there, old, new, 0.3))()
    share = 0.7 * np.asarray(model.posterior(here, x)) + 0.3 * np.asarray(model.posterior(there, x))
    assert_close(m_step(model, mixed), model.params_from_responsibilities(x, share), 1e-9)


def test_stepwise_em_counts_passes_and_tells_the_exact_objective_at_the_end():
    x, params = counts()
    fit = em_fit(MODEL, params, x, key=KEY, algorithm=stepwise_em(12), max_steps=40)
    np.testing.assert_allclose(fit.num_passes, 41 * 12 / 60 + 1, rtol=1e-12)
    np.testing.assert_allclose(fit.loglik, jnp.sum(MODEL.log_prob(fit.params, x)), rtol=1e-12)
    np.testing.assert_allclose(fit.history[40], fit.objective, rtol=1e-12)
    assert fit.status == Status.MAX_STEPS
    batch = em_fit(MODEL, params, x, tol=1e-9)
    assert 0 <= batch.objective - fit.objective < 0.01 * 60
    assert em_fit(MODEL, params, x, tol=-1.0, max_steps=3).num_passes == 4


def test_averages_may_converge_and_are_better_than_the_last_step():
    x, params = counts(400)
    batch = em_fit(MODEL, params, x, tol=1e-9)
    fast = Stepwise(20, 0.5)
    last = em_fit(MODEL, params, x, key=KEY, algorithm=EM(gather=fast), max_steps=512)
    mean = em_fit(MODEL, params, x, key=KEY, algorithm=averaged(EM(gather=fast)), tol=1e-4, max_steps=4096)
    assert mean.converged
    short = batch.objective - jnp.array([mean.objective, last.objective])
    assert 0 <= short[0] < 1e-2 * 400
    assert short[0] < short[1]
    np.testing.assert_allclose(mean.loglik, jnp.sum(MODEL.log_prob(mean.params, x)), rtol=1e-12)
    # Of draws, the mean is near the limit too.
    drawn = em_fit(MODEL, params, x, key=KEY, algorithm=averaged(stochastic_em(), start=20), tol=-1.0, max_steps=300)
    assert 0 <= batch.objective - drawn.objective < 0.5


def test_saem_is_a_composition():
    x, params = counts(200)
    saem = EM(expect=Sample(1), gather=Stepwise(rate=PowerRate(1.0, 0.0)))
    fit = em_fit(MODEL, params, x, key=KEY, algorithm=saem, max_steps=400)
    batch = em_fit(MODEL, params, x, tol=1e-9)
    wild = em_fit(MODEL, params, x, key=KEY, algorithm=stochastic_em(), max_steps=400)
    assert 0 <= batch.objective - fit.objective < 0.2
    assert np.std(history(fit)[-50:]) < 0.1 * np.std(history(wild)[-50:])


@pytest.mark.parametrize(
    ("name", "blocks"), [("full", 3), ("poisson", 7), ("student t", 3), ("bernoulli, prior, missing", 4)]
)
def test_incremental_em_climbs_the_free_energy_piece_by_piece(name, blocks):
    """The reported value is the free energy at the posteriors that the pieces have, and never falls."""
    model, x = zoo()[name]
    x = jax.tree.map(jnp.asarray, x)
    algorithm = incremental_em(blocks)
    state = begin(model, algorithm, model.init(jax.random.key(1), x), x)
    rows = jax.tree.leaves(x)[0].shape[0]
    edges = np.arange(blocks + 1) * rows // blocks
    q = np.array(model.posterior(state.params, x))

    @jax.jit
    def part(state, index):
        params, _ = algorithm.maximized(pose(model, x, None), state)
        return algorithm.moved(pose(model, x, None), state, params, index)

    prior = getattr(model, "log_prior", lambda _: 0.0)
    value = state.loglik + prior(state.params)
    for index in range(2 * blocks):
        piece = slice(edges[index % blocks], edges[index % blocks + 1])
        state = part(state, index % blocks)
        q[piece] = np.asarray(model.posterior(state.params, x))[piece]
        fresh = state.loglik + prior(state.params)
        assert fresh >= value - 1e-9 * abs(value)
        value = fresh
        if name != "student t":  # whose own latents have a posterior of their own
            np.testing.assert_allclose(state.loglik, free_energy(model, state.params, x, q).bound, rtol=1e-9)


def test_incremental_em_takes_fewer_passes_to_the_same_optimum():
    x, params = counts(400)
    batch = em_fit(MODEL, params, x, tol=1e-8)
    fit = em_fit(MODEL, params, x, tol=1e-8, algorithm=incremental_em(10))
    assert fit.converged
    assert np.all(np.diff(history(fit)) >= -1e-9)
    np.testing.assert_allclose(fit.objective, batch.objective, atol=1e-4)
    assert fit.num_passes < 0.7 * batch.num_passes


def test_variance_reduced_em_converges_to_the_optimum_of_batch_em():
    x, params = counts(400)
    algorithm = EM(gather=VarianceReduced(20, 0.2))
    fit = em_fit(MODEL, params, x, key=KEY, algorithm=algorithm, tol=1e-8)
    batch = em_fit(MODEL, params, x, tol=1e-10)
    assert fit.converged
    np.testing.assert_allclose(fit.objective, batch.objective, atol=1e-5)
    np.testing.assert_allclose(fit.num_passes, 1 + 3 * fit.num_steps)
    np.testing.assert_allclose(fit.objective, jnp.sum(MODEL.log_prob(fit.params, x)), rtol=1e-12)


# --- maximize ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer",
    [optax.adam(0.3), optax.sgd(50.0), optax.adam(1e4), optax.lbfgs()],
    ids=["adam", "sgd", "wild", "lbfgs"],
)
def test_gradient_steps_never_lower_the_objective(optimizer):
    x, params = counts()
    fit = em_fit(MODEL, params, x, algorithm=generalized_em(optimizer, 3), tol=-1.0, max_steps=40)
    assert np.all(np.isfinite(history(fit)))
    assert np.all(np.diff(history(fit)) >= -1e-10 * abs(fit.objective))
    assert fit.history[40] > fit.history[0]


def test_gradient_steps_reach_the_optimum_of_em_and_remember():
    x, params = counts()
    batch = em_fit(MODEL, params, x, tol=1e-9)
    fit = em_fit(MODEL, params, x, algorithm=generalized_em(), tol=1e-9)
    assert fit.converged
    np.testing.assert_allclose(fit.objective, batch.objective, atol=1e-6)
    algorithm = generalized_em(optax.adam(1e-3), 3)
    state = jax.jit(lambda: algorithm.step(MODEL, algorithm.step(MODEL, algorithm.init(MODEL, params, x), x), x))()
    assert int(optax.tree.get(state.maximize.optimizer, "count")) == 6


def test_a_model_without_an_m_step_climbs_its_q():
    heads = jnp.array([5.0, 9.0, 8.0, 4.0, 7.0])

    def e_step(theta, heads):
        log_joint = heads[:, None] * jnp.log(theta)[None] + (10 - heads[:, None]) * jnp.log1p(-theta)[None]
        evidence = jax.scipy.special.logsumexp(log_joint, axis=1)
        coin = jnp.exp(log_joint - evidence[:, None])
        return (coin.T @ heads, coin.T @ (10 - heads)), jnp.sum(evidence)

    coins = from_functions(
        e_step,
        q_function=lambda theta, stats: stats[0] @ jnp.log(theta) + stats[1] @ jnp.log1p(-theta),
        unconstrain=jax.scipy.special.logit,
        constrain=jax.nn.sigmoid,
    )
    fit = em_fit(coins, jnp.array([0.6, 0.5]), heads, tol=1e-10)
    assert fit.converged
    np.testing.assert_allclose(fit.params, [0.79678907, 0.51958312], atol=1e-5)  # Do & Batzoglou 2008
    assert {"Fisher's identity", "monotone", "one compilation"} <= set(
        check_model(coins, jnp.array([0.6, 0.5]), heads, skip=["weights are repeats", "blocks are the whole"])
    )
    with pytest.raises(TypeError, match=r"m_step\(stats\) is needed, or q_function"):
        from_functions(e_step)


def test_ecm_over_blocks_that_do_not_touch_is_em():
    x, params = counts()
    plain = em_fit(MODEL, params, x, tol=-1.0, max_steps=6)
    assert_close(em_fit(MODEL, params, x, algorithm=ecm(), tol=-1.0, max_steps=6), plain)


def test_ecm_raises_the_objective_and_frozen_blocks_stay():
    x = datasets.iris()[0]
    model = Mixture(Normal("diag"), 3)
    params = model.init(jax.random.key(0), x)
    rounds = em_fit(model, params, x, algorithm=ecm(), tol=1e-9)
    cycles = em_fit(model, params, x, algorithm=ecm(multicycle=True), tol=1e-9)
    for fit in (rounds, cycles):
        assert fit.converged
        assert np.all(np.diff(history(fit)) >= -1e-10 * abs(fit.objective))
    assert cycles.num_passes == 1 + 3 * cycles.num_steps
    np.testing.assert_allclose(rounds.objective, cycles.objective, atol=1e-5)
    frozen = em_fit(model, params, x, algorithm=ecm("weights", "components.mean"), tol=1e-9)
    assert_close(frozen.params.components.covariance, params.components.covariance, 0, 0)
    # The same as holding them from outside.
    held = Mixture(Fixed(Normal("diag"), {"covariance": params.components.covariance}), 3)
    assert_close(frozen.params, em_fit(held, params, x, tol=1e-9).params, 1e-9)
    # A conditional maximum: no small step in the block raises Q.
    stats = e_step(model, params, x)
    best = m_step_for(model, params, stats, ("components.mean",))
    slope = jax.jit(jax.grad(lambda mean: model.q_function(_with_mean(best, mean), stats)))(best.components.mean)
    np.testing.assert_allclose(slope, 0, atol=1e-8)


def _with_mean(params, mean):
    return dataclasses.replace(params, components=dataclasses.replace(params.components, mean=mean))


@pytest.mark.parametrize("name", ["full, prior", "tied, prior", "spherical, prior, missing"])
def test_conditional_maxima_under_a_prior(name):
    """Covariances with the means held where the prior does not want them: no small step raises Q + log-prior."""
    model, x = zoo()[name]
    x = jnp.asarray(x)
    params = model.init(jax.random.key(0), x)
    stats = e_step(model, params, x)
    best = m_step_for(model, params, stats, ("components.covariance",))
    assert_close(best.components.mean, params.components.mean, 1e-14)
    coordinates = jax.jit(model.unconstrain)(best).components
    theta = np.asarray(coordinates.covariance)

    @jax.jit
    @jax.value_and_grad
    def total(theta):
        at = dataclasses.replace(coordinates, covariance=theta)
        at = dataclasses.replace(best, components=model.family.constrain(at))
        return model.q_function(at, stats) + model.log_prior(at)

    top, slope = total(theta)
    np.testing.assert_allclose(slope, 0, atol=1e-8)
    assert total(theta + 0.01)[0] < top
    fit = em_fit(model, params, x, algorithm=ecm(), tol=-1.0, max_steps=5)
    assert np.all(np.diff(history(fit)) >= -1e-10 * abs(fit.objective))


@pytest.mark.parametrize("name", ["gamma", "negative binomial", "zero-inflated poisson", "poisson regression"])
def test_ecm_over_all_blocks_leaves_nothing_where_it_was(name):
    """Families that cannot hold every parameter are one block, and not one that is half frozen."""
    model, x = zoo()[name]
    x = jax.tree.map(jnp.asarray, x)
    params = model.init(jax.random.key(0), x)
    fit = em_fit(model, params, x, algorithm=ecm(), tol=-1.0, max_steps=3)
    for new, old in zip(jax.tree.leaves(fit.params), jax.tree.leaves(params), strict=True):
        assert np.all(np.asarray(new) != np.asarray(old))


def test_blocks_follow_what_a_family_can_hold():
    x = jnp.asarray(datasets.faithful())
    student = Mixture(StudentT(), 2)
    params = student.init(jax.random.key(0), x)
    assert student.blocks(params) == (
        "weights", "components.mean", "components.scale", "components.degrees_of_freedom",
    )  # fmt: skip
    held = Fixed(MODEL, {"weights": jnp.array([0.5, 0.5])})
    assert held.blocks(deaths()) == ("components.rate",)
    fit = em_fit(held, deaths(), DEATHS, DAYS, algorithm=ecm(), max_steps=3)
    np.testing.assert_allclose(fit.params.weights, 0.5)


# --- wrappers ---------------------------------------------------------------------------------------------------------


def evaluations(algorithm, model, params, x, weights=None, tol=1e-8, most=20_000):
    """E-steps until an EM step moves the parameters by at most tol, and the log-likelihood there."""

    @jax.jit
    def run(params):
        def move(state):
            away = jax.tree.map(jnp.subtract, model.m_step(state.stats), state.params)
            return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(away)))

        return jax.lax.while_loop(
            lambda state: (move(state) > tol) & (state.num_passes < most),
            lambda state: algorithm.step(model, state, x, weights),
            algorithm.init(model, params, x, weights),
        )

    state = run(params)
    return int(state.num_passes), state


def test_published_counts_of_the_deaths_in_the_times():
    """Hasselblad's start: EM over 2000 map evaluations, the accelerators a few dozen."""
    plain, at = evaluations(EM(), MODEL, deaths(), DEATHS, DAYS)
    assert 2500 < plain < 2700
    for algorithm, most in ((squarem(EM()), 110), (anderson(EM()), 60)):
        used, state = evaluations(algorithm, MODEL, deaths(), DEATHS, DAYS)
        assert used <= most
        np.testing.assert_allclose(state.loglik, -1989.945859883, atol=1e-8)
        assert_close(state.params, at.params, 1e-5)


def test_five_components_of_the_galaxies_in_a_fifth_of_the_evaluations():
    x = jnp.asarray(datasets.galaxies()).reshape(-1, 1)
    x = x / 1000 if jnp.max(x) > 1000 else x
    model = Mixture(Normal(), 5)
    start = MixtureParams(
        weights=jnp.full(5, 0.2),
        components=NormalParams(mean=jnp.linspace(10, 34, 5)[:, None], covariance=jnp.full((5, 1, 1), 4.0)),
    )
    plain, at = evaluations(EM(), model, start, x)
    used, state = evaluations(squarem(EM()), model, start, x)
    assert 5 * used <= plain
    assert state.loglik >= at.loglik - 1e-8


def _classes():
    """Latent classes some of whose probabilities are 0 and 1 at the optimum."""
    rng = np.random.default_rng(0)
    for rows, columns, classes in ((200, 5, 2), (300, 6, 3), (500, 5, 3)):
        chances = rng.choice([0.0, 0.15, 0.3, 0.5, 0.7, 0.9, 1.0], (classes, columns))
        labels = rng.integers(0, classes, rows)
        x = (rng.random((rows, columns)) < chances[labels]).astype(np.int32)
    return x


def test_latent_classes_with_an_optimum_on_the_boundary():
    x, model = _classes(), Mixture(Bernoulli(), 3)
    params = model.init(jax.random.key(1), x)
    plain, at = evaluations(EM(), model, params, x)
    for algorithm in (squarem(EM()), anderson(EM())):
        used, state = evaluations(algorithm, model, params, x)
        assert 5 * used <= plain
        assert state.loglik >= at.loglik - 1e-6
        probability = state.params.components.probability
        assert jnp.all((probability >= 0) & (probability <= 1))
        assert jnp.any((probability < 1e-5) | (probability > 1 - 1e-5))


@pytest.mark.parametrize(
    "name", ["full", "student t", "multinomial", "directions", "fixed means", "zero-inflated poisson"]
)
def test_accelerated_fits_rise_end_where_em_does_and_stay_in_the_domain(name):
    model, x = zoo()[name]
    params = model.init(jax.random.key(1), x)
    plain = em_fit(model, params, x, tol=1e-8, max_steps=3000)
    for make in (squarem, anderson):
        fit = em_fit(model, params, x, algorithm=make(EM()), tol=1e-8, max_steps=3000)
        assert fit.converged
        assert np.all(np.diff(history(fit)) >= -1e-9 * abs(fit.objective))
        assert fit.objective >= plain.objective - 1e-4
        # In the domain: their coordinates exist and lead back.
        assert_close(there_and_back(model, fit.params), fit.params, 1e-6, 1e-9)


@pytest.mark.parametrize("make", [squarem, anderson])
def test_accelerated_tol_is_a_distance_to_the_limit(make):
    limit = -1989.945859883
    for tol in (1e-5, 1e-8):
        fit = em_fit(MODEL, deaths(), DEATHS, DAYS, algorithm=make(EM()), tol=tol)
        assert fit.converged
        assert limit - fit.objective <= 3 * tol * np.sum(DAYS)


@pytest.mark.parametrize("make", [squarem, anderson])
def test_accelerators_under_vmap_and_in_float32(make):
    fit = jax.jit(lambda start: em_fit(MODEL, start, DEATHS, DAYS, algorithm=make(EM()), tol=1e-9))
    starts = [deaths(), deaths(0.5, (0.5, 4.0)), deaths(0.9, (jnp.nan, 1.0))]
    many = jax.vmap(fit)(jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts))
    assert many.status[2] == Status.NONFINITE
    for index, start in enumerate(starts[:2]):
        alone = fit(start)
        assert many.num_steps[index] == alone.num_steps
        np.testing.assert_allclose(many.objective[index], alone.objective, rtol=1e-12)
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), deaths())
    fit = em_fit(MODEL, single, DEATHS.astype(np.float32), DAYS.astype(np.float32), algorithm=make(EM()))
    assert fit.params.weights.dtype == jnp.float32
    assert fit.converged
    np.testing.assert_allclose(fit.objective, -1989.9459, atol=5e-3)


@pytest.mark.parametrize("make", [squarem, anderson])
def test_an_m_step_that_fails_is_not_called_converged(make):
    heads = jnp.array([5.0, 9.0, 8.0, 4.0, 7.0])

    def e_step(theta, heads):
        return jnp.sum(heads) * jnp.ones(2), jnp.sum(heads * jnp.log(theta[0]) + (10 - heads) * jnp.log1p(-theta[0]))

    broken = from_functions(e_step, lambda stats: stats / 50 + jnp.where(stats > 1, jnp.nan, 0.0))
    fit = em_fit(broken, jnp.array([0.5, 0.5]), heads, algorithm=make(EM()))
    assert fit.status == Status.NONFINITE
    np.testing.assert_array_equal(fit.params, [0.5, 0.5])


def test_annealing_escapes_an_optimum_that_em_falls_into():
    """Two components share a cluster, and two clusters a component: EM never leaves that."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(m, 0.5, 60) for m in (-6.0, 0.0, 2.5)])
    model = Mixture(Fixed(Normal("tied"), {"covariance": jnp.array([[0.25]])}), 3)
    start = MixtureParams(
        weights=jnp.full(3, 1 / 3),
        components=NormalParams(mean=jnp.array([[-6.6], [-5.6], [1.2]]), covariance=jnp.array([[0.25]])),
    )
    plain = em_fit(model, start, x, tol=1e-8, max_steps=3000)
    # Above the temperature 49, the variance of the data over that of a component, all components are one.
    cooled = em_fit(model, start, x, tol=1e-8, max_steps=3000, algorithm=annealed_em(np.geomspace(50, 1, 40)))
    assert plain.converged
    assert cooled.converged
    assert cooled.objective > plain.objective + 200
    assert cooled.num_steps > 39
    np.testing.assert_allclose(jnp.sort(cooled.params.components.mean[:, 0]), [-6.0, 0.0, 2.5], atol=0.15)
    np.testing.assert_allclose(cooled.loglik, jnp.sum(model.log_prob(cooled.params, x)), rtol=1e-12)


def test_a_fit_is_not_converged_before_it_is_cold():
    x, params = counts()
    cut = em_fit(MODEL, params, x, algorithm=annealed_em([2.0] * 50), tol=1e-2, max_steps=40)
    assert cut.status == Status.MAX_STEPS
    np.testing.assert_allclose(cut.loglik, jnp.sum(MODEL.log_prob(cut.params, x)), rtol=1e-12)
    cosine = annealed(EM(), lambda step: jnp.maximum(3.0 - 0.1 * step, 1.0))
    fit = em_fit(MODEL, params, x, algorithm=cosine, tol=1e-8)
    assert fit.converged
    assert fit.num_steps > 20
    np.testing.assert_allclose(fit.objective, em_fit(MODEL, params, x, tol=1e-8).objective, atol=1e-4)


# --- all together -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "algorithm",
    [stochastic_em(), stepwise_em(16), incremental_em(3), squarem(EM()), annealed_em([3.0, 2.0])],
    ids=["draws", "batches", "pieces", "squarem", "annealed"],
)
def test_restarts_of_every_kind_end_with_the_exact_objective(algorithm):
    x, _ = counts()
    runs = fit_restarts(MODEL, KEY, x, num_restarts=5, algorithm=algorithm, max_steps=30, block_size=2)
    exact = np.asarray(jax.jit(jax.vmap(lambda params: jnp.sum(MODEL.log_prob(params, x))))(runs.params))
    np.testing.assert_allclose(runs.objective, exact, rtol=1e-10)
    np.testing.assert_allclose(runs.best.objective, np.max(exact), rtol=1e-10)
    assert jnp.all(runs.num_passes > 0)
    # Restart i is the same however many there are.
    fewer = fit_restarts(MODEL, KEY, x, num_restarts=3, algorithm=algorithm, max_steps=30)
    np.testing.assert_allclose(runs.objective[:3], fewer.objective, rtol=1e-8)


def test_equal_algorithms_share_one_compilation():
    x, params = counts()
    traces = []

    @jax.jit
    def fit(algorithm, params):
        traces.append(None)
        return em_fit(MODEL, params, x, key=KEY, algorithm=algorithm, max_steps=4).objective

    adam = optax.adam(1e-2)
    for build in (
        lambda: stepwise_em(12),
        lambda: squarem(EM()),
        lambda: generalized_em(adam, 2),
        lambda: annealed_em([2.0, 1.5]),
    ):
        before = len(traces)
        fit(build(), params)
        fit(build(), params)
        assert len(traces) == before + 1


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.0, 1.0))
def test_log_likelihood_is_bound_plus_gap(seed, sharpness):
    model, x = zoo()["poisson"]
    with jax.enable_x64(True):
        params = model.init(jax.random.key(1), jnp.asarray(x))
        posterior = np.asarray(model.posterior(params, x))
        rng = np.random.default_rng(seed)
        q = sharpness * posterior + (1 - sharpness) * rng.dirichlet(np.full(3, 0.3), len(x))
        weights = rng.integers(0, 3, len(x)).astype(float)
        bound, gap = free_energy(model, params, x, q, weights)
        np.testing.assert_allclose(bound + gap, e_step(model, params, x, weights).loglik, rtol=1e-9)
        assert gap >= -1e-9
        assert gap > 1e-6 or sharpness > 0.9
        assert gap < 1e-9 or sharpness < 1


def test_free_energy_is_tight_at_the_posterior_and_infinite_where_q_is_impossible():
    x, params = counts()
    bound, gap = free_energy(MODEL, params, x, MODEL.posterior(params, x))
    np.testing.assert_allclose(gap, 0, atol=1e-12)
    np.testing.assert_allclose(bound, e_step(MODEL, params, x).loglik, rtol=1e-12)
    labelled = Labelled(x, np.zeros(60, np.int32))
    assert free_energy(MODEL, params, labelled, np.full((60, 2), 0.5)).gap == 0
    dead = deaths(1.0)
    assert free_energy(MODEL, dead, x, np.full((60, 2), 0.5)).gap == np.inf


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, "num_samples must be at least 1; got 0", lambda: monte_carlo_em(0)),
        (TypeError, "num_samples must be a Python integer", lambda: Sample(1.5)),
        (TypeError, "schedule must be a function step", lambda: Sample(3, 2)),
        (ValueError, "temperature must be a finite number above 0", lambda: Exact(0.0)),
        (ValueError, r"rate must be in \(0, 1\]; got 0", lambda: stepwise_em(4, 0.0)),
        (ValueError, r"rate must be in \(0, 1\]; got 2 in update 1", lambda: stepwise_em(4, lambda k: 2.0 / k)),
        (TypeError, "rate must be a number", lambda: stepwise_em(4, "fast")),
        (ValueError, "power must be above 1/2", lambda: PowerRate(0.4)),
        (ValueError, "delay must be at least 0", lambda: PowerRate(0.6, -1)),
        (ValueError, "batch_size must be at least 1", lambda: stepwise_em(0)),
        (ValueError, "batch_size must be at least 1", lambda: VarianceReduced(0)),
        (ValueError, "num_blocks must be at least 1", lambda: incremental_em(0)),
        (TypeError, "optimizer must be an optax GradientTransformation", lambda: Gradient("adam")),
        (ValueError, "num_steps must be at least 1", lambda: Gradient(optax.sgd(1.0), 0)),
        (ValueError, "blocks must name a parameter once", lambda: Conditional(("weights", "weights"))),
        (ValueError, "schedule must have at least one temperature", lambda: annealed_em([])),
        (ValueError, "schedule must be finite temperatures above 0; got -1", lambda: annealed_em([2.0, -1.0])),
        (ValueError, "schedule must come to temperature 1", lambda: annealed_em(lambda step: 2.0)),
        (TypeError, "schedule must be temperatures", lambda: annealed_em(2.0)),
        (TypeError, "schedule must be temperatures", lambda: annealed_em(np.ones((3, 1)))),
        (TypeError, "schedule must be temperatures", lambda: jax.jit(annealed_em)(jnp.ones(3))),
        (TypeError, "annealed tempers the posterior", lambda: annealed(EM(expect=Hard()), [2.0])),
        (ValueError, "squarem needs steps that are one deterministic", lambda: squarem(stochastic_em())),
        (ValueError, "anderson needs steps that are one deterministic", lambda: anderson(incremental_em(3))),
        (TypeError, "squarem accelerates an EM", lambda: squarem(squarem(EM()))),
        (ValueError, "growth must be above 1", lambda: squarem(EM(), growth=1.0)),
        (ValueError, "memory must be at least 1", lambda: anderson(EM(), memory=0)),
        (TypeError, "averaged takes an EM", lambda: averaged(generalized_em())),
        (ValueError, "start must be a whole number", lambda: averaged(stochastic_em(), start=-1)),
    ],
)
def test_what_cannot_be_is_refused_where_it_is_said(error, match, call):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize(
    ("error", "match", "algorithm"),
    [
        (TypeError, "draws at random and has no key", stochastic_em()),
        (TypeError, r"batches are drawn at random: pass key=", stepwise_em(4)),
        (ValueError, "batch_size must be at most the number of rows, 60; got 61", stepwise_em(61)),
        (ValueError, "num_blocks must be at most the number of rows, 60; got 61", incremental_em(61)),
        (ValueError, "blocks must be among 'weights', 'components.rate'; got 'rate'", ecm("rate")),
        (ValueError, "an accelerator needs steps that are one deterministic", squarem(ecm(multicycle=True))),
    ],
)
def test_what_does_not_fit_the_data_is_refused_by_the_fit(error, match, algorithm):
    x, params = counts()
    key = KEY if error is ValueError else None
    with pytest.raises(error, match=match):
        em_fit(MODEL, params, x, key=key, algorithm=algorithm)


def test_models_refuse_what_makes_no_sense_for_them():
    x = datasets.iris()[0]
    means = KMeans(3)
    centres = means.init(KEY, x)
    for algorithm in (stochastic_em(), annealed_em([2.0]), EM(expect=Exact(2.0))):
        with pytest.raises(TypeError, match=r"expect must be Exact\(\) or Hard\(\) for k-means"):
            em_fit(means, centres, x, key=KEY, algorithm=algorithm)
    with pytest.raises(TypeError, match="KMeans declares no blocks"):
        em_fit(means, centres, x, algorithm=ecm())
    bare = from_functions(lambda theta, x: jnp.sum(x), lambda stats: stats)
    with pytest.raises(TypeError, match="tells none: let e_step return"):
        em_fit(bare, jnp.array(1.0), x, algorithm=squarem(EM()))
    with pytest.raises(TypeError, match="this model has no q_function"):
        em_fit(bare, jnp.array(1.0), x, algorithm=generalized_em())
    with pytest.raises(ValueError, match="screen needs an algorithm that can go on"):
        fit_restarts(MODEL, KEY, DEATHS, num_restarts=4, algorithm=stepwise_em(4), screen=Screen(2, 0.5))
    with pytest.raises(TypeError, match="needs a model with a discrete or normal posterior; KMeans has none"):
        jaxem.free_energy(means, centres, x, np.full((150, 3), 1 / 3))


def test_a_state_of_another_optimiser_is_refused():
    x, params = counts()
    state = generalized_em(optax.sgd(0.1)).init(MODEL, params, x)
    with pytest.raises(TypeError, match="made by another optimiser"):
        generalized_em(optax.adam(0.1)).step(MODEL, state, x)


def test_minibatches_of_k_means():
    x = datasets.iris()[0]
    model = KMeans(3)
    start = model.init(KEY, x)
    fit = em_fit(model, start, x, key=KEY, algorithm=stepwise_em(30), max_steps=60)
    full = em_fit(model, start, x)
    np.testing.assert_allclose(fit.objective, full.objective, rtol=0.02)
