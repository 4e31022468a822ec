"""After the fit: criteria for choosing between models, the bound that was climbed, what derivatives rest on."""

from .criteria import aic as aic
from .criteria import bic as bic
from .criteria import icl as icl
from .free_energy import FreeEnergy as FreeEnergy
from .free_energy import free_energy as free_energy
from .sensitivity import Sensitivity as Sensitivity
from .sensitivity import sensitivity as sensitivity
