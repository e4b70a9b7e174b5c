"""How long runs take, by those that are stored. No torch here."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig
from yaml import YAMLError

from experiments import store
from experiments.config import ConfigError
from experiments.index import finished, kind


@dataclass(frozen=True)
class Estimate:
    """Seconds of one epoch of so many `steps`, and where the figure comes from.

    A run with dense evaluations at its end takes `extra` seconds more.
    """

    epoch: float
    steps: float
    extra: float
    source: str


def stored(root: Path, device: str | None = None) -> dict[str, Estimate]:
    """One estimate per kind: from the run that was finished last, else from the last epoch of an unfinished one.

    device: of runs on the device with this name only.
    """
    runs = finished(root)
    ended = {*runs["id"]}
    found = {}
    for identity, path in store.folders(root):
        run = store.Run(Path(path))
        if identity not in ended and (made := run.progress()) is not None and device in (None, made["device"]):
            with contextlib.suppress(ConfigError, OSError, YAMLError):  # its config is not of this version, or damaged
                found[kind(run.config())] = Estimate(made["epoch_seconds"], made["steps"], 0, "an epoch of an unfinished run")
    runs = runs[(runs["diverged"] == "") & runs["kind"].notna() & ((device is None) | (runs["device"] == device))]
    runs = runs.sort_values("finished").drop_duplicates("kind", keep="last")
    return found | {
        row["kind"]: Estimate(row["seconds"] / row["epochs"], row["steps"] / row["epochs"], 0, f"a stored run, {row['device']}")
        for row in runs.to_dict("records")
    }


def epochs(cfg: DictConfig, steps: float) -> float:
    """How many epochs, each of so many steps, the run has."""
    if cfg.iterations is not None:
        return max(1, cfg.iterations * cfg.profile.epochs / steps)
    return max(1, round(cfg.epochs * cfg.profile.epochs))


def remaining(cfg: DictConfig, run: store.Run | None, known: Mapping[str, Estimate]) -> float:
    """Seconds that the rest of the run will take, from its checkpoint on if it has one; nan where no run of its kind is known."""
    cost = known.get(kind(cfg))
    if cost is None:
        return math.nan
    made = None if run is None else run.progress()
    return cost.epoch * max(0.0, epochs(cfg, cost.steps) - (made["epoch"] if made else 0)) + cost.extra
