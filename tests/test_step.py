"""The training step: its arithmetic; the optimizer's groups and clipping, against torch's; and that the compiler changes nothing."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from trainers import COMPOSED, config, data_home, parameters, train, trainer, watch

from data.bundle import Batch
from experiments.optim import clip
from experiments.train import make_trainer

__all__ = ["data_home"]  # a fixture
COLOUR = ["dataset=cifar10", "dataset.source=embedded", "++dataset.size=32", "norm=none", "batch_size=10"]
UNITIZATION = ["experiment=unitization_resnet110", "model=preact_resnet20", *COLOUR[:2], "++dataset.size=16", "norm=unitization"]


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


def test_cross_entropy_of_the_first_batch_does_not_feel_the_second() -> None:
    made, net = trainer("method=itdm_j"), trainer().net  # the same weights
    (batch, second), (_, third) = (made.take(*samples) for samples in list(made.samples())[:2])
    logits = net(batch.x)
    wanted = torch.autograd.grad((logits.logsumexp(1) - logits.gather(1, batch.y[:, None])[:, 0]).mean(), list(net.parameters()))
    for other in (second, third):
        gradients = torch.autograd.grad(made.loss(batch, other)[1]["ce"], list(made.net.parameters()))
        torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-6)


def test_loss_is_the_sum_of_its_terms_and_rows_hold_their_means() -> None:
    made, losses = trainer(f"method={COMPOSED}"), []
    loss = made.loss

    def recorded(*batches: Batch | None) -> tuple[Tensor, dict[str, Tensor]]:
        total, terms = loss(*batches)
        losses.append({name: term.item() for name, term in terms.items()})
        assert total.item() == pytest.approx(sum(losses[-1].values()), rel=1e-6)
        return total, terms

    made.loss = recorded  # type: ignore[method-assign]
    for _ in range(2):
        made.train_epoch()
    for row, of_epoch in zip(made.rows, (losses[:5], losses[5:]), strict=True):
        for name in ("ce", "itdm_c"):
            assert row[f"train/{name}"] == pytest.approx(sum(terms[name] for terms in of_epoch) / 5, rel=1e-5)


@pytest.mark.parametrize(("norm", "wanted"), [("bn", 0.857600), ("none", 2.221142)])
def test_first_epoch_has_the_numbers_it_always_had(norm: str, wanted: float) -> None:
    made = make_trainer(config(f"norm={norm}", "batch_size=50", "profile.train=null", "profile.test=100"))
    made.net.double()  # so that another CPU's rounding does not show; in float32, BN moves it in the third digit
    forward = made.forward
    made.forward = lambda batch, *taps: forward(replace(batch, x=batch.x.double()), *taps)  # type: ignore[method-assign]
    made.train_epoch()
    assert made.rows[0]["train/ce"] == pytest.approx(wanted, abs=1e-4)


# The optimizer

PER = ["experiment=per_cnn11", *COLOUR, "model=cnn11", "model.activation=relu", "method=vcl"]
FIXUP = ["experiment=per_fixup", *COLOUR, "model=resnet56"]


@pytest.mark.parametrize(
    ("words", "small", "counts", "decays", "rates"),
    [
        (PER, {"bias"}, (21, 21), (1e-4, 0), (0.05, 0.005)),  # biases have a tenth of the rate; VCL's beta decays as weights do
        (FIXUP, {"bias", "scale"}, (56, 138), (1e-4, 1e-4), (0.1, 0.01)),  # scalars, and the classifier's bias too
        (UNITIZATION, {"bias", "weight", "alpha"}, (22, 20 * 3 + 22), (1e-3, 0), (0.05, 0.05)),  # kernels alone decay
    ],
)
def test_groups(words: list[str], small: set[str], counts: tuple[int, ...], decays: object, rates: tuple[float, ...]) -> None:
    made = trainer(*words)
    names = {id(p): name for module in (made.net, *made.regularizers.values()) for name, p in module.named_parameters()}
    groups = made.optimizer.param_groups
    assert {names[id(p)].rpartition(".")[2] for p in groups[1]["params"]} == small
    assert all(p.dim() < 2 for p in groups[1]["params"]) and tuple(len(group["params"]) for group in groups) == counts
    assert tuple(group["weight_decay"] for group in groups) == decays
    assert [float(group["lr"]) for group in groups] == pytest.approx(rates) and all(group["momentum"] == 0.9 for group in groups)


def test_one_group_where_nothing_differs() -> None:
    for words, decay in (([], 0), (["optim.weight_decay=0.1"], 0.1), (["optim.decay=weights"], 0)):
        (group,) = trainer(*words).optimizer.param_groups
        assert group["weight_decay"] == decay


def gradients() -> list[nn.Parameter]:
    rng = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,), (), (2, 2, 3, 3))]
    for scale, parameter in zip((0.1, 10, 3, 1), parameters, strict=True):
        parameter.grad = scale * torch.randn(parameter.shape, generator=rng)
    return [*parameters, nn.Parameter(torch.zeros(2))]  # the last has no gradient


@pytest.mark.parametrize("each", [False, True])
def test_clipping_is_torchs(each: bool) -> None:
    for most in (0.25, 1, 100):
        ours, theirs = gradients(), gradients()
        clip(ours, most, each=each)
        for group in [[p] for p in theirs] if each else [theirs]:
            nn.utils.clip_grad_norm_(group, most)
        torch.testing.assert_close([p.grad for p in ours[:-1]], [p.grad for p in theirs[:-1]], rtol=1e-6, atol=0)
        assert ours[-1].grad is None


@pytest.mark.parametrize("each", [False, True])
def test_a_step_clips_what_the_optimizer_sees(each: bool) -> None:
    made = trainer("norm=none", "optim.clip=1e-3", f"optim.clip_each={str(each).lower()}")
    seen: list[Tensor] = []
    step = made.optimizer.step
    made.optimizer.step = lambda: (seen.extend(p.grad.norm() for p in made.net.parameters()), step())[1]  # type: ignore
    made.take_step(*next(made.samples()))
    total = torch.stack(seen).norm()
    assert all(norm <= 1.001e-3 for norm in seen)
    assert (total > 1.5e-3) if each else (total == pytest.approx(1e-3, rel=1e-3))


# The compiler


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_is_eager_within_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full and partial batches, two forwards of a step, evaluation; taps are seen by methods all the same."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    words = ["method=itdm_c", "batch_size=30", "norm=none", "optim.lr=0.01"]
    eager, compiled = train(*words, epochs=1), trainer(*words, "compile=true")
    taps: list[int] = []
    method = compiled.regularizers["itdm_c"]
    compiled.recorded, penalty = (True, False), method.penalty  # as for a method that reads activations
    monkeypatch.setattr(method, "penalty", lambda out, other: taps.append(len(out.activations)) or penalty(out, other))
    compiled.train_epoch()
    assert compiled.compiled is not compiled.net.features and taps == [3] * 4
    assert eager.net.state_dict().keys() == compiled.net.state_dict().keys()
    assert compiled.rows[0] == pytest.approx(eager.rows[0], rel=1e-4)
    for name, value in parameters(eager).items():
        torch.testing.assert_close(compiled.net.get_parameter(name).detach(), value, rtol=1e-3, atol=1e-5)
