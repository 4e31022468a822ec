"""Data and parameters in the form that diagnostics take."""

from typing import Any

import jax

from .. import checks, parameters, tree
from ..arguments import data_of
from ..capabilities import fitted_model, informed
from ..protocols import AnyModel, Data, Params, Problem


def posed(
    model: AnyModel, params: Params, x: Data, weights: jax.Array | None, *, by_unit: bool = False
) -> tuple[Problem, Any]:
    """Checked: the problem, and parameters in the data's precision.

    by_unit: whether every unit is asked for; else fewer with the same likelihood may stand in their place.
    Raises ValueError or TypeError by name.
    """
    model = fitted_model(model)
    x, weights = tree.present(*data_of(model, x, weights, sees_all=not by_unit))
    model = informed(model, x)
    parameters.check("params", model, params, x)
    params = tree.in_precision(checks.native(params), tree.float_dtype(x))
    return Problem(model=model, x=x, weights=weights), params
