"""Linear-Gaussian state space models beside dense Gaussians, NumPy, dynamax, and published numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jitted import e_step
from scipy.stats import multivariate_normal

from jaxem import Exact, Fixed, Hard, Sample, Status, datasets, em_fit
from jaxem.families import covariance
from jaxem.families.linear_equation import EquationStats, LinearEquation
from jaxem.latents.linear_gaussian import affine, shared
from jaxem.models import LinearGaussianSSM, LinearGaussianSSMParams
from jaxem.sequences import Sequences, pack_sequences, pad_sequences

RNG = np.random.default_rng(5)
LENGTHS = np.array([6, 3, 1, 4, 5, 6, 2, 6, 3], np.int32)


def walks(sequences, steps, columns):
    level = np.cumsum(RNG.normal(size=(sequences, steps, 1)), axis=1) / 2
    return level * RNG.normal(size=columns) + RNG.normal(size=(sequences, steps, columns))


def holes(x):
    """An entry in five missing, one step whole, and two columns of another."""
    gone = RNG.random(x.shape) < 0.2
    gone[2, 0] = True
    gone[0, 2, :2] = True
    return np.where(gone, np.nan, x)


WALKS, INPUTS = walks(9, 6, 3), RNG.normal(size=(9, 6, 2))
HOLES = holes(WALKS)


def system(states=2, columns=3, dtype=float, seed=0, **extra):
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.normal(size=(states, states)))[0]
    mixed = rng.normal(size=(columns, columns))
    params = LinearGaussianSSMParams(
        initial_mean=rng.normal(size=states),
        initial_covariance=1.5 * np.eye(states),
        dynamics=0.8 * turn,
        dynamics_covariance=0.3 * np.eye(states) + 0.1,
        emission=rng.normal(size=(columns, states)),
        emission_covariance=0.4 * np.eye(columns) + 0.1 * mixed @ mixed.T,
        **extra,
    )
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)


def scalar(level, noise, prior_mean=1000.0, prior=1e5, dtype=float):
    one = functools.partial(jnp.full, (1, 1), dtype=dtype)
    return LinearGaussianSSMParams(
        initial_mean=jnp.full(1, prior_mean, dtype), initial_covariance=one(prior), dynamics=one(1.0),
        dynamics_covariance=one(level), emission=one(1.0), emission_covariance=one(noise),
    )  # fmt: skip


def dense(params, x):
    """Log-density of one sequence (T, D) with NaN entries, and the states' means and covariances given it, all from
    the joint normal distribution of everything."""
    p = jax.tree.map(np.asarray, params)
    steps, states = len(x), len(p.initial_mean)
    bias = np.zeros(states) if p.dynamics_bias is None else p.dynamics_bias
    offset = np.zeros(x.shape[1]) if p.emission_bias is None else p.emission_bias
    mean, spread = [p.initial_mean], [p.initial_covariance]
    for _ in range(steps - 1):
        mean.append(p.dynamics @ mean[-1] + bias)
        spread.append(p.dynamics @ spread[-1] @ p.dynamics.T + p.dynamics_covariance)
    joint = np.zeros((steps, states, steps, states))
    for s in range(steps):
        block = spread[s]
        for t in range(s, steps):
            joint[t, :, s], joint[s, :, t] = block, block.T
            block = p.dynamics @ block
    joint, mean = joint.reshape(steps * states, -1), np.concatenate(mean)
    seen = ~np.isnan(x.ravel())
    look = np.kron(np.eye(steps), p.emission)[seen]
    noise = np.kron(np.eye(steps), p.emission_covariance)[np.ix_(seen, seen)]
    covariance = look @ joint @ look.T + noise
    left = x.ravel()[seen] - look @ mean - np.tile(offset, steps)[seen]
    solved = np.linalg.solve(covariance, left)
    logdet = np.linalg.slogdet(2 * np.pi * covariance)[1]
    post = joint - joint @ look.T @ np.linalg.solve(covariance, look @ joint)
    post = post.reshape(steps, states, steps, states)
    given = (mean + joint @ look.T @ solved).reshape(steps, states)
    return -0.5 * (left @ solved + logdet), given, np.stack([post[t, :, t] for t in range(steps)])


def close(got, expected, rtol=1e-9):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, float), np.asarray(b, float)
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * (np.max(np.abs(b), initial=0) + 1))


def one_step(model):
    return jax.jit(lambda params, x, weights=None: model.m_step(model.e_step(params, x, weights)))


# The joint normal distribution.


def test_it_is_the_joint_normal_distribution(x64):
    extra = {"dynamics_bias": np.array([0.3, -0.2]), "emission_bias": np.array([1.0, 2.0, 3.0])}
    model, params = LinearGaussianSSM(2, dynamics_bias=True, emission_bias=True), system(**extra)
    x = Sequences(jnp.asarray(HOLES[:4]), jnp.asarray(LENGTHS[:4]))
    moments, log_prob = model.smooth(params, x), model.log_prob(params, x)
    for row, length in enumerate(LENGTHS[:4]):
        loglik, mean, covariance = dense(params, HOLES[row, :length])
        np.testing.assert_allclose(log_prob[row], loglik, rtol=1e-12)
        np.testing.assert_allclose(moments.means[row, :length], mean, atol=1e-12)
        np.testing.assert_allclose(moments.covariances[row, :length], covariance, atol=1e-12)

    # One sequence without an axis of sequences; the last state filtered is the last one smoothed.
    filtered, smoothed = model.filter(params, HOLES[0]), model.smooth(params, HOLES[0])
    assert filtered.means.shape == (6, 2)
    close([filtered.means[-1], filtered.covariances[-1]], [smoothed.means[-1], smoothed.covariances[-1]])

    # Forecasts are the smoothed moments of steps that are missing.
    ahead = model.forecast(params, HOLES[0], 2)
    longer = np.concatenate([HOLES[0], np.full((2, 3), np.nan)])
    _, mean, covariance = dense(params, longer)
    close([ahead.means, ahead.covariances], [mean[-2:], covariance[-2:]])
    assert ahead.observation_means.shape == (2, 3)

    # Slopes of the log-likelihood, by finite differences, missing entries and all.
    slope = jax.grad(lambda params: jnp.sum(model.log_prob(params, x)))(params)
    entries = {"dynamics": (0, 1), "emission": (2, 0), "initial_mean": (1,), "dynamics_covariance": (0, 0)}
    for name, at in entries.items():
        value = getattr(params, name)
        up, down = (dataclasses.replace(params, **{name: value.at[at].add(step)}) for step in (1e-5, -1e-5))
        rise = jnp.sum(model.log_prob(up, x) - model.log_prob(down, x)) / 2e-5
        np.testing.assert_allclose(getattr(slope, name)[at], rise, rtol=1e-6)


def test_sequences_in_any_form(x64):
    model, params = LinearGaussianSSM(2), system()
    parts = [HOLES[row, :length] for row, length in enumerate(LENGTHS)]
    step = jax.jit(model.e_step)
    whole = step(params, pad_sequences(parts))
    dirty = np.full((9, 9, 3), np.inf)
    for row, part in enumerate(parts):
        dirty[row, : len(part)] = part
    dirty[1, 7:] = np.nan
    close(step(params, Sequences(jnp.asarray(dirty), jnp.asarray(LENGTHS))), whole)
    packed = pack_sequences(parts)
    assert packed.num_rows < len(parts)
    close(step(params, packed), whole)
    loglik = np.array([dense(params, part)[0] for part in parts])
    close(model.log_prob(params, packed), loglik)
    close(model.forecast(params, packed, 1).means, model.forecast(params, pad_sequences(parts), 1).means)
    assert step._cache_size() == 3


# Published and independent answers.


def test_nile(x64):
    """Local level with a known start: Durbin & Koopman, section 2; variances by EM from (1e4, 1e4)."""
    held = {"dynamics": 1.0, "emission": 1.0, "initial_mean": 1000.0, "initial_covariance": 1e5}
    model, params, x = Fixed(LinearGaussianSSM(1), held), scalar(1e4, 1e4), datasets.nile()
    step = one_step(model)
    found = []
    for _ in range(2):
        params = step(params, x)
        found.append((params.emission_covariance[0, 0], params.dynamics_covariance[0, 0]))
    np.testing.assert_allclose(found, [(9749.38, 8765.09), (9805.13, 7910.23)], atol=5e-3)
    fit = em_fit(model, params, x, tol=1e-13, max_steps=5000).check()
    np.testing.assert_allclose(fit.loglik, -639.300677, atol=1e-6)
    np.testing.assert_allclose(fit.params.emission_covariance[0, 0], 15114.962, rtol=1e-5)
    np.testing.assert_allclose(fit.params.dynamics_covariance[0, 0], 1456.823, rtol=1e-4)
    assert model.num_parameters(fit.params) == 2
    steady = model.steady_state(fit.params)
    signal = 1456.823 / 15114.962
    gain = (signal + np.sqrt(signal**2 + 4 * signal)) / 2
    np.testing.assert_allclose(steady.predicted[0, 0] / 15114.962, gain, rtol=1e-4)
    np.testing.assert_allclose(steady.gain[0, 0], gain / (1 + gain), rtol=1e-4)


def numpy_em(params, sequences, steps):
    """EM as in the textbook, in covariances: missing entries are imputed with their uncertainty."""
    p = {field.name: np.asarray(getattr(params, field.name)) for field in dataclasses.fields(params)[:6]}
    for _ in range(steps):
        m0, p0, a, q, c, r = p.values()
        firsts, before, cross, after, count = [], 0, 0, 0, 0
        zz, yz, yy, looks = 0, 0, 0, 0
        for y in sequences:
            predicted, filtered = [], []
            mean, cov = m0, p0
            for row in y:
                predicted.append((mean, cov))
                seen = ~np.isnan(row)
                cs, rs = c[seen], r[np.ix_(seen, seen)]
                gain = cov @ cs.T @ np.linalg.inv(cs @ cov @ cs.T + rs)
                mean, cov = mean + gain @ (row[seen] - cs @ mean), cov - gain @ cs @ cov
                filtered.append((mean, cov))
                mean, cov = a @ mean, a @ cov @ a.T + q
            for t in reversed(range(len(y))):
                if t == len(y) - 1:
                    mean, cov = filtered[t]
                else:
                    j = filtered[t][1] @ a.T @ np.linalg.inv(predicted[t + 1][1])
                    after = after + cov + np.outer(mean, mean)
                    pair, later = j @ cov, mean
                    mean = filtered[t][0] + j @ (mean - predicted[t + 1][0])
                    cov = filtered[t][1] + j @ (cov - predicted[t + 1][1]) @ j.T
                    cross = cross + pair + np.outer(mean, later)
                    before = before + cov + np.outer(mean, mean)
                    count += 1
                seen = ~np.isnan(y[t])
                if np.any(seen):
                    fill = np.eye(len(r))
                    fill[~seen] = 0
                    fill[np.ix_(~seen, seen)] = r[np.ix_(~seen, seen)] @ np.linalg.inv(r[np.ix_(seen, seen)])
                    fill[:, ~seen] = 0
                    look = c - fill @ c
                    row = fill @ np.where(seen, y[t], 0) + look @ mean
                    zz = zz + cov + np.outer(mean, mean)
                    yz = yz + np.outer(row, mean) + look @ cov
                    yy = yy + np.outer(row, row) + look @ cov @ look.T + r - fill @ r
                    looks += 1
            firsts.append((mean, cov))
        m0 = np.mean([mean for mean, _ in firsts], axis=0)
        p0 = np.mean([cov + np.outer(mean - m0, mean - m0) for mean, cov in firsts], axis=0)
        a = np.linalg.solve(before, cross).T
        q = (after - a @ cross - (a @ cross).T + a @ before @ a.T) / count
        c = np.linalg.solve(zz, yz.T).T
        r = (yy - c @ yz.T - (c @ yz.T).T + c @ zz @ c.T) / looks
        p = dict(zip(p, (m0, p0, a, q, c, r), strict=True))
    return p


def test_em_as_in_the_textbook(x64):
    model, params = LinearGaussianSSM(2), system()
    parts = [HOLES[row, :length] for row, length in enumerate(LENGTHS) if length > 1]
    expected = numpy_em(params, parts, 10)
    step, x = one_step(model), pad_sequences(parts)
    for _ in range(10):
        params = step(params, x)
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(params, name), value, atol=1e-8, err_msg=name)


def test_em_as_in_dynamax(x64):
    """One sequence: of several, dynamax 1.0 takes the start's covariance wrongly (a square of sums for a mean's)."""
    peer = pytest.importorskip("dynamax.linear_gaussian_ssm")
    start = system(2, 3)
    x = LinearGaussianSSM(2).sample(jax.random.key(0), start, 100)
    start = dataclasses.replace(start, dynamics=0.5 * jnp.eye(2), emission=jnp.eye(3, 2))
    other = peer.LinearGaussianSSM(2, 3, has_dynamics_bias=False, has_emissions_bias=False)
    theirs, props = other.initialize(
        jax.random.key(0), initial_mean=start.initial_mean, initial_covariance=start.initial_covariance,
        dynamics_weights=start.dynamics, dynamics_covariance=start.dynamics_covariance,
        emission_weights=start.emission, emission_covariance=start.emission_covariance,
    )  # fmt: skip
    theirs, _ = other.fit_em(theirs, props, x[None], num_iters=10, verbose=False)
    params, step = start, one_step(LinearGaussianSSM(2, missing=False))
    for _ in range(10):
        params = step(params, x)
    for got, expected in (
        (params.dynamics, theirs.dynamics.weights),
        (params.dynamics_covariance, theirs.dynamics.cov),
        (params.emission, theirs.emissions.weights),
        (params.emission_covariance, theirs.emissions.cov),
        (params.initial_mean, theirs.initial.mean),
        (params.initial_covariance, theirs.initial.cov),
    ):
        np.testing.assert_allclose(got, expected, atol=1e-6)


# Other roads to the same statistics.


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("steps", "lanes"), [(1, 1), (7, 1), (200, 1), (95, 3), (30, 70)])
@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_recursions_of_means_in_pieces(steps, lanes, reverse, backend, x64, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    matrix = np.array([[0.9, 0.2, 0.0], [-0.1, 0.8, 0.3], [0.0, -0.4, 1.0]])
    inputs, mean = RNG.normal(size=(steps, 3, lanes)), RNG.normal(size=(3, lanes))
    found = affine.affine_scan(*map(jnp.asarray, (matrix, inputs, mean)), reverse=reverse)
    for t in reversed(range(steps)) if reverse else range(steps):
        mean = matrix @ mean + inputs[t]
        np.testing.assert_allclose(found[t], mean, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("steps", "lanes"), [(20, 1), (6, 3), (6, 12)])
@pytest.mark.parametrize("height", [3, 9])
def test_one_matrix_for_all_steps_and_lanes(steps, lanes, height, x64):
    matrix, vectors = RNG.normal(size=(height, 10)), RNG.normal(size=(steps, 10, lanes))
    found = affine.apply(jnp.asarray(matrix), jnp.asarray(vectors))
    np.testing.assert_allclose(found, np.einsum("ij,tjb->tib", matrix, vectors), rtol=1e-12, atol=1e-12)


def test_every_road_leads_to_the_same_statistics(x64, monkeypatch):
    """With gains at rest, step by step, and with a recursion for each sequence."""
    params = system(dynamics_bias=jnp.array([0.1, 0.2]))
    model = LinearGaussianSSM(2, dynamics_bias=True, missing=False)
    x = model.sample(jax.random.key(1), params, 300, 3)

    def statistics(params, x):
        return model.e_step(params, x), jnp.sum(model._log_prob.__wrapped__(model, params, model.units(x)))

    steady = jax.jit(statistics)(params, x)
    lane_by_lane = Sequences(jnp.pad(x, ((0, 0), (0, 1), (0, 0))), jnp.full(3, 300))
    close(jax.jit(statistics)(params, lane_by_lane), steady)
    hole, careful = x.at[1, 100:].set(jnp.nan), dataclasses.replace(model, missing=True)
    for name in ("filter", "smooth"):
        moments, unsure = getattr(model, name), jax.jit(getattr(careful, name))
        apart = jax.tree.map(lambda leaf: leaf[:, :300], moments(params, lane_by_lane))
        close(moments(params, x), apart)
        close(moments(params, x[0]), jax.tree.map(lambda leaf: leaf[0], apart))
        close(unsure(params, x), apart)
        close(unsure(params, hole), getattr(careful, name)(params, hole))
    slope = jax.jit(jax.grad(lambda params: statistics(params, x)[1]))(params)
    monkeypatch.setattr(shared, "_head", lambda steps: None)
    close(jax.jit(lambda params, x: statistics(params, x))(params, x), steady)
    fisher = jax.jit(jax.grad(lambda params: model.q_function(params, steady[0])))(params)
    # Of a symmetric matrix' slope only the sum of both triangles means anything.
    for name in model.blocks(params):
        ours, theirs = getattr(slope, name), getattr(fisher, name)
        close(*((ours + ours.T, theirs + theirs.T) if name.endswith("covariance") else (ours, theirs)))


def test_what_is_missing_shows_only_as_a_program_runs(x64):
    """Complete and not, alone and as neighbours under vmap, without and with weights of 0: values and slopes."""
    params, careful, quick = system(), LinearGaussianSSM(2), LinearGaussianSSM(2, missing=False)
    weights = jnp.array([1.0, 0.0, 2.0])
    traced = jax.jit(careful.e_step)
    close(traced(params, jnp.asarray(WALKS[:3]), weights), jax.jit(quick.e_step)(params, WALKS[:3], weights))
    loglik = np.array([dense(params, x)[0] for x in HOLES[:3]])
    close(traced(params, jnp.asarray(HOLES[:3]), weights).loglik, weights @ loglik)

    both = jnp.stack([WALKS[:3], HOLES[:3]])
    value_and_slope = jax.value_and_grad(lambda params, x: jnp.sum(careful.log_prob(params, x)))
    found = jax.jit(jax.vmap(value_and_slope, (None, 0)))(params, both)
    for lane, x in enumerate(both):
        stats = traced(params, x)
        close(found[0][lane], stats.loglik)
        fisher = jax.jit(jax.grad(lambda params, stats: careful.q_function(params, stats)))(params, stats)
        close(found[1].dynamics[lane], fisher.dynamics)
        close(found[1].emission[lane], fisher.emission)


def test_side_by_side_in_time(x64):
    model, params = LinearGaussianSSM(2), system()
    x = Sequences(jnp.asarray(HOLES), jnp.asarray(LENGTHS))
    expected = jax.jit(model.e_step)(params, x)
    close(jax.jit(dataclasses.replace(model, parallel=True).e_step)(params, x), expected, 1e-12)
    shared = LinearGaussianSSM(2, missing=False)
    expected = jax.jit(shared.e_step)(params, WALKS)
    close(jax.jit(dataclasses.replace(shared, parallel=True).e_step)(params, WALKS), expected, 1e-12)


def test_a_recursion_that_does_not_come_to_rest(x64):
    """An unseen random walk: covariances grow for ever, and nothing is taken for constant."""
    params = dataclasses.replace(
        system(2, 1), dynamics=jnp.eye(2), dynamics_covariance=jnp.eye(2), emission=jnp.array([[1.0, 0.0]])
    )
    model = LinearGaussianSSM(2, missing=False)
    x = model.sample(jax.random.key(0), params, 300)
    stats = jax.jit(model.e_step)(params, x)
    loglik, mean, covariance = dense(params, np.asarray(x))
    np.testing.assert_allclose(stats.loglik, loglik, rtol=1e-10)
    gram = np.sum(covariance + mean[:, :, None] * mean[:, None], axis=0)
    np.testing.assert_allclose(stats.emission.gram, gram, rtol=1e-8)


def test_drawn_paths(x64):
    """Their averages are the exact statistics, within five standard errors, told by twenty batches of draws."""
    model, params = LinearGaussianSSM(2), system()
    exact = e_step(model, params, HOLES)
    draw = jax.jit(lambda key: model.e_step(params, HOLES, expect=Sample(40, key=key)))
    batches = [draw(key) for key in jax.random.split(jax.random.key(0), 20)]
    drawn = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
    np.testing.assert_allclose(drawn.loglik, exact.loglik, rtol=1e-10)
    for name in ("initial", "dynamics", "emission"):
        for part in ("gram", "cross", "square"):
            ours, theirs = getattr(getattr(drawn, name), part), getattr(getattr(exact, name), part)
            error = np.std(ours, axis=0, ddof=1) / np.sqrt(len(ours))
            assert np.all(np.abs(np.mean(ours, axis=0) - theirs) <= 5 * error + 1e-9), (name, part)


@pytest.mark.parametrize("form", ["shared", "missing", "packed", "drawn"])
def test_one_posterior_serves_any_weights_and_other_parameters(form, x64):
    model, params, other = LinearGaussianSSM(2, emission_bias=True), system(emission_bias=np.ones(3)), system(seed=1)
    parts = [HOLES[row, :length] for row, length in enumerate(LENGTHS)]
    x = {
        "shared": lambda: WALKS,
        "packed": lambda: pack_sequences(parts, 4),
    }.get(form, lambda: HOLES)()
    x = model.units(x)
    expect = Sample(3, key=jax.random.key(0)) if form == "drawn" else Exact()
    posterior = jax.jit(lambda params: model.infer(params, x, expect))(params)
    close(posterior.evidence, model.log_prob(params, x))

    @jax.jit
    def both(params, weights):
        return model.statistics(params, x, posterior, weights), model.e_step(params, x, weights, expect)

    for weights in (jnp.arange(x.num_rows) % 3.0, jnp.ones(x.num_rows)):
        close(*both(params, weights))
    # Seen from other parameters they are the same statistics about other lines.
    other = dataclasses.replace(other, emission_bias=jnp.zeros(3))
    moved = jax.jit(lambda other: model.statistics(other, x, posterior))(other)
    close(moved, model.rebase(e_step(model, params, x, None, expect), other))


# Float32.


def single(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def compare_precisions(params, x, rtol, model=None):
    model = model or LinearGaussianSSM(params.dynamics.shape[0], missing=False)
    got = jax.jit(lambda params, x: (model.m_step(stats := model.e_step(params, x)), stats.loglik))(single(params), x)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(got))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, float)), (single(params), x))
        expected = jax.jit(lambda params, x: (model.m_step(stats := model.e_step(params, x)), stats.loglik))(*wide)
    close(got, expected, rtol)


def test_float32_over_a_hundred_thousand_steps():
    params = single(system(2, 3))
    x = LinearGaussianSSM(2).sample(jax.random.key(0), params, 100_000)
    compare_precisions(params, x, 1e-4)
    # And where every step is a step of the recursion.
    slow = dataclasses.replace(params, dynamics=jnp.eye(2), emission=jnp.eye(3, 2).at[:, 1].set(0))
    compare_precisions(slow, x, 2e-3)


def test_a_column_predicted_without_error_is_degenerate(x64):
    """Its noise has no maximum; noise that is held leaves nothing to collapse."""
    x = np.stack([np.cumsum(np.random.default_rng(2).normal(size=40)), np.full(40, 3.0)], axis=1)
    model = LinearGaussianSSM(1, emission_bias=True, missing=False)
    params = model.init(jax.random.key(0), x)
    fit = em_fit(model, params, x, tol=-1.0, max_steps=200)
    assert fit.status == Status.DEGENERATE
    stats = e_step(model, fit.params, x)
    assert not np.any(model.degenerate(e_step(model, params, x + [0, 1] * np.sin(np.arange(40.0))[:, None])))
    assert np.all(model.degenerate(stats))
    assert not np.any(model.degenerate(stats, held=("emission_covariance",)))
    # A line held away from the constant leaves the noise something to do.
    off = dataclasses.replace(fit.params, emission=jnp.ones((2, 1)), emission_bias=jnp.zeros(2))
    off = dataclasses.replace(off, emission_covariance=jnp.eye(2))
    assert not np.any(model.degenerate(e_step(model, off, x), held=("emission", "emission_bias")))
    held = Fixed(model, {"emission_covariance": 0.1 * np.eye(2)})
    assert em_fit(held, params, x, tol=-1.0, max_steps=200).status == Status.MAX_STEPS


@pytest.mark.parametrize(("level", "noise"), [(1.0, 1e-8), (1.0, 1e8), (1e-8, 1.0), (1e4, 1e4)])
def test_float32_at_any_noise_ratio(level, noise):
    """From a diffuse start, too."""
    start = scalar(level, noise, 0.0, 1e7, jnp.float32)
    x = LinearGaussianSSM(1).sample(jax.random.key(0), dataclasses.replace(start, initial_covariance=jnp.eye(1)), 300)
    rest = Fixed(LinearGaussianSSM(1, missing=False), {"initial_mean": 0.0, "initial_covariance": 1e7})
    compare_precisions(start, x, 2e-3, rest)


def test_float32_from_a_diffuse_start():
    """A local linear trend whose level and slope are unknown: nothing of the start's size may be left of it."""
    params = single(
        LinearGaussianSSMParams(
            initial_mean=np.zeros(2), initial_covariance=1e7 * np.eye(2), dynamics=np.array([[1.0, 1.0], [0.0, 1.0]]),
            dynamics_covariance=np.diag([0.1, 0.01]), emission=np.array([[0.8, 0.6]]), emission_covariance=np.eye(1),
        )
    )  # fmt: skip
    x = np.cumsum(np.cumsum(RNG.normal(size=60) / 10) + RNG.normal(size=60) / 3)[:, None] + RNG.normal(size=(60, 1))
    model = LinearGaussianSSM(2)
    got = model.smooth(params, np.float32(x))
    with jax.enable_x64(True):
        loglik, mean, covariance = dense(jax.tree.map(np.float64, params), np.float64(np.float32(x)))
    np.testing.assert_allclose(got.means, mean, atol=1e-4)
    np.testing.assert_allclose(got.covariances, covariance, atol=1e-4)
    np.testing.assert_allclose(model.log_prob(params, np.float32(x))[0], loglik, rtol=1e-4)


