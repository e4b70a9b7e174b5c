"""PuzzleMix's mask: the share that each block takes of each of two images, at the minimum of an energy (Kim et al. 2020, section 4).

The energy is convex in the shares, so its minimum over all masks is a minimum cut (Ishikawa 2003), and the relaxation to a total-variation
problem is tight. No graph-cut package: a primal-dual iteration for the whole batch (Chambolle & Pock 2011; Pock & Chambolle 2011).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, softshrink

STEP = 0.15  # of the dual; the primal's follows from it. From 0.1 to 0.4 little differs, on saliency of CIFAR-10
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # at which the relaxed mask is rounded: the best one counts
SWEEPS = 2  # of the descent that follows
LARGEST = 1e6  # in place of the infinity of -log(0), at a ratio of 0 or 1


@dataclass(frozen=True)
class Energy:
    """E(k) = sum_i cost(k_i)_i + sum_e weight_e (z_i - z_j)^2 over the blocks i and the pairs e of neighbours; z = k / 2, k in 0, 1, 2.

    z is the share of the first image. Pairs of images come last, so that each step of the solver goes through contiguous memory.
    cost: [3, n, n, N], for k = 0, 1, 2; convex in k. weight: [2, n, n, N], of each block and the one below it, and the one to its right;
    0 where there is none.
    """

    cost: Tensor
    weight: Tensor

    def __call__(self, k: Tensor) -> Tensor:
        """The energy of masks [n, n, N], one for each pair: [N]."""
        own = torch.where(k == 2, self.cost[2], torch.where(k == 1, self.cost[1], self.cost[0]))
        own = own.addcmul(self.weight[0], (k.roll(-1, 0) - k) ** 2, value=0.25)  # what comes around has weight 0
        return own.addcmul(self.weight[1], (k.roll(-1, 1) - k) ** 2, value=0.25).sum((0, 1))


def shares(saliency: Tensor, n: int) -> Tensor:
    """Of images' saliency [N, H, W], the part in each of n x n blocks: [N, n, n], sums 1."""
    each = avg_pool2d(saliency, saliency.shape[1] // n)
    return each / (each.sum((1, 2), keepdim=True) + 1e-12)


def cell(block: int, pixels: int) -> int:
    """The side of squares that divide a block of so many pixels a side: the smallest one of at least `pixels`, else the block's own."""
    return next(side for side in range(min(pixels, block), block + 1) if block % side == 0)


def energy(
    saliency: Tensor, pixels: Tensor, partner: Tensor, lam: Tensor, n: int, beta: float, gamma: float, eta: float, neigh_size: int
) -> Energy:
    """The energy of mixing each image with its partner, on n x n blocks (as in the code of Kim et al.).

    saliency: [N, H, H]; pixels: [N, C, H, H], in 0 .. 1 up to a constant; partner: [N]; lam: the ratio that the prior is for, a scalar.
    beta / (16 n): weight of smoothness. gamma, below 1: how far that depends on how well the images fit at the border of two blocks,
    averaged before over cells of neigh_size x neigh_size pixels, or a little more. eta / n^2: weight of the prior, that of two draws of
    the first image with probability lam.
    """
    size = pixels.shape[2] // n
    averaged = avg_pool2d(pixels, cell(size, neigh_size))
    smooth, cells = beta / (16 * n), averaged.shape[2] // n
    lost = shares(saliency, n).permute(1, 2, 0).contiguous()  # with z = 0: the image's own; with z = 1 its partner's
    whole, none = lost[..., partner], lost
    weight = lost.new_zeros(2, n, n, len(pixels))
    for axis in (0, 1):
        lines = averaged.transpose(2, 3) if axis else averaged  # [N, C, cells across the border, cells along it]
        last, first = lines[:, :, cells - 1 : -1 : cells], lines[:, :, cells::cells]

        def border(one: Tensor, next_one: Tensor, axis: int = axis) -> Tensor:
            """From one image's blocks to the next blocks of another: the mean difference where they meet, weighted."""
            each = (one - next_one).abs().mean(1).unflatten(2, (n, cells)).mean(3).permute(1, 2, 0)  # [n - 1, n, N]
            return gamma * smooth / 2 * (each.transpose(0, 1) if axis else each)

        aa, ab, ba = border(last, first), border(last, first[partner]), border(last[partner], first)
        bb = aa[..., partner]
        whole.narrow(axis, 0, n - 1).add_(ab + aa)
        whole.narrow(axis, 1, n - 1).add_(ba + aa)
        none.narrow(axis, 0, n - 1).add_(ba + bb)
        none.narrow(axis, 1, n - 1).add_(ab + bb)
        weight[axis].narrow(axis, 0, n - 1).copy_(smooth + ab + ba - aa - bb)
    own, other = (share.to(lost.dtype).log().clamp(min=-LARGEST) for share in (lam, 1 - lam))  # convex at 0 and 1 too
    prior = torch.stack([-2 * other, -other - own - log(2), -2 * own])
    return Energy(torch.stack([none, (none + whole) / 2, whole]) + eta / n**2 * prior[:, None, None, None], weight)


def minimum(energy: Energy, iterations: int) -> Tensor:
    """The masks of least energy, [n, n, N], of labels 0, 1, 2.

    The relaxed minimum is rounded at several levels, the same for both steps of k: the mean energy over all levels is the relaxed one's.
    A descent block by block takes what the iteration left, and the best of the levels is kept.
    """
    relaxed = relaxation(energy, iterations)
    k = torch.cat([(relaxed > level).to(relaxed.dtype) + (relaxed > 1 + level) for level in LEVELS], 2)
    each = Energy(energy.cost.repeat(1, 1, 1, len(LEVELS)), energy.weight.repeat(1, 1, 1, len(LEVELS)))
    k = descent(each, k)
    best = each(k).unflatten(0, (len(LEVELS), -1)).argmin(0)
    return k.unflatten(2, (len(LEVELS), -1)).gather(2, best.expand(*k.shape[:2], 1, -1)).squeeze(2)


def relaxation(energy: Energy, iterations: int) -> Tensor:
    """The minimum over k in [0, 2], [n, n, N]: the saddle point of sum_i cost_i(k_i) + sum_e v_e (u_e (k_j - k_i) - f(u_e)), |u_e| <= 3.

    Both terms of the energy are piecewise linear between whole numbers here, where their minima lie then: v (k_j - k_i)^2, v = weight / 4,
    has the slopes 1 and 3, hence f(u) = max(0, |u| - 1). It is the layered cut, with one k for its two layers and one u for four edges.
    """
    down, right = v = energy.weight / 4
    step = 1 / (2 * STEP * ends(v)).clamp(min=torch.finfo(v.dtype).tiny)
    low, high = step * (energy.cost[1:] - energy.cost[:-1])  # what a step moves k by, below and above 1
    high += 1
    # Below and beside, a tensor each: one, twice as large, torch cuts for two threads of a CPU, whose meeting takes longer than the work.
    k, below, beside, pull = torch.ones_like(step), *torch.zeros(3, *step.shape, dtype=v.dtype, device=v.device)
    change_below, change_beside, flow_below, flow_beside = torch.zeros(4, *step.shape, dtype=v.dtype, device=v.device)
    for _ in range(iterations):
        torch.mul(down, below, out=flow_below)
        torch.mul(right, beside, out=flow_beside)
        torch.add(flow_below, flow_beside, out=pull)
        pull[1:] -= flow_below[:-1]
        pull[:, 1:] -= flow_beside[:, :-1]
        torch.addcmul(k, step, pull, out=pull)
        new = (pull - low).clamp_(0, 1).add_((pull - high).clamp_(0, 1))
        ahead = k.lerp_(new, 2)
        torch.sub(ahead[1:], ahead[:-1], out=change_below[:-1])
        torch.sub(ahead[:, 1:], ahead[:, :-1], out=change_beside[:, :-1])
        below, beside = moved_on(below, change_below), moved_on(beside, change_beside)
        k = new
    return k


def moved_on(u: Tensor, change: Tensor) -> Tensor:
    """A step of the dual u of some pairs, along the change of k in each: it is drawn to between -1 and 1, and kept between -3 and 3."""
    u.add_(change, alpha=STEP)
    return softshrink(u, 1 + STEP).clamp_(-2, 2).add_(u.clamp_(-1, 1))


def descent(energy: Energy, k: Tensor) -> Tensor:
    """Each block in turn, black ones then white ones of a chessboard, takes its best label for those of its neighbours."""
    v = energy.weight / 4
    steps = energy.cost[1:] - energy.cost[:-1] + torch.stack([ends(v), 3 * ends(v)])
    place = torch.arange(len(k), device=k.device)
    white = ((place[:, None] + place) % 2 == 1)[..., None]
    for turn in range(2 * SWEEPS):
        around = v[0] * k.roll(-1, 0) + v[1] * k.roll(-1, 1)
        around[1:] += v[0, :-1] * k[:-1]
        around[:, 1:] += v[1, :, :-1] * k[:, :-1]
        best = (2 * around > steps).to(k.dtype).sum(0)
        k = torch.where(white == (turn % 2 == 1), best, k)
    return k


def ends(v: Tensor) -> Tensor:
    """The sum at each block over the pairs that it is in: [2, n, n, N] -> [n, n, N]."""
    total = v[0] + v[1]
    total[1:] += v[0, :-1]
    total[:, 1:] += v[1, :, :-1]
    return total
