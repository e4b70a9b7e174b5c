"""Launchers train the runs that a table lacks: in turn, side by side, or as jobs of submitit, on this machine or on a SLURM cluster.

Hydra's own words choose one (`hydra/launcher=submitit_slurm hydra.launcher.partition=gpu`). submitit's options and joblib's n_jobs are
read from the composed config. Sweeps (`-m`) use Hydra's launchers as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from experiments import store, timebox
from experiments.config import ConfigError, first_line
from experiments.launching import slurm
from experiments.launching.devices import cores, places, uses_gpu
from experiments.launching.processes import apart, kill_all

if TYPE_CHECKING:
    import submitit

Task = Callable[[DictConfig], None]  # trains one run
Compose = Callable[[], DictConfig]  # makes a run's config when its turn comes: composing takes time
REQUEUES = 100  # how often SLURM may requeue a job whose time is up, unless the command line says otherwise
LARGEST_ARRAY = 1000  # jobs; SLURM's default limit
_composing = Lock()  # Hydra composes one config at a time


@dataclass
class Launcher:
    """Where runs are trained. root: the folder of runs. overrides: what the launcher adds to those of every run."""

    root: Path
    overrides: tuple[str, ...] = field(default=(), kw_only=True)

    def submit(self, task: Task, jobs: Mapping[str, Compose]) -> list[Exception]:
        """Run `task` on the config of every job, by run id, and wait for them; on a cluster only submit them.

        A job that raises does not stop the others. Returns what they raised, TimeUp for those that the command's time box did not start.
        """
        raise NotImplementedError

    def alive(self) -> dict[str, slurm.Job]:
        """The runs of this store that SLURM has in its hands, whichever command submitted them. Waits while SLURM does not answer."""
        return slurm.alive(self.root)


def chosen(runtime: DictConfig) -> Launcher:
    """The launcher that the command line asks for. Raises ConfigError for one that cannot be used here."""
    name, root = _name(), Path(runtime.runs)
    if name == "basic":
        return InTurn(root) if places(runtime) == 1 else SideBySide(root, places(runtime))
    if name == "joblib":
        wanted = HydraConfig.get().launcher.n_jobs
        if wanted < 1 and wanted != -1:
            raise ConfigError(f"hydra.launcher.n_jobs: {wanted} is not allowed; it must be a whole number of at least 1, or -1: all cores")
        count = wanted if wanted > 0 else cores()
        a_device = max(runtime.runs_per_device, math.ceil(count / len(runtime.devices or [0])))
        return SideBySide(root, count, overrides=(f"runtime.runs_per_device={a_device}",))
    if name not in ("submitit_local", "submitit_slurm"):
        raise ConfigError(f"hydra/launcher: {name} is not allowed here; allowed: basic, joblib, submitit_local, submitit_slurm")
    if runtime.time_limit is not None:
        raise ConfigError(f"runtime.time_limit: {name} has a limit of its own for each job, hydra.launcher.timeout_min")
    return Submitit(root, name.removeprefix("submitit_"), places(runtime))


def on_cluster() -> bool:
    """Whether the command line asks for SLURM."""
    return _name() == "submitit_slurm"


def in_shared_process() -> bool:
    """Whether this is a job of a Hydra sweep (`-m`) whose process goes on with other jobs."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN and _name() in ("basic", "joblib")


def _name() -> str:
    return HydraConfig.get().runtime.choices["hydra/launcher"]


def _attempt(task: Task, compose: Compose) -> list[Exception]:
    try:
        with _composing:
            cfg = compose()
        timebox.check(cfg.runtime)
        task(cfg)
    except Exception as error:
        return [error]
    return []


class InTurn(Launcher):
    """One run after another in this process. On a GPU each run has a process of its own, because a CUDA failure ends the process."""

    def submit(self, task: Task, jobs: Mapping[str, Compose]) -> list[Exception]:
        def train(cfg: DictConfig) -> None:
            apart(task, cfg) if uses_gpu(cfg.runtime) else task(cfg)

        return [error for compose in jobs.values() for error in _attempt(train, compose)]


@dataclass
class SideBySide(Launcher):
    """`places` runs at a time, each in a process of its own."""

    places: int

    def submit(self, task: Task, jobs: Mapping[str, Compose]) -> list[Exception]:
        pool = ThreadPoolExecutor(self.places)
        try:
            return [*chain(*pool.map(partial(_attempt, partial(apart, task)), jobs.values()))]
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            kill_all()
            raise


@dataclass
class Submitit(Launcher):
    """Jobs of submitit. cluster: `slurm` is given all jobs at once, `local` (processes on this machine) `places` at a time.

    What a job raises is not returned: it is in the folder of its run.
    """

    cluster: str
    places: int

    def submit(self, task: Task, jobs: Mapping[str, Compose]) -> list[Exception]:
        """Raises ConfigError when there is no sbatch, or when it refuses."""
        if self.cluster == "local":
            ids = list(jobs)
            for start in range(0, len(ids), self.places):
                if timebox.terminated:
                    break
                for job in self._array([Requeueable(task, jobs[identity]()) for identity in ids[start : start + self.places]]):
                    job.wait()
            return []
        with slurm.turn(self.root):  # another command may have submitted some of them since they were found missing
            queue = slurm.alive(self.root, tidy=True)  # first: a job that ends in between has then left its files
            begun = {identity for identity, run in store.find(self.root, jobs).items() if run.state in ("running", "done", "diverged")}
            ids = [identity for identity in jobs if identity not in begun | queue.keys()]
            for start in range(0, len(ids), LARGEST_ARRAY):
                some = ids[start : start + LARGEST_ARRAY]
                array = [Requeueable(task, jobs[identity]()) for identity in some]
                name = slurm.note(self.root, some)
                self._array(array, name=name)
                print(f"{len(some)} runs are submitted to SLURM, as {name}", flush=True)
        return []

    def _array(self, jobs: Sequence[Requeueable], **more: Any) -> Sequence[submitit.Job[None]]:
        import submitit

        given = {word.lstrip("+").partition("=")[0] for word in HydraConfig.get().overrides.hydra}
        settings: Any = OmegaConf.to_container(HydraConfig.get().launcher, resolve=True)
        if "hydra.launcher.submitit_folder" not in given:
            settings["submitit_folder"] = str(self.root / ".submitit" / "%j")
        if "hydra.launcher.max_num_timeout" not in given and self.cluster == "slurm":
            settings["max_num_timeout"] = REQUEUES
        folder, _ = settings.pop("submitit_folder"), settings.pop("_target_")
        made = {"slurm_max_num_timeout": settings.pop("max_num_timeout")} if self.cluster == "slurm" else {}
        settings = {f"{self.cluster}_{key}": value for key, value in (settings | more).items()}
        try:
            executor = submitit.AutoExecutor(folder, self.cluster, **made)
            executor.update_parameters(**settings)
            return executor.submit_array(jobs)
        except (RuntimeError, OSError, ValueError, NameError) as error:
            raise ConfigError(f"hydra/launcher: {first_line(error)}") from error


@dataclass
class Requeueable:
    """What a job of submitit does."""

    task: Task
    cfg: DictConfig

    def __call__(self) -> None:
        self.task(self.cfg)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What SLURM requeues when the job's time is up: the same job. Its run continues from its checkpoint."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)
