"""LaMix: its targets and their bounds, what trains the extra layer, and why it needs the sigmoid and the gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_mixing import at, batch, method, net
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from trainers import data_home

from data.bundle import Batch
from models.net import Net
from regularizers.base import Pass
from regularizers.lamix import LaMix
from regularizers.mixing import soft

__all__ = ["data_home"]  # a fixture
pytestmark = pytest.mark.usefixtures("one_thread")
CLEAN, MIXED = 0, 1  # steps


def ready(**options: Any) -> LaMix:
    """A method with its layer, of seven units and ten classes."""
    ours = method("lamix", **options)
    ours.setup(Pass(batch(2, 10), torch.zeros(2, 7), torch.zeros(2, 10), ()))
    return ours


def passed(given: Batch) -> Pass:
    rng = torch.Generator().manual_seed(0)
    h, logits = (torch.randn(len(given.x), size, generator=rng) for size in (7, 10))
    return Pass(given, h.requires_grad_(), logits.requires_grad_(), ())


@pytest.mark.parametrize("label", ["lambda", "half"])
def test_the_target_is_that_of_the_formula_and_its_largest_entries_are_logged(label: str) -> None:
    """Eqs. 2, 9, 10, by loops; figure 2's numbers, the means over the batch, of clean and of mixed steps apart."""
    ours, given = ready(beta=0.3, local_label=label), batch(6, 10)
    state = ours.rng.get_state()
    mixed = at(MIXED, ours).transform(given, net(10))
    ours.rng.set_state(state)
    lam = torch.empty(()).uniform_(generator=ours.rng) if label == "lambda" else torch.tensor(0.5)
    partner = torch.rand(6, generator=ours.rng).argsort()
    out = passed(mixed)
    target = ours.retarget(out)
    for i, j in enumerate(partner.tolist()):
        torch.testing.assert_close(mixed.x[i], 0.5 * given.x[i] + 0.5 * given.x[j])
        u = [sum(ours.head.weight[k, a] * out.features[i, a] for a in range(7)) + ours.head.bias[k] for k in range(10)]
        e = [math.exp(1 / (1 + math.exp(-value.item()))) for value in u]
        for k in range(10):
            local = lam * (given.y[i] == k) + (1 - lam) * (given.y[j] == k)
            assert target[i, k].item() == pytest.approx(float(0.3 * local) + 0.7 * e[k] / sum(e), abs=1e-6)
    top = torch.tensor([sorted(row, reverse=True)[:5] for row in target.tolist()]).mean(0)
    torch.testing.assert_close(ours.logged(), {"mixed": torch.tensor(1.0), "target_mixed": top, "target_clean": 0 * top})
    clean = at(CLEAN, ours).transform(given, net(10))
    assert torch.equal(clean.x, given.x) and torch.equal(clean.target, soft(given.y, 10))
    top = torch.tensor([sorted(row, reverse=True)[:5] for row in ours.retarget(passed(clean)).tolist()]).mean(0)
    torch.testing.assert_close(ours.logged(), {"mixed": torch.tensor(0.0), "target_mixed": 0 * top, "target_clean": top})


