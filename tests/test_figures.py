"""Figures: the numbers that they draw, against numbers computed here, and what is said of missing and failed runs."""

from __future__ import annotations

import itertools
import math
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf
from tables import Command, written

from experiments import store
from experiments.config import ConfigError, Runtime
from experiments.figure import Runs, missing
from experiments.figure import run as task
from experiments.figures import collapse, curves, tsne, weights
from experiments.spec import Column, Row, Table

Figure = Callable[..., tuple[int, str, str]]


@pytest.fixture
def figure(command: Command, tmp_path: Path) -> Figure:
    """`python -m experiments.figure` in this process, on one step of embedded data."""
    small = [f"out={tmp_path}/out", "profile=smoke", "profile.steps=1", "profile.test=30", "batch_size=10"]
    return lambda *words: command(*words, *small, task=task, root="figures")


def test_a_figure_without_runs_has_no_plan_and_no_parts(figure: Figure, tmp_path: Path) -> None:
    plan = ": the plan\n\n- nothing to train: this figure has no runs, it is computed when it is drawn\n"
    code, out, _ = figure("figure=per_3", "plan=true")
    assert code == 0 and out.endswith(plan)
    for words, message in (
        (["figure=per_3", "only=[Huber]"], "only: this figure has no runs, so no row or column with Huber in its name; leave it out\n"),
        (["figure=per_3", "figure.draw.points=few"], "figure.draw.points: few is not allowed; it must be a whole number\n"),
        ([], "figure: nothing is chosen; allowed: covariate_shift, demo, "),
    ):
        code, out, err = figure(*words)
        assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith(f"retable: {message}")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def made(tmp_path: Path) -> Runs:
    """Two columns on the same runs, λ = 0 and 0.5, seeds 1 and 2, 12 evaluations each with one within an epoch."""
    rng = np.random.default_rng(0)
    done, lines = {}, []
    keys = ("train/ce", "test/ce", "test/accuracy", "test/feature_rms")
    for (row, choice), seed in itertools.product((("plain", ""), ("with", "0.5")), (1, 2)):
        name = f"{row}-{seed:010d}"
        run = done[name] = store.Run(tmp_path / name)
        run.path.mkdir()
        run.log([{"step": 10 * at, "epoch": at} | dict(zip(keys, rng.uniform(1, 90, 4), strict=True)) for at in [*range(1, 12), 11.5]])
        run.finish({})
        lines += [{"row": row, "choice": choice, "column": column, "seed": seed, "id": name} for column in ("A ACC", "A CE")]
    columns = {"A ACC": Column("test/accuracy"), "A CE": Column("test/ce")}
    rows = [Row("plain", ["method=vanilla"], paper={"A ACC": 95.5})]
    rows += [Row("with", grid={"method.x.weight": [0.5]}, paper={"0.5": {"A CE": "2±0.1"}})]
    return Runs(Table("t", at="last10", columns=columns, rows=rows), pd.DataFrame(lines), done, OmegaConf.structured(Runtime))


def column(made: Runs, row: str, seed: int, metric: str) -> list[float]:
    return [line[metric] for line in made.done[f"{row}-{seed:010d}"].metrics()]


def test_weights_are_means_of_the_last_ten_with_their_spread(made: Runs) -> None:
    numbers = weights.draw(made).numbers
    assert list(numbers["panel"].unique()) == ["A"] and len(numbers) == 2 * 3 + 2
    for weight, row in ((0, "plain"), (0.5, "with")):
        for metric in weights.METRICS:
            means = [statistics.mean(column(made, row, seed, metric)[-10:]) for seed in (1, 2)]
            [one] = numbers.query(f"source == 'ours' and metric == {metric!r} and weight == {weight}").to_dict("records")
            assert (one["value"], one["spread"], one["n"]) == pytest.approx((statistics.mean(means), statistics.stdev(means), 2))
    paper = numbers[numbers["source"] == "paper"]
    assert sorted(zip(paper["metric"], paper["weight"], paper["value"], strict=True)) == [("test/accuracy", 0, 95.5), ("test/ce", 0.5, 2)]
    drawing = weights.draw(Runs(made.table, made.wanted[made.wanted["seed"] == 2], made.done, made.runtime))  # of one seed
    [one] = drawing.numbers.query("source == 'ours' and metric == 'test/ce' and weight == 0.5").to_dict("records")
    last = column(made, "with", 2, "test/ce")[-10:]
    assert (one["value"], one["spread"]) == pytest.approx((statistics.mean(last), statistics.stdev(last)))
    made.table.rows[0].overrides = ["method=itdm_j"]
    with pytest.raises(ConfigError, match="'plain' has a method and no grid"):
        weights.draw(made)


