"""Variational Bayes: bounds that are whole, against evidence in closed form, quadrature, and scikit-learn."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
from scipy.special import betaln, digamma, gammaln, multigammaln
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import BayesianGaussianMixture

from jaxem import (
    HMM,
    Bernoulli,
    Beta,
    Binomial,
    Categorical,
    Dirichlet,
    Exponential,
    Fixed,
    GammaPrior,
    Labelled,
    LinearRegression,
    Mixture,
    Multinomial,
    Normal,
    NormalInverseGamma,
    NormalInverseWishart,
    NormalParams,
    Poisson,
    Product,
    Status,
    StudentT,
    Tied,
    Variational,
    VariationalMixture,
    datasets,
    em_fit,
    fit_restarts,
    stepwise_em,
)
from jaxem.models import MixtureParams

pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(0)
_rng = np.random.default_rng(5)
_points = _rng.normal(size=(14, 2)) @ [[1.0, 0.5], [0.0, 0.6]] + [1.0, -2.0]
_yes = (_rng.random((14, 2)) < 0.3).astype(np.int32)
_successes = _rng.binomial(7, [0.2, 0.6], (14, 2))
_values = np.stack([_rng.integers(0, 3, 14), _rng.integers(0, 2, 14)], axis=1)
_words = _rng.multinomial(6, [0.5, 0.3, 0.2], 14)
_counts = _rng.poisson([2.0, 5.0], (14, 2))
_waits = _rng.exponential([2.0, 0.5], (14, 2))
_features = _rng.normal(size=(14, 2))
_response = _features @ [1.0, -0.5] + 0.3 + 0.4 * _rng.normal(size=14)
M, KAPPA, NU = np.array([0.5, -1.0]), 0.7, 5.0
PSI = np.array([[1.2, 0.3], [0.3, 0.8]])
LINE, PRECISION, A, B = np.array([0.1, 0.4, -0.2]), np.diag([0.5, 1.0, 2.0]), 2.5, 0.7


def _wishart(x):
    """Bishop's and Murphy's (4.266): log p(x) under a normal-inverse-Wishart prior."""
    n, d = x.shape
    mean, kappa, nu = x.mean(axis=0), KAPPA + n, NU + n
    about = mean - M
    psi = PSI + (x - mean).T @ (x - mean) + KAPPA * n / kappa * np.outer(about, about)
    return (
        -0.5 * n * d * np.log(np.pi)
        + multigammaln(nu / 2, d)
        - multigammaln(NU / 2, d)
        + 0.5 * NU * np.linalg.slogdet(PSI)[1]
        - 0.5 * nu * np.linalg.slogdet(psi)[1]
        + 0.5 * d * np.log(KAPPA / kappa)
    )


def _inverse_gamma(x, shared):
    """The same with variances that are inverse-gamma, one a column or one for all."""
    n, d = x.shape
    kappa, mean = KAPPA + n, x.mean(axis=0)
    scale = ((x - mean) ** 2).sum(axis=0) + KAPPA * n / kappa * (mean - M) ** 2
    before = 1.1 if shared else np.diag(PSI)
    after = before + (scale.sum() if shared else scale)
    rows = n * d if shared else n
    variances = (
        gammaln((NU + rows) / 2) - gammaln(NU / 2) + 0.5 * NU * np.log(before) - 0.5 * (NU + rows) * np.log(after)
    )
    return -0.5 * n * d * np.log(np.pi) + 0.5 * d * np.log(KAPPA / kappa) + np.sum(variances)


def _dirichlet(counts, concentration):
    total = np.sum(concentration)
    each = gammaln(concentration + counts) - gammaln(concentration)
    return gammaln(total) - gammaln(total + counts.sum()) + each.sum()


def _gamma(events, exposure):
    each = gammaln(3.0 + events) - gammaln(3.0) + 3.0 * np.log(1.5) - (3.0 + events) * np.log(1.5 + exposure)
    return each.sum()


def _regression(x):
    features, y = x
    z = np.column_stack([np.ones(len(y)), features])
    covariance = np.eye(len(y)) + z @ np.linalg.inv(PRECISION) @ z.T
    return scipy.stats.multivariate_t.logpdf(y, z @ LINE, B / A * covariance, df=2 * A)


def _normal(covariance, scale):
    prior = NormalInverseWishart(mean=M, shrinkage=KAPPA, degrees_of_freedom=NU, scale=scale)
    return Normal(covariance, prior=prior)


def _binomial(x):
    ways = (gammaln(8) - gammaln(x + 1) - gammaln(8 - x)).sum()
    return ways + (betaln(2 + x.sum(axis=0), 3 + (7 - x).sum(axis=0)) - betaln(2, 3)).sum()


def _categorical(x):
    return sum(
        _dirichlet(np.bincount(column, minlength=size), np.full(size, 0.7))
        for column, size in zip(x.T, (3, 2), strict=True)
    )


def _multinomial(x):
    ways = gammaln(7) * len(x) - gammaln(x + 1).sum()
    return ways + _dirichlet(x.sum(axis=0), np.array([0.5, 1.0, 2.0]))


# name -> (family, data, log p(data), a function of the data)
CASES = {
    "full": (_normal("full", PSI), _points, _wishart),
    "diag": (_normal("diag", np.diag(PSI)), _points, lambda x: _inverse_gamma(x, False)),
    "spherical": (_normal("spherical", 1.1), _points, lambda x: _inverse_gamma(x, True)),
    "bernoulli": (
        Bernoulli(prior=Beta(2.0, 3.0)),
        _yes,
        lambda x: (betaln(2 + x.sum(axis=0), 3 + (1 - x).sum(axis=0)) - betaln(2, 3)).sum(),
    ),
    "binomial": (Binomial(7, prior=Beta(2.0, 3.0)), _successes, _binomial),
    "categorical": (Categorical((3, 2), prior=Dirichlet(0.7)), _values, _categorical),
    "multinomial": (Multinomial(prior=Dirichlet(np.array([0.5, 1.0, 2.0]))), _words, _multinomial),
    "poisson": (
        Poisson(prior=GammaPrior(3.0, 1.5)),
        _counts,
        lambda x: _gamma(x.sum(axis=0), len(x)) - gammaln(x + 1).sum(),
    ),
    "exponential": (Exponential(prior=GammaPrior(3.0, 1.5)), _waits, lambda x: _gamma(len(x), x.sum(axis=0))),
    "regression": (
        LinearRegression(prior=NormalInverseGamma(mean=LINE, precision=PRECISION, shape=A, rate=B)),
        (_features, _response),
        _regression,
    ),
    "product": (
        Product({"n": Poisson(prior=GammaPrior(3.0, 1.5)), "yes": Bernoulli(prior=Beta(2.0, 3.0))}),
        {"n": _counts, "yes": _yes},
        lambda x: CASES["poisson"][2](x["n"]) + CASES["bernoulli"][2](x["yes"]),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_bound_of_one_component_is_the_evidence(name):
    """The predictive density is what one more row adds to it; the mode is the M-step; and Bayes' rule holds."""
    family, x, evidence = CASES[name]
    x, last = (jax.tree.map(lambda leaf, part=part: leaf[part], x) for part in (slice(13), slice(13, None)))
    whole = CASES[name][1]
    model = VariationalMixture(family, 1)

    @jax.jit
    def at(x, last):
        start = model.parts["components"].pooled(x, None, 1)
        params = MixtureParams(weights=Dirichlet(jnp.ones(1)), components=start)
        stats = model.e_step(params, x)
        params = model.m_step(stats)
        bound = model.e_step(params, x).loglik + model.log_prior(params)
        q, seen = params.components, stats.components
        predictive = model.parts["components"].predictive(q, last)[0, 0]
        if name == "product":
            return bound, predictive, (0, 0), bound
        values = q.expected()
        at = values if isinstance(values, tuple) else (values,)
        support = (q.concentration > 0,) if isinstance(q, Dirichlet) else ()
        prior = family.conjugate_of().log_prob(*at, *support) - q.log_prob(*at, *support)
        mode = family.m_step(seen), family.given(q.mode())
        return bound, predictive, mode, prior + jnp.sum(family.log_prob(family.given(values), x))

    x_seen = evidence(x)
    bound, predictive, mode, by_rule = at(x, last)
    np.testing.assert_allclose(by_rule, x_seen, rtol=1e-10)
    for a, b in zip(*map(jax.tree.leaves, mode), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10)
    np.testing.assert_allclose(bound, x_seen, rtol=1e-10)
    np.testing.assert_allclose(predictive, evidence(whole) - evidence(x), rtol=1e-8)


