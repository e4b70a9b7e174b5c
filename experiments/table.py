"""A paper's table: find the runs it needs, train what is missing, print ours beside the paper's.   python -m experiments.table --help"""

from __future__ import annotations

import itertools
import math
import re
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobStatus
from omegaconf import DictConfig, OmegaConf

from experiments import store
from experiments.cli import BAD_INPUT, RunFailed, main, one_line
from experiments.config import ConfigError, check, options
from experiments.launch import compose, launch
from experiments.pick import UNPICKED, Jobs, check_rows, choices, chosen, due, numbers, printed, rejected
from experiments.spec import OWN_KEYS, Claim, Table
from experiments.train import train

POLL_SECONDS = 0.5


def jobs(table: Table, common: Iterable[str] = (), targets: bool = True) -> Jobs:
    """Every run that the table can need; `due` says which it does. `common` overrides come last: what the user asks for holds for all runs.

    Columns and rows that describe the same run share its id. Raises ConfigError on a cell that cannot be run.
    """
    common = list(common)
    asked = " ".join(word for word in common if not word.startswith(("runtime.", "hydra", "profile=")))
    known: dict[tuple[str, ...], list[DictConfig]] = {}  # columns often differ in the metric only, and composing takes time
    lines = []
    for row, (name, column) in itertools.product(table.rows, table.columns.items()):
        for (choice, values), trial in itertools.product(choices(row, name), [True, False] if row.select else [False]):
            overrides = [*table.base, *row.overrides, *column.overrides, *values, *(row.select if trial else []), *common]
            if tuple(overrides) not in known:
                known[tuple(overrides)] = compose(overrides, table.seeds)
                check(known[tuple(overrides)][0], targets)
            configs = known[tuple(overrides)]
            for cfg in configs[: configs[0].profile.seeds]:
                line = {"row": row.label, "choice": choice, "column": name, "seed": cfg.seed, "trial": trial}
                line |= {"profile": cfg.profile.name, "precision": cfg.precision, "asked": asked}
                lines.append(line | {"overrides": [*overrides, f"seed={cfg.seed}"], "id": store.run_id(cfg)})
    return pd.DataFrame(lines)


def fill(table: Table, wanted: Jobs, found: dict[str, store.Run], trials: Jobs | None = None) -> pd.DataFrame:
    """The cells, one line per printed number.

    row, choice, picked, column, metric, ours, std, n, wanted, paper, paper_std, gap, paper_choice, quoted, doubted, state.
    """
    states = {identity: run.state for identity, run in found.items()}
    cells = []
    for row, (name, column) in itertools.product(table.rows, table.columns.items()):
        mine = wanted[(wanted["row"] == row.label) & (wanted["column"] == name)]
        value = numbers(mine, found, column.metric, column.at or table.at, column.chance)
        if column.delta:
            base = wanted[(wanted["row"] == row.against) & (wanted["column"] == name)]
            value = value - mine["seed"].map(numbers(base, found, column.metric, column.at or table.at).set_axis(base["seed"]))
        shown = [choice for choice, _ in choices(row, name)] if row.pick is None else [chosen(row, mine, found, table.at)]
        for choice in shown:
            ours = value[mine["choice"] == choice]
            of_choice = mine if choice == UNPICKED else mine[mine["choice"] == choice]
            if choice == UNPICKED and row.select and trials is not None:
                of_choice = trials[(trials["row"] == row.label) & (trials["column"] == name)]
            seen = {states.get(identity, "missing") for identity in of_choice["id"]}
            paper, paper_std = printed(row, choice, name)
            center = ours.median() if table.over == "median" else ours.mean()
            if column.chance is not None:  # how a run came to nothing does not matter then
                seen = seen - {"diverged"} | ({"diverged"} if column.idle(center) else set())
            cells.append(
                {"row": row.label, "choice": choice, "picked": row.pick or "", "column": name, "metric": column.metric}
                | {"ours": center, "std": ours.std(), "n": int(ours.notna().sum()), "wanted": len(of_choice)}
                | {"paper": paper, "paper_std": paper_std, "gap": center - paper, "paper_choice": row.paper.get("choice", "")}
                | {"quoted": row.quoted.get(name, math.nan), "doubted": name in row.doubted}
                | {"state": next((state for state in ("failed", "diverged") if state in seen), "")}
            )
    return pd.DataFrame(cells)


def find(wanted: Jobs, root: str) -> dict[str, store.Run]:
    return store.find(Path(root), wanted["id"])


