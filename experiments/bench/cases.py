"""What the bench compares: each part of its table is a list of cases."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf

from experiments.bench.measure import VARIANTS, Asked, Side, key, suite
from experiments.bench.peers import loaded, minimal, resident, two_runs, usual, whole_suite
from experiments.check.papers import work
from experiments.check.rates import LAUNCHES, convolution, gflop, launches, lstm, recorded
from experiments.cli import RunFailed
from experiments.config import ConfigError
from experiments.launching.devices import device
from experiments.train import make_bundle
from experiments.trainer import Trainer

# An evaluation at each epoch's end, however many epochs a row takes; each image once per epoch, as in the usual loop.
EPOCHS = ("evaluate.every=null", "epochs=100000", "balanced=false", "drop_last=false")
CONVOLUTION = (64, 128, 16)  # batch, channels, size: of the fastest on two cores
END = {"net2c": (1500, ">= 3.3"), "net5c": (600, ">= 2.2"), "resnet18": (384, ">= 1.9")}  # images of an epoch, target

# Training steps: part, id, models, name and overrides, what it is over and the overrides of that, target for the ratio of times.
BN, SMALL = "norm=bn norm.eps=1e-3 norm.momentum=0.01", "norm=unitization batch_size=2"
VD, SHARED = "model.variational_dropout=true", "model.variational_dropout=true model.recurrent_mask=shared"
FP32, BF16, TF32 = ("channels_last=true precision=" + name for name in ("fp32", "bf16", "tf32"))
GRAPH = "precision=bf16 batch_size=150 balanced=false step="  # a balanced epoch reads the device
NETS, MIX = "mobilenet resnet18 vgg13 net5c net2c", "preact_resnet18"
STEPS = [
    ("step", "b", "net5c resnet18", "suite", "", "minimal loop", "", "<= 1.03"),
    ("methods", "C5", "net5c resnet18", "itdm_c", "method=itdm_c", "vanilla", "", "<= 2.05"),
    ("methods", "C5", "net5c", "itdm_j", "method=itdm_j", "vanilla", "", "<= 2.05"),
    ("methods", "C4", "net5c cnn11", "per", "method=per", "vanilla", "", "<= 2.5"),
    ("methods", "C4", "net5c cnn11", "per analytic", VARIANTS["per analytic"], "vanilla", "", "<= 1.10"),
    ("methods", "C4", "net5c cnn11", "per toeplitz", VARIANTS["per toeplitz"], "vanilla", "", "<= 1.6"),
    ("methods", "C7", "net5c cnn11", "vcl", "method=vcl", "vanilla", "", "<= 1.15"),
    ("methods", "C7", "net5c cnn11", "l1", "method=l1", "vanilla", "", "<= 1.10"),
    ("methods", "C7", "net5c cnn11", "l2", "method=l2", "vanilla", "", "<= 1.10"),
    ("methods", "C7", "net5c cnn11", "bn", VARIANTS["bn"], "no norm", "norm=none", "lower"),
    *[("methods", "C5", MIX, name, f"method={name}", "vanilla", "", "<= 1.03") for name in ("mixup", "cutmix", "lamix", "label_smoothing")],
    ("puzzle", "C6", MIX, "puzzlemix", "method=puzzlemix", "vanilla", "", "lower"),
    ("puzzle", "C6", MIX, "puzzlemix, clean_lam 1", "method=puzzlemix method.puzzlemix.clean_lam=1", "vanilla", "", "lower"),
    ("puzzle", "C6", MIX, "lamix_puzzle", "method=lamix_puzzle", "vanilla", "", "lower"),
    ("text", "C4", "lstm", "per", "method=per", "vanilla", "", "<= 1.15"),
    ("text", "C4", "lstm", "per analytic", VARIANTS["per analytic"], "vanilla", "", "<= 1.15"),
    *[("text", "C7", "lstm", name, f"method={name}", "vanilla", "", "<= 1.15") for name in ("l1", "l2")],
    ("text", "e", "lstm", "rbn", "norm=rbn", "no norm", "norm=none", "lower"),
    ("text", "e", "lstm", "loop", "model.loop=true", "fused layer", "", "lower"),
    ("text", "e", "lstm", "VD, a mask for each row", VD, "one for all rows", SHARED, "lower"),
    ("text", "e", "lstm", "VD, one mask for all rows", SHARED, "no dropout", "", "lower"),
    ("text", "e", "lstm", "tied embeddings", "model.tie_embeddings=true", "untied", "", "lower"),
    ("text", "e", "lstm", "bf16", "precision=bf16", "fp32", "", "lower"),
    ("norms", "e", "preact_resnet20", "unitization", "norm=unitization", "bn", BN, "<= 1.35"),
    ("norms", "e", "preact_resnet20", "gn", "norm=gn", "bn", BN, "lower"),
    ("norms", "e", "preact_resnet20 preact_resnet110", "unitization", SMALL, "bn", f"{BN} batch_size=2", "lower"),
    ("gpu", "e", "preact_resnet20 preact_resnet110", "unitization, graph", f"{SMALL} step=graph", "eager", SMALL, "lower"),
    ("precision", "d", "resnet18 net5c", "bf16 NHWC", BF16, "fp32 NCHW", "channels_last=false precision=fp32", "lower"),
    ("precision", "d", "resnet18 net5c", "fp32 NHWC", FP32, "fp32 NCHW", "channels_last=false precision=fp32", "lower"),
    ("gpu", "d", "resnet18 net5c", "tf32 NHWC", TF32, "fp32 NHWC", FP32, "lower"),
    ("gpu", "G2", NETS, "graph", f"{GRAPH}graph", "eager", f"{GRAPH}eager", "lower"),
]


class Case(NamedTuple):
    """A row of the table: its two sides, made when it is measured; `work` and `unit` as in `compare`."""

    id: str
    what: str
    over: str
    good: str
    a: Callable[[], Side]
    b: Callable[[], Side]
    work: Sequence[float] = ()
    unit: str = ""


def title(model: str, cfg: DictConfig) -> str:
    """A row's setting in words, such as "net5c b150"."""
    return f"{model} b{cfg.batch_size}" + ("" if cfg.precision == "fp32" else f" {cfg.precision}")


