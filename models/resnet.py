"""Residual networks for small images (He et al. 2016; ITDM, tables 4 and 5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from models.net import Net, Norm, Tap

Block = Callable[[int, int, int, Norm], nn.Module]  # channels in, channels of the stage, stride, norm -> the block


def conv3x3(in_channels: int, width: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, norm after each, added to the shortcut before the last ReLU (He et al. 2016, figure 5 left).

    The shortcut is the input itself, or its 1x1 convolution and norm where size or width changes.
    """

    def __init__(self, in_channels: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            *[conv3x3(in_channels, width, stride), norm(width), nn.ReLU(inplace=True), Tap()],
            *[conv3x3(width, width), norm(width)],
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != width:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, width, 1, stride, bias=False), norm(width))
        self.relu = nn.ReLU(inplace=True)
        self.tap = Tap()

    def forward(self, x: Tensor) -> Tensor:
        return self.tap(self.relu(self.residual(x) + self.shortcut(x)))


def resnet(num_classes: int, norm: Norm, block: Block, widths: Sequence[int], blocks: Sequence[int], in_channels: int = 3) -> Net:
    """A 3x3 stem without pooling, then stages of `blocks[i]` blocks of `widths[i]` channels, each but the first halving the size.

    For [N, in_channels, H, W] of any size; h is the mean over the last map.
    """
    layers: list[nn.Module] = [conv3x3(in_channels, widths[0]), norm(widths[0]), nn.ReLU(inplace=True), Tap()]
    channels = widths[0]
    for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
        for i in range(count):
            layers.append(block(channels, width, 2 if stage > 0 and i == 0 else 1, norm))
            channels = width
    return Net(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(channels, num_classes))


def resnet18(num_classes: int, norm: Norm, in_channels: int = 3) -> Net:
    """Four stages of two basic blocks, 64 to 512 channels; h has 512 units.

    11,173,962 parameters with three channels, ten classes and `norm=bn`.
    """
    return resnet(num_classes, norm, BasicBlock, (64, 128, 256, 512), (2, 2, 2, 2), in_channels)
