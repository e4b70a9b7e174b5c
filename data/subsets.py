"""Class-balanced parts of a split, the same ones for every seed: the first images, and those that are held out of training."""

from __future__ import annotations

import torch
from torch import Tensor

from data.formats import DataError, in_turn, turns


def first(split: str, labels: Tensor, count: int, num_classes: int) -> Tensor:
    """The first `count` samples in file order, classes in turn, as indices; enough for class-balanced batches to have every class."""
    if not num_classes <= count <= len(labels):
        raise DataError(f"dataset.{split}={count}: choose {num_classes} (one per class) to {len(labels):,} images")
    return in_turn(labels)[:count]


def held_out(labels: Tensor, part: float, num_classes: int) -> tuple[Tensor, Tensor]:
    """The samples that stay for training and those held out of it, as indices, each in file order; at least one is held out.

    Each class gives its last ones, in proportion to its size, and its first one at the very last. Of classes of one size, these are the
    last ones, classes in turn.
    """
    if 0 < part < 1:
        order = in_turn(labels)
        passed = turns(labels).double() / torch.bincount(labels)[labels]  # the part of its class that comes before each sample
        order = order[torch.argsort(passed[order], stable=True)]
        count = max(1, round(part * len(labels)))
        rest, held = order[:-count].sort().values, order[-count:].sort().values
        if len(labels[rest].unique()) == num_classes:
            return rest, held
    raise DataError(f"dataset.valid={part}: choose a part of at least 0 and below 1 that leaves an image of every class for training")