def test_curves_are_means_at_the_ends_of_epochs(made: Runs) -> None:
    numbers = curves.draw(made).numbers
    assert sorted(numbers["epoch"].unique()) == list(range(1, 12)) and len(numbers) == 2 * 2 * 11
    for one in numbers.to_dict("records"):
        values = [column(made, one["row"], seed, one["metric"])[int(one["epoch"]) - 1] for seed in (1, 2)]
        assert (one["value"], one["spread"]) == pytest.approx((statistics.mean(values), statistics.stdev(values)))


def test_collapse_counts_the_runs_that_end_at_chance(made: Runs) -> None:
    made.done["with-0000000001"].log([{"step": 1, "epoch": 1, "test/accuracy": 10.0, "test/feature_rms": 0.0}])
    drawing = collapse.draw(made, chance=20)
    low = sum(column(made, "plain", seed, "test/accuracy")[-1] < 20 for seed in (1, 2))
    high = 1 + (column(made, "with", 2, "test/accuracy")[-1] < 20)
    assert drawing.lines == [f"A: below 20 % accuracy at the end: {low} of 2 at λ = 0, {high} of 2 at λ = 0.5"]
    assert len(drawing.numbers) == 2 * (3 * 12 + 1)


def test_tsne_takes_as_many_of_each_class_and_survives_a_collapsed_net() -> None:
    y = np.repeat([0, 1, 2], [50, 9, 30])
    chosen = tsne.balanced(y, 30)
    assert [(y[chosen] == k).sum() for k in range(3)] == [10, 9, 10] and len(set(chosen)) == len(chosen)
    same = np.full((20, 4), 0.3, np.float32) * (1 + 1e-7 * np.arange(20, dtype=np.float32)[:, None])
    assert not tsne.embed(same, 30).any() and tsne.silhouette(same, np.arange(20) % 2) == 0


def test_a_figure_of_trained_nets_says_what_is_missing_and_failed(figure: Figure, tmp_path: Path) -> None:
    code, _, err = figure("figure=demo", "launch=false")
    assert code == 1 and "nothing to draw: none of 6 runs is done" in err and err.count("\n") == 1 and not (tmp_path / "out").exists()
    assert figure("figure=demo")[0] == 0

    [gone], [lost] = ((tmp_path / "runs").glob(name) for name in ("digits-net2c-vanilla/*", "digits-net2c-itdm_c/weight=0.6,*"))
    one = store.Run(gone)  # t-SNE embeds the features of the trained net, whose RMS the run has logged
    runtime = OmegaConf.structured(Runtime(device="cpu", threads=1, data_dir=str(tmp_path), runs=str(tmp_path / "none")))
    h, y = tsne.features(one, runtime, 10**6)
    assert len(h) == len(y) == 30
    assert math.sqrt((h.astype(float) ** 2).mean()) == pytest.approx(one.metrics()[-1]["test/feature_rms"], rel=1e-5)
    shutil.rmtree(gone)
    code, out, _ = figure("figure=demo", "launch=false")
    assert code == 0 and "MISSING 1 of 6 runs: without ITDM seed 1 (ACC)\n" in out

    (lost / "result.json").unlink()
    (lost / "error.txt").write_text("Traceback\nRuntimeError: lightning\n")
    [picture] = (tmp_path / "out").glob("*.png")
    picture.unlink()
    code, out, err = figure("figure=demo", "launch=false")
    assert code == 1 and "MISSING 2 of 6 runs" in out and "RuntimeError: lightning" in err and picture.exists()


def test_trials_are_missing_unless_they_ended(tmp_path: Path) -> None:
    """A trial that diverged has ended; another run that did has no place in the picture."""
    lines, found = [], {}
    for value, trial in itertools.product((1.0, "diverged", None), (True, False)):
        name = f"{value}{trial}"
        found[name] = written(tmp_path / name, value, "test/ce")
        lines.append({"row": str(value), "choice": "1", "column": "c", "seed": 2, "trial": trial, "id": name})
    told = "diverged, λ = 1 seed 2 (c); None, λ = 1 seed 2 (c, to choose λ); None, λ = 1 seed 2 (c)"
    assert missing(pd.DataFrame(lines), found) == [f"MISSING 3 of 6 runs: {told}"]
    assert missing(pd.DataFrame(lines[:3]), found) == []
