"""Class activation maps of test images, and how narrow they are: their area and their entropy (LaMix, figure 7; Zhou et al. 2016)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.special import entr

from experiments.config import ConfigError
from experiments.figure import Drawing, Runs, canvas, label, spread
from experiments.figures import layers
from experiments.figures.trained import trained

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.trainer import Trainer

AREA, ENTROPY = "cam/area", "cam/entropy"
HALF = 0.5  # from here on a pixel counts as the map's area (protocol sheet, section 4)
OURS = "LaMix"  # whose maps the paper calls narrower


def draw(runs: Runs, classes: Sequence[int], names: Sequence[str], shown: int = 2) -> Drawing:
    """A line of panels for each of `shown` test images of each class: the image, and over it the map of each row, of the first seed.

    classes, names: whose test images are looked at, and what they are called. Of those, only the images count that the networks of all
    rows classify correctly, seed by seed; seeds in which a row is missing are left out. The map is of the predicted class.

    The paper reads "narrower" off such maps. As numbers, means over the images: area, the share of pixels where the map is at least
    0.5; and entropy of the map over its sum, in nats (protocol sheet, section 4). Both are large where the map is wide.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    if shown < 1:
        raise ConfigError(f"figure.draw.shown: {shown} is not allowed; it must be at least 1")
    jobs = layers.shown(runs)
    jobs = jobs[jobs["id"].isin(list(runs.done))]
    cells = list(dict.fromkeys(zip(jobs["row"], jobs["choice"], strict=True)))
    seeds = [seed for seed, mine in jobs.groupby("seed") if len(mine) == len(cells)]
    if not seeds:
        raise ConfigError("figure.runs: in no seed the runs of all rows are done, and maps are compared on images that all classify right")
    parts, texts = [], []
    for seed in seeds:
        found, rights = {}, []
        for job in jobs[jobs["seed"] == seed].itertuples():
            trainer = trained(runs.done[job.id], runs.runtime)
            x, y = trainer.bundle.splits["test"]
            chosen = members(y, classes, names)
            x, y = x[chosen], y[chosen]
            raw, predicted = activation_maps(trainer, runs.done[job.id].path, x)
            found[job.row, job.choice] = scaled(raw, x.shape[2:])
            rights.append((predicted == y).cpu().numpy())
        right = np.all(rights, axis=0)
        for (row, choice), maps in found.items():
            known = {"panel": next(iter(runs.panels())), "row": row, "choice": choice, "seed": seed}
            for metric, each in ((AREA, pd.Series(area(maps[right]))), (ENTROPY, pd.Series(entropy(maps[right])))):
                parts.append(known | {"metric": metric, "value": each.mean(), "n": each.count(), "source": "computed here"})
        if seed == seeds[0]:
            images, places, drawn = x.cpu().permute(0, 2, 3, 1).numpy(), [], found
            for one, name in zip(classes, names, strict=True):
                mine = np.flatnonzero((y == one).cpu().numpy())
                if not right[mine].any():
                    texts.append(f"no {name} is classified correctly by all networks of seed {seed}; the first ones are shown all the same")
                places += [(name, place) for place in (mine[right[mine]] if right[mine].any() else mine)[:shown]]
    numbers = pd.DataFrame(parts)

    columns = 1 + len(cells)
    width = min(7.5, 1.75 * columns + 0.5)
    picture, axes = canvas(len(places), columns, width=width, height=0.9 * width / columns + 1.1 / len(places))
    for line, (name, place) in zip(axes, places, strict=True):
        for axis in line:
            axis.imshow(images[place].squeeze(), cmap="gray", vmin=0, vmax=255)  # colours need neither map nor scale
            axis.set(xticks=[], yticks=[])
        for axis, maps in zip(line[1:], drawn.values(), strict=True):
            axis.imshow(maps[place], cmap="jet", vmin=0, vmax=1, alpha=0.5)
        line[0].set_ylabel(name)
    axes[0][0].set_title("test image")
    for axis, (row, choice) in zip(axes[0][1:], cells, strict=True):
        mean = numbers[(numbers["row"] == row) & (numbers["choice"] == choice) & (numbers["metric"] == AREA)]["value"].mean()
        axis.set_title(f"{fill(label(row, choice), int(13 * width / columns))}\narea {mean:.2f}")
    scale = ScalarMappable(Normalize(0, 1), "jet")
    about = "class activation, from the smallest (0) to the largest (1) of each map; area: share of pixels from 0.5 on"
    slim: dict[str, Any] = {"aspect": 50, "fraction": 0.08 / len(places), "pad": 0.02}
    bar = picture.colorbar(scale, ax=[axis for line in axes for axis in line], location="bottom", **slim)
    bar.set_label(fill(about, int(16 * width)), fontsize=7)
    return Drawing(picture, numbers, [*lines(numbers), *texts])


