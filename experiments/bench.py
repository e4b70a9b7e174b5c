"""What a step and a start of the suite cost, as ratios measured side by side.   python -m experiments.bench --help"""

from __future__ import annotations

import csv
import io
import itertools
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments import store
from experiments.cli import CONF, RunFailed, one_line, stop
from experiments.config import ConfigError, build, check, options
from experiments.train import commit, make_trainer

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from data.bundle import Bundle

USAGE = """python -m experiments.bench step|start [rounds=N] [steps=N] [csv=FILE] [OVERRIDE...]

step   a training step against a plain PyTorch loop, each method against vanilla, bf16 (tf32) against fp32, the MMD against
       a loop over classes; dispatcher calls and host reads per step. The sides of a row take turns in one process
start  seconds until --help is printed and until the first training step is done, each in a process of its own
rounds=9   paired rounds of a row, at least 7; for start: 3, how often each command is run
steps=N    steps of a side in a round; without it as many as take a quarter of a second, at least 3
csv=FILE   where the table goes too: runs/bench-step.csv, runs/bench-start.csv

The overrides are those of experiments.train; unless they choose otherwise, experiment=itdm_grey_c on 1,500 digits.
method=[NAME,...] leaves out the other methods; method.NAME.KEY=VALUE goes to that method's rows alone."""
NOISY = 0.1  # interquartile range over median: beyond it a ratio is not fit to be published
Row = dict[str, Any]

FIRST_STEP_DONE = 99
FIRST_STEP = f"""
import os
from experiments import cli, train
make_trainer = train.make_trainer
def leaving_after_one_step(cfg):
    trainer = make_trainer(cfg)
    step = trainer.train_step
    def once(*batches):
        step(*batches)
        float(trainer.sums["ce"])
        os._exit({FIRST_STEP_DONE})
    trainer.train_step = once
    return trainer
train.make_trainer = leaving_after_one_step
cli.main(train.train, "config")
"""


