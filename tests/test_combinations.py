"""Which variant of EM works with which kind of model: the README's table, made from what happened.

Every fit is traced, which is where a combination is refused; one in four is run to its end.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxem import (
    EM,
    HMM,
    Bernoulli,
    Expanded,
    Fixed,
    GammaPrior,
    KMeans,
    LinearGaussianSSM,
    Mixture,
    Poisson,
    Product,
    Sample,
    Stepwise,
    VarianceReduced,
    anderson,
    annealed_em,
    averaged,
    ecm,
    em_fit,
    from_functions,
    generalized_em,
    gibbs,
    hard_em,
    incremental_em,
    monte_carlo_em,
    squarem,
    stepwise_em,
)

pytestmark = pytest.mark.usefixtures("x64")

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- combinations: made by tests/test_combinations.py -->\n", "<!-- end of combinations -->"

VARIANTS = {
    "`EM()`": EM(),
    "`hard_em()`": hard_em(),
    "`stochastic_em()`, `monte_carlo_em(n)`": monte_carlo_em(3),
    "`gibbs()`, where priors are conjugate": gibbs(),
    "`stepwise_em(batch_size)`": stepwise_em(10),
    "`averaged(...)`": averaged(EM(gather=Stepwise(10))),
    "SAEM: `EM(expect=Sample(), gather=Stepwise())`": EM(expect=Sample(), gather=Stepwise()),
    "`incremental_em(num_blocks)`": incremental_em(4),
    "`EM(gather=VarianceReduced(batch_size))`": EM(gather=VarianceReduced(10)),
    "`generalized_em(optimizer)`": generalized_em(num_steps=2),
    "`ecm()`": ecm(),
    "`annealed_em(schedule)`": annealed_em((2.0, 1.5)),
    "`squarem(EM())`": squarem(EM()),
    "`anderson(EM())`": anderson(EM()),
    "`EM(maximize=Expanded())`": EM(maximize=Expanded()),
}


def _coins():
    def e_step(theta, heads, weights=None):
        log_joint = heads[:, None] * jnp.log(theta)[None] + (10 - heads[:, None]) * jnp.log1p(-theta)[None]
        evidence = jax.scipy.special.logsumexp(log_joint, axis=1)
        weights = jnp.ones_like(evidence) if weights is None else weights
        coin = weights[:, None] * jnp.exp(log_joint - evidence[:, None])
        return (coin.T @ heads, coin.T @ (10 - heads)), weights @ evidence

    return from_functions(
        e_step,
        lambda stats: stats[0] / (stats[0] + stats[1]),
        q_function=lambda theta, stats: stats[0] @ jnp.log(theta) + stats[1] @ jnp.log1p(-theta),
        init=lambda key, x, weights=None: jax.random.uniform(key, (2,), minval=0.2, maxval=0.8),
        unconstrain=jax.scipy.special.logit,
        constrain=jax.nn.sigmoid,
    )


def _models():
    rng = np.random.default_rng(0)
    counts = rng.poisson(np.where(rng.random(40) < 0.5, 2.0, 6.0)).astype(float)
    yes = (rng.random((40, 2)) < 0.4).astype(np.int32)
    yes[3, 1] = -1
    return {
        "mixtures": (Mixture(Poisson(prior=GammaPrior(2.0, 0.5)), 2), counts),
        "with `Product`, `Fixed`, missing entries": (
            Fixed(
                Mixture(Product({"n": Poisson(prior=GammaPrior(2.0, 0.5)), "yes": Bernoulli()}), 2),
                {"weights": jnp.array([0.5, 0.5])},
            ),
            {"n": counts, "yes": yes},
        ),
        "`KMeans`": (KMeans(2), counts),
        "`HMM`": (HMM(Poisson(prior=GammaPrior(2.0, 0.5)), 2), counts.reshape(20, 2, 1)),
        "`LinearGaussianSSM`": (LinearGaussianSSM(1, missing=False), rng.normal(size=(20, 4, 2)).cumsum(axis=1)),
        "`from_functions`": (_coins(), rng.integers(0, 11, 40).astype(float)),
    }


def _outcome(model, x, algorithm, to_the_end):
    """ "yes" if two fits side by side, jitted, go well, "-" if they are refused, which is while they are traced."""
    starts = jax.vmap(lambda key: model.init(key, x))(jax.random.split(jax.random.key(0), 2))
    fit = jax.jit(
        jax.vmap(lambda start: em_fit(model, start, x, key=jax.random.key(1), algorithm=algorithm, max_steps=6))
    )
    try:
        traced = fit.trace(starts)
    except (TypeError, ValueError):  # what is said then, test_variants.py looks at
        return "–"
    if not to_the_end:
        return "yes"
    fits = traced.lower().compile()(starts)
    history = np.asarray(fits.history)
    ends = history[np.arange(2), np.asarray(fits.num_steps)]
    np.testing.assert_array_equal(ends, fits.objective)
    assert np.all(np.isfinite(ends))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(fits.params))
    if algorithm.nature(model).monotone:
        assert not np.any(np.diff(history, axis=1) < -1e-9 * abs(ends[:, None]))
    assert np.all(np.asarray(fits.status) <= 1)
    return "yes"


def test_the_table_of_combinations_is_what_happens():
    models = _models()
    lines = [f"| | {' | '.join(models)} |", "|---" * (1 + len(models)) + "|"]
    for row, (name, algorithm) in enumerate(VARIANTS.items()):
        # Compilation is most of their time. So each variant is run on one or two models, each model by three or four.
        found = [
            _outcome(model, x, algorithm, (row + column) % 4 == 0) for column, (model, x) in enumerate(models.values())
        ]
        lines.append(f"| {name} | {' | '.join(found)} |")
    table = "\n".join(lines) + "\n"
    text = README.read_text()
    assert BEGIN in text, f"the README has no place for the table:\n{table}"
    assert text.split(BEGIN)[1].split(END)[0] == table, f"the README's table is not what happens:\n{table}"
