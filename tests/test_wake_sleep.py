"""Recognition networks: in the expect slot, learnt by wake-sleep, and by amortised variational EM."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import scipy.stats
from jitted import e_step, free_energy, m_step

from jaxem import (
    EM,
    PPCA,
    Amortised,
    AmortisedParams,
    HelmholtzMachine,
    KMeans,
    Mixture,
    MixtureParams,
    Poisson,
    PoissonParams,
    PPCAParams,
    Recognition,
    StateMoments,
    Status,
    amortised_em,
    em_fit,
    fit_restarts,
    from_functions,
    from_log_joint,
    wake_sleep,
)
from jaxem.record import record

KEY = jax.random.key(0)
DROPPING = optax.adam(optax.exponential_decay(0.05, 1500, 0.3))

# Bars, 3 x 3 (Hinton et al. 1995, smaller): upright or lying, and then each of three bars with probability 1/2.
_on = (np.arange(8)[:, None] >> np.arange(3) & 1).astype(np.float32)
_drawn = np.concatenate([np.repeat(_on, 3, axis=0).reshape(8, 9), np.repeat(_on, 3, axis=1)])
BARS, _which = np.unique(_drawn, axis=0, return_inverse=True)
CHANCE = np.bincount(_which.ravel(), np.full(16, 1 / 16)).astype(np.float32)

MACHINE = HelmholtzMachine((1, 2))
YES = (np.random.default_rng(1).random((12, 3)) < 0.4).astype(float)


def test_wake_sleep_learns_bars_and_reweighted_wake_sleep_nearly_all_of_them():
    machine, weights = HelmholtzMachine((4, 6)), 1000 * CHANCE

    def fits(keys, reweighted):
        return jax.vmap(
            lambda key: em_fit(
                machine,
                machine.init(key, BARS, weights),
                BARS,
                weights,
                key=key,
                algorithm=wake_sleep(DROPPING, reweighted=reweighted, num_samples=10, num_dreams=30),
                max_steps=3000,
            )
        )(keys)

    fits = jax.jit(fits, static_argnums=1)
    keys = jax.random.split(KEY, 2)
    truth = float(CHANCE @ np.log(CHANCE))  # of the generating model; no other is above it
    found = {name: fits(keys, name == "reweighted") for name in ("wake-sleep", "reweighted")}
    for name, runs in found.items():
        each = np.asarray(runs.objective) / 1000
        print(f"{name}: {each} nats a row, the generating model {truth:.4f}")
        assert np.all(each <= truth + 1e-3)
        assert np.all(runs.status == Status.MAX_STEPS)  # nothing random claims to have converged
    assert np.all(found["wake-sleep"].objective / 1000 > truth - 0.5)
    assert np.all(found["reweighted"].objective / 1000 > truth - 0.1)
    assert found["reweighted"].params.generative[0].biases.dtype == jnp.float32
    assert np.any(found["wake-sleep"].largest_decrease > 0)  # and no step is said to rise


def _enumerated(params, x):
    """log p(x, z) of all configurations of one unit above two, (8, N), in plain NumPy."""
    top, (w1, b1), (w2, b2) = params.generative[0].biases, *((a.weights, a.biases) for a in params.generative[1:])

    def log_prob(units, logits):
        return np.sum(np.log(np.where(units > 0, scipy.special.expit(logits), scipy.special.expit(-logits))), axis=-1)

    every = []
    for z in itertools.product((0.0, 1.0), repeat=3):
        above, units = np.array(z[:1]), np.array(z[1:])
        hidden = log_prob(above, top) + log_prob(units, above @ w1 + b1)
        every.append(hidden + log_prob(x, units @ w2 + b2))
    return np.stack(every)


def test_a_small_machine_is_enumerated(x64):
    params = MACHINE.init(KEY, YES)
    joint = _enumerated(params, YES)
    np.testing.assert_allclose(jax.jit(MACHINE.log_joint)(params, YES), joint, rtol=1e-12)
    np.testing.assert_allclose(MACHINE.log_prob(params, YES), scipy.special.logsumexp(joint, axis=0), rtol=1e-12)
    each = np.stack([np.broadcast_to(z, (12, 3)) for z in itertools.product((0.0, 1.0), repeat=3)])
    together = jax.jit(jax.vmap(lambda z: MACHINE.complete_log_prob(params, YES, z)))(each)
    np.testing.assert_allclose(together, joint, rtol=1e-12)
    q = jax.jit(MACHINE.approximate)(params, YES)
    np.testing.assert_allclose(q.responsibilities.sum(axis=0), 1.0)  # a distribution over all of them
    bound, gap = free_energy(MACHINE, params, YES, q)
    assert gap > 0.1
    np.testing.assert_allclose(bound + gap, MACHINE.log_prob(params, YES).sum(), rtol=1e-12)
    # Dreams come as often as they are likely.
    x, z = jax.jit(MACHINE.sample_with_latents, static_argnums=2)(KEY, params, 40_000)
    chance = np.exp(_enumerated(params, np.array(list(itertools.product((0.0, 1.0), repeat=3)))))
    seen = np.zeros((8, 8))
    np.add.at(seen, ((np.asarray(z) @ [4, 2, 1]).astype(int), (np.asarray(x) @ [4, 2, 1]).astype(int)), 1 / 40_000)
    np.testing.assert_allclose(seen, chance, atol=0.008)


def test_restarts_of_wake_sleep_are_one_program(x64):
    learnt = fit_restarts(
        MACHINE, KEY, YES, num_restarts=2, algorithm=wake_sleep(reweighted=True, batch_size=6), max_steps=15
    )
    np.testing.assert_allclose(learnt.best.objective, MACHINE.log_prob(learnt.best.params, YES).sum(), rtol=1e-12)
    assert learnt.best.num_passes == 15 / 2 + 1


def test_many_units_are_fitted_by_estimates():
    machine = HelmholtzMachine((8, 12))
    params = machine.init(KEY, BARS)
    with pytest.raises(ValueError, match="20 latent units have too many configurations"):
        em_fit(machine, params, BARS, key=KEY, algorithm=wake_sleep(), max_steps=2)
    fit = em_fit(machine, params, BARS, key=KEY, algorithm=wake_sleep(reweighted=True, exact=False), max_steps=200)
    assert fit.objective > fit.history[0] + 10


# Of two Poisson distributions the log odds are linear in the count: a network of two numbers is the exact posterior.
COUNTS = np.random.default_rng(3).poisson(np.where(np.arange(120) < 50, 2.0, 9.0)).astype(np.float32)
MIXTURE = Mixture(Poisson(), 2)
START = MixtureParams(weights=jnp.array([0.5, 0.5]), components=PoissonParams(rate=jnp.array([[3.0], [6.0]])))


def odds(phi, x):
    return jnp.stack([jnp.zeros(len(x)), phi[0] + phi[1] * (x.reshape(-1) - 5)], axis=1)


def test_a_network_in_the_expect_slot_is_the_posterior_where_it_can_be():
    rate, share = START.components.rate[:, 0], START.weights
    exact = jnp.array([jnp.log(share[1] / share[0]) - (rate[1] - rate[0]) + 5 * jnp.log(2.0), jnp.log(2.0)])
    q = Recognition(odds, exact)
    posterior = jax.jit(q.posterior)(MIXTURE, START, COUNTS)
    np.testing.assert_allclose(posterior.responsibilities.T, MIXTURE.posterior(START, COUNTS), atol=1e-5)
    one = em_fit(MIXTURE, START, COUNTS, algorithm=EM(expect=q), tol=-1.0, max_steps=1)
    np.testing.assert_allclose(one.params.weights, m_step(MIXTURE, e_step(MIXTURE, START, COUNTS)).weights, rtol=1e-5)
    assert not EM(expect=q).nature(MIXTURE).monotone
    # Another network leaves a gap, and the fit goes where its lower bound is highest.
    other = Recognition(odds, jnp.array([0.0, 0.3]))
    fit = em_fit(MIXTURE, START, COUNTS, algorithm=EM(expect=other), max_steps=50)
    bound, gap = free_energy(MIXTURE, fit.params, COUNTS, jax.nn.softmax(odds(other.params, COUNTS), axis=1))
    assert gap > 1.0
    np.testing.assert_allclose(bound + gap, fit.objective, rtol=1e-5)


def test_wake_sleep_of_a_mixture_ends_where_em_does():
    machine = Amortised(MIXTURE, odds, lambda key, x: jnp.array([0.0, 0.1]))
    params = AmortisedParams(generative=START, recognition=jnp.array([0.0, 0.1]))
    best = em_fit(MIXTURE, START, COUNTS).objective
    algorithm = wake_sleep(DROPPING, m_step=True, num_dreams=200)
    fit = em_fit(machine, params, COUNTS, key=KEY, algorithm=algorithm, max_steps=1500)
    assert best - 0.01 * len(COUNTS) < fit.objective <= best + 1e-3
    bound, gap = free_energy(machine, fit.params, COUNTS, jax.jit(machine.approximate)(fit.params, COUNTS))
    assert gap < 0.02 * len(COUNTS)
    np.testing.assert_allclose(bound + gap, fit.objective, rtol=1e-5)
    start = machine.init(KEY, COUNTS)
    assert jax.tree.structure(start) == jax.tree.structure(params)


def test_steps_of_the_reweighted_kind_follow_the_likelihood(x64):
    """With many samples, the slope in the model's parameters is the score, whatever q is (importance sampling)."""

    def joint(theta, x):
        rate = jnp.exp(theta)[:, None]
        return jnp.log(0.5) + x[None] * theta[:, None] - rate - jax.scipy.special.gammaln(x + 1)[None]

    x = COUNTS[::10].astype(float)
    model = from_log_joint(joint, 2, sample_with_labels=lambda key, theta, n: (jnp.ones(n), jnp.zeros(n, int)))
    theta = AmortisedParams(generative=jnp.array([1.0, 2.0]), recognition=jnp.array([0.2, 0.1]))
    # Plain gradient descent of length 1 shows the slope.
    algorithm = wake_sleep(optax.sgd(1.0), reweighted=True, num_samples=20_000, num_dreams=0, exact=False)
    fit = em_fit(Amortised(model, odds), theta, x, key=KEY, algorithm=algorithm, max_steps=1)
    score = jax.grad(lambda theta: model.log_prob(theta, x).mean())(theta.generative)
    np.testing.assert_allclose(fit.params.generative - theta.generative, score, atol=0.01)
    np.testing.assert_allclose(fit.history[0], model.log_prob(theta.generative, x).sum(), rtol=1e-3)
    # And that of the network is what lowers KL(posterior ‖ q).
    r = model.posterior(theta.generative, x)
    slope = jax.grad(lambda phi: jnp.sum(r * jax.nn.log_softmax(odds(phi, x), axis=1)) / len(x))(theta.recognition)
    np.testing.assert_allclose(fit.params.recognition - theta.recognition, slope, atol=0.02)


