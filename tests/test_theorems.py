"""The theorems of Unitization as properties of random laws, and what of them holds for the layer (protocol sheet, B.4)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, tensor

from experiments.figures import bounds
from experiments.figures.bounds import w1
from models.unitization import Unitization, practical, scalar, vanilla, vector

TOL = 1 + 1e-9
pytestmark = pytest.mark.usefixtures("one_thread")  # the arrays are small


def pairs(laws: int = 60, n: int = 8) -> Iterator[tuple[Tensor, Tensor, np.random.Generator]]:
    """Two samples [n, d], d from 1 to 6, each with a law and a scale of its own."""
    rng = np.random.default_rng(0)
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


def test_w1_is_the_best_of_all_permutations() -> None:
    for n in range(1, 7):
        for x, y, _ in pairs(laws=4, n=n):
            best = min(sum(math.dist(a, b) for a, b in zip(x.tolist(), p, strict=True)) / n for p in itertools.permutations(y.tolist()))
            assert w1(x, y) == pytest.approx(best, rel=1e-12)


def test_theorem_1() -> None:
    for x, y, _ in pairs():
        a, b = x.numpy(), y.numpy()
        traces, apart = (a.var(0).sum(), b.var(0).sum()), float(np.linalg.norm(a.mean(0) - b.mean(0)))
        assert w1(x, y) <= (sharp := sum(map(math.sqrt, traces)) + apart) * TOL < (printed := sum(traces) + apart + 2)
        assert (bounds.theorem_1(x, y), bounds.theorem_1_sharper(x, y)) == pytest.approx((printed, sharp))
    x, y = at(3, 4), at(-3, -4)
    assert w1(x, y) == 10 == bounds.theorem_1_sharper(x, y) == bounds.theorem_1(x, y) - 2  # attained


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_theorem_2(n: int) -> None:
    for x, y, rng in pairs(laws=20):
        d, c = x.shape[-1], float(x.abs().max()) * 10 ** rng.uniform(-1, 1)
        f_x, f_y = ((np.clip(law, -c, c) ** n).sum(1) / (n * c ** (n - 1) * math.sqrt(d)) for law in map(np.asarray, (x, y)))
        assert w1(x, y) * TOL >= (lower := abs(f_x.mean() - f_y.mean())) - 1e-15 * c
        assert bounds.theorem_2(x, y, n, c) == pytest.approx(lower, rel=1e-9, abs=1e-12 * c)


def test_the_example_s_bounds() -> None:
    """U[C'/2, C']^d and U[0, C'/4]^d: means sqrt(d) C' 5/8 apart; a coupling, x = C'/2 + 2 y, bounds W1 from above."""
    error = 4 * math.sqrt((0.5**2 + 0.25**2) / 12 / bounds.POINTS)  # the error of the means along the diagonal
    for row in bounds.example(np.random.default_rng(0)):
        size = row["scale_x"] * math.sqrt(row["d"])
        coupled = 0.625 if row["d"] == 1 else math.sqrt(19 / 48)
        assert 0.625 - error / math.sqrt(row["d"]) <= row["w1"] / size <= coupled + error / math.sqrt(row["d"])
        assert row["bound"] == pytest.approx(size * (3 / 32 if row["form"].startswith("paper's") else 5 / 8))


def test_theorems_3_1_to_3_3() -> None:
    for x, y, rng in pairs():
        alpha = inside(rng, x.shape[1]) if rng.random() < 0.5 else torch.from_numpy(rng.uniform(0.01, 1, x.shape[1]))
        share, lowest = float(alpha[0]), min(alpha.tolist())
        printed = 2 / share if share else length(x) + length(y), 2 / lowest if lowest else length(x) + length(y) + 2
        uniform = length(x, 1) + length(y, 1)
        assert (bounds.theorem_3_2(x, y, share), bounds.theorem_3_3(x, y, alpha)) == pytest.approx(printed)
        assert (bounds.uniform_3_2(x, y, share), bounds.uniform_3_3(x, y)) == pytest.approx((min(2 / (share or 1e-300), uniform), uniform))
        assert w1(vanilla(x), vanilla(y)) <= 2 * TOL and torch.allclose(vanilla(x).norm(dim=1), torch.ones(8).double())
        assert w1(scalar(x, share), scalar(y, share)) <= min(printed[0], uniform) * TOL
        assert w1(vector(x, alpha), vector(y, alpha)) <= min(printed[1], uniform) * TOL


def test_theorem_3_4() -> None:
    for x, y, rng in pairs():
        d, eps = x.shape[1], 10 ** rng.uniform(-4, 0)
        old, new = (torch.from_numpy(rng.normal(0, 3, d)) if rng.random() < 0.5 else inside(rng, d) for _ in range(2))
        for a, b in ((old, old), (old, new)):
            sides = [max(map(abs, c.tolist())) + max(abs(1 - entry) for entry in c.tolist()) * length(law) for c, law in ((a, x), (b, y))]
            assert bounds.theorem_3_4(x, y, a, b) == pytest.approx(sum(sides))
            assert w1(practical(x, a, eps), practical(y, b, eps)) <= sum(sides) * TOL


def test_bounds_of_theorem_3_are_attained() -> None:
    far, near, ones = at(1e6, 1), at(3, 4), torch.ones(2).double()
    assert w1(vanilla(far), vanilla(-far)) == pytest.approx(2) == bounds.THEOREM_3_1
    for alpha in (0.0, 0.1, 1.0):
        assert w1(scalar(far, alpha), scalar(-far, alpha)) == pytest.approx(bounds.theorem_3_2(far, -far, alpha), rel=1e-4)
    assert w1(scalar(near, 1e-9), scalar(-near, 1e-9)) == pytest.approx(10) == bounds.uniform_3_2(near, -near, 1e-9)
    for weights in ([0.1, 1.0], [0.5, 0.5], [0.0, 1.0]):
        assert w1(vector(far, tensor(weights)), vector(-far, tensor(weights))) > 0.99 * bounds.theorem_3_3(far, -far, tensor(weights))
    for alpha in (0.0, 0.9, 1.0):
        apart = w1(practical(far, alpha * ones, 1e-3), practical(-far, alpha * ones, 1e-3))
        assert apart > 0.99 * bounds.theorem_3_4(far, -far, alpha * ones, alpha * ones)
    moved = w1(practical(near, ones, 1e-3), practical(-near, 5 * ones, 1e-3))
    assert 2 < moved <= bounds.theorem_3_4(near, near, ones, 5 * ones)  # theorem 3.4 needs one alpha for both laws


def test_maps_at_zero() -> None:
    zero, ones = torch.zeros(2, 3).double(), torch.ones(3).double()
    assert vanilla(zero).norm(dim=1).tolist() == [1, 1] and vanilla(zero)[0].equal(vanilla(zero)[1])
    assert scalar(zero, 1).equal(vanilla(zero))
    for share in (0.0, 0.4, 1.0):
        assert not vector(zero, share * ones).any() and not practical(zero, share * ones, 1e-3).any()
        assert share == 1 or not scalar(zero, share).any()


def test_linear_and_harmonic_mixes() -> None:
    for x, _, rng in pairs():
        d = x.shape[1]
        x = x[(x.norm(dim=1) > 0) & ((x.norm(dim=1) - 1).abs() > 1e-6)]  # on the unit sphere all maps are the identity
        ends, between = torch.from_numpy(rng.integers(0, 2, d).astype(float)), torch.from_numpy(rng.uniform(0.1, 0.9, d))
        torch.testing.assert_close(vector(x, ends), practical(x, ends, 0))
        assert (vector(x, between).abs() < practical(x, between, 0).abs())[x != 0].all()
        torch.testing.assert_close(vector(x, between[:1].expand(d)), scalar(x, float(between[0])))
        for row, g in zip(x.numpy(), vector(x, between).numpy(), strict=True):
            stretched = (np.linalg.norm(row) - 1) * np.diag(between.numpy()) + np.eye(d)
            assert g == pytest.approx(np.linalg.solve(stretched, row))


def test_the_layer_s_bound_needs_its_pixels() -> None:
    rng, ratios, failed = np.random.default_rng(0), [], 0
    for _ in range(20):
        n, c, h, w = rng.integers(2, 9), *rng.integers(1, 7, 3)
        made = [torch.from_numpy(10 ** rng.uniform(-3, 3) * rng.normal(rng.normal(), 1, (n, c, h, w)) ** 3) for _ in range(2)]
        layer = Unitization(int(c)).double().requires_grad_(False)
        z, other = (layer(x).flatten(1) for x in made)  # normalised: alpha is 0
        alpha = torch.from_numpy(rng.normal(0, 2, c)) if rng.random() < 0.5 else inside(rng, 1).expand(int(c))
        layer.alpha.copy_(alpha)
        distance = w1(layer(made[0]).flatten(1), layer(made[1]).flatten(1))
        peak, rest = max(map(abs, alpha.tolist())), max(abs(1 - entry) for entry in alpha.tolist())
        true, literal = (2 * factor * peak + rest * (length(z) + length(other)) for factor in (h * w, 1))
        assert bounds.layer_bound(z, other, alpha, int(h * w)) == pytest.approx(true)
        assert bounds.layer_bound(z, other, alpha, 1) == pytest.approx(literal)
        assert distance <= true * TOL
        ratios.append(distance / true)
        failed += distance > literal * TOL
    assert failed >= 1 and max(ratios) > 0.5


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
