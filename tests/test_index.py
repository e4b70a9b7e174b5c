"""Tests of the index of finished runs: what it says when folders, or the index itself, have changed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments import cost, index, store
from experiments.cli import CONF
from experiments.index import finished, kind

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


def seconds(root: Path) -> dict[str, float]:
    found = finished(root)
    return dict(zip(found["id"], found["seconds"], strict=True))


def test_it_follows_the_folders(tmp_path: Path, config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """New, changed, removed and renamed runs; only new and changed ones are read."""
    runs = [stored(tmp_path, number, config, seconds=float(number)) for number in range(3)]
    assert seconds(tmp_path) == {f"{number:010x}": number for number in range(3)}
    read, plain = [], index._facts
    monkeypatch.setattr(index, "_facts", lambda path: read.append(path) or plain(path))
    assert len(seconds(tmp_path)) == 3 and read == []

    (runs[0].path / "result.json").write_text(json.dumps(FACTS | {"seconds": 77.5}))
    shutil.rmtree(runs[1].path)
    runs[2].path.rename(tmp_path / "moved-0000000002")  # not the place of a run
    new = stored(tmp_path, 9, config)
    assert seconds(tmp_path) == {"0000000000": 77.5, "0000000009": 12.0}
    assert read == [runs[0].path, new.path] and len(pd.read_parquet(tmp_path / index.FILE)) == 2
    assert finished(tmp_path / "nowhere").empty


def test_a_damaged_index_is_made_anew(tmp_path: Path, config: str) -> None:
    stored(tmp_path, 1, config)
    expected, file = finished(tmp_path), tmp_path / index.FILE
    file.write_bytes(b"PAR1 no")
    pd.testing.assert_frame_equal(finished(tmp_path), expected)
    pd.DataFrame({"id": ["x"]}).to_parquet(file)  # the columns of another version
    pd.testing.assert_frame_equal(finished(tmp_path), expected)
    assert len(pd.read_parquet(file)) == 1
    file.unlink()
    file.mkdir()  # cannot be written
    assert seconds(tmp_path) == {"0000000001": 12.0} and not list(tmp_path.glob(".*.*.*"))


def test_runs_that_cannot_be_read(tmp_path: Path, config: str) -> None:
    """Half a result counts as none; a run without a config, or one that diverged, says nothing of costs."""
    (stored(tmp_path, 1, config).path / "result.json").write_text("{")
    (stored(tmp_path, 2, config).path / "config.yaml").unlink()
    stored(tmp_path, 3, config, diverged="train/ce is nan")
    (tmp_path / "group-4" / "run-0000000004").mkdir(parents=True)  # not finished
    found = finished(tmp_path).set_index("id")
    assert {*found.index} == {"0000000002", "0000000003"} and found["diverged"].tolist() == ["", "train/ce is nan"]
    assert cost.stored(tmp_path) == {}


def test_costs_are_those_of_the_run_that_ended_last(tmp_path: Path, config: str) -> None:
    for number, (took, ended) in enumerate([(40.0, 1000), (8.0, 3000), (20.0, 2000)]):
        run = stored(tmp_path, number, config, seconds=took)
        os.utime(run.path / "result.json", (ended, ended))
    (estimate,) = cost.stored(tmp_path).values()
    assert (estimate.epoch, estimate.steps, estimate.source) == (2.0, 10.0, "a stored run, a device")


def test_the_kind_of_a_config(config: str) -> None:
    """Equal for a config and its file; length, seed, learning rate and weight are no part of it, a weight of 0 is."""
    cfg = OmegaConf.create(config)
    assert kind(cfg) == kind(yaml.load(config, yaml.CSafeLoader))
    same = {"seed": 5, "optim.lr": 1.0, "method.itdm_c.weight": 0.7, "epochs": 3}
    different = {"batch_size": 5, "method.itdm_c.weight": 0, "precision": "bf16", "evaluate.every": 5, "profile.steps": 3}
    for changes, equal in ((same, True), (different, False)):
        for key, value in changes.items():
            other = cfg.copy()
            OmegaConf.update(other, key, value)
            assert (kind(other) == kind(cfg)) == equal, key
