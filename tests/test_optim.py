"""The optimizer's groups, and clipping, against torch's own."""

from __future__ import annotations

import pytest
import torch
from test_trainer import data_home, trainer
from torch import Tensor, nn

from experiments.optim import clip

__all__ = ["data_home"]  # a fixture
COLOUR = ["dataset=cifar10", "dataset.source=embedded", "norm=none", "batch_size=10"]


def names(made: object, group: int) -> set[str]:
    every = {id(p): name for module in (made.net, *made.regularizers.values()) for name, p in module.named_parameters()}  # type: ignore[attr-defined]
    return {every[id(p)] for p in made.optimizer.param_groups[group]["params"]}  # type: ignore[attr-defined]


def test_one_group_where_nothing_differs() -> None:
    made = trainer("optim.weight_decay=0.1")
    assert len(made.optimizer.param_groups) == 1 and names(made, 0) == {name for name, _ in made.net.named_parameters()}
    assert len(trainer("optim.decay=weights").optimizer.param_groups) == 1  # nothing decays


def test_groups_of_cnn11() -> None:
    made = trainer("experiment=per_cnn11", *COLOUR, "model=cnn11", "model.activation=relu", "method=vcl")
    weights, small = made.optimizer.param_groups
    assert [len(group["params"]) for group in (weights, small)] == [11 + 10, 11 + 10]  # VCL's beta decays as weights do
    assert all(name.rpartition(".")[2] == "bias" for name in names(made, 1))
    assert sum(p.numel() for p in weights["params"]) == 1_641_938 - 2_554 + 350_460
    assert [(float(group["lr"]), group["weight_decay"], group["nesterov"], group["momentum"]) for group in (weights, small)] == [
        (pytest.approx(0.05), 1e-4, True, 0.9),
        (pytest.approx(0.005), 0.0, True, 0.9),
    ]


def test_groups_of_fixup() -> None:
    made = trainer("experiment=per_fixup", *COLOUR, "model=resnet56")
    weights, small = made.optimizer.param_groups
    assert len(small["params"]) == 137 + 1  # the classifier's bias too
    assert all(p.dim() >= 2 for p in weights["params"]) and sum(p.numel() for p in weights["params"]) == 848_954 - 10
    assert (weights["weight_decay"], small["weight_decay"]) == (1e-4, 1e-4)
    assert (float(weights["lr"]), float(small["lr"])) == (pytest.approx(0.1), pytest.approx(0.01))


def test_kernels_alone_decay() -> None:
    """In Unitization's recipe: not biases, nor the norm layers' weights, nor alpha."""
    made = trainer("experiment=unitization_resnet110", "model=preact_resnet20", *COLOUR[:2], "++dataset.size=16", "norm=unitization")
    kernels, others = made.optimizer.param_groups
    assert (kernels["weight_decay"], others["weight_decay"]) == (1e-3, 0)
    ends = {name.rpartition(".")[2] for name in names(made, 1)}
    assert ends == {"bias", "weight", "alpha"} and len(others["params"]) == 20 * 3 + 22
    assert all(p.dim() >= 2 for p in kernels["params"]) and len(kernels["params"]) == 22
    assert all(p.dim() == 1 for p in others["params"]) and float(kernels["lr"]) == float(others["lr"]) == pytest.approx(0.05)


def gradients(seed: int) -> list[nn.Parameter]:
    rng = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,), (), (2, 2, 3, 3))]
    for scale, parameter in zip((0.1, 10, 3, 1), parameters, strict=True):
        parameter.grad = scale * torch.randn(parameter.shape, generator=rng)
    return [*parameters, nn.Parameter(torch.zeros(2))]  # one without a gradient


@pytest.mark.parametrize("most", [0.25, 1, 100])
def test_clipping_is_torchs(most: float) -> None:
    ours, theirs = gradients(0), gradients(0)
    clip(ours, most, each=False)
    nn.utils.clip_grad_norm_(theirs, most)
    compare(ours, theirs)
    clip(ours := gradients(1), most, each=True)
    for parameter in (theirs := gradients(1)):
        nn.utils.clip_grad_norm_([parameter], most)
    compare(ours, theirs)
    norms = [float(p.grad.norm()) for p in ours if p.grad is not None]
    assert max(norms) <= most * (1 + 1e-6) and min(norms) < 0.97 * most


def compare(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("each", [False, True])
def test_a_step_clips_what_the_optimizer_sees(each: bool) -> None:
    made = trainer("norm=none", "optim.clip=1e-3", f"optim.clip_each={str(each).lower()}")
    seen: list[Tensor] = []
    step = made.optimizer.step
    made.optimizer.step = lambda: (seen.extend(p.grad.norm() for p in made.net.parameters() if p.grad is not None), step())[1]  # type: ignore
    made.train_step(*made.take(*next(made.samples())))
    total = torch.stack(seen).norm()
    assert all(norm <= 1.001e-3 for norm in seen)
    assert (total > 1.5e-3) if each else (total == pytest.approx(1e-3, rel=1e-3))
