"""Sides whose step is an epoch: the whole suite and the usual loop, passes over the images, two runs at a time."""

from __future__ import annotations

import contextlib
import multiprocessing
import tempfile
from collections.abc import Generator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from data.augment import prepared
from data.bundle import Bundle
from experiments import store
from experiments.bench.peers import crops, loader_passes, usual_loop
from experiments.bench.sides import Side, images
from experiments.board import open_board
from experiments.cli import RunFailed
from experiments.config import build
from experiments.fit import checkpoint, record
from experiments.train import make_trainer
from experiments.trainer import Trainer

# An evaluation at each epoch's end and nowhere else, however many epochs a row takes; each image once per epoch, as in the usual loop.
EPOCHS = ("evaluate.every=null", "epochs=100000", "balanced=false")


def sized(cfg: DictConfig, bundle: Bundle, train: int | None) -> Bundle:
    """The bundle with so many training images, its own over and over, and a fifth as many test images. None: its own training images."""
    counts = {"train": train or len(images(cfg, bundle).splits["train"][1])}
    counts["test"] = max(1, counts["train"] // 5)
    splits = {}
    for split, count in counts.items():
        x, y = bundle.splits[split]
        chosen = torch.arange(count, device=y.device) % len(y)
        splits[split] = x[chosen], y[chosen]
    augment = bundle.augment
    if augment is not None:  # it has the images
        augment = prepared(crops(splits["train"][0], cfg), bundle.prepare)
    return replace(bundle, splits=splits, augment=augment)


def whole_suite(cfg: DictConfig, train: int | None) -> Side:
    """What experiments.train does per epoch: training, evaluation, and what that leaves in the run's folder."""
    made = make_trainer(cfg)
    net = build(cfg.model, "model")(num_classes=made.bundle.num_classes).to(made.device)
    trainer = Trainer(cfg, sized(cfg, made.bundle, train), net, {}, made.schedule)

    def epochs() -> Generator[None, None, None]:
        with tempfile.TemporaryDirectory() as folder:
            run = store.Run(Path(folder))
            with contextlib.closing(open_board(run.path, cfg, [])) as board:
                while True:
                    known = len(trainer.rows)
                    trainer.train_epoch()
                    record(cfg, run, trainer, board, known)
                    checkpoint(run, trainer, 0)
                    yield

    endless = epochs()
    warm = 1 if cfg.step == "eager" else 2
    return Side(lambda: next(endless), trainer.device, cfg.precision == "tf32", warm, endless.close)


def usual(cfg: DictConfig, train: int | None) -> Side:
    """The usual loop's epoch on as many images."""
    made = make_trainer(cfg)
    net = build(cfg.model, "model")(num_classes=made.bundle.num_classes).to(made.device)
    endless = usual_loop(net, sized(cfg, images(cfg, made.bundle), train), cfg)
    return Side(lambda: next(endless), made.device, True, 1, endless.close)  # torch's default on a GPU: TF32 convolutions


def resident(cfg: DictConfig, bundle: Bundle) -> Side:
    """A pass over the training images by the suite: an epoch's order, and every batch of it, augmented and normalised."""
    device = bundle.splits["train"][1].device
    rng = torch.Generator(device).manual_seed(cfg.seed)

    def one_pass() -> None:
        for chosen in bundle.order(rng, balanced=False).split(cfg.batch_size):
            bundle.take(chosen, rng)

    return Side(one_pass, device)


def loaded(cfg: DictConfig, bundle: Bundle, workers: int) -> Side:
    """The same by a DataLoader."""
    endless = loader_passes(images(cfg, bundle), cfg, workers)
    return Side(lambda: next(endless), bundle.splits["train"][1].device, close=endless.close)


def side_by_side(cfg: DictConfig) -> Side:
    """An epoch of each of two runs at the same time, in two processes with one thread each."""

    def epochs() -> Generator[None, None, None]:
        context = multiprocessing.get_context("spawn")  # a process that has computed with several threads must not fork
        with contextlib.ExitStack() as stack:
            ends = []
            for seed in (1, 2):
                mine, theirs = context.Pipe()
                single = OmegaConf.merge(cfg, {"seed": seed, "runtime": {"threads": 1}})
                process = context.Process(target=trains_on_demand, args=(theirs, single), daemon=True)
                process.start()
                theirs.close()
                stack.callback(process.join)
                stack.callback(mine.close)  # which ends the process
                ends.append(mine)
            while True:
                for end in ends:
                    end.send(True)
                try:
                    for end in ends:
                        end.recv()
                except EOFError:
                    raise RunFailed("sweep: the process of a run ended") from None
                yield

    endless = epochs()
    return Side(lambda: next(endless), torch.device("cpu"), close=endless.close)


def trains_on_demand(end: Connection, cfg: DictConfig) -> None:
    """The process of a run: an epoch for each message, and a message after it, until the other end is closed."""
    with contextlib.suppress(KeyboardInterrupt, EOFError):
        trainer = make_trainer(cfg)
        while end.recv():
            trainer.train_epoch()
            trainer.synchronise()
            end.send(True)


def in_turn(cfg: DictConfig) -> Side:
    """An epoch of each of the two, one after the other, in this process with all its threads."""
    trainers = [make_trainer(OmegaConf.merge(cfg, {"seed": seed})) for seed in (1, 2)]  # type: ignore[arg-type]

    def one_epoch_each() -> None:
        for trainer in trainers:
            trainer.train_epoch()

    return Side(one_epoch_each, trainers[0].device)
