"""Parts of a model's parameters, each with its M-step, Q, prior and coordinates; and models assembled of them."""

from .probabilities import Probabilities as Probabilities
from .statements import Fixed as Fixed
from .statements import Tied as Tied
from .sticks import Sticks as Sticks
from .variational import Variational as Variational
