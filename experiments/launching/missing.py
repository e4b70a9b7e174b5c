"""Training what a table or figure lacks; waiting for what other commands train or a cluster has in its queue."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig

from experiments import cost, store, timebox, train
from experiments.cli import BAD_INPUT, RunFailed, one_line
from experiments.compose import compose
from experiments.launching import launchers
from experiments.launching.slurm import Job
from experiments.pick import Jobs, due
from experiments.spec import Table

POLL_SECONDS = 0.5  # between two looks at the runs' files; looking at a large store takes longer, and must stay cheap
QUEUE_SECONDS = 5.0  # between two looks at a cluster's queue
SAY_SECONDS = 20.0  # between two lines that say how far a cluster is


def find(wanted: Jobs, root: str, shared: Mapping[str, store.Run] | None = None) -> dict[str, store.Run]:
    """The stored runs, and those of `shared`, the published ones, in place of runs without a result."""
    own, shared = store.find(Path(root), wanted["id"]), shared or {}
    lacking = [identity for identity in wanted["id"] if identity in shared and (identity not in own or own[identity].result() is None)]
    return own | {identity: shared[identity] for identity in lacking}


def complete(table: Table, asked: Jobs, runtime: DictConfig, wait: bool = True, shared: Mapping[str, store.Run] | None = None) -> list[str]:
    """Train what is missing, and the picked runs of rows with `select` once their trials have ended. A run is tried once.

    What counts is the runs' own files, whatever a launcher says. Runs that other processes train, or that are in a cluster's queue, are
    waited for, and taken over when those end without a result, until the command's time box ends. wait: false submits what it can and
    returns. shared: published runs that count as done.
    Returns the lines of bad input that jobs met (a data set that is not there, say): those runs stay missing.
    """
    launcher, overrides = launchers.chosen(runtime), dict(zip(asked["id"], asked["overrides"], strict=True))
    on_cluster, tried, complaints, said = launchers.on_cluster(), set[str](), list[str](), time.monotonic()
    with contextlib.nullcontext() if on_cluster else timebox.heeding_sigterm():  # there, jobs go on without this command
        while timebox.left(runtime) > 0:
            began = time.monotonic()
            queue = launcher.alive()  # first: a job that ends in between has then left its files
            found = find(asked, runtime.runs, shared)
            states = {
                identity: run.state for identity, run in found.items()
            }  # before `due`: a trial that ends now would hide its row's picked run
            now_due = list(dict.fromkeys(identity for jobs in due(table, asked, found) for identity in jobs["id"]))
            left = [identity for identity in now_due if states.get(identity, "missing") in ("missing", "resumable", "failed")]
            if mine := [identity for identity in left if identity not in tried and identity not in queue]:
                print(f"{len(mine)} of {len(now_due)} runs are to be trained", flush=True)
                complaints += _train(launcher, {identity: overrides[identity] for identity in mine})
                elsewhere = {identity for identity, run in find(asked, runtime.runs).items() if run.state == "running"}
                tried |= {*mine} - (set() if on_cluster else elsewhere)
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


def _train(launcher: launchers.Launcher, jobs: Mapping[str, Sequence[str]]) -> list[str]:
    """Train these runs. Returns the lines of bad input."""
    task = train.job if isinstance(launcher, launchers.Submitit) else train.train  # a job leaves its error in the run's folder
    complaints = []
    for error in launcher.submit(task, {identity: partial(compose, [*words, *launcher.overrides]) for identity, words in jobs.items()}):
        if isinstance(error, RunFailed):
            print(f"retable: {error}", file=sys.stderr)
        elif isinstance(error, BAD_INPUT):
            complaints.append(one_line(error))
        elif not isinstance(error, timebox.TimeUp):
            raise error
    return complaints


def unfinished(table: Table, asked: Jobs, found: dict[str, store.Run], runtime: DictConfig) -> str:
    """A line that says what a time box has left; empty without a box, or when nothing is left."""
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


def _progress(ids: Sequence[str], states: Mapping[str, str], queue: Mapping[str, Job]) -> str:
    """How many of the runs are in which state; `queued` for a run that SLURM has and that has not begun."""
    ended = ("done", "diverged", "failed", "running")
    count = Counter(states[run] if states.get(run) in ended else "queued" if run in queue else "missing" for run in ids)
    return ", ".join(f"{number} {state}" for state, number in count.items()) + f" of {len(ids)} runs"
