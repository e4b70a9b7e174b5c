"""Mixup, CutMix and label smoothing on top of them: their laws, their targets, and torchvision's as an oracle."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from test_regularizers import made
from test_trainer import data_home, train, trainer
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot
from torchvision.transforms import v2

from data.bundle import Batch
from experiments.config import ConfigError
from models.net import Net
from regularizers.cutmix import box
from regularizers.label_smoothing import LabelSmoothing
from regularizers.mixing import pairing, ratio, soft

__all__ = ["data_home"]  # a fixture
pytestmark = pytest.mark.usefixtures("one_thread")
METHODS = ("mixup", "cutmix", "lamix")


def net(classes: int) -> Net:
    return Net(torch.nn.Flatten(), torch.nn.Linear(1, classes))


def batch(count: int = 6, classes: int = 4, size: tuple[int, int] = (8, 8), seed: int = 0) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (count,), generator=rng)
    return Batch(torch.randn(count, 3, *size, generator=rng), y, y)


def method(name: str, seed: int = 0, **options: Any) -> Any:
    one = made(name, **options)
    one.rng = torch.Generator().manual_seed(seed)
    return one


def at(step: int, one: Any) -> Any:
    """The method, as it is in that step."""
    one.choose(step)
    return one


def hot(one: Batch, classes: int) -> Batch:
    return Batch(one.x, one.y, soft(one.y, classes))


# P-M1


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("classes", [2, 10, 100])
def test_targets_are_distributions(name: str, classes: int) -> None:
    one, given = method(name), batch(20, classes)
    for step in range(4):
        mixed = at(step, one).transform(given, net(classes))
        assert mixed.target.shape == (20, classes) and mixed.target.dtype == torch.float32
        assert (mixed.target >= 0).all() and (mixed.target.sum(1) - 1).abs().max() < 1e-6
        assert torch.equal(mixed.y, given.y) and mixed.x.shape == given.x.shape


# Mixup


def test_mixup_by_hand() -> None:
    given, partner, lam = batch(), torch.tensor([3, 1, 0, 5, 2, 4]), 0.3
    mixed = method("mixup").mix(hot(given, 4), partner, torch.tensor(lam))
    for i, j in enumerate(partner.tolist()):
        torch.testing.assert_close(mixed.x[i], lam * given.x[i] + (1 - lam) * given.x[j])
        wanted = [lam * (k == given.y[i]) + (1 - lam) * (k == given.y[j]) for k in range(4)]
        assert mixed.target[i].tolist() == pytest.approx([float(one) for one in wanted])


@pytest.mark.parametrize(("name", "lam"), [(name, lam) for name in ("mixup", "cutmix") for lam in (0.0, 1.0)])
def test_the_ends_are_exact(name: str, lam: float) -> None:
    """P-M2. A box of CutMix covers the image only if it is in the middle."""
    given, partner = hot(batch(), 4), torch.tensor([3, 1, 0, 5, 2, 4])
    one = method(name)
    if name == "cutmix" and lam == 0:
        inside, kept = box((8, 8), torch.tensor(0.0), (torch.tensor(4), torch.tensor(4)))
        assert inside.all() and kept == 0
        inside, kept = box((8, 8), torch.tensor(0.0), (torch.tensor(4), torch.tensor(3)))
        assert inside.sum() == 7 * 8 and kept == 1 / 8
        return
    mixed = one.mix(given, partner, torch.tensor(lam))
    wanted = (given.x, given.target) if lam else (given.x[partner], given.target[partner])
    assert torch.equal(mixed.x, wanted[0]) and torch.equal(mixed.target, wanted[1])


def test_mixup_commutes_with_normalisation() -> None:
    """P-M6: it does not matter whether images are normalised by channel before or after."""
    given, partner, lam = hot(batch(), 4), torch.tensor([3, 1, 0, 5, 2, 4]), torch.tensor(0.3)
    scale, shift = torch.tensor([2.0, 0.5, 3.0])[:, None, None], torch.tensor([1.0, -1.0, 0.2])[:, None, None]
    for one in (method("mixup"), method("cutmix"), method("cutmix")):
        state = one.rng.get_state()
        after = one.mix(given, partner, lam).x * scale + shift
        one.rng.set_state(state)
        before = one.mix(Batch(given.x * scale + shift, given.y, given.target), partner, lam).x
        torch.testing.assert_close(before, after)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_a_soft_target_is_the_mixed_loss(name: str, smoothing: float) -> None:
    """P-M7, with label smoothing too."""
    given, partner, lam = hot(batch(), 4), torch.tensor([3, 1, 0, 5, 2, 4]), torch.tensor(0.3)
    one = method(name, seed=2)
    mixed = one.mix(given, partner, lam)
    share = lam if name == "mixup" else 1 - (mixed.x != given.x).any(1).float().mean((1, 2))[0]  # no sample is its own partner but 1
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    target = (1 - smoothing) * mixed.target + smoothing / 4
    pair = [cross_entropy(logits, y, label_smoothing=smoothing) for y in (given.y, given.y[partner])]
    assert cross_entropy(logits, target).item() == pytest.approx((share * pair[0] + (1 - share) * pair[1]).item(), abs=1e-5)
    assert abs(pair[0] - pair[1]) > 0.05


def draws(alpha: float, prob: float = 1.0, count: int = 4000) -> np.ndarray:
    rng = torch.Generator().manual_seed(3)
    made = [ratio(torch.tensor(alpha, dtype=torch.float64), torch.tensor(prob), rng) for _ in range(count)]
    assert all(one.dtype == torch.float32 and one.dim() == 0 for one in made)
    return torch.stack(made).double().numpy()


@pytest.mark.parametrize("alpha", [0.02, 0.2, 1.0, 4.0])
def test_the_ratio_is_a_betas(alpha: float) -> None:
    """The Kolmogorov-Smirnov distance of 4,000 draws, below its 1e-4 quantile; at 0.02 most are closer to 0 or 1 than float32 can tell."""
    law = stats.beta(alpha, alpha)
    points = np.linspace(0.01, 0.99, 99)
    lam = draws(alpha)
    found = np.array([(lam <= point).mean() for point in points])
    assert abs(found - law.cdf(points)).max() < 2.3 / math.sqrt(4000)


@pytest.mark.parametrize("prob", [0.25, 0.5])
def test_only_some_batches_are_mixed(prob: float) -> None:
    """As many as `prob` says, within four deviations; the others are left as they are."""
    share = (draws(1.0, prob) < 1).mean()
    assert share == pytest.approx(prob, abs=4 * math.sqrt(prob * (1 - prob) / 4000))
    given = batch()
    for name in ("mixup", "cutmix"):
        one = method(name, prob=prob)
        kept = [torch.equal(one.transform(given, net(4)).x, given.x) for _ in range(400)]
        low = prob - 4 * math.sqrt(prob * (1 - prob) / 400)
        assert low < 1 - sum(kept) / 400 < prob + 0.12


def test_pairs_are_permutations_of_equal_chance() -> None:
    rng = torch.Generator().manual_seed(0)
    found = torch.stack([pairing(3, rng, torch.device("cpu")) for _ in range(3000)])
    assert torch.equal(found.sort(1).values, torch.arange(3).expand(3000, 3))
    counts = np.unique(found @ torch.tensor([9, 3, 1]), return_counts=True)[1]
    assert len(counts) == 6 and stats.chisquare(counts).pvalue > 1e-4  # fixed points are allowed


# CutMix


def test_differing_pixels_are_the_area() -> None:
    """P-M3, at every centre, and the sides."""
    for (height, width), lam in itertools.product(((8, 8), (9, 6), (32, 32)), (0.0, 0.1, 0.37, 0.5, 0.93, 1.0)):
        root = math.sqrt(1 - torch.tensor(lam).double())
        for row, column in itertools.product(range(0, height, 3), range(0, width, 3)):
            inside, kept = box((height, width), torch.tensor(lam), (torch.tensor(row), torch.tensor(column)))
            count = int(inside.sum())
            assert count == round((1 - kept.item()) * height * width)
            assert kept.item() == pytest.approx(1 - count / (height * width), abs=1e-6)
            sides = [2 * (math.floor(size * root) // 2) for size in (height, width)]
            assert kept.item() >= 1 - sides[0] * sides[1] / (height * width) - 1e-6
            clipped = any(
                middle - side // 2 < 0 or middle + side // 2 > size
                for size, side, middle in zip((height, width), sides, (row, column), strict=True)
            )
            if not clipped:
                assert count == sides[0] * sides[1]
                rows, columns = inside.any(1).nonzero().flatten().tolist(), inside.any(0).nonzero().flatten().tolist()
                assert rows == list(range(row - sides[0] // 2, row + sides[0] // 2)) or not count
                assert columns == list(range(column - sides[1] // 2, column + sides[1] // 2)) or not count


def test_cutmix_pastes_the_partners_pixels_and_mixes_by_what_is_left() -> None:
    given, partner = hot(batch(6, 4, (9, 6)), 4), torch.tensor([3, 0, 1, 5, 2, 4])
    before = given.x.clone()
    for seed in range(20):
        mixed = method("cutmix", seed=seed).mix(given, partner, torch.tensor(0.6))
        moved = (mixed.x != given.x).any(1)
        assert torch.equal(moved, moved[:1].expand_as(moved))  # one box for all
        assert torch.equal(mixed.x, torch.where(moved[:, None], given.x[partner], given.x)) and torch.equal(given.x, before)
        kept = 1 - moved[0].float().mean()
        torch.testing.assert_close(mixed.target, kept * given.target + (1 - kept) * given.target[partner])


@pytest.mark.parametrize(("size", "wanted"), [(32, 0.7008), (64, 0.6899)])
def test_the_mean_area_that_is_left(size: int, wanted: float) -> None:
    """P-M5, by enumeration of the centres; lambda on a fine grid."""
    lam = (torch.arange(2000) + 0.5) / 2000
    total = 0.0
    halves = (size * (1 - lam.double()).sqrt() / 2).floor()
    lengths = torch.stack([(middle + halves).clamp(max=size) - (middle - halves).clamp(min=0) for middle in range(size)])
    total = 1 - (lengths.mean(0) ** 2).mean().item() / size**2  # rows and columns are independent
    assert total == pytest.approx(wanted, abs=1e-3)
    one, given = (
        method("cutmix", prob=1),
        Batch(torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, size, size), torch.zeros(2).long(), torch.zeros(2).long()),
    )
    kept = [one.transform(given, net(2)).x[0].mean().item() for _ in range(3000)]
    swapped = [1 - value for value in kept if value > 0]  # the other half of the batches pairs each image with itself
    assert len(swapped) > 1300
    assert sum(swapped) / len(swapped) == pytest.approx(wanted, abs=0.02)


# torchvision


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_equals_torchvision(name: str) -> None:
    """P-M4: with its pairing, roll(1), and its ratio and box, images and targets are its own."""
    given, classes = batch(7, 5, (12, 10)), 5
    partner = torch.arange(7).roll(1)
    theirs = (v2.MixUp if name == "mixup" else v2.CutMix)(num_classes=classes)
    for seed in range(25):
        torch.manual_seed(seed)
        parameters = theirs.make_params([given.x]) | {"labels": given.y, "batch_size": 7}
        x, target = (theirs.transform(one, parameters) for one in (given.x, given.y))
        if name == "mixup":
            ours = method(name).mix(hot(given, classes), partner, torch.tensor(parameters["lam"]))
        else:
            torch.manual_seed(seed)
            lam = float(theirs._dist.sample(()))
            column, row = (int(torch.randint(size, ())) for size in (10, 12))
            inside, kept = box((12, 10), torch.tensor(lam), (torch.tensor(row), torch.tensor(column)))
            left, top, right, bottom = parameters["box"]
            wanted = torch.zeros(12, 10, dtype=torch.bool)
            wanted[top:bottom, left:right] = True
            assert torch.equal(inside, wanted) and kept.item() == pytest.approx(parameters["lam_adjusted"], abs=1e-6)
            one = method(name)
            middles = iter((torch.tensor(row), torch.tensor(column)))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch, "randint", lambda *size, middles=middles, **options: next(middles))
                ours = one.mix(hot(given, classes), partner, torch.tensor(lam))
        torch.testing.assert_close(ours.x, x, rtol=0, atol=1e-6)
        torch.testing.assert_close(ours.target, target, rtol=0, atol=1e-6)


# with label smoothing


@pytest.mark.parametrize("smoothing", [0.1, 0.4])
def test_smoothing_commutes_with_mixing(smoothing: float) -> None:
    """P-S1, P-S2: (1 - eps) (lambda y_i + (1 - lambda) y_j) + eps / K, eps / K for every class."""
    given, partner, lam = batch(), torch.tensor([3, 1, 0, 5, 2, 4]), torch.tensor(0.3)
    smooth = LabelSmoothing(smoothing)

    def smoothed(target: Tensor) -> Tensor:
        return (1 - smooth.weight) * target + smooth.weight / 4

    first = one_hot(given.y, 4).float()
    by_hand = smoothed(0.3 * first + 0.7 * first[partner])
    mixed = method("mixup").mix(hot(given, 4), partner, lam).target
    other = method("mixup").mix(Batch(given.x, given.y, smoothed(first)), partner, lam).target
    torch.testing.assert_close(smoothed(mixed), by_hand)
    torch.testing.assert_close(other, by_hand)
    lowest = by_hand.min(1).values
    assert lowest.tolist() == pytest.approx([smoothing / 4] * 6)


@pytest.mark.parametrize("pair", ["[mixup,label_smoothing]", "[cutmix,label_smoothing]"])
def test_the_order_of_mixing_and_smoothing_does_not_matter(pair: str) -> None:
    one, two = pair.strip("[]").split(",")
    there, back = (train(f"method=[{names}]", epochs=1).rows for names in (f"{one},{two}", f"{two},{one}"))
    assert [row["train/ce"] for row in there] == [row["train/ce"] for row in back]
    assert there[0]["train/ce"] > there[0]["train/target_entropy"] > train(f"method={one}", epochs=1).rows[0]["train/target_entropy"]


# in the trainer


@pytest.mark.parametrize("name", METHODS)
def test_what_is_trained_on(name: str) -> None:
    """The loss of the step is the cross-entropy on what the method made of the batch, whose class labels stay."""
    run = trainer(f"method={name}", "norm=none")
    drawn, _ = run.take(*next(iter(run.samples())))
    one = run.regularizers[name]
    state = one.rng.get_state()
    loss, terms = run.loss(drawn, None)
    one.rng.set_state(state)
    mixed = one.transform(drawn, run.net)
    assert list(terms) == ["ce"]
    if name != "lamix":
        log = run.net(mixed.x).log_softmax(1)
        assert loss.item() == pytest.approx(-(mixed.target * log).sum(1).mean().item(), rel=1e-6)
    assert torch.equal(mixed.y, drawn.y)


def test_the_entropy_of_the_target_is_logged() -> None:
    run = train("method=label_smoothing", "method.label_smoothing.smoothing=0.4", epochs=1)
    entropy = -(9 * 0.04 * math.log(0.04) + 0.64 * math.log(0.64))
    assert run.rows[0]["train/target_entropy"] == pytest.approx(entropy, rel=1e-5)
    assert "train/target_entropy" not in train(epochs=1).rows[0]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mixup", {"alpha": 0}, "alpha: 0 is not allowed; it must be above 0"),
        ("mixup", {"prob": 1.5}, "prob: 1.5 is not between 0 and 1"),
        ("cutmix", {"prob": -0.5}, "prob: -0.5 is not between 0 and 1"),
        ("cutmix", {"prob": "often"}, "prob: often is not allowed; it must be a number"),
    ],
)
def test_refused_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(name, **options)


@pytest.mark.parametrize("name", METHODS)
def test_words_cannot_be_mixed(name: str) -> None:
    from nets import small

    with pytest.raises(ConfigError, match=f"method: {name} is for samples of one label each"):
        trainer(*small("lstm"), f"method={name}")
