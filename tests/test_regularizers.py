"""Methods: each one's formula by hand, how they compose, and what they may import."""

from __future__ import annotations

import ast
import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_mmd import brute, root
from test_trainer import METHODS, buffers, config, data_home, parameters, same, strength, train, trainer
from torch import Tensor
from torch.nn.functional import cross_entropy

from data.bundle import Batch
from experiments.config import ConfigError, build
from experiments.trainer import Trainer
from models.net import Net
from regularizers.base import Pass, Regularizer
from regularizers.itdm import ITDM
from regularizers.label_smoothing import LabelSmoothing

ROOT = Path(__file__).resolve().parent.parent
OURS = {"data", "models", "regularizers", "experiments"}
MAY_IMPORT = {"data": {"data"}, "models": {"models"}, "regularizers": {"data", "models", "regularizers"}}
QUICK = ["profile.steps=2", "profile.test=20"]

__all__ = ["data_home"]  # a fixture


def made(method: str, **options: Any) -> Any:
    """A method as the config describes it, with some options changed."""
    node = config(f"method={method}", *(f"method.{method}.{key}={value}" for key, value in options.items())).method[method]
    return build(node, f"method.{method}")


def passed(labels: list[int], classes: int, seed: int = 0, per_class: int | None = None, width: int = 6) -> Pass:
    """A forward's outcome with random features and logits, in float64 so that the oracles can be exact."""
    rng = torch.Generator().manual_seed(seed)
    y = torch.tensor(labels)
    features = torch.randn(len(y), width, generator=rng, dtype=torch.float64) + y[:, None]
    logits = torch.randn(len(y), classes, generator=rng, dtype=torch.float64)
    batch = Batch(torch.randn(len(y), 1, 4, 4, generator=rng), y, y, per_class)
    return Pass(batch, features.requires_grad_(), logits.requires_grad_(), ())


# Every method


@pytest.mark.parametrize("method", METHODS)
def test_builds_and_trains(method: str) -> None:
    assert isinstance(made(method), Regularizer)
    run = trainer(f"method={method}", *QUICK)
    assert list(run.regularizers) == [method]
    before = parameters(run)
    run.train_epoch()
    assert run.step == 2 and all(math.isfinite(value) for value in run.rows[0].values())
    assert not any(torch.equal(value, before[name]) for name, value in parameters(run).items())


@pytest.mark.parametrize("method", METHODS)
def test_in_bf16(method: str) -> None:
    run = trainer(f"method={method}", "precision=bf16", *QUICK)
    run.train_epoch()
    assert all(math.isfinite(value) for value in run.rows[0].values())
    assert all(value.dtype == torch.float32 for value in run.net.parameters())


@pytest.mark.parametrize(("one", "two"), [(one, two) for one in METHODS for two in METHODS if one != two])
def test_composes(one: str, two: str) -> None:
    run = trainer(f"method=[{one},{two}]", *QUICK)
    assert list(run.regularizers) == [one, two]
    run.train_epoch()
    assert set(run.rows[0]) == alone(one) | alone(two) and all(math.isfinite(value) for value in run.rows[0].values())


@pytest.mark.parametrize("method", [name for name in METHODS if strength(name) is not None])
@pytest.mark.parametrize("other", ["", "label_smoothing"])
def test_weight_zero_is_as_if_it_were_not_there(method: str, other: str) -> None:
    if method == other:
        other = ""
    pair = f"[{other},{method}]" if other else f"[{method}]"
    for common in ([], ["balanced=false", "model=net2c", "norm=none"]):
        without = train(f"method=[{other}]", *common, epochs=1)
        zero = train(f"method={pair}", f"{strength(method)}=0", *common, epochs=1)
        assert without.step == zero.step == 5
        assert same(parameters(without), parameters(zero)) and same(buffers(without), buffers(zero))


@functools.cache
def alone(method: str) -> set[str]:
    """What is logged of a run with this method only."""
    return set(train(f"method={method}", *QUICK, epochs=1).rows[0])


def test_base_changes_nothing() -> None:
    base, out = Regularizer(), passed([0, 1, 2], 3)
    net = Net(torch.nn.Identity(), torch.nn.Linear(2, 2))
    assert base.transform(out.batch, net) is out.batch
    assert base.retarget(out) is out.batch.target
    assert base.penalty(out, out) is None
    assert base.active and not Regularizer(0).active and not base.second_batch


