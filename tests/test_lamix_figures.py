"""LaMix's figures 7 and 8, and the errors with statistics gathered anew: what they compute, against numbers made here."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from nets import small
from omegaconf import OmegaConf
from test_trainer import config, data_home, trainer
from torch import Tensor, nn

from experiments import store
from experiments.config import ConfigError, Runtime
from experiments.figure import Runs
from experiments.figures import cam, embedding, statistics
from experiments.figures.trained import trained
from experiments.fit import keep_weights
from experiments.length import Length
from experiments.spec import Column, Row, Table
from experiments.train import folder, train
from models.norm import BatchNorm

__all__ = ["data_home"]  # a fixture
pytestmark = pytest.mark.usefixtures("one_thread")
NET = ["model=wrn28_10", "model.in_channels=1", "model.depth=10", "model.width=1", "optim.lr=0.1", "optim.momentum=0.9"]
NET += ["evaluate.batch_size=30"]  # two of the test set, three and a part of the training set
METHODS = ("LaMix", "Mixup", "CutMix")


def runs(rows: dict[str, list[str]], root: Path, seeds: tuple[int, ...] = (1,)) -> Runs:
    lines, done = [], {}
    for row, words in rows.items():
        for seed in seeds:
            cfg = config(*NET, *words, f"seed={seed}", f"runtime.runs={root}")
            train(cfg)
            one = folder(cfg)
            done[one.path.name[-10:]] = one
            lines.append({"row": row, "choice": "", "column": "error", "seed": seed, "id": one.path.name[-10:]})
    table = Table("t", columns={"error": Column("test/error", better="min")}, rows=[Row(row) for row in rows])
    return Runs(table, pd.DataFrame(lines), done, OmegaConf.structured(Runtime(device="cpu", threads=1, runs=str(root))))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """LaMix, Mixup and CutMix, two seeds each, with most digits right."""
    words = ["epochs=10", "schedule.at=[6]", "batch_size=10"]
    return runs({name: [f"method={name.lower()}", *words] for name in METHODS}, tmp_path_factory.mktemp("made"), (1, 2))


def of(made: Runs, row: str, seed: int) -> store.Run:
    [job] = made.wanted[(made.wanted["row"] == row) & (made.wanted["seed"] == seed)].itertuples()
    return made.done[job.id]


def only(made: Runs, *rows: str) -> Runs:
    return Runs(made.table, made.wanted[made.wanted["row"].isin(rows)], made.done, made.runtime)


# figure 7


@pytest.mark.parametrize("model", ["preact_resnet18", "wrn28_10", "resnet18"])
def test_the_mean_of_a_map_and_the_bias_are_the_logit(model: str) -> None:
    """P-A3 of the protocol sheet."""
    one = trainer(*small(model), *(["model.depth=10"] if model == "wrn28_10" else []), "evaluate.batch_size=7")
    one.net.eval()
    x = one.bundle.splits["test"][0]
    maps, predicted = cam.activation_maps(one, Path("run"), x)
    with torch.no_grad():
        logits = one.net(one.bundle.prepare(x))
    assert maps.shape[0] == len(x) and maps.shape[1] > 1 and torch.equal(predicted, logits.argmax(1))
    largest = logits.max(1).values
    assert (maps.mean((1, 2)) + one.net.classifier.bias[predicted] - largest).abs().max() < 1e-5 * max(1, float(largest.abs().max()))


def enlarged(values: np.ndarray, size: int) -> np.ndarray:
    """Bilinear, without aligned corners, of one map."""

    def weights(count: int) -> np.ndarray:
        at = np.clip((np.arange(size) + 0.5) * count / size - 0.5, 0, count - 1)
        return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(count)))

    large = weights(values.shape[0]) @ values @ weights(values.shape[1]).T
    return (large - large.min()) / (large.max() - large.min())


def width(values: np.ndarray) -> tuple[float, float]:
    """Area and entropy of one map."""
    q = [one / values.sum() for one in values.flatten().tolist() if one > 0]
    return sum(one >= 0.5 for one in values.flatten()) / values.size, -sum(one * math.log(one) for one in q)


def test_maps_are_scaled_and_measured_by_hand() -> None:
    raw = torch.tensor([[[-3.0, -1.0], [-2.0, 5.0]], [[0.7, 0.7], [0.7, 0.7]], [[1e6, 1e6], [1e6, 1e6 + 0.0625]], [[0.0, 0.0], [0.0, 0.0]]])
    maps = cam.scaled(raw, (6, 6))
    assert maps.shape == (4, 6, 6) and not maps[1:].any()  # constant, if only up to rounding
    assert maps[0] == pytest.approx(enlarged(raw[0].numpy(), 6), abs=1e-6)
    assert maps[0, 0, 0] == 0 and maps[0, 5, 5] == 1  # signed: nothing is clipped at 0
    area, entropy = width(maps[0])
    assert cam.area(maps).tolist() == [area, 0, 0, 0] and 0 < area < 0.5
    assert cam.entropy(maps)[0] == pytest.approx(entropy, abs=1e-6) and np.isnan(cam.entropy(maps)[1:]).all()
    assert cam.entropy(np.ones((1, 4, 8)))[0] == pytest.approx(math.log(32))


def seen(run: store.Run, made: Runs, classes: tuple[int, ...]) -> tuple[Tensor, Tensor, list[np.ndarray]]:
    """Of a run's test images of these classes: the labels, whether they are right, and their maps."""
    one = trained(run, made.runtime)
    x, y = one.bundle.splits["test"]
    x, y = x[sum(y == k for k in classes).bool()], y[sum(y == k for k in classes).bool()]
    body = one.net.features[:-2]  # then come pool and flatten
    with torch.no_grad():
        a = body(one.bundle.prepare(x)).numpy()
        w, logits = one.net.classifier.weight.numpy(), one.net(one.bundle.prepare(x))
    predicted = logits.argmax(1)
    maps = [enlarged(np.tensordot(w[c], a[i], 1), 28) for i, c in enumerate(predicted.tolist())]
    return y, predicted == y, maps


