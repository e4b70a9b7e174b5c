"""Augmentation: the batch gets what torchvision's per-image transforms give, every possibility equally often."""

from __future__ import annotations

import importlib
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from data import images as known
from data.augment import crop_flip, prepared, windows
from data.formats import Raw
from data.standardise import channel_statistics, multiply_add, normalise, position_maps


def images(count: int, *size: int) -> Tensor:
    return torch.randint(1, 256, (count, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("size", [(1, 5, 7), (3, 8, 8)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_window_is_torchvisions(size: tuple[int, int, int], padding: int, flip: bool, layout: torch.memory_format) -> None:
    """Exactly, for given offsets and sides."""
    functional = importlib.import_module("torchvision.transforms.functional")
    x = images(3, *size).to(memory_format=layout)
    view = windows(x, padding, flip)
    _, height, width = size
    assert view.shape == (3, 1 + flip, 2 * padding + 1, 2 * padding + 1, height, width * size[0])
    for n in range(3):
        padded = functional.pad(x[n], padding)
        for side in range(1 + flip):
            for top in range(2 * padding + 1):
                for left in range(2 * padding + 1):
                    # torchvision flips after it has cropped; a mirrored image is cropped at the mirrored offset
                    start = 2 * padding - left if side else left
                    wanted = functional.crop(padded, top, start, height, width)
                    wanted = functional.hflip(wanted) if side else wanted
                    found = view[n, side, top, left].view(height, width, size[0]).permute(2, 0, 1)
                    assert torch.equal(found, wanted), (n, side, top, left)


def outcomes(batches: Tensor) -> Counter[bytes]:
    return Counter(image.contiguous().numpy().tobytes() for image in batches)


def test_same_outputs_as_torchvision_equally_often() -> None:
    """One image, padding 1: nine crops, two sides. Both ways give the same 18 images, and ours each as often as the others."""
    transforms = importlib.import_module("torchvision.transforms")
    x = images(1, 3, 4, 4)
    theirs = transforms.Compose([transforms.RandomCrop(4, padding=1), transforms.RandomHorizontalFlip()])
    torch.manual_seed(0)
    wanted = outcomes(torch.stack([theirs(x[0]) for _ in range(600)]))
    found = outcomes(crop_flip(x, 1, True)(torch.zeros(9000, dtype=torch.long), rng()))
    assert len(wanted) == 18 and found.keys() == wanted.keys()
    assert stats.chisquare(list(found.values())).pvalue > 1e-3


def test_samples_are_drawn_independently() -> None:
    """Top, left and side of neighbours in a batch: all 18 x 18 pairs equally often."""
    x = torch.arange(1, 17, dtype=torch.uint8).view(1, 1, 4, 4)
    batch = crop_flip(x, 1, True)(torch.zeros(40_000, dtype=torch.long), rng()).contiguous().flatten(1)
    kinds = torch.unique(batch, dim=0, return_inverse=True)[1].view(-1, 2)
    pairs = torch.bincount(kinds[:, 0] * 18 + kinds[:, 1], minlength=18 * 18)
    assert len(pairs) == 18 * 18 and stats.chisquare(pairs.numpy()).pvalue > 1e-3


def test_each_sample_gets_its_own_image() -> None:
    x = images(50, 3, 6, 6)
    chosen = torch.tensor([7, 3, 3, 49, 0])
    found = crop_flip(x, 2, True)(chosen, rng())
    assert found.shape == (5, 3, 6, 6) and found.dtype == torch.uint8 and found.is_contiguous(memory_format=torch.channels_last)
    every = windows(x, 2, True).reshape(50, -1, 6, 18)
    for image, n in zip(found, chosen.tolist(), strict=True):
        assert any(torch.equal(image.permute(1, 2, 0).reshape(6, 18), one) for one in every[n])
        assert not any(torch.equal(image.permute(1, 2, 0).reshape(6, 18), one) for one in every[n - 1])


def test_generator_decides() -> None:
    augment, chosen = crop_flip(images(20, 3, 8, 8), 4, True), torch.arange(20)
    first, again, other = (augment(chosen, rng(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    one = rng()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert not torch.equal(augment(chosen, one), augment(chosen, one))
    assert torch.equal(before, torch.get_rng_state())


def test_padding_is_black_and_can_be_left_out() -> None:
    x = images(200, 1, 4, 4)
    assert (crop_flip(x, 1, False)(torch.arange(200), rng()) == 0).any()
    flipped = crop_flip(x, 0, True)(torch.arange(200), rng())
    same = (flipped == x).flatten(1).all(1)
    assert 60 < int(same.sum()) < 140 and torch.equal(flipped[~same], x[~same].flip(3))
    assert torch.equal(crop_flip(x, 0, False)(torch.arange(200), rng()), x)


def test_prepared_is_both_in_turn() -> None:
    x, chosen = images(20, 3, 8, 8), torch.arange(20)
    raw = crop_flip(x, 2, True)
    found = prepared(raw, lambda images: images + 0.5)(chosen, rng())
    assert torch.equal(found, raw(chosen, rng()) + 0.5)


# From bytes to floats.


def standardised(x: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Each position's by its mean and population deviation over `by`, in float64; 0 where that has none."""
    by = by.astype(np.float64)
    std = by.std(0)
    constant = by.max(0) == by.min(0)
    return np.where(constant, 0, (x - by.mean(0)) / np.where(constant, 1, std))


def cropped(image: np.ndarray, padding: int, side: int, top: int, left: int) -> np.ndarray:
    """Image [C, H, W], mirrored if side is 1, padded with 0, and cut at (top, left)."""
    _, height, width = image.shape
    image = image[:, :, ::-1] if side else image
    return np.pad(image, ((0, 0), (padding, padding), (padding, padding)))[:, top : top + height, left : left + width]


def faint(count: int, *size: int) -> Tensor:
    """Images of which each position has a mean and a deviation of its own, and a few are constant."""
    low, high = (torch.randint(*limits, size, generator=rng(1)) for limits in ((0, 100), (101, 256)))
    x = (low + (high - low) * torch.rand(count, *size, generator=rng(2))).to(torch.uint8)
    x[:, 0, 0, 0], x[:, -1, -1, 1], x[:, -1, 2, 2] = 0, 255, 77
    return x


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("padding", [0, 1, 4, 6])
@pytest.mark.parametrize("size", [(1, 6, 7), (3, 6, 7)])
def test_positions_are_standardised_before_padding(size: tuple[int, int, int], padding: int, flip: bool) -> None:
    x = faint(40, *size)
    chosen = torch.randint(40, (300,), generator=rng(3))
    found = crop_flip(x, padding, flip, position_maps(x))(chosen, rng())
    assert found.dtype == torch.float32 and found.is_contiguous(memory_format=torch.channels_last)
    one = rng()
    tops, lefts = torch.randint(2 * padding + 1, (2, 300), generator=one).tolist()
    sides = torch.randint(1 + flip, (300,), generator=one).tolist()
    whole, inside = standardised(x.numpy(), x.numpy()), np.ones(size)
    for n, image, *place in zip(chosen.tolist(), found.numpy(), sides, tops, lefts, strict=True):
        np.testing.assert_allclose(image, cropped(whole[n], padding, *place), rtol=1e-5, atol=2e-5)
        assert (image[cropped(inside, padding, *place) == 0] == 0).all()


def test_both_ways_draw_the_same_crops() -> None:
    """What lies in the padding says where an image was cut."""
    x = images(200, 1, 6, 6)
    maps = torch.ones(1, 6, 6), torch.zeros(1, 6, 6)
    one, other = rng(), rng()
    raw, mapped = crop_flip(x, 3, True)(torch.arange(200), one), crop_flip(x, 3, True, maps)(torch.arange(200), other)
    assert torch.equal(raw.float(), mapped) and torch.equal(one.get_state(), other.get_state())


@pytest.mark.parametrize("count", [1, 2, 499, 1201])
def test_position_maps(count: int) -> None:
    x = faint(count, 3, 5, 4)
    scale, shift = position_maps(x.contiguous(memory_format=torch.channels_last))
    prepare = multiply_add(scale, shift)
    assert scale.dtype == shift.dtype == torch.float32 and scale.shape == shift.shape == (3, 5, 4)
    for other in (x, images(50, 3, 5, 4)):
        found = prepare(other)
        assert found.dtype == torch.float32 and found.is_contiguous(memory_format=torch.channels_last)
        wanted = standardised(other.numpy(), x.numpy())
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-5, atol=1e-5 * max(1, float(shift.abs().max())))
        constant = (x == x[0]).all(0).expand_as(found)
        assert constant.any() and (found[constant] == 0).all()


def test_position_maps_by_the_variance() -> None:
    """Of pixels in 0 .. 255, as Unitization's code divides: deviations of about 1 / 64 come out."""
    x = images(300, 3, 5, 4)
    x[:, 1, 2, 3] = 7
    scale, shift = position_maps(x, variance=True)
    values = x.double()
    mean, var = values.mean(0), values.var(0, correction=0)
    wanted = torch.where(var > 0, (values - mean) / var, 0)
    np.testing.assert_allclose(multiply_add(scale, shift)(x).numpy(), wanted.numpy(), rtol=1e-4, atol=1e-6)
    assert (wanted[:, 1, 2, 3] == 0).all() and 1 / 80 < wanted.std() < 1 / 60


def test_one_odd_image_is_told_from_a_constant_position() -> None:
    """The smallest spread that there is: 100,000 images that are 255, but one that is 254."""
    x = torch.full((100_000, 1, 1, 2), 255, dtype=torch.uint8)
    x[70_000, 0, 0, 1] = 254
    scale, shift = position_maps(x)
    values = standardised(np.array([[255, 254]]).T, x.numpy()[:, 0, 0])
    assert scale[0, 0, 0] == shift[0, 0, 0] == 0
    np.testing.assert_allclose(scale[0, 0, 1], values[0, 1] - values[1, 1], rtol=1e-6)
    np.testing.assert_allclose(shift[0, 0, 1], values[0, 1] - 255 * (values[0, 1] - values[1, 1]), rtol=1e-6)


def test_normalise() -> None:
    x = images(5, 3, 8, 8)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    prepared = normalise(mean, std, 8, "cpu")(x)
    expected = (x.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose(prepared, expected.float(), rtol=1e-5, atol=1e-6)  # torch.testing takes seconds to import
    assert prepared.dtype == torch.float32 and prepared.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_have_their_own_statistics(channels: int) -> None:
    """Those of the training images, exactly: normalised, each channel has mean 0 and deviation 1."""
    mean, std = channel_statistics(given := images(7, channels, 5, 6))
    values = (given.double() / 255).transpose(0, 1).flatten(1)
    assert mean == pytest.approx(values.mean(1).tolist(), rel=1e-12) and std == pytest.approx(
        values.std(1, correction=0).tolist(), rel=1e-9
    )


def test_images_can_be_standardised_by_their_own_channels() -> None:
    """Of the images that are trained on; and a batch says by what its pixels were divided."""
    raw = Raw({split: (images(20, 3, 8, 8), torch.arange(20) % 10) for split in ("train", "test")}, "")
    for standardise in ("channels", "channels_own"):
        bundle = known.cifar10.bundle(raw, {}, "cpu", 2, True, standardise=standardise)
        batch = next(bundle.batches("train", 20))
        values = batch.x.transpose(0, 1).flatten(1).double()
        own = bool(values.mean(1).abs().max() < 1e-6 and (values.std(1, correction=0) - 1).abs().max() < 1e-6)
        assert own == (standardise == "channels_own")
        pixels = batch.x * batch.scale - raw.splits["train"][0] / 255
        assert (pixels - pixels.mean((0, 2, 3), keepdim=True)).abs().max() < 1e-6
        taken = bundle.take(torch.arange(5), rng())
        assert torch.equal(taken.scale, batch.scale) and taken.scale.shape == (3, 1, 1)
    assert known.cifar10.bundle(raw, {}, "cpu", standardise="pixels").scale is None
