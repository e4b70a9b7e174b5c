"""PER's figures without runs: what they compute, against numbers computed here, and what the timing table measures."""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from scipy import integrate, stats
from tables import Command

from experiments.bench.measure import Asked
from experiments.cli import CONF
from experiments.figure import run
from experiments.figures import distributions, huber, particles, timing

C = math.sqrt(2 / math.pi)
pytestmark = pytest.mark.usefixtures("one_thread")  # the arrays are small


def test_four_samples_share_mean_and_variance_but_not_their_sliced_w1() -> None:
    drawing = distributions.draw(samples=1000, slices=256, seed=0)
    values = drawing.numbers[drawing.numbers["kind"] == "statistic"].pivot(index="panel", columns="statistic", values="value")
    assert len(values) == 4
    for name, points in drawing.numbers[drawing.numbers["kind"] == "point"].groupby("panel"):
        for axis in "xy":
            sample = points[axis].to_numpy()
            assert (sample.mean(), sample.var(ddof=1)) == pytest.approx((0, 1), abs=1e-12)
            assert values.loc[name, f"skewness {axis}"] == pytest.approx(stats.skew(sample))
            assert values.loc[name, f"excess kurtosis {axis}"] == pytest.approx(stats.kurtosis(sample))
        assert values.loc[name, "correlation"] == pytest.approx(stats.pearsonr(points["x"], points["y"]).statistic)
    a, b, c, d = values.sort_index().itertuples()
    assert b.correlation == pytest.approx(0.8, abs=0.05) and max(abs(one.correlation) for one in (a, c, d)) < 0.1
    assert a.sw1 < 0.05 and min(b.sw1, c.sw1, d.sw1) > 2 * a.sw1
    assert max(values["loss"]) / min(values["loss"]) < 1.15 and values["loss"].idxmin() != a.Index  # E l(Z) - c at a perfect match:
    assert a.loss == pytest.approx(2 / math.sqrt(math.pi) - C, abs=0.005)
    assert drawing.lines[-2] == "lowest sliced W1: (a) independent normal" and "(a)" not in drawing.lines[-1]

    # on two of the directions, against a fine grid of the normal's quantiles
    points = torch.from_numpy(distributions.make(200, seed=3)["(c) skewed"])
    theta = torch.tensor([[1.0, 0.0], [0.6, -0.8]], dtype=torch.float64)
    grid = stats.norm.ppf((np.arange(200_000) + 0.5) / 200_000)
    wanted = [stats.wasserstein_distance((points @ direction).numpy(), grid) for direction in theta]
    assert float(particles.sliced_w1(points, theta)) == pytest.approx(statistics.mean(wanted), abs=1e-4)


def test_huber_prints_the_sheets_distances() -> None:
    """P10 of the protocol sheet."""
    drawing = huber.draw(limit=4, points=401)
    pseudo, plain, _ = drawing.lines
    assert "0.0477 for |x| <= 2, 0.1031 for |x| <= 5, +0.2021 towards infinity; of the derivatives 0.0644, at |x| = 0.523" in pseudo
    assert "-0.2979 towards infinity; of the derivatives 0.3173, at |x| = 1.000" in plain
    numbers = drawing.numbers.set_index(["curve", "of", "x"])["value"].sort_index()
    for name in huber.STYLES:
        loss, slope = numbers[name, "loss"], numbers[name, "derivative of the loss"]
        assert (loss.index.min(), loss.index[200], loss.index.max()) == pytest.approx((-4, 0, 4)) and loss.iloc[200] == pytest.approx(0)
        integral = integrate.cumulative_trapezoid(slope.iloc[200:], x=slope.index[200:], initial=0)
        assert integral == pytest.approx(loss.iloc[200:].to_numpy(), abs=1e-3), name


def test_pers_minimum_is_zero_and_not_the_normal() -> None:
    """P7 and P8 of the protocol sheet, with fewer particles and steps than the figure has."""
    drawing = particles.draw(particles=128, units=16, steps=150, slices=128, seed=0)
    path = drawing.numbers[drawing.numbers["kind"] == "path"].pivot(index=["objective", "step"], columns="metric", values="value")
    ends = {name: path.loc[name].iloc[-1] for name in particles.SLOPES}
    assert path.loc["PER"]["rms"].iloc[0] == pytest.approx(math.sqrt(5), rel=0.05)  # N(1, 4): 1 + 4
    assert ends["PER"]["rms"] < 1e-6 and ends["PER"]["sw1"] == pytest.approx(C, abs=1e-6)
    assert ends["sliced W1"]["rms"] == pytest.approx(0.99, abs=0.03) and ends["sliced W1"]["sw1"] < 0.09
    assert ends["energy distance"]["rms"] == pytest.approx(1.03, abs=0.06) and ends["energy distance"]["sw1"] < 0.1
    clouds = drawing.numbers[drawing.numbers["kind"] == "particle"].groupby("objective")["x"].std()
    assert clouds["PER"] < 1e-6 < 0.7 < clouds["sliced W1"] < 1.2
    [per] = [line for line in drawing.lines if line.startswith("PER")]
    assert per.startswith("PER: RMS 2.2") and "-> below 1e-06" in per


def losses(name: str, p: torch.Tensor) -> float:
    """The objectives in one dimension, by quadrature and by pairs, without the figure's code."""
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


