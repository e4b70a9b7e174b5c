"""PuzzleMix's transport: salient cells of an image move to where the mask shows it (Kim et al. 2020, section 4.3 and algorithm 2)."""

from __future__ import annotations

import torch
from torch import Tensor


def assignment(mask: Tensor, saliency: Tensor, xi: float) -> tuple[Tensor, Tensor]:
    """Where the cells of images come from: (source, taken), both [N, S * S]: of each cell the one that moves there, and whether one does.

    mask: [N, S, S], the image's own share of each cell; saliency: [N, S, S], each image's with sum 1. To move cell i to j costs
    xi * (squared distance / (S - 1)^2) - saliency_i if anything of j is shown. In S rounds each cell goes where that is least, and each
    place keeps the cheapest of those that came, the first one of equals; for the others it costs 1 more from then on.
    """
    side, device = mask.shape[1], mask.device
    at = torch.arange(side, device=device)
    square = ((at[:, None] - at) / max(1, side - 1)) ** 2
    distance = (square[:, None, :, None] + square[None, :, None, :]).view(side**2, side**2)
    cost = xi * distance - saliency.flatten(1)[:, :, None] * (mask.flatten(1) > 0)[:, None]  # [N, cells, places]
    places = torch.arange(side**2, device=device)
    for _ in range(side):
        least, place = cost.min(2)
        came = place[:, :, None] == places  # [N, cells, places]; compared in full: scatter_reduce has no deterministic form on a GPU
        asked = torch.where(came, least[:, :, None], torch.inf)
        first = torch.where(came & (asked == asked.amin(1, keepdim=True)), places[:, None], side**2)
        winner = first.amin(1)
        lost = winner.gather(1, place) != places
        cost.scatter_add_(2, place[..., None], lost.to(cost.dtype)[..., None])
    return winner.clamp(max=side**2 - 1), winner < side**2


def moved(x: Tensor, source: Tensor, taken: Tensor) -> Tensor:
    """Images x [N, C, H, H] with each cell from its source [N, S * S]; 0 where there is none. The result is channels_last."""
    count, channels, size, _ = x.shape
    side = round(source.shape[1] ** 0.5)
    cells = x.permute(0, 2, 3, 1).unflatten(2, (side, -1)).unflatten(1, (side, -1)).transpose(2, 3).flatten(1, 2)  # [N, S * S, h, h, C]
    cells = cells[torch.arange(count, device=x.device)[:, None], source] * taken[..., None, None, None]
    return cells.unflatten(1, (side, side)).transpose(2, 3).reshape(count, size, size, channels).permute(0, 3, 1, 2)
