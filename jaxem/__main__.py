"""The command line: Gaussian mixtures of the data that ship, or of a CSV.

`python -m jaxem` fits Old Faithful; `python -m jaxem fit DATA.csv` fits a file.
"""

import argparse
import contextlib
import csv
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from . import Normal, datasets
from .command import Refusal, grid, report
from .command.read import Sheet, read_csv, refuse_lost_digits
from .status import REMEDIES, Status

REFUSED = 2
INTERRUPTED = 130
_COVARIANCES = ("full", "tied", "diag", "spherical")
_INSTALL = 'pip install "jaxem[cli,plot]"'


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all others here."""

    def error(self, message: str) -> NoReturn:
        # People write the name of a file where a command is expected.
        command = re.search(r"invalid choice: '(.+)' \(choose from '?fit'?\)", message)
        if command is not None:
            raise Refusal(f"{command[1]!r} is no command; to fit a file, write python -m jaxem fit {command[1]}")
        raise Refusal(f"{message} (see python -m jaxem --help)")


def _components(text: str) -> list[int]:
    """ "3", "1:6", "1,2,5", or a mixture of these."""
    try:
        ranges = [[int(end) for end in part.split(":")] for part in text.split(",")]
        numbers = sorted({number for ends in ranges for number in range(ends[0], ends[-1] + 1)})
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < 1 or any(len(ends) > 2 or ends[0] > ends[-1] for ends in ranges):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of components; write 3, 1:6 or 1,2,5, from 1 up")
    return numbers


def _covariances(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    try:
        return [Normal(name).covariance for name in dict.fromkeys(names)]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _whole_number(lowest: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or not lowest <= int(text) < 2**31:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {lowest} to {2**31 - 1}")
        return int(text)

    return parse


def _names(text: str) -> list[str]:
    return next(csv.reader([text]), [])


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m jaxem",
        description="Gaussian mixtures by EM, many restarts of each. Without a command: fit Old Faithful (272 x 2).",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="folder for the files (default: here)")
    parser.set_defaults(
        data=None,
        components=list(range(1, 7)),
        covariance=None,
        restarts=256,
        seed=0,
        dtype="float32",
    )
    fit = parser.add_subparsers(title="commands", metavar="").add_parser(
        "fit",
        help="fit the columns of a CSV; writes fit.json, responsibilities.csv and fit.png",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    fit.add_argument(
        "data", type=Path, metavar="DATA.csv", help="numbers under a header, separated by commas or semicolons"
    )
    fit.add_argument("--columns", type=_names, metavar="A,B", help="the columns to use (default: all)")
    fit.add_argument("--components", type=_components, metavar="K", help="3, 1:6 or 1,2,5 (default: 1:6)")
    fit.add_argument(
        "--covariance",
        type=_covariances,
        metavar="NAMES",
        help="any of full,tied,diag,spherical,tied_diag,tied_spherical (default: those of the first four that differ; "
        "diag,spherical with missing values)",
    )
    fit.add_argument("--restarts", type=_whole_number(1), metavar="R", help="of each configuration (default: 1024)")
    fit.add_argument("--seed", type=_whole_number(0), help="of all randomness (default: 0)")
    fit.add_argument("--out", type=Path, metavar="DIR", help="folder for the files (default: here)")
    fit.add_argument("--dtype", choices=("float32", "float64"), help="precision of the fit (default: float32)")
    fit.set_defaults(columns=None, restarts=1024)
    return parser


def _covariances_for(sheet: Sheet, asked: list[str] | None) -> Sequence[str]:
    """The covariances that were asked for, or those that differ; with missing values those that fit the quickest."""
    one = len(sheet.columns) == 1
    if np.any(np.isnan(sheet.rows)):
        return asked or ("diag", "tied_diag" if one else "spherical")
    # A single column's diagonal and spherical covariances are its full one.
    return asked or _COVARIANCES[: 2 if one else None]


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[], object]]:
    """What to call after each of `total` fits: a bar where there is a terminal and tqdm."""
    try:
        from tqdm import tqdm
    except ImportError:
        print(f"jaxem: no progress bar without tqdm: {_INSTALL}", file=sys.stderr)
        yield lambda: None
        return
    with tqdm(total=total, desc="fitting", unit="fit", disable=None, leave=False) as bar:
        yield bar.update


def _run(options: argparse.Namespace) -> int:
    if importlib.util.find_spec("matplotlib") is None:
        raise Refusal(f"no picture without matplotlib: {_INSTALL}")
    if options.data is None:
        sheet = Sheet("Old Faithful", ("eruptions (minutes)", "waiting (minutes)"), datasets.faithful())
        files = ["jaxem-fit.png"]
    else:
        sheet = read_csv(options.data, options.columns, options.dtype)
        files = ["fit.json", "responsibilities.csv", "fit.png"]
    most, rows = options.components[-1], len(sheet.rows)
    if most > rows:
        raise Refusal(f"{sheet.name} has {rows} rows, fewer than {most} components; lower --components to {rows}")
    refuse_lost_digits(sheet, options.dtype)
    x = sheet.rows.astype(options.dtype)
    places = [options.out / name for name in files]
    if options.data is not None and any(place.exists() and place.samefile(options.data) for place in places):
        raise Refusal(f"the result would overwrite {options.data}; choose another folder with --out")
    report.check_folder(options.out)

    covariances = _covariances_for(sheet, options.covariance)
    run: dict[str, Any] = dict(
        data=sheet.name, columns=list(sheet.columns), rows=rows,
        restarts=options.restarts, seed=options.seed, dtype=options.dtype,
    )  # fmt: skip
    print("{data}: {rows} rows; {restarts} restarts, seed {seed}, {dtype}".format(**run))
    for note in sheet.notes:
        print(f"{sheet.name}: {note}")
    with _progress(len(options.components) * len(covariances)) as finished:
        entries = grid.fit_grid(x, options.components, covariances, options.restarts, options.seed, finished)
    best = grid.best_entry(entries)
    print(report.format_table(entries, best))
    if best is None:
        print(f"jaxem: no fit is an optimum, so nothing is written: {REMEDIES[Status.DEGENERATE]}", file=sys.stderr)
        return 1

    from .command import picture  # here, since only the picture needs matplotlib

    shares = grid.responsibilities(best, x)
    contents = [picture.draw(sheet, entries, best, shares)]
    if options.data is not None:
        contents = [report.fit_json(run, entries, best), report.responsibilities_csv(shares), *contents]
    report.write_files(options.out, dict(zip(files, contents, strict=True)))
    print("wrote", ", ".join(map(str, places)))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code. 1: no fit is an optimum; 2: refused, a line on stderr; 130: interrupted."""
    try:
        return _run(_parser().parse_args(arguments))
    except Refusal as refusal:
        print("jaxem:", " ".join(str(refusal).split()), file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("jaxem: interrupted, nothing written", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    code = main()
    if code == INTERRUPTED:
        # XLA cannot be stopped while it compiles or runs, and a normal exit would wait for its threads.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
