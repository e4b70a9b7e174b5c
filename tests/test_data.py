"""The data sets as bundles: their splits, subsets, options and names, and what is said when there is none."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from data import images
from data.augment import crop_flip
from data.formats import Raw
from data.standardise import position_maps
from tests.datafiles import GREY, error, write_idx

COLOUR = ["cifar10", "cifar100", "svhn", "stl10", "tiny_imagenet"]
SMALL = "official archive, 30 training images, 20 test images"  # what write_idx writes, and not what there should be
pytestmark = pytest.mark.usefixtures("cache_home")


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


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


def test_subsets_are_balanced_and_in_file_order(raw):
    write_idx(raw, "mnist")
    full, small = images.mnist(str(raw), "cpu"), images.mnist(str(raw), "cpu", train=20, test=10)
    assert (small.splits["train"][0] == full.splits["train"][0][:20]).all()  # labels run 0 .. 9, 0 .. 9
    assert torch.bincount(small.splits["test"][1]).tolist() == [1] * 10
    assert (full.variant, small.variant) == (SMALL, "official archive, 20 training images, 10 test images")


def test_digits_variant_names_another_cut():
    variants = [images.digits("", "cpu", train=n, test=k).variant for n, k in ((500, None), (100, None), (1500, 20), (None, 20))]
    cuts = ["", ", 100 training images", ", 1,500 training images, 20 test images", ", 20 test images"]
    assert variants == ["scikit-learn digits" + cut for cut in cuts]


def test_subsets_have_every_class_and_no_more_than_there_is(raw):
    write_idx(raw, "mnist")
    for count in (0, 9, 31):
        text = error(partial(images.mnist, str(raw), "cpu", train=count))
        assert text == f"dataset.train={count}: choose 10 (one per class) to 30 images"
        text = error(partial(images.mnist, str(raw), "cpu", test=count))
        assert text == f"dataset.test={count}: choose 10 (one per class) to 20 images"
    for count in (9, 1797):
        text = error(partial(images.digits, "", "cpu", train=count))
        assert text == f"dataset.train={count}: choose 10 (one per class) to 1,796 images; the others are for tests"
    assert images.mnist(str(raw), "cpu", train=10).epoch_size(True) == 10


SVHN_COUNTS = [4948, 13861, 10585, 8497, 7458, 6882, 5727, 5595, 5045, 4659]  # the training images of each class


@pytest.mark.parametrize("counts", [SVHN_COUNTS, [50] * 100, [5] * 199 + [3]], ids=["svhn", "100 classes", "200 classes"])
def test_large_subsets_are_balanced_and_the_same_every_time(monkeypatch, counts):
    num_classes, total = len(counts), sum(counts)
    y = torch.repeat_interleave(torch.arange(num_classes), torch.tensor(counts))[torch.randperm(total, generator=rng())]
    x = torch.zeros(total, 3, 1, 1, dtype=torch.uint8)
    x.view(-1, 3)[:] = torch.stack([torch.arange(total) >> 8 * k & 255 for k in range(3)], 1)  # an image says which sample it is
    monkeypatch.setattr(images, "load", lambda *_: Raw({"train": (x, y), "test": (x[:num_classes], y[:num_classes])}, "made up"))
    some = replace(images.svhn, num_classes=num_classes, sizes={})
    for count in (num_classes, 3 * num_classes, 4 * num_classes - 1, total):
        found, labels = some("", "cpu", train=count).splits["train"]
        again = some("", "cpu", train=count).splits["train"][0]
        assert (found == again).all() and len(labels) == count
        which = (found.view(-1, 3).long() * torch.tensor([1, 1 << 8, 1 << 16])).sum(1)
        assert len(which.unique()) == count and (y[which] == labels).all()
        share = torch.bincount(labels, minlength=num_classes)
        # no class has more than one image above another that has images left
        assert ((share >= share.max() - 1) | (share == torch.tensor(counts))).all()
        for k in range(0, num_classes, 9):  # the first ones in file order
            assert which[labels == k].tolist() == (y == k).nonzero().flatten()[: int(share[k])].tolist()


# Options.


@pytest.mark.parametrize("name", COLOUR)
def test_colour_sets_from_their_configs(tmp_path, name):
    """As a run makes them, on digits in place of the data."""
    node = OmegaConf.load(Path(__file__).resolve().parent.parent / "conf" / "dataset" / f"{name}.yaml")
    known = getattr(images, name)
    b = instantiate(node, data_dir=str(tmp_path), device="cpu", source="embedded", train=200, test=200, _convert_="all")
    side = 32 if name == "stl10" else known.shape[1]
    assert b.num_classes == known.num_classes == {"cifar100": 100, "tiny_imagenet": 200}.get(name, 10)
    assert b.splits["train"][0].shape == (200, 3, side, side) and (node.padding, node.flip) == (4, True)
    raw = b.splits["train"][0].double() / 255
    wanted = (raw - torch.tensor(known.mean).view(3, 1, 1)) / torch.tensor(known.std).view(3, 1, 1)
    assert (b.prepare(b.splits["train"][0]).double() - wanted).abs().max() < 1e-5
    chosen = torch.arange(200)
    assert (b.take(chosen, rng()).x == b.prepare(crop_flip(b.splits["train"][0], 4, True)(chosen, rng()))).all()
    assert (node.standardise, node.valid) == ("channels", 0)
    plain = known(str(tmp_path), "cpu", source="embedded", train=200, test=200)
    assert plain.augment is None and plain.splits["train"][0].shape == (200, *known.shape)


def test_constants():
    """In 0 .. 255, as CIFAR-100's are published; the others as they are."""
    assert [round(255 * value, 6) for value in images.cifar100.mean + images.cifar100.std] == [129.3, 124.1, 112.4, 68.2, 65.4, 70.4]
    sizes = {name: tuple(getattr(images, name).sizes.values()) for name in COLOUR}
    assert sizes == {
        "cifar10": (50_000, 10_000),
        "cifar100": (50_000, 10_000),
        "svhn": (73_257, 26_032),
        "stl10": (5_000, 8_000),
        "tiny_imagenet": (100_000, 10_000),
    }


