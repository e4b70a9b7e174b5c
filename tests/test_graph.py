"""The recorded step: what is replayed, what is not, and that nothing changes by it; on a GPU, that a step never makes the host wait."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from nets import IMAGE, TEXT, composed, small
from test_trainer import COMPOSED, data_home, same, train, trainer

from experiments import graph
from experiments.graph import WARM_UP, Replayed
from experiments.trainer import Trainer

__all__ = ["data_home"]  # a fixture
BOTH = [(model, method) for model in (*IMAGE, *TEXT) for method in ("vanilla", composed(model))]
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PARTIAL = ["batch_size=30", "epochs=3", "schedule.at=[1,2]"]  # 100 samples: three full batches and a smaller one


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Recording without a GPU: a replay runs the recorded work again. Gives, for each recording, how many samples each replay saw."""
    seen: list[list[int]] = []

    def record(work: Callable[[], None], rngs: object, pool: object) -> tuple[Callable[[], None], str]:
        seen.append([])
        mine = seen[-1]
        return lambda: (work(), mine.append(1))[0], "pool"

    monkeypatch.setattr(graph, "record", record)
    monkeypatch.setattr(graph, "aside", lambda work: work())
    return seen


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
    words = [f"method={method}", "batch_size=10", "epochs=4", "schedule.at=[2,3]"]
    made = replayed(*words)
    for _ in range(4):
        made.train_epoch()
    assert same(made.state()["net"], train(*words, epochs=4).state()["net"])
    assert len(recordings) == len(made.replayed.replays) == branches
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
        patch.setattr(graph, "record", lambda work, rngs, pool: (work, pool))
        patch.setattr(graph, "aside", lambda work: work())
        for number in range(6):
            step(None, torch.full((2,), number), torch.full((2,), 10 * number))
        step(None, torch.full((1,), 7), torch.full((1,), 70))
        step(None, torch.full((2,), 8), torch.full((2,), 80))
    assert seen == [[number, 10 * number] for number in (0, 1, 2, 3, 4, 5, 7, 8)]


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
