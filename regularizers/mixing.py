"""What the methods that mix samples share: who is mixed with whom, in which ratio, and targets that are class probabilities."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def pairing(count: int, rng: Generator, device: torch.device) -> Tensor:
    """Each sample's partner: a random permutation, [count]; a sample may be its own."""
    # Sorted draws rather than torch.randperm, which does not say what it does while a step is recorded.
    return torch.rand(count, generator=rng, device=device).argsort()


def ratio(alpha: Tensor, prob: Tensor, rng: Generator) -> Tensor:
    """lambda, a scalar: the share of the first of two samples. Beta(alpha, alpha), which is uniform for alpha = 1; 1 unless `prob` has it.

    alpha, a scalar, is float64: in float32 the draws of a small one are all 0.
    """
    one, other = torch._standard_gamma(alpha.expand(2), generator=rng)
    mixed = torch.rand((), generator=rng, device=alpha.device) < prob
    return torch.where(mixed, one / (one + other), 1.0).float()


def soft(target: Tensor, classes: int) -> Tensor:
    """A target as class probabilities [..., K], float32: hard labels become one-hot, probabilities stay as they are."""
    if target.is_floating_point():
        return target
    # not torch's one_hot: it makes the host read the labels
    return torch.zeros(*target.shape, classes, device=target.device).scatter_(-1, target[..., None], 1.0)
