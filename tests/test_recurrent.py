"""One recurrent layer: against torch's, against loops written by hand, with recurrent batch normalisation and without."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from test_lstm import NONE, RBN, ids, model
from torch import Tensor, nn

from models.lstm import Recurrent, lstm
from models.norm import group


def layers(norm: Any = NONE, units: int = 6) -> tuple[Recurrent, Recurrent]:
    """The same layer twice: as it is usually computed, and step by step."""
    torch.manual_seed(1)
    fused = Recurrent(4, units, norm, loop=False).double()
    stepped = copy.deepcopy(fused)
    stepped.loop = True
    return fused, stepped


def run(layer: nn.Module, x: Tensor, state: tuple[Tensor, Tensor], *mask: Tensor) -> list[Tensor]:
    """Outputs, last state, and the gradients of some function of all of them."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    out, (h, c) = layer(x, state, *mask)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().add(h.sum() + c.square().sum()).backward()
    assert x.grad is not None
    return [out.detach(), h.detach(), c.detach(), x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]


def inputs(rows: int = 3, length: int = 7, units: int = 6) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    torch.manual_seed(2)
    return torch.randn(rows, length, 4).double(), (torch.randn(rows, units).double(), torch.randn(rows, units).double())


def test_a_layer_is_torch_s() -> None:
    fused, stepped = layers()
    torch.manual_seed(1)
    theirs = nn.LSTM(4, 6, batch_first=True).double()
    assert all(torch.equal(one, two) for one, two in zip(fused.parameters(), theirs.parameters(), strict=True))  # the same draws
    x, (h, c) = inputs()
    out, (h_n, c_n) = theirs(x, (h[None], c[None]))
    for layer in (fused, stepped):
        found = layer(x, (h, c))
        torch.testing.assert_close((found[0], *found[1]), (out, h_n[0], c_n[0]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_the_loop_is_the_fused_layer(masked: bool) -> None:
    """With a mask that all rows share, too."""
    fused, stepped = layers()
    mask = [torch.tensor([[0.0, 1.25, 1.25, 0.0, 1.25, 1.25]]).double()] * masked
    for one, two in zip(run(fused, *inputs(), *mask), run(stepped, *inputs(), *mask), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


def test_the_loop_is_the_fused_layer_in_float32() -> None:
    fused, stepped = (layer.float() for layer in layers())
    x, state = inputs(length=35)
    x, state = x.float(), (state[0].float(), state[1].float())
    for one, two in zip(run(fused, x, state), run(stepped, x, state), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_a_row_s_own_mask_by_hand() -> None:
    """h of the step before is multiplied by its row's mask where the recurrent weights read it, and nowhere else."""
    layer = layers()[0]
    x, (h, c) = inputs()
    mask = torch.tensor([0.0, 1.25]).double()[torch.randint(2, (3, 6), generator=torch.Generator().manual_seed(3))]
    out, state = layer(x, (h, c), mask)
    for row in range(3):
        last, cell = h[row], c[row]
        for step in range(7):
            gates = layer.weight_ih @ x[row, step] + layer.bias_ih + layer.weight_hh @ (last * mask[row]) + layer.bias_hh
            i, f, g, o = gates.view(4, 6)
            cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
            last = torch.sigmoid(o) * torch.tanh(cell)
            torch.testing.assert_close(out[row, step], last, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close((state[0][row], state[1][row]), (last, cell), rtol=1e-10, atol=1e-12)


# Recurrent batch normalisation (P16)


def test_rbn_by_hand() -> None:
    layer = layers(partial(RBN, steps=7))[0]
    with torch.no_grad():
        for norm, channels in ((layer.norm_ih, 24), (layer.norm_hh, 24), (layer.norm_c, 6)):
            norm.weight.copy_(torch.linspace(0.1, 0.5, channels))
        layer.norm_c.bias.copy_(torch.linspace(-0.2, 0.3, 6))
    x, (h, c) = inputs()
    out, _ = layer(x, (h, c))

    def normed(z: Tensor, weight: Tensor) -> Tensor:
        return weight * (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt()

    for step in range(7):
        products = normed(x[:, step] @ layer.weight_ih.T, layer.norm_ih.weight) + normed(h @ layer.weight_hh.T, layer.norm_hh.weight)
        i, f, g, o = (products + layer.bias_ih + layer.bias_hh).split(6, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(normed(c, layer.norm_c.weight) + layer.norm_c.bias)
        torch.testing.assert_close(out[:, step], h, rtol=1e-9, atol=1e-12)


def test_rbn_starts_small_with_a_forget_gate_that_is_open() -> None:
    torch.manual_seed(0)
    layer = Recurrent(50, 50, RBN, loop=False).double()
    seen: list[Tensor] = []
    for norm in (layer.norm_ih, layer.norm_hh):
        norm.register_forward_hook(lambda norm, _, out: seen.append(out.detach()))
    layer(torch.randn(400, 3, 50).double(), (torch.randn(400, 50).double(), torch.randn(400, 50).double()))
    gates = seen[-2] + seen[-1]
    assert gates.std(0).mean() == pytest.approx(0.1 * math.sqrt(2), rel=0.05)
    bias = (layer.bias_ih + layer.bias_hh).view(4, 50)
    assert bias[1].eq(1).all() and bias[[0, 2, 3]].abs().max() <= 2 * 50**-0.5
    assert layer.norm_ih.bias is layer.norm_hh.bias is None and not layer.norm_c.bias.any()


def test_rbn_keeps_statistics_of_each_step_and_uses_the_last_ones_beyond() -> None:
    norm = RBN(4, steps=3).double()
    x = torch.randn(10, 4, generator=torch.Generator().manual_seed(1)).double()
    for step in range(5):
        norm(x + step, step)
    mean, var = x.mean(0), x.var(0)
    for slot in range(2):
        torch.testing.assert_close(norm.running_mean[slot], 0.05 * (mean + slot))
        torch.testing.assert_close(norm.running_var[slot], 0.95 + 0.05 * var)
    kept = 0.95 * (0.95 * 0.05 * (mean + 2) + 0.05 * (mean + 3)) + 0.05 * (mean + 4)  # steps 2, 3 and 4 share a slot
    torch.testing.assert_close(norm.running_mean[2], kept)
    norm.eval()
    before = copy.deepcopy(norm.state_dict())
    for step in (0, 1, 2, 3, 99):
        slot = min(step, 2)
        wanted = 0.1 * (x - norm.running_mean[slot]) / (norm.running_var[slot] + 1e-5).sqrt()
        torch.testing.assert_close(norm(x, step), wanted)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


def test_rbn_of_rows_that_are_alike_has_finite_gradients() -> None:
    net = model(RBN)
    words = ids(1, 6).expand(4, 6)
    nn.functional.cross_entropy(net(words).flatten(0, 1), words.flatten()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_rbn_in_evaluation_keeps_rows_apart() -> None:
    net = model(RBN)
    net(ids(5, 8, seed=1))
    net.eval()
    together = net(ids(4, 8))
    for row in range(4):
        net.reset()
        torch.testing.assert_close(net(ids(4, 8)[row : row + 1])[0], together[row], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("norm", [partial(group, num_groups=2), nn.BatchNorm1d])
def test_other_norm_layers_are_refused(norm: Any) -> None:
    with pytest.raises(ValueError, match=r"^norm: (Group|Batch)Norm\w* does not go into an LSTM; allowed: none, rbn$"):
        lstm(10, norm)
    with pytest.raises(RuntimeError, match=r"^norm=rbn is for recurrent networks$"):
        RBN(3)(torch.zeros(2, 3))
