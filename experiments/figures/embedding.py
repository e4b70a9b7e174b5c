"""Training images in a bottleneck of two units as training goes on, and how tight their clusters are (LaMix, figure 8)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from experiments import store
from experiments.config import ConfigError
from experiments.figure import Drawing, Runs, canvas, label
from experiments.figures import layers
from experiments.figures.cam import members
from experiments.figures.trained import trained

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.trainer import Trainer

RATIO, ACCURACY = "embedding/ratio", "embedding/train_accuracy"
AT_ITS_END = 99  # percent
PARTS = (0.1, 0.4, 0.7)  # of the run, at which it is looked at besides its end (LaMix: epochs 100, 400, 700 of 1000)


def draw(runs: Runs, classes: Sequence[int], names: Sequence[str], limit: int = 500) -> Drawing:
    """A line of panels for each row, a panel for each state that its first seed kept: the codes of at most `limit` images of each class.

    Codes: what the bottleneck's two units give, in -1 .. 1, in evaluation mode, for training images of these classes as they are. The
    states are those nearest to 10, 40 and 70 % of the run's epochs, and its end.

    The paper reads "tighter" off such panels. As numbers, over all training images of these classes: the smallest distance of two class
    centroids over the classes' mean deviation; and beside it the accuracy on the whole training set (protocol sheet, section 4).
    """
    jobs = layers.shown(runs)
    jobs = jobs[jobs["id"].isin(list(runs.done))]
    if jobs.empty:
        raise ConfigError("figure.runs: no run that is to be shown is done yet")
    parts: list[pd.DataFrame] = []
    panels: dict[tuple[str, str], list[tuple[int, dict[str, float], np.ndarray, np.ndarray]]] = {}
    for job in jobs.itertuples():
        one = runs.done[job.id]
        known = {"row": job.row, "choice": job.choice, "seed": job.seed, "source": "computed here"}
        first = (job.row, job.choice) not in panels
        for epoch, kept in snapshots(one).items():
            trainer = trained(one, runs.runtime, kept)
            labels = trainer.bundle.splits["train"][1]
            chosen = members(labels, classes, names).cpu().numpy()
            codes, accuracy = passed(trainer, one.path)
            x, y = codes[chosen], labels.cpu().numpy()[chosen]
            values = {RATIO: ratio(x, y), ACCURACY: accuracy}
            parts.append(pd.DataFrame({"metric": values.keys(), "value": values.values()}).assign(epoch=epoch, **known))
            if first:
                few = np.concatenate([np.flatnonzero(y == each)[:limit] for each in classes])
                panels.setdefault((job.row, job.choice), []).append((epoch, values, x[few], y[few]))
                points = pd.DataFrame({"x": x[few, 0], "y": x[few, 1], "label": y[few]})
                parts.append(points.assign(kind="point", epoch=epoch, **known))
    numbers = pd.concat(parts, ignore_index=True)

    columns = max(map(len, panels.values()))
    picture, axes = canvas(len(panels), columns, width=max(5.0, 1.875 * columns), height=2.4 + 0.5 / len(panels))
    for line, (cell, shots) in zip(axes, panels.items(), strict=True):
        for axis in line[len(shots) :]:
            axis.set_axis_off()
        for axis, (epoch, values, x, y) in zip(line, shots, strict=False):
            for place, (each, name) in enumerate(zip(classes, names, strict=True)):
                axis.scatter(x[y == each, 0], x[y == each, 1], s=3, linewidths=0, color=f"C{place}", label=name)
            axis.set(title=f"epoch {epoch}, ratio {values[RATIO]:.3g}\ntraining accuracy {values[ACCURACY]:.1f} %", xlabel="code 1")
            axis.set(xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), aspect="equal", xticks=[-1, 0, 1], yticks=[-1, 0, 1])
        line[0].set_ylabel(f"{label(*cell)}\ncode 2" if len(panels) > 1 else "code 2")
    picture.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names), markerscale=3)
    return Drawing(picture, numbers, lines(numbers))


def snapshots(run: store.Run) -> dict[int, Path | None]:
    """The epochs at which the run is looked at, and the file of its network then; None: its end, which is its checkpoint."""
    kept = {int(path.stem.partition("-")[2]): path for path in sorted(run.path.glob("weights-*.pt"))}
    if not kept:
        raise ConfigError(f"figure.runs: {run.path} kept no states of its network; a run keeps them with runtime.keep_weights=N, each N "
                          "epochs, so remove its folder and ask again")  # fmt: skip
    end = int((run.result() or {})["epochs"])
    nearest = {min(kept, key=lambda epoch: abs(epoch - part * end)) for part in PARTS} - {end}
    return {epoch: kept[epoch] for epoch in sorted(nearest)} | {end: None}


def passed(trainer: Trainer, path: Path) -> tuple[np.ndarray, float]:
    """The codes [N, 2] of all training images, and the network's accuracy on them in percent, in one pass in evaluation mode."""
    import torch
    from torch import nn

    codes: list[Tensor] = []
    for module in trainer.net.features.modules():
        if isinstance(module, nn.Tanh):
            module.register_forward_hook(lambda _, inputs, out: codes.append(out.double().cpu()))
            break
    accuracy = trainer.evaluate("train")["accuracy"]
    if not codes or codes[0].shape[1:] != (2,):
        raise ConfigError(f"figure.runs: {path} has no bottleneck of two units; its base needs model.bottleneck=2")
    return torch.cat(codes).numpy(), accuracy


