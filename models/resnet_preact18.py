"""The pre-activation ResNet-18 of LaMix's tables 1 and 5 to 8 (He et al. 2016, Identity Mappings; as the mixup authors build it)."""

from __future__ import annotations

from torch import Tensor, nn

from models.bottleneck import squeezed
from models.net import Net, Norm, relu
from models.resnet import conv3x3, resnet


class ActivatedBlock(nn.Module):
    """Norm, ReLU, 3x3 convolution, twice, added to the shortcut: what the first ReLU gives, or where the shape changes a 1x1 of it.

    raw: a shortcut without convolution takes the block's input itself, as it is before norm and ReLU.
    """

    def __init__(self, in_channels: int, width: int, stride: int, norm: Norm, raw: bool = False) -> None:
        super().__init__()
        self.active = nn.Sequential(norm(in_channels), *relu())
        self.residual = nn.Sequential(conv3x3(in_channels, width, stride), norm(width), *relu(), conv3x3(width, width))
        same = stride == 1 and in_channels == width
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, width, 1, stride, bias=False)
        self.raw = raw and same

    def forward(self, x: Tensor) -> Tensor:
        active = self.active(x)
        return self.residual(active) + self.shortcut(x if self.raw else active)


def at_least(least: int, width: int) -> None:
    """Raises ValueError where a 1x1 convolution with stride would have fewer than 16 channels, `width` being below `least`.

    Of so few, PyTorch on a CPU writes where it must not (oneDNN, issue 6035).
    """
    if width < least:
        raise ValueError(f"width: {width} is not allowed; it must be at least {least}")


def preact_resnet18(
    num_classes: int, norm: Norm, width: int = 64, stem_stride: int = 1, bottleneck: int | None = None, in_channels: int = 3
) -> Net:
    """Four stages of two blocks, 64 to 512 channels, for [N, in_channels, H, W] of any size; h has 512 units, which may be negative.

    11,171,274 parameters with three channels, ten classes and `norm=bn`; 11,217,444 with 100 classes. The stem has norm and ReLU,
    and nothing comes after the last block but the mean over its map: both unlike He et al. Weights start as torch's.
    width: channels of the first stage; the others have 2, 4, 8 times as many. stem_stride: 2 for 64x64 images. bottleneck: see there.
    Raises ValueError for a width below 16.
    """
    at_least(16, width)
    widths = [width, 2 * width, 4 * width, 8 * width]
    return squeezed(resnet(num_classes, norm, ActivatedBlock, widths, (2, 2, 2, 2), in_channels, stem_stride), bottleneck)
