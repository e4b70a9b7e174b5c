"""LeNet with ReLUs and max-pools, for 32x32 images (LeCun et al. 1998; LaMix, table 2; layer sizes from the mixup authors' code)."""

from __future__ import annotations

from torch import nn

from models.net import Net, Norm, relu


def lenet(num_classes: int, norm: Norm, in_channels: int = 3) -> Net:
    """Two 5x5 convolutions, each with a max-pool, and two hidden linear layers for [N, in_channels, 32, 32]; h has 84 units.

    62,006 parameters with three channels, ten classes and `norm=none`, the paper's form; 69,656 with 100 classes. The norm slots come
    before each ReLU. Weights start as torch's.
    """
    features = nn.Sequential(
        *[nn.Conv2d(in_channels, 6, 5), norm(6), *relu(), nn.MaxPool2d(2)],
        *[nn.Conv2d(6, 16, 5), norm(16), *relu(), nn.MaxPool2d(2)],
        *[nn.Flatten(), nn.Linear(400, 120), norm(120), *relu()],
        *[nn.Linear(120, 84), norm(84), *relu()],
    )
    return Net(features, nn.Linear(84, num_classes))
