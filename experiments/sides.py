"""The two sides of the bench's rows: the suite's step, a plain loop to hold it against, and what a step calls."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from data.bundle import Bundle
from experiments.config import ConfigError, build
from experiments.train import make_trainer
from regularizers.mmd import classwise_mmd, mmd

READING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "_unique2", "unique_dim", "unique_consecutive"}


def minimal_loop(net: nn.Module, bundle: Bundle, orders: Iterable[Tensor], rng: Generator, cfg: DictConfig) -> Iterator[Tensor]:
    """The peer: the training loop that one would write by hand for this network. Yields each step's loss.

    orders: the samples of each batch. The bundle's images, labels and augmentation are used, of the trainer nothing.
    """
    images, labels = bundle.splits["train"]
    black, white = (bundle.prepare(torch.full_like(images[:1], value))[:, :, :1, :1] for value in (0, 255))
    std = 255 / (white - black)
    mean = -black * std
    net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        net.parameters(), lr=cfg.optim.lr, momentum=cfg.optim.momentum, weight_decay=cfg.optim.weight_decay, fused=True
    )
    for chosen in orders:
        x = bundle.augment(images[chosen], rng).to(memory_format=torch.channels_last).float().sub(mean).div(std)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=cfg.precision == "bf16"):
            logits = net(x)
        loss = cross_entropy(logits.float(), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.detach()


def count(step: Callable[[], object]) -> tuple[int, int]:
    """How many operations a step sends to the device, and how many of them make the host wait for values.

    Seen by torch's dispatcher below autograd; views, allocations and the profiler's marks do no work there and are left out.
    What a CPU tensor hands out without an operation (`tolist`, `numpy`) stays unseen; on a GPU it is a copy, which is seen.
    """
    calls = reads = 0

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal calls, reads
            name, kwargs = func.overloadpacket.__name__, kwargs or {}
            result = func(*args, **kwargs)
            calls += not (func.is_view or name.startswith(("empty", "new_empty", "_record_function")))
            if name == "_to_copy":
                reads += args[0].device.type != "cpu" and result.device.type == "cpu"
            elif "index" in name and len(args) > 1 and isinstance(args[1], list | tuple):  # how many a mask takes must be known
                reads += any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
            else:
                reads += name in READING or (name == "repeat_interleave" and kwargs.get("output_size") is None)
            return result

    with Counter():
        step()
    return calls, reads


@dataclass
class Side:
    """One side of a row: the step that is timed, its device, and the global setting that it needs."""

    step: Callable[[], object]
    device: Any
    tf32: bool = False

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

    def counts(self) -> tuple[int, int]:
        """Calls and host reads of a step: the median of three, of which one at most also shuffles an epoch."""
        calls, reads = zip(*(count(self.step) for _ in range(3)), strict=True)
        return sorted(calls)[1], sorted(reads)[1]


def suite(cfg: DictConfig) -> Side:
    """The suite's step with all that belongs to it: the epoch's order, the batch, the trainer's step."""
    trainer = make_trainer(cfg)
    trainer.steps_per_epoch = full_batches(cfg, trainer.bundle)

    def steps() -> Iterator[None]:
        while True:
            for batches in trainer.batches():
                trainer.train_step(*batches)
                yield

    endless = steps()
    return Side(lambda: next(endless), trainer.device, cfg.precision == "tf32")


def peer(cfg: DictConfig) -> Side:
    """The minimal loop, with a network and shuffled epochs of its own."""
    trainer = make_trainer(cfg)  # for its device, bundle and settings of torch, so that they are the same on both sides
    bundle, device, full = trainer.bundle, trainer.device, full_batches(cfg, trainer.bundle)
    if bundle.splits["train"][0].dtype != torch.uint8:
        raise ConfigError(f"dataset: {cfg.dataset._target_} has no images, and the minimal loop knows nothing else")
    net = build(cfg.model, "model")(num_classes=bundle.num_classes).to(device)
    rng = torch.Generator(device).manual_seed(cfg.seed)
    epochs = (torch.randperm(len(bundle.splits["train"][1]), generator=rng, device=device) for _ in itertools.count())
    losses = minimal_loop(net, bundle, (chosen for epoch in epochs for chosen in epoch.split(cfg.batch_size)[:full]), rng, cfg)
    return Side(lambda: next(losses), device, cfg.precision == "tf32")


def full_batches(cfg: DictConfig, bundle: Bundle) -> int:
    """Batches of the full size in an epoch: a smaller last one is left out, so that all steps do the same work."""
    samples = len(bundle.splits["train"][1])
    if samples < cfg.batch_size:
        raise ConfigError(f"batch_size: {cfg.batch_size} is not allowed; the data set has {samples} training samples")
    return samples // cfg.batch_size


def optimizer(cfg: DictConfig) -> Side:
    """The optimizer alone, on the gradients of one step."""
    trainer = make_trainer(cfg)
    trainer.train_step(*next(trainer.batches()))
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