def test_areas_and_entropies_are_those_of_the_images_that_all_classify_right(made: Runs) -> None:
    drawing = cam.draw(made, [2, 6], ["two", "six"], shown=2)
    numbers = drawing.numbers.set_index(["seed", "row", "metric"])
    assert len(numbers) == 2 * 3 * 2 and set(numbers["source"]) == {"computed here"} and not any(numbers["choice"])
    partly = False
    for seed in (1, 2):
        found = {row: seen(of(made, row, seed), made, (2, 6)) for row in METHODS}
        right = torch.stack([one[1] for one in found.values()]).all(0)
        partly |= any((one[1] & ~right).any() for one in found.values())
        for row, (_, _, maps) in found.items():
            widths = np.array([width(maps[i]) for i in right.nonzero().flatten()])
            for metric, mean, slack in zip((cam.AREA, cam.ENTROPY), widths.mean(0), (0.5 / 784, 1e-4), strict=True):
                one = numbers.loc[seed, row, metric]
                assert one["n"] == len(widths) > 2 and one["value"] == pytest.approx(mean, abs=slack)
    assert partly  # not each image that one network classifies right is one
    y, _, _ = seen(of(made, "LaMix", 1), made, (2, 6))
    images = made_images(made)
    first = [seen(of(made, row, 1), made, (2, 6)) for row in METHODS]
    right = torch.stack([one[1] for one in first]).all(0)
    shown = [int(i) for k in (2, 6) for i in ((y == k) & right).nonzero().flatten()[:2]]
    panels = [axis for axis in drawing.picture.axes if axis.images]
    assert len(panels) == 4 * len(shown) and [axis.get_ylabel() for axis in panels[::4]] == ["two", "two", "six", "six"][: len(shown)]
    for line, i in enumerate(shown):
        for place, axis in enumerate(panels[4 * line : 4 * line + 4]):
            assert np.array_equal(axis.images[0].get_array(), images[i]) and len(axis.images) == 1 + (place > 0)
            if place:
                assert np.asarray(axis.images[1].get_array()) == pytest.approx(first[place - 1][2][i], abs=1e-4)
    mean = numbers.loc[:, "Mixup", cam.AREA]["value"]
    assert panels[2].get_title() == f"Mixup\narea {mean.mean():.2f}"
    counts = numbers.loc[:, "Mixup", cam.AREA]["n"]
    each = f"{counts.min()} to {counts.max()}" if counts.nunique() > 1 else f"{counts.min()}"
    both = numbers.loc[:, "Mixup", cam.ENTROPY]["value"]
    said = f"Mixup: area with CAM >= 0.5 {mean.mean():.3f} ± {mean.std():.3f}, entropy {both.mean():.3f} ± {both.std():.3f} nats"
    assert drawing.lines[1] == f"{said} over 2 seeds, {each} images"


