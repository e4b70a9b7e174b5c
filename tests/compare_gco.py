"""PuzzleMix's masks by our solver, and by the graph cut of its published code, alpha-beta swap. For development; pytest leaves it alone.

    python -m tests.compare_gco [DATA_DIR]

`pip install gco-wrapper` first, on Python 3.11: there are no wheels for later ones. Its C++ code may be used for research only, so that the
suite does without it. With `pip install PyMaxflow` gaps are to the exact minimum, else to the least energy that any of them found.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from textwrap import fill

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor

from experiments.compose import composed
from experiments.provenance import commit, device_name
from experiments.train import make_trainer
from experiments.trainer import Trainer
from regularizers.mixing import pairing, ratio
from regularizers.puzzle_mask import Energy, energy, minimum
from regularizers.puzzlemix import FINEST, PuzzleMix

# A narrow network that has learnt something: the saliency of a fresh one is too even.
SETTING = """experiment=lamix_random model=puzzle_resnet18 model.width=32 method=puzzlemix epochs=3 schedule.at=[2] batch_size=100
precision=bf16 profile.train=5000 profile.test=1000 runtime.device=cpu runtime.threads=2"""
SIZE, BATCHES, ROUNDS, NEAR = 100, 4, 7, 1e-6
SQUARES = np.array([[0, 1, 4], [1, 0, 1], [4, 1, 0]], np.int32)  # of the differences of labels
COLUMNS = ("n", "solver", "images", "overflow", "mean gap", "worst gap", "worse", "strictly", "same mask", "ms", "ms cut")
MEANING = f"""gap: of the energy to the least, relative. worse: images in % with more energy than gco's better result (ours), or than ours
(gco's), by over {NEAR:g} of it; strictly: number of images with any more. same mask: images in % with the mask that ours gives.
overflow: images in % with a cost that gco's factor carries out of int32; in range: gco with costs scaled so that none is.
ms: of an image, in batches of {SIZE}, median of {ROUNDS} rounds, the sides in turn; ms cut: gco's calls alone, costs scaled before"""


def as_called(cost: np.ndarray, down: np.ndarray, right: np.ndarray) -> list[np.ndarray]:
    """Of an image: what PuzzleMix's code hands to gco. Its labels' matrix is a float one: gco then takes costs times 100,000, in int32."""
    scale = 1000 * len(cost) ** 2
    whole = [(scale * part).astype(np.int32) for part in (cost[..., ::-1], down, right)]
    return [whole[0], (SQUARES / 4).astype(np.float32), *whole[1:]]


def in_range(cost: np.ndarray, down: np.ndarray, right: np.ndarray) -> list[np.ndarray]:
    """All whole numbers, which gco takes as they are; it ends the process at weights above 1e7."""
    scale = min(2**28 / cost.max(), 1e7 / max(down.max(), right.max()))
    whole = [(scale * part).round().astype(np.int32) for part in (cost[..., ::-1], down / 4, right / 4)]
    return [whole[0], SQUARES, *whole[1:]]


def swap(arguments: list[np.ndarray]) -> np.ndarray:
    """The mask, k [n, n]. The code's labels are 2 - k: swaps start where all is the first image."""
    import gco

    return 2 - gco.cut_grid_graph(*arguments, algorithm="swap").reshape(arguments[0].shape[:2])


def exact(cost: np.ndarray, down: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The k of least energy: (k - l)^2 is the sum of |x - y| over two layers x of k and two y of l, less 1 where k is 1, and l."""
    import maxflow

    n = len(cost)
    place, v = np.arange(n * n).reshape(n, n), np.concatenate([down.ravel(), right.ravel()]) / 4
    first = np.concatenate([place[:-1].ravel(), place[:, :-1].ravel()])
    second = np.concatenate([place[1:].ravel(), place[:, 1:].ravel()])
    middle = cost[..., 1] - (np.bincount(first, v, n * n) + np.bincount(second, v, n * n)).reshape(n, n)
    steps = np.stack([middle - cost[..., 0], cost[..., 2] - middle])
    graph = maxflow.GraphFloat()
    nodes = graph.add_grid_nodes((2, n, n))
    graph.add_grid_tedges(nodes, np.maximum(-steps, 0), np.maximum(steps, 0))
    for one, other in ((0, 0), (0, 1), (1, 0), (1, 1)):
        graph.add_edges(first + one * n * n, second + other * n * n, v, v)
    graph.maxflow()
    return (~graph.get_grid_segments(nodes)).sum(0)


def problems(trainer: Trainer, method: PuzzleMix, n: int) -> Iterator[Energy]:
    """On a few training batches, each with a ratio drawn as in training and with 1/2; the same images, pairs and ratios for each n."""
    rng = torch.Generator().manual_seed(0)
    for chosen in trainer.bundle.indices(rng, SIZE, balanced=False)[:BATCHES]:
        batch = trainer.bundle.take(chosen, rng)
        with trainer.autocast():
            saliency = method.saliency(batch, trainer.net)
        pixels, partner = batch.x.float() * batch.scale, pairing(SIZE, rng, batch.x.device)
        for lam in (ratio(method.alpha, torch.ones_like(method.alpha), rng), torch.tensor(0.5)):
            yield energy(saliency, pixels, partner, lam, n, method.beta, method.gamma, method.eta, method.neigh_size)


def rows(trainer: Trainer, method: PuzzleMix, n: int) -> Iterator[list[object]]:
    """The table's lines for grids of n x n blocks."""
    given = [*problems(trainer, method, n)]
    whole = Energy(*(torch.cat(parts, 3).double() for parts in zip(*((each.cost, each.weight) for each in given), strict=True)))
    # of each image: cost [n, n, 3], and the weights to the block below [n - 1, n] and to the right [n, n - 1]
    parts = whole.cost.permute(3, 1, 2, 0), whole.weight[0, :-1].permute(2, 0, 1), whole.weight[1, :, :-1].permute(2, 0, 1)
    images = [*zip(*(part.contiguous().numpy() for part in parts), strict=True)]
    iterations = max(1, method.mask_iters * n // FINEST)
    sides: dict[str, Callable[[], Tensor]] = {"ours": lambda: torch.cat([minimum(each, iterations) for each in given], 2)}
    for name, scaled in (("gco as called", as_called), ("gco in range", in_range)):
        calls = [scaled(*image) for image in images]
        sides[name] = lambda scaled=scaled: together(swap(scaled(*image)) for image in images)
        sides[f"{name}, cut"] = lambda calls=calls: together(map(swap, calls))
    masks, seconds = {name: run().double() for name, run in sides.items()}, {name: [] for name in sides}
    for name, run in [*sides.items()] * ROUNDS:
        began = time.perf_counter()
        run()
        seconds[name].append(time.perf_counter() - began)
    ms = {name: 1000 * statistics.median(each) / len(images) for name, each in seconds.items()}
    if find_spec("maxflow"):
        masks["exact"] = together(exact(*image) for image in images).double()
    energies = {name: whole(k) for name, k in masks.items()}
    least, better = torch.stack([*energies.values()]).amin(0), torch.minimum(energies["gco as called"], energies["gco in range"])
    for name in ("ours", "gco as called", "gco in range"):
        own, other = energies[name], better if name == "ours" else energies["ours"]
        gap, same = own / least - 1, (masks[name] == masks["ours"]).all(0).all(0)
        overflow = [name == "gco as called" and int(as_called(*image)[0].max()) * 100_000 >= 2**31 for image in images]
        high, worse, equal = (100 * float(np.mean(which)) for which in (overflow, (own > other * (1 + NEAR)).numpy(), same.numpy()))
        strictly = int((own > other).sum())
        yield [n, name, len(images), high, float(gap.mean()), float(gap.max()), worse, strictly, equal, ms[name], ms.get(f"{name}, cut")]


def together(masks: Iterable[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack([*masks], 2))


def main() -> None:
    if not find_spec("gco"):
        sys.exit("compare_gco needs gco, which is not installed: pip install gco-wrapper, on Python 3.11")
    trainer = make_trainer(composed([*SETTING.split(), *(f"runtime.data_dir={path}" for path in sys.argv[1:])]))
    for _ in range(trainer.epochs):
        trainer.train_epoch()
    method = trainer.regularizers["puzzlemix"]
    lines = [line for n in method.blocks for line in rows(trainer, method, n)]
    print(tabulate(lines, COLUMNS, floatfmt=("", "", "", ".1f", ".1e", ".1e", ".1f", "", ".1f", ".3f", ".3f")))
    packages = {name: version(name) for name in ("torch", "gco-wrapper", *["PyMaxflow"] * bool(find_spec("maxflow")))}
    about = {"device": device_name(trainer.device), "threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 2), **packages}
    about |= {"data": trainer.bundle.variant, "accuracy": f"{trainer.rows[-1]['test/accuracy']:.1f} %", **commit()}
    print(MEANING, fill(", ".join(f"{name} {value}" for name, value in about.items()), 130), sep="\n")


if __name__ == "__main__":
    main()
