"""The theorems of Unitization on random laws: exact W1 between samples against each bound. A check of our own.

Laws are samples [n, d] of equal size, in float64, each point of weight 1 / n: E is their mean, a variance the population's, and every
statement is about these laws themselves, so none holds up to sampling error only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from experiments.figure import Drawing, canvas
from models.unitization import Unitization, practical, scalar, vanilla, vector

LAWS: dict[str, Callable[[np.random.Generator, int, int], np.ndarray]] = {
    "normal": lambda rng, n, d: rng.normal(size=(n, d)),
    "Cauchy": lambda rng, n, d: rng.standard_cauchy((n, d)),
    "ternary": lambda rng, n, d: rng.integers(-1, 2, (n, d)).astype(float),
    "constant": lambda rng, n, d: rng.normal(size=(1, d)).repeat(n, 0),
    "exponential": lambda rng, n, d: rng.exponential(size=(n, d)),
}
DECADES = 3  # scales are 10^-3 to 10^3
LARGEST = 6  # dimension; power n of theorem 2; side of the layer's maps
THEOREM_3_1 = 2.0  # the vanilla map's, of any two laws
ROUNDING = 1e-9  # relative, of what still holds
EXAMPLE, POINTS, POWER = "unbounded W1", 400, 2  # points are drawn of each cube; theorem 2 in the paper has n >= 2
LOWER = ("theorem 2", EXAMPLE)  # these panels bound W1 from below


def draw(trials: int, samples: int, seed: int) -> Drawing:
    """A panel for each theorem: exact W1 and the bound, of `trials` pairs of random laws of `samples` points; and the paper's example."""
    rng = np.random.default_rng(seed)
    rows = [{"trial": trial} | row for trial in range(trials) for row in compared(rng, samples)]
    numbers = pd.DataFrame([*rows, *example(rng)])
    lower = numbers["panel"].isin(LOWER)
    small, large = numbers["w1"].where(~lower, numbers["bound"]), numbers["bound"].where(~lower, numbers["w1"])
    numbers["side"] = np.where(lower, "lower", "upper")
    holds = small <= large * (1 + ROUNDING)
    numbers["holds"] = holds.where(numbers["panel"] != EXAMPLE)  # whose bounds are those of the cubes, not of points in them
    numbers["ratio"] = (small / large).fillna(0)  # of two zeros: nothing to compare

    picture, axes = canvas(2, 4, width=9, height=2.8)
    for axis, (panel, of) in zip([*axes[0], *axes[1]], numbers.groupby("panel", sort=False), strict=True):
        for form, points in of.groupby("form", sort=False):
            axis.plot(points["w1"], points["bound"], "o", markersize=2, markeredgewidth=0, alpha=0.7, label=form)
        axis.legend(loc="upper left" if panel in LOWER else "lower right", handletextpad=0.1, borderpad=0.2, markerscale=2)
        ends = of["w1"][of["w1"] > 0].agg(["min", "max"])
        line = axis.plot(ends, ends, color="0.2", linewidth=0.8)
        title = f"{panel}, {of['side'].iloc[0]} bound"
        axis.set(xscale="log", yscale="log", xlabel="exact W1 (no unit)", ylabel="bound (no unit)", title=title)
    picture.legend(line, ["bound = W1"], loc="outside lower center")
    return Drawing(picture, numbers, [*counted(numbers), *estimated(numbers)])


def counted(numbers: pd.DataFrame) -> Iterator[str]:
    """How many laws each form of each bound holds for, and how near they come to it, in words."""
    for (panel, form, side), of in numbers[numbers["panel"] != EXAMPLE].groupby(["panel", "form", "side"], sort=False):
        ratio = f"{'W1 / bound' if side == 'upper' else 'bound / W1'} {of['ratio'].max():.4g}"
        held = int(of["holds"].sum())
        failed = f", {len(of) - held} FAIL" if held < len(of) else ""
        yield f"{panel}, {form}: holds for {held} of {len(of)} pairs of laws{failed}, largest {ratio}"


def estimated(numbers: pd.DataFrame) -> Iterator[str]:
    for (d, size), of in numbers[numbers["panel"] == EXAMPLE].groupby(["d", "scale_x"]):
        bounds = ", ".join(f"{one.form} {one.bound:.4g}" for one in of.itertuples())
        yield f"{EXAMPLE}, d = {d:.0f}, C' = {size:g}: W1 of {POINTS} points {of['w1'].iloc[0]:.4g}; {bounds}"


