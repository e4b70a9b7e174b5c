"""Interrupted runs: killed at any moment and asked for again, they end with the same bits; damaged checkpoints are noticed."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from nets import small

from experiments import cli, fit, store, train

pytestmark = pytest.mark.usefixtures("untraced")
ROOT = Path(__file__).resolve().parent.parent
TINY = ["dataset=digits", "dataset.train=100", "profile.test=100", "epochs=4", "schedule.at=[2]", "batch_size=20", "runtime.threads=1"]
SWEEP = ["-m", "method=[itdm_c],[itdm_c,label_smoothing]", "method.itdm_c.weight=0.2,0.6"]


def attempt(words: list[str], log: Path, slow: bool) -> None:
    """The command in a process of its own, its output in `log`; `slow` gives every file a long time in which it is half written."""
    with open(log, "a") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    if slow:
        plain = store.written

        class Slow(io.RawIOBase):
            def __init__(self, file: IO[bytes]) -> None:
                self.file = file

            def write(self, data: Any) -> int:
                time.sleep(0.001)
                done = self.file.write(data)
                self.file.flush()
                return done

            def flush(self) -> None:
                self.file.flush()

        @contextlib.contextmanager
        def written(path: Path) -> Iterator[Any]:
            with plain(path) as file:
                yield Slow(file)

        store.written = written
    sys.argv = ["retable", *words]
    cli.main(train.train, "config")


@pytest.fixture(scope="module")
def start() -> Callable[..., multiprocessing.Process]:
    """Start `attempt`. The processes are forked from one that has imported torch already: seconds saved at each of them."""
    context = multiprocessing.get_context("forkserver")
    modules = ["experiments.train", "experiments.trainer", "torch._dynamo", "torch.utils.tensorboard", "sklearn.datasets"]
    context.set_forkserver_preload(modules)

    def started(words: list[str], log: Path, slow: bool = False) -> Any:
        process = context.Process(target=attempt, args=(words, log, slow))
        process.start()
        return process

    return started


def same(one: Any, other: Any) -> bool:
    """Bit for bit, through dicts and lists."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def ending(path: Path) -> dict[str, Any]:
    """What a finished run has come to: all but the time that it took."""
    assert store.Run(path).state == "done"
    state = torch.load(path / "checkpoint.pt", weights_only=True)
    del state["seconds"]
    return state | {"metrics.csv": (path / "metrics.csv").read_text()}


def endings(runs: Path) -> dict[str, Any]:
    return {path.parent.name: ending(path.parent) for path in runs.glob("*/*/result.json")}


def whole(runs: Path) -> None:
    """Every file that a reader would open can be read."""
    for path in runs.glob("*/*"):
        run = store.Run(path)
        for row in run.metrics():
            assert {"step", "lr", "train/ce", "test/ce"} <= row.keys()
        if (path / "checkpoint.pt").exists():
            assert zipfile.ZipFile(path / "checkpoint.pt").testzip() is None
            assert torch.load(path / "checkpoint.pt", weights_only=True)["epoch"] in (1, 2, 3, 4)
        if (path / "result.json").exists():
            assert run.state == "done"


