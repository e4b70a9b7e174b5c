"""The time box: what is not started, where a run ends, what is said, and that asking again gives the bits of a run without one."""

from __future__ import annotations

import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from test_resume import endings, same
from test_table import CELLS, Command, command, extra, results  # noqa: F401  fixtures

from experiments import apart, fit, store, timebox, train
from experiments.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
EPOCHS = 6


@pytest.fixture(autouse=True)
def not_terminated() -> Iterator[None]:
    yield
    timebox.terminated = False


class Clock:
    """A command's time as its runs spend it: so many seconds an epoch, and nothing besides."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.epoch = time.time(), 10.0
        plain = Trainer.train_epoch

        def train_epoch(trainer: Trainer, tick: Callable[[], object]) -> None:
            plain(trainer, tick)
            self.now += self.epoch
            trainer.seconds = self.epoch * trainer.epoch

        monkeypatch.setattr(Trainer, "train_epoch", train_epoch)
        monkeypatch.setattr(timebox.time, "time", lambda: self.now)
        monkeypatch.setattr(fit.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def progress(runs: Path) -> dict[str, int]:
    """The epochs that each run without a result has made, by its folder."""
    found = {Path(path).name: store.Run(Path(path)) for _, path in store.folders(runs)}
    return {name: int((run.progress() or {"epoch": 0})["epoch"]) for name, run in found.items() if run.result() is None}


def asked(call: Command, limit: float | None, *words: str, **more: Any) -> tuple[int, str, list[str]]:
    """The tiny table with runs of six epochs: exit code, stdout, and its lines about the time."""
    limited = [] if limit is None else [f"runtime.time_limit={limit}"]
    code, out, err = call("table=tiny", f"epochs={EPOCHS}", *limited, *words, **more)
    assert err == ""
    return code, out, [line for line in out.splitlines() if "are left" in line or "stops at" in line]


def test_a_kind_that_nothing_is_known_of_is_tried_for_an_epoch(command: Command, clock: Clock, tmp_path: Path) -> None:  # noqa: F811
    """Each run takes 60 s: of the two kinds, without and with ITDM, one run makes one epoch; then none is started."""
    code, _, lines = asked(command, 35)
    assert code == 0 and sorted(progress(tmp_path / "runs").values()) == [1, 1]
    assert len(lines) == 3 and lines[-1] == (
        f"runtime.time_limit=35: {CELLS} of {CELLS} runs are left, about 5.7 minutes one after another; "
        "none of them is expected to fit, the shortest takes 50 s: raise the limit, or end the command by SIGTERM"
    )
    before = clock.now
    assert asked(command, 45)[0] == 0 and clock.now == before  # what is known now does not fit, whatever was not yet begun


def test_what_fits_is_finished_and_the_rest_goes_on(command: Command, clock: Clock, tmp_path: Path) -> None:  # noqa: F811
    code, out, lines = asked(command, 130)
    assert code == 0 and len(results(tmp_path / "runs")) == 2 and [*progress(tmp_path / "runs").values()] == [1]
    assert lines[-1].startswith(f"runtime.time_limit=130: {CELLS - 2} of {CELLS} runs are left, about 3.8 minutes")
    assert [line.split("|")[2].strip() != "-" for line in out.splitlines() if line.startswith("| with")] == [True, False, False]
    assert asked(command, None)[:3:2] == (0, []) and asked(command, 1)[:3:2] == (0, [])
    whole = tmp_path / "whole"
    assert asked(command, None, runs=whole)[0] == 0
    assert len(endings(whole)) == CELLS and same(endings(tmp_path / "runs"), endings(whole))


def test_a_run_that_is_slower_than_its_kind_was_ends_at_a_checkpoint(command: Command, clock: Clock, tmp_path: Path) -> None:  # noqa: F811
    """Also where none is due: checkpoints are four epochs apart, and three epochs fit."""
    words = ["only=[without]", "table.seeds=[1,2]", "runtime.checkpoint_every=4"]
    assert asked(command, None, "only=[without]", "table.seeds=[1]")[0] == 0
    clock.epoch = 20.0
    code, _, lines = asked(command, 70, *words)
    assert code == 0 and [*progress(tmp_path / "runs").values()] == [3]
    assert "stops at epoch 3 of 6, with a checkpoint" in lines[0]
    assert lines[-1].startswith("runtime.time_limit=70: 1 of 2 runs are left, about 0.5 min")
    clock.epoch = 10.0
    assert asked(command, 29, *words)[0] == 0 and [*progress(tmp_path / "runs").values()] == [3]  # the rest of it takes 30 s
    assert asked(command, 31, *words)[0] == 0 and progress(tmp_path / "runs") == {}


def test_nothing_is_left_of_a_run_that_was_not_started(command: Command, clock: Clock, tmp_path: Path) -> None:  # noqa: F811
    assert asked(command, None, "only=[without]", "table.seeds=[1]")[0] == 0
    before = sorted(tmp_path.rglob("runs/*/*"))
    code, _, lines = asked(command, 59, "only=[without]")
    assert (code, len(lines)) == (0, 1) and lines[0].startswith("runtime.time_limit=59: 1 of 2 runs are left, about 1.0 minutes")
    assert sorted(tmp_path.rglob("runs/*/*")) == before


def test_a_sweep(command: Command, clock: Clock, tmp_path: Path) -> None:  # noqa: F811
    words = ["-m", "seed=1,2,3", "dataset.train=100", "epochs=6", "runtime.time_limit=125"]
    code, out, err = command(*words, task=train.train, root="config")
    assert (code, err) == (0, "") and len(results(tmp_path / "runs")) == 2
    assert out.splitlines()[-1] == "the time box has ended: 1 run is left; ask again and it goes on"


def test_sigterm_ends_the_box(command: Command, clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:  # noqa: F811
    """Twice, as timeout(1) sends it: the run in progress makes its epoch, and no other one is begun."""
    plain, before = Trainer.train_epoch, signal.getsignal(signal.SIGTERM)

    def train_epoch(trainer: Trainer, tick: Callable[[], object]) -> None:
        if trainer.epoch == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        plain(trainer, tick)

    monkeypatch.setattr(Trainer, "train_epoch", train_epoch)
    code, _, lines = asked(command, None)
    assert code == 0 and [*progress(tmp_path / "runs").values()] == [3]
    length = "about 1.5 minutes one after another without 4 of unknown length"
    assert lines[-1] == f"ended by SIGTERM: {CELLS} of {CELLS} runs are left, {length}; ask again and it goes on"
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_reaches_runs_in_other_processes(extra: Path, tmp_path: Path) -> None:  # noqa: F811
    """Two runs side by side; then all of it again, with the bits of runs that nothing interrupted."""

    def start(runs: Path) -> subprocess.Popen[str]:
        common = ["runtime.device=cpu", f"runtime.runs={runs}", "profile.test=100", f"out={tmp_path}/out", "epochs=100", "table.seeds=[1]"]
        words = ["--config-dir", str(extra), "table=tiny", *common, "runtime.runs_per_device=2", "runtime.threads=1"]
        command = [sys.executable, "-m", "experiments.table", *words]  # noqa: F811
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    first = start(tmp_path / "runs")
    while not (made := [*tmp_path.glob("runs/*/*/progress.json")]) and first.poll() is None:
        time.sleep(0.02)
    assert made, first.communicate()
    first.send_signal(signal.SIGTERM)
    out, err = first.communicate(timeout=120)
    assert (first.returncode, err) == (0, "retable: SIGTERM; runs in progress end at their next checkpoint\n")
    assert re.search(r"ended by SIGTERM: [1-3] of 3 runs are left", out) and len(progress(tmp_path / "runs")) <= 2
    assert start(tmp_path / "runs").wait(120) == start(tmp_path / "whole").wait(120) == 0
    assert len(endings(tmp_path / "whole")) == 3 and same(endings(tmp_path / "runs"), endings(tmp_path / "whole"))


def test_a_process_that_sigterm_kills_before_it_begins_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timebox, "terminated", True)
    cfg = OmegaConf.create({"runtime": {"time_limit": None}})
    (error,) = apart.side_by_side(print, [lambda: cfg], 1)
    assert isinstance(error, timebox.TimeUp)


def test_an_estimate_is_of_an_epoch_without_the_first_step(command: Command, clock: Clock, tmp_path: Path) -> None:  # noqa: F811
    """Which pays for what later ones find ready: a run is judged by the time after it."""
    plain, steps = Trainer.take_step, []

    def take_step(trainer: Trainer, *samples: Any) -> None:
        clock.now += 0 if steps else 1000
        steps.append(1)
        plain(trainer, *samples)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "take_step", take_step)
        assert asked(command, 1065, "only=[without]", "table.seeds=[1]")[:3:2] == (0, [])
    assert len(results(tmp_path / "runs")) == 1


def test_estimates_are_of_this_device(command: Command, clock: Clock, tmp_path: Path) -> None:  # noqa: F811
    """Runs of another one that took far longer do not keep a run from starting, nor do shorter ones let it."""
    few = ["only=[without]", "table.seeds=[1]"]
    asked(command, None, *few)
    (path,) = tmp_path.glob("runs/*/*")
    run = store.Run(path)
    run.finish((run.result() or {}) | {"device": "another", "seconds": 1e6})
    assert asked(command, 65, "only=[without]")[:3:2] == (0, []) and len(results(tmp_path / "runs")) == 2


def test_a_failed_run_goes_on(command: Command, clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:  # noqa: F811
    """Ended by the time box, it is one of those that are left, and failed no more."""
    few, plain = ["only=[without]", "table.seeds=[1]"], Trainer.train_epoch

    def train_epoch(trainer: Trainer, tick: Callable[[], object]) -> None:
        if trainer.epoch == 1:
            raise RuntimeError("a fault")
        plain(trainer, tick)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_epoch", train_epoch)
        assert command("table=tiny", f"epochs={EPOCHS}", *few)[0] == 1
    (path,) = tmp_path.glob("runs/*/*")
    assert store.Run(path).state == "failed"
    clock.epoch = 20.0  # by its first epoch, 10 s, it fits
    code, _, lines = asked(command, 55, *few)
    assert code == 0 and "1 of 1 runs are left" in lines[-1] and store.Run(path).state == "resumable"


def test_launchers_with_limits_of_their_own(command: Command) -> None:  # noqa: F811
    code, _, err = command("table=tiny", "runtime.time_limit=60", "hydra/launcher=submitit_local")
    assert (code, err) == (
        2,
        "retable: runtime.time_limit: submitit_local has a limit of its own for each job, hydra.launcher.timeout_min\n",
    )


def test_a_signal_that_nobody_hears_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard error is closed: the time box ends all the same."""
    monkeypatch.setattr(timebox.os, "write", lambda *_: (_ for _ in ()).throw(BrokenPipeError()))
    with timebox.heeding_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
    assert timebox.terminated


