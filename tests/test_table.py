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
from omegaconf import OmegaConf

from experiments import cli, store, table, train
from experiments.claims import verdict
from experiments.config import ConfigError, options
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
    code, _, err = command("table=tiny", "only=[CE,FMNIST]", "launch=false")
    assert (code, err) == (2, "retable: only: no row or column has FMNIST in its name; allowed: ACC, CE, with, without\n")


def attempt(arguments: list[str], log: Path) -> None:
    with open(log, "a") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.argv = ["retable", *arguments]
    cli.main(table.run, "tables")


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


def test_joblib_gives_the_same_numbers(command: Command, tmp_path: Path) -> None:
    code, basic, _ = command("table=tiny", "only=[CE]", "profile.seeds=1")
    assert code == 0
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    code, joblib, err = command("table=tiny", "only=[CE]", "profile.seeds=1", *launcher, runs=tmp_path / "joblib")
    assert code == 0, err
    assert len(results(tmp_path / "joblib")) == 3 and grid(joblib) == grid(basic)


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

ROWS = [{"step": float(step), "test/ce": ce, "test/accuracy": accuracy} for step, ce, accuracy in [(1, 3, 10), (2, 1, 40), (3, 2, 60)]]


@pytest.mark.parametrize(
    ("at", "expected"),
    [("last", 60), ("last2", 50), ("last10", 110 / 3), ("min test/ce", 40), ("max test/ce", 10), ("max step", 60)],
)
def test_reduce(at: str, expected: float) -> None:
    assert table.reduce(ROWS, "test/accuracy", at) == pytest.approx(expected)


def test_reduce_takes_ten_of_more() -> None:
    rows = [{"a": float(value)} for value in range(30)]
    assert table.reduce(rows, "a", "last10") == sum(range(20, 30)) / 10


