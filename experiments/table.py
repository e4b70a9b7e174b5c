"""A paper's table: find the runs it needs, train what is missing, print ours beside the paper's.   python -m experiments.table --help"""

from __future__ import annotations

import itertools
import re
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

import pandas as pd
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobStatus
from omegaconf import DictConfig, OmegaConf

from experiments import store
from experiments.cli import BAD_INPUT, RunFailed, main, one_line
from experiments.config import ConfigError, check, options
from experiments.launch import compose, launch
from experiments.spec import OWN_KEYS, Row, Table
from experiments.train import train

Jobs: TypeAlias = pd.DataFrame  # row, choice, column, seed, profile, precision, asked, overrides, id: one line per cell and seed
POLL_SECONDS = 0.5
UNPICKED = "?"  # in place of a row's choice, while its runs have not all ended


def jobs(table: Table, common: Iterable[str] = (), targets: bool = True) -> Jobs:
    """Every run that the table needs. `common` overrides come last: what the user asks for holds for all runs.

    Columns and rows that describe the same run share its id. Raises ConfigError on a cell that cannot be run.
    """
    common = list(common)
    asked = " ".join(word for word in common if not word.startswith(("runtime.", "hydra", "profile=")))
    known: dict[tuple[str, ...], list[DictConfig]] = {}  # columns often differ in the metric only, and composing takes time
    lines = []
    for row, (name, column) in itertools.product(table.rows, table.columns.items()):
        for choice, chosen in choices(row):
            overrides = [*table.base, *row.overrides, *column.overrides, *chosen, *common]
            if tuple(overrides) not in known:
                known[tuple(overrides)] = compose(overrides, table.seeds)
                check(known[tuple(overrides)][0], targets)
            configs = known[tuple(overrides)]
            for cfg in configs[: configs[0].profile.seeds]:
                line = {"row": row.label, "choice": choice, "column": name, "seed": cfg.seed}
                line |= {"profile": cfg.profile.name, "precision": cfg.precision, "asked": asked}
                lines.append(line | {"overrides": [*overrides, f"seed={cfg.seed}"], "id": store.run_id(cfg)})
    return pd.DataFrame(lines)


def choices(row: Row) -> list[tuple[str, list[str]]]:
    """The values that a row's grid takes: a name for each, and its overrides. One nameless choice without a grid."""
    found = []
    for values in itertools.product(*row.grid.values()):
        pairs = dict(zip(row.grid, values, strict=True))
        name = f"{values[0]}" if len(values) == 1 else ", ".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in pairs.items())
        found.append((name, [f"{key}={value}" for key, value in pairs.items()]))
    return found


def numbers(wanted: Jobs, found: dict[str, store.Run], metric: str, at: str) -> pd.Series:
    """The table's number of each job, nan where there is none: a finished run's evaluations reduced by `at`."""
    rows = {identity: run.metrics() if run.state == "done" else [] for identity, run in found.items()}
    values = {identity: reduce(evaluations, metric, at) for identity, evaluations in rows.items() if evaluations}
    return wanted["id"].map(values).astype(float)


def reduce(rows: list[dict[str, float]], metric: str, at: str) -> float:
    """A run's evaluations as one number: `last`; `last10`, the mean of the last ten; `min valid/ce`, where that is lowest."""
    values = pd.DataFrame(rows)
    if metric not in values:
        raise ConfigError(f"table: metric {metric!r} was not measured; there are {', '.join(map(str, values))}")
    if last := re.fullmatch(r"last(\d*)", at):
        return float(values[metric].tail(int(last[1] or 1)).mean())
    how, _, key = at.partition(" ")
    if how not in ("min", "max") or key not in values:
        raise ConfigError(f"table.at: {at!r} is not known; allowed: last, last10, 'min METRIC', 'max METRIC'")
    return float(values.loc[values[key].idxmin() if how == "min" else values[key].idxmax(), metric])


