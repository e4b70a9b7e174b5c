"""The language model: its size and start, the state between windows, what its taps see, the weight that two layers share."""

from __future__ import annotations

import copy
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


def model(**options: Any) -> LanguageModel:
    torch.manual_seed(0)
    return lstm(WORDS, NONE, **{"width": 12, **options}).double()


def ids(rows: int, length: int) -> Tensor:
    return torch.randint(WORDS, (rows, length), generator=torch.Generator().manual_seed(5))


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_parameters() -> None:
    """19.78, 13.28, 50.07, 28.43 million (protocol sheet, 3.4); rbn adds two weights of four gates, a weight and a shift to each layer."""
    with torch.device("meta"):
        sizes = [count(lstm(words, NONE, tie_embeddings=tied)) for words in (10_000, 33_278) for tied in (False, True)]
        assert sizes == [19_780_400, 13_280_400, 50_065_078, 28_434_378]
        assert count(lstm(100, RBN)) - count(lstm(100, NONE)) == 2 * (2 * 2600 + 2 * 650)


def test_initial_weights() -> None:
    net = lstm(500, NONE)
    for weight in (net.features.embedding.weight.detach(), net.classifier.weight.detach()):
        assert weight.abs().max() <= 0.1 and weight.std() == pytest.approx(0.2 / math.sqrt(12), rel=0.02)
    assert not net.classifier.bias.any()
    for weight in (p.detach() for p in net.features.layers.parameters()):
        assert weight.abs().max() <= 650**-0.5 and weight.std() == pytest.approx(2 * 650**-0.5 / math.sqrt(12), rel=0.05)


# The state


@pytest.mark.parametrize(("training", "loop"), [(True, True), (True, False), (False, False)])
def test_windows_are_one_long_text(training: bool, loop: bool) -> None:
    net, words = model(loop=loop).train(training), ids(3, 20)
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
    weights = [*net.features.layers.parameters()]
    gradients = torch.autograd.grad(net(second).sum(), weights)
    net.features.states[True].copy_(left)
    assert all(torch.equal(*pair) for pair in zip(gradients, torch.autograd.grad(net(second).sum(), weights), strict=True))


def test_evaluation_does_not_disturb_training() -> None:
    plain, evaluated = model(), model()
    for part in ids(3, 15).split(5, dim=1):
        assert torch.equal(evaluated(part), plain(part))
        evaluated.eval()
        evaluated.reset()
        with torch.inference_mode():
            evaluated(ids(2, 9))
        evaluated(ids(2, 9))
        evaluated.train()


# The taps, and the shared weight


def test_taps_are_the_raw_states_of_both_layers_and_lie_in_the_flow() -> None:
    net = model(variational_dropout=True, p_e=0, p_i=0, p_h=0, p_o=0.5)
    plain, seen, outs = copy.deepcopy(net), record(net), []
    for each in (net, plain):
        torch.manual_seed(3)
        outs.append(each(ids(3, 9)))
    # in float64, and up to its rounding: behind the tap a matrix lies in memory otherwise, for which some CPUs take another product
    torch.testing.assert_close(*outs, rtol=1e-13, atol=1e-15)
    zeros = (torch.zeros(3, 12).double(), torch.zeros(3, 12).double())
    first, _ = plain.features.layers[0](plain.features.embedding(ids(3, 9)), zeros)
    second, _ = plain.features.layers[1](first, zeros)
    torch.testing.assert_close([*seen], [first.flatten(0, 1), second.flatten(0, 1)])
    for tap in seen:  # what a hook adds to the gradient there arrives below
        tap.register_hook(lambda gradient: gradient + 1)
    torch.stack(outs).sum().backward()
    assert not torch.allclose(net.features.embedding.weight.grad, plain.features.embedding.weight.grad)


def test_the_tied_weight_is_one_through_state_and_optimizer() -> None:
    net, apart = model(tie_embeddings=True), model()
    assert net.classifier.weight is net.features.embedding.weight and count(net) == count(apart) - WORDS * 12
    apart.load_state_dict(net.state_dict())
    for each in (net, apart):
        each(ids(3, 9)).square().sum().backward()
    both = apart.features.embedding.weight.grad + apart.classifier.weight.grad
    torch.testing.assert_close(net.classifier.weight.grad, both, rtol=1e-10, atol=1e-12)
    before = net.classifier.weight.detach().clone()
    torch.optim.SGD(net.parameters(), lr=0.5).step()
    other = model(tie_embeddings=True)
    other.load_state_dict(net.state_dict())
    for each in (net, other):
        assert each.classifier.weight is each.features.embedding.weight and not torch.equal(before, each.classifier.weight)