def test_divergences_are_those_of_quadrature():
    """One-parameter cases, and two of two parameters."""

    def integral(p, q, low, high):
        def integrand(t):
            return np.exp(p.logpdf(t)) * (p.logpdf(t) - q.logpdf(t))

        return scipy.integrate.quad(integrand, low, high, limit=400)[0]

    p, q = scipy.stats.beta(2.5, 0.8), scipy.stats.beta(1.2, 3.0)
    expected = [integral(p, q, 0, 1)]
    p, q = scipy.stats.gamma(3.2, scale=1 / 1.7), scipy.stats.gamma(0.9, scale=1 / 0.4)
    expected += [integral(p, q, 0, 40)]
    # In one column the full covariance is the diagonal one and the spherical one.
    one = dict(mean=np.array([[0.3]]), shrinkage=np.array([2.0]), degrees_of_freedom=np.array([5.0]))
    other = dict(mean=np.array([-0.5]), shrinkage=0.4, degrees_of_freedom=3.0)

    def density(m, k, nu, s):
        return lambda u, v: (
            scipy.stats.norm.logpdf(u, m, np.sqrt(v / k)) + scipy.stats.invgamma.logpdf(v, nu / 2, scale=s / 2)
        )

    p, q = density(0.3, 2.0, 5.0, 1.5), density(-0.5, 0.4, 3.0, 0.7)
    v, weights = np.polynomial.legendre.leggauss(400)
    v, vw = np.exp(7 * v), 7 * weights * np.exp(7 * v)
    u, uw = np.polynomial.hermite_e.hermegauss(40)
    at = 0.3 + u[:, None] * np.sqrt(v / 2.0)
    mass = (uw / np.sqrt(2 * np.pi))[:, None] * vw * np.exp(scipy.stats.invgamma.logpdf(v, 2.5, scale=0.75))
    expected += 2 * [np.sum(mass * (p(at, v) - q(at, v)))]
    ball = {**one, "shrinkage": np.array([[2.0]])}
    pairs = [
        (Beta(2.5, 0.8), Beta(1.2, 3.0)),
        (GammaPrior(3.2, 1.7), GammaPrior(0.9, 0.4)),
        (
            NormalInverseWishart(**one, scale=np.full((1, 1, 1), 1.5)),
            NormalInverseWishart(**other, scale=0.7 * np.eye(1)),
        ),
        (NormalInverseWishart(**ball, scale=np.full(1, 1.5)), NormalInverseWishart(**other, scale=0.7)),
    ]
    found = jax.jit(lambda pairs: [one.kl(other) for one, other in pairs])(pairs)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def _each(covariance, count, columns):
    """How many of our degrees of freedom scikit-learn counts as one, and likewise of scales: of a spherical covariance
    it counts rows, which are D numbers each; of a tied one it takes a K-th of all rows and one prior, where in ours
    all rows meet one prior. The expected precisions are the same, where the prior's are."""
    return {"spherical": columns, "tied": count}.get(covariance, 1)


