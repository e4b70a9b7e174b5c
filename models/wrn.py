"""Wide residual networks (Zagoruyko & Komodakis 2016; LaMix, table 2)."""

from __future__ import annotations

from functools import partial

from torch import nn

from models.bottleneck import squeezed
from models.net import Net, Norm, relu
from models.resnet import conv3x3, stages
from models.resnet_preact18 import ActivatedBlock


def wrn28_10(num_classes: int, norm: Norm, depth: int = 28, width: int = 10, bottleneck: int | None = None, in_channels: int = 3) -> Net:
    """Three stages of (depth - 4) / 6 pre-activation blocks, 16, 32, 64 times `width` channels; h is the last map's mean, 640 units.

    36,479,194 parameters with three channels, ten classes and `norm=bn`; 36,536,884 with 100 classes. For [N, in_channels, H, W] of
    any size. The stem has 16 channels and no norm; norm and ReLU follow the last block; no dropout. Weights start as torch's, not as
    the authors' (He et al.'s). bottleneck: see there. Raises ValueError for a depth that is not 6n + 4.
    """
    if depth < 10 or depth % 6 != 4:
        raise ValueError(f"depth: {depth} is not allowed; it must be 6n + 4: 10, 16, 22, 28, ...")
    widths = [16 * width, 32 * width, 64 * width]
    body = stages(partial(ActivatedBlock, raw=True), widths, ((depth - 4) // 6,) * 3, norm, stem=16)
    last = [norm(widths[-1]), *relu(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return squeezed(Net(nn.Sequential(conv3x3(in_channels, 16), *body, *last), nn.Linear(widths[-1], num_classes)), bottleneck)
