"""The time box: which runs it starts, where a run ends, what it prints. The same command then ends with the bits of an unlimited run."""

from __future__ import annotations

import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from endings import ROOT, endings, same
from omegaconf import OmegaConf
from tables import CELLS, Command, results, words

from experiments import fit, store, timebox, train
from experiments.launching.processes import apart
from experiments.trainer import Trainer

SINGLE = ["only=[without]", "table.seeds=[1]"]  # a run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A command's time in which an epoch takes `epoch` seconds, the first step of a process `first` more, and a step `step`."""
    clock = SimpleNamespace(now=time.time(), epoch=10.0, first=0.0, step=0.0)
    plain_epoch, plain_step = Trainer.train_epoch, Trainer.take_step

    def train_epoch(trainer: Trainer, tick: Callable[[], object]) -> None:
        plain_epoch(trainer, tick)
        clock.now += clock.epoch
        trainer.seconds = clock.epoch * trainer.epoch

    def take_step(trainer: Trainer, *samples: Any) -> None:
        clock.now += clock.step + clock.first
        clock.first = 0.0
        plain_step(trainer, *samples)

    monkeypatch.setattr(Trainer, "train_epoch", train_epoch)
    monkeypatch.setattr(Trainer, "take_step", take_step)
    monkeypatch.setattr(timebox.time, "time", lambda: clock.now)
    monkeypatch.setattr(fit.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(timebox, "terminated", False)  # again afterwards
    return clock


def progress(runs: Path) -> list[int]:
    """How many epochs the runs without a result have made."""
    unfinished = [run for _, path in store.folders(runs) if (run := store.Run(Path(path))).result() is None]
    return sorted(int((run.progress() or {"epoch": 0})["epoch"]) for run in unfinished)


def asked(call: Command, limit: float | None, *more: str, **where: Any) -> list[str]:
    """The tiny table with runs of six epochs: its lines about the time."""
    code, out, err = call("table=tiny", "epochs=6", *([f"runtime.time_limit={limit}"] if limit else []), *more, **where)
    assert (code, err) == (0, "")
    return [line for line in out.splitlines() if "are left" in line or "stops at" in line]


def test_a_kind_without_an_estimate_is_tried_for_an_epoch(command: Command, clock: SimpleNamespace, tmp_path: Path) -> None:
    """A run takes 60 s. Of the two kinds, without and with ITDM, a run makes an epoch; then none is started."""
    lines = asked(command, 35)
    assert (
        progress(tmp_path / "runs") == [1, 1]
        and len(lines) == 3
        and lines[-1]
        == (
            f"runtime.time_limit=35: {CELLS} of {CELLS} runs are left, about 5.7 minutes one after another; "
            "none of them is expected to fit, the shortest takes 50 s: raise the limit, or end the command by SIGTERM"
        )
    )
    before, folders = clock.now, sorted(tmp_path.rglob("runs/*/*"))
    asked(command, 45)
    assert clock.now == before and sorted(tmp_path.rglob("runs/*/*")) == folders


def test_what_fits_is_finished_and_the_rest_continues(command: Command, clock: SimpleNamespace, tmp_path: Path) -> None:
    lines = asked(command, 130)
    assert len(results(tmp_path / "runs")) == 2 and progress(tmp_path / "runs") == [1]
    assert lines[-1].startswith(f"runtime.time_limit=130: {CELLS - 2} of {CELLS} runs are left, about 3.8 minutes")
    assert asked(command, None) == asked(command, 1) == asked(command, None, runs=tmp_path / "whole") == []
    assert len(endings(tmp_path / "whole")) == CELLS and same(endings(tmp_path / "runs"), endings(tmp_path / "whole"))


def test_a_run_that_is_slower_than_its_kind_ends_at_a_checkpoint(command: Command, clock: SimpleNamespace, tmp_path: Path) -> None:
    """Also where none is due: checkpoints are four epochs apart, and three epochs fit."""
    more = ["only=[without]", "table.seeds=[1,2]", "runtime.checkpoint_every=4"]
    asked(command, None, *SINGLE)
    clock.epoch = 20.0
    lines = asked(command, 70, *more)
    assert progress(tmp_path / "runs") == [3] and "stops at epoch 3 of 6, with a checkpoint" in lines[0]
    assert lines[-1].startswith("runtime.time_limit=70: 1 of 2 runs are left, about 0.5 min")
    clock.epoch = 10.0
    asked(command, 29, *more)  # the rest of it takes 30 s
    assert progress(tmp_path / "runs") == [3]
    asked(command, 31, *more)
    assert progress(tmp_path / "runs") == []


def test_a_sweep(command: Command, clock: SimpleNamespace, tmp_path: Path) -> None:
    sweep = ["-m", "seed=1,2,3", "dataset.train=100", "epochs=6", "runtime.time_limit=125"]
    code, out, err = command(*sweep, task=train.train, root="config")
    assert (code, err) == (0, "") and len(results(tmp_path / "runs")) == 2
    assert out.splitlines()[-1] == "the time box has ended: 1 run is left; ask again and it goes on"


def test_an_estimate_leaves_out_the_first_step_and_other_devices(command: Command, clock: SimpleNamespace, tmp_path: Path) -> None:
    clock.first = 1000  # for what later steps find ready
    assert asked(command, 1065, *SINGLE) == []
    (path,) = tmp_path.glob("runs/*/*")
    run = store.Run(path)
    run.finish((run.result() or {}) | {"device": "another", "seconds": 1e6})
    assert asked(command, 65, "only=[without]") == [] and len(results(tmp_path / "runs")) == 2


def test_a_failed_run_continues(command: Command, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A run that failed, then was ended by the time box, is left; it has not failed again."""
    with monkeypatch.context() as patch:
        patch.setattr(fit, "headline", lambda *_: 1 / 0)  # after the first epoch's checkpoint
        assert command("table=tiny", "epochs=6", *SINGLE)[0] == 1
    (run,) = map(store.Run, tmp_path.glob("runs/*/*"))
    assert run.state == "failed"
    clock.epoch = 20.0  # by its first epoch, 10 s, it fits
    assert "1 of 1 runs are left" in asked(command, 55, *SINGLE)[-1] and run.state == "resumable"


def test_an_epoch_that_is_too_long_is_given_up(command: Command, clock: SimpleNamespace, tmp_path: Path) -> None:
    """Steps of 6 s in epochs of ten: the second step decides, not the epoch's end. The estimate is kept: no run of the kind is started."""
    few, before = ["only=[without]", "batch_size=10"], clock.now
    clock.step = 6
    line = "runtime.time_limit=40: 2 of 2 runs are left, about 12.0 minutes one after another; none of them"
    for _ in range(2):
        assert asked(command, 40, *few)[-1].startswith(line)
        (run,) = map(store.Run, tmp_path.glob("runs/*/*"))
        assert clock.now == before + 12 and progress(tmp_path / "runs") == [0] and run.state == "missing"
    clock.step = 0
    asked(command, None, *few)
    assert len(results(tmp_path / "runs")) == 2


# SIGTERM


def test_sigterm_ends_the_box(command: Command, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Twice, as timeout(1) sends it, here with a closed stderr: the run in progress finishes its epoch, and no other run begins."""
    plain, before = Trainer.take_step, signal.getsignal(signal.SIGTERM)

    def take_step(trainer: Trainer, *samples: Any) -> None:
        if trainer.step == 2 * trainer.steps_per_epoch:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        plain(trainer, *samples)

    monkeypatch.setattr(Trainer, "take_step", take_step)
    monkeypatch.setattr(timebox.os, "write", Mock(side_effect=BrokenPipeError))
    clock.step = 6
    line = asked(command, None)[-1]
    assert progress(tmp_path / "runs") == [3]
    assert re.fullmatch(rf"ended by SIGTERM: {CELLS} of {CELLS} runs are left, about \S+ minutes .*; ask again and it goes on", line)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
@pytest.mark.usefixtures("untraced", "extra")
def test_sigterm_reaches_runs_in_other_processes(tmp_path: Path) -> None:
    """Two runs side by side; then the same command, to the bits of runs that nothing interrupted."""

    def start(runs: Path) -> subprocess.Popen[str]:
        more = ["table=tiny", f"out={tmp_path}/out", "epochs=40", "table.seeds=[1]", "runtime.runs_per_device=2"]
        line = [sys.executable, "-m", "experiments.table", *words(tmp_path, runs), *more]
        return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    first = start(tmp_path / "runs")
    while not (made := [*tmp_path.glob("runs/*/*/progress.json")]) and first.poll() is None:
        time.sleep(0.02)
    assert made, first.communicate()
    first.send_signal(signal.SIGTERM)
    out, err = first.communicate(timeout=300)
    assert (first.returncode, err) == (0, "retable: SIGTERM; runs in progress end at their next checkpoint\n")
    assert re.search(r"ended by SIGTERM: [1-3] of 3 runs are left", out) and len(progress(tmp_path / "runs")) <= 2
    assert start(tmp_path / "runs").wait(300) == start(tmp_path / "whole").wait(300) == 0
    assert len(endings(tmp_path / "whole")) == 3 and same(endings(tmp_path / "runs"), endings(tmp_path / "whole"))


def test_a_process_that_sigterm_ends_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """timeout(1) sends it to all processes of the command: also to the one that starts those of the runs."""

    def start() -> None:
        monkeypatch.setattr(timebox, "terminated", True)
        raise EOFError

    monkeypatch.setattr(timebox, "terminated", False)
    monkeypatch.setattr(multiprocessing.get_context("forkserver"), "Process", Mock(return_value=Mock(pid=None, start=start)))
    with pytest.raises(timebox.TimeUp):
        apart(print, OmegaConf.create({}))


def test_a_child_command_counts_from_the_start_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, now = OmegaConf.create({"time_limit": 100}), 5000.0
    monkeypatch.setattr(timebox.time, "time", lambda: now)
    for nonsense in ("", "x", "nan", "-5"):
        monkeypatch.setenv(timebox.BEGAN, nonsense)
        with timebox.began_now():
            assert timebox.left(runtime) == 100
    with timebox.began_now():
        now += 60
        with timebox.began_now():
            assert timebox.left(runtime) == 40
        assert timebox.left(runtime) == 40
    assert timebox.BEGAN not in os.environ
    assert timebox.left(OmegaConf.create({"time_limit": None})) == math.inf
