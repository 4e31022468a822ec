"""Divergences in closed form: the textbooks' three-point tables, and scipy's sums and integrals."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from jaxem import (
    Bernoulli,
    BernoulliParams,
    Binomial,
    Categorical,
    CategoricalParams,
    Exponential,
    ExponentialParams,
    Gamma,
    GammaParams,
    GammaPrior,
    Mixture,
    Multinomial,
    Normal,
    NormalParams,
    Poisson,
    PoissonParams,
    Product,
    StudentT,
    kl,
)
from jaxem.families import MultinomialParams

pytestmark = pytest.mark.usefixtures("x64")

P, Q = np.array([0.1, 0.4, 0.5]), np.array([0.8, 0.15, 0.05])


def test_three_point_tables_in_both_directions():
    """The example of the courses, p = (.1, .4, .5) and q = (.8, .15, .05): 1.927 and 2.022 bits. It is no distance.

    Brownlee (2019), Probability for Machine Learning, chapter on the divergence.
    """
    np.testing.assert_allclose(kl(P, Q) / np.log(2), 1.927, atol=5e-4)
    np.testing.assert_allclose(kl(Q, P) / np.log(2), 2.022, atol=5e-4)
    for one, other in ((P, Q), (Q, P)):
        np.testing.assert_allclose(kl(one, other), scipy.stats.entropy(one, other), rtol=1e-12)
    assert kl(P, P) == 0
    # Many at once; what p never does counts for nothing, what q never does is infinitely bad.
    zero = np.array([0.0, 0.5, 0.5])
    np.testing.assert_allclose(kl(np.stack([P, zero]), Q), [kl(P, Q), scipy.stats.entropy(zero, Q)], rtol=1e-12)
    assert kl(P, zero) == np.inf


def _counts(p, q, most=200):
    x = np.arange(most)
    return np.sum(p.pmf(x) * (p.logpmf(x) - q.logpmf(x)), where=p.pmf(x) > 0)


def _integral(p, q):
    return scipy.integrate.quad(lambda t: p.pdf(t) * (p.logpdf(t) - q.logpdf(t)), 0, 60, limit=300)[0]


def _column(*values):
    return jnp.array(values)[:, None]


def test_families_against_sums_and_integrals():
    found = kl(PoissonParams(rate=_column(2.0, 5.0)), PoissonParams(rate=_column(3.5, 4.0)), Poisson())
    np.testing.assert_allclose(
        found, [_counts(scipy.stats.poisson(2.0), scipy.stats.poisson(3.5)), 5 * np.log(1.25) - 1], rtol=1e-10
    )
    found = kl(ExponentialParams(rate=_column(2.0)), ExponentialParams(rate=_column(0.5)), Exponential())
    np.testing.assert_allclose(found, _integral(scipy.stats.expon(scale=0.5), scipy.stats.expon(scale=2)), rtol=1e-8)
    p, q = (GammaParams(shape=_column(a), rate=_column(b)) for a, b in ((2.5, 1.5), (4.0, 0.7)))
    expected = _integral(scipy.stats.gamma(2.5, scale=1 / 1.5), scipy.stats.gamma(4.0, scale=1 / 0.7))
    np.testing.assert_allclose(kl(p, q, Gamma()), expected, rtol=1e-8)
    np.testing.assert_allclose(kl(GammaPrior(2.5, 1.5), GammaPrior(4.0, 0.7)), expected, rtol=1e-8)
    p, q = (BernoulliParams(probability=_column(value)) for value in (0.2, 0.7))
    expected = scipy.stats.entropy([0.2, 0.8], [0.7, 0.3])
    np.testing.assert_allclose(kl(p, q, Bernoulli()), expected, rtol=1e-12)
    np.testing.assert_allclose(kl(p, q, Binomial(7)), 7 * expected, rtol=1e-12)
    p, q = (CategoricalParams(probability=jnp.asarray(table)[None, None]) for table in (P, Q))
    np.testing.assert_allclose(kl(p, q, Categorical(3)), kl(P, Q), rtol=1e-12)
    p, q = (MultinomialParams(probability=jnp.asarray(table)[None]) for table in (P, Q))
    np.testing.assert_allclose(kl(p, q, Multinomial(5)), 5 * kl(P, Q), rtol=1e-12)


@pytest.mark.parametrize("covariance", ["full", "diag", "spherical", "tied"])
def test_normals_against_their_densities(covariance):
    """The mean of log p - log q over p, which has a quadrature that is exact for squares."""
    one, other = np.array([[0.8, 0.2], [0.2, 0.5]]), np.array([[1.5, -0.4], [-0.4, 0.9]])
    stored = {
        "full": lambda c: c[None],
        "diag": lambda c: np.diag(c)[None],
        "spherical": lambda c: np.diag(c)[:1],
        "tied": lambda c: c,
    }[covariance]
    family = Normal(covariance)
    p = NormalParams(mean=jnp.array([[0.3, -1.0]]), covariance=jnp.asarray(stored(one)))
    q = NormalParams(mean=jnp.array([[1.0, 0.5]]), covariance=jnp.asarray(stored(other)))
    nodes, weights = np.polynomial.hermite_e.hermegauss(4)
    z = np.stack(np.meshgrid(nodes, nodes)).reshape(2, -1)
    mass = np.outer(weights, weights).ravel() / (2 * np.pi)
    x = (np.linalg.cholesky(np.asarray(family.covariance_matrix(p))[0]) @ z).T + np.asarray(p.mean)
    gaps = family.log_prob(p, jnp.asarray(x)) - family.log_prob(q, jnp.asarray(x))
    np.testing.assert_allclose(kl(p, q, family), [np.sum(mass * gaps[0])], rtol=1e-10)
    both = Product({"a": family, "b": family})
    np.testing.assert_allclose(kl({"a": p, "b": q}, {"a": q, "b": q}, both), kl(p, q, family), rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((P, 2 * Q), ValueError, "q must"),
        ((GammaPrior(1.0, 1.0), P), TypeError, "got GammaPrior and ndarray"),
        ((PoissonParams(rate=_column(1.0)), PoissonParams(rate=_column(2.0))), TypeError, "with family="),
        ((None, None, StudentT()), TypeError, "StudentT has no divergence in closed form"),
        ((None, None, Product({"t": StudentT()})), TypeError, "StudentT has no divergence in closed form"),
        ((Mixture(Normal(), 2), Mixture(Normal(), 2)), TypeError, "got Mixture and Mixture"),
    ],
)
def test_what_has_no_divergence_says_so(arguments, error, says):
    with pytest.raises(error, match=says):
        kl(*arguments)
