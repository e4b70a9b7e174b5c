"""A filled table as text: every mark a cell can have, and what stands below the table."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from tables import FACTS, WEIGHTS, made, printed, spec_of

from experiments import table
from experiments.claims import verdict
from experiments.show import reading, show
from experiments.spec import Claim, Column, Row


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


def test_no_better_than_chance_is_diverged(tmp_path: Path) -> None:
    """However a run came to nothing: one whose loss left the numbers counts with chance, is said, and is no failure."""
    rows = {
        "learned": (71.5, [70.0, 73.0, 10.0], ["70.00 ± 35.54", "71.5 (-1.50) ="]),
        "stuck": (10.0, [10.0, 10.5, 9.0], ["10.00 ± 0.76 div.", "10.0 div. (+0.00) ="]),
        "one left the numbers": (None, [60.0, "diverged", 61.0], ["60.00 ± 28.87", ""]),
        "two did": (None, [60.0, "diverged", "diverged"], ["10.50 ± 28.58 div.", ""]),
        "one failed": (None, [60.0, "failed", 61.0], ["60.50 ± 0.71 (2/3) failed", ""]),
        "missing": (10.0, [None, None, None], ["-", "10.0 div."]),
    }
    spec = spec_of(
        *(Row(label, paper={} if paper is None else {"ACC": paper}) for label, (paper, _, _) in rows.items()),
        ACC=Column("test/accuracy", chance=10.5),
    )
    spec.over = "median"
    lines = made(tmp_path, spec, {(label, ""): values for label, (_, values, _) in rows.items()}, "test/accuracy")
    shown = printed(lines, tmp_path)
    assert {label: shown[label] for label in rows} == {label: cells for label, (_, _, cells) in rows.items()}
    assert "- ACC: div. at 10.5 or worse, which is chance" in (tmp_path / "out" / "name.md").read_text()
    for metric, word in (("test/accuracy", "not decided"), ("test/other", "not run")):
        spec.columns["ACC"].metric = metric
        claim = Claim("one beats two", "test/accuracy", ["one left the numbers"], "two did", relation=">")
        assert verdict(claim, *lines).verdict == word

    assert [Column("test/error", better="min", chance=89.5).idle(number) for number in (89.4, 89.5)] == [False, True]


def test_names_and_numbers_of_choices(tmp_path: Path) -> None:
    rows = {"a": {"method.x.weight": [1]}, "b": {"norm.num_groups": [1]}, "c": {"norm.num_groups": [1], "model.y": [2]}}
    lines = made(tmp_path, spec_of(*(Row(label, grid=grid) for label, grid in rows.items())), {})
    assert set(printed(lines, tmp_path)) == {"", "a λ=1", "b num_groups=1", "c num_groups=1, y=2"}
    spec = spec_of(Row("a", grid=WEIGHTS, paper={"0.1": {"CE": "1.5±0.25"}, "0.2": {"CE": 7}}))
    cells = table.fill(*made(tmp_path, spec, {("a", "0.1"): [1.0] * 3, ("a", "0.2"): [1.0] * 3}))
    assert cells["paper"].tolist() == [1.5, 7.0] and cells["paper_std"].fillna(-1).tolist() == [0.25, -1]
    assert cells["gap"].tolist() == [-0.5, -6.0]


def test_files(tmp_path: Path) -> None:
    """Markdown, LaTeX and CSV; a table that was written before is replaced, and no temporary file stays."""
    claim = Claim("it & they help", "test/ce", ["a_b"], "base", relation="<")
    spec = spec_of(Row("base", paper={"CE": "3±1"}), Row("a_b"), claims=[claim])
    spec.notes = ["a note"]
    for shift in (0, 1):
        _, wanted, found = made(tmp_path / str(shift), spec, {("base", ""): [3.0 + shift, 4, 5], ("a_b", ""): [1.0, 1, 1]})
        judged = [verdict(claim, spec, wanted, found)]
        text = show(spec, wanted, found, table.fill(spec, wanted, found), judged, tmp_path / "out" / "name.of.it")
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["name.of.it.csv", "name.of.it.md", "name.of.it.tex"]
    markdown, latex = (out / "name.of.it.md").read_text(), (out / "name.of.it.tex").read_text()
    assert text == f"{markdown}{out}/name.of.it.md .tex .csv"
    assert "4.33 ± 0.58" in markdown and "4.00 ± 1.00" not in markdown
    assert f"- **{judged[0].verdict}**: it & they help ({judged[0].why})" in markdown and "- a note" in markdown
    assert "commit abc;" in markdown and "6.0 minutes of training" in markdown and "made up" in markdown and "MIXED" not in markdown
    assert r"a\_b" in latex and r"4.33 $\pm$ 0.58" in latex and r"Made up\_100\%" in latex and r"\bottomrule" in latex
    assert all(line.count("&") == 2 for line in latex.splitlines() if line.endswith(r"\\")) and "% " in latex
    cells = pd.read_csv(out / "name.of.it.csv")
    assert cells["ours"].tolist() == pytest.approx([13 / 3, 1]) and cells["of_commit"].tolist() == ["abc"] * 2
    found["0000000001"].finish(FACTS | {"commit": "def", "dirty": True})
    assert "commit abc, def with changes (MIXED" in show(spec, wanted, found, table.fill(spec, wanted, found), [], out / "x")


def test_quoted_and_doubted_numbers(tmp_path: Path) -> None:
    """A quoted number stands beside the paper's, where a column has any; a doubted number is marked and not judged."""
    rows = [Row("a", paper={"CE": "2±0.25"}, quoted={"CE": 7.8}, doubted=["CE"]), Row("b", paper={"CE": "78.4±0.3"}, quoted={"CE": 30.25})]
    spec = spec_of(*rows, Row("c", doubted=["CE"]), CE=Column("test/ce"), other=Column("test/ce"))
    lines = made(tmp_path, spec, {(name, ""): [1.0, 2.0, 3.0] for name in "abc"})
    ours = "2.00 ± 1.00"
    assert printed(lines, tmp_path) == {
        "": ["CE", "CE paper", "CE quoted", "other"],
        "a": [ours, "2.0 ± 0.25 ? (+0.00)", "7.80", ours],
        "b": [ours, "78.4 ± 0.30 (-76.40) ≠", "30.25", ours],  # as many decimals as the column has
        "c": [ours, "", "", ours],
    }
    notes = ("- quoted: a number that the paper cites from other work\n", "- ?: a printed number that is not to be trusted")
    assert all(note in (tmp_path / "out" / "name.md").read_text() for note in notes)
    cells = pd.read_csv(tmp_path / "out" / "name.csv")
    assert cells["quoted"].dropna().tolist() == [7.8, 30.25]
    assert cells[cells["column"] == "CE"]["doubted"].tolist() == [True, False, True]


