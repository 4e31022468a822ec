"""The notebooks run from top to bottom without errors or warnings, and are committed with their outputs."""

import asyncio
import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
TIMEOUT = 600  # seconds a cell


def _kinds(cell: nbformat.NotebookNode) -> set[str]:
    """What a cell put out: streams by their name, displayed data by their type."""
    kinds: set[str] = set()
    for output in cell.outputs:
        kinds |= {output.name} if output.output_type == "stream" else set(output.get("data", {"error": ""}))
    return kinds


def _execute(notebook: nbformat.NotebookNode, folder: Path) -> None:
    client = NotebookClient(
        notebook, timeout=TIMEOUT, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    # A loop of its own, closed at the end: none of its sockets outlives this test, to warn in another.
    asyncio.run(client.async_execute())


def test_there_are_notebooks():
    assert NOTEBOOKS, f"no notebook in {FOLDER}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_shows_its_outputs(path, tmp_path, monkeypatch):
    # Pictures go into the notebook, whatever backend the caller's own plots take.
    monkeypatch.delenv("MPLBACKEND", raising=False)
    committed = nbformat.read(path, as_version=4)
    nbformat.validate(committed)
    fresh = nbformat.read(path, as_version=4)
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    _execute(fresh, tmp_path)  # raises CellExecutionError, with the cell and its traceback

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
