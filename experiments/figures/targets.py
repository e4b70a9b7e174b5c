"""The largest training targets of LaMix, averaged over the whole training (LaMix, figure 2)."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from experiments.config import ConfigError
from experiments.figure import Drawing, Runs, canvas, label

KINDS = ("mixed", "clean", "all")


def draw(runs: Runs, second: Mapping[str, float] | None = None) -> Drawing:
    """For each panel the means over the steps of averaged pairs of the five largest entries of the target, mean ± 1 s.d. over seeds.

    Logged by the method: every step's rows in descending order, the mean over the batch. second: the paper's second bars, by panel.
    """
    panels = runs.panels()
    parts = []
    for panel, jobs in panels.items():
        for job in jobs.drop_duplicates("id").itertuples():
            if job.id in runs.done:
                known = {"panel": panel, "row": job.row, "choice": job.choice, "seed": job.seed, "source": "computed here"}
                parts.append(tops(runs.done[job.id].metrics()).assign(**known))
    points = pd.concat([part for part in parts if len(part)] or parts, ignore_index=True)
    if points.empty:
        raise ConfigError("figure.runs: no run has targets of method lamix")

    picture, axes = canvas(1, len(panels), width=max(3.7, 2.6 * len(panels)), height=2.7, sharey=True)
    texts = []
    for axis, panel in zip(axes[0], panels, strict=True):
        for place, ((row, choice), mine) in enumerate(points[points["panel"] == panel].groupby(["row", "choice"], sort=False)):
            name = f"{panel + ': ' if len(panels) > 1 else ''}{label(row, choice)}"
            for kind in KINDS:
                bars = mine[mine["kind"] == kind].groupby("place")["value"].agg(["mean", "std"])
                if kind == "mixed":
                    axis.bar(bars.index + 0.4 * place, bars["mean"], 0.4, yerr=bars["std"].fillna(0), capsize=2, label=label(row, choice))
                spread = ["" if one != one else f" ± {one:.3f}" for one in bars["std"]]
                texts.append(f"{name}, {kind}: {', '.join(f'{a:.3f}{b}' for a, b in zip(bars['mean'], spread, strict=True))}")
        if second and panel in second:
            axis.plot([2], [second[panel]], "s", color="C3", markerfacecolor="none", label="paper, second")
            texts.append(f"{panel}: the paper's second largest is {second[panel]:g}, its largest has lost half of the one-hot mass")
        axis.set(xlabel="rank of the target", title=panel if len(panels) > 1 else None, xticks=sorted(points["place"].unique()))
        axis.legend()
    axes[0][0].set_ylabel("mean target (no unit)")
    return Drawing(picture, points, [*texts, "mixed: steps of averaged pairs, as drawn; clean: of single images; all: both"])


def tops(rows: list[dict[str, float]]) -> pd.DataFrame:
    """kind, metric, place, value of a run's evaluations, each of which holds means over the steps since the one before."""
    found = pd.DataFrame(rows)
    if "train/lamix/mixed" not in found:
        return pd.DataFrame()
    found = found.dropna(subset="train/lamix/mixed")
    steps = found["step"].diff().fillna(found["step"])
    share = {"mixed": found["train/lamix/mixed"], "clean": 1 - found["train/lamix/mixed"]}
    lines = []
    for place in range(1, sum(str(key).startswith("train/lamix/target_mixed/") for key in found) + 1):
        sums = {kind: float((steps * found[f"train/lamix/target_{kind}/{place:02d}"]).sum()) for kind in share}
        counts = {kind: float((steps * part).sum()) for kind, part in share.items()}
        sums["all"], counts["all"] = sum(sums.values()), sum(counts.values())
        lines += [
            {
                "kind": kind,
                "metric": f"target {place}",
                "place": place,
                "value": sums[kind] / counts[kind] if counts[kind] else float("nan"),
            }
            for kind in KINDS
        ]
    return pd.DataFrame(lines)
