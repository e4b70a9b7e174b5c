"""PER, L1 and L2 as edits of the backward pass, and VCL: each against its formula, in float64 and by oracles of their own."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest
import torch
from scipy import integrate
from test_regularizers import made
from test_trainer import data_home, trainer
from torch import Generator, Tensor, nn

from data.bundle import Batch
from regularizers.activation import ActivationPenalty, Lp
from regularizers.base import Pass
from regularizers.per import PER
from regularizers.projection import directions, kernel
from regularizers.vcl import VCL, vcl

__all__ = ["data_home"]  # a fixture
C0 = math.sqrt(2 / math.pi)


def passed(*activations: Tensor, pre: tuple[Tensor, ...] = ()) -> Pass:
    y = torch.zeros(len((*activations, *pre)[0]), dtype=torch.long)
    return Pass(Batch(y, y, y), y.float(), y[:, None].float(), activations, pre)


def edited(method: ActivationPenalty, h: Tensor, incoming: Tensor, seed: int = 100) -> Tensor:
    """What the method makes of a gradient `incoming` at the activation h."""
    if method.active and not hasattr(method, "rng"):
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


# PER: the gradient (P2), the directions (P3), the identity (P4)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("kind", ["gaussian", "toeplitz"])
@pytest.mark.parametrize(("n", "d", "slices"), [(5, 30, 70), (3, 4, 1), (4, 200, 256)])
def test_edit_is_the_gradient_of_the_printed_loss(reduction: str, kind: str, n: int, d: int, slices: int) -> None:
    """Autograd of weight * sum_i (1/s) sum_k l(<h_i, theta_k>), eq. 5, and the sum of eq. 6, both in float64."""
    h, incoming = 2 * sample(n, d), sample(n, d, seed=1)
    found = edited(PER(0.3, slices=slices, directions=kind, batch_reduction=reduction), h, incoming)
    theta = drawn(d, slices, kind=kind)
    leaf = h.double().requires_grad_()
    t = leaf @ theta.T
    loss = 0.3 * (t * torch.erf(t / 2**0.5) + C0 * torch.exp(-t * t / 2)).sum() / slices / (n if reduction == "mean" else 1)
    (gradient,) = torch.autograd.grad(loss, leaf)
    printed = sum(torch.erf(h.double() @ one / 2**0.5)[:, None] * one for one in theta) / slices
    torch.testing.assert_close(gradient, 0.3 * printed / (n if reduction == "mean" else 1), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close((found - incoming).double(), gradient, rtol=1e-3, atol=1e-6)
    assert gradient.norm() > 1e-3


def test_gradcheck_of_the_kernel() -> None:
    assert torch.autograd.gradcheck(kernel, torch.linspace(-4, 4, 9, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_positions_are_units_of_their_image_or_samples(layout: torch.memory_format) -> None:
    """In every layout of memory; "samples" has as many samples as there are positions, so H W times the pull under "sum"."""
    h, incoming = sample(3, 6, 4, 5).contiguous(memory_format=layout), sample(3, 6, 4, 5, seed=1).contiguous(memory_format=layout)
    for method in (PER(0.1, mode="analytic"), Lp(0.1, 1), Lp(0.1, 2)):
        flat = edited(method, h.flatten(1), incoming.flatten(1))
        torch.testing.assert_close(edited(method, h, incoming), flat.view(h.shape))
    for reduction, n in (("sum", 1), ("mean", 3 * 4 * 5)):
        positions = edited(PER(0.1, mode="analytic", spatial="samples", batch_reduction=reduction), h, incoming) - incoming
        each = h.permute(0, 2, 3, 1).reshape(-1, 6)
        wanted = edited(PER(0.1 / n, mode="analytic"), each, torch.zeros(60, 6)).view(3, 4, 5, 6).permute(0, 3, 1, 2)
        torch.testing.assert_close(positions, wanted, rtol=1e-4, atol=1e-6)
    units = edited(PER(0.1, slices=64), h, torch.zeros_like(h))
    assert units.shape == h.shape and units.is_contiguous(memory_format=layout)
    torch.testing.assert_close(  # a gradient that lies otherwise in memory
        edited(Lp(0.1, 1), h, incoming.contiguous()), edited(Lp(0.1, 1), h, incoming.contiguous(memory_format=torch.channels_last))
    )


@pytest.mark.parametrize("kind", ["gaussian", "toeplitz"])
def test_directions_are_new_for_each_tap_and_step_and_shared_by_the_batch(kind: str) -> None:
    method = PER(1, slices=16, directions=kind)
    h = sample(1, 50).expand(4, 50).contiguous()
    first, second = (edited(method, h, torch.zeros(4, 50)) for _ in range(2))
    torch.testing.assert_close(first, first[:1].expand(4, 50))
    assert (first - second).norm() > 0.1 * first.norm()
    leaf = h.clone().requires_grad_()
    one, two = leaf * 1, leaf * 1
    method.penalty(passed(one, two), None)
    gradients = torch.autograd.grad((one + two).sum(), (one, two))
    assert not torch.equal(*gradients)


@pytest.mark.parametrize("mode", ["slices", "analytic"])
def test_forward_is_untouched_and_nothing_is_kept(mode: str) -> None:
    saved: list[Tensor] = []
    made = PER(0.1, mode=mode)
    made.rng = Generator()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
        leaf = sample(4, 300).requires_grad_()
        h = torch.nn.functional.elu(leaf)
        count, before = len(saved), h.detach().clone()
        assert made.penalty(passed(h), None) is None
    assert len(saved) == count and torch.equal(h, before)


def test_per_makes_its_hooks_forget_the_graph() -> None:
    """A hook that held its own activation would keep each step's whole graph alive."""
    made = PER(0.1, mode="analytic")
    leaf = sample(4, 30).requires_grad_()
    gc.disable()
    try:
        h = leaf * 2
        kept = weakref.ref(h)
        made.penalty(passed(h), None)
        h.sum().backward()
        del h
        assert kept() is None
    finally:
        gc.enable()