def compared(rng: np.random.Generator, samples: int) -> Iterator[dict[str, Any]]:
    """One pair of random laws for the theorems, another for the layer: panel, form, law_x, law_y, d, scale_x, scale_y, w1, bound."""
    d = int(rng.integers(1, LARGEST + 1))
    x, y, about = pair(rng, samples, d)
    n, c = int(rng.integers(1, LARGEST + 1)), max(about["scale_x"], about["scale_y"]) * 10 ** rng.uniform(-2, 1)
    one, each, free, other = float(weights(rng, 1)), weights(rng, d), weights(rng, d, free=True), weights(rng, d, free=True)
    eps = 10 ** rng.uniform(-6, 0)
    g, moved = practical(x, free, eps), practical(y, other, eps)

    channels, side = rng.integers(1, LARGEST + 1, 2).tolist()
    images, others, about_images = pair(rng, samples, channels * side**2)
    layer = Unitization(channels).double().requires_grad_(False)
    shape = (samples, channels, side, side)
    z, z_other = layer(images.view(shape)).flatten(1), layer(others.view(shape)).flatten(1)  # alpha starts at 0
    layer.alpha.copy_(weights(rng, channels, free=True))
    out, out_other = layer(images.view(shape)).flatten(1), layer(others.view(shape)).flatten(1)

    cases: list[tuple[str, Tensor, Tensor, dict[str, float]]] = [
        ("theorem 1", x, y, {"as printed": theorem_1(x, y), "standard deviations": theorem_1_sharper(x, y)}),
        ("theorem 2", x, y, {"n from 1 to 6": theorem_2(x, y, n, c)}),
        ("theorem 3.1", vanilla(x), vanilla(y), {"vanilla map": THEOREM_3_1}),
        ("theorem 3.2", scalar(x, one), scalar(y, one), {"as printed": theorem_3_2(x, y, one), "uniform": uniform_3_2(x, y, one)}),
        ("theorem 3.3", vector(x, each), vector(y, each), {"as printed": theorem_3_3(x, y, each), "uniform": uniform_3_3(x, y)}),
        ("theorem 3.4", g, practical(y, free, eps), {"one alpha": theorem_3_4(x, y, free, free)}),
        ("theorem 3.4", g, moved, {"two alphas": theorem_3_4(x, y, free, other)}),
    ]
    for panel, left, right, bounds in cases:
        distance = w1(left, right)
        yield from ({"panel": panel, "form": form, **about, "d": d, "w1": distance, "bound": bound} for form, bound in bounds.items())
    distance = w1(out, out_other)
    for form, pixels in (("with H W", side**2), ("without H W", 1)):
        bound = layer_bound(z, z_other, layer.alpha, pixels)
        yield {"panel": "the layer", "form": form, **about_images, "d": z.shape[1], "w1": distance, "bound": bound}


