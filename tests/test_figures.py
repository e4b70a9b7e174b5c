"""Figures: each one of conf/ draws, the numbers in its CSV are its runs', and what is missing or broken is said."""

from __future__ import annotations

import csv
import itertools
import math
import shutil
import statistics
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from nets import narrowed
from omegaconf import OmegaConf

from experiments import store
from experiments.cli import CONF, main
from experiments.config import ConfigError, Runtime, options
from experiments.figure import DPI, Runs, missing, run
from experiments.figures import collapse, curves, tsne, weights
from experiments.spec import Column, Row, Table

Figure = Callable[..., int]
SMALL = ["profile=smoke", "profile.steps=1", "profile.test=30", "batch_size=10"]
END = f"-{'-'.join(SMALL)}"  # of the names of the files
ALONE = ["per_1", "per_3", "per_minimiser", "unitization_bounds"]  # figures that have no runs, and are computed
MEASURED = ["per_timing"]  # that have no runs, and measure this machine


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Figures that share runs train them once."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def figure(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Figure:
    """`python -m experiments.figure` in this process, on a few steps of embedded data; gives the exit code."""

    def call(name: str, *words: str, runs: Path = runs) -> int:
        fixed = [*SMALL, "runtime.threads=1", "runtime.device=cpu", f"runtime.data_dir={tmp_path}", f"runtime.runs={runs}"]
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
        monkeypatch.setattr(sys, "argv", ["figure", *([f"figure={name}"] if name else []), f"out={tmp_path}/out", *fixed, *words])
        try:
            main(run, "figures")
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return call


def size(path: Path) -> tuple[int, int]:
    return struct.unpack(">II", path.read_bytes()[16:24])


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.no_cover  # which doubles its time; what it goes through is covered by others
@pytest.mark.parametrize("name", [name for name in options("figure") if name not in ALONE + MEASURED])
@pytest.mark.usefixtures("few_slices", "narrow")
def test_every_figure_draws_its_runs(
    name: str, figure: Figure, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], one_value: Callable[[slice], None]
) -> None:
    if name in ("itdm_5", "itdm_6", "itdm_7", "itdm_collapse", "per_4", "per_strength", "lamix_4", "lamix_6"):  # of many runs
        one_value(slice(1))
    words = narrowed(OmegaConf.select(OmegaConf.load(CONF / "figure" / f"{name}.yaml"), "runs.base") or [])
    assert figure(name, *words) == 0
    out = tmp_path / "out" / "-".join([f"{name}{END}", *words])
    text = capsys.readouterr().out
    assert (
        f"asked for besides: {' '.join(SMALL[1:])}" in text
        and "profile smoke" in text
        and "commit" in text
        and text.endswith(f"{out}.png .csv .md\n")
        and "MISSING" not in text
    )
    assert sorted(path.name for path in out.parent.iterdir()) == [f"{out.name}.csv", f"{out.name}.md", f"{out.name}.png"]

    from matplotlib.image import imread

    width, height = size(Path(f"{out}.png"))
    assert 3 * DPI <= width <= 9 * DPI and height >= 2 * DPI
    assert len(np.unique(imread(f"{out}.png")[..., :3].reshape(-1, 3), axis=0)) > 10

    measured = {(key, float(value)) for path in runs.glob("*/*/metrics.csv") for row in read(path) for key, value in row.items() if value}
    plotted = [row for row in read(Path(f"{out}.csv")) if row.get("source") != "paper"]
    assert plotted and all(row["of_profile"] == "smoke" and row["of_seed"] == "1" for row in plotted)
    for row in plotted:
        if row.get("source") == "computed here" and row["metric"] != "test/accuracy":
            continue  # tests/test_shift.py
        assert (row["kind"] in ("point", "silhouette")) if "kind" in row else ((row["metric"], float(row["value"])) in measured)


