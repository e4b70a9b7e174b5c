"""Label smoothing: part of the target's mass is spread over all classes (Szegedy et al. 2016, section 7)."""

from __future__ import annotations

import torch
from torch import Tensor

from regularizers.base import Pass, Regularizer


class LabelSmoothing(Regularizer):
    """target -> (1 - smoothing) * target + smoothing / K; acts on hard labels and on the soft targets of other methods alike."""

    sequences = True

    def __init__(self, smoothing: float) -> None:
        super().__init__(weight=smoothing)
        if not 0 <= smoothing <= 1:
            raise ValueError(f"smoothing: {smoothing} is not between 0 and 1")

    def retarget(self, out: Pass, step: int) -> Tensor:
        classes = out.logits.shape[-1]
        target = out.batch.target
        if not target.is_floating_point():  # not torch's one_hot: it makes the host read the labels
            target = torch.zeros(*target.shape, classes, device=target.device).scatter_(-1, target[..., None], 1.0)
        return (1 - self.weight) * target + self.weight / classes
