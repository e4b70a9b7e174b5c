"""The timing table of PER's section 4.3.1: what is measured is what was asked for, and stands beside the paper's ratios."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from experiments.bench import methods
from experiments.bench.configs import Asked
from experiments.cli import CONF, main
from experiments.config import ConfigError
from experiments.figure import run
from experiments.figures import timing

FIGURE = OmegaConf.load(CONF / "figure" / "per_timing.yaml")
OPTIONS: dict[str, Any] = OmegaConf.to_container(FIGURE.draw)  # type: ignore[assignment]
OPTIONS.pop("_target_")
MACHINE = ("device", "threads", "cores", "load", "torch", "commit", "dirty")
Pairs = dict[str, tuple[DictConfig, DictConfig, Asked]]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[timing.Drawing, Pairs]]:
    """The drawing for these overrides, timed by a clock of its own; and what would have been timed."""

    def draw(*overrides: str) -> tuple[timing.Drawing, Pairs]:
        seen: Pairs = {}

        def compare(row_id: str, what: str, over: str, good: str, sides: tuple[DictConfig, DictConfig], asked: Asked) -> dict[str, Any]:
            seen[what] = (*sides, asked)
            ratio = 1 + len(seen) / 8
            return {"ratio": ratio, "q1": ratio - 0.25, "q3": ratio + 0.5, "note": "noisy", "ms a": 100 * ratio, "ms b": 100.0}

        monkeypatch.setattr(timing, "suite", lambda cfg: cfg)
        monkeypatch.setattr(timing, "machine", lambda cfg: dict.fromkeys(MACHINE, "one"))
        monkeypatch.setattr(timing, "compare", compare)
        monkeypatch.setattr(timing, "parameters", lambda cfg: 10 + 7 * len(cfg.method))
        return timing.draw([*overrides, "runtime.threads=1"], **OPTIONS), seen

    return draw


def test_rows_are_the_papers_methods_in_its_network(drawn):
    drawing, seen = drawn()
    assert [*seen] == ["vanilla", "bn", "vcl", "per", "per toeplitz", "per analytic", "l2"]
    assert {*seen} <= {"vanilla", *methods.IDS}
    for name, (cfg, plain, asked) in seen.items():
        assert (plain.norm._target_, plain.method, plain.dataset.source) == ("torch.nn.Identity", {}, "embedded"), name
        assert cfg.model._target_.endswith("cnn11") and cfg.model.activation == "elu" and cfg.batch_size == plain.batch_size == 125, name
        assert (asked.rounds, asked.steps) == (11, None), name
    assert seen["vanilla"][0] == seen["vanilla"][1]
    assert seen["bn"][0].norm.eps == 1e-3
    assert seen["per toeplitz"][0].method.per.directions == "toeplitz"
    assert seen["per analytic"][0].method.per.mode == "analytic"
    assert seen["per"][0].method.per.slices == 256
    numbers = drawing.numbers.set_index("method")
    assert numbers["parameters"].to_dict() == {name: 7 * (name not in ("vanilla", "bn")) for name in seen}


def test_papers_ratios_come_from_its_seconds(drawn):
    drawing, _ = drawn()
    paper = drawing.numbers.set_index("method")["paper_ratio"].dropna()
    assert paper.to_dict() == pytest.approx({"vanilla": 1, "bn": 83 / 71, "vcl": 87 / 71, "per": 93 / 71})
    head, rule, *rows = (re.split(r"\s*\|\s*", line.strip("| ")) for line in drawing.table.splitlines())
    assert head[:4] == ["method", "ratio", "quartiles", "paper"]
    assert set("".join(rule)) <= set(":-")
    assert rows[2] == ["VCL", "1.375", "1.125 to 1.875", "1.23", "137.5", "100.0", "7", "350K", "noisy"]
    assert [row[3] for row in rows] == ["1.00", "1.17", "1.23", "1.31", "", "", ""]


def test_picture_shows_the_numbers(drawn):
    drawing, _ = drawn()
    (axis,) = drawing.picture.axes
    assert [bar.get_width() for bar in axis.patches] == list(drawing.numbers["ratio"])
    ends = [segment[:, 0].tolist() for segment in axis.collections[0].get_segments()]
    assert ends == [[row.q1, row.q3] for row in drawing.numbers.itertuples()]
    marks = next(line for line in axis.lines if line.get_label().startswith("paper"))
    assert list(marks.get_xdata())[:4] == pytest.approx([1, 83 / 71, 87 / 71, 93 / 71])
    assert [text.get_text() for text in axis.get_yticklabels()] == list(drawing.numbers["label"])
    assert "batch 125 on a CPU, fp32, eager, median of 11 paired rounds" in axis.get_xlabel()


def test_batch_is_the_papers_on_a_gpu(drawn, monkeypatch):
    monkeypatch.setattr(timing, "on_gpu", lambda cfg: True)
    drawing, seen = drawn()
    assert {(cfg.batch_size, plain.batch_size) for cfg, plain, _ in seen.values()} == {(250, 250)}
    assert "batch 250 on a GPU" in drawing.lines[0]


def test_overrides_reach_what_is_measured(drawn):
    drawing, seen = drawn("precision=bf16", "step=graph", "batch_size=9", "method=[per,l2]", "method.per.slices=3")
    assert [*seen] == ["vanilla", "per", "per toeplitz", "per analytic", "l2"]
    for cfg, plain, _ in seen.values():
        assert {(one.precision, one.step, one.batch_size) for one in (cfg, plain)} == {("bf16", "graph", 9)}
    assert seen["per"][0].method.per.slices == 3
    assert "batch 9 on a CPU, bf16, graph" in drawing.lines[0]
    with pytest.raises(ConfigError, match="nonsense is not known"):
        drawn("method=nonsense")


def test_smoke_is_short(drawn):
    for words, batch, rounds in ((["profile=smoke"], 10, 2), (["profile=smoke", "batch_size=7", "profile.steps=5"], 7, 5)):
        _, seen = drawn(*words)
        assert {(cfg.batch_size, asked.rounds, asked.steps) for cfg, _, asked in seen.values()} == {(batch, rounds, 1)}


def test_parameters_are_counted_as_the_paper_counts_them_but_for_bn(monkeypatch):
    asked = Asked(["runtime.threads=1", "batch_size=4"])
    count = {name: timing.parameters(asked.method("cnn11", name)) for name in ("vanilla", "bn", "vcl", "per", "l2")}
    extra = {name: value - count["vanilla"] for name, value in count.items()}
    assert extra == {"vanilla": 0, "bn": 2 * 2544, "vcl": 350_460, "per": 0, "l2": 0}


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["profile=smoke", "batch_size=4", "method=[l2]", "runtime.threads=1", "runtime.device=cpu"]
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["figure", "figure=per_timing", f"out={tmp_path}", *words])
    main(run, "figures")
    text = capsys.readouterr().out
    (path,) = tmp_path.glob("*.csv")
    with open(path, newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert [*rows] == ["vanilla", "l2"]
    for row in rows.values():
        assert 0 < float(row["q1"]) <= float(row["ratio"]) <= float(row["q3"])
        assert float(row["ms"]) > 0 < float(row["vanilla_ms"])
        assert (row["model"], row["batch_size"], row["rounds"], row["threads"], row["precision"]) == ("cnn11", "4", "2", "1", "fp32")
        assert row["device"] and row["commit"] and row["torch"] == torch.__version__ and "batch_size=4" in row["of_asked"]
    assert [row["parameters"] for row in rows.values()] == ["0", "0"]
    whole = path.with_suffix(".md").read_text()
    assert whole in text
    assert "\n\n| method " in whole and "|\n\n- ratio: " in whole  # a table for Markdown has empty lines round it
    assert "asked for besides: profile=smoke" in whole and "without effect" not in whole
    assert path.with_suffix(".png").read_bytes()[1:4] == b"PNG"
