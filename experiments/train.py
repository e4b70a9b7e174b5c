"""One run: config -> bundle, net, methods -> trainer -> result.json.   python -m experiments.train --help

torch is imported inside the functions: `--help` and the printing of tables do without it.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import sys
import time
import traceback
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from experiments import cost, store, timebox
from experiments.cli import BAD_INPUT, RunFailed, main, one_line
from experiments.config import ConfigError, build, check, first_line, resolve
from experiments.devices import device, places
from experiments.identity import run_dir, run_id

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from data.bundle import Bundle
    from experiments.trainer import Trainer

QUIET_SECONDS = 10  # an epoch's line goes to the run's log always, to the console at most this often


def train(cfg: DictConfig) -> None:
    """The task that Hydra runs. A run that is done is only reported; one that another process trains is left to it.

    Raises ConfigError for bad input, RunFailed when the run raised (its folder has the traceback) or diverged, TimeUp when the command's
    time box does not hold it.
    """
    OmegaConf.resolve(cfg)
    check(cfg, targets=False)
    if _shared(cfg):
        from experiments.apart import apart

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


def _shared(cfg: DictConfig) -> bool:
    """Whether this process goes on with other runs, and uses a GPU, whose failure would be theirs too."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN or cfg.runtime.device == "cpu":
        return False
    import torch

    return HydraConfig.get().runtime.choices["hydra/launcher"] in ("basic", "joblib") and torch.cuda.is_available()


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
        print(f"{run.path}: done before, {_headline(cfg, run.metrics())}")
    elif run.state == "diverged":
        raise RunFailed(f"{run.path}: diverged before, {run.error()}")
    else:
        place = device(cfg.runtime, claim=True)
        known = _fits(cfg, run)
        trainer = make_trainer(cfg, place)  # bad input shows here, before anything is written
        try:
            if run.acquire() and run.state not in ("done", "diverged"):  # another process may have finished it in the meantime
                _fit(cfg, run, trainer if _restore(run, trainer) else make_trainer(cfg, place), known)
        except OSError as error:  # a full disk, say: no failure of the run
            raise ConfigError(f"runtime.runs: {cfg.runtime.runs} cannot be written ({error.strerror or first_line(error)})") from error
        finally:
            run.release()


def _fits(cfg: DictConfig, run: store.Run) -> bool:
    """Whether stored runs tell how long this one takes. Raises TimeUp when that is longer than the command's time box."""
    left = timebox.left(cfg.runtime)
    if math.isinf(left):
        return True
    needed = cost.remaining(cfg, run, cost.stored(Path(cfg.runtime.runs)))
    if left <= 0 or needed > left:
        raise timebox.TimeUp("not started")
    return not math.isnan(needed)


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


def _fit(cfg: DictConfig, run: store.Run, trainer: Trainer, known: bool) -> None:
    """Train it to its end. Raises TimeUp, after a checkpoint, when the command's time box does not hold another epoch.

    known: whether it is known that the whole run fits; else its first epoch tells.
    """
    from tqdm import tqdm

    from experiments.provenance import commit, facts, sources
    from experiments.trainer import Diverged

    commit(), sources(cfg)  # as they are now: the code that runs, whatever happens to the files meanwhile; both are remembered
    run.write_config(cfg)
    board = None
    bar = tqdm(total=trainer.length.steps, initial=trainer.step, desc=run.path.name, disable=None, leave=False)
    summary: dict[str, Any] = {}
    shown = time.monotonic()
    began: float | None = None  # of the first epoch here, after its first step, which pays for what later ones find ready

    def tick() -> None:
        nonlocal began
        began = began or time.monotonic()
        bar.update()

    try:
        if trainer.epoch == 0:
            keep_weights(cfg, run, trainer)
        while trainer.epoch < trainer.epochs:
            first = len(trainer.rows)
            trainer.train_epoch(tick)
            took = time.monotonic() - (began or math.inf)
            if board is None:  # not earlier: the first step need not wait for TensorBoard's imports
                from experiments.board import open_board

                board = open_board(run.path, cfg, trainer.rows[:first])
            needed = took * (1 if known else trainer.epochs - trainer.epoch)
            known, up = True, trainer.epoch < trainer.epochs and needed > timebox.left(cfg.runtime)
            record(cfg, run, trainer, board, first)
            if up or trainer.epoch % cfg.runtime.checkpoint_every == 0 or trainer.epoch == trainer.epochs:
                checkpoint(run, trainer, took)
            line = f"epoch {trainer.epoch}/{trainer.epochs}: {_headline(cfg, trainer.rows)}, {trainer.seconds:.1f} s"
            with open(run.path / "train.log", "a") as log:
                log.write(line + "\n")
            if bar.disable and time.monotonic() - shown > QUIET_SECONDS:
                print(f"{run.path.name} {line}", flush=True)
                shown = time.monotonic()
            began = time.monotonic()
            if up:
                print(f"{run.path}: ends at epoch {trainer.epoch} of {trainer.epochs}, the time is up", flush=True)
                raise timebox.TimeUp("ended at a checkpoint")
    except (ConfigError, OSError, timebox.TimeUp):  # a probe that is not for this run, a disk that is full: no failure of the run
        raise
    except Exception as error:
        if not isinstance(error, Diverged):
            run.fail(traceback.format_exc())
            what = f"{type(error).__name__}: {first_line(error)}"
            raise RunFailed(f"{run.path}: failed, {what} (the traceback is in error.txt there)") from error
        summary["diverged"] = str(error)
        run.log(trainer.rows)
    finally:
        bar.close()
        if board is not None:
            board.close()
    run.finish(summary | facts(cfg, trainer))
    if summary:
        raise RunFailed(f"{run.path}: diverged, {summary['diverged']}")
    print(f"{run.path}: {_headline(cfg, trainer.rows)}, {trainer.seconds:.1f} s", flush=True)