@pytest.mark.parametrize(("every", "kills"), [(1, 10), (2, 4)])
def test_kill_at_any_moment(start: Callable[..., Any], tmp_path: Path, every: int, kills: int) -> None:
    """The first kill once there is a whole checkpoint; then half of them while one is being written, half wherever it is.

    `every` > 1 leaves metrics ahead of the checkpoint.
    """
    chance = random.Random(every)
    options = [*SWEEP, *TINY, f"runtime.data_dir={tmp_path}", f"runtime.checkpoint_every={every}"]
    log, runs = tmp_path / "log", tmp_path / "runs"
    reference = start([*options, f"runtime.runs={tmp_path}/reference"], log)
    reference.join(300)
    assert reference.exitcode == 0, log.read_text()
    expected = endings(tmp_path / "reference")
    assert len(expected) == 4

    def seen(pattern: str) -> set[tuple[Path, int]]:
        with contextlib.suppress(FileNotFoundError):  # gone in the meantime
            return {(path, path.stat().st_mtime_ns) for path in runs.glob(f"*/*/{pattern}")}
        return set()

    def unfinished() -> bool:
        return any(not (path.parent / "result.json").exists() for path in runs.glob("*/*/checkpoint.pt"))

    killed = halves = resumable = 0
    for number in range(kills):
        before, halves_before = seen("train.log"), seen(".checkpoint.pt.*")
        process = start([*options, f"runtime.runs={runs}"], log, slow=True)
        while process.is_alive() and seen("train.log") <= before:
            time.sleep(0.002)
        while not number and process.is_alive() and not unfinished():
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.5) if number else 0)
        while number % 2 and process.is_alive() and seen(".checkpoint.pt.*") <= halves_before:
            time.sleep(0.002)
        process.kill()
        process.join(60)
        killed += process.exitcode == -signal.SIGKILL
        halves += bool(seen(".checkpoint.pt.*"))
        resumable += any(store.Run(path).state == "resumable" for path in runs.glob("*/*"))
        whole(runs)
    assert killed >= kills // 2 and halves >= 1 and resumable >= 1  # else this test has tested nothing

    last = start([*options, f"runtime.runs={runs}"], log)
    last.join(300)
    assert last.exitcode == 0, log.read_text()
    assert "retable:" not in log.read_text()
    assert same(endings(runs), expected)
    assert not any(runs.glob("*/*/.*"))


# With dropout, directions, learned offsets and groups of the optimizer: the whole of PER's protocol.
PER = ["method=[per,vcl]", "norm=none", "optim.bias_lr=0.1", "optim.clip=1", "optim.clip_each=true", "optim.nesterov=true"]
WITHOUT = [word for word in TINY[2:] if not word.startswith("schedule")]
KILLED = {
    # five steps an epoch, an odd number: LaMix goes by the steps of the run
    "net2c": ([*TINY, "method=[itdm_c,puzzlemix,lamix,cutmix,mixup]"], 30),
    "resnet18": ([*TINY[2:], *small("resnet18"), "method=itdm_c"], 4),
    "cnn11": ([*TINY[2:], *small("cnn11"), *PER], 4),
    "lstm": ([*WITHOUT, *small("lstm"), "method=per", "schedule=plateau", "optim.lr=5", "optim.clip=0.25"], 30),
}


@pytest.mark.parametrize(("words", "epochs"), KILLED.values(), ids=KILLED)
def test_kill_of_the_real_command(tmp_path: Path, start: Callable[..., Any], words: list[str], epochs: int) -> None:
    options = [*words, f"epochs={epochs}", f"runtime.data_dir={tmp_path}"]
    reference = start([*options, f"runtime.runs={tmp_path}/reference"], tmp_path / "log")
    runs = tmp_path / "runs"
    words = [sys.executable, "-m", "experiments.train", *options, f"runtime.runs={runs}"]
    first = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while not any(runs.glob("*/*/checkpoint.pt")) and time.monotonic() < deadline:
        time.sleep(0.002)
    first.kill()
    first.communicate()
    assert first.returncode == -signal.SIGKILL
    (path,) = runs.glob("*/*")
    assert store.Run(path).state == "resumable"
    second = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (second.returncode, second.stderr) == (0, "")
    reference.join(120)
    assert same(endings(runs), endings(tmp_path / "reference"))


# checkpoints that cannot be read