# PER: its expectation (P6), its noise (P9), no coupling (P12)


@pytest.mark.parametrize("d", [64, 650, 4160])
@pytest.mark.parametrize("r", [0.01, 0.3, 1.0, 2.0])
def test_analytic_is_the_expectation(d: int, r: float) -> None:
    """Loss and gradient against integrals over the sphere, in which the cosine between h and theta is all that counts."""
    h = sample(3, d)
    h = r * d**0.5 * h / h.norm(dim=1, keepdim=True)
    method = PER(1, mode="analytic")
    found = edited(method, h, torch.zeros(3, d))
    length = float(h[0].double().norm())

    def density(angle: float) -> float:  # the cosine is sin(angle), with its peak at 0
        return math.cos(angle) ** (d - 2)

    def loss(angle: float) -> float:
        t = length * math.sin(angle)
        return (t * math.erf(t / 2**0.5) + C0 * math.exp(-t * t / 2)) * density(angle)

    def pull(angle: float) -> float:  # along h
        return math.erf(length * math.sin(angle) / 2**0.5) * math.sin(angle) * density(angle)

    width = min(math.pi / 2, 12 / d**0.5)
    mass, total, slope = (integrate.quad(part, 0, width, epsabs=0, epsrel=1e-11)[0] for part in (density, loss, pull))
    assert method.logged()["loss"].item() == pytest.approx(total / mass, rel=0.2 / d)
    torch.testing.assert_close(found.double(), slope / mass * h.double() / length, rtol=0.5 / d, atol=0)


