"""LaMix's figure 7 and the errors with statistics gathered anew: what they compute, against numbers made here."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from nets import small
from omegaconf import OmegaConf
from trainers import config, data_home, trainer

from experiments import store
from experiments.config import ConfigError, Runtime
from experiments.figure import Runs
from experiments.figures import cam, statistics
from experiments.figures.trained import trained
from experiments.spec import Column, Row, Table
from experiments.train import folder, train
from models.norm import BatchNorm

__all__ = ["data_home"]  # a fixture
pytestmark = pytest.mark.usefixtures("one_thread")
NET = ["model=wrn28_10", "model.in_channels=1", "model.depth=10", "model.width=1", "optim.lr=0.1", "optim.momentum=0.9"]
NET += ["evaluate.batch_size=30"]  # two of the test set, three and a part of the training set


def runs(rows: dict[str, list[str]], root: Path, seeds: tuple[int, ...] = (1,)) -> Runs:
    lines, done = [], {}
    for row, words in rows.items():
        for seed in seeds:
            cfg = config(*NET, *words, f"seed={seed}", f"runtime.runs={root}")
            train(cfg)
            run = folder(cfg)
            done[run.path.name[-10:]] = run
            lines.append({"row": row, "choice": "", "column": "error", "seed": seed, "id": run.path.name[-10:]})
    table = Table("t", columns={"error": Column("test/error", better="min")}, rows=[Row(row) for row in rows])
    return Runs(table, pd.DataFrame(lines), done, OmegaConf.structured(Runtime(device="cpu", threads=1, runs=str(root))))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """LaMix and Mixup, two seeds each, with most digits right."""
    words = ["epochs=10", "schedule.at=[6]", "batch_size=10"]
    return runs({"LaMix": ["method=lamix", *words], "Mixup": ["method=mixup", *words]}, tmp_path_factory.mktemp("made"), (1, 2))


def of(made: Runs, row: str, seed: int) -> store.Run:
    [job] = made.wanted[(made.wanted["row"] == row) & (made.wanted["seed"] == seed)].itertuples()
    return made.done[job.id]


def without(made: Runs, *lost: tuple[str, int]) -> Runs:
    """As if these runs, of a row and a seed, were not done."""
    gone = {of(made, *which).path for which in lost}
    return Runs(made.table, made.wanted, {key: run for key, run in made.done.items() if run.path not in gone}, made.runtime)


@pytest.mark.parametrize("model", ["preact_resnet18", "resnet18"])
def test_activation_maps_are_those_of_the_predicted_class(model: str) -> None:
    """And the mean of a map and the bias are the logit: P-A3 of the protocol sheet."""
    run = trainer(*small(model), "evaluate.batch_size=7")
    net, x = run.net.eval(), run.bundle.splits["test"][0]
    maps, predicted = cam.activation_maps(run, Path("run"), x)
    with torch.no_grad():
        features, logits = net.features[:-2](run.bundle.prepare(x)), net(run.bundle.prepare(x))
    assert torch.equal(predicted, logits.argmax(1)) and maps.shape[1] > 1
    torch.testing.assert_close(maps, (net.classifier.weight[predicted][:, :, None, None] * features).sum(1))
    torch.testing.assert_close(maps.mean((1, 2)) + net.classifier.bias[predicted], logits.max(1).values, rtol=1e-5, atol=1e-5)


def test_maps_are_scaled_and_measured_by_hand() -> None:
    raw = torch.tensor([[[-3.0, -1.0], [-2.0, 5.0]], [[0.7, 0.7], [0.7, 0.7]], [[1e6, 1e6], [1e6, 1e6 + 0.0625]], [[0.0, 0.0], [0.0, 0.0]]])
    maps, weights = cam.scaled(raw, (4, 4)), np.array([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    assert maps.shape == (4, 4, 4) and not maps[1:].any()  # constant, if only up to rounding
    assert maps[0] == pytest.approx((weights @ raw[0].numpy() @ weights.T + 3) / 8, abs=1e-6)  # bilinear; signed: nothing is clipped at 0
    values = maps[0].flatten().tolist()
    shares = [value / sum(values) for value in values if value > 0]
    assert cam.area(maps).tolist() == [sum(value >= 0.5 for value in values) / 16, 0, 0, 0] and 0 < cam.area(maps)[0] < 0.5
    assert cam.entropy(maps)[0] == pytest.approx(-sum(p * math.log(p) for p in shares), abs=1e-6) and np.isnan(cam.entropy(maps)[1:]).all()
    assert cam.entropy(np.ones((1, 4, 8)))[0] == pytest.approx(math.log(32))


def test_areas_and_entropies_are_those_of_the_images_that_all_classify_right(made: Runs) -> None:
    drawing = cam.draw(made, [2, 6], ["two", "six"], shown=2)
    numbers, partly = drawing.numbers.set_index(["seed", "row", "metric"]), False
    assert len(numbers) == 2 * 2 * 2 and set(numbers["source"]) == {"computed here"}
    for seed in (2, 1):  # what the loop leaves is seed 1's, which is drawn
        maps, rights = [], []
        for row in ("LaMix", "Mixup"):
            run = trained(of(made, row, seed), made.runtime)
            x, y = (values[torch.isin(run.bundle.splits["test"][1], torch.tensor([2, 6]))] for values in run.bundle.splits["test"])
            raw, predicted = cam.activation_maps(run, Path("run"), x)
            maps.append(cam.scaled(raw, (28, 28)))
            rights.append(predicted == y)
        right = rights[0] & rights[1]
        partly |= any((mine & ~right).any() for mine in rights)
        for row, mine in zip(("LaMix", "Mixup"), maps, strict=True):
            for metric, measure in ((cam.AREA, cam.area), (cam.ENTROPY, cam.entropy)):
                assert numbers.loc[seed, row, metric]["value"] == pytest.approx(measure(mine[right]).mean())
                assert numbers.loc[seed, row, metric]["n"] == right.sum() > 2
    assert partly  # not each image that one network classifies right is one
    shown = [int(i) for k in (2, 6) for i in ((y == k) & right).nonzero().flatten()[:2]]
    panels = [axis for axis in drawing.picture.axes if axis.images]
    assert len(panels) == 3 * len(shown)
    for i, *line in zip(shown, panels[::3], panels[1::3], panels[2::3], strict=True):
        assert all(np.array_equal(axis.images[0].get_array(), x[i, 0]) for axis in line)
        assert all(np.array_equal(axis.images[1].get_array(), mine[i]) for axis, mine in zip(line[1:], maps, strict=True))
    area = numbers.loc[:, "Mixup", cam.AREA]["value"]
    assert drawing.lines[1].startswith(f"Mixup: area with CAM >= 0.5 {area.mean():.3f} ± {area.std():.3f}, entropy ")


def test_narrower_is_narrower_than_all_others() -> None:
    def said(rows: dict[str, list[float]]) -> list[str]:
        known = {"choice": "", "n": 7}
        given = [known | {"row": row, "seed": seed, "value": value} for row, values in rows.items() for seed, value in enumerate(values)]
        return cam.lines(pd.concat([pd.DataFrame(given).assign(metric=metric) for metric in (cam.AREA, cam.ENTROPY)]))[len(rows) : -1]

    rows = {"Net LaMix": [0.2, 0.3, 0.2, math.nan], "Mixup": [0.3, 0.4, 0.1, math.nan], "CutMix": [0.4, 0.3, 0.4, math.nan]}
    assert said(rows)[0].endswith(" with Net LaMix than with Mixup, CutMix (paper, in words): seen in 1 of 3 seeds")
    assert said({row: [math.nan] for row in rows})[0].endswith(": not tried: no image counts")
    assert not said({"Net LaMix": [0.2]}) and not said({"Mixup": [0.3], "CutMix": [0.4]})


def test_images_that_are_never_right_are_shown_and_not_counted(made: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = cam.activation_maps
    monkeypatch.setattr(cam, "activation_maps", lambda run, path, x: (maps(run, path, x)[0], torch.full((len(x),), 2)))
    drawing = cam.draw(made, [6], ["six"])
    assert drawing.lines[-1].startswith("no six is classified correctly by all networks of seed 1; the first ones are shown")
    assert drawing.numbers["value"].isna().all() and len([axis for axis in drawing.picture.axes if axis.images]) == 2 * 3


def test_cam_leaves_out_seeds_without_all_rows_and_refuses_what_it_cannot_draw(made: Runs) -> None:
    whole, fewer = (cam.draw(each, [2, 6], ["two", "six"]).numbers for each in (made, without(made, ("Mixup", 2))))
    assert fewer.equals(whole[whole["seed"] == 1].reset_index(drop=True))
    with pytest.raises(ConfigError, match=r"^figure\.runs: in no seed the runs of all rows are done"):
        cam.draw(without(made, ("Mixup", 2), ("LaMix", 1)), [2], ["two"])
    for classes, names, shown, said in (
        ([2, 6], ["two"], 2, "names: 1 names for 2 classes$"),
        ([2, 10], ["two", "ten"], 2, "classes: no image is of class 10; allowed: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9$"),
        ([2], ["two"], 0, "shown: 0 is not allowed; it must be at least 1$"),
    ):
        with pytest.raises(ConfigError, match=rf"^figure\.draw\.{said}"):
            cam.draw(made, classes, names, shown)
    for words in (["model=net2c"], [*NET, "model.bottleneck=2"]):
        run = trainer(*words)
        with pytest.raises(ConfigError, match=r"^figure\.runs: some/run has no global average pool right before its .*, so no CAM$"):
            cam.activation_maps(run, Path("some/run"), run.bundle.splits["test"][0])


def test_gathered_statistics_are_torchs_cumulative_averages_over_equal_batches(made: Runs) -> None:
    """Of batches of 30 of the first 80 images, so two; nothing else changes."""
    ours, theirs = (trained(of(made, "Mixup", 1), made.runtime) for _ in range(2))
    statistics.gather(ours, Path("run"), 80)
    for norm in (module for module in theirs.net.modules() if isinstance(module, BatchNorm)):
        norm.train()
        norm.momentum, norm.num_batches_tracked = None, torch.tensor(0)
    with torch.no_grad():
        for x in theirs.bundle.splits["train"][0][:60].split(30):
            theirs.net(theirs.bundle.prepare(x))
    before, wanted = trained(of(made, "Mixup", 1), made.runtime).net.state_dict(), theirs.net.state_dict()
    for name, value in ours.net.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-6)
        assert torch.equal(value, before[name]) == ("running" not in name)
    assert not any(module.training for module in ours.net.modules())
    with pytest.raises(ConfigError, match=r"^figure\.runs: some/run has no batch normalization, .*; its base needs norm=bn$"):
        statistics.gather(trainer("norm=gn"), Path("some/run"), 50)


def test_errors_are_the_run_s_and_those_with_gathered_statistics(made: Runs) -> None:
    drawing = statistics.draw(made, images=90)
    values = drawing.numbers.set_index(["row", "seed", "metric"])["value"]
    for row, seed in (("LaMix", 1), ("Mixup", 2)):
        run = trained(of(made, row, seed), made.runtime)
        statistics.gather(run, Path("run"), 90)
        assert values[row, seed, statistics.ANEW] == run.evaluate("test")["error"]
        assert values[row, seed, statistics.ERROR] == of(made, row, seed).metrics()[-1]["test/error"]
    mean = values["Mixup"].unstack()[[statistics.ERROR, statistics.ANEW]].mean().tolist()
    assert len(values) == 2 * 2 * 2 and mean[0] != mean[1] and drawing.lines[1].startswith(f"error, Mixup: error {mean[0]:.2f} ± ")
    assert [bar.get_height() for bar in drawing.picture.axes[0].patches[2:]] == pytest.approx(mean)
