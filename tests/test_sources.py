"""Where raw data comes from: MNIST and its relatives as archives, which source is chosen, what is said when there is none, downloads."""

from __future__ import annotations

import gzip
import multiprocessing
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from data import archives, images
from data.sources import load
from tests.datafiles import GREY, error, idx, idx_files, pixels, write_files, write_idx, write_parquets

KMNIST = archives.idx("KMNIST")
SMALL = "official archive, 30 training images, 20 test images"  # what write_idx writes, and not what there should be


# Archives of MNIST and its relatives.


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("name", GREY)
def test_official_archive(raw, name, packed):
    write_idx(raw, name, packed)
    b = getattr(images, name)(str(raw), "cpu")
    assert b.variant == SMALL
    for split, n in (("train", 30), ("test", 20)):
        x, y = b.splits[split]
        assert (x[:, 0].numpy() == pixels(n, 28, 28, seed=n)).all() and x.dtype == torch.uint8
        assert y.tolist() == [i % 10 for i in range(n)] and y.dtype == torch.int64


def test_archive_partly_packed(raw):
    folder = write_idx(raw, "kmnist")
    plain = folder / "t10k-labels-idx1-ubyte"
    plain.with_name(plain.name + ".gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    assert len(images.kmnist(str(raw), "cpu").splits["test"][1]) == 20


def test_auto_prefers_the_archive_and_source_chooses(raw):
    write_parquets(raw, "kmnist")

    def variant(source: str = "auto") -> str:
        return images.kmnist(str(raw), "cpu", source=source).variant.partition(",")[0]

    assert variant() == "KMNIST as parquet (PNG)"
    write_idx(raw, "kmnist")
    assert variant() == "official archive"
    assert variant("parquet") == "KMNIST as parquet (PNG)"
    assert variant("embedded") == "embedded digits in place of kmnist"


# What cannot be read.


def test_missing_data(raw, monkeypatch):
    monkeypatch.chdir(raw)
    assert error(lambda: images.kmnist("data/raw", "cpu")) == (
        "kmnist is not under data/raw (looked for KMNIST/raw, kmnist/train.parquet, kmnist/train/): "
        "add runtime.download=true to fetch the official archive, or point DATA_DIR at it"
    )
    assert error(lambda: images.kmnist("data/raw", "cpu", download=True, source="parquet")) == (
        "kmnist is not under data/raw (looked for kmnist/train.parquet): put it there, or point DATA_DIR at it"
    )
    assert error(lambda: images.kmnist("x", "cpu", source="zip")) == (
        "dataset.source=zip: choose one of auto, archive, parquet, folder, embedded"
    )
    assert error(lambda: images.digits("x", "cpu", source="archive")) == (
        "dataset.source=archive: digits come with scikit-learn, choose auto or embedded"
    )


@pytest.mark.parametrize(("name", "file"), [("kmnist", "train-images-idx3-ubyte"), ("qmnist", "qmnist-test-labels-idx2-int")])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_truncated_archive(raw, name, file, packed):
    folder = write_idx(raw, name, packed)
    path = folder / (file + ".gz" if packed else file)
    path.write_bytes(path.read_bytes()[:-30])
    text = error(lambda: getattr(images, name)(str(raw), "cpu"))
    assert text.startswith(f"{name}: the official archive in {folder} cannot be read (") and "()" not in text
    assert text.endswith("): delete it and add runtime.download=true to fetch it again")


def test_incomplete_archive(raw):
    folder = write_idx(raw, "mnist")
    (folder / "train-images-idx3-ubyte").unlink()
    assert f"in {folder} cannot be read (files are missing): " in error(lambda: images.mnist(str(raw), "cpu"))


def test_archive_of_another_size_or_with_wrong_labels(raw):
    folder = write_idx(raw, "kmnist")
    labels = folder / "train-labels-idx1-ubyte"
    labels.write_bytes(idx(np.full(30, 11, dtype=np.uint8)))
    assert error(lambda: images.kmnist(str(raw), "cpu")) == f"{folder}: labels are 11 .. 11, wanted 0 .. 9"
    labels.write_bytes(idx(np.zeros(29, dtype=np.uint8)))
    assert error(lambda: images.kmnist(str(raw), "cpu")) == f"{folder}: 30 images and 29 labels"
    labels.write_bytes(idx(np.zeros(30, dtype=np.uint8)))
    (folder / "train-images-idx3-ubyte").write_bytes(idx(pixels(30, 20, 20)))
    assert error(lambda: images.kmnist(str(raw), "cpu")) == f"{folder}: images are 1x20x20, wanted 1x28x28"


# Downloads of MNIST's relatives, which torchvision does; and jobs that want the same data at the same time.


def slow(starts: list, seconds: float = 0.2) -> archives.Archive:
    """KMNIST's archive, with a download that writes its files bit by bit."""

    def get(name, root, download):
        starts.append(name)
        for file, content in idx_files("kmnist").items():
            write_files(root / "KMNIST/raw", {file: content[:50]})
            time.sleep(seconds / 4)
            write_files(root / "KMNIST/raw", {file: content})

    return replace(KMNIST, fetch=get)


def test_parallel_jobs_download_once(raw):
    starts, found = [], []
    KMNIST.read(write_idx(raw / "warm", "kmnist").parents[1])  # import torchvision before the race

    def job():
        found.append(load("kmnist", (1, 28, 28), 10, raw / "new", slow(starts), download=True))

    threads = [threading.Thread(target=job) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert starts == ["kmnist"] and [len(r.splits["train"][1]) for r in found] == [30] * 3


def test_parallel_processes_download_once(raw):
    KMNIST.read(write_idx(raw / "warm", "kmnist").parents[1])  # import torchvision once, before the fork
    fork = multiprocessing.get_context("fork")
    results = fork.SimpleQueue()

    def job():
        starts: list = []
        found = load("kmnist", (1, 28, 28), 10, raw / "new", slow(starts), download=True)
        results.put((len(starts), len(found.splits["train"][1])))

    jobs = [fork.Process(target=job) for _ in range(2)]
    for process in jobs:
        process.start()
    for process in jobs:
        process.join()
    assert sorted(results.get() for process in jobs if process.exitcode == 0) == [(0, 30), (1, 30)]


def test_download_completes_an_archive_and_keeps_a_parquet(raw):
    folder = write_idx(raw, "kmnist")
    (folder / "t10k-labels-idx1-ubyte").unlink()
    starts: list = []
    found = load("kmnist", (1, 28, 28), 10, raw, slow(starts, 0), download=True)
    assert starts == ["kmnist"] and len(found.splits["test"][1]) == 20
    write_parquets(raw, "other")
    other = replace(slow(starts), parts=("Other/raw",))
    assert load("other", (1, 28, 28), 10, raw, other, download=True).variant == "parquet (PNG)" and len(starts) == 1


def test_torchvision_that_cannot_download(raw, monkeypatch):
    from torchvision.datasets import KMNIST as Official

    monkeypatch.setattr(Official, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    text = error(lambda: images.kmnist(str(raw), "cpu", download=True))
    assert text.startswith(f"kmnist: fetching the official archive into {raw}/KMNIST/raw failed: Error downloading train-images")
