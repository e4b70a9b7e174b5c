"""Tiny-ImageNet, which torchvision does not know: 110,000 labelled JPEG files, read from the folder or straight from the zip."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Collection
from pathlib import Path
from zipfile import ZipFile

from data.archives import AGAIN, Archive, Download, Splits, check, urls
from data.download import fetch
from data.formats import DataError, decode

FOLDER, ZIP = "tiny-imagenet-200", "tiny-imagenet-200.zip"
URL = f"http://cs231n.stanford.edu/{ZIP}"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
COUNTS = {"train": 100_000, "val": 10_000}  # no sums are published for single files: a folder is whole if no image is missing


def _read(root: Path) -> Splits:
    folder, packed = root / FOLDER, root / ZIP
    fault = f"{packed} is missing"
    if folder.is_dir():
        try:
            parts = [part for part in (*folder.glob("train/*/images"), folder / "val" / "images") if part.is_dir()]
            names = {f"{part.relative_to(folder).as_posix()}/{file}" for part in parts for file in os.listdir(part)}
            return _splits(folder, names, lambda name: (folder / name).read_bytes())
        except (DataError, OSError) as error:
            fault = str(error)
    if not packed.is_file():
        raise DataError(f"{fault}: delete {folder} {AGAIN}")
    check(packed, MD5)
    with ZipFile(packed) as file:
        names = {name.removeprefix(f"{FOLDER}/") for name in file.namelist()}
        return _splits(packed, names, lambda name: file.read(f"{FOLDER}/{name}"))


def _splits(place: Path, names: Collection[str], read: Callable[[str], bytes]) -> Splits:
    """The training and the validation images among `names`, which are relative to the folder, as are those that `read` takes.

    Classes are numbered in the order of their WordNet ids, training images follow in that of their names, validation images in
    that of the annotations. The published test images have no labels: the validation images are the test set.
    """
    train = sorted(name for name in names if name.startswith("train/") and name.endswith(".JPEG") and "/." not in name)
    number = {wnid: k for k, wnid in enumerate(sorted({name.split("/")[1] for name in train}))}
    rows = [line.split("\t") for line in read("val/val_annotations.txt").decode().splitlines()]
    labels = {
        "train": {name: number[name.split("/")[1]] for name in train},
        "val": {f"val/images/{row[0]}": number[row[1]] for row in rows if f"val/images/{row[0]}" in names},
    }
    for split, count in COUNTS.items():
        if len(labels[split]) != count:
            raise DataError(f"{place} has {len(labels[split]):,} {split} images with a label, wanted {count:,}")
    both = [
        decode(((f"{place}/{name}", io.BytesIO(read(name)), k) for name, k in labels[split].items()), count, (3, 64, 64), set())
        for split, count in COUNTS.items()
    ]
    return dict(zip(("train", "test"), both, strict=True))


def _fetch(name: str, root: Path, download: Download) -> None:
    fetch(name, urls(ZIP, URL, download), root / ZIP, MD5)


archive = Archive((FOLDER, ZIP), _read, _fetch, (f"{ZIP} (md5 {MD5})",))