@pytest.mark.no_cover
@pytest.mark.parametrize("name", ALONE)
def test_figures_without_runs_are_computed(name: str, figure: Figure, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert figure(name, "launch=false") == 0
    out, text = tmp_path / "out" / f"{name}{END}", capsys.readouterr().out
    title = OmegaConf.load(CONF / "figure" / f"{name}.yaml").title
    options = {key: value for key, value in OmegaConf.load(CONF / "figure" / f"{name}.yaml").draw.items() if key != "_target_"}
    said = " ".join(f"{key}={value}" for key, value in options.items())
    assert text.startswith(f"## {title}\n\n- ") and text.endswith(f"{out}.png .csv .md\n")
    assert f"- asked for besides, without effect: {' '.join(SMALL)}\n- no runs: computed from {said}\n- commit " in text
    assert ", 1 threads; torch " in text and Path(f"{out}.md").read_text() + f"\n{out}.png .csv .md\n" == text
    assert 3 * DPI <= size(Path(f"{out}.png"))[0] <= 9 * DPI
    rows = read(Path(f"{out}.csv"))
    assert len(rows) > 100 and all(row["of_options"] == said and row["of_commit"] and row["of_torch"] for row in rows)
    before = Path(f"{out}.csv").read_bytes()
    assert figure(name) == 0 and Path(f"{out}.csv").read_bytes() == before


def test_a_figure_without_runs_has_no_plan_and_no_parts(figure: Figure, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert figure("per_3", "plan=true") == 0
    assert capsys.readouterr().out.endswith(": the plan\n\n- nothing to train: this figure has no runs, it is computed when it is drawn\n")
    assert figure("per_3", "only=[Huber]") == 2
    assert capsys.readouterr().err == "retable: only: this figure has no runs, so no row or column with Huber in its name; leave it out\n"
    assert figure("per_3", "figure.draw.points=few") == 2
    assert capsys.readouterr().err == "retable: figure.draw.points: few is not allowed; it must be a whole number\n"
    assert not (tmp_path / "out").exists()


def test_nothing_chosen_is_one_line(figure: Figure, capsys: pytest.CaptureFixture[str]) -> None:
    assert figure("") == 2
    assert capsys.readouterr().err.startswith("retable: figure: nothing is chosen; allowed: covariate_shift, demo, ")


def stored(root: Path, name: str, rows: list[dict[str, float]]) -> store.Run:
    one = store.Run(root / name)
    one.path.mkdir()
    one.log(rows)
    one.finish({})
    return one


@pytest.fixture
def made(tmp_path: Path) -> Runs:
    """Two columns on the same runs, λ = 0 and 0.5, seeds 1 and 2, 12 evaluations each with one within an epoch."""
    rng = np.random.default_rng(0)
    done = {}
    lines = []
    for row, choice, seed in (("plain", "", 1), ("plain", "", 2), ("with", "0.5", 1), ("with", "0.5", 2)):
        name = f"{row}-{seed:010d}"
        keys = ("train/ce", "test/ce", "test/accuracy", "test/feature_rms")
        epochs = [*range(1, 12), 11.5]
        values = rng.uniform(1, 90, (12, 4)).tolist()
        evaluations = [{"step": 10 * e, "epoch": e} | dict(zip(keys, each, strict=True)) for e, each in zip(epochs, values, strict=True)]
        done[name] = stored(tmp_path, name, evaluations)
        lines += [{"row": row, "choice": choice, "column": column, "seed": seed, "id": name} for column in ("A ACC", "A CE")]
    columns = {"A ACC": Column("test/accuracy"), "A CE": Column("test/ce")}
    rows = [Row("plain", ["method=vanilla"], paper={"A ACC": 95.5})]
    rows += [Row("with", grid={"method.x.weight": [0.5]}, paper={"0.5": {"A CE": "2±0.1"}})]
    return Runs(Table("t", at="last10", columns=columns, rows=rows), pd.DataFrame(lines), done, OmegaConf.structured(Runtime))


def column(made: Runs, row: str, seed: int, metric: str) -> list[float]:
    return [float(line[metric]) for line in read(made.done[f"{row}-{seed:010d}"].path / "metrics.csv")]


def test_weights_are_means_of_the_last_ten_with_their_spread_over_seeds(made: Runs) -> None:
    numbers = weights.draw(made).numbers
    assert list(numbers["panel"].unique()) == ["A"] and len(numbers) == 2 * 3 + 2
    for weight, row in ((0, "plain"), (0.5, "with")):
        for metric in weights.METRICS:
            means = [statistics.mean(column(made, row, seed, metric)[-10:]) for seed in (1, 2)]
            [one] = numbers.query(f"source == 'ours' and metric == {metric!r} and weight == {weight}").to_dict("records")
            assert (one["value"], one["spread"], one["n"]) == pytest.approx((statistics.mean(means), statistics.stdev(means), 2))
    paper = numbers[numbers["source"] == "paper"]
    assert sorted(zip(paper["metric"], paper["weight"], paper["value"], strict=True)) == [("test/accuracy", 0, 95.5), ("test/ce", 0.5, 2)]


def test_weights_of_one_seed_spread_over_the_last_ten_evaluations(made: Runs) -> None:
    made = Runs(made.table, made.wanted[made.wanted["seed"] == 2], made.done, made.runtime)
    drawing = weights.draw(made)
    [one] = drawing.numbers.query("source == 'ours' and metric == 'test/ce' and weight == 0.5").to_dict("records")
    last = column(made, "with", 2, "test/ce")[-10:]
    assert (one["value"], one["spread"]) == pytest.approx((statistics.mean(last), statistics.stdev(last)))
    assert drawing.lines[-1] == "error bars: 1 s.d. over the last ten evaluations"


def test_weights_refuse_a_method_without_a_place_on_the_axis(made: Runs) -> None:
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
    ends = [column(made, "plain", seed, "test/accuracy")[-1] for seed in (1, 2)]
    low = sum(value < 20 for value in ends)
    high = 1 + (column(made, "with", 2, "test/accuracy")[-1] < 20)
    assert drawing.lines == [f"A: below 20 % accuracy at the end: {low} of 2 at λ = 0, {high} of 2 at λ = 0.5"]
    assert len(drawing.numbers) == 2 * (3 * 12 + 1)


def test_silhouette_is_rousseeuws() -> None:
    rng = np.random.default_rng(1)
    h, y = rng.normal(size=(12, 3)), np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2])
    scores = []
    for i in range(12):
        far = {k: [math.dist(h[i], h[j]) for j in range(12) if y[j] == k and j != i] for k in range(3)}
        a, b = statistics.mean(far[y[i]]), min(statistics.mean(far[k]) for k in range(3) if k != y[i])
        scores.append((b - a) / max(a, b))
    assert tsne.silhouette(h, y) == pytest.approx(statistics.mean(scores))


