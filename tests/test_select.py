"""Held-out selection: rows whose λ is picked on runs of their own, made up and trained."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
from omegaconf import OmegaConf
from tables import FINE, HELD_OUT, SPEC, WEIGHTS, Command, Made, grid, made, printed, spec_of

from experiments import store, table
from experiments.cli import RunFailed
from experiments.pick import due, rejected
from experiments.show import choosing
from experiments.spec import Claim, Column, Row
from experiments.trainer import Trainer

# on runs as if they had been trained


def raise_failed(lines: Made) -> None:
    spec, asked, found = lines
    wanted, trials = due(spec, asked, found)
    table.raise_failed(pd.concat([wanted, trials]), found, rejected(spec, wanted, trials, found)["id"])


def test_the_final_runs_of_what_was_picked_are_printed(tmp_path: Path) -> None:
    """The trials pick 0.2; its own numbers, worse than those of 0.1, are printed, and none of the trials'."""
    spec = spec_of(Row("base"), Row("a", **HELD_OUT), CE=Column("test/ce"), gain=Column("test/ce", delta=True))
    lines = made(tmp_path, spec, FINE)
    wanted, trials = due(*lines)
    assert set(wanted["choice"]) == {"", "0.2"} and not wanted["trial"].any() and len(wanted) == 2 * 6 and len(trials) == 2 * 6
    assert printed(lines, tmp_path)["a (λ=0.2)"] == ["7.00 ± 1.00", "-2.00 ± 1.00"]


def test_nothing_is_picked_among_some(tmp_path: Path) -> None:
    for last, label, cell in ((None, "a (λ=?)", "-"), ("failed", "a (λ=?)", "failed"), ("diverged", "a (λ=0.1)", "4.00 ± 0.00")):
        values = FINE | {("a", "", "0.2", True): [1.0, 2.0, last]}
        lines = made(tmp_path / str(last), spec_of(Row("base"), Row("a", **HELD_OUT)), values)
        assert printed(lines, tmp_path / str(last))[label] == [cell]
        assert set(due(*lines, guess=True)[0]["choice"]) == {"", "0.1"}


def test_what_diverged_while_choosing_is_said_and_no_failure_unless_it_is_printed(tmp_path: Path) -> None:
    """Printed are the final runs of the picked choice; and that all of the trials diverged, as there is no number then."""
    spec = spec_of(Row("base"), Row("a", **HELD_OUT))
    _, _, found = lines = made(tmp_path, spec, FINE | {("a", "", "0.2", True): ["diverged", 1.0, "diverged"]})
    wanted, trials = due(*lines)
    raise_failed(lines)
    facts = choosing(trials, rejected(spec, wanted, trials, found), found)
    assert facts[0].startswith("to choose λ: 6 of 6 runs; ") and facts[1:] == ["diverged while choosing: a λ=0.2 seeds 1, 3 (CE)"]
    for name, change, cell, message in (
        ("trial", {("a", "", "0.2", True): [2.0, 1.0, "failed"]}, "failed", r"1 of 9 runs failed or diverged: .*RuntimeError: broken"),
        ("final", {("a", "0.2"): [6.0, 7.0, "diverged"]}, "6.50 ± 0.71 (2/3) div.", "1 of 12 runs"),
        ("all", {("a", "", weight, True): ["diverged"] * 3 for weight in ("0.1", "0.2")}, "div.", "6 of 9 runs"),
    ):
        lines = made(tmp_path / name, spec, FINE | change)
        assert [cell] in printed(lines, tmp_path / name).values()
        with pytest.raises(RunFailed, match=message):
            raise_failed(lines)


def test_a_choice_that_a_pick_on_the_printed_runs_left_may_diverge_unless_a_claim_is_about_it(tmp_path: Path) -> None:
    spec = spec_of(Row("a", grid=WEIGHTS, pick="min test/ce"))
    _, asked, found = made(tmp_path, spec, {("a", "0.1"): [1.0] * 3, ("a", "0.2"): [1.0, "diverged", 1.0]})
    wanted, trials = due(spec, asked, found)
    assert len(wanted) == 6 and trials.empty
    assert rejected(spec, wanted, trials, found)["choice"].unique() == ["0.2"]
    spec.claims = [Claim("", "test/ce", ["a"], "b")]
    assert rejected(spec, wanted, trials, found).empty
    shared = spec_of(Row("a", grid=WEIGHTS, pick="min test/ce"), Row("b", grid=WEIGHTS))  # a row that prints each of these runs
    both = pd.concat([wanted, wanted.assign(row="b")], ignore_index=True)
    assert rejected(shared, both, trials, found).empty


