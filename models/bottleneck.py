"""A last hidden layer that is squeezed through a few units, to look at them (LaMix, figure 8)."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from models.net import Net

HIDDEN = 100  # units on the way back to the width of before


def squeezed(net: Net, units: int | None) -> Net:
    """The network, and between its last hidden layer h [N, d] and its classifier three linear layers to `units`, 100 and d, tanh each.

    The codes are what the first tanh gives, [N, units] in -1 .. 1. None: the network as it is. Weights start as torch's.
    """
    if units is None:
        return net
    width = net.classifier.in_features
    layers = [layer for sizes in pairwise((width, units, HIDDEN, width)) for layer in (nn.Linear(*sizes), nn.Tanh())]
    return Net(nn.Sequential(*net.features, *layers), net.classifier)  # type: ignore[misc]