def test_a_hundred_steps_in_float32():
    """Other libraries' covariances turn indefinite on the way."""
    params = single(system(3, 4, seed=2))
    model = LinearGaussianSSM(3, emission_bias=True, missing=False)
    x = model.sample(jax.random.key(0), dataclasses.replace(params, emission_bias=jnp.full(4, 100.0)), 100)
    fit = em_fit(model, model.init(jax.random.key(1), x), x, tol=-1.0, max_steps=150)
    assert int(fit.num_steps) == 150
    history = np.asarray(fit.history)[:151]
    assert np.all(np.isfinite(history))
    assert np.min(np.diff(history)) > -1e-5 * np.max(np.abs(history))
    # A singular case: columns repeat each other, and the states explain them all exactly.
    x = x[:, jnp.array([0, 0, 1, 1])]
    fit = em_fit(model, model.init(jax.random.key(1), x), x, tol=-1.0, max_steps=150)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(fit.params))


@pytest.mark.parametrize("noise", [covariance.Full(), covariance.Diagonal()])
def test_equations_side_by_side_are_each_by_itself(noise, x64):
    """Leading axes of statistics and parameters, a component's say; the second group of features is held."""
    root = RNG.normal(size=(3, 9, 6))
    whole = np.einsum("kni,knj->kij", root, root)
    line = RNG.normal(size=(3, 2, 4))
    stats = EquationStats(
        count=jnp.array([7.0, 8.0, 9.0]),
        reference=jnp.array([7.0, 8.0, 9.0])[:, None, None] * line,
        gram=jnp.asarray(whole[:, :4, :4]),
        cross=jnp.asarray(whole[:, :4, 4:]),
        square=noise.from_matrix(jnp.asarray(whole[:, 4:, 4:])),
    )
    prior = jax.tree.map(lambda leaf: leaf / 4, stats)
    held = (None, jnp.full((3, 2, 1), 0.5), None)

    def estimate(stats, prior, held):
        equation = LinearEquation(noise=noise, widths=(2, 1, None), prior=prior)
        params = equation.m_step(stats, held)
        score = equation.q_function(params, stats) + equation.log_prior(params)
        return params, equation.degenerate(stats, held), equation.rebase(stats, params), score

    *together, score = jax.jit(estimate)(stats, prior, held)
    *alone, scores = jax.jit(jax.vmap(estimate))(stats, prior, held)
    close(together, alone)
    close(score, jnp.sum(scores))
    close(together[0].coefficients[1], held[1])


