"""The network of a finished run, as its end or a kept state left it: for figures that look into it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from experiments import store

if TYPE_CHECKING:
    from experiments.trainer import Trainer


def trained(run: store.Run, runtime: DictConfig, kept: Path | None = None) -> Trainer:
    """The run's trainer with its last network, or that of a file weights-*.pt, in evaluation mode; `runtime` says where to compute."""
    import torch

    from experiments.train import make_trainer

    cfg = OmegaConf.load(run.path / "config.yaml")
    assert isinstance(cfg, DictConfig)
    cfg.runtime = runtime  # the run's own may name another machine's device and folders
    trainer = make_trainer(cfg)
    state = torch.load(kept or run.path / "checkpoint.pt", map_location=trainer.device, weights_only=True)
    trainer.net.load_state_dict(state if kept else state["net"])
    trainer.net.eval()
    return trainer
