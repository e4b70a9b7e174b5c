"""Where raw data comes from: the first source that is there, or the one asked for, or a download; decoded once, then cached."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from data.cache import marked_read_only, recall, remember
from data.formats import Archive, DataError, Raw, Shape, one_line, read_archive, read_embedded, read_folder, read_parquet


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
    # Per source, where its training and its test set lie, and its reader.
    sources: dict[str, tuple[list[str], Callable[[list[Path]], Raw]]] = {
        **({"archive": ([where, where], lambda _: _archive(name, root, where, archive, download))} if archive else {}),
        "parquet": ([f"{name}/train.parquet", f"{name}/test.parquet"], lambda paths: read_parquet(paths, shape)),
        "folder": ([f"{name}/train", f"{name}/test"], lambda paths: read_folder(paths, shape, num_classes)),
        "embedded": ([], lambda _: read_embedded(name, shape, num_classes)),
    }
    if source != "auto" and source not in sources:
        raise DataError(f"dataset.source={source}: choose one of auto, {', '.join(sources)}")
    with _alone(root, name) if download and source != "embedded" else contextlib.nullcontext():
        chosen = _choose(name, root, {key: parts[0] for key, (parts, _) in sources.items() if parts}, source, download)
        parts, read = sources[chosen]
        paths = [root / part for part in parts]
        label = f"{name}-{chosen}-{'x'.join(map(str, shape))}-{num_classes}"
        raw = recall(root, label, paths)
        if raw is None:
            raw = read(paths)
            _check(raw, paths, shape, num_classes)
            remember(root, label, paths, raw)
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
        if not marked_read_only(root):
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _archive(name: str, root: Path, where: str, archive: Archive, download: bool) -> Raw:
    """The official archive; if it is not there, or not whole, and may be downloaded, then after that."""
    try:
        return read_archive(name, root, where, archive)
    except DataError:
        if not download:
            raise
    if marked_read_only(root):
        raise DataError(f"{name}: nothing can be downloaded into {root}, which is read-only: point DATA_DIR at another folder")
    try:
        for train in (True, False):
            archive(root, train, True)  # torchvision fetches what is missing and checks its md5
    except Exception as error:  # whatever a network or a file system comes up with
        raise DataError(f"{name}: fetching the official archive into {root / where} failed: {one_line(error)}") from None
    return read_archive(name, root, where, archive)


def _check(raw: Raw, paths: list[Path], shape: Shape, num_classes: int) -> None:
    """Every split must have as many labels as images, images of the shape, and labels of the classes."""
    for path, (images, labels) in zip(paths, raw.splits.values(), strict=False):  # embedded data has no path, and is made to fit
        if len(images) != len(labels) or not len(labels):
            raise DataError(f"{path}: {len(images)} images and {len(labels)} labels")
        if images.shape[1:] != shape:
            raise DataError(f"{path}: images are {'x'.join(map(str, images.shape[1:]))}, wanted {'x'.join(map(str, shape))}")
        if labels.min() < 0 or labels.max() >= num_classes:
            raise DataError(f"{path}: labels are {labels.min()} .. {labels.max()}, wanted 0 .. {num_classes - 1}")
