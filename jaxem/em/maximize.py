"""How parameters are made from expected statistics."""

from typing import Any

from ..protocols import Params, Stats
from ..record import record


@record
class ClosedForm:
    """The model's own M-step."""

    def init(self, model: Any, params: Params) -> None:
        return None

    def step(self, model: Any, params: Params, stats: Stats, state: None) -> tuple[Params, None]:
        return model.m_step(stats), None
