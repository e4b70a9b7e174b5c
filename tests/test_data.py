"""Data: the bundle's batches, the data sets, and every source of raw data, over tiny archives that the tests write themselves."""

from __future__ import annotations

import gzip
import importlib
import io
import multiprocessing
import os
import struct
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import images
from data.bundle import Bundle, identity
from data.sources import DataError, load

GREY = {"mnist": "MNIST", "kmnist": "KMNIST", "fmnist": "FashionMNIST", "qmnist": "QMNIST"}
KMNIST = (images._torchvision("KMNIST"), "KMNIST/raw")


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    """Nothing that a test caches outlives it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)  # the data folder "" is this one
    return tmp_path / "home" / "retable"


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    return folder


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def idx(array: np.ndarray) -> bytes:
    """The idx format: type and number of dimensions, sizes, values, all big-endian."""
    kind = {"uint8": 8, "int32": 12}[array.dtype.name]
    return struct.pack(f">HBB{array.ndim}I", 0, kind, array.ndim, *array.shape) + array.astype(array.dtype.newbyteorder(">")).tobytes()


def pixels(count: int, *size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *size), dtype=np.uint8)


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


def write_archive(root: Path, name: str, packed: bool = False, **sizes: int) -> Path:
    folder = root / GREY[name] / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in idx_files(name, **sizes).items():
        (folder / (file + ".gz" if packed else file)).write_bytes(gzip.compress(content) if packed else content)
    return folder


def encoded(array: np.ndarray, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def write_parquet(path: Path, contents: list[bytes], labels: list, image: str = "img", label: str = "label") -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({image: [{"bytes": c, "path": None} for c in contents], label: labels}), path)


def write_parquets(root: Path, name: str, kind: str = "PNG", **options) -> np.ndarray:
    array = pixels(20, 28, 28)
    for split in ("train", "test"):
        write_parquet(root / name / f"{split}.parquet", [encoded(a, kind, **options) for a in array], [i % 10 for i in range(20)])
    return array


def error(call) -> str:
    """The text of the DataError, which must be one line."""
    with pytest.raises(DataError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The bundle.


def bundle(labels: list[int], num_classes: int, augment=identity) -> Bundle:
    y = torch.tensor(labels)
    x = torch.arange(len(y), dtype=torch.uint8).view(-1, 1, 1, 1)  # an image says which sample it is
    return Bundle({"train": (x, y), "test": (x, y)}, num_classes, lambda x: x.float(), "made up", augment)


UNEVEN = [0] * 7 + [1] * 3 + [2] * 5


def test_order_is_a_permutation():
    b = bundle(UNEVEN, 3)
    assert b.order(rng(), False).sort().values.tolist() == list(range(15))
    assert b.order(rng(), False).tolist() == b.order(rng(), False).tolist() != b.order(rng(1), False).tolist()
    assert b.epoch_size(False) == 15


def test_balanced_order_takes_classes_in_turn():
    b = bundle(UNEVEN, 3)
    y = b.splits["train"][1]
    order = b.order(rng(), True)
    assert len(order) == b.epoch_size(True) == 21
    assert (y[order] == torch.arange(21) % 3).all()
    times = torch.bincount(order, minlength=15)
    for k, n in enumerate([7, 3, 5]):  # every sample is seen, floor or ceil of 7 / n times
        assert set(times[y == k].tolist()) <= {7 // n, -(-7 // n)}
    assert order.tolist() == b.order(rng(), True).tolist() != b.order(rng(1), True).tolist()


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("batch_size", [4, 6, 100])
def test_epoch(balanced, batch_size):
    b = bundle(UNEVEN, 3)
    batches = list(b.epoch(batch_size, rng(), balanced))
    sizes = [len(batch.y) for batch in batches]
    assert sum(sizes) == b.epoch_size(balanced)
    assert set(sizes[:-1]) <= {batch_size} and sizes[-1] <= batch_size
    for batch in batches:
        assert batch.target is batch.y
        assert (b.splits["train"][1][batch.x.flatten().long()] == batch.y).all()
        if balanced:
            assert int(torch.bincount(batch.y).max()) <= batch.per_class == -(-len(batch.y) // 3)
        else:
            assert batch.per_class is None
    assert {int(i) for batch in batches for i in batch.x.flatten()} == set(range(15))


def test_batches_cover_the_split_in_order():
    seen = list(bundle(UNEVEN, 3).batches("test", 4))
    assert [len(batch.y) for batch in seen] == [4, 4, 4, 3]
    assert torch.cat([batch.x for batch in seen]).flatten().tolist() == list(range(15))
    assert torch.cat([batch.y for batch in seen]).tolist() == UNEVEN


def test_augment_gets_the_generator_and_only_training_is_augmented():
    def shift(x, generator):
        return x + torch.randint(1, 100, x.shape, generator=generator, dtype=torch.uint8)

    b = bundle(UNEVEN, 3, shift)
    first, again, other = ([batch.x.flatten().tolist() for batch in b.epoch(5, rng(s))] for s in (0, 0, 1))
    assert first == again != other
    assert torch.cat([batch.x for batch in b.batches("train", 5)]).flatten().tolist() == list(range(15))


# The data sets.


def test_digits(tmp_path):
    b = images.digits(str(tmp_path / "nowhere"), "cpu")
    (x, y), (x_test, y_test) = b.splits["train"], b.splits["test"]
    assert x.shape == (500, 1, 28, 28) and x_test.shape == (1297, 1, 28, 28)
    assert x.dtype == x_test.dtype == torch.uint8 and y.dtype == y_test.dtype == torch.int64
    assert torch.bincount(y).tolist() == [50] * 10
    assert int(torch.bincount(y_test).min()) >= 120
    assert b.variant == "scikit-learn digits" and b.num_classes == 10
    assert not (tmp_path / "nowhere").exists()


def test_digits_splits_are_disjoint_and_nested():
    both = torch.cat([images.digits("", "cpu").splits[s][0] for s in ("train", "test")])
    assert len(both.flatten(1).unique(dim=0)) == 1797  # no image twice
    small = images.digits("", "cpu", train=100, test=50)
    assert (small.splits["train"][0] == both[:100]).all()
    assert torch.bincount(small.splits["test"][1]).tolist() == [5] * 10


def test_digits_constants_are_those_of_the_training_images():
    b = images.digits("", "cpu")
    x = b.prepare(b.splits["train"][0])
    assert abs(float(x.mean())) < 2e-4 and abs(float(x.std()) - 1) < 2e-4


def test_normalise():
    x = torch.from_numpy(pixels(5, 3, 8, 8))
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    prepared = images.normalise(mean, std, "cpu")(x)
    expected = (x.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose(prepared, expected.float(), rtol=1e-5, atol=1e-6)  # torch.testing takes seconds to import
    assert prepared.dtype == torch.float32 and prepared.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("name", GREY)
def test_official_archive(raw, name, packed):
    write_archive(raw, name, packed)
    b = getattr(images, name)(str(raw), "cpu")
    assert b.variant == "official archive"
    for split, n in (("train", 30), ("test", 20)):
        x, y = b.splits[split]
        assert (x[:, 0].numpy() == pixels(n, 28, 28, seed=n)).all() and x.dtype == torch.uint8
        assert y.tolist() == [i % 10 for i in range(n)] and y.dtype == torch.int64


def test_archive_partly_packed(raw):
    folder = write_archive(raw, "kmnist")
    plain = folder / "t10k-labels-idx1-ubyte"
    plain.with_name(plain.name + ".gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    assert len(images.kmnist(str(raw), "cpu").splits["test"][1]) == 20


def test_subsets_are_balanced_and_in_file_order(raw):
    write_archive(raw, "mnist")
    full, small = images.mnist(str(raw), "cpu"), images.mnist(str(raw), "cpu", train=20, test=10)
    assert (small.splits["train"][0] == full.splits["train"][0][:20]).all()  # labels run 0 .. 9, 0 .. 9
    assert torch.bincount(small.splits["test"][1]).tolist() == [1] * 10
    assert (full.variant, small.variant) == ("official archive", "official archive, 20 training images, 10 test images")
    assert images.mnist(str(raw), "cpu", train=10, test=20).variant == "official archive, 10 training images"  # 20 are all


def test_digits_variant_names_another_cut():
    variants = [images.digits("", "cpu", train=n, test=k).variant for n, k in ((500, None), (100, None), (1500, 20), (None, 20))]
    cuts = ["", ", 100 training images", ", 1,500 training images, 20 test images", ", 20 test images"]
    assert variants == ["scikit-learn digits" + cut for cut in cuts]


def test_subsets_have_every_class_and_no_more_than_there_is(raw):
    write_archive(raw, "mnist")
    for count in (0, 9, 31):
        text = error(partial(images.mnist, str(raw), "cpu", train=count))
        assert text == f"dataset.train={count}: choose 10 (one per class) to 30 images"
        text = error(partial(images.mnist, str(raw), "cpu", test=count))
        assert text == f"dataset.test={count}: choose 10 (one per class) to 20 images"
    for count in (9, 1797):
        text = error(partial(images.digits, "", "cpu", train=count))
        assert text == f"dataset.train={count}: choose 10 (one per class) to 1,796 images; the others are for tests"
    assert images.mnist(str(raw), "cpu", train=10).epoch_size(True) == 10


# The other sources.


@pytest.mark.parametrize(
    ("kind", "options", "variant"), [("PNG", {}, "PNG"), ("JPEG", {"quality": 75}, "JPEG q75"), ("JPEG", {"quality": 90}, "JPEG q90")]
)
def test_parquet(raw, kind, options, variant):
    array = write_parquets(raw, "kmnist", kind, **options)
    b = images.kmnist(str(raw), "cpu")
    assert b.variant == f"parquet ({variant})"
    x, y = b.splits["train"]
    assert y.tolist() == [i % 10 for i in range(20)]
    if kind == "PNG":
        assert (x[:, 0].numpy() == array).all()


def test_jpeg_with_tables_of_no_quality_and_colour(raw):
    array = pixels(4, 32, 32, 3)
    table = list(range(1, 65))
    for split, options in (("train", {"qtables": [table, table]}), ("test", {"quality": 75})):
        write_parquet(raw / "c" / f"{split}.parquet", [encoded(a, "JPEG", **options) for a in array], [0, 1, 0, 1], "image", "fine_label")
    found = load("c", (3, 32, 32), 2, raw)
    assert found.variant == "parquet (JPEG)" and found.splits["train"][0].shape == (4, 3, 32, 32)
    assert load("c", (1, 32, 32), 2, raw).splits["train"][0].shape == (4, 1, 32, 32)


def test_image_folder(raw):
    for split in ("train", "test"):
        for kind in range(12):  # "10" comes after "9", not after "1"
            folder = raw / "pets" / split / str(kind)
            folder.mkdir(parents=True)
            (folder / "a.png").write_bytes(encoded(np.full((8, 8, 3), kind, dtype=np.uint8)))
    found = load("pets", (3, 8, 8), 12, raw)
    assert found.variant == "image folder (PNG)"
    assert found.splits["train"][0][:, 0, 0, 0].tolist() == found.splits["train"][1].tolist() == list(range(12))
    assert "12 class folders, wanted 10" in error(lambda: load("pets", (3, 8, 8), 10, raw))
    (raw / "pets" / "test" / "3" / "a.png").write_bytes(b"junk")
    assert error(lambda: load("pets", (3, 8, 8), 12, raw)) == f"{raw}/pets/test/3/a.png: not an image"


@pytest.mark.parametrize(("shape", "num_classes"), [((3, 32, 32), 100), ((1, 28, 28), 10), ((3, 64, 64), 200), ((3, 8, 8), 2)])
def test_embedded_stand_in(tmp_path, shape, num_classes):
    found = load("cifar100", shape, num_classes, tmp_path / "nowhere", source="embedded")
    assert found.variant == "embedded digits in place of cifar100"
    for split, n in (("train", 500), ("test", 1297)):
        x, y = found.splits[split]
        assert x.shape == (n, *shape) and x.dtype == torch.uint8
        counts = torch.bincount(y)
        assert len(counts) == num_classes and int(counts.min()) >= (n // num_classes if num_classes != 10 else 50)


def test_auto_prefers_the_archive_and_source_chooses(raw):
    write_parquets(raw, "kmnist")
    assert images.kmnist(str(raw), "cpu").variant == "parquet (PNG)"
    write_archive(raw, "kmnist")
    assert images.kmnist(str(raw), "cpu").variant == "official archive"
    assert images.kmnist(str(raw), "cpu", source="parquet").variant == "parquet (PNG)"
    assert images.kmnist(str(raw), "cpu", source="embedded").variant == "embedded digits in place of kmnist"


# The cache.


def no_archive(root, train, download):
    raise AssertionError("the archive was read")


HEAVY = {"torchvision", "pandas", "pyarrow", "PIL", "sklearn", "filelock"}


def test_cache_hit_imports_nothing_heavy(raw, monkeypatch):
    write_archive(raw, "kmnist")
    images.kmnist(str(raw), "cpu")
    images.digits(str(raw), "cpu")
    assert sorted(f.name.split("-")[0] for f in (raw / "cache").iterdir()) == ["digits", "kmnist"]
    for module in HEAVY | set(sys.modules):
        if module.split(".")[0] in HEAVY:
            monkeypatch.setitem(sys.modules, module, None)  # importing it fails
        elif module.split(".")[0] == "data":
            monkeypatch.delitem(sys.modules, module)
    anew = importlib.import_module("data.images")
    assert anew is not images
    assert len(anew.kmnist(str(raw), "cpu").splits["train"][1]) == 30 and len(anew.digits(str(raw), "cpu").splits["train"][1]) == 500
    with pytest.raises(ImportError):  # what the cache has not
        anew.digits(str(raw / "elsewhere"), "cpu")


def test_cache_follows_the_raw_files(raw):
    write_archive(raw, "kmnist")
    assert len(images.kmnist(str(raw), "cpu").splits["train"][1]) == 30
    load("kmnist", (1, 28, 28), 10, raw, no_archive, KMNIST[1])  # from the cache
    write_archive(raw, "kmnist", train=40)
    assert len(images.kmnist(str(raw), "cpu").splits["train"][1]) == 40


@pytest.mark.parametrize("damage", [b"", b"junk", None])
def test_corrupt_cache_is_rebuilt(raw, damage):
    write_archive(raw, "kmnist")
    before = images.kmnist(str(raw), "cpu")
    (entry,) = (raw / "cache").iterdir()
    whole = entry.read_bytes()
    middle = len(whole) // 4
    entry.write_bytes(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :] if damage is None else damage)
    after = images.kmnist(str(raw), "cpu")
    assert all((a == b).all() for s in ("train", "test") for a, b in zip(before.splits[s], after.splits[s], strict=True))
    assert entry.read_bytes() == whole
    assert list((raw / "cache").iterdir()) == [entry]  # and no temporary file stays


def test_read_only_data_folder_is_cached_elsewhere(raw, cache_home, monkeypatch):
    write_archive(raw, "qmnist", packed=True)
    (raw / "cache").write_text("")  # no folder can be made here, not even by root
    before = sorted(p for p in raw.rglob("*"))
    assert images.qmnist(str(raw), "cpu").variant == "official archive"
    assert sorted(p for p in raw.rglob("*")) == before
    assert len(list(cache_home.iterdir())) == 1
    load("qmnist", (1, 28, 28), 10, raw, no_archive, "QMNIST/raw")
    (tmp := raw.parent / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp))  # nowhere at all: without a cache
    assert images.qmnist(str(raw), "cpu").variant == "official archive"


def test_a_folder_marked_read_only_stays_as_it_is(raw, cache_home):
    write_archive(raw, "fmnist")
    before = sorted(raw.rglob("*"))
    raw.chmod(0o555)  # which root could write all the same
    try:
        images.fmnist(str(raw), "cpu", download=True)
        text = error(lambda: images.kmnist(str(raw), "cpu", download=True))
        assert text == f"kmnist: nothing can be downloaded into {raw}, which is read-only: point DATA_DIR at another folder"
        assert sorted(raw.rglob("*")) == before and len(list(cache_home.iterdir())) == 1
    finally:
        raw.chmod(0o755)


# Downloads.


def slow_download(starts: list, seconds: float = 0.2):
    """torchvision's KMNIST, with a download that writes its files bit by bit."""
    official = KMNIST[0]

    def archive(root, train, download):
        if download and not (root / "KMNIST/raw/t10k-labels-idx1-ubyte").exists():
            starts.append(train)
            folder = root / "KMNIST/raw"
            folder.mkdir(parents=True, exist_ok=True)
            for file, content in idx_files("kmnist").items():
                (folder / file).write_bytes(content[:50])
                time.sleep(seconds / 4)
                (folder / file).write_bytes(content)
        return official(root, train, False)

    return archive


