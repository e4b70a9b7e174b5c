"""DenseNet for small images (Huang et al. 2017; LaMix, table 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.net import Net, Norm, relu
from models.resnet import conv3x3


class DenseLayer(nn.Module):
    """[N, C, H, W] -> [N, C + growth, H, W]: behind its input, what two times norm, ReLU and convolution make of it."""

    def __init__(self, in_channels: int, growth: int, norm: Norm) -> None:
        super().__init__()
        self.new = nn.Sequential(
            *[norm(in_channels), *relu(), nn.Conv2d(in_channels, 4 * growth, 1, bias=False)],
            *[norm(4 * growth), *relu(), conv3x3(4 * growth, growth)],
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.new(x)], 1)


def densenet121(num_classes: int, norm: Norm, growth: int = 32, blocks: Sequence[int] = (6, 12, 24, 16), in_channels: int = 3) -> Net:
    """Blocks of so many dense layers each; between two, a 1x1 convolution to half the channels and a 2x2 average.

    For [N, in_channels, H, W], H and W at least 8; h is the mean over the last map, 1,024 units. 6,956,298 parameters with
    three channels, ten classes and `norm=bn`; 7,048,548 with 100 classes. The stem is a 3x3 convolution to 2 * growth channels without
    norm; norm and ReLU follow the last block. Weights start as torch's.
    growth: channels that each layer adds.
    """
    channels = 2 * growth
    layers: list[nn.Module] = [conv3x3(in_channels, channels)]
    for block, count in enumerate(blocks):
        if block:
            layers += [norm(channels), *relu(), nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)]
            channels //= 2
        layers += [DenseLayer(channels + i * growth, growth, norm) for i in range(count)]
        channels += count * growth
    last = [norm(channels), *relu(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return Net(nn.Sequential(*layers, *last), nn.Linear(channels, num_classes))