def test_tsne_takes_as_many_of_each_class_and_survives_a_collapsed_net() -> None:
    y = np.repeat([0, 1, 2], [50, 9, 30])
    chosen = tsne.balanced(y, 30)
    assert [(y[chosen] == k).sum() for k in range(3)] == [10, 9, 10] and len(set(chosen)) == len(chosen)
    same = np.full((20, 4), 0.3, np.float32) * (1 + 1e-7 * np.arange(20, dtype=np.float32)[:, None])
    assert not tsne.embed(same, 30).any() and tsne.silhouette(same, np.arange(20) % 2) == 0


def test_features_are_those_of_the_trained_net(figure: Figure, runs: Path, tmp_path: Path) -> None:
    assert figure("itdm_2", "only=[FMNIST]") == 0
    for path in runs.glob("*/*/result.json"):
        if "fmnist" in path.parent.parent.name:
            one = store.Run(path.parent)
            runtime = OmegaConf.structured(Runtime(device="cpu", threads=1, data_dir=str(tmp_path), runs=str(tmp_path / "none")))
            h, y = tsne.features(one, runtime, 10**6)
            assert len(h) == len(y) == 30
            assert math.sqrt((h.astype(float) ** 2).mean()) == pytest.approx(one.metrics()[-1]["test/feature_rms"], rel=1e-5)
            break
    else:
        pytest.fail("no run of fmnist")


def test_missing_and_failed_runs_are_said(figure: Figure, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert figure("demo", "launch=false", runs=tmp_path / "empty") == 1
    said = capsys.readouterr()
    assert "nothing to draw: none of 6 runs is done" in said.err and said.err.count("\n") == 1 and not (tmp_path / "out").exists()

    assert figure("demo") == 0
    shutil.copytree(runs, tmp_path / "some")
    capsys.readouterr()
    vanilla = (tmp_path / "some").glob("digits-net2c-vanilla/batchnorm,*")  # the collapse figure has its own, at another lr
    [gone] = [path for path in vanilla if OmegaConf.load(path / "config.yaml").optim.lr == 0.05]
    [lost] = (tmp_path / "some").glob("digits-net2c-itdm_c/weight=0.6,*")
    shutil.rmtree(gone)
    assert figure("demo", "launch=false", runs=tmp_path / "some") == 0
    assert "MISSING 1 of 6 runs: without ITDM seed 1 (ACC)\n" in capsys.readouterr().out

    (lost / "result.json").unlink()
    (lost / "error.txt").write_text("Traceback\nRuntimeError: lightning\n")
    (tmp_path / "out" / f"demo{END}.png").unlink()
    assert figure("demo", "launch=false", runs=tmp_path / "some") == 1
    said = capsys.readouterr()
    assert "MISSING 2 of 6 runs" in said.out and "RuntimeError: lightning" in said.err
    assert size(tmp_path / "out" / f"demo{END}.png") == (1125, 390)


def test_trials_are_missing_unless_they_ended(tmp_path: Path) -> None:
    """A trial that diverged has ended; another run that did has no place in the picture."""
    states = {"done": {}, "diverged": {"diverged": "nan"}, "resumable": None}
    lines, found = [], {}
    for (state, result), trial in itertools.product(states.items(), (True, False)):
        one = store.Run(tmp_path / f"{state}{trial}")
        one.path.mkdir()
        (one.path / "checkpoint.pt").touch()
        if result is not None:
            one.finish(result)
        found[one.path.name] = one
        lines.append({"row": state, "choice": "1", "column": "c", "seed": 2, "trial": trial, "id": one.path.name})
    trials = "resumable, λ = 1 seed 2 (c, to choose λ)"
    assert missing(pd.DataFrame(lines), found) == [
        f"MISSING 3 of 6 runs: diverged, λ = 1 seed 2 (c); {trials}; resumable, λ = 1 seed 2 (c)"
    ]
    assert missing(pd.DataFrame(lines[:3]), found) == []


def test_an_unknown_figure_is_one_line() -> None:
    words = (sys.executable, "-m", "experiments.figure", "figure=no_such")
    done = subprocess.run(words, cwd=CONF.parent, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1 and "no_such" in done.stderr
