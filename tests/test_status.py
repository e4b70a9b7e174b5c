"""What the status command says of runs in every state, and what it may remove."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from test_table import Command, command, extra

from experiments import apart, cluster, status, store
from experiments.cluster import Job

__all__ = ["command", "extra"]  # fixtures
HELD = {"host": "node7", "pid": 4321, "since": 0.0, "job": None}
BROKEN = """Traceback (most recent call last):
  File "x.py", line 1, in <module>
ZeroDivisionError: first

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "x.py", line 3, in <module>
    ^^^
RuntimeError: a stage
that broke
"""


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, store.Run]:
    """One run in each state, as if they had been trained."""
    made = {}
    names = ("done", "diverged", "running", "queued", "resumable", "failed", "empty")
    for number, name in enumerate(names):
        run = made[name] = store.Run(tmp_path / "runs" / "some-group" / f"{name}-{number:010x}")
        run.path.mkdir(parents=True)
        if name in ("done", "diverged"):
            run.write("config.yaml", "{}")
            run.finish({"seconds": 1.0, "epochs": 1, "steps": 1, "device": "d"} | ({"diverged": "ce is nan"} if name == "diverged" else {}))
        if name in ("running", "queued", "resumable"):
            run.advance(epoch=2, epochs=8, steps=10, epoch_seconds=10.0, device="cpu")
            run.write("checkpoint.pt", "x")
    made["failed"].fail(BROKEN)
    assert made["running"].acquire()  # by this process
    monkeypatch.setattr(store.Run, "holder", lambda run: HELD | {"since": time.time() - 600})
    monkeypatch.setattr(cluster, "live", lambda root: {made["queued"].path.name[-10:]: Job("7_1", "PENDING", "Resources")})
    yield made  # type: ignore[misc]
    made["running"].release()


def said(text: str) -> dict[str, str]:
    return {line[2:].split(":")[0]: line.split(": ", 1)[1] for line in text.splitlines() if line.startswith("- ")}


def test_every_state(command: Command, runs: dict[str, store.Run]) -> None:
    code, out, err = command(task=status.run, root="status")
    assert (code, err) == (0, "")
    head, _, counts = out.splitlines()[:3]
    names = [word.strip() for word in head.split("|")[1:-1]]
    assert dict(zip(names, (word.strip() for word in counts.split("|")[1:-1]), strict=True)) == {
        "": "some-group", "done": "1", "running": "1", "queued": "1", "resumable": "1", "failed": "1", "diverged": "1", "missing": "1"
    }  # fmt: skip
    lines = said(out)
    assert re.fullmatch(
        r"some-group/running-\w+, node7, process 4321, since \w+ \d\d:\d\d \(10 min\), epoch 2/8, (60|5\d) s left", lines["running"]
    )
    assert lines["queued"].endswith(", SLURM 7_1 PENDING (Resources)")
    assert lines["resumable"].endswith("resumable-0000000004, epoch 2/8")
    assert lines["failed"].endswith(", RuntimeError: a stage") and lines["diverged"].endswith(", ce is nan")


def test_of_a_table(command: Command, tmp_path: Path) -> None:
    """Its runs only, and those that it lacks."""
    assert command("table=tiny", "only=[without]", "profile.seeds=1")[0] == 0
    code, out, err = command("table=tiny", task=status.run, root="status")
    assert (code, err) == (0, "")
    table = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in out.splitlines() if line.startswith("| ")}
    assert {name: [cell.strip() for cell in cells] for name, cells in table.items()} == {
        "": ["done", "missing"], "without": ["1", "1"], "with": ["", "4"], "all": ["1", "5"]
    }  # fmt: skip
    code, _, err = command("table=tiny", "only=[nix]", task=status.run, root="status")
    assert code == 2 and err.startswith("retable: only: no row or column has nix")


def test_an_empty_store(command: Command, tmp_path: Path) -> None:
    assert command(task=status.run, root="status") == (0, f"no runs in {tmp_path}/runs\n", "")


def test_it_looks_again(command: Command, runs: dict[str, store.Run], monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 2:
            raise KeyboardInterrupt
        runs["failed"].finish({"seconds": 1.0, "epochs": 1, "steps": 1, "device": "d"})

    monkeypatch.setattr(time, "sleep", sleep)
    code, out, _ = command("watch=7", task=status.run, root="status")
    assert code == 130 and looks == [7.0, 7.0] and out.count("RuntimeError") == 1 and out.count("- queued") == 2


def test_a_cluster_that_does_not_answer(command: Command, runs: dict[str, store.Run], monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(root: Path) -> Any:
        raise cluster.Silent("no controller")

    monkeypatch.setattr(cluster, "live", silent)
    code, out, err = command(task=status.run, root="status")
    assert (code, err) == (0, "retable: no controller; what is queued is not known\n") and "resumable" in out


def test_many_of_a_state_are_cut(tmp_path: Path) -> None:
    many = [status.Entry(store.Run(tmp_path / f"{number:010x}"), "failed", "g", None) for number in range(23)]
    text = status.report(many, "runs")
    assert text.count("- failed: ") == 21 and text.endswith("- failed: 3 more")


def test_failed_runs_are_trained_again(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From their own configs, with this command's runtime; one that never began cannot be."""
    assert command("table=tiny", "only=[without]", "profile.seeds=1")[0] == 0
    (path,) = (tmp_path / "runs").glob("*/*/result.json")
    whole = {name: (path.parent / name).read_text() for name in ("metrics.csv", "config.yaml")}
    for name in ("result.json", "checkpoint.pt", "metrics.csv"):
        (path.parent / name).unlink()
    store.Run(path.parent).fail(BROKEN)
    early = store.Run(tmp_path / "runs" / "g" / "early-0123456789")
    early.path.mkdir(parents=True)
    early.fail("ConfigError: dataset: not there")
    monkeypatch.setattr(apart, "apart", lambda task, cfg: task(cfg))
    code, out, err = command("retry=failed", task=status.run, root="status")
    assert (code, err) == (0, "") and "1 of 2 failed runs are to be trained again\n1 have never begun" in out
    assert store.Run(path.parent).state == "done" and (path.parent / "metrics.csv").read_text() == whole["metrics.csv"]
    assert OmegaConf.create(whole["config.yaml"]) == OmegaConf.load(path.parent / "config.yaml")


