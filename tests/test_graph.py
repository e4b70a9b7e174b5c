"""The recorded step: what is replayed, what is not, and that nothing changes by it; on a GPU, that a step never makes the host wait."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from device_steps import CASES, FEW, Forbidden, Run
from nets import IMAGE, TEXT, composed, small
from test_trainer import COMPOSED, data_home, same, train, trainer
from torch import Generator, Tensor

from experiments import graph
from experiments.graph import WARM_UP, Replayed
from experiments.trainer import Trainer

__all__ = ["data_home"]  # a fixture
BOTH = [(model, method) for model in (*IMAGE, *TEXT) for method in ("vanilla", composed(model))]
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
RECORDED = [case for case in CASES if case != "itdm_c, unbalanced"]  # which counts its classes on a CPU, and there alone
PARTIAL = ["batch_size=30", "epochs=3", "schedule.at=[1,2]"]  # 100 samples: three full batches and a smaller one


class Recorder:
    """Stands in for `graph.record` where there is no GPU: a replay runs the recorded work.

    It must send to the device what the first one sent, which follows the recording at once, and stands for it: the same operations on
    tensors of the same shapes, with the same numbers, reading what was there before from the same memory. The host must not read from
    the device, nor send it a constant; draws must be of a registered generator, or torch's own. All recordings share the memory of the
    first one.
    """

    def __init__(self) -> None:
        self.seen: list[list[int]] = []  # of each recording, a 1 for each replay

    def __call__(self, work: Callable[[], None], rngs: Iterable[Generator], first: Any) -> Any:
        assert (first is None) == (not self.seen), "a recording has memory of its own"
        mine: list[int] = []
        self.seen.append(mine)
        known, recorded = list(rngs), []

        def replay() -> None:
            with Run(known) as run:
                work()
            if not mine:
                recorded.extend(run.calls)
            for number, (first, now) in enumerate(itertools.zip_longest(recorded, run.calls)):
                if first != now:
                    raise Forbidden(f"operation {number} of the replay is {now}; recorded was {first}")
            mine.append(1)

        return SimpleNamespace(replay=replay)


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Recording without a GPU. Gives, for each recording, how many samples each replay saw."""
    recorder = Recorder()
    monkeypatch.setattr(graph, "record", recorder)
    monkeypatch.setattr(graph, "aside", lambda work: work())
    return recorder.seen


def replayed(*overrides: str) -> Trainer:
    made = trainer(*overrides)
    made.replayed = Replayed(made.step_on, made.rngs.values())
    return made


@pytest.mark.parametrize("method", ["vanilla", "itdm_c", COMPOSED])
def test_replayed_steps_are_the_steps(method: str, recordings: list[list[int]]) -> None:
    made = replayed(f"method={method}", *PARTIAL)
    for _ in range(3):
        made.train_epoch()
    assert same(made.state()["net"], train(f"method={method}", *PARTIAL, epochs=3).state()["net"])
    assert [row["lr"] for row in made.rows] == pytest.approx([0.05, 0.01, 0.002])
    assert recordings == [[1] * (9 - WARM_UP)]  # of nine full batches; the smaller ones run as they are