def _sklearn(covariance, x, count):
    """scikit-learn's variational mixture after one step, of the prior that `_prior` is."""
    columns = x.shape[1]
    scale = {"diag": np.ones(columns), "spherical": 1.0}.get(covariance, np.eye(columns))
    model = BayesianGaussianMixture(
        n_components=count,
        covariance_type=covariance,
        weight_concentration_prior_type="dirichlet_distribution",
        weight_concentration_prior=0.3,
        mean_prior=x.mean(axis=0) + 0.5,
        mean_precision_prior=0.2,
        degrees_of_freedom_prior=columns + 2.0,
        covariance_prior=scale,
        reg_covar=0.0,
        tol=0.0,
        max_iter=1,
        warm_start=True,
        init_params="random",
        random_state=1,
    )
    each = _each(covariance, count, columns)
    prior = NormalInverseWishart(
        mean=x.mean(axis=0) + 0.5,
        shrinkage=0.2,
        degrees_of_freedom=each * (columns + 2.0),
        scale=jnp.asarray(each * scale),
    )
    ours = VariationalMixture(Normal(covariance, prior=prior), count, 0.3)
    return _step(model, x), ours


def _step(model, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(x)


def _params_of(theirs, covariance):
    """Its state as ours."""
    count, columns = theirs.means_.shape
    each, degrees = _each(covariance, count, columns), np.atleast_1d(theirs.degrees_of_freedom_)
    scale = theirs.covariances_[None] if covariance == "tied" else theirs.covariances_
    scale = each * degrees.reshape(-1, *(1,) * (scale.ndim - 1)) * scale
    by_column = covariance in ("diag", "spherical")
    shrinkage, wide = theirs.mean_precision_, (count, columns)
    return MixtureParams(
        weights=Dirichlet(jnp.asarray(theirs.weight_concentration_)),
        components=NormalInverseWishart(
            mean=jnp.asarray(theirs.means_),
            shrinkage=jnp.asarray(np.broadcast_to(shrinkage[:, None], wide) if by_column else shrinkage),
            degrees_of_freedom=jnp.asarray(
                np.broadcast_to(degrees[:, None], wide) if covariance == "diag" else each * degrees
            ),
            scale=jnp.asarray(scale),
        ),
    )


@pytest.mark.parametrize(("covariance", "columns"), [("full", 2), ("tied", 2), ("diag", 1), ("spherical", 1)])
def test_scikit_learns_iterates(covariance, columns):
    """For several columns scikit-learn takes the log-determinant of full covariances for all others too, that of a tied
    one being the same for all components; see the next test."""
    x = datasets.faithful()[:, :columns] if columns == 2 else datasets.faithful()[:, 1:] / 10
    x = np.asarray(x, float)
    theirs, ours = _sklearn(covariance, x, 3)
    params = _params_of(theirs, covariance)
    step = jax.jit(lambda params: ours.m_step(ours.e_step(params, x)))
    for _ in range(12):
        params, expected = step(params), _params_of(_step(theirs, x), covariance)
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-7)
    np.testing.assert_allclose(ours.expected(params).weights, theirs.weights_, rtol=1e-8)
    covariances = ours.parts["components"].family.plugged(params.components).covariance
    precision = 1 / covariances if covariance in ("diag", "spherical") else np.linalg.inv(covariances)
    np.testing.assert_allclose(precision, theirs.precisions_, rtol=1e-7)


