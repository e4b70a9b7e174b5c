"""Where raw data comes from: the official archive, a parquet file, an image folder or scikit-learn's digits; decoded once, then cached."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Shape = tuple[int, int, int]
Archive = Callable[[Path, bool, bool], Any]
Arrays = tuple[np.ndarray, np.ndarray]
Encoding = tuple[str | None, tuple[tuple[int, ...], ...]]  # an image's format and its JPEG quantisation tables

CACHE_FORMAT = 1  # part of every cache entry's name: raise it when decoding changes


class DataError(ValueError):
    """Data that is missing or cannot be read; the message is one line: what, where it was looked for, how to get it."""


@dataclass(frozen=True)
class Raw:
    """A data set as it lies on disk.

    splits: "train" and "test": (uint8 images [N, C, H, W], int64 labels [N]), on the CPU.
    variant: what the data really is, such as "official archive" or "parquet (JPEG q75)".
    """

    splits: dict[str, tuple[Tensor, Tensor]]
    variant: str


def load(
    name: str,
    shape: Shape,
    num_classes: int,
    data_dir: str | Path,
    archive: Archive | None = None,
    where: str = "",
    source: str = "auto",
    download: bool = False,
) -> Raw:
    """The data set `name` from the first source that is there, or from the one asked for.

    shape: [C, H, W] that every image must have; the channels of parquet and folder images are converted.
    archive: (root, train, download) -> torchvision's dataset, if there is one; called only when the archive is read, so import
        torchvision inside.
    where: the archive's folder under `data_dir`, such as "KMNIST/raw".
    source: "archive", "parquet" (`<name>/{train,test}.parquet`), "folder" (`<name>/{train,test}/<class>/*`), "embedded" (scikit-learn's
        digits as a stand-in), or "auto": the first of the first three.
    download: fetch the official archive if nothing else is there, one process at a time.
    Raises DataError if the data is missing or unreadable, or a label is not in 0 .. num_classes - 1.
    """
    root = Path(data_dir)
    parts: dict[str, list[str]] = {
        **({"archive": [where, where]} if archive else {}),
        "parquet": [f"{name}/train.parquet", f"{name}/test.parquet"],
        "folder": [f"{name}/train", f"{name}/test"],
        "embedded": [],
    }
    readers: dict[str, Callable[[], tuple[list[Arrays], str]]] = {
        **({"archive": lambda: _archive(name, root, where, archive, download)} if archive else {}),
        "parquet": lambda: _parquet([root / part for part in parts["parquet"]], shape),
        "folder": lambda: _folder([root / part for part in parts["folder"]], shape, num_classes),
        "embedded": lambda: _embedded(name, shape, num_classes),
    }
    if source != "auto" and source not in readers:
        raise DataError(f"dataset.source={source}: choose one of auto, {', '.join(readers)}")
    with _alone(root, name) if download and source != "embedded" else contextlib.nullcontext():
        chosen = _choose(name, root, {key: paths[0] for key, paths in parts.items() if paths}, source, download)

        def entry() -> str:
            stamp = f"{CACHE_FORMAT} {name} {chosen} {shape} {num_classes} {_stamp(root, parts[chosen])}"
            return f"{name}-{chosen}-{hashlib.sha256(stamp.encode()).hexdigest()[:16]}.npz"

        raw = _recall(root, entry())
        if raw is None:
            pairs, variant = readers[chosen]()
            places = [root / part for part in parts[chosen]] or [Path(variant)] * 2
            checked = [_checked(place, *pair, shape, num_classes) for place, pair in zip(places, pairs, strict=True)]
            raw = Raw(dict(zip(("train", "test"), checked, strict=True)), variant)
            _remember(root, entry(), raw)  # named anew: a download has changed the files
    return raw


def _choose(name: str, root: Path, first: dict[str, str], source: str, download: bool) -> str:
    """The source to read; `first` has the path, per source, whose presence decides."""
    if source == "embedded":
        return source
    wanted = first if source == "auto" else {source: first[source]}
    for key, part in wanted.items():
        path = root / part
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            return key
    if "archive" not in wanted:
        remedy = "put it there"
    elif download:
        return "archive"
    else:
        remedy = "add runtime.download=true to fetch the official archive"
    looked = ", ".join(part + "/" * (key == "folder") for key, part in wanted.items())
    raise DataError(f"{name} is not under {root} (looked for {looked}): {remedy}, or point DATA_DIR at it")


@contextlib.contextmanager
def _alone(root: Path, name: str) -> Iterator[None]:
    """Jobs that may download the same data set take turns; the later ones then find it there."""
    from filelock import FileLock

    lock = FileLock(root / f".{name}.lock")
    with contextlib.suppress(OSError):  # a folder that cannot be written: nothing can be downloaded into it, so nothing can collide
        root.mkdir(parents=True, exist_ok=True)
        if not _marked_read_only(root):
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _marked_read_only(root: Path) -> bool:
    """Whether nobody has write permission: root, as whom containers run, could write all the same, but was asked not to."""
    return root.is_dir() and not root.stat().st_mode & 0o222


def _line(error: BaseException) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _checked(place: Path, images: np.ndarray, labels: np.ndarray, shape: Shape, num_classes: int) -> tuple[Tensor, Tensor]:
    if len(images) != len(labels) or not len(labels):
        raise DataError(f"{place}: {len(images)} images and {len(labels)} labels")
    if images.shape[1:] != shape:
        raise DataError(f"{place}: images are {'x'.join(map(str, images.shape[1:]))}, wanted {'x'.join(map(str, shape))}")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise DataError(f"{place}: labels are {labels.min()} .. {labels.max()}, wanted 0 .. {num_classes - 1}")
    return torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(np.ascontiguousarray(labels))


# The four sources: each gives [train, test] and the variant.


def _archive(name: str, root: Path, where: str, archive: Archive, download: bool) -> tuple[list[Arrays], str]:
    try:
        return _official(name, root, where, archive)
    except DataError:
        if not download:
            raise
    if _marked_read_only(root):
        raise DataError(f"{name}: nothing can be downloaded into {root}, which is read-only: point DATA_DIR at another folder")
    try:
        for train in (True, False):
            archive(root, train, True)  # torchvision fetches what is missing and checks its md5
    except Exception as error:  # whatever a network or a file system comes up with
        raise DataError(f"{name}: fetching the official archive into {root / where} failed: {_line(error)}") from None
    return _official(name, root, where, archive)


def _official(name: str, root: Path, where: str, archive: Archive) -> tuple[list[Arrays], str]:
    pairs = []
    try:
        with tempfile.TemporaryDirectory() as temporary:
            visible = _unpacked(root, where, Path(temporary))
            for train in (True, False):
                dataset = archive(visible, train, False)
                images = np.asarray(dataset.data)
                labels = np.asarray(dataset.targets if hasattr(dataset, "targets") else dataset.labels, dtype=np.int64)
                if images.ndim == 3:
                    images = images[:, None]
                elif images.shape[-1] == 3:
                    images = images.transpose(0, 3, 1, 2)
                pairs.append((images, labels if labels.ndim == 1 else labels[:, 0]))  # QMNIST: the class is the first of 8 columns
    except Exception as error:  # torchvision's readers raise anything, from AssertionError to zlib.error
        reason = "files are missing" if "download=True" in str(error) else _line(error)
        remedy = "delete it and add runtime.download=true to fetch it again"
        raise DataError(f"{name}: the official archive in {root / where} cannot be read ({reason}): {remedy}") from None
    return pairs, "official archive"


def _unpacked(root: Path, where: str, temporary: Path) -> Path:
    """A root under which torchvision finds plain files: `root` itself, or `temporary` if some are there only as .gz."""
    files = [path for path in (root / where).glob("*") if path.is_file()]
    packed = [path for path in files if path.suffix == ".gz" and not path.with_suffix("").exists()]
    if not packed:
        return root
    folder = temporary / where
    folder.mkdir(parents=True)
    for path in files:
        if path.suffix != ".gz":
            (folder / path.name).symlink_to(path.resolve())
    for path in packed:
        with gzip.open(path) as source, open(folder / path.stem, "wb") as target:
            shutil.copyfileobj(source, target)
    return temporary


def _parquet(paths: list[Path], shape: Shape) -> tuple[list[Arrays], str]:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    def rows(path: Path, file: ParquetFile, image: str, label: str) -> Iterator[tuple[str, Any, Any]]:
        number = 0
        try:
            for batch in file.iter_batches(batch_size=1024, columns=[image, label]):
                for row in batch.to_pylist():
                    yield f"{path}, row {number}", io.BytesIO((row[image] or {}).get("bytes") or b""), row[label]
                    number += 1
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a readable parquet file ({_line(error)})") from None

    pairs: list[Arrays] = []
    seen: set[Encoding] = set()
    for path in paths:
        try:
            file = ParquetFile(path)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a readable parquet file ({_line(error)})") from None
        with file:
            fields = {field.name: field.type for field in file.schema_arrow}
            image = next((c for c in ("img", "image") if c in fields and "bytes" in [f.name for f in fields[c].fields]), None)
            label = next((c for c in ("label", "fine_label") if c in fields), None)
            if image is None or label is None:
                wanted = "wanted img or image (a struct with bytes) and label"
                raise DataError(f"{path}: {wanted}, found {', '.join(f'{k} ({v})' for k, v in fields.items())}")
            pairs.append(_decode(rows(path, file, image, label), file.metadata.num_rows, shape, seen))
    return pairs, f"parquet ({_encoding(seen)})"


def _folder(paths: list[Path], shape: Shape, num_classes: int) -> tuple[list[Arrays], str]:
    classes = _class_names(paths[0])
    pairs: list[Arrays] = []
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
        pairs.append(_decode(items, len(items), shape, seen))
    return pairs, f"image folder ({_encoding(seen)})"


def _class_names(path: Path) -> list[str]:
    names = [entry.name for entry in path.glob("*") if entry.is_dir() and not entry.name.startswith(".")]
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else sorted(names)


def _embedded(name: str, shape: Shape, num_classes: int) -> tuple[list[Arrays], str]:
    """The digits, 500 class-balanced ones for training and 1,297 for tests, in the wanted shape and number of classes."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    # NumPy promises that RandomState's stream never changes: the split is the same for everybody.
    shuffled = np.random.RandomState(0).permutation(len(digits.target))
    chosen = shuffled[in_turn(torch.from_numpy(digits.target[shuffled])).numpy()]
    small = torch.from_numpy(digits.images[chosen])[:, None] * (255 / 16)
    images = torch.nn.functional.interpolate(small, size=shape[1:], mode="bilinear").round().to(torch.uint8)
    images = images.expand(-1, shape[0], -1, -1)
    labels = digits.target[chosen].astype(np.int64)
    pairs = []
    for part in (slice(0, 500), slice(500, None)):
        y = labels[part]
        if num_classes != 10:  # equal bands of the samples sorted by digit: every class is there, and still looks like its digit
            banded = np.empty_like(y)
            banded[np.argsort(y, kind="stable")] = np.arange(len(y)) * num_classes // len(y)
            y = banded
        pairs.append((images[part].numpy(), y))
    return pairs, f"embedded digits in place of {name}"


