"""Training and test cross-entropy over the epochs, with and without a method (ITDM, figure 1)."""

from __future__ import annotations

import pandas as pd

from experiments.figure import Drawing, Runs, canvas, label

METRICS = {"train/ce": ("--", "x"), "test/ce": ("-", "o")}  # line, and mark of a single point


def draw(runs: Runs) -> Drawing:
    """One panel for each data set: at each epoch's end the mean over the seeds, with a band of ± 1 s.d.; CE in nats, log scale."""
    panels = runs.panels()
    points = pd.concat([curves(runs, name, jobs) for name, jobs in panels.items()], ignore_index=True)
    names = list(dict.fromkeys(map(tuple, points[["row", "choice"]].values)))

    picture, axes = canvas(1, len(panels), width=max(3.7, 2.6 * len(panels)), height=3.1)
    for axis, panel in zip(axes[0], panels, strict=True):
        for (row, choice, metric), line in points[points["panel"] == panel].groupby(["row", "choice", "metric"], sort=False):
            color, text = f"C{names.index((row, choice))}", f"{metric.split('/')[0]}, {label(row, choice)}"
            style, mark = METRICS[metric]
            axis.plot(line["epoch"], line["value"], style, color=color, linewidth=1.2, label=text)
            if len(line) == 1:
                axis.plot(line["epoch"], line["value"], mark, color=color, markersize=4)
            low, high = (line["value"] + sign * line["spread"] for sign in (-1, 1))
            axis.fill_between(line["epoch"], low.clip(lower=line["value"] / 10), high, color=color, alpha=0.2, linewidth=0)
        axis.set(xlabel="epoch", ylabel="cross-entropy [nats]" if axis is axes[0][0] else None, title=panel, yscale="log")
    handles, texts = max((axis.get_legend_handles_labels() for axis in axes[0]), key=lambda found: len(found[1]))
    picture.legend(handles, texts, loc="outside lower center", ncols=2, fontsize=7)
    return Drawing(picture, points, lines(points))


def curves(runs: Runs, panel: str, jobs: pd.DataFrame) -> pd.DataFrame:
    """panel, row, choice, metric, epoch, value, spread, n: one line per epoch's end; evaluations within an epoch are left out."""
    parts = [
        pd.DataFrame(runs.done[job.id].metrics()).assign(row=job.row, choice=job.choice) for job in jobs.itertuples() if job.id in runs.done
    ]
    if not parts:
        return pd.DataFrame(columns=["panel", "row", "choice", "metric", "epoch", "value", "spread", "n"])
    ends = pd.concat(parts)[lambda found: found["epoch"] % 1 == 0]
    long = ends.melt(["row", "choice", "epoch"], list(METRICS), "metric")
    found = long.groupby(["row", "choice", "metric", "epoch"], sort=False)["value"].agg(value="mean", spread="std", n="count").reset_index()
    return found.assign(panel=panel)[["panel", *found.columns]]


def lines(points: pd.DataFrame) -> list[str]:
    ends = points.groupby(["panel", "row", "choice", "metric"], sort=False).tail(1)
    spread = ends["spread"].map(lambda value: "" if value != value else f" ± {value:.4f}")
    texts = [
        f"{one.panel + ': ' if one.panel else ''}{label(one.row, one.choice)}: {one.metric} {one.value:.4f}{more} after epoch {one.epoch:g}"
        for one, more in zip(ends.itertuples(), spread, strict=True)
    ]
    return [*texts, "bands: ± 1 s.d. over the seeds" if points["spread"].notna().any() else "no bands: one seed"]
