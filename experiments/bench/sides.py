"""The two sides of a row: what is timed, and how they take turns."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from data.bundle import Bundle
from experiments.bench.configs import Asked
from experiments.bench.peers import minimal_loop
from experiments.config import ConfigError, build
from experiments.graph import WARM_UP
from experiments.train import make_trainer
from experiments.trainer import Trainer
from regularizers.mmd import classwise_mmd, mmd

NOISY = 0.1  # interquartile range over median: beyond it a ratio is not fit to be published
SECONDS = 0.5  # of a side in a round
Row = dict[str, Any]


@dataclass
class Side:
    """One side of a row.

    step: the work that is timed: a training step, an epoch, a pass over the images.
    tf32: the global setting that it needs. warm: calls before the first that is timed. close: ends its processes.
    """

    step: Callable[[], object]
    device: torch.device
    tf32: bool = False
    warm: int = 1
    close: Callable[[], object] = lambda: None

    def seconds(self, steps: int) -> float:
        """Per step, until nothing is left to do on the device."""
        torch.backends.cudnn.allow_tf32 = self.tf32  # the other side may want it otherwise
        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda device: None
        wait(self.device)
        began = time.perf_counter()
        for _ in range(steps):
            self.step()
        wait(self.device)
        return (time.perf_counter() - began) / steps


def compare(
    row_id: str, what: str, over: str, good: str, sides: tuple[Side, Side], asked: Asked, faster: bool = False, scale: float = 1.0
) -> Row:
    """One row: the time of a step of the first side over the second's, taken in turns.

    faster: the other way round, so that the ratio says how many times faster the first side is. scale: a factor on the ratio,
    where the two sides' steps do not do the same amount of work. good: the target, or the direction.
    """
    try:
        times = turns(sides, asked)
    finally:
        for side in sides:
            side.close()
    ratios = [scale * (b / a if faster else a / b) for a, b in zip(*times, strict=True)]
    row = {"id": row_id, "what": what, "over": over} | spread(ratios)
    return row | {"good": good} | {f"ms {letter}": 1000 * statistics.median(times[i]) for i, letter in enumerate("ab")}


def turns(sides: tuple[Side, Side], asked: Asked) -> tuple[list[float], list[float]]:
    """Seconds per step of both sides, round by round."""
    steps = [pace(side, asked.steps) for side in sides]
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(asked.rounds):  # each begins every other round, so that a drift of the machine does not favour one
        for i in (0, 1) if turn % 2 else (1, 0):
            times[i].append(sides[i].seconds(steps[i]))
    return times


def pace(side: Side, steps: int | None) -> int:
    """Warm the side up. Returns its steps in a round: as asked, or as many as take half a second, at least one."""
    first = side.seconds(side.warm)  # allocates the optimizer's state, picks kernels, starts workers
    if steps or first > 10 * SECONDS:  # clear without another try
        return steps or 1
    return min(1000, max(1, round(SECONDS / side.seconds(1))))


def spread(ratios: list[float]) -> Row:
    """Median and quartiles, and a mark where they lie too far apart."""
    q1, median, q3 = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"ratio": median, "q1": q1, "q3": q3, "note": "noisy" if q3 - q1 > NOISY * median else ""}


def noted(row: Row, note: str) -> Row:
    """The row with more to its note."""
    return row | {"note": ", ".join(filter(None, (row["note"], note)))}


def suite(cfg: DictConfig, change: Callable[[Trainer], object] = lambda trainer: None) -> Side:
    """The suite's step with all that belongs to it: the epoch's order, the batch, the trainer's step; after a change of the trainer."""
    trainer = make_trainer(cfg)
    change(trainer)
    trainer.steps_per_epoch = full_batches(cfg, trainer.bundle)
    endless = trainer.endless()
    # the recordings, one for each branch of a step, and a first replay
    warm = (10 if cfg.method else 1) * (WARM_UP + 2) if cfg.step == "graph" else 1
    return Side(lambda: trainer.take_step(*next(endless)), trainer.device, cfg.precision == "tf32", warm)


