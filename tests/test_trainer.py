"""The trainer: paired runs, exact resume, the evaluation, the schedule, divergence, and what one step costs."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from nets import IMAGE, TEXT, composed, small
from omegaconf import DictConfig, OmegaConf
from test_mmd import Calls
from torch import Tensor

from data.bundle import Batch
from experiments.cli import CONF
from experiments.config import check, options
from experiments.rng import generator
from experiments.train import make_trainer
from experiments.trainer import Diverged, Trainer
from regularizers.base import Pass

SMALL = ["dataset=digits", "model=net2c", "norm=bn", "epochs=2", "batch_size=20", "profile.train=100", "profile.test=60"]
METHODS = [name for name in options("method") if name != "vanilla"]
COMPOSED = composed("net2c")


@pytest.fixture(autouse=True, scope="module")
def data_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing that these tests cache outlives them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("DATA_DIR", str(tmp_path_factory.mktemp("data")))
        yield


def config(*overrides: str) -> DictConfig:
    return copy.deepcopy(checked(*overrides))  # composing takes twenty times as long


@functools.cache
def checked(*overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("config", [*SMALL, "runtime.threads=1", "runtime.device=cpu", *overrides])
    OmegaConf.resolve(cfg)
    check(cfg)
    return cfg


def trainer(*overrides: str) -> Trainer:
    return make_trainer(config(*overrides))


def train(*overrides: str, epochs: int = 2) -> Trainer:
    made = trainer(*overrides)
    for _ in range(epochs):
        made.train_epoch()
    return made


def strength(method: str) -> str | None:
    """The option that is the method's weight, if it has one."""
    node = OmegaConf.load(CONF / "method" / f"{method}.yaml")
    return next((f"method.{method}.{key}" for key in ("weight", "smoothing", "prob") if key in node), None)


