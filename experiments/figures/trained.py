"""A finished run made anew, with the network that its end or a kept state left: for figures that look into it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from experiments import store
from experiments.config import ConfigError

if TYPE_CHECKING:
    from experiments.trainer import Trainer


def remade(run: store.Run, runtime: DictConfig, **changes: Any) -> Trainer:
    """The run's trainer, untrained, with some keys of its config changed; `runtime` says where to compute."""
    from experiments.train import make_trainer

    cfg = run.config(runtime)
    cfg.update(**changes)
    return make_trainer(cfg)


def trained(run: store.Run, runtime: DictConfig, kept: Path | None = None) -> Trainer:
    """The same with its last network, or that of a file weights-*.pt, in evaluation mode."""
    import torch

    file = kept or run.path / "checkpoint.pt"
    if not file.exists():
        raise ConfigError(f"{run.path}: its network is not there, and this figure needs it; train the run here, without published runs")
    trainer = remade(run, runtime)
    state = torch.load(file, map_location=trainer.device, weights_only=True)
    trainer.net.load_state_dict(state if kept else state["net"])
    trainer.net.eval()
    return trainer
