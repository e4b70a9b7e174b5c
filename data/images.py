"""The image data sets, from raw data to a Bundle: each is an `Images`, which says what is known of it and is called to load it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator

from data import tiny_imagenet as tiny
from data.archives import Archive, idx, svhn_files, tarball
from data.augment import crop_flip, prepared
from data.bundle import Bundle
from data.formats import DataError, Raw, Shape
from data.sources import load
from data.standardise import channel_statistics, multiply_add, normalise, position_maps
from data.subsets import first, held_out


@dataclass(frozen=True)
class Images:
    """What is known of a data set.

    name: its name in conf/dataset and its folder's for parquet and image folders; title: its name in text.
    shape: [C, H, W] of the images; mean, std: per channel, of pixels in 0 .. 1.
    sizes: official number of "train" and "test" images; none where there is no such number.
    """

    name: str
    title: str
    shape: Shape
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sizes: dict[str, int]
    archive: Archive | None = None
    few = 400  # images are enough to time a step

    def __call__(
        self,
        data_dir: str,
        device: str,
        download: bool | Sequence[str] = False,
        source: str = "auto",
        train: int | None = None,
        test: int | None = None,
        size: int | None = None,
        padding: int = 0,
        flip: bool = False,
        test_augment: bool = False,
        standardise: str = "channels",
        valid: float = 0,
        classes: int | None = None,
        channels: int | None = None,
    ) -> Bundle:
        """The data set on the device.

        data_dir, download, source, size (pixels; None: as published): see `data.sources.load`.
        train, test: class-balanced subsets of so many images, the same ones for every seed; None: all.
        padding, flip: training images are cropped at random after padding of so many pixels, and mirrored half of the time.
        test_augment: the test images are augmented too, once for all, as the ITDM authors' code does with STL10's.
        standardise: "channels", by `mean` and `std`, after black padding; or "channels_own", by those of the training images, to which a
            published `std` need not belong; or "pixels", each position by its own mean and deviation over
            the training images, before padding with 0, which is then the mean (VCL's published code, as PER uses it); or
            "pixels_variance", the same by its variance (the code of Unitization's authors).
        valid: the part of the training images that is held out as the split "valid", the same ones for every seed; each class gives its
            last ones, in proportion.
        classes: of the embedded stand-in, where so few images are wanted that not every class could have some; None: as published.
        channels: 3 repeats a grey image three times, for networks that take colour; None: as published.
        Raises DataError, one line, if the data is missing or unreadable, or an option is not allowed.
        """
        if size is not None and size < 1:
            raise DataError(f"dataset.size={size}: choose a whole number of pixels of at least 1, or null for {self.shape[1]}")
        _check_padding(padding, size or self.shape[1])
        if test_augment and not (padding or flip):
            raise DataError("dataset.test_augment=true: there is nothing to augment with, set dataset.padding or dataset.flip")
        if standardise not in ("channels", "channels_own", "pixels", "pixels_variance"):
            raise DataError(f"dataset.standardise={standardise}: choose channels, channels_own, pixels or pixels_variance")
        if test_augment and standardise.startswith("pixels"):
            raise DataError(
                f"dataset.test_augment=true: raw images are augmented, so choose dataset.standardise=channels, not {standardise}"
            )
        if channels not in (None, self.shape[0]) and (channels, self.shape[0]) != (3, 1):
            raise DataError(f"dataset.channels={channels}: choose {'1, 3' if self.shape[0] == 1 else self.shape[0]} or null")
        if classes is not None:
            return replace(self, num_classes=classes)(
                data_dir, device, download, source, train, test, size, padding, flip, test_augment, standardise, valid, None, channels
            )
        raw = load(self.name, self.shape, self.num_classes, data_dir, self.archive, source, download, size)
        variant = raw.variant
        if variant.startswith(("parquet", "image folder")):  # such copies are not always the original pixels: name what they are of
            variant = f"{self.title} as {variant}"
        if size not in (None, self.shape[1]):
            variant += f", at {size}x{size}"
        known, splits = self, raw.splits
        if channels not in (None, self.shape[0]):
            known = replace(self, mean=self.mean * channels, std=self.std * channels)
            splits = {split: (x.expand(-1, channels, -1, -1), y) for split, (x, y) in splits.items()}
        limits = {"train": train, "test": test}
        return known.bundle(Raw(splits, variant), limits, device, padding, flip, test_augment, standardise, valid)

    def bundle(
        self,
        raw: Raw,
        limits: dict[str, int | None],
        device: str,
        padding: int = 0,
        flip: bool = False,
        test_augment: bool = False,
        standardise: str = "channels",
        valid: float = 0,
    ) -> Bundle:
        """The raw data on the device, cut to class-balanced subsets; the variant names every number of images but the official one."""
        splits, variant = dict(raw.splits), raw.variant
        for split, (images, labels) in raw.splits.items():
            official = self.sizes.get(split, len(labels))
            if (count := limits.get(split)) is not None:
                chosen = first(split, labels, count, self.num_classes)
                images, labels = images[chosen], labels[chosen]
            if split == "train" and valid != 0:
                rest, held = held_out(labels, valid, self.num_classes)
                splits["valid"] = images[held], labels[held]
                images, labels = images[rest], labels[rest]
            if len(labels) != official:
                variant += f", {len(labels):,} {'training' if split == 'train' else split} images"
            if split == "train" and "valid" in splits:
                variant += f", {len(splits['valid'][1]):,} held out"
            if split == "test" and test_augment:
                # On the CPU: the same images for every device.
                images = crop_flip(images, padding, flip)(torch.arange(len(images)), Generator().manual_seed(0))
                variant += ", test images augmented"
            splits[split] = images, labels
        splits = {split: (x.to(device).contiguous(memory_format=torch.channels_last), y.to(device)) for split, (x, y) in splits.items()}
        images = splits["train"][0]
        maps = position_maps(images, variance=standardise == "pixels_variance") if standardise.startswith("pixels") else None
        mean, std = channel_statistics(images) if standardise == "channels_own" else (self.mean, self.std)
        prepare = multiply_add(*maps) if maps else normalise(mean, std, images.shape[3], device)
        augment = crop_flip(images, padding, flip, maps) if padding or flip else None
        if augment is not None and maps is None:
            augment = prepared(augment, prepare)
        scale = None if maps else torch.tensor(std, device=device)[:, None, None]
        return Bundle(splits, self.num_classes, prepare, variant, augment, scale=scale)


def _check_padding(padding: int, size: int) -> None:
    if not 0 <= padding <= size:
        raise DataError(f"dataset.padding={padding}: choose 0 to {size} pixels")


# Grey, 28x28, ten classes. Normalised by the training set's statistics, QMNIST as MNIST, Kuzushiji-MNIST by the ITDM authors' constants.

_GREY: tuple[Shape, int] = ((1, 28, 28), 10)
_60K_10K = {"train": 60_000, "test": 10_000}

# handwritten digits
mnist = Images("mnist", "MNIST", *_GREY, (0.1307,), (0.3081,), _60K_10K, idx("MNIST"))
# MNIST with its full test set
qmnist = Images("qmnist", "QMNIST", *_GREY, (0.1307,), (0.3081,), {"train": 60_000, "test": 60_000}, idx("QMNIST"))
# cursive Japanese characters
kmnist = Images("kmnist", "KMNIST", *_GREY, (0.1903,), (0.3475,), _60K_10K, idx("KMNIST"))
# pieces of clothing
fmnist = Images("fmnist", "FMNIST", *_GREY, (0.2860,), (0.3530,), _60K_10K, idx("FashionMNIST"))

_digits = Images("digits", "digits", *_GREY, (0.3041,), (0.3229,), {"train": 500})


def digits(
    data_dir: str,
    device: str,
    download: bool | Sequence[str] = False,
    source: str = "auto",
    train: int | None = None,
    test: int | None = None,
    padding: int = 0,
    flip: bool = False,
    valid: float = 0,
) -> Bundle:
    """scikit-learn's 1,797 real handwritten digits, 8x8, shown at 1x28x28 (bilinear); 10 classes; nothing to download.

    train: class-balanced training images, 500 by default; the same ones for every seed; all others (1,297) are the test images.
    valid: held out of the training images. Normalised by mean and standard deviation of the 500. The other options are those of `Images`.
    """
    if source not in ("auto", "embedded"):
        raise DataError(f"dataset.source={source}: digits come with scikit-learn, choose auto or embedded")
    _check_padding(padding, 28)
    raw = load("digits", *_GREY, data_dir, source="embedded")
    cut = 500 if train is None else train
    both = [torch.cat(tensors) for tensors in zip(raw.splits["train"], raw.splits["test"], strict=True)]  # classes in turn, throughout
    if not 10 <= cut < len(both[1]):
        raise DataError(f"dataset.train={cut}: choose 10 (one per class) to {len(both[1]) - 1:,} images; the others are for tests")
    splits = {"train": (both[0][:cut], both[1][:cut]), "test": (both[0][cut:], both[1][cut:])}
    return _digits.bundle(Raw(splits, "scikit-learn digits"), {"test": test}, device, padding, flip, valid=valid)


# Colour. Normalised by the constants that the papers' and their baselines' published code uses.

# small photographs of ten kinds of objects and animals
cifar10 = Images(
    "cifar10",
    "CIFAR-10",
    (3, 32, 32),
    10,
    (0.4914, 0.4822, 0.4465),
    (0.2023, 0.1994, 0.2010),
    {"train": 50_000, "test": 10_000},
    tarball("CIFAR10", "cifar-10-batches-py", "cifar-10-python.tar.gz", (True, False)),
)
# the same with a hundred (fine) classes
cifar100 = Images(
    "cifar100",
    "CIFAR-100",
    (3, 32, 32),
    100,
    (129.3 / 255, 124.1 / 255, 112.4 / 255),
    (68.2 / 255, 65.4 / 255, 70.4 / 255),
    {"train": 50_000, "test": 10_000},
    tarball("CIFAR100", "cifar-100-python", "cifar-100-python.tar.gz", (True, False)),
)
# house numbers, without the extra training images; class 0 is digit 0; the training set's own statistics
svhn = Images(
    "svhn",
    "SVHN",
    (3, 32, 32),
    10,
    (0.4377, 0.4438, 0.4728),
    (0.1980, 0.2010, 0.1970),
    {"train": 73_257, "test": 26_032},
    svhn_files,
)
# labelled photographs, taken from ImageNet; ImageNet's statistics
stl10 = Images(
    "stl10",
    "STL10",
    (3, 96, 96),
    10,
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
    {"train": 5_000, "test": 8_000},
    tarball("STL10", "stl10_binary", "stl10_binary.tar.gz", ("train", "test")),
)
# ImageNet's images and classes in small; the validation images are the test set, as the published test images have no labels
tiny_imagenet = Images(
    "tiny_imagenet",
    "Tiny-ImageNet",
    (3, 64, 64),
    200,
    (0.5, 0.5, 0.5),
    (0.5, 0.5, 0.5),
    {"train": 100_000, "test": 10_000},
    tiny.archive,
)
