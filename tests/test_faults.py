"""A full or read-only disk, a clock that goes back, another machine, no locks: a line is printed, nothing is lost or done twice."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from endings import ROOT, TRAIN, endings, epochs, interrupt, same, shown_once, whole
from tables import Command, results, words

from experiments import store

pytestmark = [pytest.mark.usefixtures("untraced"), pytest.mark.slow]
PAGE = 4096
RUN = ["dataset=digits", "dataset.train=100", "epochs=4", "schedule.at=[2]", "batch_size=10"]
RUN += ["evaluate.every=1", "evaluate.dense=40"]  # an epoch's events fill a page
TABLE = ["table=tiny", "epochs=2", "only=[without]"]  # two runs
UNDISTURBED: dict[tuple[str, ...], dict[str, Any]] = {}  # the endings of a command's runs when nothing happens, made when first needed


def refused(outcome: tuple[int, str, str], *said: object) -> None:
    """The exit code is 2, and the only line of stderr contains the words."""
    code, _, err = outcome
    assert code == 2 and re.fullmatch(r"retable: .+\n", err), outcome
    assert all(str(word) in err for word in said), err


def intact(runs: Path) -> None:
    """The files of all runs can be read, and no temporary file is left."""
    assert not [path for path in runs.rglob(".*") if re.search(r"\.[0-9a-f]{32}$", path.name)]
    for _, path in store.folders(runs):
        whole(store.Run(Path(path)))


def completes(command: Command, runs: Path, *asked: str, **more: Any) -> str:
    """The command keeps what was done and ends with an undisturbed command's bits; returns what it prints."""
    before = {path: path.read_bytes() for path in runs.glob("*/*/result.json")}
    code, out, err = command(*asked, runs=runs, **more)
    assert (code, err) == (0, "")
    assert {path: path.read_bytes() for path in before} == before
    if asked not in UNDISTURBED:
        assert command(*asked, runs=runs.with_name("undisturbed"), **more)[0] == 0
        UNDISTURBED[asked] = endings(runs.with_name("undisturbed"))
    assert same(endings(runs), UNDISTURBED[asked])
    intact(runs)
    for path in runs.glob("*/*/result.json"):
        shown_once(path.parent)
    return out


def process(tmp_path: Path, runs: Path, module: str, *asked: str) -> tuple[int, str, str]:
    """The command as a process of its own, which must not hang."""
    line = [sys.executable, "-m", f"experiments.{module}", *words(tmp_path, runs), *asked]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=100)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={4096 * PAGE}", "tmpfs", str(path)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(disk: Path, left: int) -> None:
    """Leaves that many pages free."""
    (disk / "ballast").unlink(missing_ok=True)
    free = os.statvfs(disk)
    (disk / "ballast").write_bytes(bytes(free.f_bavail * free.f_frsize - left * PAGE))


@pytest.mark.parametrize(("had", "left"), [(0, 0), (0, 320), (1, 1)])
def test_full_disk(command: Command, tmp_path: Path, disk: Path, had: int, left: int) -> None:
    """At once, during the second checkpoint, during events: the epochs that the run has had, and the pages that are left then.

    A lock and a configuration take a page each, an epoch's events one or two, a checkpoint 200 to 250; what is replaced is there twice.
    """
    if had:
        interrupt(command, had, disk, *RUN, **TRAIN)
    fill(disk, left)
    refused(process(tmp_path, disk, "train", *RUN), disk, "No space left on device")
    (run,) = map(store.Run, disk.glob("*/*"))
    assert run.state == ("resumable" if had or left else "missing")
    intact(disk)
    (disk / "ballast").unlink()
    completes(command, disk, *RUN, **TRAIN)
    assert epochs(run.path) == [1, 2, 3, 4][had:]


def test_full_disk_under_a_table(command: Command, tmp_path: Path, disk: Path) -> None:
    """Full at once; then during the second run's checkpoint: the first run is in the table; then where the table is written."""
    fill(disk, 0)
    refused(command(*TABLE, runs=disk), disk, "No space left on device")
    fill(disk, 540)
    outcome = process(tmp_path, disk, "table", *TABLE, f"out={tmp_path}/out")
    refused(outcome, disk, "No space left on device")
    assert len(results(disk)) == 1 and "(1/2)" in outcome[1] and not [*disk.glob("*/*/error.txt")]
    intact(disk)
    (disk / "ballast").unlink()
    assert completes(command, disk, *TABLE).startswith("1 of 2 runs are to be trained\n")
    fill(disk, 0)
    refused(command(*TABLE, f"out={disk}/out", runs=disk), f"{disk}/out/tiny", "No space left on device")