def test_choices_that_differ_stand_in_one_line(tmp_path: Path) -> None:
    columns = {name: Column("test/ce", ["d=1"], at=at) for name, at in (("A", None), ("A best", "min test/ce"))}
    columns["B"] = Column("test/ce", ["d=2"])
    spec = spec_of(Row("a", **HELD_OUT | {"against": None}, extra={"B": {"method.x.weight": [0.3]}}, paper={"choice": 7}), **columns)
    values = {("a", "d=1", weight, True): [value] * 3 for weight, value in (("0.1", 1.0), ("0.2", 2.0))}
    values |= {("a", "d=2", weight, True): [value] * 3 for weight, value in (("0.1", 2.0), ("0.2", 2.0), ("0.3", 1.0))}
    values |= {("a", "d=1", "0.1", False): [5.0] * 3, ("a", "d=2", "0.3", False): [6.0] * 3}
    text = printed(made(tmp_path, spec, values), tmp_path)
    assert text == {"": ["A", "A best", "B"], "a (λ=0.1 A, 0.3 B, paper 7)": ["5.00 ± 0.00", "4.50 ± 0.00", "6.00 ± 0.00"]}
    for last, label in ((0.0, "a (λ=0.1, paper 7)"), (None, "a (λ=0.1 A, ? B, paper 7)")):
        values["a", "d=2", "0.1", True] = [0.0, 0.0, last]
        assert list(printed(made(tmp_path / label, spec, values), tmp_path)) == ["", label]


def test_a_best_epoch_does_not_change_the_pick(tmp_path: Path) -> None:
    """0.1 has the lower last number, 0.2 the lower best one: both columns show 0.1."""
    spec = spec_of(Row("a", grid=WEIGHTS, pick="min test/ce"), last=Column("test/ce"), best=Column("test/ce", at="min test/ce"))
    lines = made(tmp_path, spec, {("a", "0.1"): [2.0] * 3, ("a", "0.2"): [3.0] * 3})
    for identity in lines[1][lines[1]["choice"] == "0.2"]["id"].unique():
        lines[2][identity].log([{"step": 1, "test/ce": 0.0}, {"step": 2, "test/ce": 3.0}])
    assert printed(lines, tmp_path) == {"": ["last", "best"], "a (λ=0.1)": ["2.00 ± 0.00", "1.50 ± 0.00"]}


# trained


def trained(runs: Path) -> dict[tuple[float, float, int], float]:
    """(learning rate, weight or 0, seed) -> test/ce, of what is finished."""
    found = {}
    for path in runs.glob("*/*/result.json"):
        cfg = OmegaConf.load(path.parent / "config.yaml")
        weight = cfg.method.itdm_c.weight if cfg.method else 0
        found[cfg.optim.lr, weight, cfg.seed] = store.Run(path.parent).metrics()[-1]["test/ce"]
    return found


def test_two_waves(command: Command, extra: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned, interrupted between the waves, gone on with, and asked again."""
    held_out = "weight: [0.2, 0.6]}, pick: min test/ce, select: [optim.lr=0.01]}"
    (extra / "table" / "waves.yaml").write_text(SPEC.replace("weight: [0.2, 0.4]}}", held_out))
    runs = tmp_path / "runs"
    code, out, err = command("table=waves", "launch=false")
    assert (code, err) == (0, "") and grid(out)["with (λ=?)"][0] == "-" and "no run of 2 is done" in out
    code, out, err = command("table=waves", "plan=true")
    assert grid(out)["with"][:5] == ["6", "0", "0", "0", "0"] and "8 different runs" in out
    assert "- λ is not picked yet, its first value stands in: with\n" in f"{out}\n"

    plain = Trainer.take_step

    def interrupted(self: Trainer, *given: object) -> object:
        if self.cfg.method and self.cfg.optim.lr == 0.05:  # a run of the second wave
            raise KeyboardInterrupt
        return plain(self, *given)

    monkeypatch.setattr(Trainer, "take_step", interrupted)
    code, out, _ = command("table=waves")
    assert code == 130 and re.findall(r"\d+ of \d+ runs are", out) == ["6 of 6 runs are", "2 of 8 runs are"]
    first = trained(runs)
    assert first.keys() == {(0.05, 0, 1), (0.05, 0, 2)} | {(0.01, weight, seed) for weight in (0.2, 0.6) for seed in (1, 2)}
    best = min((0.2, 0.6), key=lambda weight: first[0.01, weight, 1] + first[0.01, weight, 2])

    monkeypatch.setattr(Trainer, "take_step", plain)
    code, out, err = command("table=waves")
    assert (code, err) == (0, "") and re.findall(r"\d+ of \d+ runs are", out) == ["2 of 8 runs are"]
    second = trained(runs)
    assert second.keys() - first.keys() == {(0.05, best, 1), (0.05, best, 2)}
    text = out[out.index("## ") :]
    assert grid(text)[f"with (λ={best})"][2].startswith(f"{(second[0.05, best, 1] + second[0.05, best, 2]) / 2:.4f} ± ")
    assert "- λ is picked by test/ce of runs with optim.lr=0.01" in text and "- to choose λ: 4 of 4 runs; commit " in text
    assert command("table=waves") == (0, text, "") and trained(runs) == second
