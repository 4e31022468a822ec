"""Models: latent structure x observation family."""

from .functions import from_functions as from_functions
from .mixture import Dirichlet as Dirichlet
from .mixture import Mixture as Mixture
from .mixture import MixtureParams as MixtureParams
from .mixture import MixtureStats as MixtureStats
from .mixture import params_from_responsibilities as params_from_responsibilities