def test_a_fork_server_that_the_signal_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """timeout(1) sends it to all processes of the command: a run that cannot be started then is no failure."""

    class Ended:
        pid = None

        def __init__(self, **_: Any) -> None:
            pass

        def start(self) -> None:
            monkeypatch.setattr(timebox, "terminated", True)
            raise EOFError

    monkeypatch.setattr(multiprocessing.get_context("forkserver"), "Process", Ended)
    with pytest.raises(timebox.TimeUp):
        apart.apart(print, OmegaConf.create({}))


def test_an_epoch_that_is_too_long_is_given_up(command: Command, clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:  # noqa: F811
    """Steps of 6 s in epochs of ten: judged by its second step, not by the epoch's end; remembered, so that no run of its kind is begun."""
    plain = Trainer.take_step

    def take_step(trainer: Trainer, *samples: Any) -> None:
        clock.now += 6
        plain(trainer, *samples)

    few = ["only=[without]", "batch_size=10"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take_step", take_step)
        before = clock.now
        code, _, lines = asked(command, 40, *few)
        assert code == 0 and clock.now == before + 12 and [*progress(tmp_path / "runs").values()] == [0]
        assert lines[-1].startswith("runtime.time_limit=40: 2 of 2 runs are left, about 12.0 minutes one after another; none of them")
        (path,) = tmp_path.glob("runs/*/*")
        assert store.Run(path).state == "missing" and asked(command, 40, *few)[0] == 0 and clock.now == before + 12
    assert asked(command, None, *few)[0] == 0 and len(results(tmp_path / "runs")) == 2


def test_sigterm_gives_up_no_epoch(command: Command, clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:  # noqa: F811
    plain = Trainer.take_step

    def take_step(trainer: Trainer, *samples: Any) -> None:
        clock.now += 6
        timebox.terminated = trainer.step == 3
        plain(trainer, *samples)
        timebox.terminated = trainer.step >= 3

    monkeypatch.setattr(Trainer, "take_step", take_step)
    asked(command, None, "only=[without]", "batch_size=10")
    assert [*progress(tmp_path / "runs").values()] == [1]


def test_commands_that_a_command_starts_count_from_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = OmegaConf.create({"time_limit": 100})
    monkeypatch.delenv(timebox.BEGAN, raising=False)
    now = 5000.0
    monkeypatch.setattr(timebox.time, "time", lambda: now)
    with timebox.began_now():
        now += 60
        with timebox.began_now():
            assert timebox.left(runtime) == 40
        assert timebox.left(runtime) == 40
    assert timebox.BEGAN not in os.environ
    for nonsense in ("", "x", "nan", "-5"):
        monkeypatch.setenv(timebox.BEGAN, nonsense)
        with timebox.began_now():
            assert timebox.left(runtime) == 100
    assert timebox.left(OmegaConf.create({"time_limit": None})) == math.inf
