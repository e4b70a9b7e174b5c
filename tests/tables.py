"""Tables for tests: small ones to ask for by the command, and runs written as if they had been trained."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments import cli, store, table
from experiments.pick import choices, due
from experiments.show import show
from experiments.spec import Claim, Column, Row, Table

Command = Callable[..., tuple[int, str, str]]
Made = tuple[Table, pd.DataFrame, dict[str, store.Run]]
SPEC = """
title: "A tiny table"
base: [dataset=digits, dataset.train=100, epochs=1, "schedule.at=[1]"]
seeds: [1, 2]
columns:
  ACC: {metric: test/accuracy}
  CE: {metric: test/ce, better: min, digits: 4}
rows:
  - {label: without, overrides: [method=vanilla], paper: {ACC: 50, CE: 1.5±0.2}}
  - {label: with, against: without, overrides: [method=itdm_c], grid: {method.itdm_c.weight: [0.2, 0.4]}}
claims:
  - {says: "it helps", metric: test/ce, of: [with], relation: "<"}
notes: [a note]
"""
CELLS = 6  # two seeds of three cells; the two columns read the same runs
FAILING = """
title: "Six runs"
base: [dataset=digits, dataset.train=100, epochs=2, "schedule.at=[1]", norm=none]
seeds: [1]
columns: {ACC: {metric: test/accuracy}}
rows:
  - {label: plain, overrides: [method=vanilla]}
  - {label: smoothed, overrides: [method=label_smoothing]}
  - {label: wild, overrides: [method=vanilla, optim.lr=1e9]}
  - {label: itdm, overrides: [method=itdm_c], grid: {method.itdm_c.weight: [0.2, 0.4, 0.6]}}
"""


@pytest.fixture
def extra(tmp_path: Path) -> Path:
    """A folder of configs next to conf/, with one table."""
    (tmp_path / "extra" / "table").mkdir(parents=True)
    (tmp_path / "extra" / "table" / "tiny.yaml").write_text(SPEC)
    return tmp_path / "extra"


def words(tmp_path: Path, runs: Path) -> list[str]:
    common = ["runtime.threads=1", "runtime.device=cpu", f"runtime.runs={runs}", f"runtime.data_dir={tmp_path}"]
    return ["--config-dir", str(tmp_path / "extra"), *common, "profile.test=100"]


@pytest.fixture
def command(tmp_path: Path, extra: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """A command in this process: its exit code, stdout and stderr."""

    def call(
        *more: str, task: Callable[..., Any] = table.run, root: str = "tables", runs: Path = tmp_path / "runs"
    ) -> tuple[int, str, str]:
        flags, overrides = [word for word in more if word.startswith("-")], [word for word in more if not word.startswith("-")]
        out = [f"out={tmp_path}/out"] if root == "tables" else []
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        monkeypatch.setattr(sys, "argv", ["retable", *flags, *words(tmp_path, runs), *out, *overrides])
        code = 0
        try:
            cli.main(task, root)
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return call


def results(runs: Path) -> dict[str, int]:
    """When each run was finished, by id."""
    return {path.parent.name[-10:]: path.stat().st_mtime_ns for path in runs.glob("*/*/result.json")}


def grid(text: str) -> dict[str, list[str]]:
    """The printed table: first cell -> the others."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {line[0]: line[1:] for line in lines if not line[0].startswith(":-")}


# runs as if they had been trained

FACTS = {"epochs": 1, "data": "made up", "commit": "abc", "dirty": False, "device": "none", "threads": 1, "torch": "0", "seconds": 60.0}
WEIGHTS = {"method.x.weight": [0.1, 0.2]}
HELD_OUT = {"grid": WEIGHTS, "pick": "min test/ce", "select": ["x.valid=0.1"], "against": "base"}
FINE = {  # trials pick 0.2, whose final numbers are worse than those of 0.1
    ("base", ""): [9.0, 9.0, 9.0],
    ("a", "", "0.1", True): [1.0, 2.0, 3.0],
    ("a", "", "0.2", True): [1.0, 2.0, 2.9],
    ("a", "0.1"): [4.0, 4.0, 4.0],
    ("a", "0.2"): [6.0, 7.0, 8.0],
}


def spec_of(*rows: Row, seeds: int = 3, claims: Iterable[Claim] = (), **columns: Column) -> Table:
    columns = columns or {"CE": Column("test/ce", better="min")}
    return Table(title="Made up_100%", rows=list(rows), seeds=list(range(1, seeds + 1)), columns=columns, claims=list(claims))


def made(root: Path, spec: Table, values: Mapping[tuple, Iterable[float | str | None]], metric: str = "test/ce") -> Made:
    """Writes the runs of a table. Columns with the same overrides share their runs.

    values: (row, choice), or (row, the column's overrides, choice, trial) -> the metric of each seed at the last of two evaluations
    (the first has 0.5 less), or None, "failed", "diverged". What is not in `values` has not been run.
    """
    lines, runs = [], dict[tuple, store.Run]()
    for row in spec.rows:
        for name, column in spec.columns.items():
            for trial in [True, False] if row.select else [False]:
                for choice, _ in choices(row, name):
                    key = (row.label, " ".join(column.overrides), choice, trial)
                    outcomes = values.get(key, (not trial and values.get((row.label, choice))) or [None] * len(spec.seeds))
                    for seed, value in zip(spec.seeds, outcomes, strict=True):
                        if (*key, seed) not in runs:
                            runs[*key, seed] = written(root / "made" / f"{row.label}-{len(runs):010d}", value, metric)
                        line = {"row": row.label, "choice": choice, "column": name, "seed": seed, "trial": trial}
                        line |= {"id": runs[*key, seed].path.name[-10:], "profile": "paper", "precision": "fp32", "asked": ""}
                        lines.append(line)
    return spec, pd.DataFrame(lines), {run.path.name[-10:]: run for run in runs.values()}


def written(path: Path, value: float | str | None, metric: str) -> store.Run:
    run = store.Run(path)
    if value is not None:
        path.mkdir(parents=True)
        last = float("nan") if isinstance(value, str) else value
        run.log([{"step": 1, metric: last - 0.5}, {"step": 2, metric: last}])
        if value == "failed":
            run.fail("Traceback\nRuntimeError: broken")
        else:
            run.finish(FACTS | ({"diverged": "train/ce is nan"} if value == "diverged" else {}))
    return run


def printed(lines: Made, tmp_path: Path) -> dict[str, list[str]]:
    spec, asked, found = lines
    wanted, trials = due(spec, asked, found)
    return grid(show(spec, wanted, found, table.fill(spec, wanted, found, trials), [], tmp_path / "out" / "name"))
