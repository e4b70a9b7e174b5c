"""Random directions and distances to N(0, 1) on the line (PER), against quadrature and SciPy: no code of the implementation's."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Generator, Tensor

from regularizers.projection import DIRECTIONS, C, directions, kernel, w1, w1_sampled

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


# the kernel


@pytest.mark.parametrize("t", [-3, -1, -0.3, 0, 0.5, 1, 2, 4])
def test_kernel_is_the_area_beside_phi(t: float) -> None:
    """P1."""
    below = integrate.quad(stats.norm.cdf, -40, t, points=[min(t, 0) - 1], epsabs=1e-13, epsrel=1e-13)[0]
    above = integrate.quad(stats.norm.sf, t, 40, points=[max(t, 0) + 1], epsabs=1e-13, epsrel=1e-13)[0]
    assert float(kernel(torch.tensor(t, dtype=torch.float64))) == pytest.approx(below + above, abs=1e-12)


def test_kernel_s_printed_values() -> None:
    """Protocol sheet, 1.1.1."""
    t = torch.tensor([0.0, 1, -1, 2, 3], dtype=torch.float64)
    assert kernel(t).tolist() == pytest.approx([0.7978845608, 1.1666309412, 1.1666309412, 2.0169814052, 3.0007643086], abs=1e-10)
    assert pytest.approx(0.7978845608, abs=1e-10) == C
    far = torch.tensor([-40.0, 1e6], dtype=torch.float64)
    assert kernel(far).tolist() == far.abs().tolist()
    assert kernel(t.float()).tolist() == pytest.approx(kernel(t).tolist(), rel=1e-6)


@pytest.mark.parametrize(("sigma", "printed"), [(0.1, 0.801864), (1.0, 1.128379), (2.0, 1.784124)])
def test_kernel_of_a_normal(sigma: float, printed: float) -> None:
    """P11: E l(N(0, sigma^2)) = sqrt(2 / pi) sqrt(1 + sigma^2)."""

    def weighed(t: float) -> float:
        return float(kernel(torch.tensor(t, dtype=torch.float64))) * stats.norm.pdf(t, scale=sigma)

    found = integrate.quad(weighed, -12 * sigma, 12 * sigma, epsabs=1e-12)[0]
    assert found == pytest.approx(math.sqrt(2 / math.pi * (1 + sigma**2)), abs=1e-10) and found == pytest.approx(printed, abs=1e-6)


def test_kernel_beside_huber_and_pseudo_huber() -> None:
    """P10."""
    x = torch.linspace(0, 5, 50_001, dtype=torch.float64, requires_grad=True)
    loss = kernel(x) - C
    [slope] = torch.autograd.grad(loss.sum(), x)
    x, loss = x.detach(), loss.detach()
    pseudo, huber = (1 + x**2).sqrt() - 1, torch.where(x > 1, x - 0.5, x**2 / 2)
    assert float((loss - pseudo).abs()[x <= 2].max()) == pytest.approx(0.0477, abs=5e-5)
    assert float((loss - pseudo).abs().max()) == pytest.approx(0.1031, abs=5e-5)
    assert float((loss - huber).abs().max()) == pytest.approx(0.2979, abs=5e-5)
    gaps = [(slope - x / (1 + x**2).sqrt()).abs(), (slope - x.clamp(max=1)).abs()]
    assert [float(gap.max()) for gap in gaps] == pytest.approx([0.0644, 0.3173], abs=5e-5)
    assert [float(x[gap.argmax()]) for gap in gaps] == pytest.approx([0.523, 1], abs=1e-3)
    assert float(slope[1] / x[1]) == pytest.approx(math.sqrt(2 / math.pi), rel=1e-6)
    assert slope.tolist() == pytest.approx((2 * stats.norm.cdf(x.numpy()) - 1).tolist(), abs=1e-14)


# exact W1


@pytest.mark.parametrize(
    "x",
    [
        *([float(value) for value in np.random.default_rng(seed).standard_t(3, size=7)] for seed in range(4)),
        [0.3],
        [-6.0],
        [2.0, 2.0],
        [0.0] * 9,
        [-1.0, -1.0, 0.5, 0.5, 0.5, 3.0],
        [5.0, 6.0, 7.0],
        [-0.1, 0.1],
        [-9.0, 9.0],
    ],
)
def test_w1_is_the_area(x: list[float]) -> None:
    """P13, with ties, one point, and samples that Phi does not cross."""
    assert float(w1(torch.tensor(x, dtype=torch.float64))) == pytest.approx(area(x), abs=1e-8)


def test_w1_is_scipys_against_a_fine_grid_of_quantiles() -> None:
    grid = stats.norm.ppf((np.arange(400_000) + 0.5) / 400_000)
    for seed, n in ((0, 1), (1, 2), (2, 50), (3, 333)):
        x = np.random.default_rng(seed).gumbel(size=n)
        assert float(w1(torch.from_numpy(x))) == pytest.approx(stats.wasserstein_distance(x, grid), abs=2e-5)


def test_w1_special_cases() -> None:
    t = torch.tensor([-3.0, -0.4, 0, 1.5], dtype=torch.float64)
    assert w1(t[:, None]).tolist() == pytest.approx(kernel(t).tolist(), abs=1e-14)  # of one point, and of equal points
    assert w1(t[:, None].expand(4, 11)).tolist() == pytest.approx(kernel(t).tolist(), abs=1e-12)
    assert float(w1(torch.zeros(1000))) == pytest.approx(0.7978845608, abs=1e-9)
    quantiles = torch.special.ndtri((torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000)
    for sigma in (0.0, 0.5, 1.0, 3.0):  # N(0, sigma^2)
        assert float(w1(sigma * quantiles)) == pytest.approx(C * abs(sigma - 1), abs=2e-4)
    assert float(w1(quantiles + 0.7)) == pytest.approx(0.7, abs=2e-4)


def test_w1_takes_any_order_shape_and_precision() -> None:
    x = torch.randn(2, 3, 40, generator=rng())
    shuffled = x[..., torch.randperm(40, generator=rng(1))]
    before = x.clone()
    found = w1(x)
    assert found.shape == (2, 3) and found.dtype == torch.float64 and torch.equal(x, before)
    assert torch.equal(w1(shuffled), found) and torch.equal(w1(-x).round(decimals=12), found.round(decimals=12))
    assert float(found[1, 2]) == pytest.approx(area([float(one) for one in x[1, 2].double()]), abs=1e-8)
    far = torch.tensor([[9.5, 9.6, 30], [-1e8, -1e8, -1e8]], dtype=torch.float64)
    assert w1(far).tolist() == pytest.approx(far.mean(1).abs().tolist(), rel=1e-12)  # all on one side: the distance of the means


def test_w1_of_draws_falls_as_1_3_over_root_n() -> None:
    """Protocol sheet, section 4: exact about 1.3 / sqrt N, against draws about 1.8 / sqrt N."""
    x = torch.randn(200, 1000, generator=rng())
    assert float(w1(x).mean()) * math.sqrt(1000) == pytest.approx(1.3, abs=0.1)
    assert float(w1_sampled(x, rng(1)).mean()) * math.sqrt(1000) == pytest.approx(1.8, abs=0.15)


def test_w1_sampled_is_scipys_on_the_same_draws() -> None:
    x = torch.randn(3, 50, generator=rng(), dtype=torch.float64) * 2
    found, drawn = w1_sampled(x, rng(5)), torch.empty(3, 50, dtype=torch.float64).normal_(generator=rng(5))
    assert found.tolist() == pytest.approx([stats.wasserstein_distance(a, b) for a, b in zip(x.numpy(), drawn.numpy(), strict=True)])


def test_the_mean_kernel_bounds_w1() -> None:
    """P5: with equality for one point and for equal ones."""
    heavy = torch.distributions.StudentT(torch.tensor(1.5, dtype=torch.float64))
    torch.manual_seed(0)
    for n in (1, 2, 5, 40):
        x = heavy.sample((2000, n)) * torch.rand(2000, 1, dtype=torch.float64) + torch.randn(2000, 1, dtype=torch.float64)
        room = kernel(x).mean(1) - w1(x)
        assert (room > -1e-12 * (1 + x.abs().amax(1))).all()
        assert (room.abs() < 1e-10 * (1 + x.abs().amax(1))).all() == (n == 1)


# directions


@pytest.mark.parametrize("kind", DIRECTIONS)
@pytest.mark.parametrize("held", [1, 700, 10**9])
@pytest.mark.parametrize(("slices", "units"), [(1, 1), (5, 3), (64, 7), (65, 200), (130, 1000), (256, 300), (3, 4000)])
def test_directions_come_in_blocks_and_have_length_one(
    kind: str, held: int, slices: int, units: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many at a time as are allowed to be held, one at least."""
    monkeypatch.setattr("regularizers.projection.BLOCK", held)
    blocks = list(directions(kind, slices, units, rng()))
    *full, last = (len(v) for v, _ in blocks)
    most = max(1, held // units)
    assert sum(full) + last == slices and all(size == most for size in full) and 0 < last <= most
    for v, length in blocks:
        assert v.shape == (len(length), units) and v.dtype == length.dtype == torch.float32
        assert torch.allclose((v / length[:, None]).double().norm(dim=1), torch.ones(len(v), dtype=torch.float64), atol=1e-6, rtol=0)
    assert len(torch.unique(torch.cat([v for v, _ in blocks]).abs(), dim=0)) == slices  # a block does not repeat the last one


@pytest.mark.parametrize("kind", DIRECTIONS)
def test_directions_are_the_generators(kind: str) -> None:
    state = torch.get_rng_state()
    first, again, other = (torch.cat([v for v, _ in directions(kind, 100, 50, rng(seed))]) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)  # nothing comes from the global one
    assert len(torch.unique(first.abs(), dim=0)) == 100
    generator = rng()
    one, two = (next(directions(kind, 2, 50, generator))[0] for _ in range(2))
    assert not torch.equal(one, two)


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
    """E l(<h, theta>) over all directions: quadrature of E|t - Z| against the density of one coordinate of theta."""
    scale = integrate.quad(lambda u: (1 - u * u) ** ((units - 3) / 2), -1, 1)[0]

    def kinked(t: float) -> float:
        return t * (2 * stats.norm.cdf(t) - 1) + 2 * stats.norm.pdf(t)

    return integrate.quad(lambda u: kinked(length * u) * (1 - u * u) ** ((units - 3) / 2) / scale, -1, 1, epsabs=1e-12)[0]


def relu_map(channels: int, side: int, last: bool) -> Tensor:
    """A smooth map after a ReLU, each channel with an offset of its own, laid out channels first or last."""
    x = torch.randn(channels, 1, side + 4, side + 4, generator=rng(3))
    x = 5 * torch.nn.functional.avg_pool2d(x, 5, 1)[:, 0] + torch.randn(channels, 1, 1, generator=rng(4))
    return (x.relu().permute(1, 2, 0) if last else x.relu()).flatten()


UNITS = 1200
KINDS: dict[str, Callable[[], Tensor]] = {
    "constant": lambda: torch.ones(UNITS),
    "random": lambda: torch.randn(UNITS, generator=rng(2)),
    "one unit": lambda: torch.eye(1, UNITS)[0],
    "ReLU map, channels first": lambda: relu_map(12, 10, last=False),
    "ReLU map, channels last": lambda: relu_map(12, 10, last=True),
    "units a window apart": lambda: (torch.arange(UNITS) % (UNITS // 256) == 0).float(),
}


@pytest.fixture(scope="module")
def means() -> dict[str, Tensor]:
    """For each kind of directions: mean of l(<h, theta>) over 256 slices, [draws, activations]; every h has RMS 1."""
    h = torch.stack([make() for make in KINDS.values()])
    h *= math.sqrt(UNITS) / h.norm(dim=1, keepdim=True)
    found = {}
    for kind in DIRECTIONS:
        generator, rows = rng(7), []
        for _ in range(400):
            blocks = directions(kind, 256, UNITS, generator)
            rows.append(torch.cat([kernel((h @ v.T / length).double()) for v, length in blocks], 1).mean(1))
        found[kind] = torch.stack(rows)
    return found


@pytest.mark.parametrize("kind", DIRECTIONS)
@pytest.mark.parametrize("place", range(len(KINDS)), ids=KINDS)
def test_slices_have_the_radial_expectation(kind: str, place: int, means: dict[str, Tensor]) -> None:
    """P6, whatever h is like."""
    values = means[kind][:, place]
    assert float(values.mean()) == pytest.approx(radial(UNITS, math.sqrt(UNITS)), abs=3 * float(values.std()) / math.sqrt(len(values)))


@pytest.mark.parametrize("place", range(len(KINDS)), ids=KINDS)
def test_toeplitz_slices_are_about_as_good_as_gaussian_ones(place: int, means: dict[str, Tensor]) -> None:
    """Windows of one vector go together a little: at worst (units a window apart) the variance doubles, else it is as before."""
    ratio = float(means["toeplitz"][:, place].var() / means["gaussian"][:, place].var())
    assert ratio < (2.5 if list(KINDS)[place] == "units a window apart" else 1.6)


def test_toeplitz_draws_few_numbers() -> None:
    """Fewer than twice the units."""
    generator, units, slices = rng(), 1000, 256
    vectors = torch.cat([v for v, _ in directions("toeplitz", slices, units, generator)])
    assert len(torch.unique(vectors.abs())) == units + units // slices * (slices - 1) < 2 * units
