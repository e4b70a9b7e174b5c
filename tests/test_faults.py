"""A full or read-only disk, a clock that goes back, another machine, no locks: one line is said, nothing is lost or done twice."""

from __future__ import annotations

import errno
import fcntl
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

import pytest
from test_resume import ROOT, endings, same, whole
from test_table import Command, command, extra, results, words

from experiments import store, train

__all__ = ["command", "extra"]  # fixtures
pytestmark = pytest.mark.usefixtures("untraced")
PAGE, PAGES = 4096, 4096  # of the small disk
# Its evaluations are many enough for a page of events before the first epoch's other files are written.
RUN = ["dataset=digits", "dataset.train=100", "epochs=4", "schedule.at=[2]", "batch_size=10", "evaluate.every=1", "evaluate.dense=40"]
TRAIN: dict[str, Any] = {"task": train.train, "root": "config"}
TABLE = ["table=tiny", "epochs=2", "profile.seeds=1"]  # three runs


def refused(outcome: tuple[int, str, str], *said: object) -> None:
    """Exit code 2 and one line, which says so much."""
    code, _, err = outcome
    assert code == 2 and re.fullmatch(r"retable: .+\n", err), outcome
    assert all(str(each) in err for each in said), err


def tidy(root: Path) -> None:
    """No temporary file is left."""
    assert not [path for path in root.rglob(".*") if re.search(r"\.[0-9a-f]{32}$", path.name)]


