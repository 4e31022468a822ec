"""Parts of a model's parameters, each with its M-step, Q, prior and coordinates; and models assembled of them."""

from .gates import GateParams as GateParams
from .gates import SoftmaxGate as SoftmaxGate
from .gates import TableGate as TableGate
from .gates import TwoLevelGate as TwoLevelGate
from .gates import TwoLevelParams as TwoLevelParams
from .probabilities import Probabilities as Probabilities
from .statements import Fixed as Fixed
from .statements import Tied as Tied
from .sticks import Sticks as Sticks
from .variational import Variational as Variational
