"""Norm layers as factories, channels -> layer: `conf/norm/*.yaml` builds them with `_partial_: true`."""

from __future__ import annotations

from torch import Tensor, nn


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation (Ioffe & Szegedy 2015) over everything but the channels, for [N, C] and [N, C, H, W] alike.

    torch splits it into BatchNorm1d and BatchNorm2d only to check the input's dimensions; a factory must serve both. Batches are
    not counted: only a cumulative average would need it, and it costs a call per layer and step.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__(channels, eps)
        self.num_batches_tracked = None

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"BatchNorm needs [N, C, ...], got {tuple(input.shape)}")


def group(channels: int, num_groups: int, eps: float = 1e-5) -> nn.GroupNorm:
    """Group normalisation (Wu & He 2018): torch's layer with the channels as first argument, as a factory needs it."""
    return nn.GroupNorm(num_groups, channels, eps=eps)
