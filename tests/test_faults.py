"""A full or read-only disk, a clock that goes back, another machine, no locks: one line is said, nothing is lost or done twice."""

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
from test_resume import ROOT, endings, same, whole
from test_table import Command, command, extra, results, words

from experiments import fit, store, train

__all__ = ["command", "extra"]  # fixtures
pytestmark = pytest.mark.usefixtures("untraced")
PAGE = 4096
TRAIN: dict[str, Any] = {"task": train.train, "root": "config"}
RUN = ["dataset=digits", "dataset.train=100", "epochs=4", "schedule.at=[2]", "batch_size=10"]
RUN += ["evaluate.every=1", "evaluate.dense=40"]  # an epoch's events fill a page
TABLE = ["table=tiny", "epochs=2", "only=[without]"]  # two runs


def refused(outcome: tuple[int, str, str], *said: object) -> None:
    """Exit code 2 and one line, which says so much."""
    code, _, err = outcome
    assert code == 2 and re.fullmatch(r"retable: .+\n", err), outcome
    assert all(str(each) in err for each in said), err


def tidy(runs: Path) -> None:
    """No temporary file is left."""
    assert not [path for path in runs.rglob(".*") if re.search(r"\.[0-9a-f]{32}$", path.name)]


def completes(command: Command, runs: Path, *asked: str, **more: Any) -> str:
    """The command keeps what was done and comes to an undisturbed one's bits, which TensorBoard shows once; returns what it prints."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    before = {path: path.read_bytes() for path in runs.glob("*/*/result.json")}
    code, out, err = command(*asked, runs=runs, **more)
    assert (code, err) == (0, "")
    assert {path: path.read_bytes() for path in before} == before
    undisturbed = runs.with_name("undisturbed")
    assert command(*asked, runs=undisturbed, **more)[0] == 0
    assert same(endings(runs), endings(undisturbed))
    tidy(runs)
    for path in (path.parent for path in runs.glob("*/*/result.json")):
        events = EventAccumulator(str(path))
        events.Reload()
        rows = [(row["step"], pytest.approx(row["test/ce"], rel=1e-6)) for row in store.Run(path).metrics()]
        assert [(event.step, event.value) for event in events.Scalars("test/ce")] == rows
    return out


def interrupt(command: Command, monkeypatch: pytest.MonkeyPatch, epochs: int, runs: Path, *asked: str, **more: Any) -> None:
    """The command, interrupted when so many epochs have been recorded."""
    plain, count = fit.checkpoint, 0

    def checkpoint(*given: Any) -> None:
        nonlocal count
        plain(*given)
        count += 1
        if count == epochs:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fit, "checkpoint", checkpoint)
        assert command(*asked, runs=runs, **more)[0] == 130
    assert [store.Run(path.parent).state for path in runs.glob("*/*/lock")].count("resumable") == 1


def process(tmp_path: Path, runs: Path, module: str, *asked: str, within: tuple[str, ...] = ()) -> tuple[int, str, str]:
    """The command as a process of its own; one that hangs raises."""
    line = [*within, sys.executable, "-m", f"experiments.{module}", *words(tmp_path, runs), *asked]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=100)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={4096 * PAGE}", "tmpfs", str(path)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(disk: Path, left: int) -> Path:
    """A file that leaves so many pages."""
    (disk / "ballast").unlink(missing_ok=True)
    free = os.statvfs(disk)
    (disk / "ballast").write_bytes(bytes(free.f_bavail * free.f_frsize - left * PAGE))
    return disk / "ballast"


# Epochs that the run has had before, and pages that are left then. A lock and a configuration take a page each, an epoch's events one or
# two, a checkpoint 200 to 250; what is written anew needs its space twice.
MOMENTS = {"nothing can be written": (0, 0), "amid the second checkpoint": (0, 320), "amid events": (1, 1)}


@pytest.mark.parametrize(("had", "left"), MOMENTS.values(), ids=MOMENTS)
def test_full_disk(command: Command, tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch, had: int, left: int) -> None:
    if had:
        interrupt(command, monkeypatch, had, disk, *RUN, **TRAIN)
    ballast = fill(disk, left)
    outcome = process(tmp_path, disk, "train", *RUN)
    (path,) = disk.glob("*/*")
    refused(outcome, path.parents[1], "No space left on device")
    assert store.Run(path).state == ("resumable" if had or left else "missing")
    tidy(disk)
    whole(disk)
    ballast.unlink()
    completes(command, disk, *RUN, **TRAIN)
    epochs = [line.split(":")[0] for line in (path / "train.log").read_text().splitlines()]
    assert epochs == [f"epoch {number}/4" for number in range(1 + had, 5)]  # the interruption comes before the line


def test_full_disk_under_a_sweep(command: Command, tmp_path: Path, disk: Path) -> None:
    """Full at once; then amid the second run's checkpoint: the first one is in the table."""
    fill(disk, 0)
    refused(command(*TABLE, runs=disk), disk, "No space left on device")
    ballast = fill(disk, 540)
    outcome = process(tmp_path, disk, "table", *TABLE, f"out={tmp_path}/out")
    refused(outcome, disk, "No space left on device")
    assert len(results(disk)) == 1 and "(1/2)" in outcome[1] and not [*disk.glob("*/*/error.txt")]
    tidy(disk)
    whole(disk)
    ballast.unlink()
    assert completes(command, disk, *TABLE).startswith("1 of 2 runs are to be trained\n")
    fill(disk, 0)
    refused(command(*TABLE, f"out={disk}/out", runs=disk), f"{disk}/out/tiny", "No space left on device")


