"""Claims: the verdict on each of a paper's sentences, and the statistics behind it, against SciPy's."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from scipy import stats
from tables import WEIGHTS, made, spec_of

from experiments.claims import verdict
from experiments.config import ConfigError
from experiments.spec import Claim, Row

COMPARE = Claim("better", "test/ce", ["a"], "base", relation="<")
BASE, BELOW, LOW, CLOSE, ABOVE = [2.0, 3.0, 4.0], [1.0, 2.1, 2.9], [0.0, 1.2, 2.0], [1.9, 3.2, 3.8], [3.0, 4.1, 4.9]


def compared(root: Path, first: list, second: list, claim: Claim = COMPARE) -> tuple[str, str]:
    """The claim about row a, which has two choices, against row base."""
    seeds = len(first)
    values = {("base", ""): BASE[:seeds], ("a", "0.1"): first, ("a", "0.2"): second}
    judged = verdict(claim, *made(root, spec_of(Row("base"), Row("a", grid=WEIGHTS), seeds=seeds), values))
    return judged.verdict, judged.why


def p_value(first: list[float], second: list[float], side: str) -> float:
    return float(stats.ttest_rel(first, second, alternative=side).pvalue)


def test_compare_is_a_paired_t_test(tmp_path: Path) -> None:
    largest = max(p_value(BELOW, BASE, "less"), p_value(LOW, BASE, "less"))
    assert compared(tmp_path / "1", BELOW, LOW) == ("reproduced", f"2 of 2 comparisons, largest p = {largest:.2g} over 3 seeds")
    smallest = p_value(ABOVE, BASE, "greater")
    assert compared(tmp_path / "2", BELOW, ABOVE) == ("not reproduced", f"1 of 2 comparisons, p = {smallest:.2g} against it over 3 seeds")
    largest = p_value(CLOSE, BASE, "less")
    assert compared(tmp_path / "3", BELOW, CLOSE) == ("not decided", f"2 of 2 comparisons, largest p = {largest:.2g} over 3 seeds")


def test_compare_without_a_test(tmp_path: Path) -> None:
    for lack in (None, "failed", "diverged"):
        assert compared(tmp_path / str(lack), BELOW, [1.0, 2.0, lack]) == ("not run", "1 of 2 comparisons lack runs")
    assert compared(tmp_path / "seen", [1.0], [1.5]) == ("seen once", "2 of 2 comparisons, one seed: no test")
    assert compared(tmp_path / "not seen", [1.0], [2.5]) == ("not seen once", "1 of 2 comparisons, one seed: no test")
    for shift, word in ((-1.0, "reproduced"), (1.0, "not reproduced"), (0.0, "not decided")):  # equal differences: no t statistic
        moved = [value + shift for value in BASE]
        assert compared(tmp_path / str(shift), moved, moved)[0] == word


def test_margin_and_direction(tmp_path: Path) -> None:
    """With a margin of 1.5, up to 1.5 more is still no worse."""
    claim = replace(COMPARE, margin=1.5)
    largest = p_value(ABOVE, [value + 1.5 for value in BASE], "less")
    assert compared(tmp_path / "1", ABOVE, ABOVE, claim) == ("reproduced", f"2 of 2 comparisons, largest p = {largest:.2g} over 3 seeds")
    assert compared(tmp_path / "2", ABOVE, ABOVE)[0] == "not reproduced"
    upwards = replace(COMPARE, relation=">")
    assert compared(tmp_path / "3", ABOVE, ABOVE, upwards)[0] == "reproduced"
    assert compared(tmp_path / "4", BELOW, BELOW, upwards)[0] == "not reproduced"


def test_a_claim_about_several_rows_compares_each_with_its_own(tmp_path: Path) -> None:
    """Against `base`, which it lies above, `b` would be refuted."""
    spec = spec_of(Row("base"), Row("a", against="base"), Row("high"), Row("b", against="high"))
    values = {("base", ""): BASE, ("a", ""): BELOW, ("high", ""): [value + 5 for value in BASE], ("b", ""): ABOVE}
    lines = made(tmp_path, spec, values)
    both = verdict(replace(COMPARE, of=["a", "b"], against=None), *lines)
    assert both.verdict == "reproduced" and both.why.startswith("2 of 2 comparisons")
    assert verdict(replace(COMPARE, of=["a", "b"]), *lines).verdict == "not reproduced"
    assert "only in" not in both.why and verdict(replace(COMPARE, of=["a", "gone"]), *lines).why.endswith("; only in a")
    falling = Claim("grows", "test/ce", ["a", "b"], check="trend", relation="falling")
    assert verdict(falling, *lines).why.startswith("2 of 2 comparisons")


def trended(
    root: Path, lines: list[list[float | None]], relation: str = "rising", against: str | None = "base", grid: tuple = (0.2, 1, 0.1)
) -> tuple[str, str]:
    """lines: per seed, the value of row base and at each weight, in the grid's order, which is not that of the numbers."""
    claim = Claim("grows", "test/ce", ["a"], against, check="trend", relation=relation)
    spec = spec_of(Row("base"), Row("a", grid={"method.x.weight": [*grid]}), seeds=len(lines))
    points = [("base", ""), *(("a", str(weight)) for weight in grid)]
    judged = verdict(claim, *made(root, spec, dict(zip(points, map(list, zip(*lines, strict=True)), strict=True))))
    return judged.verdict, judged.why


