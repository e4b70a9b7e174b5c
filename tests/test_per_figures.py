"""PER's figures: what they compute, and what they read off runs, against numbers made here."""

from __future__ import annotations

import itertools
import math
import re
import statistics
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from scipy import integrate, stats

from experiments import store
from experiments.config import ConfigError, Runtime
from experiments.figure import Drawing, Runs
from experiments.figures import distributions, huber, layers, particles, quantiles, sliced, strength
from experiments.spec import Column, Row, Table

LAYERS = (3, 6, 9)
C = math.sqrt(2 / math.pi)
EPOCHS = 20
pytestmark = pytest.mark.usefixtures("one_thread")  # the arrays are small


def line_of(drawing: Drawing, start: str) -> str:
    [line] = [line for line in drawing.lines if line.startswith(start)]
    return line


# figures without runs


def test_four_samples_share_mean_and_variance_but_not_their_sliced_w1() -> None:
    drawing = distributions.draw(samples=1000, slices=256, seed=0)
    values = drawing.numbers[drawing.numbers["kind"] == "statistic"].pivot(index="panel", columns="statistic", values="value")
    assert len(values) == 4
    for name, points in drawing.numbers[drawing.numbers["kind"] == "point"].groupby("panel"):
        for axis in "xy":
            one = points[axis].to_numpy()
            assert (one.mean(), one.var(ddof=1)) == pytest.approx((0, 1), abs=1e-12)
            assert values.loc[name, f"skewness {axis}"] == pytest.approx(stats.skew(one))
            assert values.loc[name, f"excess kurtosis {axis}"] == pytest.approx(stats.kurtosis(one))
        assert values.loc[name, "correlation"] == pytest.approx(stats.pearsonr(points["x"], points["y"]).statistic)
    a, b, c, d = values.sort_index().itertuples()
    assert b.correlation == pytest.approx(0.8, abs=0.05) and max(abs(one.correlation) for one in (a, c, d)) < 0.1
    assert values.sort_index()["skewness x"].round().tolist() == [0, 0, 2, 0]
    assert a.sw1 < 0.05 and min(b.sw1, c.sw1, d.sw1) > 2 * a.sw1
    assert max(values["loss"]) / min(values["loss"]) < 1.15 and values["loss"].idxmin() != a.Index  # E l(Z) - c at a perfect match:
    assert a.loss == pytest.approx(2 / math.sqrt(math.pi) - C, abs=0.005)
    assert drawing.lines[-2] == "lowest sliced W1: (a) independent normal" and "(a)" not in drawing.lines[-1]


def test_the_sliced_w1_of_a_sample_is_scipys() -> None:
    """On two of the directions, against a fine grid of the normal's quantiles."""
    points = torch.from_numpy(distributions.make(200, seed=3)["(c) skewed"])
    theta = torch.tensor([[1.0, 0.0], [0.6, -0.8]], dtype=torch.float64)
    grid = stats.norm.ppf((np.arange(200_000) + 0.5) / 200_000)
    wanted = [stats.wasserstein_distance((points @ one).numpy(), grid) for one in theta]
    assert float(particles.sliced_w1(points, theta)) == pytest.approx(statistics.mean(wanted), abs=1e-4)


def test_huber_prints_the_sheets_distances() -> None:
    """P10 of the protocol sheet."""
    drawing = huber.draw(limit=4, points=401)
    pseudo, plain, curvature = drawing.lines
    assert "0.0477 for |x| <= 2, 0.1031 for |x| <= 5, +0.2021 towards infinity; of the derivatives 0.0644, at |x| = 0.523" in pseudo
    assert "-0.2979 towards infinity; of the derivatives 0.3173, at |x| = 1.000" in plain
    assert curvature == "curvature at 0: PER - c 0.798, Huber 1.000, Pseudo-Huber 1.000"
    numbers = drawing.numbers.set_index(["curve", "of", "x"])["value"].sort_index()
    for name in huber.STYLES:
        loss, slope = numbers[name, "loss"], numbers[name, "derivative of the loss"]
        assert (loss.index.min(), loss.index[200], loss.index.max()) == pytest.approx((-4, 0, 4)) and loss.iloc[200] == pytest.approx(0)
        integral = integrate.cumulative_trapezoid(slope.iloc[200:], x=slope.index[200:], initial=0)
        assert integral == pytest.approx(loss.iloc[200:].to_numpy(), abs=1e-3), name


@pytest.fixture(scope="module")
def descent() -> Drawing:
    """Fewer particles and steps than the figure has."""
    return particles.draw(particles=128, units=16, steps=150, slices=128, seed=0)


def test_pers_minimum_is_zero_and_not_the_normal(descent: Drawing) -> None:
    """P7, P8."""
    path = descent.numbers[descent.numbers["kind"] == "path"].pivot(index=["objective", "step"], columns="metric", values="value")
    ends = {name: path.loc[name].iloc[-1] for name in particles.SLOPES}
    assert (path.loc["PER"]["rms"].iloc[0]) == pytest.approx(math.sqrt(5), rel=0.05)  # N(1, 4): 1 + 4
    assert ends["PER"]["rms"] < 1e-6 and ends["PER"]["sw1"] == pytest.approx(C, abs=1e-6)
    assert ends["sliced W1"]["rms"] == pytest.approx(0.99, abs=0.03) and ends["sliced W1"]["sw1"] < 0.09
    assert ends["energy distance"]["rms"] == pytest.approx(1.03, abs=0.06) and ends["energy distance"]["sw1"] < 0.1
    assert path.loc["PER"]["sw1"].min() < 0.5  # on its way it comes nearer
    clouds = descent.numbers[descent.numbers["kind"] == "particle"].groupby("objective")["x"].agg(["count", "std"])
    assert (clouds["count"] == 128).all() and clouds.loc["PER", "std"] < 1e-6 < 0.7 < clouds.loc["sliced W1", "std"] < 1.2
    assert line_of(descent, "PER").startswith("PER: RMS 2.2") and "-> below 1e-06" in line_of(descent, "PER")
    assert line_of(descent, "for comparison").endswith("all 0 have 0.7979")


def losses(name: str, p: torch.Tensor) -> float:
    """The objectives in one dimension, by quadrature and by pairs: no code of the figure's."""
    p = p.double().numpy()
    if name == "sliced W1":
        ends = np.sort([-12, *p, *stats.norm.ppf(np.arange(1, len(p)) / len(p)), 12])
        parts = [integrate.quad(lambda x: abs(stats.norm.cdf(x) - (p <= x).mean()), a, b)[0] for a, b in itertools.pairwise(ends)]
        return float(sum(parts))
    cross = np.mean([integrate.quad(lambda z, t=t: abs(t - z) * stats.norm.pdf(z), -12, 12, points=[t])[0] for t in p])
    return float(cross - (np.abs(p[:, None] - p).mean() / 2 if name == "energy distance" else 0))


@pytest.mark.parametrize("name", list(particles.SLOPES))
def test_slopes_are_those_of_the_losses(name: str) -> None:
    p, h = torch.tensor([0.3, -1.2, 2.1, 0.1, -0.4], dtype=torch.float64), 1e-3
    ranks = torch.tensor([sum(other < one for other in p) for one in p])
    slope = particles.SLOPES[name](torch.special.ndtr(p), (ranks + 0.5) / 5, 5)
    for place in range(5):
        step = h * torch.eye(5, dtype=torch.float64)[place]
        change = (losses(name, p + step) - losses(name, p - step)) / (2 * h)
        assert float(slope[place]) / 5 == pytest.approx(change, abs=1e-6)


def test_of_one_particle_the_sliced_w1_is_pers_loss() -> None:
    """l(t) = W1(one point at t, N(0, 1)), so its middle is at half of its step."""
    h, fixed = torch.tensor([[1.5, -0.3, 0.2]], dtype=torch.float64), particles.onto(8, 3, torch.Generator())
    ends = [particles.descend(h, particles.SLOPES[name], fixed, 5, 0.5, 16, torch.Generator())[1] for name in ("PER", "sliced W1")]
    assert torch.allclose(*ends, rtol=1e-12) and not torch.allclose(ends[0], h)


def test_figures_without_runs_are_the_same_each_time() -> None:
    for module, options in ((distributions, {"samples": 50}), (particles, {"particles": 16, "units": 2, "steps": 5, "slices": 8})):
        first, again, other = (module.draw(**options, seed=seed) for seed in (0, 0, 1))
        assert first.numbers.equals(again.numbers) and first.lines == again.lines
        [column] = {"x", "value"} & {*first.numbers.iloc[0].dropna().index}
        assert first.numbers.loc[0, column] != other.numbers.loc[0, column]


# figures of runs with probe=activations


def stored(root: Path, name: str, rows: list[dict[str, float]], images: int = 10_000, train: int = 50_000) -> store.Run:
    one = store.Run(root / name)
    one.path.mkdir(parents=True)
    one.log(rows)
    one.write_config(OmegaConf.create({"probe": {"images": images}}))
    one.finish({"samples": {"train": train}})
    return one


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


def gather(root: Path, table: Table, runs: dict[tuple[str, str, int], store.Run]) -> Runs:
    lines = [
        {"row": row, "choice": choice, "column": name, "seed": seed, "id": one.path.name}
        for (row, choice, seed), one in runs.items()
        for name in table.columns
    ]
    done = {one.path.name: one for one in runs.values()}
    return Runs(table, pd.DataFrame(lines), done, OmegaConf.structured(Runtime))


METHODS = {"PER": ("1e-4", 0.4, 0.3, 2.0), "vanilla": ("", 1.5, 0.35, 3.0), "BN": ("", 1.0, 0.05, 1.1)}
GRID = {"method.per.weight": [3e-4, 1e-4]}


@pytest.fixture
def made(tmp_path: Path) -> Runs:
    """PER shrinks, vanilla grows, BN stays; two seeds."""
    rows = [Row("PER", ["method=per"], grid=GRID, select=["x"], pick="min valid/error"), Row("vanilla"), Row("BN")]
    table = Table("t", columns={"error": Column("test/error")}, rows=rows)
    runs = {}
    for seed, (row, (choice, *how)) in itertools.product((1, 2), METHODS.items()):
        runs[row, choice, seed] = stored(tmp_path, f"{row}-{seed:010d}", evaluations(10 * seed + len(row), *how))
    return gather(tmp_path, table, runs)


def metrics(made: Runs, row: str, seed: int, key: str) -> list[float]:
    return [line[key] for line in made.done[f"{row}-{seed:010d}"].metrics()]


def test_quantiles_draw_what_was_logged(made: Runs) -> None:
    drawing = quantiles.draw(made)
    numbers = drawing.numbers
    assert len(numbers) == 2 * 3 * 3 * 5 * (EPOCHS + 1) and list(numbers["row"].unique()) == list(METHODS)
    for (row, seed, metric), line in numbers.groupby(["row", "seed", "metric"]):
        assert line["value"].tolist() == metrics(made, row, seed, metric) and line["epoch"].tolist() == list(range(EPOCHS + 1))
    axes = drawing.picture.axes
    assert len(axes) == 5 * 3 and [axis.get_title() for axis in axes[:3]] == ["layer 3", "layer 6", "layer 9"]
    assert len({axis.get_ylim() for axis in axes[0::3][:3]}) == 1  # the bands of a layer share their scale
    [median] = axes[4].lines  # vanilla, layer 6
    assert median.get_ydata().tolist() == metrics(made, "vanilla", 1, "layer6/q50")
    drawn = max(max(line.get_ydata()) for line in axes[13].lines)
    assert drawn == 5 < max(metrics(made, "vanilla", 1, "layer6/var"))  # capped in the picture only


def test_quantiles_print_the_numbers_and_try_the_paper(made: Runs) -> None:
    lines = quantiles.draw(made).lines
    for row, seed in itertools.product(METHODS, (1, 2)):
        [line] = [line for line in lines if line.startswith(row) and f", seed {seed}, layers 3, 6, 9" in line]
        moves = [metrics(made, row, seed, f"layer{layer}/q50") for layer in LAYERS]
        median = [statistics.median(abs(b - a) for a, b in itertools.pairwise(one)) for one in moves]
        assert f"to epoch {', '.join(f'{one:.3g}' for one in median)};" in line
        for key, name in (("mean", "mean"), ("variance", "var")):
            ends = [f"{metrics(made, row, seed, f'layer{layer}/{name}')[-1]:.3g}" for layer in LAYERS]
            assert f"{key} at the end {', '.join(ends)}" in line
    assert "under BN (paper): seen in seed 1; seen in seed 2" in lines[-3]
    assert "the variance falls under PER and not under vanilla (paper): seen in seed 1; seen in seed 2" in lines[-2]
    means = {
        (row, seed): [abs(metrics(made, row, seed, f"layer{layer}/mean")[-1]) for layer in (3, 9)] for row in METHODS for seed in (1, 2)
    }
    for seed in (1, 2):
        nearer = [ours < plain for ours, plain in zip(means["PER", seed], means["vanilla", seed], strict=True)]
        assert f"{'seen' if all(nearer) else 'not seen'} in seed {seed}" in lines[-1]
    ours = [statistics.mean(metrics(made, "PER", 1, "layer6/var")[some]) for some in (slice(1, 3), slice(-2, None))]
    assert f"seed 1: PER {ours[0]:.3g} -> {ours[1]:.3g}, vanilla" in "".join(lines)


def change(made: Runs, row: str, key: str, factor: float, late: bool = True) -> None:
    """Scales a metric in the later (or first) half of the epochs, in seed 1."""
    one = made.done[f"{row}-{1:010d}"]
    one.log(
        [{k: v * (factor if k == key and (line["epoch"] > EPOCHS / 2) == late else 1) for k, v in line.items()} for line in one.metrics()]
    )


@pytest.mark.parametrize(
    ("row", "key", "factor", "said", "line"),
    [
        ("BN", "layer6/q50", 50, "under BN (paper): not seen in seed 1 (only in layer 3, 9); seen in seed 2", -3),
        ("PER", "layer6/var", 50, "not under vanilla (paper): not seen in seed 1; seen in seed 2", -2),
        ("vanilla", "layer6/var", 0.01, "not under vanilla (paper): not seen in seed 1; seen in seed 2", -2),
        ("vanilla", "layer6/mean", 0, "in layers 3 and 9 (paper): ", -1),
        ("PER", "layer9/mean", -99, "in layers 3 and 9 (paper): not seen in seed 1", -1),
        ("vanilla", "layer9/mean", 0, "in layers 3 and 9 (paper): not seen in seed 1", -1),
    ],
)
def test_what_the_runs_contradict_is_not_seen(made: Runs, row: str, key: str, factor: float, said: str, line: int) -> None:
    before = quantiles.draw(made).lines[line]
    change(made, row, key, factor)
    after = quantiles.draw(made).lines[line]
    assert said in after and (after == before) == (key == "layer6/mean")  # no layer that the paper names for it


def test_quantiles_before_the_nonlinearity(made: Runs) -> None:
    numbers = quantiles.draw(made, pre=True).numbers
    assert numbers["metric"].str.contains("/pre_").all() and not numbers["name"].str.contains("pre_").any()
    assert numbers[(numbers["row"] == "BN") & (numbers["seed"] == 2) & (numbers["metric"] == "layer9/pre_q75")][
        "value"
    ].tolist() == metrics(made, "BN", 2, "layer9/pre_q75")


def test_quantiles_of_fewer_rows_say_what_they_cannot_judge(made: Runs) -> None:
    made = Runs(made.table, made.wanted[made.wanted["row"] == "BN"], made.done, made.runtime)
    assert [line.rpartition(": ")[2] for line in quantiles.draw(made).lines[-3:]] == ["not run"] * 3


def test_sliced_draws_distance_scale_and_references(made: Runs) -> None:
    drawing = sliced.draw(made)
    assert set(drawing.numbers["name"]) == {"sw1", "rms"} and len(drawing.numbers) == 2 * 3 * 3 * 2 * (EPOCHS + 1)
    for (row, seed, metric), line in drawing.numbers.groupby(["row", "seed", "metric"]):
        assert line["value"].tolist() == metrics(made, row, seed, metric)
    above, below = drawing.picture.axes[:3], drawing.picture.axes[3:]
    levels = [sorted(set(line.get_ydata())) for axis in above for line in axis.lines if len(set(line.get_ydata())) == 1]
    assert sorted(one for [one] in levels) == pytest.approx([sliced.floor(10_000, "exact")] * 3 + [C] * 3)
    assert all(axis.get_yscale() == "log" for axis in below)
    per = line_of(drawing, "PER, λ = 1e-4, seed 1")
    ends = [(metrics(made, "PER", 1, f"layer{layer}/sw1")[-1], metrics(made, "PER", 1, f"layer{layer}/rms")[-1]) for layer in LAYERS]
    assert per.endswith(", ".join(f"layer {layer} {d:.3f} (RMS {r:.3g})" for layer, (d, r) in zip(LAYERS, ends, strict=True)))
    assert "early, over the first tenth of the epochs (paper): seen in seed 1; seen in seed 2" in drawing.lines[-3]
    assert "late, over the last tenth of the epochs (paper): seen in seed 1; seen in seed 2" in drawing.lines[-2]
    for row, key in (("BN", "layer3/sw1"), ("PER", "layer9/sw1")):
        one = made.done[f"{row}-{1:010d}"]
        one.log([line | {key: 5.0} for line in one.metrics()])
    assert [re.findall(r"not seen in seed 1 \(only in layer ([^)]*)\)", line) for line in sliced.draw(made).lines[-3:-1]] == [
        ["6, 9"],
        ["3, 6"],
    ]