@pytest.mark.parametrize("covariance", ["diag", "spherical"])
def test_scikit_learns_steps_in_several_columns(covariance):
    """M-step by M-step from the same responsibilities, and E-step by E-step up to a term in closed form.

    Whatever the shape of the covariances, scikit-learn's E-step has the log-determinant of a full one under a Wishart
    distribution, the sum over columns of digamma((nu - d) / 2), d < D, which no other distribution of a diagonal or
    spherical one has: precisions that are gamma variables each have digamma(nu / 2). So its E-steps and M-steps do not
    belong to one bound in several columns, and iterates differ by what this term does to responsibilities. With it
    added to our densities responsibilities agree; and from these all parameters.
    """
    x = np.asarray(datasets.faithful(), float) / [1.0, 10.0]
    theirs, ours = _sklearn(covariance, x, 3)
    both = jax.jit(lambda params, q: (ours.log_joint(params, x), ours.m_step(ours.stats(params, x, q))))
    for _ in range(6):
        params, q, nu = _params_of(theirs, covariance), theirs.predict_proba(x), theirs.degrees_of_freedom_
        joint, found = both(params, q)
        own = nu if covariance == "diag" else 2 * nu
        extra = digamma(0.5 * (nu[:, None] - np.arange(2))) - digamma(0.5 * own)[:, None] + np.log(own / nu)[:, None]
        shares = scipy.special.softmax(joint + 0.5 * extra.sum(axis=1, keepdims=True), axis=0)
        np.testing.assert_allclose(shares.T, q, atol=1e-12)
        expected = _params_of(_step(theirs, x), covariance)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-8)


