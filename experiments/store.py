"""Runs on disk: a run's folder, its files, and all runs as one table. No torch here: showing numbers is quick."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import json
import math
import os
import re
import socket
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from experiments.config import ConfigError, first_line
from experiments.identity import VERSION

if TYPE_CHECKING:
    import pandas as pd

State = Literal["missing", "running", "resumable", "failed", "diverged", "done"]


@contextlib.contextmanager
def written(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # a disk that cannot be written any more
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _flock(handle: IO[bytes], path: Path, kind: int) -> None:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:  # which names no file
        raise OSError(error.errno, error.strerror, str(path)) from error


def locked(path: Path) -> IO[bytes] | None:
    """The file with this process as the only holder of its lock, which ends with the process; None while another holds it.

    Who only looks whether it is held (`Run.state`) has it for a moment: hence several tries.
    """
    handle = open(path, "ab")  # noqa: SIM115
    for _ in range(10):
        try:
            _flock(handle, path, fcntl.LOCK_EX)
            return handle
        except BlockingIOError:
            time.sleep(0.02)
        except OSError:
            handle.close()
            raise
    handle.close()
    return None


class Run:
    """One run's folder: config.yaml, metrics.csv, events for TensorBoard, checkpoint.pt and progress.json, weights-*.pt where they are
    kept, result.json or error.txt, lock, train.log."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[bytes] | None = None

    @property
    def state(self) -> State:
        result = self.result()
        if result is not None:
            return "diverged" if "diverged" in result else "done"
        if not self.path.is_dir():
            return "missing"
        if self._lock is None and self._held():
            return "running"
        if (self.path / "error.txt").exists():
            return "failed"
        return "resumable" if (self.path / "checkpoint.pt").exists() else "missing"

    def acquire(self) -> bool:
        """Become the one process that trains this run. The kernel frees the lock whatever ends the process."""
        self.path.mkdir(parents=True, exist_ok=True)
        handle = locked(self.path / "lock")
        if handle is None:
            return False
        self._lock = handle
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time(), "job": os.environ.get("SLURM_JOB_ID")}
        try:
            handle.truncate(0)
            handle.write(json.dumps(holder).encode())
            handle.flush()
        except OSError:
            self.release()
            raise
        for left in self.path.glob(".*.*"):  # temporary files of a process that was killed while it wrote
            left.unlink(missing_ok=True)
        return True

    def release(self) -> None:
        if self._lock is not None:
            with contextlib.suppress(OSError):  # what could not be written is tried once more
                self._lock.close()
            self._lock = None

    def _held(self) -> bool:
        try:
            with open(self.path / "lock", "rb") as handle:
                _flock(handle, self.path / "lock", fcntl.LOCK_SH)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def holder(self) -> dict[str, Any]:
        """Who trains this run, or was the last to: host, pid, since (seconds since 1970), job (SLURM's). Empty when nobody has."""
        try:
            found = json.loads(self.read("lock"))
        except (OSError, ValueError):  # an older run's is empty
            return {}
        return found if isinstance(found, dict) else {}

    def write(self, name: str, text: str) -> None:
        with written(self.path / name) as file:
            file.write(text.encode())

    def read(self, name: str) -> str:
        """The text of one of its files. Raises FileNotFoundError."""
        return (self.path / name).read_text()

    def write_config(self, cfg: DictConfig) -> None:
        self.write("config.yaml", config_text(cfg))

    def config(self, runtime: DictConfig | None = None) -> DictConfig:
        """The run's config, with this `runtime`: its own may name another machine's device and folders.

        Raises ConfigError when another version of the suite has written it.
        """
        try:
            cfg = OmegaConf.create(self.read("config.yaml"))
        except (YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self.path}/config.yaml: it cannot be read ({first_line(error)})") from error
        if not isinstance(cfg, DictConfig):
            raise ConfigError(f"{self.path}/config.yaml: it is no config")
        if (version := cfg.pop("version", None)) != VERSION:
            raise ConfigError(f"{self.path}: its config.yaml has version {version}, and this code reads version {VERSION}: train it anew")
        if runtime is not None:
            cfg.update(runtime=runtime)
        return cfg

    def log(self, rows: list[dict[str, float]]) -> None:
        """metrics.csv, whole: one row per evaluation."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines = [",".join(columns)] + [",".join("" if row.get(key) is None else repr(float(row[key])) for key in columns) for row in rows]
        self.write("metrics.csv", "\n".join(lines) + "\n")

    def metrics(self) -> list[dict[str, float]]:
        """The evaluations so far: what `log` wrote."""
        try:
            return [
                {key: float(value) for key, value in row.items() if value} for row in csv.DictReader(io.StringIO(self.read("metrics.csv")))
            ]
        except FileNotFoundError:
            return []

    def advance(self, epoch: int, epochs: int, steps: int, epoch_seconds: float, device: str) -> None:
        """progress.json: how far the checkpoint is (epoch 0: there is none), and how long an epoch of so many steps takes on the device."""
        made = {"epoch": epoch, "epochs": epochs, "steps": steps, "epoch_seconds": round(epoch_seconds, 3), "device": device}
        self.write("progress.json", json.dumps(made))

    def progress(self) -> dict[str, Any] | None:
        """What `advance` wrote last; None before the first checkpoint."""
        try:
            made = json.loads(self.read("progress.json"))
            numbers = [made[key] for key in ("epoch", "epochs", "steps", "epoch_seconds")]
        except (OSError, ValueError, TypeError, KeyError):  # not written by us
            return None
        return made if all(isinstance(one, int | float) and 0 <= one < math.inf for one in numbers) else None

    def finish(self, summary: dict[str, Any]) -> None:
        """result.json: from here on the run is done and is never trained again."""
        (self.path / "error.txt").unlink(missing_ok=True)
        self.write("result.json", json.dumps(summary, indent=1) + "\n")

    def fail(self, text: str) -> None:
        self.write("error.txt", text)

    def result(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self.read("result.json"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (json.JSONDecodeError, UnicodeDecodeError):  # not written by us: the run is asked for again
            return None
        return found if isinstance(found, dict) else None

    def error(self) -> str:
        """The error of a failed run, without its traceback, in its first line; or why the run diverged."""
        result = self.result() or {}
        if "diverged" in result:
            return str(result["diverged"])
        try:
            text = self.read("error.txt").rpartition("Traceback (most recent call last):\n")[2]  # of several the last
        except FileNotFoundError:
            return ""
        return next((line for line in text.splitlines() if line and not line.startswith((" ", "Traceback"))), "")


def config_text(cfg: DictConfig) -> str:
    """A run's config.yaml: its config, after the version of the rule that made its id."""
    return f"version: {VERSION}\n{OmegaConf.to_yaml(cfg)}"


