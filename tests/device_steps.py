"""Training steps on a device that this machine lacks, on tensors without values: what such a step must not do is seen all the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from typing import Any

import pytest
import torch
from nets import IMAGE, TEXT, small
from test_trainer import config
from torch import Generator, Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from experiments import trainer as trainers
from experiments.bench.counts import READING
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
    "puzzlemix, clean": on_digits("puzzlemix", "method.puzzlemix.clean_lam=1", "method.puzzlemix.t_size=null"),
    "lamix_puzzle, mask": on_digits("lamix_puzzle", "method.lamix_puzzle.local_label=mask_ratio", "method.lamix_puzzle.beta=0.5"),
    "per, bf16": on_digits("per", "precision=bf16"),
    "per, toeplitz": on_digits("per", "method.per.directions=toeplitz", "method.per.spatial=samples"),
    "per, analytic": on_digits("per", "method.per.mode=analytic", "method.per.batch_reduction=mean"),
    "vcl, bf16": on_digits("vcl", "precision=bf16"),
    "three": on_digits("[itdm_j,l1,lamix]", "method.itdm_j.bandwidth=2", "method.lamix.global_label=uniform", "optim.clip=1"),
    "vcl, pixels": [*small("lenet"), "dataset.standardise=pixels", "method=vcl"],
    "lstm, bf16": [*small("lstm"), "method=per", "precision=bf16"],
    "lstm, fused": [*small("lstm"), "model.recurrent_mask=shared", "method=[per,label_smoothing]", "precision=bf16"],
    "lstm, normalised": [*small("lstm"), "norm=rbn", "optim.clip=1", "optim.clip_each=true"],
}


class Forbidden(AssertionError):
    """A step did what it must not; the traceback says where."""


def tensors(*values: Any) -> list[Tensor]:
    """All of them, however nested."""
    return [one for one in tree_leaves(values) if isinstance(one, Tensor)]


def by_name(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a call."""
    return dict(zip((one.name for one in func._schema.arguments), args, strict=False)) | (kwargs or {})


def waits(func: Any, given: dict[str, Any]) -> str | None:
    """What makes the host wait for the device, or for its own copy of a constant to have left for it."""
    name = func.overloadpacket.__name__
    if name in {*READING, "_linalg_check_errors"} or (name == "repeat_interleave" and given.get("output_size") is None):
        return "the host waits for values"
    if any(index.dtype in (torch.bool, torch.uint8) for index in tensors(given.get("indices")) if "index" in name):
        return "the host waits for the number of places in a mask"
    return "a constant comes from the host" if name.startswith("lift") else None


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
        for one in tree_leaves(given):
            if isinstance(one, Generator) and one._cdata not in self.rngs:
                raise Forbidden(f"{func}: the generator is not registered")
            if isinstance(one, Tensor):
                plain.append((one.shape, one.dtype, None if place(one) in self.made else place(one)))
            elif not isinstance(one, Generator):
                plain.append(repr(one))
        if func.namespace != "profiler":
            self.calls.append((str(func), *plain))
        result = func(*args, **(kwargs or {}))
        self.made |= {*map(place, tensors(result))} - {*map(place, tensors(given))}
        return result


