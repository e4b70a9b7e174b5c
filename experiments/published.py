"""Published runs: the finished runs of a table or figure in one zip file below runs/published/, small enough for git.

The file holds the runs' folders, each with config.yaml (without `runtime`), metrics.csv (nine digits, which keep a float32) and
result.json; the network is not kept. `unzip runs/published/demo.zip -d runs` makes them runs of one's own.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig

from experiments import store
from experiments.config import ConfigError, first_line
from experiments.identity import run_id
from experiments.pick import Jobs, numbers
from experiments.spec import Table

FOLDER = Path("runs/published")
FILES = ("config.yaml", "metrics.csv", "result.json")
LARGEST = 1_000_000  # bytes of a file
LARGEST_MEMBER = 10_000_000  # bytes of a member, unpacked
SAME = 1e-6  # relative difference of numbers that count as equal


class Published(store.Run):
    """A run in a published file, which can only be read. `path` says where it is; there is no such folder."""

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        self.archive, self.file, self.folder = archive, Path(str(archive.filename)), folder
        super().__init__(self.file / folder)

    def read(self, name: str) -> str:
        try:
            member = self.archive.getinfo(f"{self.folder}/{name}")
            if member.file_size > LARGEST_MEMBER:
                raise ValueError(f"it has {member.file_size:,} bytes")
            return self.archive.read(member).decode()
        except KeyError as error:
            raise FileNotFoundError(self.path / name) from error
        except (zipfile.BadZipFile, zlib.error, OSError, ValueError, RuntimeError) as error:  # RuntimeError: encrypted, or packed otherwise
            raise self._damaged(name, error) from error

    def result(self) -> dict[str, Any] | None:
        found = super().result()
        if found is None or not {"commit", "dirty", "seconds"} <= found.keys() or found.get("id") != self.folder[-10:]:
            raise self._damaged("result.json", ValueError("it is not this run's"))
        return found

    def metrics(self) -> list[dict[str, float]]:
        try:
            return super().metrics()
        except (ValueError, TypeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise self._damaged("metrics.csv", error) from error

    def _damaged(self, name: str, error: Exception) -> ConfigError:
        return ConfigError(f"{self.file}: {self.folder}/{name} is damaged ({first_line(error)})")


def published(root: Path, files: str = "*.zip") -> dict[str, Published]:
    """The published runs by id; of a run that several files have, the first file's. Raises ConfigError on a file that cannot be read."""
    found: dict[str, Published] = {}
    for file in sorted(path for path in root.glob(files) if path.is_file()):
        try:
            archive = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, OSError) as error:
            raise ConfigError(f"{file}: this is no file of published runs ({first_line(error)})") from error
        names = Counter(name.rpartition("/")[0] for name in archive.namelist() if name.rpartition("/")[2] in FILES)
        folders = [name for name, count in names.items() if count == len(FILES) and re.search(r"-[0-9a-f]{10}$", name)]
        found = {folder[-10:]: Published(archive, folder) for folder in folders} | found
    return found


def counted(cfg: DictConfig) -> dict[str, Published]:
    """The published runs that a command uses: all if `published` is true, none if false; if null, all with launch=false."""
    return published(FOLDER) if (not cfg.get("launch", True) if cfg.published is None else cfg.published) else {}


def pack(file: Path, runs: Mapping[str, store.Run]) -> tuple[int, int]:
    """Add the finished runs to the file. Runs already in it stay; one with the same id is replaced.

    Returns how many of the runs are new in it, and how many are replaced by one with other numbers.

    The same runs give the same bytes. Raises ConfigError when the file would be too large.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with _alone(file.parent):
        return _pack(file, runs)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time adds to the files of a folder. The lock is the folder's own, so that it leaves no file."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _pack(file: Path, runs: Mapping[str, store.Run]) -> tuple[int, int]:
    before = published(file.parent, file.name)
    texts: dict[str, str] = {}
    for identity, run in (before | dict(runs)).items():
        name = run.folder if isinstance(run, Published) else f"{run.path.parent.name}/{run.path.name}"
        if run_id(run.config()) != identity:
            raise ConfigError(f"{run.path}: its config.yaml is that of another run")
        texts |= {f"{name}/{part}": text for part, text in zip(FILES, _texts(run), strict=True)}
    with store.written(file) as target:
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for name, text in sorted(texts.items()):
                archive.writestr(zipfile.ZipInfo(name), text, zipfile.ZIP_DEFLATED, 9)  # ZipInfo: the time is 1980, whenever it is written
        if target.tell() > LARGEST:
            raise ConfigError(f"{file}: it would have {target.tell():,} bytes of at most {LARGEST:,}; publish fewer runs, with only=[...]")
    now = published(file.parent, file.name)
    changed = sum(now[identity].metrics() != run.metrics() for identity, run in before.items())
    return len(now) - len(before), changed


def _texts(run: store.Run) -> tuple[str, str, str]:
    """The run's FILES as they are published."""
    cfg = run.config()
    cfg.pop("runtime", None)  # names this machine's folders
    rows = pd.DataFrame(run.metrics()).to_csv(index=False, float_format="%.9g")
    return store.config_text(cfg), rows, run.read("result.json")


def notes(table: Table, wanted: Jobs, found: Mapping[str, store.Run], shared: Mapping[str, Published]) -> list[str]:
    """In words: how many of the runs found are published ones, and which of one's own have other numbers than the published ones."""
    ids = dict.fromkeys(wanted["id"])
    files = sorted({str(run.file) for identity in ids if isinstance(run := found.get(identity), Published)})
    count = sum(isinstance(found.get(identity), Published) for identity in ids)
    lines = [f"published runs: {count} of {len(ids)} ({', '.join(files)})"] if files else []
    own: dict[str, store.Run] = {identity: run for identity, run in found.items() if identity in shared and not isinstance(run, Published)}
    both = wanted[wanted["id"].isin([*own])]
    worst: dict[str, tuple[float, str]] = {}
    for name, jobs in both.groupby("column", sort=False):
        column = table.columns[str(name)]
        mine, theirs = (numbers(jobs, runs, column.metric, column.at or table.at) for runs in (own, dict[str, store.Run](shared)))
        gaps = (mine - theirs).abs() / theirs.abs().clip(lower=1e-12)
        gaps[mine.isna() != theirs.isna()] = math.inf  # one of the two diverged, or lost its numbers
        for identity, gap in zip(jobs["id"], gaps, strict=True):
            if gap > SAME:
                worst[identity] = max(worst.get(identity, (0.0, "")), (gap, column.metric))
    if own and not worst:
        lines.append(f"{len(own)} own runs have the numbers of the published ones")
    if worst:
        identity = max(worst, key=lambda each: worst[each][0])
        gap, metric = worst[identity]
        much = "one of the two has none" if math.isinf(gap) else f"by up to {100 * gap:.2g} %"
        where = f"{metric} of {own[identity].path.name}"
        lines.append(f"{len(worst)} of {len(own)} own runs have other numbers than the published ones: {much} ({where})")
    return lines