# Label smoothing


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.35, 1.0])
def test_label_smoothing_of_hard_targets(smoothing: float) -> None:
    out = passed([2, 0, 3, 3], 4)
    target = LabelSmoothing(smoothing).retarget(out)
    for row, label in zip(target.tolist(), [2, 0, 3, 3], strict=True):
        assert row == pytest.approx([(1 - smoothing) * (k == label) + smoothing / 4 for k in range(4)], abs=1e-7)
    theirs = cross_entropy(out.logits, out.batch.y, label_smoothing=smoothing)
    torch.testing.assert_close(cross_entropy(out.logits, target.double()), theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("smoothing", [0.1, 0.35, 1.0])
def test_label_smoothing_of_soft_targets(smoothing: float) -> None:
    out = passed([2, 0, 3, 3], 4)
    soft = torch.rand(4, 4, generator=torch.Generator().manual_seed(5)).softmax(1)
    target = LabelSmoothing(smoothing).retarget(replace(out, batch=replace(out.batch, target=soft)))
    for row, given in zip(target.tolist(), soft.tolist(), strict=True):
        assert row == pytest.approx([(1 - smoothing) * p + smoothing / 4 for p in given], abs=1e-6)
    theirs = cross_entropy(out.logits, soft.double(), label_smoothing=smoothing)
    torch.testing.assert_close(cross_entropy(out.logits, target.double()), theirs, rtol=1e-6, atol=1e-7)


def test_label_smoothing_of_sequences() -> None:
    out = passed([0, 1], 3)
    words = torch.tensor([[0, 2], [1, 1]])
    logits = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0))
    target = LabelSmoothing(0.3).retarget(replace(out, logits=logits, batch=replace(out.batch, target=words)))
    assert target.shape == (2, 2, 3)
    assert target[0, 1].tolist() == pytest.approx([0.1, 0.1, 0.8]) and target[1, 0].tolist() == pytest.approx([0.1, 0.8, 0.1])


@pytest.mark.parametrize("smoothing", [-0.1, 1.5])
def test_label_smoothing_has_a_range(smoothing: float) -> None:
    with pytest.raises(ConfigError, match=r"smoothing: .* is not between 0 and 1"):
        made("label_smoothing", smoothing=smoothing)


def test_trained_cross_entropy_is_torchs_smoothed_one() -> None:
    run = trainer("method=label_smoothing", "method.label_smoothing.smoothing=0.2")
    batch, _ = run.take(*next(iter(run.samples())))
    loss, terms = run.loss(batch, None)
    assert list(terms) == ["ce"]
    wanted = cross_entropy(run.net(batch.x), batch.y, label_smoothing=0.2)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert abs(cross_entropy(run.net(batch.x), batch.y).item() - loss.item()) > 1e-4


def first_loss(run: Trainer) -> tuple[Tensor, dict[str, Tensor]]:
    return run.loss(*run.take(*next(iter(run.samples()))))


@pytest.mark.parametrize("method", ["itdm_c", "itdm_j"])
def test_order_of_stages_does_not_matter(method: str) -> None:
    one, two = (first_loss(trainer(f"method={pair}")) for pair in (f"[{method},label_smoothing]", f"[label_smoothing,{method}]"))
    assert torch.equal(one[0], two[0]) and same(one[1], two[1]) and set(one[1]) == {"ce", method}
    smooth, itdm = (first_loss(trainer(f"method={alone}"))[1] for alone in ("label_smoothing", method))
    assert one[1]["ce"].item() == smooth["ce"].item() != itdm["ce"].item()
    assert one[1][method].item() == itdm[method].item() > 0


# ITDM


@pytest.mark.parametrize("multipliers", [(1,), (1, 2, 4, 8, 16), (1, 3)], ids=str)
def test_itdm_j_is_the_mmd_of_the_two_batches(multipliers: tuple[float, ...]) -> None:
    out, other = passed([0, 1, 2, 1], 3), passed([2, 2, 0], 3, seed=1)
    penalty = made("itdm_j", weight=0.7, multipliers=list(multipliers)).penalty(out, other)
    wanted = 0.7 * root(brute(out.features.float(), other.features.float(), multipliers))
    assert penalty.item() == pytest.approx(wanted, rel=1e-5)


def test_defaults_are_those_of_the_paper() -> None:
    out, other = passed([0, 1, 2, 1, 0], 3), passed([2, 2, 0, 1], 3, seed=1)
    h1, h2 = out.features.float(), other.features.float()
    assert made("itdm_j").penalty(out, other).item() == pytest.approx(root(brute(h1, h2, (1,))), rel=1e-5)
    terms = [root(brute(h1[out.batch.y == k], h2[other.batch.y == k], (1, 2, 4, 8, 16))) for k in range(3)]
    assert made("itdm_c", weight=1).penalty(out, other).item() == pytest.approx(sum(terms) / 3, rel=1e-5)


