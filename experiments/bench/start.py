"""How long a start takes: processes from their beginning until --help is printed, and until the first training step is done."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from experiments.bench.configs import Asked
from experiments.bench.sides import Row, spread
from experiments.cli import RunFailed
from experiments.config import ConfigError

FIRST_STEP_DONE = 99
# python -m experiments.train, left for good when the loss of the first step has been read
FIRST_STEP = f"""
import os
from experiments import cli, train
make_trainer = train.make_trainer
def leaving(*arguments):
    trainer = make_trainer(*arguments)
    step = trainer.take_step
    trainer.take_step = lambda *samples: (step(*samples), float(next(iter(trainer.sums.values()))), os._exit({FIRST_STEP_DONE}))
    return trainer
train.make_trainer = leaving
cli.main(train.train, "config")
"""


def start_rows(asked: Asked) -> Iterator[Row]:
    """The one with a step has read data, built everything and opened its folder by then.

    Raises ConfigError or RunFailed, in the process's own words, if one of them does not get there.
    """
    (model,) = asked.models("net5c")
    times: dict[str, list[float]] = {}
    for _ in range(asked.rounds):
        with tempfile.TemporaryDirectory() as folder:
            commands = {
                "import torch": ["-c", "import torch"],
                "train --help": ["-m", "experiments.train", "--help"],
                "first training step": ["-c", FIRST_STEP, *asked.words(model), f"runtime.runs={folder}"],
            }
            for name, command in commands.items():
                began = time.perf_counter()
                done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
                times.setdefault(name, []).append(time.perf_counter() - began)
                if done.returncode != (FIRST_STEP_DONE if FIRST_STEP in command else 0):
                    message = (done.stderr.strip().splitlines() or ["the run ended without a step"])[-1].removeprefix("retable: ")
                    raise (ConfigError if done.returncode == 2 else RunFailed)(message)
    floor = times["import torch"]
    for name, good in {"train --help": "a <= 500", "first training step": "a <= 4000"}.items():
        ratios = [one / other for one, other in zip(times[name], floor, strict=True)]
        row: Row = {"id": "C10", "what": name, "over": "import torch"} | spread(ratios) | {"good": good}
        yield row | {f"ms {letter}": 1000 * statistics.median(each) for letter, each in (("a", times[name]), ("b", floor))}
