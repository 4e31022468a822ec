"""The rooms: imports point downward only."""

import ast
import re
import sys
import traceback
import types
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxem

ROOT = Path(jaxem.__file__).parent
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

# From the ground up; a room may import rooms below its own.
FLOORS = [
    {"record", "status", "numerics", "special", "datasets", "checks"},
    {"tree", "priors"},
    {"nature"},
    {"protocols"},
    {"slots"},
    {"capabilities"},
    {"parameters"},
    {"sequences", "data", "watch", "scheduler"},
    {"stopping"},
    {"seeding", "parts"},
    {"latents"},
    {"families"},
    {"models", "em"},
    {"implicit", "arguments", "progress"},
    {"fit"},
    {"diagnostics", "restart_jobs", "trajectories"},
    {"certificate"},
    {"restarts"},
    {"testing"},
    {"__init__"},
    {"command"},
    {"__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))


def room(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def imports(path: Path) -> set[tuple[str, ...]]:
    """Modules of the package that a file imports, as paths from the package's root."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {tuple(name.name.split(".")[1:]) for name in node.names if name.name.split(".")[0] == "jaxem"}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = path.parts[: len(path.parts) - node.level]
            elif (node.module or "").split(".")[0] == "jaxem":
                base, node.module = (), ".".join(node.module.split(".")[1:])
            else:
                continue
            module = base + tuple((node.module or "").split(".")) if node.module else base
            found |= {module} if node.module else {(*module, name.name) for name in node.names}
    return {module if is_module(module) else ("__init__",) for module in found}


def is_module(module: tuple[str, ...]) -> bool:
    """Whether a name is a file or folder of the package, and not one of its public names."""
    path = ROOT.joinpath(*module)
    return bool(module) and (path.is_dir() or path.with_suffix(".py").exists())


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_downward(path):
    own = room(path)
    assert own in FLOOR, f"{own} has no floor yet: give it one in this test"
    for module in imports(path):
        other = module[0]
        if own != other:
            assert FLOOR[other] < FLOOR[own], f"{path} imports {'.'.join(module)}, which is not below it"


def test_the_step_never_sees_models_or_families():
    for path in FILES:
        if room(path) == "em":
            assert not {module[0] for module in imports(path)} & {"models", "families"}


def test_models_never_import_each_other():
    """A file that no public name comes from is a part of a model."""
    public = {("models", "__init__"), ("models",), *imports(Path("models/__init__.py"))}
    for path in FILES:
        if room(path) == "models" and path.name != "__init__.py":
            assert not imports(path) & public


def test_loops_over_steps_live_in_fit_and_scheduler_only():
    users = {str(path) for path in FILES if "while_loop" in (ROOT / path).read_text()}
    # Newton's method inside of one M-step, a linear system solved by products and a search for eigenvalues by products
    # are no loops over steps.
    inside = {"latents/markov/stationary.py", "numerics/krylov.py", "numerics/spectrum.py"}
    assert users <= {"fit.py", "scheduler.py"} | inside


def test_the_package_never_touches_jax_configuration():
    for path in FILES:
        assert "config.update" not in (ROOT / path).read_text()


def test_nobody_asks_what_an_object_has():
    """`capabilities.py` says what may be left out, and what stands in its place; all others meet complete objects."""
    found = {}
    for path in FILES:
        calls = [node.func for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.Call)]
        asked = sum(isinstance(call, ast.Name) and call.id in ("hasattr", "getattr") for call in calls)
        if asked and str(path) != "capabilities.py":
            found[str(path)] = asked
    # What is no family at all, the dtype of what may be a plain number, and a statement, which has what it is about.
    assert found == {"checks.py": 1, "tree.py": 1, "parts/statements.py": 1}


def test_every_constant_of_machines_says_what_shows_its_worth():
    """A benchmark that exists, or by hand with a shape to try."""
    lines, said = (ROOT / "numerics" / "tuning.py").read_text().splitlines(), []
    for line in lines:
        if re.match(r"[A-Z_]+ = ", line):
            text = " ".join(said)
            scripts = re.findall(r"([a-z_]+) [a-e]\b", text.partition("Benchmark: ")[2])
            assert scripts or re.search(r"By hand[^:]*: .*\d", text), line
            assert all((BENCHMARKS / f"{script}.py").exists() for script in scripts), line
        said = [*said, line.removeprefix("# ")] if line.startswith("#") else []


def _opened(run: Callable[[], object], where: str, name: str) -> set[int]:
    """How many functions of the package stand between a call of `em_fit` and one of `name` in a file, both included,
    on every way that leads there. Functions inside of others are read with these, and not counted."""
    found = set()

    def look(frame: types.FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_name == name and frame.f_code.co_filename == str(ROOT / where):
            codes = [at.f_code for at, _ in traceback.walk_stack(frame) if at.f_code.co_filename.startswith(str(ROOT))]
            names = [code.co_qualname for code in codes if "<locals>" not in code.co_qualname]
            if "em_fit" in names:
                found.add(names.index("em_fit") + 1)

    jax.clear_caches()
    sys.setprofile(look)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize(
    ("model", "where", "name", "most"),
    [
        (jaxem.Mixture(jaxem.Normal("full"), 2), "families/normal.py", "log_prob", 12),
        (jaxem.HMM(jaxem.Normal("diag"), 2), "families/normal.py", "log_prob", 15),
        (jaxem.LinearGaussianSSM(2), "latents/linear_gaussian/filtering.py", "filter_steps", 17),
    ],
    ids=["mixture", "chain", "linear system"],
)
def test_few_functions_lie_between_a_fit_and_its_arithmetic(model, where, name, most):
    x = np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32)
    params = model.init(jax.random.key(0), x)
    opened = _opened(lambda: jax.eval_shape(lambda x: jaxem.em_fit(model, params, x), x), where, name)
    assert opened
    assert min(opened) <= most
