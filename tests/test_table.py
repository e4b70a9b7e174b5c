"""Tables: which runs they ask for, how these become cells, verdicts and files, and what happens when runs fail."""

from __future__ import annotations

import csv
import multiprocessing
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from nets import narrowed
from omegaconf import OmegaConf

from experiments import cli, store, table, train
from experiments.config import options
from experiments.pick import choices
from experiments.show import show
from experiments.spec import Claim, Column, Row, Table

Command = Callable[..., tuple[int, str, str]]
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


# asking


def test_each_cell_is_trained_once(command: Command, tmp_path: Path) -> None:
    """First by hand, then by the table, then again; then with one run's folder gone."""
    runs = tmp_path / "runs"
    by_hand = ["dataset.train=100", "epochs=1", "schedule.at=[1]", "method=itdm_c", "method.itdm_c.weight=0.2,0.4"]
    assert command("-m", *by_hand, task=train.train, root="config")[0] == 0
    first = results(runs)
    assert len(first) == 2

    code, out, err = command("table=tiny")
    assert (code, err) == (0, "")
    assert out.startswith(f"4 of {CELLS} runs are to be trained\n") and out.count("runs are to be trained") == 1
    second = results(runs)
    assert len(second) == CELLS and second.items() >= first.items()
    shown = out[out.index("## ") :]
    assert grid(shown).keys() == {"", "without", "with λ=0.2", "with λ=0.4"}

    assert command("table=tiny") == (0, shown, "")
    assert results(runs) == second

    gone = next(path.parent for path in runs.glob("*itdm_c/*/result.json"))
    shutil.rmtree(gone)
    code, out, err = command("table=tiny")
    assert (code, err) == (0, "") and out.startswith(f"1 of {CELLS} runs are to be trained\n")
    third = results(runs)
    assert {identity for identity in second if second[identity] != third[identity]} == {gone.name[-10:]}
    numbers = [line for line in shown.splitlines() if line.startswith("|")]
    assert [line for line in out.splitlines() if line.startswith("|")] == numbers


def test_cells_are_the_runs_numbers(command: Command, tmp_path: Path) -> None:
    assert command("table=tiny")[0] == 0
    by_id = {path.parent.name[-10:]: store.Run(path.parent) for path in (tmp_path / "runs").glob("*/*/result.json")}
    of = {"without": [], "with λ=0.2": [], "with λ=0.4": []}
    for run in by_id.values():
        cfg = OmegaConf.load(run.path / "config.yaml")
        label = f"with λ={cfg.method.itdm_c.weight}" if cfg.method else "without"
        of[label].append((cfg.seed, run.metrics()[-1]))
    (file,) = (tmp_path / "out").glob("*.csv")
    with open(file) as handle:
        cells = list(csv.DictReader(handle))
    assert len(cells) == 6
    for cell in cells:
        label = f"with λ={cell['choice']}" if cell["choice"] else cell["row"]
        values = pd.Series([row[cell["metric"]] for _, row in of[label]])
        assert float(cell["ours"]) == pytest.approx(values.mean(), abs=1e-12) and float(cell["std"]) == pytest.approx(
            values.std(), abs=1e-12
        )
        assert (cell["n"], cell["wanted"], cell["of_seed"]) == ("2", "2", "1; 2")


def test_common_overrides_reach_every_run(command: Command, tmp_path: Path) -> None:
    code, out, _ = command("table=tiny", "seed=7", "batch_size=20", "profile.seeds=1", "profile.steps=1")
    assert code == 0 and "- asked for besides: profile.test=100 seed=7 batch_size=20 profile.seeds=1 profile.steps=1\n" in out
    assert set(pd.read_csv(next((tmp_path / "out").glob("*.csv")))["of_asked"]) == {
        "profile.test=100 seed=7 batch_size=20 profile.seeds=1 profile.steps=1"
    }
    configs = [OmegaConf.load(path) for path in (tmp_path / "runs").glob("*/*/config.yaml")]
    assert [(cfg.seed, cfg.batch_size, cfg.profile.steps) for cfg in configs] == [(1, 20, 1)] * 3  # the seeds are the table's


