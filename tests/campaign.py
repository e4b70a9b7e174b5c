"""A campaign of kill -9: a table's runs, hit at random moments a hundred times, end with the bits of runs that nothing disturbed.

    python -m tests.campaign --kills 100 --seed 1

Half of the kills hit who asks for the table (a third of the time two ask at once), half a process that trains. Who has ended is followed
by another at once; the runs of a killed one go on. Exit code 1 when anything was lost, trained twice, broken or left over. Linux only.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from experiments import store

sys.path.append(str(Path(__file__).parent))  # as pytest does
from test_resume import endings, same

ROOT = Path(__file__).resolve().parent.parent
SPEC = """
title: "Twelve runs"
base: [dataset=digits, dataset.train=100, batch_size=20, epochs={epochs}, "schedule.at=[{half}]"]
seeds: [1, 2, 3]
columns: {{ACC: {{metric: test/accuracy}}, CE: {{metric: test/ce, better: min, digits: 4}}}}
rows:
  - {{label: without, overrides: [method=vanilla]}}
  - {{label: with, against: without, overrides: [method=itdm_c], grid: {{method.itdm_c.weight: [0.2, 0.4, 0.6]}}}}
claims: [{{says: "it helps", metric: test/ce, of: [with], relation: "<"}}]
"""
RUNS = 12
EPOCHS_PER_KILL = 2.5  # so that there is something left to kill at the end
PATIENCE = 600  # seconds without anything to kill, or for the end: then it hangs


class Checker:
    """What must hold of a folder of runs, at any moment and at the end; as lines that say what does not."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        self.results: dict[str, tuple[bytes, int]] = {}

    def look(self) -> list[str]:
        """At any moment: finished results stay as they are, and every file that a reader would open is whole."""
        files = self.runs.glob("*/*/result.json")
        now = {path.parent.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
        wrong = [f"{name}: its result has {'changed' if name in now else 'gone'}" for name in self.results if now.get(name) != self.results[name]]
        self.results = now
        for path in self.runs.glob("*/*"):
            try:
                for row in store.Run(path).metrics():
                    assert {"step", "lr", "train/ce", "test/ce"} <= row.keys(), "a line of metrics.csv is not whole"
                if (path / "checkpoint.pt").exists():
                    assert zipfile.ZipFile(path / "checkpoint.pt").testzip() is None, "checkpoint.pt is damaged"
                    torch.load(path / "checkpoint.pt", weights_only=True)
                assert path.name not in now or store.Run(path).state == "done", "result.json cannot be read"
            except Exception as error:
                wrong.append(f"{path.name}: {error!r}")
        return wrong

    def end(self, reference: Path) -> list[str]:
        """At the end: all as in the reference, each epoch trained once, nothing left over."""
        wrong = self.look()
        expected = endings(reference)
        if wrong:
            return wrong  # it cannot be compared
        found = endings(self.runs)
        wrong += [f"{name}: not done" for name in expected.keys() - found.keys()]
        wrong += [f"{name}: other bits than the reference's" for name in found if not same(found[name], expected.get(name))]
        wrong += [f"{path}: left over" for path in self.runs.glob("*/*/.*")]
        for path in self.runs.glob("*/*/train.log"):
            # A checkpoint comes before its epoch's line: a kill in between leaves the line out, and nothing writes one twice.
            epochs = [int(number) for number in re.findall(r"^epoch (\d+)/", path.read_text(), re.MULTILINE)]
            wrong += [f"{path.parent.name}: epochs trained twice, {epochs}"] if epochs != sorted({*epochs}) else []
        return wrong


class Sweep:
    """The table asked for in a folder, by commands whose process, log and fate are kept, and all the processes that come of them."""

    def __init__(self, root: Path, name: str) -> None:
        self.root, self.runs = root, root / name
        self.mark = f"RETABLE_CAMPAIGN={uuid.uuid4().hex}"  # in the environment of all of them
        self.askers: list[tuple[subprocess.Popen[bytes], Path]] = []
        self.killed: set[int] = set()

    def ask(self) -> subprocess.Popen[bytes]:
        common = ["table=twelve", "runtime.threads=1", "runtime.device=cpu", "runtime.runs_per_device=2", "profile.test=100"]
        folders = [f"runtime.runs={self.runs}", f"runtime.data_dir={self.root}", f"out={self.root}/out"]
        words = [sys.executable, "-m", "experiments.table", "--config-dir", str(self.root / "extra"), *common, *folders]
        log = self.root / f"{self.runs.name}-{len(self.askers) + 1}.log"
        environment = os.environ | dict([self.mark.split("=")])
        with open(log, "wb") as out:
            process = subprocess.Popen(words, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
        self.askers.append((process, log))
        return process

    def alive(self) -> list[subprocess.Popen[bytes]]:
        return [process for process, _ in self.askers if process.poll() is None]

    def keep_asking(self, number: int, seconds: float) -> None:
        until = time.monotonic() + seconds
        while True:
            for _ in range(number - len(self.alive())):
                self.ask()
            if time.monotonic() > until:
                return
            time.sleep(0.02)

    def ours(self, pid: int) -> bool:
        with suppress(OSError):
            return self.mark.encode() in Path(f"/proc/{pid}/environ").read_bytes()
        return False

    def trainers(self) -> list[tuple[int, Path]]:
        """The processes that train, and their runs."""
        running = [run for run in map(store.Run, self.runs.glob("*/*")) if run.state == "running"]
        pids = [(int(run.holder().get("pid", 0)), run.path) for run in running]
        return [(pid, path) for pid, path in pids if pid and self.ours(pid)]

    def left(self, seconds: float) -> list[int]:
        """Our processes that are there after so many seconds; they are killed."""
        until = time.monotonic() + seconds
        while (pids := [*self._all()]) and time.monotonic() < until:
            time.sleep(0.1)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process, _ in self.askers:
            process.wait()
        return pids

    def _all(self) -> Iterator[int]:
        return (int(path.name) for path in Path("/proc").glob("[0-9]*") if self.ours(int(path.name)))

    def wrong(self, expected: str) -> list[str]:
        """Of the commands, which have ended: exit codes other than is right, and what their logs must not say."""
        lines = []
        for process, log in self.askers:
            text, code = log.read_text(), process.returncode
            right = {0: shown(text) == expected, 1: "ended without a result (killed" in text, -signal.SIGKILL: process.pid in self.killed}
            lines += [] if right.get(code) else [f"{log}: ended with {code}"]
            lines += [f"{log}: {word}" for word in ("Traceback", "cannot be read") if word in text]
        return lines


def shown(text: str) -> str:
    """Of a command's output the table, without the line of commits and minutes."""
    return "\n".join(line for line in text[text.find("## ") :].splitlines() if "minutes of training" not in line)


@dataclass
class Report:
    seed: int
    askers: int = 0
    trainers: int = 0
    interrupted: int = 0
    starts: int = 0
    finished: int = 0  # when the last kill fell
    seconds: dict[str, float] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join(
            [
                f"seed {self.seed}: {self.askers + self.trainers} kills, {self.askers} of who asks, {self.trainers} of processes that train",
                f"{self.interrupted} of these interrupted a run with a checkpoint; the table was asked for {self.starts} times",
                f"{self.finished} of {RUNS} runs were finished at the last kill; load {os.getloadavg()[0]:.1f} at the end",
                "seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in self.seconds.items()),
                *(self.wrong or ["all is well: nothing was lost, trained twice, broken or left over, and all bits are the reference's"]),
            ]
        )


def campaign(kills: int, seed: int, root: Path) -> Report:
    """In an empty folder: the reference, the kills, the last command, the checks."""
    chance, report = random.Random(seed), Report(seed)
    epochs = int(EPOCHS_PER_KILL * kills)
    (root / "extra" / "table").mkdir(parents=True)
    (root / "extra" / "table" / "twelve.yaml").write_text(SPEC.format(epochs=epochs, half=epochs // 2))
    reference, sweep = Sweep(root, "reference"), Sweep(root, "runs")
    checker, times = Checker(sweep.runs), [time.monotonic()]
    try:
        first = reference.ask()
        ...
    finally:
        ...
    return report
