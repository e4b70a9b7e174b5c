"""Unitization (Huang & Yu 2020): the maps that the paper's theorems are about, and the layer that is used, inside batch normalisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SCALES = ("hw2", "none", "chw")


def vanilla(x: Tensor) -> Tensor:
    """g(x) = x / |x|, for x [..., d]. Where x is 0 it is e_1: the proof of theorem 3.1 needs some unit vector, the paper names none."""
    length = x.norm(dim=-1, keepdim=True)
    start = torch.zeros_like(x)
    start[..., 0] = 1
    return torch.where(length > 0, x / torch.where(length > 0, length, 1), start)


def scalar(x: Tensor, alpha: float) -> Tensor:
    """g(x; alpha) = x / (alpha |x| + 1 - alpha), for x [..., d] and alpha in [0, 1]; of alpha = 1 it is the vanilla map."""
    return vanilla(x) if alpha == 1 else x / (alpha * x.norm(dim=-1, keepdim=True) + (1 - alpha))


def vector(x: Tensor, alpha: Tensor) -> Tensor:
    """g(x; alpha)_i = x_i / (alpha_i |x| + 1 - alpha_i), for x [..., d] and alpha [d] in [0, 1]; 0 where x is 0, even of alpha = 1."""
    length = x.norm(dim=-1, keepdim=True)
    return torch.where(length > 0, x / torch.where(length > 0, alpha * length + (1 - alpha), 1), 0)


def practical(x: Tensor, alpha: Tensor, eps: float) -> Tensor:
    """g(x; alpha, eps) = [alpha / sqrt(|x|^2 + eps) + (1 - alpha)] * x, for x [..., d], any alpha [d], and eps > 0.

    A linear mix of x / |x| and x, where the two maps above are harmonic ones: they agree for alpha_i of 0 and 1 only.
    """
    return (alpha * (x.square().sum(-1, keepdim=True) + eps).rsqrt() + (1 - alpha)) * x


class Unitization(nn.Module):
    """Batch normalisation whose output is unitized, sample by sample, before its weight and bias (the authors' code).

    x [N, C, ...] -> the same shape. With x normalised to z, over all but the channels, and q_n the sum of z's squares over channels and
    pixels of sample n:

        y = weight * (alpha / sqrt(q_n / s + eps) + 1 - alpha) * z + bias

    alpha [C] is free and starts at 0, as batch normalisation. norm_scale says what s is, of maps with P = H * W pixels: "hw2", P^2, as
    the code has it; "none", 1, the paper's formula on the flattened map; "chw", C * P, the mean square. The variance, in training of the
    batch, is the biased one times n / (n - 1 - eps), n = N * P, and that is also what the running one gathers; eps and the momentum 0.01
    are those of Keras (eps 1e-3, momentum 0.99). q is never averaged over samples: it is the same in training and evaluation.
    Computed in float32 at least. Raises ValueError for an unknown norm_scale, or in training for one value per channel.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-3, momentum: float = 0.01, norm_scale: str = "hw2") -> None:
        super().__init__()
        if norm_scale not in SCALES:
            raise ValueError(f"norm_scale: {norm_scale!r} is not known; allowed: {', '.join(SCALES)}")
        self.eps, self.momentum, self.norm_scale = eps, momentum, norm_scale
        self.alpha = nn.Parameter(torch.zeros(channels))
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        maps = x.flatten(2) if x.dim() > 2 else x[:, :, None]  # [N, C, P]; a view in either memory layout
        _, channels, pixels = maps.shape
        scale = {"hw2": pixels**2, "none": 1, "chw": channels * pixels}[self.norm_scale]
        maps = maps.to(torch.promote_types(x.dtype, torch.float32))
        if self.training:
            if maps.shape[0] * pixels < 2:
                raise ValueError(f"Unitization needs more than one value per channel to train, got {tuple(x.shape)}")
            out, mean, var = _Train.apply(maps, self.alpha, self.weight, self.bias, self.eps, scale)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var, self.momentum)
        else:
            z = (maps - self.running_mean[:, None]) * (self.running_var + self.eps).rsqrt()[:, None]
            unit = (z.square().sum((1, 2)) / scale + self.eps).rsqrt()
            gain = self.weight * (self.alpha * unit[:, None] + (1 - self.alpha))  # [N, C]
            out = torch.addcmul(self.bias[:, None], z, gain[:, :, None])
        return out.view(x.shape).to(x.dtype)


class _Train(torch.autograd.Function):
    """The layer in training on x [N, C, P]; also the batch's mean and corrected variance, [C] each, which carry no gradient.

    Everything but two multiply-adds works on sums over the pixels, [N, C]: half the memory traffic that autograd's own backward has.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor, eps: float, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        n = x.shape[0] * x.shape[2]
        sums = x.sum(2)
        mean = sums.sum(0) / n
        centred = x - mean[:, None]  # before squaring: the mean may be far larger than the deviation
        sums = torch.sub(sums, mean, alpha=x.shape[2])  # of what is centred: not 0, the mean is the batch's
        squares = centred.square().sum(2)
        var = squares.sum(0) / (n - 1 - eps)
        inverse = (var + eps).rsqrt()
        unit = ((squares * inverse.square()).sum(1) / scale + eps).rsqrt()  # [N]
        share = weight * alpha
        gain = torch.addcmul(weight - share, unit[:, None], share)  # [N, C], of z
        gain_centred = gain * inverse
        ctx.save_for_backward(centred, alpha, weight, inverse, unit, gain, gain_centred, sums, squares)
        ctx.corrected, ctx.scale = n - 1 - eps, scale
        ctx.mark_non_differentiable(mean, var)
        return torch.addcmul(bias[:, None], centred, gain_centred[:, :, None]), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """With z = inverse * centred, of each sample: dL/dz = gain * grad + pull * z, then batch normalisation's backward."""
        centred, alpha, weight, inverse, unit, gain, gain_centred, sums, squares = ctx.saved_tensors
        n = centred.shape[0] * centred.shape[2]
        grads = grad.sum(2)
        along = (grad * centred).sum(2) * inverse  # <grad, z>, [N, C]
        united, plain = unit @ along, along.sum(0)  # of z / |z|, and of z
        pull = (along @ (weight * alpha)) * unit.pow(3) / -ctx.scale  # [N]

        square = inverse.square()
        z_sum = torch.addcmul((gain * grads).sum(0), inverse, pull @ sums)  # of dL/dz over everything but the channels
        z_along = torch.addcmul((gain * along).sum(0), square, pull @ squares) / ctx.corrected
        slope = (pull[:, None] - z_along) * square  # [N, C], of centred
        dx = torch.addcmul((inverse * z_sum / -n)[:, None], centred, slope[:, :, None])
        dx.addcmul_(grad, gain_centred[:, :, None])
        return dx, weight * (united - plain), torch.lerp(plain, united, alpha), grads.sum(0), None, None
