"""Reading a CSV of numbers, or refusing it by column and row."""

import csv
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np

from . import Refusal

_MISSING = ("", "na", "n/a", "nan", "null", "none")

# What pandas and R call a column that numbers the rows.
_UNNAMED = ("", "Unnamed: 0")

# Rounding, as a share of a column's spread, that still leaves two digits of it.
_LARGEST_ROUNDING = 1e-2

_DECIMAL = re.compile(r"[+-]?\d*([,.])\d+(?:[eE][+-]?\d+)?")


@dataclass(frozen=True)
class Sheet:
    """A table of numbers.

    name: the file's, for titles.
    columns: D names.
    rows: (N, D), float64, NaN where missing.
    notes: how it was read.
    """

    name: str
    columns: tuple[str, ...]
    rows: np.ndarray
    notes: list[str] = field(default_factory=list)


def read_csv(path: Path, columns: Sequence[str] | None, dtype: str) -> Sheet:
    """The named columns of a file with a header, its columns separated by commas, semicolons or tabs.

    All columns when None are named, but for an unnamed first one that only numbers the rows. Between semicolons a
    comma is a decimal mark. Raises Refusal for a file that cannot be read as such a table, for a cell that is neither
    missing nor a finite number in the range of `dtype`, and for a column without a value.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            separator = _separator(first)
            lines = csv.reader(itertools.chain([first], file), strict=True, delimiter=separator)
            header = [name.strip() for name in next(lines, [])]
            records = list(_records(path, lines, header))
    except OSError as error:
        raise Refusal(f"cannot read {path}: {error.strerror}; check the path") from None
    except UnicodeDecodeError:
        raise Refusal(f"{path} is not UTF-8 text; save it as a CSV in UTF-8") from None
    except csv.Error as error:
        raise Refusal(f"{path}, line {lines.line_num}, is not valid CSV ({error}); correct that line") from None
    notes = [f"columns are separated by {_NAMES[separator]}s"] if separator != "," else []
    skipped = columns is None and _numbers_the_rows(header, records)
    if skipped:
        notes.append("its first column, without a name, only numbers the rows and is left out")
    where = _positions(path, header, columns, int(skipped))
    if not records:
        raise Refusal(f"{path} has a header but no rows; add data")
    if separator == ";" and _has_decimal_commas(path, header, where, records):
        notes.append("commas are read as decimal points")
        records = [(row, line, [cell.replace(",", ".") for cell in cells]) for row, line, cells in records]
    largest = float(np.finfo(dtype).max)
    rows = [
        [_number(path, header[position], cells[position], row, line, largest) for position in where]
        for row, line, cells in records
    ]
    sheet = Sheet(path.name, tuple(header[position] for position in where), np.array(rows), notes)
    for name, absent in zip(sheet.columns, np.isnan(sheet.rows).T, strict=True):
        if np.all(absent):
            raise Refusal(f"{path}: column {name!r} has no value; leave it out with --columns")
        if np.any(absent):
            notes.append(f"column {name!r} has {np.sum(absent)} missing values, which are integrated out")
    return sheet


_NAMES = {",": "comma", ";": "semicolon", "\t": "tab"}


def _separator(header: str) -> str:
    """What separates the names in a first line: the most frequent candidate outside of quotes, else a comma."""
    bare = re.sub(r'"[^"]*"', "", header)
    return max(_NAMES, key=bare.count)


def _numbers_the_rows(header: list[str], records: list[tuple[int, int, list[str]]]) -> bool:
    """Whether the first of several columns has no name and counts 0, 1, 2, ... or 1, 2, 3, ..."""
    if len(header) < 2 or header[0] not in _UNNAMED or not records:
        return False
    cells = [cells[0].strip() for _, _, cells in records]
    return any(cells == [str(row + first) for row in range(len(cells))] for first in (0, 1))


def _has_decimal_commas(
    path: Path, header: list[str], where: list[int], records: list[tuple[int, int, list[str]]]
) -> bool:
    """Whether numbers between semicolons have decimal commas; Refusal where others have decimal points."""
    first: dict[str, str] = {}
    for _, line, cells in records:
        for position in where:
            number = _DECIMAL.fullmatch(cells[position].strip())
            if number is not None:
                first.setdefault(number[1], f"{number[0]!r} in column {header[position]!r}, line {line}")
    if len(first) == 2:
        raise Refusal(
            f"{path} has both commas ({first[',']}) and points ({first['.']}) in its numbers; write decimal points, "
            "and nothing between thousands"
        )
    return "," in first


def _positions(path: Path, header: list[str], columns: Sequence[str] | None, first: int) -> list[int]:
    """Where the wanted columns are; all from `first` on, where none are named."""
    if not header:
        raise Refusal(f"{path} is empty; its first line must name the columns")
    if all(_is_number(name) for name in header):
        raise Refusal(f"{path} has numbers ({header[0]!r}, ...) in place of a header; name the columns in a first line")
    wanted = header[first:] if columns is None else [name.strip() for name in columns]
    for name in wanted:
        if not name:
            raise Refusal(
                f"{path}: column {header.index(name) + 1} has no name, and does not only number the rows; name it, or "
                "choose others with --columns"
            )
        if header.count(name) > 1:
            raise Refusal(f"{path}: {header.count(name)} columns are named {name!r}; rename them")
        if name not in header:
            raise Refusal(f"{path} has no column {name!r}; --columns may name {', '.join(filter(None, header))}")
        if wanted.count(name) > 1:
            raise Refusal(f"--columns names {name!r} twice; name it once")
    return [header.index(name) for name in wanted]


def _records(path: Path, lines: Iterator[list[str]], header: list[str]) -> Iterator[tuple[int, int, list[str]]]:
    """Rows, numbered from 1 without the header, with the line of the file that each ends on; blank lines are none."""
    filled, width = (cells for cells in lines if cells), len(header)
    for row, cells in enumerate(filled, start=1):
        line: int = lines.line_num  # type: ignore[attr-defined]
        if len(cells) != width:
            remedy = "correct it"
            if len(cells) == 2 * width and all(_is_number(cell) for cell in cells):
                remedy = "if its commas are decimal ones, write points, or separate the columns by semicolons"
            elif len(cells) == width + 1 and row == 1:
                remedy = "if its first cell is a row's name, give the header an empty first cell"
            raise Refusal(f"{path}: row {row} (line {line}) has {len(cells)} cells, the header {width}; {remedy}")
        yield row, line, cells


def _number(path: Path, name: str, cell: str, row: int, line: int, largest: float) -> float:
    def refuse(what: str, remedy: str) -> NoReturn:
        raise Refusal(f"{path}: column {name!r} {what} in row {row} (line {line}); {remedy}")

    text = cell.strip()
    if text.lower() in _MISSING:
        return math.nan
    if "," in text and _DECIMAL.fullmatch(text):
        refuse(
            f"has a comma within a number, {text!r},",
            "write a decimal point, or separate the columns by semicolons, between which a comma is a decimal one",
        )
    if not _is_number(text):
        refuse(f"has text, {text!r},", "leave it out with --columns, naming the columns of numbers")
    value = float(text)
    if not math.isfinite(value):
        refuse(f"has {text}", "drop the row, or leave the column out with --columns")
    if abs(value) > largest:
        refuse(f"has {text}, too large for float32,", "rescale the column, or add --dtype float64")
    return value


def refuse_lost_digits(sheet: Sheet, dtype: str) -> None:
    """Raise Refusal for a constant column, and for one that rounding to `dtype` leaves too few digits of its spread."""
    for name, column in zip(sheet.columns, sheet.rows.T, strict=True):
        exact = column[~np.isnan(column)]
        spread = float(np.std(exact))
        if np.ptp(exact) == 0:
            raise Refusal(f"{sheet.name}: column {name!r} is constant; leave it out with --columns")
        rounding = float(np.max(np.abs(exact.astype(dtype).astype(float) - exact)))
        if dtype == "float32" and rounding > _LARGEST_ROUNDING * spread:
            raise Refusal(
                f"{sheet.name}: column {name!r} varies by {spread:.3g} about {np.mean(exact):.6g}, of which float32 "
                "keeps no two digits; add --dtype float64, or subtract a constant from the column"
            )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