@pytest.mark.parametrize("kind", ["gaussian", "toeplitz"])
def test_slices_average_to_the_analytic_gradient(kind: str) -> None:
    """Relative error falling as 1 / sqrt(draws); the same for both kinds of directions, for an activation that is all positive too."""
    d, draws = 100, 300
    h = torch.stack([sample(d), sample(d, seed=1).abs(), torch.ones(d), 10 * torch.eye(d)[7]])
    exact = edited(PER(1, mode="analytic"), h, torch.zeros(4, d))
    method = PER(1, slices=64, directions=kind)
    found = torch.stack([edited(method, h, torch.zeros(4, d)) for _ in range(draws)]).double()
    errors = [(found[:count].mean(0) - exact).norm(dim=1) / exact.norm(dim=1) for count in (3, draws)]
    assert (errors[1] < 0.15).all() and (errors[1] < 0.25 * errors[0]).all()
    spread = found.std(0) / draws**0.5
    assert ((found.mean(0) - exact).abs() < 5 * spread + 4e-3 * exact.abs()).all()


@pytest.mark.parametrize(("d", "ratio", "cosine"), [(650, 2.0, 0.54), (4160, 4.3, 0.25), (16384, 8.5, 0.13)])
def test_noise_of_256_slices(d: int, ratio: float, cosine: float) -> None:
    """P9: at unit RMS the sampled gradient is longer than its expectation, and mostly noise; <g, h> does not depend on d."""
    h = sample(8, d)
    h = h / h.square().mean(1, keepdim=True).sqrt()
    g = edited(PER(1), h, torch.zeros(8, d))
    exact = edited(PER(1, mode="analytic"), h, torch.zeros(8, d))
    assert float((g.norm(dim=1) / exact.norm(dim=1)).mean()) == pytest.approx(ratio, rel=0.1)
    assert float(torch.cosine_similarity(g, h).mean()) == pytest.approx(cosine, abs=0.04)
    assert float((g * h).sum(1).mean()) == pytest.approx(0.564, rel=0.05)


def test_samples_do_not_couple() -> None:
    h = sample(6, 40)
    for method in (PER(1, slices=32), PER(1, mode="analytic"), Lp(1, 1), Lp(1, 2)):
        method.rng = Generator().manual_seed(3)
        whole = edited(method, h, torch.zeros(6, 40))
        parts = []
        for part in (h[:2], h[2:]):
            method.rng = Generator().manual_seed(3)
            parts.append(edited(method, part, torch.zeros(len(part), 40)))
        torch.testing.assert_close(whole, torch.cat(parts))


def test_a_rotation_of_h_rotates_the_expected_gradient() -> None:
    h, (q, _) = sample(4, 30), torch.linalg.qr(sample(30, 30, seed=5))
    method = PER(1, mode="analytic")
    found, turned = edited(method, h, torch.zeros(4, 30)), edited(method, h @ q, torch.zeros(4, 30))
    torch.testing.assert_close(found @ q, turned, rtol=1e-4, atol=1e-6)


# L1 and L2 (P18)


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
    values = {
        "l1": (Lp(0.5, 1), h.abs().sum(1).mean(), h.sign()),
        "l2": (Lp(0.5, 2), h.square().sum(1).mean(), 2 * h),
        "per": (PER(0.5), kernel(t).mean(), torch.erf(t / 2**0.5) @ theta / 256),
    }
    for method, loss, pull in values.values():
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


def test_rows_have_a_value_for_each_tap() -> None:
    run = trainer("method=[per,vcl]", "method.per.weight=1e-3")
    run.train_epoch()
    row = run.rows[0]
    assert [name for name in row if name.startswith("train/per/")] == [
        f"train/per/{what}/0{i}" for what in ("loss", "rms", "share") for i in (1, 2, 3)
    ]
    assert all(row[f"train/per/loss/0{i}"] > C0 and row[f"train/per/share/0{i}"] > 0 for i in (1, 2, 3)) and row["train/vcl"] > 0


