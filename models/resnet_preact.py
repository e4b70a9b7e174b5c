"""The pre-activation residual networks of Unitization's experiments (its authors' code; He et al. 2016, Identity Mappings)."""

from __future__ import annotations

import math
from functools import partial

from torch import Tensor, nn

from models.net import Net, Norm, relu
from models.resnet import stages
from models.resnet_thin import WIDTHS

PADDINGS = ("both", "tf_same")


def conv(in_channels: int, width: int, stride: int = 1, padding: str = "both") -> nn.Module:
    """A 3x3 convolution with bias. padding: with stride 2, a pixel on all sides, or with "tf_same" on the last ones only, as TensorFlow."""
    if stride == 1 or padding == "both":
        return nn.Conv2d(in_channels, width, 3, stride, padding=1)
    return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(in_channels, width, 3, stride))


class PreActBlock(nn.Module):
    """Norm, ReLU, 3x3 convolution, twice, added to the shortcut: the block's input, or where its shape changes a 1x1 convolution of that.

    The input is not activated before the shortcut.
    """

    def __init__(self, in_channels: int, width: int, stride: int, norm: Norm, padding: str) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            *[norm(in_channels), *relu(), conv(in_channels, width, stride, padding)],
            *[norm(width), *relu(), conv(width, width)],
        )
        same = stride == 1 and in_channels == width
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(x) + self.shortcut(x)


def preact(num_classes: int, norm: Norm, blocks: int, padding: str, in_channels: int) -> Net:
    """A 3x3 stem with norm and ReLU, three stages of `blocks` blocks of 16, 32, 64 channels, norm and ReLU; h is the last map's mean.

    6 * blocks + 2 norm layers; the first block normalises the stem's output once more. For [N, in_channels, H, W], H and W multiples of 4.
    Convolutions and classifier start as Keras' `he_normal` of 2018: normal of variance 2 / fan-in, cut off at two deviations (which makes
    it 0.88 of that deviation), biases at 0. Raises ValueError for an unknown padding.
    """
    if padding not in PADDINGS:
        raise ValueError(f"padding: {padding!r} is not known; allowed: {', '.join(PADDINGS)}")
    stem = [nn.Conv2d(in_channels, WIDTHS[0], 3, padding=1), norm(WIDTHS[0]), *relu()]
    body = stages(partial(PreActBlock, padding=padding), WIDTHS, (blocks,) * 3, norm)
    features = nn.Sequential(*stem, *body, norm(WIDTHS[-1]), *relu(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net = Net(features, nn.Linear(WIDTHS[-1], num_classes))
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            std = math.sqrt(2 / layer.weight[0].numel())
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return net


def preact_resnet20(num_classes: int, norm: Norm, padding: str = "both", in_channels: int = 3) -> Net:
    """Three blocks a stage, 20 norm layers: the authors' "ResNet-18". 273,098 parameters with norm=bn, three channels and ten classes."""
    return preact(num_classes, norm, 3, padding, in_channels)


def preact_resnet110(num_classes: int, norm: Norm, padding: str = "both", in_channels: int = 3) -> Net:
    """Eighteen blocks a stage, 110 norm layers. 1,734,698 parameters with norm=bn, 1,738,762 with norm=unitization (three channels, ten
    classes)."""
    return preact(num_classes, norm, 18, padding, in_channels)
