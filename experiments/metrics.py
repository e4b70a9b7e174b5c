"""What an evaluation finds, gathered on the device batch by batch and read once."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from regularizers.base import Pass


class Metrics:
    """Of all batches together: accuracy and error in percent, cross-entropy in nats per label, perplexity, RMS of the last hidden layer."""

    def __init__(self, device: torch.device) -> None:
        self.totals = torch.zeros(3, dtype=torch.float64, device=device)  # right answers, cross-entropy, squares
        self.labels = self.units = 0

    def add(self, out: Pass) -> None:
        logits, y, h = out.logits.float().flatten(0, -2), out.batch.y.flatten(), out.features.float()
        right: Tensor = (logits.argmax(1) == y).sum()
        self.totals += torch.stack([right, cross_entropy(logits, y, reduction="sum"), h.square().sum()]).double()
        self.labels, self.units = self.labels + len(y), self.units + h.numel()

    def values(self) -> dict[str, float]:
        right, loss, square = self.totals.tolist()
        accuracy, ce = 100 * right / self.labels, loss / self.labels
        found = {"accuracy": accuracy, "error": 100 - accuracy, "ce": ce, "perplexity": perplexity(ce)}
        return found | {"feature_rms": math.sqrt(square / self.units)}


def means(sums: dict[str, Tensor], count: int) -> dict[str, float]:
    """Of sums over so many steps, which start again at 0: a vector gives one mean for each place, as `name/01` and on."""
    found: dict[str, float] = {}
    for name, value in sums.items():
        if value.dim():
            found |= {f"{name}/{place:02d}": one / count for place, one in enumerate(value.tolist(), 1)}
        else:
            found[name] = float(value) / count
        value.zero_()  # in place: a recorded step goes on adding to it
    return found


def perplexity(ce: float) -> float:
    """exp of a cross-entropy, inf where no float holds it."""
    try:
        return math.exp(ce)
    except OverflowError:
        return math.inf
