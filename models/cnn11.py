"""The eleven-layer CNN without norm layers (Clevert et al. 2016; PER, tables 2 and 3; layer sizes from the VCL group's code)."""

from __future__ import annotations

from torch import nn

from models.net import Net, Norm, Shift, Tap

# Filters, kernel size, whether a 2x2 max-pool follows, dropout after that.
LAYERS = (
    *[(192, 5, True, 0.0), (192, 1, False, 0.0), (240, 3, True, 0.1), (240, 1, False, 0.0), (260, 2, True, 0.2)],
    *[(260, 1, False, 0.0), (280, 2, True, 0.3), (280, 1, False, 0.0), (300, 2, True, 0.4), (300, 1, False, 0.5)],
)
ACTIVATIONS, INITS = ("relu", "leaky_relu", "elu"), ("default", "he")


def cnn11(
    num_classes: int, norm: Norm, activation: str = "elu", width: int = 1, slope: float = 0.1, init: str = "default", in_channels: int = 3
) -> Net:
    """Ten convolutions and a linear classifier for [N, in_channels, H, W], H and W at least 32; h has 300 * width units.

    1,641,938 parameters with three channels, ten classes, ELU and `norm=none`; ten taps with 350,460 units in 2,544 channels for
    32x32 images, as PER counts them. The map left of larger images is averaged. Every convolution keeps the size: the 2x2 ones
    pad at the bottom and at the right.
    activation: relu, leaky_relu (with this slope) or elu; the first two are followed by a learned scalar (PER, section 4.1).
    width: a factor on all filters (2 for Tiny-ImageNet). init: "default" is torch's, "he" He et al.'s; biases start at 0 in both.
    Raises ValueError for an unknown name.
    """
    for key, value, allowed in (("activation", activation, ACTIVATIONS), ("init", init, INITS)):
        if value not in allowed:
            raise ValueError(f"{key}: {value!r} is not known; allowed: {', '.join(allowed)}")

    def active() -> list[nn.Module]:
        if activation == "elu":
            return [Tap(pre=True), nn.ELU(), Tap()]
        return [Tap(pre=True), nn.LeakyReLU(slope) if activation == "leaky_relu" else nn.ReLU(), Shift(), Tap()]

    layers: list[nn.Module] = []
    channels = in_channels
    for filters, kernel, pooled, dropout in LAYERS:
        if kernel == 2:
            layers.append(nn.ZeroPad2d((0, 1, 0, 1)))
        layers += [nn.Conv2d(channels, filters * width, kernel, padding=(kernel - 1) // 2), norm(filters * width), *active()]
        layers += [nn.MaxPool2d(2)] * pooled + [nn.Dropout(dropout)] * (dropout > 0)
        channels = filters * width
    net = Net(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(channels, num_classes))
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            if init == "he":
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return net
