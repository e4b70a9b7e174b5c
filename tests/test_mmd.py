"""MMD: every property that the protocol names, against closed forms and a double loop in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from counts import Calls
from torch import Tensor

from regularizers.mmd import MULTIPLIERS, _sorted_median, classwise_mmd, mmd

torch.set_num_threads(1)
BANDWIDTHS = ("pooled", "offdiag", "cross", 2.5)


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generic(n: int = 7, m: int = 5, d: int = 4) -> tuple[Tensor, Tensor]:
    """Two samples of different sizes and laws."""
    return normal(n, d), 1.5 * normal(m, d, seed=1000) + 0.5


def distances(x: Tensor, y: Tensor) -> list[float]:
    """The squared distance of every pair."""
    return [math.fsum((a - b).square().tolist()) for a in x.double() for b in y.double()]


def median(x: Tensor, y: Tensor, pairs: str) -> float:
    """The upper of the two middle distances, over the positive distances if it is 0."""
    z = torch.cat([x, y])
    values = sorted(distances(x, y) if pairs == "cross" else distances(z, z))
    if pairs == "offdiag":
        values = values[len(z) :]  # without the zeros of the diagonal
    positive = [value for value in values if value > 0]
    return values[len(values) // 2] or (positive[len(positive) // 2] if positive else math.nan)


def brute(x: Tensor, y: Tensor, multipliers: Sequence[float] = (1, 2, 4, 8, 16), bandwidth: str | float = "pooled") -> float:
    """MMD^2, pair by pair."""
    x, y = x.detach(), y.detach()
    s = median(x, y, bandwidth) if isinstance(bandwidth, str) else bandwidth

    def mean(a: Tensor, b: Tensor) -> float:
        values = [math.exp(-value / (c * s)) for value in distances(a, b) for c in multipliers]
        return math.fsum(values) / len(values)

    return 0.0 if math.isnan(s) else mean(x, x) + mean(y, y) - 2 * mean(x, y)


def root(squared: float) -> float:
    return math.sqrt(max(squared, 0.0))


def gradients(x: Tensor, y: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    value = mmd(x, y, **options)
    gx, gy = torch.autograd.grad(value, (x, y))
    return value.detach(), gx, gy


def test_value_is_the_double_loop() -> None:
    cases = [((7, 5), (1,), "pooled"), ((3, 8), MULTIPLIERS, "offdiag"), ((6, 6), (1, 3, 7), "cross")]
    for size, multipliers, bandwidth in [*cases, ((1, 4), (16, 1, 4), 0.7), ((3, 8), (0.25, 0.5, 5, 5), 11.0)]:
        x, y = generic(*size)
        assert mmd(x, y, multipliers, bandwidth).item() == pytest.approx(root(brute(x, y, multipliers, bandwidth)), abs=1e-6)
        assert mmd(x, y).item() == pytest.approx(root(brute(x, y, (1, 2, 4, 8, 16), "pooled")), abs=1e-6)  # the defaults
    assert mmd(normal(1, 6), normal(1, 6, seed=9)).item() == pytest.approx(0.754951, abs=1e-6)  # of any two points


@pytest.mark.parametrize(
    ("x", "y", "pairs", "s"),
    [
        ([0, 1], [3, 7], "pooled", 9),  # 16 entries: 0 x4, 1 1 4 4 | 9 9 16 16 36 36 49 49; the lower middle is 4
        ([0, 1], [3, 7], "offdiag", 16),  # 12 entries, the lower middle is 9
        ([0, 1], [3, 7], "cross", 36),  # 4 9 | 36 49
        ([0, 1], [3], "pooled", 1),  # 9 entries: 0 0 0 1 | 1 | 4 4 9 9
        ([0, 0, 0, 0], [0, 0, 3], "cross", 9),  # more than half of the distances are 0: the positive distances decide
        ([0, 0, 0, 0, 0], [0, 0, 0, 1, 3], "pooled", 4),  # the positive distances: 1 x16, 4 4, 9 x16
    ],
)
def test_bandwidth_is_the_upper_middle_distance(x: list[float], y: list[float], pairs: str, s: float) -> None:
    a, b = torch.tensor(x).double()[:, None], torch.tensor(y).double()[:, None]
    assert mmd(a, b, (1,), pairs).item() == pytest.approx(root(brute(a, b, (1,), float(s))), abs=1e-7)
    for other in (s / 4, s / 1.5, s * 1.5, s * 4):
        assert abs(mmd(a, b, (1,), pairs).item() - root(brute(a, b, (1,), other))) > 1e-3


def test_unknown_bandwidth_and_empty_sides_are_refused() -> None:
    x, y = generic()
    with pytest.raises(ValueError, match="pooled, offdiag, cross"):
        mmd(x, y, bandwidth="mean")
    for empty in ((x[:0], y), (x, y[:0])):
        with pytest.raises(ValueError, match="at least one sample"):
            mmd(*empty)


def test_distance_of_equal_samples() -> None:
    x, _ = generic()
    assert mmd(x, x.flip(0)).item() == pytest.approx(1e-4, rel=1e-3)  # the offset under the root, whose slope at 0 is infinite
    assert mmd(torch.zeros(3, 2), torch.zeros(2, 2)).item() == 0.0  # without any distance to take a bandwidth from
    assert classwise_mmd(torch.ones(4, 2), torch.ones(4, 2), torch.arange(4), torch.arange(4), 4).tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("labels_x", "labels_y", "classes", "bandwidth"),
    [
        ([0] * 7, [0] * 5, 1, "pooled"),
        ([0, 0, 0, 1, 2, 2, 2, 2], [0, 1, 1, 1, 1, 2], 3, "cross"),
        ([0, 0, 3, 3, 5, 5, 1], [3, 3, 0, 4, 4, 5, 5, 5], 7, "offdiag"),  # 1 lacks y, 4 lacks x, 2 and 6 lack both
        ([0, 1, 2], [2, 1, 0], 3, 2.5),
        ([0, 0], [1, 1, 1], 2, "pooled"),
    ],
)
def test_classes_at_once_are_the_loop_over_classes(labels_x: list[int], labels_y: list[int], classes: int, bandwidth: str | float) -> None:
    a, b = torch.tensor(labels_x), torch.tensor(labels_y)
    x, y = generic(len(a), len(b))
    x, y = (x + 3 * a[:, None]).requires_grad_(), (y + 3 * b[:, None]).requires_grad_()  # so classes have bandwidths of their own
    values, expected = [0.0] * classes, (torch.zeros_like(x), torch.zeros_like(y))
    for k in range(classes):
        p, q = a == k, b == k
        if p.any() and q.any():
            values[k] = root(brute(x[p], y[q], (1, 2, 4), bandwidth))
            _, expected[0][p], expected[1][q] = gradients(x.detach()[p], y.detach()[q], multipliers=(1, 2, 4), bandwidth=bandwidth)
    most = max(*torch.bincount(a).tolist(), *torch.bincount(b).tolist())
    for bound in (None, most, most + 3):
        classwise = classwise_mmd(x, y, a, b, classes, (1, 2, 4), bandwidth, bound)
        assert classwise.tolist() == pytest.approx(values, abs=1e-6)
        torch.testing.assert_close(torch.autograd.grad(classwise.sum(), (x, y)), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("pairs", ["pooled", "offdiag", "cross"])
def test_bandwidth_is_a_constant_to_the_gradient(pairs: str) -> None:
    x, y = normal(15, 20).relu(), normal(15, 20, seed=50).relu()
    _, gx, gy = gradients(x, y, bandwidth=pairs)
    torch.testing.assert_close((gx, gy), gradients(x, y, bandwidth=median(x, y, pairs))[1:], rtol=1e-8, atol=1e-12)
    centre = torch.cat([x, y]).mean(0)
    radial = (gx * (x - centre)).sum() + (gy * (y - centre)).sum()
    assert radial > 1e-2  # the samples are pulled together; a differentiated bandwidth would make this 0


def test_gradcheck() -> None:
    x, y = (side.requires_grad_() for side in generic(4, 3, 3))
    labels = torch.tensor([1, 0, 1, 3]), torch.tensor([0, 1, 2])
    for multipliers in (MULTIPLIERS, (1, 3, 7)):
        assert torch.autograd.gradcheck(lambda a, b, c=multipliers: mmd(a, b, c, 2.0), (x, y))
        assert torch.autograd.gradcheck(lambda a, b, c=multipliers: classwise_mmd(a, b, *labels, 4, c, 2.0), (x, y))


@pytest.mark.parametrize("bandwidth", BANDWIDTHS)
def test_degenerate_features_have_finite_values_and_gradients(bandwidth: str | float) -> None:
    for dtype in (torch.float32, torch.float64):
        x, y = (side.to(dtype) for side in generic())
        zero, dead = torch.zeros(6, 4, dtype=dtype), torch.full((6, 4), 7.3, dtype=dtype)
        for a, b in [(x, x), (x, x.flip(0)), (zero, dead), (x[:1], y[:1]), (x[:1], x[:1]), (x[:1].expand(9, -1), y)]:
            value, gx, gy = gradients(a, b, bandwidth=bandwidth)
            assert value.isfinite() and gx.isfinite().all() and gy.isfinite().all()
            assert value.item() == pytest.approx(root(brute(a, b, bandwidth=bandwidth)), abs=6e-4)
        for a in (zero, dead):
            _, gx, gy = gradients(a, a, bandwidth=bandwidth)
            assert not gx.any() and not gy.any()


def test_far_offsets_keep_four_digits() -> None:
    x, y = normal(15, 100).relu().float() + 100, normal(15, 100, seed=1).relu().float() + 100
    value, gx, gy = gradients(x, y)
    assert value.item() == pytest.approx(root(brute(x, y)), rel=1e-4)
    for gradient, exact in zip((gx, gy), gradients(x.double(), y.double())[1:], strict=True):
        assert (gradient - exact).norm() < 1e-3 * exact.norm()


def test_repeated_samples_do_not_make_rounding_the_bandwidth() -> None:
    """18 + 12 copies of two points: more than half of the distances are 0, so the bandwidth is the only other distance."""
    gap = 10 / 15 - 8 / 15  # of the first point's share in x and in y
    wanted = math.sqrt(gap**2 * 2 * (1 - sum(math.exp(-1 / c) for c in MULTIPLIERS) / 5))
    for seed, (width, dtype) in enumerate([(20, torch.float32), (512, torch.float32), (100, torch.float64)] * 20):
        point = normal(2, width, seed=seed).to(dtype)
        value, gx, gy = gradients(point[[0] * 10 + [1] * 5], point[[0] * 8 + [1] * 7])
        assert value.item() == pytest.approx(wanted, rel=1e-4)
        assert max(gx.abs().max(), gy.abs().max()) < 1


@pytest.mark.parametrize(("bandwidth", "most"), [("pooled", 160), ("offdiag", 165), ("cross", 160), (2.0, 150)])
def test_no_loop_over_classes_and_no_wait_for_the_device(bandwidth: str | float, most: int) -> None:
    seen = {}
    for classes, bound in ((2, 2), (100, 2), (10, None)):
        labels, ones = torch.arange(2 * classes) % classes, torch.ones(classes)
        (x, y), other = (side.float().requires_grad_() for side in generic(len(labels), len(labels), 16)), labels.flip(0)
        with Calls() as seen[bound, classes]:
            classwise_mmd(x, y, labels, other, classes, bandwidth=bandwidth, per_class=bound).backward(ones)
    many = seen[2, 100]
    assert seen[2, 2].kernels == many.kernels
    assert 50 < len(many.kernels) <= most  # forward and backward; views cost a GPU nothing
    assert many.waits == [] != seen[None, 10].waits  # counting the samples of a class reads the device


@pytest.mark.parametrize("pairs", [1, 2, 7, 900])
def test_the_median_for_a_gpu_is_torch_s(pairs: int) -> None:
    """Of rows with any number of nans, a row with nothing else, and with repeated values."""
    x = torch.randn(pairs + 1, pairs, generator=torch.Generator().manual_seed(pairs)).mul(4).round()
    x[torch.arange(pairs + 1)[:, None] > torch.arange(pairs).flip(0)] = torch.nan
    wanted = x.nanmedian(1).values
    assert wanted[-1].isnan() and not wanted[0].isnan()
    torch.testing.assert_close(_sorted_median(x), wanted, rtol=0, atol=0, equal_nan=True)
