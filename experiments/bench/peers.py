"""The loops that people write, to hold the suite against: a minimal one, and the usual one with a DataLoader."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from data.augment import crop_flip
from data.bundle import Augment, Bundle


def statistics(bundle: Bundle) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel by which the bundle normalises, of pixels in 0 .. 255: [1, C, 1, 1] each."""
    images = bundle.splits["train"][0]
    black, white = (bundle.prepare(torch.full_like(images[:1], value))[:, :, :1, :1] for value in (0, 255))
    std = 255 / (white - black)
    return -black * std, std


def crops(images: Tensor, cfg: DictConfig) -> Augment:
    """The config's crop and flip of these images, raw."""
    return crop_flip(images, cfg.dataset.get("padding", 0), cfg.dataset.get("flip", False))


def minimal_loop(net: nn.Module, bundle: Bundle, orders: Iterable[Tensor], rng: torch.Generator, cfg: DictConfig) -> Iterator[Tensor]:
    """The training loop that one would write by hand for this network on data in memory. Yields each step's loss.

    orders: the samples of each batch. The bundle's images and labels are used, of the trainer nothing.
    """
    images, labels = bundle.splits["train"]
    augment = None if bundle.augment is None else crops(images, cfg)
    mean, std = statistics(bundle)
    net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        net.parameters(), lr=cfg.optim.lr, momentum=cfg.optim.momentum, weight_decay=cfg.optim.weight_decay, fused=True
    )
    for chosen in orders:
        raw = images[chosen] if augment is None else augment(chosen, rng)
        x = raw.to(memory_format=torch.channels_last).float().sub(mean).div(std)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=cfg.precision == "bf16"):
            logits = net(x)
        loss = cross_entropy(logits.float(), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.detach()


class Pictures(Dataset[Any]):
    """A split as torchvision's data sets hold one: bytes, of which each image is made and transformed when it is asked for."""

    def __init__(self, images: Tensor, labels: Tensor, transform: Callable[[Image.Image], Tensor]) -> None:
        self.pixels = images.cpu().permute(0, 2, 3, 1).contiguous().numpy()  # [N, H, W, C]
        self.labels, self.transform = labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        pixels = self.pixels[i]
        return self.transform(Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)), self.labels[i]


def loader(bundle: Bundle, cfg: DictConfig, split: str, batch_size: int, workers: int, shuffle: bool) -> DataLoader[Any]:
    """A split with torchvision's transforms: crop and flip for training images where the set has them, to float, normalised."""
    from torchvision import transforms

    images, labels = bundle.splits[split]
    mean, std = ((value / 255).flatten().tolist() for value in statistics(bundle))
    changes: list[Any] = []
    if split == "train" and bundle.augment is not None:
        if padding := cfg.dataset.get("padding", 0):
            changes.append(transforms.RandomCrop(images.shape[-1], padding=padding))
        if cfg.dataset.get("flip", False):
            changes.append(transforms.RandomHorizontalFlip())
    transform = transforms.Compose([*changes, transforms.ToTensor(), transforms.Normalize(mean, std)])
    data = Pictures(images, labels, transform)
    return DataLoader(data, batch_size, shuffle, num_workers=workers, persistent_workers=workers > 0)


def usual_loop(
    net: nn.Module, bundle: Bundle, cfg: DictConfig, workers: int = 2, shuffle: bool = True
) -> Generator[list[float], None, None]:
    """Epochs as most public training scripts write them. Yields the losses of each epoch's steps; `close` ends the workers.

    A DataLoader with workers over PIL images, float32, contiguous, the loss and the number of right answers read at every
    step, a test pass in batches of 100, and a checkpoint whenever the test accuracy is the best so far.
    """
    device = bundle.splits["train"][1].device
    train = loader(bundle, cfg, "train", cfg.batch_size, workers, shuffle)
    test = loader(bundle, cfg, "test", 100, workers, shuffle=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=cfg.optim.lr, momentum=cfg.optim.momentum, weight_decay=cfg.optim.weight_decay)
    best = -1.0
    with tempfile.TemporaryDirectory() as folder:
        try:
            while True:
                losses, _ = usual_pass(net, train, device, optimizer)
                with torch.no_grad():
                    _, accuracy = usual_pass(net, test, device)
                if accuracy > best:
                    best = accuracy
                    torch.save({"net": net.state_dict(), "accuracy": accuracy}, Path(folder) / "best.pt")
                yield losses
        finally:
            del train, test  # the workers end with their loaders


def usual_pass(
    net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device, optimizer: torch.optim.Optimizer | None = None
) -> tuple[list[float], float]:
    """One pass over a split: each batch's loss, and the accuracy in percent. With an optimizer, each batch is a training step."""
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


def loader_passes(bundle: Bundle, cfg: DictConfig, workers: int) -> Generator[int, None, None]:
    """Passes over the training images through a DataLoader, onto the device. Yields the images of each; `close` ends the workers."""
    device = bundle.splits["train"][1].device
    batches = loader(bundle, cfg, "train", cfg.batch_size, workers, shuffle=True)
    try:
        while True:
            seen = 0
            for x, y in batches:
                x, y = x.to(device), y.to(device)
                seen += len(y)
            yield seen
    finally:
        del batches