def test_a_tied_covariance_has_one_distribution():
    """Where all labels are known the bound is the evidence, in closed form; and so is the predictive density."""
    labels = np.arange(14) % 3 // 2

    def evidence(rows, labels, covariance):
        n, degrees, scale, logs = len(rows), NU, PSI.copy(), 0.0
        for k in range(2):
            of, count = rows[labels == k], np.sum(labels == k)
            about, mean = of - of.mean(axis=0), of.mean(axis=0) - M
            scale = scale + about.T @ about + KAPPA * count / (KAPPA + count) * np.outer(mean, mean)
            logs += np.log(KAPPA / (KAPPA + count))  # of two columns, half of each
        if covariance == "tied":
            sizes = multigammaln((degrees + n) / 2, 2) - multigammaln(degrees / 2, 2)
            sizes += 0.5 * degrees * np.linalg.slogdet(PSI)[1] - 0.5 * (degrees + n) * np.linalg.slogdet(scale)[1]
        else:
            rows, before, after = n, np.diag(PSI), np.diag(scale)
            if covariance == "tied_spherical":
                rows, before, after = 2 * n, 1.1, 1.1 + np.sum(after - before)
            sizes = gammaln((degrees + rows) / 2) - gammaln(degrees / 2) + 0.5 * degrees * np.log(before)
            sizes = np.sum(sizes - 0.5 * (degrees + rows) * np.log(after))
        return sizes + logs - n * np.log(np.pi)

    scales = {"tied": PSI, "tied_diag": np.diag(PSI), "tied_spherical": 1.1}
    rows, given = _points[:13], Labelled(_points[:13], labels[:13])

    @jax.jit
    def at(given):
        found = {}
        for covariance, scale in scales.items():
            model = VariationalMixture(_normal(covariance, scale), 2, 0.6)
            components = model.parts["components"].pooled(given.x, None, 2)
            params = MixtureParams(weights=Dirichlet(jnp.ones(2)), components=components)
            params = model.m_step(model.e_step(params, given))
            bound = model.e_step(params, given).loglik + model.log_prior(params)
            predictive = model.parts["components"].predictive(params.components, _points[13:])[labels[13], 0]
            found[covariance] = bound, predictive
            if covariance == "tied":
                part = model.parts["components"]
                draws = jax.vmap(part.sample_parameters, (0, None))(jax.random.split(KEY, 4000), params.components)
                moments = draws, part.expected(params.components)
        return found, moments

    counts = np.bincount(labels[:13])
    found, (draws, mean) = at(given)
    for covariance, (bound, predictive) in found.items():
        seen = evidence(rows, labels[:13], covariance)
        np.testing.assert_allclose(bound, seen + _dirichlet(counts, np.full(2, 0.6)), rtol=1e-10)
        np.testing.assert_allclose(predictive, evidence(_points, labels, covariance) - seen, rtol=1e-8)
    np.testing.assert_allclose(draws.mean.mean(axis=0), mean.mean, atol=0.03)
    np.testing.assert_allclose(draws.covariance.mean(axis=0), mean.covariance, rtol=0.05, atol=0.02)


def test_surplus_components_empty_themselves():
    """Bishop (2006), figure 10.6: Old Faithful, six components, concentration 1e-3; in float32, by restarts."""
    with jax.enable_x64(False):
        x = datasets.faithful()
        x = (x - x.mean(axis=0)) / x.std(axis=0)
        prior = NormalInverseWishart(mean=jnp.zeros(2), shrinkage=1.0, degrees_of_freedom=2.0, scale=jnp.eye(2))
        model = VariationalMixture(Normal(prior=prior), 6, 1e-3)
        runs = fit_restarts(model, KEY, x, num_restarts=8, certify=False)
        weights = np.sort(np.asarray(model.expected(runs.best.params).weights))
        assert runs.best.status == Status.CONVERGED
        assert runs.objective.dtype == jnp.float32
        np.testing.assert_allclose(weights[:4], 0, atol=1e-4)
        np.testing.assert_allclose(weights[4:], [0.36, 0.64], atol=0.01)
        plain = Mixture(model.family, model.num_components).log_prob(model.expected(runs.best.params), x)
        np.testing.assert_allclose(
            jnp.sum(plain) / 272, jnp.sum(model.predictive(runs.best.params, x)) / 272, atol=0.02
        )