@pytest.mark.parametrize("multipliers", [[1], [1, 2, 4, 8, 16], [1, 3]], ids=str)
def test_itdm_c_of_one_class_is_itdm_j(multipliers: list[float]) -> None:
    out, other = passed([0] * 5, 1), passed([0] * 4, 1, seed=1)
    whole, by_class = (made(name, weight=0.6, multipliers=multipliers).penalty(out, other) for name in ("itdm_j", "itdm_c"))
    assert whole.item() == pytest.approx(by_class.item(), rel=1e-6) and whole.item() > 0.01


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    ("one", "two"),
    [
        ([0, 1, 2, 3, 0, 1, 2, 3], [3, 2, 1, 0, 0, 1, 2, 3]),
        ([0, 0, 0, 2, 2, 3], [0, 1, 1, 2, 2, 2, 2, 3]),  # class 1 lacks the first side
        ([1, 1, 3, 3], [1, 0, 0, 1, 1]),  # 0 and 3 lack a side, 2 both
    ],
)
def test_itdm_c_is_the_mean_over_all_classes(one: list[int], two: list[int], known: bool) -> None:
    bounds = [max(map(labels.count, labels)) if known else None for labels in (one, two)]
    out, other = passed(one, 4, per_class=bounds[0]), passed(two, 4, seed=1, per_class=bounds[1])
    total = 0.0
    for k in range(4):
        h1, h2 = out.features[out.batch.y == k].float(), other.features[other.batch.y == k].float()
        total += root(brute(h1, h2)) if len(h1) and len(h2) else 0.0
    penalty = made("itdm_c", weight=0.5).penalty(out, other)
    assert penalty.item() == pytest.approx(0.5 * total / 4, rel=1e-5) and total > 0.1


@pytest.mark.parametrize("method", ["itdm_c", "itdm_j"])
def test_gradient_reaches_both_batches_but_no_logits(method: str) -> None:
    out, other = passed([0, 1, 0, 1], 2), passed([1, 1, 0, 0], 2, seed=1)
    made(method).penalty(out, other).backward()
    for side in (out, other):
        assert side.features.grad is not None and (side.features.grad.abs().sum(1) > 0).all() and side.features.grad.isfinite().all()
        assert side.logits.grad is None


@pytest.mark.parametrize("method", ["itdm_c", "itdm_j"])
def test_only_the_features_are_matched(method: str) -> None:
    run = trainer(f"method={method}")
    batch, second = run.take(*next(iter(run.samples())))
    assert second is not None
    _, terms = run.loss(replace(batch, x=batch.x.requires_grad_()), replace(second, x=second.x.requires_grad_()))
    head = [run.net.classifier.weight, run.net.classifier.bias]
    assert all(pull is None for pull in torch.autograd.grad(terms[method], head, retain_graph=True, allow_unused=True))
    pulls = torch.autograd.grad(terms[method], [batch.x, second.x, *run.net.features.parameters()], retain_graph=True)
    assert all(pull.isfinite().all() and pull.any() for pull in pulls)
    first, unused = torch.autograd.grad(terms["ce"], [batch.x, second.x], allow_unused=True)
    assert first.any() and unused is None  # the second batch's labels and logits are not trained on


def test_weight_scales_the_penalty() -> None:
    out, other = passed([0, 1, 0, 1], 2), passed([1, 1, 0, 0], 2, seed=1)
    one, three = (made("itdm_c", weight=weight).penalty(out, other).item() for weight in (1, 3))
    assert three == pytest.approx(3 * one, rel=1e-6)


def test_half_precision_features_are_matched_in_float32() -> None:
    out, other = passed([0, 1, 0, 1], 2), passed([1, 1, 0, 0], 2, seed=1)
    halves = [replace(side, features=side.features.bfloat16()) for side in (out, other)]
    penalty = made("itdm_j").penalty(*halves)
    assert penalty.dtype == torch.float32
    assert penalty.item() == pytest.approx(root(brute(halves[0].features, halves[1].features, (1,))), rel=1e-5)


def test_weight_zero_is_active_only_for_the_authors_baseline() -> None:
    for second in (False, True):
        itdm = ITDM(0, per_class=True, baseline_second_forward=second)
        assert itdm.active == second and itdm.penalty(passed([0, 1], 2), passed([0, 1], 2)) is None


# Imports point one way


def imported(file: Path) -> set[str]:
    """The suite's own top-level packages that a file names in its imports, wherever they stand."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0] if node.level == 0 else file.parent.name)
    return found & OURS


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert len(files) >= 3
    for file in files:
        assert imported(file) <= MAY_IMPORT[package], file.name


def test_imports_are_seen() -> None:
    assert imported(ROOT / "regularizers" / "itdm.py") == {"regularizers"}
    assert imported(ROOT / "experiments" / "trainer.py") >= {"data", "models", "regularizers", "experiments"}
