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
    cheapest = scattered_cheapest if device.type == "cpu" else compared_cheapest
    for _ in range(side):
        least, place = cost.min(2)
        winner = cheapest(least, place)
        lost = winner.gather(1, place) != places
        cost.scatter_add_(2, place[..., None], lost.to(cost.dtype)[..., None])
    return winner.clamp(max=side**2 - 1), winner < side**2


def scattered_cheapest(least: Tensor, place: Tensor) -> Tensor:
    """The cell that each place keeps, [N, cells], or the number of cells where none came. Cell i goes to place[:, i] for least[:, i]."""
    cells = torch.arange(least.shape[1]).expand_as(place)
    cheapest = torch.full_like(least, torch.inf).scatter_reduce(1, place, least, "amin").gather(1, place)
    nobody = torch.full_like(cells, least.shape[1])
    return nobody.scatter_reduce(1, place, torch.where(least == cheapest, cells, least.shape[1]), "amin")


def compared_cheapest(least: Tensor, place: Tensor) -> Tensor:
    """The same by comparing all cells with all places: ten times as slow on a CPU, and on a GPU scatter_reduce is not deterministic."""
    places = torch.arange(least.shape[1], device=least.device)
    came = place[:, :, None] == places  # [N, cells, places]
    asked = torch.where(came, least[:, :, None], torch.inf)
    return torch.where(came & (asked == asked.amin(1, keepdim=True)), places[:, None], len(places)).amin(1)


def moved(x: Tensor, source: Tensor, taken: Tensor) -> Tensor:
    """Images x [N, C, H, H] with each cell from its source [N, S * S]; 0 where there is none. The result is channels_last."""
    count, channels, size, _ = x.shape
    side = round(source.shape[1] ** 0.5)
    cells = x.permute(0, 2, 3, 1).unflatten(2, (side, -1)).unflatten(1, (side, -1)).transpose(2, 3).flatten(1, 2)  # [N, S * S, h, h, C]
    cells = cells[torch.arange(count, device=x.device)[:, None], source] * taken[..., None, None, None]
    return cells.unflatten(1, (side, side)).transpose(2, 3).reshape(count, size, size, channels).permute(0, 3, 1, 2)
