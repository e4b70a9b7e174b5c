"""Overrides -> configs, and a ragged list of jobs -> Hydra's own launcher: this process, several, or a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hydra._internal.callbacks import Callbacks  # the one internal import; hydra-core is pinned to 1.3
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf, open_dict


def compose(overrides: Sequence[str], seeds: Iterable[int]) -> list[DictConfig]:
    """The run that these overrides of `conf/config.yaml` describe, once for each seed: composed once, because that takes time."""
    loader = GlobalHydra.instance().config_loader()
    cfg = loader.load_configuration("config", overrides=list(overrides), run_mode=RunMode.RUN, from_shell=False)
    with open_dict(cfg):
        del cfg["hydra"]
    OmegaConf.resolve(cfg)
    configs = [cfg.copy() for _ in seeds]
    for config, seed in zip(configs, seeds, strict=True):
        config.seed = seed
    return configs


def launch(task: Callable[..., Any], jobs: Sequence[Sequence[str]]) -> Sequence[JobReturn]:
    """Run `task` once for each list of overrides, on the launcher chosen on the command line; does what a Hydra sweeper does.

    A job that raises does not stop the others: its status says so, and reading its `return_value` raises.
    """
    hydra, outer = GlobalHydra.instance().hydra, HydraConfig.instance().cfg
    assert hydra is not None and outer is not None
    overrides = list(HydraConfig.get().overrides.hydra)  # the launcher and its options
    cfg = hydra.compose_config("config", overrides, run_mode=RunMode.MULTIRUN)
    context = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks(cfg))
    try:
        launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=cfg)
        return launcher.launch([list(job) for job in jobs], initial_job_idx=0)
    finally:
        HydraConfig.instance().cfg = outer
