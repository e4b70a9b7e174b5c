"""One run: config -> bundle, net, methods -> trainer.   python -m experiments.train --help

torch is imported inside the functions: `--help` and the printing of tables do without it.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from experiments import cost, store, timebox
from experiments.cli import BAD_INPUT, RunFailed, main, one_line
from experiments.config import ConfigError, build, check, first_line, resolve
from experiments.fit import fit, headline, restore
from experiments.identity import run_dir, run_id
from experiments.launching.devices import cores, device, places, uses_gpu
from experiments.launching.launchers import in_shared_process
from experiments.launching.processes import apart

if TYPE_CHECKING:
    from data.bundle import Bundle
    from experiments.trainer import Trainer


def train(cfg: DictConfig) -> None:
    """The task that Hydra runs. A run that is done is only reported; one that another process trains is left to it.

    Raises ConfigError for bad input, RunFailed when the run raised (its folder has the traceback) or diverged, TimeUp when the command's
    time box does not hold it.
    """
    OmegaConf.resolve(cfg)
    check(cfg, targets=False)
    if in_shared_process() and uses_gpu(cfg.runtime):  # a GPU failure would end the other runs of this process
        return apart(_train, cfg)
    _train(cfg)


def job(cfg: DictConfig) -> None:
    """`train` where nobody waits for the answer: bad input, too, is left in the run's folder."""
    try:
        train(cfg)
    except BAD_INPUT as error:
        run = folder(cfg)
        run.path.mkdir(parents=True, exist_ok=True)
        run.fail(one_line(error))
        raise


def _train(cfg: DictConfig) -> None:
    check(cfg)
    if cfg.runtime.dry_run:
        from experiments.dry_run import describe

        print(describe(cfg))
        return
    run = folder(cfg)
    if run.state == "running":
        print(f"{run.path}: another process is training it")
    elif run.state == "done":
        print(f"{run.path}: done before, {headline(cfg, run.metrics())}")
    elif run.state == "diverged":
        raise RunFailed(f"{run.path}: diverged before, {run.error()}")
    else:
        seconds = needed(cfg, run)
        place = device(cfg.runtime, claim=True)
        trainer = make_trainer(cfg, place)  # bad input shows here, before anything is written
        try:
            if run.acquire() and run.state not in ("done", "diverged"):  # another process may have finished it in the meantime
                fit(cfg, run, trainer if restore(run, trainer) else make_trainer(cfg, place), known=not math.isnan(seconds))
        except OSError as error:  # a full disk, say: no failure of the run
            raise ConfigError(f"runtime.runs: {cfg.runtime.runs} cannot be written ({error.strerror or first_line(error)})") from error
        finally:
            run.release()


def needed(cfg: DictConfig, run: store.Run) -> float:
    """Seconds that the run takes, by stored runs of its kind on this device; nan where there are none, 0 without a time box.

    Raises TimeUp when that is more than the command's time box has left.
    """
    left = timebox.left(cfg.runtime)
    if math.isinf(left):
        return 0.0
    timebox.check(cfg.runtime)
    import torch

    from experiments.provenance import device_name

    seconds = cost.remaining(cfg, run, cost.stored(Path(cfg.runtime.runs), device_name(torch.device(device(cfg.runtime)))))
    if seconds > left:
        raise timebox.TimeUp("not started")
    return seconds


def folder(cfg: DictConfig) -> store.Run:
    """The run's folder: any below `runtime.runs` that ends in its id, else the one its config names."""
    root, identity = Path(cfg.runtime.runs), run_id(cfg)
    return store.find(root, [identity]).get(identity, store.Run(root / run_dir(cfg)))


def make_trainer(cfg: DictConfig, place: str | None = None) -> Trainer:
    """Everything a config describes, built and seeded, on its device. Raises ConfigError when something cannot be built.

    place: the device that was claimed for it.
    """
    import torch

    from experiments.rng import generator
    from experiments.trainer import Trainer

    place = place or device(cfg.runtime)
    if cfg.step == "graph" and place == "cpu":
        raise ConfigError("step: graph needs a GPU; allowed here: eager")
    _keep_freed_memory()
    torch.set_num_threads(cfg.runtime.threads or _threads(cfg.runtime))
    torch.backends.cudnn.benchmark = cfg.cudnn_benchmark and not cfg.deterministic
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # allowed both for cuBLAS and for cuDNN's recurrent layers
    if cfg.deterministic != torch.are_deterministic_algorithms_enabled():  # asked first: setting it imports torch's compiler
        torch.use_deterministic_algorithms(cfg.deterministic)
    # TF32 for convolutions and recurrent layers; matrix products stay in float32, so that the methods' maths does
    torch.backends.cudnn.allow_tf32 = cfg.precision == "tf32"

    bundle = make_bundle(cfg, place)
    torch.manual_seed(generator(cfg.seed, "init", "cpu").initial_seed())
    net = build(cfg.model, "model", num_classes=bundle.num_classes, _partial_=False).to(place)
    regularizers = {name: build(node, f"method.{name}") for name, node in cfg.method.items()}
    schedule = build(cfg.schedule, "schedule")
    try:
        schedule(0.0, 0.0, [] if "valid" in bundle.splits else None)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"schedule: {first_line(error)}") from error
    return Trainer(cfg, bundle, net, regularizers, schedule, None if cfg.probe is None else build(cfg.probe, "probe"))


def make_bundle(cfg: DictConfig, device: str) -> Bundle:
    """The config's data set, on the device."""
    runtime, profile = cfg.runtime, cfg.profile
    extra: dict[str, Any] = {"data_dir": runtime.data_dir, "download": runtime.download, "device": device}
    extra |= {split: count for split in ("train", "test") if (count := profile[split]) is not None}
    if profile.embedded:
        extra["source"] = "embedded"
        if getattr(resolve(cfg.dataset, "dataset"), "num_classes", 10) > 10:  # than digits have: a few images are enough for ten
            extra["classes"] = 10
    return build(cfg.dataset, "dataset", **extra)


def _keep_freed_memory() -> None:
    """Else glibc hands large freed blocks back, and each step pays for mapping and clearing them: a fifth of ITDM-c's on a CPU."""
    mmap_max, trim_threshold = -4, -1  # mallopt's names for them
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)


def _threads(runtime: DictConfig) -> int:
    """All cores, shared by the runs that are trained side by side."""
    jobs = places(runtime)
    if HydraConfig.initialized():
        jobs = HydraConfig.get().launcher.get("n_jobs", jobs)
    return 1 if jobs < 0 else max(1, cores() // jobs)


if __name__ == "__main__":
    from experiments.train import train as task  # by its importable name: launchers hand it to other processes

    with timebox.heeding_sigterm():
        main(task, "config")
