"""Linear-Gaussian chains of latent states: filter, smoother, posterior, and draws of it.

From the ground up: `elements` (one step), `parallel`, `filtering` and `smoothing` (recursions over steps), `affine` and
`shared` (one recursion of covariances for all sequences), `whitening` (what is observed), `system` (a system and its
observations), `noise` and `posterior` (what statistics need), `forecasting` (the system without observations). And of
latents that are no chain: `normals`, `factors`, `weights`.
"""

from .forecasting import Forecast as Forecast
from .forecasting import SteadyState as SteadyState
from .forecasting import forecast as forecast
from .forecasting import last_moments as last_moments
from .forecasting import sample as sample
from .forecasting import steady_state as steady_state
from .posterior import DrawnPaths as DrawnPaths
from .posterior import Posterior as Posterior
from .posterior import infer as infer
from .system import StateMoments as StateMoments
from .system import System as System
from .system import by_sequence as by_sequence
from .system import filtered_moments as filtered_moments
from .system import log_prob as log_prob
from .system import seen_entries as seen_entries
from .system import smoothed_moments as smoothed_moments
