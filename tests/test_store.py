"""A run on disk: its config, its states and lock, and files that are there whole or not at all."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from experiments import store
from experiments.cli import CONF
from experiments.config import ConfigError
from experiments.identity import run_id

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def hydra() -> Iterator[None]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def config(words: str = "") -> DictConfig:
    return compose("config", words.split())


# a run's config


def test_a_config_of_another_version_is_refused(tmp_path: Path) -> None:
    cfg, run = config("method=itdm_c"), store.Run(tmp_path)
    run.write_config(cfg)
    assert run.config() == OmegaConf.create(OmegaConf.to_yaml(cfg)) and run_id(run.config(cfg.runtime)) == run_id(cfg)
    for version in ("", "version: 0\n", "version: 2\n"):
        run.write("config.yaml", version + OmegaConf.to_yaml(cfg))
        with pytest.raises(ConfigError, match=r"config.yaml has version .*, and this code reads version 1"):
            run.config()


@pytest.mark.parametrize("text", [b"", b"x: [", b"[1]", b"x", b"\xff\xfe"])
def test_a_config_that_cannot_be_read(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(text)
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path))):
        store.Run(tmp_path).config()


@pytest.mark.parametrize("text", [b"", b"[]", b"3", b'"x"', b"\xff\xfe{", b"{", b"null"])
def test_a_result_that_is_not_ours_is_none(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_bytes(text)
    assert store.Run(tmp_path).result() is None and store.Run(tmp_path).state == "missing"


GOOD = {"epoch": 2, "epochs": 8, "steps": 20, "epoch_seconds": 1.5, "device": "a device"}


@pytest.mark.parametrize("change", [{"epoch": -1}, {"epoch": "1"}, {"steps": None}, {"epoch_seconds": float("nan")}])
def test_progress_that_is_not_ours_is_none(change: dict[str, Any], tmp_path: Path) -> None:
    run = store.Run(tmp_path)
    for text in (b"", b"[]", b"3", b"null", b'{"epoch": 1}', b"\xff\xfe{", json.dumps(GOOD | change).encode()):
        (tmp_path / "progress.json").write_bytes(text)
        assert run.progress() is None, text
    run.advance(**GOOD)
    assert run.progress() == GOOD


# folders


def test_a_renamed_folder_is_found(tmp_path: Path) -> None:
    ids = ["0123456789", "abcdef0123"]
    for path in ("old/some-name-0123456789", "other/x-ffffffffff", "old/abcdef0123", "deep/er/x-abcdef0123"):
        (tmp_path / path).mkdir(parents=True)
    found = store.find(tmp_path, ids)
    assert {key: run.path for key, run in found.items()} == {ids[0]: tmp_path / "old" / "some-name-0123456789"}
    (tmp_path / "old").rename(tmp_path / "new")
    (tmp_path / "new" / "some-name-0123456789").rename(tmp_path / "new" / "mine-0123456789")
    assert store.find(tmp_path, ids)[ids[0]].path == tmp_path / "new" / "mine-0123456789"
    assert store.find(tmp_path / "nowhere", ids) == {}


# states


def test_states(tmp_path: Path) -> None:
    run = store.Run(tmp_path / "a" / "run")
    assert run.state == "missing"
    assert run.acquire()
    assert (run.state, store.Run(run.path).state) == ("missing", "running")  # to its owner, and to others
    run.write("checkpoint.pt", "x")
    assert (run.state, store.Run(run.path).state) == ("resumable", "running")
    run.fail("Traceback\n  somewhere\nValueError: no\n")
    run.release()
    assert (run.state, run.error()) == ("failed", "ValueError: no")
    run.finish({"diverged": "train/ce is nan"})
    assert (run.state, run.error()) == ("diverged", "train/ce is nan")
    run.finish({"epochs": 3})
    assert (run.state, run.error(), run.result()) == ("done", "", {"epochs": 3})
    assert not (run.path / "error.txt").exists()


def test_done_counts_whoever_holds_the_lock(tmp_path: Path) -> None:
    run = store.Run(tmp_path)
    assert run.acquire()
    run.finish({})
    assert store.Run(tmp_path).state == "done"


@pytest.mark.parametrize("text", ["", "{", '{"epochs": 3', "\x00\x00"])
def test_a_half_written_result_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "result.json").write_text(text)
    run = store.Run(tmp_path)
    assert (run.result(), run.state) == (None, "missing")
    (tmp_path / "checkpoint.pt").touch()
    assert run.state == "resumable"


def test_a_run_below_a_file_is_missing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run = store.Run(tmp_path / "file" / "run")
    assert run.state == "missing"
    with pytest.raises(OSError):
        run.acquire()


def test_error_without_text(tmp_path: Path) -> None:
    assert store.Run(tmp_path).error() == ""
    (tmp_path / "error.txt").touch()
    assert store.Run(tmp_path).error() == ""


# the lock

HOLD = """
import sys, time
from pathlib import Path
from experiments.store import Run
run = Run(Path(sys.argv[1]))
assert run.acquire()
print("held", flush=True)
time.sleep(100)
"""


def test_lock_of_another_process(tmp_path: Path) -> None:
    """Nobody else gets it, until its holder is killed."""
    words = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            run = store.Run(tmp_path)
            assert run.state == "running" and not run.acquire()
            (tmp_path / ".checkpoint.pt.half").touch()
            assert not run.acquire() and (tmp_path / ".checkpoint.pt.half").exists()  # it may be the holder's
        finally:
            holder.kill()
        assert holder.wait() == -signal.SIGKILL
    assert run.state == "missing"
    assert run.acquire() and run.state == "missing"
    assert not (tmp_path / ".checkpoint.pt.half").exists()
    run.release()
    assert store.Run(tmp_path).acquire()


def test_lock_within_a_process(tmp_path: Path) -> None:
    first, second = store.Run(tmp_path), store.Run(tmp_path)
    assert first.acquire() and not second.acquire()
    first.release()
    first.release()
    assert second.acquire() and not first.acquire()


def test_looking_does_not_lock(tmp_path: Path) -> None:
    run = store.Run(tmp_path)
    assert run.acquire()
    run.release()
    assert [store.Run(tmp_path).state for _ in range(3)] == ["missing"] * 3
    assert run.acquire()


# files


def test_written_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fill(error: type[BaseException] | None) -> None:
        with store.written(path) as file:
            file.write(b"new" * 100000)
            file.flush()
            assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 2
            if error:
                raise error

    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error):
            fill(error)
        assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    fill(None)
    assert path.read_text() == "new" * 100000 and list(tmp_path.iterdir()) == [path]


def test_written_by_a_process_that_is_killed(tmp_path: Path) -> None:
    run = store.Run(tmp_path)
    run.write("metrics.csv", "old")
    code = "import os, sys, signal; from pathlib import Path; from experiments import store\n"
    code += "with store.written(Path(sys.argv[1]) / 'metrics.csv') as file:\n"
    code += "    file.write(b'new'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "metrics.csv").read_text() == "old"
    assert len(list(tmp_path.glob(".metrics.csv.*"))) == 1
    assert run.acquire() and not list(tmp_path.glob(".metrics.csv.*"))
    assert (tmp_path / "metrics.csv").read_text() == "old"


def test_written_into_nowhere(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), store.written(tmp_path / "nowhere" / "file") as file:
        file.write(b"x")


def test_metrics_are_exact(tmp_path: Path) -> None:
    run = store.Run(tmp_path)
    assert run.metrics() == []
    rows = [
        {"step": 5, "epoch": 1 / 3, "train/ce": 0.1 + 0.2, "test/ce": 5e-324},
        {"step": 10, "epoch": 2 / 3, "train/ce": 1.7976931348623157e308, "test/ce": -0.0, "train/itdm_c": 1e-17},
    ]
    run.log(rows)
    assert run.metrics() == rows
    assert str(run.metrics()[1]["test/ce"]) == "-0.0"
    assert (tmp_path / "metrics.csv").read_text().splitlines()[0] == "step,epoch,train/ce,test/ce,train/itdm_c"
    run.log(rows[:1])
    assert run.metrics() == rows[:1]


def test_metrics_of_a_diverged_run(tmp_path: Path) -> None:
    run = store.Run(tmp_path)
    run.log([{"step": 1, "train/ce": float("inf"), "test/ce": float("nan")}])
    (row,) = run.metrics()
    assert row["train/ce"] == float("inf") and row["test/ce"] != row["test/ce"]


def test_load_is_all_runs_as_one_table(tmp_path: Path) -> None:
    for identity, weight in (("0123456789", 0.5), ("abcdef0123", 1.5)):
        run = store.Run(tmp_path / "a" / f"x-{identity}")
        run.path.mkdir(parents=True)
        run.write("config.yaml", f"method: {{m: {{weight: {weight}}}}}\nseed: 1\n")
        run.log([{"step": 1, "test/ce": weight}, {"step": 2, "test/ce": weight / 2}])
        run.finish({})
    every = store.load(tmp_path)
    assert every["id"].tolist() == ["0123456789"] * 2 + ["abcdef0123"] * 2
    assert every["method.m.weight"].tolist() == [0.5, 0.5, 1.5, 1.5] and every["test/ce"].tolist() == [0.5, 0.25, 1.5, 0.75]
    assert set(every["state"]) == {"done"}
    assert store.load(tmp_path, ["abcdef0123"])["test/ce"].tolist() == [1.5, 0.75]


def test_no_torch_to_show_numbers() -> None:
    code = "import sys, experiments.store, experiments.table, experiments.show, experiments.claims; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_result_is_json(tmp_path: Path) -> None:
    run = store.Run(tmp_path)
    run.finish({"data": "±", "dirty": None})
    assert json.loads((tmp_path / "result.json").read_text()) == {"data": "±", "dirty": None}
