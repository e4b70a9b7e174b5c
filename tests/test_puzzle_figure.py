"""The figure of PuzzleMix's pairs: what it draws is what the method makes of two images, and its numbers are the masks'."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from test_lamix_figures import of, runs
from test_trainer import data_home, trainer
from torch import Tensor
from torch.nn.functional import cross_entropy

from data.bundle import Batch
from experiments.cli import main
from experiments.config import ConfigError
from experiments.figure import Drawing, Runs
from experiments.figure import run as task
from experiments.figures import puzzle
from experiments.figures.trained import trained

__all__ = ["data_home"]  # a fixture
pytestmark = pytest.mark.usefixtures("one_thread")
COLOUR = ["dataset=cifar10", "dataset.source=embedded", "++dataset.size=16", "model.in_channels=3"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """PuzzleMix without transport on colours, and LaMix on it on digits, where cells move at no cost; one step each."""
    short = ["profile.epochs=0", "profile.steps=1", "batch_size=20"]
    plain = ["method=puzzlemix", *COLOUR, "method.puzzlemix.blocks=[2,4,8]", "method.puzzlemix.transport=false"]
    lamix = ["method=lamix_puzzle", *(f"method.lamix_puzzle.puzzle.{word}" for word in ("blocks=[2,7,14]", "t_eps=0", "beta=0.3"))]
    return runs({"PuzzleMix": [*plain, *short], "LaMix": [*lamix, *short]}, tmp_path_factory.mktemp("made"))


def of_row(made: Runs, row: str) -> Runs:
    return Runs(made.table, made.wanted[made.wanted["row"] == row], made.done, made.runtime)


def shown(drawing: Drawing, pairs: int) -> list[list[np.ndarray]]:
    """Of each pair, its panels from above."""
    flat = [np.asarray(axis.images[0].get_array()) for axis in drawing.picture.axes]
    assert len(flat) == 6 * pairs
    return [flat[place::pairs] for place in range(pairs)]


@pytest.mark.parametrize(("row", "grids"), [("PuzzleMix", [2, 2, 4, 4, 8]), ("LaMix", [2, 2, 7, 7, 14])])
def test_shares_are_those_of_the_masks_that_are_drawn(made: Runs, row: str, grids: list[int]) -> None:
    drawing = puzzle.draw(of_row(made, row), pairs=5, lam=0.3)
    numbers, columns = drawing.numbers, shown(drawing, 5)
    assert numbers["n"].tolist() == grids and set(numbers["metric"]) == {puzzle.SHARE} and set(numbers["source"]) == {"computed here"}
    for n, value, (_, _, _, _, mask, _) in zip(grids, numbers["value"], columns, strict=True):
        assert mask.shape == (n, n) and {*mask.flatten()} <= {0, 0.5, 1} and value == pytest.approx(mask.mean())
    assert numbers["value"].nunique() > 1
    pairs = zip(numbers["n"], numbers["first"], numbers["second"], numbers["value"], strict=True)
    words = [(f"{n} × {n} blocks", f"{100 * p:.0f} % {a}\n+ {100 - 100 * p:.0f} % {b}") for n, a, b, p in pairs]
    axes = drawing.picture.axes
    assert [(axes[place].get_title(), axes[place - 5].get_xlabel()) for place in range(5)] == words
    first, second = numbers["value"][:2]
    assert drawing.lines[0] == f"2 × 2 blocks: share of the first image {first:.2f}, {second:.2f}"
    assert drawing.lines[3] == f"mean over 5 pairs: {sum(numbers['value']) / 5:.2f}" and f"{row}, seed 1" in drawing.lines[4]


def place(images: Tensor, pixels: np.ndarray) -> int:
    """Where the image of these pixels [H, W, C] in 0 .. 1 is among bytes [N, C, H, W]."""
    bytes_ = torch.tensor(255 * pixels).round().reshape(*images.shape[2:], -1).permute(2, 0, 1)
    return int((images == bytes_).flatten(1).all(1).nonzero()[0])


@pytest.mark.parametrize("row", ["PuzzleMix", "LaMix"])
def test_panels_are_what_the_method_makes_of_the_two_images_alone(made: Runs, row: str) -> None:
    """Images are found again by their pixels; without transport a mixed one is the sum by the mask."""
    drawing, one = puzzle.draw(of_row(made, row), pairs=3), trained(of(made, row, 1), made.runtime)
    bundle, method = one.bundle, puzzle.used(one, Path("run"))
    images, labels = bundle.splits["test"]
    sums = []
    for pair, (*pixels, heat, other, mask, both) in enumerate(shown(drawing, 3)):
        at = torch.tensor([place(images, each) for each in pixels])
        y = labels[at]
        assert drawing.numbers.loc[pair, ["first", "second"]].tolist() == [f"class {label}" for label in y.tolist()]
        x = bundle.prepare(images[at]).requires_grad_()
        cross_entropy(one.net(x), y).backward()
        norms = x.grad.norm(dim=1).flatten(1).numpy()
        for map_, norm in zip((heat, other), norms, strict=True):
            assert map_.flatten() / map_.sum() == pytest.approx(norm / norm.sum(), rel=1e-3, abs=1e-6)
        method.n = len(mask)
        mixed, _ = method.mix(Batch(x.detach(), y, y, scale=bundle.scale), torch.tensor([1, 0]), torch.tensor(0.5), one.net)
        black = bundle.prepare(torch.zeros_like(images[:1]))
        mixed = ((mixed[:1] - black) * bundle.scale)[0].permute(1, 2, 0).numpy()
        assert both == pytest.approx(mixed.reshape(both.shape), abs=1e-5) and both.min() >= 0 and both.max() <= 1
        z = np.kron(mask, np.ones((len(both) // len(mask),) * 2)).reshape(*both.shape[:2], *[1] * (both.ndim - 2))
        sums.append(np.abs(both - z * pixels[0] - (1 - z) * pixels[1]).max())
    assert max(sums) < 1e-5 if row == "PuzzleMix" else max(sums) > 0.1


def test_pairs_are_of_two_classes_and_of_each_class_in_turn() -> None:
    y = torch.tensor([0, 0, 0, 0, 2, 1, 2, 1, 5])
    first, second = puzzle.chosen(y, 4).tolist()
    assert (first, second) == ([0, 1, 2, 5], [7, 4, 6, 8])
    assert sorted(puzzle.chosen(y, 2).flatten().tolist()) == [0, 4, 5, 8]  # the first of each
    for pairs in range(1, 13):
        first, second = puzzle.chosen(torch.arange(50) * 7 % 10, pairs)
        assert len({*first.tolist(), *second.tolist()}) == 2 * pairs and ((first - second) * 7 % 10 != 0).all()


def test_what_cannot_be_drawn_is_one_line(made: Runs) -> None:
    for options, said in (
        ({"pairs": 31}, r"^figure\.draw\.pairs: 31 pairs need 62 test images, and there are 60$"),
        ({"pairs": 0}, r"^figure\.draw: pairs must be at least 1, and lam between 0 and 1$"),
        ({"lam": 1.5}, r"^figure\.draw: pairs must be at least 1"),
        ({"names": ["a", "b"]}, r"^figure\.draw\.names: 2 names for 10 classes; \[\] numbers them$"),
    ):
        with pytest.raises(ConfigError, match=said):
            puzzle.draw(of_row(made, "LaMix"), **options)
    with pytest.raises(ConfigError, match=r"^figure\.runs: some/run mixes no images by masks; .* must be puzzlemix or lamix_puzzle$"):
        puzzle.used(trainer("method=lamix"), Path("some/run"))
    with pytest.raises(ConfigError, match=r"^figure\.runs: no run that is to be shown is done yet$"):
        puzzle.draw(Runs(made.table, made.wanted, {}, made.runtime))


@pytest.mark.usefixtures("narrow")
def test_the_figure_draws_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fixed = ["profile=smoke", "profile.steps=1", "batch_size=10", "runtime.threads=1", "runtime.device=cpu", "++model.width=16"]
    monkeypatch.setattr(sys, "argv", ["figure", "figure=lamix_puzzle", f"out={tmp_path}", f"runtime.runs={tmp_path}/runs", *fixed])
    main(task, "figures")
    [table] = tmp_path.glob("*.csv")
    numbers, text = pd.read_csv(table), capsys.readouterr().out
    assert numbers["n"].tolist() == [2, 2, 4, 4, 8, 8, 16, 16] and numbers["value"].between(0, 1).all()
    assert (numbers["first"] != numbers["second"]).all() and {"airplane", "cat"} <= {*numbers["first"]}
    assert "- 2 × 2 blocks: share of the first image " in text and f"- mean over 8 pairs: {numbers['value'].mean():.2f}" in text
    assert table.with_suffix(".png").stat().st_size > 10_000
