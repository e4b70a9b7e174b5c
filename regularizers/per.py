"""PER: activations are pulled towards N(0, I) in random one-dimensional projections (Joo et al. 2020, section 3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regularizers.activation import SEEN, ActivationPenalty
from regularizers.projection import DIRECTIONS, C, directions, kernel

MODES = ("slices", "analytic")


class PER(ActivationPenalty):
    """Algorithm 1: weight * (1/s) sum_k erf(<h_i, theta_k> / sqrt 2) theta_k is added to the gradient at every h_i.

    The directions theta_k are new for each tap and step, and shared by the batch. The algorithm lacks eq. 6's 1/b, and so does the
    default: `batch_reduction: mean` has it (protocol sheet, 1.1.5).
    mode: "slices" draws `slices` directions (the kinds: see projection.directions); "analytic" takes the expectation over all
    of them, sqrt(2/pi) h / (d sqrt(1 + |h|^2 / (d + 2))), whose relative error falls as 1/d: 3e-3 at d = 64, r = 1.
    """

    def __init__(
        self,
        weight: float,
        mode: str = "slices",
        slices: int = 256,
        directions: str = "gaussian",
        batch_reduction: str = "sum",
        spatial: str = "units",
    ) -> None:
        super().__init__(weight, batch_reduction, spatial)
        for key, value, allowed in (("mode", mode, MODES), ("directions", directions, DIRECTIONS)):
            if value not in allowed:
                raise ValueError(f"{key}: {value!r} is not known; allowed: {', '.join(allowed)}")
        if slices < 1:
            raise ValueError(f"slices: {slices} is not allowed; it must be at least 1")
        self.mode, self.slices, self.directions = mode, slices, directions

    def pull(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.expected(h) if self.mode == "analytic" else self.projected(h)

    def expected(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Over all directions the penalty depends on the length of h alone (protocol sheet, 1.1.3)."""
        d = h.shape[1]
        square = torch.linalg.vector_norm(h, dim=1).square()
        return C * (1 + square[:SEEN] / d).sqrt(), (C / d * (1 + square / (d + 2)).rsqrt())[:, None], h

    def projected(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss, direction = h.new_zeros(len(h[:SEEN])), None
        for v, length in directions(self.directions, self.slices, h.shape[1], self.rng, h.device):
            p = h @ v.T / length
            e = torch.erf(p / math.sqrt(2)) / length
            direction = e @ v if direction is None else direction.addmm_(e, v)
            loss += kernel(p[:SEEN]).sum(1)
        assert direction is not None
        return loss / self.slices, h.new_full((), 1 / self.slices), direction
