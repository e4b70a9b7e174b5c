"""Test errors with batch normalization's running statistics gathered anew on single images (for LaMix's table 7; not in the paper)."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

import pandas as pd

from experiments.config import ConfigError
from experiments.figure import Drawing, Runs, canvas, label, spread
from experiments.figures.trained import trained

if TYPE_CHECKING:
    from experiments.trainer import Trainer

ERROR, ANEW = "test/error", "error with statistics of single images"
LABELS = {ERROR: "as trained", ANEW: "with statistics of single images"}


def draw(runs: Runs, images: int = 10_000) -> Drawing:
    """A panel for each data set, two bars for each row: the test error [%] as trained, and with statistics of single training images.

    Averaged images have about half the variance of single ones, and a network that was trained on them alone normalizes test images by
    their statistics (protocol sheet, 1.10). images: the first so many training images. Means over the seeds; whiskers are 1 s.d.
    """
    from matplotlib.patches import Patch
    from tqdm import tqdm

    parts = []
    panels = runs.panels()
    for panel, jobs in panels.items():
        mine = jobs[jobs["id"].isin(list(runs.done))]
        for job in tqdm(mine.itertuples(), panel, len(mine), leave=False, disable=None):
            one = runs.done[job.id]
            trainer = trained(one, runs.runtime)
            gather(trainer, one.path, images)
            known = {"panel": panel, "row": job.row, "choice": job.choice, "seed": job.seed}
            parts.append(known | {"metric": ERROR, "value": one.metrics()[-1][ERROR], "source": "run"})
            parts.append(known | {"metric": ANEW, "value": trainer.evaluate("test")["error"], "source": "computed here"})
    numbers = pd.DataFrame(parts)

    picture, axes = canvas(1, len(panels), width=max(5.0, 3.75 * len(panels)), height=3.1)
    texts = []
    for axis, panel in zip(axes[0], panels, strict=True):
        ticks = []
        for place, ((row, choice), mine) in enumerate(numbers[numbers["panel"] == panel].groupby(["row", "choice"], sort=False)):
            both = [mine[mine["metric"] == metric]["value"] for metric in LABELS]
            for side, values in enumerate(both):
                bars = axis.bar(place + 0.38 * (side - 0.5), values.mean(), 0.36, yerr=values.std(), capsize=2, color=f"C{side}")
                axis.bar_label(bars, fmt="%.2f", fontsize=6, padding=1)
            name = label(row, choice)
            ticks.append(fill(name, 12))
            error, anew = (f"{spread(values, 2)} %" for values in both)
            texts.append(f"{panel + ', ' if panel else ''}{name}: error {error}, {LABELS[ANEW]} {anew}")
        axis.set_xticks(range(len(ticks)), ticks)
        axis.set(title=panel, ylabel="test error [%]" if axis is axes[0][0] else None)
        axis.grid(False, axis="x")
        axis.set_axisbelow(True)
    picture.legend([Patch(color=f"C{side}") for side in range(2)], LABELS.values(), loc="outside lower center", ncols=2)
    several = runs.wanted["seed"].nunique() > 1
    about = f"statistics of single images: of the first {images:,} training images (or all), neither mixed nor augmented; not in the paper"
    return Drawing(picture, numbers, [*texts, about, "whiskers: 1 s.d. over the seeds" if several else "no whiskers: one seed"])


def gather(trainer: Trainer, path: Path, images: int) -> None:
    """Puts the statistics of the first so many training images into the network's BatchNorm layers; leaves it in evaluation mode.

    The mean over equal batches of their means and of their unbiased variances, as torch's own running ones are. Each layer sees what the
    layers below, normalized by the batch, make of it; all else is in evaluation mode. Raises ConfigError if there is no such layer.
    """
    import torch

    from data.bundle import Batch
    from models.norm import BatchNorm

    norms = [module for module in trainer.net.modules() if isinstance(module, BatchNorm)]
    if not norms:
        raise ConfigError(f"figure.runs: {path} has no batch normalization, so no statistics to gather; its base needs norm=bn")
    batches = [values[:images].split(trainer.cfg.evaluate.batch_size) for values in trainer.bundle.splits["train"]]
    for norm in norms:
        norm.train()
    with torch.inference_mode():
        for done, (x, y) in enumerate(zip(*batches, strict=True)):
            if len(y) == len(batches[1][0]):  # a smaller last one is left out
                for norm in norms:
                    norm.momentum = 1 / (done + 1)
                trainer.forward(Batch(trainer.bundle.prepare(x), y, y))
    trainer.net.eval()
