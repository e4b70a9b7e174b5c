"""Tests of a run's folder: its config, states, lock and files, which are there whole or not at all."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments import store
from experiments.cli import CONF
from experiments.config import ConfigError
from experiments.identity import run_id

ROOT = Path(__file__).resolve().parent.parent


# files that are read


def test_a_config_of_another_version_is_refused(tmp_path: Path) -> None:
    run = store.Run(tmp_path)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", ["method=itdm_c"])
    run.write_config(cfg)
    assert run.config() == OmegaConf.create(OmegaConf.to_yaml(cfg)) and run_id(run.config(cfg.runtime)) == run_id(cfg)
    for version in ("", "version: 2\n"):
        run.write("config.yaml", version + OmegaConf.to_yaml(cfg))
        with pytest.raises(ConfigError, match=r"config.yaml has version .*, and this code reads version 1"):
            run.config()
    for text in (b"", b"x: [", b"[1]", b"\xff\xfe"):
        (tmp_path / "config.yaml").write_bytes(text)
        with pytest.raises(ConfigError, match=re.escape(str(tmp_path))):
            run.config()


def test_damaged_files_count_as_none(tmp_path: Path) -> None:
    run, good = store.Run(tmp_path), {"epoch": 2, "epochs": 8, "steps": 20, "epoch_seconds": 1.5, "device": "a device"}
    for text in (b"", b'{"epochs": 3', b"[]", b"null", b"\xff\xfe{"):
        for name in ("result.json", "progress.json"):
            (tmp_path / name).write_bytes(text)
        assert (run.result(), run.progress(), run.state) == (None, None, "missing")
    for change in ({"epoch": -1}, {"epoch": "1"}, {"steps": None}, {"epoch_seconds": float("nan")}):
        run.write("progress.json", json.dumps(good | change))
        assert run.progress() is None, change
    run.advance(**good)  # type: ignore[arg-type]
    assert run.progress() == good


def test_folders_are_found_by_the_id_at_the_end_of_their_names(tmp_path: Path) -> None:
    ids = ["0123456789", "abcdef0123"]
    for path in ("old/some-name-0123456789", "other/x-ffffffffff", "old/abcdef0123", "deep/er/x-abcdef0123"):
        (tmp_path / path).mkdir(parents=True)
    assert {key: run.path for key, run in store.find(tmp_path, ids).items()} == {ids[0]: tmp_path / "old" / "some-name-0123456789"}
    (tmp_path / "old" / "some-name-0123456789").rename(tmp_path / "other" / "mine-0123456789")
    assert store.find(tmp_path, ids)[ids[0]].path == tmp_path / "other" / "mine-0123456789"
    assert store.find(tmp_path / "nowhere", ids) == {}


# states and the lock


def test_states(tmp_path: Path) -> None:
    run = store.Run(tmp_path / "a" / "run")
    assert (run.state, run.error()) == ("missing", "")
    assert run.acquire()
    assert (run.state, store.Run(run.path).state) == ("missing", "running")  # to its owner, and to others
    run.write("checkpoint.pt", "x")
    assert (run.state, store.Run(run.path).state) == ("resumable", "running")
    run.fail("Traceback\n  somewhere\nValueError: no\n")
    run.release()
    assert (run.state, run.error()) == ("failed", "ValueError: no")
    run.finish({"diverged": "train/ce is nan"})
    assert (run.state, run.error()) == ("diverged", "train/ce is nan")
    run.finish({"epochs": 3, "data": "±", "dirty": None})
    assert (run.state, run.error(), run.result()) == ("done", "", {"epochs": 3, "data": "±", "dirty": None})
    assert not (run.path / "error.txt").exists()
    assert run.acquire() and store.Run(run.path).state == "done"  # a result counts whoever holds the lock
    assert store.Run(run.path / "result.json" / "x").state == "missing"  # below a file


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
    """Nobody else gets it until its holder is killed."""
    words = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            run = store.Run(tmp_path)
            (tmp_path / ".checkpoint.pt.half").touch()  # it may be the holder's
            assert run.state == "running" and not run.acquire() and (tmp_path / ".checkpoint.pt.half").exists()
            assert run.holder()["pid"] == holder.pid
        finally:
            holder.kill()
        assert holder.wait() == -signal.SIGKILL
    assert run.state == "missing"
    assert run.acquire() and run.state == "missing" and not (tmp_path / ".checkpoint.pt.half").exists()


def test_lock_within_a_process(tmp_path: Path) -> None:
    first, second = store.Run(tmp_path), store.Run(tmp_path)
    assert first.acquire() and not second.acquire()
    first.release()
    first.release()
    assert [store.Run(tmp_path).state for _ in range(3)] == ["missing"] * 3  # looking takes no lock
    assert second.acquire() and not first.acquire()


# files that are written


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
    with pytest.raises(FileNotFoundError), store.written(tmp_path / "nowhere" / "file"):
        pass


def test_metrics_are_exact(tmp_path: Path) -> None:
    run = store.Run(tmp_path)
    assert run.metrics() == []
    rows = [
        {"step": 5, "epoch": 1 / 3, "train/ce": 0.1 + 0.2, "test/ce": 5e-324},
        {"step": 10, "epoch": 2 / 3, "train/ce": float("inf"), "test/ce": -0.0, "train/itdm_c": 1e-17},
    ]
    run.log(rows)
    assert run.metrics() == rows and str(run.metrics()[1]["test/ce"]) == "-0.0"
    assert (tmp_path / "metrics.csv").read_text().splitlines()[0] == "step,epoch,train/ce,test/ce,train/itdm_c"
    run.log([{"step": 1, "test/ce": float("nan")}])
    (row,) = run.metrics()
    assert row["step"] == 1 and row["test/ce"] != row["test/ce"]


def test_load_is_all_runs_as_one_table(tmp_path: Path) -> None:
    for identity, weight in (("0123456789", 0.5), ("abcdef0123", 1.5)):
        run = store.Run(tmp_path / "a" / f"x-{identity}")
        run.path.mkdir(parents=True)
        run.write("config.yaml", f"method: {{m: {{weight: {weight}}}}}\nseed: 1\n")
        run.log([{"step": 1, "test/ce": weight}, {"step": 2, "test/ce": weight / 2}])
        run.finish({})
    every = store.load(tmp_path)
    assert every["id"].tolist() == ["0123456789"] * 2 + ["abcdef0123"] * 2 and set(every["state"]) == {"done"}
    assert every["method.m.weight"].tolist() == [0.5, 0.5, 1.5, 1.5] and every["test/ce"].tolist() == [0.5, 0.25, 1.5, 0.75]
    assert store.load(tmp_path, ["abcdef0123"])["test/ce"].tolist() == [1.5, 0.75]


COMMANDS = """
import sys
from experiments import claims, cli, show, status, table
words = ["retable", "runtime.runs=" + sys.argv[1]]
sys.argv = [*words, "table=demo", "launch=false", "out=" + sys.argv[1] + "/out"]
cli.main(table.run, "tables")
sys.argv = words
cli.main(status.run, "status")
assert "torch" not in sys.modules
"""


def test_commands_that_train_nothing_do_not_import_torch(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", COMMANDS, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