def test_an_activation_without_a_gradient_is_left_alone() -> None:
    method = PER(1, mode="analytic")
    leaf = sample(3, 5).requires_grad_()
    used, unused = leaf * 2, leaf * 3
    method.penalty(passed(used, unused), None)
    used.sum().backward()
    assert method.logged()["loss"][0] > C0 and method.logged()["loss"][1] == 0


def test_bf16_activations_are_pulled_in_float32() -> None:
    h, incoming = sample(4, 300), torch.zeros(4, 300)
    found = edited(PER(1), h.bfloat16(), incoming.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), edited(PER(1), h.bfloat16().float(), incoming), rtol=1e-2, atol=1e-6)


# VCL (P14)


def test_vcl_by_hand() -> None:
    z = sample(12, 3, 4, 4, seed=2).requires_grad_() * 2 + 1
    method = VCL(0.5, samples=5)
    method.setup(passed(pre=(z, z[:, :2])))
    assert [tuple(beta.shape) for beta in method.beta] == [(3, 4, 4), (2, 4, 4)]
    with torch.no_grad():
        for beta in method.beta:
            beta.copy_(torch.rand(beta.shape, generator=Generator().manual_seed(1)) + 0.5)
    total = 0.0
    for layer, beta in zip((z, z[:, :2]), method.beta, strict=True):
        terms = []
        for c, y, x in torch.cartesian_prod(*map(torch.arange, layer.shape[1:])).tolist():
            values = layer[:, c, y, x].double().tolist()
            a, b = (sum((v - sum(part) / 5) ** 2 for v in part) / 4 for part in (values[:5], values[5:10]))
            terms.append((1 - a / (b + beta[c, y, x].item())) ** 2)
        total += 0.5 * sum(terms) / len(terms)
    found = method.penalty(passed(pre=(z, z[:, :2])), None)
    assert found is not None and found.item() == pytest.approx(total, rel=1e-5)


def test_vcl_s_special_cases() -> None:
    a, b, zero = sample(5, 7).double(), sample(5, 7, seed=1).double(), torch.zeros(7)
    least = 1e-3
    assert vcl(a, a, zero).item() == pytest.approx(((least / (a.var(0) + least)) ** 2).mean().item(), rel=1e-6)
    assert vcl(1000 * a, 1000 * b, zero).item() == pytest.approx(vcl(30 * a, 30 * b, zero).item(), rel=1e-2)  # scale does not matter
    assert vcl(a, a[:1].expand(5, 7), zero + 1).item() == pytest.approx((1 - a.var(0)).square().mean().item(), rel=1e-9)
    assert torch.equal(vcl(a, b, zero - 5), vcl(a, b, zero + least))  # beta cannot cross 0


def test_vcl_s_gradient_reaches_beta_and_the_first_samples_alone() -> None:
    """Against autograd in float64 through the loss as it is written, torch's variance and all."""
    leaves = [sample(25, 3, 4, 4).requires_grad_(), sample(25, 6, seed=4).requires_grad_()]
    incoming = [sample(25, 3, 4, 4, seed=2), sample(25, 6, seed=3)]
    pre = tuple(leaf * 2 for leaf in leaves)
    method = VCL(0.7)
    method.setup(passed(pre=pre))
    with torch.no_grad():
        for beta in method.beta:
            beta.copy_(torch.rand(beta.shape, generator=Generator().manual_seed(1)) + 0.5)
    penalty = method.penalty(passed(pre=pre), None)
    assert penalty is not None
    rest = [(z * one).sum() for z, one in zip(pre, incoming, strict=True)]
    torch.stack([*rest, penalty]).sum().backward()

    plain = [leaf.detach().double().requires_grad_() for leaf in leaves]
    betas = [beta.detach().double().requires_grad_() for beta in method.beta]
    layers = []
    for z, beta in zip((2 * leaf for leaf in plain), betas, strict=True):
        layers.append((1 - z[:5].var(0) / (z[5:10].var(0) + beta)).square().mean())
    total = 0.7 * sum(layers)
    assert penalty.item() == pytest.approx(total.item(), rel=1e-6)
    wanted = torch.autograd.grad(total, [*plain, *betas])
    for leaf, one, gradient in zip(leaves, incoming, wanted[:2], strict=True):
        assert leaf.grad is not None and gradient[:10].flatten(1).any(1).all() and not gradient[10:].any()
        torch.testing.assert_close(leaf.grad[:10], (2 * one[:10] + gradient[:10]).float(), rtol=1e-4, atol=1e-6)
        assert torch.equal(leaf.grad[10:], 2 * one[10:])
    for beta, gradient in zip(method.beta, wanted[2:], strict=True):
        assert beta.grad is not None and beta.grad.all()
        torch.testing.assert_close(beta.grad, gradient.float(), rtol=1e-4, atol=1e-7)


