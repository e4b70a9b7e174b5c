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
from torch import Tensor
from torch.nn.functional import cross_entropy
from trainers import METHODS, buffers, config, data_home, parameters, same, strength, train, trainer

from data.bundle import Batch
from experiments.config import ConfigError, build
from experiments.trainer import Trainer
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


@functools.cache
def trained(methods: str, precision: str = "fp32") -> tuple[Trainer, dict[str, Tensor]]:
    """A run after an epoch of two steps, and its initial weights."""
    run = trainer(f"method={methods}", f"precision={precision}", *QUICK)
    before = parameters(run)
    run.train_epoch()
    assert run.step == 2 and all(math.isfinite(value) for value in run.rows[0].values())
    return run, before


@pytest.mark.parametrize(
    ("method", "precision"), [*[(name, "fp32") for name in METHODS], ("itdm_c", "bf16"), ("per", "bf16"), ("lamix", "bf16")]
)
def test_builds_and_trains(method: str, precision: str) -> None:
    run, before = trained(method, precision)
    assert list(run.regularizers) == [method] and isinstance(run.regularizers[method], Regularizer)
    after = parameters(run)
    assert not any(torch.equal(value, before[name]) or value.dtype != torch.float32 for name, value in after.items())


def test_all_methods_compose() -> None:
    """Every pair of methods, in both orders: what is logged is what the methods log alone."""
    for methods in (METHODS, METHODS[::-1]):
        run, _ = trained(f"[{','.join(methods)}]")
        assert list(run.regularizers) == methods
        assert set(run.rows[0]) == set().union(*(trained(name)[0].rows[0] for name in methods))


def test_methods_of_weight_zero_are_as_if_they_were_not_there() -> None:
    others = [name for name in METHODS if strength(name) and name != "label_smoothing"]
    common = ["balanced=false", "model=net2c", "norm=none"]
    without = train("method=[label_smoothing]", *common, epochs=1)
    zero = train(f"method=[label_smoothing,{','.join(others)}]", *(f"{strength(name)}=0" for name in others), *common, epochs=1)
    assert without.step == zero.step == 5
    assert same(parameters(without), parameters(zero)) and same(buffers(without), buffers(zero))


@pytest.mark.parametrize("smoothing", [0.0, 0.35, 1.0])
def test_label_smoothing_of_hard_and_soft_targets(smoothing: float) -> None:
    out = passed([2, 0, 3, 3], 4)
    soft = torch.rand(4, 4, generator=torch.Generator().manual_seed(5)).softmax(1)
    for given, as_rows in ((out.batch.y, torch.eye(4)[out.batch.y]), (soft, soft)):
        target = LabelSmoothing(smoothing).retarget(replace(out, batch=replace(out.batch, target=given)))
        for row, shares in zip(target.tolist(), as_rows.tolist(), strict=True):
            assert row == pytest.approx([(1 - smoothing) * p + smoothing / 4 for p in shares], abs=1e-6)
        theirs = cross_entropy(out.logits, given if given is out.batch.y else given.double(), label_smoothing=smoothing)
        torch.testing.assert_close(cross_entropy(out.logits, target.double()), theirs, rtol=1e-6, atol=1e-7)


def test_label_smoothing_of_sequences() -> None:
    out = passed([0, 1], 3)
    words = torch.tensor([[0, 2], [1, 1]])
    logits = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0))
    target = LabelSmoothing(0.3).retarget(replace(out, logits=logits, batch=replace(out.batch, target=words)))
    assert target.shape == (2, 2, 3)
    assert target[0, 1].tolist() == pytest.approx([0.1, 0.1, 0.8]) and target[1, 0].tolist() == pytest.approx([0.1, 0.8, 0.1])


def test_label_smoothing_has_a_range() -> None:
    with pytest.raises(ConfigError, match=r"smoothing: 1\.5 is not between 0 and 1"):
        made("label_smoothing", smoothing=1.5)


