"""What a run leaves behind: the printed table, the JSON, the CSV, and files that appear whole or not at all."""

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import Status, __version__
from . import Refusal
from .grid import Entry

_HEADER = (
    "components  covariance      log-likelihood  parameters         BIC         ICL  reached best  degenerate  seconds"
)
_NOTES = {
    Status.MAX_STEPS: "stopped at the step limit",
    Status.DEGENERATE: "degenerate: no candidate",
    Status.NONFINITE: "not finite: no candidate",
    Status.DECREASED: "objective fell: no candidate",
}


def format_table(entries: Sequence[Entry], best: Entry | None) -> str:
    """One line a configuration; the best BIC is marked."""
    lines = [_HEADER]
    for entry in entries:
        notes = [_NOTES[entry.status]] if entry.status in _NOTES else []
        notes += ["<- best BIC"] if entry is best else []
        reached = f"{entry.hits}/{sum(entry.endings.values())}"
        line = (
            f"{entry.components:>10}  {entry.covariance:<14}  {entry.loglik:>14.3f}  {entry.num_parameters:>10}"
            f"  {entry.bic:>10.2f}  {entry.icl:>10.2f}  {reached:>12}  {entry.endings[Status.DEGENERATE]:>10}"
            f"  {entry.seconds:>7.1f}  {', '.join(notes)}"
        )
        lines.append(line.rstrip())
    lines.append("BIC and ICL: lower is better, as in scikit-learn. Seconds include compilation.")
    return "\n".join(lines)


def fit_json(run: Mapping[str, Any], entries: Sequence[Entry], best: Entry) -> bytes:
    """Every number of the run, of the best fit and of the table; what is not finite is null."""
    components = best.params.components
    parameters = dict(
        weights=best.params.weights.tolist(), means=components.mean.tolist(), covariances=components.covariance.tolist()
    )
    document = dict(
        jaxem=__version__, **run, best={**_numbers(best), **parameters}, table=[_numbers(entry) for entry in entries]
    )
    return (json.dumps(document, indent=2, allow_nan=False) + "\n").encode()


def _numbers(entry: Entry) -> dict[str, Any]:
    numbers = dict(
        components=entry.components,
        covariance=entry.covariance,
        status=entry.status.name,
        objective=entry.objective,
        loglik=entry.loglik,
        steps=entry.steps,
        parameters=entry.num_parameters,
        aic=entry.aic,
        bic=entry.bic,
        icl=entry.icl,
        reached_best=entry.hits,
        restarts_ended={status.name: count for status, count in entry.endings.items()},
        seconds=round(entry.seconds, 3),
    )
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in numbers.items()
    }


def responsibilities_csv(responsibilities: np.ndarray) -> bytes:
    """A column a component, a line a row, every number with all its digits."""
    header = ",".join(f"component_{k}" for k in range(1, responsibilities.shape[1] + 1))
    lines = (",".join(row) for row in responsibilities.astype(str))
    return "\n".join([header, *lines, ""]).encode()


def check_folder(folder: Path) -> None:
    """Raise Refusal unless files can be made in `folder`, which need not exist yet."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise _unwritable(folder, error) from None


def write_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write all files under temporary names in `folder`, then rename them: no reader sees half a file."""
    drafts = {folder / f".{name}.{os.getpid()}": folder / name for name in contents}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for draft, content in zip(drafts, contents.values(), strict=True):
            draft.write_bytes(content)
        for draft, place in drafts.items():
            os.replace(draft, place)
    except OSError as error:
        raise _unwritable(folder, error) from None
    finally:
        for draft in drafts:
            draft.unlink(missing_ok=True)


def _unwritable(folder: Path, error: OSError) -> Refusal:
    return Refusal(f"cannot write to folder {folder}: {error.strerror}; choose another with --out")
