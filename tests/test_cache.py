"""The cache of decoded data."""

from __future__ import annotations

import importlib
import os
import sys

import pytest

from data import images
from data.cache import _entry
from tests.datafiles import PACKED, SMALL, error, publish, write_files, write_idx

HEAVY = {"torchvision", "pandas", "pyarrow", "PIL", "sklearn", "filelock"}


def test_cache_hit_imports_nothing_heavy(raw, monkeypatch):
    write_idx(raw, "kmnist")
    write_files(raw, {PACKED["cifar10"]: publish(monkeypatch, "cifar10").packed})
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


def test_an_entry_is_named_after_its_label_and_all_files_of_its_folders(raw):
    """After their names, sizes and times."""
    files, names = ("train/0/a.png", "train/1/a.png", "test/0/a.png", "test/1/a.png"), []

    def entry(label: str = "x") -> str:
        return _entry(raw, label, [raw / "mnist/train", raw / "mnist/test"])

    write_files(raw / "mnist", dict.fromkeys(files, b"image"))
    for file, when in (("train/0/a.png", 1), ("train/0/a.png", 2), ("test/1/a.png", 1)):
        os.utime(raw / "mnist" / file, ns=(when, when))
        names.append(entry())
        assert entry() == names[-1]
    write_files(raw, {"mnist/test/0/b.png": b""})
    assert len({*names, entry(), entry("y")}) == 5


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
    assert entry.read_bytes() == whole and list((raw / "cache").iterdir()) == [entry]  # and no temporary file stays
    write_idx(raw, "kmnist", train=40)  # other files, another entry
    assert len(images.kmnist(str(raw), "cpu").splits["train"][1]) == 40


def test_a_data_folder_that_cannot_be_written_is_cached_elsewhere(raw, cache_home, monkeypatch):
    write_idx(raw, "qmnist", packed=True)
    (raw / "cache").write_text("")  # no folder can be made here, not even by root
    before = sorted(raw.rglob("*"))
    assert images.qmnist(str(raw), "cpu").variant == SMALL
    assert sorted(raw.rglob("*")) == before and len(list(cache_home.iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torchvision.datasets", None)  # it is read from there
        images.qmnist(str(raw), "cpu")
    (blocked := raw.parent / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))  # nowhere at all: without a cache
    assert images.qmnist(str(raw), "cpu").variant == SMALL


def test_a_folder_marked_read_only_stays_as_it_is(raw, cache_home):
    write_idx(raw, "fmnist")
    before = sorted(raw.rglob("*"))
    raw.chmod(0o555)  # root could write all the same
    try:
        images.fmnist(str(raw), "cpu", download=True)
        text = error(lambda: images.kmnist(str(raw), "cpu", download=True))
        assert text == f"kmnist: nothing can be downloaded into {raw}, which is read-only: point DATA_DIR at another folder"
        assert sorted(raw.rglob("*")) == before and len(list(cache_home.iterdir())) == 1
    finally:
        raw.chmod(0o755)
