"""A campaign of kill -9: a table's runs, hit at random moments a hundred times, end with the bits of runs that nothing disturbed.

    python -m tests.campaign --kills 100 --seed 1

Half of the kills hit who asks for the table, half a process that trains; a third of the time two ask at once. Who has ended is followed by
another at once; the runs of a killed one go on. Exit code 1 when anything is lost, trained twice, broken or left over. For Linux.
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
from collections import Counter
from contextlib import suppress
from pathlib import Path

from experiments import store

sys.path.append(str(Path(__file__).parent))  # as pytest does
from endings import ROOT, endings, epochs, same, whole
from tables import SPEC, words

RUNS, EPOCHS_PER_KILL = 12, 2
PATIENCE = 600  # seconds: nothing to kill for so long, or no end of a command, is a hang
Results = dict[str, tuple[bytes, int]]  # each run's result.json, and when it was written


def look(runs: Path, results: Results) -> list[str]:
    """What is wrong at any moment: a result that was seen before has changed or gone, a file that a reader would open is not whole."""
    now = {path.parent.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in runs.glob("*/*/result.json")}
    wrong = [f"{name}: its result is another, or gone" for name, result in results.items() if now.get(name) != result]
    results |= now
    for path in runs.glob("*/*"):
        try:
            whole(store.Run(path))
        except Exception as error:
            wrong.append(f"{path.name}: {error!r}")
    return wrong


def compare(runs: Path, reference: Path) -> list[str]:
    """What is wrong at the end: not all done, other bits than the reference's, an epoch trained twice, temporary files."""
    expected, found = endings(reference), endings(runs)
    wrong = [f"{len(each)} of {RUNS} runs are done" for each in (expected, found) if len(each) != RUNS]
    wrong += [f"{name}: other bits than the reference's" for name in found if not same(found[name], expected.get(name))]
    wrong += [f"{path}: left over" for path in runs.glob("*/*/.*")]
    for path in runs.glob("*/*/train.log"):
        made = epochs(path.parent)
        wrong += [] if made == sorted({*made}) else [f"{path.parent.name}: epochs trained twice, of {made}"]
    return wrong


class Commands:
    """The commands that ask for the table, and all processes that come of them: known by their folder of temporary files."""

    def __init__(self, root: Path, length: int) -> None:
        self.root = root
        (root / "extra" / "table").mkdir(parents=True)
        (root / "extra" / "table" / "tiny.yaml").write_text(SPEC)
        self.table = ["table=tiny", "table.seeds=[1,2,3,4]", "batch_size=20", f"epochs={length}", f"out={root}/out"]
        self.scratch = tempfile.TemporaryDirectory(prefix="retable-", ignore_cleanup_errors=True)
        self.logs: dict[subprocess.Popen[bytes], Path] = {}

    def ask(self, runs: Path) -> subprocess.Popen[bytes]:
        line = [sys.executable, "-m", "experiments.table", *words(self.root, runs), *self.table, "runtime.runs_per_device=2"]
        log, env = self.root / f"{len(self.logs)}.log", os.environ | {"TMPDIR": self.scratch.name}
        with open(log, "wb") as out:
            process = subprocess.Popen(line, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT)
        self.logs[process] = log
        return process

    def asking(self) -> list[subprocess.Popen[bytes]]:
        return [process for process in self.logs if process.poll() is None]

    def ours(self, pid: int | str) -> bool:
        with suppress(OSError):  # it has ended
            return f"TMPDIR={self.scratch.name}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes()
        return False

    def kill(self, kind: str, runs: Path, chance: random.Random) -> Path | None:
        """A process of this kind; returns the folder that it wrote to. None if there was none."""
        found = [(process.pid, runs) for process in self.asking()]
        if kind == "trainers":
            found = [(run.holder().get("pid", 0), run.path) for run in map(store.Run, runs.glob("*/*")) if run.state == "running"]
        with suppress(ProcessLookupError, IndexError):
            pid, path = chance.choice([(pid, path) for pid, path in found if self.ours(pid)])
            os.kill(pid, signal.SIGKILL)
            while self.ours(pid):
                time.sleep(0.001)
            return path
        return None

    def end(self, seconds: float) -> list[str]:
        """Waits so long for all processes to be gone; kills what is left, and says so."""
        until = time.monotonic() + seconds
        while (left := [path.name for path in Path("/proc").glob("[0-9]*") if self.ours(path.name)]) and time.monotonic() < until:
            time.sleep(0.1)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        return [f"process {pid} was left over" for pid in left]

    def wrong(self, kills: int) -> list[str]:
        """Codes that are not right, tables that are not the first command's, and what must not be in a log."""
        codes, texts = [process.wait() for process in self.logs], [log.read_text() for log in self.logs.values()]
        tables = [re.sub(".*minutes of training\n", "", text[text.find("## ") :]) for text in texts]
        good = codes[0] == codes[-1] == 0 and codes.count(-signal.SIGKILL) == kills
        lines = [] if good else [f"the commands ended with {codes}: {kills} were killed, but neither the first nor the last"]
        for code, text, table, log in zip(codes, texts, tables, self.logs.values(), strict=True):
            right = {0: table == tables[0], 1: "ended without a result (killed" in text, -signal.SIGKILL: True}
            lines += [] if right.get(code) else [f"{log}: ended with {code}"]
            lines += [f"{log}: {word}" for word in ("Traceback", "cannot be read") if word in text]
        return lines


