"""What all tests share."""

import gc
import importlib.metadata
import os
from collections.abc import Iterator

import jax
import pytest

# Where arrays of different ranks meet, the broadcast is said.
jax.config.update("jax_numpy_rank_promotion", "raise")

# The tests' time is compilation: cheaper code, made sooner, halves it. `XLA_FLAGS= pytest` runs what users run. For
# these releases only, as XLA ends the process at a flag that it does not know.
_FLAGS = {
    "0.10": "--xla_cpu_use_fusion_emitters=false",
    "0.11": "",
    "0.12": "",
}
_release = ".".join(importlib.metadata.version("jaxlib").split(".")[:2])
if _release in _FLAGS:
    os.environ.setdefault(
        "XLA_FLAGS",
        f"--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 {_FLAGS[_release]}".rstrip(),
    )

# Where in the code an instruction came from, nobody asks here: a twentieth of the time of tracing and lowering.
jax.config.update("jax_traceback_in_locations_limit", 0)

# Tracing makes many objects that live, and few cycles of garbage: looked for less often, and not among what was
# imported, a tenth of the time.
gc.freeze()
gc.set_threshold(50_000, 20, 50)

# The files that take longest, in that order.
_LONG = (
    "laws",
    "notebooks",
    "variants",
    "linear_gaussian_ssm",
    "hmm",
    "stopping",
    "zeros_and_whole_numbers",
    "combinations",
    "readme",
    "normal",
    "standstill",
    "transformed_fits",
    "peers",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no worker is left alone with one at the end."""
    rank = {f"test_{name}.py": place for place, name in enumerate(_LONG)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(autouse=True, scope="module")
def _compiled_programs_of_this_file_only() -> Iterator[None]:
    """Every compiled program holds memory maps, of which a process has only so many: none outlives its file."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def x64() -> Iterator[None]:
    """Float64 for the length of one test; float32 stays the default of all others.

    A whole file asks for it by `pytestmark = pytest.mark.usefixtures("x64")`. A fixture of a wider
    scope is built before this one: it opens `jax.enable_x64(True)` by itself.
    """
    with jax.enable_x64(True):
        yield
