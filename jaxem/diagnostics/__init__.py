"""After the fit: criteria for choosing between models, the bound that EM climbs, divergences, how sure the parameters
are, and what derivatives rest on."""

from .bootstrap import Bootstrap as Bootstrap
from .bootstrap import bootstrap as bootstrap
from .criteria import aic as aic
from .criteria import bic as bic
from .criteria import icl as icl
from .divergence import kl as kl
from .free_energy import FreeEnergy as FreeEnergy
from .free_energy import free_energy as free_energy
from .information import ErrorFlag as ErrorFlag
from .information import error_flags as error_flags
from .information import information as information
from .information import standard_errors as standard_errors
from .rate import MissingInformation as MissingInformation
from .rate import convergence_rate as convergence_rate
from .rate import missing_information as missing_information
from .sensitivity import Sensitivity as Sensitivity
from .sensitivity import sensitivity as sensitivity
