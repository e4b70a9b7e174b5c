"""Random directions and distances to N(0, 1) on the line (PER), against quadrature and SciPy: no code of the implementation's."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Generator, Tensor

from regularizers.projection import DIRECTIONS, directions, kernel, w1, w1_sampled

pytestmark = pytest.mark.usefixtures("one_thread")  # the arrays are small


def rng(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def area(x: list[float]) -> float:
    """W1 between a sample and N(0, 1) as the area between their distribution functions, by quadrature between all kinks."""
    n = len(x)
    ends = np.sort([-14, *x, *stats.norm.ppf(np.arange(1, n) / n), 14])
    steps = [(np.asarray(x) <= (a + b) / 2).mean() for a, b in itertools.pairwise(ends)]

    def part(a: float, b: float, step: float) -> float:
        return integrate.quad(lambda t: abs(stats.norm.cdf(t) - step), a, b, epsabs=1e-13)[0] if a < b else 0.0

    return sum(part(a, b, step) for (a, b), step in zip(itertools.pairwise(ends), steps, strict=True))


def test_kernel_is_the_area_beside_phi() -> None:
    """P1, and the printed values of the protocol sheet, 1.1.1."""
    for t in (-3, -0.3, 0, 1, 4):
        below = integrate.quad(stats.norm.cdf, -40, t, points=[min(t, 0) - 1], epsabs=1e-13, epsrel=1e-13)[0]
        above = integrate.quad(stats.norm.sf, t, 40, points=[max(t, 0) + 1], epsabs=1e-13, epsrel=1e-13)[0]
        assert float(kernel(torch.tensor(t, dtype=torch.float64))) == pytest.approx(below + above, abs=1e-12)
    values = torch.tensor([0.0, 1, -1, 2, 3], dtype=torch.float64)
    assert kernel(values).tolist() == pytest.approx([0.7978845608, 1.1666309412, 1.1666309412, 2.0169814052, 3.0007643086], abs=1e-10)
    assert kernel(values.float()).tolist() == pytest.approx(kernel(values).tolist(), rel=1e-6)
    far = torch.tensor([-40.0, 1e6], dtype=torch.float64)
    assert kernel(far).tolist() == far.abs().tolist()


def test_w1_is_the_area() -> None:
    """P13, with ties, one point, and samples that Phi does not cross."""
    heavy = np.random.default_rng(0).standard_t(3, size=7).tolist()
    for x in (heavy, [-6.0], [0.0] * 9, [-1.0, -1.0, 0.5, 0.5, 0.5, 3.0], [5.0, 6.0, 7.0], [-9.0, 9.0]):
        assert float(w1(torch.tensor(x, dtype=torch.float64))) == pytest.approx(area(x), abs=1e-8)


def test_w1_takes_any_order_shape_and_precision() -> None:
    x = torch.randn(2, 3, 40, generator=rng())
    shuffled, before = x[..., torch.randperm(40, generator=rng(1))], x.clone()
    distance = w1(x)
    assert distance.shape == (2, 3) and distance.dtype == torch.float64 and torch.equal(x, before)
    assert torch.equal(w1(shuffled), distance) and torch.equal(w1(-x).round(decimals=12), distance.round(decimals=12))
    assert float(distance[1, 2]) == pytest.approx(area(x[1, 2].double().tolist()), abs=1e-8)
    assert float(w1(torch.full((3,), -1e8))) == pytest.approx(1e8, rel=1e-12)


def test_w1_sampled_is_scipy_s_on_the_same_draws() -> None:
    x = torch.randn(3, 50, generator=rng(), dtype=torch.float64) * 2
    drawn = torch.empty(3, 50, dtype=torch.float64).normal_(generator=rng(5))
    distances = [stats.wasserstein_distance(a, b) for a, b in zip(x.numpy(), drawn.numpy(), strict=True)]
    assert w1_sampled(x, rng(5)).tolist() == pytest.approx(distances)


@pytest.mark.parametrize("kind", DIRECTIONS)
@pytest.mark.parametrize(("held", "slices", "units"), [(1, 5, 3), (700, 1, 1), (700, 65, 200), (10**9, 256, 300), (10**4, 3, 4000)])
def test_directions_come_in_blocks(kind: str, held: int, slices: int, units: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many vectors at a time as are allowed to be held, at least a single vector, each with its length."""
    monkeypatch.setattr("regularizers.projection.BLOCK", held)
    blocks = list(directions(kind, slices, units, rng()))
    *full, last = (len(v) for v, _ in blocks)
    most = max(1, held // units)
    assert sum(full) + last == slices and all(size == most for size in full) and 0 < last <= most
    for v, length in blocks:
        assert v.shape == (len(length), units) and v.dtype == length.dtype == torch.float32
        assert torch.allclose((v / length[:, None]).double().norm(dim=1), torch.ones(len(v), dtype=torch.float64), atol=1e-6, rtol=0)
    assert len(torch.unique(torch.cat([v for v, _ in blocks]).abs(), dim=0)) == slices  # a block does not repeat the previous block


@pytest.mark.parametrize("kind", DIRECTIONS)
def test_directions_are_the_generator_s(kind: str) -> None:
    state = torch.get_rng_state()
    first, again, other = (torch.cat([v for v, _ in directions(kind, 20, 50, rng(seed))]) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)  # nothing comes from the global generator
    assert len(torch.unique(first.abs())) == (20 * 50 if kind == "gaussian" else 50 + 2 * 19)  # so few numbers are drawn


def many(kind: str, draws: int, slices: int, units: int) -> Tensor:
    """[draws, slices, units], undivided."""
    generator = rng(11)
    return torch.stack([torch.cat([v for v, _ in directions(kind, slices, units, generator)]) for _ in range(draws)])


@pytest.mark.parametrize("kind", DIRECTIONS)
def test_each_vector_is_standard_normal(kind: str) -> None:
    v = many(kind, 4000, 12, 24).double()
    assert float(v.mean()) == pytest.approx(0, abs=0.01) and float(v.square().mean()) == pytest.approx(1, abs=0.01)
    assert float(v.pow(4).mean()) == pytest.approx(3, abs=0.06)
    for slot in (0, 5, 11):
        assert stats.kstest(v[:1000, slot, 3], "norm").pvalue > 1e-3
        covariance = v[:, slot].T @ v[:, slot] / 4000
        assert float((covariance - torch.eye(24)).abs().max()) < 4.5 / math.sqrt(4000 / 2)
        ball = stats.kstest(v[:1000, slot].square().sum(1), stats.chi2(24).cdf)
        assert ball.pvalue > 1e-3
    between = torch.einsum("nsi,nti->nst", v, v).mean(0) / 24  # two vectors of one draw, over units: no common part
    assert float((between - torch.eye(12)).abs().max()) < 4.5 / math.sqrt(4000 * 24 / 2)


def radial(units: int, length: float) -> float:
    """E l(<h, theta>) over all directions: quadrature of E|t - Z| against the density of a coordinate of theta."""
    cosine = np.linspace(-1, 1, 20_001)
    t, density = length * cosine, (1 - cosine**2) ** ((units - 3) / 2)
    mean = t * (2 * stats.norm.cdf(t) - 1) + 2 * stats.norm.pdf(t)
    return integrate.simpson(mean * density, x=cosine) / integrate.simpson(density, x=cosine)


def test_slices_have_the_radial_expectation_and_toeplitz_ones_as_little_noise() -> None:
    """P6, for means of l(<h, theta>) over 256 slices: constant, sparse and random h of RMS 1."""
    units = 1200
    h = torch.stack([torch.ones(units), torch.randn(units, generator=rng(2)).relu(), (torch.arange(units) % (units // 256) == 0).float()])
    h *= math.sqrt(units) / h.norm(dim=1, keepdim=True)
    expected, variances = radial(units, math.sqrt(units)), {}
    for kind in DIRECTIONS:
        generator, rows = rng(7), []
        for _ in range(400):
            blocks = directions(kind, 256, units, generator)
            rows.append(torch.cat([kernel((h @ v.T / length).double()) for v, length in blocks], 1).mean(1))
        means = torch.stack(rows)
        variances[kind] = means.var(0)
        assert ((means.mean(0) - expected).abs() < 3 * (variances[kind] / 400).sqrt()).all()
    # Windows of the same vector are a little correlated: at worst, for units a window apart, the variance doubles.
    assert (variances["toeplitz"] / variances["gaussian"] < torch.tensor([1.6, 1.6, 2.5])).all()
