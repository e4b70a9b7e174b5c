"""What a paper says in words, tried on our runs: a verdict for each claim, with the test behind it."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from experiments import store
from experiments.config import ConfigError
from experiments.pick import chosen, numbers, printed
from experiments.spec import Claim, Row, Table

LEVEL = 0.05


@dataclass(frozen=True)
class Verdict:
    """says: the claim; verdict: see README; why: the numbers behind it."""

    says: str
    verdict: str
    why: str


def verdicts(table: Table, wanted: pd.DataFrame, found: dict[str, store.Run]) -> list[Verdict]:
    return [verdict(claim, table, wanted, found) for claim in table.claims]


def verdict(claim: Claim, table: Table, wanted: pd.DataFrame, found: dict[str, store.Run]) -> Verdict:
    """Reproduced, not reproduced, or not decided; with one seed only "seen once" or "not seen once"."""
    rows = {row.label: row for row in table.rows}
    of = [label for label in claim.of if label in rows]
    if claim.against not in (None, *rows) or not of:
        raise ConfigError(f"table.claims: {claim.against if of else claim.of[0]!r} is not a row; allowed: {', '.join(sorted(rows))}")
    if claim.check not in ("compare", "best", "trend"):
        raise ConfigError(f"table.claims: check {claim.check!r} is not known; allowed: compare, best, trend")
    columns = [name for name in claim.columns or table.columns if name in table.columns]
    firsts: dict[tuple[str, ...], str] = {}  # columns that differ only in how runs are read hold the same runs: the first counts
    for name in columns:
        firsts.setdefault(tuple(wanted[wanted["column"] == name]["id"]), name)
    groups = {}
    for name in firsts.values():
        jobs = wanted[wanted["column"] == name]
        column = table.columns[name]
        chance = column.chance if claim.metric == column.metric else None
        groups[name] = jobs.assign(value=numbers(jobs, found, claim.metric, column.at or table.at, chance))
    tests, papers = [], []
    for (name, group), label in itertools.product(groups.items(), of):
        row, against = rows[label], claim.against or rows[label].against
        if claim.check == "trend":
            if row.select:
                raise ConfigError(f"table.claims: {label!r} has `select`, so one choice and no trend")
            tests += _trend(claim, group, label, against)
            continue
        rivals = table.rivals(label, claim.against) if claim.check == "best" else [against] if against else []
        if claim.check == "best" or claim.picked:
            for one in (rows[name] for name in (label, *rivals)):
                if one.pick is not None:
                    mine = group["row"] == one.label
                    group = group[~mine | (group["choice"] == chosen(one, group[mine], found, table.at))]
        tests += _compare(claim, group, label, rivals)
        if claim.check == "best":
            papers.append(_paper(claim, [rows[one] for one in (label, *rivals)], name))
    word, why = _conclude(tests, claim, [best for best in papers if best is not None])
    left = [*(of if len(of) < len(claim.of) else []), *(columns if len(columns) < len(claim.columns) else [])]
    if left and claim.least:  # how many hold elsewhere is not known
        word = "not run"
    return Verdict(claim.says, word, f"{why}; only in {', '.join(left)}" if left else why)


@dataclass(frozen=True)
class Comparison:
    """The effect in the claim's direction, p for it and against it (nan with one seed), and seeds: 0 if runs are missing."""

    effect: float = math.nan
    holds: float = math.nan
    fails: float = math.nan
    seeds: int = 0


def _compare(claim: Claim, group: pd.DataFrame, of: str, against: list[str]) -> list[Comparison]:
    """Each choice of row `of` against the rows `against`, paired by seed: a one-sided t-test of the difference beyond -margin.

    Against several rows it holds if it holds against each: its p is the largest, that of the closest one. It fails if it fails against
    any: that p is the smallest, times the number of rows.
    """
    if claim.relation not in ("<", ">") or not against:
        raise ConfigError(f"table.claims: a {claim.check} needs `against`, and a relation < or >")
    sign = 1 if claim.relation == ">" else -1
    tests = []
    for _, mine in group[group["row"] == of].groupby("choice", sort=False):
        each = []
        for rival in against:
            base = group[group["row"] == rival].set_index("seed")["value"]
            paired = sign * (mine.set_index("seed")["value"] - base)
            each.append(_t_test(paired + _margin(claim)) if paired.notna().all() and len(paired) else Comparison())
        worst = min(each, key=lambda test: test.seeds)
        if worst.seeds:
            fails = min(1.0, len(each) * min(test.fails for test in each)) if worst.seeds > 1 else math.nan
            worst = Comparison(min(test.effect for test in each), max(test.holds for test in each), fails, worst.seeds)
        tests.append(worst)
    return tests or [Comparison()]  # no choice: none is picked yet