def test_weights_that_are_values_empty_surplus_components():
    """Corduneanu & Bishop (2001): weights that maximise the bound, beside components under distributions."""
    rng = np.random.default_rng(6)
    x = rng.poisson(np.array([[1.0, 8.0], [9.0, 2.0]])[np.arange(60) % 2])
    model = Mixture(Variational(Poisson(prior=GammaPrior(1.0, 0.1))), 3)
    wide = GammaPrior(np.full((3, 2), 20.0), np.array([[9.0, 4.0], [3.0, 5.0], [6.0, 6.0]]))
    start = MixtureParams(weights=np.full(3, 1 / 3), components=wide)
    fit = em_fit(model, start, x, tol=1e-10)
    assert fit.converged
    assert np.all(np.diff(fit.history[: fit.num_steps + 1]) > -1e-9)
    np.testing.assert_allclose(np.sort(fit.params.weights), [0, 0.5, 0.5], atol=0.01)
    # A component without rows goes back to its prior, and costs nothing: the bound is that of two components.
    two = np.argsort(fit.params.weights)[1:]
    kept = MixtureParams(
        weights=fit.params.weights[two], components=jax.tree.map(lambda a: a[two], fit.params.components)
    )
    smaller = Mixture(model.family, 2)
    bound = jax.jit(lambda params: smaller.e_step(params, x).loglik + smaller.log_prior(params))(kept)
    np.testing.assert_allclose(bound, fit.objective, atol=1e-2)


def test_much_data_and_flat_priors_lead_to_em():
    """Every row counts a million times: q is as narrow as one value."""
    x = np.concatenate([_points, _points[:, ::-1] + 4.0])
    prior = NormalInverseWishart(mean=M, shrinkage=1e-3, degrees_of_freedom=2.0, scale=1e-3 * np.eye(2))
    variational, plain = VariationalMixture(Normal(prior=prior), 2, 1.0), Mixture(Normal(), 2)
    weights = jnp.full(28, 1e6)
    mean, covariance = (
        np.stack([x[:14].mean(axis=0), x[14:].mean(axis=0)]),
        np.stack([np.cov(x[:14].T), np.cov(x[14:].T)]),
    )
    rows = np.full(2, 14e6)
    narrow = NormalInverseWishart(
        mean=mean, shrinkage=rows, degrees_of_freedom=rows, scale=rows[:, None, None] * covariance
    )
    starts = [
        MixtureParams(weights=Dirichlet(rows), components=narrow),
        MixtureParams(weights=np.full(2, 0.5), components=NormalParams(mean=mean, covariance=covariance)),
    ]
    fits = [
        em_fit(model, start, x, weights, tol=1e-12) for model, start in zip((variational, plain), starts, strict=True)
    ]
    found = variational.expected(fits[0].params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(fits[1].params), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5)
    # What is lost to the maximum is Occam's factor, (log N) / 2 a parameter, as BIC has it.
    more = em_fit(variational, fits[0].params, x, 100 * weights, tol=1e-12)
    lost = (100 * fits[1].loglik - more.objective) - (fits[1].loglik - fits[0].objective)
    np.testing.assert_allclose(lost, 11 / 2 * np.log(100), rtol=1e-3)


def test_two_sticks_are_a_dirichlet():
    family = Poisson(prior=GammaPrior(3.0, 1.5))
    sticks = VariationalMixture(family, 2, 0.6, process=True)
    other = VariationalMixture(family, 2, jnp.array([1.0, 0.6]))
    wide = GammaPrior(np.full((2, 2), 20.0), np.array([[9.0, 4.0], [6.0, 5.0]]))
    params = MixtureParams(weights=Beta(np.full(1, 8.0), np.full(1, 7.6)), components=wide)
    fits = [
        em_fit(sticks, params, _counts, tol=1e-10),
        em_fit(
            other,
            MixtureParams(
                weights=Dirichlet(jnp.stack([params.weights.a[0], params.weights.b[0]])), components=params.components
            ),
            _counts,
            tol=1e-10,
        ),
    ]
    np.testing.assert_allclose(fits[0].objective, fits[1].objective, rtol=1e-12)
    # Below the evidence, which is the sum over all labels, by no more than the labels' two orders and their doubt.
    labels = (np.arange(2**14)[:, None] >> np.arange(14)) & 1
    rows = np.stack([14 - labels.sum(axis=1), labels.sum(axis=1)])
    events = np.stack([(1 - labels) @ _counts, labels @ _counts])
    each = gammaln(3.0 + events) - gammaln(3.0) + 3.0 * np.log(1.5)
    each = each.sum(axis=2) - ((3.0 + events) * np.log(1.5 + rows)[..., None]).sum(axis=2)
    sizes = gammaln(np.array([[1.0], [0.6]]) + rows) - gammaln(np.array([[1.0], [0.6]]))
    total = (each + sizes).sum(axis=0) + gammaln(1.6) - gammaln(15.6) - gammaln(_counts + 1).sum()
    assert 0 < scipy.special.logsumexp(total) - fits[0].objective < 2.0
    np.testing.assert_allclose(
        sticks.expected(fits[0].params).weights, other.expected(fits[1].params).weights, rtol=1e-6
    )


