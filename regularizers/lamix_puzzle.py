"""LaMix on PuzzleMix: pairs are mixed by their masks in place of being averaged (LaMix, eq. 5 and section 3.2)."""

from __future__ import annotations

from collections.abc import Hashable
from typing import ClassVar

import torch
from torch import Tensor

from data.bundle import Batch
from models.net import Net
from regularizers.base import Pass
from regularizers.lamix import LaMix
from regularizers.puzzlemix import PuzzleMix


class LaMixPuzzle(LaMix):
    """LaMix whose pairs are mixed as `puzzle` mixes them for a ratio of 0.5, whatever the ratio of their labels.

    beta: 1 in the paper (section 3.2): no global label. local_label: also "mask_ratio", by each pair's mask. The others are LaMix's.
    """

    LOCAL: ClassVar[tuple[str, ...]] = (*LaMix.LOCAL, "mask_ratio")

    def __init__(
        self,
        puzzle: PuzzleMix,
        beta: float = 1.0,
        local_label: str = "lambda",
        global_label: str = "learned",
        detach_global: bool = False,
        schedule: str = "alternate",
    ) -> None:
        super().__init__(beta, local_label, global_label, detach_global, schedule)
        if puzzle.prob != 1:
            raise ValueError(f"puzzle.prob: {puzzle.prob} is not allowed; it must be 1, as the schedule says which batches are mixed")
        self.puzzle = puzzle

    def setup(self, example: Pass) -> None:
        super().setup(example)
        self.puzzle.rng = self.rng
        self.puzzle.setup(example)

    def choose(self, step: int) -> Hashable:
        mixed, n = super().choose(step), self.puzzle.choose(step)
        self.passes = self.puzzle.passes if mixed else 0
        return n if mixed else None

    def mix(self, batch: Batch, partner: Tensor, lam: Tensor, net: Net) -> tuple[Tensor, Tensor]:
        x, share = self.puzzle.mix(batch, partner, torch.full_like(lam, 0.5), net)
        return x, share[:, None] if self.local_label == "mask_ratio" else lam
