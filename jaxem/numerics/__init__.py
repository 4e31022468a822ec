"""Numerical tools that know nothing of models: elementary operations, and factorisations of small matrices."""

from .elementary import (
    first_argmax,
    first_largest,
    normalize,
    product,
    real_to_simplex,
    repaired,
    safe_divide,
    safe_log,
    simplex_to_real,
    to_rank,
    weighted_sum,
)
from .factorisations import (
    cholesky,
    covariance_to_real,
    damped_least_squares,
    floored_cholesky,
    inverse_lower,
    real_to_covariance,
    solve,
)
from .krylov import gmres, gmres_in_range

__all__ = [
    "cholesky",
    "covariance_to_real",
    "damped_least_squares",
    "first_argmax",
    "first_largest",
    "floored_cholesky",
    "gmres",
    "gmres_in_range",
    "inverse_lower",
    "normalize",
    "product",
    "real_to_covariance",
    "real_to_simplex",
    "repaired",
    "safe_divide",
    "safe_log",
    "simplex_to_real",
    "solve",
    "to_rank",
    "weighted_sum",
]