def test_grey_sets_can_be_augmented_too(raw):
    write_idx(raw, "mnist")
    for b in (images.mnist(str(raw), "cpu", padding=2), images.digits("", "cpu", flip=True)):
        x = b.splits["train"][0]
        changed = b.take(torch.arange(len(x)), rng()).x
        assert changed.shape == x.shape and (changed != b.prepare(x)).any()
    assert images.mnist(str(raw), "cpu").augment is images.digits("", "cpu").augment is None


def test_augmented_test_images(raw):
    write_idx(raw, "mnist")
    plain, found, again = (images.mnist(str(raw), "cpu", padding=4, flip=True, test_augment=b, test=15) for b in (False, True, True))
    x = found.splits["test"][0]
    assert (x == crop_flip(plain.splits["test"][0], 4, True)(torch.arange(15), rng())).all() and (x != plain.splits["test"][0]).any()
    assert (x == again.splits["test"][0]).all() and (found.splits["test"][1] == plain.splits["test"][1]).all()
    assert (found.splits["train"][0] == plain.splits["train"][0]).all()
    assert found.variant == plain.variant + ", test images augmented"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"padding": -1}, "dataset.padding=-1: choose 0 to 28 pixels"),
        ({"padding": 29}, "dataset.padding=29: choose 0 to 28 pixels"),
        ({"padding": 9, "size": 8}, "dataset.padding=9: choose 0 to 8 pixels"),
        ({"size": 0}, "dataset.size=0: choose a whole number of pixels of at least 1, or null for 28"),
        ({"size": -4}, "dataset.size=-4: choose a whole number of pixels of at least 1, or null for 28"),
        ({"test_augment": True}, "dataset.test_augment=true: there is nothing to augment with, set dataset.padding or dataset.flip"),
        ({"channels": 2}, "dataset.channels=2: choose 1, 3 or null"),
        ({"standardise": "foo"}, "dataset.standardise=foo: choose channels, channels_own, pixels or pixels_variance"),
        (
            {"standardise": "pixels", "test_augment": True, "flip": True},
            "dataset.test_augment=true: raw images are augmented, so choose dataset.standardise=channels, not pixels",
        ),
    ],
)
def test_options_out_of_range(raw, options, text):
    write_idx(raw, "mnist")
    assert error(lambda: images.mnist(str(raw), "cpu", **options)) == text
    if list(options) == ["padding"]:
        assert error(lambda: images.digits("", "cpu", **options)) == text
    images.mnist(str(raw), "cpu", padding=28, flip=True)