def folders(root: Path) -> Iterator[tuple[str, str]]:
    """Every run's id, and its folder; by system calls, since there may be ten thousand of them."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(root) as groups:
        for group in groups:
            if group.is_dir() and not group.name.startswith("."):
                with contextlib.suppress(FileNotFoundError), os.scandir(group) as entries:  # removed in the meantime
                    yield from ((entry.name[-10:], entry.path) for entry in entries if re.search(r"-[0-9a-f]{10}$", entry.name))


def find(root: Path, ids: Iterable[str]) -> dict[str, Run]:
    """The runs of these ids that have a folder, wherever it is named."""
    wanted = set(ids)
    return {identity: Run(Path(path)) for identity, path in folders(root) if identity in wanted}


def load(root: Path, ids: Iterable[str] | None = None) -> pd.DataFrame:
    """All runs (or those of `ids`) for your own analysis: one row per run and evaluation, with the run's id, state, folder and config."""
    import pandas as pd

    wanted = None if ids is None else set(ids)
    rows = []
    for path in sorted(root.glob("*/*-??????????/config.yaml")):
        run, identity = Run(path.parent), path.parent.name[-10:]
        if wanted is None or identity in wanted:
            known = {"id": identity, "state": run.state, "folder": str(path.parent)} | _flat(OmegaConf.to_container(OmegaConf.load(path)))
            rows += [known | row for row in run.metrics()]
    return pd.DataFrame(rows)


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """A nested config as dotted keys."""
    if not isinstance(value, dict):
        return {path: value}
    return {key: inner for name, node in value.items() for key, inner in _flat(node, f"{path}.{name}" if path else str(name)).items()}
