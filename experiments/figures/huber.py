"""PER's loss on the line beside Huber's and the Pseudo-Huber loss, and their derivatives (PER, figure 3)."""

from __future__ import annotations

import math

import pandas as pd
import torch
from torch import Tensor

from experiments.figure import Drawing, canvas
from regularizers.projection import C, kernel

FAR = 1e6  # stands in for infinity: the Pseudo-Huber loss nears |x| - 1 as 1 / (2 |x|)
STYLES = {"PER - c": "-", "Huber": "--", "Pseudo-Huber": ":"}  # c = l(0), so that PER's loss is 0 at 0 too


def draw(limit: float = 4, points: int = 401) -> Drawing:
    """l(x) - c, Huber, Pseudo-Huber on [-limit, limit], c = l(0) = sqrt(2 / pi); and their derivatives in a second panel."""
    x = torch.linspace(-limit, limit, points, dtype=torch.float64)
    picture, axes = canvas(1, 2)
    parts = []
    for axis, of, curves in zip(axes[0], ("loss", "derivative of the loss"), (losses(x), derivatives(x)), strict=True):
        for place, (name, y) in enumerate(curves.items()):
            axis.plot(x, y, STYLES[name], color=f"C{place}", label=name)
            parts.append(pd.DataFrame({"of": of, "curve": name, "x": x, "value": y}))
        axis.set(xlabel="x (no unit)", ylabel=f"{of} (no unit)")
    handles, names = axes[0][0].get_legend_handles_labels()
    picture.legend(handles, names, loc="outside lower center", ncols=len(names))
    return Drawing(picture, pd.concat(parts, ignore_index=True), lines())


def losses(x: Tensor) -> dict[str, Tensor]:
    """c = l(0) is subtracted from PER's, so that all are 0 at 0."""
    huber = torch.where(x.abs() > 1, x.abs() - 0.5, x.square() / 2)
    return {"PER - c": kernel(x) - C, "Huber": huber, "Pseudo-Huber": (1 + x.square()).sqrt() - 1}


def derivatives(x: Tensor) -> dict[str, Tensor]:
    return {"PER - c": torch.erf(x / math.sqrt(2)), "Huber": x.clamp(-1, 1), "Pseudo-Huber": x / (1 + x.square()).sqrt()}


def gap(name: str, limit: float, slope: bool = False) -> tuple[float, float]:
    """The largest distance between PER's loss - c (or derivative) and this one's for 0 <= x <= limit, and where; all are even or odd."""
    x = torch.linspace(0, limit, 200_001, dtype=torch.float64)
    curves = derivatives(x) if slope else losses(x)
    apart = (curves["PER - c"] - curves[name]).abs()
    return float(apart.max()), float(x[apart.argmax()])


def lines() -> list[str]:
    texts = []
    far = losses(torch.tensor([FAR], dtype=torch.float64))
    for name in ("Pseudo-Huber", "Huber"):
        near = ", ".join(f"{gap(name, limit)[0]:.4f} for |x| <= {limit}" for limit in (2, 5))
        steepest, at = gap(name, 10, slope=True)
        apart = f"{near}, {float(far['PER - c'] - far[name]):+.4f} towards infinity"
        texts.append(f"PER - c and {name}: largest distance {apart}; of the derivatives {steepest:.4f}, at |x| = {at:.3f}")
    small = 1e-6
    slopes = derivatives(torch.tensor([small], dtype=torch.float64))
    return [*texts, f"curvature at 0: {', '.join(f'{name} {float(slope) / small:.3f}' for name, slope in slopes.items())}"]