def test_a_grey_image_three_times(raw):
    """For networks that take colour: mean and deviation are the grey ones, crops and mirrors the same for all three."""
    write_idx(raw, "mnist")
    grey, colour = (images.mnist(str(raw), "cpu", size=32, padding=4, flip=True, channels=channels) for channels in (None, 3))
    for split, (x, y) in colour.splits.items():
        assert torch.equal(x, grey.splits[split][0].expand(-1, 3, -1, -1)) and torch.equal(y, grey.splits[split][1])
        assert x.is_contiguous(memory_format=torch.channels_last)
    chosen = torch.arange(20)
    assert torch.equal(colour.take(chosen, rng()).x, grey.take(chosen, rng()).x.expand(-1, 3, -1, -1))
    assert torch.equal(colour.prepare(colour.splits["test"][0]), grey.prepare(grey.splits["test"][0]).expand(-1, 3, -1, -1))
    assert (grey.variant, colour.variant) == ("official archive, at 32x32, 30 training images, 20 test images",) * 2
    assert torch.equal(images.mnist(str(raw), "cpu", channels=1).splits["train"][0], images.mnist(str(raw), "cpu").splits["train"][0])
    assert error(lambda: images.cifar10("", "cpu", channels=1)) == "dataset.channels=1: choose 3 or null"
    few = images.mnist(str(raw), "cpu", source="embedded", classes=10, train=20, test=20, size=32, channels=3)
    assert few.splits["train"][0].shape == (20, 3, 32, 32)


# Standardised by position.


@pytest.mark.parametrize(("padding", "flip"), [(0, False), (4, True)])
def test_pixels(tmp_path, padding, flip):
    """All splits by the statistics of the images that are trained on, with the crops of `channels`."""
    known = partial(images.cifar10, str(tmp_path), "cpu", source="embedded", train=300, test=200, padding=padding, flip=flip, valid=0.2)
    b, channels = known(standardise="pixels"), known()
    assert b.variant == channels.variant
    train = b.splits["train"][0].numpy().astype(np.float64)
    mean, std = train.mean(0), train.std(0)
    assert len(train) == 240 and (std == 0).any()
    for split in ("train", "test", "valid"):
        x = b.splits[split][0]
        wanted = np.where(std > 0, (x.numpy() - mean) / np.where(std > 0, std, 1), 0)
        found = torch.cat([batch.x for batch in b.batches(split, 70)])
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4, atol=1e-4)
        assert (x == channels.splits[split][0]).all() and x.dtype == torch.uint8
    chosen = torch.arange(0, 240, 2)
    one, other = rng(), rng()
    taken, usual = b.take(chosen, one), channels.take(chosen, other)
    assert (one.get_state() == other.get_state()).all() and (taken.y == usual.y).all()
    if padding:
        assert (taken.x == crop_flip(b.splits["train"][0], 4, True, position_maps(b.splits["train"][0]))(chosen, rng())).all()
    else:
        assert b.augment is None and (taken.x == b.prepare(b.splits["train"][0][chosen])).all()


# Held out of training.


def number(x):
    """The sample of which `numbered` made this image."""
    return (x.view(-1, 3).long() * torch.tensor([1, 1 << 8, 1 << 16])).sum(1)


def numbered(monkeypatch, y, num_classes):
    """A data set of these labels, whose images say which sample they are."""
    x = torch.stack([torch.arange(len(y)) >> 8 * k & 255 for k in range(3)], 1).to(torch.uint8).view(-1, 3, 1, 1)
    monkeypatch.setattr(images, "load", lambda *_: Raw({"train": (x, y), "test": (x[:num_classes], y[:num_classes])}, "made up"))
    return partial(replace(images.svhn, num_classes=num_classes, sizes={}), "", "cpu")


@pytest.mark.parametrize("train", [None, 200, 57])
@pytest.mark.parametrize("part", [0.001, 0.1, 0.25, 0.5, 0.8])
def test_held_out(monkeypatch, part, train):
    """Thirty images of each of ten classes, in any order: the last ones of the training images, classes in turn."""
    y = torch.arange(10).repeat(30)[torch.randperm(300, generator=rng())]
    made = numbered(monkeypatch, y, 10)
    torch.manual_seed(1)
    b, whole = made(valid=part, train=train), made(train=train)
    torch.manual_seed(2)
    again = made(valid=part, train=train)
    kept, held, there = (number(x) for x in (b.splits["train"][0], b.splits["valid"][0], whole.splits["train"][0]))
    for split in ("train", "test", "valid"):
        assert all(torch.equal(one, other) for one, other in zip(b.splits[split], again.splits[split], strict=True))
    assert len(held) == max(1, round(part * len(there)))
    assert there[torch.isin(there, held)].tolist() == held.tolist()  # complete and disjoint, and both in order
    assert there[~torch.isin(there, held)].tolist() == kept.tolist()
    for split, which in (("train", kept), ("valid", held)):
        assert (b.splits[split][1] == y[which]).all()
        share = torch.bincount(b.splits[split][1], minlength=10)
        assert share.max() - share.min() <= 1 + (train == 57)
    for k in range(10):  # the last ones of each class
        mine = y[there] == k
        share = int((y[held] == k).sum())
        assert there[mine].tolist()[int(mine.sum()) - share :] == held[y[held] == k].tolist()
    assert list(b.splits) == ["train", "test", "valid"] and list(whole.splits) == ["train", "test"]
    assert torch.equal(b.splits["test"][0], whole.splits["test"][0])
    assert b.variant == f"made up, {len(kept)} training images, {len(held)} held out"