def place(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


class Elsewhere(TorchDispatchMode):
    """Runs what concerns tensors of the device without values, and everything else as it is.

    device: "cuda", by torch's fake tensors, which cannot go backward without a GPU; or "meta", which can.
    What the host reads while a trainer is built, is made up. Within `checked`, all must happen on the device and pass the checks.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.place = device, "cuda:0" if device == "cuda" else device
        self.checks: tuple[Check, ...] = ()
        self.fake: AbstractContextManager[Any] = nullcontext()
        if device == "cuda":
            from torch._subclasses import FakeTensorMode  # takes seconds to import

            self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given, name = by_name(func, args, kwargs), func.overloadpacket.__name__
        here = [one.device.type == self.device for one in tensors(given)]
        where = given.get("device") and torch.device(given["device"]).type
        if self.checks:
            faults = [] if all(here) else ["a tensor of the host's takes part"]
            faults += ["the result is on the host"] if where == "cpu" else []
            faults += [fault for check in self.checks if (fault := check(func, given)) is not None]
            if faults:
                raise Forbidden(f"{func}: {faults[0]}")
        elif any(here) and name == "_local_scalar_dense":
            return 20
        elif any(here) and name == "bincount":
            return args[0].new_empty(given["minlength"])
        if name == "_fused_sgd_" and self.device == "meta":  # which has no kernel for it
            return None
        if name == "_standard_gamma" and any(here):  # nor has either in torch before 2.15
            return torch.empty_like(args[0])
        with self.fake if any(here) or where == self.device else nullcontext():
            result = func(*args, **(kwargs or {}))
        if self.checks and any(one.device.type != self.device for one in tensors(result)):
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
def elsewhere(device: str) -> Iterator[Elsewhere]:
    """Within it, trainers can be made on this device. Their generators stay on the CPU."""
    lifting = torch._C._only_lift_cpu_tensors()
    with pytest.MonkeyPatch.context() as patch, Elsewhere(device) as mode:
        patch.setattr(trainers, "generator", lambda seed, name, _: generator(seed, name, "cpu"))
        patch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())  # would ask the GPU for its state
        patch.setattr(nn.Module, "_apply", apply)
        if device == "cuda":
            if not torch.cuda.is_available():
                patch.setattr(torch.cuda, "_lazy_init", lambda: None)
            patch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
            patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
            patch.setattr(torch.backends.cudnn, "enabled", False)  # an LSTM would ask for its version; torch's own kernels stand in for it
            # Where a step up to its loss goes backward, the gradients have the right shapes.
            patch.setattr(torch.autograd, "grad", lambda loss, x: (torch.empty_like(x),))
            patch.setattr(Tensor, "backward", lambda loss, inputs: [setattr(one, "grad", torch.empty_like(one)) for one in inputs])
            torch._C._set_only_lift_cpu_tensors(True)  # else torch.tensor(..., device="cuda") would go to the GPU by itself
        else:  # where there is neither autocast nor a fused optimizer
            patch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
            patch.setattr(torch, "is_autocast_enabled", lambda device: False)
            patch.setattr(import_module("torch.optim.optimizer"), "_get_fused_kernels_supported_devices", lambda: [device])
        try:
            yield mode
        finally:
            torch._C._set_only_lift_cpu_tensors(lifting)
            torch.use_deterministic_algorithms(False)


def apply(module: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """nn.Module._apply, which would write over parameters where fake tensors can only take their place."""
    known: dict[Tensor, Tensor] = {}  # what modules share they go on sharing
    with torch.no_grad():
        for slots in itertools.chain.from_iterable((each._parameters, each._buffers) for each in module.modules()):
            for name, one in slots.items():
                if one is not None and one not in known:
                    known[one] = nn.Parameter(convert(one)) if isinstance(one, nn.Parameter) else convert(one)
                slots[name] = None if one is None else known[one]
    return module


def made_on(mode: Elsewhere, words: list[str]) -> Trainer:
    """The trainer of these overrides, on the device."""
    made = make_trainer(config(*words), mode.place)
    if mode.device == "meta" and made.cfg.precision == "bf16":  # for want of autocast, the network itself is
        for parameter in made.net.parameters():
            parameter.data = parameter.data.bfloat16()
        made.net.features.register_forward_pre_hook(lambda _, given: given[0].bfloat16() if given[0].is_floating_point() else None)
    return made


def branches(made: Trainer) -> dict[Hashable, int]:
    """What its steps branch on, each with the number of a step that does so."""
    return {tuple(method.choose(step) for method in made.regularizers.values()): step for step in range(24)}


def take_steps(mode: Elsewhere, made: Trainer, *checks: Check) -> None:
    """A step of each kind; on fake CUDA tensors up to the loss."""
    samples = next(iter(made.samples()))
    for step in branches(made).values():
        for method in made.regularizers.values():
            method.choose(step)
        with mode.checked(*checks):
            batches = made.take(*samples)
            (made.train_step if mode.device == "meta" else made.loss)(*batches)