# the timing table of section 4.3.1

OPTIONS: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(CONF / "figure" / "per_timing.yaml").draw)  # type: ignore[assignment]
OPTIONS.pop("_target_")
Drawn = Callable[..., tuple[timing.Drawing, dict[str, tuple[DictConfig, DictConfig, Asked]]]]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """The drawing for these overrides, of made-up times; and what would have been timed."""

    def draw(*overrides: str) -> Any:
        seen = {}

        def compare(row_id: str, what: str, over: str, good: str, sides: tuple[DictConfig, DictConfig], asked: Asked) -> dict[str, Any]:
            seen[what] = (*sides, asked)
            ratio = 1 + len(seen) / 8
            return {"ratio": ratio, "q1": ratio - 0.25, "q3": ratio + 0.5, "note": "noisy", "ms a": 100 * ratio, "ms b": 100.0}

        monkeypatch.setattr(timing, "suite", lambda cfg: cfg)
        machine = dict.fromkeys(("device", "threads", "cores", "load", "torch", "commit", "dirty"), "one")
        monkeypatch.setattr(timing, "machine", lambda cfg: machine)
        monkeypatch.setattr(timing, "compare", compare)
        monkeypatch.setattr(timing, "parameters", lambda cfg: 10 + 7 * len(cfg.method))
        return timing.draw([*overrides, "runtime.threads=1"], **OPTIONS), seen

    return draw


def test_rows_are_the_papers_methods_in_its_network_beside_its_ratios(drawn: Drawn) -> None:
    drawing, seen = drawn()
    assert [*seen] == ["vanilla", "bn", "vcl", "per", "per toeplitz", "per analytic", "l2"]
    for name, (cfg, plain, asked) in seen.items():
        assert (plain.norm._target_, plain.method, plain.dataset.source) == ("torch.nn.Identity", {}, "embedded"), name
        assert cfg.model._target_.endswith("cnn11") and cfg.model.activation == "elu" and cfg.batch_size == plain.batch_size == 125, name
        assert (asked.rounds, asked.steps) == (11, None), name
    assert seen["vanilla"][0] == seen["vanilla"][1] and seen["bn"][0].norm.eps == 1e-3
    assert seen["per toeplitz"][0].method.per.directions == "toeplitz" and seen["per analytic"][0].method.per.mode == "analytic"
    numbers = drawing.numbers.set_index("method")
    assert numbers["parameters"].to_dict() == {name: 7 * (name not in ("vanilla", "bn")) for name in seen}
    ratios = {"vanilla": 1, "bn": 83 / 71, "vcl": 87 / 71, "per": 93 / 71}  # of the paper's seconds
    assert numbers["paper_ratio"].dropna().to_dict() == pytest.approx(ratios)
    rows = [re.split(r"\s*\|\s*", line.strip("| ")) for line in drawing.table.splitlines()]
    assert rows[0][:4] == ["method", "ratio", "quartiles", "paper"]
    assert rows[4] == ["VCL", "1.375", "1.125 to 1.875", "1.23", "137.5", "100.0", "7", "350K", "noisy"]
    assert [row[3] for row in rows[2:]] == ["1.00", "1.17", "1.23", "1.31", "", "", ""]
    assert [bar.get_width() for bar in drawing.picture.axes[0].patches] == list(drawing.numbers["ratio"])


def test_overrides_reach_what_is_measured(drawn: Drawn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "on_gpu", lambda cfg: True)
    drawing, seen = drawn("precision=bf16", "step=graph", "method=per", "method.per.slices=3")
    assert [*seen] == ["vanilla", "per", "per toeplitz", "per analytic"] and seen["per"][0].method.per.slices == 3
    assert {(one.precision, one.step, one.batch_size) for *sides, _ in seen.values() for one in sides} == {("bf16", "graph", 250)}
    assert "batch 250 on a GPU" in drawing.lines[0]


def test_parameters_are_counted_as_the_paper_counts_them_but_for_bn() -> None:
    asked = Asked(["runtime.threads=1", "batch_size=4"])
    count = {name: timing.parameters(asked.method("cnn11", name)) for name in ("vanilla", "bn", "vcl", "per")}
    assert {name: value - count["vanilla"] for name, value in count.items()} == {"vanilla": 0, "bn": 2 * 2544, "vcl": 350_460, "per": 0}


def test_command(command: Command, tmp_path: Path) -> None:
    words = ["figure=per_timing", f"out={tmp_path}/out", "profile=smoke", "batch_size=4", "method=[l2]"]
    code, text, err = command(*words, task=run, root="figures")
    assert code == 0, err
    (path,) = (tmp_path / "out").glob("*.csv")
    rows = pd.read_csv(path)
    assert rows["method"].tolist() == ["vanilla", "l2"] and rows["parameters"].tolist() == [0, 0]
    assert rows[["q1", "ratio", "q3"]].apply(lambda row: 0 < row.q1 <= row.ratio <= row.q3, axis=1).all()
    assert (rows[["model", "batch_size", "rounds", "threads", "precision"]] == ["cnn11", 4, 2, 1, "fp32"]).all(axis=None)
    assert path.with_suffix(".md").read_text() in text and "profile=smoke" in text and "without effect" not in text
