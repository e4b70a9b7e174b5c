"""Checks that methods train on a device as on the CPU: precisions, CUDA graphs, resuming, runs side by side."""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils._pytree import tree_leaves

from experiments.check.draws import DrawnOnCPU
from experiments.check.processes import Result
from experiments.compose import composed
from experiments.config import options
from experiments.launching.processes import apart
from experiments.train import folder, make_trainer, train
from experiments.trainer import Trainer

STEPS = 20
TOLERANCE = 1e-3  # largest allowed relative difference, in norm: between two updates, or between the weights of two runs
LEARNS = 30  # the accuracy in percent that the small network must reach; chance is 10
# An epoch is nine batches of 20 images and one of two: as few as batch normalisation takes.
IMAGES = ("dataset=digits", "++dataset.train=182", "profile.test=500", "model=net2c", "norm=bn", "optim.lr=0.02", "optim.momentum=0.9")
# An epoch is ten windows of ten words and one of two.
WORDS = (
    "dataset=docs",
    "++dataset.bptt=10",
    "profile.train=2060",
    "profile.test=500",
    "model=lstm",
    "model.width=64",
    "norm=none",
    "optim.lr=2",
)
# Layers with device code of their own: fused and stepped LSTM, norm layers.
MORE = {
    "lstm fused": (*WORDS, "method=per"),
    "lstm stepped": (*WORDS, "method=per", "model.variational_dropout=true"),
    "no norm": (*IMAGES, "method=vanilla", "norm=none"),
    "unitization": (*IMAGES, "method=vanilla", "norm=unitization"),
}
CLOSE = 12  # so many of the twenty updates must be within it: rounding can turn a comparison (a maximum, a mask), and so change a step
# With their defaults, which are for large networks, L1 and L2 bring all activations of this one to 0, and PER is too weak to be seen. PER's
# directions are for units in their order in memory, which depends on the device, but not if each position is a sample.
OPTIONS = {"l1": ["weight=1e-6"], "l2": ["weight=1e-6"], "per": ["weight=1e-3", "spatial=samples"]}


def cases(device: str) -> list[str]:
    """All methods, and the configs of MORE."""
    return [*options("method"), *MORE]


def config(case: str, device: str, *more: str) -> DictConfig:
    """The small run that a case is tried on."""
    words = MORE.get(case) or (*IMAGES, f"method={case}", *(f"method.{case}.{option}" for option in OPTIONS.get(case, [])))
    return composed([*words, "balanced=false", "batch_size=20", "epochs=2", "runtime.threads=1", f"runtime.device={device}", *more])


def trained(cfg: DictConfig, steps: int) -> Trainer:
    """The trainer of `cfg` after `steps` steps."""
    trainer = make_trainer(cfg)
    for samples in itertools.islice(trainer.endless(), steps):
        trainer.take_step(*samples)
    return trainer


def parameters(trainer: Trainer) -> list[Tensor]:
    return [p for group in trainer.optimizer.param_groups for p in group["params"]]


def weights(trainer: Trainer) -> Tensor:
    """All parameters in one vector, on the CPU in float64."""
    return torch.cat([p.detach().cpu().double().flatten() for p in parameters(trainer)])


def difference(one: Trainer, other: Trainer) -> float:
    """The norm of the difference between two runs' weights, relative to the first run's."""
    return float((weights(one) - weights(other)).norm() / weights(one).norm())


def same_bits(one: Trainer, other: Trainer) -> bool:
    """Whether all tensors of two runs' states are equal."""
    pairs = zip(tree_leaves(one.state()), tree_leaves(other.state()), strict=True)
    return all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor))


# The checks: (case, device) -> Result. The first line of each docstring is printed in the table.


def fp32_as_on_the_cpu(case: str, device: str) -> Result:
    """Twenty updates equal the CPU's in fp32, each from the same weights, with the same samples and random numbers.

    On a CPU the reference runs without oneDNN, whose kernels are what is checked.
    """
    draws = DrawnOnCPU(), DrawnOnCPU()
    with draws[0]:
        reference = make_trainer(config(case, "cpu"))
    with draws[1]:
        tried = make_trainer(config(case, device))
    sides = [(reference, reference.endless(), draws[0], device != "cpu"), (tried, tried.endless(), draws[1], True)]
    gaps = []
    for _ in range(STEPS):
        give(reference, tried)
        start = weights(reference)
        for trainer, samples, drawn, onednn in sides:
            torch.backends.mkldnn.enabled = onednn  # type: ignore[assignment]
            with drawn:
                trainer.take_step(*next(samples))
        update = weights(reference) - start
        gaps.append(float((weights(tried) - start - update).norm() / update.norm().clamp(min=1e-30)))
    middle, close = statistics.median(gaps), sum(gap <= TOLERANCE for gap in gaps)
    text = f"{close} of {STEPS} updates differ by at most {TOLERANCE:.0e} ({CLOSE} must), by {middle:.0e} in the median"
    return Result(close >= CLOSE, text, {"median": middle, "largest": max(gaps), "close": close})