@record
class Gaussian:
    """q(z | x_n) = N(mean, diag(sd^2)), whose draws are differentiable functions of both."""

    mean: jax.Array
    log_sd: jax.Array

    def sample(self, key):
        return self.mean + jnp.exp(self.log_sd)[None] * jax.random.normal(key, self.mean.shape, self.mean.dtype)

    def log_prob(self, z):
        return jnp.sum(jax.scipy.stats.norm.logpdf(z, self.mean, jnp.exp(self.log_sd)[None]), axis=1)


def decoded(params, x, z):
    """log p(x, z) of PPCA, z ~ N(0, I)."""
    mean = params.mean[None] + z @ params.loadings.T
    seen = jax.scipy.stats.norm.logpdf(x, mean, jnp.sqrt(params.noise_variance))
    return seen.sum(axis=1) + jax.scipy.stats.norm.logpdf(z).sum(axis=1)


def whole(phi, x):
    return Gaussian(mean=x @ phi["slope"] + phi["level"][None], log_sd=phi["log_sd"])


def half(phi, x):
    """A network that does not see the last two columns."""
    return Gaussian(mean=x[:, :2] @ phi["slope"][:2] + phi["level"][None], log_sd=phi["log_sd"])


def test_a_linear_autoencoder_is_ppca_and_its_bound_tells_what_amortisation_costs(x64):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 2)) @ rng.normal(size=(2, 4)) + 0.7 * rng.normal(size=(100, 4)) + 1.0
    # Tipping & Bishop (1999), eq. 8: the likelihood at the maximum, from the eigenvalues.
    spectrum = np.sort(np.linalg.eigvalsh(np.cov(x.T, bias=True)))[::-1]
    noise = spectrum[2:].mean()
    best = -0.5 * (4 * np.log(2 * np.pi) + np.log(spectrum[:2]).sum() + 2 * np.log(noise) + 4)
    ppca = PPCA(2)
    decoder = from_functions(
        ppca.e_step,
        ppca.m_step,
        unconstrain=ppca.unconstrain,
        constrain=ppca.constrain,
        complete_log_prob=decoded,
    )
    start = AmortisedParams(
        generative=PPCAParams(
            mean=jnp.zeros(4), loadings=jnp.asarray(rng.normal(size=(4, 2))), noise_variance=jnp.array(1.0)
        ),
        recognition={"slope": jnp.zeros((4, 2)), "level": jnp.zeros(2), "log_sd": jnp.zeros(2)},
    )
    gaps = {}
    for name, network in {"whole": whole, "half": half}.items():
        fit = em_fit(Amortised(decoder, network), start, x, key=KEY, algorithm=amortised_em(DROPPING), max_steps=3000)
        exact = ppca.posterior(fit.params.generative, x)
        q = network(fit.params.recognition, x)
        precision = np.linalg.inv(exact.covariances[0])
        away = np.asarray(exact.means - q.mean)
        variances = np.exp(2 * np.asarray(q.log_sd))
        gaps[name] = 0.5 * (
            np.trace(precision @ np.diag(variances)) - 2 - np.log(variances).sum()
            - np.linalg.slogdet(precision)[1] + np.einsum("ni,ij,nj->n", away, precision, away).mean()
        )  # fmt: skip
        moments = StateMoments(means=q.mean, covariances=jnp.broadcast_to(jnp.diag(variances), (100, 2, 2)))
        bound, gap = free_energy(ppca, fit.params.generative, x, moments)
        np.testing.assert_allclose([bound + gap, gap / 100], [fit.loglik, gaps[name]], rtol=1e-9)
        print(f"{name}: likelihood {fit.loglik / 100:.4f} of {best:.4f} nats a row, {gaps[name]:.4f} lost to q")
        if name == "whole":
            assert best - 1e-2 < fit.loglik / 100 <= best + 1e-9
    assert gaps["whole"] < 1e-2
    assert gaps["half"] > 0.05


