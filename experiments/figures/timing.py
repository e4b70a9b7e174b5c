"""What a training step costs with each method: its time over a step's without, and extra parameters (PER, section 4.3.1)."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
from matplotlib.figure import Figure as Picture
from omegaconf import DictConfig

from experiments.bench.measure import Asked, compare, machine, split, suite
from experiments.figure import Drawing, canvas
from experiments.launching.devices import device
from experiments.train import make_trainer


def draw(overrides: list[str], rows: dict[str, dict[str, Any]], model: str, gpu_batch: int, cpu_batch: int, rounds: int) -> Drawing:
    """A bar for each of `rows`: row of the bench -> label, and what the paper prints: seconds of a step, parameters.

    The bench's way: the two sides of a ratio take turns, round by round. The vanilla step is timed against another of its kind, which
    shows what chance alone does. A profile that limits an epoch's steps limits the rounds to as many, of one step each, and the batch
    to a tenth of its images.
    """
    methods, common = split(overrides)
    cfg = Asked(common).cfg(model)
    batch, steps = gpu_batch if on_gpu(cfg) else cpu_batch, None
    if cfg.profile.steps is not None:
        batch, rounds, steps = max(4, (cfg.profile.train or 10 * batch) // 10), max(2, min(rounds, cfg.profile.steps)), 1
    asked = Asked([f"batch_size={batch}", *common], methods, rounds, steps)
    plain = asked.cfg(model)
    found = []
    for name, row in rows.items():
        cfg = asked.method(model, name)
        if name == "vanilla" or {*(cfg.method or {"vanilla": None})} <= {*methods}:
            timed = compare("", name, "vanilla", "", (suite(cfg), suite(plain)), asked)
            printed = {"paper_seconds": row.get("seconds", math.nan), "paper_parameters": row.get("parameters", "")}
            ours = {"ratio": timed["ratio"], "q1": timed["q1"], "q3": timed["q3"], "ms": timed["ms a"], "vanilla_ms": timed["ms b"]}
            extra = parameters(cfg) - parameters(plain)
            found.append({"method": name, "label": row["label"]} | ours | {"note": timed["note"], "parameters": extra} | printed)
    numbers = pd.DataFrame(found)
    numbers["paper_ratio"] = numbers["paper_seconds"] / rows["vanilla"]["seconds"]
    about = {"model": model, "batch_size": plain.batch_size, "precision": plain.precision, "step": plain.step, "rounds": rounds}
    about |= machine(plain)
    kind = "GPU" if on_gpu(plain) else "CPU"
    setting = f"batch {plain.batch_size} on a {kind}, {plain.precision}, {plain.step}, median of {rounds} paired rounds"
    return Drawing(picture(numbers, setting), numbers.assign(**about), lines(numbers, about, setting), table(numbers))


def on_gpu(cfg: DictConfig) -> bool:
    return device(cfg.runtime) != "cpu"


def parameters(cfg: DictConfig) -> int:
    """How many numbers are trained: the network's and the methods'."""
    return sum(p.numel() for group in make_trainer(cfg).optimizer.param_groups for p in group["params"])


def picture(numbers: pd.DataFrame, setting: str) -> Picture:
    """Bars with whiskers between the quartiles; the paper's ratios as marks."""
    whole, ((axis,),) = canvas(1, 1, height=1 + 0.32 * len(numbers))
    places = range(len(numbers))
    whiskers = [numbers["ratio"] - numbers["q1"], numbers["q3"] - numbers["ratio"]]
    axis.barh(places, numbers["ratio"], xerr=whiskers, height=0.6, color="C0", alpha=0.8, capsize=3, label="ours, median and quartiles")
    axis.plot(numbers["paper_ratio"], places, "D", color="C3", markersize=5, linestyle="", label="paper, one TITAN X")
    ends = numbers[["q3", "paper_ratio"]].max(axis=1)  # behind whisker and mark
    for place, ratio, high in zip(places, numbers["ratio"], ends, strict=True):
        axis.annotate(f"{ratio:.2f}", (high, place), (4, 0), textcoords="offset points", va="center", fontsize=7)
    axis.axvline(1, color="0.4", linewidth=0.8)
    axis.set(xlabel=f"time of a training step over the vanilla one's: {setting}", yticks=[*places], yticklabels=numbers["label"])
    axis.margins(x=0.08)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.legend()
    return whole


def table(numbers: pd.DataFrame) -> str:
    """In Markdown: ours beside the paper's."""
    columns = {
        "method": numbers["label"],
        "ratio": numbers["ratio"].map("{:.3f}".format),
        "quartiles": numbers["q1"].map("{:.3f}".format) + " to " + numbers["q3"].map("{:.3f}".format),
        "paper": numbers["paper_ratio"].map(lambda ratio: "" if math.isnan(ratio) else f"{ratio:.2f}"),
        "ms": numbers["ms"].map("{:.1f}".format),
        "vanilla ms": numbers["vanilla_ms"].map("{:.1f}".format),
        "extra parameters": numbers["parameters"].map("{:,}".format),
        "paper's": numbers["paper_parameters"],
        "": numbers["note"],
    }
    return pd.DataFrame(columns).to_markdown(index=False, disable_numparse=True)


def lines(numbers: pd.DataFrame, about: dict[str, Any], setting: str) -> list[str]:
    printed = numbers.dropna(subset="paper_seconds")
    seconds = ", ".join(f"{one.label} {one.paper_seconds:.3f}" for one in printed.itertuples())
    said = ("device", "threads", "cores", "load", "torch", "commit", "dirty")
    return [
        f"ratio: time of a step over a vanilla one's, {setting}; noisy: quartiles far apart",
        f"paper: the ratio of its seconds per iteration ({seconds}; batch 250 on one TITAN X)",
        "extra parameters: the paper's 2.5K of BN are its 2,544 channels, each of which has a scale and a shift",
        ", ".join(f"{key} {about[key]}" for key in said),
    ]
