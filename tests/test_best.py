"""The claim "best": each cell against its closest rival, and how many cells must hold."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from scipy import stats
from test_select import FINE, HELD_OUT, tried
from test_table import WEIGHTS, Command, Made, command, extra, made, spec_of

from experiments.claims import Verdict, verdict
from experiments.config import ConfigError
from experiments.pick import due, rejected
from experiments.spec import Claim, Column, Row

__all__ = ["command", "extra"]  # fixtures
BEST = Claim("best", "test/ce", ["P"], check="best", relation="<")
PLAIN, BN, VCL, PER = [5.0, 6.0, 7.0], [4.0, 5.1, 5.9], [4.1, 4.9, 6.2], [3.0, 4.2, 4.9]


def judged(
    tmp_path: Path, claim: Claim = BEST, papers: tuple[float, ...] = (), margin: float = 0, **values: list[float | str | None]
) -> Verdict:
    """Rows V, B, C and P of the paper, P with all of them as rivals; and two rows that are none of its rivals."""
    lines = {"V": PLAIN, "B": BN, "C": VCL, "P": PER} | values
    paper = {name: {"CE": number} for name, number in zip("VBCP", papers, strict=False) if number}
    seeds = len(lines["P"])
    rows = [Row(name, against=None if name == "V" else "V", paper=paper.get(name, {})) for name in "VBCP"]
    rows += [Row("grid", against="V", grid=WEIGHTS), Row("other", against="B")]
    better = [0.0] * seeds
    cells = {(name, ""): line[:seeds] for name, line in lines.items()}
    cells |= {("grid", "0.1"): better, ("grid", "0.2"): better, ("other", ""): better}
    return verdict(replace(claim, margin=margin), *made(tmp_path, spec_of(*rows, seeds=seeds), cells))


def p_of(first: list[float], second: list[float], side: str) -> float:
    return float(stats.ttest_rel(first, second, alternative=side).pvalue)


def test_held_needs_every_rival(tmp_path: Path) -> None:
    """The p of the rival that is hardest to beat, which here is not the one with the lowest mean."""
    ps = {name: p_of(PER, line, "less") for name, line in (("V", PLAIN), ("B", BN), ("C", VCL))}
    assert max(ps.values()) < 0.05
    levels = "(p < 0.05), 0 refuted (p < 0.05) over 3 seeds"
    assert judged(tmp_path / "1") == Verdict("best", "reproduced", f"best in 1 of 1 cells; 1 held {levels}")
    noisy = [3.0, 9.0, 7.5]
    assert p_of(PER, noisy, "less") > 0.05
    assert judged(tmp_path / "2", C=noisy) == Verdict("best", "not decided", f"best in 1 of 1 cells; 0 held {levels}")


def test_refuted_by_any_rival_at_a_shared_level(tmp_path: Path) -> None:
    """One of three rivals is better: its p counts three times."""
    for name, line, word in (("clear", [2.0, 3.3, 3.9], "not reproduced"), ("weak", [2.4, 4.0, 4.3], "not decided")):
        p = p_of(PER, line, "greater")
        assert p < 0.05 and (3 * p < 0.05) == (word == "not reproduced")
        found = judged(tmp_path / name, C=line)
        assert (found.verdict, found.why.startswith("best in 0 of 1 cells; 0 held")) == (word, True)


@pytest.mark.parametrize(("own", "word", "count"), [(3.9, "seen once", 1), (4.0, "not seen once", 0), (4.5, "not seen once", 0)])
def test_one_seed_and_ties(tmp_path: Path, own: float, word: str, count: int) -> None:
    """B has 4.0: a tie is not better."""
    assert judged(tmp_path, P=[own]) == Verdict("best", word, f"best in {count} of 1 cells, one seed: no test")


@pytest.mark.parametrize(("own", "word"), [(6.42, "seen once"), (6.43, "not seen once")])
def test_at_most_so_much_worse_includes_so_much(tmp_path: Path, own: float, word: str) -> None:
    found = judged(tmp_path, margin=0.16, V=[6.74], B=[6.69], C=[6.26], P=[own], papers=(6.74, 6.69, 6.26, 6.42))
    count = int(word == "seen once")
    assert found == Verdict("best", word, f"within 0.16 of the best in {count} of 1 cells, paper 1 of 1, one seed: no test")


@pytest.mark.parametrize("lack", [None, "failed", "diverged"])
@pytest.mark.parametrize("row", ["P", "C"])
def test_missing_runs(tmp_path: Path, row: str, lack: str | None) -> None:
    assert judged(tmp_path, **{row: [3.0, 4.0, lack]}) == Verdict("best", "not run", "1 of 1 cells lack runs")


@pytest.mark.parametrize(("papers", "text"), [((7, 6, 0, 5), ", paper 1 of 1"), ((7, 5, 0, 6), ", paper 0 of 1"), ((7, 6, 5, 0), "")])
def test_the_papers_own_count(tmp_path: Path, papers: tuple[float, ...], text: str) -> None:
    """A rival that the paper has no number of is not in its count."""
    assert judged(tmp_path, P=[1.0], papers=papers).why == f"best in 1 of 1 cells{text}, one seed: no test"


SIX = {f"{letter} error": Column("test/ce", [f"d={letter}"]) for letter in "AB"}
SIX |= {f"{letter} best": Column("test/ce", [f"d={letter}"], at="min test/ce") for letter in "AB"}


def six(tmp_path: Path, claim: Claim, gains: list[float | list[float]]) -> Verdict:
    """Three rows with a rival each in two sets of columns; the gain over that rival in each of the six cells."""
    rows, values = [], {}
    for name, two in zip("xyz", (gains[:2], gains[2:4], gains[4:]), strict=True):
        rows += [Row(f"{name} V"), Row(f"{name} P", against=f"{name} V")]
        for where, gain in zip("AB", two, strict=True):
            each = gain if isinstance(gain, list) else [gain]
            values[f"{name} V", f"d={where}", "", False] = [5.0] * len(each)
            values[f"{name} P", f"d={where}", "", False] = [5.0 - one for one in each]
    spec = spec_of(*rows, seeds=len(each), **SIX)
    return verdict(replace(claim, of=["x P", "y P", "z P"]), *tried(tmp_path, spec, values))


def test_at_least_four_of_six(tmp_path: Path) -> None:
    four = replace(BEST, least=4)
    assert six(tmp_path / "1", four, [1, 1, -1, 1, 0, 1]) == Verdict("best", "seen once", "best in 4 of 6 cells, one seed: no test")
    assert six(tmp_path / "2", four, [1, 1, -1, -1, 0, 1]) == Verdict("best", "not seen once", "best in 3 of 6 cells, one seed: no test")
    assert six(tmp_path / "3", BEST, [1, 1, -1, 1, 0, 1]).verdict == "not seen once"
    assert six(tmp_path / "4", BEST, [1, 1, 1, 1, 1, 1]).verdict == "seen once"


def test_so_many_of_all_cells_are_not_counted_among_fewer(tmp_path: Path) -> None:
    """What is left of a narrowed table can hold a claim about each cell, not one about four of six."""
    claim = replace(BEST, columns=["A error", "Q error"])
    seen = "best in 3 of 3 cells, one seed: no test; only in A error"
    assert six(tmp_path, claim, [1] * 6) == Verdict("best", "seen once", seen)
    assert six(tmp_path, replace(claim, least=2), [1] * 6) == Verdict("best", "not run", seen)


UP, DOWN, OPEN, FAINT = [1.0, 1.01, 0.99], [-1.0, -1.01, -0.99], [1.0, -1.0, 0.5], [1.0, 2.0, 1.2]


@pytest.mark.parametrize(
    ("gains", "word", "held", "refuted"),
    [
        ([UP, UP, UP, UP, OPEN, DOWN], "reproduced", 4, 1),
        ([UP, UP, UP, OPEN, OPEN, DOWN], "not decided", 3, 1),
        ([UP, UP, UP, DOWN, OPEN, DOWN], "not decided", 3, 2),
        ([UP, UP, OPEN, DOWN, DOWN, DOWN], "not reproduced", 2, 3),
        ([UP, UP, UP, FAINT, DOWN, DOWN], "not decided", 3, 2),
    ],
)
def test_cells_count_at_a_shared_level(tmp_path: Path, gains: list, word: str, held: int, refuted: int) -> None:
    """K = 4 of N = 6: held at 0.05 / 3, refuted at 0.05 / 4. FAINT has p between 0.05 / 3 and 0.05."""
    assert 0.05 / 3 < float(stats.ttest_1samp(FAINT, 0, alternative="greater").pvalue) < 0.05
    assert float(stats.ttest_1samp(UP, 0, alternative="greater").pvalue) < 0.001
    found = six(tmp_path, replace(BEST, least=4), gains)
    positive = sum(sum(gain) > 0 for gain in gains)
    assert (found.verdict, found.why) == (
        word,
        f"best in {positive} of 6 cells; {held} held (p < 0.017), {refuted} refuted (p < 0.013) over 3 seeds",
    )


def test_columns_of_the_same_runs_are_read_as_the_first_that_is_named(tmp_path: Path) -> None:
    """Last and best evaluation: P is ahead at its last, behind at its best."""
    columns = {"last": Column("test/ce"), "best": Column("test/ce", at="min test/ce")}
    spec, wanted, found = made(tmp_path, spec_of(Row("V"), Row("P", against="V"), seeds=1, **columns), {("V", ""): [2.0], ("P", ""): [1.0]})
    found[wanted["id"].iloc[0]].log([{"step": 1, "test/ce": 0.5}, {"step": 2, "test/ce": 2.0}])
    words = [verdict(replace(BEST, columns=names), spec, wanted, found).verdict for names in ([], ["last"], ["best", "last"], ["best"])]
    assert words == ["seen once", "seen once", "not seen once", "not seen once"]


@pytest.mark.parametrize("check", ["best", "compare"])
def test_what_is_picked_on_other_runs_is_judged_by_its_final_runs(tmp_path: Path, check: str) -> None:
    spec = spec_of(Row("base"), Row("a", **HELD_OUT))
    claim = replace(BEST, of=["a"], check=check)
    _, asked, found = tried(tmp_path / "1", spec, FINE | {("a", "", "0.1", False): [99.0] * 3})
    wanted, _ = due(spec, asked, found)
    assert verdict(claim, spec, wanted, found).why.startswith(("best in 1 of 1", "seen"))
    _, asked, found = tried(tmp_path / "2", spec, FINE | {("a", "", "0.1", True): [1.0, 2.0, None]})
    wanted, _ = due(spec, asked, found)
    assert verdict(claim, spec, wanted, found).verdict == "not run"
    with pytest.raises(ConfigError, match=r"'a' has `select`, so one choice and no trend"):
        verdict(replace(claim, check="trend", relation="falling"), spec, wanted, found)


@pytest.mark.parametrize("check", ["best", "compare"])
def test_a_claim_waits_for_what_is_not_picked_yet(tmp_path: Path, check: str) -> None:
    """However well the other row does."""
    spec = spec_of(Row("base"), Row("a", **HELD_OUT), Row("b", against="base"))
    _, asked, found = tried(tmp_path, spec, FINE | {("b", "", "", False): [1.0, 1.1, 1.2], ("a", "", "0.1", True): [1.0, 2.0, None]})
    wanted, _ = due(spec, asked, found)
    assert verdict(replace(BEST, of=["b"], check=check), spec, wanted, found).verdict == "reproduced"
    both = verdict(replace(BEST, of=["a", "b"], check=check), spec, wanted, found)
    assert both == Verdict("best", "not run", f"1 of 2 {'cells' if check == 'best' else 'comparisons'} lack runs")


def test_of_a_row_with_a_pick_the_printed_choice_is_judged(tmp_path: Path) -> None:
    spec = spec_of(Row("V"), Row("P", against="V", grid=WEIGHTS, pick="min test/ce"), seeds=1)
    lines = made(tmp_path, spec, {("V", ""): [2.0], ("P", "0.1"): [1.0], ("P", "0.2"): [9.0]})
    assert verdict(BEST, *lines) == Verdict("best", "seen once", "best in 1 of 1 cells, one seed: no test")


def validated(tmp_path: Path, valid: tuple[float, float], row: Row) -> Made:
    """Vanilla at 5, P at 3, and a row whose test/ce is 4 with λ=0.1 and 2 with λ=0.2, and whose valid/ce is as given."""
    lines = made(tmp_path, spec_of(Row("V"), Row("P", against="V"), row, seeds=1), {("V", ""): [5.0], ("P", ""): [3.0], **GRID})
    for choice, ce, seen in zip(("0.1", "0.2"), (4.0, 2.0), valid, strict=True):
        (job,) = lines[1][(lines[1]["row"] == row.label) & (lines[1]["choice"] == choice)]["id"]
        lines[2][job].log([{"step": 1, "test/ce": ce, "valid/ce": seen}])
    return lines


GRID = {("G", "0.1"): [4.0], ("G", "0.2"): [2.0]}


@pytest.mark.parametrize(
    ("valid", "pick", "word"),
    [
        ((1.0, 2.0), "min valid/ce", "seen once"),  # 3 against its 4
        ((2.0, 1.0), "min valid/ce", "not seen once"),  # 3 against its 2
        ((2.0, 1.0), "min test/ce", "seen once"),  # picked on the test set: no rival
        ((2.0, 1.0), None, "seen once"),  # nor is a row of two numbers
    ],
)
def test_a_row_picked_on_validation_is_a_rival_with_what_it_prints(
    tmp_path: Path, valid: tuple[float, float], pick: str | None, word: str
) -> None:
    lines = validated(tmp_path, valid, Row("G", against="V", grid=WEIGHTS, pick=pick))
    assert verdict(BEST, *lines) == Verdict("best", word, f"best in {int(word == 'seen once')} of 1 cells, one seed: no test")


def test_a_rival_that_is_not_picked_yet_is_waited_for(tmp_path: Path) -> None:
    lines = validated(tmp_path, (1.0, 2.0), Row("G", against="V", grid=WEIGHTS, pick="min valid/ce"))
    (job,) = lines[1][lines[1]["choice"] == "0.2"]["id"]
    (lines[2][job].path / "result.json").unlink()
    assert verdict(BEST, *lines) == Verdict("best", "not run", "1 of 1 cells lack runs")


@pytest.mark.parametrize(("picked", "why"), [(False, "1 of 2 comparisons, one seed: no test"), (True, "seen, one seed: no test")])
def test_a_comparison_can_be_of_what_is_printed_alone(tmp_path: Path, picked: bool, why: str) -> None:
    lines = validated(tmp_path, (2.0, 1.0), Row("G", against="P", grid=WEIGHTS, pick="min valid/ce"))
    claim = Claim("better", "test/ce", ["G"], relation="<", picked=picked)  # 4 and 2 against P's 3
    assert verdict(claim, *lines) == Verdict("better", "seen once" if picked else "not seen once", why)


def test_what_no_claim_reads_may_diverge(tmp_path: Path) -> None:
    """Of a row with a pick, when its claims are about the printed choice."""
    for number, (claim, count) in enumerate(
        [(BEST, 1), (replace(BEST, check="compare", picked=True), 1), (replace(BEST, check="compare"), 0)]
    ):
        lines = validated(tmp_path / str(number), (1.0, 2.0), Row("G", against="V", grid=WEIGHTS, pick="min valid/ce"))
        lines[0].claims = [replace(claim, of=["G"])]
        assert len(rejected(lines[0], lines[1].assign(trial=False), lines[1][:0], lines[2])) == count


def test_a_best_needs_a_row_to_beat(tmp_path: Path) -> None:
    spec = spec_of(Row("P"), seeds=1)
    with pytest.raises(ConfigError, match=re.escape("table.claims: a best needs `against`, and a relation < or >")):
        verdict(BEST, *made(tmp_path, spec, {("P", ""): [1.0]}))


RIVALS = """
title: "Rivals"
base: [dataset=digits, dataset.train=100, epochs=1, "schedule.at=[1]"]
seeds: [1]
columns: {ACC: {metric: test/accuracy}}
rows:
  - {label: vanilla, overrides: [method=vanilla]}
  - {label: smoothed, against: vanilla, overrides: [method=label_smoothing]}
  - {label: itdm big, against: vanilla, overrides: [method=itdm_c]}
  - {label: itdm small, against: vanilla, overrides: [method=itdm_c, method.itdm_c.weight=0.1]}
claims:
  - {says: "big is best", check: best, metric: test/accuracy, of: [itdm big], relation: ">"}
  - {says: "each is", check: best, metric: test/accuracy, of: [itdm big, itdm small], relation: ">", least: 1}
  - {says: "it helps", metric: test/accuracy, of: [itdm big], relation: ">"}
"""


def test_a_narrowed_table_calls_nothing_the_best_among_fewer(command: Command, extra: Path) -> None:
    (extra / "table" / "rivals.yaml").write_text(RIVALS)
    code, out, err = command("table=rivals", "launch=false")
    assert (code, err, out.count("- **")) == (0, "", 3)
    code, out, err = command("table=rivals", "launch=false", "only=[itdm]")
    assert (code, err) == (0, "") and "is best" not in out and "each is" not in out and "it helps" in out
