"""Does a penalty shrink the last hidden layer to nothing? Its scale and the accuracy over the steps. A finding of our own."""

from __future__ import annotations

import pandas as pd

from experiments.figure import Drawing, Runs, canvas

METRICS = {"test/feature_rms": "RMS of last hidden layer", "test/accuracy": "test accuracy [%]"}


def draw(runs: Runs, chance: float = 20) -> Drawing:
    """Two panels for each column of runs: RMS (log scale) and accuracy over the steps, one line per λ and seed.

    Without a normalisation layer nothing restores the scale: the MMD with its median bandwidth does not change when all features
    shrink together, while its gradient with a detached bandwidth points inward and grows as 1 / scale (protocol sheet, A.6).
    A run has collapsed when it ends below `chance` percent accuracy.
    """
    from matplotlib import colormaps

    panels = runs.panels()
    points = pd.concat([steps(runs, name, jobs) for name, jobs in panels.items()], ignore_index=True)
    weights = sorted(points["weight"].unique())
    colors = dict(zip(weights, colormaps["viridis"](pd.Series(range(len(weights))) / max(1, len(weights) - 1) * 0.9), strict=True))

    picture, axes = canvas(2, len(panels), width=max(3.7, 2.0 * len(panels)), height=2.3, sharex=True, sharey="row")
    for column, panel in enumerate(panels):
        for row, (metric, text) in enumerate(METRICS.items()):
            axis = axes[row][column]
            for (weight, _), line in points[(points["panel"] == panel) & (points["metric"] == metric)].groupby(["weight", "seed"]):
                look = {"color": colors[weight], "linewidth": 1.2, "marker": "o" if len(line) == 1 else None, "markersize": 3}
                axis.plot(line["step"], line["value"], label=f"λ = {weight:g}", **look)
            axis.set(title=panel if row == 0 else None, ylabel=text if column == 0 else None, xlabel="step" if row else None)
        axes[1][column].set_ylim(0, 100)
        axes[1][column].axhline(chance, color="0.5", linewidth=0.8, linestyle=":", label=f"collapsed below {chance:g} %")
    axes[0][0].set_yscale("symlog", linthresh=1e-4)  # shared by the row; units that are all dead give exactly 0
    axes[0][0].set_ylim(bottom=-2e-5)
    handles = {text: handle for line in axes for axis in line for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    order = [*(f"λ = {weight:g}" for weight in weights), f"collapsed below {chance:g} %"]
    picture.legend([handles[text] for text in order], order, loc="outside lower center", ncols=len(order), fontsize=7)
    return Drawing(picture, points, lines(points, chance))


def steps(runs: Runs, panel: str, jobs: pd.DataFrame) -> pd.DataFrame:
    """panel, weight, seed, step, epoch, metric, value: every evaluation of every run."""
    parts = []
    for job in jobs.drop_duplicates("id").itertuples():
        if job.id in runs.done:
            rows = pd.DataFrame(runs.done[job.id].metrics())
            parts.append(rows.assign(panel=panel, weight=float(job.choice or 0), seed=job.seed))
    keys = ["panel", "weight", "seed", "step", "epoch"]
    return pd.concat(parts).melt(keys, list(METRICS), "metric") if parts else pd.DataFrame(columns=[*keys, "metric", "value"])


def lines(points: pd.DataFrame, chance: float) -> list[str]:
    """How many runs of each column end at chance, by λ."""
    ends = points[points["metric"] == "test/accuracy"].groupby(["panel", "weight", "seed"], sort=False).tail(1)
    found = []
    for panel, group in ends.groupby("panel", sort=False):
        low = (group["value"] < chance).groupby(group["weight"])
        each = ", ".join(f"{one.sum()} of {len(one)} at λ = {weight:g}" for weight, one in low)
        found.append(f"{panel}: below {chance:g} % accuracy at the end: {each}")
    return found
