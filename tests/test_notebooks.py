"""The notebooks run from top to bottom without errors or warnings, and are committed with their outputs."""

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
TIMEOUT = 600  # seconds a cell

# One kernel runs them all: what each would import and compile again is a tenth of their time. Before each of them
# nothing is left of the names, pictures and settings of the one before.
AS_NEW = """
get_ipython().reset(new_session=True)
import gc
import jax
import matplotlib.pyplot as plt
import numpy as np
gc.freeze()
gc.set_threshold(50_000, 20, 50)
plt.close("all")
plt.rcdefaults()
np.set_printoptions(precision=8, suppress=False)
jax.config.update("jax_enable_x64", False)
del gc, jax, plt, np
"""


def _kinds(cell: nbformat.NotebookNode) -> set[str]:
    """What a cell put out: streams by their name, displayed data by their type."""
    kinds: set[str] = set()
    for output in cell.outputs:
        kinds |= {output.name} if output.output_type == "stream" else set(output.get("data", {"error": ""}))
    return kinds


@pytest.fixture(scope="module")
def execute(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable]:
    """Runs the code cells of a notebook; raises CellExecutionError, with the cell and its traceback."""
    client = NotebookClient(
        nbformat.v4.new_notebook(),
        timeout=TIMEOUT,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path_factory.mktemp("notebooks"))}},
    )

    async def run(notebook: nbformat.NotebookNode) -> None:
        client.nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(AS_NEW), *notebook.cells])
        client.reset_execution_trackers()
        for index, cell in enumerate(client.nb.cells):
            if cell.cell_type == "code":
                await client.async_execute_cell(cell, index)

    # A loop of its own, closed at the end: none of its sockets outlives these tests, to warn in others.
    with pytest.MonkeyPatch.context() as patch, asyncio.Runner() as runner:
        # Pictures go into the notebook, whatever backend the caller's own plots take.
        patch.delenv("MPLBACKEND", raising=False)
        kernel = client.async_setup_kernel()
        runner.run(kernel.__aenter__())
        try:
            yield lambda notebook: runner.run(run(notebook))
        finally:
            runner.run(kernel.__aexit__(None, None, None))


def test_there_are_notebooks():
    assert NOTEBOOKS, f"no notebook in {FOLDER}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_shows_its_outputs(path, execute):
    committed = nbformat.read(path, as_version=4)
    nbformat.validate(committed)
    fresh = nbformat.read(path, as_version=4)
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    execute(fresh)

    cells = [(old, new) for old, new in zip(committed.cells, fresh.cells, strict=True) if new.cell_type == "code"]
    assert [old.execution_count for old, _ in cells] == list(range(1, len(cells) + 1)), "run it from top to bottom"
    for old, new in cells:
        assert "stderr" not in _kinds(new), f"a cell warns:\n{new.source}\n{new.outputs}"
        assert _kinds(old) == _kinds(new), f"the committed outputs are not those of this cell; run it:\n{new.source}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_tell_nothing_of_the_machine(path):
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            text = json.dumps({kind: data for kind, data in output.get("data", {}).items() if kind != "image/png"})
            text += output.get("text", "")
            for trace in ("/home/", "/tmp/", "/root/", "/Users/", "C:\\"):
                assert trace not in text, f"{path.name} shows a path of the machine it ran on: {text}"
        assert "execution" not in cell.metadata, f"{path.name} keeps time stamps; strip them"
