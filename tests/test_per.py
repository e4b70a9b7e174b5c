"""PER, L1 and L2 as edits of the backward pass, and VCL: each against its formula, in float64 and by oracles of their own."""

from __future__ import annotations

import gc
import math
import weakref

import numpy as np
import pytest
import torch
from scipy import integrate, special
from test_regularizers import made
from torch import Generator, Tensor, nn
from trainers import data_home, trainer

from data.bundle import Batch
from regularizers.activation import ActivationPenalty, Lp
from regularizers.base import Pass
from regularizers.per import PER
from regularizers.projection import directions, kernel
from regularizers.vcl import VCL

__all__ = ["data_home"]  # a fixture
C0 = math.sqrt(2 / math.pi)


def passed(*activations: Tensor, pre: tuple[Tensor, ...] = ()) -> Pass:
    y = torch.zeros(len((*activations, *pre)[0]), dtype=torch.long)
    return Pass(Batch(y, y, y), y.float(), y[:, None].float(), activations, pre)


def edited(method: ActivationPenalty, h: Tensor, incoming: Tensor, seed: int = 100) -> Tensor:
    """What the method makes of a gradient `incoming` at the activation h."""
    if not hasattr(method, "rng"):
        method.rng = Generator().manual_seed(seed)
    leaf = h.detach().requires_grad_()
    flowing = leaf.clone(memory_format=torch.preserve_format)
    method.penalty(passed(flowing), None)
    flowing.backward(incoming)
    assert leaf.grad is not None
    return leaf.grad


def drawn(d: int, slices: int, seed: int = 100, kind: str = "gaussian") -> Tensor:
    """The directions that a method with this seed draws first, of length 1: [slices, d] in float64."""
    blocks = directions(kind, slices, d, Generator().manual_seed(seed))
    return torch.cat([v.double() / v.double().norm(dim=1, keepdim=True) for v, _ in blocks])


