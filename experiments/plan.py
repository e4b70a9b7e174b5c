"""What a run or a table would cost, before it is started: from stored runs of the same kind, else from a few timed steps."""

from __future__ import annotations

import io
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from experiments import store
from experiments.compose import compose
from experiments.config import ConfigError, check, resolve
from experiments.cost import Estimate, remaining, stored
from experiments.index import kind
from experiments.launching.missing import find
from experiments.length import Length
from experiments.pick import due
from experiments.published import counted
from experiments.spec import Table
from experiments.train import make_trainer

if TYPE_CHECKING:
    from experiments.trainer import Trainer

LEAST_STEPS, MOST_STEPS, ENOUGH_SECONDS = 2, 20, 3.0  # how many steps are timed: between the first two, enough for so many seconds


class Timing(NamedTuple):
    """Seconds of a step, of evaluating one label, and of a checkpoint."""

    step: float
    label: float
    checkpoint: float


def measure(cfg: DictConfig, timed: dict[str, Timing] | None = None) -> Estimate:
    """Times a few steps, one batch of the evaluation and a checkpoint of this run; nothing is kept.

    Without its data, embedded digits or text of its shape stand in for as many images or words as the official data set has. Raises
    ConfigError when something else is wrong, or that number is not known.
    timed: what was measured so far: runs on images of one shape cost the same, whatever they show.
    """
    try:
        trainer, sizes, source = make_trainer(cfg), {}, "timed steps"
    except ConfigError as error:
        known, source = resolve(cfg.dataset, "dataset"), f"timed steps on stand-in data: {error}"
        if not getattr(known, "sizes", None):
            raise
        limits = {"train": cfg.profile.train, "test": cfg.profile.test}
        few = {split: min(count or known.few, known.few) for split, count in limits.items()}  # type: ignore[attr-defined]
        trainer = make_trainer(OmegaConf.merge(cfg, {"dataset": {"source": "embedded"}, "profile": few}))  # type: ignore[arg-type]
        sizes = {split: limits.get(split, limits["test"]) or size for split, size in known.sizes.items()}  # type: ignore[attr-defined]
    bundle, steps = trainer.bundle, trainer.steps_per_epoch
    if sizes:
        held_out = round(sizes["train"] * cfg.dataset.get("valid", 0))
        sizes |= {"train": sizes["train"] - held_out} | ({"valid": held_out} if held_out else {})
        steps = Length(cfg, trainer.repeats * bundle.steps(sizes["train"], cfg.batch_size, cfg.drop_last)).steps_per_epoch
    read = sum(sizes.get(split, len(y)) for split, (_, y) in bundle.splits.items() if split != "train")

    shape = [*bundle.splits["train"][0].shape[1:], bundle.augment is not None]
    like, timed = kind(cfg, shape if bundle.unit == "images" else None), {} if timed is None else timed
    if like not in timed:
        timed[like] = _timing(trainer)
    step, label, checkpoint = timed[like]
    dense = len(trainer.evaluations) - trainer.epochs
    if trainer.probe is not None:  # it may train for minutes
        source += "; what the probe takes is not counted"
    evaluation = label * read
    return Estimate(steps * step + evaluation + checkpoint / cfg.runtime.checkpoint_every, steps, dense * evaluation, source)


