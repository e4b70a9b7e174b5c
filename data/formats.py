"""How raw data is read: a parquet file, an image folder or scikit-learn's digits, as tensors of bytes."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

Shape = tuple[int, int, int]
Samples = tuple[Tensor, Tensor]
Encoding = tuple[str | None, tuple[tuple[int, ...], ...]]  # an image's format and its JPEG quantisation tables


class DataError(ValueError):
    """Data that is missing or cannot be read; the message is one line: what, where it was looked for, how to get it."""


@dataclass(frozen=True)
class Raw:
    """A data set as it lies on disk.

    splits: "train" and "test": (uint8 images [N, C, H, W], int64 labels [N]), on the CPU.
    variant: what the data really is, such as "official archive" or "parquet (JPEG q75)".
    """

    splits: dict[str, Samples]
    variant: str


def one_line(error: BaseException) -> str:
    """An error's message, fit for a DataError's."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def resized(images: Tensor, size: int) -> Tensor:
    """uint8 images [N, C, H, W] -> [N, C, size, size], each as torchvision's Resize does it with a PIL image (bilinear)."""
    from PIL import Image

    small = np.empty((*images.shape[:2], size, size), dtype=np.uint8)
    for image, target in zip(images.permute(0, 2, 3, 1).numpy(), small, strict=True):
        pixels = image[..., 0] if image.shape[2] == 1 else np.ascontiguousarray(image)
        shrunk = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR))
        target[...] = shrunk.reshape(size, size, -1).transpose(2, 0, 1)
    return torch.from_numpy(small)


# Each reader gives the whole data set. What takes long to import is imported when it is needed: most jobs read the cache.


def read_parquet(paths: list[Path], shape: Shape) -> Raw:
    """The training and the test file, with an encoded image and its label in every row, as Hugging Face publishes data sets."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    pairs: list[Samples] = []
    seen: set[Encoding] = set()
    for path in paths:
        try:
            with ParquetFile(path) as file:
                pairs.append(decode(_rows(path, file), file.metadata.num_rows, shape, seen))
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a readable parquet file ({one_line(error)})") from None
    return Raw(dict(zip(("train", "test"), pairs, strict=True)), f"parquet ({_encoding(seen)})")


def _rows(path: Path, file: ParquetFile) -> Iterator[tuple[str, Any, Any]]:
    fields = {field.name: field.type for field in file.schema_arrow}
    image = next((c for c in ("img", "image") if c in fields and "bytes" in [f.name for f in fields[c].fields]), None)
    label = next((c for c in ("label", "fine_label") if c in fields), None)
    if image is None or label is None:
        wanted = "wanted img or image (a struct with bytes) and label"
        raise DataError(f"{path}: {wanted}, found {', '.join(f'{k} ({v})' for k, v in fields.items())}")
    batches = file.iter_batches(batch_size=1024, columns=[image, label])
    for number, row in enumerate(row for batch in batches for row in batch.to_pylist()):
        yield f"{path}, row {number}", io.BytesIO((row[image] or {}).get("bytes") or b""), row[label]


def read_folder(paths: list[Path], shape: Shape, num_classes: int) -> Raw:
    """The training and the test folder, with a folder of image files per class; the classes are numbered in the order of their names."""
    classes = _class_names(paths[0])
    pairs: list[Samples] = []
    seen: set[Encoding] = set()
    for path in paths:
        if _class_names(path) != classes or len(classes) != num_classes:
            raise DataError(f"{path}: {len(_class_names(path))} class folders, wanted {num_classes}, with the same names in train and test")
        items = [
            (str(file), file, label)
            for label, kind in enumerate(classes)
            for file in sorted((path / kind).iterdir())
            if not file.name.startswith(".")
        ]
        pairs.append(decode(items, len(items), shape, seen))
    return Raw(dict(zip(("train", "test"), pairs, strict=True)), f"image folder ({_encoding(seen)})")


def _class_names(path: Path) -> list[str]:
    names = [entry.name for entry in path.glob("*") if entry.is_dir() and not entry.name.startswith(".")]
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else sorted(names)


def read_embedded(name: str, shape: Shape, num_classes: int) -> Raw:
    """The digits, 500 class-balanced ones for training and 1,297 for tests, in the wanted shape and number of classes."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    # NumPy promises that RandomState's stream never changes: the split is the same for everybody.
    shuffled = torch.from_numpy(np.random.RandomState(0).permutation(len(digits.target)))
    chosen = shuffled[in_turn(torch.from_numpy(digits.target)[shuffled])]
    small = torch.from_numpy(digits.images)[chosen, None] * (255 / 16)
    images = torch.nn.functional.interpolate(small, size=shape[1:], mode="bilinear").round().to(torch.uint8)
    images = images.expand(-1, shape[0], -1, -1).contiguous()
    labels = torch.from_numpy(digits.target)[chosen].long()
    splits = {}
    for split, part in (("train", slice(0, 500)), ("test", slice(500, None))):
        y = labels[part]
        if num_classes != 10:  # equal bands of the samples sorted by digit: every class is there, and still looks like its digit
            bands = torch.arange(len(y)) * num_classes // len(y)
            y = torch.empty_like(y).scatter_(0, torch.argsort(y, stable=True), bands)
        splits[split] = images[part], y
    return Raw(splits, f"embedded digits in place of {name}")


