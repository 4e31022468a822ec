"""What algorithms and their slots say of themselves."""

import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Nature:
    """What an algorithm is, or one of its slots.

    stochastic: steps are random to the end, so that no fit settles by itself.
    monotone: exact arithmetic would never lower the objective.
    complete: a state's statistics are those of all rows at its parameters.
    inexact: M-steps stop short of their maximum, some more than others, so that gains are irregular.
    by_row: it looks at single rows, in whose place moments of them cannot stand.
    """

    stochastic: bool = False
    monotone: bool = True
    complete: bool = True
    inexact: bool = False
    by_row: bool = False

    @staticmethod
    def of(natures: "Iterable[Nature]") -> "Nature":
        """The nature of an algorithm with these slots; where one is random, the objective may fall."""
        natures = tuple(natures)
        stochastic = any(each.stochastic for each in natures)
        return Nature(
            stochastic=stochastic,
            monotone=not stochastic and all(each.monotone for each in natures),
            complete=all(each.complete for each in natures),
            inexact=any(each.inexact for each in natures),
            by_row=any(each.by_row for each in natures),
        )
