"""ITDM: the features of two mini-batches are matched by their MMD (In-Training Distribution Matching, eqs. 3 to 6)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from regularizers.base import Pass, Regularizer
from regularizers.mmd import BANDWIDTHS, MULTIPLIERS, classwise_mmd, mmd


class ITDM(Regularizer):
    """Adds weight * MMD(H1, H2) (ITDM-j), or the mean of it over the K classes (ITDM-c, `per_class`), to the loss.

    H1, H2 are the last hidden layers of two independent mini-batches, passed through the network separately; the gradient
    flows into both. ITDM-c matches samples of equal label, divides by K whether or not a class is present, and a class that
    lacks a side adds 0 (authors' code). The authors' baseline still runs the second forward, which moves only BN's running
    statistics: `baseline_second_forward` does so at weight 0.
    """

    second_batch = True

    def __init__(
        self,
        weight: float,
        per_class: bool,
        multipliers: Sequence[float] = MULTIPLIERS,
        bandwidth: str | float = "pooled",
        baseline_second_forward: bool = False,
    ) -> None:
        super().__init__(weight)
        if isinstance(bandwidth, str) and bandwidth not in BANDWIDTHS:
            raise ValueError(f"bandwidth: {bandwidth!r} is not known; allowed: {', '.join(BANDWIDTHS)}, or a number")
        self.per_class, self.multipliers, self.bandwidth = per_class, tuple(multipliers), bandwidth
        self.matches = weight != 0
        self.active = self.matches or baseline_second_forward

    def penalty(self, out: Pass, other: Pass | None) -> Tensor | None:
        assert other is not None
        if not self.matches:
            return None
        h1, h2 = out.features.float(), other.features.float()  # the kernel needs float32 whatever the network's precision
        if not self.per_class:
            return self.weight * mmd(h1, h2, self.multipliers, self.bandwidth)
        bounds = (out.batch.per_class, other.batch.per_class)
        bound = None if None in bounds else max(filter(None, bounds))
        classes = out.logits.shape[-1]
        return self.weight * classwise_mmd(h1, h2, out.batch.y, other.batch.y, classes, self.multipliers, self.bandwidth, bound).mean()