def test_early_is_early_and_late_is_late(made: Runs) -> None:
    before = sliced.draw(made).lines[-3:-1]
    for layer in LAYERS:
        change(made, "BN", f"layer{layer}/sw1", 50)
        change(made, "PER", f"layer{layer}/sw1", 50, late=False)
    assert sliced.draw(made).lines[-3:-1] == before


def test_sliced_in_the_papers_mode(made: Runs) -> None:
    drawing = sliced.draw(made, mode="sampled")
    assert set(drawing.numbers["name"]) == {"sw1_sampled", "rms"}
    assert drawing.lines[-1].startswith(f"10000 draws from N(0, I) have {sliced.floor(10_000, 'sampled'):.4f} (sampled)")
    with pytest.raises(ConfigError, match="'other' is not known; allowed: exact, sampled"):
        sliced.draw(made, mode="other")


def test_floors_are_what_draws_have() -> None:
    """1.3 / sqrt N and 1.8 / sqrt N (protocol sheet, section 4), and a simulation with SciPy's distance."""
    rng, n = np.random.default_rng(0), 400
    grid = stats.norm.ppf((np.arange(4000) + 0.5) / 4000)
    exact = [stats.wasserstein_distance(rng.normal(size=n), grid) for _ in range(400)]
    sampled = [stats.wasserstein_distance(rng.normal(size=n), rng.normal(size=n)) for _ in range(400)]
    for mode, values, known in (("exact", exact, 1.3), ("sampled", sampled, 1.8)):
        assert sliced.floor(n, mode) == pytest.approx(statistics.mean(values), abs=3 * statistics.stdev(values) / 20)
        assert sliced.floor(10_000, mode) == pytest.approx(known / 100, rel=0.03)


def test_distances_over_different_counts_are_refused(made: Runs, tmp_path: Path) -> None:
    stored(tmp_path / "other", "BN", evaluations(0, 1, 1, 1), train=9_000).path.rename(tmp_path / "smaller")
    made.done[f"BN-{2:010d}"] = store.Run(tmp_path / "smaller")
    with pytest.raises(ConfigError, match=r"measured over \[9000, 10000\] images"):
        sliced.draw(made)


def test_runs_without_the_probe_are_refused(made: Runs) -> None:
    made.done[f"BN-{1:010d}"].log([{"step": 1, "epoch": 1, "test/error": 3}])
    with pytest.raises(ConfigError, match="needs probe=activations"):
        quantiles.draw(made)


def test_columns_of_different_runs_are_refused(made: Runs) -> None:
    other = made.wanted.assign(column="other", id=made.wanted["id"].iloc[::-1].tolist())
    with pytest.raises(ConfigError, match="error, other hold different runs"):
        layers.shown(Runs(made.table, pd.concat([made.wanted, other]), made.done, made.runtime))


def test_a_pick_without_select_shows_what_is_picked(made: Runs, tmp_path: Path) -> None:
    made.table.rows[0].select, made.table.rows[0].pick = [], "min test/error"
    lines = made.wanted.to_dict("records")
    for seed in (1, 2):
        rows = [line | ({"test/error": 50.0} if "test/error" in line else {}) for line in evaluations(seed, 1, 1, 1)]
        worse = stored(tmp_path, f"worse-{seed:010d}", rows)
        made.done[worse.path.name] = worse
        lines.append({"row": "PER", "choice": "0.0003", "column": "error", "seed": seed, "id": worse.path.name})
    runs = Runs(made.table, pd.DataFrame(lines), made.done, made.runtime)
    assert set(layers.shown(runs)["choice"]) == {"1e-4", ""} and len(layers.shown(runs)) == 6


