"""The other sources of raw data: parquet files, image folders, scikit-learn's digits in place of anything; resizing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from data import images
from data.formats import resized
from data.sources import load
from tests.datafiles import encoded, error, pixels, write_parquet, write_parquets


@pytest.mark.parametrize(
    ("kind", "options", "variant"), [("PNG", {}, "PNG"), ("JPEG", {"quality": 75}, "JPEG q75"), ("JPEG", {"quality": 90}, "JPEG q90")]
)
def test_parquet(raw, kind, options, variant):
    array = write_parquets(raw, "kmnist", kind, **options)
    b = images.kmnist(str(raw), "cpu")
    assert b.variant == f"KMNIST as parquet ({variant}), 20 training images, 20 test images"
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


@pytest.mark.parametrize("channels", [1, 3])
def test_resized(channels):
    """As torchvision's Resize with a PIL image, to smaller and larger sizes, of images that are not contiguous too."""
    from torchvision.transforms import Resize

    array = pixels(3, 28, 28, channels)
    for size in (13, 28, 40):
        found = resized(torch.from_numpy(array).permute(0, 3, 1, 2), size)
        wanted = [np.asarray(Resize(size)(Image.fromarray(image.squeeze()))).reshape(size, size, channels) for image in array]
        assert found.dtype == torch.uint8 and (found.permute(0, 2, 3, 1).numpy() == np.stack(wanted)).all()


def test_parquet_and_embedded_digits_in_another_size(raw):
    array = write_parquets(raw, "kmnist")
    small = images.kmnist(str(raw), "cpu", size=14)
    assert (small.splits["train"][0] == resized(torch.from_numpy(array)[:, None], 14)).all()
    assert small.variant == "KMNIST as parquet (PNG), at 14x14, 20 training images, 20 test images"
    embedded = images.cifar10(str(raw), "cpu", source="embedded", size=16)
    assert embedded.splits["test"][0].shape == (1297, 3, 16, 16)


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
