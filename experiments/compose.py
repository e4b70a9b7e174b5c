"""Overrides -> a run's config, by Hydra. Composing is cached: the runs of a table differ in few groups."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import lru_cache

from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl  # these internal imports: hydra-core is pinned to 1.3
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from experiments.cli import CONF
from experiments.config import check


def compose(overrides: Sequence[str]) -> DictConfig:
    """The run that these overrides of `conf/config.yaml` describe, as Hydra composes it.

    A table has many runs of the same groups, and choosing groups is what takes time: it is done once for them.
    """
    loader = GlobalHydra.instance().config_loader()
    groups, parser = _parser(loader)
    parsed = parser.parse_overrides(list(overrides))
    cfg = _chosen(loader, tuple(str(each.input_line) for each in parsed if each.key_or_group in groups)).copy()
    ConfigLoaderImpl._apply_overrides_to_config([each for each in parsed if each.key_or_group not in groups], cfg)
    OmegaConf.resolve(cfg)
    return cfg


def composed(overrides: Sequence[str]) -> DictConfig:
    """The config that these overrides describe, resolved and checked, in a task of Hydra's or outside of one."""
    inside = GlobalHydra.instance().is_initialized()
    with contextlib.nullcontext() if inside else initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(overrides)
    check(cfg)
    return cfg


@lru_cache(maxsize=1)
def _parser(loader: ConfigLoader) -> tuple[set[str], OverridesParser]:
    """The names of the config groups, and the parser of overrides."""
    return {*loader.list_groups("")}, OverridesParser.create(loader)


@lru_cache(maxsize=1024)
def _chosen(loader: ConfigLoader, groups: tuple[str, ...]) -> DictConfig:
    cfg = loader.load_configuration("config", overrides=list(groups), run_mode=RunMode.RUN, from_shell=False)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg
