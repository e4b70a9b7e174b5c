"""How far runs are, those of a table or all that are stored.   python -m experiments.status --help"""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from experiments import store, timebox
from experiments.cli import RunFailed, main
from experiments.config import ConfigError
from experiments.index import finished
from experiments.launching import slurm
from experiments.spec import Table, TablesConfig

STATES = ("done", "running", "queued", "resumable", "failed", "diverged", "missing")
LISTED = ("running", "queued", "failed", "diverged", "resumable")  # one line for each run
MOST_LINES = 20  # of a state
WATCH_SECONDS = 5.0


@dataclass
class StatusConfig(TablesConfig):
    watch: float | None = None  # seconds between two looks
    retry: str | None = None  # failed
    prune: str = "false"  # true asks first, yes does not


class Entry(NamedTuple):
    """A run, its state, with "queued" for one in a cluster's hands, and its group: the row of a table, or the folder."""

    run: store.Run
    state: str
    group: str
    job: slurm.Job | None


def entries(cfg: DictConfig) -> list[Entry]:
    """The runs of the table, or of the store. The index tells which are done, and the folders of the others their states."""
    root = Path(cfg.runtime.runs)
    try:
        queue = slurm.listed(root)
    except slurm.Silent as error:
        print(f"retable: {error}; what is queued is not known", file=sys.stderr)
        queue = {}
    ended = {row["id"]: "diverged" if row["diverged"] else "done" for row in finished(root).to_dict("records")}
    known = {identity: store.Run(Path(path)) for identity, path in store.folders(root)}
    if OmegaConf.is_missing(cfg.table, "title"):
        groups = {identity: run.path.parent.name for identity, run in known.items()} | {one: "queued" for one in queue if one not in known}
    else:
        groups = _of_table(cfg, known)
    found = []
    for identity, group in groups.items():
        run, job = known.get(identity, store.Run(root / identity)), queue.get(identity)
        state = ended.get(identity) or run.state
        if job is not None and state in ("missing", "resumable", "failed"):
            state = "running" if job.state == "RUNNING" else "queued"
        found.append(Entry(run, state, group, job))
    return found


def _of_table(cfg: DictConfig, known: dict[str, store.Run]) -> dict[str, str]:
    from experiments.pick import due
    from experiments.table import common_overrides, jobs, narrowed

    table: Table = narrowed(cfg, cfg.table, cfg.only)
    wanted = pd.concat(due(table, jobs(table, common_overrides(), targets=False), known)).drop_duplicates("id")
    return dict(zip(wanted["id"], wanted["row"], strict=True))


def report(found: list[Entry], root: str) -> str:
    """The counts of each group, then the runs that are not simply done, as Markdown."""
    if not found:
        return f"no runs in {root}"
    counts = pd.crosstab([one.group for one in found], [one.state for one in found])
    counts = counts.reindex(columns=[state for state in STATES if state in counts], index=dict.fromkeys(one.group for one in found))
    if len(counts) > 1:
        counts.loc["all"] = counts.sum()
    lines = [counts.reset_index(names="").replace(0, "").to_markdown(index=False), ""]
    for state in LISTED:
        mine = [one for one in found if one.state == state]
        lines += [f"- {state}: {_line(one)}" for one in mine[:MOST_LINES]]
        lines += [f"- {state}: {len(mine) - MOST_LINES} more"] if len(mine) > MOST_LINES else []
    return "\n".join(lines)


def _line(one: Entry) -> str:
    name = f"{one.run.path.parent.name}/{one.run.path.name}" if one.run.path.is_dir() else one.run.path.name
    facts = []
    if one.state == "running" and (holder := one.run.holder()):
        facts.append(f"{holder['host']}, process {holder['pid']}, {_since(holder['since'])}")
    if one.job is not None and one.state in ("running", "queued"):
        why = f" ({one.job.reason})" if one.job.reason not in ("None", "") else ""
        facts.append(f"SLURM {one.job.id} {one.job.state}{why}")
    if one.state in ("running", "resumable"):
        facts.append(_progress(one.run, one.state == "running"))
    if one.state in ("failed", "diverged"):
        facts.append(one.run.error())
    return ", ".join([name, *filter(None, facts)])


