"""Mixup and CutMix: their laws and targets, by hand, by SciPy and by torchvision; and mixing together with label smoothing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from nets import small
from scipy import stats
from test_regularizers import made
from torchvision.transforms import v2
from trainers import data_home, train, trainer

from data.bundle import Batch
from experiments.config import ConfigError
from models.net import Net
from regularizers.mixing import pairing, ratio, soft

__all__ = ["data_home"]  # a fixture
pytestmark = pytest.mark.usefixtures("one_thread")
PARTNER = torch.tensor([3, 1, 0, 5, 2, 4])


def net(classes: int) -> Net:
    return Net(torch.nn.Flatten(), torch.nn.Linear(1, classes))


def batch(count: int = 6, classes: int = 4, size: tuple[int, int] = (8, 8), seed: int = 0) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (count,), generator=rng)
    return Batch(torch.randn(count, 3, *size, generator=rng), y, y)


def method(name: str, seed: int = 0, **options: Any) -> Any:
    """The method as its config describes it, with some options changed and a generator."""
    result = made(name, **options)
    result.rng = torch.Generator().manual_seed(seed)
    return result


def at(step: int, method: Any) -> Any:
    """The method, after its choice for that step."""
    method.choose(step)
    return method


def hot(given: Batch, classes: int) -> Batch:
    return Batch(given.x, given.y, soft(given.y, classes))


def test_the_ends_are_exact() -> None:
    """P-M2."""
    given = hot(batch(), 4)
    for name, lam, order in (("mixup", 0.0, PARTNER), ("mixup", 1.0, torch.arange(6)), ("cutmix", 1.0, torch.arange(6))):
        mixed = method(name).mix(given, PARTNER, torch.tensor(lam))
        assert torch.equal(mixed.x, given.x[order]) and torch.equal(mixed.target, given.target[order])


@pytest.mark.parametrize("alpha", [0.005, 1.0, 4.0])
def test_the_ratio_has_a_beta_distribution(alpha: float) -> None:
    """The Kolmogorov-Smirnov distance of 4,000 draws, below its 1e-4 quantile; at 0.005 float32 gamma draws would often be 0."""
    rng, points = torch.Generator().manual_seed(3), np.linspace(0.01, 0.99, 99)
    lam = torch.stack([ratio(torch.tensor(alpha, dtype=torch.float64), torch.tensor(1.0), rng) for _ in range(4000)])
    assert lam.dtype == torch.float32 and lam.dim() == 1
    empirical = np.array([(lam.double().numpy() <= point).mean() for point in points])
    assert abs(empirical - stats.beta(alpha, alpha).cdf(points)).max() < 2.3 / math.sqrt(4000)


def test_prob_is_the_share_of_mixed_batches() -> None:
    """Within four deviations, half of CutMix's as its config has it; the others are left as they are."""
    given, mixing = batch(), method("cutmix")
    kept = [torch.equal(mixing.transform(given, net(4)).x, given.x) for _ in range(400)]
    assert sum(kept) / 400 == pytest.approx(0.5, abs=4 * math.sqrt(0.5 * 0.5 / 400))


def test_pairings_are_permutations_of_equal_chance() -> None:
    rng = torch.Generator().manual_seed(0)
    partners = torch.stack([pairing(3, rng, torch.device("cpu")) for _ in range(3000)])
    assert torch.equal(partners.sort(1).values, torch.arange(3).expand(3000, 3))
    counts = np.unique(partners @ torch.tensor([9, 3, 1]), return_counts=True)[1]
    assert len(counts) == 6 and stats.chisquare(counts).pvalue > 1e-4  # fixed points are allowed


def test_the_mean_area_that_is_left() -> None:
    """P-M5: 0.7008 for 32x32 images, by enumeration of all centres and a fine grid of lambda."""
    given, mixing = Batch(torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 32, 32), *2 * [torch.zeros(2).long()]), method("cutmix", prob=1)
    kept = [mixing.transform(given, net(2)).x[0].mean().item() for _ in range(3000)]
    swapped = [1 - value for value in kept if value > 0]  # the other half of the batches pairs each image with itself
    assert len(swapped) > 1300 and sum(swapped) / len(swapped) == pytest.approx(0.7008, abs=0.02)


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_equals_torchvision(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """P-M1, P-M3, P-M4: with torchvision's pairing, roll(1), and its ratio and box, images and targets are equal to its own."""
    given, partner = batch(7, 5, (12, 10)), torch.arange(7).roll(1)
    theirs = (v2.MixUp if name == "mixup" else v2.CutMix)(num_classes=5)
    for seed in range(25):
        torch.manual_seed(seed)
        parameters = theirs.make_params([given.x]) | {"labels": given.y, "batch_size": 7}
        x, target = (theirs.transform(values, parameters) for values in (given.x, given.y))
        ours, lam = method(name), parameters.get("lam")
        if name == "cutmix":
            torch.manual_seed(seed)
            lam = float(theirs._dist.sample(()))
            column, row = (torch.randint(size, ()) for size in (10, 12))
            monkeypatch.setattr(torch, "randint", lambda *size, centre=[column, row], **options: centre.pop())
        mixed = ours.mix(hot(given, 5), partner, torch.tensor(lam))
        monkeypatch.undo()
        torch.testing.assert_close(mixed.x, x, rtol=0, atol=1e-6)
        torch.testing.assert_close(mixed.target, target, rtol=0, atol=1e-6)


def test_the_loss_is_the_cross_entropy_on_the_mixed_batch() -> None:
    run = trainer("method=cutmix", "method.cutmix.prob=1", "norm=none")
    drawn, _ = run.take(*next(iter(run.samples())))
    mixing = run.regularizers["cutmix"]
    state = mixing.rng.get_state()
    loss, terms = run.loss(drawn, None)
    mixing.rng.set_state(state)
    mixed = mixing.transform(drawn, run.net)
    log = run.net(mixed.x).log_softmax(1)
    assert list(terms) == ["ce"] and loss.item() == pytest.approx(-(mixed.target * log).sum(1).mean().item(), rel=1e-6)
    assert torch.equal(mixed.y, drawn.y) and not torch.equal(mixed.x, drawn.x)


def test_mixing_and_smoothing_in_either_order_and_the_entropy_of_the_target() -> None:
    run = train("method=label_smoothing", "method.label_smoothing.smoothing=0.4", epochs=1)
    entropy = -(9 * 0.04 * math.log(0.04) + 0.64 * math.log(0.64))
    assert run.rows[0]["train/target_entropy"] == pytest.approx(entropy, rel=1e-5)
    for name in ("mixup", "puzzlemix"):
        there, back = (train(f"method=[{names}]", epochs=1).rows for names in (f"{name},label_smoothing", f"label_smoothing,{name}"))
        assert there == back and there[0]["train/ce"] > there[0]["train/target_entropy"]
    assert there[0]["train/target_entropy"] > train(f"method={name}", epochs=1).rows[0]["train/target_entropy"]


def test_refused_options_and_data() -> None:
    with pytest.raises(ConfigError, match="alpha: 0 is not allowed; it must be above 0"):
        made("mixup", alpha=0)
    with pytest.raises(ConfigError, match=r"prob: 1\.5 is not between 0 and 1"):
        made("cutmix", prob=1.5)
    with pytest.raises(ConfigError, match="method: lamix is for samples of one label each"):
        trainer(*small("lstm"), "method=lamix")
