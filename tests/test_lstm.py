"""The language model: its parts against torch's LSTM, hand-written loops and closed forms; its state, its masks, its shared weight."""

from __future__ import annotations

import copy
import io
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.lstm import LanguageModel, Recurrent, lstm
from models.net import record
from models.norm import RecurrentBatchNorm, group

NONE, RBN = nn.Identity, RecurrentBatchNorm
WORDS = 40


def model(norm: Any = NONE, seed: int = 0, words: int = WORDS, width: int = 12, **options: Any) -> LanguageModel:
    torch.manual_seed(seed)
    return lstm(words, norm, width=width, **options).double()


def ids(rows: int, length: int, seed: int = 5) -> Tensor:
    return torch.randint(WORDS, (rows, length), generator=torch.Generator().manual_seed(seed))


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("words", "tied", "wanted"),
    [(10_000, False, 19_780_400), (10_000, True, 13_280_400), (33_278, False, 50_065_078), (33_278, True, 28_434_378)],
)
def test_parameters(words: int, tied: bool, wanted: int) -> None:
    with torch.device("meta"):
        assert count(lstm(words, NONE, tie_embeddings=tied)) == wanted  # 19.78, 13.28, 50.07, 28.43 million (protocol sheet, 3.4)


def test_rbn_s_parameters() -> None:
    with torch.device("meta"):
        plain, normed = (count(lstm(100, norm)) for norm in (NONE, RBN))
    assert normed - plain == 2 * (2 * 2600 + 2 * 650)  # in both layers, two weights of four gates, a weight and a shift of the cell


def test_initial_weights() -> None:
    net = lstm(500, NONE)
    for weight in (net.features.embedding.weight.detach(), net.classifier.weight.detach()):
        assert weight.abs().max() <= 0.1 and weight.std() == pytest.approx(0.2 / math.sqrt(12), rel=0.02)
    assert not net.classifier.bias.any()
    for layer in net.features.layers:
        for weight in (p.detach() for p in layer.parameters()):
            assert weight.abs().max() <= 650**-0.5 and weight.std() == pytest.approx(2 * 650**-0.5 / math.sqrt(12), rel=0.05)


# One layer


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


# The state


@pytest.mark.parametrize(("norm", "training", "loop"), [(NONE, True, True), (NONE, True, False), (NONE, False, False), (RBN, False, True)])
def test_windows_are_one_long_text(norm: Any, training: bool, loop: bool) -> None:
    net = model(norm, loop=loop)
    if norm is RBN:
        net(ids(3, 20, seed=9))  # statistics to evaluate with
        for layer in net.features.layers:  # of all steps alike
            for part in (layer.norm_ih, layer.norm_hh, layer.norm_c):
                part.running_mean[:], part.running_var[:] = part.running_mean[0].clone(), part.running_var[0].clone()
    net.train(training)
    net.reset()
    words = ids(3, 20)
    whole = net(words).detach()
    net.reset()
    parts = torch.cat([net(part).detach() for part in words.split([7, 7, 6], dim=1)], dim=1)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-13)
    again = net(words).detach()  # from what the text left
    assert (again[:, 0] - whole[:, 0]).abs().min() > 0


def test_no_gradient_flows_into_the_past() -> None:
    net = model()
    first, second = ids(2, 10).split(5, dim=1)
    net(first)
    left = net.features.states[True].clone()
    net(second).sum().backward()  # not through the first window, whose graph is gone
    found = [p.grad.clone() for p in net.features.layers.parameters()]
    net.zero_grad()
    net.reset()
    net.features.states[True].copy_(left)
    net(second).sum().backward()
    assert all(torch.equal(one, p.grad) for one, p in zip(found, net.features.layers.parameters(), strict=True))


def test_evaluation_does_not_disturb_training() -> None:
    one, two = model(), model()
    for part in ids(3, 15).split(5, dim=1):
        wanted = one(part)
        found = two(part)
        assert torch.equal(found, wanted)
        two.eval()
        two.reset()
        two(ids(2, 9))
        with torch.inference_mode():
            two(ids(2, 9))
        two(ids(2, 9))
        two.train()
    two.reset()
    assert torch.equal(two(ids(3, 5)), model()(ids(3, 5)))


