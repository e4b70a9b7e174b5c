"""A paper's table: find the runs it needs, train what is missing, print ours beside the paper's.   python -m experiments.table --help"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from experiments import store
from experiments.cli import RunFailed, main
from experiments.compose import compose
from experiments.config import ConfigError, check, options
from experiments.identity import run_ids
from experiments.launching.missing import complete, find, unfinished
from experiments.pick import UNPICKED, Jobs, check_rows, choices, chosen, due, numbers, printed, rejected, variants
from experiments.published import counted, notes
from experiments.spec import OWN_KEYS, Claim, Table


def jobs(table: Table, common: Iterable[str] = (), targets: bool = True) -> Jobs:
    """Every run that the table can need; `due` says which it does. `common` overrides come last: what the user asks for holds for all runs.

    Columns and rows that describe the same run share its id. Raises ConfigError on a cell that cannot be run.
    """
    common = list(common)
    asked = " ".join(word for word in common if not word.startswith(("runtime.", "hydra", "profile=")))
    known: dict[tuple[str, ...], tuple[DictConfig, list[str]]] = {}  # columns often differ in the metric only, and composing takes time
    lines = []
    for row, name, choice, trial, own in variants(table):
        overrides = [*own, *common]
        if tuple(overrides) not in known:
            cfg = compose(overrides)
            check(cfg, targets)
            known[tuple(overrides)] = cfg, run_ids(cfg, table.seeds)
        cfg, ids = known[tuple(overrides)]
        for seed, identity in list(zip(table.seeds, ids, strict=True))[: cfg.profile.seeds]:
            line = {"row": row.label, "choice": choice, "column": name, "seed": seed, "trial": trial}
            line |= {"profile": cfg.profile.name, "precision": cfg.precision, "asked": asked}
            lines.append(line | {"overrides": [*overrides, f"seed={seed}"], "id": identity})
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
    asked = jobs(table, common_overrides(), targets=cfg.launch and not cfg.plan)
    if cfg.plan:
        from experiments.plan import plan

        print(plan(table, asked, cfg))
        return
    shared = counted(cfg)
    complaints = complete(table, asked, cfg.runtime, cfg.wait, shared) if cfg.launch else []
    found = find(asked, cfg.runtime.runs, shared)
    wanted, trials = due(table, asked, found)
    spare = rejected(table, wanted, trials, found)
    cells = fill(table, wanted, found, trials)
    facts = [*choosing(trials, spare, found), *notes(table, wanted, found, shared)]
    print(show(table, wanted, found, cells, verdicts(table, wanted, found), output_name(cfg), facts))
    if complaints:
        raise ConfigError("; ".join(complaints))
    left = unfinished(table, asked, found, cfg.runtime) if cfg.launch else ""
    if left:
        print(left)
    outcomes = wanted["id"][wanted["column"].isin([name for name, column in table.columns.items() if column.chance is not None])]
    raise_failed(pd.concat([wanted, trials]), found, [*spare["id"], *outcomes], ended=cfg.launch and cfg.wait and not left)


def raise_failed(wanted: Jobs, found: dict[str, store.Run], spare: Iterable[str] = (), ended: bool = False) -> None:
    """Raises RunFailed when runs that were asked for failed or diverged; those of `spare` may diverge.

    ended: or when they have no result, although all have been tried.
    """
    may, count = set(spare), wanted["id"].nunique()
    states = {identity: found[identity].state if identity in found else "missing" for identity in wanted["id"]}
    bad = [identity for identity, state in states.items() if state == "failed" or (state == "diverged" and identity not in may)]
    lines = [f"{found[identity].path}: {found[identity].error()}" for identity in bad]
    said = [f"{len(bad)} of {count} runs failed or diverged: {'; '.join(lines)}"] if bad else []
    if ended and (lost := [identity for identity, state in states.items() if state in ("missing", "resumable")]):
        said.append(f"{len(lost)} of {count} runs ended without a result (killed, or out of time or memory): ask again and they go on")
    if said:
        raise RunFailed("\nretable: ".join(said))


def output_name(cfg: DictConfig, kind: str = "table") -> Path:
    """Where a table's or figure's files go, without their endings: its name, and what its runs were asked to do differently."""
    plain = {*OWN_KEYS} - {"only"}
    words = HydraConfig.get().overrides.task
    asked = [word for word in words if word.split("=")[0] not in plain and not word.startswith("runtime.")]
    name = "-".join([HydraConfig.get().runtime.choices.get(kind) or kind, *(re.sub(r"[^\w=.,+-]+", "", word) for word in asked)])
    return Path(cfg.out) / name[:200]


if __name__ == "__main__":
    from experiments.table import run as task

    main(task, "tables")
