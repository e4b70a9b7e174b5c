"""The official archives in colour, written by the tests in small, through torchvision's own classes; only its md5 sums are replaced."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import archives, images, tiny_imagenet
from tests.datafiles import (
    cifar_labels,
    error,
    md5,
    pixels,
    publish_cifar,
    publish_stl10,
    publish_svhn,
    publish_tiny,
    tar_gz,
    tell_torchvision,
    tiny_jpeg,
    tiny_label,
    write_files,
)

PACKED = {
    "cifar10": "cifar-10-python.tar.gz",
    "cifar100": "cifar-100-python.tar.gz",
    "stl10": "stl10_binary.tar.gz",
    "tiny_imagenet": "tiny-imagenet-200.zip",
}
SETS = [*PACKED, "svhn"]


def publish(monkeypatch: pytest.MonkeyPatch, name: str) -> tuple[dict[str, bytes], bytes]:
    """The extracted files by their path under the data folder, and the one file that holds them, if there is one."""
    if name.startswith("cifar"):
        return publish_cifar(monkeypatch, name)
    return {"svhn": publish_svhn, "stl10": publish_stl10, "tiny_imagenet": publish_tiny}[name](monkeypatch)


def expected(name: str, split: str) -> tuple[np.ndarray, list[int]]:
    """Images [N, H, W, 3] and labels, as they were written."""
    n = {"train": 20, "test": 10}[split]
    if name.startswith("cifar"):
        return pixels(n, 32, 32, 3, seed=split == "test"), cifar_labels(name, n)
    if name == "svhn":
        return pixels(n, 32, 32, 3, seed=n), [(i + 1) % 10 for i in range(n)]
    if name == "stl10":
        return pixels(n, 96, 96, 3, seed=n), [i % 10 for i in range(n)]
    kind = {"train": "train", "test": "val"}[split]
    order = [0, 3, 6, 2, 5, 8, 1, 4, 7] if kind == "train" else [3, 0, 5, 1, 4, 2]  # n03, n11, n20; as annotated
    decoded = [np.asarray(Image.open(io.BytesIO(tiny_jpeg(kind, i))).convert("RGB")) for i in order]
    return np.stack(decoded), [{"n03": 0, "n11": 1, "n20": 2}[tiny_label(kind, i)] for i in order]


def write(root: Path, name: str, monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    files, whole = publish(monkeypatch, name)
    write_files(root, {PACKED[name]: whole} if packed else files)


@pytest.mark.parametrize(("name", "packed"), [*((name, False) for name in SETS), *((name, True) for name in PACKED)])
def test_pixels_and_labels(raw, monkeypatch, name, packed):
    write(raw, name, monkeypatch, packed)
    bundle = getattr(images, name)(str(raw), "cpu")
    counts = [len(bundle.splits[split][1]) for split in ("train", "test")]
    assert bundle.variant == "official archive, {} training images, {} test images".format(*counts)  # not as many as there should be
    for split in ("train", "test"):
        x, y = bundle.splits[split]
        array, labels = expected(name, split)
        assert x.dtype == torch.uint8 and (x.permute(0, 2, 3, 1).numpy() == array).all()
        assert y.dtype == torch.int64 and y.tolist() == labels
    assert bundle.augment is None


def test_the_labels_of_the_test_are_telling():
    """Each would be another one by another reading: CIFAR-100's coarse labels, SVHN's 10, STL10's 1-based ones, the order of wnids.txt."""
    assert [label // 5 for label in cifar_labels("cifar100", 20)] != cifar_labels("cifar100", 20)
    assert expected("svhn", "train")[1][:10] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    assert min(expected("stl10", "train")[1]) == 0
    assert expected("tiny_imagenet", "test")[1] == [2, 0, 1, 0, 1, 2]


@pytest.mark.parametrize("damage", ["truncated", "another file"])
@pytest.mark.parametrize("name", PACKED)
def test_packed_archive_of_another_md5(raw, monkeypatch, name, damage):
    _, whole = publish(monkeypatch, name)
    content = whole[:-10] if damage == "truncated" else b"<html>"
    write_files(raw, {PACKED[name]: content})
    path = raw / PACKED[name]
    assert error(lambda: getattr(images, name)(str(raw), "cpu")) == (
        f"{name}: {path} has md5 {md5(content)}, wanted {md5(whole)}, so it is truncated or another file: "
        "delete it and add runtime.download=true to fetch it again"
    )
    assert sorted(raw.iterdir()) == [path]


@pytest.mark.parametrize(("name", "file"), [("cifar10", "data_batch_3"), ("cifar100", "meta"), ("stl10", "test_y.bin")])
def test_extracted_file_of_another_md5(raw, monkeypatch, name, file):
    files, whole = publish(monkeypatch, name)
    (path,) = (key for key in files if key.endswith(f"/{file}"))
    folder = raw / Path(path).parent
    write_files(raw, files | {path: b"other"})
    again = f"delete {folder} and add runtime.download=true to fetch it again"
    wrong = f"{name}: {raw / path} has md5 {md5(b'other')}, wanted {md5(files[path])}: {again}"
    assert error(lambda: getattr(images, name)(str(raw), "cpu")) == wrong
    (raw / path).unlink()
    assert error(lambda: getattr(images, name)(str(raw), "cpu")) == f"{name}: {raw / path} is missing: {again}"
    write_files(raw, {PACKED[name]: whole})  # the packed archive, if it is whole, stands in for the folder
    assert getattr(images, name)(str(raw), "cpu").splits["train"][1].tolist() == expected(name, "train")[1]


def test_svhn_of_another_md5(raw, monkeypatch):
    files, _ = publish_svhn(monkeypatch)
    write_files(raw, files | {"svhn/test_32x32.mat": b"other"})
    path = raw / "svhn" / "test_32x32.mat"
    text = error(lambda: images.svhn(str(raw), "cpu"))
    assert text.startswith(f"svhn: {path} has md5 {md5(b'other')}, wanted {md5(files['svhn/test_32x32.mat'])}, ")
    path.unlink()
    assert error(lambda: images.svhn(str(raw), "cpu")) == f"svhn: {path} is missing: add runtime.download=true to fetch it"


def test_tiny_imagenet_that_is_not_whole(raw, monkeypatch):
    files, whole = publish_tiny(monkeypatch)
    folder = raw / "tiny-imagenet-200"
    again = f"delete {folder} and add runtime.download=true to fetch it again"

    def text() -> str:
        return error(lambda: images.tiny_imagenet(str(raw), "cpu"))

    write_files(raw, files)
    (folder / "train/n11/images/n11_5.JPEG").unlink()
    assert text() == f"tiny_imagenet: {folder} has 8 train images with a label, wanted 9: {again}"
    write_files(raw, files)
    (folder / "val/images/val_3.JPEG").unlink()
    assert text() == f"tiny_imagenet: {folder} has 5 val images with a label, wanted 6: {again}"
    write_files(raw, files)
    (folder / "val/images/val_3.JPEG").write_bytes(b"junk")
    assert text() == f"tiny_imagenet: {folder}/val/images/val_3.JPEG: not an image: {again}"
    (folder / "val/val_annotations.txt").unlink()
    assert "val_annotations.txt" in text() and text().endswith(again)
    write_files(raw, {PACKED["tiny_imagenet"]: whole})
    assert images.tiny_imagenet(str(raw), "cpu").splits["test"][1].tolist() == expected("tiny_imagenet", "test")[1]


def test_stl10_needs_no_unlabelled_images(raw, monkeypatch):
    files, _ = publish_stl10(monkeypatch)
    write_files(raw, files | {"stl10_binary/unlabeled_X.bin": b"of another md5 than torchvision's"})
    assert len(images.stl10(str(raw), "cpu").splits["train"][1]) == 20


def test_only_what_is_needed_is_extracted_and_nothing_stays(raw, cache_home, monkeypatch):
    files, _ = publish_stl10(monkeypatch)
    away = raw.parent / "evil"
    evil = {"../evil": b"", str(away): b"", "stl10_binary/../../evil": b""}
    packed = tar_gz({"stl10_binary/unlabeled_X.bin": b"large", **evil, **files})
    tell_torchvision(monkeypatch, "STL10", {Path(file).name: content for file, content in files.items()}, packed)
    write_files(raw, {PACKED["stl10"]: packed})
    (temporary := raw.parent / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    seen = []
    extracted = archives._extracted

    def spy(*arguments):
        found = extracted(*arguments)
        seen.extend(path.relative_to(found) for path in temporary.rglob("*") if path.is_file())
        return found

    monkeypatch.setattr(archives, "_extracted", spy)
    raw.chmod(0o555)
    try:
        before = sorted(raw.rglob("*"))
        images.stl10(str(raw), "cpu")
        assert sorted(raw.rglob("*")) == before and len(list(cache_home.iterdir())) == 1
    finally:
        raw.chmod(0o755)
    assert sorted(map(str, seen)) == sorted(files)
    assert not list(temporary.iterdir()) and not away.exists()


@pytest.mark.parametrize("name", ["stl10", "tiny_imagenet", "svhn"])
def test_resized_as_torchvision_does(raw, cache_home, monkeypatch, name):
    from torchvision.transforms import Resize

    write(raw, name, monkeypatch, packed=name != "svhn")
    for size in (32, 24):
        bundle = getattr(images, name)(str(raw), "cpu", size=size)
        array, labels = expected(name, "train")
        wanted = np.stack([np.asarray(Resize(size)(Image.fromarray(image))) for image in array])
        assert (bundle.splits["train"][0].permute(0, 2, 3, 1).numpy() == wanted).all()
        assert bundle.splits["train"][1].tolist() == labels
        assert bundle.variant.startswith(f"official archive, at {size}x{size}, ") == (size != array.shape[1])
        entries = [path for path in (raw / "cache").iterdir() if f"-3x{size}x{size}-" in path.name]
        assert len(entries) == 1 and entries[0].stat().st_size < (len(array) + 11) * (3 * size**2 + 16) + 2000  # the small ones


@pytest.mark.parametrize("name", SETS)
def test_missing(raw, name):
    text = error(lambda: getattr(images, name)(str(raw), "cpu"))
    places = [PACKED[name]] if name in PACKED else ["svhn/train_32x32.mat", "svhn/test_32x32.mat"]
    looked = text.partition("(looked for ")[2].partition("): ")[0].split(", ")
    assert set(places) < set(looked) and {f"{name}/train.parquet", f"{name}/train/"} < set(looked)
    sums = {"tiny_imagenet": f" (md5 {tiny_imagenet.MD5})"}
    assert text.startswith(f"{name} is not under {raw} ") and text.endswith(
        "): add runtime.download=true to fetch the official archive, "
        f"or place {' and '.join(places)}{sums.get(name, '')} there by hand, or point DATA_DIR at it"
    )


def test_an_archive_comes_before_a_parquet(raw, monkeypatch):
    """SVHN's files lie in the folder that its parquet files would lie in."""
    files, _ = publish_svhn(monkeypatch)
    write_files(raw, files | {"svhn/train.parquet": b"junk"})
    assert images.svhn(str(raw), "cpu").variant.startswith("official archive")
    for file in files:
        (raw / file).unlink()
    assert "svhn/train.parquet: not a readable parquet file" in error(lambda: images.svhn(str(raw), "cpu"))