def curves(runs: Path) -> None:
    """TensorBoard shows each evaluation once, in order."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for path in runs.glob("[!.]*/*"):
        events = EventAccumulator(str(path))
        events.Reload()
        rows = store.Run(path).metrics()
        shown = [(event.step, event.value) for event in events.Scalars("test/ce")]
        assert shown == [(row["step"], pytest.approx(row["test/ce"], rel=1e-6)) for row in rows] and rows


def interrupt(command: Command, monkeypatch: pytest.MonkeyPatch, epochs: int, *asked: str, **more: Any) -> None:
    """The command, interrupted once so many epochs are recorded."""
    plain, count = train.record, 0

    def record(*given: Any) -> None:
        nonlocal count
        plain(*given)
        count += 1
        if count == epochs:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "record", record)
        assert command(*asked, **more)[0] == 130


# disks


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={PAGE * PAGES}", "tmpfs", str(path)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(disk: Path, left: int) -> Path:
    """A file that leaves so many pages."""
    free = os.statvfs(disk)
    (disk / "ballast").write_bytes(bytes(free.f_bavail * free.f_frsize - left * PAGE))
    return disk / "ballast"


def real(module: str, tmp_path: Path, runs: Path, *asked: str) -> tuple[int, str, str]:
    """The command as a process; one that hangs raises."""
    line = [sys.executable, "-m", f"experiments.{module}", *words(tmp_path, runs), *asked]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


# Epochs that the run has had before, pages that are left then, and the epochs that its log has in the end. A lock and a configuration
# take a page each, an epoch's events one or two, a checkpoint 200 to 250; what is written anew needs its space twice.
MOMENTS = {
    "nothing can be written": (0, 0, [1, 2, 3, 4]),
    "amid the second checkpoint": (0, 320, [1, 2, 3, 4]),
    "amid events": (1, 1, [2, 3, 4]),  # the interruption comes before the first epoch's line
}


@pytest.mark.parametrize(("had", "left", "logged"), MOMENTS.values(), ids=MOMENTS)
def test_full_disk(
    command: Command, tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch, had: int, left: int, logged: list[int]
) -> None:
    assert command(*RUN, runs=tmp_path / "undisturbed", **TRAIN)[0] == 0
    if had:
        interrupt(command, monkeypatch, had, *RUN, runs=disk, **TRAIN)
    ballast = fill(disk, left)
    outcome = real("train", tmp_path, disk, *RUN)
    (path,) = disk.glob("*/*")
    refused(outcome, path, "No space left on device")
    assert store.Run(path).state == ("resumable" if had or left else "missing")
    tidy(disk)
    whole(disk)

    ballast.unlink()
    code, _, err = command(*RUN, runs=disk, **TRAIN)
    assert (code, err) == (0, "")
    assert [line.split(":")[0] for line in (path / "train.log").read_text().splitlines()] == [f"epoch {number}/4" for number in logged]
    assert same(endings(disk), endings(tmp_path / "undisturbed"))
    curves(disk)
    tidy(disk)


@pytest.mark.parametrize(("left", "done"), [(2, 0), (320, 1)], ids=["before the first events", "amid the second run's checkpoint"])
def test_full_disk_under_a_sweep(command: Command, tmp_path: Path, disk: Path, left: int, done: int) -> None:
    """The runs that had room are in the table; the others stay missing."""
    assert command(*TABLE, runs=tmp_path / "undisturbed")[0] == 0
    ballast = fill(disk, left)
    outcome = real("table", tmp_path, disk, *TABLE, f"out={tmp_path}/out")
    before = results(disk)
    refused(outcome, disk, "No space left on device")
    assert len(before) == done and "## A tiny table" in outcome[1]
    assert not [*disk.glob("*/*/error.txt")]
    tidy(disk)

    ballast.unlink()
    code, out, err = command(*TABLE, runs=disk)
    assert (code, err) == (0, "") and out.startswith(f"{3 - done} of 3 runs are to be trained\n")
    assert before.items() <= results(disk).items()
    assert same(endings(disk), endings(tmp_path / "undisturbed"))
    curves(disk)


def test_read_only_disk(command: Command, tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done is printed; what is not is asked for in vain, until the disk can be written again."""
    both = ["table=tiny", "epochs=2", "only=[without]"]  # two seeds
    one, single = [*both, "profile.seeds=1"], ["dataset.train=100", "epochs=2", "schedule.at=[1]", "method=vanilla"]
    assert command(*both, runs=tmp_path / "undisturbed")[0] == 0
    code, out, _ = command(*one, runs=disk)
    assert code == 0
    interrupt(command, monkeypatch, 1, *both, runs=disk)
    (half,) = (path.parent for path in disk.glob("*/*/checkpoint.pt") if not (path.parent / "result.json").exists())
    files = {path: path.read_bytes() for path in disk.glob("*/*/*")}
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)

    assert command(*one, runs=disk) == (0, out[out.index("## ") :], "")
    assert command(*both, "plan=true", runs=disk)[0] == 0
    refused(command(*one, f"out={disk}/out", runs=disk), f"{disk}/out", "Read-only file system")
    refused(command(*both, runs=disk), half, "Read-only file system")
    code, out, err = command(*both, "launch=false", runs=disk)
    assert (code, err) == (0, "") and "(1/2)" in out
    code, out, err = command(*single, runs=disk, **TRAIN)
    assert (code, err) == (0, "") and ": done before, " in out
    refused(command(*single, "seed=3", runs=disk, **TRAIN), disk, "Read-only file system")

    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert {path: path.read_bytes() for path in disk.glob("*/*/*")} == files
    code, out, err = command(*both, runs=disk)
    assert (code, err) == (0, "") and out.startswith("1 of 2 runs are to be trained\n")
    assert same(endings(disk), endings(tmp_path / "undisturbed"))
    tidy(disk)


# clocks


