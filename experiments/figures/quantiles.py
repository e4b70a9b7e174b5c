"""The distribution of one unit of three layers over the epochs: quartiles, mean and variance (PER, figure 4)."""

from __future__ import annotations

from string import ascii_lowercase

import pandas as pd

from experiments.figure import Drawing, Runs, canvas
from experiments.figures.layers import BN, PER, PLAIN, UNTRAINED, logged, part, verdicts

QUARTILES = ("q25", "q50", "q75")
VARIED, BIASED = 6, (3, 9)  # layers that the paper names: the variance falls under PER; the mean nears 0


def draw(runs: Runs, cap: float = 5, pre: bool = False) -> Drawing:
    """A column of panels for each layer: the band between the quartiles and the median for each method, then means and variances.

    Variances above `cap` are drawn there, as in the paper. pre: of the unit before the non-linearity. Bands are of the first seed.
    """
    before = "pre_" if pre else ""
    points = logged(runs, [before + name for name in (*QUARTILES, "mean", "var")])
    points = points.assign(name=points["name"].str.removeprefix(before))
    methods, layers = list(dict.fromkeys(points["method"])), sorted(points["layer"].unique())
    first = points[points["seed"] == points["seed"].min()]

    picture, axes = canvas(len(methods) + 2, len(layers), height=1.6, sharex=True)
    for column, layer in enumerate(layers):
        bands = first[(first["layer"] == layer) & first["name"].isin(QUARTILES)]
        room = 0.05 * (bands["value"].max() - bands["value"].min() or 1)
        for row, method in enumerate(methods):
            band = bands[bands["method"] == method].pivot(index="epoch", columns="name", values="value")
            axis, color = axes[row][column], f"C{row}"
            axis.fill_between(band.index, band["q25"], band["q75"], color=color, alpha=0.3, linewidth=0)
            axis.plot(band.index, band["q50"], color=color, linewidth=1)
            axis.set_ylim(bands["value"].min() - room, bands["value"].max() + room)  # one scale for all methods
            for place, name in enumerate(("mean", "var"), len(methods)):
                for _, line in points[(points["layer"] == layer) & (points["method"] == method) & (points["name"] == name)].groupby("seed"):
                    values = line["value"].clip(upper=cap) if name == "var" else line["value"]
                    axes[place][column].plot(line["epoch"], values, color=color, linewidth=1)
        axes[0][column].set_title(f"layer {layer}")
        axes[-1][column].set(xlabel="epoch", ylim=(0, 1.05 * axes[-1][column].dataLim.y1 or 1))
    texts = [*(f"{method}:\nquartiles" for method in methods), "mean", f"min(variance, {cap:g})"]
    for letter, line, text in zip(ascii_lowercase, axes, texts, strict=False):
        line[0].set_ylabel(f"({letter}) {text}")
    handles = [axes[row][0].lines[0] for row in range(len(methods))]
    where = "before the non-linearity" if pre else "after the non-linearity"
    picture.legend(handles, methods, loc="outside lower center", ncols=len(methods), title=f"one unit of each layer, {where} (no unit)")
    return Drawing(picture, points, lines(points))


def lines(points: pd.DataFrame) -> list[str]:
    """The numbers of the protocol sheet's section 4 for each run, and what the paper reads off its figure."""
    texts, moves, final, variances = [], {}, {}, {}
    trained = points[points["epoch"] >= 1]
    for (method, row, seed), run in points.groupby(["method", "row", "seed"], sort=False):
        series = {(layer, name): one["value"] for (layer, name), one in run.groupby(["layer", "name"])}
        layers = sorted(run["layer"].unique())
        for layer in layers:
            moves[row, seed, layer] = float(series[layer, "q50"].diff().abs().median())
            final[row, seed, layer] = float(series[layer, "mean"].iloc[-1])
        for (layer,), one in trained[(trained["method"] == method) & (trained["seed"] == seed) & (trained["name"] == "var")].groupby(
            ["layer"]
        ):
            variances[row, seed, layer] = part(one["value"]), part(one["value"], last=True)
        each = {"median |change of the median| from epoch to epoch": [f"{moves[row, seed, layer]:.3g}" for layer in layers]}
        each["mean at the end"] = [f"{final[row, seed, layer]:.3g}" for layer in layers]
        each["variance at the end"] = [f"{series[layer, 'var'].iloc[-1]:.3g}" for layer in layers]
        numbers = "; ".join(f"{key} {', '.join(values)}" for key, values in each.items())
        texts.append(f"{method}, seed {seed}, layers {', '.join(map(str, layers))}: {numbers}")

    seeds, layers = sorted(points["seed"].unique()), sorted(points["layer"].unique())
    least, falls, centred = {}, {}, {}
    for seed in seeds:
        rows = [row for row in dict.fromkeys(points["row"]) if (row, seed, layers[0]) in moves]
        if BN in rows and len(rows) > 1:
            least[seed] = {layer: all(moves[BN, seed, layer] < moves[row, seed, layer] for row in rows if row != BN) for layer in layers}
        if PER in rows and PLAIN in rows:
            if VARIED in layers:
                ours, plain = variances[PER, seed, VARIED], variances[PLAIN, seed, VARIED]
                falls[seed] = {VARIED: ours[1] < ours[0] and plain[1] >= plain[0]}
                pair = f"{PER} {ours[0]:.3g} -> {ours[1]:.3g}, {PLAIN} {plain[0]:.3g} -> {plain[1]:.3g}"
                texts.append(f"variance in layer {VARIED}, mean of the first tenth of the epochs -> of the last, seed {seed}: {pair}")
            centred[seed] = {at: abs(final[PER, seed, at]) < abs(final[PLAIN, seed, at]) for at in BIASED if at in layers}
    return [
        *texts,
        *([UNTRAINED] if BN in set(points["row"]) else []),
        verdicts(f"the median moves least from epoch to epoch under {BN} (paper)", least),
        verdicts(f"in layer {VARIED} the variance falls under {PER} and not under {PLAIN} (paper)", falls),
        verdicts(f"the mean ends nearer to 0 under {PER} than under {PLAIN} in layers {' and '.join(map(str, BIASED))} (paper)", centred),
    ]
