"""The bundle: the order of an epoch, shuffled or class-balanced, and its batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Generator, Tensor

from data.bundle import Augment, Batch, Bundle


def rng(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def bundle(labels: list[int], num_classes: int, augment: Augment | None = None) -> Bundle:
    y = torch.tensor(labels)
    x = torch.arange(len(y), dtype=torch.uint8).view(-1, 1, 1, 1)  # an image says which sample it is
    return Bundle({"train": (x, y), "test": (x, y)}, num_classes, lambda x: x.float(), "made up", augment)


def epoch(b: Bundle, batch_size: int, rng: Generator, balanced: bool = False) -> list[Batch]:
    return [b.take(chosen, rng, balanced) for chosen in b.indices(rng, batch_size, balanced)]


UNEVEN = [0] * 7 + [1] * 3 + [2] * 5


def test_order_is_a_permutation() -> None:
    b = bundle(UNEVEN, 3)
    assert b.order(rng(), False).sort().values.tolist() == list(range(15))
    assert b.order(rng(), False).tolist() == b.order(rng(), False).tolist() != b.order(rng(1), False).tolist()
    assert b.epoch_size(False) == 15


def test_balanced_order_takes_classes_in_turn() -> None:
    b = bundle(UNEVEN, 3)
    y = b.splits["train"][1]
    order = b.order(rng(), True)
    assert len(order) == b.epoch_size(True) == 21
    assert (y[order] == torch.arange(21) % 3).all()
    times = torch.bincount(order, minlength=15)
    for k, n in enumerate([7, 3, 5]):  # every sample is seen, floor or ceil of 7 / n times
        assert set(times[y == k].tolist()) <= {7 // n, -(-7 // n)}
    assert order.tolist() == b.order(rng(), True).tolist() != b.order(rng(1), True).tolist()


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("batch_size", [4, 6, 100])
def test_epoch(balanced: bool, batch_size: int) -> None:
    b = bundle(UNEVEN, 3)
    batches = epoch(b, batch_size, rng(), balanced)
    sizes = [len(batch.y) for batch in batches]
    assert sum(sizes) == b.epoch_size(balanced) and len(sizes) == b.steps(sum(sizes), batch_size, drop_last=False)
    assert set(sizes[:-1]) <= {batch_size} and sizes[-1] <= batch_size
    for batch in batches:
        assert batch.target is batch.y
        assert (b.splits["train"][1][batch.x.flatten().long()] == batch.y).all()
        if balanced:
            assert int(torch.bincount(batch.y).max()) <= batch.per_class == -(-len(batch.y) // 3)
        else:
            assert batch.per_class is None
    assert {int(i) for batch in batches for i in batch.x.flatten()} == set(range(15))


def test_an_incomplete_batch_is_a_step_unless_dropped() -> None:
    b = bundle(UNEVEN, 3)
    assert [b.steps(n, 10, drop_last=False) for n in (1, 10, 11, 100)] == [1, 1, 2, 10]
    assert [b.steps(n, 10, drop_last=True) for n in (1, 10, 11, 100)] == [1, 1, 1, 10]


def test_batches_cover_the_split_in_order() -> None:
    seen = list(bundle(UNEVEN, 3).batches("test", 4))
    assert [len(batch.y) for batch in seen] == [4, 4, 4, 3]
    assert torch.cat([batch.x for batch in seen]).flatten().tolist() == list(range(15))
    assert torch.cat([batch.y for batch in seen]).tolist() == UNEVEN


def test_augment_gets_the_generator_and_only_training_is_augmented() -> None:
    def shift(chosen: Tensor, generator: Generator) -> Tensor:
        x = bundle(UNEVEN, 3).splits["train"][0][chosen]
        return x + torch.randint(1, 100, x.shape, generator=generator, dtype=torch.uint8)

    b = replace(bundle(UNEVEN, 3, shift), prepare=lambda x: x + 0.5)
    first, again, other = ([batch.x.flatten().tolist() for batch in epoch(b, 5, rng(seed))] for seed in (0, 0, 1))
    assert first == again != other
    order = b.order(rng(), False)
    assert torch.cat([torch.tensor(batch) for batch in first]).tolist() != order.tolist()
    one = rng()
    assert [batch.tolist() for batch in (shift(chosen, one).flatten() for chosen in b.order(one, False).split(5))] == first  # as it is
    assert torch.cat([batch.x for batch in b.batches("train", 5)]).flatten().tolist() == [i + 0.5 for i in range(15)]
