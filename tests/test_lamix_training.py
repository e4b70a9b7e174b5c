"""LaMix in the trainer: the alternation of clean and mixed steps, the extra layer, what is logged; and LaMix on PuzzleMix."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import small
from test_mixing import at
from test_puzzlemix import ready
from torch.nn.functional import one_hot
from trainers import data_home, same, train, trainer

from data.bundle import Batch
from experiments.provenance import facts
from models.net import Net
from regularizers.base import Pass
from regularizers.lamix_puzzle import LaMixPuzzle
from regularizers.puzzlemix import PuzzleMix

__all__ = ["data_home"]  # a fixture
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("schedule", "mixed", "shares"),
    [
        ("alternate", [False, True] * 7 + [False], [0.4, 0.6, 0.4]),  # of all steps of the run: five in an epoch are an odd number
        ("double", [False, True] * 15, [0.5] * 3),
        ("mixed_only", [True] * 15, [1] * 3),
    ],
)
def test_the_schedule(schedule: str, mixed: list[bool], shares: list[float]) -> None:
    """P-L9, and what result.json says of the cost."""
    run, seen = trainer("method=lamix", f"method.lamix.schedule={schedule}", "epochs=3"), []
    ours = run.regularizers["lamix"]
    transform = ours.transform

    def watched(given: Batch, net: Net) -> Batch:
        changed = transform(given, net)
        seen.append(not torch.equal(changed.x, given.x))
        return changed

    ours.transform = watched  # type: ignore[method-assign]
    for _ in range(3):
        run.train_epoch()
    assert seen == mixed and run.steps_per_epoch == len(mixed) // 3
    assert [row["train/lamix/mixed"] for row in run.rows] == pytest.approx(shares)
    cost = facts(run.cfg, run)
    assert (cost["steps"], cost["passes"], cost["forwarded"]) == (len(mixed), len(mixed), 20 * len(mixed))


def test_double_takes_both_steps_of_each_batch_at_the_same_rates_and_timed_steps_alternate() -> None:
    plain, double = (trainer("method=lamix", "schedule.at=[1]", f"method.lamix.schedule={name}") for name in ("alternate", "double"))
    once, twice = ([samples[0] for samples in run.samples()] for run in (plain, double))
    assert len(once) == 5 and same(twice, [samples for samples in once for _ in range(2)])
    for samples in plain.samples():
        plain.take_step(*samples)  # not by train_epoch, which counts the run's own steps
    assert plain.step == 0 and plain.clock == 5 and plain.sums["lamix/mixed"] == 2
    for _ in range(2):
        double.train_epoch()
    assert [row["lr"] for row in double.rows] == pytest.approx([0.05, 0.01])


def test_the_layer_is_trained_and_serves_training_only() -> None:
    """P-L10; and it has the shape of the classifier (P-A1), and its decay and rate."""
    run = trainer("method=lamix")
    head, classifier = run.regularizers["lamix"].head, run.net.classifier
    assert head.weight.shape == classifier.weight.shape and head.bias.shape == classifier.bias.shape
    bound = classifier.in_features**-0.5
    assert 0.9 * bound < head.weight.abs().max() <= bound and 0.5 * bound < head.bias.abs().max() <= bound
    before = copy.deepcopy(head.state_dict())
    run.train_epoch()
    assert all((after != before[name]).any() for name, after in head.state_dict().items())
    metrics = run.evaluate("test")
    with torch.no_grad():
        head.weight.normal_()
    assert run.evaluate("test") == metrics
    groups = [group for group in run.optimizer.param_groups if any(parameter is head.weight for parameter in group["params"])]
    assert len(groups) == 1 and any(parameter is classifier.weight for parameter in groups[0]["params"])


def test_it_leaves_the_networks_start_and_dropout_alone() -> None:
    """Its layer starts from the method's own generator."""
    starts = []
    for name in ("[]", "[lamix]"):
        run = trainer(*small("cnn11"), "norm=none", f"method={name}")
        starts.append((run.net.state_dict(), torch.get_rng_state()))
    assert same(*starts)


@pytest.mark.parametrize("label", ["lambda", "mask_ratio"])
def test_lamix_takes_puzzlemixs_image_at_one_half_and_its_own_label(label: str) -> None:
    """Eq. 5: every other step; the mask's prior is for 1/2; labels are mixed in another ratio, the same for the batch, or the mask's."""
    run, method, drawn = ready(f"method.lamix_puzzle.local_label={label}", method="lamix_puzzle")
    hot, seen = one_hot(drawn.y, 10).float(), set()
    clean = at(0, method).transform(drawn, run.net)
    assert torch.equal(clean.x, drawn.x) and torch.equal(clean.target, hot)
    for step in (1, 3, 5):
        rng = method.rng.get_state()
        mixed = at(step, method).transform(drawn, run.net)
        method.rng.set_state(rng)
        lam = torch.zeros(()).uniform_(generator=method.rng) if label == "lambda" else None
        partner = torch.rand(12, generator=method.rng).argsort()
        x, share = method.puzzle.mix(drawn, partner, torch.tensor(0.5), run.net)
        lam = share[:, None] if lam is None else lam
        seen |= {*share.tolist()}
        assert torch.equal(mixed.x, x)
        torch.testing.assert_close(mixed.target, lam * hot + (1 - lam) * hot[partner])
        h = torch.randn(12, 128)
        assert torch.equal(method.retarget(Pass(mixed, h, run.net.classifier(h), ())), mixed.target) and method.head is None  # beta = 1
    assert len(seen) > 2


def test_lamix_on_puzzlemix_learns_a_global_label_below_a_beta_of_one_and_mixes_every_batch() -> None:
    head = train("method=lamix_puzzle", "method.lamix_puzzle.beta=0.5", epochs=1).regularizers["lamix_puzzle"].head
    assert head is not None and head.weight.grad.abs().max() > 0
    with pytest.raises(ValueError, match=r"puzzle\.prob: 0\.5 is not allowed; it must be 1"):
        LaMixPuzzle(PuzzleMix(prob=0.5))
