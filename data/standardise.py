"""From bytes to floats in one multiply-add: by constants of each channel, or by statistics of each position in the image."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Prepare = Callable[[Tensor], Tensor]  # uint8 images [N, C, H, W] -> float32, channels_last


def multiply_add(scale: Tensor, shift: Tensor) -> Prepare:
    """uint8 images [N, C, H, W] -> image * scale + shift; scale, shift [C, 1 or H, W], float32."""
    scales, shifts = (each.permute(1, 2, 0).flatten(1) for each in (scale, shift))

    def prepare(images: Tensor) -> Tensor:
        # One multiply-add, which also turns bytes into floats, on rows of pixels: three times as fast as on three channels.
        n, c, h, w = images.shape
        rows = images.permute(0, 2, 3, 1).reshape(n, h, w * c)
        return torch.addcmul(shifts, rows, scales).view(n, h, w, c).permute(0, 3, 1, 2)

    return prepare


def normalise(mean: Sequence[float], std: Sequence[float], width: int, device: str) -> Prepare:
    """uint8 images [N, C, H, width] -> (image / 255 - mean) / std per channel, float32, channels_last."""
    spread = torch.tensor(std, dtype=torch.float64)
    maps = 1 / (255 * spread), -torch.tensor(mean, dtype=torch.float64) / spread
    return multiply_add(*(each.float()[:, None, None].expand(-1, 1, width).to(device) for each in maps))


def channel_statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and deviation (the population's) of each channel over uint8 images [N, C, H, W], of pixels in 0 .. 1."""
    shades = torch.arange(256, dtype=torch.float64)
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).cpu()
    share = counts / counts.sum(1, keepdim=True).double()  # from counts, which are exact: the same on every device
    mean = share @ shades
    return (mean / 255).tolist(), ((share @ shades.square() - mean.square()).sqrt() / 255).tolist()


def position_maps(images: Tensor, variance: bool = False) -> tuple[Tensor, Tensor]:
    """Scale 1 / std and shift -mean / std of each position (c, y, x) over the images, as VCL's published code, and with it PER, has them.

    uint8 images [N, C, H, W] -> two [C, H, W], float32, on their device. std is the population's (divided by N). A position that is
    the same in all images has scale and shift 0, and so becomes 0 in any image. variance: in place of std the variance, of pixels in
    0 .. 255, as the code of Unitization's authors has it: images then have a deviation of about 1 / 64.
    """
    total = torch.zeros(images.shape[1:], dtype=torch.float64, device=images.device)
    squares = total.clone()
    for part in images.split(500):  # the whole as floats would be eight times the data set
        part = part.double()
        total += part.sum(0)
        squares += part.square().sum(0)
    # Whole numbers so far, exact up to 370,000 images: the same on every device, and a constant position has a spread of 0.
    spread = (len(images) * squares - total.square()).sqrt() / len(images)  # std
    scale = torch.where(spread > 0, 1 / (spread.square() if variance else spread), 0)
    return scale.float(), (-total / len(images) * scale).float()