# Compilation, batches of fits, held parameters.


def test_one_compilation_and_many_starts(x64):
    model, traces = LinearGaussianSSM(2), []

    def counted(params, values, lengths):
        traces.append(None)
        return em_fit(model, params, Sequences(values, lengths), tol=-1.0, max_steps=3).loglik

    fit, values = jax.jit(counted), jnp.asarray(HOLES)
    alone = [fit(system(seed=seed), values, jnp.asarray(LENGTHS)) for seed in (0, 1)]
    fit(system(seed=2), values, jnp.asarray(LENGTHS[::-1].copy()))
    assert len(traces) == 1
    starts = jax.tree.map(lambda *leaves: jnp.stack(leaves), system(seed=0), system(seed=1))
    together = jax.jit(jax.vmap(lambda params: counted(params, values, jnp.asarray(LENGTHS))))(starts)
    close(together, jnp.stack(alone))


def test_known_and_singular_noise(x64):
    """A second-order autoregression in companion form: noise of rank one, held, and a known start."""
    held = {"emission": jnp.array([[1.0, 0.0]]), "initial_covariance": jnp.zeros((2, 2)), "initial_mean": jnp.zeros(2)}
    model = LinearGaussianSSM(2, missing=False)
    params = dataclasses.replace(
        system(2, 1),
        dynamics=jnp.array([[0.6, 0.3], [1.0, 0.0]]),
        dynamics_covariance=jnp.array([[1.0, 0.0], [0.0, 0.0]]),
        emission_covariance=jnp.array([[0.5]]),
        **held,
    )
    x = model.sample(jax.random.key(0), params, 30)
    loglik, mean, _ = dense(params, np.asarray(x))
    np.testing.assert_allclose(e_step(model, params, x).loglik, loglik, rtol=1e-10)
    np.testing.assert_allclose(model.smooth(params, x).means, mean, atol=1e-10)