@pytest.mark.parametrize(
    ("metric", "at", "message"),
    [
        ("valid/ce", "last", "metric 'valid/ce' was not measured; there are step, test/ce, test/accuracy"),
        ("test/ce", "min valid/ce", "table.at: 'min valid/ce' is not known"),
        ("test/ce", "mean test/ce", "table.at: 'mean test/ce' is not known"),
        ("test/ce", "first", "table.at: 'first' is not known"),
        ("test/ce", "lastly", "table.at: 'lastly' is not known"),
        ("test/ce", "last0.5", "table.at: 'last0.5' is not known"),
    ],
)
def test_reduce_refuses(metric: str, at: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        table.reduce(ROWS, metric, at)


Made = tuple[Table, pd.DataFrame, dict[str, store.Run]]
FACTS = {"epochs": 1, "data": "made up", "commit": "abc", "dirty": False, "device": "none", "threads": 1, "torch": "0", "seconds": 60.0}


def made(root: Path, spec: Table, values: dict[tuple[str, str], Iterable[float | str | None]], metric: str = "test/ce") -> Made:
    """Runs as if they had been trained: (row, choice) -> the metric of each seed, or None, "failed", "diverged"."""
    lines, found = [], {}
    for row in spec.rows:
        for choice, _ in table.choices(row):
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


def test_marks(tmp_path: Path) -> None:
    """Every way in which a cell can come out."""
    rows = {
        "inside": ("3±0.5", [2.6, 2.7, 2.8], ["2.70 ± 0.10", "3.0 ± 0.5 (-0.30) ="]),
        "outside": ("3±0.5", [2.3, 2.4, 2.5], ["2.40 ± 0.10", "3.0 ± 0.5 (-0.60) ≠"]),
        "within ours": ("3", [2.0, 3.0, 3.5], ["2.83 ± 0.76", "3.0 (-0.17) ="]),
        "beyond ours": ("3.5", [2.0, 2.1, 2.2], ["2.10 ± 0.10", "3.5 (-1.40) ≠"]),
        "no paper": ("", [1.0, 2.0, 3.0], ["2.00 ± 1.00", ""]),
        "partial": ("3", [1.0, None, 3.0], ["2.00 ± 1.41 (2/3)", "3.0 (-1.00) ="]),
        "one": ("3", [None, None, 3.0], ["3.00 (1/3)", "3.0 (+0.00)"]),
        "one failed": ("3", [1.0, "failed", 3.0], ["2.00 ± 1.41 (2/3) failed", "3.0 (-1.00) ="]),
        "one diverged": ("", [1.0, "diverged", 3.0], ["2.00 ± 1.41 (2/3) div.", ""]),
        "all failed": ("3", ["failed"] * 3, ["failed", "3.0"]),
        "all diverged": ("3", ["diverged"] * 3, ["div.", "3.0"]),
        "none": ("3", [None] * 3, ["-", "3.0"]),
    }
    spec = spec_of(*(Row(label, paper={"CE": paper} if paper else {}) for label, (paper, _, _) in rows.items()))
    shown = printed(made(tmp_path, spec, {(label, ""): values for label, (_, values, _) in rows.items()}), tmp_path)
    assert {label: shown[label] for label in rows} == {label: expected for label, (_, _, expected) in rows.items()}


def test_median(tmp_path: Path) -> None:
    spec = spec_of(Row("a"))
    spec.over = "median"
    assert printed(made(tmp_path, spec, {("a", ""): [1.0, 2.0, 9.0]}), tmp_path)["a"][0].startswith("2.00 ±")


@pytest.mark.parametrize(
    ("pick", "values", "label", "number"),
    [
        ("min test/ce", ([3.0, 3.0, 3.0], [2.0, 2.0, 3.5]), "a (λ=0.2, paper 0.1)", "2.50 ± 0.87"),
        ("max test/ce", ([3.0, 3.0, 3.0], [2.0, 2.0, 3.5]), "a (λ=0.1, paper 0.1)", "3.00 ± 0.00"),
        ("min test/ce", ([3.0, 3.0, 3.0], [2.0, 2.0, None]), "a (λ=?, paper 0.1)", "-"),
        ("min test/ce", ([3.0, 3.0, 3.0], [2.0, 2.0, "failed"]), "a (λ=?, paper 0.1)", "failed"),
        ("min test/ce", ([3.0, 3.0, 3.0], [2.0, 2.0, "diverged"]), "a (λ=0.1, paper 0.1)", "3.00 ± 0.00"),
    ],
)
def test_pick(tmp_path: Path, pick: str, values: tuple[list, list], label: str, number: str) -> None:
    spec = spec_of(Row("a", grid=WEIGHTS, pick=pick, paper={"CE": 2, "choice": "0.1"}))
    shown = printed(made(tmp_path, spec, {("a", "0.1"): values[0], ("a", "0.2"): values[1]}), tmp_path)
    assert list(shown) == ["", label] and shown[label][0] == number


def test_paper_of_a_choice(tmp_path: Path) -> None:
    spec = spec_of(Row("a", grid=WEIGHTS, paper={"0.1": {"CE": "1.5±0.25"}, "0.2": {"CE": 7}}))
    cells = table.fill(*made(tmp_path, spec, {("a", "0.1"): [1.0] * 3, ("a", "0.2"): [1.0] * 3}))
    assert cells["paper"].tolist() == [1.5, 7.0] and cells["paper_std"].fillna(-1).tolist() == [0.25, -1]
    assert cells["gap"].tolist() == [-0.5, -6.0]


def test_delta_is_paired_by_seed(tmp_path: Path) -> None:
    spec = spec_of(Row("base"), Row("a", against="base"), CE=Column("test/ce"), gain=Column("test/ce", delta=True))
    shown = printed(made(tmp_path, spec, {("base", ""): [1.0, 5.0, 9.0], ("a", ""): [2.0, 6.1, 9.9]}), tmp_path)
    assert shown["a"] == ["6.00 ± 3.95", "1.00 ± 0.10"] and shown["base"] == ["5.00 ± 4.00", "-"]


def test_choices_of_a_grid() -> None:
    assert table.choices(Row("a")) == [("", [])]
    assert table.choices(Row("a", grid={"x.b": [1, 2]})) == [("1", ["x.b=1"]), ("2", ["x.b=2"])]
    assert table.choices(Row("a", grid={"x.b": [1], "y.c": [3, 4]})) == [
        ("b=1, c=3", ["x.b=1", "y.c=3"]),
        ("b=1, c=4", ["x.b=1", "y.c=4"]),
    ]


def test_files(tmp_path: Path) -> None:
    """Markdown, LaTeX and CSV; a table that was written before is replaced, and no temporary file stays."""
    claim = Claim("it & they help", "test/ce", ["a_b"], "base", relation="<")
    spec = spec_of(Row("base", paper={"CE": "3±1"}), Row("a_b"), claims=[claim])
    spec.notes = ["a note"]
    for shift in (0, 1):
        root = tmp_path / str(shift)
        _, wanted, found = made(root, spec, {("base", ""): [3.0 + shift, 4, 5], ("a_b", ""): [1.0, 1, 1]})
        judged = [verdict(claim, spec, wanted, found)]
        text = show(spec, wanted, found, table.fill(spec, wanted, found), judged, tmp_path / "out" / "name.of.it")
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["name.of.it.csv", "name.of.it.md", "name.of.it.tex"]
    markdown, latex = (out / "name.of.it.md").read_text(), (out / "name.of.it.tex").read_text()
    assert text == f"{markdown}{out}/name.of.it.md .tex .csv"
    assert markdown.startswith("## Made up_100%\n") and "4.33 ± 0.58" in markdown and "4.00 ± 1.00" not in markdown
    assert f"- **{judged[0].verdict}**: it & they help ({judged[0].why})" in markdown and "- a note" in markdown
    assert "commit abc;" in markdown and "6.0 minutes of training" in markdown and "made up" in markdown
    assert r"a\_b" in latex and r"4.33 $\pm$ 0.58" in latex and r"Made up\_100\%" in latex and r"\bottomrule" in latex
    body = [line for line in latex.splitlines() if not line.startswith("%")]
    assert "\n".join(body).count("&") == 2 * 3  # two separators in the head and in each row
    assert any(line.startswith("% ") and claim.says in line for line in latex.splitlines())
    cells = pd.read_csv(out / "name.of.it.csv")
    assert cells["ours"].tolist() == pytest.approx([13 / 3, 1]) and cells["of_commit"].tolist() == ["abc"] * 2


def test_mixed_commits_are_said(tmp_path: Path) -> None:
    spec, wanted, found = made(tmp_path, spec_of(Row("a")), {("a", ""): [1.0, 1.0, 1.0]})
    text = show(spec, wanted, found, table.fill(spec, wanted, found), [], tmp_path / "out" / "x")
    assert "MIXED" not in text
    found["0000000001"].finish(FACTS | {"commit": "def", "dirty": True})
    text = show(spec, wanted, found, table.fill(spec, wanted, found), [], tmp_path / "out" / "x")
    assert "commit abc, def with changes (MIXED" in text


# the tables of conf/


@pytest.fixture(scope="module")
def shared_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables that share runs train them once."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("name", options("table"))
def test_every_table_trains(name: str, command: Command, shared_runs: Path, tmp_path: Path) -> None:
    """One step of each cell, on stand-in data."""
    small = ["profile=smoke", "profile.steps=1", "profile.train=20", "profile.test=20", "batch_size=10"]
    code, out, err = command(f"table={name}", *small, runs=shared_runs)
    assert (code, err) == (0, "")
    cells = pd.read_csv(next((tmp_path / "out").glob("*.csv")))
    spec = OmegaConf.load(cli.CONF / "table" / f"{name}.yaml")
    against = {row.label: row.get("against") for row in spec["rows"]}
    none = [spec.columns[cell.column].get("delta", False) and against[cell.row] is None for cell in cells.itertuples()]
    assert ((cells["n"] == 1) != none).all() and (cells["ours"].notna() != none).all() and (cells["wanted"] == 1).all()
    assert out.count("seen once**") == len(spec.get("claims", [])) and "not run" not in out.replace("- not run", "")
    for checkpoint in shared_runs.glob("*/*/checkpoint.pt"):  # 90 MB each for a network of eleven million weights
        checkpoint.unlink()


@pytest.mark.parametrize("name", options("table"))
def test_every_table_prints_the_papers_numbers(name: str, command: Command, tmp_path: Path) -> None:
    code, out, err = command(f"table={name}", "launch=false")
    assert (code, err) == (0, "") and not any((tmp_path / "runs").glob("*/*"))
    shown = grid(out)
    head = shown.pop("")
    spec = OmegaConf.load(cli.CONF / "table" / f"{name}.yaml")
    assert [column for column in head if not column.endswith(" paper")] == list(spec.columns)
    for line in shown.values():
        for column, cell in zip(head, line, strict=True):
            assert column.endswith(" paper") or cell == "-"
    flat = [str(number) for row in spec["rows"] for number in _leaves(row.get("paper", {}))]
    there = [float(cell.split(" ±")[0]) for line in shown.values() for column, cell in zip(head, line, strict=True) if cell and cell != "-"]
    assert sorted(there) == sorted(float(number.split("±")[0]) for number in flat)
    assert "no run of" in out


def _leaves(paper: Any) -> Iterable[Any]:
    for key, value in paper.items():
        if OmegaConf.is_dict(value):
            yield from _leaves(value)
        elif key != "choice":
            yield value
