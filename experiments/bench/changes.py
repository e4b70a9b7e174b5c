"""What changed between two tables of the scoreboard."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path

from experiments.config import ConfigError

NAMES = ("id", "what", "over")
NUMBERS = ("ratio", "q1", "q3")
MACHINE = ("device", "threads", "cores", "torch", "overrides")
Row = dict[str, str]


def changes(files: list[str]) -> None:
    """Print each common row's ratio in both, the change, and whether that is more than the spread.

    Raises ConfigError unless both files are the bench's and have a row in common, OSError if one cannot be read.
    """
    if len(files) != 2:
        raise ConfigError(f"compare: two files are wanted, A.csv B.csv; {len(files)} given")
    before, after = (read(Path(file)) for file in files)
    common = [name for name in before if name in after]
    if not common:
        raise ConfigError(f"compare: {files[0]} and {files[1]} have no row in common")
    for column in MACHINE:
        one, other = (next(iter(rows.values()))[column] for rows in (before, after))
        if one != other:
            print(f"retable: warning: {column} differs: {one}, {other}", file=sys.stderr)
    from tabulate import tabulate

    lines = [[*name, *change(before[name], after[name])] for name in common]
    print(tabulate(lines, [*NAMES, "good", "before", "after", "change", "quartiles"], floatfmt=".3f", disable_numparse=[6]))
    print("quartiles: overlap where the change is within the spread of the rounds; else better or worse")
    left = [(file, len(rows) - len(common)) for file, rows in zip(files, (before, after), strict=True) if len(rows) > len(common)]
    for file, count in left:
        print(f"{count} rows only in {file}")


def read(path: Path) -> dict[tuple[str, ...], Row]:
    """The rows of a bench's CSV by their names. Raises ConfigError if it is something else."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if not rows or not all(math.isfinite(float(row[number])) for row in rows for number in NUMBERS):
            raise ValueError
        return {tuple(row[name] for name in NAMES): {column: row[column] for column in (*NUMBERS, "good", *MACHINE)} for row in rows}
    except (ValueError, KeyError, TypeError, csv.Error):
        raise ConfigError(f"compare: {path} is no CSV of experiments.bench") from None


def change(before: Row, after: Row) -> tuple[str, float, float, str, str]:
    """The columns that a row of the table has after its names."""
    (ratio, low, high), (ratio_after, low_after, high_after) = ([float(row[number]) for number in NUMBERS] for row in (before, after))
    if low <= high_after and low_after <= high:
        verdict = "overlap"
    else:
        lower_is_good = "<" in after["good"] or after["good"] == "lower"
        verdict = "better" if (ratio_after < ratio) == lower_is_good else "worse"
    return after["good"], ratio, ratio_after, f"{100 * (ratio_after / ratio - 1):+.1f} %", verdict
