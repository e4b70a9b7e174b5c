"""Where raw data comes from: MNIST and its relatives as archives, which source is chosen, what is said when there is none, downloads."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from data import archives, images
from data.sources import load
from tests.datafiles import SMALL, error, idx, idx_files, pixels, write_files, write_idx, write_parquets

KMNIST = archives.idx("KMNIST")


@pytest.mark.parametrize(("name", "packed"), [("mnist", False), ("fmnist", True), ("kmnist", None), ("qmnist", True)])
def test_official_archive(raw, name, packed):
    folder = write_idx(raw, name, packed)
    if packed is None:  # partly packed
        (folder / "t10k-labels-idx1-ubyte").unlink()
        (write_idx(raw / "packed", name, True) / "t10k-labels-idx1-ubyte.gz").rename(folder / "t10k-labels-idx1-ubyte.gz")
    b = getattr(images, name)(str(raw), "cpu")
    assert b.variant == SMALL
    for split, n in (("train", 30), ("test", 20)):
        x, y = b.splits[split]
        assert (x[:, 0].numpy() == pixels(n, 28, 28, seed=n)).all() and x.dtype == torch.uint8
        assert y.tolist() == [i % 10 for i in range(n)] and y.dtype == torch.int64


def test_auto_prefers_the_archive_and_source_chooses(raw):
    write_parquets(raw, "kmnist")
    assert images.kmnist(str(raw), "cpu").variant.startswith("KMNIST as parquet (PNG), ")
    write_idx(raw, "kmnist")
    wanted = {"auto": "official archive", "parquet": "KMNIST as parquet (PNG)", "embedded": "embedded digits in place of kmnist"}
    assert {source: images.kmnist(str(raw), "cpu", source=source).variant.partition(",")[0] for source in wanted} == wanted


def test_missing_data(cache_home):
    assert error(lambda: images.kmnist("data/raw", "cpu")) == (
        "kmnist is not under data/raw (looked for KMNIST/raw, kmnist/train.parquet, kmnist/train/): "
        "add runtime.download=true to fetch the official archive, or point DATA_DIR at it"
    )
    assert error(lambda: images.kmnist("data/raw", "cpu", download=True, source="parquet")) == (
        "kmnist is not under data/raw (looked for kmnist/train.parquet): put it there, or point DATA_DIR at it"
    )
    known = "auto, archive, parquet, folder, embedded"
    assert error(lambda: images.kmnist("x", "cpu", source="zip")) == f"dataset.source=zip: choose one of {known}"
    assert "digits come with scikit-learn, choose auto or embedded" in error(lambda: images.digits("x", "cpu", source="archive"))


def test_an_archive_that_is_not_whole_or_another(raw):
    for packed in (True, False):
        path = write_idx(raw, "kmnist", packed) / ("train-images-idx3-ubyte" + ".gz" * packed)
        path.write_bytes(path.read_bytes()[:-30])
        text = error(lambda: images.kmnist(str(raw), "cpu"))
        assert text.startswith(f"kmnist: the official archive in {path.parent} cannot be read (")
        assert text.endswith("): delete it and add runtime.download=true to fetch it again")
        path.unlink()
        assert f"in {path.parent} cannot be read (files are missing): " in error(lambda: images.kmnist(str(raw), "cpu"))
    folder = write_idx(raw, "kmnist")
    for file, content, fault in (
        ("labels-idx1", np.arange(30) % 11, "labels are 0 .. 10, wanted 0 .. 9"),
        ("labels-idx1", np.zeros(29), "30 images and 29 labels"),
        ("images-idx3", pixels(29, 20, 20), "images are 1x20x20, wanted 1x28x28"),
    ):
        (folder / f"train-{file}-ubyte").write_bytes(idx(content.astype(np.uint8)))
        assert error(lambda: images.kmnist(str(raw), "cpu")) == f"{folder}: {fault}"


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
    starts: list = []
    KMNIST.read(write_idx(raw / "warm", "kmnist").parents[1])  # import torchvision before the race and the fork

    def job(folder: str) -> int:
        return len(load("kmnist", (1, 28, 28), 10, raw / folder, slow(starts), download=True).splits["train"][1])

    with ThreadPoolExecutor(3) as jobs:
        assert list(jobs.map(job, ["threads"] * 3)) == [30] * 3 and starts == ["kmnist"]
    fork = multiprocessing.get_context("fork")
    results = fork.SimpleQueue()
    processes = [fork.Process(target=lambda: results.put((job("processes"), len(starts)))) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert sorted(results.get() for process in processes if process.exitcode == 0) == [(30, 1), (30, 2)]


def test_download_completes_an_archive_and_keeps_a_parquet(raw):
    (write_idx(raw, "kmnist") / "t10k-labels-idx1-ubyte").unlink()
    starts: list[str] = []
    assert len(load("kmnist", (1, 28, 28), 10, raw, slow(starts, 0), download=True).splits["test"][1]) == 20 and starts == ["kmnist"]
    write_parquets(raw, "other")
    other = replace(slow(starts), parts=("Other/raw",))
    assert load("other", (1, 28, 28), 10, raw, other, download=True).variant == "parquet (PNG)" and len(starts) == 1


def test_torchvision_that_cannot_download(raw, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.KMNIST.mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    text = error(lambda: images.kmnist(str(raw), "cpu", download=True))
    assert text.startswith(f"kmnist: fetching the official archive into {raw}/KMNIST/raw failed: Error downloading train-images")
