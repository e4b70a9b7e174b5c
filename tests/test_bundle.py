"""Bundles: the order of an epoch, shuffled or class-balanced, and its batches; texts in columns and windows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Generator, Tensor

from data import text
from data.bundle import Augment, Batch, Bundle
from data.text import Corpus
from tests.datafiles import error

UNEVEN = [0] * 7 + [1] * 3 + [2] * 5


def rng(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def bundle(augment: Augment | None = None) -> Bundle:
    """Three uneven classes; the images are the numbers of the samples."""
    split = torch.arange(15, dtype=torch.uint8).view(-1, 1, 1, 1), torch.tensor(UNEVEN)
    return Bundle({"train": split, "test": split}, 3, lambda x: x.float(), "made up", augment)


def epoch(b: Bundle, batch_size: int, rng: Generator, balanced: bool = False) -> list[Batch]:
    return [b.take(chosen, rng, balanced) for chosen in b.indices(rng, batch_size, balanced)]


def test_order_is_a_permutation() -> None:
    b = bundle()
    assert b.order(rng(), False).sort().values.tolist() == list(range(15)) and b.epoch_size(False) == 15
    assert b.order(rng(), False).tolist() == b.order(rng(), False).tolist() != b.order(rng(1), False).tolist()


def test_balanced_order_takes_classes_in_turn() -> None:
    b, y = bundle(), torch.tensor(UNEVEN)
    order = b.order(rng(), True)
    assert len(order) == b.epoch_size(True) == 21
    assert (y[order] == torch.arange(21) % 3).all()
    times = torch.bincount(order, minlength=15)
    for k, n in enumerate([7, 3, 5]):  # every sample is seen, floor or ceil of 7 / n times
        assert set(times[y == k].tolist()) <= {7 // n, -(-7 // n)}
    assert order.tolist() == b.order(rng(), True).tolist() != b.order(rng(1), True).tolist()


@pytest.mark.parametrize(("batch_size", "balanced"), [(4, True), (6, False), (100, True)])
def test_epoch(batch_size: int, balanced: bool) -> None:
    b, y = bundle(), torch.tensor(UNEVEN)
    batches = epoch(b, batch_size, rng(), balanced)
    sizes = [len(batch.y) for batch in batches]
    assert sum(sizes) == b.epoch_size(balanced) and len(sizes) == b.steps(sum(sizes), batch_size, drop_last=False)
    assert set(sizes[:-1]) <= {batch_size} and sizes[-1] <= batch_size
    for batch in batches:
        assert batch.target is batch.y and (y[batch.x.flatten().long()] == batch.y).all()
        assert batch.per_class == (-(-len(batch.y) // 3) if balanced else None)
        assert not balanced or int(torch.bincount(batch.y).max()) <= batch.per_class
    assert {int(i) for batch in batches for i in batch.x.flatten()} == set(range(15))


def test_an_incomplete_batch_is_a_step_unless_dropped() -> None:
    assert [bundle().steps(n, 10, drop_last=False) for n in (1, 10, 11, 100)] == [1, 1, 2, 10]
    assert [bundle().steps(n, 10, drop_last=True) for n in (1, 10, 11, 100)] == [1, 1, 1, 10]


def test_augment_gets_the_generator_and_only_training_is_augmented() -> None:
    def shift(chosen: Tensor, generator: Generator) -> Tensor:
        return chosen + torch.randint(1, 100, chosen.shape, generator=generator)

    b = replace(bundle(shift), prepare=lambda x: x + 0.5)
    batches, again, other = ([batch.x.tolist() for batch in epoch(b, 5, rng(seed))] for seed in (0, 0, 1))
    assert batches == again != other
    generator = rng()
    assert [shift(chosen, generator).tolist() for chosen in b.order(generator, False).split(5)] == batches  # not prepared again
    for split in ("train", "test"):  # evaluation goes through a split in its own order
        plain = list(b.batches(split, 4))
        assert [len(batch.y) for batch in plain] == [4, 4, 4, 3] and torch.cat([batch.y for batch in plain]).tolist() == UNEVEN
        assert torch.cat([batch.x for batch in plain]).flatten().tolist() == [i + 0.5 for i in range(15)]


# Texts.


def corpus_of(words: int, bptt: int = 35) -> tuple[Corpus, list[int]]:
    """A text of so many words, all different, and the words."""
    order = torch.randperm(words, generator=rng(words))
    return Corpus({"train": (order[:-1], order[1:])}, words, lambda x: x, "made up", bptt=bptt), order.tolist()


def check(batches: list[Batch], words: list[int], count: int, bptt: int) -> None:
    """Windows in succession are the columns: the text in `count` equal parts."""
    sizes = [batch.x.shape[1] for batch in batches]
    assert set(sizes[:-1]) <= {bptt} and 1 <= sizes[-1] <= bptt
    assert all(torch.equal(batch.target, batch.y) and batch.per_class is None for batch in batches)
    x, y = torch.cat([batch.x for batch in batches], dim=1), torch.cat([batch.y for batch in batches], dim=1)
    length = (len(words) - 1) // count
    starts = range(0, count * length, length)
    assert x.tolist() == [words[start : start + length] for start in starts]
    assert y.tolist() == [words[start + 1 : start + 1 + length] for start in starts]


@pytest.mark.parametrize(("words", "batch_size", "bptt"), [(21, 20, 5), (22, 1, 1), (71, 2, 35), (101, 7, 5), (300, 7, 35), (281, 20, 1)])
def test_windows_put_together_are_the_columns(words: int, batch_size: int, bptt: int) -> None:
    corpus, content = corpus_of(words, bptt)
    for _ in range(2):  # epochs: the order stays
        places = corpus.indices(rng(), batch_size, False)
        check([corpus.take(window, rng()) for window in places], content, batch_size, bptt)
    assert corpus.steps(corpus.epoch_size(False), batch_size, False) == len(places)
    assert corpus.steps(corpus.epoch_size(False), batch_size, True) == max(1, sum(window.shape[1] == bptt for window in places))
    for count in (1, 7, words - 1, 1000):  # evaluation, in at most a column for each word
        check(list(corpus.batches("train", count)), content, min(count, words - 1), bptt)


def test_steps_and_batch_sizes_that_are_not_allowed() -> None:
    corpus, _ = corpus_of(2)
    for dataset, counts, steps in ((text.ptb, [929_589, 73_760, 82_430], 1_328), (text.wikitext2, [2_088_628, 217_646, 245_569], 2_984)):
        assert list(dataset.sizes.values()) == counts
        assert [corpus.steps(counts[0] - 1, 20, drop_last) for drop_last in (True, False)] == [steps - 1, steps]
    assert error(lambda: corpus.epoch_size(True)).startswith("balanced: true is not allowed for text, ")
    assert error(lambda: corpus.steps(10, 11, False)) == "batch_size: 11 is not allowed for 10 words; it must be at most that"