@pytest.fixture(scope="module")
def halfway(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    """A finished run, the same one interrupted after two of its four epochs, and their overrides."""
    root = tmp_path_factory.mktemp("halfway")
    words = [*TINY, "method=itdm_c", f"runtime.data_dir={root}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYDRA_FULL_ERROR", "0")
        patch.setattr(sys, "argv", ["retable", *words, f"runtime.runs={root}/done"])
        cli.main(train.train, "config")

        def interrupted(run: store.Run, trainer: Any, *more: Any) -> None:
            plain(run, trainer, *more)
            if trainer.epoch == 2:
                raise KeyboardInterrupt

        plain = fit.checkpoint
        patch.setattr(fit, "checkpoint", interrupted)
        patch.setattr(sys, "argv", ["retable", *words, f"runtime.runs={root}/half"])
        with pytest.raises(SystemExit) as end:
            cli.main(train.train, "config")
        assert end.value.code == 130
    (done,), (half,) = (root / "done").glob("*/*"), (root / "half").glob("*/*")
    assert store.Run(half).state == "resumable"
    assert torch.load(half / "checkpoint.pt", weights_only=True)["epoch"] == 2
    return done, half, words


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flipped(path: Path) -> None:
    """One bit of a weight: only its checksum tells."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    with open(path, "r+b") as file:
        file.seek(largest.header_offset + 1000)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def garbage(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(10000))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def incomplete(path: Path) -> None:
    """The network's weights are there, and loaded, before it shows that the generators are not."""
    state = torch.load(path, weights_only=True)
    del state["rngs"]
    torch.save(state, path)


def hostile(path: Path) -> None:
    """A pickle that would call a function."""

    class Call:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(path.parent / "called"),)

    torch.save({"epoch": Call()}, path)


@pytest.mark.parametrize("damage", [truncated, flipped, garbage, empty, incomplete, hostile, None])
def test_damaged_checkpoint(
    halfway: tuple[Path, Path, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None] | None,
) -> None:
    done, half, words = halfway
    path = tmp_path / "runs" / half.parent.name / half.name
    shutil.copytree(half, path)
    if damage is not None:
        damage(path / "checkpoint.pt")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "argv", ["retable", *words, f"runtime.runs={tmp_path}/runs"])
    cli.main(train.train, "config")
    err = capsys.readouterr().err
    if damage is None:
        assert err == ""
    else:
        assert err.startswith(f"retable: {path}/checkpoint.pt cannot be read (") and err.endswith("; the run starts again\n")
        assert err.count("\n") == 1
    epochs = [line.split(":")[0] for line in (path / "train.log").read_text().splitlines()]
    again = [1, 2, 3, 4] if damage is not None else [3, 4]
    assert epochs == [f"epoch {number}/4" for number in [1, *again]]  # the interruption came before the second epoch's line
    assert same(ending(path), ending(done))
    assert not (path / "called").exists()


def test_a_finished_run_needs_no_checkpoint(
    halfway: tuple[Path, Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done, _, words = halfway
    path = tmp_path / "runs" / done.parent.name / done.name
    shutil.copytree(done, path)
    garbage(path / "checkpoint.pt")
    before = {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in path.iterdir()}
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "argv", ["retable", *words, f"runtime.runs={tmp_path}/runs"])
    cli.main(train.train, "config")
    out, err = capsys.readouterr()
    assert (out.startswith(f"{path}: done before, "), err) == (True, "")
    assert {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in path.iterdir()} == before


def test_events_are_not_doubled(halfway: tuple[Path, Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard shows each evaluation of a resumed run once, with the value of metrics.csv."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, half, words = halfway
    path = tmp_path / "runs" / half.parent.name / half.name
    shutil.copytree(half, path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "argv", ["retable", *words, f"runtime.runs={tmp_path}/runs"])
    cli.main(train.train, "config")
    events = EventAccumulator(str(path))
    events.Reload()
    rows = store.Run(path).metrics()
    assert [event.step for event in events.Scalars("test/ce")] == [row["step"] for row in rows] == [5, 10, 15, 20]
    assert [event.value for event in events.Scalars("test/ce")] == pytest.approx([row["test/ce"] for row in rows], rel=1e-6)
