"""Pairs of test images as PuzzleMix mixes them: their saliency, masks, and shares of the label (LaMix, section 3.2; not in the paper)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from experiments.config import ConfigError
from experiments.figure import Drawing, Runs, canvas, label
from experiments.figures import layers
from experiments.figures.trained import trained

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.trainer import Trainer
    from regularizers.puzzlemix import PuzzleMix

SHARE = "puzzle/share"
BRIGHT = 99  # percent of a map's pixels that are not clipped: a gradient has a few large values
LINES = ("first\nimage", "second\nimage", "saliency\nof the first", "saliency\nof the second", "mask", "mixed")


class Pair(NamedTuple):
    """Two images on n x n blocks. share: of the first; images: first, second, mixed, [3, H, W, C], in 0 .. 1; saliency: [2, H, W]."""

    n: int
    classes: tuple[int, int]
    share: float
    images: np.ndarray
    saliency: np.ndarray
    mask: np.ndarray  # [n, n], the share of the first in each block


def draw(runs: Runs, pairs: int = 8, names: Sequence[str] = (), lam: float = 0.5) -> Drawing:
    """A column of panels for each pair of test images, by the first finished run's method and network, as both are when training ends.

    pairs: how many, shared out among the method's grids. names: of all classes, in their order; none: they are numbered. lam: the ratio
    that the mask's prior is for. The number of each pair is the share of its first image in the mask, which is that of its label.
    """
    if pairs < 1 or not 0 <= lam <= 1:
        raise ConfigError("figure.draw: pairs must be at least 1, and lam between 0 and 1")
    job = next((one for one in layers.shown(runs).itertuples() if one.id in runs.done), None)
    if job is None:
        raise ConfigError("figure.runs: no run that is to be shown is done yet")
    trainer = trained(runs.done[job.id], runs.runtime)
    classes, method = trainer.bundle.num_classes, used(trainer, runs.done[job.id].path)
    if len(names) not in (0, classes):
        raise ConfigError(f"figure.draw.names: {len(names)} names for {classes} classes; [] numbers them")
    found = [*mixed(trainer, method, chosen(trainer.bundle.splits["test"][1], pairs), lam)]
    called = [*names] or [f"class {one}" for one in range(classes)]
    numbers = pd.DataFrame(
        {"pair": place, "n": pair.n, "first": called[pair.classes[0]], "second": called[pair.classes[1]], "value": pair.share}
        for place, pair in enumerate(found, 1)
    ).assign(row=job.row, choice=job.choice, seed=job.seed, metric=SHARE, source="computed here")

    width = min(8.5, 0.96 * pairs + 0.5)
    picture, axes = canvas(len(LINES), pairs, width=width, height=(width - 0.5) / pairs + 0.15)
    for column, pair, line in zip(zip(*axes, strict=True), found, numbers.itertuples(), strict=True):
        panels = [*pair.images[:2], *pair.saliency, pair.mask, pair.images[2]]
        for axis, name, values in zip(column, LINES, panels, strict=True):
            cmap, most = ("inferno", np.percentile(values, BRIGHT)) if "saliency" in name else ("gray", 1)
            axis.imshow(values.squeeze(), cmap, vmin=0, vmax=most)  # colours need neither map nor scale
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set(visible=True, color="0.5", linewidth=0.5)  # a white block has an edge
        column[0].set_title(f"{pair.n} × {pair.n} blocks", fontsize=7)
        column[-1].set_xlabel(f"{100 * pair.share:.0f} % {line.first}\n+ {100 - 100 * pair.share:.0f} % {line.second}", fontsize=7)
    for axis, name in zip((across[0] for across in axes), LINES, strict=True):
        axis.set_ylabel(name)
    moves = "; salient cells of both have moved to where it shows them" if method.transport else ""
    caption = f"saliency: up to its {BRIGHT}th percentile; mask: white shows the first image, black the second, grey half of each{moves}"
    picture.supxlabel(fill(caption, int(16 * width)), fontsize=7)
    about = f"prior for a ratio of {lam:g}; test images as they are, the first ones of each class; not in the paper"
    return Drawing(picture, numbers, [*lines(numbers), f"{label(job.row, job.choice)}, seed {job.seed}: {about}"])


def used(trainer: Trainer, path: Path) -> PuzzleMix:
    """The run's PuzzleMix, be it a method itself or a part of one. Raises ConfigError if there is none."""
    from regularizers.puzzlemix import PuzzleMix

    for method in trainer.regularizers.values():
        for part in method.modules():
            if isinstance(part, PuzzleMix):
                return part
    raise ConfigError(f"figure.runs: {path} mixes no images by masks; its method must be puzzlemix or lamix_puzzle")


def chosen(y: Tensor, pairs: int) -> Tensor:
    """Pairs of images of labels y [n], as indices [2, pairs]: the first of each class, then the second of each, until there are enough.

    Of two different classes, unless one class has more than half of these images. Raises ConfigError if there are too few.
    """
    import torch
    from torch.nn.functional import one_hot

    if 2 * pairs > len(y):
        raise ConfigError(f"figure.draw.pairs: {pairs} pairs need {2 * pairs} test images, and there are {len(y)}")
    turn = one_hot(y).cumsum(0).gather(1, y[:, None])[:, 0]
    few = torch.argsort(turn * (y.max() + 1) + y)[: 2 * pairs]
    return few[torch.argsort(y[few], stable=True)].view(2, pairs)


def mixed(trainer: Trainer, method: PuzzleMix, indices: Tensor, lam: float) -> Iterator[Pair]:
    """The pairs of test images of these indices [2, pairs], each on the next of the method's grids; in the order of the grids."""
    import torch

    from data.bundle import Batch

    scale = trainer.bundle.scale
    assert scale is not None
    for turn, n in enumerate(method.blocks[: indices.shape[1]]):
        mine = indices[:, turn :: len(method.blocks)]
        count, method.n = mine.shape[1], n
        raw, y = (values[mine.flatten()] for values in trainer.bundle.splits["test"])
        batch = Batch(trainer.bundle.prepare(raw), y, y, scale=scale)
        partner = torch.arange(2 * count, device=y.device).roll(count)
        with trainer.autocast():  # as in a step
            z, saliency = method.mask(batch, partner, torch.tensor(lam, device=y.device), trainer.net)
            x = method.blend(batch.x, partner, z, saliency)
        pixels = raw.double() / 255
        shift = (pixels - batch.x * scale).mean((0, 2, 3), keepdim=True)  # the constant of each channel that normalising takes off
        shown = torch.stack([*pixels.split(count), (x[:count] * scale + shift).clamp(0, 1)], 1).permute(0, 1, 3, 4, 2)
        maps = torch.stack(saliency.split(count), 1)
        for at in range(count):
            arrays = (values[at].float().cpu().numpy() for values in (shown, maps, z))
            yield Pair(n, (int(y[at]), int(y[at + count])), float(z[at].mean()), *arrays)


def lines(numbers: pd.DataFrame) -> list[str]:
    """The shares of each grid's pairs, and the mean over all."""
    each = [
        f"{n} × {n} blocks: share of the first image {', '.join(map('{:.2f}'.format, mine))}" for n, mine in numbers.groupby("n")["value"]
    ]
    return [*each, f"mean over {len(numbers)} pairs: {numbers['value'].mean():.2f}"]
