"""A real SLURM with a node (tests/slurm.sh): what happens to jobs and to who asks for them, and that the numbers are the same."""

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
from endings import ROOT, endings, epochs, same
from tables import Command, words

from experiments import store
from experiments.launching.slurm import listed

pytestmark = [pytest.mark.usefixtures("untraced"), pytest.mark.slow]
EPOCHS, LONG = 60, 120
SECONDS = 900  # a command that takes longer hangs
TABLE = f"""
title: "Four runs"
base: [dataset=digits, dataset.train=200, "schedule.at=[20]", batch_size=20, epochs={EPOCHS}]
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
SLURM = "hydra/launcher=submitit_slurm"


@pytest.fixture(scope="module")
def slurm() -> Iterator[Path]:
    """A running SLURM; its folder has a short name, for sockets."""
    turn = Path(tempfile.gettempdir()) / "retable-slurm.lock"  # of the workers that run tests: SLURMs share a munged
    while (lock := store.locked(turn)) is None:
        time.sleep(1)
    folder = Path(tempfile.mkdtemp(prefix="slurm"))
    with lock, pytest.MonkeyPatch.context() as patch:
        try:
            started = subprocess.run([ROOT / "tests" / "slurm.sh", "start", folder], capture_output=True, text=True, timeout=120)
            if started.returncode == 77:
                pytest.skip(started.stderr.strip())
            assert started.returncode == 0, started.stderr
            patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
            yield folder
            subprocess.run([ROOT / "tests" / "slurm.sh", "stop", folder], check=True, timeout=120)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def ask(tmp_path: Path, extra: Path) -> Iterator[Callable[..., Any]]:
    """Starts a command that asks for a table, in a process group of its own."""
    (extra / "table" / "four.yaml").write_text(TABLE)
    (extra / "table" / "missing.yaml").write_text(MISSING)
    started: list[subprocess.Popen[str]] = []

    def asked(*more: str, runs: str = "runs") -> subprocess.Popen[str]:
        line = [sys.executable, "-m", "experiments.table", *words(tmp_path, tmp_path / runs), f"out={tmp_path}/out", *more]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        started.append(subprocess.Popen(line, cwd=ROOT, text=True, start_new_session=True, **pipes))
        return started[-1]

    yield asked
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def ended(process: subprocess.Popen[str]) -> tuple[int, str, list[str]]:
    """Waits for the command: its exit code, its output, and the table's lines in it."""
    out, _ = process.communicate(timeout=SECONDS)
    return process.returncode, out, [line for line in out.splitlines() if line.startswith("|")]


def until(what: Callable[[], Any]) -> Any:
    """Waits for a true value, and returns it."""
    deadline = time.monotonic() + SECONDS
    while not (value := what()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return value


def test_nothing_that_happens_to_jobs_or_askers_is_lost(slurm: Path, ask: Callable[..., Any], tmp_path: Path) -> None:
    """SLURM's warning, as before a time limit; a job's process killed, a job cancelled, the asker killed, the node's daemon restarted."""
    runs = tmp_path / "runs"
    basic = ask("table=four", "runtime.runs_per_device=2", runs="basic")

    def trained(method: str = "*") -> list[tuple[str, int]]:
        """The job and the process of runs that are trained and have a checkpoint."""
        jobs = listed(runs)
        found = [(path.parent.name[-10:], store.Run(path.parent)) for path in runs.glob(f"*-{method}/*/checkpoint.pt")]
        return [(jobs[identity].id, run.holder()["pid"]) for identity, run in found if run.state == "running" and identity in jobs]

    def requeued() -> bool:
        return any("Requeued job" in path.read_text() for path in runs.glob(".submitit/*/*_log.*"))

    first = ask("table=four", SLURM)
    ((job, _),) = until(lambda: trained("vanilla"))
    warn = ["scancel", "--signal=USR2", job]
    until(lambda: not subprocess.run(warn).returncode or requeued())  # "can not be altered now" while the job starts
    until(requeued)
    (_, killed), *_ = until(trained)
    os.kill(killed, signal.SIGKILL)
    job, *_ = until(lambda: [job for job, process in trained() if process != killed])
    subprocess.run(["scancel", job], check=True)
    os.killpg(first.pid, signal.SIGKILL)  # its jobs go on
    ended(first)
    for what in ("stop", "start"):
        subprocess.run([ROOT / "tests" / "slurm.sh", "slurmd", slurm, what], check=True, timeout=60)

    code, out, lines = ended(ask("table=four", SLURM))
    assert code == 0, out
    code, out, expected = ended(basic)
    assert code == 0 and lines == expected, out
    assert same(endings(runs), endings(tmp_path / "basic")) and len(endings(runs)) == 4
    for path in runs.glob("*/*/train.log"):  # no epoch was trained twice
        made = epochs(path.parent)
        assert made == sorted({*made}) and made[-1] in (EPOCHS, LONG)

    before = {path: path.stat().st_mtime_ns for path in runs.glob("*/*/result.json")}
    code, out, lines = ended(ask("table=four", SLURM))
    assert code == 0 and "submitted" not in out and lines == expected
    assert {path: path.stat().st_mtime_ns for path in runs.glob("*/*/result.json")} == before
    assert subprocess.run(["squeue", "-h", "-r"], capture_output=True, check=True).stdout == b""


def test_two_askers_submit_once(slurm: Path, ask: Callable[..., Any]) -> None:
    """Each run once, whoever asks; and what jobs cannot do is said, without waiting for ever."""
    two = [ask("table=tiny", SLURM) for _ in range(2)]
    bad = ask("table=missing", SLURM, runs="bad")
    refused = ask("table=missing", SLURM, "hydra.launcher.partition=nix", runs="refused")
    left = ask("table=missing", SLURM, "wait=false", runs="left")
    (code, out, lines), second = ended(two[0]), ended(two[1])
    assert (code, second[0]) == (0, 0) and lines == second[2] and (out + second[1]).count("6 runs are submitted") == 1, out + second[1]
    code, out, _ = ended(bad)
    assert code == 1 and re.search(r"retable: 1 of 1 runs failed or diverged: .*: dataset: kmnist is not under", out)
    code, out, _ = ended(refused)
    assert code == 2 and re.search(r"^retable: hydra/launcher: .*invalid partition", out, re.MULTILINE)
    code, out, _ = ended(left)
    assert code == 0 and "1 runs are submitted" in out and "no run of 1 is done" in out


def test_without_slurm(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = command("table=tiny", SLURM)
    assert code == 2 and err == 'retable: hydra/launcher: Could not detect "srun", are you indeed on a slurm cluster?\n'
