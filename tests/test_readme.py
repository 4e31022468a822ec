"""What the README promises: its commands are there word for word, and its examples run as they stand."""

import re
from pathlib import Path

import jax
import pytest

README = Path(__file__).parent.parent / "README.md"
COMMANDS = ('pip install ".[cli,plot]" && python -m jaxem', 'pip install ".[test]" && pytest')

_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)
BLOCKS = [(language, code.strip()) for language, code in _FENCE.findall(README.read_text(encoding="utf-8"))]
EXAMPLES = [code for language, code in BLOCKS if language == "python"]


def test_readme_has_examples():
    assert EXAMPLES, "README.md has no ```python block: it shows no example"


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_shows_the_command_as_a_block_of_its_own(command):
    assert command in [code for _, code in BLOCKS], f"README.md must show, as one code block: {command}"


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_readme_example_runs(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    code = compile(EXAMPLES[number], f"README.md, python block {number + 1}", "exec")
    with jax.numpy_rank_promotion("allow"):  # users may leave broadcasts unsaid
        exec(code, {"__name__": "__main__"})
