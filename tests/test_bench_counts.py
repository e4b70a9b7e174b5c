"""What the bench counts, and what a step may cost in operations, host reads and memory: gates that hold on any machine."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from experiments.bench import rows, sides
from experiments.bench.configs import Asked
from experiments.bench.counts import count, forward_gflop, kept, usual_count
from experiments.train import make_trainer

ONE = ["runtime.threads=1", "runtime.device=cpu"]


@pytest.fixture(autouse=True, scope="module")
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_count_sees_operations_and_host_reads():
    x = torch.arange(6.0)
    assert count(lambda: x.view(2, 3).t().add(1).mul(2)) == (2, 0)
    assert count(lambda: float(x.sum())) == (2, 1)
    assert count(lambda: x[x > 2])[1] == 1
    assert count(lambda: x[torch.tensor([0, 1])])[1] == 0
    assert count(lambda: x.nonzero())[1] == 1
    leaf = torch.ones(3, requires_grad=True)
    assert count(lambda: (leaf * 2).sum().backward())[0] >= 3  # the backward is counted too


def test_kept_counts_each_storage_once_and_no_weights():
    net = nn.Linear(10, 10)
    x, y = torch.ones(5, 10, requires_grad=True), torch.ones(10, requires_grad=True)
    assert kept(lambda: net(x).sum().backward(), net) == 4 * 50  # the input
    assert kept(lambda: net(x).sum().backward(), None) == 4 * (50 + 100)
    assert kept(lambda: net(x.exp()).relu().sum().backward(), net) == 4 * (50 + 50)  # exp's and relu's results; the first is the input too
    assert kept(lambda: (y * y).sum().backward(), None) == 4 * 10
    assert torch.equal(y.grad, 4 * torch.ones(10))  # two steps of it


@pytest.mark.parametrize(
    ("model", "shape", "gflop"), [("net2c", (1, 28, 28), 0.003938), ("net5c", (1, 28, 28), 0.3165), ("resnet18", (3, 32, 32), 1.111)]
)
def test_forward_is_counted_without_computing(model, shape, gflop):
    assert forward_gflop(Asked(ONE).cfg(model), (4, *shape), 10) == pytest.approx(4 * gflop, rel=0.001)


def test_forward_of_grouped_convolutions():
    assert forward_gflop(Asked(ONE).cfg("mobilenet"), (1, 3, 32, 32), 10) == pytest.approx(0.09271, rel=0.01)


RESNET = Asked(["batch_size=20", *ONE])


@pytest.fixture(scope="module")
def plain():
    return sides.suite(RESNET.cfg("resnet18"))


def test_calls_of_a_whole_step_with_crop_and_flip(plain):
    assert make_trainer(RESNET.cfg("resnet18")).bundle.augment is not None
    calls, reads = usual_count(plain.step)
    assert calls <= 190
    assert reads == 0


def test_calls_of_a_whole_step_with_itdm():
    calls, reads = usual_count(sides.suite(RESNET.cfg("resnet18", "method=itdm_c")).step)
    assert calls <= 520
    assert reads == 0


def test_calls_of_the_optimizer():
    assert usual_count(sides.optimizer(RESNET.cfg("resnet18")).step) <= (6, 0)


def test_a_step_keeps_no_more_for_its_backward_than_the_minimal_loop(plain):
    loop = sides.peer(RESNET.cfg("resnet18"))
    ours, theirs = kept(plain.step, plain.net), kept(loop.step, loop.net)
    assert 20 * 2**20 < theirs < ours * 1.1
    assert ours <= 1.1 * theirs


def test_gates_are_those_of_the_table():
    assert rows.CALLS_GOOD == {"suite": "a <= 190", "itdm_c": "a <= 520"}
