"""jaxem: Expectation-Maximisation in JAX, compiled and purely functional."""

from . import datasets as datasets
from . import testing as testing
from .diagnostics import aic as aic
from .diagnostics import bic as bic
from .diagnostics import icl as icl
from .em import EM as EM
from .em import Blocks as Blocks
from .em import ClosedForm as ClosedForm
from .em import Exact as Exact
from .em import Full as Full
from .em import Hard as Hard
from .em import hard_em as hard_em
from .families import Normal as Normal
from .families import NormalInverseWishart as NormalInverseWishart
from .families import NormalParams as NormalParams
from .families import default_prior as default_prior
from .fit import Result as Result
from .fit import em_fit as em_fit
from .models import Dirichlet as Dirichlet
from .models import Mixture as Mixture
from .models import MixtureParams as MixtureParams
from .models import from_functions as from_functions
from .models import params_from_responsibilities as params_from_responsibilities
from .restarts import Restarts as Restarts
from .restarts import Screen as Screen
from .restarts import fit_restarts as fit_restarts
from .status import EMError as EMError
from .status import Status as Status

__version__ = "0.1.0"
