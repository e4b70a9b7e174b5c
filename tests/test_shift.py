"""The figure of accuracy and EM distance: the lines about drops of the learning rate; kept states give a run's own distances."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from trainers import config, data_home, same

from experiments.config import ConfigError, Runtime
from experiments.figure import Runs
from experiments.figures import shift
from experiments.identity import run_id
from experiments.spec import Column, Row, Table
from experiments.store import Run
from experiments.train import folder, train

__all__ = ["data_home"]  # a fixture


def rows_of(rates: list[float], distances: list[float], accuracies: list[float]) -> pd.DataFrame:
    rows = pd.DataFrame({"lr": rates, shift.EM: distances, shift.ACCURACY: accuracies})
    return rows.assign(**{"epoch": range(1, len(rows) + 1), shift.LOGIT: 10 * rows[shift.EM]})


def test_means_on_both_sides_of_a_drop() -> None:
    """Of five epochs, or as many as there are before the first drop and between two."""
    rates = [0.1] * 7 + [0.02] * 2 + [0.004] * 3
    rows = rows_of(rates, [9, 9, 1, 2, 3, 4, 5, 0.5, 1.5, 3, 5, 7], [*range(1, 8), 60, 70, 60, 70, 80])
    assert shift.drops(rows) == [8, 10]
    assert shift.around(rows) == [
        "drop at epoch 8, means of the 2 epochs before -> after: accuracy 6.5 -> 65, mean d 4.5 -> 1, before the sigmoid 45 -> 10",
        "drop at epoch 10, means of the 2 epochs before -> after: accuracy 65 -> 65, mean d 1 -> 4, before the sigmoid 10 -> 40",
        "at 2 drops accuracy rises 1 times and d falls 1 times (paper: both each time, sharply)",
    ]
    wide = rows_of([0.1] * 8 + [0.02] * 8, [1.0] * 3 + [2.0] * 5 + [1.0] * 5 + [9.0] * 3, [1.0] * 8 + [2.0] * 8)
    assert "means of the 5 epochs before -> after: accuracy 1 -> 2, mean d 2 -> 1," in shift.around(wide)[0]
    assert shift.around(rows_of([0.1] * 3, [0.3, 0.2, 0.1], [1, 2, 3])) == [
        "no drop of the learning rate; mean d 0.3 at first, 0.1 at last"
    ]


def runs(*words: str, root: Path) -> tuple[Runs, Run]:
    cfg = config("norm=unitization", f"runtime.runs={root}", "schedule.at=[1]", *words)
    train(cfg)
    run = folder(cfg)
    identity = run.path.name[-10:]
    table = Table("t", columns={"accuracy": Column("test/accuracy")}, rows=[Row("run")])
    wanted = pd.DataFrame([{"row": "run", "choice": "", "column": "accuracy", "seed": 1, "id": identity}])
    return Runs(table, wanted, {identity: run}, OmegaConf.structured(Runtime(device="cpu", threads=1, runs=str(root)))), run


def test_kept_states_give_the_run_s_own_distances(tmp_path: Path) -> None:
    probe = ["probe=covariate_shift", "probe.layers=[2,3]", "probe.steps=4", "probe.batch=8", "probe.images=50"]
    made, run = runs(*probe, "epochs=3", "runtime.keep_weights=1", root=tmp_path)
    inside, outside, logged = shift.draw(made), shift.kept(made, 4, 8, [2, 3], 50), run.metrics()
    assert len(inside.numbers) == 3 * 7 and inside.numbers.drop(columns="source").equals(outside.numbers.drop(columns="source"))
    assert all(line.value == logged[int(line.epoch) - 1][line.metric] for line in inside.numbers.itertuples())
    assert inside.lines == outside.lines and "run, seed 1: drop at epoch 2, means of the 1 epochs" in inside.lines[0]
    with pytest.raises(ConfigError, match=r"^probe: steps: 0 is not allowed; it must be above 0$"):
        shift.kept(made, 0, 8)


def test_states_of_every_other_epoch_and_of_a_last_part(tmp_path: Path) -> None:
    """After 3.4 epochs; by default of the last six layers, here all."""
    made, run = runs("iterations=17", "evaluate.every=2", "runtime.keep_weights=2", root=tmp_path)
    assert [path.name for path in sorted(run.path.glob("weights-*"))] == [f"weights-000{epoch}.pt" for epoch in (0, 2, 4)]
    numbers = shift.kept(made, steps=2, batch=8, images=50).numbers
    assert numbers["epoch"].unique().tolist() == [2, 3.4]
    assert {name for name in numbers["metric"] if name.endswith("/em")} == {"layer1/em", "layer2/em", "layer3/em", "shift/em"}
    last, state = (torch.load(run.path / f"{name}.pt", weights_only=True) for name in ("weights-0004", "checkpoint"))
    assert same(dict(last), dict(state["net"]))


def test_a_run_that_kept_nothing_is_refused_in_one_line(tmp_path: Path) -> None:
    made, run = runs("epochs=1", root=tmp_path)
    said = f"{run.path} kept 0 states of its network, and two are needed; a run keeps them with runtime.keep_weights=1"
    with pytest.raises(ConfigError, match=said):
        shift.kept(made, 1, 8)
    with pytest.raises(ConfigError, match=r"has no shift/em; its base needs probe=covariate_shift"):
        shift.draw(made)
    assert run_id(config("epochs=2")) == run_id(config("epochs=2", "runtime.keep_weights=1"))  # is not part of a run's identity
