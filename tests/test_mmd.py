"""MMD: every property the protocol names, against closed forms and a double loop in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from regularizers.mmd import MULTIPLIERS, _sorted_median, classwise_mmd, mmd

torch.set_num_threads(1)
ONE = (1.0,)
POINT_MASSES = math.sqrt(2 * (1 - sum(math.exp(-1 / c) for c in (1, 2, 4, 8, 16)) / 5))  # n = m, far apart: s is their distance
SYNCHRONISING = ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.masked_select", "aten.unique", "aten._unique2")


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generic(n: int = 7, m: int = 5, d: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two samples of different sizes and laws."""
    return normal(n, d, seed=seed), 1.5 * normal(m, d, seed=seed + 1000) + 0.5


def distance(a: Tensor, b: Tensor) -> float:
    return math.fsum((a - b).double().square().tolist())


def median(x: Tensor, y: Tensor, pairs: str) -> float:
    """The upper of the two middle distances, over the positive ones if it is 0."""
    z = [*x.double(), *y.double()]
    if pairs == "cross":
        found = [distance(a, b) for a in x.double() for b in y.double()]
    else:
        found = [distance(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if pairs == "pooled" or i != j]
    middle = sorted(found)[len(found) // 2]
    if middle > 0:
        return middle
    positive = sorted(value for value in found if value > 0)
    return positive[len(positive) // 2] if positive else math.nan


def brute(x: Tensor, y: Tensor, multipliers: Sequence[float] = MULTIPLIERS, bandwidth: str | float = "pooled") -> float:
    """MMD^2, pair by pair."""
    x, y = x.detach().double(), y.detach().double()
    s = median(x, y, bandwidth) if isinstance(bandwidth, str) else bandwidth
    if math.isnan(s):
        return 0.0

    def mean(a: Tensor, b: Tensor) -> float:
        values = [math.exp(-distance(p, q) / (c * s)) for p in a for q in b for c in multipliers]
        return math.fsum(values) / len(values)

    return mean(x, x) + mean(y, y) - 2 * mean(x, y)


def root(squared: float) -> float:
    return math.sqrt(max(squared, 0.0))


def gradients(x: Tensor, y: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    value = mmd(x, y, **options)
    gx, gy = torch.autograd.grad(value, (x, y))
    return value.detach(), gx, gy


# The value


@pytest.mark.parametrize("bandwidth", ["pooled", "offdiag", "cross", 0.7, 11.0])
@pytest.mark.parametrize("multipliers", [ONE, MULTIPLIERS, (1, 3, 7), (16, 1, 4), (0.25, 0.5, 5), (2, 2)], ids=str)
@pytest.mark.parametrize("size", [(7, 5), (3, 8), (6, 6), (1, 4)], ids=str)
def test_value_is_the_double_loop(size: tuple[int, int], multipliers: tuple[float, ...], bandwidth: str | float) -> None:
    x, y = generic(*size)
    assert mmd(x, y, multipliers, bandwidth).item() == pytest.approx(root(brute(x, y, multipliers, bandwidth)), abs=1e-6)


def test_defaults_are_five_kernels_and_the_pooled_median() -> None:
    x, y = generic()
    assert mmd(x, y).item() == pytest.approx(root(brute(x, y, (1, 2, 4, 8, 16), "pooled")), abs=1e-6)


@pytest.mark.parametrize("s", [0.5, 2.0, 9.0])
def test_kernel_has_no_factor_two(s: float) -> None:
    x, y = torch.tensor([[0.0, 1.0]]).double(), torch.tensor([[2.0, 0.0]]).double()  # 5 apart, squared
    assert mmd(x, y, ONE, s).item() == pytest.approx(math.sqrt(2 - 2 * math.exp(-5 / s)), abs=1e-7)


@pytest.mark.parametrize(
    ("x", "y", "pairs", "s"),
    [
        ([0, 1], [3, 7], "pooled", 9),  # 16 entries: 0 x4, 1 1 4 4 | 9 9 16 16 36 36 49 49; the lower middle is 4
        ([0, 1], [3, 7], "offdiag", 16),  # 12 entries, the lower middle is 9
        ([0, 1], [3, 7], "cross", 36),  # 4 9 | 36 49
        ([0, 1], [3], "pooled", 1),  # 9 entries: 0 0 0 1 | 1 | 4 4 9 9
        ([0, 1], [3], "offdiag", 4),
        ([0, 1], [3], "cross", 9),
        ([2], [5], "pooled", 9),  # n = m = 1: 0 0 | 9 9
        ([2], [5], "offdiag", 9),
        ([2], [5], "cross", 9),
        ([0, 0, 0, 0], [0, 0, 3], "pooled", 9),  # more than half of the pairs are equal: the positive ones decide
        ([0, 0, 0, 0], [0, 0, 3], "offdiag", 9),
        ([0, 0, 0, 0], [0, 0, 3], "cross", 9),
        ([0, 0, 0, 0, 0], [0, 0, 0, 1, 3], "pooled", 4),  # the positive ones: 1 x16, 4 4, 9 x16
    ],
)
def test_bandwidth_is_the_upper_middle_distance(x: list[float], y: list[float], pairs: str, s: float) -> None:
    a, b = torch.tensor(x).double()[:, None], torch.tensor(y).double()[:, None]
    assert mmd(a, b, ONE, pairs).item() == pytest.approx(root(brute(a, b, ONE, float(s))), abs=1e-7)
    for other in (s / 4, s / 1.5, s * 1.5, s * 4):
        assert abs(mmd(a, b, ONE, pairs).item() - root(brute(a, b, ONE, other))) > 1e-3


def test_unknown_bandwidth_and_empty_sides_are_refused() -> None:
    x, y = generic()
    with pytest.raises(ValueError, match="pooled, offdiag, cross"):
        mmd(x, y, bandwidth="mean")
    for a, b in ((x[:0], y), (x, y[:0])):
        with pytest.raises(ValueError, match="at least one sample"):
            mmd(a, b)


# (1) to (7): invariances and bounds


@pytest.mark.parametrize("bandwidth", ["pooled", "offdiag", "cross", 3.0])
def test_symmetric(bandwidth: str | float) -> None:
    x, y = generic()
    assert mmd(x, y, bandwidth=bandwidth).item() == pytest.approx(mmd(y, x, bandwidth=bandwidth).item(), rel=1e-12)


@pytest.mark.parametrize("bandwidth", ["pooled", 3.0])
def test_invariant_to_order_translation_rotation(bandwidth: str | float) -> None:
    x, y = generic()
    value = mmd(x, y, bandwidth=bandwidth).item()
    rotation, _ = torch.linalg.qr(normal(4, 4, seed=9))
    shift = 5 * normal(4, seed=8)
    for a, b in ((x[torch.randperm(7)], y[torch.randperm(5)]), (x + shift, y + shift), (x @ rotation, y @ rotation)):
        assert mmd(a, b, bandwidth=bandwidth).item() == pytest.approx(value, rel=1e-10)
    assert abs(mmd(x + shift, y, bandwidth=bandwidth).item() - value) > 1e-2


@pytest.mark.parametrize("scale", [1e-3, 0.3, 40.0, 1e4])
def test_common_scale_matters_to_a_fixed_bandwidth_only(scale: float) -> None:
    x, y = generic()
    for pairs in ("pooled", "offdiag", "cross"):
        assert mmd(scale * x, scale * y, bandwidth=pairs).item() == pytest.approx(mmd(x, y, bandwidth=pairs).item(), rel=1e-10)
    assert abs(mmd(scale * x, scale * y, bandwidth=3.0) - mmd(x, y, bandwidth=3.0)) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bounds(dtype: torch.dtype) -> None:
    for seed in range(50):
        x, y = (side.to(dtype) for side in generic(1 + seed % 6, 1 + seed % 4, 1 + seed % 9, seed=seed))
        for bandwidth in ("pooled", "offdiag", "cross", 1e-3, 1.0, 1e3):
            assert 0 <= mmd(x, y, bandwidth=bandwidth).item() <= math.sqrt(2) + 1e-6
    apart = torch.zeros(1, 3, dtype=dtype), torch.full((1, 3), 50.0, dtype=dtype)
    assert mmd(*apart, bandwidth=1.0).item() == pytest.approx(math.sqrt(2), abs=1e-6)  # the bound is reached


@pytest.mark.parametrize("n", [1, 2, 7, 15])
def test_two_point_masses(n: int) -> None:
    assert pytest.approx(0.754951, abs=1e-6) == POINT_MASSES
    x, y = torch.zeros(n, 3), torch.tensor([[1e3, -2e3, 5e2]]).expand(n, 3)
    assert mmd(x, y).item() == pytest.approx(POINT_MASSES, abs=1e-6)


def test_zero_only_for_equal_distributions() -> None:
    x, y = generic()
    for a, b in ((x, x), (x, x.flip(0)), (x, torch.cat([x, x, x])), (x[:1], x[:1].expand(5, -1))):
        assert mmd(a, b, bandwidth=2.0).item() <= 1.01e-4  # the offset under the root
        assert mmd(a, b).item() <= 1.01e-4
    near = x.clone()
    near[0, 0] += 0.5
    for a, b in ((x, y), (x, near), (x, x[:-1]), (x, torch.cat([x, x[:1]]))):
        assert mmd(a, b, bandwidth=2.0).item() > 1e-2


@pytest.mark.parametrize("bandwidth", ["pooled", 2.0])
def test_every_sample_twice_changes_nothing(bandwidth: str | float) -> None:
    x, y = generic()
    value = mmd(x, y, bandwidth=bandwidth).item()
    assert mmd(x.repeat(2, 1), y.repeat(2, 1), bandwidth=bandwidth).item() == pytest.approx(value, rel=1e-10)
    assert mmd(x.repeat(3, 1), y, bandwidth=2.0).item() == pytest.approx(mmd(x, y, bandwidth=2.0).item(), rel=1e-10)


@pytest.mark.parametrize("multipliers", [MULTIPLIERS, (1, 3, 7)], ids=str)
def test_mixture_is_the_mean_of_squares(multipliers: tuple[float, ...]) -> None:
    x, y = generic()
    squares = [mmd(x, y, ONE, 2.0 * c).item() ** 2 for c in multipliers]
    assert mmd(x, y, multipliers, 2.0).item() ** 2 == pytest.approx(sum(squares) / len(squares), rel=1e-9)
    roots = [math.sqrt(square) for square in squares]
    assert abs(mmd(x, y, multipliers, 2.0).item() - sum(roots) / len(roots)) > 1e-4  # one root at the end, not the mean of roots


# (8), (9): classes


def loop(x: Tensor, y: Tensor, labels_x: Tensor, labels_y: Tensor, classes: int, **options: Any) -> list[float]:
    sides = [(x[labels_x == k], y[labels_y == k]) for k in range(classes)]
    return [root(brute(a, b, **options)) if len(a) and len(b) else 0.0 for a, b in sides]


def test_one_class_is_the_whole() -> None:
    x, y = generic()
    labels = torch.zeros(7, dtype=torch.long), torch.zeros(5, dtype=torch.long)
    for bound in (None, 7, 9):
        value = classwise_mmd(x, y, *labels, 1, per_class=bound)
        assert value.shape == (1,) and value.item() == pytest.approx(mmd(x, y).item(), rel=1e-12)


LABELS = {
    "equal": ([0, 1, 2, 0, 1, 2], [0, 1, 2, 2, 1, 0], 3),
    "unsorted": ([2, 0, 1, 1, 0, 2, 0, 0], [1, 1, 2, 0, 0, 2, 2, 1], 3),
    "unequal": ([0, 0, 0, 1, 2, 2, 2, 2], [0, 1, 1, 1, 1, 2], 3),
    "missing": ([0, 0, 3, 3, 5, 5, 1], [3, 3, 0, 4, 4, 5, 5, 5], 7),  # 1 lacks y, 4 lacks x, 2 and 6 lack both
    "one sample": ([0, 1, 2], [2, 1, 0], 3),
    "disjoint": ([0, 0], [1, 1, 1], 2),
}


@pytest.mark.parametrize("bandwidth", ["pooled", "offdiag", "cross", 2.5])
@pytest.mark.parametrize("name", LABELS)
def test_classes_at_once_are_the_loop_over_classes(name: str, bandwidth: str | float) -> None:
    labels_x, labels_y, classes = LABELS[name]
    a, b = torch.tensor(labels_x), torch.tensor(labels_y)
    x, y = generic(len(a), len(b))
    x, y = x + 3 * a[:, None], y + 3 * b[:, None]  # classes have places and so bandwidths of their own
    most = max(*torch.bincount(a).tolist(), *torch.bincount(b).tolist())
    wanted = loop(x, y, a, b, classes, multipliers=(1, 2, 4), bandwidth=bandwidth)
    for bound in (None, most, most + 3):
        found = classwise_mmd(x, y, a, b, classes, (1, 2, 4), bandwidth, bound)
        assert found.tolist() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("name", LABELS)
def test_class_gradients_are_those_of_the_loop(name: str) -> None:
    labels_x, labels_y, classes = LABELS[name]
    a, b = torch.tensor(labels_x), torch.tensor(labels_y)
    x, y = (side.requires_grad_() for side in generic(len(a), len(b)))
    found = torch.autograd.grad(classwise_mmd(x, y, a, b, classes).sum(), (x, y))
    expected = torch.zeros_like(x), torch.zeros_like(y)
    for k in range(classes):
        p, q = a == k, b == k
        if p.any() and q.any():
            _, expected[0][p], expected[1][q] = gradients(x.detach()[p], y.detach()[q])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


# (10) to (13): gradients


def test_gradients_sum_to_zero() -> None:
    for bandwidth in ("pooled", "offdiag", "cross", 2.0):
        _, gx, gy = gradients(*generic(), bandwidth=bandwidth)
        assert gx.abs().max() > 1e-3 and gy.abs().max() > 1e-3
        assert (gx.sum(0) + gy.sum(0)).abs().max() < 1e-12


def attached(x: Tensor, y: Tensor) -> Tensor:
    """MMD with the pooled median inside the graph: what must not be built."""
    z = torch.cat([x, y])
    pairs = (z[:, None] - z[None]).square().sum(-1)
    s = pairs.flatten().sort().values[pairs.numel() // 2]
    kernel = torch.stack([torch.exp(-pairs / (c * s)) for c in MULTIPLIERS]).mean(0)
    n = len(x)
    return (kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()).sqrt()


def test_bandwidth_is_a_constant_to_the_gradient() -> None:
    for seed in range(5):
        x, y = normal(15, 20, seed=seed).relu(), normal(15, 20, seed=seed + 50).relu()
        centre = torch.cat([x, y]).mean(0)

        def radial(gx: Tensor, gy: Tensor, x: Tensor = x, y: Tensor = y, centre: Tensor = centre) -> float:
            return (gx * (x - centre)).sum().item() + (gy * (y - centre)).sum().item()

        _, gx, gy = gradients(x, y)
        assert radial(gx, gy) > 1e-2  # it pulls the samples together
        fixed = gradients(x, y, bandwidth=median(x, y, "pooled"))
        torch.testing.assert_close((gx, gy), fixed[1:], rtol=1e-8, atol=1e-12)
        a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
        assert abs(radial(*torch.autograd.grad(attached(a, b), (a, b)))) < 1e-10


@pytest.mark.parametrize("multipliers", [ONE, MULTIPLIERS, (1, 3, 7)], ids=str)
def test_gradcheck(multipliers: tuple[float, ...]) -> None:
    x, y = (side.requires_grad_() for side in generic(4, 3, 3))
    assert torch.autograd.gradcheck(lambda a, b: mmd(a, b, multipliers, 2.0), (x, y))
    labels = torch.tensor([1, 0, 1, 3]), torch.tensor([0, 1, 2])
    assert torch.autograd.gradcheck(lambda a, b: classwise_mmd(a, b, *labels, 4, multipliers, 2.0), (x, y))
    assert torch.autograd.gradcheck(lambda a, b: classwise_mmd(a, b, *labels, 4, multipliers, 2.0, 2), (x, y))


@pytest.mark.parametrize("bandwidth", ["pooled", "offdiag", "cross", 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_features_have_finite_values_and_gradients(dtype: torch.dtype, bandwidth: str | float) -> None:
    x, y = (side.to(dtype) for side in generic())
    zero, one = torch.zeros(6, 4, dtype=dtype), torch.full((6, 4), 7.3, dtype=dtype)
    cases = [(x, x), (x, x.flip(0)), (zero, zero), (one, one), (zero, one), (x[:1], y[:1]), (x[:1], x[:1]), (x[:1].expand(9, -1), y)]
    for a, b in cases:
        value, gx, gy = gradients(a, b, bandwidth=bandwidth)
        assert value.isfinite() and gx.isfinite().all() and gy.isfinite().all()
        assert value.item() == pytest.approx(root(brute(a, b, bandwidth=bandwidth)), abs=6e-4)
    for a in (zero, one):
        value, gx, gy = gradients(a, a, bandwidth=bandwidth)
        assert not gx.any() and not gy.any()


def test_one_point_alone_is_exactly_zero() -> None:
    assert mmd(torch.zeros(3, 2), torch.zeros(2, 2)).item() == 0.0  # no distance to take a bandwidth from
    for value in classwise_mmd(torch.ones(4, 2), torch.ones(4, 2), torch.arange(4), torch.arange(4), 4).tolist():
        assert value == 0.0


def test_one_sample_a_side_has_a_constant_value_and_a_gradient() -> None:
    for seed in range(5):
        value, gx, gy = gradients(normal(1, 6, seed=seed), normal(1, 6, seed=seed + 9))
        assert value.item() == pytest.approx(POINT_MASSES, abs=1e-7)
        assert gx.norm() > 1e-3 and torch.equal(gx, -gy)


# Rounding


@pytest.mark.parametrize("width", [100, 512])
def test_far_offsets_keep_four_digits(width: int) -> None:
    x, y = normal(15, width).relu().float() + 100, normal(15, width, seed=1).relu().float() + 100
    value, gx, gy = gradients(x, y)
    assert value.item() == pytest.approx(root(brute(x, y)), rel=1e-4)
    _, *exact = gradients(x.double(), y.double())
    for found, wanted in zip((gx, gy), exact, strict=True):
        assert (found - wanted).norm() < 1e-3 * wanted.norm()


@pytest.mark.parametrize("width", [20, 100, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_repeated_samples_do_not_make_rounding_the_bandwidth(dtype: torch.dtype, width: int) -> None:
    # 18 + 12 copies of two points: more than half of the distances are 0, so the bandwidth is the only other one, D
    p, q = torch.tensor([10, 5]) / 15, torch.tensor([8, 7]) / 15
    between = sum(math.exp(-1 / c) for c in MULTIPLIERS) / 5
    gap = (p - q)[0].item()
    wanted = math.sqrt(gap**2 * 2 * (1 - between))
    for seed in range(60):
        point = normal(2, width, seed=seed).to(dtype)
        value, gx, gy = gradients(point[[0] * 10 + [1] * 5], point[[0] * 8 + [1] * 7])
        assert value.item() == pytest.approx(wanted, rel=1e-4)
        assert max(gx.abs().max(), gy.abs().max()) < 1


# Speed


class Calls(TorchDispatchMode):
    """Every operation that reaches the dispatcher, those of them that compute, and those that make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.kernels: list[str] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.names.append(name)
        if not func.is_view and not name.startswith(("aten._unsafe_view", "aten.empty", "profiler")):
            self.kernels.append(name)
        boolean = name.startswith("aten.index") and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
            for group in args[1:]
            if isinstance(group, list | tuple)
            for index in group
        )
        if boolean or name.rsplit(".", 1)[0] in SYNCHRONISING:
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


def calls(classes: int, per_class: int | None, bandwidth: str | float = "pooled") -> Calls:
    labels = torch.arange(2 * classes) % classes
    other, ones = labels.flip(0), torch.ones(classes)
    x, y = (torch.randn(len(labels), 16, generator=torch.Generator().manual_seed(seed)).requires_grad_() for seed in (0, 1))
    with Calls() as seen:
        classwise_mmd(x, y, labels, other, classes, bandwidth=bandwidth, per_class=per_class).backward(ones)
    assert x.grad is not None and x.grad.any()
    return seen


@pytest.mark.parametrize(("bandwidth", "most"), [("pooled", 160), ("offdiag", 165), ("cross", 160), (2.0, 150)])
def test_no_loop_over_classes_and_no_wait_for_the_device(bandwidth: str | float, most: int) -> None:
    few, many = calls(2, 2, bandwidth), calls(100, 2, bandwidth)
    assert few.names == many.names
    assert 50 < len(many.kernels) <= most  # forward and backward; views cost a GPU nothing
    assert many.waits == []


@pytest.mark.parametrize("pairs", [1, 2, 7, 900])
def test_the_median_for_a_gpu_is_torch_s(pairs: int) -> None:
    """Of rows with any number of nans, one with nothing else, and with repeated values."""
    x = torch.randn(pairs + 1, pairs, generator=Generator().manual_seed(pairs)).mul(4).round()
    x[torch.arange(pairs + 1)[:, None] > torch.arange(pairs).flip(0)] = torch.nan
    wanted = x.nanmedian(1).values
    assert wanted[-1].isnan() and not wanted[0].isnan()
    torch.testing.assert_close(_sorted_median(x), wanted, rtol=0, atol=0, equal_nan=True)


def test_a_bound_by_the_batch_changes_no_value() -> None:
    """What is taken on a GPU, where counting the classes' samples would make the host wait."""
    x, y = (torch.randn(12, 5, generator=Generator().manual_seed(seed), dtype=torch.float64) for seed in (1, 2))
    labels_x, labels_y = torch.tensor([0, 0, 0, 1, 1, 2] * 2), torch.tensor([0, 1, 1, 1, 3, 3] * 2)
    counted = classwise_mmd(x, y, labels_x, labels_y, 4)
    torch.testing.assert_close(classwise_mmd(x, y, labels_x, labels_y, 4, per_class=12), counted)
    assert counted.tolist()[2:] == [0, 0] and (counted[:2] > 0).all()


def test_waits_are_seen() -> None:
    assert calls(10, None).waits  # counting the samples of a class reads the device
    with Calls() as seen:
        values = torch.arange(4.0)
        values[values > 1].sum().item()
    assert len(seen.waits) >= 2
