"""Decoded data sets, kept as one uncompressed .npz each, which NumPy reads without the libraries that decoded them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from pathlib import Path

import numpy as np
import torch

from data.formats import Raw

CACHE_FORMAT = 1  # part of every entry's name: raise it when decoding changes


def recall(root: Path, label: str, paths: list[Path]) -> Raw | None:
    """What was decoded from the files at `paths`, as they are now, under this label; None if it has to be decoded."""
    for folder in _folders(root):
        try:
            with np.load(folder / _entry(root, label, paths)) as arrays:
                splits = {s: (torch.from_numpy(arrays[f"{s}_x"]), torch.from_numpy(arrays[f"{s}_y"])) for s in ("train", "test")}
                return Raw(splits, str(arrays["variant"]))
        except Exception:  # not there, or damaged in whatever way: decode again
            continue
    return None


def remember(root: Path, label: str, paths: list[Path], raw: Raw) -> None:
    """Write the entry, atomically, where it can be written; else do without."""
    entry = _entry(root, label, paths)
    arrays = {f"{split}_{axis}": t.numpy() for split, pair in raw.splits.items() for axis, t in zip("xy", pair, strict=True)}
    for folder in _folders(root)[marked_read_only(root) :]:
        temporary = folder / f".{entry}.{uuid.uuid4().hex}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                np.savez(file, variant=np.array(raw.variant), **arrays)  # type: ignore[arg-type]
            os.replace(temporary, folder / entry)
            return
        except OSError:
            continue
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


def marked_read_only(root: Path) -> bool:
    """Whether nobody has write permission: root, as whom containers run, could write all the same, but was asked not to."""
    return root.is_dir() and not root.stat().st_mode & 0o222


def _folders(root: Path) -> list[Path]:
    """Where entries may lie, best first."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "retable")
    return [root / "cache", home] if root.is_dir() else [home]


def _entry(root: Path, label: str, paths: list[Path]) -> str:
    """The entry's file name; it changes when a file at or below the paths changes its name, size in bytes or modification time."""
    stamp = [(path.relative_to(root).as_posix(), _when(path.stat())) for path in paths if path.is_file()]
    stack = [(str(path), path.relative_to(root).as_posix()) for path in paths if path.is_dir()]
    while stack:  # plain strings: an archive can have 100,000 files, and this runs at every start
        folder, name = stack.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):  # a link could lead in a circle
                    stack.append((entry.path, f"{name}/{entry.name}"))
                else:
                    stamp.append((f"{name}/{entry.name}", _when(entry.stat())))
    return f"{label}-{hashlib.sha256(f'{CACHE_FORMAT} {label} {sorted(set(stamp))}'.encode()).hexdigest()[:16]}.npz"


def _when(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns
