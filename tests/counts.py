"""What a step does, counted: operations sent to the device, those that make the host wait, bytes held for the backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from experiments.check.papers import NO_WORK

READING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "_unique2", "unique_dim", "unique_consecutive"}


def waits(func: Any, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> bool:
    """Whether an operation, as `__torch_dispatch__` gets it, makes the host wait for values of a GPU's tensors."""
    name = func.overloadpacket.__name__
    if "index" in name and len(args) > 1 and isinstance(args[1], list | tuple):  # how many a mask takes must be known
        return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return name in READING or (name == "repeat_interleave" and (kwargs or {}).get("output_size") is None)


class Calls(TorchDispatchMode):
    """Within it: the names of all operations, of those that do work on the device, and of those that make the host wait for it.

    Torch's dispatcher sees them below autograd. What a CPU tensor hands out without an operation (`tolist`, `numpy`) stays unseen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.kernels: list[str] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.names.append(str(func))
        if not (func.is_view or name.startswith(NO_WORK)):
            self.kernels.append(name)
        if waits(func, args, kwargs):
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


def count(step: Callable[[], object]) -> tuple[int, int]:
    """How many operations a step sends to the device, and how many of them make the host wait."""
    with Calls() as seen:
        step()
    return len(seen.kernels), len(seen.waits)


def usual_count(step: Callable[[], object]) -> tuple[int, int]:
    """The median of three steps, of which at most one also shuffles an epoch, after a first one."""
    return sorted(count(step) for _ in range(4))[2]


def kept(step: Callable[[], object]) -> int:
    """Bytes that a step has made and still holds when its backward begins, each storage once.

    Whoever holds them, and for whatever reason: autograd what its formulas need, a hook what its function refers to, the step its own
    variables. What was there before, such as the weights, is left out.
    """
    step()  # a first one may still lay out the weights anew
    made: dict[int, StorageWeakRef] = {}
    total: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not total and torch._C._current_graph_task_id() >= 0:  # the first operation of the backward
                alive = [UntypedStorage._new_with_weak_ptr(storage.cdata) for storage in made.values()]
                total.append(sum(storage.nbytes() for storage in alive if storage is not None))
            result = func(*args, **(kwargs or {}))
            given, new = ({x.untyped_storage() for x in tree_leaves(v) if isinstance(x, Tensor)} for v in ((args, kwargs), result))
            if not total:
                old = {storage._cdata for storage in given}  # a view, or an operation in place, makes nothing
                made.update({storage._cdata: StorageWeakRef(storage) for storage in new if storage._cdata not in old})
            return result

    with Watch():
        step()
    return total[0]
