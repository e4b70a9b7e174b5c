"""Label smoothing: part of the target's mass is spread over all classes (Szegedy et al. 2016, section 7)."""

from __future__ import annotations

from torch import Tensor

from regularizers.base import Pass, Regularizer
from regularizers.mixing import soft


class LabelSmoothing(Regularizer):
    """target -> (1 - smoothing) * target + smoothing / K; acts on hard labels and on the soft targets of other methods alike."""

    sequences = True

    def __init__(self, smoothing: float) -> None:
        super().__init__(weight=smoothing)
        if not 0 <= smoothing <= 1:
            raise ValueError(f"smoothing: {smoothing} is not between 0 and 1")

    def retarget(self, out: Pass) -> Tensor:
        classes = out.logits.shape[-1]
        return (1 - self.weight) * soft(out.batch.target, classes) + self.weight / classes
