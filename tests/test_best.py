"""The claim "best": each cell against its closest rival, and how many cells must hold."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from scipy import stats
from tables import FINE, HELD_OUT, WEIGHTS, Made, made, spec_of
from test_claims import p_value

from experiments.claims import Verdict, verdict
from experiments.config import ConfigError
from experiments.pick import due, rejected
from experiments.spec import Claim, Column, Row
from experiments.table import narrowed

BEST = Claim("best", "test/ce", ["P"], check="best", relation="<")
PLAIN, BN, VCL, PER = [5.0, 6.0, 7.0], [4.0, 5.1, 5.9], [4.1, 4.9, 6.2], [3.0, 4.2, 4.9]


def judged(root: Path, claim: Claim = BEST, papers: tuple[float, ...] = (), **values: list[float | str | None]) -> Verdict:
    """Rows V, B, C and P of the paper, P with all of them as rivals; and two better rows that are none of its rivals."""
    lines = {"V": PLAIN, "B": BN, "C": VCL, "P": PER} | values
    paper = {name: {"CE": number} for name, number in zip("VBCP", papers, strict=False) if number}
    seeds = len(lines["P"])
    rows = [Row(name, against=None if name == "V" else "V", paper=paper.get(name, {})) for name in "VBCP"]
    rows += [Row("grid", against="V", grid=WEIGHTS), Row("other", against="B")]
    cells = {(name, ""): line[:seeds] for name, line in lines.items()}
    cells |= {("grid", "0.1"): [0.0] * seeds, ("grid", "0.2"): [0.0] * seeds, ("other", ""): [0.0] * seeds}
    return verdict(claim, *made(root, spec_of(*rows, seeds=seeds), cells))


def test_held_by_every_rival_and_refuted_by_any(tmp_path: Path) -> None:
    """Held by the p of the rival that is hardest to beat, here not that of the lowest mean; refuted by three times the least p of three."""
    assert max(p_value(PER, line, "less") for line in (PLAIN, BN, VCL)) < 0.05
    levels = "(p < 0.05), 0 refuted (p < 0.05) over 3 seeds"
    assert judged(tmp_path / "held") == Verdict("best", "reproduced", f"best in 1 of 1 cells; 1 held {levels}")
    noisy = [3.0, 9.0, 7.5]
    assert p_value(PER, noisy, "less") > 0.05
    assert judged(tmp_path / "noisy", C=noisy) == Verdict("best", "not decided", f"best in 1 of 1 cells; 0 held {levels}")
    for line, word in (([2.0, 3.3, 3.9], "not reproduced"), ([2.4, 4.0, 4.3], "not decided")):
        p = p_value(PER, line, "greater")
        assert p < 0.05 and (3 * p < 0.05) == (word == "not reproduced")
        assert judged(tmp_path / word, C=line).verdict == word


def test_one_seed_ties_and_missing_runs(tmp_path: Path) -> None:
    """B has 4.0: a tie is not better, but is within a margin."""
    for own, word in ((3.9, "seen once"), (4.0, "not seen once")):
        assert judged(tmp_path / str(own), P=[own]).verdict == word
    values, within = {"V": [6.74], "B": [6.69], "C": [6.26]}, replace(BEST, margin=0.16)
    for own, count in ((6.42, 1), (6.43, 0)):  # 6.26 + 0.16, which floats do not add up exactly
        found = judged(tmp_path / str(own), within, P=[own], papers=(6.74, 6.69, 6.26, 6.42), **values)
        assert found.why == f"within 0.16 of the best in {count} of 1 cells, paper 1 of 1, one seed: no test"
    for papers, text in (((7, 6, 0, 5), ", paper 1 of 1"), ((7, 6, 0, 6), ", paper 0 of 1"), ((7, 6, 5, 0), "")):  # 0: the paper has none
        assert judged(tmp_path / f"{papers}", P=[1.0], papers=papers).why == f"best in 1 of 1 cells{text}, one seed: no test"
    for row, lack in (("P", None), ("C", "failed"), ("C", "diverged")):
        assert judged(tmp_path / row / str(lack), **{row: [3.0, 4.0, lack]}) == Verdict("best", "not run", "1 of 1 cells lack runs")


SIX = {f"{letter} error": Column("test/ce", [f"d={letter}"]) for letter in "AB"}
SIX |= {f"{letter} best": Column("test/ce", [f"d={letter}"], at="min test/ce") for letter in "AB"}


def six(root: Path, claim: Claim, gains: list[list[float]]) -> Verdict:
    """Three rows with a rival each in two sets of columns; for each of the six cells the gain over that rival in each seed."""
    rows = [row for name in "xyz" for row in (Row(f"{name} V"), Row(f"{name} P", against=f"{name} V"))]
    values = {}
    for (name, where), gain in zip(itertools.product("xyz", "AB"), gains, strict=True):
        values[f"{name} V", f"d={where}", "", False] = [5.0] * len(gain)
        values[f"{name} P", f"d={where}", "", False] = [5.0 - number for number in gain]
    return verdict(replace(claim, of=["x P", "y P", "z P"]), *made(root, spec_of(*rows, seeds=len(gains[0]), **SIX), values))


def test_at_least_four_of_six(tmp_path: Path) -> None:
    four, all_but_two = replace(BEST, least=4), [[1], [1], [-1], [1], [0], [1]]
    assert six(tmp_path / "1", four, all_but_two) == Verdict("best", "seen once", "best in 4 of 6 cells, one seed: no test")
    assert six(tmp_path / "2", four, [[1], [1], [-1], [-1], [0], [1]]).verdict == "not seen once"
    assert six(tmp_path / "3", BEST, all_but_two).verdict == "not seen once"
    # what is left of a narrowed table can hold a claim about each cell, not one about so many of all
    claim, seen = replace(BEST, columns=["A error", "Q error"]), "best in 3 of 3 cells, one seed: no test; only in A error"
    assert six(tmp_path / "5", claim, [[1]] * 6) == Verdict("best", "seen once", seen)
    assert six(tmp_path / "6", replace(claim, least=2), [[1]] * 6) == Verdict("best", "not run", seen)


def test_cells_count_at_a_shared_level(tmp_path: Path) -> None:
    """K = 4 of N = 6: held at 0.05 / 3, refuted at 0.05 / 4. The p of `faint` is between 0.05 / 3 and 0.05."""
    up, down, undecided, faint = [1.0, 1.01, 0.99], [-1.0, -1.01, -0.99], [1.0, -1.0, 0.5], [1.0, 2.0, 1.2]
    assert 0.05 / 3 < float(stats.ttest_1samp(faint, 0, alternative="greater").pvalue) < 0.05
    for number, (gains, word, held, refuted) in enumerate(
        (
            ([up, up, up, up, undecided, down], "reproduced", 4, 1),
            ([up, up, undecided, down, down, down], "not reproduced", 2, 3),
            ([up, up, up, faint, down, down], "not decided", 3, 2),
        )
    ):
        positive = sum(sum(gain) > 0 for gain in gains)
        why = f"best in {positive} of 6 cells; {held} held (p < 0.017), {refuted} refuted (p < 0.013) over 3 seeds"
        assert six(tmp_path / str(number), replace(BEST, least=4), gains) == Verdict("best", word, why)


def test_columns_of_the_same_runs_are_read_as_the_first_that_is_named(tmp_path: Path) -> None:
    """P is ahead at the last evaluation, behind at the best."""
    columns = {"last": Column("test/ce"), "best": Column("test/ce", at="min test/ce")}
    lines = made(tmp_path, spec_of(Row("V"), Row("P", against="V"), seeds=1, **columns), {("V", ""): [2.0], ("P", ""): [1.0]})
    lines[2][lines[1]["id"].iloc[0]].log([{"step": 1, "test/ce": 0.25}, {"step": 2, "test/ce": 2.0}])
    words = [verdict(replace(BEST, columns=names), *lines).verdict for names in ([], ["last"], ["best", "last"], ["best"])]
    assert words == ["seen once", "seen once", "not seen once", "not seen once"]


def test_what_is_picked_on_other_runs_is_judged_by_its_final_runs(tmp_path: Path) -> None:
    """A claim about it waits until it is picked and trained, however well the other rows do."""
    spec = spec_of(Row("base"), Row("a", **HELD_OUT), Row("b", against="base"))

    def judge(name: str, change: dict, **more: Any) -> Verdict:
        _, asked, found = made(tmp_path / name, spec, FINE | {("b", ""): [1.0, 1.1, 1.2]} | change)
        return verdict(replace(BEST, of=["a", "b"], **more), spec, due(spec, asked, found)[0], found)

    for check, word, what in (("best", "not reproduced", "cells"), ("compare", "reproduced", "comparisons")):
        assert judge(f"{check} done", {("a", "0.1"): [99.0] * 3}, check=check).verdict == word  # 0.1 is not picked
        unpicked = {("a", "", "0.1", True): [1.0, 2.0, None]}
        assert judge(f"{check} open", unpicked, check=check) == Verdict("best", "not run", f"1 of 2 {what} lack runs")
    with pytest.raises(ConfigError, match=r"'a' has `select`, so one choice and no trend"):
        judge("trend", {}, check="trend", relation="falling")


def picked(root: Path, valid: tuple[float, float] = (1.0, 2.0), pick: str | None = "min valid/ce", against: str = "V") -> Made:
    """Vanilla at 5, P at 3, and row G, whose test/ce is 4 with λ=0.1 and 2 with λ=0.2, and whose valid/ce is as given."""
    values = {("V", ""): [5.0], ("P", ""): [3.0], ("G", "0.1"): [4.0], ("G", "0.2"): [2.0]}
    rows = [Row("V"), Row("P", against="V"), Row("G", against=against, grid=WEIGHTS, pick=pick)]
    lines = made(root, spec_of(*rows, seeds=1), values)
    for identity, ce, seen in zip(lines[1]["id"][-2:], (4.0, 2.0), valid, strict=True):
        lines[2][identity].log([{"step": 1, "test/ce": ce, "valid/ce": seen}])
    return lines


def test_a_row_picked_on_validation_is_a_rival_with_what_it_prints(tmp_path: Path) -> None:
    for number, (valid, pick, word) in enumerate(
        (
            ((1.0, 2.0), "min valid/ce", "seen once"),  # 3 against its 4
            ((2.0, 1.0), "min valid/ce", "not seen once"),  # 3 against its 2
            ((2.0, 1.0), "min test/ce", "seen once"),  # picked on the test set: no rival
            ((2.0, 1.0), None, "seen once"),  # nor is a row of two numbers
        )
    ):
        lines = picked(tmp_path / str(number), valid, pick)
        assert verdict(BEST, *lines) == Verdict("best", word, f"best in {int(word == 'seen once')} of 1 cells, one seed: no test")
    (job,) = lines[1][lines[1]["choice"] == "0.2"]["id"]
    lines[0].rows[2].pick = "min valid/ce"
    (lines[2][job].path / "result.json").unlink()  # a rival that is not picked yet is waited for
    assert verdict(BEST, *lines) == Verdict("best", "not run", "1 of 1 cells lack runs")


def test_claims_about_the_printed_choice_alone(tmp_path: Path) -> None:
    """`best`, and a comparison with `picked`; what no claim reads may diverge."""
    lines = picked(tmp_path / "rival", (2.0, 1.0), against="P")  # 4 and 2 against P's 3
    claim = Claim("better", "test/ce", ["G"], relation="<")
    assert [verdict(replace(claim, picked=word), *lines).verdict for word in (False, True)] == ["not seen once", "seen once"]
    lines = picked(tmp_path / "own")
    assert verdict(replace(BEST, of=["G"]), *lines).why == "best in 0 of 1 cells, one seed: no test"
    for claim, count in ((BEST, 1), (replace(BEST, check="compare", picked=True), 1), (replace(BEST, check="compare"), 0)):
        lines[0].claims = [replace(claim, of=["G"])]
        assert len(rejected(lines[0], lines[1], lines[1][:0], lines[2])) == count


def test_a_narrowed_table_calls_nothing_the_best_among_fewer() -> None:
    rows = [Row("vanilla"), *(Row(label, against="vanilla") for label in ("smoothed", "itdm"))]
    claims = [replace(BEST, of=["itdm"]), replace(BEST, of=["itdm"], check="compare")]
    spec = OmegaConf.structured(spec_of(*rows, claims=claims))
    for only, left in ((["itdm"], ["compare"]), (["vanilla", "smoothed", "itdm"], ["best", "compare"])):
        assert [claim.check for claim in narrowed(OmegaConf.create(), spec, only).claims] == left