def steps(part: str, asked: Asked) -> Iterator[Case]:
    """The rows of STEPS."""
    rows = [row for row in STEPS if row[0] == part]
    for model in asked.models(*dict.fromkeys(" ".join(row[2] for row in rows).split())):
        for _, row_id, models, what, words, over, others, good in rows:
            method = next((word.partition("=")[2] for word in words.split() if key(word) == "method"), "vanilla")
            fits = model in models.split() or (asked.given("model") and models != "lstm")
            if fits and method in asked.methods:
                cfg, plain = asked.cfg(model, *words.split()), asked.cfg(model, *others.split())
                other = minimal if over == "minimal loop" else suite
                yield Case(row_id, f"{title(model, plain)}, {what}", over, good, partial(suite, cfg), partial(other, plain))


def end(asked: Asked) -> Iterator[Case]:
    """Epochs of the whole suite against the usual training loop's: by default for speed, and in float32 as the usual loop is."""
    for model in asked.models("net2c", "net5c", "resnet18"):
        images, good = END.get(model, (384, "higher"))
        few = [*EPOCHS, *([] if asked.given("dataset.train") else [f"dataset.train={images}", f"profile.test={images // 5}"])]
        exact = asked.cfg(model, *few, "precision=fp32")
        for precision, target in (("bf16", good), ("fp32", "higher")):
            cfg, what = asked.cfg(model, *few, f"precision={precision}"), f"{title(model, exact)} {precision}, suite"
            yield Case("C1", what, "usual loop, fp32", target, partial(whole_suite, cfg), partial(usual, exact), (1, 1), "epochs")


def use(asked: Asked) -> Iterator[Case]:
    """A training step's arithmetic in a second, against a large convolution's: how much of the machine is used."""
    batch, channels, size = CONVOLUTION
    for model in asked.models("resnet18", "net5c", "net2c"):
        cfg = asked.cfg(model, "precision=bf16")
        bundle = make_bundle(cfg, "cpu")
        flop, hidden, *_ = work(OmegaConf.to_yaml(cfg.model), *bundle.splits["train"][0].shape[1:])
        flops = 3 * cfg.batch_size * (flop + 2 * hidden * bundle.num_classes) / 1e9, gflop(*CONVOLUTION)
        good = {"net5c": ">= 0.75", "resnet18": ">= 0.8"}.get(model, "higher")
        best = partial(convolution, *CONVOLUTION, torch.device(device(cfg.runtime)))
        yield Case(
            "C2", f"{title(model, cfg)}, step", f"conv {channels}x{size}x{size} b{batch}", good, partial(suite, cfg), best, flops, "GFLOP"
        )


def inputs(asked: Asked) -> Iterator[Case]:
    """Images augmented and normalised."""
    (model,) = asked.models("resnet18")
    cfg = asked.cfg(model, *([] if asked.given("batch_size") else ["batch_size=128"]))
    for workers, good in ((0, "higher"), (2, ">= 12")):
        sides = partial(resident, cfg), partial(loaded, cfg, workers)
        yield Case("C3", f"{title(model, cfg)}, images", f"{workers}-worker DataLoader", good, *sides, (1, 1), "passes")