def test_parallel_jobs_download_once(tmp_path):
    starts, found = [], []
    KMNIST[0](write_archive(tmp_path / "warm", "kmnist").parents[1], True, False)  # import torchvision before the race
    archive = slow_download(starts)

    def job():
        found.append(load("kmnist", (1, 28, 28), 10, tmp_path / "new", archive, KMNIST[1], download=True))

    threads = [threading.Thread(target=job) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert starts == [True] and [len(r.splits["train"][1]) for r in found] == [30] * 3


def test_parallel_processes_download_once(tmp_path):
    KMNIST[0](write_archive(tmp_path / "warm", "kmnist").parents[1], True, False)  # import torchvision once, before the fork
    fork = multiprocessing.get_context("fork")
    results = fork.SimpleQueue()

    def job():
        starts: list = []
        found = load("kmnist", (1, 28, 28), 10, tmp_path / "new", slow_download(starts), KMNIST[1], download=True)
        results.put((len(starts), len(found.splits["train"][1])))

    jobs = [fork.Process(target=job) for _ in range(2)]
    for process in jobs:
        process.start()
    for process in jobs:
        process.join()
    assert sorted(results.get() for process in jobs if process.exitcode == 0) == [(0, 30), (1, 30)]


def test_download_completes_an_archive_and_keeps_a_parquet(raw):
    folder = write_archive(raw, "kmnist")
    (folder / "t10k-labels-idx1-ubyte").unlink()
    starts: list = []
    found = load("kmnist", (1, 28, 28), 10, raw, slow_download(starts, 0), KMNIST[1], download=True)
    assert starts == [True] and len(found.splits["test"][1]) == 20
    write_parquets(raw, "other")
    assert load("other", (1, 28, 28), 10, raw, no_archive, "Other/raw", download=True).variant == "parquet (PNG)"


def test_failed_download(raw):
    def archive(root, train, download):
        raise RuntimeError("Error downloading x:\nTried http://a, got:\n<urlopen error>\n")

    text = error(lambda: load("kmnist", (1, 28, 28), 10, raw, archive, KMNIST[1], download=True))
    assert text.startswith(f"kmnist: fetching the official archive into {raw}/KMNIST/raw failed: Error downloading x: Tried http://a")


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
    folder = write_archive(raw, name, packed)
    path = folder / (file + ".gz" if packed else file)
    path.write_bytes(path.read_bytes()[:-30])
    text = error(lambda: getattr(images, name)(str(raw), "cpu"))
    assert text.startswith(f"{name}: the official archive in {folder} cannot be read (") and "()" not in text
    assert text.endswith("): delete it and add runtime.download=true to fetch it again")


def test_incomplete_archive(raw):
    folder = write_archive(raw, "mnist")
    (folder / "train-images-idx3-ubyte").unlink()
    assert f"in {folder} cannot be read (files are missing): " in error(lambda: images.mnist(str(raw), "cpu"))


def test_archive_of_another_size_or_with_wrong_labels(raw):
    folder = write_archive(raw, "kmnist")
    labels = folder / "train-labels-idx1-ubyte"
    labels.write_bytes(idx(np.full(30, 11, dtype=np.uint8)))
    assert error(lambda: images.kmnist(str(raw), "cpu")) == f"{folder}: labels are 11 .. 11, wanted 0 .. 9"
    labels.write_bytes(idx(np.zeros(29, dtype=np.uint8)))
    assert error(lambda: images.kmnist(str(raw), "cpu")) == f"{folder}: 30 images and 29 labels"
    labels.write_bytes(idx(np.zeros(30, dtype=np.uint8)))
    (folder / "train-images-idx3-ubyte").write_bytes(idx(pixels(30, 20, 20)))
    assert error(lambda: images.kmnist(str(raw), "cpu")) == f"{folder}: images are 1x20x20, wanted 1x28x28"


def test_broken_parquet(raw):
    write_parquets(raw, "kmnist")
    path = raw / "kmnist" / "train.parquet"
    good, image = path.read_bytes(), encoded(pixels(1, 28, 28)[0])

    def text() -> str:
        return error(lambda: images.kmnist(str(raw), "cpu"))

    path.write_bytes(good[: len(good) // 2])
    assert text().startswith(f"{path}: not a readable parquet file (")
    write_parquet(path, [image], [3], image="picture")
    assert text().startswith(f"{path}: wanted img or image (a struct with bytes) and label, found picture (struct<")
    write_parquet(path, [image], [3], label="class")
    assert text().endswith(", class (int64)")
    write_parquet(path, [image, b"junk"], [3, 4])
    assert text() == f"{path}, row 1: not an image"
    write_parquet(path, [image, image[:-40]], [3, 4])
    assert text().startswith(f"{path}, row 1: not a readable image (")
    write_parquet(path, [image, encoded(pixels(1, 20, 24)[0])], [3, 4])
    assert text() == f"{path}, row 1: the image is 20x24, wanted 28x28"
    write_parquet(path, [image, image], [3, None])
    assert text() == f"{path}, row 1: the label None is not a class number"
    write_parquet(path, [image, image], [3, -1])
    assert text() == f"{path}: labels are -1 .. 3, wanted 0 .. 9"
    path.write_bytes(good)
    (raw / "kmnist" / "test.parquet").unlink()
    assert text().startswith(f"{raw}/kmnist/test.parquet: not a readable parquet file (")


# Real data, where the environment has some.

REAL = Path(os.environ.get("DATA_DIR", "/nonexistent")).resolve()


@pytest.mark.parametrize(("name", "mean"), [("mnist", 0.1307), ("fmnist", 0.2860)])
def test_real_archive(name, mean):
    if not (REAL / GREY[name] / "raw").is_dir():
        pytest.skip(f"no {name} in DATA_DIR")
    b = getattr(images, name)(str(REAL), "cpu")
    x, y = b.splits["train"]
    assert x.shape == (60_000, 1, 28, 28) and b.splits["test"][0].shape == (10_000, 1, 28, 28)
    assert len(torch.bincount(y)) == 10
    assert round(float(x.float().mean()) / 255, 4) == mean


def test_real_parquet(raw):
    path = REAL / "cifar10" / "test.parquet"
    if not path.is_file():
        pytest.skip("no cifar10 parquet in DATA_DIR")
    import pyarrow as pa
    import pyarrow.parquet as pq

    (raw / "cifar10").mkdir()
    (raw / "cifar10" / "test.parquet").symlink_to(path)
    with pq.ParquetFile(path) as file:  # the training file: 100 images are enough
        pq.write_table(pa.Table.from_batches([next(file.iter_batches(100))]), raw / "cifar10" / "train.parquet")
    found = load("cifar10", (3, 32, 32), 10, raw)
    assert found.variant == "parquet (JPEG q75)"
    assert torch.bincount(found.splits["test"][1]).tolist() == [1000] * 10
