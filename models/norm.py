"""Norm layers as factories, channels -> layer: `conf/norm/*.yaml` builds them with `_partial_: true`."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation (Ioffe & Szegedy 2015) over everything but the channels, for [N, C] and [N, C, H, W] alike.

    torch splits it into BatchNorm1d and BatchNorm2d only to check the input's dimensions; a factory must serve both. Batches are
    not counted: only a cumulative average would need it, and it costs a call per layer and step.
    """

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(channels, eps, momentum)
        self.num_batches_tracked = None

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"BatchNorm needs [N, C, ...], got {tuple(input.shape)}")


def group(channels: int, num_groups: int = 2, channels_per_group: int | None = None, eps: float = 1e-5) -> nn.GroupNorm:
    """Group normalisation (Wu & He 2018): torch's layer, of so many groups or, where that is given, of groups of so many channels.

    Raises ValueError if the channels do not divide so.
    """
    if channels_per_group is not None:
        if channels_per_group < 1 or channels % channels_per_group:
            raise ValueError(f"channels_per_group: {channels_per_group} does not divide the {channels} channels of a layer")
        num_groups = channels // channels_per_group
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups: {num_groups} does not divide the {channels} channels of a layer")
    return nn.GroupNorm(num_groups, channels, eps=eps)


class RecurrentBatchNorm(nn.Module):
    """Batch normalisation inside a recurrent layer (Cooijmans et al. 2017): statistics of each step of their own, weight and bias shared.

    x [N, C], step from 0 on -> [N, C]. A step beyond the last that has statistics uses those of the last. The weight starts at `gamma`.
    Running variances are torch's, unbiased ones.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, steps: int = 35, gamma: float = 0.1, momentum: float = 0.05, eps: float = 1e-5) -> None:
        super().__init__()
        if steps < 1:
            raise ValueError(f"steps: {steps} is not allowed; it must be at least 1")
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.full((channels,), gamma))
        self.bias: nn.Parameter | None = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(steps, channels))
        self.register_buffer("running_var", torch.ones(steps, channels))

    def forward(self, x: Tensor, step: int | None = None) -> Tensor:
        if step is None:
            raise RuntimeError("norm=rbn is for recurrent networks")
        slot = min(step, len(self.running_mean) - 1)
        mean, var = self.running_mean[slot], self.running_var[slot]
        return nn.functional.batch_norm(x.to(mean.dtype), mean, var, self.weight, self.bias, self.training, self.momentum, self.eps)
