"""The language model: its size and start, the state between windows, what its taps see, the weight that two layers share."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.lstm import LanguageModel, lstm
from models.net import record
from models.norm import RecurrentBatchNorm

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


# The taps, and the shared weight


def test_taps_are_the_raw_states_of_both_layers_and_lie_in_the_flow() -> None:
    net = model(variational_dropout=True, p_e=0, p_i=0, p_h=0, p_o=0.5)
    plain = copy.deepcopy(net)
    seen = record(net)
    torch.manual_seed(3)
    out = net(ids(3, 9))
    torch.manual_seed(3)
    # in float64, and up to its rounding: behind the tap a matrix lies in memory otherwise, for which some CPUs take another product
    torch.testing.assert_close(out, plain(ids(3, 9)), rtol=1e-13, atol=1e-15)
    assert [h.shape for h in seen] == [(27, 12)] * 2
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
