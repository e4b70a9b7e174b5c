"""What the bench counts, and what a step may cost in operations, host reads and memory: gates that hold on any machine."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from experiments.bench import methods, sides
from experiments.bench.configs import Asked
from experiments.bench.counts import count, forward_gflop, kept, usual_count
from experiments.train import make_trainer
from regularizers import activation
from regularizers.activation import ActivationPenalty

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


def test_kept_counts_what_is_made_and_held_once_whoever_holds_it():
    weight, x = torch.ones(10, 10, requires_grad=True), torch.ones(5, 10)
    held: list[Tensor] = []

    def step(use, hook=None):
        h = (x @ weight).exp()
        if hook is not None:
            h.register_hook(hook(h.detach()))
        use(h).backward()

    loss, matrix = 4 + 4, 4 * 50  # the sum, and its own gradient of 1
    assert kept(lambda: step(torch.sum)) == matrix + loss  # exp's result; x and the weights were there before
    assert kept(lambda: step(lambda h: h.view(10, 5).t().neg().sum())) == matrix + loss  # a view is no storage
    assert kept(lambda: step(lambda h: (h * x.view(5, 10)).sum())) == matrix + loss  # nor is one of what was there before
    assert kept(lambda: step(lambda h: h.neg().relu_().sum())) == 2 * matrix + loss  # relu's result, in place
    assert kept(lambda: step(lambda h: h.sin().sum())) == matrix + loss  # sin's input is exp's result
    assert kept(lambda: step(lambda h: h.sin().cos().sum())) == 2 * matrix + loss
    assert kept(lambda: step(torch.sum, lambda h: partial(torch.add, h))) == matrix + loss  # the hook's h is exp's result too
    assert kept(lambda: step(torch.sum, lambda h: partial(torch.add, h.clone()))) == 2 * matrix + loss  # this one is its own
    assert kept(lambda: step(lambda h: held.append(h.neg()) or h.sum())) == 2 * matrix + loss
    assert torch.equal(weight.grad[0], weight.grad[1])


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
    ours, theirs = kept(plain.step), kept(sides.peer(RESNET.cfg("resnet18")).step)
    assert 20 * 2**20 < theirs < ours * 1.1
    assert ours <= 1.1 * theirs


# PER keeps nothing: what its directions take (350,460 units each), and even a copy of the smallest activation, would show.

CNN11 = Asked(["batch_size=4", *ONE], own={"per": ["method.per.slices=8"]})
CALLS = {"per": 450, "per toeplitz": 490, "per analytic": 330, "l1": 260, "l2": 260}  # with one block of directions; vanilla: 104
EDITS = (*CALLS,)


@pytest.fixture(scope="module")
def vanilla():
    """With its activations recorded, as a penalty has them: some of them nothing else would keep."""
    return kept(sides.suite(CNN11.cfg("cnn11"), lambda trainer: setattr(trainer, "recorded", (True, False))).step)


def test_activations_that_nothing_reads_are_not_kept(vanilla):
    assert 4 * 4 * 350_460 < kept(sides.suite(CNN11.cfg("cnn11")).step) < vanilla


@pytest.mark.parametrize("name", EDITS)
def test_penalties_on_activations_keep_nothing(name, vanilla):
    log = 4 * 4  # four zeros, until the backward has measured
    assert vanilla > 4 * 4 * 350_460
    assert kept(sides.suite(CNN11.method("cnn11", name)).step) == vanilla + log


def test_a_penalty_that_keeps_something_is_seen(vanilla, monkeypatch):
    monkeypatch.setattr(ActivationPenalty, "edit", lambda self, h, place, gradient: gradient)
    monkeypatch.setattr(activation, "partial", lambda edit, h, place: partial(edit, h.clone(), place))
    cloned = kept(sides.suite(CNN11.method("cnn11", "l2")).step)
    assert cloned >= vanilla + 4 * 4 * 350_460


@pytest.mark.parametrize("name", EDITS)
def test_penalties_on_activations_do_not_read(name):
    calls, reads = usual_count(sides.suite(CNN11.method("cnn11", name)).step)
    assert reads == 0
    assert calls <= CALLS[name]


def test_gates_are_those_of_the_table():
    assert methods.CALLS_GOOD == {"suite": "a <= 190", "itdm_c": "a <= 520"}
    assert {*methods.KEPT_GOOD} == {*EDITS}
