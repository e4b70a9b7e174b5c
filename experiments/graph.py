"""The whole step in one CUDA graph: recorded once, then replayed, which costs the host one call instead of hundreds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable

import torch
from torch import Generator, Tensor

Step = Callable[..., None]
WARM_UP = 3


class Replayed:
    """A step that takes index tensors and returns nothing, replayed from a recording once a few calls have been made.

    The first calls run as they are: they are steps of the run like any other, and leave what a recording must find ready (the
    optimizer's state, cuDNN's choices, library handles). So does a batch of another size: an epoch's last one. Whatever the step
    reads from the host is recorded as it was then, so all that changes between steps must be a tensor on the device: the
    samples, the learning rate, and the generators, whose registered state moves on at every replay. Where a step branches on what the
    host knows, there is a recording for each branch. All recordings share one memory pool, so together they take about the
    memory of the largest: no step reads what an earlier step left in the pool.
    """

    def __init__(self, step: Step, rngs: Iterable[Generator]) -> None:
        self.step, self.rngs = step, list(rngs)
        self.chosen: tuple[Tensor, ...] = ()
        self.calls: Counter[Hashable] = Counter()
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}

    def __call__(self, branch: Hashable, *chosen: Tensor) -> None:
        if not self.chosen:
            self.chosen = tuple(one.clone() for one in chosen)
        if chosen[0].shape != self.chosen[0].shape:
            self.step(*chosen)
            return
        self.calls[branch] += 1
        if self.calls[branch] <= WARM_UP:
            aside(lambda: self.step(*chosen))
            return
        for kept, one in zip(self.chosen, chosen, strict=True):
            kept.copy_(one)
        if branch not in self.graphs:
            first = next(iter(self.graphs.values()), None)
            self.graphs[branch] = record(lambda: self.step(*self.chosen), self.rngs, first)
        self.graphs[branch].replay()


def aside(work: Callable[[], None]) -> None:
    """On a stream of its own, as what is to be recorded must have run before (torch's notes on CUDA graphs)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)


def record(work: Callable[[], None], rngs: Iterable[Generator], first: torch.cuda.CUDAGraph | None = None) -> torch.cuda.CUDAGraph:
    """Record the kernels that `work` launches as a CUDA graph, without running them. first: a graph whose memory pool it shares."""
    graph = torch.cuda.CUDAGraph()
    for rng in rngs:
        graph.register_generator_state(rng)
    with torch.cuda.graph(graph, pool=None if first is None else first.pool()):
        work()
    return graph
