"""PuzzleMix's transport: against loops over cells and rounds; and neither mask nor transport waits for the host."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Generator, Tensor
from torch.autograd.profiler import profile

from regularizers.puzzle_mask import energy, minimum, shares
from regularizers.puzzle_transport import assignment, compared_cheapest, moved, scattered_cheapest

pytestmark = pytest.mark.usefixtures("one_thread")  # the arrays are small

XI = 0.8


def drawn(count: int, n: int, side: int, seed: int) -> tuple[Tensor, Tensor]:
    """Masks of n x n blocks, on side x side cells; and saliency, of which few cells have most."""
    rng = Generator().manual_seed(seed)
    z = torch.randint(3, (count, n, n), generator=rng) / 2
    saliency = (3 * torch.randn(count, side**2, generator=rng)).softmax(1).view(count, side, side)
    return z.repeat_interleave(side // n, 1).repeat_interleave(side // n, 2), saliency


def costs(mask: np.ndarray, saliency: np.ndarray, xi: float) -> np.ndarray:
    """Of moving cell i to place j, [cells, places], each in the precision of the saliency (sheet, 1.6)."""
    side, real = len(mask), saliency.dtype.type
    at = np.indices((side, side)).reshape(2, -1)
    steps = ((at[:, :, None] - at[:, None]).astype(real) / real(max(1, side - 1))) ** 2
    return real(xi) * (steps[0] + steps[1]) - np.where(mask.flatten() > 0, saliency.flatten()[:, None], 0)


def rounds(cost: np.ndarray, side: int) -> list[int | None]:
    """The cell that moves to each place. Of equals the first counts: of places for a cell, and of cells for a place."""
    cost = cost.copy()
    for _ in range(side):
        winner: dict[int, int] = {}
        wanted = [int(row.argmin()) for row in cost]
        for i, j in enumerate(wanted):
            if j not in winner or cost[i, j] < cost[winner[j], j]:
                winner[j] = i
        for i, j in enumerate(wanted):
            if winner[j] != i:
                cost[i, j] += 1
    return [winner.get(j) for j in range(len(cost))]


@pytest.mark.parametrize(("side", "n", "count", "xi"), [(1, 1, 3, XI), (2, 2, 20, 0.0), (4, 2, 8, 5.0), (8, 4, 2, XI), (16, 16, 1, XI)])
def test_assignment_is_the_rounds_one_by_one(side: int, n: int, count: int, xi: float) -> None:
    """Equals among the costs, too: saliency the same everywhere, or of three values; distance for nothing."""
    mask, saliency = drawn(count, n, side, seed=n)
    for values in (saliency, torch.full_like(saliency, 1 / side**2), (8 * saliency).ceil().clamp(max=3) / 8):
        source, taken = assignment(mask, values, xi)
        assert source.shape == taken.shape == (count, side**2) and taken.dtype == torch.bool
        for place in range(count):
            expected = rounds(costs(mask[place].numpy(), values[place].numpy(), xi), side)
            pairs = zip(source[place].tolist(), taken[place].tolist(), strict=True)
            assert [cell if comes else None for cell, comes in pairs] == expected


@pytest.mark.parametrize(("channels", "size", "side", "dtype"), [(1, 4, 4, torch.bfloat16), (3, 32, 8, torch.float64)])
def test_moved_is_a_loop_over_cells(channels: int, size: int, side: int, dtype: torch.dtype) -> None:
    """Sources more than once, too; 0 where there is none."""
    rng, h = Generator().manual_seed(side), size // side
    x = torch.randn(5, channels, size, size, generator=rng).to(dtype)
    source, taken = torch.randint(side**2, (5, side**2), generator=rng), torch.rand(5, side**2, generator=rng) < 0.7
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        before, result = given.clone(), moved(given, source, taken)
        assert result.is_contiguous(memory_format=torch.channels_last) and result.dtype == dtype and torch.equal(given, before)
        for image, place in itertools.product(range(5), range(side**2)):
            (row, column), (above, left) = (divmod(cell, side) for cell in (place, int(source[image, place])))
            there = result[image, :, row * h : (row + 1) * h, column * h : (column + 1) * h]
            here = x[image, :, above * h : (above + 1) * h, left * h : (left + 1) * h]
            assert torch.equal(there, here if taken[image, place] else torch.zeros_like(here))


def test_both_ways_to_find_the_cheapest_agree() -> None:
    """With equal costs, and places where nobody comes."""
    for count, cells in ((1, 1), (3, 4), (5, 64), (2, 256)):
        rng = Generator().manual_seed(cells)
        for _ in range(5):
            least, place = torch.randint(3, (count, cells), generator=rng).float(), torch.randint(cells, (count, cells), generator=rng)
            assert torch.equal(scattered_cheapest(least, place), compared_cheapest(least, place))


def test_nothing_waits_for_the_host() -> None:
    """Nor does mask or transport copy from it (torch.tensor of numbers), which cannot be recorded in a CUDA graph."""
    waits = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::lift_fresh"}
    x, lam = torch.rand(4, 3, 32, 32), torch.tensor(0.5)
    with profile() as seen:
        z = minimum(energy(x[:, 0], x, torch.arange(4), lam, 8, 1.2, 0.5, 0.2, 4), 3).permute(2, 0, 1)
        moved(x, *assignment(z, shares(x[:, 0], 8), XI))
    names = {event.name for event in seen.function_events}
    assert {"aten::addcmul", "aten::scatter_add_"} <= names and not names & waits
    with profile() as seen:
        lam.expand(3)[torch.tensor([True, False, False])].item()
    assert len({event.name for event in seen.function_events} & waits) >= 3