def complete(table: Table, asked: Jobs, root: str) -> list[str]:
    """Train what is missing, and of rows with `select` what is picked once their trials have ended.

    Runs that other processes train are waited for, and taken over when those processes end without a result.
    Returns the lines of bad input that jobs met (a data set that is not there, say): those runs stay missing.
    """
    overrides = dict(zip(asked["id"], asked["overrides"], strict=True))
    tried: set[str] = set()
    complaints: list[str] = []
    while True:
        found = find(asked, root)
        states = {identity: run.state for identity, run in found.items()}  # before `due`: a trial that ends in between is not passed over
        now_due = list(dict.fromkeys(identity for jobs in due(table, asked, found) for identity in jobs["id"]))
        left = [identity for identity in now_due if states.get(identity, "missing") in ("missing", "resumable", "failed")]
        mine = [identity for identity in left if identity not in tried]
        if mine:
            print(f"{len(mine)} of {len(now_due)} runs are to be trained", flush=True)
            for done in launch(train, [overrides[identity] for identity in mine]):
                error = done._return_value if done.status == JobStatus.FAILED else None
                if isinstance(error, RunFailed):
                    print(f"retable: {error}", file=sys.stderr)
                elif isinstance(error, BAD_INPUT):
                    complaints.append(one_line(error))
                elif error is not None:
                    raise error
            now = {identity: run.state for identity, run in find(asked, root).items()}
            tried |= {identity for identity in mine if now.get(identity) != "running"}
        elif any(states.get(identity) == "running" for identity in now_due):
            time.sleep(POLL_SECONDS)
        else:
            return list(dict.fromkeys(complaints))


def common_overrides() -> list[str]:
    """The overrides of the command line that are the runs', not the command's own."""
    words = HydraConfig.get().overrides.task
    return [word for word in words if word.lstrip("+~").split("=")[0].split(".")[0] not in OWN_KEYS]


def narrowed(cfg: DictConfig, spec: DictConfig, *only: Sequence[str]) -> Table:
    """The typed table, cut to the rows and columns that each list names, by a word or several words of theirs; rows that others are
    compared with stay."""
    if OmegaConf.is_missing(spec, "title"):
        kind = "table" if spec is cfg.get("table") else "figure"
        raise ConfigError(f"{kind}: nothing is chosen; allowed: {', '.join(options(kind))}")
    table: Table = OmegaConf.to_object(spec)  # type: ignore[assignment]
    check_rows(table)
    for claim in table.claims:  # what it was about, so that its verdict can say what is left of that
        claim.columns = claim.columns or list(table.columns)
    whole = replace(table)
    for asked in ([{*str(words).split()} for words in one] for one in only):
        names = [{*name.split()} for name in (*table.columns, *(row.label for row in table.rows))]
        if unknown := next((words for words in asked if not any(words <= name for name in names)), None):
            known = ", ".join(sorted(set().union(*names)))
            raise ConfigError(f"only: no row or column has {' '.join(sorted(unknown))} in its name; allowed: {known}")
        columns = {name: column for name, column in table.columns.items() if any(words <= {*name.split()} for words in asked)}
        labels = {row.label for row in table.rows if any(words <= {*row.label.split()} for words in asked)}
        labels |= {row.against for row in table.rows if row.label in labels and row.against is not None}
        table.columns = columns or table.columns
        table.rows = [row for row in table.rows if row.label in labels] or table.rows
    labels = {row.label for row in table.rows}
    lost = {row.label for row in whole.rows} - labels

    def untried(claim: Claim) -> bool:  # none can be called the best without all the rows that it must beat
        return claim.check == "best" and any(lost & {*whole.rivals(label, claim.against)} for label in {*claim.of} & labels)

    table.claims = [claim for claim in table.claims if {*claim.of} & labels and not untried(claim)]
    return table


def run(cfg: DictConfig) -> None:
    """The task that Hydra runs: plan or train, then print and write. Raises RunFailed when runs of the table failed or diverged."""
    from experiments.claims import verdicts
    from experiments.show import choosing, show

    table = narrowed(cfg, cfg.table, cfg.only)
    asked = jobs(table, common_overrides(), targets=cfg.launch)
    if cfg.plan:
        from experiments.plan import plan

        print(plan(table, asked, cfg))
        return
    complaints = complete(table, asked, cfg.runtime.runs) if cfg.launch else []
    found = find(asked, cfg.runtime.runs)
    wanted, trials = due(table, asked, found)
    spare = rejected(table, wanted, trials, found)
    cells = fill(table, wanted, found, trials)
    facts = choosing(trials, spare, found)
    print(show(table, wanted, found, cells, verdicts(table, wanted, found), output_name(cfg), facts))
    if complaints:
        raise ConfigError("; ".join(complaints))
    outcomes = wanted["id"][wanted["column"].isin([name for name, column in table.columns.items() if column.chance is not None])]
    raise_failed(pd.concat([wanted, trials]), found, [*spare["id"], *outcomes])


def raise_failed(wanted: Jobs, found: dict[str, store.Run], spare: Iterable[str] = ()) -> None:
    """Raises RunFailed when runs that were asked for failed or diverged; those of `spare` may diverge."""
    may = set(spare)
    seen = {identity: found[identity] for identity in wanted["id"] if identity in found}
    states = {identity: one.state for identity, one in seen.items()}
    bad = [identity for identity, state in states.items() if state == "failed" or (state == "diverged" and identity not in may)]
    if bad:
        lines = [f"{seen[identity].path}: {seen[identity].error()}" for identity in bad]
        raise RunFailed(f"{len(bad)} of {wanted['id'].nunique()} runs failed or diverged: {'; '.join(lines)}")


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
