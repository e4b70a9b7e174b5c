"""The trainer: paired runs, exact resume, the evaluation, divergence."""

from __future__ import annotations

import copy
import io
import math
import os
from typing import Any

import pytest
import torch
from nets import IMAGE, composed, small
from torch import Tensor
from trainers import COMPOSED, METHODS, buffers, config, data_home, parameters, same, strength, train, trainer, watch

from data.bundle import Batch
from experiments.rng import generator
from experiments.trainer import Diverged

# For tests that import them from here.
__all__ = ["config", "data_home", "same", "train", "trainer"]

# Runs that can be compared


@pytest.mark.parametrize(("model", "method"), [*[("net2c", name) for name in METHODS if strength(name)], ("lstm", "per")])
def test_weight_zero_is_vanilla_bit_for_bit(model: str, method: str) -> None:
    net = small(model)
    vanilla, zero, plain = train(*net), train(*net, f"method={method}", f"{strength(method)}=0"), train(*net, f"method={method}")
    assert same(parameters(vanilla), parameters(zero)) and same(buffers(vanilla), buffers(zero))
    assert same(vanilla.rows, zero.rows) and len(vanilla.rows) == 2
    assert not same(parameters(vanilla), parameters(plain))


def test_second_forward_of_the_baseline_moves_only_buffers() -> None:
    vanilla, second = train(), train("method=itdm_c", "method.itdm_c.weight=0", "method.itdm_c.baseline_second_forward=true")
    assert same(parameters(vanilla), parameters(second))
    assert not any(torch.equal(value, buffers(vanilla)[name]) for name, value in buffers(second).items())
    assert [row["train/ce"] for row in vanilla.rows] == [row["train/ce"] for row in second.rows]
    assert all("train/itdm_c" not in row for row in second.rows)


def seen(*overrides: str) -> tuple[dict[str, Tensor], list[tuple[Batch, Any]]]:
    """The initial weights, and the batches of each step of two epochs."""
    made, batches = trainer(*overrides), []
    start = parameters(made)
    watch(made, lambda batch, second: batches.append((batch, second)))
    made.train_epoch()
    made.train_epoch()
    return start, batches


@pytest.mark.parametrize(("method", "balanced"), [*[(name, "true") for name in METHODS], (COMPOSED, "true"), (COMPOSED, "false")])
def test_methods_of_a_seed_start_alike_and_see_the_same_batches(method: str, balanced: str) -> None:
    (start, batches), (other, others) = (seen(f"balanced={balanced}", f"method={name}") for name in ("vanilla", method))
    assert same(start, other) and len(batches) == len(others) == 10
    assert all(torch.equal(a.x, b.x) and torch.equal(a.y, b.y) for (a, _), (b, _) in zip(batches, others, strict=True))
    assert not torch.equal(batches[0][0].x, batches[5][0].x)  # each epoch has an order of its own


def test_seeds_differ() -> None:
    (start, batches), (other, others) = (seen(f"seed={seed}") for seed in (1, 2))
    assert not any(torch.equal(a.x, b.x) for (a, _), (b, _) in zip(batches, others, strict=True))
    assert not any(torch.equal(value, other[name]) for name, value in start.items() if value.dim() > 1)
    draws = [torch.rand(4, generator=generator(seed, name, "cpu")).tolist() for seed in (0, 1, 2) for name in ("data", "second", "init")]
    assert len({tuple(draw) for draw in draws}) == 9


def test_second_batches_are_balanced_too_and_independent() -> None:
    _, pairs = seen("method=itdm_c")
    for batch, second in pairs:
        assert torch.bincount(batch.y, minlength=10).tolist() == torch.bincount(second.y, minlength=10).tolist() == [2] * 10
        assert not torch.equal(batch.x, second.x)
    first, second = (torch.cat([pair[side].x for pair in pairs[:5]]).flatten(1).sum(1).sort().values for side in (0, 1))
    assert torch.equal(first, second)  # the same training set, each sample once
    assert [second for _, second in seen()[1]] == [None] * 10


# The state

NETS = [("lstm", composed("lstm")), ("lenet", COMPOSED)]
NETS += [pytest.param(name, COMPOSED, marks=pytest.mark.slow) for name in IMAGE if name not in ("net2c", "lenet")]


