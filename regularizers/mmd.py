"""Maximum mean discrepancy between two samples, and between the classes of two labelled samples at once (ITDM, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ROOT_OFFSET = 1e-8  # under the square root: its slope at 0 is infinite, and rounding can make the square slightly negative
BANDWIDTHS = ("pooled", "offdiag", "cross")
MULTIPLIERS = (1.0, 2.0, 4.0, 8.0, 16.0)


def mmd(x: Tensor, y: Tensor, multipliers: Sequence[float] = MULTIPLIERS, bandwidth: str | float = "pooled") -> Tensor:
    """MMD(x, y) of x [n, d] and y [m, d] -> scalar in [0, sqrt(2)]: the biased V-statistic, square root taken (ITDM, section 3.1).

    The kernel is the mean over `multipliers` c of exp(-|x - y|^2 / (c s)), with no factor 2 (section 4.2). `bandwidth` s is a
    number, or the median squared distance over "pooled" (all pairs of [x; y], diagonal included, as the authors' code),
    "offdiag" (without the diagonal) or "cross" (x against y). It is always a constant to the gradient: were it differentiated,
    the MMD would not change when all features shrink together and could not pull a class together.
    Raises ValueError when a side is empty.
    """
    if not len(x) or not len(y):
        raise ValueError(f"mmd needs at least one sample on each side, got {len(x)} and {len(y)}")
    side = torch.cat([x.new_ones(len(x)), -x.new_ones(len(y))])
    return _mmd(torch.cat([x, y])[None], side[None], multipliers, bandwidth)[0]


def classwise_mmd(
    x: Tensor,
    y: Tensor,
    labels_x: Tensor,
    labels_y: Tensor,
    num_classes: int,
    multipliers: Sequence[float] = MULTIPLIERS,
    bandwidth: str | float = "pooled",
    per_class: int | None = None,
) -> Tensor:
    """MMD(x_k, y_k) of every class k, [num_classes], for x [n, d], y [m, d] and labels [n], [m]; 0 where a class lacks a side.

    Each class has its own bandwidth. All classes are one batch of kernels: no loop, no branch on data. `per_class`: an upper
    bound on the samples of a class on a side. None: on a CPU the largest count; on a GPU, where counting would make the host wait, the
    number of samples.
    """
    if per_class is None:
        on_cpu, sides = x.device.type == "cpu", (labels_x, labels_y)
        per_class = max(int(torch.bincount(labels, minlength=1).max()) if on_cpu else len(labels) for labels in sides)
    z_x, valid_x = _by_class(x, labels_x, num_classes, per_class)
    z_y, valid_y = _by_class(y, labels_y, num_classes, per_class)
    return _mmd(torch.cat([z_x, z_y], 1), torch.cat([valid_x, -valid_y], 1), multipliers, bandwidth)


def _by_class(x: Tensor, labels: Tensor, num_classes: int, per_class: int) -> tuple[Tensor, Tensor]:
    """Samples sorted into class rows: [K, per_class, d], and 1 where a place is taken, else 0: [K, per_class]."""
    order = torch.argsort(labels, stable=True)
    ordered = labels[order]
    first = torch.searchsorted(ordered, torch.arange(num_classes, device=labels.device))
    place = ordered * per_class + torch.arange(len(labels), device=labels.device) - first[ordered]
    rows = x.new_zeros(num_classes * per_class, x.shape[1]).index_copy(0, place, x[order])
    taken = x.new_zeros(num_classes * per_class).index_fill(0, place, 1.0)
    return rows.view(num_classes, per_class, -1), taken.view(num_classes, per_class)


def _mmd(z: Tensor, side: Tensor, multipliers: Sequence[float], bandwidth: str | float) -> Tensor:
    """MMD of b problems at once, [b]. z [b, p, d]: both samples of a problem; side [b, p]: 1 in x, -1 in y, 0 an empty place."""
    in_x, in_y = side > 0, side < 0
    counts = torch.where(in_x, in_x.sum(1, keepdim=True), in_y.sum(1, keepdim=True)).clamp(min=1)
    weight = side / counts  # MMD^2 = w' K w with w = (1/n, ..., -1/m, ...)
    distance = _squared_distances(z, side)
    s = _median(distance.detach(), in_x, in_y, bandwidth) if isinstance(bandwidth, str) else torch.full_like(z[:, 0, 0], bandwidth)
    comparable = in_x.any(1) & in_y.any(1) & s.isfinite()  # else a class lacks a side, or all its samples are one point
    s = torch.where(comparable, s, torch.ones_like(s))
    kernel = _mixture(distance, s[:, None, None], multipliers)
    squared = (weight[:, None] @ kernel @ weight[:, :, None]).flatten()
    root = (squared.clamp(min=0) + ROOT_OFFSET).sqrt()
    return torch.where(comparable, root, torch.zeros_like(root))


def _squared_distances(z: Tensor, side: Tensor) -> Tensor:
    """|z_i - z_j|^2, [b, p, p], through the Gram matrix of centred samples: far offsets would cost digits in float32."""
    taken = (side != 0).to(z.dtype)[:, :, None]
    centred = (z - (z * taken).sum(1, keepdim=True) / taken.sum(1, keepdim=True).clamp(min=1)) * taken
    norm = centred.square().sum(2)
    distance = norm[:, :, None] + norm[:, None, :] - 2 * centred @ centred.mT
    noise = 32 * torch.finfo(z.dtype).eps * norm.detach().amax(1)[:, None, None]  # what rounding leaves between equal samples
    return torch.where(distance.detach() > noise, distance, torch.zeros_like(distance))


def _median(distance: Tensor, in_x: Tensor, in_y: Tensor, pairs: str) -> Tensor:
    """The upper of the two middle distances over the chosen pairs, [b]: the authors' -median(-D); never their average.

    Where it is 0 (dead features, repeated samples) the same over the positive distances; nan where there is none.
    """
    if pairs not in BANDWIDTHS:
        raise ValueError(f"bandwidth: {pairs!r} is not known; allowed: {', '.join(BANDWIDTHS)}, or a number")
    taken = in_x | in_y
    chosen = taken[:, :, None] & taken[:, None, :]
    if pairs == "offdiag":
        chosen = chosen & ~torch.eye(taken.shape[1], dtype=torch.bool, device=taken.device)
    elif pairs == "cross":
        chosen = in_x[:, :, None] & in_y[:, None, :]
    nan = torch.full((), torch.nan, dtype=distance.dtype, device=distance.device)
    negative = torch.where(chosen, -distance, nan).flatten(1)  # torch's median is the lower of the two middles
    # nanmedian has no deterministic form on a GPU; on a CPU it is eight times as fast as sorting
    median = _sorted_median if distance.device.type != "cpu" else lambda x: x.nanmedian(1).values
    upper, positive = -median(negative), -median(torch.where(negative < 0, negative, nan))
    return torch.where(upper > 0, upper, positive)


def _sorted_median(x: Tensor) -> Tensor:
    """`x.nanmedian(1).values` of x [b, p], by sorting."""
    count = x.isnan().logical_not_().sum(1, keepdim=True)
    return x.sort(1).values.gather(1, ((count - 1) // 2).clamp_(min=0)).squeeze(1)  # nans come last


def _mixture(distance: Tensor, s: Tensor, multipliers: Sequence[float]) -> Tensor:
    """The mean over c in `multipliers` of exp(-distance / (c s)). Half the width is the square: one exponential serves 1, 2, 4, ..."""
    widest, *others = sorted(multipliers, reverse=True)
    kernel = torch.exp(-distance / (widest * s))
    total, previous = kernel, widest
    for multiplier in others:
        kernel = kernel.square() if 2 * multiplier == previous else torch.exp(-distance / (multiplier * s))
        total, previous = total + kernel, multiplier
    return total / len(multipliers)
