"""Mixtures of factor analysers and of PPCA, against plain NumPy, closed forms, scipy, and normal components."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats as st
from jitted import e_step, m_step

from jaxem import (
    Fixed,
    LowRankNormal,
    LowRankNormalParams,
    Mixture,
    MixtureParams,
    Tied,
    em_fit,
    fit_restarts,
    squarem,
)

RNG = np.random.default_rng(11)
MEANS = np.array([[0.0, 0.0, 0.0, 0.0, 0.0], [4.0, -1.0, 2.0, 0.0, 3.0]])
LOADINGS = RNG.normal(size=(2, 5, 2))
LABELS = RNG.integers(0, 2, 120)
ROWS = MEANS[LABELS] + np.einsum("ndq,nq->nd", LOADINGS[LABELS], RNG.normal(size=(120, 2))) + 0.4 * RNG.normal(
    size=(120, 5)
)  # fmt: skip
NOISE = {"diag": "uniquenesses", "isotropic": "noise_variance"}


def start(noise, components=2, columns=5, latents=2):
    """Parameters of a start, no two of their numbers alike."""
    rng = np.random.default_rng(components)
    values = rng.uniform(0.5, 1.5, (components, columns) if noise == "diag" else components)
    family = LowRankNormalParams(
        mean=jnp.asarray(MEANS[:components, :columns] + 0.3),
        loadings=jnp.asarray(rng.normal(size=(components, columns, latents))),
        **{NOISE[noise]: jnp.asarray(values)},
    )
    weights = np.array([0.3, 0.7]) if components == 2 else np.ones(1)
    return MixtureParams(weights=jnp.asarray(weights), components=family)


def covariances(params, noise):
    found = params.loadings @ np.swapaxes(params.loadings, 1, 2)
    values = np.asarray(getattr(params, NOISE[noise]))
    eye = np.eye(params.mean.shape[1])
    return np.asarray(found) + (values[:, :, None] if noise == "diag" else values[:, None, None]) * eye


def plain_step(params, x, noise, shared):
    """One step of Ghahramani & Hinton (1996), written as they write it: loadings and mean by one regression.

    They have one Psi for all components, which is `shared`.
    """
    components, total = params.components, len(x)
    density = np.stack(
        [
            weight * st.multivariate_normal(mean, covariance).pdf(x)
            for weight, mean, covariance in zip(
                params.weights, components.mean, covariances(components, noise), strict=True
            )
        ]
    )
    h = density / density.sum(axis=0)
    means, loadings, psis = [], [], []
    for k, (mean, lam, covariance) in enumerate(
        zip(components.mean, components.loadings, covariances(components, noise), strict=True)
    ):
        lam = np.asarray(lam)
        beta = lam.T @ np.linalg.inv(covariance)
        z = (x - np.asarray(mean)) @ beta.T
        augmented = np.hstack([z, np.ones((total, 1))])
        second = augmented.T @ (h[k][:, None] * augmented)
        second[:2, :2] += h[k].sum() * (np.eye(2) - beta @ lam)
        new = (x.T @ (h[k][:, None] * augmented)) @ np.linalg.inv(second)
        psi = np.sum(h[k][:, None] * (x - augmented @ new.T) * x, axis=0)
        loadings.append(new[:, :2])
        means.append(new[:, 2])
        psis.append(psi)
    counts = h.sum(axis=1)
    psi = np.tile(np.sum(psis, axis=0) / total, (len(counts), 1)) if shared else np.stack(psis) / counts[:, None]
    psi = psi if noise == "diag" else psi.mean(axis=1)
    family = LowRankNormalParams(mean=np.stack(means), loadings=np.stack(loadings), **{NOISE[noise]: psi})
    return MixtureParams(weights=counts / total, components=family), np.sum(np.log(density.sum(axis=0)))


@pytest.mark.parametrize(
    ("noise", "shared", "components"),
    [("diag", False, 1), ("diag", False, 2), ("diag", True, 2), ("isotropic", True, 2)],
)
def test_iterates_are_those_of_ghahramani_and_hinton(noise, shared, components, x64):
    family = LowRankNormal(2, noise)
    model = Mixture(Tied(family, NOISE[noise]) if shared else family, components)
    params = start(noise, components)
    params = m_step(model, e_step(model, params, ROWS)) if shared else params  # a start that shares
    step, found, expected = (
        jax.jit(lambda at: (lambda s: (model.m_step(s), s.loglik))(model.e_step(at, ROWS))),
        params,
        params,
    )
    for _ in range(6):
        (found, ours), (expected, loglik) = step(found), plain_step(expected, ROWS, noise, shared)
        np.testing.assert_allclose(ours, loglik, rtol=1e-12)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("noise", list(NOISE))
def test_a_fit_expands_the_factors(noise, x64):
    """Liu, Rubin & Wu (1998): means and covariances of the factors, as the E-step finds them, pass into the rest."""
    model, params = Mixture(LowRankNormal(2, noise), 2), start(noise)
    plain, _ = plain_step(params, ROWS, noise, False)
    fit = em_fit(model, params, ROWS, tol=-1.0, max_steps=1)
    share, components = np.asarray(model.posterior(params, ROWS)).T, params.components
    for k, covariance in enumerate(covariances(components, noise)):
        lam = np.asarray(components.loadings[k])
        beta = lam.T @ np.linalg.inv(covariance)
        z = (ROWS - np.asarray(components.mean[k])) @ beta.T
        spread = np.cov(z.T, aweights=share[k], bias=True) + np.eye(2) - beta @ lam
        here = jax.tree.map(lambda leaf, k=k: np.asarray(leaf[k]), fit.params.components)
        np.testing.assert_allclose(here.mean, np.average(ROWS, axis=0, weights=share[k]), rtol=1e-9)
        expected = plain.components.loadings[k] @ spread @ plain.components.loadings[k].T
        np.testing.assert_allclose(here.loadings @ here.loadings.T, expected, rtol=1e-8)
    np.testing.assert_allclose(getattr(fit.params.components, NOISE[noise]), getattr(plain.components, NOISE[noise]))


def test_expansion_saves_nearly_all_steps_where_loadings_are_large(x64):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    loadings = rng.normal(size=(2, 12, 2))
    x = np.einsum("ndq,nq->nd", loadings[labels], rng.normal(size=(200, 2))) + 0.1 * rng.normal(size=(200, 12))
    model = Mixture(LowRankNormal(2, "isotropic"), 2)
    params = model.params_from_responsibilities(jnp.asarray(x), labels)
    fit = em_fit(model, params, x, tol=1e-6).check()
    assert fit.num_steps < 20
    step = jax.jit(lambda at: model.m_step(model.e_step(at, x)))
    plain = jax.lax.fori_loop(0, 200, lambda _, at: step(at), params)
    assert e_step(model, plain, x).loglik < fit.loglik - 1


@pytest.mark.parametrize("noise", list(NOISE))
def test_densities_are_scipys_where_a_covariance_is_large_and_nearly_singular(noise, x64):
    rng = np.random.default_rng(2)
    values = 10.0 ** rng.uniform(-4, 2, (2, 40) if noise == "diag" else 2)
    loadings = 3 * rng.normal(size=(2, 40, 3))
    params = LowRankNormalParams(mean=rng.normal(size=(2, 40)), loadings=loadings, **{NOISE[noise]: values})
    x = rng.normal(size=(20, 40))
    found = jax.jit(LowRankNormal(3, noise).log_prob)(params, x)
    laws = [st.multivariate_normal(m, c) for m, c in zip(params.mean, covariances(params, noise), strict=True)]
    np.testing.assert_allclose(found, [law.logpdf(x) for law in laws], rtol=1e-9)


def test_one_component_of_isotropic_noise_ends_at_the_closed_form(x64):
    model = Mixture(LowRankNormal(2, "isotropic"), 1)
    fit = em_fit(model, start("isotropic", 1), ROWS, algorithm=squarem(), tol=1e-13, max_steps=4000)
    values, vectors = np.linalg.eigh(np.cov(ROWS.T, bias=True))
    rest = values[:3].mean()
    best = vectors[:, 3:] @ np.diag(values[3:] - rest) @ vectors[:, 3:].T + rest * np.eye(5)
    np.testing.assert_allclose(fit.params.components.noise_variance, [rest], rtol=1e-5)
    np.testing.assert_allclose(covariances(fit.params.components, "isotropic")[0], best, atol=1e-5)
    law = st.multivariate_normal(ROWS.mean(axis=0), best)
    np.testing.assert_allclose(fit.loglik, law.logpdf(ROWS).sum(), rtol=1e-9)


def test_with_one_factor_less_than_columns_isotropic_noise_is_no_restriction(x64):
    model = Mixture(LowRankNormal(2, "isotropic"), 1)
    x = ROWS[:, :3]
    fit = em_fit(model, start("isotropic", 1, 3), x, algorithm=squarem(), tol=1e-13, max_steps=4000)
    covariance = np.cov(x.T, bias=True)
    np.testing.assert_allclose(covariances(fit.params.components, "isotropic")[0], covariance, atol=1e-4)
    np.testing.assert_allclose(
        fit.loglik, st.multivariate_normal(x.mean(axis=0), covariance).logpdf(x).sum(), rtol=1e-8
    )
    assert model.num_parameters(fit.params) == 3 + 6


@pytest.mark.parametrize("noise", list(NOISE))
def test_rotated_factors_are_the_same_model(noise, x64):
    model, params = Mixture(LowRankNormal(2, noise), 2), start(noise)
    turn = np.array([[np.cos(0.7), -np.sin(0.7)], [np.sin(0.7), np.cos(0.7)]])
    turned = dataclasses.replace(params.components, loadings=params.components.loadings @ turn)
    other = dataclasses.replace(params, components=turned)
    here, there = (em_fit(model, at, ROWS, tol=-1.0, max_steps=5) for at in (params, other))
    np.testing.assert_allclose(there.history, here.history, rtol=1e-12)
    after = [covariances(fit.params.components, noise) for fit in (here, there)]
    np.testing.assert_allclose(*after, rtol=1e-9, atol=1e-10)


# The numbers of free parameters of covariances in McNicholas & Murphy (2008), table 1: p columns, q factors, G
# components; constrained (C) or not (U) in loadings, noise, and noise that is isotropic.
def _free(p, q, G, model):
    loadings = p * q - q * (q - 1) // 2
    noise = {"CC": 1, "CU": p, "UC": G, "UU": G * p}[model[1:]]
    return (loadings if model[0] == "C" else G * loadings) + noise


def _parsimonious(model):
    noise = "isotropic" if model[2] == "C" else "diag"
    names = tuple(name for name, letter in zip(("loadings", NOISE[noise]), model, strict=False) if letter == "C")
    family = LowRankNormal(2, noise)
    return Tied(family, names) if names else family


@pytest.mark.parametrize("name", ["CCC", "CCU", "CUC", "CUU", "UCC", "UCU", "UUC", "UUU"])
def test_parameters_of_the_eight_parsimonious_models_are_counted(name):
    model = Mixture(_parsimonious(name), 3)
    assert model.num_parameters(model.params_like(ROWS)) == 2 + 15 + _free(5, 2, 3, name)


@pytest.mark.parametrize("name", ["CCU", "CUU", "CUC", "UCU"])
def test_loadings_and_noise_are_shared_exactly(name, x64):
    model, x = Mixture(_parsimonious(name), 2), jnp.asarray(ROWS)
    params = model.init(jax.random.key(0), x, method="random_responsibilities")
    history = np.asarray(em_fit(model, params, x, tol=-1.0, max_steps=15).history)
    assert np.all(np.diff(history) >= -1e-9 * abs(history[0]))

    # The M-step is a maximum: Q has no slope along what is free.
    @jax.jit
    def maximum():
        stats = model.e_step(params, x)
        best = model.m_step(stats)
        slope = jax.grad(lambda theta: model.q_function(model.constrain(theta), stats))(model.unconstrain(best))
        return best, slope

    best, slope = maximum()
    for leaf in jax.tree.leaves(slope):
        np.testing.assert_allclose(leaf, 0, atol=1e-5)
    for shared, letter in zip(("loadings", NOISE[model.family.noise]), name, strict=False):
        value = np.asarray(getattr(best.components, shared))
        assert (np.ptp(value, axis=0).max() == 0) == (letter == "C")


def test_loadings_and_noise_are_held_or_shared_in_any_order(x64):
    family, params = LowRankNormal(2), start("diag")
    stats = jax.jit(family.stats)(params.components, ROWS, jnp.asarray(np.eye(2)[LABELS].T))
    noise = {"uniquenesses": jnp.array([[0.2], [0.5]])}
    one = Fixed(Tied(family, "loadings"), noise).m_step(stats)
    two = Tied(Fixed(family, noise), "loadings").m_step(stats)
    both, nested = Tied(family, ("loadings", "uniquenesses")), Tied(Tied(family, "uniquenesses"), "loadings")
    pairs = [(one, two), (both.m_step(stats), nested.m_step(stats))]
    for a, b in pairs:
        jax.tree.map(lambda left, right: np.testing.assert_allclose(left, right, rtol=1e-10), a, b)
    # Weighted least squares on all rows at once: a column by itself, loadings in common, an intercept a component.
    z, spread = _posterior(params.components)
    left, right = np.zeros((4, 4)), np.zeros(4)
    for k in (0, 1):
        rows = k == LABELS
        design = np.hstack([z[k][rows], np.eye(2)[LABELS[rows]]])
        gram = design.T @ design
        gram[:2, :2] += rows.sum() * spread[k]
        left += gram / (0.2, 0.5)[k]
        right += design.T @ ROWS[rows, 1] / (0.2, 0.5)[k]
    found = [*one.loadings[0, 1], *one.mean[:, 1]]
    np.testing.assert_allclose(found, np.linalg.solve(left, right), rtol=1e-9)


def _posterior(components):
    """Means (K, N, Q) and covariances (K, Q, Q) of the factors."""
    loadings = np.asarray(components.loadings)
    beta = np.swapaxes(loadings, 1, 2) @ np.linalg.inv(covariances(components, "diag"))
    deviations = ROWS[None] - np.asarray(components.mean)[:, None]
    return np.einsum("kqd,knd->knq", beta, deviations), np.eye(2) - beta @ loadings


@pytest.mark.parametrize(("name", "value"), [("loadings", LOADINGS), ("mean", MEANS)])
def test_what_is_held_stays_where_factors_are_expanded(name, value, x64):
    model = Mixture(Fixed(LowRankNormal(2), {name: jnp.asarray(value)}), 2)
    params = start("diag")
    params = dataclasses.replace(params, components=model.family.apply(params.components))
    fit = em_fit(model, params, ROWS, tol=-1.0, max_steps=20)
    assert np.all(np.diff(fit.history) > 0)
    np.testing.assert_array_equal(getattr(fit.params.components, name), value)


@pytest.mark.parametrize("noise", list(NOISE))
@pytest.mark.parametrize(("offset", "width"), [(1e4, 1.0), (0.0, 1e-3)])
def test_float32_survives_far_from_the_origin_and_clusters_far_apart(offset, width, noise):
    single = (width * ROWS + offset + np.where(LABELS, 10.0, 0.0)[:, None]).astype(np.float32)
    model, found = Mixture(LowRankNormal(2, noise), 2), {}
    begin = jax.tree.map(np.asarray, model.params_from_responsibilities(jnp.asarray(single), jnp.asarray(LABELS)))
    for dtype in ("float32", "float64"):
        with jax.enable_x64(dtype == "float64"):
            at, x = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (begin, single))  # noqa: B023
            fit = em_fit(model, at, x, tol=-1.0, max_steps=20)
            assert fit.params.components.mean.dtype == dtype
            found[dtype] = fit.params.components.mean, covariances(fit.params.components, noise), fit.loglik
    (mean, covariance, loglik), (exact_mean, exact, exact_loglik) = found["float32"], found["float64"]
    np.testing.assert_allclose(mean, exact_mean, atol=1e-3 * width + 1e-6 * (offset + 10))
    np.testing.assert_allclose(covariance, exact, atol=2e-3 * np.max(exact))
    np.testing.assert_allclose(loglik, exact_loglik, atol=1e-3 * len(ROWS))


def test_more_columns_than_rows_and_many_restarts(x64):
    rng = np.random.default_rng(5)
    labels = np.repeat([0, 1], 20)
    loadings, means = rng.normal(size=(2, 60, 2)), np.stack([np.zeros(60), np.r_[np.full(6, 3.0), np.zeros(54)]])
    x = means[labels] + np.einsum("ndq,nq->nd", loadings[labels], rng.normal(size=(40, 2)))
    x = jnp.asarray(x + 0.5 * rng.normal(size=x.shape))
    model = Mixture(LowRankNormal(2, "isotropic"), 2)
    runs = fit_restarts(model, jax.random.key(0), x, num_restarts=8, tol=1e-5, certify=False)
    assert np.all(np.isfinite(runs.objective))
    found = np.asarray(model.predict(runs.best.params, x))
    assert max(np.mean(found == labels), np.mean(found != labels)) == 1
    alone = em_fit(model, runs.best.params, x, tol=1e-8)
    np.testing.assert_allclose(alone.objective, runs.best.objective, rtol=1e-4)


def test_what_cannot_be_is_refused_by_name():
    with pytest.raises(ValueError, match="noise must be one of 'diag', 'isotropic'; got 'full'"):
        LowRankNormal(2, "full")
    with pytest.raises(ValueError, match="num_latents must be at least 1"):
        LowRankNormal(0)
    x = ROWS.astype(np.float32)
    model = Mixture(LowRankNormal(2), 2)
    with pytest.raises(ValueError, match="x must be finite; got nan in row 3, column 1"):
        model.init(jax.random.key(0), np.where(np.arange(600).reshape(120, 5) == 16, np.nan, x))
    with pytest.raises(ValueError, match=r"num_latents must be below the number of columns of x; got 2 latents"):
        model.init(jax.random.key(0), x[:, :2])
    with pytest.raises(TypeError, match=r"uniquenesses must be a JAX or NumPy array of shape .2, 5.; got None"):
        model.log_prob(start("isotropic"), x)
    with pytest.raises(TypeError, match="'noise_variance' of LowRankNormal cannot be held"):
        Fixed(LowRankNormal(2), {"noise_variance": 1.0})
