"""Projections on random directions, and Wasserstein-1 distances to N(0, 1) on the line (PER, eqs. 3 to 6)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Generator, Tensor
from torch.special import ndtr, ndtri

C = math.sqrt(2 / math.pi)  # the kernel's value at 0
BLOCK = 2**26  # numbers of directions that are held at a time, 256 MiB: a 64x64 map with 384 channels would need six times that
DIRECTIONS = ("gaussian", "toeplitz")


def kernel(t: Tensor) -> Tensor:
    """l(t) = t erf(t / sqrt 2) + sqrt(2 / pi) exp(-t^2 / 2) (PER, eq. 5), which is E|t - Z| = W1(one point at t, N(0, 1))."""
    return t * torch.erf(t / math.sqrt(2)) + C * torch.exp(-t.square() / 2)


def directions(kind: str, slices: int, units: int, rng: Generator, device: torch.device | str = "cpu") -> Iterator[tuple[Tensor, Tensor]]:
    """`slices` random vectors, uniform in direction, as blocks: (v [k, units], their lengths [k]), as many as fit. float32.

    gaussian: all of v is drawn. toeplitz: each vector is a window of one long Gaussian vector, mirrored unit by unit with signs that
    all windows share: by itself each is as Gaussian as before, so that every expectation over a direction is the same, for
    `units` and some draws instead of `slices` times `units`. The signs keep two windows of like activations from going together.
    """
    most = max(1, BLOCK // units)
    if kind == "gaussian":
        for start in range(0, slices, most):
            v = torch.empty(min(most, slices - start), units, device=device).normal_(generator=rng)
            yield v, torch.linalg.vector_norm(v, dim=1)
        return
    shift = max(1, units // slices)
    long = torch.empty(units + shift * (slices - 1), device=device).normal_(generator=rng)
    signs = torch.empty(units, device=device).bernoulli_(generator=rng).mul_(2).sub_(1)
    windows = long.unfold(0, units, shift)
    for start in range(0, slices, most):
        v = windows[start : start + most] * signs
        yield v, torch.linalg.vector_norm(v, dim=1)


def w1(x: Tensor) -> Tensor:
    """The exact W1 between each sample x [..., n] and N(0, 1), [...], in float64: no draws from the Gaussian.

    The area between the sample's distribution function and Phi, piece by piece between the sorted values (protocol sheet, section 4).
    """
    x = x.double().sort(-1).values
    n = x.shape[-1]
    ends = _mass(x[..., 0]) + _mass(-x[..., -1])
    p = torch.arange(1, n, dtype=x.dtype, device=x.device) / n
    left, right = x[..., :-1], x[..., 1:]
    q = torch.maximum(torch.minimum(ndtri(p).expand_as(left), right), left)  # where Phi crosses the sample's step
    between = p * (q - left) - (_mass(q) - _mass(left)) + (_mass(right) - _mass(q)) - p * (right - q)
    return ends + between.sum(-1)


def _mass(x: Tensor) -> Tensor:
    """The integral of Phi from minus infinity to x."""
    return x * ndtr(x) + torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)


def w1_sampled(x: Tensor, rng: Generator) -> Tensor:
    """W1 between each sample x [..., n] and as many draws from N(0, 1), [...]: the paper's measure, 1.8 / sqrt n at a perfect match."""
    drawn = torch.empty(x.shape, dtype=x.dtype, device=x.device).normal_(generator=rng)
    return (x.sort(-1).values - drawn.sort(-1).values).abs().mean(-1)