def test_prune_asks_and_spares_what_is_done(
    command: Command, runs: dict[str, store.Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    there = {name for name, run in runs.items() if run.path.is_dir()}
    code, out, err = command("prune=true", task=status.run, root="status")  # a test has no terminal
    assert code == 2 and err == "retable: prune: nobody is there to be asked; prune=yes removes these without\n"
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    for answer in ("", "n", "no way"):
        monkeypatch.setattr("builtins.input", lambda text, answer=answer: answer)
        code, out, _ = command("prune=true", task=status.run, root="status")
        assert code == 0 and out.endswith("nothing was removed\n")
    assert {name for name, run in runs.items() if run.path.is_dir()} == there
    assert {line.split(":")[0] for line in out.splitlines()[:3]} == {"resumable", "failed", "missing"}

    elsewhere = store.Run(runs["failed"].path)  # begun by another process between the list and the answer
    monkeypatch.setattr("builtins.input", lambda text: elsewhere.acquire() and "y")
    code, out, _ = command("prune=true", task=status.run, root="status")
    assert code == 0 and out.endswith("2 folders were removed\n")
    assert there - {name for name, run in runs.items() if run.path.is_dir()} == {"resumable", "empty"}
    elsewhere.release()
    code, out, _ = command("prune=yes", task=status.run, root="status")
    assert out.endswith("1 folders were removed\n") and runs["done"].result() and runs["diverged"].result()
    assert command("prune=yes", task=status.run, root="status")[1].startswith("nothing to remove")


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("retry=all", "retry: all is not allowed; it must be failed"),
        ("prune=maybe", "prune: maybe is not allowed; it must be false, true, or yes: without asking"),
        ("table=nix", "table: 'nix' is not known; allowed: "),
        ("foo=1", "foo: there is no such key"),
    ],
)
def test_bad_input(command: Command, word: str, says: str) -> None:
    code, _, err = command(word, task=status.run, root="status")
    assert code == 2 and err.startswith(f"retable: {says}") and err.count("\n") == 1
