"""Augmentation against torchvision's transforms of single images, and standardisation against NumPy in float64."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from data.augment import crop_flip, prepared, windows
from data.formats import Raw
from data.images import cifar10
from data.standardise import channel_statistics, multiply_add, normalise, position_maps


def images(count: int, *size: int) -> Tensor:
    return torch.randint(1, 256, (count, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("size", "padding", "flip"), [((1, 5, 7), 4, True), ((3, 8, 8), 1, False), ((3, 5, 7), 0, True)])
def test_every_window_is_torchvisions(size: tuple[int, int, int], padding: int, flip: bool) -> None:
    """Exactly, for given offsets and sides."""
    from torchvision.transforms import functional

    x = images(3, *size).to(memory_format=torch.contiguous_format if flip else torch.channels_last)
    view = windows(x, padding, flip)
    _, height, width = size
    assert view.shape == (3, 1 + flip, 2 * padding + 1, 2 * padding + 1, height, width * size[0])
    for n, side, top, left in np.ndindex(view.shape[:4]):
        # torchvision flips after it has cropped; a mirrored image is cropped at the mirrored offset
        wanted = functional.crop(functional.pad(x[n], padding), top, 2 * padding - left if side else left, height, width)
        wanted = functional.hflip(wanted) if side else wanted
        assert torch.equal(view[n, side, top, left].view(height, width, size[0]).permute(2, 0, 1), wanted), (n, side, top, left)


def outcomes(batch: Tensor) -> Counter[bytes]:
    return Counter(image.contiguous().numpy().tobytes() for image in batch)


def test_same_outputs_as_torchvision_equally_often() -> None:
    """Of an image with padding 1, nine crops, two sides: both ways give the same 18 images, and crop_flip gives them equally often."""
    from torchvision.transforms import Compose, RandomCrop, RandomHorizontalFlip

    x = images(1, 3, 4, 4)
    transform = Compose([RandomCrop(4, padding=1), RandomHorizontalFlip()])
    torch.manual_seed(0)
    wanted = outcomes(torch.stack([transform(x[0]) for _ in range(600)]))
    counts = outcomes(crop_flip(x, 1, True)(torch.zeros(9000, dtype=torch.long), rng()))
    assert len(wanted) == 18 and counts.keys() == wanted.keys()
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_samples_are_drawn_independently() -> None:
    """Top, left and side of neighbours in a batch: all 18 x 18 pairs equally often."""
    x = torch.arange(1, 17, dtype=torch.uint8).view(1, 1, 4, 4)
    batch = crop_flip(x, 1, True)(torch.zeros(40_000, dtype=torch.long), rng()).contiguous().flatten(1)
    kinds = torch.unique(batch, dim=0, return_inverse=True)[1].view(-1, 2)
    pairs = torch.bincount(kinds[:, 0] * 18 + kinds[:, 1], minlength=18 * 18)
    assert len(pairs) == 18 * 18 and stats.chisquare(pairs.numpy()).pvalue > 1e-3


def test_the_given_generator_alone_decides() -> None:
    x, chosen = images(20, 3, 8, 8), torch.arange(20)
    augment, generator, before = crop_flip(x, 4, True), rng(), torch.get_rng_state()
    batch, second = augment(chosen, generator), augment(chosen, generator)
    assert torch.equal(batch, augment(chosen, rng())) and not torch.equal(batch, augment(chosen, rng(1)))
    assert not torch.equal(batch, second) and torch.equal(before, torch.get_rng_state())
    assert batch.dtype == torch.uint8 and batch.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(prepared(augment, lambda x: x + 0.5)(chosen, rng()), batch + 0.5)


# From bytes to floats.


def standardised(x: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Standardises positions by their mean and population deviation over `by`, in float64; constant positions become 0."""
    by = by.astype(np.float64)
    constant = by.max(0) == by.min(0)
    return np.where(constant, 0, (x - by.mean(0)) / np.where(constant, 1, by.std(0)))


def cropped(image: np.ndarray, padding: int, side: int, top: int, left: int) -> np.ndarray:
    """Image [C, H, W], mirrored if side is 1, padded with 0, and cut at (top, left)."""
    _, height, width = image.shape
    image = image[:, :, ::-1] if side else image
    return np.pad(image, ((0, 0), (padding, padding), (padding, padding)))[:, top : top + height, left : left + width]


def faint(count: int, *size: int) -> Tensor:
    """Images whose positions differ in mean and deviation; a few positions are constant."""
    low, high = (torch.randint(*limits, size, generator=rng(1)) for limits in ((0, 100), (101, 256)))
    x = (low + (high - low) * torch.rand(count, *size, generator=rng(2))).to(torch.uint8)
    x[:, 0, 0, 0], x[:, -1, -1, 1], x[:, -1, 2, 2] = 0, 255, 77
    return x


