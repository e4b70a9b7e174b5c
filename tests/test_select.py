"""Held-out selection: rows whose λ is picked on runs of their own, made up and trained."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from omegaconf import OmegaConf
from test_table import FACTS, WEIGHTS, Command, Made, command, extra, grid, made, printed, spec_of

from experiments import complete, store, table
from experiments.cli import RunFailed
from experiments.pick import choices, due, rejected
from experiments.show import choosing
from experiments.spec import Claim, Column, Row, Table

__all__ = ["command", "extra"]  # fixtures

# held-out selection, on runs as if they had been trained

Values = dict[tuple[str, str, str, bool], Iterable[float | str | None]]


def tried(root: Path, spec: Table, values: Values) -> Made:
    """All jobs of a table: (row, its column's override, choice, trial) -> test/ce of each seed, or None, "failed", "diverged".

    What is not in `values` has not been run. A number x is that of the last of two evaluations; the first had x - 0.5.
    """
    lines, found = [], {}
    for row in spec.rows:
        for name, column in spec.columns.items():
            for trial in [True, False] if row.select else [False]:
                for choice, _ in choices(row, name):
                    key = (row.label, " ".join(column.overrides), choice, trial)
                    for seed, value in zip(spec.seeds, values.get(key, [None] * len(spec.seeds)), strict=True):
                        identity = f"{abs(hash((*key, seed))) % 10**10:010d}"
                        run = found[identity] = store.Run(root / "made" / f"{row.label}-{identity}")
                        if value is not None and not run.path.exists():
                            run.path.mkdir(parents=True)
                            last = value if isinstance(value, float | int) else float("nan")
                            run.log([{"step": 1, "test/ce": last - 0.5}, {"step": 2, "test/ce": last}])
                            if value == "failed":
                                run.fail("Traceback\nRuntimeError: broken")
                            else:
                                run.finish(FACTS | ({"diverged": "train/ce is nan"} if value == "diverged" else {}))
                        known = {"row": row.label, "choice": choice, "column": name, "seed": seed, "trial": trial, "id": identity}
                        lines.append(known | {"profile": "paper", "precision": "fp32", "asked": ""})
    return spec, pd.DataFrame(lines), found


HELD_OUT = {"grid": WEIGHTS, "pick": "min test/ce", "select": ["x.valid=0.1"], "against": "base"}
FINE: Values = {
    ("base", "", "", False): [9.0, 9.0, 9.0],
    ("a", "", "0.1", True): [1.0, 2.0, 3.0],
    ("a", "", "0.2", True): [1.0, 2.0, 2.9],
    ("a", "", "0.1", False): [4.0, 4.0, 4.0],
    ("a", "", "0.2", False): [6.0, 7.0, 8.0],
}


def table_of(spec: Table, asked: pd.DataFrame, found: dict[str, store.Run], tmp_path: Path) -> dict[str, list[str]]:
    wanted, trials = due(spec, asked, found)
    cells = table.fill(spec, wanted, found, trials)
    return grid(table_text(spec, wanted, trials, found, cells, tmp_path))


def table_text(spec: Table, wanted: Any, trials: Any, found: dict[str, store.Run], cells: pd.DataFrame, tmp_path: Path) -> str:
    from experiments.show import show

    facts = choosing(trials, rejected(spec, wanted, trials, found), found)
    return show(spec, wanted, found, cells, [], tmp_path / "out" / "name", facts)


def test_the_final_runs_of_what_was_picked_are_shown(tmp_path: Path) -> None:
    """The trials pick 0.2; its own numbers, worse than those of 0.1, are printed, and none of the trials'."""
    spec = spec_of(Row("base"), Row("a", **HELD_OUT), CE=Column("test/ce"), gain=Column("test/ce", delta=True))
    _, asked, found = tried(tmp_path, spec, FINE)
    wanted, trials = due(spec, asked, found)
    assert set(wanted["choice"]) == {"", "0.2"} and not wanted["trial"].any() and len(wanted) == 2 * 6 and len(trials) == 2 * 6
    assert table_of(spec, asked, found, tmp_path)["a (λ=0.2)"] == ["7.00 ± 1.00", "-2.00 ± 1.00"]


@pytest.mark.parametrize(
    ("second", "label", "cell"),
    [
        ([1.0, 2.0, None], "a (λ=?)", "-"),
        ([1.0, 2.0, "failed"], "a (λ=?)", "failed"),
        ([1.0, 2.0, "diverged"], "a (λ=0.1)", "4.00 ± 0.00"),
    ],
)
def test_nothing_is_picked_among_some(tmp_path: Path, second: list, label: str, cell: str) -> None:
    spec = spec_of(Row("base"), Row("a", **HELD_OUT))
    _, asked, found = tried(tmp_path, spec, FINE | {("a", "", "0.2", True): second})
    wanted, _ = due(spec, asked, found)
    assert set(wanted["choice"]) == ({"", "0.1"} if label == "a (λ=0.1)" else {""})
    assert table_of(spec, asked, found, tmp_path)[label] == [cell]
    guessed, _ = due(spec, asked, found, guess=True)
    assert set(guessed["choice"]) == {"", "0.1"}


def test_what_diverged_while_choosing_is_said_and_no_failure(tmp_path: Path) -> None:
    spec = spec_of(Row("base"), Row("a", **HELD_OUT))
    _, asked, found = tried(tmp_path, spec, FINE | {("a", "", "0.2", True): ["diverged", 1.0, "diverged"]})
    wanted, trials = due(spec, asked, found)
    spare = rejected(spec, wanted, trials, found)
    both = pd.concat([wanted, trials])
    table.raise_failed(both, found, spare["id"])
    minutes = "to choose λ: 6 of 6 runs; commit abc; 6.0 minutes of training"
    assert choosing(trials, spare, found) == [minutes, "diverged while choosing: a λ=0.2 seeds 1, 3 (CE)"]
    with pytest.raises(RunFailed, match="2 of 12 runs failed or diverged"):
        table.raise_failed(both, found)
    failed = FINE | {("a", "", "0.2", True): [2.0, 1.0, "failed"]}
    _, asked, found = tried(tmp_path / "failed", spec, failed)
    wanted, trials = due(spec, asked, found)
    with pytest.raises(RunFailed, match=r"1 of 9 runs failed or diverged: .*RuntimeError: broken"):
        table.raise_failed(pd.concat([wanted, trials]), found, rejected(spec, wanted, trials, found)["id"])
    with pytest.raises(RunFailed):  # as a figure asks: of all trials, none may fail
        table.raise_failed(pd.concat([wanted, trials]), found, trials["id"])


def test_what_diverged_and_is_printed_is_a_failure(tmp_path: Path) -> None:
    """The picked choice's own run; and all of the trials, so that there is no number."""
    spec = spec_of(Row("base"), Row("a", **HELD_OUT))
    for name, change, cell in (
        ("final", {("a", "", "0.2", False): [6.0, 7.0, "diverged"]}, "6.50 ± 0.71 (2/3) div."),
        ("all", {("a", "", weight, True): ["diverged"] * 3 for weight in ("0.1", "0.2")}, "div."),
    ):
        _, asked, found = tried(tmp_path / name, spec, FINE | change)
        wanted, trials = due(spec, asked, found)
        assert cell in str(table_of(spec, asked, found, tmp_path / name))
        with pytest.raises(RunFailed):
            table.raise_failed(pd.concat([wanted, trials]), found, rejected(spec, wanted, trials, found)["id"])


def test_a_choice_that_a_pick_on_the_printed_runs_left_may_diverge_unless_a_claim_is_about_it(tmp_path: Path) -> None:
    values: Values = {("a", "", "0.1", False): [1.0] * 3, ("a", "", "0.2", False): [1.0, "diverged", 1.0]}
    spec = spec_of(Row("a", grid=WEIGHTS, pick="min test/ce"))
    _, asked, found = tried(tmp_path, spec, values)
    wanted, trials = due(spec, asked, found)
    assert len(wanted) == 6 and trials.empty
    assert rejected(spec, wanted, trials, found)["choice"].unique() == ["0.2"]
    spec.claims = [Claim("", "test/ce", ["a"], "b")]
    assert rejected(spec, wanted, trials, found).empty
    shared = spec_of(Row("a", grid=WEIGHTS, pick="min test/ce"), Row("b", grid=WEIGHTS))  # a row that prints each of these runs
    both = pd.concat([wanted, wanted.assign(row="b")], ignore_index=True)
    assert rejected(shared, both, trials, found).empty


TWO = {"A": Column("test/ce", ["d=1"]), "A best": Column("test/ce", ["d=1"], at="min test/ce"), "B": Column("test/ce", ["d=2"])}


def test_choices_that_differ_stand_in_one_line(tmp_path: Path) -> None:
    spec = spec_of(Row("a", **HELD_OUT | {"against": None}, extra={"B": {"method.x.weight": [0.3]}}, paper={"choice": 7}), **TWO)
    values: Values = {("a", "d=1", weight, True): [value] * 3 for weight, value in (("0.1", 1.0), ("0.2", 2.0))}
    values |= {("a", "d=2", weight, True): [value] * 3 for weight, value in (("0.1", 2.0), ("0.2", 2.0), ("0.3", 1.0))}
    values |= {("a", "d=1", "0.1", False): [5.0] * 3, ("a", "d=2", "0.3", False): [6.0] * 3}
    shown = table_of(*tried(tmp_path, spec, values), tmp_path)
    assert shown == {"": ["A", "A best", "B"], "a (λ=0.1 A, 0.3 B, paper 7)": ["5.00 ± 0.00", "4.50 ± 0.00", "6.00 ± 0.00"]}
    values[("a", "d=2", "0.1", True)] = [0.0, 0.0, 0.0]
    assert list(table_of(*tried(tmp_path / "same", spec, values), tmp_path)) == ["", "a (λ=0.1, paper 7)"]
    values[("a", "d=2", "0.1", True)] = [0.0, 0.0, None]
    assert list(table_of(*tried(tmp_path / "open", spec, values), tmp_path)) == ["", "a (λ=0.1 A, ? B, paper 7)"]


def test_a_best_epoch_does_not_change_the_pick(tmp_path: Path) -> None:
    """0.1 has the lower last number, 0.2 the lower best one: both columns show 0.1."""
    spec = spec_of(Row("a", grid=WEIGHTS, pick="min test/ce"), last=Column("test/ce"), best=Column("test/ce", at="min test/ce"))
    _, wanted, found = made(tmp_path, spec, {("a", "0.1"): [2.0] * 3, ("a", "0.2"): [3.0] * 3})
    for identity in wanted[wanted["choice"] == "0.2"]["id"].unique():
        found[identity].log([{"step": 1, "test/ce": 0.0}, {"step": 2, "test/ce": 3.0}])
    assert printed((spec, wanted, found), tmp_path) == {"": ["last", "best"], "a (λ=0.1)": ["2.00 ± 0.00", "2.00 ± 0.00"]}


# held-out selection, trained

TWO_WAVES = """
title: "What is picked at another learning rate"
base: [dataset=digits, dataset.train=100, epochs=1, "schedule.at=[1]"]
seeds: [1, 2]
columns:
  ACC: {metric: test/accuracy}
  CE: {metric: test/ce, better: min, digits: 4}
  best CE: {metric: test/ce, better: min, digits: 4, at: min test/ce}
rows:
  - {label: without, overrides: [method=vanilla]}
  - label: with
    against: without
    overrides: [method=itdm_c]
    grid: {method.itdm_c.weight: [0.2, 0.4, 0.6]}
    pick: min test/ce
    select: [optim.lr=0.01]
"""
ON_TEST = """  - label: with (test)
    against: without
    overrides: [method=itdm_c]
    grid: {method.itdm_c.weight: [0.2, 0.4, 0.6]}
    pick: min test/ce
"""


def trained(runs: Path) -> dict[tuple[float, float, int], float]:
    """(learning rate, weight or 0, seed) -> test/ce, of what is finished."""
    found = {}
    for path in runs.glob("*/*/result.json"):
        cfg = OmegaConf.load(path.parent / "config.yaml")
        weight = cfg.method.itdm_c.weight if cfg.method else 0
        found[cfg.optim.lr, weight, cfg.seed] = store.Run(path.parent).metrics()[-1]["test/ce"]
    return found


@pytest.mark.no_cover  # which doubles its time; what it goes through is covered by others
def test_two_waves(command: Command, extra: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted between the waves, gone on with, asked again, asked with a run deleted, and with a row that shares its runs."""
    (extra / "table" / "waves.yaml").write_text(TWO_WAVES)
    (extra / "table" / "shared.yaml").write_text(TWO_WAVES + ON_TEST)
    runs = tmp_path / "runs"
    code, out, err = command("table=waves", "launch=false")
    assert (code, err) == (0, "") and grid(out)["with (λ=?)"] == ["-"] * 3 and "no run of 2 is done" in out
    code, out, err = command("table=waves", "plan=true")
    line = next(line for line in out.splitlines() if line.startswith("| with "))
    assert re.sub(r"[\s|]+", " ", line).split()[1:5] == ["8", "0", "0", "0"] and "10 different runs" in out
    assert "- λ is not picked yet, its first value stands in: with\n" in f"{out}\n"

    def once(*given: Any) -> Any:
        monkeypatch.setattr(complete, "launch", interrupt)
        return launch(*given)

    def interrupt(*given: Any) -> Any:
        raise KeyboardInterrupt

    launch = complete.launch
    monkeypatch.setattr(complete, "launch", once)
    code, out, _ = command("table=waves")
    assert code == 130 and re.findall(r"\d+ of \d+ runs are", out) == ["8 of 8 runs are", "2 of 10 runs are"]
    first = trained(runs)
    trials = {(0.01, weight, seed) for weight in (0.2, 0.4, 0.6) for seed in (1, 2)}
    assert first.keys() == {(0.05, 0, 1), (0.05, 0, 2)} | trials
    best = min((0.2, 0.4, 0.6), key=lambda weight: first[0.01, weight, 1] + first[0.01, weight, 2])
    code, out, err = command("table=waves", "launch=false")
    assert (code, err) == (0, "") and grid(out)[f"with (λ={best})"] == ["-"] * 3
    code, out, err = command("table=waves", "plan=true")
    assert "10 different runs" in out and "not picked yet" not in out

    monkeypatch.setattr(complete, "launch", launch)
    code, out, err = command("table=waves")
    assert (code, err) == (0, "") and re.findall(r"\d+ of \d+ runs are", out) == ["2 of 10 runs are"]
    second = trained(runs)
    finals = [second[0.05, best, 1], second[0.05, best, 2]]
    assert second.keys() - first.keys() == {(0.05, best, 1), (0.05, best, 2)}
    shown = out[out.index("## ") :]
    assert grid(shown)[f"with (λ={best})"][1].startswith(f"{sum(finals) / 2:.4f} ± ")
    picked_by = (
        "λ is picked by test/ce of runs with optim.lr=0.01, then trained without it: on the test set, so these numbers are optimistic"
    )
    assert f"- {picked_by}\n" in shown and "4 of 4 runs\n" in shown and "- to choose λ: 6 of 6 runs; commit " in shown
    assert "- best CE: instead, the evaluation with min test/ce, chosen on the test set and so optimistic\n" in shown
    assert command("table=waves") == (0, shown, "")

    gone = next(
        path.parent
        for path in runs.glob(f"*itdm_c/*weight={best}*seed=2*/result.json")
        if "lr: 0.05" in (path.parent / "config.yaml").read_text()
    )
    shutil.rmtree(gone)
    code, out, _ = command("table=waves")
    assert code == 0 and re.findall(r"\d+ of \d+ runs are", out) == ["1 of 10 runs are"] and trained(runs) == second

    code, out, err = command("table=shared")
    assert (code, err) == (0, "") and re.findall(r"\d+ of \d+ runs are", out) == ["4 of 14 runs are"]
    third = trained(runs)
    on_test = min((0.2, 0.4, 0.6), key=lambda weight: third[0.05, weight, 1] + third[0.05, weight, 2])
    assert list(grid(out)) == ["", "without", f"with (λ={best})", f"with (test) (λ={on_test})"]
    assert f"- {picked_by.replace('λ is', 'λ of with is')}\n" in out
    assert "- λ of with (test) is picked on the test set, as the paper did: these numbers are optimistic\n" in out


def test_a_choice_that_diverges_is_not_picked(command: Command, extra: Path, tmp_path: Path) -> None:
    """At another learning rate than it is trained with then; and one of a row that is picked on its printed runs."""
    text = """
title: "A learning rate"
base: [dataset=digits, dataset.train=100, epochs=1, "schedule.at=[1]", norm=none, method=vanilla]
seeds: [1]
columns: {ACC: {metric: test/accuracy}}
rows:
  - {label: one, grid: {optim.lr: [0.05, 1e9]}, pick: max test/accuracy, select: [batch_size=20]}
  - {label: two, grid: {optim.lr: [0.05, 1e9]}, pick: max test/accuracy}
"""
    (extra / "table" / "wild.yaml").write_text(text)
    code, out, err = command("table=wild")
    assert code == 0 and re.findall(r"\d+ of \d+ runs are", out) == ["4 of 4 runs are"]
    assert len(err.splitlines()) == 2 and all(": diverged, " in line for line in err.splitlines())
    shown = {label: line[0] for label, line in grid(out).items() if label}
    assert list(shown) == ["one (λ=0.05)", "two (λ=0.05)"] and all(re.fullmatch(r"\d+\.\d\d", cell) for cell in shown.values())
    assert "- diverged while choosing: one λ=1000000000.0 seed 1 (ACC); two λ=1000000000.0 seed 1 (ACC)\n" in out
    claim = 'claims: [{says: "both rates learn", metric: test/accuracy, of: [two], against: one, relation: ">"}]\n'
    (extra / "table" / "wild.yaml").write_text(text + claim)
    code, out, err = command("table=wild")
    assert code == 1 and "1 of 4 runs failed or diverged" in err and "diverged while choosing: one λ=1000000000.0 seed 1 (ACC)\n" in out
