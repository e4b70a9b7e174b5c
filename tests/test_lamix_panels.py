"""LaMix's figure 8, codes of a bottleneck of two units in the states that a run keeps, and the figure of PuzzleMix's pairs."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from test_lamix_figures import NET, of, runs
from torch import nn
from torch.nn.functional import cross_entropy
from trainers import config, data_home, trainer

from data.bundle import Batch
from experiments import store
from experiments.config import ConfigError
from experiments.figure import Runs
from experiments.figures import embedding, puzzle
from experiments.figures.trained import trained
from experiments.fit import keep_weights
from experiments.length import Length

__all__ = ["data_home"]  # a fixture
pytestmark = pytest.mark.usefixtures("one_thread")
COLOUR = ["dataset=cifar10", "dataset.source=embedded", "++dataset.size=16", "model.in_channels=3"]


@pytest.fixture(scope="module")
def squeezed(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Ten epochs in five, of which three states are kept, and the end; codes of two units."""
    words = ["method=lamix", "model.bottleneck=2", "epochs=10", "profile.epochs=0.5", "runtime.keep_weights=4"]
    return runs({"LaMix": words}, tmp_path_factory.mktemp("squeezed"), (1, 2))


def test_the_ratio_by_hand() -> None:
    codes = np.array([[0, 0], [0, 2], [4, 1], [4, 3], [0, 9], [2, 9.0]])  # centroids (0, 1), (4, 2), (1, 9): deviations 1, 1, 1
    y = np.array([3, 3, 7, 7, 5, 5])
    assert embedding.ratio(codes, y) == pytest.approx(math.hypot(4, 1))
    wide = np.concatenate([codes, [[-2, 9], [4, 9]]])  # and the third one's root of (1 + 1 + 9 + 9) / 4
    assert embedding.ratio(wide, np.append(y, [5, 5])) == pytest.approx(math.hypot(4, 1) / ((2 + math.sqrt(5)) / 3))
    assert embedding.ratio(codes[[0, 0, 2, 2]], y[:4]) == math.inf and math.isnan(embedding.ratio(codes[[0, 0, 0, 0]], y[:4]))


def test_the_states_nearest_to_the_parts_of_the_run(tmp_path: Path) -> None:
    for end, kept, looked in ((1000, range(0, 1001, 100), [100, 400, 700, 1000]), (15, range(0, 16, 3), [0, 6, 9, 15]), (20, [0], [0, 20])):
        run = store.Run(tmp_path / str(end))
        run.path.mkdir()
        for epoch in kept:
            (run.path / f"weights-{epoch:04d}.pt").touch()
        run.finish({"epochs": end})
        states = embedding.snapshots(run)
        assert list(states) == looked and states.pop(end) is None
        assert all(path == run.path / f"weights-{epoch:04d}.pt" for epoch, path in states.items())


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["epochs=1000", "runtime.keep_weights=100", "profile.epochs=0.05"], [*range(0, 51, 5)]),
        (["epochs=1000", "runtime.keep_weights=100", "profile.epochs=0"], [0, 1]),
        (["epochs=10", "runtime.keep_weights=4", "profile.epochs=2"], [0, 8, 16]),
        (["iterations=42", "runtime.keep_weights=3", "profile.epochs=0.5"], [0, 2, 4, 5]),  # in 4.2 that stand for 0, 1.8, 3.6, ...
        (["epochs=3"], []),
    ],
)
def test_states_are_kept_by_the_printed_protocol(tmp_path: Path, words: list[str], kept: list[int]) -> None:
    cfg = config(*words)
    length = Length(cfg, 5)
    for epoch in range(length.epochs + 1):
        keep_weights(cfg, store.Run(tmp_path), SimpleNamespace(epoch=epoch, epochs=length.epochs, length=length, net=nn.Linear(1, 1)))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"weights-{epoch:04d}.pt" for epoch in kept]


