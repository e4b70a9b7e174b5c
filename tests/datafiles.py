"""Small raw data in the official formats, for the tests of data/."""

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
from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.io
from PIL import Image

from data import tiny_imagenet
from data.formats import DataError

GREY = {"mnist": "MNIST", "kmnist": "KMNIST", "fmnist": "FashionMNIST", "qmnist": "QMNIST"}
SMALL = "official archive, 30 training images, 20 test images"  # the variant of what write_idx writes
PACKED = {
    "cifar10": "cifar-10-python.tar.gz",
    "cifar100": "cifar-100-python.tar.gz",
    "stl10": "stl10_binary.tar.gz",
    "tiny_imagenet": "tiny-imagenet-200.zip",
}


def error(call: Callable[[], Any]) -> str:
    """The text of the DataError, which must be a single line."""
    with pytest.raises(DataError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pixels(count: int, *size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *size), dtype=np.uint8)


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def encoded(array: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def write_files(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


# idx, the format of MNIST and its relatives.


def idx(array: np.ndarray) -> bytes:
    """Type and number of dimensions, sizes, values, all big-endian."""
    kind = {"uint8": 8, "int32": 12}[array.dtype.name]
    return struct.pack(f">HBB{array.ndim}I", 0, kind, array.ndim, *array.shape) + array.astype(array.dtype.newbyteorder(">")).tobytes()


def idx_files(name: str, train: int = 30, test: int = 20) -> dict[str, bytes]:
    """The files of the official archive, with the images pixels(n, 28, 28, seed=n) and the labels 0, 1, .. 9, 0, ..."""
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
    folder, suffix = root / GREY[name] / "raw", ".gz" if packed else ""
    files = idx_files(name, **sizes).items()
    write_files(folder, {file + suffix: gzip.compress(content) if packed else content for file, content in files})
    return folder


# The colour sets. Their official md5 sums are replaced by those of the small files.


class Published(NamedTuple):
    """files: the extracted files, by path under the data folder; packed: the archive that holds them; splits: images and labels."""

    files: dict[str, bytes]
    packed: bytes
    splits: dict[str, tuple[np.ndarray, list[int]]]


def publish(monkeypatch: pytest.MonkeyPatch, name: str) -> Published:
    """Makes small files of the data set pass for the official ones; tests write them where they want them."""
    if name.startswith("cifar"):
        return publish_cifar(monkeypatch, name)
    return {"svhn": publish_svhn, "stl10": publish_stl10, "tiny_imagenet": publish_tiny}[name](monkeypatch)


def tar_gz(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def zipped(files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tell_torchvision(monkeypatch: pytest.MonkeyPatch, official: str, files: dict[str, bytes], packed: bytes) -> None:
    """Gives torchvision's class the md5 sums of these files."""
    import torchvision

    dataset, names = getattr(torchvision.datasets, official), {Path(path).name: content for path, content in files.items()}
    for split in ("train_list", "test_list"):
        sums = [[file, md5(names[file]) if file in names else old] for file, old in getattr(dataset, split)]
        monkeypatch.setattr(dataset, split, sums)
    if hasattr(dataset, "meta"):
        monkeypatch.setattr(dataset, "meta", dataset.meta | {"md5": md5(names[dataset.meta["filename"]])})
    monkeypatch.setattr(dataset, "tgz_md5", md5(packed))


def publish_cifar(monkeypatch: pytest.MonkeyPatch, name: str) -> Published:
    """Pickles of red, green and blue planes: of CIFAR-10, five training batches of four images; CIFAR-100 has coarse labels too."""

    def batch(images: np.ndarray, labels: list[int]) -> bytes:
        content: dict[str, Any] = {"data": images.transpose(0, 3, 1, 2).reshape(len(images), -1)}
        fine = {"fine_labels": labels, "coarse_labels": [label // 5 for label in labels]}
        return pickle.dumps(content | ({"labels": labels} if name == "cifar10" else fine), protocol=2)

    step, classes = (1, 10) if name == "cifar10" else (7, 100)
    train, test = ((pixels(n, 32, 32, 3, seed=n), [step * i % classes for i in range(n)]) for n in (20, 10))
    if name == "cifar10":
        folder, meta = "cifar-10-batches-py", {"batches.meta": pickle.dumps({"label_names": []})}
        parts = {f"data_batch_{k + 1}": batch(train[0][4 * k : 4 * k + 4], train[1][4 * k : 4 * k + 4]) for k in range(5)}
        parts["test_batch"] = batch(*test)
    else:
        folder, meta = "cifar-100-python", {"meta": pickle.dumps({"fine_label_names": []})}
        parts = {"train": batch(*train), "test": batch(*test)}
    files = {f"{folder}/{file}": content for file, content in (parts | meta).items()}
    packed = tar_gz({**files, f"{folder}/readme.html": b"<html>"})
    tell_torchvision(monkeypatch, name.upper(), files, packed)
    return Published(files, packed, {"train": train, "test": test})


def publish_svhn(monkeypatch: pytest.MonkeyPatch) -> Published:
    from torchvision.datasets import SVHN

    files, entries, splits = {}, dict(SVHN.split_list), {}
    for split, n in (("train", 20), ("test", 10)):
        array, buffer = pixels(n, 32, 32, 3, seed=n), io.BytesIO()
        labels = np.array([[i % 10 + 1] for i in range(n)], dtype=np.uint8)  # 10 is digit 0
        scipy.io.savemat(buffer, {"X": array.transpose(1, 2, 3, 0), "y": labels})  # height, width, channel, image
        url, file, _ = SVHN.split_list[split]
        files[f"svhn/{file}"], entries[split] = buffer.getvalue(), [url, file, md5(buffer.getvalue())]
        splits[split] = array, [(i + 1) % 10 for i in range(n)]
    monkeypatch.setattr(SVHN, "split_list", entries)
    return Published(files, b"", splits)


def publish_stl10(monkeypatch: pytest.MonkeyPatch) -> Published:
    """Planes, column after column, and labels from 1; the unlabelled images have another md5 than torchvision's."""
    files, splits = {"stl10_binary/unlabeled_X.bin": b"large"}, {}
    for split, n in (("train", 20), ("test", 10)):
        array = pixels(n, 96, 96, 3, seed=n)
        files[f"stl10_binary/{split}_X.bin"] = array.transpose(0, 3, 2, 1).tobytes()
        files[f"stl10_binary/{split}_y.bin"] = bytes(i % 10 + 1 for i in range(n))
        splits[split] = array, [i % 10 for i in range(n)]
    packed = tar_gz({**files, "stl10_binary/class_names.txt": b"airplane\n"})
    tell_torchvision(monkeypatch, "STL10", {file: content for file, content in files.items() if "unlabeled" not in file}, packed)
    return Published(files, packed, splits)


def publish_tiny(monkeypatch: pytest.MonkeyPatch) -> Published:
    """Three classes, which wnids.txt has in another order than the sorted one, and annotations in an order of their own."""
    images = [encoded(array.repeat(8, 0).repeat(8, 1), "JPEG") for array in pixels(15, 8, 8, 3)]
    images[4] = encoded(pixels(1, 64, 64)[0], "JPEG")  # grey
    wnids = ["n03", "n20", "n11"]
    files = {"wnids.txt": "\n".join(wnids).encode(), "test/images/test_0.JPEG": images[0]}
    for i, wnid in enumerate(wnids * 3):
        files[f"train/{wnid}/images/{wnid}_{i}.JPEG"] = images[i]
        files[f"train/{wnid}/{wnid}_boxes.txt"] = b"0\t0\t1\t1\n"
    files |= {f"val/images/val_{i}.JPEG": images[9 + i] for i in range(6)}
    rows = [f"val_{i}.JPEG\t{wnid}\t0\t32\t44\t62\n" for i, wnid in zip((3, 0, 5, 1, 4, 2), ("n20", "n03", "n11") * 2, strict=True)]
    files["val/val_annotations.txt"] = "".join(rows).encode()
    files = {f"tiny-imagenet-200/{file}": content for file, content in files.items()}
    packed = zipped(files)
    monkeypatch.setattr(tiny_imagenet, "COUNTS", {"train": 9, "val": 6})
    monkeypatch.setattr(tiny_imagenet, "MD5", md5(packed))
    decoded = np.stack([np.asarray(Image.open(io.BytesIO(image)).convert("RGB")) for image in images])
    train, test = [0, 3, 6, 2, 5, 8, 1, 4, 7], [9 + i for i in (3, 0, 5, 1, 4, 2)]
    return Published(files, packed, {"train": (decoded[train], [0, 0, 0, 1, 1, 1, 2, 2, 2]), "test": (decoded[test], [2, 0, 1] * 2)})


# Parquet files, as Hugging Face publishes data sets.


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
