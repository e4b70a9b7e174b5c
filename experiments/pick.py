"""The values of a row's grid, a run's number, the value that is picked, and which runs are due when what is picked is trained anew."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import TypeAlias

import pandas as pd

from experiments import store
from experiments.config import ConfigError
from experiments.spec import Row, Table

# row, choice, column, seed, trial, profile, precision, asked, overrides, id: one line per cell and seed. trial: a run of `select`,
# whose numbers choose and are not printed
Jobs: TypeAlias = pd.DataFrame
UNPICKED = "?"  # in place of a row's choice, while its runs have not all ended


def check_rows(table: Table) -> None:
    """Raises ConfigError on a row whose `pick`, `select`, `extra`, `quoted` or `doubted` cannot be meant. For the whole table only."""
    words = {word for name in table.columns for word in name.split()}
    for row in table.rows:
        where = f"table.rows: {row.label!r}"
        if row.pick is not None and not re.fullmatch(r"(min|max) \S+", row.pick):
            raise ConfigError(f"{where}: pick {row.pick!r} is not known; allowed: 'min METRIC', 'max METRIC'")
        if row.select and (row.pick is None or not row.grid):
            raise ConfigError(f"{where} has `select`, and no `grid` and `pick` that it could serve")
        for what, given, known in (
            ("extra word", row.extra, words),
            ("extra key", itertools.chain(*row.extra.values()), {*row.grid}),
            ("quoted column", row.quoted, {*table.columns}),
            ("doubted column", row.doubted, {*table.columns}),
        ):
            if unknown := next((one for one in given if one not in known), None):
                raise ConfigError(f"{where}: {what} {unknown!r} is not known; allowed: {', '.join(sorted(known)) or 'none'}")


def choices(row: Row, column: str = "") -> list[tuple[str, list[str]]]:
    """The values that a row's grid takes in a column: a name for each, and its overrides. One nameless choice without a grid."""
    grid = {key: list(values) for key, values in row.grid.items()}
    for key, more in (pair for word, extra in row.extra.items() if word in column.split() for pair in extra.items()):
        grid[key] += [value for value in more if value not in grid[key]]
    found = []
    for values in itertools.product(*grid.values()):
        pairs = dict(zip(grid, values, strict=True))
        name = f"{values[0]}" if len(pairs) == 1 else ", ".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in pairs.items())
        found.append((name, [f"{key}={value}" for key, value in pairs.items()]))
    return found


def variants(table: Table) -> Iterator[tuple[Row, str, str, bool, list[str]]]:
    """(row, name of the column, choice, trial, overrides) of each cell and choice. trial: a run of `select`."""
    for row, (name, column) in itertools.product(table.rows, table.columns.items()):
        for (choice, values), trial in itertools.product(choices(row, name), [True, False] if row.select else [False]):
            yield row, name, choice, trial, [*table.base, *row.overrides, *column.overrides, *values, *(row.select if trial else [])]


def numbers(wanted: Jobs, found: dict[str, store.Run], metric: str, at: str, chance: float | None = None) -> pd.Series:
    """The table's number of each job, nan where there is none: a finished run's evaluations reduced by `at`; a diverged one's `chance`."""
    runs = {identity: found[identity] for identity in wanted["id"].unique() if identity in found}
    rows = {identity: run.metrics() if run.state == "done" else [] for identity, run in runs.items()}
    values = {identity: reduce(evaluations, metric, at) for identity, evaluations in rows.items() if evaluations}
    if chance is not None:
        values |= {identity: chance for identity, run in runs.items() if run.state == "diverged"}
    return wanted["id"].map(values).astype(float)


