"""All tables and figures of a paper: their plan, then each of them, then the verdicts.   python -m experiments.paper --help"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import MISSING, DictConfig

from experiments import store, timebox
from experiments.cli import main
from experiments.config import Config, ConfigError, options
from experiments.cost import stored
from experiments.launching.launchers import on_cluster
from experiments.launching.missing import find
from experiments.plan import Known, costs, shown
from experiments.published import counted
from experiments.table import common_overrides, jobs, narrowed

VERDICTS = ("reproduced", "not reproduced", "not decided", "seen once", "not seen once", "not run")


@dataclass
class PapersConfig(Config):
    paper: str = MISSING
    plan: bool = False
    published: bool | None = None  # true: published runs count as done
    out: str = "runs/tables"


class Part(NamedTuple):
    """A table or figure; the runs that it reads, how many of them an earlier one has too, how many are missing, and their hours."""

    kind: str
    name: str
    runs: int = 0
    shared: int = 0
    missing: int = 0
    hours: float = 0.0


def papers() -> dict[str, list[tuple[str, str]]]:
    """Each paper's tables and figures: those whose names begin with its own. Demonstrations, on our own data, are no paper's."""
    known = [(kind, name) for kind in ("table", "figure") for name in options(kind) if "_" in name and "demo" not in name]
    names = dict.fromkeys(name.partition("_")[0] for kind, name in known if kind == "table")
    return {paper: [part for part in known if part[1].partition("_")[0] == paper] for paper in names}


def planned(parts: Sequence[tuple[str, str]], cfg: DictConfig, words: list[str]) -> list[Part]:
    """What they cost, the cheapest first, so that something is printed early; where that is not known, last.

    In a time box figures without runs come last: nothing ends them early.
    """
    root, loader = Path(cfg.runtime.runs), GlobalHydra.instance().config_loader()
    shared, known, found = counted(cfg), Known(stored(root), timing=cfg.plan or cfg.runtime.time_limit is None), []
    for kind, name in parts:
        whole = loader.load_configuration(f"{kind}s", [f"{kind}={name}", *words], RunMode.RUN, from_shell=False)
        spec = whole.table if kind == "table" else whole.figure.runs
        part, ids, hours = Part(kind, name), set[str](), dict[str, float]()
        if spec.rows:
            table = narrowed(whole, spec, *([] if kind == "table" else [whole.figure.only]), whole.only)
            asked = jobs(table, words, targets=False)
            _, ids, hours, *_ = costs(table, asked, find(asked, cfg.runtime.runs, shared), known)
            part = part._replace(runs=len(ids), missing=len(hours), hours=sum(hours.values()))
        found.append((part, ids, hours))
    order, seen = [], set[str]()

    def turn(part: Part) -> tuple[bool, bool, float, bool]:
        return cfg.runtime.time_limit is not None and not part.runs, math.isnan(part.hours), part.hours, part.kind == "figure"

    for part, ids, hours in sorted(found, key=lambda each: turn(each[0])):
        new = sum(of for identity, of in hours.items() if identity not in seen)
        order.append(part._replace(shared=len(ids & seen), hours=new))
        seen |= ids
    return order


def listed(parts: Sequence[Part], title: str) -> str:
    """The plan as Markdown."""
    sure = [part.hours for part in parts if not math.isnan(part.hours)]
    names = [f"{part.kind} {part.name}" for part in parts]
    hours = [shown(part.hours) for part in parts]
    table = pd.DataFrame(parts)[["runs", "shared", "missing"]].assign(hours=hours).set_index(pd.Index(names, name=""))
    more = " and more, where it is not known" if len(sure) < len(parts) else ""
    notes = [f"{sum(sure):.2f} hours one after another{more}", "shared: runs that an earlier one has too; their hours count there"]
    return "\n".join([f"## {title}: the plan", "", table.to_markdown(disable_numparse=True), "", *(f"- {note}" for note in notes), ""])


def ask(part: Part, words: Sequence[str], quiet: bool = False) -> tuple[int, list[tuple[str, str]]]:
    """The command for one of them, in a process of its own; its exit code, and its verdicts with what they are about."""
    command = [sys.executable, "-m", f"experiments.{part.kind}", *words, f"{part.kind}={part.name}"]
    verdicts = []
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process, timebox.child(process):
        assert process.stdout is not None
        for line in process.stdout:
            if not quiet or "submitted" in line:
                print(line, end="", flush=True)
            if match := re.fullmatch(rf"- \*\*({'|'.join(VERDICTS)})\*\*: (.+)\n", line):
                verdicts.append((match[1], match[2]))
    return process.returncode, verdicts


def summary(found: dict[str, list[tuple[str, str]]], title: str) -> str:
    """Every verdict: how many of each kind for each table, and then each of them."""
    pairs = pd.DataFrame([(name, verdict) for name, of in found.items() for verdict, _ in of], columns=["", "verdict"])
    counts = pd.crosstab(pairs[""], pairs["verdict"]).reindex(index=list(found), columns=list(VERDICTS), fill_value=0)
    table = counts.replace(0, "").to_markdown(disable_numparse=True) if found else "none: these tables make no claims"
    each = [f"- {name}: **{verdict}**: {says}" for name, of in found.items() for verdict, says in of]
    return "\n".join([f"## {title}: the verdicts", "", table, "", *each, ""])


def run(cfg: DictConfig) -> None:
    """The task that Hydra runs. Its exit code is the worst of the tables' and figures'."""
    known = papers()
    if cfg.paper not in (*known, "all"):
        raise ConfigError(f"paper: {cfg.paper} is not known; allowed: {', '.join(known)}, all")
    words = common_overrides()
    parts = planned([part for name, of in known.items() if cfg.paper in (name, "all") for part in of], cfg, words)
    title = "All papers" if cfg.paper == "all" else cfg.paper
    print(listed(parts, title), flush=True)
    if cfg.plan:
        return
    given = HydraConfig.get().overrides
    extra = [source.path for source in HydraConfig.get().runtime.config_sources if source.provider == "command-line"]
    own = [word for word in given.task if word.startswith(("out=", "published="))]
    every = [*(f"--config-dir={path}" for path in extra), *words, *given.hydra, *own]
    if on_cluster():
        for part in parts:
            if part.missing:
                ask(part, [*every, "wait=false"], quiet=True)
    worst, verdicts = 0, {}
    with timebox.heeding_sigterm():
        for number, part in enumerate(parts, 1):
            if timebox.left(cfg.runtime) <= 0:
                left = ", ".join(f"{part.kind} {part.name}" for part in parts[number - 1 :])
                print(f"\nthe time box has ended before {left}; ask again and it goes on")
                sys.exit(worst)
            print(f"\n[{number}/{len(parts)}] {part.kind} {part.name}\n", flush=True)
            code, said = ask(part, every)
            worst = max(worst, code)
            if said:
                verdicts[part.name] = said
    text = summary(verdicts, title)
    out = Path(cfg.out) / f"{cfg.paper}-verdicts.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    with store.written(out) as file:
        file.write(text.encode())
    print(f"\n{text}\n{out}")
    sys.exit(worst)


ConfigStore.instance().store("papers_schema", PapersConfig)

if __name__ == "__main__":
    from experiments.paper import run as task

    main(task, "papers")