def test_codes_are_those_of_the_states(squeezed: Runs) -> None:
    drawing = embedding.draw(squeezed, [3, 4, 5], ["three", "four", "five"], limit=4)
    numbers = drawing.numbers.dropna(subset="metric").set_index(["seed", "epoch", "metric"])["value"]
    points = drawing.numbers[drawing.numbers["kind"] == "point"].groupby("epoch")
    assert len(numbers) == 2 * 4 * 2
    for seed, (place, epoch) in [(seed, state) for seed in (1, 2) for state in enumerate((0, 2, 4, 5))]:
        run = of(squeezed, "LaMix", seed)
        remade = trained(run, squeezed.runtime, run.path / f"weights-{epoch:04d}.pt" if epoch < 5 else None)
        x, y = remade.bundle.splits["train"]
        last = next(place for place, layer in enumerate(remade.net.features) if isinstance(layer, nn.Tanh))
        with torch.no_grad():
            codes = remade.net.features[: last + 1](remade.bundle.prepare(x)).double().numpy()
            accuracy = 100 * float((remade.net(remade.bundle.prepare(x)).argmax(1) == y).float().mean())
        chosen, labels = np.isin(y, [3, 4, 5]), y.numpy()
        ratio = embedding.ratio(codes[chosen], labels[chosen])
        assert numbers[seed, epoch].to_dict() == pytest.approx({embedding.RATIO: ratio, embedding.ACCURACY: accuracy}, rel=1e-3)
        if seed == 1:  # whose points are drawn
            mine, first = points.get_group(epoch), np.concatenate([codes[labels == k][:4] for k in (3, 4, 5)])
            assert set(mine["seed"]) == {1} and mine["label"].tolist() == [3] * 4 + [4] * 4 + [5] * 4
            dots = np.concatenate([np.asarray(dots.get_offsets()) for dots in drawing.picture.axes[place].collections])
            assert mine[["x", "y"]].to_numpy() == pytest.approx(first, abs=1e-6) and dots == pytest.approx(first, abs=1e-6)


def test_tightening_takes_three_snapshots_and_growth() -> None:
    def said(*given: tuple[list[float], float]) -> str:
        """Of seeds with these ratios and this accuracy."""
        values = [
            {"row": "a", "choice": "", "seed": seed, "epoch": epoch, "metric": metric, "value": value}
            for seed, (ratios, accuracy) in enumerate(given)
            for epoch, ratio in enumerate(ratios)
            for metric, value in ((embedding.RATIO, ratio), (embedding.ACCURACY, accuracy))
        ]
        return next(line for line in embedding.lines(pd.DataFrame(values)) if "tightening" in line)

    seen = said(([3, 1, 2], 100), ([1, 3, 2], 99), ([1, 2], 100), ([1, 3, 4], 98.9))
    assert seen.endswith(": seen in 1 of 2 seeds; not tried in 1 seeds, below 99 % of training accuracy at the second snapshot")
    assert said(([1, 2], 100)).endswith(": not tried: it takes three snapshots")


def test_embedding_refuses_runs_without_states_or_codes(squeezed: Runs, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"kept no states of its network; .* runtime\.keep_weights=N, each N epochs, so remove"):
        embedding.snapshots(store.Run(tmp_path))
    with pytest.raises(ConfigError, match=r"^figure\.runs: some/run has no bottleneck of two units; .* model\.bottleneck=2$"):
        embedding.passed(trainer(*NET, "model.bottleneck=3"), Path("some/run"))
    with pytest.raises(ConfigError, match=r"^figure\.runs: no run that is to be shown is done yet$"):
        embedding.draw(Runs(squeezed.table, squeezed.wanted, {}, squeezed.runtime), [3], ["three"])


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """PuzzleMix without transport on colours, and LaMix on it on digits, where cells move at no cost; one step each."""
    short = ["profile.epochs=0", "profile.steps=1", "batch_size=20"]
    plain = ["method=puzzlemix", *COLOUR, "method.puzzlemix.blocks=[2,4,8]", "method.puzzlemix.transport=false"]
    lamix = ["method=lamix_puzzle", *(f"method.lamix_puzzle.puzzle.{word}" for word in ("blocks=[2,7,14]", "t_eps=0", "beta=0.3"))]
    return runs({"PuzzleMix": [*plain, *short], "LaMix": [*lamix, *short]}, tmp_path_factory.mktemp("made"))