def test_samples_have_the_moments_of_the_model(x64):
    model, params = LinearGaussianSSM(2), system()
    x, states = model.sample_with_states(jax.random.key(0), params, 3, 20_000)
    assert x.shape == (20_000, 3, 3)
    np.testing.assert_allclose(jnp.cov(states[:, 0].T), params.initial_covariance, atol=0.06)
    moved = params.dynamics @ params.initial_covariance @ params.dynamics.T + params.dynamics_covariance
    np.testing.assert_allclose(jnp.cov(states[:, 1].T), moved, atol=0.06)
    np.testing.assert_allclose(jnp.cov((x - states @ params.emission.T)[:, 2].T), params.emission_covariance, atol=0.05)
    assert model.sample(jax.random.key(0), params, 4).shape == (4, 3)


# Errors.


def test_errors():
    model, params = LinearGaussianSSM(2), single(system())
    x = np.float32(WALKS)
    with pytest.raises(ValueError, match="state_size must be at least 1"):
        LinearGaussianSSM(0)
    with pytest.raises(ValueError, match="covariance must be one of"):
        LinearGaussianSSM(1, covariance="tied")
    for expect in (Hard(), Exact(2.0)):
        with pytest.raises(TypeError, match=r"expect must be Exact\(\) or Sample"):
            model.e_step(params, x, expect=expect)
    with pytest.raises(ValueError, match=r"emission must have shape \(2, 2\)"):
        model.e_step(params, x[..., :2])
    with pytest.raises(TypeError, match=r"pair \(observations, inputs\)"):
        LinearGaussianSSM(2, dynamics_inputs=True).check(x)
    with pytest.raises(TypeError, match="the model has no inputs"):
        model.check((x, np.float32(INPUTS)))
    with pytest.raises(ValueError, match="observations must be finite; got inf in sequence 1, step 2, column 0"):
        model.check(np.where(np.arange(9)[:, None, None] * 6 + np.arange(6)[:, None] == 8, np.inf, x))
    with pytest.raises(ValueError, match="Leave missing=False out"):
        LinearGaussianSSM(2, missing=False).check(np.float32(HOLES))
    with pytest.raises(ValueError, match="column 1 has none"):
        model.check(np.where(np.arange(3) == 1, np.nan, x))
    with pytest.raises(ValueError, match=r"params.initial_mean must have shape \(3,\)"):
        em_fit(LinearGaussianSSM(3), params, x)
    with pytest.raises(ValueError, match="must be positive semi-definite"):
        em_fit(model, dataclasses.replace(params, dynamics_covariance=-jnp.eye(2)), x)
    with pytest.raises(TypeError, match=r"params.dynamics_bias must be a JAX or NumPy array of shape \(2,\); got None"):
        em_fit(LinearGaussianSSM(2, dynamics_bias=True), params, x)
    with pytest.raises(ValueError, match="the model has none"):
        Fixed(model, {"dynamics_bias": 0.0})
    with pytest.raises(TypeError, match="cannot be held"):
        Fixed(model, {"gain": 0.0})
    with pytest.raises(TypeError, match="inputs must be left out"):
        model.forecast(params, x, 2, jnp.zeros((2, 1)))
    with pytest.raises(ValueError, match="num_steps must be above 0"):
        model.pseudo_steps(params, 0.0)