def sample(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("reduction", "kind", "n", "d", "slices"),
    [("sum", "gaussian", 5, 30, 70), ("mean", "toeplitz", 4, 200, 256), ("mean", "gaussian", 3, 4, 1), ("sum", "toeplitz", 5, 30, 70)],
)
def test_edit_is_the_gradient_of_the_printed_loss(reduction: str, kind: str, n: int, d: int, slices: int) -> None:
    """Autograd in float64 of weight * sum_i (1/s) sum_k l(<h_i, theta_k>), eq. 5, which is the sum of eq. 6."""
    h, incoming = 2 * sample(n, d), sample(n, d, seed=1)
    change = edited(PER(0.3, slices=slices, directions=kind, batch_reduction=reduction), h, incoming) - incoming
    theta = drawn(d, slices, kind=kind)
    leaf = h.double().requires_grad_()
    t = leaf @ theta.T
    loss = 0.3 * (t * torch.erf(t / 2**0.5) + C0 * torch.exp(-t * t / 2)).sum() / slices / (n if reduction == "mean" else 1)
    (gradient,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(change.double(), gradient, rtol=1e-3, atol=1e-6)
    assert gradient.norm() > 1e-3


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_positions_are_units_of_their_image_or_samples(layout: torch.memory_format) -> None:
    """In every layout of memory; "samples" has as many samples as there are positions, so H W times the pull under "sum"."""
    h, incoming = sample(3, 6, 4, 5).contiguous(memory_format=layout), sample(3, 6, 4, 5, seed=1)
    for arriving in (incoming, incoming.contiguous(memory_format=torch.channels_last)):
        for method in (PER(0.1, mode="analytic"), Lp(0.1, 1), Lp(0.1, 2)):
            flat = edited(method, h.flatten(1), incoming.flatten(1))
            torch.testing.assert_close(edited(method, h, arriving), flat.view(h.shape))
    for reduction, n in (("sum", 1), ("mean", 3 * 4 * 5)):
        change = edited(PER(0.1, mode="analytic", spatial="samples", batch_reduction=reduction), h, incoming) - incoming
        rows = h.permute(0, 2, 3, 1).reshape(-1, 6)
        wanted = edited(PER(0.1 / n, mode="analytic"), rows, torch.zeros(60, 6)).view(3, 4, 5, 6).permute(0, 3, 1, 2)
        torch.testing.assert_close(change, wanted, rtol=1e-4, atol=1e-6)
    units = edited(PER(0.1, slices=64), h, torch.zeros_like(h))
    assert units.shape == h.shape and units.is_contiguous(memory_format=layout)


def test_directions_are_new_for_each_tap_and_step_and_shared_by_the_batch() -> None:
    method = PER(1, slices=16)
    h = sample(1, 50).expand(4, 50).contiguous()
    first, second = (edited(method, h, torch.zeros(4, 50)) for _ in range(2))
    torch.testing.assert_close(first, first[:1].expand(4, 50))
    assert (first - second).norm() > 0.1 * first.norm()
    leaf = h.clone().requires_grad_()
    taps = leaf * 1, leaf * 1
    method.penalty(passed(*taps), None)
    assert not torch.equal(*torch.autograd.grad((taps[0] + taps[1]).sum(), taps))


def test_the_graph_holds_nothing_more_and_hooks_do_not_keep_it_alive() -> None:
    """A hook that held its own activation would keep the whole graph of each step."""
    method, saved = PER(0.1, mode="analytic"), []
    gc.disable()
    try:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
            h = torch.nn.functional.elu(sample(4, 300).requires_grad_())
            count, before, kept = len(saved), h.detach().clone(), weakref.ref(h)
            assert method.penalty(passed(h), None) is None
        assert len(saved) == count and torch.equal(h, before)
        h.sum().backward()
        del h
        saved.clear()
        assert kept() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(("d", "r", "error"), [(64, 0.3, 0.02), (64, 1.0, 0.2), (650, 2.0, 0.5), (4160, 1.0, 0.2)])
def test_analytic_is_the_expectation(d: int, r: float, error: float) -> None:
    """Loss and gradient against integrals over the sphere, in which the cosine between h and theta is all that counts."""
    h = sample(3, d)
    h = r * d**0.5 * h / h.norm(dim=1, keepdim=True)
    method = PER(1, mode="analytic")
    gradient = edited(method, h, torch.zeros(3, d))
    length = float(h[0].double().norm())
    angle = np.linspace(0, min(math.pi / 2, 12 / d**0.5), 20_001)
    cosine, density = np.sin(angle), np.cos(angle) ** (d - 2)
    t = length * cosine
    losses, pulls = t * special.erf(t / 2**0.5) + C0 * np.exp(-t * t / 2), special.erf(t / 2**0.5) * cosine  # the pull along h
    mass, total, slope = (integrate.simpson(values * density, x=angle) for values in (1, losses, pulls))
    assert method.logged()["loss"].item() == pytest.approx(total / mass, rel=0.2 / d)
    torch.testing.assert_close(gradient.double(), slope / mass * h.double() / length, rtol=error / d, atol=0)


def test_lp_gradients() -> None:
    h, incoming = sample(4, 3, 5, 5), sample(4, 3, 5, 5, seed=1)
    h[0, 0, 0, 0] = 0
    for p, wanted in ((1, h.sign()), (2, 2 * h)):
        torch.testing.assert_close(edited(Lp(0.01, p), h, incoming), incoming + 0.01 * wanted, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(edited(Lp(0.01, p, "mean"), h, incoming), incoming + 0.0025 * wanted, rtol=1e-6, atol=1e-7)


def test_what_is_logged() -> None:
    h, incoming = sample(4, 50), sample(4, 50, seed=1)
    theta = drawn(50, 256)
    t = h.double() @ theta.T
    for method, loss, pull in (
        (Lp(0.5, 1), h.abs().sum(1).mean(), h.sign()),
        (Lp(0.5, 2), h.square().sum(1).mean(), 2 * h),
        (PER(0.5), kernel(t).mean(), torch.erf(t / 2**0.5) @ theta / 256),
    ):
        edited(method, h, incoming)
        logged = method.logged()
        assert list(logged) == ["loss", "rms", "share"] and all(value.shape == (1,) for value in logged.values())
        assert logged["loss"].item() == pytest.approx(float(loss), rel=1e-5)
        assert logged["rms"].item() == pytest.approx(float(h.square().mean().sqrt()), rel=1e-5)
        added = float(0.5 * pull.norm())
        assert logged["share"].item() == pytest.approx(added / (added + float(incoming.norm())), rel=1e-5)
        edited(method, h, torch.zeros_like(h))  # Fixup starts without any gradient
        assert method.logged()["share"].item() == 1
    edited(method := Lp(0.5, 2), torch.zeros(4, 50), torch.zeros(4, 50))
    assert method.logged()["share"].item() == 0
    taps = h.requires_grad_() * 2, h * 3
    method.penalty(passed(*taps), None)
    taps[0].sum().backward()
    assert [value > 0 for value in method.logged()["loss"].tolist()] == [True, False]  # no gradient arrives at the second tap


def test_rows_have_a_value_for_each_tap() -> None:
    run = trainer("method=[per,vcl]", "method.per.weight=1e-3")
    run.train_epoch()
    row = run.rows[0]
    names = [f"train/per/{what}/0{i}" for what in ("loss", "rms", "share") for i in (1, 2, 3)]
    assert [name for name in row if name.startswith("train/per/")] == names
    assert all(row[f"train/per/loss/0{i}"] > C0 and row[f"train/per/share/0{i}"] > 0 for i in (1, 2, 3)) and row["train/vcl"] > 0


def test_vcl_s_gradient_reaches_beta_and_the_first_samples_alone() -> None:
    """Against autograd in float64 through the loss as it is written, torch's variance and all."""
    leaves = [sample(25, 3, 4, 4).requires_grad_(), sample(25, 6, seed=4).requires_grad_()]
    incoming = [sample(25, 3, 4, 4, seed=2), sample(25, 6, seed=3)]
    pre = tuple(leaf * 2 for leaf in leaves)
    method = VCL(0.7)
    method.setup(passed(pre=pre))
    assert [tuple(beta.shape) for beta in method.beta] == [(3, 4, 4), (6,)]
    for beta in method.beta:
        torch.nn.init.uniform_(beta, 0.5, 1.5, generator=Generator().manual_seed(1))
    penalty = method.penalty(passed(pre=pre), None)
    torch.stack([*((z * gradient).sum() for z, gradient in zip(pre, incoming, strict=True)), penalty]).sum().backward()

    plain = [leaf.detach().double().requires_grad_() for leaf in leaves]
    betas = [beta.detach().double().requires_grad_() for beta in method.beta]
    variances = [((2 * leaf[:5]).var(0), (2 * leaf[5:10]).var(0)) for leaf in plain]
    total = 0.7 * sum((1 - a / (b + beta)).square().mean() for (a, b), beta in zip(variances, betas, strict=True))
    assert penalty.item() == pytest.approx(total.item(), rel=1e-6)
    wanted = torch.autograd.grad(total, [*plain, *betas])
    for leaf, arriving, gradient in zip(leaves, incoming, wanted[:2], strict=True):
        torch.testing.assert_close(leaf.grad[:10], (2 * arriving[:10] + gradient[:10]).float(), rtol=1e-4, atol=1e-6)
        assert torch.equal(leaf.grad[10:], 2 * arriving[10:]) and not gradient[10:].any()
    for beta, gradient in zip(method.beta, wanted[2:], strict=True):
        torch.testing.assert_close(beta.grad, gradient.float(), rtol=1e-4, atol=1e-7)


def test_vcl_of_small_batches_and_of_a_beta_below_0() -> None:
    method = VCL(1)
    method.setup(passed(pre=(sample(4, 6),)))
    assert method.penalty(passed(pre=(sample(3, 6),)), None) is None
    z = sample(7, 6).requires_grad_()
    for beta, used in ((1, 1), (-5, 1e-3)):  # the loss explodes where beta reaches 0
        torch.nn.init.constant_(method.beta[0], beta)
        wanted = (1 - z[:3].var(0) / (z[3:6].var(0) + used)).square().mean()
        assert method.penalty(passed(pre=(z,)), None).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_refused_options() -> None:
    for method, options, message in (
        ("per", {"mode": "exact"}, "mode: 'exact' is not known; allowed: slices, analytic"),
        ("per", {"slices": 0}, "slices: 0 is not allowed; it must be at least 1"),
        ("l1", {"batch_reduction": "max"}, "batch_reduction: 'max' is not known; allowed: sum, mean"),
        ("l2", {"p": 3}, "p: 3 is not allowed; allowed: 1, 2"),
        ("vcl", {"samples": 1}, "samples: 1, beta: 1 are not allowed; at least 2 samples, beta above 0"),
    ):
        with pytest.raises(ValueError, match=f"^method.{method}: {message}$"):
            made(method, **options)
    with pytest.raises(ValueError, match=r"^compile: true does not go with method per, which edits the backward pass; allowed: false$"):
        trainer("method=per", "compile=true")


def test_a_whole_step_has_the_gradient_of_float64_autograd() -> None:
    run, plain = trainer("method=per", "method.per.weight=0.01", "method.per.mode=analytic", "norm=none"), trainer("norm=none")
    batch, _ = run.take(*next(run.samples()))
    net = plain.net.double()
    taps: list[Tensor] = []
    for module in filter(lambda module: isinstance(module, nn.ReLU), net.modules()):
        module.register_forward_hook(lambda module, _, out: taps.append(out))
    loss = nn.functional.cross_entropy(net(batch.x.double()), batch.y)
    for h in taps:
        square, d = h.flatten(1).square().sum(1), h[0].numel()
        loss = loss + 0.01 * (C0 * (d + 2) / d * (1 + square / (d + 2)).sqrt()).sum()
    wanted = torch.autograd.grad(loss, list(net.parameters()))
    run.loss(batch, None)[0].backward()
    for parameter, gradient in zip(run.net.parameters(), wanted, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.double(), gradient, rtol=1e-3, atol=1e-5)
