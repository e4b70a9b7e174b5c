"""The other sources of raw data: parquet files, image folders, scikit-learn's digits in place of anything; resizing."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import Resize

from data import images
from data.formats import resized
from data.sources import load
from tests.datafiles import encoded, error, pixels, write_files, write_parquet, write_parquets


def test_parquet(raw):
    array = write_parquets(raw, "kmnist")
    bundle, small = images.kmnist(str(raw), "cpu"), images.kmnist(str(raw), "cpu", size=14)
    assert images.kmnist(str(raw), "cpu", size=28).variant == bundle.variant  # its own size
    x, y = bundle.splits["train"]
    assert (x[:, 0].numpy() == array).all() and y.tolist() == [i % 10 for i in range(20)]
    assert bundle.variant == "KMNIST as parquet (PNG), 20 training images, 20 test images"
    assert torch.equal(small.splits["train"][0], resized(x, 14)) and "(PNG), at 14x14, " in small.variant
    write_parquets(raw, "kmnist", "JPEG", quality=75)
    assert "(JPEG q75), 20 " in images.kmnist(str(raw), "cpu").variant
    array, table = pixels(4, 32, 32, 3), list(range(1, 65))  # of no quality
    for split, options in (("train", {"qtables": [table, table]}), ("test", {"quality": 75})):
        write_parquet(raw / "c" / f"{split}.parquet", [encoded(a, "JPEG", **options) for a in array], [0, 1, 0, 1], "image", "fine_label")
    grey = load("c", (1, 32, 32), 2, raw)
    assert grey.variant == "parquet (JPEG)" and grey.splits["train"][0].shape == (4, 1, 32, 32)


def test_image_folder(raw):
    for label in range(12):  # "10" comes after "9", not after "1"
        image = encoded(np.full((8, 8, 3), label, dtype=np.uint8))
        write_files(raw / "pets", {f"train/{label}/a.png": image, f"test/{label}/a.png": image})
    data = load("pets", (3, 8, 8), 12, raw)
    assert data.variant == "image folder (PNG)"
    assert data.splits["train"][0][:, 0, 0, 0].tolist() == data.splits["train"][1].tolist() == list(range(12))
    assert "12 class folders, wanted 10" in error(lambda: load("pets", (3, 8, 8), 10, raw))
    (raw / "pets" / "test" / "3" / "a.png").write_bytes(b"junk")
    assert error(lambda: load("pets", (3, 8, 8), 12, raw)) == f"{raw}/pets/test/3/a.png: not an image"


@pytest.mark.parametrize(("shape", "num_classes"), [((3, 64, 64), 200), ((1, 28, 28), 10), ((3, 8, 8), 2)])
def test_embedded_stand_in(raw, shape, num_classes):
    data = load("cifar100", (shape[0], 9, 9), num_classes, raw / "nowhere", source="embedded", size=shape[1])
    for split, n in (("train", 500), ("test", 1297)):
        x, y = data.splits[split]
        assert x.shape == (n, *shape) and x.dtype == torch.uint8
        counts = torch.bincount(y)
        assert len(counts) == num_classes and int(counts.min()) >= (n // num_classes if num_classes != 10 else 50)


@pytest.mark.parametrize("channels", [1, 3])
def test_resized(channels):
    array = pixels(3, 28, 28, channels)
    for size in (13, 28, 40):
        result = resized(torch.from_numpy(array).permute(0, 3, 1, 2), size)  # not contiguous
        wanted = [np.asarray(Resize(size)(Image.fromarray(image.squeeze()))).reshape(size, size, channels) for image in array]
        assert result.dtype == torch.uint8 and (result.permute(0, 2, 3, 1).numpy() == np.stack(wanted)).all()


def test_broken_parquet(raw):
    write_parquets(raw, "kmnist")
    path, image, read = raw / "kmnist/train.parquet", encoded(pixels(1, 28, 28)[0]), partial(images.kmnist, str(raw), "cpu")
    path.write_bytes(path.read_bytes()[:3000])
    assert error(read).startswith(f"{path}: not a readable parquet file (")
    write_parquet(path, [image], [3], image="picture")
    assert error(read).startswith(f"{path}: wanted img or image (a struct with bytes) and label, found picture (struct<")
    write_parquet(path, [image], [3], label="class")
    assert error(read).endswith(", class (int64)")
    for content, label, fault in (
        (b"junk", 4, ", row 1: not an image"),
        (image[:-40], 4, ", row 1: not a readable image ("),
        (encoded(pixels(1, 20, 24)[0]), 4, ", row 1: the image is 20x24, wanted 28x28"),
        (image, None, ", row 1: the label None is not a class number"),
        (image, -1, ": labels are -1 .. 3, wanted 0 .. 9"),
    ):
        write_parquet(path, [image, content], [3, label])
        assert error(read).startswith(f"{path}{fault}")
    (raw / "kmnist/test.parquet").unlink()
    assert error(read).startswith(f"{raw}/kmnist/test.parquet: not a readable parquet file (")
