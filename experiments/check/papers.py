"""Hours that the tables of each paper would take on a device, estimated from a few measured rates of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from hydra import initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from data.bundle import Batch, Bundle
from data.text import Corpus, Text
from experiments.check.processes import time_left
from experiments.cli import CONF
from experiments.compose import compose
from experiments.config import build, resolve
from experiments.identity import run_id
from experiments.length import Length
from experiments.paper import papers
from experiments.pick import choices, variants
from experiments.spec import Table
from regularizers.base import Pass, Regularizer

OTHER_CALLS = 10  # of a step besides forward and backward, 6 to 18: the batch, its augmentation, clipping, the fused optimizer, sums
# Besides views: allocations, the profiler's marks, and two views that torch does not call so.
NO_WORK = ("empty", "new_empty", "_record_function", "_unsafe_view", "as_strided_")
TURNS = 100  # steps whose passes are averaged: a method may make them in turn, or by chance
Words = tuple[str, ...]


class Rates(NamedTuple):
    """flops: FLOP/s of a convolution in each precision: "fp32", "tf32", "bf16".
    call: seconds that one kernel launch of an eager step costs; on a CPU, one small operation.
    replay: seconds that a kernel in a replayed CUDA graph costs; None where there are none, as on a CPU.
    """

    flops: dict[str, float]
    call: float
    replay: float | None = None


class Load(NamedTuple):
    """Of a run: its steps; FLOP and kernel calls of each; those of all its evaluations together."""

    steps: int
    flop: float
    calls: float
    read_flop: float
    read_calls: float

    def hours(self, rates: Rates, precision: str, graph: bool) -> float:
        """graph: the step is one where the device has them; an evaluation never is."""
        rate, call = rates.flops[precision], rates.replay if graph and rates.replay is not None else rates.call
        step, read = max(self.flop / rate, self.calls * call), max(self.read_flop / rate, self.read_calls * rates.call)
        return (self.steps * step + read) / 3600


class Counted(NamedTuple):
    """tables: how many each paper has; left: those that were not counted.

    runs: of each paper its different runs by their identity: load, precision, and whether the step is a graph.
    """

    tables: dict[str, int]
    left: dict[str, list[str]]
    runs: dict[str, dict[Hashable, tuple[Load, str, bool]]]


def counted(until: float) -> Counted:
    """The runs of each paper's tables, and what each of them has to do; needs no rates, no data and no GPU.

    until: no table is begun after this time of time.monotonic(). Those with the fewest runs come first.
    """
    parts = [(paper, name) for paper, of in papers().items() for kind, name in of if kind == "table"]
    files = {name: OmegaConf.load(CONF / "table" / f"{name}.yaml") for _, name in parts}  # they have no defaults of their own
    tables: dict[str, Any] = {name: OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Table), one)) for name, one in files.items()}
    asked = {name: dict.fromkeys(words(table)) for name, table in tables.items()}
    found = Counted(dict(Counter(paper for paper, _ in parts)), {paper: [] for paper, _ in parts}, {paper: {} for paper, _ in parts})
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for paper, name in sorted(parts, key=lambda part: len(asked[part[1]])):
            if not time_left(until):
                found.left[paper].append(name)
                continue
            for common, own in asked[name]:
                (cfg, identity), (_, of_methods), run = composed(common), composed(own), load(common, *passes(own))
                seeds = tables[name].seeds[: cfg.profile.seeds]
                found.runs[paper] |= {(identity, of_methods, seed): (run, cfg.precision, cfg.step == "graph") for seed in seeds}
    return found


def hours(rates: Rates, found: Counted) -> list[dict[str, Any]]:
    """One line per paper: paper, tables ("5 of 7"), runs, steps, hours, "hours bf16 graph" where there are rates for it, left out.

    `left out` names the tables that were not counted. Raises KeyError for a precision of a table that has no rate.
    Hours are those of all different runs, one after another: with the precision and the step (eager or graph) of their configs; and with
    bf16 and the step as a graph. A step takes max(FLOP / rate, kernel calls * seconds a call): of the optimizer, and of as many forwards
    and backwards as the methods need (a second batch, passes of their own). An evaluation is an eager forward of all held-out samples.

    The hours are a lower bound. Not counted are, of a step, the arithmetic and the calls of penalties and of
    mixing, reading and writing memory, kernels inside one call (a fused LSTM layer), casts to bf16; of a run, probes, checkpoints,
    samples that class-balanced epochs repeat; figures, and tables of no paper. Data sets have their official sizes: none is read.
    """
    rows = []
    for paper, tables in found.tables.items():
        runs, left = found.runs[paper].values(), found.left[paper]
        row: dict[str, Any] = {"paper": paper, "tables": f"{tables - len(left)} of {tables}", "runs": len(runs)}
        row["steps"] = sum(load.steps for load, *_ in runs)
        row["hours"] = sum(load.hours(rates, precision, graph) for load, precision, graph in runs)
        if rates.replay is not None and "bf16" in rates.flops:
            row["hours bf16 graph"] = sum(load.hours(rates, "bf16", graph=True) for load, *_ in runs)
        rows.append(row | {"left out": ", ".join(sorted(left))})
    return rows


def words(table: Table) -> Iterator[tuple[Words, Words]]:
    """The overrides of each run, its methods' apart from the others, sorted, the last for each key; cells can share them.
    Of a row with `select` those of all trials, and its first choice in place of what they will pick.
    """
    for row, name, choice, trial, overrides in variants(table):
        if trial or not row.select or choice == choices(row, name)[0][0]:
            last = sorted({word.partition("=")[0]: word for word in overrides}.values())
            own = tuple(word for word in last if word.startswith(("method=", "method.")))
            yield tuple(word for word in last if word not in own), own


@cache
def composed(overrides: Words) -> tuple[DictConfig, str]:
    """A config, and an id that is the same for two spellings of it."""
    cfg = compose(overrides)
    return cfg, run_id(cfg)


@cache
def passes(own: Words) -> tuple[float, int]:
    """Forward-backward passes of a step, on average over the first ones, and steps on each batch; the methods are shown a tiny one."""
    built: list[Regularizer] = [build(node, f"method.{name}") for name, node in composed(own)[0].method.items()]
    active = [method for method in built if method.active]
    x, y, h, extra = torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=torch.long), torch.zeros(2, 8), 0
    for method in active:
        method.rng = Generator()
        method.setup(Pass(Batch(x, y, y, 2, torch.ones(3, 1, 1)), h, h, (h,), (h,)))
        for step in range(TURNS):
            method.choose(step)
            extra += method.passes
    batches = 1 + any(method.second_batch for method in active)
    return batches * (1 + extra / TURNS), max([1, *(method.steps_per_batch for method in active)])


@cache
def load(common: Words, made: float, repeats: int) -> Load:
    """Of a run with so many passes a step and steps on each batch. Its network is counted once for all options of its norm layers."""
    cfg, _ = composed(common)
    known: Any = resolve(cfg.dataset, "dataset")
    text = isinstance(known, Text)
    window = cfg.dataset.bptt if text else 1
    shape = [window] if text else [cfg.dataset.get("channels") or known.shape[0], *[cfg.dataset.get("size") or known.shape[1]] * 2]
    plain = {"splits": {}, "num_classes": known.num_classes, "prepare": Tensor.float, "variant": known.title}
    bundle: Bundle = Corpus(**plain, bptt=window) if text else Bundle(**plain)
    model = OmegaConf.create({**cfg.model, "norm": {"_target_": cfg.norm._target_, "_partial_": True}})
    flop, hidden, forward, backward = work(OmegaConf.to_yaml(model), *shape)
    flop += 2 * hidden * known.num_classes
    held_out = round(known.sizes["train"] * cfg.dataset.get("valid", 0))
    length = Length(cfg, repeats * bundle.steps(known.sizes["train"] - held_out, cfg.batch_size, cfg.drop_last))
    times = len(length.evaluations(cfg.evaluate.every, cfg.evaluate.dense))
    read = [size for split, size in known.sizes.items() if split != "train"] + [held_out] * bool(held_out)
    batches = sum(bundle.steps(size, cfg.evaluate.batch_size, False) for size in read)
    step = made * 3 * flop * cfg.batch_size, made * (forward + backward) + OTHER_CALLS
    return Load(length.steps, *step, times * flop * sum(read) / window, times * forward * batches)


@cache
def work(model: str, *shape: int) -> tuple[float, int, int, int]:
    """FLOP of a sample's forward, but for 2 * hidden for each class; hidden; kernel calls of a batch's forward, and of its backward.
    Counted for two images [C, H, W] without computing, on torch's meta device. Networks of words [T] do not run there, and fused layers
    hide their products: their calls are counted on the CPU, and each matrix but the embedding's as multiplied with every word.
    """
    text = len(shape) == 1
    with torch.device("cpu" if text else "meta"):
        net = build(DictConfig(OmegaConf.create(model)), "model")(num_classes=2)
        x = torch.zeros(2, *shape, dtype=torch.long if text else torch.float32)
        y = torch.zeros(2 * shape[0] if text else 2, dtype=torch.long)
    logits: list[Tensor] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy CPU several would wait for each other, longer than these small operations take
    with FlopCounterMode(display=False) as products:
        forward = calls(lambda: logits.append(net(x)))
    backward = calls(lambda: cross_entropy(logits[0].flatten(0, -2), y).backward())
    torch.set_num_threads(threads)
    hidden = net.classifier.in_features * (shape[0] if text else 1)
    flop = products.get_total_flops() / 2 - 2 * hidden * 2
    if text:
        layers = [layer for layer in net.features.modules() if not isinstance(layer, nn.Embedding)]
        flop = 2 * shape[0] * sum(p.numel() for layer in layers for p in layer.parameters(recurse=False) if p.dim() == 2)
    return flop, hidden, forward, backward


def calls(step: Callable[[], object]) -> int:
    """How many operations a step sends to the device; torch's dispatcher sees them below autograd."""
    found = 0

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal found
            found += not (func.is_view or func.overloadpacket.__name__.startswith(NO_WORK))
            return func(*args, **(kwargs or {}))

    with Counter():
        step()
    return found
