"""The distribution of targets and of learned labels over the epochs, for one mini-batch of pairs (LaMix, figure 3)."""

from __future__ import annotations

import numpy as np
import pandas as pd

from experiments.config import ConfigError
from experiments.figure import Drawing, Runs, canvas, label

NAMES = {"target": "training target t", "global": "global soft label p"}
FIRST, SECOND, LARGEST = "soft_labels/first", "soft_labels/second", "soft_labels/target_largest"


def draw(runs: Runs) -> Drawing:
    """From runs with `probe=soft_labels`, a line of two panels each: epochs downwards from the untrained network, entries to the right.

    The colour is the share of the entries in a bin, in logarithms: of K entries most are small.
    """
    from matplotlib.colors import LogNorm

    jobs = [job for job in runs.wanted.drop_duplicates("id").itertuples() if job.id in runs.done]
    picture, axes = canvas(len(jobs), 2, height=3.0)
    parts, texts = [], []
    for line, job in zip(axes, jobs, strict=True):
        run = runs.done[job.id]
        rows = pd.DataFrame(run.metrics())
        if LARGEST not in rows:
            raise ConfigError(f"figure.runs: {run.path} has no {LARGEST}; its base needs probe=soft_labels")
        rows = rows.dropna(subset=LARGEST)
        name = f"{label(job.row, job.choice)}, seed {job.seed}"
        for axis, (key, text) in zip(line, NAMES.items(), strict=True):
            columns = [column for column in rows if str(column).startswith(f"histogram/{key}/")]
            shares = rows[columns].div(rows[columns].sum(axis=1), axis=0).to_numpy()
            edges = np.linspace(0, 1, len(columns) + 1)
            epochs = np.append(rows["epoch"].to_numpy() - 0.5, rows["epoch"].iloc[-1] + 0.5)
            image = axis.pcolormesh(edges, epochs, np.ma.masked_equal(shares, 0), cmap="viridis", norm=LogNorm(1e-3, 1), rasterized=True)
            last = int(np.flatnonzero(shares.any(axis=0)).max()) + 2
            axis.set(xlabel=f"{text} (no unit)", xlim=(0, edges[min(last, len(columns))]), ylim=(epochs[-1], epochs[0]), title=name)
            axis.grid(False)
            long = rows.melt(["epoch"], columns, "metric")
            parts.append(long.assign(row=job.row, choice=job.choice, seed=job.seed, source="run"))
        line[0].set_ylabel("epoch")
        picture.colorbar(image, ax=line, label="share of the entries", shrink=0.9)
        parts += [
            rows.melt(["epoch"], [FIRST, SECOND, LARGEST], "metric").assign(row=job.row, choice=job.choice, seed=job.seed, source="run")
        ]
        few = max(1, (len(rows) - 1) // 10)
        early, late = rows.iloc[1 : 1 + few], rows.tail(few)  # the first row is the untrained network
        for part, when in ((early, "first tenth of the epochs"), (late, "last tenth")):
            pair = f"{part[FIRST].mean():.3f} and {part[SECOND].mean():.3f}"
            texts.append(f"{name}, {when}: largest entries of p on pairs of two classes {pair}; largest target {part[LARGEST].mean():.3f}")
        grew = late[FIRST].mean() + late[SECOND].mean() > early[FIRST].mean() + early[SECOND].mean()
        texts.append(f"{name}: the label's largest entries grow as training progresses (paper): {'seen' if grew else 'not seen'}")
    texts.append(
        "paper, on CIFAR-10: p has many entries between 0.14 and 0.18 early, between 0.18 and 0.20 late; largest targets 0.55 to 0.65"
    )
    texts.append(
        "with ten classes and beta = 0.5: no entry of p above 0.232, no mean of two above 0.202, no target of one image above 0.616"
    )
    return Drawing(picture, pd.concat(parts, ignore_index=True), texts)
