"""Trainers that finish in a fraction of a second, and comparisons of what they leave."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import hydra
import pytest
import torch
from nets import composed
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from data.bundle import Batch
from experiments.cli import CONF
from experiments.config import check, options
from experiments.train import make_trainer
from experiments.trainer import Trainer

SMALL = ["dataset=digits", "model=net2c", "norm=bn", "epochs=2", "batch_size=20", "profile.train=100", "profile.test=60"]
METHODS = [name for name in options("method") if name != "vanilla"]
COMPOSED = composed("net2c")


@pytest.fixture(autouse=True, scope="module")
def data_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps caches and data in a temporary folder. Modules that import this fixture use it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("DATA_DIR", str(tmp_path_factory.mktemp("data")))
        yield


def config(*overrides: str) -> DictConfig:
    return copy.deepcopy(checked(*overrides))  # composing takes twenty times as long


@functools.cache
def checked(*overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("config", [*SMALL, "runtime.threads=1", "runtime.device=cpu", *overrides])
    OmegaConf.resolve(cfg)
    check(cfg)
    return cfg


def trainer(*overrides: str) -> Trainer:
    return make_trainer(config(*overrides))


def train(*overrides: str, epochs: int = 2) -> Trainer:
    made = trainer(*overrides)
    for _ in range(epochs):
        made.train_epoch()
    return made


def strength(method: str) -> str | None:
    """The option that is the method's weight, or None."""
    node = OmegaConf.load(CONF / "method" / f"{method}.yaml")
    return next((f"method.{method}.{key}" for key in ("weight", "smoothing", "prob") if key in node), None)


def same(one: Any, two: Any) -> bool:
    """Equal bit for bit, however nested."""
    if isinstance(one, Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(value, two[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(same(a, b) for a, b in zip(one, two, strict=True))
    return one == two


def parameters(made: Trainer) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in made.net.named_parameters()}


def buffers(made: Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in made.net.named_buffers()}


def watch(made: Trainer, see: Callable[[Batch, Batch | None], None]) -> Trainer:
    """Calls `see` with the batches of each step before the step."""
    step = made.train_step
    made.train_step = lambda *batches: (see(*batches), step(*batches))[1]  # type: ignore[method-assign]
    return made