def test_read_only_disk(command: Command, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done is printed; what is not is asked for in vain, until the disk can be written again."""
    one, single = [*TABLE, "profile.seeds=1"], ["dataset.train=100", "epochs=2", "schedule.at=[1]", "method=vanilla"]
    code, out, _ = command(*one, runs=disk)
    assert code == 0
    interrupt(command, monkeypatch, 1, disk, *TABLE)
    assert any(disk.glob("*/*/checkpoint.pt"))
    files = {path: path.read_bytes() for path in disk.glob("*/*/*")}
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)

    assert command(*one, runs=disk) == (0, out[out.index("## ") :], "")
    assert command(*TABLE, "plan=true", runs=disk)[0] == 0
    refused(command(*one, f"out={disk}/out", runs=disk), f"{disk}/out", "Read-only file system")
    refused(command(*TABLE, runs=disk), disk, "Read-only file system")
    code, out, err = command(*TABLE, "launch=false", runs=disk)
    assert (code, err) == (0, "") and "(1/2)" in out
    code, out, err = command(*single, runs=disk, **TRAIN)
    assert (code, err) == (0, "") and ": done before, " in out
    refused(command(*single, "seed=3", runs=disk, **TRAIN), disk, "Read-only file system")

    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert {path: path.read_bytes() for path in disk.glob("*/*/*")} == files
    assert completes(command, disk, *TABLE).startswith("1 of 2 runs are to be trained\n")


def test_clock_goes_back_in_a_sweep(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted an hour ahead of what the clock says when it is asked for again; its files are of the future."""
    runs, ahead = tmp_path / "runs", time.time() + 3600
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: ahead)
        interrupt(command, monkeypatch, 3, runs, *TABLE)
    for path in runs.rglob("*"):
        os.utime(path, (ahead, ahead))
    code, out, _ = command(*TABLE, "plan=true")
    assert code == 0 and "estimated from a stored run, " in out
    out = completes(command, runs, *TABLE)
    assert out.startswith("1 of 2 runs are to be trained\n")
    assert command(*TABLE) == (0, out[out.index("## ") :], "")
    code, out, err = command(*TABLE, "plan=true")
    assert (code, err) == (0, "") and "2 different runs, 0.00 hours" in out


def test_clock_goes_back_in_a_run(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour, at every look."""
    clock = itertools.count(time.time(), -3600)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: next(clock))
        code, _, err = command(*RUN, **TRAIN)
    assert (code, err) == (0, "")
    (result,) = (tmp_path / "runs").glob("*/*/result.json")
    assert 0 < json.loads(result.read_text())["seconds"] < 60
    assert ": done before, " in completes(command, tmp_path / "runs", *RUN, **TRAIN)


@pytest.mark.skipif(not shutil.which("faketime"), reason="needs faketime")
def test_a_process_an_hour_behind(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(command, monkeypatch, 2, tmp_path / "runs", *RUN, **TRAIN)
    outcome = process(tmp_path, tmp_path / "runs", "train", *RUN, within=("faketime", "--exclude-monotonic", "-f", "-1h"))
    assert outcome[::2] == (0, "")
    assert ": done before, " in completes(command, tmp_path / "runs", *RUN, **TRAIN)


def test_a_store_copied_from_another_machine(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its processes' locks, a temporary file of one that was killed, and a note of what its SLURM has; here is none."""
    here, there = tmp_path / "runs", tmp_path / "copied" / "runs"
    interrupt(command, monkeypatch, 3, here, *TABLE)
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
    assert sorted(path.read_text().count("epoch ") for path in there.glob("*/*/train.log")) == [1, 2]  # the stop was before a line


def test_a_file_system_without_locks(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is trained there: two processes might train one run. What is done needs no lock."""
    runs, flock = tmp_path / "runs", Mock(side_effect=OSError(errno.ENOLCK, os.strerror(errno.ENOLCK)))

    def nothing_done() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(fcntl, "flock", flock)
            refused(command(*RUN, **TRAIN), runs, "No locks available")
            refused(command(*TABLE), runs, "No locks available")

    nothing_done()
    interrupt(command, monkeypatch, 3, runs, *TABLE)
    files = {path: path.read_bytes() for path in runs.glob("*/*/*")}
    nothing_done()
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", flock)
        assert command(*TABLE, "profile.seeds=1")[0] == 0
    assert {path: path.read_bytes() for path in runs.glob("*/*/*")} == files
    assert completes(command, runs, *TABLE).startswith("1 of 2 runs are to be trained\n")