def puzzle(asked: Asked) -> Iterator[Case]:
    """PuzzleMix's step, and the same without masks and transport: what is left is its pass for saliency."""
    yield from steps("puzzle", asked)
    for model in asked.models("preact_resnet18"):
        cfg, plain = asked.method(model, "puzzlemix"), asked.cfg(model)
        what, unmasked = f"{title(model, cfg)}, puzzlemix", partial(suite, cfg, without_masks)
        yield Case("C6", f"{what} without masks", "vanilla", "<= 1.65", unmasked, partial(suite, plain))
        yield Case("C6", what, "without masks", "<= 1.33", partial(suite, cfg), unmasked)  # a quarter of its time


def without_masks(trainer: Trainer) -> None:
    """PuzzleMix averages the images of a pair."""
    method: Any = trainer.regularizers["puzzlemix"]

    def mix(batch, partner, lam, net):  # type: ignore[no-untyped-def]
        saliency = method.saliency(batch, net)
        return 0.5 * (batch.x + batch.x[partner]), torch.full_like(saliency[:, 0, 0], 0.5)

    method.mix = mix


FIRST_STEP_DONE = 99
# python -m experiments.train, left for good when the loss of the first step has been read
FIRST_STEP = f"""
import os
from experiments import cli, train
from experiments.trainer import Trainer
step = Trainer.take_step
Trainer.take_step = lambda self, *samples: (step(self, *samples), float(next(iter(self.sums.values()))), os._exit({FIRST_STEP_DONE}))
cli.main(train.train, "config")
"""


def start(asked: Asked) -> Iterator[Case]:
    """How long a process takes: until it prints --help, and until the first training step is done, its folder open and data read."""
    (model,) = asked.models("net5c")
    floor, first = partial(process, "-c", "import torch"), partial(process, "-c", FIRST_STEP, *asked.words(model), "runtime.runs=FOLDER")
    yield Case("C10", "train --help", "import torch", "a <= 500", partial(process, "-m", "experiments.train", "--help"), floor)
    yield Case("C10", "first training step", "import torch", "a <= 4000", first, floor)


def process(*arguments: str) -> Side:
    """A Python process, from its beginning to its end; FOLDER is an empty one. Raises ConfigError or RunFailed, in its own words."""

    def step() -> None:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, *(word.replace("FOLDER", folder) for word in arguments)]
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != (FIRST_STEP_DONE if FIRST_STEP in arguments else 0):
            message = (done.stderr.strip().splitlines() or ["it ended without a step"])[-1].removeprefix("retable: ")
            raise (ConfigError if done.returncode == 2 else RunFailed)(message)

    return Side(step, torch.device("cpu"))


def sweep(asked: Asked) -> Iterator[Case]:
    """Two short runs, one thread each, against the same two with all threads, one after the other."""
    for model in asked.models("net2c", "net5c"):
        cfg = asked.cfg(model, *EPOCHS, "profile.test=100", "precision=bf16")
        sides = partial(two_runs, cfg, at_once=True), partial(two_runs, cfg, at_once=False)
        yield Case("C11", f"{title(model, cfg)}, 2 at once", "in turn", ">= 1.1", *sides, (2, 2), "epochs")


def gpu(asked: Asked) -> Iterator[Case]:
    """What every estimate of a step's time on a GPU starts from, and what helps there; nothing without a GPU."""
    place = device(asked.cfg(asked.models("net5c")[0]).runtime)
    if place == "cpu":
        return
    where = torch.device(place)
    small, large = partial(launches, where), partial(convolution, 150, 256, 32, where)
    yield Case("G0", "small operations, graph", "eager", "higher", lambda: recorded(small()), small, [LAUNCHES] * 2, "launches")
    for channels in (16, 64, 512):
        gflops = gflop(150, channels, 32), gflop(150, 256, 32)
        conv = partial(convolution, 150, channels, 32, where)
        yield Case("G0", f"conv {channels}x32x32 b150", "conv 256x32x32 b150", "higher", conv, large, gflops, "GFLOP")
    yield Case(
        "G0", "LSTM 2x650, T35, b20, bf16", "fp32", "lower", partial(lstm, torch.bfloat16, where), partial(lstm, torch.float32, where)
    )
    yield from steps("gpu", asked)


PARTS: dict[str, Callable[[Asked], Iterator[Case]]] = {"end": end, "use": use, "input": inputs}
PARTS |= {name: partial(steps, name) for name in ("step", "methods", "text", "norms", "precision")}
PARTS |= {"puzzle": puzzle, "start": start, "sweep": sweep, "gpu": gpu}