def campaign(kills: int, seed: int, root: Path) -> tuple[Counter[str], list[str]]:
    """In an empty folder: the reference, the kills, the last command, the checks. What to report, and what is wrong."""
    chance, commands, runs, reference = random.Random(seed), Commands(root, EPOCHS_PER_KILL * kills), root / "runs", root / "reference"
    results, report, wrong, began = Results(), Counter[str](), list[str](), time.monotonic()
    kinds = chance.sample((["askers", "trainers"] * kills)[:kills], kills)
    try:
        first = commands.ask(reference)
        while first.poll() is None and not any(reference.glob("*/*/checkpoint.pt")):
            time.sleep(0.01)
        pause = (time.monotonic() - began) / 3  # of what it takes until a command trains
        first.wait(PATIENCE)
        askers, latest = 1, time.monotonic()
        while kinds and not wrong:
            # The fewer runs are left, the sooner: all kills are to come before the end.
            until = time.monotonic() + chance.uniform(0, 2 * pause) * (1 - len(results) / RUNS) ** 2
            while time.monotonic() < until or len(commands.asking()) < askers:
                for _ in range(askers - len(commands.asking())):
                    commands.ask(runs)
                time.sleep(0.02)
            if path := commands.kill(kinds[-1], runs, chance):
                report[f"kills of {kinds.pop()}"] += 1
                report["of these at a run with a checkpoint"] += (path / "checkpoint.pt").exists() and not (path / "result.json").exists()
                askers, latest = chance.choice([1, 1, 2]), time.monotonic()
            wrong += look(runs, results)
            if kinds and (len(results) == RUNS or time.monotonic() > latest + PATIENCE):
                wrong.append(f"nothing is left to kill, or it hangs: {len(results)} of {RUNS} runs are done")
        commands.ask(runs)
        for process in commands.asking():  # the last, and those who wait for the same runs
            process.wait(PATIENCE)
        wrong += commands.end(30) + commands.wrong(report["kills of askers"])
        wrong += look(runs, results) or compare(runs, reference)
    except subprocess.TimeoutExpired as error:
        wrong.append(f"no end after {PATIENCE} s: {error.cmd}")
    finally:
        while commands.end(0):  # one may have started another
            pass
        commands.scratch.cleanup()
    report["seconds"] = round(time.monotonic() - began)
    return report, wrong


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.campaign")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that then, too, no process stays
    given, root = parser.parse_args(), Path(tempfile.mkdtemp(prefix="retable-campaign-"))
    report, wrong = campaign(given.kills, given.seed, root)
    print(*(f"{name}: {report[name]}" for name in sorted(report)), sep="\n")
    if wrong:
        sys.exit("\n".join([*(f"WRONG: {line}" for line in wrong), f"the files are in {root}"]))
    shutil.rmtree(root)
    print(f"all is well: {RUNS} of {RUNS} runs have the reference's bits; nothing was lost, trained twice, broken or left over")


if __name__ == "__main__":
    main()