@pytest.mark.parametrize(("model", "method"), [*[("net2c", method) for method in ("vanilla", *METHODS, COMPOSED)], *NETS])
def test_resume_is_exact(model: str, method: str) -> None:
    size = [] if model == "net2c" else [*small(model), *(["precision=bf16"] if model in IMAGE[::2] else [])]
    overrides = [*size, f"method={method}", "epochs=4", "schedule.at=[2]", f"evaluate.every={1 if size else 2}", "profile.steps=4"]
    whole, file = train(*overrides, epochs=2), io.BytesIO()
    torch.save(whole.state(), file)
    for _ in range(2):
        whole.train_epoch()

    resumed = train(*overrides, epochs=1)  # somewhere else altogether: all that counts must come from the state
    torch.manual_seed(99)
    file.seek(0)
    resumed.load(torch.load(file, weights_only=True))
    assert (resumed.epoch, resumed.step) == (2, 4 if size else 8)
    for _ in range(2):
        resumed.train_epoch()

    wanted, state = whole.state(), resumed.state()
    assert len(wanted["rows"]) >= 4 and wanted["optimizer"]["state"]
    for part in wanted:
        assert part == "seconds" or same(wanted[part], state[part]), part
    if method == COMPOSED:
        assert same(train(*overrides, epochs=4).state()["net"], wanted["net"])  # saving changed nothing
    # torch's fused SGD on a CPU goes through memory: given another layout, it would take a gradient for that of another weight
    for name, value in resumed.net.named_parameters():
        assert value.grad.stride() == value.stride() == resumed.optimizer.state[value]["momentum_buffer"].stride(), name


# The evaluation


def test_evaluation_by_hand() -> None:
    made = train("optim.lr=0.2", epochs=1)
    metrics = made.evaluate("test")
    net = copy.deepcopy(made.net).double().eval()
    right, ce, square = 0, 0.0, 0.0
    for image, label in zip(*made.bundle.splits["test"], strict=True):
        h = net.features(made.bundle.prepare(image[None]).double())
        logits = net.classifier(h)[0].tolist()
        right += logits.index(max(logits)) == label.item()
        ce += math.log(math.fsum(map(math.exp, logits))) - logits[label.item()]
        square += h.square().mean().item()
    assert 0 < right < 60 and metrics["accuracy"] == pytest.approx(100 * right / 60, abs=1e-9) == 100 - metrics["error"]
    assert (metrics["ce"], metrics["feature_rms"]) == pytest.approx((ce / 60, math.sqrt(square / 60)), rel=1e-5)


def test_evaluation_leaves_no_trace_and_does_not_depend_on_its_batch_size() -> None:
    made = train(f"method={COMPOSED}", "dataset.valid=0.2", epochs=1)
    assert made.steps_per_epoch == 4 and made.evaluate("valid")["ce"] == made.rows[0]["valid/ce"] != made.rows[0]["test/ce"]
    before = copy.deepcopy(made.state())
    first = made.evaluate("test")
    assert made.evaluate("train") != first
    for size in (1, 7, 1000):
        made.cfg.evaluate.batch_size = size
        assert made.evaluate("test") == pytest.approx(first, rel=1e-6, abs=1e-6)
    assert same(before, made.state()) and all(module.training for module in made.net.modules())


@pytest.mark.parametrize(("method", "read"), [("per", (3, 0)), ("vcl", (0, 3)), ("itdm_c", (0, 0))])
def test_memory_holds_only_the_activations_that_are_read(method: str, read: tuple[int, int]) -> None:
    """In training those that a method reads; in evaluation none, which for a deep network and a thousand images would be gigabytes."""
    made = trainer(f"method={method}", "probe=covariate_shift")
    held: list[tuple[int, int]] = []
    made.net.classifier.register_forward_hook(lambda *_: held.append((len(made.activations), len(made.preactivations))))
    samples = next(iter(made.samples()))
    made.take_step(*samples)
    made.evaluate("test")
    assert held == [read] * len(samples) + [(0, 0)]
    batch = next(iter(made.bundle.batches("test", 5)))
    assert len(made.forward(batch, preactivations=True).preactivations) == 3
    for use in (list, len, lambda taps: taps[-1]):
        with pytest.raises(AttributeError, match="`activations = True`"):
            use(made.forward(batch).activations)


def test_deterministic_kernels_of_matrix_products_and_recurrent_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The value that cuBLAS and cuDNN's recurrent layers have in common (torch's notes on randomness, and on nn.LSTM)."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on: None)
    trainer("deterministic=true")
    assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":16:8"


def test_rows_stand_where_the_evaluations_are() -> None:
    made = train("evaluate.every=2", "evaluate.dense=3")
    assert [(row["step"], row["epoch"]) for row in made.rows] == [(5, 1.0), (7, pytest.approx(1.4)), (9, pytest.approx(1.8)), (10, 2.0)]
    assert [row["step"] for row in train("evaluate.every=2", "evaluate.dense=0").rows] == [5, 10]


def test_divergence_names_epoch_and_step() -> None:
    with pytest.raises(Diverged, match=r"^(train|test)/ce is (nan|inf) at epoch [12] \(step (5|10)\)$"):
        train("method=itdm_c", "norm=none", "optim.lr=1e6")
