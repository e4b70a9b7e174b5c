"""What the suite is compared with: loops as people write them; and what is timed besides a training step: epochs, runs side by side."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, default_collate

from data.augment import crop_flip
from data.bundle import Bundle
from experiments import store
from experiments.bench.measure import Side
from experiments.board import open_board
from experiments.config import ConfigError, build
from experiments.fit import checkpoint, record
from experiments.train import make_trainer
from experiments.trainer import Trainer

TRAINERS: dict[str, Trainer] = {}  # of `two_runs`, in each process


def images(cfg: DictConfig) -> Bundle:
    """The config's bundle. Raises ConfigError unless it holds images, normalised by channel: the loops here know nothing else."""
    bundle = make_trainer(cfg).bundle  # the trainer for its settings of torch, so that they are the same on both sides
    if bundle.splits["train"][0].dtype != torch.uint8 or cfg.dataset.get("standardise") == "pixels":
        raise ConfigError(
            f"dataset: {cfg.dataset._target_} has no images normalised by channel, and the loops compared with know no others"
        )
    return bundle


def mean_std(bundle: Bundle) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel by which the bundle normalises, of pixels in 0 .. 255: [1, C, 1, 1] each."""
    pixel = bundle.splits["train"][0][:1]
    black, white = (bundle.prepare(torch.full_like(pixel, value))[:, :, :1, :1] for value in (0, 255))
    std = 255 / (white - black)
    return -black * std, std


def minimal(cfg: DictConfig, net: nn.Module | None = None) -> Side:
    """A step of the loop that one would write by hand for data in memory; it returns the loss."""
    bundle = images(cfg)
    (pixels, labels), optim = bundle.splits["train"], cfg.optim
    device, full = labels.device, bundle.steps(len(labels), cfg.batch_size, drop_last=True)
    rng = torch.Generator(device).manual_seed(cfg.seed)
    augment = None if bundle.augment is None else crop_flip(pixels, cfg.dataset.get("padding", 0), cfg.dataset.get("flip", False))
    mean, std = mean_std(bundle)
    model = net or build(cfg.model, "model")(num_classes=bundle.num_classes)
    model.to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay, fused=True)

    def losses() -> Iterator[Tensor]:
        while True:
            for chosen in torch.randperm(len(labels), generator=rng, device=device).split(cfg.batch_size)[:full]:
                raw = pixels[chosen] if augment is None else augment(chosen, rng)
                x = raw.to(memory_format=torch.channels_last).float().sub(mean).div(std)
                with torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16"):
                    logits = model(x)
                loss = cross_entropy(logits.float(), labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                yield loss.detach()

    endless = losses()
    return Side(lambda: next(endless), device, cfg.precision == "tf32")


def transformed(transform: Callable[[Image.Image], Tensor], pairs: list[tuple[Image.Image, int]]) -> Any:
    return default_collate([(transform(image), label) for image, label in pairs])


def loader(bundle: Bundle, cfg: DictConfig, split: str, batch_size: int, workers: int, shuffle: bool) -> DataLoader[Any]:
    """A split with torchvision's transforms: crop and flip for training images where the set has them, to float, normalised."""
    from torchvision import transforms

    images, labels = bundle.splits[split]
    mean, std = ((value / 255).flatten().tolist() for value in mean_std(bundle))
    crop, flip = transforms.RandomCrop(images.shape[-1], cfg.dataset.get("padding", 0)), 0.5 * cfg.dataset.get("flip", False)
    changes = [crop, transforms.RandomHorizontalFlip(flip)] if split == "train" and bundle.augment is not None else []
    collate = partial(transformed, transforms.Compose([*changes, transforms.ToTensor(), transforms.Normalize(mean, std)]))
    pixels = images.cpu().permute(0, 2, 3, 1).contiguous().numpy()  # [N, H, W, C]
    pairs: Any = [(Image.fromarray(one.squeeze()), label) for one, label in zip(pixels, labels.tolist(), strict=True)]
    return DataLoader(pairs, batch_size, shuffle, num_workers=workers, persistent_workers=workers > 0, collate_fn=collate)


