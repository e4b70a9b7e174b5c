"""Four samples in the plane that mean and variance cannot tell apart (PER, figure 1), and what can."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import torch

from experiments.figure import Drawing, canvas
from experiments.figures.particles import sliced_w1
from regularizers.projection import C, kernel

CORRELATION, MODE = 0.8, 0.95  # of (b); of (d), halfway between its modes. The paper gives neither (protocol sheet, section 4)

LABELS = {"sw1": "sliced W1", "loss": "PER - c"}


def draw(samples: int = 1000, slices: int = 256, seed: int = 0) -> Drawing:
    """A panel for each sample; above it, its sliced W1 to N(0, I) and PER's loss, over directions spread evenly over the half circle."""
    angle = torch.arange(slices, dtype=torch.float64) * math.pi / slices
    theta = torch.stack([angle.cos(), angle.sin()], 1)
    picture, axes = canvas(1, 4, height=2.6, sharex=True, sharey=True)
    parts, texts = [], []
    lowest: dict[str, tuple[float, str]] = {}
    for axis, (name, points) in zip(axes[0], make(samples, seed).items(), strict=True):
        projected = torch.from_numpy(points)
        found = moments(points) | {"sw1": float(sliced_w1(projected, theta)), "loss": float(kernel(projected @ theta.T).mean()) - C}
        lowest = {key: min((found[key], name), lowest.get(key, (math.inf, ""))) for key in LABELS}
        axis.plot(*points.T, "o", markersize=1.5, markeredgewidth=0)
        axis.set_title("\n".join([name, *(f"{label} {found[key]:.3f}" for key, label in LABELS.items())]))
        axis.set(xlabel="x (no unit)", aspect="equal")
        parts.append(pd.DataFrame({"x": points[:, 0], "y": points[:, 1]}).assign(panel=name, kind="point"))
        parts.append(pd.DataFrame({"statistic": list(found), "value": list(found.values())}).assign(panel=name, kind="statistic"))
        texts.append(f"{name}: {', '.join(f'{LABELS.get(key, key)} {round(value, 3) + 0:.3f}' for key, value in found.items())}")
    texts += [f"lowest {label}: {lowest[key][1]}" for key, label in LABELS.items()]
    axes[0][0].set_ylabel("y (no unit)")
    return Drawing(picture, pd.concat(parts, ignore_index=True), texts)


def make(samples: int, seed: int) -> dict[str, np.ndarray]:
    """The four samples [n, 2]: y from N(0, 1); both coordinates with mean 0 and variance 1, not only of what they are drawn from."""
    rng = np.random.default_rng(seed)
    y = rng.normal(size=samples)
    x = {
        "(a) independent normal": rng.normal(size=samples),
        "(b) correlated": CORRELATION * y + math.sqrt(1 - CORRELATION**2) * rng.normal(size=samples),
        "(c) skewed": rng.exponential(size=samples) - 1,
        "(d) two modes": rng.choice([-MODE, MODE], samples) + math.sqrt(1 - MODE**2) * rng.normal(size=samples),
    }
    pairs = {name: np.stack([one, y], 1) for name, one in x.items()}
    return {name: (points - points.mean(0)) / points.std(0, ddof=1) for name, points in pairs.items()}


def moments(points: np.ndarray) -> dict[str, float]:
    """Of points [n, 2]: of x and of y mean, variance, skewness, and kurtosis above a normal's; and their correlation."""
    found: dict[str, float] = {}
    for name, one in zip("xy", points.T, strict=True):
        z = (one - one.mean()) / one.std()
        found |= {f"mean {name}": one.mean(), f"variance {name}": one.var(ddof=1)}
        found |= {f"skewness {name}": (z**3).mean(), f"excess kurtosis {name}": (z**4).mean() - 3}
    return {key: float(value) for key, value in found.items()} | {"correlation": float(np.corrcoef(*points.T)[0, 1])}
