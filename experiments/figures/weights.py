"""Accuracy, training CE and test CE against a method's weight λ (ITDM, figures 3 to 5 and 7)."""

from __future__ import annotations

import pandas as pd

from experiments import store
from experiments.config import ConfigError
from experiments.figure import Drawing, Runs, canvas
from experiments.table import fill, numbers

METRICS = {"test/accuracy": "test accuracy [%]", "train/ce": "training CE [nats]", "test/ce": "test CE [nats]"}
DIGITS = {"test/accuracy": 2, "train/ce": 4, "test/ce": 4}


def draw(runs: Runs) -> Drawing:
    """A row of three panels for each data set; rows without a grid are λ = 0.

    Error bars are 1 s.d.: over the seeds if the figure asks for several, else over the run's last ten evaluations. The paper says
    1 s.d. and trained each model once, so the second is its reading (protocol sheet, A.3).
    """
    panels = runs.panels()
    seeds = runs.wanted["seed"].nunique()
    spread_of = f"over {seeds} seeds" if seeds > 1 else "over the last ten evaluations"
    both = pd.concat([*(ours(runs, name, jobs) for name, jobs in panels.items()), paper(runs)], ignore_index=True)

    picture, axes = canvas(len(panels), 3, height=2.6)
    for line, name in zip(axes, panels, strict=True):
        for axis, (metric, text) in zip(line, METRICS.items(), strict=True):
            here = both[(both["panel"] == name) & (both["metric"] == metric)].sort_values("weight")
            mine, theirs = here[here["source"] == "ours"], here[here["source"] == "paper"]
            axis.errorbar(mine["weight"], mine["value"], mine["spread"], marker="o", markersize=4, capsize=3, color="C0", label="ours")
            if len(theirs):
                axis.plot(theirs["weight"], theirs["value"], "s", color="C3", markerfacecolor="none", label="paper")
            axis.set(xlabel="λ", ylabel=text, title=name)
            axis.set_xticks(sorted(here["weight"].unique()))
            axis.ticklabel_format(axis="y", useOffset=False)
            if len(theirs):
                axis.legend()
    bars = f"error bars: 1 s.d. {spread_of}" if both["spread"].notna().any() else "no error bars: one evaluation of one seed"
    picture.supxlabel(bars, fontsize=7)
    return Drawing(picture, both.assign(spread_of=both["source"].map({"ours": spread_of})), [*lines(both), bars])


def ours(runs: Runs, panel: str, jobs: pd.DataFrame) -> pd.DataFrame:
    """panel, metric, weight, value, spread, n, source: one line per metric and λ. Rows that share their runs count once."""
    plain = {row.label: row for row in runs.table.rows if not row.grid}
    if bad := [name for name, row in plain.items() if "method=vanilla" not in row.overrides]:
        raise ConfigError(f"figure.runs.rows: {bad[0]!r} has a method and no grid, so no place on the axis of λ")
    once = jobs.drop_duplicates("id").assign(weight=lambda found: found["choice"].replace("", "0").astype(float))
    several = runs.wanted["seed"].nunique() > 1
    points = []
    for metric in METRICS:
        value = numbers(once, runs.done, metric, runs.table.at)
        for weight, group in value.groupby(once["weight"]):
            if not (n := int(group.count())):
                continue
            spread = group.std() if several else last_ten(runs.done[once.loc[group.idxmax(), "id"]], metric)
            known = {"panel": panel, "metric": metric, "weight": weight}
            points.append(known | {"value": group.mean(), "spread": spread, "n": n, "source": "ours"})
    return pd.DataFrame(points)


def last_ten(run: store.Run, metric: str) -> float:
    """The s.d. of a run's last ten evaluations; nan if there is one only."""
    return float(pd.Series([row[metric] for row in run.metrics()[-10:]]).std())


def paper(runs: Runs) -> pd.DataFrame:
    """What the paper prints for some λ, in the columns of `ours`."""
    cells = fill(runs.table, runs.wanted, runs.done).dropna(subset="paper")
    cells = cells[~cells["column"].isin([name for name, column in runs.table.columns.items() if column.delta])]
    of = {name: panel for panel, jobs in runs.panels().items() for name in runs.same(jobs)}
    weight = cells["paper_choice"].where(cells["paper_choice"] != "", cells["choice"]).replace("", "0").astype(float)
    cells = cells.assign(panel=cells["column"].map(of), weight=weight, value=cells["paper"], spread=cells["paper_std"], n=1, source="paper")
    return cells[["panel", "metric", "weight", "value", "spread", "n", "source"]]


def lines(both: pd.DataFrame) -> list[str]:
    found = []
    for (source, panel, metric), group in both.groupby(["source", "panel", "metric"], sort=False):
        spread = group["spread"].map(lambda value, digits=DIGITS[metric]: "" if value != value else f" ± {value:.{digits}f}")
        points = [f"{one.weight:g}: {one.value:.{DIGITS[metric]}f}{more}" for one, more in zip(group.itertuples(), spread, strict=True)]
        found.append(f"{source}, {panel + ' ' if panel else ''}{METRICS[metric]} at λ = {', '.join(points)}")
    return found
