"""What PER's loss is minimal at, against distances to N(0, I) that share its projections: free particles. A finding of our own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import Generator, Tensor
from torch.special import ndtr

from experiments.figure import Drawing, canvas
from regularizers.projection import directions, w1

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The gradient of each objective with respect to a particle's projection, times the number of particles: from u = Phi(p), and the middle
# m of the particle's step in the distribution function of all n (protocol sheet, 1.1, P7, P8).
Slope = Callable[[Tensor, Tensor, int], Tensor]
SLOPES: dict[str, Slope] = {
    "PER": lambda u, m, n: 2 * u - 1,  # = erf(p / sqrt 2): each particle for itself
    "sliced W1": lambda u, m, n: (2 * n * (u - m)).clamp(-1, 1),  # with one particle, m = 1/2, it is PER's
    "energy distance": lambda u, m, n: 2 * (u - m),  # PER - 1/2 mean |p_i - p_j|
}
NOTHING = 1e-6  # an RMS below it is not shown: it is on its way to 0
POINTS = 50  # of a path are measured, evenly on its axis
CONTAINED = (0.5, 0.9, 0.99)  # the circles: so much of N(0, I) in two dimensions


def draw(
    particles: int = 256,
    units: int = 16,
    mean: float = 1,
    spread: float = 2,
    steps: int = 400,
    rate: float = 0.5,
    slices: int = 256,
    seed: int = 0,
) -> Drawing:
    """RMS and sliced W1 to N(0, I) over the steps of gradient descent from N(mean, spread^2 I), and two coordinates at its end."""
    start = mean + spread * torch.randn(particles, units, generator=_rng(seed), dtype=torch.float64)
    fixed = onto(slices, units, _rng(seed + 1))  # those that measure are not those that pull
    perfect = torch.randn(particles, units, generator=_rng(seed + 2), dtype=torch.float64)
    floor, zero = (float(sliced_w1(h, fixed)) for h in (perfect, torch.zeros_like(start)))

    picture, axes = canvas(2, 3, height=2.6)
    (scale, distance, corner), clouds = axes
    parts, texts = [], []
    for place, (name, slope) in enumerate(SLOPES.items()):
        path, end = descend(start, slope, fixed, steps, rate, slices, _rng(seed + 3))
        scale.plot(path["step"], path["rms"], color=f"C{place}", label=name)
        distance.plot(path["step"], path["sw1"], color=f"C{place}")
        cloud(clouds[place], end, f"C{place}", f"{name}, after {steps} steps")
        parts.append(path.melt("step", ["rms", "sw1"], "metric").assign(objective=name, kind="path"))
        parts.append(pd.DataFrame({"x": end[:, 0], "y": end[:, 1]}).assign(objective=name, kind="particle", step=steps))
        first, last = path.iloc[0], path.iloc[-1]
        size = f"{last.rms:.2f}" if last.rms > NOTHING else f"below {NOTHING:g}"
        least = path.loc[path["sw1"].idxmin()]
        passed = f", past {least.sw1:.4f} at step {least.step:.0f}, RMS {least.rms:.2f}" if least.sw1 < 0.9 * last.sw1 else ""
        texts.append(f"{name}: RMS {first.rms:.2f} -> {size}, exact sliced W1 to N(0, I) {first.sw1:.4f} -> {last.sw1:.4f}{passed}")

    scale.axhline(1, color="0.4", linewidth=0.8, linestyle="--", label="N(0, I): RMS 1")
    distance.axhline(floor, color="0.4", linewidth=0.8, linestyle=":", label=f"{particles} draws from N(0, I)")
    distance.axhline(zero, color="0.4", linewidth=0.8, linestyle="-.", label="all particles at 0")
    powers = [10**power for power in range(10) if 10**power <= steps]
    for axis in (scale, distance):
        axis.set_xscale("symlog", linthresh=1)
        axis.set(xlabel="step of gradient descent (log scale)", xlim=(0, steps), xticks=[0, *powers])
    scale.set(ylabel="RMS of the particles (log scale)", yscale="log", ylim=(NOTHING, None))
    distance.set(ylabel="exact sliced W1 to N(0, I)", ylim=(0, None))
    corner.set_axis_off()
    handles = [pair for axis in (scale, distance) for pair in zip(*axis.get_legend_handles_labels(), strict=True)]
    handles.append((clouds[0].lines[0], f"{', '.join(f'{100 * share:.0f}' for share in CONTAINED)} % of N(0, I)"))
    corner.legend(*zip(*handles, strict=True), loc="center", frameon=False)
    texts.append(f"for comparison: {particles} draws from N(0, I) have {floor:.4f}, particles that are all 0 have {zero:.4f}")
    return Drawing(picture, pd.concat(parts, ignore_index=True), texts)


def cloud(axis: Axes, h: Tensor, color: str, title: str) -> None:
    """The first two coordinates of h [n, units]."""
    turn = torch.linspace(0, 2 * torch.pi, 200)
    for share in CONTAINED:
        radius = (-2 * torch.log(torch.tensor(1 - share))).sqrt()
        axis.plot(radius * turn.cos(), radius * turn.sin(), color="0.4", linewidth=0.8)
    axis.plot(h[:, 0], h[:, 1], "o", color=color, markersize=2.5, markeredgewidth=0)
    axis.set(xlim=(-3.6, 3.6), ylim=(-3.6, 3.6), aspect="equal", xlabel="coordinate 1", ylabel="coordinate 2", title=title)


def descend(h: Tensor, slope: Slope, fixed: Tensor, steps: int, rate: float, slices: int, rng: Generator) -> tuple[pd.DataFrame, Tensor]:
    """Gradient descent from h [n, units] with new directions at every step: (step, rms, sw1 on the directions `fixed`), and the end.

    A particle moves by rate * units times its own gradient: along a direction theta, E theta theta' is I / units. The rate falls
    to 0 linearly, since new directions at every step leave noise of its size.
    """
    h, places = h.clone(), torch.arange(len(h)).expand(slices, len(h))
    shown = {round(steps ** (place / POINTS)) for place in range(POINTS + 1)}
    rows = [measure(0, h, fixed)]
    for step in range(steps):
        theta = onto(slices, h.shape[1], rng)
        p = theta @ h.T
        ranks = torch.empty_like(places).scatter_(1, p.argsort(1), places)
        pull = slope(ndtr(p), (ranks + 0.5) / len(h), len(h))
        h -= rate * h.shape[1] * (1 - step / steps) / slices * pull.T @ theta
        if step + 1 in shown:
            rows.append(measure(step + 1, h, fixed))
    return pd.DataFrame(rows), h


def measure(step: int, h: Tensor, fixed: Tensor) -> dict[str, float]:
    return {"step": step, "rms": float(h.square().mean().sqrt()), "sw1": float(sliced_w1(h, fixed))}


def sliced_w1(h: Tensor, theta: Tensor) -> Tensor:
    """Mean over the directions theta [k, units] of the exact W1 between h [n, units], projected, and N(0, 1)."""
    return w1(theta @ h.T).mean()


def onto(slices: int, units: int, rng: Generator) -> Tensor:
    """Directions of length 1, [slices, units], in float64."""
    return torch.cat([v / length[:, None] for v, length in directions("gaussian", slices, units, rng)]).double()


def _rng(seed: int) -> Generator:
    return Generator().manual_seed(seed)
