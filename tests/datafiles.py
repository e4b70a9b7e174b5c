"""Raw data in small, in the official formats, for the data tests."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from PIL import Image

from data import tiny_imagenet
from data.formats import DataError

GREY = {"mnist": "MNIST", "kmnist": "KMNIST", "fmnist": "FashionMNIST", "qmnist": "QMNIST"}


def error(call: Callable[[], Any]) -> str:
    """The text of the DataError, which must be one line."""
    with pytest.raises(DataError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pixels(count: int, *size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *size), dtype=np.uint8)


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


# idx, the format of MNIST and its relatives.


def idx(array: np.ndarray) -> bytes:
    """Type and number of dimensions, sizes, values, all big-endian."""
    kind = {"uint8": 8, "int32": 12}[array.dtype.name]
    return struct.pack(f">HBB{array.ndim}I", 0, kind, array.ndim, *array.shape) + array.astype(array.dtype.newbyteorder(">")).tobytes()


def idx_files(name: str, train: int = 30, test: int = 20) -> dict[str, bytes]:
    """The official archive's files in small, with labels 0, 1, .. 9, 0, ..."""
    files = {}
    for split, n in (("train", train), ("test", test)):
        label = np.arange(n) % 10
        prefix = f"qmnist-{split}" if name == "qmnist" else {"train": "train", "test": "t10k"}[split]
        files[f"{prefix}-images-idx3-ubyte"] = idx(pixels(n, 28, 28, seed=n))
        if name == "qmnist":  # class, then seven columns about the writer
            files[f"{prefix}-labels-idx2-int"] = idx(np.stack([label] + [label + 100] * 7, axis=1).astype(np.int32))
        else:
            files[f"{prefix}-labels-idx1-ubyte"] = idx(label.astype(np.uint8))
    return files


def write_idx(root: Path, name: str, packed: bool = False, **sizes: int) -> Path:
    folder = root / GREY[name] / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in idx_files(name, **sizes).items():
        (folder / (file + ".gz" if packed else file)).write_bytes(gzip.compress(content) if packed else content)
    return folder


# CIFAR: pickles in a tar.gz.


def tar_gz(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def cifar_labels(name: str, count: int) -> list[int]:
    return [i % 10 for i in range(count)] if name == "cifar10" else [7 * i % 100 for i in range(count)]


def cifar_files(name: str) -> dict[str, bytes]:
    """20 training images (CIFAR-10: 4 in each of 5 batches) and 10 test images: pixels(20, 32, 32, 3), pixels(10, 32, 32, 3)."""

    def batch(images: np.ndarray, labels: list[int]) -> bytes:
        content: dict[str, Any] = {"data": images.transpose(0, 3, 1, 2).reshape(len(images), -1)}  # rows of red, green, blue planes
        if name == "cifar10":
            content["labels"] = labels
        else:
            content |= {"fine_labels": labels, "coarse_labels": [label // 5 for label in labels]}
        return pickle.dumps(content, protocol=2)

    train, labels = pixels(20, 32, 32, 3), cifar_labels(name, 20)
    test = batch(pixels(10, 32, 32, 3, seed=1), cifar_labels(name, 10))
    if name == "cifar100":
        return {"train": batch(train, labels), "test": test, "meta": pickle.dumps({"fine_label_names": []})}
    parts = {f"data_batch_{k + 1}": batch(train[4 * k : 4 * k + 4], labels[4 * k : 4 * k + 4]) for k in range(5)}
    return {**parts, "test_batch": test, "batches.meta": pickle.dumps({"label_names": []})}


def tell_torchvision(monkeypatch: pytest.MonkeyPatch, official: str, files: dict[str, bytes], packed: bytes) -> None:
    """Gives torchvision's class the sums of our files in place of the official ones."""
    import torchvision

    known = getattr(torchvision.datasets, official)
    for split in ("train_list", "test_list"):
        here = [[file, md5(files[file]) if file in files else old] for file, old in getattr(known, split)]
        monkeypatch.setattr(known, split, here)
    if hasattr(known, "meta"):
        monkeypatch.setattr(known, "meta", known.meta | {"md5": md5(files[known.meta["filename"]])})
    monkeypatch.setattr(known, "tgz_md5", md5(packed))


def publish_cifar(monkeypatch: pytest.MonkeyPatch, name: str) -> tuple[dict[str, bytes], bytes]:
    """The files by their path under the data folder, and the tar.gz of them, both of which pass for the official ones."""
    folder = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]
    files = cifar_files(name)
    inside = {f"{folder}/{file}": content for file, content in files.items()}
    packed = tar_gz({**inside, f"{folder}/readme.html": b"<html>"})
    tell_torchvision(monkeypatch, name.upper(), files, packed)
    return inside, packed


# SVHN's .mat files, STL10's binaries, Tiny-ImageNet's JPEG files.


def publish_svhn(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, bytes], bytes]:
    from torchvision.datasets import SVHN

    files, entries = {}, dict(SVHN.split_list)
    for split, n in (("train", 20), ("test", 10)):
        buffer = io.BytesIO()
        array = pixels(n, 32, 32, 3, seed=n).transpose(1, 2, 3, 0)  # height, width, channel, image
        scipy.io.savemat(buffer, {"X": array, "y": np.array([[i % 10 + 1] for i in range(n)], dtype=np.uint8)})  # 10 is digit 0
        url, file, _ = SVHN.split_list[split]
        files[f"svhn/{file}"] = buffer.getvalue()
        entries[split] = [url, file, md5(buffer.getvalue())]
    monkeypatch.setattr(SVHN, "split_list", entries)
    return files, b""


def publish_stl10(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, bytes], bytes]:
    files = {}
    for split, n in (("train", 20), ("test", 10)):
        array = pixels(n, 96, 96, 3, seed=n).transpose(0, 3, 2, 1)  # planes, each column after column
        files |= {f"{split}_X.bin": array.tobytes(), f"{split}_y.bin": bytes(i % 10 + 1 for i in range(n))}
    inside = {f"stl10_binary/{file}": content for file, content in files.items()}
    packed = tar_gz({"stl10_binary/unlabeled_X.bin": b"large", **inside, "stl10_binary/class_names.txt": b"airplane\n"})
    tell_torchvision(monkeypatch, "STL10", files, packed)
    return inside, packed


