"""Claims: the verdict on each of a paper's sentences, and the statistics behind it, against SciPy's."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from scipy import stats
from test_table import WEIGHTS, made, spec_of

from experiments.claims import _compare, _trend, verdict
from experiments.config import ConfigError
from experiments.pick import numbers
from experiments.spec import Claim, Column, Row

COMPARE = Claim("better", "test/ce", ["a"], "base", relation="<")
BASE, BELOW, CLOSE, ABOVE = [2.0, 3.0, 4.0], [1.0, 2.1, 2.9], [1.9, 3.2, 3.8], [3.0, 4.1, 4.9]


def compared(tmp_path: Path, first: list, second: list, claim: Claim = COMPARE, base: list | None = None) -> tuple[str, str]:
    seeds = len(first)
    spec = spec_of(Row("base"), Row("a", grid=WEIGHTS), seeds=seeds)
    values = {("base", ""): base or BASE[:seeds], ("a", "0.1"): first, ("a", "0.2"): second}
    _, wanted, found = made(tmp_path, spec, values)
    judged = verdict(claim, spec, wanted, found)
    return judged.verdict, judged.why


def p_value(first: list[float], second: list[float], side: str) -> float:
    return float(stats.ttest_rel(first, second, alternative=side).pvalue)


def test_compare_reproduced(tmp_path: Path) -> None:
    largest = max(p_value(BELOW, BASE, "less"), p_value([0.0, 1.2, 2.0], BASE, "less"))
    assert largest < 0.05
    assert compared(tmp_path, BELOW, [0.0, 1.2, 2.0]) == ("reproduced", f"2 of 2 comparisons, largest p = {largest:.2g} over 3 seeds")


def test_compare_not_reproduced(tmp_path: Path) -> None:
    smallest = p_value(ABOVE, BASE, "greater")
    assert smallest < 0.05 / 2
    assert compared(tmp_path, BELOW, ABOVE) == ("not reproduced", f"1 of 2 comparisons, p = {smallest:.2g} against it over 3 seeds")


def test_compare_not_decided(tmp_path: Path) -> None:
    largest = p_value(CLOSE, BASE, "less")
    assert 0.05 < largest < 0.95
    assert compared(tmp_path, BELOW, CLOSE) == ("not decided", f"2 of 2 comparisons, largest p = {largest:.2g} over 3 seeds")


@pytest.mark.parametrize("lack", [None, "failed", "diverged"])
def test_compare_not_run(tmp_path: Path, lack: str | None) -> None:
    assert compared(tmp_path, BELOW, [1.0, 2.0, lack]) == ("not run", "1 of 2 comparisons lack runs")


@pytest.mark.parametrize(("second", "expected"), [([1.5], "seen once"), ([2.5], "not seen once")])
def test_compare_of_one_seed(tmp_path: Path, second: list[float], expected: str) -> None:
    held = 2 if expected == "seen once" else 1
    assert compared(tmp_path, [1.0], second) == (expected, f"{held} of 2 comparisons, one seed: no test")


def test_margin(tmp_path: Path) -> None:
    """Up to 1.5 more is still no worse."""
    claim = Claim("comparable", "test/ce", ["a"], "base", relation="<", margin=1.5)
    largest = p_value(ABOVE, [value + 1.5 for value in BASE], "less")
    assert largest < 0.05
    assert compared(tmp_path / "1", ABOVE, ABOVE, claim) == ("reproduced", f"2 of 2 comparisons, largest p = {largest:.2g} over 3 seeds")
    assert compared(tmp_path / "2", ABOVE, ABOVE)[0] == "not reproduced"


def test_relation_upwards(tmp_path: Path) -> None:
    claim = Claim("worse", "test/ce", ["a"], "base", relation=">")
    assert compared(tmp_path / "1", ABOVE, ABOVE, claim)[0] == "reproduced"
    assert compared(tmp_path / "2", BELOW, BELOW, claim)[0] == "not reproduced"


@pytest.mark.parametrize(("shift", "expected"), [(-1.0, "reproduced"), (1.0, "not reproduced"), (0.0, "not decided")])
def test_equal_differences(tmp_path: Path, shift: float, expected: str) -> None:
    """No spread at all: no t statistic, but no doubt either."""
    moved = [value + shift for value in BASE]
    assert compared(tmp_path, moved, moved)[0] == expected


def test_columns_with_the_same_runs_count_once(tmp_path: Path) -> None:
    columns = {name: Column("test/ce") for name in ("A", "B", "C")}
    spec = spec_of(Row("base"), Row("a"), **columns)
    _, wanted, found = made(tmp_path, spec, {("base", ""): BASE, ("a", ""): BELOW})
    assert verdict(COMPARE, spec, wanted, found).why.startswith("seen, largest p = ")


def test_a_claim_about_several_rows_compares_each_with_its_own(tmp_path: Path) -> None:
    """Against the wrong one, `b` would be refuted: it lies above `base`."""
    spec = spec_of(Row("base"), Row("a", against="base"), Row("high"), Row("b", against="high"))
    values = {("base", ""): BASE, ("a", ""): BELOW, ("high", ""): [value + 5 for value in BASE], ("b", ""): ABOVE}
    _, wanted, found = made(tmp_path, spec, values)
    both = verdict(replace(COMPARE, of=["a", "b"], against=None), spec, wanted, found)
    assert both.verdict == "reproduced" and both.why.startswith("2 of 2 comparisons")
    assert verdict(replace(COMPARE, of=["a", "b"]), spec, wanted, found).verdict == "not reproduced"
    rising = Claim("grows", "test/ce", ["a", "b"], check="trend", relation="falling")
    assert verdict(rising, spec, wanted, found).why.startswith("2 of 2 comparisons")


def test_a_narrowed_claim_says_where_it_was_tried(tmp_path: Path) -> None:
    spec = spec_of(Row("base"), Row("a"), A=Column("test/ce"))
    _, wanted, found = made(tmp_path, spec, {("base", ""): BASE, ("a", ""): BELOW})
    claim = replace(COMPARE, columns=["A", "B"])
    assert verdict(claim, spec, wanted, found).why.endswith("; only in A")
    assert verdict(replace(COMPARE, of=["a", "b"]), spec, wanted, found).why.endswith("; only in a")
    assert "only in" not in verdict(COMPARE, spec, wanted, found).why


def trended(tmp_path: Path, lines: list[list[float | None]], relation: str = "rising", against: str | None = "base") -> tuple[str, str]:
    """`lines`: per seed, the value without and at each weight."""
    claim = Claim("grows", "test/ce", ["a"], against, check="trend", relation=relation)
    spec = spec_of(Row("base"), Row("a", grid={"method.x.weight": [0.2, 1, 0.1]}), seeds=len(lines))
    points = [("base", ""), ("a", "0.2"), ("a", "1"), ("a", "0.1")]
    _, wanted, found = made(tmp_path, spec, {point: list(column) for point, column in zip(points, zip(*lines, strict=True), strict=True)})
    judged = verdict(claim, spec, wanted, found)
    return judged.verdict, judged.why


RISING = [[1.0, 2.0, 3.0, 4.0], [1.1, 2.2, 2.9, 4.0], [1.0, 3.0, 2.0, 4.0]]


def test_trend(tmp_path: Path) -> None:
    """In the grid's order, which is not that of the numbers."""
    p = float(stats.page_trend_test(RISING, method="exact").pvalue)
    assert p < 0.05
    assert trended(tmp_path / "1", RISING) == ("reproduced", f"seen, largest p = {p:.2g} over 3 seeds")
    assert trended(tmp_path / "2", RISING, "falling") == ("not reproduced", f"not seen, p = {p:.2g} against it over 3 seeds")


