"""Where raw data comes from: the first source that is there, or the one asked for, or a download; decoded once, then cached."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from data.archives import AGAIN, Archive, Download
from data.cache import marked_read_only, recall, remember
from data.formats import DataError, Raw, Shape, one_line, read_embedded, read_folder, read_parquet, resized


def load(
    name: str,
    shape: Shape,
    num_classes: int,
    data_dir: str | Path,
    archive: Archive | None = None,
    source: str = "auto",
    download: Download = False,
    size: int | None = None,
) -> Raw:
    """The data set `name` from the first source that is there, or from the one asked for.

    shape: [C, H, W] that every image must have; the channels of parquet and folder images are converted.
    archive: the official archive, if there is one.
    source: "archive", "parquet" (`<name>/{train,test}.parquet`), "folder" (`<name>/{train,test}/<class>/*`), "embedded" (scikit-learn's
        digits as a stand-in), or "auto": the first of the first three.
    download: fetch the official archive if nothing else is there, one process at a time; base urls are tried before its own.
    size: height and width in pixels to which the images are resized, once; None leaves them as they are.
    Raises DataError if the data is missing or unreadable, or a label is not in 0 .. num_classes - 1.
    """
    root = Path(data_dir)
    wanted = shape if size is None else (shape[0], size, size)
    # Per source, where it lies, and its reader. The parts of parquet and folder are the training and the test set.
    sources: dict[str, tuple[tuple[str, ...], Callable[[list[Path]], Raw]]] = {
        **({"archive": (archive.parts, lambda _: _archive(name, root, archive, download))} if archive else {}),
        "parquet": ((f"{name}/train.parquet", f"{name}/test.parquet"), lambda paths: read_parquet(paths, shape)),
        "folder": ((f"{name}/train", f"{name}/test"), lambda paths: read_folder(paths, shape, num_classes)),
        "embedded": ((), lambda _: read_embedded(name, wanted, num_classes)),
    }
    if source != "auto" and source not in sources:
        raise DataError(f"dataset.source={source}: choose one of auto, {', '.join(sources)}")
    with alone(root, name) if download and source != "embedded" else contextlib.nullcontext():
        by_hand = archive.by_hand if archive else ()
        # either of an archive's parts will do; of the others, the training set decides
        looked = {key: parts if key == "archive" else parts[:1] for key, (parts, _) in sources.items() if parts}
        chosen = _choose(name, root, looked, source, bool(download), by_hand)
        parts, read = sources[chosen]
        paths = [root / part for part in parts]
        label = f"{name}-{chosen}-{'x'.join(map(str, wanted))}-{num_classes}"
        raw = recall(root, label, paths)
        if raw is None:
            raw = read(paths)
            if chosen != "embedded":  # which is made to fit
                _check(raw, paths[:1] * 2 if chosen == "archive" else paths, shape, num_classes)
                if wanted != shape:
                    raw = Raw({split: (resized(x, wanted[1]), y) for split, (x, y) in raw.splits.items()}, raw.variant)
            remember(root, label, paths, raw)
    return raw


def _choose(name: str, root: Path, looked: dict[str, tuple[str, ...]], source: str, download: bool, by_hand: tuple[str, ...]) -> str:
    """The source to read; `looked` has the paths, per source, of which one must be there."""
    if source == "embedded":
        return source
    wanted = looked if source == "auto" else {source: looked[source]}
    for key, parts in wanted.items():
        for path in (root / part for part in parts):
            if path.is_file() or (path.is_dir() and any(path.iterdir())):
                return key
    if "archive" not in wanted:
        remedy = "put it there"
    elif download:
        return "archive"
    else:
        place = f", or place {' and '.join(by_hand)} there by hand" if by_hand else ""
        remedy = f"add runtime.download=true to fetch the official archive{place}"
    places = ", ".join(part + "/" * (key == "folder") for key, parts in wanted.items() for part in parts)
    raise DataError(f"{name} is not under {root} (looked for {places}): {remedy}, or point DATA_DIR at it")


@contextlib.contextmanager
def alone(root: Path, name: str) -> Iterator[None]:
    """Jobs that may download the same data set take turns; the later ones then find it there."""
    from filelock import FileLock

    lock = FileLock(root / f".{name}.lock")
    with contextlib.suppress(OSError):  # a folder that cannot be written: nothing can be downloaded into it, so nothing can collide
        root.mkdir(parents=True, exist_ok=True)
        if not marked_read_only(root):
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def check_writable(name: str, root: Path) -> None:
    """Raises DataError if nothing may be downloaded there."""
    if marked_read_only(root):
        raise DataError(f"{name}: nothing can be downloaded into {root}, which is read-only: point DATA_DIR at another folder")


def _archive(name: str, root: Path, archive: Archive, download: Download) -> Raw:
    """The official archive; if it is not there, or not whole, and may be downloaded, then after that."""
    try:
        return _read(name, root, archive)
    except DataError:
        if not download:
            raise
    check_writable(name, root)
    try:
        archive.fetch(name, root, download)
    except DataError:
        raise
    except Exception as error:  # whatever a network or a file system comes up with
        raise DataError(f"{name}: fetching the official archive into {root / archive.parts[0]} failed: {one_line(error)}") from None
    return _read(name, root, archive)


def _read(name: str, root: Path, archive: Archive) -> Raw:
    try:
        return Raw(archive.read(root), "official archive")
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    except Exception as error:  # torchvision's readers raise anything, from AssertionError to zlib.error
        reason = "files are missing" if "download=True" in str(error) else one_line(error)
        raise DataError(f"{name}: the official archive in {root / archive.parts[0]} cannot be read ({reason}): delete it {AGAIN}") from None


def _check(raw: Raw, paths: list[Path], shape: Shape, num_classes: int) -> None:
    """Every split must have as many labels as images, images of the shape, and labels of the classes."""
    for path, (images, labels) in zip(paths, raw.splits.values(), strict=True):
        if len(images) != len(labels) or not len(labels):
            raise DataError(f"{path}: {len(images)} images and {len(labels)} labels")
        if images.shape[1:] != shape:
            raise DataError(f"{path}: images are {'x'.join(map(str, images.shape[1:]))}, wanted {'x'.join(map(str, shape))}")
        if labels.min() < 0 or labels.max() >= num_classes:
            raise DataError(f"{path}: labels are {labels.min()} .. {labels.max()}, wanted 0 .. {num_classes - 1}")