def made_images(made: Runs) -> np.ndarray:
    """The test images of classes 2 and 6, [n, H, W]."""
    x, y = trained(of(made, "LaMix", 1), made.runtime).bundle.splits["test"]
    return x[(y == 2) | (y == 6)][:, 0].numpy()


def areas(rows: dict[str, list[float]]) -> pd.DataFrame:
    """What `cam.lines` reads: areas by seed."""
    known = {"choice": "", "n": 7}
    lines = [
        known | {"row": row, "seed": seed, "metric": metric, "value": value}
        for row, values in rows.items()
        for seed, value in enumerate(values, 1)
        for metric in (cam.AREA, cam.ENTROPY)
    ]
    return pd.DataFrame(lines)


def test_narrower_is_narrower_than_all_others() -> None:
    says = "narrower (smaller area) with Net LaMix than with Mixup, CutMix (paper, in words): "
    rows = {"Net LaMix": [0.2, 0.3, 0.2, math.nan], "Mixup": [0.3, 0.4, 0.1, math.nan], "CutMix": [0.4, 0.3, 0.4, math.nan]}
    assert cam.lines(areas(rows))[3] == f"{says}seen in 1 of 3 seeds"
    assert cam.lines(areas({row: [math.nan] for row in rows}))[3] == f"{says}not tried: no image counts"
    for alone in (["Net LaMix"], ["Mixup", "CutMix"]):
        assert not any("narrower" in line for line in cam.lines(areas({row: rows[row] for row in alone})))


def test_images_that_are_never_right_are_shown_and_not_counted(made: Runs, tmp_path: Path) -> None:
    one = store.Run(tmp_path / "wrong")
    shutil.copytree(of(made, "LaMix", 1).path, one.path)
    state = torch.load(one.path / "checkpoint.pt", weights_only=True)
    state["net"]["classifier.bias"][2] += 1e6
    torch.save(state, one.path / "checkpoint.pt")
    wanted = made.wanted[(made.wanted["seed"] == 1) & (made.wanted["row"] != "CutMix")]
    wrong = Runs(made.table, wanted, made.done | {wanted["id"].iloc[0]: one}, made.runtime)
    said = "no six is classified correctly by all networks of seed 1; the first ones are shown all the same"
    drawing = cam.draw(wrong, [6], ["six"])
    assert drawing.lines[-1] == said and drawing.numbers["value"].isna().all() and not drawing.numbers["n"].any()
    assert [axis.get_ylabel() for axis in drawing.picture.axes[::3]][:2] == ["six", "six"]
    drawing = cam.draw(wrong, [2, 6], ["two", "six"])  # the twos are right
    assert drawing.lines[-1] == said and drawing.numbers["value"].notna().all()


