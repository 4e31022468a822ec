"""Every model of the library, one line each: name -> (model, data). All laws run over all of them."""

import jax.numpy as jnp
import numpy as np

from jaxem import Dirichlet, Mixture, Normal, NormalInverseWishart, default_prior

_rng = np.random.default_rng(7)
_labels = _rng.integers(0, 3, 40)
_points = np.array([[0.0, 0.0], [4.0, 1.0], [1.0, 5.0]])[_labels] + _rng.normal(size=(40, 2)) @ [[1.0, 0.4], [0.0, 0.7]]
_many = np.hstack([_points, _rng.normal(size=(40, 4)) + _labels[:, None]])


def _strict(columns: int) -> NormalInverseWishart:
    return NormalInverseWishart(
        mean=jnp.full(columns, 0.5), shrinkage=2.0, degrees_of_freedom=columns + 4.0, scale=jnp.eye(columns)
    )


def zoo() -> dict:
    """Built anew at each call, so that the arrays inside have the precision that is enabled."""
    return {
        "full": (Mixture(Normal("full"), 3), _points),
        "tied": (Mixture(Normal("tied"), 3), _points),
        "diag": (Mixture(Normal("diag"), 3), _points),
        "spherical": (Mixture(Normal("spherical"), 3), _points),
        "full, expanded": (Mixture(Normal("full", form="expanded"), 3), _points),
        "diag, expanded": (Mixture(Normal("diag", form="expanded"), 3), _points),
        "spherical, expanded": (Mixture(Normal("spherical", form="expanded"), 3), _points),
        "full, six columns": (Mixture(Normal("full"), 2), _many),
        "diag, six columns": (Mixture(Normal("diag"), 2), _many),
        "one column": (Mixture(Normal(), 2), _points[:, 0]),
        "one component": (Mixture(Normal(), 1), _points),
        "full, prior": (Mixture(Normal(prior=_strict(2)), 3, prior=Dirichlet(2.0)), _points),
        "tied, prior": (Mixture(Normal("tied", prior=_strict(2)), 3), _points),
        "diag, prior": (Mixture(Normal("diag", prior=default_prior(jnp.asarray(_points), 3, "diag")), 3), _points),
        "spherical, prior": (
            Mixture(Normal("spherical", prior=default_prior(jnp.asarray(_points), 3, "spherical")), 3),
            _points,
        ),
    }


NAMES = tuple(zoo())