def test_what_is_wrong_is_named():
    params = AmortisedParams(generative=START, recognition=jnp.zeros(2))
    with pytest.raises(TypeError, match="need a model with a recognition network"):
        em_fit(MIXTURE, START, COUNTS, key=KEY, algorithm=wake_sleep())
    with pytest.raises(TypeError, match=r"pass key=jax.random.key"):
        em_fit(Amortised(MIXTURE, odds), params, COUNTS, algorithm=wake_sleep())
    with pytest.raises(TypeError, match="a start needs the init"):
        Amortised(MIXTURE, odds).init(KEY, COUNTS)
    with pytest.raises(TypeError, match="KMeans must have complete_log_prob"):
        em_fit(Amortised(KMeans(2), odds), params, COUNTS[:, None], key=KEY, algorithm=wake_sleep())
    with pytest.raises(TypeError, match="optimizer must be an optax"):
        wake_sleep(0.1)
    with pytest.raises(ValueError, match="num_dreams"):
        wake_sleep(num_dreams=0)
    with pytest.raises(TypeError, match="m_step=True needs"):
        em_fit(MACHINE, MACHINE.init(KEY, YES), YES, key=KEY, algorithm=wake_sleep(m_step=True))
    with pytest.raises(ValueError, match="x must hold 0 or 1; got 2 in row 0"):
        em_fit(MACHINE, MACHINE.init(KEY, YES), 2 + YES, key=KEY, algorithm=wake_sleep())
    with pytest.raises(ValueError, match="layers must be"):
        HelmholtzMachine(())
    model = from_log_joint(lambda theta, x: jnp.stack([theta * x, x]), 2)
    with pytest.raises(TypeError, match="expect must be Exact"):
        em_fit(model, 1.0, COUNTS, algorithm=EM(expect=Recognition(odds, jnp.zeros(2))))
    assert dataclasses.replace(MACHINE, layers=(3,)) == HelmholtzMachine(3)
