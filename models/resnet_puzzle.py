"""The pre-activation ResNets of LaMix's tables 3 and 4 (He et al. 2016, Identity Mappings; as PuzzleMix's authors build them)."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from models.net import Net, Norm, relu
from models.resnet import conv3x3, resnet
from models.resnet_preact18 import ActivatedBlock, at_least


class ActivatedBottleneck(nn.Module):
    """Norm, ReLU and convolution, three times: 1x1, 3x3 and 1x1, added to the shortcut.

    `width` channels inside and four times as many out; the 3x3 convolution has the stride. The shortcut is the input itself, as it is
    before norm and ReLU; where the shape changes, a 1x1 convolution of what the first ReLU gives.
    """

    def __init__(self, in_channels: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.active = nn.Sequential(norm(in_channels), *relu())
        self.residual = nn.Sequential(
            *[nn.Conv2d(in_channels, width, 1, bias=False), norm(width), *relu()],
            *[conv3x3(width, width, stride), norm(width), *relu()],
            nn.Conv2d(width, 4 * width, 1, bias=False),
        )
        same = stride == 1 and in_channels == 4 * width
        self.shortcut = None if same else nn.Conv2d(in_channels, 4 * width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = self.active(x)
        return self.residual(active) + (x if self.shortcut is None else self.shortcut(active))


def puzzle_resnet18(num_classes: int, norm: Norm, width: int = 64, stem_stride: int = 1, in_channels: int = 3) -> Net:
    """Four stages of two blocks, 64 to 512 channels, for [N, in_channels, H, W] of any size; h has 512 units, which may be negative.

    11,171,146 parameters with three channels, ten classes and `norm=bn`; 11,217,316 with 100 classes. Unlike preact_resnet18, the stem
    is a bare convolution and a shortcut without convolution takes the block's input itself. Weights start as torch's.
    width: channels of the first stage; the others have 2, 4, 8 times as many. stem_stride: 2 for 64x64 images.
    Raises ValueError for a width below 16.
    """
    at_least(16, width)  # a 1x1 convolution with stride has as many channels
    widths = [width, 2 * width, 4 * width, 8 * width]
    block = partial(ActivatedBlock, raw=True)
    return resnet(num_classes, norm, block, widths, (2, 2, 2, 2), in_channels, stem_stride, bare_stem=True)


def puzzle_resnet50(num_classes: int, norm: Norm, width: int = 64, stem_stride: int = 1, in_channels: int = 3) -> Net:
    """Four stages of 3, 4, 6, 3 bottlenecks, 64 to 512 channels inside, else as puzzle_resnet18; h has 2,048 units.

    23,509,066 parameters with three channels, ten classes and `norm=bn`; 23,693,476 with 100 classes.
    width: channels of the stem and inside the first stage; the others have 2, 4, 8 times as many. stem_stride: 2 for 64x64 images.
    Raises ValueError for a width below 4.
    """
    at_least(4, width)  # a 1x1 convolution with stride has four times as many channels
    widths = [width, 2 * width, 4 * width, 8 * width]
    return resnet(num_classes, norm, ActivatedBottleneck, widths, (3, 4, 6, 3), in_channels, stem_stride, expansion=4, bare_stem=True)
