"""PuzzleMix's masks: their energy against a literal one, their minimum against brute force and SciPy's maximum flow."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow
from torch import Generator, Tensor
from torch.nn.functional import avg_pool2d

from regularizers import puzzle_mask
from regularizers.puzzle_mask import Energy, descent, energy, minimum, relaxation

pytestmark = pytest.mark.usefixtures("one_thread")  # the arrays are small

SETTINGS: dict[str, Any] = {"beta": 1.2, "gamma": 0.5, "eta": 0.2, "neigh_size": 4}


class Drawn(NamedTuple):
    """A batch with its pairing."""

    saliency: Tensor
    pixels: Tensor
    partner: Tensor

    def to(self, dtype: torch.dtype) -> Drawn:
        return Drawn(self.saliency.to(dtype), self.pixels.to(dtype), self.partner)


def drawn(kind: str, count: int, size: int, channels: int = 3, seed: int = 0) -> Drawn:
    """Smooth or noisy images and saliency, or a few pixels with most of it."""
    rng = Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        x = torch.randn(count, *shape, generator=rng)
        return 4 * avg_pool2d(x, 5, 1, 2, count_include_pad=False) if kind == "smooth" else x

    pixels, saliency = normal(channels, size, size).sigmoid(), normal(1, size, size)[:, 0].mul(1.5)
    if kind == "peaky":
        saliency *= 10 ** (2 * torch.rand(count, 1, 1, generator=rng) - 0.5)
    return Drawn(saliency.flatten(1).softmax(1).mul(size**2).view_as(saliency), pixels, torch.randperm(count, generator=rng))


class Literal(NamedTuple):
    """The energy of one pair. own: [3, blocks]; edges: [edges, 2], blocks numbered line by line; weights: [edges]."""

    own: np.ndarray
    edges: np.ndarray
    weights: np.ndarray

    def __call__(self, labels: np.ndarray) -> np.ndarray:
        """Of labelings [many, blocks]."""
        first, second = labels[:, self.edges[:, 0]], labels[:, self.edges[:, 1]]
        return self.own[labels, np.arange(labels.shape[1])].sum(1) + ((first - second) / 2.0) ** 2 @ self.weights


def literal(data: Drawn, place: int, lam: float, n: int, **options: Any) -> Literal:
    """Protocol sheet, 1.6, for the image at `place` (a) and its partner (b)."""
    beta, gamma, eta, neigh_size = {**SETTINGS, **options}.values()
    pair, size = [place, int(data.partner[place])], data.pixels.shape[2] // n
    cell = min(side for side in range(1, size + 1) if size % side == 0 and side >= min(neigh_size, size))
    half, beta_n, cells = gamma * beta / (16 * n) / 2, beta / (16 * n), size // cell
    averaged, saliency = avg_pool2d(data.pixels[pair].double(), cell).numpy(), avg_pool2d(data.saliency[pair].double(), size).numpy()
    c0, c1 = (image / image.sum() for image in saliency)
    edges, weights = [], []
    for axis, i in itertools.product((0, 1), np.ndindex(n, n)):
        j = (i[0] + 1 - axis, i[1] + axis)
        if max(j) == n:
            continue
        rows, columns = (slice(block * cells, (block + 1) * cells) for block in i)
        last = averaged[:, :, rows, columns].take(-1, axis + 2)  # of both images, [2, C, cells]
        rows, columns = (slice(block * cells, (block + 1) * cells) for block in j)
        first = averaged[:, :, rows, columns].take(0, axis + 2)
        (aa, ab), (ba, bb) = abs(last[:, None] - first).mean((2, 3))
        c1[i] += half * (ab + aa)
        c0[i] += half * (ba + bb)
        c1[j] += half * (ba + aa)
        c0[j] += half * (ab + bb)
        edges.append((i[0] * n + i[1], j[0] * n + j[1]))
        weights.append(beta_n + half * (ab + ba - aa - bb))
    r = [-math.log(p) for p in ((1 - lam) ** 2, 2 * lam * (1 - lam), lam**2)]
    own = [z * c1 + (1 - z) * c0 + eta / n**2 * r[int(2 * z)] for z in (0, 0.5, 1)]
    return Literal(np.array(own).reshape(3, -1), np.array(edges), np.array(weights))


def flat(k: Tensor) -> np.ndarray:
    """[n, n, N] -> [N, blocks]."""
    return k.permute(2, 0, 1).flatten(1).long().numpy()


def built(data: Drawn, lam: float, n: int, **options: Any) -> Energy:
    return energy(*data, torch.tensor(lam, dtype=torch.float64), n, **{**SETTINGS, **options})


def solved(problem: Energy) -> Tensor:
    """With the method's number of steps."""
    return minimum(problem, 200 * problem.cost.shape[1] // 16)


def cut(pair: Literal) -> np.ndarray:
    """The labels of a minimum cut of two layers (sheet, 1.6), with capacities rounded down to 1e-9 of their sum.

    Nodes: source, sink, the blocks of layer 1, those of layer 2; x = 1 on the source's side.
    """
    count = pair.own.shape[1]
    around = np.bincount(pair.edges[:, 0], pair.weights, count) + np.bincount(pair.edges[:, 1], pair.weights, count)
    middle, nodes = pair.own[1] - around / 4, np.arange(2 * count) + 2
    slopes = np.concatenate([middle - pair.own[0], pair.own[2] - middle])
    pairs = np.concatenate([pair.edges + np.array([s, t]) for s in (0, count) for t in (0, count)]) + 2
    tails = np.concatenate([np.where(slopes > 0, nodes, 0), *pairs.T])
    heads = np.concatenate([np.where(slopes > 0, 1, nodes), *pairs.T[::-1]])
    capacity = np.concatenate([abs(slopes), *[pair.weights / 4] * 8]) * 2**30 / abs(slopes).sum()
    graph = csr_array((np.floor(capacity).astype(np.int32), (tails, heads)), shape=(2 * count + 2,) * 2)
    left = graph - maximum_flow(graph, 0, 1).flow
    left.eliminate_zeros()
    x = np.isin(nodes, breadth_first_order(left, 0, return_predecessors=False)).astype(int)
    return x[:count] + x[count:]


@pytest.mark.parametrize(
    ("n", "size", "channels", "lam", "options"),
    [
        (3, 36, 1, 0.2, {}),
        (16, 32, 3, 0.7, {}),  # blocks smaller than neigh_size
        (4, 32, 3, 0.999, {"beta": 3.0, "gamma": 0.95, "eta": 0.05, "neigh_size": 2}),
        (2, 24, 2, 0.6, {"gamma": 0.9, "eta": 0.0, "neigh_size": 5}),  # blocks of 12 pixels: cells of 6
    ],
)
def test_energy_is_the_literal_one(n: int, size: int, channels: int, lam: float, options: dict[str, Any]) -> None:
    """Costs, weights, and values of masks; with pairs both ways, one image by itself, and a circle. Constants do not count."""
    data, k = drawn("smooth", 6, size, channels), torch.arange(6 * n**2).view(n, n, 6).sin().mul(9).long() % 3
    data = data._replace(pixels=data.pixels - 0.5, partner=torch.tensor([1, 2, 0, 3, 5, 4]))
    exact = [literal(data, place, lam, n, **options) for place in range(6)]
    for dtype, close in ((torch.float32, 2e-6), (torch.float64, 1e-12)):
        ours = built(data.to(dtype), lam, n, **options)
        assert ours.cost.dtype == ours.weight.dtype == dtype
        for place, pair in enumerate(exact):
            weight = np.zeros((2, n * n))
            weight[(pair.edges[:, 1] == pair.edges[:, 0] + 1).astype(int), pair.edges[:, 0]] = pair.weights
            np.testing.assert_allclose(ours.cost[..., place].reshape(3, -1).numpy(), pair.own, rtol=close, atol=close / n**2)
            np.testing.assert_allclose(ours.weight[..., place].reshape(2, -1).numpy(), weight, rtol=10 * close)
            assert ours(k.to(dtype))[place].item() == pytest.approx(pair(flat(k)[place, None])[0], rel=10 * close)


@pytest.mark.parametrize(
    ("kind", "n", "lam", "beta"),
    [
        *[("smooth", 2, 1e-6, 1.2), ("noise", 3, 0.1, 1.2), ("peaky", 2, 0.35, 10.0), ("peaky", 3, 0.999, 0.1)],
        *[("noise", 4, 0.45, 1.2), ("peaky", 8, 0.45, 5.0), ("smooth", 16, 0.45, 1.2), ("peaky", 16, 0.45, 0.3)],
    ],
)
def test_minimum_is_the_minimum_cut_and_the_best_of_all_masks(kind: str, n: int, lam: float, beta: float) -> None:
    """P-P2; all masks are tried where they are few."""
    data = drawn(kind, 4, 36 if n == 3 else 32, seed=n)
    k = flat(solved(built(data, lam, n, beta=beta)))
    assert n < 4 or len(np.unique(k)) == 3
    for place, labels in enumerate(k):
        pair = literal(data, place, lam, n, beta=beta)
        ours, least = pair(np.stack([labels, cut(pair)]))
        assert ours <= least + 1e-6 * abs(least)
        assert n > 3 or least <= pair(np.indices((3,) * n**2).reshape(n**2, -1).T).min() * (1 + 1e-6)


def test_the_best_of_several_levels_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where few steps leave the relaxed masks between the labels."""
    ours, single = built(drawn("smooth", 40, 32), 0.45, 16), []
    together = ours(minimum(ours, 8))
    for level in puzzle_mask.LEVELS:
        monkeypatch.setattr(puzzle_mask, "LEVELS", (level,))
        single.append(ours(minimum(ours, 8)))
    np.testing.assert_allclose(together.numpy(), torch.stack(single).amin(0).numpy(), rtol=1e-6)
    assert (together < single[len(single) // 2] - 1e-5).any()


@pytest.mark.parametrize("n", [2, 16])
def test_descent_goes_down(n: int) -> None:
    """P-P3, in float32, from random masks. A chessboard ends even."""
    ours = built(drawn("smooth", 16, 32), 0.45, n)
    even = Energy(torch.zeros_like(ours.cost), ours.weight)
    board = 2.0 * (torch.arange(n)[:, None, None] + torch.arange(n)[:, None] & 1).expand(n, n, 16)
    assert not even(descent(even, board)).any()
    exact, start = Energy(ours.cost.double(), ours.weight.double()), torch.randint(3, (n, n, 16), generator=Generator().manual_seed(0))
    before, after = exact(start.double()), exact(descent(ours, start.float()).double())
    assert (after <= before + 1e-6 * before.abs()).all() and (after < before - 0.1 * before.abs()).any()


@pytest.mark.parametrize(("n", "size"), [(2, 32), (3, 36), (16, 32)])
def test_a_ratio_of_one_shows_one_image(n: int, size: int) -> None:
    """P-P7, wherever the saliency is. Images without any are no exception."""
    data = drawn("noise", 8, size)._replace(partner=torch.arange(8).roll(1))
    data.saliency[:4, 0, 0], data.saliency[5] = 1e4, 0
    for lam, dtype in itertools.product((0.0, 1.0), (torch.float32, torch.float64)):
        assert (solved(built(data.to(dtype), lam, n)) == 2 * lam).all()


def test_without_smoothness_each_block_is_on_its_own_and_without_saliency_all_are_equal() -> None:
    data = drawn("smooth", 40, 32)
    ours = built(data.to(torch.float64), 0.45, 8, beta=0.0)
    k = solved(ours)
    assert relaxation(ours, 3).isfinite().all() and not ours.weight.any() and torch.equal(k, ours.cost.argmin(0).double())
    assert len(k.unique()) == 3
    ours = built(data._replace(saliency=torch.zeros(40, 32, 32)), 0.5, 4)
    assert ours.cost.isfinite().all() and (solved(ours) == 1).all()