def test_the_training_state_stays_where_it_is_in_memory() -> None:
    """A recorded step reads and writes it there."""
    net = model()
    net(ids(3, 5))
    place = net.features.states[True].data_ptr()
    for length in (5, 4, 5):
        net(ids(3, length))
    net.reset()
    assert not net.features.states[True].any()
    net(ids(3, 5))
    assert net.features.states[True].any() and net.features.states[True].data_ptr() == place


# Variational dropout (P17)


def probe(name: str, rate: float = 0.5, rows: int = 6, length: int = 9, **options: Any) -> tuple[LanguageModel, list[Tensor]]:
    """A model with this dropout alone, and what it multiplies by, in two windows."""
    rates = {"p_e": 0.0, "p_i": 0.0, "p_h": 0.0, "p_o": 0.0} | {name: rate}
    net = model(variational_dropout=True, width=20, **rates, **options)
    drawn: list[Tensor] = []
    mask = net.features.mask

    def seen(which: str, *more: Any) -> Tensor | None:
        found = mask(which, *more)
        if found is not None:
            assert which == name
            drawn.append(found)
        return found

    net.features.mask = seen  # type: ignore[method-assign]
    for _ in range(2):
        net(ids(rows, length))
    return net, drawn


SHAPES = {"p_e": (1, (6, WORDS)), "p_i": (2, (6, 1, 20)), "p_h": (2, (6, 20)), "p_o": (1, (6, 1, 20))}


@pytest.mark.parametrize("name", SHAPES)
def test_masks_are_of_rows_and_windows_and_not_of_steps(name: str) -> None:
    drawn = probe(name, rate=0.25)[1]
    times, shape = SHAPES[name]
    assert [tuple(mask.shape) for mask in drawn] == [shape] * 2 * times  # no dimension of steps: one value for all of them
    assert {*torch.cat([mask.flatten() for mask in drawn]).tolist()} == {0.0, 1 / 0.75}
    for mask in drawn:
        assert not all(torch.equal(mask[0], row) for row in mask)
        assert not any(torch.equal(mask, other) for other in drawn if other is not mask)


def test_a_dropped_word_is_dropped_wherever_it_stands() -> None:
    net, _ = probe("p_e")
    seen: list[Tensor] = []
    net.features.layers[0].register_forward_pre_hook(lambda layer, given: seen.append(given[0].detach()))
    words = torch.randint(8, (6, 30), generator=torch.Generator().manual_seed(1))
    net(words)
    embedded = net.features.embedding.weight.detach()[words]
    fate = (seen[0] / embedded).mean(-1).round(decimals=6)  # [rows, steps]
    assert {*fate.flatten().tolist()} == {0.0, 2.0}
    for row in range(6):
        for word in range(8):
            assert len({*fate[row][words[row] == word].tolist()}) <= 1
    assert len({tuple(fate[row][words[row] == 0].tolist()[:1]) for row in range(6)}) == 2  # each row drops words of its own


def test_what_is_dropped_is_dropped_at_every_step() -> None:
    net, _ = probe("p_o")
    taps = record(net)
    out = net.features(ids(6, 9)).detach()
    raw = taps[-1].detach().view(6, 9, 20)
    ratio = (out / raw).round(decimals=9)
    assert torch.equal(ratio, ratio[:, :1].expand_as(ratio)) and {*ratio.flatten().tolist()} == {0.0, 2.0}


def test_a_shared_recurrent_mask_is_one_for_all_rows_and_needs_no_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recurrent, "stepped", lambda *_: pytest.fail("it stepped"))
    drawn = probe("p_h", recurrent_mask="shared")[1]
    assert [tuple(mask.shape) for mask in drawn] == [(1, 20)] * 4