def ratio(codes: np.ndarray, y: np.ndarray) -> float:
    """The smallest distance of two classes' centroids over the mean of the classes' deviations, of codes [n, d] and their classes [n].

    A deviation is the root of the mean squared distance to the centroid. nan where all codes are one; inf where each class is.
    """
    clusters = [codes[y == each] for each in np.unique(y)]
    centroids = [cluster.mean(0) for cluster in clusters]
    deviations = [np.sqrt(((cluster - at) ** 2).sum(1).mean()) for cluster, at in zip(clusters, centroids, strict=True)]
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(min(np.linalg.norm(a - b) for a, b in combinations(centroids, 2)) / np.mean(deviations))


def lines(numbers: pd.DataFrame) -> list[str]:
    """Accuracy and ratio of each run by epoch, and in how many seeds of a row the ratio grows from its second state to the last.

    That is the paper's claim where the network is at its end in accuracy already; of others it says nothing.
    """
    texts, claims = [], []
    says = "the clusters go on tightening after the training accuracy is at its end (the ratio grows from the second to the last snapshot"
    rows = numbers.dropna(subset="metric").groupby(["row", "choice"], sort=False)
    for (row, choice), mine in rows:
        grows, early = [], 0
        for seed, run in mine.groupby("seed"):
            table = run.pivot(index="epoch", columns="metric", values="value")
            shots = table[[ACCURACY, RATIO]].itertuples()
            each = [f"epoch {epoch}: training accuracy {accuracy:.2f} %, ratio {tight:.3f}" for epoch, accuracy, tight in shots]
            texts.append(f"{label(row, choice)}, seed {seed}: {'; '.join(each)}")
            if len(table) > 2 and table[ACCURACY].iloc[1] >= AT_ITS_END:
                grows.append(table[RATIO].iloc[1] < table[RATIO].iloc[-1])
            elif len(table) > 2:
                early += 1
        found = [f"seen in {sum(grows)} of {len(grows)} seeds"] if grows else []
        found += [f"not tried in {early} seeds, below {AT_ITS_END} % of training accuracy at the second snapshot"] if early else []
        said = "; ".join(found) or "not tried: it takes three snapshots"
        claims.append(f"{label(row, choice) + ': ' if len(rows) > 1 else ''}{says}; paper, in words): {said}")
    return [*texts, "ratio: smallest distance of two classes' centroids over the classes' mean deviation", *claims]
