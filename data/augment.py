"""Augmentation of a whole batch at once, on the device: random crop with padding and horizontal flip as one index."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from data.bundle import Augment


def windows(images: Tensor, padding: int, flip: bool) -> Tensor:
    """Every crop of every image, as a view: images [N, C, H, W] -> [N, 1 or 2, 2 * padding + 1, 2 * padding + 1, H, W * C].

    [n, side, top, left] is image n, mirrored if side is 1, padded with 0 on all sides and cut to [H, W] at (top, left); its rows
    hold pixel after pixel. The store behind the view has each padded image once, or twice with `flip`: a copy of bytes is
    cheaper than mirroring half of every batch.
    """
    count, channels, height, width = images.shape
    pixels = images.permute(0, 2, 3, 1)  # [N, H, W, C]
    store = images.new_zeros(count, 1 + flip, height + 2 * padding, width + 2 * padding, channels)
    inside = store[:, :, padding : padding + height, padding : padding + width]
    for side, image in enumerate((pixels, pixels.flip(2))[: 1 + flip]):
        inside[:, side] = image
    return store.flatten(3).unfold(2, height, 1).unfold(3, width * channels, channels)


def crop_flip(images: Tensor, padding: int, flip: bool, maps: tuple[Tensor, Tensor] | None = None) -> Augment:
    """torchvision's RandomCrop(size, padding) and RandomHorizontalFlip for a batch: every offset, and both sides, equally likely.

    images [N, C, H, W] of any type -> (samples [n], generator) -> [n, C, H, W], channels_last. The padding is black.
    maps: scale and shift, [C, H, W] each, float32. Then the result is that of image * scale + shift, padded with 0 after that, in float32:
    the maps are padded, mirrored and cut as the images are, so that nothing is stored as floats but them.
    """
    view = windows(images, padding, flip)
    moving = [windows(each[None], padding, flip)[0] for each in maps or ()]
    shape = (-1, *images.shape[2:], images.shape[1])

    def augment(chosen: Tensor, rng: Generator) -> Tensor:
        top, left = torch.randint(2 * padding + 1, (2, len(chosen)), generator=rng, device=chosen.device)
        side = torch.randint(view.shape[1], chosen.shape, generator=rng, device=chosen.device)
        rows = view[chosen, side, top, left]
        if moving:
            scale, shift = (each[side, top, left] for each in moving)
            rows = torch.addcmul(shift, rows, scale)  # 0 + 0 * 0 in the padding
        return rows.view(shape).permute(0, 3, 1, 2)

    return augment


def prepared(augment: Augment, prepare: Callable[[Tensor], Tensor]) -> Augment:
    """The augmentation's raw images, prepared."""
    return lambda chosen, rng: prepare(augment(chosen, rng))
