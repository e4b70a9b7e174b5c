"""What a number needs to be believed: the data, code and machine that made it."""

from __future__ import annotations

import platform
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from experiments import store
from experiments.trainer import Trainer


def facts(cfg: DictConfig, trainer: Trainer) -> dict[str, Any]:
    """What a number needs to be believed: data, code, machine, time."""
    return {
        "id": store.run_id(cfg),
        "profile": cfg.profile.name,
        "data": trainer.bundle.variant,
        "samples": {split: len(values[1]) for split, values in trainer.bundle.splits.items()},
        "parameters": sum(p.numel() for p in trainer.net.parameters()),
        "epochs": trainer.epoch,
        "steps": trainer.step,
        "passes": trainer.passes,
        "forwarded": trainer.forwarded,
        "seconds": round(trainer.seconds, 3),
        "device": device_name(trainer.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **commit(),
    }


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return model[1] if model else platform.processor() or platform.machine()


@cache
def commit() -> dict[str, Any]:
    """The code's commit and whether tracked files differ from it; unknown outside a git checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(("git", *arguments), cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "--short=10", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "unknown", "dirty": None}
