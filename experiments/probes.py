"""What is measured at each epoch's end for a figure, besides the test set: `probe=...`, none by default."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from data.bundle import Batch
from experiments.config import ConfigError
from experiments.rng import generator
from experiments.trainer import Row, Trainer
from regularizers.projection import directions, w1, w1_sampled

QUARTILES = (0.25, 0.5, 0.75)


class Activations:
    """The distribution of activations over training images, in evaluation mode and without augmentation (PER, figures 4 and 5).

    layers: which taps, from 1 on. images: so many training images, the first, the same for all runs.
    Of one unit of each layer, the same in all runs: q25, q50, q75, mean, and unbiased variance; after the non-linearity, and with
    pre_ before it. Of the layer: rms, and sw1, the mean over `slices` fixed directions of the exact W1 to N(0, 1), and
    sw1_sampled, the same with draws from N(0, 1) as in the paper. Directions and draws are those of all epochs and methods.
    """

    def __init__(self, layers: Sequence[int], images: int = 10_000, slices: int = 256) -> None:
        if images < 2 or slices < 1:
            raise ValueError(f"images: {images}, slices: {slices} are not allowed; at least 2 images and 1 slice")
        self.layers, self.images, self.slices = list(layers), images, slices
        self.directions: dict[tuple[int, int], Tensor] = {}

    def begin(self, trainer: Trainer) -> Row:
        """The untrained network, before the first step."""
        return {} if trainer.step else self.end(trainer)

    @torch.inference_mode()
    def end(self, trainer: Trainer) -> Row:
        if trainer.bundle.unit != "images":
            raise ConfigError(f"probe: activations looks at images, and the data set has {trainer.bundle.unit}")
        x, y = (values[: self.images] for values in trainer.bundle.splits["train"])
        parts: dict[int, list[tuple[Tensor, ...]]] = {layer: [] for layer in self.layers}
        trainer.net.eval()
        for images, labels in zip(*(values.split(trainer.cfg.evaluate.batch_size) for values in (x, y)), strict=True):
            out = trainer.forward(Batch(trainer.bundle.prepare(images), labels, labels), activations=True, preactivations=True)
            for layer in self.layers:
                if not 1 <= layer <= len(out.activations):
                    raise ConfigError(f"probe.layers: {layer} is not allowed; the network has layers 1 to {len(out.activations)}")
                h, z = (tap[layer - 1].float().flatten(1) for tap in (out.activations, out.preactivations))
                place = int(torch.randint(h.shape[1], (), generator=generator(0, f"unit {layer}", "cpu")))
                parts[layer].append((h[:, place], z[:, place], h @ self.onto(layer, h).T, h.square().mean(1)))
        trainer.net.train()

        row: Row = {}
        for layer, part in parts.items():
            unit, before, projected, square = (torch.cat(some) for some in zip(*part, strict=True))
            values = statistics(unit) | {f"pre_{name}": value for name, value in statistics(before).items()}
            values |= {"rms": square.mean().sqrt(), "sw1": w1(projected.T).mean()}
            values["sw1_sampled"] = w1_sampled(projected.T, generator(0, f"normal {layer}", projected.device)).mean()
            row |= {f"layer{layer}/{name}": float(value) for name, value in values.items()}
        return row

    def onto(self, layer: int, h: Tensor) -> Tensor:
        """The layer's directions, [slices, d], of length 1."""
        key = layer, h.shape[1]
        if key not in self.directions:
            rng = generator(0, f"directions {layer}", h.device)
            blocks = directions("gaussian", self.slices, h.shape[1], rng, h.device)
            self.directions[key] = torch.cat([v / length[:, None] for v, length in blocks])
        return self.directions[key]


def statistics(unit: Tensor) -> dict[str, Tensor]:
    """Quartiles, mean and unbiased variance of [n]."""
    quartiles = torch.quantile(unit, unit.new_tensor(QUARTILES))
    return {f"q{100 * q:.0f}": value for q, value in zip(QUARTILES, quartiles, strict=True)} | {"mean": unit.mean(), "var": unit.var()}