def test_read_only_disk(command: Command, disk: Path) -> None:
    """What is done is printed; what is not is refused until the disk can be written again."""
    done, single = [*TABLE, "profile.seeds=1"], ["dataset.train=100", "epochs=2", "schedule.at=[1]", "method=vanilla"]
    code, out, _ = command(*done, runs=disk)
    assert code == 0
    interrupt(command, 1, disk, *TABLE)
    files = {path: path.read_bytes() for path in disk.glob("*/*/*")}
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)

    assert command(*done, runs=disk) == (0, out[out.index("## ") :], "")
    assert command(*TABLE, "plan=true", runs=disk)[0] == 0
    refused(command(*done, f"out={disk}/out", runs=disk), f"{disk}/out", "Read-only file system")
    refused(command(*TABLE, runs=disk), disk, "Read-only file system")
    assert "(1/2)" in command(*TABLE, "launch=false", runs=disk)[1]
    assert ": done before, " in command(*single, runs=disk, **TRAIN)[1]
    refused(command(*single, "seed=3", runs=disk, **TRAIN), disk, "Read-only file system")

    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert {path: path.read_bytes() for path in disk.glob("*/*/*")} == files
    assert completes(command, disk, *TABLE).startswith("1 of 2 runs are to be trained\n")


def test_a_clock_that_goes_back(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour, each time it is read, while a run is trained and interrupted; its files are of the future."""
    runs, clock = tmp_path / "runs", itertools.count(time.time() + 36e5, -3600)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: next(clock))
        interrupt(command, 3, runs, *TABLE)
    for path in runs.rglob("*"):
        os.utime(path, (time.time() + 3600,) * 2)
    assert [0 < json.loads(path.read_text())["seconds"] < 60 for path in runs.glob("*/*/result.json")] == [True]
    assert completes(command, runs, *TABLE).startswith("1 of 2 runs are to be trained\n")
    assert "2 different runs, 0.00 hours" in command(*TABLE, "plan=true")[1]


def test_a_store_copied_from_another_machine(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its processes' locks, a temporary file of a killed process, and a note of what its SLURM has; here is none."""
    here, there = tmp_path / "runs", tmp_path / "copied" / "runs"
    interrupt(command, 3, here, *TABLE)
    for lock in here.glob("*/*/lock"):
        lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "since": 0.0, "job": "7"}))
        if not (lock.parent / "result.json").exists():
            (lock.parent / f".checkpoint.pt.{uuid.uuid4().hex}").write_bytes(b"half")
    (here / ".queue").mkdir()
    ids = [path.parent.name[-10:] for path in here.glob("*/*/checkpoint.pt")]
    (here / ".queue" / "retable-deadbeef.json").write_text(json.dumps(ids))
    shutil.copytree(here, there, copy_function=shutil.copyfile)
    monkeypatch.setenv("PATH", str(tmp_path / "no programs"))
    assert completes(command, there, *TABLE).startswith("1 of 2 runs are to be trained\n")
    assert sorted(epochs(path.parent) for path in there.glob("*/*/train.log")) == [[1, 2], [2]]


def test_a_file_system_without_locks(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is trained there: two processes might train the same run. What is done needs no lock."""
    runs, flock = tmp_path / "runs", Mock(side_effect=OSError(errno.ENOLCK, os.strerror(errno.ENOLCK)))
    interrupt(command, 3, runs, *TABLE)
    files = {path: path.read_bytes() for path in runs.glob("*/*/*")}
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", flock)
        refused(command(*RUN, runs=tmp_path / "empty", **TRAIN), tmp_path / "empty", "No locks available")
        refused(command(*TABLE), runs, "No locks available")
        assert command(*TABLE, "profile.seeds=1")[0] == 0
    assert {path: path.read_bytes() for path in runs.glob("*/*/*")} == files
    assert completes(command, runs, *TABLE).startswith("1 of 2 runs are to be trained\n")