WEIGHTS = [1e-5, 1e-4, 1e-3, 1e-2]
SIZES = {0.0: 2.0, 1e-5: 1.8, 1e-4: 1.2, 1e-3: 0.6, 1e-2: 0.05}


@pytest.fixture
def strengths(tmp_path: Path) -> Runs:
    """RMS falls with λ: the distance C |RMS - 1| + 0.02 falls, then rises."""
    columns = {"error": Column("test/error"), "rms": Column("layer6/rms")}
    table = Table("t", columns=columns, rows=[Row("vanilla"), Row("PER", grid={"method.per.weight": WEIGHTS})])
    runs = {}
    for seed, (weight, size) in itertools.product((1, 2), SIZES.items()):
        row, choice = ("PER", str(weight)) if weight else ("vanilla", "")
        runs[row, choice, seed] = stored(tmp_path, f"{row}{choice}-{seed:010d}", evaluations(seed, 1.0, 0.1, size * (1 + seed / 100)))
    return gather(tmp_path, table, runs)


def test_strength_draws_ends_over_the_weight(strengths: Runs) -> None:
    drawing = strength.draw(strengths)
    numbers = drawing.numbers
    assert len(numbers) == 5 * (3 * 2 + 1) and set(numbers["row"]) == {"PER"} and (numbers["n"] == 2).all()
    for one in numbers.itertuples():
        name = f"PER{one.weight}" if one.weight else "vanilla"
        values = [metrics(strengths, name, seed, one.metric)[-1] if one.layer else 5.0 for seed in (1, 2)]
        assert (one.value, one.spread) == pytest.approx((statistics.mean(values), statistics.stdev(values)))
    assert drawing.lines[0].startswith("PER, layer3/rms at λ = 0: 2.03, 1e-05: 1.83, 0.0001: 1.22, 0.001: 0.609, 0.01: 0.0508")
    assert all(
        "(our hypothesis): seen in the means over 2 seeds; lowest" in line and "at λ = 0.0001" in line for line in drawing.lines[-3:]
    )
    axes = drawing.picture.axes
    assert [axis.get_xscale() for axis in axes] == ["log"] * 3 and axes[1].get_yscale() == "log"
    assert [text.get_text() for text in axes[2].get_xticklabels()] == ["0", "1e-05", "0.0001", "0.001", "0.01"]
    assert axes[0].get_xticks()[:2] == pytest.approx([1e-6, 1e-5])


def test_strength_of_rows_that_differ_in_their_grids_is_one_line(strengths: Runs) -> None:
    whole = strength.draw(strengths).numbers
    strengths.table.rows[1:] = [Row("PER", grid=GRID), Row("PER x10", grid=GRID), Row("L2", ["l2"], grid=GRID)]
    moved = strengths.wanted["choice"].isin(["0.001", "0.01"])
    strengths.wanted.loc[moved, "row"] = "PER x10"
    assert whole.equals(strength.draw(strengths).numbers.query("row == 'PER'").reset_index(drop=True))
    strengths.wanted.loc[moved, "row"] = "L2"
    lines = strength.draw(strengths).numbers.groupby("row")["weight"].unique().map(list)
    assert lines["PER"] == [0, 1e-5, 1e-4] and lines["L2"] == [0, 1e-3, 1e-2]


def test_strength_without_a_weight_that_is_done_says_so(strengths: Runs) -> None:
    done = {name: one for name, one in strengths.done.items() if name.startswith("vanilla")}
    with pytest.raises(ConfigError, match="no run with a weight is done yet"):
        strength.draw(Runs(strengths.table, strengths.wanted, done, strengths.runtime))


def test_strength_that_only_shrinks_distances_is_not_our_hypothesis(strengths: Runs) -> None:
    for seed in (1, 2):
        one = strengths.done[f"PER0.01-{seed:010d}"]
        one.log([line | {"layer6/sw1": 0.001} for line in one.metrics()])
    said = [": seen" in line for line in strength.draw(strengths).lines[-3:]]
    assert said == [True, False, True]


def test_strength_refuses_a_grid_without_a_place_on_the_axis(strengths: Runs) -> None:
    strengths.table.rows[1].grid["optim.lr"] = [0.1]
    with pytest.raises(ConfigError, match="'PER' has a grid of several keys"):
        strength.draw(strengths)
    strengths.table.rows.pop()
    with pytest.raises(ConfigError, match="none has a grid"):
        strength.draw(strengths)