def minimal_loop(net: nn.Module, bundle: Bundle, orders: Iterable[Tensor], rng: Generator, cfg: DictConfig) -> Iterator[Tensor]:
    """The peer: the training loop that one would write by hand for this network. Yields each step's loss.

    orders: the samples of each batch. The bundle's images, labels and augmentation are used, of the trainer nothing.
    """
    import torch
    from torch.nn.functional import cross_entropy

    images, labels = bundle.splits["train"]
    black, white = (bundle.prepare(torch.full_like(images[:1], value))[:, :, :1, :1] for value in (0, 255))
    std = 255 / (white - black)
    mean = -black * std
    net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        net.parameters(), lr=cfg.optim.lr, momentum=cfg.optim.momentum, weight_decay=cfg.optim.weight_decay, fused=True
    )
    for chosen in orders:
        x = bundle.augment(images[chosen], rng).to(memory_format=torch.channels_last).float().sub(mean).div(std)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=cfg.precision == "bf16"):
            logits = net(x)
        loss = cross_entropy(logits.float(), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.detach()


def count(step: Callable[[], object]) -> tuple[int, int]:
    """How many operations reach torch's dispatcher below autograd, views included, and how many make the host wait for values.

    What a CPU tensor hands out without an operation (`tolist`, `numpy`) stays unseen; on a GPU it is a copy, which is seen.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    reading = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "_unique2", "unique_dim", "unique_consecutive"}
    calls = reads = 0

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal calls, reads
            name, kwargs = func.overloadpacket.__name__, kwargs or {}
            result = func(*args, **kwargs)
            calls += 1
            if "index" in name and len(args) > 1 and isinstance(args[1], list | tuple):  # how many a mask takes must be known
                reads += any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
            elif name == "_to_copy":
                reads += args[0].device.type != "cpu" and result.device.type == "cpu"
            else:
                reads += name in reading or (name == "repeat_interleave" and kwargs.get("output_size") is None)
            return result

    with Counter():
        step()
    return calls, reads


@dataclass
class Side:
    """One side of a row: the step that is timed, its device, and the global setting that it needs."""

    step: Callable[[], object]
    device: Any
    tf32: bool = False

    def seconds(self, steps: int) -> float:
        """Per step, until nothing is left to do on the device."""
        import torch

        torch.backends.cudnn.allow_tf32 = self.tf32  # the other side may want it otherwise
        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda device: None
        wait(self.device)
        began = time.perf_counter()
        for _ in range(steps):
            self.step()
        wait(self.device)
        return (time.perf_counter() - began) / steps

    def counts(self) -> tuple[int, int]:
        """Calls and host reads of a step: the median of three, since at most one of them also shuffles an epoch."""
        calls, reads = zip(*(count(self.step) for _ in range(3)), strict=True)
        return sorted(calls)[1], sorted(reads)[1]


def suite(cfg: DictConfig) -> Side:
    """The suite's step with all that belongs to it: the epoch's order, the batch, the trainer's step."""
    trainer = make_trainer(cfg)
    trainer.steps_per_epoch = full_batches(cfg, trainer.bundle)
    steps = (trainer.train_step(*batches) for _ in itertools.count() for batches in trainer.batches())
    return Side(lambda: next(steps), trainer.device, cfg.precision == "tf32")


def peer(cfg: DictConfig) -> Side:
    """The minimal loop, with a network and shuffled epochs of its own."""
    import torch

    trainer = make_trainer(cfg)  # for its device, bundle and settings of torch, so that they are the same on both sides
    bundle, device = trainer.bundle, trainer.device
    if bundle.splits["train"][0].dtype != torch.uint8:
        raise ConfigError(f"dataset: {cfg.dataset._target_} has no images; the minimal loop knows nothing else")
    net = build(cfg.model, "model")(num_classes=bundle.num_classes).to(device)
    rng = torch.Generator(device).manual_seed(cfg.seed)
    epochs = (torch.randperm(len(bundle.splits["train"][1]), generator=rng, device=device) for _ in itertools.count())
    full = full_batches(cfg, bundle)
    losses = minimal_loop(net, bundle, (chosen for epoch in epochs for chosen in epoch.split(cfg.batch_size)[:full]), rng, cfg)
    return Side(lambda: next(losses), device, cfg.precision == "tf32")


def full_batches(cfg: DictConfig, bundle: Bundle) -> int:
    """Batches of the full size in an epoch: a smaller last one is left out, so that all steps do the same work."""
    samples = min(bundle.epoch_size(cfg.balanced), len(bundle.splits["train"][1]))
    if samples < cfg.batch_size:
        raise ConfigError(f"batch_size: {cfg.batch_size} is not allowed; the data set has {samples} training samples")
    return samples // cfg.batch_size


def optimizer(cfg: DictConfig) -> Side:
    """The optimizer alone, on the gradients of one step."""
    trainer = make_trainer(cfg)
    trainer.train_step(*next(trainer.batches()))
    return Side(trainer.optimizer.step, trainer.device)


def matching(cfg: DictConfig, loop: bool) -> Side:
    """ITDM-c's MMD and its gradient on random features as wide as the network's: all classes at once, or one after the other."""
    import torch

    from regularizers.mmd import classwise_mmd, mmd

    trainer = make_trainer(cfg)
    size, classes, device = cfg.batch_size, trainer.bundle.num_classes, trainer.device
    rng = torch.Generator(device).manual_seed(cfg.seed)
    x, y = (torch.randn(size, trainer.net.classifier.in_features, generator=rng, device=device, requires_grad=True) for _ in "xy")
    label = torch.arange(size, device=device) % classes

    def at_once() -> Tensor:
        return classwise_mmd(x, y, label, label, classes, per_class=-(-size // classes)).mean()

    def one_by_one() -> Tensor:
        return torch.stack([mmd(x[label == k], y[label == k]) if k < size else x.new_zeros(()) for k in range(classes)]).mean()

    value = one_by_one if loop else at_once

    def step() -> Tensor:
        result = value()
        result.backward()
        return result.detach()

    return Side(step, device)


def compare(names: tuple[str, str], a: Side, b: Side, rounds: int, steps: int | None) -> Row:
    """One row: the time of a step of `a` over one of `b`, taken in turns, and what the two call."""
    for side in (a, b):
        side.seconds(1)  # the first step allocates the optimizer's state and picks kernels
    calls, reads = zip(a.counts(), b.counts(), strict=True)
    steps = steps or min(1000, max(3, round(0.25 / max(a.seconds(1), b.seconds(1)))))
    times = []
    for turn in range(rounds):  # each begins every other round, so that a drift of the machine does not favour one
        pair = {id(side): side.seconds(steps) for side in ((a, b) if turn % 2 else (b, a))}
        times.append((pair[id(a)], pair[id(b)]))
    row: Row = {"step": names[0], "over": names[1]} | spread([one / other for one, other in times])
    row |= {f"ms {side}": 1000 * statistics.median(values) for side, values in zip("ab", zip(*times, strict=True), strict=True)}
    row |= {"calls a": calls[0], "calls b": calls[1], "reads a": reads[0], "reads b": reads[1], "steps": steps}
    return row


def spread(ratios: list[float]) -> Row:
    """Median and quartiles, and a mark where they lie too far apart."""
    q1, median, q3 = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"ratio": median, "q1": q1, "q3": q3, "note": "noisy" if q3 - q1 > NOISY * median else ""}


def step_rows(overrides: list[str], rounds: int, steps: int | None) -> Iterator[Row]:
    """Every comparison, as it is made. Raises ConfigError for a config that cannot be run, before the first."""
    methods, common, own = split(overrides)
    cfg = composed(common)
    configs = {name: composed([*common, f"method={name}", *own.get(name, [])]) for name in methods}
    exact = composed([*common, "precision=fp32"])
    yield compare(("suite", "minimal loop"), suite(cfg), peer(cfg), rounds, steps)
    for name, with_method in configs.items():
        yield compare((name, "vanilla"), suite(with_method), suite(cfg), rounds, steps)
    for precision in ("bf16", "tf32") if on_gpu(cfg) else ("bf16",):
        yield compare((precision, "fp32"), suite(composed([*common, f"precision={precision}"])), suite(exact), rounds, steps)
    yield compare(("MMD at once", "class by class"), matching(cfg, loop=False), matching(cfg, loop=True), rounds, steps)
    yield compare(("optimizer", "vanilla"), optimizer(cfg), suite(cfg), rounds, steps)


def split(overrides: list[str]) -> tuple[list[str], list[str], dict[str, list[str]]]:
    """The methods to measure, the overrides for all rows, and those for the rows of one method."""
    known = methods = [name for name in options("method") if name != "vanilla"]
    common: list[str] = []
    own: dict[str, list[str]] = {}
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "method":
            methods = [name for name in value.strip("[]").replace(" ", "").split(",") if name not in ("", "vanilla")]
        elif key.startswith("method."):
            own.setdefault(key.split(".")[1], []).append(override)
        else:
            common.append(override)
    if unknown := sorted({*methods, *own} - {*known}):
        raise ConfigError(f"method: {unknown[0]} is not known; allowed: {', '.join(known)}")
    return methods, common, own


def with_defaults(overrides: list[str]) -> list[str]:
    chosen = {override.partition("=")[0] for override in overrides}
    data = [] if chosen & {"dataset", "experiment"} else ["dataset=digits", "dataset.train=1500"]
    return [*([] if "experiment" in chosen else ["experiment=itdm_grey_c"]), *data, *overrides]


def composed(overrides: list[str]) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", with_defaults(overrides))
    OmegaConf.resolve(cfg)
    check(cfg)
    return cfg


def start_rows(overrides: list[str], rounds: int) -> list[Row]:
    """From the start of a process: Python, imports, Hydra, data, network, run folder and, for the step, one step with its loss read."""
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            commands = {
                "import torch": ["-c", "import torch"],
                "--help": ["-m", "experiments.train", "--help"],
                "first step": ["-c", FIRST_STEP, *with_defaults(overrides), f"runtime.runs={folder}"],
            }
            for name, command in commands.items():
                began = time.perf_counter()
                done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
                times.setdefault(name, []).append(time.perf_counter() - began)
                if done.returncode != (FIRST_STEP_DONE if name == "first step" else 0):
                    message = (done.stderr.strip().splitlines() or ["no step was made"])[-1].removeprefix("retable: ")
                    raise (ConfigError if done.returncode == 2 else RunFailed)(message)
    seconds = {name: {"until": name, "seconds": statistics.median(values)} for name, values in times.items()}
    over = {name: [one / torch for one, torch in zip(values, times["import torch"], strict=True)] for name, values in times.items()}
    return [{**seconds[name], "over": "import torch", **spread(over[name])} for name in times]


def on_gpu(cfg: DictConfig) -> bool:
    import torch

    return torch.cuda.is_available() and cfg.runtime.device != "cpu"


def machine(cfg: DictConfig) -> Row:
    """What a ratio depends on besides the code."""
    import torch

    info = Path("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    device = torch.cuda.get_device_name() if on_gpu(cfg) else models[0] if models else platform.processor() or platform.machine()
    threads = {"threads": torch.get_num_threads(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2)}
    return {"device": device, **threads, "torch": torch.__version__, "precision": cfg.precision, "batch_size": cfg.batch_size, **commit()}


def bench(arguments: list[str]) -> None:
    """The command. Raises ConfigError for bad input, RunFailed when a process that was to make a step did not."""
    what, rest = arguments[0] if arguments else "nothing", arguments[1:]
    if what not in ("step", "start"):
        raise ConfigError(f"bench: {what} is not allowed; it must be step or start (--help explains)")
    own = {key: value for key, _, value in (word.partition("=") for word in rest) if key in ("rounds", "steps", "csv")}
    overrides = [word for word in rest if word.partition("=")[0] not in own]
    rounds = number(own, "rounds", 7) or 9 if what == "step" else number(own, "rounds", 1) or 3
    steps = number(own, "steps", 1)
    cfg = composed(split(overrides)[1])
    path = Path(own.get("csv") or f"runs/bench-{what}.csv")
    path.parent.mkdir(parents=True, exist_ok=True)  # a place that cannot be written to shows before the measurement

    rows = []
    for row in step_rows(overrides, rounds, steps) if what == "step" else start_rows(overrides, rounds):
        rows.append(row)
        print(f"{row.get('step') or row['until']} over {row['over']}: {row['ratio']:.3f} {row['note']}", file=sys.stderr)
    about = machine(cfg) | {"rounds": rounds}
    with store.written(path) as file:
        text = io.TextIOWrapper(file, newline="", write_through=True)
        writer = csv.DictWriter(text, [*rows[0], *about])
        writer.writeheader()
        writer.writerows(row | about for row in rows)
        text.detach()

    from tabulate import tabulate

    print(tabulate(rows, headers="keys", floatfmt=".3f"))
    print("\nratio: the median of the rounds' ratios, between its quartiles; a: the step, b: what it is set over; times are of the wall clock")
    print(", ".join(f"{key} {value}" for key, value in about.items()))


def number(options: dict[str, str], key: str, least: int) -> int | None:
    if key in options and not (options[key].isdecimal() and int(options[key]) >= least):
        raise ConfigError(f"{key}: {options[key]} is not allowed; it must be a whole number of at least {least}")
    return int(options[key]) if key in options else None


def main() -> None:
    if {"-h", "--help"} & {*sys.argv[1:]}:
        print(USAGE)
        return
    try:
        bench(sys.argv[1:])
    except RunFailed as error:
        stop(str(error), 1)
    except (ConfigError, HydraException, OmegaConfBaseException) as error:
        stop(one_line(error), 2)
    except OSError as error:
        stop(f"{error.filename}: {error.strerror}" if error.filename else one_line(error), 2)
    except KeyboardInterrupt:
        stop("interrupted", 130)


if __name__ == "__main__":
    main()
