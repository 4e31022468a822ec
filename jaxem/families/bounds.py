"""Values that are known to lie in an interval: its bounds, equal where a value is observed exactly."""

import jax
import jax.numpy as jnp
import numpy as np

from .. import checks
from ..protocols import Data
from ..record import record
from . import columns


@record
class Bounds:
    """Lower and upper bounds (N,), infinite where open, both of them where a value is missing."""

    lower: jax.Array
    upper: jax.Array

    @property
    def exact(self) -> jax.Array:
        """Which rows (N,) are observed exactly."""
        return self.lower == self.upper

    @property
    def below(self) -> jax.Array:
        """Which rows (N,) are bounded from below."""
        return self.lower > -jnp.inf

    @property
    def above(self) -> jax.Array:
        """Which rows (N,) are bounded from above."""
        return self.upper < jnp.inf

    @property
    def tell(self) -> jax.Array:
        """Which rows (N,) have a finite bound."""
        return self.below | self.above

    @property
    def points(self) -> jax.Array:
        """What may stand for the values (N,): the middle of the interval, its one end, or 0."""
        ends = jnp.where(self.below, self.lower, 0) + jnp.where(self.above, self.upper, 0)
        return ends * jnp.where(self.below & self.above, 0.5, 1)

    @property
    def features(self) -> jax.Array:
        """`points` (N, 1) for seeding, the mean of the others where a row has no finite bound."""
        return columns.filled(jnp.where(self.tell, self.points, jnp.nan)[:, None], self.lower.dtype)


def named(x: Data, parts: tuple[str, ...], name: str = "x") -> list[tuple[str, jax.Array]]:
    """The arrays of the data, each with how it is called in messages; TypeError where the data are of another form."""
    if not isinstance(x, (tuple, list)) or len(x) != len(parts):
        raise TypeError(f"{name} must be ({', '.join(parts)}), {len(parts)} arrays; got {checks.told(x)}")
    return [(f"{name}[{place}]", array) for place, array in enumerate(x)]


def read(lower: jax.Array, upper: jax.Array, dtype: jnp.dtype) -> Bounds:
    """Bounds in a floating dtype."""
    lower, upper = jnp.asarray(lower, dtype).reshape(-1), jnp.asarray(upper, dtype).reshape(-1)
    missing = jnp.isnan(lower) | jnp.isnan(upper)
    return Bounds(lower=jnp.where(missing, -jnp.inf, lower), upper=jnp.where(missing, jnp.inf, upper))


def check(lower: tuple[str, jax.Array], upper: tuple[str, jax.Array], rows: int | None = None) -> None:
    """Refuse eagerly bounds that are not (N,) each, out of order, or infinite on the wrong side."""
    for name, values in (lower, upper):
        shape = checks.row_shape(name, values)
        rows = shape[0] if rows is None else rows
        if shape != (rows, 1):
            raise ValueError(f"{name}, bounds of the responses, must have shape ({rows},); got {jnp.shape(values)}")
    if not checks.is_concrete(lower, upper):
        return
    (name, low), (_, high) = [(name, np.asarray(values, float).reshape(-1)) for name, values in (lower, upper)]
    half = np.isnan(low) != np.isnan(high)
    if np.any(half):
        raise ValueError(
            f"{name} and {upper[0]}, the bounds of a response, must both be NaN where it is missing; in row "
            f"{np.argmax(half)} one of them is. A bound that is not there is -inf or inf"
        )
    wrong = (low > high) | (low == np.inf) | (high == -np.inf)
    if np.any(wrong):
        row = np.argmax(wrong)
        raise ValueError(
            f"{name} and {upper[0]}, the bounds of a response, must be in order, lower <= upper, with a finite number "
            f"between them; got {low[row]:g} and {high[row]:g} in row {row}"
        )
    if not np.any(np.isfinite(low) | np.isfinite(high)):
        checks.some_observed(f"{name} and {upper[0]}, the bounds of responses, must have a finite one in some row")