def test_seeds_without_all_rows_are_left_out(made: Runs) -> None:
    gone = {of(made, "Mixup", 2).path.name[-10:]}
    some = Runs(made.table, made.wanted, {key: one for key, one in made.done.items() if key not in gone}, made.runtime)
    whole, fewer = (cam.draw(each, [2, 6], ["two", "six"]).numbers for each in (made, some))
    assert fewer.equals(whole[whole["seed"] == 1].reset_index(drop=True))
    gone |= {of(made, "LaMix", 1).path.name[-10:], of(made, "CutMix", 1).path.name[-10:]}
    none = Runs(made.table, made.wanted, {key: one for key, one in made.done.items() if key not in gone}, made.runtime)
    with pytest.raises(ConfigError, match=r"^figure\.runs: in no seed the runs of all rows are done"):
        cam.draw(none, [2], ["two"])


def test_cam_refuses_what_it_cannot_draw(made: Runs) -> None:
    for classes, names, shown, said in (
        ([2, 6], ["two"], 2, r"^figure\.draw\.names: 1 names for 2 classes$"),
        ([2, 10], ["two", "ten"], 2, r"^figure\.draw\.classes: no image is of class 10; allowed: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9$"),
        ([2], ["two"], 0, r"^figure\.draw\.shown: 0 is not allowed; it must be at least 1$"),
    ):
        with pytest.raises(ConfigError, match=said):
            cam.draw(made, classes, names, shown)
    for words in (["model=net2c"], [*NET, "model.bottleneck=2"]):
        one = trainer(*words)
        with pytest.raises(ConfigError, match=r"^figure\.runs: some/run has no global average pool right before its .*, so no CAM$"):
            cam.activation_maps(one, Path("some/run"), one.bundle.splits["test"][0])
    apart = pd.concat([made.wanted, made.wanted.iloc[::-1].assign(column="other")])
    with pytest.raises(ConfigError, match=r"^figure\.runs\.columns: error, other hold different runs"):
        cam.draw(Runs(made.table, apart, made.done, made.runtime), [2], ["two"])


# figure 8


def test_the_ratio_by_hand() -> None:
    codes = np.array([[0, 0], [0, 2], [4, 1], [4, 3], [0, 9], [2, 9.0]])  # centroids (0, 1), (4, 2), (1, 9): deviations 1, 1, 1
    y = np.array([3, 3, 7, 7, 5, 5])
    assert embedding.ratio(codes, y) == pytest.approx(math.hypot(4, 1))
    wide = np.concatenate([codes, [[-2, 9], [4, 9]]])  # and the third one's root of (1 + 1 + 9 + 9) / 4
    assert embedding.ratio(wide, np.append(y, [5, 5])) == pytest.approx(math.hypot(4, 1) / ((2 + math.sqrt(5)) / 3))
    assert embedding.ratio(codes[[0, 0, 2, 2]], y[:4]) == math.inf and math.isnan(embedding.ratio(codes[[0, 0, 0, 0]], y[:4]))


