"""Residual networks for small images (He et al. 2016; ITDM, tables 4 and 5; LaMix, tables 1, 5 to 8)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from models.net import Net, Norm, relu

Block = Callable[[int, int, int, Norm], nn.Module]  # channels in, channels of the stage, stride, norm -> a block, or its shortcut


def conv3x3(in_channels: int, width: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)


def projection(in_channels: int, width: int, stride: int, norm: Norm) -> nn.Module:
    """A 1x1 convolution and norm (He et al. 2016, option B)."""
    return nn.Sequential(nn.Conv2d(in_channels, width, 1, stride, bias=False), norm(width))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, norm after each, added to the shortcut before the last ReLU (He et al. 2016, figure 5 left).

    The shortcut is the input itself; where size or width changes, what `shortcut` makes of it.
    """

    def __init__(self, in_channels: int, width: int, stride: int, norm: Norm, shortcut: Block = projection) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            *[conv3x3(in_channels, width, stride), norm(width), *relu()],
            *[conv3x3(width, width), norm(width)],
        )
        same = stride == 1 and in_channels == width
        self.shortcut = nn.Identity() if same else shortcut(in_channels, width, stride, norm)
        self.relu = nn.Sequential(*relu())

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.residual(x) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution, norm after each, added to the shortcut before the last ReLU (He et al. 2016, figure 5 right).

    `width` channels inside and four times as many out; the 3x3 convolution has the stride. The shortcut is a BasicBlock's.
    """

    def __init__(self, in_channels: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            *[nn.Conv2d(in_channels, width, 1, bias=False), norm(width), *relu()],
            *[conv3x3(width, width, stride), norm(width), *relu()],
            *[nn.Conv2d(width, 4 * width, 1, bias=False), norm(4 * width)],
        )
        same = stride == 1 and in_channels == 4 * width
        self.shortcut = nn.Identity() if same else projection(in_channels, 4 * width, stride, norm)
        self.relu = nn.Sequential(*relu())

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.residual(x) + self.shortcut(x))


def resnet(
    num_classes: int,
    norm: Norm,
    block: Block,
    widths: Sequence[int],
    blocks: Sequence[int],
    in_channels: int = 3,
    stem_stride: int = 1,
    expansion: int = 1,
    bare_stem: bool = False,
) -> Net:
    """A 3x3 stem without pooling, then stages of `blocks[i]` blocks of `widths[i]` channels, each but the first halving the size.

    For [N, in_channels, H, W] of any size; h is the mean over the last map. expansion: see `stages`. bare_stem: without norm and ReLU.
    """
    stem = [conv3x3(in_channels, widths[0], stem_stride), *([] if bare_stem else [norm(widths[0]), *relu()])]
    body = stages(block, widths, blocks, norm, expansion=expansion)
    features = nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Net(features, nn.Linear(expansion * widths[-1], num_classes))


def stages(
    block: Block, widths: Sequence[int], blocks: Sequence[int], norm: Norm, stem: int | None = None, expansion: int = 1
) -> Iterator[nn.Module]:
    """The blocks of all stages, from a stem of so many channels on, else `widths[0]`; a block puts out `expansion` times its width."""
    channels = widths[0] if stem is None else stem
    for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
        for i in range(count):
            yield block(channels, width, 2 if stage > 0 and i == 0 else 1, norm)
            channels = expansion * width


def resnet18(num_classes: int, norm: Norm, in_channels: int = 3) -> Net:
    """Four stages of two basic blocks, 64 to 512 channels; h has 512 units.

    11,173,962 parameters with three channels, ten classes and `norm=bn`.
    """
    return resnet(num_classes, norm, BasicBlock, (64, 128, 256, 512), (2, 2, 2, 2), in_channels)


def resnet50(num_classes: int, norm: Norm, width: int = 64, stem_stride: int = 1, in_channels: int = 3) -> Net:
    """Four stages of 3, 4, 6, 3 bottlenecks, 64 to 512 channels inside; h has 2,048 units. Weights start as torch's.

    23,520,842 parameters with three channels, ten classes and `norm=bn`; 23,705,252 with 100 classes.
    width: channels of the stem and inside the first stage; the others have 2, 4, 8 times as many. stem_stride: 2 for 64x64 images.
    """
    widths = [width, 2 * width, 4 * width, 8 * width]
    return resnet(num_classes, norm, Bottleneck, widths, (3, 4, 6, 3), in_channels, stem_stride, expansion=4)
