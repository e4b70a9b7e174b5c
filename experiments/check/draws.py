"""Random numbers drawn on the CPU for any device, so that a run there can be compared with one on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

RANDOM = {"normal_", "uniform_", "bernoulli_", "random_", "rand", "randn", "randint", "randperm", "_standard_gamma"}


class DrawnOnCPU(TorchDispatchMode):
    """Computes random operations on the CPU and copies the results to the device.

    Each generator is replaced by a CPU generator of the same seed, so the numbers are those of a CPU run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.generators: dict[Generator | None, Generator] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if name not in RANDOM:
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(Generator, self.on_cpu, (args, kwargs))
        if not any(isinstance(one, Generator) for one in args):
            kwargs = {"generator": self.on_cpu(None)} | kwargs
        if not isinstance(source := args[0], Tensor):  # a size: a new tensor is made
            return func(*args, **kwargs | {"device": "cpu"}).to(kwargs.get("device") or "cpu")
        if name.endswith("_"):  # in place
            return source.copy_(func(torch.empty_like(source, device="cpu"), *args[1:], **kwargs))
        return func(source.cpu(), *args[1:], **kwargs).to(source.device)

    def on_cpu(self, generator: Generator | None) -> Generator:
        """The CPU's counterpart of a generator; of None, torch's default."""
        if generator not in self.generators:
            self.generators[generator] = Generator().manual_seed(0 if generator is None else generator.initial_seed())
        return self.generators[generator]