@pytest.mark.parametrize(
    ("end", "kept", "looked"),
    [
        (1000, range(0, 1001, 100), [100, 400, 700, 1000]),
        (200, range(0, 201, 20), [20, 80, 140, 200]),
        (15, range(0, 16, 3), [0, 6, 9, 15]),
        (10, [0, 4, 8], [0, 4, 8, 10]),
        (1, [0, 1], [0, 1]),
        (20, [0], [0, 20]),
    ],
)
def test_the_states_nearest_to_the_parts_of_the_run(tmp_path: Path, end: int, kept: list[int], looked: list[int]) -> None:
    one = store.Run(tmp_path)
    for epoch in kept:
        (tmp_path / f"weights-{epoch:04d}.pt").touch()
    one.finish({"epochs": end})
    found = embedding.snapshots(one)
    assert list(found) == looked and found.pop(end) is None
    assert all(path == tmp_path / f"weights-{epoch:04d}.pt" for epoch, path in found.items())


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["epochs=10", "runtime.keep_weights=4"], [0, 4, 8]),
        (["epochs=10", "runtime.keep_weights=4", "profile.epochs=0.5"], [0, 2, 4]),
        (["epochs=1000", "runtime.keep_weights=100", "profile.epochs=0.2"], [*range(0, 201, 20)]),
        (["epochs=1000", "runtime.keep_weights=100", "profile.epochs=0.05"], [*range(0, 51, 5)]),
        (["epochs=1000", "runtime.keep_weights=100", "profile.epochs=0"], [0, 1]),
        (["epochs=3", "runtime.keep_weights=1"], [0, 1, 2, 3]),
        (["epochs=10", "runtime.keep_weights=4", "profile.epochs=2"], [0, 8, 16]),
        (["iterations=42", "runtime.keep_weights=3"], [0, 3, 6, 9]),  # 8.4 epochs: the ninth is a part of one
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


