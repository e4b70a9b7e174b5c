"""The campaign of kills, short; and what it would say of a store that has been damaged."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import campaign
import pytest
import torch
from test_resume import flipped, truncated

pytestmark = pytest.mark.usefixtures("untraced")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found by their environment, on Linux")
def test_ten_kills(tmp_path: Path) -> None:
    report, wrong = campaign.campaign(10, 1, tmp_path)
    assert wrong == []
    assert report["kills of askers"] == report["kills of trainers"] == 5
    assert report["of these at a run with a checkpoint"] >= 1  # else this test has tested little


@pytest.fixture
def store(tmp_path: Path) -> tuple[Path, Path]:
    """Folders of finished runs as far as the checks look, twice the same."""
    for number in range(campaign.RUNS):
        path = tmp_path / "reference" / "group" / f"run-{number:010x}"
        path.mkdir(parents=True)
        torch.save({"epoch": 2, "seconds": 1.0, "net": {"weight": torch.full((1000,), float(number))}}, path / "checkpoint.pt")
        (path / "metrics.csv").write_text("step,lr,train/ce,test/ce\n5.0,0.1,1.0,1.0\n10.0,0.1,0.5,0.5\n")
        (path / "train.log").write_text("epoch 1/2: fine\nepoch 2/2: fine\n")
        (path / "result.json").write_text('{"epochs": 2}\n')
    shutil.copytree(tmp_path / "reference", tmp_path / "runs")
    return tmp_path / "runs", tmp_path / "reference"


def weight(path: Path) -> None:
    """One weight, by the least that there is."""
    state = torch.load(path, weights_only=True)
    state["net"]["weight"][0] = torch.nextafter(state["net"]["weight"][0], torch.tensor(9.0))
    torch.save(state, path)


def said(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text)


AGAIN = "epoch 1/2: fine\nepoch 2/2: fine\nepoch 2/2: fine\n"
DAMAGE = {
    "none": (lambda path: None, "result.json", []),
    "result gone": (Path.unlink, "result.json", ["is another, or gone"]),
    "result written again": (lambda path: os.utime(path, ns=(0, 0)), "result.json", ["is another, or gone"]),
    "result of another": (said('{"epochs": 3}\n'), "result.json", ["is another, or gone"]),
    "result half written": (said('{"epo'), "result.json", ["is another, or gone", "none of a finished run"]),
    "checkpoint cut": (truncated, "checkpoint.pt", ["BadZipFile"]),
    "bit of a checkpoint": (flipped, "checkpoint.pt", ["checkpoint.pt is damaged"]),
    "metrics cut": (said("step,lr,train/ce,test/ce\n5.0,0.1,"), "metrics.csv", ["metrics.csv is not whole"]),
    "weight": (weight, "checkpoint.pt", ["other bits"]),
    "metrics": (said("step,lr,train/ce,test/ce\n5.0,0.1,1.0,1.0\n"), "metrics.csv", ["other bits"]),
    "an epoch again": (said(AGAIN), "train.log", ["epochs trained twice"]),
    "temporary file": (Path.touch, ".result.json.0", ["left over"]),
}


@pytest.mark.parametrize(("damage", "name", "lines"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_noticed(store: tuple[Path, Path], damage: Callable[[Path], object], name: str, lines: list[str]) -> None:
    runs, reference = store
    results: campaign.Results = {}
    assert campaign.look(runs, results) == []
    damage(runs / "group" / f"run-{3:010x}" / name)
    wrong = campaign.look(runs, results) or campaign.compare(runs, reference)
    assert len(wrong) == len(lines) and all(line in said for said, line in zip(wrong, lines, strict=True)), wrong


def test_a_run_that_is_not_done(store: tuple[Path, Path]) -> None:
    runs, reference = store
    (runs / "group" / f"run-{3:010x}" / "result.json").unlink()
    assert campaign.look(runs, {}) == [] and campaign.compare(runs, reference) == ["11 of 12 runs are done"]


def test_commands_that_go_wrong(tmp_path: Path) -> None:
    commands = campaign.Commands(tmp_path)
    table = "## Table\n0.5 minutes of training\n"
    ends = [(0, table), (0, "## Table\n0.7 minutes of training\n"), (0, "## Another\n"), (2, ""), (1, "why?"), (0, f"Traceback\n{table}")]
    for code, text in ends:
        log = tmp_path / f"{len(commands.logs)}.log"
        log.write_text(text)
        commands.logs[subprocess.Popen(["sh", "-c", f"exit {code}"])] = log
    said = [line.removeprefix(f"{tmp_path}/") for line in commands.wrong(kills=0)]
    assert said == ["2.log: ended with 0", "3.log: ended with 2", "4.log: ended with 1", "5.log: Traceback"]
    assert commands.wrong(kills=1)[0].startswith("the commands ended with [0, 0, 0, 2, 1, 0]: 1 were killed")