def same(one: Any, two: Any) -> bool:
    """Equal bit for bit, however nested."""
    if isinstance(one, Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(value, two[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(same(a, b) for a, b in zip(one, two, strict=True))
    return one == two


def parameters(made: Trainer) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in made.net.named_parameters()}


def buffers(made: Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in made.net.named_buffers()}


def watch(made: Trainer, see: Callable[[Batch, Batch | None], None]) -> Trainer:
    """Show each step's batches, before it is taken."""
    step = made.train_step

    def train_step(batch: Batch, second: Batch | None) -> None:
        see(batch, second)
        step(batch, second)

    made.train_step = train_step  # type: ignore[method-assign]
    return made


# Runs that can be compared


# Every method on one network, and one that adds a term, one that edits the backward pass, on all; on text, all that take it.
WEIGHTED = [("net2c", name) for name in METHODS if strength(name)] + [
    (net, name) for net in IMAGE if net != "net2c" for name in ("itdm_c", "per")
]
WEIGHTED += [(net, name) for net in TEXT for name in ("per", "l1", "l2", "label_smoothing")]


@pytest.mark.parametrize(("model", "method"), WEIGHTED)
def test_weight_zero_is_vanilla_bit_for_bit(model: str, method: str) -> None:
    net = small(model)
    vanilla, zero, plain = train(*net), train(*net, f"method={method}", f"{strength(method)}=0"), train(*net, f"method={method}")
    assert same(parameters(vanilla), parameters(zero)) and same(buffers(vanilla), buffers(zero))
    assert same(vanilla.rows, zero.rows) and len(vanilla.rows) == 2
    assert not same(parameters(vanilla), parameters(plain))


@pytest.mark.parametrize("method", ["itdm_c", "itdm_j"])
def test_second_forward_of_the_baseline_moves_only_buffers(method: str) -> None:
    on = [f"method={method}", f"method.{method}.weight=0", f"method.{method}.baseline_second_forward=true"]
    vanilla, second = train(), train(*on)
    assert same(parameters(vanilla), parameters(second))
    for name, value in buffers(second).items():
        assert not torch.equal(value, buffers(vanilla)[name]), name
    assert [row["train/ce"] for row in vanilla.rows] == [row["train/ce"] for row in second.rows]
    assert all(f"train/{method}" not in row for row in second.rows)
    assert same(train("norm=none").net.state_dict(), train("norm=none", *on).net.state_dict())


def seen(*overrides: str, epochs: int = 2) -> tuple[dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
    """The initial weights, and the first batch of every step."""
    made, batches = trainer(*overrides), []
    start = parameters(made)
    watch(made, lambda batch, second: batches.append((batch.x.clone(), batch.y.clone())))
    for _ in range(epochs):
        made.train_epoch()
    return start, batches


@pytest.mark.parametrize("method", [*METHODS, COMPOSED])
@pytest.mark.parametrize("balanced", ["true", "false"])
def test_methods_of_one_seed_start_alike_and_see_the_same_batches(method: str, balanced: str) -> None:
    start, batches = seen(f"balanced={balanced}")
    other_start, other_batches = seen(f"balanced={balanced}", f"method={method}")
    assert len(batches) == 10
    assert same(start, other_start) and same(batches, other_batches)
    assert not torch.equal(batches[0][0], batches[5][0])  # each epoch has an order of its own


def test_seeds_differ() -> None:
    start, batches = seen("seed=1", epochs=1)
    other_start, other_batches = seen("seed=2", epochs=1)
    assert not any(torch.equal(a[0], b[0]) for a, b in zip(batches, other_batches, strict=True))
    assert not any(torch.equal(value, other_start[name]) for name, value in start.items() if value.dim() > 1)
    draws = [torch.rand(4, generator=generator(seed, name, "cpu")).tolist() for seed in (0, 1, 2) for name in ("data", "second", "init")]
    assert len({tuple(draw) for draw in draws}) == 9


def test_second_batches_are_balanced_too_and_independent() -> None:
    pairs: list[tuple[Batch, Batch]] = []
    made = watch(trainer("method=itdm_c"), lambda batch, second: pairs.append((batch, second)))  # type: ignore[arg-type]
    made.train_epoch()
    assert len(pairs) == 5
    for batch, second in pairs:
        assert torch.bincount(batch.y, minlength=10).tolist() == torch.bincount(second.y, minlength=10).tolist() == [2] * 10
        assert not torch.equal(batch.x, second.x)
    one, two = (torch.cat([pair[side].x for pair in pairs]).flatten(1).sum(1).sort().values for side in (0, 1))
    assert torch.equal(one, two)  # the same training set, each sample once
    vanilla: list[Batch | None] = []
    watch(trainer(), lambda batch, second: vanilla.append(second)).train_epoch()
    assert vanilla == [None] * 5


# The step


def test_vanilla_step_is_the_sgd_of_the_books() -> None:
    # without BN: torch's channels_last BN sums in float32, and its rounding would move the maxima of the pooling
    made = trainer("norm=none", "optim.lr=0.1", "optim.momentum=0.5", "optim.weight_decay=0.01", "schedule=constant")
    net = copy.deepcopy(made.net).double()
    velocity = {name: torch.zeros_like(value) for name, value in net.named_parameters()}

    def step(batch: Batch, _: Batch | None) -> None:
        logits = net(batch.x.double())
        ce = (logits.exp().sum(1).log() - logits[torch.arange(len(batch.y)), batch.y]).mean()
        for (name, value), gradient in zip(net.named_parameters(), torch.autograd.grad(ce, list(net.parameters())), strict=True):
            velocity[name] = 0.5 * velocity[name] + gradient + 0.01 * value.detach()
            value.data -= 0.1 * velocity[name]

    watch(made, step).train_epoch()
    for name, value in net.named_parameters():
        torch.testing.assert_close(made.net.get_parameter(name).double(), value, rtol=1e-4, atol=1e-6)


def test_weight_decay_is_off_by_default() -> None:
    assert [group["weight_decay"] for group in trainer().optimizer.param_groups] == [0]


@pytest.mark.parametrize("model", [*IMAGE, *TEXT])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_lie_in_memory_as_their_weights_do(model: str, precision: str) -> None:
    """torch's fused SGD on a CPU goes through memory: given another layout, it would take a gradient for that of another weight."""
    made = trainer(*small(model), f"method={composed(model)}", f"precision={precision}", "profile.steps=1")
    made.train_epoch()
    for name, value in made.net.named_parameters():
        assert value.grad is not None and value.grad.stride() == value.stride(), name
        assert made.optimizer.state[value]["momentum_buffer"].stride() == value.stride(), name


@pytest.mark.parametrize("method", ["itdm_c", "itdm_j"])
def test_cross_entropy_of_the_first_batch_does_not_feel_the_second(method: str) -> None:
    made = trainer(f"method={method}")
    (batch, second), (_, third) = (made.take(*samples) for samples in list(made.samples())[:2])
    found = []
    for other in (second, third, batch):
        terms = made.loss(batch, other)[1]
        found.append(torch.autograd.grad(terms["ce"], list(made.net.parameters())))
    assert same(found[0], found[1]) and same(found[0], found[2])
    net = copy.deepcopy(trainer().net)  # the same weights, without a second forward
    logits = net(batch.x)
    wanted = torch.autograd.grad((logits.logsumexp(1) - logits.gather(1, batch.y[:, None])[:, 0]).mean(), list(net.parameters()))
    torch.testing.assert_close(found[0], wanted, rtol=1e-4, atol=1e-6)


def test_loss_is_the_sum_of_its_terms_and_rows_hold_their_means() -> None:
    made, losses = trainer(f"method={COMPOSED}"), []
    loss = made.loss

    def recorded(batch: Batch, second: Batch | None) -> tuple[Tensor, dict[str, Tensor]]:
        total, terms = loss(batch, second)
        losses.append((total.item(), {name: term.item() for name, term in terms.items()}))
        return total, terms

    made.loss = recorded  # type: ignore[method-assign]
    for _ in range(2):
        made.train_epoch()
    assert all(total == pytest.approx(sum(terms.values()), rel=1e-6) for total, terms in losses)
    for epoch, row in enumerate(made.rows):
        for name in ("ce", "itdm_c"):
            assert row[f"train/{name}"] == pytest.approx(sum(terms[name] for _, terms in losses[5 * epoch : 5 * epoch + 5]) / 5, rel=1e-5)


@pytest.mark.parametrize(("norm", "wanted"), [("bn", 0.857600), ("none", 2.221142)])
def test_first_epoch_has_the_numbers_it_always_had(norm: str, wanted: float) -> None:
    made = make_trainer(config(f"norm={norm}", "batch_size=50", "profile.train=null", "profile.test=100"))
    made.net.double()  # so that another CPU's rounding does not show; in float32, BN moves it in the third digit
    forward = made.forward
    made.forward = lambda batch, *taps: forward(replace(batch, x=batch.x.double()), *taps)  # type: ignore[method-assign]
    made.train_epoch()
    assert made.rows[0]["train/ce"] == pytest.approx(wanted, abs=1e-4)


# The state


RESUMED = [("net2c", method) for method in ("vanilla", *METHODS, COMPOSED)]
RESUMED += [(net, composed(net)) for net in (*IMAGE, *TEXT) if net != "net2c"]


@pytest.mark.parametrize(("model", "method"), RESUMED)
def test_resume_is_exact(model: str, method: str) -> None:
    size = [] if model == "net2c" else small(model)
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

    one, two = whole.state(), resumed.state()
    assert len(one["rows"]) >= 4 and one["optimizer"]["state"]
    for part in one:
        assert part == "seconds" or same(one[part], two[part]), part
    assert same(train(*overrides, epochs=4).state()["net"], one["net"])  # and saving changed nothing


def test_state_holds_every_generator() -> None:
    made = trainer(f"method={COMPOSED}")
    assert set(made.state()["rngs"]) == {"data", "second", "itdm_c", "label_smoothing"}
    before = made.state()["rngs"]
    made.train_epoch()
    after = made.state()["rngs"]
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["data", "second"]


# The evaluation


@pytest.mark.parametrize("norm", ["bn", "none"])
def test_evaluation_by_hand(norm: str) -> None:
    made = train(f"norm={norm}", "optim.lr=0.2", epochs=1)
    found = made.evaluate("test")
    net = copy.deepcopy(made.net).double().eval()
    right, ce, square, count = 0, 0.0, 0.0, 0
    for image, label in zip(*made.bundle.splits["test"], strict=True):
        h = net.features(made.bundle.prepare(image[None]).double())
        logits = net.classifier(h)[0].tolist()
        right += logits.index(max(logits)) == label.item()
        ce += math.log(math.fsum(map(math.exp, logits))) - logits[label.item()]
        square += h.square().mean().item()
        count += 1
    assert count == 60 and 0 < right < 60
    assert found["accuracy"] == pytest.approx(100 * right / 60, abs=1e-9)
    assert found["error"] == pytest.approx(100 - 100 * right / 60, abs=1e-9)
    assert found["ce"] == pytest.approx(ce / 60, rel=1e-5)
    assert found["feature_rms"] == pytest.approx(math.sqrt(square / 60), rel=1e-5)


def test_evaluation_does_not_depend_on_its_batch_size() -> None:
    rows = [train(f"evaluate.batch_size={size}", epochs=1).rows[0] for size in (1, 7, 60, 1000)]
    for row in rows[1:]:
        assert row == pytest.approx(rows[0], rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("method", ["vanilla", COMPOSED])
def test_evaluation_leaves_no_trace(method: str) -> None:
    made = train(f"method={method}", epochs=1)
    before = copy.deepcopy(made.state())
    first = made.evaluate("test")
    assert made.evaluate("test") == first and made.evaluate("train") != first
    assert same(before, made.state())
    assert all(module.training for module in made.net.modules()) and not made.activations


@pytest.mark.parametrize(("method", "read"), [("vanilla", (0, 0)), ("per", (3, 0)), ("vcl", (0, 3)), ("itdm_c", (0, 0))])
@pytest.mark.parametrize("probe", ["none", "covariate_shift"])
def test_memory_holds_the_activations_that_are_read_alone(method: str, read: tuple[int, int], probe: str) -> None:
    """In training what a method reads; in evaluation none, which for a deep network and a thousand images would be gigabytes."""
    made = trainer(f"method={method}", *([] if probe == "none" else [f"probe={probe}"]))
    held: list[tuple[int, int]] = []
    made.net.classifier.register_forward_hook(lambda *_: held.append((len(made.activations), len(made.preactivations))))
    samples = next(iter(made.samples()))
    made.take_step(*samples)
    assert held == [read] * len(samples)
    held.clear()
    made.evaluate("test")
    assert held == [(0, 0)]
    batch = next(iter(made.bundle.batches("test", 5)))
    assert len(made.forward(batch, preactivations=True).preactivations) == 3
    for read in (list, len, bool, lambda taps: taps[-1]):
        with pytest.raises(AttributeError, match="`activations = True`"):
            read(made.forward(batch).activations)


def test_deterministic_kernels_of_matrix_products_and_recurrent_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one value that cuBLAS and cuDNN's recurrent layers have in common (torch's notes on randomness, and on nn.LSTM)."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on: None)
    trainer("deterministic=true")
    assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":16:8"


def test_rows_stand_where_the_evaluations_are() -> None:
    made = train("evaluate.every=2", "evaluate.dense=3")
    assert [(row["step"], row["epoch"]) for row in made.rows] == [(5, 1.0), (7, pytest.approx(1.4)), (9, pytest.approx(1.8)), (10, 2.0)]
    assert [row["step"] for row in train("evaluate.every=2", "evaluate.dense=0").rows] == [5, 10]


# Divergence


@pytest.mark.parametrize("method", ["vanilla", "itdm_c"])
def test_divergence_is_said_with_epoch_and_step(method: str) -> None:
    made = trainer(f"method={method}", "norm=none", "optim.lr=1e6")
    with pytest.raises(Diverged, match=r"^(train|test)/ce is (nan|inf) at epoch [12] \(step (5|10)\)$"):
        for _ in range(2):
            made.train_epoch()


# What a step costs


def step_calls(*overrides: str) -> tuple[Calls, Calls]:
    """The dispatcher calls of the second training step, and of its optimizer alone."""
    made = trainer(*overrides)
    samples = itertools.chain.from_iterable(made.samples() for _ in itertools.count())
    made.take_step(*next(samples))
    chosen = next(samples)
    with Calls() as whole:
        made.take_step(*chosen)
    with Calls() as update:
        made.optimizer.step()
    return whole, update


@pytest.mark.parametrize(
    ("model", "method"),
    [("net2c", method) for method in METHODS] + [(model, method) for model in IMAGE for method in ("vanilla", "[per,vcl]", COMPOSED)],
)
def test_a_step_does_not_wait_for_the_device_and_has_few_calls(model: str, method: str) -> None:
    whole, update = step_calls(*small(model), f"method={method}", "precision=bf16")
    assert whole.waits == []
    assert "aten.convolution_backward.default" in whole.names and "aten._fused_sgd_.tensor_lr" in whole.names
    assert 0 < len(update.names) <= 6


@pytest.mark.parametrize(("method", "most"), [("vanilla", 190), ("itdm_c", 520)])
@pytest.mark.parametrize("model", ["net5c", "resnet18"])
def test_a_step_has_few_calls(model: str, method: str, most: int) -> None:
    """From the samples' indices on, with crop and flip; what a GPU would have to be told each time (protocol of performance, C8)."""
    whole, _ = step_calls(*small(model), f"method={method}")
    assert 40 < len(whole.kernels) <= most


def test_calls_do_not_grow_with_the_batch() -> None:
    assert len(step_calls("method=itdm_c", "batch_size=20")[0].names) == len(step_calls("method=itdm_c", "batch_size=50")[0].names)


# The compiler


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_is_eager_within_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full and partial batches, two forwards of a step, evaluation; taps are seen by methods all the same."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    words = ["method=itdm_c", "batch_size=30", "norm=none", "optim.lr=0.01"]
    eager, compiled = train(*words, epochs=1), trainer(*words, "compile=true")
    seen: list[int] = []
    method = compiled.regularizers["itdm_c"]
    compiled.recorded, penalty = (True, False), method.penalty  # as for a method that reads activations

    def counted(out: Pass, other: Pass | None) -> Tensor | None:
        seen.append(len(out.activations))
        return penalty(out, other)

    monkeypatch.setattr(method, "penalty", counted)
    compiled.train_epoch()
    assert compiled.compiled is not compiled.net.features and seen == [3] * 4
    assert eager.net.state_dict().keys() == compiled.net.state_dict().keys()
    assert compiled.rows[0] == pytest.approx(eager.rows[0], rel=1e-4)
    for name, value in parameters(eager).items():
        torch.testing.assert_close(compiled.net.get_parameter(name).detach(), value, rtol=1e-3, atol=1e-5)
