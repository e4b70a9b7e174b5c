"""The image data sets as bundles: their splits, subsets, options and names; real data where the environment has some."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from data import images
from data.augment import crop_flip
from data.standardise import position_maps
from data.subsets import first, held_out
from tests.datafiles import GREY, SMALL, error, write_idx

REAL = Path(os.environ.get("DATA_DIR", "/nonexistent")).resolve()
CONF = Path(__file__).resolve().parent.parent / "conf" / "dataset"
SVHN = [4948, 13861, 10585, 8497, 7458, 6882, 5727, 5595, 5045, 4659]  # the training images of each class
pytestmark = pytest.mark.usefixtures("cache_home")


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_digits(tmp_path):
    b = images.digits(str(tmp_path / "nowhere"), "cpu")
    (x, y), (x_test, y_test) = b.splits["train"], b.splits["test"]
    assert x.shape == (500, 1, 28, 28) and x_test.shape == (1297, 1, 28, 28)
    assert x.dtype == x_test.dtype == torch.uint8 and y.dtype == y_test.dtype == torch.int64
    assert len(torch.cat([x, x_test]).flatten(1).unique(dim=0)) == 1797  # no image twice
    assert torch.bincount(y).tolist() == [50] * 10 and int(torch.bincount(y_test).min()) >= 120
    assert abs(float(b.prepare(x).mean())) < 2e-4 and abs(float(b.prepare(x).std()) - 1) < 2e-4
    assert b.variant == "scikit-learn digits" and b.num_classes == 10 and not (tmp_path / "nowhere").exists()
    small = images.digits("", "cpu", train=1500, test=50)
    assert (small.splits["train"][0] == torch.cat([x, x_test])[:1500]).all()
    assert torch.bincount(small.splits["test"][1]).tolist() == [5] * 10
    assert small.variant == "scikit-learn digits, 1,500 training images, 50 test images"


# Subsets, and images held out of training.


def shuffled(counts: list[int]) -> Tensor:
    """So many labels of each class, in a random order."""
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))[torch.randperm(sum(counts), generator=rng())]


@pytest.mark.parametrize("counts", [SVHN, [5] * 199 + [3]], ids=["svhn", "200 classes"])
def test_subsets_have_the_first_images_of_each_class_in_turn(counts):
    y, classes = shuffled(counts), len(counts)
    for count in (classes, 4 * classes - 1, len(y)):
        chosen = first("train", y, count, classes)
        share = torch.bincount(y[chosen], minlength=classes)
        assert len(chosen.unique()) == count
        # no class has more than one image above another that has images left
        assert ((share >= share.max() - 1) | (share == torch.tensor(counts))).all()
        for k in range(0, classes, 9):
            assert chosen[y[chosen] == k].tolist() == (y == k).nonzero().flatten()[: int(share[k])].tolist()
    for count in (classes - 1, len(y) + 1):
        text = f"dataset.test={count}: choose {classes} (one per class) to {len(y):,} images"
        assert error(partial(first, "test", y, count, classes)) == text


@pytest.mark.parametrize("part", [0.001, 0.25, 0.35, 0.8])
def test_the_last_images_of_each_class_are_held_out(part):
    y = shuffled([30] * 10)
    kept, held = held_out(y, part, 10)
    assert len(held) == max(1, round(part * 300)) and sorted(torch.cat([kept, held]).tolist()) == list(range(300))
    assert kept.tolist() == sorted(kept.tolist()) == sorted(first("train", y, len(kept), 10).tolist()) and held.equal(held.sort().values)
    for k in range(10):
        mine, taken = (y == k).nonzero().flatten(), held[y[held] == k]
        assert mine[len(mine) - len(taken) :].tolist() == taken.tolist() and abs(len(taken) - 30 * part) < 1


def test_uneven_classes_are_held_out_in_proportion_and_keep_their_first_image():
    y = shuffled(SVHN)
    share = torch.bincount(y[held_out(y, 0.1, 10)[1]])
    assert (share - 0.1 * torch.tensor(SVHN)).abs().max() < 0.51 and share.sum() == 7326
    y = torch.tensor([0] * 5 + [1] * 2 + [2] * 40 + [1])
    assert held_out(y, 0.5, 3)[0].tolist() == [0, 1, 2, 5, 6, *range(7, 26)]
    assert held_out(y, 45 / 48, 3)[0].tolist() == [0, 5, 7]
    for part in (46 / 48, -0.1, 1, float("nan")):
        text = f"dataset.valid={part}: choose a part of at least 0 and below 1 that leaves an image of every class for training"
        assert error(partial(held_out, y, part, 3)) == text


def test_subsets_and_held_out_images_of_data_sets(raw):
    write_idx(raw, "mnist")
    full, small = images.mnist(str(raw), "cpu"), images.mnist(str(raw), "cpu", train=20, test=10, valid=0.5)
    assert (full.variant, small.variant) == (SMALL, "official archive, 10 training images, 10 held out, 10 test images")
    for split, images_of, part in (("train", "train", slice(10)), ("valid", "train", slice(10, 20)), ("test", "test", slice(10))):
        assert all(torch.equal(a, b[part]) for a, b in zip(small.splits[split], full.splits[images_of], strict=True))
    assert list(small.splits) == ["train", "test", "valid"] and list(full.splits) == ["train", "test"]
    assert small.epoch_size(True) == small.epoch_size(False) == 10
    plain, digits = images.digits("", "cpu"), images.digits("", "cpu", valid=0.1)
    assert digits.variant == "scikit-learn digits, 450 training images, 50 held out"
    both = torch.cat([digits.splits["train"][0], digits.splits["valid"][0]])  # classes in turn, throughout
    assert torch.equal(both, plain.splits["train"][0]) and torch.equal(digits.splits["test"][0], plain.splits["test"][0])
    text = "choose 10 (one per class) to 1,796 images; the others are for tests"
    assert [error(partial(images.digits, "", "cpu", train=n)) for n in (9, 1797)] == [f"dataset.train={n}: {text}" for n in (9, 1797)]
    cifar = images.cifar100(str(raw), "cpu", source="embedded", valid=0.5, padding=4)
    assert cifar.variant == "embedded digits in place of cifar100, 250 training images, 250 held out, 1,297 test images"
    assert cifar.take(torch.arange(250), rng()).x.shape == (250, 3, 32, 32) and len(cifar.splits["train"][1].unique()) == 100
    assert (torch.cat([batch.x for batch in cifar.batches("valid", 90)]) == cifar.prepare(cifar.splits["valid"][0])).all()


# Options.


def test_colour_sets_from_their_configs(tmp_path):
    """As a run makes them, on digits in place of the data."""
    for name in ("cifar10", "cifar100", "svhn", "stl10", "tiny_imagenet"):
        node, dataset = OmegaConf.load(CONF / f"{name}.yaml"), getattr(images, name)
        b = instantiate(node, data_dir=str(tmp_path), device="cpu", source="embedded", train=200, test=200, _convert_="all")
        x, side = b.splits["train"][0], 32 if name == "stl10" else dataset.shape[1]
        assert x.shape == (200, 3, side, side) and b.num_classes == {"cifar100": 100, "tiny_imagenet": 200}.get(name, 10)
        assert (node.padding, node.flip, node.standardise, node.valid) == (4, True, "channels", 0)
        wanted = (x.double() / 255 - torch.tensor(dataset.mean).view(3, 1, 1)) / torch.tensor(dataset.std).view(3, 1, 1)
        assert (b.prepare(x).double() - wanted).abs().max() < 1e-5
        chosen = torch.arange(200)
        assert (b.take(chosen, rng()).x == b.prepare(crop_flip(x, 4, True)(chosen, rng()))).all()
    plain = images.stl10(str(tmp_path), "cpu", source="embedded", train=200, test=200)
    assert plain.augment is None and plain.splits["train"][0].shape == (200, 3, 96, 96)
    # CIFAR-100's constants as they are published, in 0 .. 255
    assert [round(255 * value, 6) for value in images.cifar100.mean + images.cifar100.std] == [129.3, 124.1, 112.4, 68.2, 65.4, 70.4]


def test_grey_sets_and_test_images_can_be_augmented_too(raw):
    write_idx(raw, "mnist")
    for b in (images.mnist(str(raw), "cpu", padding=2), images.digits("", "cpu", flip=True)):
        x = b.splits["train"][0]
        changed = b.take(torch.arange(len(x)), rng()).x
        assert changed.shape == x.shape and (changed != b.prepare(x)).any()
    plain, b = (images.mnist(str(raw), "cpu", padding=4, flip=True, test_augment=flag, test=15) for flag in (False, True))
    x, y = b.splits["test"]
    assert (x == crop_flip(plain.splits["test"][0], 4, True)(torch.arange(15), rng())).all() and (x != plain.splits["test"][0]).any()
    assert (y == plain.splits["test"][1]).all() and (b.splits["train"][0] == plain.splits["train"][0]).all()
    assert b.variant == plain.variant + ", test images augmented"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"padding": 29}, "dataset.padding=29: choose 0 to 28 pixels"),
        ({"padding": 9, "size": 8}, "dataset.padding=9: choose 0 to 8 pixels"),
        ({"size": 0}, "dataset.size=0: choose a whole number of pixels of at least 1, or null for 28"),
        ({"test_augment": True}, "dataset.test_augment=true: there is nothing to augment with, set dataset.padding or dataset.flip"),
        ({"channels": 2}, "dataset.channels=2: choose 1, 3 or null"),
        ({"standardise": "foo"}, "dataset.standardise=foo: choose channels, channels_own, pixels or pixels_variance"),
        (
            {"standardise": "pixels", "test_augment": True, "flip": True},
            "dataset.test_augment=true: raw images are augmented, so choose dataset.standardise=channels, not pixels",
        ),
    ],
)
def test_options_out_of_range(options, text):
    assert error(lambda: images.mnist("", "cpu", source="embedded", **options)) == text


def test_a_grey_image_three_times(raw):
    """For networks that take colour: mean and deviation are the grey ones, crops and mirrors the same for all three."""
    write_idx(raw, "mnist")
    grey, colour = (images.mnist(str(raw), "cpu", size=32, padding=4, flip=True, channels=channels) for channels in (1, 3))
    for split, (x, y) in colour.splits.items():
        assert torch.equal(x, grey.splits[split][0].expand(-1, 3, -1, -1)) and torch.equal(y, grey.splits[split][1])
        assert x.is_contiguous(memory_format=torch.channels_last)
    chosen = torch.arange(20)
    assert torch.equal(colour.take(chosen, rng()).x, grey.take(chosen, rng()).x.expand(-1, 3, -1, -1))
    assert torch.equal(colour.prepare(colour.splits["test"][0]), grey.prepare(grey.splits["test"][0]).expand(-1, 3, -1, -1))
    assert (grey.variant, colour.variant) == ("official archive, at 32x32, 30 training images, 20 test images",) * 2
    assert error(lambda: images.cifar10("", "cpu", channels=1)) == "dataset.channels=1: choose 3 or null"
    assert error(lambda: images.digits("", "cpu", padding=-1)) == "dataset.padding=-1: choose 0 to 28 pixels"
    few = images.mnist(str(raw), "cpu", source="embedded", classes=10, train=20, test=20, size=32, channels=3)
    assert few.splits["train"][0].shape == (20, 3, 32, 32)


def test_pixels(tmp_path):
    """All splits by the statistics of the images that are trained on, with the crops of `channels`."""
    made = partial(images.cifar10, str(tmp_path), "cpu", source="embedded", train=300, test=200, valid=0.2)
    plain, b, channels = made(standardise="pixels"), made(standardise="pixels", padding=4, flip=True), made(padding=4, flip=True)
    train = b.splits["train"][0].numpy().astype(np.float64)
    mean, std = train.mean(0), train.std(0)
    assert len(train) == 240 and (std == 0).any()
    for split in ("train", "test", "valid"):
        x = b.splits[split][0]
        wanted = np.where(std > 0, (x.numpy() - mean) / np.where(std > 0, std, 1), 0)
        result = torch.cat([batch.x for batch in b.batches(split, 70)])
        np.testing.assert_allclose(result.numpy(), wanted, rtol=1e-4, atol=1e-4)
        assert (x == channels.splits[split][0]).all() and x.dtype == torch.uint8
    chosen, generator, second = torch.arange(0, 240, 2), rng(), rng()
    taken, usual, x = b.take(chosen, generator), channels.take(chosen, second), b.splits["train"][0]
    assert (generator.get_state() == second.get_state()).all() and (taken.y == usual.y).all()
    assert (taken.x == crop_flip(x, 4, True, position_maps(x))(chosen, rng())).all()
    assert plain.augment is None and (plain.take(chosen, rng()).x == b.prepare(x[chosen])).all()


# Real data, where the environment has some.


@pytest.mark.parametrize(("name", "mean"), [("mnist", 0.1307), ("fmnist", 0.2860)])
def test_real_archive(name, mean):
    if not (REAL / GREY[name] / "raw").is_dir():
        pytest.skip(f"no {name} in DATA_DIR")
    b = getattr(images, name)(str(REAL), "cpu")
    x, y = b.splits["train"]
    assert x.shape == (60_000, 1, 28, 28) and b.splits["test"][0].shape == (10_000, 1, 28, 28)
    assert len(torch.bincount(y)) == 10 and round(float(x.float().mean()) / 255, 4) == mean


@pytest.mark.slow
def test_real_parquet(raw):
    path = REAL / "cifar10" / "test.parquet"
    if not path.is_file():
        pytest.skip("no cifar10 parquet in DATA_DIR")
    for split in ("train", "test"):
        (raw / "cifar10").mkdir(exist_ok=True)
        (raw / "cifar10" / f"{split}.parquet").symlink_to(path)
    bundle = images.cifar10(str(raw), "cpu")
    assert bundle.variant == "CIFAR-10 as parquet (JPEG q75), 10,000 training images"
    assert torch.bincount(bundle.splits["test"][1]).tolist() == [1000] * 10
