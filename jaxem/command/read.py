"""Reading a CSV of numbers, or refusing it by column and row."""

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from . import Refusal

_MISSING = ("", "na", "n/a", "nan", "null", "none")


@dataclass(frozen=True)
class Sheet:
    """A table of numbers. name: for titles; columns: D names; rows: (N, D), float64."""

    name: str
    columns: tuple[str, ...]
    rows: np.ndarray


def read_csv(path: Path, columns: Sequence[str] | None, dtype: str) -> Sheet:
    """The named columns (all when None) of a comma-separated file with a header.

    Raises Refusal for what is not a number, is missing, or is beyond the range of `dtype`.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file, strict=True)
            header = [name.strip() for name in next(lines, [])]
            where = _positions(path, header, columns)
            largest = float(np.finfo(dtype).max)
            rows = [
                [_number(path, header[position], cells[position], row, line, largest) for position in where]
                for row, line, cells in _records(path, lines, len(header))
            ]
    except OSError as error:
        raise Refusal(f"cannot read {path}: {error.strerror}; check the path") from None
    except UnicodeDecodeError:
        raise Refusal(f"{path} is not UTF-8 text; save it as a CSV in UTF-8") from None
    except csv.Error as error:
        raise Refusal(f"{path}, line {lines.line_num}, is not valid CSV ({error}); correct that line") from None
    if not rows:
        raise Refusal(f"{path} has a header but no rows; add data")
    return Sheet(path.name, tuple(header[position] for position in where), np.array(rows))


def _positions(path: Path, header: list[str], columns: Sequence[str] | None) -> list[int]:
    """Where the wanted columns are."""
    if not header:
        raise Refusal(f"{path} is empty; its first line must name the columns")
    if all(_is_number(name) for name in header):
        raise Refusal(f"{path} has numbers ({header[0]!r}, ...) in place of a header; name the columns in a first line")
    wanted = header if columns is None else [name.strip() for name in columns]
    for name in wanted:
        if not name:
            raise Refusal(f"{path}: column {header.index(name) + 1} has no name; name it, or choose with --columns")
        if header.count(name) > 1:
            raise Refusal(f"{path}: {header.count(name)} columns are named {name!r}; rename them")
        if name not in header:
            raise Refusal(f"{path} has no column {name!r}; --columns may name {', '.join(filter(None, header))}")
        if wanted.count(name) > 1:
            raise Refusal(f"--columns names {name!r} twice; name it once")
    return [header.index(name) for name in wanted]


def _records(path: Path, lines: Iterator[list[str]], width: int) -> Iterator[tuple[int, int, list[str]]]:
    """Rows, numbered from 1 without the header, with the line of the file that each ends on; blank lines are none."""
    filled = (cells for cells in lines if cells)
    for row, cells in enumerate(filled, start=1):
        line: int = lines.line_num  # type: ignore[attr-defined]
        if len(cells) != width:
            raise Refusal(f"{path}: row {row} (line {line}) has {len(cells)} cells, the header {width}; correct it")
        yield row, line, cells


def _number(path: Path, name: str, cell: str, row: int, line: int, largest: float) -> float:
    def refuse(what: str, remedy: str) -> NoReturn:
        raise Refusal(f"{path}: column {name!r} {what} in row {row} (line {line}); {remedy}")

    text = cell.strip()
    if text.lower() in _MISSING:
        refuse("has a missing value", "fill it in, drop the row, or leave the column out with --columns")
    if not _is_number(text):
        refuse(f"has text, {text!r},", "leave it out with --columns, naming the columns of numbers")
    value = float(text)
    if not math.isfinite(value):
        refuse(f"has {text}", "drop the row, or leave the column out with --columns")
    if abs(value) > largest:
        refuse(f"has {text}, too large for float32,", "rescale the column, or add --dtype float64")
    return value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
