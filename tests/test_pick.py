"""Picks: the values of a grid, a run's number, and what is picked."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tables import SPEC, WEIGHTS, Command, grid, made, printed, spec_of

from experiments import pick
from experiments.config import ConfigError
from experiments.pick import choices
from experiments.spec import Column, Row

ROWS = [{"step": float(step), "test/ce": ce, "test/accuracy": accuracy} for step, ce, accuracy in [(1, 3, 10), (2, 1, 40), (3, 2, 60)]]


def test_reduce() -> None:
    ways = {"last": 60, "last2": 50, "last10": 110 / 3, "median10": 40, "median2": 50, "min test/ce": 40, "max test/ce": 10}
    for at, expected in ways.items():
        assert pick.reduce(ROWS, "test/accuracy", at) == pytest.approx(expected), at
    assert pick.reduce([{"a": float(value)} for value in range(30)], "a", "last10") == sum(range(20, 30)) / 10

    with pytest.raises(ConfigError, match="metric 'valid/ce' was not measured; there are step, test/ce, test/accuracy"):
        pick.reduce(ROWS, "valid/ce", "last")
    for at in ("min valid/ce", "mean test/ce", "lastly", "median", "last0.5"):
        with pytest.raises(ConfigError, match=f"table.at: {at!r} is not known"):
            pick.reduce(ROWS, "test/ce", at)


def test_choices_of_a_grid() -> None:
    assert choices(Row("a")) == [("", [])]
    assert choices(Row("a", grid={"x.b": [1, 2]})) == [("1", ["x.b=1"]), ("2", ["x.b=2"])]
    two = [("b=1, c=3", ["x.b=1", "y.c=3"]), ("b=1, c=4", ["x.b=1", "y.c=4"])]
    assert choices(Row("a", grid={"x.b": [1], "y.c": [3, 4]})) == two
    # extra values are those of columns with the word
    row = Row("a", grid={"x.b": [3e-4, 1e-4]}, extra={"B": {"x.b": [1e-4, 1e-6]}, "best": {"x.b": [7]}})
    names = {column: [name for name, _ in choices(row, column)] for column in ("A", "B", "B best", "Bbest")}
    plain = ["0.0003", "0.0001"]
    assert names == {"A": plain, "B": [*plain, "1e-06"], "B best": [*plain, "1e-06", "7"], "Bbest": plain}
    assert choices(row, "B")[2] == ("1e-06", ["x.b=1e-06"]) and row.grid == {"x.b": [3e-4, 1e-4]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Row("a", grid={"x": [1]}, extra={"C": {"x": [2]}}), ": extra word 'C' is not known; allowed: A, B"),
        (Row("a", grid={"x": [1]}, extra={"B": {"y": [2]}}), ": extra key 'y' is not known; allowed: x"),
        (Row("a", quoted={"C": 1.0}), ": quoted column 'C' is not known; allowed: A, B"),
        (Row("a", doubted=["C"]), ": doubted column 'C' is not known; allowed: A, B"),
        (Row("a", grid={"x": [1]}, select=["y=1"]), " has `select`, and no `grid` and `pick` that it could serve"),
        (Row("a", pick="min z", select=["y=1"]), " has `select`, and no `grid` and `pick` that it could serve"),
        (Row("a", pick="best z"), ": pick 'best z' is not known; allowed: 'min METRIC', 'max METRIC'"),
    ],
)
def test_rows_that_cannot_be_meant(row: Row, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^table.rows: 'a'{re.escape(message)}$"):
        pick.check_rows(spec_of(row, A=Column("z"), B=Column("z")))


def test_extra_is_checked_before_the_table_is_cut(command: Command, extra: Path) -> None:
    """A word of a column that is not asked for is no mistake; a word of no column is."""
    text = SPEC.replace("[0.2, 0.4]}}", "[0.2]}, extra: {CE: {method.itdm_c.weight: [0.4]}}}")
    text = text.replace("test/ce, better", "test/ce, overrides: [batch_size=20], better")
    (extra / "table" / "more.yaml").write_text(text)
    for only, cells in (("", {"without": "-", "with λ=0.2": "-", "with λ=0.4": ""}), ("ACC", {"without": "-", "with λ=0.2": "-"})):
        code, out, err = command("table=more", "launch=false", f"only=[{only}]")
        assert (code, err) == (0, "") and {label: line[0] for label, line in grid(out).items() if label} == cells
    (extra / "table" / "more.yaml").write_text(text.replace("extra: {CE:", "extra: {KE:"))
    code, _, err = command("table=more", "launch=false")
    assert (code, err) == (2, "retable: table.rows: 'with': extra word 'KE' is not known; allowed: ACC, CE\n")


def test_pick(tmp_path: Path) -> None:
    for number, (how, last, label, cell) in enumerate(
        (
            ("min test/ce", 3.5, "a (λ=0.2, paper 0.1)", "2.50 ± 0.87"),
            ("max test/ce", 3.5, "a (λ=0.1, paper 0.1)", "3.00 ± 0.00"),
            ("min test/ce", None, "a (λ=?, paper 0.1)", "-"),
            ("min test/ce", "failed", "a (λ=?, paper 0.1)", "failed"),
            ("min test/ce", "diverged", "a (λ=0.1, paper 0.1)", "3.00 ± 0.00"),
        )
    ):
        spec = spec_of(Row("a", grid=WEIGHTS, pick=how, paper={"CE": 2, "choice": "0.1"}))
        lines = made(tmp_path / str(number), spec, {("a", "0.1"): [3.0] * 3, ("a", "0.2"): [2.0, 2.0, last]})
        shown = printed(lines, tmp_path)
        assert list(shown) == ["", label] and shown[label][0] == cell
