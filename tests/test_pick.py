"""Picks: the values of a grid, a run's number, and what is picked."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_table import SPEC, WEIGHTS, Command, command, extra, grid, made, printed, spec_of

from experiments import pick
from experiments.config import ConfigError
from experiments.pick import choices
from experiments.spec import Column, Row

__all__ = ["command", "extra"]  # fixtures

# numbers

ROWS = [{"step": float(step), "test/ce": ce, "test/accuracy": accuracy} for step, ce, accuracy in [(1, 3, 10), (2, 1, 40), (3, 2, 60)]]


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        ("last", 60),
        ("last2", 50),
        ("last10", 110 / 3),
        ("median10", 40),
        ("median2", 50),
        ("min test/ce", 40),
        ("max test/ce", 10),
        ("max step", 60),
    ],
)
def test_reduce(at: str, expected: float) -> None:
    assert pick.reduce(ROWS, "test/accuracy", at) == pytest.approx(expected)


def test_reduce_takes_ten_of_more() -> None:
    rows = [{"a": float(value)} for value in range(30)]
    assert pick.reduce(rows, "a", "last10") == sum(range(20, 30)) / 10
    assert pick.reduce([*rows, {"a": 1000.0}], "a", "median10") == 25.5 and pick.reduce([*rows, {"a": 1000.0}], "a", "last10") > 100


@pytest.mark.parametrize(
    ("metric", "at", "message"),
    [
        ("valid/ce", "last", "metric 'valid/ce' was not measured; there are step, test/ce, test/accuracy"),
        ("test/ce", "min valid/ce", "table.at: 'min valid/ce' is not known"),
        ("test/ce", "mean test/ce", "table.at: 'mean test/ce' is not known"),
        ("test/ce", "first", "table.at: 'first' is not known"),
        ("test/ce", "lastly", "table.at: 'lastly' is not known"),
        ("test/ce", "median", "table.at: 'median' is not known"),
        ("test/ce", "last0.5", "table.at: 'last0.5' is not known"),
    ],
)
def test_reduce_refuses(metric: str, at: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        pick.reduce(ROWS, metric, at)


# grids


def test_choices_of_a_grid() -> None:
    assert choices(Row("a")) == [("", [])]
    assert choices(Row("a", grid={"x.b": [1, 2]})) == [("1", ["x.b=1"]), ("2", ["x.b=2"])]
    assert choices(Row("a", grid={"x.b": [1], "y.c": [3, 4]})) == [
        ("b=1, c=3", ["x.b=1", "y.c=3"]),
        ("b=1, c=4", ["x.b=1", "y.c=4"]),
    ]


def test_extra_values_are_those_of_columns_with_the_word() -> None:
    row = Row("a", grid={"x.b": [3e-4, 1e-4]}, extra={"B": {"x.b": [1e-4, 1e-6]}, "best": {"x.b": [7]}})
    names = {column: [name for name, _ in choices(row, column)] for column in ("A", "B", "B best", "Bbest")}
    plain = ["0.0003", "0.0001"]
    assert names == {"A": plain, "B": [*plain, "1e-06"], "B best": [*plain, "1e-06", "7"], "Bbest": plain}
    assert choices(row, "B")[2] == ("1e-06", ["x.b=1e-06"])
    assert row.grid == {"x.b": [3e-4, 1e-4]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Row("a", grid={"x": [1]}, extra={"C": {"x": [2]}}), "table.rows: 'a': extra word 'C' is not known; allowed: A, B"),
        (Row("a", grid={"x": [1]}, extra={"B": {"y": [2]}}), "table.rows: 'a': extra key 'y' is not known; allowed: x"),
        (Row("a", quoted={"C": 1.0}), "table.rows: 'a': quoted column 'C' is not known; allowed: A, B"),
        (Row("a", doubted=["C"]), "table.rows: 'a': doubted column 'C' is not known; allowed: A, B"),
        (Row("a", grid={"x": [1]}, select=["y=1"]), "table.rows: 'a' has `select`, and no `grid` and `pick` that it could serve"),
        (Row("a", pick="min z", select=["y=1"]), "table.rows: 'a' has `select`, and no `grid` and `pick` that it could serve"),
        (Row("a", pick="best z"), "table.rows: 'a': pick 'best z' is not known; allowed: 'min METRIC', 'max METRIC'"),
        (Row("a", pick="min"), "table.rows: 'a': pick 'min' is not known; allowed: 'min METRIC', 'max METRIC'"),
    ],
)
def test_rows_that_cannot_be_meant(row: Row, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        pick.check_rows(spec_of(row, A=Column("z"), B=Column("z")))


def test_extra_is_checked_before_the_table_is_cut(command: Command, extra: Path) -> None:
    """A word of a column that is not asked for is no mistake; one of no column is, in one line."""
    text = SPEC.replace("[0.2, 0.4]}}", "[0.2]}, extra: {CE: {method.itdm_c.weight: [0.4]}}}").replace(
        "test/ce, better", "test/ce, overrides: [batch_size=20], better"
    )
    (extra / "table" / "more.yaml").write_text(text)
    code, out, err = command("table=more", "launch=false")
    assert (code, err) == (0, "")
    assert {label: line[0] for label, line in grid(out).items() if label} == {"without": "-", "with λ=0.2": "-", "with λ=0.4": ""}
    code, out, err = command("table=more", "launch=false", "only=[ACC]")
    assert (code, err) == (0, "") and list(grid(out)) == ["", "without", "with λ=0.2"]
    (extra / "table" / "more.yaml").write_text(text.replace("extra: {CE:", "extra: {KE:"))
    code, _, err = command("table=more", "launch=false")
    assert (code, err) == (2, "retable: table.rows: 'with': extra word 'KE' is not known; allowed: ACC, CE\n")


@pytest.mark.parametrize(
    ("how", "values", "label", "number"),
    [
        ("min test/ce", ([3.0, 3.0, 3.0], [2.0, 2.0, 3.5]), "a (λ=0.2, paper 0.1)", "2.50 ± 0.87"),
        ("max test/ce", ([3.0, 3.0, 3.0], [2.0, 2.0, 3.5]), "a (λ=0.1, paper 0.1)", "3.00 ± 0.00"),
        ("min test/ce", ([3.0, 3.0, 3.0], [2.0, 2.0, None]), "a (λ=?, paper 0.1)", "-"),
        ("min test/ce", ([3.0, 3.0, 3.0], [2.0, 2.0, "failed"]), "a (λ=?, paper 0.1)", "failed"),
        ("min test/ce", ([3.0, 3.0, 3.0], [2.0, 2.0, "diverged"]), "a (λ=0.1, paper 0.1)", "3.00 ± 0.00"),
    ],
)
def test_pick(tmp_path: Path, how: str, values: tuple[list, list], label: str, number: str) -> None:
    spec = spec_of(Row("a", grid=WEIGHTS, pick=how, paper={"CE": 2, "choice": "0.1"}))
    shown = printed(made(tmp_path, spec, {("a", "0.1"): values[0], ("a", "0.2"): values[1]}), tmp_path)
    assert list(shown) == ["", label] and shown[label][0] == number
