"""MobileNet for small images (Howard et al. 2017; ITDM, tables 4 and 5)."""

from __future__ import annotations

from torch import nn

from models.net import Net, Norm, relu

# Channels out and stride of each pair of convolutions.
BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))


def mobilenet(num_classes: int, norm: Norm, in_channels: int = 3) -> Net:
    """A 3x3 stem, then 13 pairs of depthwise 3x3 and pointwise 1x1 convolutions, each convolution-norm-ReLU.

    For [N, in_channels, H, W] of any size; h is the mean over the last map, 1,024 units. 3,217,226 parameters with three
    channels, ten classes and `norm=bn`. The stem has stride 1: images are 32x32.
    """

    def active(width: int) -> list[nn.Module]:
        return [norm(width), *relu()]

    channels = 32
    layers: list[nn.Module] = [nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), *active(channels)]
    for width, stride in BLOCKS:
        layers += [nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False), *active(channels)]
        layers += [nn.Conv2d(channels, width, 1, bias=False), *active(width)]
        channels = width
    return Net(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(channels, num_classes))
