"""An index of the finished runs, so that ten thousand of them are looked at in a second. Never the truth: it is made of the runs' folders.

pandas.read_parquet("runs/.index.parquet")      # for your own use; one row per finished run
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from omegaconf import DictConfig, OmegaConf

from experiments import store
from experiments.identity import meaning

FILE = ".index.parquet"
# stamp: what tells that a run's files have changed; kind: what decides the cost of an epoch, see `kind`; the others are result.json's
COLUMNS = ["id", "folder", "stamp", "diverged", "seconds", "epochs", "steps", "device", "finished", "kind"]


def finished(root: Path) -> pd.DataFrame:
    """All runs of the store with a result, one row each. Reads the folders that the index does not know, or that have changed since."""
    known = {row["folder"]: row for row in _read(root).to_dict("records")}
    rows, fresh = [], False
    for identity, path in store.folders(root):
        folder = str(Path(path).relative_to(root))
        if (status := _stat(f"{path}/result.json")) is None:
            continue
        both = (status, _stat(f"{path}/config.yaml"))
        stamp = " ".join(f"{one.st_mtime_ns} {one.st_size}" for one in both if one is not None)
        row = known.get(folder)
        if row is None or row["stamp"] != stamp:
            fresh = True
            row = {"id": identity, "folder": folder, "stamp": stamp, "finished": status.st_mtime} | _facts(Path(path))
        rows.append(row)
    found = pd.DataFrame(rows, columns=COLUMNS)
    if fresh or len(rows) != len(known):
        with contextlib.suppress(OSError), store.written(root / FILE) as file:  # of others, or on a full disk: made anew next time
            found.to_parquet(file)
    return found[found["seconds"].notna()]


def _stat(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None


def _read(root: Path) -> pd.DataFrame:
    try:
        found = pd.read_parquet(root / FILE)
    except Exception:  # there is none, or it is damaged
        return pd.DataFrame(columns=COLUMNS)
    return found if list(found.columns) == COLUMNS else found[:0]


def _facts(path: Path) -> dict[str, Any]:
    """What the index keeps of a run; without `seconds` if its files cannot be read."""
    result = store.Run(path).result() or {}
    facts = {key: result.get(key) for key in ("seconds", "epochs", "steps", "device")} | {"diverged": result.get("diverged", "")}
    try:
        config = yaml.load((path / "config.yaml").read_bytes(), yaml.CSafeLoader)
        return facts | {"kind": kind(config)}
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError):
        return facts | {"kind": None}


def kind(cfg: DictConfig | dict[str, Any], data: Any = None) -> str:
    """What decides the cost of an epoch: two runs of one kind differ in seed, length, weights and learning rates only.

    data: what of the data decides, in place of the data set.
    """
    content: Any = OmegaConf.to_container(cfg) if isinstance(cfg, DictConfig) else cfg
    whole = {"dataset", "model", "norm", "probe", "batch_size", "drop_last", "balanced", "precision", "channels_last", "compile", "step"}
    parts = {key: content.get(key) for key in sorted(whole | {"deterministic"})}
    parts["dataset"] = parts["dataset"] if data is None else data
    profile = {key: content["profile"][key] for key in ("train", "test", "steps", "embedded")}
    active = {name: node for name, node in content["method"].items() if node.get("weight", 1) != 0}
    methods = [[name, {key: value for key, value in node.items() if key != "weight"}] for name, node in active.items()]
    return json.dumps(meaning([parts, profile, methods, content["evaluate"]["every"] is None]), sort_keys=True)