def test_trend_not_decided(tmp_path: Path) -> None:
    lines = [[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0], [1.0, 3.0, 2.0, 4.0]]
    p = float(stats.page_trend_test(lines, method="exact").pvalue)
    assert trended(tmp_path, lines) == ("not decided", f"seen, largest p = {p:.2g} over 3 seeds")


def test_trend_of_one_seed_and_of_missing_runs(tmp_path: Path) -> None:
    assert trended(tmp_path / "1", RISING[:1]) == ("seen once", "seen, one seed: no test")
    assert trended(tmp_path / "2", RISING[:1], "falling") == ("not seen once", "not seen, one seed: no test")
    assert trended(tmp_path / "3", [RISING[0], [1.0, 2.0, None, 4.0]]) == ("not run", "1 of 1 comparisons lack runs")


def test_trend_between_two_points_is_their_difference(tmp_path: Path) -> None:
    claim = Claim("grows", "test/ce", ["a"], "base", check="trend", relation="rising")
    spec = spec_of(Row("base"), Row("a", grid={"method.x.weight": [0.2]}))
    base, after = [1.0, 2.0, 3.0], [1.5, 2.4, 3.9]
    _, wanted, found = made(tmp_path, spec, {("base", ""): base, ("a", "0.2"): after})
    p = float(stats.ttest_rel(after, base, alternative="greater").pvalue)
    assert verdict(claim, spec, wanted, found).why == f"seen, largest p = {p:.2g} over 3 seeds"