def turns(labels: Tensor) -> Tensor:
    """How many samples of its class come before each sample, [N]."""
    by_class = torch.argsort(labels, stable=True)
    counts = torch.bincount(labels)
    rank = torch.empty_like(by_class)
    rank[by_class] = torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return rank


def in_turn(labels: Tensor) -> Tensor:
    """The samples as indices [N], classes in turn, each class in its own order: the first n are as balanced as they can be."""
    return torch.argsort(turns(labels) * (int(labels.max()) + 1) + labels)


# Encoded images, in parquet files and in folders.


def decode(items: Iterable[tuple[str, Any, Any]], count: int, shape: Shape, seen: set[Encoding]) -> Samples:
    """Images and labels of (place, file, label); adds each image's encoding to `seen`."""
    from PIL import Image, UnidentifiedImageError

    mode = {1: "L", 3: "RGB"}[shape[0]]
    images, labels = np.empty((count, *shape), dtype=np.uint8), np.empty(count, dtype=np.int64)
    for i, (place, file, label) in enumerate(items):
        try:
            with Image.open(file) as image:
                seen.add((image.format, tuple(tuple(table) for table in getattr(image, "quantization", {}).values())))
                pixels = np.asarray(image.convert(mode))
        except UnidentifiedImageError:  # its own message names a BytesIO, not the place
            raise DataError(f"{place}: not an image") from None
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{place}: not a readable image ({one_line(error)})") from None
        if pixels.shape[:2] != shape[1:]:
            raise DataError(f"{place}: the image is {'x'.join(map(str, pixels.shape[:2]))}, wanted {shape[1]}x{shape[2]}")
        if not isinstance(label, int):
            raise DataError(f"{place}: the label {label!r} is not a class number")
        images[i], labels[i] = pixels.reshape(*shape[1:], -1).transpose(2, 0, 1), label
    return torch.from_numpy(images), torch.from_numpy(labels)


def _encoding(seen: set[Encoding]) -> str:
    """How the images are encoded: "PNG", "JPEG and PNG"; "JPEG q75" if all have the tables that libjpeg derives from one quality."""
    from PIL import Image

    if len(seen) == 1 and (tables := next(iter(seen))[1]):
        for quality in range(100, 0, -1):
            buffer = io.BytesIO()
            Image.new("RGB", (8, 8)).save(buffer, "JPEG", quality=quality)
            standard = Image.open(buffer).quantization  # type: ignore[attr-defined]
            if tables == tuple(tuple(table) for table in standard.values())[: len(tables)]:
                return f"JPEG q{quality}"
    return " and ".join(sorted({kind or "unknown" for kind, _ in seen}))