def _margin(claim: Claim) -> float:
    """Of the best within a margin, "at most so much worse": equality holds, whatever floats make of 6.42 against 6.26 within 0.16."""
    return claim.margin + (1e-9 if claim.check == "best" and claim.margin else 0)


def _paper(claim: Claim, rows: list[Row], column: str) -> bool | None:
    """Whether the first of the rows is the best by the paper's own numbers in this column; None if it has none to compare."""
    mine, *others = (printed(row, "", column)[0] for row in rows)
    known = [other for other in others if not math.isnan(other)]
    sign = 1 if claim.relation == ">" else -1
    return None if math.isnan(mine) or not known else all(sign * (mine - other) + _margin(claim) > 0 for other in known)


def _t_test(gain: pd.Series) -> Comparison:
    if len(gain) == 1:
        return Comparison(gain.mean(), seeds=1)
    if gain.std() == 0:
        holds = 0.0 if gain.mean() > 0 else 1.0
        return Comparison(gain.mean(), holds, 0.0 if gain.mean() < 0 else 1.0, len(gain))
    holds = float(stats.ttest_1samp(gain, 0, alternative="greater").pvalue)
    return Comparison(gain.mean(), holds, 1 - holds, len(gain))


def _trend(claim: Claim, group: pd.DataFrame, of: str, against: str | None) -> list[Comparison]:
    """Along the grid, in its order: Page's test for ordered alternatives, the seeds as its subjects."""
    if claim.relation not in ("rising", "falling"):
        raise ConfigError("table.claims: a trend's relation is rising or falling")
    rows = group[group["row"].isin([against, of])].copy()
    rows["point"] = rows["row"].where(rows["row"] == against, rows["row"] + rows["choice"])
    points = ([against] if against else []) + [of + choice for choice in group[group["row"] == of]["choice"].unique()]
    values = rows.pivot(index="seed", columns="point", values="value").reindex(columns=points).to_numpy()
    if not values.size or np.isnan(values).any():
        return [Comparison()]
    values = values if claim.relation == "rising" else -values
    if len(points) < 3:  # too few for a trend: the difference between the ends
        return [_t_test(pd.Series(values[:, -1] - values[:, 0]))]
    effect = float(np.mean([stats.spearmanr(range(len(points)), line).statistic if np.ptp(line) else 0.0 for line in values]))
    if len(values) == 1:
        return [Comparison(effect, seeds=1)]
    holds, fails = (float(stats.page_trend_test(direction, method="exact").pvalue) for direction in (values, -values))
    return [Comparison(effect, holds, fails, len(values))]


def _conclude(tests: list[Comparison], claim: Claim, papers: list[bool]) -> tuple[str, str]:
    """So many as the claim asks for must hold, all unless it says how many; as many refuted that these cannot be reached refute it.

    N tests of which K must hold: each is held at LEVEL / (N - K + 1) and refuted at LEVEL / K, so that neither conclusion is wrong more
    often than LEVEL (Bonferroni's test of a partial conjunction, Benjamini & Heller 2008). With K = N: LEVEL, and LEVEL / N.
    """
    present = [test for test in tests if test.seeds]
    held = sum(test.effect > 0 for test in present)
    best = claim.check == "best"
    if len(present) < len(tests) or not tests:
        return "not run", f"{len(tests) - len(present)} of {len(tests)} {'cells' if best else 'comparisons'} lack runs"
    count = f"{held} of {len(present)} comparisons" if len(tests) > 1 else ("seen" if held else "not seen")
    if best:
        where = f"within {claim.margin:g} of the best" if claim.margin else "best"
        count = f"{where} in {held} of {len(tests)} cells" + (f", paper {sum(papers)} of {len(papers)}" if papers else "")
    seeds, need = min(test.seeds for test in tests), min(claim.least or len(tests), len(tests))
    if seeds == 1:
        return ("seen once" if held >= need else "not seen once"), f"{count}, one seed: no test"
    for_it, against_it = LEVEL / (len(tests) - need + 1), LEVEL / need
    sure, refuted = sum(test.holds < for_it for test in tests), sum(test.fails < against_it for test in tests)
    name = "not reproduced" if refuted > len(tests) - need else "reproduced" if sure >= need else "not decided"
    if best or claim.least:
        return name, f"{count}; {sure} held (p < {for_it:.2g}), {refuted} refuted (p < {against_it:.2g}) over {seeds} seeds"
    if name == "not reproduced":
        return name, f"{count}, p = {min(test.fails for test in tests):.2g} against it over {seeds} seeds"
    return name, f"{count}, largest p = {max(test.holds for test in tests):.2g} over {seeds} seeds"
