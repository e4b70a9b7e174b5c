"""The runs that a SLURM cluster has in its queue or trains: notes of what was submitted, compared with what `squeue` lists.

Neither accounting (`sacct`) nor submitit's own files are asked: any command, on any node, that shares the store gets the same answer.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments import store

ANSWER_SECONDS = 60  # squeue's time to answer; a controller that restarts takes a while
RETRY_SECONDS = 5.0  # between two questions to a cluster that does not answer


class Job(NamedTuple):
    """As squeue shows it: its id, its state (PENDING, RUNNING, ...), and the reason for that."""

    id: str
    state: str
    reason: str


class Silent(RuntimeError):
    """squeue is there and does not answer: what is queued is not known."""


@contextlib.contextmanager
def turn(root: Path) -> Iterator[None]:
    """Inside this context no other command submits runs of the store."""
    (root / ".queue").mkdir(parents=True, exist_ok=True)
    while (handle := store.locked(root / ".queue" / "lock")) is None:
        time.sleep(0.5)
    with handle:
        yield


def note(root: Path, ids: Sequence[str]) -> str:
    """Write down which runs a job array holds, in its order. Returns the name that the array must get.

    The note comes before the submission: a command killed in between leaves a note without an array, not an array that nobody knows.
    """
    name = f"retable-{uuid.uuid4().hex[:8]}"
    with store.written(root / ".queue" / f"{name}.json") as file:
        file.write(json.dumps(list(ids)).encode())
    return name


def alive(root: Path, tidy: bool = False) -> dict[str, Job]:
    """As `listed`, but waits while squeue does not answer: no run may be submitted twice."""
    said = False
    while True:
        try:
            return listed(root, tidy)
        except Silent as error:
            if not said:
                print(
                    f"retable: {error}; waiting for it (if this SLURM is gone for good, delete {root}/.queue)", file=sys.stderr, flush=True
                )
            said = True
            time.sleep(RETRY_SECONDS)


def listed(root: Path, tidy: bool = False) -> dict[str, Job]:
    """The jobs of the store's runs, by run id; none without SLURM. Raises Silent when squeue does not answer.

    tidy: remove the notes of arrays that are over; only inside `turn`, as a note comes before its array.
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
    rows = [[word.strip() for word in line.split("|", 4)] for line in done.stdout.splitlines()]
    ids = {name: json.loads(notes[name].read_text()) for name in {row[0] for row in rows}}
    for name in notes.keys() - ids if tidy else ():
        notes[name].unlink(missing_ok=True)
    # The index of a job alone is N/A: it is no array.
    return {ids[name][int(index) if index.isdigit() else 0]: Job(*job) for name, index, *job in rows}
