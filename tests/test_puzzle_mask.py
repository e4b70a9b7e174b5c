"""PuzzleMix's masks: their energy against loops over blocks and borders, their minimum against brute force and SciPy's maximum flow."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow
from test_mmd import Calls
from torch import Generator, Tensor
from torch.nn.functional import avg_pool2d

from regularizers.puzzle_mask import Energy, descent, energy, minimum, shares

pytestmark = pytest.mark.usefixtures("one_thread")  # the arrays are small

KINDS = ["smooth", "noise", "peaky", "even", "plain"]
SETTINGS = {"beta": 1.2, "gamma": 0.5, "eta": 0.2, "neigh_size": 4}


class Drawn(NamedTuple):
    """A batch with its pairing."""

    saliency: Tensor
    pixels: Tensor
    partner: Tensor


def drawn(kind: str, count: int, size: int, channels: int = 3, seed: int = 0) -> Drawn:
    """Smooth or noisy images and saliency; one pixel with nearly all of it; the same everywhere; images of one colour. Some pairs are one."""
    rng = Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        x = torch.rand(count, *shape, generator=rng)
        return 4 * (avg_pool2d(x, 5, 1, 2, count_include_pad=False) - 0.5).clamp(-0.125, 0.125) + 0.5 if kind == "smooth" else x

    pixels, saliency = noise(channels, size, size), noise(1, size, size)[:, 0]
    if kind == "peaky":
        saliency = saliency ** (10 ** (4 * torch.rand(count, 1, 1, generator=rng)))
    if kind == "even":
        saliency = torch.ones_like(saliency)
    if kind == "plain":
        pixels = (torch.rand(count, channels, 1, 1, generator=rng) > 0.5).float().expand_as(pixels)
    return Drawn(saliency, pixels, torch.randperm(count, generator=rng))


class Literal(NamedTuple):
    """The energy of one pair. own: [3, blocks]; edges: [edges, 2], blocks numbered line by line; weights: [edges]."""

    own: np.ndarray
    edges: np.ndarray
    weights: np.ndarray

    def __call__(self, labels: np.ndarray) -> np.ndarray:
        """Of labelings [many, blocks]."""
        first, second = labels[:, self.edges[:, 0]], labels[:, self.edges[:, 1]]
        return self.own[labels, np.arange(labels.shape[1])].sum(1) + ((first - second) / 2.0) ** 2 @ self.weights


def literal(data: Drawn, place: int, lam: float, n: int, beta: float, gamma: float, eta: float, neigh_size: int, eps: float = 0) -> Literal:
    """Protocol sheet, 1.6, for the image at `place` (a) and its partner (b). eps: what the authors add inside the logarithms."""
    pair = [place, int(data.partner[place])]
    size = data.pixels.shape[2] // n
    cell = math.gcd(neigh_size, size)
    images = [data.pixels[one].double().numpy() for one in pair]
    pooled = [np.array([blocks(channel, cell) for channel in image]) for image in images]
    share_a, share_b = (blocks(data.saliency[one].double().numpy(), size) for one in pair)
    share_a, share_b = share_a / share_a.sum(), share_b / share_b.sum()
    cells, beta_n = size // cell, beta / (16 * n)
    cost = {1: share_b.copy(), 0: share_a.copy()}
    edges, weights = [], []
    for row in range(n):
        for column in range(n):
            for below, right in ((1, 0), (0, 1)):
                after = (row + below, column + right)
                if max(after) == n:
                    continue
                d = {}
                for p, one in zip("ab", pooled, strict=True):
                    for q, other in zip("ab", pooled, strict=True):
                        total = 0.0
                        for along in range(cells):
                            if below:
                                x, y = (after[0] * cells - 1, column * cells + along), (after[0] * cells, column * cells + along)
                            else:
                                x, y = (row * cells + along, after[1] * cells - 1), (row * cells + along, after[1] * cells)
                            total += sum(abs(one[c][x] - other[c][y]) for c in range(len(one)))
                        d[p + q] = total / cells / len(one)
                half = gamma * beta_n / 2
                cost[1][row, column] += half * (d["ab"] + d["aa"])
                cost[0][row, column] += half * (d["ba"] + d["bb"])
                cost[1][after] += half * (d["ba"] + d["aa"])
                cost[0][after] += half * (d["ab"] + d["bb"])
                edges.append((row * n + column, after[0] * n + after[1]))
                weights.append(beta_n + half * (d["ab"] + d["ba"] - d["aa"] - d["bb"]))
    prior = [math.inf if p + eps == 0 else -math.log(p + eps) for p in ((1 - lam) ** 2, 2 * lam * (1 - lam), lam**2)]
    own = [z * cost[1] + (1 - z) * cost[0] + (eta / n**2 * r if eta else 0) for z, r in zip((0, 0.5, 1), prior, strict=True)]
    return Literal(np.array(own).reshape(3, -1), np.array(edges), np.array(weights))


def blocks(values: np.ndarray, size: int) -> np.ndarray:
    """Means over squares of so many pixels a side."""
    side = len(values) // size
    rows = [[values[r * size : (r + 1) * size, c * size : (c + 1) * size].mean() for c in range(side)] for r in range(side)]
    return np.array(rows)


def every(count: int) -> np.ndarray:
    """All labelings of so many blocks."""
    return np.indices((3,) * count).reshape(count, -1).T.astype(np.int8)


def flat(k: Tensor) -> np.ndarray:
    """[n, n, N] -> [N, blocks]."""
    return k.permute(2, 0, 1).flatten(1).numpy().astype(np.int8)


def steps(n: int, mask_iters: int = 200) -> int:
    return max(1, mask_iters * n // 16)  # of the method


# the energy