@pytest.mark.parametrize("form", ["plain", "padded", "packed", "parallel"])
def test_sequences_of_one_step(form, x64):
    """Bayes' rule for one Gaussian observation each; nothing is seen of the dynamics, which stay as they are."""
    rows = [row[None] for row in WALKS[:, 0]]
    x = {"padded": lambda: pad_sequences(rows), "packed": lambda: pack_sequences(rows, 1)}.get(
        form, lambda: WALKS[:, :1]
    )()
    model, params = LinearGaussianSSM(2, parallel=form == "parallel", missing=form == "plain"), system()
    gain = params.initial_covariance @ params.emission.T
    total = params.emission @ gain + params.emission_covariance
    gain = np.linalg.solve(total, gain.T).T
    means = params.initial_mean[None] + (WALKS[:, 0] - (params.emission @ params.initial_mean)[None]) @ gain.T
    covariance = params.initial_covariance - gain @ params.emission @ params.initial_covariance
    found = model.smooth(params, x)
    count = len(WALKS)
    np.testing.assert_allclose(jnp.reshape(found.means, (count, 2)), means, rtol=1e-9)
    spread = np.broadcast_to(covariance, (count, 2, 2))
    np.testing.assert_allclose(jnp.reshape(found.covariances, (count, 2, 2)), spread, rtol=1e-8, atol=1e-12)

    result = em_fit(model, params, x, tol=-1.0, max_steps=1)
    first = multivariate_normal(params.emission @ params.initial_mean, total).logpdf(WALKS[:, 0])
    np.testing.assert_allclose(result.history[0], np.sum(first), rtol=1e-10)
    assert result.history[1] > result.history[0]
    np.testing.assert_allclose(result.params.dynamics, params.dynamics, rtol=1e-9)
    # The closed form of the first states' moments.
    np.testing.assert_allclose(result.params.initial_mean, jnp.mean(means, axis=0), rtol=1e-9)
    moments = covariance + np.cov(np.asarray(means).T, bias=True)
    np.testing.assert_allclose(result.params.initial_covariance, moments, rtol=1e-8)
