"""Runs on a SLURM cluster: which of them wait in its queue or have begun, by notes of what was submitted and by what `squeue` lists."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments import store

ANSWER_SECONDS = 60  # squeue has so long to answer; a controller that restarts takes a while
LARGEST_ARRAY = 1000  # jobs; SLURM's own default limit


class Job(NamedTuple):
    """As squeue shows it: its id, its state (PENDING, RUNNING, ...), and why it is in it."""

    id: str
    state: str
    reason: str


class Silent(RuntimeError):
    """squeue is there, and does not answer: what is queued is not known."""


@contextlib.contextmanager
def turn(root: Path) -> Iterator[None]:
    """One asker at a time looks at what is missing and submits it."""
    (root / ".queue").mkdir(parents=True, exist_ok=True)
    while (handle := store.locked(root / ".queue" / "lock")) is None:
        time.sleep(0.5)
    with handle:
        yield


def note(root: Path, ids: Sequence[str]) -> str:
    """Writes down which runs an array holds, in its order, under the job name that it will have, which is returned.

    Before it is submitted: an asker that is killed in between leaves a note of no job, not a job that nobody knows.
    """
    name = f"retable-{uuid.uuid4().hex[:8]}"
    with store.written(root / ".queue" / f"{name}.json") as file:
        file.write(json.dumps(list(ids)).encode())
    return name


def live(root: Path, tidy: bool = False) -> dict[str, Job]:
    """The runs whose jobs are in SLURM's hands. Raises Silent when it does not say; where there is no SLURM, there are none.

    tidy: forget the arrays that are over; for who has the `turn`.
    """
    notes = {path.stem: path for path in (root / ".queue").glob("retable-*.json")}
    if not notes:
        return {}
    words = ["squeue", "--noheader", "--array", f"--name={','.join(notes)}", "--format=%j|%K|%i|%T|%r"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=ANSWER_SECONDS)
    except FileNotFoundError:
        return {}
    except subprocess.TimeoutExpired as error:
        raise Silent(f"squeue has not answered for {ANSWER_SECONDS} s") from error
    if done.returncode:
        raise Silent((done.stderr.strip().splitlines() or [f"squeue ended with code {done.returncode}"])[-1])
    jobs, seen = {}, set()
    for line in done.stdout.splitlines():
        name, index, *job = (word.strip() for word in line.split("|", 4))
        ids = json.loads(notes[name].read_text())
        jobs[ids[int(index) if index.isdigit() else 0]] = Job(*job)  # a job alone is no array
        seen.add(name)
    if tidy:
        for name in notes.keys() - seen:
            notes[name].unlink(missing_ok=True)
    return jobs
