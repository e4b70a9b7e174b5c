"""PER's figures of runs with probe=activations: what they draw and say, against the runs' own numbers."""

from __future__ import annotations

import itertools
import math
import re
import statistics
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf
from scipy import stats

from experiments import store
from experiments.config import ConfigError, Runtime
from experiments.figure import Runs
from experiments.figures import layers, quantiles, sliced, strength
from experiments.spec import Column, Row, Table

LAYERS = (3, 6, 9)
C, EPOCHS = math.sqrt(2 / math.pi), 20
pytestmark = pytest.mark.usefixtures("one_thread")  # the arrays are small


def stored(root: Path, name: str, rows: list[dict[str, float]], train: int = 50_000) -> store.Run:
    run = store.Run(root / name)
    run.path.mkdir(parents=True)
    run.log(rows)
    run.write_config(OmegaConf.create({"probe": {"images": 10_000}}))
    run.finish({"samples": {"train": train}})
    return run


def evaluations(seed: int, drift: float, jiggle: float, scale: float) -> list[dict[str, float]]:
    """The scale of the unit goes from `scale` to scale * drift, its median moves by about `jiggle`. Before training no test/error."""
    rng, rows = np.random.default_rng(seed), []
    for epoch in range(EPOCHS + 1):
        row: dict[str, float] = {"step": 10.0 * epoch, "epoch": float(epoch)}
        size = scale * drift ** (epoch / EPOCHS) if epoch else 0.1
        for layer in LAYERS:
            for before in ("", "pre_"):
                middle = size / 4 + jiggle * rng.normal() + (0.5 if before else 0)
                row |= {f"layer{layer}/{before}q{25 * (k + 2)}": middle + 0.67 * k * size for k in (-1, 0, 1)}
                row |= {f"layer{layer}/{before}mean": middle + 0.1, f"layer{layer}/{before}var": size**2 * rng.uniform(0.99, 1.01)}
            row |= {f"layer{layer}/rms": size, f"layer{layer}/sw1": C * abs(size - 1) + 0.02, f"layer{layer}/sw1_sampled": 0.5}
        rows.append(row | ({"test/error": 10.0 - epoch / 4} if epoch else {}))
    return rows


def gather(table: Table, runs: dict[tuple[str, str, int], store.Run]) -> Runs:
    lines = [(*key, run.path.name, name) for key, run in runs.items() for name in table.columns]
    wanted = pd.DataFrame(lines, columns=["row", "choice", "seed", "id", "column"])
    return Runs(table, wanted, {run.path.name: run for run in runs.values()}, OmegaConf.structured(Runtime))


METHODS = {"PER": ("1e-4", 0.4, 0.3, 2.0), "vanilla": ("", 1.5, 0.35, 3.0), "BN": ("", 1.0, 0.05, 1.1)}
GRID = {"method.per.weight": [3e-4, 1e-4]}


@pytest.fixture
def made(tmp_path: Path) -> Runs:
    """PER shrinks, vanilla grows, BN stays; two seeds."""
    rows = [Row("PER", ["method=per"], grid=GRID, select=["x"], pick="min valid/error"), Row("vanilla"), Row("BN")]
    runs = {}
    for seed, (row, (choice, *how)) in itertools.product((1, 2), METHODS.items()):
        runs[row, choice, seed] = stored(tmp_path, f"{row}-{seed:010d}", evaluations(10 * seed + len(row), *how))
    return gather(Table("t", columns={"error": Column("test/error")}, rows=rows), runs)


def metrics(made: Runs, row: str, seed: int, key: str) -> list[float]:
    return [line[key] for line in made.done[f"{row}-{seed:010d}"].metrics()]


def change(made: Runs, row: str, key: str, factor: float, late: bool = True) -> None:
    """Scales a metric in the later (or first) half of the epochs, in seed 1."""
    run = made.done[f"{row}-{1:010d}"]
    run.log([line | {key: line[key] * (factor if (line["epoch"] > EPOCHS / 2) == late else 1)} for line in run.metrics()])


@pytest.mark.parametrize(("figure", "count"), [(quantiles, 5), (sliced, 2)])
def test_what_was_logged_is_drawn(made: Runs, figure: ModuleType, count: int) -> None:
    numbers = figure.draw(made).numbers
    assert len(numbers) == 2 * 3 * 3 * count * (EPOCHS + 1) and list(numbers["row"].unique()) == list(METHODS)
    for (row, seed, metric), line in numbers.groupby(["row", "seed", "metric"]):
        assert line["value"].tolist() == metrics(made, row, seed, metric) and line["epoch"].tolist() == list(range(EPOCHS + 1))


def test_quantiles_print_the_numbers_and_try_the_paper(made: Runs) -> None:
    drawing = quantiles.draw(made)
    lines = drawing.lines
    [line] = [line for line in lines if line.startswith("PER") and ", seed 2, layers 3, 6, 9" in line]
    series = {name: [metrics(made, "PER", 2, f"layer{layer}/{name}") for layer in LAYERS] for name in ("q50", "mean", "var")}
    moves = [statistics.median(abs(b - a) for a, b in itertools.pairwise(each)) for each in series["q50"]]
    ends = {"to epoch": moves, "mean at the end": [each[-1] for each in series["mean"]]}
    for key, values in (ends | {"variance at the end": [each[-1] for each in series["var"]]}).items():
        assert f"{key} {', '.join(f'{value:.3g}' for value in values)}" in line
    assert "under BN (paper): seen in seed 1; seen in seed 2" in lines[-3]
    assert "the variance falls under PER and not under vanilla (paper): seen in seed 1; seen in seed 2" in lines[-2]
    drawn = max(max(line.get_ydata()) for line in drawing.picture.axes[13].lines)
    assert drawn == 5 < max(metrics(made, "vanilla", 1, "layer6/var"))  # capped in the picture only
    before = quantiles.draw(made, pre=True).numbers.groupby(["row", "seed", "metric", "name"])["value"]
    assert before.get_group(("BN", 2, "layer9/pre_q75", "q75")).tolist() == metrics(made, "BN", 2, "layer9/pre_q75")
    only = Runs(made.table, made.wanted[made.wanted["row"] == "BN"], made.done, made.runtime)
    assert [line.rpartition(": ")[2] for line in quantiles.draw(only).lines[-3:]] == ["not run"] * 3


@pytest.mark.parametrize(
    ("row", "key", "factor", "said", "line"),
    [
        ("BN", "layer6/q50", 50, "under BN (paper): not seen in seed 1 (only in layer 3, 9); seen in seed 2", -3),
        ("PER", "layer6/var", 50, "not under vanilla (paper): not seen in seed 1; seen in seed 2", -2),
        ("vanilla", "layer6/mean", 0, "in layers 3 and 9 (paper): ", -1),  # a layer that the paper does not name for it
        ("PER", "layer9/mean", -99, "in layers 3 and 9 (paper): not seen in seed 1 (only in layer 3)", -1),
    ],
)
def test_what_the_runs_contradict_is_not_seen(made: Runs, row: str, key: str, factor: float, said: str, line: int) -> None:
    before = quantiles.lines(layers.logged(made, ["q50", "mean", "var"]))[line]
    change(made, row, key, factor)
    after = quantiles.lines(layers.logged(made, ["q50", "mean", "var"]))[line]
    assert said in after and (after == before) == (key == "layer6/mean")


def test_sliced_draws_references(made: Runs) -> None:
    levels = [{*line.get_ydata()} for axis in sliced.draw(made).picture.axes[:3] for line in axis.lines if len({*line.get_ydata()}) == 1]
    assert sorted(level for [level] in levels) == pytest.approx([sliced.floor(10_000, "exact")] * 3 + [C] * 3)
    sampled = sliced.draw(made, mode="sampled")
    assert set(sampled.numbers["name"]) == {"sw1_sampled", "rms"}
    assert sampled.lines[-1].startswith(f"10000 draws from N(0, I) have {sliced.floor(10_000, 'sampled'):.4f} (sampled)")
    with pytest.raises(ConfigError, match="'other' is not known; allowed: exact, sampled"):
        sliced.draw(made, mode="other")


def test_sliced_tries_the_paper_early_and_late(made: Runs) -> None:
    def lines() -> list[str]:
        return sliced.lines(layers.logged(made, ["sw1", "rms"]), "sw1")[-2:]

    before = lines()
    for line, words in zip(before, ("early, over the first", "late, over the last"), strict=True):
        assert f"{words} tenth of the epochs (paper): seen in seed 1; seen in seed 2" in line
    for layer in LAYERS:  # BN is judged early, PER late
        change(made, "BN", f"layer{layer}/sw1", 50)
        change(made, "PER", f"layer{layer}/sw1", 50, late=False)
    assert lines() == before
    change(made, "BN", "layer3/sw1", 500, late=False)
    change(made, "PER", "layer9/sw1", 500)
    assert [re.findall(r"not seen in seed 1 \(only in layer ([^)]*)\)", line) for line in lines()] == [["6, 9"], ["3, 6"]]


def test_floors_are_what_draws_have() -> None:
    """1.3 / sqrt N and 1.8 / sqrt N (protocol sheet, section 4), and a simulation with SciPy's distance."""
    rng, n = np.random.default_rng(0), 400
    grid = stats.norm.ppf((np.arange(4000) + 0.5) / 4000)
    for mode, known in (("exact", 1.3), ("sampled", 1.8)):
        values = [stats.wasserstein_distance(rng.normal(size=n), grid if mode == "exact" else rng.normal(size=n)) for _ in range(400)]
        assert sliced.floor(n, mode) == pytest.approx(statistics.mean(values), abs=3 * statistics.stdev(values) / 20)
        assert sliced.floor(10_000, mode) == pytest.approx(known / 100, rel=0.03)


