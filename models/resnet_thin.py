"""The narrow residual networks for 32x32 images (He et al. 2016, section 4.2), with norm layers or without (Fixup; PER, table 1)."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from models.net import Net, Norm, Shift, Tap
from models.resnet import BasicBlock, conv3x3, resnet, stages

WIDTHS = (16, 32, 64)
INITS, TAPS = ("fixup", "he"), ("input", "post_act")


class Subsample(nn.Module):
    """Every stride-th pixel, and zeros for the channels that are missing: a shortcut without weights (He et al. 2016, option A)."""

    def __init__(self, in_channels: int, width: int, stride: int, norm: Norm | None = None) -> None:
        super().__init__()
        self.stride, self.missing = stride, width - in_channels

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.missing))


class FixupBlock(nn.Module):
    """Two 3x3 convolutions between four learned scalars and a learned scale instead of norm layers (Zhang et al. 2019).

    The second convolution starts at 0: each block starts as its shortcut. Taps: the inputs of both convolutions, behind their
    scalars, so that the scalars can centre what PER looks at; with tap="post_act" what comes out of the ReLUs.
    """

    def __init__(self, in_channels: int, width: int, stride: int, norm: Norm | None, tap: str) -> None:
        super().__init__()
        before, after = (Tap, nn.Identity) if tap == "input" else (nn.Identity, Tap)
        self.enter = nn.Sequential(Shift(), before())
        self.conv1, self.conv2 = conv3x3(in_channels, width, stride), conv3x3(width, width)
        self.middle = nn.Sequential(Shift(), Tap(pre=True), nn.ReLU(), after(), Shift(), before())
        self.scale = nn.Parameter(torch.ones(()))
        self.leave = Shift()
        self.subsample = Subsample(in_channels, width, stride) if stride != 1 or in_channels != width else None
        self.relu = nn.Sequential(Tap(pre=True), nn.ReLU(), after())

    def forward(self, x: Tensor) -> Tensor:
        entered = self.enter(x)
        residual = self.leave(self.conv2(self.middle(self.conv1(entered))) * self.scale)
        return self.relu(residual + (x if self.subsample is None else self.subsample(entered)))


def fixup(num_classes: int, blocks: int, tap: str, in_channels: int) -> Net:
    """Three stages of `blocks` Fixup blocks; of its modules only convolutions and the classifier have more than one parameter."""
    stem = [conv3x3(in_channels, WIDTHS[0]), Shift(), Tap(pre=True), nn.ReLU()] + [Tap()] * (tap == "post_act")
    body = list(stages(partial(FixupBlock, tap=tap), WIDTHS, (blocks,) * 3, nn.Identity))
    last = [Tap()] * (tap == "input")
    net = Net(nn.Sequential(*stem, *body, *last, nn.AdaptiveAvgPool2d(1), nn.Flatten(), Shift()), nn.Linear(WIDTHS[-1], num_classes))
    for block in body:
        assert isinstance(block, FixupBlock)
        filters = block.conv1.out_channels
        nn.init.normal_(block.conv1.weight, std=math.sqrt(2 / (9 * filters)) / math.sqrt(len(body)))
        nn.init.zeros_(block.conv2.weight)
    nn.init.zeros_(net.classifier.weight)
    nn.init.zeros_(net.classifier.bias)
    return net


def thin(num_classes: int, norm: Norm, blocks: int, init: str | None, tap: str, in_channels: int) -> Net:
    """A stem of 16 channels, then three stages of `blocks` blocks of 16, 32, 64 channels; h is the mean over the last map.

    init: "fixup" takes no norm layers; "he" is the original, with the norm layers that are chosen; None: whichever fits them.
    tap: see FixupBlock; with norm layers both are the same. Raises ValueError for an unknown name, or Fixup with norm layers.
    """
    empty = isinstance(norm(8), nn.Identity)
    init = ("fixup" if empty else "he") if init is None else init
    for key, value, allowed in (("init", init, INITS), ("tap", tap, TAPS)):
        if value not in allowed:
            raise ValueError(f"{key}: {value!r} is not known; allowed: {', '.join(allowed)}")
    if init == "fixup":
        if not empty:
            raise ValueError("init: fixup goes without norm layers, choose norm=none")
        return fixup(num_classes, blocks, tap, in_channels)
    net = resnet(num_classes, norm, partial(BasicBlock, shortcut=Subsample), WIDTHS, (blocks,) * 3, in_channels)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return net


def resnet56(num_classes: int, norm: Norm, init: str | None = None, tap: str = "input", in_channels: int = 3) -> Net:
    """Nine blocks a stage, 55 taps. Fixup: 848,954 weights and 137 scalars with three channels and ten classes."""
    return thin(num_classes, norm, 9, init, tap, in_channels)


def resnet110(num_classes: int, norm: Norm, init: str | None = None, tap: str = "input", in_channels: int = 3) -> Net:
    """Eighteen blocks a stage, 109 taps. Fixup: 1,719,866 weights and 272 scalars with three channels and ten classes."""
    return thin(num_classes, norm, 18, init, tap, in_channels)
