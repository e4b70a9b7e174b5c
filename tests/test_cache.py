"""The cache of decoded data."""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import replace

import pytest

from data import archives, images
from data.cache import _entry
from data.sources import load
from tests.datafiles import encoded, error, pixels, publish_cifar, write_files, write_idx

SMALL = "official archive, 30 training images, 20 test images"


def load_unread(name, official, raw):
    """From the cache, or not at all."""

    def read(root):
        raise AssertionError("the archive was read")

    return load(name, (1, 28, 28), 10, raw, replace(archives.idx(official), read=read))


HEAVY = {"torchvision", "pandas", "pyarrow", "PIL", "sklearn", "filelock"}


def test_cache_hit_imports_nothing_heavy(raw, monkeypatch):
    write_idx(raw, "kmnist")
    write_files(raw, {"cifar-10-python.tar.gz": publish_cifar(monkeypatch, "cifar10")[1]})
    for name in ("kmnist", "digits", "cifar10"):
        getattr(images, name)(str(raw), "cpu")
    assert sorted(f.name.split("-")[0] for f in (raw / "cache").iterdir()) == ["cifar10", "digits", "kmnist"]
    for module in HEAVY | set(sys.modules):
        if module.split(".")[0] in HEAVY:
            monkeypatch.setitem(sys.modules, module, None)  # importing it fails
        elif module.split(".")[0] == "data":
            monkeypatch.delitem(sys.modules, module)
    anew = importlib.import_module("data.images")
    assert anew is not images
    assert len(anew.kmnist(str(raw), "cpu").splits["train"][1]) == 30 and len(anew.digits(str(raw), "cpu").splits["train"][1]) == 500
    assert len(anew.cifar10(str(raw), "cpu", padding=4, flip=True).splits["train"][1]) == 20
    with pytest.raises(ImportError):  # what the cache has not
        anew.digits(str(raw / "elsewhere"), "cpu")


def test_cache_follows_the_raw_files(raw):
    write_idx(raw, "kmnist")
    assert len(images.kmnist(str(raw), "cpu").splits["train"][1]) == 30
    load_unread("kmnist", "KMNIST", raw)
    write_idx(raw, "kmnist", train=40)
    assert len(images.kmnist(str(raw), "cpu").splits["train"][1]) == 40


def test_cache_follows_every_file_of_a_folder(raw):
    """Also when only its time changes; and an entry belongs to one size."""
    for name in ("train/0/a", "train/1/a", "test/0/a", "test/1/a"):
        write_files(raw, {f"mnist/{name}.png": encoded(pixels(1, 28, 28)[0])})
    names = []
    for label, (file, when) in enumerate([("train/0/a.png", 1), ("train/0/a.png", 2), ("test/1/a.png", 1)]):
        os.utime(raw / "mnist" / file, ns=(when, when))
        names.append(_entry(raw, "x", [raw / "mnist/train", raw / "mnist/test"]))
        assert _entry(raw, "x", [raw / "mnist/train", raw / "mnist/test"]) == names[label]
    assert len({*names, _entry(raw, "y", [raw / "mnist/train", raw / "mnist/test"])}) == 4
    write_files(raw, {"mnist/test/0/b.png": b""})
    assert _entry(raw, "x", [raw / "mnist/train", raw / "mnist/test"]) not in names


@pytest.mark.parametrize("damage", [b"", b"junk", None])
def test_corrupt_cache_is_rebuilt(raw, damage):
    write_idx(raw, "kmnist")
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
    write_idx(raw, "qmnist", packed=True)
    (raw / "cache").write_text("")  # no folder can be made here, not even by root
    before = sorted(p for p in raw.rglob("*"))
    assert images.qmnist(str(raw), "cpu").variant == SMALL
    assert sorted(p for p in raw.rglob("*")) == before
    assert len(list(cache_home.iterdir())) == 1
    load_unread("qmnist", "QMNIST", raw)
    (tmp := raw.parent / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp))  # nowhere at all: without a cache
    assert images.qmnist(str(raw), "cpu").variant == SMALL


def test_a_folder_marked_read_only_stays_as_it_is(raw, cache_home):
    write_idx(raw, "fmnist")
    before = sorted(raw.rglob("*"))
    raw.chmod(0o555)  # which root could write all the same
    try:
        images.fmnist(str(raw), "cpu", download=True)
        text = error(lambda: images.kmnist(str(raw), "cpu", download=True))
        assert text == f"kmnist: nothing can be downloaded into {raw}, which is read-only: point DATA_DIR at another folder"
        assert sorted(raw.rglob("*")) == before and len(list(cache_home.iterdir())) == 1
    finally:
        raw.chmod(0o755)