def usual(cfg: DictConfig, net: nn.Module | None = None, workers: int = 2, shuffle: bool = True) -> Side:
    """An epoch of the loop that most public training scripts have, pytorch-cifar's for one; it returns the losses of its steps.

    A DataLoader with workers over PIL images, float32, contiguous, the loss and the number of right answers read at every
    step, a test pass in batches of 100, and a checkpoint whenever the test accuracy is the best so far.
    """
    bundle = images(cfg)
    device, optim = bundle.splits["train"][1].device, cfg.optim
    model = (net or build(cfg.model, "model")(num_classes=bundle.num_classes)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay)

    def epochs() -> Generator[list[float], None, None]:
        batches = loader(bundle, cfg, "train", cfg.batch_size, workers, shuffle)
        tested, best = loader(bundle, cfg, "test", 100, workers, shuffle=False), -1.0
        with tempfile.TemporaryDirectory() as folder:
            while True:
                losses, _ = usual_pass(model, batches, device, optimizer)
                with torch.no_grad():
                    _, accuracy = usual_pass(model, tested, device)
                if accuracy > best:
                    best = accuracy
                    torch.save({"net": model.state_dict(), "accuracy": accuracy}, Path(folder) / "best.pt")
                yield losses

    endless = epochs()
    return Side(lambda: next(endless), device, True, 1, endless.close)  # TF32 convolutions: torch's default on a GPU


def usual_pass(
    net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device, optimizer: torch.optim.Optimizer | None = None
) -> tuple[list[float], float]:
    """A pass over a split: each batch's loss, and the accuracy in percent. With an optimizer, each batch is a training step."""
    net.train(optimizer is not None)
    losses, right, count = [], 0, 0
    for x, y in batches:
        x, y = x.to(device), y.to(device)
        logits = net(x)
        loss = cross_entropy(logits, y)
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
        right += int(logits.argmax(1).eq(y).sum().item())
        count += len(y)
    return losses, 100 * right / count


def loaded(cfg: DictConfig, workers: int) -> Side:
    """A pass over the training images through a DataLoader, onto the device."""
    bundle = images(cfg)
    device, batches = bundle.splits["train"][1].device, [loader(bundle, cfg, "train", cfg.batch_size, workers, shuffle=True)]

    def step() -> None:
        for x, y in batches[0]:
            x.to(device), y.to(device)

    return Side(step, device, close=batches.clear)  # the workers end with their loader


def resident(cfg: DictConfig) -> Side:
    """The same by the suite: an epoch's order, and every batch of it, augmented and normalised."""
    bundle = images(cfg)
    device = bundle.splits["train"][1].device
    rng = torch.Generator(device).manual_seed(cfg.seed)

    def step() -> None:
        for chosen in bundle.order(rng, balanced=False).split(cfg.batch_size):
            bundle.take(chosen, rng)

    return Side(step, device)


def whole_suite(cfg: DictConfig) -> Side:
    """What experiments.train does in an epoch: training, evaluation, and what that leaves in the run's folder."""
    trainer = make_trainer(cfg)

    def epochs() -> Generator[None, None, None]:
        with tempfile.TemporaryDirectory() as folder:
            run = store.Run(Path(folder))
            with contextlib.closing(open_board(run.path, cfg, [])) as board:
                while True:
                    first = len(trainer.rows)
                    trainer.train_epoch()
                    record(cfg, run, trainer, board, first)
                    checkpoint(run, trainer, 0)
                    yield

    endless = epochs()
    return Side(lambda: next(endless), trainer.device, cfg.precision == "tf32", 1 if cfg.step == "eager" else 2, endless.close)


def train_epoch(text: str) -> None:
    """An epoch of the run with this config, in whichever process."""
    if text not in TRAINERS:
        TRAINERS[text] = make_trainer(DictConfig(OmegaConf.create(text)))
    TRAINERS[text].train_epoch()
    TRAINERS[text].synchronise()


def two_runs(cfg: DictConfig, at_once: bool) -> Side:
    """An epoch of each of two runs: in two processes with one thread each, or one after the other here, with all threads each."""
    threads = 1 if at_once else cfg.runtime.threads
    texts = [OmegaConf.to_yaml(OmegaConf.merge(cfg, {"seed": seed, "runtime": {"threads": threads}})) for seed in (1, 2)]
    if not at_once:
        return Side(lambda: [*map(train_epoch, texts)], torch.device("cpu"))
    # A process that has computed with several threads must not fork.
    pools = [ProcessPoolExecutor(1, get_context("spawn")) for _ in texts]

    def step() -> None:
        for epoch in [pool.submit(train_epoch, text) for pool, text in zip(pools, texts, strict=True)]:
            epoch.result()

    return Side(step, torch.device("cpu"), close=lambda: [*map(ProcessPoolExecutor.shutdown, pools)])