def fill(table: Table, wanted: Jobs, found: dict[str, store.Run]) -> pd.DataFrame:
    """The cells: row, choice, picked, column, ours, std, n, wanted, paper, paper_std, gap, state; one line per printed number."""
    states = {identity: run.state for identity, run in found.items()}
    cells = []
    for row, (name, column) in itertools.product(table.rows, table.columns.items()):
        mine = wanted[(wanted["row"] == row.label) & (wanted["column"] == name)]
        value = numbers(mine, found, column.metric, table.at)
        if column.delta:
            base = wanted[(wanted["row"] == row.against) & (wanted["column"] == name)]
            value = value - mine["seed"].map(numbers(base, found, column.metric, table.at).set_axis(base["seed"]))
        shown = [choice for choice, _ in choices(row)]
        if row.pick is not None:
            shown = [picked(row.pick, mine, found, table.at) or UNPICKED]
        for choice in shown:
            ours = value[mine["choice"] == choice]
            of_choice = mine if choice == UNPICKED else mine[mine["choice"] == choice]
            seen = {states.get(identity, "missing") for identity in of_choice["id"]}
            paper, paper_std = _paper(row, choice, name)
            center = ours.median() if table.over == "median" else ours.mean()
            cells.append(
                {"row": row.label, "choice": choice, "picked": row.pick or "", "column": name, "metric": column.metric}
                | {"ours": center, "std": ours.std(), "n": int(ours.notna().sum()), "wanted": len(of_choice)}
                | {"paper": paper, "paper_std": paper_std, "gap": center - paper, "paper_choice": row.paper.get("choice", "")}
                | {"state": next((state for state in ("failed", "diverged") if state in seen), "")}
            )
    return pd.DataFrame(cells)


def picked(pick: str, mine: Jobs, found: dict[str, store.Run], at: str) -> str | None:
    """The choice whose mean over the seeds is best; None until all runs have ended: a pick among some would not be that pick.

    A choice with a run that diverged is none.
    """
    how, _, metric = pick.partition(" ")
    if any(identity not in found or found[identity].state not in ("done", "diverged") for identity in mine["id"]):
        return None
    means = numbers(mine, found, metric, at).groupby(mine["choice"]).agg(lambda values: values.mean(skipna=False)).dropna()
    return None if means.empty else str(means.idxmax() if how == "max" else means.idxmin())


def _paper(row: Row, choice: str, column: str) -> tuple[float, float]:
    """The paper's number and its ±, nan where it has none."""
    known = row.paper[choice] if isinstance(row.paper.get(choice), dict) else row.paper
    number, _, spread = str(known.get(column, "nan")).partition("±")
    return float(number), float(spread or "nan")


def find(wanted: Jobs, root: str) -> dict[str, store.Run]:
    return store.find(Path(root), wanted["id"])


def complete(wanted: Jobs, root: str) -> list[str]:
    """Train what is missing. Runs that other processes train are waited for, and taken over when those processes end without a result.

    Returns the lines of bad input that jobs met (a data set that is not there, say): those runs stay missing.
    """
    overrides = dict(zip(wanted["id"], wanted["overrides"], strict=True))
    tried: set[str] = set()
    complaints: list[str] = []
    while True:
        states = {identity: run.state for identity, run in find(wanted, root).items()}
        left = [identity for identity in overrides if states.get(identity, "missing") in ("missing", "resumable", "failed")]
        mine = [identity for identity in left if identity not in tried]
        if mine:
            print(f"{len(mine)} of {len(overrides)} runs are to be trained", flush=True)
            for done in launch(train, [overrides[identity] for identity in mine]):
                error = done._return_value if done.status == JobStatus.FAILED else None
                if isinstance(error, RunFailed):
                    print(f"retable: {error}", file=sys.stderr)
                elif isinstance(error, BAD_INPUT):
                    complaints.append(one_line(error))
                elif error is not None:
                    raise error
            now = {identity: run.state for identity, run in find(wanted, root).items()}
            tried |= {identity for identity in mine if now.get(identity) != "running"}
        elif any(state == "running" for state in states.values()):
            time.sleep(POLL_SECONDS)
        else:
            return list(dict.fromkeys(complaints))


