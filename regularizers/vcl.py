"""VCL: the variance of each unit is to be the same in two small samples (Littwin & Wolf 2018; PER, section 4)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from regularizers.base import Pass, Regularizer

LEAST_BETA = 1e-3  # the loss explodes where beta reaches 0


class VCL(Regularizer):
    """weight * the sum over layers of mean_j (1 - var_A,j / (var_B,j + beta_j))^2, on the activations before their non-linearity.

    A and B are the first and the next `samples` samples of the batch; variances are unbiased. One learned beta for each unit j,
    location and channel alike, decays as weights do (the group's published code). A batch with less than four samples has no penalty.
    """

    preactivations = True
    edits = True

    def __init__(self, weight: float, samples: int = 5, beta: float = 1.0) -> None:
        super().__init__(weight)
        if samples < 2 or beta <= 0:
            raise ValueError(f"samples: {samples}, beta: {beta} are not allowed; at least 2 samples, beta above 0")
        self.samples, self.initial = samples, beta
        self.beta = nn.ParameterList()

    def setup(self, example: Pass) -> None:
        self.beta.extend(torch.full_like(z[0], self.initial, dtype=torch.float32) for z in example.preactivations)

    def penalty(self, out: Pass, other: Pass | None) -> Tensor | None:
        """The loss of a few samples, cut out of the graph: backward through the cut would fill a batch of zeros for each layer."""
        n = min(self.samples, len(out.batch.x) // 2)
        if n < 2:
            return None
        parts = [z[: 2 * n].detach().float().requires_grad_() for z in out.preactivations]
        for z, part in zip(out.preactivations, parts, strict=True):
            z.register_hook(partial(self.joined, part))
        layers = [vcl(part[:n], part[n:], beta) for part, beta in zip(parts, self.beta, strict=True)]
        return self.weight * torch.stack(layers).sum()

    def joined(self, part: Tensor, gradient: Tensor) -> Tensor:
        """The gradient of a batch. To that of its first samples the penalty's is added, which autograd computes first."""
        assert part.grad is not None
        gradient, n = gradient.clone(), len(part)
        gradient[:n] = self.rounded(gradient[:n].float() + part.grad, gradient.dtype)
        return gradient


def vcl(a: Tensor, b: Tensor, beta: Tensor) -> Tensor:
    """The loss of one layer: samples a, b [n, units...], beta [units...] -> scalar."""
    return (1 - variance(a) / (variance(b) + beta.clamp(min=LEAST_BETA))).square().mean()


def variance(x: Tensor) -> Tensor:
    """Unbiased, over the first dimension: x.var(0), which on a CPU takes four times as long for a handful of samples."""
    return (x - x.mean(0)).square().sum(0) / (len(x) - 1)