def pair(rng: np.random.Generator, n: int, d: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Samples [n, d] of two different laws, each with a scale of its own, and what they are."""
    names, scales = rng.choice(list(LAWS), 2, replace=False).tolist(), (10 ** rng.uniform(-DECADES, DECADES, 2)).tolist()
    x, y = (torch.from_numpy(scale * LAWS[name](rng, n, d)) for name, scale in zip(names, scales, strict=True))
    return x, y, dict(zip(("law_x", "law_y", "scale_x", "scale_y"), [*names, *scales], strict=True))


def weights(rng: np.random.Generator, d: int, free: bool = False) -> Tensor:
    """A random alpha [d] in [0, 1], a quarter of them 0 and a quarter 1, half the time one for all entries; if free, of any sign too."""
    inside = rng.uniform(-0.5, 1.5, d).clip(0, 1)
    kinds = [inside[:1].repeat(d), inside, 3 * rng.normal(size=d)]
    return torch.from_numpy(kinds[rng.integers(3 if free else 2)])


def example(rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """U[C'/2, C']^d against U[0, C'/4]^d, whose W1 grows with C' and d, as `compared` has it; scale_x and scale_y are C'."""
    for d in (1, 2, 4):
        for size in (1.0, 10.0, 100.0):
            x, y = (torch.from_numpy(rng.uniform(low * size, high * size, (POINTS, d))) for low, high in ((0.5, 1), (0, 0.25)))
            about = {"law_x": "U[C'/2, C']^d", "law_y": "U[0, C'/4]^d", "scale_x": size, "scale_y": size}
            printed = (2**-POWER - 4**-POWER) * math.sqrt(d) * size / POWER
            bounds = {"5 C' sqrt(d) / 8": 5 * size * math.sqrt(d) / 8, f"paper's, n = {POWER}": printed}
            distance = w1(x, y)
            yield from ({"panel": EXAMPLE, "form": form, **about, "d": d, "w1": distance, "bound": one} for form, one in bounds.items())


def w1(x: Tensor, y: Tensor) -> float:
    """The 1-Wasserstein distance between two samples [n, d] of equal size, of Euclidean cost: exact, the best of all pairings."""
    costs = (x[:, None] - y[None]).norm(dim=-1).numpy()  # cdist may go through squares, which cancel
    return float(costs[linear_sum_assignment(costs)].mean())


def theorem_1(x: Tensor, y: Tensor) -> float:
    """tr S_x + tr S_y + |E x - E y| + 2: the paper's, which adds squared lengths to lengths."""
    spread = x.var(0, correction=0).sum() + y.var(0, correction=0).sum()
    return float(spread + (x.mean(0) - y.mean(0)).norm() + 2)


def theorem_1_sharper(x: Tensor, y: Tensor) -> float:
    """sqrt(tr S_x) + sqrt(tr S_y) + |E x - E y|: below theorem 1's, and it scales with the laws, as W1 does."""
    spread = x.var(0, correction=0).sum().sqrt() + y.var(0, correction=0).sum().sqrt()
    return float(spread + (x.mean(0) - y.mean(0)).norm())


def theorem_2(x: Tensor, y: Tensor, n: int, c: float) -> float:
    """|E f(x) - E f(y)|, below W1; f(x) = sum_i clip(x_i, -C, C)^n / (n C^(n - 1) sqrt d) is 1-Lipschitz, of n >= 1 and C > 0."""
    means = [((law / c).clamp(-1, 1) ** n).sum(1).mean() for law in (x, y)]  # over C first: neither power leaves float64
    return float((means[0] - means[1]).abs() * c / (n * math.sqrt(x.shape[1])))


def theorem_3_2(x: Tensor, y: Tensor, alpha: float) -> float:
    """Of the scalar map, alpha in [0, 1]: 2 / alpha, or E|x| + E|y| of alpha = 0."""
    return 2 / alpha if alpha > 0 else _length(x) + _length(y)


def uniform_3_2(x: Tensor, y: Tensor, alpha: float) -> float:
    """The lower of 2 / alpha and `uniform_3_3`, of the scalar map: it stays finite as alpha goes to 0."""
    return min(2 / alpha if alpha > 0 else math.inf, uniform_3_3(x, y))


def theorem_3_3(x: Tensor, y: Tensor, alpha: Tensor) -> float:
    """Of the vector map, alpha [d] in [0, 1], with m the lowest: 2 / m, or E|x| + E|y| + 2 of m = 0."""
    lowest = float(alpha.min())
    return 2 / lowest if lowest > 0 else _length(x) + _length(y) + 2


def uniform_3_3(x: Tensor, y: Tensor) -> float:
    """E max(|x|, 1) + E max(|y|, 1), of the vector map of every alpha in [0, 1]: its values are no longer than that."""
    return _length(x, 1) + _length(y, 1)


def theorem_3_4(x: Tensor, y: Tensor, alpha: Tensor, other: Tensor) -> float:
    """|a|_inf + |a'|_inf + |1 - a|_inf E|x| + |1 - a'|_inf E|y| of the practical map, x under a and y under a'; the paper has a = a'."""
    return float(alpha.abs().max() + other.abs().max() + (1 - alpha).abs().max() * _length(x) + (1 - other).abs().max() * _length(y))


def layer_bound(z: Tensor, other: Tensor, alpha: Tensor, pixels: int) -> float:
    """2 P |alpha|_inf + |1 - alpha|_inf (E|z| + E|z'|), of the layer on maps of P pixels, before its weight and bias.

    z, z' [n, C P] are the two batches as it normalises them. Of P = 1 it is theorem 3.4's, which the layer's factor 1 / P^2 breaks.
    """
    return float(2 * pixels * alpha.abs().max() + (1 - alpha).abs().max() * (_length(z) + _length(other)))


def _length(x: Tensor, least: float = 0) -> float:
    """E max(|x|, least)."""
    return float(x.norm(dim=1).clamp(min=least).mean())
