"""What a paper says in words, tried on our runs: a verdict for each claim, with the test behind it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from experiments import store
from experiments.config import ConfigError
from experiments.spec import Claim, Table

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
    from experiments.table import numbers

    rows = {row.label: row for row in table.rows}
    of = [label for label in claim.of if label in rows]
    if claim.against not in (None, *rows) or not of:
        raise ConfigError(f"table.claims: {claim.against if of else claim.of[0]!r} is not a row; allowed: {', '.join(sorted(rows))}")
    columns = [name for name in claim.columns or table.columns if name in table.columns]
    value = wanted.assign(value=numbers(wanted, found, claim.metric, table.at))[wanted["column"].isin(columns)]
    # columns that differ only in the metric hold the same runs: each counts once
    groups = {tuple(group["id"]): group for _, group in value.groupby("column", sort=False)}
    judge = {"compare": _compare, "trend": _trend}.get(claim.check)
    if judge is None:
        raise ConfigError(f"table.claims: check {claim.check!r} is not known; allowed: compare, trend")
    tests = [test for group in groups.values() for label in of for test in judge(claim, group, label, claim.against or rows[label].against)]
    name, why = _conclude(tests)
    left = [*(of if len(of) < len(claim.of) else []), *(columns if len(columns) < len(claim.columns) else [])]
    return Verdict(claim.says, name, f"{why}; only in {', '.join(left)}" if left else why)


@dataclass(frozen=True)
class Comparison:
    """The effect in the claim's direction, p for it and against it (nan with one seed), and seeds: 0 if runs are missing."""

    effect: float = math.nan
    holds: float = math.nan
    fails: float = math.nan
    seeds: int = 0


def _compare(claim: Claim, group: pd.DataFrame, of: str, against: str | None) -> list[Comparison]:
    """Each choice of row `of` against row `against`, paired by seed: a one-sided t-test of the difference beyond -margin."""
    if claim.relation not in ("<", ">") or against is None:
        raise ConfigError("table.claims: a compare needs `against`, and a relation < or >")
    base = group[group["row"] == against].set_index("seed")["value"]
    sign = 1 if claim.relation == ">" else -1
    tests = []
    for _, mine in group[group["row"] == of].groupby("choice", sort=False):
        paired = sign * (mine.set_index("seed")["value"] - base)
        tests.append(_t_test(paired + claim.margin) if paired.notna().all() and len(paired) else Comparison())
    return tests


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


def _conclude(tests: list[Comparison]) -> tuple[str, str]:
    """All must hold. One that is refuted, at a level shared by all of them, refutes the claim."""
    present = [test for test in tests if test.seeds]
    held = sum(test.effect > 0 for test in present)
    count = f"{held} of {len(present)} comparisons" if len(tests) > 1 else ("seen" if held else "not seen")
    if len(present) < len(tests) or not tests:
        return "not run", f"{len(tests) - len(present)} of {len(tests)} comparisons lack runs"
    seeds = min(test.seeds for test in tests)
    if seeds == 1:
        return ("seen once" if held == len(tests) else "not seen once"), f"{count}, one seed: no test"
    largest, smallest = max(test.holds for test in tests), min(test.fails for test in tests)
    if smallest < LEVEL / len(tests):
        return "not reproduced", f"{count}, p = {smallest:.2g} against it over {seeds} seeds"
    name = "reproduced" if largest < LEVEL else "not decided"
    return name, f"{count}, largest p = {largest:.2g} over {seeds} seeds"
