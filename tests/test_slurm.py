"""A real SLURM of one node (tests/slurm.sh): what happens to jobs and to who asks for them, and that the numbers are the same."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_resume import endings, same
from test_table import Command, command, extra

from experiments import store

__all__ = ["command", "extra"]  # fixtures
ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.usefixtures("untraced"), pytest.mark.slow]
LONG = 450  # epochs: more than a minute of training, so that a limit of one minute ends it twice
TABLE = f"""
title: "Four runs"
base: [dataset=digits, dataset.train=200, profile.test=100, "schedule.at=[20]", batch_size=20, epochs=60]
seeds: [1]
columns: {{CE: {{metric: test/ce, digits: 6}}}}
rows:
  - {{label: long, overrides: [method=vanilla, epochs={LONG}]}}
  - {{label: short, overrides: [method=itdm_c], grid: {{method.itdm_c.weight: [0.1, 0.2, 0.3]}}}}
"""
MISSING = """
title: "No data"
base: [epochs=1, "schedule.at=[1]"]
seeds: [1]
columns: {CE: {metric: test/ce}}
rows: [{label: only, overrides: [dataset=kmnist, method=vanilla]}]
"""
LIMITS = ["hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=30"]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Path]:
    """A running SLURM; its folder has a short name, for sockets."""
    turn = Path(tempfile.gettempdir()) / "retable-slurm.lock"  # of the workers that run tests: SLURMs share a munged
    while (lock := store.locked(turn)) is None:
        time.sleep(1)
    folder = Path(tempfile.mkdtemp(prefix="slurm"))
    started = subprocess.run([ROOT / "tests" / "slurm.sh", "start", folder], capture_output=True, text=True, timeout=120)
    if started.returncode == 77:
        shutil.rmtree(folder)
        lock.close()
        pytest.skip(started.stderr.strip())
    assert started.returncode == 0, started.stderr
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    try:
        yield folder
    finally:
        subprocess.run([ROOT / "tests" / "slurm.sh", "stop", folder], check=True, timeout=120)
        del os.environ["SLURM_CONF"]
        shutil.rmtree(folder, ignore_errors=True)
        lock.close()


Ask = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def ask(tmp_path: Path, extra: Path) -> Iterator[Ask]:
    """Starts a command that asks for a table, in a process group of its own, with its output in a file."""
    (extra / "table" / "four.yaml").write_text(TABLE)
    (extra / "table" / "missing.yaml").write_text(MISSING)
    started: list[subprocess.Popen[str]] = []

    def asked(*words: str, runs: str = "runs") -> subprocess.Popen[str]:
        common = ["--config-dir", str(extra), "runtime.threads=1", f"runtime.data_dir={tmp_path}", f"out={tmp_path}/out"]
        whole = [sys.executable, "-m", "experiments.table", *common, f"runtime.runs={tmp_path}/{runs}", *words]
        log = open(tmp_path / f"log{len(started)}", "w+")  # noqa: SIM115
        started.append(subprocess.Popen(whole, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True))
        started[-1].log = Path(log.name)  # type: ignore[attr-defined]
        return started[-1]

    yield asked
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def text(process: subprocess.Popen[str]) -> str:
    return process.log.read_text()  # type: ignore[attr-defined]


def until(what: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def queue() -> list[str]:
    return subprocess.run(["squeue", "-h", "-r"], capture_output=True, text=True, check=True).stdout.splitlines()


def cells(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("|")]


def test_nothing_that_happens_to_jobs_or_askers_is_lost(slurm: Path, ask: Ask, tmp_path: Path) -> None:
    """A job's process is killed, a job cancelled, one requeued twice by its limit, the asker killed, the node's daemon restarted."""
    runs = tmp_path / "runs"
    basic = ask("table=four", "runtime.runs_per_device=2", runs="basic")
    assert basic.wait(400) == 0, text(basic)

    def trained() -> list[dict[str, Any]]:
        """Who trains runs of which there is a checkpoint, but for the long one, which has something else to go through."""
        found = [store.Run(path.parent) for path in runs.glob("*/weight*/checkpoint.pt")]
        return [run.holder() for run in found if run.state == "running"]

    first = ask("table=four", "hydra/launcher=submitit_slurm", *LIMITS)
    until(trained)
    os.kill(killed := trained()[0]["pid"], signal.SIGKILL)
    until(lambda: [one for one in trained() if one["pid"] != killed])
    subprocess.run(["scancel", trained()[0]["job"]], check=True)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert queue()  # its jobs go on
    for what in ("stop", "start"):
        subprocess.run([ROOT / "tests" / "slurm.sh", "slurmd", slurm, what], check=True, timeout=60)

    # SLURM warns a job of one minute within half of it, and may do so before its process listens, which ends it: it is asked for anew.
    for _ in range(5):
        second = ask("table=four", "hydra/launcher=submitit_slurm", *LIMITS)
        if second.wait(400) == 0:
            break
        assert "ended without a result (killed, or out of time or memory): ask again and they go on" in text(second)
    assert second.returncode == 0, text(second)
    assert same(endings(runs), endings(tmp_path / "basic")) and len(endings(runs)) == 4
    assert cells(text(second)) == cells(text(basic))

    requeued = [re.findall(r"Requeued job (\S+)", path.read_text()) for path in runs.glob(".submitit/*/*_log.*")]
    most = max(map(len, requeued))
    seconds = max((store.Run(path.parent).result() or {})["seconds"] for path in runs.glob("*/*/result.json"))
    assert most >= (2 if seconds > 65 else 1 if seconds > 35 else 0), (most, seconds)
    for path in runs.glob("*/*/train.log"):  # no epoch was made twice but the one that an end came into
        epochs = [int(epoch) for epoch in re.findall(r"^epoch (\d+)/", path.read_text(), re.MULTILINE)]
        assert len(epochs) == len(set(epochs)) and epochs == sorted(epochs) and epochs[-1] in (60, LONG)

    before = {path: path.stat().st_mtime_ns for path in runs.glob("*/*/result.json")}
    third = ask("table=four", "hydra/launcher=submitit_slurm", *LIMITS)
    assert third.wait(60) == 0 and "submitted" not in text(third) and cells(text(third)) == cells(text(basic))
    assert {path: path.stat().st_mtime_ns for path in runs.glob("*/*/result.json")} == before and not queue()


def test_two_askers_submit_once(slurm: Path, ask: Ask, tmp_path: Path) -> None:
    """Each run once, whoever asks; and what jobs cannot do is said, without waiting for ever."""
    both = [ask("table=tiny", "profile.test=100", "hydra/launcher=submitit_slurm") for _ in range(2)]
    bad = ask("table=missing", "hydra/launcher=submitit_slurm", runs="bad")
    refused = ask("table=missing", "hydra/launcher=submitit_slurm", "hydra.launcher.partition=nix", runs="refused")
    left = ask("table=missing", "hydra/launcher=submitit_slurm", "wait=false", runs="left")
    assert [process.wait(200) for process in both] == [0, 0], [text(process) for process in both]
    assert "".join(text(process) for process in both).count("6 runs are submitted") == 1
    assert cells(text(both[0])) == cells(text(both[1]))
    assert bad.wait(60) == 1 and re.search(r"retable: 1 of 1 runs failed or diverged: .*: dataset: kmnist is not under", text(bad))
    assert refused.wait(60) == 2 and re.search(r"^retable: hydra/launcher: .*invalid partition", text(refused), re.MULTILINE)
    assert left.wait(60) == 0 and "1 runs are submitted" in text(left) and "no run of 1 is done" in text(left)


def test_without_slurm(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = command("table=tiny", "hydra/launcher=submitit_slurm")
    assert code == 2 and err == 'retable: hydra/launcher: Could not detect "srun", are you indeed on a slurm cluster?\n'
