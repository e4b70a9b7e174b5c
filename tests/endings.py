"""What finished runs have come to, and ways to interrupt a run and to damage its checkpoint."""

from __future__ import annotations

import itertools
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tables import Command
from trainers import same as same

from experiments import fit, store, train

ROOT = Path(__file__).resolve().parent.parent
TRAIN: dict[str, Any] = {"task": train.train, "root": "config"}  # the command that trains a run, for `command`


def ending(path: Path) -> dict[str, Any]:
    """What a finished run has come to: all but the time that it took."""
    assert store.Run(path).state == "done"
    state = torch.load(path / "checkpoint.pt", weights_only=True)
    del state["seconds"]
    return state | {"metrics.csv": (path / "metrics.csv").read_text()}


def endings(runs: Path) -> dict[str, Any]:
    return {path.parent.name: ending(path.parent) for path in runs.glob("*/*/result.json")}


def epochs(path: Path) -> list[int]:
    """The epochs of the run's train.log. An epoch's line comes after its checkpoint: a kill in between leaves it out."""
    return [int(number) for number in re.findall(r"^epoch (\d+)/", (path / "train.log").read_text(), re.MULTILINE)]


def whole(run: store.Run) -> None:
    """Each file of the run that a reader would open can be read."""
    for row in run.metrics():
        assert {"step", "lr", "train/ce", "test/ce"} <= row.keys(), "a line of metrics.csv is not whole"
    if (path := run.path / "checkpoint.pt").exists():
        assert zipfile.ZipFile(path).testzip() is None, "checkpoint.pt is damaged"
        torch.load(path, weights_only=True)
    assert not (run.path / "result.json").exists() or run.state == "done", "result.json is none of a finished run"


def shown_once(path: Path) -> None:
    """TensorBoard shows each evaluation of the run once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path))
    events.Reload()
    rows = [(row["step"], pytest.approx(row["test/ce"], rel=1e-6)) for row in store.Run(path).metrics()]
    assert [(event.step, event.value) for event in events.Scalars("test/ce")] == rows


def interrupt(command: Command, last: int, runs: Path, *asked: str, **more: Any) -> None:
    """The command, interrupted after its `last`-th checkpoint, before the line in train.log."""
    plain, count = fit.checkpoint, itertools.count(1)

    def checkpoint(*given: Any) -> None:
        plain(*given)
        if next(count) == last:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "checkpoint", checkpoint)
        assert command(*asked, runs=runs, **more)[0] == 130
    assert [store.Run(path.parent).state for path in runs.glob("*/*/lock")].count("resumable") == 1


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flipped(path: Path) -> None:
    """Flips a bit of a weight, which only the checksum shows."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    data = bytearray(path.read_bytes())
    data[largest.header_offset + 1000] ^= 1
    path.write_bytes(data)
