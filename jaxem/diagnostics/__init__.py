"""After the fit: criteria for choosing between models, the bound that EM climbs, and divergences."""

from .criteria import aic as aic
from .criteria import bic as bic
from .criteria import icl as icl
from .divergence import kl as kl
from .free_energy import FreeEnergy as FreeEnergy
from .free_energy import free_energy as free_energy
