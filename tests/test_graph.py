"""The recorded step: what is replayed, what is not, and that nothing changes by it; on a GPU, that a step never makes the host wait."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from device_steps import CASES, Forbidden, Run
from nets import IMAGE, TEXT, composed, small
from torch import Generator
from trainers import COMPOSED, data_home, same, train, trainer

from experiments import graph
from experiments.graph import WARM_UP, Replayed
from experiments.trainer import Trainer

__all__ = ["data_home"]  # a fixture
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PARTIAL = ["batch_size=30", "epochs=3", "schedule.at=[1,2]"]  # 100 samples: three full batches and a smaller one


class Recorder:
    """Stands in for `graph.record` where there is no GPU: a replay runs the recorded work.

    The first replay follows the recording at once and stands for it. Each later one must send the same to the device: the same
    operations on tensors of the same shapes, with the same numbers, which read what was there before from the same memory. The host must
    not read from the device, nor send it a constant; draws must be of a registered generator, or torch's own.
    """

    def __init__(self) -> None:
        self.seen: list[list[int]] = []  # of each recording, a 1 for each replay

    def __call__(self, work: Callable[[], None], rngs: Iterable[Generator], first: Any) -> Any:
        assert (first is None) == (not self.seen), "all recordings share the memory of the first"
        mine: list[int] = []
        self.seen.append(mine)
        registered, recorded = list(rngs), []

        def replay() -> None:
            with Run(registered) as run:
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


def replayed(*overrides: str, epochs: int = 3) -> Trainer:
    made = trainer(*overrides)
    made.replayed = Replayed(made.step_on, made.rngs.values())
    for _ in range(epochs):
        made.train_epoch()
    return made


@pytest.mark.parametrize("words", [[f"method={COMPOSED}", *PARTIAL], [*small("lstm"), "method=per", "epochs=3", "profile.train=180"]])
def test_replayed_steps_are_the_steps(words: list[str], recordings: list[list[int]]) -> None:
    """Three epochs of three full batches and a smaller one, which runs as it is; or of windows, which go on from the last one's state."""
    made = replayed(*words)
    assert same(made.state()["net"], train(*words, epochs=3).state()["net"])
    assert "model=lstm" in words or [row["lr"] for row in made.rows] == pytest.approx([0.05, 0.01, 0.002])
    assert recordings == [[1] * (9 - WARM_UP)]


QUICK = ["vanilla", "itdm_j", "lamix", "per", "itdm_c, bf16", "cutmix", "mixup", "lamix_puzzle", "three", "lenet", "lstm, fused"]
REST = [case for case in CASES if case not in (*QUICK, "itdm_c, unbalanced")]  # which counts its classes on a CPU, and there alone


@pytest.mark.parametrize("case", [*QUICK, *[pytest.param(case, marks=pytest.mark.slow) for case in REST]])
def test_every_step_can_be_recorded(case: str, recordings: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps of models, of which some take long; six of methods, which may take turns."""
    monkeypatch.setattr(graph, "WARM_UP", 1)
    epochs = 2 if case in IMAGE else 3
    words = [*CASES[case], f"epochs={epochs}", f"evaluate.every={epochs}", *(["profile.steps=3"] if case in IMAGE else [])]
    made, eager = replayed(*words, epochs=epochs), train(*words, epochs=epochs).state()
    assert max(map(len, recordings)) > 1 and len(recordings) == len(made.replayed.graphs)
    assert case != "lamix" or len(recordings) == 2  # clean and mixed batches
    assert all(same(made.state()[part], eager[part]) for part in ("net", "methods", "optimizer", "rngs", "rows"))


def test_what_a_recording_forbids_is_seen(recordings: list[list[int]]) -> None:
    kept, rng, turn = torch.zeros(3), torch.Generator(), itertools.count()
    for said, work in {
        "_local_scalar_dense.default: the host waits": lambda x: kept.add_(float(x.sum())),
        "operation 0 of the replay is .*recorded was .*new_zeros": lambda x: kept.new_zeros(1 + next(turn)),
        "operation 0 of the replay is .*recorded was .*add_": lambda x: kept.add_(next(turn)),
        "operation [0-9]+ of the replay is": lambda x: [kept.add_(1) for _ in range(next(turn))],
        "normal_.default: the generator is not registered": lambda x: kept.normal_(generator=rng),
    }.items():
        recordings.clear()
        step = Replayed(work, [])
        with pytest.raises(Forbidden, match=said):
            for _ in range(WARM_UP + 2):
                step(None, torch.arange(3))


# On a GPU


@on_gpu
@pytest.mark.parametrize("model", [*IMAGE, *TEXT])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_a_step_on_a_gpu_does_not_wait(model: str, precision: str) -> None:
    made = trainer(*small(model), f"method={composed(model)}", f"precision={precision}", "runtime.device=cuda")
    first, second = list(made.samples())
    made.take_step(*first)
    torch.cuda.set_sync_debug_mode("error")
    try:
        made.take_step(*second)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
@pytest.mark.parametrize(("model", "method"), [(model, composed(model)) for model in (*IMAGE, *TEXT)] + [("net2c", "vanilla")])
def test_graph_is_eager_within_rounding(model: str, method: str) -> None:
    """Few steps, so that rounding has no time to grow; all are replayed but the first ones."""
    words = [*small(model), f"method={method}", "profile.train=100", "epochs=1", "optim.lr=0.001", "runtime.device=cuda"]
    eager, recorded = train(*words, epochs=1), train(*words, "step=graph", epochs=1)
    assert isinstance(recorded.replayed, Replayed) and recorded.replayed.graphs
    assert recorded.rows[0]["train/ce"] == pytest.approx(eager.rows[0]["train/ce"], rel=1e-3)
    for name, value in eager.net.state_dict().items():
        torch.testing.assert_close(recorded.net.state_dict()[name], value, rtol=1e-2, atol=1e-3)
    assert same(eager.state()["rngs"]["data"].cpu(), recorded.state()["rngs"]["data"].cpu())