WNIDS = ["n03", "n20", "n11"]  # in the order of wnids.txt, which is not the classes'


def tiny_label(split: str, i: int) -> str:
    """The WordNet id of a made-up image."""
    return WNIDS[i % 3] if split == "train" else WNIDS[(i // 2) % 3]


def tiny_jpeg(split: str, i: int) -> bytes:
    array = pixels(1, 8, 8, 3, seed=i + 100 * (split == "val"))[0].repeat(8, 0).repeat(8, 1)
    return encoded(array[..., 0] if i == 4 else array, "JPEG")  # number 4 is grey


def publish_tiny(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, bytes], bytes]:
    files = {"wnids.txt": "\n".join(WNIDS).encode(), "test/images/test_0.JPEG": tiny_jpeg("val", 0)}
    for i in range(9):
        wnid = tiny_label("train", i)
        files[f"train/{wnid}/images/{wnid}_{i}.JPEG"] = tiny_jpeg("train", i)
        files[f"train/{wnid}/{wnid}_boxes.txt"] = b"0\t0\t1\t1\n"
    files |= {f"val/images/val_{i}.JPEG": tiny_jpeg("val", i) for i in range(6)}
    rows = [f"val_{i}.JPEG\t{tiny_label('val', i)}\t0\t32\t44\t62\n" for i in (3, 0, 5, 1, 4, 2)]  # in an order of their own
    files["val/val_annotations.txt"] = "".join(rows).encode()
    inside = {f"tiny-imagenet-200/{file}": content for file, content in files.items()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        for file, content in inside.items():
            packed.writestr(file, content)
    monkeypatch.setattr(tiny_imagenet, "COUNTS", {"train": 9, "val": 6})
    monkeypatch.setattr(tiny_imagenet, "MD5", md5(buffer.getvalue()))
    return inside, buffer.getvalue()


# Encoded images.


def encoded(array: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def write_files(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def write_parquet(path: Path, contents: list[bytes], labels: list[Any], image: str = "img", label: str = "label") -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({image: [{"bytes": c, "path": None} for c in contents], label: labels}), path)


def write_parquets(root: Path, name: str, kind: str = "PNG", **options: Any) -> np.ndarray:
    array = pixels(20, 28, 28)
    for split in ("train", "test"):
        write_parquet(root / name / f"{split}.parquet", [encoded(a, kind, **options) for a in array], [i % 10 for i in range(20)])
    return array
