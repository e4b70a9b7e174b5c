"""What a run is, without training it: `runtime.dry_run=true`."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig
from torch import nn

from experiments import plan
from experiments.config import build
from experiments.cost import stored
from experiments.identity import run_id
from experiments.index import kind
from experiments.train import folder, make_trainer
from models.net import Tap


def describe(cfg: DictConfig) -> str:
    """Id and folder, parameters, taps, norm layers, batches, evaluations, estimated time: one line each. Writes nothing."""
    run, trainer = folder(cfg), make_trainer(cfg)
    modules = list(trainer.net.modules())
    count = sum(p.numel() for p in trainer.net.parameters())
    extra = sum(p.numel() for method in trainer.regularizers.values() for p in method.parameters())
    layer = type(build(cfg.norm, "norm")(8))
    norms = 0 if layer is nn.Identity else sum(type(module) is layer for module in modules)
    steps = trainer.length
    samples = ", ".join(f"{len(y):,} {split}" for split, (_, y) in trainer.bundle.splits.items())
    cost = stored(Path(cfg.runtime.runs)).get(kind(cfg)) or plan.measure(cfg)
    lines = {
        "run": run_id(cfg),
        "folder": f"{run.path} ({run.state})",
        "data": f"{trainer.bundle.variant}: {samples} {trainer.bundle.unit}, {trainer.bundle.num_classes:,} classes",
        "parameters": f"{count:,}" + (f" and {extra:,} of methods" if extra else ""),
        "taps": sum(isinstance(module, Tap) and not module.pre for module in modules),
        "norm layers": f"{norms}" + (f" ({layer.__name__})" if norms else ""),
        "methods": ", ".join(trainer.regularizers) or "none",
        "batches": f"{steps.steps_per_epoch:,} steps of {cfg.batch_size} an epoch, {steps.epochs} epochs, {steps.steps:,} steps",
        "evaluations": len(trainer.evaluations),
        "device": f"{trainer.device}, precision {cfg.precision}",
        "time": f"{(cost.epoch * trainer.epochs + cost.extra) / 60:.1f} minutes (from {cost.source})",
    }
    return "\n".join(f"{name + ':':<13}{text}" for name, text in lines.items())