def common_overrides() -> list[str]:
    """The overrides of the command line that are the runs', not the command's own."""
    words = HydraConfig.get().overrides.task
    return [word for word in words if word.lstrip("+~").split("=")[0].split(".")[0] not in OWN_KEYS]


def narrowed(cfg: DictConfig, spec: DictConfig, *only: Sequence[str]) -> Table:
    """The typed table, cut to the rows and columns that each list of words names; rows that others are compared with stay."""
    if OmegaConf.is_missing(spec, "title"):
        kind = "table" if spec is cfg.get("table") else "figure"
        raise ConfigError(f"{kind}: nothing is chosen; allowed: {', '.join(options(kind))}")
    table: Table = OmegaConf.to_object(spec)  # type: ignore[assignment]
    for claim in table.claims:  # what it was about, so that its verdict can say what is left of that
        claim.columns = claim.columns or list(table.columns)
    for words in ({*map(str, words)} for words in only):
        known = {word for name in (*table.columns, *(row.label for row in table.rows)) for word in name.split()}
        if unknown := sorted(words - known):
            raise ConfigError(f"only: no row or column has {unknown[0]} in its name; allowed: {', '.join(sorted(known))}")
        columns = {name: column for name, column in table.columns.items() if words & {*name.split()}}
        labels = {row.label for row in table.rows if words & {*row.label.split()}}
        labels |= {row.against for row in table.rows if row.label in labels and row.against is not None}
        table.columns = columns or table.columns
        table.rows = [row for row in table.rows if row.label in labels] or table.rows
    labels = {row.label for row in table.rows}
    table.claims = [claim for claim in table.claims if {*claim.of} & labels]
    return table


def run(cfg: DictConfig) -> None:
    """The task that Hydra runs: plan or train, then print and write. Raises RunFailed when runs of the table failed or diverged."""
    from experiments.claims import verdicts
    from experiments.show import show

    table = narrowed(cfg, cfg.table, cfg.only)
    wanted = jobs(table, common_overrides(), targets=cfg.launch)
    if cfg.plan:
        from experiments.plan import plan

        print(plan(table, wanted, cfg))
        return
    complaints = complete(wanted, cfg.runtime.runs) if cfg.launch else []
    found = find(wanted, cfg.runtime.runs)
    cells = fill(table, wanted, found)
    print(show(table, wanted, found, cells, verdicts(table, wanted, found), output_name(cfg)))
    if complaints:
        raise ConfigError("; ".join(complaints))
    raise_failed(wanted, found)


def raise_failed(wanted: Jobs, found: dict[str, store.Run]) -> None:
    """Raises RunFailed when runs that were asked for failed or diverged."""
    seen = [found[identity] for identity in dict.fromkeys(wanted["id"]) if identity in found]
    bad = [f"{one.path}: {one.error()}" for one in seen if one.state in ("failed", "diverged")]
    if bad:
        raise RunFailed(f"{len(bad)} of {wanted['id'].nunique()} runs failed or diverged: {'; '.join(bad)}")


def output_name(cfg: DictConfig, kind: str = "table") -> Path:
    """Where a table's or figure's files go, without their endings: its name, and what its runs were asked to do differently."""
    plain = ("table", "figure", "launch", "plan", "out")
    words = HydraConfig.get().overrides.task
    asked = [word for word in words if word.split("=")[0] not in plain and not word.startswith("runtime.")]
    name = "-".join([HydraConfig.get().runtime.choices.get(kind) or kind, *(re.sub(r"[^\w=.,+-]+", "", word) for word in asked)])
    return Path(cfg.out) / name[:200]


if __name__ == "__main__":
    from experiments.table import run as task

    main(task, "tables")
