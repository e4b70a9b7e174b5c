"""Runs that are killed continue to the same bits; a checkpoint that cannot be read is reported, and its run starts again."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import campaign
import pytest
import torch
from endings import TRAIN, ending, endings, epochs, flipped, interrupt, same, shown_once, truncated, whole
from tables import Command, words

from experiments import cli, store, train

pytestmark = pytest.mark.usefixtures("untraced")
RUN = ["dataset=digits", "dataset.train=100", "epochs=4", "schedule.at=[2]", "batch_size=20"]
SWEEP = [*RUN, "method=[itdm_c],[itdm_c,puzzlemix,lamix,cutmix,mixup]", "method.itdm_c.weight=0.2,0.6"]
# (file, n, every): the process is killed when the n-th file of this name is half written. Checkpoints are `every` epochs apart; with two
# the metrics are ahead of the checkpoint.
KILLS = [
    *[("config.yaml", 1, 1), ("checkpoint.pt", 1, 1), ("progress.json", 2, 1), ("checkpoint.pt", 2, 1), ("metrics.csv", 2, 2)],
    *[("result.json", 1, 1), ("metrics.csv", 4, 2), ("checkpoint.pt", 2, 2), ("result.json", 1, 1)],
]


def attempt(line: list[str], name: str, turn: int) -> None:
    """The command in a process that kills itself."""
    plain, count = store.written, itertools.count(1)

    @contextlib.contextmanager
    def written(path: Path) -> Iterator[Any]:
        with plain(path) as file:
            yield file
            if path.name == name and next(count) == turn:
                file.flush()
                os.truncate(file.fileno(), file.tell() // 2)
                os.kill(os.getpid(), signal.SIGKILL)

    store.written = written
    sys.argv = ["retable", "-m", *line]
    cli.main(train.train, "config")


@pytest.mark.slow
def test_a_kill_at_any_file(command: Command, tmp_path: Path) -> None:
    runs, reference = tmp_path / "runs", tmp_path / "reference"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["experiments.trainer", "torch._dynamo", "torch.utils.tensorboard", "sklearn.datasets"])
    states = set()
    for name, turn, every in KILLS:
        line = [*words(tmp_path, runs), *SWEEP, f"runtime.checkpoint_every={every}"]
        process = context.Process(target=attempt, args=(line, name, turn))
        process.start()
        process.join(300)
        assert process.exitcode == -signal.SIGKILL, name
        assert any(runs.glob(f"*/*/.{name}.*")), name
        for run in map(store.Run, runs.glob("*/*")):
            whole(run)
            states.add(run.state)
    assert states == {"missing", "resumable", "done"}
    assert command("-m", *SWEEP, runs=reference, **TRAIN)[::2] == command("-m", *SWEEP, **TRAIN)[::2] == (0, "")
    assert len(endings(reference)) == 4 and same(endings(runs), endings(reference))
    assert not any(runs.glob("*/*/.*"))


def writes(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text)


def incomplete(path: Path) -> None:
    """The weights of the network are there, and are loaded, before it shows that the generators are not."""
    state = torch.load(path, weights_only=True)
    del state["rngs"]
    torch.save(state, path)


def hostile(path: Path) -> None:
    """A pickle that would call a function."""

    class Call:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(path.parent / "called"),)

    torch.save({"epoch": Call()}, path)


def test_a_checkpoint(command: Command, tmp_path: Path) -> None:
    """An interrupted run continues from its checkpoint, or starts again if that is damaged; a finished run does not read it."""
    line = [*RUN, "method=itdm_c"]
    assert command(*line, **TRAIN)[0] == 0
    interrupt(command, 2, tmp_path / "half", *line, **TRAIN)
    (done,), (half,) = tmp_path.glob("runs/*/*"), tmp_path.glob("half/*/*")
    for damage in (None, truncated, flipped, writes("garbage"), incomplete, hostile):
        path = tmp_path / "again" / half.parent.name / half.name
        shutil.copytree(half, path)
        if damage:
            damage(path / "checkpoint.pt")
        code, _, err = command(*line, runs=tmp_path / "again", **TRAIN)
        assert code == 0 and err.count("\n") == bool(damage), damage
        if damage:
            assert err.startswith(f"retable: {path}/checkpoint.pt cannot be read (") and err.endswith("; the run starts again\n")
        assert epochs(path) == ([1, 1, 2, 3, 4] if damage else [1, 3, 4])
        assert same(ending(path), ending(done)) and not (path / "called").exists()
        shown_once(path)
        shutil.rmtree(tmp_path / "again")

    truncated(done / "checkpoint.pt")
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in done.iterdir()}
    code, out, err = command(*line, **TRAIN)
    assert (code, out.startswith(f"{done}: done before, "), err) == (0, True, "")
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in done.iterdir()} == before


# tests/campaign.py


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found by their environment, on Linux")
def test_five_kills(tmp_path: Path) -> None:
    report, wrong = campaign.campaign(5, 1, tmp_path)
    assert wrong == []
    assert {report["kills of askers"], report["kills of trainers"]} == {2, 3}
    assert report["of these at a run with a checkpoint"] >= 1  # else this test has tested little


def weight(path: Path) -> None:
    """Changes a weight, by the least that is possible."""
    state = torch.load(path, weights_only=True)
    state["net"]["weight"][0] = torch.nextafter(state["net"]["weight"][0], torch.tensor(9.0))
    torch.save(state, path)


DAMAGE: list[tuple[Callable[[Path], object], str, str]] = [
    (Path.unlink, "result.json", "is another, or gone"),
    (writes('{"epochs": 3}\n'), "result.json", "is another, or gone"),
    (truncated, "checkpoint.pt", "BadZipFile"),
    (flipped, "checkpoint.pt", "checkpoint.pt is damaged"),
    (writes("step,lr,train/ce,test/ce\n5.0,0.1,"), "metrics.csv", "metrics.csv is not whole"),
    (weight, "checkpoint.pt", "other bits"),
    (writes("epoch 1/2: fine\nepoch 2/2: fine\nepoch 2/2: fine\n"), "train.log", "epochs trained twice"),
    (Path.touch, ".result.json.0", "left over"),
]


def test_damage_is_noticed(tmp_path: Path) -> None:
    for number in range(campaign.RUNS):
        path = tmp_path / "reference" / "group" / f"run-{number:010x}"
        path.mkdir(parents=True)
        torch.save({"epoch": 2, "seconds": 1.0, "net": {"weight": torch.full((1000,), float(number))}}, path / "checkpoint.pt")
        (path / "metrics.csv").write_text("step,lr,train/ce,test/ce\n5.0,0.1,1.0,1.0\n10.0,0.1,0.5,0.5\n")
        (path / "train.log").write_text("epoch 1/2: fine\nepoch 2/2: fine\n")
        (path / "result.json").write_text('{"epochs": 2}\n')
    for number, (damage, name, line) in enumerate(DAMAGE):
        runs, results = tmp_path / f"runs{number}", campaign.Results()
        shutil.copytree(tmp_path / "reference", runs)
        assert campaign.look(runs, results) == campaign.compare(runs, tmp_path / "reference") == []
        damage(runs / "group" / f"run-{3:010x}" / name)
        wrong = campaign.look(runs, results) or campaign.compare(runs, tmp_path / "reference")
        assert len(wrong) == 1 and line in wrong[0], wrong
