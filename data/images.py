"""The image data sets: one function each, from raw data to a Bundle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.bundle import Bundle
from data.formats import in_turn
from data.sources import DataError, Raw, load


def digits(
    data_dir: str, device: str, download: bool = False, source: str = "auto", train: int | None = None, test: int | None = None
) -> Bundle:
    """scikit-learn's 1,797 real handwritten digits, 8x8, shown at 1x28x28 (bilinear); 10 classes; nothing to download.

    train: class-balanced training images, 500 by default; the same ones for every seed; all others (1,297) are the test images.
    Normalised by mean and standard deviation of the 500 training images.
    """
    if source not in ("auto", "embedded"):
        raise DataError(f"dataset.source={source}: digits come with scikit-learn, choose auto or embedded")
    raw = load("digits", (1, 28, 28), 10, data_dir, source="embedded")
    cut = 500 if train is None else train
    both = [torch.cat(tensors) for tensors in zip(raw.splits["train"], raw.splits["test"], strict=True)]  # classes in turn, throughout
    if not 10 <= cut < len(both[1]):
        raise DataError(f"dataset.train={cut}: choose 10 (one per class) to {len(both[1]) - 1:,} images; the others are for tests")
    splits = {"train": (both[0][:cut], both[1][:cut]), "test": (both[0][cut:], both[1][cut:])}
    variant = "scikit-learn digits" + (f", {cut:,} training images" if cut != 500 else "")
    return _bundle(Raw(splits, variant), {"test": test}, 10, (0.3041,), (0.3229,), device)


def mnist(
    data_dir: str, device: str, download: bool = False, source: str = "auto", train: int | None = None, test: int | None = None
) -> Bundle:
    """MNIST: 60,000 / 10,000 handwritten digits, 1x28x28, 10 classes. Normalised by the training set's statistics."""
    return _idx("mnist", "MNIST", 0.1307, 0.3081, data_dir, device, download, source, train, test)


def qmnist(
    data_dir: str, device: str, download: bool = False, source: str = "auto", train: int | None = None, test: int | None = None
) -> Bundle:
    """QMNIST: 60,000 / 60,000 handwritten digits, 1x28x28, 10 classes; MNIST with its full test set. Normalised as MNIST."""
    return _idx("qmnist", "QMNIST", 0.1307, 0.3081, data_dir, device, download, source, train, test)


def kmnist(
    data_dir: str, device: str, download: bool = False, source: str = "auto", train: int | None = None, test: int | None = None
) -> Bundle:
    """Kuzushiji-MNIST: 60,000 / 10,000 cursive Japanese characters, 1x28x28, 10 classes. Normalised by the ITDM authors' constants."""
    return _idx("kmnist", "KMNIST", 0.1903, 0.3475, data_dir, device, download, source, train, test)


def fmnist(
    data_dir: str, device: str, download: bool = False, source: str = "auto", train: int | None = None, test: int | None = None
) -> Bundle:
    """Fashion-MNIST: 60,000 / 10,000 pieces of clothing, 1x28x28, 10 classes. Normalised by the training set's statistics."""
    return _idx("fmnist", "FashionMNIST", 0.2860, 0.3530, data_dir, device, download, source, train, test)


def _idx(
    name: str,
    official: str,
    mean: float,
    std: float,
    data_dir: str,
    device: str,
    download: bool,
    source: str,
    train: int | None,
    test: int | None,
) -> Bundle:
    """A relative of MNIST: grey, 28x28, ten classes; `official` is torchvision's class and its folder."""
    raw = load(name, (1, 28, 28), 10, data_dir, _torchvision(official), f"{official}/raw", source, download)
    return _bundle(raw, {"train": train, "test": test}, 10, (mean,), (std,), device)


def _torchvision(official: str) -> Callable[[Path, bool, bool], Any]:
    """torchvision's own class as (root, train, download) -> dataset; imported when called, because that takes seconds."""
    return lambda root, train, download: getattr(import_module("torchvision.datasets"), official)(root, train=train, download=download)


def _bundle(raw: Raw, limits: dict[str, int | None], num_classes: int, mean: Sequence[float], std: Sequence[float], device: str) -> Bundle:
    """The raw data on the device, cut to class-balanced subsets of the wanted sizes, which the variant then names."""
    splits, variant = {}, raw.variant
    for split, (images, labels) in raw.splits.items():
        count = limits.get(split)
        if count is not None:
            chosen = _first(split, labels, count, num_classes)
            if count < len(labels):
                variant += f", {count:,} {'training' if split == 'train' else split} images"
            images, labels = images[chosen], labels[chosen]
        splits[split] = images.to(device), labels.to(device)
    return Bundle(splits, num_classes, normalise(mean, std, device), variant)


def _first(split: str, labels: Tensor, count: int, num_classes: int) -> Tensor:
    """The first `count` samples in file order, classes in turn, as indices; enough for class-balanced batches to have every class."""
    if not num_classes <= count <= len(labels):
        raise DataError(f"dataset.{split}={count}: choose {num_classes} (one per class) to {len(labels):,} images")
    return in_turn(labels)[:count]


def normalise(mean: Sequence[float], std: Sequence[float], device: str) -> Callable[[Tensor], Tensor]:
    """uint8 images [N, C, H, W] -> (image / 255 - mean) / std per channel, float32, channels_last."""
    spread = torch.tensor(std, dtype=torch.float64)
    scale = (1 / (255 * spread)).float().view(1, -1, 1, 1).to(device)
    shift = (-torch.tensor(mean, dtype=torch.float64) / spread).float().view(1, -1, 1, 1).to(device)

    def prepare(images: Tensor) -> Tensor:
        # one multiply-add, which also turns bytes into floats; the layout is changed while a pixel is still one byte
        return torch.addcmul(shift, images.contiguous(memory_format=torch.channels_last), scale)

    return prepare