@pytest.mark.parametrize(("row", "grids"), [("PuzzleMix", [2, 2, 4, 4, 8]), ("LaMix", [2, 2, 7, 7, 14])])
def test_panels_are_what_the_method_makes_of_the_two_images_alone(masked: Runs, row: str, grids: list[int]) -> None:
    """The images are recognized by their pixels."""
    of_row = Runs(masked.table, masked.wanted[masked.wanted["row"] == row], masked.done, masked.runtime)
    drawing, run = puzzle.draw(of_row, pairs=5, lam=0.3), trained(of(masked, row, 1), masked.runtime)
    bundle, method, numbers = run.bundle, puzzle.used(run, Path("run")), drawing.numbers
    images, labels = bundle.splits["test"]
    black = bundle.prepare(torch.zeros_like(images[:1]))
    assert numbers["n"].tolist() == grids
    axes = drawing.picture.axes
    for pair, (n, share) in enumerate(zip(grids, numbers["value"], strict=True)):
        *pixels, heat, other, mask, both = (np.asarray(axis.images[0].get_array()) for axis in axes[pair::5])
        assert mask.shape == (n, n) and {*mask.flatten()} <= {0, 0.5, 1} and share == pytest.approx(mask.mean())
        given = [torch.tensor(255 * values).round().reshape(*images.shape[2:], -1).permute(2, 0, 1) for values in pixels]
        at = torch.cat([(images == values).flatten(1).all(1).nonzero()[0] for values in given])
        y = labels[at]
        assert numbers.loc[pair, ["first", "second"]].tolist() == [f"class {label}" for label in y.tolist()]
        x = bundle.prepare(images[at]).requires_grad_()
        cross_entropy(run.net(x), y).backward()
        for shown, norm in zip((heat, other), x.grad.norm(dim=1).flatten(1).numpy(), strict=True):
            assert shown.flatten() / shown.sum() == pytest.approx(norm / norm.sum(), rel=1e-3, abs=1e-6)
        method.n = n
        mixed, _ = method.mix(Batch(x.detach(), y, y, scale=bundle.scale), torch.tensor([1, 0]), torch.tensor(0.3), run.net)
        mixed = ((mixed[:1] - black) * bundle.scale)[0].permute(1, 2, 0).numpy().reshape(both.shape)
        assert both == pytest.approx(mixed, abs=1e-5) and both.min() >= 0 and both.max() <= 1
    first, second = numbers["value"][:2]
    assert drawing.lines[0] == f"2 × 2 blocks: share of the first image {first:.2f}, {second:.2f}" and numbers["value"].nunique() > 1


def test_pairs_are_of_two_classes_and_of_each_class_in_turn() -> None:
    assert puzzle.chosen(torch.tensor([0, 0, 0, 0, 2, 1, 2, 1, 5]), 4).tolist() == [[0, 1, 2, 5], [7, 4, 6, 8]]


def test_what_cannot_be_drawn_is_one_line(masked: Runs) -> None:
    for options, said in (
        ({"pairs": 31}, r"\.pairs: 31 pairs need 62 test images, and there are 60$"),
        ({"lam": 1.5}, ": pairs must be at least 1, and lam between 0 and 1$"),
        ({"names": ["a", "b"]}, r"\.names: 2 names for 10 classes; \[\] numbers them$"),
    ):
        with pytest.raises(ConfigError, match=rf"^figure\.draw{said}"):
            puzzle.draw(masked, **options)
    with pytest.raises(ConfigError, match=r"^figure\.runs: some/run mixes no images by masks; .* must be puzzlemix or lamix_puzzle$"):
        puzzle.used(trainer("method=lamix"), Path("some/run"))
    with pytest.raises(ConfigError, match=r"^figure\.runs: no run that is to be shown is done yet$"):
        puzzle.draw(Runs(masked.table, masked.wanted, {}, masked.runtime))
