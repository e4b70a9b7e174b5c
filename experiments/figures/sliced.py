"""How far the activations of three layers are from N(0, I) over the epochs: sliced W1, and RMS beside it (PER, figure 5)."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from scipy.special import ndtr

from experiments.config import ConfigError
from experiments.figure import Drawing, Runs, canvas
from experiments.figures.layers import BN, PER, PLAIN, UNTRAINED, images, logged, part, verdicts

MODES = {"exact": "sw1", "sampled": "sw1_sampled"}
ZERO = math.sqrt(2 / math.pi)  # E|Z|: the distance of activations that are all 0


def draw(runs: Runs, mode: str = "exact") -> Drawing:
    """A column of panels for each layer: its sliced W1 to N(0, I) and its RMS, one line for each method and seed.

    mode: "exact" without draws from the Gaussian; "sampled" with as many as images, as in the paper. The distance alone cannot say
    whether activations are too large or too small, the RMS can: of N(0, I) it is 1.
    """
    if mode not in MODES:
        raise ConfigError(f"figure.draw.mode: {mode!r} is not known; allowed: {', '.join(MODES)}")
    points = logged(runs, [MODES[mode], "rms"])
    methods, layers = list(dict.fromkeys(points["method"])), sorted(points["layer"].unique())
    count = images(runs)
    least = floor(count, mode)

    picture, axes = canvas(2, len(layers), height=2.2, sharex=True, sharey="row")
    for column, layer in enumerate(layers):
        for row, name in enumerate((MODES[mode], "rms")):
            here = points[(points["layer"] == layer) & (points["name"] == name)]
            for (method, _), line in here.groupby(["method", "seed"], sort=False):
                mark = "o" if len(line) == 1 else None
                axes[row][column].plot(
                    line["epoch"], line["value"], color=f"C{methods.index(method)}", linewidth=1, label=method, marker=mark
                )
        above, below = axes[0][column], axes[1][column]
        above.axhline(ZERO, color="0.4", linewidth=0.8, linestyle="-.", label=f"all 0: {ZERO:.3f}")
        above.axhline(least, color="0.4", linewidth=0.8, linestyle=":", label=f"{count} draws from N(0, I): {least:.3f}")
        below.axhline(1, color="0.4", linewidth=0.8, linestyle="--", label="N(0, I): RMS 1")
        above.set_title(f"layer {layer}")
        below.set_xlabel("epoch")
    axes[0][0].set(ylabel=f"{mode} sliced W1\nto N(0, I) (log scale)", yscale="log")
    axes[1][0].set(ylabel="RMS activation\n(log scale)", yscale="log")
    handles = {text: handle for line in axes for handle, text in zip(*line[0].get_legend_handles_labels(), strict=True)}
    picture.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=min(3, len(handles)))
    return Drawing(
        picture, points, [*lines(points, MODES[mode]), f"{count} draws from N(0, I) have {least:.4f} ({mode}), zeros {ZERO:.4f}"]
    )


def floor(count: int, mode: str) -> float:
    """What `count` draws from N(0, 1) have on average: sqrt(2 / pi) times the integral of the s.d. of their distribution function.

    About 1.3 / sqrt(count); against draws, as many again, sqrt 2 times that.
    """
    x = np.linspace(-12, 12, 24_001)
    spread = np.sqrt(ndtr(x) * ndtr(-x)).sum() * (x[1] - x[0])
    return float(ZERO * spread * math.sqrt((1 if mode == "exact" else 2) / count))


def lines(points: pd.DataFrame, name: str) -> list[str]:
    """The last values, and what the paper reads off its figure."""
    texts, early, late = [], {}, {}
    for (method, row, seed), run in points.groupby(["method", "row", "seed"], sort=False):
        ends = run.groupby(["layer", "name"])["value"].last().unstack()
        each = [f"layer {layer} {end[name]:.3f} (RMS {end['rms']:.3g})" for layer, end in ends.iterrows()]
        texts.append(f"{method}, seed {seed}: sliced W1 at the end {', '.join(each)}")
        for layer, one in run[(run["name"] == name) & (run["epoch"] >= 1)].groupby("layer"):
            early[row, seed, layer], late[row, seed, layer] = part(one["value"]), part(one["value"], last=True)
    small, below = {}, {}
    layers = sorted(points["layer"].unique())
    for seed in sorted(points["seed"].unique()):
        rows = [row for row in dict.fromkeys(points["row"]) if (row, seed, layers[0]) in early]
        if BN in rows and len(rows) > 1:
            small[seed] = {layer: all(early[BN, seed, layer] < early[row, seed, layer] for row in rows if row != BN) for layer in layers}
        if PER in rows and PLAIN in rows:
            below[seed] = {layer: late[PER, seed, layer] < late[PLAIN, seed, layer] for layer in layers}
    return [
        *texts,
        *([UNTRAINED] if BN in set(points["row"]) else []),
        verdicts(f"{BN} is nearest to N(0, I) early, over the first tenth of the epochs (paper)", small),
        verdicts(f"{PER} is nearer to N(0, I) than {PLAIN} late, over the last tenth of the epochs (paper)", below),
    ]
