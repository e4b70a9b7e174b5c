"""The labels that LaMix learns: what the probe measures and leaves alone, and what figures 2 to 6 make of runs."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from trainers import buffers, config, data_home, parameters, same, train, trainer

from experiments import board, store
from experiments.config import ConfigError, Runtime
from experiments.figure import Runs
from experiments.figures import labels, progress, sweep, targets
from experiments.spec import Column, Row, Table
from experiments.train import folder
from experiments.train import train as run_training
from experiments.trainer import Trainer

__all__ = ["data_home"]  # a fixture
pytestmark = pytest.mark.usefixtures("one_thread")
PROBE = ["method=lamix", "probe=soft_labels", "probe.samples=40"]
CNN11 = ["model=cnn11", "++dataset.size=32", "dataset=cifar10", "dataset.source=embedded"]


@pytest.fixture(scope="module")
def measured(one_thread: None, data_home: None) -> Trainer:
    """Two epochs with the probe."""
    return train(*PROBE)


def test_rows_at_the_start_and_after_each_epoch(measured: Trainer) -> None:
    rows = measured.rows
    assert [(row["step"], row["epoch"]) for row in rows] == [(0, 0), (5, 1), (10, 2)]
    for row in rows:
        counts = {name: [row[f"histogram/{name}/{place:02d}"] for place in range(100)] for name in ("target", "global")}
        assert all(sum(values) == 400 for values in counts.values()) and "histogram/target/100" not in row
        assert sum(counts["global"][24:]) == 0  # above 0.232
        assert 0.1 < row["soft_labels/second"] <= row["soft_labels/first"] <= 0.232 and row["soft_labels/target_largest"] <= 0.6161
    assert rows[0]["soft_labels/first"] != rows[1]["soft_labels/first"] != rows[2]["soft_labels/first"]


@pytest.mark.parametrize("words", [[], pytest.param(CNN11, marks=pytest.mark.slow)], ids=["bn", "dropout"])
def test_measuring_changes_nothing(words: list[str]) -> None:
    plain, probed = train(*words, "method=lamix", epochs=1), train(*words, *PROBE, epochs=1)
    assert same(parameters(plain), parameters(probed)) and same(buffers(plain), buffers(probed))
    rows = [{key: value for key, value in row.items() if not key.startswith(("soft_labels", "histogram"))} for row in probed.rows[1:]]
    assert same(plain.rows, rows) and probed.net.training


def test_values_by_hand(measured: Trainer) -> None:
    method, seen = measured.regularizers["lamix"], {}
    joined = method.joined
    method.joined = lambda local, h: seen.update(local=local, h=h) or joined(local, h)
    row = measured.probe.measure(measured, 2)
    method.joined = joined
    assert same(row, {key: value for key, value in measured.rows[-1].items() if key in row})
    u = (seen["h"] @ method.head.weight.T + method.head.bias).detach().double()
    e = torch.exp(1 / (1 + torch.exp(-u)))
    p = (e / e.sum(1, keepdim=True)).numpy()
    t = 0.5 * seen["local"].double().numpy() + 0.5 * p
    for name, values in (("global", p), ("target", t)):
        counts = np.histogram(values.astype(np.float32), 100, (0, 1))[0]
        assert [row[f"histogram/{name}/{place:02d}"] for place in range(100)] == pytest.approx(counts, abs=1)
    two = (seen["local"] > 0).sum(1).numpy() == 2
    ordered = np.sort(p[two])
    assert (row["soft_labels/first"], row["soft_labels/second"]) == pytest.approx((ordered[:, -1].mean(), ordered[:, -2].mean()))
    assert row["soft_labels/target_largest"] == pytest.approx(t.max())
    assert 20 < two.sum() < 40  # a tenth of the pairs are of one class


def test_a_run_without_a_learned_label_is_bad_input_and_no_failed_run(tmp_path: Path) -> None:
    for words in (["method=mixup"], ["method=lamix", "method.lamix.beta=1"], ["method=lamix", "method.lamix.global_label=uniform"]):
        cfg = config(*words, "probe=soft_labels", f"runtime.runs={tmp_path}")
        with pytest.raises(ConfigError, match=r"^probe: soft_labels looks at the label that method lamix learns, and this run has none"):
            run_training(cfg)
        assert folder(cfg).state == "missing" and not folder(cfg).error()


def test_tensorboard_gets_histograms(tmp_path: Path) -> None:
    writer = SummaryWriter(str(tmp_path))
    board.add(writer, {"step": 7.0, "epoch": 1.0, "test/ce": 0.5, "histogram/p/00": 3.0, "histogram/p/01": 0.0, "histogram/p/02": 1.0})
    writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["scalars"] == ["test/ce"] and events.Tags()["histograms"] == ["histogram/p"]
    [event] = events.Histograms("histogram/p")
    value = event.histogram_value
    assert event.step == 7 and (value.num, value.sum) == (4, pytest.approx(3 / 6 + 5 / 6))
    assert list(value.bucket_limit) == pytest.approx([1 / 3, 2 / 3, 1]) and list(value.bucket) == [3, 0, 1]


def runs(tmp_path: Path, rows: list[Row], evaluations: dict[str, list[dict[str, float]]], seeds: list[int]) -> Runs:
    """One column, one run for each row, choice and seed: its evaluations are those of "row choice seed"."""
    done, lines = {}, []
    for name, written in evaluations.items():
        row, choice, seed = name.split("/")
        run = store.Run(tmp_path / name.replace("/", "-"))
        run.path.mkdir(parents=True)
        run.log(written)
        run.finish({})
        done[run.path.name] = run
        lines.append({"row": row, "choice": choice, "column": "ACC", "seed": int(seed), "id": run.path.name})
    table = Table("t", columns={"ACC": Column("test/accuracy")}, rows=rows, seeds=seeds)
    return Runs(table, pd.DataFrame(lines), done, OmegaConf.structured(Runtime))


def accuracy(value: float) -> list[dict[str, float]]:
    return [{"step": 1, "epoch": 1, "test/accuracy": value}]


def test_targets_are_means_over_the_steps_of_each_kind(tmp_path: Path) -> None:
    """Of a real run, whose epochs have two or three mixed steps of five, against its steps one by one."""
    made, seen = trainer("method=lamix", "epochs=3"), []
    take_step = made.take_step

    def watched(*samples: torch.Tensor) -> None:
        take_step(*samples)
        top = made.target.sort(1, descending=True).values[:, :5].mean(0).tolist()
        seen.append((bool(made.regularizers["lamix"].mixed), top))

    made.take_step = watched
    for _ in range(3):
        made.train_epoch()
    drawing = targets.draw(runs(tmp_path, [Row("LaMix")], {"LaMix//1": made.rows, "LaMix//2": made.rows}, [1, 2]))
    for kind, which in (("mixed", [True]), ("clean", [False]), ("all", [True, False])):
        for place in range(5):
            wanted = statistics.mean(top[place] for mixed, top in seen if mixed in which)
            mine = drawing.numbers.query(f"kind == {kind!r} and place == {place + 1} and seed == 1")
            assert mine["value"].tolist() == pytest.approx([wanted], rel=1e-5)
    means = drawing.numbers.query("kind == 'mixed' and seed == 1")["value"]
    assert drawing.lines[0] == "LaMix, mixed: " + ", ".join(f"{value:.3f} ± 0.000" for value in means)
    with pytest.raises(ConfigError, match="no run has targets of method lamix"):
        targets.draw(runs(tmp_path / "x", [Row("plain")], {"plain//1": accuracy(1)}, [1]))


def test_labels_are_drawn_as_shares(tmp_path: Path, measured: Trainer) -> None:
    drawing = labels.draw(runs(tmp_path, [Row("LaMix")], {"LaMix//1": measured.rows}, [1]))
    drawn = drawing.picture.axes[1].collections[0].get_array()
    counts = np.array([[row[f"histogram/global/{place:02d}"] for place in range(100)] for row in measured.rows])
    np.testing.assert_allclose(drawn.filled(0), counts / 400)
    first, last = (measured.rows[i] for i in (1, -1))
    assert f"{first['soft_labels/first']:.3f} and {first['soft_labels/second']:.3f}" in drawing.lines[0]
    grew = sum(last[key] - first[key] for key in ("soft_labels/first", "soft_labels/second")) > 0
    assert drawing.lines[2].endswith(": seen" if grew else ": not seen")
    assert drawing.picture.axes[0].get_ylim() == (2.5, -0.5)  # from top to bottom
    with pytest.raises(ConfigError, match="its base needs probe=soft_labels"):
        labels.draw(runs(tmp_path / "x", [Row("plain")], {"plain//1": accuracy(1)}, [1]))


def test_a_sweep_is_bars_and_lines(tmp_path: Path) -> None:
    swept = Row("swept", grid={"method.x.beta": [0.1, 0.5, 1]}, paper={"0.5": {"ACC": 80.5}})
    rows = [swept, Row("other", paper={"ACC": 70.0})]
    values = {"swept/0.1": (60, 62), "swept/0.5": (70, 74), "swept/1": (69, 69), "other/": (75, 76)}
    made = runs(tmp_path, rows, {f"{name}/{seed}": accuracy(pair[seed - 1]) for name, pair in values.items() for seed in (1, 2)}, [1, 2])
    drawing = sweep.draw(made, "beta", plateau=[0.5, 1])
    assert drawing.lines[:4] == [
        "beta = 0.1: 61.00 ± 1.41, 0.5: 72.00 ± 2.83, 1: 69.00 ± 0.00",
        "best at beta = 0.5 (paper: 0.5, 80.5)",
        "other 75.50: the best beta is 3.50 worse",
        "from 0.5 to 1 they differ by 3.00, in all by 11.00 (paper: similar there)",
    ]
    axis = drawing.picture.axes[0]
    assert [bar.get_height() for bar in axis.patches] == [61, 72, 69] and axis.get_ylim()[0] < 60
    assert [text.get_text() for text in axis.get_xticklabels()] == ["0.1", "0.5", "1"]
    rows[1].grid = {"method.y.beta": [1]}
    with pytest.raises(ConfigError, match="'other' has a grid too"):
        sweep.draw(made, "beta")


def test_a_long_training_with_its_floor(tmp_path: Path) -> None:
    """The loss minus the entropy of its target; without a soft target that is 0."""
    curves: dict[str, list[dict[str, float]]] = {}
    for name, floor in (("LaMix//1", 1.5), ("Mixup//1", 0.3), ("plain//1", 0.0)):
        entropy = {"train/target_entropy": floor} if floor else {}
        rows = [{"step": e, "epoch": e, "train/ce": floor + 1 / e, "test/accuracy": 90 - abs(e - 20)} for e in range(1, 41)]
        curves[name] = [row | entropy for row in rows]
    drawing = progress.draw(runs(tmp_path, [Row("LaMix"), Row("Mixup"), Row("plain")], curves, [1]))
    divergence = drawing.numbers.query("metric == 'divergence'").groupby("row")["value"].apply(list)
    assert all(values == pytest.approx([1 / e for e in range(1, 41)]) for values in divergence)
    end = statistics.mean([1 / 39, 1 / 40])
    assert drawing.lines[0] == (
        f"LaMix, last twentieth of the epochs: training loss {1.5 + end:.4f}, of it the target's entropy 1.5000; "
        "accuracy 70.50 %, 19.00 below its best twentieth"
    )
    assert drawing.lines[-1].startswith("LaMix's training loss stays higher (paper): seen;")
    assert math.isclose(drawing.picture.axes[1].lines[2].get_ydata()[-1], 1 / 40)