RISING = [[1.0, 2.0, 3.0, 4.0], [1.1, 2.2, 2.9, 4.0], [1.0, 3.0, 2.0, 4.0]]


def test_trend_is_pages_test(tmp_path: Path) -> None:
    def page(lines: list[list[float]]) -> float:
        return float(stats.page_trend_test(lines, method="exact").pvalue)

    p = page(RISING)
    assert trended(tmp_path / "1", RISING) == ("reproduced", f"seen, largest p = {p:.2g} over 3 seeds")
    assert trended(tmp_path / "2", RISING, "falling") == ("not reproduced", f"not seen, p = {p:.2g} against it over 3 seeds")
    mixed = [RISING[0], RISING[0][::-1], RISING[2]]
    assert trended(tmp_path / "3", mixed) == ("not decided", f"seen, largest p = {page(mixed):.2g} over 3 seeds")
    lines = [[9.0, *line[1:]] for line in RISING]  # without its start
    assert trended(tmp_path / "4", lines, against=None)[1] == f"seen, largest p = {page([line[1:] for line in RISING]):.2g} over 3 seeds"
    two = [line[:2] for line in RISING]  # of two points, their difference
    p = p_value([line[1] for line in two], [line[0] for line in two], "greater")
    assert trended(tmp_path / "5", two, grid=(0.2,))[1] == f"seen, largest p = {p:.2g} over 3 seeds"


def test_trend_without_a_test(tmp_path: Path) -> None:
    assert trended(tmp_path / "1", RISING[:1]) == ("seen once", "seen, one seed: no test")
    assert trended(tmp_path / "2", [RISING[0], [1.0, 2.0, None, 4.0]]) == ("not run", "1 of 1 comparisons lack runs")
    assert trended(tmp_path / "3", [[2.0] * 4]) == ("not seen once", "not seen, one seed: no test")


def test_claims_that_cannot_be_judged(tmp_path: Path) -> None:
    lines = made(tmp_path, spec_of(Row("base"), Row("a")), {("base", ""): BASE, ("a", ""): BELOW})
    for change, message in (
        ({"of": ["b"]}, "table.claims: 'b' is not a row; allowed: a, base"),
        ({"against": "b"}, "table.claims: 'b' is not a row; allowed: a, base"),
        ({"check": "guess"}, "table.claims: check 'guess' is not known; allowed: compare, best, trend"),
        ({"relation": "rising"}, "table.claims: a compare needs `against`, and a relation < or >"),
        ({"check": "best", "against": None}, "table.claims: a best needs `against`, and a relation < or >"),
        ({"check": "trend"}, "table.claims: a trend's relation is rising or falling"),
        ({"metric": "test/acc"}, "table: metric 'test/acc' was not measured"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            verdict(replace(COMPARE, **change), *lines)