def test_trend_of_equal_values_is_none(tmp_path: Path) -> None:
    assert trended(tmp_path, [[2.0] * 4]) == ("not seen once", "not seen, one seed: no test")


def test_trend_without_its_start(tmp_path: Path) -> None:
    lines = [[9.0, *line[1:]] for line in RISING]
    p = float(stats.page_trend_test([line[1:] for line in RISING], method="exact").pvalue)
    assert trended(tmp_path, lines, against=None)[1] == f"seen, largest p = {p:.2g} over 3 seeds"


def test_tests_are_scipys(tmp_path: Path) -> None:
    spec = spec_of(Row("base"), Row("a"))
    _, wanted, found = made(tmp_path, spec, {("base", ""): BASE, ("a", ""): CLOSE})
    group = wanted.assign(value=numbers(wanted, found, "test/ce", "last"))
    (test,) = _compare(COMPARE, group, "a", ["base"])
    assert test.holds == pytest.approx(p_value(CLOSE, BASE, "less")) and test.fails == pytest.approx(p_value(CLOSE, BASE, "greater"))
    assert test.seeds == 3 and test.effect == pytest.approx(sum(BASE) / 3 - sum(CLOSE) / 3)
    claim = Claim("grows", "test/ce", ["a"], "base", check="trend", relation="rising")
    spec = spec_of(Row("base"), Row("a", grid=WEIGHTS))
    _, wanted, found = made(tmp_path / "trend", spec, {("base", ""): BASE, ("a", "0.1"): CLOSE, ("a", "0.2"): ABOVE})
    (test,) = _trend(claim, wanted.assign(value=numbers(wanted, found, "test/ce", "last")), "a", "base")
    expected = stats.page_trend_test(list(zip(BASE, CLOSE, ABOVE, strict=True)), predicted_ranks=[1, 2, 3], method="exact")
    assert test.holds == pytest.approx(expected.pvalue) and test.seeds == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"of": ["b"]}, "table.claims: 'b' is not a row; allowed: a, base"),
        ({"against": "b"}, "table.claims: 'b' is not a row; allowed: a, base"),
        ({"check": "guess"}, "table.claims: check 'guess' is not known; allowed: compare, best, trend"),
        ({"relation": "rising"}, "table.claims: a compare needs `against`, and a relation < or >"),
        ({"check": "trend"}, "table.claims: a trend's relation is rising or falling"),
        ({"metric": "test/acc"}, "table: metric 'test/acc' was not measured"),
    ],
)
def test_claims_that_cannot_be_judged(tmp_path: Path, change: dict[str, str], message: str) -> None:
    claim = Claim(**{"says": "", "metric": "test/ce", "of": ["a"], "against": "base", "relation": "<"} | change)
    spec = spec_of(Row("base"), Row("a"))
    with pytest.raises(ConfigError, match=re.escape(message)):
        verdict(claim, *made(tmp_path, spec, {("base", ""): BASE, ("a", ""): BELOW}))
