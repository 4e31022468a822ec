"""Numerical tools that know nothing of models: elementary operations, factorisations of small matrices, normal
equations, Krylov spaces, leading eigenvalues, and the truncated normal distribution."""

from .elementary import (
    divergence,
    first_argmax,
    first_largest,
    in_any_lane,
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
    singular_values,
    solve,
)
from .krylov import Krylov, explored, gmres, gmres_in_range, krylov_space, solved
from .normal_equations import least_squares, least_squares_together
from .spectrum import leading_direction, leading_eigenvalues, power_of, scattered, series, symmetric_eigen
from .truncated import truncated_normal

__all__ = [
    "Krylov",
    "cholesky",
    "covariance_to_real",
    "damped_least_squares",
    "divergence",
    "explored",
    "first_argmax",
    "first_largest",
    "floored_cholesky",
    "gmres",
    "gmres_in_range",
    "in_any_lane",
    "inverse_lower",
    "krylov_space",
    "leading_direction",
    "leading_eigenvalues",
    "least_squares",
    "least_squares_together",
    "normalize",
    "power_of",
    "product",
    "real_to_covariance",
    "real_to_simplex",
    "repaired",
    "safe_divide",
    "safe_log",
    "scattered",
    "series",
    "simplex_to_real",
    "singular_values",
    "solve",
    "solved",
    "symmetric_eigen",
    "to_rank",
    "truncated_normal",
    "weighted_sum",
]