def test_order_of_stages_does_not_matter() -> None:
    words = ("[itdm_c,label_smoothing]", "[label_smoothing,itdm_c]", "label_smoothing", "itdm_c")
    losses = [run.loss(*run.take(*next(iter(run.samples())))) for run in (trainer(f"method={methods}") for methods in words)]
    first, second, smooth, itdm = (terms for _, terms in losses)
    assert torch.equal(losses[0][0], losses[1][0]) and same(first, second) and set(first) == {"ce", "itdm_c"}
    assert first["ce"].item() == smooth["ce"].item() != itdm["ce"].item()
    assert first["itdm_c"].item() == itdm["itdm_c"].item() > 0


def test_itdm_is_the_mmd_of_the_two_batches_with_the_paper_s_defaults() -> None:
    out, other = passed([0, 1, 2, 1, 0], 3), passed([2, 2, 0, 1], 3, seed=1)
    h1, h2 = out.features.float(), other.features.float()
    assert made("itdm_j").penalty(out, other).item() == pytest.approx(root(brute(h1, h2, (1,))), rel=1e-5)
    penalty = made("itdm_j", weight=0.7, multipliers=[1, 3], bandwidth="cross").penalty(out, other)
    assert penalty.item() == pytest.approx(0.7 * root(brute(h1, h2, (1, 3), "cross")), rel=1e-5)
    halves = [replace(side, features=side.features.bfloat16()) for side in (out, other)]
    penalty = made("itdm_j").penalty(*halves)  # in float32
    assert penalty.dtype == torch.float32 and penalty.item() == pytest.approx(
        root(brute(*(side.features for side in halves), (1,))), rel=1e-5
    )
    terms = [root(brute(h1[out.batch.y == k], h2[other.batch.y == k], (1, 2, 4, 8, 16))) for k in range(3)]
    assert made("itdm_c", weight=1).penalty(out, other).item() == pytest.approx(sum(terms) / 3, rel=1e-5)


@pytest.mark.parametrize(
    ("labels", "others", "bounded"),
    [
        ([0, 1, 2, 3, 0, 1, 2, 3], [3, 2, 1, 0, 0, 1, 2, 3], True),
        ([0, 0, 0, 2, 2, 3], [0, 1, 1, 2, 2, 2, 2, 3], True),  # class 1 lacks the first side
        ([1, 1, 3, 3], [1, 0, 0, 1, 1], False),  # 0 and 3 lack a side, 2 both
    ],
)
def test_itdm_c_is_the_mean_over_all_classes(labels: list[int], others: list[int], bounded: bool) -> None:
    bounds = [max(map(side.count, side)) if bounded else None for side in (labels, others)]
    out, other = passed(labels, 4, per_class=bounds[0]), passed(others, 4, seed=1, per_class=bounds[1])
    total = 0.0
    for k in range(4):
        h1, h2 = out.features[out.batch.y == k].float(), other.features[other.batch.y == k].float()
        total += root(brute(h1, h2)) if len(h1) and len(h2) else 0.0
    penalty = made("itdm_c", weight=0.5).penalty(out, other)
    assert penalty.item() == pytest.approx(0.5 * total / 4, rel=1e-5) and total > 0.1


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


def test_weight_zero_is_active_only_for_the_authors_baseline() -> None:
    for second in (False, True):
        itdm = ITDM(0, per_class=True, baseline_second_forward=second)
        assert itdm.active == second and itdm.penalty(passed([0, 1], 2), passed([0, 1], 2)) is None


def imported(file: Path) -> set[str]:
    """The suite's own top-level packages that a file names in its imports, wherever they stand."""
    packages: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            packages.add((node.module or "").split(".")[0] if node.level == 0 else file.parent.name)
    return packages & OURS


def test_imports_point_one_way() -> None:
    assert imported(ROOT / "experiments" / "trainer.py") == OURS
    for package, allowed in MAY_IMPORT.items():
        files = sorted((ROOT / package).rglob("*.py"))
        assert len(files) >= 3
        for file in files:
            assert imported(file) <= allowed, file.name