@pytest.mark.parametrize(("method", "branches"), [("lamix", 2), ("puzzlemix", 2), ("lamix_puzzle", 3), ("[puzzlemix,lamix]", 4)])
def test_each_branch_is_recorded(method: str, branches: int, recordings: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """LaMix's clean and mixed batches, PuzzleMix's grids: two of them, on digits. What is replayed is what was chosen."""
    monkeypatch.setattr(graph, "WARM_UP", 1)
    words = [f"method={method}", *FEW.get(method, []), "batch_size=10", "epochs=4", "schedule.at=[2,3]"]
    made = replayed(*words)
    for _ in range(4):
        made.train_epoch()
    assert same(made.state()["net"], train(*words, epochs=4).state()["net"])
    assert len(recordings) == len(made.replayed.graphs) == branches
    assert sum(map(len, recordings)) == 40 - branches


def test_replayed_windows_are_the_windows(recordings: list[list[int]]) -> None:
    """Each goes on from the state that the last one left, whether that was replayed or not."""
    words = [*small("lstm"), "method=per", "profile.train=180", "epochs=3"]  # ten columns of 17: three windows of 5 and one of 2
    made = replayed(*words)
    for _ in range(3):
        made.train_epoch()
    assert same(made.state()["net"], train(*words, epochs=3).state()["net"])
    assert recordings == [[1] * (9 - WARM_UP)]


def test_what_changes_between_steps_stays_where_it_is(recordings: list[list[int]]) -> None:
    """A recording goes on reading and writing the tensors that it has seen: rate, sums, weights, momentum, parameters of methods."""
    made = replayed("method=itdm_c", *PARTIAL)

    def places() -> list[int]:
        state = [value for slot in made.optimizer.state.values() for value in slot.values()]
        rates = [group["lr"] for group in made.optimizer.param_groups]
        weights = [method.weight for method in made.regularizers.values()]
        return [one.data_ptr() for one in (*made.net.state_dict().values(), *state, *rates, *weights, *made.sums.values())]

    made.train_epoch()
    before = places()
    assert len(before) > 20
    made.train_epoch()
    made.evaluate("test")
    assert places() == before


def test_samples_are_copied_to_where_the_recording_reads_them() -> None:
    seen: list[list[int]] = []
    step = Replayed(lambda *samples: seen.append([int(one[0]) for one in samples]), [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, "record", lambda work, rngs, first: SimpleNamespace(replay=work))
        patch.setattr(graph, "aside", lambda work: work())
        for number in range(6):
            step(None, torch.full((2,), number), torch.full((2,), 10 * number))
        step(None, torch.full((1,), 7), torch.full((1,), 70))
        step(None, torch.full((2,), 8), torch.full((2,), 80))
    assert seen == [[number, 10 * number] for number in (0, 1, 2, 3, 4, 5, 7, 8)]


@pytest.mark.parametrize("case", RECORDED)
def test_every_step_can_be_recorded(case: str, recordings: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps of models, of which some take long; six of methods, which may take turns."""
    monkeypatch.setattr(graph, "WARM_UP", 1)
    epochs = 2 if case in IMAGE else 3
    words = [*CASES[case], f"epochs={epochs}", f"evaluate.every={epochs}", *(["profile.steps=3"] if case in IMAGE else [])]
    made = replayed(*words)
    for _ in range(epochs):
        made.train_epoch()
    eager = train(*words, epochs=epochs).state()
    assert recordings and max(map(len, recordings)) > 1
    assert all(same(made.state()[part], eager[part]) for part in ("net", "methods", "optimizer", "rngs", "rows"))


# What the stand-in is for, it sees

kept, other, drawn = torch.zeros(3), [torch.zeros(3), torch.ones(3)], torch.Generator()
turn = itertools.count()
FAULTS: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "a host read": (lambda x: kept.add_(float(x.sum())), "_local_scalar_dense.default: the host waits"),
    "a mask": (lambda x: x[x > 0], "index.Tensor: the host waits"),
    "a constant": (lambda x: x * torch.tensor(2), "lift_fresh.default: a constant comes from the host"),
    "another branch": (lambda x: x + x if next(turn) % 2 else x * x, "operation 0 of the replay is"),
    "another shape": (lambda x: kept.new_zeros(1 + next(turn)), "operation 0 of the replay is"),
    "another type": (lambda x: x.to([torch.float16, torch.float64][next(turn) % 2]), "operation 0 of the replay is"),
    "another number": (lambda x: kept.add_(next(turn)), "operation 0 of the replay is"),
    "other memory": (lambda x: other[next(turn) % 2].add_(1), "operation 0 of the replay is"),
    "more": (lambda x: [kept.add_(1) for _ in range(next(turn))], "operation [0-9]+ of the replay is"),
    "a generator of its own": (lambda x: kept.normal_(generator=drawn), "normal_.default: the generator is not registered"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_recording_forbids_is_seen(fault: str, recordings: list[list[int]]) -> None:
    work, said = FAULTS[fault]
    step = Replayed(work, [])
    with pytest.raises(Forbidden, match=said):
        for _ in range(WARM_UP + 2):
            step(None, torch.arange(3))


def test_registered_generators_may_be_drawn_from(recordings: list[list[int]]) -> None:
    step = Replayed(lambda x: kept.normal_(generator=drawn).add_(torch.rand(3)), [drawn])
    for _ in range(WARM_UP + 2):
        step(None, torch.arange(3))
    assert recordings == [[1, 1]]


def test_a_recording_with_memory_of_its_own_is_seen(recordings: list[list[int]]) -> None:
    step = Replayed(lambda x: x + x, [])
    for _ in range(WARM_UP + 1):
        step(0, torch.arange(3))
        step(1, torch.arange(3))
    assert len(recordings) == 2
    step.graphs.clear()
    with pytest.raises(AssertionError, match="memory of its own"):
        for _ in range(WARM_UP + 1):
            step(2, torch.arange(3))


# On a GPU


@on_gpu
@pytest.mark.parametrize(("model", "method"), BOTH)
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_a_step_on_a_gpu_does_not_wait(model: str, method: str, precision: str) -> None:
    made = trainer(*small(model), f"method={method}", f"precision={precision}", "runtime.device=cuda")
    first, second = list(made.samples())
    made.take_step(*first)
    torch.cuda.set_sync_debug_mode("error")
    try:
        made.take_step(*second)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
@pytest.mark.parametrize(("model", "method"), BOTH)
def test_graph_is_eager_within_rounding(model: str, method: str) -> None:
    """Few steps, so that rounding has no time to grow; all are replayed but the first ones."""
    words = [*small(model), f"method={method}", "profile.train=100", "epochs=1", "optim.lr=0.001", "runtime.device=cuda"]
    eager, recorded = train(*words, epochs=1), train(*words, "step=graph", epochs=1)
    assert isinstance(recorded.replayed, Replayed) and recorded.replayed.replays
    assert recorded.rows[0]["train/ce"] == pytest.approx(eager.rows[0]["train/ce"], rel=1e-3)
    for name, value in eager.net.state_dict().items():
        torch.testing.assert_close(recorded.net.state_dict()[name], value, rtol=1e-2, atol=1e-3)
    assert same(eager.state()["rngs"]["data"].cpu(), recorded.state()["rngs"]["data"].cpu())