def test_rows_of_one_mask_are_the_shared_mask() -> None:
    """The exact loop, given the same mask in every row, gives what the fused layer gives with the shared one."""
    shared, rows = (model(variational_dropout=True, p_e=0, p_i=0, p_o=0, recurrent_mask=kind) for kind in ("shared", "rows"))
    mask = rows.features.mask

    def repeated(name: str, like: Tensor, *shape: int) -> Tensor | None:
        found = mask(name, like, *((1, *shape[1:]) if name == "p_h" else shape))
        return found.expand(shape) if name == "p_h" and found is not None else found

    rows.features.mask = repeated  # type: ignore[method-assign]
    found = []
    for net in (shared, rows):
        torch.manual_seed(4)
        found.append(net(ids(3, 9)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["rows", "shared"])
def test_nothing_is_dropped_in_evaluation(kind: str) -> None:
    dropped, plain = model(variational_dropout=True, recurrent_mask=kind).eval(), model().eval()
    assert torch.equal(dropped(ids(3, 9)), plain(ids(3, 9)))
    zero = model(variational_dropout=True, p_e=0, p_i=0, p_h=0, p_o=0)
    assert torch.equal(zero(ids(3, 9)), model()(ids(3, 9)))  # nor with a probability of 0 in training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p_e": 1.0}, "p_e: 1.0 is not allowed; it must be a number from 0 to below 1"),
        ({"p_h": -0.1}, "p_h: -0.1 is not allowed"),
        ({"recurrent_mask": "each"}, "recurrent_mask: 'each' is not known; allowed: rows, shared"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        lstm(10, NONE, **options)


# The taps, and the shared weight


def test_taps_are_the_raw_states_of_both_layers_and_lie_in_the_flow() -> None:
    net = model(variational_dropout=True, p_e=0, p_i=0, p_h=0, p_o=0.5)
    plain = copy.deepcopy(net)
    seen = record(net)
    torch.manual_seed(3)
    out = net(ids(3, 9))
    torch.manual_seed(3)
    assert torch.equal(out, plain(ids(3, 9))) and [h.shape for h in seen] == [(27, 12)] * 2
    h = (torch.zeros(3, 12).double(), torch.zeros(3, 12).double())
    first, _ = plain.features.layers[0](plain.features.embedding(ids(3, 9)), h)
    second, _ = plain.features.layers[1](first, h)
    torch.testing.assert_close(seen[0], first.flatten(0, 1))
    torch.testing.assert_close(seen[1], second.flatten(0, 1))
    for tap in seen:  # what a hook adds to the gradient there arrives below
        tap.register_hook(lambda gradient: gradient + 1)
    out.sum().backward()
    edited = net.features.embedding.weight.grad
    torch.manual_seed(3)
    plain(ids(3, 9)).sum().backward()
    assert edited is not None and not torch.equal(edited, plain.features.embedding.weight.grad)


def test_the_tied_weight_is_one_through_state_and_optimizer() -> None:
    net, other = model(tie_embeddings=True), model(tie_embeddings=True, seed=7)
    assert net.classifier.weight is net.features.embedding.weight and count(net) == count(model()) - WORDS * 12
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    before = net.classifier.weight.detach().clone()
    nn.functional.cross_entropy(net(ids(3, 9)).flatten(0, 1), ids(3, 9, seed=6).flatten()).backward()
    optimizer.step()
    assert net.classifier.weight is net.features.embedding.weight and not torch.equal(before, net.classifier.weight)
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.classifier.weight is other.features.embedding.weight
    net.eval(), other.eval()
    assert torch.equal(other(ids(3, 9)), net(ids(3, 9)))


def test_the_gradient_of_a_tied_weight_is_that_of_both_uses() -> None:
    tied, apart = model(tie_embeddings=True), model()
    apart.load_state_dict(tied.state_dict())
    for net in (tied, apart):
        net(ids(3, 9)).square().sum().backward()
    both = apart.features.embedding.weight.grad + apart.classifier.weight.grad
    torch.testing.assert_close(tied.classifier.weight.grad, both, rtol=1e-10, atol=1e-12)
