"""Markov chains of discrete states: the posterior of the states given the observations.

Arrays are time-major, states before lanes: (T, K, L) for L sequences side by side, or (T, K) for one. One
sequence without the axis L compiles to a far tighter loop. `Posterior` and `ChainPosterior` have the layout of the
data instead, sequences first and states last.

Two arithmetics. Scaled probabilities: a step is one matrix product, but a state whose probability underflows is lost,
which matters only where no transition leads back to it. Logarithms: nothing is lost, at K² exponentials a step.
"""

from .chain import Chain as Chain
from .infer import FORMS as FORMS
from .infer import infer as infer
from .posterior import ChainPosterior as ChainPosterior
from .posterior import Distribution as Distribution
from .posterior import Posterior as Posterior
from .posterior import expected_counts as expected_counts
from .stationary import StationaryTransitions as StationaryTransitions
from .stationary import stationary_distribution as stationary_distribution