def peer(cfg: DictConfig) -> Side:
    """The minimal loop, with a network and shuffled epochs of its own."""
    trainer = make_trainer(cfg)  # for its device, bundle and settings of torch, so that they are the same on both sides
    bundle, device, full = images(cfg, trainer.bundle), trainer.device, full_batches(cfg, trainer.bundle)
    net = build(cfg.model, "model")(num_classes=bundle.num_classes).to(device)
    rng = torch.Generator(device).manual_seed(cfg.seed)
    epochs = (torch.randperm(len(bundle.splits["train"][1]), generator=rng, device=device) for _ in itertools.count())
    losses = minimal_loop(net, bundle, (chosen for epoch in epochs for chosen in epoch.split(cfg.batch_size)[:full]), rng, cfg)
    return Side(lambda: next(losses), device, cfg.precision == "tf32")


def images(cfg: DictConfig, bundle: Bundle) -> Bundle:
    """The bundle. Raises ConfigError unless it holds images, normalised by channel: the loops to compare with know nothing else."""
    if bundle.splits["train"][0].dtype != torch.uint8:
        raise ConfigError(f"dataset: {cfg.dataset._target_} has no images, and the loops to compare with know nothing else")
    if cfg.dataset.get("standardise") == "pixels":
        raise ConfigError("dataset.standardise: pixels is not allowed here; the loops to compare with normalise by channel")
    return bundle


def full_batches(cfg: DictConfig, bundle: Bundle) -> int:
    """Batches of the full size in an epoch: a smaller last one is left out, so that all steps do the same work."""
    samples = len(bundle.splits["train"][1])
    if samples < cfg.batch_size:
        raise ConfigError(f"batch_size: {cfg.batch_size} is not allowed; the data set has {samples} training samples")
    return bundle.steps(samples, cfg.batch_size, drop_last=True)


def optimizer(cfg: DictConfig) -> Side:
    """The optimizer alone, on the gradients of one step."""
    trainer = make_trainer(cfg)
    trainer.take_step(*next(trainer.samples()))
    return Side(trainer.optimizer.step, trainer.device)


def matching(cfg: DictConfig, loop: bool) -> Side:
    """ITDM-c's MMD and its gradient on random features as wide as the network's: all classes at once, or one after the other."""
    trainer = make_trainer(cfg)
    size, classes, device = cfg.batch_size, trainer.bundle.num_classes, trainer.device
    rng = torch.Generator(device).manual_seed(cfg.seed)
    x, y = (torch.randn(size, trainer.net.classifier.in_features, generator=rng, device=device, requires_grad=True) for _ in "xy")
    label = torch.arange(size, device=device) % classes

    def step() -> Tensor:
        if loop:
            each = torch.stack([mmd(x[label == k], y[label == k]) if k < size else x.new_zeros(()) for k in range(classes)])
        else:
            each = classwise_mmd(x, y, label, label, classes, per_class=-(-size // classes))
        return torch.cat([each.detach(), *(gradient.flatten() for gradient in torch.autograd.grad(each.mean(), (x, y)))])

    return Side(step, device)


def convolution(
    batch: int, channels: int, size: int, device: torch.device, dtype: torch.dtype = torch.bfloat16, tf32: bool = False
) -> tuple[Side, float]:
    """A 3x3 convolution on [batch, channels, size, size], channels_last, as many channels out; and its GFLOP."""
    options = {"dtype": dtype, "device": device}
    x = torch.randn(batch, channels, size, size, **options).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    weight = torch.randn(channels, channels, 3, 3, **options).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    work = torch.no_grad()(lambda: nn.functional.conv2d(x, weight, padding=1))
    return Side(work, device, tf32), 2 * 9 * batch * channels**2 * size**2 / 1e9
