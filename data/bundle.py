"""What a data set is: its splits as tensors on the device, cut into batches there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor


@dataclass(frozen=True)
class Batch:
    """One mini-batch.

    x: images [N, C, H, W], normalised, or word ids [N, T].
    y: hard labels [N] or [N, T]; metrics and class-wise matching read these.
    target: what the loss reads: `y`, until a stage of a method turns it into class probabilities [N, K].
    per_class: no class has more samples than this in the batch, if the sampler knows (a class-balanced one does).
    scale: x * scale are pixels in 0 .. 1, up to a constant; None where that is not known, or there are none.
    """

    x: Tensor
    y: Tensor
    target: Tensor
    per_class: int | None = None
    scale: Tensor | None = None


Augment = Callable[[Tensor, Generator], Tensor]  # (training samples [n], generator) -> their images [n, C, H, W], each changed at random


@dataclass(frozen=True)
class Bundle:
    """A data set, ready to train on.

    splits: "train", "test", and "valid" if images are held out of training: (uint8 images [N, C, H, W], labels [N]), on the device.
    prepare: uint8 images -> normalised float images, a batch at a time.
    augment: gives the images of a training batch, changed at random and normalised; None: they are prepared as they are.
    variant: what the data really is ("official archive", "JPEG-recompressed parquet", ...); printed beside every number made with it.
    unit: what is counted in it.
    scale: of its batches, [C, 1, 1]: of images, the standard deviation that they are divided by.
    """

    splits: dict[str, tuple[Tensor, Tensor]]
    num_classes: int
    prepare: Callable[[Tensor], Tensor]
    variant: str
    augment: Augment | None = None
    unit: str = "images"
    scale: Tensor | None = None

    def order(self, rng: Generator, balanced: bool) -> Tensor:
        """The training samples of one epoch, as indices in the order in which they are seen.

        Balanced: classes in turn, so that position p holds class p mod K and every batch of K*n samples has n of each;
        the samples of a class are reshuffled every epoch, and smaller classes are seen again until they match the largest
        (ITDM's sampler; `itdm-unitization` protocol, A.1.6).
        """
        y = self.splits["train"][1]
        if not balanced:
            return torch.randperm(len(y), generator=rng, device=y.device)
        shuffled = torch.randperm(len(y), generator=rng, device=y.device)
        by_class = shuffled[torch.argsort(y[shuffled], stable=True)]
        counts = torch.bincount(y, minlength=self.num_classes)
        turn = torch.arange(int(counts.max()), device=y.device)  # a host read, once per epoch
        position = (counts.cumsum(0) - counts)[:, None] + turn % counts[:, None]  # [K, turns]
        return by_class[position].T.reshape(-1)

    def epoch_size(self, balanced: bool) -> int:
        """Samples that one epoch shows."""
        y = self.splits["train"][1]
        return int(torch.bincount(y, minlength=self.num_classes).max()) * self.num_classes if balanced else len(y)

    def indices(self, rng: Generator, batch_size: int, balanced: bool) -> Sequence[Tensor]:
        """The training samples of each batch of one epoch, as indices."""
        return self.order(rng, balanced).split(batch_size)

    def steps(self, samples: int, batch_size: int, drop_last: bool) -> int:
        """Batches of an epoch of so many samples; at least one. drop_last: a smaller last one is left out."""
        return max(1, samples // batch_size if drop_last else -(-samples // batch_size))

    def take(self, chosen: Tensor, rng: Generator, balanced: bool = False) -> Batch:
        """The training samples `chosen`, one of the `indices`, augmented and normalised; nothing here makes the host wait."""
        x, y = self.splits["train"]
        image = self.prepare(x[chosen]) if self.augment is None else self.augment(chosen, rng)
        label = y[chosen]
        return Batch(image, label, label, -(-len(chosen) // self.num_classes) if balanced else None, self.scale)

    def batches(self, split: str, batch_size: int) -> Iterator[Batch]:
        """One pass over a split in its own order, without augmentation, for evaluation."""
        x, y = self.splits[split]
        for start in range(0, len(y), batch_size):
            label = y[start : start + batch_size]
            yield Batch(self.prepare(x[start : start + batch_size]), label, label, scale=self.scale)
