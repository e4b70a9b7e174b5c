"""PuzzleMix's mask: our solver against the graph cut of the published code, alpha-beta swap. For development; pytest leaves it alone.

    python tests/compare_gco.py [DATA_DIR]

`pip install gco-wrapper` first: it has wheels up to Python 3.11 only, and its C++ code may be used for research only, so nothing here requires
it. The gaps are to the exact minimum with `pip install PyMaxflow`, else to the best that any of them found.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor

from experiments.bench.configs import composed
from experiments.cli import BAD_INPUT, one_line, stop
from experiments.provenance import commit, device_name
from experiments.train import make_trainer
from experiments.trainer import Trainer
from regularizers.mixing import pairing, ratio
from regularizers.puzzle_mask import Energy, energy, minimum
from regularizers.puzzlemix import FINEST, PuzzleMix

# A narrow network that has learnt something: the saliency of a fresh one is too even.
SETTING = (
    "experiment=lamix_random model=puzzle_resnet18 model.width=32 method=puzzlemix epochs=3 schedule.at=[2] batch_size=100 precision=bf16"
)
MACHINE = "profile.train=5000 profile.test=1000 runtime.device=cpu runtime.threads=2"
BATCHES, ROUNDS, NEAR = 4, 7, 1e-6
COLUMNS = ("n", "solver", "images", "overflow", "mean gap", "worst gap", "worse", "strictly", "same mask", "ms", "ms cut")
MEANING = f"""gap: how far the energy is above the least one, in parts of it. worse: images (in %) with more energy than gco's better one (of ours)
or than ours (of gco's), by over {NEAR:g} of it; strictly: images with any more at all. same mask (%): as ours. overflow (%): images with a cost
that gco's factor carries out of int32. ms: a batch's time for each image, median of {ROUNDS} rounds in turn; ms cut: without the scaling before"""

Image = tuple[np.ndarray, np.ndarray, np.ndarray]  # cost [n, n, 3], weight to the block below [n - 1, n], to the right [n, n - 1]
Cut = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # of gco: cost, the labels' matrix, and the two weights
SQUARES = np.subtract.outer(np.arange(3), np.arange(3)) ** 2  # of the differences of labels


def images(problem: Energy) -> list[Image]:
    """The batch's problems, one by one."""
    cost, down, right = (
        problem.cost.permute(3, 1, 2, 0),
        problem.weight[0, :-1].permute(2, 0, 1),
        problem.weight[1, :, :-1].permute(2, 0, 1),
    )
    return [*zip(*(part.contiguous().numpy() for part in (cost, down, right)), strict=True)]


def as_called(cost: np.ndarray, down: np.ndarray, right: np.ndarray) -> Cut:
    """What PuzzleMix's code gives to gco. The labels' matrix is a float one, so gco takes all for floats: costs times 100,000, in int32."""
    scale = 1000 * len(cost) ** 2
    labels = (SQUARES / 4).astype(np.float32)
    return (scale * cost[..., ::-1]).astype(np.int32), labels, (scale * down).astype(np.int32), (scale * right).astype(np.int32)


def in_range(cost: np.ndarray, down: np.ndarray, right: np.ndarray) -> Cut:
    """As many digits as int32 has, with room for sums; gco takes whole numbers as they are."""
    scale = 2**28 / max(cost.max(), down.max(), right.max())
    whole = [(scale * part).round().astype(np.int32) for part in (cost[..., ::-1], down / 4, right / 4)]
    return whole[0], SQUARES.astype(np.int32), whole[1], whole[2]


def swap(cut: Cut) -> np.ndarray:
    """The labels k, [n, n]; in the code's order, which starts from the first image, they are 2 - k."""
    import gco

    return 2 - gco.cut_grid_graph(*cut, algorithm="swap").reshape(cut[0].shape[:2])


def layered(cost: np.ndarray, down: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The exact minimum: one cut of two layers, k = x + x', as (k - l)^2 is the sum of |x - y| over both's layers, less 1 for k = 1 and l = 1."""
    import maxflow

    n = len(cost)
    place = np.arange(n * n).reshape(n, n)
    first = np.concatenate([place[:-1].ravel(), place[:, :-1].ravel()])
    second = np.concatenate([place[1:].ravel(), place[:, 1:].ravel()])
    v = np.concatenate([down.ravel(), right.ravel()]) / 4
    ends = np.bincount(first, v, n * n) + np.bincount(second, v, n * n)
    middle = cost[..., 1] - ends.reshape(n, n)
    graph = maxflow.GraphFloat()
    nodes = graph.add_grid_nodes((2, n, n))
    steps = np.stack([middle - cost[..., 0], cost[..., 2] - middle])
    graph.add_grid_tedges(nodes, np.maximum(-steps, 0), np.maximum(steps, 0))
    for one in (0, n * n):
        for other in (0, n * n):
            graph.add_edges(first + one, second + other, v, v)
    graph.maxflow()
    return (~graph.get_grid_segments(nodes)).sum(0)


def trained(arguments: list[str]) -> Trainer:
    words = [*SETTING.split(), *MACHINE.split(), *(f"runtime.data_dir={path}" for path in arguments)]
    trainer = make_trainer(composed(words))
    for _ in range(trainer.epochs):
        trainer.train_epoch()
    return trainer


def problems(trainer: Trainer, method: PuzzleMix, n: int) -> Iterator[Energy]:
    """On a few training batches, each with a ratio drawn as in training and with 1/2."""
    rng = torch.Generator().manual_seed(0)  # the same images, pairs, and ratios for each n
    for chosen in trainer.bundle.indices(rng, 100, balanced=False)[:BATCHES]:
        batch = trainer.bundle.take(chosen, rng)
        assert batch.scale is not None
        with trainer.autocast():
            saliency = method.saliency(batch, trainer.net)
        partner, drawn = pairing(100, rng, batch.x.device), ratio(method.alpha, torch.ones_like(method.alpha), rng)
        for lam in (drawn, torch.tensor(0.5)):
            pixels = batch.x.float() * batch.scale
            yield energy(saliency, pixels, partner, lam, n, method.beta, method.gamma, method.eta, method.neigh_size)


def rows(trainer: Trainer, method: PuzzleMix, n: int) -> Iterator[list[object]]:
    """The table's lines for grids of n x n blocks."""
    given = [*problems(trainer, method, n)]
    exactly = [Energy(each.cost.double(), each.weight.double()) for each in given]
    single = [images(each) for each in exactly]
    scaled = {f: [[f(*image) for image in batch] for batch in single] for f in (as_called, in_range)}
    overflow = statistics.mean(cut[0].max() > (2**31 - 1) / 100_000 for batch in scaled[as_called] for cut in batch)

    def stacked(solve: Callable[[Image], np.ndarray]) -> list[Tensor]:
        return [torch.from_numpy(np.stack([solve(image) for image in batch], 2)).double() for batch in single]

    iterations = max(1, method.mask_iters * n // FINEST)
    runs: dict[str, Callable[[], object]] = {
        "ours": lambda: [minimum(each, iterations) for each in given],
        "gco as called": lambda: stacked(lambda image: swap(as_called(*image))),
        "gco in range": lambda: stacked(lambda image: swap(in_range(*image))),
        "as called, cut": lambda: [swap(cut) for batch in scaled[as_called] for cut in batch],
        "in range, cut": lambda: [swap(cut) for batch in scaled[in_range] for cut in batch],
    }
    masks = {"ours": [minimum(each, iterations).double() for each in given]}
    masks |= {
        "gco as called": stacked(lambda image: swap(as_called(*image))),
        "gco in range": stacked(lambda image: swap(in_range(*image))),
    }
    if find_spec("maxflow"):
        masks["exact"] = stacked(lambda image: layered(*image))
    energies = {name: torch.cat([e(k) for e, k in zip(exactly, each, strict=True)]) for name, each in masks.items()}
    least = torch.stack([*energies.values()]).amin(0)
    rivals = torch.minimum(energies["gco as called"], energies["gco in range"])
    ms = timed(runs, len(least))
    for name, cut in (("ours", ""), ("gco as called", "as called, cut"), ("gco in range", "in range, cut")):
        own, other = energies[name], rivals if name == "ours" else energies["ours"]
        gap = own / least - 1
        same = torch.cat([(a == b).all(0).all(0) for a, b in zip(masks[name], masks["ours"], strict=True)]).double().mean()
        worse, strictly = (own > other * (1 + NEAR)).double().mean(), int((own > other).sum())
        shares = [100 * float(worse), strictly, 100 * float(same)]
        yield [
            n,
            name,
            len(own),
            100 * overflow if "called" in name else 0,
            float(gap.mean()),
            float(gap.max()),
            *shares,
            ms[name],
            ms.get(cut),
        ]


def timed(runs: dict[str, Callable[[], object]], count: int) -> dict[str, float]:
    """Milliseconds for each image, of sides that take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return {name: 1000 * statistics.median(each) / count for name, each in seconds.items()}
