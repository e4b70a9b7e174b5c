"""What a training step sends to a device, seen without that device: by torch's dispatcher on a CPU, and on meta tensors."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import Any

import counts
import pytest
import torch
from counts import Calls
from nets import IMAGE, TEXT, small
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trainers import config, trainer

from experiments import trainer as trainers
from experiments.config import options
from experiments.rng import generator
from experiments.train import make_trainer
from experiments.trainer import Trainer

Check = Callable[[Any, dict[str, Any]], str | None]  # (operation, its arguments by name) -> what is wrong with it

# Iterations of PuzzleMix's solver, where more would do the same again.
FEW = {name: ["method.puzzlemix.mask_iters=16"] for name in ("puzzlemix", "[puzzlemix,lamix]")}
FEW["lamix_puzzle"] = ["method.lamix_puzzle.puzzle.mask_iters=16"]


def on_digits(method: str, *more: str) -> list[str]:
    return [*small("net2c"), f"method={method}", *FEW.get(method, []), *more]


# All methods, all models, and options that lead a step elsewhere.
CASES = {name: on_digits(name) for name in options("method")}
CASES |= {model: small(model) for model in (*IMAGE, *TEXT) if model != "net2c"}
CASES |= {
    "itdm_c, unbalanced": on_digits("itdm_c", "balanced=false", "method.itdm_c.bandwidth=offdiag", "channels_last=false"),
    "itdm_c, bf16": on_digits("itdm_c", "precision=bf16", "method.itdm_c.bandwidth=cross", "norm=gn"),
    "mixup, bce": on_digits("mixup", "loss=bce", "norm=unitization"),
    "puzzlemix, bce": on_digits("puzzlemix", "loss=bce", "method.puzzlemix.prob=0.5"),
    "lamix_puzzle, mask": on_digits("lamix_puzzle", "method.lamix_puzzle.local_label=mask_ratio", "method.lamix_puzzle.beta=0.5"),
    "per, bf16": on_digits("per", "precision=bf16"),
    "per, toeplitz": on_digits("per", "method.per.directions=toeplitz", "method.per.spatial=samples"),
    "per, analytic": on_digits("per", "method.per.mode=analytic", "method.per.batch_reduction=mean"),
    "three": on_digits("[itdm_j,l1,lamix]", "method.itdm_j.bandwidth=2", "method.lamix.global_label=uniform", "optim.clip=1"),
    "vcl, pixels": [*small("lenet"), "dataset.standardise=pixels", "method=vcl"],
    "lstm, fused": [*small("lstm"), "model.recurrent_mask=shared", "method=[per,label_smoothing]", "precision=bf16"],
    "lstm, normalised": [*small("lstm"), "norm=rbn", "optim.clip=1", "optim.clip_each=true"],
}


class Forbidden(AssertionError):
    """A step did what it must not; the traceback says where."""


def tensors(*values: Any) -> list[Tensor]:
    return [one for one in tree_leaves(values) if isinstance(one, Tensor)]


def by_name(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    return dict(zip((one.name for one in func._schema.arguments), args, strict=False)) | (kwargs or {})


def waits(func: Any, given: dict[str, Any]) -> str | None:
    """What makes the host wait for the device, or for its own copy of a constant to have left for it."""
    name = func.overloadpacket.__name__
    if counts.waits(func, [*given.values()], given) or name == "_linalg_check_errors":
        return "the host waits for values"
    return "a constant comes from the host" if name.startswith("lift") else None


def step_calls(*overrides: str) -> tuple[Calls, Calls]:
    """The calls of the second training step, and of its optimizer alone."""
    made = trainer(*overrides)
    samples = made.endless()
    made.take_step(*next(samples))
    chosen = next(samples)
    with Calls() as whole:
        made.take_step(*chosen)
    with Calls() as update:
        made.optimizer.step()
    return whole, update


class Run(TorchDispatchMode):
    """What is sent to the device, taking the CPU for one: of each operation its name, its tensors' shapes, types and places, its numbers.

    Fails where the host reads, or sends a constant, and at draws of another generator than these, or torch's own.
    """

    def __init__(self, rngs: list[Generator]) -> None:
        super().__init__()
        self.rngs, self.calls = {one._cdata for one in rngs}, []  # by address: what is handed in here is another wrapper
        self.made: set[int] = set()  # memory, whose place may be another one each time

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = by_name(func, args, kwargs)
        if (fault := waits(func, given)) is not None:
            raise Forbidden(f"{func}: {fault}")
        plain = []
        for value in tree_leaves(given):
            if isinstance(value, Generator) and value._cdata not in self.rngs:
                raise Forbidden(f"{func}: the generator is not registered")
            if isinstance(value, Tensor):
                plain.append((value.shape, value.dtype, None if place(value) in self.made else place(value)))
            elif not isinstance(value, Generator):
                plain.append(repr(value))
        if func.namespace != "profiler":
            self.calls.append((str(func), *plain))
        result = func(*args, **(kwargs or {}))
        self.made |= {*map(place, tensors(result))} - {*map(place, tensors(given))}
        return result


def place(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


class Meta(TorchDispatchMode):
    """Takes meta tensors for those of a device. Values that the host reads while a trainer is built are made up.

    Within `checked`, all must happen on the device and pass the checks.
    """

    checks: tuple[Check, ...] = ()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given, name = by_name(func, args, kwargs), func.overloadpacket.__name__
        here = [one.is_meta for one in tensors(given)]
        if self.checks:
            faults = [] if all(here) else ["a tensor of the host's takes part"]
            faults += ["the result is on the host"] if str(given.get("device")) == "cpu" else []
            faults += [fault for check in self.checks if (fault := check(func, given)) is not None]
            if faults:
                raise Forbidden(f"{func}: {faults[0]}")
        elif any(here) and name == "_local_scalar_dense":
            return 20
        elif any(here) and name == "bincount":
            return args[0].new_empty(given["minlength"])
        if name in ("_fused_sgd_", "_standard_gamma") and any(here):  # they have no kernel for meta tensors, the latter before torch 2.15
            return None if name == "_fused_sgd_" else torch.empty_like(args[0])
        result = func(*args, **(kwargs or {}))
        if self.checks and not all(one.is_meta for one in tensors(result)):
            raise Forbidden(f"{func}: the result is on the host")
        return result

    @contextmanager
    def checked(self, *checks: Check) -> Iterator[None]:
        self.checks = checks
        try:
            yield
        finally:
            self.checks = ()


@contextmanager
def elsewhere() -> Iterator[Meta]:
    """Within it, trainers can be made on meta tensors. Their generators stay on the CPU."""
    with pytest.MonkeyPatch.context() as patch, Meta() as mode:
        patch.setattr(trainers, "generator", lambda seed, name, _: generator(seed, name, "cpu"))
        # There is neither autocast nor a fused optimizer.
        patch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
        patch.setattr(torch, "is_autocast_enabled", lambda device: False)
        patch.setattr(import_module("torch.optim.optimizer"), "_get_fused_kernels_supported_devices", lambda: ["meta"])
        try:
            yield mode
        finally:
            torch.use_deterministic_algorithms(False)


def on_meta(words: list[str]) -> Trainer:
    """The trainer of these overrides; with bf16, for want of autocast, the network itself is."""
    made = make_trainer(config(*words), "meta")
    if made.cfg.precision == "bf16":
        for parameter in made.net.parameters():
            parameter.data = parameter.data.bfloat16()
        made.net.features.register_forward_pre_hook(lambda _, given: given[0].bfloat16() if given[0].is_floating_point() else None)
    return made


def branches(made: Trainer) -> dict[Hashable, int]:
    """What its steps branch on, each with the number of a step that does so."""
    return {tuple(method.choose(step) for method in made.regularizers.values()): step for step in range(24)}


def take_steps(mode: Meta, made: Trainer, *checks: Check) -> None:
    """A step of each kind."""
    samples = next(iter(made.samples()))
    for step in branches(made).values():
        for method in made.regularizers.values():
            method.choose(step)
        with mode.checked(*checks):
            made.step_on(*samples)
