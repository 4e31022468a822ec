"""The EM step: expect, gather, maximize."""

from ..latents import Exact as Exact
from ..latents import Hard as Hard
from .gather import Blocks as Blocks
from .gather import Full as Full
from .maximize import ClosedForm as ClosedForm
from .step import EM as EM
from .step import EMState as EMState
from .variants import hard_em as hard_em
