"""How two pieces of work are compared: they take turns, round by round, and a ratio is the median of the rounds'."""

from __future__ import annotations

import re
import statistics
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from tabulate import tabulate

from experiments.check import report
from experiments.compose import composed
from experiments.config import ConfigError, options
from experiments.graph import WARM_UP
from experiments.train import make_trainer
from experiments.trainer import Trainer

# Each network in its own paper's protocol, on images that come with the suite. The papers' learning rates are for 50,000 images.
COLOUR = "experiment=itdm_color dataset=cifar10 dataset.source=embedded batch_size=64 optim.lr=0.01"
PREACT = "experiment=unitization_resnet110 dataset.source=embedded optim.lr=0.01"
SETTINGS = {
    "net2c": "experiment=itdm_grey_j dataset=digits dataset.train=1500",
    "net5c": "experiment=itdm_grey_c dataset=digits dataset.train=1500",
    "cnn11": "experiment=per_cnn11 dataset.source=embedded batch_size=125",
    "lstm": "experiment=per_lstm dataset.source=embedded",  # with a decoder for Penn Treebank's 10,000 words
    "preact_resnet20": PREACT,
    "preact_resnet110": PREACT,
    "preact_resnet18": "experiment=lamix_random dataset.source=embedded batch_size=64 optim.lr=0.01",
}
# Rows of the methods besides those of conf/method: name -> overrides.
VARIANTS = {
    "per analytic": "method=per method.per.mode=analytic",
    "per toeplitz": "method=per method.per.directions=toeplitz",
    "bn": "norm=bn norm.eps=1e-3",
}

NOISY = 0.1  # interquartile range over median: a ratio beyond it is not fit to be published
SECONDS = 0.5  # of a side in a round
COLUMNS = ("id", "what", "over", "ratio", "q1", "q3", "good", "met", "ms a", "ms b", "note")
MEANING = """ratio: the time of `what` (a) divided by the time of `over` (b). Where the note has rates: a's rate divided by b's. It is the
median of the rounds' ratios; q1 and q3 are their quartiles. noisy: these lie more than a tenth of the median apart. good: the target
for the ratio (with a: for a's ms), or the better direction. Targets are for two CPU cores."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """common: overrides of all rows; those of a method (`method.per.slices=8`) hold for its rows. methods: which have rows.

    rounds: paired rounds of a row. steps: steps of a side in a round; None: as many as take half a second, at least one.
    """

    common: Sequence[str] = ()
    methods: Sequence[str] = tuple(options("method"))
    rounds: int = 7
    steps: int | None = None

    def given(self, name: str) -> str | None:
        """The value of an override of all rows, if there is one."""
        return next((word.partition("=")[2] for word in reversed(self.common) if key(word) == name), None)

    def models(self, *usual: str) -> list[str]:
        """The model that the command line names, else the usual ones."""
        return [given] if (given := self.given("model")) else [*usual]

    def words(self, model: str, *more: str) -> list[str]:
        """The overrides of a side: a setting that fits the model, what the command line says instead, and the side's own."""
        methods = [word.partition("=")[2] for word in more if key(word) == "method"]
        common = [word for word in self.common if not word.startswith("method.") or word.split(".")[1] in methods]
        usual = [] if self.given("experiment") else SETTINGS.get(model, COLOUR).split()
        usual = [word for word in usual if not (word.startswith("dataset") and self.given("dataset"))]
        words = {key(word): word for word in (*usual, f"model={model}", "drop_last=true", *common, *more)}  # steps of the same size
        if "norm" in map(key, more):  # options given for another norm would not fit the side's
            words = {name: word for name, word in words.items() if not name.startswith("norm.") or word in more}
        # An option that a data set's file in conf/ does not list, such as dataset.train, is taken all the same; an unknown one is not.
        return ["++" * name.startswith("dataset.") + word for name, word in words.items()]

    def cfg(self, model: str, *more: str) -> DictConfig:
        """The side's config. Raises ConfigError or Hydra's errors for overrides that cannot be composed."""
        return composed(self.words(model, *more))

    def method(self, model: str, name: str) -> DictConfig:
        """The config of a method's rows, or of a variant's."""
        return self.cfg(model, *VARIANTS.get(name, f"method={name}").split())


def key(override: str) -> str:
    return override.partition("=")[0]


def split(overrides: Iterable[str]) -> tuple[list[str], list[str]]:
    """The methods that `method=[NAME,...]` asks for, else all, and the other overrides. Raises ConfigError for an unknown one."""
    known, common = options("method"), [word for word in overrides if key(word) != "method"]
    asked = [re.split(r"\s*,\s*", word.partition("=")[2].strip("[ ]")) for word in overrides if key(word) == "method"]
    named = [key(word).split(".")[1] for word in common if word.startswith("method.")]
    chosen = [name for name in asked[-1] if name] if asked else known
    if unknown := [name for name in (*chosen, *named) if name not in known]:
        raise ConfigError(f"method: {unknown[0]} is not known; allowed: {', '.join(known)}")
    return chosen, common