def test_only(command: Command) -> None:
    code, out, _ = command("table=tiny", "only=[CE]", "launch=false")
    assert code == 0 and grid(out)[""] == ["CE", "CE paper"] and len(grid(out)) == 4
    code, out, _ = command("table=tiny", "only=[without,CE]", "launch=false")
    assert code == 0 and list(grid(out)) == ["", "without"] and "it helps" not in out  # a claim about a row that is not there
    code, out, _ = command("table=tiny", "only=[with]", "launch=false")  # and the row that it is compared with
    assert code == 0 and list(grid(out)) == ["", "without", "with λ=0.2", "with λ=0.4"]
    code, out, _ = command("table=per_4", "only=[VD-LSTM PER,WT2 test]", "launch=false")  # rows and columns that have all the words
    assert code == 0 and list(grid(out)) == ["", "VD-LSTM Vanilla", "VD-LSTM PER (λ=?)"] and grid(out)[""] == ["WT2 test", "WT2 test paper"]
    code, _, err = command("table=per_4", "only=[PTB PER]", "launch=false")
    assert code == 2 and err.startswith("retable: only: no row or column has PER PTB in its name; allowed: L1, L2, LSTM, PER, PTB,")
    code, _, err = command("table=tiny", "only=[CE,FMNIST]", "launch=false")
    assert (code, err) == (2, "retable: only: no row or column has FMNIST in its name; allowed: ACC, CE, with, without\n")


def attempt(arguments: list[str], log: Path) -> None:
    with open(log, "a") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.argv = ["retable", *arguments]
    cli.main(table.run, "tables")


@pytest.mark.no_cover
def test_two_processes_ask_at_once(tmp_path: Path, extra: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["experiments.table", "experiments.trainer", "torch._dynamo", "torch.utils.tensorboard"])
    runs, logs = tmp_path / "runs", [tmp_path / "one", tmp_path / "two"]
    arguments = [*words(tmp_path, runs), "table=tiny", f"out={tmp_path}/out"]
    both = [context.Process(target=attempt, args=(arguments, log)) for log in logs]
    for process in both:
        process.start()
    for process in both:
        process.join(300)
        process.kill()
    texts = [log.read_text() for log in logs]
    assert [process.exitcode for process in both] == [0, 0], texts
    assert [len(path.read_text().splitlines()) for path in runs.glob("*/*/train.log")] == [1] * CELLS
    tables = [text[text.index("## ") :] for text in texts]
    assert tables[0] == tables[1] and not any("-" in line for line in grid(tables[0]).values())


LAUNCHERS = {
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit_local": ["hydra/launcher=submitit_local", "runtime.runs_per_device=2"],
    "side by side": ["runtime.runs_per_device=2"],
}


@pytest.mark.no_cover
@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("launcher", LAUNCHERS.values(), ids=LAUNCHERS)
def test_every_launcher_gives_the_same_numbers(command: Command, tmp_path: Path, launcher: list[str]) -> None:
    code, basic, _ = command("table=tiny", "only=[CE]", "profile.seeds=1")
    assert code == 0
    code, other, err = command("table=tiny", "only=[CE]", "profile.seeds=1", *launcher, runs=tmp_path / "other")
    assert code == 0, err
    assert len(results(tmp_path / "other")) == 3 and grid(other) == grid(basic)
    for path in (tmp_path / "other").glob("*/*/metrics.csv"):
        assert path.read_text() == (tmp_path / "runs" / path.relative_to(tmp_path / "other")).read_text()


# failures

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


