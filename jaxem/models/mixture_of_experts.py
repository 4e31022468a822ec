"""Mixtures of experts: regressions, each for a region of the features that a gate has learned."""

from .. import capabilities
from ..parts.gates import SoftmaxGate
from ..protocols import Family, Gate
from .mixture import Mixture


def MixtureOfExperts(expert: Family, num_components: int, *, gate: Gate = SoftmaxGate()) -> Mixture:
    """p(y | features) = sum_k p(k | features) p(y | features, expert k): `Mixture(expert, num_components, gate=gate)`.

    expert: a regression family, as LinearRegression(), LogisticRegression() or PoissonRegression().
    num_components: K.
    gate: by default a softmax; `TwoLevelGate(num_groups=G)` makes the hierarchical mixture of experts.

    Data: pairs (features (N, P) or (N,), response (N,)), the gate looking at the features of the experts, or
    `Gated((features, response), gate_features)`, which gives it its own. Params: `.weights`, the gate's, with
    `.coefficients` (K, P) and `.intercept` (K,), those of the last component 0; `.components`, the experts'.
    `log_prob(params, (features, response))` is the predictive density; `mean(params, features)`,
    `gate_probabilities(params, features)` and `sample(key, params, n, features=features)` ask of features alone.
    Source: Jacobs, Jordan, Nowlan & Hinton (1991), Adaptive mixtures of local experts, Neural Computation 3; Jordan &
    Jacobs (1994), Hierarchical mixtures of experts and the EM algorithm, Neural Computation 6.
    Raises TypeError or ValueError as `Mixture` does, and TypeError for a family that is no regression.
    """
    model = Mixture(expert, num_components, gate=gate)
    if not capabilities.states(expert, "mean"):
        raise TypeError(f"expert must be a regression family, as LinearRegression(); got {expert!r}")
    return model