def _timing(trainer: Trainer) -> Timing:
    import torch  # not earlier: a plan whose runs are all stored does without

    times: list[float] = []
    for samples in trainer.endless():
        times.append(_seconds(trainer, lambda chosen=samples: trainer.take_step(*chosen)))  # type: ignore[misc]
        if len(times) >= LEAST_STEPS and (sum(times) > ENOUGH_SECONDS or len(times) == MOST_STEPS):
            break
    batch = next(iter(trainer.bundle.batches("test", trainer.cfg.evaluate.batch_size)))
    # Of steps the first ones, and of a quick evaluation the first, pay for what later ones find ready.
    for _ in range(2):
        evaluation = _seconds(trainer, lambda: trainer.measure([batch]))
        if evaluation > ENOUGH_SECONDS:
            break
    checkpoint = _seconds(trainer, lambda: torch.save(trainer.state(), io.BytesIO()))
    return Timing(statistics.median(times[len(times) // 2 :]), evaluation / batch.y.numel(), checkpoint)


def _seconds(trainer: Trainer, work: Callable[[], object]) -> float:
    trainer.synchronise()
    start = time.perf_counter()
    work()
    trainer.synchronise()
    return time.perf_counter() - start


@dataclass
class Known:
    """What plans of several tables share: estimates of each kind of run, and what was timed for them."""

    estimates: dict[str, Estimate]
    timed: dict[str, Timing] = field(default_factory=dict)
    timing: bool = True  # false: kinds without an estimate are not timed, and their hours are not known


class Costs(NamedTuple):
    """rows: one line per row of the table: runs, shared (that an earlier row has too), the counts of states, hours (nan: not known).
    ids: of all runs. hours: of each that is not finished. sources: what the hours are estimated from, and whether that failed.
    guessed: rows whose λ is not picked yet, for which its first value stands in."""

    rows: pd.DataFrame
    ids: set[str]
    hours: dict[str, float]
    sources: dict[str, bool]
    guessed: list[str]


def shown(hours: float) -> str:
    return "?" if math.isnan(hours) else f"{hours:.2f}"


def costs(table: Table, asked: pd.DataFrame, found: dict[str, store.Run], known: Known) -> Costs:
    """Of a row with `select` its trials count, and the runs of what they pick; those of its first choice while that is not known."""
    sure, _ = due(table, asked, found)
    wanted = pd.concat(due(table, asked, found, guess=True)[::-1])  # trials first, as they are trained
    guessed = wanted[~wanted["trial"] & ~wanted.index.isin(sure.index)]
    states = {identity: run.state for identity, run in found.items()}
    lines, sources = [], {}
    counted: set[str] = set()
    hours: dict[str, float] = {}
    for row in table.rows:
        mine = wanted[wanted["row"] == row.label].drop_duplicates("id")
        mine = mine.assign(state=[states.get(identity, "missing") for identity in mine["id"]], shared=mine["id"].isin(counted))
        counted |= set(mine["id"])
        left = mine[~mine["shared"] & ~mine["state"].isin(["done", "diverged"])]
        for job in left.to_dict("records"):
            one = compose(job["overrides"])
            if (key := kind(one)) not in known.estimates and not known.timing:
                known.estimates[key] = Estimate(math.nan, math.nan, 0, "no stored run of its kind")
            if key not in known.estimates:
                check(one)  # which imports what a plan of known runs does without
                print(f"timing a few steps of {row.label}, {job['column']} ...", file=sys.stderr, flush=True)
                try:
                    known.estimates[key] = measure(one, known.timed)
                except ConfigError as error:
                    known.estimates[key] = Estimate(math.nan, math.nan, 0, str(error))
            cost = known.estimates[key]
            sources[cost.source] = math.isnan(cost.epoch)
            hours[job["id"]] = remaining(one, found.get(job["id"]), known.estimates) / 3600
        count = mine["state"].value_counts()
        line = {"": row.label, "runs": len(mine), "shared": int(mine["shared"].sum())}
        line |= {state: int(count.get(state, 0)) for state in ("done", "running", "resumable", "failed", "diverged", "missing")}
        lines.append(line | {"hours": sum(hours[identity] for identity in left["id"])})
    return Costs(pd.DataFrame(lines), counted, hours, sources, list(guessed["row"].unique()))


def plan(table: Table, asked: pd.DataFrame, cfg: DictConfig) -> str:
    """For each row: its runs, what state they are in, and the hours that are missing, as Markdown."""
    found = find(asked, cfg.runtime.runs, counted(cfg))
    rows, ids, _, sources, guessed = costs(table, asked, found, Known(stored(Path(cfg.runtime.runs))))
    unknown = [source for source, missing in sources.items() if missing]
    basis = [source for source, missing in sources.items() if not missing]
    notes = [
        f"{len(ids)} different runs, {'at least ' if unknown else ''}{rows['hours'].sum():.2f} hours one after another"
        + (f"; estimated from {'; '.join(basis)}" if basis else ""),
        *(f"unknown: {source}" for source in unknown),
        "shared: runs that an earlier row has too",
        *([f"λ is not picked yet, its first value stands in: {', '.join(guessed)}"] if guessed else []),
    ]
    text = rows.assign(hours=rows["hours"].map(shown)).to_markdown(index=False, disable_numparse=True)
    return "\n".join([f"## {table.title}: the plan", "", text, "", *(f"- {note}" for note in notes)])