def test_a_column_can_be_read_in_its_own_way_and_differences_are_paired_by_seed(tmp_path: Path) -> None:
    columns = {"last": Column("test/ce"), "best": Column("test/ce", at="min test/ce"), "mean": Column("test/ce", at="last5")}
    columns |= {"gain": Column("test/ce", delta=True), "best gain": Column("test/ce", delta=True, at="max test/ce")}
    spec = spec_of(Row("base"), Row("a", against="base"), **columns)
    spec, wanted, found = lines = made(tmp_path, spec, {("base", ""): [1.0, 5.0, 9.0], ("a", ""): [2.0, 6.1, 9.9]})
    shown = printed(lines, tmp_path)
    assert shown["a"] == ["6.00 ± 3.95", "5.50 ± 3.95", "5.75 ± 3.95", "1.00 ± 0.10", "1.00 ± 0.10"]
    assert shown["base"][3:] == ["-", "-"]
    for identity in wanted[wanted["row"] == "a"]["id"].unique():  # the last evaluation is neither the least nor the greatest
        found[identity].log([{"step": 1, "test/ce": value} for value in (4.0, 2.0, 3.0)])
    assert printed(lines, tmp_path)["a"][:3] == ["3.00 ± 0.00", "2.00 ± 0.00", "3.00 ± 0.00"]
    assert reading(spec, wanted)[1:] == [
        "best: instead, the evaluation with min test/ce, chosen on the test set and so optimistic",
        "mean: instead, the evaluation with last5",
        "best gain: instead, the evaluation with max test/ce, chosen on the test set and so optimistic",
    ]


def test_how_λ_was_picked_is_said_for_each_way() -> None:
    ways = [("min valid/ce", ["d.valid=0.1"]), ("min test/ce", []), ("min valid/ce", ["d.valid=0.1"]), ("min test/ce", ["x=1", "y=2"])]
    rows = [Row(f"r{number}", grid=WEIGHTS, pick=pick, select=select) for number, (pick, select) in enumerate(ways)]
    assert reading(spec_of(*rows), pd.DataFrame({"seed": [1]}))[1:] == [
        "λ of r0, r2 is picked by valid/ce of runs with d.valid=0.1, then trained without it",
        "λ of r1 is picked on the test set, as the paper did: these numbers are optimistic",
        "λ of r3 is picked by test/ce of runs with x=1 y=2, then trained without them: on the test set, so these numbers are optimistic",
    ]
