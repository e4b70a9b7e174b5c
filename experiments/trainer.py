"""The training of one run, read top to bottom: the step, the epoch, the evaluation, the state."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol

import torch
from omegaconf import DictConfig
from torch import Tensor

from data.bundle import Batch, Bundle
from experiments.config import ConfigError, first_line
from experiments.graph import Replayed
from experiments.length import Length
from experiments.loss import LOSSES
from experiments.metrics import Metrics, means, perplexity
from experiments.optim import SGD, Schedule, clip, groups
from experiments.rng import generator
from models.net import Net, record
from regularizers.base import Pass, Regularizer

Row = dict[str, float]


class Probe(Protocol):
    """What is measured besides: nothing that it does may change the training."""

    def begin(self, trainer: Trainer) -> Row:
        """At an epoch's start: remember it; what is returned, if anything, becomes a row of its own."""

    def end(self, trainer: Trainer) -> Row:
        """At an epoch's end, added to its row."""


class Diverged(ArithmeticError):
    """Training left the numbers: a recorded outcome of the run."""


class Trainer:
    """Trains `net` on `bundle` with the given methods, which it knows by their four stages only.

    rows: one entry per evaluation so far: step, epoch, lr, the training terms' means since the last one, and the test metrics.
    """

    def __init__(
        self,
        cfg: DictConfig,
        bundle: Bundle,
        net: Net,
        regularizers: dict[str, Regularizer],
        schedule: Schedule,
        probe: Probe | None = None,
    ) -> None:
        self.cfg, self.bundle, self.net, self.schedule, self.probe = cfg, bundle, net, schedule, probe
        self.regularizers = {name: method for name, method in regularizers.items() if method.active}
        self.device = bundle.splits["train"][1].device
        self.rngs = {name: generator(cfg.seed, name, self.device) for name in ("data", "second", *self.regularizers)}
        for name, method in self.regularizers.items():
            method.rng = self.rngs[name]
        self.wants_second = any(method.second_batch for method in self.regularizers.values())
        self.repeats = max((method.steps_per_batch for method in self.regularizers.values()), default=1)

        try:
            full = bundle.steps(bundle.epoch_size(cfg.balanced), cfg.batch_size, cfg.drop_last)
        except ValueError as error:
            raise ConfigError(first_line(error)) from error
        self.length = Length(cfg, self.repeats * full)
        self.steps_per_epoch, self.epochs = self.length.steps_per_epoch, self.length.epochs
        self.evaluations = frozenset(self.length.evaluations(cfg.evaluate.every, cfg.evaluate.dense))
        self.epoch = self.step = 0
        self.clock = 0  # steps taken: `step`, and those that a clock times
        self.passes = self.forwarded = 0  # what was spent: forward-backward passes, and samples in them
        self.rows: list[Row] = []
        self.sums: dict[str, Tensor] = {}
        self.target: Tensor  # what the last step's loss read
        self.since = 0  # the step of the last evaluation
        self.seconds = 0.0  # spent training and evaluating

        self.activations, self.preactivations = record(net), record(net, pre=True)
        methods = self.regularizers.values()
        self.recorded = any(method.activations for method in methods), any(method.preactivations for method in methods)
        self.prepare_methods()
        if cfg.compile and (edit := [name for name, method in self.regularizers.items() if method.edits]):
            raise ConfigError(f"compile: true does not go with method {edit[0]}, which edits the backward pass; allowed: false")
        if cfg.channels_last:
            self.net.to(memory_format=torch.channels_last)
        self.compiled = torch.compile(net.features, dynamic=False) if cfg.compile else net.features
        self.lr = math.nan  # none is set yet
        parameters = groups([net, *self.regularizers.values()], cfg.optim, self.device)
        self.optimizer = SGD(parameters, momentum=cfg.optim.momentum, nesterov=cfg.optim.nesterov, fused=True)
        self.replayed = Replayed(self.step_on, self.rngs.values()) if cfg.step == "graph" else None

    def prepare_methods(self) -> None:
        """Show each method one pass, so that it can size its parameters; in evaluation mode, which leaves the network as it is."""
        batch = next(iter(self.bundle.batches("train", 2)))
        self.net.eval()
        try:
            with torch.no_grad():
                example = self.forward(batch, *self.recorded)
        except RuntimeError as error:
            size = f"{'x'.join(map(str, batch.x.shape[1:]))} {self.bundle.unit}"
            raise ConfigError(f"model: {self.cfg.model._target_} does not take the data set's {size} ({first_line(error)})") from error
        self.net.train()
        for name, method in self.regularizers.items():
            if batch.y.dim() > 1 and not method.sequences:
                raise ConfigError(
                    f"method: {name} is for samples of one label each, and here every one of the {self.bundle.unit} has its own"
                )
            try:
                method.setup(example)
            except ValueError as error:
                raise ConfigError(f"method.{name}: {first_line(error)}") from error
            method.to(self.device)

    # the step, from the samples' indices on; nothing in it makes the host wait for the device

    def take_step(self, *samples: Tensor) -> None:
        """The step on these training samples: indices [n], and as many for the second batch if a method wants one."""
        branch = tuple(method.choose(self.clock) for method in self.regularizers.values())
        if self.replayed is None:
            self.step_on(*samples)
        else:
            self.replayed(branch, *samples)
        self.clock += 1

    def step_on(self, *samples: Tensor) -> None:
        """What of it goes to the device."""
        self.train_step(*self.take(*samples))

    def take(self, first: Tensor, second: Tensor | None = None) -> tuple[Batch, Batch | None]:
        balanced = self.cfg.balanced
        batch = self.bundle.take(first, self.rngs["data"], balanced)
        return batch, None if second is None else self.bundle.take(second, self.rngs["second"], balanced)

    def forward(self, batch: Batch, activations: bool = False, preactivations: bool = False) -> Pass:
        """Run the network on a batch. Activations and preactivations are recorded only if asked for."""
        self.activations.restart(activations)
        self.preactivations.restart(preactivations)
        x = batch.x if self.cfg.channels_last else batch.x.contiguous()
        with self.autocast():
            features = (self.compiled if self.net.training else self.net.features)(x)
            logits = self.net.classifier(features)
        return Pass(batch, features, logits, self.activations.seen(), self.preactivations.seen())

    def run(self, batch: Batch) -> Pass:
        for method in self.regularizers.values():
            with self.autocast():
                batch = method.transform(batch, self.net)
        return self.forward(batch, *self.recorded)

    def loss(self, batch: Batch, second: Batch | None) -> tuple[Tensor, dict[str, Tensor]]:
        """What the step minimises, and its terms: the loss on the first batch and each method's penalty."""
        out = self.run(batch)
        other = self.run(second) if second is not None else None  # a forward of its own: BN sees the two batches apart
        for method in self.regularizers.values():
            out = replace(out, batch=replace(out.batch, target=method.retarget(out)))
        self.target = out.batch.target.detach()
        logits, target = out.logits.float().flatten(0, -2), out.batch.target.flatten(0, out.logits.dim() - 2)
        terms = {self.cfg.loss: LOSSES[self.cfg.loss](logits, target)}
        for name, method in self.regularizers.items():
            if (penalty := method.penalty(out, other)) is not None:
                terms[name] = penalty
        return torch.stack(list(terms.values())).sum() if len(terms) > 1 else terms[self.cfg.loss], terms

    def train_step(self, batch: Batch, second: Batch | None) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss, terms = self.loss(batch, second)
        loss.backward()
        if self.cfg.optim.clip is not None:
            clip((p for group in self.optimizer.param_groups for p in group["params"]), self.cfg.optim.clip, self.cfg.optim.clip_each)
        self.optimizer.step()
        if self.target.is_floating_point():  # soft: the cross-entropy cannot fall below the target's own entropy
            terms["target_entropy"] = torch.special.entr(self.target).sum(-1).mean()
        for name, method in self.regularizers.items():
            terms |= {f"{name}/{key}": value for key, value in method.logged().items()}
        for name, term in terms.items():  # summed on the device, and read at the next evaluation
            if name not in self.sums:
                self.sums[name] = torch.zeros_like(term)
            self.sums[name].add_(term.detach())

    # the epoch

    def samples(self) -> Iterator[tuple[Tensor, ...]]:
        """The samples of this epoch's batches, each with those of its second one if a method wants it: an order of its own."""
        names = ("data", "second") if self.wants_second else ("data",)
        orders = [self.bundle.indices(self.rngs[name], self.cfg.batch_size, self.cfg.balanced) for name in names]
        taken = (samples for samples in zip(*orders, strict=True) for _ in range(self.repeats))
        return itertools.islice(taken, min(self.steps_per_epoch, self.length.steps - self.step))

    def endless(self) -> Iterator[tuple[Tensor, ...]]:
        """`samples` of one epoch after another, without end: for clocks and checks."""
        while True:
            yield from self.samples()

    def train_epoch(self, tick: Callable[[], object] = lambda: None) -> None:
        """One epoch. Calls `tick` after each step. Raises Diverged when an evaluation finds a loss that is no number."""
        began, start = time.perf_counter(), self.epoch * self.steps_per_epoch
        if self.probe is not None and (seen := self.probe.begin(self)):
            self.rows.append({"step": self.step, "epoch": float(self.epoch)} | seen)
        self.net.reset()
        history = self.history()
        for samples in self.samples():
            self.set_lr(history)
            self.take_step(*samples)
            self.step += 1
            passes = 1 + sum(method.passes for method in self.regularizers.values())
            self.passes += passes * len(samples)
            self.forwarded += passes * sum(map(len, samples))
            tick()
            if self.step in self.evaluations:
                self.rows.append(self.row(start))
        if self.probe is not None:
            self.rows[-1] |= self.probe.end(self)
        self.epoch += 1
        self.seconds += time.perf_counter() - began

    def history(self) -> list[float] | None:
        """The validation loss at the end of each epoch so far; None where nothing is held out."""
        ends = [row for row in self.rows if row["step"] and row["step"] % self.steps_per_epoch == 0]
        return [row["valid/ce"] for row in ends] if "valid" in self.bundle.splits else None

    def set_lr(self, history: list[float] | None) -> None:
        shown = self.length.shown(self.step)
        lr = self.cfg.optim.lr * self.schedule(shown / self.length.full, shown, history)
        if lr != self.lr:
            self.lr = lr
            for group in self.optimizer.param_groups:
                group["lr"].fill_(group["factor"] * lr)

    def row(self, start: int) -> Row:
        count = self.step - self.since
        row: Row = {"step": self.step, "epoch": self.epoch + (self.step - start) / self.steps_per_epoch, "lr": self.lr}
        row |= {f"train/{name}": value for name, value in means(self.sums, count).items()}
        if "train/ce" in row:
            row["train/perplexity"] = perplexity(row["train/ce"])
        for split in self.bundle.splits:
            if split != "train":
                row |= {f"{split}/{name}": value for name, value in self.evaluate(split).items()}
        self.since = self.step
        for name in (f"train/{self.cfg.loss}", "valid/ce", "test/ce"):
            if not math.isfinite(row.get(name, 0)):
                raise Diverged(f"{name} is {row[name]} at epoch {row['epoch']:.4g} (step {self.step})")
        return row

    # the evaluation

    def evaluate(self, split: str) -> dict[str, float]:
        """The metrics of a split."""
        return self.measure(self.bundle.batches(split, self.cfg.evaluate.batch_size))

    def measure(self, batches: Iterable[Batch]) -> dict[str, float]:
        """The metrics of these batches, in evaluation mode and from a fresh state."""
        self.net.eval()
        self.net.reset()
        metrics = Metrics(self.device)
        with torch.inference_mode():
            for batch in batches:
                metrics.add(self.forward(batch))
        self.net.train()
        return metrics.values()

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.cfg.precision == "bf16")

    def synchronise(self) -> None:
        """Wait for the device: for clocks only."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # the state

    def state(self) -> dict[str, Any]:
        """All that the rest of the run depends on, at the end of an epoch; tensors and plain values only."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "since": self.since,
            "passes": self.passes,
            "forwarded": self.forwarded,
            "seconds": self.seconds,
            "rows": self.rows,
            "net": self.net.state_dict(),
            "methods": {name: method.state_dict() for name, method in self.regularizers.items()},
            "optimizer": self.optimizer.state_dict(),
            "rngs": {name: rng.get_state() for name, rng in self.rngs.items()},
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        self.net.load_state_dict(state["net"])
        for name, method in self.regularizers.items():
            method.load_state_dict(state["methods"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, rng in self.rngs.items():
            rng.set_state(state["rngs"][name].cpu())
        torch.set_rng_state(state["torch"].cpu())
        if state["cuda"] is not None:
            torch.cuda.set_rng_state(state["cuda"].cpu(), self.device)
        for name in ("epoch", "step", "since", "passes", "forwarded", "seconds"):
            setattr(self, name, state[name])
        self.rows, self.lr = list(state["rows"]), math.nan
        self.clock = self.step
