"""Where a run is trained: the launcher, the place on a GPU, the process, and what is left when that process ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import pytest
import submitit
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from experiments import store, timebox
from experiments.cli import CONF, RunFailed
from experiments.config import ConfigError
from experiments.launching import devices, launchers, processes, slurm
from experiments.launching.launchers import InTurn, SideBySide, Submitit

pytestmark = pytest.mark.usefixtures("untraced")


def runtime(**keys: Any) -> DictConfig:
    return OmegaConf.create({"device": "auto", "devices": None, "runs_per_device": 1, "time_limit": None} | keys)


# places on GPUs


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """First a place on each GPU, then the second ones. A place is free again when its file is closed, as when its holder ends."""
    names, looks = {0: "a", 3: "b"}, []
    monkeypatch.setattr(devices, "held", [])
    assert [devices.take(names, 2, tmp_path) for _ in range(4)] == [0, 3, 0, 3]

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if seconds == devices.WAIT_SECONDS and looks.count(seconds) == 2:
            devices.held.pop(1).close()

    monkeypatch.setattr(time, "sleep", sleep)
    assert devices.take(names, 2, tmp_path) == 3 and looks.count(devices.WAIT_SECONDS) == 2
    assert capsys.readouterr().out == "waiting for a place on GPUs 0, 3 (runtime.runs_per_device=2)\n"
    left = iter([False, False, True])
    with pytest.raises(timebox.TimeUp, match="no place on GPU 0 became free"):
        devices.take({0: "a"}, 1, tmp_path, over=lambda: next(left))


def test_devices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert devices.device(runtime()) == devices.device(runtime(device="cpu")) == "cpu"
    with pytest.raises(ConfigError, match=r"^runtime.devices: \[0, 1\] was asked for, and torch finds no GPU; allowed here: auto, cpu$"):
        devices.device(runtime(devices=[0, 1]))
    with pytest.raises(ConfigError, match=r"^runtime.device: cuda was asked for"):
        devices.device(runtime(device="cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ConfigError, match=r"^runtime.devices: there is no GPU 4; allowed here: 0, 1, 2, 3$"):
        devices.device(runtime(devices=[1, 4]))
    chosen = []
    monkeypatch.setattr(devices, "held", [])
    monkeypatch.setattr(devices.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: OmegaConf.create({"uuid": f"GPU-{index}"}))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert devices.device(runtime()) == "cuda:0" and not devices.held  # not claimed
    assert devices.device(runtime(device="cuda:2"), claim=True) == "cuda:2"
    assert devices.device(runtime(devices=[2, 3]), claim=True) == "cuda:3"
    assert chosen == [0, 2, 3]
    assert devices.places(runtime(devices=[0, 1], runs_per_device=3)) == 6 and devices.places(runtime()) == 1


# processes


def outcome(cfg: DictConfig) -> None:
    """What a run's process may come to."""
    Path(cfg.file).write_text(str(os.getpid()))
    if cfg.how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if cfg.how == "exit":
        os._exit(3)
    if cfg.how == "raise":
        raise RunFailed("it broke")


def test_each_run_has_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at a time. The end of a process is reported, and is no other run's end; so is a config that cannot be composed."""
    monkeypatch.setattr(processes, "run_dir", lambda cfg: f"run {cfg.how}")

    def broken() -> DictConfig:
        raise ConfigError("table: no")

    hows = ["kill", "exit", "raise", "well"]
    cfgs = [{"how": how, "file": str(tmp_path / how), "runtime": {"time_limit": None}} for how in hows]
    jobs = {"broken": broken} | {cfg["how"]: partial(OmegaConf.create, cfg) for cfg in cfgs}
    errors = SideBySide(tmp_path, 2).submit(outcome, jobs)
    again = "; ask again and it goes on from its last checkpoint"
    expected = [f"run kill: its process was killed by SIGKILL{again}", f"run exit: its process ended with code 3{again}", "it broke"]
    assert [str(error) for error in errors] == ["table: no", *expected]
    assert [type(error) for error in errors] == [ConfigError, RunFailed, RunFailed, RunFailed]
    pids = {path.read_text() for path in tmp_path.iterdir()}
    assert len(pids) == len(hows) and str(os.getpid()) not in pids


# launchers


