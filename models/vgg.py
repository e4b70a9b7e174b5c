"""VGG with norm layers, for small images (Simonyan & Zisserman 2015; ITDM, tables 4 and 5)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from models.net import Net, Norm, relu

VGG13 = ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512))


def vgg(num_classes: int, norm: Norm, stages: Sequence[Sequence[int]], in_channels: int = 3) -> Net:
    """Stages of 3x3 convolutions, each convolution-norm-ReLU, each stage ended by a max-pool; h is the pooled 1x1 map.

    For [N, in_channels, 32, 32] with five stages. Convolutions keep their biases, as in the code that ITDM took it from.
    """
    layers: list[nn.Module] = []
    for widths in stages:
        for width in widths:
            layers += [nn.Conv2d(in_channels, width, 3, padding=1), norm(width), *relu()]
            in_channels = width
        layers.append(nn.MaxPool2d(2))
    return Net(nn.Sequential(*layers, nn.Flatten()), nn.Linear(in_channels, num_classes))


def vgg13(num_classes: int, norm: Norm, in_channels: int = 3) -> Net:
    """Ten convolutions for [N, in_channels, 32, 32]; h has 512 units; 9,416,010 parameters with three channels, ten classes, `norm=bn`."""
    return vgg(num_classes, norm, VGG13, in_channels)
