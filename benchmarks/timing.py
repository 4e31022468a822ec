"""What the benchmarks share: contestants that take turns, a table of claims, and the machine in one line."""

import argparse
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    claim: str
    ours: str
    peer: str
    ratio: str
    target: str


@dataclass(frozen=True)
class Timing:
    """Seconds of the first call, and of the later ones."""

    first: float
    later: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.later)

    @property
    def compilation(self) -> float:
        return max(0.0, self.first - self.median)

    def per(self, units: float) -> "Timing":
        """Seconds a unit of work."""
        return Timing(self.first / units, tuple(seconds / units for seconds in self.later))

    def __str__(self) -> str:
        spread = f"{min(self.later):.4g} to {max(self.later):.4g}"
        return f"median {self.median:.4g} s ({spread}), first call {self.compilation:.2f} s more"


def take_turns(
    tasks: dict[str, Callable[[], Any]], repeats: int, untimed: int = 0
) -> tuple[dict[str, Timing], dict[str, Any]]:
    """Call every task in turn, `repeats` + 1 times: timings, and what each returned last.

    untimed: calls at the beginning of every turn but the first that are not timed. Where one contestant takes a
    hundredth of another's time, they bear what that one leaves behind: cold memory, and threads that still spin.
    """
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    results: dict[str, Any] = {}
    for turn in range(repeats + 1):
        for name, task in tasks.items():
            for _ in range(untimed if turn else 0):
                jax.block_until_ready(task())
            start = time.perf_counter()
            results[name] = jax.block_until_ready(task())
            seconds[name].append(time.perf_counter() - start)
    timings = {name: Timing(first, tuple(later)) for name, (first, *later) in seconds.items()}
    for name, timing in timings.items():
        print(f"  {name}: {timing}")
    return timings, results


def measure(
    description: str, claims: dict[str, Callable[[bool, int], Sequence[Row]]], packages: Sequence[str], repeats: int
) -> None:
    """The script: measure the claims that the command line asks for, and print a row of the table for each."""
    every = ",".join(claims)
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--only", default=every, help=f"claims to measure, some of {every}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does the script run?")
    parser.add_argument("--repeats", type=int, default=repeats, help="timed calls after the first")
    options = parser.parse_args()
    chosen = options.only.split(",")
    if unknown := set(chosen) - set(claims):
        parser.error(f"--only takes {', '.join(claims)}; got {', '.join(sorted(unknown))}")
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    print(machine(packages))
    rows = [row for name in chosen for row in claims[name](options.quick, options.repeats)]
    print("\n| claim | jaxem | peer | ratio | target |\n|---|---|---|---|---|")
    for row in rows:
        print(f"| {row.claim} | {row.ours} | {row.peer} | {row.ratio} | {row.target} |")
    print(f"\n{machine(packages)}.")


def machine(packages: Sequence[str]) -> str:
    """Cores, processor, load and versions, in one line."""
    names = [line for line in _cpuinfo() if line.startswith("model name")]
    processor = names[0].split(":")[1].strip() if names else platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = ", ".join(f"{name} {_version(name)}" for name in packages)
    load = f"load {os.getloadavg()[0]:.1f}"
    return f"{cores} CPU cores ({processor}), {load}, Python {platform.python_version()}, {versions}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
