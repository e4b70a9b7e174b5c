"""The two plain CNNs of ITDM's grey-image experiments (section 4.1; layer sizes from the authors' code)."""

from __future__ import annotations

from torch import nn

from models.net import Net, Norm, relu


def _active(width: int, norm: Norm) -> list[nn.Module]:
    """ReLU, then the norm layer: these networks normalise after the activation."""
    return [*relu(), norm(width)]


def net2c(num_classes: int, norm: Norm, in_channels: int = 1) -> Net:
    """Two 5x5 convolutions and one hidden linear layer for [N, in_channels, 28, 28]; h has 100 units (ITDM, table 1).

    106,680 parameters with one channel, ten classes and `norm=none`, as printed; the norm slots come after each activation.
    """
    features = nn.Sequential(
        *[nn.Conv2d(in_channels, 20, 5), *_active(20, norm), nn.MaxPool2d(2)],
        *[nn.Conv2d(20, 50, 5), *_active(50, norm), nn.MaxPool2d(2)],
        *[nn.Flatten(), nn.Linear(800, 100), *_active(100, norm)],
    )
    return Net(features, nn.Linear(100, num_classes))


def net5c(num_classes: int, norm: Norm, in_channels: int = 1) -> Net:
    """Five 3x3 convolutions for [N, in_channels, 28, 28], conv-ReLU-norm; h has 512 units (ITDM, tables 2 and 3).

    Spatial sizes 28-26-24-24-12-10-8-1; 1,575,114 parameters with one channel, ten classes and `norm=bn`.
    """
    features = nn.Sequential(
        *[nn.Conv2d(in_channels, 32, 3), *_active(32, norm)],
        *[nn.Conv2d(32, 64, 3), *_active(64, norm)],
        *[nn.Conv2d(64, 128, 3, padding=1), *_active(128, norm), nn.MaxPool2d(2)],
        *[nn.Conv2d(128, 256, 3), *_active(256, norm)],
        *[nn.Conv2d(256, 512, 3), *_active(512, norm), nn.MaxPool2d(8)],
        nn.Flatten(),
    )
    return Net(features, nn.Linear(512, num_classes))
