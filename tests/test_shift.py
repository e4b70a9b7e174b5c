"""The figure of accuracy and EM distance: what it says of drops of the learning rate; kept states give a run's own distances."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from test_trainer import config, data_home

from experiments.config import ConfigError, Runtime
from experiments.figure import Runs
from experiments.figures import shift
from experiments.identity import run_id
from experiments.spec import Column, Row, Table
from experiments.train import folder, train

__all__ = ["data_home"]  # a fixture


def known(rates: list[float], distances: list[float], accuracies: list[float]) -> pd.DataFrame:
    lines = zip(rates, distances, accuracies, strict=True)
    return pd.DataFrame(
        [{"epoch": e, "lr": r, shift.EM: d, shift.LOGIT: 10 * d, shift.ACCURACY: a} for e, (r, d, a) in enumerate(lines, 1)]
    )


def test_means_on_both_sides_of_a_drop() -> None:
    """Of five epochs, or as many as there are before the first drop and between two."""
    rates = [0.1] * 7 + [0.02] * 2 + [0.004] * 3
    found = known(rates, [9, 9, 1, 2, 3, 4, 5, 0.5, 1.5, 3, 5, 7], [*range(1, 8), 60, 70, 60, 70, 80])
    assert shift.drops(found) == [8, 10]
    assert shift.around(found) == [
        "drop at epoch 8, means of the 2 epochs before -> after: accuracy 6.5 -> 65, mean d 4.5 -> 1, before the sigmoid 45 -> 10",
        "drop at epoch 10, means of the 2 epochs before -> after: accuracy 65 -> 65, mean d 1 -> 4, before the sigmoid 10 -> 40",
        "at 2 drops accuracy rises 1 times and d falls 1 times (paper: both each time, sharply)",
    ]
    wide = known([0.1] * 8 + [0.02] * 8, [1.0] * 3 + [2.0] * 5 + [1.0] * 5 + [9.0] * 3, [1.0] * 8 + [2.0] * 8)
    assert "means of the 5 epochs before -> after: accuracy 1 -> 2, mean d 2 -> 1," in shift.around(wide)[0]
    assert shift.around(known([0.1] * 3, [0.3, 0.2, 0.1], [1, 2, 3])) == ["no drop of the learning rate; mean d 0.3 at first, 0.1 at last"]


def runs(*words: str, root: Path) -> Runs:
    cfg = config("norm=unitization", f"runtime.runs={root}", "schedule.at=[1]", *words)
    train(cfg)
    one = folder(cfg)
    identity = one.path.name[-10:]
    table = Table("t", columns={"accuracy": Column("test/accuracy")}, rows=[Row("run")])
    wanted = pd.DataFrame([{"row": "run", "choice": "", "column": "accuracy", "seed": 1, "id": identity}])
    return Runs(table, wanted, {identity: one}, OmegaConf.structured(Runtime(device="cpu", threads=1, runs=str(root))))


PROBE = ["probe=covariate_shift", "probe.layers=[2,3]", "probe.steps=4", "probe.batch=8", "probe.images=50", "epochs=3"]


def test_kept_states_give_the_run_s_own_distances(tmp_path: Path) -> None:
    made = runs(*PROBE, "runtime.keep_weights=1", root=tmp_path)
    (one,) = made.done.values()
    assert sorted(path.name for path in one.path.glob("weights-*")) == [f"weights-{epoch:04d}.pt" for epoch in range(4)]
    inside, outside = shift.draw(made), shift.kept(made, 4, 8, [2, 3], 50)
    assert len(inside.numbers) == 3 * 7 and set(inside.numbers["source"]) == {"run"}
    assert inside.numbers.drop(columns="source").equals(outside.numbers.drop(columns="source"))
    assert inside.lines == outside.lines and "run, seed 1: drop at epoch 2, means of the 1 epochs" in inside.lines[0]
    logged = one.metrics()
    for line in inside.numbers.itertuples():
        assert line.value == logged[int(line.epoch) - 1][line.metric]


def test_states_of_every_other_epoch(tmp_path: Path) -> None:
    """The last six layers, or as many as there are, where none is named; between states two epochs apart."""
    made = runs("epochs=4", "runtime.keep_weights=2", root=tmp_path)
    (one,) = made.done.values()
    assert sorted(path.name for path in one.path.glob("weights-*")) == ["weights-0000.pt", "weights-0002.pt", "weights-0004.pt"]
    numbers = shift.kept(made, steps=2, batch=8, images=50).numbers
    assert sorted(numbers["epoch"].unique()) == [2, 4]
    assert set(numbers["metric"]) == {"test/accuracy", "shift/em", "shift/em_logit"} | {
        f"layer{layer}/{name}" for layer in (1, 2, 3) for name in ("em", "em_logit")
    }
    last = torch.load(one.path / "weights-0004.pt", weights_only=True)
    state = torch.load(one.path / "checkpoint.pt", weights_only=True)["net"]
    assert all(torch.equal(value, state[name]) for name, value in last.items()) and last.keys() == state.keys()


def test_a_last_epoch_that_is_a_part_of_one(tmp_path: Path) -> None:
    made = runs("iterations=12", "evaluate.every=2", "runtime.keep_weights=1", root=tmp_path)
    numbers = shift.kept(made, 1, 8, [1], 20).numbers
    assert numbers["epoch"].unique().tolist() == [1, 2, 2.4]


def test_refused_options_are_one_line(tmp_path: Path) -> None:
    made = runs("epochs=1", "runtime.keep_weights=1", root=tmp_path)
    with pytest.raises(ConfigError, match=r"^probe: steps: 0 is not allowed; it must be above 0$"):
        shift.kept(made, 0, 8)


def test_a_run_that_kept_nothing_is_one_line(tmp_path: Path) -> None:
    made = runs("epochs=1", root=tmp_path)
    (one,) = made.done.values()
    assert not list(one.path.glob("weights-*"))
    said = f"{one.path} kept 0 states of its network, and two are needed; a run keeps them with runtime.keep_weights=1"
    with pytest.raises(ConfigError, match=said):
        shift.kept(made, 1, 8)
    with pytest.raises(ConfigError, match=r"has no shift/em; its base needs probe=covariate_shift"):
        shift.draw(made)


def test_keeping_states_is_not_part_of_a_run(tmp_path: Path) -> None:
    words = ("norm=unitization", "epochs=2")
    assert run_id(config(*words)) == run_id(config(*words, "runtime.keep_weights=1"))
