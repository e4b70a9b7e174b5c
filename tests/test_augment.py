"""Augmentation: the batch gets what torchvision's per-image transforms give, every possibility equally often."""

from __future__ import annotations

import importlib
from collections import Counter

import pytest
import torch
from scipy import stats
from torch import Tensor

from data.augment import crop_flip, windows


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