def reduce(rows: list[dict[str, float]], metric: str, at: str) -> float:
    """A run's evaluations as one number: `last`; `last10`, `median10`, of the last ten; `min valid/ce`, where that is lowest."""
    values = pd.DataFrame(rows)
    if metric not in values:
        raise ConfigError(f"table: metric {metric!r} was not measured; there are {', '.join(map(str, values))}")
    if last := re.fullmatch(r"last(\d*)", at):
        return float(values[metric].tail(int(last[1] or 1)).mean())
    if middle := re.fullmatch(r"median(\d+)", at):
        return float(values[metric].tail(int(middle[1])).median())
    how, _, key = at.partition(" ")
    if how not in ("min", "max") or key not in values:
        raise ConfigError(f"table.at: {at!r} is not known; allowed: last, last10, median10, 'min METRIC', 'max METRIC'")
    return float(values.loc[values[key].idxmin() if how == "min" else values[key].idxmax(), metric])


def printed(row: Row, choice: str, column: str) -> tuple[float, float]:
    """The paper's number and its ±, nan where it has none."""
    known = row.paper[choice] if isinstance(row.paper.get(choice), dict) else row.paper
    number, _, spread = str(known.get(column, "nan")).partition("±")
    return float(number), float(spread or "nan")


def picked(pick: str, mine: Jobs, found: dict[str, store.Run], at: str) -> str | None:
    """The choice whose mean over the seeds is best; None until all runs have ended: a pick among some would not be that pick.

    A choice with a run that diverged is none.
    """
    how, _, metric = pick.partition(" ")
    if any(identity not in found or found[identity].state not in ("done", "diverged") for identity in mine["id"]):
        return None
    means = numbers(mine, found, metric, at).groupby(mine["choice"]).agg(lambda values: values.mean(skipna=False)).dropna()
    return None if means.empty else str(means.idxmax() if how == "max" else means.idxmin())


def chosen(row: Row, mine: Jobs, found: dict[str, store.Run], at: str) -> str:
    """The choice that is printed of a row with a pick. `mine`: its wanted jobs in one column, as `due` gives them."""
    if row.select:  # then only the picked choice is wanted
        return UNPICKED if mine.empty else str(mine["choice"].iloc[0])
    return picked(str(row.pick), mine, found, at) or UNPICKED


def due(table: Table, asked: Jobs, found: dict[str, store.Run], guess: bool = False) -> tuple[Jobs, Jobs]:
    """(wanted, trials) of all jobs: those whose numbers are shown, and those that only choose.

    Of a row with `select` what is picked by its trials is wanted, and nothing while that is not known; with `guess` its first choice.
    """
    trials = asked[asked["trial"]]
    idle = set()
    for row, name in itertools.product(table.rows, table.columns):
        if row.select and row.pick is not None:
            mine = asked[(asked["row"] == row.label) & (asked["column"] == name)]
            choice = picked(row.pick, mine[mine["trial"]], found, table.at) or (choices(row, name)[0][0] if guess else UNPICKED)
            idle |= {*mine.index[mine["choice"] != choice]}
    return asked[~asked["trial"] & ~asked.index.isin(list(idle))], trials


def rejected(table: Table, wanted: Jobs, trials: Jobs, found: dict[str, store.Run]) -> Jobs:
    """The jobs that only chose: trials, and what a pick left of a row of which no claim reads every choice, unless another cell shows
    the same run.

    That one of them diverged is an outcome of its choice, and no failure of the table.
    """
    claimed = {label for claim in table.claims if claim.check != "best" and not claim.picked for label in claim.of}
    spare = []
    for row, name in itertools.product(table.rows, table.columns):
        if row.pick is not None:
            mine, tried = (jobs[(jobs["row"] == row.label) & (jobs["column"] == name)] for jobs in (wanted, trials))
            choice = chosen(row, mine, found, table.at)
            if choice != UNPICKED and (row.select or row.label not in claimed):
                spare += [*(tried.index if row.select else mine.index[mine["choice"] != choice])]
    both = pd.concat([wanted, trials]).sort_index()  # the table's order
    only = both[both.index.isin(spare)]
    return only[~only["id"].isin(both[~both.index.isin(spare)]["id"])]