def test_runs_that_cannot_be_compared_are_refused(made: Runs, tmp_path: Path) -> None:
    other = made.wanted.assign(column="other", id=made.wanted["id"].iloc[::-1].tolist())
    with pytest.raises(ConfigError, match="error, other hold different runs"):
        layers.shown(Runs(made.table, pd.concat([made.wanted, other]), made.done, made.runtime))
    made.done[f"BN-{2:010d}"] = stored(tmp_path / "other", "BN", evaluations(0, 1, 1, 1), train=9_000)
    with pytest.raises(ConfigError, match=r"measured over \[9000, 10000\] images"):
        sliced.draw(made)
    made.done[f"BN-{1:010d}"].log([{"step": 1, "epoch": 1, "test/error": 3}])
    with pytest.raises(ConfigError, match="needs probe=activations"):
        quantiles.draw(made)


SIZES = {0.0: 2.0, 1e-5: 1.8, 1e-4: 1.2, 1e-3: 0.6, 1e-2: 0.05}  # RMS by λ: the distance C |RMS - 1| + 0.02 falls, then rises


@pytest.fixture
def strengths(tmp_path: Path) -> Runs:
    columns = {"error": Column("test/error"), "rms": Column("layer6/rms")}
    runs = {}
    for seed, (weight, size) in itertools.product((1, 2), SIZES.items()):
        row, choice = ("PER", str(weight)) if weight else ("vanilla", "")
        runs[row, choice, seed] = stored(tmp_path, f"{row}{choice}-{seed:010d}", evaluations(seed, 1.0, 0.1, size * (1 + seed / 100)))
    return gather(Table("t", columns=columns, rows=[Row("vanilla"), Row("PER", grid={"method.per.weight": [*SIZES][1:]})]), runs)


def test_strength_draws_ends_over_the_weight(strengths: Runs) -> None:
    drawing = strength.draw(strengths)
    numbers = drawing.numbers
    assert len(numbers) == 5 * (3 * 2 + 1) and set(numbers["row"]) == {"PER"} and (numbers["n"] == 2).all()
    for point in numbers.itertuples():
        name = f"PER{point.weight}" if point.weight else "vanilla"
        values = [metrics(strengths, name, seed, point.metric)[-1] if point.layer else 5.0 for seed in (1, 2)]
        assert (point.value, point.spread) == pytest.approx((statistics.mean(values), statistics.stdev(values)))
    assert all("seen in the means over 2 seeds; lowest" in line and "at λ = 0.0001" in line for line in drawing.lines[-3:])
    assert drawing.picture.axes[0].get_xticks()[:2] == pytest.approx([1e-6, 1e-5])  # λ = 0 stands a step to the left
    for seed in (1, 2):  # distances that λ only shrinks are not our hypothesis
        run = strengths.done[f"PER0.01-{seed:010d}"]
        run.log([line | {"layer6/sw1": 0.001} for line in run.metrics()])
    assert [": seen" in line for line in strength.draw(strengths).lines[-3:]] == [True, False, True]


def test_strength_of_rows_that_differ_in_their_grids_is_one_line(strengths: Runs) -> None:
    whole = strength.ends(strengths)
    strengths.table.rows[1:] = [Row("PER", grid=GRID), Row("PER x10", grid=GRID), Row("L2", ["l2"], grid=GRID)]
    moved = strengths.wanted["choice"].isin(["0.001", "0.01"])
    strengths.wanted.loc[moved, "row"] = "PER x10"
    assert whole.equals(strength.ends(strengths).query("row == 'PER'").reset_index(drop=True))
    strengths.wanted.loc[moved, "row"] = "L2"
    lines = strength.ends(strengths).groupby("row")["weight"].unique().map(list)
    assert lines["PER"] == [0, 1e-5, 1e-4] and lines["L2"] == [0, 1e-3, 1e-2]


def test_strength_refuses_what_has_no_place_on_the_axis(strengths: Runs) -> None:
    done = {name: run for name, run in strengths.done.items() if name.startswith("vanilla")}
    with pytest.raises(ConfigError, match="no run with a weight is done yet"):
        strength.draw(Runs(strengths.table, strengths.wanted, done, strengths.runtime))
    picked = replace(strengths.table.rows[1], pick="min layer6/rms")
    rms = Table("t", columns={"rms": Column("layer6/rms")}, rows=[picked])
    assert {*layers.shown(Runs(rms, strengths.wanted, strengths.done, strengths.runtime))["choice"]} == {"0.01", ""}
    strengths.table.rows[1].grid["optim.lr"] = [0.1]
    with pytest.raises(ConfigError, match="'PER' has a grid of several keys"):
        strength.draw(strengths)
    strengths.table.rows.pop()
    with pytest.raises(ConfigError, match="none has a grid"):
        strength.draw(strengths)
