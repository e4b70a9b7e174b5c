"""The official archives of the colour sets, in small, through torchvision's own classes."""

from __future__ import annotations

import tempfile

import pytest
import torch

from data import images, tiny_imagenet
from tests.datafiles import PACKED, error, md5, publish, tar_gz, tell_torchvision, write_files

AGAIN = "and add runtime.download=true to fetch it again"


@pytest.mark.parametrize(
    ("name", "packed"),
    [("cifar10", False), ("cifar100", True), ("svhn", False), ("stl10", False), ("tiny_imagenet", False), ("tiny_imagenet", True)],
)
def test_pixels_and_labels(raw, monkeypatch, name, packed):
    published = publish(monkeypatch, name)
    write_files(raw, {PACKED[name]: published.packed} if packed else published.files)
    bundle = getattr(images, name)(str(raw), "cpu")
    counts = [len(labels) for _, labels in published.splits.values()]
    assert bundle.variant == "official archive, {} training images, {} test images".format(*counts)  # not as many as there should be
    for split, (array, labels) in published.splits.items():
        x, y = bundle.splits[split]
        assert x.dtype == torch.uint8 and (x.permute(0, 2, 3, 1).numpy() == array).all()
        assert y.dtype == torch.int64 and y.tolist() == labels
    assert bundle.augment is None


@pytest.mark.parametrize("name", PACKED)
def test_packed_archive_of_another_md5(raw, monkeypatch, name):
    packed, path = publish(monkeypatch, name).packed, raw / PACKED[name]
    for content in (packed[:-10], b"<html>"):
        path.write_bytes(content)
        assert error(lambda: getattr(images, name)(str(raw), "cpu")) == (
            f"{name}: {path} has md5 {md5(content)}, wanted {md5(packed)}, so it is truncated or another file: delete it {AGAIN}"
        )
        assert sorted(raw.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "file"), [("cifar100", "cifar-100-python/meta"), ("stl10", "stl10_binary/test_y.bin"), ("svhn", "svhn/test_32x32.mat")]
)
def test_extracted_file_of_another_md5(raw, monkeypatch, name, file):
    files, packed, splits = publish(monkeypatch, name)
    path = raw / file
    write_files(raw, files | {file: b"other"})
    wrong = f"{name}: {path} has md5 {md5(b'other')}, wanted {md5(files[file])}"
    assert error(lambda: getattr(images, name)(str(raw), "cpu")).startswith(wrong)
    path.unlink()
    again = "add runtime.download=true to fetch it" if name == "svhn" else f"delete {path.parent} {AGAIN}"
    assert error(lambda: getattr(images, name)(str(raw), "cpu")) == f"{name}: {path} is missing: {again}"
    if packed:  # the packed archive, if it is whole, stands in for the folder
        write_files(raw, {PACKED[name]: packed})
        assert getattr(images, name)(str(raw), "cpu").splits["train"][1].tolist() == splits["train"][1]


def test_tiny_imagenet_that_is_not_whole(raw, monkeypatch):
    files, packed, splits = publish(monkeypatch, "tiny_imagenet")
    folder = raw / "tiny-imagenet-200"

    def text() -> str:
        message = error(lambda: images.tiny_imagenet(str(raw), "cpu"))
        assert message.endswith(f": delete {folder} {AGAIN}")
        return message.removesuffix(f": delete {folder} {AGAIN}")

    for file, fault in (("train/n11/images/n11_5.JPEG", "8 train images"), ("val/images/val_3.JPEG", "5 val images")):
        write_files(raw, files)
        (folder / file).unlink()
        assert text() == f"tiny_imagenet: {folder} has {fault} with a label, wanted {9 if 'train' in file else 6}"
    write_files(raw, files)
    (folder / "val/images/val_3.JPEG").write_bytes(b"junk")
    assert text() == f"tiny_imagenet: {folder}/val/images/val_3.JPEG: not an image"
    (folder / "val/val_annotations.txt").unlink()
    assert "val_annotations.txt" in text()
    write_files(raw, {PACKED["tiny_imagenet"]: packed})
    assert images.tiny_imagenet(str(raw), "cpu").splits["test"][1].tolist() == splits["test"][1]


def test_an_archive_is_extracted_into_a_temporary_folder_alone(raw, cache_home, monkeypatch):
    files = publish(monkeypatch, "stl10").files
    away, temporary = raw.parent / "evil", raw.parent / "temporary"
    packed = tar_gz({"../evil": b"", str(away): b"", "stl10_binary/../../evil": b"", **files})
    tell_torchvision(monkeypatch, "STL10", {file: content for file, content in files.items() if "unlabeled" not in file}, packed)
    write_files(raw, {PACKED["stl10"]: packed})
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    raw.chmod(0o555)
    try:
        images.stl10(str(raw), "cpu")
        assert list(raw.rglob("*")) == [raw / PACKED["stl10"]] and len(list(cache_home.iterdir())) == 1
    finally:
        raw.chmod(0o755)
    assert not list(temporary.iterdir()) and not away.exists()


def test_missing_archive(raw):
    mat, sums = ["svhn/train_32x32.mat", "svhn/test_32x32.mat"], f" (md5 {tiny_imagenet.MD5})"
    for name, places, folder, by_hand in (
        ("stl10", ["stl10_binary.tar.gz"], "stl10_binary, ", "stl10_binary.tar.gz"),
        ("tiny_imagenet", ["tiny-imagenet-200.zip"], "tiny-imagenet-200, ", f"tiny-imagenet-200.zip{sums}"),
        ("svhn", mat, "", " and ".join(mat)),
    ):
        assert error(lambda name=name: getattr(images, name)(str(raw), "cpu")) == (
            f"{name} is not under {raw} (looked for {folder}{', '.join(places)}, {name}/train.parquet, {name}/train/): "
            f"add runtime.download=true to fetch the official archive, or place {by_hand} there by hand, or point DATA_DIR at it"
        )
