"""What a number needs to be believed: the data, code and machine that made it."""

from __future__ import annotations

import ast
import hashlib
import platform
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from experiments.identity import run_id
from experiments.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent


def facts(cfg: DictConfig, trainer: Trainer) -> dict[str, Any]:
    """What a number needs to be believed: data, code, machine, time."""
    return {
        "id": run_id(cfg),
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
        "source": sources(cfg),
    }


@cache
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


def sources(cfg: DictConfig) -> dict[str, str]:
    """A digest of the suite's code behind the run's data set, model, norm layer and each method: {"model": ..., "method.itdm_c": ...}."""
    parts = {"dataset": cfg.dataset, "model": cfg.model, "norm": cfg.norm} | {f"method.{name}": node for name, node in cfg.method.items()}
    found = {path: digest(str(node._target_).rpartition(".")[0]) for path, node in parts.items()}
    return {path: text for path, text in found.items() if text is not None}


@cache
def digest(module: str) -> str | None:
    """Ten hex digits of the parsed source of a module and of the modules of its package that it imports.

    Comments, docstrings, layout, and where the modules lie do not count. None for a module outside this repository.
    """
    package, left, texts = module.partition(".")[0], [module], dict[str, str]()
    while left:
        name = left.pop()
        path = ROOT / f"{name.replace('.', '/')}.py"
        if name in texts or name.partition(".")[0] != package or not path.is_file():
            continue
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                left += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                left += [alias.name for alias in node.names]
        texts[name] = repr(_shape(tree))
    return hashlib.sha256("\n".join(sorted(texts.values())).encode()).hexdigest()[:10] if texts else None


def _shape(node: Any) -> Any:
    """A syntax tree as plain values, the same with every Python: without what is empty, docstrings, and imports."""
    if isinstance(node, list):
        return [_shape(inner) for inner in node if not isinstance(inner, ast.Import | ast.ImportFrom)]
    if not isinstance(node, ast.AST):
        return node
    parts = {key: value for key, value in ast.iter_fields(node) if value not in (None, [])}
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
        parts["body"] = parts["body"][1:]
    return [type(node).__name__, *((key, _shape(value)) for key, value in parts.items())]
