"""Where PER's strength takes the activations: sliced W1 to N(0, I), RMS and test error over its weight. A hypothesis of our own."""

from __future__ import annotations

from typing import Any

import pandas as pd

from experiments.config import ConfigError
from experiments.figure import Drawing, Runs, canvas
from experiments.figures.layers import shown
from experiments.figures.sliced import ZERO
from experiments.pick import numbers

ERROR = "test/error"
LABELS = ("sliced W1 to N(0, I)", "RMS (log scale)", "test error [%]")
MOST_TICKS = 6  # of the weights; of more, the powers of ten


def draw(runs: Runs) -> Drawing:
    """Three panels over the weight λ, log scale: sliced W1 and RMS at the end of training, a line for each layer, and the test error.

    Rows that differ in their grids alone are one line. A row without a grid is λ = 0 of every line, and stands at the left. Means over
    the seeds, with bars of 1 s.d. for several.
    PER's loss is minimal at 0, not at N(0, I) (protocol sheet, P7). So we expect that with λ the distance first falls, as large
    activations shrink, and then rises to that of activations that are all 0.
    """
    points = ends(runs)
    weights = sorted(points["weight"].unique())
    positive = [weight for weight in weights if weight > 0]
    zero = positive[0] ** 2 / positive[1] if len(positive) > 1 else positive[0] / 10  # where λ = 0 stands: one step further left
    ticks = (
        positive if len(positive) <= MOST_TICKS else [10.0**power for power in range(-20, 9) if positive[0] <= 10.0**power <= positive[-1]]
    )
    names = ["0"] * (0 in weights) + [f"{weight:g}" for weight in ticks]

    picture, axes = canvas(1, 3, height=2.9)
    rows, layers = list(dict.fromkeys(points["row"])), sorted(set(points["layer"]) - {0})
    for axis, name, text in zip(axes[0], ("sw1", "rms", "error"), LABELS, strict=True):
        for (row, layer), line in points[points["name"] == name].groupby(["row", "layer"], sort=False):
            look: dict[str, Any] = {"linestyle": ("-", "--", ":", "-.")[rows.index(row) % 4], "marker": "o", "markersize": 3, "capsize": 2}
            look["color"] = f"C{layers.index(layer)}" if layer else "k"
            look["label"] = ", ".join([row] * (len(rows) > 1) + [f"layer {layer}"] * (layer > 0))
            axis.errorbar(line["weight"].where(line["weight"] > 0, zero), line["value"], line["spread"], linewidth=1, **look)
        axis.set(xlabel="λ", ylabel=text, xscale="log")
        axis.set_xticks([zero] * (0 in weights) + ticks, names, rotation=45)
        axis.minorticks_off()
    axes[0][0].axhline(ZERO, color="0.4", linewidth=0.8, linestyle="-.", label=f"all 0: {ZERO:.3f}")
    axes[0][0].set_ylim(0, 1.05 * axes[0][0].dataLim.y1)
    axes[0][1].set_yscale("log")
    axes[0][1].axhline(1, color="0.4", linewidth=0.8, linestyle="--", label="N(0, I): RMS 1")
    handles = {text: handle for axis in axes[0] for handle, text in zip(*axis.get_legend_handles_labels(), strict=True) if text}
    picture.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=min(4, len(handles)))
    return Drawing(picture, points, lines(points))


def ends(runs: Runs) -> pd.DataFrame:
    """row, layer (0: none), name, metric, weight, value, spread, n: a run's number as the table takes it, over the seeds."""
    jobs = shown(runs)
    plain = [row.label for row in runs.table.rows if not row.grid]
    if bad := [row.label for row in runs.table.rows if len(row.grid) > 1]:
        raise ConfigError(f"figure.runs.rows: {bad[0]!r} has a grid of several keys, so no place on the axis of λ")
    metrics = sorted({key for one in runs.done.values() for key in one.metrics()[-1] if key.startswith("layer")})
    metrics = [key for key in metrics if key.endswith(("/sw1", "/rms"))]
    parts = []
    alike: dict[tuple[str, ...], list[str]] = {}
    for one in runs.table.rows:
        if one.grid:
            alike.setdefault((*one.grid, *one.overrides), []).append(one.label)
    for row, *others in alike.values():
        mine = jobs[jobs["row"].isin([row, *others, *plain])].drop_duplicates("id")
        weight = mine["choice"].replace("", "0").astype(float)
        for metric in [*metrics, ERROR]:
            found = numbers(mine, runs.done, metric, runs.table.at).groupby(weight).agg(value="mean", spread="std", n="count")
            layer, name = (int(metric.removeprefix("layer").split("/")[0]), metric.split("/")[1]) if metric != ERROR else (0, "error")
            known = {"row": row, "layer": layer, "name": name, "metric": metric}
            parts.append(found[found["n"] > 0].rename_axis("weight").reset_index().assign(**known))
    if not parts:
        raise ConfigError("figure.runs.rows: none has a grid of weights")
    both = pd.concat(parts, ignore_index=True)
    if not (both["weight"] > 0).any():
        raise ConfigError("figure.runs: no run with a weight is done yet")
    return both[["row", "layer", "name", "metric", "weight", "value", "spread", "n"]]


def lines(points: pd.DataFrame) -> list[str]:
    """The numbers by λ, and for each layer whether the distance first falls and then rises."""
    texts = []
    for (row, metric), line in points.groupby(["row", "metric"], sort=False):
        texts.append(f"{row}, {metric} at λ = {', '.join(f'{one.weight:g}: {one.value:.3g}' for one in line.itertuples())}")
    for (row, layer), line in points[points["name"] == "sw1"].groupby(["row", "layer"], sort=False):
        values = line["value"].reset_index(drop=True)
        of = "one seed" if line["n"].max() == 1 else f"the means over {line['n'].max()} seeds"
        turns = 0 < values.idxmin() < len(values) - 1
        lowest = f"lowest {values.min():.3f} at λ = {line['weight'].iloc[values.idxmin()]:g}, {values.iloc[-1]:.3f} at the largest"
        says = f"{row}, layer {layer}: the sliced W1 first falls with λ, then rises towards {ZERO:.3f} (our hypothesis)"
        texts.append(f"{says}: {'seen' if turns else 'not seen'} in {of}; {lowest}")
    return texts
