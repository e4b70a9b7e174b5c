"""The theorems of Unitization as properties of random laws, and what of them holds for the layer (protocol sheet, B.4)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, stats
from torch import Tensor, tensor

from experiments.figures import bounds
from experiments.figures.bounds import w1
from models.unitization import Unitization, practical, scalar, vanilla, vector

TOL = 1 + 1e-9
LAWS = 40  # pairs for each seed
seeds = pytest.mark.parametrize("seed", range(5))
pytestmark = pytest.mark.usefixtures("one_thread")  # the arrays are small


def pairs(seed: int, laws: int = LAWS, n: int = 8) -> Iterator[tuple[Tensor, Tensor, np.random.Generator]]:
    """Two samples [n, d], d from 1 to 6, each with a law and a scale of its own."""
    rng = np.random.default_rng(seed)
    for _ in range(laws):
        d, kinds = rng.integers(1, 7), rng.integers(5, size=2)
        made = []
        for kind in kinds:
            draws = [rng.normal(0.5, 1, (n, d)), rng.standard_cauchy((n, d)), rng.integers(-1, 2, (n, d)), rng.exponential(size=(n, d))]
            made.append(10 ** rng.uniform(-3, 3) * np.asarray([*draws, np.ones((n, 1)) * rng.normal(size=d)][kind], float))
        yield torch.from_numpy(made[0]), torch.from_numpy(made[1]), rng


def inside(rng: np.random.Generator, d: int) -> Tensor:
    """alpha [d] in [0, 1], the ends included."""
    return torch.from_numpy(rng.uniform(-0.3, 1.3, d).clip(0, 1))


def length(x: Tensor, least: float = 0) -> float:
    return float(np.maximum(np.sqrt((x.numpy() ** 2).sum(1)), least).mean())


def at(*values: float) -> Tensor:
    """The law of one point, as a sample."""
    return tensor([values], dtype=torch.float64)


# the distance


@seeds
def test_w1_is_the_best_of_all_permutations(seed: int) -> None:
    for n in range(1, 7):
        for x, y, _ in pairs(seed, laws=2, n=n):
            best = min(sum(math.dist(a, b) for a, b in zip(x.tolist(), p, strict=True)) / n for p in itertools.permutations(y.tolist()))
            assert w1(x, y) == pytest.approx(best, rel=1e-12)


@seeds
def test_w1_on_the_line_is_scipys(seed: int) -> None:
    for x, y, _ in pairs(seed):
        for a, b in zip(x.T, y.T, strict=True):
            assert w1(a[:, None], b[:, None]) == pytest.approx(stats.wasserstein_distance(a, b), rel=1e-9)


@seeds
def test_facts_w1_is_the_largest_difference_of_a_1_lipschitz_mean(seed: int) -> None:
    """A linear programme over the values at the points, 0 among them, where f is 0; and any such f stays below."""
    for x, y, rng in pairs(seed, laws=5):
        x, y = x / (x.norm(dim=1).mean() + y.norm(dim=1).mean()), y / (x.norm(dim=1).mean() + y.norm(dim=1).mean())
        points = np.concatenate([x, y, np.zeros((1, x.shape[1]))])
        far = np.linalg.norm(points[:, None] - points, axis=2)
        first, second = np.nonzero(~np.eye(len(points), dtype=bool))
        steps = np.eye(len(points))[first] - np.eye(len(points))[second]
        signs = np.array([-1] * len(x) + [1] * len(y) + [0]) / len(x)
        ends = [(None, None)] * (len(points) - 1) + [(0, 0)]
        found = optimize.linprog(signs, A_ub=steps, b_ub=far[first, second], bounds=ends)
        assert w1(x, y) == pytest.approx(-found.fun, rel=1e-6, abs=1e-9)
        anchors = torch.from_numpy(rng.normal(size=(3, 1, x.shape[1])))
        f_x, f_y = ((law - anchors).norm(dim=2).amin(0) for law in (x, y))
        assert abs(float(f_x.mean() - f_y.mean())) <= w1(x, y) * TOL


# theorems 1 and 2


@seeds
def test_theorem_1(seed: int) -> None:
    for x, y, _ in pairs(seed):
        a, b = x.numpy(), y.numpy()
        traces, apart = (a.var(0).sum(), b.var(0).sum()), float(np.linalg.norm(a.mean(0) - b.mean(0)))
        assert w1(x, y) <= (sharp := sum(map(math.sqrt, traces)) + apart) * TOL < (printed := sum(traces) + apart + 2)
        assert (bounds.theorem_1(x, y), bounds.theorem_1_sharper(x, y)) == pytest.approx((printed, sharp))


def test_theorem_1_is_attained_and_only_its_sharper_form_scales() -> None:
    x, y, spread = at(3, 4), at(-3, -4), tensor([[1.0], [-1.0]], dtype=torch.float64)
    assert w1(x, y) == 10 == bounds.theorem_1_sharper(x, y) == bounds.theorem_1(x, y) - 2
    assert w1(spread, 0 * spread) == 1 == bounds.theorem_1_sharper(spread, 0 * spread)
    assert bounds.theorem_1(spread, 0 * spread) == 3 and bounds.theorem_1(10 * spread, 0 * spread) == 102
    for x, y, _ in pairs(0):
        assert w1(7 * x, 7 * y) == pytest.approx(7 * w1(x, y))
        assert bounds.theorem_1_sharper(7 * x, 7 * y) == pytest.approx(7 * bounds.theorem_1_sharper(x, y))
        assert bounds.theorem_1(7 * x, 7 * y) != pytest.approx(7 * bounds.theorem_1(x, y))


def test_w1_can_pass_theorem_1_without_its_constant() -> None:
    small = tensor([[0.1], [-0.1]], dtype=torch.float64)
    assert w1(small, 0 * small) > 5 * (bounds.theorem_1(small, 0 * small) - 2)


@seeds
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_theorem_2(n: int, seed: int) -> None:
    for x, y, rng in pairs(seed, laws=10):
        d, c = x.shape[-1], float(x.abs().max()) * 10 ** rng.uniform(-1, 1)
        near = x + 0.01 * c * torch.from_numpy(rng.normal(size=x.shape))
        f_x, f_y, f_near = ((np.clip(law, -c, c) ** n).sum(1) / (n * c ** (n - 1) * math.sqrt(d)) for law in map(np.asarray, (x, y, near)))
        for f, law in ((f_y, y), (f_near, near)):
            assert (np.abs(f - f_x) <= (law - x).norm(dim=1).numpy() * TOL + 1e-12 * c).all()
        assert w1(x, y) * TOL >= (lower := abs(f_x.mean() - f_y.mean())) - 1e-15 * c
        assert bounds.theorem_2(x, y, n, c) == pytest.approx(lower, rel=1e-9, abs=1e-12 * c)


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_theorem_2_is_attained_at_the_corner_of_its_cube(n: int) -> None:
    corner = 5 * torch.ones(1, 3, dtype=torch.float64)
    assert bounds.theorem_2(corner, corner * (1 - 1e-6), n, 5) == pytest.approx(w1(corner, corner * (1 - 1e-6)), rel=1e-5)
    assert bounds.theorem_2(corner, 2 * corner, n, 5) == 0 < w1(corner, 2 * corner)
    assert bounds.theorem_2(corner, -corner, n, 5) == pytest.approx(0 if n % 2 == 0 else 10 * math.sqrt(3) / n)


def test_moments_of_the_example() -> None:
    for n in range(1, 25):
        first, second = Fraction(2, n + 1) * (1 - Fraction(1, 2 ** (n + 1))), Fraction(1, 4**n * (n + 1))
        assert float(first) == pytest.approx(integrate.quad(lambda t, n=n: 2 * t**n, 0.5, 1)[0])
        assert float(second) == pytest.approx(integrate.quad(lambda t, n=n: 4 * t**n, 0, 0.25)[0])
        assert first > Fraction(1, 2**n) and second < Fraction(1, 4**n)
        assert Fraction(5, 8) >= (first - second) / n > (Fraction(1, 2**n) - Fraction(1, 4**n)) / n  # of theorem 2, C = C'
        assert (n == 1) == (Fraction(5, 8) == (first - second) / n)


@pytest.mark.parametrize("d", [1, 2, 4])
def test_w1_of_the_example(d: int) -> None:
    rng, n = np.random.default_rng(d), 500
    x, y = (torch.from_numpy(rng.uniform(low, high, (n, d))) for low, high in ((0.5, 1), (0, 0.25)))
    error = 4 * math.sqrt((0.5**2 + 0.25**2) / 12 / n)  # of the means along the diagonal
    assert 0.625 - error / math.sqrt(d) <= w1(x, y) / math.sqrt(d) <= (0.625 if d == 1 else math.sqrt(19 / 48)) + error / math.sqrt(d)
    coupled = (0.5 + y).norm(dim=1)  # C'/2 + 2 y has the law of x; its squared distance from y is d (1/4 + E y + E y^2)
    assert w1(0.5 + 2 * y, y) <= float(coupled.mean()) * TOL and Fraction(1, 4) + Fraction(1, 8) + Fraction(1, 48) == Fraction(19, 48)
    assert float(coupled.mean()) / math.sqrt(d) <= math.sqrt(19 / 48) + error / math.sqrt(d)
    for size in (10, 1e3):
        assert w1(size * x, size * y) == pytest.approx(size * w1(x, y), rel=1e-12)


# theorem 3


@seeds
def test_theorem_3_1(seed: int) -> None:
    for x, y, rng in pairs(seed):
        assert w1(vanilla(x), vanilla(y)) <= 2 * TOL and torch.allclose(vanilla(x).norm(dim=1), torch.ones(8).double())
        one = torch.from_numpy(rng.normal(size=(1, 4)))
        assert w1(vanilla(one), vanilla(-one)) == pytest.approx(2) == bounds.THEOREM_3_1


@seeds
def test_theorem_3_2(seed: int) -> None:
    for x, y, rng in pairs(seed):
        alpha = float(inside(rng, 1))
        gx, gy = scalar(x, alpha), scalar(y, alpha)
        printed = 2 / alpha if alpha else length(x) + length(y)
        uniform = min(2 / alpha if alpha else math.inf, length(x, 1) + length(y, 1))
        assert (bounds.theorem_3_2(x, y, alpha), bounds.uniform_3_2(x, y, alpha)) == pytest.approx((printed, uniform))
        assert w1(gx, gy) <= min(printed, uniform) * TOL
        assert (gx.norm(dim=1) * alpha <= TOL).all() and (gx.norm(dim=1) <= x.norm(dim=1).clamp(min=1) * TOL).all()


def test_theorem_3_2_is_attained_and_grows_without_end() -> None:
    far = at(1e6, 1e6)
    for alpha in (0.1, 0.5, 1):
        assert w1(scalar(far, alpha), scalar(-far, alpha)) == pytest.approx(2 / alpha, rel=1e-4)
    assert w1(scalar(far, 0), scalar(-far, 0)) == bounds.theorem_3_2(far, -far, 0)
    near = at(0.6, 0.8)
    assert w1(scalar(near, 1e-9), scalar(-near, 1e-9)) == pytest.approx(2) == bounds.uniform_3_2(near, -near, 1e-9)
    assert bounds.theorem_3_2(near, -near, 1e-9) == pytest.approx(2e9) and bounds.theorem_3_2(near, -near, 0) == pytest.approx(2)


@seeds
def test_theorem_3_3(seed: int) -> None:
    for x, y, rng in pairs(seed):
        alpha = inside(rng, x.shape[1]) if rng.random() < 0.5 else torch.from_numpy(rng.uniform(0.01, 1, x.shape[1]))
        gx, gy, lowest = vector(x, alpha), vector(y, alpha), min(alpha.tolist())
        printed = 2 / lowest if lowest else length(x) + length(y) + 2
        uniform = length(x, 1) + length(y, 1)
        assert (bounds.theorem_3_3(x, y, alpha), bounds.uniform_3_3(x, y)) == pytest.approx((printed, uniform))
        assert w1(gx, gy) <= min(printed, uniform) * TOL
        for g, law in ((gx, x), (gy, y)):
            norms = law.norm(dim=1, keepdim=True)
            least = (alpha * norms + (1 - alpha)).amin(1)  # the proof's: the lowest of the sums
            assert (g.norm(dim=1) * least <= norms[:, 0] * TOL).all()
            assert (g.norm(dim=1) * lowest <= TOL).all() and (g.norm(dim=1) <= norms[:, 0].clamp(min=1) * TOL).all()


def test_theorem_3_3_is_nearly_attained() -> None:
    far = at(1e6, 1)
    for alpha in ([0.1, 1.0], [0.5, 0.5], [0.0, 1.0]):
        assert w1(vector(far, tensor(alpha)), vector(-far, tensor(alpha))) > 0.99 * bounds.theorem_3_3(far, -far, tensor(alpha))


@seeds
def test_theorem_3_4(seed: int) -> None:
    for x, y, rng in pairs(seed):
        d, eps = x.shape[1], 10 ** rng.uniform(-4, 0)
        old, new = (torch.from_numpy(rng.normal(0, 3, d)) if rng.random() < 0.5 else inside(rng, d) for _ in range(2))
        for a in (old, new):
            peak, rest = max(map(abs, a.tolist())), max(abs(1 - one) for one in a.tolist())
            g = practical(x, a, eps)
            assert (g.norm(dim=1) <= (peak + rest * x.norm(dim=1)) * TOL).all()
            moderate = x / max(length(x), 1e-9)  # of longer ones the difference is lost in float64
            if peak:
                assert (practical(moderate, a, eps).norm(dim=1) < peak + rest * moderate.norm(dim=1)).all()
            printed = 2 * peak + rest * (length(x) + length(y))
            assert w1(g, practical(y, a, eps)) <= printed * TOL and bounds.theorem_3_4(x, y, a, a) == pytest.approx(printed)
        both = [max(map(abs, a.tolist())) + max(abs(1 - one) for one in a.tolist()) * length(law) for a, law in ((old, x), (new, y))]
        assert w1(practical(x, old, eps), practical(y, new, eps)) <= sum(both) * TOL
        assert bounds.theorem_3_4(x, y, old, new) == pytest.approx(sum(both))


def test_theorem_3_4_is_constant_for_alpha_1_only_and_needs_one_alpha() -> None:
    x, one = at(3, 4), torch.ones(2).double()
    for share in (0.0, 0.9, 1.0, 1.1, -2.0):
        apart = [w1(practical(s * x, share * one, 1e-3), practical(-s * x, share * one, 1e-3)) for s in (1, 1e3, 1e6)]
        assert (apart[2] > 900 * apart[1] > 900 * apart[0]) == (share != 1)
        if share == 1:
            assert max(apart) < 2 and apart[0] > 1.99
        elif share <= 1:  # beyond 1 the two parts work against each other
            assert apart[2] > 0.99 * bounds.theorem_3_4(1e6 * x, 1e6 * x, share * one, share * one)
    moved = w1(practical(x, one, 1e-3), practical(-x, 5 * one, 1e-3))
    assert 2 < moved <= bounds.theorem_3_4(x, x, one, 5 * one) and bounds.theorem_3_4(x, x, one, one) == 2


# the maps


def test_maps_at_zero() -> None:
    zero, one = torch.zeros(2, 3).double(), torch.ones(3).double()
    assert vanilla(zero).norm(dim=1).tolist() == [1, 1] and vanilla(zero)[0].equal(vanilla(zero)[1])
    assert scalar(zero, 1).equal(vanilla(zero))
    for share in (0.0, 0.4, 1.0):
        assert not vector(zero, share * one).any() and not practical(zero, share * one, 1e-3).any()
        assert share == 1 or not scalar(zero, share).any()


@seeds
def test_linear_and_harmonic_mixes(seed: int) -> None:
    for x, _, rng in pairs(seed):
        d = x.shape[1]
        x = x[(x.norm(dim=1) > 0) & ((x.norm(dim=1) - 1).abs() > 1e-6)]  # on the unit sphere all maps are the identity
        ends, share = torch.from_numpy(rng.integers(0, 2, d).astype(float)), float(rng.uniform(0.1, 0.9))
        between = torch.from_numpy(rng.uniform(0.1, 0.9, d))
        torch.testing.assert_close(vector(x, ends), practical(x, ends, 0))
        assert (vector(x, between).abs() < practical(x, between, 0).abs())[x != 0].all()
        assert (vector(x, inside(rng, d)).shape == x.shape) and torch.allclose(scalar(x, 1), vanilla(x), atol=0)
        torch.testing.assert_close(vector(x, torch.full((d,), share).double()), scalar(x, share))
        for row, g in zip(x.numpy(), vector(x, between).numpy(), strict=True):
            stretched = (np.linalg.norm(row) - 1) * np.diag(between.numpy()) + np.eye(d)
            assert g == pytest.approx(np.linalg.solve(stretched, row))


# the layer


def batches(seed: int) -> Iterator[tuple[Unitization, list[Tensor], list[Tensor], int, np.random.Generator]]:
    """A layer, two batches [N, C, H, W], both as it normalises them before it unitizes, H W."""
    rng = np.random.default_rng(seed)
    for _ in range(LAWS // 4):
        n, c, h, w = rng.integers(2, 9), *rng.integers(1, 7, 3)
        made = [torch.from_numpy(10 ** rng.uniform(-3, 3) * rng.normal(rng.normal(), 1, (n, c, h, w)) ** 3) for _ in range(2)]
        count = n * h * w
        normalised = []
        for x in made:
            var = x.var((0, 2, 3), correction=0, keepdim=True) * count / (count - 1 - 1e-3)
            normalised.append(((x - x.mean((0, 2, 3), keepdim=True)) / (var + 1e-3).sqrt()).flatten(1))
        yield Unitization(int(c)).double().requires_grad_(False), made, normalised, int(h * w), rng


@seeds
def test_the_layers_unitized_branch(seed: int) -> None:
    passed = []
    for layer, made, normalised, pixels, rng in batches(seed):
        for x, z in zip(made, normalised, strict=True):
            torch.testing.assert_close(layer(x).flatten(1), z)  # alpha is 0
            assert float(z.square().mean()) < 1
            layer.alpha.fill_(1)
            norms = layer(x).flatten(1).norm(dim=1)
            assert (norms < pixels).all()
            passed += norms.tolist()
            alpha = torch.from_numpy(rng.normal(0, 2, len(layer.alpha)))
            layer.alpha.copy_(alpha)
            branch = layer(x).flatten(1) - (1 - alpha).repeat_interleave(pixels) * z
            assert (branch.norm(dim=1) < pixels * alpha.abs().max() * TOL).all()
            layer.alpha.zero_()
    assert sum(norm > 1 for norm in passed) > len(passed) / 2


@pytest.mark.parametrize(("channels", "side", "ratio"), [(16, 32, 0.970), (32, 16, 0.996), (64, 8, 0.9995)])
def test_the_branch_nearly_attains_its_bound_in_every_stage(channels: int, side: int, ratio: float) -> None:
    layer = Unitization(channels).double().requires_grad_(False)
    layer.alpha.fill_(1)
    x = torch.randn(8, channels, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    norms = layer(x).flatten(1).norm(dim=1) / side**2
    assert norms.max() < 1 and float(norms.mean()) == pytest.approx(ratio, abs=1e-3)


@seeds
def test_the_layers_bound_needs_its_pixels(seed: int) -> None:
    ratios, failed = [], 0
    for layer, made, (z, other), pixels, rng in batches(seed):
        alpha = torch.from_numpy(rng.normal(0, 2, len(layer.alpha))) if rng.random() < 0.5 else inside(rng, 1).expand(len(layer.alpha))
        layer.alpha.copy_(alpha)
        distance = w1(layer(made[0]).flatten(1), layer(made[1]).flatten(1))
        peak, rest = max(map(abs, alpha.tolist())), max(abs(1 - one) for one in alpha.tolist())
        true, literal = (2 * factor * peak + rest * (length(z) + length(other)) for factor in (pixels, 1))
        assert bounds.layer_bound(z, other, alpha, pixels) == pytest.approx(true)
        assert bounds.layer_bound(z, other, alpha, 1) == pytest.approx(literal)
        assert distance <= true * TOL
        ratios.append(distance / true)
        failed += distance > literal * TOL

        weight, biases = torch.from_numpy(rng.normal(size=len(alpha))), torch.from_numpy(rng.normal(size=(2, len(alpha))))
        layer.weight.copy_(weight)
        outputs = []
        for x, bias in zip(made, biases, strict=True):
            layer.bias.copy_(bias)
            outputs.append(layer(x).flatten(1))
        moved = math.sqrt(pixels) * float((biases[0] - biases[1]).norm())
        assert w1(*outputs) <= (float(weight.abs().max()) * true + moved) * TOL
    assert failed >= 1 and max(ratios) > 0.5


# the figure


def test_the_figure_counts_what_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "POINTS", 20)
    drawing, again = bounds.draw(30, 8, 1), bounds.draw(30, 8, 1)
    numbers = drawing.numbers
    assert numbers.equals(again.numbers) and drawing.lines == again.lines
    assert not numbers.equals(bounds.draw(30, 8, 2).numbers) and len(numbers) == 30 * 12 + 2 * 9
    assert [axis.get_title().partition(",")[0] for axis in drawing.picture.axes] == numbers["panel"].unique().tolist()
    named = numbers[numbers["panel"] != bounds.EXAMPLE].groupby(["panel", "form"], sort=False)
    for line, ((panel, form), of) in zip(drawing.lines, named, strict=False):
        lower = panel == "theorem 2"
        held = sum(b <= w * TOL if lower else w <= b * TOL for w, b in zip(of["w1"], of["bound"], strict=True))
        assert line.startswith(f"{panel}, {form}: holds for {held} of 30 pairs of laws") and (held == 30) == (form != "without H W")
        assert ("FAIL" in line) == (held < 30)
    assert sum(line.startswith("unbounded W1, d = ") for line in drawing.lines) == 9 and len(drawing.lines) == named.ngroups + 9
