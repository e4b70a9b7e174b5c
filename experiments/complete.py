"""What a table or figure still lacks is trained: here, by several processes, or on a cluster, whose jobs others may have submitted."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import BrokenExecutor
from functools import partial
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig

from experiments import cluster, cost, store, timebox, train
from experiments.apart import side_by_side
from experiments.cli import BAD_INPUT, RunFailed, one_line
from experiments.config import ConfigError, first_line
from experiments.devices import places
from experiments.launch import compose, launch, launcher
from experiments.pick import Jobs, due
from experiments.spec import Table

POLL_SECONDS = 0.5  # between two looks at the runs' files; longer where there are many: looking is to take little of the time
QUEUE_SECONDS = 5.0  # between two looks at a cluster's queue
SAY_SECONDS = 20.0  # between two lines that say how far a cluster is


def find(wanted: Jobs, root: str, shared: Mapping[str, store.Run] | None = None) -> dict[str, store.Run]:
    """The stored runs, and those of `shared`, the published ones, in place of runs without a result."""
    own, shared = store.find(Path(root), wanted["id"]), shared or {}
    lacking = [identity for identity in wanted["id"] if identity in shared and (identity not in own or own[identity].result() is None)]
    return own | {identity: shared[identity] for identity in lacking}


def complete(table: Table, asked: Jobs, runtime: DictConfig, wait: bool = True, shared: Mapping[str, store.Run] | None = None) -> list[str]:
    """Train what is missing, and of rows with `select` what is picked once their trials have ended; each run is tried once.

    What counts is the runs' own files, whatever a launcher says. Runs that other processes train, or that are in a cluster's queue, are
    waited for, and taken over when those end without a result, until the command's time box ends. wait: false submits what it can and
    returns. shared: published runs that count as done.
    Returns the lines of bad input that jobs met (a data set that is not there, say): those runs stay missing.
    """
    overrides = dict(zip(asked["id"], asked["overrides"], strict=True))
    tried: set[str] = set()
    complaints: list[str] = []
    root, on_cluster, said = Path(runtime.runs), launcher() == "submitit_slurm", time.monotonic()
    if launcher().startswith("submitit") and runtime.time_limit is not None:
        raise ConfigError(f"runtime.time_limit: {launcher()} has a limit of its own for each job, hydra.launcher.timeout_min")
    # A launcher starts every run that it is given. In a time box, and by submitit here, it is given as many as there are places.
    in_turns = launcher() == "submitit_local" or (launcher() == "basic" and places(runtime) == 1 and timebox.given(runtime))
    with contextlib.nullcontext() if on_cluster else timebox.heeding_sigterm():  # there, jobs go on without the command
        while timebox.left(runtime) > 0:
            with cluster.turn(root) if on_cluster else contextlib.nullcontext():
                began = time.monotonic()
                queue = _queue(root, tidy=on_cluster)  # first: a job that ends in between has then left its files
                found = find(asked, runtime.runs, shared)
                states = {identity: run.state for identity, run in found.items()}  # before `due`: a trial that ends now is not passed over
                now_due = list(dict.fromkeys(identity for jobs in due(table, asked, found) for identity in jobs["id"]))
                left = [identity for identity in now_due if states.get(identity, "missing") in ("missing", "resumable", "failed")]
                mine = [identity for identity in left if identity not in tried and identity not in queue]
                if mine and on_cluster:
                    mine = mine[: cluster.LARGEST_ARRAY]
                    _submit(root, mine, [overrides[identity] for identity in mine])
                    tried |= {*mine}
                    continue
            if mine:
                if not (in_turns and tried):
                    print(f"{len(mine)} of {len(now_due)} runs are to be trained", flush=True)
                mine = mine[: places(runtime)] if in_turns else mine
                complaints += _train([overrides[identity] for identity in mine], runtime)
                now = {identity: run.state for identity, run in find(asked, runtime.runs).items()}
                tried |= {identity for identity in mine if now.get(identity) != "running"}
                continue
            waiting = [identity for identity in now_due if states.get(identity) == "running" or (identity in left and identity in queue)]
            if not waiting or not wait:
                break
            if queue and time.monotonic() - said > SAY_SECONDS:
                said = time.monotonic()
                print(_progress(now_due, states, queue), flush=True)
            looked = time.monotonic() - began
            time.sleep(min(max(QUEUE_SECONDS if queue else POLL_SECONDS, 20 * looked), max(0.0, timebox.left(runtime))))
    return list(dict.fromkeys(complaints))


def unfinished(table: Table, asked: Jobs, found: dict[str, store.Run], runtime: DictConfig) -> str:
    """One line that says what a time box has left; empty without one, or when nothing is left."""
    if not timebox.given(runtime):
        return ""
    once = pd.concat(due(table, asked, found, guess=True)).drop_duplicates("id")
    states = {identity: run.state for identity, run in found.items()}
    left = [job for job in once.to_dict("records") if states.get(job["id"], "missing") in ("missing", "resumable", "running")]
    if not left:
        return ""
    known = cost.stored(Path(runtime.runs))
    seconds = [cost.remaining(compose(job["overrides"]), found.get(job["id"]), known) for job in left]
    sure = [each for each in seconds if not math.isnan(each)]
    length = f"about {sum(sure) / 60:.1f} minutes one after another" if sure else "of unknown length"
    length += f" without {len(seconds) - len(sure)} of unknown length" if 0 < len(sure) < len(seconds) else ""
    why, next_time = "ended by SIGTERM", "ask again and it goes on"
    if not timebox.terminated:
        why = f"runtime.time_limit={runtime.time_limit:g}"
        if len(sure) == len(seconds) and min(sure) > runtime.time_limit:
            next_time = (
                f"none of them is expected to fit, the shortest takes {min(sure):.0f} s: raise the limit, or end the command by SIGTERM"
            )
    return f"{why}: {len(left)} of {len(once)} runs are left, {length}; {next_time}"


def _train(jobs: Sequence[Sequence[str]], runtime: DictConfig) -> list[str]:
    """Trains them on this machine; returns the lines of bad input."""
    complaints = []
    if launcher() == "basic" and places(runtime) > 1:
        errors = side_by_side(train.train, [partial(compose, job) for job in jobs], places(runtime))
    else:
        errors = launch(train.job if launcher().startswith("submitit") else train.train, jobs, Path(runtime.runs))
    for error in errors:
        if isinstance(error, RunFailed | BrokenExecutor):
            print(f"retable: {first_line(error)}", file=sys.stderr)
        elif isinstance(error, BAD_INPUT):
            complaints.append(one_line(error))
        elif error is not None and not isinstance(error, timebox.TimeUp):
            raise error
    return complaints


def _submit(root: Path, ids: Sequence[str], jobs: Sequence[Sequence[str]]) -> None:
    name = cluster.note(root, ids)
    launch(train.job, jobs, root, name)
    print(f"{len(ids)} runs are submitted to SLURM, as {name}", flush=True)


def _queue(root: Path, tidy: bool) -> dict[str, cluster.Job]:
    """The runs in a cluster's hands; waits while it does not answer: what it has must not be submitted again."""
    said = False
    while True:
        try:
            return cluster.live(root, tidy)
        except cluster.Silent as error:
            if not said:
                print(f"retable: {error}; waiting for it (without the notes in {root}/.queue nobody asks)", file=sys.stderr, flush=True)
            said = True
            time.sleep(QUEUE_SECONDS)


def _progress(ids: Sequence[str], states: dict[str, store.State], queue: dict[str, cluster.Job]) -> str:
    """How many of the runs are in which state; in a queue, that of their job."""
    ended = ("done", "diverged", "failed", "running")
    count = Counter(states[one] if states.get(one) in ended else "queued" if one in queue else "missing" for one in ids)
    return ", ".join(f"{number} {state}" for state, number in count.items()) + f" of {len(ids)} runs"
