"""Whole papers: which tables are theirs, the plan, the order, and the verdicts of all of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_table import FAILING, SPEC, Command, command, extra

from experiments import paper
from experiments.config import options

__all__ = ["command", "extra"]  # fixtures


def test_every_table_and_figure_is_of_one_paper() -> None:
    known = paper.papers()
    assert list(known) == ["itdm", "lamix", "per", "unitization"]
    of = [part for parts in known.values() for part in parts]
    assert len(of) == len(set(of))
    every = {(kind, name) for kind in ("table", "figure") for name in options(kind)}
    left = {name for kind, name in every - set(of)}
    assert all("demo" in name or name == "covariate_shift" for name in left)


@pytest.fixture
def mine(extra: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A paper of two tables, the first the dearer one, and a figure without runs."""
    (extra / "table" / "mine_1.yaml").write_text(SPEC.replace("epochs=1,", "epochs=3,"))
    claim = "claims: [{says: it wins, metric: test/accuracy, of: [plain], against: smoothed, relation: '>'}]"
    (extra / "table" / "mine_2.yaml").write_text(f"{FAILING}{claim}\n")
    names = {"mine": [("table", "mine_1"), ("table", "mine_2"), ("figure", "unitization_bounds")]}
    monkeypatch.setattr(paper, "papers", lambda: names)
    return extra


def test_the_plan_is_cheapest_first(command: Command, mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments import cost, plan

    monkeypatch.setattr(plan, "measure", lambda cfg, timed: cost.Estimate(360.0, 1, 0, "made up"))
    code, out, err = command("paper=mine", "plan=true", task=paper.run, root="papers")
    assert code == 0, err
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("| ")]
    # epochs=3 for each of six runs, and 2 for each of six; not one is stored
    assert rows == [
        ["", "runs", "shared", "missing", "hours"],
        ["figure unitization_bounds", "0", "0", "0", "0.00"],
        ["table mine_2", "6", "0", "6", "1.20"],
        ["table mine_1", "6", "0", "6", "1.80"],
    ]
    assert "- 3.00 hours one after another\n" in out and not (tmp_path / "runs").exists()


def test_shared_runs_count_once(command: Command, mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments import cost, plan

    (mine / "table" / "mine_2.yaml").write_text((mine / "table" / "mine_1.yaml").read_text())
    monkeypatch.setattr(plan, "measure", lambda cfg, timed: cost.Estimate(360.0, 1, 0, "made up"))
    _, out, _ = command("paper=mine", "plan=true", task=paper.run, root="papers")
    assert re.search(r"table mine_1 +\| 6 +\| 0 +\| 6 +\| 1.80", out) and re.search(r"table mine_2 +\| 6 +\| 6 +\| 6 +\| 0.00", out)


@pytest.mark.usefixtures("untraced")
def test_all_are_asked_for_and_their_verdicts_are_one_list(command: Command, mine: Path, tmp_path: Path) -> None:
    """One of them has a run that diverges: the others are printed all the same, and the exit code is the worst."""
    words = ["profile.steps=1", "profile.seeds=1", "paper=mine", f"out={tmp_path}/out"]
    code, out, _ = command(*words, task=paper.run, root="papers")
    assert code == 1
    order = re.findall(r"^\[(\d)/3\] (\w+ \w+)$", out, re.MULTILINE)
    assert [number for number, _ in order] == ["1", "2", "3"] and order[0][1] == "figure unitization_bounds"
    assert out.index("the plan") < out.index("[1/3]") < out.index("## A tiny table") < out.index("the verdicts")
    text = (tmp_path / "out" / "mine-verdicts.md").read_text()
    assert out.endswith(f"{text}\n{tmp_path}/out/mine-verdicts.md\n")
    assert re.search(r"^- mine_1: \*\*(not )?seen once\*\*: it helps \(.*\)$", text, re.MULTILINE)
    assert re.search(r"^- mine_2: \*\*(not )?seen once\*\*: it wins \(.*\)$", text, re.MULTILINE)
    assert len(list((tmp_path / "runs").glob("*/*/result.json"))) == 9
    assert {path.suffix for path in (tmp_path / "out").glob("mine_1*")} == {".md", ".tex", ".csv"}


def test_on_a_cluster_all_are_submitted_first(command: Command, mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments import cost, plan

    asked = []
    monkeypatch.setattr(plan, "measure", lambda cfg, timed: cost.Estimate(360.0, 1, 0, "made up"))
    monkeypatch.setattr(paper, "ask", lambda part, words, quiet=False: asked.append((part.name, quiet, words)) or (0, []))
    words = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu", "seed=1"]
    assert command("paper=mine", *words, task=paper.run, root="papers")[0] == 0
    names = ["mine_2", "mine_1"]
    assert [name for name, quiet, _ in asked] == [*names, "unitization_bounds", *names]
    assert [quiet for _, quiet, _ in asked] == [True, True, False, False, False]
    assert all({*words} <= {*given} and ("wait=false" in given) == quiet for _, quiet, given in asked)
    assert all(f"--config-dir={mine}" in given for *_, given in asked)


def test_in_a_time_box_no_steps_are_timed_and_the_rest_is_left(command: Command, mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments import plan

    def measure(*_: object) -> None:
        raise AssertionError("this takes minutes")

    asked: list[str] = []
    monkeypatch.setattr(plan, "measure", measure)
    monkeypatch.setattr(paper, "ask", lambda part, words: asked.append(part.name) or (0, []))
    monkeypatch.setattr(paper.timebox, "left", lambda runtime: runtime.time_limit * (2 - len(asked)))
    code, out, err = command("paper=mine", "runtime.time_limit=60", task=paper.run, root="papers")
    assert (code, err) == (0, "") and asked == ["mine_1", "mine_2"]
    assert out.endswith("\nthe time box has ended before figure unitization_bounds; ask again and it goes on\n")


def test_bad_input(command: Command) -> None:
    code, _, err = command("paper=nix", task=paper.run, root="papers")
    assert (code, err) == (2, "retable: paper: nix is not known; allowed: itdm, lamix, per, unitization, all\n")
