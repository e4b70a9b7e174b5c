"""What a step and a start of the suite cost, as ratios measured side by side.   python -m experiments.bench --help"""

from __future__ import annotations

import csv
import io
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from experiments import store
from experiments.cli import BAD_INPUT, CONF, RunFailed, one_line, stop
from experiments.config import ConfigError, check, options

if TYPE_CHECKING:  # torch is imported when something is measured: --help does without
    from experiments.sides import Side

USAGE = """python -m experiments.bench step|start [rounds=N] [steps=N] [csv=FILE] [OVERRIDE...]

step   a training step against a plain PyTorch loop, each method against vanilla, bf16 (tf32) against fp32, the MMD against
       a loop over classes; dispatcher calls and host reads per step. The sides of a row take turns in one process
start  seconds until --help is printed and until the first training step is done, each in a process of its own
rounds=9   paired rounds of a row, at least 7; for start: 3, how often each command is run
steps=N    steps of a side in a round; without it as many as take a quarter of a second, at least 3
csv=FILE   where the table goes too: runs/bench-step.csv, runs/bench-start.csv

The overrides are those of experiments.train; unless they choose otherwise, experiment=itdm_grey_c on 1,500 digits.
method=[NAME,...] leaves out the other methods; method.NAME.KEY=VALUE goes to that method's row alone."""
NOISY = 0.1  # interquartile range over median: beyond it a ratio is not fit to be published
Row = dict[str, Any]

FIRST_STEP_DONE = 99
# python -m experiments.train, left for good when the loss of the first step has been read
FIRST_STEP = f"""
import os
from experiments import cli, train
make_trainer = train.make_trainer
def leaving(cfg):
    trainer = make_trainer(cfg)
    step = trainer.train_step
    trainer.train_step = lambda *batches: (step(*batches), float(trainer.sums["ce"]), os._exit({FIRST_STEP_DONE}))
    return trainer
train.make_trainer = leaving
cli.main(train.train, "config")
"""


def compare(name: str, over: str, sides: tuple[Side, Side], rounds: int, steps: int | None) -> Row:
    """One row: the time of a step of the first side over the second's, taken in turns, and what the two call."""
    for side in sides:
        side.seconds(1)  # the first step allocates the optimizer's state and picks kernels
    calls, reads = zip(*(side.counts() for side in sides), strict=True)
    steps = steps or min(1000, max(3, round(0.25 / max(side.seconds(1) for side in sides))))
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds):  # each begins every other round, so that a drift of the machine does not favour one
        for i in (0, 1) if turn % 2 else (1, 0):
            times[i].append(sides[i].seconds(steps))
    row: Row = {"what": name, "over": over} | spread(*times)
    for i, letter in enumerate("ab"):
        row |= {f"ms {letter}": 1000 * statistics.median(times[i]), f"calls {letter}": calls[i], f"reads {letter}": reads[i]}
    return row | {"steps": steps}


def spread(a: list[float], b: list[float]) -> Row:
    """Median and quartiles of the paired ratios, and a mark where they lie too far apart."""
    q1, median, q3 = statistics.quantiles([one / other for one, other in zip(a, b, strict=True)], n=4, method="inclusive")
    return {"ratio": median, "q1": q1, "q3": q3, "note": "noisy" if q3 - q1 > NOISY * median else ""}


def step_rows(overrides: list[str], rounds: int, steps: int | None) -> Iterator[Row]:
    """Every comparison, as it is made. Raises ConfigError for overrides that cannot be composed, before the first."""
    from experiments.sides import matching, optimizer, peer, suite

    methods, common, own = split(overrides)
    cfg, exact = composed(common), composed([*common, "precision=fp32"])
    configs = {name: composed([*common, f"method={name}", *own.get(name, [])]) for name in methods}
    yield compare("suite", "minimal loop", (suite(cfg), peer(cfg)), rounds, steps)
    for name, with_method in configs.items():
        yield compare(name, "vanilla", (suite(with_method), suite(cfg)), rounds, steps)
    for name in ("bf16", "tf32") if on_gpu(cfg) else ("bf16",):
        yield compare(name, "fp32", (suite(composed([*common, f"precision={name}"])), suite(exact)), rounds, steps)
    yield compare("MMD at once", "class by class", (matching(cfg, loop=False), matching(cfg, loop=True)), rounds, steps)
    yield compare("optimizer", "vanilla", (optimizer(cfg), suite(cfg)), rounds, steps)


def split(overrides: list[str]) -> tuple[list[str], list[str], dict[str, list[str]]]:
    """The methods to measure, the overrides for all rows, and those for one method's row."""
    known = methods = [name for name in options("method") if name != "vanilla"]
    own: dict[str, list[str]] = {}
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "method":
            methods = [name for name in re.split(r"[\[\], ]+", value) if name not in ("", "vanilla")]
        elif key.startswith("method."):
            own.setdefault(key.split(".")[1], []).append(override)
    if unknown := sorted({*methods, *own} - {*known}):
        raise ConfigError(f"method: {unknown[0]} is not known; allowed: {', '.join(known)}")
    return methods, [override for override in overrides if not re.match(r"method[.=]", override)], own


