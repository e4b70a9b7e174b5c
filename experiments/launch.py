"""Overrides -> configs, and a ragged list of jobs -> Hydra's own launcher: this process, several, or a cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks  # these internal imports: hydra-core is pinned to 1.3
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from experiments.config import ConfigError, first_line

TIMES = 100  # a run whose time on the cluster is up goes on in the queue so often, unless the command line says otherwise


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


def launcher() -> str:
    """The name of the launcher that was chosen on the command line."""
    return HydraConfig.get().runtime.choices["hydra/launcher"]


def launch(task: Callable[..., Any], jobs: Sequence[Sequence[str]], root: Path, name: str = "") -> list[Exception | None]:
    """Run `task` once for each list of overrides, on the launcher chosen on the command line; does what a Hydra sweeper does.

    A job that raises does not stop the others. Returns what each raised; of submitit's launchers nothing: on this machine the jobs are
    over then, on a cluster they have just been submitted, as an array called `name`. Raises ConfigError when they cannot be.
    root: the folder of runs, for submitit's own files.
    """
    hydra, outer, chosen = GlobalHydra.instance().hydra, HydraConfig.instance().cfg, launcher()
    assert hydra is not None and outer is not None
    overrides = list(HydraConfig.get().overrides.hydra)  # the launcher and its options
    if chosen.startswith("submitit"):
        folder = str(root / ".submitit" / "%j").replace("'", r"\'")
        overrides = [f"hydra.launcher.submitit_folder='{folder}'", *overrides]
    if chosen == "submitit_slurm":
        overrides = [f"hydra.launcher.max_num_timeout={TIMES}", *overrides, f"hydra.launcher.name={name}"]
    cfg = hydra.compose_config("config", overrides, run_mode=RunMode.MULTIRUN)
    context = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks(cfg))
    try:
        engine = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=cfg)
        words = [list(job) for job in jobs]
        if chosen.startswith("submitit"):
            _submit(engine, words)
            return []
        returned = engine.launch(words, initial_job_idx=0)
        return [done._return_value if done.status == JobStatus.FAILED else None for done in returned]
    except BrokenExecutor as error:  # joblib's, of which a worker was killed
        return [error]
    finally:
        HydraConfig.instance().cfg = outer


def _submit(engine: Launcher, jobs: Sequence[Sequence[str]]) -> None:
    """Submitit's launcher submits, then waits for what the jobs return: for ever, if one was killed hard and the cluster keeps no
    accounts. Here it submits only, and jobs on this machine are waited for by their processes."""
    import submitit

    plain = submitit.Job.results
    submitit.Job.results = lambda job: [job]  # type: ignore
    try:
        started: Sequence[Any] = engine.launch(jobs, initial_job_idx=0)
    except (RuntimeError, OSError, ValueError) as error:  # there is no sbatch, or it refuses
        raise ConfigError(f"hydra/launcher: {first_line(error)}") from error
    finally:
        submitit.Job.results = plain  # type: ignore
    while any(isinstance(job, submitit.LocalJob) and not job.done() for job in started):
        time.sleep(0.1)
