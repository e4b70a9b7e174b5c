"""A trainer trained to its end: what each epoch leaves in the run's folder, its checkpoints, its result."""

from __future__ import annotations

import sys
import time
import traceback
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from experiments import store, timebox
from experiments.cli import RunFailed
from experiments.config import ConfigError, first_line, resolve

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from experiments.trainer import Trainer

SURE_SECONDS = 5  # of steps that tell how long their epoch will take
QUIET_SECONDS = 10  # an epoch's line goes to the run's log always, to the console at most this often


def fit(cfg: DictConfig, run: store.Run, trainer: Trainer, known: bool) -> None:
    """Train the run to its end. Raises TimeUp, after a checkpoint, when another epoch would not end within the command's time box.

    known: whether the whole run is expected to end in time; else that is judged by its first epoch. A first epoch that turns out to be too
    long is given up.
    """
    from tqdm import tqdm

    from experiments.provenance import commit, device_name, facts, sources
    from experiments.trainer import Diverged

    commit(), sources(cfg)  # as they are now: the code that runs, whatever happens to the files meanwhile; both are remembered
    run.write_config(cfg)
    (run.path / "error.txt").unlink(missing_ok=True)  # of a try before
    board = None
    bar = tqdm(total=trainer.length.steps, initial=trainer.step, desc=run.path.name, disable=None, leave=False)
    summary: dict[str, Any] = {}
    shown = time.monotonic()
    began: float | None = None  # the epoch's start; of the first epoch here after its first step, which includes one-time set-up
    steps = 0  # since then

    def first_epoch() -> None:
        """After each step of it: whether it ends in time is not known before."""
        nonlocal began, steps
        bar.update()
        if began is None:
            began, steps = time.monotonic(), 0
            return
        steps += 1
        took = time.monotonic() - began
        epoch = took / steps * trainer.steps_per_epoch
        if took > SURE_SECONDS and epoch - took > timebox.left(cfg.runtime) and not timebox.terminated:
            run.advance(trainer.epoch, trainer.epochs, trainer.steps_per_epoch, epoch, device_name(trainer.device))
            raise timebox.TimeUp("the epoch does not end in time")

    try:
        if trainer.epoch == 0:
            keep_weights(cfg, run, trainer)
        while trainer.epoch < trainer.epochs:
            first = len(trainer.rows)
            trainer.train_epoch(bar.update if began else first_epoch)
            assert began is not None
            took = time.monotonic() - began
            if board is None:  # not earlier: the first step need not wait for TensorBoard's imports
                from experiments.board import open_board

                board = open_board(run.path, cfg, trainer.rows[:first])
            needed = took * (1 if known else trainer.epochs - trainer.epoch)
            known, up = True, trainer.epoch < trainer.epochs and needed > timebox.left(cfg.runtime)
            record(cfg, run, trainer, board, first)
            if up or trainer.epoch % cfg.runtime.checkpoint_every == 0 or trainer.epoch == trainer.epochs:
                checkpoint(run, trainer, took)
            line = f"epoch {trainer.epoch}/{trainer.epochs}: {headline(cfg, trainer.rows)}, {trainer.seconds:.1f} s"
            with open(run.path / "train.log", "a") as log:
                log.write(line + "\n")
            if bar.disable and time.monotonic() - shown > QUIET_SECONDS:
                print(f"{run.path.name} {line}", flush=True)
                shown = time.monotonic()
            began = time.monotonic()
            if up:
                print(f"{run.path}: stops at epoch {trainer.epoch} of {trainer.epochs}, with a checkpoint", flush=True)
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
    print(f"{run.path}: {headline(cfg, trainer.rows)}, {trainer.seconds:.1f} s", flush=True)


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
    from experiments.provenance import device_name

    save(run.path / "checkpoint.pt", trainer.state())
    run.advance(trainer.epoch, trainer.epochs, trainer.steps_per_epoch, epoch_seconds, device_name(trainer.device))


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


def headline(cfg: DictConfig, rows: list[dict[str, float]]) -> str:
    shown = {f"train/{cfg.loss}": f"train {cfg.loss} {{:.4f}}", "test/ce": "test ce {:.4f}", "test/accuracy": "accuracy {:.2f} %"}
    if getattr(resolve(cfg.dataset, "dataset"), "headline", None) == "perplexity":
        shown = {f"{split}/perplexity": f"{split} perplexity {{:.2f}}" for split in ("train", "valid", "test")}
    return ", ".join(text.format(rows[-1][name]) for name, text in shown.items() if rows and name in rows[-1])


def restore(run: store.Run, trainer: Trainer) -> bool:
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