@torch.no_grad()
def give(source: Trainer, target: Trainer) -> None:
    """Weights, buffers and momentum of one run to another."""
    target.net.load_state_dict(source.net.state_dict())
    for name, method in target.regularizers.items():
        method.load_state_dict(source.regularizers[name].state_dict())
    for ours, theirs in zip(parameters(source), parameters(target), strict=True):
        if (momentum := source.optimizer.state[ours].get("momentum_buffer")) is not None:
            target.optimizer.state[theirs]["momentum_buffer"] = momentum.to(theirs.device, copy=True)


def learns_in_bf16(case: str, device: str) -> Result:
    """Sixty steps bring the network well above chance, a language model well below the loss that it starts with."""
    cfg = config(case, device, "precision=bf16")
    before, after = (trained(cfg, steps).evaluate("test") for steps in (0, 3 * STEPS))
    if "lstm" in case:
        return Result(after["ce"] < before["ce"] - 0.3, f"test loss {before['ce']:.2f} to {after['ce']:.2f}", {"ce": after["ce"]})
    return Result(after["accuracy"] > LEARNS, f"accuracy {after['accuracy']:.0f} % ({LEARNS} is asked)", {"accuracy": after["accuracy"]})


def graph_is_eager(case: str, device: str) -> Result:
    """Sixty steps with step=graph give the weights of sixty eager ones, smaller last batches included, with deterministic kernels."""
    eager, graph = (trained(config(case, device, "deterministic=true", f"step={step}"), 3 * STEPS) for step in ("eager", "graph"))
    gap, same = difference(eager, graph), same_bits(eager, graph)
    recordings = len(graph.replayed.graphs) if graph.replayed is not None else 0
    text = f"{'the same bits' if same else f'{gap:.0e} between weights'}, {recordings} recordings"
    return Result(recordings > 0 and gap <= TOLERANCE, text, {"gap": gap, "recordings": recordings})


def last_batch(case: str, device: str) -> Result:
    """An epoch whose last batch is smaller than the others."""
    trainer = make_trainer(config(case, device))
    sizes = [samples[0].numel() for samples in trainer.samples()]
    trainer.train_epoch()
    loss = trainer.rows[-1]["test/ce"]
    return Result(sizes[-1] < sizes[0], f"last batch of {sizes[-1]}, the others of {sizes[0]}; test loss {loss:.2f}", {"test/ce": loss})


def resumes(case: str, device: str) -> Result:
    """An epoch, a checkpoint and another epoch are two epochs bit for bit, with deterministic kernels."""
    cfg = config(case, device, "deterministic=true")
    first = make_trainer(cfg)
    first.train_epoch()
    with tempfile.TemporaryFile() as file:
        torch.save(first.state(), file)
        first.train_epoch()
        file.seek(0)
        second = make_trainer(cfg)
        second.load(torch.load(file, map_location=second.device, weights_only=True))
    second.train_epoch()
    gap, same = difference(first, second), same_bits(first, second)
    return Result(same, "the same bits" if same else f"{gap:.0e} between weights", {"gap": gap})


def side_by_side(case: str, device: str) -> Result:
    """Two runs at once have the numbers that each has alone."""
    return beside(device, seeds=(1, 2))


def out_of_memory(case: str, device: str) -> Result:
    """A run has the numbers that it has alone while another process runs out of GPU memory."""
    return beside(device, seeds=(1,), task=exhaust)


def exhaust(cfg: DictConfig) -> None:
    """Ask a GPU for twice the memory that it has. Raises torch.OutOfMemoryError."""
    torch.empty(2 * torch.cuda.get_device_properties(cfg.runtime.device).total_memory, dtype=torch.uint8, device=cfg.runtime.device)


def beside(device: str, seeds: tuple[int, ...], task: Callable[[DictConfig], None] | None = None) -> Result:
    """Train the seeds one by one, then all at once beside `task`, and compare their metrics."""
    with tempfile.TemporaryDirectory() as root, ThreadPoolExecutor() as pool:
        words = ["deterministic=true", "runtime.runs_per_device=16"]  # more than other runs may hold
        cfgs = {
            (place, seed): config("vanilla", device, *words, f"seed={seed}", f"runtime.runs={root}/{place}")
            for place in ("alone", "together")
            for seed in seeds
        }
        for seed in seeds:
            apart(train, cfgs["alone", seed])
        together = [pool.submit(apart, train, cfgs["together", seed]) for seed in seeds]
        failing = None if task is None else pool.submit(apart, task, cfgs["together", seeds[0]])
        for run in together:
            run.result()
        error = None if failing is None else failing.exception()
        found = {key: folder(cfg).metrics() for key, cfg in cfgs.items()}
    same = all(found["alone", seed] == found["together", seed] for seed in seeds)
    expected = task is None or isinstance(error, torch.OutOfMemoryError)
    text = "the same numbers as alone" if same else "other numbers than alone"
    return Result(same and expected, text if error is None else f"{text}; the other: {type(error).__name__}", {})
