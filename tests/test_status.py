"""Tests of `python -m experiments.status`: what it prints of runs in every state, `watch`, `retry` and `prune`."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tables import Command

from experiments import status, store

BROKEN = """Traceback (most recent call last):
ZeroDivisionError: first

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "x.py", line 3, in <module>
    ^^^
RuntimeError: a stage
that broke
"""


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for SLURM's command, which the tests write."""
    path = tmp_path / "bin" / "squeue"
    path.parent.mkdir()
    path.touch(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    return path


@pytest.fixture
def runs(tmp_path: Path, squeue: Path) -> Iterator[dict[str, store.Run]]:
    """The folders of one run in each state."""
    made = {}
    for number, name in enumerate(("done", "diverged", "running", "queued", "resumable", "failed", "empty")):
        run = made[name] = store.Run(tmp_path / "runs" / "some-group" / f"{name}-{number:010x}")
        run.path.mkdir(parents=True)
        if name in ("done", "diverged"):
            run.write("config.yaml", "{}")
            run.finish({"seconds": 1.0, "epochs": 1, "steps": 1, "device": "d"} | ({"diverged": "ce is nan"} if name == "diverged" else {}))
        if name in ("running", "queued", "resumable"):
            run.advance(epoch=2, epochs=8, steps=10, epoch_seconds=10.0, device="cpu")
            run.write("checkpoint.pt", "x")
    made["failed"].fail(BROKEN)
    (tmp_path / "runs" / ".queue").mkdir()
    (tmp_path / "runs" / ".queue" / "retable-1.json").write_text(json.dumps([made["queued"].path.name[-10:]]))
    squeue.write_text("#!/bin/sh\necho 'retable-1|0|7_1|PENDING|Resources'\n")
    assert made["running"].acquire()
    (made["running"].path / "lock").write_text(json.dumps({"host": "node7", "pid": 4321, "since": time.time() - 600, "job": None}))
    yield made
    made["running"].release()


def test_every_state(command: Command, runs: dict[str, store.Run]) -> None:
    code, out, err = command(task=status.run, root="status")
    assert (code, err) == (0, "")
    head, _, counts = out.splitlines()[:3]
    names = [word.strip() for word in head.split("|")[1:-1]]
    assert dict(zip(names, (word.strip() for word in counts.split("|")[1:-1]), strict=True)) == {
        "": "some-group", "done": "1", "running": "1", "queued": "1", "resumable": "1", "failed": "1", "diverged": "1", "missing": "1"
    }  # fmt: skip
    lines = {line[2:].split(":")[0]: line.split(": ", 1)[1] for line in out.splitlines() if line.startswith("- ")}
    pattern = r"some-group/running-\w+, node7, process 4321, since \w+ \d\d:\d\d \(10 min\), epoch 2/8, (60|5\d) s left"
    assert re.fullmatch(pattern, lines["running"])
    assert lines["queued"].endswith(", SLURM 7_1 PENDING (Resources)")
    assert lines["resumable"].endswith("resumable-0000000004, epoch 2/8")
    assert lines["failed"].endswith(", RuntimeError: a stage") and lines["diverged"].endswith(", ce is nan")


def test_watch_prints_again(command: Command, runs: dict[str, store.Run], squeue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time a failed run is done, and SLURM does not answer."""
    looks = []

    def sleep(seconds: float) -> None:
        if seconds < 1:  # of `subprocess`
            return
        looks.append(seconds)
        if len(looks) == 2:
            raise KeyboardInterrupt
        runs["failed"].finish({"seconds": 1.0, "epochs": 1, "steps": 1, "device": "d"})
        squeue.write_text("#!/bin/sh\necho 'no controller' >&2\nexit 1\n")

    monkeypatch.setattr(time, "sleep", sleep)
    code, out, err = command("watch=7", task=status.run, root="status")
    assert code == 130 and looks == [7.0, 7.0] and out.count("RuntimeError") == 1 and out.count("- queued") == 1
    assert out.count("- resumable") == 3 and err.startswith("retable: no controller; what is queued is not known\n")


def test_runs_of_a_table(command: Command, tmp_path: Path) -> None:
    """The runs that the table has, and those that it lacks; first in an empty store."""
    assert command(task=status.run, root="status") == (0, f"no runs in {tmp_path}/runs\n", "")
    assert command("table=tiny", "only=[without]", "profile.seeds=1")[0] == 0
    code, out, err = command("table=tiny", task=status.run, root="status")
    assert (code, err) == (0, "")
    table = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in out.splitlines() if line.startswith("| ")}
    assert {name: [cell.strip() for cell in cells] for name, cells in table.items()} == {
        "": ["done", "missing"], "without": ["1", "1"], "with": ["", "4"], "all": ["1", "5"]
    }  # fmt: skip


def test_at_most_twenty_runs_of_a_state_are_listed(tmp_path: Path) -> None:
    many = [status.Entry(store.Run(tmp_path / f"{number:010x}"), "failed", "g", None) for number in range(23)]
    text = status.report(many, "runs")
    assert text.count("- failed: ") == 21 and text.endswith("- failed: 3 more")


@pytest.mark.slow
def test_failed_runs_are_trained_again(command: Command, tmp_path: Path) -> None:
    """From their own configs, with this command's runtime; a run without a config is left."""
    assert command("table=tiny", "only=[without]", "profile.seeds=1")[0] == 0
    (path,) = (tmp_path / "runs").glob("*/*/result.json")
    run, early = store.Run(path.parent), store.Run(tmp_path / "runs" / "g" / "early-0123456789")
    metrics, config = run.read("metrics.csv"), run.read("config.yaml")
    for name in ("result.json", "checkpoint.pt", "metrics.csv"):
        (run.path / name).unlink()
    run.fail(BROKEN)
    early.path.mkdir(parents=True)
    early.fail("ConfigError: dataset: not there")
    code, out, err = command("retry=failed", task=status.run, root="status")
    assert (code, err) == (0, "") and "1 of 2 failed runs are to be trained again\n1 have never begun" in out
    assert run.state == "done" and run.read("metrics.csv") == metrics
    assert OmegaConf.create(config) == OmegaConf.create(run.read("config.yaml"))


def test_prune_asks_and_keeps_what_is_done(command: Command, runs: dict[str, store.Run], monkeypatch: pytest.MonkeyPatch) -> None:
    def prune(answer: str) -> tuple[str, str]:
        code, out, err = command(f"prune={answer}", task=status.run, root="status")
        assert code == (2 if err else 0)
        return out, err

    def removed() -> set[str]:
        return {name for name, run in runs.items() if not run.path.is_dir()}

    assert prune("true")[1] == "retable: prune: nobody is there to be asked; prune=yes removes these without\n"
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    for answer in ("", "no way"):
        monkeypatch.setattr("builtins.input", lambda text, answer=answer: answer)
        out, _ = prune("true")
        assert out.endswith("nothing was removed\n") and not removed()
    assert {line.split(":")[0] for line in out.splitlines()[:3]} == {"resumable", "failed", "missing"}

    other = store.Run(runs["failed"].path)  # begun by another process between the list and the answer
    monkeypatch.setattr("builtins.input", lambda text: other.acquire() and "y")
    assert prune("true")[0].endswith("2 folders were removed\n") and removed() == {"resumable", "empty"}
    other.release()
    assert prune("yes")[0].endswith("1 folders were removed\n") and removed() == {"resumable", "empty", "failed"}
    assert prune("yes")[0].startswith("nothing to remove")


def test_bad_input(command: Command) -> None:
    for word, says in {"retry=all": "it must be failed", "prune=maybe": "it must be false, true, or yes: without asking"}.items():
        key, value = word.split("=")
        code, _, err = command(word, task=status.run, root="status")
        assert (code, err) == (2, f"retable: {key}: {value} is not allowed; {says}\n")