@pytest.fixture(scope="module")
def squeezed(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Ten epochs in five, of which three states are kept, and the end."""
    words = ["method=lamix", "model.bottleneck=2", "epochs=10", "profile.epochs=0.5", "runtime.keep_weights=4"]
    return runs({"LaMix": words}, tmp_path_factory.mktemp("squeezed"), (1, 2))


def test_codes_are_those_of_the_states(squeezed: Runs) -> None:
    drawing = embedding.draw(squeezed, [3, 4, 5], ["three", "four", "five"], limit=4)
    numbers = drawing.numbers.dropna(subset="metric").set_index(["seed", "epoch", "metric"])["value"]
    points = drawing.numbers[drawing.numbers["kind"] == "point"]
    assert len(numbers) == 2 * 4 * 2 and set(points["seed"]) == {1} and set(drawing.numbers["source"]) == {"computed here"}
    for seed in (1, 2):
        one = of(squeezed, "LaMix", seed)
        for epoch in (0, 2, 4, 5):
            made = trained(one, squeezed.runtime)
            if epoch < 5:
                made.net.load_state_dict(torch.load(one.path / f"weights-{epoch:04d}.pt", weights_only=True))
            x, y = made.bundle.splits["train"]
            tanh = next(place for place, layer in enumerate(made.net.features) if isinstance(layer, nn.Tanh))
            with torch.no_grad():
                codes = made.net.features[: tanh + 1](made.bundle.prepare(x)).double()
                accuracy = 100 * float((made.net(made.bundle.prepare(x)).argmax(1) == y).float().mean())
            assert numbers[seed, epoch, embedding.ACCURACY] == pytest.approx(accuracy)
            centres = [codes[y == k].mean(0) for k in (3, 4, 5)]
            spread = [float(codes[y == k].var(0, correction=0).sum().sqrt()) for k in (3, 4, 5)]
            nearest = min(float((centres[a] - centres[b]).norm()) for a, b in ((0, 1), (0, 2), (1, 2)))
            assert numbers[seed, epoch, embedding.RATIO] == pytest.approx(3 * nearest / sum(spread), rel=1e-3)
            if seed == 1:
                mine = points[points["epoch"] == epoch]
                assert mine["label"].tolist() == [3] * 4 + [4] * 4 + [5] * 4
                first = torch.cat([codes[y == k][:4] for k in (3, 4, 5)]).numpy()
                assert mine[["x", "y"]].to_numpy() == pytest.approx(first, abs=1e-6)
                axis = drawing.picture.axes[(0, 2, 4, 5).index(epoch)]
                assert np.concatenate([np.asarray(dots.get_offsets()) for dots in axis.collections]) == pytest.approx(first, abs=1e-6)
                ratio = numbers[1, epoch, embedding.RATIO]
                assert axis.get_title() == f"epoch {epoch}, ratio {ratio:.3g}\ntraining accuracy {accuracy:.1f} %"
    each = "; ".join(
        f"epoch {epoch}: training accuracy {numbers[2, epoch, embedding.ACCURACY]:.2f} %, ratio {numbers[2, epoch, embedding.RATIO]:.3f}"
        for epoch in (0, 2, 4, 5)
    )
    assert drawing.lines[1] == f"LaMix, seed 2: {each}" and drawing.lines[2].startswith("ratio: smallest distance")
    assert drawing.lines[3].endswith("paper, in words): not tried in 2 seeds, below 99 % of training accuracy at the second snapshot")


def test_each_row_has_a_line_of_its_own_states(squeezed: Runs, tmp_path: Path) -> None:
    one = store.Run(tmp_path / "few")
    shutil.copytree(of(squeezed, "LaMix", 1).path, one.path, ignore=shutil.ignore_patterns("weights-0002.pt", "weights-0004.pt"))
    wanted = squeezed.wanted[squeezed.wanted["seed"] == 1]
    both = pd.concat([wanted, wanted.assign(row="few", id="few")])
    table = Table("t", columns=squeezed.table.columns, rows=[Row("LaMix"), Row("few")])
    drawing = embedding.draw(Runs(table, both, squeezed.done | {"few": one}, squeezed.runtime), [3, 5], ["three", "five"])
    assert drawing.numbers.groupby("row")["epoch"].unique().map(list).to_dict() == {"LaMix": [0, 2, 4, 5], "few": [0, 5]}
    axes = drawing.picture.axes
    assert [axis.axison for axis in axes] == [True] * 6 + [False] * 2
    assert (axes[0].get_ylabel(), axes[4].get_ylabel()) == ("LaMix\ncode 2", "few\ncode 2") and axes[5].get_title() == axes[3].get_title()


def test_tightening_takes_three_snapshots_and_growth() -> None:
    def numbers(row: str, ratios: list[float], seed: int = 1, accuracy: float = 100) -> pd.DataFrame:
        both = {embedding.RATIO: ratios, embedding.ACCURACY: [accuracy] * len(ratios)}
        parts = [pd.DataFrame({"epoch": range(len(ratios)), "value": values, "metric": metric}) for metric, values in both.items()]
        return pd.concat(parts).assign(row=row, choice="", seed=seed)

    def said(*parts: pd.DataFrame) -> list[str]:
        return [line for line in embedding.lines(pd.concat(parts)) if "tightening" in line]

    [line] = said(numbers("a", [3, 1, 2]), numbers("a", [1, 3, 2], 2), numbers("a", [1, 2], 3))
    assert line.startswith("the clusters go on tightening") and line.endswith("; paper, in words): seen in 1 of 2 seeds")
    [line] = said(numbers("a", [3, 1, 2]), numbers("a", [1, 3, 4], 2, accuracy=60))
    assert line.endswith(": seen in 1 of 1 seeds; not tried in 1 seeds, below 99 % of training accuracy at the second snapshot")
    assert said(numbers("a", [1, 2]))[0].endswith(": not tried: it takes three snapshots")
    assert [line[:3] for line in said(numbers("a", [1, 2, 3]), numbers("b", [1, 2, 3]))] == ["a: ", "b: "]


def test_embedding_refuses_runs_without_states_or_codes(made: Runs, squeezed: Runs, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"kept no states of its network; .* runtime\.keep_weights=N, each N epochs, so remove"):
        embedding.draw(only(made, "LaMix"), [3], ["three"])
    for words in ([], ["model.bottleneck=3"]):
        one = trainer(*NET, *words)
        with pytest.raises(ConfigError, match=r"^figure\.runs: some/run has no bottleneck of two units; .* model\.bottleneck=2$"):
            embedding.passed(one, Path("some/run"))
    with pytest.raises(ConfigError, match=r"^figure\.runs: no run that is to be shown is done yet$"):
        embedding.draw(Runs(squeezed.table, squeezed.wanted, {}, squeezed.runtime), [3], ["three"])


# statistics of single images


def test_gathered_statistics_are_the_means_over_equal_batches(made: Runs) -> None:
    """Of the first layer, whose input the statistics do not change: batches of 30 of the first 80 images, so two."""
    one = trained(of(made, "Mixup", 1), made.runtime)
    before = {name: value.clone() for name, value in one.net.named_parameters()}
    statistics.gather(one, Path("run"), 80)
    x = one.bundle.splits["train"][0]
    with torch.no_grad():
        batches = [one.net.features[0](one.bundle.prepare(x[start : start + 30])).double() for start in (0, 30)]
    flat = [batch.transpose(0, 1).flatten(1).numpy() for batch in batches]
    norm = next(module for module in one.net.modules() if isinstance(module, BatchNorm))
    assert norm.running_mean.numpy() == pytest.approx(np.mean([batch.mean(1) for batch in flat], axis=0), rel=1e-4, abs=1e-6)
    assert norm.running_var.numpy() == pytest.approx(np.mean([batch.var(1, ddof=1) for batch in flat], axis=0), rel=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in one.net.named_parameters())
    assert not any(module.training for module in one.net.modules())


def test_errors_are_the_run_s_and_those_with_gathered_statistics(made: Runs) -> None:
    files = {path: (path.stat().st_mtime_ns, path.read_bytes()) for one in made.done.values() for path in one.path.iterdir()}
    drawing = statistics.draw(only(made, "LaMix", "CutMix"), images=90)
    assert files == {path: (path.stat().st_mtime_ns, path.read_bytes()) for one in made.done.values() for path in one.path.iterdir()}
    values = drawing.numbers.set_index(["row", "seed", "metric"])["value"]
    assert len(values) == 2 * 2 * 2
    assert drawing.numbers.groupby("metric")["source"].unique().map(list).to_dict() == {
        "test/error": ["run"],
        "error with statistics of single images": ["computed here"],
    }
    changed = False
    for row in ("LaMix", "CutMix"):
        for seed in (1, 2):
            one = trained(of(made, row, seed), made.runtime)
            for norm in (module for module in one.net.modules() if isinstance(module, BatchNorm)):
                norm.train()
                norm.momentum, norm.num_batches_tracked = None, torch.tensor(0)  # torch's own cumulative average
            x, _ = one.bundle.splits["train"]
            with torch.no_grad():
                for start in (0, 30, 60):
                    one.net(one.bundle.prepare(x[start : start + 30]))
                one.net.eval()
                x, y = one.bundle.splits["test"]
                error = 100 * float((one.net(one.bundle.prepare(x)).argmax(1) != y).double().mean())
            assert values[row, seed, statistics.ANEW] == pytest.approx(error)
            assert values[row, seed, statistics.ERROR] == of(made, row, seed).metrics()[-1]["test/error"]
            changed |= values[row, seed, statistics.ANEW] != values[row, seed, statistics.ERROR]
    assert changed
    mean, std = (values["CutMix"].unstack()[[statistics.ERROR, statistics.ANEW]].agg(how).tolist() for how in ("mean", "std"))
    both = [f"{one:.2f} ± {spread:.2f} %" for one, spread in zip(mean, std, strict=True)]
    assert drawing.lines[1] == f"error, CutMix: error {both[0]}, with statistics of single images {both[1]}"
    [axis] = drawing.picture.axes
    assert [bar.get_height() for bar in axis.patches[2:]] == pytest.approx(mean)


def test_statistics_of_a_network_without_batch_normalization_are_one_line() -> None:
    said = r"^figure\.runs: some/run has no batch normalization, so no statistics to gather; its base needs norm=bn$"
    with pytest.raises(ConfigError, match=said):
        statistics.gather(trainer("norm=gn"), Path("some/run"), 50)