def test_one_run_raises_and_one_diverges(command: Command, extra: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from regularizers.itdm import ITDM

    (extra / "table" / "failing.yaml").write_text(FAILING)
    plain = ITDM.penalty

    def penalty(self: ITDM, *rest: Any) -> Any:
        if self.weight == 0.4:
            raise RuntimeError("a stage\nthat broke")
        return plain(self, *rest)

    monkeypatch.setattr(ITDM, "penalty", penalty)
    code, out, err = command("table=failing")
    cells = {label: line[0] for label, line in grid(out).items()}
    assert code == 1
    assert (cells["wild"], cells["itdm λ=0.4"]) == ("div.", "failed")
    assert all(re.fullmatch(r"\d+\.\d\d", cells[label]) for label in ("plain", "smoothed", "itdm λ=0.2", "itdm λ=0.6"))
    assert len(results(tmp_path / "runs")) == 5  # that it diverged is a result
    (broken,) = (tmp_path / "runs").glob("*/*/error.txt")
    assert broken.read_text().startswith("Traceback") and "RuntimeError: a stage\nthat broke" in broken.read_text()
    assert all(line.startswith("retable: ") for line in err.splitlines()), err
    assert "2 of 6 runs failed or diverged" in err and str(broken.parent) in err and "is nan at epoch" in err
    assert "Traceback" not in err

    monkeypatch.undo()  # the bug is fixed: the failed run is trained again, the diverged one is not
    code, out, err = command("table=failing")
    cells = {label: line[0] for label, line in grid(out).items()}
    assert code == 1 and out.startswith("1 of 6 runs are to be trained\n") and "1 of 6 runs failed or diverged" in err
    assert cells["wild"] == "div." and re.fullmatch(r"\d+\.\d\d", cells["itdm λ=0.4"])
    assert not broken.exists()

    code, out, err = command("table=failing", "table.columns.ACC.chance=10.5")  # where coming to nothing is an outcome
    assert (code, err) == (0, "") and grid(out)["wild"] == ["10.50 div."]


def test_missing_data_leaves_cells_open(command: Command, extra: Path, tmp_path: Path) -> None:
    """Bad input of some runs: the others are trained, the table is printed, and the exit code is that of bad input."""
    text = SPEC.replace("dataset=digits, dataset.train=100, ", "").replace("seeds: [1, 2]", "seeds: [1]")
    text = text.replace("test/accuracy}", "test/accuracy, overrides: [dataset=kmnist]}").replace(
        "digits: 4}", "digits: 4, overrides: [dataset=digits]}"
    )
    (extra / "table" / "half.yaml").write_text(text)
    code, out, err = command("table=half")
    assert code == 2 and err.count("\n") == 1 and err.startswith(f"retable: dataset: kmnist is not under {tmp_path}")
    assert grid(out)["without"][0] == "-" and re.fullmatch(r"\d\.\d{4}", grid(out)["without"][2])


# numbers

Made = tuple[Table, pd.DataFrame, dict[str, store.Run]]
FACTS = {"epochs": 1, "data": "made up", "commit": "abc", "dirty": False, "device": "none", "threads": 1, "torch": "0", "seconds": 60.0}


def made(root: Path, spec: Table, values: dict[tuple[str, str], Iterable[float | str | None]], metric: str = "test/ce") -> Made:
    """Runs as if they had been trained: (row, choice) -> the metric of each seed, or None, "failed", "diverged"."""
    lines, found = [], {}
    for row in spec.rows:
        for choice, _ in choices(row):
            for seed, value in zip(spec.seeds, values[row.label, choice], strict=True):
                identity = f"{len(found):010d}"
                run = found[identity] = store.Run(root / "made" / f"{row.label}-{identity}")
                if value is not None:
                    run.path.mkdir(parents=True)
                    run.log([{"step": 1, metric: value if isinstance(value, float | int) else float("nan")}])
                if value == "failed":
                    run.fail("Traceback\nRuntimeError: broken")
                elif value is not None:
                    run.finish(FACTS | ({"diverged": "train/ce is nan"} if value == "diverged" else {}))
                known = {
                    "row": row.label,
                    "choice": choice,
                    "seed": seed,
                    "id": identity,
                    "profile": "paper",
                    "precision": "fp32",
                    "asked": "",
                }
                lines += [known | {"column": name} for name in spec.columns]
    return spec, pd.DataFrame(lines), found


def spec_of(*rows: Row, seeds: int = 3, claims: Iterable[Claim] = (), **columns: Column) -> Table:
    known = columns or {"CE": Column("test/ce", better="min")}
    return Table(title="Made up_100%", rows=list(rows), seeds=list(range(1, seeds + 1)), columns=known, claims=list(claims))


WEIGHTS = {"method.x.weight": [0.1, 0.2]}


def printed(made: Made, tmp_path: Path) -> dict[str, list[str]]:
    spec, wanted, found = made
    return grid(show(spec, wanted, found, table.fill(spec, wanted, found), [], tmp_path / "out" / "name"))


# the tables of conf/


@pytest.fixture(scope="module")
def shared_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables that share runs train them once."""
    return tmp_path_factory.mktemp("runs")


PER = ("per_1", "per_2", "per_3", "per_4", "per_strength")  # whose rows all print one number, or are of many runs
LONG = ("itdm_4", "itdm_5", "unitization_s1", "unitization_demo", "lamix_5", *PER)


@pytest.mark.no_cover  # which doubles its time; what it goes through is covered by others
@pytest.mark.usefixtures("few_slices", "narrow")
@pytest.mark.parametrize("name", options("table"))
def test_every_table_trains(name: str, command: Command, shared_runs: Path, tmp_path: Path, one_value: Callable[[slice], None]) -> None:
    """One step of each cell, on stand-in data."""
    if name in LONG:
        one_value(slice(1))
    small = ["profile=smoke", "profile.steps=1", "profile.train=20", "profile.test=20", "batch_size=10"]
    spec = OmegaConf.load(cli.CONF / "table" / f"{name}.yaml")
    small += ["++model.width=8"] * any("per_lstm" in word for word in spec.base)  # 128 runs
    small += narrowed(spec.base)
    code, out, err = command(f"table={name}", *small, runs=shared_runs)
    assert (code, err) == (0, "")
    cells = pd.read_csv(next((tmp_path / "out").glob("*.csv")))
    against = {row.label: row.get("against") for row in spec["rows"]}
    none = [spec.columns[cell.column].get("delta", False) and against[cell.row] is None for cell in cells.itertuples()]
    assert ((cells["n"] == 1) != none).all() and (cells["ours"].notna() != none).all() and (cells["wanted"] == 1).all()
    assert out.count("seen once**") == len(spec.get("claims", [])) and "not run" not in out.replace("- not run", "")
    for checkpoint in shared_runs.glob("*/*/checkpoint.pt"):  # 90 MB each for a network of eleven million weights
        checkpoint.unlink()


@pytest.mark.no_cover
@pytest.mark.parametrize("name", options("table"))
def test_every_table_prints_the_papers_numbers(name: str, command: Command, tmp_path: Path, one_value: Callable[[slice], None]) -> None:
    if name in PER:
        one_value(slice(-1, None))
    code, out, err = command(f"table={name}", "launch=false")
    assert (code, err) == (0, "") and not any((tmp_path / "runs").glob("*/*"))
    shown = grid(out)
    head = shown.pop("")
    spec = OmegaConf.load(cli.CONF / "table" / f"{name}.yaml")
    assert [column for column in head if not column.endswith((" paper", " quoted"))] == list(spec.columns)
    for line in shown.values():
        for column, cell in zip(head, line, strict=True):
            assert column.endswith((" paper", " quoted")) or cell == "-"
    flat = [str(number) for row in spec["rows"] for key in ("paper", "quoted") for number in _leaves(row.get(key, {}))]
    there = [float(cell.split()[0]) for line in shown.values() for column, cell in zip(head, line, strict=True) if cell and cell != "-"]
    assert sorted(there) == sorted(float(number.split("±")[0]) for number in flat)
    assert "no run of" in out


def _leaves(paper: Any) -> Iterable[Any]:
    for key, value in paper.items():
        if OmegaConf.is_dict(value):
            yield from _leaves(value)
        elif key != "choice":
            yield value
