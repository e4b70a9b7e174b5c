"""Where a run is trained: its place on a GPU, its process, and what is left when that process ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from experiments import apart, devices, timebox
from experiments.cli import RunFailed
from experiments.config import ConfigError

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("untraced")


def runtime(**keys: Any) -> DictConfig:
    return OmegaConf.create({"device": "auto", "devices": None, "runs_per_device": 1, "time_limit": None} | keys)


# places on GPUs


def test_places_are_taken_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First one on each GPU, then the second ones; a place is free again when its holder ends."""
    monkeypatch.setattr(devices, "held", [])
    names = {0: "a", 3: "b"}
    assert [devices.take(names, 2, tmp_path) for _ in range(4)] == [0, 3, 0, 3]
    devices.held.pop(1).close()
    assert devices.take(names, 2, tmp_path) == 3


HOLD = """
import sys, time
from pathlib import Path
from experiments import devices
print(devices.take({0: "a"}, 1, Path(sys.argv[1])), flush=True)
time.sleep(100)
"""


def test_a_place_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Until its holder, another process, is killed; what is waited for is said once."""
    monkeypatch.setattr(devices, "held", [])
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "0\n"
        looks = []

        def sleep(seconds: float) -> None:
            looks.append(seconds)
            if seconds == devices.WAIT_SECONDS and looks.count(seconds) == 2:
                holder.kill()
                holder.wait()

        monkeypatch.setattr(time, "sleep", sleep)
        assert devices.take({0: "a"}, 1, tmp_path) == 0
    assert looks.count(devices.WAIT_SECONDS) == 2
    assert capsys.readouterr().out == "waiting for a place on GPU 0 (runtime.runs_per_device=1)\n"


def test_devices_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert devices.device(runtime()) == devices.device(runtime(device="cpu")) == "cpu"
    with pytest.raises(ConfigError, match=r"^runtime.devices: \[0, 1\] was asked for, and torch finds no GPU; allowed here: auto, cpu$"):
        devices.device(runtime(devices=[0, 1]))
    with pytest.raises(ConfigError, match=r"^runtime.device: cuda was asked for"):
        devices.device(runtime(device="cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"^runtime.devices: there is no GPU 2; allowed here: 0, 1$"):
        devices.device(runtime(devices=[1, 2]))


def test_a_run_gets_a_gpu_with_a_free_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    chosen = []
    monkeypatch.setattr(devices, "held", [])
    monkeypatch.setattr(devices.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: OmegaConf.create({"uuid": f"GPU-{index}"}))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert devices.device(runtime()) == "cuda:0" and not devices.held  # only asked
    assert devices.device(runtime(device="cuda:2"), claim=True) == "cuda:2"
    assert [devices.device(runtime(devices=[2, 3]), claim=True) for _ in range(1)] == ["cuda:3"]  # the other is taken
    assert chosen == [0, 2, 3]
    assert devices.places(runtime(devices=[0, 1], runs_per_device=3)) == 6 and devices.places(runtime()) == 1


def test_waiting_for_a_place_ends_with_the_time_box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "WAIT_SECONDS", 0.0)
    monkeypatch.setattr(devices, "held", [])
    assert devices.take({0: "a"}, 1, tmp_path) == 0
    left = iter([False, False, True])
    with pytest.raises(timebox.TimeUp, match="no place on GPU 0 became free"):
        devices.take({0: "a"}, 1, tmp_path, over=lambda: next(left))


# processes


def outcome(cfg: DictConfig) -> None:
    """What a run's process may come to."""
    Path(cfg.file).write_text(str(os.getpid()))
    if cfg.how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if cfg.how == "exit":
        os._exit(3)
    if cfg.how == "bad":
        raise ConfigError("seed: no")
    if cfg.how == "raise":
        raise RunFailed("it broke")


def test_each_run_has_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at a time; what ends one is told, and ends no other."""
    monkeypatch.setattr(apart, "run_dir", lambda cfg: f"run {cfg.how}")
    hows = ["well", "kill", "bad", "exit", "raise", "well"]
    cfgs = [{"how": how, "file": str(tmp_path / str(i)), "runtime": {"time_limit": None}} for i, how in enumerate(hows)]
    runs = [partial(OmegaConf.create, cfg) for cfg in cfgs]
    errors = apart.side_by_side(outcome, runs, places=2)
    again = "; ask again and it goes on from its last checkpoint"
    expected = [None, f"run kill: its process was killed by SIGKILL{again}", "seed: no", f"run exit: its process ended with code 3{again}"]
    assert [error and str(error) for error in errors] == [*expected, "it broke", None]
    assert [type(error) for error in errors[1:5]] == [RunFailed, ConfigError, RunFailed, RunFailed]
    pids = {path.read_text() for path in tmp_path.iterdir()}
    assert len(pids) == len(hows) and str(os.getpid()) not in pids


def test_a_config_that_cannot_be_composed_is_its_own_error() -> None:
    def broken() -> DictConfig:
        raise ConfigError("table: no")

    (error,) = apart.side_by_side(outcome, [broken], places=2)
    assert str(error) == "table: no"
