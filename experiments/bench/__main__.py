"""The scoreboard's command line and its table.   python -m experiments.bench --help"""

from __future__ import annotations

import csv
import io
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import store
from experiments.bench.changes import changes
from experiments.bench.configs import VARIANTS, Asked, key, on_gpu, split
from experiments.bench.machine import machine
from experiments.cli import BAD_INPUT, RunFailed, one_line, stop
from experiments.config import ConfigError

USAGE = """python -m experiments.bench [PART...] [rounds=N] [steps=N] [csv=FILE] [OVERRIDE...]
python -m experiments.bench compare A.csv B.csv     what changed between two tables

end        epochs of the whole suite against the usual training loop    use    a step's rate against the best convolution's
input      augmented images against a DataLoader's                      step   a step against a plain loop's
methods    each method's step against vanilla's                         text, norms  language models' steps; norm layers' against BN's
precision  bf16, channels_last, tf32                                    start  seconds to --help and to the first step
counts     operations, host reads, memory of a step                     sweep  two runs side by side against one by one
puzzle     PuzzleMix's step against vanilla's, and its parts            gpu    launch costs, kernels, CUDA graphs
compile    torch.compile against eager; only on a GPU or when named
Without a PART: all. The two sides of a row take turns in one process.
rounds=7   paired rounds of a row, at least 7      csv=FILE  where the table goes too: runs/bench.csv
steps=N    steps of a side in a round; without it as many as take half a second, at least 1
Overrides are those of experiments.train, for all rows; method=[NAME,...] leaves out the others of conf/method, and {}."""
PARTS = ("end", "use", "input", "step", "methods", "text", "norms", "puzzle", "precision", "compile", "counts", "start", "sweep", "gpu")
TIMES = ("id", "what", "over", "ratio", "q1", "q3", "good", "ms a", "ms b", "note")
COUNTS = ("id", "what", "over", "ratio", "good", "count a", "count b", "unit", "reads a", "reads b", "note")
MEANING = """ratio: the time of what (a) over the other's (b), the median of the rounds' ratios between its quartiles;
C1, C2, C3, C11: how many times faster a is. good: the target for the ratio (with a: for a's ms or count), or the better direction"""


def bench(arguments: list[str]) -> None:
    """Measure and print. Raises ConfigError for bad input, RunFailed when a process that was to make a step did not."""
    parts = [word for word in arguments if "=" not in word and not word.startswith("~")]
    if unknown := [part for part in parts if part not in PARTS]:
        raise ConfigError(f"bench: {unknown[0]} is not allowed; parts: {', '.join(PARTS)} (--help explains)")
    own = {key(word): word.partition("=")[2] for word in arguments if key(word) in ("rounds", "steps", "csv")}
    for name, least in {"rounds": 7, "steps": 1}.items():
        if name in own and not (own[name].isdecimal() and int(own[name]) >= least):
            raise ConfigError(f"{name}: {own[name]} is not allowed; it must be a whole number of at least {least}")
    methods, common, of_method = split([word for word in arguments if word not in parts and key(word) not in own])
    asked = Asked(common, methods, of_method, int(own.get("rounds", 7)), int(own["steps"]) if "steps" in own else None)
    # What is wrong shows before anything is measured.
    cfgs = [asked.cfg(model) for model in asked.models("net5c", "net2c", "resnet18", "cnn11", "lstm", "preact_resnet20")]
    for name in methods:
        asked.method(asked.models("net5c")[0], name)
    path = Path(own.get("csv", "runs/bench.csv"))
    path.parent.mkdir(parents=True, exist_ok=True)

    from experiments.bench import rows  # imports torch

    overrides = [*common, *(word for words in of_method.values() for word in words)]
    about = machine(cfgs[0]) | {"rounds": asked.rounds, "overrides": " ".join(overrides) or "none"}
    measured = []
    for part in rows.chosen(parts, on_gpu(cfgs[0])):
        for row in rows.PARTS[part](asked):
            measured.append(row)
            print(f"{row['id']} {row['what']} over {row['over']}: {row['ratio']:.3f} {row['note']}", file=sys.stderr)
    if not measured:
        print("nothing was measured: the parts named need a GPU")
        return
    print(table(measured))
    print(textwrap.fill(", ".join(f"{name} {value}" for name, value in about.items()), 130, break_on_hyphens=False))
    save(path, measured, about)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text: those with times, then those with counts, and what the ratio means."""
    from tabulate import tabulate

    texts = []
    for columns, mark in ((TIMES, "ms a"), (COUNTS, "count a")):
        if some := [[row.get(column, "") for column in columns] for row in rows if mark in row]:
            digits = [".1f" if column.startswith("ms") else ".0f" if column.startswith("count") else ".3f" for column in columns]
            texts.append(tabulate(some, columns, floatfmt=digits))
    return "\n\n".join([*texts, MEANING])


def save(path: Path, rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> None:
    """The rows as CSV, each with the machine's description."""
    columns = dict.fromkeys([*TIMES, *COUNTS, *about])
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*columns])
    writer.writeheader()
    writer.writerows(row | about for row in rows)
    with store.written(path) as file:
        file.write(text.getvalue().encode())


def main() -> None:
    arguments = sys.argv[1:]
    if {"-h", "--help"} & {*arguments}:
        print(USAGE.format(", ".join(VARIANTS)))
        return
    try:
        if arguments[:1] == ["compare"]:
            changes(arguments[1:])
        else:
            bench(arguments)
    except RunFailed as error:
        stop(str(error), 1)
    except BAD_INPUT as error:
        stop(one_line(error), 2)
    except KeyboardInterrupt:
        stop("interrupted", 130)


if __name__ == "__main__":
    main()