def test_clock_goes_back_in_a_sweep(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted an hour ahead of what the clock says when it is asked for again; its files are of the future."""
    runs, ahead = tmp_path / "runs", time.time() + 3600
    assert command(*TABLE, runs=tmp_path / "undisturbed")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: ahead)
        interrupt(command, monkeypatch, 3, *TABLE)
    for path in runs.rglob("*"):
        os.utime(path, (ahead, ahead))
    before = results(runs)
    assert [store.Run(path.parent).state for path in runs.glob("*/*/lock")].count("resumable") == 1 and len(before) == 1

    code, out, _ = command("table=tiny", "epochs=2", "only=[without]", "plan=true")
    assert code == 0 and "estimated from a stored run, " in out
    code, out, err = command(*TABLE)
    assert (code, err) == (0, "") and out.startswith("2 of 3 runs are to be trained\n")
    assert before.items() <= results(runs).items()
    assert same(endings(runs), endings(tmp_path / "undisturbed"))
    assert command(*TABLE) == (0, out[out.index("## ") :], "")
    code, out, err = command(*TABLE, "plan=true")
    assert (code, err) == (0, "") and "3 different runs, 0.00 hours" in out
    curves(runs)


def test_clock_goes_back_in_a_run(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After every epoch."""
    runs, plain, late, real_time = tmp_path / "runs", train.record, 0, time.time
    assert command(*RUN, runs=tmp_path / "undisturbed", **TRAIN)[0] == 0

    def record(*given: Any) -> None:
        nonlocal late
        plain(*given)
        late += 3600

    with monkeypatch.context() as patch:
        patch.setattr(train, "record", record)
        patch.setattr(time, "time", lambda: real_time() - late)
        code, _, err = command(*RUN, **TRAIN)
    assert (code, err) == (0, "") and late == 4 * 3600
    assert same(endings(runs), endings(tmp_path / "undisturbed"))
    (result,) = (json.loads(path.read_text()) for path in runs.glob("*/*/result.json"))
    assert 0 < result["seconds"] < 60
    assert ": done before, " in command(*RUN, **TRAIN)[1]
    curves(runs)


@pytest.mark.skipif(not shutil.which("faketime"), reason="needs faketime")
def test_a_process_an_hour_behind(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = tmp_path / "runs"
    assert command(*RUN, runs=tmp_path / "undisturbed", **TRAIN)[0] == 0
    interrupt(command, monkeypatch, 2, *RUN, **TRAIN)
    line = ["faketime", "--exclude-monotonic", "-f", "-1h", sys.executable, "-m", "experiments.train", *words(tmp_path, runs), *RUN]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert same(endings(runs), endings(tmp_path / "undisturbed"))
    curves(runs)


# another machine, other file systems


def test_a_store_copied_from_another_machine(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its processes' locks, a temporary file of one that was killed, and a note of what its SLURM has; here is none."""
    here, there = tmp_path / "runs", tmp_path / "copied" / "runs"
    assert command(*TABLE, runs=tmp_path / "undisturbed")[0] == 0
    interrupt(command, monkeypatch, 3, *TABLE)
    for lock in here.glob("*/*/lock"):
        lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "since": 0.0, "job": "7"}))
        if not (lock.parent / "result.json").exists():
            (lock.parent / f".checkpoint.pt.{uuid.uuid4().hex}").write_bytes(b"half")
    (here / ".queue").mkdir()
    (here / ".queue" / "retable-deadbeef.json").write_text(json.dumps([*results(tmp_path / "undisturbed")]))
    monkeypatch.setenv("PATH", str(tmp_path / "no programs"))
    shutil.copytree(here, there, copy_function=shutil.copyfile)
    done = {path: path.read_bytes() for path in there.glob("*/*/result.json")}
    assert len(done) == 1

    code, out, err = command(*TABLE, runs=there)
    assert (code, err) == (0, "") and out.startswith("2 of 3 runs are to be trained\n")
    assert {path: path.read_bytes() for path in done} == done
    assert sorted(path.read_text().count("epoch ") for path in there.glob("*/*/train.log")) == [1, 2, 2]  # the stop was before a line
    assert same(endings(there), endings(tmp_path / "undisturbed"))
    curves(there)
    tidy(there)


def test_a_file_system_without_locks(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is trained there: two processes might train one run. What is done needs no lock."""
    runs = tmp_path / "runs"

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", flock)
        refused(command(*RUN, **TRAIN), runs, "No locks available")
        refused(command(*TABLE), runs, "No locks available")
    interrupt(command, monkeypatch, 1, *RUN, **TRAIN)
    interrupt(command, monkeypatch, 3, *TABLE)
    files = {path: path.read_bytes() for path in runs.glob("*/*/*")}
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", flock)
        refused(command(*RUN, **TRAIN), runs, "No locks available")
        refused(command(*TABLE), runs, "No locks available")
        assert command(*TABLE, "only=[without]")[0] == 0
    assert {path: path.read_bytes() for path in runs.glob("*/*/*")} == files
    code, out, err = command(*TABLE)
    assert (code, err) == (0, "") and out.startswith("2 of 3 runs are to be trained\n")
    tidy(runs)