@dataclass
class Side:
    """One of two things that are compared.

    step: the work that is timed: a training step, an epoch, a process.
    tf32: the global setting that it needs. warm: calls before the first that is timed. close: ends its processes.
    """

    step: Callable[[], object]
    device: torch.device
    tf32: bool = False
    warm: int = 1
    close: Callable[[], object] = lambda: None

    def seconds(self, steps: int) -> float:
        """Per step, until nothing is left to do on the device."""
        torch.backends.cudnn.allow_tf32 = self.tf32  # the other side may want it otherwise
        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda device: None
        wait(self.device)
        began = time.perf_counter()
        for _ in range(steps):
            self.step()
        wait(self.device)
        return (time.perf_counter() - began) / steps


def suite(cfg: DictConfig, change: Callable[[Trainer], object] = lambda trainer: None) -> Side:
    """The suite's training step: the epoch's order, the batch, the trainer's step; after a change of the trainer."""
    trainer = make_trainer(cfg)
    change(trainer)
    endless = trainer.endless()
    # the recordings, one for each branch of a step, and a first replay
    warm = (10 if cfg.method else 1) * (WARM_UP + 2) if cfg.step == "graph" else 1
    return Side(lambda: trainer.take_step(*next(endless)), trainer.device, cfg.precision == "tf32", warm)


def compare(
    row_id: str, what: str, over: str, good: str, sides: tuple[Side, Side], asked: Asked, work: Sequence[float] = (), unit: str = ""
) -> Row:
    """A row of the table: the time of a step of the first side over the second's.

    work: what a step of each side does, in this unit; then the row compares rates, the first side's over the second's.
    """
    times: tuple[list[float], list[float]] = ([], [])
    try:
        steps = [pace(side, asked.steps) for side in sides]
        for turn in range(asked.rounds):  # each side begins every other round, so that a drift of the machine does not favour one
            for i in (0, 1) if turn % 2 else (1, 0):
                times[i].append(sides[i].seconds(steps[i]))
    finally:
        for side in sides:
            side.close()
    ratios = [a / b if not work else (work[0] / a) / (work[1] / b) for a, b in zip(*times, strict=True)]
    q1, ratio, q3 = statistics.quantiles(ratios, n=4, method="inclusive")
    medians = [statistics.median(side) for side in times]
    notes = ["noisy"] if q3 - q1 > NOISY * ratio else []
    notes += [" / ".join(f"{done / seconds:,.1f}" for done, seconds in zip(work, medians, strict=True)) + f" {unit}/s"] if work else []
    row = {"id": row_id, "what": what, "over": over, "ratio": ratio, "q1": q1, "q3": q3, "good": good}
    row |= {"ms a": 1000 * medians[0], "ms b": 1000 * medians[1], "note": ", ".join(notes)}
    return row | {"met": met(row)}


def pace(side: Side, steps: int | None) -> int:
    """Warm the side up. Returns its steps in a round: as asked, or as many as take half a second, at least one."""
    first = side.seconds(side.warm)  # allocates the optimizer's state, picks kernels, starts workers
    if steps or first > 10 * SECONDS:  # clear without another try
        return steps or 1
    return min(1000, max(1, round(SECONDS / side.seconds(1))))


def met(row: Row) -> str:
    """Whether the row's target is met: "yes", "NO", or nothing where `good` is a direction."""
    target = re.fullmatch(r"(a )?([<>])= ([\d.]+)", row["good"])
    if target is None:
        return ""
    value, bound = row["ms a" if target[1] else "ratio"], float(target[3])
    return "yes" if (value <= bound if target[2] == "<" else value >= bound) else "NO"


def table(rows: Sequence[Row], about: dict[str, Any]) -> str:
    """The rows as text, how many targets they meet, and what the columns and the machine are."""
    digits = [".1f" if column.startswith("ms") else ".3f" for column in COLUMNS]
    judged = [row["met"] for row in rows if row["met"]]
    said = f"{judged.count('yes')} of {len(judged)} targets met, {sum(row['note'].startswith('noisy') for row in rows)} rows noisy"
    where = textwrap.fill(", ".join(f"{name} {value}" for name, value in about.items()), 130, break_on_hyphens=False)
    return "\n".join([tabulate([[row[column] for column in COLUMNS] for row in rows], COLUMNS, floatfmt=digits), "", said, MEANING, where])


def machine(cfg: DictConfig) -> dict[str, Any]:
    """What a ratio depends on besides the config: the computer, in words and numbers; and the commit."""
    about = report.machine(str(make_trainer(cfg).device))  # a trainer sets the number of threads
    return {"device": about.pop("device"), "threads": torch.get_num_threads(), **about}
