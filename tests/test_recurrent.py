"""The recurrent layer against torch's and against loops written by hand; recurrent batch normalization; variational dropout."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from test_lstm import NONE, RBN, WORDS, ids, model
from torch import Tensor, nn

from models.lstm import LanguageModel, Recurrent, lstm
from models.norm import group


def layers(norm: Any = NONE) -> tuple[Recurrent, Recurrent]:
    """The same layer twice: as it is usually computed, and step by step."""
    torch.manual_seed(1)
    fused = Recurrent(4, 6, norm, loop=False).double()
    stepped = copy.deepcopy(fused)
    stepped.loop = True
    return fused, stepped


def inputs() -> tuple[Tensor, tuple[Tensor, Tensor]]:
    torch.manual_seed(2)
    return torch.randn(3, 7, 4).double(), (torch.randn(3, 6).double(), torch.randn(3, 6).double())


def test_a_layer_is_torchs() -> None:
    fused, stepped = layers()
    torch.manual_seed(1)
    theirs = nn.LSTM(4, 6, batch_first=True).double()
    assert all(torch.equal(*pair) for pair in zip(fused.parameters(), theirs.parameters(), strict=True))  # the same draws
    x, (h, c) = inputs()
    out, (h_n, c_n) = theirs(x, (h[None], c[None]))
    for layer in (fused, stepped):
        ours, state = layer(x, (h, c))
        torch.testing.assert_close((ours, *state), (out, h_n[0], c_n[0]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 3])
def test_masks_by_hand(rows: int) -> None:
    """The recurrent weights read the last step's h times the mask, of each row or of all rows; nothing else is masked."""
    mask = torch.tensor([0.0, 1.25]).double()[torch.randint(2, (rows, 6), generator=torch.Generator().manual_seed(3))]
    for layer in layers():
        x, (h, c) = inputs()
        (out, state), wanted = layer(x.requires_grad_(), (h, c), mask), []
        for step in range(7):
            gates = x[:, step] @ layer.weight_ih.T + layer.bias_ih + (h * mask) @ layer.weight_hh.T + layer.bias_hh
            i, f, g, o = gates.chunk(4, dim=1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            wanted.append(h)
        torch.testing.assert_close((out, *state), (torch.stack(wanted, 1), h, c), rtol=1e-10, atol=1e-12)
        sums = ((y * torch.arange(42).view(7, 6)).sum() + last.square().sum() for y, last in ((out, state[1]), (torch.stack(wanted, 1), c)))
        torch.testing.assert_close(*(torch.autograd.grad(total, (x, *layer.parameters())) for total in sums), rtol=1e-10, atol=1e-12)


# Recurrent batch normalization (P16)


def test_rbn_by_hand() -> None:
    layer = layers(partial(RBN, steps=7))[0]
    bias = (layer.bias_ih + layer.bias_hh).view(4, 6)
    assert bias[1].eq(1).all() and bias[[0, 2, 3]].abs().max() <= 2 * 6**-0.5  # the forget gate starts open
    assert layer.norm_ih.bias is layer.norm_hh.bias is None and not layer.norm_c.bias.any()
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
    for step in (0, 1, 2, 99):
        slot = min(step, 2)
        torch.testing.assert_close(norm(x, step), 0.1 * (x - norm.running_mean[slot]) / (norm.running_var[slot] + 1e-5).sqrt())
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


# Variational dropout (P17)

RATES = {"p_e": 0.2, "p_i": 0.25, "p_h": 0.4, "p_o": 0.5}


def masks(net: LanguageModel, *windows: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The features of windows, and what the model multiplies with in turn."""
    drawn, mask = [], net.features.mask
    net.features.mask = lambda *shape: drawn.append(mask(*shape)) or drawn[-1]  # type: ignore
    return [net.features(window) for window in windows], drawn


def test_variational_dropout_by_hand() -> None:
    """A row of a window drops the same words, inputs of both layers, states between its steps, and outputs at all its steps."""
    net, words = model(variational_dropout=True, width=20, **RATES), torch.randint(8, (6, 30), generator=torch.Generator().manual_seed(1))
    outs, drawn = masks(net, words, words)
    names = ["p_e", "p_i", "p_h", "p_i", "p_h", "p_o"]
    assert [mask.shape for mask in drawn] == [(6, WORDS), (6, 1, 20), (6, 20), (6, 1, 20), (6, 20), (6, 1, 20)] * 2
    for mask, name in zip(drawn, names * 2, strict=True):
        assert {*mask.flatten().tolist()} == {0.0, 1 / (1 - RATES[name])}
        assert not all(torch.equal(mask[0], row) for row in mask)
        assert not any(torch.equal(mask, other) for other in drawn if other is not mask)
    dropped, *of_layers, last = drawn[:6]
    x = net.features.embedding(words) * torch.stack([row[ids] for row, ids in zip(dropped, words, strict=True)])[..., None]
    for layer, of_inputs, of_states in zip(net.features.layers, of_layers[::2], of_layers[1::2], strict=True):
        x, _ = layer(x * of_inputs, (torch.zeros(6, 20).double(), torch.zeros(6, 20).double()), of_states)
    torch.testing.assert_close(outs[0], x * last)


def test_a_shared_recurrent_mask_is_one_for_all_rows_and_needs_no_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recurrent, "stepped", lambda *_: pytest.fail("it stepped"))
    _, drawn = masks(model(variational_dropout=True, recurrent_mask="shared", **RATES), ids(6, 9))
    assert drawn[2].shape == drawn[4].shape == (1, 12)


def test_nothing_is_dropped_in_evaluation_or_with_a_probability_of_0() -> None:
    assert torch.equal(model(variational_dropout=True).eval()(ids(3, 9)), model().eval()(ids(3, 9)))
    assert torch.equal(model(variational_dropout=True, p_e=0, p_i=0, p_h=0, p_o=0)(ids(3, 9)), model()(ids(3, 9)))


def test_refused() -> None:
    for message, make in {
        r"^norm: GroupNorm does not go into an LSTM; allowed: none, rbn$": lambda: lstm(10, partial(group, num_groups=2)),
        r"^norm=rbn is for recurrent networks$": lambda: RBN(3)(torch.zeros(2, 3)),
        r"^steps: 0 is not allowed; it must be at least 1$": lambda: RBN(3, steps=0),
        r"^p_e: 1.0 is not allowed; it must be a number from 0 to below 1": lambda: lstm(10, NONE, p_e=1.0),
        r"^p_h: -0.1 is not allowed": lambda: lstm(10, NONE, p_h=-0.1),
        r"^recurrent_mask: 'each' is not known; allowed: rows, shared": lambda: lstm(10, NONE, recurrent_mask="each"),
    }.items():
        with pytest.raises((ValueError, RuntimeError), match=message):
            make()