def _since(start: float) -> str:
    minutes = max(0, time.time() - start) / 60  # a clock may have been put back
    return f"since {time.strftime('%a %H:%M', time.localtime(start))} ({minutes:.0f} min)"


def _progress(run: store.Run, running: bool) -> str:
    """The last epoch with a checkpoint; of a run that goes on the seconds left, by that epoch."""
    made = run.progress()
    if made is None or not made["epoch"]:
        return "no checkpoint yet"
    epoch, epochs = int(made["epoch"]), int(made["epochs"])
    since = max(0, time.time() - (run.path / "progress.json").stat().st_mtime)
    left = max(0, made["epoch_seconds"] * (epochs - epoch) - since)
    return f"epoch {epoch}/{epochs}" + (f", {left:.0f} s left" if running else "")


def retry(found: list[Entry], runtime: DictConfig) -> None:
    """Trains the failed ones again, on this machine, from their own configs. Raises RunFailed with those that fail once more."""
    from functools import partial

    from experiments.launching.devices import places
    from experiments.launching.launchers import SideBySide
    from experiments.train import train

    failed = [one.run for one in found if one.state == "failed"]
    able = [run for run in failed if (run.path / "config.yaml").exists()]
    print(f"{len(able)} of {len(failed)} failed runs are to be trained again")
    if len(able) < len(failed):
        print(f"{len(failed) - len(able)} have never begun: ask for their table again")
    with timebox.heeding_sigterm():
        jobs = {str(run.path): partial(run.config, runtime) for run in able}
        errors = SideBySide(Path(runtime.runs), places(runtime)).submit(train, jobs)
    if late := sum(isinstance(error, timebox.TimeUp) for error in errors):
        print(f"the time box has ended: {late} of them {'is' if late == 1 else 'are'} left")
    errors = [error for error in errors if not isinstance(error, timebox.TimeUp)]
    if errors:
        raise RunFailed("\nretable: ".join(map(str, errors)))


def prune(found: list[Entry], ask: bool) -> None:
    """Removes the folders of runs without a result that nobody trains or has queued. Raises ConfigError when nobody can be asked."""
    idle = [one for one in found if one.state in ("resumable", "failed", "missing") and one.run.path.is_dir()]
    for one in idle:
        print(f"{one.state}: {one.run.path}, {_progress(one.run, False)}")
    if not idle:
        return print("nothing to remove: every stored run has a result, is being trained, or is queued")
    if ask:
        if not sys.stdin.isatty():
            raise ConfigError("prune: nobody is there to be asked; prune=yes removes these without")
        if input(f"Remove these {len(idle)} folders? What they have learned is lost. [y/N] ").strip().lower() not in ("y", "yes"):
            return print("nothing was removed")
    removed = 0
    for one in idle:
        if one.run.acquire():  # nobody can have begun it since
            if one.run.result() is None:
                shutil.rmtree(one.run.path)
                removed += 1
            one.run.release()
    print(f"{removed} folders were removed")


def run(cfg: DictConfig) -> None:
    """The task that Hydra runs."""
    if cfg.retry not in (None, "failed"):
        raise ConfigError(f"retry: {cfg.retry} is not allowed; it must be failed")
    answer = cfg.prune.lower()
    if answer not in ("false", "true", "yes"):
        raise ConfigError(f"prune: {cfg.prune} is not allowed; it must be false, true, or yes: without asking")
    found = entries(cfg)
    if cfg.retry:
        return retry(found, cfg.runtime)
    if answer != "false":
        return prune(found, ask=answer == "true")
    print(report(found, cfg.runtime.runs), flush=True)
    while cfg.watch is not None:
        time.sleep(cfg.watch)
        text = report(entries(cfg), cfg.runtime.runs)
        print("\x1b[2J\x1b[H" * sys.stdout.isatty() + text, flush=True)


ConfigStore.instance().store("status_schema", StatusConfig)

if __name__ == "__main__":
    from experiments.status import run as task

    words = {"--watch": f"watch={WATCH_SECONDS}", "prune": "prune=true"}
    sys.argv[1:] = [words.get(word, word) for word in sys.argv[1:]]
    main(task, "status")
