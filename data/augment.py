"""Augmentation of a whole batch at once, on the device: random crop with padding and horizontal flip as one index."""

from __future__ import annotations

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


def crop_flip(images: Tensor, padding: int, flip: bool) -> Augment:
    """torchvision's RandomCrop(size, padding) and RandomHorizontalFlip for a batch: every offset, and both sides, equally likely.

    images [N, C, H, W] of any type -> (samples [n], generator) -> [n, C, H, W], channels_last. The padding is black.
    """
    view = windows(images, padding, flip)
    shape = (-1, *images.shape[2:], images.shape[1])

    def augment(chosen: Tensor, rng: Generator) -> Tensor:
        top, left = torch.randint(2 * padding + 1, (2, len(chosen)), generator=rng, device=chosen.device)
        side = torch.randint(view.shape[1], chosen.shape, generator=rng, device=chosen.device)
        return view[chosen, side, top, left].view(shape).permute(0, 3, 1, 2)

    return augment