@pytest.mark.parametrize(("channels", "padding", "flip"), [(3, 4, True), (1, 6, False), (3, 0, True)])
def test_positions_are_standardised_before_padding(channels: int, padding: int, flip: bool) -> None:
    x = faint(40, channels, 6, 7)
    chosen = torch.randint(40, (300,), generator=rng(3))
    batch = crop_flip(x, padding, flip, position_maps(x))(chosen, rng())
    assert batch.dtype == torch.float32 and batch.is_contiguous(memory_format=torch.channels_last)
    generator = rng()
    tops, lefts = torch.randint(2 * padding + 1, (2, 300), generator=generator).tolist()
    sides = torch.randint(1 + flip, (300,), generator=generator).tolist()
    whole, inside = standardised(x.numpy(), x.numpy()), np.ones((channels, 6, 7))
    for n, image, *place in zip(chosen.tolist(), batch.numpy(), sides, tops, lefts, strict=True):
        np.testing.assert_allclose(image, cropped(whole[n], padding, *place), rtol=1e-5, atol=2e-5)
        assert (image[cropped(inside, padding, *place) == 0] == 0).all()


def test_position_maps() -> None:
    x = faint(1201, 3, 5, 4)
    scale, shift = position_maps(x.contiguous(memory_format=torch.channels_last))
    assert scale.dtype == shift.dtype == torch.float32 and scale.shape == shift.shape == (3, 5, 4)
    for batch in (x, images(50, 3, 5, 4)):
        result = multiply_add(scale, shift)(batch)
        assert result.dtype == torch.float32 and result.is_contiguous(memory_format=torch.channels_last)
        wanted = standardised(batch.numpy(), x.numpy())
        np.testing.assert_allclose(result.numpy(), wanted, rtol=1e-5, atol=1e-5 * max(1, float(shift.abs().max())))
        constant = (x == x[0]).all(0).expand_as(result)
        assert constant.any() and (result[constant] == 0).all()


def test_position_maps_by_the_variance() -> None:
    """Of pixels in 0 .. 255, as Unitization's code divides: deviations of about 1 / 64 come out."""
    x = images(300, 3, 5, 4)
    x[:, 1, 2, 3] = 7
    mean, var = x.double().mean(0), x.double().var(0, correction=0)
    wanted = torch.where(var > 0, (x.double() - mean) / var, 0)
    np.testing.assert_allclose(multiply_add(*position_maps(x, variance=True))(x).numpy(), wanted.numpy(), rtol=1e-4, atol=1e-6)
    assert (wanted[:, 1, 2, 3] == 0).all() and 1 / 80 < wanted.std() < 1 / 60


def test_an_odd_image_is_told_from_a_constant_position() -> None:
    """The smallest possible spread: 100,000 images that are 255, except for a single 254."""
    x = torch.full((100_000, 1, 1, 2), 255, dtype=torch.uint8)
    x[70_000, 0, 0, 1] = 254
    scale, shift = position_maps(x)
    high, low = standardised(np.array([[255, 254]]).T, x.numpy()[:, 0, 0])[:, 1]
    assert scale[0, 0, 0] == shift[0, 0, 0] == 0
    np.testing.assert_allclose([scale[0, 0, 1], shift[0, 0, 1]], [high - low, high - 255 * (high - low)], rtol=1e-6)


def test_channels_are_normalised_by_constants_or_by_their_statistics() -> None:
    x = images(7, 3, 8, 8)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    result = normalise(mean, std, 8, "cpu")(x)
    wanted = (x.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose(result, wanted.float(), rtol=1e-5, atol=1e-6)
    assert result.dtype == torch.float32 and result.is_contiguous(memory_format=torch.channels_last)
    values = (x.double() / 255).transpose(0, 1).flatten(1)
    own_mean, own_std = channel_statistics(x)
    assert own_mean == pytest.approx(values.mean(1).tolist(), rel=1e-12)
    assert own_std == pytest.approx(values.std(1, correction=0).tolist(), rel=1e-9)


def test_images_can_be_standardised_by_their_own_channels() -> None:
    """Of the images that are trained on; and a batch says by what its pixels were divided."""
    raw = Raw({split: (images(20, 3, 8, 8), torch.arange(20) % 10) for split in ("train", "test")}, "")
    for standardise in ("channels", "channels_own"):
        bundle = cifar10.bundle(raw, {}, "cpu", 2, True, standardise=standardise)
        batch = next(bundle.batches("train", 20))
        values = batch.x.transpose(0, 1).flatten(1).double()
        own = bool(values.mean(1).abs().max() < 1e-6 and (values.std(1, correction=0) - 1).abs().max() < 1e-6)
        assert own == (standardise == "channels_own")
        pixels = batch.x * batch.scale - raw.splits["train"][0] / 255
        assert (pixels - pixels.mean((0, 2, 3), keepdim=True)).abs().max() < 1e-6
        taken = bundle.take(torch.arange(5), rng())
        assert torch.equal(taken.scale, batch.scale) and taken.scale.shape == (3, 1, 1)
    assert cifar10.bundle(raw, {}, "cpu", standardise="pixels").scale is None