def test_the_gradient_is_the_printed_one() -> None:
    """P-L5: dE / du_k = (1 - beta) s_k (1 - s_k) p_k (-log yhat_k + sum_j p_j log yhat_j), u = W_t h, over the samples' mean."""
    ours = ready(beta=0.3)
    out = passed(at(MIXED, ours).transform(batch(6, 10), net(10)))
    cross_entropy(out.logits, ours.retarget(out)).backward()
    h, log = out.features.detach().double(), out.logits.detach().double().log_softmax(1)
    u = h @ ours.head.weight.detach().double().T + ours.head.bias.detach().double()
    s = 1 / (1 + torch.exp(-u))
    p = s.exp() / s.exp().sum(1, keepdim=True)
    du = 0.7 * s * (1 - s) * p * (-log + (p * log).sum(1, keepdim=True)) / 6
    torch.testing.assert_close(ours.head.weight.grad.double(), du.T @ h, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(ours.head.bias.grad.double(), du.sum(0), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(out.features.grad.double(), du @ ours.head.weight.detach().double(), rtol=1e-4, atol=1e-7)
    assert ours.head.weight.grad.abs().max() > 1e-4


def test_without_the_attached_label_the_target_is_a_constant() -> None:
    """P-L5: nothing reaches W_t, and the network's gradient is that of the cross-entropy with a constant target."""
    for options in ({"detach_global": True}, {"beta": 1}, {"global_label": "none"}, {"global_label": "uniform"}):
        ours = ready(**options)
        assert (ours.head is None) == ("detach_global" not in options)
        out = passed(at(MIXED, ours).transform(batch(6, 10), net(10)))
        target = ours.retarget(out)
        cross_entropy(out.logits, target).backward()
        assert out.features.grad is None and all(parameter.grad is None for parameter in ours.parameters())
        again = out.logits.detach().requires_grad_()
        cross_entropy(again, target.detach()).backward()
        assert torch.equal(out.logits.grad, again.grad)
    torch.testing.assert_close(target, 0.5 * out.batch.target + 0.05)  # uniform


class WithoutSigmoid(LaMix):
    def soft_label(self, h: Tensor) -> Tensor:
        return self.head(h).softmax(1)


def clusters(ours: LaMix) -> tuple[float, float, float]:
    """Ten Gaussian clusters and a small network: at the end, the two largest entries of p on pairs, and the accuracy."""
    rng = torch.Generator().manual_seed(0)
    centres = 6 / math.sqrt(20) * torch.randn(10, 20, generator=rng)

    def drawn(count: int) -> Batch:
        y = torch.randint(10, (count,), generator=rng)
        return Batch(centres[y] + torch.randn(count, 20, generator=rng), y, y)

    torch.manual_seed(1)
    model = Net(nn.Sequential(nn.Linear(20, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU()), nn.Linear(64, 10))
    ours.rng = torch.Generator().manual_seed(3)
    ours.setup(Pass(drawn(2), torch.zeros(2, 64), torch.zeros(2, 10), ()))
    optimizer = torch.optim.SGD([*model.parameters(), *ours.parameters()], lr=0.1, momentum=0.9, weight_decay=1e-4)
    for step in range(602):
        given = at(step, ours).transform(drawn(128), model)
        h = model.features(given.x)
        out = Pass(given, h, model.classifier(h), ())
        optimizer.zero_grad()
        cross_entropy(out.logits, ours.retarget(out)).backward()
        optimizer.step()
    test = drawn(2000)
    top = ours.soft_label(h.detach()).topk(2).values.mean(0)
    return *top.tolist(), (model(test.x).argmax(1) == test.y).float().mean().item()


@pytest.mark.slow
def test_the_sigmoid_and_the_attached_gradient_matter() -> None:
    """Protocol sheet, section 0: detached, p stays near uniform; without the sigmoid p and the prediction confirm each other, and it fails.

    For K = 10 the mean of the two largest entries of p on pairs can never exceed 0.2023.
    """
    first, second, accuracy = clusters(LaMix())
    assert first > 0.18 and second > 0.15 and first + second < 2 * 0.2023 and accuracy > 0.98
    first, _, accuracy = clusters(LaMix(detach_global=True))
    assert 0.1 < first < 0.12 and accuracy > 0.98
    first, _, accuracy = clusters(WithoutSigmoid())
    assert first > 0.99 and accuracy < 0.85


def test_refused_options() -> None:
    with pytest.raises(ValueError, match=r"beta: 1\.2 is not between 0 and 1"):
        LaMix(beta=1.2)
    with pytest.raises(ValueError, match="global_label: 'learnt' is not known; allowed: learned, uniform, none"):
        LaMix(global_label="learnt")
