"""What all tests share."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture
def x64() -> Iterator[None]:
    """Float64 for the length of one test; float32 stays the default of all others.

    A whole file asks for it by `pytestmark = pytest.mark.usefixtures("x64")`. A fixture of a wider
    scope is built before this one: it opens `jax.enable_x64(True)` by itself.
    """
    with jax.enable_x64(True):
        yield
