"""The official archives: where they lie under the data folder, how they are checked, read and fetched."""

from __future__ import annotations

import gzip
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.download import fetch, file_md5
from data.formats import DataError, Samples

Download = bool | Sequence[str]
Splits = dict[str, Samples]

AGAIN = "and add runtime.download=true to fetch it again"


@dataclass(frozen=True)
class Archive:
    """A data set's official files; torchvision, which takes seconds to import, is imported when they are read or fetched.

    parts: where they may lie under the data folder; any of them shows that the archive is there.
    read: the data folder -> "train" and "test": (uint8 images [N, C, H, W], int64 labels [N]). It writes nothing there.
        Raises DataError, or whatever a library raises, if the files are not whole.
    fetch: (name, data folder, True or base urls to try first) downloads what is missing or not whole.
    by_hand: the published files, to be placed in the data folder.
    """

    parts: tuple[str, ...]
    read: Callable[[Path], Splits]
    fetch: Callable[[str, Path, Download], None]
    by_hand: tuple[str, ...] = ()


def torchvision(official: str) -> Any:
    """torchvision's class of this name."""
    return getattr(import_module("torchvision.datasets"), official)


def samples(images: Any, labels: Any) -> Samples:
    """Arrays as torchvision's classes have them, [N, H, W], [N, H, W, 3] or [N, C, H, W], as (images [N, C, H, W], labels [N])."""
    images, labels = torch.as_tensor(images), torch.as_tensor(labels, dtype=torch.int64)
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[-1] == 3:
        images = images.permute(0, 3, 1, 2)
    return images.contiguous(), labels.contiguous()


# MNIST and its relatives: torchvision's class downloads and checks them itself.


def idx(official: str) -> Archive:
    """The idx files, plain or as .gz, of the torchvision class `official`; other base urls are not tried."""
    where = f"{official}/raw"

    def read(root: Path) -> Splits:
        splits = {}
        with tempfile.TemporaryDirectory() as temporary:
            visible = _unpacked(root, where, Path(temporary))
            for split in ("train", "test"):
                dataset = torchvision(official)(visible, train=split == "train")
                labels: Tensor = dataset.targets  # QMNIST: the class is the first of 8 columns
                splits[split] = samples(dataset.data, labels if labels.ndim == 1 else labels[:, 0])
        return splits

    def get(name: str, root: Path, download: Download) -> None:
        for train in (True, False):
            torchvision(official)(root, train=train, download=True)

    return Archive((where,), read, get)


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


# CIFAR-10, CIFAR-100 and STL10: one tar.gz, whose files torchvision knows by their md5.


def tarball(official: str, folder: str, packed: str, splits: tuple[Any, Any]) -> Archive:
    """The extracted `folder`, or the tar.gz `packed` beside it, of the torchvision class `official`; `splits`: what it calls them."""

    def read(root: Path) -> Splits:
        known = torchvision(official)
        # Without STL10's unlabelled part: 2.6 GB which nothing here needs, and which torchvision would check.
        labelled = [entry for entry in known.train_list if not entry[0].startswith("unlabeled")]
        reader = type(official, (known,), {"train_list": labelled})
        wanted = {file: md5 for file, md5 in (*labelled, *known.test_list)}
        if hasattr(known, "meta"):
            wanted[known.meta["filename"]] = known.meta["md5"]
        fault = _fault(root / folder, wanted)
        with ExitStack() as stack:
            if fault:
                if not (root / packed).is_file():
                    raise DataError(f"{fault}: delete {root / folder} {AGAIN}")
                check(root / packed, known.tgz_md5)
                root = _extracted(root / packed, folder, wanted, Path(stack.enter_context(tempfile.TemporaryDirectory())))
            both = [reader(root, split) for split in splits]
        return {
            split: samples(each.data, each.targets if hasattr(each, "targets") else each.labels)
            for split, each in zip(("train", "test"), both, strict=True)
        }

    def get(name: str, root: Path, download: Download) -> None:
        known = torchvision(official)
        fetch(name, urls(packed, known.url, download), root / packed, known.tgz_md5)

    return Archive((folder, packed), read, get, (packed,))


def check(path: Path, md5: str) -> None:
    """Raises DataError if the file has another md5."""
    found = file_md5(path)
    if found != md5:
        raise DataError(f"{path} has md5 {found}, wanted {md5}, so it is truncated or another file: delete it {AGAIN}")


def _fault(folder: Path, wanted: dict[str, str]) -> str:
    """The first file that is missing from the folder or has another md5, in words; "" if all are as they should be."""
    for file, md5 in wanted.items():
        path = folder / file
        if not path.is_file():
            return f"{path} is missing"
        if (found := file_md5(path)) != md5:
            return f"{path} has md5 {found}, wanted {md5}"
    return ""


def _extracted(path: Path, folder: str, wanted: dict[str, str], temporary: Path) -> Path:
    """A folder with the wanted files of the tar.gz in `folder`. No name in the archive is written to: ours are."""
    (temporary / folder).mkdir()
    missing = {f"{folder}/{file}": temporary / folder / file for file in wanted}
    with tarfile.open(path, "r|gz") as tar:
        for member in tar:
            target = missing.pop(os.path.normpath(member.name), None) if member.isfile() else None
            if target is not None and (source := tar.extractfile(member)) is not None:
                with open(target, "wb") as file:
                    shutil.copyfileobj(source, file)
            if not missing:
                break
    return temporary


def urls(file: str, official: str, download: Download) -> list[str]:
    bases = [] if isinstance(download, bool) else download
    return [*(f"{base.rstrip('/')}/{file}" for base in bases), official]


# SVHN: two .mat files, as they are.


def _svhn_facts() -> dict[str, tuple[str, str, str]]:
    """Per split: the url, the path under the data folder, the md5."""
    known = torchvision("SVHN").split_list
    return {split: (known[split][0], f"svhn/{known[split][1]}", known[split][2]) for split in ("train", "test")}


def _svhn_read(root: Path) -> Splits:
    for _, file, md5 in _svhn_facts().values():
        if not (root / file).is_file():
            raise DataError(f"{root / file} is missing: add runtime.download=true to fetch it")
        check(root / file, md5)
    both = {split: torchvision("SVHN")(root / "svhn", split) for split in ("train", "test")}
    return {split: samples(each.data, each.labels) for split, each in both.items()}


def _svhn_fetch(name: str, root: Path, download: Download) -> None:
    for url, file, md5 in _svhn_facts().values():
        fetch(name, urls(Path(file).name, url, download), root / file, md5)


_MAT = ("svhn/train_32x32.mat", "svhn/test_32x32.mat")
svhn_files = Archive(_MAT, _svhn_read, _svhn_fetch, _MAT)
