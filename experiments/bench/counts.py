"""What a step does, counted: operations sent to the device, host reads, bytes held for the backward, arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from experiments.bench.sides import Row, Side
from experiments.config import build

# Besides views: allocations, the profiler's marks, and two views that torch does not call so.
NO_WORK = ("empty", "new_empty", "_record_function", "_unsafe_view", "as_strided_")
READING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "_unique2", "unique_dim", "unique_consecutive"}


def count(step: Callable[[], object]) -> tuple[int, int]:
    """How many operations a step sends to the device, and how many of them make the host wait for values.

    Seen by torch's dispatcher below autograd; what does no work on the device is left out.
    What a CPU tensor hands out without an operation (`tolist`, `numpy`) stays unseen; on a GPU it is a copy, which is seen.
    """
    calls = reads = 0

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal calls, reads
            name, kwargs = func.overloadpacket.__name__, kwargs or {}
            result = func(*args, **kwargs)
            calls += not (func.is_view or name.startswith(NO_WORK))
            if name == "_to_copy":
                reads += args[0].device.type != "cpu" and result.device.type == "cpu"
            elif "index" in name and len(args) > 1 and isinstance(args[1], list | tuple):  # how many a mask takes must be known
                reads += any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
            else:
                reads += name in READING or (name == "repeat_interleave" and kwargs.get("output_size") is None)
            return result

    with Counter():
        step()
    return calls, reads


def usual_count(step: Callable[[], object]) -> tuple[int, int]:
    """Calls and host reads of a step: the median of three, of which one at most also shuffles an epoch, after a first one."""
    step()
    calls, reads = zip(*(count(step) for _ in range(3)), strict=True)
    return sorted(calls)[1], sorted(reads)[1]


def kept(step: Callable[[], object]) -> int:
    """Bytes that a step has made and still holds when its backward begins, each storage once.

    Whoever holds them, and for whatever reason: autograd what its formulas need, a hook what its function refers to, the step its own
    variables. What was there before, such as the weights, is left out.
    """
    step()  # a first one may still lay out the weights anew
    made: dict[int, StorageWeakRef] = {}
    found: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not found and torch._C._current_graph_task_id() >= 0:  # the first operation of the backward
                found.append(sum(map(_alive, made.values())))
            result = func(*args, **(kwargs or {}))
            if not found:
                known = {one._cdata for one in _storages((args, kwargs))}  # a view, or an operation in place, makes nothing
                made.update({one._cdata: StorageWeakRef(one) for one in _storages(result) if one._cdata not in known})
            return result

    with Watch():
        step()
    return found[0]


def _storages(values: Any) -> list[UntypedStorage]:
    return [one.untyped_storage() for one in tree_leaves(values) if isinstance(one, Tensor)]


def _alive(storage: StorageWeakRef) -> int:
    """Its bytes, 0 if nobody holds it any more."""
    found = UntypedStorage._new_with_weak_ptr(storage.cdata)
    return 0 if found is None else found.nbytes()


def forward_gflop(cfg: DictConfig, shape: tuple[int, ...], num_classes: int) -> float:
    """Products and sums of a forward of images [N, C, H, W], counted without computing.

    A step is three times as much. The backward is not counted itself: torch's count of it is wrong for grouped convolutions.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        net = build(cfg.model, "model")(num_classes=num_classes)
        with FlopCounterMode(display=False) as counter:
            net(torch.empty(shape))
    return counter.get_total_flops() / 1e9


def calls_row(what: str, over: str, good: str, sides: tuple[Side, Side]) -> Row:
    """Calls of the first side's step over the second's, and host reads of both."""
    (calls_a, reads_a), (calls_b, reads_b) = (usual_count(side.step) for side in sides)
    return _row("C8", what, over, good, calls_a, calls_b, "calls") | {"reads a": reads_a, "reads b": reads_b}


def kept_row(what: str, over: str, good: str, sides: tuple[Side, Side], batch_size: int) -> Row:
    """Bytes per sample held when the backward of the first side's step begins over the second's."""
    a, b = (kept(side.step) // batch_size for side in sides)
    return _row("C9", what, over, good, a, b, "bytes/sample")


def peak_row(what: str, over: str, good: str, sides: tuple[Side, Side]) -> Row:
    """The most memory that is allocated on the GPU during the first side's step over the second's; both sides are there in both."""

    def peak(side: Side) -> int:
        torch.cuda.reset_peak_memory_stats(side.device)
        before = torch.cuda.memory_allocated(side.device)
        side.seconds(1)
        return torch.cuda.max_memory_allocated(side.device) - before

    a, b = (peak(side) for side in sides)
    return _row("C9", what, over, good, a, b, "peak bytes")


def _row(row_id: str, what: str, over: str, good: str, a: int, b: int, unit: str) -> Row:
    ratio = a / b
    names: Row = {"id": row_id, "what": what, "over": over, "ratio": ratio, "q1": ratio, "q3": ratio, "good": good, "note": ""}
    return names | {"count a": a, "count b": b, "unit": unit}