def test_held_out_is_the_end_of_the_order_of_subsets(monkeypatch):
    y = torch.arange(10).repeat(30)[torch.randperm(300, generator=rng())]
    made = numbered(monkeypatch, y, 10)
    held = number(made(valid=0.35).splits["valid"][0])
    subset = number(made(train=195).splits["train"][0])  # its first 65 %
    assert sorted(held.tolist() + subset.tolist()) == list(range(300))


def test_uneven_classes_are_held_out_in_proportion(monkeypatch):
    y = torch.repeat_interleave(torch.arange(10), torch.tensor(SVHN_COUNTS))[torch.randperm(73_257, generator=rng())]
    share = torch.bincount(numbered(monkeypatch, y, 10)(valid=0.1).splits["valid"][1])
    assert (share - 0.1 * torch.tensor(SVHN_COUNTS)).abs().max() < 0.51 and share.sum() == 7326


def test_a_rare_class_keeps_its_first_image(monkeypatch):
    y = torch.tensor([0] * 5 + [1] * 2 + [2] * 40 + [1])
    kept = [number(numbered(monkeypatch, y, 3)(valid=part).splits["train"][0]).tolist() for part in (0.5, 45 / 48)]
    assert kept == [[0, 1, 2, 5, 6, *range(7, 26)], [0, 5, 7]]
    assert "leaves an image of every class" in error(lambda: numbered(monkeypatch, y, 3)(valid=46 / 48))


def test_held_out_of_digits_and_stand_ins(tmp_path):
    plain, b = images.digits("", "cpu"), images.digits("", "cpu", valid=0.1)
    assert [len(b.splits[split][1]) for split in ("train", "valid", "test")] == [450, 50, 1297]
    assert b.variant == "scikit-learn digits, 450 training images, 50 held out"
    for axis in (0, 1):
        both = torch.cat([b.splits["train"][axis], b.splits["valid"][axis]])  # classes in turn, throughout
        assert torch.equal(both, plain.splits["train"][axis]) and torch.equal(b.splits["test"][axis], plain.splits["test"][axis])
    assert images.digits("", "cpu", train=100, test=20, valid=0.2).variant == (
        "scikit-learn digits, 80 training images, 20 held out, 20 test images"
    )
    cifar = images.cifar100(str(tmp_path), "cpu", source="embedded", valid=0.5, padding=4)
    assert cifar.variant == "embedded digits in place of cifar100, 250 training images, 250 held out, 1,297 test images"
    assert len(cifar.splits["train"][1].unique()) == 100 and cifar.epoch_size(False) == 250
    assert cifar.take(torch.arange(250), rng()).x.shape == (250, 3, 32, 32)
    assert (torch.cat([batch.x for batch in cifar.batches("valid", 90)]) == cifar.prepare(cifar.splits["valid"][0])).all()


@pytest.mark.parametrize("part", [-0.1, 1, 1.5, 0.95, float("nan"), float("inf")])
def test_too_much_held_out(raw, part):
    write_idx(raw, "mnist")
    wanted = f"dataset.valid={part}: choose a part of at least 0 and below 1 that leaves an image of every class for training"
    assert error(lambda: images.mnist(str(raw), "cpu", valid=part)) == wanted
    assert error(lambda: images.digits("", "cpu", valid=part, train=30)) == wanted
    assert len(images.mnist(str(raw), "cpu", valid=0.6666).splits["train"][1]) == 10


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
    bundle = images.cifar10(str(raw), "cpu")
    assert bundle.variant == "CIFAR-10 as parquet (JPEG q75), 100 training images"
    assert torch.bincount(bundle.splits["test"][1]).tolist() == [1000] * 10
