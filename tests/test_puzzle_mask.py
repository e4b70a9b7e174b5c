"""PuzzleMix's masks: their energy against a literal one, their minimum against brute force and SciPy's maximum flow."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow
from torch import Generator, Tensor
from torch.autograd.profiler import profile
from torch.nn.functional import avg_pool2d

from regularizers import puzzle_mask
from regularizers.puzzle_mask import Energy, descent, energy, minimum, relaxation, shares

pytestmark = pytest.mark.usefixtures("one_thread")  # the arrays are small

KINDS = ["smooth", "noise", "peaky", "plain"]
SETTINGS: dict[str, Any] = {"beta": 1.2, "gamma": 0.5, "eta": 0.2, "neigh_size": 4}
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::lift_fresh"}


class Drawn(NamedTuple):
    """A batch with its pairing."""

    saliency: Tensor
    pixels: Tensor
    partner: Tensor

    def to(self, dtype: torch.dtype) -> Drawn:
        return Drawn(self.saliency.to(dtype), self.pixels.to(dtype), self.partner)


def drawn(kind: str, count: int, size: int, channels: int = 3, seed: int = 0) -> Drawn:
    """Smooth or noisy images and saliency; a few pixels with most of it; images of one colour and saliency the same everywhere."""
    rng = Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        x = torch.randn(count, *shape, generator=rng)
        return 4 * avg_pool2d(x, 5, 1, 2, count_include_pad=False) if kind == "smooth" else x

    pixels, saliency = normal(channels, size, size).sigmoid(), normal(1, size, size)[:, 0].mul(1.5)
    if kind == "peaky":
        saliency *= 10 ** (2 * torch.rand(count, 1, 1, generator=rng) - 0.5)
    if kind == "plain":
        pixels, saliency = (pixels[:, :, :1, :1] > 0.5).float().expand_as(pixels).contiguous(), torch.ones_like(saliency)
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


def literal(data: Drawn, place: int, lam: float, n: int, eps: float = 0, **options: Any) -> Literal:
    """Protocol sheet, 1.6, for the image at `place` (a) and its partner (b). eps: what the authors add inside the logarithms."""
    beta, gamma, eta, neigh_size = {**SETTINGS, **options}.values()
    pair, size = [place, int(data.partner[place])], data.pixels.shape[2] // n
    cell = min(side for side in range(1, size + 1) if size % side == 0 and side >= min(neigh_size, size))
    half, beta_n = gamma * beta / (16 * n) / 2, beta / (16 * n)
    a, b = (np.array([blocks(channel, cell) for channel in data.pixels[one].double().numpy()]) for one in pair)
    c0, c1 = (each / each.sum() for each in (blocks(data.saliency[one].double().numpy(), size) for one in pair))
    edges, weights = [], []
    for i in np.ndindex(n, n):
        for j in ((i[0] + 1, i[1]), (i[0], i[1] + 1)):
            if max(j) == n:
                continue
            across, along = (0, 1) if j[0] > i[0] else (1, 0)
            border, beside = j[across] * size // cell, np.arange(i[along] * size // cell, (i[along] + 1) * size // cell)

            def d(p: np.ndarray, q: np.ndarray, across: int = across, border: int = border, beside: np.ndarray = beside) -> float:
                last, first = ((border - 1, beside), (border, beside)) if across == 0 else ((beside, border - 1), (beside, border))
                return float(np.mean([abs(one[last] - other[first]).mean() for one, other in zip(p, q, strict=True)]))

            ab, aa, ba, bb = d(a, b), d(a, a), d(b, a), d(b, b)
            c1[i] += half * (ab + aa)
            c0[i] += half * (ba + bb)
            c1[j] += half * (ba + aa)
            c0[j] += half * (ab + bb)
            edges.append((i[0] * n + i[1], j[0] * n + j[1]))
            weights.append(beta_n + half * (ab + ba - aa - bb))
    r = [-math.log(p + eps) if p + eps else math.inf for p in ((1 - lam) ** 2, 2 * lam * (1 - lam), lam**2)]
    own = [z * c1 + (1 - z) * c0 + (eta / n**2 * r[int(2 * z)] if eta else 0) for z in (0, 0.5, 1)]
    return Literal(np.array(own).reshape(3, -1), np.array(edges), np.array(weights))


def blocks(values: np.ndarray, size: int) -> np.ndarray:
    """Means over squares of so many pixels a side."""
    starts = range(0, len(values), size)
    return np.array([[values[row : row + size, column : column + size].mean() for column in starts] for row in starts])


def every(count: int) -> np.ndarray:
    """All labelings of so many blocks."""
    return np.indices((3,) * count).reshape(count, -1).T


def flat(k: Tensor) -> np.ndarray:
    """[n, n, N] -> [N, blocks]."""
    return k.permute(2, 0, 1).flatten(1).long().numpy()


def built(data: Drawn, lam: float, n: int, **options: Any) -> Energy:
    return energy(*data, torch.tensor(lam, dtype=torch.float64), n, **{**SETTINGS, **options})


def solved(each: Energy) -> Tensor:
    """With the method's number of steps."""
    return minimum(each, 200 * each.cost.shape[1] // 16)


def convex(n: int, count: int, stiff: float) -> tuple[Energy, list[Literal]]:
    """Costs and weights that no images have: of either sign, and weights of very different sizes."""
    rng, number = np.random.default_rng(0), np.arange(n * n).reshape(n, n)
    none, whole, bend = rng.normal(size=(3, n * n, count))
    own, weight = np.stack([none, (none + whole) / 2 - 0.05 * bend**2, whole]), np.zeros((2, n * n, count))
    pairs = [np.stack([number[:-1], number[1:]], 2).reshape(-1, 2), np.stack([number[:, :-1], number[:, 1:]], 2).reshape(-1, 2)]
    for axis in (0, 1):
        weight[axis, pairs[axis][:, 0]] = stiff * rng.random((n * n - n, count)) ** 3
    edges, weights = np.concatenate(pairs), np.concatenate([weight[axis, pairs[axis][:, 0]] for axis in (0, 1)])
    each = Energy(*(torch.from_numpy(values).float().view(-1, n, n, count) for values in (own, weight)))
    return each, [Literal(own[..., one], edges, weights[:, one]) for one in range(count)]


def cut(one: Literal) -> tuple[np.ndarray, float]:
    """The labels by a minimum cut of two layers (sheet, 1.6), and a bound of the energy from below: the flow, with capacities rounded down.

    Nodes: source, sink, the blocks of layer 1, those of layer 2; x = 1 on the source's side.
    """
    count = one.own.shape[1]
    around = np.bincount(one.edges[:, 0], one.weights, count) + np.bincount(one.edges[:, 1], one.weights, count)
    middle, nodes = one.own[1] - around / 4, np.arange(2 * count) + 2
    slopes = np.concatenate([middle - one.own[0], one.own[2] - middle])
    pairs = np.concatenate([one.edges + np.array([s, t]) for s in (0, count) for t in (0, count)]) + 2
    tails = np.concatenate([np.where(slopes > 0, nodes, 0), *pairs.T])
    heads = np.concatenate([np.where(slopes > 0, 1, nodes), *pairs.T[::-1]])
    capacity, scale = np.concatenate([abs(slopes), *[one.weights / 4] * 8]), 2**30 / abs(slopes).sum()
    graph = csr_array((np.floor(capacity * scale).astype(np.int32), (tails, heads)), shape=(2 * count + 2,) * 2)
    flow = maximum_flow(graph, 0, 1)
    left = graph - flow.flow
    left.eliminate_zeros()
    x = np.isin(nodes, breadth_first_order(left, 0, return_predecessors=False)).astype(int)
    return x[:count] + x[count:], one.own[0].sum() + slopes.clip(max=0).sum() + flow.flow_value / scale


# the energy


@pytest.mark.parametrize(
    ("n", "size", "channels", "lam", "options"),
    [
        (2, 32, 3, 0.5, {}),
        (3, 36, 1, 0.2, {}),
        (8, 32, 1, 1e-5, {}),
        (16, 32, 3, 0.7, {}),  # blocks smaller than neigh_size
        (4, 32, 3, 0.999, {"beta": 3.0, "gamma": 0.95, "eta": 0.05, "neigh_size": 2}),
        (2, 32, 1, 0.4, {"beta": 0.3, "gamma": 0.0, "eta": 1.0, "neigh_size": 8}),
        (4, 24, 2, 0.6, {"gamma": 0.9, "eta": 0.0}),  # blocks of 6 pixels: cells of 2
    ],
)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_energy_is_the_literal_one(
    n: int, size: int, channels: int, lam: float, options: dict[str, Any], dtype: torch.dtype, close: float
) -> None:
    """Costs, weights, and values of masks; with pairs both ways, one image by itself, and a circle. Constants do not count."""
    data = drawn("smooth", 6, size, channels).to(dtype)._replace(partner=torch.tensor([1, 2, 0, 3, 5, 4]))
    each, k = (
        built(data._replace(pixels=data.pixels - 0.5), lam, n, **options),
        torch.arange(6 * n**2).view(n, n, 6).sin().mul(9).long() % 3,
    )
    assert each.cost.shape == (3, n, n, 6) and each.weight.shape == (2, n, n, 6) and each.cost.dtype == each.weight.dtype == dtype
    for place in range(6):
        one, weight = literal(data, place, lam, n, **options), np.zeros((2, n * n))
        for (i, j), value in zip(one.edges, one.weights, strict=True):
            weight[int(j == i + 1), i] = value
        np.testing.assert_allclose(each.cost[..., place].reshape(3, -1).numpy(), one.own, rtol=close, atol=close / n**2)
        np.testing.assert_allclose(each.weight[..., place].reshape(2, -1).numpy(), weight, rtol=10 * close)
        assert each(k.to(dtype))[place].item() == pytest.approx(one(flat(k)[place, None])[0], rel=10 * close)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_positive_and_shares_sum_to_one(kind: str, gamma: float) -> None:
    """P-P1: weights in beta_n (1 -+ gamma), nothing beyond the border."""
    data = drawn(kind, 100, 32).to(torch.float64)
    for n in (2, 4, 8, 16):
        weight, smooth = built(data, 0.4, n, gamma=gamma).weight, 1.2 / (16 * n)
        inner = torch.cat([weight[0, :-1].flatten(), weight[1, :, :-1].flatten()])
        assert not weight[0, -1].any() and not weight[1, :, -1].any()
        assert smooth * (1 - gamma - 1e-12) <= inner.min() and inner.max() <= smooth * (1 + gamma + 1e-12)
        assert kind != "plain" or inner.max() >= smooth * (1 + gamma * 0.99)  # an image and its negative
        np.testing.assert_allclose(shares(data.saliency, n).sum((1, 2)).numpy(), 1, atol=1e-9)


# the minimum


@pytest.mark.parametrize(("n", "size", "count"), [(2, 32, 12), (3, 36, 4)])
@pytest.mark.parametrize("lam", [1e-6, 0.1, 0.35, 0.5, 1 - 1e-3])
@pytest.mark.parametrize("kind", KINDS)
def test_minimum_is_the_best_of_all_masks(kind: str, lam: float, n: int, size: int, count: int) -> None:
    """P-P2."""
    data, masks = drawn(kind, count, size, seed=n), every(n * n)
    for place, k in enumerate(flat(solved(built(data, lam, n)))):
        one = literal(data, place, lam, n)
        assert one(k[None])[0] <= one(masks).min() * (1 + 1e-6)


@pytest.mark.parametrize("stiff", [0.3, 3, 30])
def test_minimum_and_cut_are_the_best_of_all_masks_for_any_convex_costs(stiff: float) -> None:
    for n, count in ((2, 60), (3, 12)):
        each, literals = convex(n, count, stiff)
        for one, k in zip(literals, flat(minimum(each, 1000)), strict=True):
            best, (cuts, bound) = one(every(n * n)).min(), cut(one)
            assert one(np.stack([k, cuts])).tolist() == pytest.approx([best, best], abs=1e-6) and best - 1e-5 < bound <= best + 1e-12


@pytest.mark.parametrize("n", [4, 8, 16])
@pytest.mark.parametrize("kind", ["smooth", "noise", "peaky", "convex"])
def test_minimum_is_the_minimum_cut(kind: str, n: int) -> None:
    """P-P2. Capacities are rounded to 1e-9 of their sum, so that the flow is within 1e-5 of the energy of the cut's mask."""
    data = drawn(kind, 4, 32)
    each, literals = (built(data, 0.45, n), [literal(data, place, 0.45, n) for place in range(4)]) if kind != "convex" else convex(n, 4, 2)
    k = flat(solved(each))
    assert len(np.unique(k)) == 3
    for one, labels in zip(literals, k, strict=True):
        cuts, bound = cut(one)
        found, best = one(np.stack([labels, cuts]))
        assert bound - 1e-12 <= found <= best + 1e-6 * abs(best) and best <= bound + 1e-5 * abs(best)


@pytest.mark.parametrize("n", [4, 8, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_minimum_is_below_other_masks_and_a_longer_run(kind: str, n: int) -> None:
    """P-P2: constant masks, each block's own best, random masks far off and near, 2000 steps."""
    each, rng = built(drawn(kind, 12, 32).to(torch.float64), 0.45, n), Generator().manual_seed(2)
    k, random = solved(each), torch.randint(3, (100, n, n, 12), generator=rng)
    near = torch.where(torch.rand(100, n, n, 12, generator=rng) < 3 / n**2, random, k)
    others = torch.cat(
        [torch.stack([torch.full_like(k, 0), torch.full_like(k, 1), torch.full_like(k, 2), each.cost.argmin(0)]), random, near]
    )
    assert all((each(k) <= each(other) + 1e-12).all() for other in others.double())
    assert (each(k) <= each(minimum(each, 2000)) * (1 + 1e-4)).all()


def test_the_best_of_several_levels_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where few steps leave the relaxed masks between the labels."""
    each, found = built(drawn("smooth", 40, 32), 0.45, 16), []
    together = each(minimum(each, 8))
    for level in puzzle_mask.LEVELS:
        monkeypatch.setattr(puzzle_mask, "LEVELS", (level,))
        found.append(each(minimum(each, 8)))
    np.testing.assert_allclose(together.numpy(), torch.stack(found).amin(0).numpy(), rtol=1e-6)
    assert (together < found[len(found) // 2] - 1e-5).any()


@pytest.mark.parametrize("n", [2, 4, 16])
def test_descent_goes_down_and_ends_where_no_block_can(n: int) -> None:
    """P-P3, in float32, from random masks; the minimum is stable under changes of one block. A chessboard ends even."""
    ones = Energy(torch.zeros(3, n, n, 1), convex(n, 1, stiff=1)[0].weight)
    assert ones(descent(ones, 2.0 * (torch.arange(n)[:, None, None] + torch.arange(n)[:, None] & 1))).item() == 0
    for each in (built(drawn("smooth", 16, 32), 0.45, n), convex(n, 16, stiff=2)[0]):
        exact, start = Energy(each.cost.double(), each.weight.double()), torch.randint(3, (n, n, 16), generator=Generator().manual_seed(0))
        before, after = exact(start.double()), exact(descent(each, start.float()).double())
        assert (after <= before + 1e-6 * before.abs()).all() and (after < before - 0.1 * before.abs()).any()
        k = solved(each).double()
        for row, column, label in np.ndindex(n, n, 3):
            other = k.clone()
            other[row, column] = label
            assert (exact(k) <= exact(other) + 1e-6 * exact(k).abs()).all()


# what masks are like


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_the_other_way_round(kind: str, dtype: torch.dtype) -> None:
    """P-P4: z in {0, 1/2, 1}, and 1 - z where the images and lambda change places."""
    data = drawn(kind, 50, 32).to(dtype)
    back = Drawn(data.saliency[data.partner], data.pixels[data.partner], data.partner.argsort())
    for n, lam in ((2, 0.5), (4, 0.3), (16, 0.45)):
        there, other = built(data, lam, n), built(back, 1 - lam, n)
        k, turned = solved(there), solved(other)
        assert k.dtype == dtype and k.shape == (n, n, 50) and set(k.unique().tolist()) <= {0, 1, 2}
        np.testing.assert_allclose(there(k).numpy(), other(turned).numpy(), rtol=1e-6)
        assert (k == 2 - turned).double().mean() > 0.99


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_a_ratio_of_one_shows_one_image(lam: float) -> None:
    """P-P7, wherever the saliency is; by brute force, too. Images without any are no exception."""
    for n, size in ((2, 32), (3, 36), (4, 32), (16, 32)):
        data = drawn("noise", 8, size)._replace(partner=torch.arange(8).roll(1))
        data.saliency[:4, 0, 0], data.saliency[5] = 1e4, 0
        assert all((solved(built(data.to(dtype), lam, n)) == 2 * lam).all() for dtype in (torch.float32, torch.float64))
        if n <= 3:
            assert (every(n * n)[literal(data, 0, lam, n)(every(n * n)).argmin()] == 2 * lam).all()


def test_the_authors_ratio_of_one_does_not() -> None:
    """Trap 9: with 1e-8 in the logarithm a block with over -ln 1e-8 = 18.4 eta = 3.7 times the mean saliency is the other image's."""
    for times, beta, label in ((3.6, 0.0, 2), (3.8, 0.0, 0), (8.9, 0.0, 0), (8.9, 1.2, 0)):
        data = drawn("noise", 2, 36)._replace(partner=torch.tensor([1, 0]))
        data.saliency[0, :12, :12], data.saliency[1] = 0, (9 - times) / 8
        data.saliency[1, :12, :12] = times
        best = every(9)[literal(data, 0, 1, 3, beta=beta, eps=1e-8)(every(9)).argmin()]
        assert best.tolist() == [label, *[2] * 8] and (solved(built(data, 1, 3, beta=beta))[..., 0] == 2).all()


@pytest.mark.parametrize(("lam", "low", "high"), [(0.5, 0.5, 0.5), (0.45, 0.2, 0.48), (0.55, 0.52, 0.8)])
def test_the_mean_share_of_many_pairs(lam: float, low: float, high: float) -> None:
    """P-P8, within four standard errors."""
    for n in (2, 8):
        share = solved(built(drawn("smooth", 1500, 32, channels=1), lam, n)).double().mean((0, 1)) / 2
        error = 4 * share.std().item() / 1500**0.5
        assert low - error < share.mean().item() < high + error and error < 0.03


def test_without_smoothness_each_block_is_on_its_own() -> None:
    each = built(drawn("smooth", 40, 32).to(torch.float64), 0.45, 8, beta=0.0)
    k = solved(each)
    assert (
        relaxation(each, 3).isfinite().all()
        and not each.weight.any()
        and torch.equal(k, each.cost.argmin(0).double())
        and len(k.unique()) == 3
    )


def test_saliency_of_zero_is_that_of_no_block() -> None:
    data = drawn("smooth", 8, 32)._replace(saliency=torch.zeros(8, 32, 32))
    each = built(data, 0.5, 4)
    assert each.cost.isfinite().all() and not shares(data.saliency, 4).any() and (solved(each) == 1).all()


def test_nothing_waits_for_the_host() -> None:
    """Nor is anything copied from it (torch.tensor of numbers), which cannot be recorded in a CUDA graph."""
    data, lam = drawn("smooth", 8, 32), torch.tensor(0.5)
    with profile() as seen:
        minimum(energy(*data, lam, 4, **SETTINGS), 3)
    names = {each.name for each in seen.function_events}
    assert "aten::addcmul" in names and not names & WAITS
    with profile() as seen:
        lam.expand(3)[torch.tensor([True, False, False])].item()
    assert len({each.name for each in seen.function_events} & WAITS) >= 3