def record(cfg: DictConfig, run: store.Run, trainer: Trainer, board: SummaryWriter, first: int) -> None:
    """What every epoch leaves in the run's folder: the evaluations from row `first` on, and the network where it is to be kept."""
    from experiments.board import add

    for row in trainer.rows[first:]:
        add(board, row)
    board.flush()
    run.log(trainer.rows)
    keep_weights(cfg, run, trainer)


def checkpoint(run: store.Run, trainer: Trainer, epoch_seconds: float) -> None:
    """What the run goes on from, and how far that is."""
    save(run.path / "checkpoint.pt", trainer.state())
    run.advance(trainer.epoch, trainer.epochs, trainer.step, epoch_seconds)


def save(path: Path, state: dict[str, Any]) -> None:
    """Tensors as a file. torch hides what the disk said behind a RuntimeError."""
    import torch

    with store.written(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def keep_weights(cfg: DictConfig, run: store.Run, trainer: Trainer) -> None:
    """The network as it is, for figures that compare epochs: at first, and whenever so many epochs of the printed protocol are over."""
    if not cfg.runtime.keep_weights:
        return
    printed = -(-trainer.length.printed // trainer.length.full)  # epochs; a profile makes fewer of them, or of iterations a part of one
    turns = [int(epoch * printed / trainer.epochs / cfg.runtime.keep_weights + 1e-6) for epoch in (trainer.epoch - 1, trainer.epoch)]
    if trainer.epoch == 0 or turns[0] < turns[1]:
        save(run.path / f"weights-{trainer.epoch:04d}.pt", trainer.net.state_dict())


def _headline(cfg: DictConfig, rows: list[dict[str, float]]) -> str:
    shown = {f"train/{cfg.loss}": f"train {cfg.loss} {{:.4f}}", "test/ce": "test ce {:.4f}", "test/accuracy": "accuracy {:.2f} %"}
    if getattr(resolve(cfg.dataset, "dataset"), "headline", None) == "perplexity":
        shown = {f"{split}/perplexity": f"{split} perplexity {{:.2f}}" for split in ("train", "valid", "test")}
    return ", ".join(text.format(rows[-1][name]) for name, text in shown.items() if rows and name in rows[-1])


def _restore(run: store.Run, trainer: Trainer) -> bool:
    """Go on from the checkpoint, if there is one. False when it cannot be read: it is removed, and the trainer may be half loaded."""
    import torch

    path = run.path / "checkpoint.pt"
    if not path.exists():
        return True
    try:
        if (broken := zipfile.ZipFile(path).testzip()) is not None:  # torch itself does not compare checksums
            raise ValueError(f"{broken} is damaged")
        trainer.load(torch.load(path, map_location=trainer.device, weights_only=True))
    except Exception as error:
        print(f"retable: {path} cannot be read ({first_line(error)}); the run starts again", file=sys.stderr)
        path.unlink()
        return False
    return True


def _keep_freed_memory() -> None:
    """Else glibc hands large freed blocks back, and each step pays for mapping and clearing them: a fifth of ITDM-c's on a CPU."""
    mmap_max, trim_threshold = -4, -1  # mallopt's names for them
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)


def _threads(runtime: DictConfig) -> int:
    """All cores, or those that a cluster has given, shared by the runs that are trained side by side."""
    given = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = places(runtime)
    if HydraConfig.initialized():
        jobs = HydraConfig.get().launcher.get("n_jobs", jobs)
    return 1 if jobs < 0 else max(1, int(given or cores) // jobs)


if __name__ == "__main__":
    from experiments.train import train as task  # by its importable name: launchers hand it to other processes

    with timebox.heeding_sigterm():
        main(task, "config")