def test_stochastic_variational_inference():
    """Hoffman et al. (2013): natural-gradient steps on batches are running averages of statistics."""
    rng = np.random.default_rng(0)
    x = rng.poisson(np.array([[1.0, 8.0], [6.0, 2.0]])[rng.integers(0, 2, 2000)])
    model = VariationalMixture(Poisson(prior=GammaPrior(1.0, 0.1)), 2, 1.0)
    wide = GammaPrior(np.full((2, 2), 20.0), np.array([[9.0, 4.0], [6.0, 5.0]]))
    start = MixtureParams(weights=Dirichlet(np.full(2, 10.0)), components=wide)
    batch = em_fit(model, start, x, tol=1e-9)
    online = em_fit(model, start, x, key=KEY, algorithm=stepwise_em(100), max_steps=100)
    assert online.num_passes < 8
    assert 0 <= batch.objective - online.objective < 1e-3 * 2000


def test_hyperparameters_below_0_are_refused():
    model = VariationalMixture(Poisson(prior=GammaPrior(3.0, 1.5)), 2)
    components = GammaPrior(np.full((2, 2), 2.0), np.array([[1.0, 1.0], [-1.0, 1.0]]))
    with pytest.raises(ValueError, match=r"params.components.rate must be at least 0; got -1 at index \(1, 0\)"):
        em_fit(model, MixtureParams(weights=Dirichlet(np.ones(2)), components=components), _counts)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: Variational(StudentT()), TypeError, "StudentT has no conjugate prior"),
        (lambda: Variational(Normal()), ValueError, "Normal needs a prior here, .*default_prior"),
        (lambda: Variational(Poisson()), ValueError, "Poisson needs a prior here"),
        (lambda: Variational(Tied(Bernoulli(), "probability")), TypeError, "leave it out"),
        (lambda: Variational(Product({"t": StudentT()})), TypeError, "StudentT, of 't', has no conjugate prior"),
        (lambda: VariationalMixture(Bernoulli(), 2, 0.0), ValueError, "concentration must be above 0"),
        (lambda: Variational(LinearRegression()), ValueError, "NormalInverseGamma"),
        (
            lambda: Fixed(HMM(Variational(Bernoulli()), 2), {"transition": np.full((2, 2), 0.5)}),
            TypeError,
            "transition has a distribution here: hold it at a Dirichlet",
        ),
    ],
)
def test_what_cannot_be_variational_says_so(make, error, says):
    with pytest.raises(error, match=says):
        make()


@pytest.mark.parametrize(
    ("concentration", "mode"),
    [
        ([3.0, 2.0, 1.0], [2 / 3, 1 / 3, 0]),
        ([3.0, 0.5, 0.2], [1, 0, 0]),
        ([1.0, 1.0, 1.0], [1 / 3, 1 / 3, 1 / 3]),  # flat: every point is one
        ([0.5, 0.0, 0.7], [1 / 2, 0, 1 / 2]),
    ],
)
def test_modes_of_probabilities_are_probabilities(concentration, mode):
    np.testing.assert_allclose(Dirichlet(jnp.array(concentration)).mode(), mode, rtol=1e-6)
    pair = jnp.array(concentration)[:2]
    np.testing.assert_allclose(Beta(*pair).mode(), Dirichlet(pair).mode()[0], rtol=1e-6)