def in_turn(labels: Tensor) -> Tensor:
    """The samples as indices [N], classes in turn, each class in its own order: the first n are as balanced as they can be."""
    by_class = torch.argsort(labels, stable=True)
    counts = torch.bincount(labels)
    rank = torch.empty_like(by_class)
    rank[by_class] = torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return torch.argsort(rank * len(counts) + labels)


# Encoded images.


def _decode(items: Iterable[tuple[str, Any, Any]], count: int, shape: Shape, seen: set[Encoding]) -> Arrays:
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
            raise DataError(f"{place}: not a readable image ({_line(error)})") from None
        if pixels.shape[:2] != shape[1:]:
            raise DataError(f"{place}: the image is {'x'.join(map(str, pixels.shape[:2]))}, wanted {shape[1]}x{shape[2]}")
        if not isinstance(label, int):
            raise DataError(f"{place}: the label {label!r} is not a class number")
        images[i], labels[i] = pixels.reshape(*shape[1:], -1).transpose(2, 0, 1), label
    return images, labels


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


# The cache: one uncompressed .npz per data set, which NumPy reads without the libraries that decoded it.


def _cache_folders(root: Path) -> list[Path]:
    """Where cached data may lie, best first."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "retable")
    return [root / "cache", home] if root.is_dir() else [home]


def _stamp(root: Path, parts: list[str]) -> list[tuple[str, int, int]]:
    """Name, size in bytes and modification time in ns of every file below the parts."""
    files = {root / part for part in parts if (root / part).is_file()}
    files |= {Path(folder, file) for part in parts for folder, _, names in os.walk(root / part) for file in names}
    return [(str(file.relative_to(root)), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in sorted(files)]


def _recall(root: Path, entry: str) -> Raw | None:
    for folder in _cache_folders(root):
        try:
            with np.load(folder / entry) as arrays:
                pairs = {s: (torch.from_numpy(arrays[f"{s}_x"]), torch.from_numpy(arrays[f"{s}_y"])) for s in ("train", "test")}
                return Raw(pairs, str(arrays["variant"]))
        except Exception:  # not there, or damaged in whatever way: decode again
            continue
    return None


def _remember(root: Path, entry: str, raw: Raw) -> None:
    """Write the cache entry, atomically, where it can be written; else do without."""
    arrays = {f"{split}_{axis}": t.numpy() for split, pair in raw.splits.items() for axis, t in zip("xy", pair, strict=True)}
    for folder in _cache_folders(root)[_marked_read_only(root) :]:
        temporary = folder / f".{entry}.{uuid.uuid4().hex}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                np.savez(file, variant=np.array(raw.variant), **arrays)  # type: ignore[arg-type]
            os.replace(temporary, folder / entry)
            return
        except OSError:
            continue
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
