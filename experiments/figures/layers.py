"""What runs with `probe=activations` log of some layers, and how claims about it are put: for quantiles, sliced and strength."""

from __future__ import annotations

import re
from collections.abc import Iterable

import pandas as pd

from experiments.config import ConfigError
from experiments.figure import Runs, label
from experiments.pick import Jobs, chosen

PER, PLAIN, BN = "PER", "vanilla", "BN"  # rows that claims are about
UNTRAINED = f"at epoch 0 {BN} has its running statistics still to gather, so it does not normalise yet in evaluation mode"
KEYS = ["row", "choice", "seed"]


def shown(runs: Runs) -> Jobs:
    """One job for each row, choice and seed; of a row with a pick its picked choice. Raises ConfigError if columns differ in their runs."""
    panels = list(runs.panels().values())
    if len(panels) > 1:
        raise ConfigError(f"figure.runs.columns: {', '.join(runs.panels())} hold different runs, and this figure has room for one set")
    picks = {
        row.label: chosen(row, panels[0][panels[0]["row"] == row.label], runs.done, runs.table.at) for row in runs.table.rows if row.pick
    }
    return panels[0][[picks.get(job.row, job.choice) == job.choice for job in panels[0].itertuples()]]


def logged(runs: Runs, names: Iterable[str]) -> pd.DataFrame:
    """The finished runs' metrics `layer{layer}/{name}`, before training and at each epoch's end, in long form.

    method, row, choice, seed, step, epoch, layer, name, metric, value.
    """
    wanted = "|".join(map(re.escape, names))
    parts = []
    for job in shown(runs).itertuples():
        if job.id in runs.done:
            rows = pd.DataFrame(runs.done[job.id].metrics())
            found = {key: match for key in map(str, rows) if (match := re.fullmatch(rf"layer(\d+)/({wanted})", key))}
            if not found:
                raise ConfigError(f"figure.runs: {runs.done[job.id].path} has no {wanted} of any layer; its base needs probe=activations")
            long = rows.melt(["step", "epoch"], list(found), "metric").dropna(subset="value")
            long = long.assign(layer=long["metric"].map({key: int(match[1]) for key, match in found.items()}))
            long = long.assign(name=long["metric"].map({key: match[2] for key, match in found.items()}))
            known = {"method": label(job.row, job.choice), "row": job.row, "choice": job.choice, "seed": job.seed}
            parts.append(long.sort_values(["layer", "name", "step"]).assign(**known))
    if not parts:
        raise ConfigError("figure.runs: no run that is to be shown is done yet")
    return pd.concat(parts, ignore_index=True)[["method", *KEYS, "step", "epoch", "layer", "name", "metric", "value"]]


def images(runs: Runs) -> int:
    """Over how many training images the runs measured."""
    counts = set()
    for job in shown(runs).itertuples():
        if job.id in runs.done:
            one = runs.done[job.id]
            probe, result = one.config().probe, one.result() or {}
            counts.add(min(probe.images, result["samples"]["train"]))
    if len(counts) > 1:
        raise ConfigError(
            f"figure.runs: the runs measured over {sorted(counts)} images, and distances over different counts do not compare"
        )
    return counts.pop()


def part(values: pd.Series, last: bool = False) -> float:
    """The mean of the first (or last) tenth of a series over the epochs, one epoch at least."""
    few = max(1, len(values) // 10)
    return float((values.tail(few) if last else values.head(few)).mean())


def verdicts(says: str, holds: dict[int, dict[int, bool]]) -> str:
    """holds: seed -> layer -> whether what is said holds there. It is seen in a seed if it holds in every layer."""
    texts = []
    for seed, layers in holds.items():
        where = ", ".join(str(layer) for layer, each in layers.items() if each)
        text = "seen" if all(layers.values()) else "not seen"
        texts.append(f"{text} in seed {seed}" + (f" (only in layer {where})" if where and text == "not seen" else ""))
    return f"{says}: {'; '.join(texts) or 'not run'}"