def test_in_turn_a_failure_stops_no_other_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process on a CPU; on a GPU in processes of their own."""
    pids, apart, launcher = [], Mock(), InTurn(tmp_path)
    jobs = {name: lambda: OmegaConf.create({"runtime": runtime()}) for name in "abc"}

    def task(cfg: DictConfig) -> None:
        pids.append(os.getpid())
        if len(pids) == 2:
            raise RunFailed("it broke")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [str(error) for error in launcher.submit(task, jobs)] == ["it broke"] and launcher.alive() == {}
    assert pids == [os.getpid()] * 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(launchers, "apart", apart)
    assert launcher.submit(task, jobs) == [] and apart.call_count == 3 and len(pids) == 3
    monkeypatch.setattr(timebox, "terminated", True)
    assert [type(error) for error in launcher.submit(task, jobs)] == [timebox.TimeUp] * 3 and apart.call_count == 3


@contextlib.contextmanager
def command_line(*words: str) -> Iterator[None]:
    """Hydra's own words of a command."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("tables", [*words], return_hydra_config=True)
    cfg.hydra.overrides.hydra = [*words]
    HydraConfig.instance().set_config(cfg)
    try:
        yield
    finally:
        HydraConfig.instance().cfg = None


def test_the_command_line_chooses(tmp_path: Path) -> None:
    def chosen(*words: str, **keys: Any) -> launchers.Launcher:
        with command_line(*words):
            return launchers.chosen(runtime(runs=str(tmp_path), **keys))

    assert chosen() == InTurn(tmp_path) and chosen(runs_per_device=2) == SideBySide(tmp_path, 2)
    for words, count in ([["hydra.launcher.n_jobs=3"], 3], [[], devices.cores()]):
        assert chosen("hydra/launcher=joblib", *words) == SideBySide(tmp_path, count, overrides=(f"runtime.runs_per_device={count}",))
    assert chosen("hydra/launcher=submitit_local", runs_per_device=2) == Submitit(tmp_path, "local", 2)
    assert chosen("hydra/launcher=submitit_slurm") == Submitit(tmp_path, "slurm", 1)
    shared = chosen("hydra/launcher=joblib", "hydra.launcher.n_jobs=4", devices=[0, 1])
    assert shared.overrides == ("runtime.runs_per_device=2",)  # of each GPU
    with pytest.raises(ConfigError, match=r"^runtime.time_limit: submitit_slurm has a limit of its own for each job"):
        chosen("hydra/launcher=submitit_slurm", time_limit=60)
    with pytest.raises(ConfigError, match=r"^hydra.launcher.n_jobs: 0 is not allowed; it must be"):
        chosen("hydra/launcher=joblib", "hydra.launcher.n_jobs=0")


def test_what_slurm_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options of the command line, the name of the note, and the runs that are not queued or done; the largest array at a time."""
    words = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu", "hydra.launcher.timeout_min=240"]
    made = [Mock() for _ in range(4)]
    executor = Mock(side_effect=made)
    monkeypatch.setattr(launchers, "LARGEST_ARRAY", 2)
    monkeypatch.setattr(submitit, "AutoExecutor", executor)
    queue = Mock(return_value={"0000000003": slurm.Job("7", "PENDING", "")})
    monkeypatch.setattr(slurm, "alive", queue)
    done = store.Run(tmp_path / "group" / "run-0000000004")
    done.path.mkdir(parents=True)
    done.finish({"seconds": 1.0})
    jobs = {f"{number:010}": partial(OmegaConf.create, {"number": number}) for number in range(6)}
    trained = []
    for more in ([], ["hydra.launcher.max_num_timeout=7", "hydra.launcher.submitit_folder=elsewhere"]):
        with command_line(*words, *more):
            assert Submitit(tmp_path, "slurm", 1).submit(lambda cfg: trained.append(cfg.number), jobs) == []
    assert queue.mock_calls == [call(tmp_path, tidy=True)] * 2  # once for each command, however many jobs
    assert executor.mock_calls[0] == call(f"{tmp_path}/.submitit/%j", "slurm", slurm_max_num_timeout=100)
    assert executor.mock_calls[-1] == call("elsewhere", "slurm", slurm_max_num_timeout=7)
    first, second = (one.update_parameters.call_args.kwargs for one in made[:2])
    assert first.items() >= {"slurm_partition": "gpu", "slurm_timeout_min": 240, "slurm_signal_delay_s": 120}.items()
    notes = {path.stem: json.loads(path.read_text()) for path in (tmp_path / ".queue").glob("*.json")}
    assert notes[first["slurm_name"]] == ["0000000000", "0000000001"]
    assert notes[second["slurm_name"]] == ["0000000002", "0000000005"]
    submitted = [one.submit_array.call_args.args[0] for one in made]
    for job in submitted[1]:
        job()
    again = submitted[0][1].checkpoint()
    again.function(*again.args, **again.kwargs)
    assert trained == [2, 5, 1]


def test_sigterm_ends_local_jobs_between_two_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = Mock()
    executor.return_value.submit_array.side_effect = lambda jobs: monkeypatch.setattr(timebox, "terminated", True) or []
    monkeypatch.setattr(submitit, "AutoExecutor", executor)
    with command_line("hydra/launcher=submitit_local"):
        Submitit(tmp_path, "local", 2).submit(print, {str(number): partial(OmegaConf.create, {}) for number in range(6)})
    assert len(executor.mock_calls) == 3  # made, updated, submitted