def with_defaults(overrides: list[str]) -> list[str]:
    chosen = {override.partition("=")[0] for override in overrides}
    data = [] if chosen & {"dataset", "experiment"} else ["dataset=digits", "dataset.train=1500"]
    return [*([] if "experiment" in chosen else ["experiment=itdm_grey_c"]), *data, *overrides]


def composed(overrides: list[str]) -> DictConfig:
    """The config that the overrides describe, resolved and checked."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", with_defaults(overrides))
    OmegaConf.resolve(cfg)
    check(cfg)
    return cfg


def start_rows(overrides: list[str], rounds: int) -> Iterator[Row]:
    """Processes from their start on; the one with a step has read data, built everything and opened its folder by then."""
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            train = ["-c", FIRST_STEP, *with_defaults(overrides), f"runtime.runs={folder}"]
            for name, command in {
                "import torch": ["-c", "import torch"],
                "--help": ["-m", "experiments.train", "--help"],
                "step": train,
            }.items():
                began = time.perf_counter()
                done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
                times.setdefault(name, []).append(time.perf_counter() - began)
                if done.returncode != (FIRST_STEP_DONE if name == "step" else 0):
                    message = (done.stderr.strip().splitlines() or ["the run ended without a step"])[-1].removeprefix("retable: ")
                    raise (ConfigError if done.returncode == 2 else RunFailed)(message)
    for name, what in {"import torch": "import torch", "--help": "train --help", "step": "first training step"}.items():
        yield (
            {"what": what, "over": "import torch"}
            | spread(times[name], times["import torch"])
            | {"seconds": statistics.median(times[name])}
        )


def on_gpu(cfg: DictConfig) -> bool:
    import torch

    return torch.cuda.is_available() and cfg.runtime.device != "cpu"


def machine(cfg: DictConfig) -> Row:
    """What a ratio depends on besides the code."""
    import torch

    from experiments.provenance import commit, device_name

    device = device_name(torch.device("cuda" if on_gpu(cfg) else "cpu"))
    threads = {"threads": cfg.runtime.threads or torch.get_num_threads(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2)}
    return {"device": device, **threads, "torch": torch.__version__, "precision": cfg.precision, "batch_size": cfg.batch_size, **commit()}


def bench(arguments: list[str]) -> None:
    """The command. Raises ConfigError for bad input, RunFailed when a process that was to make a step did not."""
    what, rest = arguments[0] if arguments else "nothing", arguments[1:]
    if what not in ("step", "start"):
        raise ConfigError(f"bench: {what} is not allowed; it must be step or start (--help explains)")
    own = {key: value for key, _, value in (word.partition("=") for word in rest) if key in ("rounds", "steps", "csv")}
    overrides = [word for word in rest if word.partition("=")[0] not in own]
    for key, least in {"rounds": 7 if what == "step" else 2, "steps": 1}.items():
        if key in own and not (own[key].isdecimal() and int(own[key]) >= least):
            raise ConfigError(f"{key}: {own[key]} is not allowed; it must be a whole number of at least {least}")
    rounds = int(own.get("rounds", 9 if what == "step" else 3))
    cfg = composed(split(overrides)[1])
    path = Path(own.get("csv", f"runs/bench-{what}.csv"))
    path.parent.mkdir(parents=True, exist_ok=True)  # a place that cannot be written to shows before the measurement

    rows = []
    for row in (
        step_rows(overrides, rounds, int(own["steps"]) if "steps" in own else None) if what == "step" else start_rows(overrides, rounds)
    ):
        rows.append(row)
        print(f"{row['what']} over {row['over']}: {row['ratio']:.3f} {row['note']}", file=sys.stderr)
    from tabulate import tabulate

    about = machine(cfg) | {"rounds": rounds}
    print(tabulate(rows, headers="keys", floatfmt=".3f"))
    print("ratio: wall-clock time of what (a) over the other's (b), median of the rounds' ratios between its quartiles")
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    with store.written(path) as file:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, [*rows[0], *about])
        writer.writeheader()
        writer.writerows(row | about for row in rows)
        file.write(text.getvalue().encode())


def main() -> None:
    if {"-h", "--help"} & {*sys.argv[1:]}:
        print(USAGE)
        return
    try:
        bench(sys.argv[1:])
    except RunFailed as error:
        stop(str(error), 1)
    except BAD_INPUT as error:
        stop(one_line(error), 2)
    except KeyboardInterrupt:
        stop("interrupted", 130)


if __name__ == "__main__":
    main()
