"""Test accuracy and the EM distance by which each epoch moves the layers' outputs (Unitization, figure S1)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from omegaconf import DictConfig

from experiments import store
from experiments.config import ConfigError
from experiments.figure import Drawing, Runs, canvas, label
from experiments.figures.trained import remade

if TYPE_CHECKING:
    from experiments.trainer import Row

ACCURACY, EM, LOGIT = "test/accuracy", "shift/em", "shift/em_logit"
AROUND = 5  # epochs on each side of a drop of the learning rate, over which the protocol sheet compares (B.3)


def draw(runs: Runs) -> Drawing:
    """From runs with `probe=covariate_shift`: a panel for each set of columns."""
    rows = {identity: one.metrics() for identity, one in runs.done.items()}
    probes = [one.config().probe for one in runs.done.values()]
    return picture(runs, rows, "run", sorted({critics(one.steps, one.batch, one.images) for one in probes if one and "steps" in one}))


def kept(runs: Runs, steps: int, batch: int, layers: Sequence[int] | None = None, images: int | None = None) -> Drawing:
    """The same for any runs that kept two states of their network (`runtime.keep_weights`): between each and the next, computed here.

    layers, steps, batch, images: see `experiments.covariate_shift.CovariateShift`; layers are points before a non-linearity.
    """
    from tqdm import tqdm

    rows = {}
    for identity, one in runs.done.items():
        known = {math.ceil(row["epoch"]): row for row in one.metrics()}  # the last of each epoch, which may be a part of one
        states = sorted(one.path.glob("weights-*.pt"))
        if len(states) < 2:
            raise ConfigError(f"figure.runs: {one.path} kept {len(states)} states of its network, and two are needed; a run keeps them "
                              "with runtime.keep_weights=1, so remove its folder and ask again")  # fmt: skip
        probe = {"layers": None if layers is None else [*layers], "steps": steps, "batch": batch, "images": images}
        found = measured(one, states, runs.runtime, {"_target_": "experiments.covariate_shift.CovariateShift"} | probe)
        rows[identity] = [known[epoch] | row for epoch, row in tqdm(found, one.path.name, len(states) - 1, leave=False, disable=None)]
    return picture(runs, rows, "computed here", [critics(steps, batch, images)])


def measured(run: store.Run, states: Sequence[Path], runtime: DictConfig, probe: dict[str, Any]) -> Iterator[tuple[int, Row]]:
    """The epoch of each kept state but the first, and what it has moved since the one before, as the probe finds it."""
    import torch

    trainer = remade(run, runtime, probe=probe)
    assert trainer.probe is not None
    for place, path in enumerate(states):
        trainer.net.load_state_dict(torch.load(path, map_location=trainer.device, weights_only=True))
        if place:
            yield int(path.stem.partition("-")[2]), trainer.probe.end(trainer)
        trainer.probe.begin(trainer)


def critics(steps: int, batch: int, images: int | None) -> str:
    some = "all" if images is None else f"at most {images:,}"
    return f"d: by critics trained for {steps} steps of {batch} images, of {some} training images"


def picture(runs: Runs, rows: dict[str, list[Row]], source: str, facts: list[str]) -> Drawing:
    """rows: of each run, one for each epoch at least; source, facts: who computed d, and how. Of each layer it is drawn thin."""
    from matplotlib.ticker import MaxNLocator

    panels = runs.panels()
    picture, axes = canvas(1, len(panels), width=max(5.0, 3.75 * len(panels)), height=3.4)
    parts, texts = [], []
    handles: dict[str, Any] = {}
    for axis, (panel, jobs) in zip(axes[0], panels.items(), strict=True):
        right = axis.twinx()
        for place, job in enumerate(jobs.drop_duplicates("id").itertuples()):
            if job.id not in rows:
                continue
            name = f"{label(job.row, job.choice)}, seed {job.seed}"
            known = pd.DataFrame([row for row in rows[job.id] if EM in row])
            if known.empty:
                raise ConfigError(f"figure.runs: {runs.done[job.id].path} has no {EM}; its base needs probe=covariate_shift")
            look: dict[str, Any] = {"marker": "o" if len(known) == 1 else None, "markersize": 3, "color": f"C{place}"}
            (handles[f"accuracy, {name}"],) = axis.plot(known["epoch"], known[ACCURACY], "--", linewidth=1.2, **look)
            (handles[f"mean d, {name}"],) = right.plot(known["epoch"], known[EM], linewidth=1.6, **look)
            for layer in (key for key in known if str(key).startswith("layer") and str(key).endswith("/em")):
                (handles["d of each layer"],) = right.plot(known["epoch"], known[layer], linewidth=0.4, alpha=0.6, color=f"C{place}")
            for epoch in drops(known):
                axis.axvline(epoch, color="0.6", linewidth=0.7, linestyle=":")
            metrics = [key for key in known if key in (ACCURACY, EM, LOGIT) or str(key).startswith("layer")]
            long = known.melt(["epoch", "lr"], metrics, "metric")
            parts.append(long.assign(panel=panel, row=job.row, choice=job.choice, seed=job.seed, source=source))
            texts += [f"{panel + ': ' if len(panels) > 1 else ''}{name}: {line}" for line in around(known)]
        axis.set(xlabel="epoch", title=panel if len(panels) > 1 else None, ylabel="test accuracy [%]" if axis is axes[0][0] else None)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        right.set_yscale("symlog", linthresh=1e-3)  # small as it is after a drop, it still falls; it can be below 0
        right.set_ylim(bottom=min(0, right.dataLim.y0))
        right.set_ylabel("estimated EM distance d (no unit)" if axis is axes[0][-1] else "")
        right.grid(False)
    picture.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=2, fontsize=7)
    return Drawing(picture, pd.concat(parts, ignore_index=True), [*texts, *facts])


def drops(known: pd.DataFrame) -> list[float]:
    """The first epochs with a lower learning rate than the one before."""
    return [float(epoch) for epoch in known["epoch"][known["lr"] < known["lr"].shift()]]


def around(known: pd.DataFrame) -> list[str]:
    """Accuracy and mean d on both sides of each drop of the learning rate, and whether they move as the paper says."""
    found = drops(known)
    texts, up, down = [], 0, 0
    for epoch in found:
        near = min([AROUND, *(abs(epoch - other) for other in found if other != epoch), epoch - known["epoch"].min()])
        before, after = (known[(known["epoch"] >= start) & (known["epoch"] < start + near)] for start in (epoch - near, epoch))
        gains = [(before[key].mean(), after[key].mean()) for key in (ACCURACY, EM, LOGIT)]
        up, down = up + (gains[0][0] < gains[0][1]), down + (gains[1][1] < gains[1][0])
        pairs = [
            f"{name} {pair[0]:.4g} -> {pair[1]:.4g}" for name, pair in zip(("accuracy", "mean d", "before the sigmoid"), gains, strict=True)
        ]
        texts.append(f"drop at epoch {epoch:g}, means of the {near:g} epochs before -> after: {', '.join(pairs)}")
    if not found:
        return [f"no drop of the learning rate; mean d {known[EM].iloc[0]:.3g} at first, {known[EM].iloc[-1]:.3g} at last"]
    return [*texts, f"at {len(found)} drops accuracy rises {up} times and d falls {down} times (paper: both each time, sharply)"]