def test_vcl_of_small_batches() -> None:
    method = VCL(1)
    method.setup(passed(pre=(sample(4, 6),)))
    assert method.penalty(passed(pre=(sample(3, 6),)), None) is None
    z = sample(7, 6).requires_grad_()
    found = method.penalty(passed(pre=(z,)), None)
    assert found is not None and found.item() == pytest.approx(vcl(z[:3], z[3:6], torch.ones(6)).item())


def test_vcl_s_parameters_in_cnn11() -> None:
    """PER's "350K": one for each unit of the ten layers."""
    colour = ["dataset=cifar10", "dataset.source=embedded", "norm=none", "batch_size=10", "model=cnn11"]
    run = trainer(*colour, "method=vcl")
    assert sum(beta.numel() for beta in run.regularizers["vcl"].parameters()) == 350_460
    assert all(not any(method.parameters()) for method in trainer(*colour, "method=[per,l1,l2]").regularizers.values())


# Options


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("per", {"mode": "exact"}, "method.per: mode: 'exact' is not known; allowed: slices, analytic"),
        ("per", {"directions": "rows"}, "method.per: directions: 'rows' is not known; allowed: gaussian, toeplitz"),
        ("per", {"slices": 0}, "method.per: slices: 0 is not allowed; it must be at least 1"),
        ("l1", {"batch_reduction": "max"}, "method.l1: batch_reduction: 'max' is not known; allowed: sum, mean"),
        ("l2", {"spatial": "pixels"}, "method.l2: spatial: 'pixels' is not known; allowed: units, samples"),
        ("l2", {"p": 3}, "method.l2: p: 3 is not allowed; allowed: 1, 2"),
        ("vcl", {"samples": 1}, "method.vcl: samples: 1, beta: 1 are not allowed; at least 2 samples, beta above 0"),
    ],
)
def test_refused_options(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        made(method, **options)
    assert str(error.value) == message


def test_a_compiled_network_and_edits_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"^compile: true does not go with method per, which edits the backward pass; allowed: false$"):
        trainer("method=per", "compile=true")


def test_a_run_with_weights_trains_otherwise_with_each_method() -> None:
    """In a whole step: the gradient of the first convolution's weights differs from vanilla's by what float64 autograd says."""
    run, plain = trainer("method=per", "method.per.weight=0.01", "method.per.mode=analytic", "norm=none"), trainer("norm=none")
    samples = next(run.samples())
    batch, _ = run.take(*samples)
    net = plain.net.double()
    taps: list[Tensor] = []
    for module in net.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda module, _, out: taps.append(out))
    logits = net(batch.x.double())
    loss = nn.functional.cross_entropy(logits, batch.y)
    for h in taps:
        square, d = h.flatten(1).square().sum(1), h[0].numel()
        loss = loss + 0.01 * (C0 * (d + 2) / d * (1 + square / (d + 2)).sqrt()).sum()
    wanted = torch.autograd.grad(loss, list(net.parameters()))
    total, _ = run.loss(batch, None)
    total.backward()
    for parameter, gradient in zip(run.net.parameters(), wanted, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.double(), gradient, rtol=1e-3, atol=1e-5)
