"""CutMix: a box of each image is replaced by the same box of another one (Yun et al. 2019, with its authors' law of the box)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from data.bundle import Batch
from regularizers.mixup import Mixup


class CutMix(Mixup):
    """One lambda ~ Beta(alpha, alpha), one box and one pairing for each batch; the target is mixed by the area that the box leaves.

    prob: the part of the batches that is mixed. Its authors took 0.5 for CIFAR (clovaai/CutMix-PyTorch, issue 30).
    """

    def __init__(self, alpha: float = 1.0, prob: float = 0.5) -> None:
        super().__init__(alpha, prob)

    def mix(self, batch: Batch, partner: Tensor, lam: Tensor) -> Batch:
        sizes = batch.x.shape[2:]
        inside, kept = box(sizes, lam, [torch.randint(size, (), generator=self.rng, device=lam.device) for size in sizes])
        target = torch.lerp(batch.target[partner], batch.target, kept.to(batch.target.dtype))
        return replace(batch, x=torch.where(inside, batch.x[partner], batch.x), target=target)


def box(sizes: Sequence[int], lam: Tensor, centre: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(inside, kept): [H, W], True in the box, and the share of the area outside it, for sizes H, W and a centre, one number for each.

    Its sides are H and W times sqrt(1 - lambda), rounded down to even, before the image's border cuts it.
    """
    sides = []
    for size, middle in zip(sizes, centre, strict=True):
        place = torch.arange(size, device=lam.device)
        half = (size * (1 - lam.double()).sqrt() / 2).floor()
        sides.append((place >= middle - half) & (place < middle + half))
    rows, columns = sides
    return rows[:, None] & columns, 1 - rows.sum() * columns.sum() / (sizes[0] * sizes[1])
