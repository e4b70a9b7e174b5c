"""The index of finished runs: what the folders say, whatever has happened to it or to them; and ten thousand runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments import cost, index, store
from experiments.cli import CONF
from experiments.index import finished, kind

ROOT = Path(__file__).resolve().parent.parent
FACTS = {"seconds": 12.0, "epochs": 4, "steps": 40, "device": "a device"}


@pytest.fixture(scope="module")
def config() -> str:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_yaml(compose("config", ["method=itdm_c", "optim.lr=1e-5"]), resolve=True)


def stored(root: Path, number: int, config: str, **facts: object) -> store.Run:
    run = store.Run(root / f"group-{number % 7}" / f"run-{number:010x}")
    run.path.mkdir(parents=True)
    run.write("config.yaml", config)
    run.write("result.json", json.dumps(FACTS | facts))
    return run


def seen(root: Path) -> dict[str, float]:
    found = finished(root)
    return dict(zip(found["id"], found["seconds"], strict=True))


def test_it_follows_the_folders(tmp_path: Path, config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """New runs, changed ones, removed ones, renamed ones; and only those are read."""
    runs = [stored(tmp_path, number, config, seconds=float(number)) for number in range(3)]
    assert seen(tmp_path) == {f"{number:010x}": number for number in range(3)}
    read = []
    plain = index._facts
    monkeypatch.setattr(index, "_facts", lambda path: read.append(path) or plain(path))
    assert len(seen(tmp_path)) == 3 and read == []

    (runs[0].path / "result.json").write_text(json.dumps(FACTS | {"seconds": 77.5}))
    shutil.rmtree(runs[1].path)
    runs[2].path.rename(tmp_path / "moved-0000000002")  # no run's place
    new = stored(tmp_path, 9, config)
    assert seen(tmp_path) == {"0000000000": 77.5, "0000000009": 12.0}
    assert read == [runs[0].path, new.path]
    assert len(pd.read_parquet(tmp_path / index.FILE)) == 2


@pytest.mark.parametrize("damage", [b"", b"PAR1 no", None])
def test_a_damaged_index_is_made_anew(tmp_path: Path, config: str, damage: bytes | None) -> None:
    stored(tmp_path, 1, config)
    expected = finished(tmp_path)
    if damage is None:  # that of another version
        pd.DataFrame({"id": ["x"]}).to_parquet(tmp_path / index.FILE)
    else:
        (tmp_path / index.FILE).write_bytes(damage)
    pd.testing.assert_frame_equal(finished(tmp_path), expected)
    assert len(pd.read_parquet(tmp_path / index.FILE)) == 1


def test_an_index_that_cannot_be_written_is_done_without(tmp_path: Path, config: str) -> None:
    stored(tmp_path, 1, config)
    (tmp_path / index.FILE).mkdir()
    assert seen(tmp_path) == {"0000000001": 12.0}
    assert not list(tmp_path.glob(".*.*.*"))  # nor is half of it left


def test_runs_that_cannot_be_read(tmp_path: Path, config: str) -> None:
    """Half a result is none; without its config a run tells no cost; a diverged one is no example of it."""
    (stored(tmp_path, 1, config).path / "result.json").write_text("{")
    (stored(tmp_path, 2, config).path / "config.yaml").unlink()
    stored(tmp_path, 3, config, diverged="train/ce is nan")
    (tmp_path / "group-4" / "run-0000000004").mkdir(parents=True)  # not finished
    found = finished(tmp_path).set_index("id")
    assert {*found.index} == {"0000000002", "0000000003"} and found["diverged"].tolist() == ["", "train/ce is nan"]
    assert cost.stored(tmp_path) == {}
    assert finished(tmp_path / "nowhere").empty


def test_costs_are_those_of_the_run_that_ended_last(tmp_path: Path, config: str) -> None:
    for number, (seconds, ended) in enumerate([(40.0, 1000), (8.0, 3000), (20.0, 2000)]):
        run = stored(tmp_path, number, config, seconds=seconds)
        os.utime(run.path / "result.json", (ended, ended))
    (estimate,) = cost.stored(tmp_path).values()
    assert (estimate.epoch, estimate.steps, estimate.source) == (2.0, 10.0, "a stored run, a device")


def test_a_stored_config_is_of_the_kind_that_it_was_composed_as(config: str) -> None:
    cfg = OmegaConf.create(config)
    assert kind(cfg) == kind(yaml.load(config, yaml.CSafeLoader))
    for key, value in {"seed": 5, "optim.lr": 1.0, "method.itdm_c.weight": 0.7, "epochs": 3}.items():
        other = cfg.copy()
        OmegaConf.update(other, key, value)
        assert kind(other) == kind(cfg)
    for key, value in {"batch_size": 5, "method.itdm_c.weight": 0, "precision": "bf16", "evaluate.every": 5, "profile.steps": 3}.items():
        other = cfg.copy()
        OmegaConf.update(other, key, value)
        assert kind(other) != kind(cfg), key


MEASURED = """
import re, sys
from experiments import cli, {module}
sys.argv = ["retable", *{words}]
cli.main({module}.run, "{root}")
print("peak", int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024, "torch" in sys.modules)
"""


@pytest.mark.usefixtures("untraced")
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize(("module", "root", "more"), [("table", "tables", ["table=demo", "launch=false"]), ("status", "status", [])])
def test_looking_at_many_runs_takes_little_memory(tmp_path: Path, config: str, module: str, root: str, more: list[str]) -> None:
    """And no torch. The seconds are for a quiet machine: not a test."""
    for number in range(1000):
        stored(tmp_path, number, config)
    words = [*more, f"runtime.runs={tmp_path}", *([f"out={tmp_path}/out"] if module == "table" else [])]
    code = MEASURED.format(module=module, root=root, words=words)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    _, peak, torch = done.stdout.splitlines()[-1].split()
    assert int(peak) < 500 and torch == "False"