def members(y: Tensor, classes: Sequence[int], names: Sequence[str]) -> Tensor:
    """Where the labels y [n] are of these classes. Raises ConfigError if a class has no image, or classes and names do not pair."""
    import torch

    if len(names) != len(classes):
        raise ConfigError(f"figure.draw.names: {len(names)} names for {len(classes)} classes")
    if absent := [one for one in classes if not (y == one).any()]:
        raise ConfigError(f"figure.draw.classes: no image is of class {absent[0]}; allowed: {', '.join(map(str, y.unique().tolist()))}")
    return torch.isin(y, torch.tensor([*classes], device=y.device)).nonzero().flatten()


def activation_maps(trainer: Trainer, path: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of images x [n, C, H, W], as bytes: the maps [n, h, w] of the predicted classes, and these [n].

    sum_k W[c, k] A_k for the last feature map A and the classifier's weights W, signed, without bias: its mean over the map and the bias
    make the logit. Raises ConfigError unless a global average pool is all that lies between the two.
    """
    import torch
    from torch import nn

    from data.bundle import Batch

    modules = [*trainer.net.features.modules()]
    pools = [module for module in modules if isinstance(module, nn.AdaptiveAvgPool2d)]
    if len(pools) != 1 or any(isinstance(module, nn.Linear) for module in modules):
        raise ConfigError(f"figure.runs: {path} has no global average pool right before its classifier, so no CAM")
    pooled: list[Tensor] = []
    pools[0].register_forward_pre_hook(lambda _, inputs: pooled.append(inputs[0]))
    maps, classes = [], []
    with torch.inference_mode():
        for some in x.split(trainer.cfg.evaluate.batch_size):
            images = trainer.bundle.prepare(some)
            unknown = torch.zeros(len(some), dtype=torch.int64, device=x.device)  # no label is needed
            classes.append(trainer.forward(Batch(images, unknown, unknown)).logits.argmax(1))
            maps.append(torch.einsum("nk,nkhw->nhw", trainer.net.classifier.weight[classes[-1]], pooled.pop().float()))
    return torch.cat(maps), torch.cat(classes)


def scaled(maps: Tensor, size: Sequence[int]) -> np.ndarray:
    """Maps [n, h, w] at the images' size, bilinear, each from 0 (its smallest value) to 1 (its largest); 0 where, up to rounding, it is
    constant."""
    from torch.nn.functional import interpolate

    large = interpolate(maps[:, None].double(), [*size], mode="bilinear", align_corners=False)[:, 0]
    low, high = (find((1, 2), keepdim=True) for find in (large.amin, large.amax))
    flat = high - low <= 1e-5 * high.abs().maximum(low.abs())
    return ((large - low) / (high - low).where(~flat, 1)).where(~flat, 0).float().cpu().numpy()


def area(maps: np.ndarray) -> np.ndarray:
    """The share of pixels of each of [n, H, W] that are at least 0.5."""
    return (maps >= HALF).mean((1, 2))


def entropy(maps: np.ndarray) -> np.ndarray:
    """Of each of [n, H, W] as a distribution over its pixels, in nats: at most log(H W); nan where the map is 0."""
    with np.errstate(invalid="ignore"):
        return entr(maps / maps.sum((1, 2), keepdims=True, dtype=np.float64)).sum((1, 2))


def lines(numbers: pd.DataFrame) -> list[str]:
    """Area and entropy of each row, and in how many seeds LaMix's maps are the narrowest."""
    texts, areas = [], {}
    for (row, choice), mine in numbers.groupby(["row", "choice"], sort=False):
        of = {metric: one.set_index("seed") for metric, one in mine.groupby("metric")}
        areas[row, choice] = of[AREA]["value"].dropna()
        seeds = f" over {len(of[AREA])} seeds" if len(of[AREA]) > 1 else ""
        images = " to ".join(f"{count:,}" for count in sorted({of[AREA]["n"].min(), of[AREA]["n"].max()}))
        both = f"area with CAM >= {HALF} {spread(of[AREA]['value'], 3)}, entropy {spread(of[ENTROPY]['value'], 3)} nats"
        texts.append(f"{label(row, choice)}: {both}{seeds}, {images} images")
    ours, others = ([cell for cell in areas if (OURS in cell[0].split()) == is_ours] for is_ours in (True, False))
    for cell in ours if others else []:
        says = f"narrower (smaller area) with {label(*cell)} than with {', '.join(label(*other) for other in others)} (paper, in words)"
        narrower = pd.DataFrame({other: areas[cell] < areas[other] for other in others}).all(axis=1)
        seen = f"seen in {narrower.sum()} of {len(narrower)} seeds" if len(narrower) else "not tried: no image counts"
        texts.append(f"{says}: {seen}")
    return [*texts, "images: those that the networks of all rows classify correctly; CAM of the predicted class, signed, without bias"]
