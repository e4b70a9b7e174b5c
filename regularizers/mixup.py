"""Mixup: the batch is mixed with itself in another order, images and targets in one ratio (Zhang et al. 2018; LaMix, eqs. 1 and 2)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from data.bundle import Batch
from models.net import Net
from regularizers.base import Regularizer
from regularizers.mixing import pairing, ratio, soft


class Mixup(Regularizer):
    """x -> lambda x_i + (1 - lambda) x_j, and the target alike; one lambda ~ Beta(alpha, alpha) and one pairing for each batch.

    prob: the part of the batches that is mixed; the others are left as they are.
    """

    alpha: Tensor

    def __init__(self, alpha: float = 1.0, prob: float = 1.0) -> None:
        super().__init__(weight=prob)
        if alpha <= 0:
            raise ValueError(f"alpha: {alpha} is not allowed; it must be above 0")
        if not 0 <= prob <= 1:
            raise ValueError(f"prob: {prob} is not between 0 and 1")
        self.register_buffer("alpha", torch.tensor(alpha, dtype=torch.float64), persistent=False)

    def transform(self, batch: Batch, net: Net) -> Batch:
        partner = pairing(len(batch.x), self.rng, batch.x.device)
        target = soft(batch.target, net.classifier.out_features)
        return self.mix(replace(batch, target=target), partner, ratio(self.alpha, self.weight, self.rng))

    def mix(self, batch: Batch, partner: Tensor, lam: Tensor) -> Batch:
        """The batch, its target soft, mixed with its samples `partner` [N] in the ratio `lam`, a scalar; exact at 0 and 1."""
        x, target = (torch.lerp(one[partner], one, lam.to(one.dtype)) for one in (batch.x, batch.target))
        return replace(batch, x=x, target=target)
