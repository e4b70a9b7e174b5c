"""What a step may cost in operations, host reads and memory: gates that hold on any machine."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from counts import Calls, count, kept, usual_count
from torch import Tensor

from experiments.bench.measure import Asked, suite
from experiments.bench.peers import minimal

pytestmark = pytest.mark.usefixtures("one_thread")
ONE = ["runtime.threads=1", "runtime.device=cpu"]


def test_count_sees_operations_and_host_reads():
    x = torch.arange(6.0).requires_grad_()
    assert count(lambda: x.view(2, 3).t().add(1).mul(2)) == (2, 0)
    assert count(lambda: x.sum().item()) == (2, 1) and count(lambda: x[x > 2])[1] == 1 and count(lambda: x[torch.tensor([0, 1])])[1] == 0
    assert count(lambda: (x * 2).sum().backward())[0] >= 3  # the backward is counted too


def test_kept_counts_what_is_made_and_held_once_whoever_holds_it():
    weight, x = torch.ones(10, 10, requires_grad=True), torch.ones(5, 10)
    held: list[Tensor] = []

    def bytes_of(use):
        return kept(lambda: use((x @ weight).exp()).backward())

    def hooked(h, mine):
        h.register_hook(partial(torch.add, mine))
        return h.sum()

    loss, matrix = 4 + 4, 4 * 50  # the sum, and its own gradient of 1
    assert bytes_of(lambda h: h.view(10, 5).t().neg().sum()) == matrix + loss  # exp's result; x and weight were there; a view is no storage
    assert bytes_of(lambda h: h.neg().relu_().sum()) == 2 * matrix + loss  # relu's result, in place
    assert bytes_of(lambda h: hooked(h, h.detach())) == matrix + loss  # exp's result again
    assert bytes_of(lambda h: hooked(h, h.detach().clone())) == 2 * matrix + loss  # this copy is the hook's own
    assert bytes_of(lambda h: held.append(h.neg()) or h.sum()) == 2 * matrix + loss


# A whole step of ResNet-18, with crop and flip.

RESNET = Asked(["batch_size=4", *ONE])


def test_a_step_sends_and_keeps_no_more_than_the_minimal_loop():
    cfg, ours = RESNET.cfg("resnet18"), []
    side, loop = suite(cfg, ours.append), minimal(cfg)
    (calls, reads), (loop_calls, loop_reads) = usual_count(side.step), usual_count(loop.step)
    assert calls <= min(190, loop_calls + 10) and reads == loop_reads == 0
    with Calls() as update:
        ours[0].optimizer.step()
    assert "aten._fused_sgd_.tensor_lr" in update.names and len(update.kernels) <= 6 and ours[0].bundle.augment is not None
    bytes_ours, bytes_loop = kept(side.step), kept(loop.step)
    assert 4 * 2**20 < bytes_loop < 1.1 * bytes_ours and bytes_ours <= 1.1 * bytes_loop


def test_itdm_has_no_loop_over_classes():
    calls, reads = usual_count(suite(Asked(["batch_size=20", *ONE]).cfg("net5c", "method=itdm_c")).step)
    assert calls <= 520 and reads == 0


# Penalties on activations keep nothing: what PER's directions take, and even a copy of the smallest activation, would show.

BATCH, UNITS = 4, 350_460
CNN11 = Asked([f"batch_size={BATCH}", "method.per.slices=8", *ONE])
CALLS = {"per": 450, "per toeplitz": 490, "per analytic": 330, "l1": 260, "l2": 260}  # with one block of directions; vanilla: 104


@pytest.fixture(scope="module")
def vanilla():
    """With its activations recorded, as a penalty has them: some of them nothing else would keep."""
    return kept(suite(CNN11.cfg("cnn11"), lambda trainer: setattr(trainer, "recorded", (True, False))).step)


@pytest.mark.parametrize("name", CALLS)
def test_penalties_on_activations_keep_nothing_and_do_not_read(name, vanilla):
    step = suite(CNN11.method("cnn11", name)).step
    assert kept(step) == vanilla + 4 * 4  # four zeros for the log, until the backward has measured
    calls, reads = usual_count(step)
    assert calls <= CALLS[name] and reads == 0


def test_windows_of_text_keep_little_for_penalties():
    asked = Asked(["model.width=8", "profile.train=2000", "dataset=docs", "dataset.bptt=5", "method.per.slices=8", *ONE])
    bytes_per_window = {name: kept(suite(asked.method("lstm", name)).step) / 20 for name in ("vanilla", "per", "l1", "l2")}
    for name in ("per", "l1", "l2"):
        # at each of two taps four numbers, and the activations (five words, eight units), which vanilla does not keep
        assert bytes_per_window[name] - bytes_per_window["vanilla"] <= 2 * 4 * (4 + 5 * 8), name


@pytest.mark.slow
def test_unitization_keeps_little_more_than_bn():
    asked = Asked(["++dataset.size=8", "dataset.padding=0", "batch_size=10", *ONE])
    ours, bn = (suite(asked.cfg("preact_resnet20", *words)).step for words in (["norm=unitization"], ["norm=bn", "norm.eps=1e-3"]))
    assert usual_count(ours)[1] == 0
    # a map for each layer, as BN keeps, and three numbers for each of its channels, which have as few as four pixels
    assert 1 < kept(ours) / kept(bn) < 1.3
